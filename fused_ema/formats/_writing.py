"""What a format that is written asks of what was found."""

from __future__ import annotations

from torch import Tensor

from fused_ema import _tracking
from fused_ema._format_errors import WRITE, FormatError, refuse
from fused_ema.formats._found import Found
from fused_ema.formats._names import Model, Tensors


def raw_of(found: Found, name: str) -> Tensors:
    missing = [n for n in found.ema if n not in found.raw]
    if missing:
        raise FormatError(
            f"{WRITE}: a file of {name} has the raw weights too, and {len(missing)} of them are "
            f"missing in '{found.format}': {_tracking.shown(missing)}; write 'safetensors', or add "
            "them: dataclasses.replace(found, raw=model.state_dict())"
        )
    return found.raw


def count_of(found: Found, name: str) -> int:
    count = found.iteration if found.num_updates is None else found.num_updates
    if count is None:
        raise FormatError(
            f"{WRITE}: a file of {name} counts its updates, and '{found.format}' records none; "
            "say it: dataclasses.replace(found, num_updates=...) (--iteration)"
        )
    return count


def list_of(found: Found, model: Model | None, name: str) -> tuple[list[Tensor], float]:
    if model is None:
        raise FormatError(
            f"{WRITE}: a file of {name} is a list in the order of the model's parameters; pass "
            "the model: write(..., model=model), or --model-names FILE"
        )
    values = found.averaged_model()
    listed: list[Tensor] = []
    missing = []
    for member in model.parameters:
        have = [values[n] for n in (member.name, *member.others) if n in values]
        if have:
            listed.append(have[0])
        else:
            missing.append(f"'{member.name}' is missing")
    if missing:
        refuse(f"{WRITE}: the averages are of another model", missing)
    if found.momentum is None:
        raise FormatError(
            f"{WRITE}: a file of {name} records its decay, and '{found.format}' has none; say "
            "it: dataclasses.replace(found, momentum=1 - decay) (--momentum)"
        )
    return listed, 1 - found.momentum
