"""Models that are sharded in every way, each beside a whole one with the same values."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from fused_ema import EMAManager
from fused_ema.testing import assert_bits_equal


class Net(nn.Module):
    """Uneven and empty shards for two ranks, a buffer, and a scale that stands by itself."""

    def __init__(self, seed=0, dtype=torch.float32, has_buffers=True):
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(6, 8)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 5))
        self.norm = nn.BatchNorm1d(5) if has_buffers else nn.LayerNorm(5)
        self.last = nn.Linear(5, 1)
        self.to(dtype)

    def forward(self, x):
        x = self.block(self.first(x).relu())
        return self.last(self.norm(x.to(self.norm.weight.dtype)).to(self.last.weight.dtype))


def meshed(*shape):
    return init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp")[-len(shape) :])


def by_parts(model, **more):
    fully_shard(model.block, **more)
    return fully_shard(model, **more)


def hybrid(model):
    return by_parts(model, mesh=meshed(1, dist.get_world_size()))


def replicas(model):
    return by_parts(model, mesh=meshed(dist.get_world_size(), 1))


def mixed(model):
    # Batch norm computes in the dtype of its buffers, which stay as they are.
    ignored = set(model.norm.parameters())
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    fully_shard(model.block, mp_policy=policy)
    return fully_shard(model, mp_policy=policy, ignored_params=ignored)


def tensor_parallel(model, mesh=None):
    mesh = meshed(dist.get_world_size()) if mesh is None else mesh
    parallelize_module(model.first, mesh, ColwiseParallel(output_layouts=Replicate()))
    parallelize_module(model.block[2], mesh, RowwiseParallel(input_layouts=Replicate()))
    return model


def both(model):
    mesh = meshed(2, dist.get_world_size() // 2)
    return by_parts(tensor_parallel(model, mesh["tp"]), mesh=mesh["dp"])


def from_meta(model):
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.device("meta"):
        made = by_parts(Net())
    made.to_empty(device="cpu")
    with torch.no_grad():
        for name, tensor in made.state_dict().items():
            write(tensor, values[name])
    return made


SHARDED = {
    "whole": fully_shard,
    "parts": by_parts,
    "one part": lambda model: fully_shard(model.block) and model,
    "gathered until the backward": lambda model: by_parts(model, reshard_after_forward=False),
    "never gathered after": lambda model: by_parts(model, reshard_after_forward=True),
    "HSDP": hybrid,
    "replicas": replicas,
    "mixed precision": mixed,
    "offloaded": lambda model: by_parts(model, offload_policy=CPUOffloadPolicy(pin_memory=False)),
    "TP": tensor_parallel,
    "from meta": from_meta,
}
SHARDED_4 = {
    "TP and FSDP": both,
    "gathered by pairs": lambda model: by_parts(model, reshard_after_forward=2),
}


def whole(tensor):
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def local(tensor):
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor.detach()


def part_of(like, values):
    """What of some values a rank holds; nothing is sent."""
    if not isinstance(like, DTensor):
        return values
    return local(
        distribute_tensor(values.detach(), like.device_mesh, like.placements, src_data_rank=None)
    )


@torch.no_grad()
def write(tensor, values):
    """What a user does who knows the shards: writes this rank's part."""
    local(tensor).copy_(part_of(tensor, values))


def held(ema):
    """What a manager's model holds on this rank; without asking the model, which may free it."""
    return {member.name: member.local.clone() for member in ema._tracked.members}


def all_of(named):
    return {name: whole(tensor) for name, tensor in dict(named).items()}


def assert_same(actual, expected, what):
    assert list(actual) == list(expected), what
    for name, tensor in expected.items():
        if tensor.is_floating_point():
            assert_bits_equal(actual[name], tensor, f"{what}: {name}")
        else:
            assert torch.equal(actual[name], tensor), (what, name)


class Pair:
    """A sharded model and a whole one with the same values, each with its manager."""

    def __init__(self, shard, dtype=torch.float32, has_buffers=True, **settings):
        settings.setdefault("momentum", 0.25)
        self.plain = Net(dtype=dtype, has_buffers=has_buffers)
        self.sharded = shard(copy.deepcopy(self.plain))
        self.ema, self.want = (
            EMAManager(self.sharded, **settings),
            EMAManager(self.plain, **settings),
        )
        self.optimizer = torch.optim.SGD(self.sharded.parameters(), lr=0.05)
        self.generator = torch.Generator().manual_seed(1)
        self.dtype = dtype

    def inputs(self):
        return torch.randn(4, 6, generator=self.generator).to(self.dtype)

    def step(self):
        """Trains the sharded model; the whole one gets its values."""
        self.optimizer.zero_grad()
        self.sharded(self.inputs()).float().square().mean().backward()
        self.optimizer.step()
        self.follow()

    def follow(self):
        named = {**dict(self.sharded.named_parameters()), **dict(self.sharded.named_buffers())}
        plain = {**dict(self.plain.named_parameters()), **dict(self.plain.named_buffers())}
        for name, tensor in named.items():
            with torch.no_grad():
                plain[name].copy_(whole(tensor))

    def update(self):
        self.ema.update()
        self.want.update()

    def move(self, scale, shift):
        """Writes other values; what is gathered doesn't have them."""
        named = {m.name: m.tensor for m in self.ema._tracked.members}
        with torch.no_grad():
            for name, tensor in self.plain.state_dict().items():
                if name in named and tensor.is_floating_point():
                    tensor.mul_(scale).add_(shift)
                    write(named[name], tensor)

    def check(self, what):
        self.compare(self.ema.named_emas(), self.want.named_emas(), what)

    def check_model(self, what):
        tensors = ((m.name, m.tensor) for m in self.ema._tracked.members)
        self.compare(tensors, ((m.name, m.tensor) for m in self.want._tracked.members), what)

    def compare(self, sharded, plain, what):
        sharded, plain = dict(sharded), dict(plain)
        parts = {name: part_of(sharded[name], values) for name, values in plain.items()}
        assert_same({name: local(tensor) for name, tensor in sharded.items()}, parts, what)

    def evaluate(self, what):
        """A forward sees what the model should hold."""
        self.sharded.eval(), self.plain.eval()
        x = self.inputs()
        with torch.no_grad():
            seen, want = whole(self.sharded(x)).float(), self.plain(x).float()
        self.sharded.train(), self.plain.train()
        assert torch.allclose(seen, want, rtol=0.05, atol=0.02), (what, seen, want)


def whole_state(ema):
    return {k: all_of(v) if k in ("ema", "raw") else v for k, v in ema.state_dict().items()}


def by_columns(param):
    return Shard(1) if param.dim() == 2 and param.shape[1] % 2 == 0 else Shard(0)
