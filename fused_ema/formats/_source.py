"""A dictionary that is read: where it comes from, and how its values are taken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeGuard

from torch import Tensor

from fused_ema._format_errors import READ, FormatError, refuse
from fused_ema.formats._files import Foreign, pickled
from fused_ema.formats._names import Model, Tensors, by_position, own_names

Main = Literal["ema", "raw"]

MODEL_KEYS = ("model", "state_dict", "model_state_dict", "module", "net")


@dataclass(frozen=True)
class Source:
    """Where a dictionary comes from, and what the caller knows of it."""

    path: Path | None = None
    model: Model | None = None
    prefix: str = ""
    main: Main | None = None
    # Lists without a model are numbered: enough to say what is in a file.
    numbered: bool = False
    # The format that the caller says it has.
    format: str | None = None
    # Of the value to read; keys within keys stand with dots between them.
    key: str = ""
    # Of the folders of diffusers.
    variant: str | None = None
    # Of a manager's state, its name where there are several.
    average: str | None = None
    # Of a safetensors file.
    metadata: Mapping[str, str] | None = None
    # What stands beside the dictionary and may be the model's own weights.
    beside: Mapping[str, Any] = field(default_factory=dict)

    def named(self, value: Any, what: str) -> Tensors:
        return own_names(tensors_of(value, what), self.model, self.prefix)

    def listed(self, value: Any, what: str) -> Tensors:
        if self.model is not None:
            return by_position(value, (self.model.parameters, self.model.trainable), what)
        if self.numbered and isinstance(value, (list, tuple)):
            return {f"{i}": t for i, t in enumerate(value) if isinstance(t, Tensor)}
        raise FormatError(
            f"{READ}: {what} is a list without names; pass the model it is of: read(..., "
            "model=model), or --model-names FILE"
        )


def shown_path(path: Path | None) -> str:
    return "the dictionary" if path is None else f"'{path}'"


def at_key(value: Any, key: str, origin: Source) -> Any:
    """The value under a key, or under keys with dots between them; of a list under its number.

    Raises:
        FormatError: There is none.
    """
    inner = _at(value, key)
    if inner is None:
        has = ", ".join(f"'{k}'" for k in list(value)[:8]) if isinstance(value, Mapping) else ""
        raise FormatError(
            f"{READ}: {shown_path(origin.path)} has nothing under the key '{key}': it has the keys "
            f"{has}"
        )
    return inner


def _at(value: Any, key: str) -> Any:
    if isinstance(value, (list, tuple)):
        value = {str(i): element for i, element in enumerate(value)}
    if not isinstance(value, Mapping) or key in value:
        return value.get(key) if isinstance(value, Mapping) else None
    words = key.split(".")  # Keys may have dots themselves.
    heads = (".".join(words[:i]) for i in range(len(words) - 1, 0, -1))
    found = (_at(value[head], key[len(head) + 1 :]) for head in heads if head in value)
    return next((inner for inner in found if inner is not None), None)


def tensors_of(value: Any, what: str) -> Tensors:
    if isinstance(value, Foreign):
        raise FormatError(f"{READ}: {pickled(value, what)}")
    if not isinstance(value, Mapping):
        raise FormatError(f"{READ}: {what} is a {type(value).__name__}, not a state_dict")
    tensors = {str(k): t for k, t in value.items() if not str(k).endswith("_extra_state")}
    wrong = [f"'{k}' is a {type(t).__name__}" for k, t in tensors.items() if not _is_tensor(t)]
    if wrong:
        refuse(f"{READ}: {what} must hold tensors alone", wrong)
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def holds_tensors(value: object) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(value, Mapping) and any(map(_is_tensor, value.values()))


def whole(value: Any) -> int | None:
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_floating_point():
        value = value.item()
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def momentum_of(decay: Any) -> float | None:
    if isinstance(decay, Tensor) and decay.numel() == 1:
        decay = decay.item()
    return 1 - decay if isinstance(decay, float) and 0 <= decay <= 1 else None


def parts(data: Mapping[str, Any], prefix: str) -> Tensors:
    return {str(k)[len(prefix) :]: v for k, v in data.items() if str(k).startswith(prefix)}


def key_beside(data: Mapping[str, Any], key: str) -> str:
    """Where the model's own weights are, beside what is kept under a key; "" if nowhere."""
    return next((k for k in MODEL_KEYS if k != key and holds_tensors(data.get(k))), "")


def weights_beside(data: Mapping[str, Any], key: str, origin: Source) -> tuple[Tensors, str]:
    """The model's own weights beside an average that is kept under a key, and theirs."""
    other = key_beside(data, key) if key else ""
    return (origin.named(data[other], other), other) if other else ({}, "")


def progress_of(meta: Any) -> tuple[int | None, int | None]:
    if not isinstance(meta, Mapping):
        return None, None
    return whole(meta.get("iter")), whole(meta.get("epoch"))
