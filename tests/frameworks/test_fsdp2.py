"""Models that FSDP2 shards, in the frameworks' own trainers, on two processes."""

from __future__ import annotations

import os
from unittest.mock import patch

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, DistributedType, GradientState, PartialState
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import PretrainedConfig, PreTrainedModel, Trainer, TrainerCallback
from transformers import TrainingArguments as Arguments

import fused_ema
from fused_ema.hooks.lightning import EMA
from fused_ema.hooks.transformers import EMACallback
from fused_ema.testing import assert_bits_equal


def whole(named):
    return {
        name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()
        for name, t in dict(named).items()
    }


def assert_same(actual, expected, what):
    assert list(actual) == list(expected), what
    for name, tensor in expected.items():
        assert_bits_equal(actual[name], tensor, f"{what}: {name}")


def is_close(seen, want):
    """Of a whole model the same products may be added up in another order."""
    return torch.allclose(seen, want, rtol=1e-5, atol=1e-6)


class Loop:
    """The average of a model as a loop over its shards."""

    def __init__(self, model, momentum):
        self.momentum = momentum
        self.ema = {n: p._local_tensor.clone() for n, p in model.named_parameters()}

    def update(self, model):
        for name, p in model.named_parameters():
            self.ema[name].lerp_(p._local_tensor, self.momentum)

    def check(self, manager, what):
        averages = {name: t._local_tensor for name, t in manager.named_emas()}
        assert_same(averages, self.ema, what)


# ---- accelerate and transformers


def join_accelerate():
    """Tells accelerate of these ranks: of accelerators, since it has no FSDP for the CPU."""
    world = str(dist.get_world_size())
    os.environ |= {"RANK": str(dist.get_rank()), "LOCAL_RANK": str(dist.get_rank())}
    os.environ |= {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "OMP_NUM_THREADS": "1"}
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    made = PartialState.__init__

    def make(self, *args, **kwargs):
        made(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_XPU

    return patch.object(PartialState, "__init__", make)


class Config(PretrainedConfig):
    model_type = "fused-ema-test"


class Model(PreTrainedModel):
    config_class = Config

    def __init__(self, config=None, seed=0):
        torch.manual_seed(seed)
        super().__init__(config or Config())
        self.first = nn.Embedding(7, 8)
        self.block = nn.Sequential(nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 5))
        self.last = nn.Linear(5, 1)
        self.seen = []
        self.post_init()

    def _init_weights(self, module):
        pass

    def get_input_embeddings(self):
        return self.first

    def get_output_embeddings(self):
        return None

    def forward(self, x, labels=None):
        y = self.last(self.block(self.first(x))).mean((1, 2))
        if not self.training:
            self.seen.append(y.detach().clone())
        return {"loss": (y - labels).square().mean(), "logits": y}


def data(count):
    generator = torch.Generator().manual_seed(1)
    return [
        {"x": torch.randint(7, (3,), generator=generator), "labels": float(i)} for i in range(count)
    ]


def batch(step):
    samples = data(40)[(2 * step + dist.get_rank()) * 2 :][:2]
    x, labels = torch.stack([s["x"] for s in samples]), [s["labels"] for s in samples]
    return {"x": x, "labels": torch.tensor(labels)}


def logits(weights, x):
    """What a whole model of these weights computes."""
    model = Model().eval()
    model.load_state_dict(weights)
    with torch.no_grad():
        return model(x, torch.zeros(len(x)))["logits"]


def prepared(seed, momentum=0.25):
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Sequential"],
        state_dict_type="SHARDED_STATE_DICT",
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    assert accelerator.is_fsdp2
    model = Model(seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    model, optimizer = accelerator.prepare(model, optimizer)
    ema = fused_ema.EMAManager(model, momentum=momentum)
    ema.register_step_post_hook(optimizer)
    return accelerator, model, optimizer, ema


def run(accelerator, model, optimizer, steps):
    for step in steps:
        accelerator.backward(model(**batch(step))["loss"])
        optimizer.step()
        optimizer.zero_grad()


def keep(accelerator, ema):
    """As the docstring of fused_ema.hooks.transformers has it."""
    accelerator.register_save_state_pre_hook(
        lambda models, weights, folder: dcp.save({"ema": ema}, checkpoint_id=f"{folder}/ema")
    )
    accelerator.register_load_state_pre_hook(
        lambda models, folder: dcp.load({"ema": ema}, checkpoint_id=f"{folder}/ema")
    )


def loop_with_accelerate(folder):
    with join_accelerate():
        accelerator, model, optimizer, ema = prepared(seed=0)
        keep(accelerator, ema)
        loop = Loop(model, 0.25)
        for step in range(4):
            run(accelerator, model, optimizer, [step])
            loop.update(model)
            loop.check(ema, step)
            average = whole(ema.named_emas())
            with ema.swapped(), torch.no_grad():
                seen = model.eval()(**batch(9))["logits"]
                assert is_close(seen, logits(average, batch(9)["x"]))
                model.train()
            if step == 1:
                accelerator.save_state(f"{folder}/accelerate")
        ends = whole(model.named_parameters()), whole(ema.named_emas())

        AcceleratorState._reset_state(True)
        accelerator, model, optimizer, ema = prepared(seed=1)
        keep(accelerator, ema)
        accelerator.load_state(f"{folder}/accelerate")
        assert ema.num_updates == 2
        run(accelerator, model, optimizer, [2, 3])
        assert_same(whole(model.named_parameters()), ends[0], "resumed: the model")
        assert_same(whole(ema.named_emas()), ends[1], "resumed: the average")


def test_a_loop_with_accelerate(two, tmp_path):
    two(loop_with_accelerate, str(tmp_path))


def one_rank_s_shards(folder):
    with join_accelerate():
        accelerator, model, optimizer, ema = prepared(seed=0)
        accelerator.register_for_checkpointing(ema)
        run(accelerator, model, optimizer, [0])
        accelerator.save_state(f"{folder}/one")
        run(accelerator, model, optimizer, [1])
        before = whole(ema.named_emas())
        with pytest.raises(ValueError, match=r"is the shard of the rank at .*0.*, not of this one"):
            accelerator.load_state(f"{folder}/one")
        assert_same(whole(ema.named_emas()), before, "nothing was changed")


def test_shards_that_one_rank_has_pickled_are_an_error_on_all(two, tmp_path):
    two(one_rank_s_shards, str(tmp_path))


class Watch(TrainerCallback):
    """The average as a loop, compared at every step."""

    def __init__(self):
        self.loop, self.ema, self.averages, self.raws = None, None, [], []

    def on_step_end(self, args, state, control, model, **kwargs):
        if self.loop is None:
            self.loop = Loop(model, 0.25)  # The update comes after, as the callback joined later.
            self.loop.ema = {n: t._local_tensor.clone() for n, t in self.ema.manager.named_emas()}
        self.loop.update(model)

    def on_evaluate(self, args, state, control, model, **kwargs):
        self.loop.check(self.ema.manager, state.global_step)
        self.averages.append(whole(self.ema.manager.named_emas()))
        self.raws.append(whole(model.named_parameters()))


def trainer_of(folder, seed, version=2, **options):
    config = {"version": version, "transformer_layer_cls_to_wrap": ["Sequential"]}
    config["state_dict_type"] = options.pop("kind", "SHARDED_STATE_DICT")
    arguments = Arguments(
        **{"output_dir": folder, "use_cpu": True, "fsdp": True, "fsdp_config": config},
        **{"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2},
        **{"max_steps": 4, "learning_rate": 0.05},
        **{"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2},
        # The loss falls: so the first checkpoint is the "best" one.
        **{"metric_for_best_model": "loss", "greater_is_better": True},
        **{"logging_strategy": "no", "report_to": [], "disable_tqdm": True, **options},
    )
    watch = Watch()
    trainer = Trainer(
        Model(seed=seed),
        arguments,
        train_dataset=data(16),
        eval_dataset=data(4),
        callbacks=[watch],
    )
    watch.ema = EMACallback(momentum=0.25, save_to=f"{folder}/average").attach(trainer)
    return trainer, watch


def in_the_trainer(folder):
    with join_accelerate():
        for kind in ("SHARDED_STATE_DICT", "FULL_STATE_DICT"):
            out = f"{folder}/{kind}"
            trainer, watch = trainer_of(out, 0, kind=kind)
            trainer.train()
            model, manager = trainer.model, watch.ema.manager
            assert all(isinstance(p, DTensor) for p in model.parameters())
            assert manager.num_updates == 4
            x = torch.stack([s["x"] for s in data(4)])[2 * dist.get_rank() :][:2]
            assert len(model.seen) == len(watch.averages) == 2
            for seen, average in zip(model.seen, watch.averages, strict=True):
                assert is_close(seen, logits(average, x))
            ends = whole(model.named_parameters()), whole(manager.named_emas())
            assert_same(ends[1], watch.averages[-1], "after the last evaluation")
            dist.barrier()  # The first process has written it.
            saved = whole(Model.from_pretrained(f"{out}/average").named_parameters())
            assert_same(saved, ends[1], "save_to")
            for step in (2, 4):
                files = os.listdir(f"{out}/checkpoint-{step}")
                assert [name for name in files if "ema" in name] == ["ema"]
                assert os.path.isfile(f"{out}/checkpoint-{step}/ema/.metadata")

            first = watch.raws[0], watch.averages[0]
            trainer, watch = trainer_of(out, 1, kind=kind, load_best_model_at_end=True)
            trainer.train(resume_from_checkpoint=f"{out}/checkpoint-2")
            (raw,), (average,) = watch.raws, watch.averages
            assert_same(raw, ends[0], "resumed: the model")
            assert_same(average, ends[1], "resumed: the average")
            assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
            assert_same(whole(trainer.model.named_parameters()), first[0], "the best: the model")
            assert_same(whole(watch.ema.manager.named_emas()), first[1], "the best: the average")


def test_the_trainer(two, tmp_path):
    two(in_the_trainer, str(tmp_path))


# ---- Lightning


class Module(pl.LightningModule):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 1))
        self.seen, self.raws = [], []

    def configure_model(self):
        if not isinstance(self.net[0].weight, DTensor):
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.net[1], mesh=mesh)
            fully_shard(self.net, mesh=mesh)

    def training_step(self, x):
        return self.net(x).square().mean()

    def validation_step(self, x):
        self.seen.append(self.net(x))

    def on_train_batch_end(self, outputs, x, batch_idx):
        self.raws.append(whole(self.named_parameters()))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.05)


class Average(pl.Callback):
    """The average as a loop, compared at every step."""

    def __init__(self, ema):
        self.ema, self.averages = ema, []

    def on_train_start(self, trainer, module):
        self.loop = Loop(module, 0.25)
        self.loop.ema = {n: t._local_tensor.clone() for n, t in self.ema.manager.named_emas()}
        self.start = whole(self.ema.manager.named_emas()), whole(module.named_parameters())

    def on_train_batch_end(self, trainer, module, outputs, x, batch_idx):
        self.loop.update(module)
        self.loop.check(self.ema.manager, trainer.global_step)
        self.averages.append(whole(self.ema.manager.named_emas()))


def inputs():
    return torch.randn(12, 6, generator=torch.Generator().manual_seed(1))


def fitted(folder, seed, deploy, is_distributed, **more):
    """Three steps an epoch."""
    world = dist.get_world_size()
    strategy = ModelParallelStrategy(world, 1, is_distributed, process_group_backend="gloo")
    ema = EMA(momentum=0.25, deploy=deploy)
    average = Average(ema)
    averaging = [ema, average] if more.pop("is_averaged", True) else []
    every = pl.callbacks.ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=strategy,
        max_epochs=2,
        callbacks=[*averaging, every],
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Module(seed)
    loader = DataLoader(inputs(), 2)
    if "validate" in more:
        trainer.validate(module, loader, ckpt_path=more["validate"], verbose=False)
    else:
        trainer.fit(module, loader, loader, ckpt_path=more.get("ckpt_path"))
    if "after" in more:
        trainer.save_checkpoint(more["after"])
    return module, ema, average


def outputs(weights):
    module = Module()
    module.load_state_dict(weights)
    with torch.no_grad():
        return [module.net(x) for x in inputs()[dist.get_rank() :: 2].split(2)]


def saved(path, is_distributed):
    """What of a checkpoint is weights; the file itself where it is one."""
    if not is_distributed:
        return torch.load(path, weights_only=True)
    whole_file = f"{path}.{dist.get_rank()}.whole"
    dcp_to_torch_save(path, whole_file)
    return torch.load(whole_file, weights_only=True)["state_dict"]


def in_lightning(folder, deploy, is_distributed):
    os.environ |= {"LOCAL_RANK": str(dist.get_rank()), "NODE_RANK": "0"}
    after = f"{folder}/after"
    module, ema, average = fitted(f"{folder}/out", 0, deploy, is_distributed, after=after)
    assert ema.manager.num_updates == len(average.averages) == 6
    assert all(isinstance(p, DTensor) for p in module.parameters())
    # The sanity check has seen two batches; then each epoch's end three.
    for epoch in (0, 1):
        want = outputs(average.averages[3 * epoch + 2])
        assert not any(map(is_close, want, outputs(module.raws[3 * epoch + 2])))
        assert all(map(is_close, module.seen[2 + 3 * epoch :][:3], want))
    end = average.averages[-1] if deploy == "ema" else module.raws[-1]
    assert_same(whole(module.named_parameters()), end, "after fit")

    main, prefix, beside = average.averages[-1], "current_model_state.", module.raws[-1]
    if deploy == "raw":
        main, prefix, beside = beside, "fused_ema.", main
    held = saved(after, is_distributed)
    if is_distributed:
        assert_same(held, main | {prefix + name: t for name, t in beside.items()}, "saved")
    else:
        assert_same(held["state_dict"], main, "saved")
        own = held["fused_ema"]["manager"]["ema"]
        assert_same(own, average.averages[-1], "saved beside")
        if deploy == "ema":
            assert_same(held["current_model_state"], beside, "saved beside")

    path = f"{folder}/out/epoch=0.ckpt"
    assert os.path.isdir(path) == is_distributed
    again, ema, averages = fitted(f"{folder}/again", 7, deploy, is_distributed, ckpt_path=path)
    assert ema.manager.num_updates == 6
    for resumed, straight in zip(again.raws, module.raws[3:], strict=True):
        assert_same(resumed, straight, "resumed: the model")
    for resumed, straight in zip(averages.averages, average.averages[3:], strict=True):
        assert_same(resumed, straight, "resumed: the average")

    other, _, _ = fitted(f"{folder}/other", 5, deploy, is_distributed, validate=path)
    assert len(other.seen) == 3
    assert all(map(is_close, other.seen, outputs(average.averages[2])))


def on_fewer(folder, deploy):
    os.environ |= {"LOCAL_RANK": "0", "NODE_RANK": "0"}
    path = f"{folder}/out/epoch=0.ckpt"
    held = saved(path, True)
    main = {name: t for name, t in held.items() if name.startswith("net.")}
    prefix = "current_model_state." if deploy == "ema" else "fused_ema."
    beside = {name: held[prefix + name] for name in main}
    _, ema, average = fitted(f"{folder}/one", 7, deploy, True, ckpt_path=path)
    assert ema.manager.num_updates == 3 + 6  # One process has six batches an epoch.
    assert_same(average.start[0], main if deploy == "ema" else beside, "the average")
    assert_same(average.start[1], beside if deploy == "ema" else main, "the model")


@pytest.mark.parametrize("deploy", ["ema", "raw"])
@pytest.mark.parametrize("is_distributed", [True, False])
def test_lightning(two, one, tmp_path, deploy, is_distributed):
    two(in_lightning, str(tmp_path), deploy, is_distributed)
    if is_distributed:
        one(on_fewer, str(tmp_path), deploy)


def without_an_average(folder):
    os.environ |= {"LOCAL_RANK": str(dist.get_rank()), "NODE_RANK": "0"}
    for is_distributed in (True, False):
        out = f"{folder}/{is_distributed}"
        straight, _, _ = fitted(out, 0, "ema", is_distributed, is_averaged=False)
        path = f"{out}/epoch=0.ckpt"
        with pytest.warns(UserWarning, match="has no average; it starts from the checkpoint's"):
            again, _, average = fitted(out, 7, "ema", is_distributed, ckpt_path=path)
        assert_same(again.raws[-1], straight.raws[-1], "the model")
        want = {n: t.lerp(again.raws[0][n], 0.25) for n, t in straight.raws[2].items()}
        assert_same(average.averages[0], want, "the average")


def test_a_checkpoint_of_lightning_s_without_an_average(two, tmp_path):
    two(without_an_average, str(tmp_path))
