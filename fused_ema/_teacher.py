"""A module of the user's whose own tensors are the averages: which of them goes with which."""

from __future__ import annotations

import re
import struct
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fused_ema import _caches, _checks, _shards, _tracking
from fused_ema._foreach import dtype_name
from fused_ema._tracking import Member, Tree, memory_of

TITLE = "fused_ema.EMAManager"

Rename = Mapping[str, str] | Callable[[str], str]
"""A student's name to the teacher's: a function, or patterns with what they become."""

Start = Literal["copy", "keep"]
"""What the teacher starts with: the student's values, or its own."""

# Half a unit in the last place, as a part of the value: a smaller change is rounded away.
_HALF_ULP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

_LARGEST_HALF_ULP = max(_HALF_ULP.values())

# Which parameter has its turn, whether its version was noted, and that.
_NOTE = struct.Struct("=qqq")


class Teacher:
    """The teacher as it was read, beside a student.

    Attributes:
        tree: Of the teacher's module.
        members: All of the teacher's.
        targets: Tracked name of the student to the teacher's member that is its average.
        starts_as_copy: Whether it starts with the student's values.
    """

    def __init__(self, into: Into, tree: Tree, images: Mapping[str, str]) -> None:
        self.tree = tree
        self.members = tree.members
        self.targets: dict[str, Member] = {}
        self._into = into
        self._images = images
        self.starts_as_copy = into.start == "copy"
        self._shards = _shards.Shards([])
        self._is_sharded = False
        self._params: list[Tensor] = []
        # Of one of them the version after the last update; csrc/repeat.cpp reads and writes it.
        self._note = bytearray(_NOTE.size)

    def pair(
        self,
        chosen: Sequence[Member],
        students: Sequence[Member],
        is_tracked: Callable[[Member], bool],
        check_memory: Callable[[str, Member], None],
    ) -> None:
        """Finds the targets of what is tracked.

        Args:
            chosen: The tracked ones of the student.
            students: All of the student's.
            is_tracked: Whether patterns and modes would track one of the teacher's.
            check_memory: Raises ValueError where a member can't be written.

        Raises:
            ValueError: One error that lists all that doesn't fit; or the teacher is trained.
        """
        _refuse_merged(chosen, self._images)
        known = {member.name: member for member in self.members}
        images = {member.name: self._images[member.name] for member in chosen}
        targets = {name: known[image] for name, image in images.items() if image in known}
        problems = [
            f"'{name}' is the student's alone: the teacher has no '{image}'"
            for name, image in images.items()
            if image not in known
        ]
        problems += self._surplus(students, is_tracked)
        problems += [
            f"'{m.name}' {problem}"
            for m in chosen
            if m.name in targets and (problem := _misfit(m, targets[m.name], check_memory))
        ]
        problems += _ties(chosen, targets)
        own = {memory_of(member.local): member.name for member in students}
        for name, target in targets.items():
            if (other := own.get(memory_of(target.local))) is not None:
                problems.append(
                    f"'{name}': the teacher's '{target.name}' is the student's own '{other}'; give "
                    "the teacher its own (copy.deepcopy), or leave out with exclude= what they "
                    "share on purpose"
                )
        if problems:
            raise ValueError(
                f"{TITLE}: the teacher (into=) doesn't fit the student; leave out by exclude= what "
                "only one of them has, name by rename= what has another name there:\n  "
                + "\n  ".join(_checks.listed(problems))
            )
        trained = [t.name for t in targets.values() if t.tensor.requires_grad]
        if trained:
            raise ValueError(
                f"{TITLE}: the teacher's {_tracking.shown(trained)} require a gradient, so that an "
                "optimizer may train what is to be an average; call teacher.requires_grad_(False) "
                "first"
            )
        self.targets = targets
        tensors = [target.tensor for target in targets.values()]
        self._shards = _shards.Shards(tensors)
        self._is_sharded = any(map(_shards.is_dtensor, tensors))
        self._params = [t.tensor for t in targets.values() if not t.is_buffer]

    def _surplus(
        self, students: Sequence[Member], is_tracked: Callable[[Member], bool]
    ) -> list[str]:
        if self._into.is_within:
            return []  # All else is the one model's own.
        paired = {self._images[member.name] for member in students}
        left = [member for member in self.members if member.name not in paired]
        return [f"'{member.name}' is the teacher's alone" for member in left if is_tracked(member)]

    # ---- in training

    def prepare(self, momentum: float | None) -> None:
        """To be called before each update, with its momentum; None for a copy.

        Frees what FSDP2 has gathered, whose next forward wouldn't see the update; warns, once each,
        of what makes one pointless.
        """
        if self._is_sharded:
            self.tree.units.reshard(f"{TITLE}.update")
        turn, is_seen, version = _NOTE.unpack(self._note)
        if is_seen and self._params[turn]._version != version:
            self._warn_of_write(self._params[turn])
        if momentum is not None and momentum < _LARGEST_HALF_ULP:
            self.warn_of_stall(momentum, level=4)

    def _warn_of_write(self, tensor: Tensor) -> None:
        if not self._into.has_warned_of_writes:
            self._into.has_warned_of_writes = True
            name = next(t.name for t in self.targets.values() if t.tensor is tensor)
            warnings.warn(
                f"{TITLE}.update: the teacher's '{name}' was written since the last update. If an "
                "optimizer has it, take the teacher's parameters out of its groups: only update() "
                "should move them. What you have loaded into it yourself is fine",
                UserWarning,
                stacklevel=5,
            )

    def warn_of_stall(self, momentum: float, level: int) -> None:
        """Warns, once, of a momentum that a teacher in 16 bits rounds away.

        Args:
            momentum: Of an update; 0 moves nothing by itself.
            level: Of the stack, for the warning.
        """
        narrow = {tensor.dtype for tensor in self._params} & {*_HALF_ULP}
        narrow = {dtype for dtype in narrow if 0 < momentum < _HALF_ULP[dtype]}
        if narrow and not self._into.has_warned_of_stall:
            self._into.has_warned_of_stall = True
            dtype = max(narrow, key=_HALF_ULP.__getitem__)
            warnings.warn(
                f"{TITLE}: the teacher is {dtype_name(dtype)} and the momentum {momentum:.4g}: an "
                "update rounds to nothing where the student's value is nearer than about "
                f"{_HALF_ULP[dtype] / momentum:.2g} times the average's own size, so the teacher "
                "stands still. Keep it in float32 (teacher.float(); its forward may run under "
                "autocast)",
                UserWarning,
                stacklevel=level + 1,
            )

    def note_update(self) -> None:
        """To be called after each update."""
        self.note_write()
        # In turns: an optimizer writes all that it has, and to look at 500 takes 20 us.
        if self._params:
            turn = (_NOTE.unpack(self._note)[0] + 1) % len(self._params)
            _NOTE.pack_into(self._note, 0, turn, True, self._params[turn]._version)

    @property
    def watched(self) -> tuple[object, ...] | None:
        """What prepare() and note_update() look at, as csrc/repeat.cpp takes it; None for more."""
        return None if self._is_sharded else (tuple(self._params), self._note)

    @property
    def least_momentum(self) -> float:
        """From which on prepare() has nothing to say of a momentum."""
        narrow = {tensor.dtype for tensor in self._params} & {*_HALF_ULP}
        return _LARGEST_HALF_ULP if narrow and not self._into.has_warned_of_stall else 0.0

    def forget(self) -> None:
        """What is written up to the next update is the user's affair."""
        turn, _, version = _NOTE.unpack(self._note)
        _NOTE.pack_into(self._note, 0, turn, False, version)

    def note_write(self) -> None:
        """To be called after each write to the teacher."""
        self.forget()
        if self._is_sharded:
            self._shards.note_write()
            self.tree.units.note_write()
        if parametrize._cache_enabled:
            _caches.drop()


def _misfit(student: Member, target: Member, check_memory: Callable[[str, Member], None]) -> str:
    """Why a tensor can't be the other's average; empty where it can. To be said after its name."""
    tensor, own = student.tensor, target.tensor
    theirs = f"the teacher's '{target.name}'"
    try:
        check_memory("", target)
    except ValueError as error:
        return f"has no average: {theirs} {str(error).partition(chr(39) + ' ')[2]}"
    if tensor.shape != own.shape:
        return f"has shape {list(tensor.shape)} but {theirs} has {list(own.shape)}"
    are_floats = tensor.is_floating_point() and own.is_floating_point()
    if tensor.dtype != own.dtype and not are_floats:
        return f"is {dtype_name(tensor.dtype)} but {theirs} is {dtype_name(own.dtype)}"
    if not _shards.is_laid_alike(tensor, own):
        there, here = (_shards.described(t) or " whole" for t in (own, tensor))
        return f"is{here} but {theirs} is{there}; shard both alike, so that no rank has to send"
    if _tracking.is_quantised(own):
        return f"can't be averaged into {theirs}, which is quantised ({type(own).__name__})"
    if target.local.is_inference():
        return (
            f"can't be averaged into {theirs}, which was made in torch.inference_mode(), outside "
            "of which it can't be written"
        )
    return ""


def _ties(chosen: Sequence[Member], targets: Mapping[str, Member]) -> Iterable[str]:
    """Tensors that are one on one side and several on the other."""
    owners: dict[object, str] = {}
    for group in _tracking.group_tied([m for m in chosen if m.name in targets]):
        own = [targets[member.name] for member in group]
        places = {memory_of(target.local) for target in own}
        layouts = {(target.local.shape, target.local.stride()) for target in own}
        if len(places) > 1:
            yield (
                f"{_tracking.shown([m.name for m in group])} are one tensor in the student and "
                f"{len(places)} in the teacher; tie them there as well"
            )
        elif len(layouts) > 1 and any(
            m.local.stride() != t.local.stride() for m, t in zip(group, own, strict=True)
        ):
            yield (
                f"{_tracking.shown([m.name for m in group])} are views of one tensor, with other "
                "strides in the teacher"
            )
        for place in places:
            other = owners.setdefault(place, group[0].name)
            if other != group[0].name:
                yield (
                    f"'{other}' and '{group[0].name}' are two tensors in the student and one in "
                    "the teacher; give each its own there"
                )


# ---- what a manager is given


@dataclass(eq=False)
class Into:
    """The settings of a manager with a teacher.

    Attributes:
        module: The teacher.
        rename: As given; None for the same names.
        start: What it starts with.
        is_within: Whether student and teacher are one module, parts of which have other names.
    """

    module: nn.Module
    rename: Rename | None
    start: Start
    is_within: bool = False
    has_warned_of_writes: bool = False
    has_warned_of_stall: bool = False
    _patterns: list[tuple[str, re.Pattern[str], str]] = field(default_factory=list)

    @classmethod
    def parse(cls, into: object, rename: object, start: object, **more: object) -> Into | None:
        """Of what EMAManager is given; None without a teacher.

        Args:
            into: The teacher.
            rename: Names.
            start: What it starts with.
            more: Settings that can't be given beside it, by name.

        Raises:
            TypeError: Something of another type.
            ValueError: Settings that don't go together.
        """
        if start not in get_args(Start):
            raise ValueError(f"{TITLE}: start is {start!r}; choose 'copy' or 'keep'")
        if into is None:
            for name, value in (("rename", rename), ("start", None if start == "copy" else start)):
                if value is not None:
                    raise ValueError(
                        f"{TITLE}: {name} is {value!r}, but there is no teacher; pass it as into="
                    )
            return None
        if not isinstance(into, nn.Module):
            raise TypeError(
                f"{TITLE}: into is a {type(into).__name__}; pass a torch.nn.Module, one a manager"
            )
        for name, value in more.items():
            if value is not None:
                raise ValueError(
                    f"{TITLE}: {name} is {value!r}, but with into= the averages are the teacher's "
                    "own tensors, as they are; convert or move the teacher before"
                )
        if rename is not None and not callable(rename) and not isinstance(rename, Mapping):
            raise TypeError(
                f"{TITLE}: rename is a {type(rename).__name__}; pass a function from name to name, "
                "or a dictionary of patterns to what they become"
            )
        made = cls(into, rename, start)  # type: ignore[arg-type]
        if isinstance(rename, Mapping):
            made._patterns = [_pattern(*pair) for pair in rename.items()]
        return made

    def read(self, model: nn.Module, tree: Tree) -> Teacher:
        """Reads the teacher; what of the student's tree is the teacher's is taken out of it.

        Raises:
            ValueError: Student and teacher are one, or names don't go together.
        """
        own = _tracking.read(self.module)
        student, teacher = (_tracking.modules_of(m)[""] for m in (model, self.module))
        self.is_within = student is teacher
        if self.is_within and self.rename is None:
            raise ValueError(
                f"{TITLE}: into is the model itself; pass a copy "
                "(copy.deepcopy(model).requires_grad_(False)), or with rename= what in it is the "
                "average of what"
            )
        if not self.is_within:
            tree.members = _outside(tree.members, model, teacher)
            own.members = _outside(own.members, self.module, student)
        images = self._images(tree.members)
        if self.is_within:
            tree.members = [m for m in tree.members if images[m.name] != m.name]
            if not tree.members:
                raise ValueError(
                    f"{TITLE}: into is the model itself and rename= changes none of its "
                    f"{len(images)} names, so nothing in it is the average of anything"
                )
        # So that a swap frees and counts on both sides.
        tree.units = _shards.units_of(model, self.module)
        return Teacher(self, own, images)

    def _images(self, members: Sequence[Member]) -> dict[str, str]:
        """The teacher's name for each of the student's."""
        names = [member.name for member in members]
        if self.rename is None:
            return {name: name for name in names}
        if callable(self.rename):
            images: dict[str, Any] = {name: self.rename(name) for name in names}
            for name, image in images.items():
                if not isinstance(image, str):
                    raise TypeError(
                        f"{TITLE}: rename returned a {type(image).__name__} for '{name}'; it must "
                        "return the teacher's name, which may be the same"
                    )
            return images
        for pattern, compiled, _ in self._patterns:
            if not any(map(compiled.fullmatch, names)):
                raise ValueError(
                    f"{TITLE}: rename pattern '{pattern}' matches none of the student's "
                    f"{len(names)} names: {_tracking.shown(names)}"
                )
        return {name: self._image(name) for name in names}

    def _image(self, name: str) -> str:
        for _, compiled, becomes in self._patterns:
            if (found := compiled.fullmatch(name)) is not None:
                return "".join(
                    chain(*zip_longest(becomes.split("*"), found.groups(), fillvalue=""))
                )
        return name

    def warn_of_stages(self, stages: Mapping[str, tuple[Tensor, Tensor]], level: int) -> None:
        """Warns of tensors that each update brings to the teacher's device, if there are any.

        Args:
            stages: Name to the student's tensor and the teacher's.
            level: Of the stack, for the warning.
        """
        for name, (student, teacher) in list(stages.items())[:1]:
            num_bytes = _bytes_of(student for student, _ in stages.values())
            warnings.warn(
                f"{TITLE}: '{name}' is on {student.device} and the teacher's on {teacher.device}: "
                f"each update first copies {num_bytes:,} bytes there, and waits for it; put both "
                "on one device, where an update reads and writes memory only",
                UserWarning,
                stacklevel=level + 1,
            )


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _pattern(pattern: object, becomes: object) -> tuple[str, re.Pattern[str], str]:
    if not isinstance(pattern, str) or not isinstance(becomes, str):
        raise TypeError(f"{TITLE}: rename has {pattern!r}: {becomes!r}; pass strings")
    if pattern.count("*") != becomes.count("*"):
        raise ValueError(
            f"{TITLE}: rename has '{pattern}': '{becomes}'; each * on the right stands for what "
            "the one of the same place on the left matches, so there must be as many"
        )
    return pattern, re.compile("(.*)".join(map(re.escape, pattern.split("*")))), becomes


def _outside(members: Sequence[Member], model: nn.Module, other: nn.Module) -> list[Member]:
    """Those of a model that aren't in a module which is a part of it."""
    found = _tracking.modules_of(model).items()
    prefixes = tuple(f"{name}." for name, module in found if module is other)
    return [m for m in members if not m.name.startswith(prefixes)] if prefixes else list(members)


def _refuse_merged(members: Sequence[Member], images: Mapping[str, str]) -> None:
    firsts: dict[str, Member] = {}
    for member in members:
        first = firsts.setdefault(images[member.name], member)
        if memory_of(first.local) != memory_of(member.local):
            raise ValueError(
                f"{TITLE}: rename sends '{first.name}' and '{member.name}' both to "
                f"'{images[member.name]}'; each needs a tensor of its own in the teacher"
            )
