"""Who computes, torch's own loop to compare with, and how hypothesis runs."""

from __future__ import annotations

import os
from contextlib import contextmanager

import pytest

from fused_ema import _native

# tests/pretend/ shows what the host does; nothing waits there, and no binary for a GPU runs.
needs_a_real_gpu = pytest.mark.skipif(
    "PRETEND_RUNTIME" in os.environ, reason="needs a GPU that is real"
)


def torch_update_(ema, param, momentum, form):
    """The loop that fused_ema replaces, with the casts that torch needs."""
    if form == "mul_add":
        return ema.mul_(1 - momentum).add_(param, alpha=momentum)
    if form == "two_products":
        return ema.copy_((1 - momentum) * ema + momentum * param)
    return ema.lerp_(param.to(ema.dtype), momentum)


def instruction_sets():
    """Those that this machine has, of all that kernels are built for."""
    if _native.C is None:
        return []
    kept = _native.C.instruction_set()
    names = [name for name in ("avx512", "avx2", "generic") if _native.C.set_instruction_set(name)]
    _native.C.set_instruction_set(kept)
    return names


@contextmanager
def without_kernels():
    """As where nothing was compiled. No fixture: that would serve all examples of a property."""
    kept, _native.C = _native.C, None
    try:
        yield
    finally:
        _native.C = kept


def examples(count, **more):
    """The same examples in every run, nothing kept on disk, and a report within a minute."""
    # Imported here, since the other tests run without it.
    from hypothesis import HealthCheck, Phase, settings

    return settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        print_blob=True,
        # Shrinking a course of events, or twelve tensors, takes many minutes.
        phases=(Phase.explicit, Phase.generate),
        report_multiple_bugs=False,
        suppress_health_check=[HealthCheck.too_slow],
        **more,
    )
