"""The weighted sum's CUDA code on this processor, as host_kernels.py does for the others."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import host_kernels

# As csrc/dtype_pairs.h counts them.
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def build(folder: Path) -> Callable[[Tensor, Sequence[Tensor], Sequence[float]], None]:
    """Compiles the kernel, and returns a function that runs it."""
    csrc = host_kernels.CSRC
    sources = [csrc / "cuda" / "weighted_sum.cu", host_kernels.HERE / "weighted_sum.cpp"]
    library = ctypes.CDLL(str(host_kernels.build(folder, sources=sources)))

    def run(out: Tensor, inputs: Sequence[Tensor], weights: Sequence[float]) -> None:
        num = len(inputs)
        status = library.launch_weighted_sum(
            DTYPES.index(out.dtype),
            DTYPES.index(inputs[0].dtype),
            ctypes.c_void_p(out.data_ptr()),
            (ctypes.c_void_p * num)(*(x.data_ptr() for x in inputs)),
            (ctypes.c_double * num)(*weights),
            num,
            ctypes.c_int64(out.numel()),
        )
        assert status == 0

    return run
