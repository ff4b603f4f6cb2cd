"""EMAManager.averaged_model: a copy of the model that holds an average."""

from __future__ import annotations

import pytest
import torch
from nets import TIED, Net, assert_same, move, same, values_of
from torch import nn

from fused_ema import EMAManager


def test_it_holds_the_average_and_is_the_model_otherwise():
    model = Net()
    calls = []
    model.head.register_forward_hook(lambda *args: calls.append(args[0]))
    model.body[1].eval()
    ema = EMAManager(torch.compile(nn.DataParallel(model), backend="eager"), 0.25, exclude="frozen")
    move(model, 0)
    ema.update()
    move(model, 1)
    raw = values_of(model)
    expected = raw | {name: tensor.clone() for name, tensor in ema.named_emas()}
    assert not torch.equal(expected["scale"], raw["scale"])

    copied = ema.averaged_model()
    with ema.swapped():
        inside = ema.averaged_model()
    ema.update()  # Reaches neither.
    for one in (copied, inside):
        assert type(one) is Net
        assert_same(one.state_dict(), expected)
        same(one.scratch, model.scratch, "scratch")
        assert one.head.weight is one.embedding.weight, TIED
        assert [m.training for m in one.modules()] == [m.training for m in model.modules()]
        assert not one.frozen.requires_grad
        assert one.scale.requires_grad
        one.head(torch.ones(1, 5))
        assert calls.pop() is one.head
    assert_same(model.state_dict(), raw)
    own = {t.untyped_storage().data_ptr() for t in model.state_dict().values() if t.numel()}
    assert not own & {t.untyped_storage().data_ptr() for t in copied.state_dict().values()}


def test_of_several_averages_one_is_named():
    model = nn.Linear(3, 2)
    model.ema = EMAManager(model, {"fast": 0.5, "slow": 0.125})  # As an attribute, too.
    move(model, 0)
    model.ema.update()
    for name in model.ema.averages:
        copied = model.ema.averaged_model(name)
        assert_same(copied.state_dict(), dict(model.ema.named_emas(name)))
        assert copied.ema is model.ema
    for name in (None, "medium"):
        with pytest.raises(ValueError, match=r"averaged_model: .*fast.*slow"):
            model.ema.averaged_model(name)


def test_parts_of_a_model_may_be_compiled():
    model = nn.Sequential(nn.Linear(3, 3), torch.compile(nn.Linear(3, 3), backend="eager"))
    model[0].compile(backend="eager")
    ema = EMAManager(model, 0.5)
    move(model, 0)
    ema.update()
    assert_same(EMAManager(ema.averaged_model()).named_emas(), dict(ema.named_emas()))


def test_a_model_that_cannot_be_copied():
    model = nn.Linear(3, 2)
    model.last = model.weight * 2  # Of a graph.
    ema = EMAManager(model)
    with pytest.raises(
        RuntimeError, match=r"averaged_model: the Linear can't be copied: .*copy_to"
    ):
        ema.averaged_model()
