"""Updates on streams of their own, beside what the device does after the optimizer's step."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from fused_ema import _streams
from fused_ema._slots import Tracked
from fused_ema.ops import Form


class _Side:
    """A stream of one device, and what it was asked for last."""

    def __init__(self, device: torch.device) -> None:
        self.streams = _streams.of(device)
        self.stream = self.streams.make()
        self.event: Any = None

    def wait(self) -> None:
        """The current stream goes on once the updates are done."""
        if self.event is not None:
            self.streams.wait(self.streams.current(), self.event)


class Overlap:
    """What a manager's updates need to run beside the step.

    No memory is handed from stream to stream, so record_stream isn't needed: params and emas are
    held by who made them, and to replace or to free them is a write, before which wait() comes. But
    a manager that is dropped frees its emas: so it waits, too.
    """

    def __init__(self) -> None:
        self._sides: dict[torch.device, _Side] = {}
        weakref.finalize(self, _wait, self._sides).atexit = False

    def average(self, tracked: Tracked, momenta: Sequence[float], form: Form) -> None:
        """As Tracked._average(): beside the step but for what others than an optimizer write."""
        planned = [slot.ema.device for slot in tracked.averaged if slot.in_plan]
        sides = [self._side_of(device) for device in dict.fromkeys(planned)]
        sides = [side for side in sides if side.streams.is_asynchronous]
        if not sides or any(side.streams.is_capturing() for side in sides):
            # A graph that is captured has to have all of its streams back at its end.
            self.wait()
            tracked._average(momenta, form)
            return
        tracked.plan._check()
        prompt, late = tracked.parted_plans
        tracked.average_loose(momenta, form)
        tracked.run(prompt, momenta, form)
        work = partial(tracked.run, late, momenta, form)
        for side in sides:
            side.streams.wait(side.stream, side.streams.record(side.streams.current()))
            work = partial(side.streams.run, side.stream, work)
        work()
        for side in sides:
            side.event = side.streams.record(side.stream)

    def wait(self) -> None:
        """The current streams go on once all updates are done; the host goes on at once."""
        _wait(self._sides)

    def _side_of(self, device: torch.device) -> _Side:
        if device not in self._sides:
            self._sides[device] = _Side(device)
        return self._sides[device]


def _wait(sides: dict[torch.device, _Side]) -> None:
    for side in sides.values():
        side.wait()
