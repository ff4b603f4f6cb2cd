"""The average of a model's weights: what is tracked, when it is updated, how it is swapped in."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from operator import is_not
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fused_ema import (
    _averages,
    _caches,
    _captured,
    _checks,
    _counters,
    _named_state,
    _notes,
    _observed,
    _offload,
    _overlap,
    _repeat,
    _shards,
    _slots,
    _sources,
    _state,
    _steps,
    _storage,
    _teacher,
    _tracking,
)
from fused_ema._foreach import check_form, dtype_name, has_plain_memory, holds
from fused_ema._offload import AveragedOn as AveragedOn
from fused_ema._tracking import BufferMode
from fused_ema.ops import Form
from fused_ema.schedules import Schedule

_TITLE = "fused_ema.EMAManager"

# Managers whose model holds their ema, by id: nobody else may touch its tensors meanwhile. Of all
# weak containers this one can be listed while other threads change it.
_swapped_managers: weakref.WeakValueDictionary[int, EMAManager] = weakref.WeakValueDictionary()


class _Swaps:
    """How often the set of those has changed."""

    count = 0


_swaps = _Swaps()


class EMAManager:
    """Keeps the exponential moving average (EMA) of a model's weights during training.

    Call :meth:`update` after every ``optimizer.step()``, and evaluate inside of :meth:`swapped`::

        ema = (1 - m) * ema + m * param          m = momentum, the weight of the new value

    The semantics are those of the EMA hooks of OpenMMLab's MMDetection 2.x: at the 0-based
    iteration i an update runs where ``(i + 1) % interval == 0``, with ``momentum_fun(i)`` or the
    constant momentum; only floating-point tensors are averaged; a swap exchanges every tracked
    tensor. With ``form="mul_add"``, ``ema_dtype="param"`` and ``buffers="average"`` the bits are
    theirs as well.

    Each tensor is tracked once, however many names it has, so tied weights are averaged once and
    swapped right. Names are those of the model itself: what DistributedDataParallel, DataParallel,
    torch.compile and activation checkpointing put in front of them is left out. The emas of one
    dtype and device lie in one allocation, each in its param's strides.

    A module or parameter that was replaced, removed or added is an error at the next update or
    swap (an update notices one added to a module without any within eight calls);
    :meth:`refresh` takes the model as it is now. A buffer that the model assigns anew, with the
    same shape, dtype and device, is followed. A manager belongs to one thread.

    Of a sharded model (DTensors: FSDP2, HSDP, tensor parallel) each rank makes a manager and calls
    it as all others do. It works on the shards that the rank holds: nothing is gathered, and no
    update or swap sends anything. Where a manager is made, and in :meth:`load_state_dict`, ranks
    that hold parts of one tensor tell each other what went wrong and whether they have the same,
    which is waited for as long as their process group waits. What FSDP2 has gathered is freed
    before names are read and before a swap, so that the next forward sees what was written. Shard
    first, then make the manager; after sharding, :meth:`refresh`. Write to shards in place: what is
    assigned to ``p.data`` of a DTensor reaches neither FSDP2 nor the manager.

    Args:
        model: Its parameters and, unless ``skip_buffers``, its persistent buffers are tracked.
            May be wrapped or compiled.
        momentum: The weight of the new value, between 0 and 1, both excluded. Or several averages
            of the model: a dictionary of their names (letters, digits, ``_``, ``-``) to constants
            and schedules, ``{"fast": 0.01, "wide": schedules.power(0.10)}``. Each is what a manager
            of its own would keep; all else they share, buffers that aren't averaged too.
        interval: Iterations from update to update, a whole number from 1. The momentum is used as
            it is; :func:`fused_ema.schedules.composed` makes up for the interval.
        skip_buffers: Track parameters only.
        momentum_fun: The momentum as a function of the 0-based iteration, in [0, 1], instead of
            the constant: one of :mod:`fused_ema.schedules` or your own.
        form: ``"lerp"``, ``"mul_add"`` for the bits of ``ema.mul_(1 - m).add_(param, alpha=m)``, or
            ``"two_products"`` for those of ``(1 - m) * ema + m * param``; see
            :func:`fused_ema.update_`.
        begin: The first iteration that averages. Before it the ema follows by copy, integer
            buffers too, at every iteration whatever the interval.
        ema_dtype: Of averaged tensors: a dtype, ``"param"`` for each param's own, or None for
            float32 where the param is bfloat16 or float16 and the param's own elsewhere.
        device: Of the emas; None for each param's own. With ``"cpu"`` and params on a device they
            are host emas: updates go through staging of a bounded size, on a thread and on streams
            of their own, and no param is copied as a whole. ``docs/offload.md``. With ``into``,
            ``nonfinite`` or ``telemetry``, and on any other device than the param's, an update
            first copies all params there, and waits for it.
        copy_buffers: The same as ``buffers="copy"``.
        skip_frozen: Leave parameters out that don't require a gradient now. One that requires it
            later is an error until :meth:`refresh`; one that is frozen later stays tracked.
        include: Track only names that match one of these patterns: shell-style, ``*`` matches
            dots too, as in ``"backbone.*"``.
        exclude: Leave out names that match one of these patterns.
        buffers: What becomes of persistent buffers. ``"auto"`` averages the running statistics of
            norm layers and copies all others at every update: the average of a mask, a codebook or
            a switch is nonsense. ``"average"``, the rule of the reference hooks, averages all
            floating-point ones and keeps the first clone of the others. ``"copy"`` copies all,
            ``"skip"`` tracks none. Or a dictionary of name patterns to these; the first that
            matches counts, and what none matches is ``"auto"``. A buffer that holds something
            infinite or NaN now is copied in any case. :meth:`describe` says what became of each.
        sources: What is averaged in place of parameters, such as the fp32 masters of an optimizer:
            a dictionary of their names to tensors of the same shapes and devices, a function that
            returns one, or what :mod:`fused_ema.sources` makes. A function is called at each
            update; a dictionary is looked at then, but can't know that the optimizer has others by
            now, as after its ``load_state_dict()``. A parameter that isn't among them is averaged
            itself. All else is the model's: names, buffers, what is tracked, and what a swap
            exchanges; sources are only read, and ``ema_dtype`` goes by theirs.
        into: A teacher or target network: a module whose own tensors are the averages, in place, by
            name. It is neither copied nor converted, no second copy of it is kept, and its tensors
            keep their addresses. Names are without wrappers on both sides; what only one side has
            must be left out by ``include`` or ``exclude``, which match the names of either. Its
            parameters must not require gradients. With it a momentum of 1 copies (hard updates
            each ``interval`` iterations), and one of 0 writes nothing at all. ``docs/teachers.md``.
        rename: With ``into``: the teacher's name for each of the student's, a function or a
            dictionary of patterns, ``{"*.lora_A.default.*": "*.lora_A.teacher.*"}``; the first that
            matches counts. The model itself may then be ``into``: what is renamed is averaged.
        start: With ``into``: ``"copy"``, the teacher starts as the student (what is tracked of it),
            or ``"keep"``, with the values that it has.
        nonfinite: ``"skip"`` keeps the ema of an element whose param is NaN or infinite; by default
            it becomes what torch makes of it. Each update then looks at the params first, and waits
            for their device.
        telemetry: True, or a number n for each n-th update: measure what :meth:`telemetry` returns.
            A measured update takes many times as long, and a copy of the averages meanwhile.
        capturable: How many iterations ahead updates may be recorded in a CUDA graph and replayed,
            each with the momentum of its own iteration; None for no graphs. ``momentum_fun`` is
            called ahead for all of them, now. Takes 8 bytes an iteration for each average and 8
            more, on the model's device. On the CPU, where nothing is captured, it does the same.
            ``docs/captured.md``.
        overlap: Run updates beside the step, on a stream of their own on each device. Before the
            parameters are written the device has to wait for them: the hook of
            :meth:`register_step_post_hook` sees to it, or call :meth:`wait` before each
            ``optimizer.step()``. What others than an optimizer write (buffers, what requires no
            gradient) is averaged in the current stream. Of params on the CPU, with ``into``,
            ``nonfinite`` or ``telemetry``, and inside of a captured graph it does nothing. Host
            emas with that hook are updated beside the step in any case.
        staging_mb: Of host emas: MB (2**20 bytes) for buffers on each device, and as much in the
            host's memory. With more, the host's way below has to wait less before a step.
        averaged_on: Of host emas, who computes: ``"device"``, through the staging, so that the
            ema's bytes cross the link both ways; or ``"host"``, so that the params' bytes cross it
            once. ``"auto"`` takes for each tensor the one with fewer bytes over the link, one way:
            the host for params that are narrower than their emas, and for several averages.
        decay: Not taken; the error says which momentum it is.

    Raises:
        TypeError: The model is no module; a tensor whose dtype can't be averaged; a sparse one; a
            decay instead of a momentum.
        ValueError: A setting outside of its range, a model without parameters, a pattern that
            matches nothing, a parameter that isn't initialised yet or is on the meta device,
            expanded tensors, tensors that overlap, a model that FSDP1 shards, DTensors with
            Partial placements, parameters that ZeRO-3 has partitioned; ranks that hold parts of a
            model and differ; staging for less than an aligned part of a tensor, an unknown
            ``averaged_on``; a teacher that doesn't fit, is trained or shares tensors with the
            model: one error that lists what, and nothing is written. Of a sharded model what is
            wrong on one rank is the same error on all.
        RuntimeError: FSDP2 is in the middle of a forward or backward, as in each call that follows;
            with ``capturable``, ``momentum_fun`` fails for an iteration ahead.

    Warns:
        UserWarning: A constant momentum above 0.5, which most often is a decay; a teacher in 16
            bits whose momentum is rounded away, or on another device than the model.

    Example:
        >>> ema = fused_ema.EMAManager(model, momentum=0.001)
        >>> ema.update()  # after each optimizer.step()
        >>> with ema.swapped():  # the model holds the average here
        ...     loss = model(torch.ones(2)).sum()
        >>> ema.num_updates
        1
    """

    def __init__(
        self,
        model: nn.Module,
        momentum: _averages.Momenta = 0.0002,
        interval: int = 1,
        skip_buffers: bool = False,
        momentum_fun: Schedule | None = None,
        *,
        form: Form = "lerp",
        begin: int = 0,
        ema_dtype: torch.dtype | Literal["param"] | None = None,
        device: torch.device | str | None = None,
        copy_buffers: bool = False,
        skip_frozen: bool = False,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] = (),
        buffers: BufferMode | Mapping[str, BufferMode] | None = None,
        sources: _sources.Given | None = None,
        into: nn.Module | None = None,
        rename: _teacher.Rename | None = None,
        start: _teacher.Start = "copy",
        nonfinite: _observed.Nonfinite = "propagate",
        telemetry: bool | int = False,
        capturable: int | None = None,
        overlap: bool = False,
        staging_mb: float = 12,
        averaged_on: AveragedOn = "auto",
        decay: None = None,
    ) -> None:
        if decay is not None:
            raise TypeError(_checks.decay_given("EMAManager", decay))
        if not isinstance(model, nn.Module):
            raise TypeError(f"{_TITLE}: model is a {type(model).__name__}; pass a torch.nn.Module")
        averages = _averages.Averages.parse(momentum, momentum_fun, is_teacher=into is not None)
        given = {"skip_buffers": skip_buffers, "copy_buffers": copy_buffers, "buffers": buffers}
        given = {name: value for name, value in given.items() if value}
        if len(given) > 1:
            raise ValueError(f"{_TITLE}: both {' and '.join(given)} are set; choose one")
        check_form("EMAManager", form)
        if sources is not None:
            _sources.check(sources)
        self._model = model
        self._sources = sources
        self._into = _teacher.Into.parse(into, rename, start, ema_dtype=ema_dtype, device=device)
        self._averages = averages
        self._observer = _observed.Observer.parse(nonfinite, telemetry)
        self._interval = _checks.count("EMAManager", "interval", interval, least=1)
        self._begin = _checks.count("EMAManager", "begin", begin, least=0)
        if capturable is not None:
            capturable = _checks.count("EMAManager", "capturable", capturable, least=1)
            if self._observer is not None:
                what = "telemetry" if self._observer.every else "nonfinite='skip'"
                raise ValueError(
                    f"{_TITLE}: capturable={capturable} and {what} are set, and {what} looks at "
                    "values on the host, which a captured update can't; choose one"
                )
        self._form: Form = form
        if skip_buffers or copy_buffers:
            buffers = "skip" if skip_buffers else "copy"
        rules = _tracking.Buffers.parse("auto" if buffers is None else buffers)
        place = None if device is None else _checks.device("EMAManager", device)
        num_averages = len(averages.names)
        # A teacher is read by forwards, and an observer reads the params itself: both have stages.
        is_plain = into is None and self._observer is None
        self._offload = _offload.parse(place, staging_mb, averaged_on, num_averages, is_plain)
        self._overlap = _overlap.Overlap() if overlap and is_plain else None
        self._policy = _slots.Policy(
            ema_dtype,
            place,
            rules,
            num_averages,
            None if self._offload is None else self._offload.allocate,
        )
        self._selection = _tracking.Selection(
            rules,
            skip_frozen,
            None if include is None else _checks.patterns("EMAManager", "include", include),
            _checks.patterns("EMAManager", "exclude", exclude),
        )
        self._iteration = 0
        self._num_updates = 0
        self._is_swapped = False
        self._in_context = False
        # While swapped: which of the averages the model holds.
        self._held = 0
        # While swapped: the raw values of the slots that aren't exchanged in place, by index.
        self._aside: dict[int, Tensor] = {}
        self._marks = _storage.make_marks()
        self._hooked: tuple[list[weakref.ref[torch.optim.Optimizer]], RemovableHandle | None]
        self._hooked = [], None
        # Called after each iteration that was offered: fused_ema.posthoc.Snapshots.
        self._after_update: list[Callable[[], None]] = []
        # The count of swaps at which no manager was swapped: one that goes away doesn't matter.
        self._alone_at = -1
        # Weak: what was tracked before a refresh() must be able to go.
        self._checked: tuple[int, weakref.ref[_slots.Tracked]] | None = None
        # From a swap in to the swap out: where each param was. Its memory is held as well, or a
        # conversion there and back could come to lie at the same address.
        self._places: list[tuple[int, object]] = []
        self._tracked, self._frozen = self._track("")
        if self._into is not None and self._tracked.teacher is not None:
            if averages.is_constant(0):
                self._tracked.teacher.warn_of_stall(averages.momentum_at(0, 0), level=2)
            staged = {s.name: (s.param, s.ema) for s in self._tracked.staged}
            self._into.warn_of_stages(staged, level=2)
        self._captured: _captured.Captured | None = None
        if capturable is not None:
            self._captured = self._made_captured(capturable, self._tracked)
        _notes.log.debug("made %r", self)

    def _track(
        self, op: str, old: _slots.Tracked | None = None
    ) -> tuple[_slots.Tracked, list[_tracking.Member]]:
        """What is tracked of the model as it is now, and what is left out as frozen."""
        # A refresh() is one rank's own matter: others may have nothing to refresh.
        models = [self._model] if self._into is None else [self._model, self._into.module]
        told = [t for m in models for t in _shards.dtensors_of(m)] if old is None else []
        with _shards.one_error(_TITLE, told) as facts:
            for model in models:
                _tracking.refuse_fsdp1(_TITLE, model)
            tracked_names = {m.name for m in old.members} if old is not None else frozenset[str]()
            tree, members, teacher = self._read(tracked_names)
            frozen = self._selection.left_frozen(tree.members, {member.name for member in members})
            self._policy.check(members)
            targets = [] if teacher is None else teacher.targets.values()
            self._refuse_if_another_holds(op, ((m.name, m.local) for m in (*members, *targets)))
            facts += [self._settings(), *map(_fact, members)]
            if old is not None and teacher is None:
                self._refuse_if_laid_otherwise(op, members)
            feed = None if self._sources is None else _sources.bind(self._sources, tree.members)
        before = None if old is None else {m.name: s for s in old.slots for m in s.members}
        tracked = self._policy.track(op, tree, members, before, feed, teacher)
        tree.members.clear()  # They are the tracked members' alone to hold on to.
        return tracked, frozen

    def _made_captured(self, num_iterations: int, tracked: _slots.Tracked) -> _captured.Captured:
        captured = _captured.Captured(
            num_iterations,
            self._averages,
            self._interval,
            self._begin,
            self._into is not None,
            _captured.device_of(tracked),
        )
        captured.prepare(tracked)
        return captured

    def _read(
        self, tracked_names: Container[str]
    ) -> tuple[_tracking.Tree, list[_tracking.Member], _teacher.Teacher | None]:
        """The model as it is now, what is tracked of it, and the teacher of these."""
        tree = _tracking.read(self._model)
        if self._into is None:
            return tree, self._selection.choose(tree.members, tracked_names), None
        teacher = self._into.read(self._model, tree)
        members = self._selection.choose(tree.members, tracked_names, teacher.members)
        teacher.pair(members, tree.members, self._selection.means, _slots.check_memory)
        teacher.members.clear()
        return tree, members, teacher

    def _settings(self) -> _shards.Fact:
        momenta = self._averages.settings()
        text = f"momentum={momenta}, interval={self._interval}, begin={self._begin}, "
        text += f"form={self._form!r}, ema_dtype={self._policy.ema_dtype}"
        if self._into is not None:
            text += f", start={self._into.start!r}"
        return _shards.Fact(None, "EMAManager", text)

    def _refuse_if_laid_otherwise(self, op: str, members: Sequence[_tracking.Member]) -> None:
        """That no average is lost because this rank hasn't got the part that it would need."""
        emas = self._emas()
        problems = [
            f"'{m.name}' {problem}"
            for m in members
            if m.name in emas and emas[m.name].shape == m.tensor.shape
            if (problem := _shards.misfit(m.tensor, emas[m.name]))
        ]
        if problems:
            raise ValueError(
                f"{_TITLE}.{op}: averages can't be taken over without sending them; save this "
                "manager's state_dict() with torch.distributed.checkpoint, and load it into a new "
                "manager of the model:\n  " + "\n  ".join(_checks.listed(problems))
            )

    # ---- what it is

    @property
    def iteration(self) -> int:
        """The iteration that comes next: how many were offered, where nobody else counts.

        With ``capturable`` it is read from the device.
        """
        return self._position()[0]

    @property
    def num_updates(self) -> int:
        """How many updates have averaged. Copies before ``begin`` don't count.

        With ``capturable`` it is read from the device.
        """
        return self._position()[1]

    def _position(self) -> tuple[int, int]:
        if self._captured is not None:
            return self._captured.position()
        return self._iteration, self._num_updates

    def _work_out(self, iteration: int) -> None:
        """What of _move() can fail."""
        if self._captured is not None:
            self._captured.work_out(iteration)

    def _move(self, iteration: int, num_updates: int) -> None:
        self._iteration, self._num_updates = iteration, num_updates
        if self._captured is not None:
            self._captured.move(iteration, num_updates)

    @property
    def averages(self) -> tuple[str, ...]:
        """The names of the averages; empty where there is one, without a name."""
        return self._averages.names if self._averages.is_named else ()

    @property
    def is_swapped(self) -> bool | str:
        """Whether the model holds an average; of averages with names, which one: its name."""
        if self._is_swapped and self._averages.is_named:
            return self._averages.names[self._held]
        return self._is_swapped

    def momentum_at(self, iteration: int, name: str | None = None) -> float:
        """The momentum of an update at a 0-based iteration.

        Args:
            iteration: That.
            name: Of an average, where there are several.

        Raises:
            TypeError: ``momentum_fun`` returned no number.
            ValueError: ``momentum_fun`` returned a number outside of [0, 1]; there is no average of
                that name, or there are several and none was named.
        """
        return self._averages.momentum_at(self._averages.index("momentum_at", name), iteration)

    def named_emas(self, name: str | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yields each name and its average; tied tensors under each of their names.

        They are the live ones, and each saves at its own size. While swapped the averages are the
        model's own tensors, where those are of the same dtype.

        Args:
            name: Of an average, where there are several.

        Raises:
            ValueError: There is none of that name, or there are several and none was named.
        """
        yield from self._emas(self._averages.index("named_emas", name)).items()

    def describe(self) -> dict[str, str]:
        """What an update does with each tensor, and why, by name: ``"averaged: a parameter"``.

        ``"averaged: from its source"`` where ``sources=`` had one the last time it was asked.
        """
        slots = self._tracked.slots
        treatments = {member.name: slot.treatment for slot in slots for member in slot.members}
        if self._offload is not None:
            for slot in slots:
                for member in slot.members:
                    treatments[member.name] += self._offload.treatment(slot)
        return {member.name: treatments[member.name] for member in self._tracked.members}

    def __repr__(self) -> str:
        num_elements = sum(slot.members[0].tensor.numel() for slot in self._tracked.slots)
        tracked = self._tracked
        kinds = {"copied": "copy", "kept": "keep"}
        others = {
            what: [slot for slot in tracked.slots if slot.kind == kind]
            for what, kind in kinds.items()
        }
        others["from sources"] = [slot for slot in tracked.slots if slot.given is not None]
        parts = "".join(f", {len(slots):,} {what}" for what, slots in others.items() if slots)
        if self._offload is not None and tracked.has_away:
            parts += f", {self._offload.text(tracked.slots)}"
        return (
            f"EMAManager({len(tracked.slots):,} tensors, {num_elements:,} elements{parts}, "
            f"{'' if self._into is None else f'into a {type(self._into.module).__name__}, '}"
            f"momentum={self._averages.shown()}, interval={self._interval}, form={self._form!r}, "
            f"{self._position_text()}{self._swapped_text()})"
        )

    def _position_text(self) -> str:
        if self._captured is not None and self._captured.is_capturing():
            return "in a capture"
        iteration, num_updates = self._position()
        return f"iteration={iteration}, num_updates={num_updates}"

    def _swapped_text(self) -> str:
        if not self._is_swapped:
            return ""
        return f", swapped with '{self.is_swapped}'" if self.averages else ", swapped"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            f"{_TITLE}: a manager can't be copied or pickled, since it holds on to one model's "
            "memory; save its state_dict(), and make a manager for the other model"
        )

    # ---- in training

    def update(self, iteration: int | None = None, *, found_inf: Tensor | None = None) -> None:
        """Offers an iteration: the ema moves where the interval says so. After each step.

        Args:
            iteration: Its 0-based number where somebody else counts; None to go on counting here.
            found_inf: A tensor of one element, as a gradient scaler has it: where it isn't zero
                the optimizer has skipped its step, so nothing happens here and nothing is counted.
                On a device it is waited for, but with ``capturable``.

        Raises:
            RuntimeError: The model is swapped, or its parameters were replaced or added; in a
                capture, what must be made outside: a plan of tensors that moved, a snapshot.
            TypeError: As :meth:`momentum_at`; a param was converted to a dtype that doesn't fit;
                ``found_inf`` is no tensor of one element.
            ValueError: As :meth:`momentum_at`; an iteration below 0; a param was resized, or moved
                to another device.

            Nothing has changed when an error is raised, but by an update of a host ema that has
            failed beside the step: see :meth:`synchronize`.
        """
        i = (
            self._iteration
            if iteration is None
            else _checks.count("EMAManager.update", "iteration", iteration, 0)
        )
        if self._is_swapped or self._alone_at != _swaps.count:
            self._refuse_update("update")
        if self._captured is not None:
            self._update_captured(self._captured, None if iteration is None else i, found_inf)
            return
        if found_inf is not None and _checks.flag("EMAManager.update", "found_inf", found_inf):
            return
        if i < self._begin:
            self._apply(None)
        elif (i + 1) % self._interval == 0:
            self._apply(self._averages.momenta_at(i))
            self._num_updates += 1
        self._iteration = i + 1
        if self._offload is not None:  # Once it counts: what was started goes on in any case.
            is_fenced = self._overlap is not None or self._hooked_now() is not None
            self._offload.fence("update", is_fenced)
        for call in self._after_update:
            call()

    def _update_captured(
        self, captured: _captured.Captured, iteration: int | None, found_inf: Tensor | None
    ) -> None:
        """The same by the table of momenta on the device."""
        if self._after_update and captured.is_capturing():
            raise RuntimeError(
                f"{_TITLE}.update: snapshots are saved by Python, which a replay doesn't run; "
                "update this manager outside of the graph, or save its state_dict() yourself"
            )
        if captured.skips(found_inf):
            return
        if iteration is not None:
            captured.offer(iteration)
        self._apply(None, found_inf)
        captured.look()
        for call in self._after_update:
            call()

    def _refuse_update(self, op: str) -> None:
        if self._is_swapped:
            raise RuntimeError(
                f"{_TITLE}.{op}: the model holds the ema; {self._way_back()} first, so that the "
                "raw weights are back"
            )
        self._refuse_if_another_is_swapped(op)

    def register_step_post_hook(
        self,
        optimizer: torch.optim.Optimizer,
        *others: torch.optim.Optimizer,
        partial: bool = False,
    ) -> RemovableHandle:
        """Makes optimizers call :meth:`update` after each training step.

        A step that a gradient scaler skips is no step, and with gradient accumulation there is one
        update for each real step. A fused optimizer is called by the scaler in any case and skips
        by itself: to know it, the hook waits for the device after steps with a scaler, but with
        ``capturable``, where the update finds it out. A step while
        the model holds the ema is refused before it writes anything. As all hooks of torch's
        optimizers, it isn't there in a copy or a pickle of the optimizer.

        Of several optimizers, whatever their order, an update runs once all have stepped since the
        last one: after the last of them, where each steps once. One that steps more often waits for
        the others; a round in which a step is skipped has no update. Optimizers that step inside of
        the backward pass, as those for single parameters do (gradient release), make one update at
        the end of each pass. ``docs/steps.md`` has the right lines for trainers and optimizers.

        Args:
            optimizer: May be one that accelerate or Opacus has prepared.
            others: All that train what is averaged, where there are several.
            partial: Says that what they don't hold isn't trained, though it requires a gradient.

        Returns:
            A handle; its ``remove()`` ends it, for all of them.

        Raises:
            TypeError: Not an optimizer, one whose steps call no hooks, or one of DeepSpeed's.
            ValueError: A parameter that is averaged and requires a gradient is in none of them:
                they hold a part, or copies that are written to the model after their steps.
            RuntimeError: This manager has a hook already.
        """
        title = f"{_TITLE}.register_step_post_hook"
        found = [_steps.hookable(title, given) for given in (optimizer, *others)]
        hooks = [one._optimizer_step_post_hooks for one in found]
        if len({id(one) for one in hooks}) < len(hooks):
            raise ValueError(f"{title}: an optimizer is given twice; pass each once")
        if (hooked := self._hooked_now()) is not None:
            raise RuntimeError(
                f"{title}: this {type(hooked).__name__} calls update() already; remove() the "
                "handle of that call, or pass all optimizers in one call, for one update after the "
                "last of them"
            )
        if not partial:
            _steps.refuse_others(title, found, self._trained())
        rounds = _steps.Rounds(len(found), self.update, decides=self._captured is not None)
        references = [weakref.ref(one) for one in found]
        heads = [_steps.heads(one) for one in found]

        def before_step(index: int, stepping: Any) -> None:
            self._refuse_update("optimizer.step")
            self.wait()
            rounds.before(index, stepping)
            now = _steps.heads(stepping)
            if len(now) != len(heads[index]) or any(map(is_not, now, heads[index])):
                # As wrappers do that are made after the hook, and step copies of their own.
                alive = [one for reference in references if (one := reference()) is not None]
                if not partial:
                    _steps.refuse_others(title, alive, self._trained())
                heads[index] = now

        handle = _steps.register(found, before_step, rounds.after)
        self._hooked = references, handle
        return handle

    def _hooked_now(self) -> torch.optim.Optimizer | None:
        """An optimizer that calls update() by this manager's hook."""
        references, handle = self._hooked
        for reference in references:
            optimizer = reference()
            if handle and optimizer and handle.id in optimizer._optimizer_step_post_hooks:
                return optimizer
        return None

    def telemetry(self, by_name: bool = False, group: Any = None) -> dict[str, float]:
        """What the latest measured update has found, for a logger; empty before the first.

        ``ema/lag_norm``, of param - ema after the update; ``ema/param_norm``; ``ema/largest_lag``;
        ``ema/nonfinite``, how many elements of params are NaN or infinite, which the others leave
        out; ``ema/stalled``, how many differ from their ema, which didn't move. Of averages with
        names ``ema/fast/lag_norm``. Reads each device once; nothing before is read.

        Args:
            by_name: Each tensor as well: ``ema/lag_norm/0.weight``.
            group: Of a sharded model, the process group whose ranks are taken together, each of
                which calls this; None for what this rank holds.

        Raises:
            RuntimeError: The manager was made without ``telemetry=``.
        """
        if self._observer is None or not self._observer.every:
            raise RuntimeError(
                f"{_TITLE}.telemetry: nothing is measured; make the manager with telemetry=True, "
                "or telemetry=100 to measure each hundredth update"
            )
        return self._observer.telemetry(self._averages.names, by_name, group)

    def _trained(self) -> dict[str, list[Tensor]]:
        """The parameters that are averaged and require a gradient, with what stands for them."""
        trained = {}
        for slot in self._tracked.averaged:
            tensors = [member.tensor for member in slot.members]
            if any(tensor.requires_grad for tensor in tensors):
                trained[slot.name] = tensors + ([] if slot.given is None else [slot.given])
        return trained

    def _apply(self, momenta: Sequence[float] | None, found_inf: Tensor | None = None) -> None:
        """Averages, with a momentum for each average, or copies everything where there are none.

        A capturable manager does what its table says, where ``found_inf`` is zero.
        """
        tracked = self._tracked
        repeated = tracked.repeated
        if repeated is not None and momenta is not None and not _caches.keep_computed():
            if _repeat.make_again(repeated, momenta[0]):
                return
            if 0 < momenta[0] < 1:
                tracked.repeated = None  # What has changed is found out below.
        if tracked.teacher is not None:
            tracked.teacher.prepare(None if momenta is None else momenta[0])
        if not tracked.is_current_so_far():
            tracked = self._follow("update", so_far=True)
        self._refuse_if_unfrozen("update")
        if tracked.feed is not None:
            if self._overlap is not None:
                self._overlap.wait()  # Where strides have changed it moves averages.
            self._tracked = tracked = tracked.fed("update")
        if tracked.staged and any(s.source.dtype != s.followed.dtype for s in tracked.staged):
            self._tracked = tracked = tracked.restaged()
        if tracked.tied:
            tracked.check_geometry("update", tracked.tied)
        try:
            plan = tracked.plan
            num_refreshes = plan._num_refreshes
            if staged := tracked.staged:
                _storage.copy([slot.source for slot in staged], [slot.followed for slot in staged])
            away = []
            if tracked.has_away and self._offload is not None:
                away = self._offload.prepare(tracked, "update", copies=momenta is None)
            observer = self._observer
            if self._captured is not None:
                self._captured.run(tracked, self._form, found_inf)
            elif observer is not None:
                if momenta is None:
                    observer.follow(tracked)
                else:
                    tracked.update(momenta, self._form, observer.average)
            elif momenta is None:
                if self._overlap is not None:
                    self._overlap.wait()
                tracked.follow()
            elif self._overlap is not None:
                tracked.update(momenta, self._form, self._overlap.average)
            else:
                tracked.update(momenta, self._form)
        except (TypeError, ValueError, RuntimeError):
            tracked.check_geometry("update")  # Says it in the model's words.
            tracked.check_pairs("update")
            raise
        if away and self._offload is not None:
            title = "a copy" if momenta is None else f"update {self._num_updates + 1}"
            self._offload.start(away, momenta, self._form, title)
        if plan._num_refreshes != num_refreshes:
            if self._overlap is not None:
                self._overlap.wait()
            _notes.plan_made_anew(plan)
            tracked.lay_anew()
        if tracked.teacher is not None:
            tracked.teacher.note_update()
        is_plain = observer is None and self._overlap is None and not tracked.has_away
        if tracked.repeated is None and momenta is not None and is_plain:
            frozen = [member.tensor for member in self._frozen]
            tracked.repeated = tracked.repeatable(self._form, frozen)

    def wait(self) -> None:
        """Makes what follows on the device wait for the last read of the params.

        To be called before anything but a hooked optimizer writes parameters, or replaces or frees
        them, where updates run beside the step: with ``overlap=True``, and with a host ema and
        :meth:`register_step_post_hook`. The device waits; the host goes on, for a host ema once the
        last read has been asked for. All methods of the manager do it by themselves, and the hook
        before each step. Elsewhere it does nothing.

        Raises:
            RuntimeError: The last update of a host ema has failed; see :meth:`synchronize`.
        """
        if self._offload is not None:
            self._offload.wait("wait")
        if self._overlap is not None:
            self._overlap.wait()

    def synchronize(self) -> None:
        """Waits until host emas have the values of the last update.

        For who holds on to what :meth:`named_emas` or :meth:`state_dict` have returned: these wait
        themselves, but for no update after them. Elsewhere it is :meth:`wait`.

        Raises:
            RuntimeError: An update of a host ema has failed beside the step. It says how, and which
                averages have moved, which haven't, and of which only a part has. Whatever is called
                next raises it, once.
        """
        self._settle("synchronize")

    def _settle(self, op: str) -> None:
        """Before averages are read or written, or params written."""
        if self._offload is not None:
            self._offload.synchronize(op)
        if self._overlap is not None:
            self._overlap.wait()

    # ---- for evaluation

    @contextmanager
    def swapped(self, name: str | None = None) -> Iterator[None]:
        """The model holds the ema inside of the ``with``, and its raw weights again after it.

        Whatever is raised inside, the raw weights come back. Nothing is allocated where ema and
        param have one dtype (but for the time of a swap, a copy of each 8-bit or bool buffer): they
        are exchanged. Elsewhere the raw weights are set aside and the ema is rounded into the
        model, so that the ema itself loses nothing; what is written to such a param meanwhile is
        dropped, but to an averaged buffer, whose new statistics (``update_bn``) the ema takes.

        Args:
            name: Of the average, where there are several; the others stay as they are.

        Raises:
            RuntimeError: The model is swapped already, or its parameters were replaced or added.
            ValueError: A param was resized, or moved to another device; there is no average of that
                name, or there are several and none was named.
        """
        average = self._averages.index("swapped", name)
        self._refuse_if_swapped("swapped")
        try:
            self._swap_in("swapped", average)
            self._in_context = True
            yield
        finally:
            self._in_context = False
            if self._is_swapped:
                try:
                    self._swap_out("swapped")
                except (KeyboardInterrupt, SystemExit):
                    if self._is_swapped:  # It may come after the last write, too.
                        self._swap_out("swapped")
                    raise

    def swap(self, name: str | None = None) -> None:
        """Exchanges the ema and the model's weights; a second call brings them back.

        Inside of :meth:`swapped` it brings back the raw weights, and leaving then changes nothing:
        the way out of a context that can't be left any more.

        Args:
            name: Of the average, where there are several; to bring the weights back it may be left
                out.

        Raises:
            RuntimeError: Parameters were replaced or added; the model holds another average than
                the one that was named.
            ValueError: A param was resized, or moved to another device; there is no average of that
                name, or there are several and none was named.
        """
        if self._is_swapped:
            if name is not None and self._averages.index("swap", name) != self._held:
                raise RuntimeError(
                    f"{_TITLE}.swap: the model holds '{self.is_swapped}', not '{name}'; "
                    f"{self._way_back()} first"
                )
            self._swap_out("swap")
        else:
            average = self._averages.index("swap", name)
            self._refuse_if_another_is_swapped("swap")
            self._swap_in("swap", average)

    def _swap_in(self, op: str, average: int) -> None:
        if self._captured is not None:
            self._captured.look()
        self._held = average
        tracked = self._follow(op)
        tracked.check_geometry(op)
        slots = tracked.slots
        others = [i for i, slot in enumerate(slots) if not slot.exchanges()]
        # All that may fail for want of memory comes before the first write to the model.
        room = _slots.room_for_raw([slots[i] for i in others])
        params = [slots[i].param.detach() for i in others]
        if self._offload is None:
            _storage.copy(room, params)
        else:
            self._offload.set_aside(room, params)
        writes = [
            _Write(slots[i].param, slots[i].emas[average], raw)
            for i, raw in zip(others, room, strict=True)
        ]
        try:
            with tracked.writable():
                self._exchange(True, dict(zip(others, room, strict=True)), writes)
        except (TypeError, ValueError):
            tracked.check_pairs(op)
            raise
        self._places = [_place_of(slot.param) for slot in slots]

    def _swap_out(self, op: str) -> None:
        self._settle(op)
        # An evaluation that was broken off leaves its parameters gathered.
        self._tracked.tree.units.reshard(f"{_TITLE}.{op}", by_force=True)
        lost = self._follow_buffers()
        tracked = self._tracked
        tracked.check_geometry(op)
        slots, aside = tracked.slots, self._aside
        writes = []
        for i, raw in aside.items():
            param, ema = slots[i].param.detach(), slots[i].emas[self._held]
            writes.append(_Write(slots[i].param, raw, ema))
            is_statistic = slots[i].kind == "average" and slots[i].members[0].is_buffer
            # Not of a loaded state, beside which the model holds anything.
            is_here = slots[i].stage is None and not slots[i].is_away
            if is_statistic and is_here and self._places:
                # Computed anew inside, as by update_bn, it belongs to the average.
                is_same = (param == ema.to(param.dtype)) | (param.isnan() & ema.isnan())
                writes[-1] = _Write(slots[i].param, raw, param.clone())
                now = torch.where(is_same, ema, param.to(ema.dtype))
                writes.append(_Write(ema, now, ema.clone()))
        for i, slot in enumerate(slots):
            # Converted while it held the ema: each side takes the other's values in its own dtype.
            if i not in aside and slot.ema.dtype != slot.param.dtype:
                own = slot.emas[self._held]
                raw, ema = own.clone(), slot.param.detach().clone()
                writes += [_Write(slot.param, raw, ema), _Write(own, ema, raw)]
        moved = [
            slot.name
            for i, (slot, (address, _)) in enumerate(zip(slots, self._places, strict=False))
            if i not in aside
            and not slot.members[0].is_buffer  # Which a model may assign anew at any time.
            and _place_of(slot.param)[0] != address
            and not _is_wider(slot.param.dtype, slot.ema.dtype)
        ]
        with tracked.writable():
            self._exchange(False, aside, writes)
        self._places = []
        if self._captured is not None:
            self._captured.look()
        if lost:
            warnings.warn(
                f"{_TITLE}.{op}: {_tracking.shown(lost)} were replaced or removed while the model "
                "held the ema, so the model hasn't got their raw weights back; change a "
                "copy.deepcopy of the model, or one that copy_to() has written",
                UserWarning,
                stacklevel=2,
            )
        if moved:
            warnings.warn(
                f"{_TITLE}.{op}: {_tracking.shown(moved)} were converted or moved while the model "
                "held the ema, which is now as it came back from that, rounded if the dtype was "
                "narrower; convert a copy.deepcopy of the model, or one that copy_to() has written",
                UserWarning,
                stacklevel=2,
            )

    def _follow_buffers(self) -> list[str]:
        """Follows what was assigned anew while swapped; returns the names of what is gone."""
        # What was swapped in must come out, whatever else has become of the model meanwhile.
        tracked = self._tracked
        if not tracked.is_current():
            try:
                now = {member.name: member for member in _tracking.read(self._model).members}
            except (ValueError, RuntimeError):
                # A member that isn't initialised, say. The next update says so.
                return []
            continued = {
                was.name: now[was.name]
                for was in tracked.members
                if was.name in now and _slots.is_continued(was, now[was.name])
            }
            # With the old tree: the next update finds out what else has changed.
            self._tracked = tracked.rebound(tracked.tree, continued)
            return [was.name for was in tracked.members if was.name not in continued]
        return []

    def _set_swapped(self, is_swapped: bool) -> None:
        self._is_swapped = is_swapped
        _swaps.count += 1
        if is_swapped:
            _swapped_managers[id(self)] = self
        else:
            _swapped_managers.pop(id(self), None)

    def _exchange(
        self, is_swapped: bool, aside: Mapping[int, Tensor], writes: Sequence[_Write]
    ) -> None:
        """Exchanges the slots in place and writes the others, all of them or none.

        Args:
            is_swapped: Whether the model holds the ema afterwards.
            aside: Raw values by slot, to be kept while the model is swapped.
            writes: For the slots that are set aside, or whose two dtypes differ.
        """
        tracked, was_aside = self._tracked, self._aside
        here = [
            slot
            for i, slot in enumerate(tracked.slots)
            if i not in aside and slot.ema.dtype == slot.param.dtype
        ]
        # The plan has its table already, and takes its pairs in one launch; but only all of them.
        planned = {id(slot) for slot in tracked.averaged if slot.in_plan}
        by_plan = planned <= {id(slot) for slot in here}
        rest = [slot for slot in here if id(slot) not in planned] if by_plan else here
        exchange = _storage.Exchange(
            [slot.emas[self._held] for slot in rest],
            [slot.param for slot in rest],
            tracked.plan if by_plan else None,
            self._marks,
            average=self._held,
        )
        written = [write.tensor for write in writes]
        try:
            exchange.run()
            values = [write.values for write in writes]
            if self._offload is None:
                _storage.copy(written, values)
            else:
                self._offload.bring(written, values)
            tracked.note_write()
            self._aside = dict(aside) if is_swapped else {}
            self._set_swapped(is_swapped)
        except BaseException:
            exchange.undo()
            _storage.copy(written, [write.before for write in writes])
            tracked.note_write()
            self._aside = was_aside
            self._set_swapped(not is_swapped)
            raise

    def copy_to(self, model: nn.Module, name: str | None = None) -> None:
        """Copies the ema into a model, by name: this one for good, or another to keep or export.

        Args:
            model: Has a parameter or buffer of the same shape for each tracked name, in any
                floating-point dtype where the average has one, and on any device. What isn't
                tracked stays as it is there, but for the extra state of modules
                (``get_extra_state``), which is copied.
            name: Of the average, where there are several.

        Raises:
            TypeError: The model is no module.
            ValueError: Names are missing, or shapes or kinds of dtypes differ, or a tensor can't be
                written; the error lists them. Nothing is written then. There is no average of that
                name, or there are several and none was named.
            RuntimeError: The tracked model itself while it is swapped, or one that holds the ema
                of another manager.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"{_TITLE}.copy_to: model is a {type(model).__name__}; pass a torch.nn.Module"
            )
        average = self._averages.index("copy_to", name)
        self._settle("copy_to")
        _tracking.refuse_fsdp1(f"{_TITLE}.copy_to", model)
        tree = _tracking.read(model)
        members = {member.name: member for member in tree.members}
        emas = self._emas(average)
        problems = [
            f"'{name}' {problem}"
            for name, ema in emas.items()
            if (problem := _misfit(ema, members.get(name)))
        ]
        tied = _tracking.group_tied([members[name] for name in emas if name in members])
        for first, *others in tied:
            ema = emas[first.name]
            problems += [
                f"'{first.name}' and '{other.name}' differ but are one tensor in the model"
                for other in others
                if other.local.stride() == first.local.stride()
                and not _state.same_values(ema, emas[other.name])
            ]
        carried, left_behind = _extra_states(self._model, model)
        problems += left_behind
        if problems:
            raise ValueError(
                f"{_TITLE}.copy_to: the model doesn't fit; nothing was changed:\n  "
                + "\n  ".join(_checks.listed(problems))
            )
        if self._is_swapped:
            own = {_tracking.memory_of(slot.param) for slot in self._tracked.slots}
            if any(_tracking.memory_of(group[0].local) in own for group in tied):
                raise RuntimeError(
                    f"{_TITLE}.copy_to: the model is swapped, so it holds the ema already; swap "
                    "back first"
                )
        self._refuse_if_another_holds("copy_to", ((m.name, m.local) for g in tied for m in g))
        for module, values in carried:  # First, since it may raise, which a copy doesn't any more.
            module.set_extra_state(values)
        _storage.copy(
            [group[0].local for group in tied],
            [_shards.part_of(group[0].tensor, emas[group[0].name]) for group in tied],
        )
        _shards.Shards([group[0].tensor for group in tied]).note_write()
        tree.units.note_write()

    def averaged_model(self, name: str | None = None) -> nn.Module:
        """A copy of the model that holds the ema, for export or to evaluate beside the training.

        A ``copy.deepcopy`` of the model itself, without DistributedDataParallel, torch.compile or
        the like around it. It shares no memory with the model, and no later update reaches it.
        Hooks, what isn't tracked, ``requires_grad`` and each module's mode (training or evaluation)
        are as they are in the model now. A manager that the model keeps as an attribute is the same
        in the copy. To write into a model that is there already, :meth:`copy_to`.

        Args:
            name: Of the average, where there are several.

        Raises:
            ValueError: The model is sharded; as :meth:`copy_to`.
            RuntimeError: ``copy.deepcopy`` can't copy the model.
        """
        title = f"{_TITLE}.averaged_model"
        self._averages.index("averaged_model", name)
        if self._tracked.is_sharded:
            raise ValueError(
                f"{title}: the model is sharded, and a copy of it would gather every average; load "
                "full_state_dict() into a manager of an unsharded model, and copy_to() that one, "
                "or evaluate the sharded model inside of swapped()"
            )
        model = _tracking.unwrapped(self._model)
        try:
            copied = copy.deepcopy(model, {id(self): self})
        except Exception as error:
            raise RuntimeError(
                f"{title}: the {type(model).__name__} can't be copied: {error}; make another one, "
                "and copy_to() it"
            ) from error
        self.copy_to(copied, name)
        return copied

    # ---- when the model has changed

    def reset(self) -> None:
        """Starts anew: every ema a clone of its param or source, no iteration seen.

        After pretrained weights were loaded into the model, for one. A teacher becomes the model.

        Raises:
            RuntimeError: The model is swapped, or its parameters were replaced or added.
            ValueError: A param was resized, or moved to another device.
        """
        self._refuse_if_swapped("reset")
        tracked = self._follow("reset")
        tracked.check_geometry("reset")
        self._work_out(0)
        self._tracked = tracked = tracked.fed("reset")
        pairs = [(ema, slot.followed) for slot in tracked.slots for ema in slot.own_emas]
        _storage.copy([ema for ema, _ in pairs], [values for _, values in pairs])
        if tracked.teacher is not None:
            tracked.teacher.note_write()
        self._move(0, 0)

    def refresh(self) -> list[str]:
        """Takes the model as it is now: parameters replaced, added, removed, resized or moved.

        An average goes on where its name still stands for a tensor of the same shape; it moves to
        the param's new device, unless the manager was given one. New ones start as clones. Of a
        sharded model each rank takes its own, without asking the others.

        Returns:
            The names whose average started anew.

        Raises:
            RuntimeError: The model is swapped.
            TypeError: As making a manager.
            ValueError: As making a manager; or a tensor is sharded otherwise than its average.
        """
        self._refuse_if_swapped("refresh")
        self._settle("refresh")
        emas_of = [self._emas(k) for k in range(len(self._averages.names))]
        old = {slot.name: slot for slot in self._tracked.slots}
        tracked, frozen = self._track("refresh", self._tracked)
        captured = self._captured
        if captured is not None and captured.device == _captured.device_of(tracked):
            captured.prepare(tracked)
        elif captured is not None:
            position = captured.position()
            captured = self._made_captured(captured.num_iterations, tracked)
            captured.move(*position)
        goes_on, started = [], []
        for slot in tracked.slots:
            before = emas_of[0].get(slot.name)
            if slot.name in old and old[slot.name].ema is slot.ema:
                continue
            if slot.target is not None and before is not None and before.shape == slot.ema.shape:
                continue  # The teacher's own values, wherever they are now.
            if (
                slot.target is None
                and before is not None
                and before.shape == slot.members[0].tensor.shape
                and before.is_floating_point() == slot.ema.is_floating_point()
            ):
                goes_on += [
                    (ema, slot.part_of(emas[slot.name]))
                    for ema, emas in zip(slot.own_emas, emas_of, strict=False)
                ]
            else:
                started += [member.name for member in slot.members]
        _storage.copy([ema for ema, _ in goes_on], [before for _, before in goes_on])
        self._tracked, self._frozen, self._captured = tracked, frozen, captured
        if self._offload is not None:
            self._offload.forget()
        return started

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The manager's state, by name; :mod:`fused_ema.state` says what is in it.

        The tensors are the live ones, not copies, as in ``module.state_dict()``. While swapped
        those that the model holds, and the raw ones, are copies: the memory of each changes sides
        with the swap back, and the state says what it held when it was taken. Under ``"ema"``
        stands the average in any case; of averages with names, each under its own. Of a sharded
        model they are DTensors with the placements of its own, as torch.distributed.checkpoint
        saves them and loads them onto any number of ranks.

        With ``into=`` there are counters only, and for each tensor that isn't sharded the sum of
        its bits: the averages are saved where the teacher is.

        Raises:
            RuntimeError: With ``into=`` while swapped.
        """
        if self._into is not None:
            return self._counters()
        self._settle("state_dict")
        places = range(len(self._averages.names))
        if not self._is_swapped:
            return self._packed([self._emas(k) for k in places], {})
        self._follow_buffers()
        tracked = self._tracked
        slots = tracked.slots
        emas = [self._ema_of(i, self._held) for i in range(len(slots))]
        raws = [self._aside.get(i, slot.emas[self._held]) for i, slot in enumerate(slots)]
        like = [*emas, *raws]
        copies = _storage.allocate(like, [t.dtype for t in like], [t.device for t in like])
        _storage.copy(copies, like)

        def copied_or_live(index: int, average: int) -> Tensor:
            is_its = average == self._held or slots[index].kind != "average"
            return copies[index] if is_its else slots[index].emas[average]

        return self._packed(
            [tracked.by_name(partial(copied_or_live, average=k)) for k in places],
            tracked.by_name(copies[len(emas) :].__getitem__),
        )

    def _packed(self, emas: Sequence[dict[str, Tensor]], raw: dict[str, Tensor]) -> dict[str, Any]:
        position = self._position()
        if not self._averages.is_named:
            return _state.pack(*position, emas[0], raw, self._is_swapped)
        named = dict(zip(self._averages.names, emas, strict=True))
        return _named_state.pack(*position, named, raw, self.is_swapped)

    def _counters(self) -> dict[str, Any]:
        """The state beside a teacher, whose tensors are saved where it is."""
        if self._is_swapped:
            raise RuntimeError(
                f"{_TITLE}.state_dict: student and teacher hold each other's weights, and the "
                f"state with into= has none; {self._way_back()} first, and save then"
            )
        return _counters.pack(*self._position(), self._emas())

    def full_state_dict(self) -> dict[str, Any]:
        """The state of a sharded model whole, on the first rank's CPU, for export.

        Every rank calls it. One tensor after the other is gathered and dropped again, so that no
        other rank holds more than one. What it returns saves with ``torch.save``, is read by
        :func:`fused_ema.state.read`, and goes into the manager of a model that isn't sharded. For
        checkpoints, :meth:`state_dict` and torch.distributed.checkpoint need no gather.

        Returns:
            As :meth:`state_dict`, copies on the CPU; an empty dictionary on all ranks but the first
            of those that hold parts of the model.
        """
        tensors = [member.tensor for member in self._tracked.members]
        with _shards.one_error(f"{_TITLE}.full_state_dict", tensors) as facts:
            state = self.state_dict()
            swapped = _shards.Fact(None, "the model", "swapped" if self._is_swapped else "itself")
            facts += [swapped, *map(_fact, self._tracked.members)]
        is_wanted = _shards.is_first(tensors)
        for tensors_of in () if self._into is not None else _named_state.tensors_of(state):
            for name, tensor in tensors_of.items():
                gathered = _shards.whole(tensor)
                tensors_of[name] = gathered.detach().to("cpu", copy=True) if is_wanted else None
        return state if is_wanted else {}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, average: str | None = None
    ) -> _state.IncompatibleKeys:
        """Takes over a state, before or after the model loads its own.

        A state that was taken while swapped leaves the manager swapped: :meth:`swap` then brings
        the raw weights of the state into the model. Settings are no part of a state: a run that is
        resumed with another ``interval``, ``begin`` or momentum follows what it is given.

        A state of one average goes into a manager of one, whatever its name, and one of several
        into a manager of averages with the same names. For anything else say ``average=``.

        Args:
            state_dict: What :meth:`state_dict` returned, on any device. A dtype that holds fewer
                values than the saved one is an error; a wider one is filled exactly. Of a sharded
                model, DTensors with the model's placements, or whole tensors on every rank; ranks
                that hold parts of one model call it together, and an error on one is an error on
                all.
            strict: False lets names be missing, whose averages start as clones of what the model
                holds now, or be in the state alone, which are dropped. So it is with averages, too.
                Of a state with ``into=`` it takes the counters, whatever the teacher holds.
            average: The name of the average to load, by itself: in a manager of several that one
                moves alone, from the state's of that name, or from its only one; a manager of one
                takes the state's of that name. Iteration, number of updates and buffers that aren't
                averaged are the state's in any case.

        Returns:
            The names that were missing in the state, and the unexpected ones: two lists; of
            averages with names ``"average.name"``.

        Raises:
            TypeError: Not a dictionary.
            ValueError: Another version, or names, shapes or dtypes that don't fit: one error that
                lists them all, of the first average that doesn't fit. Averages of other names. A
                teacher that isn't the one that the state was saved beside.
            RuntimeError: The model is swapped, or its parameters were replaced or added. A sharded
                one that :meth:`swap` has swapped takes a state of a swapped model: so
                torch.distributed.checkpoint finds room for the raw weights.

            Nothing has changed when an error is raised, but by a loader that wrote into the tensors
            of :meth:`state_dict` itself, as torch.distributed.checkpoint does.
        """
        title = f"{_TITLE}.load_state_dict"
        if _counters.is_state(state_dict):
            return self._load_counters(title, state_dict, strict)
        with _shards.one_error(title, [m.tensor for m in self._tracked.members]) as facts:
            tracked, states, incompatible = self._unpacked(state_dict, strict, average)
            slots, loaded = tracked.slots, next(iter(states.values()))
            self._work_out(loaded.iteration)
            # What isn't averaged is the first one's: it stands for each.
            pairs = [
                (slot.emas[k], slot.part_of(state.ema[slot.name]))
                for n, (k, state) in enumerate(states.items())
                for slot in slots
                if n == 0 or slot.kind == "average"
            ]
            raws = [slot.part_of(loaded.raw[slot.name]) for slot in slots if loaded.is_swapped]
            position = f"at iteration {loaded.iteration} after {loaded.num_updates} updates"
            text = f"{position}{', swapped' if loaded.is_swapped else ''}"
            facts += [_shards.Fact(None, "the state", text), *map(_fact, tracked.members)]
        aside: dict[int, Tensor] = {}
        if loaded.is_swapped:
            # All of it aside: so it doesn't matter what the model holds until it is swapped back.
            room = _slots.room_for_raw(slots)
            _storage.copy(room, raws)
            aside = dict(enumerate(room))
        # The manager's own live state is its state already, and copies may not overlap.
        other = [(own, given) for own, given in pairs if not _storage.is_same_memory(own, given)]
        _storage.copy([own for own, _ in other], [given for _, given in other])
        self._held = _named_state.held(state_dict, self._averages, list(states))
        if self._is_swapped:
            # Here the model holds an average already, of before.
            held = [slot.emas[self._held] for slot in slots]
            _storage.copy([slot.param for slot in slots], held)
            tracked.note_write()
        self._aside = aside
        self._set_swapped(loaded.is_swapped)
        self._move(loaded.iteration, loaded.num_updates)
        if tracked.teacher is not None:
            tracked.teacher.note_write()
        return incompatible

    def _load_counters(
        self, title: str, state_dict: Mapping[str, Any], strict: bool
    ) -> _state.IncompatibleKeys:
        """Takes over the state of a manager with a teacher."""
        tensors = [member.tensor for member in self._tracked.members]
        with _shards.one_error(title, tensors) as facts:
            self._refuse_if_swapped("load_state_dict")
            tracked = self._follow("load_state_dict")
            emas = None if tracked.teacher is None else self._emas()
            loaded = _counters.unpack(title, state_dict, emas, strict)
            self._work_out(loaded.iteration)
            position = f"at iteration {loaded.iteration} after {loaded.num_updates} updates"
            facts.append(_shards.Fact(None, "the state", position))
        self._move(loaded.iteration, loaded.num_updates)
        if tracked.teacher is not None:
            tracked.teacher.forget()
        return _state.IncompatibleKeys(loaded.missing, loaded.unexpected)

    def _unpacked(
        self, state_dict: Mapping[str, Any], strict: bool, average: str | None
    ) -> tuple[_slots.Tracked, dict[int, _state.State], _state.IncompatibleKeys]:
        """States that fit what is tracked, by average; raises what load_state_dict() raises."""
        is_of_swapped = isinstance(state_dict, Mapping) and state_dict.get(_state.IS_SWAPPED_KEY)
        is_of_swapped = is_of_swapped is True or isinstance(is_of_swapped, str)
        # torch.distributed.checkpoint loads what a state has already: raw weights while swapped.
        # All averages then: one that isn't loaded would be lost with what the model holds.
        if (
            self._tracked.is_sharded
            and is_of_swapped
            and not self._in_context
            and (average is None or not self.averages)
        ):
            self._refuse_if_another_is_swapped("load_state_dict")
        else:
            self._refuse_if_swapped("load_state_dict")
        chosen, surplus = _named_state.chosen(state_dict, self._averages, average, strict)
        tracked = self._follow("load_state_dict")
        tracked.check_geometry("load_state_dict")
        slots = tracked.slots
        expected = {
            member.name: _state.Expected(member.tensor, slot.ema.dtype, slot.param.dtype)
            for slot in slots
            for member in slot.members
        }
        tied = [[member.name for member in slot.members] for slot in slots]
        incompatible = _state.IncompatibleKeys([], surplus)
        states = {}
        if not strict:
            self._tracked = tracked = tracked.fed("load_state_dict")
            slots = tracked.slots
            own = tracked.by_name(lambda i: slots[i].followed.detach())
        for k, state in chosen.items():
            name = self._averages.names[k]
            of = f"{name}." if name and len(chosen) > 1 else ""
            if not strict:
                state, lists = _state.completed(state, own, tied)
                for all_keys, keys in zip(incompatible, lists, strict=True):
                    all_keys += [of + key for key in keys]
            is_live = any(
                isinstance(values, Tensor)
                and _storage.is_same_memory(slot.emas[k], _shards.shard_of(values))
                for slot, values in (
                    (slot, _ema_in(state, slot.name)) for slot in slots if slot.ema.numel()
                )
            )
            states[k] = _state.unpack(state, expected, tied, is_live, name)
        return tracked, states, incompatible

    # ---- how it is kept

    def _follow(self, op: str, so_far: bool = False) -> _slots.Tracked:
        """What is tracked, once it is certain that the model still has it.

        Args:
            op: For errors.
            so_far: The tree isn't current, as is_current_so_far() has just said.
        """
        self._refuse_if_unfrozen(op)
        if op != "update":  # One that was started has the tensors that it needs.
            self._settle(op)
        tracked = self._tracked
        if tracked.tree.units.reshard(f"{_TITLE}.{op}"):
            so_far = False
        if not so_far and tracked.is_current():
            return tracked
        tracked.repeated = None
        is_followed = tracked.shards.are_current() and tracked.has_teacher()
        anew = tracked.tree.buffers_assigned_anew(so_far) if is_followed else None
        if anew is not None and tracked.follow_buffers(op, anew):
            tracked.tree.take_over_buffers()
            return tracked
        was = {member.name: member for member in tracked.members}
        tree, members, teacher = self._read(was)
        now = {member.name: member for member in members}
        changes = [
            f"'{name}' was replaced: {_described(was[name])} before, {_described(now[name])} now"
            for name in was
            if name in now and not _slots.is_continued(was[name], now[name])
        ]
        changes += [f"'{name}' is new: {_described(now[name])}" for name in now if name not in was]
        changes += [f"'{name}' is gone: {_described(was[name])}" for name in was if name not in now]
        if tracked.teacher is not None and teacher is not None:
            before, after = tracked.teacher.targets, teacher.targets
            changes += [
                f"the teacher's '{after[name].name}' was replaced: {_described(before[name])} "
                f"before, {_described(after[name])} now"
                for name in was
                if name in now and not _slots.is_continued(before[name], after[name])
            ]
        if changes:
            raise RuntimeError(
                f"{_TITLE}.{op}: the model has changed since the manager was made; call refresh() "
                "to go on with it as it is now, or undo the change:\n  "
                + "\n  ".join(_checks.listed(changes))
            )
        for name, member in now.items():
            if member.local is not was[name].local:
                _slots.check_memory(op, member)
        self._tracked = tracked.rebound(tree, now, teacher)
        self._frozen = self._selection.left_frozen(tree.members, now)
        tree.members.clear()
        return self._tracked

    def _refuse_if_unfrozen(self, op: str) -> None:
        if self._frozen and any(member.tensor.requires_grad for member in self._frozen):
            names = [member.name for member in self._frozen if member.tensor.requires_grad]
            raise RuntimeError(
                f"{_TITLE}.{op}: {_tracking.shown(names)} were frozen when the manager was made, "
                "so skip_frozen=True left them out, and are trainable now; call refresh() to "
                "average them from here on, or freeze them again"
            )

    def _way_back(self) -> str:
        return "leave swapped() or call swap()" if self._in_context else "call swap()"

    def _refuse_if_swapped(self, op: str) -> None:
        if self._is_swapped:
            raise RuntimeError(
                f"{_TITLE}.{op}: the model is swapped already; {self._way_back()} first"
            )
        self._refuse_if_another_is_swapped(op)

    def _refuse_if_another_is_swapped(self, op: str) -> None:
        count = _swaps.count
        if not _swapped_managers:
            self._alone_at = count
        else:
            # Asked again only where another set of managers is swapped, or other tensors tracked.
            checked = (_swaps.count, weakref.ref(self._tracked))
            if self._checked != checked:
                slots = self._tracked.slots
                held = [(s.name, s.param) for s in slots]
                held += [(s.name, s.ema) for s in slots if s.target is not None]
                self._refuse_if_another_holds(op, held)
                self._checked = checked

    def _refuse_if_another_holds(self, op: str, named: Iterable[tuple[str, Tensor]]) -> None:
        found = (reference() for reference in _swapped_managers.valuerefs())
        others = [other for other in found if other is not None and other is not self]
        if not others:
            return
        names = {_tracking.memory_of(tensor): name for name, tensor in named}
        for other in others:
            for slot in other._tracked.slots:
                name = names.get(_tracking.memory_of(slot.param))
                if name is not None:
                    raise RuntimeError(
                        f"{_TITLE}{'.' if op else ''}{op}: '{name}' holds the ema of another "
                        "manager; swap that one back first"
                    )

    def _emas(self, average: int = 0) -> dict[str, Tensor]:
        self._settle("named_emas")
        if self._is_swapped:
            self._follow_buffers()
        return self._tracked.by_name(partial(self._ema_of, average=average))

    def _ema_of(self, index: int, average: int) -> Tensor:
        slot = self._tracked.slots[index]
        # What isn't averaged stands for each average, and is exchanged with any.
        is_its = average == self._held or slot.kind != "average"
        is_in_model = self._is_swapped and is_its and index not in self._aside
        return slot.param.detach() if is_in_model else slot.emas[average]


def _extra_states(
    source: nn.Module, target: nn.Module
) -> tuple[list[tuple[nn.Module, Any]], list[str]]:
    """What modules keep beside their tensors, with the module that takes it; and who can't."""
    others = _tracking.modules_of(target)
    carried, left_behind = [], []
    for name, module in _tracking.modules_of(source).items():
        if type(module).get_extra_state is nn.Module.get_extra_state:
            continue
        other = others.get(name)
        if other is module:
            continue
        if other is None or type(other).set_extra_state is nn.Module.set_extra_state:
            left_behind.append(
                f"the module '{name}' has extra state (get_extra_state) and the model's has no "
                "place for it"
            )
        else:
            carried.append((other, copy.deepcopy(module.get_extra_state())))
    return carried, left_behind


def _misfit(ema: Tensor, member: _tracking.Member | None) -> str:
    """Why an average can't be copied into a model's tensor; empty where it can."""
    if member is None:
        return "is missing in the model"
    tensor = member.tensor
    if _tracking.is_quantised(tensor):
        return f"is quantised there ({type(tensor).__name__}); copy before the model is quantised"
    if _shards.is_partitioned(tensor):
        return _shards.refusal(tensor)
    if tensor.shape != ema.shape:
        return f"has shape {list(tensor.shape)} but its ema has {list(ema.shape)}"
    floats = ema.is_floating_point(), tensor.is_floating_point()
    if tensor.dtype != ema.dtype and not all(floats):
        fits = not any(floats) and holds(tensor.dtype, ema.dtype)
        if not fits or torch.bool in (ema.dtype, tensor.dtype):
            return f"is {tensor.dtype} but its ema is {ema.dtype}"
    if problem := _shards.misfit(tensor, ema):
        return (
            f"{problem}; copy into a model that is sharded alike, or save the average with "
            "torch.distributed.checkpoint, which reshards"
        )
    if member.local.is_inference() and not torch.is_inference_mode_enabled():
        return "was made in torch.inference_mode(), outside of which it can't be written"
    try:
        _slots.check_memory("copy_to", member)
    except ValueError as error:
        return str(error).partition("' ")[2]
    return ""


def _is_wider(dtype: torch.dtype, than: torch.dtype) -> bool:
    return dtype != than and holds(dtype, than)


def _place_of(tensor: Tensor) -> tuple[int, object]:
    """Its address, and what holds its memory; 0 and nothing of a wrapper."""
    if not has_plain_memory(tensor):
        return 0, None
    return tensor.data_ptr(), tensor.untyped_storage()


def _ema_in(state: object, name: str) -> object:
    emas = state.get(_state.EMA_KEY) if isinstance(state, Mapping) else None
    return emas.get(name) if isinstance(emas, Mapping) else None


class _Write(NamedTuple):
    """Values for a tensor, and those that it gets back where something goes wrong."""

    tensor: Tensor
    values: Tensor
    before: Tensor


def _fact(member: _tracking.Member) -> _shards.Fact:
    # Of plain tensors ranks may have their own, as experts.
    return _shards.Fact(member.tensor, member.name, _described(member))


def _described(member: _tracking.Member) -> str:
    tensor = member.tensor
    shards = _shards.described(tensor)
    return f"{list(tensor.shape)} {dtype_name(tensor.dtype)} on {tensor.device}{shards}"
