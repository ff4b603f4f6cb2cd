"""When an optimizer has made a step: hooks that run once for each of them, or an error."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType

import torch
from torch.utils.hooks import RemovableHandle

# Where wrappers keep the optimizer whose step is the step: accelerate's and Opacus'. Others, such
# as Lookahead's, move the weights once more after the one inside.
_INNER = ("optimizer", "original_optimizer")
_OWN = frozenset(dir(torch.optim.Optimizer))


def hookable(title: str, optimizer: object) -> torch.optim.Optimizer:
    """The optimizer whose hooks run at each step: this one, or the one that it wraps.

    Raises:
        TypeError: Not an optimizer, or one whose steps don't call hooks.
    """
    found = optimizer
    while True:
        if not isinstance(found, torch.optim.Optimizer):
            raise TypeError(
                f"{title}: optimizer is a {type(found).__name__}; pass a torch.optim.Optimizer, or "
                "call update() after each of its steps"
            )
        if {"_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"} <= vars(found).keys():
            break
        inner = [getattr(found, name) for name in _INNER if hasattr(found, name)]
        if not inner:
            raise TypeError(
                f"{title}: {type(found).__name__} never ran torch.optim.Optimizer's __init__, so "
                "its steps call no hooks; call update() after each of its steps"
            )
        found = inner[0]
    wraps = [v for v in vars(found).values() if isinstance(v, torch.optim.Optimizer)]
    others = [name for name in dir(type(found)) if "step" in name and name[0] != "_"]
    others = [name for name in others if name not in _OWN and callable(getattr(found, name))]
    if wraps and others:
        raise TypeError(
            f"{title}: {type(found).__name__} wraps an optimizer and has steps of its own "
            f"({', '.join(others)}), which call no hooks; call update() after the last of them"
        )
    # torch prepares a class when its first optimizer runs Optimizer.__init__, or at zero_grad().
    if not getattr(type(found).step, "hooked", False):
        found._patch_step_function()
    return found


def register(
    optimizer: torch.optim.Optimizer, before: Callable[[], None], after: Callable[[object], None]
) -> RemovableHandle:
    """Calls before(), and after() with the optimizer, at each step of one that is hookable.

    A step that calls its base class's runs torch's hooks twice where both are prepared for them.
    """

    def before_step(optimizer: object, args: object, kwargs: object) -> None:
        if not _is_inside_another(sys._getframe(1), optimizer):
            before()

    def after_step(optimizer: object, args: object, kwargs: object) -> None:
        if not _is_inside_another(sys._getframe(1), optimizer):
            after(optimizer)

    pre, post = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    handle = RemovableHandle(post, extra_dict=pre)
    pre[handle.id], post[handle.id] = before_step, after_step
    return handle


def _is_inside_another(step: FrameType, optimizer: object) -> bool:
    """Whether this call of torch's step wrapper is made by another one with the same hooks."""
    # By the hooks, not by the object: Fabric's wrapper shares those of its optimizer.
    hooks = vars(optimizer)["_optimizer_step_post_hooks"]
    frame = step.f_back
    while frame is not None:
        if frame.f_code is step.f_code and frame.f_locals.get("args"):
            outer = frame.f_locals["args"][0]
            if vars(outer).get("_optimizer_step_post_hooks") is hooks:
                return True
        frame = frame.f_back
    return False
