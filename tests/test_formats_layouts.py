"""Which tensors of a checkpoint are the average and which the model's own, layout by layout."""

from __future__ import annotations

import pytest
import torch
from nets import assert_same, move
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fused_ema import EMAManager, state
from fused_ema.formats import FormatError


def a_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def copied(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


@pytest.fixture
def trained():
    """A net with an average of it that differs from it in every floating-point tensor."""
    net = a_net()
    averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    for step in range(3):
        move(net, step)
        averaged.update_parameters(net)
    raw, ema = copied(net.state_dict()), copied(averaged.module.state_dict())
    assert all(not torch.equal(raw[n], ema[n]) for n in raw if raw[n].is_floating_point())
    return net, averaged, raw, ema


def within(prefix, tensors):
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def check(found, raw, ema):
    assert_same(found.ema, ema)
    assert_same(found.raw, raw)


# ---- ema_state_dict beside state_dict


def test_an_averaged_model_in_ema_state_dict(trained, tmp_path):
    net, averaged, raw, ema = trained
    data = {"epoch": 3, "state_dict": net.state_dict(), "ema_state_dict": averaged.state_dict()}
    torch.save(data, tmp_path / "x.pth.tar")
    for source in (data, tmp_path / "x.pth.tar"):
        for model in (None, net):
            found = state.read(source, model=model)
            check(found, raw, ema)
            assert (found.format, found.num_updates) == ("averaged_model", 3)
            assert (found.ema_at, found.raw_at) == ("ema_state_dict.module.*", "state_dict")
    # A run that goes on trains from the raw weights.
    manager = EMAManager(net, 0.5)
    net.load_state_dict(ema)
    state.load_into(manager, found)
    net.load_state_dict(found.raw)
    assert_same(net.state_dict(), raw)
    assert_same(dict(manager.named_emas()), ema)


@pytest.mark.parametrize("main", ["", "module."])
@pytest.mark.parametrize("inner", ["", "module."])
def test_ema_state_dict_is_the_average(main, inner, trained):
    net, _, raw, ema = trained
    data = {"epoch": 3, "state_dict": within(main, raw), "ema_state_dict": within(inner, ema)}
    for model in (None, net):
        found = state.read(data, model=model)
        check(found, raw, ema)
        assert (found.format, found.epoch) == ("ema_state_dict", 3)
        assert (found.ema_at, found.raw_at) == ("ema_state_dict", "state_dict")
    del data["state_dict"]
    check(state.read(data), {}, ema)


def test_ema_state_dict_is_raw_where_the_file_is_of_mmengine(trained):
    _, _, raw, ema = trained
    inner = within("module.", raw)
    steps, meta = {"steps": torch.tensor(7)}, {"epoch": 1, "mmengine_version": "0.10.7"}
    for data in (
        {"state_dict": ema, "ema_state_dict": steps | inner},
        {"meta": meta, "state_dict": ema, "ema_state_dict": steps | inner},
        {"meta": meta, "state_dict": ema, "ema_state_dict": inner},
    ):
        found = state.read(data)
        assert found.format == "mmengine"
        check(found, raw, ema)
    # Where it is the caller who says so.
    data = {"state_dict": ema, "ema_state_dict": inner}
    check(state.read(data, format="mmengine"), raw, ema)
    # And the other way round.
    check(state.read({"state_dict": raw, "ema_state_dict": within("module.", ema)}), raw, ema)


def test_a_file_of_mmengine_that_doesnt_fit(trained):
    _, _, raw, ema = trained
    inner = {"steps": torch.tensor(7), **within("module.", raw), "module.x": torch.zeros(1)}
    with pytest.raises(FormatError, match="no file of MMEngine") as error:
        state.read({"state_dict": ema, "ema_state_dict": inner})
    assert "'x' of ema_state_dict is not in state_dict" in str(error.value)
    with pytest.raises(FormatError, match="doesn't have the format 'mmengine'"):
        state.read({"state_dict": raw, "ema_state_dict": ema}, format="mmengine")


def test_an_average_of_something_else(trained):
    _, _, raw, ema = trained
    other = {"other.weight": torch.zeros(2)}
    found = state.read({"state_dict": other, "ema_state_dict": ema})
    check(found, {}, ema)
    assert found.raw_at == ""
    wrong = {**raw, "0.weight": torch.zeros(2, 2)}
    with pytest.raises(FormatError, match=r"'0.weight' has shape \[4, 3\] in ema_state_dict but"):
        state.read({"state_dict": wrong, "ema_state_dict": ema})


@pytest.mark.parametrize("key", ["state_dict_ema", "ema_state_dict", "ema", "mine"])
def test_an_averaged_model_under_a_key_is_no_list_of_names(key, trained):
    net, averaged, raw, ema = trained
    found = state.read({"state_dict": raw, key: averaged.state_dict()}, model=net)
    check(found, raw, ema)
    assert (found.format, found.num_updates) == ("averaged_model", 3)
