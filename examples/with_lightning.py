"""Lightning: the average is updated, evaluated and saved by a callback.

    python examples/with_lightning.py

takes some seconds on a CPU. Validation sees the average, and so does the module after ``fit``; a
checkpoint holds both, and ``fit(ckpt_path=...)`` goes on from it.
"""

from __future__ import annotations

import tempfile

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from fused_ema.hooks.lightning import EMA


class Module(pl.LightningModule):
    """Learns a function of four numbers from noisy values of it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 1))

    def training_step(self, batch: list[Tensor]) -> Tensor:
        """The loss of a batch."""
        x, y = batch
        return mse_loss(self.net(x), y)

    def validation_step(self, batch: list[Tensor]) -> None:
        """Here the module holds the average."""
        x, y = batch
        self.log("val_loss", mse_loss(self.net(x), y))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Nothing about the average: the callback finds it."""
        return torch.optim.Adam(self.parameters(), lr=0.02)


def loader_of(size: int, batch: int, noise: float, seed: int) -> DataLoader[tuple[Tensor, ...]]:
    """Points, and a function of them with noise."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 4, generator=draw)
    y = (x[:, :1] * x[:, 1:2]).tanh() + x[:, 2:3].sin()
    return DataLoader(TensorDataset(x, y + noise * torch.randn(size, 1, generator=draw)), batch)


def train(folder: str, epochs: int = 4, averages: bool = True) -> float:
    """Trains; returns the loss on points without noise, of the average or of the raw weights."""
    pl.seed_everything(0, verbose=False)
    trainer = pl.Trainer(
        callbacks=[EMA(momentum=0.02)] if averages else [],
        max_epochs=epochs,
        default_root_dir=folder,
        accelerator="auto",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    points = loader_of(4096, 1024, noise=0.0, seed=2)
    trainer.fit(Module(), loader_of(2048, 16, noise=0.5, seed=1), points)
    return float(trainer.callback_metrics["val_loss"])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(f"raw weights {train(folder, averages=False):.4f}, average {train(folder):.4f}")
