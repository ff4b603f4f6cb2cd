"""The hooks for mmcv's runners against MMDetection's own, in real runners, by bits."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import pytest
import stubs
import torch
from nets import same
from processes import forked
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

stubs.install()

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="On January 1, 2023, MMCV will release")
    import mmcv
    import mmcv.runner
    from mmcv.parallel import MMDataParallel
    from mmcv.runner import HOOKS, EpochBasedRunner, Hook, IterBasedRunner
    from mmdet.core.hook import ema as reference

from fused_ema import Plan, schedules  # noqa: E402
from fused_ema.hooks import mmcv as ours  # noqa: E402

NUM_BATCHES = 3
KINDS = ("EMAHook", "ExpMomentumEMAHook", "LinearMomentumEMAHook")
DTYPES = ("float32", "float64", "bfloat16", "float16", "mixed")

HOOKS.register_module(name="ReferenceEMAHook", module=reference.BaseEMAHook, force=True)
HOOKS.register_module(
    name="ReferenceExpMomentumEMAHook", module=reference.ExpMomentumEMAHook, force=True
)
HOOKS.register_module(
    name="ReferenceLinearMomentumEMAHook", module=reference.LinearMomentumEMAHook, force=True
)


class Model(nn.Module):
    """Trains, and has every kind of tensor; each buffer gets other values in every step."""

    def __init__(self, dtype="float32"):
        super().__init__()
        torch.manual_seed(0)
        self.dtype = torch.float32 if dtype == "mixed" else getattr(torch, dtype)
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("bytes", torch.arange(5, dtype=torch.uint8))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.stem[0].weight.data = self.stem[0].weight.to(memory_format=torch.channels_last)
        self.head = nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.frozen = nn.Parameter(torch.randn(6), requires_grad=False)
        self.to(self.dtype)
        if dtype == "mixed":
            self.head.to(torch.bfloat16)
            self.scale.data = self.scale.double()
            self.frozen.data = self.frozen.half()
        self.register_buffer("table", torch.randn(4, dtype=torch.complex64))

    def train_step(self, data, optimizer):
        (x,) = data
        with torch.no_grad():
            self.mask.logical_not_()
            self.bytes += 3
            self.count += 1
            self.table *= 1.25j
            self.scratch = self.scratch + 1
        x = self.stem(x.to(self.dtype)).mean((2, 3))
        x = self.head(x.to(self.head.weight.dtype)) * self.scale
        loss = x.float().square().mean() + x.float().sum()
        return {"loss": loss, "log_vars": {"loss": loss.item()}, "num_samples": len(data[0])}


class Recorder(Hook):
    """All that the model has, after every event and after all other hooks."""

    def __init__(self, model):
        self.model = model
        self.seen = []

    def record(self, event, runner):
        state = self.model.state_dict()
        values = OrderedDict((name, tensor.clone()) for name, tensor in state.items())
        self.seen.append(((event, runner.epoch, runner.iter), values))

    def before_run(self, runner):
        self.record("before_run", runner)

    def before_train_epoch(self, runner):
        self.record("before_train_epoch", runner)

    def after_train_iter(self, runner):
        self.record("after_train_iter", runner)

    def after_train_epoch(self, runner):
        self.record("after_train_epoch", runner)


class IterBasedRunnerOnCpu(IterBasedRunner):
    """Can be resumed without a GPU, by hooks that don't say where to load."""

    def resume(self, checkpoint, resume_optimizer=True, map_location="cpu"):
        super().resume(checkpoint, resume_optimizer, map_location)


def logger():
    made = logging.getLogger("test_mmcv")
    made.propagate = False
    made.setLevel(logging.CRITICAL)
    return made


def loader():
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(2 * NUM_BATCHES, 3, 6, 6, generator=generator)
    return DataLoader(TensorDataset(data), batch_size=2)


def make_runner(model, work_dir=None, runner=EpochBasedRunner, epochs=3, every=1, hooks=()):
    """As MMDetection's train.py makes it, with its own hooks and a checkpoint every few epochs."""
    by_epoch = issubclass(runner, EpochBasedRunner)
    length = {"max_epochs": epochs} if by_epoch else {"max_iters": epochs * NUM_BATCHES}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    made = runner(
        model,
        optimizer=optimizer,
        work_dir=None if work_dir is None else str(work_dir),
        logger=logger(),
        meta={},
        **length,
    )
    interval = every if by_epoch else every * NUM_BATCHES
    made.register_training_hooks(
        {"policy": "step", "step": [2], "by_epoch": by_epoch},
        {"grad_clip": None},
        None if work_dir is None else {"interval": interval, "by_epoch": by_epoch},
        None,
        custom_hooks_config=list(hooks),
    )
    return made


def run(made, recorder=True):
    """Runs it; what the model was after every event."""
    model = made.model.module if hasattr(made.model, "module") else made.model
    seen = Recorder(model)
    made.register_hook(seen, priority="LOWEST")
    made.run([loader()], [("train", 1)])
    return seen.seen


def train(hook, dtype="float32", wrap=False, **kwargs):
    model = Model(dtype)
    return run(make_runner(MMDataParallel(model) if wrap else model, hooks=[hook], **kwargs))


def assert_same_state(actual, expected, what=""):
    assert list(actual) == list(expected), what
    for name, tensor in expected.items():
        same(actual[name], tensor, f"{what} {name}")
        assert actual[name].stride() == tensor.stride(), f"{what} {name}"


def assert_same_run(actual, expected):
    assert [event for event, _ in actual] == [event for event, _ in expected]
    for (event, values), (_, expected_values) in zip(actual, expected, strict=True):
        assert_same_state(values, expected_values, event)


def both(kind, **settings):
    """Configs of ours and of the reference."""
    settings = {"momentum": 0.3, "priority": 49, **settings}
    if kind.startswith("Exp"):
        settings.setdefault("total_iter", 4)
    if kind.startswith("Linear"):
        settings.setdefault("warm_up", 20)
    return {"type": f"Fused{kind}", **settings}, {"type": f"Reference{kind}", **settings}


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    """The runners sleep for two seconds at every epoch, for the sake of worker processes."""
    for module in ("epoch_based_runner", "iter_based_runner"):
        monkeypatch.setattr(f"mmcv.runner.{module}.time", SimpleNamespace(sleep=lambda _: None))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors this small gain nothing from more, and a busy machine makes them wait."""
    kept = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(kept)


# ---- the same as MMDetection's hooks


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("skip_buffers", [False, True])
@pytest.mark.parametrize("interval", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("runner", [EpochBasedRunner, IterBasedRunner])
def test_every_bit_of_the_reference(runner, kind, interval, skip_buffers, dtype):
    mine, theirs = both(kind, interval=interval, skip_buffers=skip_buffers)
    actual = train(mine, dtype, runner=runner)
    expected = train(theirs, dtype, runner=runner)
    assert_same_run(actual, expected)
    first, last = expected[0][1], expected[-1][1]
    assert any(not torch.equal(first[n], last[n]) for n in last if n.startswith("ema_stem"))


@pytest.mark.parametrize("runner", [EpochBasedRunner, IterBasedRunner])
def test_wrapped_in_data_parallel(runner):
    mine, theirs = both("ExpMomentumEMAHook")
    actual = train(mine, wrap=True, runner=runner)
    assert_same_run(actual, train(theirs, wrap=True, runner=runner))
    assert "ema_stem_0_weight" in actual[-1][1]


@pytest.mark.parametrize("priority", ["HIGHEST", "NORMAL", "VERY_LOW"])
def test_any_priority(priority, tmp_path):
    mine, theirs = both("ExpMomentumEMAHook", priority=priority)
    assert_same_run(
        train(mine, work_dir=tmp_path / "mine"), train(theirs, work_dir=tmp_path / "theirs")
    )
    load = mmcv.runner.CheckpointLoader.load_checkpoint
    for name in ("epoch_1.pth", "epoch_3.pth"):
        actual, expected = (load(str(tmp_path / d / name), "cpu") for d in ("mine", "theirs"))
        assert_same_state(actual["state_dict"], expected["state_dict"], name)


def test_a_momentum_fun_and_the_defaults():
    fun = {"momentum_fun": schedules.cosine(0.9, 0.1, total_iter=7)}
    mine, theirs = both("EMAHook", **fun)
    assert_same_run(train(mine), train(theirs))
    for kind in KINDS:
        mine, theirs = {"type": f"Fused{kind}"}, {"type": f"Reference{kind}"}
        assert_same_run(train(mine, epochs=1), train(theirs, epochs=1))


def test_hooks_derived_as_from_the_reference():
    def derived(base):
        class Derived(base):
            def __init__(self, **kwargs):
                super().__init__(**kwargs)
                self.momentum_fun = lambda i: self.momentum / (i + 1)

            def get_momentum(self, runner):
                return super().get_momentum(runner) / 2

            def after_train_epoch(self, runner):
                if runner.epoch != 1:
                    self._swap_ema_parameters()

            def before_train_epoch(self, runner):
                if runner.epoch != 2:
                    self._swap_ema_parameters()

        return Derived(momentum=0.4)

    assert_same_run(train(derived(ours.BaseEMAHook)), train(derived(reference.BaseEMAHook)))


# ---- checkpoints


@pytest.mark.parametrize("runner", [EpochBasedRunner, IterBasedRunnerOnCpu])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed"])
@pytest.mark.parametrize("skip_buffers", [False, True])
def test_checkpoints_go_both_ways(tmp_path, runner, dtype, skip_buffers):
    settings = {"interval": 2, "skip_buffers": skip_buffers}
    hooks = dict(zip(("mine", "theirs"), both("ExpMomentumEMAHook", **settings), strict=True))
    name = "epoch_2.pth" if runner is EpochBasedRunner else f"iter_{2 * NUM_BATCHES}.pth"

    def resumed(hook, writer):
        path = str(tmp_path / writer / name)
        return train({**hook, "resume_from": path}, dtype, runner=runner, epochs=4)

    for writer, hook in hooks.items():
        train(hook, dtype, runner=runner, epochs=2, work_dir=tmp_path / writer)
    expected = resumed(hooks["theirs"], "theirs")
    if runner is EpochBasedRunner:
        # An IterBasedRunner's own file says one iteration too few, and it does that one again.
        whole = train(hooks["theirs"], dtype, epochs=4)
        assert_same_run(expected[1:], whole[-len(expected) + 1 :])
    for reader, writer in (("mine", "mine"), ("mine", "theirs"), ("theirs", "mine")):
        assert_same_run(resumed(hooks[reader], writer), expected)


def test_a_resumed_run_follows_the_interval_that_it_is_given(tmp_path):
    train(both("EMAHook", interval=1)[1], work_dir=tmp_path, epochs=2)
    path = str(tmp_path / "epoch_2.pth")
    other, same_as_before = (
        [train({**hook, "resume_from": path}, epochs=3) for hook in both("EMAHook", interval=k)]
        for k in (3, 1)
    )
    assert_same_run(*other)
    with pytest.raises(AssertionError):
        assert_same_run(other[0], same_as_before[0])


def test_an_iter_based_runner_resumes_without_a_gpu(tmp_path):
    mine, theirs = both("EMAHook")
    train(mine, runner=IterBasedRunner, epochs=1, work_dir=tmp_path)
    path = tmp_path / f"iter_{NUM_BATCHES}.pth"
    actual = train({**mine, "resume_from": path}, runner=IterBasedRunner, epochs=2)
    theirs["resume_from"] = str(path)
    assert_same_run(actual, train(theirs, runner=IterBasedRunnerOnCpu, epochs=2))


def test_resumed_twice_as_the_framework_wants_it(tmp_path):
    """By the config, before the run, and by the hook."""
    hooks = both("LinearMomentumEMAHook", interval=2)
    train(hooks[1], work_dir=tmp_path, epochs=2)
    path = str(tmp_path / "epoch_2.pth")
    runs = []
    for hook in hooks:
        made = make_runner(Model(), hooks=[{**hook, "resume_from": path}], epochs=4)
        made.resume(path)
        runs.append(run(made))
    assert_same_run(*runs)
    assert_same_run(runs[0][1:], train(hooks[0], epochs=4)[-len(runs[0]) + 1 :])


def test_resumed_by_the_config_alone(tmp_path, monkeypatch):
    hooks = both("EMAHook")
    train(hooks[1], work_dir=tmp_path, epochs=1)
    runs, warned = [], []
    for hook in hooks:
        made = make_runner(Model(), hooks=[hook], epochs=2)
        made.resume(str(tmp_path / "epoch_1.pth"))
        monkeypatch.setattr(made.logger, "warning", warned.append)
        runs.append(run(made))
    assert_same_run(*runs)
    said = [text for text in warned if text.startswith("fused_ema")]
    assert len(said) == 1
    assert "resumed at iteration 3, but this hook has no resume_from" in said[0]


def test_a_checkpoint_inside_of_an_epoch(tmp_path):
    hooks = both("ExpMomentumEMAHook")
    saves = {"type": "CheckpointHook", "interval": 2, "by_epoch": False, "save_last": False}
    saves["filename_tmpl"] = "inside_{}.pth"
    made = make_runner(Model(), tmp_path, epochs=1, hooks=[hooks[0], saves])
    made.run([loader()], [("train", 1)])
    path = str(tmp_path / "inside_1.pth")
    assert_same_run(*[train({**hook, "resume_from": path}, epochs=3) for hook in hooks])


def test_a_file_holds_each_average_once(tmp_path):
    mine, theirs = both("EMAHook")
    for name, hook in (("mine", mine), ("theirs", theirs)):
        train(hook, work_dir=tmp_path / name, epochs=1)
    sizes = [(tmp_path / name / "epoch_1.pth").stat().st_size for name in ("mine", "theirs")]
    assert abs(sizes[0] - sizes[1]) < 64


BAD_FILES = ("truncated", "another model", "no averages", "no run", "not there", "a list")


@pytest.mark.parametrize("what", BAD_FILES)
def test_a_bad_checkpoint_changes_nothing(tmp_path, what):
    path = tmp_path / "bad.pth"
    mine, _ = both("EMAHook", resume_from=str(path))
    train(both("EMAHook")[0], work_dir=tmp_path, epochs=1)
    good = tmp_path / "epoch_1.pth"
    content = torch.load(good)
    if what == "truncated":
        path.write_bytes(good.read_bytes()[:-1000])
        error, says = RuntimeError, r"'.*bad.pth' can't be read"
    elif what == "another model":
        state = content["state_dict"]
        state["ema_head_weight"] = torch.zeros(3, 5)
        del state["ema_scale"]
        error = ValueError
        says = r"(?s)nothing was loaded.*'ema_head_weight' has shape \[3, 5\] but 'head.weight' "
        says += r"has \[3, 4\]"
    elif what == "no averages":
        names = [name for name in content["state_dict"] if name.startswith("ema_")]
        for name in names:
            del content["state_dict"][name]
        error, says = ValueError, r"(?s)skip_buffers.*'ema_head_bias' is missing"
    elif what == "no run":
        content = content["state_dict"]
        error, says = ValueError, "bad.pth' holds no state of a run.*load_from"
    elif what == "a list":
        content = [1]
        error, says = ValueError, "holds no state of a run"
    else:
        error, says = FileNotFoundError, "bad.pth can not be found"
    if what not in ("truncated", "not there"):
        torch.save(content, path)
    model = Model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = make_runner(model, hooks=[mine])
    with pytest.raises(error, match=says):
        run(made)
    assert_same_state(model.state_dict(), before)
    assert (made.epoch, made.iter) == (0, 0)
    # With a good file the same hook and model go on.
    path.unlink(missing_ok=True)
    path.symlink_to(good)
    made.run([loader()], [("train", 1)])
    assert made.epoch == 3


def test_a_resume_that_fails_in_mmcv_leaves_no_buffers(tmp_path):
    mine, _ = both("EMAHook")
    train(mine, work_dir=tmp_path, epochs=1)
    path = tmp_path / "epoch_1.pth"
    content = torch.load(path)
    content["optimizer"]["param_groups"].append({"params": [0]})
    torch.save(content, path)
    model = Model()
    names = list(model.state_dict())
    with pytest.raises(ValueError, match="different number of parameter groups"):
        run(make_runner(model, hooks=[{**mine, "resume_from": str(path)}]))
    assert list(model.state_dict()) == names


def test_an_old_checkpoint_without_counters(tmp_path):
    mine, theirs = both("EMAHook")
    train(mine, work_dir=tmp_path, epochs=1)
    path = tmp_path / "epoch_1.pth"
    content = torch.load(path)
    for name in [n for n in content["state_dict"] if "num_batches_tracked" in n]:
        del content["state_dict"][name]
    torch.save(content, path)
    resumed = [train({**h, "resume_from": str(path)}, epochs=2) for h in (mine, theirs)]
    assert_same_run(*resumed)


# ---- a killed run


def child(work_dir, kind, is_killed, whose="mine"):
    """Trains four epochs; at first until it is killed, then from its last checkpoint."""
    torch.set_num_threads(1)
    for module in ("epoch_based_runner", "iter_based_runner"):
        getattr(mmcv.runner, module).time = SimpleNamespace(sleep=lambda _: None)
    runner = EpochBasedRunner if kind == "epoch" else IterBasedRunnerOnCpu
    mine, theirs = both("ExpMomentumEMAHook", interval=2)
    hook = mine if whose == "mine" else theirs

    class Killer(Hook):
        def after_train_iter(self, runner):
            if is_killed and runner.iter == 2 * NUM_BATCHES + 1:
                os.kill(os.getpid(), signal.SIGKILL)

    if not is_killed and (work_dir / "latest.pth").exists():
        hook["resume_from"] = str(work_dir / "latest.pth")
    made = make_runner(Model(), work_dir, runner, 4, 1, [hook, Killer()])
    made.run([loader()], [("train", 1)])
    return {"model": made.model.state_dict(), "epoch": made.epoch, "iter": made.iter}


def child_env():
    here = Path(__file__).parent
    paths = [here, here.parent, here.parent.parent]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}


def save_child(work_dir, kind, is_killed):
    torch.save(child(work_dir, kind, is_killed), work_dir / "end.pth")


def run_killed_and_again(work_dir, kinds):
    """In processes of their own; forked, since each would spend seconds on imports."""

    for is_killed in (True, False):
        for kind in kinds:
            path = Path(work_dir) / kind
            if not is_killed:
                shutil.copy((path / "latest.pth").resolve(), path / "copy.pth")
            outcome = forked(save_child, path, kind, is_killed)
            assert outcome == ("SIGKILL" if is_killed else "None")


def test_a_killed_run_resumes_exactly(tmp_path):
    kinds = ("epoch", "iter")
    code = f"import test_mmcv as t; t.run_killed_and_again({str(tmp_path)!r}, {kinds!r})"
    subprocess.run([sys.executable, "-c", code], env=child_env(), check=True, timeout=200)
    for kind in kinds:
        resumed = torch.load(tmp_path / kind / "end.pth")
        if kind == "epoch":
            whole = child(tmp_path / "whole", kind, False)
        else:  # The runner does an iteration twice, so compare with the reference doing that.
            (tmp_path / "whole" / "latest.pth").unlink()
            (tmp_path / "iter" / "copy.pth").rename(tmp_path / "whole" / "latest.pth")
            whole = child(tmp_path / "whole", kind, False, "theirs")
        assert (resumed["epoch"], resumed["iter"]) == (whole["epoch"], whole["iter"])
        assert_same_state(resumed["model"], whole["model"], kind)


# ---- where it differs from the reference


class Tied(Model):
    def __init__(self, dtype="float32"):
        super().__init__(dtype)
        self.twin = nn.Linear(4, 3)
        self.twin.weight = self.head.weight
        self.register_buffer("shadow", self.head.weight.detach().t())
        self.register_buffer("counted", self.count)


def train_tied(hook, **kwargs):
    return run(make_runner(Tied(), hooks=[hook], **kwargs))


def test_tied_weights_are_swapped_right(tmp_path):
    mine, theirs = both("ExpMomentumEMAHook")
    actual = train_tied(mine, work_dir=tmp_path, epochs=4)
    untied = train(mine, epochs=4)
    for (event, values), (_, expected) in zip(actual, untied, strict=True):
        for name in ("head.weight", "head.bias", "stem.0.weight", "count"):
            same(values[name], expected[name], f"{event} {name}")
            ema = f"ema_{name.replace('.', '_')}"
            same(values[ema], expected[ema], f"{event} {ema}")
        same(values["ema_twin_weight"], values["ema_head_weight"], event)
        same(values["ema_shadow"], values["ema_head_weight"].t(), event)
        same(values["ema_counted"], values["ema_count"], event)
    # The reference agrees until its first swap of different values ...
    expected = train_tied(theirs, epochs=2)
    assert_same_run(actual[: 2 + NUM_BATCHES], expected[: 2 + NUM_BATCHES])
    # ... in names and order always, and where it never swaps in all.
    assert list(actual[-1][1]) == list(expected[-1][1])
    iter_based = [train_tied(hook, runner=IterBasedRunner) for hook in (mine, theirs)]
    assert_same_run(*iter_based)
    # A file of the reference that was saved in an epoch-end state has lost nothing that counts.
    train_tied(theirs, work_dir=tmp_path / "theirs", epochs=1)
    path = str(tmp_path / "theirs" / "epoch_1.pth")
    resumed = train_tied({**mine, "resume_from": path}, epochs=4)
    since = 1 + NUM_BATCHES + 2
    for (event, values), (_, expected) in zip(resumed[1:], untied[since:], strict=True):
        same(values["head.weight"], expected["head.weight"], event)
        same(values["ema_twin_weight"], expected["ema_head_weight"], event)


def test_tied_tensors_that_part():
    mine, theirs = both("EMAHook")
    runs = []

    def part(model):
        model.shadow.data = torch.ones(4, 3).t().contiguous().t()

    for hook in (mine, theirs):
        made = make_runner(Tied(), hooks=[hook, At(1, part)], runner=IterBasedRunner)
        runs.append(run(made)[-1][1])
    first = runs[0]["ema_head_weight"]
    same(first, runs[1]["ema_head_weight"], "head")
    assert not torch.equal(runs[0]["ema_shadow"], first.t())
    m = 0.3
    assert runs[0]["shadow"].eq(1).all()
    left = (1 - m) ** (3 * NUM_BATCHES - 1)
    assert (runs[0]["ema_shadow"] - 1).abs().max() < 2 * left


def test_tied_parameters_without_buffers_as_the_reference():
    mine, theirs = both("ExpMomentumEMAHook", skip_buffers=True)
    model = Tied()
    del model.shadow
    runs = []
    for hook in (mine, theirs):
        model = Tied()
        del model.shadow
        runs.append(run(make_runner(model, hooks=[hook])))
    assert_same_run(*runs)


class Assigning(Model):
    """Makes its buffers and a parameter's memory anew in every step."""

    def train_step(self, data, optimizer):
        outputs = super().train_step(data, optimizer)
        self.count = self.count.clone()
        self.table = self.table.clone()
        norm = self.stem[1]
        norm.running_mean = norm.running_mean.clone()
        self.scale.data = self.scale.data.clone()
        return outputs


@pytest.mark.parametrize("skip_buffers", [False, True])
def test_buffers_that_are_assigned_anew_are_followed(skip_buffers):
    mine, theirs = both("ExpMomentumEMAHook", skip_buffers=skip_buffers)
    assert_same_run(run(make_runner(Assigning(), hooks=[mine])), train(theirs))


def test_a_buffer_that_is_assigned_anew_costs_no_walk_of_the_model(monkeypatch):
    calls = []
    track = ours._track
    monkeypatch.setattr(ours, "_track", lambda *given: calls.append(1) or track(*given))
    mine, _ = both("EMAHook")
    run(make_runner(Assigning(), hooks=[mine]))
    assert len(calls) == 1  # when the run begins


def test_a_buffer_that_is_tied_to_another_meanwhile_is_averaged_as_one():
    mine, _ = both("EMAHook")

    def tie(model):
        model.stem[1].running_var = model.stem[1].running_mean

    made = make_runner(Model(), hooks=[mine, At(1, tie)], runner=IterBasedRunner)
    at_end = run(made)[-1][1]
    same(at_end["ema_stem_1_running_var"], at_end["ema_stem_1_running_mean"], "tied")


class At(Hook):
    """Does something to the model after an iteration."""

    def __init__(self, iteration, what):
        self.iteration = iteration
        self.what = what

    def before_train_iter(self, runner):
        if runner.iter == self.iteration:
            self.what(runner.model)


def test_a_converted_model_is_followed():
    mine, _ = both("EMAHook")

    def convert(model):
        model.double()
        model.dtype = torch.float64

    model = Model()
    seen = run(make_runner(model, hooks=[mine, At(NUM_BATCHES + 1, convert)]))
    # The optimizer keeps its parameters; averages and model still exchange.
    (_, at_end), (_, before) = seen[-1], seen[-2]
    for name in ("head.weight", "stem.1.running_mean", "scale"):
        ema = f"ema_{name.replace('.', '_')}"
        assert at_end[name].dtype == at_end[ema].dtype == torch.float64
        same(at_end[name], before[ema], name)
        same(at_end[ema], before[name], name)
        assert not torch.equal(at_end[name], at_end[ema])


def replace_parameter(model):
    model.head.bias = nn.Parameter(torch.zeros(3))


def remove_parameter(model):
    del model.frozen


def add_parameter(model):
    model.head.extra = nn.Parameter(torch.zeros(3))


def replace_average(model):
    model.ema_head_bias = torch.zeros(4)


def remove_average(model):
    del model.ema_head_bias


def resize_buffer(model):
    model.bytes = torch.zeros(9, dtype=torch.uint8)


CHANGES = {
    replace_parameter: "'head.bias' was replaced",
    remove_parameter: "'frozen' is gone",
    add_parameter: "'head.extra' is new",
    replace_average: "'ema_head_bias', the average of 'head.bias', was replaced or is gone",
    remove_average: "'ema_head_bias', the average of 'head.bias', was replaced or is gone",
    resize_buffer: "'bytes' was replaced",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_a_model_that_changes_is_an_error(change):
    mine, _ = both("EMAHook")
    made = make_runner(Model(), hooks=[mine, At(1, change)])
    with pytest.raises(RuntimeError, match=rf"(?s)EMAHook.after_train_iter: .*{CHANGES[change]}"):
        run(made)


def test_new_buffers_are_left_alone():
    mine, theirs = both("EMAHook")

    def add(model):
        model.register_buffer("late", torch.zeros(2))

    runs = [run(make_runner(Model(), hooks=[h, At(1, add)])) for h in (mine, theirs)]
    assert_same_run(*runs)


def test_names_that_would_share_a_buffer():
    model = Model()
    model.a = nn.Module()
    model.a.b_c = nn.Parameter(torch.zeros(1))
    model.a_b = nn.Module()
    model.a_b.c = nn.Parameter(torch.zeros(1))
    names = list(model.state_dict())
    mine, _ = both("EMAHook")
    with pytest.raises(ValueError, match=r"'a.b_c' and 'a_b.c' .* one buffer, 'ema_a_b_c'"):
        run(make_runner(model, hooks=[mine]))
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("first", ["mine", "theirs"])
def test_a_second_hook_on_a_model(first):
    mine, theirs = both("EMAHook")
    other = {**(mine if first == "mine" else theirs), "priority": 48}
    with pytest.raises(ValueError, match=r"has a 'ema_.*' already.*one hook for a model"):
        run(make_runner(Model(), hooks=[other, mine]))


def test_a_second_hook_that_comes_later():
    mine, theirs = both("EMAHook", skip_buffers=True)
    for runner in (EpochBasedRunner, IterBasedRunner):
        with pytest.raises(RuntimeError, match=r"average of 'scale', was replaced .* second EMA"):
            run(make_runner(Model(), hooks=[mine, theirs], runner=runner))


def test_a_name_that_is_taken():
    model = Model()
    model.ema_scale = "something else"
    with pytest.raises(ValueError, match="the average of 'scale' would be the buffer 'ema_scale'"):
        run(make_runner(model, hooks=[both("EMAHook")[0]]))
    assert model.ema_scale == "something else"
    assert not any(name.startswith("ema_") for name in model.state_dict())


def test_a_second_run_goes_on():
    mine, _ = both("ExpMomentumEMAHook")
    whole = train(mine, epochs=4)
    for runner in (EpochBasedRunner, IterBasedRunner):
        made = make_runner(Model(), hooks=[mine], runner=runner, epochs=2)
        run(made)
        made._max_epochs, made._max_iters = 4, 4 * NUM_BATCHES
        made.run([loader()], [("train", 1)])
        if runner is IterBasedRunner:
            whole = train(mine, epochs=4, runner=runner)
        assert_same_state(made.model.state_dict(), whole[-1][1])


def test_a_run_that_stopped_inside_an_epoch():
    def stop(model):
        raise ArithmeticError

    made = make_runner(Model(), hooks=[both("EMAHook")[0], At(1, stop)])
    with pytest.raises(ArithmeticError):
        run(made)
    with pytest.raises(RuntimeError, match=r"the last run stopped inside an epoch.*resume_from="):
        made.run([loader()], [("train", 1)])


@pytest.mark.parametrize("model_class", [Model, Tied])
def test_an_interrupted_swap_is_undone(monkeypatch, model_class):
    model = model_class()
    made = make_runner(model, hooks=[both("EMAHook")[0]], epochs=1)
    run(made)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    swap = Plan.swap
    for is_done in (True, False):

        def interrupted(plan, is_done=is_done):
            if is_done:
                swap(plan)
            monkeypatch.setattr(Plan, "swap", swap)
            raise KeyboardInterrupt

        monkeypatch.setattr(Plan, "swap", interrupted)
        with pytest.raises(KeyboardInterrupt):
            made.call_hook("before_train_epoch")
        assert_same_state(model.state_dict(), before)


# ---- settings


BAD = [
    ({"momentum": 0}, ValueError, "momentum is 0"),
    ({"momentum": 1.0}, ValueError, "momentum is 1.0"),
    ({"momentum": float("nan")}, ValueError, "momentum is nan"),
    ({"momentum": "0.1"}, TypeError, "momentum is a str"),
    ({"interval": 0}, ValueError, "interval is 0"),
    ({"interval": 1.5}, ValueError, "interval is 1.5"),
    ({"interval": True}, ValueError, "interval is True"),
    ({"momentum_fun": 0.1}, TypeError, "momentum_fun"),
    ({"resume_from": 3}, TypeError, "int"),
    ({"moment": 0.1}, TypeError, "unexpected keyword argument 'moment'"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("settings", "error", "says"), BAD, ids=lambda x: str(x)[:40])
def test_bad_settings(kind, settings, error, says):
    with pytest.raises(error, match=says):
        mmcv.build_from_cfg({"type": f"Fused{kind}", **settings}, HOOKS)


@pytest.mark.parametrize(
    ("config", "error", "says"),
    [
        ({"type": "FusedExpMomentumEMAHook", "total_iter": 0}, ValueError, "total_iter is 0"),
        ({"type": "FusedLinearMomentumEMAHook", "warm_up": -1}, ValueError, "warm_up is -1"),
        (
            {"type": "FusedExpMomentumEMAHook", "momentum_fun": schedules.constant()},
            TypeError,
            "FusedEMAHook with momentum_fun",
        ),
    ],
)
def test_bad_schedules(config, error, says):
    with pytest.raises(error, match=says):
        mmcv.build_from_cfg(config, HOOKS)


def test_a_momentum_fun_outside_of_its_range():
    hook = {"type": "FusedEMAHook", "momentum_fun": lambda i: 1.5, "priority": 49}
    with pytest.raises(ValueError, match=r"1\.5"):
        train(hook)


# ---- names in the registry


ORDERS = {
    "ours first": """
        import fused_ema.hooks.mmcv as ours
        from mmcv.runner import HOOKS
        assert HOOKS.get("ExpMomentumEMAHook") is None
        import mmdet.core.hook.ema as theirs
    """,
    "replaced before mmdet is imported": """
        import fused_ema.hooks.mmcv as ours
        from mmcv.runner import HOOKS
        undo = ours.replace_mmdet_hooks()
        from mmdet.core import ExpMomentumEMAHook
        from mmdet.core.hook.ema import BaseEMAHook
        assert ExpMomentumEMAHook is ours.ExpMomentumEMAHook
        assert BaseEMAHook is ours.BaseEMAHook
        assert HOOKS.get("ExpMomentumEMAHook") is ours.ExpMomentumEMAHook
        assert HOOKS.get("LinearMomentumEMAHook") is ours.LinearMomentumEMAHook
        undo()
        import mmdet.core.hook.ema as theirs
    """,
}
AFTER = """
        for name in ("ExpMomentumEMAHook", "LinearMomentumEMAHook"):
            assert HOOKS.get(name) is getattr(theirs, name), name
            assert HOOKS.get(name).__module__ == "mmdet.core.hook.ema"
            assert HOOKS.get("Fused" + name) is getattr(ours, name)
        assert HOOKS.get("FusedEMAHook") is ours.BaseEMAHook
        assert HOOKS.get("EMAHook").__module__ == "mmcv.runner.hooks.ema"
"""
WITHOUT = """
        import sys
        import fused_ema
        assert not [name for name in sys.modules if name.startswith("fused_ema.hooks")]
        sys.modules["mmcv"] = None
        try:
            import fused_ema.hooks.mmcv
        except ImportError as error:
            assert "fused_ema.hooks.mmcv needs mmcv-full 1.x (or mmcv 1.x)" in str(error), error
        else:
            raise AssertionError
"""


def test_no_clash_where_mmdet_comes_first():
    """As in this process."""
    for name in KINDS[1:]:
        assert HOOKS.get(name) is getattr(reference, name)
        assert HOOKS.get(f"Fused{name}") is getattr(ours, name)
    assert HOOKS.get("EMAHook").__module__ == "mmcv.runner.hooks.ema"
    assert HOOKS.get("FusedEMAHook") is ours.BaseEMAHook


def test_no_clash_where_mmdet_comes_later():
    """All at once, since each process spends seconds on imports."""
    before = "        import stubs; stubs.install()\n"
    codes = [before + code + AFTER for code in ORDERS.values()]
    running = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", "if True:\n" + code],
            env=child_env(),
            stderr=subprocess.PIPE,
            text=True,
        )
        for code in [*codes, WITHOUT]
    ]
    for process in running:
        _, stderr = process.communicate(timeout=100)
        assert process.returncode == 0, stderr


def test_in_the_place_of_the_reference():
    import mmdet.core

    theirs = HOOKS.get("ExpMomentumEMAHook")
    config = {"type": "ExpMomentumEMAHook", "momentum": 0.3, "total_iter": 4, "priority": 49}
    expected = train(config)
    undo = ours.replace_mmdet_hooks()
    try:
        assert isinstance(mmcv.build_from_cfg({"type": config["type"]}, HOOKS), ours.BaseEMAHook)
        assert mmdet.core.ExpMomentumEMAHook is ours.ExpMomentumEMAHook
        assert reference.LinearMomentumEMAHook is ours.LinearMomentumEMAHook
        assert_same_run(train(config), expected)
    finally:
        undo()
    undo()
    assert HOOKS.get("ExpMomentumEMAHook") is theirs
    assert mmdet.core.ExpMomentumEMAHook is mmdet.core.hook.ExpMomentumEMAHook is theirs


def test_from_a_config_file(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(
        'custom_imports = dict(imports=["fused_ema.hooks.mmcv"])\n'
        'custom_hooks = [dict(type="FusedExpMomentumEMAHook", total_iter=2000, momentum=0.0002, '
        "priority=49)]\n"
    )
    config = mmcv.Config.fromfile(str(path))
    made = make_runner(Model(), hooks=config.custom_hooks)
    assert any(type(hook) is ours.ExpMomentumEMAHook for hook in made.hooks)
