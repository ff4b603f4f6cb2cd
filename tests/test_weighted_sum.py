"""The weighted sum of many tensors: its bits, its bounds, its errors."""

from __future__ import annotations

import shutil
from functools import cache
from itertools import product

import pytest
import torch
from host import weighted_sum as on_host
from runs import instruction_sets
from torch._subclasses import FakeTensorMode

from fused_ema import _native
from fused_ema._weighted_sum import INPUT_DTYPES, weighted_sum_
from fused_ema.testing import assert_bits_equal, random_values

DTYPES = INPUT_DTYPES
OUTS = (torch.float32, torch.float64)
# Around a vector, the eight inputs that go side by side, a tile, and the 128 of one launch.
SIZES = (0, 1, 7, 8, 17, 2047, 4999)
NUMS = (1, 3, 8, 130)


@cache
def pool(dtype):
    return random_values(130 * 5120, dtype, seed=DTYPES.index(dtype))


def values_of(size, num, out_dtype, dtype, offset=0, device="cpu"):
    """An out and some inputs, which begin so many elements after a multiple of 64 bytes."""
    out = pool(out_dtype)[-size - 1 - offset :].to(device)[offset:][:size].clone()
    out = torch.cat([out.new_zeros(offset), out])[offset:]
    there, stride = pool(dtype).to(device), 5120 if size <= 5000 else 128
    inputs = [there[k * stride + offset :][:size] for k in range(num)]
    draw = torch.Generator().manual_seed(num)
    weights = torch.randn(num, generator=draw, dtype=torch.float64).tolist()
    return out, inputs, weights


def is_right(found, out, inputs, weights):
    """Within the bound that weighted_sum_ promises, around a sum in double."""
    values = torch.stack([out.double(), *(x.double() for x in inputs)])
    factors = torch.tensor([1.0, *weights], dtype=torch.float64)
    right, sizes = factors @ values, factors.abs() @ values.abs()
    # The reference rounds as often; the last terms are those of subnormal numbers.
    bound = 2 * (len(inputs) + 1) * (2.0**-53 * sizes + 2.0**-1074)
    if out.dtype == torch.float32:
        bound += -(-len(inputs) // 128) * (2.0**-24 * sizes + 2.0**-150)
    return bool(((found.double() - right).abs() <= bound).all())


def ways():
    """What computes: each instruction set, and torch's functions."""
    return [*instruction_sets(), "torch"]


@pytest.fixture
def computed_by(monkeypatch):
    kept = _native.C and _native.C.instruction_set()

    def choose(way):
        if way == "torch":
            monkeypatch.setattr(_native, "C", None)
        else:
            assert _native.C.set_instruction_set(way)

    yield choose
    monkeypatch.undo()
    if kept:
        _native.C.set_instruction_set(kept)


@pytest.mark.parametrize("way", ways())
def test_against_double(way, computed_by):
    computed_by(way)
    for out_dtype, dtype, offset in product(OUTS, INPUT_DTYPES, (0, 1)):
        for size, num in product(SIZES, NUMS):
            out, inputs, weights = values_of(size, num, out_dtype, dtype, offset)
            was = out.clone()
            weighted_sum_(out, inputs, weights)
            assert is_right(out, was, inputs, weights), (out_dtype, dtype, offset, size, num)


@pytest.mark.skipif(_native.C is None, reason="nothing was compiled")
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_every_instruction_set_gives_the_same_bits(offset, computed_by):
    for out_dtype, dtype, num in product(OUTS, INPUT_DTYPES, (3, 11, 130)):
        results = {}
        for name in instruction_sets():
            computed_by(name)
            out, inputs, weights = values_of(2500, num, out_dtype, dtype, offset)
            weighted_sum_(out, inputs, weights)
            results[name] = out
        for name, found in results.items():
            assert_bits_equal(found, results["generic"], f"{name}, {out_dtype}, {dtype}, {num}")


@pytest.mark.skipif(_native.C is None, reason="nothing was compiled")
def test_threads_give_the_same_bits():
    kept = torch.get_num_threads()
    results = []
    try:
        for way, threads in (("auto", 1), ("torch", 2), ("helpers", 2)):
            torch.set_num_threads(threads)
            assert _native.C.set_sharing(way)
            out, inputs, weights = values_of(300_001, 5, torch.float32, torch.float32)
            weighted_sum_(out, inputs, weights)
            results.append(out)
    finally:
        torch.set_num_threads(kept)
        _native.C.set_sharing("auto")
    for found in results[1:]:
        assert_bits_equal(found, results[0], "out")


def test_no_digit_is_lost_where_large_products_cancel():
    """Coefficients of a narrow average: sizes of hundreds that leave one."""
    inputs = [torch.full((9,), value) for value in (1.0, 1.0 + 2.0**-23, 1.0)]
    out = torch.zeros(9)
    weighted_sum_(out, inputs, [2.0**20, -(2.0**20), 1.0])
    assert out.tolist() == [1.0 - 2.0**-3] * 9


@pytest.mark.parametrize("way", ["native", "torch"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weights": [1.0]}, ValueError, "2 inputs but 1 weights; pass one for each"),
        ({"out": torch.zeros(4, dtype=torch.float16)}, TypeError, "out is float16; it must be"),
        ({"out": torch.zeros(8)[::2]}, TypeError, "out isn't contiguous"),
        ({"out": torch.zeros(3)}, ValueError, r"inputs\[0\] is on cpu with shape \[4\] but out"),
        ({"inputs": [torch.ones(4), torch.ones(4, 2)[:, 0]]}, TypeError, r"\[1\] isn't contig"),
        (
            {"inputs": [torch.ones(4), torch.ones(4).double()]},
            TypeError,
            r"inputs\[1\] is float64; all must be one of .* as inputs\[0\] is float32",
        ),
        ({"inputs": [torch.ones(4).int()] * 2}, TypeError, r"inputs\[0\] is int32; all must"),
    ],
)
def test_what_cant_be_added(change, error, message, way, computed_by):
    if way == "torch":
        computed_by("torch")
    elif _native.C is None:
        pytest.skip("nothing was compiled")
    given = {"out": torch.zeros(4), "inputs": [torch.ones(4)] * 2, "weights": [1.0, 2.0]} | change
    with pytest.raises(error, match=f"fused_ema.weighted_sum_: .*{message}"):
        weighted_sum_(**given)
    assert not given["out"].any()


@pytest.mark.parametrize("way", ["native", "torch"])
def test_out_among_the_inputs(way, computed_by):
    if way == "torch":
        computed_by("torch")
    memory = torch.arange(8.0)
    for inputs in ([memory[:4]], [torch.ones(4), memory[3:7]]):
        with pytest.raises(ValueError, match=rf"out overlaps inputs\[{len(inputs) - 1}\]; write"):
            weighted_sum_(memory[:4], inputs, [1.0] * len(inputs))
    assert memory.tolist() == list(range(8))
    weighted_sum_(memory[:4], [memory[4:]], [2.0])
    assert memory[:4].tolist() == [8, 11, 14, 17]


def test_autograd_sees_the_write():
    out = torch.zeros(4)
    version = out._version
    weighted_sum_(out, [torch.ones(4)], [1.0])
    assert out._version > version
    with torch.inference_mode():
        inference = torch.zeros(4)
        weighted_sum_(inference, [torch.ones(4)], [1.0])
    with pytest.raises(RuntimeError, match="out is an inference tensor"):
        weighted_sum_(inference, [torch.ones(4)], [1.0])
    assert inference.tolist() == [1.0] * 4


def test_tensors_without_memory_are_traced():
    with FakeTensorMode():
        out, inputs = torch.zeros(4), [torch.ones(4)] * 2
        assert torch.ops.fused_ema.weighted_sum_(out, inputs, [0.5, -2.0]) is None


@pytest.mark.cuda
def test_a_device_gives_the_bits_of_the_cpu():
    for out_dtype, dtype, offset in product(OUTS, INPUT_DTYPES, (0, 1)):
        for size, num in product((1, 1025, 70_001), (1, 8, 13, 130)):
            there = values_of(size, num, out_dtype, dtype, offset, "cuda")
            here = values_of(size, num, out_dtype, dtype, offset)
            weighted_sum_(*there)
            weighted_sum_(*here)
            what = f"{out_dtype}, {dtype}, {offset}, {size}, {num}"
            assert_bits_equal(there[0].cpu(), here[0], what)


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler here")
@pytest.mark.skipif(_native.C is None, reason="nothing was compiled")
def test_the_cuda_kernels_code_gives_the_bits_of_the_cpu(tmp_path):
    """On this processor: its grid of three multiprocessors is smaller than the largest size."""
    kernel = on_host.build(tmp_path)
    for out_dtype, dtype, offset in product(OUTS, INPUT_DTYPES, (0, 1)):
        for size, num in product((0, 1, 5, 1025, 30_001), (1, 8, 13, 128)):
            out, inputs, weights = values_of(size, num, out_dtype, dtype, offset)
            around = torch.full((size + 16,), 7.0, dtype=out_dtype)
            there = around[8 + offset : 8 + offset + size].copy_(out)
            kernel(there, inputs, weights)
            weighted_sum_(out, inputs, weights)
            what = f"{out_dtype}, {dtype}, {offset}, {size}, {num}"
            assert_bits_equal(there, out, what)
            outside = torch.cat([around[: 8 + offset], around[8 + offset + size :]])
            assert (outside == 7).all(), what
