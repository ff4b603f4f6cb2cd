"""``safetensors`` and ``state_dict``: tensors alone, all of them the average."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from fused_ema._format_errors import READ, FormatError
from fused_ema.formats._found import Format, Found
from fused_ema.formats._names import Model, Tensors
from fused_ema.formats._source import Source, holds_tensors, shown_path

WHOLE = "the whole file"
_SLOT = "fused_ema.slot"
_COUNTERS = ("iteration", "num_updates", "momentum", "epoch")


def _read_safetensors(data: Mapping[str, Any], origin: Source) -> Found | None:
    metadata = origin.metadata
    if metadata is None:
        return None

    def number(key: str) -> int | None:
        text = metadata.get(f"fused_ema.{key}", "")
        return int(text) if text.isdecimal() and len(text) < 20 else None

    momentum = None
    with suppress(KeyError, ValueError):
        given = float(metadata["fused_ema.momentum"])
        momentum = given if 0 <= given <= 1 else None
    ema = origin.named(data, "the file")
    why = "the prefix was given" if origin.prefix else "it has nothing else"
    kept = metadata.get("fused_ema.averaged")
    raw: Tensors = {}
    if kept is not None:
        try:
            names = json.loads(kept)
        except (ValueError, RecursionError):
            names = None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise FormatError(
                f"{READ}: the header of {shown_path(origin.path)} doesn't say which tensors are "
                f"averaged: fused_ema.averaged is {kept[:80]!r}, not a list of names"
            )
        averaged = set(names)
        # What has no average is the model's own.
        raw = {name: tensor for name, tensor in ema.items() if name not in averaged}
        ema = {name: tensor for name, tensor in ema.items() if name in averaged}
    return Found(
        "safetensors",
        ema,
        raw,
        iteration=number("iteration"),
        num_updates=number("num_updates"),
        epoch=number("epoch"),
        momentum=momentum,
        ema_at=WHOLE,
        why="" if says_average(origin) else why,
    )


def says_average(origin: Source) -> bool:
    """Whether the header of a safetensors file says what its tensors are."""
    return origin.metadata is not None and origin.metadata.get(_SLOT) == "ema"


def metadata_of(found: Found) -> dict[str, str]:
    """What the header of a safetensors file says of its tensors."""
    metadata = {"format": "pt", _SLOT: "ema"}
    for key in _COUNTERS:
        value = getattr(found, key)
        if value is not None:
            metadata[f"fused_ema.{key}"] = repr(value)
    if found.raw.keys() - found.ema.keys():
        metadata["fused_ema.averaged"] = json.dumps(list(found.ema))
    return metadata


def _read_state_dict(data: Mapping[str, Any], origin: Source) -> Found | None:
    if origin.format != "state_dict":  # It could be anything.
        return None
    inner = data.get("state_dict")
    where = "state_dict" if isinstance(inner, Mapping) else ""
    if not where and not holds_tensors(data):
        keys = ", ".join(f"'{key}'" for key in list(data)[:8])
        raise FormatError(
            f"{READ}: {shown_path(origin.path)} holds no tensors itself: it has the keys {keys}; "
            "say which of them holds the average: key= (--key)"
        )
    ema = origin.named(inner if where else data, "the file")
    return Found("state_dict", ema, ema_at=where or WHOLE)


def _make_averaged(found: Found, model: Model | None) -> dict[str, Any]:
    return found.averaged_model()


STATE_DICT = Format("state_dict", _read_state_dict, _make_averaged, is_last=True)
SAFETENSORS = Format("safetensors", _read_safetensors, _make_averaged, is_last=True)
