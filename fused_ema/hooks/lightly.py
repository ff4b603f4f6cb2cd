"""A drop-in for lightly's ``update_momentum``; lightly itself isn't needed.

from fused_ema.hooks.lightly import update_momentum

update_momentum(model.backbone, model.backbone_momentum, m=0.996)  # after each optimizer.step()
"""

from __future__ import annotations

import torch
from torch import nn

from fused_ema.hooks import _shadow, _teachers

_WHERE = "hooks.lightly.update_momentum"


def update_momentum(model: nn.Module, model_ema: nn.Module, m: float) -> None:
    """Moves the parameters of ``model_ema`` towards those of ``model``, with lightly's bits.

    ``ema = m * ema + (1 - m) * param``, by the order of the two modules' parameters; buffers stay
    as they are. The lists are found once, and again where either module holds other parameters or
    children, instead of at each call. A pair of tied weights counts once.

    On the CPU bfloat16 and float16 averages, and an ``m`` for which ``1 - (1 - m)`` isn't ``m``
    (some below 0.5), are left to torch's lists, whose rounding of ``m`` no kernel has.

    Args:
        model: The model that is trained.
        model_ema: Its average, a module with as many parameters of the same shapes.
        m: The weight of the old value, in [0, 1].

    Raises:
        TypeError: Not modules; a parameter that isn't floating-point.
        ValueError: ``m`` is outside of [0, 1]; numbers or shapes of parameters differ; the modules
            share parameters; one is partitioned by ZeRO-3.
    """
    if type(m) is not float or not 0.0 <= m <= 1.0:
        m = _shadow.checked_decay(_WHERE, "m", m)
    momentum = 1.0 - m
    is_exact = 1.0 - momentum == m
    if is_exact and _teachers.repeats(model, model_ema, momentum, "mul_add"):
        return
    pairs = _teachers.params_of(_WHERE, model, model_ema)
    if not is_exact or pairs.are_narrow_on_cpu():
        averaged, live = zip(*pairs.floats, strict=True)
        with torch.no_grad():
            torch._foreach_mul_(averaged, m)
            torch._foreach_add_(averaged, live, alpha=momentum)
    else:
        _teachers.update(_WHERE, model, model_ema, momentum, "mul_add")
