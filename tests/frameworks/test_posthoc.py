"""Snapshots by one line of each trainer, and ema-pytorch's own PostHocEMA beside ours."""

from __future__ import annotations

import warnings

import pytest
import test_lightning as of_lightning
import test_transformers as of_transformers
import torch
from ema_pytorch import KarrasEMA, PostHocEMA
from nets import assert_same
from torch import nn
from units import NUM, Unit

import fused_ema
from fused_ema import EMAManager, posthoc, schedules
from fused_ema.hooks.lightning import EMA
from fused_ema.hooks.transformers import EMACallback

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "`torch.jit")
    import test_mmengine as of_mmengine

pytestmark = [*of_lightning.pytestmark, *of_mmengine.pytestmark]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_lightning(tmp_path):
    ema = EMA(momentum_fun=schedules.power(0.1))
    posthoc.Snapshots(ema, tmp_path / "snapshots", every=4, means=True)
    trainer = of_lightning.make_trainer(tmp_path, ema)
    trainer.fit(of_lightning.Module(), of_lightning.loader(4))
    assert ema.manager.iteration == 8
    assert names(tmp_path / "snapshots") == [
        f"00000000{i}-{name}.safetensors" for i in (4, 8) for name in ("mean", "power-0.1")
    ]
    last = fused_ema.state.read(tmp_path / "snapshots" / "000000008-power-0.1.safetensors")
    emas = dict(ema.manager.named_emas())
    assert_same(last.ema, {name: emas[name] for name in last.ema})


def test_transformers(tmp_path):
    trainer = of_transformers.make_trainer(tmp_path, of_transformers.make_model())
    ema = EMACallback(momentum_fun=schedules.power(0.1)).attach(trainer)
    posthoc.Snapshots(ema, tmp_path / "snapshots", every=5)
    trainer.train()
    assert names(tmp_path / "snapshots") == [
        "000000005-power-0.1.safetensors",
        "000000010-power-0.1.safetensors",
    ]
    last = fused_ema.state.read(tmp_path / "snapshots" / "000000010-power-0.1.safetensors")
    emas = dict(ema.manager.named_emas())
    assert_same(last.ema, {name: emas[name] for name in last.ema})


def test_mmengine_resumed_as_uninterrupted(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # As its own tests.

    def hook(folder):
        return {
            "type": "FusedSnapshotHook",
            "folder": str(tmp_path / folder),
            "every": 3,
            "means": True,
        }

    for run in ("whole", "killed"):
        num = 3 if run == "whole" else 1
        runner = of_mmengine.make_runner(tmp_path / f"{run}-run", [hook(run)], num=num)
        runner.train()
    last = tmp_path / "killed-run" / "epoch_1.pth"
    runner = of_mmengine.make_runner(
        tmp_path / "killed-run", [hook("killed")], load_from=str(last), resume=True
    )
    runner.train()
    found = names(tmp_path / "whole")
    assert len(found) >= 6
    assert names(tmp_path / "killed") == found
    for name in found:
        whole, killed = (fused_ema.state.read(tmp_path / run / name) for run in ("whole", "killed"))
        assert_same(killed.ema, whole.ema)
    of_mmengine.make_runner(tmp_path / "plain", []).train()
    last = str(tmp_path / "plain" / "epoch_3.pth")
    options = {"num": 4, "load_from": last, "resume": True}
    runner = of_mmengine.make_runner(tmp_path / "plain", [hook("other")], **options)
    with pytest.raises(
        ValueError, match=r"resumes at iteration .* that has no averages for snapshots"
    ):
        runner.train()


def test_ema_pytorchs_folder_read_as_it_reads_it_itself(tmp_path):
    """Updates at each iteration and fp32 files, where its own rule and counts are right."""
    model, stds = Unit(), (0.05, 0.10)
    options = {"update_every": 1}
    theirs = PostHocEMA(
        model,
        sigma_rels=stds,
        checkpoint_every_num_steps=20,
        checkpoint_folder=str(tmp_path),
        checkpoint_dtype=torch.float32,
        **options,
    )
    tracked = KarrasEMA(model, sigma_rel=0.075, **options)
    for i in range(NUM):
        model.at(i + 1)
        theirs.update()
        tracked.update()
    expected = theirs.synthesize_ema_model(sigma_rel=0.075, step=NUM).ema_model.weight.detach()
    found = posthoc.reconstruct(tmp_path, std=0.075, profiles=stds).ema["weight"]
    wanted = tracked.ema_model.weight.detach()

    def off(weights):
        return float((weights - wanted).norm() / wanted.norm())

    assert torch.allclose(found, expected, atol=1e-4)
    assert off(found) < 1.05 * off(expected) < 0.02


def test_a_model_of_its_own_beside_ema_pytorch(tmp_path):
    """A posthoc folder of theirs goes into a manager, which then goes on."""
    model = nn.Linear(3, 3)
    theirs = PostHocEMA(
        model,
        sigma_rels=(0.05, 0.10),
        update_every=1,
        checkpoint_every_num_steps=2,
        checkpoint_folder=str(tmp_path),
        checkpoint_dtype=torch.float32,
    )
    for _ in range(12):
        with torch.no_grad():
            model.weight.normal_()
        theirs.update()
    ema = EMAManager(model, momentum_fun=schedules.power(0.05))
    posthoc.reconstruct(tmp_path, std=0.05, profiles=(0.05, 0.10), into=ema)
    assert ema.iteration == 12
    short = dict(theirs.ema_models[0].ema_model.named_parameters())
    for name, tensor in ema.named_emas():
        assert torch.allclose(tensor, short[name], atol=1e-6), name
