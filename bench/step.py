"""python -m bench step: what averaging adds to a training step on a GPU.

Two stacks in bf16 autocast with a fused AdamW: ViT-L/16 on images, and blocks of Llama 3 8B on
hidden states. One model and one optimizer serve all ways of averaging, which take turns (see
bench/timer.py): without any, by the plain loop, by torch._foreach, by the manager, by the manager
on a stream of its own that the next optimizer step waits for (by hand, and by `overlap=True`), into
the host's memory in both ways, and the whole step as a captured CUDA graph without and with the
average in it, by a plan, and by a manager that has its schedule on the device. Each is first
checked against `lerp`. A time is that of several steps from an idle GPU to an idle GPU, over their
number.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fused_ema
from bench import report, timer
from bench.providers import captured
from fused_ema.__main__ import number
from fused_ema.manager import AveragedOn

# 1/8 is exact, and far above the rounding: a way that does nothing fails its check.
MOMENTUM = 0.125
STEPS_A_SAMPLE = 4
ENOUGH_ROUNDS = 30  # On an H200 six rounds of ViT-L/16 gave another order than thirty-four.
_WARM_UP_STEPS = 3
_CAPTURABLE = 100_000  # Steps; more than a run of the command has.
_SECONDS = 50.0
_CHECKED_TENSORS = 5

# ---- what is trained


@dataclass(frozen=True)
class Size:
    """Of a stack of transformer blocks, and of its inputs."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    hidden: int  # Of the feed-forward part.
    batch: int
    tokens: int


SIZES = {
    "vit": {
        "full": Size(24, 1024, 16, 16, 4096, 64, 196),
        "tiny": Size(2, 32, 4, 4, 64, 2, 16),
    },
    "llama": {
        "full": Size(4, 4096, 32, 8, 14336, 4, 2048),
        "tiny": Size(2, 32, 4, 2, 64, 2, 16),
    },
}
TITLES = {"vit": "ViT-L/16", "llama": "Llama 3 8B, 4 of 32 layers"}


class VisionTransformer(nn.Module):
    """Patches of 16 x 16 pixels, a class token, pre-norm encoder layers, a head."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.patches = nn.Linear(16 * 16 * 3, size.width)
        self.token = nn.Parameter(torch.zeros(1, 1, size.width))
        self.positions = nn.Parameter(torch.randn(1, size.tokens + 1, size.width) * 0.02)
        self.layers = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    size.width,
                    size.heads,
                    size.hidden,
                    dropout=0.0,
                    activation="gelu",
                    batch_first=True,
                    norm_first=True,
                )
                for _ in range(size.layers)
            )
        )
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, 1000)

    def forward(self, images: Tensor) -> Tensor:
        """The logits of (batch, tokens, 16 * 16 * 3) pixels."""
        x = self.patches(images)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions
        logits: Tensor = self.head(self.norm(self.layers(x))[:, 0])
        return logits


class LlamaBlock(nn.Module):
    """RMSNorm, grouped-query attention with rotary positions, and SwiGLU, as in Llama 3."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.head_width = size.width // size.heads
        kv_width = size.kv_heads * self.head_width
        linear = partial(nn.Linear, bias=False)
        self.attention_norm = nn.RMSNorm(size.width)
        self.q, self.o = linear(size.width, size.width), linear(size.width, size.width)
        self.k, self.v = linear(size.width, kv_width), linear(size.width, kv_width)
        self.norm = nn.RMSNorm(size.width)
        self.gate, self.up = linear(size.width, size.hidden), linear(size.width, size.hidden)
        self.down = linear(size.hidden, size.width)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        """Of (batch, tokens, width), with the complex rotation of each position."""
        h = self.attention_norm(x)
        q, k, v = (
            torch.unflatten(projected, -1, (-1, self.head_width)).transpose(1, 2)
            for projected in (self.q(h), self.k(h), self.v(h))
        )
        attended = nn.functional.scaled_dot_product_attention(
            _turned(q, turns), _turned(k, turns), v, is_causal=True, enable_gqa=True
        )
        x = x + self.o(attended.transpose(1, 2).flatten(-2))
        h = self.norm(x)
        added: Tensor = self.down(nn.functional.silu(self.gate(h)) * self.up(h))
        return x + added


def _turned(x: Tensor, turns: Tensor) -> Tensor:
    pairs = torch.view_as_complex(torch.unflatten(x.float(), -1, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)


class LlamaStack(nn.Module):
    """Blocks on hidden states, without embedding and head."""

    turns: Tensor

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(LlamaBlock(size) for _ in range(size.layers))
        head_width = size.width // size.heads
        speeds = 500_000.0 ** (-torch.arange(0, head_width, 2) / head_width)
        angles = torch.outer(torch.arange(size.tokens), speeds)
        turns = torch.polar(torch.ones_like(angles), angles)
        self.register_buffer("turns", turns, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """The hidden states after all blocks."""
        for block in self.blocks:
            x = block(x, self.turns)
        return x


class Training:
    """A model on fixed inputs, and one optimizer step at a time."""

    def __init__(self, name: str, size: Size, device: torch.device) -> None:
        torch.manual_seed(0)
        self.device = device
        with device:
            if name == "vit":
                self.model: nn.Module = VisionTransformer(size)
                self.inputs = torch.randn(size.batch, size.tokens, 16 * 16 * 3)
            else:
                self.model = LlamaStack(size)
                self.inputs = torch.randn(size.batch, size.tokens, size.width)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-5, fused=True, capturable=device.type == "cuda"
        )

    def params(self) -> list[Tensor]:
        """What is averaged."""
        return [p.detach() for p in self.model.parameters()]

    def gradients(self) -> None:
        """Forward and backward, in bf16 autocast."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            outputs = self.model(self.inputs)
        loss: Any = outputs.float().square().mean()
        loss.backward()


# ---- who averages


@dataclass(frozen=True, eq=False)
class Way:
    """One way to run a training step.

    Attributes:
        title: What the table calls it.
        step: Runs one.
        ema: What it averages into, in the order of the params; empty where it doesn't.
        beside: The way without averaging that it is compared with.
        wait: Returns once the average is there.
    """

    title: str
    step: Callable[[], object]
    ema: Sequence[Tensor] = ()
    beside: str = "off"
    wait: Callable[[], object] = lambda: None


def make_ways(training: Training) -> dict[str, Way]:
    """Every way that the device has; those that need CUDA are left out elsewhere."""
    params = training.params()
    manager = fused_ema.EMAManager(training.model, MOMENTUM, skip_buffers=True)
    managed = [ema for _, ema in manager.named_emas()]
    ema = [p.clone() for p in params]

    def step(average: Callable[[], object] | None, before: Callable[[], object] | None) -> None:
        training.gradients()
        if before is not None:
            before()
        training.optimizer.step()
        if average is not None:
            average()

    def way(
        title: str,
        average: Callable[[], object] | None,
        ema: Sequence[Tensor],
        before: Callable[[], object] | None = None,
    ) -> Way:
        return Way(title, partial(step, average, before), ema)

    def naive() -> None:
        for e, p in zip(ema, params, strict=True):
            e.mul_(1 - MOMENTUM).add_(p, alpha=MOMENTUM)

    ways = {
        "off": way("no average", None, ()),
        "naive": way("loop: mul_ and add_", naive, ema),
        "foreach": way(
            "torch._foreach_lerp_", partial(torch._foreach_lerp_, ema, params, MOMENTUM), ema
        ),
        "manager": way("EMAManager.update", manager.update, managed),
    }
    if training.device.type != "cuda":
        return ways

    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def on_the_side() -> None:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            manager.update()

    def wait_for_the_side() -> None:
        torch.cuda.current_stream().wait_stream(side)

    ways["side stream"] = way(
        "EMAManager.update on a stream of its own", on_the_side, managed, wait_for_the_side
    )
    made: tuple[tuple[str, str, str | None, AveragedOn], ...] = (
        ("overlap", "EMAManager(overlap=True)", None, "auto"),
        ("host ema", "EMAManager(device='cpu'), by the device", "cpu", "device"),
        ("host ema by host", "EMAManager(device='cpu'), by the host", "cpu", "host"),
    )
    for key, title, place, where in made:
        beside = fused_ema.EMAManager(
            training.model,
            MOMENTUM,
            skip_buffers=True,
            overlap=True,
            device=place,
            averaged_on=where,
        )
        emas = [ema for _, ema in beside.named_emas()]
        ways[key] = replace(way(title, beside.update, emas, beside.wait), wait=beside.synchronize)
    scheduled = fused_ema.EMAManager(
        training.model, MOMENTUM, skip_buffers=True, capturable=_CAPTURABLE
    )
    of_scheduled = [ema for _, ema in scheduled.named_emas()]
    plan = fused_ema.Plan(managed, params)
    momentum = torch.tensor(MOMENTUM, dtype=torch.float64, device=training.device)
    for name, title, average, averaged in (
        ("captured off", "captured, no average", None, ()),
        ("captured", "captured, Plan.update in the graph", partial(plan.update, momentum), managed),
        (
            "captured manager",
            "captured, EMAManager.update in the graph",
            scheduled.update,
            of_scheduled,
        ),
    ):
        replay = captured([partial(step, average, None)], _WARM_UP_STEPS)
        ways[name] = Way(title, replay, averaged, "captured off")
    return ways


def check(way: Way, params: Sequence[Tensor]) -> str:
    """Runs one step and says what is wrong with the average; empty if nothing is."""
    # Some of every size, the largest and the last too.
    order = sorted(range(len(params)), key=lambda i: params[i].numel())
    chosen = {
        order[i * (len(order) - 1) // (_CHECKED_TENSORS - 1)] for i in range(_CHECKED_TENSORS)
    }
    before = {i: way.ema[i].clone() for i in chosen | {len(params) - 1} if way.ema}
    was = params[0].clone()
    way.step()
    way.wait()
    if params[0].device.type == "cuda":
        torch.cuda.synchronize()
    if torch.equal(was, params[0]):
        return "the step changed no weight"
    for i, ema in before.items():
        param = params[i].to(ema.device, torch.float64)
        right = ema.double().lerp_(param, MOMENTUM)
        bound = (ema.double().abs() + param.abs()) * 2.0**-22
        if not ((way.ema[i].double() - right).abs() <= bound).all():
            return f"the average of tensor {i} is off"
    return ""


# ---- the run


def run_model(
    name: str, size: Size, device: torch.device, seconds: float, rounds: int | None
) -> dict[str, Any]:
    """Measures one stack; returns what the JSON file holds of it."""
    training = Training(name, size, device)
    params = training.params()
    ways = make_ways(training)
    failures = [
        f"{name}, {way.title}: {wrong}" for way in ways.values() if (wrong := check(way, params))
    ]

    def steps(way: Way) -> None:
        for _ in range(STEPS_A_SAMPLE):
            way.step()

    timings = timer.interleave(
        {key: [partial(steps, way)] for key, way in ways.items()},
        timer.WallClock() if device.type == "cuda" else timer.CpuClock(),
        seconds=seconds,
        rounds=rounds,
    )
    ms = {key: timing.median / STEPS_A_SAMPLE * 1e3 for key, timing in timings.items()}
    rows = [
        {
            "way": key,
            "title": way.title,
            "ms": ms[key],
            "ms_p10": timings[key].p10 / STEPS_A_SAMPLE * 1e3,
            "ms_p90": timings[key].p90 / STEPS_A_SAMPLE * 1e3,
            "rounds": timings[key].rounds,
            "added_ms": ms[key] - ms[way.beside],
            "share_of_step": (ms[key] - ms[way.beside]) / ms[key],
        }
        for key, way in ways.items()
    ]
    # The same tensors alone, to tell what a stream of its own hides.
    with torch.no_grad():
        alone = partial(fused_ema.Plan(ways["naive"].ema, params).update, MOMENTUM)
        clock = timer.CudaClock() if device.type == "cuda" else timer.CpuClock()
        update = timer.interleave({"update": [alone]}, clock, seconds=1.0, rounds=rounds)["update"]
    return {
        "model": name,
        "title": TITLES[name],
        "size": vars(size),
        "num_tensors": len(params),
        "num_elements": sum(p.numel() for p in params),
        "update_alone_ms": update.median * 1e3,
        "failures": failures,
        "rows": rows,
    }


def table(result: dict[str, Any]) -> report.Table:
    """A row for each way."""
    title = (
        f"{result['title']}: {result['num_tensors']:,} tensors, "
        f"{result['num_elements'] / 1e6:,.0f} M elements; an update alone takes "
        f"{result['update_alone_ms']:.2f} ms"
    )
    if (rounds := min(r["rounds"] for r in result["rows"])) < ENOUGH_ROUNDS:
        title += f"; {rounds} rounds, so the order of the ways is noise"
    rows = tuple(
        (
            r["title"],
            f"{r['ms']:.2f}",
            f"{r['ms_p10']:.2f} - {r['ms_p90']:.2f}",
            f"{r['added_ms']:+.2f}" if r["added_ms"] else "",
            f"{r['share_of_step']:.2%}" if r["added_ms"] else "",
        )
        for r in result["rows"]
    )
    return report.Table(title, ("step", "ms", "p10 - p90", "added ms", "of the step"), rows)


def main(argv: Sequence[str]) -> int:
    """Measures training steps; returns the exit status."""
    parser = argparse.ArgumentParser(
        "python -m bench step",
        description="A training step without an average, and with it in every way.",
    )
    add = parser.add_argument
    add("--models", type=report.names(tuple(SIZES), "model"), help=f"{', '.join(SIZES)} (all)")
    report.add_device(parser)
    add("--tiny", action="store_true", help="small stacks, for a look at the command itself")
    add("--rounds", type=number(int, 1), help="exactly so many, instead of as time allows")
    add("--seconds", type=number(float, 0), default=_SECONDS, help="for all (%(default)s)")
    report.add_json(parser)
    args = parser.parse_args(argv)
    device = report.device_of(parser, args)
    models = args.models or list(SIZES)
    results: list[dict[str, Any]] = []
    stopped: list[str] = []
    with report.measuring(device) as facts, report.stoppable(stopped):
        for name in models:
            size = SIZES[name]["tiny" if args.tiny else "full"]
            seconds = args.seconds / len(models)
            results.append(run_model(name, size, device, seconds, args.rounds))
            report.show(table(results[-1]))
            if device.type == "cuda":
                torch.cuda.empty_cache()
    if args.json:
        settings = {"momentum": MOMENTUM, "steps_a_sample": STEPS_A_SAMPLE, "tiny": args.tiny}
        report.write_json(args.json, facts, {"settings": settings, "results": results})
    report.warn_of_others(facts)
    failures = [line for result in results for line in result["failures"]]
    return report.print_failures(failures + stopped)
