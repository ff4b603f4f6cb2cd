"""python -m bench launches: what one call makes a GPU and its host do, by torch's profiler.

For every case the kernels, copies and host synchronisations of one update, swap and copy, ours and
torch._foreach. torch's sync debug mode is set to error meanwhile. The run fails where a plan needs
more than its one launch, or where anything of ours copies or waits.
"""

import argparse
import itertools
import math
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
from torch.autograd.profiler import profile

from bench import cases, providers, report, timer
from bench.providers import CAPTURED, OPS, PLAN, Call, Lists, Provider
from fused_ema.__main__ import number

MOMENTUM = 0.125
PAIRS = ("float32/float32", "float32/bfloat16")
SPANS_A_LAUNCH = 1019  # Of a one-shot call: what 32,764 bytes of kernel arguments hold.
MAX_ELEMENTS = 2**30


@dataclass(frozen=True)
class Trace:
    """What one call did: kernel launches, copies and fills by the runtime, waits of the host."""

    kernels: int
    copies: int
    waits: int


def trace(call: Call) -> Trace:
    """Runs a call under the profiler; once before it, so that nothing is made in it."""
    _require_events()
    call()
    torch.cuda.synchronize()
    seen, idle = _count(call), _idle()
    return Trace(*(seen[what] - idle[what] for what in ("kernel", "copy", "wait")))


@cache
def _require_events() -> None:
    if not torch.autograd.kineto_available():  # type: ignore[attr-defined]
        raise RuntimeError("this torch is built without Kineto, so its profiler sees no GPU")
    known = torch.zeros(1, device="cuda")
    if not _count(lambda: known.add_(1))["kernel"]:
        raise RuntimeError(
            "torch's profiler saw no kernel of an addition on the GPU; it may lack CUPTI, or "
            "another profiler may hold it. Launches can't be counted here"
        )


@cache
def _idle() -> Counter[str]:
    # On leaving the profiler waits for the device, so that doing nothing has a wait as well.
    return _count(lambda: None)


def _count(call: Call) -> Counter[str]:
    # Without Kineto, the default in torch 2.11, the profiler sees nothing of the GPU.
    with profile(use_device="cuda", use_kineto=True) as profiled:
        call()
    counter: Counter[str] = Counter()
    # Not as torch's tree of events: of 40,000 it takes two seconds to make.
    for event in profiled.kineto_results.events():
        name = event.name()
        if event.device_type().name == "CUDA":
            counter["copy" if name.startswith(("Memcpy", "Memset")) else "kernel"] += 1
        elif name.startswith("cuda") and "Synchronize" in name:
            counter["wait"] += 1
    return counter


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Inside of it, an operation of torch that waits for the GPU is an error."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def count(provider: Provider, lists: Lists) -> Trace:
    """What one call of a provider does, once it is prepared."""
    call = provider.prepare(lists, MOMENTUM)

    def guarded() -> None:
        with no_synchronisation():
            call()

    return trace(guarded)


def wrong(provider: Provider, num_tensors: int, seen: Trace) -> str:
    """What of a trace of ours is more than was promised; empty if nothing is."""
    if provider.kind != "ours":
        return ""
    most = 1 if provider.name == PLAN else math.ceil(num_tensors / SPANS_A_LAUNCH)
    problems = []
    if seen.kernels != most:
        problems.append(f"{seen.kernels} launches, expected {most}")
    if seen.copies:
        problems.append(f"{seen.copies} copies")
    if seen.waits:
        problems.append(f"the host waited {seen.waits} times")
    return ", ".join(problems)


def _counted(pair: str) -> list[Provider]:
    return [
        provider
        for op in OPS
        for provider in providers.choose(op, pair, "cuda", None)
        # A replay launches what was captured.
        if provider.family in ("ours", "foreach") and provider.name != CAPTURED
    ]


def run(case_names: Sequence[str], max_elements: int) -> dict[str, Any]:
    """Counts all; returns what the JSON file holds, without the environment."""
    device = torch.device("cuda")
    records: list[report.Record] = []
    failures: list[str] = []
    loaded = [cases.load(name, max_elements) for name in case_names]
    with report.stoppable(failures):
        for case, pair in itertools.product(loaded, PAIRS):
            lists = timer.make_lists(case, pair, device)
            for provider in _counted(pair):
                seen = count(provider, lists)
                facts = report.what(case, provider.op, pair)
                records.append({**facts, "provider": provider.name, **asdict(seen)})
                if problem := wrong(provider, case.num_tensors, seen):
                    failures.append(f"{provider.name}, {case.name} {provider.op} {pair}: {problem}")
    return {"failures": failures, "records": records}


def table(content: dict[str, Any], foreach: str | None) -> report.Table:
    """A row for each case, op and dtype pair."""
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for r in content["records"]:
        key = (r["case"], r["op"], report.pair_of(r), f"{r['num_tensors']:,}")
        family = r["provider"] if r["provider"].startswith("fused_ema") else "foreach"
        extra = f" + {r['copies']}" if r["copies"] else ""
        text = f"{r['kernels']:,}{extra}" + (f", {r['waits']} waits" if r["waits"] else "")
        known = rows.setdefault(key, {}).get(family)
        # Of several ways of torch the one with the fewest launches.
        if known is None or r["kernels"] < int(known.split()[0].replace(",", "")):
            rows[key][family] = text
    headers = ("case", "op", "ema/param", "tensors", PLAN, "fused_ema", f"foreach ({foreach})")
    columns = (PLAN, "fused_ema", "foreach")
    return report.Table(
        "Kernel launches of one call (+ copies and fills by the runtime)",
        headers,
        tuple((*key, *(row.get(name, "") for name in columns)) for key, row in rows.items()),
    )


def main(argv: Sequence[str]) -> int:
    """Counts launches; returns the exit status."""
    parser = argparse.ArgumentParser(
        "python -m bench launches",
        description="Counts kernel launches, copies and host synchronisations of one call, on a "
        "CUDA GPU.",
    )
    add = parser.add_argument
    add("--cases", type=report.names(cases.names(), "case"), help="lists of tensors to run on")
    add("--max-elements", type=number(int, 1), default=MAX_ELEMENTS, help="(%(default)s)")
    report.add_json(parser)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA GPU here, and only a GPU has launches to count")
    device = torch.device("cuda")
    with report.measuring(device) as facts, torch.no_grad():
        content = run(args.cases or cases.names(), args.max_elements)
    report.show(table(content, facts["foreach_arguments"]))
    if args.json:
        report.write_json(args.json, facts, content)
    return report.print_failures(content["failures"])
