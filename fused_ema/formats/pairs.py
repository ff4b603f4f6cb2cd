"""The average under a key of its own, with plain names, beside the model's own weights.

``timm`` keeps it in ``state_dict_ema`` beside ``state_dict``, DeiT and what descends from it in
``model_ema`` beside ``model``. Many scripts keep it in ``ema_state_dict``, which MMEngine has too,
for the raw weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fused_ema._format_errors import READ, FormatError
from fused_ema.formats._found import Format, Found
from fused_ema.formats._names import Model
from fused_ema.formats._pairs import read_pair
from fused_ema.formats._source import MODEL_KEYS, Source, holds_tensors, shown_path
from fused_ema.formats._writing import raw_of


def _read_timm(data: Mapping[str, Any], origin: Source) -> Found | None:
    if "state_dict_ema" not in data:
        return None
    ema = data["state_dict_ema"]
    return read_pair("timm", ema, "state_dict_ema", data, ("state_dict",), origin)


def _make_timm(found: Found, model: Model | None) -> dict[str, Any]:
    raw = raw_of(found, "timm")
    epoch = {} if found.epoch is None else {"epoch": found.epoch}
    return {**epoch, "state_dict": dict(raw), "state_dict_ema": found.averaged_model()}


def _read_deit(data: Mapping[str, Any], origin: Source) -> Found | None:
    ema = data.get("model_ema")
    if not holds_tensors(ema):
        return None
    found = read_pair("deit", ema, "model_ema", data, ("model",), origin)
    # Its epoch is the last one, from 0.
    return replace(found, epoch=None if found.epoch is None else found.epoch + 1)


def _read_ema_state_dict(data: Mapping[str, Any], origin: Source) -> Found | None:
    ema = data.get("ema_state_dict")
    if not holds_tensors(ema):
        return None
    if "steps" in ema and any(str(name).startswith("module.") for name in ema):
        # MMEngine keeps the average in the other one.
        raise FormatError(
            f"{READ}: ema_state_dict of {shown_path(origin.path)} has the names of a wrapper and "
            "its counter, as MMEngine's has, but there is no state_dict beside it; if it is the "
            "average all the same: key='ema_state_dict', prefix='module.', format='state_dict' "
            "(--key, --prefix, --format)"
        )
    keys = ("state_dict", *MODEL_KEYS)
    return read_pair("ema_state_dict", ema, "ema_state_dict", data, keys, origin)


TIMM = Format("timm", _read_timm, _make_timm, is_last=True, marks=("state_dict_ema.*",))
DEIT = Format("deit", _read_deit, is_last=True)
EMA_STATE_DICT = Format(
    "ema_state_dict", _read_ema_state_dict, is_last=True, marks=("ema_state_dict.*",)
)
