"""The average of Lightning's DeepSpeedStrategy: an EngineEMA that its callback updates."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fused_ema import _storage, _tracking
from fused_ema.hooks import _engine_state, required
from fused_ema.hooks.deepspeed import EngineEMA

_TAG = "checkpoint"
"""Under which the strategy has the engine save."""


class StrategyEMA(EngineEMA):
    """Notes steps for the callback, which asks should_update(), and is saved with the engine."""

    def __init__(self, engine: Any, **options: Any) -> None:
        super().__init__(engine, **options)
        self._has_stepped = False

    def update(self) -> None:
        """Averages what the last step has made of the masters."""
        self._update()

    def take_step(self) -> bool:
        """Whether the engine has applied a step since this was asked last."""
        has_stepped, self._has_stepped = self._has_stepped, False
        return has_stepped

    def refuse_unless_of(self, engine: object) -> None:
        """Raises RuntimeError where the model has another engine by now, as it has after fit."""
        if engine is not self._engine:
            raise RuntimeError(
                "fused_ema.hooks.lightning.EMA: the model has another engine than in fit, which "
                "can't be given the average; choose deploy='ema', or evaluate a checkpoint "
                "(ckpt_path=)"
            )

    def let_go(self) -> None:
        """Ends it; the engine's weights stay what they are."""
        self._aside = None
        self.remove()

    def load(self, path: str | os.PathLike[str]) -> None:
        """Goes on from a checkpoint that the strategy has saved; raises as load_checkpoint()."""
        self.load_checkpoint(path, _TAG)

    def _on_step(self) -> None:
        self._has_stepped = True

    @contextmanager
    def _saving(self, save_dir: str | os.PathLike[str], tag: object) -> Iterator[None]:
        # After fit the weights hold the average for good; what is saved are the raw ones.
        is_swapped = self.is_swapped
        if is_swapped:
            list(self._held.pieces())  # Raises where the model has left the engine's memory.
            self.swap()
        try:
            # First: when the engine's files are complete, which its barrier says, these are.
            self.save_checkpoint(save_dir, tag)
            yield
        finally:
            if is_swapped:
                self.swap()


def is_saved_in(path: str | os.PathLike[str]) -> bool:
    """Whether a checkpoint of the strategy has an average."""
    return EngineEMA.is_saved_in(path, _TAG)


@torch.no_grad()
def load_into(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes the average of a checkpoint into a model whose engine has no masters.

    Raises:
        ValueError: No complete average, or one that doesn't fit; nothing is written then.
    """
    states = _engine_state.read(_engine_state.paths_in(os.fspath(path), _TAG, 0))
    members = {member.name: member for member in _tracking.read(model).members}
    saved = _names_in(states[0])
    params = {
        name: m.tensor
        for name, m in members.items()
        if not m.is_buffer and (m.tensor.requires_grad or name in saved)
    }
    buffers = {n: m.tensor for n, m in members.items() if m.is_buffer and n in saved}
    gathered = required("deepspeed.runtime.zero", "deepspeed", "deepspeed").GatheredParameters
    for name, values in _engine_state.whole(states, params, buffers):
        tensor = members[name].tensor
        # Of ZeRO-3 one parameter at a time is brought together, and rank 0's is parted again.
        with gathered([tensor] if name in params else [], modifier_rank=0):
            _storage.copy([tensor.detach()], [values.to(tensor.device)])


def _names_in(state: Any) -> set[str]:
    if not isinstance(state, Mapping):
        return set()
    return {*state.get("shapes", ()), *state.get("buffers", ())}
