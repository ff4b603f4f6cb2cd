"""python -m bench train: a real training, averaged by the naive loop and by the manager.

It shows that replacing the loop by `fused_ema.EMAManager` changes no result, and what each takes
beside a training step. One small convolutional net with BatchNorm learns scikit-learn's digits (the
package brings its 1,797 images along) twice, from the same weights, in the same order of batches:
once with `NaiveEMA`, the loop of OpenMMLab's hooks, once with the manager. After every epoch raw
weights and averages of the two must agree bit for bit, and so must their accuracies on images that
neither has seen; anything else is named and makes the run fail.

The two are trained step by step in turn, in an order that changes with the step, so that whatever
else the machine does hits both alike. On the CPU, where the averaging is done when the call
returns, and unasked with one thread: a second one has next to nothing to do in ops this small, and
where another program has its core the first one waits for it. The learning rate is so high that the
raw weights jump about and the average is better.
"""

import argparse
import importlib
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fused_ema
from bench import report
from bench.timer import Timing, percentile
from fused_ema.__main__ import number
from fused_ema.testing import assert_bits_equal

# The rest is the test split. The images stand in the order of their writers, so that most of those
# who wrote the test's digits are strangers to the net.
NUM_TRAINED = 1200
BATCH_SIZE = 16
LEARNING_RATE = 0.5
SGD_MOMENTUM = 0.9
_CPU = torch.device("cpu")

Values = dict[str, Tensor]


@dataclass(frozen=True)
class Settings:
    """How a run trains and averages."""

    epochs: int = 15
    momentum: float = 0.02
    interval: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Data:
    """Images of 8 x 8 in [0, 1], with one channel, and which digits they are."""

    images: Tensor
    digits: Tensor


# ---- what is trained


def load_data() -> tuple[Data, Data]:
    """The digits as a train and a test split, always the same."""
    digits = importlib.import_module("sklearn.datasets").load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).div_(16).unsqueeze_(1)
    targets = torch.tensor(digits.target)
    return (
        Data(images[:NUM_TRAINED], targets[:NUM_TRAINED]),
        Data(images[NUM_TRAINED:], targets[NUM_TRAINED:]),
    )


def make_model(seed: int) -> nn.Module:
    """The net, with the weights of that seed."""

    def block(num_in: int, num_out: int, stride: int) -> list[nn.Module]:
        convolution = nn.Conv2d(num_in, num_out, 3, stride, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(num_out), nn.ReLU()]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            *block(1, 16, 1),
            *block(16, 32, 2),
            *block(32, 64, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, 10),
        )


class NaiveEMA:
    """What OpenMMLab's MMDetection 2.x does: entry by entry of the model's state.

    Integer entries stay as they were first cloned, and are swapped like all others.
    """

    def __init__(self, model: nn.Module, momentum: float, interval: int = 1) -> None:
        # Its entries are the model's own memory, so that one call is enough.
        self.entries: Values = model.state_dict()
        self.ema: Values = {name: entry.clone() for name, entry in self.entries.items()}
        self._momentum = momentum
        self._interval = interval
        self._iteration = 0

    def update(self) -> None:
        """Averages, where the interval says so."""
        self._iteration += 1
        if self._iteration % self._interval:
            return
        for name, entry in self.entries.items():
            if entry.is_floating_point():
                self.ema[name].mul_(1 - self._momentum).add_(entry, alpha=self._momentum)

    def swap(self) -> None:
        """Exchanges averages and weights."""
        for name, entry in self.entries.items():
            raw = entry.clone()
            entry.copy_(self.ema[name])
            self.ema[name].copy_(raw)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The model holds the averages inside of the `with`."""
        self.swap()
        try:
            yield
        finally:
            self.swap()


@dataclass(eq=False)
class Training:
    """One of the two trainings, and how long each of its steps took, in seconds."""

    model: nn.Module
    average: NaiveEMA | fused_ema.EMAManager
    optimizer: torch.optim.Optimizer
    order: torch.Generator
    ema_s: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)

    def batches(self, num_images: int) -> tuple[Tensor, ...]:
        """The indices of an epoch's batches."""
        return torch.split(torch.randperm(num_images, generator=self.order), BATCH_SIZE)

    def step(self, images: Tensor, digits: Tensor) -> None:
        """One step of the optimizer, and the averaging after it."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(images), digits).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        stepped = time.perf_counter()
        self.average.update()
        end = time.perf_counter()
        self.ema_s.append(end - stepped)
        self.step_s.append(end - start)

    def values(self) -> Values:
        """What the model holds now."""
        return {name: entry.clone() for name, entry in self.model.state_dict().items()}

    def accuracy(self, data: Data) -> float:
        """The part of the images whose digit the model, as it is now, tells right."""
        self.model.eval()
        with torch.no_grad():
            guessed = self.model(data.images).argmax(1)
        self.model.train()
        return float((guessed == data.digits).double().mean())


@dataclass(frozen=True)
class View:
    """A training after an epoch: raw, swapped, and swapped back."""

    raw_accuracy: float
    raw: Values
    ema_accuracy: float
    ema: Values
    back: Values


def look(training: Training, data: Data) -> View:
    """Evaluates raw weights and average."""
    raw, raw_accuracy = training.values(), training.accuracy(data)
    with training.average.swapped():
        ema, ema_accuracy = training.values(), training.accuracy(data)
    return View(raw_accuracy, raw, ema_accuracy, ema, training.values())


# ---- the run


def make_trainings(settings: Settings) -> dict[str, Training]:
    """The two trainings, which differ in who averages."""

    def training(model: nn.Module, average: NaiveEMA | fused_ema.EMAManager) -> Training:
        return Training(
            model,
            average,
            torch.optim.SGD(model.parameters(), LEARNING_RATE, SGD_MOMENTUM),
            torch.Generator().manual_seed(settings.seed),
        )

    naive, model = make_model(settings.seed), make_model(settings.seed)
    manager = fused_ema.EMAManager(
        model,
        settings.momentum,
        settings.interval,
        form="mul_add",
        ema_dtype="param",
        buffers="average",
    )
    return {
        "naive": training(naive, NaiveEMA(naive, settings.momentum, settings.interval)),
        "manager": training(model, manager),
    }


def differences(naive: Values, manager: Values, what: str) -> list[str]:
    """Every entry that isn't the same bit for bit."""
    if naive.keys() != manager.keys():
        return [f"{what}: other names, {sorted(naive.keys() ^ manager.keys())}"]
    found = []
    for name, expected in naive.items():
        if expected.is_floating_point():
            try:
                assert_bits_equal(manager[name], expected, f"{what} '{name}'")
            except AssertionError as error:
                found.append(str(error))
        elif not torch.equal(manager[name], expected):
            found.append(f"{what} '{name}': {manager[name]} against {expected}")
    return found


def compare(naive: View, manager: View) -> list[str]:
    """What of the two isn't the same after an epoch; the manager's figures come first."""
    if found := differences(naive.raw, manager.raw, "raw weight"):
        # Then the averages differ too, whoever made them.
        return ["the two trainings went apart, so that their averages tell nothing", *found]
    found = differences(naive.ema, manager.ema, "average")
    for name, view in (("naive", naive), ("manager", manager)):
        found += differences(view.raw, view.back, f"{name}: swapped back, weight")
    if naive.raw_accuracy != manager.raw_accuracy:
        found.append(f"raw accuracy: {manager.raw_accuracy} against {naive.raw_accuracy}")
    if naive.ema_accuracy != manager.ema_accuracy:
        found.append(f"EMA accuracy: {manager.ema_accuracy} against {naive.ema_accuracy}")
    return found


def run(train: Data, test: Data, settings: Settings) -> dict[str, Any]:
    """Trains both and returns what the JSON file holds, without the environment."""
    trainings = make_trainings(settings)
    state = next(iter(trainings.values())).model.state_dict()
    num_images = len(train.images)
    epochs: list[report.Record] = []
    failures: list[str] = []
    for epoch in range(1, settings.epochs + 1):
        orders = {name: training.batches(num_images) for name, training in trainings.items()}
        for i in range(len(orders["naive"])):
            for name in random.Random(f"{epoch} {i}").sample(list(trainings), len(trainings)):
                batch = orders[name][i]
                trainings[name].step(train.images[batch], train.digits[batch])
        views = {name: look(training, test) for name, training in trainings.items()}
        found = compare(views["naive"], views["manager"])
        if not failures:  # What differs once goes on to differ.
            failures = [f"epoch {epoch}, {line}" for line in found]
        figures = {
            name: {"raw_accuracy": view.raw_accuracy, "ema_accuracy": view.ema_accuracy}
            for name, view in views.items()
        }
        epochs.append({"epoch": epoch, **figures, "bits_equal": not found})

    # Steps that the interval skips have nothing to time.
    updated = slice(settings.interval - 1, None, settings.interval)
    ema = {name: _timing(training.ema_s[updated]) for name, training in trainings.items()}
    return {
        "settings": {
            **asdict(settings),
            "form": "mul_add",
            "ema_dtype": "param",
            "optimizer": "SGD",
            "learning_rate": LEARNING_RATE,
            "sgd_momentum": SGD_MOMENTUM,
            "batch_size": BATCH_SIZE,
            "num_trained": num_images,
            "num_tested": len(test.images),
            "num_tensors": len(state),
            "num_elements": sum(entry.numel() for entry in state.values()),
        },
        "bits_equal": not failures,
        "failures": failures,
        "epochs": epochs,
        "ema_us": {name: report.microseconds(timing) for name, timing in ema.items()},
        "ratio": ema["naive"].median / ema["manager"].median,
        # Step by step, so that a step that something else held up counts as one step only.
        "ema_share_of_step": {
            name: percentile(
                [
                    ema_s / step_s
                    for ema_s, step_s in zip(
                        training.ema_s[updated], training.step_s[updated], strict=True
                    )
                ],
                50,
            )
            for name, training in trainings.items()
        },
    }


def _timing(seconds: Sequence[float]) -> Timing:
    p10, median, p90 = (percentile(seconds, percent) for percent in (10, 50, 90))
    return Timing(median, p10, p90, len(seconds))


# ---- what comes out


def tables(content: dict[str, Any]) -> list[report.Table]:
    """Accuracies by epoch, and times."""
    size = "{num_tested} test images".format(**content["settings"])
    epochs = report.Table(
        f"Digits: accuracy on {size}, raw and averaged weights",
        ("epoch", "raw", "EMA", "EMA better by", "bits agree"),
        tuple(
            (
                str(r["epoch"]),
                f"{r['manager']['raw_accuracy']:.2%}",
                f"{r['manager']['ema_accuracy']:.2%}",
                f"{r['manager']['ema_accuracy'] - r['manager']['raw_accuracy']:+.2%}",
                "yes" if r["bits_equal"] else "NO",
            )
            for r in content["epochs"]
        ),
    )
    times = report.Table(
        "Averaging after a step: {num_tensors} tensors, {num_elements:,} elements".format(
            **content["settings"]
        ),
        ("by", "us", "p10 - p90", "of the step", "manager is faster"),
        tuple(
            (
                {"naive": "naive loop", "manager": "fused_ema.EMAManager"}[name],
                f"{r['us']:.1f}",
                f"{r['us_p10']:.1f} - {r['us_p90']:.1f}",
                f"{content['ema_share_of_step'][name]:.2%}",
                f"{content['ratio']:.2f}x" if name == "naive" else "",
            )
            for name, r in content["ema_us"].items()
        ),
    )
    return [epochs, times]


def plot(content: dict[str, Any], path: Path) -> list[Path]:
    """Draws accuracy on the test split over epochs, raw against EMA weights."""
    figure, axis = report.pyplot().subplots(figsize=(6.2, 3.6), layout="constrained")
    epochs = [r["epoch"] for r in content["epochs"]]
    for key, label, color, width in (
        ("raw_accuracy", "raw weights", "foreach", 1.6),
        ("ema_accuracy", "EMA weights", "kernel", 2.2),
    ):
        percents = [100 * r["manager"][key] for r in content["epochs"]]
        axis.plot(
            epochs,
            percents,
            color=report.COLORS[color],
            linewidth=width,
            marker="o",
            markersize=3.5,
            label=label,
        )
    report.style(axis, "y")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel("epoch", fontsize=9)
    axis.set_ylabel("accuracy on the test split, %", fontsize=9)
    axis.legend(loc="lower right", frameon=False, fontsize=9)
    settings = content["settings"]
    axis.set_title(
        f"small convolutional net, SGD with learning rate {settings['learning_rate']}, EMA "
        f"momentum {settings['momentum']}",
        fontsize=9,
        loc="left",
    )
    report.title(figure, "Digits: test accuracy of raw weights and of their EMA")
    return report.save(figure, path)


def main(argv: Sequence[str]) -> int:
    """Trains and compares; returns the exit status."""
    parser = argparse.ArgumentParser(
        "python -m bench train",
        description="Trains a small net twice, averaged by the naive loop and by the manager: "
        "whether their bits agree, what each takes, and what the average is good for.",
    )
    add = parser.add_argument
    defaults = Settings()
    add("--epochs", type=number(int, 1), default=defaults.epochs, help="(%(default)s)")
    add(
        "--momentum",
        type=number(float, 1e-6, 0.999),
        default=defaults.momentum,
        help="(%(default)s)",
    )
    add("--interval", type=number(int, 1), default=defaults.interval, help="(%(default)s)")
    add("--seed", type=number(int, 0), default=defaults.seed, help="of weights and batches")
    add("--threads", type=number(int, 1), default=1, help="of torch (%(default)s)")
    report.add_json(parser)
    report.add_plot(parser)
    args = parser.parse_args(argv)
    if report.find("sklearn") is None:
        parser.error("the digits come with scikit-learn: pip install scikit-learn")
    if args.plot and (reason := report.why_no_plot()):
        parser.error(f"--plot {reason}")
    settings = Settings(args.epochs, args.momentum, args.interval, args.seed)
    train, test = load_data()
    num_steps = args.epochs * -(-len(train.images) // BATCH_SIZE)
    if args.interval > num_steps:
        parser.error(f"--interval {args.interval}: there are only {num_steps} steps")
    torch.set_num_threads(args.threads)

    with report.measuring(_CPU) as facts:
        content = run(train, test, settings)
    for table in tables(content):
        report.show(table)
    if content["bits_equal"]:
        print(
            f"bits agree: weights, averages and accuracies of both after each of {args.epochs} "
            "epochs"
        )
    if args.json:
        report.write_json(args.json, facts, content)
    if args.plot:
        plot(content, args.plot)
    report.warn_of_others(facts)
    return report.print_failures(content["failures"])
