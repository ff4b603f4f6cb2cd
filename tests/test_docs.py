"""What the README and the docstrings show runs, and says what it shows."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest
import torch

import fused_ema
import fused_ema.ops
import fused_ema.plan

README = Path(__file__).parents[1] / "README.md"


def test_the_quick_start_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(code, str(README), "exec"), names)
    # The model is back on its own weights, and the ema has moved from where it started.
    for param, ema in zip(names["params"], names["ema"], strict=True):
        assert not torch.equal(param, ema)


@pytest.mark.parametrize("module", [fused_ema.ops, fused_ema.plan])
def test_docstring_examples(module):
    names = {"torch": torch, "fused_ema": fused_ema, "model": torch.nn.Linear(2, 2)}
    result = doctest.testmod(module, extraglobs=names)
    assert result.attempted > 0
    assert result.failed == 0
