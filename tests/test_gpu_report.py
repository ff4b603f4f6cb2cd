"""bench/gpu/report.sh where there is no GPU: what it runs when, what it leaves out, what it says.

Most tests run it in a tree whose Python, make and compute-sanitizer only write down that they were
called.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fused_ema
from bench.gpu import module
from fused_ema import _native

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "bench" / "gpu" / "report.sh"
TEXT = SCRIPT.read_text()
ALL = re.search(r"^PARTS=\((.*)\)", TEXT, re.MULTILINE)[1].split()
CHECKS = ["test", "sanitize", "memcheck"]
RECORDS = ["launches", "bench", "step", "host", "counters", "compile", "variants"]

# Tells its arguments, then does as the name of the part asks: FAIL and SLOW name parts. A check
# waits for the other checks, if WAIT names them all; what is timed fails beside a check.
FAKE = r"""#!/usr/bin/env bash
told="$(basename "$0") $*"
case $told in
  *"-c import xdist") exit "${NO_XDIST:-0}" ;;
  *" -c "*) exit 0 ;;
  *bench.gpu.module) part=module ;;
  "compute-sanitizer --tool memcheck"*) part=memcheck ;;
  "python -m pytest"*) part=test ;;
  "make gpu-sanitize"*) part=sanitize ;;
  "make build"*) part=build ;;
  *"bench verdict"*) part=verdict ;;
  *--json*) part=$(basename "${@: -1}" .json) ;;
esac
echo "$part: $told" >>"$TREE/calls"
case $part in
  test | sanitize | memcheck)
    touch "$TREE/running-$part"
    for other in ${WAIT:-}; do
      for _ in {1..100}; do
        [[ ! -f $TREE/running-$other ]] || continue 2
        sleep 0.1
      done
      echo "$other does not run beside $part"
      exit 1
    done
    sleep 0.3
    rm "$TREE/running-$part"
    ;;
  *) ! compgen -G "$TREE/running-*" || exit 1 ;;
esac
if [[ " ${SLOW:-} " == *" $part "* ]]; then
  trap 'echo "$part was interrupted"; exit 1' INT
  sleep "${SLOW_S:-20}" &
  wait
fi
[[ $told != *--json* ]] || echo '{}' >"${@: -1}"
[[ $part != verdict || -n ${NO_TABLE:-} ]] || echo "Targets: of $#"
[[ " ${FAIL:-} " != *" $part "* ]]
"""


def limits(text=TEXT):
    return {part: int(s) for part, s in re.findall(r"\[(\w+)\]=(\d+)", text)}


def number(name):
    return int(re.search(rf"^{name}=(\d+)", TEXT, re.MULTILINE)[1])


class Tree:
    """A project that holds the script alone, and who it calls."""

    def __init__(self, folder):
        self.folder = folder
        self.out = folder / "out"
        self.script = folder / "bench" / "gpu" / "report.sh"
        self.script.parent.mkdir(parents=True)
        shutil.copy(SCRIPT, self.script)
        (folder / "fused_ema").mkdir()
        (folder / "bin").mkdir()
        for name in ("python", "make", "compute-sanitizer"):
            self.program(name, FAKE)
        self.program("nproc", "#!/bin/sh\necho ${CORES:-16}\n")

    def program(self, name, text):
        path = self.folder / "bin" / name
        path.write_text(text)
        path.chmod(0o755)

    def set_limits(self, grace=1, **seconds):
        text = self.script.read_text().replace("GRACE=10", f"GRACE={grace}")
        for part, s in seconds.items():
            text = re.sub(rf"\[{part}\]=\d+", f"[{part}]={s}", text)
        self.script.write_text(text)

    def run(self, *arguments, **env):
        return self.shell(["bash", "bench/gpu/report.sh", *map(str, arguments)], **env)

    def shell(self, command, **env):
        """Runs it and returns how it ended; `calls` has what it called since, by part."""
        (self.folder / "calls").write_text("")
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        return subprocess.run(
            command,
            cwd=self.folder,
            env=os.environ | {"PYTHON": "python", "TREE": str(self.folder), "PATH": path} | env,
            shell=isinstance(command, str),
            capture_output=True,
            text=True,
        )

    def calls(self):
        lines = (self.folder / "calls").read_text().splitlines()
        return [tuple(line.split(": ", 1)) for line in lines]

    def parts(self):
        """Those that ran; `module` is how build begins, and the checks are in any order."""
        return ["build" if part == "module" else part for part, _ in self.calls()]


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path)


def result_of(done, part):
    found = re.search(rf"^{part} +(\w+) +(\d+) s", done.stdout.partition("== results")[2], re.M)
    return found and found[1]


# ---- order and budget


def test_every_part_is_described():
    assert {*limits()} == {*ALL, "verdict"}
    for part in ALL:
        assert re.search(rf"^#   {part} +\w", TEXT, re.MULTILINE), part
    for part in limits():
        assert f"run_{part}() {{" in TEXT


def test_what_tells_most_comes_first_and_fits_whatever_it_takes():
    assert ALL[:7] == ["build", *CHECKS, "launches", "bench", "step"]
    bounds = limits()
    checks = max(bounds[part] for part in CHECKS)
    others = number("START") + number("GRACE") + bounds["verdict"]
    first = ("build", "launches", "bench", "step")
    assert number("UNASKED") == 660
    assert sum(bounds[part] for part in first) + checks + others <= 660
    # The second call, on a machine where it has to be built again.
    assert sum(bounds[part] for part in ("build", *ALL[7:])) + others <= 660


def test_all_parts_run_in_order_the_checks_beside_each_other(tree):
    # Each check fails unless it sees the others, and what is timed where it sees a check.
    done = tree.run("out", WAIT=" ".join(CHECKS))
    assert done.returncode == 0, done.stdout
    parts = tree.parts()
    assert sorted(parts[1:4]) == sorted(CHECKS)
    assert [parts[0], *parts[4:]] == ["build", *ALL[4:], "verdict"]
    assert "left out" not in done.stdout
    for part in (*ALL, "verdict"):
        assert result_of(done, part) == "ok"


def test_checks_named_apart_still_run_beside_each_other(tree):
    done = tree.run("out", "memcheck", "launches", "test", WAIT="memcheck test")
    assert done.returncode == 0, done.stdout
    assert tree.parts() in (
        ["memcheck", "test", "launches", "verdict"],
        ["test", "memcheck", "launches", "verdict"],
    )


def test_what_does_not_fit_is_left_out_and_its_command_runs_it(tree):
    bounds = limits()
    ends = number("GRACE") + bounds["verdict"]
    fitting = ["launches", "host", "counters"]
    budget = max(bounds[part] for part in fitting) + ends + 4
    left_out = [part for part in ALL if part not in fitting]
    assert all(bounds[part] + ends > budget for part in left_out)
    (tree.folder / "some libraries").mkdir()
    done = tree.run("--libraries", "some libraries", "--seconds", budget, "out")
    assert done.returncode == 0
    assert tree.parts() == [*fitting, "verdict"]
    end = done.stdout.partition("== left out")[2].splitlines()
    assert end[0] == f", {budget} s are too few: {' '.join(left_out)}"
    for part in left_out:
        assert result_of(done, part) is None
    log = (tree.folder / "out" / "log.txt").read_text()
    assert end[1] in log

    again = tree.shell(end[1])
    assert sorted(tree.parts()) == sorted([*left_out, "verdict"])
    assert "left out" not in again.stdout
    assert str(tree.folder / "some libraries") in dict(tree.calls())["variants"]
    assert (tree.folder / "out" / "log.txt").read_text().startswith(log)


def test_a_second_call_builds_first_within_a_budget_that_suffices(tree):
    tree.set_limits(variants=700)
    done = tree.run("out")
    assert "== left out, 660 s are too few: variants\n" in done.stdout
    needed = limits()["build"] + 700 + number("START") + 1 + limits()["verdict"]
    command = f"bash bench/gpu/report.sh --seconds {needed} out build variants"
    assert f"env PYTHON=python {command} \n" in done.stdout
    # Had nothing come before it, it would have fitted.
    tree.set_limits(build=1, launches=6, variants=24, verdict=1)
    text = tree.script.read_text()
    tree.script.write_text(text.replace("UNASKED=660", "UNASKED=28").replace("START=20", "START=1"))
    done = tree.run("out", "build", "launches", "variants", SLOW="launches", SLOW_S="3")
    assert "bash bench/gpu/report.sh out build variants \n" in done.stdout


@pytest.mark.parametrize("slow", ["launches", ""])
def test_time_that_a_part_does_not_take_is_for_the_next(slow, tree):
    tree.set_limits(launches=6, step=6, verdict=1)
    done = tree.run("--seconds", 11, "out", "launches", "step", SLOW=slow, SLOW_S="4")
    assert result_of(done, "launches") == "ok"
    assert result_of(done, "step") == (None if slow else "ok")


def test_a_part_is_interrupted_at_its_bound_and_the_next_one_runs(tree):
    tree.set_limits(grace=5, launches=1)
    done = tree.run("out", "launches", "step", SLOW="launches")
    assert done.returncode == 1
    assert result_of(done, "launches") == "FAILED"
    assert result_of(done, "step") == "ok"
    assert "launches was interrupted" in (tree.folder / "out" / "log.txt").read_text()


@pytest.mark.parametrize("part", [*CHECKS, *RECORDS])
def test_a_failed_part_does_not_stop_the_next(part, tree):
    done = tree.run("out", FAIL=part)
    assert done.returncode == 1
    results = {name: result_of(done, name) for name in (*ALL, "verdict")}
    assert results == dict.fromkeys(results, "ok") | {part: "FAILED"}


# ---- the parts


@pytest.mark.parametrize(
    ("env", "workers"),
    [({}, "6"), ({"CORES": "4"}, "4"), ({"CORES": "1"}, None), ({"NO_XDIST": "1"}, None)],
)
def test_tests_run_on_some_cores_where_xdist_is(env, workers, tree):
    tree.run("out", "test", **env)
    found = re.search(r" -n (\d+)$", dict(tree.calls())["test"])
    assert (found and found[1]) == workers


def test_a_module_that_fits_is_not_built_again(tree):
    (tree.folder / "fused_ema" / "_C.so.so").write_text("")
    assert tree.run("out", "build").returncode == 0
    assert [part for part, _ in tree.calls()] == ["module"]
    assert (tree.folder / "fused_ema" / "_C.so.so").exists()


@pytest.mark.parametrize("fail", ["module", "module build"])
def test_a_module_that_does_not_fit_is_built_anew_and_never_measured(fail, tree):
    (tree.folder / "fused_ema" / "_C.cpython-3.so").write_text("of yesterday")
    (tree.folder / "fused_ema" / "_build_info.json").write_text("{}")
    done = tree.run("out", "build", "launches", FAIL=fail)
    assert result_of(done, "build") == "FAILED"  # Built, it still doesn't fit.
    tries = ["module", "build"] + ["module"] * (fail == "module")
    assert [part for part, _ in tree.calls()] == [*tries, "launches", "verdict"]
    assert list((tree.folder / "fused_ema").iterdir()) == []


def test_libraries_are_handed_to_variants_alone(tree):
    (tree.folder / "libs").mkdir()
    tree.run("--libraries", "libs", "out", *RECORDS)
    told = [call for _, call in tree.calls() if "--libraries" in call]
    assert len(told) == 1
    assert f"bench variants --seconds 35 --libraries {tree.folder}/libs --json" in told[0]
    tree.run("out", "variants")
    assert "--libraries" not in dict(tree.calls())["variants"]


def test_the_verdict_is_over_all_records_of_this_and_earlier_calls(tree):
    assert tree.run("out", "test").returncode == 0
    assert tree.parts() == ["test"]  # Nothing to judge yet.
    tree.run("out", "launches", "host")
    done = tree.run("out", "step", FAIL="verdict")  # So it ends where a target was missed.
    assert done.returncode == 0
    told = dict(tree.calls())["verdict"].split()
    assert [Path(file).name for file in told[4:]] == ["host.json", "launches.json", "step.json"]
    assert done.stdout.endswith("Targets: of 6\n")
    done = tree.run("out", "step", FAIL="verdict", NO_TABLE="1")
    assert done.returncode == 1
    assert result_of(done, "verdict") == "FAILED"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "usage: bash bench/gpu/report.sh [--seconds N] [--libraries FOLDER] OUT [PART...]"),
        (("--seconds", "many", "out"), "usage: "),
        (("--seconds",), "usage: "),
        (("--minutes", "3", "out"), "usage: "),
        (("--libraries", "nowhere", "out"), "--libraries: nowhere is no folder"),
        (("out", "nothing"), "unknown part 'nothing'"),
        (("out", "verdict"), "unknown part 'verdict'"),
    ],
)
def test_bad_arguments(arguments, message, tree):
    done = tree.run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert tree.calls() == []
    assert not tree.out.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="only without a GPU")
def test_the_real_thing_says_that_there_is_no_gpu(tmp_path):
    (tmp_path / "launches.json").write_text("of an earlier run")
    done = subprocess.run(
        ["bash", str(SCRIPT), str(tmp_path), "launches"],
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert result_of(done, "launches") == "FAILED"
    assert not (tmp_path / "launches.json").exists()
    log = (tmp_path / "log.txt").read_text()
    assert "only a GPU has launches to count" in log
    assert f"torch {torch.__version__}" in log


# ---- a module that is there already


class FakeNative:
    """A compiled module that serves a GPU, or says why not."""

    __file__ = _native.C.__file__
    served = ("cuda", "")

    def service_of(self, device):
        assert device == "cuda:0"
        return self.served


@pytest.fixture
def fitting(monkeypatch):
    """As on a GPU machine with a module of these sources; returns the facts of its build."""
    setup = module.load_setup()
    facts = {"native": True, "sources": setup.fingerprint()}
    facts["module"] = setup.digest([Path(_native.C.__file__)])
    monkeypatch.setattr(_native, "C", FakeNative())
    monkeypatch.setattr(_native, "build_info", lambda: facts)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module, "why_wrong", lambda device: "")
    return facts


def test_a_module_of_these_sources_that_works_is_used(fitting):
    assert module.why_not() == ""


def no_module(facts, monkeypatch):
    monkeypatch.setattr(_native, "C", None)
    monkeypatch.setattr(_native, "why_not", "built with another torch")


def of_other_sources(facts, monkeypatch):
    facts["sources"] = "0" * 16


def of_unknown_sources(facts, monkeypatch):
    del facts["sources"]


def facts_of_another(facts, monkeypatch):
    facts["module"] = "0" * 16


def without_a_gpu(facts, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def without_kernels(facts, monkeypatch):
    monkeypatch.setattr(FakeNative, "served", ("foreach", "no kernels for sm_75"))


def that_is_wrong(facts, monkeypatch):
    monkeypatch.setattr(module, "why_wrong", lambda device: "an update gives wrong values")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (no_module, "built with another torch"),
        (of_other_sources, "it was built from other sources than those here"),
        (of_unknown_sources, "or doesn't say from which"),
        (facts_of_another, "_build_info.json tells of another module"),
        (without_a_gpu, "torch sees no CUDA GPU"),
        (without_kernels, "no kernels for sm_75"),
        (that_is_wrong, "an update gives wrong values"),
    ],
)
def test_another_module_is_refused(change, reason, fitting, monkeypatch):
    change(fitting, monkeypatch)
    assert reason in module.why_not()


@pytest.mark.parametrize(("reason", "status"), [("", 0), ("it is of yesterday", 1)])
def test_the_module_command_tells_by_its_status(reason, status, monkeypatch, capsys):
    monkeypatch.setattr(module, "why_not", lambda: reason)
    assert module.main() == status
    assert capsys.readouterr().out.startswith(
        f"module: not usable, {reason}" if reason else "module: of these sources, built with torch"
    )


def test_wrong_values_and_failing_updates_are_seen(monkeypatch):
    assert module.why_wrong(torch.device("cpu")) == ""

    def fail(*_):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(fused_ema, "update_", lambda *_: None)
    assert module.why_wrong(torch.device("cpu")) == "an update gives wrong values"
    monkeypatch.setattr(fused_ema, "update_", fail)
    assert module.why_wrong(torch.device("cpu")) == "an update fails: no kernel image"


def test_a_source_that_changes_is_another_build(tmp_path):
    for name in ("setup.py", "csrc"):
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, tmp_path / name)
    setup = module.load_setup()
    was = setup.fingerprint()
    setup.ROOT, setup.CSRC = tmp_path, tmp_path / "csrc"
    assert setup.fingerprint() == was
    for name in ("csrc/tiles.h", "csrc/cuda/loop.cuh", "setup.py"):
        path = tmp_path / name
        kept = path.read_bytes()
        path.write_bytes(kept + b"\n")
        assert setup.fingerprint() != was, name
        path.write_bytes(kept)


@pytest.mark.cuda
def test_the_module_in_use_may_be_measured():
    assert module.why_not() == ""
