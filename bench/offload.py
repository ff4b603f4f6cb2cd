"""python -m bench offload: a host ema against its link, and against what others do.

Params on a GPU, averages in the host's memory. First the link itself: copies of pinned memory one
way and both ways at once. Then updates, each from an idle GPU to an average that is there: ours, in
both ways, and two loops that people write: emas brought to the GPU as a whole and back, as
diffusers' scripts do with --offload_ema, and params copied to the host as a whole and averaged
there, as NeMo's EMA callback does with cpu_offload. Each first shows that it averages. GB/s are the
bytes that must cross the link, in the direction that has more of them, doubled where both have.

The run fails where a way does something else. On the CPU there is no link: only a look at it.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fused_ema
from bench import report, timer
from fused_ema.__main__ import number
from fused_ema.manager import AveragedOn

MOMENTUM = 0.125  # Exact, and far above the rounding: a way that does nothing fails its check.
PAIRS = {"fp32": torch.float32, "bf16": torch.bfloat16}
_SECONDS = 10.0  # Of each dtype.
_LINK_BYTES = 256 << 20
_WIDTH, _LAYERS = 4096, 12


def make_model(dtype: torch.dtype, device: torch.device, shrunk: int = 1) -> nn.Module:
    """Linear layers with 200 M elements, each dimension divided by a number."""
    width = _WIDTH // shrunk
    layers = (nn.Linear(width, width, device=device, dtype=dtype) for _ in range(_LAYERS))
    return nn.Sequential(*layers)


class Way:
    """One way to average.

    Args:
        title: What the table calls it.
        update: Returns once it has been asked for.
        emas: On the host.
        link_bytes: An element's, over the link.
        wait: Returns once the averages are there.
    """

    def __init__(
        self,
        title: str,
        update: Callable[[], object],
        emas: Sequence[Tensor],
        link_bytes: int,
        wait: Callable[[], object],
    ) -> None:
        self.title, self.update, self.emas = title, update, emas
        self.link_bytes, self.wait = link_bytes, wait

    def __call__(self) -> None:
        """One update, to its end."""
        self.update()
        self.wait()


def pinned(like: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy in the host's memory, pinned where there is a GPU."""
    copy = like.detach().to("cpu", dtype, copy=True)
    return copy.pin_memory() if like.is_cuda else copy


def make_ways(model: nn.Module) -> dict[str, Way]:
    """Each with emas of its own, in fp32."""
    params = [param.detach() for param in model.parameters()]
    size = params[0].element_size()
    ways: dict[str, Way] = {}
    made: tuple[tuple[AveragedOn, int], ...] = (("host", size), ("device", 8))
    for where, link_bytes in made:
        manager = fused_ema.EMAManager(
            model,
            MOMENTUM,
            device="cpu",
            averaged_on=where,
            overlap=True,
        )
        emas = [ema for _, ema in manager.named_emas()]
        title = f"EMAManager, averaged on the {where}"
        ways[where] = Way(title, manager.update, emas, link_bytes, manager.synchronize)

    there = [pinned(param, torch.float32) for param in params]

    def there_and_back() -> None:
        emas = [ema.to(params[0].device, non_blocking=True) for ema in there]
        torch._foreach_lerp_(emas, [param.float() for param in params], MOMENTUM)
        for ema, moved in zip(there, emas, strict=True):
            ema.copy_(moved, non_blocking=True)

    ways["emas moved"] = Way("emas to the device and back", there_and_back, there, 8, _wait)
    copies = [pinned(param, param.dtype) for param in params]
    here = [pinned(param, torch.float32) for param in params]

    def all_params() -> None:
        for copy, param in zip(copies, params, strict=True):
            copy.copy_(param, non_blocking=True)
        _wait()
        torch._foreach_mul_(here, 1 - MOMENTUM)
        torch._foreach_add_(here, copies, alpha=MOMENTUM)

    ways["params moved"] = Way("params to the host, foreach there", all_params, here, size, _wait)
    return ways


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@torch.no_grad()
def check(way: Way, model: nn.Module) -> str:
    """Runs a way once and says what is wrong; empty if nothing is."""
    params: list[Tensor] = list(model.parameters())
    torch._foreach_add_(params, 1.0)
    _wait()
    before = [ema.double() for ema in way.emas]
    way()
    for i, (ema, old, param) in enumerate(zip(way.emas, before, params, strict=True)):
        right = old.lerp_(param.to("cpu", torch.float64), MOMENTUM)
        if not ((ema.double() - right).abs() <= right.abs() * 2.0**-20 + 1e-6).all():
            return f"{way.title}: the average of tensor {i} is off"
    return ""


def link(device: torch.device, rounds: int | None, num_bytes: int) -> dict[str, float]:
    """GB/s of the link to the device, back, and of both at once."""
    here = [torch.empty(num_bytes, dtype=torch.uint8) for _ in range(2)]
    if device.type != "cuda":
        return {}
    here = [memory.pin_memory() for memory in here]
    there = [torch.empty(num_bytes, dtype=torch.uint8, device=device) for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]  # type: ignore[no-untyped-call]

    def copy(ways: Sequence[int]) -> None:
        for way in ways:
            with torch.cuda.stream(streams[way]):
                dst, src = (there, here) if way == 0 else (here, there)
                dst[way].copy_(src[way], non_blocking=True)
        _wait()

    calls = {"to the device": (0,), "to the host": (1,), "both": (0, 1)}
    timings = timer.interleave(
        {what: [partial(copy, ways)] for what, ways in calls.items()},
        timer.WallClock(),
        seconds=2.0,
        rounds=rounds,
    )
    return {
        what: len(ways) * num_bytes / timings[what].median / 1e9 for what, ways in calls.items()
    }


def run(device: torch.device, rounds: int | None, shrunk: int = 1) -> dict[str, Any]:
    """Checks and times; returns what the JSON file holds, without the environment."""
    speeds = link(device, rounds, _LINK_BYTES // shrunk)
    failures, rows = [], []
    for name, dtype in PAIRS.items():
        model = make_model(dtype, device, shrunk)
        ways = make_ways(model)
        failures += [wrong for way in ways.values() if (wrong := check(way, model))]
        timings = timer.interleave(
            {key: [way] for key, way in ways.items()},
            timer.WallClock() if device.type == "cuda" else timer.CpuClock(),
            seconds=_SECONDS,
            rounds=rounds,
        )
        num_elements = sum(param.numel() for param in model.parameters())
        for key, way in ways.items():
            gb_per_s = way.link_bytes * num_elements / timings[key].median / 1e9
            limit = speeds.get("both" if way.link_bytes == 8 else "to the host")
            rows.append(
                {
                    "params": name,
                    "way": key,
                    "title": way.title,
                    "num_elements": num_elements,
                    **report.microseconds(timings[key]),
                    "link_bytes": way.link_bytes * num_elements,
                    "gb_per_s": gb_per_s,
                    "of_link": None if limit is None else gb_per_s / limit,
                }
            )
    return {
        "settings": {"momentum": MOMENTUM, "shrunk": shrunk},
        "link_gb_per_s": speeds,
        "failures": failures,
        "rows": rows,
    }


def table(content: dict[str, Any]) -> report.Table:
    """A row for each dtype and way."""
    speeds = ", ".join(f"{what} {v:.1f}" for what, v in content["link_gb_per_s"].items())
    cells = tuple(
        (
            r["params"],
            r["title"],
            f"{r['us'] / 1e3:,.2f}",
            f"{r['us_p10'] / 1e3:,.2f} - {r['us_p90'] / 1e3:,.2f}",
            f"{r['gb_per_s']:,.1f}",
            "" if r["of_link"] is None else f"{r['of_link']:.2f}",
        )
        for r in content["rows"]
    )
    title = f"fp32 emas on the host; the link in GB/s: {speeds or 'none'}"
    headers = ("params", "", "ms", "p10 - p90", "GB/s", "of the link's")
    return report.Table(title, headers, cells)


def main(argv: Sequence[str]) -> int:
    """Measures host emas; returns the exit status."""
    parser = argparse.ArgumentParser(
        "python -m bench offload",
        description="Updates of averages in the host's memory, against the link to the GPU.",
    )
    add = parser.add_argument
    add("--shrunk", type=number(int, 1), default=1, help="divide its sizes (%(default)s)")
    add("--rounds", type=number(int, 1), help="exactly so many, instead of as time allows")
    report.add_device(parser)
    report.add_json(parser)
    args = parser.parse_args(argv)
    device = report.device_of(parser, args)
    with report.measuring(device) as facts:
        content = run(device, args.rounds, args.shrunk)
    report.show(table(content))
    if args.json:
        report.write_json(args.json, facts, content)
    report.warn_of_others(facts)
    return report.print_failures(content["failures"])
