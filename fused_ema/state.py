"""Averages in files: the state of a manager, and the checkpoints of other frameworks.

:func:`read` finds the average in a file of any known format, :func:`load_into` lets a manager go on
from it, and :func:`write` writes one of the formats: :mod:`fused_ema.formats`. :func:`pack` and
:func:`unpack` are the state that :meth:`fused_ema.EMAManager.state_dict` returns.
"""

from __future__ import annotations

from fused_ema import _checks, _tracking, formats
from fused_ema._format_errors import FormatError
from fused_ema._state import (
    EMA_DTYPES_KEY,
    EMA_KEY,
    IS_SWAPPED_KEY,
    ITERATION_KEY,
    NUM_UPDATES_KEY,
    RAW_KEY,
    VERSION,
    VERSION_KEY,
    Expected,
    IncompatibleKeys,
    State,
    pack,
    unpack,
)
from fused_ema.formats import Found, read, write
from fused_ema.formats._names import Tensors
from fused_ema.manager import EMAManager

__all__ = [
    "EMA_DTYPES_KEY",
    "EMA_KEY",
    "IS_SWAPPED_KEY",
    "ITERATION_KEY",
    "NUM_UPDATES_KEY",
    "RAW_KEY",
    "VERSION",
    "VERSION_KEY",
    "Expected",
    "Found",
    "IncompatibleKeys",
    "State",
    "load_into",
    "pack",
    "read",
    "unpack",
    "write",
]


def load_into(
    manager: EMAManager,
    found: Found,
    *,
    iteration: int | None = None,
    average: str | None = None,
) -> None:
    """Makes a manager go on from what :func:`read` found: averages, by name, and position.

    The model itself stays as it is; ``model.load_state_dict(found.raw)`` gives it its raw weights.
    Averages of names that the manager was told to leave out aren't used.

    Args:
        manager: Not swapped.
        found: What was found.
        iteration: The iteration that comes next, 0-based, instead of the recorded one.
        average: Of a manager of several averages, the one that goes on from it; the others stay.

    Raises:
        FormatError: A ValueError: names, shapes or dtypes that don't fit, in one error that lists
            them all; or no iteration is known, and the manager's schedule depends on it.
        RuntimeError: The model is swapped, or its parameters were replaced or added.

        Nothing has changed when an error is raised.
    """
    title = "fused_ema.state.load_into"
    interval, begin = manager._interval, manager._begin
    if iteration is not None:
        iteration = _checks.count("state.load_into", "iteration", iteration, 0)
    else:
        iteration = found.iteration
    if iteration is None and found.num_updates is not None:
        iteration = (begin // interval + found.num_updates) * interval if found.num_updates else 0
    if iteration is None:
        index = manager._averages.index("load_state_dict", average)
        if not manager._averages.is_constant(index) or interval > 1 or begin:
            raise FormatError(
                f"{title}: the format '{found.format}' records no iteration, and this manager's "
                "schedule depends on it; pass iteration="
            )
        iteration = 0
    num_updates = found.num_updates
    if num_updates is None:
        num_updates = max(0, iteration // interval - begin // interval)
    ema: Tensors = {}
    for slot in manager._tracked.slots:
        have = [found.ema[m.name] for m in slot.members if m.name in found.ema]
        for member in slot.members:
            if member.name in found.ema:
                ema[member.name] = found.ema[member.name]
            elif have and have[0].shape == member.tensor.shape:
                ema[member.name] = have[0]  # Of tied tensors many files keep one.
    left_out = {m.name for m in _tracking.read(manager._model).members}
    ema.update({n: t for n, t in found.ema.items() if n not in left_out})
    try:
        manager.load_state_dict(pack(iteration, num_updates, ema, {}, False), average=average)
    except ValueError as error:
        _, _, problems = str(error).partition("was changed:")
        raise FormatError(
            f"{title}: the averages of '{found.format}' don't fit this model; nothing was changed:"
            f"{problems or error}"
        ) from error


formats.load_into = load_into
