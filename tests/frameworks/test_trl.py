"""TRL's callbacks for reference models and teachers beside ours, in its trainers, bit for bit."""

from __future__ import annotations

import copy
import os
import warnings
from types import SimpleNamespace

import pytest
import torch
from test_readme import run
from torch import nn

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer
    from trl.experimental.sdpo import teacher_sync as theirs
    from trl.trainer.callbacks import SyncRefModelCallback

    from fused_ema.hooks import trl as ours

from fused_ema.testing import ROUNDINGS, assert_bits_equal

pytestmark = pytest.mark.filterwarnings("ignore")

WORDS = ["<pad>", "<eos>", "<unk>", *"abcdefgh"]


def make_model(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": len(WORDS)}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, pad_token_id=0, eos_token_id=1)).to(dtype)


def dpo_trainer(folder, **options):
    inside = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    inside.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inside, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    rows = [{"prompt": "a b", "chosen": f" {x} d", "rejected": f" f {x}"} for x in "cgha" * 4]
    args = DPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        max_steps=5,
        learning_rate=0.05,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
        **options,
    )
    reference = make_model() if "sync_ref_model" in options else None
    return DPOTrainer(
        make_model(),
        ref_model=reference,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert_bits_equal(tensor, other[name], name)


def values(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def test_a_dpo_training_with_a_moving_reference(tmp_path):
    states, moved = [], []
    for is_ours in (True, False):
        settings = {"ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.6}
        trainer = dpo_trainer(tmp_path, sync_ref_model=True, **settings)
        if is_ours:
            run("TRL", trainer=trainer)
        kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
        assert (ours.SyncRefModelCallback in kinds) == is_ours
        assert (SyncRefModelCallback in kinds) != is_ours
        start = values(trainer.ref_model)
        trainer.train()
        states.append(
            values(trainer.ref_model) | {"trained": trainer.model.lm_head.weight.detach()}
        )
        moved.append(max((states[-1][name] - start[name]).abs().max() for name in start))
    assert_same(*states)
    assert min(moved) > 0.01


@pytest.mark.parametrize("dtype", ROUNDINGS)
def test_sync_teacher(backend, dtype):
    student, teacher = make_model(dtype), make_model(dtype, seed=1)
    twin = copy.deepcopy(teacher)
    args = SimpleNamespace(teacher_sync_steps=2, teacher_update_rate=0.05)
    callbacks = ours.SyncTeacherModelCallback(teacher), theirs.SyncTeacherModelCallback(twin)
    # Outside of Trainer theirs asks accelerate's state.
    from accelerate import Accelerator

    Accelerator(cpu=True)
    for step in range(1, 7):
        for p in student.parameters():
            p.data.add_(
                torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).to(dtype)
            )
        for callback in callbacks:
            callback.on_step_end(args, SimpleNamespace(global_step=step), None, model=student)
        assert_same(values(teacher), values(twin))


def adapted(dtype=torch.float32):
    config = LoraConfig(r=3, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(make_model(), config)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = p.data.to(dtype)
    return model


def test_a_teacher_that_is_an_adapter(backend, monkeypatch):
    models_ = adapted(), adapted()
    models_[1].load_state_dict(models_[0].state_dict())
    options = {"update_rate": 0.05, "sync_steps": 2}
    kinds = ours.PEFTAdapterEMACallback, theirs.PEFTAdapterEMACallback
    callbacks = [kind(model, **options) for kind, model in zip(kinds, models_, strict=True)]
    for callback in callbacks:
        callback.on_train_begin(None, None, None)
    for step in range(1, 9):
        for model, callback in zip(models_, callbacks, strict=True):
            generator = torch.Generator().manual_seed(step)
            for name, p in model.named_parameters():
                if ".default." in name:
                    p.data.add_(torch.randn(p.shape, generator=generator).to(p.dtype))
            callback.on_step_end(None, SimpleNamespace(global_step=step), None)
        assert_same(*map(values, models_))
    names = [name for name in values(models_[0]) if ".teacher." in name]
    assert len(names) == 8
    assert all(values(models_[0])[name].any() for name in names)
    grads = [{n: p.requires_grad for n, p in model.named_parameters()} for model in models_]
    assert grads[0] == grads[1]
    assert models_[0].active_adapter == "default"
    # Once begun, no adapter is set and no state dict is made.
    monkeypatch.setattr(type(models_[0]), "set_adapter", None)
    monkeypatch.setattr(type(models_[0]), "state_dict", None)
    callbacks[0].on_step_end(None, SimpleNamespace(global_step=10), None)


def test_the_teacher_of_a_16_bit_adapter_is_in_fp32(backend):
    # As peft makes it; TRL rounds the average to the student's dtype at each step.
    model = adapted(torch.bfloat16)
    callback = ours.PEFTAdapterEMACallback(model, update_rate=0.05)
    callback.on_train_begin(None, None, None)
    params = dict(model.named_parameters())
    pairs = [
        (params[n.replace("default", "teacher")], p) for n, p in params.items() if "default" in n
    ]
    expected = [averaged.detach().clone() for averaged, _ in pairs]
    for step in range(1, 4):
        callback.on_step_end(None, SimpleNamespace(global_step=step), None)
        for (averaged, live), want in zip(pairs, expected, strict=True):
            want.copy_((1 - 0.05) * want + 0.05 * live.detach())
            assert averaged.dtype == torch.float32
            assert_bits_equal(averaged, want)


def test_an_adapter_that_was_replaced_is_found_again():
    model = adapted()
    callback = ours.PEFTAdapterEMACallback(model, update_rate=1.0)
    callback.on_train_begin(None, None, None)
    callback.on_step_end(None, SimpleNamespace(global_step=1), None)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.lora_A["default"].weight = nn.Parameter(torch.full((3, 12), 7.0))
    callback.on_step_end(None, SimpleNamespace(global_step=2), None)
    assert torch.equal(layer.lora_A["teacher"].weight, torch.full((3, 12), 7.0))
    # A teacher that is there already goes on.
    again = ours.PEFTAdapterEMACallback(model, update_rate=0.0)
    again.on_train_begin(None, None, None)
    again.on_step_end(None, SimpleNamespace(global_step=3), None)
    assert torch.equal(layer.lora_A["teacher"].weight, torch.full((3, 12), 7.0))


def test_replacing_keeps_the_settings_of_an_adapter_s_callback():
    model, accelerator = adapted(), object()
    callback = theirs.PEFTAdapterEMACallback(model, "mean", 0.1, 3, accelerator)
    handler = SimpleNamespace(callbacks=[callback, theirs.SyncTeacherModelCallback(model)])
    ours.replace_callbacks(SimpleNamespace(callback_handler=handler))
    one, other = handler.callbacks
    assert type(one) is ours.PEFTAdapterEMACallback
    assert (one.model, one.teacher_adapter_name, one.update_rate) == (model, "mean", 0.1)
    assert (one.sync_steps, one.accelerator) == (3, accelerator)
    assert type(other) is ours.SyncTeacherModelCallback
    assert other.ref_model is model


def test_what_is_refused():
    with pytest.raises(ValueError, match="has none of SyncRefModelCallback"):
        ours.replace_callbacks(SimpleNamespace(callback_handler=SimpleNamespace(callbacks=[])))
    with pytest.raises(ValueError, match=r"update_rate is 1\.5"):
        ours.PEFTAdapterEMACallback(make_model(), update_rate=1.5)
    model, teacher = make_model(), make_model(seed=1)
    before = values(teacher)
    sync = ours.SyncRefModelCallback.sync_target_model
    with pytest.raises(ValueError, match="alpha is 2"):
        sync(model, teacher, 2)
    with pytest.raises(ValueError, match="has 21 parameters but the model has 20"):
        sync(model.model, teacher, 0.5)
    assert_same(values(teacher), before)
    for p in model.parameters():  # As ZeRO-3 leaves it between its uses.
        p.ds_id, p.ds_shape = 0, p.shape
        p.data = torch.empty(0)
    with pytest.raises(ValueError, match=r"embed_tokens\.weight' is partitioned by ZeRO-3.*ZeRO-1"):
        sync(model, teacher, 0.5)
    assert_same(values(teacher), before)
