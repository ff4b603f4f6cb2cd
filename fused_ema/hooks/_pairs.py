"""The tensors of an averaged copy of a model, each with the one of the model that it follows."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn

from fused_ema import _repeat, _storage, _tracking, ops
from fused_ema._foreach import DTYPE_PAIRS
from fused_ema._slots import is_alike
from fused_ema.ops import Form
from fused_ema.plan import Plan


class Pairs:
    """Two lists of tensors, pair by pair of one shape, worked out for many updates.

    A pair that stands twice in the lists (tied tensors) counts once.

    Args:
        averaged: The averages, on any device.
        live: The model's tensors.
        names: A name for each pair, for error messages.
        only_copied: They are never averaged, so their dtypes don't matter.
        converts: Leave to torch the pairs of floating-point dtypes that can't be averaged, and with
            ``mul_add`` 16-bit averages where any pair is of two dtypes: they get the bits of
            ``torch._foreach_mul_`` and ``_foreach_add_``, with ``two_products`` those of three
            operations of torch, and with ``lerp`` those of a param that was converted.

    Attributes:
        dtypes: Of the floating-point pairs: each average's and its param's.

    Raises:
        TypeError: A floating-point pair whose dtypes can't be averaged.
        ValueError: Lengths or shapes differ, or tensors overlap.
    """

    def __init__(
        self,
        averaged: Sequence[Tensor],
        live: Sequence[Tensor],
        names: Sequence[str],
        only_copied: bool = False,
        converts: bool = False,
    ) -> None:
        unique = {
            (id(a), id(b)): (a, b, name) for a, b, name in zip(averaged, live, names, strict=True)
        }
        self._all = list(unique.values())
        self._places = {pair: place for place, pair in enumerate(unique)}
        _check_shapes(self._all)
        floats = [i for i, (a, _, _) in enumerate(self._all) if a.is_floating_point()]
        self._others = [i for i, (a, _, _) in enumerate(self._all) if not a.is_floating_point()]
        self.dtypes = frozenset((self._all[i][0].dtype, self._all[i][1].dtype) for i in floats)
        torchs = [converts and self._is_torchs(i) for i in floats]
        self._converted = list(compress(floats, torchs))
        served = [i for i, is_torchs in zip(floats, torchs, strict=True) if not is_torchs]
        # Those that are in the plan, and those that aren't.
        self._planned, self._loose = ([], served) if only_copied else (served, [])
        # Where a param is on another device than its average: room for its values there.
        self._stages: dict[int, Tensor] = {}
        for i in self._planned:
            a, b, _ = self._all[i]
            if a.device != b.device:
                with torch.inference_mode(False):
                    self._stages[i] = torch.empty_like(b, device=a.device)
        self._plan = self._make_plan()
        self._narrow: tuple[object, bool] | None = None
        self._marks = _storage.make_marks()

    @property
    def are_mixed(self) -> bool:
        """Whether an average has another dtype than its param."""
        return any(a != b for a, b in self.dtypes)

    def are_narrow_on_cpu(self) -> bool:
        """Whether any average has 16 bits and lies in the host's memory."""
        # Modules are converted and moved whole, so one tensor tells of it.
        first = self._all[0][0] if self._all else None
        state = self._plan._num_refreshes, first is not None and (first.dtype, first.device)
        if self._narrow is None or self._narrow[0] != state:
            is_any = any(a.itemsize == 2 and a.device.type == "cpu" for a, _ in self.floats)
            self._narrow = state, is_any
        return self._narrow[1]

    def _is_torchs(self, place: int) -> bool:
        a, b, _ = self._all[place]
        is_served = (a.dtype, b.dtype) in DTYPE_PAIRS
        # Of torch's lists 1 - m is rounded to the average's dtype, of its tensors it isn't.
        return b.is_floating_point() and (not is_served or (self.are_mixed and a.itemsize < 4))

    def _make_plan(self) -> Plan:
        return Plan(
            [self._all[i][0] for i in self._planned],
            self._sources(self._planned),
            [self._all[i][2] for i in self._planned],
        )

    def _sources(self, at: Sequence[int]) -> list[Tensor]:
        return [self._stages.get(i, self._all[i][1]) for i in at]

    def place_of(self, ids: tuple[int, int]) -> int:
        """Where a pair of the tensors that this was made of stands, by their ids."""
        return self._places[ids]

    def with_others(self, changes: Mapping[int, tuple[Tensor | None, Tensor | None]]) -> Pairs:
        """The same with other tensors in a few pairs, of the same shapes, dtypes and devices.

        Those are no part of the plan any longer, since they may change again in every step.

        Args:
            changes: By place, the new average and the new tensor of the model; None as before.
        """
        made = copy.copy(self)
        made._all = list(self._all)
        for i, (averaged, live) in changes.items():
            a, b, name = made._all[i]
            made._all[i] = (a if averaged is None else averaged, b if live is None else live, name)
        leaving = [i for i in self._planned if i in changes]
        if leaving:
            made._planned = [i for i in self._planned if i not in changes]
            made._loose = self._loose + leaving
            made._plan = made._make_plan()
        return made

    @property
    def floats(self) -> list[tuple[Tensor, Tensor]]:
        """Floating-point pairs."""
        return [(a, b) for a, b, _ in self._all if a.is_floating_point()]

    @property
    def others(self) -> list[tuple[Tensor, Tensor]]:
        """Pairs that aren't floating-point ones."""
        return [self._all[i][:2] for i in self._others]

    def update(self, momentum: float, form: Form) -> None:
        """Averages the floating-point pairs."""
        if self._stages:
            staged = self._stages.items()
            _storage.copy([stage for _, stage in staged], [self._all[i][1] for i, _ in staged])
        if self._loose or self._converted:
            # All that may be wrong comes before the first write.
            _check_shapes([self._all[i] for i in self._converted])
            self._plan._check()
        if self._loose:
            averaged = [self._all[i][0] for i in self._loose]
            ops._update(averaged, self._sources(self._loose), momentum, form)
        self._plan._update(momentum, form)
        if self._converted:
            self._update_converted(momentum, form)

    @torch.no_grad()
    def _update_converted(self, momentum: float, form: Form) -> None:
        pairs = [self._all[i][:2] for i in self._converted]
        if form == "mul_add":
            averaged = [a.detach() for a, _ in pairs]
            torch._foreach_mul_(averaged, 1 - momentum)
            live = [b.detach().to(a.device) for a, b in pairs]
            torch._foreach_add_(averaged, live, alpha=momentum)
            return
        for a, b in pairs:  # One at a time, so that no second model is in memory.
            if form == "two_products":
                a.copy_((1 - momentum) * a + momentum * b.detach().to(a.device))
                continue
            ops._update([a], [b.detach().to(a.device, a.dtype)], momentum, form)

    def repeatable(self, form: Form, tree: tuple[Any, ...]) -> _repeat.Repeat | None:
        """The same as one call; None where there is more to do than the plan's.

        Args:
            form: Of the updates.
            tree: Dicts that must hold what they held, as Tree.watched.
        """
        if self._stages or self._loose or self._converted:
            return None
        return _repeat.repeat(self._plan, None, form, [tree])

    def copy(self) -> None:
        """Copies every tensor of the model into its average."""
        _storage.copy([a for a, _, _ in self._all], [b for _, b, _ in self._all])

    def copy_others(self) -> None:
        """The same for those that aren't floating-point ones."""
        others = self.others
        _storage.copy([a for a, _ in others], [b for _, b in others])

    def swap(self) -> None:
        """Exchanges every pair; each side is rounded to the other's dtype where they differ."""
        if self._stages or any(a.dtype != b.dtype or a.device != b.device for a, b, _ in self._all):
            raise RuntimeError(
                "fused_ema.hooks: averages of another dtype or on another device than the model's "
                "can't be exchanged with it in place; use fused_ema.EMAManager, which sets the raw "
                "weights aside"
            )
        pairs = [self._all[i][:2] for i in (*self._others, *self._loose, *self._converted)]
        averaged, live = [a for a, _ in pairs], [b for _, b in pairs]
        exchange = _storage.Exchange(averaged, live, self._plan, self._marks)
        try:
            exchange.run()
        except BaseException:
            exchange.undo()
            raise


def _check_shapes(pairs: Sequence[tuple[Tensor, Tensor, str]]) -> None:
    for a, b, name in pairs:
        if a.shape != b.shape:
            raise ValueError(
                f"fused_ema.hooks: '{name}' has shape {list(b.shape)} in the model but "
                f"{list(a.shape)} in its averaged copy; average the model that it was made from"
            )


@dataclass(eq=False)
class _Place:
    """A buffer's place in a module of one of the two sides.

    Attributes:
        owner: The dictionary that holds it.
        key: Its name there.
        tensor: What it held.
        side: 0 of the averaged module, 1 of the model.
        held: What the tree compares the dictionary with, and the position there.
        pair: Where it stands in the pairs; None where it is no part of them.
        is_alone: Whether nothing else holds the tensor.
    """

    owner: dict[str, Tensor | None]
    key: str
    tensor: Tensor | None
    side: int
    held: tuple[list[object], int]
    pair: int | None
    is_alone: bool

    def has_changed(self) -> bool:
        return self.owner.get(self.key) is not self.tensor


class Follower:
    """Finds the pairs of an averaged module and a model, again where either holds other tensors.

    A model may assign a buffer anew in every step: then only that one's pair is made anew.

    Args:
        averaged: The averaged module.
        tensors_of: A module's tensors by name, in an order that is the same for both.
        only_copied: As of Pairs.
        converts: As of Pairs.
        follows_passing: Follow those buffers too that aren't persistent.

    Attributes:
        num_found: How often all of the pairs were found anew.
    """

    def __init__(
        self,
        averaged: nn.Module,
        tensors_of: Callable[[nn.Module], Sequence[tuple[str, Tensor]]],
        *,
        only_copied: bool = False,
        converts: bool = False,
        follows_passing: bool = False,
    ) -> None:
        self._averaged = averaged
        self._tensors_of = tensors_of
        self._only_copied = only_copied
        self._converts = converts
        self._follows_passing = follows_passing
        self.num_found = 0
        self._model: nn.Module | None = None
        self._pairs = Pairs([], [], [])
        self._contents: list[tuple[dict[str, Any], list[object]]] = []
        self._tree = _tracking.Tree([], [])
        self._places: list[_Place] = []
        # Those that were assigned anew: the tree leaves them out, so they are asked one by one.
        self._moving: list[_Place] = []
        self._known: tuple[Counter[int], Counter[int]] = Counter(), Counter()

    def is_of_another(self, averaged: nn.Module) -> bool:
        """Whether that is another averaged module than the one it was made for."""
        return self._averaged is not averaged

    def pairs(self, model: nn.Module) -> Pairs:
        """The pairs with this model; another object where any tensor is another one.

        Raises:
            TypeError: As Pairs.
            ValueError: As Pairs; the two have different numbers of tensors.
        """
        if model is not self._model or not self._follow():
            self._model = None
            self._find(model)
            self._model = model
        return self._pairs

    def _follow(self) -> bool:
        """Takes over what was assigned anew; False where all has to be found again."""
        changed = [place for place in self._moving if place.has_changed()]
        if not self._tree.is_current_so_far():
            new = [place for place in self._places if place.has_changed()]
            for place in new:
                held, position = place.held
                held[position] = ...
            tree = _tracking.Tree([], self._contents)
            if not tree.is_current():
                return False
            self._tree = tree
            self._places = [place for place in self._places if place not in new]
            self._moving += new
            changed += new
        if changed:
            return self._rebind(changed)
        return True

    def _rebind(self, places: Sequence[_Place]) -> bool:
        changes: dict[int, list[Tensor | None]] = {}
        met: set[tuple[int, int]] = set()
        for place in places:
            was, now = place.tensor, place.owner.get(place.key)
            if not (place.is_alone and was is not None and now is not None and is_alike(was, now)):
                return False
            if id(now) in self._known[place.side] or (place.side, id(now)) in met:
                return False  # They are tied now.
            met.add((place.side, id(now)))
            if place.pair is not None:
                changes.setdefault(place.pair, [None, None])[place.side] = now
        for place in places:
            known = self._known[place.side]
            del known[id(place.tensor)]
            place.tensor = place.owner[place.key]
            known[id(place.tensor)] = 1
        self._pairs = self._pairs.with_others({i: (a, b) for i, (a, b) in changes.items()})
        return True

    def _find(self, model: nn.Module) -> None:
        sides = self._averaged, model
        averaged, live = map(self._tensors_of, sides)
        if len(averaged) != len(live):
            raise ValueError(
                f"fused_ema.hooks: the averaged model has {len(averaged)} tensors but the "
                f"model has {len(live)}; average the model that it was made from"
            )
        self._pairs = Pairs(
            [t for _, t in averaged],
            [t for _, t in live],
            [name for name, _ in live],
            self._only_copied,
            self._converts,
        )
        ids = [(id(a), id(b)) for (_, a), (_, b) in zip(averaged, live, strict=True)]
        pair_of = [{pair[side]: self._pairs.place_of(pair) for pair in ids} for side in (0, 1)]
        self._known = Counter(a for a, _ in ids), Counter(b for _, b in ids)
        self._contents, self._places, self._moving = [], [], []
        for side, root in enumerate(sides):
            self._watch(side, root, pair_of[side])
        self._tree = _tracking.Tree([], self._contents)
        self.num_found += 1

    def _watch(self, side: int, root: nn.Module, pair_of: Mapping[int, int]) -> None:
        modules = list(root.modules())
        # How often a tensor is owned: another one in the place of a tied one would untie it.
        owned = Counter(
            id(tensor)
            for module in modules
            for own in (module._parameters, module._buffers)
            for tensor in own.values()
        )
        for module in modules:
            for own in (module._parameters, module._buffers, module._modules):
                if not isinstance(own, dict):  # A ScriptModule's are none; they don't change.
                    continue
                held: list[object] = list(own.values())
                self._contents.append((own, held))
                if own is module._buffers:
                    self._places += self._places_in(module, side, held, owned, pair_of)

    def _places_in(
        self,
        module: nn.Module,
        side: int,
        held: list[object],
        owned: Counter[int],
        pair_of: Mapping[int, int],
    ) -> Iterator[_Place]:
        for position, (key, tensor) in enumerate(module._buffers.items()):
            known = id(tensor)
            is_followed = self._follows_passing and (tensor is None or known in pair_of)
            if key in module._non_persistent_buffers_set and not is_followed:
                held[position] = ...
                continue
            is_alone = owned[known] == 1 and self._known[side][known] <= 1
            pair = pair_of.get(known)
            yield _Place(module._buffers, key, tensor, side, (held, position), pair, is_alone)
