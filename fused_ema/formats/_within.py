"""An average under somebody's own key, or in a module of theirs: found wherever it stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from fused_ema import _tracking
from fused_ema._format_errors import READ, FormatError
from fused_ema.formats._found import Format, Found
from fused_ema.formats._names import Tensors, own_names
from fused_ema.formats._pairs import raw_beside
from fused_ema.formats._source import (
    MODEL_KEYS,
    Source,
    key_beside,
    parts,
    shown_path,
    weights_beside,
)


def find(data: Mapping[str, Any], origin: Source, formats: Sequence[Format]) -> Found | None:
    """What one of these formats finds in a value of the dictionary, or under a prefix in either.

    Raises:
        FormatError: There are several averages.
    """
    places: dict[tuple[str, str], Found] = {}
    for key, value in [("", data), *((str(k), v) for k, v in data.items())]:
        if not isinstance(value, Mapping):
            continue
        for known in formats if key else ():
            inner = _read_at(data, key, value, known, origin)
            if inner is not None:
                places[key, ""] = inner
                break
        else:
            roots = _roots(value, formats)
            for root, known in roots.items():
                inner = _read_in_module(key, value, root, known, tuple(roots), origin)
                if inner is not None:
                    places[key, root] = inner
    if origin.prefix:
        chosen = {place: f for place, f in places.items() if place[1].startswith(origin.prefix)}
        exact = {place: f for place, f in chosen.items() if place[1] == origin.prefix}
        places = exact or chosen or places
    if len(places) > 1:
        raise FormatError(
            f"{READ}: {shown_path(origin.path)} has several averages, under "
            f"{_tracking.shown(['.'.join(filter(None, place)) for place in places])}; read the one "
            "you want: key= (--key), or prefix= (--prefix)"
        )
    return next(iter(places.values()), None)


def _roots(value: Mapping[str, Any], formats: Sequence[Format]) -> dict[str, Format]:
    """Prefixes whose names have all the counters of a format, and the format."""
    roots: dict[str, Format] = {}
    for known in formats:
        for name in map(str, value) if known.counters else ():
            root = name.removesuffix(known.counters[0])
            if root.endswith(".") and all(root + counter in value for counter in known.counters):
                roots.setdefault(root, known)
    # What is in another average is a part of that one.
    return {
        root: known
        for root, known in roots.items()
        if not any(root != other and root.startswith(other) for other in roots)
    }


def _read_at(
    data: Mapping[str, Any], key: str, value: Mapping[str, Any], known: Format, origin: Source
) -> Found | None:
    """What a format finds in the value of a key."""
    other = key_beside(data, key)
    inner = known.read(value, replace(origin, beside=data[other] if other else {}))
    if inner is None:
        return None
    at = f"{key}.{inner.ema_at}"
    raw, raw_at = inner.raw, f"{key}.{inner.raw_at}"
    if not raw and known.counters:
        raw, raw_at = raw_beside(inner.ema, at, data, [k for k in MODEL_KEYS if k != key], origin)
    elif not raw:  # A list may have no names to compare.
        raw, raw_at = weights_beside(data, key, origin)
    return replace(inner, raw=raw, ema_at=at, raw_at=raw_at)


def _read_in_module(
    key: str,
    value: Mapping[str, Any],
    root: str,
    known: Format,
    roots: tuple[str, ...],
    origin: Source,
) -> Found | None:
    """An average that a module keeps of another: ``self.ema`` of ``self.net``.

    Its names come to those of the outer module, as those of the raw weights are: ``net.*``. They
    are those of the inner one where the model that was given has these, where the prefix is that
    of the average, and where the inner one can't be told among several or isn't there.
    """
    # A prefix that has several averages, or one and what it is of, parts them from others.
    among = origin.prefix if root.startswith(origin.prefix) and root != origin.prefix else ""
    rest = {
        str(name): tensor
        for name, tensor in value.items()
        if isinstance(tensor, Tensor)
        and not str(name).startswith(roots)
        and str(name).startswith(among)
    }
    own = replace(origin, prefix="", beside=rest)
    inner = known.read(parts(value, root), own)
    if inner is None:
        return None
    at = f"{key}.{root}" if key else root
    outer = own_names(rest, origin.model, "")
    ema, raw, raw_at = inner.ema, inner.raw, f"{at}{inner.raw_at}" if inner.raw else ""
    twin = twin_of(ema, outer)
    prefix = "" if origin.prefix == root else origin.prefix
    if twin is not None:
        raw_at = ".".join(filter(None, (key, f"{twin}*")))
        names = {} if origin.model is None else origin.model.names
        is_outer = any(twin + name in names for name in ema)
        is_inner = not is_outer and any(name in names for name in ema)
        if origin.prefix == root or (is_inner and not prefix):
            raw = parts(outer, twin)
        else:
            ema, raw = {twin + name: tensor for name, tensor in ema.items()}, outer
    if prefix:
        ema, raw = parts(ema, prefix), parts(raw, prefix)
    return replace(inner, ema=ema, raw=raw, ema_at=f"{at}{inner.ema_at}", raw_at=raw_at)


def twin_of(ema: Tensors, tensors: Tensors) -> str | None:
    """The prefix under which there is a tensor for each average; None where there isn't just one.

    Args:
        ema: Name to average.
        tensors: Name to tensor, of a module that may hold the averaged one.
    """
    first = next(iter(ema), None)
    if first is None:
        return None
    prefixes = [n[: -len(first)] for n in tensors if n == first or n.endswith(f".{first}")]
    found = [p for p in prefixes if all(_fits(tensors.get(p + n), t) for n, t in ema.items())]
    return found[0] if len(found) == 1 else None


def _fits(tensor: Tensor | None, ema: Tensor) -> bool:
    return tensor is not None and tensor.shape == ema.shape
