"""python -m bench manager: what EMAManager costs the host beyond the plan that it runs.

Every tensor has one element, so that what is left of an update is its overhead; there are about as
many modules as tensors, as in real models. The rows first show that they do what they say, then
they are timed in turn (bench/timer.py says how) with everything in the caches; in training, where
forward and backward come between, each takes longer. "Beyond the plan" is the difference of two
medians of the same rounds. Unasked with one thread: what is sought is serial, and a second thread
whose core another program has would make the plan wait for it.

At last a small model is updated 200,000 times, to see whether an update takes longer then than one
of a new manager.

The run fails where a row does something else, where `swapped()` allocates memory for tensors, or
where an update calls `state_dict()`. Times have targets, and a missed one is only shown.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.autograd.profiler import profile

import fused_ema
from bench import report, timer
from bench.providers import Call, Lists
from bench.train import NaiveEMA
from fused_ema import schedules
from fused_ema.__main__ import number
from fused_ema.ops import Form

NUM_TENSORS = 1000
NUM_UPDATES = 10  # So many are watched for calls of state_dict().
_OURS = ("update", "schedule", "skip")
# 1/8 is exact and far above the rounding: a row that does nothing fails its check.
MOMENTUM = 0.125
FORM: Form = "mul_add"  # The arithmetic of the naive loop.
TARGETS_US = {"update": 10.0, "schedule": 10.0, "skip": 2.0}
_NEVER = 10**15  # As an interval.
_SECONDS = 10.0
LONG_UPDATES = 200_000
_LONG_TENSORS = 20
_BATCH = 500  # Of the small model, updates that are timed together.
_LAYERS_A_BLOCK = 4
_BLOCKS_A_STAGE = 8


@dataclass(frozen=True, eq=False)
class Row:
    """One thing to time.

    Attributes:
        title: What the table calls it.
        call: Does it once.
        lists: The tensors it works on.
        momentum: Of the update that comes next; None where all tensors stay as they are.
    """

    title: str
    call: Call
    lists: Lists
    momentum: Callable[[], float] | None


# ---- what is timed


def make_model(num_tensors: int, device: torch.device) -> nn.Module:
    """Stages of blocks of layers, with that many parameters of one element."""

    def nested(modules: list[nn.Module], size: int) -> list[nn.Module]:
        return [nn.Sequential(*modules[i : i + size]) for i in range(0, len(modules), size)]

    layers: list[nn.Module] = []
    for i in range(0, num_tensors, 2):
        layers += [nn.Linear(1, 1, bias=i + 1 < num_tensors, device=device), nn.ReLU()]
    return nn.Sequential(*nested(nested(layers, _LAYERS_A_BLOCK), _BLOCKS_A_STAGE))


def make_rows(num_tensors: int, device: torch.device) -> dict[str, Row]:
    """All rows; those of the manager share one model."""
    model = make_model(num_tensors, device)

    def managed(
        title: str,
        call_of: Callable[[fused_ema.EMAManager], Call],
        averages: bool = True,
        **settings: Any,
    ) -> Row:
        manager = fused_ema.EMAManager(model, MOMENTUM, form=FORM, **settings)
        # All on the same memory: two lists of equal tensors may differ by more, by where they lie,
        # than the manager costs.
        manager._tracked = shared._tracked
        lists = Lists([ema for _, ema in manager.named_emas()], list(model.parameters()))
        momentum = partial(_next_momentum, manager) if averages else None
        return Row(title, call_of(manager), lists, momentum)

    shared = fused_ema.EMAManager(model, MOMENTUM, form=FORM)

    def naive(
        title: str, call_of: Callable[[nn.Module, NaiveEMA], Call], averages: bool = True
    ) -> Row:
        model = make_model(num_tensors, device)
        loop = NaiveEMA(model, MOMENTUM)
        lists = Lists(list(loop.ema.values()), list(model.parameters()))
        return Row(title, call_of(model, loop), lists, (lambda: MOMENTUM) if averages else None)

    return {
        "plan": managed(
            "Plan.update", lambda manager: partial(manager._tracked.plan.update, MOMENTUM, FORM)
        ),
        "update": managed("EMAManager.update", lambda manager: manager.update),
        "schedule": managed(
            "EMAManager.update, exponential momentum",
            lambda manager: manager.update,
            momentum_fun=schedules.exponential(),
        ),
        "skip": managed(
            "EMAManager.update, skipped by the interval",
            lambda manager: manager.update,
            averages=False,
            interval=_NEVER,
        ),
        "swapped": managed(
            "EMAManager.swapped, in and out",
            lambda manager: partial(_in_and_out, manager.swapped),
            averages=False,
        ),
        "naive": naive(
            "naive: state_dict, mul_ and add_", lambda model, loop: partial(_walk, model, loop)
        ),
        "naive swapped": naive(
            "naive: clone and two copies, in and out",
            lambda model, loop: partial(_in_and_out, loop.swapped),
            averages=False,
        ),
    }


def _next_momentum(manager: fused_ema.EMAManager) -> float:
    return manager.momentum_at(manager.iteration)


def _in_and_out(swapped: Callable[[], AbstractContextManager[None]]) -> None:
    with swapped():
        pass


def _walk(model: nn.Module, loop: NaiveEMA) -> None:
    for name, entry in model.state_dict().items():
        if entry.is_floating_point():
            loop.ema[name].mul_(1 - MOMENTUM).add_(entry, alpha=MOMENTUM)


# ---- what is found


def check(row: Row) -> str:
    """Runs a row once and says what is wrong; empty if nothing is."""
    with torch.no_grad():
        torch._foreach_add_(row.lists.params, 1.0)
    before = timer.sample(row.lists)
    momentum = row.momentum() if row.momentum is not None else None
    row.call()
    after = timer.sample(row.lists)
    if momentum is not None:
        return timer.check("update", before, after, momentum)
    for what, old, new in zip(("ema", "param"), before, after, strict=True):
        if not torch.equal(old, new):
            return f"{int((old != new).sum())} of {old.numel()} {what} elements have changed"
    return ""


def allocated_bytes(call: Call, device: torch.device) -> int:
    """The bytes of memory for tensors that a call allocates on the device, freed or not."""
    if device.type == "cuda":
        before = torch.cuda.memory_stats(device)["allocated_bytes.all.allocated"]
        call()
        return int(torch.cuda.memory_stats(device)["allocated_bytes.all.allocated"] - before)
    # Else the profiler tells the terminal that it starts and stops.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with profile(profile_memory=True) as profiled:
        call()
    events = profiled.kineto_results.events()
    # Of every op the averaged figures tell only what it has not freed again.
    return sum(max(0, event.nbytes()) for event in events if event.name() == "[memory]")


def state_dict_calls(call: Call) -> int:
    """How often `state_dict()` is called, of modules at any depth, by NUM_UPDATES updates."""
    called: list[nn.Module] = []
    original = nn.Module.state_dict

    def state_dict(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        called.append(self)
        return original(self, *args, **kwargs)

    with patch.object(nn.Module, "state_dict", state_dict):
        for _ in range(NUM_UPDATES):
            call()
    return len(called)


def long_run(num_updates: int, rounds: int | None, device: torch.device) -> dict[str, Any]:
    """Times updates of a manager that has done so many, and of a new one beside it."""
    worn, new = (
        fused_ema.EMAManager(
            make_model(_LONG_TENSORS, device), momentum_fun=schedules.exponential(), form=FORM
        )
        for _ in range(2)
    )
    _update_often(worn, num_updates)
    timings = timer.interleave(
        {
            "worn": [partial(_update_often, worn, _BATCH)],
            "new": [partial(_update_often, new, _BATCH)],
        },
        timer.HostClock() if device.type == "cuda" else timer.CpuClock(),
        seconds=_SECONDS / 5,
        rounds=rounds,
        hot=True,
    )
    us = {name: timing.median / _BATCH * 1e6 for name, timing in timings.items()}
    return {
        "num_updates": num_updates,
        "num_tensors": _LONG_TENSORS,
        "us": us,
        "worn_of_new": us["worn"] / us["new"],
    }


def _update_often(manager: fused_ema.EMAManager, times: int) -> None:
    for _ in range(times):
        manager.update()


def run(
    num_tensors: int, rounds: int | None, num_long_updates: int, device: torch.device
) -> dict[str, Any]:
    """Checks, counts and times; returns what the JSON file holds, without the environment."""
    rows = make_rows(num_tensors, device)
    failures = [f"{row.title}: {wrong}" for row in rows.values() if (wrong := check(row))]

    allocated = {
        name: allocated_bytes(rows[name].call, device) for name in ("swapped", "naive swapped")
    }
    if allocated["swapped"]:
        failures.append(f"swapped() allocated {allocated['swapped']:,} bytes, expected none")
    calls = {name: state_dict_calls(rows[name].call) for name in (*_OURS, "naive")}
    for name in _OURS:
        if calls[name]:
            failures.append(
                f"{rows[name].title}: {calls[name]:,} calls of state_dict() in {NUM_UPDATES} "
                "updates, expected none"
            )
    # The naive ways do both: a counter that misses them would find nothing anywhere.
    if not allocated["naive swapped"] or not calls["naive"]:
        failures.append("the counters of bytes or of state_dict() calls don't work with this torch")

    timings = timer.interleave(
        {name: [row.call] for name, row in rows.items()},
        timer.HostClock() if device.type == "cuda" else timer.CpuClock(),
        seconds=_SECONDS,
        rounds=rounds,
        hot=True,
    )
    plan_s = timings["plan"].median
    records = [
        {"row": name, "title": rows[name].title, **report.microseconds(timing)}
        for name, timing in timings.items()
    ]
    beyond = {name: (timings[name].median - plan_s) * 1e6 for name in ("update", "schedule")}
    held = {**beyond, "skip": timings["skip"].median * 1e6}
    return {
        "settings": {
            "num_tensors": num_tensors,
            "num_modules": sum(1 for _ in make_model(num_tensors, device).modules()),
            "momentum": MOMENTUM,
            "form": FORM,
            "cache": "hot",
            "num_updates": NUM_UPDATES,
        },
        "failures": failures,
        "rows": records,
        "beyond_plan_us": beyond,
        # The whole of an update that the interval skips, of the others what is beyond the plan.
        "targets": {
            name: {"us": held[name], "target_us": target, "met": held[name] <= target}
            for name, target in TARGETS_US.items()
        },
        "allocated_bytes": allocated,
        "state_dict_calls": calls,
        "long_run": long_run(num_long_updates, rounds, device),
    }


# ---- what comes out


def table(content: dict[str, Any]) -> report.Table:
    """Times, and what of them has a target."""
    rows = []
    for r in content["rows"]:
        name = r["row"]
        target = content["targets"].get(name)
        beyond = content["beyond_plan_us"].get(name)
        verdict = ""
        if target is not None:
            verdict = f"{target['target_us']:.0f} us: {'met' if target['met'] else 'MISSED'}"
        rows.append(
            (
                r["title"],
                f"{r['us']:,.1f}",
                f"{r['us_p10']:,.1f} - {r['us_p90']:,.1f}",
                f"{beyond:+.1f}" if beyond is not None else "",
                verdict,
            )
        )
    title = "Host time: {num_tensors:,} tensors of one element, {num_modules:,} modules".format(
        **content["settings"]
    )
    return report.Table(title, ("", "us", "p10 - p90", "beyond the plan", "target"), tuple(rows))


def main(argv: Sequence[str]) -> int:
    """Measures the manager's overhead; returns the exit status."""
    parser = argparse.ArgumentParser(
        "python -m bench manager",
        description="Host time of EMAManager beyond its plan, the memory that swapped() allocates "
        "and the calls of state_dict() in an update.",
    )
    add = parser.add_argument
    add("--tensors", type=number(int, 1), default=NUM_TENSORS, help="of the model (%(default)s)")
    add("--rounds", type=number(int, 1), help="exactly so many, instead of as time allows")
    add(
        "--long",
        type=number(int, 1),
        default=LONG_UPDATES,
        metavar="UPDATES",
        help="before the last comparison (%(default)s)",
    )
    report.add_device(parser)
    add("--threads", type=number(int, 1), default=1, help="of torch, on the CPU (%(default)s)")
    report.add_json(parser)
    args = parser.parse_args(argv)
    device = report.device_of(parser, args)
    torch.set_num_threads(args.threads)

    with report.measuring(device) as facts:
        content = run(args.tensors, args.rounds, args.long, device)
    report.show(table(content))
    allocated, calls = content["allocated_bytes"], content["state_dict_calls"]
    print(
        f"swapped() allocates {allocated['swapped']:,} bytes; clone and two copies "
        f"{allocated['naive swapped']:,}"
    )
    print(
        f"{NUM_UPDATES} updates call state_dict() {calls['update']:,} times; the naive loop's "
        f"{calls['naive']:,}"
    )
    long = content["long_run"]
    print(
        f"after {long['num_updates']:,} updates of {long['num_tensors']} tensors, one takes "
        f"{long['worn_of_new']:.2f} times one of a new manager ({long['us']['worn']:.2f} and "
        f"{long['us']['new']:.2f} us)"
    )
    if args.json:
        report.write_json(args.json, facts, content)
    report.warn_of_others(facts)
    return report.print_failures(content["failures"])
