"""A host ema, on a device that is only imagined (streams.py), and updates beside the step."""

from __future__ import annotations

import threading
from functools import partial

import pytest
import torch
from nets import assert_same, move, values_of
from processes import forked, pythons
from runs import needs_a_real_gpu
from streams import Late
from torch import nn

from fused_ema import EMAManager, _offload, _slots, _streams, ops
from fused_ema.testing import DTYPE_PAIRS, assert_bits_equal

WAYS = ("host", "device")
KB = 1 / 1024
# Chunks of 1 KB: of these models some hold many tensors, and the larger tensors are cut.
STAGING_MB = 3 * KB


@pytest.fixture
def late(monkeypatch):
    """Params as if on a device whose work is done as late as it may be."""
    streams = Late()
    monkeypatch.setattr(_slots, "needs_stage", lambda ema_device, param_device: streams.is_there)
    monkeypatch.setattr(_streams, "of", lambda device: streams)
    yield streams
    streams.may_go_on.set()


def plain_of(late, model, momentum=0.25, **settings):
    """A manager with its emas where the params are."""
    late.is_there = False
    ema = EMAManager(model, momentum, **settings)
    late.is_there = True
    assert not any(slot.is_away or slot.stage is not None for slot in ema._tracked.slots)
    return ema


class Model(nn.Module):
    """Small ones, cut ones, odd ones, buffers of every kind."""

    def __init__(self, dtype=torch.float32, scale=1):
        super().__init__()
        torch.manual_seed(0)
        self.small = nn.ParameterList(nn.Parameter(torch.randn(n)) for n in (1, 3, 17, 0, 5, 64))
        self.large = nn.Parameter(torch.randn(3, 333 * scale))
        self.last = nn.Parameter(torch.randn(2, 8, 5, 5).to(memory_format=torch.channels_last))
        self.gaps = nn.Parameter(torch.randn(40, 30)[:, :25])
        self.scalar = nn.Parameter(torch.tensor(1.5))
        self.norm = nn.BatchNorm1d(300)
        self.to(dtype)
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("turns", torch.randn(6, dtype=torch.complex64))


def on_main(late, model, seed):
    """An optimizer's step and the forward after it, which the device does some time later."""
    late.run(late.main, partial(move, model, seed))


def same_run(late, dtype, settings, host, steps=7):
    """A host ema beside one on the device; the same bits after each update that both have made."""
    model, twin = Model(dtype), Model(dtype)
    plain = plain_of(late, twin, **settings)
    names = plain.averages or (None,)
    ema = EMAManager(model, device="cpu", staging_mb=STAGING_MB, **host, **settings)
    assert all(slot.is_away for slot in ema._tracked.slots)
    for step in range(steps):
        ema.wait()
        on_main(late, model, step)
        ema.update()
        late.drain()
        move(twin, step)
        plain.update()
        for name in names if step % 2 else ():
            assert_same(ema.named_emas(name), dict(plain.named_emas(name)))
    return model, ema, twin, plain


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", ["lerp", "mul_add"])
@pytest.mark.parametrize("pair", DTYPE_PAIRS, ids=str)
def test_the_bits_of_an_ema_on_the_device(late, pair, form, way):
    settings = {"momentum": 0.25, "form": form, "ema_dtype": pair[0], "begin": 1}
    model, ema, twin, plain = same_run(late, pair[1], settings, {"averaged_on": way})
    raw = values_of(model)
    with ema.swapped(), plain.swapped():
        late.drain()
        assert_same(model.state_dict(), twin.state_dict())
        sd, wanted = ema.state_dict(), plain.state_dict()
        assert_same(sd["ema"], wanted["ema"])
        assert_same(sd["raw"], wanted["raw"])
    late.drain()
    assert_same(model.state_dict(), raw)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("way", ["auto", *WAYS])
def test_several_averages_buffers_and_intervals(late, interval, way, overlap):
    settings = {"momentum": {"a": 0.25, "b": 0.01}, "interval": interval, "buffers": "average"}
    host = {"averaged_on": way, "overlap": overlap}
    _, ema, _, plain = same_run(late, torch.bfloat16, settings, host)
    state = ema.state_dict()
    other = EMAManager(Model(torch.bfloat16), device="cpu", **settings)
    other.load_state_dict(state)
    assert_same(other.named_emas("b"), dict(plain.named_emas("b")))
    ema.reset()
    plain.reset()
    assert_same(ema.named_emas("a"), dict(plain.named_emas("a")))


def test_the_way_with_fewer_bytes_over_the_link(late):
    def ways(dtype, **settings):
        ema = EMAManager(Model(dtype), device="cpu", **settings)
        return ema.describe()["large"].partition("averaged on the ")[2].split(",")[0]

    assert ways(torch.bfloat16) == "host"  # 2 bytes there, against 4 each way.
    assert ways(torch.float32) == "device"
    assert ways(torch.bfloat16, ema_dtype="param") == "device"
    assert ways(torch.float32, momentum={"a": 0.1, "b": 0.2}) == "host"
    assert ways(torch.bfloat16, averaged_on="device") == "device"


def test_who_has_what_is_said(late, monkeypatch):
    monkeypatch.setattr(_offload, "pinned_or_not", _unpinned)
    ema = EMAManager(Model(), device="cpu")
    said = ema.describe()
    assert said["large"].endswith("averaged on the device, not pinned (no room)")
    assert said["flags"].endswith("in the host's memory")
    assert "host emas averaged on the device" in repr(ema)


def _unpinned(size, dtype):
    return torch.empty(size, dtype=dtype), "no room"


# ---- the fence


def run_of_fences(late, monkeypatch, way, has_fence, overlap, write):
    """Whether averages are right where params are written as early as the fences allow."""
    model, twin = Model(), Model()
    plain = plain_of(late, twin)
    # All chunks have a buffer: so the host never has to wait until one is free.
    settings = {"averaged_on": way, "staging_mb": 64 * KB, "overlap": overlap}
    ema = EMAManager(model, 0.25, device="cpu", **settings)
    if not has_fence:
        monkeypatch.setattr(_offload.Offload, "_wait_on_device", lambda self, events: None)
    for step in range(3):
        on_main(late, model, step)
        late.may_go_on.clear()
        ema.update()
        if write == "params":
            ema.wait()
        late.run(late.main, partial(spoil, model, write))
        late.drain()
        late.may_go_on.set()
        move(twin, step)
        plain.update()
        ema.synchronize()
        late.run(late.main, partial(restore, model, twin))
        late.drain()
    found, wanted = dict(ema.named_emas()), dict(plain.named_emas())
    return all(torch.equal(found[name], wanted[name]) for name in wanted)


@torch.no_grad()
def spoil(model, write):
    params = dict(model.named_parameters())
    for name, tensor in model.state_dict().items():
        if (name in params) == (write == "params"):
            tensor.zero_()


@torch.no_grad()
def restore(model, twin):
    for tensor, right in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        tensor.copy_(right)


@pytest.mark.parametrize("has_fence", [True, False])
@pytest.mark.parametrize("write", ["params", "buffers"])
@pytest.mark.parametrize("way", WAYS)
def test_a_write_right_after_the_call(late, monkeypatch, way, write, has_fence):
    # Buffers a forward writes, before any optimizer's step and without a wait().
    right = run_of_fences(late, monkeypatch, way, has_fence, overlap=True, write=write)
    assert right == has_fence


@pytest.mark.parametrize("way", WAYS)
def test_without_a_hook_an_update_is_fenced_by_itself(late, monkeypatch, way):
    monkeypatch.setattr(EMAManager, "wait", lambda self: None)
    assert run_of_fences(late, monkeypatch, way, True, overlap=False, write="params")
    monkeypatch.setattr(_offload.Offload, "wait", lambda self, op: None)
    assert not run_of_fences(late, monkeypatch, way, True, overlap=False, write="params")


@pytest.mark.parametrize("has_fence", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_the_hook_of_an_optimizer_is_the_fence(late, monkeypatch, way, has_fence):
    model, twin = Model(), Model()
    plain = plain_of(late, twin, interval=2)
    settings = {"interval": 2, "averaged_on": way, "staging_mb": 64 * KB}
    ema = EMAManager(model, 0.25, device="cpu", **settings)
    optimizer = Queued(late, model)
    ema.register_step_post_hook(optimizer)
    if not has_fence:
        monkeypatch.setattr(EMAManager, "wait", lambda self: None)
    for step in range(1, 6):
        if step % 2 == 0:  # An update; the thread is held up until after the next step.
            late.may_go_on.clear()
        optimizer.step()
        late.drain()
        assert late.num_waits_on_host == 0
        if step % 2 == 1:
            late.may_go_on.set()
            assert all(job.done.wait(30) for job in ema._offload._pending)
        with torch.no_grad():
            for p in twin.parameters():
                p.add_(step)
        plain.update()
    found, wanted = dict(ema.named_emas()), dict(plain.named_emas())
    assert all(torch.equal(found[name], wanted[name]) for name in wanted) == has_fence


class Queued(torch.optim.Optimizer):
    """Its steps are the device's to do."""

    def __init__(self, late, model):
        super().__init__(model.parameters(), {})
        self.late, self.num_steps = late, 0

    def step(self, closure=None):
        self.num_steps += 1
        late, number = self.late, self.num_steps
        params = self.param_groups[0]["params"]
        late.run(late.main, lambda: [p.add_(number) for p in params])


@pytest.mark.parametrize("way", WAYS)
def test_a_thread_that_is_held_up_holds_up_a_fence_alone(late, way):
    model, twin = Large(), Large()
    plain = plain_of(late, twin)
    settings = {"averaged_on": way, "staging_mb": STAGING_MB, "overlap": True}
    ema = EMAManager(model, 0.25, device="cpu", **settings)
    on_main(late, model, 1)
    late.may_go_on.clear()
    opened = threading.Timer(0.1, late.may_go_on.set)
    ema.update()  # Returns, whatever the thread does.
    opened.start()
    ema.wait()  # With three buffers, the host's way waits for them to be free.
    late.run(late.main, partial(spoil, model, "params"))
    late.drain()
    move(twin, 1)
    plain.update()
    assert_same(ema.named_emas(), dict(plain.named_emas()))
    assert late.num_waits_on_host == 0


class Large(nn.Module):
    """Of many chunks."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.arange(9000.0))
        self.bias = nn.Parameter(torch.arange(9.0))


# ---- what goes wrong


def failing(monkeypatch, after):
    """The kernels fail after so many chunks."""
    calls = []

    def update(*args):
        calls.append(args)
        if len(calls) > after:
            raise MemoryError("no room")
        real(*args)

    real = ops._update
    monkeypatch.setattr(ops, "_update", update)


@pytest.mark.parametrize("call", ["update", "wait", "swap", "state_dict", "named_emas", "copy_to"])
def test_an_error_of_the_thread_is_the_next_call_s(late, monkeypatch, call):
    model = Large()
    settings = {"averaged_on": "host", "staging_mb": STAGING_MB, "overlap": True}
    ema = EMAManager(model, 0.5, device="cpu", **settings)
    spoil(model, "params")
    with monkeypatch.context() as patched:
        failing(patched, after=3)
        ema.update()
        assert ema._offload._pending[0].done.wait(30)
    calls = {
        "named_emas": lambda: dict(ema.named_emas()),
        "copy_to": lambda: ema.copy_to(Large()),
    }
    with pytest.raises(RuntimeError, match=f"{call}: update 1 failed beside the step") as caught:
        calls.get(call, getattr(ema, call))()
    assert "MemoryError: no room. Of 2 averages 0 have moved, half done is 'weight', the" in str(
        caught
    )
    assert isinstance(caught.value.__cause__, MemoryError)
    emas = dict(ema.named_emas())  # It is said once.
    old = torch.arange(9000.0)
    num_moved = int((emas["weight"][1:] != old[1:]).sum()) + 1
    assert num_moved == 3 * 256
    assert_bits_equal(emas["weight"][:num_moved], old[:num_moved] / 2)
    assert_bits_equal(emas["bias"], torch.arange(9.0))
    ema.reset()
    ema.update()
    assert_same(ema.named_emas(), values_of(model))


@pytest.mark.parametrize("way", WAYS)
def test_a_device_that_is_lost(late, way):
    model = Large()
    settings = {"averaged_on": way, "staging_mb": STAGING_MB}
    ema = EMAManager(model, 0.5, device="cpu", **settings)
    late.lost = True

    def update():
        ema.update()
        ema.synchronize()

    with pytest.raises(RuntimeError, match="unspecified launch failure") as caught:
        update()
    told = {
        "host": "0 have moved, the others are as they were",
        "device": "which of these have moved or are half done can't be told: 'weight', 'bias'",
    }
    assert told[way] in str(caught.value)
    late.lost = False
    assert ema.num_updates == 1
    ema.update()
    ema.synchronize()


def test_a_fork_does_not_wait_for_its_parent_s_thread(late):
    model = Large()
    settings = {"averaged_on": "host", "staging_mb": STAGING_MB, "overlap": True}
    ema = EMAManager(model, 0.5, device="cpu", **settings)
    late.may_go_on.clear()
    try:
        ema.update()

        def child():
            try:
                ema.synchronize()
            except RuntimeError as error:
                return str(error)

        assert "its thread has ended, as where a process has forked" in forked(child)
    finally:
        late.may_go_on.set()
    ema.synchronize()


def test_an_exit_waits_for_no_more_than_the_update():
    code = """
import os, torch
from fused_ema import EMAManager, _slots
_slots.needs_stage = lambda ema_device, param_device: True
model = torch.nn.Linear(2000, 2000)
ema = EMAManager(model, 0.5, device="cpu", overlap=True, staging_mb=0.1)
for _ in range(3):
    ema.update()
"""
    ends = ("", "del ema", "os._exit(0)")
    assert pythons(*(code + end for end in ends)) == [(0, "", "")] * len(ends)


def test_an_interrupt_leaves_the_update_to_the_thread(late, monkeypatch):
    model = Large()
    ema = EMAManager(model, 0.5, device="cpu", averaged_on="host", staging_mb=STAGING_MB)
    spoil(model, "params")

    def interrupted(self, job, event):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(_offload.Offload, "_wait_on_host", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ema.update()
    assert_bits_equal(dict(ema.named_emas())["weight"], torch.arange(9000.0) / 2)
    assert (ema.iteration, ema.num_updates) == (1, 1)


def test_bad_input(late):
    model = Large()
    for staging_mb in (0, -1, 1e-4, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"staging_mb is .* need at least 768 bytes"):
            EMAManager(model, device="cpu", staging_mb=staging_mb)
    with pytest.raises(ValueError, match="for 3 averages need at least 2304 bytes"):
        EMAManager(model, {"a": 0.1, "b": 0.2, "c": 0.3}, device="cpu", staging_mb=0.002)
    with pytest.raises(TypeError, match="staging_mb is a str"):
        EMAManager(model, device="cpu", staging_mb="12")
    with pytest.raises(ValueError, match="averaged_on is 'gpu'; choose 'auto', 'host' or 'device'"):
        EMAManager(model, device="cpu", averaged_on="gpu")


def test_an_iteration_without_an_update_does_nothing(late):
    ema = EMAManager(Large(), 0.5, interval=3, device="cpu", staging_mb=STAGING_MB)
    for iteration in range(2):
        ema.update()
        assert ema._offload._thread is None, iteration
    ema.update()
    assert ema._offload._thread.is_alive()


def test_params_that_are_converted(late):
    model, twin = Model(), Model()
    plain = plain_of(late, twin)
    ema = EMAManager(model, 0.25, device="cpu", staging_mb=STAGING_MB)
    for step in range(4):
        if step == 2:
            for p in (*model.parameters(), *twin.parameters()):
                p.data = p.data.to(torch.bfloat16)
        on_main(late, model, step)
        ema.update()
        late.drain()
        move(twin, step)
        plain.update()
    assert_same(ema.named_emas(), dict(plain.named_emas()))
    with torch.no_grad():
        model.large.data = model.large.data.to(torch.float64)
    with pytest.raises(TypeError, match=r"'large' is torch\.float64 now"):
        ema.update()


# ---- emas on the device, updated beside the step


@pytest.mark.parametrize("has_fence", [True, False])
@pytest.mark.parametrize("averages", [0.25, {"a": 0.25, "b": 0.125}], ids=["one", "two"])
def test_an_update_beside_the_step(late, averages, has_fence):
    late.is_there = False
    model, twin = Large(), Large()
    ema = EMAManager(model, averages, overlap=True)
    plain = EMAManager(twin, averages)
    for step in range(4):
        on_main(late, model, step)
        ema.update()
        if has_fence:
            ema.wait()
        late.run(late.main, partial(spoil, model, "params"))
        late.drain()
        move(twin, step)
        plain.update()
        late.run(late.main, partial(restore, model, twin))
        late.drain()
    ema.wait()
    late.drain()
    names = plain.averages or (None,)
    found, wanted = ([dict(e.named_emas(name)) for name in names] for e in (ema, plain))
    late.drain()
    is_same = [
        torch.equal(f[name], w[name]) for f, w in zip(found, wanted, strict=True) for name in w
    ]
    assert all(is_same) == has_fence


@pytest.mark.parametrize("buffers", ["average", "copy"])
def test_beside_the_step_buffers_are_read_at_once(late, buffers):
    late.is_there = False
    model, twin = Model(torch.bfloat16), Model(torch.bfloat16)
    model.last.requires_grad_(False)
    ema = EMAManager(model, 0.25, overlap=True, buffers=buffers, begin=1)
    plain = EMAManager(twin, 0.25, buffers=buffers, begin=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    ema.register_step_post_hook(optimizer)
    for step in range(5):
        move(model, step)
        optimizer.step()
        spoil(model, "buffers")
        with torch.no_grad():
            model.last.zero_()
        move(twin, step)
        plain.update()
        restore(model, twin)
        ema.wait()
        late.drain()
        with ema.swapped(), plain.swapped():
            assert_same(model.state_dict(), twin.state_dict())
    assert_same(ema.named_emas(), dict(plain.named_emas()))


def test_overlap_of_params_on_the_cpu_does_nothing():
    model, twin = Large(), Large()
    ema, plain = EMAManager(model, 0.25, overlap=True), EMAManager(twin, 0.25)
    for each in (model, twin):
        spoil(each, "params")
    for manager in (ema, plain):
        manager.update()
        manager.wait()
        manager.synchronize()
    assert_same(ema.named_emas(), dict(plain.named_emas()))


# ---- on a GPU


class Deep(nn.Module):
    """Of 8 MB, which pass through 0.75 MB of staging in many chunks."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*(nn.Linear(500, 500) for _ in range(8)))
        self.norm = nn.BatchNorm1d(500)
        self.to("cuda", dtype)


def shift(model, by):
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(by)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS)
def test_on_a_gpu_the_device_has_no_more_than_the_staging(way, dtype):
    model, twin = Deep(dtype), Deep(dtype)
    plain = EMAManager(twin, 0.25)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ema = EMAManager(model, 0.25, device="cpu", staging_mb=0.75, averaged_on=way)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    ema.register_step_post_hook(optimizer)
    for step in range(3):
        ema.wait()
        shift(model, 0.125 * step)
        optimizer.step()
        shift(twin, 0.125 * step)
        plain.update()
    state = ema.state_dict()["ema"]
    raw = {name: t.cpu() for name, t in twin.state_dict().items()}
    with ema.swapped():
        peak = torch.cuda.max_memory_allocated() - before
        found = {name: t.cpu() for name, t in model.state_dict().items()}
    with plain.swapped():
        assert_same(found, {name: t.cpu() for name, t in twin.state_dict().items()})
    assert_same(state, {name: t.cpu() for name, t in plain.named_emas()})
    assert_same({name: t.cpu() for name, t in model.state_dict().items()}, raw)
    assert all(t.device.type == "cpu" for t in state.values())
    # And a buffer of PyTorch's for what a copy of a scalar or of the tables' bytes may want.
    assert peak <= 0.75 * 2**20 + 2**16


@pytest.mark.cuda
@needs_a_real_gpu
@pytest.mark.parametrize("where", ["overlap", *WAYS])
def test_on_a_gpu_a_write_waits_for_the_update(where):
    model, twin = Deep(), Deep()
    plain = EMAManager(twin, 0.25)
    settings = {} if where == "overlap" else {"device": "cpu", "averaged_on": where}
    ema = EMAManager(model, 0.25, overlap=True, **settings)
    ema.update()  # Kernels are loaded by their first launch, which may wait.
    plain.update()
    ema.synchronize()
    side = ema._overlap._sides if where == "overlap" else ema._offload._stagings
    for step in range(3):
        shift(model, step)
        for each in side.values():
            for stream in [each.stream] if where == "overlap" else [each.down, each.work]:
                with torch.cuda.stream(stream):
                    torch.cuda._sleep(30_000_000)
        ema.update()
        ema.wait()
        shift(model, 1000.0)
        shift(twin, step)
        plain.update()
        shift(twin, 1000.0)
    assert_same(
        {name: t.cpu() for name, t in ema.named_emas()},
        {name: t.cpu() for name, t in plain.named_emas()},
    )


@pytest.mark.cuda
def test_on_a_gpu_a_graph_captures_no_host_ema_and_no_overlap():
    model = Large().cuda()
    host = EMAManager(model, 0.25, device="cpu")
    beside = EMAManager(model, 0.25, overlap=True)
    before = model.weight.detach().clone()
    shift(model, 1.0)
    beside.update()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        beside.update()
        with pytest.raises(RuntimeError, match="a graph is being captured on cuda:0"):
            host.update()
    graph.replay()
    want = before.lerp(model.weight, 0.25).lerp(model.weight, 0.25)
    assert_bits_equal(dict(beside.named_emas())["weight"], want)
