"""A drop-in for timm's ``ModelEmaV3``; timm itself isn't needed.

model_ema = fused_ema.hooks.timm.ModelEmaV3(model, decay=0.9998, use_warmup=True)
model_ema.update(model, step=num_updates)  # after each optimizer.step()
evaluate(model_ema)
"""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn

from fused_ema import _checks, _tracking
from fused_ema.hooks import _pairs, _shadow
from fused_ema.ops import Form

_WHERE = "hooks.timm.ModelEmaV3"


class ModelEmaV3(_shadow.ModuleCopy):
    """timm's ``ModelEmaV3`` with the lists worked out once: no ``state_dict()`` in a step.

    ``ema = decay * ema + (1 - decay) * param`` for every floating-point tensor of the model's
    ``state_dict()``, with the bits of timm's own; others are copied. The decay at a step is 0 up to
    step ``update_after_step + 1``, then ``decay``, or with ``use_warmup`` for ``t = step -
    update_after_step - 1``: ``1 - (1 + t / warmup_gamma) ** -warmup_power``, not above ``decay``
    and not below ``min_decay`` (timm, ``ModelEmaV3.get_decay``).

    ``state_dict()`` has timm's keys and can be loaded by timm's class, and the other way round.

    Different from timm's: tied weights are averaged once a step, not once a name; a model with
    another number of tensors is an error; a bfloat16 average is rounded to nearest, where timm 1.0
    rounds at random unless it is told not to. Small updates are lost in a bfloat16 average rounded
    so: pass ``dtype=torch.float32``. It holds on to the model that was given last.

    Args:
        model: Copied; the copy is in evaluation mode.
        decay: The weight of the old value, in [0, 1].
        min_decay: The least decay while warming up, in [0, 1].
        update_after_step: Steps before which the average follows the model, from 0.
        use_warmup: Raise the decay from 0; only where :meth:`update` is given the step.
        warmup_gamma: Steps that scale the warm-up, above 0.
        warmup_power: The warm-up's exponent, above 0.
        device: Of the average; None for the model's.
        foreach: Which of timm's two loops to agree with where ``dtype`` isn't the model's: the
            same bits otherwise.
        exclude_buffers: Copy the buffers, also those that aren't persistent, instead of averaging
            them.
        dtype: Of the average; None for the model's.
        stochastic_rounding: Only False.

    Attributes:
        module: The averaged copy.

    Raises:
        TypeError: The model is no module, a setting no number.
        ValueError: A setting outside of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.9999,
        min_decay: float = 0.0,
        update_after_step: int = 0,
        use_warmup: bool = False,
        warmup_gamma: float = 1.0,
        warmup_power: float = 2 / 3,
        device: torch.device | str | None = None,
        *,
        foreach: bool = True,
        exclude_buffers: bool = False,
        dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"fused_ema.{_WHERE}: model is a {type(model).__name__}; pass a torch.nn.Module"
            )
        if stochastic_rounding:
            raise ValueError(
                f"fused_ema.{_WHERE}: stochastic_rounding is True, which isn't there; pass "
                "dtype=torch.float32, which keeps small updates exactly"
            )
        self.decay = _shadow.checked_decay(_WHERE, "decay", decay)
        self.min_decay = _shadow.checked_decay(_WHERE, "min_decay", min_decay)
        self.update_after_step = _checks.count(_WHERE, "update_after_step", update_after_step, 0)
        self.use_warmup = use_warmup
        self.warmup_gamma = _checks.positive(_WHERE, "warmup_gamma", warmup_gamma)
        self.warmup_power = _checks.positive(_WHERE, "warmup_power", warmup_power)
        self.exclude_buffers = exclude_buffers
        self.device = None if device is None else torch.empty(0, device=device).device
        self.dtype = dtype
        self.foreach = foreach
        dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
        devices = {p.device for p in model.parameters()}
        self.module = deepcopy(model)
        self.module.eval()
        if self.device is not None and devices != {self.device}:
            self.foreach = False
            self.module.to(device=self.device)
        if dtype is not None:
            self.module.to(dtype=dtype)
        # Where the dtypes differ timm's foreach loop multiplies and adds, its other one is a lerp.
        is_mixed = dtype is not None and dtypes != {dtype}
        self._form: Form = "mul_add" if self.foreach and is_mixed else "lerp"
        self._follow()

    def _follow(self) -> None:
        self._members = _pairs.Follower(self.module, _members_of, follows_passing=True)
        self._params = _pairs.Follower(self.module, _params_of, follows_passing=True)
        self._buffers_too = _pairs.Follower(self.module, _buffers_of, True, follows_passing=True)

    def _follow_module(self) -> None:
        if self._members.is_of_another(self.module):
            self._follow()

    def get_decay(self, step: int | None = None) -> float:
        """The decay of an update.

        Args:
            step: The number of optimizer steps done, from 0; None for ``decay`` itself.

        Raises:
            ValueError: A step below 0, or no whole number.
        """
        if step is None:
            return self.decay
        since = _checks.count(f"{_WHERE}.get_decay", "step", step, 0) - self.update_after_step - 1
        if since <= 0:
            return 0.0
        if not self.use_warmup:
            return self.decay
        decay: float = 1 - (1 + since / self.warmup_gamma) ** -self.warmup_power
        return max(min(decay, self.decay), self.min_decay)

    def update(self, model: nn.Module, step: int | None = None) -> None:
        """Takes a model's values into the average; after each optimizer step.

        Args:
            model: The one that was copied, or one like it; may be wrapped.
            step: The number of optimizer steps done; None for no delay and no warm-up.

        Raises:
            TypeError: A dtype pair that can't be averaged.
            ValueError: Another number of tensors than was copied, or other shapes; as
                :meth:`get_decay`.
        """
        decay = self.get_decay(step)
        if self.exclude_buffers:
            self.apply_update_no_buffers_(model, decay)
        else:
            self.apply_update_(model, decay)

    def apply_update_(self, model: nn.Module, decay: float) -> None:
        """Averages what is in the model's ``state_dict()``; integer tensors are copied.

        Args:
            model: As in :meth:`update`.
            decay: The weight of the old value, in [0, 1].

        Raises:
            TypeError: As :meth:`update`.
            ValueError: As :meth:`update`.
        """
        self._follow_module()
        pairs = self._members.pairs(model)
        pairs.update(1.0 - decay, self._form)
        pairs.copy_others()

    def apply_update_no_buffers_(self, model: nn.Module, decay: float) -> None:
        """Averages parameters and copies buffers.

        Args:
            model: As in :meth:`update`.
            decay: The weight of the old value, in [0, 1].

        Raises:
            TypeError: As :meth:`update`.
            ValueError: As :meth:`update`.
        """
        self._follow_module()
        params, buffers = self._params.pairs(model), self._buffers_too.pairs(model)
        params.update(1.0 - decay, self._form)
        params.copy_others()
        buffers.copy()

    def set(self, model: nn.Module) -> None:
        """Copies what is in a model's ``state_dict()`` into the average.

        Args:
            model: As in :meth:`update`.

        Raises:
            ValueError: As :meth:`update`.
        """
        self._follow_module()
        self._members.pairs(model).copy()


def _members_of(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(member.name, member.tensor) for member in _tracking.read(module).members]


def _params_of(module: nn.Module) -> list[tuple[str, Tensor]]:
    return list(module.named_parameters())


def _buffers_of(module: nn.Module) -> list[tuple[str, Tensor]]:
    return list(module.named_buffers())
