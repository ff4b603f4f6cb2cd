"""Profiles: how much of an average is of the weights of each iteration.

A profile is a density over time, where iteration i (from 0) is the time from i to i + 1, and an
update at every k iterations stands for the k that it ends. So the weight of an update is the mass
of its cell, and averages of any intervals can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fused_ema import schedules
from fused_ema.schedules import Schedule

# More cells are averaged: what profiles do inside of them is not told apart.
_MAX_CELLS = 1 << 15
_BLOCK = 4096
# Of momenta without a formula.
_MAX_POINTS = 1024


@dataclass(frozen=True)
class Power:
    """Weights that grow as ``t ** gamma`` up to ``time``: the power function of EDM2."""

    gamma: float
    time: float
    start = 0.0

    def below(self, x: Tensor) -> Tensor:
        """The weight of all that came up to these times."""
        return (x / self.time).clamp(max=1) ** (self.gamma + 1)

    def breaks(self) -> tuple[float, ...]:
        return (self.time,)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "power", "gamma": self.gamma}


@dataclass(frozen=True)
class Kept:
    """Any momenta: the log of the weight that the averages of these times have left at the last.

    What was there at the first of them is what it began with: the start value at 0, or a copy.
    """

    points: tuple[float, ...]
    log_kept: tuple[float, ...]

    @property
    def time(self) -> float:
        return self.points[-1]

    @property
    def start(self) -> float:
        """The weight of what the model was before its first iteration."""
        return math.exp(self.log_kept[0]) if self.points[0] == 0 else 0.0

    def below(self, x: Tensor) -> Tensor:
        first = self.points[0]
        kept = _interpolated(x, self.points, self.log_kept).exp()
        # A copy at the end of an iteration is all of that iteration.
        return kept * (x - first + 1).clamp(0, 1) if first > 0 else kept

    def breaks(self) -> tuple[float, ...]:
        first = self.points[0]
        return (*([first - 1] if first > 0 else []), first, self.time)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "kept", "points": self.points, "log_kept": self.log_kept}


@dataclass(frozen=True)
class Window:
    """Weights that grow as ``(t - since) ** growth`` from ``since`` to ``time``; 0 is a mean."""

    since: float
    time: float
    growth: int = 0
    start = 0.0

    def below(self, x: Tensor) -> Tensor:
        return ((x - self.since) / (self.time - self.since)).clamp(0, 1) ** (self.growth + 1)

    def breaks(self) -> tuple[float, ...]:
        return (self.since, self.time)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "mean", "since": self.since}


@dataclass(frozen=True)
class Halving:
    """Weights that halve with each ``half_life`` before ``time``, none before the beginning."""

    half_life: float
    time: float
    start = 0.0

    def below(self, x: Tensor) -> Tensor:
        rate = math.log(2) / self.half_life
        whole = -math.expm1(-self.time * rate)
        return (torch.exp((x.clamp(max=self.time) - self.time) * rate) - (1 - whole)) / whole

    def breaks(self) -> tuple[float, ...]:
        return (self.time,)


@dataclass(frozen=True)
class Table:
    """Weights by a function of the iteration, as the part that each time and all before it have."""

    points: tuple[float, ...]
    parts: tuple[float, ...]
    start = 0.0

    @property
    def time(self) -> float:
        return self.points[-1]

    def below(self, x: Tensor) -> Tensor:
        return _interpolated(x, self.points, self.parts)

    def breaks(self) -> tuple[float, ...]:
        return (self.time,)


Saved = Power | Kept | Window
Profile = Saved | Halving | Table


def _interpolated(x: Tensor, points: Sequence[float], values: Sequence[float]) -> Tensor:
    """Straight lines between the points; beyond them what the last one has."""
    at, value = (torch.tensor(v, dtype=torch.float64) for v in (points, values))
    if len(points) == 1:
        return value.expand_as(x)
    right = torch.searchsorted(at, x).clamp(1, len(points) - 1)
    part = ((x - at[right - 1]) / (at[right] - at[right - 1])).clamp(0, 1)
    return value[right - 1] + part * (value[right] - value[right - 1])


def table(weights: Callable[[int], float], time: int) -> Table:
    """The profile of a function of the iteration, from 0, over the iterations before a time."""
    points = _cells([float(time)]).tolist()
    masses = [float(weights(int((a + b - 1) / 2))) * (b - a) for a, b in pairwise(points)]
    parts = [0.0, *torch.tensor(masses, dtype=torch.float64).cumsum(0).tolist()]
    whole = parts[-1]
    if not 0 < whole < math.inf:
        raise ValueError(
            f"fused_ema.posthoc: the weights of iterations 0 to {time - 1} add up to {whole}; they "
            "must add up to a finite number above 0"
        )
    return Table(tuple(points), tuple(part / whole for part in parts))


def from_json(content: Mapping[str, Any], time: int) -> Saved:
    """The profile of an average of that time, from what stands in a file.

    Raises:
        KeyError: Something is missing, as TypeError and ValueError where it is something else.
    """
    kind = content["kind"]
    if kind == "power":
        return Power(float(content["gamma"]), time)
    if kind == "mean":
        return Window(float(content["since"]), time)
    if kind == "kept":
        points, log_kept = (tuple(map(float, content[k])) for k in ("points", "log_kept"))
        if not points or len(points) != len(log_kept):
            raise ValueError(f"{len(points)} points with {len(log_kept)} values")
        return Kept(points, log_kept)
    raise ValueError(f"unknown kind {kind!r}")


class Momenta:
    """The profile of an average as it goes on, from the momenta of its updates."""

    def __init__(self, momentum: float | Schedule, interval: int, begin: int) -> None:
        self._momentum, self._interval, self._begin = momentum, interval, begin
        self._first = begin // interval
        # Of each update since the last copy, the log of what it and those before it have left.
        self._since = begin
        self._logs = [0.0]
        self._num_seen = 0

    def at(self, iteration: int) -> Saved | None:
        """The profile once so many iterations were offered; None before the first update."""
        time = iteration // self._interval * self._interval
        if time <= self._begin:
            return None
        gamma = gamma_of(self._momentum, self._interval)
        if gamma is not None and self._begin < self._interval:
            return Power(gamma, time)
        if not callable(self._momentum):
            num_updates = time // self._interval - self._first
            log = num_updates * math.log1p(-self._momentum)
            return Kept((float(self._begin), float(time)), (log, 0.0))
        return self._seen(self._momentum, iteration // self._interval - self._first)

    def _seen(self, momentum_at: Schedule, num_updates: int) -> Kept:
        k = self._interval
        for n in range(self._num_seen, num_updates):
            end = (self._first + n + 1) * k
            momentum = float(momentum_at(end - 1))
            if momentum == 1:
                self._since, self._logs = end, [0.0]
            else:
                self._logs.append(self._logs[-1] + math.log1p(-momentum))
        self._num_seen = num_updates
        last = len(self._logs) - 1
        chosen = _spread(last)
        first_update = (self._since // k + 1) * k
        times = [self._since if i == 0 else first_update + (i - 1) * k for i in chosen]
        # Logs fall, so that the weight kept since an update is that of the last over its own.
        kept = [self._logs[last] - self._logs[i] for i in chosen]
        return Kept(tuple(map(float, times)), tuple(kept))


def _spread(last: int) -> list[int]:
    """Some of the indices 0 to last: all of a few, else denser at both ends."""
    if last < _MAX_POINTS:
        return list(range(last + 1))
    third = _MAX_POINTS // 3
    steps = [round(last ** (i / third)) for i in range(third + 1)]
    even = (last * i // third for i in range(third + 1))
    return sorted({0, last, *even, *steps, *(last - step for step in steps)})


def gamma_of(momentum: float | Schedule, interval: int) -> float | None:
    """The exponent of a schedule that gives a power function at that interval, or None."""
    is_power = isinstance(momentum, partial) and momentum.func is schedules._power
    if not is_power or momentum.keywords["interval"] != interval:  # type: ignore[union-attr]
        return None
    return float(momentum.keywords["exponent"]) - 1  # type: ignore[union-attr]


def std_of_gamma(gamma: float) -> float:
    """The standard deviation of the times that a power function averages, over its length."""
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


# ---- inner products


def inner(profiles: Sequence[Profile]) -> Tensor:
    """The inner products of all pairs, in double: of densities over time.

    Of power functions alone by formula. Means over cells can only come nearer to each other, so
    that an error of these bounds that of the averages of any intervals.
    """
    if all(isinstance(profile, Power) for profile in profiles):
        return _of_powers(profiles)
    grid = _cells([b for profile in profiles for b in profile.breaks()])
    # What was there before the first iteration is no time; it weighs as one iteration does.
    starts = torch.tensor([profile.start for profile in profiles], dtype=torch.float64)
    found = torch.outer(starts, starts)
    for begin in range(0, len(grid) - 1, _BLOCK):
        edges = grid[begin : begin + _BLOCK + 1]
        masses = torch.stack([profile.below(edges).diff() for profile in profiles])
        masses /= edges.diff().sqrt()
        found += masses @ masses.T
    return found


def _of_powers(profiles: Sequence[Any]) -> Tensor:
    time, gamma = (
        torch.tensor([getattr(p, key) for p in profiles], dtype=torch.float64)
        for key in ("time", "gamma")
    )
    short, long = torch.minimum(time[:, None], time), torch.maximum(time[:, None], time)
    # The integral over the shorter one; the longer one has grown by its own exponent since.
    of_longer = torch.where(time[:, None] < time, gamma, gamma[:, None])
    products = (gamma[:, None] + 1) * (gamma + 1)
    return products * (short / long) ** of_longer / ((gamma[:, None] + gamma + 1) * long)


def _cells(breaks: Sequence[float]) -> Tensor:
    """Times from 0 to the last of the breaks, with all of them: each iteration, or some of many."""
    last = max(breaks)
    step = max(1, math.ceil(last / _MAX_CELLS))
    even = torch.arange(0, last, step, dtype=torch.float64)
    every = torch.cat([even, torch.tensor([0.0, *breaks], dtype=torch.float64)])
    ordered = every.sort().values
    return ordered[torch.cat([ordered.diff() > 0, torch.tensor([True])])]
