"""What the README and the docstrings show runs, and says what it shows."""

from __future__ import annotations

import doctest
import json
import re
from pathlib import Path

import pytest
import torch

import fused_ema
import fused_ema.manager
import fused_ema.ops
import fused_ema.plan
import fused_ema.sources
from bench import scale
from bench.__main__ import main as bench

MODULES = (
    fused_ema.ops,
    fused_ema.plan,
    fused_ema.manager,
    fused_ema.schedules,
    fused_ema.sources,
)
README = Path(__file__).parents[1] / "README.md"
DOCS = README.parent / "docs"


def blocks(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def test_what_the_readme_shows_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # It writes a checkpoint.
    names: dict[str, object] = {}
    manager, checkpoint, loop = blocks(README)

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


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 150


PAGES = ["index", "settings", "plans", "checkpoints", "choosing-an-average", "teachers"]


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_shows_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    found = blocks(DOCS / f"{page}.md")
    assert found
    for code in found:
        exec(compile(code, page, "exec"), names)
    if page == "plans":
        was = names["averages"][0].clone()
        names["plan"].update(0.25)
        assert torch.equal(names["averages"][0], was.lerp(names["params"][0], 0.25))
    if page == "teachers":
        student, teacher = names["model"]["student"], names["model"]["teacher"]
        with torch.no_grad():
            student[0].weight.add_(1)
        want = teacher[0].weight.lerp(student[0].weight, 0.004)
        names["ema"].update()
        assert torch.equal(teacher[0].weight, want)


def test_links_lead_somewhere():
    for page in (README, *DOCS.glob("*.md"), *README.parent.glob("[A-Z]*.md")):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples(module):
    names = {"torch": torch, "fused_ema": fused_ema, "model": torch.nn.Linear(2, 2)}
    result = doctest.testmod(module, extraglobs=names)
    assert result.attempted > 0
    assert result.failed == 0


# ---- docs/scale.md


def test_the_tables_of_scale_are_those_of_the_records(capsys):
    assert bench(["scale"]) == 0
    tables = capsys.readouterr().out.strip().split("\n\n")
    assert len(tables) == 3
    for table in tables:
        assert table in (DOCS / "scale.md").read_text()


def test_scale_by_hand():
    cells = {row[:2]: row[2:] for row in (*scale.memory().rows, *scale.times().rows)}
    eight, sixty_four = scale.GPUS.index(8), scale.GPUS.index(64)
    # 70e9 x 4 bytes / 64, and 280 GB in all.
    assert cells["70B", "fp32 or split, a GPU"][sixty_four] == "4.38"
    assert cells["70B", "fp32 on the host, a host of 8"][eight] == "280"
    # 70e9 x 12 bytes / 64 / 4,323.5 GB/s, and 8e9 x 8 bytes / 8 / 95.8 GB/s.
    assert cells["70B", "fp32, fp32 params"][sixty_four] == "3.04"
    assert cells["8B", "fp32 on the host, fp32 params *"][eight] == "83.5"
    # 671e9 x (4 + 4) bytes / 32 are 168 GB; x (2 + 2) / 16 too.
    assert cells["671B", "fp32, fp32 params"][scale.GPUS.index(32)] == "-"
    assert cells["671B", "bf16, bf16 params *"][scale.GPUS.index(16)] == "-"


# ---- docs/choosing-an-average.md


def test_the_tables_of_averages_are_computed(capsys):
    assert bench(["averages"]) == 0
    tables = capsys.readouterr().out.strip().split("\n\n")
    assert len(tables) == 3
    page = (DOCS / "choosing-an-average.md").read_text()
    for table in tables:
        assert table in page


def test_what_the_page_says_of_digits():
    record = json.loads((README.parent / "bench/results/cpu_epyc_2cores_posthoc.json").read_text())
    by_std = {row["std"]: row for row in record["curve"]}
    best = max(record["curve"], key=lambda row: row["accuracy"])
    assert by_std[0.15]["accuracy"] == best["accuracy"]
    assert (f"{best['accuracy']:.1%}", f"{record['raw']['accuracy']:.1%}") == ("95.1%", "91.8%")
    assert by_std[0.02]["loss"] > record["raw"]["loss"]
    assert all(row["off_by"] < 1e-5 for row in record["kept"])
