"""What a checkpoint holds, and what a format is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fused_ema.formats._names import Model, Tensors
from fused_ema.formats._source import Source


@dataclass(frozen=True)
class Found:
    """What is in a checkpoint, by the model's own names.

    ``dataclasses.replace(found, iteration=...)`` adds what a format doesn't record.

    Attributes:
        format: One of :data:`FORMATS`.
        ema: Name to average. Tensors of a file are mapped to it: read when they are used.
        raw: Name to the model's own values, of those that have no average too; empty where the
            checkpoint hasn't got them. ``model.load_state_dict(found.raw)`` takes them over.
        iteration: The iteration that comes next, 0-based, or None.
        num_updates: Updates so far, as the format counts them, or None.
        momentum: The weight of the new value, or None; where it changes, the last or the limit.
        epoch: Epochs so far, or None.
        ema_at: Where the average is kept.
        raw_at: Where the raw weights are kept, or "".
        why: What told the one from the other, where that isn't the format itself.
    """

    format: str
    ema: Tensors
    raw: Tensors = field(default_factory=dict)
    iteration: int | None = None
    num_updates: int | None = None
    momentum: float | None = None
    epoch: int | None = None
    ema_at: str = ""
    raw_at: str = ""
    why: str = ""

    def __repr__(self) -> str:
        facts = ("iteration", "num_updates", "momentum", "epoch")
        values = ((name, getattr(self, name)) for name in facts)
        known = "".join(f", {name}={value}" for name, value in values if value is not None)
        raw = f", {len(self.raw):,} raw" if self.raw else ""
        return f"Found({self.format!r}, {len(self.ema):,} averages at {self.ema_at!r}{raw}{known})"

    def averaged_model(self) -> Tensors:
        """All of the model's tensors, with the average where there is one."""
        return {**self.raw, **self.ema}


@dataclass(frozen=True)
class Format:
    """A format of checkpoints: one file of this package has one, or a family of them.

    Attributes:
        name: What it is called, in :data:`FORMATS`.
        read: What it finds in a dictionary, or None where the dictionary isn't of this format.
        make: The dictionary that is saved for what was found; None where it is only read.
        is_last: Whether it is asked after those that may stand under any key: what it is known by
            is a key alone, or the others' names.
        is_part: Whether people keep it under a key of their own.
        counters: Names in its dictionary, by which it is found among those of a module.
        marks: Patterns of names that tell of it: what has them isn't all the average.
    """

    name: str
    read: Callable[[Mapping[str, Any], Source], Found | None]
    make: Callable[[Found, Model | None], dict[str, Any]] | None = None
    is_last: bool = False
    is_part: bool = False
    counters: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()
