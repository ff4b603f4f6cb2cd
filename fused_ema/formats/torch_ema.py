"""``torch_ema``: the list ``shadow_params``, in the order of the model's parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fused_ema.formats._found import Format, Found
from fused_ema.formats._names import Model
from fused_ema.formats._source import Source, momentum_of, whole
from fused_ema.formats._writing import count_of, list_of


def _read(data: Mapping[str, Any], origin: Source) -> Found | None:
    if "shadow_params" not in data or "optimization_step" in data:
        return None
    stored = data.get("collected_params")
    updates = whole(data.get("num_updates"))
    return Found(
        "torch_ema",
        origin.listed(data["shadow_params"], "shadow_params"),
        origin.listed(stored, "collected_params") if stored else {},
        iteration=updates,
        num_updates=updates,
        momentum=momentum_of(data.get("decay")),
        ema_at="shadow_params",
        raw_at="collected_params" if stored else "",
    )


def _make(found: Found, model: Model | None) -> dict[str, Any]:
    listed, decay = list_of(found, model, "torch_ema")
    return {
        "decay": decay,
        "num_updates": count_of(found, "torch_ema"),
        "shadow_params": listed,
        "collected_params": None,
    }


FORMAT = Format(
    "torch_ema", _read, _make, is_part=True, marks=("shadow_params.*", "*.shadow_params.*")
)
