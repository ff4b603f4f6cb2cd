"""Several averages in files, and of a model that is sharded."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from nets import Net, assert_same, move, values_of
from sharded import Net as ShardedNet
from sharded import Pair, all_of, by_parts
from sharded import assert_same as assert_same_everywhere
from torch.distributed.fsdp import fully_shard

from fused_ema import EMAManager, schedules, state
from fused_ema.__main__ import main
from fused_ema.formats import FormatError
from fused_ema.hooks._options import checked

MOMENTA = {"fast": 0.25, "wide": schedules.power(0.1)}

# Torch's, of one process.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def trained():
    model = Net()
    ema = EMAManager(model, MOMENTA)
    for step in range(3):
        move(model, step)
        ema.update()
    return model, ema


def averages_of(ema):
    return {name: {k: v.clone() for k, v in ema.named_emas(name)} for name in ema.averages}


@pytest.fixture(params=["file", "folder"])
def save(request, tmp_path):
    """Saves a dictionary for torch.load, or for torch.distributed.checkpoint."""

    def saved(content):
        path = tmp_path / "saved"
        if request.param == "file":
            torch.save(content, path)
        else:
            dcp.save(content, checkpoint_id=path)
        return path

    return saved


def test_one_of_them_is_read_by_its_name(trained, save):
    model, ema = trained
    averages, raw = averages_of(ema), values_of(model)
    path = save({"model": model.state_dict(), "ema": ema.state_dict()})
    for name in MOMENTA:
        found = state.read(path, model, average=name)
        assert_same({n: found.ema[n] for n in averages[name]}, averages[name])
        assert_same({n: found.raw[n] for n in raw}, raw)
        assert (found.iteration, found.num_updates) == (3, 3)
        assert found.ema_at == f"ema.ema.{name}"
        one = EMAManager(Net(seed=4))
        state.load_into(one, found)
        assert_same(one.named_emas(), averages[name])
        several = EMAManager(Net(seed=4), MOMENTA)
        with pytest.raises(ValueError, match="say which it is: average="):
            state.load_into(several, found, iteration=3)
        before = averages_of(several)
        state.load_into(several, found, average="wide")
        assert_same(several.named_emas("wide"), averages[name])
        params = dict(several._model.named_parameters())
        fast = dict(several.named_emas("fast"))
        assert_same({n: fast[n] for n in params}, {n: before["fast"][n] for n in params})
    with pytest.raises(
        FormatError, match=r"has 2 averages, 'fast', 'wide'; read the one .*average= \(--average\)"
    ):
        state.read(path)
    with pytest.raises(FormatError, match="has no average 'slow'; it has 'fast', 'wide'"):
        state.read(path, average="slow")


@pytest.mark.parametrize("read", list(MOMENTA))
def test_the_raw_weights_of_a_state_that_was_saved_while_swapped(trained, save, read):
    model, ema = trained
    averages, raw = averages_of(ema), values_of(model)
    with ema.swapped("wide"):
        path = save({"model": model.state_dict(), "ema": ema.state_dict()})
    found = state.read(path, average=read)
    assert_same({n: found.ema[n] for n in averages[read]}, averages[read])
    assert_same({n: found.raw[n] for n in raw}, raw)
    assert found.why == "saved while the model held the average 'wide'"


def test_a_name_where_there_is_none(trained, tmp_path):
    model, _ = trained
    one = EMAManager(model)
    for content, match in (
        ({"ema": one.state_dict()}, "has one average, without a name; leave average 'a' out"),
        (
            {"state_dict": model.state_dict(), "state_dict_ema": model.state_dict()},
            "has the format 'timm', whose average has no name; leave average 'a' out",
        ),
    ):
        torch.save(content, tmp_path / "x")
        with pytest.raises(FormatError, match=match):
            state.read(tmp_path / "x", average="a")
    with pytest.raises(FormatError, match="no averages under 'ema'"):
        state.read({"ema": {"version": 2, "ema": {}, "ema_dtypes": {}, "raw": {}} | POSITION})


POSITION = {"iteration": 0, "num_updates": 0, "is_swapped": False}


def test_of_several_alone_the_only_one_needs_no_name(trained):
    model, _ = trained
    ema = EMAManager(model, {"only": 0.1})
    found = state.read(ema.state_dict())
    assert_same(found.ema, dict(ema.named_emas()))
    assert found.ema_at == "ema.only"


def test_the_command_line(trained, save, tmp_path, capsys):
    model, ema = trained
    path = str(save({"model": model.state_dict(), "ema": ema.state_dict()}))
    assert main(["inspect", path]) == 0
    out = capsys.readouterr().out
    assert [line.split()[1] for line in out.splitlines() if line.startswith("average")] == [
        *MOMENTA
    ]
    assert "in ema.ema.fast" in out
    assert "in ema.ema.wide" in out
    assert main(["inspect", path, "--average", "wide"]) == 0
    out = capsys.readouterr().out
    assert "in ema.ema.wide" in out
    assert "fast" not in out
    target = str(tmp_path / "out.safetensors")
    assert main(["convert", path, target]) == 2
    assert "has 2 averages, 'fast', 'wide'" in capsys.readouterr().err
    assert main(["convert", path, target, "--average", "fast"]) == 0
    written = state.read(target).ema
    assert_same({n: written[n] for n, _ in ema.named_emas("fast")}, dict(ema.named_emas("fast")))


def test_callbacks_that_keep_one_say_so():
    with pytest.raises(ValueError, match="momentum names averages, and this keeps one"):
        checked(momentum=MOMENTA)


# ---- sharded


def compare(pair, what):
    for name in MOMENTA:
        pair.compare(pair.ema.named_emas(name), pair.want.named_emas(name), f"{what}: {name}")


def train_and_save(folder, dtype):
    pair = Pair(by_parts, dtype=dtype, momentum=MOMENTA)
    for _ in range(3):
        pair.step()
        pair.update()
        compare(pair, "after an update")
    for name in MOMENTA:
        with pair.ema.swapped(name), pair.want.swapped(name):
            pair.check_model(f"swapped with {name}")
            compare(pair, f"swapped with {name}")
    compare(pair, "swapped back")
    dcp.save({"ema": pair.ema, "model": pair.sharded.state_dict()}, checkpoint_id=f"{folder}/plain")
    full = pair.ema.full_state_dict()
    known = {name: all_of(pair.ema.named_emas(name)) for name in MOMENTA}
    if dist.get_rank() == 0:
        for name in MOMENTA:
            assert_same_everywhere(full["ema"][name], known[name], "gathered")
        torch.save(known, f"{folder}/known.pt")
        pair.want.load_state_dict(full)
    else:
        assert full == {}
    with pair.ema.swapped("wide"):
        dcp.save({"ema": pair.ema}, checkpoint_id=f"{folder}/swapped")


def load(folder, dtype):
    known = torch.load(f"{folder}/known.pt")
    pair = Pair(fully_shard, dtype=dtype, momentum=MOMENTA)
    dcp.load({"ema": pair.ema}, checkpoint_id=f"{folder}/plain")
    for name in MOMENTA:
        assert_same_everywhere(all_of(pair.ema.named_emas(name)), known[name], f"loaded {name}")
    pair = Pair(fully_shard, dtype=dtype, momentum=MOMENTA)
    pair.ema.swap("fast")  # So that there is room for the raw weights.
    dcp.load({"ema": pair.ema}, checkpoint_id=f"{folder}/swapped")
    assert pair.ema.is_swapped == "wide"
    for name in MOMENTA:
        assert_same_everywhere(all_of(pair.ema.named_emas(name)), known[name], f"loaded {name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_a_sharded_model(two, tmp_path, dtype):
    two(train_and_save, str(tmp_path), dtype)
    two(load, str(tmp_path), dtype)
    known = torch.load(tmp_path / "known.pt")
    for name in MOMENTA:
        found = state.read(tmp_path / "plain", ShardedNet(dtype=dtype), average=name)
        assert_same({n: found.ema[n] for n in known[name]}, known[name])
