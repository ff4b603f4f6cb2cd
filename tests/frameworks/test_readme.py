"""Every row of the README's table of frameworks, run in that framework."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

import pytest
import stubs
import torch
from nets import assert_same, values_of
from ranks import Ranks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fused_ema

stubs.install()

# What the frameworks themselves warn of, on this torch and without a GPU.
pytestmark = pytest.mark.filterwarnings("ignore")

README = (Path(__file__).parents[2] / "README.md").read_text()
SECTION = README.split("## In your framework\n")[1].split("\n## ")[0]
ROWS = dict(re.findall(r"^\| (?!you have|---)([^|]+) \| (.+) \|$", SECTION, re.MULTILINE))
STEPS = 5


class Model(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Linear(4, 3), nn.BatchNorm1d(3))


def run(row, **names):
    """Runs the code of a row; returns what it has named."""
    exec("\n".join(re.findall(r"`([^`]+)`", ROWS[row])), names)
    return names


def train(model, after_step=lambda: None, optimizer=None):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        model(torch.randn(8, 4, generator=generator)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        after_step()


def twins(make_ours, make_theirs, update):
    """Two averages of one run, by ours and by theirs."""
    model = Model()
    ours, theirs = make_ours(model), make_theirs(model)

    def after_step():
        update(ours, model)
        update(theirs, model)

    train(model, after_step)
    return ours, theirs


def mmcv_run(hook, folder):
    """What a model holds after two epochs with a hook of that configuration."""
    from mmcv.runner import HOOKS, EpochBasedRunner
    from mmcv.utils import build_from_cfg

    class Trained(Model):
        def train_step(self, data, optimizer):
            loss = self(data[0]).square().sum()
            return {"loss": loss, "log_vars": {}, "num_samples": len(data[0])}

    hook = dict(hook)
    priority = hook.pop("priority", "NORMAL")
    model = Trained()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    logger = logging.getLogger("test_readme")
    logger.propagate = False
    runner = EpochBasedRunner(
        model, optimizer=optimizer, work_dir=str(folder), logger=logger, max_epochs=2
    )
    runner.register_training_hooks({"policy": "fixed"}, {"grad_clip": None})
    runner.register_hook(build_from_cfg(hook, HOOKS), priority=priority)
    data = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    runner.run([DataLoader(TensorDataset(data), batch_size=4)], [("train", 1)])
    return model.state_dict()


def mmdet_reference(folder):
    from mmcv.runner import HOOKS
    from mmdet.core.hook.ema import ExpMomentumEMAHook as Reference

    HOOKS.register_module(name="ReadmeReference", module=Reference, force=True)
    return mmcv_run({"type": "ReadmeReference", "momentum": 0.0002, "priority": 49}, folder)


def test_mmcv(tmp_path):
    row = "mmcv 1.x, MMDetection 2.x"
    (hook,) = run(row)["custom_hooks"]
    assert_same(mmcv_run(hook, tmp_path), mmdet_reference(tmp_path))


def test_mmdet(tmp_path):
    from mmdet.core.hook import ema as module

    from fused_ema.hooks import mmcv

    expected = mmdet_reference(tmp_path)
    theirs = {name: vars(module)[name] for name in mmcv.__all__ if name in vars(module)}
    names = run("configs with MMDetection's own hooks")
    assert names["replace_mmdet_hooks"] is mmcv.replace_mmdet_hooks
    try:
        assert module.ExpMomentumEMAHook is mmcv.ExpMomentumEMAHook
        hook = {"type": "ExpMomentumEMAHook", "momentum": 0.0002, "priority": 49}
        assert_same(mmcv_run(hook, tmp_path), expected)
    finally:
        from mmcv.runner import HOOKS

        for name, their in theirs.items():
            setattr(module, name, their)
            if name in HOOKS:
                HOOKS.register_module(name=name, module=their, force=True)


def mmengine_run(hook, folder):
    from mmengine.model import BaseModel
    from mmengine.runner import Runner

    class Trained(BaseModel):
        def __init__(self):
            super().__init__()
            self.net = Model()

        def forward(self, inputs, mode):
            return {"loss": self.net(torch.stack(inputs)).square().sum()}

    data = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    runner = Runner(
        model=Trained(),
        work_dir=str(folder),
        train_dataloader={
            "dataset": [{"inputs": row} for row in data],
            "batch_size": 4,
            "sampler": {"type": "DefaultSampler", "shuffle": False},
            "collate_fn": {"type": "pseudo_collate"},
        },
        train_cfg={"by_epoch": True, "max_epochs": 2},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1}},
        default_hooks={"checkpoint": {"type": "CheckpointHook", "interval": 2}, "logger": None},
        custom_hooks=[hook],
        default_scope="mmengine",
        experiment_name=f"readme_{hook['type']}",
        log_level="ERROR",
    )
    runner.train()
    return torch.load(Path(folder) / "epoch_2.pth", weights_only=False)


def test_mmengine(tmp_path):
    (hook,) = run("MMEngine")["custom_hooks"]
    ours = mmengine_run(hook, tmp_path / "ours")
    theirs = mmengine_run(hook | {"type": "EMAHook"}, tmp_path / "theirs")
    for key in ("state_dict", "ema_state_dict"):
        assert_same(ours[key], theirs[key])


@pytest.mark.parametrize(
    "row", ["torch's AveragedModel", "the same, without its wait for the device"]
)
def test_swa_utils(row):
    from torch.optim import swa_utils

    theirs = swa_utils.get_ema_multi_avg_fn(0.999)
    names = {"AveragedModel": swa_utils.AveragedModel}
    ours, expected = twins(
        lambda model: run(row, model=model, **names)["averaged"],
        lambda model: swa_utils.AveragedModel(model, multi_avg_fn=theirs),
        lambda averaged, model: averaged.update_parameters(model),
    )
    is_torch_s = type(ours) is swa_utils.AveragedModel
    assert is_torch_s == (row == "torch's AveragedModel")
    assert_same(ours.state_dict(), expected.state_dict())


def test_timm():
    from timm.utils import ModelEmaV3

    ours, theirs = twins(
        lambda model: run("timm's ModelEmaV3", model=model)["averaged"],
        lambda model: ModelEmaV3(model, decay=0.9998, use_warmup=True),
        lambda averaged, model: averaged.update(model, step=7),
    )
    assert type(ours) is not ModelEmaV3
    assert_same(ours.state_dict(), theirs.state_dict())


def assert_close_lists(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_torch_ema():
    import torch_ema

    ours, theirs = twins(
        lambda model: run("torch_ema", model=model)["ema"],
        lambda model: torch_ema.ExponentialMovingAverage(model.parameters(), decay=0.995),
        lambda ema, model: ema.update(),
    )
    assert type(ours) is not torch_ema.ExponentialMovingAverage
    assert_close_lists(ours.shadow_params, theirs.shadow_params)


def test_diffusers():
    from diffusers.training_utils import EMAModel

    ours, theirs = twins(
        lambda model: run("diffusers' EMAModel", model=model)["ema"],
        lambda model: EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True),
        lambda ema, model: ema.step(model.parameters()),
    )
    assert type(ours) is not EMAModel
    assert_close_lists(ours.shadow_params, theirs.shadow_params)


def test_lightning(tmp_path):
    import lightning

    class Trained(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Model()

        def training_step(self, batch, number):
            return self.net(batch[0]).square().sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    options = {
        "accelerator": "cpu",
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
    }
    names = run("Lightning", Trainer=lightning.Trainer, options=options)
    (callback,) = (one for one in names["trainer"].callbacks if isinstance(one, names["EMA"]))
    model = Trained()
    names["trainer"].fit(model, DataLoader(TensorDataset(torch.randn(8, 4)), batch_size=4))
    assert callback.manager.num_updates == 4


def test_transformers(tmp_path):
    from transformers import Trainer, TrainingArguments

    class Trained(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Model()

        def forward(self, x, labels=None):
            return {"loss": self.net(x).square().sum()}

    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=3,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
    )
    rows = [{"x": torch.randn(4), "labels": 0} for _ in range(16)]
    trainer = Trainer(Trained(), arguments, train_dataset=rows)
    ema = run("transformers' Trainer", trainer=trainer)["ema"]
    trainer.train()
    assert ema.manager.num_updates == 3


def test_accelerate():
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    row = "accelerate, without DeepSpeed"
    ema = run(row, fused_ema=fused_ema, model=model, optimizer=optimizer)["ema"]
    for _ in range(6):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.randn(8, 4)).square().sum())
            optimizer.step()
            optimizer.zero_grad()
    assert ema.num_updates == 3


def test_a_loop_of_your_own():
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = run("a loop of your own", fused_ema=fused_ema, model=model, optimizer=optimizer)["ema"]
    expected = {name: t.clone() for name, t in values_of(model).items()}

    def follow():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                expected[name].lerp_(tensor, 0.001)
            else:
                expected[name].copy_(tensor)  # num_batches_tracked

    train(model, follow, optimizer)
    assert_same(dict(ema.named_emas()), expected)


def in_deepspeed():
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}
    import deepspeed

    # It would be compiled.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = {"train_micro_batch_size_per_gpu": 8}
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    ema = run("DeepSpeed, by itself or in accelerate", engine=engine)["ema"]
    twin = Model()
    manager = fused_ema.EMAManager(twin, momentum=0.001)
    for _ in range(3):
        engine.backward(engine(torch.randn(8, 4)).square().sum())
        engine.step()
        twin.load_state_dict(engine.module.state_dict())
        manager.update()
    averages = dict(manager.named_emas())
    found = ema.full_state_dict()
    assert found.keys() == averages.keys()
    assert_same({name: found[name] for name in averages}, averages)


def test_deepspeed():
    ranks = Ranks(1)
    ranks(in_deepspeed)
    ranks.stop()


def test_each_row_has_a_test():
    source = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert len(ROWS) == 18
    assert [row for row in ROWS if f'"{row}"' not in source] == []
