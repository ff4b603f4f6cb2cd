"""Drop-ins for TRL's callbacks that move a reference model or a teacher after each step.

trainer = DPOTrainer(model, args=DPOConfig(sync_ref_model=True), train_dataset=dataset)
fused_ema.hooks.trl.replace_callbacks(trainer)  # before trainer.train()
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fused_ema import _checks
from fused_ema.hooks import _pairs, _teachers, required

_callbacks: Any = required("trl.trainer.callbacks", "trl", "trl>=1.0")
_TheirSync: Any = _callbacks.SyncRefModelCallback
_Callback: Any = _callbacks.TrainerCallback


class SyncRefModelCallback(_TheirSync):  # type: ignore[misc]
    """TRL's ``SyncRefModelCallback`` with one launch a dtype pair, and TRL's bits.

    Every ``args.ref_model_sync_steps`` steps the reference model becomes ``(1 - alpha) * ref +
    alpha * model`` with ``alpha = args.ref_model_mixup_alpha``, by the order of the parameters, as
    ``ref.mul_(1 - alpha).add_(param, alpha=alpha)``; a 16-bit reference of float32 parameters is
    left to torch's lists. Parameters are found once, and again where either model holds others. A
    tied weight counts once.

    Args:
        ref_model: The reference model; None for nothing to do.
        accelerator: Which unwraps the model; None where it isn't wrapped.

    Raises:
        ValueError: At a step: the rate is outside of [0, 1]; the two have different numbers of
            parameters, or other shapes; ZeRO-3 partitions them.
    """

    @staticmethod
    def sync_target_model(model: nn.Module, target_model: nn.Module, alpha: float) -> None:
        """Moves the parameters of the target towards those of the model.

        Args:
            model: The model that is trained, without wrappers.
            target_model: The reference model or teacher.
            alpha: The weight of the new value, in [0, 1].

        Raises:
            TypeError: A parameter that isn't floating-point.
            ValueError: As the class.
        """
        where = "hooks.trl.sync_target_model"
        alpha = _checks.fraction(where, "alpha", alpha)
        _teachers.update(where, model, target_model, alpha, "mul_add")


class SyncTeacherModelCallback(SyncRefModelCallback):
    """The same for the teacher of TRL's SDPO and SDFT, as its ``SyncTeacherModelCallback``.

    Every ``args.teacher_sync_steps`` steps, with the weight ``args.teacher_update_rate`` of the
    student.

    Args:
        teacher_model: The teacher; None for nothing to do.
        accelerator: Which unwraps the model; None where it isn't wrapped.
    """

    def __init__(self, teacher_model: nn.Module | None, accelerator: Any = None) -> None:
        super().__init__(ref_model=teacher_model, accelerator=accelerator)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer's event."""
        if self.ref_model is not None and state.global_step % args.teacher_sync_steps == 0:
            model = _unwrapped(kwargs["model"], self.accelerator)
            self.sync_target_model(model, self.ref_model, args.teacher_update_rate)


class PEFTAdapterEMACallback(_Callback):  # type: ignore[misc]
    """A teacher that is an adapter of the model itself, as TRL's ``PEFTAdapterEMACallback``.

    The adapter is made when the training begins, with zeros; every ``sync_steps`` steps it becomes
    ``(1 - update_rate) * teacher + update_rate * student``, in TRL's three rounded operations
    (``form="two_products"``), in place: no state dicts, no copies beside the adapter, and
    ``set_adapter`` is called at the beginning alone. The student is the adapter that is active
    then. An adapter of that name that the model has already goes on from its values. The teacher of
    a 16-bit student is in float32, as peft makes it, and so is its average, which TRL rounds to the
    student's dtype.

    Args:
        model: The PeftModel, wrapped or not.
        teacher_adapter_name: The teacher's adapter.
        update_rate: The weight of the new value, in [0, 1].
        sync_steps: Steps from one update to the next, from 1.
        accelerator: Which unwraps the model; Trainer's where it is None.

    Raises:
        ValueError: A setting outside of its range; when the training begins, a student without
            parameters, or ZeRO-3's partitions.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher_adapter_name: str = "teacher",
        update_rate: float = 0.05,
        sync_steps: int = 1,
        accelerator: Any = None,
    ) -> None:
        where = "hooks.trl.PEFTAdapterEMACallback"
        self.model = model
        self.teacher_adapter_name = teacher_adapter_name
        self.update_rate = _checks.fraction(where, "update_rate", update_rate)
        self.sync_steps = _checks.count(where, "sync_steps", sync_steps, 1)
        self.accelerator = accelerator
        self._where = where
        self._student: str | None = None
        self._kept: _teachers.Kept | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer's event: makes the teacher's adapter."""
        if self.accelerator is None:
            self.accelerator = kwargs.get("accelerator")
        self._begin(_unwrapped(self.model, self.accelerator))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer's event: moves the teacher."""
        if state.global_step % self.sync_steps != 0:
            return
        model = _unwrapped(self.model, self.accelerator)
        if self._student is None:
            self._begin(model)
        if self._kept is None or not self._kept.is_of(model):
            self._kept = _teachers.Kept(self._pairs_of(model), model)
        self._kept.pairs.update(self.update_rate, "two_products")

    @torch.no_grad()
    def _begin(self, model: Any) -> None:
        if self._student is not None:
            return
        self._student = student = model.active_adapter
        if self.teacher_adapter_name in model.peft_config:
            return
        model.add_adapter(self.teacher_adapter_name, model.peft_config[student])
        model.set_adapter(student)  # Which leaves the new one without gradients.
        for averaged, _ in self._pairs_of(model).floats:
            averaged.zero_()

    def _pairs_of(self, model: nn.Module) -> _pairs.Pairs:
        params = dict(model.named_parameters())
        found = []
        for name, live in params.items():
            parts = name.split(".")
            if self._student in parts:
                twin = [self.teacher_adapter_name if x == self._student else x for x in parts]
                averaged = params.get(".".join(twin))
                if averaged is not None:
                    found.append((averaged, live, name))
        if not found:
            raise ValueError(
                f"fused_ema.{self._where}: the adapter '{self._student}' has no parameters that "
                f"'{self.teacher_adapter_name}' has too; pass a model with a LoRA adapter"
            )
        return _teachers.checked_pairs(self._where, found)


def _unwrapped(model: Any, accelerator: Any) -> Any:
    return model if accelerator is None else accelerator.unwrap_model(model)


def replace_callbacks(trainer: Any) -> None:
    """Puts these callbacks in the place of TRL's own in a trainer; before ``trainer.train()``.

    Args:
        trainer: Any of TRL's that syncs a reference model (``sync_ref_model=True``) or a teacher.

    Raises:
        ValueError: The trainer has none of them.
    """
    callbacks = trainer.callback_handler.callbacks
    num_found = 0
    for i, theirs in enumerate(callbacks):
        kind = type(theirs)
        if kind.__module__.split(".")[0] != "trl" or kind.__name__ not in _OURS:
            continue
        num_found += 1
        if kind.__name__ == "PEFTAdapterEMACallback":
            callbacks[i] = PEFTAdapterEMACallback(
                theirs.model,
                theirs.teacher_adapter_name,
                theirs.update_rate,
                theirs.sync_steps,
                theirs.accelerator,
            )
        else:
            callbacks[i] = _OURS[kind.__name__](theirs.ref_model, theirs.accelerator)
    if num_found == 0:
        raise ValueError(
            f"fused_ema.hooks.trl.replace_callbacks: this {type(trainer).__name__} has none of "
            f"{', '.join(_OURS)}; make it with sync_ref_model=True or teacher_model_kind='ema'"
        )


_OURS: dict[str, Any] = {
    kind.__name__: kind
    for kind in (SyncRefModelCallback, SyncTeacherModelCallback, PEFTAdapterEMACallback)
}
