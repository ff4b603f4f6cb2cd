"""The state of a manager with a teacher: counters, and beside which teacher it was saved.

- ``version``: of this layout, that of :mod:`fused_ema._state`;
- ``iteration``, ``num_updates``: as there;
- ``into``: a sentence, that the averages are saved where the teacher is;
- ``checksums``: the student's name to the sum of its average's bits, None of a DTensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_ema import _checks, _shards
from fused_ema._state import ITERATION_KEY, NUM_UPDATES_KEY, VERSION, VERSION_KEY

STATE_KEY = "into"
CHECKSUMS_KEY = "checksums"
_SAID = "the averages are the teacher's own tensors, saved where the teacher is"
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def is_state(state: object) -> bool:
    """Whether it is the state of a manager with a teacher."""
    return isinstance(state, Mapping) and isinstance(state.get(STATE_KEY), str)


def pack(iteration: int, num_updates: int, emas: Mapping[str, Tensor]) -> dict[str, Any]:
    """The state, as a dictionary."""
    return {
        VERSION_KEY: VERSION,
        ITERATION_KEY: iteration,
        NUM_UPDATES_KEY: num_updates,
        STATE_KEY: _SAID,
        CHECKSUMS_KEY: checksums(emas),
    }


@dataclass(frozen=True)
class Counters:
    """A state that was checked."""

    iteration: int
    num_updates: int
    missing: list[str]
    unexpected: list[str]


def unpack(
    title: str,
    state: Mapping[str, Any],
    emas: Mapping[str, Tensor] | None,
    strict: bool,
) -> Counters:
    """Checks a state against the teacher that there is now.

    Args:
        title: For errors.
        state: What :func:`pack` made.
        emas: Name to average; None of a manager without a teacher.
        strict: Whether names and values must be those of then.

    Raises:
        ValueError: It doesn't fit.
    """
    if emas is None:
        raise ValueError(
            f"{title}: this is the state of a manager with into=, without averages: {_SAID}; make "
            "the manager with into=teacher, or start="
        )
    problems = [
        f"'{key}' is {state.get(key)!r}, not a whole number from {least}"
        for key, least in ((VERSION_KEY, 1), (ITERATION_KEY, 0), (NUM_UPDATES_KEY, 0))
        if type(state.get(key)) is not int or state[key] < least
    ]
    then = state.get(CHECKSUMS_KEY)
    if not isinstance(then, Mapping):
        problems.append(f"'{CHECKSUMS_KEY}' is a {type(then).__name__}, not a dictionary")
    if not problems and state[VERSION_KEY] > VERSION:
        problems.append(f"it has version {state[VERSION_KEY]} and this fused_ema reads {VERSION}")
    if problems or not isinstance(then, Mapping):
        raise ValueError(f"{title}: this is no sound state: {'; '.join(problems)}")
    now = checksums(emas)
    missing = [name for name in now if name not in then]
    unexpected = [name for name in then if name not in now]
    if strict:
        problems = [f"'{name}' isn't in the state" for name in missing]
        problems += [f"'{name}' is in the state alone" for name in unexpected]
        shared = [name for name in now if None not in (now[name], then.get(name))]
        other = [name for name in shared if now[name] != then[name]]
        problems += [
            f"'{name}' has other values than it had when the state was saved" for name in other
        ]
    if strict and problems:
        raise ValueError(
            f"{title}: the teacher isn't the one that this state was saved beside; load its own "
            "weights first (they are in its module's checkpoint), or pass strict=False to go on "
            "with what it holds:\n  " + "\n  ".join(_checks.listed(problems))
        )
    return Counters(state[ITERATION_KEY], state[NUM_UPDATES_KEY], missing, unexpected)


@torch.no_grad()
def checksums(named: Mapping[str, Tensor]) -> dict[str, int | None]:
    """Of each tensor the sum of its bits as integers, wherever it is and whatever its strides.

    None of DTensors: their sums would have to be sent, and a state is taken without any message.
    """
    sums: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name, tensor in named.items():
        if not _shards.is_dtensor(tensor):
            values = torch.view_as_real(tensor) if tensor.is_complex() else tensor
            values = values.detach().view(_INTEGERS[values.element_size()])
            sums.setdefault(tensor.device, []).append((name, values.sum(dtype=torch.int64)))
    found: dict[str, int] = {}
    for pairs in sums.values():  # One wait for each device.
        on_host: list[int] = torch.stack([value for _, value in pairs]).tolist()
        found |= {name: value for (name, _), value in zip(pairs, on_host, strict=True)}
    return {name: found.get(name) for name in named}
