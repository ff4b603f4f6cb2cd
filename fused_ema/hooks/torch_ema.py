"""A drop-in for ``torch_ema``; torch_ema itself isn't needed.

ema = fused_ema.hooks.torch_ema.ExponentialMovingAverage(model.parameters(), decay=0.995)
ema.update()  # after each optimizer.step()
with ema.average_parameters():
    evaluate(model)
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fused_ema import _checks
from fused_ema.hooks import _shadow

_WHERE = "hooks.torch_ema.ExponentialMovingAverage"
_KEYS = ("decay", "num_updates", "shadow_params", "collected_params")


def _gone() -> None:
    """Stands for the reference to a parameter that isn't there."""


class ExponentialMovingAverage(_shadow.ShadowParams):
    """torch_ema's ``ExponentialMovingAverage`` with all parameters in one call.

    ``shadow = shadow - (1 - d) * (shadow - param)`` with ``d = min(decay, (1 + n) / (10 + n))`` at
    update n from 1, or ``decay`` itself without ``use_num_updates`` (torch_ema, ``update``). It is
    computed as a lerp with one rounding where torch_ema rounds three times, so the bits may differ
    from torch_ema's in the last place.

    Parameters are held by weak references, so the model can go. States can be loaded by torch_ema,
    and the other way round. A copy averages the same parameters. A pickle (``torch.save``), which
    torch_ema refuses, has none: pass parameters to the methods of what is loaded.

    Different from torch_ema: :meth:`average_parameters` exchanges values in place where the dtypes
    agree, allocates nothing for them, and leaves what :meth:`store` stored alone; in it, what is
    written to a parameter goes into its average, and :meth:`update`, :meth:`store`,
    :meth:`restore`, :meth:`to` and loading are errors. A loaded state keeps a wider dtype than the
    parameters' (torch_ema casts it back). Tensors of integers are copied. Lists that don't fit are
    errors, shapes included.

    Args:
        parameters: Cloned; an iterable of tensors.
        decay: The weight of the old value, in [0, 1].
        use_num_updates: Lower the decay for the first updates.

    Attributes:
        decay: As given.
        num_updates: Updates so far; None without ``use_num_updates``.

    Raises:
        TypeError: Not an iterable of tensors; a decay that is no number.
        ValueError: No parameters, as from an iterator that was used up; a decay outside of [0, 1].
    """

    def __init__(
        self, parameters: Iterable[Tensor], decay: float, use_num_updates: bool = True
    ) -> None:
        self.decay = _shadow.checked_decay(_WHERE, "decay", decay)
        self.num_updates: int | None = 0 if use_num_updates else None
        listed = _shadow.list_of_tensors(_WHERE, parameters)
        super().__init__(_WHERE, listed)
        self._refs: list[Callable[[], Tensor | None]] = [weakref.ref(p) for p in listed]

    @property
    def collected_params(self) -> list[Tensor] | None:
        """What :meth:`store` stored; in average_parameters() the parameters' own values.

        May be assigned: None, or as many tensors of the averages' shapes.
        """
        return self._kept()

    @collected_params.setter
    def collected_params(self, tensors: Iterable[Tensor] | None) -> None:
        self._set_kept("collected_params", tensors)

    def __getstate__(self) -> dict[str, Any]:
        # Weak references can't be saved; whoever loads it has other parameters anyway.
        return {**super().__getstate__(), "_refs": [_gone] * len(self._refs)}

    def __copy__(self) -> ExponentialMovingAverage:
        # As with torch_ema a copy averages the same parameters.
        made = type(self).__new__(type(self))
        made.__dict__.update(super().__getstate__())
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> ExponentialMovingAverage:
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        made._refs = list(self._refs)
        return made

    def _given(self, op: str, parameters: Iterable[Tensor] | None) -> list[Tensor]:
        return self._fitting(op, self._alive(op) if parameters is None else parameters)

    def _alive(self, op: str) -> list[Tensor]:
        known = [ref() for ref in self._refs]
        alive = [p for p in known if p is not None]
        if len(alive) < len(known):
            raise ValueError(
                f"fused_ema.{_WHERE}.{op}: {len(known) - len(alive)} of the {len(known)} "
                "parameters no longer exist, or this was loaded without them; keep the model, or "
                "pass parameters"
            )
        return alive

    def update(self, parameters: Iterable[Tensor] | None = None) -> None:
        """Takes the parameters' values into the averages; after each optimizer step.

        Args:
            parameters: None for those it was made with.

        Raises:
            TypeError: Not an iterable of tensors.
            ValueError: Another number of tensors, or other shapes; parameters that no longer exist.
            RuntimeError: Inside of :meth:`average_parameters`.

            Nothing has changed when an error is raised.
        """
        self._refuse_if_swapped("update")
        given = self._alive("update") if parameters is None else parameters
        decay, num_updates = self.decay, self.num_updates
        if num_updates is not None:
            num_updates += 1
            decay = min(decay, (1 + num_updates) / (10 + num_updates))
        self._average("update", given, 1.0 - decay)
        self.num_updates = num_updates

    def copy_to(self, parameters: Iterable[Tensor] | None = None) -> None:
        """Copies the averages into parameters, rounded to their dtype.

        Args:
            parameters: None for those it was made with.

        Raises:
            TypeError: As :meth:`update`.
            ValueError: As :meth:`update`.
        """
        self._copy_to(self._given("copy_to", parameters))

    def store(self, parameters: Iterable[Tensor] | None = None) -> None:
        """Keeps copies of the parameters' values for :meth:`restore`.

        Args:
            parameters: None for those it was made with.

        Raises:
            TypeError: As :meth:`update`.
            ValueError: As :meth:`update`.
            RuntimeError: Inside of :meth:`average_parameters`.
        """
        self._refuse_if_swapped("store")
        listed = self._given("store", parameters)
        self._stored = _shadow.own(listed, [None] * len(listed), [None] * len(listed))

    def restore(self, parameters: Iterable[Tensor] | None = None) -> None:
        """Copies what :meth:`store` kept into the parameters; it is kept on.

        Args:
            parameters: None for those it was made with.

        Raises:
            TypeError: As :meth:`update`.
            ValueError: As :meth:`update`.
            RuntimeError: Nothing is stored; inside of :meth:`average_parameters`.
        """
        self._refuse_if_swapped("restore")
        self._restore(self._given("restore", parameters))

    @contextmanager
    def average_parameters(self, parameters: Iterable[Tensor] | None = None) -> Iterator[None]:
        """The parameters hold the averages inside, and their own values again after it.

        Whatever is raised inside, the values come back. Nothing is allocated where shadow and
        parameter have one dtype and device; others are set aside.

        Args:
            parameters: None for those it was made with.

        Raises:
            TypeError: As :meth:`update`.
            ValueError: As :meth:`update`.
            RuntimeError: Inside of another.
        """
        with self._averages_in(self._given("average_parameters", parameters)):
            yield

    def state_dict(self) -> dict[str, Any]:
        """The state: decay, num_updates, shadow_params and collected_params, as torch_ema's.

        The tensors are the live ones. In average_parameters() the averages stand under
        ``shadow_params``, and the parameters' own values under ``collected_params``.
        """
        return {
            "decay": self.decay,
            "num_updates": self.num_updates,
            "shadow_params": self.shadow_params,
            "collected_params": self.collected_params,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over a state of this class or of torch_ema's.

        Averages go to their parameter's device, where that still exists. Their dtype is the wider
        one of the state's and the one here.

        Args:
            state_dict: What ``state_dict()`` returned, on any device.

        Raises:
            TypeError: Not a dictionary; a decay that is no number.
            ValueError: Missing keys, another number of tensors, or other shapes; a decay outside of
                [0, 1], or a count below 0.
            RuntimeError: Inside of :meth:`average_parameters`.

            Nothing has changed when an error is raised.
        """
        where = f"{_WHERE}.load_state_dict"
        self._refuse_if_swapped("load_state_dict")
        if not isinstance(state_dict, Mapping):
            raise TypeError(
                f"fused_ema.{where}: state_dict is a {type(state_dict).__name__}; pass a dictionary"
            )
        missing = [key for key in _KEYS if key not in state_dict]
        if missing:
            raise ValueError(
                f"fused_ema.{where}: {', '.join(missing)} missing in the state, which has "
                f"{', '.join(map(str, state_dict)) or 'nothing'}; pass what state_dict() returned"
            )
        decay = _shadow.checked_decay(where, "decay", state_dict["decay"])
        num_updates = state_dict["num_updates"]
        if num_updates is not None:
            num_updates = _checks.count(where, "num_updates", num_updates, 0)
        shadow = self._listed_in_state(state_dict, "shadow_params")
        kept = state_dict["collected_params"]
        stored = None if kept is None else self._listed_in_state(state_dict, "collected_params")
        params = [ref() for ref in self._refs]
        devices = [
            s.device if p is None else p.device for p, s in zip(params, self._shadow, strict=True)
        ]
        wider = [
            torch.promote_types(given.dtype, here.dtype)
            for given, here in zip(shadow, self._shadow, strict=True)
        ]
        shadow = _shadow.own(shadow, devices, wider)
        if stored is not None:
            stored = _shadow.own(stored, devices, [None] * len(stored))
        self.decay, self.num_updates = decay, num_updates
        self._shadow, self._stored = shadow, stored
