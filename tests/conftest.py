from __future__ import annotations

import pytest
import torch
from ranks import Ranks

import fused_ema
from fused_ema import _native


def pytest_addoption(parser):
    parser.addoption(
        "--require-cuda",
        action="store_true",
        help="fail, instead of skipping, every test that finds no CUDA device or kernels for it",
    )


def pytest_runtest_setup(item):
    if item.get_closest_marker("cuda") is None:
        return
    missing = (
        "no CUDA device"
        if not torch.cuda.is_available()
        else fused_ema.info().reasons.get("cuda:0", "")
    )
    if missing:
        if item.config.getoption("--require-cuda"):
            pytest.fail(f"--require-cuda: {missing}")
        pytest.skip(missing)


DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.cuda))


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


@pytest.fixture(params=["native", "foreach"])
def backend(request, monkeypatch) -> str:
    """Runs a test with the kernels and again as an install without them would run it."""
    if request.param == "foreach":
        monkeypatch.setattr(_native, "C", None)
        monkeypatch.setattr(_native, "why_not", "switched off by a test")
    else:
        assert _native.C is not None, f"the compiled part is missing: {_native.why_not}"
    return request.param


@pytest.fixture
def one_thread():
    """Matrix products depend on the number of threads; and for small ones, one is quicker."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one():
    """A process that is a group by itself, as two() are."""
    ranks = Ranks(1)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="module")
def two():
    """Two processes of a group, which run the functions that it is called with."""
    ranks = Ranks(2)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="module")
def four():
    ranks = Ranks(4)
    yield ranks
    ranks.stop()
