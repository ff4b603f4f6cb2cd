"""The Trainer callback, in the real Trainer; and EMAManager in loops with accelerate."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from nets import assert_same, is_same, values_of
from processes import forked
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, Trainer, TrainerCallback
from transformers import TrainingArguments as Arguments

import fused_ema
from fused_ema.hooks import transformers as transformers_hook
from fused_ema.hooks.transformers import FILE_NAME, EMACallback
from fused_ema.testing import ROUNDINGS

pytestmark = [
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true"),
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step"),
]


class Config(PretrainedConfig):
    model_type = "fused-ema-test"

    def __init__(self, kind="float32", width=5, **kwargs):
        self.kind, self.width = kind, width
        super().__init__(**kwargs)


class Model(PreTrainedModel):
    """Moves every tensor by amounts that the batch alone decides."""

    config_class = Config

    def __init__(self, config, seed=0):
        torch.manual_seed(seed)
        super().__init__(config)
        self.linear = nn.Linear(config.width, 3)
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm1d(config.width)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.frozen = nn.Parameter(torch.randn(6), requires_grad=False)
        self.register_buffer("bytes", torch.arange(5, dtype=torch.uint8))
        self.seen, self.losses = [], {}
        self.post_init()
        self.to(getattr(torch, config.kind))

    def _init_weights(self, module):
        pass

    def forward(self, x, labels=None):
        torch.manual_seed(int(x.sum()))
        if not self.training:
            self.seen.append(values_of(self))
            loss = self.losses.get(len(self.seen), 1.0)
            return {"loss": torch.tensor(loss), "logits": torch.zeros(len(x), 1)}
        params = [p for p in self.parameters() if p.requires_grad]
        loss = torch.stack([(p * torch.randn(p.shape).to(p)).sum() for p in params]).sum()
        with torch.no_grad():
            for buffer in self.buffers():
                noise = torch.randn(buffer.shape).to(buffer)
                buffer.add_(noise if buffer.is_floating_point() else 1)
        return {"loss": loss.float(), "logits": torch.zeros(len(x), 1)}


def make_model(dtype=torch.float32, seed=0, width=5):
    return Model(Config(str(dtype).removeprefix("torch."), width), seed)


def data(num=10, first=0):
    return [{"x": torch.tensor([float(i)]), "labels": 0} for i in range(first, first + num)]


def make_trainer(tmp_path, model, *callbacks, kind=Trainer, **options):
    """Ten samples, batches of two, two epochs: ten steps."""
    options = {
        "use_cpu": True,
        "per_device_train_batch_size": 2,
        "num_train_epochs": 2,
        "learning_rate": 0.05,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "max_grad_norm": 0.0,
    } | options
    arguments = Arguments(output_dir=str(tmp_path / "out"), **options)
    return kind(
        model, arguments, train_dataset=data(), eval_dataset=data(2, 50), callbacks=[*callbacks]
    )


class Reference(TrainerCallback):
    """The average as a plain loop over the ``state_dict()``, at every step."""

    def __init__(self, momentum=0.1, form="mul_add", skipped=()):
        self.momentum, self.form, self.skipped = momentum, form, skipped
        self.ema, self.raws, self.num_updates = None, [], 0

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.ema = values_of(model)

    @torch.no_grad()
    def on_step_end(self, args, state, control, model, **kwargs):
        self.raws.append(values_of(model))
        if state.global_step in self.skipped:
            return
        self.num_updates += 1
        for name, e in self.ema.items():
            p, m = self.raws[-1][name], self.momentum
            if e.is_floating_point() and self.form == "mul_add":
                e.mul_(1 - m).add_(p, alpha=m)
            elif e.is_floating_point():
                e.lerp_(p, m)


def train(tmp_path, model, options=None, **settings):
    reference = Reference()
    options = {"momentum": 0.1, "form": "mul_add", "ema_dtype": "param"} | (options or {})
    trainer = make_trainer(tmp_path, model, reference, **settings)
    ema = EMACallback(**options).attach(trainer)
    trainer.train()
    return trainer, ema, reference


# ---- the numbers, and when it updates


@pytest.mark.parametrize("dtype", ROUNDINGS)
@pytest.mark.parametrize("form", ["lerp", "mul_add"])
def test_the_bits_of_the_loop(tmp_path, dtype, form):
    model, reference = make_model(dtype), Reference(form=form)
    ema = EMACallback(momentum=0.1, form=form, ema_dtype="param")
    trainer = make_trainer(tmp_path, model, ema, reference)
    assert ema.attach(trainer) is ema
    trainer.train()
    assert ema.manager.num_updates == reference.num_updates == 10
    assert_same(dict(ema.manager.named_emas()), reference.ema)
    assert_same(values_of(model), reference.raws[-1])
    assert not is_same(reference.ema, reference.raws[-1])


@pytest.mark.parametrize("accumulate", [1, 2, 3, 4])
def test_one_update_a_real_step(tmp_path, accumulate):
    trainer, ema, reference = train(tmp_path, make_model(), gradient_accumulation_steps=accumulate)
    steps = 2 * -(-5 // accumulate)
    assert ema.manager.num_updates == trainer.state.global_step == reference.num_updates == steps
    assert_same(dict(ema.manager.named_emas()), reference.ema)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_a_step_that_the_scaler_skips_is_none(tmp_path, optim):
    class Overflowing(Model):
        num_steps = 0

        def forward(self, x, labels=None):
            self.num_steps += 1
            out = super().forward(x, labels)
            return out | {"loss": out["loss"] * (float("inf") if self.num_steps in (3, 4) else 1)}

    model, reference = Overflowing(Config()), Reference(skipped=(3, 4))
    trainer = make_trainer(tmp_path, model, reference, optim=optim)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    ema = EMACallback(momentum=0.1, form="mul_add").attach(trainer)
    trainer.train()
    assert trainer.accelerator.scaler.get_scale() == 2.0
    assert trainer.state.global_step == 10  # The Trainer counts them.
    assert ema.manager.num_updates == reference.num_updates == 8
    assert_same(dict(ema.manager.named_emas()), reference.ema)


def test_options_reach_the_manager(tmp_path):
    def fun(i):
        return 1 / (i + 2)

    options = {"momentum_fun": fun, "form": "mul_add", "begin": 3, "exclude": "norm.*"}
    options |= {"interval": 2, "skip_buffers": True, "skip_frozen": True, "include": "*"}
    options |= {"ema_dtype": torch.float64, "device": "cpu"}
    model, twin = make_model(torch.float64), make_model(torch.float64)
    manager = fused_ema.EMAManager(twin, **options)

    class Twin(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            twin.load_state_dict(model.state_dict())
            manager.update()

    trainer = make_trainer(tmp_path, model, Twin())
    ema = EMACallback(**options).attach(trainer)
    trainer.train()
    assert_same(dict(ema.manager.named_emas()), dict(manager.named_emas()))
    assert repr(ema.manager) == repr(manager)


# ---- evaluation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_evaluation_sees_the_average_and_training_the_raw_weights(tmp_path, dtype):
    model, alone = make_model(dtype), make_model(dtype)
    averages = []

    class Averages(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if control.should_evaluate:
                averages.append({n: e.clone() for n, e in reference.ema.items()})

    reference = Reference()
    start = values_of(model)
    settings = {"eval_strategy": "steps", "eval_steps": 3, "eval_on_start": True}
    trainer = make_trainer(tmp_path, model, reference, Averages(), **settings)
    trainer.eval_dataset = {"one": data(2, 50), "two": data(2, 60)}
    EMACallback(momentum=0.1, form="mul_add", ema_dtype="param").attach(trainer)
    trainer.train()
    assert_same(model.seen[0], start)
    assert len(averages) == 4  # After steps 3, 6 and 9, and at the end.
    seen = model.seen[2:]
    assert len(seen) == 2 * len(averages)
    for values, expected in zip(seen, [a for a in averages for _ in range(2)], strict=True):
        assert_same(values, expected)
    plain = Reference()
    make_trainer(tmp_path, alone, plain).train()
    for a, b in zip(reference.raws, plain.raws, strict=True):
        assert_same(a, b)


def test_evaluate_and_predict_by_hand(tmp_path):
    model = make_model()
    trainer, ema, reference = train(tmp_path, model)
    for run in (trainer.evaluate, lambda: trainer.predict(data(2, 50))):
        model.seen.clear()
        run()
        assert_same(model.seen[0], reference.ema)
        assert_same(values_of(model), reference.raws[-1])
    with ema.swapped(), ema.swapped():
        trainer.evaluate()
        assert_same(values_of(model), reference.ema)
    assert_same(values_of(model), reference.raws[-1])


def test_evaluation_before_training_sees_the_weights(tmp_path):
    model = make_model()
    trainer = make_trainer(tmp_path, model)
    ema = EMACallback().attach(trainer)
    trainer.evaluate()
    with ema.swapped():
        assert_same(values_of(model), model.seen[0])
    assert ema.manager is None


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("is_training", [True, False])
def test_the_raw_weights_come_back_whatever_evaluation_raises(tmp_path, error, is_training):
    model, reference, seen = make_model(), Reference(), []

    def metrics(_):
        seen.append(values_of(model))
        raise error("evaluation failed")

    settings = {"eval_strategy": "steps", "eval_steps": 3} if is_training else {}
    trainer = make_trainer(tmp_path, model, reference, **settings)
    trainer.compute_metrics = metrics
    ema = EMACallback(momentum=0.1, form="mul_add").attach(trainer)
    if is_training:
        run = trainer.train
    else:
        trainer.train()
        run = trainer.evaluate
    with pytest.raises(error, match="evaluation failed"):
        run()
    assert_same(seen[0], reference.ema)
    assert_same(values_of(model), reference.raws[-1])
    assert not ema.manager.is_swapped


# ---- checkpoints


def saved(folder):
    content = torch.load(folder / FILE_NAME, weights_only=True)
    assert content["global_step"] == int(folder.name.split("-")[1])
    return content["manager"]


def test_each_checkpoint_has_the_average_beside_the_raw_weights(tmp_path):
    model = make_model()
    settings = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 2}
    settings |= {"eval_strategy": "steps", "eval_steps": 3}
    _, ema, reference = train(tmp_path, model, **settings)
    out = tmp_path / "out"
    assert sorted(p.name for p in out.iterdir()) == ["checkpoint-10", "checkpoint-9"]
    assert_same(saved(out / "checkpoint-10")["ema"], reference.ema)
    assert not list(out.rglob("*.tmp"))
    for step in (9, 10):
        raw = Model.from_pretrained(out / f"checkpoint-{step}")
        assert_same(values_of(raw), reference.raws[step - 1])
    assert saved(out / "checkpoint-9")["num_updates"] == 9
    assert ema.manager.num_updates == 10


def test_save_to_writes_the_average_for_from_pretrained(tmp_path):
    for dtype in (torch.float32, torch.bfloat16):
        model, where = make_model(dtype), tmp_path / str(dtype)
        options = {"save_to": where, "ema_dtype": None}
        _, ema, reference = train(tmp_path, model, options)
        average = {n: e.to(model.state_dict()[n]) for n, e in ema.manager.named_emas()}
        assert_same(values_of(Model.from_pretrained(where, dtype=dtype)), average)
        assert_same(values_of(model), reference.raws[-1])


def test_the_best_checkpoints_average_is_loaded_with_its_weights(tmp_path):
    model = make_model()
    model.losses = {1: 0.9, 2: 0.1, 3: 0.5, 4: 0.6}
    settings = {"save_strategy": "steps", "save_steps": 3, "load_best_model_at_end": True}
    settings |= {"eval_strategy": "steps", "eval_steps": 3}
    where = tmp_path / "deployed"
    trainer, ema, reference = train(tmp_path, model, {"save_to": where}, **settings)
    best = tmp_path / "out" / "checkpoint-6"
    assert trainer.state.best_model_checkpoint == str(best)
    assert_same(values_of(model), reference.raws[5])
    assert_same(dict(ema.manager.named_emas()), saved(best)["ema"])
    assert_same(values_of(Model.from_pretrained(where)), saved(best)["ema"])
    assert ema.manager.num_updates == 6


def test_a_best_checkpoint_without_an_average_starts_one_from_its_weights(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps"}
    settings |= {"eval_steps": 2, "load_best_model_at_end": True}
    model = make_model()
    model.losses = {1: 0.5, 2: 0.1, 3: 0.9}  # The best one comes before there is an average.
    plain = Reference()
    make_trainer(tmp_path, model, plain, max_steps=4, **settings).train()
    model, reference, where = make_model(seed=5), Reference(), tmp_path / "deployed"
    trainer = make_trainer(tmp_path, model, reference, max_steps=8, **settings)
    ema = EMACallback(momentum=0.5, form="mul_add", start_anew=True, save_to=where).attach(trainer)
    with pytest.warns(UserWarning, match=r"the best checkpoint '.*checkpoint-4', whose weights"):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.state.best_model_checkpoint == str(tmp_path / "out" / "checkpoint-4")
    best = plain.raws[3]
    assert not is_same(best, reference.raws[-1])
    assert_same(values_of(model), best)
    assert_same(dict(ema.manager.named_emas()), best)
    assert (ema.manager.iteration, ema.manager.num_updates) == (0, 0)
    assert_same(values_of(Model.from_pretrained(where)), best)
    model.seen.clear()
    trainer.evaluate()
    assert_same(model.seen[0], best)


@pytest.mark.parametrize("has_average", [True, False])
def test_a_best_checkpoint_without_weights_changes_nothing(tmp_path, has_average):
    """Trainer then leaves the model as it is, and says so."""

    class Losing(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 7:
                folder = tmp_path / "out" / "checkpoint-6"
                for file in folder.iterdir():
                    if not (has_average and file.name == FILE_NAME):
                        file.unlink()

    model = make_model()
    model.losses = {1: 0.9, 2: 0.1, 3: 0.5, 4: 0.6}
    settings = {"save_strategy": "steps", "save_steps": 3, "load_best_model_at_end": True}
    settings |= {"eval_strategy": "steps", "eval_steps": 3}
    reference = Reference()
    trainer = make_trainer(tmp_path, model, reference, Losing(), **settings)
    ema = EMACallback(momentum=0.1, form="mul_add").attach(trainer)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-6")
    assert_same(values_of(model), reference.raws[-1])
    assert_same(dict(ema.manager.named_emas()), reference.ema)


@pytest.mark.parametrize(
    "file", ["model.safetensors", "pytorch_model.bin.index.json", "adapter_model.safetensors"]
)
def test_files_that_are_weights(tmp_path, file):
    assert not transformers_hook._has_weights(str(tmp_path))
    (tmp_path / "ema.pt").touch()
    (tmp_path / "optimizer.pt").touch()
    assert not transformers_hook._has_weights(str(tmp_path))
    (tmp_path / file).touch()
    assert transformers_hook._has_weights(str(tmp_path))
    assert not transformers_hook._has_weights(str(tmp_path / "gone"))


# ---- resuming


RESUME = {
    "momentum_fun": fused_ema.schedules.exponential(0.01, 10),
    "interval": 2,
    "form": "mul_add",
}


def resumable(tmp_path, dtype=torch.float32, seed=0, *callbacks, save_steps=1, **options):
    model = make_model(dtype, seed)
    settings = {"save_strategy": "steps", "save_steps": save_steps, "num_train_epochs": 3}
    settings |= {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 4}
    trainer = make_trainer(tmp_path, model, *callbacks, **settings)
    return trainer, model, EMACallback(**RESUME, **options).attach(trainer)


def position(tmp_path, step):
    path = tmp_path / "out" / f"checkpoint-{step}" / "scheduler.pt"
    return torch.load(path, weights_only=True)


def assert_same_state(a, b):
    assert_same(a["ema"], b["ema"])
    assert {k: v for k, v in a.items() if k != "ema"} == {k: v for k, v in b.items() if k != "ema"}


@pytest.mark.parametrize(("dtype", "by"), [(torch.float32, "last"), (torch.bfloat16, "path")])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, dtype, by):
    trainer, whole, ema = resumable(tmp_path, dtype)
    trainer.train()
    out = tmp_path / "out"
    assert trainer.state.global_step == 9
    for step in (6, 3, 1):
        resumed, model, again = resumable(tmp_path, dtype, 7, save_steps=9)
        path = out / f"checkpoint-{step}"
        where = {"path": path, "last": True}[by]
        if by == "last":
            for other in out.iterdir():
                if int(other.name.split("-")[1]) > step:
                    for file in other.iterdir():
                        file.unlink()
                    other.rmdir()
        resumed.train(resume_from_checkpoint=where)
        assert_same(values_of(model), values_of(whole))
        assert_same_state(again.manager.state_dict(), ema.manager.state_dict())
        assert position(tmp_path, 9)["last_epoch"] == 9


def test_a_resumed_run_follows_the_interval_that_it_is_given(tmp_path):
    resumable(tmp_path)[0].train()
    resumed, _, ema = resumable(tmp_path, torch.float32, 7, save_steps=9)
    ema._options["interval"] = 3
    resumed.train(resume_from_checkpoint=tmp_path / "out" / "checkpoint-3")
    # Of the iterations 0 to 2 one was averaged, of 3 to 8 then 5 and 8.
    assert (ema.manager.iteration, ema.manager.num_updates) == (9, 1 + 2)


class Kill(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def in_child(tmp_path, seed, *callbacks, **options):
    """Trains in a process of its own. Returns what ended it, "None" for nothing."""

    def train():
        trainer, model, ema = resumable(tmp_path, torch.float32, seed, *callbacks)
        trainer.train(**options)
        end = {"model": model.state_dict(), "ema": ema.manager.state_dict()}
        torch.save(end, tmp_path / "end.pt")

    return forked(train)


@pytest.mark.parametrize("step", [1, 7])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, step):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert in_child(whole, 0) == "None"
    assert in_child(cut, 0, Kill(step)) == "SIGKILL"
    assert not (cut / "end.pt").exists()
    assert in_child(cut, 5, resume_from_checkpoint=True) == "None"
    a, b = (torch.load(p / "end.pt", weights_only=True) for p in (cut, whole))
    assert_same(a["model"], b["model"])
    assert_same_state(a["ema"], b["ema"])
    schedules = [position(p, 9) for p in (cut, whole)]
    assert schedules[0] == schedules[1]
    logs = [
        json.loads((p / "out/checkpoint-9/trainer_state.json").read_text()) for p in (cut, whole)
    ]
    assert logs[0]["global_step"] == logs[1]["global_step"] == 9


def test_a_killed_or_failed_save_leaves_no_file_by_that_name(tmp_path, monkeypatch):
    def fail(content, file):
        file.write(b"half")
        raise OSError("disk full")

    trainer, _, _ = resumable(tmp_path)
    monkeypatch.setattr(fused_ema.hooks.transformers.torch, "save", lambda c, f: save(c, f))
    real = torch.serialization.save

    def save(content, file):
        is_ours = isinstance(content, dict) and "manager" in content
        return fail(content, file) if is_ours else real(content, file)

    with pytest.raises(OSError, match="disk full"):
        trainer.train()
    assert (tmp_path / "out/checkpoint-1/trainer_state.json").exists()
    assert not list((tmp_path / "out").rglob("ema*"))


# ---- bad input


def test_bad_options_are_errors_at_once():
    with pytest.raises(TypeError, match="decay"):
        EMACallback(decay=0.9)
    for momentum in (0, 1, -0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="momentum is"):
            EMACallback(momentum=momentum)
    with pytest.raises(ValueError, match="interval"):
        EMACallback(interval=0)


def test_two_callbacks_or_none_attached_are_errors(tmp_path):
    class Mine(EMACallback):
        pass

    model = make_model()
    before = values_of(model)
    ema = EMACallback()
    trainer = make_trainer(tmp_path, model, ema)
    with pytest.raises(RuntimeError, match=r"attached to no trainer.*call attach\(trainer\)"):
        trainer.train()
    for other in (EMACallback(), Mine()):
        with pytest.raises(RuntimeError, match="has another EMACallback"):
            other.attach(trainer)
    ema.attach(trainer)
    with pytest.raises(RuntimeError, match="has a trainer already"):
        ema.attach(trainer)
    trainer.add_callback(Mine())
    with pytest.raises(RuntimeError, match="attached to no trainer"):
        trainer.train()
    assert_same(values_of(model), before)


def test_sharding_that_can_t_be_averaged_is_an_error(tmp_path):
    trainer = make_trainer(tmp_path, make_model())
    EMACallback().attach(trainer)
    trainer.is_fsdp_enabled = True
    trainer.accelerator.state.fsdp_plugin = SimpleNamespace(fsdp_version=1)
    args, state = trainer.args, trainer.state
    try:
        with pytest.raises(RuntimeError, match=r'shards the weights with FSDP 1.*"version": 2'):
            trainer.callback_handler.on_train_begin(args, state, trainer.control)
    finally:
        trainer.accelerator.state.fsdp_plugin = None  # It is everybody's.


def test_save_to_needs_save_pretrained(tmp_path):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, x, labels=None):
            return {"loss": self.weight.sum()}

    trainer = make_trainer(tmp_path, Plain())
    EMACallback(save_to=tmp_path / "x").attach(trainer)
    with pytest.raises(TypeError, match="Plain has no save_pretrained"):
        trainer.train()


def test_resuming_without_a_file_is_an_error_or_starts_anew(tmp_path):
    trainer, _, _ = resumable(tmp_path, save_steps=4)
    trainer.train()
    path = tmp_path / "out" / "checkpoint-4"
    (path / FILE_NAME).unlink()
    trainer, _, ema = resumable(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"resumes at step 4 .*checkpoint-4' has no 'ema"):
        trainer.train(resume_from_checkpoint=path)
    assert ema.manager is None
    trainer, _, ema = resumable(tmp_path, start_anew=True)
    trainer.train(resume_from_checkpoint=path)
    assert ema.manager.iteration == 5


def test_files_that_do_not_fit_are_errors(tmp_path):
    trainer, _, _ = resumable(tmp_path, save_steps=4)
    trainer.train()
    out = tmp_path / "out"
    path = out / "checkpoint-4"
    good = (path / FILE_NAME).read_bytes()

    class After(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            raise AssertionError("training has begun")

    def resume(message, **options):
        trainer, model, ema = resumable(tmp_path, torch.float32, 3, **options)
        trainer.add_callback(After())
        with pytest.raises(ValueError, match=message):
            trainer.train(resume_from_checkpoint=path)
        assert ema.manager is None
        assert_same(values_of(model), values_of(Model.from_pretrained(path)))

    for size in (0, len(good) // 2, len(good) - 100):
        (path / FILE_NAME).write_bytes(good[:size])
        resume(r"ema.pt' can't be read as an average \(damaged or cut short\?\)")
    torch.save({"weights": 1}, path / FILE_NAME)
    resume("can't be read as an average")
    (path / FILE_NAME).write_bytes((out / "checkpoint-8" / FILE_NAME).read_bytes())
    resume("is of step 8 but training resumes at step 4")
    (path / FILE_NAME).write_bytes(good)
    resume(r"(?s)ema.pt' doesn't fit: .*surplus in 'ema'", skip_buffers=True)
    content = torch.load(path / FILE_NAME, weights_only=True)
    wider = make_model(width=6)
    content["manager"]["ema"] = values_of(wider)
    torch.save(content, path / FILE_NAME)
    resume(r"(?s)doesn't fit: .*'linear.weight' in 'ema' has shape \[3, 6\]")


def test_without_transformers_the_error_names_it(monkeypatch):
    for name in list(sys.modules):
        if name.split(".")[0] == "transformers":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "fused_ema.hooks.transformers")
    with pytest.raises(ImportError, match=r"needs transformers >= 4"):
        importlib.import_module("fused_ema.hooks.transformers")


# ---- loops with accelerate


@pytest.fixture
def fresh_accelerate():
    def reset():
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        PartialState._reset_state()

    reset()
    yield
    reset()


@pytest.mark.parametrize("way", ["hook before prepare", "hook after prepare", "by hand"])
@pytest.mark.parametrize("has_scaler", [False, True])
def test_a_plain_accelerate_loop(fresh_accelerate, way, has_scaler):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    if has_scaler:
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = fused_ema.EMAManager(model, momentum=0.1, form="mul_add")
    if way == "hook before prepare":
        ema.register_step_post_hook(optimizer)
    model, optimizer = accelerator.prepare(model, optimizer)
    if way == "hook after prepare":
        ema.register_step_post_hook(optimizer.optimizer)
    expected = values_of(model)
    skipped = 0
    for i in range(24):
        with accelerator.accumulate(model):
            loss = model(torch.full((2, 3), float(i))).sum()
            is_bad = has_scaler and i in (7, 13)  # Steps 1 and 3 of six.
            accelerator.backward(loss * float("inf") if is_bad else loss)
            optimizer.step()
            if way == "by hand" and accelerator.sync_gradients and not optimizer.step_was_skipped:
                ema.update()
            optimizer.zero_grad()
        if (i + 1) % 4 == 0 and not optimizer.step_was_skipped:
            for name, e in expected.items():
                e.mul_(1 - 0.1).add_(model.state_dict()[name], alpha=0.1)
        elif (i + 1) % 4 == 0:
            skipped += 1
    assert skipped == (2 if has_scaler else 0)
    assert ema.num_updates == 6 - skipped
    assert_same(dict(ema.named_emas()), expected)
