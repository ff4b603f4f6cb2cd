"""``python -m fused_ema reconstruct`` and ``sweep``, and what ``inspect`` says of a folder."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import math
import re
import shlex
import subprocess
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fused_ema._format_errors import FormatError
from fused_ema._progress import Progress, shown_size
from fused_ema.posthoc import _files, _reconstruct
from fused_ema.posthoc._profiles import Power, Window, std_of_gamma

_STDS = (0.02, 0.03, 0.05, 0.075, 0.10, 0.15, 0.20)
_NUMBER = re.compile(r"[-+]?(?:(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|(?i:\b(?:nan|inf|infinity)\b))")


def add_commands(commands: Any) -> None:
    """Adds the commands to the parser's."""
    shared = argparse.ArgumentParser(add_help=False)
    add = shared.add_argument
    add("folder", type=Path, metavar="FOLDER", help="with snapshots")
    add("--at", type=int, metavar="ITERATION", help="of the average (the last snapshot's)")
    add_choice(shared)
    add("--update-every", type=int, default=1, help="of ema-pytorch's files (%(default)s)")

    one = commands.add_parser(
        "reconstruct",
        parents=[shared],
        help="put an average together from snapshots, or merge checkpoints",
    )
    wanted = one.add_mutually_exclusive_group(required=True)
    add = wanted.add_argument
    add("--std", type=float, help="a power function's width, relative to the run")
    add("--half-life", type=float, metavar="ITERATIONS")
    add("--uniform", type=_window, metavar="FROM:TO", help="the mean of these iterations")
    add("--linear-decay", type=_window, metavar="FROM:TO", help="weights that grow from 0 at FROM")
    add("--merge", choices=_reconstruct.HOW, help="of plain checkpoints")
    one.add_argument("output", type=Path, metavar="OUT.safetensors", help="is replaced")
    one.add_argument("--last", type=int, metavar="N", help="with --merge: of the last N alone")
    one.set_defaults(run_command=_reconstruct_command)

    sweep = commands.add_parser(
        "sweep",
        parents=[shared],
        help="evaluate averages of several lengths with a command of yours",
        epilog="The command is given each average as a safetensors file, in place of {} or at its "
        "end, and its score is the last number that it prints.",
    )
    add = sweep.add_argument
    add("--std", type=_range, required=True, metavar="FROM:TO:N", help="N widths, evenly in log")
    add("--eval", required=True, metavar="COMMAND")
    add("--lower-is-better", action="store_true", help="as of a loss")
    add("--plot", type=Path, metavar="FILE.png", help="draw the curve, with matplotlib")
    sweep.set_defaults(run_command=_sweep_command)


def add_choice(parser: argparse.ArgumentParser) -> None:
    """Adds what tells a folder's snapshots from others."""
    parser.add_argument("--run", help="of a folder of snapshots: which run of several")
    parser.add_argument(
        "--profiles",
        type=_numbers,
        default=(),
        metavar="STD,STD",
        help="of ema-pytorch's files: the PostHocEMA's sigma_rels, in their order",
    )


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def _window(text: str) -> tuple[int, int]:
    begin, end = text.split(":")
    return int(begin), int(end)


def _range(text: str) -> list[float]:
    low, high, number = text.split(":")
    first, last, num = float(low), float(high), int(number)
    if not 0 < first < last or num < 2:
        raise argparse.ArgumentTypeError(f"expected FROM:TO:N, as 0.02:0.2:8, got {text}")
    step = (last / first) ** (1 / (num - 1))
    return [float(f"{first * step**i:.4g}") for i in range(num)]


def _given(args: argparse.Namespace) -> dict[str, Any]:
    return {"run": args.run, "profiles": args.profiles, "update_every": args.update_every}


@contextmanager
def _told_once() -> Iterator[None]:
    """Warnings as lines of their own, each once."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for text in dict.fromkeys(str(one.message) for one in caught):
        print(f"warning: {text}")


def _described(result: _reconstruct.Reconstruction) -> str:
    return f"relative error {result.error:.2g}, sum of sizes {result.norm:.3g}"


# ---- reconstruct


def _reconstruct_command(args: argparse.Namespace) -> None:
    if not args.output.parent.is_dir():
        raise FormatError(f"'{args.output.parent}' is no folder")
    if args.last is not None and args.merge is None:
        raise FormatError("--last is for --merge; a window is --uniform FROM:TO")
    with Progress(f"writing {args.output.name}") as progress, _told_once():
        if args.merge is not None:
            result = _reconstruct.merge(
                args.folder, args.merge, last=args.last, into=args.output, progress=progress
            )
        else:
            result = _reconstruct.reconstruct(
                args.folder,
                args.std,
                half_life=args.half_life,
                uniform=args.uniform,
                linear_decay=args.linear_decay,
                at=args.at,
                into=args.output,
                progress=progress,
                **_given(args),
            )
    how_good = "" if args.merge else f", {_described(result)}"
    size = shown_size(args.output.stat().st_size)
    print(f"wrote {args.output}: {result.target}, of {len(result.used)} files{how_good}, {size}")


# ---- sweep


def _sweep_command(args: argparse.Namespace) -> None:
    if args.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise FormatError("--plot needs matplotlib: pip install matplotlib")
    print(f"{'std':>8}  {'error':>8}  score")
    scores = []
    with tempfile.TemporaryDirectory() as folder, _told_once():
        for std in args.std:
            path = Path(folder) / f"std-{std:g}.safetensors"
            result = _reconstruct.reconstruct(
                args.folder, std, at=args.at, into=path, max_error=float("inf"), **_given(args)
            )
            score = _score(args.eval, path)
            path.unlink()
            scores.append(score)
            print(f"{std:>8g}  {result.error:>8.2g}  {score:g}", flush=True)
    finite = [score for score in scores if math.isfinite(score)]
    if not finite:
        raise FormatError("--eval: no score is a finite number")
    best = min(finite) if args.lower_is_better else max(finite)
    std = args.std[scores.index(best)]
    print(f"best: std {std:g}, {best:g}")
    if std in (args.std[0], args.std[-1]):
        print("it is at the end of the range: look beyond it")
    if args.plot is not None:
        plot(args.std, scores, args.plot, best_at=std)
        print(f"wrote {args.plot}")


def _score(command: str, path: Path) -> float:
    words = shlex.split(command)
    called = [word.replace("{}", str(path)) for word in words]
    if called == words:
        called.append(str(path))
    done = subprocess.run(called, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise FormatError(
            f"--eval: '{called[0]}' ended with status {done.returncode}: "
            f"{lines[-1] if lines else 'it said nothing'}"
        )
    # The file's name has numbers of its own.
    numbers = _NUMBER.findall(done.stdout.replace(str(path), ""))
    if not numbers:
        raise FormatError(f"--eval: '{called[0]}' printed no number: {done.stdout.strip()[:80]!r}")
    return float(numbers[-1])


def plot(
    stds: Sequence[float], scores: Sequence[float], path: Path, *, best_at: float, label: str = ""
) -> None:
    """Draws a score over the averaging length."""
    importlib.import_module("matplotlib").use("agg")
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    figure, axis = pyplot.subplots(figsize=(6.2, 3.6), layout="constrained")
    axis.semilogx(stds, scores, marker="o", markersize=3.5)
    axis.axvline(best_at, linewidth=0.8, linestyle=":")
    axis.set_xticks(list(stds), [f"{std:g}" for std in stds], fontsize=8)
    axis.minorticks_off()
    axis.set_xlabel("width of the average (std relative to the run)", fontsize=9)
    axis.set_ylabel(label or "score", fontsize=9)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


# ---- inspect


def is_folder_of_snapshots(folder: Path) -> bool:
    """Whether a folder has snapshots of a kind that says of itself what it is."""
    return folder.is_dir() and any(
        _files.is_named_as_snapshot(path) for path in folder.iterdir() if path.is_file()
    )


def describe(folder: Path, run: str | None, profiles: Sequence[float]) -> list[str]:
    """What a folder of snapshots has, and what can be had of it, line by line."""
    found = _files.find(folder, run=run, profiles=profiles)
    snapshots = found.snapshots
    by_average: dict[str, list[_files.Snapshot]] = {}
    for snapshot in snapshots:
        by_average.setdefault(snapshot.average, []).append(snapshot)
    first, last = snapshots[0], snapshots[-1]
    sizes = sum(path.stat().st_size for path in {snapshot.path for snapshot in snapshots})
    lines = [
        ("folder", f"{folder} ({shown_size(sizes)})"),
        ("snapshots", f"{len(snapshots)} of {first.kind}{f', run {last.run}' if last.run else ''}"),
    ]
    for name, own in by_average.items():
        iterations = f"iterations {own[0].iteration:,} to {own[-1].iteration:,}"
        what = _words(own[-1])
        precision = str(own[-1].precision).removeprefix("torch.")
        lines.append((name, f"{len(own)}, {iterations}: {what}, {precision}"))
    for i, problem in enumerate(found.problems):
        lines.append(("left out" if i == 0 else "", problem))
    lines.append(("", ""))
    lines.append(("can be had", f"at iteration {last.iteration:,}:"))
    span = last.iteration
    offered: list[tuple[str, dict[str, Any]]] = [(f"--std {std:g}", {"std": std}) for std in _STDS]
    for part in (0.05, 0.2):
        begin = round(span * (1 - part))
        offered.append((f"--half-life {span * part:g}", {"half_life": span * part}))
        if begin < span:
            offered.append((f"--uniform {begin}:{span}", {"uniform": (begin, span)}))
            offered.append((f"--linear-decay {begin}:{span}", {"linear_decay": (begin, span)}))
    for text, asked in offered:
        target = _reconstruct.target_of(span, **asked)
        solution = _reconstruct.solution_of(snapshots, target)
        grade = "" if solution.error <= _reconstruct.MAX_ERROR else "  too far off"
        lines.append(
            ("", f"{text:<30}  error {solution.error:<8.2g}  sizes {solution.norm:.3g}{grade}")
        )
    return [f"{label:<12}{text}".rstrip() for label, text in lines]


def _words(snapshot: _files.Snapshot) -> str:
    profile = snapshot.profile
    if isinstance(profile, Power):
        return f"a power function of std {std_of_gamma(profile.gamma):.4g}"
    if isinstance(profile, Window):
        return "means since the snapshot before"
    return "by the momenta of its updates"
