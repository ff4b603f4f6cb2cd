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
    """The weights that averages are of, and under which of the keys: one that has their names.

    Raises:
        FormatError: Their shapes differ.
    """
    for raw_at in keys:
        if not holds_tensors(data.get(raw_at)):
            continue
        raw = origin.named(data[raw_at], raw_at)
        if origin.prefix and not raw:  # The prefix is that of the averages alone.
            raw = replace(origin, prefix="").named(data[raw_at], raw_at)
        if ema.keys() & raw.keys():
            _check_shapes(ema, ema_at, raw, raw_at, origin)
            return raw, raw_at
    return {}, ""


def _check_shapes(ema: Tensors, ema_at: str, raw: Tensors, raw_at: str, origin: Source) -> None:
    known = {} if origin.model is None else origin.model.names
    # An average that doesn't fit the model is refused for that.
    wrong = [
        f"'{name}' has shape {list(tensor.shape)} in {ema_at} but {list(raw[name].shape)} in "
        f"{raw_at}"
        for name, tensor in ema.items()
        if name in raw
        and raw[name].shape != tensor.shape
        and known.get(name) in (None, tensor.shape)
    ]
    if wrong:
        refuse(f"{READ}: {ema_at} of {shown_path(origin.path)} is no average of {raw_at}", wrong)


def read_pair(
    name: str,
    ema: Any,
    ema_at: str,
    data: Mapping[str, Any],
    raw_keys: Sequence[str],
    origin: Source,
) -> Found:
    """The average, and the weights that it is of, under one of the keys.

    Raises:
        FormatError: Their shapes differ.
    """
    averages = origin.named(ema, ema_at)
    raw, raw_at = raw_beside(averages, ema_at, data, raw_keys, origin)
    epoch = whole(data.get("epoch"))
    return Found(name, averages, raw, epoch=epoch, ema_at=ema_at, raw_at=raw_at)
