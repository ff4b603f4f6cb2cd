"""register_step_post_hook(): one update for each step, or an error."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

from fused_ema import EMAManager

SGD = torch.optim.SGD


def trained(optimizer_of, steps=4, step="step"):
    torch.manual_seed(0)
    model = nn.Linear(3, 3)
    optimizer = optimizer_of(model.parameters())
    ema = EMAManager(model, 0.25)
    handle = ema.register_step_post_hook(optimizer)
    expected = model.weight.detach().clone()
    for _ in range(steps):
        model(torch.randn(5, 3)).square().mean().backward()
        getattr(optimizer, step)()
        expected.lerp_(model.weight.detach(), 0.25)
        model.zero_grad()  # Not the optimizer's, which would prepare a class for hooks.
    assert torch.equal(dict(ema.named_emas())["weight"], expected)
    assert ema.num_updates == steps
    return model, optimizer, ema, handle


class WithoutInit(torch.optim.Optimizer):
    """As timm's Lookahead: its own hooks' dicts, and no Optimizer.__init__."""

    def __init__(self, params):
        self.inside = SGD(params, lr=0.1)
        self.param_groups = self.inside.param_groups
        self.defaults, self.state = {}, self.inside.state
        self._optimizer_step_pre_hooks = OrderedDict()
        self._optimizer_step_post_hooks = OrderedDict()

    def step(self, closure=None):
        self.inside.step()
        with torch.no_grad():
            for group in self.param_groups:
                for param in group["params"]:
                    param.mul_(0.99)  # After the step inside.


class Bare(WithoutInit):
    def __init__(self, params):
        super().__init__(params)
        del self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks


class Nested(SGD):
    """Calls a step that has hooks as well."""

    def step(self, closure=None):
        return super().step(closure)


class Around(SGD):
    """Keeps its optimizer where Opacus does."""

    def __init__(self, params):
        self.original_optimizer = SGD(params, lr=0.1)

    @property
    def param_groups(self):
        return self.original_optimizer.param_groups

    def step(self, closure=None):
        self.original_optimizer.step()


class TwoSteps(torch.optim.Optimizer):
    """As SAM."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})
        self.base_optimizer = SGD(self.param_groups, lr=0.1)

    def first_step(self):
        pass

    def second_step(self):
        self.base_optimizer.step()

    def step(self, closure=None):
        self.first_step()
        self.second_step()


@pytest.mark.parametrize("kind", [SGD, Nested, WithoutInit, Around])
def test_one_update_for_each_step(kind):
    SGD([nn.Parameter(torch.zeros(1))], lr=0.1)  # Prepares SGD.step, which Nested calls.
    trained(lambda params: kind(params) if kind in (WithoutInit, Around) else kind(params, lr=0.1))


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (Bare, r"Bare never ran torch\.optim\.Optimizer's __init__"),
        (TwoSteps, r"wraps an optimizer and has steps of its own \(first_step, second_step\)"),
        (lambda params: nn.Linear(1, 1), "optimizer is a Linear; pass a torch.optim.Optimizer"),
    ],
)
def test_steps_that_call_no_hooks(kind, says):
    model = nn.Linear(2, 2)
    with pytest.raises(TypeError, match=says):
        EMAManager(model, 0.1).register_step_post_hook(kind(model.parameters()))


def test_a_scheduler_does_not_matter():
    def made(params):
        optimizer = SGD(params, lr=0.1)
        torch.optim.lr_scheduler.StepLR(optimizer, 2)
        return optimizer

    trained(made)


def test_twice_is_refused_until_it_is_removed():
    model, optimizer, ema, handle = trained(lambda params: SGD(params, lr=0.1))
    with pytest.raises(RuntimeError, match="this SGD calls update\\(\\) already"):
        ema.register_step_post_hook(optimizer)
    handle.remove()
    optimizer.step()
    assert ema.num_updates == 4
    ema.register_step_post_hook(optimizer)
    optimizer.step()
    assert ema.num_updates == 5
    other = EMAManager(model, 0.5)
    other.register_step_post_hook(optimizer)
    optimizer.step()
    assert (ema.num_updates, other.num_updates) == (6, 1)


def test_a_copy_of_the_optimizer_has_no_hook():
    _, optimizer, ema, _ = trained(lambda params: SGD(params, lr=0.1))
    copy.deepcopy(optimizer).step()
    assert ema.num_updates == 4


def test_a_step_while_swapped_is_refused_before_it_writes():
    model, optimizer, ema, _ = trained(lambda params: SGD(params, lr=0.1))
    model(torch.ones(1, 3)).sum().backward()
    averages = {name: tensor.clone() for name, tensor in ema.named_emas()}
    raw = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with ema.swapped():
        with pytest.raises(RuntimeError, match=r"optimizer\.step: the model holds the ema"):
            optimizer.step()
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, averages[name])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, raw[name])
