"""A whole training step as one CUDA graph, with a gradient scaler and the average inside of it.

    python examples/captured.py

takes some seconds. Without a GPU the same step runs as it is, and the example says so.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import mse_loss

import fused_ema

STEPS, WARM_UP, BATCH = 400, 3, 64


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """What replays a step; the capture itself runs nothing."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def train(device: torch.device, steps: int = STEPS) -> tuple[float, float, fused_ema.EMAManager]:
    """Fits noisy values; returns the loss of the weights and of their average, without noise."""
    torch.manual_seed(0)
    on_gpu = device.type == "cuda"
    model = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 1)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, fused=True, capturable=on_gpu)
    scaler = torch.amp.GradScaler(device.type)

    # Works out the momenta of all steps now, into the device's memory. Each replay finds its own.
    momentum = fused_ema.schedules.power(std=0.1)
    ema = fused_ema.EMAManager(model, momentum_fun=momentum, capturable=steps)
    ema.register_step_post_hook(optimizer)
    inputs, targets = torch.empty(BATCH, 2, device=device), torch.empty(BATCH, 1, device=device)

    def right(x: torch.Tensor) -> torch.Tensor:
        return (3 * x).sin().sum(1, keepdim=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.float16, enabled=on_gpu, cache_enabled=False):
            outputs = model(inputs)
        scaler.scale(mse_loss(outputs.float(), targets)).backward()
        scaler.step(optimizer)  # The hook averages, but not after a step that the scaler skips.
        scaler.update()

    run = step
    side = torch.cuda.Stream() if on_gpu else None
    for i in range(steps):
        if side is not None and i == WARM_UP:
            torch.cuda.current_stream().wait_stream(side)
            run = captured(step)
        x = torch.rand(BATCH, 2) * 2 - 1
        inputs.copy_(x)
        targets.copy_(right(x) + 0.5 * torch.randn(BATCH, 1))
        if side is not None and i < WARM_UP:  # As torch asks for, before a capture.
            side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side if i < WARM_UP else None):
            run()

    grid = torch.cartesian_prod(*[torch.linspace(-1, 1, 33)] * 2).to(device)
    with torch.no_grad():
        loss = mse_loss(model(grid), right(grid)).item()
        with ema.swapped():
            return loss, mse_loss(model(grid), right(grid)).item(), ema


if __name__ == "__main__":
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print("captured in a CUDA graph" if device.type == "cuda" else "not captured: no CUDA device")
    loss, averaged, ema = train(device)
    print(f"{ema.num_updates} updates; loss {loss:.4f}, averaged {averaged:.4f}")
