"""python -m bench averages: what averages hold, and what snapshots give, on paper.

The tables and pictures of docs/choosing-an-average.md are this command's; nothing is measured.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import report
from bench.gpu import verdict
from fused_ema import schedules
from fused_ema.posthoc._profiles import Halving, Power, Profile, Window
from fused_ema.posthoc._solve import solve

SPAN = 10_000
# With a snapshot where the last fifth begins.
NUMBERS = (10, 20, 40, 80)
KINDS = {
    "two averages": ((0.05, 0.10), False),
    "three averages": ((0.04, 0.08, 0.16), False),
    "means alone": ((), True),
    "one and means": ((0.05,), True),
    "two and means": ((0.05, 0.10), True),
}
_LAST_FIFTH = "the last fifth"


def power(std: float, time: float = SPAN) -> Power:
    """A power function of that width."""
    return Power(schedules._gamma_of_std(std), time)


def wanted() -> dict[str, Profile]:
    """What is asked of snapshots."""
    return {
        **{f"std {std:g}": power(std) for std in (0.03, 0.075, 0.15)},
        "half life of 5 %": Halving(0.05 * SPAN, SPAN),
        f"mean of {_LAST_FIFTH}": Window(0.8 * SPAN, SPAN),
        f"linear over {_LAST_FIFTH}": Window(0.8 * SPAN, SPAN, 1),
    }


def saved(kind: str, number: int) -> list[Profile]:
    """What so many snapshots at equal distances hold."""
    stds, has_means = KINDS[kind]
    times = [SPAN * (i + 1) / number for i in range(number)]
    found: list[Profile] = [power(std, time) for time in times for std in stds]
    if has_means:
        found += [Window(time - SPAN / number, time) for time in times]
    return found


def half_lives() -> report.Table:
    """Decays, half lives and how many independent steps an average is worth."""
    rows = []
    for momentum in (0.1, 0.01, 0.001, 0.0002, 0.0001):
        half_life = math.log(2) / -math.log1p(-momentum)
        rows.append(
            (
                f"{1 - momentum:g}",
                f"{momentum:g}",
                f"{half_life:,.0f}",
                f"{(1 - momentum) / momentum:,.0f}",
                f"{(2 - momentum) / momentum:,.0f}",
            )
        )
    columns = ("decay", "momentum", "half life, steps", "mean age, steps", "as the mean of, steps")
    return report.Table("Constant momenta", columns, tuple(rows))


def widths() -> report.Table:
    """The same of power functions, as parts of the run."""
    rows = []
    for std in (0.02, 0.05, 0.10, 0.15, 0.25):
        gamma = power(std).gamma
        worth = (2 * gamma + 1) / (gamma + 1) ** 2
        rows.append((f"{std:g}", f"{gamma:.2f}", f"{1 / (gamma + 2):.1%}", f"{worth:.1%}"))
    columns = ("std", "gamma", "mean age, of the run", "as the mean of, of the run")
    return report.Table("Power functions", columns, tuple(rows))


def errors() -> report.Table:
    """The relative error of each target, by what is saved."""
    rows = [
        (
            name,
            kind,
            *(_shown(solve(saved(kind, number), target).error) for number in NUMBERS),
        )
        for name, target in wanted().items()
        for kind in KINDS
    ]
    columns = ("wanted", "saved", *(f"{number} snapshots" for number in NUMBERS))
    return report.Table("Relative errors", columns, tuple(rows))


def _shown(error: float) -> str:
    return "0" if error < 1e-6 else f"{error:.1g}"


def plot(path: Path) -> list[Path]:
    """Draws the weights of some averages over the iterations, of a run and of one twice as long."""
    figure, axes = report.pyplot().subplots(
        1, 2, figsize=(8.8, 3.2), sharey=True, layout="constrained"
    )
    colors = ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677")
    for axis, span in zip(axes, (SPAN, 2 * SPAN), strict=True):
        averages: dict[str, Profile] = {
            "half life 700 (momentum 0.001)": Halving(700, span),
            "power(0.05)": power(0.05, span),
            "power(0.10)": power(0.10, span),
            "mean of the last fifth": Window(0.8 * span, span),
            "mean of all (swa)": Window(0, span),
        }
        edges = torch.linspace(0, span, 401, dtype=torch.float64)
        for (label, profile), color in zip(averages.items(), colors, strict=True):
            density = profile.below(edges).diff() / edges.diff()
            axis.stairs(
                1000 * density,
                edges,
                baseline=None,
                label=label,
                color=color,
                linewidth=1.8,
            )
        report.style(axis, "y")
        axis.set_xlabel("iteration", fontsize=9)
        axis.set_title(f"after {span:,} iterations", fontsize=9, loc="left")
        axis.set_ylim(0, 2)
        axis.set_xticks([span * part // 4 for part in range(5)])
    axes[0].set_ylabel("weight of 1,000 iterations", fontsize=9)
    axes[0].legend(frameon=False, fontsize=8, loc="upper left")
    report.title(figure, "What an average is made of")
    return report.save(figure, path)


def main(argv: Sequence[str]) -> int:
    """Prints the tables as the page has them; returns the exit status."""
    parser = argparse.ArgumentParser(
        "python -m bench averages",
        description="What averages hold, and the errors of what snapshots give: computed.",
    )
    report.add_plot(parser)
    args = parser.parse_args(argv)
    if args.plot and (reason := report.why_no_plot()):
        parser.error(f"--plot {reason}")
    print(*map(verdict.markdown, (half_lives(), widths(), errors())), sep="\n\n")
    if args.plot:
        plot(args.plot)
    return 0
