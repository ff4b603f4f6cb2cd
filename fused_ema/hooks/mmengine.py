"""MMEngine's EMAHook and averaged models, with fused updates; made for mmengine 0.10.

Import it once, ``custom_imports = dict(imports=["fused_ema.hooks.mmengine"])`` in a config, and add
``Fused`` to the hook's name::

    custom_hooks = [dict(type="FusedEMAHook", ema_type="ExponentialMovingAverage", momentum=0.001)]

Arguments, checkpoint files and bits are MMEngine's; files can go from one to the other, either way.
What differs:

- A tied weight is averaged once and exchanged once. With ``update_buffers=True`` MMEngine averages
  it once for each of its names, and an exchange and the one back leave the average in the model.
- Buffers that are kept in sync are matched by name, not by position, so that one that is None on
  one side doesn't shift the others.
- A model without one of the tensors that are averaged, or with one of another shape, is an error
  before anything is written. So are two EMA hooks on one runner: both would be saved under
  ``ema_state_dict``.
- A checkpoint that is written while the model holds the average is laid out as any other, and a
  run that begins after a validation has failed starts from the raw weights.
- Resuming from a checkpoint of another model is an error that changes nothing, and what a
  checkpoint lacks is logged; with ``strict_load=True`` it is an error too.
- A setting out of range is a ValueError.

As there, each ``runner.train()``, ``val()`` and ``test()`` begins with a new average, a copy of the
model: to test the average after training, load its checkpoint.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fused_ema import _checks, _storage, _tracking, schedules
from fused_ema.hooks import required
from fused_ema.hooks._pairs import Follower, Pairs
from fused_ema.manager import EMAManager
from fused_ema.ops import Form
from fused_ema.posthoc import Snapshots

_PACKAGE = "mmengine (0.10)"
_models: Any = required("mmengine.model", "mmengine", _PACKAGE)
_hooks: Any = required("mmengine.hooks", "mmengine", _PACKAGE)
_registry: Any = required("mmengine.registry", "mmengine", _PACKAGE)
_print_log: Any = required("mmengine.logging", "mmengine", _PACKAGE).print_log

_EMAHook: Any = _hooks.EMAHook
_BaseAveragedModel: Any = _models.BaseAveragedModel
_ExponentialMovingAverage: Any = _models.ExponentialMovingAverage
_MomentumAnnealingEMA: Any = _models.MomentumAnnealingEMA
_StochasticWeightAverage: Any = _models.StochasticWeightAverage

__all__ = [
    "FusedBaseAveragedModel",
    "FusedEMAHook",
    "FusedExponentialMovingAverage",
    "FusedMomentumAnnealingEMA",
    "FusedSnapshotHook",
    "FusedStochasticWeightAverage",
]

_PREFIX = "module."


_Places = tuple[str, dict[str, Any], str, dict[str, Any], str]


@dataclass(frozen=True, eq=False)
class _Lists:
    """What the averaged module and the model have at the moment.

    Buffers are given by their places, since a module may assign one anew in every forward: a name,
    and each side's dict and key there.

    Attributes:
        found: The follower, and how often it had found all of the pairs.
        pairs: The averages and what they follow.
        buffers: Persistent buffers that are kept in sync.
        passing: Buffers that aren't persistent.
    """

    found: tuple[Follower, int]
    pairs: Pairs
    buffers: list[_Places]
    passing: list[_Places]


class FusedBaseAveragedModel(_BaseAveragedModel):  # type: ignore[misc]
    """A copy of a model that is moved towards it; as MMEngine's BaseAveragedModel.

    A subclass says how in one of two ways. With :meth:`momentum_at` all tensors are averaged in one
    launch per device and dtype::

        @MODELS.register_module()
        class HalvingEMA(FusedBaseAveragedModel):
            def momentum_at(self, steps):
                return max(0.001, 2.0**-steps)

    With MMEngine's ``avg_func(averaged_param, source_param, steps)`` it is called for each
    floating-point tensor. Of two classes the one that inherits from the other counts, and in one
    class ``avg_func``.

    An update doesn't wait for the device: the number of steps is known to the host too, and read
    from the buffer ``steps`` only after that was loaded, moved or written by somebody else.

    Args:
        model: Copied as it is now; the copy requires no gradients.
        interval: Steps from average to average, a whole number from 1. The first step copies.
        device: Where the copy is kept; None for the model's own devices.
        update_buffers: Average floating-point persistent buffers too, and let integer ones be.
            Otherwise every buffer is copied in every step.
        **options: For the next class.

    Raises:
        ValueError: An interval out of range.

    Attributes:
        form: The arithmetic of :func:`fused_ema.update_` that :meth:`momentum_at` is for.
    """

    form: Form = "lerp"

    module: nn.Module
    steps: Tensor
    interval: int
    update_buffers: bool

    # Of the class, so that copies and pickles, which leave them out, find them here.
    _follower: Follower | None = None
    _lists: _Lists | None = None
    _known: tuple[Tensor, int, int] | None = None

    def __init__(
        self,
        model: nn.Module,
        interval: int = 1,
        device: torch.device | str | None = None,
        update_buffers: bool = False,
        **options: Any,
    ) -> None:
        interval = _checks.count(type(self).__name__, "interval", interval, least=1)
        super().__init__(
            model=model, interval=interval, device=device, update_buffers=update_buffers, **options
        )
        self._known = self.steps, self.steps._version, 0

    def momentum_at(self, steps: int) -> float | None:
        """The weight of the new value.

        Args:
            steps: How many there were before this one, from 1; a multiple of the interval.

        Returns:
            A momentum in [0, 1], or None for ``avg_func`` to be called tensor by tensor.
        """
        return None

    def update_parameters(self, model: nn.Module) -> None:
        """One step: copies the model in the first, averages in each that the interval allows.

        Args:
            model: The one that this is a copy of, or its data parallel wrapper.

        Raises:
            ValueError: It lacks a tensor that is averaged, or one has another shape; a momentum
                out of range.
            TypeError: Dtypes that can't be averaged.

            Nothing has changed when one of them is raised.
        """
        steps = self._num_steps()
        lists = self._find(model)
        buffers = [] if self.update_buffers else self._buffers_of(lists, with_passing=True)
        if steps == 0:
            lists.pairs.copy()
        elif steps % self.interval == 0:
            self._average(lists, steps)
        _storage.copy([a for a, _ in buffers], [b for _, b in buffers])
        self.steps += 1
        self._known = self.steps, self.steps._version, steps + 1

    def follow(self, model: nn.Module) -> None:
        """Copies the model's parameters and persistent buffers; counts no step.

        Args:
            model: As for :meth:`update_parameters`.

        Raises:
            ValueError: As :meth:`update_parameters`.
        """
        lists = self._find(model)
        buffers = [] if self.update_buffers else self._buffers_of(lists, with_passing=False)
        lists.pairs.copy()
        _storage.copy([a for a, _ in buffers], [b for _, b in buffers])

    def swap(self, model: nn.Module) -> None:
        """Exchanges the averages and the model's weights; a second call brings them back.

        With ``update_buffers`` all buffers too, integer ones and those that aren't persistent.

        Args:
            model: As for :meth:`update_parameters`.

        Raises:
            ValueError: As :meth:`update_parameters`.
            RuntimeError: The model is of another dtype than the averages.
        """
        lists = self._find(model)
        live = self._members_of(model)
        both = [(a, live[name], name) for name, a in self._members_of(self.module).items()]
        if self.update_buffers:
            passing = [(a[key], b[other], name) for name, a, key, b, other in lists.passing]
            both += [(a, b, name) for a, b, name in passing if a is not None and b is not None]
        once = list({id(a): (a, b, name) for a, b, name in both}.values())
        averages, weights = [a for a, _, _ in once], [b for _, b, _ in once]
        is_away = any(a.device != b.device for a, b, _ in once)
        if is_away and all(a.dtype == b.dtype for a, b, _ in once):
            # Nothing is rounded, so the raw weights can wait in a copy.
            raw = [b.detach().clone() for b in weights]
            _storage.copy(weights, averages)
            _storage.copy(averages, raw)
        elif self.update_buffers:
            Pairs(averages, weights, [name for _, _, name in once]).swap()
        else:
            lists.pairs.swap()

    def _average(self, lists: _Lists, steps: int) -> None:
        momentum = None if self._has_own_avg_func() else self.momentum_at(steps)
        if momentum is not None:
            lists.pairs.update(momentum, self.form)
            return
        for averaged, live in lists.pairs.floats:
            self.avg_func(averaged.data, live.data.to(averaged.device), self.steps)

    def _has_own_avg_func(self) -> bool:
        if "avg_func" in vars(self):
            return True
        for cls in type(self).__mro__:
            if "avg_func" in vars(cls) or "momentum_at" in vars(cls):
                return "avg_func" in vars(cls)
        return False

    def _num_steps(self) -> int:
        steps, known = self.steps, self._known
        if known is None or known[0] is not steps or known[1] != steps._version:
            known = self._known = steps, steps._version, int(steps.item())
        return known[2]

    def _members_of(self, module: nn.Module) -> dict[str, Tensor]:
        """Tensors by name: of the averaged module, in its order."""
        members = {member.name: member for member in _tracking.read(module).members}
        own = members
        if module is not self.module:
            own = {member.name: member for member in _tracking.read(self.module).members}
        names = [name for name in own if self.update_buffers or not own[name].is_buffer]
        if missing := [name for name in names if name not in members]:
            raise ValueError(
                f"fused_ema.{type(self).__name__}: {len(missing)} of {len(names)} averaged tensors "
                f"aren't in the model ({_tracking.shown(missing)}); pass the model that this is an "
                "average of"
            )
        return {name: members[name].tensor for name in names}

    def _find(self, model: nn.Module) -> _Lists:
        if _models.is_model_wrapper(model):
            model = model.module  # type: ignore[assignment]
        if self._follower is None or self._follower.is_of_another(self.module):
            this = weakref.ref(self)  # A method would hold on to its object in a cycle.

            def tensors_of(module: nn.Module) -> Sequence[tuple[str, Tensor]]:
                averaged = this()
                assert averaged is not None  # It owns the follower.
                return list(averaged._members_of(module).items())

            self._follower = Follower(self.module, tensors_of)
        pairs = self._follower.pairs(model)
        found = self._follower, self._follower.num_found
        if self._lists is None or self._lists.found != found:
            self._lists = self._listed(found, pairs, model)
        elif self._lists.pairs is not pairs:
            self._lists = replace(self._lists, pairs=pairs)
        return self._lists

    def _listed(self, found: tuple[Follower, int], pairs: Pairs, model: nn.Module) -> _Lists:
        places_of = [
            {id(t): (m._buffers, key) for m in side.modules() for key, t in m._buffers.items()}
            for side in (self.module, model)
        ]
        live = {m.name: m.tensor for m in _tracking.read(model).members if m.is_buffer}
        buffers = {
            id(tensor): (name, *places_of[0][id(tensor)], *places_of[1][id(live[name])])
            for name, tensor in (
                (m.name, m.tensor) for m in _tracking.read(self.module).members if m.is_buffer
            )
            if name in live
        }
        modules = {_own_name(name): module for name, module in model.named_modules()}
        passing = [
            (f"{name}.{key}".lstrip("."), module._buffers, key, modules[name]._buffers, key)
            for name, module in ((_own_name(n), m) for n, m in self.module.named_modules())
            for key in module._buffers
            if key in module._non_persistent_buffers_set
            and name in modules
            and key in modules[name]._buffers
        ]
        return _Lists(found, pairs, list(buffers.values()), passing)

    def _buffers_of(self, lists: _Lists, with_passing: bool) -> list[tuple[Tensor, Tensor]]:
        """Buffers to copy, each once."""
        places = lists.buffers + (lists.passing if with_passing else [])
        both = [(name, a[key], b[other]) for name, a, key, b, other in places]
        found = [(name, a, b) for name, a, b in both if a is not None and b is not None]
        for name, a, b in found:
            if a.shape != b.shape:
                raise ValueError(
                    f"fused_ema.{type(self).__name__}: buffer '{name}' has shape {list(b.shape)} "
                    f"in the model but {list(a.shape)} in its average; keep its shape, or make the "
                    "averaged model after it has got its last one"
                )
        return list({id(a): (a, b) for _, a, b in found}.values())

    def __getstate__(self) -> dict[str, Any]:
        # A copy has other memory than what these hold.
        return {k: v for k, v in vars(self).items() if k not in ("_follower", "_lists", "_known")}


@_registry.MODELS.register_module()
class FusedExponentialMovingAverage(FusedBaseAveragedModel, _ExponentialMovingAverage):  # type: ignore[misc]
    """MMEngine's ExponentialMovingAverage: ``average = (1 - m) * average + m * weight``.

    The bits are those of its ``average.lerp_(weight, m)``.

    Args:
        model: As for :class:`FusedBaseAveragedModel`.
        momentum: m, the weight of the new value, between 0 and 1, both excluded. It may be changed
            between steps: ``averaged.momentum = 0.01``.
        interval: As for :class:`FusedBaseAveragedModel`. The momentum isn't changed for it.
        device: As for :class:`FusedBaseAveragedModel`.
        update_buffers: As for :class:`FusedBaseAveragedModel`.
        **options: For the next class; this one knows no more.

    Raises:
        ValueError: A momentum or interval out of range.
        TypeError: A momentum that is no number, or an unknown option.
    """

    momentum: float

    def __init__(
        self,
        model: nn.Module,
        momentum: float = 0.0002,
        interval: int = 1,
        device: torch.device | str | None = None,
        update_buffers: bool = False,
        **options: Any,
    ) -> None:
        _checks.momentum(type(self).__name__, momentum)
        super().__init__(model, interval, device, update_buffers, momentum=momentum, **options)

    def momentum_at(self, steps: int) -> float | None:
        """The momentum."""
        return self.momentum


@_registry.MODELS.register_module()
class FusedMomentumAnnealingEMA(FusedExponentialMovingAverage, _MomentumAnnealingEMA):  # type: ignore[misc]
    """MMEngine's MomentumAnnealingEMA: m is ``max(momentum, gamma / (gamma + steps))``.

    The bits are those of its ``average.lerp_(weight, m)``.

    Args:
        model: As for :class:`FusedBaseAveragedModel`.
        momentum: What m comes down to, between 0 and 1, both excluded.
        gamma: Steps until m has come down to a half, above 0.
        interval: As for :class:`FusedBaseAveragedModel`. m counts every step, averaged or not.
        device: As for :class:`FusedBaseAveragedModel`.
        update_buffers: As for :class:`FusedBaseAveragedModel`.
        **options: For the next class; this one knows no more.

    Raises:
        ValueError: A momentum, gamma or interval out of range.
        TypeError: A momentum or gamma that is no number, or an unknown option.
    """

    gamma: float

    def __init__(
        self,
        model: nn.Module,
        momentum: float = 0.0002,
        gamma: float = 100,
        interval: int = 1,
        device: torch.device | str | None = None,
        update_buffers: bool = False,
        **options: Any,
    ) -> None:
        _checks.positive(type(self).__name__, "gamma", gamma)
        super().__init__(model, momentum, interval, device, update_buffers, gamma=gamma, **options)

    def momentum_at(self, steps: int) -> float | None:
        """``max(momentum, gamma / (gamma + steps))``."""
        return max(self.momentum, self.gamma / (self.gamma + steps))


@_registry.MODELS.register_module()
class FusedStochasticWeightAverage(FusedBaseAveragedModel, _StochasticWeightAverage):  # type: ignore[misc]
    """MMEngine's StochasticWeightAverage: m is ``1 / (steps // interval + 1)``, a plain mean.

    The bits are those of its ``average.add_(weight - average, alpha=m)``. Where the kernels' lerp
    rounds otherwise that is what runs, tensor by tensor: in the first average of a run, whose m is
    a half, and always in a model with bfloat16 or float16 weights, where the difference and m are
    rounded to 16 bits. A subclass whose ``momentum_at`` leaves that out is fused there too.

    Args:
        model: As for :class:`FusedBaseAveragedModel`.
        interval: As for :class:`FusedBaseAveragedModel`.
        device: As for :class:`FusedBaseAveragedModel`.
        update_buffers: As for :class:`FusedBaseAveragedModel`.
        **options: For the next class; this one knows no more.

    Raises:
        ValueError: An interval out of range.
        TypeError: An unknown option.
    """

    avg_parameters: dict[str, Tensor]

    def momentum_at(self, steps: int) -> float | None:
        """``1 / (steps // interval + 1)``, or None where lerp has other bits."""
        momentum = 1 / (steps // self.interval + 1)
        narrow = (torch.bfloat16, torch.float16)
        if momentum >= 0.5 or any(t.dtype in narrow for t in self.avg_parameters.values()):
            return None
        return momentum


_FUSED: dict[Any, type[FusedBaseAveragedModel]] = {
    _ExponentialMovingAverage: FusedExponentialMovingAverage,
    _MomentumAnnealingEMA: FusedMomentumAnnealingEMA,
    _StochasticWeightAverage: FusedStochasticWeightAverage,
}


@_registry.HOOKS.register_module()
class FusedEMAHook(_EMAHook):  # type: ignore[misc]
    """MMEngine's EMAHook: averages after each training iteration, validates and tests the average.

    A checkpoint holds the average under ``state_dict``, and under ``ema_state_dict`` the raw
    weights and the number of steps, so that a run resumes exactly.

    Args:
        ema_type: The averaged model's name in the registry MODELS, or its class. MMEngine's own
            ``"ExponentialMovingAverage"``, ``"MomentumAnnealingEMA"`` and
            ``"StochasticWeightAverage"`` stand for the fused ones here. Another one is used as it
            is, and a warning says that it isn't fused.
        strict_load: Whether names missing in a checkpoint, or unknown ones, are an error.
        begin_iter: Iterations, counted from 1, before which the average follows by copy.
        begin_epoch: Epochs instead.
        **kwargs: For the averaged model: ``momentum``, ``interval``, ``update_buffers``, ...

    Raises:
        ValueError: ``begin_iter`` or ``begin_epoch`` below 0 or no whole number, or both set.
    """

    ema_model: Any
    src_model: nn.Module

    def __init__(
        self,
        ema_type: str | type[nn.Module] = "ExponentialMovingAverage",
        strict_load: bool = False,
        begin_iter: int = 0,
        begin_epoch: int = 0,
        **kwargs: Any,
    ) -> None:
        begin_iter = _checks.count("FusedEMAHook", "begin_iter", begin_iter, least=0)
        begin_epoch = _checks.count("FusedEMAHook", "begin_epoch", begin_epoch, least=0)
        if begin_iter and begin_epoch:
            raise ValueError(
                f"fused_ema.FusedEMAHook: both begin_iter={begin_iter} and begin_epoch="
                f"{begin_epoch} are set; choose one"
            )
        super().__init__(ema_type, strict_load, begin_iter, begin_epoch, **kwargs)
        self._is_swapped = False

    def before_run(self, runner: Any) -> None:
        """Makes the averaged model.

        Args:
            runner: MMEngine's Runner.

        Raises:
            RuntimeError: The runner has another EMA hook.
            KeyError: An unknown ``ema_type``.
            ValueError: As the averaged model.
            TypeError: As the averaged model; an unknown option, or no averaged model.
        """
        self._swap_back()
        hooks = [type(hook).__name__ for hook in runner.hooks if isinstance(hook, _EMAHook)]
        if len(hooks) > 1:
            raise RuntimeError(
                f"fused_ema.FusedEMAHook: the runner has {len(hooks)} EMA hooks "
                f"({', '.join(hooks)}), and a checkpoint has room for one, under 'ema_state_dict'; "
                "keep one of them in custom_hooks"
            )
        self.ema_cfg["type"] = self._class_of(self.ema_cfg["type"])
        super().before_run(runner)

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Updates the average; before ``begin_iter`` or ``begin_epoch`` copies the weights.

        Args:
            runner: MMEngine's Runner.
            batch_idx: Unused.
            data_batch: Unused.
            outputs: Unused.

        Raises:
            RuntimeError: The model holds the average.
            ValueError: As ``update_parameters`` of the averaged model.
        """
        if self._is_swapped:
            raise RuntimeError(
                "fused_ema.FusedEMAHook.after_train_iter: the model holds the average, since a "
                "validation hasn't ended; call the hook's after_val_epoch(runner) first"
            )
        if self._is_fused() and not self._ema_started(runner):
            self.ema_model.follow(self.src_model)
        else:
            super().after_train_iter(runner, batch_idx, data_batch, outputs)

    def before_val_epoch(self, runner: Any) -> None:
        """Puts the average into the model.

        Args:
            runner: MMEngine's Runner.
        """
        self._swap_in()

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Puts the raw weights back.

        Args:
            runner: MMEngine's Runner.
            metrics: Unused.
        """
        self._swap_back()

    def before_test_epoch(self, runner: Any) -> None:
        """Puts the average into the model.

        Args:
            runner: MMEngine's Runner.
        """
        self._swap_in()

    def after_test_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Puts the raw weights back.

        Args:
            runner: MMEngine's Runner.
            metrics: Unused.
        """
        self._swap_back()

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Adds ``ema_state_dict``, and puts the average under ``state_dict``.

        Args:
            runner: MMEngine's Runner.
            checkpoint: What will be saved.
        """
        if self._is_swapped:  # The tensors are where they belong already.
            checkpoint["ema_state_dict"] = self.ema_model.state_dict()
        else:
            super().before_save_checkpoint(runner, checkpoint)

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Takes over the average of a checkpoint.

        Args:
            runner: MMEngine's Runner.
            checkpoint: What was loaded. Where the run isn't resumed, or it has no average, its
                ``state_dict`` is what the average begins with.

        Raises:
            ValueError: The run is resumed and the average is that of another model. Nothing has
                changed.
        """
        if runner._resume and "ema_state_dict" in checkpoint:
            self._check(checkpoint)
        super().after_load_checkpoint(runner, checkpoint)

    def _is_fused(self) -> bool:
        return isinstance(self.ema_model, FusedBaseAveragedModel)

    def _swap_in(self) -> None:
        if not self._is_swapped:
            self._swap_ema_parameters()
            self._is_swapped = True

    def _swap_back(self) -> None:
        if self._is_swapped:
            self._swap_ema_parameters()
            self._is_swapped = False

    def _swap_ema_parameters(self) -> None:
        if self._is_fused():
            self.ema_model.swap(self.src_model)
        else:
            super()._swap_ema_parameters()

    def _class_of(self, ema_type: Any) -> Any:
        found = ema_type
        if isinstance(ema_type, str):
            with _registry.MODELS.switch_scope_and_registry(None) as models:
                found = models.get(ema_type)
            if found is None:
                raise KeyError(
                    f"fused_ema.FusedEMAHook: ema_type is '{ema_type}', which isn't in the "
                    "registry MODELS; import the module that registers it, or choose one of "
                    + ", ".join(f"'{cls.__name__}'" for cls in _FUSED)
                )
        found = _FUSED.get(found, found)
        if not (isinstance(found, type) and issubclass(found, _BaseAveragedModel)):
            raise TypeError(
                f"fused_ema.FusedEMAHook: ema_type is {ema_type!r}, which is no subclass of "
                "mmengine.model.BaseAveragedModel; choose one that is"
            )
        if not issubclass(found, FusedBaseAveragedModel):
            _print_log(
                f"fused_ema.FusedEMAHook: {found.__name__} averages tensor by tensor; to fuse it, "
                "make it a fused_ema.hooks.mmengine.FusedBaseAveragedModel with momentum_at()",
                logger="current",
                level=logging.WARNING,
            )
        return found

    def _check(self, checkpoint: dict[str, Any]) -> None:
        """Raises where averages and weights of a checkpoint don't fit the model or each other."""
        saved, weights = checkpoint["ema_state_dict"], checkpoint["state_dict"]
        own = self.ema_model.state_dict()
        problems = [
            f"'{name.removeprefix(_PREFIX)}' is under 'ema_state_dict' but not under 'state_dict'"
            for name in saved
            if name.startswith(_PREFIX) and name.removeprefix(_PREFIX) not in weights
        ]
        for name in own:
            if name not in saved:
                continue
            here, there = (getattr(d[name], "shape", None) for d in (own, saved))
            if here != there:
                problems.append(
                    f"'{name.removeprefix(_PREFIX)}' has shape {_listed(there)} in the checkpoint "
                    f"but {_listed(here)} in the model"
                )
        missing = [name for name in own if name not in saved]
        unknown = [name for name in saved if name not in own]
        differences = [f"missing in the checkpoint: {_tracking.shown(missing)}"] if missing else []
        if unknown:
            differences.append(f"not in the model: {_tracking.shown(unknown)}")
        # Without the number of steps the first update would copy the weights over the averages.
        is_other = "steps" in missing or not any(n in saved for n in own if n != "steps")
        if self.strict_load or is_other:
            problems += differences
        if problems:
            raise ValueError(
                "fused_ema.FusedEMAHook: the average in the checkpoint isn't one of this model; "
                "nothing was changed. Resume with the model and the ema_type it was saved with, or "
                "load only its weights (load_from without resume):\n  "
                + "\n  ".join(_checks.listed(problems))
            )
        if differences:
            _print_log(
                "fused_ema.FusedEMAHook: the average in the checkpoint and this model have "
                "different names:\n  " + "\n  ".join(differences),
                logger="current",
                level=logging.WARNING,
            )


@_registry.HOOKS.register_module()
class FusedSnapshotHook(_hooks.Hook):  # type: ignore[misc]
    """Keeps averages of its own, and saves them for :func:`fused_ema.posthoc.reconstruct`.

    Beside an EMA hook or without one; it never writes to the model::

        custom_hooks = [dict(type="FusedSnapshotHook", folder="snapshots", every=1000)]

    A checkpoint has the averages under ``fused_ema_snapshots``; a run that is resumed from one
    without them is an error.

    Args:
        folder: As of :class:`fused_ema.posthoc.Snapshots`.
        every: The same.
        std: The widths of the averages, power functions: :func:`fused_ema.schedules.power`.
        interval: Iterations from update to update.
        **options: For Snapshots.

    Raises:
        TypeError: As Snapshots.
        ValueError: As Snapshots and ``schedules.power``; when training starts.
    """

    priority = "NORMAL"
    _KEY = "fused_ema_snapshots"

    def __init__(
        self,
        folder: str,
        every: int | None = None,
        std: Sequence[float] = (0.05, 0.10),
        interval: int = 1,
        **options: Any,
    ) -> None:
        self._momenta = {
            f"power-{one:g}".replace(".", "_"): schedules.power(one, interval) for one in std
        }
        self._interval = interval
        self._options = {"folder": folder, "every": every, **options}
        self._manager: EMAManager | None = None
        self._snapshots: Snapshots | None = None
        self._pending: Mapping[str, Any] | None = None

    def before_train(self, runner: Any) -> None:
        """Makes the averages of the model, whose weights are loaded by now.

        Args:
            runner: MMEngine's Runner.

        Raises:
            ValueError: The checkpoint that is resumed has no such averages, or of another model.
        """
        self._manager = EMAManager(runner.model, self._momenta, self._interval, buffers="average")
        self._snapshots = Snapshots(self._manager, **self._options)
        pending, self._pending = self._pending, None
        if runner.iter > 0:
            if pending is None:
                raise ValueError(
                    f"fused_ema.FusedSnapshotHook: training resumes at iteration {runner.iter} "
                    "from a checkpoint that has no averages for snapshots; resume one that was "
                    "saved with this hook"
                )
            self._manager.load_state_dict(pending["manager"])
            self._snapshots.load_state_dict(pending["snapshots"])

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Updates the averages, and saves them where it is time.

        Args:
            runner: MMEngine's Runner.
            batch_idx: Unused.
            data_batch: Unused.
            outputs: Unused.
        """
        if self._manager is not None:
            self._manager.update(runner.iter)

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Adds the averages.

        Args:
            runner: MMEngine's Runner.
            checkpoint: What is saved.
        """
        if self._manager is not None and self._snapshots is not None:
            checkpoint[self._KEY] = {
                "manager": self._manager.state_dict(),
                "snapshots": self._snapshots.state_dict(),
            }

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Keeps them for the training that starts.

        Args:
            runner: MMEngine's Runner.
            checkpoint: What was loaded.
        """
        self._pending = checkpoint.get(self._KEY)


def _own_name(name: str) -> str:
    """A module's name without what torch.compile and the like put into it."""
    return ".".join(part for part in name.split(".") if part not in _tracking._TRANSPARENT)


def _listed(shape: Any) -> Any:
    return shape if shape is None else list(shape)
