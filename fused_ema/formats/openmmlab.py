"""``mmengine``, and ``mmcv``: the hooks of mmcv 1.x and MMDetection 2.x."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from fused_ema._format_errors import READ, WRITE, FormatError, refuse
from fused_ema.formats._found import Format, Found
from fused_ema.formats._names import Model, Tensors
from fused_ema.formats._source import (
    Main,
    Source,
    holds_tensors,
    parts,
    progress_of,
    shown_path,
    tensors_of,
    whole,
)
from fused_ema.formats._writing import count_of, raw_of


def _is_mmengine(data: Mapping[str, Any], origin: Source) -> bool:
    """Whether ``state_dict`` holds the average; elsewhere it is ``ema_state_dict`` that does."""
    saved = data.get("ema_state_dict")
    if not holds_tensors(data.get("state_dict")) or not holds_tensors(saved):
        return False
    if "n_averaged" in saved or not any(str(name).startswith("module.") for name in saved):
        return False
    meta = data.get("meta")
    by_mmengine = isinstance(meta, Mapping) and "mmengine_version" in meta
    return "steps" in saved or by_mmengine or origin.format == "mmengine"


def _read_mmengine(data: Mapping[str, Any], origin: Source) -> Found | None:
    if not _is_mmengine(data, origin):
        return None
    saved = data["ema_state_dict"]
    raw_part = parts(tensors_of(saved, "ema_state_dict"), "module.")
    main = tensors_of(data["state_dict"], "state_dict")
    missing = [
        f"'{name}' of ema_state_dict is not in state_dict" for name in raw_part if name not in main
    ]
    if missing:
        refuse(f"{READ}: {shown_path(origin.path)} is no file of MMEngine", missing)
    steps = whole(saved.get("steps"))
    iteration, epoch = progress_of(data.get("meta"))
    return Found(
        "mmengine",
        origin.named({name: main[name] for name in raw_part}, "state_dict"),
        origin.named({**main, **raw_part}, "ema_state_dict"),
        iteration=steps if iteration is None else iteration,
        num_updates=steps,
        epoch=epoch,
        ema_at="state_dict",
        raw_at="ema_state_dict 'module.*'",
    )


def _make_mmengine(found: Found, model: Model | None) -> dict[str, Any]:
    raw = raw_of(found, "mmengine")
    meta = {"epoch": found.epoch, "iter": found.iteration}
    return {
        "meta": {key: value for key, value in meta.items() if value is not None},
        "state_dict": found.averaged_model(),
        "ema_state_dict": {
            "steps": torch.tensor(count_of(found, "mmengine")),
            **{f"module.{name}": raw[name] for name in raw},
        },
    }


def _flat(name: str) -> str:
    return f"ema_{name.replace('.', '_')}"


def _read_mmcv(data: Mapping[str, Any], origin: Source) -> Found | None:
    weights = data.get("state_dict", data)
    if not holds_tensors(weights):
        return None
    flats: dict[str, list[str]] = {}
    for name in weights:
        flats.setdefault(_flat(str(name)), []).append(str(name))
    buffers = {key: names for key, names in flats.items() if key in weights}
    if not buffers:
        return None
    both = [names for names in buffers.values() if len(names) > 1]
    if both:
        first, second = both[0][:2]
        raise FormatError(
            f"{READ}: '{_flat(first)}' stands for both '{first}' and '{second}': the hook of mmcv "
            "mixed up their averages; rename one of them"
        )
    tensors = tensors_of(weights, "state_dict")
    main = {name: tensor for name, tensor in tensors.items() if name not in buffers}
    other = {names[0]: tensors[key] for key, names in buffers.items()}
    other = {name: other[name] for name in main if name in other}
    wrong = [
        f"'{name}' has shape {list(main[name].shape)} but '{_flat(name)}' {list(t.shape)}"
        for name, t in other.items()
        if main[name].shape != t.shape
    ]
    if wrong:
        refuse(f"{READ}: {shown_path(origin.path)} is no file of mmcv's EMA hooks", wrong)
    meta = data.get("meta")
    meta = meta if isinstance(meta, Mapping) else {}
    config = _Config(meta.get("config"))
    holds, why = _main_of(meta, config, origin)
    iteration, epoch = progress_of(meta)
    if iteration is not None and "by iterations" in why:
        iteration += 1  # It was saved before the runner counted its iteration.
    ema, raw = ({n: main[n] for n in other}, {**main, **other}) if holds == "ema" else (other, main)
    momentum = config.ema_hook.get("momentum")
    at = "state_dict" if "state_dict" in data else "the whole file"
    return Found(
        "mmcv",
        origin.named(ema, at),
        origin.named(raw, at),
        iteration=iteration,
        momentum=momentum if isinstance(momentum, float) and 0 < momentum < 1 else None,
        epoch=epoch,
        ema_at=at if holds == "ema" else f"{at} 'ema_*'",
        raw_at=f"{at} 'ema_*'" if holds == "ema" else at,
        why="main was given" if why == "main" else why,
    )


class _Config:
    """What a config of OpenMMLab says of its hooks, read as text and never run."""

    def __init__(self, text: Any) -> None:
        self.ema_hook: dict[str, Any] = {}
        self.by_epoch: bool | None = None
        self.has_ema_hook = False
        if not isinstance(text, str):
            return
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return
        assigned: dict[str, dict[str, Any]] = {}
        for node in ast.walk(tree):
            settings = _settings(node)
            kind = settings.get("type")
            if isinstance(kind, str) and kind.endswith("EMAHook"):
                self.ema_hook, self.has_ema_hook = settings, True
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                assigned[node.targets[0].id] = _settings(node.value)
        if "checkpoint_config" in assigned:
            by_iters = str(assigned.get("runner", {}).get("type", "")).startswith("Iter")
            self.by_epoch = assigned["checkpoint_config"].get("by_epoch", not by_iters) is True

    def ema_hook_comes_first(self) -> bool | None:
        """Whether it swaps before the checkpoint hook saves; None where nothing is known."""
        if not self.has_ema_hook:
            return None
        priority = self.ema_hook.get("priority", "NORMAL")
        if isinstance(priority, str):
            first = ("HIGHEST", "VERY_HIGH", "HIGH", "ABOVE_NORMAL")
            return priority.upper() in first
        return isinstance(priority, int) and priority < 50


def _settings(node: ast.AST) -> dict[str, Any]:
    """The constants of a ``dict(a=1)`` or ``{'a': 1}``."""
    pairs: Iterable[tuple[Any, Any]] = ()
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        pairs = [(k.arg, k.value) for k in node.keywords]
    elif isinstance(node, ast.Dict):
        pairs = [
            (k.value, v)
            for k, v in zip(node.keys, node.values, strict=True)
            if isinstance(k, ast.Constant)
        ]
    return {str(key): v.value for key, v in pairs if isinstance(v, ast.Constant)}


def _main_of(meta: Mapping[str, Any], config: _Config, origin: Source) -> tuple[Main, str]:
    """What the model's own names hold, and what says so.

    The hook swaps at the end of each epoch, so a file that is saved then, after the swap, has the
    average there; one saved within an epoch, or by a runner without epochs, has the raw weights.
    """
    if origin.main is not None:
        return origin.main, "main"
    own = meta.get("fused_ema")
    if isinstance(own, Mapping) and own.get("main") in ("ema", "raw"):
        return ("ema" if own["main"] == "ema" else "raw"), "meta fused_ema"
    messages = meta.get("hook_msgs")
    last = messages.get("last_ckpt") if isinstance(messages, Mapping) else None
    own_name = origin.path.resolve().name if origin.path else ""
    candidates = [
        ("meta hook_msgs", Path(last).name if isinstance(last, str) else ""),
        ("the config", {True: "epoch_", False: "iter_", None: ""}[config.by_epoch]),
        # Runners of epochs name so whatever they save, so "epoch_" alone says nothing.
        ("the name of the file", own_name if own_name.startswith("iter_") else ""),
    ]
    for where, name in candidates:
        if name.startswith("iter_"):
            return "raw", f"{where}: saved by iterations, when no swap has happened"
        if name.startswith("epoch_"):
            if config.ema_hook_comes_first() is False:
                return "raw", "the config: the priority of the EMA hook lets it swap after the save"
            return "ema", f"{where}: saved at the end of an epoch, after the swap"
    raise FormatError(
        f"{READ}: {shown_path(origin.path)} doesn't say whether it was saved at the end of an "
        "epoch (the average is in the main keys) or within one (it is under 'ema_*'); say it: "
        "main='ema' or main='raw' (--main)"
    )


def _make_mmcv(found: Found, model: Model | None) -> dict[str, Any]:
    raw = raw_of(found, "mmcv")
    main = found.averaged_model()
    buffers: Tensors = {}
    sources: dict[str, str] = {}
    for name in main:
        if name not in found.ema:
            continue
        key = _flat(name)
        if key in sources or key in main:
            raise FormatError(
                f"{WRITE}: '{sources.get(key, key)}' and '{name}' would both be '{key}' in a file "
                "of mmcv; rename one of them"
            )
        sources[key] = name
        buffers[key] = raw[name]
    meta: dict[str, Any] = {"fused_ema": {"main": "ema"}}
    if found.epoch is not None:
        meta["epoch"] = found.epoch
    if found.iteration is not None:
        meta["iter"] = found.iteration
    # The hook registers its buffers with the model itself, so they precede those of its children.
    own = {name: tensor for name, tensor in main.items() if "." not in name}
    return {"meta": meta, "state_dict": {**own, **buffers, **main}}


MMENGINE = Format("mmengine", _read_mmengine, _make_mmengine, marks=("steps",))
MMCV = Format("mmcv", _read_mmcv, _make_mmcv, is_last=True)
