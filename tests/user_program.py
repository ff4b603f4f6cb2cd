"""A program as a user types it: `make lint` has mypy read it, tests/test_types.py runs it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, assert_type

import torch
from torch import Tensor

import fused_ema
from fused_ema import EMAManager, Plan, schedules


def train(steps: int = 3) -> float:
    """A loop with a manager, and what its methods give."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = EMAManager(model, momentum_fun=schedules.half_life(10.0), buffers={"*": "copy"})
    handle = ema.register_step_post_hook(optimizer)
    for _ in range(steps):
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    handle.remove()
    with ema.swapped() as inside:
        assert_type(inside, None)
    assert_type(ema.named_emas(), Iterator[tuple[str, Tensor]])
    assert_type(ema.num_updates, int)
    assert_type(ema.averaged_model(), torch.nn.Module)
    assert_type(ema.describe(), dict[str, str])
    assert_type(ema.state_dict(), dict[str, Any])
    missing, unexpected = ema.load_state_dict(ema.state_dict(), strict=False)
    assert_type(missing, list[str])
    assert not missing
    assert not unexpected
    return ema.momentum_at(0)


def by_hand() -> list[dict[str, Any]]:
    """Lists of tensors, with and without a plan."""
    params = [torch.ones(3), torch.ones(2, 2)]
    averages = [torch.zeros_like(param) for param in params]
    plan = Plan(averages, params, names=["a", "b"])
    plan.update(0.5)
    plan.update(torch.tensor(0.5, dtype=torch.float64), form="mul_add")
    fused_ema.update_(averages, params, 0.5)
    fused_ema.swap_(averages, params)
    fused_ema.copy_(averages, params)
    assert_type(len(plan), int)
    assert_type(fused_ema.info().native, bool)
    return plan.describe()


if __name__ == "__main__":
    train()
    by_hand()
