"""Exponential moving averages of model weights at the speed of the memory.

``ema = (1 - m) * ema + m * param`` over whole lists of tensors, in one launch per device and
dtype pair. ``m`` is the momentum: the weight of the new value.
"""

from fused_ema import schedules, sources, state
from fused_ema._version import __version__
from fused_ema.info import Info, info
from fused_ema.manager import EMAManager
from fused_ema.ops import copy_, swap_, update_
from fused_ema.plan import Plan

__all__ = [
    "EMAManager",
    "Info",
    "Plan",
    "__version__",
    "copy_",
    "info",
    "schedules",
    "sources",
    "state",
    "swap_",
    "update_",
]
