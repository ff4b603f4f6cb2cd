"""``lit_ema``: the LitEma of latent diffusion, whose names have lost their dots.

It keeps the average of ``a.b.weight`` as a buffer ``abweight``, with ``decay`` and ``num_updates``,
and stands in its module's ``state_dict`` as ``model_ema.*`` beside ``model.*``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_ema import _tracking
from fused_ema._format_errors import READ, FormatError
from fused_ema.formats._found import Format, Found
from fused_ema.formats._names import Tensors
from fused_ema.formats._source import Source, momentum_of, parts, shown_path, whole

_COUNTERS = ("decay", "num_updates")


def _read(data: Mapping[str, Any], origin: Source) -> Found | None:
    if not all(isinstance(data.get(counter), Tensor) for counter in _COUNTERS):
        return None
    flat = {str(name): value for name, value in data.items() if name not in _COUNTERS}
    if not flat or any("." in n or not isinstance(t, Tensor) for n, t in flat.items()):
        return None
    updates = whole(data["num_updates"])
    return Found(
        "lit_ema",
        origin.named(_with_dots(flat, origin), "the averages"),
        iteration=updates,
        num_updates=updates,
        momentum=momentum_of(data["decay"]),
        ema_at="*",
    )


def _with_dots(flat: Tensors, origin: Source) -> Tensors:
    model = origin.model
    for names in (map(str, origin.beside), () if model is None else model.names):
        for prefix, found in _restored(list(flat), list(names), origin):
            named = {found[name]: tensor for name, tensor in flat.items()}
            return named | _tied(named, prefix, origin)
    if origin.numbered:
        return flat
    raise FormatError(
        f"{READ}: {shown_path(origin.path)} has an average of LitEma, whose names have lost their "
        f"dots, and no weights to tell them by: {_tracking.shown(list(flat))}; pass the model that "
        "it is of: model=, --model-names"
    )


def _tied(named: Tensors, prefix: str, origin: Source) -> Tensors:
    """The averages of tied tensors, of which LitEma keeps one, under their other names."""
    first: dict[tuple[int, torch.Size], str] = {}
    others: Tensors = {}
    for full, tensor in parts(origin.beside, prefix).items():
        if isinstance(tensor, Tensor) and tensor.numel():
            name = first.setdefault((tensor.data_ptr(), tensor.shape), full)
            if name in named and full not in named:
                others[full] = named[name]
    for member in () if origin.model is None else origin.model.parameters:
        if member.name in named:
            others |= {n: named[member.name] for n in member.others if n not in named}
    return others


def _restored(
    flat: Sequence[str], names: Sequence[str], origin: Source
) -> Iterable[tuple[str, Mapping[str, str]]]:
    """The flat names with their dots, for each prefix among the names that has them all."""
    for prefix in dict.fromkeys(p for name in names for p in _prefixes(name, flat[0])):
        found: dict[str, str] = {}
        wanted = set(flat)
        for name in names:
            inner = name[len(prefix) :]
            key = inner.replace(".", "")
            if not name.startswith(prefix) or key not in wanted:
                continue
            if key in found:
                raise FormatError(
                    f"{READ}: '{key}' of {shown_path(origin.path)} stands for both '{found[key]}' "
                    f"and '{inner}': LitEma mixed up their averages; rename one of them"
                )
            found[key] = inner
        if len(found) == len(flat):
            yield prefix, found


def _prefixes(name: str, flat: str) -> Iterable[str]:
    """What stands before the part of a name that is the flat one once its dots are left out."""
    words = name.split(".")
    for i in range(len(words)):
        if "".join(words[i:]) == flat:
            yield "".join(f"{word}." for word in words[:i])


FORMAT = Format(
    "lit_ema", _read, is_part=True, counters=_COUNTERS, marks=("model_ema.*", "*.model_ema.*")
)
