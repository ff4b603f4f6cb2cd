"""The tensors of an averaged copy of a model, each with the one of the model that it follows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fused_ema import _storage, _tracking
from fused_ema.ops import Form
from fused_ema.plan import Plan


class Pairs:
    """Two lists of tensors, pair by pair of one shape, worked out for many updates.

    A pair that stands twice in the lists (tied tensors) counts once.

    Args:
        averaged: The averages, on any device.
        live: The model's tensors.
        names: A name for each pair, for error messages.

    Attributes:
        others: Pairs that aren't floating-point ones.

    Raises:
        TypeError: A floating-point pair whose dtypes can't be averaged.
        ValueError: Lengths or shapes differ, or tensors overlap.
    """

    def __init__(
        self, averaged: Sequence[Tensor], live: Sequence[Tensor], names: Sequence[str]
    ) -> None:
        unique = {
            (id(a), id(b)): (a, b, name) for a, b, name in zip(averaged, live, names, strict=True)
        }
        self._all = list(unique.values())
        for a, b, name in self._all:
            if a.shape != b.shape:
                raise ValueError(
                    f"fused_ema.hooks: '{name}' has shape {list(b.shape)} in the model but "
                    f"{list(a.shape)} in its averaged copy; average the model that it was made from"
                )
        floats = [pair for pair in self._all if pair[0].is_floating_point()]
        self.others = [(a, b) for a, b, _ in self._all if not a.is_floating_point()]
        # Where a param is on another device than its average: room for its values there.
        away = [(a, b) for a, b, _ in floats if a.device != b.device]
        with torch.inference_mode(False):
            stages = {id(b): torch.empty_like(b, device=a.device) for a, b in away}
        self._staged = [(stages[id(b)], b) for _, b in away]
        self._plan = Plan(
            [a for a, _, _ in floats],
            [stages.get(id(b), b) for _, b, _ in floats],
            [name for _, _, name in floats],
        )
        self._marks = _storage.make_marks()

    def update(self, momentum: float, form: Form) -> None:
        """Averages the floating-point pairs."""
        if self._staged:
            _storage.copy([stage for stage, _ in self._staged], [b for _, b in self._staged])
        self._plan._update(momentum, form)

    def copy(self) -> None:
        """Copies every tensor of the model into its average."""
        _storage.copy([a for a, _, _ in self._all], [b for _, b, _ in self._all])

    def copy_others(self) -> None:
        """The same for those that aren't floating-point ones."""
        _storage.copy([a for a, _ in self.others], [b for _, b in self.others])

    def swap(self) -> None:
        """Exchanges every pair; each side is rounded to the other's dtype where they differ."""
        if self._staged or any(a.dtype != b.dtype or a.device != b.device for a, b, _ in self._all):
            raise RuntimeError(
                "fused_ema.hooks: averages of another dtype or on another device than the model's "
                "can't be exchanged with it in place; use fused_ema.EMAManager, which sets the raw "
                "weights aside"
            )
        averaged, live = [a for a, _ in self.others], [b for _, b in self.others]
        exchange = _storage.Exchange(averaged, live, self._plan, self._marks)
        try:
            exchange.run()
        except BaseException:
            exchange.undo()
            raise


class Follower:
    """Finds the pairs of an averaged module and a model, again where either holds other tensors.

    Args:
        averaged: The averaged module.
        tensors_of: A module's tensors by name, in an order that is the same for both.
    """

    def __init__(
        self, averaged: nn.Module, tensors_of: Callable[[nn.Module], Sequence[tuple[str, Tensor]]]
    ) -> None:
        self._averaged = averaged
        self._tensors_of = tensors_of
        self._model: nn.Module | None = None
        self._trees: tuple[_tracking.Tree, ...] = ()
        self._pairs = Pairs([], [], [])

    def is_of_another(self, averaged: nn.Module) -> bool:
        """Whether that is another averaged module than the one it was made for."""
        return self._averaged is not averaged

    def pairs(self, model: nn.Module) -> Pairs:
        """The pairs with this model.

        Raises:
            TypeError: As Pairs.
            ValueError: As Pairs; the two have different numbers of tensors.
        """
        is_known = model is self._model and all(tree.is_current_so_far() for tree in self._trees)
        if not is_known:
            averaged, live = self._tensors_of(self._averaged), self._tensors_of(model)
            if len(averaged) != len(live):
                raise ValueError(
                    f"fused_ema.hooks: the averaged model has {len(averaged)} tensors but the "
                    f"model has {len(live)}; average the model that it was made from"
                )
            self._pairs = Pairs(
                [t for _, t in averaged], [t for _, t in live], [name for name, _ in live]
            )
            self._trees = _tracking.read(self._averaged), _tracking.read(model)
            self._model = model
        return self._pairs
