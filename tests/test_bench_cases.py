import math
import re

import pytest
import torch

from bench import cases

# Parameters as published (torchvision for the ResNet and the ViT, diffusers, Meta); the detector's
# authors give 20 M. num_float is what an EMA with buffers averages.
MODELS = {
    # name: (num_parameters, num_parameter_tensors, num_float, num_all)
    "resnet50": (25_557_032, 161, 267, 320),
    "detector": (20_184_464, 342, 480, 549),
    "vit_l16": (304_326_632, 392, 392, 392),
    "sdxl_unet": (2_567_463_684, 1680, 1680, 1680),
    "llama3_8b": (8_030_261_248, 291, 291, 291),
}

# name: (num_layers, num_tensors outside of them)
LAYERS = {
    "resnet50": (16, 8),
    "detector": (24, 191),
    "vit_l16": (24, 8),
    "sdxl_unet": (87, 88),
    "llama3_8b": (32, 3),
}


def test_names():
    lists = ("small_500", "small_5000", "small", "medium", "odd", "even", "misaligned", "single")
    assert cases.names() == (*MODELS, *lists)


@pytest.mark.parametrize("name", MODELS)
def test_model_has_the_published_size(name):
    tensors = cases.model_tensors(name)
    parameters = [tensor for tensor in tensors if tensor.kind == "parameter"]
    num_float = sum(tensor.is_floating_point for tensor in tensors)
    num_parameters = sum(tensor.num_elements for tensor in parameters)
    assert (num_parameters, len(parameters), num_float, len(tensors)) == MODELS[name]
    assert len({tensor.name for tensor in tensors}) == len(tensors)


@pytest.mark.parametrize("name", MODELS)
def test_model_case_holds_the_float_tensors_in_order(name):
    case = cases.load(name)
    assert case.shapes == tuple(
        tensor.shape for tensor in cases.model_tensors(name) if tensor.is_floating_point
    )
    assert case.num_tensors == MODELS[name][2]
    assert case.note == ""
    assert case.offsets is None


def test_batch_norm_counters_are_left_out():
    integers = [t for t in cases.model_tensors("resnet50") if not t.is_floating_point]
    assert len(integers) == 53
    assert {t.name.rsplit(".", 1)[1] for t in integers} == {"num_batches_tracked"}
    # 53 BatchNorm layers with a running mean and a running variance each.
    assert cases.load("resnet50").num_elements == 25_557_032 + 53_120


@pytest.mark.parametrize(
    ("name", "num_tensors", "num_elements"),
    [
        ("small_500", 500, 32_000),
        ("small_5000", 5_000, 320_000),
        ("small", 10_000, 640_000),
        ("medium", 2_000, 8_192_000),
        ("odd", 400, 30_707_372),
        ("even", 400, 30_722_432),
        ("misaligned", 2_000, 8_192_000),
        ("single", 1, 2**26),
    ],
)
def test_synthetic_case_has_its_size(name, num_tensors, num_elements):
    case = cases.load(name)
    assert (case.num_tensors, case.num_elements) == (num_tensors, num_elements)
    assert case.note == ""


def test_odd_sizes_are_odd_and_reach_from_1_to_a_million():
    sizes = [math.prod(shape) for shape in cases.load("odd").shapes]
    assert all(size % 2 == 1 for size in sizes)
    assert (min(sizes), max(sizes)) == (1, 2**20 + 1)
    # Mixed: no long run of growing sizes, as sorted ones would be.
    assert sizes[:4] == [1, 177, 31375, 5]


def test_even_sizes_are_the_odd_ones_in_whole_vectors():
    odd, even = (
        [math.prod(shape) for shape in cases.load(name).shapes] for name in ("odd", "even")
    )
    assert all(e % 64 == 0 and 0 <= e - o < 64 for o, e in zip(odd, even, strict=True))


def _layers(name, tensors):
    """Maps a layer to its tensors' names; those outside of any layer are under ""."""
    groups = {}
    for tensor in tensors:
        match = re.match(cases.MODELS[name].layer, tensor.name)
        groups.setdefault(match[0] if match else "", []).append(tensor.name)
    return groups


@pytest.mark.parametrize("name", MODELS)
def test_rule_finds_the_layers(name):
    groups = _layers(name, cases.model_tensors(name))
    assert (len(groups) - 1, len(groups[""])) == LAYERS[name]


@pytest.mark.parametrize("divisor", [1, 2, 3, 10, 100, 10**12])
@pytest.mark.parametrize("name", MODELS)
def test_scaling_a_model_keeps_whole_layers(name, divisor):
    tensors = [t for t in cases.model_tensors(name) if t.is_floating_point]
    num_elements = sum(t.num_elements for t in tensors)
    limit = max(num_elements // divisor, 1)
    kept, note = cases.keep_layers(tensors, cases.MODELS[name], limit)
    whole, groups = _layers(name, tensors), _layers(name, kept)

    for layer, members in groups.items():
        assert members == whole[layer]
    in_kept = set(kept)
    assert [t for t in tensors if t in in_kept] == kept

    num_kept, num_layers = len(groups.keys() - {""}), len(whole) - 1
    if divisor == 1:
        assert kept == tensors
        assert note == ""
    else:
        assert note.startswith(f"{num_kept} of {num_layers} ")
        assert note.endswith(f", without {cases.MODELS[name].rest}") == ("" not in groups)
    num_left = sum(t.num_elements for t in kept)
    if num_left > limit:
        size = {t.name: t.num_elements for t in tensors}
        smallest = min(sum(size[m] for m in whole[layer]) for layer in whole if layer)
        assert num_left == smallest

    case = cases.load(name, limit)
    assert case.shapes == tuple(t.shape for t in kept)
    assert case.note == note


@pytest.mark.parametrize(
    ("name", "max_elements", "num_elements", "note"),
    [
        # An 8B layer has 218,112,000 elements, the embeddings and the head 1,050,677,248.
        ("llama3_8b", 8_030_261_248, 8_030_261_248, ""),
        ("llama3_8b", 8_030_261_247, 7_812_149_248, "31 of 32 layers"),
        ("llama3_8b", 3_000_000_000, 2_795_573_248, "8 of 32 layers"),
        ("llama3_8b", 1_268_789_248, 1_268_789_248, "1 of 32 layers"),
        (
            "llama3_8b",
            1_268_789_247,
            1_090_560_000,
            "5 of 32 layers, without embeddings and head",
        ),
        ("llama3_8b", 1, 218_112_000, "1 of 32 layers, without embeddings and head"),
        ("small", 10_000, 9_984, "156 of 10,000 tensors"),
        ("medium", 4095, 4096, "1 of 2,000 tensors"),
        ("misaligned", 1_000_000, 999_424, "244 of 2,000 tensors"),
        ("single", 1000, 1000, "1,000 of 67,108,864 elements"),
    ],
)
def test_scaling_to_a_limit(name, max_elements, num_elements, note):
    case = cases.load(name, max_elements)
    assert (case.num_elements, case.note) == (num_elements, note)


def test_scaling_odd_keeps_the_mix_of_sizes():
    whole, half = cases.load("odd"), cases.load("odd", 15_000_000)
    assert half.num_elements <= 15_000_000
    assert half.num_elements > 14_000_000
    assert half.num_tensors == pytest.approx(whole.num_tensors / 2, abs=10)
    assert set(half.shapes) <= set(whole.shapes)


def test_unknown_case_names_the_cases():
    with pytest.raises(ValueError, match=r"unknown case 'resnet51'; the cases are resnet50, .*odd"):
        cases.load("resnet51")


@pytest.mark.parametrize("max_elements", [0, -1])
def test_limit_below_one_is_refused(max_elements):
    with pytest.raises(ValueError, match=f"max_elements must be at least 1, got {max_elements}"):
        cases.load("small", max_elements)


def test_offsets_must_match_the_shapes():
    with pytest.raises(ValueError, match="case 'x': 1 offsets for 2 shapes"):
        cases.Case("x", "x", ((1,), (2,)), offsets=(1,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_misaligned_views_are_misaligned(dtype):
    case = cases.load("misaligned", 100_000)
    ema = cases.make_tensors(case, dtype, "cpu", 0, "ema")
    param = cases.make_tensors(case, dtype, "cpu", 0, "param")
    assert len(ema) == len(param) == 24
    for e, p in zip(ema, param, strict=True):
        assert e.shape == p.shape == (4096,)
        assert 1 <= e.storage_offset() <= 7
        assert 1 <= p.storage_offset() <= 7
        assert e.data_ptr() % 16 != 0
        # Two elements of fp64 are 16 bytes, so there its param is aligned to 16.
        assert p.data_ptr() % 16 != 0 or dtype == torch.float64
        assert e.data_ptr() % 16 != p.data_ptr() % 16
    assert {t.storage_offset() for t in ema} == {1, 3, 5, 7}
    assert {t.storage_offset() for t in param} == {2, 6}


def test_tensors_are_allocations_of_their_own():
    case = cases.load("resnet50", 5_000_000)
    tensors = cases.make_tensors(case, torch.float32, "cpu", 0, "ema")
    assert tuple(tuple(t.shape) for t in tensors) == case.shapes
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)
    assert all(t.storage_offset() == 0 and t.data_ptr() % 16 == 0 for t in tensors)
    assert all(t.untyped_storage().nbytes() == 4 * t.numel() for t in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_values_are_like_weights(dtype):
    # More than the 2^20 values that are drawn, so that they repeat.
    case = cases.Case("x", "x", ((1000, 999), (2_000_001,), ()))
    ema = cases.make_tensors(case, dtype, "cpu", 3, "ema")
    assert all(t.dtype == dtype for t in ema)
    values = torch.cat([t.flatten() for t in ema]).double()
    # 1e6 draws: the standard error is 2e-5 of either.
    assert values.mean().item() == pytest.approx(0, abs=1e-4)
    assert values.std().item() == pytest.approx(0.02, abs=1e-4)
    assert torch.equal(values[: 2**20], values[2**20 : 2**21])


def test_values_depend_on_the_seed_and_the_side_alone():
    case = cases.load("odd", 100_000)

    def values(seed, which):
        return torch.cat(cases.make_tensors(case, torch.float32, "cpu", seed, which))

    first = values(0, "ema")
    assert torch.equal(first, values(0, "ema"))
    for other in (values(0, "param"), values(1, "ema"), values(1, "param")):
        assert (first == other).double().mean().item() < 0.01


def test_unknown_side_is_refused():
    with pytest.raises(ValueError, match="which must be 'ema' or 'param', got 'both'"):
        cases.make_tensors(cases.load("small", 64), torch.float32, "cpu", 0, "both")


@pytest.mark.parametrize("which", ["ema", "param"])
def test_tensors_in_one_allocation_lie_as_those_by_themselves(which):
    case = cases.load("misaligned", 100_000)
    tensors = cases.make_tensors(case, torch.float32, "cpu", 3, which, in_one=True)
    assert [tensor.shape for tensor in tensors] == [torch.Size(shape) for shape in case.shapes]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    factor = 2 if which == "param" else 1
    end = 0
    for tensor, offset in zip(tensors, case.offsets, strict=True):
        assert tensor.storage_offset() * 4 % 512 == factor * offset % 8 * 4
        assert tensor.storage_offset() >= end
        end = tensor.storage_offset() + tensor.numel()
        assert tensor.std() > 0.01
