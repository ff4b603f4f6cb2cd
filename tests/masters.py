"""Optimizers that train fp32 copies of a bf16 model, as they are found in the field."""

from __future__ import annotations

import torch
from torch import nn


def net(dtype=torch.bfloat16, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))
    model[0].weight.data = model[0].weight.data.t().contiguous().t()
    return model.to(dtype)


def backward(model, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, model[0].in_features, generator=generator)
    model(x.to(model[0].weight.dtype)).float().square().mean().backward()


class InState(torch.optim.Optimizer):
    """Masters in its state, made by the first step; its step count is written at each."""

    def __init__(self, params, lr=0.05, key="master_param"):
        super().__init__(params, {"lr": lr})
        self.key = key

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                state["step"] = state.get("step", 0) + 1
                master = state.setdefault(self.key, param.detach().float())
                master.add_(param.grad.float(), alpha=-group["lr"])
                param.copy_(master)


class InList:
    """No optimizer of torch's: AdamW over a list of masters, as apex' O2 and Megatron have it."""

    def __init__(self, params, lr=0.05):
        self.params = list(params)
        self.masters = [nn.Parameter(param.detach().float()) for param in self.params]
        self.optimizer = torch.optim.AdamW(self.masters, lr=lr)

    @torch.no_grad()
    def step(self):
        for master, param in zip(self.masters, self.params, strict=True):
            master.grad = param.grad.float()
        self.optimizer.step()
        for master, param in zip(self.masters, self.params, strict=True):
            param.copy_(master)

    def zero_grad(self):
        for param in self.params:
            param.grad = None


class Wrapped(InList, torch.optim.Optimizer):
    """The same as an optimizer without hooks of its own, with the groups of the one inside."""

    def __init__(self, params, lr=0.05):
        InList.__init__(self, params, lr)
        self.param_groups, self.state = self.optimizer.param_groups, self.optimizer.state


class Hooked(InList, torch.optim.Optimizer):
    """The same with hooks, which run when the model has the new weights."""

    def __init__(self, params, lr=0.05):
        InList.__init__(self, params, lr)
        torch.optim.Optimizer.__init__(self, self.masters, {"lr": lr})


class Kahan(torch.optim.Optimizer):
    """SGD on bf16 weights that keeps what their roundings lose, as optimi does."""

    def __init__(self, params, lr=0.05, sign=1):
        super().__init__(params, {"lr": lr})
        self.sign = sign

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                lost = state.setdefault("kahan_comp", torch.zeros_like(param))
                update = self.sign * lost - group["lr"] * param.grad
                before = param.clone()
                param.add_(update)
                lost.copy_(self.sign * (update - (param - before)))
