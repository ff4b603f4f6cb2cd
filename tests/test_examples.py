"""The examples run, as they say they do."""

from __future__ import annotations

import contextlib
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.utils._pytree import tree_flatten_with_path

from fused_ema import state
from fused_ema.testing import assert_bits_equal

ROOT = Path(__file__).parents[1]
FSDP2 = ROOT / "examples" / "fsdp2.py"
TRAIN = runpy.run_path(str(FSDP2))["train"]


def trained(folder, steps):
    """Runs the example's training on the ranks of a test; keeps what it prints."""
    said = f"{folder}/said" if dist.get_rank() == 0 else os.devnull
    with open(said, "w") as file, contextlib.redirect_stdout(file):
        TRAIN(Path(folder), steps, 2, torch.device("cpu"))


def on(ranks, folder, steps):
    ranks(trained, str(folder), steps)
    lines = (folder / "said").read_text().splitlines()
    return [[float(n) for n in re.findall(r"[\d.]+", line)] for line in lines]


def content(folder, tmp_path):
    dcp_to_torch_save(folder, tmp_path / "whole.pt")
    return torch.load(tmp_path / "whole.pt", weights_only=True)


def killed_after(line, folder):
    """Starts the example with torchrun; kills its processes once it has printed the line."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", "2", str(FSDP2), "--folder", str(folder)]
    run = subprocess.Popen(
        [*command, "--steps", "1000", "--save-every", "2"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert any(said.startswith(line) for said in run.stdout), "it ended before"
    finally:
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        for pid in (run.pid, *map(int, children)):  # Torchrun first, or it starts them again.
            os.kill(pid, signal.SIGKILL)
        run.communicate()


def test_posthoc_finds_a_length_and_leaves_its_average(tmp_path, monkeypatch, capsys):
    example = runpy.run_path(str(ROOT / "examples" / "posthoc.py"))
    monkeypatch.setattr(sys, "argv", ["posthoc.py", "--folder", str(tmp_path)])
    example["main"]()
    raw, *widths, best = capsys.readouterr().out.splitlines()
    losses = {float(std): float(x) for line in widths for std, x in [line.split()[1:4:2]]}
    assert list(losses) == list(example["WIDTHS"])
    chosen = float(re.search(r"best: std ([\d.]+),", best)[1])
    assert losses[chosen] == min(losses.values()) < 0.6 * float(raw.split()[-1])
    model = example["make_model"]()
    model.load_state_dict(state.read(tmp_path / "best.safetensors").ema)
    assert example["loss_of"](model) == pytest.approx(losses[chosen], abs=6e-5)


def test_the_best_of_several_averages_is_taken(one_thread):
    example = runpy.run_path(str(ROOT / "examples" / "several_averages.py"))
    model, losses = example["train"](steps=300)
    assert list(losses) == ["raw", *example["AVERAGES"]]
    best = min(losses.values())
    assert best < 0.7 * losses["raw"]
    assert example["loss_of"](model) == best


@pytest.fixture
def two():
    ranks = Ranks(2)
    yield ranks
    ranks.stop()


@pytest.fixture
def three():
    ranks = Ranks(3)
    yield ranks
    ranks.stop()


def test_fsdp2_killed_and_resumed_on_as_many_processes_or_more(two, three, tmp_path):
    killed = tmp_path / "killed"
    killed_after("step 4", killed)
    (killed / "998").mkdir(exist_ok=True)  # As of a save that was killed.
    steps = max(int(path.parent.name) for path in killed.glob("*/.metadata")) + 4
    whole = tmp_path / "whole"
    whole.mkdir()
    said = on(two, whole, steps)
    assert [step for step, *_ in said] == list(range(2, steps + 1, 2))
    last = [
        [step, pytest.approx(loss, abs=2e-4), pytest.approx(averaged, abs=2e-4)]
        for step, loss, averaged in said[-2:]
    ]
    # Three processes add gradients up in another order.
    assert on(three, shutil.copytree(killed, tmp_path / "three"), steps) == last
    assert on(two, killed, steps) == said[-2:]
    state, resumed = (content(folder / str(steps), tmp_path) for folder in (whole, killed))
    assert state["ema"]["iteration"] == state["ema"]["num_updates"] == steps
    expected, actual = (dict(tree_flatten_with_path(one)[0]) for one in (state, resumed))
    assert actual.keys() == expected.keys()
    for path, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert_bits_equal(actual[path], value, str(path))
        else:
            assert actual[path] == value, path


def test_a_mean_teacher_adds_to_what_the_labels_teach(one_thread):
    train = runpy.run_path(str(ROOT / "examples" / "teacher.py"))["train"]
    alone, _ = train(weight=0)
    student, teacher = train()
    assert 0.7 < alone < min(student, teacher)


@pytest.mark.parametrize("is_hard", [False, True], ids=["averaged", "copied"])
def test_a_target_network_leads_to_the_end_of_the_corridor(is_hard, one_thread):
    train = runpy.run_path(str(ROOT / "examples" / "target_network.py"))["train"]
    assert train(steps=0, is_hard=is_hard) < 0
    # The shortest walks have 4 steps on the average, each of which costs 0.01.
    assert train(is_hard=is_hard) == pytest.approx(0.96, abs=0.02)


def test_a_step_that_is_captured_where_it_can_be(device, one_thread):
    train = runpy.run_path(str(ROOT / "examples" / "captured.py"))["train"]
    loss, averaged, ema = train(torch.device(device), steps=80)
    assert averaged < loss
    # The first scale is too high for 16 bits, and so a GPU skips a step or two.
    assert 76 <= ema.num_updates == ema.iteration <= 80
