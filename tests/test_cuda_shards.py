"""Sharded models on one GPU, a world of one: what of them only a GPU can show."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from runs import needs_a_real_gpu
from sharded import all_of, assert_same, by_parts, local, tensor_parallel
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from bench.gpu.launches import no_synchronisation, trace
from fused_ema import EMAManager

DEVICE, BACKEND = "cuda", "nccl"
pytestmark = [pytest.mark.cuda, needs_a_real_gpu]  # NCCL drives it itself.


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group(BACKEND, init_method=f"file://{store}", rank=0, world_size=1)
    yield init_device_mesh(DEVICE, (1,))
    dist.destroy_process_group()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 8)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 5))

    def forward(self, x):
        return self.block(self.first(x).relu())


SHARDED = {"FSDP2": lambda model, mesh: by_parts(model, mesh=mesh), "TP": tensor_parallel}


@pytest.fixture(params=SHARDED)
def models(request, mesh):
    """A sharded model, and a whole one with the same values."""
    whole = Net().to(DEVICE)
    return SHARDED[request.param](copy.deepcopy(whole), mesh), whole


def inputs():
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).to(DEVICE)


def assert_same_values(sharded, whole, what):
    assert_same(all_of(sharded), {name: t.detach() for name, t in dict(whole).items()}, what)


@pytest.mark.parametrize("ema_dtype", [None, torch.bfloat16], ids=["exchanged", "set aside"])
def test_as_whole(models, ema_dtype):
    sharded, whole = models
    if ema_dtype is not None:
        sharded, whole = sharded.to(ema_dtype), whole.to(ema_dtype)
    dtype = whole.first.weight.dtype
    ema, want = EMAManager(sharded, 0.25), EMAManager(whole, 0.25)
    optimizer = torch.optim.SGD(sharded.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        sharded(inputs().to(dtype)).float().square().mean().backward()
        optimizer.step()
        values = all_of(sharded.named_parameters())
        with torch.no_grad():
            for name, param in whole.named_parameters():
                param.copy_(values[name])
        ema.update()
        want.update()
        assert_same_values(ema.named_emas(), want.named_emas(), "averages")
    raw = all_of(sharded.named_parameters())
    with ema.swapped(), want.swapped(), torch.no_grad():
        assert_same_values(sharded.named_parameters(), whole.named_parameters(), "swapped")
        seen, expected = sharded(inputs().to(dtype)), whole(inputs().to(dtype))
        seen = seen.full_tensor() if isinstance(seen, DTensor) else seen
        assert torch.allclose(seen.float(), expected.float(), rtol=0.05, atol=0.02)
    sharded(inputs().to(dtype))  # What was gathered inside is gone.
    ema.update()
    want.update()
    assert_same(all_of((m.name, m.tensor) for m in ema._tracked.members), raw, "swapped back")
    full = ema.full_state_dict()["ema"]
    assert_same(full, {name: ema.cpu() for name, ema in want.named_emas()}, "gathered")


def test_one_launch_and_no_wait(models):
    ema = EMAManager(models[0], 0.25)
    seen = trace(ema.update)
    assert (seen.kernels, seen.copies, seen.waits) == (1, 0, 0)
    emas = [local(tensor) for _, tensor in ema.named_emas()]
    before = [tensor.clone() for tensor in emas]
    with no_synchronisation():
        ema.update()
        ema.swap()
        ema.swap()
    for now, was in zip(emas, before, strict=True):
        assert torch.equal(now, was)  # Of params that didn't move.


def test_nothing_full_is_allocated(models):
    ema = EMAManager(models[0], 0.25)
    ema.update()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        ema.update()
        with ema.swapped():
            pass
    assert torch.cuda.max_memory_allocated() == before
