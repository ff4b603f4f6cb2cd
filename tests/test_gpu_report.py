"""bench/gpu/report.sh where there is no GPU: it bounds its parts, goes on, and says what failed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "bench" / "gpu" / "report.sh"


def run(*arguments):
    return subprocess.run(
        ["bash", str(SCRIPT), *map(str, arguments)],
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )


def limits():
    return {part: int(s) for part, s in re.findall(r"\[(\w+)\]=(\d+)", SCRIPT.read_text())}


def test_each_half_ends_within_ten_minutes():
    unasked = re.search(r"\|\| PARTS=\((.*)\)", SCRIPT.read_text())[1].split()
    assert unasked == ["build", "test", "sanitize", "launches", "bench", "verdict"]
    others = [part for part in limits() if part not in unasked]
    # The rest is for the environment, and for parts that are slow to end.
    assert sum(limits()[part] for part in unasked) <= 560
    assert sum(limits()[part] for part in ("build", *others, "verdict")) <= 560


def test_every_part_is_described():
    text = SCRIPT.read_text()
    for part in limits():
        assert re.search(rf"^#   {part} +\w", text, re.MULTILINE), part
        assert f"run_{part}() {{" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((), "usage: bash bench/gpu/report.sh OUT"), (("out", "nothing"), "unknown part 'nothing'")],
)
def test_bad_arguments(arguments, message, tmp_path):
    done = run(*(tmp_path / a if a == "out" else a for a in arguments))
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="only without a GPU")
def test_a_failed_part_does_not_stop_the_next(tmp_path):
    (tmp_path / "launches.json").write_text("of an earlier run")
    done = run(tmp_path, "launches", "verdict")
    assert done.returncode == 1
    results = done.stdout.partition("== results")[2]
    assert re.search(r"launches +FAILED", results)
    assert re.search(r"verdict +FAILED", results)
    assert not (tmp_path / "launches.json").exists()
    assert f"no records in {tmp_path}" in done.stdout
    log = (tmp_path / "log.txt").read_text()
    assert "only a GPU has launches to count" in log
    assert f"torch {torch.__version__}" in log
