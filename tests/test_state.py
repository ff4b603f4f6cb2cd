"""The state of a manager: what is in it, resuming, and states that don't fit."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from nets import TIED, Net, assert_same, move, same, values_of
from torch import nn

from fused_ema import EMAManager, schedules
from fused_ema.testing import assert_bits_equal


def through_a_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def trained(dtype=torch.float32, steps=3, **settings):
    model = Net(dtype)
    ema = EMAManager(model, 0.25, **settings)
    for step in range(steps):
        move(model, step)
        ema.update()
    return model, ema


def averages_of(ema):
    return {name: tensor.clone() for name, tensor in ema.named_emas()}


def test_what_is_in_it():
    model, ema = trained(torch.bfloat16)
    state = ema.state_dict()
    assert list(state) == [
        *("version", "iteration", "num_updates", "is_swapped", "ema", "raw", "ema_dtypes")
    ]
    assert [state[key] for key in ("version", "iteration", "num_updates")] == [1, 3, 3]
    assert state["is_swapped"] is False
    assert state["raw"] == {}
    assert list(state["ema"]) == list(model.state_dict())
    assert state["ema_dtypes"]["scale"] == "float32"
    assert state["ema_dtypes"]["mask"] == "bool"
    assert_same(state["ema"], averages_of(ema))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_ema_stands_the_ema_whatever_is_swapped(dtype):
    model, ema = trained(dtype)
    averages, raw = averages_of(ema), values_of(model)
    ema.swap()
    state = through_a_file(ema.state_dict())
    assert state["is_swapped"] is True
    # Exchanged tensors are the model's own now; an fp32 ema of bf16 params stays where it was.
    assert_same(state["ema"], averages)
    assert_same(state["raw"], raw)


def test_the_state_is_live_and_deduplicated_in_a_file():
    model, ema = trained()
    file = io.BytesIO()
    with ema.swapped():
        torch.save({"model": model.state_dict(), "ema": ema.state_dict()}, file)
    tensors = sum(t.nbytes for t in values_of(model).values())
    assert len(file.getvalue()) < 2 * tensors + 20_000
    state = ema.state_dict()
    move(model, 7)
    ema.update()
    assert_same(state["ema"], averages_of(ema))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_state_loads_into_another_manager(backend, dtype):
    _, ema = trained(dtype)
    other = Net(dtype, seed=5)
    raw = values_of(other)
    taken = EMAManager(other, 0.25)
    state = through_a_file(ema.state_dict())
    taken.load_state_dict(
        dict(reversed(state.items())) | {"ema": dict(reversed(state["ema"].items()))}
    )
    assert_same(taken.named_emas(), averages_of(ema))
    assert (taken.iteration, taken.num_updates) == (3, 3)
    assert_same(other.state_dict(), raw)
    taken.update()
    assert (taken.iteration, taken.num_updates) == (4, 4)


@pytest.mark.parametrize(
    ("saved", "params", "kept"),
    [
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float16, torch.float32, torch.float32),
        (torch.float32, torch.float64, torch.float64),
    ],
)
def test_a_wider_ema_takes_a_narrower_one_exactly(backend, saved, params, kept):
    _, ema = trained(saved, ema_dtype="param")
    taken = EMAManager(Net(params), 0.25)
    taken.load_state_dict(ema.state_dict())
    found = dict(taken.named_emas())
    for name, tensor in averages_of(ema).items():
        same(found[name], tensor.to(kept) if tensor.is_floating_point() else tensor, name)


def test_a_manager_s_own_state_is_no_news():
    _, ema = trained()
    averages = averages_of(ema)
    ema.load_state_dict(ema.state_dict())
    assert_same(ema.named_emas(), averages)


def net_for_training():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
    )


SETTINGS = (
    {"momentum_fun": schedules.exponential(0.01, 10)},
    {"momentum": 0.1, "interval": 3, "form": "mul_add"},
    {"momentum": 0.1, "begin": 6, "interval": 2},
    {"momentum": 0.1, "copy_buffers": True},
)
NUM_STEPS = 10


class Run:
    """A training run that can be saved after any step, and gone on with in a new process."""

    def __init__(self, settings, dtype):
        self.model = net_for_training().to(dtype)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.ema = EMAManager(self.model, **settings)
        self.dtype = dtype

    def steps(self, numbers):
        for i in numbers:
            generator = torch.Generator().manual_seed(i)
            batch = torch.randn(8, 1, 8, 8, generator=generator).to(self.dtype)
            self.model(batch).float().square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.ema.update()

    def state(self):
        return {name: through_a_file(getattr(self, name).state_dict()) for name in PARTS}

    def load(self, states, order):
        for name in order:
            getattr(self, name).load_state_dict(states[name])


PARTS = ("model", "ema", "optimizer")


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: ", ".join(settings))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("saved", "stop", "order"),
    [
        ("raw", 3, PARTS),
        ("raw", 8, PARTS[::-1]),
        ("swapped by hand", 5, PARTS),
        ("within swapped()", 7, PARTS[::-1]),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(settings, dtype, saved, stop, order):
    whole = Run(settings, dtype)
    whole.steps(range(NUM_STEPS))

    first = Run(settings, dtype)
    first.steps(range(stop))
    if saved == "raw":
        states = first.state()
    elif saved == "swapped by hand":
        first.ema.swap()
        states = first.state()
    else:
        with first.ema.swapped():
            states = first.state()

    second = Run(settings, dtype)
    second.steps([99])  # Whatever a new process has done before it loads.
    second.load(states, order)
    if saved != "raw":
        assert second.ema.is_swapped
        second.ema.swap()
    second.steps(range(stop, NUM_STEPS))
    assert_same(second.model.state_dict(), values_of(whole.model))
    assert_same(second.ema.named_emas(), averages_of(whole.ema))
    assert second.ema.iteration == whole.ema.iteration == NUM_STEPS
    assert second.ema.num_updates == whole.ema.num_updates


# ---- states that don't fit


def removed(state, *keys):
    for key in keys:
        del state[key]


def edit(change):
    """A state of a trained net after `change`, and what its error has to say."""
    state = copy.deepcopy(trained()[1].state_dict())
    return change(state) or state


def swapped_state():
    _, ema = trained()
    ema.swap()
    return copy.deepcopy(ema.state_dict())


def raw_without_scale():
    state = swapped_state()
    del state["raw"]["scale"]
    state["raw"]["mask"] = state["raw"]["mask"].float()
    return state


UNFIT = {
    "no dictionary": (lambda: [1], TypeError, ["the state is a list; pass what state_dict()"]),
    "no version": (
        lambda: edit(lambda s: removed(s, "version")),
        ValueError,
        ["'version' is None", "is no state of an EMAManager"],
    ),
    "a model's state": (
        lambda: Net().state_dict(),
        ValueError,
        ["'version' is None, with the keys ['body.0.bias', ", "is no state of an EMAManager"],
    ),
    "version": (
        lambda: edit(lambda s: s.update(version=3)),
        ValueError,
        ["the state has version 3 but this fused_ema reads up to 2; update fused_ema"],
    ),
    "version 0": (
        lambda: edit(lambda s: s.update(version=0)),
        ValueError,
        ["'version' is 0"],
    ),
    "truncated": (
        lambda: edit(lambda s: removed(s, "raw", "ema", "num_updates")),
        ValueError,
        [
            "the key 'num_updates' is missing (a truncated state?)",
            "the key 'ema' is missing",
            "the key 'raw' is missing",
        ],
    ),
    "unknown key": (
        lambda: edit(lambda s: s.update(momentum=0.1)),
        ValueError,
        ["unknown key 'momentum'"],
    ),
    "values": (
        lambda: edit(lambda s: s.update(iteration=-1, num_updates=True, is_swapped=0, raw=[])),
        ValueError,
        [
            "'iteration' is -1, not a whole number from 0",
            "'num_updates' is True, not a whole number",
            "'is_swapped' is 0, not a bool",
            "'raw' is a list, not a dictionary",
        ],
    ),
    "another model": (
        lambda: copy.deepcopy(EMAManager(nn.Linear(2, 2)).state_dict()),
        ValueError,
        [
            *(f"missing in 'ema': '{name}'" for name in Net().state_dict()),
            "surplus in 'ema': 'weight'",
            "surplus in 'ema': 'bias'",
        ],
    ),
    "shapes and types": (
        lambda: edit(
            lambda s: s["ema"].update(
                {
                    "scale": torch.zeros(3),
                    "frozen": [1.0],
                    "mask": torch.zeros(3),
                    "bytes": torch.zeros(5, dtype=torch.int64),
                    "body.1.weight": torch.zeros(4, dtype=torch.float64),
                    "body.1.bias": torch.zeros(4, dtype=torch.bfloat16),
                }
            )
        ),
        ValueError,
        [
            "'scale' in 'ema' has shape [3] but the model's has []",
            "'frozen' in 'ema' is a list, not a tensor",
            "'mask' in 'ema' is float32 but is kept as bool here, which can't hold all its values",
            "'bytes' in 'ema' is int64 but is kept as uint8 here",
            "'body.1.weight' in 'ema' is float64 but is kept as float32 here",
            "'body.1.bias' in 'ema' is bfloat16 but was saved as float32; something has converted",
        ],
    ),
    "a narrower manager": (
        lambda: copy.deepcopy(trained(torch.float64)[1].state_dict()),
        ValueError,
        ["'scale' in 'ema' is float64 but is kept as float32 here", "with the ema_dtype it was"],
    ),
    "tied names that differ": (
        lambda: edit(lambda s: s["ema"].update({TIED[1]: s["ema"][TIED[1]] + 1})),
        ValueError,
        [f"'{TIED[0]}' and '{TIED[1]}' differ in 'ema' but are one tensor in the model"],
    ),
    "raw while not swapped": (
        lambda: edit(lambda s: s.update(raw={"scale": torch.zeros(())})),
        ValueError,
        ["'raw' holds 1 tensors of a model not swapped"],
    ),
    "raw incomplete": (
        raw_without_scale,
        ValueError,
        [
            "missing in 'raw': 'scale'",
            "'mask' in 'raw' is float32 but is kept as bool here",
        ],
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_state_that_does_not_fit_changes_nothing(case):
    make, error, parts = UNFIT[case]
    state = make()
    model, ema = trained()
    averages, raw = averages_of(ema), values_of(model)
    with pytest.raises(error) as caught:
        ema.load_state_dict(state)
    text = str(caught.value)
    assert "fused_ema.EMAManager.load_state_dict: " in text
    for part in parts:
        assert part in text
    for line in text.splitlines()[1:]:
        assert any(part in line for part in parts)
    assert_same(ema.named_emas(), averages)
    assert_same(model.state_dict(), raw)
    assert (ema.iteration, ema.num_updates, ema.is_swapped) == (3, 3, False)


def test_tied_values_that_are_equal_but_apart_load():
    _, ema = trained()
    state = copy.deepcopy(ema.state_dict())
    state["ema"][TIED[0]][0, 0] = float("nan")
    state["ema"][TIED[1]] = state["ema"][TIED[0]].clone()
    _, taken = trained(steps=1)
    taken.load_state_dict(state)
    assert_bits_equal(dict(taken.named_emas())[TIED[1]], state["ema"][TIED[1]])


@pytest.mark.cuda
def test_onto_any_device():
    _, ema = trained()
    taken = EMAManager(Net(seed=4).cuda(), 0.25)
    taken.load_state_dict(through_a_file(ema.state_dict()))
    assert_same({k: v.cpu() for k, v in taken.named_emas()}, averages_of(ema))
    ema.load_state_dict(taken.state_dict())
