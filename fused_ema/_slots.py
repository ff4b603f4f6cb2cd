"""The tensors of a model with their emas: one slot each, however many names it has."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from fused_ema import _native, _notes, _repeat, _shards, _storage, ops
from fused_ema._foreach import DTYPE_PAIRS, dtype_name, has_plain_memory, is_dense
from fused_ema._sources import Feed, matched, misfit, unsupported
from fused_ema._teacher import Teacher
from fused_ema._tracking import Buffers, Member, Tree, group_tied, memory_of
from fused_ema.ops import Form
from fused_ema.plan import Plan

Kind = Literal["average", "copy", "keep"]
"""Averaged; copied at every update; or kept as it was first cloned."""

_DONE = {"average": "averaged", "copy": "copied", "keep": "kept as first cloned"}

_TITLE = "fused_ema.EMAManager"

_NARROW = (torch.bfloat16, torch.float16)


@dataclass(eq=False)
class Slot:
    """One tracked tensor and its ema.

    Attributes:
        members: The model's tensors that are this memory; the first stands for all.
        kind: What an update does with it.
        reason: Why, for a reader.
        emas: One for each average, in the strides of what it follows. What isn't averaged has one,
            which stands for each.
        stage: Where the ema is on another device: room for those values there.
        param_device: Where the param was when the ema was made.
        given: What is averaged in the param's place; None for the param itself.
        is_away: Whether the ema is in the host's memory and the param on a device, without a
            stage: neither a plan nor torch averages or copies it (fused_ema._offload does).
        in_plan: Whether a plan averages or copies it. Not what is assigned anew in each step, for
            which the plan would be made anew each time.
        target: The teacher's, which the ema is; None where the manager has made it.
    """

    members: tuple[Member, ...]
    kind: Kind
    reason: str
    emas: list[Tensor]
    stage: Tensor | None
    param_device: torch.device
    given: Tensor | None = None
    target: Member | None = None
    is_away: bool = False
    in_plan: bool = field(init=False)

    def __post_init__(self) -> None:
        self.in_plan = not (self.is_away or self.is_inference_buffer()) and (
            self.kind == "average"
            or (
                self.kind == "copy"
                and self.exchanges()
                and self.ema.element_size() in (2, 4, 8)
                and has_plain_memory(self.param)
            )
        )

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.members[0].name

    @property
    def ema(self) -> Tensor:
        """The only one, or the first: in dtype, device and layout the others are the same."""
        return self.emas[0]

    @property
    def own_emas(self) -> list[Tensor]:
        """Each once, where one stands for several."""
        return self.emas if self.kind == "average" else self.emas[:1]

    @property
    def param(self) -> Tensor:
        """The model's tensor, as much of it as this rank holds."""
        return self.members[0].local

    @cached_property
    def offset(self) -> tuple[int, ...]:
        """Where the param's shard begins in the whole tensor; 0s where it is the whole."""
        return _shards.offset_of(self.members[0].tensor)

    @property
    def followed(self) -> Tensor:
        """What the ema follows, as much of it as this rank holds: the param, or what is given."""
        return self.param if self.given is None else _shards.shard_of(self.given)

    @property
    def treatment(self) -> str:
        """What an update does with it, and why."""
        reason = self.reason if self.given is None else "from its source"
        is_renamed = self.target is not None and self.target.name != self.name
        into = f" into '{self.target.name}'" if self.target is not None and is_renamed else ""
        return f"{_DONE[self.kind]}{into}: {reason}"

    @property
    def source(self) -> Tensor:
        """What the ema is updated from: on its own device."""
        return self.followed if self.stage is None else self.stage

    def exchanges(self) -> bool:
        """Whether a swap can exchange the two in place without losing a bit."""
        # Not where the plan, which takes all of its pairs, has something else than the param.
        is_elsewhere = self.is_away or self.stage is not None
        return self.given is None and self.ema.dtype == self.param.dtype and not is_elsewhere

    @property
    def is_prompt(self) -> bool:
        """Whether something else than an optimizer may write the param: before its next step."""
        return not any(m.tensor.requires_grad and not m.is_buffer for m in self.members)

    def is_inference_buffer(self) -> bool:
        """Whether it was assigned anew in inference mode, outside of which nothing may write it."""
        return self.members[0].is_buffer and self.param.is_inference()

    def part_of(self, values: Tensor) -> Tensor:
        """What of some values, whole or sharded as the param is, belongs to this rank."""
        return _shards.part_of(self.members[0].tensor, values)

    def seen_as(self, member: Member, values: Tensor) -> Tensor:
        """Values in the param's layout, as that member of the slot shows them."""
        tensor = member.local
        if tensor.shape != self.param.shape or tensor.stride() != self.param.stride():
            # Tied by a transposed view: dense, so the ema has the same strides.
            values = values.as_strided(tensor.shape, tensor.stride(), values.storage_offset())
        return _shards.with_shard(member.tensor, values)


class Tracked:
    """Everything that follows from the tensors that a model has at the moment.

    Attributes:
        tree: The model that was read.
        members: The tracked ones, in the model's order.
        slots: Of these members; tied ones share one.
        averaged: Slots to average at each update; by the plan, but for those that are loose.
        copied: Slots to copy at each update, but for those that are away.
        followed: Slots to copy before the first average, but for those that are away; the plan
            copies the averaged ones.
        has_away: Whether there are any that are away.
        staged: Averaged slots whose param must be brought to the ema's device.
        tied: Slots whose members are several tensors over one memory, which a conversion or a
            move of the model may part.
        shards: Of the members that are DTensors.
        is_sharded: Whether there are any.
        feed: Where sources are asked for; None without any.
        teacher: Whose tensors the emas are; None where they are the manager's.
    """

    def __init__(
        self,
        tree: Tree,
        members: Sequence[Member],
        slots: Sequence[Slot],
        feed: Feed | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        self.tree = tree
        self.members = list(members)
        self.slots = slots
        self.averaged = [slot for slot in slots if slot.kind == "average"]
        self.copied = [slot for slot in slots if slot.kind == "copy" and not slot.is_away]
        self.followed = [slot for slot in slots if slot.kind != "average" and not slot.is_away]
        self.has_away = any(slot.is_away for slot in slots)
        self.staged = [slot for slot in self.averaged if slot.stage is not None]
        self.loose = [slot for slot in self.averaged if not (slot.in_plan or slot.is_away)]
        self.loose_copied = [slot for slot in self.copied if not slot.in_plan]
        self.tied = [slot for slot in slots if any(m.local is not slot.param for m in slot.members)]
        self.teacher = teacher
        self.shards = _shards.Shards(
            [m.tensor for m in (*members, *(s.target for s in slots if s.target is not None))]
        )
        self.is_sharded = any(_shards.is_dtensor(member.tensor) for member in members)
        self.feed = feed
        self.num_averages = len(slots[0].emas) if slots else 1
        self._given_shards = _shards.Shards([s.given for s in slots if s.given is not None])
        # What repeatable() has found after an update; None again once it may be otherwise.
        self.repeated: _repeat.Repeat | None = None

    def is_current(self) -> bool:
        """Whether the model still has the very tensors, and those their shards."""
        return self.tree.is_current() and self.shards.are_current() and self.has_teacher()

    def is_current_so_far(self) -> bool:
        """The same in every step; see Tree.is_current_so_far()."""
        if self.teacher is not None and not self.teacher.tree.is_current_so_far():
            return False
        return self.tree.is_current_so_far() and self.shards.are_current()

    def has_teacher(self) -> bool:
        """Whether the teacher, if there is any, still has the very tensors."""
        return self.teacher is None or self.teacher.tree.is_current()

    def writable(self) -> AbstractContextManager[object]:
        """The mode in which all params can be written."""
        is_inference = any(slot.is_inference_buffer() for slot in self.slots)
        return torch.inference_mode() if is_inference else nullcontext()

    def note_write(self) -> None:
        """To be called after each write to params."""
        self.shards.note_write()
        self.tree.units.note_write()
        if self.teacher is not None:
            self.teacher.note_write()

    @cached_property
    def plan(self) -> Plan:
        """Of the averaged slots that aren't loose, with all of their averages.

        Raises what making a plan raises.
        """
        return self._plan_of([slot for slot in self.averaged if slot.in_plan])

    @cached_property
    def parted_plans(self) -> tuple[Plan, Plan]:
        """Plans of what others than an optimizer may write, and of the rest."""
        planned = [slot for slot in self.averaged if slot.in_plan]
        prompt = [slot for slot in planned if slot.is_prompt]
        return self._plan_of(prompt), self._plan_of([s for s in planned if not s.is_prompt])

    def _plan_of(self, planned: Sequence[Slot]) -> Plan:
        emas = [[slot.emas[k] for slot in planned] for k in range(self.num_averages)]
        plan = Plan(
            emas if self.num_averages > 1 else emas[0],
            [slot.source for slot in planned],
            [slot.name for slot in planned],
        )
        _notes.plan_made(plan)
        return plan

    def drop_plan(self) -> None:
        """It is made anew where it is wanted."""
        self.repeated = None
        self.__dict__.pop("plan", None)
        self.__dict__.pop("parted_plans", None)

    @cached_property
    def _copies(self) -> Any:
        """A plan of the copied slots; None without kernels."""
        planned = [slot for slot in self.copied if slot.in_plan]
        if _native.C is None or not planned:
            return None
        emas, params = [slot.ema for slot in planned], [slot.param for slot in planned]
        try:
            return _native.C.Plan(emas, params, [slot.name for slot in planned], True)
        except (TypeError, ValueError):  # Buffers that overlap, say.
            self._leave_copies_to_torch()
            return None

    def _leave_copies_to_torch(self) -> None:
        self.repeated = None
        for slot in self.copied:
            slot.in_plan = False
        self.loose_copied = self.copied

    def update(
        self, momenta: Sequence[float], form: Form, average: Callable[..., None] | None = None
    ) -> None:
        """Averages, by a momentum for each average, and copies: all, or none where it raises.

        After a failed copy from another device some may have been copied; it can be made again.
        Where there is an ``average``, it is called with all of this in place of _average().
        """
        if self.teacher is not None and momenta[0] == 0:
            self.plan._check()
            return  # Of lerp -0.0 would become 0.0, and NaN beside an infinite param.
        copies = self._checked_copies()
        loose = self.copied if copies is None else self.loose_copied
        early = []
        if loose:
            self.check_geometry("update", loose)
            early = [slot for slot in loose if not slot.exchanges()]
        if early:
            self.plan._check()
            _storage.copy([slot.ema for slot in early], [slot.param for slot in early])
        if average is None:
            self._average(momenta, form)
        else:
            average(self, momenta, form)
        # What is left can't fail any more.
        if copies is not None:
            copies.copy_to_ema()
        late = [slot for slot in loose if slot not in early] if early else loose
        if late:
            _storage.copy([slot.ema for slot in late], [slot.param for slot in late])

    def repeatable(self, form: Form, frozen: Sequence[Tensor]) -> _repeat.Repeat | None:
        """The same update as one call; None where it has more to do than its plans, or to ask.

        Args:
            form: Of the updates.
            frozen: Tensors that aren't tracked because they require no gradient.
        """
        copies = self._copies
        more = self.feed, self.staged, self.loose, self.loose_copied, self.tied
        if self.num_averages > 1 or any(more) or (copies is None and self.copied):
            return None
        trees, between = [self.tree.watched], (0.0, 1.0)
        noted = None if self.teacher is None else self.teacher.watched
        if self.teacher is not None:
            if noted is None:
                return None
            trees.append(self.teacher.tree.watched)
            # Both ends have a meaning of their own.
            least = max(self.teacher.least_momentum, math.ulp(0.0))
            between = least, math.nextafter(1.0, 0.0)
        return _repeat.repeat(
            self.plan,
            copies,
            form,
            trees,
            between=between,
            shards=self.shards.watched,
            frozen=frozen,
            noted=noted,
        )

    def _checked_copies(self) -> Any:
        copies = self._copies
        if copies is not None:
            try:
                copies.check()
            except (TypeError, ValueError):
                # One was converted, say.
                self.check_geometry("update", self.copied)
                self._leave_copies_to_torch()
                self._copies = copies = None
        return copies

    def _average(self, momenta: Sequence[float], form: Form) -> None:
        if self.teacher is not None and momenta[0] == 1:
            self._replace()
            return
        if self.loose:
            self.plan._check()
            self.average_loose(momenta, form)
        self.run(self.plan, momenta, form)

    def run(self, plan: Plan, momenta: Sequence[float], form: Form) -> None:
        """An update by a plan of these slots, with a momentum for each average."""
        plan._update(momenta[0] if self.num_averages == 1 else momenta, form)

    def average_loose(self, momenta: Sequence[float | Tensor], form: Form) -> None:
        """Averages those that no plan has."""
        if self.loose:
            sources = [slot.source for slot in self.loose]
            for k, momentum in enumerate(momenta):
                ops._update([slot.emas[k] for slot in self.loose], sources, momentum, form)

    def _replace(self) -> None:
        """Copies the averaged ones: a teacher that has got infinite goes on, too."""
        if self.loose:
            self.plan._check()
            _storage.copy([s.ema for s in self.loose], [s.source for s in self.loose])
        self.plan.copy_to_ema()

    def follow(self) -> None:
        """Copies all: before the first average."""
        if self.followed or self.loose:
            self.check_geometry("update", self.followed)
            self.plan._check()
            pairs = [(slot.ema, slot.param) for slot in self.followed]
            pairs += [(ema, slot.source) for slot in self.loose for ema in slot.emas]
            _storage.copy([ema for ema, _ in pairs], [values for _, values in pairs])
        for k in range(self.num_averages):
            self.plan.copy_to_ema(k)

    @cached_property
    def _places(self) -> dict[str, tuple[int, Slot]]:
        """Where a name stands among the members, and its slot."""
        slots = {member.name: slot for slot in self.slots for member in slot.members}
        return {m.name: (i, slots[m.name]) for i, m in enumerate(self.members)}

    def follow_buffers(self, op: str, anew: Mapping[str, Tensor]) -> bool:
        """Takes buffers that were assigned anew; False, and nothing is done, where one won't do."""
        changes = []
        for name, tensor in anew.items():
            if name not in self._places:
                continue
            place, slot = self._places[name]
            was = self.members[place]
            now = Member(name, tensor, True, was.is_statistic)
            if len(slot.members) > 1:
                return False
            if not is_alike(was.tensor, tensor):
                if not is_continued(was, now) or now.local is not tensor:
                    return False
                check_memory(op, now)
            changes.append((place, slot, now))
        self.repeated = None
        for place, slot, now in changes:
            self.members[place], slot.members = now, (now,)
            if slot.in_plan:
                slot.in_plan = False
                _notes.left_plan(now.name)
                is_averaged = slot.kind == "average"
                (self.loose if is_averaged else self.loose_copied).append(slot)
                if is_averaged:
                    self.drop_plan()
                else:
                    self.__dict__.pop("_copies", None)
        return True

    def lay_anew(self) -> None:
        """Gives emas the strides of params that were laid anew, as channels_last does."""
        slots = [
            slot
            for slot in self.averaged
            if slot.stage is None
            and not slot.is_away
            and slot.target is None
            and slot.ema.stride() != slot.followed.stride()
            and slot.ema.shape == slot.followed.shape
            and slot.ema.device == slot.followed.device
            and is_dense(slot.followed)
        ]
        if not slots:
            return
        made = []
        for _ in range(self.num_averages):
            try:
                emas = _storage.allocate(
                    [slot.followed for slot in slots],
                    [slot.ema.dtype for slot in slots],
                    [slot.ema.device for slot in slots],
                )
            except torch.OutOfMemoryError:
                return  # It is as right as before, and as slow.
            made.append(emas)
        for k, emas in enumerate(made):
            _storage.copy(emas, [slot.emas[k] for slot in slots])
        for slot, *emas in zip(slots, *made, strict=True):
            slot.emas = emas
        self.drop_plan()

    def rebound(
        self, tree: Tree, now: Mapping[str, Member], teacher: Teacher | None = None
    ) -> Tracked:
        """The same slots with the tensors that now stand under their names."""
        slots = [
            replace(slot, members=tuple(now.get(m.name, m) for m in slot.members))
            for slot in self.slots
        ]
        if teacher is not None:
            for slot in slots:
                slot.target = teacher.targets[slot.name]
                slot.emas = [slot.target.local]
        members = [now.get(m.name, m) for m in self.members]
        return Tracked(tree, members, slots, self.feed, teacher or self.teacher)

    def restaged(self) -> Tracked:
        """The same with stages of the dtypes that the params have now."""
        with torch.inference_mode(False):  # As in allocate().
            slots = [
                s if s.stage is None else replace(s, stage=s.stage.to(s.followed.dtype))
                for s in self.slots
            ]
        return Tracked(self.tree, self.members, slots, self.feed, self.teacher)

    def fed(self, op: str) -> Tracked:
        """The same with the sources that there are now, their values up to date.

        Raises:
            ValueError: Some don't fit. Nothing has changed then.
        """
        if self.feed is None:
            return self
        found = self.feed.poll()
        if found is None and self._given_shards.are_current():
            self.feed.prepare()
            return self
        given = [slot.given for slot in self.slots]
        if found is not None:
            given = matched(op, found, [slot.members for slot in self.slots])
        pairs = list(zip(self.slots, given, strict=True))
        problems = [
            unsupported(slot.members[0], source, slot.ema.dtype)
            for slot, source in pairs
            if source is not None and (slot.ema.dtype, source.dtype) not in DTYPE_PAIRS
        ]
        if problems:
            raise misfit(op, problems)
        slots = [replace(slot, given=source) for slot, source in pairs]
        tracked = Tracked(self.tree, self.members, slots, self.feed, self.teacher)
        tracked.lay_anew()
        tracked.plan  # noqa: B018  What they refuse isn't taken.
        if found is not None:
            self.feed.take(found)
        self.feed.prepare()
        return tracked

    def by_name(self, values_of: Callable[[int], Tensor]) -> dict[str, Tensor]:
        """Name to values, from a function of the slot's index; in the model's order."""
        found = {}
        for index, slot in enumerate(self.slots):
            values = values_of(index)
            for member in slot.members:
                found[member.name] = slot.seen_as(member, values)
        return {member.name: found[member.name] for member in self.members}

    def check_geometry(self, op: str, slots: Sequence[Slot] | None = None) -> None:
        """Raises where a param no longer has its ema's shape, or its device, or its ties."""
        for slot in self.slots if slots is None else slots:
            param = slot.param
            if param.shape != slot.ema.shape:
                if refusal := _shards.refusal(slot.members[0].tensor):
                    raise ValueError(f"fused_ema.EMAManager.{op}: '{slot.name}' {refusal}")
                raise ValueError(
                    f"fused_ema.EMAManager.{op}: '{slot.name}' has shape {list(param.shape)} but "
                    f"its ema has {list(slot.ema.shape)}; give it back its shape, or call "
                    "refresh() to start its average anew"
                )
            ema_place = param if slot.stage is None else slot.stage
            if slot.target is not None and slot.ema.device != ema_place.device:
                raise ValueError(
                    f"fused_ema.EMAManager.{op}: the teacher's '{slot.target.name}' is on "
                    f"{slot.ema.device} but was on {ema_place.device} when the manager was made; "
                    "move it back, or call refresh() to go on there"
                )
            if param.device != slot.param_device:
                raise ValueError(
                    f"fused_ema.EMAManager.{op}: '{slot.name}' is on {param.device} but was on "
                    f"{slot.param_device} when the manager was made; move it back, or call "
                    "refresh() to go on there"
                )
            for member in slot.members[1:]:
                tensor = member.local
                if tensor is not param and tensor.data_ptr() != param.data_ptr():
                    raise ValueError(
                        f"fused_ema.EMAManager.{op}: '{member.name}' is no longer tied to "
                        f"'{slot.name}', as it was when the manager was made; tie them again, or "
                        "call refresh() to average each by itself"
                    )

    def check_pairs(self, op: str) -> None:
        """Raises where a param's dtype doesn't fit its ema's, or params have come to share memory.

        The plan finds these as well, but doesn't know the way out.
        """
        for slot in self.averaged:
            if (slot.ema.dtype, slot.followed.dtype) not in DTYPE_PAIRS:
                raise TypeError(
                    f"fused_ema.EMAManager.{op}: '{slot.name}' is {slot.followed.dtype} now and "
                    f"its ema is {slot.ema.dtype}, and these can't be averaged; convert it back, "
                    "or call refresh() to go on in another dtype"
                )
            if slot.followed.shape != slot.ema.shape:
                raise ValueError(
                    f"fused_ema.EMAManager.{op}: the source of '{slot.name}' has shape "
                    f"{list(slot.followed.shape)} now and its ema has {list(slot.ema.shape)}; give "
                    "it back its shape, or pass another source"
                )
        found: dict[object, Slot] = {}
        for slot in self.slots:
            other = found.setdefault(memory_of(slot.param), slot)
            if other is not slot:
                raise ValueError(
                    f"fused_ema.EMAManager.{op}: '{other.name}' and '{slot.name}' share memory, "
                    "which they didn't when the manager was made; call refresh() to average them "
                    "as one, or give each its own"
                )


def is_alike(was: Tensor, now: Tensor) -> bool:
    """Whether a plain tensor can take another's place without any further question."""
    return (
        type(now) is type(was) is Tensor
        and now.layout == was.layout
        and now.dtype == was.dtype
        and now.shape == was.shape
        and now.stride() == was.stride()
        and now.device == was.device
    )


def is_continued(was: Member, now: Member) -> bool:
    """Whether a name's tensor is the same, or a buffer assigned anew or converted."""
    a, b = was.tensor, now.tensor
    if a is b:
        return True
    same_kind = a.dtype == b.dtype or (a.is_floating_point() and b.is_floating_point())
    same_place = a.shape == b.shape and a.device == b.device
    same_place = same_place and _shards.is_laid_alike(a, b)
    return was.is_buffer and now.is_buffer and same_kind and same_place


@dataclass(frozen=True)
class Policy:
    """How the ema of a tensor is kept.

    Attributes:
        ema_dtype: Of averaged tensors; "param" for the param's; None for float32 where
            the param is bfloat16 or float16, and the param's elsewhere.
        device: Of all emas; None for the param's.
        buffers: What becomes of each buffer.
        num_averages: That are kept of each averaged tensor.
        allocate_away: Makes emas in the host's memory for params on a device, of these and of
            dtypes; None where they are to have stages.
    """

    ema_dtype: torch.dtype | Literal["param"] | None
    device: torch.device | None
    buffers: Buffers
    num_averages: int = 1
    allocate_away: Callable[[Sequence[Tensor], Sequence[torch.dtype]], list[Tensor]] | None = None

    def __post_init__(self) -> None:
        known = sorted({dtype_name(ema) for ema, _ in DTYPE_PAIRS})
        given = self.ema_dtype
        if isinstance(given, torch.dtype) and dtype_name(given) in known:
            return
        if given is not None and given != "param":
            raise ValueError(
                f"fused_ema.EMAManager: ema_dtype is {given!r}; choose None, 'param' or one of "
                + ", ".join(f"torch.{name}" for name in known)
            )

    def check(self, members: Sequence[Member]) -> None:
        """Raises where a member can't be tracked."""
        for member in members:
            check_memory("", member)
            self._kind_of(member)

    def track(
        self,
        op: str,
        tree: Tree,
        members: Sequence[Member],
        old: Mapping[str, Slot] | None = None,
        feed: Feed | None = None,
        teacher: Teacher | None = None,
    ) -> Tracked:
        """Slots for these members, with emas that are clones of what they follow.

        Args:
            op: For errors.
            tree: The model that was read.
            members: The tracked ones, which have been checked.
            old: Slots of before by name: what fits of their emas is kept as it is. None for a new
                manager, for which each rank makes one.
            feed: Where sources are asked for.
            teacher: Whose tensors are to be the emas.
        """
        is_new, old = old is None, {} if old is None else old
        groups = group_tied(members)
        params = [group[0].local for group in groups]
        before = [old.get(group[0].name) for group in groups]
        decided = [self._kind_of(group[0]) for group in groups]
        judged = [
            i
            for i, (group, (kind, _)) in enumerate(zip(groups, decided, strict=True))
            if kind == "average"
            and group[0].is_buffer
            and before[i] is None
            # Of float8 torch can't tell, and it is refused below.
            and params[i].element_size() > 1
        ]
        # A mask of -inf would be NaN after one update, an observer's limits for ever infinite.
        finite = _storage.are_finite([params[i] for i in judged])
        finite = _shards.all_of(_TITLE, [groups[i][0].tensor for i in judged], finite)
        for i, is_finite in zip(judged, finite, strict=True):
            if not is_finite:
                decided[i] = "copy", "not finite when the manager was made"
        for i, slot in enumerate(before):
            if slot is not None and groups[i][0].is_buffer and decided[i][0] == "average":
                decided[i] = slot.kind, slot.reason
        told = [member.tensor for member in members] if is_new else []
        with _shards.one_error(_TITLE, told):
            tracked = self._made(op, tree, members, groups, decided, before, feed, teacher)
        if teacher is not None and teacher.starts_as_copy:
            # Only now: where another rank has failed, the teacher is as it was.
            new = [
                slot
                for slot, was in zip(tracked.slots, before, strict=True)
                if was is None or was.ema.shape != slot.ema.shape
            ]
            _storage.copy([slot.ema for slot in new], [slot.followed for slot in new])
            teacher.note_write()
        return tracked

    def _made(
        self,
        op: str,
        tree: Tree,
        members: Sequence[Member],
        groups: Sequence[Sequence[Member]],
        decided: Sequence[tuple[Kind, str]],
        before: Sequence[Slot | None],
        feed: Feed | None,
        teacher: Teacher | None,
    ) -> Tracked:
        params = [group[0].local for group in groups]
        found = {} if feed is None else feed.poll() or {}
        given: list[Tensor | None] = [None] * len(groups)
        if feed is not None:
            given = matched(op, found, groups)
        followed = [
            param if one is None else _shards.shard_of(one)
            for param, one in zip(params, given, strict=True)
        ]
        kinds = [kind for kind, _ in decided]
        targets = [None if teacher is None else teacher.targets[g[0].name] for g in groups]
        dtypes = [
            self._dtype_of(group[0], kind, one, target)
            for group, kind, one, target in zip(groups, kinds, followed, targets, strict=True)
        ]
        devices = [
            self.device or param.device if target is None else target.local.device
            for param, target in zip(params, targets, strict=True)
        ]
        kept = {
            i: slot.emas
            for i, slot in enumerate(before)
            if slot is not None
            and slot.name == groups[i][0].name  # Of tensors that were tied one goes on with it.
            and (self.num_averages == 1 or (slot.kind == "average") == (kinds[i] == "average"))
            and _shards.is_laid_alike(slot.members[0].tensor, groups[i][0].tensor)
            and _has_room(slot.ema, followed[i], dtypes[i], devices[i])
        }
        kept |= {i: [target.local] for i, target in enumerate(targets) if target is not None}
        new = [i for i in range(len(groups)) if i not in kept]
        elsewhere = [i for i, p in enumerate(params) if needs_stage(devices[i], p.device)]
        away = {
            i
            for i in elsewhere
            if self.allocate_away is not None
            and shows_its_memory(params[i])
            and shows_its_memory(followed[i])
        }
        # An allocation for each average: a swap and a snapshot take one.
        made = []
        for k in range(self.num_averages):
            own = [i for i in new if k == 0 or kinds[i] == "average"]
            here = [i for i in own if i not in away]
            there = [i for i in own if i in away]
            fresh = _storage.allocate(
                [followed[i] for i in here], [dtypes[i] for i in here], [devices[i] for i in here]
            )
            if self.allocate_away is not None:
                fresh += self.allocate_away(
                    [followed[i] for i in there], [dtypes[i] for i in there]
                )
            made.append(dict(zip(here + there, fresh, strict=True)))
        emas = kept | {i: [its.get(i, made[0][i]) for its in made] for i in new}
        staged = [i for i in elsewhere if i not in away]
        stages = _storage.allocate(
            [followed[i] for i in staged],
            [followed[i].dtype for i in staged],
            [devices[i] for i in staged],
        )
        stage_of = dict(zip(staged, stages, strict=True))
        slots = [
            Slot(
                tuple(group),
                *decided[i],
                emas[i],
                stage_of.get(i),
                params[i].device,
                given[i],
                targets[i],
                i in away,
            )
            for i, group in enumerate(groups)
        ]
        tracked = Tracked(tree, members, slots, feed, teacher)
        # Now, so that what can't be averaged is an error at once, and nothing is made at an exit.
        tracked.plan  # noqa: B018
        tracked._copies  # noqa: B018
        if feed is not None:
            feed.take(found)
            feed.prepare()
        for its in made:
            _storage.copy([*its.values()], [followed[i] for i in its])
        return tracked

    def _kind_of(self, member: Member) -> tuple[Kind, str]:
        dtype = member.local.dtype
        if not member.is_buffer:
            if dtype.is_complex:
                raise TypeError(
                    f"fused_ema.EMAManager: '{member.name}' is {dtype}, and complex parameters "
                    "can't be averaged; keep it as torch.view_as_real of it, or leave it out with "
                    "exclude="
                )
            if dtype.is_floating_point:
                return "average", "a parameter"
            return "keep", f"{dtype_name(dtype)} parameter"
        mode = self.buffers.mode_of(member)
        if mode == "copy":
            return "copy", "as buffers= says"
        if not dtype.is_floating_point:
            return ("keep" if mode == "average" else "copy"), dtype_name(dtype)
        if mode == "average":
            return "average", "as buffers= says"
        if member.is_statistic:
            return "average", "a norm layer's running statistic"
        return "copy", "no running statistic of a norm layer"

    def _dtype_of(
        self, member: Member, kind: Kind, followed: Tensor, target: Member | None
    ) -> torch.dtype:
        own = followed.dtype
        if member.local.layout != torch.strided:
            raise TypeError(
                f"fused_ema.EMAManager: '{member.name}' has layout {member.local.layout}; only "
                "dense tensors can be averaged, leave it out with exclude="
            )
        if target is not None:
            dtype = target.local.dtype
        elif kind != "average" or self.ema_dtype == "param":
            dtype = own
        elif self.ema_dtype is None:
            dtype = torch.float32 if own in _NARROW else own
        else:
            dtype = self.ema_dtype
        if kind == "average" and (dtype, own) not in DTYPE_PAIRS:
            pairs = ", ".join("/".join(map(dtype_name, pair)) for pair in DTYPE_PAIRS)
            way = "Choose another ema_dtype" if target is None else "Convert the teacher"
            what = f"'{member.name}'"
            if followed is not member.local:
                what = f"the source of {what}"
            raise TypeError(
                f"fused_ema.EMAManager: {what} is {own} and its ema would be {dtype}; "
                f"supported pairs (ema/param): {pairs}. {way}, or leave it out with exclude="
            )
        return dtype


def _has_room(ema: Tensor, param: Tensor, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether an ema of before may be the param's."""
    if ema.shape != param.shape or ema.dtype != dtype or ema.device != device:
        return False
    return ema.stride() == param.stride() or not is_dense(param)


def check_memory(op: str, member: Member) -> None:
    """Raises ValueError where a member has no values, or several in one place."""
    tensor = member.local
    title = "fused_ema.EMAManager" + (f".{op}" if op else "")
    fake = sys.modules.get("torch._subclasses.fake_tensor")
    if fake is not None and isinstance(tensor, fake.FakeTensor):
        raise ValueError(
            f"{title}: '{member.name}' is a fake tensor without values; make the manager outside "
            "of FakeTensorMode, of the real model"
        )
    if refusal := _shards.refusal(member.tensor):
        raise ValueError(f"{title}: '{member.name}' {refusal}")
    if tensor.is_meta:
        raise ValueError(
            f"{title}: '{member.name}' is on the meta device and has no values; load or initialise "
            "the model first (load_state_dict(..., assign=True), to_empty()), or bring back what "
            "was offloaded"
        )
    if tensor.layout == torch.strided and any(
        step == 0 and size > 1 for size, step in zip(tensor.shape, tensor.stride(), strict=True)
    ):
        raise ValueError(
            f"{title}: '{member.name}' is expanded: several of its elements share one place in "
            "memory, so no swap can write it; register a .clone() of it, or leave it out with "
            "exclude="
        )


def needs_stage(ema_device: torch.device, param_device: torch.device) -> bool:
    """Whether a param must be copied over before its ema can be updated."""
    return ema_device != param_device


def shows_its_memory(tensor: Tensor) -> bool:
    """Whether its memory is its own and holds the values that it shows."""
    return has_plain_memory(tensor) and not (tensor.is_conj() or tensor.is_neg())


def room_for_raw(slots: Sequence[Slot]) -> list[Tensor]:
    """Memory for the params of these slots; where there is a stage of their dtype, that.

    What is away from its ema goes to where that is.
    """
    stages = [s.stage if s.source.dtype == s.param.dtype else None for s in slots]
    missing = [slot for slot, stage in zip(slots, stages, strict=True) if stage is None]
    dtypes = [slot.param.dtype for slot in missing]
    devices = [slot.ema.device if slot.is_away else slot.param.device for slot in missing]
    made = iter(_storage.allocate([slot.param for slot in missing], dtypes, devices))
    return [next(made) if stage is None else stage for stage in stages]
