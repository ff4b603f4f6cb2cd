"""How a measurement is made: values checked first, then providers timed turn by turn.

The protocol. Providers take turns round by round, so that whatever else the machine does hits all
of them alike, in an order that changes with the round, so that none always comes after the same
other; a figure is the median of the rounds. Before every cold call the tensors have left the
caches: the calls walk through sets of tensors that together are twice a GPU's L2, or four times a
processor's last-level cache. A training updates once a step: on a CPU calls are timed after a pause
and beside a load too, each by itself, since threads that slept or have no core come late.
Host time is measured apart from device time.
"""

import gc
import math
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor

from bench import cases
from bench.cases import Case
from bench.providers import Call, Lists, Op, split_pair, times

MIN_ROUNDS = 5
MAX_ROUNDS = 101
MIN_SAMPLE_S = 200e-6  # Shorter calls are timed several at once.
HOT_BYTES = 25e6  # Above this an update in training doesn't find its tensors in a cache.
_MAX_CALLS = 1000
_CHECKED_ELEMENTS = 2**24
_PIECE = 2**14
# How many times the cache a rotation holds. A GPU's L2 is in two halves that may both keep a line.
_CACHE_MULTIPLE = {"cpu": 4, "cuda": 2}
# More would take longer to make than to measure: a set of many small tensors has few bytes.
_MAX_SETS = {"cpu": 128, "cuda": 64}
_CACHE_GUESS_BYTES = 32 * 2**20
_MAX_SPIN_S = 20e-3
_MAX_DRY = 3  # Samples in place of one.
_TENSOR_BYTES = 512  # What torch keeps about a tensor, roughly: TensorImpl, StorageImpl, PyObject.

# The largest error of an update, as a fraction of |ema| + |param|: four roundings to the ema's
# dtype, which is what mul_ and add_ with both factors rounded to that dtype may lose.
TOLERANCE = {
    torch.float64: 2 * torch.finfo(torch.float64).eps,
    torch.float32: 2 * torch.finfo(torch.float32).eps,
    torch.bfloat16: 2 * torch.finfo(torch.bfloat16).eps,
    torch.float16: 2 * torch.finfo(torch.float16).eps,
}

# ---- checking values


def sample(lists: Lists) -> tuple[Tensor, Tensor]:
    """The elements that a check looks at, as flat copies of both sides.

    All of them, up to a number that keeps the check short beside the measurement; of longer lists
    every small tensor and evenly spread pieces of the large ones, first and last included.
    """
    num_elements = sum(tensor.numel() for tensor in lists.ema)
    step = math.ceil(num_elements / _CHECKED_ELEMENTS)

    def flat(tensors: Sequence[Tensor]) -> Tensor:
        parts: list[Tensor] = []
        for tensor in tensors:
            whole = tensor.reshape(-1)
            if step <= 1 or whole.numel() <= _PIECE:
                parts.append(whole)
            else:
                starts = range(0, whole.numel(), _PIECE)
                parts += [whole[i : i + _PIECE] for i in (*starts[:-1:step], starts[-1])]
        return torch.cat(parts)

    return flat(lists.ema), flat(lists.params)


def check(
    op: Op, before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor], momentum: float
) -> str:
    """Compares samples of before and after to float64, or to a cast; says what is wrong."""
    # On a CPU the pieces are so small that torch takes one thread and the core's own cache: with
    # another program on the machine, threads that meet after every op take a hundred times longer.
    size = before[0].numel() if before[0].is_cuda else _PIECE
    sides = zip(*(torch.split(side, max(1, size)) for side in (*before, *after)), strict=True)
    start = 0
    for ema, param, new_ema, new_param in sides:
        right_param = ema.to(param.dtype) if op == "swap" else param
        if op == "update":
            right_ema = ema.to(torch.float64, copy=True)
            right_ema.mul_(1 - momentum).add_(param, alpha=momentum)
            bound = ema.abs().add_(param.abs()).mul_(TOLERANCE[ema.dtype])
            good = (right_ema - new_ema).abs_() <= bound  # False for a NaN.
        else:
            right_ema = param.to(ema.dtype)
            good = new_ema == right_ema
        for side, fine, new, right in (
            ("ema", good, new_ema, right_ema),
            ("param", new_param == right_param, new_param, right_param),
        ):
            if not fine.all():
                i = int((~fine).nonzero()[0])
                return (
                    f"{op}: {side} element {start + i} is {new[i].item()!r}, "
                    f"the reference says {right[i].item()!r}"
                )
        start += ema.numel()
    return ""


# ---- caches


def cache_bytes(device: torch.device) -> int:
    """The last-level cache: a GPU's L2, or all of a CPU's caches of the highest level."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    # sysconf would do as well, but in a virtual machine it may report the host's.
    levels: dict[int, dict[str, int]] = {}
    for index in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index*"):
        try:
            level, size, shared = (
                (index / name).read_text().strip() for name in ("level", "size", "shared_cpu_list")
            )
        except OSError:
            continue
        if match := re.fullmatch(r"(\d+)K", size):
            levels.setdefault(int(level), {})[shared] = int(match[1]) * 1024
    return sum(levels[max(levels)].values()) if levels else _CACHE_GUESS_BYTES


def num_cold_sets(data_bytes: int, num_tensors: int, cache: int, device_type: str) -> int:
    """How many sets make a rotation cold: 1 where one set is enough, 0 where too many would be.

    On a CPU the records that torch keeps about each tensor pass through the same caches as its
    data; for 10,000 x 64 they are most of it.
    """
    set_bytes = data_bytes + num_tensors * (_TENSOR_BYTES if device_type == "cpu" else 0)
    needed = math.ceil(_CACHE_MULTIPLE[device_type] * cache / max(1, set_bytes))
    return needed if needed <= _MAX_SETS[device_type] else 0


def make_lists(
    case: Case, pair: str, device: torch.device, seed: int = 0, in_one: bool = False
) -> Lists:
    """The tensors of a case, both sides, with values of that seed.

    Args:
        case: What to make.
        pair: Of which dtypes.
        device: Where.
        seed: Of the values.
        in_one: All tensors of a side are views of one allocation.
    """
    ema, param = split_pair(pair)
    return Lists(
        cases.make_tensors(case, ema, device, seed, "ema", in_one),
        cases.make_tensors(case, param, device, seed, "param", in_one),
    )


def make_sets(
    case: Case, pair: str, device: torch.device, memory_bytes: int
) -> tuple[list[Lists], bool]:
    """Enough sets of tensors for a cold rotation; or one, and False, where that is too many."""
    set_bytes = case.num_elements * sum(dtype.itemsize for dtype in split_pair(pair))
    cache = cache_bytes(device)
    num_sets = num_cold_sets(set_bytes, 2 * case.num_tensors, cache, device.type)
    if num_sets > 1 and 4 * num_sets * set_bytes > memory_bytes:
        num_sets = 0
    # The first is what a model has, and the host is timed on it. To a GPU's memory the others are
    # the same as views, and 64 sets of 20,000 allocations took longer to make than to measure.
    sets = [
        make_lists(case, pair, device, seed, in_one=seed > 0 and device.type == "cuda")
        for seed in range(max(1, num_sets))
    ]
    return sets, num_sets > 0


# ---- clocks


class CpuClock:
    """Times calls that are done when they return, after a pause of so many seconds."""

    def __init__(self, pause_s: float = 0.0) -> None:
        self._pause_s = pause_s

    def seconds(self, calls: Sequence[Call], host_s: float = 0.0) -> float:
        """Seconds a call, over all of `calls`."""
        if self._pause_s:
            time.sleep(self._pause_s)
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) / len(calls)


class CudaClock:
    """Times what the GPU does, with events around the calls.

    A spinning kernel holds the stream while the host fills the queue, so the time between two
    launches doesn't count. It spins 1 ms, or longer where the calls need longer to launch, up to
    20 ms; a provider beyond that, or with more launches than the queue holds, is as slow as its
    host, in training too. A sample in which the host came too late otherwise is taken again.
    """

    def __init__(self) -> None:
        self.num_dry = 0
        self.num_dry_kept = 0
        start, end = _event(), _event()
        cycles = 2_000_000
        torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]
        start.record()
        torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]
        end.record()
        end.synchronize()
        self._cycles_per_s = cycles / (start.elapsed_time(end) / 1e3)

    def seconds(self, calls: Sequence[Call], host_s: float = 0.0) -> float:
        """Seconds a call, over all of `calls`, whose launch takes about `host_s` each."""
        spin_s = min(_MAX_SPIN_S, max(1e-3, 1.5 * host_s * len(calls)))
        for tries in range(1, _MAX_DRY + 1):
            start, end = _event(), _event()
            torch.cuda.synchronize()
            torch.cuda._sleep(int(spin_s * self._cycles_per_s))  # type: ignore[no-untyped-call]
            start.record()
            for call in calls:
                call()
            end.record()
            # The spinning was over before the last launch: a host that stalled would count.
            is_dry = start.query()  # type: ignore[no-untyped-call]
            end.synchronize()
            if not is_dry:
                break
            self.num_dry += 1
            if tries == _MAX_DRY or host_s * len(calls) > _MAX_SPIN_S:
                self.num_dry_kept += 1
                break
            spin_s = min(_MAX_SPIN_S, 2 * spin_s)
        return float(start.elapsed_time(end)) / 1e3 / len(calls)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


class WallClock:
    """Times a GPU's calls from an empty queue until the GPU is done: host and device together."""

    def seconds(self, calls: Sequence[Call], host_s: float = 0.0) -> float:
        """Seconds a call, over all of `calls`."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        for call in calls:
            call()
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / len(calls)


class HostClock:
    """Times how long a GPU's calls keep the host, each with an empty queue ahead of it."""

    def seconds(self, calls: Sequence[Call], host_s: float = 0.0) -> float:
        """Seconds a call, over all of `calls`."""
        total = 0.0
        for call in calls:
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            total += time.perf_counter() - start
        torch.cuda.synchronize()
        return total / len(calls)


Clock = CpuClock | CudaClock | HostClock | WallClock

# ---- limits


@contextmanager
def limit(seconds: float | None) -> Iterator[None]:
    """Raises TimeoutError inside of the `with` when the time is up; in the main thread only."""
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: object) -> None:
        raise TimeoutError(f"it took more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ---- other programs

LOADS = ("none", "cores")


@contextmanager
def beside(load: str) -> Iterator[None]:
    """Inside of the `with` another program keeps every core busy that is ours, for "cores"."""
    # It ends with this process, however that ends.
    code = f"import os\nwhile os.getppid() == {os.getpid()}: sum(range(10000))"
    count = len(os.sched_getaffinity(0)) if load == "cores" else 0
    programs = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(count)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


# ---- timing


@dataclass(frozen=True)
class Timing:
    """Seconds a call over all rounds: median, 10th and 90th percentile.

    Attributes:
        num_dry: How often a GPU ran dry before its host had launched all of a sample. Such a sample
            is taken again, up to three times in all.
        num_dry_kept: How many samples stayed dry: they are as slow as the host.
    """

    median: float
    p10: float
    p90: float
    rounds: int
    num_dry: int = 0
    num_dry_kept: int = 0


def percentile(values: Sequence[float], percent: float) -> float:
    """The percentile, linear between the two nearest values."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = math.floor(position)
    high = math.ceil(position)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def interleave(
    calls: dict[str, list[Call]],
    clock: Clock,
    *,
    seconds: float,
    rounds: int | None = None,
    hot: bool = False,
    host_s: dict[str, float] | None = None,
    max_calls: int = _MAX_CALLS,
) -> dict[str, Timing]:
    """Times providers in turn.

    Args:
        calls: By provider, one call for each set of tensors, in the same order of sets.
        clock: What to time with.
        seconds: When to stop, once MIN_ROUNDS are done.
        rounds: Exactly so many, whatever the time.
        hot: Run once untimed before each sample, so that the tensors are in the caches.
        host_s: By provider, about how long the host takes for a call.
        max_calls: In one sample; 1 where percentiles are to be those of single calls.
    """
    num_sets = len(next(iter(calls.values())))
    # One walk over the sets for all: a provider must not find what the one before it has touched.
    sets = cycle(range(num_sets))
    host_s = host_s or {}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    dry: dict[str, Counter[str]] = {name: Counter() for name in calls}
    names = list(calls)

    def sample(name: str, count: int) -> float:
        own = calls[name]
        todo = [own[next(sets)] for _ in range(count)]
        if hot:
            todo[0]()
        before = _dry(clock)
        took = clock.seconds(todo, host_s.get(name, 0.0) * times(todo[0])) / times(todo[0])
        dry[name] += _dry(clock) - before
        return took

    with _no_garbage_collection():
        counts = {}
        for name in names:
            # The first call warms up code, allocator and clocks, so it only tells the very slow.
            took = sample(name, 1)
            if took < 100 * MIN_SAMPLE_S:
                took = sample(name, 1)
            counts[name] = min(max_calls, math.ceil(MIN_SAMPLE_S / max(took, 1e-9)))
        for counter in dry.values():
            counter.clear()  # Warming up may well run dry.
        deadline = time.perf_counter() + seconds
        for i in range(rounds or MAX_ROUNDS):
            if rounds is None and i >= MIN_ROUNDS and time.perf_counter() > deadline:
                break
            # The caches keep a part of what the call before has touched, and on the same tensors
            # that is a gift. The seed makes two runs alike.
            for name in random.Random(i).sample(names, len(names)):
                samples[name].append(sample(name, counts[name]))
    return {
        name: Timing(percentile(s, 50), percentile(s, 10), percentile(s, 90), len(s), **dry[name])
        for name, s in samples.items()
    }


def _dry(clock: Clock) -> Counter[str]:
    return Counter({name: getattr(clock, name, 0) for name in ("num_dry", "num_dry_kept")})


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    # Lists of 10,000 tensors make a collection take longer than the call that triggers it.
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def one_element_lists(
    num_tensors: int, ema: torch.dtype, param: torch.dtype, device: torch.device
) -> Lists:
    """As many tensors of one element: what a call on them takes is the host's overhead.

    The only way to tell it from the work on a CPU, where both happen in the same call.
    """
    one = torch.ones(1, device=device)
    return Lists(
        [one.to(ema, copy=True) for _ in range(num_tensors)],
        [one.to(param, copy=True) for _ in range(num_tensors)],
    )
