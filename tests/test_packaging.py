"""What is handed out: an sdist that holds everything, and a wheel that works elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from installed import installed

ROOT = Path(__file__).parents[1]
# Of a repository; no one needs them who has unpacked an archive.
LEFT_OUT = {".gitattributes", ".gitignore"}


def run(*command: str | Path, cwd: Path, **variables: str) -> None:
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_table_of_versions_names_what_ci_runs():
    tomllib = pytest.importorskip("tomllib")
    makefile = (ROOT / "Makefile").read_text()
    pins = dict(re.findall(r"^(TORCH|CUDA_TORCH) \?= torch==(.+)$", makefile, re.MULTILINE))
    page = (ROOT / "docs" / "install.md").read_text()
    rows = [
        [cell.strip() for cell in row[1:-1].split("|")]
        for row in page[page.index("| Python | torch") :].partition("\n\n")[0].splitlines()[2:]
    ]
    in_ci = {torch.partition(",")[0] for _, torch, _, what in rows if what.endswith("in CI")}
    assert in_ci == set(pins.values())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    # The Pythons that were run, and the only one that installs and wasn't.
    pythons = {row[0] for row in rows} | set(re.findall(r"^Python (\S+) compiles", page, re.M))
    first = min(int(python.partition(".")[2]) for python in pythons)
    assert project["requires-python"] == f">=3.{first}"
    assert pythons == {f"3.{minor}" for minor in range(first, first + len(pythons))}
    oldest = min(tuple(map(int, row[1].partition(",")[0].split("."))) for row in rows)
    assert project["dependencies"] == [f"torch>={oldest[0]}.{oldest[1]}"]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """The sources as an sdist brings them to another machine."""
    folder = tmp_path_factory.mktemp("sdist")
    # The list of files of an earlier one would be taken over.
    egg = ["egg_info", "--egg-base", folder]
    run(sys.executable, "setup.py", "--quiet", *egg, "sdist", "--dist-dir", folder, cwd=ROOT)
    [archive] = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="asks git what there is")
def test_the_sdist_holds_every_file(unpacked):
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    tracked = {name for name in names.split("\0") if name and (ROOT / name).exists()} - LEFT_OUT
    assert "csrc/cuda/loop.cuh" in tracked
    packed = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    assert tracked - packed == set()
    # And nothing that was built here, which would pass for the kernels of another machine.
    assert {name for name in packed - tracked if ".egg-info" not in name} == {
        "PKG-INFO",
        "setup.cfg",
    }
    for name in ("csrc/ema_math.h", "setup.py"):
        assert (unpacked / name).read_bytes() == (ROOT / name).read_bytes()


def test_a_wheel_from_the_sdist_carries_the_kernels(unpacked, tmp_path):
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--quiet",
        "wheel",
        ".",
        "--no-deps",
        "--no-build-isolation",
    ]
    # Without nvcc's part, which takes most of the time: `make wheel` builds all.
    switches = {"FUSED_EMA_BUILD": "require", "FUSED_EMA_CUDA": "off"}
    run(*pip, "--wheel-dir", tmp_path, cwd=unpacked, **switches)
    [wheel] = tmp_path.glob("*.whl")
    # Not "any": it holds machine code.
    assert wheel.stem.endswith("linux_x86_64") or "aarch64" in wheel.stem
    facts = installed(wheel, tmp_path / "environment")
    assert facts["native"] is True
    assert facts["backend"] == "cpu"
    assert facts["is_equal"] is True
