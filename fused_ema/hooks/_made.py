"""A callback whose manager is made later, and what waits for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class MakesManager:
    """For :class:`fused_ema.posthoc.Snapshots`, which is made before there is a model."""

    _waiting: tuple[Callable[[Any], None], ...] = ()

    def _when_made(self, call: Callable[[Any], None]) -> None:
        """Calls it with each manager that is made from now on."""
        self._waiting = (*self._waiting, call)

    def _tell_made(self, manager: Any) -> None:
        for call in self._waiting:
            call(manager)
