"""The registered operations, and what torch.compile makes of the public ones."""

from __future__ import annotations

import pytest
import torch

import fused_ema
from fused_ema.testing import assert_bits_equal, make_lists

PAIR = (torch.float32, torch.bfloat16)


def args_for(name, device):
    ema, params = make_lists((5, 0, 300), PAIR, device=device)
    odd = make_lists((20,), PAIR, "with gaps", device)
    ema, params = ema + odd[0], params + odd[1]
    if name == "update_.default":
        return torch.ops.fused_ema.update_.default, (ema, params, 0.1, "two_products")
    if name == "update_.tensor":
        momentum = torch.tensor(0.1, dtype=torch.float64, device=device)
        return torch.ops.fused_ema.update_.tensor, (ema, params, momentum, "mul_add")
    return getattr(torch.ops.fused_ema, name).default, (ema, params)


@pytest.mark.parametrize("name", ["update_.default", "update_.tensor", "swap_", "copy_"])
def test_opcheck(name, device):
    op, args = args_for(name, device)
    torch.library.opcheck(op, args)


def test_registered_ops_reach_the_same_code(device):
    ema, params = make_lists((7, 9000), PAIR, device=device)
    other = [e.clone() for e in ema]
    fused_ema.update_(ema, params, 0.3)
    torch.ops.fused_ema.update_(other, params, 0.3)
    for e, want in zip(ema, other, strict=True):
        assert_bits_equal(e, want)


def test_registered_ops_check_too():
    with pytest.raises(ValueError, match=r"fused_ema.update_: momentum is 1.5"):
        torch.ops.fused_ema.update_([torch.ones(2)], [torch.ones(2)], 1.5)
    with pytest.raises(TypeError, match=r"ema\[0\] is torch.int64"):
        torch.ops.fused_ema.update_([torch.ones(2).long()], [torch.ones(2).long()], 0.5)


def test_compiled_without_a_graph_break():
    def step(ema, params, momentum):
        fused_ema.update_(ema, params, 0.25)
        fused_ema.update_(ema, params, momentum, form="mul_add")
        fused_ema.update_(ema, params, 0.75, form="two_products")
        fused_ema.swap_(ema, params)
        return [e + 1 for e in ema]

    momentum = torch.tensor(0.5, dtype=torch.float64)
    ema, params = make_lists((5, 70), (torch.float32, torch.float32))
    expected_ema, expected_params = [e.clone() for e in ema], [p.clone() for p in params]
    expected = step(expected_ema, expected_params, momentum)
    # "aot_eager" traces and functionalises as inductor does, without its code generation.
    result = torch.compile(step, fullgraph=True, backend="aot_eager")(ema, params, momentum)
    pairs = zip((*result, *ema, *params), (*expected, *expected_ema, *expected_params), strict=True)
    for got, want in pairs:
        assert_bits_equal(got, want)
