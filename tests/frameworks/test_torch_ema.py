"""hooks.torch_ema beside torch_ema: no further from float64, the same states and surface."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import torch_ema
from params import assert_lists, copies, make_params, move, saved
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fused_ema import _storage
from fused_ema.hooks import _shadow
from fused_ema.hooks.torch_ema import ExponentialMovingAverage
from fused_ema.testing import ROUNDINGS

Theirs = torch_ema.ExponentialMovingAverage

# ---- the values


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("use_num_updates", [False, True])
@pytest.mark.parametrize("pair", [(d, d) for d in ROUNDINGS] + [(torch.float32, torch.bfloat16)])
def test_no_further_from_float64_than_torch_ema(backend, decay, use_num_updates, pair):
    params = make_params(pair[1])
    ours = ExponentialMovingAverage(params, decay, use_num_updates)
    theirs = Theirs(params, decay, use_num_updates)
    for ema in (ours, theirs):
        ema.to(dtype=pair[0])
    our_error = their_error = 0.0
    for step in range(8):
        move(params, step)
        # One step from the same average: errors don't add up.
        before = [s.double().clone() for s in ours.shadow_params]
        for s, t in zip(ours.shadow_params, theirs.shadow_params, strict=True):
            t.copy_(s)
        ours.update()
        theirs.update()
        assert ours.num_updates == theirs.num_updates
        d = min(decay, (2 + step) / (11 + step)) if use_num_updates else decay
        for e, p, s, t in zip(
            before, params, ours.shadow_params, theirs.shadow_params, strict=True
        ):
            exact = d * e + (1 - d) * p.detach().double()
            our_error += (s.double() - exact).abs().sum().item()
            their_error += (t.double() - exact).abs().sum().item()
            assert (s.dtype, s.shape, s.stride()) == (t.dtype, t.shape, t.stride())
            tolerance = 4 * ROUNDINGS[s.dtype] * (e.abs() + p.detach().double().abs())
            assert ((s.double() - exact).abs() <= tolerance + 1e-7 * (s.dtype.itemsize < 4)).all()
    if pair[0] != torch.float64:  # Nothing here is more exact.
        assert our_error <= their_error


def test_in_a_training_run():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    ours = ExponentialMovingAverage(model.parameters(), decay=0.9)
    theirs = Theirs(model.parameters(), decay=0.9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x = torch.randn(16, 4)
    for step in range(12):
        model(x).sub(1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ours.update()
        theirs.update(model.parameters())
        if step % 4 == 3:
            raw = copies(model.parameters())
            with ours.average_parameters():
                found = model(x)
            assert_lists(copies(model.parameters()), raw)
            with theirs.average_parameters():
                torch.testing.assert_close(found, model(x))
            assert not torch.equal(found, model(x))


@pytest.mark.parametrize("to", [{"dtype": torch.float64}, {"dtype": torch.bfloat16}, {}])
def test_other_dtypes_of_the_averages(to):
    params = make_params()
    params.append(nn.Parameter(torch.arange(3), requires_grad=False))
    ours, theirs = ExponentialMovingAverage(params, 0.9), Theirs(params[:-1], 0.9)
    ours.store()
    ours.to("cpu", **to)
    theirs.to("cpu", **to)
    with torch.no_grad():
        params[-1].add_(2)
    move(params[:-1], 1)
    ours.update()
    theirs.update()
    assert torch.equal(ours.shadow_params[-1], torch.arange(2, 5))
    assert ours.collected_params[-1].dtype == torch.int64
    for s, t, c in zip(
        ours.shadow_params, theirs.shadow_params, ours.collected_params, strict=False
    ):
        assert s.dtype == c.dtype == to.get("dtype", torch.float32)
        torch.testing.assert_close(s, t)


# ---- copies, what is stored, and what is swapped


@pytest.mark.parametrize("shadow_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_store_copy_to_and_restore(shadow_dtype):
    results = []
    for make in (ExponentialMovingAverage, Theirs):
        params = make_params()
        ema = make(params, 0.5)
        ema.to(dtype=shadow_dtype)
        move(params, 1)
        assert ema.collected_params is None
        with pytest.raises(RuntimeError, match=r"store\(\)"):
            ema.restore()
        ema.store()
        kept = copies(ema.collected_params)
        ema.copy_to()
        averaged = copies(params)
        move(params, 2)
        ema.restore()
        other = make_params(torch.float64)
        ema.restore(other)  # It is kept on.
        results.append([*kept, *averaged, *copies(params), *copies(other)])
    assert_lists(*results)


@pytest.mark.parametrize("shadow_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["leaves", "raises", "given"])
def test_average_parameters(shadow_dtype, dtype, how):
    results = []
    for make in (ExponentialMovingAverage, Theirs):
        params = make_params(dtype)
        ema = make(params, 0.0, use_num_updates=False)
        ema.to(dtype=shadow_dtype)
        move(params, 1)
        given = params if how != "given" else make_params(dtype, seed=9)
        before = copies(ema.shadow_params)
        try:
            with ema.average_parameters(None if how != "given" else iter(given)):
                inside = copies(given)
                state = ema.state_dict()
                assert_lists(state["shadow_params"], before)
                results.append([*inside, *copies(state["collected_params"])])
                if how == "raises":
                    raise KeyError
        except KeyError:
            pass
        results[-1] += [*copies(given), *copies(ema.shadow_params)]
        assert_lists(copies(ema.shadow_params), before)
    assert_lists(*results)


def test_average_parameters_leaves_what_is_stored_alone():
    params = make_params()
    ema = ExponentialMovingAverage(params, 0.5)
    ema.store()
    kept = copies(ema.collected_params)
    move(params, 1)
    with ema.average_parameters():
        pass
    assert_lists(ema.collected_params, kept)


def test_a_tied_parameter_given_twice_comes_back():
    params = make_params()
    params.append(params[0])
    ema = ExponentialMovingAverage(params, 0.5)
    move(params, 1)
    raw, averages = copies(params), copies(ema.shadow_params)
    with ema.average_parameters():
        assert_lists(copies(params), averages)
    assert_lists(copies(params), raw)
    assert_lists(ema.shadow_params, averages)


@pytest.mark.parametrize("convert", [torch.float64, torch.bfloat16])
def test_parameters_that_move_while_they_hold_the_averages(convert):
    params = make_params()
    ema = ExponentialMovingAverage(params, 0.5)
    move(params, 1)
    raw, averages = copies(params), copies(ema.shadow_params)
    with ema.average_parameters():
        for p in params:
            p.data = p.data.to(convert)
    assert_lists(ema.shadow_params, averages)
    assert_lists(copies(params), [r.to(convert) for r in raw])


@pytest.mark.parametrize("when", ["entering", "leaving"])
def test_an_interrupt_while_swapping(monkeypatch, when):
    params = make_params()
    ema = ExponentialMovingAverage(params, 0.5)
    move(params, 1)
    raw, averages = copies(params), copies(ema.shadow_params)
    run, calls = _storage.Exchange.run, []

    def interrupted(self):
        run(self)
        calls.append(1)
        if len(calls) == (1 if when == "entering" else 2):
            raise KeyboardInterrupt

    monkeypatch.setattr(_storage.Exchange, "run", interrupted)
    with pytest.raises(KeyboardInterrupt), ema.average_parameters():
        pass
    assert_lists(copies(params), raw)
    assert_lists(ema.shadow_params, averages)
    ema.update()


CALLS = {
    "update": lambda e: e.update(),
    "store": lambda e: e.store(),
    "restore": lambda e: e.restore(),
    "to": lambda e: e.to(dtype=torch.float64),
    "load_state_dict": lambda e: e.load_state_dict(copy.deepcopy(e.state_dict())),
    "average_parameters": lambda e: e.average_parameters().__enter__(),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_can_t_be_done_while_swapped(call):
    params = make_params()
    ema = ExponentialMovingAverage(params, 0.5)
    ema.store()
    move(params, 1)
    raw, averages = copies(params), copies(ema.shadow_params)
    with ema.average_parameters():
        with pytest.raises(RuntimeError, match=rf"\.{call}: the parameters hold the averages"):
            CALLS[call](ema)
        ema.copy_to()  # They have them already.
        other = make_params(seed=5)
        ema.copy_to(other)
        assert_lists(copies(other), averages)
    assert_lists(copies(params), raw)
    assert_lists(ema.shadow_params, averages)


class Allocations(TorchDispatchMode):
    """Sums up the memory of tensors that operations return."""

    def __init__(self, known):
        super().__init__()
        self.seen = {t.untyped_storage().data_ptr() for t in known}
        self.num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.seen:
                self.num_bytes += t.untyped_storage().nbytes()
        return out


def allocated(params, ema, run):
    with Allocations([*params, *ema.shadow_params]) as mode:
        run()
    return mode.num_bytes


def swap_in_and_out(ema):
    with ema.average_parameters():
        pass


def copy_in(ema):
    ema.copy_to()


@pytest.mark.parametrize("run", [lambda e: e.update(), copy_in, swap_in_and_out])
def test_no_temporary_memory(run):
    params = make_params()
    num_bytes = sum(p.numel() * p.element_size() for p in params)
    ours, theirs = ExponentialMovingAverage(params, 0.5), Theirs(params, 0.5)
    run(ours)
    assert allocated(params, ours, lambda: run(ours)) < 64
    if run is not copy_in:
        assert allocated(params, theirs, lambda: run(theirs)) >= num_bytes


# ---- states


@pytest.mark.parametrize("source", [ExponentialMovingAverage, Theirs])
@pytest.mark.parametrize("target", [ExponentialMovingAverage, Theirs])
@pytest.mark.parametrize("use_num_updates", [False, True])
@pytest.mark.parametrize("stored", [False, True])
def test_states_go_both_ways(source, target, use_num_updates, stored):
    params = make_params()
    ema = source(params, 0.9, use_num_updates)
    for step in range(3):
        move(params, step)
        ema.update()
    if stored:
        ema.store()
    taken = target(params, 0.5)
    taken.load_state_dict(saved(ema.state_dict()))
    assert list(taken.state_dict()) == list(ema.state_dict())
    assert (taken.decay, taken.num_updates) == (ema.decay, ema.num_updates)
    assert_lists(taken.shadow_params, ema.shadow_params)
    assert (taken.collected_params is None) is not stored
    if stored:
        assert_lists(copies(taken.collected_params), copies(ema.collected_params))
    # Copies: what happens to one doesn't reach the other.
    before = copies(taken.shadow_params)
    move(params, 9)
    ema.update()
    assert_lists(taken.shadow_params, before)


@pytest.mark.parametrize("dtype", ROUNDINGS)
@pytest.mark.parametrize("moment", ["plain", "stored", "swapped"])
def test_a_run_goes_on_from_a_state_bit_for_bit(dtype, moment):
    def run(resumed_from=None):
        params, state = make_params(dtype), None
        ema, first = ExponentialMovingAverage(params, 0.9), 0
        if resumed_from is not None:
            weights, loaded, first = resumed_from
            with torch.no_grad():
                for p, w in zip(params, weights, strict=True):
                    p.copy_(w)
            ema.load_state_dict(loaded)
            if moment == "swapped":
                ema.restore()  # The weights in the file are averages.
        for step in range(first, 8):
            move(params, step)
            ema.update()
            if step == 4:
                if moment == "stored":
                    ema.store()
                if moment == "swapped":
                    with ema.average_parameters():
                        state = saved((copies(params), ema.state_dict(), step + 1))
                else:
                    state = saved((copies(params), ema.state_dict(), step + 1))
        return params, ema, state

    params, ema, state = run()
    again, taken, _ = run(state)
    assert_lists(copies(again), copies(params))
    assert_lists(taken.shadow_params, ema.shadow_params)
    assert taken.num_updates == ema.num_updates == 8
    if moment == "stored":
        assert_lists(taken.collected_params, ema.collected_params)


def test_float32_averages_of_narrow_parameters_are_kept_by_loading():
    params = make_params(torch.bfloat16)
    ema, theirs = ExponentialMovingAverage(params, 0.9), Theirs(params, 0.9)
    ema.to(dtype=torch.float32)
    move(params, 1)
    ema.update()
    taken = ExponentialMovingAverage(params, 0.9)
    taken.load_state_dict(saved(ema.state_dict()))
    assert_lists(taken.shadow_params, ema.shadow_params)
    theirs.load_state_dict(saved(ema.state_dict()))
    assert theirs.shadow_params[0].dtype == torch.bfloat16
    # And where the narrower one is in the file.
    taken.load_state_dict(saved(theirs.state_dict()))
    assert_lists(taken.shadow_params, [s.float() for s in theirs.shadow_params])


def test_a_copy_of_the_object_is_apart():
    params = make_params()
    ema = ExponentialMovingAverage(params, 0.9)
    copied = copy.deepcopy(ema)
    move(params, 1)
    before = copies(copied.shadow_params)
    ema.update()
    assert_lists(copied.shadow_params, before)


def test_it_holds_no_parameters():
    params = make_params()
    gone = weakref.ref(params[0])
    ema = ExponentialMovingAverage(params, 0.9)
    move(params, 1)
    ema.update()
    with ema.average_parameters():
        pass
    ema.copy_to()
    kept, params = params[1:], None
    gc.collect()
    assert gone() is None
    with pytest.raises(ValueError, match=r"1 of the 6 parameters no longer exist"):
        ema.update()
    ema.update(make_params())
    # A state can be loaded without them, as with torch_ema.
    ema.load_state_dict(saved(ema.state_dict()))
    assert len(kept) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("at", ["_exchange", "_copy_in_order"])
def test_ctrl_c_right_after_the_values_came_back(monkeypatch, at, dtype):
    params = make_params()
    ema = ExponentialMovingAverage(params, 0.5)
    ema.to(dtype=dtype)  # The wider ones are set aside.
    move(params, 1)
    ema.update()
    raw, averages = copies(params), copies(ema.shadow_params)
    owner = _shadow._Swap if at == "_exchange" else _shadow
    call, calls = getattr(owner, at), []

    def interrupted(*args):
        call(*args)
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(owner, at, interrupted)
    with pytest.raises(KeyboardInterrupt), ema.average_parameters():
        pass
    assert_lists(params, raw)
    assert_lists(ema.shadow_params, averages)


# ---- bad input


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan")])
def test_a_decay_out_of_range(decay):
    with pytest.raises(ValueError, match="it is the weight of the old value"):
        ExponentialMovingAverage(make_params(), decay)


def test_iterators_that_are_used_up():
    params = make_params()
    iterator = iter(params)
    ema = ExponentialMovingAverage(iterator, 0.9)
    ema.update(p for p in params)
    for call in (ema.update, ema.copy_to, ema.store, ema.restore):
        with pytest.raises(ValueError, match="holds 0 tensors but 6 are averaged"):
            call(iterator)
    with pytest.raises(ValueError, match="holds 0 tensors"), ema.average_parameters(iterator):
        pass
    with pytest.raises(ValueError, match="there are no parameters"):
        ExponentialMovingAverage(iterator, 0.9)
    assert ema.num_updates == 1


@pytest.mark.parametrize("wrong", [nn.Linear(2, 2), torch.ones(2), 3, ["a"], [1.0]])
def test_what_is_no_list_of_tensors(wrong):
    with pytest.raises(TypeError, match=r"parameters(\[0\])? is a "):
        ExponentialMovingAverage(wrong, 0.9)
    with pytest.raises(TypeError, match=r"parameters(\[0\])? is a "):
        ExponentialMovingAverage(make_params(), 0.9).update(wrong)


def test_parameters_of_another_model_change_nothing():
    params = make_params()
    ema = ExponentialMovingAverage(params, 0.9)
    other = make_params()
    other[1] = nn.Parameter(torch.ones(1))  # Would be broadcast.
    other[3] = nn.Parameter(torch.ones(3))
    before = copies(ema.shadow_params)
    for call in (ema.update, ema.copy_to, ema.store):
        with pytest.raises(ValueError, match=r"\[1\] has shape \[1\].*\[\]\n.*\[3\] has shape"):
            call(other)
    assert_lists(ema.shadow_params, before)
    assert ema.num_updates == 0
    assert ema.collected_params is None


BAD_STATES = {
    "no dictionary": (lambda s: [], TypeError, "is a list; pass a dictionary"),
    "nothing": (lambda s: {}, ValueError, "decay, num_updates, .* missing.*nothing"),
    "decay": (lambda s: {**s, "decay": 2}, ValueError, "decay is 2"),
    "num_updates": (lambda s: {**s, "num_updates": -1}, ValueError, "num_updates is -1"),
    "no tensors": (lambda s: {**s, "shadow_params": [1]}, ValueError, "'shadow_params' is a list"),
    "fewer": (
        lambda s: {**s, "shadow_params": s["shadow_params"][1:]},
        ValueError,
        "holds 5 tensors but 6",
    ),
    "shapes": (
        lambda s: {**s, "shadow_params": [torch.ones(2)] * 6},
        ValueError,
        r"shadow_params\[0\] has shape \[2\](.|\n)*shadow_params\[5\]",
    ),
    "kinds": (
        lambda s: {**s, "shadow_params": [t.long() for t in s["shadow_params"]]},
        ValueError,
        r"shadow_params\[0\] is torch.int64 but torch.float32 here",
    ),
    "stored": (
        lambda s: {**s, "collected_params": s["shadow_params"][1:]},
        ValueError,
        "collected_params holds 5 tensors but 6",
    ),
}


@pytest.mark.parametrize("bad", BAD_STATES)
def test_a_state_that_does_not_fit_changes_nothing(bad):
    change, error, message = BAD_STATES[bad]
    params = make_params()
    ema = ExponentialMovingAverage(params, 0.9)
    move(params, 1)
    ema.update()
    state = copy.deepcopy(ema.state_dict())
    before = copies(ema.shadow_params)
    state["decay"], state["num_updates"] = 0.1, 77
    with pytest.raises(error, match=message):
        ema.load_state_dict(change(state))
    assert_lists(ema.shadow_params, before)
    assert (ema.decay, ema.num_updates, ema.collected_params) == (0.9, 1, None)
