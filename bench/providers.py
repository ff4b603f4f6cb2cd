"""Who is measured: every way to update, swap or copy a list of tensors, as one table.

A provider prepares itself for one set of tensors and hands back a call that does the op once. A
new one is a new row of PROVIDERS.
"""

import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fused_ema
from fused_ema import testing

Op = Literal["update", "swap", "copy"]
Call = Callable[[], object]

OPS: tuple[Op, ...] = ("update", "swap", "copy")
DTYPE_PAIRS = tuple("/".join(map(testing.dtype_name, pair)) for pair in testing.DTYPE_PAIRS)
PLAN = "fused_ema plan"
ONE_THREAD = "fused_ema plan on one thread"
CAPTURED = "fused_ema plan captured"
TRITON = "triton"
COMPILED = "compile foreach lerp_"
OWN_COPY = "own copy"
# On a GPU torch's copy of one flat tensor to another of its dtype is one cudaMemcpyAsync.
FLAT_COPY = "flat copy_"
LIMITS = (OWN_COPY, FLAT_COPY)
MIN_NODES = 10  # Of a captured graph.

# torch.compile unrolls the list into one graph; a thousand tensors take it minutes (140 to 180 s
# for Adam in pytorch PR 112440).
COMPILE_LIMIT_S = 120.0


def split_pair(pair: str) -> tuple[torch.dtype, torch.dtype]:
    """The ema and param dtype of a pair written "ema/param"."""
    ema, param = (getattr(torch, name) for name in pair.split("/"))
    return ema, param


def least_bytes(op: Op, ema: torch.dtype, param: torch.dtype, num_elements: int) -> int:
    """The bytes that nobody can avoid to read or write; the GB/s of every provider count these."""
    per_element = {
        "update": 2 * ema.itemsize + param.itemsize,
        "swap": 2 * (ema.itemsize + param.itemsize),
        "copy": ema.itemsize + param.itemsize,
    }
    return per_element[op] * num_elements


def _module(tensors: list[Tensor]) -> nn.Module:
    module = nn.Module()
    # register_parameter would do the same, but takes seconds for many sets of 10,000.
    module._parameters.update({str(i): nn.Parameter(t) for i, t in enumerate(tensors)})
    return module


@dataclass(frozen=True, eq=False)
class Lists:
    """One set of tensors to work on: pair i is `ema[i]` and `params[i]`."""

    ema: list[Tensor]
    params: list[Tensor]

    @cached_property
    def flat(self) -> "Lists":
        """One pair of as many elements, both in the ema's dtype: what the limits run on."""
        ema = torch.cat([tensor.reshape(-1) for tensor in self.ema])
        params = torch.cat([tensor.reshape(-1) for tensor in self.params])
        return Lists([ema], [params.to(ema.dtype)])

    @cached_property
    def modules(self) -> tuple[nn.Module, nn.Module]:
        """Modules whose parameters are the ema tensors and the params themselves."""
        return _module(self.ema), _module(self.params)


@dataclass(frozen=True)
class Provider:
    """One way to do one op.

    Attributes:
        name: What records and `--providers` call it. A name may have a row for each op.
        family: "ours", "naive" (a loop over tensors), "foreach", "captured" (a graph of one of
            torch's ways), "compile", "triton", "package", or "limit": a yardstick that works on one
            flat pair, no competitor.
        op: What it does.
        prepare: Takes the tensors and the momentum, returns the call that does the op once.
        pairs: Which dtype pairs it serves: "any", "same" (both dtypes equal) or "mixed".
        module: What must be importable.
        limit_s: How long its first call may take; None for as long as it does.
        devices: The device types it runs on.
        only_if_named: It doesn't run without being asked for by name.
        beside: The ops it is shown beside, where that is not `op` alone.
    """

    name: str
    family: str
    op: Op
    prepare: Callable[[Lists, float], Call]
    pairs: Literal["any", "same", "mixed"] = "any"
    module: str | None = None
    limit_s: float | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")
    only_if_named: bool = False
    beside: tuple[Op, ...] = ()

    @property
    def is_captured(self) -> bool:
        """Whether its calls are measured as nodes of a graph."""
        return self.family == "captured" or self.name == CAPTURED

    @property
    def kind(self) -> str:
        """ours, torch, triton or limit, as the records say it."""
        return self.family if self.family in ("ours", "triton", "limit") else "torch"

    def serves(self, op: Op, pair: str) -> bool:
        """Whether it belongs beside the others of that op and dtype pair."""
        ema, param = split_pair(pair)
        fits = self.pairs == "any" or (self.pairs == "same") == (ema == param)
        return fits and op in (self.beside or (self.op,))

    def why_not(self, device_type: str) -> str:
        """Why it can't run here on such a device; empty if it can."""
        if device_type not in self.devices:
            return f"runs on {' and '.join(self.devices)} only"
        return _import_error(self.module) if self.module else ""

    def target(self, lists: Lists) -> Lists:
        """The tensors it works on."""
        return lists.flat if self.family == "limit" else lists

    def bytes_moved(self, pair: str, num_elements: int) -> int:
        """`least_bytes` of what it does; a limit's flat pair has the ema's dtype twice."""
        ema, param = split_pair(pair)
        return least_bytes(self.op, ema, ema if self.family == "limit" else param, num_elements)


@cache
def _import_error(module: str) -> str:
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    try:
        importlib.import_module(module)
    except Exception as error:  # One built for another torch may fail in any way.
        return f"{package} does not load: {str(error).splitlines()[0]}"
    return ""


# ---- update


def _plan_update(lists: Lists, momentum: float) -> Call:
    return partial(fused_ema.Plan(lists.ema, lists.params).update, momentum)


def _one_thread_update(lists: Lists, momentum: float) -> Call:
    plan = fused_ema.Plan(lists.ema, lists.params)

    def call() -> None:
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        plan.update(momentum)
        torch.set_num_threads(num_threads)

    return call


def _one_shot_update(lists: Lists, momentum: float) -> Call:
    return partial(fused_ema.update_, lists.ema, lists.params, momentum)


def _naive_mul_add(lists: Lists, momentum: float) -> Call:
    def call() -> None:
        for e, p in zip(lists.ema, lists.params, strict=True):
            e.mul_(1 - momentum).add_(p, alpha=momentum)

    return call


def _naive_lerp(lists: Lists, momentum: float) -> Call:
    def call() -> None:
        for e, p in zip(lists.ema, lists.params, strict=True):
            e.lerp_(p, momentum)

    return call


def _naive_cast_lerp(lists: Lists, momentum: float) -> Call:
    def call() -> None:
        for e, p in zip(lists.ema, lists.params, strict=True):
            e.lerp_(p.to(e.dtype), momentum)

    return call


def _foreach_mul_add(lists: Lists, momentum: float) -> Call:
    def call() -> None:
        torch._foreach_mul_(lists.ema, 1 - momentum)
        torch._foreach_add_(lists.ema, lists.params, alpha=momentum)

    return call


def _foreach_lerp(lists: Lists, momentum: float) -> Call:
    return partial(torch._foreach_lerp_, lists.ema, lists.params, momentum)


def _foreach_cast_lerp(lists: Lists, momentum: float) -> Call:
    # torch's lerp refuses mixed dtypes, so the params are cast into a buffer that is made once.
    cast = [torch.empty_like(e) for e in lists.ema]

    def call() -> None:
        torch._foreach_copy_(cast, lists.params)
        torch._foreach_lerp_(lists.ema, cast, momentum)

    return call


@dataclass(frozen=True, eq=False)
class Replay:
    """Replays a graph, and keeps what its calls work on, of which a graph knows nothing."""

    graph: torch.cuda.CUDAGraph
    kept: Sequence[Call]

    @property
    def times(self) -> int:
        """How often one replay does the op."""
        return len(self.kept)

    def __call__(self) -> None:
        """Does it so often."""
        self.graph.replay()


def times(call: Call) -> int:
    """How often one call does its op."""
    return call.times if isinstance(call, Replay) else 1


def captured(calls: Sequence[Call], warm_up_calls: int = 0) -> Replay:
    """A CUDA graph of those calls, one after the other.

    Args:
        calls: What it records.
        warm_up_calls: Of the first, made before, on a stream of their own, as torch asks for.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_up_calls):
            calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return Replay(graph, tuple(calls))


def chain(calls: Sequence[Call]) -> Replay:
    """A graph of all calls, over again until it has MIN_NODES: what a training step would hold.

    A graph of one node, replayed again and again, measures the launch of a graph.
    """
    return captured([*calls] * math.ceil(MIN_NODES / len(calls)))


def _captured_plan_update(lists: Lists, momentum: float) -> Call:
    held = torch.tensor(momentum, dtype=torch.float64, device=lists.ema[0].device)
    return partial(fused_ema.Plan(lists.ema, lists.params).update, held)


def _triton_update(lists: Lists, momentum: float) -> Call:
    triton_ema = importlib.import_module("bench.gpu.triton_ema")
    call: Call = triton_ema.prepare(lists.ema, lists.params, momentum)
    return call


@lru_cache(maxsize=1)
def _compiled_lerp(shapes: tuple[torch.Size, ...], dtype: torch.dtype) -> Callable[..., Any]:
    def lerp(ema: list[Tensor], params: list[Tensor], momentum: float) -> None:
        torch._foreach_lerp_(ema, params, momentum)

    # Dynamo counts recompilations, and after eight runs the rest uncompiled without a word.
    torch._dynamo.reset()
    return torch.compile(lerp, dynamic=False, fullgraph=True)


def _compile_foreach_lerp(lists: Lists, momentum: float) -> Call:
    compiled = _compiled_lerp(tuple(e.shape for e in lists.ema), lists.ema[0].dtype)
    return partial(compiled, lists.ema, lists.params, momentum)


# The three packages below clone the model they are given. Their copy is exchanged for our tensors,
# so that every provider works on the same memory.


def _averaged_model(lists: Lists, momentum: float) -> Call:
    average = get_ema_multi_avg_fn(1 - momentum)  # type: ignore[no-untyped-call]
    averaged = AveragedModel(nn.Module(), multi_avg_fn=average)
    averaged.module, model = lists.modules
    averaged.n_averaged.fill_(1)  # The first update would copy instead of averaging.
    return partial(averaged.update_parameters, model)


def _timm_model_ema(lists: Lists, momentum: float) -> Call:
    timm = importlib.import_module("timm.utils.model_ema")
    ema = timm.ModelEmaV3(nn.Linear(1, 1), decay=1 - momentum, foreach=True)
    ema.module, model = lists.modules
    ema.stochastic_rounding = False  # Its default for bf16 does other work than the rest.
    return partial(ema.update, model)


def _diffusers_ema(lists: Lists, momentum: float) -> Call:
    diffusers = importlib.import_module("diffusers.training_utils")
    decay = 1 - momentum
    ema = diffusers.EMAModel([], decay=decay, min_decay=decay, foreach=True)
    ema.shadow_params = lists.ema
    ema.optimization_step = 1  # The first step has decay 0, and so would copy.
    return partial(ema.step, list(lists.modules[1].parameters()))


# ---- swap


def _plan_swap(lists: Lists, momentum: float) -> Call:
    return fused_ema.Plan(lists.ema, lists.params).swap


def _one_shot_swap(lists: Lists, momentum: float) -> Call:
    return partial(fused_ema.swap_, lists.ema, lists.params)


def _naive_swap(lists: Lists, momentum: float) -> Call:
    def call() -> None:
        for e, p in zip(lists.ema, lists.params, strict=True):
            old = e.clone()
            e.copy_(p)
            p.copy_(old)

    return call


def _foreach_swap(lists: Lists, momentum: float) -> Call:
    def call() -> None:
        old = [e.clone() for e in lists.ema]
        torch._foreach_copy_(lists.ema, lists.params)
        torch._foreach_copy_(lists.params, old)

    return call


# ---- copy, from params to ema


def _plan_copy(lists: Lists, momentum: float) -> Call:
    return fused_ema.Plan(lists.ema, lists.params).copy_to_ema


def _one_shot_copy(lists: Lists, momentum: float) -> Call:
    return partial(fused_ema.copy_, lists.ema, lists.params)


def _naive_copy(lists: Lists, momentum: float) -> Call:
    def call() -> None:
        for e, p in zip(lists.ema, lists.params, strict=True):
            e.copy_(p)

    return call


def _foreach_copy(lists: Lists, momentum: float) -> Call:
    return partial(torch._foreach_copy_, lists.ema, lists.params)


PROVIDERS: tuple[Provider, ...] = (
    Provider(PLAN, "ours", "update", _plan_update),
    Provider(
        ONE_THREAD, "ours", "update", _one_thread_update, devices=("cpu",), only_if_named=True
    ),
    Provider("fused_ema", "ours", "update", _one_shot_update),
    Provider(CAPTURED, "ours", "update", _captured_plan_update, devices=("cuda",)),
    Provider("naive mul_ add_", "naive", "update", _naive_mul_add),
    Provider("naive lerp_", "naive", "update", _naive_lerp, "same"),
    Provider("naive cast lerp_", "naive", "update", _naive_cast_lerp, "mixed"),
    Provider("foreach mul_ add_", "foreach", "update", _foreach_mul_add),
    Provider("foreach lerp_", "foreach", "update", _foreach_lerp, "same"),
    Provider("foreach cast lerp_", "foreach", "update", _foreach_cast_lerp, "mixed"),
    Provider(
        "foreach lerp_ captured",
        "captured",
        "update",
        _foreach_lerp,
        "same",
        devices=("cuda",),
    ),
    Provider(
        COMPILED,
        "compile",
        "update",
        _compile_foreach_lerp,
        "same",
        limit_s=COMPILE_LIMIT_S,
        only_if_named=True,
    ),
    Provider(TRITON, "triton", "update", _triton_update, module="triton", devices=("cuda",)),
    Provider("swa_utils AveragedModel", "package", "update", _averaged_model, "same"),
    Provider(
        "timm ModelEmaV3",
        "package",
        "update",
        _timm_model_ema,
        "same",  # On CUDA it raises for mixed pairs.
        module="timm.utils.model_ema",
    ),
    Provider(
        "diffusers EMAModel", "package", "update", _diffusers_ema, module="diffusers.training_utils"
    ),
    Provider(PLAN, "ours", "swap", _plan_swap),
    Provider("fused_ema", "ours", "swap", _one_shot_swap),
    Provider("clone and two copies", "naive", "swap", _naive_swap),
    Provider("foreach copies", "foreach", "swap", _foreach_swap),
    Provider(PLAN, "ours", "copy", _plan_copy),
    Provider("fused_ema", "ours", "copy", _one_shot_copy),
    Provider("naive copy_", "naive", "copy", _naive_copy),
    Provider("foreach copy_", "foreach", "copy", _foreach_copy),
    Provider(OWN_COPY, "limit", "copy", _plan_copy, beside=OPS),
    Provider(FLAT_COPY, "limit", "copy", _naive_copy, beside=OPS),
    Provider("own triad", "limit", "update", _plan_update),
    Provider("flat lerp_", "limit", "update", _naive_lerp),
)


def names() -> list[str]:
    """The names of all providers, in the table's order."""
    return list(dict.fromkeys(provider.name for provider in PROVIDERS))


def choose(op: Op, pair: str, device_type: str, wanted: list[str] | None) -> list[Provider]:
    """The providers of a measurement: the wanted ones, or all that run unasked on that device.

    The limits are always among them: a record tells its speed as a fraction of the fastest.
    """
    return [
        provider
        for provider in PROVIDERS
        if provider.serves(op, pair)
        and (
            provider.name in wanted or provider.name in LIMITS
            if wanted
            else device_type in provider.devices and not provider.only_if_named
        )
    ]
