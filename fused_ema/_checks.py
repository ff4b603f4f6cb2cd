"""Checks of settings: a value that can be used, or an error that shows the one given.

``where`` is what the error names, without ``fused_ema.``: a class, or a module and function.
"""

from __future__ import annotations

import math
import numbers
import operator
import warnings
from collections.abc import Iterable, Sequence

import torch


def number(where: str, name: str, value: float) -> float:
    """A real number as a float; TypeError otherwise."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"fused_ema.{where}: {name} is a {type(value).__name__}; pass a number")
    return float(value)


def fraction(where: str, name: str, value: float) -> float:
    """A momentum in [0, 1]."""
    checked = number(where, name, value)
    if not 0 <= checked <= 1:  # false for NaN too
        raise ValueError(
            f"fused_ema.{where}: {name} is {value}; it is the weight of the new value and must be "
            "in [0, 1]"
        )
    return checked


def momentum(where: str, value: float, name: str = "momentum") -> float:
    """A constant momentum, between 0 and 1, both excluded."""
    checked = number(where, name, value)
    if not 0 < checked < 1:  # false for NaN too
        way = "momentum_fun=" if name == "momentum" else ""
        raise ValueError(
            f"fused_ema.{where}: {name} is {value}; it is the weight of the new value and must "
            "be between 0 and 1 (1 - decay, where you know it as a decay)"
            + (f"; to copy, {way}fused_ema.schedules.constant(1.0)" if checked == 1 else "")
        )
    return checked


def decay_given(where: str, decay: object) -> str:
    """What is wrong with a decay, and the momentum that it is."""
    value = f"{1 - decay:.12g}" if isinstance(decay, (int, float)) else "1 - decay"
    return (
        f"fused_ema.{where}: there is no decay={decay} here; pass momentum={value}, the weight of "
        "the new value, which is 1 - decay"
    )


def warn_of_decay(where: str, momentum: float, stacklevel: int, name: str = "momentum") -> None:
    """Warns of a constant momentum that averages next to nothing: above 0.5, but for a copy's 1."""
    if 0.5 < momentum < 1:
        warnings.warn(
            f"fused_ema.{where}: {name} is {momentum}, so each update takes {momentum:.4g} of "
            f"the new value and keeps {1 - momentum:.4g} of the average; if it is a decay, pass "
            f"momentum={1 - momentum:.12g}",
            UserWarning,
            stacklevel=stacklevel + 1,
        )


def positive(where: str, name: str, value: float) -> float:
    """A finite number above 0."""
    checked = number(where, name, value)
    if not 0 < checked < math.inf:
        raise ValueError(
            f"fused_ema.{where}: {name} is {value}; it must be a finite number above 0"
        )
    return checked


def count(where: str, name: str, value: int, least: int) -> int:
    """A whole number of at least ``least``."""
    try:
        checked = operator.index(value)
    except TypeError:
        checked = least - 1
    if isinstance(value, bool) or checked < least:
        raise ValueError(
            f"fused_ema.{where}: {name} is {value!r}; it must be a whole number from {least}"
        )
    return checked


def one_element(where: str, name: str, value: torch.Tensor) -> None:
    """TypeError of anything but a tensor of one element."""
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        of = f" of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else ""
        raise TypeError(
            f"fused_ema.{where}: {name} is a {type(value).__name__}{of}; pass a tensor of one "
            "element"
        )


def flag(where: str, name: str, value: torch.Tensor) -> bool:
    """Whether a tensor of one element is anything but zero; TypeError of anything else."""
    one_element(where, name, value)
    return bool(value)


_MOST_LINES = 20


def listed(lines: Sequence[str]) -> list[str]:
    """Lines of an error message; of many, the first and how many more there are."""
    if len(lines) <= _MOST_LINES:
        return list(lines)
    return [*lines[:_MOST_LINES], f"and {len(lines) - _MOST_LINES:,} more"]


def device(where: str, value: torch.device | str) -> torch.device:
    """A device that can hold values, with its index."""
    try:
        checked = torch.empty(0, device=value).device
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"fused_ema.{where}: device is {value!r}: {reason}") from error
    if checked.type == "meta":
        raise ValueError(
            f"fused_ema.{where}: device is {value!r}, which holds no values; choose 'cpu' or an "
            "accelerator"
        )
    return checked


def patterns(where: str, name: str, value: str | Sequence[str]) -> tuple[str, ...]:
    """One string or several, as a tuple."""
    if not isinstance(value, Iterable):
        raise TypeError(
            f"fused_ema.{where}: {name} is a {type(value).__name__}; pass a pattern, or a list of "
            "them"
        )
    checked = (value,) if isinstance(value, str) else tuple(value)
    for pattern in checked:
        if not isinstance(pattern, str):
            raise TypeError(
                f"fused_ema.{where}: {name} holds a {type(pattern).__name__}; pass patterns as "
                "strings"
            )
    return checked
