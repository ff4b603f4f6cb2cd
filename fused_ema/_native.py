"""Finds the compiled part, or says why there is none."""

from __future__ import annotations

import importlib
import json
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_REBUILD = "reinstall fused_ema with the torch in use, with pip's --no-build-isolation"


def build_info() -> dict[str, Any]:
    """What setup.py wrote about the build: native, and torch and cuda or the reason why not."""
    path = Path(__file__).with_name("_build_info.json")
    try:
        facts = json.loads(path.read_text())
    except (OSError, ValueError):
        return {"native": False, "reason": "the package was never built (no _build_info.json)"}
    if not isinstance(facts, dict):
        return {"native": False, "reason": f"{path.name} is damaged"}
    return facts


def _minor(version: str) -> tuple[str, ...]:
    return tuple(version.split("+")[0].split(".")[:2])


def _load() -> tuple[ModuleType | None, str]:
    facts = build_info()
    if not facts.get("native"):
        return None, str(facts.get("reason", "built without the compiled part"))
    built_with = str(facts.get("torch", "unknown"))
    # The C++ ABI of torch holds within a minor version only; across two the import may crash.
    if _minor(built_with) != _minor(torch.__version__):
        return None, f"built with torch {built_with} but torch {torch.__version__} runs; {_REBUILD}"
    try:
        return importlib.import_module("fused_ema._C"), ""
    except ImportError as error:
        return None, f"the compiled part does not load ({error}); {_REBUILD}"


C, why_not = _load()
"""The compiled module, or None; and then the reason."""

if C is None:
    warnings.warn(
        f"fused_ema runs on torch._foreach, without its kernels: {why_not}",
        RuntimeWarning,
        stacklevel=2,
    )
