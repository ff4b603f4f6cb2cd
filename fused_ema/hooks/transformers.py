"""Transformers: a callback of ``Trainer`` that averages the weights and evaluates with the average.

For accelerate, or a loop of your own around it, no adapter is needed::

    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    ema = fused_ema.EMAManager(model, momentum=0.001)
    ema.register_step_post_hook(optimizer)  # real steps only: accumulated, not skipped

``accelerator.register_for_checkpointing(ema)`` then makes ``save_state`` and ``load_state`` keep
it. With FSDP2 accelerate writes the first process's shards alone of what is registered so, and
loading them is an error. There torch.distributed.checkpoint saves it, for any number of processes::

    accelerator.register_save_state_pre_hook(
        lambda models, weights, folder: dcp.save({"ema": ema}, checkpoint_id=f"{folder}/ema")
    )
    accelerator.register_load_state_pre_hook(
        lambda models, folder: dcp.load({"ema": ema}, checkpoint_id=f"{folder}/ema")
    )

With DeepSpeed, where ``model`` is an engine: ``fused_ema.hooks.deepspeed.EngineEMA(model)``.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from fused_ema._tracking import BufferMode
from fused_ema.formats._files import Replacing
from fused_ema.hooks import _options, _sharded, required
from fused_ema.hooks._made import MakesManager
from fused_ema.manager import EMAManager
from fused_ema.ops import Form
from fused_ema.schedules import Schedule

__all__ = ["FILE_NAME", "FOLDER_NAME", "EMACallback"]

_TITLE = "fused_ema.hooks.transformers.EMACallback"
_trainer_callback = required(
    "transformers.trainer_callback", "transformers", "transformers >= 4.46"
)
_trainer_utils = required("transformers.trainer_utils", "transformers", "transformers >= 4.46")

if TYPE_CHECKING:
    from fused_ema.hooks.deepspeed import EngineEMA

    _Callback = object
else:
    _Callback = _trainer_callback.TrainerCallback

FILE_NAME = "ema.pt"
"""The average's file in each ``checkpoint-N``."""
FOLDER_NAME = "ema"
"""Its folder there where the model is sharded, as torch.distributed.checkpoint writes it."""

_STEP_KEY = "global_step"
_MANAGER_KEY = "manager"


class EMACallback(MakesManager, _Callback):
    """Averages the weights in ``Trainer.train()``; ``evaluate`` and ``predict`` see the average.

    A ``Trainer`` has no event before an evaluation, and tells no callback which checkpoint it
    resumes from. So :meth:`attach` this one to the trainer: it then stands around the trainer's
    ``evaluation_loop`` and ``train``, and the raw weights come back whatever evaluation raises.

    An update runs after each optimizer step: once for ``gradient_accumulation_steps`` batches, and
    not where a gradient scaler skipped the step. (To know that, each step waits for the scale,
    where there is a scaler.)

    Each ``checkpoint-N`` holds the raw weights as ever and the average in a file ``ema.pt`` beside
    them, complete or not there. ``train(resume_from_checkpoint=...)`` goes on from both bit for
    bit. With ``load_best_model_at_end`` the average of the best checkpoint is loaded with its
    weights; where it has none, the average starts from them, with a warning.

    With DeepSpeed the average is a :class:`fused_ema.hooks.deepspeed.EngineEMA`: of the engine's
    masters, updated by the engine's own steps, saved by each rank beside the engine's files.

    With FSDP2 (``"version": 2`` in ``fsdp_config``) each process averages its shards. The average
    is then a folder ``ema`` of torch.distributed.checkpoint, which all processes write, and any
    number of them reads.

    The manager is made when training starts, and is the attribute :attr:`manager`.

    Args:
        momentum: The weight of the new value, between 0 and 1, both excluded.
        interval: As of :class:`fused_ema.EMAManager`, in optimizer steps made; so are the others
            below.
        skip_buffers: Average parameters only.
        momentum_fun: The momentum as a function of the 0-based optimizer step.
        form: ``"lerp"`` or ``"mul_add"``.
        begin: The first step that averages; before it the average follows by copy.
        ema_dtype: Of averages; None for float32 where the param is narrower.
        device: Of averages; None for each param's.
        copy_buffers: The same as ``buffers="copy"``.
        skip_frozen: Leave out parameters that don't require a gradient when training starts.
        include: Track only names that match one of these shell patterns.
        exclude: Leave out names that match one of these.
        buffers: As in :class:`fused_ema.EMAManager`; None is ``"average"``, the reference's rule.
        save_to: A directory for ``save_pretrained`` of the average when training ends; None for
            no such thing.
        start_anew: Where the checkpoint to resume from has no average, start it from the
            checkpoint's weights instead of raising.

    Raises:
        TypeError: As EMAManager.
        ValueError: As EMAManager. Here, but for patterns and dtypes, which need the model and so
            come when training starts.

    Example:
        >>> ema = EMACallback(momentum=0.001).attach(trainer)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
        >>> ema.manager.copy_to(model)  # for good  # doctest: +SKIP
    """

    def __init__(
        self,
        momentum: float = 0.0002,
        interval: int = 1,
        skip_buffers: bool = False,
        momentum_fun: Schedule | None = None,
        *,
        form: Form = "lerp",
        begin: int = 0,
        ema_dtype: torch.dtype | Literal["param"] | None = None,
        device: torch.device | str | None = None,
        copy_buffers: bool = False,
        skip_frozen: bool = False,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] = (),
        buffers: BufferMode | Mapping[str, BufferMode] | None = None,
        save_to: str | os.PathLike[str] | None = None,
        start_anew: bool = False,
    ) -> None:
        super().__init__()
        self._options = _options.checked(
            momentum=momentum,
            interval=interval,
            skip_buffers=skip_buffers,
            momentum_fun=momentum_fun,
            form=form,
            begin=begin,
            copy_buffers=copy_buffers,
            ema_dtype=ema_dtype,
            device=device,
            skip_frozen=skip_frozen,
            include=include,
            exclude=exclude,
            buffers=buffers,
        )
        self._save_to = save_to
        self._start_anew = start_anew
        self._trainer: Any = None
        self._resume_from: str | None = None
        self._manager: EMAManager | EngineEMA | None = None
        self._scale = 0.0

    @property
    def manager(self) -> EMAManager | EngineEMA | None:
        """The manager of the current or last training; None before it."""
        return self._manager

    def attach(self, trainer: Any) -> EMACallback:
        """Joins a trainer, for good: as its callback, and around its evaluation.

        Args:
            trainer: A ``transformers.Trainer``, which may have this callback already.

        Returns:
            This callback.

        Raises:
            RuntimeError: This callback has a trainer, or the trainer has another EMACallback.
        """
        if self._trainer is not None:
            raise RuntimeError(
                f"{_TITLE}.attach: this callback has a trainer already; make one for each trainer"
            )
        callbacks = trainer.callback_handler.callbacks
        if any(isinstance(other, EMACallback) and other is not self for other in callbacks):
            raise RuntimeError(
                f"{_TITLE}.attach: the trainer has another EMACallback; keep one, and a "
                "fused_ema.EMAManager for each further average"
            )
        if self not in callbacks:
            trainer.add_callback(self)
        self._trainer = trainer
        # The second one up to transformers 4 only.
        for name in ("evaluation_loop", "prediction_loop"):
            if hasattr(trainer, name):
                setattr(trainer, name, self._with_average(getattr(trainer, name)))
        trainer.train = self._noting_checkpoint(trainer.train)
        return self

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The model holds the average inside of the ``with``, and its raw weights after it.

        Within another one, and before training has started, it changes nothing.
        """
        manager = self._manager
        with nullcontext() if manager is None or manager.is_swapped else manager.swapped():
            yield

    # ---- events

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Makes the manager, and loads the average of the checkpoint that training resumes from.

        Raises:
            FileNotFoundError: The checkpoint has no average, and not ``start_anew``.
            RuntimeError: Not attached; another EMACallback; FSDP1.
            TypeError: ``save_to`` with a model that has no ``save_pretrained``.
            ValueError: The average's file is damaged, of another step or of another model; an
                engine that isn't served, or a choice of names with one.
        """
        trainer = self._attached()
        if getattr(trainer, "is_fsdp_enabled", False):
            version = getattr(trainer.accelerator.state.fsdp_plugin, "fsdp_version", 1)
            if version != 2:
                raise RuntimeError(
                    f"{_TITLE}: the trainer shards the weights with FSDP {version}, whose "
                    'parameters can\'t be averaged in place; set "version": 2 in fsdp_config'
                )
        if self._save_to is not None and not hasattr(self._model(), "save_pretrained"):
            raise TypeError(
                f"{_TITLE}: save_to is {str(self._save_to)!r} but {type(self._model()).__name__} "
                "has no save_pretrained; leave save_to out, and save manager.state_dict()"
            )
        manager = self._made_for(trainer)
        scaler = trainer.accelerator.scaler
        self._scale = 0.0 if scaler is None else scaler.get_scale()
        if state.global_step > 0:
            where = self._resume_from
            if where is None or not _has_average(manager, where):
                if not self._start_anew:
                    raise FileNotFoundError(
                        f"{_TITLE}: training resumes at step {state.global_step} but {where!r} "
                        f"has no {_WHERE}; resume from a checkpoint that has one, or pass "
                        "start_anew=True to start the average from its weights"
                    )
            else:
                _load(manager, where, state.global_step)
        self._manager = manager
        self._tell_made(manager)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Updates where the step was made."""
        manager = self._made()
        if isinstance(manager, EMAManager) and not self._was_skipped():
            manager.update()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes the average into the checkpoint just saved."""
        trainer, manager = self._attached(), self._made()
        run = trainer._get_output_dir(trial=getattr(trainer, "_trial", None))
        folder = os.path.join(run, f"checkpoint-{state.global_step}")
        if not isinstance(manager, EMAManager):
            manager.save_checkpoint(folder)
        elif manager._tracked.is_sharded:
            content = {_STEP_KEY: state.global_step, _MANAGER_KEY: manager}
            _sharded.save(content, os.path.join(folder, FOLDER_NAME), args.should_save)
        elif args.should_save:
            os.makedirs(folder, exist_ok=True)
            content = {_STEP_KEY: state.global_step, _MANAGER_KEY: manager.state_dict()}
            with Replacing(Path(folder, FILE_NAME)) as file:
                torch.save(content, file)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Loads the average of the best checkpoint if its weights were, and saves it for use.

        A best checkpoint without an average, as of a run before this callback, is taken with a
        warning: the average starts from its weights.

        Raises:
            ValueError: As :meth:`on_train_begin`.
        """
        best, manager = state.best_model_checkpoint, self._made()
        is_engine = not isinstance(manager, EMAManager)
        if args.load_best_model_at_end and best is not None and (is_engine or _has_weights(best)):
            if _has_average(manager, best):
                _load(manager, best, None)
            else:
                # The model holds other weights than those that the average came from.
                warnings.warn(
                    f"{_TITLE}: the best checkpoint {best!r}, whose weights were loaded, has no "
                    f"{_WHERE}; the average starts from its weights",
                    stacklevel=2,
                )
                manager.reset()
        if self._save_to is None:
            return
        if isinstance(manager, EMAManager):
            with self.swapped():
                self._save_pretrained(manager, self._save_to, args.should_save)
            return
        averaged = manager.full_state_dict()
        if args.should_save:
            own = self._model().state_dict()
            averaged = {name: t.to(own[name].dtype) for name, t in averaged.items()}
            self._model().save_pretrained(self._save_to, state_dict=averaged)

    # ---- how it is kept

    def _attached(self) -> Any:
        if self._trainer is None:
            raise RuntimeError(
                f"{_TITLE}: attached to no trainer, which it needs to evaluate with the average "
                "and to resume; after making the trainer call attach(trainer)"
            )
        return self._trainer

    def _made_for(self, trainer: Any) -> EMAManager | EngineEMA:
        if not getattr(trainer, "is_deepspeed_enabled", False):
            return EMAManager(trainer.model, **self._options)
        from fused_ema.hooks.deepspeed import EngineEMA

        options = _options.for_engine(_TITLE, self._options)
        return EngineEMA(trainer.model_wrapped, **options)

    def _made(self) -> EMAManager | EngineEMA:
        if self._manager is None:
            raise RuntimeError(
                f"{_TITLE}: there is no average yet; it is made when training starts"
            )
        return self._manager

    def _was_skipped(self) -> bool:
        accelerator = self._attached().accelerator
        if accelerator.scaler is None:
            return bool(accelerator.optimizer_step_was_skipped)
        # A fused optimizer is called all the same and skips by itself, which accelerate doesn't
        # notice; but the scale shrinks after every skipped step, and only then.
        scale, before = accelerator.scaler.get_scale(), self._scale
        self._scale = scale
        return bool(accelerator.optimizer_step_was_skipped or scale < before)

    def _model(self) -> Any:
        trainer = self._attached()
        return trainer.accelerator.unwrap_model(trainer.model)

    def _save_pretrained(
        self, manager: EMAManager, folder: str | os.PathLike[str], is_main: bool
    ) -> None:
        if not manager._tracked.is_sharded:
            self._model().save_pretrained(folder, is_main_process=is_main)
            return
        trainer = self._attached()
        gathered = trainer.accelerator.get_state_dict(trainer.model)  # On the first process.
        if is_main:
            self._model().save_pretrained(folder, state_dict=gathered)

    def _with_average(self, loop: Any) -> Any:
        @functools.wraps(loop)
        def with_average(*args: Any, **kwargs: Any) -> Any:
            with self.swapped():
                return loop(*args, **kwargs)

        return with_average

    def _noting_checkpoint(self, train: Any) -> Any:
        @functools.wraps(train)
        def noting_checkpoint(resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
            where = resume_from_checkpoint
            if where is True:
                where = _trainer_utils.get_last_checkpoint(self._trainer.args.output_dir)
            self._resume_from = os.fspath(where) if where else None
            return train(resume_from_checkpoint, *args, **kwargs)

        return noting_checkpoint


_WHERE = f"'{FILE_NAME}' or complete folder '{FOLDER_NAME}'"


def _has_weights(folder: str) -> bool:
    """Whether Trainer finds a model's or an adapter's weights there, in one file or in shards."""
    stems = ("model", "pytorch_model", "adapter_model", "pytorch_model_fsdp")
    files = [f"{stem}{suffix}" for stem in stems for suffix in (".safetensors", ".bin")]
    files += [f"{file}.index.json" for file in files]
    return any(os.path.isfile(os.path.join(folder, file)) for file in files) or (
        _sharded.is_complete(os.path.join(folder, "pytorch_model_fsdp_0"))
    )


def _has_average(manager: EMAManager | EngineEMA, folder: str) -> bool:
    if not isinstance(manager, EMAManager):
        return manager.is_saved_in(folder)
    is_file = os.path.isfile(os.path.join(folder, FILE_NAME))
    return is_file or _sharded.is_complete(os.path.join(folder, FOLDER_NAME))


def _load(manager: EMAManager | EngineEMA, folder: str, step: int | None) -> None:
    """Loads the average of a checkpoint, if it is of that step."""
    if not isinstance(manager, EMAManager):
        manager.load_checkpoint(folder)
        return
    in_folder = os.path.join(folder, FOLDER_NAME)
    is_sharded = _sharded.is_complete(in_folder)
    path = in_folder if is_sharded else os.path.join(folder, FILE_NAME)
    try:
        if is_sharded:
            saved_step = _sharded.load({_STEP_KEY: 0}, path)[_STEP_KEY]
            saved = None
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
            saved_step, saved = content[_STEP_KEY], content[_MANAGER_KEY]
    except Exception as error:
        raise ValueError(
            f"{_TITLE}: {path!r} can't be read as an average (damaged or cut short?); nothing was "
            f"changed. Resume from another checkpoint: {error}"
        ) from error
    if step is not None and saved_step != step:
        raise ValueError(
            f"{_TITLE}: {path!r} is of step {saved_step} but training resumes at step {step}; "
            "nothing was changed. Put back the file that was saved with this checkpoint"
        )
    try:
        if saved is None:
            _sharded.load({_MANAGER_KEY: manager}, path)
        else:
            manager.load_state_dict(saved)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{_TITLE}: {path!r} doesn't fit: {error}") from error
