"""Sharded averages in files: saved, loaded onto other ranks, gathered, converted."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sharded import (
    Pair,
    all_of,
    assert_same,
    both,
    by_parts,
    whole_state,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

# ---- states


def saved_and_loaded(folder):
    for settings in ({}, {"dtype": torch.bfloat16}):
        path = f"{folder}/{len(settings)}"
        pair = Pair(by_parts, **settings)
        for _ in range(3):
            pair.step()
            pair.update()
        state = pair.ema.state_dict()
        for name, tensor in state["ema"].items():
            model = dict(pair.sharded.state_dict())[name]
            assert isinstance(tensor, DTensor) == isinstance(model, DTensor)
            if isinstance(tensor, DTensor):
                assert tensor.placements == model.placements
                shard = tensor._local_tensor
                assert shard.untyped_storage().nbytes() == shard.numel() * shard.element_size()
        everything = {
            "ema": pair.ema,
            "model": pair.sharded.state_dict(),
            "optimizer": pair.optimizer.state_dict(),
        }
        dcp.save(everything, checkpoint_id=path)
        waits = dcp.async_save({"ema": pair.ema}, checkpoint_id=f"{path}_async")
        waits.result()
        averages = all_of(pair.ema.named_emas())
        with pair.ema.swapped():
            dcp.save({"ema": pair.ema}, checkpoint_id=f"{path}_swapped")
        for kind in ("", "_async"):
            fresh = Pair(fully_shard, **settings)  # In another division of the model.
            dcp.load({"ema": fresh.ema}, checkpoint_id=path + kind)
            assert_same(all_of(fresh.ema.named_emas()), averages, f"loaded{kind}")
            assert fresh.ema.num_updates == fresh.ema.iteration == 3
        fresh = Pair(by_parts, **settings)
        with pytest.raises(Exception, match=r"call swap\(\)"):
            dcp.load({"ema": fresh.ema}, checkpoint_id=f"{path}_swapped")
        fresh.ema.swap()
        dcp.load({"ema": fresh.ema}, checkpoint_id=f"{path}_swapped")
        assert fresh.ema.is_swapped
        assert_same(all_of(fresh.ema.named_emas()), averages, "loaded, swapped")
        fresh.ema.swap()
        assert_same(
            all_of(fresh.sharded.state_dict()), all_of(pair.sharded.state_dict()), "swapped back"
        )
        assert_same(all_of(fresh.ema.named_emas()), averages, "swapped back")
        pair.want.load_state_dict(whole_state(pair.ema))
        if dist.get_rank() == 0:
            torch.save({"state": whole_state(pair.ema), "model": averages}, f"{path}.pt")
        else:
            whole_state(pair.ema)


def loaded_on_another_number_of_ranks(folder):
    for settings in ({}, {"dtype": torch.bfloat16}):
        path = f"{folder}/{len(settings)}"
        known = torch.load(f"{path}.pt")
        for shard in (by_parts, both):
            fresh = Pair(shard, **settings)
            dcp.load({"ema": fresh.ema}, checkpoint_id=path)
            assert_same(all_of(fresh.ema.named_emas()), known["model"], "loaded")
            # A whole state on every rank is as good.
            fresh = Pair(shard, **settings)
            fresh.ema.load_state_dict(known["state"])
            assert_same(all_of(fresh.ema.named_emas()), known["model"], "loaded whole")


def test_saved_and_loaded(two, four, tmp_path):
    two(saved_and_loaded, str(tmp_path))
    four(loaded_on_another_number_of_ranks, str(tmp_path))
