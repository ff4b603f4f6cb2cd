"""A pair of lists worked out once and run many times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
            or which has gaps is served by torch's own functions, for that pair alone.
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
    """

    def __init__(
        self,
        ema: Sequence[Tensor],
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
        self._lists = (ema, params)
        # Which may be empty at any call.
        self._zero3 = _shards.zero3_of(self._lists)
        self._refuse_partitioned("")
        if _native.C is not None:
            self._plan = _native.C.Plan(ema, params, names or [])
        else:
            self._plan = _foreach.Plan(ema, params, names)
        self._num_tensors = len(ema)
        self._has_warned = False

    def update(self, momentum: float | Tensor, form: Form = "lerp") -> None:
        """Moves every ema towards its param, as :func:`fused_ema.update_` does.

        Args:
            momentum: The weight of the new value, in [0, 1]; or a 0-dim float64 tensor on the
                lists' device, which is read when the kernel runs.
            form: ``"lerp"``, ``"mul_add"`` or ``"two_products"``.

        Raises:
            TypeError: The momentum is neither a number nor such a tensor.
            ValueError: A momentum outside of [0, 1], an unknown form, or what making the plan
                raises where a tensor has moved.

        Warns:
            UserWarning: Once, of a momentum above 0.5, which most often is a decay.
        """
        if isinstance(momentum, float) and 0.5 < momentum < 1 and not self._has_warned:
            self._has_warned = True
            _checks.warn_of_decay("Plan.update", momentum, stacklevel=2)
        self._update(momentum, form)

    def _update(self, momentum: float | Tensor, form: Form) -> None:
        """The same without a warning: of a schedule's momentum."""
        if not isinstance(form, str):
            _foreach.check_form("Plan.update", form)
        self._run("update", momentum, form)

    def swap(self) -> None:
        """Exchanges every ema with its param, as :func:`fused_ema.swap_` does."""
        self._run("swap")
        _caches.drop()

    def copy_to_ema(self) -> None:
        """Copies every param into its ema."""
        self._run("copy_to_ema")

    def copy_to_params(self) -> None:
        """Copies every ema into its param."""
        self._run("copy_to_params")
        _caches.drop()

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
            ``ema_dtype``, ``param_dtype``, ``num_tensors`` and ``num_elements``.
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
        parts = [
            f"{e['num_tensors']} x {e['ema_dtype']}/{e['param_dtype']} on {e['device']} "
            f"({e['backend']})"
            for e in self.describe()
        ]
        return f"fused_ema.Plan({', '.join(parts)})"
