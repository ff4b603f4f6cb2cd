"""Several averages of one model: each must be, bit for bit, what a manager of its own keeps."""

from __future__ import annotations

import copy
import io
import random

import pytest
import torch
from nets import Net, assert_same, is_same, move, same, values_of
from torch import nn

from fused_ema import EMAManager, _slots, schedules
from fused_ema.testing import DTYPE_PAIRS

MOMENTA = {
    "fast": 0.3,
    "wide": schedules.power(0.10),
    "odd-1": lambda i: (0.0, 1.0, 0.5, 0.01)[i % 4],
}


class Mixed(Net):
    """Net with parts whose raw values a swap sets aside."""

    def __init__(self, dtype=torch.float32, seed=0):
        super().__init__(dtype, seed)
        self.narrow = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).to(torch.bfloat16)


def alone(model, momentum, **settings):
    """A manager of one average, without a name."""
    is_schedule = callable(momentum)
    settings |= {"momentum_fun": momentum} if is_schedule else {"momentum": momentum}
    return EMAManager(model, **settings)


class Twins:
    """A model with all averages, and for each average a model of its own with a manager."""

    def __init__(self, make_model=Mixed, momenta=None, **settings):
        self.momenta, self.settings, self.make_model = momenta or MOMENTA, settings, make_model
        self.start(0)

    def start(self, seed):
        self.model = self.make_model(seed=seed)
        self.ema = EMAManager(self.model, self.momenta, **self.settings)
        self.own = {}
        for name, momentum in self.momenta.items():
            model = self.make_model(seed=seed)
            self.own[name] = model, alone(model, momentum, **self.settings)

    def models(self):
        return [self.model, *(model for model, _ in self.own.values())]

    def managers(self):
        return [self.ema, *(manager for _, manager in self.own.values())]

    def move(self, seed):
        for model in self.models():
            move(model, seed)

    def update(self, *args):
        for manager in self.managers():
            manager.update(*args)

    def check(self):
        for name, (model, manager) in self.own.items():
            assert_same(self.ema.named_emas(name), dict(manager.named_emas()))
            found = (self.ema.iteration, self.ema.num_updates)
            assert found == (manager.iteration, manager.num_updates)
            if self.ema.is_swapped in (False, name):
                assert bool(self.ema.is_swapped) == manager.is_swapped
                assert_same(self.model.state_dict(), model.state_dict())


# ---- updates


@pytest.mark.parametrize("form", ["lerp", "mul_add"])
@pytest.mark.parametrize("pair", DTYPE_PAIRS, ids=str)
def test_each_is_what_a_manager_of_its_own_keeps(backend, form, pair):
    ema_dtype, dtype = pair
    twins = Twins(lambda seed: Net(dtype, seed), form=form, ema_dtype=ema_dtype, begin=1)
    for step in range(5):
        twins.move(step)
        twins.update()
        twins.check()
    averages = [dict(twins.ema.named_emas(name)) for name in MOMENTA]
    assert not is_same(averages[0], averages[1])  # Or the comparisons above say nothing.
    assert not is_same(averages[1], averages[2])


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("buffers", ["auto", "average", "copy"])
@pytest.mark.parametrize("interval", [1, 3])
def test_interval_begin_buffers_and_another_device(monkeypatch, interval, buffers, staged):
    if staged:
        monkeypatch.setattr(_slots, "needs_stage", lambda ema_device, param_device: True)
    twins = Twins(interval=interval, begin=2, buffers=buffers, device="cpu" if staged else None)
    for step in range(8):
        twins.move(step)
        twins.update()
        twins.check()
    for i in (20, 23):
        twins.update(i)
        twins.check()


def test_sources_are_averaged_into_each():
    def masters_of(model):
        return {
            name: param.detach().float() * 1.25
            for name, param in model.named_parameters()
            if param.dtype == torch.bfloat16
        }

    model = Mixed(torch.bfloat16)
    masters = masters_of(model)
    ema = EMAManager(model, {"a": 0.3, "b": 0.1}, sources=masters)
    own = {name: alone(model, m, sources=masters) for name, m in (("a", 0.3), ("b", 0.1))}
    for step in range(3):
        move(model, step)
        for name, values in masters_of(model).items():
            masters[name].copy_(values)
        for manager in (ema, *own.values()):
            manager.update()
        for name, manager in own.items():
            assert_same(ema.named_emas(name), dict(manager.named_emas()))
    with ema.swapped("b"):
        swapped_in = values_of(model)
    with own["b"].swapped():
        assert_same(swapped_in, model.state_dict())


def test_what_is_not_averaged_exists_once():
    model = Net()
    ema = EMAManager(model, MOMENTA)
    emas = [dict(ema.named_emas(name)) for name in MOMENTA]
    num_shared = 0
    for name, tensor in emas[0].items():
        addresses = {averages[name].data_ptr() for averages in emas}
        is_averaged = ema.describe()[name].startswith("averaged")
        assert len(addresses) == (len(MOMENTA) if is_averaged and tensor.numel() else 1), name
        num_shared += not is_averaged
    assert num_shared > 2


def test_a_function_that_fails_moves_none_of_them():
    def broken(iteration):
        if iteration == 1:
            return 2.0
        return 0.5

    model = Net()
    ema = EMAManager(model, {"first": 0.25, "last": broken})
    ema.update()
    before = {name: {k: v.clone() for k, v in ema.named_emas(name)} for name in ema.averages}
    move(model, 1)
    with pytest.raises(ValueError, match=r"momentum\['last'\]\(1\) returned 2.0"):
        ema.update()
    for name in ema.averages:
        assert_same(ema.named_emas(name), before[name])
    assert (ema.iteration, ema.num_updates) == (1, 1)


def test_a_param_that_does_not_fit_moves_none_of_them(backend):
    model = Net()
    ema = EMAManager(model, MOMENTA)
    before = {name: {k: v.clone() for k, v in ema.named_emas(name)} for name in ema.averages}
    move(model, 1)
    model.scale.data = model.scale.data.double()
    with pytest.raises(TypeError, match=r"'scale' is torch\.float64 now"):
        ema.update()
    for name in ema.averages:
        assert_same(ema.named_emas(name), before[name])


# ---- swaps


@pytest.mark.parametrize("ema_dtype", [None, "param"])
@pytest.mark.parametrize("way", ["swapped", "swap"])
def test_the_model_holds_the_one_that_is_named_and_the_others_stay(backend, way, ema_dtype):
    twins = Twins(ema_dtype=ema_dtype)
    for step in range(3):
        twins.move(step)
        twins.update()
    model, ema = twins.model, twins.ema
    raw = values_of(model)
    all_emas = {name: {k: v.clone() for k, v in ema.named_emas(name)} for name in MOMENTA}
    for name, (own_model, own) in twins.own.items():
        context = ema.swapped(name) if way == "swapped" else None
        ema.swap(name) if context is None else context.__enter__()
        own.swap()
        assert ema.is_swapped == name
        assert f"swapped with '{name}'" in repr(ema)
        assert_same(model.state_dict(), own_model.state_dict())
        for each in MOMENTA:
            assert_same(ema.named_emas(each), all_emas[each])
        with pytest.raises(RuntimeError, match="the model holds the ema"):
            ema.update()
        other = next(each for each in MOMENTA if each != name)
        with pytest.raises(RuntimeError, match=f"the model holds '{name}', not '{other}'"):
            ema.swap(other)
        with pytest.raises(RuntimeError, match="swapped already"):
            ema.swapped(other).__enter__()
        ema.swap() if context is None else context.__exit__(None, None, None)
        own.swap()
        assert ema.is_swapped is False
        assert_same(model.state_dict(), raw)
        for each in MOMENTA:
            assert_same(ema.named_emas(each), all_emas[each])


def test_copy_to_takes_one_of_them():
    twins = Twins()
    for step in range(3):
        twins.move(step)
        twins.update()
    for held in (None, "wide"):
        if held:
            twins.ema.swap(held)
        for name, (_, own) in twins.own.items():
            target, expected = Mixed(seed=4), Mixed(seed=4)
            twins.ema.copy_to(target, name)
            own.copy_to(expected)
            assert_same(target.state_dict(), expected.state_dict())


def test_statistics_computed_anew_inside_belong_to_the_one_that_is_held():
    twins = Twins()
    twins.move(1)
    twins.update()
    with twins.ema.swapped("wide"), twins.own["wide"][1].swapped():
        for model in (twins.model, twins.own["wide"][0]):
            model.narrow[1].running_mean.fill_(7.0)
            model.body[1].running_var.fill_(3.0)
    twins.check()
    assert (dict(twins.ema.named_emas("wide"))["narrow.1.running_mean"] == 7).all()


def a_course(seed, **settings):
    """Events of a training in any order, on all twins alike."""
    choose = random.Random(seed)
    twins = Twins(**settings)

    def replace():
        for model in twins.models():
            model.scale = nn.Parameter(torch.tensor(float(seed)))
        assert {tuple(manager.refresh()) for manager in twins.managers()} == {()}

    def lay_anew():
        for model in twins.models():
            weight = model.body[0].weight
            memory = (torch.contiguous_format, torch.channels_last)[choose_for_all % 2]
            weight.data = weight.data.clone(memory_format=memory)

    def assign_buffer():
        for model in twins.models():
            model.body[1].running_mean = model.body[1].running_mean + 1

    def add():
        for model in twins.models():
            setattr(model, f"new_{step}", nn.Parameter(torch.full((3,), float(step))))
        started = {tuple(manager.refresh()) for manager in twins.managers()}
        assert started == {(f"new_{step}",)}

    def reset():
        for manager in twins.managers():
            manager.reset()

    def swap():
        name = choose.choice([*MOMENTA])
        twins.ema.swap(name)
        model, own = twins.own[name]
        own.swap()
        twins.check()
        for each in (twins.model, model):  # Somebody writes to the average itself.
            with torch.no_grad():
                each.body[0].bias += step
        twins.check()
        twins.ema.swap()
        own.swap()

    def resume():
        kept = [copy.deepcopy(values_of(model)) for model in twins.models()]
        states = [through_a_file(manager.state_dict()) for manager in twins.managers()]
        extra = [name for name, _ in twins.model.named_parameters() if name.startswith("new")]
        twins.start(seed=9)
        for model in twins.models():
            for name in extra:
                setattr(model, name, nn.Parameter(torch.zeros(3)))
        for manager in twins.managers():
            manager.refresh()
        for model, values in zip(twins.models(), kept, strict=True):
            model.load_state_dict(values)
        for manager, state in zip(twins.managers(), states, strict=True):
            manager.load_state_dict(state)

    events = (replace, lay_anew, assign_buffer, add, reset, swap, swap, resume)
    for step in range(12):
        choose_for_all = choose.randrange(10)
        choose.choice(events)()
        twins.check()
        twins.move(step)
        twins.update()
        twins.check()


@pytest.mark.parametrize("seed", range(6))
def test_any_course_of_events(seed):
    settings = ({}, {"interval": 2, "begin": 2}, {"ema_dtype": "param", "form": "mul_add"})
    a_course(seed, **settings[seed % 3])


# ---- states


def through_a_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def trained(momenta, steps=3, **settings):
    model = Mixed()
    ema = EMAManager(model, momenta, **settings)
    for step in range(steps):
        move(model, step)
        ema.update()
    return model, ema


def test_what_is_in_a_state():
    model, ema = trained({"a": 0.25, "b": 0.5})
    state = ema.state_dict()
    plain = EMAManager(Mixed(), 0.25).state_dict()
    assert list(state) == list(plain)
    assert (state["version"], state["is_swapped"], state["raw"]) == (2, False, {})
    assert list(state["ema"]) == ["a", "b"]
    for name in "ab":
        assert_same(state["ema"][name], dict(ema.named_emas(name)))
        for key, tensor in ema.named_emas(name):
            assert state["ema"][name][key].data_ptr() == tensor.data_ptr()
    assert state["ema_dtypes"] == plain["ema_dtypes"]
    raw = values_of(model)
    averages = {name: {k: v.clone() for k, v in ema.named_emas(name)} for name in "ab"}
    ema.swap("b")
    state = through_a_file(ema.state_dict())
    assert state["is_swapped"] == "b"
    assert_same(state["raw"], raw)
    for name in "ab":
        assert_same(state["ema"][name], averages[name])


def test_one_without_a_name_has_the_state_that_it_always_had():
    _, ema = trained(0.25)
    assert (ema.state_dict()["version"], ema.averages, ema.is_swapped) == (1, (), False)
    ema.swap()
    assert ema.is_swapped is True
    assert ema.state_dict()["is_swapped"] is True


@pytest.mark.parametrize("held", [None, "b"])
def test_a_run_that_is_resumed_goes_on_bit_for_bit(held):
    momenta = {"a": 0.25, "b": schedules.power(0.1)}
    model, ema = trained(momenta)
    raw = values_of(model)
    if held:
        ema.swap(held)
    state, weights = through_a_file(ema.state_dict()), values_of(model)
    other = Mixed(seed=5)
    other.load_state_dict(weights)
    taken = EMAManager(other, momenta)
    assert taken.load_state_dict(state) == ([], [])
    assert taken.is_swapped == (held or False)
    if held:
        taken.swap()
        ema.swap()
    assert_same(other.state_dict(), raw)
    for step in range(3, 6):
        for each, manager in ((model, ema), (other, taken)):
            move(each, step)
            manager.update()
        for name in momenta:
            assert_same(taken.named_emas(name), dict(ema.named_emas(name)))
    assert taken.num_updates == ema.num_updates == 6


def test_a_state_of_one_goes_into_one_of_several_and_the_other_way():
    _, one = trained(0.25, steps=5)
    _, several = trained({"a": 0.1, "b": 0.5})
    before = {k: v.clone() for k, v in several.named_emas("a")}
    state = through_a_file(several.state_dict())
    several.load_state_dict(through_a_file(one.state_dict()), average="b")
    described = several.describe()
    for name, tensor in several.named_emas("a"):
        is_averaged = described[name].startswith("averaged")
        same(tensor, before[name] if is_averaged else dict(one.named_emas())[name], name)
    assert_same(several.named_emas("b"), dict(one.named_emas()))
    assert (several.iteration, several.num_updates) == (5, 5)
    one.load_state_dict(state, average="a")
    assert_same(one.named_emas(), state["ema"]["a"])
    assert (one.iteration, one.num_updates) == (3, 3)
    # Of one there is no choice, whatever it is called.
    _, named = trained({"only": 0.1}, steps=2)
    one.load_state_dict(named.state_dict())
    assert_same(one.named_emas(), dict(named.named_emas("only")))
    _, named = trained({"only": 0.3}, steps=1)
    named.load_state_dict(one.state_dict())
    assert_same(named.named_emas(), dict(one.named_emas()))
    several.load_state_dict(named.state_dict(), average="a")
    assert_same(several.named_emas("a"), dict(one.named_emas()))


@pytest.mark.parametrize("average", ["a", "b"])
def test_one_of_a_state_that_was_saved_while_swapped(average):
    model, several = trained({"a": 0.1, "b": 0.5})
    raw = values_of(model)
    averages = {k: v.clone() for k, v in several.named_emas(average)}
    several.swap("b")
    other = Mixed(seed=5)
    other.load_state_dict(model.state_dict())
    one = EMAManager(other, 0.1)
    one.load_state_dict(through_a_file(several.state_dict()), average=average)
    assert one.is_swapped is True
    assert_same(one.named_emas(), averages)
    one.swap()
    assert_same(other.state_dict(), raw)
    assert_same(one.named_emas(), averages)


def test_without_strict_the_averages_that_both_have_go_on():
    _, saved = trained({"a": 0.1, "gone": 0.5})
    model = Mixed(seed=5)
    ema = EMAManager(model, {"new": 0.2, "a": 0.1})
    incompatible = ema.load_state_dict(saved.state_dict(), strict=False)
    names = list(model.state_dict())
    assert incompatible == ([f"new.{n}" for n in names], [f"gone.{n}" for n in names])
    averaged = {n for n, how in ema.describe().items() if how.startswith("averaged")}
    assert_same(ema.named_emas("a"), dict(saved.named_emas("a")))
    for name, tensor in ema.named_emas("new"):
        if name in averaged and name in dict(model.named_parameters()):
            same(tensor, model.get_parameter(name).detach().to(tensor.dtype), name)


def without(state, name):
    return {**state, "ema": {k: v for k, v in state["ema"].items() if k != name}}


STATES = {
    "of one": (
        lambda s: EMAManager(Mixed()).state_dict(),
        {},
        "the state has one average, without a name, and the manager keeps 'a', 'b'; say which",
    ),
    "other names": (
        lambda s: {**s, "ema": {"a": s["ema"]["a"], "c": s["ema"]["b"]}},
        {},
        r"missing in the state: the average 'b'\n  not in the manager: the average 'c'",
    ),
    "unknown": (lambda s: s, {"average": "c"}, "there is no average 'c'; there are 'a', 'b'"),
    "not in it": (
        lambda s: {**s, "ema": s["ema"] | {"c": {}}} | without(s, "b"),
        {"average": "b"},
        None,
    ),
    "truncated": (lambda s: without(without(s, "a"), "b"), {}, "has no averages under 'ema'"),
    "of another model": (
        lambda s: {**s, "ema": {**s["ema"], "b": {"x": torch.zeros(1)}}},
        {},
        r"the state of the average 'b' doesn't fit this model(.|\n)*missing in 'ema': 'mask'",
    ),
    "no dictionary": (
        lambda s: {**s, "ema": {"a": s["ema"]["a"], "b": 3}},
        {},
        "has a int under 'b'",
    ),
    "swapped": (
        lambda s: {**s, "is_swapped": "z"},
        {},
        "'is_swapped' of the state is 'z', neither False nor one of its averages, 'a', 'b'",
    ),
}


@pytest.mark.parametrize("change", STATES)
def test_a_state_that_does_not_fit_changes_nothing(change):
    edit, options, match = STATES[change]
    model, ema = trained({"a": 0.1, "b": 0.5})
    state = edit(copy.deepcopy(dict(ema.state_dict())))
    before = {name: {k: v.clone() for k, v in ema.named_emas(name)} for name in "ab"}
    if match is None:
        ema.load_state_dict(state, **options)  # A state of one average needs no name.
        assert_same(ema.named_emas("b"), before["a"])
        return
    move(model, 9)
    with pytest.raises(ValueError, match=match):
        ema.load_state_dict(state, **options)
    for name in "ab":
        assert_same(ema.named_emas(name), before[name])


def test_of_a_state_of_several_a_manager_of_one_must_know_which():
    _, several = trained({"a": 0.1, "b": 0.5})
    one = EMAManager(Mixed())
    with pytest.raises(ValueError, match="has 2 averages, 'a', 'b', and the manager keeps one"):
        one.load_state_dict(several.state_dict())
    with pytest.raises(ValueError, match="the state has no average 'c'; it has 'a', 'b'"):
        one.load_state_dict(several.state_dict(), average="c")
    with pytest.raises(ValueError, match="there is no average 'a': the manager keeps one"):
        one.load_state_dict(EMAManager(Mixed()).state_dict(), average="a")


# ---- what can be wrong


BAD = {
    "none": ({}, ValueError, "momentum is empty; name at least one average"),
    "empty name": ({"": 0.1}, ValueError, "an average named ''; a name has letters, digits"),
    "dot": ({"a.b": 0.1}, ValueError, "an average named 'a.b'"),
    "space": ({"a b": 0.1}, ValueError, "an average named 'a b'"),
    "number": ({1: 0.1}, TypeError, "an average whose name is a int"),
    "twice": (
        [("a", 0.1), ("b", 0.2), ("a", 0.3)],
        ValueError,
        "two averages named 'a', with 0.1 and 0.3",
    ),
    "no pairs": ([0.1, 0.2], TypeError, "momentum holds a float; pass a dictionary"),
    "range": ({"a": 0.1, "b": 1.5}, ValueError, r"momentum\['b'\] is 1.5; it is the weight"),
    "copy": ({"a": 1.0}, ValueError, r"to copy, fused_ema.schedules.constant\(1.0\)"),
    "str": ({"a": "x"}, TypeError, r"momentum\['a'\] is a str; pass a number"),
    "function": (lambda i: 0.1, TypeError, "momentum is a function; pass it as momentum_fun="),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_averages(bad):
    momentum, error, match = BAD[bad]
    with pytest.raises(error, match=match):
        EMAManager(Net(), momentum)


def test_names_beside_a_schedule_and_a_decay():
    with pytest.raises(ValueError, match="momentum names averages and momentum_fun is set"):
        EMAManager(Net(), {"a": 0.1}, momentum_fun=schedules.power(0.1))
    with pytest.warns(UserWarning, match=r"momentum\['b'\] is 0.999, so each") as warned:
        EMAManager(Net(), {"a": 0.1, "b": 0.999})
    assert warned[0].filename == __file__


CALLS = {
    "swapped": lambda ema, *name: ema.swapped(*name).__enter__(),
    "swap": lambda ema, *name: ema.swap(*name),
    "copy_to": lambda ema, *name: ema.copy_to(Net(), *name),
    "named_emas": lambda ema, *name: list(ema.named_emas(*name)),
    "momentum_at": lambda ema, *name: ema.momentum_at(0, *name),
}


@pytest.mark.parametrize("call", CALLS)
def test_which_average_must_be_said(call):
    model = Net()
    ema = EMAManager(model, MOMENTA)
    before = values_of(model)
    with pytest.raises(
        ValueError, match=rf"EMAManager\.{call}: the manager keeps 3 averages, 'fast', 'wide', 'odd"
    ):
        CALLS[call](ema)
    with pytest.raises(ValueError, match=rf"{call}: there is no average 'slow'; there are 'fast',"):
        CALLS[call](ema, "slow")
    with pytest.raises(TypeError, match=rf"{call}: the name is a int; pass a string"):
        CALLS[call](ema, 1)
    with pytest.raises(ValueError, match=rf"{call}: there is no average 'fast': the manager keeps"):
        CALLS[call](EMAManager(Net()), "fast")
    assert ema.is_swapped is False
    assert_same(model.state_dict(), before)


def test_one_with_a_name_needs_none():
    model = Net()
    ema = EMAManager(model, [("only", 0.25)])
    move(model, 1)
    ema.update()
    assert ema.averages == ("only",)
    assert ema.momentum_at(3) == ema.momentum_at(3, "only") == 0.25
    assert_same(ema.named_emas(), dict(ema.named_emas("only")))
    with ema.swapped():
        assert ema.is_swapped == "only"


def test_what_a_manager_says_of_itself():
    ema = EMAManager(Net(), {"a": 0.1, "b": 0.2})
    assert "momentum={'a': 0.1, 'b': 0.2}" in repr(ema)
    assert ema.momentum_at(7, "b") == 0.2
    assert ema.averages == ("a", "b")


def test_a_teacher_is_one():
    with pytest.raises(ValueError, match="momentum names averages, and into= is set"):
        EMAManager(Net(), {"a": 0.1}, into=Net().requires_grad_(False))
