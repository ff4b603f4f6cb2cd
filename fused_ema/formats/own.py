"""``fused_ema``: the state of an EMAManager, alone or under a key beside the model's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fused_ema import _named_state, _state, _tracking
from fused_ema._format_errors import READ, FormatError, SeveralAveragesError
from fused_ema.formats._found import Format, Found
from fused_ema.formats._names import Model
from fused_ema.formats._source import Source, shown_path, weights_beside, whole
from fused_ema.formats._writing import count_of


def _is_manager_state(value: Any) -> bool:
    keys = (_state.VERSION_KEY, _state.EMA_KEY, _state.EMA_DTYPES_KEY)
    return isinstance(value, Mapping) and all(key in value for key in keys)


def _read(data: Mapping[str, Any], origin: Source) -> Found | None:
    key = ""
    own: Mapping[str, Any] = data
    if not _is_manager_state(data):
        keys = [key for key, value in data.items() if _is_manager_state(value)]
        if len(keys) > 1:
            raise FormatError(
                f"{READ}: {shown_path(origin.path)} has several averages, under "
                f"{_tracking.shown(keys)}; read the one you want: key= (--key)"
            )
        if not keys:
            return None
        key = keys[0]
        own = data[key]
    if own[_state.VERSION_KEY] not in (_state.VERSION, _state.NAMED_VERSION):
        raise FormatError(
            f"{READ}: the state has version {own[_state.VERSION_KEY]!r} but this fused_ema reads "
            f"up to {_state.NAMED_VERSION}; update fused_ema"
        )
    own = _state.with_raw(own)
    average = _chosen(own, origin)
    is_swapped = own.get(_state.IS_SWAPPED_KEY)
    if average:
        own = _named_state.one_of(own, average)
    missing = [key for key in _state._KEYS if key not in own]
    if missing:
        raise FormatError(f"{READ}: the state has no {_tracking.shown(missing)} (truncated?)")
    at = f"{key}." if key else ""
    ema_at = ".".join(filter(None, (key, _state.EMA_KEY, average)))
    ema = origin.named(own[_state.EMA_KEY], ema_at)
    raw, raw_at, why = origin.named(own[_state.RAW_KEY], f"{at}{_state.RAW_KEY}"), "", ""
    beside, beside_at = weights_beside(data, key, origin)
    if own[_state.IS_SWAPPED_KEY]:
        raw_at = f"{at}{_state.RAW_KEY}"
        why = "saved while the model held the average"
        why += f" '{is_swapped}'" if average else ""
        # Of what the manager doesn't track there is only the model's.
        raw = {**{n: t for n, t in beside.items() if n not in ema}, **raw}
    elif beside.keys() & ema.keys():
        raw, raw_at = beside, beside_at
    return Found(
        "fused_ema",
        ema,
        raw,
        iteration=whole(own[_state.ITERATION_KEY]),
        num_updates=whole(own[_state.NUM_UPDATES_KEY]),
        ema_at=ema_at,
        raw_at=raw_at,
        why=why,
    )


def _chosen(own: Mapping[str, Any], origin: Source) -> str:
    """The name of the average to be read; empty of a state of one without a name."""
    if not _named_state.is_named(own):
        if origin.average is not None:
            raise FormatError(
                f"{READ}: {shown_path(origin.path)} has one average, without a name; leave "
                f"average '{origin.average}' out"
            )
        return ""
    try:
        names = _named_state.names_in(own)
    except ValueError as error:
        raise FormatError(f"{READ}: {shown_path(origin.path)}: {error}") from error
    if origin.average is None and len(names) > 1:
        raise SeveralAveragesError(shown_path(origin.path), names)
    if origin.average is not None and origin.average not in names:
        raise FormatError(
            f"{READ}: {shown_path(origin.path)} has no average '{origin.average}'; it has "
            f"{_tracking.shown(names)}"
        )
    return origin.average or names[0]


def _make(found: Found, model: Model | None) -> dict[str, Any]:
    count = count_of(found, "fused_ema")
    iteration = count if found.iteration is None else found.iteration
    own = _state.pack(iteration, count, dict(found.ema), {}, False)
    return {"model": dict(found.raw), "ema": own} if found.raw else {"ema": own}


FORMAT = Format("fused_ema", _read, _make)
