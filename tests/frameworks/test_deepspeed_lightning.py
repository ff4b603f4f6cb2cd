"""EMA of Lightning with DeepSpeedStrategy, in real engines on DeepSpeed's CPU accelerator."""

from __future__ import annotations

import copy
import glob
import os

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DeepSpeedStrategy
from nets import assert_same
from test_deepspeed import Mirror, Net, assert_bits, averages_of, masters_of, on_ranks, raw_of
from torch.utils.data import DataLoader

from fused_ema import EMAManager
from fused_ema.hooks import _lightning_engine
from fused_ema.hooks.lightning import EMA
from fused_ema.testing import assert_bits_equal


class OnTheCPU(DeepSpeedStrategy):
    """Lightning's, but for three methods, since it refuses every accelerator but CUDA's.

    Left out are that refusal, a check of the GPUs' numbers, and the making of the processes' group,
    which there is already; and the device has a number. All else is Lightning's own code.
    """

    root_device = torch.device("cpu", 0)

    def setup_environment(self):
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self):
        self.set_world_ranks()


class Module(pl.LightningModule):
    def __init__(self, seed=0):
        super().__init__()
        self.net = Net(seed)
        self.seen = []

    def forward(self, x):
        return self.net(x)

    def training_step(self, x):
        return self.net(x.to(self.net.scale.dtype)).float().square().mean()

    def validation_step(self, x):
        self.seen.append(self.net(x.to(self.net.scale.dtype)))

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.05)


class Plain(pl.Callback):
    """The same average by a manager of gathered masters, after each step that moved them."""

    def __init__(self):
        self.averages, self.masters = [], []

    def on_train_start(self, trainer, module):
        self.mirror = Mirror(trainer.strategy.model)
        self.manager = EMAManager(self.mirror, momentum=0.25, buffers="average")

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.mirror.follow()
            self.manager.update()
            self.masters.append(masters_of(trainer.strategy.model))
            self.averages.append(copy.deepcopy(averages_of(self.manager)))


class Brings(pl.Callback):
    def __init__(self, path):
        self.path = path

    def on_test_start(self, trainer, module):
        _lightning_engine.load_into(module, self.path)


def inputs():
    return torch.randn(16, 7, generator=torch.Generator().manual_seed(1))


def batches():
    return DataLoader(inputs(), 4)


def trainer_of(folder, stage, *callbacks, precision="bf16-true", epochs=2):
    """Four batches an epoch, two steps.

    The same ones on each rank: DeepSpeed's files have the buffers of rank 0 alone.
    """
    strategy = OnTheCPU(
        stage=stage,
        config={
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 20},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        },
        process_group_backend="gloo",
    )
    every = pl.callbacks.ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_last=True)
    return pl.Trainer(
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy=strategy,
        precision=precision,
        max_epochs=epochs,
        accumulate_grad_batches=2,
        use_distributed_sampler=False,
        callbacks=[*callbacks, every],
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=1,
    )


def outputs(averages, dtype):
    """What a whole model with these averages says of the batches."""
    module = Module()
    module.load_state_dict(averages, strict=False)
    module.to(dtype)
    with torch.no_grad():
        module.eval()
        return [module(x.to(dtype)) for x in batches()]


def _fits(stage, precision, folder):
    os.environ["NODE_RANK"] = "0"
    dtype = torch.float32 if precision.startswith("32") else torch.bfloat16
    module, ema, plain = Module(), EMA(momentum=0.25), Plain()
    trainer = trainer_of(f"{folder}/out", stage, ema, plain, precision=precision)
    trainer.fit(module, batches(), batches())
    engine = ema.manager._engine
    assert ema.manager.num_updates == len(plain.averages) == 4
    found = ema.manager.full_state_dict()
    if dist.get_rank() == 0:
        assert_bits(found, plain.averages[-1])
    # The sanity check has seen one batch, then each epoch's end all four.
    for epoch in (0, 1):
        seen = module.seen[1 + 4 * epoch :][:4]
        for y, wanted in zip(seen, outputs(plain.averages[2 * epoch + 1], dtype), strict=True):
            assert_bits_equal(y, wanted)
    # After fit the model holds the average; a checkpoint has the raw weights all the same.
    assert ema.manager.is_swapped
    averaged = raw_of(engine)
    trainer.save_checkpoint(f"{folder}/after")
    assert_same(raw_of(engine), averaged)
    module.seen.clear()
    trainer.test(module, batches(), verbose=False)
    for y, wanted in zip(module.seen, outputs(plain.averages[-1], dtype), strict=True):
        assert_bits_equal(y, wanted)

    # Resumed from the first epoch's end, and from the end.
    again, resumed, other = Module(seed=3), EMA(momentum=0.25), Plain()
    trainer = trainer_of(f"{folder}/again", stage, resumed, other, precision=precision)
    trainer.fit(again, batches(), batches(), ckpt_path=f"{folder}/out/epoch=0.ckpt")
    assert (resumed.manager.iteration, resumed.manager.num_updates) == (4, 4)
    assert_same(other.masters[-1], plain.masters[-1])
    assert_same(resumed.manager.full_state_dict(), found)
    more = EMA(momentum=0.25)
    trainer = trainer_of(f"{folder}/more", stage, more, precision=precision, epochs=2)
    trainer.fit(Module(seed=4), batches(), batches(), ckpt_path=f"{folder}/after")
    assert_same(more.manager.full_state_dict(), found)
    assert not more.manager.is_swapped  # No step was left, so Lightning has not trained.
    assert_same(masters_of(more.manager._engine), plain.masters[-1])
    with torch.no_grad():
        for (name, own), weights in zip(
            plain.masters[-1].items(), _trained(more.manager._engine), strict=True
        ):
            assert_bits_equal(weights, own.to(dtype), name)

    # Evaluated from a checkpoint, on any number of ranks.
    _evaluates(stage, precision, f"{folder}/out/last.ckpt", plain.averages[-1])
    if dist.get_rank() == 0:
        torch.save(plain.averages[-1], f"{folder}/averages.pt")


def _trained(engine):
    for param in engine.module.parameters():
        if param.requires_grad:
            if not hasattr(param, "ds_id"):
                yield param
                continue
            import deepspeed

            with deepspeed.zero.GatheredParameters([param]):
                yield param.detach().clone()


def _evaluates(stage, precision, path, averages):
    os.environ["NODE_RANK"] = "0"
    if isinstance(averages, str):
        averages = torch.load(averages)
    dtype = torch.float32 if precision.startswith("32") else torch.bfloat16
    module = Module(seed=5)
    module.net.frozen.data = Net().frozen.data
    # DeepSpeed itself can't load ZeRO-3's checkpoints without an optimizer
    # (DeepSpeedZeRoOffload has no _restore_from_bit16_weights): there it is brought in by hand.
    callbacks = [EMA(momentum=0.25)] if stage < 3 else [Brings(path)]
    trainer = trainer_of("nowhere", stage, *callbacks, precision=precision)
    trainer.test(module, batches(), ckpt_path=path if stage < 3 else None, verbose=False)
    for y, wanted in zip(module.seen, outputs(averages, dtype), strict=True):
        assert_bits_equal(y, wanted)


@pytest.mark.parametrize(
    ("stage", "precision"), [(1, "32-true"), (2, "bf16-true"), (3, "bf16-true")]
)
def test_averages_evaluates_saves_and_resumes(one, two, tmp_path, stage, precision):
    two(on_ranks(_fits), stage, precision, str(tmp_path))
    path, averages = f"{tmp_path}/out/last.ckpt", f"{tmp_path}/averages.pt"
    one(on_ranks(_evaluates), stage, precision, path, averages)


class AtEnds(EMA):
    def should_update(self, step_idx=None, epoch_idx=None):
        return epoch_idx is not None


class Loud(Module):
    """Its second step overflows."""

    def training_step(self, x):
        is_second = self.trainer.fit_loop.total_batch_idx in (2, 3)
        return super().training_step(x) * (1e9 if is_second else 1)


def _does_otherwise(folder):
    os.environ["NODE_RANK"] = "0"
    # Not after a step that was skipped.
    ema, plain = EMA(momentum=0.25, deploy="raw"), Plain()
    module = Loud()
    trainer = trainer_of(folder, 2, ema, plain, precision="16-true")
    trainer.fit(module, batches())
    first, second, *_ = plain.masters
    assert_same(first, second)
    assert (trainer.global_step, ema.manager.iteration) == (4, 3)
    # The raw weights are left, and the engine of fit is gone.
    for weights, own in zip(_trained(ema.manager._engine), plain.masters[-1].values(), strict=True):
        assert_bits_equal(weights, own.to(torch.float16))
    with pytest.raises(RuntimeError, match=r"another engine than in fit.*deploy='ema'"):
        trainer.test(module, batches(), verbose=False)
    # At the ends of epochs.
    ends, plain = AtEnds(momentum=0.25), Plain()
    trainer_of(folder, 2, ends, plain).fit(Module(), batches())
    assert ends.manager.iteration == 2
    for name, found in ends.manager.full_state_dict().items():
        if name in plain.masters[0]:
            clone = Module().state_dict()[name].bfloat16().float()
            wanted = clone.lerp(plain.masters[1][name], 0.25).lerp(plain.masters[3][name], 0.25)
            assert_bits_equal(found, wanted, name)


def test_should_update_skipped_steps_and_raw_weights(one, tmp_path):
    one(on_ranks(_does_otherwise), str(tmp_path))


def _refuses(folder):
    os.environ["NODE_RANK"] = "0"
    with pytest.raises(ValueError, match=r"lightning\.EMA: exclude is set, but with DeepSpeed"):
        trainer_of(folder, 2, EMA(exclude="*bias")).fit(Module(), batches())
    plain = trainer_of(folder, 2, epochs=1)
    plain.fit(Module(), batches())
    path = f"{folder}/epoch=0.ckpt"
    ema, module = EMA(momentum=0.25), Module(seed=2)
    with pytest.warns(UserWarning, match="has no average; it starts from the checkpoint's"):
        trainer_of(folder, 2, ema, epochs=1).fit(module, batches(), ckpt_path=path)
    assert ema.manager.iteration == 0
    assert_same(
        {n: v for n, v in ema.manager.full_state_dict().items() if n in masters_of(plain.model)},
        masters_of(plain.model),
    )
    module = Module()
    trainer = trainer_of(folder, 2, EMA(momentum=0.25), epochs=1)
    trainer.fit(module, batches())
    # As Lightning's teardown does on a GPU.
    module.net.scale.data = module.net.scale.data.clone()
    with pytest.raises(ValueError, match="isn't in the engine's flat weights any more"):
        trainer.save_checkpoint(f"{folder}/after")
    # A part of the average's files is gone.
    path = sorted(glob.glob(f"{folder}/epoch=0*.ckpt"), key=os.path.getmtime)[-1]
    (file,) = glob.glob(f"{path}/checkpoint/fused_ema*")
    os.remove(file)
    again = EMA(momentum=0.25)
    with pytest.raises(ValueError, match=r"load_checkpoint: .* has no average"):
        trainer_of(folder, 2, again).fit(Module(), batches(), ckpt_path=path)


def test_what_cannot_be_averaged_or_resumed_is_an_error(one, tmp_path):
    one(on_ranks(_refuses), str(tmp_path))
