"""transformers' Trainer: the average is updated, evaluated and saved by a callback.

    python examples/with_trainer.py

takes some seconds on a CPU. ``evaluate()`` and ``predict()`` see the average; each ``checkpoint-N``
has it beside the model, and ``train(resume_from_checkpoint=...)`` goes on from it.
"""

from __future__ import annotations

import tempfile

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from fused_ema.hooks.transformers import EMACallback


class Points(Dataset[dict[str, Tensor]]):
    """Points, and a function of them with noise."""

    def __init__(self, size: int, noise: float, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.x = torch.randn(size, 4, generator=draw)
        self.y = (self.x[:, :1] * self.x[:, 1:2]).tanh() + self.x[:, 2:3].sin()
        self.y += noise * torch.randn(size, 1, generator=draw)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "labels": self.y[index]}


class Model(nn.Module):
    """Of two layers; returns its loss, as Trainer wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 1))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Of a batch."""
        y = self.net(x)
        return {"loss": nn.functional.mse_loss(y, labels), "logits": y}


def train(folder: str, epochs: float = 4, averages: bool = True) -> float:
    """Trains; returns the loss on points without noise, of the average or of the raw weights."""
    torch.manual_seed(0)
    arguments = TrainingArguments(
        output_dir=folder,
        num_train_epochs=epochs,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=1024,
        learning_rate=0.02,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    points, seen = Points(4096, noise=0.0, seed=2), Points(2048, noise=0.5, seed=1)
    trainer = Trainer(Model(), arguments, train_dataset=seen, eval_dataset=points)
    if averages:
        EMACallback(momentum=0.02).attach(trainer)
    trainer.train()
    return float(trainer.evaluate()["eval_loss"])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(f"raw weights {train(folder, averages=False):.4f}, average {train(folder):.4f}")
