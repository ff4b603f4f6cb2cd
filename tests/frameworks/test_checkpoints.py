"""Files that the real frameworks write are read, and what is written here they read, by bits."""

from __future__ import annotations

import copy
import logging
import warnings
from types import SimpleNamespace

import pytest
import stubs
import torch
from nets import Net, assert_same, move, same, values_of
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

stubs.install()

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ema_pytorch
    import lightning.pytorch as pl
    import mmcv.runner
    import mmengine.hooks
    import mmengine.model
    import mmengine.runner
    import safetensors.torch
    import timm.utils
    import torch_ema
    from diffusers import ConfigMixin, ModelMixin
    from diffusers.configuration_utils import register_to_config
    from diffusers.training_utils import EMAModel
    from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
    from mmdet.core.hook import ema as mmdet_hooks
    from timm.models import load_checkpoint

from fused_ema import EMAManager, schedules, state  # noqa: E402
from fused_ema.__main__ import main  # noqa: E402
from fused_ema.formats import Found  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '[a-z_]*' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:`torch.jit"),
    pytest.mark.filterwarnings("ignore:Environment variable TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"),
    pytest.mark.filterwarnings("ignore:On January 1, 2023, MMCV"),
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler"),
]


@pytest.fixture(autouse=True)
def able_to_load(monkeypatch):
    # Checkpoints of MMEngine hold more than tensors, which its own torch.load refuses by default.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
M, NUM_BATCHES = 0.25, 3


def untied(dtype=torch.float32):
    model = Net(dtype)
    model.head.weight = nn.Parameter(model.embedding.weight.detach().clone())
    return model


def parameters_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same_values(actual, expected):
    """By name: lists have the order of named_parameters(), not of state_dict()."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        same(actual[name], tensor, name)


class Average:
    """The plain loop, beside a framework's own."""

    def __init__(self, model):
        self.values = values_of(model)
        self.num_updates = 0

    def update(self, model, momentum=M):
        self.num_updates += 1
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and name in self.values:
                self.values[name].mul_(1 - momentum).add_(tensor, alpha=momentum)


# ---- MMDetection 2.x in the runners of mmcv


class Trained(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.net = untied(dtype)

    def train_step(self, data, optimizer):
        loss = sum(p.float().sum() for p in self.parameters() if p.requires_grad)
        return {"loss": loss, "log_vars": {"loss": 0.0}, "num_samples": 1}


EPOCHS, ITERS = mmcv.runner.EpochBasedRunner, mmcv.runner.IterBasedRunner


class Mover(mmcv.runner.Hook):
    """Stands for the optimizer, and keeps the plain averages of every iteration."""

    def __init__(self, model):
        self.model, self.average, self.seen = model, Average(model), {}

    def after_train_iter(self, runner):
        move(self.model.net, runner.iter)
        self.average.update(self.model)
        names = self.average.values
        raw = {n: t.clone() for n, t in self.model.state_dict().items() if n in names}
        self.seen[runner.iter + 1] = raw, {n: t.clone() for n, t in names.items()}


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    for module in ("epoch_based_runner", "iter_based_runner"):
        monkeypatch.setattr(f"mmcv.runner.{module}.time", SimpleNamespace(sleep=lambda _: None))


def quiet_logger():
    made = logging.getLogger("test_checkpoints")
    made.propagate = False
    made.setLevel(logging.CRITICAL)
    return made


def run_mmcv(folder, model, runner=EPOCHS, by_epoch=True, priority=49, interval=1, config=None):
    """Raw weights and averages by iteration; checkpoints in the folder."""
    mover = Mover(model)
    limit = {"max_epochs": 2} if runner is EPOCHS else {"max_iters": 2 * NUM_BATCHES}
    made = runner(
        model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        work_dir=str(folder),
        logger=quiet_logger(),
        meta={} if config is None else {"config": config},
        **limit,
    )
    made.register_hook(mover, priority="VERY_HIGH")
    checkpoint = {"interval": interval, "by_epoch": by_epoch, "create_symlink": False}
    made.register_checkpoint_hook(checkpoint)
    # After the other hooks, as MMDetection does: of one priority, the first one goes first.
    made.register_hook(mmdet_hooks.BaseEMAHook(momentum=M), priority=priority)
    made.run([torch.utils.data.DataLoader(range(NUM_BATCHES))], [("train", 1)])
    return mover.seen


EARLY = "custom_hooks = [dict(type='EMAHook', momentum=0.25, priority=49)]"
LATE = "custom_hooks = [dict(type='EMAHook', momentum=0.25)]"
CONFIG = "checkpoint_config = dict(interval=1)\n"


@pytest.mark.parametrize("dtype", DTYPES)
def test_mmdet_at_the_end_of_an_epoch(dtype, tmp_path):
    seen = run_mmcv(tmp_path, Trained(dtype), config=CONFIG + EARLY)
    for epoch in (1, 2):
        raw, ema = seen[epoch * NUM_BATCHES]
        file = tmp_path / f"epoch_{epoch}.pth"
        found = state.read(file, model=Trained(dtype))
        assert (found.format, found.iteration) == ("mmcv", epoch * NUM_BATCHES)
        assert (found.epoch, found.momentum) == (epoch, M)
        assert_same(found.ema, ema)
        assert_same(found.raw, raw)
        inner = state.read(file, model=untied(dtype), prefix="net.")
        assert list(inner.ema) == [name.removeprefix("net.") for name in ema]


def test_mmdet_without_a_config(tmp_path):
    seen = run_mmcv(tmp_path, Trained(torch.float32))
    with pytest.raises(ValueError, match="main='ema' or main='raw'"):
        state.read(tmp_path / "epoch_1.pth")
    assert_same(state.read(tmp_path / "epoch_1.pth", main="ema").ema, seen[3][1])
    assert_same(state.read(tmp_path / "epoch_2.pth").ema, seen[6][1])


@pytest.mark.parametrize("runner", [EPOCHS, ITERS])
@pytest.mark.parametrize("config", [None, "checkpoint_config = dict(by_epoch=False)\n" + EARLY])
def test_mmdet_within_an_epoch(runner, config, tmp_path):
    model = Trained(torch.float32)
    seen = run_mmcv(tmp_path, model, runner, by_epoch=False, interval=2, config=config)
    # A runner of epochs names these files by the epoch, so that some are written over.
    names = {2: "epoch_1", 6: "epoch_2"} if runner is EPOCHS else {i: f"iter_{i}" for i in (2, 4)}
    for iteration, name in names.items():
        raw, ema = seen[iteration]
        file = tmp_path / f"{name}.pth"
        if name == "epoch_1" and config is None:
            with pytest.raises(ValueError, match="main='ema' or main='raw'"):
                state.read(file)
            continue
        found = state.read(file, model=Trained(torch.float32))
        assert_same(found.ema, ema)
        assert_same(found.raw, raw)
        assert (found.iteration, found.momentum) == (iteration, M if config else None)


@pytest.mark.parametrize("priority", ["NORMAL", "LOW"])
def test_mmdet_saves_before_a_late_swap(priority, tmp_path):
    model = Trained(torch.float32)
    late = LATE.replace(")]", f", priority='{priority}')]") if priority == "LOW" else LATE
    seen = run_mmcv(tmp_path, model, priority=priority, config=CONFIG + late)
    for epoch in (1, 2):
        raw, ema = seen[epoch * NUM_BATCHES]
        found = state.read(tmp_path / f"epoch_{epoch}.pth", model=Trained(torch.float32))
        assert_same(found.ema, ema)
        assert_same(found.raw, raw)
        assert found.iteration == epoch * NUM_BATCHES
        assert "priority" in found.why


def test_a_manager_goes_on_from_mmdet(tmp_path):
    run_mmcv(tmp_path, Trained(torch.float32), config=CONFIG + EARLY)
    model = untied()
    found = state.read(tmp_path / "epoch_1.pth", model=model, prefix="net.")
    settings = {"form": "mul_add", "ema_dtype": "param", "buffers": "average"}
    manager = EMAManager(model, M, **settings)
    model.load_state_dict(found.raw)
    state.load_into(manager, found)
    for _ in range(NUM_BATCHES):
        move(model, manager.iteration)
        manager.update()
    last = state.read(tmp_path / "epoch_2.pth", model=model, prefix="net.")
    assert_same(manager.named_emas(), last.ema)
    assert_same(values_of(model), last.raw)
    assert manager.iteration == last.iteration == 2 * NUM_BATCHES


def test_mmcv_reads_what_is_written(tmp_path):
    run_mmcv(tmp_path, Trained(torch.float32), config=CONFIG + EARLY)
    found = state.read(tmp_path / "epoch_2.pth")
    state.write(tmp_path / "ours.pth", found, "mmcv")
    theirs = torch.load(tmp_path / "epoch_2.pth", weights_only=False)
    ours = torch.load(tmp_path / "ours.pth", weights_only=True)
    assert_same(ours["state_dict"], theirs["state_dict"])
    assert {k: ours["meta"][k] for k in ("epoch", "iter")} == {"epoch": 2, "iter": 6}
    model = Trained(torch.float32)
    mmcv.runner.load_checkpoint(model, str(tmp_path / "ours.pth"), logger=quiet_logger())
    assert_same(values_of(model), found.ema)


# ---- MMEngine


class Engine(mmengine.model.BaseModel):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.net = untied(dtype)

    def forward(self, inputs, mode="tensor"):
        return {"loss": sum(p.float().sum() for p in self.parameters() if p.requires_grad)}

    def train_step(self, data, optim_wrapper):
        move(self.net, int(data[0]))
        return {"loss": torch.zeros(())}


class Averages(mmengine.hooks.Hook):
    priority = "LOWEST"

    def __init__(self):
        self.seen = {}

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        hook = next(h for h in runner.hooks if isinstance(h, mmengine.hooks.EMAHook))
        averaged = values_of(hook.ema_model.module)
        self.seen[runner.iter + 1] = values_of(runner.model), averaged


@pytest.mark.parametrize(("dtype", "by_epoch"), [(t, True) for t in DTYPES] + [(DTYPES[0], False)])
def test_mmengine(dtype, by_epoch, tmp_path):
    model, averages = Engine(dtype), Averages()
    length = {"max_epochs": 2} if by_epoch else {"max_iters": 6}
    runner = mmengine.runner.Runner(
        model,
        str(tmp_path),
        train_dataloader=torch.utils.data.DataLoader(range(NUM_BATCHES)),
        train_cfg={"by_epoch": by_epoch, **length},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.0}},
        default_hooks={
            "checkpoint": {
                "type": "CheckpointHook",
                "interval": 1 if by_epoch else NUM_BATCHES,
                "by_epoch": by_epoch,
            },
            "logger": None,
        },
        custom_hooks=[{"type": "EMAHook", "momentum": M}, averages],
        log_level="CRITICAL",
        default_scope="mmengine",
        experiment_name=tmp_path.name,
    )
    runner.train()
    for epoch in (1, 2):
        iteration = epoch * NUM_BATCHES
        file = tmp_path / (f"epoch_{epoch}.pth" if by_epoch else f"iter_{iteration}.pth")
        raw, ema = averages.seen[iteration]
        # MMEngine's own message hub is in it, with numpy arrays: they are left alone.
        found = state.read(file)
        assert (found.format, found.iteration) == ("mmengine", iteration)
        assert found.num_updates == iteration
        assert_same(found.ema, ema)
        assert_same(found.raw, raw)
        assert any(not torch.equal(raw[n], ema[n]) for n in raw)
    # What is written is resumed by its hook.
    state.write(tmp_path / "ours.pth", found, "mmengine")
    again = torch.load(tmp_path / "ours.pth", weights_only=True)
    theirs = torch.load(file, weights_only=False)
    for key in ("state_dict", "ema_state_dict"):
        assert_same(again[key], theirs[key])
    hook = mmengine.hooks.EMAHook(momentum=M)
    fresh = Engine(dtype)
    hook.before_run(SimpleNamespace(model=fresh))
    hook.after_load_checkpoint(SimpleNamespace(_resume=True), again)
    assert_same(values_of(hook.ema_model.module), ema)
    assert_same(again["state_dict"], raw)
    assert hook.ema_model.steps == 6


# ---- torch, timm


@pytest.mark.parametrize("dtype", DTYPES)
def test_averaged_model(dtype, tmp_path):
    model = untied(dtype)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(1 - M))
    for step in range(3):
        move(model, step)
        averaged.update_parameters(model)
    torch.save({"net": model.state_dict(), "swa": averaged.state_dict()}, tmp_path / "x")
    found = state.read(tmp_path / "x", model=model)
    assert (found.format, found.num_updates, found.iteration) == ("averaged_model", 3, None)
    assert_same(found.ema, averaged.module.state_dict())
    assert_same(found.raw, model.state_dict())
    manager = EMAManager(model, M, ema_dtype="param", copy_buffers=True)
    state.load_into(manager, found)
    for step in range(3, 6):
        move(model, step)
        averaged.update_parameters(model)
        manager.update()
    values = parameters_of(averaged.module)
    assert_same({n: dict(manager.named_emas())[n] for n in values}, values)
    assert manager.num_updates == averaged.n_averaged
    # And back.
    state.write(tmp_path / "y", found, "averaged_model")
    fresh = AveragedModel(untied(dtype))
    fresh.load_state_dict(torch.load(tmp_path / "y", weights_only=True))
    assert_same(fresh.module.state_dict(), found.ema)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("version", ["ModelEmaV2", "ModelEmaV3"])
def test_timm(version, dtype, tmp_path):
    model = untied(dtype)
    ema = getattr(timm.utils, version)(model, decay=1 - M)
    for step in range(2):
        move(model, step)
        ema.update(model)
    options = {"args": SimpleNamespace(model="net"), "model_ema": ema}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    saver = timm.utils.CheckpointSaver(
        model, optimizer, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path), **options
    )
    saver.save_checkpoint(3, metric=0.5)
    file = tmp_path / "last.pth.tar"
    found = state.read(file, model=model)
    assert (found.format, found.epoch, found.iteration) == ("timm", 3, None)
    assert_same(found.ema, ema.module.state_dict())
    assert_same(found.raw, model.state_dict())
    state.write(tmp_path / "ours.pth", found, "timm")
    for use_ema, values in ((True, found.ema), (False, found.raw)):
        fresh = untied(dtype)
        load_checkpoint(fresh, str(tmp_path / "ours.pth"), use_ema=use_ema, weights_only=True)
        assert_same(values_of(fresh), values)


# ---- averages as lists


class Tiny(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, width: int = 4):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_diffusers(dtype, tmp_path):
    torch.manual_seed(0)
    model = Tiny().to(dtype)
    ema = EMAModel(model.parameters(), decay=1 - M, model_cls=Tiny, model_config=model.config)
    for step in range(4):
        move(model, step)
        ema.step(model.parameters())
    averages = dict(zip(parameters_of(model), ema.shadow_params, strict=True))
    torch.save(ema.state_dict(), tmp_path / "state.bin")
    found = state.read(tmp_path / "state.bin", model=model)
    assert (found.format, found.num_updates, found.momentum) == ("diffusers", 4, M)
    assert_same(found.ema, averages)
    state.write(tmp_path / "again.bin", found, "diffusers", model=model)
    again = EMAModel(Tiny().to(dtype).parameters())
    again.load_state_dict(torch.load(tmp_path / "again.bin", weights_only=True))
    assert_same(dict(enumerate(again.shadow_params)), dict(enumerate(ema.shadow_params)))
    assert (again.optimization_step, again.decay) == (4, 1 - M)


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("shards", [False, True])
def test_diffusers_folder(shards, variant, tmp_path, monkeypatch):
    model = Tiny()
    ema = EMAModel(model.parameters(), decay=1 - M, model_cls=Tiny, model_config=model.config)
    for step in range(2):
        move(model, step)
        ema.step(model.parameters())
    averages = dict(zip(parameters_of(model), ema.shadow_params, strict=True))
    saved = ModelMixin.save_pretrained
    options = {"variant": variant, **({"max_shard_size": 200} if shards else {})}
    monkeypatch.setattr(ModelMixin, "save_pretrained", lambda m, path: saved(m, path, **options))
    ema.save_pretrained(str(tmp_path))
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 + shards or shards
    found = state.read(tmp_path, model=model, variant=variant)
    assert (f".{variant}." in found.ema_at) == (variant is not None)
    assert_same(found.ema, state.read(tmp_path, model=model).ema)
    assert (found.format, found.iteration, found.momentum) == ("diffusers", 2, M)
    assert_same({n: found.ema[n] for n in averages}, averages)


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_ema(dtype, tmp_path):
    model = untied(dtype)
    ema = torch_ema.ExponentialMovingAverage(model.parameters(), decay=1 - M)
    for step in range(3):
        move(model, step)
        ema.update()
    ema.store()
    averages = dict(zip(parameters_of(model), ema.shadow_params, strict=True))
    torch.save(ema.state_dict(), tmp_path / "x")
    found = state.read(tmp_path / "x", model=model)
    assert (found.format, found.num_updates, found.momentum) == ("torch_ema", 3, M)
    assert_same_values(found.ema, averages)
    assert_same_values(found.raw, parameters_of(model))
    state.write(tmp_path / "y", found, "torch_ema", model=model)
    again = torch_ema.ExponentialMovingAverage(untied(dtype).parameters(), decay=0.5)
    again.load_state_dict(torch.load(tmp_path / "y", weights_only=True))
    assert_same(dict(enumerate(again.shadow_params)), dict(enumerate(ema.shadow_params)))
    assert (again.num_updates, again.decay) == (3, 1 - M)


# ---- ema-pytorch, Lightning


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("online", [False, True])
def test_ema_pytorch(online, dtype, tmp_path):
    model = untied(dtype)
    options = {"beta": 1 - M, "update_every": 1, "update_after_step": 0}
    ema = ema_pytorch.EMA(model, include_online_model=online, **options)
    for step in range(4):
        move(model, step)
        ema.update()
    torch.save(ema.state_dict(), tmp_path / "x")
    found = state.read(tmp_path / "x", model=model)
    assert (found.format, found.iteration) == ("ema_pytorch", 4)
    assert_same(found.ema, ema.ema_model.state_dict())
    assert_same(found.raw, model.state_dict() if online else {})
    own = {name: tensor.contiguous() for name, tensor in ema.state_dict().items()}
    safetensors.torch.save_file(own, tmp_path / "x.safetensors")
    stored = state.read(tmp_path / "x.safetensors", model=model)
    assert (stored.format, stored.iteration) == ("ema_pytorch", 4)
    assert_same_values(stored.ema, found.ema)
    assert_same_values(stored.raw, found.raw)
    state.write(tmp_path / "y", found, "ema_pytorch")
    assert_same(torch.load(tmp_path / "y", weights_only=True), ema.state_dict())
    again = ema_pytorch.EMA(untied(dtype), include_online_model=online, **options)
    again.load_state_dict(torch.load(tmp_path / "y", weights_only=True))
    assert_same(again.ema_model.state_dict(), found.ema)


class Module(pl.LightningModule):
    def __init__(self, dtype):
        super().__init__()
        self.net = untied(dtype)
        self.averages = None

    def training_step(self, batch):
        move(self.net, int(batch[0]))
        return sum((p * 0).sum() for p in self.parameters() if p.requires_grad)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_lightning(dtype, tmp_path):
    module = Module(dtype)
    averaging = EMAWeightAveraging(decay=1 - M)
    seen = []

    class Keep(pl.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            averaged = averaging._average_model
            seen.append((values_of(module), values_of(averaged.module), int(averaged.n_averaged)))

    trainer = pl.Trainer(
        default_root_dir=str(tmp_path),
        max_steps=5,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            averaging,
            Keep(),
            ModelCheckpoint(str(tmp_path), "{step}", every_n_train_steps=3, save_top_k=-1),
        ],
    )
    trainer.fit(module, torch.utils.data.DataLoader(range(8)))
    raw, ema, num_updates = seen[2]
    found = state.read(tmp_path / "step=3.ckpt", model=untied(dtype), prefix="net.")
    assert (found.format, found.iteration, found.num_updates) == ("lightning", 3, num_updates)
    assert_same({f"net.{n}": t for n, t in found.ema.items()}, ema)
    assert_same({f"net.{n}": t for n, t in found.raw.items()}, raw)
    assert any(not torch.equal(raw[n], ema[n]) for n in raw)
    manager = EMAManager(untied(dtype), momentum_fun=schedules.exponential(0.1), ema_dtype="param")
    state.load_into(manager, found)
    assert manager.iteration == 3


# ---- safetensors


def test_safetensors_both_ways(tmp_path):
    torch.manual_seed(0)
    tensors = {
        f"{dtype}".removeprefix("torch."): torch.randint(0, 2, (3, 5)).to(dtype)
        for dtype in (*DTYPES, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    }
    tensors |= {
        "bool": torch.tensor([True, False, True]),
        "f8": torch.randn(7).to(torch.float8_e4m3fn),
        "f8_5": torch.randn(3).to(torch.float8_e5m2),
        "u16": torch.arange(3).to(torch.uint16),
        "complex": torch.randn(3, dtype=torch.complex64),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
    }
    bits = {n: t.contiguous().reshape(-1).view(torch.uint8) for n, t in tensors.items()}

    def check(values):
        assert values.keys() == tensors.keys()
        for name, tensor in values.items():
            assert (tensor.dtype, tensor.shape) == (tensors[name].dtype, tensors[name].shape), name
            assert torch.equal(tensor.contiguous().reshape(-1).view(torch.uint8), bits[name]), name

    file = tmp_path / "theirs.safetensors"
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    check(state.read(file).ema)
    state.write(tmp_path / "ours", Found("test", tensors, iteration=3), "safetensors")
    check(safetensors.torch.load_file(tmp_path / "ours"))
    with safetensors.safe_open(tmp_path / "ours", "pt") as opened:
        assert opened.metadata()["format"] == "pt"
    strided = copy.deepcopy(Net().body[0].weight.data)
    assert not strided.is_contiguous()
    state.write(tmp_path / "strided", Found("test", {"a": strided}), "safetensors")
    assert torch.equal(safetensors.torch.load_file(tmp_path / "strided")["a"], strided)


def test_a_command_for_a_real_file(tmp_path, capsys):
    run_mmcv(tmp_path, Trained(torch.float32), config=CONFIG + EARLY)
    source, out = str(tmp_path / "epoch_2.pth"), str(tmp_path / "ema.safetensors")
    assert main(["inspect", source]) == 0
    assert "told by     meta hook_msgs: saved at the end of an epoch" in capsys.readouterr().out
    assert main(["convert", source, out, "--to", "safetensors"]) == 0
    found = state.read(source)
    written = safetensors.torch.load_file(out)
    assert_same({name: written[name] for name in found.ema}, found.ema)
