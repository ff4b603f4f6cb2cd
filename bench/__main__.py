"""python -m bench: measures fused_ema against torch on this machine.

The default command measures single ops; each other command has a module of its name, here or in
bench/gpu. Each job is one table: a case, a dtype pair and an op. Its providers are checked against
float64, then timed in turn (bench/timer.py says how); a provider with wrong values is named, not
timed, and makes the run fail.
"""

import argparse
import importlib
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import cases, picture, providers, report, timer
from bench.cases import Case
from bench.providers import OPS, Call, Lists, Op, Provider
from fused_ema.__main__ import number

# What runs unasked: (op, dtype pair, cases), None for all cases.
Row = tuple[Op, str, tuple[str, ...] | None]
DEFAULT_ROWS: tuple[Row, ...] = (
    ("update", "float32/float32", None),
    ("update", "float32/bfloat16", ("vit_l16", "sdxl_unet", "llama3_8b", "medium")),
    ("update", "bfloat16/bfloat16", ("vit_l16",)),
    ("swap", "float32/float32", ("resnet50", "sdxl_unet", "small")),
    ("copy", "float32/float32", ("resnet50", "small")),
    ("copy", "float32/bfloat16", ("vit_l16",)),
)
# Also, by device type. On a GPU sets of 10,000 tensors that leave its cache take long to make, and
# misalignment costs other instructions in each dtype pair.
MORE_ROWS: dict[str, tuple[Row, ...]] = {
    "cpu": (
        ("update", "float32/bfloat16", ("small",)),
        ("update", "bfloat16/bfloat16", ("small",)),
    ),
    "cuda": (
        ("update", "float32/bfloat16", ("odd", "even", "misaligned", "single")),
        ("update", "bfloat16/bfloat16", ("sdxl_unet", "medium", "misaligned", "single")),
        ("swap", "float32/float32", ("vit_l16", "single")),
        ("swap", "bfloat16/bfloat16", ("vit_l16",)),
        ("copy", "float32/float32", ("single",)),
    ),
}
# Also, on a CPU, what a training sees: (pause in ms, load) of hot updates of these lists.
TRAINING_CASES = ("small", "medium")
TRAINING_CONDITIONS = ((20.0, "none"), (0.0, "cores"), (20.0, "cores"))
TRAINING_PROVIDERS = [providers.PLAN, providers.ONE_THREAD, "foreach lerp_"]
# 1/8 is exact in every dtype, and far above the rounding of bf16: a provider that does nothing
# fails its check.
DEFAULT_MOMENTUM = 0.125
DEFAULT_SECONDS = 170.0
_OVERRUN = 1.15  # No job starts later than this many times the seconds of the run.
# A CPU moves about a hundredth of what a GPU does in the same time.
DEFAULT_MAX_ELEMENTS = {"cpu": 2**26, "cuda": 2**30}
_MEMORY_SHARE = 0.6
_RESERVED_BYTES = 2**30


class Job(NamedTuple):
    """One table to measure."""

    case: str
    pair: str
    op: Op
    pause_ms: float = 0.0
    load: str = "none"

    @property
    def is_back_to_back(self) -> bool:
        """Whether its calls come one after the other with the machine to themselves."""
        return self.pause_ms == 0 and self.load == "none"

    def __str__(self) -> str:
        pause = f" after {self.pause_ms:g} ms" if self.pause_ms else ""
        load = f" beside load on the {self.load}" if self.load != "none" else ""
        return f"{self.case} {self.op} {self.pair}{pause}{load}"


@dataclass(frozen=True)
class Settings:
    """How a run measures, whatever its jobs."""

    device: torch.device
    momentum: float
    max_elements: int
    memory_bytes: int
    seconds: float
    rounds: int | None
    providers: list[str] | None


@dataclass
class Outcome:
    """What a run found."""

    records: list[report.Record] = field(default_factory=list)
    left_out: dict[str, None] = field(default_factory=dict)  # A set that keeps the order.
    failures: list[str] = field(default_factory=list)


# ---- what to run


def plan_jobs(
    case_names: Sequence[str] | None,
    ops: Sequence[Op] | None,
    pairs: Sequence[str] | None,
    device_type: str,
    pauses_ms: Sequence[float] | None = None,
    loads: Sequence[str] | None = None,
) -> list[Job]:
    """The jobs of a run, those on the same tensors together.

    Without all but cases a case gets its rows of DEFAULT_ROWS and MORE_ROWS, and those for
    trainings; with any, every combination.
    """
    chosen = case_names or cases.names()
    if ops or pairs or pauses_ms or loads:
        kinds = product(pairs or ["float32/float32"], chosen, ops or OPS[:1])
        whens = list(product(pauses_ms or [0.0], loads or ["none"]))
        return [Job(case, pair, op, *when) for pair, case, op in kinds for when in whens]
    jobs = [
        Job(case, pair, op)
        for case in chosen
        for op, pair, row_cases in (*DEFAULT_ROWS, *MORE_ROWS[device_type])
        if row_cases is None or case in row_cases
    ]
    if device_type == "cpu":
        jobs += [
            Job(case, "float32/float32", "update", *when)
            for case in chosen
            if case in TRAINING_CASES
            for when in TRAINING_CONDITIONS
        ]
    # By dtype pair first: a slow machine that runs out of time has then seen every case.
    order = providers.DTYPE_PAIRS.index
    return sorted(jobs, key=lambda job: (order(job.pair), chosen.index(job.case)))


def available_bytes(device: torch.device) -> int:
    """Memory that can still be allocated."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    amounts = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                amounts.append(int(line.split()[1]) * 1024)
        group = Path("/sys/fs/cgroup")  # A container's limit, which meminfo doesn't know.
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            amounts.append(int(limit) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return min(amounts, default=2**32)


def fit(job: Job, settings: Settings) -> tuple[Case | None, str]:
    """The job's case, scaled down where memory or time ask for it; or None and why."""
    ema, param = (dtype.itemsize for dtype in providers.split_pair(job.pair))
    # The lists, the limits' flat pair (while it is made its params are there twice), and the
    # buffer of a provider that has one.
    per_element = (ema + param) + (2 * ema + param) + max(ema, 4)
    most = max(0, settings.memory_bytes - _RESERVED_BYTES) // per_element
    case = cases.load(job.case, max(1, min(most, settings.max_elements)))
    if case.num_elements > most:
        needed = (case.num_elements * per_element + _RESERVED_BYTES) / 2**30
        have = settings.memory_bytes / 2**30
        return None, f"needs {needed:.1f} GiB of memory even scaled down, {have:.1f} are free"
    return case, ""


# ---- one job


def prepare_checked(
    provider: Provider, sets: Sequence[Lists], momentum: float
) -> tuple[list[Call], str]:
    """The provider's calls, one a set, after a first run on set 0 gave right values.

    Returns no calls and what is wrong otherwise.
    """
    target = provider.target(sets[0])
    call = provider.prepare(target, momentum)
    # What is timed is a replay, so a replay is checked.
    checked = providers.captured([call]) if provider.is_captured else call
    # However long the last provider averaged, ema and param differ again.
    torch._foreach_neg_(target.ema)
    before = timer.sample(target)
    wrong = "it did not finish"
    try:
        checked()
        wrong = timer.check(provider.op, before, timer.sample(target), momentum)
    finally:
        if wrong:  # It may have left anything, and the next provider runs on the same tensors.
            for tensor in (*target.ema, *target.params):
                tensor.normal_(std=0.02)
    if wrong:
        return [], wrong
    others = (provider.prepare(provider.target(lists), momentum) for lists in sets[1:])
    return [call, *others], ""


def as_nodes(provider: Provider, calls: Sequence[Call]) -> list[Call]:
    """The calls to time: those of a captured provider are nodes of one graph."""
    return [providers.chain(calls)] * len(calls) if provider.is_captured else [*calls]


def run_job(
    job: Job, case: Case, sets: Sequence[Lists], cold: bool, seconds: float, settings: Settings
) -> Outcome:
    """Checks and times the providers of one table."""
    start = time.perf_counter()
    outcome = Outcome()
    chosen: dict[str, Provider] = {}
    calls: dict[str, list[Call]] = {}
    device = settings.device
    wanted = settings.providers or (None if job.is_back_to_back else TRAINING_PROVIDERS)
    for provider in providers.choose(job.op, job.pair, device.type, wanted):
        where = f"{provider.name} on {job}"
        if reason := provider.why_not(device.type):
            outcome.left_out[f"{provider.name}: {reason}"] = None
            continue
        try:
            with timer.limit(provider.limit_s):
                own, wrong = prepare_checked(provider, sets, settings.momentum)
        except Exception as error:  # A package of any version may fail in any way.
            message = (str(error) or type(error).__name__).splitlines()[0]
            if provider.kind in ("torch", "triton"):
                outcome.left_out[f"{where}: {message}"] = None
            else:
                outcome.failures.append(f"{where}: {message}")
            continue
        if wrong:
            outcome.failures.append(f"{where}: {wrong}")
            continue
        chosen[provider.name] = provider
        calls[provider.name] = own
    if not calls:
        return outcome

    left = max(0.0, seconds - (time.perf_counter() - start))
    first = {name: as_nodes(chosen[name], own[:1]) for name, own in calls.items()}
    calls = {name: as_nodes(chosen[name], own) for name, own in calls.items()}
    host_s, host_cold_s, wall_s = {}, {}, {}
    clock: timer.Clock = timer.CpuClock()
    if device.type == "cuda":
        host_s = _medians(first, timer.HostClock(), 0.1 * left, settings)
        if len(sets) > 1:
            host_cold_s = _medians(calls, timer.HostClock(), 0.1 * left, settings)
        wall_s = _medians(calls, timer.WallClock(), 0.1 * left, settings)
        clock = timer.CudaClock()
    elif not job.is_back_to_back:
        clock = timer.CpuClock(job.pause_ms / 1e3)
        cold = False
    else:
        small = _one_element_calls(job, case, chosen, settings)
        host_s = _medians(small, clock, 0.15 * left, settings)
    hot = not cold or sum(_num_bytes(lists) for lists in sets[:1]) < timer.HOT_BYTES
    for cache in ["cold"] * cold + ["hot"] * hot:
        with timer.beside(job.load):
            timings = timer.interleave(
                calls if cache == "cold" else first,
                clock,
                seconds=0.7 * left / (cold + hot),
                rounds=settings.rounds,
                hot=cache == "hot",
                host_s=host_s,
                **({} if job.is_back_to_back else {"max_calls": 1}),
            )
        rows = [
            report.Measured(
                chosen[name],
                timing,
                {
                    "host_us": host_s.get(name),
                    "host_cold_us": host_cold_s.get(name),
                    "wall_us": wall_s.get(name),
                },
            )
            for name, timing in timings.items()
        ]
        outcome.records += report.make_records(
            case, job.op, job.pair, cache, device, rows, job.pause_ms, job.load
        )
    return outcome


def _one_element_calls(
    job: Job, case: Case, chosen: dict[str, Provider], settings: Settings
) -> dict[str, list[Call]]:
    """What tells a processor's overhead from its work."""
    ema, param = providers.split_pair(job.pair)
    lists = timer.one_element_lists(case.num_tensors, ema, param, settings.device)
    return {
        name: [provider.prepare(provider.target(lists), settings.momentum)]
        for name, provider in chosen.items()
        if provider.family != "compile"  # Other shapes would be compiled anew, for minutes.
    }


def _medians(
    calls: dict[str, list[Call]], clock: timer.Clock, seconds: float, settings: Settings
) -> dict[str, float]:
    if not calls:
        return {}
    timings = timer.interleave(calls, clock, seconds=seconds, rounds=settings.rounds)
    return {name: timing.median for name, timing in timings.items()}


def _num_bytes(lists: Lists) -> int:
    return sum(tensor.nbytes for tensor in (*lists.ema, *lists.params))


# ---- the run


class Progress:
    """Tells where a run is: one line a job, and on a terminal a bar below them."""

    def __init__(self, num_jobs: int) -> None:
        self._num_jobs = num_jobs
        self._num_done = 0
        self._bar: Any = None
        if sys.stdout.isatty() and report.find("rich") is not None:
            self._bar = importlib.import_module("rich.progress").Progress(transient=True)
            self._task = self._bar.add_task("", total=num_jobs)

    def context(self) -> AbstractContextManager[Any]:
        """Shows the bar while it is open."""
        return self._bar if self._bar is not None else nullcontext()

    def begin(self, job: Job) -> None:
        """A job starts."""
        if self._bar is not None:
            self._bar.update(self._task, description=str(job))

    def end(self, job: Job, text: str) -> None:
        """A job is over."""
        self._num_done += 1
        line = f"[{self._num_done}/{self._num_jobs}] {job}: {text}"
        if self._bar is not None:
            self._bar.advance(self._task)
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            print(line, flush=True)


def run(jobs: Sequence[Job], settings: Settings) -> Outcome:
    """Measures all jobs; later ones get the time that earlier ones left."""
    outcome = Outcome()
    begin = time.perf_counter()
    deadline = begin + settings.seconds
    last_start = begin + _OVERRUN * settings.seconds
    progress = Progress(len(jobs))
    made: tuple[str, str] | None = None
    case: Case | None = None
    sets: list[Lists] = []
    with progress.context(), report.stoppable(outcome.failures):
        for i, job in enumerate(jobs):
            start = time.perf_counter()
            # A part of the share is kept back for later jobs that can't do with theirs.
            seconds = 0.75 * max(0.0, deadline - start) / (len(jobs) - i)
            progress.begin(job)
            if settings.rounds is None and start > last_start:
                reason = "no time left, use --seconds for more"
                outcome.left_out[f"{job}: {reason}"] = None
                progress.end(job, f"left out, {reason}")
                continue
            if made != (job.case, job.pair):
                sets.clear()
                if settings.device.type == "cuda":
                    torch.cuda.empty_cache()
                case, reason = fit(job, settings)
                made = job.case, job.pair
                if case is not None:
                    sets, cold = timer.make_sets(
                        case, job.pair, settings.device, settings.memory_bytes
                    )
            if case is None:
                outcome.left_out[f"{job.case} {job.pair}: {reason}"] = None
                progress.end(job, f"left out, {reason}")
                continue
            seconds -= time.perf_counter() - start
            found = run_job(job, case, sets, cold, seconds, settings)
            outcome.records += found.records
            outcome.left_out |= found.left_out
            outcome.failures += found.failures
            took = f"({time.perf_counter() - start:.1f} s)"
            progress.end(job, " ".join([report.headline(found.records), *found.failures, took]))
    return outcome


# ---- command line


def make_parser() -> argparse.ArgumentParser:
    """The options of the default command."""
    parser = argparse.ArgumentParser(
        "python -m bench",
        description="Measures fused_ema against torch on this machine. Lists are separated by "
        "commas; 'all' stands for every name.",
        epilog="Other commands: "
        + ", ".join(f"python -m bench {name}" for name in (*COMMANDS[1:], *GPU_COMMANDS))
        + ".",
    )
    add = parser.add_argument
    add("--list", action="store_true", help="show every case, op, dtype pair and provider")
    add("--cases", type=report.names(cases.names(), "case"), help="lists of tensors to run on")
    add("--ops", type=report.names(OPS, "op"), help="update, swap, copy")
    add("--dtypes", type=report.names(providers.DTYPE_PAIRS, "dtype pair"), help="as ema/param")
    add("--providers", type=report.names(providers.names(), "provider"), help="who is measured")
    report.add_device(parser)
    add("--pause-ms", type=_milliseconds, help="pauses before each call, on the CPU")
    add("--load", type=report.names(timer.LOADS, "load"), help="beside what, on the CPU")
    add("--momentum", type=number(float, 0, 1), default=DEFAULT_MOMENTUM, help="(%(default)s)")
    add("--max-elements", type=number(int, 1), help="scale larger cases down to this")
    add("--memory-gb", type=number(float, 0), help="use at most this much memory")
    add("--rounds", type=number(int, 1), help="exactly so many, instead of as time allows")
    add("--seconds", type=number(float, 0), default=DEFAULT_SECONDS, help="for all (%(default)s)")
    add("--threads", type=number(int, 1), help="of torch, on the CPU")
    report.add_json(parser)
    report.add_plot(parser)
    return parser


def _milliseconds(text: str) -> list[float]:
    return [number(float, 0)(part) for part in text.split(",")]


def ops_main(argv: Sequence[str]) -> int:
    """Measures single ops; the default command."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.list:
        _list()
        return 0
    device = report.device_of(parser, args)
    if args.plot and (reason := report.why_no_plot()):
        parser.error(f"--plot {reason}")
    if device.type != "cpu" and (args.pause_ms or args.load):
        parser.error("--pause-ms and --load are for --device cpu")
    if args.threads:
        torch.set_num_threads(args.threads)
    memory = _MEMORY_SHARE * available_bytes(device)
    settings = Settings(
        device=device,
        momentum=args.momentum,
        max_elements=args.max_elements or DEFAULT_MAX_ELEMENTS[device.type],
        memory_bytes=int(min(memory, (args.memory_gb or float("inf")) * 2**30)),
        seconds=args.seconds,
        rounds=args.rounds,
        providers=args.providers,
    )
    with report.measuring(device) as facts, torch.no_grad():
        jobs = plan_jobs(args.cases, args.ops, args.dtypes, args.device, args.pause_ms, args.load)
        outcome = run(jobs, settings)

    for table in [*report.tables(outcome.records), report.summary(outcome.records)]:
        report.show(table)
    for line in outcome.left_out:
        print(f"left out: {line}")
    if args.json:
        content = {"left_out": list(outcome.left_out), "records": outcome.records}
        report.write_json(args.json, facts, content)
    if args.plot:
        picture.plot(outcome.records, args.plot)
    report.warn_of_others(facts)
    return report.print_failures(outcome.failures)


def _list() -> None:
    for name in cases.names():
        case = cases.load(name)
        size = f"{case.num_tensors:,} tensors, {case.num_elements:,} elements"
        print(f"case      {name:12} {case.title}: {size}")
    print(f"op        {', '.join(OPS)}")
    print(f"dtypes    {', '.join(providers.DTYPE_PAIRS)}")
    for provider in providers.PROVIDERS:
        absent = ""
        if reason := provider.why_not(provider.devices[0]):
            absent = f" (absent: {reason})"
        print(f"provider  {provider.name:24} {provider.op:7} {provider.kind}{absent}")


# The first word chooses, without one it is "ops"; every other has a module of its name, those for a
# GPU in bench/gpu.
COMMANDS = (
    *("ops", "train", "posthoc", "averages", "manager", "teacher", "step", "offload", "host"),
    "scale",
)
GPU_COMMANDS = ("launches", "variants", "counters", "verdict")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    command = words.pop(0) if words and words[0] in (*COMMANDS, *GPU_COMMANDS) else "ops"
    if command == "ops":
        return ops_main(words)
    package = "bench.gpu" if command in GPU_COMMANDS else "bench"
    return int(importlib.import_module(f"{package}.{command}").main(words))


if __name__ == "__main__":
    raise SystemExit(main())
