"""What to average in place of a model's own parameters: ``EMAManager(model, sources=...)``.

Where an optimizer keeps fp32 masters of bf16 or fp16 weights, or the rounding errors of their
steps, the average belongs to these: that of the weights themselves is off by their rounding. Each
function here finds them by the parameters, and follows them where ``optimizer.load_state_dict()``
makes new ones. What they don't know of a parameter, such as masters that the first step will make,
is read from the model: at that time both are the same.

A swap writes the average, rounded, into the model, and the raw weights back; it never writes a
source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor

from fused_ema import _native, _storage, _tracking
from fused_ema._shards import shard_of, with_shard
from fused_ema._sources import Feed, Sources
from fused_ema._tracking import Member, Watch
from fused_ema.plan import Plan

__all__ = ["Sources", "kahan_sums", "optimizer_state", "param_list"]


def optimizer_state(
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer], key: str
) -> Sources:
    """The masters that an optimizer keeps at ``optimizer.state[param][key]``.

    As Transformer Engine's FusedAdam does with ``master_weights=True``, under ``"master_param"``.
    They are averaged as they stand there: masters that are scaled, or split in two halves, are
    beyond this.

    Args:
        optimizer: The one whose state it is, or several that share the parameters.
        key: The name of the masters in the state.

    Raises:
        TypeError: Not an optimizer.
        ValueError: When the manager asks: the optimizer has made a step, and none of the model's
            parameters has the key.

    Example:
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
        >>> masters = fused_ema.sources.optimizer_state(optimizer, "master_param")
        >>> ema = fused_ema.EMAManager(model, momentum=0.001, sources=masters)
    """
    return _OfState("optimizer_state", optimizer, key)


def kahan_sums(
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    key: str = "kahan_comp",
    *,
    subtracts: bool = False,
) -> Sources:
    """The weights with what their roundings lost, which optimizers with Kahan summation keep.

    The default key is that of optimi; AnyPrecisionAdamW has ``"compensation"``. Before each update
    that averages, ``param + compensation`` is computed in fp32 into memory that is kept for it,
    4 bytes an element: two more passes over the weights.

    Args:
        optimizer: The one whose state it is, or several that share the parameters.
        key: The name of the compensations in the state. A parameter whose compensation is no
            floating-point tensor of its shape has none.
        subtracts: The optimizer keeps what its sum has too much: ``param - compensation``.

    Raises:
        TypeError: Not an optimizer.
        ValueError: As :func:`optimizer_state`.
    """
    return _OfKahan(optimizer, key, subtracts)


def param_list(
    params: Iterable[Tensor] | Iterable[Iterable[Tensor]],
    masters: Sequence[Any] | Callable[[], Sequence[Any]],
) -> Sources:
    """Masters in a list, in the order of the parameters that they belong to.

    As wrappers keep them: Megatron's ``float16_groups`` and ``fp32_from_float16_groups``, apex'
    ``all_fp16_params`` and ``all_fp32_from_fp16_params``.

    Args:
        params: The model's parameters; a list, or one of lists.
        masters: As many tensors, flat or in lists as well, with None where there is no master. A
            list is read again at each update, so its elements may be replaced; where the wrapper
            makes another list, pass a function that returns it.

    Raises:
        TypeError: No tensors, or masters that are neither a list nor a function.
        ValueError: Another number of them, now or when the manager asks; or parameters that aren't
            the model's, when the manager is made.
    """
    return _OfList(params, masters)


class _OfState(Sources):
    def __init__(self, where: str, optimizer: object, key: str) -> None:
        given = optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]
        for one in given:
            if not isinstance(one, torch.optim.Optimizer):
                raise TypeError(
                    f"fused_ema.sources.{where}: optimizer is a {type(one).__name__}; pass a "
                    "torch.optim.Optimizer"
                )
        self._where, self._optimizers, self._key = where, list(given), key

    def bind(self, members: Sequence[Member]) -> Feed:
        return self.state_of(members)

    def state_of(self, members: Sequence[Member]) -> _StateFeed:
        """What the state has of these members under the key."""
        return _StateFeed(self._where, self._optimizers, self._key, members)

    def __repr__(self) -> str:
        names = ", ".join(type(optimizer).__name__ for optimizer in self._optimizers)
        return f"fused_ema.sources.{self._where}({names}, {self._key!r})"


class _StateFeed(Feed):
    """Looks into the state itself only where one of its dictionaries was written."""

    def __init__(
        self,
        where: str,
        optimizers: Sequence[torch.optim.Optimizer],
        key: str,
        members: Sequence[Member],
    ) -> None:
        self._where, self._optimizers, self._key = where, optimizers, key
        self._names = _Names(members)
        self._states: list[dict[Any, Any]] = []
        self._watch: Watch | None = None
        self._taken: Mapping[str, Tensor] | None = None

    def poll(self) -> Mapping[str, Tensor] | None:
        if self._watch is not None:
            states = [optimizer.state for optimizer in self._optimizers]
            if all(map(is_, states, self._states)) and not self._watch.changed():
                return None
        found: dict[str, Tensor] = {}
        others: dict[object, None] = {}
        for optimizer in self._optimizers:
            for param, own in optimizer.state.items():
                name = self._names.of(param) if isinstance(param, Tensor) else None
                if name is None or not own:
                    continue
                if self._key in own:
                    found[name] = own[self._key]
                else:
                    others |= dict.fromkeys(own)
        if others and not found:
            raise ValueError(
                f"fused_ema.sources.{self._where}: the optimizer's state has no '{self._key}' for "
                f"any of the model's parameters, but {_tracking.shown([*map(str, others)])}; pass "
                "the key of the masters, or leave sources= out"
            )
        taken = self._taken or {}
        is_same = len(taken) == len(found) and all(map(is_, found.values(), map(taken.get, found)))
        if self._taken is not None and is_same:
            self.take(found)
            return None
        return found

    def take(self, found: Mapping[str, Tensor]) -> None:
        self._taken = found
        self._states = [optimizer.state for optimizer in self._optimizers]
        dicts: list[dict[Any, Any]] = []
        held: list[list[object]] = []
        for state in self._states:
            dicts.append(state)
            held.append(list(chain.from_iterable(state.items())))
            for own in state.values():
                if isinstance(own, dict):
                    dicts.append(own)
                    pairs = ((k, v if k == self._key else ...) for k, v in own.items())
                    held.append(list(chain.from_iterable(pairs)))
        self._watch = Watch(tuple(dicts), tuple(held))


class _Names:
    """The names of a model's parameters, by object or by memory."""

    def __init__(self, members: Sequence[Member]) -> None:
        self._members = [member for member in members if not member.is_buffer]
        self._by_id = {id(member.tensor): member.name for member in reversed(self._members)}

    def of(self, param: Tensor) -> str | None:
        name = self._by_id.get(id(param))
        if name is None:
            memory = {_tracking.memory_of(m.local): m.name for m in reversed(self._members)}
            name = memory.get(_tracking.memory_of(param))
        return name


_ROOM = 2**24
"""Elements of compensations that are widened at a time: 64 MB."""


class _OfKahan(_OfState):
    def __init__(self, optimizer: object, key: str, subtracts: bool) -> None:
        super().__init__("kahan_sums", optimizer, key)
        self._subtracts = subtracts

    def bind(self, members: Sequence[Member]) -> Feed:
        return _KahanFeed(self.state_of(members), members, self._subtracts)


class _KahanFeed(Feed):
    """Its sources are the sums, in memory of their own."""

    def __init__(self, state: _StateFeed, members: Sequence[Member], subtracts: bool) -> None:
        self._state = state
        self._params = {member.name: member.tensor for member in members}
        self._add = torch._foreach_sub_ if subtracts else torch._foreach_add_
        self._polled: Mapping[str, Tensor] = {}
        self._sums: Mapping[str, Tensor] = {}
        self._widen: Plan | None = None
        self._parts: list[tuple[Plan, list[Tensor], list[Tensor]]] = []

    def poll(self) -> Mapping[str, Tensor] | None:
        found = self._state.poll()
        if found is None:
            return None
        self._polled = found
        names = [name for name, own in found.items() if _is_like(own, self._params[name])]
        new = [name for name in names if name not in self._sums]
        params = [shard_of(self._params[name]) for name in new]
        dtypes = [torch.promote_types(param.dtype, torch.float32) for param in params]
        made = _storage.allocate(params, dtypes, [param.device for param in params])
        sums = dict(self._sums)
        for name, values in zip(new, made, strict=True):
            sums[name] = with_shard(self._params[name], values)
        return {name: sums[name] for name in names}

    def take(self, found: Mapping[str, Tensor]) -> None:
        sums = [shard_of(tensor) for tensor in found.values()]
        compensations = [shard_of(self._polled[name]) for name in found]
        self._widen = Plan(sums, [shard_of(self._params[name]) for name in found], list(found))
        self._parts = [
            (Plan(rooms, [compensations[i] for i in part]), [sums[i] for i in part], rooms)
            for part, rooms in _rooms(sums, compensations)
        ]
        self._sums = found
        self._state.take(self._polled)

    @torch.no_grad()
    def prepare(self) -> None:
        if self._widen is not None:
            self._widen.copy_to_ema()
        for widen, sums, rooms in self._parts:
            widen.copy_to_ema()
            self._add(sums, rooms)


def _is_like(compensation: object, param: Tensor) -> bool:
    """Not so where there is none: optimi has one byte then."""
    return (
        isinstance(compensation, Tensor)
        and compensation.is_floating_point()
        and compensation.shape == param.shape
    )


def _rooms(
    sums: Sequence[Tensor], compensations: Sequence[Tensor]
) -> Iterator[tuple[list[int], list[Tensor]]]:
    """Parts of the compensations, each with tensors of the sums' dtype over the same memory."""
    kinds: dict[object, list[int]] = {}
    for i, tensor in enumerate(sums):
        kinds.setdefault((tensor.device, tensor.dtype), []).append(i)
    for indices in kinds.values():
        parts: list[list[int]] = [[]]
        sizes = [0]
        for i in indices:
            if parts[-1] and sizes[-1] + sums[i].numel() > _ROOM:
                parts.append([])
                sizes.append(0)
            parts[-1].append(i)
            sizes[-1] += sums[i].numel()
        with torch.inference_mode(False):
            like = sums[indices[0]]
            flat = torch.empty(max(sizes), dtype=like.dtype, device=like.device)
            for part in parts:
                rooms, offset = [], 0
                for i in part:
                    strides = _storage.dense_strides(compensations[i])
                    rooms.append(flat.as_strided(compensations[i].shape, strides, offset))
                    offset += compensations[i].numel()
                yield part, rooms


class _OfList(Sources):
    def __init__(self, params: Iterable[Any], masters: Any) -> None:
        self._params = _flat(list(params))
        for i, param in enumerate(self._params):
            if not isinstance(param, Tensor):
                raise TypeError(
                    f"fused_ema.sources.param_list: params[{i}] is a {type(param).__name__}; pass "
                    "the model's parameters"
                )
        if not callable(masters) and not isinstance(masters, (list, tuple)):
            raise TypeError(
                f"fused_ema.sources.param_list: masters is a {type(masters).__name__}; pass a list "
                "of tensors, or a function that returns one"
            )
        self._masters = masters
        self.read()

    def read(self) -> Sequence[Any]:
        """The masters, as many as params."""
        masters = _flat(self._masters() if callable(self._masters) else self._masters)
        if len(masters) != len(self._params):
            raise ValueError(
                f"fused_ema.sources.param_list: {len(masters)} masters for {len(self._params)} "
                "params; pass one for each, or None"
            )
        return masters

    def bind(self, members: Sequence[Member]) -> Feed:
        known = _Names(members)
        names: list[str] = []
        for i, param in enumerate(self._params):
            name = known.of(param)
            if name is None or name in names:
                wrong = "given before" if name else "none of the model's parameters"
                raise ValueError(
                    f"fused_ema.sources.param_list: params[{i}], of shape {list(param.shape)}, is "
                    f"{wrong}; pass each of those that have masters once"
                )
            names.append(name)
        return _ListFeed(names, self.read)

    def __repr__(self) -> str:
        return f"fused_ema.sources.param_list({len(self._params)} params)"


def _hold_same(a: Sequence[object], b: Sequence[object]) -> bool:
    """Whether two lists or tuples of one length hold the very same objects."""
    if _native.C is not None:  # 500 in less than 1 us, of 20 here.
        return bool(_native.C.hold_same(a, b))
    return all(map(is_, a, b))


def _flat(given: Sequence[Any]) -> Sequence[Any]:
    is_nested = bool(given) and isinstance(given[0], (list, tuple))
    return list(chain.from_iterable(given)) if is_nested else given


class _ListFeed(Feed):
    def __init__(self, names: Sequence[str], read: Callable[[], Sequence[Any]]) -> None:
        self._names, self._read = names, read
        self._polled: Sequence[Any] = ()
        self._taken: Sequence[Any] | None = None

    def poll(self) -> Mapping[str, Tensor] | None:
        masters = self._read()
        if self._taken is not None and _hold_same(masters, self._taken):
            return None
        self._polled = list(masters)
        named = zip(self._names, masters, strict=True)
        return {name: master for name, master in named if master is not None}

    def take(self, found: Mapping[str, Tensor]) -> None:
        self._taken = self._polled
