"""The competitor written in Triton: its values by the interpreter, its loads by the compiler."""

from __future__ import annotations

import importlib
import re
import sys

import pytest
import torch

from fused_ema.testing import LAYOUTS, make_lists, reference_update, update_tolerance

pytest.importorskip("triton")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
PAIRS = [(F32, F32), (F32, BF16), (F32, F16), (BF16, BF16), (F16, F16)]


@pytest.fixture
def load(monkeypatch):
    """Imports the module, for Triton's interpreter or for its compiler: it is decided then."""

    def load(interpreted):
        monkeypatch.setenv("TRITON_INTERPRET", "1" if interpreted else "0")
        sys.modules.pop("bench.gpu.triton_ema", None)
        return importlib.import_module("bench.gpu.triton_ema")

    yield load
    sys.modules.pop("bench.gpu.triton_ema", None)


def check(module, ema, params, momentum):
    before = [e.clone() for e in ema]
    module.prepare(ema, params, momentum)()
    for e, was, p in zip(ema, before, params, strict=True):
        error = (e.double() - reference_update(was, p, momentum)).abs()
        assert (error <= update_tolerance(was, p, momentum)).all()


def normal_lists(sizes, pair):
    """Without subnormal values, which the interpreter rounds its own way in bf16."""
    return [
        [torch.where(t.abs() < 1e-30, torch.ones_like(t), t) for t in tensors]
        for tensors in make_lists(sizes, pair)
    ]


@pytest.mark.parametrize("momentum", [0.3, 0.8])
@pytest.mark.parametrize("sizes", [(1, 5000, 8192), (64,) * 20 + (3,)], ids=["large", "small"])
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_values(load, pair, sizes, momentum):
    check(load(interpreted=True), *normal_lists(sizes, pair), momentum)


def test_misaligned_tensors(load):
    make_ema, make_param = LAYOUTS["each misaligned"]
    ema, params = normal_lists((5000, 3), (F32, F32))
    check(load(interpreted=True), [make_ema(e) for e in ema], [make_param(p) for p in params], 0.3)


def test_float64_is_refused(load):
    ones = [torch.ones(2, dtype=torch.float64)]
    with pytest.raises(ValueError, match=r"not written for torch\.float64"):
        load(interpreted=True).prepare(ones, ones, 0.5)


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize(("ema", "param", "loads"), [("fp32", "fp32", 8), ("bf16", "bf16", 4)])
def test_full_tiles_move_16_bytes_at_a_time(load, ema, param, loads):
    # Otherwise it would be no competitor.
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    dtypes = {"fp32": tl.float32, "bf16": tl.bfloat16}
    constants = {"ema_dtype": dtypes[ema], "param_dtype": dtypes[param], "tile": 4096}
    constants |= {"aligned": True, "from_param": False}
    source = ASTSource(
        fn=load(interpreted=False).lerp_kernel,
        signature=dict.fromkeys(("ema_addresses", "param_addresses", "sizes"), "*i64")
        | {"momentum": "fp32"}
        | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in range(3)},
    )
    options = {"num_warps": 8}
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) == loads
