"""The state of averages with names: what is in it, and which average of a manager takes which.

Its layout is that of one average, with the version 2: ``ema`` has a dictionary of averages under
each name, and ``is_swapped`` is the name of the one that the model held, or False. What isn't
averaged stands under each name, as the same tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fused_ema import _checks, _state, _tracking
from fused_ema._averages import Averages
from fused_ema._state import (
    EMA_DTYPES_KEY,
    EMA_KEY,
    IS_SWAPPED_KEY,
    NAMED_VERSION,
    RAW_KEY,
    VERSION_KEY,
)

_OP = "load_state_dict"
_TITLE = f"fused_ema.EMAManager.{_OP}"


def pack(
    iteration: int,
    num_updates: int,
    emas: Mapping[str, dict[str, Tensor]],
    raw: dict[str, Tensor],
    is_swapped: bool | str,
) -> dict[str, Any]:
    """A state as a dictionary, of the tensors themselves.

    Args:
        iteration: The one that comes next.
        num_updates: So far.
        emas: Name of an average to its tensors.
        raw: While swapped, the model's own.
        is_swapped: The name of the average that the model holds, or False.
    """
    first = next(iter(emas.values()))
    state = _state.pack(iteration, num_updates, first, raw, bool(is_swapped))
    return state | {VERSION_KEY: NAMED_VERSION, EMA_KEY: dict(emas), IS_SWAPPED_KEY: is_swapped}


def is_named(state: object) -> bool:
    """Whether it is a state of averages with names; any other may be one of an average without."""
    return isinstance(state, Mapping) and state.get(VERSION_KEY) == NAMED_VERSION


def names_in(state: Mapping[str, Any]) -> list[str]:
    """The names of its averages.

    Raises:
        ValueError: It is truncated.
    """
    emas = state.get(EMA_KEY)
    if not isinstance(emas, Mapping) or not emas:
        raise ValueError(f"{_TITLE}: the state has no averages under '{EMA_KEY}' (truncated?)")
    for name, values in emas.items():
        if not isinstance(values, Mapping):
            raise ValueError(
                f"{_TITLE}: '{EMA_KEY}' of the state has a {type(values).__name__} under '{name}', "
                "not a dictionary of averages"
            )
    is_swapped = state.get(IS_SWAPPED_KEY, False)
    if is_swapped is not False and is_swapped not in emas:
        raise ValueError(
            f"{_TITLE}: '{IS_SWAPPED_KEY}' of the state is {is_swapped!r}, neither False nor one "
            f"of its averages, {_tracking.shown(list(emas))}"
        )
    return list(emas)


def one_of(state: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The state of an average by itself, as a manager has it that keeps this one alone."""
    return _alone(state, state[EMA_KEY][name])


def _alone(state: Mapping[str, Any], emas: Mapping[str, Any]) -> dict[str, Any]:
    one = {**state, VERSION_KEY: _state.VERSION, EMA_KEY: emas}
    if IS_SWAPPED_KEY in state:
        one[IS_SWAPPED_KEY] = bool(state[IS_SWAPPED_KEY])
    if isinstance(dtypes := state.get(EMA_DTYPES_KEY), Mapping):
        one[EMA_DTYPES_KEY] = {name: dtypes[name] for name in emas if name in dtypes}
    return one


def chosen(
    state: Any, averages: Averages, average: str | None, strict: bool
) -> tuple[dict[int, Any], list[str]]:
    """What of a state goes into which average of a manager.

    Args:
        state: Of one average, or of several.
        averages: The manager's.
        average: The only one to be loaded, by its name in the manager; None for all.
        strict: False lets names be missing, or be in the state alone.

    Returns:
        The place of each average that is loaded, to a state of one; and the names of what isn't
        used.

    Raises:
        ValueError: The names don't fit.
    """
    own = averages.names
    if not is_named(state):
        if average is None and len(own) > 1:
            raise ValueError(
                f"{_TITLE}: the state has one average, without a name, and the manager keeps "
                f"{_tracking.shown(own)}; say which it is: average="
            )
        return {averages.index(_OP, average): state}, []
    names = names_in(state)
    if average is not None:
        index = averages.index(_OP, average) if averages.is_named else 0
        if average not in names and not (averages.is_named and len(names) == 1):
            raise ValueError(
                f"{_TITLE}: the state has no average '{average}'; it has {_tracking.shown(names)}"
            )
        return {index: one_of(state, average if average in names else names[0])}, []
    if not averages.is_named:
        if len(names) > 1:
            raise ValueError(
                f"{_TITLE}: the state has {len(names)} averages, {_tracking.shown(names)}, and the "
                "manager keeps one; say which: average="
            )
        return {0: one_of(state, names[0])}, []
    missing = [name for name in own if name not in names]
    surplus = [name for name in names if name not in own]
    if strict and (missing or surplus):
        lines = [f"missing in the state: the average '{name}'" for name in missing]
        lines += [f"not in the manager: the average '{name}'" for name in surplus]
        raise ValueError(
            f"{_TITLE}: the state has other averages than the manager; load one with average=, or "
            "what both have with strict=False; nothing was changed:\n  "
            + "\n  ".join(_checks.listed(lines))
        )
    # First what the state has: what isn't averaged is taken from there.
    found = {own.index(name): one_of(state, name) for name in own if name in names}
    found |= {own.index(name): _alone(state, {}) for name in missing}
    return found, [f"{name}.{tensor}" for name in surplus for tensor in state[EMA_KEY][name]]


def held(state: Mapping[str, Any], averages: Averages, loaded: Sequence[int]) -> int:
    """Which of the averages that were loaded the model held when a state was taken."""
    name = state[IS_SWAPPED_KEY]
    if is_named(state) and name in averages.names:
        index = averages.names.index(name)
        return index if index in loaded else loaded[0]
    return loaded[0]


def tensors_of(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The dictionaries of tensors in a state, whatever it is of: of each average, and raw ones."""
    emas = list(state[EMA_KEY].values()) if is_named(state) else [state[EMA_KEY]]
    return [*emas, state[RAW_KEY]]
