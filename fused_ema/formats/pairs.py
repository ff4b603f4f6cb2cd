"""The average under a key of its own, with plain names, beside the model's own weights.

``timm`` keeps it in ``state_dict_ema`` beside ``state_dict``; many training scripts keep it in
``ema_state_dict``, which MMEngine has too, for the raw weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fused_ema._format_errors import READ, refuse
from fused_ema.formats._found import Format, Found
from fused_ema.formats._names import Model
from fused_ema.formats._source import MODEL_KEYS, Source, holds_tensors, shown_path, whole
from fused_ema.formats._writing import raw_of


def _read_pair(
    name: str, data: Mapping[str, Any], key: str, raw_keys: tuple[str, ...], origin: Source
) -> Found:
    ema = origin.named(data[key], key)
    raw_at = next((k for k in raw_keys if k != key and holds_tensors(data.get(k))), "")
    raw = origin.named(data[raw_at], raw_at) if raw_at else {}
    known = {} if origin.model is None else origin.model.names
    # An average that doesn't fit the model is refused for that.
    wrong = [
        f"'{n}' has shape {list(t.shape)} in {key} but {list(raw[n].shape)} in {raw_at}"
        for n, t in ema.items()
        if n in raw and raw[n].shape != t.shape and known.get(n) in (None, t.shape)
    ]
    if wrong:
        refuse(f"{READ}: {key} of {shown_path(origin.path)} is no average of {raw_at}", wrong)
    if not ema.keys() & raw.keys():  # The weights of something else.
        raw, raw_at = {}, ""
    epoch = whole(data.get("epoch"))
    return Found(name, ema, raw, epoch=epoch, ema_at=key, raw_at=raw_at)


def _read_timm(data: Mapping[str, Any], origin: Source) -> Found | None:
    if "state_dict_ema" not in data:
        return None
    return _read_pair("timm", data, "state_dict_ema", ("state_dict",), origin)


def _make_timm(found: Found, model: Model | None) -> dict[str, Any]:
    raw = raw_of(found, "timm")
    epoch = {} if found.epoch is None else {"epoch": found.epoch}
    return {**epoch, "state_dict": dict(raw), "state_dict_ema": found.averaged_model()}


def _read_ema_state_dict(data: Mapping[str, Any], origin: Source) -> Found | None:
    if not holds_tensors(data.get("ema_state_dict")):
        return None
    keys = ("state_dict", *MODEL_KEYS)
    return _read_pair("ema_state_dict", data, "ema_state_dict", keys, origin)


TIMM = Format("timm", _read_timm, _make_timm, is_last=True, marks=("state_dict_ema.*",))
EMA_STATE_DICT = Format(
    "ema_state_dict", _read_ema_state_dict, is_last=True, marks=("ema_state_dict.*",)
)
