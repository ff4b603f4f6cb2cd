"""What the package tells the standard logger, and what objects print."""

from __future__ import annotations

import logging
import pickle

import pytest
import torch
from torch import nn

import fused_ema
from fused_ema import EMAManager, _notes, schedules


@pytest.fixture
def told(caplog, monkeypatch):
    """The lines from now on, as of a process that has told nothing yet."""
    monkeypatch.setattr(_notes, "_told", set())
    caplog.set_level(logging.INFO, "fused_ema")
    return lambda level=logging.INFO: [r.getMessage() for r in caplog.records if r.levelno == level]


def test_a_table_that_is_made_anew_is_told_once(told):
    model = nn.Linear(3, 2)
    ema = EMAManager(model)
    ema.update()
    assert told() == []
    for _ in range(2):
        model.weight.data = model.weight.data.clone()
        ema.update()
    [line] = told()
    assert "tensors had moved" in line


def test_each_table_is_told_to_those_who_debug(told, caplog):
    caplog.set_level(logging.DEBUG, "fused_ema")
    ema = EMAManager(nn.Linear(3, 2))
    plan = "fused_ema.Plan(2 x float32/float32 on cpu (cpu))"
    assert told(logging.DEBUG) == [f"made {plan}", f"made {ema!r}"]


def test_what_no_kernel_takes_is_told_with_the_reason(told, backend):
    model = nn.Linear(4, 3)
    model.weight.data = torch.zeros(3, 8)[:, ::2]  # With gaps.
    for _ in range(2):
        EMAManager(model).update()
    [line] = told()
    number, why = (1, "have gaps") if backend == "native" else (2, "switched off by a test")
    assert line.startswith(f"torch._foreach updates {number} tensors (float32/float32 on cpu): ")
    assert why in line


def test_a_buffer_that_leaves_the_table_is_named(told):
    model = nn.BatchNorm1d(2)
    ema = EMAManager(model)
    ema.update()
    model.running_mean = model.running_mean + 1
    ema.update()
    [line] = told()
    assert "'running_mean' is a new tensor in each step" in line


def test_schedules_print_what_they_are():
    schedule = schedules.half_life(10.0, interval=2)
    text = "<schedules.half_life: iterations=10.0, interval=2, ramp_up=None, counts_itself=True>"
    assert repr(schedule) == text
    assert repr(schedules.swa()) == "<schedules.swa>"
    same = pickle.loads(pickle.dumps(schedule))
    assert repr(same) == text
    assert same(3) == schedule(3) == pytest.approx(1 - 2**-0.2)
    assert f"momentum={text}" in repr(EMAManager(nn.Linear(2, 2), momentum_fun=schedule))


def test_the_help_names_what_there_is():
    for name in fused_ema.__all__:
        assert name.startswith("__") or name == "Info" or name in fused_ema.__doc__, name
