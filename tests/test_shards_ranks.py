"""What one rank of several does wrong: the same error on every one, and no rank waits.

Each runs under the time limit of its processes.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from sharded import (
    Net,
    Pair,
    all_of,
    assert_same,
    both,
    by_columns,
    by_parts,
    local,
    meshed,
    part_of,
    whole_state,
)
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from fused_ema import EMAManager, _storage
from fused_ema.testing import assert_bits_equal


def is_last():
    return dist.get_rank() == dist.get_world_size() - 1


def one_error(call, error, *parts):
    """That a call raises the same on all ranks, and what is in it."""
    with pytest.raises(error) as caught:
        call()
    texts = [None] * dist.get_world_size()
    dist.all_gather_object(texts, (caught.type.__name__, str(caught.value)))
    assert len(set(texts)) == 1, texts
    for part in parts:
        assert part in str(caught.value), (part, caught.value)


# ---- where a manager is made


class Longer(Net):
    """Has one layer that the others haven't got."""

    def __init__(self):
        super().__init__()
        self.more = nn.Linear(3, 3, bias=False)


class Wider(Net):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 10)


def on_meta():
    with torch.device("meta"):
        return by_parts(Net())


# What the last rank has, and what the error says of it.
OTHERS = {
    "shape": (lambda: by_parts(Wider()), "'first.weight' is [10, 6] float32"),
    "name": (lambda: by_parts(Longer()), "'more.weight' is [3, 3] float32"),
    "dtype": (lambda: by_parts(Net(dtype=torch.bfloat16)), "[8, 6] bfloat16"),
    "placements": (
        lambda: fully_shard(Net(), shard_placement_fn=by_columns),
        "sharded as (Shard(dim=1),)",
    ),
}


@pytest.mark.parametrize("what", OTHERS)
def test_models_that_differ(two, what):
    two(models_differ, what)


def models_differ(what):
    make, says = OTHERS[what]
    model = make() if is_last() else by_parts(Net())
    one_error(lambda: EMAManager(model, 0.25), ValueError, "the ranks that have parts", says)


def test_settings_that_differ(two):
    two(settings_differ)


def settings_differ():
    model = by_parts(Net())
    for name, values in {"momentum": (0.25, 0.5), "interval": (1, 2)}.items():
        more = {name: values[is_last()]}
        one_error(lambda more=more: EMAManager(model, **more), ValueError, f"{name}={values[1]}")


def test_an_error_of_one_rank(two, four):
    two(error_of_one)
    four(error_of_one, both)
    four(error_of_one, in_rows_and_columns)


def in_rows_and_columns(model):
    """Parts over each dimension of a mesh, none over both: the ranks are no one's neighbours."""
    mesh = meshed(2, 2)
    fully_shard(model.block, mesh=mesh["dp"])
    tp = mesh["tp"]
    model.first.weight = nn.Parameter(distribute_tensor(model.first.weight.data, tp, [Shard(0)]))
    return model


def error_of_one(shard=by_parts):
    model = shard(Net())
    last = f"(on rank {dist.get_world_size() - 1},"
    more = {"exclude": "no*such" if is_last() else "first.bias"}
    one_error(lambda: EMAManager(model, **more), ValueError, "'no*such' matches none", last)
    if shard is by_parts:
        other = on_meta() if is_last() else model
        one_error(lambda: EMAManager(other), ValueError, "is on the meta device", last)
    # After what they told each other, too.
    allocate = _storage.allocate
    if is_last():
        _storage.allocate = out_of_memory
    try:
        one_error(lambda: EMAManager(model), RuntimeError, "no memory left", last)
    finally:
        _storage.allocate = allocate
    ema = EMAManager(model, 0.25)
    before = all_of(ema.named_emas())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    ema.update()
    for name, tensor in all_of(ema.named_emas()).items():
        if not name.startswith("norm."):
            want = before[name].lerp(before[name] + 1, 0.25)
            assert_bits_equal(tensor, want, name)


def out_of_memory(*_):
    raise torch.OutOfMemoryError("no memory left")


def test_a_mesh_that_one_rank_has_alone(four):
    four(mesh_of_one_rank)


def mesh_of_one_rank():
    wide, square = meshed(4), meshed(2, 2)
    model = Net()
    fully_shard(model.first, mesh=wide)
    fully_shard(model.last, mesh=square if is_last() else wide)
    one_error(lambda: EMAManager(model), ValueError, "DTensors over the meshes", "(2, 2)")


def test_plain_tensors_may_differ(two):
    two(plain_may_differ)


def plain_may_differ():
    model = Net()
    fully_shard(model.block)
    model.first = nn.Linear(6, 8 + dist.get_rank())  # An expert, say.
    ema = EMAManager(model, 0.25, exclude="last.*" if is_last() else ())
    before = ema.state_dict()["ema"]["first.weight"].clone()
    with torch.no_grad():
        model.first.weight.add_(1)
    ema.update()
    want = before.lerp(model.first.weight.detach(), 0.25)
    assert_bits_equal(ema.state_dict()["ema"]["first.weight"], want, "its own")


def test_ranks_say_nothing_without_shards(two):
    two(nothing_to_say)


def nothing_to_say():
    alone = meshed(2, 1)["tp"]
    models = [Net(), by_parts(Net(), mesh=alone)]
    for model in models if dist.get_rank() == 0 else ():  # Others would have to answer.
        with CommDebugMode() as sent:
            ema = EMAManager(model, 0.25)
            ema.refresh()
            ema.load_state_dict(ema.state_dict())
        assert sent.get_total_counts() == 0


def test_a_refresh_is_a_matter_of_one_rank(two):
    two(refresh_of_one)


def refresh_of_one():
    model = by_parts(Net())
    ema = EMAManager(model, 0.25)
    if is_last():
        model.extra = nn.Linear(2, 2)
        assert ema.refresh() == ["extra.weight", "extra.bias"]
    ema.update()
    assert ("extra.bias" in ema.describe()) == is_last()


# ---- where a state is loaded


def test_what_does_not_fit_is_one_error_on_every_rank(two):
    two(one_error_on_every_rank)


def one_error_on_every_rank():
    pair = Pair(by_parts)
    pair.step()
    state = whole_state(pair.ema)
    before = all_of(pair.ema.named_emas())
    wrong = copy.copy(state)
    if is_last():
        wrong["ema"] = {**state["ema"], "first.bias": torch.zeros(3)}
    load = pair.ema.load_state_dict
    one_error(lambda: load(wrong), ValueError, "'first.bias' in 'ema' has shape", "(on rank 1,")
    wrong = {**state, "iteration": 5 + dist.get_rank(), "num_updates": 5}
    says = "'the state' is at iteration 6 after 5 updates on rank 1, not on rank 0"
    one_error(lambda: load(wrong), ValueError, says)
    other = Pair(lambda model: fully_shard(model, shard_placement_fn=by_columns)).ema.state_dict()
    one_error(lambda: load(other), ValueError, "'first.weight' in 'ema' is sharded as", "reshards")
    with pytest.raises(ValueError, match=r"'first\.weight' in 'ema' is sharded as"):
        pair.want.load_state_dict(other)
    assert_same(all_of(pair.ema.named_emas()), before, "after errors")
    assert pair.ema.iteration == 0


# ---- a group, or a mesh, that there was


def test_without_a_process_group(two, tmp_path):
    two(without_group, str(tmp_path))


def without_group(folder):
    rank, world = dist.get_rank(), dist.get_world_size()
    pair = Pair(by_parts)
    pair.step()
    named = {m.name: m.tensor for m in pair.ema._tracked.members}
    want = dict(pair.want.named_emas())
    pair.want.update()
    want = {name: part_of(named[name], tensor) for name, tensor in want.items()}
    dist.destroy_process_group()
    try:
        pair.ema.update()  # Sends nothing, and so needs no group.
        with pair.ema.swapped():
            pass
        emas = {name: local(ema) for name, ema in pair.ema.named_emas()}
        assert_same(emas, want, "updated without a group")
        for call in (
            lambda: pair.ema.load_state_dict(pair.ema.state_dict()),
            lambda: EMAManager(pair.sharded),
        ):
            with pytest.raises(RuntimeError, match="has no process group") as error:
                call()
            assert "init_process_group" in str(error.value)
        assert pair.ema.num_updates == 1
    finally:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
        )


def test_a_mesh_that_shrank(four):
    four(shrank)


def shrank():
    pair = Pair(fully_shard)
    pair.step()
    pair.update()
    averages = all_of(pair.ema.named_emas())
    mesh = DeviceMesh("cpu", [0, 1])
    if dist.get_rank() > 1:
        return
    smaller = fully_shard(copy.deepcopy(pair.plain), mesh=mesh)
    for name, module in pair.sharded.named_modules():
        for key in module._parameters:
            module._parameters[key] = smaller.get_submodule(name)._parameters[key]
    for call in (pair.ema.update, pair.ema.swap):
        with pytest.raises(RuntimeError, match=r"'first\.weight' was replaced"):
            call()
    with pytest.raises(ValueError, match=r"refresh: averages can't be taken over without") as error:
        pair.ema.refresh()
    assert "'first.weight' is sharded as" in str(error.value)
    assert "torch.distributed.checkpoint" in str(error.value)
    # Nothing is lost, and what there is goes into a manager of the smaller mesh.
    for name, ema in pair.ema.named_emas():
        assert_bits_equal(local(ema), part_of(ema, averages[name]), name)
