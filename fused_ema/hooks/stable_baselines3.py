"""A drop-in for stable-baselines3's ``polyak_update``, which SAC, TD3 and DQN call at each step.

import fused_ema.hooks.stable_baselines3

fused_ema.hooks.stable_baselines3.replace_polyak_update()  # before model.learn()
model = SAC("MlpPolicy", "Pendulum-v1")
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

from torch import Tensor

from fused_ema import _checks, ops
from fused_ema.hooks import _shadow, _teachers, required

_WHERE = "hooks.stable_baselines3.polyak_update"


def polyak_update(params: Iterable[Tensor], target_params: Iterable[Tensor], tau: float) -> None:
    """Moves the target's parameters towards the parameters, with stable-baselines3's bits.

    ``target = (1 - tau) * target + tau * param``, as ``target.mul_(1 - tau).add_(param,
    alpha=tau)``. Where both are ``module.parameters()``, fresh from the call, the lists are found
    once, and again where either module holds other parameters or children; other iterables are read
    at each call.

    Args:
        params: The parameters.
        target_params: As many tensors of the same shapes.
        tau: The weight of the new value, in [0, 1]; 1 copies.

    Raises:
        TypeError: A dtype pair that can't be averaged; not iterables of tensors.
        ValueError: ``tau`` is outside of [0, 1]; numbers, shapes or devices differ; memory is
            shared.
    """
    if type(tau) is not float or not 0.0 <= tau <= 1.0:
        tau = _checks.fraction(_WHERE, "tau", tau)
    modules = _teachers.modules_of(params, target_params)
    if modules is not None:
        model, target = modules
        _teachers.update(_WHERE, model, target, tau, "mul_add")
        return
    live = _shadow.list_of_tensors(_WHERE, params, "params")
    averaged = _shadow.list_of_tensors(_WHERE, target_params, "target_params")
    if len(live) != len(averaged):
        raise ValueError(
            f"fused_ema.{_WHERE}: there are {len(live)} params but {len(averaged)} target_params; "
            "pass as many of both"
        )
    ops._update(averaged, live, tau, "mul_add")


def replace_polyak_update() -> None:
    """Puts :func:`polyak_update` into stable-baselines3, for every algorithm of this process.

    Into SAC, TD3 (and DDPG, which is one), DQN, and whatever else of it and of sb3_contrib is
    imported by then. Again after importing more; more than once does no harm.

    Raises:
        ImportError: stable-baselines3 isn't installed.
    """
    utils = required("stable_baselines3.common.utils", "stable_baselines3", "stable-baselines3>=2")
    required("stable_baselines3", "stable_baselines3", "stable-baselines3>=2")
    theirs = utils.__dict__.setdefault("_fused_ema_replaced", utils.polyak_update)
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("stable_baselines3", "sb3_contrib") and (
            getattr(module, "polyak_update", None) is theirs
        ):
            module.polyak_update = polyak_update  # type: ignore[attr-defined]
