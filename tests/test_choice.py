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

# Of each call its size, the pause before it, and the nanoseconds that it takes alone and shared;
# says which it was.
PROGRAM = """
#include <cstdio>
#include "choice.h"
int main() {
  long size, pause, alone, shared, now = 0;
  while (std::scanf("%ld %ld %ld %ld", &size, &pause, &alone, &shared) == 4) {
    auto& entry = fused_ema::Choices::of_this_thread().of({1, size});
    fused_ema::Choice& choice = entry.at(now += pause, false);
    const bool is_alone = choice.is_alone();
    std::putchar(is_alone ? 'a' : 's');
    entry.last_end = now += is_alone ? alone : shared;
    is_alone ? choice.was_alone(alone) : choice.was_shared(shared);
  }
}
"""


@pytest.fixture(scope="module")
def decided(tmp_path_factory):
    folder = tmp_path_factory.mktemp("choice")
    (folder / "main.cpp").write_text(PROGRAM)
    csrc = Path(__file__).parents[1] / "csrc"
    command = [CXX, "-std=c++20", "-Wall", "-Werror", f"-I{csrc}", "main.cpp", "-o", "main"]
    subprocess.run(command, cwd=folder, check=True)

    def run(calls):
        # Of (alone, shared), or (size, pause, alone, shared).
        text = "\n".join(" ".join(map(str, (1, 0, *call)[-4:])) for call in calls)
        done = subprocess.run([folder / "main"], input=text, capture_output=True, text=True)
        assert len(done.stdout) == len(calls)
        return done.stdout

    return run


def test_what_wins_is_shared_and_one_call_in_128_alone(decided):
    found = decided([(200, 120)] * 12_800)
    alone = [i for i, way in enumerate(found) if way == "a"]
    # Soon some, so that a few calls tell of one thread's median and p90.
    assert alone[:7] == [1, 5, 13, 29, 61, 125, 253]
    assert {b - a for a, b in pairwise(alone[6:])} == {128}


def test_what_loses_is_made_alone_and_tried_ever_less(decided):
    found = decided([(200, 900)] * 20_000)
    losses = [i for i, way in enumerate(found) if way == "s"]
    # 8 ** n - 1 calls alone after the n-th loss, 255 at the most; and what is asked in between.
    gaps = [b - a - 1 for a, b in pairwise(losses[1:])]
    assert gaps[0] in (7, 8)
    assert gaps[1] in (63, 64)
    assert set(gaps[2:]) <= {255, 256}


def test_what_gains_nothing_is_made_alone(decided):
    found = decided([(200, 205)] * 20_000)
    assert found[:200].count("s") < 70
    assert found[10_000:].count("s") < 200


def test_a_loss_now_and_then_costs_seven_calls(decided):
    calls = [(200, 9000 if i % 100 == 50 else 120) for i in range(10_000)]
    assert decided(calls).count("a") < 10_000 // 128 + 7 * 100 + 8


def test_one_loss_in_eight_is_too_many_for_a_p90(decided):
    draw = random.Random(0)
    calls = [(200, 9000 if draw.random() < 0.125 else 120) for _ in range(40_000)]
    assert decided(calls)[20_000:].count("s") < 1_000


def test_it_comes_back_to_sharing_when_the_load_is_gone(decided):
    found = decided([(2000, 9000)] * 5_000 + [(200, 120)] * 5_000)
    assert found[2_000:5_000].count("s") < 3_000 // 256 + 3
    assert found[7_000:].count("a") < 3_000 // 128 + 2


def test_beside_calls_alone_that_vary_as_much_shared_ones_go_on(decided):
    # One in six of either takes a time slice longer: the p90 of sharing is no worse.
    draw = random.Random(0)
    slices = [9000 * (draw.random() < 1 / 6) for _ in range(40_000)]
    found = decided([(200 + late, 120 + late) for late in slices])
    assert found[20_000:].count("s") > 10_000


def test_a_call_alone_that_was_held_up_does_not_hide_losses(decided):
    # Every tenth call alone takes fifty times as long: the median is what shared ones lose against.
    calls = [(10_000 if i % 10 == 0 else 200, 400) for i in range(10_000)]
    assert decided(calls)[5_000:].count("s") < 5_000 // 256 + 3


def test_lists_of_other_sizes_are_learnt_apart(decided):
    # Each takes a time of its own, and every other one loses by sharing.
    calls = [(size, 0, 100 * size, (90 if size % 2 else 900) * size) for size in range(1, 31)]
    found = decided(calls * 400)[6_000:]
    assert found[0::2].count("a") <= 15 * 2  # each once in 128 of its 200 calls
    assert found[1::2].count("s") < 3_000 // 20


def test_what_follows_a_pause_is_learnt_apart(decided):
    # After 20 ms sharing loses, right after a call it wins: one doesn't hide the other.
    calls = [(1, 20_000_000, 500, 9_000)] + [(1, 0, 200, 120)] * 3
    found = decided(calls * 1_000)
    assert found[0::4].count("s") < 20
    assert sum(found[i::4].count("a") for i in (1, 2, 3)) < 3_000 // 128 + 8


def test_what_is_longest_unused_is_forgotten(decided):
    # 1,000 sizes once each, and one list in between that goes on being alone.
    calls = []
    for size in range(1_000):
        calls += [(10**6, 0, 200, 9_000), (size, 0, 200, 120)]
    found = decided(calls)
    assert found[0::2].count("s") < 20
    assert set(found[1::2]) == {"s"}
