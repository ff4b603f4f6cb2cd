"""When training has made a step: hooks that run once for each of them, or an error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from inspect import unwrap
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.utils.hooks import RemovableHandle

from fused_ema import _tracking
from fused_ema._foreach import has_plain_memory, is_dense

# Where wrappers keep the optimizer whose step is the step: accelerate's and Opacus'. Others, such
# as Lookahead's, move the weights once more after the one inside.
_INNER = ("optimizer", "original_optimizer")
_OWN = frozenset(dir(torch.optim.Optimizer))


def hookable(title: str, optimizer: object) -> torch.optim.Optimizer:
    """The optimizer whose hooks run at each step: this one, or the one that it wraps.

    Raises:
        TypeError: Not an optimizer, one whose steps don't call hooks, or one of DeepSpeed's.
    """
    found = optimizer
    while True:
        if _is_of_deepspeed(found):
            raise TypeError(
                f"{title}: {type(found).__name__} steps inside of DeepSpeed's engine, on its own "
                "copies of the weights and once for each of their groups, before the model has "
                "them; use fused_ema.hooks.deepspeed.EngineEMA(engine)"
            )
        if isinstance(found, (list, tuple)):
            raise TypeError(
                f"{title}: optimizer is a {type(found).__name__}; pass several optimizers one by "
                "one: register_step_post_hook(first, second)"
            )
        if not isinstance(found, torch.optim.Optimizer):
            raise TypeError(
                f"{title}: optimizer is a {type(found).__name__}; pass a torch.optim.Optimizer, or "
                "call update() after each of its steps"
            )
        if {"_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"} <= vars(found).keys():
            break
        inner = [name for name in _INNER if hasattr(found, name)]
        if not inner:
            raise TypeError(
                f"{title}: {type(found).__name__} never ran torch.optim.Optimizer's __init__, so "
                "its steps call no hooks; call update() after each of its steps"
            )
        if not _may_step(type(found), inner[0]):
            raise TypeError(
                f"{title}: {type(found).__name__} never calls the step of its {inner[0]}, whose "
                "hooks would be the only ones; call update() after each of its steps"
            )
        found = getattr(found, inner[0])
    others = [name for name in dir(type(found)) if "step" in name and name[0] != "_"]
    others = [name for name in others if name not in _OWN and callable(getattr(found, name))]
    if _wraps(found) and others:
        raise TypeError(
            f"{title}: {type(found).__name__} wraps an optimizer and has steps of its own "
            f"({', '.join(others)}), which call no hooks; call update() after the last of them"
        )
    # torch prepares a class when its first optimizer runs Optimizer.__init__, or at zero_grad().
    if not getattr(type(found).step, "hooked", False):
        found._patch_step_function()
    return found


def _is_of_deepspeed(optimizer: object) -> bool:
    """Its engine and what steps in it; its fused optimizers are torch's, and serve without it."""
    return any(
        cls.__name__ == "DeepSpeedOptimizerWrapper"
        or cls.__module__.startswith("deepspeed.runtime")
        for cls in type(optimizer).__mro__
    )


def _wraps(optimizer: object) -> bool:
    return any(isinstance(value, torch.optim.Optimizer) for value in vars(optimizer).values())


def _may_step(wrapper: type, inner: str) -> bool:
    """Whether a method of a wrapper's class names both the optimizer inside and its step."""
    own = [cls for cls in wrapper.__mro__ if cls not in torch.optim.Optimizer.__mro__]
    functions = [unwrap(value) for cls in own for value in vars(cls).values()]
    codes = [getattr(function, "__code__", None) for function in functions]
    return any(code is not None and {inner, "step"} <= _names_in(code) for code in codes)


def _names_in(code: CodeType) -> set[str]:
    inside = [_names_in(value) for value in code.co_consts if isinstance(value, CodeType)]
    return set(code.co_names).union(*inside)


# ---- whose parameters they are


def refuse_others(
    title: str, optimizers: Sequence[torch.optim.Optimizer], trained: Mapping[str, Sequence[Tensor]]
) -> None:
    """Raises where the weights aren't those of a step once these optimizers have made theirs.

    Args:
        title: For the error.
        optimizers: Hookable ones.
        trained: Name to the tensors of what is averaged and trained; one of them is enough.

    Raises:
        ValueError: A name is in none of the optimizers.
    """
    params = [
        param
        for optimizer in optimizers
        for group in optimizer.param_groups
        for param in group["params"]
    ]
    held = _Held(params)
    missing = [name for name, tensors in trained.items() if not any(map(held.has, tensors))]
    if not missing:
        return
    averaged = _Held([tensor for tensors in trained.values() for tensor in tensors])
    others = [param for param in params if not averaged.has(param)]
    if others and any(map(_wraps, optimizers)):
        return  # One that writes what it steps to the model, before its own step is over.
    who = " and ".join(dict.fromkeys(type(optimizer).__name__ for optimizer in optimizers))
    names = _tracking.shown(missing)
    shapes = {param.shape for param in others}
    if all(trained[name][0].shape in shapes for name in missing):
        raise ValueError(
            f"{title}: {who} steps other tensors of the shapes of {names}: another model's, or "
            "copies, as fp32 masters are, which reach the model only after its step. Hook the "
            "optimizer that wraps it, or call update() after that one's step, or average the "
            "copies: EMAManager(sources=fused_ema.sources.param_list(params, copies))"
        )
    if len(missing) == len(trained):
        raise ValueError(
            f"{title}: {who} holds none of the parameters that are averaged and trained ({names}): "
            "it is another model's, was made before this one was sharded, or has copies of its own "
            "(with DeepSpeed, use fused_ema.hooks.deepspeed.EngineEMA); pass the optimizer that "
            "holds them, or call update() after each step"
        )
    raise ValueError(
        f"{title}: {who} holds {len(trained) - len(missing)} of the {len(trained)} parameters that "
        f"are averaged and trained; in no optimizer given: {names}. Pass all of them in one call, "
        "register_step_post_hook(first, second), for one update after the last; where the others "
        "aren't trained, partial=True"
    )


class _Held:
    """Tensors, to be found by object or by their memory, also as a part of a flat one."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._ids = set()
        self._ranges: dict[object, list[tuple[int, int]]] = {}
        for tensor in tensors:
            self._ids.add(id(tensor))
            if (place := _range_of(tensor)) is not None:
                self._ranges.setdefault(place[0], []).append(place[1:])

    def has(self, tensor: Tensor) -> bool:
        """Whether one of them is this one, or holds its memory."""
        if id(tensor) in self._ids:
            return True
        place = _range_of(tensor)
        if place is None:
            return False
        storage, begin, end = place
        return any(a <= begin and end <= b for a, b in self._ranges.get(storage, ()))


def _range_of(tensor: Tensor) -> tuple[object, int, int] | None:
    """Its storage and where it lies in it; None of one without memory, or with gaps."""
    if not has_plain_memory(tensor) or tensor.numel() == 0 or not is_dense(tensor):
        return None
    address = tensor.data_ptr()
    if address == 0:
        return None
    storage = tensor.device, tensor.untyped_storage().data_ptr()
    return storage, address, address + tensor.numel() * tensor.element_size()


def heads(optimizer: torch.optim.Optimizer) -> list[object]:
    """The first parameter of each group: replaced where a wrapper puts its own copies there."""
    return [next(iter(group["params"]), None) for group in optimizer.param_groups]


# ---- when a training step is over


def was_skipped(optimizer: object) -> bool:
    """Whether a gradient scaler has just let a fused optimizer skip its step; for a step hook."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)


class Rounds:
    """Turns the steps of optimizers into training steps.

    One is over once each optimizer has stepped since the last, or, where they step inside of a
    backward pass (gradient release), once that pass is.

    Args:
        num_optimizers: How many there are.
        update: What to call then.
        decides: Whether it takes ``found_inf=`` and decides on the device whether a step was
            skipped: then nobody waits for it here.
    """

    def __init__(
        self, num_optimizers: int, update: Callable[..., None], decides: bool = False
    ) -> None:
        self._num_optimizers = num_optimizers
        self._update = update
        self._decides = decides
        # What a scaler has told who stepped in this round.
        self._found: dict[int, Tensor] = {}
        # Who has stepped in this round, and whether its step was skipped.
        self._stepped: dict[int, bool] = {}
        # In which order they step; known after the first round.
        self._order: dict[int, int] = {}
        self._releasing: set[int] = set()
        self._latest_pass = -1

    def before(self, index: int, optimizer: Any) -> None:
        """To be called before each step; raises RuntimeError where the end can't be told."""
        way_out = "remove() the hook, and call update() where the last of the weights has moved"
        if torch._C._current_graph_task_id() >= 0:
            if _is_in_inner_pass():
                raise RuntimeError(
                    "fused_ema.EMAManager.optimizer.step: it steps inside of a backward pass that "
                    "runs inside of another (checkpointing with use_reentrant=True), whose end "
                    f"can't be told; use_reentrant=False, or {way_out}"
                )
        elif self._releasing and index not in self._releasing and _has_gradients(optimizer):
            raise RuntimeError(
                f"fused_ema.EMAManager.optimizer.step: {type(optimizer).__name__} steps after the "
                f"backward pass and others of its optimizers inside of it; {way_out}"
            )

    def after(self, index: int, optimizer: Any) -> None:
        """To be called after each step, with the optimizer's place among them."""
        this_pass = torch._C._current_graph_task_id()
        if this_pass >= 0:
            self._releasing.add(index)
            # optimi's way to accumulate: such a step moves nothing.
            is_real = not getattr(optimizer, "optimizer_accumulation", False)
            if is_real and this_pass != self._latest_pass:
                self._latest_pass = this_pass
                torch.autograd.Variable._execution_engine.queue_callback(self._update)
        elif index in self._releasing and not _has_gradients(optimizer):
            pass  # A loop calls it in any case; what it would have done was done in the pass.
        elif self._decides:
            if (found_inf := getattr(optimizer, "found_inf", None)) is not None:
                self._found[index] = found_inf
            if self._ends_with(index, False):
                self._update(found_inf=self._any_found())
        elif self._ends_with(index, was_skipped(optimizer)):
            self._update()

    def _any_found(self) -> Tensor | None:
        """One for all: 0 where each is. Of one optimizer its own."""
        if not self._found:
            return None
        first, *others = self._found.values()
        self._found.clear()
        for other in others:
            first = first + other.to(first.device)
        return first

    def _ends_with(self, index: int, is_skipped: bool) -> bool:
        # A scaler doesn't call a step that it skips. So who comes before one that has stepped
        # already begins a new round: or from then on rounds would end in the middle of a step.
        if any(self._order[index] < self._order[i] for i in self._stepped if self._order):
            self._stepped.clear()
            self._found = {i: found for i, found in self._found.items() if i == index}
        self._stepped[index] = is_skipped
        if len(self._stepped) < self._num_optimizers:
            return False
        self._order = {i: place for place, i in enumerate(self._stepped)}
        is_due = not any(self._stepped.values())
        self._stepped.clear()
        return is_due


def _has_gradients(optimizer: Any) -> bool:
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])


def _is_in_inner_pass() -> bool:
    """Whether a backward function that is written in Python has started the pass that runs."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is BackwardCFunction.apply.__code__:
            return True
        frame = frame.f_back
    return False


def register(
    optimizers: Sequence[torch.optim.Optimizer],
    before: Callable[[int, object], None],
    after: Callable[[int, object], None],
) -> RemovableHandle:
    """Calls before() and after() at each step of optimizers that are hookable.

    A step that calls its base class's runs torch's hooks twice where both are prepared for them.

    Args:
        optimizers: Each once.
        before: Takes the optimizer's place among them, and the optimizer.
        after: Likewise.

    Returns:
        One handle for all.
    """
    all_hooks: list[dict[int, Any]] = []
    for optimizer in optimizers:
        all_hooks += [optimizer._optimizer_step_post_hooks, optimizer._optimizer_step_pre_hooks]
    handle = RemovableHandle(all_hooks[0], extra_dict=all_hooks[1:])
    for index, optimizer in enumerate(optimizers):
        pre, post = _hooks_of(index, before, after)
        optimizer._optimizer_step_pre_hooks[handle.id] = pre
        optimizer._optimizer_step_post_hooks[handle.id] = post
    return handle


def _hooks_of(
    index: int, before: Callable[[int, object], None], after: Callable[[int, object], None]
) -> tuple[Callable[..., None], Callable[..., None]]:
    def before_step(optimizer: object, args: object, kwargs: object) -> None:
        if not _is_inside_another(sys._getframe(1), optimizer):
            before(index, optimizer)

    def after_step(optimizer: object, args: object, kwargs: object) -> None:
        if not _is_inside_another(sys._getframe(1), optimizer):
            after(index, optimizer)

    return before_step, after_step


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
