"""What becomes of buffers, by mode, and which are never averaged."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from fused_ema import EMAManager


class Kinds(nn.Module):
    """A running statistic, a counter, a mask, a switch, a flag and a codebook."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.weight = nn.Parameter(torch.zeros(3))
        self.register_buffer("mask", torch.tensor([0.0, -math.inf, math.inf]))
        self.register_buffer("switch", torch.tensor([0], dtype=torch.uint8))
        self.register_buffer("is_ready", torch.tensor(False))
        self.register_buffer("codebook", torch.zeros(2, 3))


BUFFERS = [name for name, _ in Kinds().named_buffers()]


def train(model):
    with torch.no_grad():
        model.weight += 1
        model.norm.running_mean += 1
        model.norm.running_var += 1
        model.norm.num_batches_tracked += 1
        model.switch += 1
        model.is_ready.fill_(True)
        model.codebook += 4


def after_two_updates(**settings):
    model = Kinds()
    ema = EMAManager(model, 0.25, **settings)
    for _ in range(2):
        train(model)
        ema.update()
    return model, dict(ema.named_emas())


AVERAGED = {"norm.running_mean": 0.6875, "codebook": 2.75}  # 1/4 of 1, 3/4 of that + 1/4 of 2
LIVE = {"norm.running_mean": 2.0, "codebook": 8.0}
FIRST = {"norm.num_batches_tracked": 0, "switch": 0, "is_ready": 0}
NOW = {"norm.num_batches_tracked": 2, "switch": 2, "is_ready": 1}
EXPECTED = {
    "auto": {"norm.running_mean": 0.6875, "codebook": 8.0, **NOW},
    "average": {**AVERAGED, **FIRST},
    "copy": {**LIVE, **NOW},
}


@pytest.mark.parametrize("mode", EXPECTED)
@pytest.mark.parametrize("form", ["lerp", "mul_add", "two_products"])
def test_modes(mode, form):
    model, emas = after_two_updates(buffers=mode, form=form)
    for name, value in EXPECTED[mode].items():
        assert torch.all(emas[name] == value), name
    # An infinite buffer is copied whatever the mode, not NaN.
    assert torch.equal(emas["mask"], model.mask)
    assert torch.all(emas["weight"] == 0.6875)


def test_auto_is_the_default_and_the_old_words_mean_the_same():
    for old, new in (
        ({}, "auto"),
        ({"copy_buffers": True}, "copy"),
        ({"skip_buffers": True}, "skip"),
    ):
        _, by_old = after_two_updates(**old)
        _, by_new = after_two_updates(buffers=new)
        assert by_old.keys() == by_new.keys()
        for name, tensor in by_old.items():
            assert torch.equal(tensor, by_new[name]), name
    assert not set(BUFFERS) & after_two_updates(buffers="skip")[1].keys()


def test_patterns_the_first_that_matches_counts():
    rules = {"code*": "average", "c*": "skip", "norm.running_var": "copy", "switch": "skip"}
    model, emas = after_two_updates(buffers=rules)
    assert "switch" not in emas
    assert torch.all(emas["codebook"] == AVERAGED["codebook"])
    assert torch.equal(emas["norm.running_var"], model.norm.running_var)
    assert torch.all(emas["norm.running_mean"] == 0.6875)  # "auto"
    assert emas["is_ready"]


def test_describe_says_what_and_why():
    model = Kinds()
    told = EMAManager(model, 0.1).describe()
    assert list(told) == list(model.state_dict())
    assert told["weight"] == "averaged: a parameter"
    assert told["norm.running_var"] == "averaged: a norm layer's running statistic"
    assert told["norm.num_batches_tracked"] == "copied: int64"
    assert told["codebook"] == "copied: no running statistic of a norm layer"
    told = EMAManager(model, 0.1, buffers="average").describe()
    assert told["mask"] == "copied: not finite when the manager was made"
    assert told["switch"] == "kept as first cloned: uint8"
    assert "18 elements" not in repr(EMAManager(model, 0.1, buffers="skip"))
    assert ", 5 copied, momentum" in repr(EMAManager(model, 0.1))
    assert ", 1 copied, 3 kept, momentum" in repr(EMAManager(model, 0.1, buffers="average"))


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"buffers": "both"}, ValueError, "'both' is none of 'auto', 'average', 'copy', 'skip'"),
        ({"buffers": {"mask": "no"}}, ValueError, "'no' is none of"),
        ({"buffers": {"mask": 1}}, TypeError, "a dictionary of name patterns"),
        ({"buffers": 3}, TypeError, "pass one of"),
        ({"buffers": {"nothing.*": "copy"}}, ValueError, r"'nothing\.\*' in buffers matches none"),
        ({"buffers": {"weight": "copy"}}, ValueError, "'weight' in buffers matches none of the"),
        ({"buffers": "copy", "skip_buffers": True}, ValueError, "both skip_buffers and buffers"),
    ],
)
def test_bad_modes(settings, error, says):
    with pytest.raises(error, match=says):
        EMAManager(Kinds(), 0.1, **settings)


def test_an_attention_mask_stays_a_mask():
    model = nn.Module()
    model.layer = nn.Linear(4, 4)
    model.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(4))
    before = model.mask.clone()
    for buffers in ("auto", "average"):
        ema = EMAManager(model, 0.1, buffers=buffers)
        ema.update()
        with ema.swapped():
            assert torch.equal(model.mask, before)


def test_spectral_norm_and_pruning():
    torch.manual_seed(0)
    model = nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(8, 8)),
        prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.2),
    )
    ema = EMAManager(model, 0.01)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(60):
        model(torch.randn(16, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 30:
            prune.l1_unstructured(model[1], "weight", 0.75)
            ema.refresh()
        ema.update()
    model.eval()
    with ema.swapped(), torch.no_grad():
        assert torch.linalg.matrix_norm(model[0].weight, 2).item() == pytest.approx(1, abs=0.05)
        assert (model[1].weight_mask == 0).float().mean().item() == pytest.approx(0.8, abs=0.01)
        assert set(model[1].weight_mask.unique().tolist()) == {0.0, 1.0}


def test_switches_of_fake_quantisation():
    observe = torch.ao.quantization
    model = nn.Sequential(
        nn.Linear(4, 4),
        observe.FakeQuantize(observe.MovingAverageMinMaxObserver, quant_min=0, quant_max=255),
    )
    model.apply(observe.disable_fake_quant)
    model(torch.randn(8, 4))
    ema = EMAManager(model, 0.1)
    model.apply(observe.enable_fake_quant)
    model.apply(observe.disable_observer)
    model(torch.randn(8, 4))
    ema.update()
    before = {name: tensor.clone() for name, tensor in ema.named_emas()}
    with torch.no_grad(), ema.swapped():
        assert model[1].fake_quant_enabled.item() == 1
        assert model[1].observer_enabled.item() == 0
        model(torch.randn(8, 4) * 100)
    for name, tensor in ema.named_emas():
        assert torch.equal(tensor, before[name]), name
