"""The hook and averaged models for MMEngine against MMEngine's own, in its own Runner."""

from __future__ import annotations

import copy
import gc
import importlib
import logging
import os
import pickle
import signal
import subprocess
import sys
import time
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from nets import Net, assert_same, move, same
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import Dataset

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "`torch.jit")
    from mmengine.evaluator import BaseMetric
    from mmengine.hooks import EMAHook, Hook
    from mmengine.model import (
        BaseModel,
        ExponentialMovingAverage,
        MomentumAnnealingEMA,
        StochasticWeightAverage,
    )
    from mmengine.registry import MODELS
    from mmengine.runner import Runner

    from fused_ema.hooks import mmengine as fused

from fused_ema import Plan, _tracking
from fused_ema.testing import ROUNDINGS

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit"),
    pytest.mark.filterwarnings("ignore:Environment variable TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"),
    pytest.mark.filterwarnings("ignore:On January 1, 2023, MMCV"),
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler"),
]

KINDS = {
    "ema": (ExponentialMovingAverage, fused.FusedExponentialMovingAverage, {"momentum": 0.03}),
    "large": (ExponentialMovingAverage, fused.FusedExponentialMovingAverage, {"momentum": 0.7}),
    "annealing": (
        MomentumAnnealingEMA,
        fused.FusedMomentumAnnealingEMA,
        {"momentum": 0.3, "gamma": 3},
    ),
    "swa": (StochasticWeightAverage, fused.FusedStochasticWeightAverage, {}),
}


def two_of(kind, model, **options):
    """MMEngine's averaged model and ours."""
    theirs, ours, given = KINDS[kind]
    return theirs(model, **given, **options), ours(model, **given, **options)


def untied(model):
    model.head.weight = nn.Parameter(model.embedding.weight.detach().clone())
    return model


def step(model, seed):
    """As nets.move(), for a model without ties, with a buffer assigned anew."""
    move(model, seed)
    if model.head.weight is not model.embedding.weight:
        with torch.no_grad():
            model.head.weight += torch.randn_like(model.head.weight)
    model.scratch = torch.full_like(model.scratch, seed)


def assert_same_module(ours, theirs):
    """All of it: names, order, dtypes, strides, bits; buffers that aren't saved too."""
    assert_same(ours.state_dict(), theirs.state_dict())
    assert_same(ours.named_buffers(), dict(theirs.named_buffers()))
    for name, tensor in theirs.state_dict().items():
        assert ours.state_dict()[name].stride() == tensor.stride(), name
    assert [p.requires_grad for p in ours.parameters()] == [
        p.requires_grad for p in theirs.parameters()
    ]


# ---- averaged models


@pytest.mark.parametrize("update_buffers", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_averaged_model_is_freed_at_once(kind, update_buffers):
    _, ours, options = KINDS[kind]
    gc.collect()
    gc.disable()
    try:
        model = Net()
        averaged = ours(model, update_buffers=update_buffers, **options)
        for step in range(3):
            move(model, step)
            averaged.update_parameters(model)
        averaged.swap(model)
        gone = [weakref.ref(thing) for thing in (averaged, model)]
        del averaged, model
        assert [reference() is None for reference in gone] == [True, True]
    finally:
        gc.enable()


@pytest.mark.parametrize("dtype", ROUNDINGS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("update_buffers", [False, True])
def test_the_bits_of_their_averages(backend, dtype, kind, interval, update_buffers):
    model = Net(dtype)
    if update_buffers:
        model = untied(model)
    theirs, ours = two_of(kind, model, interval=interval, update_buffers=update_buffers)
    assert_same_module(ours, theirs)
    for seed in range(9):
        step(model, seed)
        theirs.update_parameters(model)
        ours.update_parameters(model)
        assert_same_module(ours, theirs)
        assert ours.steps.item() == seed + 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("update_buffers", [False, True])
def test_buffers_that_are_assigned_anew_in_every_step(backend, kind, update_buffers, monkeypatch):
    model = untied(Net()) if update_buffers else Net()
    theirs, ours = two_of(kind, model, update_buffers=update_buffers)
    read, times = _tracking.read, []
    monkeypatch.setattr(_tracking, "read", lambda module: (times.append(module), read(module))[1])
    for seed in range(9):
        step(model, seed)
        norm = model.body[1]
        norm.running_mean = norm.running_mean + 1
        norm.num_batches_tracked = norm.num_batches_tracked + 1
        for averaged in (theirs.module, ours.module):
            averaged.bytes = averaged.bytes.clone()
            averaged.body[1].running_var = averaged.body[1].running_var.clone()
        if update_buffers:  # Their list of averages has the old ones otherwise.
            theirs.avg_parameters = theirs.module.state_dict()
        times.clear()
        theirs.update_parameters(model)
        ours.update_parameters(model)
        assert_same_module(ours, theirs)
        assert seed == 0 or times == []  # Neither model is walked again.


def test_steps_are_counted_on_the_host_and_follow_whoever_writes_the_buffer():
    class Reads(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            reads = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
            self.count += func in reads
            return func(*args, **(kwargs or {}))

    model = Net()
    theirs, ours = two_of("annealing", model)

    def check(num_reads):
        for seed in range(3):
            step(model, seed)
            theirs.update_parameters(model)
            with Reads() as reads:
                ours.update_parameters(model)
            assert reads.count == num_reads
            assert_same_module(ours, theirs)
            num_reads = 0

    check(0)
    saved = copy.deepcopy(theirs.state_dict())
    check(0)
    for averaged in (theirs, ours):
        averaged.load_state_dict(saved)
    check(1)
    for averaged in (theirs, ours):
        averaged.steps.fill_(40)
    check(1)
    for averaged in (theirs, ours):
        averaged.steps = torch.tensor(0)
    check(1)


def test_copies_and_pickles_go_on_by_themselves():
    model = Net()
    theirs, ours = two_of("ema", model)
    for averaged in (theirs, ours):
        averaged.update_parameters(model)
    copies = [copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))]
    at_first = copy.deepcopy(theirs)
    step(model, 1)
    theirs.update_parameters(model)
    for other in copies:
        assert_same_module(other, at_first)
        other.update_parameters(model)
        assert_same_module(other, theirs)
    assert_same_module(ours, at_first)


def test_it_runs_as_a_teacher_inside_of_a_model():
    class Taught(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.student = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
            self.teacher = MODELS.build(
                {"type": "FusedExponentialMovingAverage", "model": self.student, "momentum": 0.1}
            )

    taught, reference = Taught(), Taught()
    reference.teacher = ExponentialMovingAverage(reference.student, momentum=0.1)
    x = torch.randn(5, 3)
    for model in (taught, reference):
        for _ in range(3):
            model.student(x)
            with torch.no_grad():
                model.student[0].weight += 1
            model.teacher.update_parameters(model.student)
    assert_same(taught.state_dict(), reference.state_dict())
    assert torch.equal(taught.teacher(x), reference.teacher(x))
    # A converted model: its tensors are others.
    for model in (taught, reference):
        model.double()
        model.student[0].weight.data.add_(1)
        model.teacher.update_parameters(model.student)
    assert_same(taught.state_dict(), reference.state_dict())


class Halving:
    def avg_func(self, averaged_param, source_param, steps):
        self.seen = [*getattr(self, "seen", []), (averaged_param.shape, steps.item())]
        averaged_param.mul_(0.5).add_(source_param, alpha=0.5)


class HalvingTheirs(Halving, ExponentialMovingAverage):
    pass


class HalvingOurs(Halving, fused.FusedExponentialMovingAverage):
    pass


class HalvingBase(Halving, fused.FusedBaseAveragedModel):
    pass


class HalvingFused(HalvingOurs):
    form = "mul_add"

    def momentum_at(self, steps):
        return 0.5


@pytest.fixture
def num_launches(monkeypatch):
    launches = []
    kept = Plan._update
    monkeypatch.setattr(Plan, "_update", lambda *args: (launches.append(1), kept(*args))[1])
    return launches


@pytest.mark.parametrize("cls", [HalvingOurs, HalvingBase, HalvingFused])
def test_a_subclass_says_how_by_avg_func_or_by_momentum_at(cls, num_launches):
    model = Net()
    theirs, ours = HalvingTheirs(model, interval=2), cls(model, interval=2)
    for seed in range(5):
        step(model, seed)
        theirs.update_parameters(model)
        ours.update_parameters(model)
        assert_same_module(ours, theirs)
    assert len(num_launches) == (2 if cls is HalvingFused else 0)
    assert getattr(ours, "seen", None) == (None if cls is HalvingFused else theirs.seen)


def test_an_avg_func_given_to_the_object_is_called():
    model = Net()
    _, ours = two_of("ema", model)
    ours.avg_func = lambda averaged, live, steps: averaged.fill_(7)
    for _ in range(2):
        ours.update_parameters(model)
    assert ours.module.scale.item() == 7


@pytest.mark.parametrize(
    ("kind", "dtype", "launches"),
    [
        ("ema", torch.float32, 8),
        ("annealing", torch.bfloat16, 8),
        ("swa", torch.float32, 7),  # The first has m = 1/2, where lerp has other bits.
        ("swa", torch.bfloat16, 0),
    ],
)
def test_what_is_fused(kind, dtype, launches, num_launches):
    model = Net(dtype)
    ours = two_of(kind, model)[1]
    for seed in range(9):
        step(model, seed)
        ours.update_parameters(model)
    assert len(num_launches) == launches


def test_a_momentum_changed_between_steps_is_used():
    model = Net()
    theirs, ours = two_of("ema", model)
    for seed in range(6):
        theirs.momentum = ours.momentum = 0.1 * (seed + 1)
        step(model, seed)
        theirs.update_parameters(model)
        ours.update_parameters(model)
        assert_same_module(ours, theirs)


def test_tied_weights_are_averaged_once():
    model = Net()
    ours = fused.FusedExponentialMovingAverage(model, momentum=0.1, update_buffers=True)
    ours.update_parameters(model)
    expected = ours.module.embedding.weight.detach().clone()
    step(model, 1)
    ours.update_parameters(model)
    expected.lerp_(model.embedding.weight.detach(), 0.1)
    same(ours.module.embedding.weight, expected, "embedding")
    assert ours.module.head.weight is ours.module.embedding.weight


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_wrappers_are_looked_through(wrap):
    model = Net()
    theirs, ours = two_of("ema", model)
    wrapped = wrap(model)
    for seed in range(3):
        step(model, seed)
        theirs.update_parameters(model)
        ours.update_parameters(wrapped)
        assert_same_module(ours, theirs)


def broken(model, change):
    model = copy.deepcopy(model)
    if change == "parameter shape":
        model.scale = nn.Parameter(torch.ones(2))
    elif change == "parameter gone":
        del model.scale
    elif change == "parameter resized":
        model.scale.data = torch.ones(2)
    elif change == "buffer shape":
        model.body[1].running_mean = torch.zeros(5)
    elif change == "passing buffer shape":
        model.scratch = torch.zeros(5)
    return model


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("parameter shape", r"'scale'.*shape"),
        ("parameter gone", r"1 of 9 averaged tensors aren't in the model \('scale'\)"),
        ("parameter resized", "scale"),
        ("buffer shape", r"'body.1.running_mean' has shape \[5\] in the model but \[4\]"),
        ("passing buffer shape", r"'scratch' has shape \[5\] in the model but \[2\]"),
    ],
)
@pytest.mark.parametrize("num_updates", [0, 1, 2])
def test_a_model_that_does_not_fit_changes_nothing(change, says, num_updates):
    model = Net()
    ours = two_of("ema", model)[1]
    for seed in range(num_updates):
        step(model, seed)
        ours.update_parameters(model)
    before = copy.deepcopy(ours)
    step(model, 5)
    with pytest.raises(ValueError, match=says):
        ours.update_parameters(broken(model, change))
    assert_same_module(ours, before)
    for averaged in (ours, before):
        averaged.update_parameters(model)
    assert_same_module(ours, before)


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        ("ema", {"momentum": 0.0}, "momentum is 0.0"),
        ("ema", {"momentum": 1}, "momentum is 1;"),
        ("ema", {"momentum": float("nan")}, "momentum is nan"),
        ("annealing", {"momentum": -0.1}, "momentum is -0.1"),
        ("annealing", {"gamma": 0}, "gamma is 0"),
        ("ema", {"interval": 0}, "interval is 0"),
        ("swa", {"interval": -1}, "interval is -1"),
        ("swa", {"interval": 1.5}, "interval is 1.5"),
    ],
)
def test_settings_out_of_range(kind, options, says):
    cls = KINDS[kind][1]
    with pytest.raises(ValueError, match=f"fused_ema.{cls.__name__}: {says}"):
        cls(Net(), **options)


@pytest.mark.parametrize("kind", KINDS)
def test_unknown_options(kind):
    with pytest.raises(TypeError, match="decay"):
        KINDS[kind][1](Net(), decay=0.9)


def test_without_mmengine_it_says_so(monkeypatch):
    monkeypatch.delitem(sys.modules, "fused_ema.hooks.mmengine")
    monkeypatch.setitem(sys.modules, "mmengine.model", None)
    with pytest.raises(ImportError, match=r"fused_ema.hooks.mmengine needs mmengine \(0.10\)"):
        importlib.import_module("fused_ema.hooks.mmengine")


# ---- in the Runner


@pytest.fixture(autouse=True)
def _quick_and_able_to_load(monkeypatch):
    # Its checkpoints hold more than tensors, which torch.load refuses by default.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    kept = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(Runner, "_log_env", lambda *args: None)  # Looks for compilers.
    yield
    torch.set_num_threads(kept)


class Numbers(Dataset):
    def __init__(self, size=12):
        generator = torch.Generator().manual_seed(3)
        self.inputs = torch.randn(size, 3, 6, 6, generator=generator)
        self.targets = torch.randn(size, 5, generator=generator)

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        return {"inputs": self.inputs[index], "targets": self.targets[index]}


class Model(BaseModel):
    """With all that a checkpoint may hold; ``wide`` makes it another model."""

    def __init__(self, dtype=torch.float32, wide=5, tied=False):
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("calls", torch.tensor(0))
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.body[0].weight.data = self.body[0].weight.to(memory_format=torch.channels_last)
        self.middle, self.head = nn.Linear(4, 4), nn.Linear(4, wide)
        if tied:
            self.again = self.head
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.empty = nn.Parameter(torch.empty(0, 2))
        self.register_buffer("last", torch.zeros(4), persistent=False)
        self.to(dtype)

    def forward(self, inputs, targets, mode="tensor"):
        inputs, targets = inputs.to(self.scale.dtype), targets.to(self.scale.dtype)
        features = self.body(inputs).mean((2, 3))
        self.last = features.detach().mean(0)
        if self.training:
            self.calls += 1
        out = self.head(self.middle(features)) * self.scale
        if mode == "loss":
            return {"loss": (out[:, :5] - targets).square().mean()}
        return [*out, self.last, self.calls]


class Outputs(BaseMetric):
    """Keeps what the model gave, to compare validations by bits."""

    default_prefix = "test"
    seen: list = []  # noqa: RUF012

    def process(self, data_batch, data_samples):
        self.results.append(0)
        Outputs.seen.append([sample.clone() for sample in data_samples])

    def compute_metrics(self, results):
        return {"count": len(results)}


def loader(**more):
    return {
        "batch_size": 4,
        "num_workers": 0,
        "dataset": Numbers(),
        "collate_fn": {"type": "default_collate"},
        "sampler": {"type": "DefaultSampler", "shuffle": True},
        **more,
    }


def make_runner(folder, custom_hooks, *, by_epoch=True, model=None, num=3, **more):
    torch.manual_seed(0)
    train = {"by_epoch": True, "max_epochs": num, "val_interval": 1}
    if not by_epoch:
        train = {"by_epoch": False, "max_iters": 3 * num, "val_interval": 2}
    still = {"type": "DefaultSampler", "shuffle": False}
    endless = {} if by_epoch else {"sampler": {"type": "InfiniteSampler", "shuffle": True}}
    return Runner(
        model=model or Model(),
        work_dir=str(folder),
        train_dataloader=loader(**endless),
        val_dataloader=loader(sampler=still),
        test_dataloader=loader(sampler=still),
        train_cfg=train,
        val_cfg={},
        test_cfg={},
        val_evaluator=[Outputs()],
        test_evaluator=[Outputs()],
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1, "momentum": 0.9}},
        param_scheduler={"type": "LinearLR", "start_factor": 0.5, "end": 4, "by_epoch": False},
        default_hooks={
            "checkpoint": {
                "type": "CheckpointHook",
                "interval": 1 if by_epoch else 3,
                "by_epoch": by_epoch,
            },
            "logger": {"type": "LoggerHook", "interval": 100},
        },
        custom_hooks=custom_hooks,
        experiment_name=f"{Path(folder).name}_{time.monotonic_ns()}",
        randomness={"seed": 1},
        log_level="ERROR",
        **more,
    )


def ema_of(runner):
    return next(hook for hook in runner.hooks if isinstance(hook, EMAHook))


def hook(name, **options):
    return [{"type": name, **{"ema_type": "ExponentialMovingAverage", "momentum": 0.1, **options}}]


def train(folder, custom_hooks, **more):
    """Trains; returns the runner and the outputs of all validations."""
    Outputs.seen = []
    runner = make_runner(folder, custom_hooks, **more)
    runner.train()
    return runner, Outputs.seen


def read(path):
    return torch.load(path, map_location="cpu", weights_only=False)


def assert_same_file(ours, theirs):
    ours, theirs = read(ours), read(theirs)
    assert list(ours) == list(theirs)
    for part in ("state_dict", "ema_state_dict"):
        assert_same(ours[part], theirs[part])
        assert type(ours[part]) is type(theirs[part])
    assert_same(flat(ours["optimizer"]), flat(theirs["optimizer"]))
    assert [ours["meta"][key] for key in ("epoch", "iter")] == [
        theirs["meta"][key] for key in ("epoch", "iter")
    ]


def flat(optimizer):
    state = optimizer["state"]
    return {
        f"{i}.{key}": value
        for i, of in state.items()
        for key, value in of.items()
        if torch.is_tensor(value)
    }


def assert_same_outputs(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert_same(dict(enumerate(a)), dict(enumerate(b)))


def assert_same_run(ours, theirs):
    assert (ours.iter, ours.epoch) == (theirs.iter, theirs.epoch)
    assert_same_module(ours.model, theirs.model)
    assert_same_module(ema_of(ours).ema_model, ema_of(theirs).ema_model)


LATE = "begin_epoch"
RUNS = {
    "plain": {},
    "interval": {"interval": 2},
    "begin_iter": {"begin_iter": 4},
    LATE: {"begin_epoch": 2},
    "buffers": {"update_buffers": True},
    "buffers, later": {"update_buffers": True, "begin_iter": 5, "interval": 2},
    "annealing": {"ema_type": "MomentumAnnealingEMA", "gamma": 4},
    "swa": {"ema_type": "mmengine.StochasticWeightAverage", "interval": 2, "momentum": None},
    "by class": {"ema_type": ExponentialMovingAverage},
    "ours by name": {"ema_type": "FusedExponentialMovingAverage"},
}


def given(run):
    options = dict(RUNS[run])
    made = hook("EMAHook", **options)[0]
    if made.get("momentum", 0) is None:
        del made["momentum"]
    theirs, ours = dict(made), {**made, "type": "FusedEMAHook"}
    if run == "ours by name":
        theirs["ema_type"] = "ExponentialMovingAverage"
    return [theirs], [ours]


@pytest.mark.parametrize(
    ("run", "by_epoch"),
    # A run by iterations is one epoch.
    [(run, by_epoch) for run in RUNS for by_epoch in (True, False) if by_epoch or run != LATE],
)
def test_a_run_is_theirs_bit_for_bit(tmp_path, run, by_epoch):
    theirs, ours = given(run)
    reference, expected = train(tmp_path / "theirs", theirs, by_epoch=by_epoch)
    runner, outputs = train(tmp_path / "ours", ours, by_epoch=by_epoch)
    assert isinstance(ema_of(runner).ema_model, fused.FusedBaseAveragedModel)
    assert_same_run(runner, reference)
    assert_same_outputs(outputs, expected)
    files = sorted(path.name for path in (tmp_path / "theirs").glob("*.pth"))
    assert len(files) == 3
    for name in files:
        assert_same_file(tmp_path / "ours" / name, tmp_path / "theirs" / name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_runs_in_other_dtypes(tmp_path, dtype):
    theirs, ours = given("buffers")
    reference, expected = train(tmp_path / "theirs", theirs, model=Model(dtype))
    runner, outputs = train(tmp_path / "ours", ours, model=Model(dtype))
    assert_same_run(runner, reference)
    assert_same_outputs(outputs, expected)
    assert_same_file(tmp_path / "ours/epoch_3.pth", tmp_path / "theirs/epoch_3.pth")


HOOKS = ("EMAHook", "FusedEMAHook")


@pytest.mark.parametrize("by_epoch", [True, False])
@pytest.mark.parametrize("run", ["interval", "buffers", "annealing", "swa"])
def test_checkpoints_go_from_one_to_the_other(tmp_path, run, by_epoch):
    name = "epoch_1.pth" if by_epoch else "iter_3.pth"
    last = "epoch_3.pth" if by_epoch else "iter_9.pth"
    hooks = dict(zip(HOOKS, given(run), strict=True))
    for kind, custom in hooks.items():
        train(tmp_path / kind, custom, by_epoch=by_epoch)
    for saved_by, loaded_by in (HOOKS, HOOKS[::-1], ("FusedEMAHook",) * 2):
        folder = tmp_path / f"{saved_by}_{loaded_by}"
        train(
            folder,
            hooks[loaded_by],
            by_epoch=by_epoch,
            resume=True,
            load_from=str(tmp_path / saved_by / name),
        )
        assert_same_file(folder / last, tmp_path / "EMAHook" / last)


def test_a_resumed_run_follows_the_interval_that_it_is_given(tmp_path):
    train(tmp_path / "saved", given("plain")[0])
    for name, custom in zip(HOOKS, given("interval"), strict=True):
        path = str(tmp_path / "saved/epoch_1.pth")
        train(tmp_path / name, custom, resume=True, load_from=path)
    ours, theirs = (tmp_path / name / "epoch_3.pth" for name in HOOKS)
    assert_same_file(ours, theirs)
    with pytest.raises(AssertionError):
        assert_same_file(ours, tmp_path / "saved/epoch_3.pth")


@pytest.mark.parametrize("strict_load", [False, True])
def test_weights_are_loaded_and_tested_as_theirs(tmp_path, strict_load):
    train(tmp_path / "saved", hook("EMAHook"))
    outputs, states = {}, {}
    for name in HOOKS:
        Outputs.seen = []
        runner = make_runner(
            tmp_path / name,
            hook(name, strict_load=strict_load),
            load_from=str(tmp_path / "saved/epoch_2.pth"),
        )
        runner.test()
        runner.val()
        outputs[name], states[name] = Outputs.seen, runner
    assert_same_outputs(outputs["FusedEMAHook"], outputs["EMAHook"])
    assert_same_module(states["FusedEMAHook"].model, states["EMAHook"].model)


def test_a_checkpoint_without_an_average_starts_one(tmp_path):
    train(tmp_path / "saved", [])
    files = []
    for name in HOOKS:
        train(
            tmp_path / name,
            hook(name),
            resume=True,
            load_from=str(tmp_path / "saved/epoch_1.pth"),
        )
        files.append(tmp_path / name / "epoch_3.pth")
    assert_same_file(*files[::-1])


def test_a_tied_model_is_trained_on_its_raw_weights(tmp_path):
    """MMEngine's exchange of both names leaves the average in the model."""
    plain, _ = train(tmp_path / "plain", [], model=Model(tied=True))
    for update_buffers in (False, True):
        runner, _ = train(
            tmp_path / f"ours{update_buffers}",
            hook("FusedEMAHook", update_buffers=update_buffers),
            model=Model(tied=True),
        )
        assert_same(runner.model.named_parameters(), dict(plain.model.named_parameters()))


class Fails(Hook):
    priority = "VERY_LOW"

    def __init__(self):
        self.times = 1

    def before_val_iter(self, runner, batch_idx, data_batch=None):
        if self.times:
            self.times = 0
            raise RuntimeError("planted")


@pytest.mark.cuda
@pytest.mark.parametrize("update_buffers", [False, True])
def test_averages_on_another_device(update_buffers):
    model = untied(Net()).cuda()
    theirs, ours = two_of("ema", model, update_buffers=update_buffers, device="cpu")
    assert ours.module.scale.device != model.scale.device
    reference = copy.deepcopy(model)
    for seed in range(3):
        for student, averaged in ((model, ours), (reference, theirs)):
            torch.manual_seed(seed)
            step(student, seed)
            averaged.update_parameters(student)
    assert_same_module(ours, theirs)
    hook_of_theirs = EMAHook()
    hook_of_theirs.ema_model, hook_of_theirs.src_model = theirs, reference
    for _ in range(2):
        ours.swap(model)
        hook_of_theirs._swap_ema_parameters()
        assert_same_module(ours, theirs)
        assert_same_module(model, reference)


def test_a_failed_validation_leaves_the_raw_weights_to_the_next_run(tmp_path):
    runner = make_runner(tmp_path, [*hook("FusedEMAHook"), {"type": Fails}])
    with pytest.raises(RuntimeError, match="planted"):
        runner.train()
    ema = ema_of(runner)
    raw = copy.deepcopy(ema.ema_model.module)
    with pytest.raises(RuntimeError, match="the model holds the average"):
        ema.after_train_iter(runner, 0)
    ema.before_run(runner)
    assert_same(runner.model.named_parameters(), dict(raw.named_parameters()))


def test_a_checkpoint_written_while_swapped_is_as_any_other(tmp_path):
    runner, _ = train(tmp_path, hook("FusedEMAHook"))
    ema = ema_of(runner)
    files = []
    for is_swapped in (False, True):
        if is_swapped:
            ema.before_val_epoch(runner)
        files.append({"state_dict": copy.deepcopy(runner.model.state_dict())})
        ema.before_save_checkpoint(runner, files[-1])
        files[-1] = copy.deepcopy(files[-1])
    ema.after_val_epoch(runner)
    for part in ("state_dict", "ema_state_dict"):
        assert_same(files[1][part], files[0][part])


# ---- what is refused


@pytest.mark.parametrize("other", [hook("FusedEMAHook"), hook("EMAHook")])
@pytest.mark.parametrize("first", [True, False])
def test_two_hooks_on_one_runner(tmp_path, other, first):
    hooks = [*hook("FusedEMAHook"), *other] if first else [*other, *hook("FusedEMAHook")]
    runner = make_runner(tmp_path, hooks)
    with pytest.raises(RuntimeError, match=r"the runner has 2 EMA hooks .*'ema_state_dict'"):
        runner.train()
    assert runner.iter == 0


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"ema_type": "NoSuchEMA"}, KeyError, "ema_type is 'NoSuchEMA', which isn't in the"),
        ({"ema_type": nn.Linear}, TypeError, "which is no subclass of"),
        ({"decay": 0.9}, TypeError, "unexpected keyword argument 'decay'"),
        ({"momentum": 1.5}, ValueError, "momentum is 1.5"),
        ({"interval": 0}, ValueError, "interval is 0"),
    ],
)
def test_bad_options_are_refused_before_the_run(tmp_path, options, error, says):
    runner = make_runner(tmp_path, hook("FusedEMAHook", **options))
    with pytest.raises(error, match=says):
        runner.train()
    assert not hasattr(ema_of(runner), "ema_model")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"begin_iter": 1, "begin_epoch": 2}, "both begin_iter=1 and begin_epoch=2"),
        ({"begin_iter": -1}, "begin_iter is -1"),
        ({"begin_epoch": 0.5}, "begin_epoch is 0.5"),
    ],
)
def test_bad_beginnings(options, says):
    with pytest.raises(ValueError, match=says):
        fused.FusedEMAHook(**options)


def test_another_averaged_model_is_used_as_it_is_and_said_so(tmp_path, caplog):
    reference, _ = train(tmp_path / "theirs", hook("EMAHook", ema_type=HalvingTheirs))
    runner = make_runner(tmp_path / "ours", hook("FusedEMAHook", ema_type=HalvingTheirs))
    with caplog.at_level(logging.WARNING, logger=runner.logger.name):
        runner.logger.addHandler(caplog.handler)
        runner.train()
    assert "HalvingTheirs averages tensor by tensor" in caplog.text
    assert_same_run(runner, reference)


def changed(checkpoint, how):
    ema, weights = checkpoint["ema_state_dict"], checkpoint["state_dict"]
    if how == "no weights":
        del weights["scale"]
    elif how == "no steps":
        del ema["steps"]
    elif how == "no average of one":
        del ema["module.scale"]
    elif how == "one too many":
        ema["module.extra"] = weights["extra"] = torch.ones(1)
    elif how == "other names":
        for name in list(ema):
            if name != "steps":
                ema[f"module.x.{name[7:]}"] = ema.pop(name)
        for name in list(weights):
            weights[f"x.{name}"] = weights.pop(name)


@pytest.mark.parametrize(
    ("how", "strict", "says"),
    [
        ("other model", False, r"'head.weight' has shape \[7, 4\] in the checkpoint but \[5, 4\]"),
        ("no weights", False, "'scale' is under 'ema_state_dict' but not under 'state_dict'"),
        ("no steps", False, "missing in the checkpoint: 'steps'"),
        ("other names", False, r"missing in the checkpoint: 'module.*not in the model: 'module.x"),
        ("no average of one", True, "missing in the checkpoint: 'module.scale'"),
        ("one too many", True, "not in the model: 'module.extra'"),
        ("no average of one", False, None),
        ("one too many", False, None),
    ],
)
def test_a_checkpoint_that_does_not_fit_changes_nothing(tmp_path, how, strict, says):
    model = Model(wide=7) if how == "other model" else Model()
    train(tmp_path / "saved", hook("EMAHook"), model=model, num=1)
    checkpoint = read(tmp_path / "saved/epoch_1.pth")
    changed(checkpoint, how)
    torch.save(checkpoint, tmp_path / "changed.pth")
    runner = make_runner(
        tmp_path / "resumed",
        hook("FusedEMAHook", strict_load=strict),
        resume=True,
        load_from=str(tmp_path / "changed.pth"),
    )
    before = copy.deepcopy(runner.model)
    if says is None:
        runner.train()
        assert runner.iter == 9
        return
    with pytest.raises(ValueError, match=f"(?s)isn't one of this model.*{says}"):
        runner.train()
    assert_same_module(runner.model, before)
    assert_same_module(ema_of(runner).ema_model.module, before.requires_grad_(False))
    assert ema_of(runner).ema_model.steps.item() == runner.iter == 0


@pytest.mark.parametrize("part", [0.3, 0.9])
def test_a_truncated_file(tmp_path, part):
    train(tmp_path / "saved", hook("FusedEMAHook"), num=1)
    whole = (tmp_path / "saved/epoch_1.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: int(part * len(whole))])
    runner = make_runner(
        tmp_path / "resumed",
        hook("FusedEMAHook"),
        resume=True,
        load_from=str(tmp_path / "cut.pth"),
    )
    before = copy.deepcopy(runner.model)
    with pytest.raises((RuntimeError, OSError)):  # torch.load's
        runner.train()
    assert_same_module(runner.model, before)
    assert_same_module(ema_of(runner).ema_model.module, before.requires_grad_(False))


# ---- a run that is killed


class Killed(Hook):
    priority = "VERY_LOW"

    def __init__(self, at):
        self.at = at

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def run_in_child(folder, run, by_epoch, killed_at):
    """Trains to the end, or is killed; goes on from the last checkpoint that it finds."""
    torch.set_num_threads(1)
    hooks = [*given(run)[1], {"type": Killed, "at": killed_at}]
    return train(folder, hooks, by_epoch=by_epoch, num=4, resume=True)[0]


CUT = {"annealing": (True, 7), "buffers, later": (False, 10)}


def child(folder, *cuts):
    root, tests = Path(__file__).parents[2], Path(__file__).parents[1]
    return subprocess.Popen(
        [sys.executable, __file__, str(folder), *cuts],
        env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{tests}"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def test_a_killed_run_goes_on_as_if_nothing_had_been(tmp_path):
    killed = {run: child(tmp_path, run, "killed") for run in CUT}
    whole = {}
    for run, (by_epoch, _) in CUT.items():
        whole[run] = run_in_child(tmp_path / f"{run} whole", run, by_epoch, -1)
    for run, process in killed.items():
        error = process.communicate(timeout=120)[1].decode()
        assert process.returncode == -signal.SIGKILL, error
        name = "epoch_2.pth" if CUT[run][0] else "iter_9.pth"
        files = sorted(path.name for path in (tmp_path / run).glob("*.pth"))
        assert files[-1] == name
    process = child(tmp_path, *CUT)
    error = process.communicate(timeout=120)[1].decode()
    assert process.returncode == 0, error
    for run, (by_epoch, _) in CUT.items():
        last = "epoch_4.pth" if by_epoch else "iter_12.pth"
        assert_same_file(tmp_path / run / last, tmp_path / f"{run} whole" / last)
        resumed = read(tmp_path / run / "end.pt")
        assert_same(resumed["model"], whole[run].model.state_dict())
        assert_same(resumed["ema"], ema_of(whole[run]).ema_model.state_dict())
        assert resumed["iter"] == whole[run].iter == 12


def main():
    Runner._log_env = lambda *args: None
    folder, *runs = sys.argv[1:]
    is_killed = runs[-1] == "killed"
    for run in runs[:-1] if is_killed else runs:
        by_epoch, killed_at = CUT[run]
        runner = run_in_child(Path(folder, run), run, by_epoch, killed_at if is_killed else -1)
        end = {"model": runner.model.state_dict(), "ema": ema_of(runner).ema_model.state_dict()}
        torch.save({**end, "iter": runner.iter}, Path(folder, run, "end.pt"))


if __name__ == "__main__":
    main()
