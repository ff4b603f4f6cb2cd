"""Drop-ins for torchrl's ``SoftUpdate`` and ``HardUpdate``.

from fused_ema.hooks.torchrl import SoftUpdate

updater = SoftUpdate(loss_module, tau=0.005)
updater.step()  # after each optimizer.step()
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fused_ema.hooks import required
from fused_ema.plan import Plan

_objectives = required("torchrl.objectives", "torchrl", "torchrl>=0.6")
_SoftUpdate: Any = _objectives.SoftUpdate
_HardUpdate: Any = _objectives.HardUpdate


class _Planned:
    """The step of an updater as one launch a dtype pair, in place of its ``_step``."""

    _plan: Plan | None = None
    _planned: tuple[object, ...] = ()

    def _targets_plan(self) -> Plan:
        """The plan of all targets and sources; made anew where torchrl has other ones."""
        owner: Any = self
        if not owner.initialized:
            raise RuntimeError(
                f"fused_ema.hooks.torchrl.{type(self).__name__}: the updater isn't initialised; "
                "call init_() before step()"
            )
        sources, targets = owner._sources, owner._targets
        # Both are locked: their tensors stay until init_() makes other ones.
        if self._plan is None or any(
            was is not now for was, now in zip(self._planned, (sources, targets), strict=True)
        ):
            names, live, averaged = [], [], []
            for key, source in sources.items(True, True):
                first, *rest = (key,) if isinstance(key, str) else key
                names.append(".".join((first, *rest)))
                live.append(source)
                averaged.append(targets.get((f"target_{first}", *rest)))
            self._plan = Plan(averaged, live, names)
            self._planned = sources, targets
            self._averaged: list[Tensor] = averaged
        if any(target.requires_grad for target in self._averaged):
            raise RuntimeError(
                f"fused_ema.hooks.torchrl.{type(self).__name__}: a target parameter requires a "
                "gradient; it is moved by the updater alone"
            )
        return self._plan

    def __getstate__(self) -> dict[str, Any]:
        """Without the plan, which holds on to memory; a copy makes its own."""
        left_out = ("_plan", "_planned", "_averaged")
        return {name: value for name, value in vars(self).items() if name not in left_out}


class SoftUpdate(_Planned, _SoftUpdate):  # type: ignore[misc]
    """torchrl's ``SoftUpdate`` with one launch a dtype pair, and torchrl's bits.

    ``target = eps * target + (1 - eps) * source`` as ``target.lerp_(source, 1 - eps)``, of all
    parameters with a target in the loss module, the stacked ones of ensembles too. Arguments,
    attributes, warnings and state are torchrl's. A step may be captured in a CUDA graph once one
    was made outside of it.

    Raises:
        RuntimeError: ``step()`` before ``init_()``; a target that requires a gradient.
    """

    def step(self) -> None:
        """Moves the targets; after each optimizer step."""
        self._targets_plan()._update(1 - self.eps, "lerp")


class HardUpdate(_Planned, _HardUpdate):  # type: ignore[misc]
    """torchrl's ``HardUpdate`` with one launch a dtype pair for the copy.

    The counter is torchrl's: the targets are copied in every step that begins with it at
    ``value_network_update_interval``, which are ``value_network_update_interval + 1`` apart.

    Raises:
        RuntimeError: As SoftUpdate.
    """

    counter: int

    def step(self) -> None:
        """Counts, and copies where it is time; after each optimizer step."""
        plan = self._targets_plan()
        if self.counter == self.value_network_update_interval:
            plan.copy_to_ema()
            self.counter = 0
        else:
            self.counter += 1
