"""``ema_pytorch``: the average in ``ema_model.*``, with ``initted`` and ``step``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fused_ema.formats._found import Format, Found
from fused_ema.formats._names import Model
from fused_ema.formats._source import Source, parts, whole
from fused_ema.formats._writing import count_of


def _read(data: Mapping[str, Any], origin: Source) -> Found | None:
    ema = parts(data, "ema_model.")
    if not {"initted", "step"} <= data.keys() or not ema:
        return None
    raw = parts(data, "online_model.")
    return Found(
        "ema_pytorch",
        origin.named(ema, "ema_model.*"),
        origin.named(raw, "online_model.*"),
        iteration=whole(data["step"]),
        ema_at="ema_model.*",
        raw_at="online_model.*" if raw else "",
    )


def _make(found: Found, model: Model | None) -> dict[str, Any]:
    step = count_of(found, "ema_pytorch") if found.iteration is None else found.iteration
    raw = found.raw if found.ema.keys() <= found.raw.keys() else {}
    values = found.averaged_model()
    return {
        "initted": torch.tensor(True),
        "step": torch.tensor(step),
        **{f"online_model.{name}": tensor for name, tensor in raw.items()},
        **{f"ema_model.{name}": tensor for name, tensor in values.items()},
    }


FORMAT = Format(
    "ema_pytorch",
    _read,
    _make,
    is_part=True,
    counters=("initted", "step"),
    marks=(
        "initted",
        "*.initted",
        *("ema_model.*", "*.ema_model.*"),
        *("online_model.*", "*.online_model.*"),
    ),
)
