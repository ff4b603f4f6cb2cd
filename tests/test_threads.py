"""CPU lists shared among threads, torch's or helpers of our own: one thread's bits, and forks."""

from __future__ import annotations

import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from processes import Fork, in_a_process, run_threads
from runs import torch_update_

import fused_ema
from fused_ema import _native
from fused_ema.testing import assert_bits_equal

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and fork")

WAYS = ("auto", "torch", "helpers")
# Enough tensors that the look at them is shared too, and elements for many chunks.
SHAPES = [(64,)] * 700 + [(700, 301), (33_000,), (1,)]
TASKS = Path("/proc/self/task")


@contextmanager
def sharing(way, num_threads):
    """Lists are shared in this way inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    assert _native.C.set_sharing(way)
    try:
        yield
    finally:
        _native.C.set_sharing("auto")
        torch.set_num_threads(before)


def lists(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES] for _ in range(2)
    )


def helpers():
    """Tasks of this process that are ours."""
    return [task for task in TASKS.iterdir() if (task / "comm").read_text() == "fused_ema\n"]


def work_of(helper):
    """Nanoseconds that it ran."""
    return int((helper / "schedstat").read_text().split()[0])


def test_an_unknown_way_is_refused():
    assert not _native.C.set_sharing("both")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("dtype", "form"), [(torch.float32, "lerp"), (torch.bfloat16, "mul_add")], ids=str
)
def test_every_way_gives_torch_s_bits(way, dtype, form):
    ema, params = lists(dtype)
    expected, _ = lists(dtype)
    plan = fused_ema.Plan(ema, params)
    # bf16's mul_add depends on how many threads torch has, so that is changed in between.
    for num_threads in (2, 3, 1, 4, 2):
        with sharing(way, num_threads):
            plan.update(0.25, form=form)
            for e, p in zip(expected, params, strict=True):
                torch_update_(e, p, 0.25, form)
    for e, right in zip(ema, expected, strict=True):
        assert_bits_equal(e, right)
    with sharing(way, 3):
        plan.swap()
        plan.copy_to_ema()
    for e, p, right in zip(ema, params, expected, strict=True):
        assert_bits_equal(p, right)
        assert_bits_equal(e, right)


def helpers_at_work():
    large = [torch.zeros(2**21) for _ in range(2)]
    plan = fused_ema.Plan(large[:1], large[1:])
    _native.C.set_sharing("helpers")
    torch.set_num_threads(1)
    plan.update(0.5)
    assert not helpers()
    torch.set_num_threads(3)
    for _ in range(2000):
        plan.update(0.5)
        if len(helpers()) == 2 and all(work_of(helper) > 10**6 for helper in helpers()):
            break
    assert len(helpers()) == 2, "a helper has done nothing"
    assert all(work_of(helper) > 10**6 for helper in helpers())
    for helper in helpers():
        blocked = int((helper / "status").read_text().split("SigBlk:")[1].split()[0], 16)
        assert blocked & 0b10, "SIGINT would interrupt a helper, and not Python's wait"
    # Asleep between the calls.
    time.sleep(0.05)
    before = [work_of(helper) for helper in helpers()]
    time.sleep(0.1)
    assert [work_of(helper) for helper in helpers()] == before
    torch.set_num_threads(1)
    for _ in range(50):
        plan.update(0.5)
    assert [work_of(helper) for helper in helpers()] == before


def test_helpers_work_as_many_as_torch_has_threads_and_sleep_between():
    assert in_a_process(helpers_at_work) == "None"


def test_helpers_round_and_flush_as_the_caller_does():
    # 1e-39 is subnormal: flushed to zero where the caller flushes, in every chunk.
    ema, params = [torch.full((2**20,), 1e-39)], [torch.full((2**20,), 1e-39)]
    plan = fused_ema.Plan(ema, params)
    with sharing("helpers", 3):
        plan.update(0.5)
        assert ema[0].eq(1e-39).all()
        if not torch.set_flush_denormal(True):
            pytest.skip("this processor can't flush")
        try:
            for _ in range(20):
                ema[0].fill_(1.0).mul_(2.0**-125)
                params[0].fill_(0.0)
                plan.update(0.75)  # 2**-127
        finally:
            torch.set_flush_denormal(False)
    assert ema[0].eq(0).all()


@pytest.mark.parametrize("way", WAYS)
def test_many_threads_at_once_each_with_its_own_lists(way):
    params = [torch.randn(n) for n in (70_000, 3, 40_000)]
    emas = [[torch.zeros_like(p) for p in params] for _ in range(6)]

    def work(index):
        plan = fused_ema.Plan(emas[index], params)
        for number in range(40):
            if number % 10 == index:
                torch.set_num_threads(2 + number % 3)
            plan.update(0.1 * (index + 1))

    with sharing(way, 3):
        run_threads(*(lambda index=index: work(index) for index in range(6)))
    for index, ema in enumerate(emas):
        for e, p in zip(ema, params, strict=True):
            expected = torch.zeros_like(p)
            for _ in range(40):
                expected.lerp_(p, 0.1 * (index + 1))
            assert_bits_equal(e, expected)


def forks(way):
    """Updates hot here and in another thread; forks meanwhile, whose updates are right too."""
    torch.set_num_threads(3)
    _native.C.set_sharing(way)
    ema, params = lists()
    plan = fused_ema.Plan(ema, params)
    for _ in range(50):
        plan.update(0.25)
    others = lists(seed=1)
    others_plan = fused_ema.Plan(*others)
    done = threading.Event()

    def average():
        while not done.is_set():
            others_plan.update(0.25)

    def in_the_fork():
        now = [e.clone() for e in ema]  # torch's own parallel work would hang here
        torch.set_num_threads(3)
        _native.C.set_sharing("auto" if way == "torch" else way)
        for _ in range(8):
            plan.update(0.25)
        others_plan.copy_to_ema()
        torch.set_num_threads(1)
        for e, p in zip(now, params, strict=True):
            for _ in range(8):
                e.lerp_(p, 0.25)
        for new, right in zip((*ema, *others[0]), (*now, *others[1]), strict=True):
            assert_bits_equal(new, right)

    thread = threading.Thread(target=average)
    thread.start()
    found = []
    for _ in range(2):
        time.sleep(0.01)
        plan.update(0.25)
        found.append(Fork(in_the_fork, seconds=40))
    done.set()
    thread.join()
    return " ".join(fork.outcome() for fork in found)


@pytest.mark.parametrize("way", WAYS)
def test_a_fork_amid_shared_work_has_threads_of_its_own(way):
    assert in_a_process(forks, way) == "None None"
