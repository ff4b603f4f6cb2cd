"""What torch keeps of a model's values beside the model, for a while."""

from __future__ import annotations

import torch
from torch.nn.utils import parametrize


def keep_computed() -> bool:
    """Whether torch.nn.utils.parametrize.cached() is on."""
    return parametrize._cache_enabled > 0


def drop() -> None:
    """Drops it, since the values were just written in place.

    These are autocast's casts of the weights, which last as long as its outermost region, and what
    torch.nn.utils.parametrize.cached() has computed.
    """
    torch.clear_autocast_cache()
    if parametrize._cache_enabled:
        parametrize._cache.clear()
