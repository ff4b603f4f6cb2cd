"""The CUDA kernels' own code, compiled for this processor and run thread by thread.

tests/host/ stands in for the CUDA runtime: the files of csrc/cuda/ are compiled as they are, grid,
block and tile loops included. What only a GPU can show, memory order and its own conversions, isn't
shown here.
"""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest
from host import host_kernels
from host.host_kernels import (
    MANY_SIZES,
    MOMENTA,
    OFFSETS,
    HostKernels,
    Operation,
    check,
    check_averages,
)

from fused_ema.testing import DTYPE_PAIRS, EDGE_SIZES, dtype_name


@pytest.fixture(scope="module")
def host(tmp_path_factory) -> HostKernels:
    return HostKernels(host_kernels.build(tmp_path_factory.mktemp("host")))


def name_of(pair):
    return "/".join(map(dtype_name, pair))


@pytest.mark.parametrize("pair", DTYPE_PAIRS, ids=name_of)
@pytest.mark.parametrize("by_table", [True, False], ids=["table", "arguments"])
@pytest.mark.parametrize("form", host_kernels.FORMS)
def test_update(host, pair, by_table, form):
    for offsets, momentum in product(OFFSETS, (2e-4, 0.75)):
        check(host, Operation("update", form, momentum), pair, EDGE_SIZES, offsets, by_table)


@pytest.mark.parametrize("pair", DTYPE_PAIRS, ids=name_of)
@pytest.mark.parametrize("form", host_kernels.FORMS)
@pytest.mark.parametrize("in_memory", [True, False], ids=["in memory", "by value"])
def test_every_momentum(host, pair, form, in_memory):
    for momentum in MOMENTA:
        operation = Operation("update", form, momentum, in_memory)
        check(host, operation, pair, (1, 31, 1025, 5000), (0, 0), True)


@pytest.mark.parametrize("pair", DTYPE_PAIRS, ids=name_of)
@pytest.mark.parametrize("by_table", [True, False], ids=["table", "arguments"])
@pytest.mark.parametrize("kind", ["swap", "copy to ema", "copy to params"])
def test_swap_and_copies(host, pair, by_table, kind):
    for offsets in OFFSETS:
        check(host, Operation(kind), pair, EDGE_SIZES, offsets, by_table)


@pytest.mark.parametrize("pair", DTYPE_PAIRS, ids=name_of)
@pytest.mark.parametrize("by_table", [True, False], ids=["table", "arguments"])
def test_lists_that_need_several_launches(host, pair, by_table):
    for operation in host_kernels.operations((0.25,)):
        check(host, operation, pair, MANY_SIZES, (1, 3), by_table)


@pytest.mark.parametrize("sizes", [(), (0,), (0, 0, 0), (1,) * 1019, (1,) * 1020])
@pytest.mark.parametrize("by_table", [True, False], ids=["table", "arguments"])
def test_lists_at_the_edge(host, sizes, by_table):
    for operation in host_kernels.operations((0.25,)):
        check(host, operation, DTYPE_PAIRS[0], sizes, (0, 0), by_table)


@pytest.mark.parametrize("pair", DTYPE_PAIRS, ids=name_of)
@pytest.mark.parametrize("by_table", [True, False], ids=["table", "arguments"])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_several_averages(host, pair, by_table, count):
    # All aligned, each average misaligned by itself, the params, and the first.
    offsets = [
        (0,) * (count + 1),
        *((0,) * k + (3,) + (0,) * (count - k) for k in range(count + 1)),
    ]
    for form, its in product(host_kernels.FORMS, offsets):
        check_averages(host, form, count, pair, (0, 1, 17, 512, 4097, 9001), its, by_table)


def test_several_averages_of_many_tensors(host):
    for by_table in (True, False):
        check_averages(host, "lerp", 3, DTYPE_PAIRS[0], MANY_SIZES, (0, 1, 0, 0), by_table)


# Faults that were planted: file, what stands there, what it becomes.
MUTATIONS = {
    "the tail loses an element": (
        "cuda/loop.cuh",
        "odd < n && lane < n - in_vectors",
        "odd < n && lane + 1 < n - in_vectors",
    ),
    "the tail is off by one": ("cuda/loop.cuh", ": lane + in_vectors;", ": lane + in_vectors + 1;"),
    "a vector too many": (
        "cuda/loop.cuh",
        "if (kFull || i < num_vectors) {\n#pragma unroll",
        "if (kFull || i <= num_vectors) {\n#pragma unroll",
    ),
    "a step is walked twice": (
        "cuda/loop.cuh",
        "first * kTeam + rank, kTeam",
        "(first == 1 ? 0 : first) * kTeam + rank, kTeam",
    ),
    "the last warp tile is skipped": (
        "cuda/loop.cuh",
        "if (index < source.num_warp_tiles)",
        "if (index + 1 < source.num_warp_tiles)",
    ),
    "a block tile is run as the one before": (
        "cuda/loop.cuh",
        "source.block_tile(kShape, blockIdx.x)",
        "source.block_tile(kShape, blockIdx.x - (blockIdx.x == 3))",
    ),
    "ema and param trade places": (
        "cuda/update.cuh",
        "lerp(load(ema), static_cast<Compute<A>>(load(param)), c)",
        "lerp(static_cast<Compute<A>>(load(param)), load(ema), c)",
    ),
    "the momentum in memory is not read": (
        "cuda/update.cuh",
        "if (in_memory == nullptr) return;",
        "if (in_memory != in_memory + 1) return;",
    ),
    "mul_add does not round in between": (
        "cuda/update.cuh",
        "return load(Stored<A>::from(x));",
        "return x;",
    ),
    "an FMA adds the second product": (
        "ema_math.h",
        "round_to_ema(product(ema, V(c.decay))) + round_to_param(product(param, V(c.momentum)))",
        "fma(V(c.momentum), param, round_to_ema(product(ema, V(c.decay))))",
    ),
    "an FMA adds the first product": (
        "ema_math.h",
        "round_to_ema(product(ema, V(c.decay))) + round_to_param(product(param, V(c.momentum)))",
        "fma(V(c.decay), ema, round_to_param(product(param, V(c.momentum))))",
    ),
    "the param's product is rounded as the ema's": (
        "cuda/update.cuh",
        "return Compute<A>{load(Stored<B>::from(x))};",
        "return Compute<A>{load(Stored<A>::from(x))};",
    ),
    "a swap writes one side": (
        "cuda/swap.cu",
        "b = Converted<B, A>::from(kept);",
        "b = Converted<B, A>::from(a);",
    ),
    "a copy goes the other way": ("cuda/copy.cu", "if constexpr (kToA)", "if constexpr (!kToA)"),
    "a pair is taken for its neighbour": (
        "cuda/launch.cuh",
        "if (first[middle] <= index)",
        "if (first[middle] < index)",
    ),
    "a launch forgets its last pair": (
        "cuda/launch.cuh",
        "left < kMaxSpansPerLaunch<S> ? left : kMaxSpansPerLaunch<S>)",
        "left < kMaxSpansPerLaunch<S> ? left : kMaxSpansPerLaunch<S> - 1)",
    ),
    "the grid is rounded down": (
        "cuda/launch.cuh",
        "(uint64_t{source.num_warp_tiles} + kWarps - 1) / kWarps",
        "uint64_t{source.num_warp_tiles} / kWarps",
    ),
    "misaligned params are taken for aligned": (
        "cuda/vec.cuh",
        "return reinterpret_cast<uintptr_t>(pointer) % sizeof(Vec<T, N>) == 0;",
        "return pointer != nullptr;",
    ),
    "a block tile begins at the head": (
        "tiles.h",
        "split.head + index * block_tile, block_tile, span_index",
        "index * block_tile, block_tile, span_index",
    ),
    "the rest is cut short": (
        "tiles.h",
        "(rest + warp_tile - 1) / warp_tile",
        "rest / warp_tile",
    ),
    "an average goes by the momentum of another": (
        "cuda/update_averages.cu",
        "weights[2].move(e2, param);",
        "weights[1].move(e2, param);",
    ),
    "an average that isn't there is written": (
        "cuda/update_averages.cu",
        "(kSide < 2 || kSide < count)",
        "(kSide < 4 || kSide < count)",
    ),
    "one misaligned average is taken for aligned": (
        "cuda/loop.cuh",
        "((kSide == 0 || is_aligned<kVec>(at)) && ...)",
        "((kSide != 1 || is_aligned<kVec>(at)) && ...)",
    ),
    "a NaN is rounded like a number": ("ema_math.h", "is_nan ? 0x7fc0u : rounded", "rounded"),
}


def test_planted_faults_are_found(tmp_path):
    def plant(item) -> tuple[str, str]:
        number, (title, (file, old, new)) = item
        csrc = tmp_path / str(number) / "csrc"
        shutil.copytree(host_kernels.CSRC, csrc)
        text = (csrc / file).read_text()
        assert text.count(old) == 1, f"{title}: {file} has {text.count(old)} times {old!r}"
        (csrc / file).write_text(text.replace(old, new))
        return title, host_kernels.verdict_on(csrc, tmp_path / str(number), "average" in title)

    with ThreadPoolExecutor(2) as pool:
        verdicts = dict(pool.map(plant, enumerate(MUTATIONS.items())))
    missed = [title for title, verdict in verdicts.items() if not verdict]
    assert missed == []
    # The same check finds nothing in the sources as they are.
    assert host_kernels.verdict_on(host_kernels.CSRC, tmp_path / "sound", averages=True) == ""
