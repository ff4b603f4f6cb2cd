"""Memory for many tensors at once, and moving values whatever their dtype."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from fused_ema import ops
from fused_ema._foreach import DTYPE_PAIRS, EXCHANGE_PAIRS, is_dense
from fused_ema._tracking import has_plain_memory

# Each tensor starts on a boundary of this many bytes: a cache line of a GPU, and any vector.
_ALIGNMENT_BYTES = 128


def allocate(
    like: Sequence[Tensor], dtypes: Sequence[torch.dtype], devices: Sequence[torch.device]
) -> list[Tensor]:
    """Makes a tensor for each of ``like``, all of a dtype and device in one allocation.

    Args:
        like: Shapes, and strides where they are dense; one with gaps gets strides without them.
            One without memory of its own (a DTensor) gets an allocation of its own.
        dtypes: The dtype of each.
        devices: The device of each.

    Returns:
        Tensors with arbitrary values.
    """
    sizes: dict[tuple[torch.dtype, torch.device], int] = {}
    offsets = []
    for tensor, dtype, device in zip(like, dtypes, devices, strict=True):
        step = _ALIGNMENT_BYTES // dtype.itemsize
        offsets.append(sizes.setdefault((dtype, device), 0))
        if has_plain_memory(tensor):
            sizes[dtype, device] += math.ceil(tensor.numel() / step) * step
    with torch.inference_mode(False):  # Tensors made in it could never be written outside of it.
        flat = {
            (dtype, device): torch.empty(size, dtype=dtype, device=device)
            for (dtype, device), size in sizes.items()
        }
    made = []
    for tensor, dtype, device, offset in zip(like, dtypes, devices, offsets, strict=True):
        if has_plain_memory(tensor):
            view = flat[dtype, device].as_strided(tensor.shape, _dense_strides(tensor), offset)
        else:
            view = torch.empty_like(tensor.detach(), dtype=dtype, device=device)
        made.append(view)
    return made


def _dense_strides(tensor: Tensor) -> tuple[int, ...]:
    if is_dense(tensor):
        return tensor.stride()
    return torch.empty_like(tensor, device="meta").stride()


# A swap moves bits, so any dtype passes as the floating-point one of its width.
_SAME_WIDTH = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}
_FLOATS = frozenset(chain.from_iterable(DTYPE_PAIRS))


def exchange(a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
    """Exchanges pairs of one dtype, whatever dtype that is, without temporary memory."""
    wide_a, wide_b, narrow = [], [], []
    for x, y in zip(a, b, strict=True):
        if x.element_size() > 1:
            wide_a.append(_as_floats(x))
            wide_b.append(_as_floats(y))
        else:
            narrow.append((x.detach().view(torch.uint8), y.detach().view(torch.uint8)))
    ops.swap_(wide_a, wide_b)
    for x, y in narrow:  # Bool and the 8-bit dtypes have no kernel: masks and the like, seldom.
        x.bitwise_xor_(y)
        y.bitwise_xor_(x)
        x.bitwise_xor_(y)


def _as_floats(tensor: Tensor) -> Tensor:
    if tensor.dtype in _FLOATS:
        return tensor
    if tensor.is_complex():
        return _as_floats(torch.view_as_real(tensor.detach()))
    return tensor.detach().view(_SAME_WIDTH[tensor.element_size()])


@torch.no_grad()
def copy(dst: Sequence[Tensor], src: Sequence[Tensor]) -> None:
    """Copies pairs of any dtypes and devices."""
    fast_dst, fast_src = [], []
    for d, s in zip(dst, src, strict=True):
        if d.device == s.device and (d.dtype, s.dtype) in EXCHANGE_PAIRS:
            fast_dst.append(d)
            fast_src.append(s)
        else:
            d.copy_(s)
    ops.copy_(fast_dst, fast_src)
