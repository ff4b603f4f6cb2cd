"""How far something is that takes a while."""

from __future__ import annotations

import importlib
import sys
import time
from typing import Any


def shown_size(num_bytes: int) -> str:
    """A size that one can read: in decimal units, as disks are sold."""
    value = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


class Progress:
    """On a terminal, how much is written: with rich where it is installed, or in plain text."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._bar: Any = None
        self._is_shown = sys.stderr.isatty()
        self._last = 0.0
        if self._is_shown:
            try:
                console = importlib.import_module("rich.console").Console(stderr=True)
                module = importlib.import_module("rich.progress")
            except ImportError:
                return
            self._bar = module.Progress(
                module.TextColumn("{task.description}"),
                module.BarColumn(),
                module.DownloadColumn(),
                module.TransferSpeedColumn(),
                console=console,
                transient=True,
            )
            self._task = self._bar.add_task(what)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._is_shown and self._last:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def __call__(self, done: int, total: int) -> None:
        """So many bytes of all are written."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total)
        elif self._is_shown and time.monotonic() - self._last > 0.1:
            self._last = time.monotonic()
            share = 100 * done / max(1, total)
            text = f"{self._what}: {share:3.0f} % of {shown_size(total)}"
            print(f"\r{text}", end="", file=sys.stderr, flush=True)
