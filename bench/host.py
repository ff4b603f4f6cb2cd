"""python -m bench host: how long a call keeps the host, until it returns.

Each row is measured by itself, so that no other provider drives its tensors' records out of the
caches: hot, one call after the other, and swept, after 64 MB have been written, which is more than
a second-level cache and may be less than a third. And hot once more while other processes keep
every core busy, as data loader workers do. On one thread of torch's. All tensors have 64 elements;
on a GPU each call finds an empty queue, and its kernel is not waited for. On a processor the work
itself is in the figures.

Without a GPU, the way to a launch can be timed on one that is only pretended:

    PRETEND_NO_WORK=1 python tests/pretend/run.py bench host
"""

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fused_ema
from bench import report, timer
from bench.providers import Call
from fused_ema.__main__ import number

SIZES = (1, 267, 500, 1000, 2000, 5000, 10_000)
NUM_ELEMENTS = 64
MOMENTUM = 0.125
SWEPT_BYTES = 64 * 2**20
MIN_CALLS = 20
_SECONDS = 60.0
_FOREACH_MOST = 2000  # Its figures grow with the list, and 10,000 take a second a round.


def _separate(num_tensors: int, device: torch.device) -> list[Tensor]:
    return [torch.randn(NUM_ELEMENTS, device=device) for _ in range(num_tensors)]


class Made(NamedTuple):
    """A call, and the tensors that it works on."""

    call: Call
    ema: list[Tensor]
    params: list[Tensor]


def _plan(num_tensors: int, device: torch.device) -> Made:
    ema, params = _separate(num_tensors, device), _separate(num_tensors, device)
    return Made(partial(fused_ema.Plan(ema, params).update, MOMENTUM), ema, params)


def _flat_plan(num_tensors: int, device: torch.device) -> Made:
    flat = torch.randn(num_tensors * NUM_ELEMENTS, device=device)
    ema, params = list(torch.split(flat, NUM_ELEMENTS)), _separate(num_tensors, device)
    return Made(partial(fused_ema.Plan(ema, params).update, MOMENTUM), ema, params)


def _manager(num_tensors: int, device: torch.device) -> Made:
    model = nn.Module()
    for i, tensor in enumerate(_separate(num_tensors, device)):
        model.register_parameter(str(i), nn.Parameter(tensor))
    manager = fused_ema.EMAManager(model, MOMENTUM)
    ema = [tensor for _, tensor in manager.named_emas()]
    return Made(manager.update, ema, list(model.parameters()))


def _one_shot(num_tensors: int, device: torch.device) -> Made:
    ema, params = _separate(num_tensors, device), _separate(num_tensors, device)
    return Made(partial(fused_ema.update_, ema, params, MOMENTUM), ema, params)


def _foreach(num_tensors: int, device: torch.device) -> Made:
    ema, params = _separate(num_tensors, device), _separate(num_tensors, device)
    return Made(partial(torch._foreach_lerp_, ema, params, MOMENTUM), ema, params)


ROWS: dict[str, Callable[[int, torch.device], Made]] = {
    "plan": _plan,
    "plan, emas flat": _flat_plan,
    "manager": _manager,
    "one-shot": _one_shot,
    "foreach": _foreach,
}


def _spin() -> None:
    while True:
        pass


@contextmanager
def busy_cores() -> Iterator[Sequence[BaseProcess]]:
    """Inside of it as many processes as there are cores do nothing, as fast as they can."""
    context = multiprocessing.get_context("spawn")
    processes: list[BaseProcess] = [
        context.Process(target=_spin, daemon=True) for _ in range(os.cpu_count() or 1)
    ]
    try:
        for process in processes:
            process.start()
        time.sleep(0.5)  # A spawned interpreter takes that long to begin.
        yield processes
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()


def sweep(memory: Tensor) -> None:
    """Drives everything else out of the caches that `memory` is larger than."""
    memory.add_(1)


def measure(call: Call, device: torch.device, seconds: float, swept: bool) -> list[float]:
    """Seconds of each call, MIN_CALLS and as many more as fit."""
    memory = torch.zeros(SWEPT_BYTES, dtype=torch.uint8)
    samples: list[float] = []
    for _ in range(3):
        call()
    deadline = time.perf_counter() + seconds
    while len(samples) < MIN_CALLS or time.perf_counter() < deadline:
        if swept:
            sweep(memory)
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return samples


def run(sizes: Sequence[int], device: torch.device, seconds: float) -> list[report.Record]:
    """Measures all rows at all sizes, alone and among busy cores."""
    rows = [
        (name, size)
        for size in sizes
        for name in ROWS
        if name != "foreach" or size <= _FOREACH_MOST
    ]
    share = seconds / (3 * len(rows))
    records = []

    def add(name: str, size: int, cores: str, swept: bool) -> None:
        samples = measure(ROWS[name](size, device).call, device, share, swept)
        record: dict[str, Any] = {"row": name, "num_tensors": size, "cores": cores}
        record |= {"cache": "swept" if swept else "hot", "num_calls": len(samples)}
        for percent in (50, 90, 99):
            record[f"host_us_p{percent}"] = timer.percentile(samples, percent) * 1e6
        records.append(record)

    for name, size in rows:
        add(name, size, "idle", swept=False)
        add(name, size, "idle", swept=True)
    with busy_cores():
        for name, size in rows:
            add(name, size, "busy", swept=False)
    return records


def table(records: Sequence[report.Record]) -> report.Table:
    """A line a row and size."""
    kinds = (("idle", "hot"), ("idle", "swept"), ("busy", "hot"))
    cells: dict[tuple[str, str], dict[tuple[str, str], str]] = {}
    for r in records:
        text = " / ".join(f"{r[f'host_us_p{percent}']:,.1f}" for percent in (50, 90, 99))
        key = (f"{r['num_tensors']:,}", r["row"])
        cells.setdefault(key, {})[r["cores"], r["cache"]] = text
    headers = ("tensors", "call", *(f"{cores} cores, {cache}" for cores, cache in kinds))
    rows = tuple((*key, *(row.get(kind, "") for kind in kinds)) for key, row in cells.items())
    return report.Table("Host time of a call in us: p50 / p90 / p99", headers, rows)


def main(argv: Sequence[str]) -> int:
    """Measures host times; returns the exit status."""
    parser = argparse.ArgumentParser(
        "python -m bench host", description="How long a call keeps the host, on one thread."
    )
    add = parser.add_argument
    report.add_device(parser)
    add("--sizes", type=number(int, 1), nargs="+", default=SIZES, help="numbers of tensors")
    add("--seconds", type=number(float, 0), default=_SECONDS, help="for all (%(default)s)")
    report.add_json(parser)
    args = parser.parse_args(argv)
    device = report.device_of(parser, args)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with report.measuring(device) as facts, torch.no_grad():
            records = run(args.sizes, device, args.seconds)
    finally:
        torch.set_num_threads(num_threads)
    report.show(table(records))
    if args.json:
        report.write_json(args.json, facts, {"records": records})
    report.warn_of_others(facts)
    return 0
