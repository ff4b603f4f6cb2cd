"""An average under somebody's own key, or in a module of theirs: found wherever it stands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from fused_ema import _tracking
from fused_ema._format_errors import READ, FormatError
from fused_ema.formats._found import Format, Found
from fused_ema.formats._names import Tensors, own_names
from fused_ema.formats._source import Source, key_beside, parts, shown_path, weights_beside


def find(data: Mapping[str, Any], origin: Source, formats: Sequence[Format]) -> Found | None:
    """What one of these formats finds in a value of the dictionary, or under a prefix in either.

    Raises:
        FormatError: There are several averages.
    """
    places: dict[tuple[str, str], Found] = {}
    for key, value in [("", data), *((str(k), v) for k, v in data.items())]:
        if isinstance(value, Mapping):
            for root, known in _roots(value, formats):
                # What is in another average is a part of that one.
                if any(k == key and root.startswith(r) for k, r in places):
                    continue
                inner = _read(data, key, value, root, known, origin)
                if inner is not None:
                    places[key, root] = inner
    if origin.prefix in [root for _, root in places]:
        places = {place: inner for place, inner in places.items() if place[1] == origin.prefix}
    if len(places) > 1:
        raise FormatError(
            f"{READ}: {shown_path(origin.path)} has several averages, under "
            f"{_tracking.shown(['.'.join(filter(None, place)) for place in places])}; read the one "
            "you want: key= (--key), or prefix= (--prefix)"
        )
    return next(iter(places.values()), None)


def _roots(value: Mapping[str, Any], formats: Sequence[Format]) -> Iterator[tuple[str, Format]]:
    """Prefixes under which one of the formats may stand, the shortest first."""
    roots: list[tuple[str, Format]] = []
    for known in formats:
        counter = known.counter
        roots.append(("", known))
        if counter:
            ends = (name for name in map(str, value) if name.endswith(f".{counter}"))
            roots += [(name[: -len(counter)], known) for name in ends]
    yield from sorted(roots, key=lambda root: len(root[0]))


def _read(
    data: Mapping[str, Any],
    key: str,
    value: Mapping[str, Any],
    root: str,
    known: Format,
    origin: Source,
) -> Found | None:
    if root:
        return _read_in_module(key, value, root, known, origin)
    if not key:  # Of the dictionary as a whole it was asked before.
        return None
    other = key_beside(data, key)
    inner = known.read(value, replace(origin, beside=data[other] if other else {}))
    if inner is None:
        return None
    raw, raw_at = inner.raw, f"{key}.{inner.raw_at}"
    if not raw:
        raw, raw_at = weights_beside(data, key, origin)
    return replace(inner, raw=raw, ema_at=f"{key}.{inner.ema_at}", raw_at=raw_at)


def _read_in_module(
    key: str, value: Mapping[str, Any], root: str, known: Format, origin: Source
) -> Found | None:
    """An average that a module keeps of another: ``self.ema`` of ``self.net``.

    Its names come to those of the outer module, as those of the raw weights are: ``net.*``. They
    are those of the inner one where the model that was given has these, where the prefix is that
    of the average, and where the inner one can't be told among several or isn't there.
    """
    rest = {n: t for n, t in value.items() if not n.startswith(root) and isinstance(t, Tensor)}
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
