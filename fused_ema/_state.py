"""The state of an EMAManager as a dictionary: what is in it, and whether one fits a model.

- ``version``: of this layout, 1;
- ``iteration``: the iteration that comes next;
- ``num_updates``: averaging updates so far;
- ``is_swapped``: whether the model itself held the ema when the state was taken;
- ``ema``: name to the average, in every state;
- ``raw``: name to the model's own values while swapped, else empty;
- ``ema_dtypes``: name to the dtype of the average, as ``"float32"``.

A state of averages with names has the version 2. There ``ema`` is a dictionary of the averages'
names to one such dictionary each, and ``is_swapped`` the name of the average that the model held,
or False.

Names are those of the model without wrappers; a tied tensor stands under each of its names. The
settings of a manager (momentum, interval, ...) are not in its state: a resumed run follows those it
is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_ema import _checks, _shards
from fused_ema._foreach import dtype_name, holds

VERSION = 1
NAMED_VERSION = 2  # fused_ema/_named_state.py

VERSION_KEY = "version"
ITERATION_KEY = "iteration"
NUM_UPDATES_KEY = "num_updates"
IS_SWAPPED_KEY = "is_swapped"
EMA_KEY = "ema"
RAW_KEY = "raw"
EMA_DTYPES_KEY = "ema_dtypes"

_KEYS = (
    *(VERSION_KEY, ITERATION_KEY, NUM_UPDATES_KEY, IS_SWAPPED_KEY),
    *(EMA_KEY, RAW_KEY, EMA_DTYPES_KEY),
)
_TITLE = "fused_ema.EMAManager.load_state_dict"


@dataclass(frozen=True)
class State:
    """A state whose parts have been checked against a model."""

    iteration: int
    num_updates: int
    is_swapped: bool
    ema: Mapping[str, Tensor]
    raw: Mapping[str, Tensor]


class IncompatibleKeys(NamedTuple):
    """What a state that was loaded with ``strict=False`` lacks, and has besides."""

    missing_keys: list[str]
    unexpected_keys: list[str]


@dataclass(frozen=True)
class Expected:
    """What a model's tensor of some name must find in a state.

    Attributes:
        tensor: The model's.
        ema_dtype: Of its average.
        param_dtype: Of its values.
    """

    tensor: Tensor
    ema_dtype: torch.dtype
    param_dtype: torch.dtype


def pack(
    iteration: int,
    num_updates: int,
    ema: dict[str, Tensor],
    raw: dict[str, Tensor],
    is_swapped: bool,
) -> dict[str, Any]:
    """A state as a dictionary, of the tensors themselves."""
    return {
        VERSION_KEY: VERSION,
        ITERATION_KEY: iteration,
        NUM_UPDATES_KEY: num_updates,
        IS_SWAPPED_KEY: is_swapped,
        EMA_KEY: ema,
        RAW_KEY: raw,
        EMA_DTYPES_KEY: {name: dtype_name(tensor.dtype) for name, tensor in ema.items()},
    }


def with_raw(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """A state with its raw weights, if it has none: empty dictionaries get lost on some ways.

    As in a file that torch.distributed.checkpoint has made of a folder.
    """
    is_lost = set(_KEYS).difference(state) == {RAW_KEY} and state[IS_SWAPPED_KEY] is False
    return {**state, RAW_KEY: {}} if is_lost else state


def completed(
    state: Mapping[str, Any], own: Mapping[str, Tensor], tied: Sequence[Sequence[str]]
) -> tuple[Mapping[str, Any], IncompatibleKeys]:
    """A state with exactly the names of a model, whatever else is wrong with it.

    Args:
        state: What :func:`pack` made, perhaps saved and loaded since.
        own: Name to the values that a missing one starts with.
        tied: Names that are one tensor in the model: one of them is enough.

    Returns:
        The state, and the names that were missing and unexpected in its averages.
    """
    parts = (EMA_KEY, RAW_KEY, EMA_DTYPES_KEY)
    state = with_raw(state) if isinstance(state, Mapping) else state
    if not isinstance(state, Mapping) or not all(isinstance(state.get(k), Mapping) for k in parts):
        return state, IncompatibleKeys([], [])
    missing = [name for name in own if name not in state[EMA_KEY]]
    unexpected = [name for name in state[EMA_KEY] if name not in own]
    filled: dict[str, dict[str, Any]] = {}
    for key in (EMA_KEY, RAW_KEY) if state.get(IS_SWAPPED_KEY) else (EMA_KEY,):
        values = {name: state[key].get(name, own[name]) for name in own}
        for names in tied:
            have = [name for name in names if name in state[key]]
            for name in names if have else ():
                if name not in have and own[name].shape == own[have[0]].shape:
                    values[name] = values[have[0]]
        filled[key] = values
    dtypes = dict(state[EMA_DTYPES_KEY])
    for name in missing:
        dtypes[name] = dtype_name(filled[EMA_KEY][name].dtype)
    return {**state, **filled, EMA_DTYPES_KEY: dtypes}, IncompatibleKeys(missing, unexpected)


def unpack(
    state: Mapping[str, Any],
    expected: Mapping[str, Expected],
    tied: Sequence[Sequence[str]],
    is_live: bool = False,
    average: str = "",
) -> State:
    """Checks a state of one average against a model.

    Args:
        state: What :func:`pack` made, perhaps saved and loaded since.
        expected: Name to what must be there.
        tied: Names that are one tensor in the model.
        is_live: The state's averages are the manager's own tensors, written by a loader already.
        average: Its name, for errors.

    Raises:
        TypeError: The state is no dictionary.
        ValueError: A version that is not this one's, or anything that doesn't fit: one error with
            a line for each.
    """
    if not isinstance(state, Mapping):
        raise TypeError(
            f"{_TITLE}: the state is a {type(state).__name__}; pass what state_dict() returned"
        )
    state = with_raw(state)
    version = state.get(VERSION_KEY)
    if not isinstance(version, int) or not _is_count(version) or version == 0:
        raise ValueError(
            f"{_TITLE}: '{VERSION_KEY}' is {version!r}, with the keys "
            f"{sorted(map(str, state))[:8]}; that is no state of an EMAManager"
        )
    if version == NAMED_VERSION:
        raise ValueError(f"{_TITLE}: the state has averages with names; this takes that of one")
    if version > VERSION:
        raise ValueError(
            f"{_TITLE}: the state has version {version} but this fused_ema reads up to "
            f"{NAMED_VERSION}; update fused_ema"
        )
    problems = [
        f"the key '{key}' is missing (a truncated state?)" for key in _KEYS if key not in state
    ]
    problems += [f"unknown key '{key}'" for key in state if key not in _KEYS]
    for key in (ITERATION_KEY, NUM_UPDATES_KEY):
        if key in state and not _is_count(state[key]):
            problems.append(f"'{key}' is {state[key]!r}, not a whole number from 0")
    if not isinstance(state.get(IS_SWAPPED_KEY, False), bool):
        problems.append(f"'{IS_SWAPPED_KEY}' is {state[IS_SWAPPED_KEY]!r}, not a bool")
    for key in (EMA_KEY, RAW_KEY, EMA_DTYPES_KEY):
        if not isinstance(state.get(key, {}), Mapping):
            problems.append(f"'{key}' is a {type(state[key]).__name__}, not a dictionary")
    if not problems:
        problems += _check_tensors(state, expected, tied, is_live)
    if problems:
        kept = "nothing was changed"
        if is_live:
            kept = "the loader has written the averages in place, nothing else was changed"
        of = f" of the average '{average}'" if average else ""
        raise ValueError(
            f"{_TITLE}: the state{of} doesn't fit this model; {kept}:\n  "
            + "\n  ".join(_checks.listed(problems))
        )
    return State(
        state[ITERATION_KEY],
        state[NUM_UPDATES_KEY],
        state[IS_SWAPPED_KEY],
        state[EMA_KEY],
        state[RAW_KEY],
    )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_tensors(
    state: Mapping[str, Any],
    expected: Mapping[str, Expected],
    tied: Sequence[Sequence[str]],
    is_live: bool,
) -> list[str]:
    problems: list[str] = []
    is_swapped = state[IS_SWAPPED_KEY]
    dtypes = state[EMA_DTYPES_KEY]
    for key in (EMA_KEY, RAW_KEY) if is_swapped else (EMA_KEY,):
        tensors = state[key]
        if key == RAW_KEY and not tensors:
            # torch.distributed.checkpoint loads what state_dict() has, unswapped no raw weights.
            way = (
                "make a file of the folder (torch.distributed.checkpoint.format_utils."
                "dcp_to_torch_save), and load what torch.load gives"
            )
            if any(_shards.is_dtensor(wanted.tensor) for wanted in expected.values()):
                way = f"call swap() and load again, so that there is room for them, or {way}"
            problems.append(f"'{RAW_KEY}' is empty though the state was saved while swapped; {way}")
            continue
        problems += [f"missing in '{key}': '{n}'" for n in expected if n not in tensors]
        problems += [f"surplus in '{key}': '{n}'" for n in tensors if n not in expected]
        sound = set()
        for name, wanted in expected.items():
            if name not in tensors:
                continue
            dtype = wanted.ema_dtype if key == EMA_KEY else wanted.param_dtype
            wrong = _check_tensor(tensors[name], wanted.tensor, dtype)
            if not wrong and key == EMA_KEY:
                wrong = _converted(tensors[name], dtypes.get(name), is_live)
            if wrong:
                problems.append(f"'{name}' in '{key}' {wrong}")
            else:
                sound.add(name)
        for names in tied:
            first, *others = names
            for name in others:
                if expected[first].tensor.stride() != expected[name].tensor.stride():
                    continue  # One is a transposed view of the other; the first is what counts.
                if {first, name} <= sound and not same_values(tensors[first], tensors[name]):
                    problems.append(
                        f"'{first}' and '{name}' differ in '{key}' but are one tensor in the model"
                    )
    if not is_swapped and state[RAW_KEY]:
        problems.append(f"'{RAW_KEY}' holds {len(state[RAW_KEY])} tensors of a model not swapped")
    return problems


def _check_tensor(tensor: object, like: Tensor, dtype: torch.dtype) -> str:
    if not isinstance(tensor, Tensor):
        return f"is a {type(tensor).__name__}, not a tensor"
    if _shards.shard_of(tensor).is_meta:
        return "is on the meta device and has no values; load it whole"
    if tensor.layout != torch.strided:
        return f"has layout {tensor.layout}; only dense tensors can be averaged"
    if tensor.shape != like.shape:
        return f"has shape {list(tensor.shape)} but the model's has {list(like.shape)}"
    if problem := _shards.misfit(like, tensor):
        return f"{problem}; torch.distributed.checkpoint reshards what it loads"
    same_kind = tensor.dtype.is_floating_point == dtype.is_floating_point
    if not same_kind or not holds(dtype, tensor.dtype):
        return (
            f"is {dtype_name(tensor.dtype)} but is kept as {dtype_name(dtype)} here, which can't "
            "hold all its values; make the manager with the ema_dtype it was saved with"
        )
    return ""


def _converted(tensor: Tensor, saved: object, is_live: bool) -> str:
    own = dtype_name(tensor.dtype)
    if saved == own:
        return ""
    if not is_live:
        return f"is {own} but was saved as {saved}; something has converted it since"
    # A loader has filled the manager's own tensors, of whatever dtype the file was.
    dtype = getattr(torch, str(saved), None)
    if isinstance(dtype, torch.dtype) and torch.promote_types(dtype, tensor.dtype) == tensor.dtype:
        return ""
    return (
        f"was saved as {saved} and is kept as {own} here, to which the loader has rounded it; make "
        "the manager with the ema_dtype it was saved with, and load again"
    )


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape hold the same, wherever they are; of shards, this rank's."""
    a, b = _shards.shard_of(a), _shards.shard_of(b)
    if a.device == b.device and a.data_ptr() == b.data_ptr() and a.stride() == b.stride():
        return True
    a, b = a.cpu(), b.cpu()
    return bool(((a == b) | (a.isnan() & b.isnan())).all())
