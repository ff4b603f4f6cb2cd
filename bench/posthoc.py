"""python -m bench posthoc: one training, and the averages of all lengths that come out of it.

The net and digits of `python -m bench train`, trained once. Its manager keeps two power functions,
of which snapshots are saved as it goes, with the means between them. Afterwards averages of many
widths are put together from the files and evaluated on images that the net hasn't seen: which
length would have been best. Three widths are averaged in the training as well, to see that what
comes out is what would have come of them.

Three epochs, after which the net still learns: a short average is noise, a long one is late. The
learning rate is that of `bench train`, or falls along half a cosine with --decay: of weights
that have come to rest an average is good for less.
"""

import argparse
import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fused_ema
from bench import report, train
from bench.train import BATCH_SIZE, LEARNING_RATE, SGD_MOMENTUM, Data
from fused_ema import posthoc, schedules
from fused_ema.__main__ import number

STDS = (0.05, 0.10)
TRACKED = (0.03, 0.075, 0.15)
WIDTHS = (0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.0625, 0.075, 0.1, 0.125, 0.15, 0.2, 0.25)


@dataclass(frozen=True)
class Settings:
    """How a run trains, and how often it saves."""

    epochs: int = 3
    num_snapshots: int = 32
    decay: bool = False
    seed: int = 0


def score(model: nn.Module, data: Data) -> dict[str, float]:
    """Accuracy and loss of a model as it is now."""
    model.eval()
    with torch.no_grad():
        scores = model(data.images)
    model.train()
    return {
        "accuracy": float((scores.argmax(1) == data.digits).double().mean()),
        "loss": float(nn.functional.cross_entropy(scores, data.digits)),
    }


def run(data: Data, test: Data, settings: Settings, folder: Path) -> dict[str, Any]:
    """Trains, and evaluates what comes out of the snapshots."""
    model = train.make_model(settings.seed)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, SGD_MOMENTUM)
    order = torch.Generator().manual_seed(settings.seed)

    def manager(std: float) -> fused_ema.EMAManager:
        return fused_ema.EMAManager(model, momentum_fun=schedules.power(std))

    num_steps = settings.epochs * -(-len(data.images) // BATCH_SIZE)
    saved, tracked = [manager(std) for std in STDS], {std: manager(std) for std in TRACKED}
    every = max(1, num_steps // settings.num_snapshots)
    snapshots = posthoc.Snapshots(saved, folder, every=every, at=[num_steps], means=True)
    step = 0
    for _ in range(settings.epochs):
        for batch in torch.split(torch.randperm(len(data.images), generator=order), BATCH_SIZE):
            if settings.decay:
                rate = (1 + math.cos(math.pi * step / num_steps)) / 2
                optimizer.param_groups[0]["lr"] = LEARNING_RATE * rate
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(data.images[batch]), data.digits[batch]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            for one in (*saved, *tracked.values()):
                one.update()
            step += 1
    del snapshots
    raw = score(model, test)
    other = train.make_model(settings.seed)
    curve = []
    for std in WIDTHS:
        found = posthoc.reconstruct(folder, std, into=other, max_error=math.inf)
        curve.append({"std": std, "error": found.error, "norm": found.norm, **score(other, test)})
    kept = []
    for std, one in tracked.items():
        one.copy_to(other)
        of_training = {n: e.double() for n, e in one.named_emas() if e.is_floating_point()}
        found = posthoc.reconstruct(folder, std, max_error=math.inf)
        off = sum(float((found.ema[n] - e).square().sum()) for n, e in of_training.items())
        size = sum(float(e.square().sum()) for e in of_training.values())
        kept.append({"std": std, "off_by": math.sqrt(off / size), **score(other, test)})
    return {
        "settings": {
            **asdict(settings),
            "stds": list(STDS),
            "num_steps": num_steps,
            "every": every,
            "learning_rate": LEARNING_RATE,
            "sgd_momentum": SGD_MOMENTUM,
            "batch_size": BATCH_SIZE,
            "num_trained": len(data.images),
            "num_tested": len(test.images),
        },
        "raw": raw,
        "curve": curve,
        "kept": kept,
    }


def tables(content: dict[str, Any]) -> list[report.Table]:
    """Accuracy and loss by width."""
    settings = content["settings"]
    rows = [("raw weights", "", *_scores(content["raw"]))]
    rows += [(f"std {r['std']:g}", f"{r['error']:.1e}", *_scores(r)) for r in content["curve"]]
    kept = [(f"std {r['std']:g}", f"{r['off_by']:.1e}", *_scores(r)) for r in content["kept"]]
    return [
        report.Table(
            f"From snapshots of std {' and '.join(map(str, settings['stds']))}, every "
            f"{settings['every']} of {settings['num_steps']} steps",
            ("average", "error", "accuracy", "loss"),
            tuple(rows),
        ),
        report.Table(
            "Kept in the training",
            ("average", "reconstructed is off by", "accuracy", "loss"),
            tuple(kept),
        ),
    ]


def _scores(r: dict[str, Any]) -> tuple[str, str]:
    return f"{r['accuracy']:.2%}", f"{r['loss']:.4f}"


def plot(content: dict[str, Any], path: Path) -> list[Path]:
    """Draws loss and accuracy on the test split over the width of the average."""
    figure, axes = report.pyplot().subplots(1, 2, figsize=(8.4, 3.4), layout="constrained")
    for axis, key, scale, label in (
        (axes[0], "accuracy", 100, "accuracy on the test split, %"),
        (axes[1], "loss", 1, "loss on the test split"),
    ):
        for name, rows, style in (
            ("from snapshots", content["curve"], {"marker": "o", "color": report.COLORS["kernel"]}),
            (
                "kept in the training",
                content["kept"],
                {"marker": "x", "linestyle": "", "color": "black", "markersize": 7},
            ),
        ):
            axis.plot(
                [r["std"] for r in rows],
                [scale * r[key] for r in rows],
                **{"markersize": 3.5, "label": name, **style},
            )
        axis.axhline(
            scale * content["raw"][key],
            color=report.COLORS["foreach"],
            linewidth=1.4,
            label="raw weights",
        )
        report.style(axis, "y")
        axis.set_xscale("log")
        axis.set_xticks([0.01, 0.02, 0.05, 0.1, 0.2], ["0.01", "0.02", "0.05", "0.1", "0.2"])
        axis.minorticks_off()
        axis.set_xlabel("width of the average: std relative to the run", fontsize=9)
        axis.set_ylabel(label, fontsize=9)
    axes[1].legend(frameon=False, fontsize=8)
    report.title(figure, "Digits: averages of all lengths from one training")
    return report.save(figure, path)


def main(argv: Sequence[str]) -> int:
    """Trains and evaluates; returns the exit status."""
    parser = argparse.ArgumentParser(
        "python -m bench posthoc",
        description="Trains a small net once with snapshots, and evaluates averages of all lengths "
        "that are put together from them.",
    )
    add = parser.add_argument
    defaults = Settings()
    add("--epochs", type=number(int, 1), default=defaults.epochs, help="(%(default)s)")
    add(
        "--snapshots",
        type=number(int, 1),
        default=defaults.num_snapshots,
        metavar="N",
        help="of the training (%(default)s)",
    )
    add("--decay", action="store_true", help="let the learning rate fall to 0")
    add("--seed", type=number(int, 0), default=defaults.seed, help="of weights and batches")
    add("--threads", type=number(int, 1), default=1, help="of torch (%(default)s)")
    report.add_json(parser)
    report.add_plot(parser)
    args = parser.parse_args(argv)
    if report.find("sklearn") is None:
        parser.error("the digits come with scikit-learn: pip install scikit-learn")
    if args.plot and (reason := report.why_no_plot()):
        parser.error(f"--plot {reason}")
    settings = Settings(args.epochs, args.snapshots, args.decay, args.seed)
    data, test = train.load_data()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder, report.measuring(torch.device("cpu")) as facts:
        content = run(data, test, settings, Path(folder))
    for table in tables(content):
        report.show(table)
    if args.json:
        report.write_json(args.json, facts, content)
    if args.plot:
        plot(content, args.plot)
    return 0
