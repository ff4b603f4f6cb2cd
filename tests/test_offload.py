"""A host ema, on a device that is only imagined (streams.py), and updates beside the step."""

from __future__ import annotations

import threading
from functools import partial

import pytest
import torch
from nets import assert_same, move, values_of
from streams import Late
from torch import nn

from fused_ema import EMAManager, _offload, _slots, _streams
from fused_ema.testing import DTYPE_PAIRS

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
