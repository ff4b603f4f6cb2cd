"""A schedule on the device: updates that a captured CUDA graph may replay.

The momenta of the iterations ahead stand in a table in device memory, beside a counter of its rows.
An update reads the row that the counter names and moves the counter on, all on the device, so that
each replay of a graph finds the momentum of its own iteration. Nothing is asked of the host, and
nothing of the table is known there but where it begins.
"""

from __future__ import annotations

import warnings
from array import array
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from fused_ema import _checks, _storage, ops
from fused_ema._averages import Averages
from fused_ema._foreach import has_plain_memory
from fused_ema._slots import Slot, Tracked
from fused_ema.ops import Form
from fused_ema.plan import Plan

TITLE = "fused_ema.EMAManager"


class Captured:
    """The table of a manager, where it stands in it, and updates by it.

    A row holds the momentum of each average (0: none, 1: a copy), then whether buffers are copied,
    then, where ``begin`` isn't 0, whether what is kept as first cloned is. The rows begin at a
    multiple of the interval. Those after the last iteration hold for ever after, in turns: one
    interval, with the last momentum.

    Args:
        num_iterations: How many the table must have from any iteration on.
        averages: Their momenta.
        interval: As EMAManager's.
        begin: Likewise.
        is_teacher: Whether the average is a teacher, whose momentum of 0 copies no buffers either.
        device: Of what is averaged.

    Raises:
        RuntimeError: A momentum can't be had ahead.
    """

    def __init__(
        self,
        num_iterations: int,
        averages: Averages,
        interval: int,
        begin: int,
        is_teacher: bool,
        device: torch.device,
    ) -> None:
        self.num_iterations = num_iterations
        self._averages = averages
        self._interval = interval
        self._begin = begin
        self._is_teacher = is_teacher
        self.device = device
        # Whole intervals, wherever in the first of them it is to begin.
        self._end = -(-(num_iterations + interval - 1) // interval) * interval
        num_averages = len(averages.names)
        num_columns = num_averages + 1 + (begin > 0)
        make = partial(torch.zeros, device=device)
        with torch.inference_mode(False):
            self._table = make(self._end + interval, num_columns, dtype=torch.float64)
            self._counter, self._place = (make(1, dtype=torch.int64) for _ in range(2))
            self._row = make(1, num_columns, dtype=torch.float64)
            self._goes = make(1, dtype=torch.bool)
            columns = self._row[0].unbind()
        self._momenta = columns[:num_averages]
        # As a plan of one average takes it, or of several.
        self._all_momenta = columns[0] if num_averages == 1 else self._row[0, :num_averages]
        self._copied = _Flagged(columns[num_averages])
        self._kept = _Flagged(columns[-1]) if begin else None
        # What the counter is seen as without waiting for it.
        self._seen: Tensor | None = None
        if device.type == "cuda":
            self._seen = torch.zeros(1, dtype=torch.int64).pin_memory()
        self._first = -1
        # What work_out() has left for move().
        self._ahead: tuple[int, Tensor] | None = None
        self._since = 0, 0
        self._has_warned = False
        self.move(0, 0)

    # ---- where it stands

    def position(self) -> tuple[int, int]:
        """The next iteration, and the number of updates; reads the device.

        Raises:
            RuntimeError: A CUDA graph is being captured.
        """
        if self.is_capturing():
            raise RuntimeError(
                f"{TITLE}: iteration and num_updates are on the device and can't be read while a "
                "CUDA graph is being captured; read them outside"
            )
        row = int(self._counter)
        self._warn_if_past(row)
        then, num_updates = self._since
        return self._first + row, num_updates + self._num_due(then, self._first + row)

    def move(self, iteration: int, num_updates: int) -> None:
        """Goes on from another iteration, with as many of them ahead as ever.

        Captured graphs go on from there, too: the table stays where it is.

        Raises:
            RuntimeError: A momentum can't be had ahead, or a CUDA graph is being captured.
        """
        if self.is_capturing():
            raise RuntimeError(
                f"{TITLE}: the iteration can't be set while a CUDA graph is being captured; set it "
                "outside"
            )
        self.work_out(iteration)
        first = self._first_row_for(iteration)
        if self._ahead is not None:
            first, rows = self._ahead
            self._table.copy_(rows)
            self._ahead = None
        self._first = first
        self._counter.fill_(iteration - first)
        if self._seen is not None:
            self._seen.fill_(0)
        self._since = iteration, num_updates
        self._has_warned = False

    def work_out(self, iteration: int) -> None:
        """What of move() can fail."""
        first = self._first_row_for(iteration)
        if self._ahead is not None and self._ahead[0] != first:
            self._ahead = None
        if first != self._first and self._ahead is None:
            self._ahead = first, self._rows(first)

    def _first_row_for(self, iteration: int) -> int:
        return iteration // self._interval * self._interval

    def offer(self, iteration: int) -> None:
        """Makes an iteration that somebody else counts the next; reads the device."""
        now, num_updates = self.position()
        if iteration != now:
            self.move(iteration, num_updates)

    def is_capturing(self) -> bool:
        """Whether what is called now is recorded in a CUDA graph, not done."""
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def look(self) -> None:
        """Warns where the table's end is known to be passed; waits for nothing.

        What it knows is how things stood when it last looked.
        """
        if self._seen is None:
            self._warn_if_past(int(self._counter))
        elif not self.is_capturing():
            self._warn_if_past(int(self._seen))
            self._seen.copy_(self._counter, non_blocking=True)

    def _warn_if_past(self, row: int) -> None:
        end = self._end
        if row > end and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{TITLE}: {row:,} iterations since {self._first:,} and capturable="
                f"{self.num_iterations:,}: the last momentum holds from {self._first + end:,} on. "
                "Make the manager with a larger capturable and load this one's state_dict()",
                UserWarning,
                stacklevel=5,
            )

    def _num_due(self, start: int, end: int) -> int:
        """How many of these iterations average."""
        start = max(start, self._begin)
        return max(end, start) // self._interval - start // self._interval

    def _rows(self, first: int) -> Tensor:
        rows = torch.zeros(self._table.shape, dtype=torch.float64)
        table, hold = rows[: self._end], rows[self._end :]
        num_copies = min(max(self._begin - first, 0), self._end)
        table[:num_copies] = 1
        hold[:] = int(num_copies == self._end)
        due = range(first + num_copies, first + self._end)
        due = due[(-due.start - 1) % self._interval :: self._interval]
        if due:
            num_averages = len(self._momenta)
            updates = table[due[0] - first :: self._interval]
            for k in range(num_averages):
                if self._averages.is_constant(k):
                    updates[:, k] = self._averages.momentum_at(k, 0)
                else:
                    updates[:, k] = self._momenta_at(k, due)
            updates[:, num_averages] = (updates[:, 0] != 0) if self._is_teacher else 1.0
            hold[:] = 0
            hold[-1] = table[-1]
        return rows

    def _momenta_at(self, average: int, iterations: Sequence[int]) -> Tensor:
        """The momenta of iterations to come."""
        momenta = array("d")
        i = -1
        try:
            for i in iterations:
                momenta.append(self._averages.momentum_at(average, i))
        except Exception as error:
            raise RuntimeError(
                f"{TITLE}: capturable={self.num_iterations} works the momenta out ahead, and that "
                f"of iteration {i} failed with {type(error).__name__}: {error}. Choose fewer "
                "iterations, or a function that takes any"
            ) from error
        return torch.frombuffer(momenta, dtype=torch.float64)

    # ---- updates

    def prepare(self, tracked: Tracked) -> None:
        """Makes what can't be made while a graph is captured.

        Raises:
            ValueError: Not all tensors are on the table's device.
        """
        _refuse_others(tracked, self.device)
        if self.device.type == "cuda":
            self._copied.of(tracked.copied)
            if self._kept is not None:
                self._kept.of(_kept(tracked))

    def skips(self, found_inf: Tensor | None) -> bool:
        """Whether the host knows already that nothing is to happen.

        Raises:
            TypeError: ``found_inf`` is no tensor of one element.
            ValueError: It is on another device.
        """
        if found_inf is None:
            return False
        _checks.one_element("EMAManager.update", "found_inf", found_inf)
        if self.device.type == "cuda" and found_inf.device == self.device:
            return False
        if self.device.type == "cuda" and (found_inf.is_cuda or self.is_capturing()):
            raise ValueError(
                f"{TITLE}.update: found_inf is on {found_inf.device} but the averages are on "
                f"{self.device}; pass the one of that device"
            )
        return bool(found_inf)

    @torch.no_grad()
    def run(self, tracked: Tracked, form: Form, found_inf: Tensor | None) -> None:
        """Does what the next iteration asks for: all of it, or nothing where it raises."""
        if self.device.type != "cuda":
            self._run_on_host(tracked, form)
            return
        tracked.plan._check()
        copies = [self._copied.of(tracked.copied)]
        if self._kept is not None:
            copies.append(self._kept.of(_kept(tracked)))
        self._advance(found_inf)
        tracked.average_loose(self._momenta, form)
        tracked.plan._update(self._all_momenta, form)
        for copy in copies:
            copy()

    def _advance(self, found_inf: Tensor | None) -> None:
        """Reads the row of this iteration, and goes on to the next; not after a skipped step."""
        if self._interval == 1:
            torch.clamp(self._counter, max=self._end, out=self._place)
        else:
            torch.remainder(self._counter, self._interval, out=self._place)
            torch.minimum(self._place.add_(self._end), self._counter, out=self._place)
        torch.index_select(self._table, 0, self._place, out=self._row)
        if found_inf is None:
            self._counter.add_(1)
            return
        torch.eq(found_inf.detach().reshape(1), 0, out=self._goes)
        self._row.mul_(self._goes)
        self._counter.add_(self._goes)

    def _run_on_host(self, tracked: Tracked, form: Form) -> None:
        row = int(self._counter)
        place = min(row, self._end + row % self._interval)
        *momenta, copied = self._table[place].tolist()[: len(self._momenta) + 1]
        if self._kept is not None and self._table[place, -1] == 1:
            tracked.follow()
        elif copied or any(momenta):
            tracked.update(momenta, form, _average)
        else:
            tracked.plan._check()
        self._counter.add_(1)


def _kept(tracked: Tracked) -> list[Slot]:
    return [slot for slot in tracked.slots if slot.kind == "keep"]


def _average(tracked: Tracked, momenta: Sequence[float], form: Form) -> None:
    """As the kernels do it by a momentum of the device: 0 is no update, and 1 a copy."""
    if all(0 < momentum < 1 for momentum in momenta):
        tracked._average(momenta, form)
        return
    tracked.plan._check()
    for k, momentum in enumerate(momenta):
        emas = [slot.emas[k] for slot in tracked.averaged]
        sources = [slot.source for slot in tracked.averaged]
        if momentum == 1:
            _storage.copy(emas, sources)
        elif momentum != 0:
            ops._update(emas, sources, momentum, form)


class _Flagged:
    """Copies of tensors that aren't averaged, where a number on the device is 1 and not 0.

    Most go by a plan, whose update is a copy of bits where the momentum is 1.
    """

    def __init__(self, flag: Tensor) -> None:
        self._flag = flag
        self._key: list[object] = []
        self._plan: Plan | None = None
        self._others: list[Slot] = []

    def of(self, slots: Sequence[Slot]) -> Callable[[], None]:
        """What copies these slots; raises what making a plan of them raises."""
        key: list[object] = []
        for slot in slots:
            param = slot.param
            place = param.data_ptr() if has_plain_memory(param) else id(param)
            key += [slot.ema, place, param.dtype, param.stride()]
        # By object: their values are nobody's to compare.
        if len(key) != len(self._key) or any(
            a is not b and (isinstance(a, Tensor) or a != b)
            for a, b in zip(key, self._key, strict=True)
        ):
            self._make(slots)
            self._key = key
        return self._run

    def _make(self, slots: Sequence[Slot]) -> None:
        planned = [slot for slot in slots if _has_floats(slot)]
        self._others = [slot for slot in slots if slot not in planned]
        self._plan = None
        if planned:
            self._plan = Plan(
                [_storage.as_floats(slot.ema) for slot in planned],
                [_storage.as_floats(slot.param) for slot in planned],
                [slot.name for slot in planned],
            )

    def _run(self) -> None:
        if self._plan is not None:
            self._plan._update(self._flag, "lerp")
        for slot in self._others:
            ema, values = slot.ema, slot.param.detach().to(slot.ema.dtype)
            if ema.element_size() == 1:  # Of float8 torch has no such choice.
                ema, values = ema.view(torch.uint8), values.view(torch.uint8)
            ema.copy_(torch.where(self._flag == 1, values, ema))


def _has_floats(slot: Slot) -> bool:
    """Whether a plan takes both, as floating-point numbers of their width."""
    return (
        slot.exchanges()
        and slot.ema.element_size() > 1
        and has_plain_memory(slot.param)
        and not slot.param.is_conj()
        and not slot.param.is_neg()
        and not slot.is_inference_buffer()
    )


def _refuse_others(tracked: Tracked, device: torch.device) -> None:
    """Raises where something lies elsewhere: one graph has one table."""
    problems = [
        f"'{slot.name}' is on {slot.param.device} and its average on {slot.ema.device}"
        for slot in tracked.slots
        if {slot.param.device, slot.ema.device} != {device}
    ]
    if problems:
        raise ValueError(
            f"{TITLE}: capturable needs all that is tracked, and its averages, on one device, "
            f"{device} here; move these, leave device= out, or leave them out with exclude=:\n  "
            + "\n  ".join(_checks.listed(problems))
        )


def device_of(tracked: Tracked) -> torch.device:
    """The device of what is averaged.

    Raises:
        ValueError: There is more than one, or it has no graphs.
    """
    device = (tracked.averaged or tracked.slots)[0].param.device
    if device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"{TITLE}: capturable and the model is on {device}, where nothing can be captured; "
            "leave it out, or move the model to a CUDA device first"
        )
    _refuse_others(tracked, device)
    return device
