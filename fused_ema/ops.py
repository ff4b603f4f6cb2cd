"""The one-shot operations on lists of tensors, and their doors for torch.compile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fused_ema import _caches, _checks, _foreach, _native

Form = Literal["lerp", "mul_add", "two_products"]


def update_(
    ema: Sequence[Tensor] | Sequence[Sequence[Tensor]],
    params: Sequence[Tensor],
    momentum: float | Tensor | Sequence[float],
    form: Form = "lerp",
) -> None:
    """Moves every ema towards its param: ``ema = (1 - momentum) * ema + momentum * param``.

    One launch per device and dtype pair on CUDA for up to about 1,000 tensors, a few for longer
    lists; no host synchronisation. To run on the same lists every step, make a
    :class:`fused_ema.Plan` once: it skips the checks and always needs one launch.

    Args:
        ema: The averages, written in place. A list or tuple; any dense layout.
        params: The new values: same length, and pair by pair the same shape and device. The dtype
            pairs (ema, param) are float32 with float32, bfloat16 or float16, and float64, bfloat16
            and float16 each with itself.
            ``ema`` may be several such lists, for several averages of the same params.
        momentum: The weight of the new value, in [0, 1]; of several averages a list of them. A
            0-dim float64 tensor on the lists' device, of several averages a 1-dim one of as many
            elements, is read by the kernel when it runs, so a captured CUDA graph replays with the
            value that the tensor then holds; its range is not checked. Read there, 0 writes nothing
            and 1 copies, to the last bit.
        form: ``"lerp"`` computes ``ema + m * (param - ema)`` (for m of 0.5 and more ``param -
            (1 - m) * (param - ema)``), bit for bit what ``ema.lerp_(param, m)`` gives.
            ``"mul_add"`` computes ``ema * (1 - m)``, rounded to the ema's dtype, and adds ``m *
            param`` with one FMA: bit for bit ``ema.mul_(1 - m).add_(param, alpha=m)``.
            ``"two_products"`` rounds each product to its own tensor's dtype and then their sum: bit
            for bit ``(1 - m) * ema + m * param``, the formula as it is mostly written.

    Raises:
        TypeError: Not lists of tensors, a dtype pair that is not supported, a sparse tensor.
        ValueError: Lengths, shapes or devices differ; tensors overlap in memory or are expanded; a
            momentum outside of [0, 1]; an unknown form.
        RuntimeError: The ema is an inference tensor and inference mode is off.

        Nothing has been written when an error is raised.

    Warns:
        UserWarning: Once, of a momentum above 0.5, which most often is a decay.

    Example:
        >>> ema, params = [torch.zeros(3)], [torch.ones(3)]
        >>> fused_ema.update_(ema, params, momentum=0.25)
        >>> ema
        [tensor([0.2500, 0.2500, 0.2500])]
    """
    is_compiling = torch.compiler.is_compiling()
    if isinstance(momentum, float) and 0.5 < momentum < 1 and not is_compiling and not _warned:
        _warned.append(True)
        _checks.warn_of_decay("update_", momentum, stacklevel=2)
    _update(ema, params, momentum, form)


_warned: list[bool] = []


def _update(ema: Any, params: Sequence[Tensor], momentum: Any, form: Form = "lerp") -> None:
    """The same without a warning: of a schedule's momentum."""
    if _foreach.are_lists(ema):
        _update_several(ema, params, momentum, form)
    elif torch.compiler.is_compiling():
        if isinstance(momentum, Tensor):
            torch.ops.fused_ema.update_.tensor(ema, params, momentum, form)
        else:
            torch.ops.fused_ema.update_.default(ema, params, momentum, form)
    elif _native.C is not None:
        if not isinstance(form, str):  # Of which pybind11's error would show all of the lists.
            _foreach.check_form("update_", form)
        _native.C.update_(ema, params, momentum, form)
    else:
        momentum = _foreach.check_momentum("update_", momentum)
        _foreach.check_form("update_", form)
        _foreach.check_lists("update_", ema, params)
        _foreach.update(ema, params, momentum, form)


def _update_several(
    emas: Sequence[Sequence[Tensor]],
    params: Sequence[Tensor],
    momenta: Sequence[float] | Tensor,
    form: Form,
) -> None:
    if torch.compiler.is_compiling():
        flat = [tensor for ema in emas for tensor in ema]
        if isinstance(momenta, Tensor):
            torch.ops.fused_ema.update_averages_.tensor(flat, params, momenta, form)
        else:
            torch.ops.fused_ema.update_averages_.default(flat, params, momenta, form)
    elif _native.C is not None:
        if not isinstance(form, str):
            _foreach.check_form("update_", form)
        _native.C.update_averages_(emas, params, momenta, form)
    else:
        checked = _foreach.check_momenta("update_", momenta, len(emas))
        _foreach.check_form("update_", form)
        _foreach.check_several("update_", emas, params)
        for ema, momentum in zip(emas, checked, strict=True):
            _foreach.update(ema, params, momentum, form)


def _update_flat(
    ema: Sequence[Tensor], params: Sequence[Tensor], momenta: Any, form: Form = "lerp"
) -> None:
    # As the dispatcher has several averages: one list after the other.
    size = len(params)
    emas = [ema[k * size : (k + 1) * size] for k in range(len(momenta))]
    _update_several(emas, params, momenta, form)


def swap_(a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
    """Exchanges the values of every pair in place, without temporary memory.

    Tensors of the same dtype exchange their bits, NaN payloads included. Where the dtypes differ
    each side is rounded to the other's: exchanging a float32 ema with bfloat16 params and back
    loses the ema's lower bits.

    Args:
        a: A list or tuple of tensors; any dense layout.
        b: The same length, and pair by pair the same shape and device; a dtype pair of
            :func:`update_`, in either order.

    Raises:
        TypeError: As :func:`update_`.
        ValueError: As :func:`update_`.
        RuntimeError: As :func:`update_`, for either side.
    """
    if torch.compiler.is_compiling():
        torch.ops.fused_ema.swap_(a, b)
        return
    if _native.C is not None:
        _native.C.swap_(a, b)
    else:
        _foreach.check_lists("swap_", a, b)
        _foreach.swap(a, b)
    _caches.drop()


def copy_(dst: Sequence[Tensor], src: Sequence[Tensor]) -> None:
    """Copies every ``src`` into its ``dst``, rounding to nearest even where the dtypes differ.

    Args:
        dst: Written in place. A list or tuple of tensors; any dense layout.
        src: The same length, and pair by pair the same shape and device; a dtype pair of
            :func:`update_`, in either order.

    Raises:
        TypeError: As :func:`update_`.
        ValueError: As :func:`update_`.
        RuntimeError: As :func:`update_`.
    """
    if torch.compiler.is_compiling():
        torch.ops.fused_ema.copy_(dst, src)
        return
    if _native.C is not None:
        _native.C.copy_(dst, src)
    else:
        _foreach.check_lists("copy_", dst, src)
        _foreach.copy(dst, src)
    _caches.drop()


def _define_without_native() -> torch.library.Library:
    """The schemas of csrc/bindings.cpp, on torch's functions, so that compiled code runs too."""
    library = torch.library.Library("fused_ema", "DEF")
    update = "(Tensor(a!)[] ema, Tensor[] params, {} momentum, str form='lerp') -> ()"
    library.define("update_" + update.format("float"))
    library.define("update_.tensor" + update.format("Tensor"))
    several = "(Tensor(a!)[] ema, Tensor[] params, {} momenta, str form='lerp') -> ()"
    library.define("update_averages_" + several.format("float[]"))
    library.define("update_averages_.tensor" + several.format("Tensor"))
    library.define("swap_(Tensor(a!)[] a, Tensor(b!)[] b) -> ()")
    library.define("copy_(Tensor(a!)[] dst, Tensor[] src) -> ()")
    for name, function in (
        ("update_", _update),
        ("update_.tensor", _update),
        ("update_averages_", _update_flat),
        ("update_averages_.tensor", _update_flat),
        ("swap_", swap_),
        ("copy_", copy_),
    ):
        library.impl(name, function, "CompositeExplicitAutograd")
    return library


_library = _define_without_native() if _native.C is None else None


def _fake(*args: object, **kwargs: object) -> None:
    """The operations return nothing and make no tensor: on fake tensors there is nothing to do."""


for _name in (
    *("update_", "update_.tensor", "update_averages_", "update_averages_.tensor"),
    *("swap_", "copy_"),
):
    torch.library.register_fake(f"fused_ema::{_name}", _fake)
