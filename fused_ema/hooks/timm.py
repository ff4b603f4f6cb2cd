"""A drop-in for timm's ``ModelEmaV3``; timm itself isn't needed.

model_ema = fused_ema.hooks.timm.ModelEmaV3(model, decay=0.9998, use_warmup=True)
model_ema.update(model, step=num_updates)  # after each optimizer.step()
evaluate(model_ema)
"""

from __future__ import annotations

from collections.abc import Iterable
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

    Arguments are those of timm 1.0.31, in its order. Different from timm's: tied weights are
    averaged once a step, not once a name; a model with another number of tensors is an error; a
    bfloat16 average is rounded to nearest, where timm 1.0 rounds at random unless it is told not
    to. Small updates are lost in a bfloat16 average rounded so: pass ``dtype=torch.float32``. It
    holds on to the model that was given last.

    Args:
        model: Copied; the copy is in evaluation mode.
        decay: The weight of the old value, in [0, 1].
        min_decay: The least decay while warming up, in [0, 1].
        update_after_step: Steps before which the average follows the model, from 0.
        use_warmup: Raise the decay from 0; only where :meth:`update` is given the step.
        warmup_gamma: Steps that scale the warm-up, above 0.
        warmup_power: The warm-up's exponent, above 0.
        device: Of the average; None for the model's.
        dtype: Of the average; None for the model's. Dtype pairs that :func:`fused_ema.update_` has
            no kernel for, as bfloat16 with float32, are averaged by torch's own functions.
        stochastic_rounding: True only where no average is bfloat16: there it makes no difference.
        stochastic_rounding_seed: Makes no difference.
        foreach: Which of timm's two loops to agree with where ``dtype`` isn't the model's: the
            same bits otherwise. As with timm off where ``device`` isn't the very
            ``torch.device`` of the model's first parameter.
        exclude_buffers: Copy the buffers, also those that aren't persistent, instead of averaging
            them.

    Attributes:
        module: The averaged copy.

    Raises:
        TypeError: The model is no module, a setting no number.
        ValueError: A setting outside of its range; ``stochastic_rounding`` of bfloat16 averages.
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
        dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        stochastic_rounding_seed: int = 0,
        foreach: bool = True,
        exclude_buffers: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"fused_ema.{_WHERE}: model is a {type(model).__name__}; pass a torch.nn.Module"
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
        self.stochastic_rounding = stochastic_rounding
        self.stochastic_rounding_seed = stochastic_rounding_seed
        self.module = deepcopy(model)
        self.module.eval()
        if device is not None:
            # As timm compares them: a string is never equal to a device.
            first = next(model.parameters(), None)
            self.foreach = foreach and first is not None and device == first.device
            self.module.to(device=self.device)
        if dtype is not None:
            self.module.to(dtype=dtype)
        tensors_of = _params_of if exclude_buffers else _members_of
        self._refuse_to_round(tensor.dtype for _, tensor in tensors_of(self.module))
        self._follow()

    def _follow(self) -> None:
        self._members = _pairs.Follower(self.module, _members_of, converts=True)
        self._params = _pairs.Follower(self.module, _params_of, converts=True)
        self._buffers_too = _pairs.Follower(
            self.module, _buffers_of, only_copied=True, follows_passing=True
        )

    def _follow_module(self) -> None:
        if self._members.is_of_another(self.module):
            self._follow()

    def _refuse_to_round(self, dtypes: Iterable[torch.dtype]) -> None:
        if self.stochastic_rounding and torch.bfloat16 in dtypes:
            raise ValueError(
                f"fused_ema.{_WHERE}: stochastic_rounding is True, which isn't there for averages "
                "in bfloat16; pass dtype=torch.float32, which keeps small updates exactly, or "
                "stochastic_rounding=False to round to nearest"
            )

    def _average(self, pairs: _pairs.Pairs, decay: float) -> None:
        self._refuse_to_round(average for average, _ in pairs.dtypes)
        # Where the dtypes differ timm's foreach loop multiplies and adds, its other one is a lerp.
        form: Form = "mul_add" if self.foreach and pairs.are_mixed else "lerp"
        pairs.update(1.0 - decay, form)
        pairs.copy_others()

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
            TypeError: A floating-point average of complex or integer values.
            ValueError: Another number of tensors than was copied, or other shapes; as
                :meth:`get_decay`; ``stochastic_rounding`` of bfloat16 averages.
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
        self._average(self._members.pairs(model), decay)

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
        self._average(params, decay)
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
