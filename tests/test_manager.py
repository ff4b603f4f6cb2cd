"""EMAManager: the reference semantics, what is tracked, swaps, and a model that changes."""

from __future__ import annotations

import copy
import gc
import itertools
import math
import pickle
import re
import weakref
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from nets import Net, assert_same, move, same, values_of
from torch import nn

from fused_ema import EMAManager, _slots, _storage, _tracking, schedules
from fused_ema.testing import ROUNDINGS, assert_bits_equal


class ReferenceHook:
    """The hook of MMDetection 2.x as a plain loop; tied names once."""

    def __init__(self, model, momentum_of, interval=1, skip_buffers=False):
        tracked = dict(model.named_parameters(remove_duplicate=False))
        self.tracked = tracked if skip_buffers else model.state_dict(keep_vars=True)
        self.momentum_of, self.interval, self.iteration = momentum_of, interval, 0
        self.ema = {name: tensor.detach().clone() for name, tensor in self.tracked.items()}

    @torch.no_grad()
    def update(self):
        i, self.iteration = self.iteration, self.iteration + 1
        if (i + 1) % self.interval:
            return
        m = self.momentum_of(i)
        for name, tensor in self.tracked.items():
            if tensor.is_floating_point():
                self.ema[name].mul_(1 - m).add_(tensor, alpha=m)


OPS = {
    "update": lambda ema: ema.update(),
    "swap": lambda ema: ema.swap(),
    "swapped": lambda ema: ema.swapped().__enter__(),
    "reset": lambda ema: ema.reset(),
    "load_state_dict": lambda ema: ema.load_state_dict(copy.deepcopy(ema.state_dict())),
}


# ---- the reference semantics


@pytest.mark.parametrize("dtype", ROUNDINGS)
@pytest.mark.parametrize("interval", [1, 2, 3])
@pytest.mark.parametrize("skip_buffers", [False, True])
@pytest.mark.parametrize("schedule", ["constant", "exponential", "linear"])
def test_the_bits_of_the_reference_loop(backend, dtype, interval, skip_buffers, schedule):
    fun = {
        "constant": None,
        "exponential": schedules.exponential(0.02, total_iter=5),
        "linear": schedules.linear(0.1, warm_up=30, interval=interval),
    }[schedule]
    model = Net(dtype)
    reference = ReferenceHook(model, fun or (lambda i: 0.02), interval, skip_buffers)
    options = {"form": "mul_add", "ema_dtype": "param"}
    options["buffers"] = None if skip_buffers else "average"
    ema = EMAManager(model, 0.02, interval, skip_buffers, fun, **options)
    for step in range(7):
        move(model, step)
        reference.update()
        ema.update()
        assert_same(ema.named_emas(), reference.ema)
    assert (ema.iteration, ema.num_updates) == (7, 7 // interval)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_products_are_the_bits_of_the_formula(backend, dtype):
    model = Net(dtype)
    ema = EMAManager(model, 0.02, skip_buffers=True, form="two_products")
    expected = {name: p.detach().float().clone() for name, p in model.named_parameters()}
    for step in range(4):
        move(model, step)
        ema.update()
        for name, p in model.named_parameters():  # A bf16 product is rounded to bf16 first.
            expected[name] = (1 - 0.02) * expected[name] + 0.02 * p.detach()
    emas = dict(ema.named_emas())
    for name, want in expected.items():
        assert_bits_equal(emas[name], want, name)


def test_the_default_form_is_lerp_and_the_default_momentum_the_reference_s(backend, device):
    model = Net().to(device)
    ema = EMAManager(model, buffers="average")
    expected = values_of(model)
    for step in range(3):
        move(model.cpu() if device == "cpu" else model, step)
        ema.update()
        for name, tensor in values_of(model).items():
            if tensor.is_floating_point():
                expected[name].lerp_(tensor, 0.0002)
    assert_same(ema.named_emas(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_params_are_averaged_in_float32_by_default(backend, dtype):
    model = Net(dtype)
    ema = EMAManager(model, 0.01, buffers="average")
    expected = {k: v.float() if v.is_floating_point() else v for k, v in values_of(model).items()}
    for step in range(3):
        move(model, step)
        ema.update()
        for name, tensor in values_of(model).items():
            if tensor.is_floating_point():
                expected[name].lerp_(tensor.float(), 0.01)
    assert_same(ema.named_emas(), expected)


@pytest.mark.parametrize(
    ("ema_dtype", "dtype", "found"),
    [
        (None, torch.float32, torch.float32),
        (None, torch.float64, torch.float64),
        ("param", torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float16, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    ],
)
def test_ema_dtype(ema_dtype, dtype, found):
    ema = EMAManager(Net(dtype), ema_dtype=ema_dtype)
    dtypes = {name: tensor.dtype for name, tensor in ema.named_emas()}
    assert dtypes.pop("mask") == torch.bool
    assert dtypes.pop("bytes") == torch.uint8
    assert dtypes.pop("table").is_complex
    assert dtypes.pop("body.1.num_batches_tracked") == torch.int64
    assert set(dtypes.values()) == {found}


def test_an_iteration_that_somebody_else_counts():
    model = Net()
    ema = EMAManager(model, 0.5, interval=10, momentum_fun=lambda i: i / 100)
    expected = values_of(model)["scale"]
    move(model, 0)
    for i in (0, 8, 9, 10, 18, 19):
        ema.update(iteration=i)
    assert ema.iteration == 20
    assert ema.num_updates == 2
    for i in (9, 19):
        expected.lerp_(model.scale.detach(), i / 100)
    same(dict(ema.named_emas())["scale"], expected, "scale")


def test_before_begin_the_ema_follows_by_copy(backend):
    model = Net()
    ema = EMAManager(model, 0.25, interval=3, begin=4, buffers="average")
    for step in range(4):
        move(model, step)
        ema.update()
        assert_same(ema.named_emas(), values_of(model))
    assert (ema.iteration, ema.num_updates) == (4, 0)
    expected = values_of(model)
    move(model, 4)
    ema.update()  # iteration 4: past begin, and no update by the interval
    assert_same(ema.named_emas(), expected)
    ema.update()
    for name, tensor in values_of(model).items():
        if tensor.is_floating_point():
            expected[name].lerp_(tensor, 0.25)
    assert_same(ema.named_emas(), expected)
    assert ema.num_updates == 1


def test_copied_buffers():
    model = Net(torch.bfloat16)
    ema = EMAManager(model, 0.25, interval=2, copy_buffers=True)
    params = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    start = values_of(model)
    for step in range(2):
        move(model, step)
        ema.update()
        now, found = values_of(model), dict(ema.named_emas())
        for name in start.keys() - params:
            same(found[name], (now if step else start)[name], name)
    for name in params:
        same(found[name], start[name].float().lerp_(now[name].float(), 0.25), name)


def test_the_momentum_may_be_any_real_number():
    for one in (np.float32(0.5), np.float64(0.5)):
        assert EMAManager(nn.Linear(2, 2), one).momentum_at(3) == 0.5
        ema = EMAManager(nn.Linear(2, 2), momentum_fun=lambda i, one=one: one)
        assert ema.momentum_at(3) == 0.5
        ema.update()
    assert EMAManager(nn.Linear(2, 2), momentum_fun=lambda i: 1).momentum_at(3) == 1.0


# ---- what is tracked


def names_of(ema):
    return [name for name, _ in ema.named_emas()]


def test_names_and_their_order_are_those_of_the_model():
    model = Net()
    assert names_of(EMAManager(model)) == list(model.state_dict())
    assert names_of(EMAManager(model, skip_buffers=True)) == [
        name for name, _ in model.named_parameters(remove_duplicate=False)
    ]


def test_frozen_parameters_can_be_left_out():
    model = Net()
    left = set(model.state_dict()) - set(names_of(EMAManager(model, skip_frozen=True)))
    assert left == {"frozen"}


def test_include_and_exclude():
    model = Net()
    assert names_of(EMAManager(model, include="body.*")) == [
        name for name in model.state_dict() if name.startswith("body.")
    ]
    assert names_of(EMAManager(model, include=["body.?.weight", "scale"])) == [
        *("scale", "body.0.weight", "body.1.weight")
    ]
    ema = EMAManager(model, include="body.*", exclude=["*.running_*", "*num_batches*"])
    assert names_of(ema) == ["body.0.weight", "body.0.bias", "body.1.weight", "body.1.bias"]
    raw = values_of(model)
    move(model, 0)
    moved = values_of(model)
    with ema.swapped():
        for name, tensor in model.state_dict().items():
            same(tensor, (raw if name in names_of(ema) else moved)[name], name)


def test_a_pattern_may_name_one_of_two_tied_names():
    ema = EMAManager(Net(), exclude="head.weight")
    assert "embedding.weight" in names_of(ema)
    assert "head.weight" not in names_of(ema)


def three_kinds_of_ties():
    model = nn.Module()
    model.a = nn.Linear(4, 3, bias=False)
    model.b = nn.Linear(4, 3, bias=False)
    model.b.weight = model.a.weight
    model.c = nn.Linear(4, 3, bias=False)
    model.c.weight.data = model.a.weight.data
    model.d = nn.Linear(3, 4, bias=False)
    model.d.weight = nn.Parameter(model.a.weight.detach().t())
    model.e = nn.Linear(4, 3, bias=False)
    return model


def test_tied_tensors_are_averaged_once_and_swapped_right(backend):
    model = three_kinds_of_ties()
    ema = EMAManager(model, 0.25, buffers="average")
    assert "2 tensors, 24 elements" in repr(ema)
    expected = model.a.weight.detach().clone()
    with torch.no_grad():
        model.a.weight.add_(1)
    raw = values_of(model)
    ema.update()
    expected.lerp_(model.a.weight.detach(), 0.25)
    found = dict(ema.named_emas())
    for name in "abc":
        assert_bits_equal(found[f"{name}.weight"], expected)
    assert_bits_equal(found["d.weight"], expected.t())
    with ema.swapped():
        for name in "abc":
            assert_bits_equal(getattr(model, name).weight, expected)
        assert_bits_equal(model.d.weight, expected.t())
    assert_same(model.state_dict(), raw)
    assert_same(ema.named_emas(), found)


@pytest.mark.parametrize("op", OPS)
def test_tied_tensors_that_were_parted(op):
    model = three_kinds_of_ties()
    ema = EMAManager(model, 0.5)
    model.c.weight.data = model.c.weight.data.clone()  # As model.to(...) does to this kind of tie.
    message = rf"EMAManager\.{op}: 'c.weight' is no longer tied to 'a.weight', .* refresh\(\)"
    with pytest.raises(ValueError, match=message):
        OPS[op](ema)
    assert ema.iteration == 0
    assert ema.refresh() == []
    with torch.no_grad():
        model.c.weight.add_(1)
    ema.update()
    found = dict(ema.named_emas())
    assert_bits_equal(found["c.weight"], found["a.weight"].lerp(model.c.weight.detach(), 0.5))


def test_one_allocation_for_each_dtype_and_device():
    model = Net()
    ema = EMAManager(model)
    by_dtype = {}
    for slot in ema._tracked.slots:
        begin = slot.ema.data_ptr()
        if slot.ema.numel():
            end = begin + slot.ema.numel() * slot.ema.element_size()
            by_dtype.setdefault(slot.ema.dtype, []).append((begin, end))
    assert set(by_dtype) == {
        *(torch.float32, torch.int64, torch.bool, torch.uint8, torch.complex64)
    }
    for parts in by_dtype.values():
        parts.sort()
        for (_, end), (begin, _) in itertools.pairwise(parts):
            assert 0 <= begin - end < 128
    found = dict(ema.named_emas())
    for name, tensor in model.state_dict().items():
        assert found[name].stride() == tensor.stride(), name
        assert found[name].data_ptr() % 64 == 0
    assert not found["body.0.weight"].is_contiguous()


def test_a_param_with_gaps_is_averaged_too():
    model = nn.Module()
    model.odd = nn.Parameter(torch.randn(4, 6)[:, ::2])
    ema = EMAManager(model, 0.5)
    expected = model.odd.detach().clone()
    with torch.no_grad():
        model.odd.add_(1)
    raw = model.odd.detach().clone()
    ema.update()
    expected.lerp_(raw, 0.5)
    assert_bits_equal(dict(ema.named_emas())["odd"], expected)
    with ema.swapped():
        assert_bits_equal(model.odd, expected)
    assert_bits_equal(model.odd, raw)


def test_tensors_without_memory_of_their_own():
    from torch.testing._internal.two_tensor import TwoTensor

    model = nn.Module()
    model.plain = nn.Parameter(torch.ones(3))
    model.pair = nn.Parameter(TwoTensor(torch.zeros(4), torch.full((4,), 2.0)))
    ema = EMAManager(model, 0.5)
    with torch.no_grad():
        model.pair.add_(1)
    ema.update()
    found = dict(ema.named_emas())["pair"]
    assert found.a.eq(0.5).all()
    assert found.b.eq(2.5).all()
    with ema.swapped():
        assert model.pair.a.eq(0.5).all()
        assert model.pair.b.eq(2.5).all()
    assert model.pair.a.eq(1).all()
    assert model.pair.b.eq(3).all()


@pytest.fixture(params=[True, False], ids=["staged", "same device"])
def staged(request, monkeypatch):
    """As if the ema were on another device; the values must be the same."""
    if request.param:
        monkeypatch.setattr(_slots, "needs_stage", lambda ema_device, param_device: True)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_ema_on_another_device(staged, dtype):
    model = Net(dtype)
    ema = EMAManager(model, 0.25, begin=1, device="cpu", buffers="average")
    expected = None
    for step in range(3):
        move(model, step)
        ema.update()
        now = values_of(model)
        if expected is None:
            expected = {k: v.float() if v.is_floating_point() else v for k, v in now.items()}
            continue
        for name, tensor in now.items():
            if tensor.is_floating_point():
                expected[name].lerp_(tensor.float(), 0.25)
    assert_same(ema.named_emas(), expected)
    raw = values_of(model)
    with ema.swapped():
        assert_same(model.state_dict(), {k: v.to(raw[k].dtype) for k, v in expected.items()})
        assert_same(ema.named_emas(), {k: v.to(ema_dtype(ema, k)) for k, v in expected.items()})
    assert_same(model.state_dict(), raw)
    assert_same(ema.named_emas(), expected)


def ema_dtype(ema, name):
    return dict(ema.named_emas())[name].dtype


@pytest.mark.cuda
def test_an_ema_of_cuda_params_on_the_host():
    model = Net(torch.bfloat16).cuda()
    ema = EMAManager(model, 0.25, device="cpu")
    expected = {k: v.cpu() for k, v in values_of(model).items()}
    expected = {k: v.float() if v.is_floating_point() else v for k, v in expected.items()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    ema.update()
    for name, tensor in values_of(model).items():
        if tensor.is_floating_point():
            expected[name].lerp_(tensor.cpu().float(), 0.25)
    assert_same(ema.named_emas(), expected)
    raw = values_of(model)
    with ema.swapped():
        for name, tensor in model.state_dict().items():
            same(tensor.cpu(), expected[name].to(tensor.dtype), name)
    assert_same(model.state_dict(), raw)
    assert_same(ema.named_emas(), expected)


# ---- swaps


@pytest.mark.parametrize("dtype", ROUNDINGS)
@pytest.mark.parametrize("how", [None, "param"])
def test_a_swap_exchanges_everything_and_brings_it_back(backend, dtype, how):
    model = Net(dtype)
    ema = EMAManager(model, 0.3, ema_dtype=how)
    for step in range(3):
        move(model, step)
        ema.update()
    raw = values_of(model)
    averages = {name: tensor.clone() for name, tensor in ema.named_emas()}
    for _ in range(2):
        with ema.swapped():
            assert ema.is_swapped
            assert_same(model.state_dict(), {k: v.to(raw[k].dtype) for k, v in averages.items()})
            assert model.head.weight is model.embedding.weight
        assert not ema.is_swapped
        assert_same(model.state_dict(), raw)
        assert_same(ema.named_emas(), averages)
    ema.swap()
    same(model.scale.detach(), averages["scale"].to(dtype), "scale")
    ema.swap()
    assert_same(model.state_dict(), raw)
    assert_same(ema.named_emas(), averages)


def test_nan_payloads_survive_a_swap():
    model = nn.Linear(4, 1, bias=False)
    bits = torch.tensor([0x7FC01234, 0x7F800001, -0x3FFFFF, 0x00000001], dtype=torch.int32)
    ema = EMAManager(model)
    with torch.no_grad():
        model.weight.copy_(bits.view(torch.float32)[None])
    ema.swap()
    ema.swap()
    assert torch.equal(model.weight.detach().view(torch.int32)[0], bits)


def test_whatever_is_raised_inside_the_raw_weights_come_back(backend):
    model = Net(torch.bfloat16)
    ema = EMAManager(model, 0.5)
    move(model, 1)
    raw = values_of(model)
    for error in (ValueError, KeyboardInterrupt, GeneratorExit, SystemExit):
        with pytest.raises(error), ema.swapped():
            raise error
        assert_same(model.state_dict(), raw)
        assert not ema.is_swapped
    ema.update()


def test_a_swap_that_fails_half_way_is_undone(monkeypatch):
    model = Net(torch.bfloat16)
    ema = EMAManager(model, 0.5)
    move(model, 1)
    ema.update()
    raw = values_of(model)
    averages = {name: tensor.clone() for name, tensor in ema.named_emas()}
    plain_copy, calls = _storage.copy, []

    def failing_copy(dst, src):
        calls.append(len(dst))
        if len(calls) == 2:  # The first sets aside, the second writes to the model.
            plain_copy(dst[:2], src[:2])
            raise RuntimeError("out of memory")
        plain_copy(dst, src)

    monkeypatch.setattr(_storage, "copy", failing_copy)
    with pytest.raises(RuntimeError, match="out of memory"):
        ema.swap()
    assert not ema.is_swapped
    assert_same(model.state_dict(), raw)
    assert_same(ema.named_emas(), averages)
    ema.swap()
    calls[:] = [0]
    with pytest.raises(RuntimeError, match="out of memory"):
        ema.swap()
    assert ema.is_swapped
    ema.swap()
    assert_same(model.state_dict(), raw)
    assert_same(ema.named_emas(), averages)


def test_nothing_is_allocated_where_the_dtypes_agree():
    from torch.profiler import ProfilerActivity, profile

    def allocated_by(ema):
        with ema.swapped():
            pass
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof, ema.swapped():
            pass
        return sum(max(0, event.self_cpu_memory_usage) for event in prof.events())

    model = Net()
    # In and out, a copy of each 8-bit buffer.
    num_bytes = sum(t.numel() for t in model.buffers() if t.element_size() == 1)
    assert allocated_by(EMAManager(model)) == 2 * num_bytes > 0
    del model.mask, model.bytes
    assert allocated_by(EMAManager(model)) == 0
    # The measurement sees what is set aside: all params and float buffers of the same net.
    assert allocated_by(EMAManager(Net(torch.bfloat16))) > 500


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_converted_while_it_holds_the_ema_gets_its_raw_weights_back(dtype):
    # Its buffers are other tensors then, and every param's dtype is another than its ema's.
    model = Net(torch.bfloat16)
    del model.table  # Conversions make complex tensors real.
    ema = EMAManager(model, 0.5, ema_dtype="param")
    move(model, 0)
    ema.update()
    raw, averages = values_of(model), {name: e.clone() for name, e in ema.named_emas()}
    with ema.swapped():
        model.to(dtype)
        assert_same(model.to(torch.bfloat16).state_dict(), averages)
        model.to(dtype)
    assert not ema.is_swapped
    assert model.scale.dtype == dtype
    model.to(torch.bfloat16)
    assert_same(model.state_dict(), raw)
    assert_same(ema.named_emas(), averages)
    ema.update()
    assert ema.num_updates == 2


def test_what_is_written_meanwhile_belongs_to_the_ema():
    # So that torch.optim.swa_utils.update_bn inside of swapped() recalibrates the ema.
    model = Net()
    ema = EMAManager(model)
    with ema.swapped():
        model.body[1].running_mean.fill_(3.0)
        model.body[1].num_batches_tracked.fill_(77)
    assert model.body[1].running_mean.eq(0).all()
    found = dict(ema.named_emas())
    assert found["body.1.running_mean"].eq(3).all()
    assert found["body.1.num_batches_tracked"] == 77


def test_swaps_do_not_disturb_autograd():
    model = nn.Linear(3, 1)
    ema = EMAManager(model, 0.5)
    out = model(torch.ones(3, requires_grad=True))
    with ema.swapped():
        pass
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()  # It saved the weight, which has been written to twice.
    model(torch.ones(3)).backward()
    with ema.swapped(), torch.inference_mode():
        model(torch.ones(3))
    with torch.inference_mode(), ema.swapped():
        model(torch.ones(3))
    assert model.weight.requires_grad
    assert model.weight.grad is not None
    model(torch.ones(3)).backward()


def test_a_manager_made_in_inference_mode_works_outside():
    model = Net(torch.bfloat16)
    with torch.inference_mode():
        ema = EMAManager(model, 0.5)
    move(model, 0)
    ema.update()
    with torch.inference_mode(), ema.swapped():
        pass
    with ema.swapped():
        pass
    assert ema.num_updates == 1


@pytest.mark.parametrize("op", [*(op for op in OPS if op != "swap"), "refresh"])
@pytest.mark.parametrize("within", [True, False])
def test_refused_while_swapped(op, within):
    model = Net()
    ema = EMAManager(model, 0.5)
    move(model, 0)
    ema.update()
    raw = values_of(model)
    averages = {name: tensor.clone() for name, tensor in ema.named_emas()}
    message = rf"EMAManager\.{op}: the model .*leave swapped\(\)" if within else r"call swap\(\)"
    with ema.swapped() if within else swapped_by_hand(ema):
        with pytest.raises(RuntimeError, match=message):
            OPS.get(op, lambda ema: ema.refresh())(ema)
        assert_same(model.state_dict(), averages)
        assert ema.iteration == 1
    assert_same(model.state_dict(), raw)
    assert_same(ema.named_emas(), averages)
    assert not ema.is_swapped


def swapped_by_hand(ema):
    from contextlib import contextmanager

    @contextmanager
    def swapped():
        ema.swap()
        yield
        ema.swap()

    return swapped()


def test_two_managers_of_one_model():
    model = Net()
    fast, slow = EMAManager(model, 0.5), EMAManager(model, 0.1, include="body.*")
    elsewhere = EMAManager(Net(seed=1))
    move(model, 0)
    raw = values_of(model)
    fast.update()
    slow.update()
    averages = {name: tensor.clone() for name, tensor in slow.named_emas()}
    with fast.swapped():
        for op in OPS:
            with pytest.raises(
                RuntimeError, match=rf"{op}: 'body.0.weight' holds the ema of anoth"
            ):
                OPS[op](slow)
        elsewhere.update()
        elsewhere.swap()
        elsewhere.swap()
    assert_same(model.state_dict(), raw)
    assert_same(slow.named_emas(), averages)
    with slow.swapped():
        assert_bits_equal(model.body[0].weight, averages["body.0.weight"])
    fast.swap()
    del fast
    gc.collect()
    slow.update()  # Who swapped it is gone, and with it what the raw weights were.


# ---- in training


def test_after_each_step_of_an_optimizer():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = EMAManager(model, 0.5)
    handle = ema.register_step_post_hook(optimizer)
    expected = values_of(model)
    for step in range(4):
        for _ in range(2):  # gradient accumulation
            model(torch.randn(5, 3)).square().sum().backward()
        if step == 3:
            handle.remove()
        optimizer.step()
        optimizer.zero_grad()
        if step < 3:
            for name, tensor in values_of(model).items():
                expected[name].lerp_(tensor, 0.5)
    assert_same(ema.named_emas(), expected)
    assert ema.num_updates == 3
    with pytest.raises(TypeError, match=r"register_step_post_hook: optimizer is a Linear"):
        ema.register_step_post_hook(model)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_is_no_update(fused):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    ema = EMAManager(model, 0.5)
    ema.register_step_post_hook(optimizer)
    scaler = torch.amp.GradScaler("cpu")
    for factor, updates in ((1.0, 1), (math.inf, 1), (1.0, 2)):
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(1, 3)).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        assert ema.num_updates == updates


def test_no_walk_of_the_model_in_a_step(monkeypatch):
    model = Net()
    ema = EMAManager(model, 0.5)

    def walk(*args, **kwargs):
        raise AssertionError("walked")

    for name in ("state_dict", "named_modules", "named_parameters", "parameters", "buffers"):
        monkeypatch.setattr(nn.Module, name, walk)
    monkeypatch.setattr(_tracking, "read", walk)
    for _ in range(3):
        ema.update()
        with ema.swapped():
            pass


def test_a_failed_update_counts_nothing(backend):
    model = Net()
    ema = EMAManager(model, momentum_fun=lambda i: (0.5, 1.5, math.nan, "0.5", None)[i])
    ema.update()
    averages = {name: tensor.clone() for name, tensor in ema.named_emas()}
    move(model, 0)
    for i, (error, message) in enumerate(
        [
            (ValueError, r"momentum_fun\(1\) returned 1.5; it is the weight of the new value"),
            (ValueError, r"momentum_fun\(2\) returned nan"),
            (TypeError, r"momentum_fun\(3\) returned a str; it must return a number"),
            (TypeError, r"momentum_fun\(4\) returned a NoneType"),
        ],
        start=1,
    ):
        with pytest.raises(error, match=message):
            ema.update(i)
        assert (ema.iteration, ema.num_updates) == (1, 1)
    for i in (-1, 1.0, True, "1"):
        with pytest.raises(ValueError, match=r"update: iteration is .*a whole number from 0"):
            ema.update(i)
    assert_same(ema.named_emas(), averages)


# ---- bad settings


class TwoUnderOneName(nn.Module):
    def __init__(self):
        super().__init__()
        self._orig_mod = nn.Linear(2, 2)
        self.weight = nn.Parameter(torch.zeros(3))


def with_parameter(tensor):
    model = nn.Linear(2, 2)
    model.odd = nn.Parameter(tensor, requires_grad=False)
    return model


def overlapping():
    model = nn.Module()
    model.whole = nn.Parameter(torch.zeros(6))
    model.part = nn.Parameter(model.whole.detach()[2:4])
    return model


LAZY = r"'weight' of the model isn't initialised \(a lazy module\); run one batch"
BAD = {
    "momentum 0": (lambda: EMAManager(Net(), 0), ValueError, r"momentum is 0; .* between 0 and 1"),
    "momentum 1": (lambda: EMAManager(Net(), 1.0), ValueError, "momentum is 1.0; .*1 - decay"),
    "momentum -1": (lambda: EMAManager(Net(), -1), ValueError, "momentum is -1"),
    "momentum NaN": (lambda: EMAManager(Net(), math.nan), ValueError, "momentum is nan"),
    "momentum str": (lambda: EMAManager(Net(), "x"), TypeError, "momentum is a str; pass a number"),
    "momentum_fun": (
        lambda: EMAManager(Net(), momentum_fun=0.5),
        TypeError,
        "momentum_fun is a float; pass a function of the iteration",
    ),
    "interval 0": (lambda: EMAManager(Net(), interval=0), ValueError, "interval is 0; .*from 1"),
    "interval 1.5": (lambda: EMAManager(Net(), interval=1.5), ValueError, "interval is 1.5"),
    "interval True": (lambda: EMAManager(Net(), interval=True), ValueError, "interval is True"),
    "begin -1": (lambda: EMAManager(Net(), begin=-1), ValueError, "begin is -1; .* from 0"),
    "form": (lambda: EMAManager(Net(), form="ema"), ValueError, "form is 'ema'; choose 'lerp',"),
    "model": (lambda: EMAManager([Net()]), TypeError, r"model is a list; pass a torch\.nn\.Module"),
    "no parameters": (lambda: EMAManager(nn.ReLU()), ValueError, "the model has no parameters"),
    "only buffers": (
        lambda: EMAManager(nn.BatchNorm1d(3, affine=False)),
        ValueError,
        "the model has no parameters",
    ),
    "include nothing": (
        lambda: EMAManager(Net(), include=["body.*", "bdy.*"]),
        ValueError,
        r"include pattern 'bdy\.\*' matches none of the model's 15 names: 'scale', .* and 7 more",
    ),
    "exclude nothing": (
        lambda: EMAManager(nn.Linear(2, 2), exclude="norm"),
        ValueError,
        "exclude pattern 'norm' matches none of the model's 2 names: 'weight', 'bias'$",
    ),
    "pattern int": (
        lambda: EMAManager(Net(), exclude=[3]),
        TypeError,
        "exclude holds a int; pass patterns as strings",
    ),
    "all excluded": (
        lambda: EMAManager(Net(), exclude="*"),
        ValueError,
        "none of the model's 15 parameters and buffers is left to track",
    ),
    "skip and copy": (
        lambda: EMAManager(Net(), skip_buffers=True, copy_buffers=True),
        ValueError,
        "both skip_buffers and copy_buffers are set; choose one",
    ),
    "ema_dtype": (
        lambda: EMAManager(Net(), ema_dtype="float32"),
        ValueError,
        r"ema_dtype is 'float32'; choose None, 'param' or one of torch\.bfloat16",
    ),
    "ema_dtype int": (
        lambda: EMAManager(Net(), ema_dtype=torch.int32),
        ValueError,
        r"ema_dtype is torch\.int32; choose",
    ),
    "pair": (
        lambda: EMAManager(Net(torch.float64), ema_dtype=torch.float32),
        TypeError,
        r"'scale' is torch\.float64 and its ema would be torch\.float32; supported pairs",
    ),
    "float8": (
        lambda: EMAManager(with_parameter(torch.zeros(2).to(torch.float8_e4m3fn))),
        TypeError,
        r"'odd' is torch\.float8_e4m3fn and its ema would be .* leave it out with exclude=",
    ),
    "complex": (
        lambda: EMAManager(with_parameter(torch.zeros(2, dtype=torch.complex64))),
        TypeError,
        r"'odd' is torch\.complex64, and complex parameters can't be averaged",
    ),
    "sparse": (
        lambda: EMAManager(with_parameter(torch.eye(2).to_sparse())),
        TypeError,
        r"'odd' has layout torch\.sparse_coo; only dense tensors",
    ),
    "lazy": (lambda: EMAManager(nn.LazyLinear(2)), ValueError, LAZY),
    "overlap": (
        lambda: EMAManager(overlapping()),
        ValueError,
        r"params\[0\] \('whole'\) and params\[1\] \('part'\) share memory",
    ),
    "two under one name": (
        lambda: EMAManager(TwoUnderOneName()),
        ValueError,
        "two tensors of the model have the name 'weight'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings(case):
    make, error, message = BAD[case]
    with pytest.raises(error, match=message):
        make()


# ---- a model that changes


def replaced(model):
    model.frozen = nn.Parameter(model.frozen.detach().clone(), requires_grad=False)


def replaced_in_the_dict(model):
    model.body[1]._parameters["weight"] = nn.Parameter(torch.ones(4))


def replaced_module(model):
    model.body[0] = nn.Conv2d(3, 4, 3)


def untied(model):
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())


def grown(model):
    model.extra = nn.Linear(2, 2)


def shrunk(model):
    del model.scale


def buffer_of_other_shape(model):
    model.table = torch.zeros(9, dtype=torch.complex64)


# What the error says, and whose averages start anew at refresh(). A replaced parameter of the same
# shape and name goes on.
CHANGES = {
    replaced: (["'frozen' was replaced: [6] float32 on cpu before, [6] float32 on cpu now"], []),
    replaced_in_the_dict: (
        ["'body.1.weight' was replaced: [4] float32 on cpu before, [4] float32 on cpu now"],
        [],
    ),
    replaced_module: (
        [
            "'body.0.weight' was replaced: [4, 3, 3, 3] float32 on cpu before, "
            "[4, 3, 3, 3] float32 on cpu now",
            "'body.0.bias' was replaced: [4] float32 on cpu before, [4] float32 on cpu now",
        ],
        [],
    ),
    untied: (
        ["'head.weight' was replaced: [7, 5] float32 on cpu before, [7, 5] float32 on cpu now"],
        [],
    ),
    grown: (
        [
            "'extra.weight' is new: [2, 2] float32 on cpu",
            "'extra.bias' is new: [2] float32 on cpu",
        ],
        ["extra.weight", "extra.bias"],
    ),
    shrunk: (["'scale' is gone: [] float32 on cpu"], []),
    buffer_of_other_shape: (
        ["'table' was replaced: [4] complex64 on cpu before, [9] complex64 on cpu now"],
        ["table"],
    ),
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("op", OPS)
def test_a_model_that_changed_is_an_error(backend, change, op):
    lines, _ = CHANGES[change]
    model = Net()
    ema = EMAManager(model, 0.5)
    move(model, 0)
    ema.update()
    averages = {name: tensor.clone() for name, tensor in ema.named_emas()}
    change(model)
    now = values_of(model)
    for _ in range(2):
        with pytest.raises(RuntimeError) as caught:
            OPS[op](ema)
        title, *found = str(caught.value).splitlines()
        assert f"EMAManager.{op}: the model has changed" in title
        assert "call refresh()" in title
        assert [line.strip() for line in found] == lines
        assert not ema.is_swapped
        assert_same(model.state_dict(), now)
        assert_same(ema.named_emas(), averages)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_refresh_takes_the_model_as_it_is(backend, change):
    _, started = CHANGES[change]
    model = Net()
    ema = EMAManager(model, 0.5)
    move(model, 0)
    ema.update()
    averages = {name: tensor.clone() for name, tensor in ema.named_emas()}
    change(model)
    assert ema.refresh() == started
    now = values_of(model)
    expected = {k: now[k] if k in started else averages[k] for k in now}
    assert_same(ema.named_emas(), expected)
    assert (ema.iteration, ema.num_updates) == (1, 1)
    ema.update()
    for name, tensor in values_of(model).items():
        if tensor.is_floating_point():
            expected[name] = expected[name].lerp(tensor, 0.5)
    assert_same(ema.named_emas(), expected)
    with ema.swapped():
        assert_same(model.state_dict(), expected)


def test_a_parameter_in_a_module_that_had_none_is_noticed_in_its_turn(backend):
    model = Net()
    ema = EMAManager(model, 0.5)
    model.body[2].bias = nn.Parameter(torch.zeros(2))

    def some_updates():
        for _ in range(_tracking.NUM_TURNS):
            ema.update()

    with pytest.raises(RuntimeError, match=r"'body.2.bias' is new: \[2\] float32 on cpu"):
        some_updates()
    with pytest.raises(RuntimeError, match=r"'body.2.bias' is new"):
        ema.swap()
    assert ema.refresh() == ["body.2.bias"]
    ema.update()


def test_a_change_undone_is_no_change():
    model = Net()
    ema = EMAManager(model, 0.5)
    kept = model.scale
    model.scale = nn.Parameter(torch.zeros(()))
    with pytest.raises(RuntimeError, match="'scale' was replaced"):
        ema.update()
    model.scale = kept
    ema.update()
    assert ema.num_updates == 1


def test_a_change_beside_what_is_tracked_is_followed():
    model = Net()
    ema = EMAManager(model, 0.5, include="body.*")
    model.scratch = torch.ones(5)
    ema.update()
    model.other = nn.Linear(2, 2)
    model.scale = nn.Parameter(torch.zeros(()))
    ema.update()
    model.body[2] = nn.GELU()
    ema.update()
    assert ema.num_updates == 3


def test_a_buffer_that_is_not_persistent_may_come_anew_at_every_step(backend, monkeypatch):
    model = Net()
    ema = EMAManager(model, 0.5)
    monkeypatch.setattr(_tracking, "read", None)  # No walk of the model for it.
    for step in range(3):
        model.scratch = torch.ones(step)
        ema.update()
    assert ema.num_updates == 3


def grown_by_a_lazy_module(model):
    model.extra = nn.LazyLinear(2)


def test_a_buffer_that_the_model_assigns_anew_is_followed(backend):
    model = Net()
    ema = EMAManager(model, 0.5)
    expected = dict(ema.named_emas())["body.1.running_mean"].clone()
    for step in range(3):
        model.body[1].running_mean = torch.full((4,), float(step + 1))
        ema.update()
        expected.lerp_(model.body[1].running_mean, 0.5)
    same(dict(ema.named_emas())["body.1.running_mean"], expected, "running_mean")
    with ema.swapped():
        same(model.body[1].running_mean, expected, "running_mean")
        # Whoever assigns it inside has changed the ema, as with values written in place.
        model.body[1].running_mean = torch.full((4,), 9.0)
    assert model.body[1].running_mean.eq(3).all()
    assert dict(ema.named_emas())["body.1.running_mean"].eq(9).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        *((c, RuntimeError, CHANGES[c][0][0]) for c in (replaced, replaced_module, grown, shrunk)),
        (grown_by_a_lazy_module, ValueError, "'extra.weight' of the model isn't initialised"),
    ],
)
def test_a_model_that_changed_inside_swapped_gets_its_raw_weights_back(change, error, message):
    model = Net()
    ema = EMAManager(model, 0.5)
    move(model, 0)
    ema.update()
    raw = values_of(model)
    averages = {name: tensor.clone() for name, tensor in ema.named_emas()}
    old = dict(model.named_parameters())
    tells = change is not grown and change is not grown_by_a_lazy_module
    told = pytest.warns(UserWarning, match="raw weights back") if tells else nullcontext()
    with told, ema.swapped():
        change(model)
    for name, parameter in old.items():
        same(parameter.detach(), raw[name], name)
    assert_same(ema.named_emas(), averages)
    with pytest.raises(error, match=re.escape(message)):
        ema.update()


def resized(param):
    param.data = torch.zeros(9)


@pytest.mark.parametrize("op", OPS)
def test_a_param_that_was_resized(backend, op):
    model = Net()
    ema = EMAManager(model, 0.5)
    move(model, 0)
    averages = {name: tensor.clone() for name, tensor in ema.named_emas()}
    kept = model.frozen.data
    resized(model.frozen)
    message = r"'frozen' has shape \[9\] but its ema has \[6\]; .* call refresh\(\)"
    with pytest.raises(ValueError, match=rf"EMAManager\.{op}: {message}"):
        OPS[op](ema)
    assert not ema.is_swapped
    assert ema.iteration == 0
    assert_same(ema.named_emas(), averages)
    model.frozen.data = kept
    OPS[op](ema)


def test_a_model_that_was_moved_to_the_meta_device():
    model = nn.Linear(3, 2)
    ema = EMAManager(model, 0.5)
    model.to("meta")  # Which makes new Parameters, other than a move to a CUDA device.
    with pytest.raises(RuntimeError, match=r"'bias' was replaced: .* on cpu before, .* on meta"):
        ema.update()


@pytest.mark.cuda
@pytest.mark.parametrize("op", OPS)
def test_a_model_that_was_moved_to_another_device(backend, op):
    model = nn.Linear(3, 2)
    ema = EMAManager(model, 0.5)
    averages = {name: tensor.clone() for name, tensor in ema.named_emas()}
    model.cuda()
    message = r"'weight' is on cuda:0 but was on cpu when .* call refresh\(\)"
    with pytest.raises(ValueError, match=rf"EMAManager\.{op}: {message}"):
        OPS[op](ema)
    assert_same(ema.named_emas(), averages)
    assert ema.refresh() == []
    assert_same(ema.named_emas(), {name: tensor.cuda() for name, tensor in averages.items()})
    OPS[op](ema)


def test_a_param_that_was_resized_inside_swapped():
    model = Net()
    ema = EMAManager(model, 0.5)
    move(model, 0)
    raw = values_of(model)
    kept = model.frozen.data
    swapped = ema.swapped()
    swapped.__enter__()
    resized(model.frozen)
    with pytest.raises(ValueError, match=r"swapped: 'frozen' has shape \[9\]"):
        swapped.__exit__(None, None, None)
    assert ema.is_swapped
    model.frozen.data = kept
    ema.swap()
    assert_same(model.state_dict(), raw)


def test_a_resized_param_starts_anew_on_request():
    model = Net()
    ema = EMAManager(model, 0.5)
    resized(model.frozen)
    assert ema.refresh() == ["frozen"]
    ema.update()
    assert dict(ema.named_emas())["frozen"].shape == (9,)


def test_params_that_moved_in_memory_or_were_converted_are_followed(backend):
    model = Net()
    del model.table
    ema = EMAManager(model, 0.5, buffers="average")
    averages = {name: tensor.clone() for name, tensor in ema.named_emas()}
    old = model.body[0].weight.data
    kept = old.clone()
    model.to(torch.bfloat16)
    move(model, 0)
    ema.update()
    for name, tensor in values_of(model).items():
        if tensor.is_floating_point():
            averages[name].lerp_(tensor.float(), 0.5)
    assert_same(ema.named_emas(), averages)
    assert_bits_equal(old, kept, "the memory that the param left")
    raw = values_of(model)
    with ema.swapped():
        assert_same(model.state_dict(), {k: v.to(raw[k].dtype) for k, v in averages.items()})
    assert_same(model.state_dict(), raw)
    assert_same(ema.named_emas(), averages)


def test_reset_starts_anew():
    model = Net()
    ema = EMAManager(model, 0.5)
    move(model, 0)
    ema.update()
    move(model, 1)
    ema.reset()
    assert_same(ema.named_emas(), values_of(model))
    assert (ema.iteration, ema.num_updates) == (0, 0)


# ---- copies


def test_copy_to_another_model(backend):
    model, other = Net(), Net(torch.bfloat16, seed=1)
    ema = EMAManager(model, 0.5, exclude="frozen")
    move(model, 0)
    ema.update()
    kept = other.frozen.detach().clone()
    averages = {name: tensor.clone() for name, tensor in ema.named_emas()}
    ema.copy_to(nn.DataParallel(other))
    for name, tensor in other.state_dict().items():
        if name == "frozen":
            same(tensor, kept, name)
        else:
            same(tensor, averages[name].to(tensor.dtype), name)
    assert_same(ema.named_emas(), averages)
    with ema.swapped():
        last = Net(seed=2)
        ema.copy_to(last)
        with pytest.raises(RuntimeError, match="copy_to: the model is swapped, so it holds"):
            ema.copy_to(model)
    same(last.scale.detach(), averages["scale"], "scale")
    ema.copy_to(model)
    same(model.scale.detach(), averages["scale"], "scale")


def test_copy_to_a_model_that_does_not_fit():
    ema = EMAManager(Net())
    other = Net(seed=1)
    other.body[1] = nn.BatchNorm2d(5)
    del other.scale
    before = values_of(other)
    with pytest.raises(ValueError, match=r"copy_to: the model doesn't fit") as caught:
        ema.copy_to(other)
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == [
        "'scale' is missing in the model",
        *(
            f"'body.1.{name}' has shape [5] but its ema has [4]"
            for name in ("weight", "bias", "running_mean", "running_var")
        ),
    ]
    assert_same(other.state_dict(), before)
    with pytest.raises(TypeError, match=r"copy_to: model is a dict"):
        ema.copy_to({})


def test_a_manager_is_not_copied_or_pickled():
    ema = EMAManager(Net())
    for how in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"can't be copied or pickled.*state_dict\(\)"):
            how(ema)


def test_a_manager_that_the_model_holds_is_collected():
    model = Net()
    model.ema = EMAManager(model)
    model.ema.update()
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_repr():
    ema = EMAManager(nn.Linear(2, 3), 0.01, interval=4)
    assert repr(ema) == (
        "EMAManager(2 tensors, 9 elements, momentum=0.01, interval=4, form='lerp', iteration=0, "
        "num_updates=0)"
    )
    with ema.swapped():
        assert repr(ema).endswith(", swapped)")
