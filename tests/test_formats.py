"""Checkpoints of other frameworks, made here in the exact layout of each; and the command line."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import textwrap
from collections import OrderedDict, defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from nets import Net, assert_same, move, values_of
from torch import nn

from fused_ema import EMAManager, _safetensors, schedules, state
from fused_ema.__main__ import Progress, main
from fused_ema.formats import FORMATS, WRITABLE, FormatError, Found

ROOT = Path(__file__).parents[1]
STEP, UPDATES, EPOCH, DECAY = 7, 5, 2, 0.75


def a_model(dtype=torch.float32):
    return Net(dtype)


def both(model):
    """Raw weights and averages of a model: two values for each tensor of its state_dict."""
    raw = values_of(model)
    move(model, 1)
    return raw, values_of(model)


def flat(name):
    return "ema_" + name.replace(".", "_")


def parameters_of(model, values):
    return [values[name] for name, _ in model.named_parameters()]


def buffers_of(model):
    return [name for name, _ in model.named_buffers() if name != "scratch"]


class Outer(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.model = net


def made(name, raw, ema, model):
    """What each framework saves; the facts are those of its own source."""
    if name == "fused_ema":
        return {"model": raw, "ema": state.pack(STEP, UPDATES, ema, {}, False)}
    if name == "mmcv":
        buffers = {flat(key): raw[key] for key in raw}
        meta = {"epoch": EPOCH, "iter": STEP, "hook_msgs": {"last_ckpt": "work/epoch_1.pth"}}
        own = {key: tensor for key, tensor in ema.items() if "." not in key}
        weights = OrderedDict({**own, **buffers, **ema})
        return {"meta": meta, "state_dict": weights, "optimizer": {}}
    if name == "mmengine":
        inner = {"steps": torch.tensor(UPDATES), **{f"module.{k}": v for k, v in raw.items()}}
        meta = {"epoch": EPOCH, "iter": STEP}
        return {"meta": meta, "state_dict": dict(ema), "ema_state_dict": inner}
    if name == "averaged_model":
        return {"n_averaged": torch.tensor(UPDATES), **{f"module.{k}": v for k, v in ema.items()}}
    if name == "timm":
        return {"epoch": EPOCH, "arch": "net", "state_dict": raw, "state_dict_ema": ema}
    if name == "ema_state_dict":
        return {"epoch": EPOCH, "best_acc1": 0.5, "state_dict": raw, "ema_state_dict": ema}
    if name == "deit":
        return {"epoch": EPOCH - 1, "model": raw, "model_ema": ema, "optimizer": {}}
    if name == "rt_detr":
        return {"last_epoch": EPOCH - 1, "model": raw, "ema": {"module": ema, "updates": UPDATES}}
    if name == "dino":
        parts = {"teacher": ema, "student": raw}
        return {key: {f"backbone.{k}": v for k, v in own.items()} for key, own in parts.items()}
    if name == "lit_ema":
        own = {n.replace(".", ""): ema[n] for n, _ in model.named_parameters()}
        own |= {"decay": torch.tensor(DECAY), "num_updates": torch.tensor(UPDATES)}
        return {"model": raw, "mine": own}
    if name == "diffusers":
        listed = parameters_of(model, ema)
        own = {"min_decay": 0.0, "update_after_step": 0, "use_ema_warmup": False}
        return {"decay": DECAY, "optimization_step": UPDATES, **own, "shadow_params": listed}
    if name == "torch_ema":
        own = {"decay": DECAY, "num_updates": UPDATES, "shadow_params": parameters_of(model, ema)}
        return {**own, "collected_params": None}
    if name == "ema_pytorch":
        steps = {"initted": torch.tensor(True), "step": torch.tensor(STEP)}
        online = {f"online_model.{k}": v for k, v in raw.items()}
        return {**steps, **online, **{f"ema_model.{k}": v for k, v in ema.items()}}
    if name == "lightning":
        averaging = {"n_averaged": torch.tensor(UPDATES)}
        own = {"epoch": EPOCH, "global_step": STEP, "pytorch-lightning_version": "2.6.6"}
        return {**own, "state_dict": ema, "current_model_state": raw, "averaging_state": averaging}
    if name == "nemo":
        own = {"opt": {"state": {}}, "current_step": STEP, "decay": DECAY, "every_n_steps": 1}
        optimizer = {**own, "ema": tuple(parameters_of(model, ema))}
        return {"epoch": EPOCH, "state_dict": raw, "optimizer_states": [optimizer]}
    if name == "ultralytics":
        return {"epoch": EPOCH, "model": None, "ema": ema, "updates": UPDATES}
    assert name == "state_dict"
    return dict(ema)


LISTS = ("diffusers", "torch_ema", "nemo")
PARAMETERS = (*LISTS, "lit_ema")  # Which have no buffers.
PAIRS = ("timm", "deit", "dino", "ema_state_dict")  # Which record no more than the epoch.
MADE = [name for name in FORMATS if name != "safetensors"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MADE)
def test_every_format_is_read(name, dtype, tmp_path):
    model = a_model(dtype)
    raw, ema = both(model)
    file = tmp_path / "last.ckpt"
    data = made(name, raw, ema, model)
    torch.save(data, file)
    wanted = dict(ema)
    if name in PARAMETERS:
        wanted = {n: ema[n] for n in ema if n not in buffers_of(model)}
    has_raw = name not in ("averaged_model", "diffusers", "torch_ema", "ultralytics", "state_dict")
    for source in (file, str(file), data):
        chosen = name if name == "state_dict" else None
        found = state.read(source, model=model, format=chosen)
        assert found.format == name
        assert found.ema.keys() == wanted.keys()
        assert_same({n: found.ema[n] for n in wanted}, wanted)
        if name not in PARAMETERS:  # They have the order of named_parameters().
            assert list(found.ema) == list(wanted)
        assert_same(found.raw, raw if has_raw else {})
        steps = ("averaged_model", "ultralytics", "rt_detr", *PAIRS, "state_dict")
        in_updates = name in ("diffusers", "torch_ema", "lit_ema")
        assert found.iteration == (None if name in steps else UPDATES if in_updates else STEP)
        silent = ("mmcv", "ema_pytorch", *PAIRS, "state_dict")
        updates = STEP if name == "nemo" else UPDATES
        assert found.num_updates == (None if name in silent else updates)
        assert found.momentum == (1 - DECAY if name in PARAMETERS else None)
        assert_same(found.averaged_model(), {**found.raw, **found.ema})


def test_a_list_needs_names():
    model = a_model()
    raw, ema = both(model)
    for name in LISTS:
        with pytest.raises(FormatError, match="without names; pass the model it is of"):
            state.read(made(name, raw, ema, model))
        names = [n for n, _ in model.named_parameters()]
        assert list(state.read(made(name, raw, ema, model), model=names).ema) == names
        with pytest.raises(FormatError, match=f"{len(names)} tensors but the model has 2 param"):
            state.read(made(name, raw, ema, model), model=nn.Linear(3, 4))


def test_a_list_of_those_that_were_trained():
    model = a_model()
    raw, ema = both(model)
    data = made("torch_ema", raw, ema, model)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    data["shadow_params"] = [ema[n] for n in names]
    data["collected_params"] = [raw[n] for n in names]
    found = state.read(data, model=model)
    assert set(found.ema) == {*names, "head.weight"}
    assert_same({n: found.raw[n] for n in names}, {n: raw[n] for n in names})
    data["shadow_params"][0] = torch.zeros(3)
    with pytest.raises(FormatError, match=r"'scale' has shape \[\] but tensor 0 has \[3\]"):
        state.read(data, model=model)


def test_a_model_that_is_another():
    model = a_model()
    raw, ema = both(model)
    data = made("timm", raw, ema, model)
    with pytest.raises(FormatError, match="of another model") as error:
        state.read(data, model=nn.Linear(3, 4))
    assert "'scale' is not in the model" in str(error.value)
    assert "'weight' of the model is missing" in str(error.value)
    ema["scale"] = torch.zeros(2)
    with pytest.raises(FormatError, match=r"'scale' has shape \[2\] but the model's has \[\]"):
        state.read(data, model=model)


# ---- names


@pytest.mark.parametrize("num_names", [20, 21, 3000])
def test_errors_about_many_names_can_be_read(tmp_path, capsys, num_names):
    names = [f"w{i}" for i in range(num_names)]
    saved = {name: torch.zeros(1) for name in names}
    saved = {"state_dict": saved, "state_dict_ema": saved}
    with pytest.raises(FormatError, match="of another model") as error:
        state.read(saved, ["other"])
    lines = [line.strip() for line in str(error.value).splitlines()[1:]]
    assert lines[:20] == [f"'{name}' is not in the model" for name in names[:20]]
    left = num_names - 20
    assert lines[20:] == ([f"and {left:,} more"] if left else [])
    torch.save(saved, tmp_path / "a.pth")
    (tmp_path / "names.txt").write_text("other")
    arguments = ["inspect", tmp_path / "a.pth", "--model-names", tmp_path / "names.txt"]
    assert main(list(map(str, arguments))) == 2
    assert capsys.readouterr().err.endswith(f"; and {num_names - 8} more\n")


def test_names_are_the_models_own():
    model = a_model()
    raw, ema = both(model)
    wrapped = {f"module._orig_mod.{n.replace('body.', 'body._orig_mod.')}": ema[n] for n in ema}
    found = state.read({"state_dict_ema": wrapped, "state_dict": raw}, model=model)
    assert_same(found.ema, ema)
    assert_same(found.raw, raw)
    # DistributedDataParallel inside of AveragedModel.
    twice = {"n_averaged": torch.tensor(3), **{f"module.module.{n}": ema[n] for n in ema}}
    assert_same(state.read(twice).ema, ema)


def test_a_child_with_the_name_module_stays():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(2, 2)

    model = Holder()
    found = state.read({"state_dict_ema": model.state_dict()}, model=model)
    assert list(found.ema) == ["module.weight", "module.bias"]
    assert list(state.read({"state_dict_ema": model.state_dict()}).ema) == ["weight", "bias"]


def test_names_that_come_to_one():
    tensors = {"a._orig_mod.b": torch.zeros(1), "a.b": torch.zeros(1)}
    with pytest.raises(FormatError, match=r"'a._orig_mod.b' and 'a.b' both come to 'a.b'"):
        state.read({"state_dict_ema": tensors})


def test_a_part_of_the_names():
    model = a_model()
    _, ema = both(model)
    outer = {f"model.{n}": t for n, t in ema.items()} | {"loss.weight": torch.ones(1)}
    data = {"state_dict_ema": outer, "state_dict": outer}
    found = state.read(data, model=model, prefix="model.")
    assert_same(found.ema, ema)
    with pytest.raises(FormatError, match=r"no average of a name that begins with 'net.'"):
        state.read(data, prefix="net.")


def test_an_average_under_any_key():
    model = a_model()
    raw, ema = both(model)
    for name in ("averaged_model", "torch_ema", "diffusers", "fused_ema"):
        inner = made(name, raw, ema, model)
        inner = inner["ema"] if name == "fused_ema" else inner
        found = state.read({"epoch": 3, "net": raw, "mine": inner}, model=model)
        assert found.format == name
        assert found.ema_at.startswith("mine.")
        assert (found.raw_at, list(found.raw)) == ("net", list(raw))
        with pytest.raises(FormatError, match="several averages, under 'a', 'b'"):
            state.read({"a": inner, "b": inner}, model=model)


def test_saved_while_swapped():
    model = a_model()
    ema = EMAManager(model, 0.25)
    move(model, 1)
    ema.update()
    raw, averages = values_of(model), {n: t.clone() for n, t in ema.named_emas()}
    with ema.swapped():
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "ema": ema.state_dict()}, file)
    file.seek(0)
    found = state.read(torch.load(file, weights_only=True))
    assert_same(found.ema, averages)
    assert_same(found.raw, raw)
    assert found.why == "saved while the model held the average"


# ---- mmcv


def mmcv_file(folder, name, **meta):
    model = a_model()
    raw, ema = both(model)
    main, buffers = (raw, ema) if name.startswith("raw") else (ema, raw)
    file = folder / name.removeprefix("raw ").removeprefix("ema ")
    weights = {**main, **{flat(key): buffers[key] for key in raw}}
    torch.save({"meta": {"epoch": 1, "iter": STEP, **meta}, "state_dict": weights}, file)
    return file, raw, ema


def config_of(hook, checkpoint="dict(interval=1)"):
    return f"checkpoint_config = {checkpoint}\ncustom_hooks = [{hook}, dict(type='NumClassCheck')]"


EARLY = "dict(type='ExpMomentumEMAHook', momentum=0.001, priority=49)"
LATE = "dict(type='ExpMomentumEMAHook', momentum=0.001)"


@pytest.mark.parametrize(
    ("name", "meta"),
    [
        ("raw iter_3.pth", {}),
        ("raw last.pth", {"config": "runner = dict(type='IterBasedRunner')\n" + config_of(LATE)}),
        ("ema last.pth", {"hook_msgs": {"last_ckpt": "/runs/epoch_2.pth"}}),
        # An epoch-based runner gives files that it saves by iterations the names of epochs.
        ("raw epoch_3.pth", {"hook_msgs": {"last_ckpt": "/work/iter_2.pth"}}),
        ("raw epoch_3.pth", {"config": config_of(EARLY, "dict(interval=1, by_epoch=False)")}),
        ("ema epoch_3.pth", {"config": config_of(EARLY)}),
        ("ema epoch_3.pth", {"config": config_of(EARLY.replace("49", "'ABOVE_NORMAL'"))}),
        ("raw epoch_3.pth", {"config": config_of(LATE)}),
        ("raw epoch_3.pth", {"config": config_of(EARLY.replace("49", "'LOW'"))}),
        ("ema last.pth", {"fused_ema": {"main": "ema"}}),
    ],
)
def test_mmcv_which_is_which(name, meta, tmp_path):
    file, raw, ema = mmcv_file(tmp_path, name, **meta)
    found = state.read(file)
    assert_same(found.ema, ema)
    assert_same(found.raw, raw)
    assert found.why
    # Within an epoch the runner hasn't counted the iteration yet that it saves after.
    assert found.iteration == (STEP + 1 if name.startswith("raw") else STEP) or "priority" in (
        found.why
    )
    has_momentum = "EMAHook" in meta.get("config", "")
    assert found.momentum == (0.001 if has_momentum else None)


def test_mmcv_a_link_is_what_it_points_to(tmp_path):
    file, _, ema = mmcv_file(tmp_path, "raw iter_3.pth")
    (tmp_path / "latest.pth").symlink_to(file.name)
    assert_same(state.read(tmp_path / "latest.pth").ema, ema)


@pytest.mark.parametrize("name", ["best.pth", "epoch_1.pth"])
@pytest.mark.parametrize("meta", [{}, {"config": "this is ( no Python"}, {"config": "a = 1"}])
def test_mmcv_that_doesnt_say(name, meta, tmp_path):
    file, raw, ema = mmcv_file(tmp_path, f"ema {name}", **meta)
    with pytest.raises(FormatError, match="main='ema' or main='raw'"):
        state.read(file)
    assert_same(state.read(file, main="ema").ema, ema)
    assert_same(state.read(file, main="raw").ema, raw)
    with pytest.raises(FormatError, match="main is 'both'"):
        state.read(file, main="both")


def test_mmcv_parameters_alone():
    raw = {"a.weight": torch.ones(2), "a.count": torch.tensor(4)}
    data = {"state_dict": {**raw, "ema_a_weight": torch.zeros(2)}, "meta": {}}
    found = state.read(data, main="raw")
    assert list(found.ema) == ["a.weight"]
    assert_same(found.raw, raw)
    assert_same(found.averaged_model(), {**raw, "a.weight": torch.zeros(2)})


def test_mmcv_that_mixed_up_its_names():
    names = ("a.b_c", "a_b.c", "ema_a_b_c")
    with pytest.raises(FormatError, match=r"'ema_a_b_c' stands for both 'a.b_c' and 'a_b.c'"):
        state.read({"state_dict": {name: torch.zeros(1) for name in names}}, main="ema")
    with pytest.raises(FormatError, match=r"'a' has shape \[1\] but 'ema_a' \[2\]"):
        state.read({"state_dict": {"a": torch.zeros(1), "ema_a": torch.zeros(2)}}, main="ema")


@pytest.mark.parametrize("name", ["mmcv", "mmengine", "timm", "fused_ema", "safetensors"])
def test_what_has_no_average_stays_with_the_raw_weights(name, tmp_path):
    raw = {"a.weight": torch.ones(2), "a.count": torch.tensor(4)}
    ema = {"a.weight": torch.zeros(2)}
    if name == "mmengine":
        inner = {"steps": torch.tensor(3), "module.a.weight": raw["a.weight"]}
        data = {"state_dict": {**raw, **ema}, "ema_state_dict": inner}
        found = state.read(data)
        assert_same(found.ema, ema)
        assert_same(found.raw, raw)
    state.write(tmp_path / "x", Found("test", ema, raw, STEP, UPDATES), name)
    found = state.read(tmp_path / "x")
    assert_same({"a.weight": found.ema["a.weight"]}, ema)
    assert_same({"a.count": found.averaged_model()["a.count"]}, {"a.count": raw["a.count"]})
    if name in ("mmcv", "fused_ema", "safetensors"):
        assert list(found.ema) == ["a.weight"]


# ---- NeMo, Ultralytics, folders


def test_nemo_two_files(tmp_path):
    raw, ema = both(a_model())
    torch.save({"global_step": STEP, "state_dict": raw}, tmp_path / "last.ckpt")
    torch.save({"global_step": STEP, "state_dict": ema}, tmp_path / "last-EMA.ckpt")
    for name in ("last.ckpt", "last-EMA.ckpt"):
        found = state.read(tmp_path / name)
        assert (found.format, found.iteration) == ("nemo", STEP)
        assert_same(found.ema, ema)
        assert_same(found.raw, raw)
    (tmp_path / "last.ckpt").unlink()
    found = state.read(tmp_path / "last-EMA.ckpt")
    assert_same(found.ema, ema)
    assert not found.raw


def test_a_folder(tmp_path):
    _, ema = both(a_model())
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    with file.open("wb") as opened:
        _safetensors.write_file(opened, ema, {"format": "pt"})
    with pytest.raises(FormatError, match=r"without a readable config.json"):
        state.read(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"_class_name": "Net"}))
    with pytest.raises(FormatError, match="has no 'optimization_step'"):
        state.read(tmp_path)
    config.write_text(json.dumps({"decay": DECAY, "optimization_step": UPDATES}))
    found = state.read(tmp_path)
    assert (found.format, found.iteration, found.momentum) == ("diffusers", UPDATES, 1 - DECAY)
    assert_same({n: found.ema[n] for n in ema}, ema)
    file.rename(tmp_path / "model-00001.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(ema, "model-00001.safetensors")}))
    assert_same(state.read(tmp_path).ema, ema)
    index.write_text(json.dumps({"weight_map": {"x": "model-00001.safetensors"}}))
    with pytest.raises(FormatError, match="'x' is in none of its files"):
        state.read(tmp_path)
    index.write_text(json.dumps({"weight_map": {"x": "../model-00001.safetensors"}}))
    with pytest.raises(FormatError, match="outside of its folder"):
        state.read(tmp_path)


# ---- nothing in a file is run


class Secret(nn.Module):
    def __setstate__(self, saved):
        raise AssertionError("code of a file's class was run")


class Shell:
    def __init__(self, command):
        self._command = command

    def __reduce__(self):
        return os.system, (self._command,)


def test_pickled_models_are_never_run(tmp_path):
    file = tmp_path / "best.pt"
    for data in ({"ema": Secret(), "model": None, "updates": 3}, {"ema": None, "model": Secret()}):
        torch.save(data, file)
        key = "ema" if data["ema"] is not None else "model"
        with pytest.raises(FormatError, match=f"'{key}' is a pickled .*Secret, and to read one is"):
            state.read(file)
    torch.save(Secret(), file)
    with pytest.raises(FormatError, match=r"is a pickled .*Secret"):
        state.read(file)


def test_no_command_is_run(tmp_path):
    mark, file = tmp_path / "mark", tmp_path / "bad.pt"
    for legacy in (False, True):
        data = {"state_dict_ema": {"a": torch.ones(1)}, "x": Shell(f"touch {mark}")}
        torch.save(data, file, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(FormatError, match="can't be read"):
            state.read(file)
    file.write_bytes(pickle.dumps(Shell(f"touch {mark}")))
    with pytest.raises(FormatError, match="can't be read"):
        state.read(file)
    assert not mark.exists()


class Stranger:
    def __init__(self):
        self.history = [1, 2]


def test_other_objects_in_a_file_are_left_alone(tmp_path):
    ema = {"a": torch.arange(3.0)}
    odd = {"hub": Stranger(), "type": Stranger, "opt": defaultdict(dict, a={"step": 1})}
    torch.save({"state_dict_ema": ema, **odd}, tmp_path / "x.pth")
    before = set(torch.serialization.get_safe_globals())
    assert_same(state.read(tmp_path / "x.pth").ema, ema)
    assert set(torch.serialization.get_safe_globals()) == before


def test_files_of_old(tmp_path):
    raw, ema = both(a_model())
    file = tmp_path / "old.pth"
    torch.save(made("timm", raw, ema, None), file, _use_new_zipfile_serialization=False)
    assert_same(state.read(file).ema, ema)


# ---- bad files


def test_truncated_anywhere(tmp_path):
    raw, ema = both(a_model())
    for name in ("mmengine", "safetensors"):
        whole = tmp_path / "whole"
        found = Found("test", ema, raw, STEP, UPDATES)
        state.write(whole, found, name)
        content = whole.read_bytes()
        file = tmp_path / "cut"
        assert state.read(whole).format == name
        for length in [*range(0, 40), *range(40, len(content), 97), len(content) - 1]:
            file.write_bytes(content[:length])
            with pytest.raises(FormatError, match=r"cut' (can't be read|is empty|holds objects)"):
                state.read(file)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F4", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]},
        {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2]},
        {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]},
        7,
    ],
)
def test_safetensors_that_lie(entry, tmp_path):
    header = json.dumps({"a": entry}).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(FormatError, match="can't be read"):
        state.read(file)
    good = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header = json.dumps({"a": good}).encode()  # Also one that isn't aligned.
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    assert_same(state.read(file).ema, {"a": torch.zeros(2)})
    header += b" " * (1 - len(header) % 4 + 4)
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    assert state.read(file).ema["a"].data_ptr() % 4 == 0
    file.write_bytes((2**63).to_bytes(8, "little") + header)
    with pytest.raises(FormatError, match="a header of"):
        state.read(file)


def test_no_average_in_it(tmp_path):
    weights = {"a": torch.ones(1)}
    for data in ({"state_dict": weights}, weights, {"epoch": 3}, {}):
        with pytest.raises(FormatError, match="no average in a known format"):
            state.read(data)
    with pytest.raises(FormatError, match="doesn't have the format 'timm'"):
        state.read(weights, format="timm")
    with pytest.raises(FormatError, match="format is 'tim'; choose from"):
        state.read(weights, format="tim")
    with pytest.raises(FormatError, match="must hold tensors alone"):
        state.read({"state_dict_ema": {"a": 3}})
    torch.save([1], tmp_path / "x")
    with pytest.raises(FormatError, match="holds a list, not a dictionary"):
        state.read(tmp_path / "x")
    with pytest.raises(FileNotFoundError):
        state.read(tmp_path / "none")
    with pytest.raises(TypeError, match="pass the module"):
        state.read({"state_dict_ema": weights}, model=[1])


def test_states_of_the_future_and_cut_ones():
    own = state.pack(1, 1, {"a": torch.ones(1)}, {}, False)
    with pytest.raises(FormatError, match="update fused_ema"):
        state.read({**own, "version": 3})
    del own["iteration"]
    with pytest.raises(FormatError, match="has no 'iteration'"):
        state.read(own)


# ---- a manager goes on


@pytest.mark.parametrize("name", [name for name in MADE if name not in (*PAIRS, "state_dict")])
def test_a_manager_goes_on(name):
    model = a_model()
    raw, ema = both(model)
    found = state.read(made(name, raw, ema, model), model=model)
    manager = EMAManager(model, 0.25, skip_buffers=name in PARAMETERS)
    before = values_of(model)
    state.load_into(manager, found)
    averages = dict(manager.named_emas())
    assert_same(averages, {n: ema[n] for n in averages})
    assert_same(values_of(model), before)
    assert manager.iteration == (UPDATES if found.iteration is None else found.iteration)
    assert manager.num_updates == (STEP if found.num_updates is None else found.num_updates)
    move(model, 2)
    manager.update()


def test_settings_say_what_is_taken():
    model = a_model()
    raw, ema = both(model)
    found = state.read(made("timm", raw, ema, model))
    manager = EMAManager(model, 0.25, exclude="body.*", skip_buffers=True)
    state.load_into(manager, found)
    averages = dict(manager.named_emas())
    assert "body.0.weight" not in averages
    assert_same(averages, {n: ema[n] for n in averages})


def test_positions_with_an_interval():
    model = a_model()
    raw, ema = both(model)
    found = state.read(made("averaged_model", raw, ema, model))
    manager = EMAManager(model, 0.25, interval=4, begin=6)
    state.load_into(manager, found)
    # Updates at 7, 11, 15, 19, 23.
    assert (manager.iteration, manager.num_updates) == (24, 5)
    twin = EMAManager(a_model(), 0.25, interval=4, begin=6)
    for _ in range(24):
        twin.update()
    assert twin.num_updates == 5
    found = state.read(made("ema_pytorch", raw, ema, model))
    state.load_into(manager, found, iteration=24)
    assert (manager.iteration, manager.num_updates) == (24, 5)
    found = state.read(made("timm", raw, ema, model))
    with pytest.raises(FormatError, match="records no iteration"):
        state.load_into(manager, found)
    with pytest.raises(FormatError, match="records no iteration"):
        state.load_into(EMAManager(model, momentum_fun=schedules.exponential(0.1)), found)
    plain = EMAManager(model)
    state.load_into(plain, found)
    assert plain.iteration == 0


@pytest.mark.parametrize("kept", ["[1", "5", '{"w": 1}', "[1]", "[" * 100_000])
def test_a_header_that_does_not_say_what_is_averaged(tmp_path, kept):
    metadata = {"fused_ema.slot": "ema", "fused_ema.averaged": kept}
    with (tmp_path / "x.safetensors").open("wb") as file:
        _safetensors.write_file(file, {"w": torch.ones(2)}, metadata)
    with pytest.raises(FormatError, match=r"x.safetensors' doesn't say which tensors are averaged"):
        state.read(tmp_path / "x.safetensors")


@pytest.mark.parametrize("given", ["nan", "1.5", "-0.1", "x"])
def test_a_header_with_counters_that_are_none(tmp_path, given):
    metadata = {"slot": "ema", "momentum": given, "iteration": "9" * 5000, "epoch": "3"}
    with (tmp_path / "x.safetensors").open("wb") as file:
        _safetensors.write_file(
            file, {"w": torch.ones(2)}, {f"fused_ema.{k}": v for k, v in metadata.items()}
        )
    found = state.read(tmp_path / "x.safetensors")
    assert (found.momentum, found.iteration, found.epoch) == (None, None, 3)


def test_an_iteration_to_go_on_from_is_a_whole_number():
    manager = EMAManager(a_model(), 0.25)
    found = state.read({"ema": manager.state_dict()})
    for iteration in (-1, True, 2.0, "5"):
        with pytest.raises(ValueError, match="iteration is") as error:
            state.load_into(manager, found, iteration=iteration)
        assert str(error.value) == (
            f"fused_ema.state.load_into: iteration is {iteration!r}; it must be a whole number "
            "from 0"
        )
    state.load_into(manager, found, iteration=torch.tensor(5))
    assert manager.iteration == 5


def test_what_doesnt_fit_changes_nothing():
    model = a_model()
    _, ema = both(model)
    manager = EMAManager(model, 0.25)
    before = {n: t.clone() for n, t in manager.named_emas()}
    ema["body.1.bias"] = torch.zeros(9)
    ema["other"] = ema.pop("frozen")
    ema["body.0.bias"] = ema["body.0.bias"].double()
    with pytest.raises(FormatError) as error:
        state.load_into(manager, Found("timm", ema, iteration=3))
    text = str(error.value)
    assert text.startswith("fused_ema.state.load_into: the averages of 'timm' don't fit this model")
    for line in ("missing in 'ema': 'frozen'", "surplus in 'ema': 'other'", "'body.1.bias' in"):
        assert line in text
    assert "'body.0.bias' in 'ema' is float64" in text
    assert_same(dict(manager.named_emas()), before)
    assert manager.iteration == 0
    with manager.swapped(), pytest.raises(RuntimeError, match="swapped already"):
        state.load_into(manager, Found("timm", before))


def test_one_of_two_tied_names_is_enough():
    model = a_model()
    _, ema = both(model)
    del ema["head.weight"]
    manager = EMAManager(model, 0.25)
    state.load_into(manager, Found("timm", ema))
    assert_same({"": dict(manager.named_emas())["head.weight"]}, {"": ema["embedding.weight"]})
    _, ema = both(a_model())
    ema["head.weight"] = ema["head.weight"] + 1
    with pytest.raises(FormatError, match="differ in 'ema' but are one tensor"):
        state.load_into(manager, Found("timm", ema))


# ---- writing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", WRITABLE)
def test_what_is_written_is_read(name, dtype, tmp_path):
    model = a_model(dtype)
    raw, ema = both(model)
    file = tmp_path / "out"
    file.write_text("of before")
    found = Found("test", ema, raw, STEP, UPDATES, 1 - DECAY, EPOCH)
    state.write(file, found, name, model=model)
    again = state.read(file, model=model, format=name)
    chosen = {n: ema[n] for n in ema if name not in LISTS or n not in buffers_of(model)}
    assert_same({n: again.ema[n] for n in chosen}, chosen)
    assert again.ema.keys() == chosen.keys()
    if again.raw:
        assert_same(again.raw, raw)
    if name in made_by_hand:
        wanted = made(name, raw, ema, model)
        written = torch.load(file, weights_only=True)
        for key, value in wanted.items():
            if isinstance(value, dict) and key not in ("meta", "optimizer"):
                part = written[key].keys() if name != "fused_ema" else value.keys()
                assert list(part) == list(value)
    assert os.listdir(tmp_path) == ["out"]


made_by_hand = ("mmcv", "mmengine", "timm", "fused_ema")


def test_an_averaged_model_loads_it(tmp_path):
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    raw, ema = both_of(model)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.75))
    state.write(tmp_path / "x", Found("test", ema, raw, STEP, UPDATES), "averaged_model")
    averaged.load_state_dict(torch.load(tmp_path / "x", weights_only=True))
    assert averaged.n_averaged == UPDATES
    assert_same(averaged.module.state_dict(), ema)
    assert_same(state.read(averaged.state_dict()).ema, ema)


def both_of(model):
    raw = values_of(model)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor += 1
    ema = values_of(model)
    model.load_state_dict(raw)
    return raw, ema


def test_what_a_format_needs(tmp_path):
    _, ema = both(a_model())
    bare = Found("safetensors", ema)
    for name in ("mmcv", "mmengine", "timm"):
        with pytest.raises(FormatError, match="has the raw weights too"):
            state.write(tmp_path / "x", bare, name)
    for name in ("averaged_model", "fused_ema", "ema_pytorch"):
        with pytest.raises(FormatError, match="counts its updates"):
            state.write(tmp_path / "x", bare, name)
    counted = replace(bare, iteration=3)
    with pytest.raises(FormatError, match="pass the model"):
        state.write(tmp_path / "x", counted, "torch_ema")
    with pytest.raises(FormatError, match="records its decay"):
        state.write(tmp_path / "x", counted, "torch_ema", model=a_model())
    with pytest.raises(FormatError, match="'weight' is missing"):
        state.write(tmp_path / "x", counted, "diffusers", model=nn.Linear(1, 1))
    with pytest.raises(FormatError, match="choose from"):
        state.write(tmp_path / "x", counted, "lightning")
    tensors = {"a.b": torch.ones(1), "a_b": torch.ones(1)}
    with pytest.raises(FormatError, match=r"'a.b' and 'a_b' would both be 'ema_a_b'"):
        state.write(tmp_path / "x", Found("timm", tensors, tensors), "mmcv")
    assert os.listdir(tmp_path) == []


def test_a_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "x.safetensors"
    state.write(file, Found("test", {"a": torch.ones(2)}), "safetensors")
    bad = {"a": torch.zeros(2), "b": torch.zeros(2, dtype=torch.complex128)}
    with pytest.raises(FormatError, match="'b' is complex128"):
        state.write(file, Found("test", bad), "safetensors")
    assert_same(state.read(file).ema, {"a": torch.ones(2)})
    assert os.listdir(tmp_path) == ["x.safetensors"]
    with pytest.raises(IsADirectoryError):
        state.write(tmp_path, Found("test", {"a": torch.ones(2)}), "safetensors")


def test_a_file_is_written_over_itself(tmp_path):
    _, ema = both(a_model())
    file = tmp_path / "x.safetensors"
    state.write(file, Found("test", ema), "safetensors")
    assert main(["convert", str(file), str(file), "--to", "safetensors"]) == 0
    assert_same(state.read(file, model=a_model()).ema, state.read(file).ema)
    assert_same({n: state.read(file).ema[n] for n in ema}, ema)


def test_every_tensor_is_aligned(tmp_path):
    dtypes = (torch.uint8, torch.float16, torch.float64, torch.bool, torch.float32)
    tensors = {str(dtype): torch.ones(3, dtype=dtype) for dtype in dtypes}
    state.write(tmp_path / "x", Found("test", tensors), "safetensors")
    content = (tmp_path / "x").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for name, tensor in tensors.items():
        assert (8 + length + header[name]["data_offsets"][0]) % tensor.itemsize == 0


def test_tensors_of_a_file_may_be_changed(tmp_path):
    file = tmp_path / "x.safetensors"
    state.write(file, Found("test", {"a": torch.ones(2)}), "safetensors")
    state.read(file).ema["a"].zero_()
    assert_same(state.read(file).ema, {"a": torch.ones(2)})


# ---- a run that is killed

TRAINING = """
    import sys
    from pathlib import Path
    import torch
    from torch import nn
    from fused_ema import EMAManager, _safetensors, schedules, state
    from fused_ema.formats import Found

    torch.set_num_threads(1)
    name, file, last = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    settings = {"momentum_fun": schedules.exponential(0.1, total_iter=9), "interval": 2}
    ema = EMAManager(model, form="mul_add", **settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    if file.exists():
        found = state.read(file, model=model)
        assert found.format == name
        model.load_state_dict(found.raw)
        state.load_into(ema, found)
    while ema.iteration < last:
        batch = torch.randn(4, 5, generator=torch.Generator().manual_seed(ema.iteration))
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
        averages = dict(ema.named_emas())
        found = Found("mine", averages, model.state_dict(), ema.iteration, ema.num_updates)
        state.write(file, found, name)
        print(ema.iteration, flush=True)
"""


def test_a_killed_run_ends_as_one_that_was_not(tmp_path):
    name = "mmcv"
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    code = textwrap.dedent(TRAINING)
    command = [sys.executable, "-c", code, name, str(resumed), "1000000"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        while process.stdout.readline() != "5\n":
            pass
        process.kill()
    reached = state.read(resumed).iteration
    assert reached >= 5
    last = reached + 5
    for file in (resumed, whole):
        done = child(TRAINING, name, file, last)
        assert done.returncode == 0, done.stderr
        started = done.stdout.split()[0]
        assert started == (str(reached + 1) if file is resumed else "1")
    actual, expected = state.read(resumed), state.read(whole)
    assert_same(actual.ema, expected.ema)
    assert_same(actual.raw, expected.raw)
    assert actual.iteration == expected.iteration == last
    assert actual.num_updates == expected.num_updates


# ---- the command line


def run(*words, capsys):
    status = main([str(word) for word in words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_inspect(tmp_path, capsys):
    raw, ema = both(a_model(torch.bfloat16))
    torch.save(made("mmengine", raw, ema, None), tmp_path / "epoch_2.pth")
    status, out, err = run("inspect", tmp_path / "epoch_2.pth", capsys=capsys)
    assert (status, err) == (0, "")
    lines = {line[:12].strip(): line[12:] for line in out.splitlines()}
    assert lines["format"] == "mmengine"
    assert lines["ema"].startswith("15 tensors, 218 elements, ")
    assert lines["ema"].endswith("in state_dict")
    assert lines["raw"].endswith("in ema_state_dict 'module.*'")
    assert (lines["iteration"], lines["num_updates"], lines["epoch"]) == ("7", "5", "2")
    assert lines["momentum"] == "not recorded"
    assert "bfloat16: " in out
    assert "uint8: 1 tensors, 5 elements, 5 B" in out
    assert lines["total"].startswith("30 tensors, 436 elements")


def test_inspect_says_what_told_it(tmp_path, capsys):
    file, *_ = mmcv_file(tmp_path, "raw iter_3.pth")
    status, out, _ = run("inspect", file, capsys=capsys)
    assert status == 0
    assert "the name of the file: saved by iterations" in out
    assert "state_dict 'ema_*'" in out
    status, out, _ = run("inspect", file, "--main", "ema", capsys=capsys)
    assert "main was given" in out


def test_inspect_needs_no_names(tmp_path, capsys):
    model = a_model()
    raw, ema = both(model)
    torch.save(made("torch_ema", raw, ema, model), tmp_path / "x")
    status, out, _ = run("inspect", tmp_path / "x", capsys=capsys)
    assert status == 0
    assert "in shadow_params" in out
    assert "0.25" in out


@pytest.mark.parametrize("to", WRITABLE)
def test_convert(to, tmp_path, capsys):
    model = a_model()
    raw, ema = both(model)
    source, names = tmp_path / "in.pth", tmp_path / "names.txt"
    torch.save(made("mmengine", raw, ema, model), source)
    names.write_text("\n".join(n for n, _ in model.named_parameters()) + "\n")
    words = ["convert", source, tmp_path / "out", "--to", to]
    if to in LISTS:
        torch.save(made("nemo", raw, ema, model), source)
        status, _, err = run(*words, capsys=capsys)
        assert status == 2
        assert err.count("\n") == 1
        words += ["--model-names", names]
    status, out, err = run(*words, capsys=capsys)
    assert (status, err) == (0, "")
    assert out.startswith(f"wrote {tmp_path / 'out'}: {to} of ")
    found = state.read(tmp_path / "out", format=to, model=model)
    chosen = [n for n, _ in model.named_parameters()] if to in LISTS else list(ema)
    assert_same({n: found.ema[n] for n in chosen}, {n: ema[n] for n in chosen})


def test_names_from_a_checkpoint(tmp_path, capsys):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    _, ema = both_of(model)
    data = made("torch_ema", ema, ema, model)
    torch.save(data, tmp_path / "in")
    state.write(tmp_path / "m.safetensors", Found("test", ema), "safetensors")
    torch.save({"state_dict": ema}, tmp_path / "m.pth")
    for names in ("m.safetensors", "m.pth"):
        words = ["convert", tmp_path / "in", tmp_path / "out", "--to", "safetensors"]
        assert run(*words, "--model-names", tmp_path / names, capsys=capsys)[0] == 0
        assert_same({n: state.read(tmp_path / "out").ema[n] for n in ema}, ema)


def test_where_the_file_doesnt_say(tmp_path, capsys):
    raw, ema = both(a_model())
    torch.save(made("timm", raw, ema, None), tmp_path / "in")
    words = ["convert", tmp_path / "in", tmp_path / "out", "--to", "averaged_model"]
    status, _, err = run(*words, capsys=capsys)
    assert (status, "--iteration" in err) == (2, True)
    assert run(*words, "--iteration", 9, capsys=capsys)[0] == 0
    assert state.read(tmp_path / "out").num_updates == 9


def bad_inputs(folder):
    raw, ema = both(a_model())
    good = folder / "good.pth"
    torch.save(made("timm", raw, ema, None), good)
    (folder / "cut.pth").write_bytes(good.read_bytes()[:-100])
    (folder / "empty.pth").write_bytes(b"")
    (folder / "text.pth").write_text("hello, this is no checkpoint\n")
    torch.save({"state_dict": raw}, folder / "raw.pth")
    torch.save({"ema": Secret()}, folder / "best.pt")
    (folder / "names.txt").write_text("a\nb\n")
    (folder / "x.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    return {
        "cut.pth": "is truncated",
        "empty.pth": "is empty",
        "text.pth": "no checkpoint",
        "raw.pth": "no average",
        "best.pt": "is a pickled",
        "none.pth": "No such file",
        "x.safetensors": "is truncated",
        "": "config.json",
        "good.pth --model-names names.txt": "of another model",
        "good.pth --format mmcv": "doesn't have the format 'mmcv'",
        "good.pth --prefix zzz": "no average of a name that begins",
    }


def test_bad_input_is_one_line(tmp_path, capsys, monkeypatch):
    cases = bad_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    for words, message in cases.items():
        file, *more = words.split() or ["."]
        for command in (["inspect", file], ["convert", file, "out", "--to", "safetensors"]):
            status, out, err = run(*command, *more, capsys=capsys)
            assert (status, out) == (2, ""), words
            assert err.startswith("error: "), words
            assert err.count("\n") == 1, words
            assert message in err, words
    assert not (tmp_path / "out").exists()
    status, _, err = run("convert", "good.pth", "none/out", "--to", "safetensors", capsys=capsys)
    assert (status, err) == (2, "error: 'none' is no folder\n")
    for words in (["convert", "good.pth", "x", "--to", "nemo"], [], ["inspect"], ["--bad"]):
        with pytest.raises(SystemExit, match="2"):
            main(words)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("has_rich", [False, True])
def test_progress_on_a_terminal(has_rich, monkeypatch):
    if has_rich:
        pytest.importorskip("rich")
    else:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress("writing x") as progress:
        progress(1, 4)
        progress(4, 4)
    if not has_rich:
        assert terminal.getvalue() == "\rwriting x:  25 % of 4 B\r\x1b[K"
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with Progress("writing x") as progress:
        progress(1, 4)
    assert sys.stderr.getvalue() == ""


def child(code, *words, **settings):
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=120, **settings
    )


ALONE = """
    import runpy, sys
    for name in ("numpy", "safetensors", "rich", "yaml"):
        sys.modules[name] = None
    source, out = sys.argv[1:]
    for words in (["convert", source, out, "--to", "safetensors"], ["inspect", out], ["inspect"]):
        sys.argv[1:] = words
        try:
            runpy.run_module("fused_ema", run_name="__main__", alter_sys=True)
        except SystemExit as end:
            print("status", end.code)
"""


def test_with_torch_alone(tmp_path):
    raw, ema = both(a_model())
    torch.save(made("timm", raw, ema, None), tmp_path / "in")
    done = child(ALONE, tmp_path / "in", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("status")] == [
        *("status 0", "status 0", "status 2")
    ]
    assert "Traceback" not in done.stderr
    assert "safetensors" in done.stdout


PEAK = """
    import re, sys
    from pathlib import Path
    import fused_ema.__main__ as program

    def resident(key):
        # Not getrusage's: that goes on counting from the process that started this one.
        text = Path("/proc/self/status").read_text()
        return int(re.search(key + r":\\s+(\\d+) kB", text)[1]) * 1024

    for source in sys.argv[2:]:
        Path("/proc/self/clear_refs").write_text("5")  # The peak starts anew.
        before = resident("VmRSS")
        assert program.main(["convert", source, sys.argv[1], "--to", "safetensors"]) == 0
        print("grown", resident("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="pages are given back where Linux is")
def test_a_file_larger_than_memory(tmp_path):
    # 12 tensors of 16 MB: the peak may hold some of them, never half of the file.
    tensors = {f"layer.{i}": torch.full((4_000_000,), float(i)) for i in range(12)}
    files = [tmp_path / "torch", tmp_path / "safetensors"]
    torch.save({"state_dict_ema": tensors, "epoch": 1}, files[0])
    state.write(files[1], Found("test", tensors), "safetensors")
    done = child(PEAK, tmp_path / "out", *files)
    assert done.returncode == 0, done.stderr
    grown = [int(line.split()[1]) for line in done.stdout.splitlines() if line[:5] == "grown"]
    assert len(grown) == 2
    for file, num_bytes in zip(files, grown, strict=True):
        size = file.stat().st_size
        assert num_bytes < size / 4, f"{num_bytes:,} bytes for {file.name} of {size:,}"
    assert_same(state.read(tmp_path / "out").ema, tensors)
