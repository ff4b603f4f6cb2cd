"""Lists of parameters, for frameworks that average lists."""

from __future__ import annotations

import io

import torch
from torch import nn

from fused_ema.testing import bits_of, random_values

SHAPES = [(7, 5), (), (0, 3), (33,), (4, 3, 3, 3), (1000,)]


def make_params(dtype=torch.float32, seed=0):
    params = []
    for index, shape in enumerate(SHAPES):
        values = random_values(torch.Size(shape).numel(), torch.float64, seed + index).view(shape)
        if len(shape) == 4:
            values = values.contiguous(memory_format=torch.channels_last)
        params.append(nn.Parameter(values.to(dtype), requires_grad=index != 3))
    return params


def move(params, seed):
    with torch.no_grad():
        for index, p in enumerate(params):
            change = random_values(p.numel(), torch.float64, 100 * seed + index)
            p.add_(change.view(p.shape).to(p.dtype))


def assert_lists(actual, expected):
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
        assert torch.equal(bits_of(a), bits_of(b))


def copies(tensors):
    return [t.detach().clone() for t in tensors]


def saved(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)
