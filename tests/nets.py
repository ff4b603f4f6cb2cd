"""A model with every kind of tensor, and comparison of models by bits."""

from __future__ import annotations

import torch
from torch import nn

from fused_ema.testing import assert_bits_equal


class Net(nn.Module):
    """All that a manager may meet: tied, empty, 0-dim, integer, boolean, complex, strided."""

    def __init__(self, dtype=torch.float32, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.embedding = nn.Embedding(7, 5)
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.body[0].weight.data = self.body[0].weight.to(memory_format=torch.channels_last)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.frozen = nn.Parameter(torch.randn(6), requires_grad=False)
        self.register_buffer("bytes", torch.arange(5, dtype=torch.uint8))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.register_parameter("absent", None)
        self.to(dtype)
        self.register_buffer("table", torch.randn(4, dtype=torch.complex64))  # .to makes it real


TIED = ("embedding.weight", "head.weight")


def move(model, seed):
    """What a training step does to a model: every tensor gets other values, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name == TIED[1]:
                continue
            if tensor.is_floating_point() or tensor.is_complex():
                tensor += torch.randn(tensor.shape, generator=generator).to(tensor)
            elif tensor.dtype != torch.bool:
                tensor += 1
            else:
                tensor.logical_not_()


def same(actual, expected, what):
    if expected.is_floating_point():
        assert_bits_equal(actual, expected, what)
    else:
        assert actual.dtype == expected.dtype, what
        assert torch.equal(actual, expected), what


def assert_same(actual, expected):
    actual = dict(actual)
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        same(actual[name], tensor, name)


def values_of(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def is_same(actual, expected):
    try:
        assert_same(actual, expected)
    except AssertionError:
        return False
    return True
