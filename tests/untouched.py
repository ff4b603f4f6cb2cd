"""What belongs to the whole process, and no part of this package may move."""

from __future__ import annotations

import random
import warnings
from contextlib import contextmanager

import numpy as np
import torch


def process_state():
    """Name to value; each of them compares with ``==``."""
    kind, keys, *rest = np.random.get_state()
    return {
        "torch's generator": torch.get_rng_state().tolist(),
        "torch's generators of devices": [s.tolist() for s in torch.cuda.get_rng_state_all()]
        if torch.cuda.is_available()
        else [],
        "Python's generator": random.getstate(),
        "numpy's generator": (kind, keys.tolist(), *rest),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "warnings filters": list(warnings.filters),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
    }


def changes(before, after):
    """The names of what differs."""
    return [name for name, value in before.items() if after[name] != value]


@contextmanager
def untouched():
    """Fails where the block has changed any of it."""
    before = process_state()
    yield
    assert changes(before, process_state()) == []
