"""Sharded models: each rank averages its shards, bit for bit as the whole model's manager does."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from masters import InState
from sharded import (
    SHARDED,
    SHARDED_4,
    Net,
    Pair,
    all_of,
    assert_same,
    by_columns,
    by_parts,
    held,
    meshed,
    tensor_parallel,
    whole,
    write,
)
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fused_ema import EMAManager, Plan, _slots, schedules, sources
from fused_ema.testing import assert_bits_equal


def course(shard, settings):
    pair = Pair(shard, **settings)
    for i in range(4):
        if i < 2:
            pair.step()
        else:
            # Far from the average, so that a forward of the other is seen.
            pair.ema._tracked.tree.units.reshard("")
            pair.move(1.5, 0.25)
        pair.evaluate(f"between step and update {i}")
        pair.update()
        pair.check(f"update {i}")
        pair.evaluate(f"before the swap {i}")
        raw = held(pair.ema)
        with pair.ema.swapped(), pair.want.swapped():
            pair.check_model(f"swapped {i}")
            pair.evaluate(f"swapped {i}")
            pair.check(f"swapped {i}")
        assert_same(held(pair.ema), raw, f"swapped back {i}")
        pair.evaluate(f"swapped back {i}")
    assert pair.ema.num_updates == pair.want.num_updates
    assert_same(all_of(pair.ema.named_emas()), dict(pair.want.named_emas()), "gathered")
    with pytest.raises(ValueError, match="averaged_model: the model is sharded"):
        pair.ema.averaged_model()
    pair.ema.copy_to(pair.sharded)
    pair.want.copy_to(pair.plain)
    pair.check_model("copied to the model")
    pair.evaluate("copied to the model")
    pair.step()
    pair.ema.reset()
    pair.want.reset()
    pair.check("reset")


SETTINGS = [
    {},
    {"form": "mul_add", "interval": 2, "skip_buffers": True},
    {"begin": 2, "momentum_fun": schedules.linear(0.5), "buffers": "average"},
    {"dtype": torch.bfloat16, "form": "mul_add"},
    {"dtype": torch.bfloat16, "ema_dtype": "param", "include": ["first.*", "last.*"]},
]


def courses(names):
    for name in names:
        for settings in SETTINGS if name == "parts" else SETTINGS[:1]:
            try:
                course((SHARDED | SHARDED_4)[name], settings)
            except BaseException as error:
                error.add_note(f"sharded: {name}, {settings}")
                raise


@pytest.mark.parametrize("name", SHARDED)
def test_sharded_as_whole(two, name):
    two(courses, [name])


def test_sharded_as_whole_on_four(four):
    four(courses, list(SHARDED_4))


def host_emas():
    kept = _slots.needs_stage
    _slots.needs_stage = lambda ema_device, param_device: True
    try:
        for name in ("parts", "TP"):
            course(SHARDED[name], {"device": "cpu", "staging_mb": 0.001, "buffers": "average"})
    finally:
        _slots.needs_stage = kept


def test_in_the_host_s_memory(two):
    two(host_emas)


# ---- what no update, swap or copy does


class Sizes(TorchDispatchMode):
    """The most elements that any operation has returned."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.most = max(self.most, tensor.numel())
        return result


def test_nothing_is_sent_and_nothing_gathered(two):
    two(nothing_is_sent)


def nothing_is_sent():
    for settings in ({}, {"ema_dtype": torch.bfloat16}):
        torch.manual_seed(0)
        model = by_parts_of_two(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2)))
        if settings:
            model.to(torch.bfloat16)
        ema = EMAManager(model, 0.25)
        x = torch.randn(4, 64, dtype=model[0].weight.dtype)
        model(x).sum().backward()
        with torch.no_grad():
            model(x)
        with CommDebugMode() as sent, Sizes() as sizes:
            ema.update()
            with ema.swapped():
                pass
            ema.swap()
            ema.swap()
            ema.copy_to(model)
            ema.reset()
            ema.refresh()
            ema.state_dict()
        assert sent.get_total_counts() == 0
        assert sizes.most < 64 * 64
        with CommDebugMode() as sent, Sizes() as sizes:
            whole(model[0].weight)
        assert sent.get_total_counts() == 1
        assert sizes.most >= 64 * 64


def by_parts_of_two(model):
    fully_shard(model[0])
    return fully_shard(model)


@pytest.mark.parametrize("name", ["whole", "by columns", "HSDP", "TP"])
def test_where_shards_begin(two, name):
    two(shards_begin, [name])


def test_where_shards_begin_on_four(four):
    four(shards_begin, list(SHARDED_4))


def shards_begin(names):
    ways = SHARDED | SHARDED_4
    ways["by columns"] = lambda model: fully_shard(model, shard_placement_fn=by_columns)
    for name in names:
        ema = EMAManager(ways[name](Net()))
        sharded = [slot for slot in ema._tracked.slots if slot.param.shape != whole_of(slot).shape]
        assert sharded
        for slot in ema._tracked.slots:
            block = zip(slot.offset, slot.param.shape, strict=True)
            part = whole_of(slot)[tuple(slice(begin, begin + size) for begin, size in block)]
            assert torch.equal(part, slot.param), (name, slot.name, slot.offset)


def whole_of(slot):
    return whole(slot.members[0].tensor)


def test_one_launch_for_all_shards(two):
    two(one_launch)


def one_launch():
    pair = Pair(by_parts)
    plan = pair.ema._tracked.plan
    assert len(plan) == len(list(pair.sharded.parameters())) + 2
    assert len(plan.describe()) == 1
    pair.update()
    assert pair.ema._tracked.plan is plan
    pair.step()
    pair.update()
    assert pair.ema._tracked.plan is plan
    assert plan._num_refreshes == 0


# ---- what FSDP2 has gathered


def test_a_gather_under_way(two):
    two(gather_under_way)


def gather_under_way():
    for shard in (fully_shard, by_parts):
        pair = Pair(shard)
        pair.step()
        for p in pair.sharded.parameters():
            write(p, whole(p) + 1)
        pair.follow()
        pair.sharded.unshard(async_op=True)
        with pair.ema.swapped(), pair.want.swapped():
            pair.evaluate("swapped in while a gather was under way")
            pair.sharded.unshard(async_op=True)
        pair.evaluate("swapped out while a gather was under way")
        pair.sharded.unshard(async_op=True)
        pair.update()
        pair.check("updated")


def test_an_evaluation_that_was_broken_off(two):
    two(broken_off)


def broken_off():
    for more in ({}, {"reshard_after_forward": False}):
        pair = Pair(lambda model, more=more: by_parts(model, **more))
        pair.step()
        pair.update()
        raw = held(pair.ema)
        handle = pair.sharded.eval().last.register_forward_pre_hook(fail)
        with pytest.raises(ZeroDivisionError), pair.ema.swapped():
            pair.sharded(pair.inputs())
        handle.remove()
        assert not pair.ema.is_swapped
        assert_same(held(pair.ema), raw, "raw weights")
        pair.sharded.train()
        pair.evaluate("after it")
        pair.update()
        pair.check("after it")


def fail(module, args):
    return 1 / 0


def test_in_the_middle_of_a_forward(two):
    two(in_a_forward)


def in_a_forward():
    pair = Pair(by_parts)
    said = []

    def update(module, args):
        with pytest.raises(RuntimeError, match="in the middle of a forward") as error:
            pair.ema.update()
        said.append(str(error.value))

    handle = pair.sharded.last.register_forward_pre_hook(update)
    pair.step()
    handle.remove()
    assert said
    assert pair.ema.iteration == 0
    pair.update()
    pair.check("after it")


def test_a_part_of_a_sharded_model(two):
    two(part_of_a_model)


def part_of_a_model():
    model = by_parts(Net())
    ema = EMAManager(model.first, 0.5)
    x = torch.randn(4, 6)
    before = whole(model.first.weight)
    with torch.no_grad():
        model(x)
    assert not isinstance(model.first.weight, DTensor)
    again = EMAManager(model.first, 0.5)
    assert isinstance(dict(again.named_emas())["weight"], DTensor)
    with torch.no_grad():
        model(x)
    ema.update()
    write(model.first.weight, before + 2)
    ema.update()
    with ema.swapped():
        want = before.lerp(before + 2, 0.5)
        assert_bits_equal(whole(model.first.weight), want, "swapped")


# ---- a backward over weights that a swap has changed since


def test_a_backward_notices_a_swap(two):
    two(backward_notices)


def backward_notices():
    for shard in (by_parts, tensor_parallel, SHARDED["gathered until the backward"]):
        pair = Pair(shard, has_buffers=False)
        pair.step()
        versions = [p._version for p in pair.sharded.parameters()]
        pair.update()
        assert [p._version for p in pair.sharded.parameters()] == versions
        loss = pair.sharded(pair.inputs()).sum()
        if shard is tensor_parallel:
            pair.ema.swap()
            assert all(
                p._version > v for p, v in zip(pair.sharded.parameters(), versions, strict=True)
            )
        else:
            with pair.ema.swapped():
                pass
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        pair = Pair(shard)
        pair.step()
        versions = [p._version for p in pair.sharded.parameters()]
        pair.ema.copy_to(pair.sharded)
        assert all(p._version > v for p, v in zip(pair.sharded.parameters(), versions, strict=True))


# ---- shards that were replaced, and what has none


def test_shards_and_parameters_that_were_replaced(two):
    two(replaced)


def replaced():
    # Another shard of the same DTensor is followed. A buffer would be replaced, and noticed.
    pair = Pair(by_parts, has_buffers=False)
    pair.step()
    pair.update()
    for model in (pair.sharded, pair.plain):
        model.to(torch.bfloat16)
        model.to(torch.float32)
    pair.step()
    pair.update()
    pair.check("converted")
    for model in (pair.sharded, pair.plain):
        model.to(torch.bfloat16)
    pair.dtype = torch.bfloat16
    pair.move(1, 1)
    pair.update()
    pair.check("in another dtype")
    with pair.ema.swapped(), pair.want.swapped():
        assert_same(
            all_of(pair.sharded.state_dict()), all_of(pair.plain.state_dict()), "in another dtype"
        )

    # Converted while it holds the average.
    pair = Pair(by_parts)
    pair.step()
    pair.update()
    with pair.ema.swapped(), pair.want.swapped():
        pair.sharded.to(torch.float64)
        pair.plain.to(torch.float64)
    assert_same(all_of(pair.sharded.state_dict()), all_of(pair.plain.state_dict()), "float64")

    # Another Parameter isn't.
    pair = Pair(by_parts)
    values = {name: whole(tensor) + 1 for name, tensor in pair.sharded.state_dict().items()}
    anew = {name: tensor.clone() for name, tensor in pair.sharded.state_dict().items()}
    pair.sharded.load_state_dict(anew, assign=True)
    with pytest.raises(RuntimeError, match=r"'first\.weight' was replaced"):
        pair.ema.update()
    assert pair.ema.refresh() == []
    for name, tensor in pair.sharded.state_dict().items():
        write(tensor, values[name])
    pair.follow()
    pair.update()
    pair.check("refreshed")


def test_a_manager_made_before_sharding(two):
    two(made_before)


def made_before():
    plain = Net()
    model = copy.deepcopy(plain)
    ema, want = EMAManager(model, 0.25), EMAManager(plain, 0.25)
    for one in (plain, model):
        with torch.no_grad():
            for p in one.parameters():
                p.add_(1)
    ema.update(), want.update()
    by_parts(model)
    for call in (ema.update, ema.swap, ema.reset, lambda: ema.load_state_dict(ema.state_dict())):
        with pytest.raises(RuntimeError, match=r"'first\.weight' was replaced") as error:
            call()
        assert "refresh()" in str(error.value)
        assert "sharded as" in str(error.value)
    # The averages go on: each rank has them whole and takes its part.
    assert ema.refresh() == []
    assert_same(all_of(ema.named_emas()), all_of(want.named_emas()), "refreshed")
    ema.update(), want.update()
    assert_same(all_of(ema.named_emas()), all_of(want.named_emas()), "updated")


def test_copied_into_another_model(two):
    two(copied)


def copied():
    pair = Pair(by_parts)
    pair.step()
    pair.update()
    other = by_parts(Net(seed=1))
    pair.ema.copy_to(other)
    pair.want.copy_to(pair.plain)
    assert_same(all_of(other.state_dict()), all_of(pair.plain.state_dict()), "another")
    other = by_parts(Net(seed=1))
    pair.want.copy_to(other)
    assert_same(all_of(other.state_dict()), all_of(pair.plain.state_dict()), "of a whole one")
    target = Net(seed=1)
    before = all_of(target.state_dict())
    for model in (target, fully_shard(Net(seed=1), shard_placement_fn=by_columns)):
        with pytest.raises(ValueError, match=r"'first\.weight' is sharded as") as error:
            pair.ema.copy_to(model)
        assert "reshards" in str(error.value)
    assert_same(all_of(target.state_dict()), before, "nothing was written")


def test_what_has_no_average(two):
    two(refused)


def refused():
    mesh = meshed(2)
    model = nn.Linear(4, 4)
    model.weight = nn.Parameter(DTensor.from_local(torch.ones(4, 4), mesh, [Partial()]))
    with pytest.raises(ValueError, match=r"'weight' is a DTensor with placements .*redistribute"):
        EMAManager(model)
    EMAManager(model, exclude="weight")
    # A mask that is infinite on one rank is copied on all.
    model = nn.Linear(4, 4)
    mask = torch.zeros(4)
    mask[3] = float("inf")
    model.register_buffer("mask", distribute_tensor(mask, mesh, [Shard(0)]))
    model.register_buffer("table", distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    ema = EMAManager(model, buffers="average")
    assert ema.describe()["mask"] == "copied: not finite when the manager was made"
    assert ema.describe()["table"].startswith("averaged")


def partition(model):
    """As ZeRO-3 leaves parameters between their uses."""
    for p in model.parameters():
        p.ds_id, p.ds_shape = 0, p.shape
        p.data = torch.empty(0)


def test_empty_parameters_of_zero3(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", sys)
    made_before, other = nn.Linear(4, 4), nn.Linear(4, 4)
    ema, plan = (
        EMAManager(made_before, momentum=0.25),
        Plan(
            [p.detach().clone() for p in made_before.parameters()], list(made_before.parameters())
        ),
    )
    averages = {name: values.clone() for name, values in ema.named_emas()}
    model = nn.Linear(4, 4)
    partition(model), partition(made_before)
    params = list(model.parameters())
    for call in (
        lambda: EMAManager(model),
        lambda: Plan(params, list(made_before.parameters())),
        lambda: Plan([torch.zeros(p.ds_shape) for p in params], params, ["weight", "bias"]),
        *(ema.update, ema.swap, ema.reset, ema.refresh, ema.swapped().__enter__),
        lambda: EMAManager(other).copy_to(model),
        *(lambda: plan.update(0.25), plan.swap, plan.copy_to_ema, plan.copy_to_params),
    ):
        with pytest.raises(ValueError, match="is partitioned by DeepSpeed ZeRO-3") as error:
            call()
        assert "hooks.deepspeed.EngineEMA" in str(error.value)
        assert "refresh" not in str(error.value)
    assert not ema.is_swapped
    for name, values in ema.named_emas():
        assert_bits_equal(values, averages[name])


def test_without_torch_distributed():
    code = """
import sys, torch
before = {name for name in sys.modules if name.startswith("torch.distributed")}
import fused_ema
model = torch.nn.Linear(2, 2)
ema = fused_ema.EMAManager(model, 0.5)
ema.update()
with ema.swapped():
    pass
ema.load_state_dict(ema.state_dict())
ema.copy_to(model)
new = {name for name in sys.modules if name.startswith("torch.distributed")} - before
assert not new, new
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def average_masters():
    model = by_parts(Net(dtype=torch.bfloat16, has_buffers=False))
    optimizer = InState(model.parameters())
    masters = sources.optimizer_state(optimizer, "master_param")
    ema = EMAManager(model, 0.25, sources=masters)
    ema.register_step_post_hook(optimizer)
    params = dict(model.named_parameters())
    expected = {name: p.detach().to_local().float() for name, p in params.items()}
    for seed in range(3):
        for param in params.values():
            param.grad = torch.full_like(param, 0.01 * (seed + 1))
        optimizer.step()
        for name, param in params.items():
            master = optimizer.state[param]["master_param"]
            expected[name].lerp_(master.to_local().float(), 0.25)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert ema.num_updates == 3
    raw = {name: p.detach().to_local().clone() for name, p in params.items()}
    for name, average in ema.named_emas():
        assert average.placements == params[name].placements
        assert_bits_equal(average.to_local(), expected[name], name)
    with ema.swapped():
        for name, param in params.items():
            assert torch.equal(param.to_local(), expected[name].bfloat16()), name
    for name, param in params.items():
        assert torch.equal(param.to_local(), raw[name]), name
    whole = {name: torch.zeros(param.shape) for name, param in params.items()}
    with pytest.raises(ValueError, match="each rank needs the part that it holds"):
        EMAManager(model, 0.25, sources=whole)


def test_masters_of_a_sharded_model(two):
    two(average_masters)
