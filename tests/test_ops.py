"""Values: against torch bit for bit, and against float64."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from runs import torch_update_

import fused_ema
from fused_ema.testing import (
    DTYPE_PAIRS,
    EDGE_SIZES,
    LAYOUTS,
    assert_bits_equal,
    bits_of,
    make_lists,
    reference_update,
    update_tolerance,
)

# 0.5 - 2**-30 is 0.5 in fp32 and less than it in fp64. At 1 torch's own lerp gives 0.0 or -0.0 for
# a param of -0.0, by whether the element falls into a vector or the tail.
MOMENTA = (0.0, 2e-4, 0.1, 0.5 - 2**-30, 0.5, 0.9)
FORMS = ("lerp", "mul_add", "two_products")
RUNNERS = {
    "one-shot": lambda ema, params, m, form: fused_ema.update_(ema, params, m, form),
    "plan": lambda ema, params, m, form: fused_ema.Plan(ema, params).update(m, form),
}
SPECIALS = (0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 1e-8, -3e-5, 6e4, 1e30, 1e-42)


def torch_update(ema, param, momentum, form):
    return torch_update_(ema.clone(), param, momentum, form)


@cache
def by_torch(device, pair, form):
    """Lists, and what torch makes of the emas by each momentum."""
    ema, params = make_lists(EDGE_SIZES, pair, device=device)
    pairs = list(zip(ema, params, strict=True))
    return ema, params, {m: [torch_update(e, p, m, form) for e, p in pairs] for m in MOMENTA}


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pair", DTYPE_PAIRS, ids=str)
def test_update_equals_torch_bit_for_bit(backend, device, pair, form, runner):
    start, kept, expected = by_torch(device, pair, form)
    params = [p.clone() for p in kept]
    for momentum in MOMENTA:
        ema = [e.clone() for e in start]
        RUNNERS[runner](ema, params, momentum, form)
        for e, want in zip(ema, expected[momentum], strict=True):
            assert_bits_equal(e, want, f"m={momentum}, {e.numel()} elements")
    for p, was in zip(params, kept, strict=True):
        assert_bits_equal(p, was, "a param")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pair", DTYPE_PAIRS, ids=str)
def test_momentum_one_gives_the_param_and_zero_keeps_the_ema(backend, device, pair, form):
    ema, params = make_lists(EDGE_SIZES, pair, device=device)
    before = [e.clone() for e in ema]
    fused_ema.update_(ema, params, 0.0, form)
    for e, was in zip(ema, before, strict=True):
        assert torch.equal(e, was)
    fused_ema.update_(ema, params, 1.0, form)
    for e, p in zip(ema, params, strict=True):
        assert torch.equal(e, p.to(e.dtype))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pair", DTYPE_PAIRS, ids=str)
def test_update_in_every_layout(device, pair, layout, form):
    sizes = [n for n in EDGE_SIZES if n > 0]
    # Torch too gets this layout: in bf16 and fp16 its mul_add depends on it.
    expected, params = make_lists(sizes, pair, layout, device)
    for e, p in zip(expected, params, strict=True):
        torch_update_(e, p, 0.3, form)
    ema, params = make_lists(sizes, pair, layout, device)
    fused_ema.Plan(ema, params).update(0.3, form)
    for e, want in zip(ema, expected, strict=True):
        assert_bits_equal(e, want, f"{layout}, {e.numel()} elements")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pair", DTYPE_PAIRS, ids=str)
def test_update_against_float64(backend, device, pair, form):
    for momentum in (1e-6, 2e-4, 0.1, 0.7, 0.999):
        ema, params = make_lists((1, 17, 4097, 100_003), pair, device=device, seed=5)
        before = [e.clone() for e in ema]
        fused_ema.update_(ema, params, momentum, form)
        for e, was, p in zip(ema, before, params, strict=True):
            error = (e.double() - reference_update(was, p, momentum)).abs()
            assert (error <= update_tolerance(was, p, momentum, form)).all(), f"m={momentum}"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pair", DTYPE_PAIRS, ids=str)
def test_special_values_equal_torch(backend, device, pair, form):
    values = torch.tensor(SPECIALS, dtype=torch.float64)
    for momentum in MOMENTA:
        # Every special value against every other, at each position of a vector and in the tail.
        ema = values.repeat_interleave(len(SPECIALS)).repeat(3)[:-5].to(pair[0]).to(device)
        params = values.repeat(len(SPECIALS)).repeat(3)[:-5].to(pair[1]).to(device)
        expected = torch_update(ema, params, momentum, form)
        fused_ema.update_([ema], [params], momentum, form)
        assert_bits_equal(ema, expected, f"m={momentum}")


def test_forms_differ_on_an_infinite_ema(backend):
    for form, check in (("lerp", math.isnan), ("mul_add", math.isinf)):
        ema = [torch.tensor([math.inf])]
        fused_ema.update_(ema, [torch.tensor([1.0])], 0.1, form)
        assert check(ema[0].item())


def test_lerp_leaves_an_equal_param_alone(backend):
    value = torch.randn(1000)
    for momentum in MOMENTA:
        ema = [value.clone()]
        fused_ema.update_(ema, [value.clone()], momentum)
        assert_bits_equal(ema[0], value)


@pytest.mark.parametrize("pair", DTYPE_PAIRS, ids=str)
def test_many_updates_equal_the_loop(backend, pair):
    ema, params = make_lists((3, 64, 1000), pair, seed=3)
    loop = [e.clone() for e in ema]
    plan = fused_ema.Plan(ema, params)
    for step in range(50):
        for p in params:
            p.mul_(0.9).add_(0.01 * step)
        plan.update(0.05, "mul_add")
        for e, p in zip(loop, params, strict=True):
            e.mul_(1 - 0.05).add_(p, alpha=0.05)
    for e, want in zip(ema, loop, strict=True):
        assert_bits_equal(e, want)


def all_bit_patterns(dtype):
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    if dtype in (torch.float16, torch.bfloat16):
        return patterns.view(dtype).clone()
    seeds = torch.randint(-(2**62), 2**62, (65_536,), dtype=torch.int64)
    return seeds.view(dtype)[:65_536].clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_swap_and_copy_keep_every_bit(backend, device, dtype):
    a = all_bit_patterns(dtype).to(device)
    b = all_bit_patterns(dtype).flip(0).contiguous().to(device)
    was_a, was_b = bits_of(a).clone(), bits_of(b).clone()
    fused_ema.swap_([a], [b])
    assert torch.equal(bits_of(a), was_b)
    assert torch.equal(bits_of(b), was_a)
    fused_ema.copy_([a], [b])
    assert torch.equal(bits_of(a), was_a)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pair", DTYPE_PAIRS, ids=str)
def test_swap_and_copy_in_every_layout(device, pair, layout):
    sizes = [n for n in EDGE_SIZES if n > 0]
    ema, params = make_lists(sizes, pair, layout, device)
    was = [(e.clone(), p.clone()) for e, p in zip(ema, params, strict=True)]
    plan = fused_ema.Plan(ema, params)

    plan.swap()
    for e, p, (e0, p0) in zip(ema, params, was, strict=True):
        assert_bits_equal(e, p0.to(e.dtype), "the ema after swap")
        assert_bits_equal(p, e0.to(p.dtype), "the param after swap")

    for e, (e0, _) in zip(ema, was, strict=True):
        e.copy_(e0)
    plan.copy_to_params()
    for e, p, (e0, _) in zip(ema, params, was, strict=True):
        assert_bits_equal(p, e0.to(p.dtype), "the param after copy_to_params")
        assert_bits_equal(e, e0, "the ema after copy_to_params")

    for p, (_, p0) in zip(params, was, strict=True):
        p.copy_(p0)
    plan.copy_to_ema()
    for e, p, (_, p0) in zip(ema, params, was, strict=True):
        assert_bits_equal(e, p0.to(e.dtype), "the ema after copy_to_ema")
        assert_bits_equal(p, p0, "the param after copy_to_ema")


@pytest.mark.parametrize("layout", ["contiguous", "each misaligned", "param misaligned"])
@pytest.mark.parametrize("pair", DTYPE_PAIRS, ids=str)
def test_copies_larger_than_the_caches(pair, layout):
    # From 64 MB on (kStreamingBytes) the CPU kernels write past the caches, in aligned vectors.
    ema, params = make_lists((1, 2, 3, 17, 63, 1001), pair, layout)
    make_ema, make_param = LAYOUTS[layout]
    large = torch.arange(2**26 // min(pair[0].itemsize, pair[1].itemsize), dtype=torch.float32)
    ema.append(make_ema(large.to(pair[0])))
    params.append(make_param(large.neg().to(pair[1])))
    wanted = [p.to(e.dtype) for e, p in zip(ema, params, strict=True)]
    plan = fused_ema.Plan(ema, params)
    plan.copy_to_ema()
    for e, want in zip(ema, wanted, strict=True):
        assert_bits_equal(e, want)
    for e in ema:
        e.add_(1.7)
    plan.copy_to_params()
    for e, p in zip(ema, params, strict=True):
        assert_bits_equal(p, e.to(p.dtype))


@pytest.mark.parametrize("wide_first", [True, False])
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_swap_and_copy_take_either_order(backend, device, narrow, wide_first):
    a, b = make_lists((5, 1000, 8193), (torch.float32, narrow), device=device)
    if not wide_first:
        a, b = b, a
    was_a, was_b = [t.clone() for t in a], [t.clone() for t in b]
    fused_ema.copy_(a, b)
    for x, y in zip(a, was_b, strict=True):
        assert_bits_equal(x, y.to(x.dtype))
    for x, y in zip(a, was_a, strict=True):
        x.copy_(y)
    fused_ema.swap_(a, b)
    for x, y, x0, y0 in zip(a, b, was_a, was_b, strict=True):
        assert_bits_equal(x, y0.to(x.dtype))
        assert_bits_equal(y, x0.to(y.dtype))


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_rounding_to_narrow_dtypes_equals_torch_everywhere(backend, device, narrow):
    # Every value of the narrow dtype, the float32 values beside it and the ties between.
    exact = all_bit_patterns(narrow).float()
    bits = exact.view(torch.int32)
    near = torch.cat([bits + d for d in (-1, 0, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001)])
    src = near.view(torch.float32).contiguous().to(device)
    dst = torch.empty_like(src, dtype=narrow)
    fused_ema.copy_([dst], [src])
    assert_bits_equal(dst, src.to(narrow))


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mul_add_follows_the_threads_of_torch(dtype, num_threads):
    # Torch rounds the elements outside of its vectors differently, and more threads leave more of
    # them over, from more than 32,768 elements on.
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(num_threads)
        for size in (32_767, 32_768, 32_769, 65_537, 98_305, 131_073, 300_007):
            ema, params = make_lists((size, 5), (dtype, dtype))
            expected = [
                torch_update(e, p, 0.3, "mul_add") for e, p in zip(ema, params, strict=True)
            ]
            fused_ema.update_(ema, params, 0.3, "mul_add")
            for e, want in zip(ema, expected, strict=True):
                assert_bits_equal(e, want, f"{size} elements")
    finally:
        torch.set_num_threads(before)


def test_mixed_lists_in_one_call(backend, device):
    ema, params = [], []
    for index, pair in enumerate(DTYPE_PAIRS):
        for layout in LAYOUTS:
            e, p = make_lists((7, 300), pair, layout, device, seed=index)
            ema += e
            params += p
    expected = [torch_update(e, p, 0.2, "lerp") for e, p in zip(ema, params, strict=True)]
    fused_ema.update_(ema, params, 0.2)
    for e, want in zip(ema, expected, strict=True):
        assert_bits_equal(e, want)


def test_ten_thousand_tensors(backend, device):
    sizes = [(i * 7) % 131 for i in range(10_000)]
    flat_e, flat_p = torch.randn(sum(sizes), device=device), torch.randn(sum(sizes), device=device)
    ema = [t.clone() for t in flat_e.split(sizes)]
    params = [t.clone() for t in flat_p.split(sizes)]
    fused_ema.update_(ema, params, 0.25)
    assert_bits_equal(torch.cat(ema), flat_e.lerp(flat_p, 0.25))


def test_momentum_as_a_tensor(backend, device):
    for form in FORMS:
        ema, params = make_lists((5, 5000), (torch.float32, torch.float32), device=device)
        expected = [e.clone() for e in ema]
        fused_ema.update_(expected, params, 0.125, form)
        momentum = torch.tensor(0.125, dtype=torch.float64, device=device)
        fused_ema.update_(ema, params, momentum, form)
        for e, want in zip(ema, expected, strict=True):
            assert_bits_equal(e, want)


def test_parameters_that_require_grad(backend):
    layer = torch.nn.Linear(40, 30)
    params = list(layer.parameters())
    ema = [torch.nn.Parameter(torch.zeros_like(p)) for p in params]
    fused_ema.update_(ema, params, 0.5)
    fused_ema.swap_(ema, params)
    for e, p in zip(ema, params, strict=True):
        assert torch.equal(e * 0.5, p)
        assert p.requires_grad
        assert p.grad_fn is None


def test_writes_bump_version_counters(backend):
    ema, params = make_lists((4, 5), (torch.float32, torch.float32))
    ema.append(torch.zeros(6).view(2, 3))
    params.append(torch.ones(2, 3))

    def versions():
        return [t._version for t in ema], [t._version for t in params]

    def bumped(run, *, wants_ema, wants_params):
        old_ema, old_params = versions()
        run()
        new_ema, new_params = versions()
        assert [n > o for n, o in zip(new_ema, old_ema, strict=True)] == [wants_ema] * 3
        assert [n > o for n, o in zip(new_params, old_params, strict=True)] == [wants_params] * 3

    bumped(lambda: fused_ema.update_(ema, params, 0.1), wants_ema=True, wants_params=False)
    bumped(lambda: fused_ema.swap_(ema, params), wants_ema=True, wants_params=True)
    bumped(lambda: fused_ema.copy_(ema, params), wants_ema=True, wants_params=False)
    plan = fused_ema.Plan(ema, params)
    bumped(lambda: plan.update(0.1), wants_ema=True, wants_params=False)
    bumped(plan.copy_to_params, wants_ema=False, wants_params=True)


def test_a_write_makes_backward_fail_rather_than_be_wrong(backend):
    param = torch.nn.Parameter(torch.ones(3))
    loss = (param**2).sum()
    fused_ema.swap_([torch.zeros(3)], [param])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_lazily_copied_tensors_stay_apart():
    original = torch.ones(100)
    lazy = torch._lazy_clone(original)
    fused_ema.update_([lazy], [torch.zeros(100)], 0.5)
    assert torch.equal(original, torch.ones(100))
    assert torch.equal(lazy, torch.full((100,), 0.5))
    params = [torch.zeros(100)]
    plan = fused_ema.Plan([original], params)
    kept = torch._lazy_clone(original)
    plan.update(0.5)
    assert torch.equal(kept, torch.ones(100))
    assert torch.equal(original, torch.full((100,), 0.5))


def test_a_tensor_of_more_than_2_31_elements():
    n = 2**31 + 17
    ema, param = torch.zeros(n, dtype=torch.bfloat16), torch.ones(n, dtype=torch.bfloat16)
    fused_ema.Plan([ema], [param]).update(0.5)
    assert ema[-17:].eq(0.5).all()
    assert ema[2**31 - 1 :: 2**29].eq(0.5).all()
    assert ema[: 2**20].eq(0.5).all()


@pytest.mark.parametrize("backend", ["native", "foreach"], indirect=True)
@pytest.mark.parametrize("form", ["lerp", "mul_add"])
def test_views_that_are_negated_when_they_are_read(backend, form):
    ema = torch.randn(5, dtype=torch.complex64).conj().imag
    param = torch.randn(5)
    assert ema.is_neg()
    expected = ema.clone()
    if form == "lerp":
        expected.lerp_(param, 0.25)
    else:
        expected.mul_(0.75).add_(param, alpha=0.25)
    fused_ema.update_([ema], [param], 0.25, form)
    assert torch.equal(ema, expected)
    fused_ema.Plan([ema], [param]).copy_to_params()
    assert torch.equal(param, expected)
    fused_ema.copy_([ema], [torch.ones(5)])
    assert torch.equal(ema, torch.ones(5))
