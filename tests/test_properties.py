"""What holds of the operations and of plans for any lists; hypothesis draws the lists."""

from __future__ import annotations

import itertools
import math
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import examples, instruction_sets, torch_update_, without_kernels

import fused_ema
from fused_ema import _native
from fused_ema._foreach import FORMS
from fused_ema.testing import (
    DTYPE_PAIRS,
    bits_of,
    reference_update,
    update_tolerance,
)

# ---- who computes


# The kernels of each instruction set, on one thread and on two, and torch's functions as they serve
# where nothing was compiled.
WITHOUT_KERNELS = ("foreach", 2)
WITH_KERNELS = tuple(itertools.product(instruction_sets(), (2, 1)))
COMPUTERS = (*WITH_KERNELS, WITHOUT_KERNELS)


@contextmanager
def computed_by(computer):
    # No fixture: that would be set up once for all examples of a property.
    name, num_threads = computer
    with ExitStack() as restored:
        restored.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(num_threads)
        if computer == WITHOUT_KERNELS:
            restored.enter_context(without_kernels())
        else:
            restored.callback(_native.C.set_instruction_set, _native.C.instruction_set())
            assert _native.C.set_instruction_set(name)
        yield


# ---- tensors, as drawn and in memory


@dataclass(frozen=True)
class Layout:
    """Dimensions from the outermost to the innermost, what each one steps over, the first place."""

    order: tuple[int, ...]
    steps: tuple[int, ...]
    offset: int

    def strides(self, shape):
        strides, room = [0] * len(shape), 1
        for dim in reversed(self.order):
            strides[dim] = room * self.steps[dim]
            room = strides[dim] * max(shape[dim], 1)
        return strides

    def extent(self, shape):
        last = sum((n - 1) * s for n, s in zip(shape, self.strides(shape), strict=True))
        return 0 if 0 in shape else last + 1


@dataclass(frozen=True)
class Drawn:
    """A tensor by all that makes it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    layout: Layout
    values: str
    seed: int


INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def random_bits(size, dtype, generator):
    integers = INTEGERS[dtype.itemsize]
    limits = torch.iinfo(integers)
    bits = torch.randint(limits.min, limits.max, (size,), dtype=integers, generator=generator)
    return bits.view(dtype)


def special_values(dtype):
    """Of either sign: zero, one, infinity, NaNs with payloads, the ends of the (sub)normals."""
    infinity, normal, one = (
        int(bits_of(torch.tensor(value, dtype=dtype)))
        for value in (math.inf, torch.finfo(dtype).smallest_normal, 1.0)
    )
    quiet = infinity + normal // 2
    sizes = (0, 1, normal - 1, normal, one, one + 1, infinity - 1, infinity)
    sizes += (infinity + 1, quiet, quiet + 5)
    integers = INTEGERS[dtype.itemsize]
    signed = [*sizes, *(torch.iinfo(integers).min + size for size in sizes)]
    return torch.tensor(signed, dtype=integers).view(dtype)


def values_of(drawn):
    generator = torch.Generator().manual_seed(drawn.seed)
    size = math.prod(drawn.shape)
    normals = torch.randn(size, generator=generator, dtype=torch.float64).to(drawn.dtype)
    bits = random_bits(size, drawn.dtype, generator)
    table = special_values(drawn.dtype)
    specials = table[torch.randint(len(table), (size,), generator=generator)]
    kind = torch.randint(3, (size,), generator=generator)
    mixed = torch.where(kind == 0, bits, torch.where(kind == 1, specials, normals))
    values = {"normals": normals, "bits": bits, "specials": specials, "mixed": mixed}
    return values[drawn.values].view(drawn.shape)


class Memory:
    """Drawn tensors as views of larger storages, and which elements of those are theirs."""

    def __init__(self, drawn, together=False):
        # One storage for each tensor; or one for each dtype, as a manager keeps its emas.
        keys = [(one.dtype, 0 if together else index) for index, one in enumerate(drawn)]
        ends, starts = dict.fromkeys(keys, 0), []
        for one, key in zip(drawn, keys, strict=True):
            starts.append(ends[key] + one.layout.offset)
            ends[key] = starts[-1] + one.layout.extent(one.shape)
        generator = torch.Generator().manual_seed(len(drawn))
        self.rooms = {key: random_bits(end + 9, key[0], generator) for key, end in ends.items()}
        self.owned = {key: torch.zeros(end + 9, dtype=torch.bool) for key, end in ends.items()}
        self.views = []
        for one, key, start in zip(drawn, keys, starts, strict=True):
            geometry = one.shape, one.layout.strides(one.shape), start
            self.owned[key].as_strided(*geometry).fill_(True)
            self.views.append(self.rooms[key].as_strided(*geometry).copy_(values_of(one)))


class Lists:
    """Two drawn lists in memory. Made twice they are twins, one of which is the reference."""

    def __init__(self, drawn):
        self.memories = [Memory(side, drawn.together) for side in (drawn.ema, drawn.params)]
        self.ema, self.params = (memory.views for memory in self.memories)

    def move(self, index, ema, param):
        """Gives a pair other memory, and keeps the old in mind."""
        for tensors, drawn in ((self.ema, ema), (self.params, param)):
            if drawn is not None:
                self.memories.append(Memory([drawn]))
                tensors[index].data = self.memories[-1].views[0]

    def versions(self):
        return [t._version for t in self.ema], [t._version for t in self.params]


def assert_same(lists, twins, *, payloads=True):
    """The same bits in the tensors and around them; with payloads=False any NaNs are the same."""
    for memory, wanted in zip(lists.memories, twins.memories, strict=True):
        for key, room in memory.rooms.items():
            want = wanted.rooms[key]
            differs = bits_of(room) != bits_of(want)
            if not payloads:
                differs &= ~(memory.owned[key] & room.isnan() & want.isnan())
            if bool(differs.any()):
                first = int(differs.nonzero()[0])
                raise AssertionError(
                    f"{int(differs.sum())} elements differ, the first at {first} of the storage "
                    f"{key}: {room[first].item()!r} against {want[first].item()!r}, which "
                    f"{'is of a tensor' if memory.owned[key][first] else 'lies beside'}"
                )


@contextmanager
def writing(lists, *, ema=False, params=False):
    """What a call writes it marks as written, and nothing else."""
    before = lists.versions()
    yield
    sides = zip((lists.ema, lists.params), before, lists.versions(), (ema, params), strict=True)
    for tensors, old, new, written in sides:
        for tensor, was, now in zip(tensors, old, new, strict=True):
            if not written:
                assert now == was
            elif tensor.numel() > 0:
                assert now > was


# ---- strategies


@dataclass(frozen=True)
class DrawnLists:
    ema: tuple[Drawn, ...]
    params: tuple[Drawn, ...]
    together: bool


SIZES = {0: (1,), 1: (3, 1, 0, 17, 64, 100), 2: (3, 1, 0, 2, 16, 33), 3: (2, 3, 1, 8, 0)}
# Beyond a tile, and beyond the 32,768 elements from which torch and the kernels take two threads.
LONG = (2049, 4097, 8193, 33_001, 70_001)


@st.composite
def shapes(draw):
    if draw(st.integers(0, 19)) == 19:
        return (*draw(st.sampled_from(((), (1,), (3,)))), draw(st.sampled_from(LONG)))
    num_dims = draw(st.integers(0, 4))
    return tuple(draw(st.sampled_from(SIZES[min(num_dims, 3)])) for _ in range(num_dims))


@st.composite
def layouts(draw, num_dims):
    order, steps = tuple(range(num_dims)), (1,) * num_dims
    kind = draw(st.sampled_from(("contiguous", "permuted", "with gaps")))
    if kind != "contiguous":
        order = tuple(draw(st.permutations(order)))
    if kind == "with gaps":
        steps = tuple(draw(st.sampled_from((1, 2, 3))) for _ in range(num_dims))
    return Layout(order, steps, draw(st.integers(0, 5)))


VALUES = ("mixed", "normals", "bits", "specials")


@st.composite
def drawn_pairs(draw, dtypes, values):
    shape, kind, seed = draw(shapes()), draw(st.sampled_from(values)), draw(st.integers(0, 999))
    layout = draw(layouts(len(shape)))
    other = draw(layouts(len(shape)))
    # Most models have a param and its ema in the same strides, and so the kernels serve them.
    if draw(st.integers(0, 3)) < 3:
        other = replace(layout, offset=other.offset)
    pair = draw(st.sampled_from(dtypes))
    # With the same seed the two are equal, up to rounding.
    other_seed = seed + draw(st.sampled_from((1000, 0)))
    return (
        Drawn(pair[0], shape, layout, kind, seed),
        Drawn(pair[1], shape, other, kind, other_seed),
    )


@st.composite
def drawn_lists(draw, dtypes=DTYPE_PAIRS, values=VALUES, min_size=0):
    pairs = draw(st.lists(drawn_pairs(dtypes, values), min_size=min_size, max_size=12))
    return DrawnLists(tuple(e for e, _ in pairs), tuple(p for _, p in pairs), draw(st.booleans()))


computers = st.sampled_from(COMPUTERS)
forms = st.sampled_from(FORMS)
momenta = st.sampled_from(
    (0.5, 0.0, 1.0, 2e-4, 1e-300, -0.0, math.nextafter(0.5, 0), math.nextafter(0.5, 1), 0.5 - 2e-9)
) | st.floats(0, 1)
SAME_DTYPES = tuple(pair for pair in DTYPE_PAIRS if pair[0] == pair[1])
UPDATES = {
    "one-shot": lambda ema, params, m, form: fused_ema.update_(ema, params, m, form),
    "a tensor's momentum": lambda ema, params, m, form: fused_ema.update_(
        ema, params, torch.tensor(m, dtype=torch.float64), form
    ),
    "plan": lambda ema, params, m, form: fused_ema.Plan(ema, params).update(m, form),
}
updates = st.sampled_from(tuple(UPDATES))


# ---- update


def is_minus_zero(tensor):
    return (tensor == 0) & tensor.signbit()


@examples(80)
@given(drawn_lists(), momenta, forms, updates, computers)
def test_update_gives_the_bits_of_torch(drawn, momentum, form, update, computer):
    lists, twins = Lists(drawn), Lists(drawn)
    with computed_by(computer):
        with writing(lists, ema=True):
            UPDATES[update](lists.ema, lists.params, momentum, form)
        for e, p in zip(twins.ema, twins.params, strict=True):
            torch_update_(e, p, momentum, form)
    if momentum == 1:
        # Torch itself gives either zero, by where the element lies.
        for one in (lists, twins):
            for e, p in zip(one.ema, one.params, strict=True):
                e[is_minus_zero(p)] += 0.0
    assert_same(lists, twins, payloads=False)


@examples(50)
@given(drawn_lists(), momenta, forms, updates, computers)
def test_update_is_within_rounding_of_float64(drawn, momentum, form, update, computer):
    lists, before = Lists(drawn), Lists(drawn)
    with computed_by(computer):
        UPDATES[update](lists.ema, lists.params, momentum, form)
    for e, was, p in zip(lists.ema, before.ema, before.params, strict=True):
        # Near the largest value of the dtype a rounding may be infinite, and a difference too.
        limit = torch.finfo(e.dtype).max / 4
        is_small = (was.abs().double() <= limit) & (p.abs().double() <= limit)
        error = (e.double() - reference_update(was, p, momentum)).abs()
        assert bool((error <= update_tolerance(was, p, momentum, form))[is_small].all())


def compared_as_numbers(actual, expected, where):
    return bool(((actual == expected) | (actual.isnan() & expected.isnan()))[where].all())


def difference(ema, param):
    wide = torch.promote_types(ema.dtype, torch.float32)
    return param.to(wide) - ema.to(wide)


@examples(50)
@given(drawn_lists(), st.sampled_from((0.0, -0.0, 0)), forms, updates, computers)
def test_momentum_zero_changes_nothing(drawn, momentum, form, update, computer):
    lists, before = Lists(drawn), Lists(drawn)
    with computed_by(computer):
        UPDATES[update](lists.ema, lists.params, momentum, form)
    for e, was, p in zip(lists.ema, before.ema, before.params, strict=True):
        # As in torch: zero times what isn't finite is NaN, and -0.0 may become 0.0.
        added = difference(was, p) if form == "lerp" else p
        assert compared_as_numbers(e, was, added.isfinite())


@examples(50)
@given(drawn_lists(), st.sampled_from((1.0, 1)), forms, updates, computers)
def test_momentum_one_gives_the_param(drawn, momentum, form, update, computer):
    lists, before = Lists(drawn), Lists(drawn)
    with computed_by(computer):
        UPDATES[update](lists.ema, lists.params, momentum, form)
    for e, was, p in zip(lists.ema, before.ema, before.params, strict=True):
        dropped = difference(was, p) if form == "lerp" else was
        assert compared_as_numbers(e, p.to(e.dtype), dropped.isfinite())


# ---- swap and copy

SWAPS = {
    "one-shot": lambda ema, params: fused_ema.swap_(ema, params),
    "the other way round": lambda ema, params: fused_ema.swap_(params, ema),
    "plan": lambda ema, params: fused_ema.Plan(ema, params).swap(),
}


@examples(50)
@given(drawn_lists(SAME_DTYPES), st.sampled_from(tuple(SWAPS)), computers)
def test_swap_moves_every_bit_and_swapped_twice_is_identity(drawn, swap, computer):
    lists, before = Lists(drawn), Lists(drawn)
    with computed_by(computer):
        with writing(lists, ema=True, params=True):
            SWAPS[swap](lists.ema, lists.params)
        for e, p, e0, p0 in zip(lists.ema, lists.params, before.ema, before.params, strict=True):
            assert torch.equal(bits_of(e), bits_of(p0))
            assert torch.equal(bits_of(p), bits_of(e0))
        SWAPS[swap](lists.ema, lists.params)
    assert_same(lists, before)


@examples(50)
@given(drawn_lists(), st.sampled_from(tuple(SWAPS)), computers)
def test_swap_rounds_each_side_to_the_other_s_dtype(drawn, swap, computer):
    lists, twins = Lists(drawn), Lists(drawn)
    with computed_by(computer):
        SWAPS[swap](lists.ema, lists.params)
    for e, p in zip(twins.ema, twins.params, strict=True):
        kept = e.clone()
        e.copy_(p)
        p.copy_(kept)
    assert_same(lists, twins, payloads=False)


COPIES = {
    "copy_(ema, params)": lambda ema, params: fused_ema.copy_(ema, params),
    "copy_to_ema": lambda ema, params: fused_ema.Plan(ema, params).copy_to_ema(),
    "copy_(params, ema)": lambda ema, params: fused_ema.copy_(params, ema),
    "copy_to_params": lambda ema, params: fused_ema.Plan(ema, params).copy_to_params(),
}


@pytest.mark.parametrize("dtypes", [SAME_DTYPES, DTYPE_PAIRS], ids=["same dtypes", "all pairs"])
@examples(80)
@given(data=st.data(), copy=st.sampled_from(tuple(COPIES)), computer=computers)
def test_copy_rounds_one_side_and_reads_the_other(dtypes, data, copy, computer):
    drawn = data.draw(drawn_lists(dtypes, min_size=4))
    lists, twins = Lists(drawn), Lists(drawn)
    to_ema = copy in ("copy_(ema, params)", "copy_to_ema")
    with computed_by(computer), writing(lists, ema=to_ema, params=not to_ema):
        COPIES[copy](lists.ema, lists.params)
    for e, p in zip(twins.ema, twins.params, strict=True):
        dst, src = (e, p) if to_ema else (p, e)
        dst.copy_(src)
    assert_same(lists, twins, payloads=dtypes is SAME_DTYPES)


# ---- lists


@examples(50)
@given(st.data(), st.sampled_from(("update", "swap", "copy")), momenta, forms, computers)
def test_neither_order_nor_company_matters(data, op, momentum, form, computer):
    drawn = data.draw(drawn_lists())
    order = data.draw(st.permutations(range(len(drawn.ema))))
    calls = {
        "update": lambda ema, params: fused_ema.update_(ema, params, momentum, form),
        "swap": fused_ema.swap_,
        "copy": fused_ema.copy_,
    }
    lists, twins = Lists(drawn), Lists(drawn)
    with computed_by(computer):
        calls[op]([lists.ema[i] for i in order], [lists.params[i] for i in order])
        for e, p in zip(twins.ema, twins.params, strict=True):
            calls[op]([e], (p,))
    assert_same(lists, twins, payloads=op != "update")


# ---- plans

PLAN_OPS = {
    "update": (
        lambda plan, m, form: plan.update(m, form),
        lambda ema, params, m, form: fused_ema.update_(ema, params, m, form),
    ),
    "swap": (
        lambda plan, m, form: plan.swap(),
        lambda ema, params, m, form: fused_ema.swap_(ema, params),
    ),
    "copy_to_ema": (
        lambda plan, m, form: plan.copy_to_ema(),
        lambda ema, params, m, form: fused_ema.copy_(ema, params),
    ),
    "copy_to_params": (
        lambda plan, m, form: plan.copy_to_params(),
        lambda ema, params, m, form: fused_ema.copy_(params, ema),
    ),
}


@st.composite
def moves(draw, drawn):
    """A pair, and what its ema, its param or both become: other memory, layout, maybe dtype."""
    index = draw(st.integers(0, len(drawn.ema) - 1))
    ema, param = drawn.ema[index], drawn.params[index]
    seed = draw(st.integers(0, 999))
    dtypes = [p for e, p in DTYPE_PAIRS if e == ema.dtype]
    new_ema = replace(ema, layout=draw(layouts(len(ema.shape))), seed=seed)
    layout = draw(layouts(len(ema.shape)) | st.just(param.layout) | st.just(new_ema.layout))
    new_param = replace(param, dtype=draw(st.sampled_from(dtypes)), layout=layout, seed=seed + 1)
    sides = draw(st.sampled_from(("param", "both", "ema")))
    return index, new_ema if sides != "param" else None, new_param if sides != "ema" else None


@examples(50)
@given(st.data(), computers)
def test_a_plan_equals_one_shot_calls_wherever_its_tensors_go(data, computer):
    drawn = data.draw(drawn_lists(min_size=1))
    lists, twins = Lists(drawn), Lists(drawn)
    is_exact = True
    with computed_by(computer):
        plan = fused_ema.Plan(lists.ema, lists.params)
        for _ in range(data.draw(st.integers(1, 4), label="calls")):
            for move in data.draw(st.lists(moves(drawn), max_size=3), label="moves"):
                lists.move(*move)
                twins.move(*move)
            op = data.draw(st.sampled_from(tuple(PLAN_OPS)), label="op")
            arguments = data.draw(momenta, label="momentum"), data.draw(forms, label="form")
            by_plan, one_shot = PLAN_OPS[op]
            by_plan(plan, *arguments)
            one_shot(twins.ema, twins.params, *arguments)
            # What moves bits as they are keeps the payloads of NaNs; what rounds needn't.
            pairs = zip(lists.ema, lists.params, strict=True)
            is_exact &= op != "update" and all(e.dtype == p.dtype for e, p in pairs)
    # The memory that they left is compared as well.
    assert_same(lists, twins, payloads=is_exact)


# ---- calls that fail


def ones(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


def overlapping():
    room = ones(7)
    return [(room[:4], ones(4)), (room[3:], ones(4))]


def with_itself():
    one = ones(4)
    return [(one, one)]


FAULTS = {
    "shape": (ValueError, lambda: [(ones(2, 3), ones(3, 2))]),
    "shape that broadcasts": (ValueError, lambda: [(ones(2, 3), ones(3))]),
    "shape with a 1 more": (ValueError, lambda: [(ones(3), ones(1, 3))]),
    "dtype pair": (TypeError, lambda: [(ones(3, dtype=torch.float64), ones(3))]),
    "two narrow dtypes": (
        TypeError,
        lambda: [(ones(3, dtype=torch.float16), ones(3, dtype=torch.bfloat16))],
    ),
    "integers": (
        TypeError,
        lambda: [(ones(3, dtype=torch.int32), ones(3, dtype=torch.int32))],
    ),
    "expanded": (ValueError, lambda: [(ones(1, 3).expand(2, 3), ones(2, 3))]),
    "overlap": (ValueError, overlapping),
    "a tensor with itself": (ValueError, with_itself),
    "sparse": (TypeError, lambda: [(ones(3, 3).to_sparse(), ones(3, 3))]),
    "no tensor": (TypeError, lambda: [(ones(3), None)]),
}
LIST_OPS = {
    "update_": lambda ema, params: fused_ema.update_(ema, params, 0.5),
    "swap_": fused_ema.swap_,
    "copy_": fused_ema.copy_,
    "Plan": fused_ema.Plan,
}


@pytest.mark.parametrize("op", LIST_OPS)
@examples(50)
@given(st.data(), st.sampled_from(tuple(FAULTS)), computers)
def test_a_bad_pair_is_named_and_nothing_changes(op, data, fault, computer):
    drawn = data.draw(drawn_lists())
    lists, twins = Lists(drawn), Lists(drawn)
    index = data.draw(st.integers(0, len(drawn.ema)), label="index")
    error, make = FAULTS[fault]
    bad = make()
    ema = [*lists.ema[:index], *(e for e, _ in bad), *lists.ema[index:]]
    params = [*lists.params[:index], *(p for _, p in bad), *lists.params[index:]]
    with (
        computed_by(computer),
        writing(lists),
        pytest.raises(error, match=rf"^fused_ema\.{op}: .*\[{index}\]"),
    ):
        LIST_OPS[op](ema, params)
    assert_same(lists, twins)
    for tensor in itertools.chain(*bad):
        if tensor is not None:
            assert tensor.to_dense().eq(1).all()


BAD_ARGUMENTS = {
    "NaN": (ValueError, (math.nan,)),
    "below 0": (ValueError, (-5e-324,)),
    "above 1": (ValueError, (math.nextafter(1, 2),)),
    "infinity": (ValueError, (math.inf,)),
    "a tensor's NaN": (ValueError, (torch.tensor(math.nan, dtype=torch.float64),)),
    "text": (TypeError, ("0.5",)),
    "a float32 tensor": (TypeError, (torch.tensor(0.5),)),
    "form": (ValueError, (0.5, "mul")),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
@examples(50)
@given(drawn_lists(), st.booleans(), computers)
def test_a_bad_momentum_or_form_changes_nothing(case, drawn, planned, computer):
    lists, twins = Lists(drawn), Lists(drawn)
    error, arguments = BAD_ARGUMENTS[case]
    with computed_by(computer):
        plan = fused_ema.Plan(lists.ema, lists.params)
        call = plan.update if planned else partial(fused_ema.update_, lists.ema, lists.params)
        with writing(lists), pytest.raises(error, match=r"^fused_ema\.(Plan\.)?update"):
            call(*arguments)
    assert_same(lists, twins)


# What a param's memory may become, so that no plan can serve the pair.
GONE_BAD = {
    "longer": (ValueError, lambda e, p: ones(p.numel() + 1, dtype=p.dtype)),
    "a shape that broadcasts": (ValueError, lambda e, p: ones(*[1] * (p.dim() + 1), dtype=p.dtype)),
    "integers": (TypeError, lambda e, p: p.detach().to(torch.int32)),
    "another float": (
        TypeError,
        lambda e, p: p.to(torch.float32 if p.dtype == torch.float64 else torch.float64),
    ),
    "expanded": (ValueError, lambda e, p: ones(dtype=p.dtype).expand(p.shape)),
    "the ema's memory": (ValueError, lambda e, p: e.detach()),
}


@st.composite
def lists_around(draw, *, gaps):
    """Lists, and in them at some index a dense pair, or one with gaps, which torch serves."""
    drawn, shape = draw(drawn_lists()), draw(shapes().filter(lambda shape: math.prod(shape) > 1))
    dense = Layout(draw(st.permutations(range(len(shape)))), (1,) * len(shape), 1)
    layouts = [replace(dense, steps=(2,) * len(shape)) if gap else dense for gap in gaps]
    index = draw(st.integers(0, len(drawn.ema)))
    sides = [
        (*side[:index], Drawn(dtype, shape, layout, "normals", seed), *side[index:])
        for side, dtype, layout, seed in zip(
            (drawn.ema, drawn.params),
            draw(st.sampled_from(DTYPE_PAIRS)),
            layouts,
            (0, 1),
            strict=True,
        )
    ]
    return index, DrawnLists(*sides, drawn.together)


DENSE, PARAM_WITH_GAPS, EMA_WITH_GAPS = (False, False), (False, True), (True, False)


@pytest.mark.parametrize("fault", GONE_BAD)
@pytest.mark.parametrize(
    ("gaps", "computers"),
    [
        pytest.param((DENSE,), COMPUTERS, id="dense"),
        pytest.param((PARAM_WITH_GAPS, EMA_WITH_GAPS), COMPUTERS, id="with gaps"),
    ],
)
@examples(50)
@given(st.data(), st.sampled_from(tuple(PLAN_OPS)), momenta, forms)
def test_a_plan_that_can_t_serve_a_param_any_more_changes_nothing(
    fault, gaps, computers, data, op, momentum, form
):
    # Of an ema with gaps no overlap can be told.
    if fault == "the ema's memory":
        gaps = [pair for pair in gaps if pair != EMA_WITH_GAPS]
    index, drawn = data.draw(st.sampled_from(gaps).flatmap(lambda pair: lists_around(gaps=pair)))
    lists, twins = Lists(drawn), Lists(drawn)
    error, become = GONE_BAD[fault]
    by_plan, one_shot = PLAN_OPS[op]
    with computed_by(data.draw(st.sampled_from(computers))):
        plan = fused_ema.Plan(lists.ema, lists.params)
        ema, param = lists.ema[index], lists.params[index]
        kept, param.data = param.data, become(ema, param)
        with writing(lists), pytest.raises(error, match=rf"^fused_ema\.Plan: .*\[{index}\]"):
            by_plan(plan, momentum, form)
        assert_same(lists, twins)
        param.data = kept
        by_plan(plan, momentum, form)
        one_shot(twins.ema, twins.params, momentum, form)
    assert_same(lists, twins, payloads=False)
