"""A device's streams and events, and what stands for them where work runs at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Streams:
    """Streams of one device: work in one runs in turn, work in several beside each other."""

    is_asynchronous = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._module: Any = torch.get_device_module(device)

    def current(self) -> Any:
        """The caller's."""
        return self._module.current_stream(self._device)

    def make(self) -> Any:
        """A new one, which waits for no other by itself."""
        return self._module.Stream(device=self._device)

    def run(self, stream: Any, work: Callable[[], None]) -> None:
        """Asks for work in a stream; returns before it is done."""
        with self._module.stream(stream):
            work()

    def record(self, stream: Any) -> Any:
        """An event: all that a stream was asked for up to now."""
        return stream.record_event()

    def wait(self, stream: Any, event: Any) -> None:
        """What a stream is asked for from now on runs after an event; the host goes on."""
        stream.wait_event(event)

    def synchronize(self, event: Any) -> None:
        """The host waits for an event; raises what has gone wrong on the device."""
        event.synchronize()

    def is_capturing(self) -> bool:
        """Whether the current stream's work is being recorded in a graph."""
        asked = getattr(self._module, "is_current_stream_capturing", None)
        return asked is not None and bool(asked())


class InTurn(Streams):
    """Of a device without streams: all work is done when it is asked for."""

    is_asynchronous = False

    def __init__(self) -> None:
        pass

    def current(self) -> None:
        """Nothing, as all that follow."""

    def make(self) -> None:
        pass

    def run(self, stream: Any, work: Callable[[], None]) -> None:
        """At once."""
        work()

    def record(self, stream: Any) -> None:
        pass

    def wait(self, stream: Any, event: Any) -> None:
        pass

    def synchronize(self, event: Any) -> None:
        pass

    def is_capturing(self) -> bool:
        """Never."""
        return False


def of(device: torch.device) -> Streams:
    """Those of a device."""
    if device.type == "cpu" or not hasattr(torch.get_device_module(device), "Stream"):
        return InTurn()
    return Streams(device)
