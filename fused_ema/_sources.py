"""What is averaged in place of a model's parameters: where it is asked for, and whether it fits.

A feed is asked at each update. It answers with a mapping of names to tensors, or that they are
those of before, which must cost no more than the update itself.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, cast

from torch import Tensor, nn

from fused_ema import _checks, _shards, _tracking
from fused_ema._foreach import dtype_name, has_plain_memory, is_dense
from fused_ema._tracking import Member, Watch

TITLE = "fused_ema.EMAManager"


class Feed(ABC):
    """The sources of one model's parameters."""

    @abstractmethod
    def poll(self) -> Mapping[str, Tensor] | None:
        """Name to source; None where they are those that were taken last.

        A name that is missing is averaged from the model.
        """

    @abstractmethod
    def take(self, found: Mapping[str, Tensor]) -> None:
        """What poll() has just found fits, and is what later ones are compared with."""

    def prepare(self) -> None:  # noqa: B027  Most have nothing to do.
        """Brings the values up to date: called before they are read."""


class Sources(ABC):
    """Sources that know whose they are by the parameters themselves, for ``EMAManager(sources=)``.

    Made by the functions of :mod:`fused_ema.sources`.
    """

    @abstractmethod
    def bind(self, members: Sequence[Member]) -> Feed:
        """Those of a model with these parameters and buffers."""


Given = Mapping[str, Tensor] | Callable[[], Mapping[str, Tensor]] | Sources


def check(given: object) -> None:
    """Raises TypeError where it is nothing that can be asked for sources."""
    is_function = callable(given) and not isinstance(given, nn.Module)
    if not is_function and not isinstance(given, (Mapping, Sources)):
        raise TypeError(
            f"{TITLE}: sources is a {type(given).__name__}; pass a dictionary of parameters' names "
            "to tensors, a function that returns one, or what fused_ema.sources makes"
        )


def bind(given: Given, members: Sequence[Member]) -> Feed:
    """The feed of what a manager is given, for a model with these parameters and buffers."""
    if isinstance(given, Sources):
        return given.bind(members)
    if isinstance(given, Mapping):
        mapping = given
        return _Mapped(lambda: mapping, members)
    return _Mapped(given, members)


class _Mapped(Feed):
    """Of a function that returns a mapping."""

    def __init__(self, read: Callable[[], Mapping[str, Tensor]], members: Sequence[Member]) -> None:
        self._read = read
        self._is_buffer = {member.name: member.is_buffer for member in members}
        self._watch: Watch | None = None

    def poll(self) -> Mapping[str, Tensor] | None:
        found = self._read()
        if not isinstance(found, Mapping):
            raise TypeError(
                f"{TITLE}: sources returned a {type(found).__name__}; it must return a dictionary "
                "of parameters' names to tensors"
            )
        found = found if isinstance(found, dict) else dict(found)
        if (watch := self._watch) is not None:
            watch = watch if watch.dicts[0] is found else Watch((found,), watch.held)
            if not watch.changed():
                self._watch = watch
                return None
        problems = [self._unknown(name) for name in found if self._is_buffer.get(name, True)]
        if problems:
            raise misfit("", problems)
        return found

    def take(self, found: Mapping[str, Tensor]) -> None:
        held: list[object] = list(chain.from_iterable(found.items()))
        self._watch = Watch((cast(dict[str, Any], found),), (held,))

    def _unknown(self, name: object) -> str:
        if name in self._is_buffer:
            return f"'{name}' is a buffer; only parameters have sources"
        bare = [known for known in self._is_buffer if str(name).endswith(f".{known}")]
        way = f"; without what wraps the model it is '{max(bare, key=len)}'" if bare else ""
        return f"'{name}' is none of the model's parameters{way}"


def misfit(op: str, problems: Sequence[str]) -> ValueError:
    """The error that lists what is wrong with sources."""
    lines = "\n  ".join(_checks.listed(problems))
    return ValueError(f"{TITLE}{op and '.'}{op}: the sources don't fit the model:\n  {lines}")


def matched(
    op: str, found: Mapping[str, Tensor], groups: Sequence[Sequence[Member]]
) -> list[Tensor | None]:
    """The source of each group of tied parameters, None where it is the parameter itself.

    Raises:
        ValueError: Some don't fit: one error that lists them. Their dtypes aren't asked here.
    """
    problems: list[str] = []
    sources: list[Tensor | None] = []
    for group in groups:
        given = {m.name: found[m.name] for m in group if found.get(m.name) is not None}
        named = [
            (member, given[member.name])
            for member in group
            if member.name in given and given[member.name] is not member.tensor
        ]
        wrong = [
            f"'{member.name}' {problem}" for member, s in named if (problem := _misfit(member, s))
        ]
        if not wrong and len({id(source) for source in given.values()}) > 1:
            names = _tracking.shown(list(given))
            wrong = [f"{names} are one tensor in the model but have several sources"]
        layouts = {(member.local.shape, member.local.stride()) for member in group}
        if not wrong and named and len(layouts) > 1:
            names = _tracking.shown([member.name for member in group])
            wrong = [f"{names} are different views of one tensor, which can't have a source"]
        problems += wrong
        is_own = bool(named) and not wrong and _is_same(named[0][1], named[0][0].tensor)
        sources.append(named[0][1] if named and not wrong and not is_own else None)
    problems += _overlaps(groups, sources)
    if problems:
        raise misfit(op, problems)
    return sources


def _misfit(member: Member, source: object) -> str:
    """Why it can't be averaged in that parameter's place; empty where it can."""
    param = member.tensor
    if not isinstance(source, Tensor):
        return f"has a {type(source).__name__}, not a tensor"
    if _tracking.is_quantised(source):
        return f"has a quantised source ({type(source).__name__}), and codes can't be averaged"
    if not param.is_floating_point():
        return f"is {dtype_name(param.dtype)}; only floating-point parameters have sources"
    if source.shape != param.shape:
        return f"has shape {list(param.shape)} but its source has {list(source.shape)}"
    if not _shards.is_laid_alike(param, source):
        there, here = (_shards.described(t) or " whole" for t in (source, param))
        return f"is{here} but its source is{there}; each rank needs the part that it holds"
    local = _shards.shard_of(source)
    fake = sys.modules.get("torch._subclasses.fake_tensor")
    if local.is_meta or (fake is not None and isinstance(local, fake.FakeTensor)):
        return "has a source without values (on the meta device, or a fake tensor)"
    if source.device != param.device:
        return (
            f"is on {param.device} but its source is on {source.device}; they must be on one device"
        )
    if not has_plain_memory(local):
        return f"has a source of layout {local.layout} or without memory of its own"
    if any(step == 0 and size > 1 for size, step in zip(local.shape, local.stride(), strict=True)):
        return "has an expanded source; several of its elements share one place in memory"
    return ""


def _is_same(source: Tensor, param: Tensor) -> bool:
    same = _tracking.memory_of(_shards.shard_of(source)) == _tracking.memory_of(
        _shards.shard_of(param)
    )
    return same and source.stride() == param.stride()


def _overlaps(
    groups: Sequence[Sequence[Member]], sources: Sequence[Tensor | None]
) -> Iterable[str]:
    """Sources that share memory with each other, or with a parameter."""
    places = []
    for group, source in zip(groups, sources, strict=True):
        name = group[0].name
        tensors = [(f"'{name}'", group[0].local)]
        if source is not None:
            tensors.append((f"the source of '{name}'", _shards.shard_of(source)))
        for what, tensor in tensors:
            if has_plain_memory(tensor) and tensor.numel() and is_dense(tensor):
                begin = tensor.data_ptr()
                end = begin + tensor.numel() * tensor.element_size()
                places.append((str(tensor.device), begin, end, what))
    before = ("", 0, 0, "")
    for place in sorted(places):
        both = [before[3], place[3]]
        if place[0] == before[0] and place[1] < before[2] and any(w[0] == "t" for w in both):
            yield f"{both[0]} and {both[1]} share memory; each needs its own"
        if place[0] != before[0] or place[2] > before[2]:
            before = place


def unsupported(member: Member, source: Tensor, dtype: object) -> str:
    """That the average of a source would be of a dtype that it can't be averaged into."""
    return (
        f"'{member.name}' has a {dtype_name(source.dtype)} source and its average is {dtype}, "
        "which can't be averaged; choose another ema_dtype, or sources of another dtype"
    )
