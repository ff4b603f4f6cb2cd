"""What goes on behind a call, told to ``logging.getLogger("fused_ema")``.

At INFO, once in a process: what makes each update slower than it could be, and why. At DEBUG: what
was made, each time. Logging that is left as it is shows neither.
"""

from __future__ import annotations

import logging
from typing import Any

from fused_ema import _native

log = logging.getLogger("fused_ema")
_told: set[str] = set()


def once(text: str) -> None:
    """Tells it where somebody listens, and never again."""
    if text not in _told and log.isEnabledFor(logging.INFO):
        _told.add(text)
        log.info(text)


def plan_made(plan: Any) -> None:
    """Tells what it serves, and which of it no kernel takes."""
    log.debug("made %r", plan)
    _tell_of_foreach(plan)


def plan_made_anew(plan: Any) -> None:
    """Tells that tensors had moved before an update."""
    once(
        "a table of addresses was made anew before an update, since tensors had moved (p.data = "
        "..., .to()); it costs more than an update, where it happens in each step"
    )
    log.debug("made anew, since tensors had moved: %r", plan)
    _tell_of_foreach(plan)


def _tell_of_foreach(plan: Any) -> None:
    for entry in plan.describe() if log.isEnabledFor(logging.INFO) else ():
        if entry["backend"] == "foreach":
            once(
                f"torch._foreach updates {entry['num_tensors']:,} tensors "
                f"({entry['ema_dtype']}/{entry['param_dtype']} on {entry['device']}): "
                f"{_why_foreach(str(entry['device']))}"
            )


def _why_foreach(device: str) -> str:
    if _native.C is None:
        return _native.why_not
    _, reason = _native.C.service_of(device)
    return reason or "average and param differ in their strides, have gaps, or are wrappers"


def left_plan(name: str) -> None:
    """Tells that a buffer is served by itself from now on."""
    once(
        f"'{name}' is a new tensor in each step, so it is updated by itself; a module that writes "
        "to its buffer in place keeps it in the one launch"
    )
