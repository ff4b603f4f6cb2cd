from __future__ import annotations

import json

import pytest
import torch

from bench import __main__ as cli
from bench import report, teacher

CPU = torch.device("cpu")
QUICK = ["teacher", "--shrunk", "48", "--rounds", "2", "--device", "cpu", "--threads", "1"]
WAYS = ["into", "plan", "in place", "data"]

pytestmark = pytest.mark.filterwarnings("ignore:.*was written since the last update:UserWarning")


@pytest.fixture(autouse=True)
def without_lightly(monkeypatch):
    """Which takes seconds to import, where it is there at all."""
    before = torch.get_num_threads()
    monkeypatch.setattr(report, "find", lambda package: None)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("name", "num_elements"),
    [("vit_s", 22_000_000), ("vit_b", 86_500_000), ("gpt2", 124_400_000)],
)
def test_the_models_are_of_the_published_sizes(name, num_elements):
    model = teacher.make_model(name, torch.device("meta"))
    params = list(model.parameters())
    assert sum(p.numel() for p in params) == pytest.approx(num_elements, rel=0.01)
    assert 148 <= len(params) <= 152


@pytest.mark.parametrize("way", WAYS)
def test_each_way_averages(way):
    ways, left_out = teacher.make_ways(teacher.make_model("vit_s", CPU, 48))
    assert list(ways) == WAYS
    assert list(left_out) == ["lightly"]
    _, call, lists = ways[way]
    assert teacher.check(call, lists) == ""
    # By hand as well, in float64.
    before = [e.double() for e in lists.ema]
    call()
    for ema, old, param in zip(lists.ema, before, lists.params, strict=True):
        right = 0.875 * old + 0.125 * param.detach().double()
        torch.testing.assert_close(ema.double(), right, rtol=1e-6, atol=1e-6)


def test_one_that_does_something_else_is_found():
    _, call, lists = teacher.make_ways(teacher.make_model("gpt2", CPU, 48))[0]["plan"]
    assert teacher.check(lambda: None, lists).startswith("update: ema element 0 is ")
    assert teacher.check(lambda: [call(), call()], lists).startswith("update: ema element 0 is ")


def test_a_run(tmp_path, capsys):
    assert cli.main([*QUICK, "--json", str(tmp_path / "t.json")]) == 0
    content = json.loads((tmp_path / "t.json").read_text())
    assert content["failures"] == []
    assert [(r["model"], r["way"]) for r in content["rows"]] == [
        (model, way) for model in teacher.MODELS for way in WAYS
    ]
    for r in content["rows"]:
        assert r["rounds"] == 2
        assert r["gb_per_s"] == pytest.approx(12 * r["num_elements"] / r["us"] / 1e3)
        plan = next(o for o in content["rows"] if (o["model"], o["way"]) == (r["model"], "plan"))
        assert r["of_plan"] == pytest.approx(r["us"] / plan["us"])
        assert r["host_us"] > 0
    out = capsys.readouterr().out
    assert "GPT-2 small: 148 tensors" in out
    assert "left out: lightly: " in out


def test_a_failure_fails_the_run(monkeypatch, capsys):
    monkeypatch.setattr(teacher, "_in_place", lambda *args: None)
    assert cli.main([*QUICK, "--models", "vit_s"]) == 1
    assert "FAILED: ViT-S/16, t.mul_(1 - m).add_(s, alpha=m): update" in capsys.readouterr().err
