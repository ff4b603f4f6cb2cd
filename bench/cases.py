"""The lists of tensors that the benchmark runs on: published models, and made-up extremes.

A model's tensors come from bench/data/<case>.json, which make_cases.py writes; the others are made
here. Only floating-point tensors count, since an EMA averages no others.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

_DATA = Path(__file__).parent / "data"
_NUM_VALUES = 2**20
_ALIGNMENT_BYTES = 512  # Of what torch's CUDA allocator hands out.


@dataclass(frozen=True)
class Case:
    """Shapes of a list of tensors to run an op on, and how to name them in a table.

    Attributes:
        name: What `load` knows it by.
        title: What a table shows.
        shapes: Of parameters and floating-point buffers, in the model's order.
        note: What was left out to fit the limit, empty for a whole case.
        offsets: Per tensor, how many elements after an aligned address its ema starts; None where
            every tensor is an allocation of its own.
    """

    name: str
    title: str
    shapes: tuple[tuple[int, ...], ...]
    note: str = ""
    offsets: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.offsets is not None and len(self.offsets) != len(self.shapes):
            raise ValueError(
                f"case {self.name!r}: {len(self.offsets)} offsets for {len(self.shapes)} shapes"
            )

    @property
    def num_tensors(self) -> int:
        """How many tensors the list holds."""
        return len(self.shapes)

    @property
    def num_elements(self) -> int:
        """Elements of all tensors together."""
        return sum(map(math.prod, self.shapes))


@dataclass(frozen=True)
class TensorSpec:
    """One entry of a model's state dict."""

    name: str
    shape: tuple[int, ...]
    kind: Literal["parameter", "buffer"]
    is_floating_point: bool

    @property
    def num_elements(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class ModelRule:
    """How a model's tensors group into repeated layers, by their names.

    Attributes:
        title: What a table shows.
        layer: Matches the start of a tensor's name where the tensor belongs to a layer; tensors
            with the same match make up one layer.
        layers: What a note calls the layers.
        rest: What a note calls the tensors outside of them.
    """

    title: str
    layer: str
    layers: str
    rest: str


MODELS: dict[str, ModelRule] = {
    "resnet50": ModelRule(
        "ResNet-50", r"resnet\.encoder\.stages\.\d+\.layers\.\d+\.", "bottlenecks", "stem and head"
    ),
    "detector": ModelRule(
        "RT-DETR R18",
        r"model\.(backbone\..+?\.layers|encoder\.aifi|encoder\.(fpn|pan)_blocks\.\d+\.bottlenecks"
        r"|decoder\.layers)\.\d+\.",
        "blocks",
        "stem, necks and heads",
    ),
    "vit_l16": ModelRule("ViT-L/16", r"vit\.layers\.\d+\.", "layers", "embeddings and head"),
    "sdxl_unet": ModelRule(
        "SDXL U-Net",
        r".+?\.(transformer_blocks|resnets)\.\d+\.",
        "blocks",
        "embeddings, projections and samplers",
    ),
    "llama3_8b": ModelRule("Llama 3 8B", r"model\.layers\.\d+\.", "layers", "embeddings and head"),
}


def single(num_elements: int = 2**26) -> Case:
    """One tensor: no list to walk, so nothing but the memory's speed."""
    return Case("single", "one tensor", ((num_elements,),))


def _small(name: str, num_tensors: int) -> Case:
    return Case(name, f"{num_tensors:,} x 64", ((64,),) * num_tensors)


def _medium() -> Case:
    return Case("medium", "2,000 x 4,096", ((4096,),) * 2_000)


def _odd() -> Case:
    # 400 sizes from 1 to 2^20, even on a log scale, made odd: no vector width divides them. The
    # stride of 149 walks them all and mixes large with small, as in a model.
    num_tensors = 400
    sizes = [round(2 ** (20 * i / (num_tensors - 1))) | 1 for i in range(num_tensors)]
    shapes = tuple((sizes[i * 149 % num_tensors],) for i in range(num_tensors))
    return Case("odd", "odd sizes", shapes)


def _even() -> Case:
    # What the odd sizes are measured against: the same walk, in whole vectors of every dtype.
    shapes = tuple((-(-size // 64) * 64,) for (size,) in _odd().shapes)
    return Case("even", "odd sizes, rounded up to 64", shapes)


def _misaligned() -> Case:
    shapes = _medium().shapes
    offsets = tuple((1, 3, 5, 7)[i % 4] for i in range(len(shapes)))
    return Case("misaligned", "2,000 x 4,096, misaligned", shapes, offsets=offsets)


_SYNTHETIC: dict[str, Callable[[], Case]] = {
    "small_500": partial(_small, "small_500", 500),
    "small_5000": partial(_small, "small_5000", 5_000),
    "small": partial(_small, "small", 10_000),
    "medium": _medium,
    "odd": _odd,
    "even": _even,
    "misaligned": _misaligned,
    "single": single,
}


def names() -> tuple[str, ...]:
    """The names of all cases, models first."""
    return (*MODELS, *_SYNTHETIC)


def load(name: str, max_elements: int | None = None) -> Case:
    """The case of that name, made smaller where it has more than `max_elements` elements.

    A model loses whole layers, and the tensors outside its layers only where not even one layer
    fits beside them; a list loses whole tensors, and the single tensor shrinks. Where the smallest
    layer or tensor alone is over the limit, that one is kept.

    Raises:
        ValueError: There is no such case, or `max_elements` is below 1.
    """
    if max_elements is not None and max_elements < 1:
        raise ValueError(f"max_elements must be at least 1, got {max_elements}")
    if name in MODELS:
        return _load_model(name, max_elements)
    if name not in _SYNTHETIC:
        raise ValueError(f"unknown case {name!r}; the cases are {', '.join(names())}")
    case = _SYNTHETIC[name]()
    if max_elements is None or case.num_elements <= max_elements:
        return case
    if name == "single":
        note = f"{max_elements:,} of {case.num_elements:,} elements"
        return replace(single(max_elements), note=note)
    kept = _spread([math.prod(shape) for shape in case.shapes], max_elements)
    return replace(
        case,
        shapes=tuple(case.shapes[i] for i in kept),
        offsets=None if case.offsets is None else tuple(case.offsets[i] for i in kept),
        note=f"{len(kept):,} of {case.num_tensors:,} tensors",
    )


def model_tensors(name: str) -> list[TensorSpec]:
    """Every tensor in the state dict of the model of that case, tied ones once."""
    rows = json.loads((_DATA / f"{name}.json").read_text(encoding="utf-8"))["tensors"]
    # Parameters come without a dtype: all are floating-point.
    return [
        TensorSpec(row[0], tuple(row[1]), row[2], row[2] == "parameter" or "float" in row[3])
        for row in rows
    ]


def keep_layers(
    tensors: Sequence[TensorSpec], rule: ModelRule, max_elements: int
) -> tuple[list[TensorSpec], str]:
    """Leaves out whole layers until at most `max_elements` remain; also returns the note."""
    sizes: dict[str, int] = {}  # In the model's order, as dicts keep it.
    layer_of: dict[str, str] = {}
    num_rest_elements = 0
    for tensor in tensors:
        if match := re.match(rule.layer, tensor.name):
            layer_of[tensor.name] = match[0]
            sizes[match[0]] = sizes.get(match[0], 0) + tensor.num_elements
        else:
            num_rest_elements += tensor.num_elements
    if num_rest_elements + sum(sizes.values()) <= max_elements:
        return list(tensors), ""

    has_rest = num_rest_elements + min(sizes.values()) <= max_elements
    budget = max_elements - num_rest_elements if has_rest else max_elements
    layers = list(sizes)
    kept_layers = {layers[i] for i in _spread(list(sizes.values()), budget)}
    note = f"{len(kept_layers)} of {len(layers)} {rule.layers}"
    if not has_rest:
        note += f", without {rule.rest}"
    kept = [
        tensor
        for tensor in tensors
        if (layer_of[tensor.name] in kept_layers if tensor.name in layer_of else has_rest)
    ]
    return kept, note


def make_tensors(
    case: Case,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int,
    which: Literal["ema", "param"],
    in_one: bool = False,
) -> list[torch.Tensor]:
    """Allocates the tensors of a case, filled with values like weights.

    Args:
        case: What to allocate.
        dtype: A floating-point dtype, for all of them.
        device: Where to allocate and to draw the values.
        seed: The same seed gives the same values on the same device.
        which: The side of the pair: the two differ in values and, in a case with offsets, in where
            the views start.
        in_one: One allocation for all, of which the tensors are views, each as well aligned as an
            allocation of its own. Much faster to make where there are many.
    """
    if which not in ("ema", "param"):
        raise ValueError(f"which must be 'ema' or 'param', got {which!r}")
    generator = torch.Generator(device=device).manual_seed(2 * seed + (which == "param"))
    # So many values repeat through the whole list: drawing 1e9 of them would take longer than the
    # measurement, and the speed of the ops doesn't depend on them.
    drawn = torch.float64 if dtype == torch.float64 else torch.float32
    block = torch.randn(_NUM_VALUES, generator=generator, device=device, dtype=drawn)
    block = block.mul_(0.02).to(dtype)
    if in_one:
        return _views(case, block, which)
    # So that a piece from anywhere in the first half is one view.
    block = torch.cat([block, block])

    tensors = []
    pieces: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    position = 0  # Carried from tensor to tensor, so that neighbours differ.
    for i, shape in enumerate(case.shapes):
        offset = _offset(case, i, which)
        num_elements = math.prod(shape)
        if offset:
            room = torch.empty(offset + num_elements, dtype=dtype, device=device)
            tensor = room[offset:].view(shape)
        else:
            # No view, as a model's parameters are none: views are slower to ask about.
            tensor = torch.empty(shape, dtype=dtype, device=device)
        for piece in torch.split(tensor.view(-1), _NUM_VALUES):
            pieces.append(piece)
            values.append(block[position : position + piece.numel()])
            position = (position + piece.numel()) % _NUM_VALUES
        tensors.append(tensor)
    # One call: one by one, the 800,000 small tensors of a cold rotation would take a GPU's host
    # longer than the measurement.
    torch._foreach_copy_(pieces, values)
    return tensors


def _offset(case: Case, i: int, which: str) -> int:
    offset = 0 if case.offsets is None else case.offsets[i]
    # 1, 3, 5, 7 become 2, 6, 2, 6: no pair shares an alignment, and in fp32 and the 16-bit dtypes
    # both sides miss 16 bytes.
    return 2 * offset % 8 if which == "param" else offset


def _views(case: Case, block: torch.Tensor, which: str) -> list[torch.Tensor]:
    aligned = _ALIGNMENT_BYTES // block.element_size()
    starts = []
    end = 0
    for i, shape in enumerate(case.shapes):
        offset = _offset(case, i, which)
        starts.append(end + offset)
        end += aligned * math.ceil((offset + math.prod(shape)) / aligned)
    room = block.repeat(math.ceil(end / _NUM_VALUES))
    return [
        room[start : start + math.prod(shape)].view(shape)
        for start, shape in zip(starts, case.shapes, strict=True)
    ]


def _load_model(name: str, max_elements: int | None) -> Case:
    rule = MODELS[name]
    tensors = [tensor for tensor in model_tensors(name) if tensor.is_floating_point]
    note = ""
    if max_elements is not None:
        tensors, note = keep_layers(tensors, rule, max_elements)
    return Case(name, rule.title, tuple(tensor.shape for tensor in tensors), note)


def _spread(sizes: Sequence[int], budget: int) -> list[int]:
    """Indices of as many items as fit into the budget; the smallest item if none fits.

    The items are picked evenly in the order of their sizes, so that the mix of sizes stays; equal
    ones are therefore picked evenly along the list.
    """
    num_items = len(sizes)
    by_size = sorted(range(num_items), key=sizes.__getitem__)
    for num_kept in range(min(num_items, budget // sizes[by_size[0]]), 0, -1):
        # From the middle of each of num_kept equal parts.
        kept = [by_size[(2 * i + 1) * num_items // (2 * num_kept)] for i in range(num_kept)]
        if sum(sizes[i] for i in kept) <= budget:
            return sorted(kept)
    return by_size[:1]
