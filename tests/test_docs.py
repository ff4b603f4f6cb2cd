"""What the README and the docstrings show runs, and says what it shows."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest
import torch

import fused_ema
import fused_ema.manager
import fused_ema.ops
import fused_ema.plan
import fused_ema.sources

MODULES = (
    fused_ema.ops,
    fused_ema.plan,
    fused_ema.manager,
    fused_ema.schedules,
    fused_ema.sources,
)
README = Path(__file__).parents[1] / "README.md"


def test_what_the_readme_shows_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # It writes a checkpoint.
    names: dict[str, object] = {}
    manager, checkpoint, loop, plan = re.findall(
        r"```python\n(.*?)```", README.read_text(), re.DOTALL
    )

    def run(code):
        exec(compile(code, str(README), "exec"), names)

    run(manager)
    model, ema = names["model"], names["ema"]
    raw = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    averages = {name: tensor.clone() for name, tensor in ema.named_emas()}
    assert ema.num_updates == 100
    assert not torch.equal(raw["0.weight"], averages["0.weight"])
    run(checkpoint)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, averages[name])
    with torch.no_grad():
        model[0].weight.add_(1)
    run(loop)
    for name, tensor in names["ema"].named_emas():
        assert torch.equal(tensor, names["shadow"][name])
    run(plan)
    was = names["averages"][0].clone()
    with torch.no_grad():
        model[0].weight.add_(1)
    names["plan"].update(0.5)
    assert torch.equal(names["averages"][0], was.lerp(model[0].weight, 0.5))


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples(module):
    names = {"torch": torch, "fused_ema": fused_ema, "model": torch.nn.Linear(2, 2)}
    result = doctest.testmod(module, extraglobs=names)
    assert result.attempted > 0
    assert result.failed == 0
