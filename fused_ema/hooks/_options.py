"""What a callback is given for the manager that it makes later, when there is a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fused_ema import _averages, _tracking
from fused_ema.manager import EMAManager

# These need the model.
_OF_THE_MODEL = ("ema_dtype", "device", "skip_frozen", "include", "exclude", "buffers")


class _Smallest(nn.Module):
    """A model to try options on. Of zeros: a layer's initialisation would draw random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float32, device="cpu"))


def checked(**options: Any) -> dict[str, Any]:
    """The options, once what is wrong without any model has been said.

    Raises:
        TypeError: As EMAManager.
        ValueError: As EMAManager.
    """
    if not any(options.get(name) for name in ("skip_buffers", "copy_buffers", "buffers")):
        options["buffers"] = "average"  # As these callbacks have always done.
    _averages.refuse_several("fused_ema.EMAManager", options.get("momentum"))
    _tracking.Buffers.parse(options.get("buffers") or "auto")
    EMAManager(_Smallest(), **{k: v for k, v in options.items() if k not in _OF_THE_MODEL})
    return options


def for_engine(title: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of EngineEMA, whose masters are of all that a DeepSpeed engine trains.

    Raises:
        ValueError: Names are chosen.
    """
    for name in ("include", "exclude"):
        if options[name]:
            raise ValueError(
                f"{title}: {name} is set, but with DeepSpeed the average is of all that the "
                f"engine trains; leave {name} out"
            )
    return {k: v for k, v in options.items() if k not in ("skip_frozen", "include", "exclude")}
