"""``diffusers``: the folder of ``EMAModel.save_pretrained``, or the list of its state."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fused_ema import _safetensors, _tracking
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


_SHARD = re.compile(r"-\d{5}-of-\d{5}")
_ONLY = "-00001-of-00001"
_BINS = ("diffusion_pytorch_model", "pytorch_model")


def _variant_of(file: Path) -> str:
    """The variant in the name of a file: ``fp16`` of ``x.fp16.bin``; "" of a plain one."""
    # A variant stands before the number of a shard, and after it in older files.
    stem, _, index = _SHARD.sub("", file.name).partition(".safetensors.index.")
    if index:
        return index.removesuffix("json").removesuffix(".")
    return stem.removesuffix(file.suffix).partition(".")[2]


def _weights_in(path: Path, variant: str | None) -> Path:
    """The file of weights that diffusers loads from a folder: an index before what it names.

    Raises:
        FormatError: There is none of the variant, or not just one.
    """
    stored, bins = sorted(path.glob("*.safetensors")), sorted(path.glob("*.bin"))
    shards = [file for file in stored if _SHARD.search(file.name) and _ONLY not in file.name]
    if stored:  # Other files may end so, such as the state of an optimizer.
        bins = [file for file in bins if file.name.partition(".")[0] in _BINS]
    single = [file for file in stored if file not in shards]
    kinds = (sorted(path.glob("*.safetensors.index*.json")), single, bins)
    variants = {_variant_of(file) for files in (*kinds, shards) for file in files}
    if variant is None:
        variant = next(iter(variants)) if len(variants) == 1 else ""
        if variants and variant not in variants:
            raise FormatError(
                f"{READ}: '{path}' has the variants {_tracking.shown(sorted(variants))} and no "
                "plain weights; say which: variant= (--variant)"
            )
    for files in (*kinds, shards):
        found = [file for file in files if _variant_of(file) == variant]
        names = _tracking.shown([file.name for file in found])
        if found and files is shards:
            raise FormatError(
                f"{READ}: '{path}' has shards without their index, *.safetensors.index.json: "
                f"{names}"
            )
        if len(found) > 1:
            raise FormatError(
                f"{READ}: '{path}' has {len(found)} files of weights ({names}); keep one"
            )
        if found:
            return found[0]
    has = _tracking.shown([v or "plain" for v in sorted(variants)])
    which = f"of the variant '{variant}'; it has: {has or 'none'}" if variant else "in it"
    raise FormatError(f"{READ}: '{path}' has no weights {which}")


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
    file = _weights_in(path, origin.variant)
    tensors = load(file) if file.suffix == ".bin" else _safetensors.map_any(file)[0]
    step = whole(config["optimization_step"])
    return Found(
        "diffusers",
        origin.named(tensors, file.name),
        iteration=step,
        num_updates=step,
        momentum=momentum_of(config.get("decay")),
        ema_at=file.name,
    )


FORMAT = Format(
    "diffusers", _read, _make, is_part=True, marks=("shadow_params.*", "*.shadow_params.*")
)
