"""A pair of lists worked out once and run many times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor

from fused_ema import _caches, _checks, _foreach, _native, _shards
from fused_ema.ops import Form


class Plan:
    """What can be worked out once for a list of emas and their params.

    A plan checks its lists when it is made, and keeps a table of addresses that every later call
    runs from: one launch per device and dtype pair, however many tensors, and no host
    synchronisation. Before each launch it compares the tensors with the table; where one has moved
    (``p.data = ...``, ``module.to(...)``, a re-shard) it checks and makes the table anew, so
    nothing is ever written through an old address. A contiguous tensor that got another shape over
    the same memory holds the same elements, and is simply followed. Replacing a ``Parameter``
    object in a module is beyond its sight: it keeps the tensors it was given, also
    those that an optimizer's state no longer holds after its ``load_state_dict()``, and an average
    of them stands still: ``EMAManager(sources=)`` follows the new ones. Moving a tensor while
    another thread is inside a call is a race, as it is with torch's own functions.

    Making a plan, or making it anew, is not possible while a CUDA graph is being captured; running
    it is. Such a graph replays with the addresses of the capture, as it does for any operation of
    torch: keep the tensors for as long as the graph. The plan's table it keeps by itself.

    Args:
        ema: The averages. A list or tuple of tensors; any dense layout. A pair whose strides differ
            or which has gaps is served by torch's own functions, for that pair alone. Or several
            such lists, for several averages of the same params: an update then reads the params
            once for each four averages, and each gets the bits of a plan of its own. All averages
            of a param have one dtype.
        params: The tensors they follow: same length, pair by pair the same shape and device, and a
            dtype pair of :func:`fused_ema.update_`.
        names: A name for each pair, for error messages.

    Raises:
        TypeError: As :func:`fused_ema.update_`.
        ValueError: As :func:`fused_ema.update_`; no two tensors of both lists may share memory.
        RuntimeError: As :func:`fused_ema.update_`, or while a CUDA graph is being captured.

    Example:
        >>> params = list(model.parameters())
        >>> plan = fused_ema.Plan([p.detach().clone() for p in params], params)
        >>> plan.update(momentum=0.001)  # after each optimizer.step()

        Several averages of the same params:

        >>> fast, slow = ([p.detach().clone() for p in params] for _ in range(2))
        >>> plan = fused_ema.Plan([fast, slow], params)
        >>> plan.update([0.01, 0.001])
    """

    def __init__(
        self,
        ema: Sequence[Tensor] | Sequence[Sequence[Tensor]],
        params: Sequence[Tensor],
        names: Sequence[str] | None = None,
    ) -> None:
        self._plan: Any
        names = None if names is None else list(names)
        for index, name in enumerate(names or ()):
            if not isinstance(name, str):
                raise TypeError(
                    f"fused_ema.Plan: names[{index}] is a {type(name).__name__}; pass strings"
                )
        self._names = names
        self._is_several = is_several = _foreach.are_lists(ema)
        self._num_averages = len(ema) if is_several else 1
        self._lists = cast(
            "Sequence[Sequence[Tensor]]", (*ema, params) if is_several else (ema, params)
        )
        # Which may be empty at any call.
        self._zero3 = _shards.zero3_of(self._lists)
        self._refuse_partitioned("")
        if _native.C is not None:
            self._plan = _native.C.Plan(ema, params, names or [], False, is_several)
        else:
            self._plan = _foreach.Plan(ema, params, names, is_several)
        self._num_tensors = len(params)
        self._has_warned = False

    def update(self, momentum: float | Tensor | Sequence[float], form: Form = "lerp") -> None:
        """Moves every ema towards its param, as :func:`fused_ema.update_` does.

        Args:
            momentum: The weight of the new value, in [0, 1]; or a 0-dim float64 tensor on the
                lists' device, which is read when the kernel runs. Of several averages a list of
                such weights, one for each, or a 1-dim tensor of as many elements.
            form: ``"lerp"``, ``"mul_add"`` or ``"two_products"``.

        Raises:
            TypeError: The momentum is neither a number nor such a tensor, nor a list where there
                are several averages.
            ValueError: A momentum outside of [0, 1], another number of them than of averages, an
                unknown form, or what making the plan
                raises where a tensor has moved.

        Warns:
            UserWarning: Once, of a momentum above 0.5, which most often is a decay.
        """
        if isinstance(momentum, float) and 0.5 < momentum < 1 and not self._has_warned:
            self._has_warned = True
            _checks.warn_of_decay("Plan.update", momentum, stacklevel=2)
        self._update(momentum, form)

    def _update(self, momentum: float | Tensor | Sequence[float], form: Form) -> None:
        """The same without a warning: of a schedule's momentum."""
        if not isinstance(form, str):
            _foreach.check_form("Plan.update", form)
        self._run("update_averages" if self._is_several else "update", momentum, form)

    def swap(self, index: int = 0) -> None:
        """Exchanges every ema with its param, as :func:`fused_ema.swap_` does.

        Args:
            index: Of which average, where there are several.

        Raises:
            IndexError: There is no such average.
        """
        self._run("swap", self._checked(index, "swap"))
        _caches.drop()

    def copy_to_ema(self, index: int = 0) -> None:
        """Copies every param into its ema; ``index`` as :meth:`swap` takes it."""
        self._run("copy_to_ema", self._checked(index, "copy_to_ema"))

    def copy_to_params(self, index: int = 0) -> None:
        """Copies every ema into its param; ``index`` as :meth:`swap` takes it."""
        self._run("copy_to_params", self._checked(index, "copy_to_params"))
        _caches.drop()

    def _checked(self, index: int, op: str) -> int:
        if not 0 <= index < self._num_averages:
            raise IndexError(
                f"fused_ema.Plan.{op}: index is {index} and the plan has {self._num_averages} "
                f"average(s); pass 0 to {self._num_averages - 1}"
            )
        return index

    def _run(self, op: str, *args: Any) -> None:
        if self._zero3:
            self._refuse_partitioned(f".{op}")
        try:
            getattr(self._plan, op)(*args)
        except (TypeError, ValueError):
            # deepspeed.initialize() may have partitioned them since.
            self._zero3 = _shards.zero3_of(self._lists)
            self._refuse_partitioned(f".{op}")
            raise

    def _refuse_partitioned(self, op: str) -> None:
        """Raises where ZeRO-3 has a tensor empty: two such would pass for a pair of empty ones."""
        for i, tensor in self._zero3:
            if _shards.is_partitioned(tensor):
                name = f"tensor {i}" if not self._names else self._names[i]
                raise ValueError(f"fused_ema.Plan{op}: '{name}' {_shards.refusal(tensor)}")

    def describe(self) -> list[dict[str, Any]]:
        """Who serves what: one entry per device and dtype pair.

        Returns:
            Dictionaries with ``backend`` (``"cuda"``, ``"cpu"`` or ``"foreach"``), ``device``,
            ``ema_dtype``, ``param_dtype``, ``num_tensors`` and ``num_elements`` (of one average),
            and ``num_averages``.
        """
        entries: list[dict[str, Any]] = self._plan.describe()
        return entries

    def _check(self) -> None:
        """Raises what any call would raise now."""
        self._plan.check()

    @property
    def _num_runs(self) -> int:
        """Calls that have done all of their work."""
        return int(self._plan.num_runs)

    @property
    def _num_refreshes(self) -> int:
        """How often tensors had moved."""
        return int(self._plan.num_refreshes)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "fused_ema.Plan: a plan can't be copied or pickled, since it holds on to the memory of "
            "its tensors; make a plan of the other tensors"
        )

    def __len__(self) -> int:
        """The number of tensor pairs."""
        return self._num_tensors

    def __repr__(self) -> str:
        several = f"{self._num_averages} averages of " if self._num_averages > 1 else ""
        parts = [
            f"{several}{e['num_tensors']} x {e['ema_dtype']}/{e['param_dtype']} on {e['device']} "
            f"({e['backend']})"
            for e in self.describe()
        ]
        return f"fused_ema.Plan({', '.join(parts)})"
