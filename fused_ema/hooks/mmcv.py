"""The EMA hooks of MMDetection 2.x for mmcv 1.x runners, in its layout and its bits.

In a config::

    custom_hooks = [
        dict(type="FusedExpMomentumEMAHook", total_iter=2000, momentum=0.0002, priority=49)
    ]

after ``import fused_ema.hooks.mmcv``; in a config
``custom_imports = dict(imports=["fused_ema.hooks.mmcv"])`` does that. Where configs say
``type="ExpMomentumEMAHook"`` already, :func:`replace_mmdet_hooks` puts these hooks in the place of
MMDetection's.

The average of ``a.b.c`` is a buffer ``ema_a_b_c`` of the model. With an EpochBasedRunner the two
are exchanged after each training epoch and before the next one, so that a checkpoint saved at the
end of an epoch has the average in its main keys and the raw weights under ``ema_*``; with an
IterBasedRunner they never are. Checkpoints are those of MMDetection's hooks, both ways. As there, a
checkpoint saved inside of an epoch (``by_epoch=False``) doesn't fit an EpochBasedRunner: the first
swap after resuming would put the average into the model.

Where this differs from MMDetection's hooks:

- Tied weights are averaged once and swapped right; there a swap and a swap back leave the average
  in the model. Each name keeps its buffer.
- A buffer that the model assigns anew is followed, and a parameter that is replaced is an error;
  there both are lost silently.
- Two names that come to one buffer, a second hook on a model and a checkpoint that lacks the
  averages are errors.
- A second ``runner.run()`` with the same hook goes on with the average, instead of starting anew.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_ema import _checks, _storage, _tracking, schedules
from fused_ema._slots import Slot, is_alike
from fused_ema.hooks import required
from fused_ema.hooks._pairs import Pairs

_runner = required("mmcv.runner", "mmcv", "mmcv-full 1.x (or mmcv 1.x)")
_parallel = required("mmcv.parallel", "mmcv", "mmcv-full 1.x (or mmcv 1.x)")

if TYPE_CHECKING:
    _Hook = object
else:
    _Hook = _runner.Hook

__all__ = [
    "BaseEMAHook",
    "ExpMomentumEMAHook",
    "LinearMomentumEMAHook",
    "replace_mmdet_hooks",
]

_WHERE = "hooks.mmcv.EMAHook"
_TITLE = f"fused_ema.{_WHERE}"


class _Tracked(NamedTuple):
    """What a model has at the moment.

    Attributes:
        tree: Tells whether the model still has it.
        tensors: Name to tensor.
        emas: Name to average.
        pairs: Each tensor once, with the average of the first of its names.
        mirrors: The averages of the other names of tied tensors.
        mirrored: What they show.
        aliases: Pairs of tensors that are one memory, which one of them may leave.
        places: Where a tensor stands in the pairs, by name; without the tied ones.
    """

    tree: _tracking.Tree
    tensors: dict[str, Tensor]
    emas: dict[str, Tensor]
    pairs: Pairs
    mirrors: list[Tensor]
    mirrored: list[Tensor]
    aliases: list[tuple[Tensor, Tensor]]
    places: dict[str, int]

    def are_tied(self) -> bool:
        """Whether what was one memory still is."""
        return all(a.data_ptr() == b.data_ptr() for a, b in self.aliases)

    def mirror(self) -> None:
        """Gives the averages of tied tensors the same values under each name."""
        if self.mirrors:
            _storage.copy(self.mirrors, self.mirrored)


class BaseEMAHook(_Hook):
    """Keeps the average of a model's weights in buffers of the model, with a constant momentum.

    ``ema = (1 - m) * ema + m * param`` at every 0-based iteration i with ``(i + 1) % interval ==
    0``, bit for bit ``ema.mul_(1 - m).add_(param, alpha=m)``; integer tensors keep their first
    clone, and are swapped. Source: the BaseEMAHook of OpenMMLab's MMDetection 2.x. Its priority
    should be below 50, so that it runs before the hooks that save and evaluate.

    In configs it is ``type="FusedEMAHook"``.

    Args:
        momentum: The weight of the new value, between 0 and 1, both excluded.
        interval: Iterations from update to update, a whole number from 1. The momentum is used as
            it is.
        skip_buffers: Average parameters only; else the persistent buffers of the model as well.
        resume_from: Path or address of a checkpoint, which is loaded when the averages are there.
            It is read twice, first to see whether it fits. The runner's own ``resume_from`` alone
            would lose the averages, and take them for the raw weights.
        momentum_fun: The momentum as a function of the runner's 0-based iteration, in [0, 1],
            instead of the constant: one of :mod:`fused_ema.schedules` or your own.

    Attributes:
        param_ema_buffer: From ``before_run`` on, the name of each tensor's buffer.

    Raises:
        TypeError: A setting of another type, an unknown one.
        ValueError: A momentum or an interval outside of its range.
    """

    def __init__(
        self,
        momentum: float = 0.0002,
        interval: int = 1,
        skip_buffers: bool = False,
        resume_from: str | os.PathLike[str] | None = None,
        momentum_fun: schedules.Schedule | None = None,
    ) -> None:
        self.momentum = _checks.momentum(_WHERE, momentum)
        if momentum_fun is not None and not callable(momentum_fun):
            raise TypeError(
                f"{_TITLE}: momentum_fun is a {type(momentum_fun).__name__}; pass a function of "
                "the iteration, such as fused_ema.schedules.exponential()"
            )
        self.interval = _checks.count(_WHERE, "interval", interval, least=1)
        self.skip_buffers = skip_buffers
        self.checkpoint = None if resume_from is None else os.fspath(resume_from)
        self.momentum_fun = momentum_fun
        self.param_ema_buffer: dict[str, str] = {}
        self._model: nn.Module | None = None
        self._tracked: _Tracked
        self._is_in_epoch = False
        self._has_begun = False

    def get_momentum(self, runner: Any) -> float:
        """The momentum at the runner's iteration."""
        if self.momentum_fun is None:
            return self.momentum
        return self.momentum_fun(runner.iter)

    # ---- events of the runner

    def before_run(self, runner: Any) -> None:
        """Registers the averages, clones of the model's tensors, and resumes.

        Raises:
            TypeError: A tensor whose dtype can't be averaged; a sparse one.
            ValueError: Two names would share a buffer, the model has something under a buffer's
                name already (another hook's average, for one), tensors overlap in part, or the
                checkpoint doesn't hold this model's averages.
            RuntimeError: The checkpoint can't be read, or the last run stopped inside an epoch.

            The model has no new buffers when an error is raised.
        """
        model = runner.model
        if _parallel.is_module_wrapper(model):
            model = model.module
        if model is self._model:
            if self._is_in_epoch:
                raise RuntimeError(
                    f"{_TITLE}.before_run: the last run stopped inside an epoch, so it isn't known "
                    "what the model holds; make a new model, runner and hook, and resume from a "
                    "checkpoint with resume_from="
                )
            return
        _tracking.read(model)  # Raises for a lazy module, in clearer words than a clone would.
        tensors = self._tensors_of(model)
        buffers = _buffer_names(tensors)
        for name, buffer in buffers.items():
            if hasattr(model, buffer):
                raise ValueError(
                    f"{_TITLE}.before_run: the average of '{name}' would be the buffer '{buffer}', "
                    f"but the model has a '{buffer}' already, perhaps of another EMA hook or of an "
                    "earlier run; use one hook for a model, and a new model for a new run"
                )
        with torch.inference_mode(False):
            emas = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        _pairs_of(tensors, emas)  # So that what can't be averaged is an error before any change.
        if self.checkpoint is not None:
            _check_checkpoint(self.checkpoint, buffers, tensors)
        elif runner.iter > 0:
            runner.logger.warning(
                f"{_TITLE}: the runner was resumed at iteration {runner.iter}, but this hook has "
                "no resume_from: it takes the weights that the model holds, which in a file from "
                "the end of an epoch are the average, for the raw ones. Give the hook the same "
                "resume_from"
            )
        try:
            for name, buffer in buffers.items():
                model.register_buffer(buffer, emas[name])
            if self.checkpoint is not None:
                _resume(runner, self.checkpoint)
            # Read anew, since resuming runs code of others.
            tracked = _track(model, self._tensors_of(model), buffers)
        except BaseException:
            for buffer in buffers.values():
                model._buffers.pop(buffer, None)
            raise
        self._model, self.param_ema_buffer, self._tracked = model, buffers, tracked

    def after_train_iter(self, runner: Any) -> None:
        """Updates the averages, where the interval says so.

        Raises:
            RuntimeError: The model's parameters were replaced, removed or added.
            TypeError: A param was converted to a dtype that doesn't fit.
            ValueError: A momentum outside of [0, 1]; a param was resized, or moved to another
                device than its average.

            Nothing has changed when an error is raised.
        """
        if (runner.iter + 1) % self.interval != 0:
            return
        is_current = self._tracked.tree.is_current_so_far()
        if not (is_current and self._tracked.are_tied()):
            self._follow("after_train_iter", so_far=not is_current)
        self._tracked.pairs.update(self.get_momentum(runner), "mul_add")
        self._tracked.mirror()
        self._has_begun = True

    def after_train_epoch(self, runner: Any) -> None:
        """Puts the averages into the model, for the hooks that evaluate and save.

        Raises:
            RuntimeError: As :meth:`after_train_iter`.
            ValueError: As :meth:`after_train_iter`.
        """
        self._swap_ema_parameters()
        self._is_in_epoch = False

    def before_train_epoch(self, runner: Any) -> None:
        """Puts the raw weights back into the model.

        Raises:
            RuntimeError: As :meth:`after_train_iter`.
            ValueError: As :meth:`after_train_iter`.
        """
        self._swap_ema_parameters()
        self._is_in_epoch = True

    def _swap_ema_parameters(self) -> None:
        # Under the name that MMDetection's hook has for it: hooks derived from that one call it.
        if not (self._tracked.tree.is_current() and self._tracked.are_tied()):
            self._follow("swap")
        try:
            self._tracked.pairs.swap()
        finally:
            self._tracked.mirror()
        self._has_begun = True

    # ---- what is tracked

    def _tensors_of(self, model: nn.Module) -> dict[str, Tensor]:
        if self.skip_buffers:
            return dict(model.named_parameters())
        # Whatever isn't a tensor is the extra state of a module.
        state = model.state_dict(keep_vars=True)
        return {name: value for name, value in state.items() if isinstance(value, Tensor)}

    def _follow_buffers(self, so_far: bool) -> bool:
        """Takes over buffers that were assigned anew; False where that isn't all."""
        tracked = self._tracked
        anew = tracked.tree.buffers_assigned_anew(so_far)
        if anew is None or not tracked.are_tied():
            return False
        averages = set(self.param_ema_buffer.values())
        known = {id(tensor) for tensor in tracked.tensors.values()}
        for name, now in anew.items():
            if name in averages or id(now) in known:
                return False
            known.add(id(now))
            if name in tracked.tensors:
                was = tracked.tensors[name]
                if name not in tracked.places or not is_alike(was, now):
                    return False
        places = {
            tracked.places[name]: (None, anew[name]) for name in anew if name in tracked.tensors
        }
        tracked.tensors.update({name: anew[name] for name in anew if name in tracked.tensors})
        self._tracked = tracked._replace(pairs=tracked.pairs.with_others(places))
        tracked.tree.take_over_buffers()
        return True

    def _follow(self, op: str, so_far: bool = False) -> None:
        """Takes over buffers that were assigned anew, and tensors that are no longer tied.

        Args:
            op: For the error.
            so_far: As is_current_so_far(), which has just been asked, knows it.

        Raises:
            RuntimeError: Anything else has changed.
        """
        if self._follow_buffers(so_far):
            return
        assert self._model is not None
        was, now = self._tracked.tensors, self._tensors_of(self._model)
        changes = [f"'{name}' is gone" for name in was if name not in now]
        changes += [
            f"'{name}' was replaced"
            for name in was
            if name in now and not _is_continued(was[name], now[name])
        ]
        known = {id(now[name]) for name in was if name in now}
        changes += [
            f"'{name}' is new"
            for name, parameter in self._model.named_parameters()
            if id(parameter) not in known and name not in was
        ]
        for name, buffer in self.param_ema_buffer.items():
            ema, given = self._model._buffers.get(buffer), self._tracked.emas[name]
            # A model that is converted has other buffers; but not so early, that is another hook.
            is_continued = self._has_begun and ema is not None and _is_continued(given, ema)
            if ema is not given and not is_continued:
                changes.append(
                    f"'{buffer}', the average of '{name}', was replaced or is gone (has the model "
                    "a second EMA hook?)"
                )
        if changes:
            raise RuntimeError(
                f"{_TITLE}.{op}: the model has changed since the run began; change it before the "
                "run, or undo the change:\n  " + "\n  ".join(_checks.listed(changes))
            )
        self._tracked = _track(self._model, {n: now[n] for n in was}, self.param_ema_buffer)


class ExpMomentumEMAHook(BaseEMAHook):
    """The same with ``m(i) = (1 - M) * exp(-(1 + i) / total_iter) + M``, M being ``momentum``.

    Source: the hook of this name in MMDetection 2.x; :func:`fused_ema.schedules.exponential`. In
    configs it is ``type="FusedExpMomentumEMAHook"``.

    Args:
        total_iter: Iterations until the distance to M has shrunk by e. More than 0.
        **kwargs: Those of :class:`BaseEMAHook`, but for ``momentum_fun``.

    Raises:
        TypeError: As :class:`BaseEMAHook`; ``momentum_fun`` is given.
        ValueError: As :class:`BaseEMAHook`; ``total_iter`` is outside of its range.
    """

    def __init__(self, total_iter: float = 2000, **kwargs: Any) -> None:
        super().__init__(**_without_schedule("ExpMomentumEMAHook", kwargs))
        self.momentum_fun = schedules.exponential(self.momentum, total_iter)


class LinearMomentumEMAHook(BaseEMAHook):
    """The same with ``m(i) = min(M ** interval, (1 + i) / (warm_up + i))``, M being ``momentum``.

    Source: the hook of this name in MMDetection 2.x; :func:`fused_ema.schedules.linear`, which
    tells what to beware of. In configs it is ``type="FusedLinearMomentumEMAHook"``.

    Args:
        warm_up: Iterations. More than 0.
        **kwargs: Those of :class:`BaseEMAHook`, but for ``momentum_fun``.

    Raises:
        TypeError: As :class:`BaseEMAHook`; ``momentum_fun`` is given.
        ValueError: As :class:`BaseEMAHook`; ``warm_up`` is outside of its range.
    """

    def __init__(self, warm_up: float = 100, **kwargs: Any) -> None:
        super().__init__(**_without_schedule("LinearMomentumEMAHook", kwargs))
        self.momentum_fun = schedules.linear(self.momentum, warm_up, self.interval)


def replace_mmdet_hooks() -> Callable[[], None]:
    """Puts these hooks in the place of MMDetection's, under their names.

    From then on configs with ``type="ExpMomentumEMAHook"`` or ``"LinearMomentumEMAHook"``, and
    whoever imports these classes (or BaseEMAHook) from mmdet, get the ones of this module. It may
    be called before or after mmdet is imported; it imports what it needs. A module that imported
    the classes before keeps those that it has.

    Returns:
        A function that undoes it.

    Raises:
        ImportError: MMDetection 2.x isn't installed.
    """
    # Otherwise a later import of mmdet would find its names taken.
    places = [
        required(module, "mmcv", "mmdet 2.x")
        for module in ("mmdet.core.hook.ema", "mmdet.core.hook", "mmdet.core")
    ]
    registry = _runner.HOOKS
    before = []
    registered = []
    for ours in (BaseEMAHook, ExpMomentumEMAHook, LinearMomentumEMAHook):
        name = ours.__name__
        for place in places:
            if name in vars(place):
                before.append((place, name, getattr(place, name)))
                setattr(place, name, ours)
        if (theirs := registry.get(name)) is not None:
            registered.append((name, theirs))
            registry.register_module(name=name, module=ours, force=True)

    def undo() -> None:
        for name, theirs in registered:
            registry.register_module(name=name, module=theirs, force=True)
        for place, name, theirs in before:
            setattr(place, name, theirs)

    return undo


def _without_schedule(name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    if kwargs.get("momentum_fun") is not None:
        raise TypeError(
            f"fused_ema.hooks.mmcv.{name}: momentum_fun is given, but this hook is a schedule "
            "itself; use FusedEMAHook with momentum_fun"
        )
    return kwargs


def _buffer_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The name of each average's buffer, which may have no dots."""
    names: dict[str, str] = {}
    for name in tensors:
        buffer = "ema_" + name.replace(".", "_")
        if buffer in names:
            raise ValueError(
                f"{_TITLE}.before_run: '{names[buffer]}' and '{name}' would have their averages in "
                f"one buffer, '{buffer}'; rename one of the modules"
            )
        names[buffer] = name
    return {name: buffer for buffer, name in names.items()}


def _pairs_of(
    tensors: Mapping[str, Tensor], emas: Mapping[str, Tensor]
) -> tuple[Pairs, list[Tensor], list[Tensor], list[tuple[Tensor, Tensor]], dict[str, int]]:
    """What follows from tensors and averages: pairs, mirrors, mirrored, aliases and places."""
    members = [_tracking.Member(name, tensor, False) for name, tensor in tensors.items()]
    groups = _tracking.group_tied(members)
    firsts = [group[0] for group in groups]
    mirrors, mirrored, aliases = [], [], []
    for group in groups:
        ema = emas[group[0].name]
        slot = Slot(tuple(group), "average", "tracked", [ema], None, group[0].tensor.device)
        for member in group[1:]:
            mirrors.append(emas[member.name])
            mirrored.append(slot.seen_as(member, ema))
            if member.tensor is not slot.param:
                aliases.append((slot.param, member.tensor))
    names = [first.name for first in firsts]
    pairs = Pairs([emas[name] for name in names], [first.tensor for first in firsts], names)
    places = {
        group[0].name: pairs.place_of((id(emas[group[0].name]), id(group[0].tensor)))
        for group in groups
        if len(group) == 1
    }
    return pairs, mirrors, mirrored, aliases, places


def _track(model: nn.Module, tensors: Mapping[str, Tensor], buffers: Mapping[str, str]) -> _Tracked:
    # A model that was converted has other buffers, the averages among them.
    emas = {name: model.get_buffer(buffer) for name, buffer in buffers.items()}
    kept = {name: tensors[name] for name in buffers}
    return _Tracked(_tracking.read(model), kept, emas, *_pairs_of(kept, emas))


def _is_continued(was: Tensor, now: Tensor) -> bool:
    """Whether it is the same tensor, or a buffer assigned anew or converted."""
    if was is now:
        return True
    same_kind = was.dtype == now.dtype or (was.is_floating_point() and now.is_floating_point())
    is_parameter = isinstance(was, nn.Parameter) or isinstance(now, nn.Parameter)
    return not is_parameter and was.shape == now.shape and same_kind


def _check_checkpoint(path: str, buffers: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Raises for a checkpoint that mmcv would load in part, with no more than a warning."""
    try:
        checkpoint = _runner.CheckpointLoader.load_checkpoint(path, "cpu", logger="silent")
    except FileNotFoundError:
        raise
    except Exception as error:
        raise RuntimeError(
            f"{_TITLE}.before_run: the checkpoint '{path}' can't be read: {error}; resume from an "
            "earlier one"
        ) from error
    meta = checkpoint.get("meta") if isinstance(checkpoint, dict) else None
    if not isinstance(meta, dict) or not {"epoch", "iter"} <= meta.keys():
        raise ValueError(
            f"{_TITLE}.before_run: '{path}' holds no state of a run (no epoch and iteration under "
            "'meta'); to start from its weights, load them with the config's load_from"
        )
    state = checkpoint.get("state_dict", checkpoint)
    shapes = {
        re.sub(r"^module\.", "", name): list(value.shape)
        for name, value in state.items()
        if isinstance(value, Tensor)
    }
    problems = []
    for name, buffer in buffers.items():
        shape = list(tensors[name].shape)
        if buffer not in shapes:
            # mmcv doesn't miss these, which old checkpoints lack.
            if "num_batches_tracked" not in buffer:
                problems.append(f"'{buffer}' is missing")
        elif shapes[buffer] != shape:
            problems.append(f"'{buffer}' has shape {shapes[buffer]} but '{name}' has {shape}")
    if problems:
        raise ValueError(
            f"{_TITLE}.before_run: the checkpoint '{path}' doesn't hold the averages of this "
            "model; resume from one that was saved with this hook, this model and these "
            "skip_buffers, or load its weights with the config's load_from; nothing was loaded:\n  "
            + "\n  ".join(_checks.listed(problems))
        )


def _resume(runner: Any, path: str) -> None:
    if torch.cuda.is_available():
        runner.resume(path)
    else:  # An IterBasedRunner asks for a CUDA device unless told where to load.
        runner.resume(path, map_location="cpu")


for _name, _class in (
    ("FusedEMAHook", BaseEMAHook),
    ("FusedExpMomentumEMAHook", ExpMomentumEMAHook),
    ("FusedLinearMomentumEMAHook", LinearMomentumEMAHook),
):
    _runner.HOOKS.register_module(name=_name, module=_class, force=True)
