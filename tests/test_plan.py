"""Plans: made once, run often, never through an old address."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from fused_ema import EMAManager, Plan
from fused_ema.testing import assert_bits_equal, make_lists

F32 = (torch.float32, torch.float32)


def test_describe_says_who_serves_what():
    ema, params = make_lists((5, 7), F32)
    more = make_lists((9,), (torch.float32, torch.bfloat16))
    odd = make_lists((11,), F32, "with gaps")
    plan = Plan(ema + more[0] + odd[0], params + more[1] + odd[1])
    facts = {(d["backend"], d["ema_dtype"], d["param_dtype"]): d for d in plan.describe()}
    assert {k: (d["num_tensors"], d["num_elements"], d["device"]) for k, d in facts.items()} == {
        ("cpu", "float32", "float32"): (2, 12, "cpu"),
        ("cpu", "float32", "bfloat16"): (1, 9, "cpu"),
        ("foreach", "float32", "float32"): (1, 11, "cpu"),
    }
    assert len(plan) == 4
    assert "2 x float32/float32 on cpu (cpu)" in repr(plan)


@pytest.mark.parametrize("layout", ["with gaps", "strides differ", "param with gaps"])
def test_only_the_odd_pair_takes_the_torch_path(layout):
    ema, params = make_lists((64,) * 9, F32)
    odd = make_lists((64,), F32, layout)
    plan = Plan(ema + odd[0], params + odd[1])
    assert {d["backend"]: d["num_tensors"] for d in plan.describe()} == {"cpu": 9, "foreach": 1}


def test_strides_of_dimensions_of_size_one_do_not_matter():
    ema = torch.zeros(4, 1, 3)
    param = torch.ones(4, 3).as_strided((4, 1, 3), (3, 77, 1))
    assert Plan([ema], [param]).describe()[0]["backend"] == "cpu"


def moved(param):
    param.data = param.data * 2 + 1


def resized_storage(param):
    values = param.detach().clone()
    param.untyped_storage().resize_(0)
    param.untyped_storage().resize_(values.numel() * values.element_size())
    param.data.copy_(values + 1)


def converted(param):
    param.data = param.data.bfloat16()


def transposed_in_place(param):
    param.data = param.data.t().contiguous().t()


MOVES = {
    "p.data = other": moved,
    "storage freed and allocated again": resized_storage,
    "p.data = other dtype": converted,
    "p.data = other strides": transposed_in_place,
}


@pytest.mark.parametrize("move", MOVES)
def test_a_param_that_moved_is_noticed(backend, device, move):
    params = [torch.nn.Parameter(torch.randn(6, 6, device=device)) for _ in range(3)]
    ema = [torch.zeros(6, 6, device=device) for _ in params]
    plan = Plan(ema, params)
    plan.update(0.5)
    old = params[1].data
    kept = old.clone() if old.untyped_storage().nbytes() else None
    before = [e.clone() for e in ema]
    MOVES[move](params[1])
    plan.update(0.5)
    for e, was, p in zip(ema, before, params, strict=True):
        assert_bits_equal(e, was.lerp(p.detach().to(e.dtype), 0.5))
    if move != "storage freed and allocated again":
        assert_bits_equal(old, kept, "the memory that the param left")


def test_the_same_memory_transposed_is_noticed(backend):
    param = torch.nn.Parameter(torch.arange(36.0).view(6, 6))
    ema = torch.zeros(6, 6)
    plan = Plan([ema], [param])
    plan.update(1.0)
    assert torch.equal(ema, param)
    param.data = param.data.t()
    plan.update(1.0)
    assert torch.equal(ema, torch.arange(36.0).view(6, 6).t())


def test_the_same_memory_in_another_shape_is_the_same_elements(backend):
    ema, param = torch.zeros(4, 3), torch.arange(12.0).reshape(4, 3)
    plan = Plan([ema], [param])
    ema.data, param.data = ema.data.reshape(2, 6), param.data.reshape(2, 6)
    plan.update(0.5)
    assert torch.equal(ema, torch.arange(12.0).reshape(2, 6) / 2)


def test_the_same_memory_of_another_dtype_is_noticed(backend):
    ema, param = torch.zeros(4), torch.ones(4)
    plan = Plan([ema], [param])
    param.data = param.data.view(torch.int32)
    with pytest.raises(TypeError, match=r"params\[0\] is torch\.int32"):
        plan.update(0.5)
    assert not ema.any()


def test_the_same_storage_from_another_element_is_noticed(backend):
    base = torch.arange(10.0)
    ema, param = torch.zeros(4), base[:4]
    plan = Plan([ema], [param])
    param.data = base[5:9]
    plan.update(1.0)
    assert torch.equal(ema, base[5:9])


def test_a_swap_after_a_move_writes_the_new_memory_only(backend):
    param = torch.nn.Parameter(torch.ones(100))
    ema = torch.zeros(100)
    plan = Plan([ema], [param])
    old = param.data
    param.data = torch.full((100,), 2.0)
    plan.swap()
    assert torch.equal(old, torch.ones(100))
    assert torch.equal(param, torch.zeros(100))
    assert torch.equal(ema, torch.full((100,), 2.0))


def test_module_to_is_followed(backend):
    model = torch.nn.Linear(8, 4)
    params = list(model.parameters())
    ema = [torch.zeros_like(p, dtype=torch.float32) for p in params]
    plan = Plan(ema, params)
    model.to(torch.bfloat16)
    plan.update(0.25)
    for e, p in zip(ema, model.parameters(), strict=True):
        assert_bits_equal(e, torch.zeros_like(e).lerp_(p.detach().float(), 0.25))


def test_a_move_that_cannot_be_served_changes_nothing(backend):
    params = [torch.nn.Parameter(torch.ones(6)) for _ in range(3)]
    ema = [torch.zeros(6) for _ in params]
    plan = Plan(ema, params, ["a", "b", "c"])
    params[2].data = torch.ones(7)
    for call in (lambda: plan.update(0.5), plan.swap, plan.copy_to_ema, plan.copy_to_params):
        with pytest.raises(ValueError, match=r"ema\[2\] \('c'\) has shape \[6\] but params\[2\]"):
            call()
    assert not any(e.any() for e in ema)
    params[2].data = torch.ones(6)
    plan.update(0.5)
    assert all(e.eq(0.5).all() for e in ema)


def test_a_plan_is_made_anew_only_when_something_moved():
    ema, params = make_lists((5, 7), F32)
    plan = Plan(ema, params)
    for _ in range(3):
        plan.update(0.5)
        plan.swap()
    assert plan._plan.num_refreshes == 0
    params[0].data = params[0].data.clone()
    plan.update(0.5)
    plan.update(0.5)
    assert plan._plan.num_refreshes == 1


def test_a_plan_keeps_its_tensors_alive(backend):
    ema, params = make_lists((1000,), F32)
    expected = ema[0].lerp(params[0], 0.5)
    plan = Plan(ema, params)
    result = weakref.ref(ema[0])
    del params
    gc.collect()
    torch.empty(1000).fill_(7)
    plan.update(0.5)
    assert_bits_equal(result(), expected)
    del plan, ema
    gc.collect()
    assert result() is None


@pytest.fixture
def exchanging():
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(before)


@pytest.mark.parametrize("is_kept", [True, False])
@pytest.mark.parametrize("side", [0, 1])
def test_tensors_that_torch_exchanges_are_followed(exchanging, side, is_kept):
    emas = [torch.zeros(4) for _ in range(3)]
    params = [torch.ones(4) for _ in range(3)]
    plan = Plan(emas, params)
    plan.update(0.5)
    other = torch.full((4,), 3.0)
    torch.utils.swap_tensors((emas, params)[side][1], other)
    if not is_kept:
        del other
    num_refreshes = plan._num_refreshes
    plan.update(0.5)
    plan.update(0.0)
    assert plan._num_refreshes == num_refreshes + 1
    wanted = torch.full((4,), 0.5 * 3 + 0.5 * 1 if side == 0 else 0.5 * 0.5 + 0.5 * 3)
    assert torch.equal(emas[1], wanted)
    assert torch.equal(emas[0], torch.full((4,), 0.75))
    if is_kept:
        assert torch.equal(other, torch.full((4,), 0.5 if side == 0 else 1.0))


def test_models_are_converted_by_exchange_beside_a_manager(exchanging):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    ema = EMAManager(model, momentum=0.25)
    start = {name: tensor.clone() for name, tensor in ema.named_emas()}
    model.half()
    model.load_state_dict({k: torch.ones_like(v) for k, v in model.state_dict().items()})
    ema.update()
    for name, tensor in ema.named_emas():
        assert torch.equal(tensor, torch.lerp(start[name], torch.ones_like(tensor), 0.25))
    with ema.swapped():
        assert torch.equal(model[0].weight, dict(ema.named_emas())["0.weight"].half())
    assert model[0].weight.eq(1).all()
    model.double()
    with pytest.raises(TypeError, match=r"'0.weight' is torch.float64 now.*call refresh\(\)"):
        ema.update()


@pytest.mark.parametrize("convert", ["half", "load_state_dict"])
def test_wrappers_are_converted_beside_a_plan(convert):
    """torch exchanges wrapper subclasses whatever it is told."""
    model = nn.Linear(3, 3, bias=False)
    model.weight = nn.Parameter(TwoTensor(torch.zeros(3, 3), torch.ones(3, 3)))
    ema = TwoTensor(torch.ones(3, 3), torch.ones(3, 3))
    plan = Plan([ema], [model.weight])
    plan.update(0.5)
    assert ema.a.eq(0.5).all()
    assert ema.b.eq(1).all()
    if convert == "half":
        model.half()
    else:
        model.load_state_dict({"weight": TwoTensor(torch.ones(3, 3), torch.zeros(3, 3))})
    plan.update(0.5)
    assert ema.a.eq(0.25 if convert == "half" else 0.75).all()
    assert ema.b.eq(1 if convert == "half" else 0.5).all()


def test_threads_may_run_one_plan(backend):
    # Updates by two threads at once race on the values, as torch's own do. With every ema equal to
    # its param they change nothing, so any trace is the plan's fault.
    params = [torch.nn.Parameter(torch.randn(100)) for _ in range(200)]
    ema = [p.detach().clone() for p in params]
    plan = Plan(ema, params)
    errors = []

    def work():
        try:
            for _ in range(20):
                plan.update(0.5)
        except Exception as error:
            errors.append(error)

    for round_ in range(5):
        for p in params[round_::7]:
            p.data = p.data.clone()  # the first thread to come makes the plan anew
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert errors == []
    for e, p in zip(ema, params, strict=True):
        assert_bits_equal(e, p.detach())


def test_zero_size_tensors(backend, device):
    ema, params = make_lists((0, 3, 0), F32, device=device)
    plan = Plan(ema, params)
    expected = ema[1].lerp(params[1], 0.5)
    plan.update(0.5)
    plan.swap()
    assert_bits_equal(params[1], expected)


def test_meta_tensors_are_left_to_torch(backend):
    ema, params = make_lists((5,), F32, device="meta")
    plan = Plan(ema, params)
    plan.update(0.5)
    plan.swap()
    assert plan.describe()[0]["backend"] == "foreach"
