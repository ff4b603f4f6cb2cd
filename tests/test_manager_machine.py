"""A manager through any course of events, against plain tensors that say what it must hold."""

from __future__ import annotations

import copy
import io
import math
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)
from nets import TIED, Net, assert_same, same
from runs import examples, torch_update_, without_kernels
from torch import nn

from fused_ema import EMAManager, _slots
from fused_ema.testing import DTYPE_PAIRS


class Mixed(Net):
    """Net, and parts in narrow dtypes: with ema_dtype=None a swap sets their raw values aside."""

    def __init__(self, seed=0):
        super().__init__(seed=seed)
        self.narrow = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).to(torch.bfloat16)
        self.fp16 = nn.Linear(3, 2).half()


NAMES = tuple(Mixed().state_dict())
PARAMS = tuple(name for name, _ in Mixed().named_parameters(remove_duplicate=False))
BUFFERS = tuple(name for name in NAMES if name not in PARAMS)


def the_one(name):
    """The first name of a tied tensor, any other name as it is."""
    return TIED[0] if name == TIED[1] else name


def random_like(tensor, seed):
    generator = torch.Generator().manual_seed(seed)
    if not tensor.is_floating_point() and not tensor.is_complex():
        return torch.randint(100, tensor.shape, generator=generator).to(tensor.dtype)
    dtype = torch.complex64 if tensor.is_complex() else torch.float64
    values = 3 * torch.randn(tensor.shape, generator=generator, dtype=dtype).to(tensor.dtype)
    if tensor.is_floating_point() and tensor.numel() > 0 and seed % 7 == 0:
        values.view(-1)[0] = (math.nan, math.inf, -math.inf)[seed % 3]
    return values


class Truth:
    """What a model and its manager must hold, tensor by tensor; names are those of the_one()."""

    def __init__(self, model, setting):
        self.setting = setting
        self.raw = {the_one(n): t.clone() for n, t in model.state_dict().items()}
        self.tracked = [
            name
            for name in NAMES
            if not (setting["buffers"] == "skipped" and name in BUFFERS)
            and not (setting["exclude"] and fnmatchcase(name, setting["exclude"]))
        ]
        self.slots = list(dict.fromkeys(the_one(name) for name in self.tracked))
        self.ema = {}
        self.is_swapped = False
        # While swapped: what the model holds in place of the raw values that were set aside.
        self.held = {}
        self.was_swapped_in = False
        self.reset()

    def reset(self):
        self.ema = {n: self.raw[n].to(self.ema_dtype(n), copy=True) for n in self.slots}
        self.iteration = self.num_updates = 0

    def is_averaged(self, name):
        is_copied = name in BUFFERS and self.setting["buffers"] == "copied"
        return self.raw[name].is_floating_point() and not is_copied

    def ema_dtype(self, name):
        if name in self.ema:
            return self.ema[name].dtype
        own = self.raw[name].dtype
        keeps_own = self.setting["ema_dtype"] == "param" or not self.is_averaged(name)
        return own if keeps_own else torch.float32

    def momentum_at(self, iteration):
        momentum = self.setting["momentum"]
        return momentum(iteration) if callable(momentum) else momentum

    def is_due(self, iteration):
        return (
            iteration >= self.setting["begin"] and (iteration + 1) % self.setting["interval"] == 0
        )

    def update(self, iteration=None):
        i = self.iteration if iteration is None else iteration
        if i < self.setting["begin"]:
            self.ema = {n: self.raw[n].to(self.ema_dtype(n), copy=True) for n in self.slots}
        elif self.is_due(i):
            for name in self.slots:
                ema, raw = self.ema[name], self.raw[name]
                m = self.momentum_at(i)
                if self.is_averaged(name):
                    torch_update_(ema, raw, m, self.setting["form"])
                elif self.setting["buffers"] == "copied" and name in BUFFERS:
                    ema.copy_(raw)
            self.num_updates += 1
        self.iteration = i + 1

    def swap(self):
        if self.is_swapped and self.was_swapped_in and not self.setting["staged"]:
            # What was written to averaged buffers belongs to the average, rounding doesn't.
            for name in self.held:
                if name in BUFFERS and self.is_averaged(name):
                    ema, held = self.ema[name], self.held[name]
                    kept = (held == ema.to(held.dtype)) | (held.isnan() & ema.isnan())
                    self.ema[name] = torch.where(kept, ema, held.to(ema.dtype))
        self.is_swapped = self.was_swapped_in = not self.is_swapped
        self.held = {}
        if self.is_swapped:
            for name in self.slots:
                ema, raw = self.ema[name], self.raw[name]
                if ema.dtype != raw.dtype or self.setting["staged"]:
                    self.held[name] = ema.to(raw.dtype, copy=True)

    def write(self, name, values):
        """Somebody writes to the model: to what it holds at the moment."""
        name, values = the_one(name), values.clone()
        if not self.is_swapped or name not in self.slots:
            self.raw[name] = values
        elif name in self.held:
            self.held[name] = values
        else:
            self.ema[name] = values

    def copy_to_model(self):
        for name in self.slots:
            self.raw[name] = self.ema[name].to(self.raw[name].dtype, copy=True)

    def load(self, saved, *, with_model):
        """A saved state; taken while swapped, it sets the raw values of all slots aside."""
        now = {name: saved.raw[name] if with_model else self.raw[name] for name in self.raw}
        self.ema, self.is_swapped = dict(saved.ema), saved.is_swapped
        self.iteration, self.num_updates = saved.iteration, saved.num_updates
        self.held, self.was_swapped_in = {}, False
        if saved.is_swapped:
            shown = {the_one(n): t for n, t in saved.model().items()} if with_model else self.raw
            self.held = {name: shown[name] for name in self.slots}
            now |= {name: saved.raw[name] for name in self.slots}
        self.raw = now
        for tensors in (self.raw, self.ema, self.held):
            tensors.update({name: tensor.clone() for name, tensor in tensors.items()})

    def model(self):
        shown = self.raw | (self.ema | self.held if self.is_swapped else {})
        return {name: shown[the_one(name)] for name in NAMES}

    def named_emas(self):
        return {name: self.ema[the_one(name)] for name in self.tracked}

    def raw_while_swapped(self):
        return {name: self.raw[the_one(name)] for name in self.tracked} if self.is_swapped else {}


def uneven(iteration):
    return (0.25, 0.0, 0.5, 1.0, 0.9)[iteration % 5]


SETTINGS = st.fixed_dictionaries(
    {
        "momentum": st.sampled_from((0.25, 0.7, 2e-4, uneven)),
        "interval": st.integers(1, 3),
        "begin": st.integers(0, 3),
        "form": st.sampled_from(("lerp", "mul_add")),
        "ema_dtype": st.sampled_from((None, "param", torch.float32)),
        "buffers": st.sampled_from(("averaged", "skipped", "copied")),
        "exclude": st.sampled_from(("", "body.0.*", TIED[0])),
        # As if the emas were on another device than the model.
        "staged": st.sampled_from((False, False, True)),
    }
)
seeds = st.integers(0, 99)
orders = st.sampled_from((("model", "ema"), ("ema", "model"), ("ema",)))
is_raw = precondition(lambda self: not self.truth.is_swapped)
is_swapped = precondition(lambda self: self.truth.is_swapped)
MOVES = ("clone", "misaligned", "transposed")


class ManagerMachine(RuleBasedStateMachine):
    """One model and its manager, and the truth about them."""

    saves = Bundle("saves")

    # ---- what it is made of

    @initialize(setting=SETTINGS, has_kernels=st.sampled_from((True, True, False)))
    def make(self, setting, has_kernels):
        self.restored = ExitStack()
        if not has_kernels:
            self.restored.enter_context(without_kernels())
        if setting["staged"]:
            self.restored.callback(setattr, _slots, "needs_stage", _slots.needs_stage)
            _slots.needs_stage = lambda ema_device, param_device: True
        self.setting = setting
        self.bad_momentum = None
        self.left = []
        self.start(seed=0)

    def teardown(self):
        if hasattr(self, "restored"):
            self.restored.close()

    def start(self, seed):
        setting = self.setting
        given = setting["momentum"]
        self.model = Mixed(seed)
        self.ema = EMAManager(
            self.model,
            momentum_fun=self.momentum_at if callable(given) else None,
            interval=setting["interval"],
            begin=setting["begin"],
            form=setting["form"],
            ema_dtype=setting["ema_dtype"],
            buffers={"averaged": "average", "skipped": "skip", "copied": "copy"}[
                setting["buffers"]
            ],
            exclude=setting["exclude"] or (),
            device="cpu" if setting["staged"] else None,
            **({} if callable(given) else {"momentum": given}),
        )
        self.truth = Truth(self.model, setting)

    def momentum_at(self, iteration):
        if self.bad_momentum is not None:
            return self.bad_momentum
        return self.setting["momentum"](iteration)

    def tensor(self, name):
        return self.model.state_dict(keep_vars=True)[name]

    def assign(self, name, tensor):
        *path, key = name.split(".")
        setattr(self.model.get_submodule(".".join(path)), key, tensor)

    @invariant()
    def all_is_as_it_must_be(self):
        self.check()

    def check(self, replaced=None):
        """Compares everything; `replaced` are values that the model has under other tensors."""
        truth = self.truth
        found = (self.ema.iteration, self.ema.num_updates, self.ema.is_swapped)
        assert found == (truth.iteration, truth.num_updates, truth.is_swapped)
        assert_same(self.ema.named_emas(), truth.named_emas())
        assert_same(self.model.state_dict(), truth.model() | (replaced or {}))
        state = self.ema.state_dict()
        assert (state["iteration"], state["num_updates"], state["is_swapped"]) == found
        assert_same(state["ema"], truth.named_emas())
        assert_same(state["raw"], truth.raw_while_swapped())
        if not replaced:
            assert self.model.head.weight is self.model.embedding.weight
        for memory, was in self.left:
            same(memory, was, "memory that a tensor has left")

    @contextmanager
    def refused(self, error, match, replaced=None):
        with pytest.raises(error, match=match):
            yield
        self.check(replaced)

    def due(self):
        """Iterations at which an update looks at the model."""
        first = next(i for i in range(99) if self.truth.is_due(i))
        return (0, first) if self.setting["begin"] else (first,)

    def ops(self):
        """All that a manager refuses to do with a model that it doesn't know."""
        state = copy.deepcopy(self.ema.state_dict())
        for i in self.due():
            yield "update", lambda i=i: self.ema.update(i)
        yield "swap", self.ema.swap
        yield "swapped", lambda: self.ema.swapped().__enter__()
        yield "reset", self.ema.reset
        yield "load_state_dict", lambda: self.ema.load_state_dict(state)

    # ---- training

    @is_raw
    @rule(seed=seeds)
    def train(self, seed):
        self.write_to(NAMES, seed)

    def write_to(self, names, seed):
        with torch.no_grad():
            for name in dict.fromkeys(map(the_one, names)):
                tensor = self.tensor(name)
                values = random_like(tensor, 100 * seed + NAMES.index(name))
                tensor.copy_(values)
                self.truth.write(name, values)

    @is_raw
    @rule(iteration=st.none() | st.integers(0, 9))
    def update(self, iteration):
        self.ema.update(iteration)
        self.truth.update(iteration)

    @is_raw
    @rule()
    def train_and_update(self):
        for _ in range(self.setting["interval"]):
            self.train(self.truth.iteration)
            self.update(None)

    @is_raw
    @rule()
    def reset(self):
        self.ema.reset()
        self.truth.reset()

    # ---- swaps

    @rule()
    def swap(self):
        self.ema.swap()
        self.truth.swap()

    @is_swapped
    @rule(names=st.sets(st.sampled_from(NAMES), min_size=1), seed=seeds)
    def write_while_swapped(self, names, seed):
        self.write_to(sorted(names), seed)

    @is_raw
    @rule(
        target=saves,
        events=st.lists(
            st.tuples(st.sampled_from(("write", "move", "assign", "save", "refuse")), seeds),
            max_size=4,
        ),
        error=st.sampled_from((None, ValueError, KeyboardInterrupt, GeneratorExit)),
    )
    def evaluate(self, events, error):
        saved = []
        with ExitStack() as stack:
            if error is not None:
                stack.enter_context(pytest.raises(error))
            stack.enter_context(self.ema.swapped())
            self.truth.swap()
            self.check()
            for event, seed in events:
                if event == "write":
                    self.write_to(NAMES[seed % 7 :: seed % 3 + 1], seed)
                elif event == "move":
                    self.move(set(NAMES[seed % 5 :: 3]), MOVES[seed % 3])
                elif event == "assign":
                    self.assign_buffer(BUFFERS[seed % len(BUFFERS)], seed)
                elif event == "save":
                    saved.append(self.save(through_a_file=seed % 2 == 0))
                else:
                    self.refuse_while_swapped()
                self.check()
            if error is not None:
                raise error
        self.truth.swap()
        return multiple(*saved)

    @is_swapped
    @rule()
    def refuse_while_swapped(self):
        message = "the model (is swapped|holds the ema)"
        calls = {name: call for name, call in self.ops() if name != "swap"}
        calls["refresh"] = self.ema.refresh
        calls["copy_to"] = lambda: self.ema.copy_to(self.model)
        for name, call in calls.items():
            with self.refused(RuntimeError, rf"EMAManager\.{name}: {message}"):
                call()

    # ---- checkpoints

    @rule(target=saves, through_a_file=st.booleans())
    def save(self, through_a_file):
        state = {"model": self.model.state_dict(), "ema": self.ema.state_dict()}
        if through_a_file:
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        else:
            state = copy.deepcopy(state)
        return state, copy.deepcopy(self.truth)

    @rule(
        saved=saves,
        order=orders,
        fresh=st.booleans(),
    )
    def load(self, saved, order, fresh):
        state, truth = saved
        if fresh:
            self.start(seed=1)
            self.write_to(NAMES, 3)
        elif self.truth.is_swapped:
            with self.refused(RuntimeError, "load_state_dict: the model is swapped"):
                self.ema.load_state_dict(state["ema"])
            return
        for part in order:
            getattr(self, part).load_state_dict(state[part])
        self.truth.load(truth, with_model="model" in order)

    @is_raw
    @rule(through_a_file=st.booleans(), seed=seeds, order=orders, fresh=st.booleans())
    def resume(self, through_a_file, seed, order, fresh):
        self.train(seed)
        saved = self.save(through_a_file)
        self.train(seed + 1)
        self.update(self.due()[-1])
        self.load(saved, order, fresh)

    @is_raw
    @rule()
    def load_its_own_state(self):
        self.ema.load_state_dict(self.ema.state_dict())

    @is_raw
    @rule(
        fault=st.sampled_from(("missing", "surplus", "shape", "dtype", "version", "count", "raw")),
        seed=seeds,
    )
    def load_what_does_not_fit(self, fault, seed):
        state = copy.deepcopy(self.ema.state_dict())
        name = list(state["ema"])[seed % len(state["ema"])]
        # What would be loaded but for the fault differs from what is there.
        state["ema"] = {n: random_like(t, 5) for n, t in state["ema"].items()}
        state["iteration"] += 1
        if fault == "missing":
            del state["ema"][name]
        elif fault == "surplus":
            state["ema"]["other"] = torch.zeros(2)
        elif fault == "shape":
            state["ema"][name] = torch.zeros(2, 9, dtype=state["ema"][name].dtype)
        elif fault == "dtype":
            state["ema"][name] = state["ema"][name].to(torch.complex128)
        elif fault == "version":
            state["version"] = 2
        elif fault == "count":
            state["num_updates"] = -1
        else:
            state["is_swapped"] = True
        with self.refused(ValueError, r"EMAManager\.load_state_dict: "):
            self.ema.load_state_dict(state)

    # ---- other models, and the own one for good

    @rule(seed=seeds)
    def copy_to_another(self, seed):
        other = Mixed(seed)
        other.fp16.float()
        other.body.to(torch.bfloat16)
        other.narrow[0].to(torch.float64)
        expected = {name: tensor.clone() for name, tensor in other.state_dict().items()}
        for name, ema in self.truth.ema.items():
            for alias in TIED if name == TIED[0] else (name,):
                expected[alias] = ema.to(expected[alias].dtype)
        self.ema.copy_to(other)
        assert_same(other.state_dict(), expected)

    @is_raw
    @rule()
    def copy_to_its_own(self):
        self.ema.copy_to(self.model)
        self.truth.copy_to_model()

    # ---- a model that changes

    @rule(names=st.sets(st.sampled_from(NAMES), min_size=1), how=st.sampled_from(MOVES))
    def move(self, names, how):
        for name in sorted(set(map(the_one, names))):
            tensor = self.tensor(name)
            old = tensor.data
            if how == "misaligned":
                new = torch.empty(old.numel() + 1, dtype=old.dtype)[1:].view(old.shape)
            elif how == "transposed" and old.dim() > 1:
                new = torch.empty(old.t().shape if old.dim() == 2 else old.mT.shape).to(old).mT
            else:
                new = torch.empty_like(old)
            tensor.data = new.copy_(old)
            self.left = [*self.left[-9:], (old, old.clone())]

    @rule(name=st.sampled_from(BUFFERS), seed=seeds)
    def assign_buffer(self, name, seed):
        values = random_like(self.tensor(name), seed)
        self.assign(name, values.clone())
        self.truth.write(name, values)

    @is_raw
    @rule(name=st.sampled_from(PARAMS), seed=seeds, refreshes=st.booleans())
    def replace_parameter(self, name, seed, refreshes):
        if name not in self.truth.tracked:
            return
        old = self.tensor(name)
        values = random_like(old, seed)
        calls = list(self.ops())
        self.assign(name, nn.Parameter(values.clone(), requires_grad=old.requires_grad))
        for op, call in calls:
            message = rf"EMAManager\.{op}: the model has changed[^\n]*\n  '{name}' was replaced"
            with self.refused(RuntimeError, message, {name: values}):
                call()
        if refreshes and name not in TIED:
            assert self.ema.refresh() == []
            self.truth.write(name, values)
        else:
            self.assign(name, old)

    @is_raw
    @rule(name=st.sampled_from(PARAMS), seed=seeds)
    def replace_parameter_while_swapped(self, name, seed):
        old = self.tensor(name)
        values = random_like(old, seed)
        with self.ema.swapped():
            self.assign(name, nn.Parameter(values.clone(), requires_grad=old.requires_grad))
        self.check({name: values})
        same(old.detach(), self.truth.raw[the_one(name)], name)
        self.assign(name, old)

    @is_raw
    @rule()
    def add_a_module(self):
        calls = list(self.ops())
        self.model.extra = nn.Linear(2, 2)
        added = {name: t for name, t in self.model.state_dict().items() if name not in NAMES}
        for op, call in calls:
            message = rf"EMAManager\.{op}: the model has changed[^\n]*\n  'extra.weight' is new"
            with self.refused(RuntimeError, message, added):
                call()
        del self.model.extra

    @is_raw
    @rule(name=st.sampled_from(PARAMS))
    def resize_parameter(self, name):
        if the_one(name) not in self.truth.slots:
            return
        param = self.tensor(name)
        kept, calls = param.data, list(self.ops())
        param.data = torch.zeros(2, 3, 5, dtype=param.dtype)
        resized = dict.fromkeys(TIED if name in TIED else (name,), param.data)
        for op, call in calls:
            with self.refused(ValueError, rf"EMAManager\.{op}: '.*' has shape", resized):
                call()
        param.data = kept

    @is_raw
    @rule(name=st.sampled_from(PARAMS), seed=seeds)
    def convert_parameter_for_a_while(self, name, seed):
        name, truth = the_one(name), self.truth
        param, own = self.tensor(name), truth.raw[name].dtype
        other = torch.bfloat16 if own == torch.float32 else torch.float32
        fits = name not in truth.slots or (truth.ema[name].dtype, other) in DTYPE_PAIRS
        param.data, truth.raw[name] = param.data.to(other), truth.raw[name].to(other)
        self.train(seed)
        for i in self.due():
            if fits:
                self.update(i)
            else:
                with self.refused(TypeError, rf"'{name}' is .* these can't be averaged"):
                    self.ema.update(i)
        self.evaluate([("write", seed)], None)
        self.check()
        param.data, truth.raw[name] = param.data.to(own), truth.raw[name].to(own)

    @is_raw
    @rule()
    def refresh_what_has_not_changed(self):
        assert self.ema.refresh() == []

    # ---- bad arguments

    @is_raw
    @rule(iteration=st.sampled_from((-1, 1.0, True, "1")))
    def update_at_no_iteration(self, iteration):
        with self.refused(ValueError, r"update: iteration is .*a whole number from 0"):
            self.ema.update(iteration)

    @precondition(lambda self: not self.truth.is_swapped and callable(self.setting["momentum"]))
    @rule(bad=st.sampled_from((math.nan, 1.5, -0.25, "0.5")))
    def update_with_no_momentum(self, bad):
        self.bad_momentum = bad
        error = TypeError if isinstance(bad, str) else ValueError
        with self.refused(error, rf"momentum_fun\({self.due()[-1]}\) returned"):
            self.ema.update(self.due()[-1])
        self.bad_momentum = None


@pytest.mark.filterwarnings("ignore:.*while the model held the ema:UserWarning")
class TestManager(ManagerMachine.TestCase):
    pass


TestManager.settings = examples(60, stateful_step_count=25)
