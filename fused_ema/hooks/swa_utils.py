"""Drop-ins for ``torch.optim.swa_utils``.

For torch's own ``AveragedModel`` there are two averaging functions; and there is an
``AveragedModel`` that works out the lists once, and never waits for the device::

    model = fused_ema.hooks.swa_utils.AveragedModel(
        net, multi_avg_fn=fused_ema.hooks.swa_utils.get_ema_multi_avg_fn(0.999)
    )
    model.update_parameters(net)  # after each optimizer.step()
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.optim import swa_utils
from torch.utils._foreach_utils import _group_tensors_by_device_and_dtype

from fused_ema import ops
from fused_ema.hooks import _pairs, _shadow

MultiAvgFn = Callable[[Sequence[Tensor], Sequence[Tensor], "Tensor | int"], None]
AvgFn = Callable[[Tensor, Tensor, "Tensor | int"], Tensor]


class _Average:
    """Averages floating-point lists with one call, and others as torch does."""

    def __call__(
        self, averaged: Sequence[Tensor], params: Sequence[Tensor], num_averaged: Tensor | int
    ) -> None:
        if len(averaged) == 0:
            return
        if averaged[0].is_floating_point():
            ops._update(list(averaged), list(params), self._weight(num_averaged))
        else:
            self._others(averaged, params, num_averaged)

    def momentum(self, num_averaged: int) -> float:
        """The weight of the new value, where so many have been averaged."""
        raise NotImplementedError

    def _weight(self, num_averaged: Tensor | int) -> float | Tensor:
        raise NotImplementedError

    def _others(
        self, averaged: Sequence[Tensor], params: Sequence[Tensor], num_averaged: Tensor | int
    ) -> None:
        raise NotImplementedError


class _Ema(_Average):
    def __init__(self, decay: float) -> None:
        self.decay = _shadow.checked_decay("hooks.swa_utils.get_ema_multi_avg_fn", "decay", decay)

    def __repr__(self) -> str:
        return f"get_ema_multi_avg_fn({self.decay})"

    def momentum(self, num_averaged: int) -> float:
        return 1 - self.decay

    def _weight(self, num_averaged: Tensor | int) -> float | Tensor:
        return 1 - self.decay

    def _others(
        self, averaged: Sequence[Tensor], params: Sequence[Tensor], num_averaged: Tensor | int
    ) -> None:
        theirs = swa_utils.get_ema_multi_avg_fn(self.decay)  # type: ignore[no-untyped-call]
        theirs(averaged, params, num_averaged)


class _EachEma:
    """Torch's function for one tensor; AveragedModel below runs it over whole lists."""

    def __init__(self, decay: float) -> None:
        self.decay = _shadow.checked_decay("hooks.swa_utils.get_ema_avg_fn", "decay", decay)

    def __repr__(self) -> str:
        return f"get_ema_avg_fn({self.decay})"

    @torch.no_grad()
    def __call__(self, averaged: Tensor, param: Tensor, num_averaged: Tensor | int) -> Tensor:
        return self.decay * averaged + (1 - self.decay) * param

    @property
    def is_exact(self) -> bool:
        """Whether a momentum tells the decay: from 0.5 on always."""
        return 1 - (1 - self.decay) == self.decay


class _Swa(_Average):
    def __repr__(self) -> str:
        return "get_swa_multi_avg_fn()"

    def momentum(self, num_averaged: int) -> float:
        # Torch divides tensors, so its weight is rounded to the default dtype.
        return float(1 / (torch.tensor(num_averaged) + 1))

    def _weight(self, num_averaged: Tensor | int) -> float | Tensor:
        if isinstance(num_averaged, Tensor):
            return (1 / (num_averaged + 1)).double()
        return 1 / (num_averaged + 1)

    def _others(
        self, averaged: Sequence[Tensor], params: Sequence[Tensor], num_averaged: Tensor | int
    ) -> None:
        if averaged[0].is_complex():
            theirs = swa_utils.get_swa_multi_avg_fn()  # type: ignore[no-untyped-call]
            theirs(averaged, params, num_averaged)
        else:  # Torch's own function for lists can't divide integers, its other one can.
            avg_fn = swa_utils.get_swa_avg_fn()  # type: ignore[no-untyped-call]
            with torch.no_grad():
                for a, p in zip(averaged, params, strict=True):
                    a.copy_(p if a.dtype == torch.bool else avg_fn(a, p, num_averaged))


def get_ema_multi_avg_fn(decay: float = 0.999) -> MultiAvgFn:
    """A function for ``multi_avg_fn`` that keeps an exponential moving average.

    ``averaged = decay * averaged + (1 - decay) * param``, with the bits of torch's own (a lerp with
    weight ``1 - decay``); also where averages are float32 and parameters bfloat16 or float16. Lists
    of integers or complex numbers are averaged by torch. It can be pickled and copied.

    Args:
        decay: The weight of the old value, in [0, 1].

    Raises:
        TypeError: No number.
        ValueError: Outside of [0, 1].

    Example:
        >>> averaged = torch.optim.swa_utils.AveragedModel(
        ...     model, multi_avg_fn=fused_ema.hooks.swa_utils.get_ema_multi_avg_fn(0.999)
        ... )
    """
    return _Ema(decay)


def get_ema_avg_fn(decay: float = 0.999) -> AvgFn:
    """A function for ``avg_fn`` that keeps an exponential moving average.

    ``averaged = decay * averaged + (1 - decay) * param`` in three rounded operations, with the bits
    of torch's own. :class:`AveragedModel` of this module runs it over all tensors at once
    (``form="two_products"``), torch's class over one after the other. It can be pickled and copied.

    Args:
        decay: The weight of the old value, in [0, 1].

    Raises:
        TypeError: No number.
        ValueError: Outside of [0, 1].
    """
    return _EachEma(decay)


def get_swa_multi_avg_fn() -> MultiAvgFn:
    """A function for ``multi_avg_fn`` that weighs all updates equally.

    ``averaged += (param - averaged) / (num_averaged + 1)``, with the bits of torch's own (a lerp
    with the weight rounded to the default dtype). No host synchronisation: the count stays on its
    device. Integer lists, on which torch's own raises an error, get truncated averages as from
    ``torch.optim.swa_utils.get_swa_avg_fn``; booleans are copied.
    """
    return _Swa()


class AveragedModel(_shadow.ModuleCopy):
    """``torch.optim.swa_utils.AveragedModel`` with the lists worked out once and no waiting.

    The first update copies the model, each later one averages it. The count of updates is a buffer
    as torch's is, with a copy on the host beside it, so an update doesn't wait for the device.
    ``state_dict()`` has torch's keys and can be loaded by torch's class, and the other way round.

    Different from torch's: a model with another number of tensors is an error; parameters in
    float32 with bfloat16 or float16 ones in the model are averaged; without a function the CPU
    computes what torch computes on CUDA (a lerp), which differs from torch's CPU path by roundings.
    It holds on to the model that was given last. Write ``n_averaged`` in place or assign it, not
    through ``.data``.

    Args:
        model: Copied, with all of its buffers.
        device: Of the copy; None for the model's.
        avg_fn: Called for each tensor with the average, the parameter and the count; returns the
            new average.
        multi_avg_fn: Called with lists of tensors of one device and dtype, and the count; writes
            the new averages. Those of this module run from a table made once.
        use_buffers: Average the buffers too. Otherwise each update copies them.

    Attributes:
        module: The averaged copy.
        n_averaged: The number of updates, a 0-dim int64 buffer.

    Raises:
        AssertionError: Both functions are given.

    Example:
        >>> averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
        >>> averaged.update_parameters(model)  # after each optimizer.step()
        >>> torch.optim.swa_utils.update_bn(loader, averaged)
    """

    n_averaged: Tensor

    def __init__(
        self,
        model: nn.Module,
        device: torch.device | str | int | None = None,
        avg_fn: AvgFn | None = None,
        multi_avg_fn: MultiAvgFn | None = None,
        use_buffers: bool = False,
    ) -> None:
        super().__init__()
        if avg_fn is not None and multi_avg_fn is not None:
            raise AssertionError(
                "fused_ema.hooks.swa_utils.AveragedModel: both avg_fn and multi_avg_fn are given; "
                "pass one of them"
            )
        self.module = deepcopy(model)
        if device is not None:
            self.module = self.module.to(device)
        with torch.inference_mode(False):
            self.register_buffer("n_averaged", torch.tensor(0, dtype=torch.long, device=device))
        self.avg_fn = avg_fn
        self.multi_avg_fn = multi_avg_fn
        self.use_buffers = use_buffers
        self._count = 0
        self._counted: tuple[Tensor, int] | None = None
        self._follow()

    def _follow(self) -> None:
        self._counted = None
        self._follows_buffers = self.use_buffers
        averaged, copied = (_members, _none) if self.use_buffers else (_params, _buffers)
        self._averaged = _pairs.Follower(self.module, averaged, follows_passing=True)
        self._copied = _pairs.Follower(self.module, copied, only_copied=True, follows_passing=True)

    def update_parameters(self, model: nn.Module) -> None:
        """Takes a model's values into the average; after each optimizer step.

        Args:
            model: The one that was copied, or one like it; may be wrapped.

        Raises:
            TypeError: A dtype pair that can't be averaged.
            ValueError: Another number of tensors than was copied, or other shapes.
        """
        if self._averaged.is_of_another(self.module) or self.use_buffers != self._follows_buffers:
            self._follow()
        averaged, copied = self._averaged.pairs(model), self._copied.pairs(model)
        count = self._num_averaged()
        function: object = self.multi_avg_fn
        if function is None and self.avg_fn is None:
            function = _Swa()
        if count == 0:
            averaged.copy()
        elif isinstance(function, _Average):
            averaged.update(function.momentum(count), "lerp")
            self._call(function, self._lists_of_others(averaged))
        elif self.multi_avg_fn is not None:
            self._call(self.multi_avg_fn, self._lists(model))
        elif isinstance(self.avg_fn, _EachEma) and self.avg_fn.is_exact:
            averaged.update(1 - self.avg_fn.decay, "two_products")
            self._call_each(self.avg_fn, self._lists_of_others(averaged))
        elif self.avg_fn is not None:
            self._call_each(self.avg_fn, self._lists(model))
        copied.copy()
        with torch.no_grad():
            self.n_averaged.add_(1)
        self._remember(count + 1)

    def _call(self, function: MultiAvgFn, lists: tuple[list[Tensor], list[Tensor]]) -> None:
        # As torch does it: one call a device and dtype.
        if not lists[0]:
            return
        groups = _group_tensors_by_device_and_dtype([list(lists[0]), list(lists[1])])
        for (device, _), ((averaged, params), _) in groups.items():
            function(averaged, params, self.n_averaged.to(device))  # type: ignore[arg-type]

    @torch.no_grad()
    def _call_each(self, function: AvgFn, lists: tuple[list[Tensor], list[Tensor]]) -> None:
        for a, p in zip(*lists, strict=True):
            a.copy_(function(a, p, self.n_averaged.to(a.device)))

    def _lists(self, model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        tensors_of = _members if self.use_buffers else _params
        averaged = [t.detach() for _, t in tensors_of(self.module)]
        live = [t.detach() for _, t in tensors_of(model)]
        return averaged, [p.to(a.device) for a, p in zip(averaged, live, strict=True)]

    def _lists_of_others(self, pairs: _pairs.Pairs) -> tuple[list[Tensor], list[Tensor]]:
        others = pairs.others
        return [a.detach() for a, _ in others], [p.detach().to(a.device) for a, p in others]

    def _num_averaged(self) -> int:
        """The count, read from the buffer only where somebody else has written it."""
        n = self.n_averaged
        if (
            self._counted is None
            or n is not self._counted[0]
            or n.is_inference()
            or n._version != self._counted[1]
        ):
            self._count = int(n.item())
        return self._count

    def _remember(self, count: int) -> None:
        n = self.n_averaged
        self._count = count
        self._counted = None if n.is_inference() else (n, n._version)


# Functions, since a method would hold on to its object in a cycle.
def _params(module: nn.Module) -> list[tuple[str, Tensor]]:
    return list(module.named_parameters())


def _buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    return list(module.named_buffers())


def _members(module: nn.Module) -> list[tuple[str, Tensor]]:
    return _params(module) + _buffers(module)


def _none(module: nn.Module) -> list[tuple[str, Tensor]]:
    return []
