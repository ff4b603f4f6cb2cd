"""Names: those of a model, and those of a checkpoint brought to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fused_ema import _tracking
from fused_ema._format_errors import READ, FormatError, refuse

Names = nn.Module | Mapping[str, Tensor] | Sequence[str]
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Member:
    name: str
    shape: torch.Size | None
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Model:
    """A model's names: all of them, and those of its parameters, each tensor once."""

    names: Mapping[str, torch.Size | None]
    parameters: Sequence[Member]
    trainable: Sequence[Member]
    is_module: bool = False


def model_of(model: Names | None, op: str) -> Model | None:
    if model is None:
        return None
    if isinstance(model, nn.Module):
        members = _tracking.read(model).members
        groups: dict[int, list[_tracking.Member]] = {}
        for member in members:
            if not member.is_buffer:
                groups.setdefault(id(member.tensor), []).append(member)
        parameters, trainable = [], []
        for first, *others in groups.values():
            known = Member(first.name, first.tensor.shape, tuple(m.name for m in others))
            parameters.append(known)
            if first.tensor.requires_grad:
                trainable.append(known)
        return Model({m.name: m.tensor.shape for m in members}, parameters, trainable, True)
    if isinstance(model, Mapping):
        shapes = {str(name): tensor.shape for name, tensor in model.items()}
        listed = [Member(name, shape) for name, shape in shapes.items()]
        return Model(shapes, listed, listed)
    if isinstance(model, str) or not all(isinstance(name, str) for name in model):
        raise TypeError(
            f"{op}: model is a {type(model).__name__}; pass the module, its state_dict() or the "
            "names of its parameters"
        )
    listed = [Member(name, None) for name in model]
    return Model(dict.fromkeys(model), listed, listed)


def own_names(tensors: Tensors, model: Model | None, prefix: str) -> Tensors:
    """The same by the model's own names, without those of wrappers."""
    known = {} if model is None else model.names
    named: Tensors = {}
    was: dict[str, str] = {}
    for full, tensor in tensors.items():
        name = full
        if name not in known:
            parts = full.split(".")
            name = ".".join(p for p in parts if p not in _tracking._TRANSPARENT)
        if name in named:
            raise FormatError(
                f"{READ}: '{was[name]}' and '{full}' both come to '{name}' once the names of "
                "wrappers are left out; rename one of them"
            )
        named[name], was[name] = tensor, full
    while named and all(n.startswith("module.") for n in named) and not set(named) & set(known):
        named = {name[len("module.") :]: tensor for name, tensor in named.items()}
    if prefix:
        named = {n[len(prefix) :]: t for n, t in named.items() if n.startswith(prefix)}
    return named


def by_position(tensors: Any, members: Sequence[Sequence[Member]], what: str) -> Tensors:
    """A list of tensors by the names of a model's parameters."""
    if not isinstance(tensors, (list, tuple)) or not all(isinstance(t, Tensor) for t in tensors):
        raise FormatError(f"{READ}: {what} is no list of tensors")
    for chosen in members:
        if len(chosen) == len(tensors):
            break
    else:
        raise FormatError(
            f"{READ}: {what} has {len(tensors)} tensors but the model has "
            f"{' or '.join(str(n) for n in dict.fromkeys(map(len, members)))} parameters; it is of "
            "another model (names alone must be those of its parameters, in their order)"
        )
    problems = [
        f"'{member.name}' has shape {list(member.shape)} but tensor {i} has {list(tensor.shape)}"
        for i, (member, tensor) in enumerate(zip(chosen, tensors, strict=True))
        if member.shape is not None and member.shape != tensor.shape
    ]
    if problems:
        refuse(f"{READ}: {what} is of another model", problems)
    named = {}
    for member, tensor in zip(chosen, tensors, strict=True):
        named.update(dict.fromkeys((member.name, *member.others), tensor))
    return named


def check_model(ema: Tensors, raw: Tensors, model: Model) -> None:
    """That the averages are of this model."""
    problems = [f"'{name}' is not in the model" for name in ema if name not in model.names]
    for name, tensor in ema.items():
        shape = model.names.get(name)
        if shape is not None and shape != tensor.shape:
            problems.append(
                f"'{name}' has shape {list(tensor.shape)} but the model's has {list(shape)}"
            )
    if model.is_module:
        has = ema.keys() | raw.keys()
        problems += [
            f"'{member.name}' of the model is missing"
            for member in model.trainable
            if not has & {member.name, *member.others}
        ]
    if problems:
        refuse(f"{READ}: the checkpoint is of another model", problems)
