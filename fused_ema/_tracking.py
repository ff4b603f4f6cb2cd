"""What of a model is tracked, and whether the model still has it.

Names are those of the user's own model: what DistributedDataParallel, DataParallel, torch.compile
and activation checkpointing put in front of them is left out, at any depth.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fused_ema import _native
from fused_ema._foreach import has_plain_memory, is_dense

# Children that stand for their parent: of torch.compile, activation checkpointing and FSDP1.
_TRANSPARENT = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
_NUM_SHOWN_NAMES = 8


@dataclass(frozen=True, eq=False)
class Member:
    """A parameter or persistent buffer of a model, under one of its names."""

    name: str
    tensor: Tensor
    is_buffer: bool


@dataclass(eq=False)
class _Watch:
    """Dicts, and what they hold, one after the other; an Ellipsis stands for anything."""

    dicts: tuple[dict[str, Any], ...]
    held: tuple[object, ...]
    versions: bytearray = field(init=False)

    def __post_init__(self) -> None:
        self.versions = bytearray(8 * len(self.dicts))

    def is_unchanged(self) -> bool:
        if _native.C is not None:
            unchanged: bool = _native.C.hold_exactly(self.dicts, self.held, self.versions)
            return unchanged
        values = chain.from_iterable(map(dict.values, self.dicts))
        return sum(map(len, self.dicts)) == len(self.held) and all(
            held is value or held is ... for held, value in zip(self.held, values, strict=True)
        )


NUM_TURNS = 8


class Tree:
    """A model's members in the order of its ``state_dict()``, and the dicts that hold them.

    Modules keep their parameters, buffers and children in dicts. As long as those hold the same
    objects, the members are the same; to ask that is far cheaper than to walk the modules.
    """

    def __init__(
        self, members: list[Member], contents: Sequence[tuple[dict[str, Any], Sequence[object]]]
    ) -> None:
        self.members = members
        filled = [(owned, held) for owned, held in contents if held]
        empty = [owned for owned, held in contents if not held]
        self._filled = _Watch(
            tuple(owned for owned, _ in filled),
            tuple(chain.from_iterable(held for _, held in filled)),
        )
        self._empty = [_Watch(tuple(empty[turn::NUM_TURNS]), ()) for turn in range(NUM_TURNS)]
        self._turn = 0

    def is_current(self) -> bool:
        """Whether every module still holds the very tensors and children that it held."""
        return self._filled.is_unchanged() and all(watch.is_unchanged() for watch in self._empty)

    def is_current_so_far(self) -> bool:
        """The same in every step, cheaper: empty dicts, most of a model's, are asked in turns.

        A tensor or child replaced, removed or added beside others is noticed at once; one in a dict
        that was empty within NUM_TURNS calls.
        """
        self._turn = (self._turn + 1) % NUM_TURNS
        return self._filled.is_unchanged() and self._empty[self._turn].is_unchanged()


def read(model: nn.Module) -> Tree:
    """Reads a model's parameters and persistent buffers; tied ones under each of their names.

    Raises:
        ValueError: Two members come to the same name, or one isn't initialised yet.
    """
    members: dict[str, Member] = {}
    contents: list[tuple[dict[str, Any], list[Any]]] = []

    def add(name: str, tensor: Tensor, is_buffer: bool) -> None:
        if is_lazy(tensor):
            raise ValueError(
                f"fused_ema.EMAManager: '{name}' of the model isn't initialised (a lazy module); "
                "run one batch through the model first, as before making an optimizer"
            )
        known = members.setdefault(name, Member(name, tensor, is_buffer))
        if known.tensor is not tensor:
            raise ValueError(
                f"fused_ema.EMAManager: two tensors of the model have the name '{name}' once the "
                "names of wrappers are left out; rename one of the modules"
            )

    def visit(module: nn.Module, prefix: str, above: frozenset[int]) -> None:
        for key, parameter in module._parameters.items():
            if parameter is not None:
                add(prefix + key, parameter, is_buffer=False)
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in module._non_persistent_buffers_set:
                add(prefix + key, buffer, is_buffer=True)
        # A module may assign a buffer that isn't persistent anew in every forward.
        passing = module._non_persistent_buffers_set
        for own in (module._parameters, module._buffers, module._modules):
            if isinstance(own, dict):  # A ScriptModule's are none, and don't change from Python.
                is_buffers = own is module._buffers
                held = [... if is_buffers and k in passing else v for k, v in own.items()]
                contents.append((own, held))
        above |= {id(module)}
        for key, child in module._modules.items():
            if child is not None and id(child) not in above:
                visit(child, prefix if _stands_for(module, key) else f"{prefix}{key}.", above)

    visit(model, "", frozenset())
    return Tree(list(members.values()), contents)


def _stands_for(module: nn.Module, key: str) -> bool:
    if key in _TRANSPARENT:
        return True
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    return key == "module" and isinstance(module, wrappers)


@dataclass(frozen=True)
class Selection:
    """Which members are tracked."""

    skip_buffers: bool
    skip_frozen: bool
    include: tuple[str, ...] | None
    exclude: tuple[str, ...]

    def choose(self, members: Sequence[Member]) -> list[Member]:
        """The tracked ones of these members.

        Raises:
            ValueError: A pattern matches no name, the model has no parameters, or none is left.
        """
        names = [member.name for member in members]
        for what, patterns in (("include", self.include or ()), ("exclude", self.exclude)):
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in names):
                    raise ValueError(
                        f"fused_ema.EMAManager: {what} pattern '{pattern}' matches none of the "
                        f"model's {len(names)} names: {shown(names)}"
                    )
        if all(member.is_buffer for member in members):
            raise ValueError("fused_ema.EMAManager: the model has no parameters to average")
        chosen = [member for member in members if self._has(member)]
        if not chosen:
            raise ValueError(
                f"fused_ema.EMAManager: none of the model's {len(names)} parameters and buffers is "
                f"left to track with skip_buffers={self.skip_buffers}, skip_frozen="
                f"{self.skip_frozen}, include={self.include}, exclude={self.exclude}"
            )
        return chosen

    def _has(self, member: Member) -> bool:
        if member.is_buffer and self.skip_buffers:
            return False
        if self.skip_frozen and not member.is_buffer and not member.tensor.requires_grad:
            return False
        if self.include is not None and not _matches(member.name, self.include):
            return False
        return not _matches(member.name, self.exclude)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def shown(names: Sequence[str]) -> str:
    """Names for an error message; of many, the first."""
    some = ", ".join(f"'{name}'" for name in names[:_NUM_SHOWN_NAMES])
    left = len(names) - _NUM_SHOWN_NAMES
    return f"{some} and {left} more" if left > 0 else some


def group_tied(members: Sequence[Member]) -> list[list[Member]]:
    """Members that are the same memory, together, in order of first appearance.

    The same Parameter under two names, two over one memory, or one a transposed view of the other.
    """
    groups: dict[object, list[Member]] = {}
    for member in members:
        groups.setdefault(_memory_of(member.tensor), []).append(member)
    return list(groups.values())


def _memory_of(tensor: Tensor) -> object:
    if not has_plain_memory(tensor) or tensor.numel() == 0:
        return id(tensor)
    if tensor.data_ptr() == 0:  # On the meta device, or freed for a while.
        return id(tensor)
    # A view with gaps is the same memory only as the very same view.
    geometry = None if is_dense(tensor) else (tensor.shape, tensor.stride())
    return tensor.device, tensor.data_ptr(), tensor.numel(), tensor.dtype, geometry
