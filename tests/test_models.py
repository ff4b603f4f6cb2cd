"""The manager on real architectures: its averages, swaps and states against a plain loop.

Every model is trained for real, with random weights and data. Beside the manager runs what it
replaces, OpenMMLab's loop over ``state_dict()``, and all comparisons are by bits.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

import fused_ema
from fused_ema.testing import assert_bits_equal

pytestmark = pytest.mark.filterwarnings(
    # peft asks transformers under the old name, once for each adapter model.
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:Lazy modules are a new feature:UserWarning",
)

MOMENTUM = 0.3  # Large, so that a step more, less or twice shows in every weight.
NUM_STEPS = 3
BATCH = 4
NUM_CLASSES = 7
TIED = (("transformer.wte.weight", "lm_head.weight"),)


# ---- models


def resnet(dtype):
    config = ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32],
        depths=[1, 2],
        layer_type="basic",
        num_labels=NUM_CLASSES,
    )
    return ResNetForImageClassification(config).to(dtype)


def resnet_with_frozen_backbone(dtype):
    model = resnet(dtype)
    model.resnet.requires_grad_(False)
    return model


def vit(dtype):
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        num_labels=NUM_CLASSES,
    )
    return ViTForImageClassification(config).to(dtype)


def gpt2(dtype):
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(vocab_size=101, n_positions=32, n_embd=32, n_layer=2, n_head=4, **ids)
    return GPT2LMHeadModel(config).to(dtype)


def gpt2_124m(dtype):
    return GPT2LMHeadModel(GPT2Config()).to(dtype)


def lora_gpt2(dtype):
    # The adapters stay in float32 whatever the base is: several dtypes in one model.
    return get_peft_model(
        gpt2(dtype), LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    )


def lora_vit(dtype):
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    return get_peft_model(vit(dtype), config)


def child_called_module(dtype):
    layers = OrderedDict(
        module=nn.Sequential(OrderedDict(module=nn.Linear(12, 8), norm=nn.BatchNorm1d(8))),
        head=nn.Linear(8, NUM_CLASSES),
    )
    return nn.Sequential(layers).to(dtype)


def parametrized(dtype):
    return nn.Sequential(
        parametrizations.weight_norm(nn.Linear(12, 8)),
        nn.Tanh(),
        parametrizations.spectral_norm(nn.Linear(8, 8)),
        nn.Tanh(),
        nn.Linear(8, NUM_CLASSES),
    ).to(dtype)


def not_yet_run_lazy():
    return nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.Tanh(), nn.LazyLinear(5))


def lazy(dtype):
    model = not_yet_run_lazy().to(dtype)
    model(torch.randn(BATCH, 12, dtype=dtype))
    return model


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(101, 16)
        self.lstm = nn.LSTM(16, 12, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(24, NUM_CLASSES)

    def forward(self, input_ids):
        return self.head(self.lstm(self.embedding(input_ids))[0])


def lstm(dtype):
    return Tagger().to(dtype)


def flattened_lstm(dtype):
    # What flatten_parameters() does for cuDNN: all weights are views of one allocation.
    model = Tagger().to(dtype)
    weights = list(model.lstm.parameters())
    flat = torch.cat([weight.detach().flatten() for weight in weights])
    parts = flat.split([weight.numel() for weight in weights])
    for weight, part in zip(weights, parts, strict=True):
        weight.data = part.view_as(weight)
    return model


# ---- batches


def images(num_channels=3, size=32):
    return {"pixel_values": torch.randn(BATCH, num_channels, size, size)}


def tokens():
    return {"input_ids": torch.randint(101, (BATCH, 8))}


def few_tokens_of_many():
    return {"input_ids": torch.randint(50257, (2, 8))}


def vectors():
    return {"input": torch.randn(BATCH, 12)}


# ---- wrappers


def not_at_all(model):
    return model


def in_data_parallel(model):
    # As where there is no GPU: with one it would move the model there.
    with mock.patch.object(torch.cuda, "is_available", return_value=False):
        return nn.DataParallel(model)


def compiled(model):
    return torch.compile(model, backend="eager")


def compiled_by_aot_eager(model):
    return torch.compile(model, backend="aot_eager")


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def compiled_submodule(model):
    model.transformer = compiled(model.transformer)
    return model


def in_ddp_compiled(model):
    return DistributedDataParallel(compiled(model))


def compiled_in_ddp(model):
    return compiled(DistributedDataParallel(model))


def checkpointed_layers(model):
    kinds = ("ResNetStage", "ResNetBasicLayer", "GPT2Block")  # Stages hold layers: one in another.
    apply_activation_checkpointing(model, check_fn=lambda module: type(module).__name__ in kinds)
    return model


def in_ddp_with_checkpointed_layers(model):
    return DistributedDataParallel(checkpointed_layers(model))


# ---- the table


@dataclass(frozen=True)
class Mode:
    """A model's dtype and how its average is kept."""

    dtype: torch.dtype
    settings: dict[str, str]

    def first_ema(self, param):
        keeps = "ema_dtype" in self.settings or not param.is_floating_point()
        return param.clone() if keeps else param.float().clone()

    def reference_update(self, ema, param):
        if self.settings["form"] == "mul_add":
            ema.mul_(1 - MOMENTUM).add_(param, alpha=MOMENTUM)
        else:
            ema.lerp_(param.to(ema.dtype), MOMENTUM)


MODES = {
    "float32 as OpenMMLab": Mode(torch.float32, {"form": "mul_add", "ema_dtype": "param"}),
    "bfloat16 as OpenMMLab": Mode(torch.bfloat16, {"form": "mul_add", "ema_dtype": "param"}),
    "bfloat16 with float32 ema": Mode(torch.bfloat16, {"form": "lerp"}),
}
FULL_PRECISION = "float32 as OpenMMLab"


@dataclass(frozen=True)
class Case:
    """A model, how it is wrapped and what the manager is told.

    ``tied`` are the names that share memory; ``tracks`` says which names the settings leave.
    """

    build: Callable[[torch.dtype], nn.Module]
    batch: Callable[[], dict[str, Tensor]]
    wrap: Callable[[nn.Module], nn.Module] = not_at_all
    tied: tuple[tuple[str, ...], ...] = ()
    settings: dict[str, object] = field(default_factory=dict)
    tracks: Callable[[str], bool] = lambda name: True
    optimizer: Callable[..., torch.optim.Optimizer] = lambda params: torch.optim.AdamW(params, 0.01)
    modes: tuple[str, ...] = tuple(MODES)


def sgd(params):
    return torch.optim.SGD(params, 0.1, momentum=0.9)


def sgd_without_state(params):
    return torch.optim.SGD(params, 0.1)


def is_adapter(name):
    return "lora_" in name


def is_trained_in_lora_vit(name):
    return is_adapter(name) or "modules_to_save" in name


def is_head_or_buffer(name):
    return name.startswith("classifier") or "running_" in name or name.endswith("_tracked")


def is_left_in_vit(name):
    return not name.startswith("vit.layers.") and not name.endswith(".bias")


LORA_TIED = (tuple(f"base_model.model.{name}" for name in TIED[0]),)
# Tracing takes seconds and doesn't depend on the mode: one case runs in all of them.
TRACED = (FULL_PRECISION,)

CASES = {
    "ResNet": Case(resnet, images, optimizer=sgd),
    "ResNet, frozen backbone": Case(
        resnet_with_frozen_backbone,
        images,
        settings={"skip_frozen": True},
        tracks=is_head_or_buffer,
    ),
    "ViT": Case(vit, images),
    "ViT, exclude": Case(
        vit, images, settings={"exclude": ["vit.layers.*", "*.bias"]}, tracks=is_left_in_vit
    ),
    "GPT-2": Case(gpt2, tokens, tied=TIED),
    "LoRA on GPT-2": Case(lora_gpt2, tokens, tied=LORA_TIED),
    "LoRA on GPT-2, skip_frozen": Case(
        lora_gpt2, tokens, tied=LORA_TIED, settings={"skip_frozen": True}, tracks=is_adapter
    ),
    "LoRA on GPT-2, include": Case(
        lora_gpt2, tokens, tied=LORA_TIED, settings={"include": "*lora_*"}, tracks=is_adapter
    ),
    "LoRA on ViT in DDP, skip_frozen": Case(
        lora_vit,
        images,
        DistributedDataParallel,
        settings={"skip_frozen": True},
        tracks=is_trained_in_lora_vit,
    ),
    "weight_norm, spectral_norm": Case(parametrized, vectors),
    "lazy, after a dry run": Case(lazy, vectors),
    "LSTM": Case(lstm, tokens),
    "LSTM, flattened": Case(flattened_lstm, tokens),
    "DDP": Case(resnet, images, DistributedDataParallel, optimizer=sgd),
    "DDP, tied": Case(gpt2, tokens, DistributedDataParallel, tied=TIED),
    "DDP, a child called module": Case(child_called_module, vectors, DistributedDataParallel),
    "a child called module": Case(child_called_module, vectors),
    "DataParallel": Case(resnet, images, in_data_parallel, optimizer=sgd),
    "DataParallel, a child called module": Case(child_called_module, vectors, in_data_parallel),
    "compiled": Case(gpt2, tokens, compiled, tied=TIED),
    "compiled, aot_eager": Case(resnet, images, compiled_by_aot_eager, modes=TRACED),
    "compiled in place": Case(resnet, images, compiled_in_place, modes=TRACED),
    "compiled submodule": Case(gpt2, tokens, compiled_submodule, tied=TIED, modes=TRACED),
    "DDP of compiled": Case(resnet, images, in_ddp_compiled, modes=TRACED),
    "compiled DDP": Case(gpt2, tokens, compiled_in_ddp, tied=TIED, modes=TRACED),
    "checkpointed": Case(gpt2, tokens, checkpoint_wrapper, tied=TIED),
    "checkpointed layers": Case(resnet, images, checkpointed_layers),
    "DDP, checkpointed layers": Case(gpt2, tokens, in_ddp_with_checkpointed_layers, tied=TIED),
}
GPT2_124M = Case(gpt2_124m, few_tokens_of_many, tied=TIED, optimizer=sgd_without_state)
RUNS = [(case, mode) for case in CASES for mode in CASES[case].modes]
WRAPPED = [name for name, case in CASES.items() if case.wrap is not not_at_all]


# ---- a training run with the reference beside it


class Reference:
    """OpenMMLab's loop over a ``state_dict()``, with tied tensors counted once."""

    def __init__(self, live, mode):
        first_at = {}
        self.mode = mode
        self.first_of = {n: first_at.setdefault(t.data_ptr(), n) for n, t in live.items()}
        self.emas = {name: mode.first_ema(live[name]) for name in first_at.values()}

    def update(self, live):
        for name, ema in self.emas.items():
            if ema.is_floating_point():
                self.mode.reference_update(ema, live[name])

    def named(self):
        return {name: self.emas[first] for name, first in self.first_of.items()}


class Run:
    """A model in training, its manager, and the reference."""

    def __init__(self, case, mode, manage_first=False):
        self.case = case
        self.mode = mode
        self.plain = self.build(seed=0)
        self.names = list(self.plain.state_dict())
        self.ema = self.manage(self.plain) if manage_first else None
        self.model = case.wrap(self.plain)
        if self.ema is None:
            self.ema = self.manage(self.model)
        self.reference = Reference(self.live(), mode)

    def build(self, seed=1):
        """A model without wrappers."""
        torch.manual_seed(seed)
        return self.case.build(self.mode.dtype)

    def manage(self, model):
        settings = self.mode.settings | self.case.settings
        return fused_ema.EMAManager(model, MOMENTUM, buffers="average", **settings)

    def live(self):
        """The model's tensors, under the names that they had before anything was wrapped."""
        return dict(zip(self.names, self.plain.state_dict().values(), strict=True))

    def raw(self):
        return {name: tensor.clone() for name, tensor in self.live().items()}

    def averages(self):
        """What the reference has for the tracked names."""
        named = self.reference.named()
        return {name: named[name] for name in self.names if self.case.tracks(name)}

    def with_averages(self, raw):
        """A whole ``state_dict()`` in which the tracked tensors are averages."""
        return raw | self.averages()

    def batch(self, seed):
        torch.manual_seed(seed)
        made = self.case.batch()
        return {k: v.to(self.mode.dtype) if v.is_floating_point() else v for k, v in made.items()}

    def train(self):
        trained = [p for p in self.plain.parameters() if p.requires_grad]
        optimizer = self.case.optimizer(trained)
        self.model.train()
        for step in range(NUM_STEPS):
            logits = outputs_of(self.model, self.batch(seed=step)).flatten(0, -2).float()
            targets = torch.randint(logits.shape[-1], (len(logits),))
            nn.functional.cross_entropy(logits, targets).backward()
            optimizer.step()
            optimizer.zero_grad()
            self.ema.update()
            self.reference.update(self.live())
        return self

    @torch.no_grad()
    def evaluate(self, model):
        model.eval()
        return outputs_of(model, self.batch(seed=NUM_STEPS))


def outputs_of(model, batch):
    made = model(**batch)
    return made if isinstance(made, Tensor) else made.logits


def addresses_of(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in tensors.items()}


def ties(tensors: Mapping[str, Tensor]) -> tuple[tuple[str, ...], ...]:
    at = {}
    for name, address in addresses_of(tensors).items():
        at.setdefault(address, []).append(name)
    return tuple(tuple(names) for names in at.values() if len(names) > 1)


def assert_all_same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same names in the same order, and the same bits."""
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        if tensor.is_floating_point():
            assert_bits_equal(actual[name], tensor, name)
        else:
            assert actual[name].dtype == tensor.dtype
            assert torch.equal(actual[name], tensor), name


def rounded(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(like[name].dtype) for name, tensor in tensors.items()}


@pytest.fixture(scope="module", autouse=True)
def _process_group(tmp_path_factory):
    store = dist.FileStore(str(tmp_path_factory.mktemp("gloo") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    # As fast for models this small; on a busy machine several threads are four times slower.
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


@pytest.fixture(scope="module", params=RUNS, ids=", ".join)
def run(request):
    """A finished training run. Each test leaves it as it was."""
    case, mode = request.param
    yield Run(CASES[case], MODES[mode]).train()
    torch._dynamo.reset()  # The limit on recompilations is for each forward(), across models.


# ---- the properties


def assert_averages_are_those_of_the_plain_loop(run):
    averages = run.averages()
    assert_all_same(dict(run.ema.named_emas()), averages)
    assert run.ema.num_updates == NUM_STEPS
    # The comparison means something: the model has learned, and nothing has become a NaN.
    raw = run.live()
    floats = {name for name, ema in averages.items() if ema.is_floating_point()}
    assert all(averages[name].isfinite().all() for name in floats)
    assert any(not torch.equal(averages[name], raw[name]) for name in floats)


def assert_tied_weights_have_one_average(run):
    tracked = tuple(names for names in run.case.tied if all(map(run.case.tracks, names)))
    assert ties(dict(run.ema.named_emas())) == tracked
    assert ties(run.live()) == run.case.tied


def assert_the_model_computes_with_the_averages_while_swapped(run):
    raw, averages = run.raw(), run.averages()
    addresses = addresses_of(run.live())
    raw_outputs = run.evaluate(run.model)
    with run.ema.swapped():
        assert_all_same(run.live(), rounded(run.with_averages(raw), raw))
        assert_all_same(dict(run.ema.named_emas()), averages)
        # In place: captured graphs, DDP's buckets and views of the weights see the average too.
        assert addresses_of(run.live()) == addresses
        assert ties(run.live()) == run.case.tied
        outputs = run.evaluate(run.model)
    assert_all_same(run.live(), raw)
    assert_all_same(dict(run.ema.named_emas()), averages)
    assert addresses_of(run.live()) == addresses
    assert torch.equal(run.evaluate(run.model), raw_outputs)
    fresh = run.build()
    fresh.load_state_dict(run.with_averages(raw), strict=True)
    assert torch.equal(outputs, run.evaluate(fresh))
    assert not torch.equal(outputs, raw_outputs)


# ---- the tests


def test_every_average_is_that_of_the_plain_loop(run):
    assert_averages_are_those_of_the_plain_loop(run)
    assert_tied_weights_have_one_average(run)


def test_the_model_computes_with_the_averages_while_swapped(run):
    assert_the_model_computes_with_the_averages_while_swapped(run)


def test_gpt2_at_its_full_size():
    run = Run(GPT2_124M, MODES[FULL_PRECISION]).train()
    assert sum(ema.numel() for _, ema in run.ema.named_emas()) > 124_000_000
    assert_averages_are_those_of_the_plain_loop(run)
    assert_tied_weights_have_one_average(run)
    assert_the_model_computes_with_the_averages_while_swapped(run)


def test_a_saved_state_fits_the_plain_model_and_the_wrapped_one(run, tmp_path):
    torch.save(run.ema.state_dict(), tmp_path / "ema.pt")
    state = torch.load(tmp_path / "ema.pt", weights_only=True)
    for model in (run.build(), run.model):
        ema = run.manage(model)
        ema.load_state_dict(state)
        assert_all_same(dict(ema.named_emas()), run.averages())
        assert (ema.iteration, ema.num_updates) == (NUM_STEPS, NUM_STEPS)


def test_a_state_saved_while_swapped_brings_the_raw_weights_back(run, tmp_path):
    raw = run.raw()
    with run.ema.swapped():
        saved = {"model": run.live(), "ema": run.ema.state_dict()}
        torch.save(saved, tmp_path / "both.pt")
    saved = torch.load(tmp_path / "both.pt", weights_only=True)
    plain = run.build()
    ema = run.manage(plain)
    plain.load_state_dict(saved["model"], strict=True)
    ema.load_state_dict(saved["ema"])
    assert ema.is_swapped
    ema.swap()
    assert_all_same(plain.state_dict(), raw)
    assert_all_same(dict(ema.named_emas()), run.averages())


def test_copy_to_fills_a_plain_model(run):
    plain = run.build()
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    run.ema.copy_to(plain)
    assert_all_same(plain.state_dict(), rounded(run.with_averages(before), before))
    assert ties(plain.state_dict()) == run.case.tied


@pytest.mark.parametrize("name", WRAPPED)
def test_a_manager_made_before_the_wrapping_goes_on(name, backend):
    run = Run(CASES[name], MODES[FULL_PRECISION], manage_first=True).train()
    assert_all_same(dict(run.ema.named_emas()), run.averages())
    raw = run.raw()
    with run.ema.swapped():
        assert_all_same(run.live(), run.with_averages(raw))
    assert_all_same(run.live(), raw)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "wrap", [not_at_all, DistributedDataParallel, in_data_parallel, compiled, in_ddp_compiled]
)
def test_a_child_called_module_keeps_its_name(wrap):
    ema = fused_ema.EMAManager(wrap(child_called_module(torch.float32)))
    assert [name for name, _ in ema.named_emas()] == [
        "module.module.weight",
        "module.module.bias",
        "module.norm.weight",
        "module.norm.bias",
        "module.norm.running_mean",
        "module.norm.running_var",
        "module.norm.num_batches_tracked",
        "head.weight",
        "head.bias",
    ]


def test_a_normalised_weight_is_that_of_the_averaged_originals():
    run = Run(CASES["weight_norm, spectral_norm"], MODES[FULL_PRECISION]).train()
    averages = run.averages()
    scale, direction, matrix = (
        averages[f"{name}.parametrizations.weight.{part}"]
        for name, part in (("0", "original0"), ("0", "original1"), ("2", "original"))
    )
    left, right = (averages[f"2.parametrizations.weight.0.{part}"] for part in ("_u", "_v"))
    with run.ema.swapped():
        run.model.eval()
        by_rows, by_spectrum = run.model[0].weight.detach(), run.model[2].weight.detach()
    expected = scale * direction / direction.norm(dim=1, keepdim=True)
    torch.testing.assert_close(by_rows, expected, rtol=1e-5, atol=1e-7)
    expected = matrix / (left @ matrix @ right)
    torch.testing.assert_close(by_spectrum, expected, rtol=1e-5, atol=1e-7)


def test_a_lazy_module_must_be_run_first():
    model = not_yet_run_lazy()
    with pytest.raises(ValueError, match=r"'0\.weight' of the model isn't initialised"):
        fused_ema.EMAManager(model)
    model(torch.randn(BATCH, 12))
    fused_ema.EMAManager(model).update()
