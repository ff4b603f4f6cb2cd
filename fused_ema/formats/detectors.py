"""``ultralytics`` and ``rt_detr``: detectors that keep their average in ``ema``.

Ultralytics pickles the module; once it is exported, ``ema`` is its ``state_dict``. RT-DETR and what
descends from it keep ``{"module": ..., "updates": n}`` there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fused_ema._format_errors import READ, FormatError
from fused_ema.formats._files import Foreign, pickled
from fused_ema.formats._found import Format, Found
from fused_ema.formats._pairs import read_pair
from fused_ema.formats._source import Source, holds_tensors, shown_path, whole


def _read_ultralytics(data: Mapping[str, Any], origin: Source) -> Found | None:
    ema, raw = data.get("ema"), data.get("model")
    if isinstance(ema, Foreign) or (ema is None and isinstance(raw, Foreign)):
        key = "ema" if isinstance(ema, Foreign) else "model"
        raise FormatError(f"{READ}: {shown_path(origin.path)}: {pickled(data[key], key)}")
    if not holds_tensors(ema):
        return None
    found = read_pair("ultralytics", ema, "ema", data, ("model",), origin)
    return replace(found, num_updates=whole(data.get("updates")))


def _read_rt_detr(data: Mapping[str, Any], origin: Source) -> Found | None:
    saved, at = data.get("ema"), "ema.module"
    if saved is None and "updates" in data:  # Without a counter it could be anybody's module.
        saved, at = data, "module"
    if not isinstance(saved, Mapping) or not holds_tensors(saved.get("module")):
        return None
    found = read_pair("rt_detr", saved["module"], at, data, ("model",), origin)
    last = data.get("last_epoch")  # From 0, and -1 before the first.
    epoch = whole(last + 1) if isinstance(last, int) else found.epoch
    return replace(found, num_updates=whole(saved.get("updates")), epoch=epoch)


ULTRALYTICS = Format("ultralytics", _read_ultralytics, is_last=True, marks=("ema.*",))
RT_DETR = Format("rt_detr", _read_rt_detr, is_last=True)
