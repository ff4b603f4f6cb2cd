"""MMDetection 3's ``MeanTeacherHook``, with fused updates; needs mmengine alone.

Import it once, ``custom_imports = dict(imports=["fused_ema.hooks.mmdet"])`` in a config, and add
``Fused`` to the hook's name::

    custom_hooks = [dict(type="FusedMeanTeacherHook", momentum=0.001)]

MMDetection 2.x has its hooks in ``fused_ema.hooks.mmcv``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fused_ema import _checks, _tracking
from fused_ema.hooks import required
from fused_ema.hooks._pairs import Follower, Pairs

__all__ = ["FusedMeanTeacherHook"]

_PACKAGE = "mmengine (0.10)"
_WHERE = "hooks.mmdet.FusedMeanTeacherHook"
_models: Any = required("mmengine.model", "mmdet", _PACKAGE)
_Hook: Any = required("mmengine.hooks", "mmdet", _PACKAGE).Hook
_HOOKS: Any = required("mmengine.registry", "mmdet", _PACKAGE).HOOKS


@_HOOKS.register_module()
class FusedMeanTeacherHook(_Hook):  # type: ignore[misc]
    """Moves ``model.teacher`` towards ``model.student``; as MMDetection's MeanTeacherHook.

    ``teacher = (1 - momentum) * teacher + momentum * student`` after each ``interval`` iterations,
    with the bits of ``mul_(1 - momentum).add_(student, alpha=momentum)``, and a copy before
    iteration 0. What differs: the copy is one, where MMDetection multiplies by 0 and adds, so that
    a NaN or an infinity in the teacher doesn't stay; a tied weight is averaged once, where with
    buffers MMDetection averages it for each of its names; a student and a teacher of different
    numbers of tensors are an error, where MMDetection leaves out the rest.

    Args:
        momentum: The weight of the new value, between 0 and 1, both excluded.
        interval: Iterations from one update to the next, from 1.
        skip_buffer: Average parameters only, not also the floating-point buffers of the state
            dicts.

    Raises:
        ValueError: A setting outside of its range; in a run, tensors that don't fit.
        TypeError: In a run, a model without ``student`` or ``teacher``.
    """

    def __init__(
        self, momentum: float = 0.001, interval: int = 1, skip_buffer: bool = True
    ) -> None:
        self.momentum = _checks.momentum(_WHERE, momentum)
        self.interval = _checks.count(_WHERE, "interval", interval, 1)
        self.skip_buffers = skip_buffer
        self._follower: Follower | None = None

    def before_train(self, runner: Any) -> None:
        """Checks the model; before iteration 0 the teacher becomes the student."""
        pairs = self._pairs(runner.model)
        if runner.iter == 0:
            pairs.copy()

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Moves the teacher where the interval says so."""
        if (runner.iter + 1) % self.interval == 0:
            self._pairs(runner.model).update(self.momentum, "mul_add")

    def _pairs(self, model: Any) -> Pairs:
        if _models.is_model_wrapper(model):
            model = model.module
        for side in ("student", "teacher"):
            if not isinstance(getattr(model, side, None), nn.Module):
                raise TypeError(
                    f"fused_ema.{_WHERE}: the {type(model).__name__} has no module '{side}'; give "
                    "the hook to a model with a student and a teacher, as MMDetection's "
                    "SemiBaseDetector is one"
                )
        if self._follower is None or self._follower.is_of_another(model.teacher):
            tensors_of = _params_of if self.skip_buffers else _floats_of
            self._follower = Follower(model.teacher, tensors_of, converts=True)
        return self._follower.pairs(model.student)


def _params_of(module: nn.Module) -> list[tuple[str, Tensor]]:
    return list(module.named_parameters())


def _floats_of(module: nn.Module) -> list[tuple[str, Tensor]]:
    members = _tracking.read(module).members
    return [(one.name, one.tensor) for one in members if one.tensor.is_floating_point()]
