"""An ema_dtype update hand-written in Triton, to compare with.

As a good user of Triton would write it: one launch for a whole list, from device tables of
addresses that are made once; full tiles without bounds checks; and hints where all addresses are
aligned, without which Triton loads element by element through a pointer that came from memory.
Arithmetic is that of ``ema.lerp_``. It checks nothing, and follows no tensor that moves.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements: 16 a thread in a large tile of 8 warps. Lists of small tensors take the power of two
# that holds the longest, up to a warp's work.
_LARGE_TILE = 4096
_SMALL_TILES = (64, 512)
_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@triton.jit  # type: ignore[untyped-decorator]
def lerp_kernel(  # type: ignore[no-untyped-def]
    ema_addresses,
    param_addresses,
    sizes,
    momentum,
    ema_dtype: tl.constexpr,
    param_dtype: tl.constexpr,
    tile: tl.constexpr,
    aligned: tl.constexpr,
    from_param: tl.constexpr,
):
    """A program a tile: `sizes[i]` elements, at most tile, at each of the two addresses i."""
    i = tl.program_id(0)
    size = tl.load(sizes + i)
    ema = tl.load(ema_addresses + i).to(tl.pointer_type(ema_dtype))
    param = tl.load(param_addresses + i).to(tl.pointer_type(param_dtype))
    if aligned:
        ema = tl.multiple_of(ema, 16)
        param = tl.multiple_of(param, 16)
    at = tl.arange(0, tile)
    if size == tile:
        e = tl.load(ema + at).to(tl.float32)
        p = tl.load(param + at).to(tl.float32)
        new = p - (1 - momentum) * (p - e) if from_param else e + momentum * (p - e)
        tl.store(ema + at, new.to(ema_dtype))
    else:
        inside = at < size
        e = tl.load(ema + at, mask=inside).to(tl.float32)
        p = tl.load(param + at, mask=inside).to(tl.float32)
        new = p - (1 - momentum) * (p - e) if from_param else e + momentum * (p - e)
        tl.store(ema + at, new.to(ema_dtype), mask=inside)


def prepare(ema: list[Tensor], params: list[Tensor], momentum: float) -> Callable[[], Any]:
    """A call that updates these lists, of one dtype each and dense, on their device.

    Raises:
        ValueError: float64, for which Triton's scalar arguments of 32 bits are too short.
    """
    if ema[0].dtype not in _DTYPES:
        raise ValueError(f"not written for {ema[0].dtype}")
    sizes = [tensor.numel() for tensor in ema]
    is_large = sum(sizes) >= _LARGE_TILE * len(sizes)
    least, most = _SMALL_TILES
    tile = _LARGE_TILE if is_large else triton.next_power_of_2(max(least, min(most, max(sizes))))
    rows = [
        (
            e.data_ptr() + begin * e.itemsize,
            p.data_ptr() + begin * p.itemsize,
            min(tile, e.numel() - begin),
        )
        for e, p in zip(ema, params, strict=True)
        for begin in range(0, e.numel(), tile)
    ]
    device = ema[0].device
    tables = [torch.tensor(column, device=device) for column in zip(*rows, strict=True)]
    dtypes = _DTYPES[ema[0].dtype], _DTYPES[params[0].dtype]
    return partial(
        lerp_kernel[(len(rows),)],
        *tables,
        momentum,
        ema_dtype=dtypes[0],
        param_dtype=dtypes[1],
        tile=tile,
        aligned=all(a % 16 == 0 and b % 16 == 0 for a, b, _ in rows),
        from_param=momentum >= 0.5,
        num_warps=8 if is_large else 1,
    )
