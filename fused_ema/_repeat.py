"""An update that is made again with one call, as long as nothing has changed since the last one.

What a plan takes for 144 small tensors is 3 us. To ask from Python whether the model is as it was
takes as long again, so csrc/repeat.cpp asks, and runs the plan where it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from fused_ema import _native
from fused_ema.ops import Form
from fused_ema.plan import Plan


class Repeat(NamedTuple):
    """What there is to ask and to do, in the order of csrc/repeat.cpp.

    A tuple, so that Python's garbage collector sees what it refers to.

    Attributes:
        plan: The compiled part of the plan.
        copies: Another one, which copies after it; None for nothing to copy.
        form: Of the updates.
        least: The least momentum that asks for nothing else.
        most: The largest.
        trees: Dicts that must hold what they held; see Tree.watched.
        shards: DTensors that must have the shards that they had; see Shards.watched.
        frozen: Tensors that mustn't require a gradient.
        noted: Tensors of which one in turn must have had no other writer; see Teacher.watched.
    """

    plan: Any
    copies: Any
    form: Form
    least: float
    most: float
    trees: tuple[Any, ...]
    shards: tuple[Any, ...] | None
    frozen: tuple[Tensor, ...]
    noted: tuple[Any, ...] | None


def repeat(
    plan: Plan,
    copies: Any,
    form: Form,
    trees: Sequence[tuple[Any, ...] | None],
    *,
    between: tuple[float, float] = (0.0, 1.0),
    shards: tuple[Any, ...] | None = None,
    frozen: Sequence[Tensor] = (),
    noted: tuple[Any, ...] | None = None,
) -> Repeat | None:
    """That; None where C can't ask all of it."""
    if _native.C is None or None in trees or plan._zero3:
        return None
    if shards is not None and shards[0] is None:
        return None
    return Repeat(plan._plan, copies, form, *between, tuple(trees), shards, tuple(frozen), noted)


make_again: Any = getattr(_native.C, "update_if_unchanged", None)
"""Takes a Repeat and a momentum; False where something has changed, and nothing is done."""
