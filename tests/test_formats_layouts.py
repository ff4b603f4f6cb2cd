"""Which tensors of a checkpoint are the average and which the model's own, layout by layout."""

from __future__ import annotations

import argparse
import ast
import json
from pathlib import Path

import pytest
import torch
from nets import assert_same, move
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fused_ema import EMAManager, _safetensors, formats, state
from fused_ema.__main__ import main
from fused_ema.formats import FormatError, Found


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
    """By name: safetensors files have an order of their own."""
    for actual, expected in ((found.ema, ema), (found.raw, raw)):
        assert actual.keys() == expected.keys()
        assert_same({name: actual[name] for name in expected}, expected)


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


@pytest.mark.parametrize("outer", ["", "module."])
@pytest.mark.parametrize("inner", ["", "module."])
def test_ema_state_dict_is_the_average(outer, inner, trained):
    net, _, raw, ema = trained
    data = {"epoch": 3, "state_dict": within(outer, raw), "ema_state_dict": within(inner, ema)}
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


def test_an_ema_state_dict_of_mmengine_alone(trained, tmp_path):
    """It holds the raw weights there, and the average where somebody saved the wrapper."""
    _, _, _, ema = trained
    own = {"steps": torch.tensor(7), **within("module.", ema)}
    for data in ({"ema_state_dict": own}, {"ema_state_dict": own, "model": ema}):
        with pytest.raises(FormatError, match="there is no state_dict beside it"):
            state.read(data)
        with pytest.raises(FormatError, match=r"has names of the format 'mmengine'.*'steps'"):
            state.read(data, key="ema_state_dict", format="state_dict")
        found = state.read(data, key="ema_state_dict", prefix="module.", format="state_dict")
        check(found, ema if "model" in data else {}, ema)
    with pytest.raises(FormatError, match=r"has names of the format 'mmengine'.*'steps'"):
        state.read(in_each_container(tmp_path, own)[2])


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


# ---- what a file holds doesn't depend on what contains it


def in_each_container(folder, tensors):
    """The same tensors as a dictionary, a file of torch and a file of safetensors."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    torch.save(tensors, folder / "x.pt")
    with (folder / "x.safetensors").open("wb") as file:
        _safetensors.write_file(file, tensors, {"format": "pt"})
    return tensors, folder / "x.pt", folder / "x.safetensors"


COUNTERS = {"initted": torch.tensor(True), "step": torch.tensor(7)}


@pytest.mark.parametrize("online", [False, True])
def test_ema_pytorch_in_each_container(online, trained, tmp_path, capsys):
    net, _, raw, ema = trained
    own = COUNTERS | within("ema_model.", ema)
    own |= within("online_model.", raw) if online else {}
    for source in in_each_container(tmp_path, own):
        for name in (None, "ema_pytorch"):
            found = state.read(source, model=net, format=name)
            check(found, raw if online else {}, ema)
            assert (found.format, found.iteration, found.num_updates) == ("ema_pytorch", 7, None)
    out = tmp_path / "out.safetensors"
    words = ["convert", str(tmp_path / "x.safetensors"), str(out), "--to", "safetensors"]
    assert main(words) == 0
    capsys.readouterr()
    found = state.read(out)
    check(found, {}, ema)
    assert found.iteration == 7


def test_ema_pytorch_as_f5_tts_keeps_it(trained):
    net, _, raw, ema = trained
    own = COUNTERS | within("ema_model.", ema)
    data = {"model_state_dict": raw, "ema_model_state_dict": own, "update": 9}
    found = state.read(data, model=net)
    check(found, raw, ema)
    assert (found.format, found.raw_at) == ("ema_pytorch", "model_state_dict")
    check(state.read({"ema_model_state_dict": own}), {}, ema)


def test_shards_are_one_file(trained, tmp_path, capsys):
    _, _, raw, ema = trained
    own = COUNTERS | within("online_model.", raw) | within("ema_model.", ema)
    index = "model.safetensors.index.json"
    a_folder(tmp_path, shards("model", own), index)
    found = state.read(tmp_path / index)
    check(found, raw, ema)
    assert (found.format, found.iteration) == ("ema_pytorch", 7)
    # An index tells the names of a model, too.
    (tmp_path / index).unlink()
    a_folder(tmp_path, shards("names", ema), index)
    torch.save({"mine": lit_ema_of(a_net(), ema)}, tmp_path / "x.pt")
    words = ["convert", str(tmp_path / "x.pt"), str(tmp_path / "out"), "--to", "state_dict"]
    assert main([*words, "--model-names", str(tmp_path / index)]) == 0
    averages = {name: ema[name] for name, _ in a_net().named_parameters()}
    check(state.read(tmp_path / "out", format="state_dict"), {}, averages)
    capsys.readouterr()


def test_the_raw_weights_of_another_model(trained):
    net, averaged, raw, ema = trained
    other = {"other.weight": torch.zeros(2)}
    for key in ("mine", "ema_state_dict"):
        data = {key: averaged.state_dict(), "model": other}
        found = state.read(data, model=net)
        check(found, {}, ema)
        assert found.raw_at == ""
        check(state.read({**data, "net": raw}), raw, ema)


def test_other_formats_in_each_container(trained, tmp_path):
    net, averaged, raw, ema = trained
    for source in in_each_container(tmp_path, averaged.state_dict()):
        found = state.read(source, model=net)
        check(found, {}, ema)
        assert (found.format, found.num_updates) == ("averaged_model", 3)
    flat = {f"ema_{name.replace('.', '_')}": tensor for name, tensor in ema.items()}
    for source in in_each_container(tmp_path, raw | flat):
        with pytest.raises(FormatError, match="main='ema' or main='raw'"):
            state.read(source)
        check(state.read(source, main="raw"), raw, ema)


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("ema_model.", "ema_model."),
        ("wrapper.ema_model.", "wrapper.ema_model."),
        ("online_model.", "online_model."),
        ("ema.", "ema."),
    ],
)
def test_names_of_a_known_format_are_not_the_whole_average(name, prefix, trained, tmp_path):
    _, _, raw, ema = trained
    own = within(name, ema) | within("other.", raw)
    for source in in_each_container(tmp_path, own)[1:]:
        is_plain = source.suffix == ".pt"
        chosen = "state_dict" if is_plain else None
        with pytest.raises(FormatError, match="has names of the format") as error:
            state.read(source, format=chosen)
        assert f"'{name}0.weight'" in str(error.value)
        check(state.read(source, format=chosen, prefix=prefix), {}, ema)
        # A model may have such names itself.
        check(state.read(source, format=chosen, model=list(own)), {}, own)


def test_counters_are_no_averages(trained, tmp_path):
    _, _, _, ema = trained
    for counter in ("initted", "n_averaged", "ema.n_averaged"):
        source = in_each_container(tmp_path, {counter: torch.tensor(3), **ema})[2]
        with pytest.raises(FormatError, match=f"has names of the format .*'{counter}'"):
            state.read(source)


def test_what_is_written_as_the_average_is_the_average(trained, tmp_path):
    _, _, _, ema = trained
    own = within("ema_model.", ema) | COUNTERS
    state.write(tmp_path / "x", Found("test", own, iteration=3), "safetensors")
    found = state.read(tmp_path / "x")
    check(found, {}, own)
    assert (found.format, found.iteration) == ("safetensors", 3)


def test_a_state_dict_in_each_container(trained, tmp_path):
    _, _, _, ema = trained
    for source in in_each_container(tmp_path, ema):
        found = state.read(source, format="state_dict")
        check(found, {}, ema)
        assert found.format == "state_dict"
    with pytest.raises(FormatError, match="doesn't have the format 'timm'"):
        state.read(tmp_path / "x.safetensors", format="timm")


# ---- an average in a module's own state_dict


def an_average(kind, averaged, raw, ema):
    """What ``self.ema`` of a module puts into its state_dict, and what its file then records."""
    if kind == "averaged_model":
        return dict(averaged.state_dict()), (None, 3)
    online = within("online_model.", raw) if kind == "with online" else {}
    return COUNTERS | online | within("ema_model.", ema), (7, None)


@pytest.mark.parametrize("kind", ["averaged_model", "ema_pytorch", "with online"])
@pytest.mark.parametrize("root", ["ema.", "avg.", "deep.er."])
def test_an_average_in_a_module(kind, root, trained, tmp_path):
    net, averaged, raw, ema = trained
    own, counters = an_average(kind, averaged, raw, ema)
    loss = {"loss.weight": torch.ones(2)}
    weights = within("net.", raw) | within(root, own) | loss
    sources = (*in_each_container(tmp_path, weights), {"epoch": 2, "state_dict": weights})
    for source in sources:
        # By the names of the module, as Lightning's own averages are.
        found = state.read(source)
        check(found, within("net.", raw) | loss, within("net.", ema))
        assert found.format == kind.replace("with online", "ema_pytorch")
        assert (found.iteration, found.num_updates) == counters
        at = "state_dict." if source is sources[-1] else ""
        assert found.ema_at.startswith(f"{at}{root}")
        assert found.raw_at == f"{at}net.*"
        # By those of the net: where it is given, or a prefix.
        check(state.read(source, model=net), raw, ema)
        check(state.read(source, prefix="net."), raw, ema)
        check(state.read(source, prefix=root), raw, ema)
        check(state.read(source, model=net, format=found.format), raw, ema)
    found = state.read({"state_dict": within(root, own)})
    check(found, raw if kind == "with online" else {}, ema)


def test_an_average_in_a_module_of_two_like_it(trained):
    net, averaged, raw, ema = trained
    twins = within("a.", raw) | within("b.", raw)
    weights = {"state_dict": twins | within("avg.", averaged.state_dict())}
    check(state.read(weights, model=net), {}, ema)  # Of which it is the average, nobody knows.


def test_several_averages_in_a_module(trained):
    _, averaged, raw, ema = trained
    own = averaged.state_dict()
    weights = {"state_dict": within("net.", raw) | within("a.", own) | within("b.", own)}
    with pytest.raises(FormatError, match=r"several averages, under 'state_dict\.a\.', 'state_d"):
        state.read(weights)
    found = state.read(weights, prefix="b.")
    check(found, raw, ema)
    assert found.ema_at == "state_dict.b.module.*"
    # An average of a module that has one itself is one average.
    outer = within("ema_model.net.", ema) | within("ema_model.avg.", own) | COUNTERS
    found = state.read({"state_dict": within("ema.", outer)})
    assert found.format == "ema_pytorch"
    assert_same(found.ema, within("net.", ema) | within("avg.", own))


# ---- layouts of training scripts


def test_model_ema(trained, tmp_path):
    """DeiT and what descends from it; torchvision's scripts keep an AveragedModel there."""
    net, averaged, raw, ema = trained
    own = {"model": raw, "optimizer": {}, "epoch": 4, "args": argparse.Namespace(a=1)}
    torch.save({**own, "model_ema": ema}, tmp_path / "x.pth")
    for model in (None, net):
        found = state.read(tmp_path / "x.pth", model=model)
        check(found, raw, ema)
        assert (found.format, found.ema_at, found.raw_at) == ("deit", "model_ema", "model")
        # The file has the last epoch, from 0; Found has their number.
        assert (found.epoch, found.iteration, found.num_updates) == (5, None, None)
    found = state.read({**own, "model_ema": averaged.state_dict()})
    check(found, raw, ema)
    assert (found.format, found.num_updates) == ("averaged_model", 3)
    with pytest.raises(FormatError, match="no average in a known format"):
        state.read({**own, "model_ema": None})


@pytest.mark.parametrize("wrapper", ["", "module."])
def test_rt_detr(wrapper, trained):
    net, _, raw, ema = trained
    inner = {"module": within(wrapper, ema), "updates": 7}
    data = {"last_epoch": 1, "date": "today", "model": within(wrapper, raw), "ema": inner}
    for model in (None, net):
        found = state.read(data, model=model)
        check(found, raw, ema)
        assert (found.format, found.num_updates, found.iteration) == ("rt_detr", 7, None)
        assert (found.ema_at, found.raw_at, found.epoch) == ("ema.module", "model", 2)
    check(state.read(inner), {}, ema)
    check(state.read({"ema": {"module": ema}, "model": raw}), raw, ema)
    # Elsewhere "module" are the weights of a model.
    for other in ({"module": raw}, {"module": raw, "optimizer": {}}, {"model": {"module": raw}}):
        with pytest.raises(FormatError, match="no average in a known format"):
            state.read(other)


@pytest.mark.parametrize("wrapper", ["", "module."])
def test_dino(wrapper, trained):
    net, _, raw, ema = trained
    head = {"head.last.weight": torch.ones(2)}
    teacher = within("backbone.", ema) | head
    student = within("backbone.", raw) | {"head.last.weight": torch.zeros(2)}
    for data in (
        {"student": within("module.", student), "teacher": within(wrapper, teacher), "epoch": 9},
        {"model": within("student.", student) | within("teacher.", teacher)},
        within("student.", student) | within("teacher.", teacher),
    ):
        found = state.read(data)
        check(found, student, teacher)
        assert (found.format, found.epoch) == ("dino", data.get("epoch"))
        check(state.read(data, prefix="backbone."), raw, ema)
        check(state.read(data, model=net), raw, ema)
    check(state.read({"teacher": within(wrapper, teacher)}), {}, teacher)


def test_a_teacher_that_is_no_average(trained, tmp_path):
    _, _, raw, ema = trained
    for source in in_each_container(tmp_path, within("teacher.", ema) | within("student.", raw)):
        with pytest.raises(FormatError, match=r"no average in a known|format 'dino'"):
            state.read(source)
        check(state.read(source, format="dino"), raw, ema)
    # Distillation from a larger network, beside an average.
    larger = {"teacher": {"0.weight": torch.ones(9, 9)}, "student": raw}
    check(state.read({"kd": larger, "state_dict": raw, "state_dict_ema": ema}), raw, ema)
    teacher = within("backbone.", ema)
    with pytest.raises(FormatError, match=r"no average of student, which has no 'backbone\.0\.w"):
        state.read({"teacher": teacher, "student": {"other": torch.ones(1)}})
    smaller = {name: tensor[:1] if tensor.ndim else tensor for name, tensor in teacher.items()}
    with pytest.raises(FormatError, match=r"'backbone\.0\.weight' has shape \[4, 3\] in teach"):
        state.read({"teacher": teacher, "student": smaller})


def lit_ema_of(net, ema, updates=7):
    """The averages of LitEma: of what is trained, without dots."""
    flat = {name.replace(".", ""): ema[name] for name, _ in net.named_parameters()}
    return {"decay": torch.tensor(0.75), "num_updates": torch.tensor(updates), **flat}


def test_lit_ema(trained, tmp_path):
    net, _, raw, ema = trained
    names = [name for name, _ in net.named_parameters()]
    averages = {name: ema[name] for name in names}
    own, first = lit_ema_of(net, ema), {"first_stage_model.0.weight": torch.ones(4, 3)}
    inside = "model.diffusion_model."
    weights = within(inside, raw) | first
    for root in ("model_ema.", "ema."):
        both = weights | within(f"{root}", within_flat("diffusion_model", own))
        sources = (*in_each_container(tmp_path, both), {"epoch": 2, "state_dict": both})
        for source in sources:
            found = state.read(source)
            check(found, weights, within(inside, averages))
            assert (found.format, found.num_updates, found.iteration) == ("lit_ema", 7, 7)
            assert found.momentum == 0.25
            at = "state_dict." if source is sources[-1] else ""
            assert (found.ema_at, found.raw_at) == (f"{at}{root}*", f"{at}model.*")
            check(state.read(source, prefix=inside), raw, averages)
            check(
                state.read(source, prefix="model."),
                within("diffusion_model.", raw),
                within("diffusion_model.", averages),
            )
    # Under a key, beside the weights.
    found = state.read({"model": raw, "mine": own}, model=net)
    check(found, raw, averages)
    assert state.read({"model": raw, "mine": lit_ema_of(net, ema, -1)}).num_updates is None


def within_flat(name, own):
    return {key if key in ("decay", "num_updates") else name + key: t for key, t in own.items()}


def test_lit_ema_without_the_weights(trained, tmp_path, capsys):
    net, _, _, ema = trained
    own = lit_ema_of(net, ema)
    averages = {name: ema[name] for name, _ in net.named_parameters()}
    for source in in_each_container(tmp_path, within("model_ema.", own)):
        with pytest.raises(FormatError, match="have lost their dots") as error:
            state.read(source)
        assert "'0weight', '0bias'" in str(error.value)
        check(state.read(source, model=net), {}, averages)
        check(state.read(source, model=list(averages)), {}, averages)
    assert main(["inspect", str(tmp_path / "x.safetensors")]) == 0
    assert "format      lit_ema" in capsys.readouterr().out


def test_lit_ema_that_mixed_up_its_names():
    one = torch.ones(1)
    own = {"decay": one, "num_updates": torch.tensor(1), "abc": one}
    with pytest.raises(FormatError, match=r"'abc' of .* stands for both 'a.bc' and 'ab.c'"):
        state.read({"model": {"a.bc": one, "ab.c": one}, "ema": own})


def test_lit_ema_of_tied_weights(tmp_path):
    raw, ema = torch.zeros(2, 2), torch.ones(2, 2)
    own = {"decay": torch.tensor(0.75), "num_updates": torch.tensor(1), "inweight": ema}
    torch.save({"model": {"in.weight": raw, "out.weight": raw}, "ema": own}, tmp_path / "x")
    found = state.read(tmp_path / "x")
    assert_same(found.averaged_model(), {"in.weight": ema, "out.weight": ema})


# ---- what has no format: named by its key, its prefix, or both


def test_a_layout_that_nobody_has_seen(trained, tmp_path, capsys):
    _, averaged, raw, ema = trained
    nets = [{"other": torch.ones(1)}, within("avg_net.", ema) | within("net.", raw)]
    data = {"stuff": {"my.nets": nets}, "model": raw, "epoch": 1}
    torch.save(data, tmp_path / "x.ckpt")
    words = ["--key", "stuff.my.nets.1", "--prefix", "avg_net.", "--format", "state_dict"]
    out = tmp_path / "out"
    assert main(["convert", str(tmp_path / "x.ckpt"), str(out), "--to", "timm", *words]) == 0
    check(state.read(out), raw, ema)
    assert main(["inspect", str(tmp_path / "x.ckpt"), *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.endswith("in stuff.my.nets.1") for line in lines)
    assert any(line.endswith("in model") for line in lines)
    # A known format in an unknown place.
    own = within("deep.", averaged.state_dict()) | within("net.", raw)
    torch.save({"stuff": {"all": own}}, tmp_path / "x.ckpt")
    words = ["--key", "stuff.all", "--prefix", "deep.", "--format", "averaged_model"]
    assert main(["convert", str(tmp_path / "x.ckpt"), str(out), "--to", "timm", *words]) == 0
    check(state.read(out), raw, ema)
    capsys.readouterr()


def test_a_key(trained):
    net, averaged, raw, ema = trained
    own, inner = {"a": averaged.state_dict(), "b": averaged.state_dict()}, {"module": ema}
    with pytest.raises(FormatError, match=r"several averages, under 'a', 'b'.*key= \(--key\)"):
        state.read({**own, "model": raw})
    found = state.read({**own, "model": raw}, key="b")
    check(found, raw, ema)
    assert (found.ema_at, found.raw_at) == ("b.module.*", "model")
    for key, data in (("a.b.module", {"a.b": inner}), ("a.b.module", {"a": {"b": inner}})):
        check(state.read(data, key=key, format="state_dict"), {}, ema)
    # The raw weights are no part of what was named, nor another model's.
    found = state.read({"model": {"raw": raw, "avg": ema}}, key="model.avg", format="state_dict")
    check(found, {}, ema)
    found = state.read({"model": {"x": raw["0.bias"]}, "avg": ema}, key="avg", format="state_dict")
    check(found, {}, ema)
    listed = {"ema_params": [ema[name] for name, _ in net.named_parameters()], "model": raw}
    found = state.read(listed, key="ema_params", format="state_dict", model=net)
    check(found, raw, {name: ema[name] for name, _ in net.named_parameters()})
    check(
        state.read({"model": raw, "mine": lit_ema_of(net, ema)}, key="mine"),
        raw,
        {name: ema[name] for name, _ in net.named_parameters()},
    )


def test_a_key_that_doesnt_serve(trained, tmp_path):
    _, _, raw, ema = trained
    data = {"model": raw, "avg": ema, "listed": [torch.ones(1)], "epoch": 1}
    for key in ("none", "model.none", "epoch.a", "listed.1", "listed.x"):
        with pytest.raises(
            FormatError, match=rf"nothing under the key '{key}': it has the keys 'mod"
        ):
            state.read(data, key=key)
    with pytest.raises(FormatError, match="'epoch' of the dictionary is a int"):
        state.read(data, key="epoch")
    with pytest.raises(FormatError, match=r"'listed' of the dictionary is a list.*state_dict"):
        state.read(data, key="listed")
    with pytest.raises(FormatError, match=r"no tensors itself: it has the keys 'model', 'avg'"):
        state.read(data, format="state_dict")
    with pytest.raises(FormatError, match=r"no average in a known format.*key= \(--key\)"):
        state.read(data)
    with pytest.raises(FormatError, match="no average in a known format"):
        state.read(data, key="avg")  # Which of them it is, only the caller can say.


def test_a_state_dict_that_holds_more_than_the_average(trained):
    _, averaged, raw, ema = trained
    weights = {"state_dict": within("net.", raw) | within("avg.", averaged.state_dict())}
    with pytest.raises(FormatError, match=r"has its average in state_dict\.avg\.module\.\*"):
        state.read(weights, format="state_dict")
    check(state.read(weights, format="state_dict", prefix="avg.module."), {}, ema)
    with pytest.raises(FormatError, match="has its average in"):
        state.read(weights, format="state_dict", prefix="net.")


def test_a_state_dict_beside_the_average(trained, tmp_path):
    _, averaged, raw, ema = trained
    for key, own in (
        ("state_dict_ema", ema),
        ("ema_state_dict", ema),
        ("a", averaged.state_dict()),
    ):
        data = {"state_dict": raw, key: own}
        with pytest.raises(FormatError, match=rf"has its average in {key}.*key= \(--key\)"):
            state.read(data, format="state_dict")
        # The caller may know better.
        check(state.read(data, format="state_dict", key="state_dict"), {}, raw)
    flat = {f"ema_{name.replace('.', '_')}": tensor for name, tensor in ema.items()}
    for source in in_each_container(tmp_path, raw | flat):
        with pytest.raises(FormatError, match="main='ema' or main='raw'"):
            state.read(source, format="state_dict")
        with pytest.raises(FormatError, match="has its average in the whole file 'ema_"):
            state.read(source, format="state_dict", main="raw")
    # Where it is the average, it is one.
    torch.save({"state_dict": raw}, tmp_path / "last.ckpt")
    torch.save({"state_dict": ema}, tmp_path / "last-EMA.ckpt")
    check(state.read(tmp_path / "last-EMA.ckpt", format="state_dict"), {}, ema)
    with pytest.raises(FormatError, match=r"its average in state_dict of last-EMA\.ckpt"):
        state.read(tmp_path / "last.ckpt", format="state_dict")
    data = {"state_dict": ema, "current_model_state": raw, "averaging_state": {}}
    check(state.read(data, format="state_dict"), {}, ema)
    steps = {"steps": torch.tensor(7)}
    data = {"state_dict": ema, "ema_state_dict": steps | within("module.", raw)}
    check(state.read(data, format="state_dict"), {}, ema)


def test_a_prefix_that_has_both(trained):
    _, averaged, raw, ema = trained
    both = within("net.", raw) | within("avg.", averaged.state_dict())
    other = {name: tensor + 1 for name, tensor in both.items()}
    weights = {"state_dict": within("a.", both) | within("b.", other)}
    check(state.read(weights, prefix="a.avg."), {}, ema)
    check(state.read(weights, prefix="a."), within("net.", raw), within("net.", ema))


# ---- the folder of diffusers


def a_folder(folder, files, sharded=""):
    """Weights as ``save_pretrained(variant=...)`` names them, of the step and decay of an EMA."""
    (folder / "config.json").write_text(json.dumps({"optimization_step": 7, "decay": 0.75}))
    for name, tensors in files.items():
        with (folder / name).open("wb") as file:
            _safetensors.write_file(file, tensors, {"format": "pt"})
    if sharded:
        index = {"weight_map": {n: name for name, tensors in files.items() for n in tensors}}
        (folder / sharded).write_text(json.dumps(index))


def shards(stem, tensors):
    names = list(tensors)
    return {
        f"{stem}-0000{i + 1}-of-00002.safetensors": {n: tensors[n] for n in names[i::2]}
        for i in range(2)
    }


STEM = "diffusion_pytorch_model"


def test_a_folder_with_a_sharded_variant(trained, tmp_path):
    net, _, _, ema = trained
    half = {name: tensor.half() for name, tensor in ema.items()}
    a_folder(tmp_path, shards(f"{STEM}.fp16", half), f"{STEM}.safetensors.index.fp16.json")
    for variant in (None, "fp16"):
        found = state.read(tmp_path, model=net, variant=variant)
        check(found, {}, half)
        assert (found.format, found.iteration, found.momentum) == ("diffusers", 7, 0.25)
        assert found.ema_at == f"{STEM}.safetensors.index.fp16.json"
    # Beside the plain one, which is then read unasked; older shards are named the other way round.
    a_folder(tmp_path, shards(STEM, ema), f"{STEM}.safetensors.index.json")
    check(state.read(tmp_path), {}, ema)
    check(state.read(tmp_path, variant="fp16"), {}, half)
    check(state.read(tmp_path / f"{STEM}.safetensors.index.fp16.json"), {}, half)


def test_a_folder_with_a_plain_file_and_a_variant(trained, tmp_path, capsys):
    _, _, _, ema = trained
    half = {name: tensor.half() for name, tensor in ema.items()}
    plain, fp16 = f"{STEM}.safetensors", f"{STEM}.fp16.safetensors"
    a_folder(tmp_path, {plain: ema, fp16: half})
    found = state.read(tmp_path)
    check(found, {}, ema)
    assert found.ema_at == plain
    check(state.read(tmp_path, variant="fp16"), {}, half)
    out = tmp_path / "out"
    words = ["convert", str(tmp_path), str(out), "--to", "safetensors", "--variant", "fp16"]
    assert main(words) == 0
    check(state.read(out), {}, half)
    capsys.readouterr()
    with pytest.raises(FormatError, match="no weights of the variant 'bf16'; it has: 'plain', '"):
        state.read(tmp_path, variant="bf16")
    (tmp_path / plain).unlink()
    check(state.read(tmp_path), {}, half)
    a_folder(tmp_path, {f"{STEM}.bf16.safetensors": ema})
    with pytest.raises(FormatError, match=r"has the variants 'bf16', 'fp16'.*variant="):
        state.read(tmp_path)
    a_folder(tmp_path, {"one.safetensors": ema, "two.safetensors": ema})
    with pytest.raises(FormatError, match=r"2 files of weights \('one.*', 'two.*'\); keep one"):
        state.read(tmp_path)


def test_a_folder_with_a_bin_of_a_variant(trained, tmp_path):
    _, _, _, ema = trained
    half = {name: tensor.half() for name, tensor in ema.items()}
    a_folder(tmp_path, {})
    torch.save(half, tmp_path / f"{STEM}.fp16.bin")
    check(state.read(tmp_path), {}, half)
    torch.save(ema, tmp_path / f"{STEM}.bin")
    check(state.read(tmp_path), {}, ema)
    check(state.read(tmp_path, variant="fp16"), {}, half)
    # The state of an optimizer is nobody's weights.
    torch.save({"state": {}}, tmp_path / "optimizer.bin")
    a_folder(tmp_path, {f"{STEM}.fp16.safetensors": half})
    check(state.read(tmp_path), {}, ema)
    (tmp_path / f"{STEM}.bin").unlink()
    check(state.read(tmp_path), {}, half)


def test_a_folder_that_lacks_its_index(trained, tmp_path):
    _, _, _, ema = trained
    a_folder(tmp_path, shards(STEM, ema))
    with pytest.raises(FormatError, match=r"shards without their index.*-00001-of-00002"):
        state.read(tmp_path)
    a_folder(tmp_path, {f"{STEM}.fp16-00001-of-00001.safetensors": ema})
    with pytest.raises(FormatError, match="shards without their index"):
        state.read(tmp_path)
    check(state.read(tmp_path, variant="fp16"), {}, ema)  # A single one needs none.


def test_variants_and_keys_have_their_place(trained, tmp_path):
    _, _, _, ema = trained
    a_folder(tmp_path, {f"{STEM}.safetensors": ema})
    with pytest.raises(FormatError, match="variant is for the folders of diffusers"):
        state.read(tmp_path / f"{STEM}.safetensors", variant="fp16")
    with pytest.raises(FormatError, match="is a folder, which has no key 'a'"):
        state.read(tmp_path, key="a")


# ---- the package


def test_formats_know_no_manager():
    """Whoever loads a file into a manager is the manager's caller."""
    above = {"manager", "plan", "ops", "state", "_slots", "_storage", "hooks"}
    files = sorted(Path(formats.__file__).parent.glob("*.py"))
    assert len(files) > 10
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{name.name}" for name in node.names]
            elif isinstance(node, ast.Import):
                names = [name.name for name in node.names]
            for name in names:
                package, _, rest = name.partition(".")
                assert package != "fused_ema" or rest.split(".")[0] not in above, (file, name)


def test_the_table_has_every_format():
    table = formats.__doc__.split("=====\n")[1]
    named = [line.split("``")[1] for line in table.splitlines() if line.startswith("``")]
    assert sorted(named) == sorted(formats.FORMATS)
