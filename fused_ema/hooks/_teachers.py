"""The pairs of two modules, kept for functions that are given the modules at each call."""

from __future__ import annotations

import gc
import inspect
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from types import GeneratorType
from typing import Any

from torch import Tensor, nn

from fused_ema import _repeat, _shards, _tracking
from fused_ema.hooks import _pairs
from fused_ema.ops import Form


class Kept:
    """The pairs of a model and its teacher, with the dicts that hold them, but not the modules.

    Args:
        pairs: What was found.
        model: The model.
        teacher: Where it is a module of its own.
    """

    def __init__(
        self, pairs: _pairs.Pairs, model: nn.Module, teacher: nn.Module | None = None
    ) -> None:
        self._model = weakref.ref(model)
        self._teacher = None if teacher is None else weakref.ref(teacher, _forgetting(id(teacher)))
        self.pairs = pairs
        self._repeated: _repeat.Repeat | None = None
        owned: list[dict[str, Any]] = [
            own
            for root in (model,) + (() if teacher is None else (teacher,))
            for module in root.modules()
            for own in (module._parameters, module._modules)
            if isinstance(own, dict)  # A ScriptModule's are none; they don't change.
        ]
        held: list[list[object]] = [[*chain.from_iterable(own.items())] for own in owned]
        self._watch = _tracking.Watch(tuple(owned), tuple(held))

    def is_of(self, model: nn.Module) -> bool:
        """Whether it is that model, and neither of the two holds anything else."""
        return self._model() is model and not self._watch.changed()

    def repeats(self, model: nn.Module, teacher: nn.Module, momentum: float, form: Form) -> bool:
        """As the function of that name."""
        repeated = self._repeated
        return (
            repeated is not None
            and self._model() is model
            and self._teacher is not None
            and self._teacher() is teacher
            and repeated.form == form
            and _repeat.make_again(repeated, momentum)
        )

    def note(self, form: Form) -> None:
        """To be called after an update: the next one may be the same."""
        # What is narrow is another matter to some of the callers, if not to all.
        if self.pairs.are_narrow_on_cpu():
            self._repeated = None
        else:
            self._repeated = self.pairs.repeatable(form, (self._watch.parts, (), bytearray(1)))


# By the teacher's id: a weak dictionary takes longer to look into than the checks. Nothing outlives
# the teacher.
_kept: dict[int, Kept] = {}


def _forgetting(key: int) -> Callable[[object], None]:
    def forget(_: object) -> None:
        _kept.pop(key, None)

    return forget


def repeats(model: nn.Module, teacher: nn.Module, momentum: float, form: Form) -> bool:
    """Makes the latest update again; False, and nothing is done, where anything is otherwise."""
    kept = _kept.get(id(teacher))
    return kept is not None and kept.repeats(model, teacher, momentum, form)


def update(where: str, model: nn.Module, teacher: nn.Module, momentum: float, form: Form) -> None:
    """Averages the parameters of two modules, by order. Raises what params_of() raises."""
    if not repeats(model, teacher, momentum, form):
        params_of(where, model, teacher).update(momentum, form)
        _kept[id(teacher)].note(form)


def params_of(where: str, model: nn.Module, teacher: nn.Module) -> _pairs.Pairs:
    """The pairs of their parameters, by order; found again where either holds others.

    Raises:
        TypeError: A module that is none, or a parameter that isn't floating-point.
        ValueError: They have different numbers of parameters, or other shapes; they share some;
            ZeRO-3 has partitioned one.
    """
    kept = _kept.get(id(teacher))
    if kept is None or not kept.is_of(model):
        kept = _kept[id(teacher)] = Kept(pairs_of(where, model, teacher), model, teacher)
    return kept.pairs


def pairs_of(where: str, model: nn.Module, teacher: nn.Module) -> _pairs.Pairs:
    """The same, made anew."""
    for side, module in (("model", model), ("teacher", teacher)):
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"fused_ema.{where}: the {side} is a {type(module).__name__}; pass a "
                "torch.nn.Module"
            )
    live, averaged = dict(model.named_parameters()), list(teacher.parameters())
    if len(live) != len(averaged):
        raise ValueError(
            f"fused_ema.{where}: the teacher has {len(averaged)} parameters but the model has "
            f"{len(live)}; pass the two that belong together, or fused_ema.EMAManager of a part"
        )
    return checked_pairs(
        where, [(a, p, name) for a, (name, p) in zip(averaged, live.items(), strict=True)]
    )


def checked_pairs(where: str, found: Sequence[tuple[Tensor, Tensor, str]]) -> _pairs.Pairs:
    """Of averages, the parameters that they follow, and names."""
    for averaged, live, name in found:
        for tensor in (averaged, live):
            if _shards.is_partitioned(tensor):
                raise ValueError(
                    f"fused_ema.{where}: '{name}' is partitioned by ZeRO-3, so that this rank "
                    "holds a shard; use ZeRO-1 or 2, or the framework's own, which gathers both"
                )
            if not tensor.is_floating_point():
                raise TypeError(
                    f"fused_ema.{where}: '{name}' is {tensor.dtype}, of which there is no average; "
                    "pass modules whose parameters are floating-point"
                )
    return _pairs.Pairs(
        [averaged for averaged, _, _ in found],
        [live for _, live, _ in found],
        [name for _, _, name in found],
        converts=True,
    )


_code = nn.Module.parameters.__code__

if sys.version_info >= (3, 11):

    def has_begun(generator: GeneratorType[Any, Any, Any]) -> bool:
        """Whether anything was taken from it; inspect's function takes three times as long."""
        return generator.gi_frame is None or generator.gi_suspended or generator.gi_running
else:

    def has_begun(generator: GeneratorType[Any, Any, Any]) -> bool:
        """Whether anything was taken from it."""
        return inspect.getgeneratorstate(generator) != inspect.GEN_CREATED


def modules_of(*lists: Iterable[Tensor]) -> list[nn.Module] | None:
    """The modules whose ``parameters()`` these are, all of them; they are used up then.

    Their frames say so: to walk the modules is what takes the time. None where any is something
    else, or something was taken from it.
    """
    modules = []
    for params in lists:
        if type(params) is GeneratorType and params.gi_code is _code:
            # Arguments come last, before what a generator that has begun has more: without making
            # a frame object, which takes as long as the update of 50 tensors.
            found = gc.get_referents(params)
            if found[-1] is True and isinstance(found[-2], nn.Module):
                modules.append(found[-2])
                continue
        if (
            not isinstance(params, GeneratorType)
            or params.gi_code is not _code
            or has_begun(params)
        ):
            return None
        given = params.gi_frame.f_locals  # type: ignore[union-attr]
        if not given["recurse"]:
            return None
        modules.append(given["self"])
    for params in lists:
        params.close()  # type: ignore[attr-defined]
    return modules
