"""``diffusers``: the folder of ``EMAModel.save_pretrained``, or the list of its state."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fused_ema import _safetensors
from fused_ema._format_errors import READ, FormatError
from fused_ema.formats._files import load
from fused_ema.formats._found import Format, Found
from fused_ema.formats._names import Model
from fused_ema.formats._source import Source, momentum_of, whole
from fused_ema.formats._writing import count_of, list_of


def _read(data: Mapping[str, Any], origin: Source) -> Found | None:
    if not {"shadow_params", "optimization_step"} <= data.keys():
        return None
    step = whole(data["optimization_step"])
    return Found(
        "diffusers",
        origin.listed(data["shadow_params"], "shadow_params"),
        iteration=step,
        num_updates=step,
        momentum=momentum_of(data.get("decay")),
        ema_at="shadow_params",
    )


def _make(found: Found, model: Model | None) -> dict[str, Any]:
    listed, decay = list_of(found, model, "diffusers")
    return {
        "decay": decay,
        "min_decay": 0.0,
        "optimization_step": count_of(found, "diffusers"),
        "update_after_step": 0,
        "use_ema_warmup": False,
        "inv_gamma": 1.0,
        "power": 2 / 3,
        "shadow_params": listed,
    }


def read_folder(path: Path, origin: Source) -> Found:
    """The folder of diffusers' ``EMAModel.save_pretrained``: a config and a model."""
    try:
        config = json.loads((path / "config.json").read_text())
    except (FileNotFoundError, ValueError) as error:
        raise FormatError(
            f"{READ}: '{path}' is a folder without a readable config.json; pass a file, or the "
            "folder of EMAModel.save_pretrained"
        ) from error
    if not isinstance(config, dict) or "optimization_step" not in config:
        raise FormatError(
            f"{READ}: config.json of '{path}' has no 'optimization_step', so this is no folder of "
            "EMAModel.save_pretrained; its weights may be raw ones"
        )
    files = sorted(path.glob("*.safetensors.index.json")) or sorted(path.glob("*.safetensors"))
    files = files or sorted(path.glob("*.bin"))
    if len(files) != 1:
        raise FormatError(f"{READ}: '{path}' has {len(files)} files of weights; keep one")
    file = files[0]
    if file.suffix == ".bin":
        tensors = origin.named(load(file), file.name)
    else:
        tensors = origin.named(_safetensors.map_any(file)[0], file.name)
    step = whole(config["optimization_step"])
    return Found(
        "diffusers",
        tensors,
        iteration=step,
        num_updates=step,
        momentum=momentum_of(config.get("decay")),
        ema_at=file.name,
    )


FORMAT = Format(
    "diffusers", _read, _make, is_part=True, marks=("shadow_params.*", "*.shadow_params.*")
)
