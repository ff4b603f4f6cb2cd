"""EngineEMA in real DeepSpeed engines, on its CPU accelerator, with one process and with two."""

from __future__ import annotations

import contextlib
import copy
import importlib
import logging
import os
import runpy
import warnings
from argparse import Namespace
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.state import AcceleratorState, GradientState
from deepspeed.checkpoint import ds_to_universal
from deepspeed.runtime import bf16_optimizer, torch_autocast
from deepspeed.utils import safe_get_full_fp32_param
from nets import assert_same
from torch import nn
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils.data import DataLoader
from transformers import PretrainedConfig, PreTrainedModel, Trainer, TrainingArguments

import fused_ema
from fused_ema import EMAManager, schedules
from fused_ema.hooks.deepspeed import EngineEMA
from fused_ema.hooks.transformers import EMACallback
from fused_ema.testing import assert_bits_equal

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    # The first engine of each process would, which takes long.
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
# Its all-reduce in shared memory is compiled where it is first used.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
# It collects garbage each time.
bf16_optimizer.see_memory_usage = lambda *args, **kwargs: None

# By stage, dtype and more: one for each of its optimizers, and groups and roundings of each kind.
ENGINES = {
    "fp32": {},
    "bf16": {"dtype": "bf16", "groups": 2},
    "zero1": {"stage": 1, "dtype": "bf16", "groups": 2},
    "zero1-fp32-grads": {"stage": 1, "dtype": "bf16", "acc": "fp32"},
    "zero1-fp16": {"stage": 1, "dtype": "fp16"},
    "zero2": {"stage": 2, "dtype": "bf16"},
    "zero2-fp32": {"stage": 2, "groups": 2},
    "zero2-round-robin": {"stage": 2, "zero": {"round_robin_gradients": True}},
    "zero2-offload": {"stage": 2, "dtype": "bf16", "zero": {"offload_optimizer": "cpu"}},
    "zero3": {"stage": 3, "dtype": "bf16", "groups": 2},
    "zero3-fp32": {"stage": 3},
    "zero3-partitioned": {"stage": 3, "dtype": "bf16", "zero": {"persist": 0}},
    "zero3-sub-groups": {"stage": 3, "dtype": "bf16", "zero": {"sub_group_size": 50}},
    "zero3-offload": {
        **{"stage": 3, "dtype": "bf16"},
        "zero": {"offload_optimizer": "cpu", "offload_param": "cpu"},
    },
}


class Net(nn.Module):
    """Odd sizes, a tied and a frozen weight, buffers averaged and copied."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(7, 13)
        self.norm = nn.LayerNorm(13)
        self.last = nn.Linear(13, 13, bias=False)
        self.tied = nn.Linear(13, 13, bias=False)
        self.tied.weight = self.last.weight
        self.frozen = nn.Parameter(torch.randn(3, 5), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("running_mean", torch.zeros(13))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        x = self.norm(self.first(x))
        if self.training:
            seen = x.detach().to(self.running_mean.dtype)
            self.running_mean = torch.lerp(self.running_mean, seen.mean(0), 0.5)
            self.count += 1
        x = self.tied(self.last((x - self.running_mean).to(x.dtype)).relu())
        return x * self.scale + self.frozen.sum()


def in_dtype(model, dtype):
    """As an engine converts it: buffers stay as they are."""
    for param in model.parameters():
        param.data = param.data.to(dtype)
    return model


def engine_of(stage=0, dtype="fp32", groups=1, acc=None, zero=(), steps=1, model=None, **config):
    torch_autocast.TORCH_AUTOCAST_INITIALIZED = False  # As in a process of its own.
    model = Net() if model is None else model
    trained = [param for param in model.parameters() if param.requires_grad]
    cut = len(trained) if groups == 1 else 2
    optimizer = torch.optim.AdamW(
        [{"params": part} for part in (trained[:cut], trained[cut:]) if part], lr=0.05
    )
    zero = dict(zero)
    persist = zero.pop("persist", 20)
    zero |= {k: {"device": v} for k, v in zero.items() if k.startswith("offload")}
    config |= {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": steps,
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": persist,
            **zero,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if dtype != "fp32":
        config[dtype] = {"enabled": True}
    if acc is not None:
        config["data_types"] = {"grad_accum_dtype": acc}
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def batch(engine, number, rank=None):
    torch.manual_seed(1000 * number + (dist.get_rank() if rank is None else rank))
    return torch.randn(4, 7).to(engine.get_data_types()[0])


def train(engine, *numbers, rank=None, times=1):
    engine.train()
    for number in numbers:
        engine.backward(engine(batch(engine, number, rank)).float().square().mean() * times)
        engine.step()


def masters_of(engine):
    """Each trained parameter's master whole, in fp32, as DeepSpeed itself gathers it."""
    named = [(n, p) for n, p in engine.module.named_parameters() if p.requires_grad]
    optimizer = engine.optimizer
    if engine.get_data_types()[0] == torch.float32 and engine.zero_optimization_stage() < 3:
        # As they are; DeepSpeed's own function mistakes the order of round_robin_gradients.
        return {name: param.detach().clone() for name, param in named}
    if not engine.zero_optimization():
        flat = [master for group in optimizer.fp32_groups for master in group]
        return {n: m.detach().clone() for (n, _), m in zip(named, flat, strict=True)}
    shapes = {n: getattr(p, "ds_shape", p.shape) for n, p in named}
    return {n: safe_get_full_fp32_param(p).detach().clone().view(shapes[n]) for n, p in named}


class Mirror(nn.Module):
    """The masters as a plain module's parameters, and the engine's buffers: averaged as usual."""

    def __init__(self, engine):
        super().__init__()
        self._engine = [engine]
        for name, values in self._now().items():
            is_buffer = name in dict(engine.module.named_buffers())
            add = self.register_buffer if is_buffer else self.register_parameter
            add(name.replace(".", "/"), values if is_buffer else nn.Parameter(values))

    def _now(self):
        engine = self._engine[0]
        buffers = {name: buffer.clone() for name, buffer in engine.module.named_buffers()}
        return masters_of(engine) | buffers

    @torch.no_grad()
    def follow(self):
        own = self.state_dict()
        for name, values in self._now().items():
            own[name.replace(".", "/")].copy_(values)


def averages_of(manager):
    return {name.replace("/", "."): values for name, values in manager.named_emas()}


def assert_bits(found, wanted):
    for name, values in wanted.items():
        assert found[name].dtype == values.dtype, name
        assert_bits_equal(found[name], values, name)


def raw_of(engine):
    """All that a swap writes, on this rank, and the masters."""
    found = {f"buffer {n}": b for n, b in engine.module.named_buffers()}
    for name, param in engine.module.named_parameters():
        found[name] = getattr(param, "ds_tensor", param)
    held = EngineEMA(engine)._held
    found |= {f"master {i}": master for i, master in enumerate(held.masters())}
    return {name: values.detach().clone() for name, values in found.items()}


@pytest.fixture(params=["one", "two"])
def ranks(request):
    return request.getfixturevalue(request.param)


def on_ranks(work):
    """Of a function: the same in a rank's process, where DeepSpeed finds its numbers."""
    return _OnRanks(work.__module__, work.__name__)


class _OnRanks:
    def __init__(self, module, name):
        self.module, self.name = module, name

    def __call__(self, *args):
        from deepspeed.accelerator import get_accelerator

        rank, world = dist.get_rank(), dist.get_world_size()
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # Asked for, not used.
        get_accelerator().is_fp16_supported = lambda: True  # Torch's CPU kernels do it.
        get_accelerator().supported_dtypes = lambda: [torch.float32, torch.half, torch.bfloat16]
        getattr(importlib.import_module(self.module), self.name)(*args)


# ---- what it averages and what a swap writes


def _averages_as_a_plain_manager(name):
    engine = engine_of(**ENGINES[name])
    settings = {"interval": 2, "begin": 1, "momentum_fun": schedules.linear(0.3)}
    ema, other = EngineEMA(engine, **settings), EngineEMA(engine, momentum=0.25, form="mul_add")
    mirror = Mirror(engine)
    plain = EMAManager(mirror, **settings)
    plain_other = EMAManager(mirror, momentum=0.25, form="mul_add")
    for number in range(5):
        train(engine, number)
        mirror.follow()
        plain.update()
        plain_other.update()
    assert (ema.iteration, ema.num_updates) == (plain.iteration, plain.num_updates) == (5, 2)
    for own, wanted in ((ema, plain), (other, plain_other)):
        found = own.full_state_dict()
        if dist.get_rank() == 0:
            assert_bits(found, averages_of(wanted))
            assert_bits_equal(found["tied.weight"], found["last.weight"])
            assert_bits_equal(found["frozen"], Net().frozen.to(found["frozen"].dtype))
        else:
            assert found == {}
    _evaluates_with(engine, ema, averages_of(plain))
    # It goes on as if nothing had been.
    train(engine, 5)
    mirror.follow()
    plain.update()
    found = ema.full_state_dict()
    if dist.get_rank() == 0:
        assert_bits(found, averages_of(plain))


def _evaluates_with(engine, ema, averages):
    dtype = engine.get_data_types()[0]
    model = in_dtype(Net(seed=1), dtype)
    with torch.no_grad():
        for key, values in model.state_dict().items():
            if key in averages:
                values.copy_(averages[key])
        model.frozen.copy_(Net().frozen)
    copied = in_dtype(Net(seed=2), dtype)
    ema.copy_to(copied)
    assert_same(copied.state_dict(), model.state_dict())
    engine.eval(), model.eval()
    x = batch(engine, 77)
    with torch.no_grad():
        before = engine(x)
        raw = raw_of(engine)
        with ema.swapped():
            assert ema.is_swapped
            assert_bits_equal(engine(x), model(x))
            with pytest.raises(ZeroDivisionError), contextlib.suppress(RuntimeError):
                raise ZeroDivisionError
        assert not torch.equal(before, model(x))
        assert_same(raw_of(engine), raw)
        assert_bits_equal(engine(x), before)
        ema.swap()
        assert_bits_equal(engine(x), model(x))
        ema.swap()
        assert_same(raw_of(engine), raw)


@pytest.mark.parametrize("name", ENGINES)
def test_averages_the_masters_and_evaluates_with_them(ranks, name):
    ranks(on_ranks(_averages_as_a_plain_manager), name)


def _updates_alone(name):
    engine = engine_of(**ENGINES[name])
    ema = EngineEMA(engine, momentum=0.25, skip_buffers=True)
    with CommDebugMode() as sent:
        ema._manager.update()
        list(ema.named_shards())
        ema.state_dict()
    assert sent.get_total_counts() == 0
    runs = ema._manager._tracked.plan._num_runs
    train(engine, 0)
    assert ema._manager._tracked.plan._num_runs == runs + 1
    own = sum(values.numel() for n, _, values in ema.named_shards() if n != "tied.weight")
    whole = sum(m.numel() for m in masters_of(engine).values())
    assert own in ((whole,) if not engine.zero_optimization() else _shares(whole))


def _shares(whole):
    world = dist.get_world_size()
    return range(whole // world - 16, whole // world + 17)


@pytest.mark.parametrize("name", ["bf16", "zero1-fp32-grads", "zero2", "zero3"])
def test_an_update_sends_nothing_and_is_one_run_of_one_plan(two, name):
    two(on_ranks(_updates_alone), name)


# ---- what a step is


def _counts_real_steps(stage, dtype):
    options = {}
    if dtype == "autocast":  # Torch's gradient scaler then skips, of which the engine doesn't know.
        dtype, options = "fp32", {"torch_autocast": {"enabled": True, "dtype": "float16"}}
    overflows = dtype == "fp16" or options
    engine = engine_of(stage, dtype, groups=2, steps=2, **options)
    ema = EngineEMA(engine, momentum=0.25)
    mirror = Mirror(engine)
    plain = EMAManager(mirror, momentum=0.25)
    before, skipped = masters_of(engine), 0
    for number in range(48):
        # More than fp16 holds, in every fourth step.
        train(engine, number, times=1e9 if overflows and number % 8 == 1 else 1)
        now = masters_of(engine)
        if any(not torch.equal(before[name], now[name]) for name in now):
            mirror.follow()
            plain.update()
            assert number % 2 == 1
        elif number % 2 == 1:
            skipped += 1
        before = now
    assert engine.global_steps == 24
    assert (skipped >= 6) == bool(overflows)
    assert ema.num_updates == ema.iteration == plain.num_updates == 24 - skipped > 4
    found = ema.full_state_dict()
    if dist.get_rank() == 0:
        assert_bits(found, {k: v for k, v in averages_of(plain).items() if "." in k})


@pytest.mark.parametrize(
    ("stage", "dtype"),
    [
        (0, "fp16"),
        (1, "fp16"),
        (2, "bf16"),
        (3, "fp16"),
        (0, "fp32"),
        (0, "autocast"),
        (2, "autocast"),
    ],
)
def test_accumulated_batches_and_skipped_steps_do_not_count(one, stage, dtype):
    one(on_ranks(_counts_real_steps), stage, dtype)


# ---- checkpoints


def _saves(name, folder):
    engine = engine_of(**ENGINES[name])
    ema = EngineEMA(engine, momentum=0.25, interval=2)
    # The engine's files have the buffers of rank 0 alone.
    train(engine, 0, 1, 2, rank=0)
    engine.save_checkpoint(folder)
    ema.save_checkpoint(folder)
    found = ema.full_state_dict()
    if dist.get_rank() == 0:
        torch.save(found, f"{folder}/whole.pt")
    train(engine, 3, 4, rank=0)
    wanted, raw = ema.full_state_dict(), masters_of(engine)
    again = engine_of(**ENGINES[name], model=Net(seed=3))
    resumed = EngineEMA(again, momentum=0.25, interval=2)
    resumed.load_checkpoint(folder)
    again.load_checkpoint(folder)
    assert (resumed.iteration, resumed.num_updates) == (3, 1)
    train(again, 3, 4, rank=0)
    assert_same(masters_of(again), raw)
    assert_same(resumed.full_state_dict(), wanted)
    # In memory, too.
    state = copy.deepcopy(ema.state_dict())
    ema.reset()
    assert ema.num_updates == 0
    ema.load_state_dict(state)
    assert_same(ema.full_state_dict(), wanted)


def _loads(name, folder):
    ema = EngineEMA(engine_of(**ENGINES[name], model=Net(seed=3)), momentum=0.25, interval=2)
    ema.load_checkpoint(folder)
    assert (ema.iteration, ema.num_updates) == (3, 1)
    found = ema.full_state_dict()
    if dist.get_rank() == 0:
        wanted = torch.load(f"{folder}/whole.pt")
        trained = [n for n in wanted if n != "frozen"]
        assert_same({n: found[n] for n in trained}, {n: wanted[n] for n in trained})


@pytest.mark.parametrize("name", ["fp32", "bf16", "zero1-fp32-grads", "zero2", "zero3"])
def test_a_resumed_run_is_the_uninterrupted_one(one, two, tmp_path, name):
    two(on_ranks(_saves), name, str(tmp_path / "two"))
    # On other numbers of processes, and with another stage, the averages go on by name.
    other = {"zero2": "zero3", "zero3": "zero2"}.get(name, name)
    one(on_ranks(_loads), other, str(tmp_path / "two"))
    two(on_ranks(_loads), other, str(tmp_path / "two"))


def _saves_alone(name, folder):
    engine = engine_of(**ENGINES[name])
    ema = EngineEMA(engine, momentum=0.25, interval=2)
    train(engine, 0, 1, 2)
    ema.save_checkpoint(folder, "last")
    torch.save(ema.full_state_dict(), f"{folder}/whole.pt")
    with open(f"{folder}/latest", "w") as file:
        file.write("last")


def test_what_one_process_saved_goes_on_in_two(one, two, tmp_path):
    one(on_ranks(_saves_alone), "zero3", str(tmp_path))
    two(on_ranks(_loads), "zero3", str(tmp_path))
    # Saved again by another number, the files of before are gone.
    two(on_ranks(_saves_again), str(tmp_path))
    assert sorted(p.name for p in (tmp_path / "last").iterdir()) == [
        "fused_ema_rank_0_of_2.pt",
        "fused_ema_rank_1_of_2.pt",
    ]
    file = tmp_path / "last" / "fused_ema_rank_1_of_2.pt"
    file.write_bytes(file.read_bytes()[:500])
    two(on_ranks(_finds_damage), str(tmp_path), "can't be read as averages")
    file.unlink()
    two(on_ranks(_finds_damage), str(tmp_path), "rank_1_of_2.pt'] are missing")


def _saves_for_others(folder):
    engine = engine_of(**ENGINES["zero2"])
    ema = EngineEMA(engine, momentum=0.25, interval=2)
    train(engine, 0, 1, 2, rank=0)
    engine.save_checkpoint(folder)
    ema.save_checkpoint(folder)
    found = ema.full_state_dict(), masters_of(engine)
    if dist.get_rank() == 0:
        torch.save(found, f"{folder}/whole.pt")


def _goes_on_from_a_universal_checkpoint(folder):
    source, made = f"{folder}/global_step3", f"{folder}/global_step3_universal"
    options = {"strict": True, "keep_temp_folder": False, "inject_missing_state": True}
    options |= {"num_extract_workers": 1, "num_merge_workers": 1}
    ds_to_universal.main(Namespace(input_folder=source, output_folder=made, **options))
    config = {**ENGINES["zero2"], "checkpoint": {"load_universal": True}}
    engine = engine_of(**config, model=Net(seed=3))
    ema = EngineEMA(engine, momentum=0.25, interval=2)
    engine.load_checkpoint(folder, "global_step3_universal")
    with pytest.raises(ValueError, match="has no average"):
        ema.load_checkpoint(folder, "global_step3_universal")
    ema.load_checkpoint(folder, "global_step3")
    averages, masters = torch.load(f"{folder}/whole.pt")
    assert_same(masters_of(engine), masters)
    found = ema.full_state_dict()
    # What is frozen isn't in a universal checkpoint: it stays the engine's own.
    for own in (found, averages):
        del own["frozen"]
    assert_same(found, averages)
    train(engine, 3)
    assert ema.num_updates == 2
    found = ema.full_state_dict()
    for name, master in masters_of(engine).items():
        assert_bits_equal(found[name], torch.lerp(averages[name], master, 0.25))


def test_averages_go_on_beside_a_universal_checkpoint_on_another_number(one, two, tmp_path):
    two(on_ranks(_saves_for_others), str(tmp_path))
    one(on_ranks(_goes_on_from_a_universal_checkpoint), str(tmp_path))


def _saves_again(folder):
    EngineEMA(engine_of(3)).save_checkpoint(folder, "last")
    dist.barrier()


def _finds_damage(folder, message):
    ema = EngineEMA(engine_of(3))
    for tag, expected in (("last", message), ("none", "has no average")):
        with pytest.raises(ValueError, match=r"EngineEMA\.load_checkpoint") as error:
            ema.load_checkpoint(folder, tag)
        assert expected in str(error.value)


def _refuses_states():
    ema = EngineEMA(engine_of(2, "bf16"))
    other = EngineEMA(engine_of(2, "bf16", model=nn.Linear(5, 3)))
    before = copy.deepcopy(ema.state_dict())
    # Wrong on one rank only: an error on both.
    good, bad = copy.deepcopy(ema.state_dict()), other.state_dict()
    with pytest.raises(ValueError, match=r"'weight' has shape \[3, 5\] there and none here"):
        ema.load_state_dict(bad if dist.get_rank() == 1 else good)
    good["iteration"] += dist.get_rank()
    with pytest.raises(ValueError, match=r"several \(iteration, num_updates\)"):
        ema.load_state_dict(good)
    half = copy.deepcopy(before)
    half["shards"].pop("last.weight", None)
    with pytest.raises(ValueError, match=r"'last.weight': elements \d+ to \d+ are in none"):
        ema.load_state_dict(half)
    for name, runs in ema.state_dict()["shards"].items():
        for (_, values), (_, kept) in zip(runs, before["shards"][name], strict=True):
            assert_bits_equal(values, kept)


def test_a_state_that_does_not_fit_is_one_error_on_all_ranks(two):
    two(on_ranks(_refuses_states))


# ---- what is refused


def _refuses_inside(stage):
    engine = engine_of(stage, "bf16")
    ema, other = EngineEMA(engine, momentum=0.25), EngineEMA(engine, momentum=0.1)
    train(engine, 0)
    raw = raw_of(engine)
    with ema.swapped():
        loss = engine(batch(engine, 1)).float().square().mean()
        engine.backward(loss)
        for call, what in (
            (engine.step, "engine.step"),
            (lambda: engine.save_checkpoint("nowhere"), "engine.save_checkpoint"),
            (lambda: engine.load_checkpoint("nowhere"), "engine.load_checkpoint"),
            (lambda: ema.load_state_dict(ema.state_dict()), "load_state_dict"),
            (ema.reset, "reset"),
            (ema.remove, "remove"),
            (other.swap, "another average"),
            (ema.swapped().__enter__, "swapped already"),
        ):
            with pytest.raises((RuntimeError, ValueError), match=what):
                call()
        assert not os.path.exists("nowhere")
    assert_same(raw_of(engine), raw)
    # The weights come back, whatever becomes of a buffer.
    kept = engine.module.running_mean
    before = kept.clone()
    for anew in (torch.zeros(2), None):
        with ema.swapped():
            engine.module.running_mean = anew
        engine.module.running_mean = kept.copy_(before)
        assert_same(raw_of(engine), raw)
    for bad, message in (
        (engine.module, "the engine's own"),
        (nn.Linear(2, 2), "'first.weight' is missing in the model"),
    ):
        with pytest.raises(ValueError, match=message):
            ema.copy_to(bad)
    with pytest.raises(TypeError, match="copied or pickled"):
        copy.deepcopy(ema)


@pytest.mark.parametrize("stage", [2, 3])
def test_no_step_no_checkpoint_and_no_other_average_while_swapped(one, stage):
    one(on_ranks(_refuses_inside), stage)


def _refuses_engines():
    net = Net()
    with pytest.raises(TypeError, match="engine is a Net; pass the engine"):
        EngineEMA(net)
    engine = deepspeed.initialize(model=net, config={"train_micro_batch_size_per_gpu": 4})[0]
    with pytest.raises(ValueError, match="the engine has no optimizer"):
        EngineEMA(engine)
    engine = engine_of(2)
    for options, error, message in (
        ({"decay": 0.9}, TypeError, "momentum=0.1"),
        ({"momentum": 1.5}, ValueError, "momentum is 1.5"),
        ({"interval": 0}, ValueError, "interval is 0"),
    ):
        with pytest.raises(error, match=message):
            EngineEMA(engine, **options)
    assert "step" not in vars(engine)
    for name, value, message in (
        ("has_moe_layers", True, "experts"),
        ("mp_world_size", 2, "tensor parallel"),
        ("pipeline_parallelism", True, "a pipeline"),
    ):
        kept = getattr(engine, name)
        setattr(engine, name, value)
        with pytest.raises(ValueError, match=message):
            EngineEMA(engine)
        setattr(engine, name, kept)
    engine.optimizer.swap_optimizer = True
    with pytest.raises(ValueError, match="offloads to NVMe"):
        EngineEMA(engine)
    layers = deepspeed.pipe.PipelineModule([nn.Linear(3, 3)], num_stages=1, loss_fn=nn.MSELoss())
    with pytest.raises(ValueError, match="a pipeline"):
        EngineEMA(engine_of(1, model=layers))
    for stage in (0, 1, 2, 3):
        engine = engine_of(stage, "bf16")
        ema = EngineEMA(engine)
        engine.destroy()
        for call in (ema.swap, ema.full_state_dict, lambda e=engine: EngineEMA(e)):
            with pytest.raises(RuntimeError, match="closed by destroy"):
                call()


def test_what_is_no_engine_or_none_that_is_served_is_refused(one):
    one(on_ranks(_refuses_engines))


class _Twin:
    optimizer = None

    def was_step_applied(self):
        return True

    step, destroy = lambda self: "step", lambda self: "destroy"
    save_checkpoint, load_checkpoint = (
        lambda self, folder, tag: "save_checkpoint",
        lambda self: "load_checkpoint",
    )


def _leaves_the_engine():
    engine = engine_of(2, "bf16")
    before = dict(vars(engine))
    first, second = EngineEMA(engine, momentum=0.5), EngineEMA(engine, momentum=0.25)
    train(engine, 0)
    first.remove()
    train(engine, 1)
    assert (first.num_updates, second.num_updates) == (1, 2)
    # A copy's calls would be its own, and nobody would listen.
    twin = _Twin()
    for name in ("step", "save_checkpoint", "load_checkpoint", "destroy"):
        call = copy.deepcopy(getattr(engine, name), {id(engine): twin})
        result = call("folder") if name == "save_checkpoint" else call()
        assert (result, second.num_updates, second._is_closed) == (name, 2, False)
    assert copy.deepcopy(engine._fused_ema_watch).averages == []
    second.remove()
    assert vars(engine).keys() == before.keys()
    train(engine, 3)
    assert second.num_updates == 2


def test_remove_leaves_the_engine_as_it_was(one):
    one(on_ranks(_leaves_the_engine))


# ---- ZeRO-3's parameters elsewhere


def _knows_partitioned_parameters():
    engine = engine_of(3, "bf16")
    served = "hooks.deepspeed.EngineEMA"
    params = list(engine.module.parameters())
    for make in (
        lambda: EMAManager(engine),
        lambda: EMAManager(engine.module),
        lambda: fused_ema.Plan([p.detach().clone() for p in params], params),
        lambda: fused_ema.Plan([torch.zeros(p.ds_shape) for p in params], params),
    ):
        with pytest.raises(ValueError, match=served):
            make()
    gathered = deepspeed.zero.GatheredParameters(params, modifier_rank=0)
    with gathered:
        manager = EMAManager(engine.module, momentum=0.25)
        plan = fused_ema.Plan([p.detach().clone() for p in params], params)

    averages = {name: values.clone() for name, values in manager.named_emas()}
    train(engine, 0)
    assert engine.module.first.weight.numel() == 0
    plain = EMAManager(Net(), momentum=0.25)
    calls = [
        *(manager.update, manager.swap, manager.reset, manager.refresh),
        *(manager.swapped().__enter__, lambda: manager.copy_to(engine.module)),
        lambda: plain.copy_to(engine.module),
        *(lambda: plan.update(0.25), plan.swap, plan.copy_to_params, plan.copy_to_ema),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=served) as error:
            call()
        assert "refresh" not in str(error.value)
    assert_same(dict(manager.named_emas()), averages)
    with deepspeed.zero.GatheredParameters(params, modifier_rank=0):
        for name, values in engine.module.named_parameters():
            fused_ema.update_([averages[name]], [values.detach()], 0.25)
        manager.update()
        found = dict(manager.named_emas())
        assert_same(
            {n: found[n] for n, _ in engine.module.named_parameters()},
            {n: averages[n] for n, _ in engine.module.named_parameters()},
        )


def test_partitioned_parameters_are_known_everywhere(one):
    one(on_ranks(_knows_partitioned_parameters))


# ---- accelerate and Trainer


def _forget_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def _serves_accelerate(stage):
    _forget_accelerate()
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    accelerator = Accelerator(
        gradient_accumulation_steps=2, deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config)
    )
    net = Net()
    params = [param for param in net.parameters() if param.requires_grad]
    optimizer = torch.optim.SGD([{"params": [param]} for param in params], lr=0.1)
    torch.manual_seed(dist.get_rank())
    loader = DataLoader(torch.randn(32, 7), batch_size=2)
    engine, optimizer, loader = accelerator.prepare(net, optimizer, loader)
    ema = EngineEMA(engine, momentum=0.25)
    mirror = Mirror(engine)
    plain = EMAManager(mirror, momentum=0.25)
    for x in loader:
        with accelerator.accumulate(engine):
            accelerator.backward(engine(x).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            mirror.follow()
            plain.update()
    assert ema.num_updates == plain.num_updates == len(loader) // 2
    found = ema.full_state_dict()
    if dist.get_rank() == 0:
        assert_bits(found, averages_of(plain))


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_accelerate_steps_inside_of_its_backward(two, stage):
    two(on_ranks(_serves_accelerate), stage)


def _serves_the_trainer(stage, folder):
    _forget_accelerate()

    class Model(PreTrainedModel):
        _tied_weights_keys = {"net.tied.weight": "net.last.weight"}  # noqa: RUF012
        config_class = PretrainedConfig

        def __init__(self, config, seed=0):
            super().__init__(config)
            self.net = Net(seed)
            self.post_init()

        def _init_weights(self, module):
            pass

        def forward(self, x, labels=None):
            out = self.net.eval()(x)  # Or each rank would have other buffers.
            return {"loss": out.square().mean() + labels.sum() * 0, "logits": out}

    def data(first):
        generator = torch.Generator().manual_seed(first)
        return [{"x": torch.randn(7, generator=generator), "labels": 0} for _ in range(16)]

    def trainer_of(seed=0, folder=folder, best=False, **options):
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 1,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 20},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        arguments = TrainingArguments(
            output_dir=f"{folder}/out",
            deepspeed=config,
            use_cpu=True,
            per_device_train_batch_size=2,
            max_steps=6,
            save_strategy="steps",
            save_steps=2 if best else 4,
            eval_strategy="steps",
            eval_steps=2 if best else 3,
            load_best_model_at_end=best,
            greater_is_better=True,
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        model = Model(PretrainedConfig(), seed)
        trainer = Trainer(model, arguments, train_dataset=data(1), eval_dataset=data(2))
        return trainer, EMACallback(momentum=0.25, interval=2, **options).attach(trainer)

    trainer, ema = trainer_of(save_to=f"{folder}/deployed")
    trainer.train()
    assert (ema.manager.iteration, ema.manager.num_updates) == (6, 3)
    averages, raw = ema.manager.full_state_dict(), masters_of(trainer.model_wrapped)
    # Evaluated with the average, by hand and in training.
    model = Model(PretrainedConfig(), 1)
    ema.manager.copy_to(model)
    model.eval()
    with torch.no_grad():
        wanted = torch.stack([model(s["x"][None], torch.zeros(1))["loss"] for s in data(2)]).mean()
    found = trainer.evaluate()["eval_loss"]
    torch.testing.assert_close(found, float(wanted), rtol=1e-5, atol=0)
    assert [entry for entry in trainer.state.log_history if "eval_loss" in entry][1] != found
    assert_same(masters_of(trainer.model_wrapped), raw)
    if dist.get_rank() == 0:
        deployed = safetensors.torch.load_file(f"{folder}/deployed/model.safetensors")
        assert {*averages} - {*deployed} == {"net.tied.weight"}
        assert_bits(averages, deployed)
    dist.barrier()
    # Resumed.
    again, resumed = trainer_of(seed=3)
    again.train(resume_from_checkpoint=f"{folder}/out/checkpoint-4")
    assert (resumed.manager.iteration, resumed.manager.num_updates) == (6, 3)
    assert_same(masters_of(again.model_wrapped), raw)
    assert_same(resumed.manager.full_state_dict(), averages)
    if stage == 3:
        return
    # The first checkpoint is the best one here, and its average is loaded with its weights.
    again, best = trainer_of(folder=f"{folder}/best", best=True)
    again.train()
    assert again.state.best_model_checkpoint == f"{folder}/best/out/checkpoint-2"
    assert (best.manager.iteration, best.manager.num_updates) == (2, 1)
    with pytest.raises(ValueError, match="include is set, but with DeepSpeed"):
        trainer_of(include="net.*")[0].train()


@pytest.mark.parametrize("stage", [2, 3])
def test_the_trainer_evaluates_saves_and_resumes(two, tmp_path, stage):
    two(on_ranks(_serves_the_trainer), stage, str(tmp_path))


# ---- the example


def run_the_example():
    torch_autocast.TORCH_AUTOCAST_INITIALIZED = False  # As in a process of its own.
    example = Path(__file__).parents[2] / "examples" / "with_deepspeed.py"
    raw, averaged = runpy.run_path(str(example))["train"](steps=300)
    assert averaged < 0.8 * raw


def test_the_example_has_a_better_average(two):
    two(on_ranks(run_the_example))
