"""A loop of one's own that keeps three averages of one model, and takes the best of them.

    python examples/several_averages.py

takes some seconds on a CPU. The parameters are read once for all averages. Which of them is best
differs from run to run: a short one follows quickly, a long one is smooth.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import fused_ema
from fused_ema import schedules

STEPS, BATCH = 600, 16
# A name to a momentum, or to a schedule: 0.01 averages over about 100 steps.
AVERAGES = {"short": 0.1, "long": 0.01, "tenth": schedules.power(0.10)}


def batch_of(draw: torch.Generator, size: int, noise: float) -> tuple[Tensor, Tensor]:
    """Points, and a function of them with noise."""
    x = torch.randn(size, 4, generator=draw)
    y = (x[:, :1] * x[:, 1:2]).tanh() + x[:, 2:3].sin()
    return x, y + noise * torch.randn(size, 1, generator=draw)


@torch.no_grad()
def loss_of(model: nn.Module) -> float:
    """On points that the training hasn't seen, without noise."""
    x, y = batch_of(torch.Generator().manual_seed(2), 4096, noise=0.0)
    return float(mse_loss(model(x), y))


def train(steps: int = STEPS) -> tuple[nn.Module, dict[str, float]]:
    """Trains; returns a model that holds the best average, and the loss of each and of "raw"."""
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    ema = fused_ema.EMAManager(model, momentum=AVERAGES)
    for _ in range(steps):
        x, y = batch_of(draw, BATCH, noise=0.5)
        mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
    losses = {"raw": loss_of(model)}
    for name in ema.averages:
        with ema.swapped(name):  # The model holds this average in here.
            losses[name] = loss_of(model)
    best = min(ema.averages, key=lambda name: losses[name])
    return ema.averaged_model(best), losses


if __name__ == "__main__":
    for name, loss in train()[1].items():
        print(f"{name:5} {loss:.4f}")
