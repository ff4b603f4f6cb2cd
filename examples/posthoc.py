"""Trains a small net with snapshots, then finds the averaging length that is best for it.

    python examples/posthoc.py --folder run

Which length is best is known only afterwards. So the training keeps two averages, of fixed widths,
and saves them now and then; any other one is put together from the files. Seconds on a CPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from fused_ema import EMAManager, posthoc, schedules

STEPS, BATCH = 600, 16
WIDTHS = (0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25)


def make_model(seed: int = 0) -> nn.Module:
    """A net of two layers."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 1))


def batch_of(draw: torch.Generator, size: int, noise: float) -> tuple[Tensor, Tensor]:
    """Points, and a function of them with noise."""
    x = torch.randn(size, 4, generator=draw)
    y = (x[:, :1] * x[:, 1:2]).tanh() + x[:, 2:3].sin()
    return x, y + noise * torch.randn(size, 1, generator=draw)


def train(folder: Path, steps: int = STEPS) -> nn.Module:
    """Trains, with snapshots of two averages and of the means between."""
    model, draw = make_model(), torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    ema = EMAManager(model, {"short": schedules.power(0.05), "long": schedules.power(0.10)})
    posthoc.Snapshots(ema, folder, every=max(1, steps // 30), at=[steps], means=True)
    for _ in range(steps):
        x, y = batch_of(draw, BATCH, noise=0.5)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        ema.update()
    return model


@torch.no_grad()
def loss_of(model: nn.Module) -> float:
    """On points that the training hasn't seen, without noise."""
    x, y = batch_of(torch.Generator().manual_seed(2), 4096, noise=0.0)
    return float(nn.functional.mse_loss(model(x), y))


def main() -> None:
    """Trains, and prints the loss of each width."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=Path("run"))
    folder = parser.parse_args().folder
    print(f"raw weights  loss {loss_of(train(folder)):.4f}")
    average, losses = make_model(), {}
    for std in WIDTHS:
        found = posthoc.reconstruct(folder, std, into=average)
        losses[std] = loss_of(average)
        print(f"std {std:<8g} loss {losses[std]:.4f}  relative error {found.error:.1e}")
    best = min(losses, key=lambda std: losses[std])
    posthoc.reconstruct(folder, best, into=folder / "best.safetensors")
    print(f"best: std {best:g}, in {folder / 'best.safetensors'}")


if __name__ == "__main__":
    main()
