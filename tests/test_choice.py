"""csrc/choice.h: when a call on the CPU is made by one thread, of calls that take given times."""

from __future__ import annotations

import random
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

CXX = shutil.which("c++") or shutil.which("g++")
pytestmark = pytest.mark.skipif(CXX is None, reason="needs a C++ compiler")

# Of each call, the nanoseconds that it takes alone and shared; says which it was.
PROGRAM = """
#include <cstdio>
#include "choice.h"
int main() {
  fused_ema::Choice choice;
  long alone, shared;
  while (std::scanf("%ld %ld", &alone, &shared) == 2) {
    const bool is_alone = choice.is_alone();
    std::putchar(is_alone ? 'a' : 's');
    is_alone ? choice.was_alone(alone) : choice.was_shared(shared);
  }
}
"""


@pytest.fixture(scope="module")
def decided(tmp_path_factory):
    folder = tmp_path_factory.mktemp("choice")
    (folder / "main.cpp").write_text(PROGRAM)
    csrc = Path(__file__).parents[1] / "csrc"
    command = [CXX, "-std=c++20", f"-I{csrc}", "main.cpp", "-o", "main"]
    subprocess.run(command, cwd=folder, check=True)

    def run(calls):
        text = "\n".join(f"{alone} {shared}" for alone, shared in calls)
        done = subprocess.run([folder / "main"], input=text, capture_output=True, text=True)
        assert len(done.stdout) == len(calls)
        return done.stdout

    return run


def test_what_wins_is_shared_and_one_call_in_128_alone(decided):
    found = decided([(200, 120)] * 12_800)
    assert found[:3] == "sas"
    assert found.count("a") == 12_800 // 128


def test_what_loses_is_made_alone_and_tried_ever_less(decided):
    found = decided([(200, 900)] * 20_000)
    losses = [i for i, way in enumerate(found) if way == "s"]
    # 2 ** (12 * n // 8) - 1 calls alone after the n-th loss, 1023 at the most.
    gaps = [b - a - 1 for a, b in pairwise(losses[1:])]
    assert gaps[:7] == [1, 7, 15, 63, 127, 511, 1023]
    assert set(gaps[7:]) == {1023}


def test_a_loss_now_and_then_costs_a_call_or_two(decided):
    calls = [(200, 9000 if i % 100 == 50 else 120) for i in range(10_000)]
    assert decided(calls).count("a") < 10_000 // 128 + 2 * 100 + 2


def test_one_loss_in_eight_is_too_many_for_a_p90(decided):
    draw = random.Random(0)
    calls = [(200, 9000 if draw.random() < 0.125 else 120) for _ in range(40_000)]
    assert decided(calls)[20_000:].count("s") < 1_000


def test_it_comes_back_to_sharing_when_the_load_is_gone(decided):
    found = decided([(2000, 9000)] * 5_000 + [(200, 120)] * 5_000)
    assert found[2_000:5_000].count("s") < 5
    assert found[7_000:].count("a") < 3_000 // 128 + 2


def test_a_call_alone_that_was_held_up_does_not_hide_losses(decided):
    # Every tenth call alone takes fifty times as long: the median is what shared ones lose against.
    calls = [(10_000 if i % 10 == 0 else 200, 400) for i in range(10_000)]
    assert decided(calls)[5_000:].count("s") < 20
