"""Lightning: a callback that averages the weights during ``fit`` and evaluates with the average.

Serves both of Lightning's packages, ``lightning`` and ``pytorch_lightning``, from 2.2 on.

When an average moves, what a checkpoint holds and what the model holds after ``fit`` follow
``lightning.pytorch.callbacks.WeightAveraging``, and checkpoints go both ways. Its decay is
``1 - momentum``; its first update is a copy, so ``EMAWeightAveraging(decay=d)`` is
``EMA(momentum=1 - d, begin=1)``.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fused_ema import _shards, _steps, _tracking, state
from fused_ema._tracking import BufferMode
from fused_ema.hooks import _options, _sharded, required
from fused_ema.hooks._made import MakesManager
from fused_ema.manager import EMAManager
from fused_ema.ops import Form
from fused_ema.schedules import Schedule

__all__ = ["EMA"]

_TITLE = "fused_ema.hooks.lightning.EMA"
_HAS_LIGHTNING = importlib.util.find_spec("lightning") is not None
_NAME = "lightning.pytorch" if _HAS_LIGHTNING else "pytorch_lightning"
_callbacks = required(f"{_NAME}.callbacks", "lightning", "lightning or pytorch_lightning >= 2.2")
_strategies = required(f"{_NAME}.strategies", "lightning", "lightning or pytorch_lightning >= 2.2")

if TYPE_CHECKING:
    from fused_ema.hooks._lightning_engine import StrategyEMA

    _Callback = object
else:
    _Callback = _callbacks.Callback

# The first three are WeightAveraging's words for these parts of a checkpoint.
_MAIN_KEY = "state_dict"
_RAW_KEY = "current_model_state"
_COUNT_KEY = "averaging_state"
_OWN_KEY = "fused_ema"
_MANAGER_KEY = "manager"
_ENGINE_KEY = "engine"
_EPOCH_KEY = "latest_update_epoch"


class EMA(MakesManager, _Callback):
    """Averages the weights during ``fit``; validation, testing and prediction see the average.

    An update runs at the end of a batch in which an optimizer made a step: with
    ``accumulate_grad_batches=n`` once for n batches, and not where a gradient scaler skipped the
    step or ``training_step`` left it without gradients. Override :meth:`should_update` to choose
    among steps, or to update at the ends of epochs. Whatever :meth:`should_update` lets through
    is an iteration to ``interval``, ``begin`` and ``momentum_fun``, counted from 0.

    From ``on_validation_start`` to ``on_validation_end`` the model holds the average; in the
    sanity check too, where it is a clone of the weights. The raw weights come back whatever
    is raised inside.

    A checkpoint holds the average in its ``state_dict``, as ``load_from_checkpoint`` takes it, and
    the raw weights in ``current_model_state``: ``fit(ckpt_path=...)`` goes on from it bit for bit,
    also from one of Lightning's own ``WeightAveraging``. ``save_weights_only=True`` asks no
    callback, so such a file holds the raw weights.

    After ``fit`` the model holds the average for good; a checkpoint saved then still has the raw
    weights, which are kept on the CPU. Another ``fit``, of this trainer or of another one with an
    EMA of its own, starts a new average from the weights that the model holds, and other managers
    may have it.

    With ``ModelParallelStrategy`` (FSDP2, tensor parallel, both) each process averages its shards.
    A distributed checkpoint holds both sets of weights among the tensors of its ``state_dict``, the
    part that all processes write and any number of them reads; with
    ``save_distributed_checkpoint=False`` they are gathered into the one file.

    With ``DeepSpeedStrategy`` the average is a :class:`fused_ema.hooks.deepspeed.EngineEMA`: of the
    engine's masters, after steps that the engine has applied. Each rank saves its part beside the
    engine's files, which hold the raw weights whatever ``deploy`` is; ``fit(ckpt_path=...)`` goes
    on from both, and elsewhere the average is loaded. So a checkpoint saved after ``fit`` brings
    the raw weights back for its time.

    The manager is made when ``fit`` starts, once the model is on its device, and is
    the attribute :attr:`manager`.

    Args:
        momentum: The weight of the new value, between 0 and 1, both excluded; 1 - decay.
        interval: As of :class:`fused_ema.EMAManager`, in iterations that :meth:`should_update`
            let through; so are the others below.
        skip_buffers: Average parameters only.
        momentum_fun: The momentum as a function of the 0-based iteration.
        form: ``"lerp"``, ``"mul_add"`` or ``"two_products"``.
        begin: The first iteration that averages; before it the average follows by copy.
        ema_dtype: Of averages; None for float32 where the param is narrower.
        device: Of averages; None for each param's.
        copy_buffers: The same as ``buffers="copy"``.
        skip_frozen: Leave out parameters that don't require a gradient when ``fit`` starts.
        include: Track only names that match one of these shell patterns.
        exclude: Leave out names that match one of these.
        buffers: As in :class:`fused_ema.EMAManager`; None is ``"average"``, the reference's rule.
        deploy: Which weights the ``state_dict`` of a checkpoint, and the model after ``fit``, hold:
            ``"ema"``, or ``"raw"`` with the average kept beside.

    Raises:
        TypeError: As EMAManager.
        ValueError: As EMAManager; an unknown ``deploy``. Here, but for patterns and dtypes, which
            need the model and so come when ``fit`` starts, as does an engine that isn't served.

    Example:
        >>> trainer = Trainer(callbacks=[EMA(momentum=0.001)])  # doctest: +SKIP
        >>> trainer.fit(model, train_loader, val_loader)  # doctest: +SKIP
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
        deploy: Literal["ema", "raw"] = "ema",
    ) -> None:
        super().__init__()
        if deploy not in ("ema", "raw"):
            raise ValueError(f"{_TITLE}: deploy is {deploy!r}; choose 'ema' or 'raw'")
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
        self._deploy = deploy
        self._manager: EMAManager | StrategyEMA | None = None
        self._pending: Mapping[str, Any] | None = None
        self._pending_of_lightning: tuple[int, dict[str, Tensor]] | None = None
        self._pending_weights: Mapping[str, Any] | None = None
        # After fit, while the model holds the average for good: the raw weights, on the CPU.
        self._raw: dict[str, Tensor] | None = None
        self._latest_step = 0
        self._latest_epoch = -1
        self._swapped_here = False
        self._handles: list[RemovableHandle] = []
        self._asks_optimizers = False
        self._has_stepped = False
        self._had_gradients = False

    @property
    def manager(self) -> EMAManager | StrategyEMA | None:
        """The manager of the current or last ``fit``; None before it."""
        return self._manager

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Whether to update now; to be overridden. By default after every optimizer step.

        Args:
            step_idx: 0-based index of the optimizer step just made; None at the end of an epoch.
            epoch_idx: 0-based index of the epoch that ends; None after a step.
        """
        return step_idx is not None

    # ---- fit

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuses what can't be averaged, before anything is loaded.

        Raises:
            RuntimeError: Another callback of this trainer averages as well, or its strategy shards
                the weights in another way than FSDP2, tensor parallel and DeepSpeed do.
        """
        others = (EMA, getattr(_callbacks, "WeightAveraging", EMA))
        averaging = [callback for callback in trainer.callbacks if isinstance(callback, others)]
        if len(averaging) > 1:
            raise RuntimeError(
                f"{_TITLE}: the trainer has {len(averaging)} callbacks that average its weights, "
                f"{[type(callback).__name__ for callback in averaging]}; keep one, and a "
                "fused_ema.EMAManager for each further average"
            )
        is_served = _is_sharded(trainer) or _has_engine(trainer)
        if trainer.strategy.restore_checkpoint_after_setup and not is_served:
            raise RuntimeError(
                f"{_TITLE}: the strategy is {type(trainer.strategy).__name__}, which shards the "
                "weights or their optimizer; that isn't supported, choose ModelParallelStrategy "
                "(FSDP2), DeepSpeedStrategy, 'ddp' or a single device"
            )
        self._pending_weights = None
        if stage == "fit":
            self._release()
            self._pending = self._pending_of_lightning = None
            self._latest_epoch = -1

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Makes the manager; the model is on its device, and holds the weights to go on with."""
        if _has_engine(trainer):
            from fused_ema.hooks import _lightning_engine

            options = _options.for_engine(_TITLE, self._options)
            self._manager = _lightning_engine.StrategyEMA(trainer.strategy.model, **options)
            return
        self._load_pending_weights(trainer, pl_module)
        manager = EMAManager(pl_module, **self._options)
        if self._pending is not None:
            manager.load_state_dict(self._pending)
        elif self._pending_of_lightning is not None:
            num_updates, averaged = self._pending_of_lightning
            # It averages the whole model, whatever is tracked here.
            ema = {name: averaged[name] for name, _ in manager.named_emas() if name in averaged}
            manager.load_state_dict(state.pack(num_updates, num_updates, ema, {}, False))
        self._pending = self._pending_of_lightning = None
        self._manager = manager
        self._remove_handles()
        found = [_hookable(optimizer) for optimizer in trainer.optimizers]
        optimizers = [optimizer for optimizer in found if optimizer is not None]
        self._handles = [opt.register_step_post_hook(self._note_step) for opt in optimizers]
        self._asks_optimizers = bool(optimizers) and len(optimizers) == len(trainer.optimizers)
        self._tell_made(manager)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Takes the steps of a resumed run as seen."""
        self._latest_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Updates where an optimizer has made a step."""
        manager = self._made()
        has_stepped = trainer.global_step > self._latest_step
        if not isinstance(manager, EMAManager):
            has_stepped = manager.take_step()
        elif has_stepped and self._asks_optimizers:
            is_empty = pl_module.automatic_optimization and not outputs
            has_stepped = self._has_stepped and (self._had_gradients or not is_empty)
        self._latest_step = trainer.global_step
        self._has_stepped = self._had_gradients = False
        if has_stepped and self.should_update(step_idx=trainer.global_step - 1):
            manager.update()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Updates where :meth:`should_update` wants it at the end of an epoch."""
        epoch = trainer.current_epoch
        if epoch > self._latest_epoch and self.should_update(epoch_idx=epoch):
            self._made().update()
            self._latest_epoch = epoch

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Leaves the model with the weights to deploy."""
        if self._deploy == "raw":
            return
        manager = self._made()
        if not isinstance(manager, EMAManager):
            manager.swap()
            return
        tracked = dict(manager.named_emas())
        live = {m.name: m.tensor for m in _tracking.read(pl_module).members if m.name in tracked}
        # For checkpoints that are saved later. Not on the device: it may have no room for them.
        raw = {name: tensor.detach().to("cpu", copy=True) for name, tensor in live.items()}
        try:
            manager.copy_to(pl_module)
            self._raw = raw
        except BaseException:
            with torch.no_grad():
                for name, tensor in live.items():
                    tensor.copy_(raw[name])
            self._raw = None
            raise

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Brings the raw weights back where evaluation was broken off."""
        self._swap_out()
        self._remove_handles()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """The same where it ended otherwise."""
        self._swap_out()
        self._remove_handles()

    # ---- evaluation

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """The average goes in."""
        self._load_pending_weights(trainer, pl_module)
        self._swap_in(pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """The raw weights come back."""
        self._swap_out()

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """The average goes in."""
        self._load_pending_weights(trainer, pl_module)
        self._swap_in(pl_module)

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        """The raw weights come back."""
        self._swap_out()

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """The average goes in."""
        self._load_pending_weights(trainer, pl_module)
        self._swap_in(pl_module)

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        """The raw weights come back."""
        self._swap_out()

    # ---- checkpoints

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Adds the average, and puts the weights to deploy into ``state_dict``."""
        manager = self._manager_of(pl_module)
        if manager is None:
            return
        if not isinstance(manager, EMAManager):
            # It is saved with the engine, by each rank.
            checkpoint[_OWN_KEY] = {_ENGINE_KEY: True, _EPOCH_KEY: self._latest_epoch}
            return
        saved = manager.state_dict()
        is_gathered = _is_sharded(trainer) and not trainer.strategy._save_distributed_checkpoint
        if self._raw is not None:
            ema = _still_in(pl_module, saved[state.EMA_KEY])
            if ema is None:
                warnings.warn(
                    f"{_TITLE}: the model was changed after fit, so this checkpoint holds its "
                    "weights alone, and no average",
                    stacklevel=2,
                )
                return
            saved = {**saved, state.EMA_KEY: ema, state.RAW_KEY: self._raw}
        if is_gathered:
            saved = saved | {
                key: _gathered(saved[key], trainer.is_global_zero)
                for key in (state.EMA_KEY, state.RAW_KEY)
            }
        raw = _with(checkpoint[_MAIN_KEY], saved[state.RAW_KEY], pl_module)
        # The raw weights are in the model's part of the file, so the average's part has none.
        saved = {**saved, state.IS_SWAPPED_KEY: False, state.RAW_KEY: {}}
        checkpoint[_OWN_KEY] = {_MANAGER_KEY: saved, _EPOCH_KEY: self._latest_epoch}
        checkpoint[_MAIN_KEY] = raw
        if self._deploy == "ema":
            # Tensors that stand in a file twice are written once.
            checkpoint[_RAW_KEY] = raw
            checkpoint[_MAIN_KEY] = _with(raw, saved[state.EMA_KEY], pl_module)
            num_averaged = torch.tensor(saved[state.NUM_UPDATES_KEY])
            checkpoint[_COUNT_KEY] = {"n_averaged": num_averaged}
        if _is_sharded(trainer) and not is_gathered:
            # One process writes what isn't among these, and it hasn't all shards.
            keys = _by_key(saved[state.EMA_KEY], pl_module)
            beside = {f"{_OWN_KEY}.{k}": ema for k, ema in keys.items()}
            if self._deploy == "ema":
                beside = {f"{_RAW_KEY}.{k}": raw[k] for k in keys}
                checkpoint[_RAW_KEY] = {}
            checkpoint[_MAIN_KEY] = {**checkpoint[_MAIN_KEY], **beside}
            checkpoint[_OWN_KEY][_MANAGER_KEY] = {**saved, state.EMA_KEY: {}}

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Takes over a checkpoint whose ``state_dict`` the model has loaded already.

        In ``fit`` the model gets its raw weights, and elsewhere the average. A checkpoint without
        an average is taken with a warning: the average starts from its weights.

        Raises:
            ValueError: The checkpoint's part for this callback is none. What doesn't fit the model
                is an error of :meth:`fused_ema.EMAManager.load_state_dict` when ``fit`` starts.
        """
        own = checkpoint.get(_OWN_KEY)
        is_fit = getattr(trainer.state.fn, "value", trainer.state.fn) == "fit"
        if _has_engine(trainer):
            self._load_engine(trainer, pl_module, own, is_fit)
            return
        if own is not None and not (
            isinstance(own, Mapping) and isinstance(own.get(_MANAGER_KEY), Mapping)
        ):
            raise ValueError(
                f"{_TITLE}: the checkpoint's '{_OWN_KEY}' has no '{_MANAGER_KEY}'; it was not "
                "saved by this callback, or was cut since"
            )
        strict = pl_module.strict_loading
        if _is_sharded(trainer):
            self._load_sharded(trainer, pl_module, checkpoint, is_fit)
            return
        if not is_fit:
            self._release()  # Of other weights than those that were just loaded.
            if own is not None and _RAW_KEY not in checkpoint:
                ema = own[_MANAGER_KEY].get(state.EMA_KEY, {})
                main = _with(checkpoint[_MAIN_KEY], ema, pl_module)
                trainer.strategy.load_model_state_dict({_MAIN_KEY: main}, strict=strict)
                self._keep_if_rounded(pl_module, main)
            elif own is not None:
                self._keep_if_rounded(pl_module, checkpoint[_MAIN_KEY])
            return
        if own is not None:
            self._pending = own[_MANAGER_KEY]
            self._latest_epoch = own.get(_EPOCH_KEY, -1)
        elif _RAW_KEY in checkpoint and _COUNT_KEY in checkpoint:
            key_of = {
                name: key for key, names in _names_by_key(pl_module).items() for name in names
            }
            main = checkpoint[_MAIN_KEY]
            ema = {name: main[key] for name, key in key_of.items() if key in main}
            num_updates = int(checkpoint[_COUNT_KEY].get("n_averaged", 0))
            self._pending_of_lightning = num_updates, ema
        else:
            _warn_of_no_average()
            return
        raw = checkpoint.get(_RAW_KEY, checkpoint[_MAIN_KEY])
        if _RAW_KEY in checkpoint:
            trainer.strategy.load_model_state_dict({_MAIN_KEY: raw}, strict=strict)
        self._keep_if_rounded(pl_module, raw)

    def _load_sharded(
        self, trainer: Any, pl_module: nn.Module, checkpoint: Mapping[str, Any], is_fit: bool
    ) -> None:
        """The same where the strategy has loaded it; in ``fit`` the manager is there already."""
        own, is_deployed = checkpoint.get(_OWN_KEY), _RAW_KEY in checkpoint
        if not is_fit:
            self._release()
        elif own is None:
            _warn_of_no_average()
            self._made().reset()
        if own is None:
            return
        path = trainer.strategy.broadcast(trainer.ckpt_path)
        is_folder = _sharded.is_complete(path)
        live = pl_module.state_dict(keep_vars=True)
        saved = own[_MANAGER_KEY]
        if not is_fit:
            averages = _by_key(dict.fromkeys(saved[state.EMA_DTYPES_KEY]), pl_module)
            if is_folder and not is_deployed:
                targets = {f"{_OWN_KEY}.{key}": live[key] for key in averages}
                _sharded.load({_MAIN_KEY: targets}, path)
            elif not is_deployed:
                _put(live, _by_key(saved[state.EMA_KEY], pl_module))
            return
        if is_folder:
            manager = self._made()
            assert isinstance(manager, EMAManager)
            emas = dict(manager.named_emas())
            averages = _by_key(emas, pl_module)
            if is_deployed:
                targets = averages | {f"{_RAW_KEY}.{key}": live[key] for key in averages}
            else:
                targets = {f"{_OWN_KEY}.{key}": ema for key, ema in averages.items()}
            _sharded.load({_MAIN_KEY: targets}, path)
            saved = {**saved, state.EMA_KEY: emas}
        elif is_deployed:
            _put(live, checkpoint[_RAW_KEY])
        self._made().load_state_dict(saved)
        self._latest_epoch = own.get(_EPOCH_KEY, -1)

    def _load_engine(self, trainer: Any, pl_module: nn.Module, own: object, is_fit: bool) -> None:
        """The same where an engine has loaded it; in ``fit`` the manager is there already."""
        from fused_ema.hooks import _lightning_engine

        path = trainer.strategy.broadcast(trainer.ckpt_path)
        if not is_fit:
            self._release()
        if own is None:
            if is_fit:
                _warn_of_no_average()
                self._made().reset()
        elif not isinstance(own, Mapping) or _ENGINE_KEY not in own:
            raise ValueError(
                f"{_TITLE}: {path!r} wasn't saved with DeepSpeedStrategy, so it has no masters to "
                "go on with and its average is of other tensors; use the strategy that saved it"
            )
        elif not is_fit:
            _lightning_engine.load_into(pl_module, path)
        else:
            manager = self._made()
            assert not isinstance(manager, EMAManager)
            manager.load(path)
            self._latest_epoch = own.get(_EPOCH_KEY, -1)

    # ---- how it is kept

    def _made(self) -> EMAManager | StrategyEMA:
        if self._manager is None:
            raise RuntimeError(f"{_TITLE}: there is no average yet; it is made when fit starts")
        return self._manager

    def _keep_if_rounded(self, pl_module: nn.Module, weights: Mapping[str, Any]) -> None:
        """For loading them again: precision="64-true" widens the model after it was loaded."""
        live = pl_module.state_dict()
        is_rounded = any(
            isinstance(value, Tensor)
            and isinstance(now := live.get(name), Tensor)
            and value.is_floating_point()
            and value.dtype.itemsize > now.dtype.itemsize
            for name, value in weights.items()
        )
        self._pending_weights = weights if is_rounded else None

    def _load_pending_weights(self, trainer: Any, pl_module: Any) -> None:
        weights, self._pending_weights = self._pending_weights, None
        if weights is not None:
            strict = pl_module.strict_loading
            trainer.strategy.load_model_state_dict({_MAIN_KEY: weights}, strict=strict)

    def _note_step(self, optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        if _steps.was_skipped(optimizer):
            return
        self._has_stepped = True
        self._had_gradients = self._had_gradients or any(
            p.grad is not None for group in optimizer.param_groups for p in group["params"]
        )

    def _remove_handles(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _manager_of(self, pl_module: nn.Module) -> EMAManager | StrategyEMA | None:
        manager = self._manager
        if manager is None:
            return None
        model = manager._model if isinstance(manager, EMAManager) else manager._engine.module
        return manager if model is pl_module else None

    def _swap_in(self, pl_module: Any) -> None:
        manager = self._manager_of(pl_module)
        if manager is not None and self._raw is None and not manager.is_swapped:
            if not isinstance(manager, EMAManager):
                manager.refuse_unless_of(pl_module.trainer.strategy.model)
            self._swapped_here = True  # First: Ctrl-C may come right after the swap.
            manager.swap()

    def _swap_out(self) -> None:
        if self._swapped_here:
            self._swapped_here = False
            if self._manager is not None and self._manager.is_swapped:
                self._manager.swap()

    def _release(self) -> None:
        """Lets go of the average; the model keeps the weights it holds."""
        if isinstance(self._manager, EMAManager):
            self._manager._set_swapped(False)
        elif self._manager is not None:
            self._manager.let_go()
        self._manager = self._raw = None
        self._swapped_here = False


def _still_in(module: nn.Module, ema: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The average as the module holds it; None where it has other parameters by now.

    Buffers may have been computed anew (batch norm's statistics): then they are the module's.
    """
    found = dict(ema)
    members = [m for m in _tracking.read(module).members if m.name in ema]
    averages = [ema[m.name].to(m.tensor.device, m.tensor.dtype) for m in members]
    are_same = [
        _is_same(member.local.detach(), _shards.shard_of(average))
        for member, average in zip(members, averages, strict=True)
    ]
    are_same = _shards.all_of(_TITLE, [member.tensor for member in members], are_same)
    for member, is_same in zip(members, are_same, strict=True):
        if not is_same:
            if not member.is_buffer:
                return None
            found[member.name] = member.tensor.detach()
    return found


def _is_same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())


def _names_by_key(module: nn.Module) -> dict[str, list[str]]:
    """A manager's names for each key of ``state_dict()``: those of wrapped children differ."""
    names: dict[int, list[str]] = {}
    for member in _tracking.read(module).members:
        names.setdefault(id(member.tensor), []).append(member.name)
    live = module.state_dict(keep_vars=True)
    return {key: names[id(tensor)] for key, tensor in live.items() if id(tensor) in names}


def _by_key(named: Mapping[str, Any], module: nn.Module) -> dict[str, Any]:
    """What a manager has by name, by key of ``state_dict()``."""
    # Several names are one tensor; a pattern may have left some of them out.
    found = {
        key: next((name for name in names if name in named), None)
        for key, names in _names_by_key(module).items()
    }
    return {key: named[name] for key, name in found.items() if name is not None}


def _with(
    values: Mapping[str, Any], named: Mapping[str, Tensor], module: nn.Module
) -> dict[str, Any]:
    """The values of a ``state_dict()``, but those of a manager where it has them."""
    of_manager = _by_key(named, module)
    return {key: of_manager.get(key, value) for key, value in values.items()}


def _warn_of_no_average() -> None:
    warnings.warn(
        f"{_TITLE}: the checkpoint has no average; it starts from the checkpoint's weights",
        stacklevel=3,
    )


def _is_sharded(trainer: Any) -> bool:
    return isinstance(trainer.strategy, getattr(_strategies, "ModelParallelStrategy", ()))


def _has_engine(trainer: Any) -> bool:
    return isinstance(trainer.strategy, getattr(_strategies, "DeepSpeedStrategy", ()))


def _gathered(named: Mapping[str, Tensor], is_kept: bool) -> dict[str, Tensor]:
    """Whole tensors on the CPU, where they are kept; every process must call it."""
    found = {}
    for name, tensor in named.items():
        gathered = _shards.whole(tensor)
        if is_kept:
            found[name] = gathered.to("cpu")
    return found


@torch.no_grad()
def _put(live: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Writes whole tensors, of a DTensor this process's part."""
    for key, value in values.items():
        _shards.shard_of(live[key]).copy_(_shards.part_of(live[key], value))


def _hookable(optimizer: object) -> torch.optim.Optimizer | None:
    try:
        return _steps.hookable(_TITLE, optimizer)
    except TypeError:  # Then Lightning's own count of steps is all there is.
        return None
