"""python -m bench posthoc: what comes out of the snapshots is what was kept in the training."""

from __future__ import annotations

import json

import pytest
import torch

from bench import posthoc, report, train
from bench.__main__ import main
from bench.posthoc import Settings


@pytest.fixture
def few(monkeypatch):
    draw = torch.Generator().manual_seed(0)

    def some(number):
        return train.Data(
            torch.rand(number, 1, 8, 8, generator=draw),
            torch.randint(10, (number,), generator=draw),
        )

    data = some(160), some(50)
    monkeypatch.setattr(train, "load_data", lambda: data)
    return data


@pytest.mark.parametrize("decay", [False, True])
def test_averages_come_out_as_they_were_kept(few, decay, tmp_path):
    settings = Settings(epochs=2, num_snapshots=10, decay=decay)
    content = posthoc.run(*few, settings, tmp_path)
    assert (content["settings"]["num_steps"], content["settings"]["every"]) == (20, 2)
    assert [row["std"] for row in content["curve"]] == list(posthoc.WIDTHS)
    by_std = {row["std"]: row for row in content["curve"]}
    for row in content["kept"]:
        out = by_std[row["std"]]
        # Off by no more than the weights move, times the error.
        assert row["off_by"] < out["error"] + 1e-6
        assert row["loss"] == pytest.approx(out["loss"], abs=1e-3)
    assert by_std[0.05]["error"] == by_std[0.1]["error"] == pytest.approx(0, abs=1e-6)


def test_tables_plot_and_record(few, tmp_path, capsys):
    record = tmp_path / "r.json"
    words = ["posthoc", "--epochs", "1", "--snapshots", "3", "--json", str(record)]
    if not report.why_no_plot():
        words += ["--plot", str(tmp_path / "curve")]
    assert main(words) == 0
    said = capsys.readouterr().out
    content = json.loads(record.read_text())
    for row in content["curve"]:
        assert f"{row['accuracy']:.2%}" in said
    assert len(list(tmp_path.glob("curve.*"))) in (0, 2)
