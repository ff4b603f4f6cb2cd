"""Any average from snapshots, after the training; and the merging of plain checkpoints."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from fused_ema import _checks, _safetensors
from fused_ema._format_errors import FormatError
from fused_ema.formats._files import Replacing
from fused_ema.manager import EMAManager
from fused_ema.posthoc import _files
from fused_ema.posthoc._files import READ, Found, Snapshot
from fused_ema.posthoc._profiles import Halving, Power, Profile, Window, std_of_gamma, table
from fused_ema.posthoc._solve import Solution, solve
from fused_ema.posthoc._sum import Progress, Sum
from fused_ema.schedules import _gamma_of_std

Files = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]
Into = str | os.PathLike[str] | nn.Module | EMAManager | None

MAX_ERROR = 0.1
_MAX_STD = 12**-0.5


@dataclass(frozen=True)
class Reconstruction:
    """An average that was put together.

    Attributes:
        target: What was asked for, in words.
        iteration: How many iterations it has seen.
        error: The relative error of its weights over the iterations: the norm of what they are off
            by over that of the wanted ones. Of weights that move at random about a point, the
            average has the noise of the wanted one times ``sqrt(1 + error ** 2)``, about.
        norm: The sum of the coefficients' sizes, 1 where none is negative.
        rounding: ``norm`` times the rounding of the files' dtype: what that adds, relative to the
            size of the weights.
        used: The files and their coefficients.
        ema: The average by name, where it wasn't written elsewhere. What isn't averaged is as in
            the last snapshot used.
        problems: Files that couldn't be read.
    """

    target: str
    iteration: int
    error: float
    norm: float
    rounding: float
    used: list[tuple[Path, float]]
    ema: dict[str, Tensor] = field(default_factory=dict, repr=False)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Target:
    """What is wanted, at an iteration: its profile and its words."""

    profile: Profile
    text: str

    @property
    def iteration(self) -> int:
        return int(self.profile.time)


def target_of(
    last: int,
    *,
    std: float | None = None,
    half_life: float | None = None,
    uniform: tuple[int, int] | None = None,
    linear_decay: tuple[int, int] | None = None,
    weights: Callable[[int], float] | None = None,
    at: int | None = None,
) -> Target:
    """The one that is given.

    Args:
        last: How many iterations the last snapshot has seen.
        std: As of :func:`reconstruct`, as the others are.
        half_life: The same.
        uniform: The same.
        linear_decay: The same.
        weights: The same.
        at: The same.
    """
    where = "posthoc.reconstruct"
    given = {
        name: value
        for name, value in (
            ("std", std),
            ("half_life", half_life),
            ("uniform", uniform),
            ("linear_decay", linear_decay),
            ("weights", weights),
        )
        if value is not None
    }
    if len(given) != 1:
        raise ValueError(
            f"fused_ema.{where}: {' and '.join(given) or 'nothing'} is asked for; pass one of std, "
            "half_life, uniform, linear_decay, weights"
        )
    window = uniform or linear_decay
    if window is not None:
        name = next(iter(given))
        begin, end = (_checks.count(where, name, value, 0) for value in window)
        if begin >= end or at not in (None, end):
            raise ValueError(
                f"fused_ema.{where}: {name} is {window}; it is (from, to), iterations of which the "
                "first is smaller, and at, where it is given, is the second"
            )
        at = end
    time = last if at is None else _checks.count(where, "at", at, 1)
    if time > last:
        raise ValueError(
            f"fused_ema.{where}: the average at iteration {time:,} is asked for, but the last "
            f"snapshot is of iteration {last:,}; ask for one up to that"
        )
    if window is not None:
        word = "linear decay" if linear_decay else "uniform"
        return Target(
            Window(window[0], time, 1 if linear_decay else 0),
            f"{word} over iterations {window[0]:,} to {time:,}",
        )
    if std is not None:
        checked = _checks.positive(where, "std", std)
        if checked > _MAX_STD:
            raise ValueError(
                f"fused_ema.{where}: std is {std}; it must be at most {_MAX_STD:.4f}, where all "
                "iterations weigh the same"
            )
        return Target(Power(_gamma_of_std(checked), time), f"std {std:g} at iteration {time:,}")
    if half_life is not None:
        checked = _checks.positive(where, "half_life", half_life)
        return Target(Halving(checked, time), f"half life {half_life:g} at iteration {time:,}")
    assert weights is not None
    return Target(table(weights, time), f"weights of a function at iteration {time:,}")


def usable(found: Found, target: Target) -> list[Snapshot]:
    """Those that are no later than the target.

    Raises:
        FormatError: There are none.
    """
    chosen = [s for s in found.snapshots if s.iteration <= target.iteration]
    if not chosen:
        first = found.snapshots[0].iteration
        raise FormatError(
            f"{READ}: the first snapshot is of iteration {first:,}, after {target.iteration:,}; "
            "ask for a later iteration"
        )
    return chosen


def solution_of(snapshots: Sequence[Snapshot], target: Target) -> Solution:
    """The best sum of some snapshots."""
    return solve(_profiles_of(snapshots), target.profile)


def _profiles_of(snapshots: Sequence[Snapshot]) -> list[Profile]:
    return [s.profile for s in snapshots if s.profile is not None]


def helpful(snapshots: Sequence[Snapshot], target: Target) -> str:
    """Which other snapshots would have made it better, in words."""
    own = _profiles_of(snapshots)
    end = target.profile.time
    gammas = sorted({profile.gamma for profile in own if isinstance(profile, Power)})
    times = sorted({profile.time for profile in own if profile.time <= end})
    bounds = [0.0, *times]
    has_means = any(isinstance(profile, Window) for profile in own)

    def powers(stds: Iterable[float], at: Iterable[float]) -> list[Profile]:
        return [Power(gamma, time) for time in at if time >= 1 for gamma in stds]

    offers: dict[str, list[Profile]] = {
        "snapshots twice as often": powers(gammas, ((a + b) / 2 for a, b in pairwise(bounds)))
    }
    wanted = target.profile
    if isinstance(wanted, Power):
        if wanted.gamma not in gammas:
            std = std_of_gamma(wanted.gamma)
            offers[f"an average of std {std:.3g} among them"] = powers(
                [wanted.gamma], [*times, end]
            )
    elif not has_means:
        offers["the means since the last snapshot (means=True)"] = [
            Window(a, b) for a, b in pairwise(bounds)
        ]
    if len(gammas) == 1:
        other = 0.05 if std_of_gamma(gammas[0]) > 0.07 else 0.10
        offers[f"a second average of std {other:.2f}"] = powers([_gamma_of_std(other)], times)
    if end not in times:
        offers[f"snapshots at iteration {end:,.0f}"] = powers(gammas, [end])
    if isinstance(wanted, Window) and wanted.since not in bounds:
        edge = powers(gammas, [wanted.since])
        if has_means:
            after = min((time for time in times if time > wanted.since), default=end)
            edge.append(Window(wanted.since, after))
        offers[f"snapshots at iteration {wanted.since:,.0f}"] = edge
    errors = [(solve([*own, *new], wanted).error, what) for what, new in offers.items() if new]
    return " or ".join(f"{what} ({error:.2g})" for error, what in sorted(errors)[:2])


def reconstruct(
    files: Files,
    std: float | None = None,
    *,
    half_life: float | None = None,
    uniform: tuple[int, int] | None = None,
    linear_decay: tuple[int, int] | None = None,
    weights: Callable[[int], float] | None = None,
    at: int | None = None,
    into: Into = None,
    average: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    max_error: float = MAX_ERROR,
    run: str | None = None,
    profiles: Sequence[float] = (),
    update_every: int = 1,
    progress: Progress | None = None,
) -> Reconstruction:
    """An average of any length from the snapshots of one training.

    One of the first five says what is wanted. The coefficients are those whose sum of the
    snapshots' profiles comes nearest to it, in the sense of least squares, and add up to 1. No
    snapshot of a later iteration is used, and each file is read once, in chunks.

    Source: T. Karras et al., Analyzing and Improving the Training Dynamics of Diffusion Models,
    2024, section 3.2 and algorithm 3 (power functions); here of any momenta and windows.

    Args:
        files: The folder of :class:`Snapshots`, or some of its files; a folder of ema-pytorch's
            PostHocEMA, with ``profiles``; training states of EDM2, which count images.
        std: A power function, by its standard deviation relative to the run: (0, 0.2887].
        half_life: Weights that halve every so many iterations, none of what was before the first.
        uniform: ``(from, to)``: the mean over the iterations after ``from`` up to ``to``.
        linear_decay: ``(from, to)``: weights that grow in a straight line from 0 at ``from``.
        weights: A function of the 0-based iteration, up to a factor. Of many iterations it is asked
            for some 32,768.
        at: The number of iterations that the average has seen; None for all up to the last
            snapshot.
        into: None to return it; a file's name for safetensors; a module, which it is written into
            by name; or a manager, whose average it becomes, with its iteration.
        average: Of a manager of several: which one.
        dtype: Of what is returned or written to a file; None for float32 (float64 of float64).
        device: Where it is computed; None for where it is written to.
        max_error: Above it a warning says which snapshots would have helped.
        run: Which run of several in the folder.
        profiles: Of ema-pytorch's files, which don't say: its ``sigma_rels``, in their order.
        update_every: Of ema-pytorch's files: the setting of that name.
        progress: Called with the elements done and all.

    Returns:
        What it is, how good it is, and of which files.

    Raises:
        FormatError: A ValueError: no snapshots, or of several runs, models or kinds.
        ValueError: Nothing or several things asked for; something out of its range.
        OSError: A file can't be opened or written.

    Warns:
        UserWarning: An error above ``max_error``; rounding above 1 %; files that can't be read.
    """
    found = _files.find(files, run=run, profiles=profiles, update_every=update_every)
    target = target_of(
        found.snapshots[-1].iteration,
        std=std,
        half_life=half_life,
        uniform=uniform,
        linear_decay=linear_decay,
        weights=weights,
        at=at,
    )
    snapshots = usable(found, target)
    solution = solution_of(snapshots, target)
    result = _result(found, snapshots, solution, target.text, target.iteration)
    _warn(result, snapshots, target, max_error)
    return _delivered(
        result, snapshots, solution.coefficients, into, dtype, device, progress, average
    )


def _result(
    found: Found, snapshots: Sequence[Snapshot], solution: Solution, text: str, iteration: int
) -> Reconstruction:
    rounding = sum(
        abs(c) * torch.finfo(s.precision).eps / 2
        for s, c in zip(snapshots, solution.coefficients, strict=True)
    )
    used = [(s.path, c) for s, c in zip(snapshots, solution.coefficients, strict=True) if c != 0]
    return Reconstruction(
        text, iteration, solution.error, solution.norm, rounding, used, problems=found.problems
    )


def _warn(
    result: Reconstruction, snapshots: Sequence[Snapshot], target: Target, max_error: float
) -> None:
    for line in result.problems:
        warnings.warn(f"{READ}: left out: {line}", stacklevel=3)
    if result.error > max_error:
        helps = helpful(snapshots, target)
        warnings.warn(
            f"{READ}: {result.target} has a relative error of {result.error:.2g} from these "
            f"{len(snapshots)} snapshots, above {max_error:g}"
            + (f"; what would have helped: {helps}" if helps else ""),
            stacklevel=3,
        )
    if result.rounding > 0.01:
        warnings.warn(
            f"{READ}: the files' rounding makes up to {result.rounding:.1%} of the weights' size: "
            f"they are {snapshots[-1].precision} and the coefficients' sizes add up to "
            f"{result.norm:.3g}; save float32, or ask for something wider",
            stacklevel=3,
        )


def _delivered(
    result: Reconstruction,
    snapshots: Sequence[Snapshot],
    coefficients: Sequence[float],
    into: Into,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    progress: Progress | None,
    average: str | None = None,
) -> Reconstruction:
    where = None if device is None else _checks.device("posthoc.reconstruct", device)
    total = Sum(snapshots, coefficients, dtype, where, progress)
    if into is None:
        result.ema.update(total.values())
    elif isinstance(into, EMAManager):
        interval, begin = into._interval, into._begin
        num_updates = max(0, result.iteration // interval - begin // interval)
        total.into_manager(into, average, result.iteration, num_updates)
    elif isinstance(into, nn.Module):
        total.into_module(into)
    else:
        metadata = {
            "format": "pt",
            "fused_ema.slot": "ema",
            "fused_ema.iteration": str(result.iteration),
            "fused_ema.reconstructed": f"{result.target}; relative error {result.error:.3g}",
        }
        if len(total.averaged) < len(total.names):
            metadata["fused_ema.averaged"] = json.dumps(total.averaged)
        layouts = {n: (total.dtype_of(n), tuple(total.shape_of(n))) for n in total.names}
        with Replacing(Path(into)) as file:
            _safetensors.write_stream(file, layouts, metadata, total.chunks)
    return result


# ---- merging

DECAYS: dict[str, Callable[[float], float]] = {
    # The rate that is left of the learning rate once that part of the window is over.
    "linear": lambda part: 1 - part,
    "cosine": lambda part: (1 + math.cos(math.pi * part)) / 2,
    "1-sqrt": lambda part: 1 - math.sqrt(part),
}
HOW = ("uniform", *DECAYS)


def merging_coefficients(how: str, number: int) -> list[float]:
    """Those of checkpoints at equal distances, the first one first.

    A merge of checkpoints with coefficients c is the training in which the update before checkpoint
    j had the part ``w[j] = c[j] + ... + c[-1]`` of its learning rate: WSM's equivalence. So they
    are the steps by which the decay falls.
    """
    if how == "uniform":
        return [1 / number] * number
    left = [DECAYS[how](j / number) for j in range(number)] + [0.0]
    return [a - b for a, b in pairwise(left)]


def merge(
    files: Files,
    how: str | Sequence[float] = "uniform",
    *,
    last: int | None = None,
    into: str | os.PathLike[str] | nn.Module | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> Reconstruction:
    """Merges plain checkpoints: the weights as they were at some iterations.

    Uniform is latest weight averaging (LAWA), and what model soups and checkpoint averaging do. The
    decays are those of WSM: what a training would have come to whose learning rate had fallen like
    that over the checkpoints, to first order. Each checkpoint has the noise of one: of n of them
    a part of ``n ** -0.5`` is left. The means that :class:`Snapshots` saves leave far less.

    Source: J. Kaddour, Stop Wasting My Time! Saving Days of ImageNet and BERT Training with Latest
    Weight Averaging, 2022; C. Tian et al., WSM: Decay-Free Learning Rate Schedule via Checkpoint
    Merging for LLM Pre-training, 2025, theorem of section 3.

    Args:
        files: A folder, whose files are ordered by the number in their names, or files in their
            order. Safetensors, or torch's files with a state_dict.
        how: ``"uniform"``, ``"linear"``, ``"cosine"``, ``"1-sqrt"``, or a coefficient for each.
        last: Only the last so many.
        into: As of :func:`reconstruct`.
        dtype: As of :func:`reconstruct`.
        device: As of :func:`reconstruct`.
        progress: As of :func:`reconstruct`.

    Returns:
        As :func:`reconstruct`; its ``error`` is 0: it is what was asked for.

    Raises:
        FormatError: A ValueError: no plain checkpoints, or of several models.
        ValueError: An unknown ``how``, another number of coefficients than of files.
        OSError: A file can't be opened or written.
    """
    found = _files.find(files, plain=True)
    snapshots = found.snapshots
    if last is not None:
        snapshots = snapshots[-_checks.count("posthoc.merge", "last", last, 1) :]
    if isinstance(how, str):
        if how not in HOW:
            raise ValueError(
                f"fused_ema.posthoc.merge: how is {how!r}; choose from {', '.join(HOW)}, or pass "
                "the coefficients"
            )
        coefficients = merging_coefficients(how, len(snapshots))
    else:
        coefficients = [float(value) for value in how]
        if len(coefficients) != len(snapshots):
            raise ValueError(
                f"fused_ema.posthoc.merge: {len(coefficients)} coefficients for {len(snapshots)} "
                "checkpoints; pass one for each"
            )
        how = "given"
    norm = sum(map(abs, coefficients))
    solution = Solution(coefficients, 0.0, norm)
    text = f"{how} merge of {len(snapshots)} checkpoints"
    result = _result(found, snapshots, solution, text, snapshots[-1].iteration)
    for line in result.problems:
        warnings.warn(f"{READ}: left out: {line}", stacklevel=2)
    return _delivered(result, snapshots, coefficients, into, dtype, device, progress)
