"""``averaged_model``: the AveragedModel of ``torch.optim.swa_utils``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fused_ema.formats._found import Format, Found
from fused_ema.formats._names import Model
from fused_ema.formats._source import Source, parts, whole
from fused_ema.formats._writing import count_of


def _read(data: Mapping[str, Any], origin: Source) -> Found | None:
    ema = parts(data, "module.")
    if "n_averaged" not in data or not ema:
        return None
    return Found(
        "averaged_model",
        origin.named(ema, "module.*"),
        num_updates=whole(data["n_averaged"]),
        ema_at="module.*",
    )


def _make(found: Found, model: Model | None) -> dict[str, Any]:
    values = found.averaged_model()
    count = torch.tensor(count_of(found, "averaged_model"))
    return {"n_averaged": count, **{f"module.{name}": tensor for name, tensor in values.items()}}


FORMAT = Format(
    "averaged_model",
    _read,
    _make,
    is_part=True,
    counters=("n_averaged",),
    marks=("n_averaged", "*.n_averaged"),
)
