"""The drop-ins for teachers and target networks beside the originals, bit for bit."""

from __future__ import annotations

import copy
import gc
import weakref

import gymnasium
import pytest
import stable_baselines3
import stubs
import torch
from stable_baselines3.common import utils as sb3_utils
from test_readme import run
from torch import nn

stubs.install()

from lightly.models import utils as lightly_utils  # noqa: E402

from fused_ema.hooks import _teachers, lightly  # noqa: E402
from fused_ema.hooks import stable_baselines3 as ours  # noqa: E402
from fused_ema.testing import ROUNDINGS, assert_bits_equal  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


class Net(nn.Module):
    """With sizes around the vectors, tied weights and buffers."""

    def __init__(self, dtype=torch.float32, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(*(nn.Linear(n, n + 1) for n in (1, 3, 16, 33)))
        self.norm = nn.BatchNorm1d(17)
        self.head = nn.Linear(33, 34, bias=False)
        self.head.weight = self.body[3].weight
        self.to(dtype)


def move(model, step):
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.data.add_(torch.randn(p.shape, generator=generator).to(p.dtype), alpha=0.1)


def assert_same_tensors(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        if tensor.is_floating_point():
            assert_bits_equal(tensor, theirs[name], name)
        else:
            assert torch.equal(tensor, theirs[name])


def compare(update, their_update, dtype, settings, steps=4):
    """Each of the settings for some steps; the teachers and the models stay the same ones."""
    model, teacher = Net(dtype), Net(dtype, seed=1).requires_grad_(False)
    theirs = copy.deepcopy(teacher)
    for step in range(steps * len(settings)):
        move(model, step)
        update(model, teacher, settings[step // steps])
        their_update(model, theirs, settings[step // steps])
        assert_same_tensors(teacher.state_dict(), theirs.state_dict())


# ---- lightly

# 0.1: 1 - (1 - m) isn't m in fp64. 0.9, 0.99 and 0.992: torch's lists round them to bf16 and fp16.
DECAYS = (0.9, 0.99, 0.992, 0.996, 0.5, 0.1, 1.0, 0.0)


@pytest.mark.parametrize("dtype", ROUNDINGS)
def test_update_momentum(backend, dtype):
    compare(lightly.update_momentum, lightly_utils.update_momentum, dtype, DECAYS)


def test_update_momentum_after_a_conversion():
    model, teacher = Net(), Net(seed=1)
    theirs = copy.deepcopy(teacher)
    for step, dtype in enumerate((torch.float32, torch.bfloat16, torch.float32)):
        for module in (model, teacher, theirs):
            module.to(dtype)
        move(model, step)
        lightly.update_momentum(model, teacher, 0.99)
        lightly_utils.update_momentum(model, theirs, 0.99)
        assert_same_tensors(teacher.state_dict(), theirs.state_dict())


def test_the_lists_are_found_again_where_a_module_has_changed(monkeypatch):
    found = []
    real = _teachers.pairs_of
    monkeypatch.setattr(_teachers, "pairs_of", lambda *args: found.append(1) or real(*args))
    model, teacher = Net(), Net(seed=1)
    theirs = copy.deepcopy(teacher)

    def step():
        move(model, len(found))
        lightly.update_momentum(model, teacher, 0.9)
        lightly_utils.update_momentum(model, theirs, 0.9)
        assert_same_tensors(teacher.state_dict(), theirs.state_dict())
        return len(found)

    assert [step(), step()] == [1, 1]
    model.body[1].weight = nn.Parameter(torch.randn(4, 3))  # Another object.
    assert [step(), step()] == [2, 2]
    model.body[0] = nn.Linear(1, 2)  # Another child.
    assert [step(), step()] == [3, 3]
    for module in (teacher, theirs):
        module.body[2].bias = nn.Parameter(torch.zeros(17))
    assert [step(), step()] == [4, 4]
    model.body[0].weight.data = torch.randn(2, 1)  # The same one elsewhere: the plan follows.
    assert [step(), step()] == [4, 4]


def test_nothing_outlives_its_modules():
    model, teacher = Net(), Net(seed=1)
    lightly.update_momentum(model, teacher, 0.9)
    gone = [weakref.ref(x) for x in (model, teacher, model.head.weight, teacher.head.weight)]
    kept = len(_teachers._kept)
    del model, teacher
    gc.collect()
    assert [x() for x in gone] == [None] * 4
    assert len(_teachers._kept) == kept - 1


def test_a_pair_that_does_not_fit():
    model, teacher = Net(), Net(seed=1)
    before = copy.deepcopy(teacher.state_dict())
    for wrong, error, match in (
        (lambda: lightly.update_momentum(model, teacher, 1.5), ValueError, "m is 1.5"),
        (lambda: lightly.update_momentum(model, None, 0.9), TypeError, "teacher is a NoneType"),
        (lambda: lightly.update_momentum(model.body, teacher, 0.9), ValueError, "model has 8"),
        (lambda: lightly.update_momentum(model, model, 0.9), ValueError, "share memory"),
        (
            lambda: lightly.update_momentum(nn.Linear(2, 3), nn.Linear(3, 2), 0.9),
            ValueError,
            r"'weight' has shape \[3, 2\]",
        ),
    ):
        with pytest.raises(error, match=match):
            wrong()
    assert_same_tensors(teacher.state_dict(), before)


def test_readme_lightly():
    model, teacher = Net(), Net(seed=1)
    theirs = copy.deepcopy(teacher)
    run("lightly", model=model, model_momentum=teacher)
    lightly_utils.update_momentum(model, theirs, m=0.996)
    assert_same_tensors(teacher.state_dict(), theirs.state_dict())


# ---- stable-baselines3


@pytest.mark.parametrize("as_list", [False, True], ids=["parameters", "lists"])
@pytest.mark.parametrize("dtype", ROUNDINGS)
def test_polyak_update(backend, dtype, as_list):
    def by(function):
        def update(model, target, tau):
            lists = model.parameters(), target.parameters()
            if as_list:
                lists = map(list, lists)
            function(*lists, tau)

        return update

    compare(by(ours.polyak_update), by(sb3_utils.polyak_update), dtype, (0.005, 0.5, 0.9, 1.0, 0.0))


def test_generators_of_polyak_update_are_used_up_and_found_once(monkeypatch):
    found = []
    real = _teachers.pairs_of
    monkeypatch.setattr(_teachers, "pairs_of", lambda *args: found.append(1) or real(*args))
    model, target = Net(), Net(seed=1)
    for _ in range(3):
        lists = model.parameters(), target.parameters()
        ours.polyak_update(*lists, 0.1)
        assert [next(x, None) for x in lists] == [None, None]
    assert len(found) == 1
    # One that is begun is what is left of it, and so is a part of a module.
    started = model.parameters(), target.parameters()
    for x in started:
        next(x)
    first = target.body[0].weight.clone()
    ours.polyak_update(*started, 0.1)
    assert_bits_equal(target.body[0].weight, first)
    ours.polyak_update(model.body[0].parameters(recurse=False), target.body[0].parameters(), 1.0)
    assert_bits_equal(target.body[0].weight, model.body[0].weight)
    assert len(found) == 1


def test_lists_of_another_length():
    model, target = Net(), Net(seed=1)
    before = copy.deepcopy(target.state_dict())
    for lists in (
        (model.body.parameters(), target.parameters()),
        (list(model.body.parameters()), list(target.parameters())),
    ):
        with pytest.raises(ValueError, match="8"):
            ours.polyak_update(*lists, 0.5)
    with pytest.raises(ValueError, match="tau is 2"):
        ours.polyak_update(model.parameters(), target.parameters(), 2)
    assert_same_tensors(target.state_dict(), before)


@pytest.fixture
def replaced():
    """stable-baselines3 with our function, and its own again afterwards."""
    theirs = sb3_utils.polyak_update
    modules = [stable_baselines3.sac.sac, stable_baselines3.td3.td3, stable_baselines3.dqn.dqn]
    run("stable-baselines3")
    try:
        assert {module.polyak_update for module in (sb3_utils, *modules)} == {ours.polyak_update}
        yield lambda function: [setattr(m, "polyak_update", function) for m in modules]
    finally:
        for module in (sb3_utils, *modules):
            module.polyak_update = theirs
        del sb3_utils._fused_ema_replaced


class Toy(gymnasium.Env):
    """Ten steps of numbers drawn by seed, rewarded by the action."""

    def __init__(self, is_discrete):
        box = gymnasium.spaces.Box(-1, 1, (2,))
        self.observation_space = box
        self.action_space = gymnasium.spaces.Discrete(3) if is_discrete else box
        self.count = 0

    def observe(self):
        self.count += 1
        generator = torch.Generator().manual_seed(self.count)
        return torch.rand(2, generator=generator).numpy()

    def reset(self, seed=None, options=None):
        return self.observe(), {}

    def step(self, action):
        reward = float(torch.as_tensor(action).float().sum())
        return self.observe(), reward, self.count % 10 == 0, False, {}


@pytest.mark.parametrize("name", ["SAC", "TD3", "DQN"])
def test_algorithms_learn_the_same(name, replaced):
    theirs = sb3_utils._fused_ema_replaced
    states = []
    for function in (ours.polyak_update, theirs):
        calls = []

        def counting(*args, function=function, calls=calls):
            calls.append(1)
            function(*args)

        replaced(counting)
        options = {"target_update_interval": 2, "tau": 0.05} if name == "DQN" else {}
        algorithm = getattr(stable_baselines3, name)(
            "MlpPolicy",
            Toy(is_discrete=name == "DQN"),
            learning_starts=5,
            batch_size=4,
            buffer_size=100,
            seed=3,
            device="cpu",
            policy_kwargs={"net_arch": [8]},
            **options,
        )
        algorithm.learn(25)
        states.append(algorithm.policy.state_dict())
        assert len(calls) > 8
    assert_same_tensors(*states)


def test_no_module_is_walked_once_the_pairs_are_known(monkeypatch):
    model, target = Net(), Net(seed=1)
    ours.polyak_update(model.parameters(), target.parameters(), 0.1)
    lightly.update_momentum(model, target, 0.9)

    def walked(*args, **kwargs):
        raise AssertionError("a module was walked")

    monkeypatch.setattr(nn.Module, "named_modules", walked)
    monkeypatch.setattr(nn.Module, "_named_members", walked)
    expected = target.body[0].weight.detach().lerp(model.body[0].weight.detach(), 0.1)
    ours.polyak_update(model.parameters(), target.parameters(), 0.1)
    torch.testing.assert_close(target.body[0].weight.detach(), expected)
    lightly.update_momentum(model, target, 0.9)
