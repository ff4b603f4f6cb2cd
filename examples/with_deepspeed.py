"""DeepSpeed: averages of the fp32 masters that ZeRO keeps, each process of its own part.

    deepspeed examples/with_deepspeed.py        # on GPUs
    DS_ACCELERATOR=cpu torchrun --nproc-per-node 2 examples/with_deepspeed.py

takes some seconds. The weights are bf16 and the masters fp32: an average of the weights would lose
most of each small step.
"""

from __future__ import annotations

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from fused_ema.hooks.deepspeed import EngineEMA

BATCH = 16  # Of each process.
CONFIG = {
    "train_micro_batch_size_per_gpu": BATCH,
    "zero_optimization": {"stage": 2},
    "bf16": {"enabled": True},
    "zero_allow_untested_optimizer": True,
}


def batch_of(draw: torch.Generator, size: int, noise: float) -> tuple[Tensor, Tensor]:
    """Points, and a function of them with noise."""
    x = torch.randn(size, 4, generator=draw)
    y = (x[:, :1] * x[:, 1:2]).tanh() + x[:, 2:3].sin()
    return x, y + noise * torch.randn(size, 1, generator=draw)


def loss_of(engine: nn.Module, draw: torch.Generator, size: int, noise: float) -> Tensor:
    """Of a batch, computed in bf16 and measured in fp32."""
    device = next(engine.parameters()).device
    x, y = batch_of(draw, size, noise)
    return mse_loss(engine(x.bfloat16().to(device)).float(), y.to(device))


@torch.no_grad()
def evaluate(engine: nn.Module) -> float:
    """The loss on points that the training hasn't seen, without noise."""
    return loss_of(engine, torch.Generator().manual_seed(2), 4096, noise=0.0).item()


def train(steps: int = 500) -> tuple[float, float]:
    """Trains; returns the loss of the raw weights and of the average."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)
    ema = EngineEMA(engine, momentum=0.02)
    draw = torch.Generator().manual_seed(1 + dist.get_rank())
    for _ in range(steps):
        engine.backward(loss_of(engine, draw, BATCH, noise=0.5))
        engine.step()  # An update, where the engine has applied the step.
    raw = evaluate(engine)
    with ema.swapped():  # In here the engine holds the average, rounded to bf16.
        return raw, evaluate(engine)


if __name__ == "__main__":
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo")
    raw, averaged = train()
    if dist.get_rank() == 0:
        print(f"raw weights {raw:.4f}, average {averaged:.4f}")
    dist.destroy_process_group()
