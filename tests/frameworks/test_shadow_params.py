"""What hooks.torch_ema and hooks.diffusers share: lists, attributes, copies; as the originals."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch_ema
from diffusers.training_utils import EMAModel as TheirEMAModel
from params import assert_lists, copies, make_params, move
from torch import nn

from fused_ema.hooks.diffusers import EMAModel
from fused_ema.hooks.torch_ema import ExponentialMovingAverage

TheirExponentialMovingAverage = torch_ema.ExponentialMovingAverage


class Both:
    """A drop-in and its original, each with parameters of its own, called alike."""

    def __init__(self, name, make=make_params):
        ours, theirs, self.update, self.stored = {
            "torch_ema": (
                lambda p: ExponentialMovingAverage(p, 0.9),
                lambda p: TheirExponentialMovingAverage(p, 0.9),
                "update",
                "collected_params",
            ),
            "diffusers": (EMAModel, TheirEMAModel, "step", "temp_stored_params"),
        }[name]
        self.params = make(), make()
        self.emas = ours(self.params[0]), theirs(self.params[1])

    def call(self, name, *args):
        for ema, params in zip(self.emas, self.params, strict=True):
            getattr(ema, self.update if name == "update" else name)(params, *args)

    def move(self, seed):
        for params in self.params:
            move(list({id(p): p for p in params}.values()), seed)

    def each(self, change):
        for ema, params in zip(self.emas, self.params, strict=True):
            change(ema, params)

    def agree(self):
        (ours, theirs), (our_params, their_params) = self.emas, self.params
        lists = [(ours.shadow_params, theirs.shadow_params), (our_params, their_params)]
        if getattr(theirs, self.stored) is not None:
            lists.append((getattr(ours, self.stored), getattr(theirs, self.stored)))
        for a, b in lists:
            torch.testing.assert_close(copies(a), copies(b), rtol=1e-5, atol=1e-3)


NAMES = ["torch_ema", "diffusers"]


def twice():
    params = make_params()
    return [*params, params[0], params[4]]


def share(ema, params):
    """A list of averages that holds some twice, and one that is a parameter itself."""
    ema.shadow_params[-1], ema.shadow_params[-2] = ema.shadow_params[4], ema.shadow_params[0]
    ema.shadow_params[5] = params[5].detach()


CALLS = {
    "copy_to": lambda b: b.call("copy_to"),
    "store and restore": lambda b: (b.call("store"), b.move(7), b.agree(), b.call("restore")),
    "a state": lambda b: b.each(
        lambda e, p: e.load_state_dict({**copy.deepcopy(e.state_dict()), "decay": 0.5})
    ),
    "another dtype": lambda b: b.each(lambda e, p: e.to(dtype=torch.float64)),
    "a copy": lambda b: setattr(b, "emas", copy.deepcopy(b.emas)),
    "a frozen one": lambda b: b.each(lambda e, p: p[0].requires_grad_(False)),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("change", [None, share])
@pytest.mark.parametrize("name", NAMES)
def test_lists_that_hold_a_tensor_twice(backend, name, change, call):
    both = Both(name, twice)
    if change is not None:
        both.each(change)
    for step in range(3):
        both.move(step)
        both.call("update")
        both.agree()
    CALLS[call](both)
    both.agree()
    for step in range(3, 6):
        both.move(step)
        both.call("update")
        both.agree()
    both.call("copy_to")
    both.agree()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("name", NAMES)
def test_complex_parameters_are_averaged(backend, name, dtype):
    def make():
        first = torch.tensor([[1 + 2j, 3 - 4j], [0.5j, -7 + 0j]], dtype=dtype)
        return [nn.Parameter(first), nn.Parameter(first.t() + 1, requires_grad=False)]

    both = Both(name, make)
    for step in range(4):
        for params in both.params:
            with torch.no_grad():
                for p in params:
                    p.mul_(1 + 1j * step).add_(step)
        both.call("update")
        both.agree()
    assert not torch.equal(both.emas[0].shadow_params[0], both.params[0][0])
    real = [p.detach().real.clone() for p in both.params[0]]
    both = Both(name, lambda: real)
    before = copies(both.emas[0].shadow_params)
    with pytest.raises(TypeError, match=r"parameters\[1\] is torch.complex\d+ but its average is"):
        getattr(both.emas[0], both.update)([real[0], make()[1]])
    assert_lists(both.emas[0].shadow_params, before)


@pytest.mark.parametrize("change", [None, share])
def test_averages_that_are_given_twice_are_in_the_parameters_and_come_back(backend, change):
    both = Both("torch_ema", twice)
    if change is not None:
        both.each(change)
    both.move(1)
    both.call("update")
    raw = copies(both.params[0])
    contexts = [e.average_parameters() for e in both.emas]
    for context in contexts:
        context.__enter__()
    both.agree()
    for context in contexts:
        context.__exit__(None, None, None)
    torch.testing.assert_close(copies(both.params[0]), raw)
    both.each(lambda e, p: setattr(e, "collected_params", None))
    both.agree()
    both.move(2)
    both.call("update")
    both.agree()


def test_a_decay_outside_of_its_range_is_no_reason_to_go_on(backend):
    ema = ExponentialMovingAverage(twice(), 0.9)
    share(ema, make_params())
    before = copies(ema.shadow_params)
    ema.decay, ema.num_updates = 1.5, None
    with pytest.raises(ValueError, match=r"decay is 1\.5"):
        ema.update(twice())
    assert_lists(ema.shadow_params, before)


# ---- attributes


@pytest.mark.parametrize("name", NAMES)
def test_lists_can_be_assigned(backend, name):
    both = Both(name)
    given = []

    def assign(ema, params):
        listed = [torch.full_like(s, 0.5) for s in ema.shadow_params]
        ema.shadow_params = listed
        assert ema.shadow_params is listed
        given.append(listed)
        setattr(ema, both.stored, [torch.full_like(s, 2.0) for s in ema.shadow_params])

    both.each(assign)
    for step in range(3):
        both.move(step)
        both.call("update")
        both.agree()
    # They are averaged in place.
    torch.testing.assert_close(*[copies(g) for g in given], rtol=1e-5, atol=1e-3)
    assert not torch.equal(given[0][0], torch.full_like(given[0][0], 0.5))
    both.call("restore")
    both.agree()
    assert torch.equal(both.params[0][0], torch.full_like(both.params[0][0], 2.0))
    both.each(lambda e, p: setattr(e, both.stored, None))
    for ema, params in zip(both.emas, both.params, strict=True):
        with pytest.raises(RuntimeError, match=r"store"):
            ema.restore(params)
    # An iterator too; another dtype is taken as it is.
    ours = both.emas[0]
    ours.shadow_params = (s.double() for s in ours.shadow_params)
    assert {s.dtype for s in ours.shadow_params} == {torch.float64}
    ours_before = copies(ours.shadow_params)
    getattr(ours, both.update)(both.params[0])
    assert not torch.equal(ours.shadow_params[0], ours_before[0])


@pytest.mark.parametrize("name", NAMES)
def test_lists_that_don_t_fit_are_not_assigned(name):
    both = Both(name)
    ours, params = both.emas[0], both.params[0]
    kept = ours.shadow_params
    for attribute in ("shadow_params", both.stored):
        for given, error, message in (
            (kept[1:], ValueError, rf"{attribute} holds 5 tensors but 6 are averaged"),
            ([torch.zeros(2), *kept[1:]], ValueError, rf"{attribute}\[0\] has shape \[2\] but its"),
            ([1, *kept[1:]], TypeError, rf"{attribute}\[0\] is a int; pass tensors only"),
            (nn.Linear(1, 1), TypeError, rf"{attribute} is a Linear; pass an iterable of tensors"),
        ):
            with pytest.raises(error, match=message):
                setattr(ours, attribute, given)
    with pytest.raises(TypeError, match="shadow_params is a NoneType"):
        ours.shadow_params = None
    arguments = () if name == "torch_ema" else (params,)
    with ours.average_parameters(*arguments):
        for attribute in ("shadow_params", both.stored):
            with pytest.raises(RuntimeError, match=rf"\.{attribute}: the parameters hold the aver"):
                setattr(ours, attribute, kept)
    assert ours.shadow_params is kept
    assert getattr(ours, both.stored) is None


# ---- copies and pickles


def through_pickle(ema):
    return pickle.loads(pickle.dumps(ema))


def through_a_file(ema):
    file = io.BytesIO()
    torch.save(ema, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", [copy.deepcopy, through_pickle, through_a_file])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stored", [False, True])
def test_a_copy_goes_on_as_the_object(backend, way, name, stored):
    both = Both(name)
    ours, params = both.emas[0], both.params[0]
    for step in range(3):
        both.move(step)
        both.call("update")
    if stored:
        both.call("store")
    before = copies(ours.shadow_params)
    copied = way(ours)
    assert_lists(copied.shadow_params, before)
    assert (getattr(copied, both.stored) is None) is not stored
    both.move(3)
    getattr(copied, both.update)(params)
    assert_lists(ours.shadow_params, before)  # The two are apart.
    both.call("update")
    both.agree()
    assert_lists(copied.shadow_params, ours.shadow_params)
    if stored:
        copied.restore(params)
        both.each(lambda e, p: e.restore(p) if e is not ours else None)
        both.agree()


@pytest.mark.parametrize("way", [copy.deepcopy, through_pickle, through_a_file])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_copy_made_while_the_parameters_hold_the_averages(way, name, dtype):
    both = Both(name)
    ours, params = both.emas[0], both.params[0]
    ours.to(dtype=dtype)
    both.move(1)
    getattr(ours, both.update)(params)
    both.move(2)
    getattr(ours, both.update)(params)
    averages, raw = copies(ours.shadow_params), copies(params)
    arguments = () if name == "torch_ema" else (params,)
    with ours.average_parameters(*arguments):
        copied = way(ours)
    assert_lists(copies(params), raw)
    assert_lists(ours.shadow_params, averages)
    assert_lists(copied.shadow_params, averages)
    assert_lists(copies(getattr(copied, both.stored)), raw)
    both.move(3)
    getattr(copied, both.update)(params)
    getattr(ours, both.update)(params)
    assert_lists(copied.shadow_params, ours.shadow_params)


def test_a_copy_has_the_parameters_and_what_is_loaded_has_none(backend):
    both = Both("torch_ema")
    both.move(1)
    for way in (copy.deepcopy, copy.copy):
        both.emas = tuple(way(ema) for ema in both.emas)
        both.each(lambda e, p: e.update())
        both.agree()
    kept = both.emas[0].shadow_params
    assert all(a is b for a, b in zip(copy.copy(both.emas[0]).shadow_params, kept, strict=True))
    loaded, params = through_pickle(both.emas[0]), both.params[0]
    for call in (loaded.update, loaded.copy_to, loaded.store):
        with pytest.raises(ValueError, match="6 of the 6 parameters no longer exist, or this was"):
            call()
    state = copy.deepcopy(loaded.state_dict())
    loaded.load_state_dict(state)
    move(params, 2)
    loaded.update(params)
    both.emas[0].update()
    assert_lists(loaded.shadow_params, both.emas[0].shadow_params)
    assert through_pickle(loaded).num_updates == loaded.num_updates == 3


def test_torch_ema_s_own_can_t_be_pickled():
    """If a release of it can, what it loads to is to be looked at."""
    with pytest.raises(TypeError, match="weakref"):
        pickle.dumps(TheirExponentialMovingAverage(make_params(), 0.9))
