"""``dino``: self-distillation, where the teacher is the average of the student."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fused_ema._format_errors import READ, FormatError
from fused_ema.formats._found import Format, Found
from fused_ema.formats._pairs import read_pair
from fused_ema.formats._source import Source, holds_tensors, parts, shown_path

_BACKBONE = "backbone."


def _read(data: Mapping[str, Any], origin: Source) -> Found | None:
    both = {key: data.get(key) for key in ("teacher", "student")}
    if not any(map(holds_tensors, both.values())):  # DINOv2 keeps them in one state_dict.
        both = {key: parts(data, f"{key}.") for key in both}
    teacher = both["teacher"]
    if not holds_tensors(teacher):
        return None
    has_backbone = any(str(n).removeprefix("module.").startswith(_BACKBONE) for n in teacher)
    if not has_backbone and origin.format != "dino":  # Of others it may be a network to learn from.
        return None
    both["epoch"] = data.get("epoch")
    unstripped = replace(origin, prefix="")
    found = read_pair("dino", teacher, "teacher", both, ("student",), unstripped)
    backbone = [name for name in found.ema if name.startswith(_BACKBONE)]
    other = [name for name in backbone if name not in found.raw]
    if holds_tensors(both["student"]) and other:
        raise FormatError(
            f"{READ}: teacher of {shown_path(origin.path)} is no average of student, which has no "
            f"'{other[0]}'; if it is one all the same: key='teacher', format='state_dict' (--key "
            "teacher --format state_dict)"
        )
    names = {} if origin.model is None else origin.model.names
    is_inner = not names.keys() & found.ema.keys() and any(
        name.removeprefix(_BACKBONE) in names for name in backbone
    )
    prefix = origin.prefix or (_BACKBONE if is_inner else "")
    return replace(found, ema=parts(found.ema, prefix), raw=parts(found.raw, prefix))


FORMAT = Format("dino", _read, is_part=True, is_last=True, marks=("teacher.*", "student.*"))
