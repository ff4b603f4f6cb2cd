"""What of a model is tracked, and whether the model still has it.

Names are those of the user's own model: what DistributedDataParallel, DataParallel, torch.compile
and activation checkpointing put in front of them is left out, at any depth.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import chain, zip_longest
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fused_ema import _native, _shards
from fused_ema._foreach import has_plain_memory, is_dense

# Children that stand for their parent: of torch.compile, activation checkpointing, FSDP1, and
# Lightning's Fabric, which has the module under both of its names.
_TRANSPARENT = frozenset(
    {
        *("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"),
        *("_forward_module", "_original_module"),
    }
)
# Others, whose name for it is anybody's: by the class, which need not be installed.
_WRAPPERS = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "DeepSpeedEngine": "module",
    "GradSampleModule": "_module",  # Opacus
}
_NUM_SHOWN_NAMES = 8


@dataclass(frozen=True, eq=False)
class Member:
    """A parameter or persistent buffer of a model, under one of its names."""

    name: str
    tensor: Tensor
    is_buffer: bool
    is_statistic: bool = False
    """Whether a norm layer keeps it as the running mean or variance of what it sees."""
    local: Tensor = field(init=False)
    """What this rank holds of it: of a DTensor its shard, else all."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "local", _shards.shard_of(self.tensor))


@dataclass(eq=False)
class Watch:
    """Dicts, and the keys and values that each held, in turn; an Ellipsis stands for any value."""

    dicts: tuple[dict[str, Any], ...]
    held: tuple[list[object], ...]
    versions: bytearray = field(init=False)

    def __post_init__(self) -> None:
        self.versions = bytearray(8 * len(self.dicts))

    def changed(self) -> list[int]:
        """The indices of the dicts that hold something else now."""
        if _native.C is not None:
            changed: list[int] = _native.C.changed_dicts(self.dicts, self.held, self.versions)
            return changed
        return [i for i, owned in enumerate(self.dicts) if not _holds(owned, self.held[i])]

    @property
    def parts(self) -> tuple[object, ...]:
        """What C takes."""
        return self.dicts, self.held, self.versions

    def pass_over(self, index: int, position: int) -> None:
        """Takes any value from now on under one of the keys that a dict had."""
        self.held[index][2 * position + 1] = ...
        self.versions[8 * index : 8 * index + 8] = bytes(8)


def _holds(owned: dict[str, Any], held: Sequence[object]) -> bool:
    return 2 * len(owned) == len(held) and all(
        key is held[2 * i] and (value is held[2 * i + 1] or held[2 * i + 1] is ...)
        for i, (key, value) in enumerate(owned.items())
    )


NUM_TURNS = 8


@dataclass(eq=False)
class _Moving:
    """A buffer that a module has assigned anew, and may again in every step."""

    owned: dict[str, Any]
    key: str
    tensor: object
    """What was taken over last."""
    names: Sequence[str]

    def has_changed(self) -> bool:
        return self.owned.get(self.key) is not self.tensor


class Tree:
    """A model's members in the order of its ``state_dict()``, and the dicts that hold them.

    Modules keep their parameters, buffers and children in dicts. As long as those hold the same
    objects, the members are the same; to ask that is far cheaper than to walk the modules.
    """

    def __init__(
        self,
        members: list[Member],
        contents: Sequence[tuple[dict[str, Any], Sequence[object]]],
        prefixes: Mapping[int, Sequence[str]] | None = None,
        units: _shards.Units | None = None,
    ) -> None:
        self.members = members
        self.units = _shards.Units([]) if units is None else units
        filled = [(owned, held) for owned, held in contents if held]
        empty = [owned for owned, held in contents if not held]
        self._filled = Watch(
            tuple(owned for owned, _ in filled),
            tuple(list(chain.from_iterable(zip_longest(owned, held))) for owned, held in filled),
        )
        self._empty = [
            Watch(tuple(turn), tuple([] for _ in turn))
            for turn in (empty[turn::NUM_TURNS] for turn in range(NUM_TURNS))
        ]
        # The latest turn, as csrc/repeat.cpp takes it.
        self._turn = bytearray(1)
        self._changed: list[int] = []
        # The watches pass over them: these are asked one by one.
        self._moving: list[_Moving] = []
        # Of each dict of buffers, by id: what stands before its keys in names.
        self._prefixes = {} if prefixes is None else prefixes

    def is_current(self) -> bool:
        """Whether every module still holds the very tensors and children that it held."""
        return not (
            self._filled.changed()
            or any(watch.changed() for watch in self._empty)
            or any(place.has_changed() for place in self._moving)
        )

    def is_current_so_far(self) -> bool:
        """The same in every step, cheaper: empty dicts, most of a model's, are asked in turns.

        A tensor or child replaced, removed or added beside others is noticed at once; one in a dict
        that was empty within NUM_TURNS calls.
        """
        turn = self._turn[0] = (self._turn[0] + 1) % NUM_TURNS
        self._changed = self._filled.changed()
        if self._changed or self._empty[turn].changed():
            return False
        return not self._moving or not any(place.has_changed() for place in self._moving)

    @property
    def watched(self) -> tuple[object, ...] | None:
        """What is_current_so_far() asks, as update_if_unchanged() of csrc/repeat.cpp takes it.

        None where it doesn't tell all: some buffers are assigned anew.
        """
        if self._moving:
            return None
        return self._filled.parts, tuple(watch.parts for watch in self._empty), self._turn

    def buffers_assigned_anew(self, so_far: bool = False) -> Mapping[str, Tensor] | None:
        """Name to tensor, where nothing but buffers has changed since; None where more has.

        Args:
            so_far: As is_current_so_far(), which has just been asked, knows it.
        """
        if not so_far:
            self._changed = self._filled.changed()
        for index in self._changed:
            owned, held = self._filled.dicts[index], self._filled.held[index]
            if id(owned) not in self._prefixes or [*owned] != held[::2]:
                return None
            for position, (key, value) in enumerate(owned.items()):
                old = held[2 * position + 1]
                if value is not old and old is not ...:
                    if not isinstance(old, Tensor):
                        return None
                    names = [prefix + key for prefix in self._prefixes[id(owned)]]
                    self._moving.append(_Moving(owned, key, old, names))
                    self._filled.pass_over(index, position)
        self._changed = []
        empty = [self._empty[self._turn[0]]] if so_far else self._empty
        if any(watch.changed() for watch in empty):
            return None
        found: dict[str, Tensor] = {}
        for place in self._moving:
            if place.has_changed():
                value = place.owned.get(place.key)
                if not isinstance(value, Tensor):
                    return None
                for name in place.names:
                    found[name] = value
        return found

    def take_over_buffers(self) -> None:
        """What buffers_assigned_anew() found is what there is from now on."""
        for place in self._moving:
            place.tensor = place.owned[place.key]


def read(model: nn.Module) -> Tree:
    """Reads a model's parameters and persistent buffers; tied ones under each of their names.

    Raises:
        ValueError: Two members come to the same name, or one isn't initialised yet.
        RuntimeError: FSDP2 is in the middle of a forward or backward.
    """
    units = _shards.units_of(model)
    units.reshard("fused_ema.EMAManager")
    members: dict[str, Member] = {}
    contents: list[tuple[dict[str, Any], list[Any]]] = []
    prefixes: dict[int, list[str]] = {}

    def add(name: str, tensor: Tensor, is_buffer: bool, is_statistic: bool = False) -> None:
        if is_lazy(tensor):
            raise ValueError(
                f"fused_ema.EMAManager: '{name}' of the model isn't initialised (a lazy module); "
                "run one batch through the model first, as before making an optimizer"
            )
        known = members.setdefault(name, Member(name, tensor, is_buffer, is_statistic))
        if known.tensor is not tensor:
            raise ValueError(
                f"fused_ema.EMAManager: two tensors of the model have the name '{name}' once the "
                "names of wrappers are left out; rename one of the modules"
            )

    for module, prefix in _walk(model):
        for key, parameter in module._parameters.items():
            if parameter is not None:
                add(prefix + key, parameter, is_buffer=False)
        # A module may assign a buffer that isn't persistent anew in every forward.
        passing = module._non_persistent_buffers_set
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in passing:
                add(prefix + key, buffer, is_buffer=True, is_statistic=_is_statistic(module, key))
        for own in (module._parameters, module._buffers, module._modules):
            if isinstance(own, dict):  # A ScriptModule's are none, and don't change from Python.
                is_buffers = own is module._buffers
                held = [... if is_buffers and k in passing else v for k, v in own.items()]
                contents.append((own, held))
                if is_buffers:
                    prefixes.setdefault(id(own), []).append(prefix)
    return Tree(list(members.values()), contents, prefixes, units)


def _walk(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Each module as often as it has names, with what stands before the names of its members.

    A stack, since a function that calls itself would be a cycle that holds every tensor.
    """
    left: list[tuple[nn.Module, str, frozenset[int]]] = [(model, "", frozenset())]
    while left:
        module, prefix, above = left.pop()
        yield module, prefix
        above |= {id(module)}
        children = [
            (child, prefix if _stands_for(module, key) else f"{prefix}{key}.", above)
            for key, child in module._modules.items()
            if child is not None and id(child) not in above
        ]
        left += reversed(children)


def refuse_fsdp1(title: str, model: nn.Module) -> None:
    """Raises ValueError where FSDP1 shards a part of the model.

    It keeps what it has gathered for the next forward, which then doesn't see what was written to
    the shards meanwhile: after a swap training would go on with the average.
    """
    for name, module in model.named_modules():
        for cls in type(module).__mro__:
            if cls.__name__ == "FullyShardedDataParallel" and "fsdp" in cls.__module__:
                raise ValueError(
                    f"{title}: '{name or 'the model'}' is sharded by FullyShardedDataParallel "
                    "(FSDP1), whose next forward would not see what a swap writes; shard it with "
                    "torch.distributed.fsdp.fully_shard (FSDP2), or average an unsharded copy of "
                    "the model"
                )


def _is_statistic(module: nn.Module, key: str) -> bool:
    is_norm = isinstance(module, nn.modules.batchnorm._NormBase)
    return key in ("running_mean", "running_var") or (is_norm and key.startswith("running_"))


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own model, without what is put around the whole of it."""
    while True:
        inner = [child for key, child in model._modules.items() if _stands_for(model, key)]
        if not inner or inner[0] is None:
            return model
        model = inner[0]


def _stands_for(module: nn.Module, key: str) -> bool:
    if key in _TRANSPARENT:
        return True
    return any(_WRAPPERS.get(cls.__name__) == key for cls in type(module).__mro__)


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """A model's modules by the names that read() gives their members, without a dot at the end.

    A wrapped module takes the place of its wrapper.
    """
    return {prefix.removesuffix("."): module for module, prefix in _walk(model)}


_QUANTISING = frozenset({"torchao", "bitsandbytes"})


def is_quantised(tensor: Tensor) -> bool:
    """Whether it holds codes, whose average is nonsense and which are nothing without their scales.

    As torchao's Int8Tensor, NF4Tensor and Float8Tensor, bitsandbytes' Params4bit and Int8Params.
    """
    return any(cls.__module__.partition(".")[0] in _QUANTISING for cls in type(tensor).__mro__)


BufferMode = Literal["auto", "average", "copy", "skip"]
"""What becomes of a buffer."""

_MODES = get_args(BufferMode)


@dataclass(frozen=True)
class Buffers:
    """What becomes of each buffer: the mode of the first pattern that its name matches.

    Attributes:
        patterns: Pattern to mode.
        otherwise: The mode of all others.
    """

    patterns: tuple[tuple[str, BufferMode], ...]
    otherwise: BufferMode

    @classmethod
    def parse(cls, given: BufferMode | Mapping[str, BufferMode]) -> Buffers:
        """Of what EMAManager is given.

        Raises:
            TypeError: Neither a mode nor a mapping of patterns.
            ValueError: An unknown mode.
        """
        patterns = dict(given) if isinstance(given, Mapping) else {"*": given}
        for pattern, mode in patterns.items():
            if not isinstance(pattern, str) or not isinstance(mode, str):
                raise TypeError(
                    f"fused_ema.EMAManager: buffers is {given!r}; pass one of {shown(_MODES)}, or "
                    "a dictionary of name patterns to these"
                )
            if mode not in _MODES:
                raise ValueError(
                    f"fused_ema.EMAManager: buffers is {given!r}; '{mode}' is none of "
                    f"{shown(_MODES)}"
                )
        if isinstance(given, Mapping):
            return cls(tuple(patterns.items()), "auto")
        return cls((), given)

    def mode_of(self, member: Member) -> BufferMode:
        """What becomes of this buffer."""
        for pattern, mode in self.patterns:
            if fnmatchcase(member.name, pattern):
                return mode
        return self.otherwise


@dataclass(frozen=True)
class Selection:
    """Which members are tracked."""

    buffers: Buffers
    skip_frozen: bool
    include: tuple[str, ...] | None
    exclude: tuple[str, ...]

    def choose(
        self,
        members: Sequence[Member],
        tracked: Container[str] = frozenset(),
        others: Sequence[Member] = (),
    ) -> list[Member]:
        """The tracked ones of these members.

        Args:
            members: Of the model.
            tracked: Names that stay tracked though their parameters are frozen now.
            others: A teacher's, whose names a pattern may mean as well.

        Raises:
            ValueError: A pattern matches no name, the model has no parameters, or none is left.
        """
        names = [member.name for member in (*members, *others)]
        for what, patterns in (("include", self.include or ()), ("exclude", self.exclude)):
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in names):
                    raise ValueError(
                        f"fused_ema.EMAManager: {what} pattern '{pattern}' matches none of the "
                        f"model's {len(names)} names: {shown(names)}"
                    )
        buffers = [member.name for member in (*members, *others) if member.is_buffer]
        for pattern, _ in self.buffers.patterns:
            if not any(fnmatchcase(name, pattern) for name in buffers):
                raise ValueError(
                    f"fused_ema.EMAManager: the pattern '{pattern}' in buffers matches none of the "
                    f"model's {len(buffers)} persistent buffers: {shown(buffers)}"
                )
        if all(member.is_buffer for member in members):
            raise ValueError("fused_ema.EMAManager: the model has no parameters to average")
        chosen = [m for m in members if self._has(m, m.name in tracked)]
        if not chosen:
            raise ValueError(
                f"fused_ema.EMAManager: none of the model's {len(names)} parameters and buffers is "
                f"left to track with skip_frozen={self.skip_frozen}, include={self.include}, "
                f"exclude={self.exclude} and the mode of its buffers"
            )
        return chosen

    def left_frozen(self, members: Sequence[Member], tracked: Container[str]) -> list[Member]:
        """Those that would be tracked if they required a gradient."""
        if not self.skip_frozen:
            return []
        return [m for m in members if m.name not in tracked and self._has(m, is_tracked=True)]

    def means(self, member: Member) -> bool:
        """Whether patterns and modes would track it, were it the model's."""
        return self._has(member, is_tracked=True)

    def _has(self, member: Member, is_tracked: bool) -> bool:
        if is_quantised(member.tensor) and not member.tensor.requires_grad:
            return False
        if member.is_buffer:
            if self.buffers.mode_of(member) == "skip":
                return False
        elif self.skip_frozen and not is_tracked and not member.tensor.requires_grad:
            return False
        if self.include is not None and not _matches(member.name, self.include):
            return False
        if _matches(member.name, self.exclude):
            return False
        if is_quantised(member.tensor):
            raise TypeError(
                f"fused_ema.EMAManager: '{member.name}' is quantised "
                f"({type(member.tensor).__name__}) and trained, and codes can't be averaged; leave "
                "it out with exclude="
            )
        return True


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
        groups.setdefault(memory_of(member.local), []).append(member)
    return list(groups.values())


def memory_of(tensor: Tensor) -> object:
    """What is equal for tensors that are the same memory."""
    if not has_plain_memory(tensor) or tensor.numel() == 0:
        return id(tensor)
    if tensor.data_ptr() == 0:  # On the meta device, or freed for a while.
        return id(tensor)
    # A view with gaps is the same memory only as the very same view.
    geometry = None if is_dense(tensor) else (tensor.shape, tensor.stride())
    return tensor.device, tensor.data_ptr(), tensor.numel(), tensor.dtype, geometry
