"""Updates that look at their elements: those of a param that isn't finite left out, telemetry.

On torch's operations: right, and slower than an update. What telemetry finds stays on the device
until it is asked for.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fused_ema import _checks, _shards, _storage
from fused_ema._slots import Slot, Tracked
from fused_ema.ops import Form

TITLE = "fused_ema.EMAManager"

Nonfinite = Literal["propagate", "skip"]
"""What an update makes of a param's element that is NaN or infinite."""

_SUMMED = ("lag_norm", "param_norm", "nonfinite", "stalled")
_LARGEST = "largest_lag"
_NORMS = ("lag_norm", "param_norm")
KEYS = (*_SUMMED, _LARGEST)


class _Measured(NamedTuple):
    """What one update has found.

    Attributes:
        names: Of the tensors.
        num_parts: Into how many each is divided among ranks.
        rows: For each average and tensor its values, in the order of KEYS, on its device.
    """

    names: Sequence[str]
    num_parts: Sequence[int]
    rows: Sequence[Sequence[Tensor]]


class Observer:
    """Runs a manager's averaging updates.

    Args:
        nonfinite: As EMAManager's.
        every: Measure each so many updates; 0 for none.
    """

    def __init__(self, nonfinite: Nonfinite, every: int) -> None:
        self._skips = nonfinite == "skip"
        self.every = every
        self._num_updates = 0
        self._latest: _Measured | None = None

    @classmethod
    def parse(cls, nonfinite: str, telemetry: bool | int) -> Observer | None:
        """Of what EMAManager is given; None where there is nothing to look at."""
        if nonfinite not in get_args(Nonfinite):
            raise ValueError(f"{TITLE}: nonfinite is {nonfinite!r}; choose 'propagate' or 'skip'")
        every = int(telemetry)
        if not isinstance(telemetry, bool):
            every = _checks.count("EMAManager", "telemetry", telemetry, least=0)
        known: Nonfinite = "skip" if nonfinite == "skip" else "propagate"
        return cls(known, every) if every or known == "skip" else None

    @torch.no_grad()
    def average(self, tracked: Tracked, momenta: Sequence[float], form: Form) -> None:
        """Averages all slots, and measures where it is time to. Raises before it writes."""
        self._num_updates += 1
        is_measured = self.every > 0 and self._num_updates % self.every == 0
        tracked.plan._check()
        slots = tracked.averaged
        if not is_measured:
            slots = _with_nonfinite(slots) if self._skips else []
        before = [[ema.clone() for ema in slot.emas] for slot in slots]
        tracked._average(momenta, form)
        rows: list[list[Tensor]] = [[] for _ in momenta]
        for slot, olds in zip(slots, before, strict=True):
            finite = _finite_in(slot.source)
            for k, (ema, old) in enumerate(zip(slot.emas, olds, strict=True)):
                if self._skips and finite is not None:
                    ema.copy_(torch.where(finite, ema, old))
                if is_measured:
                    rows[k].append(_row(ema, old, slot.source, finite))
        if is_measured:
            tensors = [slot.members[0].tensor for slot in slots]
            names = [slot.name for slot in slots]
            self._latest = _Measured(names, [*map(_shards.num_parts, tensors)], rows)

    @torch.no_grad()
    def follow(self, tracked: Tracked) -> None:
        """Copies all, as before the first average."""
        slots = _with_nonfinite(tracked.averaged) if self._skips else []
        before = [[ema.clone() for ema in slot.emas] for slot in slots]
        tracked.follow()
        for slot, olds in zip(slots, before, strict=True):
            finite = slot.source.isfinite()
            for ema, old in zip(slot.emas, olds, strict=True):
                ema.copy_(torch.where(finite, ema, old))

    def telemetry(self, names: Sequence[str], by_name: bool, group: Any) -> dict[str, float]:
        """What the latest measured update has found.

        Args:
            names: Of the averages; of one without a name an empty string.
            by_name: Each tensor as well.
            group: A process group whose ranks are added up; None for this rank alone.
        """
        if self._latest is None:
            return {}
        found: dict[str, float] = {}
        tables = _read(self._latest, group)
        for average, table in zip(names, tables, strict=True):
            prefix = f"ema/{average}/" if average else "ema/"
            columns = dict(zip(KEYS, zip(*table, strict=True), strict=True))
            for key, values in columns.items():
                found[prefix + key] = _largest(values) if key == _LARGEST else sum(values)
                if key in _NORMS:
                    found[prefix + key] **= 0.5
            for key, values in columns.items() if by_name else ():
                for name, value in zip(self._latest.names, values, strict=True):
                    found[f"{prefix}{key}/{name}"] = value**0.5 if key in _NORMS else value
        return found


def _largest(values: Sequence[float]) -> float:
    return math.nan if any(map(math.isnan, values)) else max(values, default=0.0)


def _with_nonfinite(slots: Sequence[Slot]) -> list[Slot]:
    """Those with elements that aren't finite, perhaps others too; waits for each device once."""
    # A sum is finite only where all elements are, and eighty times as fast as isfinite() on a CPU.
    finite = _storage.are_finite([_sum_of(slot.source) for slot in slots])
    return [slot for slot, is_finite in zip(slots, finite, strict=True) if not is_finite]


def _sum_of(values: Tensor) -> Tensor:
    return values.sum(dtype=torch.promote_types(values.dtype, torch.float32))


def _finite_in(values: Tensor) -> Tensor | None:
    """Which elements are finite; None where it is known, without a wait, that all are."""
    if values.device.type == "cpu" and math.isfinite(_sum_of(values).item()):
        return None
    return values.isfinite()


def _row(ema: Tensor, old: Tensor, source: Tensor, finite: Tensor | None) -> Tensor:
    """Squares of norms, counts, and the largest lag; of the finite elements but for their count."""
    dtype = torch.promote_types(ema.dtype, torch.float32)
    param = source.to(dtype)
    if finite is not None:
        param = torch.where(finite, param, 0)
    lag = param - ema.to(dtype)
    if finite is not None:
        lag = torch.where(finite, lag, 0)
    stalled = (ema == old) & (lag != 0)
    num_finite = source.numel() if finite is None else finite.count_nonzero()
    values = (
        lag.square().sum(),
        param.square().sum(),
        source.numel() - torch.as_tensor(num_finite, device=lag.device),
        stalled.count_nonzero(),
        lag.abs().amax() if lag.numel() else lag.sum(),
    )
    return torch.stack([value.to(torch.float64) for value in values])


def _read(measured: _Measured, group: Any) -> list[list[list[float]]]:
    """The values of each average, tensor and key: one read of each device."""
    by_device: dict[torch.device, list[tuple[int, int]]] = {}
    for k, rows in enumerate(measured.rows):
        for i, row in enumerate(rows):
            by_device.setdefault(row.device, []).append((k, i))
    tables: list[list[list[float]]] = [[[] for _ in rows] for rows in measured.rows]
    for places in by_device.values():
        table = torch.stack([measured.rows[k][i] for k, i in places])
        if group is not None:
            distributed: Any = sys.modules["torch.distributed"]
            num_ranks = distributed.get_world_size(group)
            # Of what several ranks hold alike, each adds its share.
            shares = [measured.num_parts[i] / num_ranks for _, i in places]
            summed = (
                table[:, :-1] * torch.tensor(shares, dtype=table.dtype).to(table.device)[:, None]
            )
            largest = table[:, -1].contiguous()
            distributed.all_reduce(summed, group=group)
            distributed.all_reduce(largest, distributed.ReduceOp.MAX, group=group)
            table = torch.cat([summed, largest[:, None]], dim=1)
        for (k, i), row in zip(places, table.tolist(), strict=True):
            tables[k][i] = row
    return tables
