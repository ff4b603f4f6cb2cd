"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

import torch


def save(content: dict[str, Any], path: str) -> None:
    """``torch.save`` that a kill can't cut short: under another name first."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.remove(temporary)
        raise
