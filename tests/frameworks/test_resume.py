"""Runs killed at any step, for the averages that a loop of one's own saves; each goes on exactly.

The other frameworks save by themselves: their files have such a test each.
"""

from __future__ import annotations

import os
import signal
from typing import ClassVar

import pytest
import stubs
import torch
import torch._dynamo  # An optimizer's first step does, and that takes a second in each process.
from nets import assert_same, values_of
from processes import forked
from torch import nn

import fused_ema
from fused_ema.hooks import diffusers, swa_utils, timm, torch_ema

stubs.install()

NUM_STEPS = 12
SAVED_AT = (3, 7)  # Checkpoints are written after these steps.


class Run:
    """A run of plain PyTorch, and an average beside it."""

    def __init__(self, dtype):
        torch.manual_seed(3)
        self.dtype = dtype
        self.model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)).to(dtype)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.step_number = 0

    def backward(self, loss):
        loss.backward()

    def step(self):
        generator = torch.Generator().manual_seed(self.step_number)
        x = torch.randn(8, 5, generator=generator).to(self.dtype)
        self.backward(self.model(x).float().square().mean())
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step_number += 1
        self.update()

    def state(self):
        return {
            "step": self.step_number,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict(),
        }

    def load(self, state):
        self.step_number = state["step"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema.load_state_dict(state["ema"])

    def averages(self):
        return dict(self.ema.state_dict())

    def results(self):
        return values_of(self.model) | {f"average of {n}": t for n, t in self.averages().items()}


class TimmRun(Run):
    def __init__(self, dtype):
        super().__init__(dtype)
        self.ema = timm.ModelEmaV3(self.model, decay=0.9, use_warmup=True)

    def update(self):
        self.ema.update(self.model, step=self.step_number)


class AveragedModelRun(Run):
    def __init__(self, dtype):
        super().__init__(dtype)
        self.ema = swa_utils.AveragedModel(self.model)

    def update(self):
        self.ema.update_parameters(self.model)


class ListRun(Run):
    def averages(self):
        state = self.ema.state_dict()
        count = state["num_updates" if "num_updates" in state else "optimization_step"]
        found = {str(i): t for i, t in enumerate(state["shadow_params"])}
        return found | {"count": torch.tensor(count)}


class TorchEMARun(ListRun):
    def __init__(self, dtype):
        super().__init__(dtype)
        self.ema = torch_ema.ExponentialMovingAverage(self.model.parameters(), decay=0.9)

    def update(self):
        self.ema.update()


class DiffusersRun(ListRun):
    def __init__(self, dtype):
        super().__init__(dtype)
        self.ema = diffusers.EMAModel(self.model.parameters(), decay=0.9, use_ema_warmup=True)

    def update(self):
        self.ema.step(self.model.parameters())


class ManagerRun(Run):
    settings: ClassVar = {"momentum_fun": fused_ema.schedules.ramp(0.1, 5)}

    def __init__(self, dtype):
        super().__init__(dtype)
        self.ema = fused_ema.EMAManager(self.model, **self.settings)

    def update(self):
        self.ema.update()

    def averages(self):
        counts = {"iteration": self.ema.iteration, "num_updates": self.ema.num_updates}
        return dict(self.ema.named_emas()) | {k: torch.tensor(v) for k, v in counts.items()}


class BeforeBeginRun(ManagerRun):
    """Both checkpoints are older than the first average."""

    settings: ClassVar = {"momentum": 0.1, "interval": 2, "begin": 9}


class SwappedRun(ManagerRun):
    """Checkpoints are written while the model holds the average."""

    def state(self):
        with self.ema.swapped():
            state = super().state()
            return {key: _copied(value) for key, value in state.items()}

    def load(self, state):
        super().load(state)
        self.ema.swap()


class AccelerateRun(ManagerRun):
    def __init__(self, dtype):
        from accelerate import Accelerator

        super().__init__(dtype)
        self.accelerator = Accelerator(cpu=True)
        self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        self.ema.register_step_post_hook(self.optimizer)

    def backward(self, loss):
        self.accelerator.backward(loss)

    def update(self):
        pass


def _copied(value):
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {k: _copied(v) for k, v in value.items()}
    return value


RUNS = (
    *(TimmRun, AveragedModelRun, TorchEMARun, DiffusersRun),
    *(ManagerRun, BeforeBeginRun, SwappedRun, AccelerateRun),
)


def train(run, path, killed_after=None):
    while run.step_number < NUM_STEPS:
        run.step()
        if run.step_number in SAVED_AT:
            temporary = path.with_suffix(".tmp")
            torch.save(run.state(), temporary)
            os.replace(temporary, path)
        if run.step_number == killed_after:
            os.kill(os.getpid(), signal.SIGKILL)


def resume(kind, dtype, path):
    run = kind(dtype)
    run.load(torch.load(path, weights_only=True))
    assert run.step_number in SAVED_AT
    train(run, path.with_suffix(".resumed"))
    torch.save(run.results(), path.with_suffix(".results"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("killed_after", [5, 7, 11])
@pytest.mark.parametrize("kind", RUNS, ids=lambda kind: kind.__name__)
@pytest.mark.filterwarnings("ignore:The AcceleratorState")
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, kind, killed_after, dtype):
    path = tmp_path / "checkpoint.pt"
    assert forked(lambda: train(kind(dtype), path, killed_after)) == "SIGKILL"
    assert torch.load(path, weights_only=True)["step"] == max(
        s for s in SAVED_AT if s <= killed_after
    )
    assert forked(lambda: resume(kind, dtype, path)) == "None"

    def uninterrupted():
        run = kind(dtype)
        train(run, tmp_path / "other.pt")
        assert_same(torch.load(path.with_suffix(".results")), run.results())

    assert forked(uninterrupted) == "None"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_follows_the_interval_that_it_is_given(dtype):
    # As documented: settings aren't part of a state.
    whole, first = ManagerRun(dtype), ManagerRun(dtype)
    for run in (whole, first):
        for _ in range(5):
            run.step()
    second = ManagerRun(dtype)
    second.ema = fused_ema.EMAManager(second.model, interval=3, **ManagerRun.settings)
    second.load(first.state())
    whole.ema._interval = 3
    for run in (whole, second):
        for _ in range(6):
            run.step()
    assert whole.ema.num_updates == second.ema.num_updates == 5 + 2
    assert_same(second.results(), whole.results())
