"""A model whose weights at iteration i are the i-th unit vector: an average is its own weights."""

from __future__ import annotations

import torch
from torch import nn

from fused_ema import EMAManager

NUM = 240


class Unit(nn.Module):
    """Weights that are unit vectors: the first one before training."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(NUM + 1))
        self.at(0)

    @torch.no_grad()
    def at(self, iteration):
        self.weight.zero_()[iteration] = 1


def manager(model, momentum, interval=1, begin=0):
    schedule = momentum if callable(momentum) else None
    constant = 0.1 if callable(momentum) else momentum
    return EMAManager(model, constant, interval, momentum_fun=schedule, begin=begin)


def trained(model, *managers, num=NUM, first=0):
    for i in range(first, num):
        model.at(i + 1)
        for one in managers:
            one.update()
