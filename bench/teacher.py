"""python -m bench teacher: what it costs to move a teacher, a model that the average is kept in.

Student and teacher are whole modules of the tensors of a ViT-S, a ViT-B and a small language model,
in fp32. Beside `EMAManager(into=teacher)` and a plan over both lists run the loops that people
write, and lightly's function where it can be imported. Each way first shows that it averages, then
they are timed in turn. Its part on the host is timed apart: on a CPU with as many tensors of one
element. Bytes are those that an average must move, 12 an element, whatever a loop moves.

The run fails where a way does something else.
"""

import argparse
import copy
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fused_ema
from bench import manager, report, timer
from bench.providers import Call, Lists
from fused_ema.__main__ import number

# 1/8 is exact and far above the rounding: a way that does nothing fails its check.
MOMENTUM = 0.125
_BYTES_AN_ELEMENT = 12
_SECONDS = 8.0  # Of each model.
# Width, layers, and what else there is: patches or tokens, places, classes.
MODELS = {
    "vit_s": ("ViT-S/16", 384, 12, 768, 197, 1000),
    "vit_b": ("ViT-B/16", 768, 12, 768, 197, 1000),
    "gpt2": ("GPT-2 small", 768, 12, 50257, 1024, 0),
}


def make_model(name: str, device: torch.device, shrunk: int = 1) -> nn.Module:
    """A module with the tensors of a model, its sizes divided by a number."""
    _, width, layers, inputs, places, classes = MODELS[name]
    width, inputs = width // shrunk, inputs // shrunk
    model = nn.Module()
    with device:
        embed = nn.Embedding(inputs, width) if classes == 0 else nn.Linear(inputs, width)
        model.add_module("embed", embed)
        model.register_parameter("places", nn.Parameter(torch.randn(places, width)))
        blocks = [nn.TransformerEncoderLayer(width, 1, 4 * width) for _ in range(layers)]
        model.add_module("blocks", nn.ModuleList(blocks))
        model.add_module("norm", nn.LayerNorm(width))
        if classes:
            model.add_module("head", nn.Linear(width, classes))
    return model


# ---- the ways


def _in_place(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> None:
    for t, s in zip(teacher, student, strict=True):
        t.mul_(1 - MOMENTUM).add_(s.detach(), alpha=MOMENTUM)


def _by_data(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> None:
    for t, s in zip(teacher, student, strict=True):
        t.data = t.data * (1 - MOMENTUM) + s.data * MOMENTUM


def make_ways(
    student: nn.Module,
) -> tuple[dict[str, tuple[str, Call, Lists]], dict[str, str]]:
    """Title, call and lists of each way; and why others are left out.

    All share one teacher but the one that gives it other memory at each step.
    """
    teacher, moving = (copy.deepcopy(student).requires_grad_(False) for _ in range(2))
    params: list[Tensor] = list(student.parameters())
    lists, moved = (Lists([*model.parameters()], params) for model in (teacher, moving))
    ema = fused_ema.EMAManager(student, MOMENTUM, into=teacher)
    plan = fused_ema.Plan(lists.ema, params)
    ways: dict[str, tuple[str, Call, Lists]] = {
        "into": ("EMAManager(into=teacher)", ema.update, lists),
        "plan": ("Plan.update", partial(plan.update, MOMENTUM), lists),
        "in place": (
            "t.mul_(1 - m).add_(s, alpha=m)",
            partial(_in_place, lists.ema, params),
            lists,
        ),
        "data": (
            "t.data = t.data * (1 - m) + s.data * m",
            partial(_by_data, moved.ema, params),
            moved,
        ),
    }
    left_out = {}
    if (utils := report.find("lightly.models.utils")) is not None:
        call = partial(utils.update_momentum, student, teacher, 1 - MOMENTUM)
        ways["lightly"] = "lightly's update_momentum", call, lists
    else:
        left_out["lightly"] = "lightly.models.utils can't be imported"
    return ways, left_out


def check(call: Call, lists: Lists) -> str:
    """Runs a way once and says what is wrong; empty if nothing is."""
    with torch.no_grad():
        torch._foreach_add_(lists.params, 1.0)
    before = timer.sample(lists)
    call()
    return timer.check("update", before, timer.sample(lists), MOMENTUM)


def run(
    names: Sequence[str], rounds: int | None, device: torch.device, shrunk: int = 1
) -> dict[str, Any]:
    """Checks and times; returns what the JSON file holds, without the environment."""
    records: list[dict[str, Any]] = []
    failures: list[str] = []
    left_out: dict[str, str] = {}
    is_gpu = device.type == "cuda"
    for name in names:
        student = make_model(name, device, shrunk)
        ways, absent = make_ways(student)
        left_out |= absent
        num_tensors, num_elements = len(ways["plan"][2].ema), _num_elements(ways["plan"][2])
        for title, call, lists in ways.values():
            if wrong := check(call, lists):
                failures.append(f"{MODELS[name][0]}, {title}: {wrong}")
        small = {} if is_gpu else make_ways(manager.make_model(num_tensors, device))[0]
        calls = {way: [call] for way, (_, call, _) in (ways if is_gpu else small).items()}
        hosts = timer.interleave(
            calls,
            timer.HostClock() if is_gpu else timer.CpuClock(),
            seconds=_SECONDS / 4,
            rounds=rounds,
            hot=True,
        )
        timings = timer.interleave(
            {way: [call] for way, (_, call, _) in ways.items()},
            timer.CudaClock() if is_gpu else timer.CpuClock(),
            seconds=_SECONDS,
            rounds=rounds,
            host_s={way: timing.median for way, timing in hosts.items()},
        )
        for way, timing in timings.items():
            records.append(
                {
                    "model": name,
                    "num_tensors": num_tensors,
                    "num_elements": num_elements,
                    "way": way,
                    "title": ways[way][0],
                    **report.microseconds(timing),
                    "gb_per_s": _BYTES_AN_ELEMENT * num_elements / timing.median / 1e9,
                    "host_us": hosts[way].median * 1e6,
                    "of_plan": timing.median / timings["plan"].median,
                }
            )
    return {
        "settings": {"momentum": MOMENTUM, "dtype": "float32", "shrunk": shrunk},
        "failures": failures,
        "left_out": left_out,
        "rows": records,
    }


def _num_elements(lists: Lists) -> int:
    """Elements of a side."""
    return sum(tensor.numel() for tensor in lists.ema)


# ---- what comes out


def tables(content: dict[str, Any]) -> list[report.Table]:
    """One for each model."""
    found = []
    for name in dict.fromkeys(r["model"] for r in content["rows"]):
        rows = [r for r in content["rows"] if r["model"] == name]
        title = "{}: {:,} tensors, {:,} elements".format(
            MODELS[name][0], rows[0]["num_tensors"], rows[0]["num_elements"]
        )
        cells = tuple(
            (
                r["title"],
                f"{r['us'] / 1e3:,.2f}",
                f"{r['us_p10'] / 1e3:,.2f} - {r['us_p90'] / 1e3:,.2f}",
                f"{r['gb_per_s']:,.1f}",
                f"{r['of_plan']:.2f}",
                f"{r['host_us']:,.1f}",
            )
            for r in rows
        )
        headers = ("", "ms", "p10 - p90", "GB/s", "of the plan's", "host us")
        found.append(report.Table(title, headers, cells))
    return found


def main(argv: Sequence[str]) -> int:
    """Measures the ways to move a teacher; returns the exit status."""
    parser = argparse.ArgumentParser(
        "python -m bench teacher",
        description="Time of moving a teacher's weights towards a student's: ours, a plan, and the "
        "loops that people write.",
    )
    add = parser.add_argument
    add("--models", type=report.names([*MODELS], "model"), help="vit_s, vit_b, gpt2")
    add("--shrunk", type=number(int, 1), default=1, help="divide their sizes (%(default)s)")
    add("--rounds", type=number(int, 1), help="exactly so many, instead of as time allows")
    report.add_device(parser)
    add("--threads", type=number(int, 1), help="of torch, on the CPU")
    report.add_json(parser)
    args = parser.parse_args(argv)
    device = report.device_of(parser, args)
    if args.threads:
        torch.set_num_threads(args.threads)
    with report.measuring(device) as facts, warnings.catch_warnings():
        # The ways share a teacher, so that ours is right to warn.
        warnings.filterwarnings("ignore", ".*was written since the last update", UserWarning)
        content = run(args.models or [*MODELS], args.rounds, device, args.shrunk)
    for table in tables(content):
        report.show(table)
    for way, reason in content["left_out"].items():
        print(f"left out: {way}: {reason}")
    if args.json:
        report.write_json(args.json, facts, content)
    report.warn_of_others(facts)
    return report.print_failures(content["failures"])
