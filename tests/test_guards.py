"""What must never be silent: values cached, missing, shared, frozen, or in another unit."""

from __future__ import annotations

import gc
import io
import linecache
import pickle
import warnings
import weakref

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize
from torch.optim.swa_utils import update_bn

import fused_ema
from fused_ema import EMAManager, _tracking, ops, schedules
from fused_ema.testing import assert_bits_equal


def averaged(**settings):
    """A layer whose average is another one, by more than bfloat16 rounds."""
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    ema = EMAManager(model, 0.5, **settings)
    with torch.no_grad():
        model.weight.add_(3)
    ema.update()
    return model, ema


# ---- what torch keeps of the weights


@pytest.mark.parametrize("write", ["swapped", "swap", "copy_to", "plan", "swap_", "copy_"])
def test_autocast_sees_what_was_written(write):
    model, ema = averaged()
    x = torch.randn(2, 4)
    emas, params = [dict(ema.named_emas())["weight"].clone()], [model.weight]
    plan = fused_ema.Plan(emas, params)
    want = functional.linear(*(t.bfloat16() for t in (x, emas[0], model.bias)))
    raw = functional.linear(*(t.bfloat16() for t in (x, model.weight, model.bias)))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert_bits_equal(model(x), raw)
        if write == "swapped":
            with ema.swapped():
                assert_bits_equal(model(x), want)
            assert_bits_equal(model(x), raw)
            return
        {
            "swap": ema.swap,
            "copy_to": lambda: ema.copy_to(model),
            "plan": plan.swap,
            "swap_": lambda: fused_ema.swap_(emas, params),
            "copy_": lambda: fused_ema.copy_(params, emas),
        }[write]()
        assert_bits_equal(model(x), want)


def test_parametrisations_that_are_cached():
    torch.manual_seed(0)
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 3)))
    ema = EMAManager(model, 0.5)
    with torch.no_grad():
        model[0].parametrizations.weight.original0.mul_(3)
        ema.update()
        x = torch.ones(1, 3)
        raw = model(x)
        with ema.swapped():
            want = model(x)
        with parametrize.cached():
            assert torch.equal(model(x), raw)
            with ema.swapped():
                assert torch.equal(model(x), want)
            assert torch.equal(model(x), raw)


# ---- values that aren't there, or lie in one place


def test_a_model_on_meta_is_refused_until_it_has_values():
    with torch.device("meta"):
        model = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"'weight' is on the meta device .* to_empty\(\)"):
        EMAManager(model, 0.1)
    model.load_state_dict({"weight": torch.ones(4, 4), "bias": torch.ones(4)}, assign=True)
    ema = EMAManager(model, 0.1)
    model.to("meta")
    with pytest.raises(ValueError, match="'weight' is on the meta device"):
        ema.refresh()


def test_fake_tensors_are_refused_by_name():
    with FakeTensorMode():
        model = nn.Linear(2, 2)
        with pytest.raises(ValueError, match="'weight' is a fake tensor"):
            EMAManager(model, 0.5)


def test_copy_to_an_offloaded_model():
    _, ema = averaged()
    other = nn.Linear(4, 4)
    other.bias = nn.Parameter(other.bias.to("meta"))
    before = other.weight.detach().clone()
    with pytest.raises(ValueError, match="'bias' is on the meta device"):
        ema.copy_to(other)
    assert torch.equal(other.weight, before)


@pytest.mark.parametrize("mode", ["auto", "average", "copy"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bool])
def test_expanded_buffers_are_refused_by_name(mode, dtype):
    model = nn.Linear(4, 4)
    model.register_buffer("anchors", torch.ones(1, 12).to(dtype).expand(2, -1))
    with pytest.raises(ValueError, match=r"'anchors' is expanded: .* a \.clone\(\) of it"):
        EMAManager(model, 0.1, buffers=mode)
    EMAManager(model, 0.1, exclude="anchors").update()
    other = nn.Linear(4, 4)
    other.register_buffer("anchors", torch.ones(2, 12).to(dtype))
    ema = EMAManager(other, 0.1, buffers=mode)
    before = model.weight.detach().clone()
    with pytest.raises(ValueError, match=r"(?s)copy_to: .*'anchors' is expanded"):
        ema.copy_to(model)
    assert torch.equal(model.weight, before)
    other.anchors = torch.ones(1, 12).to(dtype).expand(2, -1)
    with pytest.raises(ValueError, match=r"'anchors' is expanded"), ema.swapped():
        pass


def test_a_model_that_fsdp1_shards_is_refused():
    class FullyShardedDataParallel(nn.Module):  # Making a real one takes a process group.
        __module__ = "torch.distributed.fsdp.fully_sharded_data_parallel"

        def __init__(self, module):
            super().__init__()
            self._fsdp_wrapped_module = module

    model = nn.Sequential(FullyShardedDataParallel(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"'0' is sharded by FullyShardedDataParallel \(FSDP1\)"):
        EMAManager(model, 0.1)
    with pytest.raises(ValueError, match="FSDP1"):
        EMAManager(nn.Sequential(nn.Linear(2, 2)), 0.1).copy_to(model)


# ---- frozen


def two_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].requires_grad_(False)
    return model, EMAManager(model, 0.25, skip_frozen=True)


@pytest.mark.parametrize("op", ["update", "swap", "reset", "load"])
def test_a_part_that_is_unfrozen_is_noticed(op):
    model, ema = two_layers()
    state = ema.state_dict()
    model[0].requires_grad_(True)
    call = {"load": lambda: ema.load_state_dict(state)}.get(op, getattr(ema, op, None))
    with pytest.raises(RuntimeError, match=r"'0.weight', '0.bias' were frozen .* refresh\(\)"):
        call()
    assert ema.refresh() == ["0.weight", "0.bias"]
    before = {name: tensor.clone() for name, tensor in ema.named_emas()}
    with torch.no_grad():
        model[0].weight.add_(4)
    ema.update()
    assert torch.equal(
        dict(ema.named_emas())["0.weight"], before["0.weight"].lerp(model[0].weight, 0.25)
    )


def test_what_is_frozen_later_stays_tracked():
    model, ema = two_layers()
    with torch.no_grad():
        model[1].weight.add_(1)
    ema.update()
    kept = dict(ema.named_emas())["1.weight"].clone()
    model[1].requires_grad_(False)
    model.register_buffer("late", torch.zeros(1))
    says = r"\n  'late' is new: \[1\] float32 on cpu$"
    with pytest.raises(RuntimeError, match=says), ema.swapped():
        pass
    assert ema.refresh() == ["late"]
    emas = dict(ema.named_emas())
    assert list(emas) == ["late", "1.weight", "1.bias"]
    assert torch.equal(emas["1.weight"], kept)


# ---- files


def saved(what):
    file = io.BytesIO()
    torch.save(what, file)
    return len(file.getvalue())


@pytest.mark.parametrize("is_swapped", [False, True])
def test_a_part_saves_at_its_own_size(is_swapped):
    model = nn.Sequential(*[nn.Linear(200, 200) for _ in range(10)])
    ema = EMAManager(model, 0.1)
    if is_swapped:
        ema.swap()
    own = saved({"bias": torch.zeros(200)})
    for found in (dict(ema.named_emas()), ema.state_dict()["ema"], ema.state_dict()["raw"]):
        if found:
            assert saved({"bias": found["0.bias"]}) <= own + 64
            assert len(pickle.dumps(found["0.bias"])) < 2000
            assert saved(found) < 1.1 * saved(model.state_dict())


def test_what_is_handed_out_is_live_and_notices_a_write():
    model, ema = averaged()
    emas = dict(ema.named_emas())
    x = torch.randn(2, 4, requires_grad=True)
    loss = functional.linear(x, emas["weight"]).square().sum()
    with torch.no_grad():
        model.weight.add_(1)
    ema.update()
    assert torch.equal(emas["weight"], dict(ema.named_emas())["weight"])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_tied_averages_share_their_memory():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    emas = dict(EMAManager(model, 0.1).named_emas())
    storages = [emas[name].untyped_storage().data_ptr() for name in ("0.weight", "1.weight")]
    assert storages[0] == storages[1]
    sizes = [emas[name].untyped_storage().nbytes() for name in ("0.weight", "1.weight")]
    assert sizes == [36, 36]


def test_a_resume_with_a_new_buffer():
    _, ema = averaged()
    state = ema.state_dict()
    state["ema"]["gone"] = torch.zeros(2)
    state["ema_dtypes"]["gone"] = "float32"
    grown = nn.Linear(4, 4)
    grown.register_buffer("late", torch.full((2,), 7.0))
    other = EMAManager(grown, 0.5)
    with pytest.raises(ValueError, match=r"missing in 'ema': 'late'\n  surplus in 'ema': 'gone'"):
        other.load_state_dict(state)
    result = other.load_state_dict(state, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["late"], ["gone"])
    emas = dict(other.named_emas())
    assert torch.equal(emas["late"], grown.late)
    assert torch.equal(emas["weight"], dict(ema.named_emas())["weight"])
    assert (other.iteration, other.num_updates) == (1, 1)
    # What is wrong with what is there is an error still.
    state["ema"]["weight"] = torch.zeros(2, 2)
    with pytest.raises(ValueError, match="'weight' in 'ema' has shape"):
        other.load_state_dict(state, strict=False)


def test_a_swapped_state_with_a_new_buffer():
    model, ema = averaged()
    ema.swap()
    state = {k: dict(v) if isinstance(v, dict) else v for k, v in ema.state_dict().items()}
    grown = nn.Linear(4, 4)
    grown.register_buffer("late", torch.full((2,), 7.0))
    grown.load_state_dict(model.state_dict(), strict=False)
    other = EMAManager(grown, 0.5)
    assert other.load_state_dict(state, strict=False).missing_keys == ["late"]
    other.swap()
    assert torch.equal(grown.weight, state["raw"]["weight"])
    assert torch.equal(grown.late, torch.full((2,), 7.0))
    assert torch.equal(dict(other.named_emas())["weight"], state["ema"]["weight"])


def test_a_state_saved_while_swapped_and_loaded_in_place(tmp_path):
    _, ema = averaged()
    ema.swap()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of a single process.
        dcp.save({"ema": ema.state_dict()}, checkpoint_id=tmp_path)
        fresh = EMAManager(nn.Linear(4, 4), 0.5)
        state = {"ema": fresh.state_dict()}
        dcp.load(state, checkpoint_id=tmp_path)
    with pytest.raises(ValueError, match="the loader has written the averages in place") as error:
        fresh.load_state_dict(state["ema"])
    assert "nothing was changed" not in str(error.value)
    assert "dcp_to_torch_save" in str(error.value)
    emas = dict(fresh.named_emas())
    assert torch.equal(emas["weight"], dict(ema.named_emas())["weight"])


def test_tied_by_a_square_transposed_view():
    model = nn.Module()
    model.a = nn.Parameter(torch.randn(3, 3))
    model.b = nn.Parameter(model.a.detach().t())
    ema = EMAManager(model, 0.5)
    state = pickle.loads(pickle.dumps(ema.state_dict()))
    ema.load_state_dict(state)
    assert torch.equal(dict(ema.named_emas())["b"], model.a.detach().t())


@pytest.mark.parametrize(
    ("spoiled", "says"),
    [
        (lambda t: t.to("meta"), "is on the meta device and has no values"),
        (lambda t: t.to_sparse(), r"has layout torch\.sparse_coo"),
    ],
)
def test_a_state_with_values_that_are_not_there(spoiled, says):
    _, ema = averaged()
    state = {k: dict(v) if isinstance(v, dict) else v for k, v in ema.state_dict().items()}
    state["ema"] = {name: tensor + 1 for name, tensor in state["ema"].items()}
    state["ema"]["bias"] = spoiled(state["ema"]["bias"])
    before = {name: tensor.clone() for name, tensor in ema.named_emas()}
    with pytest.raises(ValueError, match=says):
        ema.load_state_dict(state)
    for name, tensor in ema.named_emas():
        assert torch.equal(tensor, before[name])


def test_errors_of_a_large_model_can_be_read():
    model = nn.ParameterDict({f"p{i}": torch.zeros(1) for i in range(500)})
    ema = EMAManager(model, 0.1)
    state = ema.state_dict()
    state["ema"] = {}
    with pytest.raises(ValueError, match=r"and 480 more$") as error:
        ema.load_state_dict(state)
    assert str(error.value).count("\n") == 21


# ---- units


def test_a_decay_instead_of_a_momentum():
    model = nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"no decay=0\.999 here; pass momentum=0\.001"):
        EMAManager(model, decay=0.999)
    says = r"keeps 0\.001 of the average; .* pass momentum=0\.001"
    with pytest.warns(UserWarning, match=says) as found:
        EMAManager(model, 0.999)
    # The line that made the manager, not the one that called this function.
    assert [linecache.getline(w.filename, w.lineno).strip() for w in found] == [
        "EMAManager(model, 0.999)"
    ]


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"device": "nonsense"}, ValueError, "device is 'nonsense': "),
        ({"device": 0.5}, ValueError, "device is 0.5: "),
        ({"device": "meta"}, ValueError, "device is 'meta', which holds no values; choose"),
        ({"exclude": None}, TypeError, "exclude is a NoneType; pass a pattern, or a list of them"),
        ({"include": 5}, TypeError, "include is a int; pass a pattern, or a list of them"),
    ],
)
def test_a_setting_of_another_kind(settings, error, says):
    with pytest.raises(error) as caught:
        EMAManager(nn.Linear(2, 2), **settings)
    assert str(caught.value).startswith(f"fused_ema.EMAManager: {says}")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_dtypes_that_torch_cannot_promote(dtype):
    model = nn.Linear(2, 2)
    ema = EMAManager(model)
    state = ema.state_dict()
    narrow = {name: tensor.to(dtype) for name, tensor in state["ema"].items()}
    state["ema_dtypes"] = {name: str(dtype)[6:] for name in narrow}
    with pytest.raises(ValueError, match=r"'weight' in 'ema' is float8_\w+ but is kept as float32"):
        ema.load_state_dict({**state, "ema": narrow})
    model.register_buffer("scale", torch.ones(2).to(dtype))
    with pytest.raises(TypeError, match=r"'scale' is torch\.float8_\w+ and its ema would be"):
        EMAManager(model, buffers="average")


def test_copy_to_an_unsigned_buffer():
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    model.register_buffer("n", torch.ones(2, dtype=torch.int32))
    other.register_buffer("n", torch.ones(2, dtype=torch.uint16))
    with pytest.raises(ValueError, match=r"'n' is torch.uint16 but its ema is torch.int32"):
        EMAManager(model).copy_to(other)


def test_plans_and_operations_warn_once(monkeypatch):
    monkeypatch.setattr(ops, "_warned", [])
    ema, params = [torch.zeros(2)], [torch.ones(2)]
    plan = fused_ema.Plan(ema, params)
    for call in (plan.update, lambda m: fused_ema.update_(ema, params, m)):
        call(1.0)  # A copy, which is no reason, and not the one warning either.
        with pytest.raises(ValueError, match=r"momentum is 9\b"):
            call(9.0)
        with pytest.warns(UserWarning, match=r"momentum is 0\.9, .* pass momentum=0\.1") as found:
            call(0.9)
        assert [warning.filename for warning in found] == [__file__]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            call(0.9)


@pytest.mark.parametrize("momentum", [0.5, 1.0, 0.001])
def test_no_warning_without_reason(monkeypatch, momentum):
    monkeypatch.setattr(ops, "_warned", [])
    model = nn.Linear(2, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused_ema.update_([torch.zeros(2)], [torch.ones(2)], momentum)
        fused_ema.Plan([torch.zeros(2)], [torch.ones(2)]).update(momentum)
        ema = EMAManager(model, momentum_fun=schedules.constant(0.9))
        ema.update()
    assert ema.num_updates == 1


# ---- while the model holds the average


def test_a_manager_is_not_made_of_another_ones_average():
    model, ema = averaged()
    view = nn.Linear(4, 4)
    view.weight = nn.Parameter(model.weight.detach())  # Another object over the same memory.
    other = EMAManager(view, 0.1)
    with ema.swapped():
        with pytest.raises(RuntimeError, match="EMAManager: 'weight' holds the ema of another"):
            EMAManager(model, 0.1)
        with pytest.raises(RuntimeError, match="update: 'weight' holds the ema of another"):
            other.update()
    other.update()


def test_swap_leaves_a_context_that_nobody_can_leave():
    model, ema = averaged()
    raw = model.weight.detach().clone()
    context = ema.swapped()
    context.__enter__()
    with pytest.raises(RuntimeError, match=r"leave swapped\(\) or call swap\(\) first"):
        ema.reset()
    ema.swap()
    assert torch.equal(model.weight, raw)
    ema.update()
    context.__exit__(None, None, None)
    assert torch.equal(model.weight, raw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ctrl_c_right_after_the_raw_weights_came_back(monkeypatch, dtype):
    model = nn.Linear(4, 4, dtype=dtype)
    ema = EMAManager(model, 0.5)
    with torch.no_grad():
        model.weight.add_(3)
    ema.update()
    raw, average = model.weight.detach().clone(), dict(ema.named_emas())["weight"].clone()
    exchange, calls = ema._exchange, []

    def interrupted(*args):
        exchange(*args)
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(ema, "_exchange", interrupted)
    with pytest.raises(KeyboardInterrupt), ema.swapped():
        pass
    assert not ema.is_swapped
    assert torch.equal(model.weight, raw)
    assert torch.equal(dict(ema.named_emas())["weight"], average)


def test_a_state_taken_inside_says_what_it_held():
    model, ema = averaged()
    raw = model.weight.detach().clone()
    average = dict(ema.named_emas())["weight"].clone()
    with ema.swapped():
        state = ema.state_dict()
    with torch.no_grad():
        model.weight.add_(1)
    ema.update()
    assert torch.equal(state["ema"]["weight"], average)
    assert torch.equal(state["raw"]["weight"], raw)
    ema.load_state_dict(state)
    ema.swap()
    assert torch.equal(model.weight, raw)
    assert torch.equal(dict(ema.named_emas())["weight"], average)


def test_a_model_that_is_rounded_inside_is_told_of():
    model, ema = averaged()
    says = "'weight', 'bias' were converted or moved"
    with pytest.warns(UserWarning, match=says), ema.swapped():
        model.half().float()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with ema.swapped():
            model.weight.data += 0


def test_layers_replaced_inside_are_told_of():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    ema = EMAManager(model, 0.5)
    says = "'0.weight', '0.bias' were replaced or removed"
    with pytest.warns(UserWarning, match=says), ema.swapped():
        model[0] = nn.Identity()


# ---- copy_to


def test_copy_to_a_model_that_cannot_hold_it():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model.register_buffer("floats", torch.full((2,), 0.7))
    model.register_buffer("count", torch.tensor(300))
    ema = EMAManager(model, 0.5)
    other = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    other[1].weight = other[0].weight
    other.register_buffer("floats", torch.zeros(2, dtype=torch.int64))
    other.register_buffer("count", torch.tensor(0, dtype=torch.int8))
    before = other[0].weight.detach().clone()
    with pytest.raises(ValueError, match="the model doesn't fit; nothing was changed") as error:
        ema.copy_to(other)
    text = str(error.value)
    assert "'floats' is torch.int64 but its ema is torch.float32" in text
    assert "'count' is torch.int8 but its ema is torch.int64" in text
    assert "'0.weight' and '1.weight' differ but are one tensor in the model" in text
    assert torch.equal(other[0].weight, before)
    with torch.inference_mode():
        made = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        made.register_buffer("floats", torch.zeros(2))
        made.register_buffer("count", torch.tensor(0))
    with pytest.raises(ValueError, match=r"'0.weight' was made in torch.inference_mode\(\)"):
        ema.copy_to(made)


# ---- in the manager's words


@pytest.mark.parametrize("op", ["update", "swap"])
def test_what_the_plan_finds_is_said_with_the_way_out(op):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    ema = EMAManager(model, 0.5)
    model[1].weight.data = model[0].weight.data
    with pytest.raises(ValueError, match=r"'0.weight' and '1.weight' share memory.*refresh\(\)"):
        getattr(ema, op)()
    ema.refresh()
    ema.update()


def test_a_dtype_that_does_not_fit_is_said_with_the_way_out():
    model = nn.Sequential(nn.Linear(2, 2))
    ema = EMAManager(model, 0.5)
    model.double()
    with pytest.raises(TypeError, match=r"'0.weight' is torch.float64 now .* refresh\(\)"):
        ema.update()
    ema.refresh()
    ema.update()


# ---- memory and time


def test_nothing_is_left_to_the_garbage_collector():
    def made():
        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        model.register_buffer("queue", torch.zeros(3))
        return model, EMAManager(model, 0.5)

    def assigned(model, ema):
        model.queue = model.queue + 1
        ema.update()

    def failed(model, ema):
        model[0] = nn.Linear(3, 3)
        with pytest.raises(RuntimeError):
            ema.update()
        ema.refresh()

    def hooked(model, ema):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ema.register_step_post_hook(optimizer)
        optimizer.step()

    def swapped(model, ema):
        with ema.swapped():
            pass
        ema.copy_to(model)
        ema.load_state_dict(ema.state_dict())

    def refreshed(model, ema):
        before = weakref.ref(model[0].weight), weakref.ref(ema._tracked.plan)
        other = EMAManager(nn.Linear(2, 2))
        with other.swapped():
            ema.update()
        model[0] = nn.Linear(2, 2)
        ema.refresh()
        assert [reference() is None for reference in before] == [True] * 2

    hooked(*made())  # The first optimizer imports more of torch, which leaves cycles of its own.
    gc.collect()
    gc.disable()
    try:
        for do in (lambda model, ema: ema.update(), assigned, hooked, swapped, failed, refreshed):
            model, ema = made()
            do(model, ema)
            held = [model, ema, model[0].weight, model.queue, ema._tracked.plan]
            held = [weakref.ref(thing) for thing in held]
            del model, ema
            assert [reference() is None for reference in held] == [True] * 5, do
        model, ema = made()
        queues = []
        for _ in range(5):
            queues.append(weakref.ref(model.queue))
            assigned(model, ema)
        assert [reference() is None for reference in queues] == [True] * 5
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["queue", "1.running_mean"])
def test_a_buffer_assigned_anew_is_followed_without_making_all_anew(monkeypatch, name):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model.register_buffer("queue", torch.zeros(3))
    ema = EMAManager(model, 0.5)
    plain = EMAManager(model, 0.5, include=["0.*"])
    module, _, key = name.rpartition(".")
    owner = model.get_submodule(module)

    def assign(step):
        setattr(owner, key, torch.full((3,), float(step + 1)))
        ema.update()
        plain.update()

    expected = getattr(owner, key).clone()
    assign(0)
    plans = [ema._tracked.plan]
    read = []
    monkeypatch.setattr(_tracking, "read", lambda model: read.append(model))
    for step in range(1, 4):
        assign(step)
        plans.append(ema._tracked.plan)
    for step in range(4):
        new = torch.full((3,), float(step + 1))
        expected = new if name == "queue" else expected.lerp(new, 0.5)
    assert torch.equal(dict(ema.named_emas())[name], expected)
    assert read == []
    assert len(set(map(id, plans))) == 1
    with ema.swapped():
        assert torch.equal(getattr(owner, key), expected)
    assert torch.equal(getattr(owner, key), new)


class Counting(nn.Module):
    """Assigns buffers of several kinds anew in every forward, as in evaluation."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("count", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("seen", torch.zeros(3))
        self.register_buffer("flags", torch.zeros(3, dtype=torch.bool))

    def forward(self, x):
        self.count, self.seen, self.flags = self.count + 1, self.seen + 0.5, ~self.flags
        return self.layer(x)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("buffers", ["auto", "average"])
def test_a_buffer_assigned_anew_in_inference_mode(buffers, mode):
    model, x = Counting(), torch.ones(1, 2)
    ema = EMAManager(model, 0.5, buffers=buffers)
    with mode():
        model(x)
    ema.update()
    raw = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    emas = {name: tensor.clone() for name, tensor in ema.named_emas()}
    assert emas["seen"].tolist() == [0.25 if buffers == "average" else 0.5] * 3
    for _ in range(2):
        with ema.swapped():
            for name, tensor in model.state_dict().items():
                assert torch.equal(tensor, emas[name]), name
            with mode():
                model(x)
        emas["count"] += 1
        emas["seen"] += 0.5
        emas["flags"].logical_not_()
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, raw[name]), name
        for name, tensor in ema.named_emas():
            assert torch.equal(tensor, emas[name]), name
    assert not torch.is_inference_mode_enabled()
    ema.update()
    weight = dict(ema.named_emas())["layer.weight"]
    assert torch.equal(weight, emas["layer.weight"].lerp(model.layer.weight.detach(), 0.5))


def test_a_buffer_that_is_a_conjugate_is_swapped():
    model = nn.Linear(2, 2)
    model.register_buffer("twiddle", torch.tensor([1 + 2j, 3 - 4j]).conj())
    ema = EMAManager(model, 0.5)
    with torch.no_grad():
        model.twiddle.add_(1)
    raw, average = model.twiddle.clone(), dict(ema.named_emas())["twiddle"].clone()
    assert not torch.equal(raw, average)
    with ema.swapped():
        assert torch.equal(model.twiddle, average)
        assert torch.equal(dict(ema.named_emas())["twiddle"], average)
    assert torch.equal(model.twiddle, raw)
    assert torch.equal(dict(ema.named_emas())["twiddle"], average)


def test_a_model_laid_anew_keeps_its_kernels():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    ema = EMAManager(model, 0.5)
    model.to(memory_format=torch.channels_last)
    expected = {name: tensor.clone() for name, tensor in ema.named_emas()}
    for step in range(3):
        with torch.no_grad():
            model[0].weight.add_(step)
        ema.update()
        for name, parameter in model.named_parameters():
            expected[name].lerp_(parameter.detach(), 0.5)
    emas = dict(ema.named_emas())
    for name, parameter in model.named_parameters():
        assert emas[name].stride() == parameter.stride()
        assert_bits_equal(emas[name].contiguous(), expected[name].contiguous(), name)
    assert len(ema._tracked.plan.describe()) == 1


def test_refresh_keeps_the_memory_of_what_is_the_same():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    ema = EMAManager(model, 0.5)
    with torch.no_grad():
        model[0].weight.add_(1)
    ema.update()
    before = dict(ema.named_emas())
    values = {name: tensor.clone() for name, tensor in before.items()}
    model[1] = nn.Linear(4, 2)
    assert ema.refresh() == ["1.weight", "1.bias"]
    after = dict(ema.named_emas())
    for name in ("0.weight", "0.bias"):
        assert after[name].data_ptr() == before[name].data_ptr()
        assert torch.equal(after[name], values[name])
    assert torch.equal(after["1.weight"], model[1].weight)


def test_untied_tensors_do_not_share_an_average():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    ema = EMAManager(model, 0.5)
    kept = dict(ema.named_emas())["0.weight"].clone()
    model[1].weight = nn.Parameter(model[0].weight.detach() + 4)
    assert ema.refresh() == []
    emas = dict(ema.named_emas())
    assert torch.equal(emas["0.weight"], kept)
    assert torch.equal(emas["1.weight"], kept)
    ema.update()
    emas = dict(ema.named_emas())
    assert torch.equal(emas["0.weight"], kept)
    assert torch.equal(emas["1.weight"], kept.lerp(model[1].weight, 0.5))


def test_the_default_device_does_not_matter():
    model, ema = averaged()
    before = torch.get_default_device()
    torch.set_default_device("meta")
    try:
        ema.update()
        EMAManager(model, 0.5).update()
        with ema.swapped():
            pass
        ema.refresh()
        ema.load_state_dict(ema.state_dict())
    finally:
        torch.set_default_device(before)


# ---- names, codes and what modules keep beside their tensors


def test_names_without_the_wrappers_of_frameworks():
    class _FabricModule(nn.Module):
        def __init__(self, module):
            super().__init__()
            self._forward_module = nn.DataParallel(module)
            self._original_module = module

    class GradSampleModule(nn.Module):
        def __init__(self, module):
            super().__init__()
            self._module = module

    class DeepSpeedEngine(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    class Own(nn.Module):
        def __init__(self, module):
            super().__init__()
            self._module = self.module = module

    for wrapper in (_FabricModule, GradSampleModule, DeepSpeedEngine):
        model = nn.Linear(2, 2)
        ema = EMAManager(wrapper(model), 0.5)
        assert [name for name, _ in ema.named_emas()] == ["weight", "bias"], wrapper
        ema.update()
        ema.copy_to(nn.Linear(2, 2))
    names = [name for name, _ in EMAManager(Own(nn.Linear(2, 2)), 0.5).named_emas()]
    assert names == ["_module.weight", "_module.bias", "module.weight", "module.bias"]


class Codes(nn.Parameter):
    """As a parameter of bitsandbytes: codes, and beside them what decodes them."""

    __module__ = "bitsandbytes.nn.modules"

    def __new__(cls, data, requires_grad=False):
        return torch.Tensor._make_subclass(cls, data, requires_grad)


def test_quantised_parameters():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    ema = EMAManager(model, 0.5)
    quantised = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    quantised[0].weight = Codes(torch.arange(4, dtype=torch.uint8).view(2, 2))
    assert "0.weight" not in dict(EMAManager(quantised, 0.5).named_emas())
    before = quantised[1].weight.detach().clone()
    with pytest.raises(ValueError, match=r"'0.weight' is quantised there \(Codes\)"):
        ema.copy_to(quantised)
    assert torch.equal(quantised[1].weight, before)
    quantised[0].weight = Codes(torch.ones(2, 2), requires_grad=True)
    with pytest.raises(TypeError, match=r"'0.weight' is quantised \(Codes\) and trained"):
        EMAManager(quantised, 0.5)
    assert "1.weight" in dict(EMAManager(quantised, 0.5, exclude="0.weight").named_emas())


class Scaled(nn.Linear):
    scale = 1.0

    def get_extra_state(self):
        return torch.tensor(self.scale)

    def set_extra_state(self, state):
        self.scale = float(state)


def test_extra_state_goes_with_the_average():
    model = nn.Sequential(Scaled(2, 2))
    ema = EMAManager(model, 0.5)
    model[0].scale = 3.0
    other = nn.Sequential(Scaled(2, 2))
    ema.copy_to(other)
    assert other[0].scale == 3.0
    plain = nn.Sequential(nn.Linear(2, 2))
    before = plain[0].weight.detach().clone()
    with pytest.raises(ValueError, match="the module '0' has extra state"):
        ema.copy_to(plain)
    assert torch.equal(plain[0].weight, before)
    ema.copy_to(model)
    assert model[0].scale == 3.0


def test_extra_state_that_is_not_taken_leaves_the_weights(monkeypatch):
    model, other = nn.Sequential(Scaled(2, 2)), nn.Sequential(Scaled(2, 2))
    before = other[0].weight.detach().clone()

    def refuse(self, state):
        raise RuntimeError("no scale")

    monkeypatch.setattr(Scaled, "set_extra_state", refuse)
    with pytest.raises(RuntimeError, match="no scale"):
        EMAManager(model, 0.5).copy_to(other)
    assert torch.equal(other[0].weight, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_computed_inside_belong_to_the_average(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)).to(dtype)
    ema = EMAManager(model, 0.1)
    ema.update()
    kept = dict(ema.named_emas())["0.weight"].clone()
    raw = model[1].running_mean.clone()
    data = [torch.randn(16, 4).to(dtype) + 3 for _ in range(5)]
    with ema.swapped():
        update_bn(data, model)
        inside = model[1].running_mean.clone()
    assert torch.equal(model[1].running_mean, raw)
    assert torch.equal(dict(ema.named_emas())["1.running_mean"], inside.float())
    assert torch.equal(dict(ema.named_emas())["0.weight"], kept)
    with ema.swapped():
        assert torch.equal(model[1].running_mean, inside)


def test_a_momentum_of_one_is_told_the_way():
    with pytest.raises(ValueError, match=r"momentum_fun=fused_ema\.schedules\.constant\(1\.0\)"):
        EMAManager(nn.Linear(2, 2), 1.0)


def test_debiased_is_the_average_that_starts_from_zeros():
    model = nn.Linear(2, 2, bias=False).double()
    ema = EMAManager(model, momentum_fun=schedules.debiased(0.1))
    zeros = torch.zeros(2, 2, dtype=torch.float64)
    for step in range(1, 30):
        with torch.no_grad():
            model.weight.copy_(torch.randn(2, 2))
        ema.update()
        zeros.lerp_(model.weight.detach(), 0.1)
        corrected = zeros / (1 - 0.9**step)
        torch.testing.assert_close(dict(ema.named_emas())["weight"], corrected)
