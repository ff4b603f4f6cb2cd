"""Drop-ins for averaged modules while their model assigns buffers anew, step by step."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from nets import assert_same
from torch import nn
from torch.optim import swa_utils as theirs

from fused_ema import plan
from fused_ema.hooks import _pairs, swa_utils, timm

DECAY = 0.75


class Model(nn.Module):
    """Buffers of every kind; ``step`` assigns them anew."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(3, 2) for _ in range(4)])
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("queue", torch.randn(5))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("cache", torch.randn(4), persistent=False)
        self.register_buffer("later", None)
        self.register_buffer("passing", None, persistent=False)

    @torch.no_grad()
    def step(self, seed):
        torch.manual_seed(seed)
        for p in self.parameters():
            p += torch.randn_like(p)
        self.norm.running_mean += 1
        self.queue = self.queue + torch.randn(5)
        self.count = self.count + 1
        self.cache = self.cache * 1.5


class Kept(nn.Module):
    """ModelEmaV3's formula by itself, over names."""

    def __init__(self, model, exclude_buffers):
        super().__init__()
        self.module = copy.deepcopy(model)
        self.exclude_buffers = exclude_buffers

    @torch.no_grad()
    def update(self, model):
        live = dict(model.named_parameters())
        buffers = dict(model.named_buffers())
        if not self.exclude_buffers:
            live = model.state_dict()
            buffers = {}
        for name, a in (*self.module.named_parameters(), *self.module.named_buffers()):
            if name in buffers or (name in live and not a.is_floating_point()):
                a.copy_(buffers.get(name, live.get(name)))
            elif name in live:
                a.lerp_(live[name], 1 - DECAY)


def multi(module):
    return module.get_ema_multi_avg_fn(DECAY)


MAKE = {
    "AveragedModel": (
        lambda m: swa_utils.AveragedModel(m, multi_avg_fn=multi(swa_utils)),
        lambda m: theirs.AveragedModel(m, multi_avg_fn=multi(theirs)),
        "update_parameters",
    ),
    "AveragedModel, its buffers too": (
        lambda m: swa_utils.AveragedModel(m, multi_avg_fn=multi(swa_utils), use_buffers=True),
        lambda m: theirs.AveragedModel(m, multi_avg_fn=multi(theirs), use_buffers=True),
        "update_parameters",
    ),
    "ModelEmaV3": (lambda m: timm.ModelEmaV3(m, DECAY), lambda m: Kept(m, False), "update"),
    "ModelEmaV3, its buffers copied": (
        lambda m: timm.ModelEmaV3(m, DECAY, exclude_buffers=True),
        lambda m: Kept(m, True),
        "update",
    ),
}


def all_of(averaged):
    return {**averaged.module.state_dict(), **dict(averaged.module.named_buffers())}


class Pair:
    """A drop-in and what it is to agree with, after every update."""

    def __init__(self, name):
        ours, theirs, update = MAKE[name]
        self.model = Model()
        self.ours, self.theirs, self._update = ours(self.model), theirs(self.model), update

    def update(self):
        getattr(self.ours, self._update)(self.model)
        getattr(self.theirs, self._update)(self.model)
        assert_same(all_of(self.ours), all_of(self.theirs))

    def run(self, num_steps, first=0):
        for seed in range(first, first + num_steps):
            self.model.step(seed)
            self.update()


@pytest.fixture
def made(monkeypatch):
    """What is worked out anew: a name for each time."""
    calls = []

    def counted(owner, name, what):
        run = getattr(owner, name)

        def counting(self, *args, **kwargs):
            calls.append(what)
            return run(self, *args, **kwargs)

        monkeypatch.setattr(owner, name, counting)

    counted(plan.Plan, "__init__", "plan")
    counted(_pairs.Pairs, "__init__", "pairs")
    return calls


@pytest.mark.parametrize("name", MAKE)
def test_only_what_is_assigned_anew_is_worked_out_anew(backend, name, made):
    pair = Pair(name)
    pair.run(3)
    assert "pairs" in made
    made.clear()
    pair.run(5, first=3)
    assert made == []
    for child in (pair.model.norm, pair.ours.module):  # The first time a place moves: once a plan.
        key = "running_var" if child is pair.model.norm else "queue"
        setattr(child, key, getattr(child, key).clone())
        pair.update()
        made.clear()
        for seed in range(3):
            setattr(child, key, getattr(child, key).clone())
            pair.model.step(seed)
            pair.update()
        assert made == []


@pytest.mark.parametrize("name", MAKE)
def test_what_can_t_be_followed_by_itself(backend, name):
    pair = Pair(name)
    model = pair.model
    pair.run(2)
    model.layers[1] = copy.deepcopy(model.layers[2])
    pair.run(2)
    model.queue, model.norm.bias.data = model.queue.clone(), model.norm.bias.data.clone()
    model.norm.running_mean, model.norm.running_var = (
        model.norm.running_var,
        model.norm.running_mean,
    )
    pair.run(2)
    model.count = torch.tensor(7)
    model.layers[0].weight = nn.Parameter(model.layers[0].weight.detach() * 2)
    pair.run(2)
    for kept in (pair.ours, pair.theirs):
        kept.module.norm.running_var = kept.module.norm.running_var.clone()
        kept.module.queue = kept.module.queue.clone()
    pair.run(2)


@pytest.mark.parametrize("name", MAKE)
def test_buffers_that_come_to_be_one_are_an_error(backend, name):
    pair = Pair(name)
    pair.run(3)
    model = pair.model
    model.norm.running_mean = model.norm.running_var = torch.ones(3)
    before = {k: v.clone() for k, v in all_of(pair.ours).items()}
    with pytest.raises(ValueError, match=r"share memory|tensors but the model has"):
        getattr(pair.ours, pair._update)(model)
    assert_same(all_of(pair.ours), before)
    model.norm.running_var = model.norm.running_mean.clone()
    pair.run(2)


WRONG = {
    "shape": lambda m: setattr(m, "queue", torch.ones(1)),
    "number": lambda m: setattr(m, "later", torch.ones(2)),
    "none": lambda m: setattr(m, "queue", None),
    "another one": lambda m: m.register_buffer("more", torch.ones(2)),
}


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("wrong", WRONG)
def test_what_no_longer_fits_is_an_error_and_changes_nothing(name, wrong):
    pair = Pair(name)
    pair.run(3)
    model, queue = pair.model, pair.model.queue
    WRONG[wrong](model)
    before = {k: v.clone() for k, v in all_of(pair.ours).items()}
    for _ in range(2):
        with pytest.raises(ValueError, match=r"has \d+ tensors but the model has|has shape"):
            getattr(pair.ours, pair._update)(model)
    assert_same(all_of(pair.ours), before)
    model._buffers.pop("more", None)
    model.queue, model.later = queue, None
    pair.run(3)


@pytest.mark.parametrize("name", MAKE)
def test_old_buffers_are_let_go_without_the_garbage_collector(name):
    pair = Pair(name)
    pair.run(3)
    gc.collect()
    gc.disable()
    try:
        old = []
        for seed in range(4):
            old.append(weakref.ref(pair.model.queue))
            old.append(weakref.ref(pair.model.cache))
            pair.model.step(seed)
            pair.update()
        assert [ref() for ref in old] == [None] * 8
    finally:
        gc.enable()
