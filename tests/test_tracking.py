"""What a model has, and whether it still has it."""

from __future__ import annotations

import gc

import pytest
import torch
from nets import Net
from torch import nn

from fused_ema import EMAManager, _native, _tracking


def names(model):
    return [member.name for member in _tracking.read(model).members]


def test_members_are_those_of_the_state_dict():
    model = Net()
    state = model.state_dict(keep_vars=True)
    members = _tracking.read(model).members
    assert [member.name for member in members] == list(state)
    assert all(member.tensor is state[member.name] for member in members)
    buffers = dict(model.named_buffers())
    assert all(member.is_buffer == (member.name in buffers) for member in members)


def test_a_module_that_stands_twice_has_two_names():
    shared = nn.Linear(2, 2, bias=False)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    assert names(model) == list(model.state_dict()) == ["a.weight", "b.0.weight"]
    assert len(_tracking.group_tied(_tracking.read(model).members)) == 1


def test_a_module_that_holds_itself():
    model = nn.Linear(2, 2)
    model._modules["again"] = model
    assert names(model) == ["weight", "bias"]


class Wrapper(nn.Module):
    def __init__(self, key, inner):
        super().__init__()
        self.add_module(key, inner)


@pytest.mark.parametrize(
    ("wrap", "prefix"),
    [
        (nn.DataParallel, ""),
        (lambda inner: Wrapper("_orig_mod", inner), ""),
        (lambda inner: Wrapper("_checkpoint_wrapped_module", Wrapper("_orig_mod", inner)), ""),
        (lambda inner: nn.DataParallel(Wrapper("module", inner)), "module."),
        (lambda inner: Wrapper("module", nn.DataParallel(inner)), "module."),
        (lambda inner: Wrapper("_orig_mod_", inner), "_orig_mod_."),
    ],
)
def test_names_without_wrappers(wrap, prefix):
    inner = nn.Sequential(nn.Linear(2, 2), wrap(nn.BatchNorm1d(2)))
    plain = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    expected = [prefix + name.replace("1.", "1." + prefix) for name in names(plain)]
    assert names(wrap(inner)) == expected


def put(key, value):
    def change(model):
        model._modules["0"]._parameters[key] = value

    return change


CHANGES = {
    "parameter": put("weight", nn.Parameter(torch.ones(2, 2))),
    "parameter to None": put("weight", None),
    "parameter more": put("more", nn.Parameter(torch.ones(1))),
    "parameter less": lambda model: model[0]._parameters.pop("bias"),
    "buffer": lambda model: setattr(model[1], "running_mean", torch.ones(2)),
    "buffer less": lambda model: delattr(model[1], "running_var"),
    "child": lambda model: model.__setitem__(1, nn.BatchNorm1d(2)),
    "child more": lambda model: model.append(nn.ReLU()),
    "child less": lambda model: model.pop(1),
    "child of a leaf": lambda model: model[0].add_module("extra", nn.ReLU()),
}


INTO_EMPTY = ("child of a leaf",)


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_tree_is_not_current(backend, change):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    tree = _tracking.read(model)
    for _ in range(3):
        assert tree.is_current()
        assert tree.is_current_so_far()
    CHANGES[change](model)
    found = [tree.is_current_so_far() for _ in range(2 * _tracking.NUM_TURNS)]
    # In a dict that held something it is noticed at once, in an empty one when its turn comes.
    assert found.count(False) == (2 if change in INTO_EMPTY else len(found))
    for _ in range(3):
        assert not tree.is_current()
    assert _tracking.read(model).is_current()


def test_a_change_undone_is_current_again(backend):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    tree = _tracking.read(model)
    kept = model[0].weight
    put("weight", None)(model)
    assert not tree.is_current()
    put("weight", kept)(model)
    for _ in range(3):
        assert tree.is_current()
    # In another order it is another state_dict.
    first, second = model._modules.pop("0"), model._modules.pop("1")
    model._modules.update({"1": second, "0": first})
    assert not tree.is_current()


def test_what_a_model_computes_is_no_change(backend):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    tree = _tracking.read(model)
    model(torch.randn(4, 2)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=1).step()
    model.eval().requires_grad_(False).zero_grad()
    model[0].weight.data = torch.zeros(2, 2)
    assert tree.is_current()


def test_old_objects_are_held_not_remembered(backend):
    # A freed object's address may be given to a new one; a held object's can't.
    model = nn.Sequential(nn.Linear(2, 2))
    tree = _tracking.read(model)
    for _ in range(10):
        model[0].weight = None
        gc.collect()
        model[0].weight = nn.Parameter(torch.empty(2, 2))
        assert not tree.is_current()


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_script_module_is_averaged_too():
    script = torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    ema = EMAManager(script, 0.5)
    assert [name for name, _ in ema.named_emas()] == list(script.state_dict())
    was = script.state_dict()["0.weight"].clone()
    with torch.no_grad():
        next(script.parameters()).add_(1)
    ema.update()
    assert torch.equal(dict(ema.named_emas())["0.weight"], was.lerp(was + 1, 0.5))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([{}], ([],), bytearray(8)), TypeError, "takes two tuples and a bytearray"),
        ((({},), [], bytearray(8)), TypeError, "takes two tuples and a bytearray"),
        ((({},), ([],), b"12345678"), TypeError, "takes two tuples and a bytearray"),
        ((({}, {}), ([], []), bytearray(8)), ValueError, "8 bytes of versions for 2 dicts"),
        ((({}, {}), ([],), bytearray(16)), ValueError, "1 lists and 16 bytes of versions"),
        ((({}, [1]), ([], []), bytearray(16)), TypeError, "item 1 is a list with a list, not a"),
        ((({}, {}), ([], ()), bytearray(16)), TypeError, "item 1 is a dict with a tuple, not a"),
    ],
)
def test_what_the_native_check_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        _native.C.changed_dicts(*arguments)


def test_the_native_check_compares_objects_not_values():
    one, other = [1], [1]
    versions = bytearray(8)
    held = {"a": one}
    assert _native.C.changed_dicts((held,), (["a", one],), versions) == []
    assert _native.C.changed_dicts((held,), (["a", other],), bytearray(8)) == [0]
    assert _native.C.changed_dicts((held,), ([],), bytearray(8)) == [0]
    assert _native.C.changed_dicts((held,), (["b", one],), bytearray(8)) == [0]
    assert _native.C.changed_dicts((held,), (["a", one, "b", one],), bytearray(8)) == [0]
    assert _native.C.changed_dicts((held,), (["a", ...],), bytearray(8)) == []
    held["a"] = other
    assert _native.C.changed_dicts((held,), (["a", one],), versions) == [0]
    assert versions == bytearray(8)


def test_the_native_check_names_each_dict_that_changed():
    dicts = tuple({"a": object()} for _ in range(4))
    held = tuple(["a", owned["a"]] for owned in dicts)
    versions = bytearray(32)
    assert _native.C.changed_dicts(dicts, held, versions) == []
    dicts[1]["a"] = object()
    dicts[3]["b"] = object()
    for _ in range(2):
        assert _native.C.changed_dicts(dicts, held, versions) == [1, 3]
    held[1][1] = dicts[1]["a"]
    assert _native.C.changed_dicts(dicts, held, versions) == [3]


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


def test_the_native_check_of_slots_compares_objects_not_values():
    one, other = [1], [1]
    objects, slot = (
        (Slotted(one), Slotted(None), type("Derived", (Slotted,), {})(one)),
        Slotted.value,
    )
    assert _native.C.slots_hold(slot, objects, (one, None, one))
    assert _native.C.slots_hold(slot, (), ())
    for held in ((other, None, one), (one, one, one), (one, None, other)):
        assert not _native.C.slots_hold(slot, objects, held)
    objects[2].value = other
    assert not _native.C.slots_hold(slot, objects, (one, None, one))
    assert _native.C.slots_hold(slot, objects, (one, None, other))
    del objects[0].value
    assert not _native.C.slots_hold(slot, objects, (one, None, other))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("value", (), ()), TypeError, "takes the descriptor of a slot"),
        ((Slotted.value, [], ()), TypeError, "and two tuples"),
        ((Slotted.value, (), []), TypeError, "and two tuples"),
        ((Slotted.value, (Slotted(1),), ()), ValueError, "0 values for 1 objects"),
        ((Slotted.value, (Slotted(1), [1]), (1, 1)), TypeError, "item 1 is a list without"),
        ((type(lambda: 0).__dict__["__closure__"], (), ()), ValueError, "or no slot of objects"),
    ],
)
def test_what_the_native_check_of_slots_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        _native.C.slots_hold(*arguments)


def test_the_native_check_of_lists_compares_objects_not_values():
    one, other = [1], [1]
    for a, b in (([one, None], (one, None)), ((), []), ([one], [one])):
        assert _native.C.hold_same(a, b)
    for a, b in (([one], [other]), ([one], [one, None]), ([one, other], [other, one])):
        assert not _native.C.hold_same(a, b)
    with pytest.raises(TypeError, match="lists or tuples, not a dict"):
        _native.C.hold_same([], {})


@pytest.mark.parametrize("backend", ["native", "foreach"], indirect=True)
def test_another_name_is_another_tensor(backend):
    model = nn.Module()
    model.net = nn.Linear(2, 2)
    ema = EMAManager(model, 0.5)
    model.backbone = model.net
    del model.net
    with pytest.raises(RuntimeError, match=r"(?s)'backbone.weight' is new.*'net.weight' is gone"):
        ema.update()
