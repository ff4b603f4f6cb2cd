"""The weighted sum of tensors: ``out += weights[0] * inputs[0] + ...``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_ema import _native
from fused_ema._foreach import dtype_name

_SCHEMA = "weighted_sum_(Tensor(a!) out, Tensor[] inputs, float[] weights) -> ()"
INPUT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def weighted_sum_(out: Tensor, inputs: Sequence[Tensor], weights: Sequence[float]) -> None:
    """Adds the weighted sum of some tensors to ``out``: each input is read once.

    Computed in double whatever the dtypes, and rounded to ``out`` once for each 128 inputs. So it
    is off by at most ``(K + 1) * 2**-53`` times the sum of the sizes of ``out`` and of all K
    products, and by ``out``'s rounding. The kernels give the same bits on all devices and
    instruction sets.

    Args:
        out: Of any shape; contiguous; float32 or float64.
        inputs: Of that shape and on that device; contiguous; all of one of float32, float64,
            bfloat16 and float16.
        weights: One for each.

    Raises:
        TypeError: Another dtype, or not contiguous.
        ValueError: Another shape, device or number of weights; ``out`` overlaps an input.
        RuntimeError: ``out`` is an inference tensor and inference mode is off.

        Nothing has been written when an error is raised.
    """
    if _native.C is None and not torch.compiler.is_compiling():
        _without_native(out, inputs, weights)
    else:
        torch.ops.fused_ema.weighted_sum_(out, inputs, weights)


def _without_native(out: Tensor, inputs: Sequence[Tensor], weights: Sequence[float]) -> None:
    """With torch's functions; the errors are those of csrc/weighted_sum.cpp."""
    title = "fused_ema.weighted_sum_"
    if len(inputs) != len(weights):
        raise ValueError(
            f"{title}: {len(inputs)} inputs but {len(weights)} weights; pass one for each"
        )
    if out.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{title}: out is {dtype_name(out.dtype)}; it must be float32 or float64")
    if out.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(f"{title}: out is an inference tensor; write to it in inference mode")
    for k, tensor in enumerate((out, *inputs)):
        name = f"inputs[{k - 1}]" if k else "out"
        if not tensor.is_contiguous():
            raise TypeError(
                f"{title}: {name} isn't contiguous, or has no memory of its own; pass a contiguous "
                "copy"
            )
        if tensor.device != out.device or tensor.shape != out.shape:
            raise ValueError(
                f"{title}: {name} is on {tensor.device} with shape {list(tensor.shape)} but out on "
                f"{out.device} with {list(out.shape)}; they must be the same"
            )
        if k and (tensor.dtype not in INPUT_DTYPES or tensor.dtype != inputs[0].dtype):
            raise TypeError(
                f"{title}: {name} is {dtype_name(tensor.dtype)}; all must be one of float32, "
                f"float64, bfloat16 and float16, as inputs[0] is {dtype_name(inputs[0].dtype)}"
            )
        if k and _overlap(out, tensor):
            raise ValueError(f"{title}: out overlaps {name}; write to memory of its own")
    total = out.double() if out.dtype != torch.float64 else out
    for tensor, weight in zip(inputs, weights, strict=True):
        total.add_(tensor, alpha=weight)
    if total is not out:
        out.copy_(total)


def _overlap(a: Tensor, b: Tensor) -> bool:
    (first, end), (other, other_end) = (
        (t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in (a, b)
    )
    return first < other_end and other < end


def _define_without_native() -> torch.library.Library:
    library = torch.library.Library("fused_ema", "FRAGMENT")
    library.define(_SCHEMA)
    library.impl("weighted_sum_", _without_native, "CompositeExplicitAutograd")
    return library


_library = _define_without_native() if _native.C is None else None


def _fake(out: Tensor, inputs: Sequence[Tensor], weights: Sequence[float]) -> None:
    """It returns nothing and makes no tensor."""


torch.library.register_fake("fused_ema::weighted_sum_", _fake)
