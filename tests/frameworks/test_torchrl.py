"""torchrl's updaters beside ours, bit for bit, on its own losses."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from tensordict import TensorDict
from test_readme import run
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torchrl.data import Bounded
    from torchrl.modules import NormalParamExtractor, TanhNormal, ValueOperator
    from torchrl.modules.tensordict_module import ProbabilisticActor, SafeModule
    from torchrl.objectives import HardUpdate, SACLoss, SoftUpdate

    from fused_ema.hooks import torchrl as ours

from fused_ema.testing import ROUNDINGS, assert_bits_equal

pytestmark = pytest.mark.filterwarnings("ignore")


class Value(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 33), nn.Tanh(), nn.Linear(33, 1))

    def forward(self, *seen):
        return self.net(torch.cat(seen, -1))


def make_loss(dtype=torch.float32):
    """SAC's: three Q networks are stacked, and each has a target."""
    torch.manual_seed(0)
    spec = Bounded(-torch.ones(2), torch.ones(2), (2,))
    net = SafeModule(
        nn.Sequential(nn.Linear(3, 4), NormalParamExtractor()),
        in_keys=["observation"],
        out_keys=["loc", "scale"],
    )
    keys = {"in_keys": ["loc", "scale"], "spec": spec, "distribution_class": TanhNormal}
    actor = ProbabilisticActor(module=net, **keys)
    qvalue = ValueOperator(module=Value(), in_keys=["observation", "action"])
    return SACLoss(actor, qvalue, num_qvalue_nets=3).to(dtype)


def batch(step):
    torch.manual_seed(100 + step)
    end = torch.zeros(4, 1, dtype=torch.bool)
    after = {"observation": torch.randn(4, 3), "reward": torch.randn(4, 1)}
    after |= {"done": end, "terminated": end}
    before = {"observation": torch.randn(4, 3), "action": torch.rand(4, 2)}
    return TensorDict(before | {"next": after}, [4])


def train(loss, updater, steps):
    optimizer = torch.optim.Adam([p for p in loss.parameters() if p.requires_grad], lr=0.05)
    for step in range(steps):
        losses = loss(batch(step))
        (losses["loss_actor"] + losses["loss_qvalue"] + losses["loss_alpha"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        updater.step()
        yield targets_of(loss)


def targets_of(loss):
    params = loss.target_qvalue_network_params
    return {key: value.detach().clone() for key, value in params.items(True, True)}


def assert_same_targets(one, other):
    assert len(one) == 4
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert_bits_equal(tensor, other[key], str(key))


@pytest.mark.parametrize("settings", [{"tau": 0.005}, {"eps": 0.9}, {"tau": 0.7}], ids=str)
def test_a_training_with_soft_updates(backend, settings):
    one, other = make_loss(), make_loss()
    first = targets_of(one)
    assert first["module", "net", "0", "weight"].shape == (3, 33, 5)  # Stacked.
    pairs = zip(
        train(one, ours.SoftUpdate(one, **settings), 6),
        train(other, SoftUpdate(other, **settings), 6),
        strict=True,
    )
    for mine, theirs in pairs:
        assert_same_targets(mine, theirs)
    assert not torch.equal(
        mine["module", "net", "0", "weight"], first["module", "net", "0", "weight"]
    )


@pytest.mark.parametrize("dtype", ROUNDINGS)
def test_soft_updates_of_each_dtype(dtype):
    one, other = make_loss(dtype), make_loss(dtype)
    updaters = ours.SoftUpdate(one, tau=0.01), SoftUpdate(other, tau=0.01)
    for step in range(3):
        for loss, updater in zip((one, other), updaters, strict=True):
            generator = torch.Generator().manual_seed(step)
            for p in loss.qvalue_network_params.parameters():
                p.data.add_(torch.randn(p.shape, generator=generator).to(dtype))
            updater.step()
        assert_same_targets(targets_of(one), targets_of(other))


def test_hard_updates(backend):
    one, other = make_loss(), make_loss()
    updaters = [
        kind(loss, value_network_update_interval=2)
        for kind, loss in ((ours.HardUpdate, one), (HardUpdate, other))
    ]
    seen = []
    pairs = zip(train(one, updaters[0], 8), train(other, updaters[1], 8), strict=True)
    for mine, theirs in pairs:
        assert_same_targets(mine, theirs)
        assert updaters[0].counter == updaters[1].counter
        seen.append(mine["module", "net", "0", "weight"])
    changes = [step for step in range(1, 8) if not torch.equal(seen[step], seen[step - 1])]
    assert changes == [2, 5]


def test_state_and_copies():
    loss = make_loss()
    updater = ours.HardUpdate(loss, value_network_update_interval=3)
    for _ in train(loss, updater, 2):
        pass
    theirs = HardUpdate(make_loss(), value_network_update_interval=3)
    theirs.load_state_dict(updater.state_dict())
    assert theirs.counter == 2
    # A copy moves its own tensors.
    twin_loss, twin = copy.deepcopy((loss, updater))
    before = targets_of(loss)
    for _ in train(twin_loss, twin, 3):
        pass
    assert twin.counter == 1
    assert_same_targets(targets_of(loss), before)


def test_the_pairs_are_found_again_after_init():
    loss, other = make_loss(), make_loss()
    mine, theirs = ours.SoftUpdate(loss, tau=0.1), SoftUpdate(other, tau=0.1)
    for updater, of in ((mine, loss), (theirs, other)):
        updater.step()
        updater.init_()
        of.qvalue_network_params.data.add_(1.0)
        updater.step()
    assert_same_targets(targets_of(loss), targets_of(other))


def test_what_is_refused():
    loss = make_loss()
    updater = ours.SoftUpdate(loss, tau=0.1)
    before = targets_of(loss)
    updater.initialized = False
    with pytest.raises(RuntimeError, match=r"init_\(\) before step"):
        updater.step()
    updater.initialized = True
    with pytest.raises(ValueError, match="One and only one"):
        ours.SoftUpdate(loss, tau=0.1, eps=0.9)
    assert_same_targets(targets_of(loss), before)


def test_readme_torchrl():
    one, other = make_loss(), make_loss()
    updater = run("torchrl", loss_module=one)["updater"]
    assert type(updater) is ours.SoftUpdate
    pairs = zip(train(one, updater, 3), train(other, SoftUpdate(other, tau=0.005), 3), strict=True)
    for mine, theirs in pairs:
        assert_same_targets(mine, theirs)
