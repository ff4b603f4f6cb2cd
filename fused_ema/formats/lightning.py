"""``lightning``: the file of Lightning's WeightAveraging, which saves the average as the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fused_ema.formats._found import Format, Found
from fused_ema.formats._source import Source, whole


def _read(data: Mapping[str, Any], origin: Source) -> Found | None:
    if not {"state_dict", "current_model_state", "averaging_state"} <= data.keys():
        return None
    averaging = data["averaging_state"]
    return Found(
        "lightning",
        origin.named(data["state_dict"], "state_dict"),
        origin.named(data["current_model_state"], "current_model_state"),
        iteration=whole(data.get("global_step")),
        num_updates=whole(averaging.get("n_averaged")) if isinstance(averaging, Mapping) else None,
        epoch=whole(data.get("epoch")),
        ema_at="state_dict",
        raw_at="current_model_state",
    )


FORMAT = Format("lightning", _read, marks=("current_model_state.*",))
