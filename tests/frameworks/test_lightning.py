"""The Lightning callback, in Lightning's own trainer and against Lightning's own averages."""

from __future__ import annotations

import copy
import importlib
import os
import signal
import sys
from collections import OrderedDict

import lightning.pytorch as pl
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.plugins.precision import DoublePrecision, MixedPrecision
from nets import Net, assert_same, is_same, same, values_of
from processes import forked
from torch.utils.data import DataLoader

import fused_ema
from fused_ema.hooks.lightning import EMA
from fused_ema.testing import ROUNDINGS

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '[a-z_]*' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:predict returned None"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated"),
]

NUM_BATCHES = 5


class Module(pl.LightningModule):
    """Moves every tensor of the net by amounts that the epoch and the batch decide."""

    def __init__(self, dtype=torch.float32, seed=0, optimizer="sgd"):
        super().__init__()
        self.save_hyperparameters()
        self.net = Net(dtype, seed)
        self.seen = []

    def loss(self, batch):
        # Not by the batch: in the middle of an epoch Lightning resumes no plain loader.
        batch_idx = self.trainer.fit_loop.epoch_loop.batch_idx
        torch.manual_seed(100 * self.trainer.current_epoch + batch_idx)
        terms = [(p * torch.randn(p.shape).to(p)).sum() for p in self.trained()]
        return torch.stack(terms).sum()

    def trained(self):
        return [p for p in self.net.parameters() if p.requires_grad]

    def move_buffers(self, batch):
        for name, buffer in self.net.named_buffers():
            if buffer.is_floating_point() and name != "scratch":
                buffer.add_(torch.randn(buffer.shape).to(buffer))
            elif buffer.dtype != torch.bool and not buffer.is_complex():
                buffer.add_(1)

    def training_step(self, batch):
        loss = self.loss(batch)
        self.move_buffers(batch)
        return loss

    def note(self, where):
        self.seen.append((where, values_of(self)))

    def validation_step(self, batch):
        self.note("validate")
        self.log("seen", float(len(self.seen)))

    def on_validation_epoch_end(self):
        self.note("validation epoch end")

    def test_step(self, batch):
        self.note("test")

    def predict_step(self, batch):
        self.note("predict")

    def configure_optimizers(self):
        if self.hparams.optimizer == "fused":
            optimizer = torch.optim.AdamW(self.trained(), lr=0.01, fused=True)
        elif self.hparams.optimizer == "adam":
            optimizer = torch.optim.AdamW(self.trained(), lr=0.01)
        else:
            optimizer = torch.optim.SGD(self.trained(), lr=0.05, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.7)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


class Manual(Module):
    """Two optimizers; one batch is two optimizer steps, and every third one none at all."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch):
        for optimizer in self.optimizers():
            if int(batch[0]) % 3 != 2:
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()
        self.move_buffers(batch)

    def configure_optimizers(self):
        params = self.trained()
        return torch.optim.SGD(params[:2], lr=0.05), torch.optim.SGD(params[2:], lr=0.05)


class Reference(pl.Callback):
    """The average as a plain loop over the ``state_dict()``, after every batch that was stepped."""

    def __init__(self, momentum=0.1, form="mul_add", is_update=lambda step: True):
        self.momentum, self.form, self.is_update = momentum, form, is_update
        self.step, self.num_updates, self.ema, self.raws = 0, 0, None, []

    def on_train_start(self, trainer, pl_module):
        self.ema = values_of(pl_module)

    @torch.no_grad()
    def on_train_batch_end(self, trainer, pl_module, *args):
        live = pl_module.state_dict()
        self.raws.append(values_of(pl_module))
        if trainer.global_step > self.step and self.is_update(trainer.global_step - 1):
            self.num_updates += 1
            for name, e in self.ema.items():
                if not e.is_floating_point():
                    continue
                p, m = live[name], self.momentum
                if self.form == "mul_add":
                    e.mul_(1 - m).add_(p, alpha=m)
                else:
                    e.lerp_(p, m)
        self.step = trainer.global_step


def loader(num_batches=NUM_BATCHES, first=0):
    return DataLoader(torch.arange(first, first + num_batches, dtype=torch.float32), batch_size=1)


def make_trainer(tmp_path, *callbacks, library=pl, **options):
    options = {"max_epochs": 2, "enable_checkpointing": False, "num_sanity_val_steps": 0} | options
    return library.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=list(callbacks),
        **options,
    )


def load(path):
    return torch.load(path, weights_only=True)


# ---- the numbers


@pytest.mark.parametrize("dtype", ROUNDINGS)
@pytest.mark.parametrize("form", ["lerp", "mul_add"])
def test_the_bits_of_the_loop_and_what_a_checkpoint_holds(tmp_path, dtype, form):
    module, reference = Module(dtype), Reference(form=form)
    ema = EMA(momentum=0.1, form=form, ema_dtype="param")
    trainer = make_trainer(tmp_path, ema, reference)
    trainer.fit(module, loader())
    assert ema.manager.num_updates == reference.num_updates == 2 * NUM_BATCHES
    raw = reference.raws[-1]
    # Integer tensors keep their first clone; all else is the loop's.
    assert_same(values_of(module), reference.ema)
    assert not is_same(reference.ema, raw)
    path = tmp_path / "after.ckpt"
    trainer.save_checkpoint(path)
    checkpoint = load(path)
    assert_same(checkpoint["state_dict"], reference.ema)
    assert_same(checkpoint["current_model_state"], raw)
    deployed = Module.load_from_checkpoint(path, weights_only=True)
    assert_same(values_of(deployed), reference.ema)


def test_a_wider_average_stands_in_the_checkpoint_and_tensors_stand_there_once(tmp_path):
    module, ema = Module(torch.bfloat16), EMA(momentum=0.1)
    trainer = make_trainer(tmp_path, ema)
    trainer.fit(module, loader())
    path = tmp_path / "c.ckpt"
    trainer.save_checkpoint(path)
    main = load(path)["state_dict"]
    assert main["net.embedding.weight"].dtype == torch.float32
    for name, average in ema.manager.named_emas():
        if name in dict(module.named_parameters()):
            continue
        same(average.to(main[name].dtype), main[name], name)
    loaded = load(path)
    one, other = (
        loaded["state_dict"]["net.scale"],
        loaded["fused_ema"]["manager"]["ema"]["net.scale"],
    )
    assert one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


@pytest.mark.parametrize("dtype", ROUNDINGS)
def test_the_numbers_of_lightnings_own(tmp_path, dtype):
    decay, ours, theirs = 0.9, Module(dtype), Module(dtype)
    make_trainer(tmp_path, EMAWeightAveraging(decay=decay)).fit(theirs, loader())
    ema = EMA(momentum=1 - decay, begin=1, ema_dtype="param")
    reference = Reference(momentum=1 - decay)
    make_trainer(tmp_path, ema, reference).fit(ours, loader())
    exact = None
    for raw in reference.raws:
        raw = {name: value.double() for name, value in raw.items() if value.is_floating_point()}
        if exact is None:
            exact = raw
        exact = {name: decay * e + (1 - decay) * raw[name] for name, e in exact.items()}
    averaged = [name for name, t in ours.state_dict().items() if t.is_floating_point()]
    assert len(averaged) > 8
    for name in averaged:
        a, b, e = ours.state_dict()[name], theirs.state_dict()[name], exact[name]
        assert a.dtype == b.dtype
        largest = max([raw[name].double().abs().max() for raw in reference.raws if e.numel()] + [0])
        # Three roundings an update, each forgotten at the rate of the decay.
        bound = 3 * ROUNDINGS[dtype] * largest / (1 - decay)
        assert ((a.double() - e).abs() <= bound).all(), name
        assert ((b.double() - e).abs() <= bound).all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_of_lightnings_own(tmp_path, dtype):
    ours, theirs = Module(dtype), Module(dtype)
    make_trainer(tmp_path, EMAWeightAveraging(decay=0.9)).fit(theirs, loader())
    ema = EMA(momentum=1 - 0.9, begin=1, ema_dtype="param", form="two_products")
    make_trainer(tmp_path, ema).fit(ours, loader())
    expected = dict(theirs.named_parameters())
    assert len(expected) > 5
    for name, p in ours.named_parameters():
        same(p.detach(), expected[name].detach(), name)


# ---- when it updates


class Blind(EMA):
    """As with an optimizer that is none of torch's: only the count of steps tells."""

    def on_fit_start(self, trainer, pl_module):
        super().on_fit_start(trainer, pl_module)
        self._asks_optimizers = False


@pytest.mark.parametrize("kind", [EMA, Blind])
@pytest.mark.parametrize("accumulate", [1, 3, 7])
def test_one_update_a_real_step(tmp_path, accumulate, kind):
    ema, reference = kind(momentum=0.1, form="mul_add"), Reference()
    module = Module()
    trainer = make_trainer(tmp_path, ema, reference, accumulate_grad_batches=accumulate)
    trainer.fit(module, loader(7))
    assert ema.manager.num_updates == 2 * -(-7 // accumulate) == trainer.global_step
    assert_same(values_of(module), reference.ema)


class WithoutHooks(torch.optim.SGD):
    """As timm's Lookahead: it never runs Optimizer.__init__, so torch prepared no hooks for it."""

    def __init__(self, params):
        self.inside = torch.optim.SGD(params, lr=0.05)
        self.param_groups, self.state = self.inside.param_groups, self.inside.state
        self.defaults = {}
        self._optimizer_step_pre_hooks = OrderedDict()
        self._optimizer_step_post_hooks = OrderedDict()

    def step(self, closure=None):
        return self.inside.step(closure)


def test_an_optimizer_that_torch_prepared_no_hooks_for(tmp_path):
    class Wrapped(Module):
        def configure_optimizers(self):
            return WithoutHooks(self.trained())

    ema, reference = EMA(momentum=0.1, form="mul_add"), Reference()
    module = Wrapped()
    trainer = make_trainer(tmp_path, ema, reference)
    trainer.fit(module, loader(8))
    assert ema.manager.num_updates == 16 == trainer.global_step
    assert_same(values_of(module), reference.ema)


def test_manual_optimization_with_two_optimizers_updates_once_a_batch(tmp_path):
    ema, reference, module = EMA(momentum=0.1, form="mul_add"), Reference(), Manual()
    trainer = make_trainer(tmp_path, ema, reference)
    trainer.fit(module, loader(7))
    assert trainer.global_step == 2 * 2 * 5
    assert ema.manager.num_updates == 2 * 5
    assert_same(values_of(module), reference.ema)


@pytest.mark.parametrize("optimizer", ["sgd", "fused"])
def test_a_step_that_the_scaler_skips_is_none(tmp_path, optimizer):
    class Overflowing(Module):
        def training_step(self, batch):
            loss = super().training_step(batch)
            return loss * float("inf") if int(batch[0]) in (1, 2) else loss

    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    ema, module = EMA(momentum=0.1), Overflowing(optimizer=optimizer)
    trainer = make_trainer(tmp_path, ema, plugins=[plugin])
    trainer.fit(module, loader())
    assert trainer.global_step == 2 * NUM_BATCHES  # Lightning counts them.
    assert scaler.get_scale() == 8.0 / 2**4
    assert ema.manager.num_updates == 2 * (NUM_BATCHES - 2)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_batch_without_gradients_is_no_step_but_one_with_earlier_gradients_is(tmp_path):
    class Skipping(Module):
        def training_step(self, batch):
            loss = super().training_step(batch)
            return None if int(batch[0]) in (1, 3) else loss

    ema = EMA(momentum=0.1)
    make_trainer(tmp_path, ema).fit(Skipping(), loader())
    assert ema.manager.num_updates == 2 * (NUM_BATCHES - 2)
    ema = EMA(momentum=0.1)  # Batches 0 and 1, 2 and 3, and 4: each step has gradients.
    make_trainer(tmp_path, ema, accumulate_grad_batches=2).fit(Skipping(), loader())
    assert ema.manager.num_updates == 2 * 3


def test_should_update_of_steps_and_epochs(tmp_path):
    asked = []

    class Late(EMA):
        def should_update(self, step_idx=None, epoch_idx=None):
            asked.append((step_idx, epoch_idx))
            return step_idx is not None and step_idx >= 4

    class Epochs(EMA):
        def should_update(self, step_idx=None, epoch_idx=None):
            return epoch_idx is not None

    module, reference = Module(), Reference(is_update=lambda step: step >= 4)
    make_trainer(tmp_path, Late(momentum=0.1, form="mul_add"), reference).fit(module, loader())
    assert asked == [
        *((i, None) for i in range(5)),
        (None, 0),
        *((i, None) for i in range(5, 10)),
        (None, 1),
    ]
    assert_same(values_of(module), reference.ema)
    reference = Reference(is_update=lambda step: step % NUM_BATCHES == NUM_BATCHES - 1)
    module = Module()
    make_trainer(tmp_path, Epochs(momentum=0.1, form="mul_add"), reference).fit(module, loader())
    assert_same(values_of(module), reference.ema)


def test_options_reach_the_manager(tmp_path):
    def fun(i):
        return 1 / (i + 2)

    options = {"momentum_fun": fun, "form": "mul_add", "begin": 3, "exclude": "net.body.*"}
    options |= {"interval": 2, "skip_buffers": True, "skip_frozen": True, "include": "net.*"}
    options |= {"ema_dtype": torch.float64, "device": "cpu"}
    module, ema = Module(torch.float64), EMA(**options)
    twin = copy.deepcopy(module)
    manager = fused_ema.EMAManager(twin, **options)

    class Twin(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            twin.load_state_dict(pl_module.state_dict())
            manager.update()

    make_trainer(tmp_path, ema, Twin()).fit(module, loader())
    assert_same(dict(ema.manager.named_emas()), dict(manager.named_emas()))
    assert repr(ema.manager).replace(", swapped", "") == repr(manager)
    copied = EMA(momentum=0.1, copy_buffers=True)
    module = Module()
    make_trainer(tmp_path, copied).fit(module, loader())
    assert module.net.body[1].num_batches_tracked == 2 * NUM_BATCHES


# ---- evaluation


def test_ctrl_c_right_after_the_average_went_in(monkeypatch):
    model, ema = torch.nn.Linear(2, 2), EMA(momentum=0.5)
    ema._manager = manager = fused_ema.EMAManager(model, 0.5)
    with torch.no_grad():
        model.weight.add_(1)
    manager.update()
    raw, swap = model.weight.detach().clone(), manager.swap

    def interrupted():
        swap()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(manager, "swap", interrupted)
        with pytest.raises(KeyboardInterrupt) as error:
            ema._swap_in(model)
    ema.on_exception(None, model, error.value)
    assert not manager.is_swapped
    assert torch.equal(model.weight, raw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inference_mode", [True, False])
def test_validation_sees_the_average_and_training_the_raw_weights(tmp_path, dtype, inference_mode):
    module, reference = Module(dtype), Reference()
    start = values_of(module)
    ema = EMA(momentum=0.1, form="mul_add", ema_dtype="param", deploy="raw")
    options = {"num_sanity_val_steps": 1, "val_check_interval": 2, "max_epochs": 1}
    trainer = make_trainer(tmp_path, ema, reference, inference_mode=inference_mode, **options)
    averages = []

    class Averages(pl.Callback):
        def on_validation_start(self, trainer, pl_module):
            if reference.ema is not None:
                averages.append({n: t.clone() for n, t in reference.ema.items()})

    trainer.callbacks.append(Averages())
    trainer.fit(module, loader(), loader(1))
    assert [where for where, _ in module.seen] == ["validate", "validation epoch end"] * 3
    for _, seen in module.seen[:2]:
        assert_same(seen, start)
    assert len(averages) == 2
    for (_, seen), expected in zip(
        module.seen[2:], [x for a in averages for x in (a, a)], strict=True
    ):
        assert_same(seen, expected)
    assert_same(values_of(module), reference.raws[-1])
    alone = Module(dtype)
    plain = Reference()
    make_trainer(tmp_path, plain, **options).fit(alone, loader(), loader(1))
    for a, b in zip(reference.raws, plain.raws, strict=True):
        assert_same(a, b)  # The raw weights went through training untouched.


@pytest.mark.parametrize("deploy", ["ema", "raw"])
def test_validate_test_and_predict_after_fit(tmp_path, deploy):
    module, reference = Module(), Reference()
    ema = EMA(momentum=0.1, form="mul_add", deploy=deploy)
    trainer = make_trainer(tmp_path, ema, reference)
    trainer.fit(module, loader())
    after = reference.ema if deploy == "ema" else reference.raws[-1]
    for run in (trainer.validate, trainer.test, trainer.predict):
        module.seen.clear()
        run(module, loader(1), **({} if run == trainer.predict else {"verbose": False}))
        assert module.seen
        for _, seen in module.seen:
            assert_same(seen, reference.ema)
        assert_same(values_of(module), after)


@pytest.mark.parametrize("deploy", ["ema", "raw"])
@pytest.mark.parametrize("is_fresh", [True, False])
def test_evaluation_of_a_checkpoint_takes_its_average(tmp_path, deploy, is_fresh):
    module, reference = Module(), Reference()
    trainer = make_trainer(tmp_path, EMA(momentum=0.1, form="mul_add", deploy=deploy), reference)
    trainer.fit(module, loader())
    path = tmp_path / "c.ckpt"
    trainer.save_checkpoint(path)
    expected = {name: t.clone() for name, t in reference.ema.items()}
    if is_fresh:
        module = Module(seed=1)
        trainer = make_trainer(tmp_path, EMA(momentum=0.1, deploy=deploy))
    else:
        trainer.fit_loop.max_epochs = 3
        trainer.fit(module, loader())
        assert not is_same(values_of(module), expected)
    for run in (trainer.validate, trainer.test):
        module.seen.clear()
        run(module, loader(1), ckpt_path=path, verbose=False, weights_only=True)
        assert module.seen
        for _, seen in module.seen:
            assert_same(seen, expected)
        assert_same(values_of(module), expected)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["validation_step", "on_validation_epoch_end", "test_step"])
def test_the_raw_weights_come_back_whatever_evaluation_raises(tmp_path, error, where):
    module, reference = Module(), Reference()
    ema = EMA(momentum=0.1, form="mul_add", deploy="raw")
    trainer = make_trainer(tmp_path, ema, reference)
    if where == "test_step":
        trainer.fit(module, loader())
    average = {}

    def fail(*args):
        average.update(values_of(module))
        raise error("evaluation failed")

    setattr(module, where, fail)
    run = {
        True: lambda: trainer.test(module, loader(1)),
        False: lambda: trainer.fit(module, loader(), loader(1)),
    }[where == "test_step"]
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
            run()
    finally:
        signal.signal(signal.SIGINT, handler)
    assert_same(average, reference.ema)
    assert_same(values_of(module), reference.raws[-1])
    assert not ema.manager.is_swapped


def test_another_fit_starts_a_new_average_from_what_the_model_holds(tmp_path):
    module, ema = Module(torch.bfloat16), EMA(momentum=0.1)
    trainer = make_trainer(tmp_path, ema)
    trainer.fit(module, loader())
    first = ema.manager
    with torch.no_grad():
        module.net.scale.fill_(3.0)
    held = values_of(module)
    started = {}

    class Start(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            started.update(values_of(pl_module))

    trainer.callbacks.append(Start())
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, loader())
    assert_same(started, held)
    assert ema.manager is not first
    assert ema.manager.num_updates == NUM_BATCHES


# ---- after fit


def further(tmp_path, module, *callbacks, **options):
    trainer = make_trainer(tmp_path, *callbacks, max_epochs=1, **options)
    trainer.fit(module, loader(3))
    return trainer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("deploy", ["ema", "raw"])
def test_stages_with_a_trainer_and_an_average_each(tmp_path, dtype, deploy):
    module, emas, references, trainers = Module(dtype), [], [], []
    for _ in range(3):
        held = values_of(module)
        ema = EMA(momentum=0.1, form="mul_add", ema_dtype="param", deploy=deploy)
        reference = Reference()
        trainers.append(further(tmp_path, module, ema, reference))
        emas.append(ema)
        references.append(reference)
        after = reference.ema if deploy == "ema" else reference.raws[-1]
        assert_same(values_of(module), after)
        assert not is_same(after, held)
    for ema, reference in zip(emas, references, strict=True):  # Each has its own average still.
        assert not ema.manager.is_swapped
        assert ema.manager.num_updates == 3
        assert_same(dict(ema.manager.named_emas()), reference.ema)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("deploy", ["ema", "raw"])
def test_after_fit_the_model_is_anybody_s(tmp_path, dtype, deploy):
    module, other = Module(dtype), fused_ema.EMAManager(torch.nn.Linear(2, 2))
    ema = EMA(momentum=0.1, deploy=deploy)
    further(tmp_path, module, ema)
    averages = {n: e.clone() for n, e in ema.manager.named_emas()}
    further(tmp_path, module)  # No average at all.
    held = values_of(module)
    manager = fused_ema.EMAManager(module, momentum=0.5)
    for call in (manager.update, manager.reset, manager.refresh, manager.swap, manager.swap):
        call()
    with manager.swapped():
        other.update()
    manager.load_state_dict(copy.deepcopy(manager.state_dict()))
    manager.copy_to(module)
    assert_same(values_of(module), held)
    assert_same(dict(ema.manager.named_emas()), averages)
    started = {}

    class Start(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            started.update(values_of(pl_module))

    further(tmp_path, module, EMAWeightAveraging(decay=0.5), Start())
    assert_same(started, held)


def test_raw_weights_kept_after_fit_are_no_longer_the_model_s(tmp_path):
    module, reference = Module(), Reference()
    ema = EMA(momentum=0.1, form="mul_add")
    trainer = make_trainer(tmp_path, ema, reference)
    trainer.fit(module, loader())
    with torch.no_grad():  # As torch.optim.swa_utils.update_bn does it.
        module.net.body[1].running_mean.fill_(7.0)
        module.net.body[1].num_batches_tracked = torch.tensor(9)
    expected = {**reference.ema}
    expected["net.body.1.running_mean"] = torch.full((4,), 7.0)
    expected["net.body.1.num_batches_tracked"] = torch.tensor(9)
    assert_same(values_of(module), expected)
    path = tmp_path / "c.ckpt"
    trainer.save_checkpoint(path)
    assert_same(load(path)["state_dict"], expected)
    assert_same(load(path)["current_model_state"], reference.raws[-1])
    module.seen.clear()
    trainer.test(module, loader(1), verbose=False)
    assert_same(module.seen[-1][1], expected)
    again = EMA(momentum=0.1, form="mul_add")

    class Start(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            assert_same(values_of(pl_module), reference.raws[-1])
            assert_same(dict(again.manager.named_emas()), expected)

    resumed = make_trainer(tmp_path, again, Start(), max_epochs=3)
    resumed.fit(Module(seed=2), loader(), ckpt_path=path, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_was_trained_on_is_saved_as_it_is(tmp_path, dtype):
    module, ema = Module(dtype), EMA(momentum=0.1)
    trainer = further(tmp_path, module, ema)
    further(tmp_path, module, EMA(momentum=0.5))
    held, path = values_of(module), tmp_path / "c.ckpt"
    with pytest.warns(UserWarning, match="the model was changed after fit, so this checkpoint"):
        trainer.save_checkpoint(path)
    assert_same(load(path)["state_dict"], held)
    assert not {"current_model_state", "fused_ema", "averaging_state"} & set(load(path))


def test_values_that_are_no_numbers_are_no_change(tmp_path):
    module, ema = Module(), EMA(momentum=0.1)
    with torch.no_grad():
        module.net.frozen[1] = float("nan")
    trainer = further(tmp_path, module, ema)
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    assert load(tmp_path / "c.ckpt")["state_dict"]["net.frozen"].isnan().sum() == 1
    assert "current_model_state" in load(tmp_path / "c.ckpt")


def test_an_interrupt_while_the_average_goes_in_for_good(tmp_path, monkeypatch):
    module, reference, ema = Module(), Reference(), EMA(momentum=0.1, form="mul_add")
    run = fused_ema.EMAManager.copy_to

    def interrupted(self, model):
        run(self, model)
        raise ZeroDivisionError

    monkeypatch.setattr(fused_ema.EMAManager, "copy_to", interrupted)
    trainer = make_trainer(tmp_path, ema, reference)
    with pytest.raises(ZeroDivisionError):
        trainer.fit(module, loader())
    assert_same(values_of(module), reference.raws[-1])
    assert_same(dict(ema.manager.named_emas()), reference.ema)
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    assert_same(load(tmp_path / "c.ckpt")["current_model_state"], reference.raws[-1])


# ---- checkpoints and resuming


RESUME = {
    "momentum_fun": fused_ema.schedules.exponential(0.01, 10),
    "interval": 2,
    "form": "mul_add",
}


def resumable(tmp_path, library=pl, **options):
    callbacks = library.callbacks
    every = callbacks.ModelCheckpoint(
        tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1, save_on_train_epoch_end=False
    )
    ema = EMA(**RESUME, **options)
    settings = {"enable_checkpointing": True, "max_epochs": 3, "accumulate_grad_batches": 2}
    return make_trainer(tmp_path, ema, every, library=library, **settings), ema


def finished(trainer, tmp_path):
    path = tmp_path / f"finished-{id(trainer)}.ckpt"
    trainer.save_checkpoint(path)
    return load(path)


def assert_same_end(actual, expected):
    for key in ("state_dict", "current_model_state"):
        if key in expected:
            assert_same(actual[key], expected[key])
    a, b = actual["fused_ema"]["manager"], expected["fused_ema"]["manager"]
    assert_same(a["ema"], b["ema"])
    for key in ("iteration", "num_updates", "is_swapped"):
        assert a[key] == b[key]
    assert actual["global_step"] == expected["global_step"]
    assert actual["lr_schedulers"] == expected["lr_schedulers"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("deploy", ["ema", "raw"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, dtype, deploy):
    trainer, ema = resumable(tmp_path, deploy=deploy)
    trainer.fit(Module(dtype, optimizer="adam"), loader())
    expected = finished(trainer, tmp_path)
    assert ema.manager.iteration == 9
    for step in (1, 2, 3, 5, 6, 8):
        resumed, ema = resumable(tmp_path / "again", deploy=deploy)
        module = Module(dtype, seed=7, optimizer="adam")
        path = tmp_path / f"step={step}.ckpt"
        resumed.fit(module, loader(), ckpt_path=path, weights_only=True)
        assert_same_end(finished(resumed, tmp_path), expected)


class Wide(Module):
    """Starts in float32, as a model does; the trainer makes it float64."""

    def __init__(self, **options):
        super().__init__(**options)
        del self.net.table

    def note(self, where):
        super().note(where)
        assert self.net.scale.dtype == torch.float64


@pytest.mark.parametrize("deploy", ["ema", "raw"])
def test_a_resumed_run_in_float64_is_the_uninterrupted_one(tmp_path, deploy):
    def run(folder, step=None):
        trainer, ema = resumable(folder, deploy=deploy)
        trainer.strategy.precision_plugin = DoublePrecision()
        path = None if step is None else tmp_path / f"step={step}.ckpt"
        module = Wide(seed=0 if step is None else 7, optimizer="adam")
        trainer.fit(module, loader(), ckpt_path=path, weights_only=True)
        return finished(trainer, folder), ema

    expected, _ = run(tmp_path)
    assert expected["state_dict"]["net.scale"].dtype == torch.float64
    for step in (1, 4, 8):
        assert_same_end(run(tmp_path / "again", step)[0], expected)
    # Elsewhere the model gets the average, as exactly.
    path = tmp_path / "step=4.ckpt"
    average = load(path)["fused_ema"]["manager"]["ema"]
    for name in ("validate", "test"):
        trainer, module = make_trainer(tmp_path, EMA(deploy=deploy), precision="64-true"), Wide()
        getattr(trainer, name)(module, loader(1), ckpt_path=path, verbose=False, weights_only=True)
        assert_same(module.seen[-1][1], average)


def test_weights_that_were_to_be_loaded_again_are_of_that_run_only(tmp_path, monkeypatch):
    trainer, _ = resumable(tmp_path)
    trainer.strategy.precision_plugin = DoublePrecision()
    trainer.fit(Wide(optimizer="adam"), loader())
    ema = EMA()
    trainer, module = make_trainer(tmp_path, ema, precision="64-true"), Wide(seed=3)
    held = values_of(module.double())
    module.float()
    path = tmp_path / "step=4.ckpt"
    with monkeypatch.context() as patch:
        patch.setattr(type(trainer.strategy), "setup", lambda self, trainer: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.validate(module, loader(1), ckpt_path=path, weights_only=True)
    module.load_state_dict(held)
    trainer = make_trainer(tmp_path, ema, precision="64-true")
    trainer.validate(module, loader(1), verbose=False)
    assert_same(module.seen[-1][1], held)


def test_a_resumed_run_follows_the_interval_that_it_is_given(tmp_path):
    trainer, _ = resumable(tmp_path)
    trainer.fit(Module(optimizer="adam"), loader())
    resumed, ema = resumable(tmp_path / "again")
    ema._options["interval"] = 3
    resumed.fit(
        Module(optimizer="adam"), loader(), ckpt_path=tmp_path / "step=3.ckpt", weights_only=True
    )
    # Of the iterations 0 to 2 one was averaged, of 3 to 8 then 5 and 8.
    assert (ema.manager.iteration, ema.manager.num_updates) == (9, 1 + 2)


def test_a_checkpoint_saved_in_validation_or_after_fit_has_the_raw_weights(tmp_path):
    class Saving(Module):
        def validation_step(self, batch):
            super().validation_step(batch)
            self.trainer.save_checkpoint(tmp_path / "inside.ckpt")

    for dtype in (torch.float32, torch.bfloat16):
        module, reference = Saving(dtype), Reference()
        ema = EMA(momentum=0.1, form="mul_add", ema_dtype="param")
        trainer = make_trainer(tmp_path, ema, reference)
        trainer.fit(module, loader(), loader(1))
        trainer.save_checkpoint(tmp_path / "after.ckpt")
        for name in ("inside", "after"):
            checkpoint = load(tmp_path / f"{name}.ckpt")
            assert_same(checkpoint["state_dict"], reference.ema)
            assert_same(checkpoint["current_model_state"], reference.raws[-1])
            assert not checkpoint["fused_ema"]["manager"]["is_swapped"]


def test_checkpoints_go_to_lightnings_own_and_back(tmp_path):
    module = Module()
    trainer = make_trainer(tmp_path, EMAWeightAveraging(decay=0.9))
    trainer.fit(module, loader())
    theirs = tmp_path / "theirs.ckpt"
    trainer.save_checkpoint(theirs)
    ema = EMA(momentum=0.1, skip_buffers=True)
    ours, started = tmp_path / "ours.ckpt", {}

    class Start(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            started.update(values_of(pl_module))
            started_ema = {n: e.clone() for n, e in ema.manager.named_emas()}
            assert_same(
                started_ema,
                {n: load(theirs)["state_dict"][n] for n, _ in ema.manager.named_emas()},
            )
            assert ema.manager.num_updates == 2 * NUM_BATCHES

    trainer = make_trainer(tmp_path, ema, Start(), max_epochs=3)
    trainer.fit(Module(seed=3), loader(), ckpt_path=theirs, weights_only=True)
    assert_same(started, load(theirs)["current_model_state"])
    trainer.save_checkpoint(ours)

    own = EMAWeightAveraging(decay=0.9)

    class Check(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            assert_same(values_of(pl_module), load(ours)["current_model_state"])
            assert_same(values_of(own._average_model.module), load(ours)["state_dict"])
            assert own._average_model.n_averaged == 3 * NUM_BATCHES
            raise RuntimeError("seen")

    trainer = make_trainer(tmp_path, own, Check(), max_epochs=4)
    with pytest.raises(RuntimeError, match="seen"):
        trainer.fit(Module(seed=4), loader(), ckpt_path=ours, weights_only=True)


def test_compiled_children_keep_their_keys_in_the_file(tmp_path):
    class Compiled(Module):
        def __init__(self):
            super().__init__()
            self.net = torch.compile(self.net, backend="eager")

        def move_buffers(self, batch):
            pass

    module, reference = Compiled(), Reference()
    trainer = make_trainer(tmp_path, EMA(momentum=0.1, form="mul_add"), reference)
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    checkpoint = load(tmp_path / "c.ckpt")
    assert all(key.startswith("net._orig_mod.") for key in checkpoint["state_dict"])
    assert_same(checkpoint["state_dict"], reference.ema)
    assert_same(checkpoint["current_model_state"], reference.raws[-1])


class Kill(pl.Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def in_child(tmp_path, *callbacks, seed, **options):
    """Trains in a process of its own. Returns what ended it, "None" for nothing."""

    def train():
        trainer, _ = resumable(tmp_path)
        trainer.callbacks[:0] = callbacks
        trainer.fit(Module(seed=seed, optimizer="adam"), loader(), **options)
        trainer.save_checkpoint(tmp_path / "end.ckpt")

    return forked(train)


@pytest.mark.parametrize("step", [1, 4, 6])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, step):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert in_child(whole, seed=0) == "None"
    assert in_child(cut, Kill(step), seed=0) == "SIGKILL"
    assert not (cut / "end.ckpt").exists()
    last = cut / f"step={step}.ckpt"
    assert in_child(cut, seed=5, ckpt_path=last, weights_only=True) == "None"
    assert_same_end(load(cut / "end.ckpt"), load(whole / "end.ckpt"))


# ---- both packages


@pytest.mark.parametrize("library", [pl, pytorch_lightning])
def test_both_packages(tmp_path, library):
    class Theirs(library.LightningModule):
        __init__, loss, trained = Module.__init__, Module.loss, Module.trained
        move_buffers, note = Module.move_buffers, Module.note
        training_step, validation_step = Module.training_step, Module.validation_step
        configure_optimizers = Module.configure_optimizers

    Theirs.__init__ = lambda self: (library.LightningModule.__init__(self), self.make())[0]
    Theirs.make = lambda self: (
        self.save_hyperparameters({"optimizer": "sgd"}),
        setattr(self, "net", Net()),
        setattr(self, "seen", []),
    )
    module = Theirs()
    ema = EMA(momentum=0.1, form="mul_add")
    reference = Reference()
    trainer = make_trainer(tmp_path, ema, reference, library=library)
    trainer.fit(module, loader(), loader(1))
    assert_same(values_of(module), reference.ema)
    assert_same(module.seen[-1][1], reference.ema)
    path = tmp_path / "c.ckpt"
    trainer.save_checkpoint(path)
    again = EMA(momentum=0.1, form="mul_add")
    trainer = make_trainer(tmp_path, again, library=library)
    trainer.fit(Theirs(), loader(), ckpt_path=path, weights_only=True)
    assert again.manager.num_updates == 2 * NUM_BATCHES


def test_without_lightning_the_error_names_it(monkeypatch):
    for name in list(sys.modules):
        if name.split(".")[0] in ("lightning", "pytorch_lightning"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lightning", None)
    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
    monkeypatch.delitem(sys.modules, "fused_ema.hooks.lightning")
    with pytest.raises(ImportError, match=r"needs lightning or pytorch_lightning >= 2.2"):
        importlib.import_module("fused_ema.hooks.lightning")


# ---- bad input


def test_bad_options_are_errors_at_once():
    with pytest.raises(TypeError, match="decay"):
        EMA(decay=0.9)
    for momentum in (0, 1, -0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="momentum is"):
            EMA(momentum=momentum)
    with pytest.raises(ValueError, match="interval"):
        EMA(interval=0)
    with pytest.raises(ValueError, match="deploy is 'both'; choose 'ema' or 'raw'"):
        EMA(deploy="both")
    with pytest.raises(ValueError, match="form"):
        EMA(form="fma")


class Mine(EMA):
    pass


@pytest.mark.parametrize("other", [EMA, Mine, EMAWeightAveraging])
def test_two_averaging_callbacks_are_an_error(tmp_path, other):
    module = Module()
    before = values_of(module)
    trainer = make_trainer(tmp_path, EMA(), other())
    with pytest.raises(RuntimeError, match="2 callbacks that average"):
        trainer.fit(module, loader())
    assert_same(values_of(module), before)


def test_a_strategy_that_shards_is_an_error(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, EMA())
    kind = type(trainer.strategy)
    monkeypatch.setattr(kind, "restore_checkpoint_after_setup", property(lambda self: True))
    with pytest.raises(RuntimeError, match="SingleDeviceStrategy, which shards"):
        trainer.fit(Module(), loader())


def test_a_checkpoint_without_an_average_starts_one_with_a_warning(tmp_path):
    module = Module()
    trainer = make_trainer(tmp_path)
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    ema, again = EMA(momentum=0.1), Module(seed=2)
    trainer = make_trainer(tmp_path, ema, max_epochs=2)
    with pytest.warns(UserWarning, match="the checkpoint has no average; it starts from"):
        trainer.fit(again, loader(), ckpt_path=tmp_path / "plain.ckpt", weights_only=True)
    assert ema.manager.num_updates == 0
    assert_same(values_of(again), values_of(module))


def test_checkpoints_that_do_not_fit_are_errors(tmp_path):
    module = Module()
    trainer = make_trainer(tmp_path, EMA(momentum=0.1))
    trainer.fit(module, loader())
    path, bad = tmp_path / "c.ckpt", tmp_path / "bad.ckpt"
    trainer.save_checkpoint(path)

    def resume(message, error=ValueError, **options):
        ema, again = EMA(momentum=0.1, **options), Module(seed=2)
        with pytest.raises(error, match=message):
            make_trainer(tmp_path, ema, max_epochs=3).fit(
                again, loader(), ckpt_path=bad, weights_only=True
            )
        assert ema.manager is None

    def damaged(change):
        checkpoint = load(path)
        change(checkpoint)
        torch.save(checkpoint, bad)

    damaged(lambda c: c["fused_ema"].pop("manager"))
    resume("'fused_ema' has no 'manager'")
    damaged(lambda c: c["fused_ema"]["manager"].pop("num_updates"))
    resume("'num_updates' is missing")
    damaged(lambda c: c["fused_ema"]["manager"]["ema"].pop("net.scale"))
    resume("missing in 'ema': 'net.scale'")
    damaged(lambda c: c["fused_ema"]["manager"]["ema"].update({"net.scale": torch.zeros(3)}))
    resume("'net.scale' in 'ema' has shape")
    damaged(lambda c: None)
    resume("surplus in 'ema'", skip_buffers=True)
    damaged(lambda c: c["state_dict"].pop("net.scale"))
    resume("Missing key", RuntimeError)
    bad.write_bytes(path.read_bytes()[:-2000])
    resume(None, (OSError, RuntimeError))
