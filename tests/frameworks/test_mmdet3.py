"""MMDetection 3's MeanTeacherHook beside ours, in MMEngine's Runner."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch
from nets import assert_same
from test_readme import run
from torch import nn

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "`torch.jit")
    from mmengine.model import BaseModel
    from mmengine.registry import HOOKS
    from mmengine.runner import Runner

    from fused_ema.hooks import mmdet

pytestmark = pytest.mark.filterwarnings("ignore")

# Version 3 lies beside the environment, which has version 2. Its package asks for mmcv 2 and for
# compiled ops; the hook is a file that takes nothing but a registry from it.
BESIDE = Path(sys.prefix) / "beside" / "mmdet" / "engine" / "hooks" / "mean_teacher_hook.py"


@pytest.fixture(scope="module", autouse=True)
def their_hook():
    """MMDetection's own, registered under its name."""
    kept = {name: sys.modules.get(name) for name in ("mmdet", "mmdet.registry")}
    registry = ModuleType("mmdet.registry")
    registry.HOOKS = HOOKS
    sys.modules |= {"mmdet": ModuleType("mmdet"), "mmdet.registry": registry}
    try:
        spec = importlib.util.spec_from_file_location("mean_teacher_hook", BESIDE)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    finally:
        for name, module in kept.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module
    yield
    HOOKS.module_dict.pop("MeanTeacherHook")


class Part(nn.Module):
    def __init__(self, seed, dtype):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.norm, self.last = nn.Linear(4, 17), nn.BatchNorm1d(17), nn.Linear(17, 3)
        self.register_buffer("seen", torch.zeros(4))
        self.to(dtype)

    def forward(self, x):
        if self.training:
            self.seen = x.detach().mean(0)  # Assigned anew.
        return self.last(self.norm(self.first(x)))


class Semi(BaseModel):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.student, self.teacher = Part(1, dtype), Part(2, dtype)
        self.teacher.requires_grad_(False).eval()
        self.seen = []

    def forward(self, inputs, mode):
        x = torch.stack(inputs).to(self.student.first.weight.dtype)
        self.seen.append({k: v.clone() for k, v in self.teacher.state_dict().items()})
        target = self.teacher(x)
        return {"loss": (self.student(x) - target - 1).square().mean()}

    def train(self, mode=True):
        super().train(mode)
        self.teacher.eval()
        return self


def train(hook, folder, dtype=torch.float32, iters=5, resume=None):
    model = Semi(dtype)
    data = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
    runner = Runner(
        model=model,
        work_dir=str(folder),
        train_dataloader={
            "dataset": [{"inputs": row} for row in data],
            "batch_size": 8,
            "sampler": {"type": "DefaultSampler", "shuffle": False},
            "collate_fn": {"type": "pseudo_collate"},
        },
        train_cfg={"by_epoch": False, "max_iters": iters},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1}},
        default_hooks={
            "checkpoint": {"type": "CheckpointHook", "by_epoch": False, "interval": 1},
            "logger": None,
        },
        custom_hooks=[hook],
        default_scope="mmengine",
        experiment_name=f"{folder.name}_{hook['type']}",
        log_level="ERROR",
        load_from=resume,
        resume=resume is not None,
    )
    runner.train()
    return model


def both(folder, hook, **options):
    """The same run with our hook and with theirs."""
    return (
        train(hook | {"type": "FusedMeanTeacherHook"}, folder / "ours", **options),
        train(hook | {"type": "MeanTeacherHook"}, folder / "theirs", **options),
    )


def assert_same_runs(ours, theirs):
    assert len(ours.seen) == len(theirs.seen) > 1
    for one, other in zip(ours.seen, theirs.seen, strict=True):
        assert_same(one, other)
    assert_same(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("skip_buffer", [True, False])
@pytest.mark.parametrize("interval", [1, 2])
def test_a_run(tmp_path, skip_buffer, interval):
    hook = {"momentum": 0.03, "interval": interval, "skip_buffer": skip_buffer}
    ours, theirs = both(tmp_path, hook)
    assert_same_runs(ours, theirs)
    # The copy before iteration 0, and averages afterwards.
    start = Part(1, torch.float32).first.weight
    assert torch.equal(ours.seen[0]["first.weight"], start)
    assert not torch.equal(ours.seen[-1]["first.weight"], start)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(tmp_path, dtype):
    assert_same_runs(*both(tmp_path, {"momentum": 0.1}, dtype=dtype, iters=3))


def test_a_resumed_run_keeps_its_teacher(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    hook = {"type": "FusedMeanTeacherHook", "momentum": 0.1}
    whole = train(hook, tmp_path / "whole", iters=4)
    train(hook, tmp_path / "begun", iters=2)
    at = str(tmp_path / "begun" / "iter_2.pth")
    resumed = train(hook, tmp_path / "resumed", iters=4, resume=at)
    assert_same(resumed.seen[0], whole.seen[2])


def test_a_nan_in_the_teacher_does_not_stay():
    model = Semi()
    model.teacher.first.weight.fill_(float("nan"))
    hook = mmdet.FusedMeanTeacherHook()

    class Runner:
        iter = 0

    Runner.model = model
    hook.before_train(Runner)
    assert torch.equal(model.teacher.first.weight, model.student.first.weight)


def test_what_is_refused():
    for wrong, match in (
        ({"momentum": 1.0}, "momentum is 1.0"),
        ({"interval": 0}, "interval is 0"),
    ):
        with pytest.raises(ValueError, match=match):
            mmdet.FusedMeanTeacherHook(**wrong)

    class Runner:
        iter, model = 3, Semi()

    hook = mmdet.FusedMeanTeacherHook()
    Runner.model.teacher.last = nn.Identity()
    before = {k: v.clone() for k, v in Runner.model.teacher.state_dict().items()}
    with pytest.raises(ValueError, match="averaged model has 4 tensors but the model has 6"):
        hook.before_train(Runner)
    assert_same(Runner.model.teacher.state_dict(), before)
    Runner.model = Part(1, torch.float32)
    with pytest.raises(TypeError, match="the Part has no module 'student'"):
        hook.before_train(Runner)


def test_readme_mmdet(tmp_path):
    (hook,) = run("MMDetection 3's mean teacher")["custom_hooks"]
    assert hook["type"] == "FusedMeanTeacherHook"
    assert_same_runs(
        train(hook, tmp_path / "ours", iters=3),
        train(hook | {"type": "MeanTeacherHook"}, tmp_path / "theirs", iters=3),
    )
