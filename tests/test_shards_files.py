"""Sharded averages in files: saved, loaded onto other ranks, gathered, converted."""

from __future__ import annotations

import os
import pickle
import shutil
import signal

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import Ranks
from sharded import (
    Net,
    Pair,
    all_of,
    assert_same,
    both,
    by_parts,
)
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fused_ema import EMAManager, state
from fused_ema.__main__ import main

# Torch's, of one process.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

SETTINGS = {"float32": {}, "bfloat16": {"dtype": torch.bfloat16}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints of two ranks, and in known.pt what they have, by the kind of the model."""
    path = tmp_path_factory.mktemp("saved")
    ranks = Ranks(2)
    ranks(save, str(path))
    ranks.stop()
    return str(path)


def everything_of(pair):
    return {
        "ema": pair.ema,
        "model": pair.sharded.state_dict(),
        "optimizer": pair.optimizer.state_dict(),
    }


def save(folder):
    known = {}
    for kind, settings in SETTINGS.items():
        pair = Pair(by_parts, **settings)
        for _ in range(2):
            pair.step()
            pair.update()
        for name, tensor in pair.ema.state_dict()["ema"].items():
            model = pair.sharded.state_dict()[name]
            assert isinstance(tensor, DTensor) == isinstance(model, DTensor)
            if isinstance(tensor, DTensor):
                assert tensor.placements == model.placements
                shard = tensor._local_tensor
                assert shard.untyped_storage().nbytes() == shard.numel() * shard.element_size()
        dcp.save(everything_of(pair), checkpoint_id=f"{folder}/{kind}")
        full = pair.ema.full_state_dict()
        if dist.get_rank() == 0:
            assert_same(full["ema"], dict(pair.want.named_emas()), "gathered")
            pair.want.load_state_dict(full)
        else:
            assert full == {}
        known[kind] = {
            "ema": all_of(pair.ema.named_emas()),
            "model": all_of(pair.sharded.state_dict()),
            "state": full,
        }
        with pair.ema.swapped():
            swapped = pair.ema.full_state_dict()
            if swapped:
                assert_same(swapped["ema"], known[kind]["ema"], "gathered while swapped")
                assert_same(swapped["raw"], known[kind]["model"], "gathered while swapped")
            dcp.save({"ema": pair.ema}, checkpoint_id=f"{folder}/{kind}_swapped")
    waits = dcp.async_save({"ema": pair.ema}, checkpoint_id=f"{folder}/async")
    waits.result()
    if dist.get_rank() == 0:
        torch.save(known, f"{folder}/known.pt")


def known_of(folder, kind):
    return torch.load(f"{folder}/known.pt")[kind]


# ---- onto other ranks


def load(folder, shard, kind):
    settings, known = SETTINGS[kind], known_of(folder, kind)
    pair = Pair(shard, **settings)
    dcp.load(everything_of(pair), checkpoint_id=f"{folder}/{kind}")
    check(pair, known)
    # A whole state on every rank is as good.
    pair = Pair(shard, **settings)
    pair.ema.load_state_dict(known["state"])
    assert_same(all_of(pair.ema.named_emas()), known["ema"], "loaded whole")
    if kind == "bfloat16":
        pair = Pair(shard, **settings)
        dcp.load({"ema": pair.ema}, checkpoint_id=f"{folder}/async")
        assert_same(all_of(pair.ema.named_emas()), known["ema"], "saved meanwhile")


def check(pair, known):
    assert_same(all_of(pair.ema.named_emas()), known["ema"], "averages")
    assert_same(all_of(pair.sharded.state_dict()), known["model"], "model")
    assert pair.ema.num_updates == pair.ema.iteration == 2


def load_swapped(folder, shard):
    for kind, settings in SETTINGS.items():
        known = known_of(folder, kind)
        pair = Pair(shard, **settings)
        with pytest.raises(Exception, match=r"call swap\(\)"):
            dcp.load({"ema": pair.ema}, checkpoint_id=f"{folder}/{kind}_swapped")
        pair.ema.swap()
        dcp.load({"ema": pair.ema}, checkpoint_id=f"{folder}/{kind}_swapped")
        assert pair.ema.is_swapped
        assert_same(all_of(pair.ema.named_emas()), known["ema"], "loaded, swapped")
        pair.ema.swap()
        check(pair, known)


def test_loaded_on_other_ranks(folder, two, four):
    two(load, folder, fully_shard, "float32")  # In another division of the model.
    two(load_swapped, folder, by_parts)
    four(load, folder, both, "bfloat16")


def test_loaded_by_one_process(folder):
    for kind, settings in SETTINGS.items():
        known = known_of(folder, kind)
        model = Net(**settings)
        ema = EMAManager(model, 0.25)
        dcp.load({"ema": ema, "model": model.state_dict()}, checkpoint_id=f"{folder}/{kind}")
        assert_same(dict(ema.named_emas()), known["ema"], "averages")
        assert_same(model.state_dict(), known["model"], "model")
        assert ema.num_updates == ema.iteration == 2
    assert not dist.is_initialized()


def save_of_both(folder):
    pair = Pair(both)
    pair.step()
    pair.update()
    dcp.save({"ema": pair.ema}, checkpoint_id=f"{folder}/both")
    averages = all_of(pair.ema.named_emas())
    if dist.get_rank() == 0:
        torch.save(averages, f"{folder}/both.pt")


def load_of_both(folder):
    pair = Pair(by_parts)
    dcp.load({"ema": pair.ema}, checkpoint_id=f"{folder}/both")
    assert_same(all_of(pair.ema.named_emas()), torch.load(f"{folder}/both.pt"), "of TP and FSDP")


def test_from_one_mesh_onto_another(two, four, tmp_path):
    four(save_of_both, str(tmp_path))
    two(load_of_both, str(tmp_path))


def test_dtypes_of_folders(folder, tmp_path):
    ema = EMAManager(Net(dtype=torch.bfloat16), 0.25, ema_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="was saved as float32 and is kept as bfloat16") as error:
        dcp.load({"ema": ema}, checkpoint_id=f"{folder}/float32")
    assert "with the ema_dtype it was saved with" in str(error.value)
    assert "the loader has written the averages in place" in str(error.value)
    assert ema.iteration == 0
    # A wider one holds all of the values.
    narrow = EMAManager(Net(dtype=torch.bfloat16), 0.25, ema_dtype=torch.bfloat16)
    dcp.save({"ema": narrow}, checkpoint_id=tmp_path)
    ema = EMAManager(Net(seed=1, dtype=torch.bfloat16), 0.25)
    dcp.load({"ema": ema}, checkpoint_id=tmp_path)
    for name, tensor in narrow.named_emas():
        assert torch.equal(dict(ema.named_emas())[name], tensor.to(ema.state_dict()["ema"][name]))


# ---- killed while it saves


class Dies(dcp.FileSystemWriter):
    """Kills the last rank when its part is written."""

    def write_data(self, *args):
        super().write_data(*args).wait()
        if dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().write_data(*args)


def train(pair, steps):
    for step in steps:
        pair.generator.manual_seed(step)
        pair.step()
        pair.update()


def goes_on(folder):
    pair = Pair(by_parts)
    train(pair, range(2))
    dcp.save(everything_of(pair), checkpoint_id=f"{folder}/2")
    train(pair, range(2, 4))
    found = [all_of(pair.ema.named_emas()), all_of(pair.sharded.state_dict())]
    if dist.get_rank() == 0:
        torch.save(found, f"{folder}/known.pt")


def is_killed(folder):
    pair = Pair(by_parts)
    dcp.load(everything_of(pair), checkpoint_id=f"{folder}/2")
    train(pair, range(2, 3))
    dcp.save(everything_of(pair), storage_writer=Dies(f"{folder}/3"))


def resumes(folder):
    pair = Pair(by_parts)
    with pytest.raises(BaseException, match=r"\.metadata"):
        dcp.load(everything_of(pair), checkpoint_id=f"{folder}/3")
    assert pair.ema.iteration == 0
    dcp.load(everything_of(pair), checkpoint_id=f"{folder}/2")
    train(pair, range(2, 4))
    averages, model = torch.load(f"{folder}/known.pt")
    assert_same(all_of(pair.ema.named_emas()), averages, "resumed")
    assert_same(all_of(pair.sharded.state_dict()), model, "resumed")


def test_killed_while_it_saves(tmp_path):
    ranks = Ranks(2)
    ranks(goes_on, str(tmp_path))
    with pytest.raises(AssertionError, match="rank 1: it ended"):
        ranks(is_killed, str(tmp_path))
    with pytest.raises(state.FormatError, match="saving it was broken off"):
        state.read(tmp_path / "3")
    ranks(resumes, str(tmp_path))
    ranks.stop()


# ---- gathered


class Live(TorchDispatchMode):
    """The most bytes that live at once, of what was made under it."""

    def __init__(self):
        super().__init__()
        self.storages = {}
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if type(tensor) is torch.Tensor:
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        alive = [size for ref, size in self.storages.values() if not ref.expired()]
        self.most = max(self.most, sum(alive))
        return result


def test_other_ranks_gather_one_tensor_at_a_time(two):
    two(gather_one_at_a_time)


def gather_one_at_a_time():
    model = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(12)])
    ema = EMAManager(fully_shard(model), 0.25)
    with Live() as live:
        full = ema.full_state_dict()
    one = 64 * 64 * 4
    if dist.get_rank() == 0:
        assert live.most >= 12 * one
        assert not any(isinstance(tensor, DTensor) for tensor in full["ema"].values())
    else:
        assert one <= live.most <= 3 * one  # As many as the gather itself takes.


# ---- read as data


def same(found, known, what):
    """In files of torch.distributed.checkpoint names have an order of their own."""
    assert found.keys() == known.keys(), what
    assert_same({name: found[name] for name in known}, known, what)


def test_a_folder_is_read_without_processes(folder, tmp_path, capsys):
    for kind in SETTINGS:
        known = known_of(folder, kind)
        found = state.read(f"{folder}/{kind}", Net())
        assert found.format == "fused_ema"
        assert (found.iteration, found.num_updates) == (2, 2)
        assert (found.ema_at, found.raw_at) == ("ema.ema", "model")
        same(found.ema, known["ema"], "read")
        same(found.raw, known["model"], "read")
        found = state.read(f"{folder}/{kind}_swapped")
        same(found.ema, known["ema"], "saved while swapped")
        same(found.raw, known["model"], "saved while swapped")
        out = tmp_path / "out.safetensors"
        assert main(["convert", f"{folder}/{kind}", str(out)]) == 0
        assert "safetensors of " in capsys.readouterr().out
        same(state.read(out).ema, known["model"] | known["ema"], "converted")
    assert main(["inspect", f"{folder}/{kind}"]) == 0
    assert "fused_ema" in capsys.readouterr().out
    assert main(["convert", f"{folder}/{kind}", str(tmp_path / "out.pt")]) == 2
    assert "doesn't say which format" in capsys.readouterr().err


def test_a_folder_as_one_file(folder, tmp_path):
    known = known_of(folder, "bfloat16")
    dcp_to_torch_save(f"{folder}/bfloat16", tmp_path / "one.pt")
    dcp_to_torch_save(f"{folder}/bfloat16_swapped", tmp_path / "swapped.pt")
    torch.save({"ema": known["state"]}, tmp_path / "full.pt")
    for name in ("one.pt", "swapped.pt", "full.pt"):
        same(state.read(tmp_path / name).ema, known["ema"], name)
        ema = EMAManager(Net(dtype=torch.bfloat16), 0.25)
        ema.load_state_dict(torch.load(tmp_path / name)["ema"])
        same(dict(ema.named_emas()), known["ema"], name)
        assert ema.iteration == 2
        assert ema.is_swapped == (name == "swapped.pt")


def test_states_in_a_folder(tmp_path):
    managers = [EMAManager(Net(seed=seed), 0.25) for seed in range(2)]
    emas = [dict(ema.named_emas()) for ema in managers]
    dcp.save(managers[0].state_dict(), checkpoint_id=tmp_path / "alone")
    same(state.read(tmp_path / "alone").ema, emas[0], "alone")
    app = {"app": {"ema": managers[0].state_dict(), "net": Net(seed=2).state_dict()}}
    dcp.save(app, checkpoint_id=tmp_path / "within")
    for key in ("", "app", "app.ema"):
        found = state.read(tmp_path / "within", key=key)
        same(found.ema, emas[0], key)
        same(found.raw, Net(seed=2).state_dict(), key)
        assert (found.ema_at, found.raw_at) == ("app.ema.ema", "app.net")
    two_of_them = {"fast": managers[0], "slow": managers[1]}
    dcp.save(two_of_them, checkpoint_id=tmp_path / "two")
    with pytest.raises(state.FormatError, match="several averages, under 'fast', 'slow'"):
        state.read(tmp_path / "two")
    same(state.read(tmp_path / "two", key="slow").ema, emas[1], "chosen")


class Trap:
    def __reduce__(self):
        return os.mkdir, ("sprung",)


def test_folders_that_do_not_serve(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dcp.save({"model": Net().state_dict()}, checkpoint_id="raw")

    def damaged(name, damage):
        shutil.copytree(f"{folder}/float32", name)
        damage(tmp_path / name)

    damaged("broken off", lambda path: (path / ".metadata").unlink())
    damaged("no index", lambda path: (path / ".metadata").write_bytes(b"no pickle"))
    damaged("cut", lambda path: os.truncate(path / "__1_0.distcp", 500))
    damaged("part", lambda path: (path / "__1_0.distcp").unlink())
    damaged("trap", lambda path: (path / ".metadata").write_bytes(pickle.dumps(Trap())))
    for name, message in {
        "raw": "no state of an EMAManager: it has the keys 'model'",
        "broken off": "saving it was broken off",
        "no index": "can't be read",
        "cut": "can't be read",
        "part": "is incomplete: it has no '__1_0.distcp'",
        "trap": "can't be read",
    }.items():
        with pytest.raises(state.FormatError, match=message):
            state.read(name)
    assert not os.path.exists("sprung")
    with pytest.raises(state.FormatError, match="no state of an EMAManager under 'model'"):
        state.read(f"{folder}/float32", key="model")
    with pytest.raises(state.FormatError, match="variant is for the folders of diffusers"):
        state.read(f"{folder}/float32", variant="fp16")
