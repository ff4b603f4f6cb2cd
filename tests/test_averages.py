"""Several averages of the same params in one plan or one call: each as if it were alone."""

from __future__ import annotations

import pytest
import torch
from runs import torch_update_

import fused_ema
from fused_ema import EMAManager, Plan
from fused_ema.testing import DTYPE_PAIRS, EDGE_SIZES, LAYOUTS, assert_bits_equal, make_lists

F32 = (torch.float32, torch.float32)
FORMS = ("lerp", "mul_add", "two_products")
MOMENTA = (0.3, 2e-4, 0.75, 0.5, 0.01, 0.9)
COUNTS = (1, 2, 3, 4, 5, 6)  # Four to a launch: what is left over is none, one or two.


def averages(sizes, pair, count, layout="contiguous", device="cpu"):
    """So many lists of emas, and one of params."""
    lists = [make_lists(sizes, pair, layout, device, seed=k) for k in range(count)]
    return [ema for ema, _ in lists], lists[0][1]


def expected(emas, params, momenta, form):
    """Torch's own operations, for one average after the other."""
    wanted = [[e.clone(memory_format=torch.preserve_format) for e in ema] for ema in emas]
    for ema, momentum in zip(wanted, momenta, strict=False):
        for e, p in zip(ema, params, strict=True):
            torch_update_(e, p, momentum, form)
    return wanted


def assert_averages(emas, wanted, what=""):
    for k, (ema, want) in enumerate(zip(emas, wanted, strict=True)):
        for e, w in zip(ema, want, strict=True):
            assert_bits_equal(e, w, f"average {k} of {len(emas)}, {e.numel()} elements {what}")


RUNNERS = {
    "one-shot": lambda emas, params, m, form: fused_ema.update_(emas, params, m, form),
    "plan": lambda emas, params, m, form: Plan(emas, params).update(m, form),
    "op": lambda emas, params, m, form: torch.ops.fused_ema.update_averages_(
        [e for ema in emas for e in ema], params, list(m), form
    ),
}


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pair", DTYPE_PAIRS, ids=str)
@pytest.mark.filterwarnings("ignore:.*momentum is 0.9.*")
def test_each_average_equals_torch_bit_for_bit(backend, device, pair, form, runner):
    if runner == "op" and backend == "foreach":
        pytest.skip("its schema is defined once, with the kernels")
    for count in COUNTS if form == "lerp" else (3, 5):
        emas, params = averages(EDGE_SIZES, pair, count, device=device)
        kept = [p.clone() for p in params]
        wanted = expected(emas, params, MOMENTA, form)
        RUNNERS[runner](emas, params, MOMENTA[:count], form)
        assert_averages(emas, wanted)
        assert_averages([params], [kept], "of the params")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pair", [DTYPE_PAIRS[0], DTYPE_PAIRS[1], DTYPE_PAIRS[4]], ids=str)
def test_every_layout(device, pair, layout):
    sizes = [n for n in EDGE_SIZES if n > 0]
    lists = [make_lists(sizes, pair, layout, device, seed=k) for k in range(3)]
    emas, params = [ema for ema, _ in lists], lists[0][1]
    again = [make_lists(sizes, pair, layout, device, seed=k)[0] for k in range(3)]
    for ema, momentum in zip(again, MOMENTA, strict=False):
        for e, p in zip(ema, params, strict=True):
            torch_update_(e, p, momentum, "lerp")
    Plan(emas, params).update(MOMENTA[:3])
    assert_averages(emas, again, layout)


@pytest.mark.parametrize("misaligned", [0, 1, 2])
def test_one_average_lies_otherwise_than_the_others(device, misaligned):
    emas, params = averages((1, 511, 5000, 40_000), F32, 3, device=device)
    emas[misaligned] = [
        torch.empty(e.numel() + 1, device=device)[1:].copy_(e.flatten()) for e in emas[misaligned]
    ]
    params = [p.flatten() for p in params]
    wanted = expected(emas, params, MOMENTA, "lerp")
    Plan(emas, params).update(MOMENTA[:3])
    assert_averages(emas, wanted)


def test_lists_of_mixed_dtypes_and_strides(backend, device):
    emas, params = [[], []], []
    for pair in DTYPE_PAIRS:
        for layout in ("contiguous", "with gaps"):
            its, more = averages((7, 300), pair, 2, layout, device)
            for ema, other in zip(emas, its, strict=True):
                ema += other
            params += more
    plan = Plan(emas, params)
    kept = [[e.clone() for e in ema] for ema in emas]
    for ema, momentum in zip(kept, MOMENTA, strict=False):
        for e, p in zip(ema, params, strict=True):
            torch_update_(e, p, momentum, "two_products")
    plan.update(MOMENTA[:2], "two_products")
    assert_averages(emas, kept)
    assert len(plan) == len(params)
    assert {d["num_averages"] for d in plan.describe()} == {2}
    assert "2 averages of" in repr(plan)


@pytest.mark.parametrize("count", [3, 5])
def test_a_momentum_in_memory(device, count):
    emas, params = averages((5, 1000, 40_000), F32, count, device=device)
    wanted = expected(emas, params, MOMENTA, "lerp")
    Plan(emas, params).update(torch.tensor(MOMENTA[:count], dtype=torch.float64, device=device))
    assert_averages(emas, wanted)


@pytest.mark.parametrize("pair", [DTYPE_PAIRS[0], DTYPE_PAIRS[1]], ids=str)
@pytest.mark.parametrize("index", [0, 1, 2])
def test_swaps_and_copies_are_about_one(backend, device, pair, index):
    emas, params = averages((0, 5, 1000, 40_000), pair, 3, device=device)
    plan = Plan(emas, params)
    was = [[t.clone() for t in ts] for ts in (*emas, params)]

    def assert_state(index_holds, params_hold):
        wanted = [*was[:3]]
        wanted[index] = [t.to(pair[0]) for t in index_holds]
        assert_averages(emas, wanted)
        assert_averages([params], [[t.to(pair[1]) for t in params_hold]], "of the params")

    plan.swap(index)
    assert_state([p.to(pair[0]) for p in was[3]], was[index])
    plan.copy_to_ema(index)
    rounded = [e.to(pair[1]) for e in was[index]]
    assert_state(rounded, rounded)
    for p, value in zip(params, was[3], strict=True):
        p.copy_(value)
    plan.copy_to_ema(index)
    assert_state(was[3], was[3])
    for e, value in zip(emas[index], was[index], strict=True):
        e.copy_(value)
    plan.copy_to_params(index)
    assert_state(was[index], was[index])


def test_only_what_is_written_counts_as_written(backend):
    emas, params = averages((5, 7), F32, 2)
    plan = Plan(emas, params)

    def versions():
        return [[t._version for t in ts] for ts in (*emas, params)]

    before = versions()
    plan.update([0.1, 0.2])
    assert versions() == [[v + 1 for v in before[0]], [v + 1 for v in before[1]], before[2]]
    before = versions()
    plan.copy_to_ema(1)
    assert [a == b for a, b in zip(before, versions(), strict=True)] == [True, False, True]
    before = versions()
    plan.swap(0)
    assert [a == b for a, b in zip(before, versions(), strict=True)] == [False, True, False]


def test_a_tensor_that_moved_is_noticed(backend, device):
    emas, params = averages((6, 6), F32, 3, device=device)
    plan = Plan(emas, params)
    plan.update([0.1, 0.2, 0.3])
    left = emas[2][1].data
    kept = left.clone()
    emas[2][1].data = emas[2][1].data.clone()
    wanted = expected(emas, params, MOMENTA, "lerp")
    plan.update(MOMENTA[:3])
    assert_averages(emas, wanted)
    assert_bits_equal(left, kept, "the memory that the ema left")


def test_objects_that_torch_exchanges_are_noticed():
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        emas, params = averages((6, 6), F32, 2)
        plan = Plan(emas, params)
        torch.utils.swap_tensors(emas[1][0], torch.full_like(emas[1][0], 5.0))
        wanted = expected(emas, params, MOMENTA, "lerp")
        plan.update(MOMENTA[:2])
        assert_averages(emas, wanted)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.cuda
def test_a_captured_graph_replays_with_the_momenta_in_memory():
    emas, params = averages((5, 1000, 40_000), F32, 5, device="cuda")
    momenta = torch.tensor(MOMENTA[:5], dtype=torch.float64, device="cuda")
    plan = Plan(emas, params)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan.update(momenta)
        fused_ema.update_(emas, params, momenta)
    for step in range(3):
        momenta.copy_(torch.tensor(MOMENTA[1:6]) * (1 - 0.1 * step))
        wanted = emas
        for _ in range(2):
            wanted = expected(wanted, params, momenta.tolist(), "lerp")
        graph.replay()
        assert_averages(emas, wanted)


def test_compiled_and_checked_by_torch():
    emas, params = averages((6, 20), F32, 2)
    flat = [e for ema in emas for e in ema]
    torch.library.opcheck(torch.ops.fused_ema.update_averages_.default, (flat, params, [0.1, 0.2]))
    momenta = torch.tensor([0.1, 0.2], dtype=torch.float64)
    torch.library.opcheck(torch.ops.fused_ema.update_averages_.tensor, (flat, params, momenta))
    wanted = expected(emas, params, MOMENTA, "lerp")
    call = torch.compile(fused_ema.update_, backend="aot_eager", fullgraph=True)
    call(emas, params, MOMENTA[:2])
    assert_averages(emas, wanted)


def zeros(*sizes, dtype=torch.float32):
    return [torch.zeros(n, dtype=dtype) for n in sizes]


BAD = {
    "a list that is too short": (
        lambda: Plan([zeros(2), []], zeros(2)),
        ValueError,
        r"ema\[1\] holds 0 tensors but params holds 1",
    ),
    "no tensor": (lambda: Plan([zeros(2), [3]], zeros(2)), TypeError, r"ema\[1\]\[0\] is a int"),
    "no list": (lambda: Plan([zeros(2), 3], zeros(2)), TypeError, r"ema\[1\] is a int"),
    "another shape": (
        lambda: Plan([zeros(2), zeros(3)], zeros(2), ["w"]),
        ValueError,
        r"ema\[1\]\[0\] \('w'\) has shape \[3\] but params\[0\] \('w'\) has shape \[2\]",
    ),
    "another dtype": (
        lambda: Plan([zeros(2), zeros(2, dtype=torch.bfloat16)], zeros(2, dtype=torch.bfloat16)),
        TypeError,
        r"ema\[0\]\[0\] is torch.float32 and ema\[1\]\[0\] is torch.bfloat16; pass averages of one",
    ),
    "one list twice": (
        lambda: Plan([(one := zeros(2)), one], zeros(2)),
        ValueError,
        r"ema\[0\]\[0\] and ema\[1\]\[0\] share memory",
    ),
    "an ema that is a param": (
        lambda: Plan([zeros(2), (one := zeros(2))], one),
        ValueError,
        r"ema\[1\]\[0\] and params\[0\] share memory",
    ),
    "one momentum": (
        lambda: Plan([zeros(2), zeros(2)], zeros(2)).update(0.1),
        TypeError,
        "momentum is a float for 2 averages",
    ),
    "momenta of another count": (
        lambda: Plan([zeros(2), zeros(2)], zeros(2)).update([0.1]),
        ValueError,
        "1 momenta for 2 averages",
    ),
    "a momentum above 1": (
        lambda: fused_ema.update_([zeros(2), zeros(2)], zeros(2), [0.1, 1.5]),
        ValueError,
        "momentum is 1.5",
    ),
    "a tensor of another length": (
        lambda: Plan([zeros(2), zeros(2)], zeros(2)).update(torch.zeros(3, dtype=torch.float64)),
        TypeError,
        r"shape \[3\] for 2 averages",
    ),
    "no such average": (
        lambda: Plan([zeros(2), zeros(2)], zeros(2)).swap(2),
        IndexError,
        "index is 2 and the plan has 2 average",
    ),
    "a list of momenta for one average": (
        lambda: Plan(zeros(2), zeros(2)).update([0.1]),
        TypeError,
        "momentum is a list",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(backend, what):
    call, error, message = BAD[what]
    with pytest.raises(error, match=message):
        call()


def test_a_manager_reads_the_params_once_for_all_its_averages():
    model = torch.nn.Linear(4, 3)
    ema = EMAManager(model, momentum={"fast": 0.1, "slow": 0.01, "slower": 0.001})
    (fact,) = ema._tracked.plan.describe()
    assert (fact["num_averages"], fact["num_tensors"]) == (3, 2)
