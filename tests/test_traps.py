"""docs/traps.md: what happens, and that each way out is one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fused_ema import EMAManager, _native

X = torch.ones(1, 3)


@pytest.fixture
def averaged():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
    ema = EMAManager(model, 0.25)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    ema.update()
    with torch.no_grad():
        raw = model(X)
        with ema.swapped():
            average = model(X)
    assert not torch.allclose(raw, average)
    return model, ema, raw, average


def test_a_state_dict_taken_inside(averaged):
    model, ema, _, _ = averaged
    raw = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with ema.swapped():
        state, copied, own = model.state_dict(), copy.deepcopy(model.state_dict()), ema.state_dict()
    for name, tensor in raw.items():
        assert torch.equal(state[name], tensor)
        assert torch.equal(copied[name], dict(ema.named_emas())[name])
        assert torch.equal(own["ema"][name], dict(ema.named_emas())[name])
        assert torch.equal(own["raw"][name], tensor)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "exported",
    [
        lambda model: torch.jit.trace(model, (X,)),
        lambda model: torch.export.export(model, (X,)).module(),
    ],
    ids=["trace", "export"],
)
def test_a_program_taken_inside(averaged, exported):
    model, ema, raw, average = averaged
    with ema.swapped(), torch.no_grad():
        inside, of_a_copy = exported(model), exported(copy.deepcopy(model))
    with torch.no_grad():
        assert torch.allclose(inside(X), raw)
        assert torch.allclose(of_a_copy(X), average)


def test_a_copy_to_serve(averaged):
    model, ema, raw, average = averaged
    served = copy.deepcopy(model)
    ema.copy_to(served)
    with torch.no_grad():
        assert torch.equal(served(X), average)
        assert torch.equal(model(X), raw)


class Caching(nn.Module):
    """As LeViT: what is computed of the weights is kept in evaluation, until train()."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.cached = None

    def train(self, mode=True):
        self.cached = None
        return super().train(mode)

    def forward(self, x):
        if self.training or self.cached is None:
            self.cached = self.weight * 2
        return x + self.cached


@pytest.fixture
def exchanging():
    """Sets torch's way of converting modules; as it was after the test."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    yield torch.__future__.set_swap_module_params_on_conversion
    torch.__future__.set_swap_module_params_on_conversion(before)


def test_modules_that_cache():
    model = Caching().eval()
    ema = EMAManager(model, 0.25)
    with torch.no_grad():
        model.weight.add_(4)
        ema.update()
        assert torch.equal(model(X), X + 8)
        with ema.swapped():
            assert torch.equal(model(X), X + 8)  # The trap.
            model.train()
            model.eval()
            assert torch.equal(model(X), X + 2)


@pytest.mark.skipif(_native.C is None, reason="torch's own functions hold no tensors")
def test_conversions_that_exchange_the_tensors(exchanging):
    exchanging(False)
    model = nn.Linear(3, 3)
    ema = EMAManager(model, 0.25)
    exchanging(True)
    with pytest.raises(RuntimeError, match="Couldn't swap"):
        model.half()  # The trap.
    ema.refresh()
    model.half()
    ema.update()
    assert all(tensor.dtype == torch.float32 for _, tensor in ema.named_emas())
