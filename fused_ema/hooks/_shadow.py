"""Averages beside a model, without its names: lists of shadow parameters, and copies of modules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fused_ema import _storage, ops
from fused_ema._checks import number
from fused_ema._foreach import DTYPE_PAIRS
from fused_ema.hooks import _pairs

_NUM_SHOWN = 8


def checked_decay(where: str, name: str, value: float) -> float:
    """A decay in [0, 1]; ValueError otherwise, TypeError where it is no number."""
    decay = number(where, name, value)
    if not 0 <= decay <= 1:  # False for NaN too.
        raise ValueError(
            f"fused_ema.{where}: {name} is {value}; it is the weight of the old value and must be "
            "in [0, 1]"
        )
    return decay


def list_of_tensors(
    where: str, parameters: Iterable[Tensor], name: str = "parameters"
) -> list[Tensor]:
    """The parameters as a list.

    Raises:
        TypeError: A module, or not an iterable of tensors.
    """
    if isinstance(parameters, (nn.Module, Tensor)) or not isinstance(parameters, Iterable):
        raise TypeError(
            f"fused_ema.{where}: {name} is a {type(parameters).__name__}; pass an iterable of "
            "tensors, such as model.parameters()"
        )
    listed = list(parameters)
    for index, tensor in enumerate(listed):
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"fused_ema.{where}: {name}[{index}] is a {type(tensor).__name__}; pass "
                "tensors only, such as model.parameters()"
            )
    return listed


class ShadowParams:
    """A list of averages for a list of parameters, pair by pair, and values stored beside them.

    It keeps no reference to the parameters, so that the model can go.

    Args:
        where: The class's name in error messages, without ``fused_ema.``.
        parameters: Cloned.
    """

    def __init__(self, where: str, parameters: Iterable[Tensor]) -> None:
        self._where = where
        listed = list_of_tensors(where, parameters)
        if not listed:
            raise ValueError(
                f"fused_ema.{where}: there are no parameters; pass model.parameters() itself, "
                "since an iterator that was used up is empty"
            )
        with torch.inference_mode(False), torch.no_grad():
            self._shadow = [p.detach().clone() for p in listed]
        self._marks = _storage.make_marks()
        self._stored: list[Tensor] | None = None
        # While the parameters hold the averages: those, and the raw values.
        self._swapped: tuple[list[Tensor], list[Tensor]] | None = None

    # ---- what it holds

    @property
    def shadow_params(self) -> list[Tensor]:
        """The averages, in the parameters' order; in average_parameters() the parameters' own.

        May be assigned: as many tensors of the same shapes, which are kept as they are.
        """
        return self._averages()

    @shadow_params.setter
    def shadow_params(self, tensors: Iterable[Tensor]) -> None:
        self._shadow = self._assigned("shadow_params", tensors)

    def _assigned(self, name: str, tensors: Iterable[Tensor]) -> list[Tensor]:
        """What is assigned to an attribute, checked; a list stays the same object."""
        self._refuse_if_swapped(name)
        listed = list_of_tensors(self._where, tensors, name)
        _check_fit(self._where, name, listed, self._shadow)
        return tensors if isinstance(tensors, list) else listed

    def _set_kept(self, name: str, tensors: Iterable[Tensor] | None) -> None:
        self._refuse_if_swapped(name)
        self._stored = None if tensors is None else self._assigned(name, tensors)

    def __getstate__(self) -> dict[str, Any]:
        # Of a copy nobody would bring the raw values back: it has them stored, as in state_dict().
        averages, kept = self._averages(), self._kept()
        return {**vars(self), "_shadow": averages, "_stored": kept, "_swapped": None}

    def _averages(self) -> list[Tensor]:
        return self._shadow if self._swapped is None else self._swapped[0]

    def _kept(self) -> list[Tensor] | None:
        return self._stored if self._swapped is None else self._swapped[1]

    def _refuse_if_swapped(self, op: str) -> None:
        if self._swapped is not None:
            raise RuntimeError(
                f"fused_ema.{self._where}.{op}: the parameters hold the averages; leave "
                "average_parameters() first"
            )

    def _fitting(self, op: str, parameters: Iterable[Tensor]) -> list[Tensor]:
        """The parameters as a list.

        Raises:
            TypeError: As list_of_tensors.
            ValueError: Another number than there are averages, or other shapes: all in one error.
        """
        where = f"{self._where}.{op}"
        listed = list_of_tensors(where, parameters)
        _check_fit(where, "parameters", listed, self._shadow)
        return listed

    # ---- moving values

    def _average(
        self, op: str, parameters: Iterable[Tensor], momentum: float, copies_frozen: bool = False
    ) -> None:
        """Averages floating-point and complex parameters and copies others.

        Args:
            op: The caller, for error messages.
            parameters: As of _fitting, which says what is raised.
            momentum: The weight of the new value.
            copies_frozen: Copy those too that require no gradient.
        """
        listed = list_of_tensors(f"{self._where}.{op}", parameters)
        if not (copies_frozen and any(not p.requires_grad for p in listed)):
            try:  # It checks its lists before it writes: most of the time that is all there is.
                ops._update(self._shadow, listed, momentum)
                return
            except (TypeError, ValueError):
                pass
        averaged: list[tuple[Tensor, Tensor]] = []
        converted: list[tuple[Tensor, Tensor]] = []
        copied: list[tuple[Tensor, Tensor]] = []
        for index, (s, p) in enumerate(zip(self._shadow, self._fitting(op, listed), strict=True)):
            is_copied = copies_frozen and not p.requires_grad
            if s.is_complex():  # As twice as many real numbers.
                s, p = map(torch.view_as_real, (s, p.detach().to(s.dtype).resolve_conj()))
            elif p.is_complex():
                raise TypeError(
                    f"fused_ema.{self._where}.{op}: parameters[{index}] is {p.dtype} but its "
                    f"average is {s.dtype}, which can't hold it; make it of these parameters anew"
                )
            if not s.is_floating_point() or is_copied:
                copied.append((s, p.detach()))
            elif s.device == p.device and (s.dtype, p.dtype) in DTYPE_PAIRS:
                averaged.append((s, p))
            else:
                converted.append((s, p))
        try:
            ops._update([s for s, _ in averaged], [p for _, p in averaged], momentum)
        except ValueError:
            # Tensors overlap: one that stands in a list twice, say. As a loop would do it.
            checked_decay(f"{self._where}.{op}", "decay", 1 - momentum)
            with torch.no_grad():
                for s, p in averaged:
                    s.lerp_(p.to(s.dtype), momentum)
        for s, p in converted:  # One at a time, so that no second model is in memory.
            ops._update([s], [p.detach().to(s.device, s.dtype)], momentum)
        _copy_in_order([s for s, _ in copied], [p for _, p in copied])

    def _copy_to(self, params: Sequence[Tensor]) -> None:
        # While swapped an average is its parameter.
        pairs = [
            (p.detach(), s)
            for s, p in zip(self._averages(), params, strict=True)
            if not _storage.is_same_memory(s, p)
        ]
        _copy_in_order([p for p, _ in pairs], [s for _, s in pairs])

    def _restore(self, params: Sequence[Tensor]) -> None:
        if self._stored is None:
            raise RuntimeError(
                f"fused_ema.{self._where}.restore: nothing is stored; call store() before copy_to()"
            )
        _copy_in_order([p.detach() for p in params], self._stored)

    @contextmanager
    def _averages_in(self, params: Sequence[Tensor]) -> Iterator[None]:
        """The parameters hold the averages inside, and their own values again after it."""
        self._refuse_if_swapped("average_parameters")
        swap = _Swap(params, self._shadow, self._marks)
        try:
            swap.into_params()
            self._swapped = swap.averages, swap.raw
            yield
        finally:
            try:
                swap.out_of_params()
            finally:
                self._swapped = None

    def to(
        self,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        non_blocking: bool = False,
    ) -> None:
        """Moves or converts the averages and what is stored; integer tensors keep their dtype.

        Args:
            device: None for where each is.
            dtype: None for what each has. A wider one than the parameters' is kept by every later
                call; the parameters then get rounded values.
            non_blocking: As in ``Tensor.to``.

        Raises:
            RuntimeError: The parameters hold the averages.
        """
        self._refuse_if_swapped("to")

        def moved(tensors: list[Tensor]) -> list[Tensor]:
            with torch.inference_mode(False):
                return [
                    t.to(device, dtype if t.is_floating_point() else None, non_blocking)
                    for t in tensors
                ]

        shadow, stored = moved(self._shadow), self._stored and moved(self._stored)
        self._shadow, self._stored = shadow, stored

    # ---- states

    def _listed_in_state(self, state: Mapping[str, Any], key: str) -> list[Tensor]:
        """A list of tensors of a state, checked against what is averaged here."""
        where, tensors = f"{self._where}.load_state_dict", state[key]
        if not isinstance(tensors, (list, tuple)) or not all(
            isinstance(t, Tensor) for t in tensors
        ):
            raise ValueError(
                f"fused_ema.{where}: '{key}' is a {type(tensors).__name__}, or holds something "
                "else than tensors; pass what state_dict() returned"
            )
        _check_fit(where, key, tensors, self._shadow)
        for index, (tensor, s) in enumerate(zip(tensors, self._shadow, strict=True)):
            if tensor.is_floating_point() != s.is_floating_point():
                raise ValueError(
                    f"fused_ema.{where}: {key}[{index}] is {tensor.dtype} but {s.dtype} here; "
                    "load a state of the same model. Nothing was changed"
                )
        return list(tensors)


def own(
    tensors: Sequence[Tensor],
    devices: Sequence[torch.device | None],
    dtypes: Sequence[torch.dtype | None],
) -> list[Tensor]:
    """Copies of tensors that are somebody else's; one that stands there twice is copied once."""
    wanted = list(zip(tensors, devices, dtypes, strict=True))
    with torch.inference_mode(False), torch.no_grad():
        made = {
            (id(t), device, dtype): t.detach().to(device, dtype, copy=True)
            for t, device, dtype in {(id(t), d, y): (t, d, y) for t, d, y in wanted}.values()
        }
    return [made[id(t), device, dtype] for t, device, dtype in wanted]


def _copy_in_order(dst: Sequence[Tensor], src: Sequence[Tensor]) -> None:
    """Copies pair by pair: of a tensor that stands in the list twice the last copy stays."""
    try:
        _storage.copy(dst, src)  # It says what overlaps before it writes.
    except ValueError:
        with torch.no_grad():
            for d, s in zip(dst, src, strict=True):
                d.copy_(s)


def _check_fit(where: str, what: str, given: Sequence[Tensor], here: Sequence[Tensor]) -> None:
    if len(given) != len(here):
        raise ValueError(
            f"fused_ema.{where}: {what} holds {len(given)} tensors but {len(here)} are averaged; "
            "pass those of the same model, in the same order (an iterator can be used once). "
            "Nothing was changed"
        )
    problems = [
        f"{what}[{i}] has shape {list(g.shape)} but its average has {list(h.shape)}"
        for i, (g, h) in enumerate(zip(given, here, strict=True))
        if g.shape != h.shape
    ]
    if problems:
        more = len(problems) - _NUM_SHOWN
        raise ValueError(
            f"fused_ema.{where}: these are the tensors of another model, or not whole; nothing was "
            "changed:\n  "
            + "\n  ".join(problems[:_NUM_SHOWN] + ([f"and {more} more"] if more > 0 else []))
        )


class _Swap:
    """Averages in the parameters and back: exchanged where that is exact, else with a copy."""

    def __init__(
        self, params: Sequence[Tensor], shadow: Sequence[Tensor], marks: tuple[Tensor, Tensor]
    ) -> None:
        seen: set[int] = set()
        self._params = list(params)
        # Aliases: where a parameter moves meanwhile, what was swapped in is still found.
        self._aliases = [p.detach() for p in params]
        self.averages, self.raw = list(shadow), list(shadow)
        self._exchanged: list[int] = []
        self._aside: list[int] = []
        # An average that is another one's memory, or a parameter's, can't be exchanged.
        places = [s.data_ptr() for s in shadow if s.numel() > 0]
        live = {alias.data_ptr() for alias in self._aliases if alias.numel() > 0}
        are_apart = len(set(places)) == len(places) and live.isdisjoint(places)
        for i, (alias, s) in enumerate(zip(self._aliases, shadow, strict=True)):
            # A tied parameter that is given twice has two averages, but one memory.
            is_first = alias.numel() == 0 or alias.data_ptr() not in seen
            seen.add(alias.data_ptr())
            is_same = alias.dtype == s.dtype and alias.device == s.device
            if is_first and is_same and are_apart:
                self._exchanged.append(i)
                self.averages[i] = alias
            else:
                self._aside.append(i)
        with torch.inference_mode(False):
            for i in self._aside:
                self.raw[i] = self._aliases[i].clone()
        self._shadow, self._marks, self._is_in = list(shadow), marks, False

    def _exchange(self) -> None:
        exchange = _storage.Exchange(
            [self._shadow[i] for i in self._exchanged],
            [self._aliases[i] for i in self._exchanged],
            None,
            self._marks,
        )
        was_in = self._is_in
        try:
            exchange.run()
            self._is_in = not was_in
        except BaseException:
            exchange.undo()
            self._is_in = was_in
            raise

    def into_params(self) -> None:
        self._exchange()
        _copy_in_order(
            [self._aliases[i] for i in self._aside], [self._shadow[i] for i in self._aside]
        )

    def out_of_params(self) -> None:
        try:
            self._take_out()
        except (KeyboardInterrupt, SystemExit):
            self._take_out()  # What was out already stays out.
            raise

    def _take_out(self) -> None:
        if self._is_in:
            self._exchange()
        back = [(self._aliases[i], self.raw[i]) for i in self._aside]
        back += [
            (p.detach(), alias)
            for p, alias in zip(self._params, self._aliases, strict=True)
            if not _storage.is_same_memory(p, alias)
        ]
        _copy_in_order([d for d, _ in back], [s for _, s in back])


class ModuleCopy(nn.Module):
    """A module that holds the averaged copy of another one.

    Attributes:
        module: The averaged copy; it computes when this module is called.
    """

    module: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the averaged module computes."""
        return self.module(*args, **kwargs)

    def _follow(self) -> None:
        """Makes what finds the pairs; called again where the module is another one."""
        raise NotImplementedError

    # What finds the pairs holds on to memory, so it can't be copied or pickled.
    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if not isinstance(v, _pairs.Follower)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._follow()
