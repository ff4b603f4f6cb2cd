"""``ultralytics``: the average in ``ema``, once it is exported as a ``state_dict``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fused_ema._format_errors import READ, FormatError
from fused_ema.formats._files import Foreign, pickled
from fused_ema.formats._found import Format, Found
from fused_ema.formats._source import Source, holds_tensors, shown_path, whole


def _read(data: Mapping[str, Any], origin: Source) -> Found | None:
    ema, raw = data.get("ema"), data.get("model")
    if isinstance(ema, Foreign) or (ema is None and isinstance(raw, Foreign)):
        key = "ema" if isinstance(ema, Foreign) else "model"
        raise FormatError(f"{READ}: {shown_path(origin.path)}: {pickled(data[key], key)}")
    if not holds_tensors(ema):
        return None
    raw = origin.named(raw, "model") if holds_tensors(raw) else {}
    return Found(
        "ultralytics",
        origin.named(ema, "ema"),
        raw,
        num_updates=whole(data.get("updates")),
        epoch=whole(data.get("epoch")),
        ema_at="ema",
        raw_at="model" if raw else "",
    )


FORMAT = Format("ultralytics", _read, is_last=True, marks=("ema.*",))
