"""How a checkpoint that doesn't serve is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from fused_ema import _checks

READ = "fused_ema.state.read"
WRITE = "fused_ema.state.write"


class FormatError(ValueError):
    """A checkpoint that can't be read, told apart or written as asked."""


class SeveralAveragesError(FormatError):
    """A state of averages with names, of which none was chosen."""

    def __init__(self, where: str, names: Sequence[str]) -> None:
        shown = ", ".join(f"'{name}'" for name in names)
        super().__init__(
            f"{READ}: {where} has {len(names)} averages, {shown}; read the one you want: average= "
            "(--average)"
        )
        self.names = list(names)


def refuse(what: str, problems: Sequence[str]) -> NoReturn:
    raise FormatError(f"{what}:\n  " + "\n  ".join(_checks.listed(problems)))


def unreadable(path: Path, error: Exception) -> FormatError:
    lines = str(error).strip().splitlines()
    return FormatError(
        f"{READ}: '{path}' can't be read; it is truncated, damaged or no checkpoint "
        f"({lines[0][:120] if lines else type(error).__name__})"
    )
