"""What tests of averages need: a float64 reference, edge sizes, layouts, comparison by bits.

For this project's tests and benchmark, and for yours. Nothing here is fast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fused_ema._foreach import DTYPE_PAIRS, dtype_name

__all__ = [
    "DTYPE_PAIRS",
    "EDGE_SIZES",
    "LAYOUTS",
    "ROUNDINGS",
    "assert_bits_equal",
    "bits_of",
    "dtype_name",
    "make_lists",
    "random_values",
    "reference_update",
    "update_tolerance",
]

EDGE_SIZES: tuple[int, ...] = (
    *(0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257),
    *(511, 512, 513, 1023, 1024, 1025, 2047, 2048, 2049, 4095, 4096, 4097, 8191, 8192, 8193),
    *(12345, 100_003),
)
"""Element counts around every vector, warp tile, block tile and unrolled loop."""

ROUNDINGS: dict[torch.dtype, float] = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
}
"""Half a unit in the last place, relative: the largest relative error of one rounding."""


def reference_update(ema: Tensor, param: Tensor, momentum: float) -> Tensor:
    """``(1 - m) * ema + m * param`` in float64, as a new float64 tensor of the ema's shape."""
    return (1.0 - momentum) * ema.double() + momentum * param.double()


def update_tolerance(ema: Tensor, param: Tensor, momentum: float, form: str = "lerp") -> Tensor:
    """The largest error that rounding explains, elementwise, in float64.

    One rounding of the result in the ema's dtype, and up to three of intermediate values in the
    arithmetic's dtype (for ``mul_add`` in a narrow dtype: in the ema's; for ``two_products`` in
    the tensors' own); each relative to the largest term. Subnormal results add half of the smallest
    step.
    """
    step = ROUNDINGS[ema.dtype]
    size = ema.double().abs() + param.double().abs()
    smallest = torch.finfo(ema.dtype).smallest_normal * torch.finfo(ema.dtype).eps
    # alpha = m itself is rounded to a narrow ema's dtype by mul_add: one more rounding of m * p.
    rounded_to = ema.dtype
    if form == "two_products":
        rounded_to = param.dtype
        smallest += torch.finfo(param.dtype).smallest_normal * torch.finfo(param.dtype).eps
    added = momentum * param.double().abs() * ROUNDINGS[rounded_to]
    return size * step * 4 + smallest * 2 + added


def bits_of(tensor: Tensor) -> Tensor:
    """The tensor's bits as integers of the same width, contiguous."""
    dtypes = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(dtypes[tensor.element_size()])


def assert_bits_equal(actual: Tensor, expected: Tensor, what: str = "tensors") -> None:
    """Raises AssertionError at the first element whose bits differ; any two NaNs are equal.

    Args:
        actual: Any floating-point tensor.
        expected: The same shape, dtype and device.
        what: Named in the message.
    """
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} against {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: {actual.shape} against {expected.shape}"
    if torch.equal(bits_of(actual), bits_of(expected)):
        return
    differs = bits_of(actual) != bits_of(expected)
    differs &= ~(actual.contiguous().isnan() & expected.contiguous().isnan())
    if bool(differs.any()):
        first = int(differs.flatten().nonzero()[0])
        raise AssertionError(
            f"{what}: {int(differs.sum())} of {actual.numel()} elements differ, the first at flat "
            f"index {first}: {actual.flatten()[first].item()!r} against "
            f"{expected.flatten()[first].item()!r}"
        )


def random_values(
    size: int, dtype: torch.dtype, seed: int, device: str | torch.device = "cpu"
) -> Tensor:
    """Normal values over many magnitudes, with zeros, subnormals and both signs among them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(size, generator=generator, dtype=torch.float64)
    values *= 10.0 ** torch.randint(-3, 3, (size,), generator=generator).double()
    values[3::17] = 0.0
    values[5::29] = -0.0
    values[7::31] = torch.finfo(dtype).smallest_normal / 4
    return values.to(dtype).to(device)


def _plain(values: Tensor) -> Tensor:
    return values.clone()


def _offset(values: Tensor) -> Tensor:
    room = torch.empty(values.numel() + 3, dtype=values.dtype, device=values.device)
    view = room[3:]
    view.copy_(values)
    return view


def _shifted(values: Tensor) -> Tensor:
    room = torch.empty(values.numel() + 1, dtype=values.dtype, device=values.device)
    view = room[1:]
    view.copy_(values)
    return view


def _transposed(values: Tensor) -> Tensor:
    rows = next(n for n in (5, 3, 2, 1) if values.numel() % n == 0)
    return values.clone().view(-1, rows).t()


def _channels_last(values: Tensor) -> Tensor:
    channels = next(n for n in (3, 2, 1) if values.numel() % n == 0)
    shaped = values.clone().view(1, channels, -1, 1)
    return shaped.contiguous(memory_format=torch.channels_last)


def _strided(values: Tensor) -> Tensor:
    room = torch.empty(values.numel(), 2, dtype=values.dtype, device=values.device)
    view = room[:, 0]
    view.copy_(values)
    return view


LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "contiguous": (_plain, _plain),
    "both misaligned": (_offset, _offset),
    "param misaligned": (_plain, _shifted),
    "ema misaligned": (_shifted, _plain),
    "each misaligned": (_offset, _shifted),
    "transposed": (_transposed, _transposed),
    "channels_last": (_channels_last, _channels_last),
    "strides differ": (_transposed, lambda v: _transposed(v).contiguous()),
    "with gaps": (_strided, _strided),
    "param with gaps": (_plain, _strided),
}
"""Name to how a flat tensor of values becomes the ema and the param of that layout."""


def make_lists(
    sizes: Sequence[int],
    pair: tuple[torch.dtype, torch.dtype],
    layout: str = "contiguous",
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> tuple[list[Tensor], list[Tensor]]:
    """Lists of emas and params of these element counts, every tensor its own allocation.

    Args:
        sizes: Elements of each tensor.
        pair: The dtypes of ema and param.
        layout: A key of LAYOUTS.
        device: Where the tensors lie.
        seed: Of the values; the params' differ from the emas'.

    Returns:
        The emas and the params.
    """
    make_ema, make_param = LAYOUTS[layout]
    ema, params = [], []
    for index, size in enumerate(sizes):
        ema.append(make_ema(random_values(size, pair[0], seed + 2 * index, device)))
        params.append(make_param(random_values(size, pair[1], seed + 2 * index + 1, device)))
    return ema, params
