"""``timm``: the average in ``state_dict_ema``, beside ``state_dict``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fused_ema.formats._found import Format, Found
from fused_ema.formats._names import Model
from fused_ema.formats._source import Source, whole
from fused_ema.formats._writing import raw_of


def _read(data: Mapping[str, Any], origin: Source) -> Found | None:
    if "state_dict_ema" not in data:
        return None
    raw = data.get("state_dict")
    return Found(
        "timm",
        origin.named(data["state_dict_ema"], "state_dict_ema"),
        {} if raw is None else origin.named(raw, "state_dict"),
        epoch=whole(data.get("epoch")),
        ema_at="state_dict_ema",
        raw_at="" if raw is None else "state_dict",
    )


def _make(found: Found, model: Model | None) -> dict[str, Any]:
    raw = raw_of(found, "timm")
    epoch = {} if found.epoch is None else {"epoch": found.epoch}
    return {**epoch, "state_dict": dict(raw), "state_dict_ema": found.averaged_model()}


FORMAT = Format("timm", _read, _make)
