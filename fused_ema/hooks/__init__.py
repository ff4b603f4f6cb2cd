"""Drop-ins for training frameworks, one module each; importing this package imports none of them.

Each maps a framework's events to fused_ema and needs that framework alone: ``mmcv``,
``mmengine``, ``swa_utils`` (torch's own), ``timm``, ``torch_ema``, ``diffusers``, ``lightning``,
``transformers``, ``deepspeed``; for teachers and target networks ``lightly``,
``stable_baselines3``, ``torchrl``, ``trl``, ``mmdet``.
"""

from __future__ import annotations

import importlib
from types import ModuleType


def required(module: str, adapter: str, package: str) -> ModuleType:
    """Imports a framework's module for an adapter.

    Args:
        module: As in ``import module``.
        adapter: Which of the adapters asks.
        package: What to install, with its version.

    Raises:
        ImportError: It isn't installed; says which package is needed. Another import error of the
            framework's own comes through as it is.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module + ".").startswith(error.name + "."):
            raise
        raise ImportError(
            f"fused_ema.hooks.{adapter} needs {package}, which isn't installed here; "
            f"install it, or use fused_ema.EMAManager"
        ) from error
