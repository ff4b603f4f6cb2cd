"""What only a CUDA GPU can show: launches, streams, graphs, and memory that others may reuse."""

from __future__ import annotations

import gc
import time
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from nets import Net
from runs import needs_a_real_gpu

import fused_ema
from bench.gpu.launches import no_synchronisation, trace
from fused_ema import EMAManager, schedules
from fused_ema.testing import DTYPE_PAIRS, assert_bits_equal, make_lists

pytestmark = [
    pytest.mark.cuda,
    # Raised inside of a capture, an error leaves an empty graph behind.
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty"),
]

F32 = (torch.float32, torch.float32)
MIXED = (torch.float32, torch.bfloat16)
SIZES = (5, 5000, 100_003)
# What a plan can do, by name; each leaves the lists in other values than before.
CALLS = {
    "update": lambda plan: plan.update(0.25),
    "mul_add": lambda plan: plan.update(0.25, "mul_add"),
    "swap": lambda plan: plan.swap(),
    "copy_to_ema": lambda plan: plan.copy_to_ema(),
    "copy_to_params": lambda plan: plan.copy_to_params(),
}


def lists(sizes=SIZES, pair=F32, layout="contiguous", seed=0):
    return make_lists(sizes, pair, layout, "cuda", seed)


def clones(*groups):
    return [[t.clone() for t in group] for group in groups]


def assert_same(got, want, what=""):
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert_bits_equal(g, w, f"{what} [{i}]")


def busy(milliseconds=20):
    """Keeps the current stream's GPU work waiting for about so long."""
    torch.cuda._sleep(int(milliseconds * 1.5e6))


@contextmanager
def side_stream():
    """A stream of its own that starts after what is queued, and that the current one waits for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield stream
    torch.cuda.current_stream().wait_stream(stream)


# ---- launches and waits


@pytest.mark.parametrize("num_tensors", [1, 500, 1019, 1020, 10_000])
def test_launches(num_tensors):
    ema, params = lists((64,) * num_tensors)
    plan = fused_ema.Plan(ema, params)
    for name, call in CALLS.items():
        assert trace(lambda call=call: call(plan)).kernels == 1, name
    parts = -(-num_tensors // 1019)
    assert trace(lambda: fused_ema.update_(ema, params, 0.25)).kernels == parts
    assert trace(lambda: fused_ema.swap_(ema, params)).kernels == parts
    assert trace(lambda: fused_ema.copy_(ema, params)).kernels == parts


def test_one_launch_a_dtype_pair():
    ema, params = [], []
    for pair in DTYPE_PAIRS:
        e, p = lists((0, 3, 5000), pair)
        ema += e
        params += p
    plan = fused_ema.Plan(ema, params)
    for name, call in CALLS.items():
        assert trace(lambda call=call: call(plan)).kernels == len(DTYPE_PAIRS), name


def test_the_profiler_sees_what_it_is_asked_for():
    here, there = torch.ones(5, device="cuda"), torch.ones(5).pin_memory()
    assert trace(lambda: here.add_(1)).kernels == 1
    assert trace(lambda: here.copy_(there, non_blocking=True)).copies == 1
    assert trace(torch.cuda.synchronize).waits == 1


def test_the_sync_debug_mode_sees_a_wait():
    with no_synchronisation(), pytest.raises(RuntimeError, match="synchroni"):
        torch.ones(5, device="cuda").sum().item()


def test_nothing_waits_for_the_gpu():
    ema, params = lists()
    odd = lists((33,), F32, "with gaps")  # Served by torch, in the same plan.
    momentum = torch.tensor(0.25, dtype=torch.float64, device="cuda")
    plan = fused_ema.Plan(ema + odd[0], params + odd[1])
    calls = [
        *(lambda call=call: call(plan) for call in CALLS.values()),
        lambda: plan.update(momentum),
        lambda: plan.update(momentum, "mul_add"),
        lambda: fused_ema.update_(ema, params, 0.25),
        lambda: fused_ema.update_(ema, params, momentum),
        lambda: fused_ema.swap_(ema, params),
        lambda: fused_ema.copy_(ema, params),
    ]
    for call in calls:
        with no_synchronisation():
            call()
        assert trace(call).waits == 0
    with no_synchronisation():  # A plan that is made anew doesn't wait for its table either.
        params[1].data = params[1].data.clone()
        plan.update(0.25)
    assert plan._plan.num_refreshes == 1


def test_the_manager_waits_for_nothing():
    model = Net(torch.bfloat16).cuda()
    ema = EMAManager(model, momentum_fun=schedules.exponential(), begin=1)
    other = Net(torch.bfloat16).cuda()
    with no_synchronisation():
        for _ in range(3):
            ema.update()
            with ema.swapped():
                pass
        ema.copy_to(other)
        ema.reset()
        ema.state_dict()


def test_nothing_is_allocated():
    ema, params = lists()
    plan = fused_ema.Plan(ema, params)

    def allocations():
        return torch.cuda.memory_stats()["allocation.all.allocated"]

    for name, call in CALLS.items():
        before = allocations()
        call(plan)
        assert allocations() == before, name
    before = allocations()
    fused_ema.update_(ema, params, 0.25)
    fused_ema.swap_(ema, params)
    assert allocations() == before


def test_every_written_tensor_bumps_its_version():
    # More than one thread's share of them, and sides of different lengths.
    ema, params = lists((4,) * 3000)
    flat = torch.zeros(4 * 3000, device="cuda")
    ema[1000:2000] = flat.view(-1, 4)[:1000].unbind()  # One counter for all of them.
    plan = fused_ema.Plan(ema, params)

    def bumps(call):
        before = [[t._version for t in side] for side in (ema, params)]
        call()
        return [
            [t._version - was for t, was in zip(side, old, strict=True)]
            for side, old in zip((ema, params), before, strict=True)
        ]

    ones, none = [1] * 3000, [0] * 3000
    assert bumps(lambda: plan.update(0.5)) == [ones, none]
    assert bumps(plan.swap) == [ones, ones]
    assert bumps(plan.copy_to_params) == [none, ones]
    assert bumps(lambda: fused_ema.update_(ema, params, 0.5)) == [ones, none]


# ---- streams


def test_a_side_stream():
    ema, params = lists((1 << 22,))
    plan = fused_ema.Plan(ema, params)
    expected = ema[0].clone()
    busy()
    params[0].mul_(2)  # On the current stream, and late: the side stream must wait for it.
    with side_stream():
        for _ in range(20):
            plan.update(0.25)
    for _ in range(20):
        expected.lerp_(params[0], 0.25)
    assert_bits_equal(ema[0], expected)


@needs_a_real_gpu
def test_a_side_stream_does_not_wait_for_the_current_one():
    ema, params = lists()
    plan = fused_ema.Plan(ema, params)
    stream = torch.cuda.Stream()
    plan.update(0.25)  # The first launch of a kernel loads it, which may wait for the GPU.
    fused_ema.update_(ema, params, 0.25)
    torch.cuda.synchronize()
    busy(200)
    with torch.cuda.stream(stream):
        plan.update(0.25)
        fused_ema.update_(ema, params, 0.25)
        done = torch.cuda.Event()
        done.record()
    done.synchronize()
    # The sleep goes on for long after two small launches.
    assert not torch.cuda.current_stream().query()
    torch.cuda.synchronize()


def test_two_streams_at_once():
    pairs = [lists((1 << 20, 77, 4097), pair, seed=i) for i, pair in enumerate((F32, MIXED))]
    plans = [fused_ema.Plan(ema, params) for ema, params in pairs]
    expected = [clones(*pair) for pair in pairs]
    streams = [torch.cuda.Stream() for _ in plans]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    for step in range(30):
        for i in (0, 1) if step % 2 else (1, 0):
            with torch.cuda.stream(streams[i]):
                plans[i].update(0.25)
                plans[i].swap()
                if step % 5 == i:
                    fused_ema.update_(*pairs[i], 0.5, "mul_add")
    for stream in streams:
        torch.cuda.current_stream().wait_stream(stream)
    for i, (ema, params) in enumerate(expected):
        for step in range(30):
            for e, p in zip(ema, params, strict=True):
                e.lerp_(p.to(e.dtype), 0.25)
                kept = e.clone()
                e.copy_(p)
                p.copy_(kept)
                if step % 5 == i:
                    e.mul_(0.5).add_(p, alpha=0.5)
        for side, got, want in zip(("ema", "param"), pairs[i], (ema, params), strict=True):
            assert_same(got, want, f"{side} of list {i}")


def test_one_plan_on_two_streams_in_turn():
    ema, params = lists((1 << 20,))
    expected = ema[0].clone()
    plan = fused_ema.Plan(ema, params)
    for step in range(10):
        with side_stream():
            plan.update(0.25)
            if step == 4:
                params[0].data = params[0].data.clone()  # The next table is made on a side stream.
        plan.update(0.125)
        expected.lerp_(params[0], 0.25).lerp_(params[0], 0.125)
    torch.cuda.synchronize()
    assert_bits_equal(ema[0], expected)


def test_a_table_stays_while_another_stream_reads_it():
    ema, params = lists((64,) * 2000)
    expected = [e.lerp(p, 0.25) for e, p in zip(ema, params, strict=True)]
    plan = fused_ema.Plan(ema, params)
    kept = params[0].data
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        busy()
        plan.update(0.25)  # Waits behind the sleep, and then reads the first table.
    params[0].data = params[0].data.clone()
    plan._check()  # Makes a table anew, so that the first one is free for others.
    assert plan._plan.num_refreshes == 1
    rubbish = [torch.full((2000 * 24,), 255, dtype=torch.uint8, device="cuda") for _ in range(64)]
    torch.cuda.synchronize()
    assert len(rubbish) == 64
    assert_same(ema, expected)
    assert_bits_equal(kept, params[0].data)


def test_tensors_of_a_device_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    ema, params = make_lists(SIZES, F32, device="cuda:1")
    expected = [e.lerp(p, 0.25) for e, p in zip(ema, params, strict=True)]
    fused_ema.Plan(ema, params).update(0.25)
    assert_same(ema, expected)
    fused_ema.swap_(ema, params)
    assert_same(params, expected)
    assert torch.cuda.current_device() == 0


# ---- captured graphs


def capture(call, stream=None):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    return graph


@pytest.mark.parametrize("pair", [F32, MIXED], ids=["float32", "bfloat16"])
def test_a_graph_replays_with_the_momentum_of_the_moment(pair):
    ema, params = lists(pair=pair)
    expected, _ = clones(ema, params)
    plan = fused_ema.Plan(ema, params)
    momentum = torch.zeros((), dtype=torch.float64, device="cuda")

    def step():
        plan.update(momentum)
        fused_ema.update_(ema, params, momentum, "mul_add")

    graph = capture(step)
    assert_same(ema, expected, "captured, not run")
    for m in (0.1, 0.7, 0.001, 1.0, 0.0):
        momentum.fill_(m)
        graph.replay()
        for e, p in zip(expected, params, strict=True):
            if 0 < m < 1:
                e.lerp_(p.to(e.dtype), m)
                e.mul_(1 - m).add_(p, alpha=m)
            elif m == 1:  # Of -0.0, too.
                e.copy_(p)
    assert_same(ema, expected)


@pytest.mark.parametrize("name", CALLS)
def test_every_call_replays(name):
    ema, params = lists(pair=MIXED)
    other_ema, other_params = clones(ema, params)
    plan, other = fused_ema.Plan(ema, params), fused_ema.Plan(other_ema, other_params)
    graph = capture(lambda: CALLS[name](plan), torch.cuda.Stream())
    for _ in range(3):
        graph.replay()
        CALLS[name](other)
    assert_same(ema, other_ema, "ema")
    assert_same(params, other_params, "param")


@pytest.mark.parametrize("num_tensors", [3, 2100])
def test_one_shot_calls_replay(num_tensors):
    # Their lists are kernel arguments, and so part of the graph.
    ema, params = lists((64,) * num_tensors)
    expected_ema, expected_params = clones(ema, params)

    def step():
        fused_ema.update_(ema, params, 0.25)
        fused_ema.swap_(ema, params)
        fused_ema.copy_(ema[:1], ema[2:3])

    graph = capture(step)
    for _ in range(2):
        graph.replay()
        for e, p in zip(expected_ema, expected_params, strict=True):
            e.lerp_(p, 0.25)
            kept = e.clone()
            e.copy_(p)
            p.copy_(kept)
        expected_ema[0].copy_(expected_ema[2])
    assert_same(params, expected_params, "param")
    assert_same(ema, expected_ema, "ema")


def test_a_graph_keeps_its_addresses_when_the_plan_follows_a_param():
    ema, params = lists()
    expected, old = clones(ema, params)
    plan = fused_ema.Plan(ema, params)
    graph = capture(lambda: plan.update(0.25))
    left = params[1].data  # Alive, as whatever a graph works on must be.
    params[1].data = left + 1
    plan.update(0.5)
    assert plan._plan.num_refreshes == 1
    rubbish = [torch.full((4096,), 255, dtype=torch.uint8, device="cuda") for _ in range(64)]
    graph.replay()
    torch.cuda.synchronize()
    assert len(rubbish) == 64
    for e, p, was in zip(expected, params, old, strict=True):
        e.lerp_(p, 0.5).lerp_(was, 0.25)
    assert_same(ema, expected)


def test_a_graph_outlives_its_plan():
    ema, params = lists((64,) * 2000)
    expected = [e.clone() for e in ema]
    table_bytes = 2000 * 24
    gc.collect()
    fused_ema.Plan(ema[:1], params[:1])  # Frees the tables of graphs that were there before.
    before = torch.cuda.memory_allocated()
    graph = capture(partial(fused_ema.Plan(ema, params).update, 0.25))
    gc.collect()
    rubbish = [torch.full((table_bytes,), 255, dtype=torch.uint8, device="cuda") for _ in range(64)]
    graph.replay()
    torch.cuda.synchronize()
    for e, p in zip(expected, params, strict=True):
        e.lerp_(p, 0.25)
    assert_same(ema, expected)
    del rubbish
    assert torch.cuda.memory_allocated() >= before + table_bytes
    # With the graph its table goes too, when the next plan is made; the runtime takes its time.
    del graph
    gc.collect()
    deadline = time.monotonic() + 10
    while torch.cuda.memory_allocated() >= before + table_bytes and time.monotonic() < deadline:
        fused_ema.Plan(ema[:1], params[:1])
    assert torch.cuda.memory_allocated() < before + table_bytes


def test_a_plan_is_not_made_during_capture():
    ema, params = lists((100,))
    with pytest.raises(RuntimeError, match="while a CUDA graph is being captured"):
        capture(lambda: fused_ema.Plan(ema, params))


def test_a_plan_is_not_made_anew_during_capture():
    ema, params = lists((100,))
    plan = fused_ema.Plan(ema, params)
    params[0].data = params[0].data.clone()
    with pytest.raises(RuntimeError, match="while a CUDA graph is being captured"):
        capture(lambda: plan.update(0.5))
    plan.update(0.5)
    assert plan._plan.num_refreshes == 1


def test_a_captured_training_step():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 4))
    model.cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, capturable=True)
    ema = EMAManager(model, 0.25)
    inputs = torch.randn(8, 16, device="cuda")

    def step():
        optimizer.zero_grad(set_to_none=True)
        model(inputs).square().mean().backward()
        optimizer.step()
        ema.update()

    with side_stream():  # Warms up, as torch asks for.
        for _ in range(3):
            step()
    expected = {name: e.clone() for name, e in ema.named_emas()}
    graph = capture(step)
    for _ in range(4):
        graph.replay()
        for name, p in model.named_parameters():
            expected[name].lerp_(p.detach(), 0.25)
    for name, e in ema.named_emas():
        assert_bits_equal(e, expected[name], name)


# ---- size


@pytest.mark.parametrize("pair", [(torch.bfloat16, torch.bfloat16), MIXED], ids=["same", "mixed"])
def test_more_than_2_31_elements(pair):
    if torch.cuda.get_device_properties(0).total_memory < 20e9:
        pytest.skip("needs 20 GB of device memory")
    n = 2**31 + 17
    ema = torch.zeros(n, dtype=pair[0], device="cuda")
    param = torch.ones(n, dtype=pair[1], device="cuda")
    plan = fused_ema.Plan([ema], [param])
    plan.update(0.5)
    fused_ema.update_([ema], [param], 0.5)
    assert ema.eq(0.75).all()
    plan.swap()
    assert param.eq(0.75).all()
    assert ema.eq(1).all()
    fused_ema.copy_([ema], [param])
    assert ema.eq(0.75).all()


def test_ten_thousand_tensors_of_every_pair_and_layout():
    layouts = ("contiguous", "param misaligned", "each misaligned", "transposed")
    ema, params = [], []
    for i, pair in enumerate(DTYPE_PAIRS):
        for j, layout in enumerate(layouts):
            sizes = [(31 * i + 7 * j + 3 * k) % 700 for k in range(420)]
            e, p = lists([max(1, size) for size in sizes], pair, layout, seed=i)
            ema += e
            params += p
    assert len(ema) > 10_000
    expected = [e.clone() for e in ema]
    for e, p in zip(expected, params, strict=True):
        e.lerp_(p.to(e.dtype), 0.25)
    fused_ema.Plan(ema, params).update(0.25)
    assert_same(ema, expected)
