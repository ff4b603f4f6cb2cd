"""What one framework sets for the whole process is taken back before another one's test."""

from __future__ import annotations

import multiprocessing

import pytest


@pytest.fixture(autouse=True)
def start_method():
    # torchrl sets "spawn" when it is imported, of which MMEngine warns.
    multiprocessing.set_start_method(None, force=True)
