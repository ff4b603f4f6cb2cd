"""Writes bench/data/<case>.json: the names and shapes of the tensors of five published models.

The models are built by their own libraries on torch's meta device, so nothing is allocated and no
weights or configs are downloaded. Made with torch 2.13.0, transformers 5.23.0 and diffusers 0.42.1.
To rerun, from the repository's root, in an environment of its own (the pin keeps pip from
pulling another torch; torchvision is not needed):

    python3 -m venv ENV && echo "torch==2.13.0" > ENV/pins.txt
    ENV/bin/pip install torch==2.13.0
    ENV/bin/pip install -c ENV/pins.txt transformers==5.23.0 diffusers==0.42.1
    ENV/bin/python bench/make_cases.py
"""

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class _Model:
    title: str
    library: str
    # Everything that differs from the library's defaults or that fixes the size.
    config: dict[str, Any]
    build: Callable[[Any, dict[str, Any]], Any]


def _resnet(library: Any, config: dict[str, Any]) -> Any:
    return library.ResNetForImageClassification(library.ResNetConfig(**config))


def _vit(library: Any, config: dict[str, Any]) -> Any:
    return library.ViTForImageClassification(library.ViTConfig(**config))


def _unet(library: Any, config: dict[str, Any]) -> Any:
    return library.UNet2DConditionModel(**config)


def _llama(library: Any, config: dict[str, Any]) -> Any:
    return library.LlamaForCausalLM(library.LlamaConfig(**config))


def _detector(library: Any, config: dict[str, Any]) -> Any:
    backbone = library.RTDetrResNetConfig(**config["backbone_config"])
    full = library.RTDetrConfig(**{**config, "backbone_config": backbone})
    return library.RTDetrForObjectDetection(full)


_MODELS: dict[str, _Model] = {
    "resnet50": _Model(
        "ResNet-50",
        "transformers",
        {
            "depths": [3, 4, 6, 3],
            "hidden_sizes": [256, 512, 1024, 2048],
            "layer_type": "bottleneck",
            "num_labels": 1000,
        },
        _resnet,
    ),
    # RT-DETR R18 as published, but with live BatchNorm in the backbone: its authors train R18
    # so, while transformers freezes those layers by default.
    "detector": _Model(
        "RT-DETR R18, a detector of YOLO's size",
        "transformers",
        {
            "backbone_config": {
                "depths": [2, 2, 2, 2],
                "hidden_sizes": [64, 128, 256, 512],
                "layer_type": "basic",
                "out_features": ["stage2", "stage3", "stage4"],
            },
            "freeze_backbone_batch_norms": False,
            "encoder_in_channels": [128, 256, 512],
            "hidden_expansion": 0.5,
            "decoder_layers": 3,
            "num_labels": 80,
        },
        _detector,
    ),
    "vit_l16": _Model(
        "ViT-L/16",
        "transformers",
        {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
            "image_size": 224,
            "patch_size": 16,
            "num_labels": 1000,
        },
        _vit,
    ),
    "sdxl_unet": _Model(
        "Stable Diffusion XL base U-Net",
        "diffusers",
        {
            "sample_size": 128,
            "block_out_channels": [320, 640, 1280],
            "layers_per_block": 2,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        _unet,
    ),
    "llama3_8b": _Model(
        "Llama 3 8B",
        "transformers",
        {
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 14336,
            "vocab_size": 128256,
            "tie_word_embeddings": False,
        },
        _llama,
    ),
}


def _rows(model: torch.nn.Module) -> list[list[Any]]:
    """One row a tensor of the state dict, in its order."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    rows: list[list[Any]] = []
    seen: set[int] = set()
    # keep_vars: tied tensors are one object only as long as they aren't detached.
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if name in parameters:
            rows.append([name, list(tensor.shape), "parameter"])
        else:
            dtype = str(tensor.dtype).removeprefix("torch.")
            rows.append([name, list(tensor.shape), "buffer", dtype])
    return rows


def _write(path: Path, head: dict[str, Any], rows: list[list[Any]]) -> None:
    """Writes JSON with one tensor a line, so that a diff shows which tensors changed."""
    lines = [f"  {json.dumps(key)}: {json.dumps(value)},\n" for key, value in head.items()]
    tensors = ",\n".join(f"    {json.dumps(row)}" for row in rows)
    path.write_text("{\n" + "".join(lines) + '  "tensors": [\n' + tensors + "\n  ]\n}\n")


def main() -> None:
    """Builds every model and writes its file."""
    _DATA.mkdir(exist_ok=True)
    for name, spec in _MODELS.items():
        # By name: the project's own environment holds neither library, and mypy must pass there.
        library = importlib.import_module(spec.library)
        with torch.device("meta"):
            model = spec.build(library, spec.config)
        head = {
            "model": spec.title,
            "library": f"{spec.library} {library.__version__}",
            "class": type(model).__name__,
            "config": spec.config,
            "columns": ["name", "shape", "kind", "dtype (buffers only)"],
        }
        rows = _rows(model)
        _write(_DATA / f"{name}.json", head, rows)
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        print(f"{name}: {len(rows):,} tensors, {num_parameters:,} parameters")


if __name__ == "__main__":
    main()
