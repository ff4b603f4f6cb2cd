"""An average and the weights that it is of, under two keys of a dictionary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fused_ema._format_errors import READ, refuse
from fused_ema.formats._found import Found
from fused_ema.formats._names import Tensors
from fused_ema.formats._source import Source, holds_tensors, shown_path, whole


def raw_beside(
    ema: Tensors, ema_at: str, data: Mapping[str, Any], keys: Sequence[str], origin: Source
) -> tuple[Tensors, str]:
    """The weights that averages are of, under the first of the keys that holds tensors, and which.

    Raises:
        FormatError: Their shapes differ.
    """
    raw_at = next((key for key in keys if holds_tensors(data.get(key))), "")
    raw = origin.named(data[raw_at], raw_at) if raw_at else {}
    if raw_at and origin.prefix and not raw:  # The prefix is that of the averages alone.
        raw = replace(origin, prefix="").named(data[raw_at], raw_at)
    known = {} if origin.model is None else origin.model.names
    # An average that doesn't fit the model is refused for that.
    wrong = [
        f"'{n}' has shape {list(t.shape)} in {ema_at} but {list(raw[n].shape)} in {raw_at}"
        for n, t in ema.items()
        if n in raw and raw[n].shape != t.shape and known.get(n) in (None, t.shape)
    ]
    if wrong:
        refuse(f"{READ}: {ema_at} of {shown_path(origin.path)} is no average of {raw_at}", wrong)
    # Without a name in common they are the weights of something else.
    return (raw, raw_at) if ema.keys() & raw.keys() else ({}, "")


def read_pair(
    name: str,
    ema: Any,
    ema_at: str,
    data: Mapping[str, Any],
    raw_keys: Sequence[str],
    origin: Source,
) -> Found:
    """The average, and the weights that it is of, under the first of the keys that holds tensors.

    Raises:
        FormatError: Their shapes differ.
    """
    averages = origin.named(ema, ema_at)
    raw, raw_at = raw_beside(averages, ema_at, data, raw_keys, origin)
    epoch = whole(data.get("epoch"))
    return Found(name, averages, raw, epoch=epoch, ema_at=ema_at, raw_at=raw_at)
