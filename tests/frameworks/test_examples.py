"""The examples of frameworks run, and the average is better than the raw weights there too."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.filterwarnings("ignore")  # The frameworks' own, of loaders and of versions.
@pytest.mark.parametrize("name", ["with_lightning", "with_trainer"])
def test_the_average_is_better(name, tmp_path, one_thread):
    train = runpy.run_path(str(EXAMPLES / f"{name}.py"))["train"]
    raw, averaged = (train(str(tmp_path), epochs=2, averages=has) for has in (False, True))
    assert averaged < 0.8 * raw
