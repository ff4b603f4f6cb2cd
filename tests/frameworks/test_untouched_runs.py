"""A run with an average is the run without it: every loss and every generator afterwards."""

from __future__ import annotations

import logging
import random
import time
import warnings

import numpy as np
import pytest
import stubs
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from untouched import changes, process_state, untouched

stubs.install()

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="On January 1, 2023, MMCV will release")
    warnings.filterwarnings("ignore", "`torch.jit")
    import lightning.pytorch as pl
    import mmengine.runner
    from diffusers import UNet2DModel
    from mmcv.runner import EpochBasedRunner
    from mmengine.model import BaseModel
    from transformers import Trainer, TrainingArguments

    import fused_ema.hooks.mmcv
    import fused_ema.hooks.mmengine
    from fused_ema.hooks.diffusers import EMAModel
    from fused_ema.hooks.lightning import EMA
    from fused_ema.hooks.transformers import EMACallback

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '[a-z_]*' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true"),
    pytest.mark.filterwarnings("ignore:Environment variable TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"),
    pytest.mark.filterwarnings("ignore:`torch.jit"),
]

DATA = torch.arange(96.0).view(24, 4) / 96


class Net(nn.Module):
    """Dropout, and noise of all generators, in training and in evaluation."""

    def __init__(self):
        super().__init__()
        self.linear, self.dropout = nn.Linear(4, 1), nn.Dropout(0.5)
        self.losses = []

    def loss(self, x):
        noise = random.random() + np.random.random()
        loss = self.linear(self.dropout(x)).square().mean() + noise * self.linear.bias.sum()
        if self.training:
            self.losses.append(loss.item())
        return loss


def in_lightning(tmp_path, has_ema):
    class Module(pl.LightningModule, Net):
        def training_step(self, batch):
            return self.loss(batch[0])

        def validation_step(self, batch):
            self.loss(batch[0])
            torch.rand(1)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    # Made before the model, as one writes it.
    callbacks = [EMA(momentum=0.1, begin=1)] if has_ema else []
    module = Module()
    trainer = pl.Trainer(
        max_epochs=2,
        callbacks=callbacks,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    data = TensorDataset(DATA)
    trainer.fit(module, DataLoader(data, 4, shuffle=True), DataLoader(data, 8))
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    return module.losses


def in_transformers(tmp_path, has_ema):
    class Model(Net):
        def forward(self, x, labels=None):
            return {"loss": self.loss(x), "logits": torch.rand(len(x), 1)}

    callback = EMACallback(momentum=0.1) if has_ema else None
    model = Model()
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        num_train_epochs=2,
        per_device_train_batch_size=4,
        learning_rate=0.05,
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        data_seed=None,
    )
    samples = [{"x": x, "labels": 0.0} for x in DATA]
    trainer = Trainer(model, arguments, train_dataset=samples, eval_dataset=samples)
    torch.rand(int(torch.randint(9, ())))
    if has_ema:
        callback.attach(trainer)
    trainer.train()
    trainer.evaluate()
    return model.losses


def in_mmcv(tmp_path, has_ema):
    class Model(Net):
        def train_step(self, data, optimizer):
            loss = self.loss(data[0])
            return {"loss": loss, "log_vars": {"loss": loss.item()}, "num_samples": 4}

    model = Model()
    logger = logging.getLogger("test_untouched_runs")
    logger.setLevel(logging.CRITICAL)
    runner = EpochBasedRunner(
        model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        work_dir=str(tmp_path),
        logger=logger,
        meta={},
        max_epochs=2,
    )
    hooks = [{"type": "FusedExpMomentumEMAHook", "priority": 49}] if has_ema else []
    runner.register_training_hooks(
        {"policy": "fixed"}, {"grad_clip": None}, {"interval": 1}, None, custom_hooks_config=hooks
    )
    runner.run([DataLoader(TensorDataset(DATA), 4, shuffle=True)], [("train", 1)])
    return model.losses


def in_mmengine(tmp_path, has_ema):
    class Model(BaseModel):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def forward(self, inputs, mode="tensor"):
            return {"loss": self.net.loss(inputs)}

    class Samples(torch.utils.data.Dataset):
        def __len__(self):
            return len(DATA)

        def __getitem__(self, i):
            return {"inputs": DATA[i]}

    hooks = [{"type": "FusedEMAHook", "momentum": 0.1}] if has_ema else []
    model = Model()
    runner = mmengine.runner.Runner(
        model=model,
        work_dir=str(tmp_path),
        train_dataloader={
            "dataset": Samples(),
            "batch_size": 4,
            "sampler": {"type": "DefaultSampler", "shuffle": True},
            "collate_fn": {"type": "default_collate"},
        },
        train_cfg={"by_epoch": True, "max_epochs": 2},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1}},
        custom_hooks=hooks,
        experiment_name=f"untouched_{time.monotonic_ns()}",
        log_level="ERROR",
    )
    runner.train()
    return model.net.losses


RUNS = [in_lightning, in_transformers, in_mmcv, in_mmengine]


@pytest.mark.parametrize("run", RUNS)
def test_a_run_with_the_average_is_the_run_without(tmp_path, run, monkeypatch):
    monkeypatch.setattr("mmcv.runner.epoch_based_runner.time.sleep", lambda _: None)
    seen = []
    for place, has_ema in enumerate((False, False, True)):
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)
        losses = run(tmp_path / str(place), has_ema)
        seen.append((losses, process_state()))
    (_, _), (losses, state), (losses_with, state_with) = seen
    assert len(losses) >= 12
    assert len(set(losses)) > 10
    assert seen[0][0] == losses  # It can be repeated at all.
    assert losses_with == losses
    assert changes(state, state_with) == []


def test_callbacks_are_made_without_a_trace():
    with untouched():
        EMA(momentum=0.1, device="cpu", include="*")
        EMACallback(momentum=0.1, begin=2)
        fused_ema.hooks.mmcv.ExpMomentumEMAHook(total_iter=7)
        fused_ema.hooks.mmcv.LinearMomentumEMAHook()
        fused_ema.hooks.mmengine.FusedEMAHook()
        fused_ema.hooks.mmengine.FusedExponentialMovingAverage(nn.Identity())


def test_diffusers_models_are_saved_and_read_without_a_trace(tmp_path, monkeypatch):
    def draw(self, reset=nn.Conv2d.reset_parameters):
        random.random()
        np.random.random()
        reset(self)

    monkeypatch.setattr(nn.Conv2d, "reset_parameters", draw)
    kind = {
        "sample_size": 8,
        "block_out_channels": (4, 8),
        "norm_num_groups": 2,
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
    }
    unet = UNet2DModel(**kind)
    with untouched():
        ema = EMAModel(unet.parameters(), model_cls=UNet2DModel, model_config=unet.config)
        ema.step(unet.parameters())
        ema.save_pretrained(tmp_path)
        again = EMAModel.from_pretrained(tmp_path, UNet2DModel)
    assert all(map(torch.equal, ema.shadow_params, again.shadow_params))
    assert again.optimization_step == 1
