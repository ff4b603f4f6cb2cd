"""Bad input: one clear error each, and every tensor as it was."""

from __future__ import annotations

import math
import re
import warnings

import pytest
import torch

import fused_ema
from fused_ema.testing import assert_bits_equal


def f32(*shape):
    return torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape) + 1


def inference():
    with torch.inference_mode():
        return f32(4)


def sparse_csr():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that CSR is in beta
        return f32(3, 3).to_sparse_csr()


SHARED = f32(4)
BASE = f32(10)
OVER_A, OVER_B = BASE[:6], BASE[4:]

# name: (first list, second list, error, what the message holds)
BAD_LISTS = {
    "lengths": ([f32(2)], [f32(2), f32(2)], ValueError, "holds 1 tensors but", "holds 2"),
    "a tensor, not a list": (f32(2), [f32(2)], TypeError, "is a Tensor; pass a list or tuple"),
    "a generator": (iter([f32(2)]), [f32(2)], TypeError, "iterator; pass a list or tuple"),
    "None inside": ([f32(2)], [None], TypeError, "[0] is a NoneType; pass tensors only"),
    "shapes": (
        [f32(2), f32(2, 3)],
        [f32(2), f32(3, 2)],
        ValueError,
        "[1] has shape [2, 3] but",
        "[1] has shape [3, 2]",
    ),
    "broadcastable shapes": ([f32(2, 3)], [f32(3)], ValueError, "has shape [3]"),
    "int64": (
        [f32(2), torch.arange(3)],
        [f32(2), torch.arange(3)],
        TypeError,
        "[1] is torch.int64 and",
        "supported pairs: float32/float32, float32/bfloat16",
        "leave the pair out",
    ),
    "complex": ([torch.ones(2, dtype=torch.complex64)], [f32(2)], TypeError, "complex64"),
    "bool": ([f32(2)], [torch.ones(2, dtype=torch.bool)], TypeError, "torch.bool"),
    "float64 ema, float32 param": (
        [f32(2).double()],
        [f32(2)],
        TypeError,
        "is torch.float64 and",
        "is torch.float32",
    ),
    "bfloat16 with float16": ([f32(2).bfloat16()], [f32(2).half()], TypeError, "torch.float16"),
    "sparse": (
        [f32(3, 3).to_sparse()],
        [f32(3, 3)],
        TypeError,
        "[0] has layout torch.sparse_coo",
        ".to_dense()",
    ),
    "sparse csr": ([f32(3, 3)], [sparse_csr()], TypeError, "torch.sparse_csr"),
    "the same tensor on both sides": ([SHARED], [SHARED], ValueError, "[0] and", "share memory"),
    "the same tensor twice": ([SHARED, f32(2), SHARED], [f32(4), f32(2), f32(4)], ValueError),
    "an ema that overlaps its param": ([OVER_A], [OVER_B], ValueError, "[0] and", "share memory"),
    "overlapping emas": (
        [OVER_A, f32(3), OVER_B],
        [f32(6), f32(3), f32(6)],
        ValueError,
        "[0] and",
        "[2] share memory; pass each tensor once",
    ),
    "an ema that overlaps another param": (
        [OVER_A, f32(6)],
        [f32(6), OVER_B],
        ValueError,
        "[0] and",
        "[1] share memory",
    ),
    "expanded": ([f32(1, 3).expand(4, 3)], [f32(4, 3)], ValueError, "is expanded", ".contiguous()"),
    "inference tensor": ([inference()], [f32(4)], RuntimeError, "inference tensor", ".clone()"),
    "meta against cpu": ([f32(2)], [f32(2).to("meta")], ValueError, "is on cpu but", "is on meta"),
}
CALLS = {
    "update_": lambda a, b: fused_ema.update_(a, b, 0.5),
    "swap_": fused_ema.swap_,
    "copy_": fused_ema.copy_,
    "Plan": fused_ema.Plan,
}
SIDES = {"swap_": ("a", "b"), "copy_": ("dst", "src")}


def values(tensors):
    if isinstance(tensors, torch.Tensor):
        tensors = [tensors]
    if not isinstance(tensors, (list, tuple)):
        return []
    plain = [t for t in tensors if isinstance(t, torch.Tensor) and t.device.type != "meta"]
    return [(t, t.clone()) for t in plain]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("case", BAD_LISTS)
def test_bad_lists(backend, case, call):
    a, b, error, *texts = BAD_LISTS[case]
    before = values(a) + values(b)
    side_a, side_b = SIDES.get(call, ("ema", "params"))
    with pytest.raises(error) as caught:
        CALLS[call](a, b)
    message = str(caught.value).splitlines()[0]
    assert message.startswith(f"fused_ema.{call}: ")
    assert side_a in message or side_b in message
    for text in texts:
        assert text in message
    for tensor, was in before:
        if tensor.layout == torch.strided:
            assert torch.equal(tensor, was)
        else:
            assert torch.equal(tensor.to_dense(), was.to_dense())


def test_the_same_tensor_is_named_by_both_places(backend):
    x = f32(4)
    with pytest.raises(ValueError, match=re.escape("ema[0] and ema[2] share memory")):
        fused_ema.update_([x, f32(2), x], [f32(4), f32(2), f32(4)], 0.5)
    with pytest.raises(ValueError, match=re.escape("ema[1] and params[0] share memory")):
        fused_ema.update_([f32(4), x], [x, f32(4)], 0.5)


def test_errors_name_the_pair_where_names_are_known(backend):
    names = ["body.weight", "head.weight"]
    with pytest.raises(ValueError, match=r"ema\[1\] \('head.weight'\) has shape"):
        fused_ema.Plan([f32(2), f32(3)], [f32(2), f32(4)], names)
    x = f32(3)
    with pytest.raises(ValueError, match=r"ema\[0\] \('body.weight'\) and params\[1\] \('head.w"):
        fused_ema.Plan([x, f32(3)], [f32(3), x], names)
    with pytest.raises(ValueError, match="1 names for 2 pairs"):
        fused_ema.Plan([f32(2), f32(3)], [f32(2), f32(3)], ["one"])


def test_params_that_are_only_read_may_repeat_and_may_be_expanded(backend):
    # Tied weights: two emas may follow one param. A plan can also write params, so it refuses.
    shared, wide = f32(4), f32(1, 3).expand(4, 3)
    ema = [torch.zeros(4), torch.zeros(4), torch.zeros(4, 3)]
    fused_ema.update_(ema, [shared, shared, wide], 0.5)
    assert torch.equal(ema[0], shared / 2)
    assert torch.equal(ema[1], shared / 2)
    assert torch.equal(ema[2], wide / 2)
    with pytest.raises(ValueError, match=r"params\[0\] and params\[1\] share memory"):
        fused_ema.Plan([torch.zeros(4), torch.zeros(4)], [shared, shared])


def test_interleaved_views_are_no_overlap(backend):
    both = f32(50, 6)
    ema = [torch.zeros(50, 3), torch.zeros(50, 3)]
    fused_ema.swap_(ema, [both[:, :3], both[:, 3:]])
    assert torch.equal(ema[1], f32(50, 6)[:, 3:])
    assert not both.any()


@pytest.mark.parametrize("momentum", [math.nan, math.inf, -math.inf, -1e-9, 1.0000001, -1, 2])
def test_bad_momentum(backend, momentum):
    ema, params = [f32(3)], [f32(3) * 5]
    plan = fused_ema.Plan(ema, params)
    for call in (
        lambda: fused_ema.update_(ema, params, momentum),
        lambda: fused_ema.update_(ema, params, torch.tensor(momentum, dtype=torch.float64)),
        lambda: plan.update(momentum),
    ):
        with pytest.raises(ValueError, match=r"it is the weight of the new value") as caught:
            call()
        shown = re.search(r"momentum is (\S+);", str(caught.value))
        assert float(shown[1]) == momentum or math.isnan(momentum)
    assert_bits_equal(ema[0], f32(3))


@pytest.mark.parametrize(
    "momentum",
    [None, "0.1", torch.tensor(0.1), torch.tensor([0.1], dtype=torch.float64), [0.1]],
    ids=str,
)
def test_momentum_of_a_wrong_type(backend, momentum):
    ema = [f32(3)]
    plan = fused_ema.Plan(ema, [f32(3) * 5])
    for call in (lambda: fused_ema.update_(ema, [f32(3)], momentum), lambda: plan.update(momentum)):
        with pytest.raises(TypeError, match=r"0-dim torch\.float64 tensor"):
            call()
    assert_bits_equal(ema[0], f32(3))


@pytest.mark.parametrize("momentum", [0, 1, True, torch.tensor(0.5, dtype=torch.float64)], ids=str)
def test_good_momentum(backend, momentum):
    ema = [torch.zeros(3)]
    fused_ema.update_(ema, [torch.ones(3)], momentum)
    assert_bits_equal(ema[0], torch.full((3,), float(momentum)))


def test_bad_form(backend):
    ema = [f32(3)]
    for call in (
        lambda: fused_ema.update_(ema, [f32(3)], 0.5, "Lerp"),
        lambda: fused_ema.Plan(ema, [f32(3)]).update(0.5, "Lerp"),
    ):
        with pytest.raises(
            ValueError, match="form is 'Lerp'; choose 'lerp', 'mul_add' or 'two_products'"
        ):
            call()


@pytest.mark.parametrize("form", [None, 1])
def test_a_form_that_is_no_string(backend, form):
    ema, params = [torch.zeros(500)] * 2, [f32(500)] * 2
    for op, call in (
        ("update_", lambda: fused_ema.update_(ema, params, 0.5, form)),
        ("Plan.update", lambda: fused_ema.Plan(ema[:1], params[:1]).update(0.5, form)),
    ):
        with pytest.raises(ValueError, match="form is") as caught:
            call()
        assert (
            str(caught.value)
            == f"fused_ema.{op}: form is '{form}'; choose 'lerp', 'mul_add' or 'two_products'"
        )


def test_names_that_are_no_strings(backend):
    with pytest.raises(TypeError) as caught:
        fused_ema.Plan([torch.zeros(500)], [f32(500)], [0])
    assert str(caught.value) == "fused_ema.Plan: names[0] is a int; pass strings"


def test_empty_lists_do_nothing(backend):
    fused_ema.update_([], [], 0.5)
    fused_ema.swap_([], ())
    fused_ema.copy_([], [])
    plan = fused_ema.Plan([], [])
    plan.update(0.5)
    plan.swap()
    plan.copy_to_ema()
    plan.copy_to_params()
    assert len(plan) == 0


def test_inference_tensors_within_inference_mode(backend):
    with torch.inference_mode():
        ema, params = [torch.zeros(4)], [torch.ones(4)]
        fused_ema.update_(ema, params, 0.5)
        fused_ema.Plan(ema, params).update(0.5)
        assert torch.equal(ema[0], torch.full((4,), 0.75))
    # Reading one is fine anywhere.
    normal = [torch.zeros(4)]
    fused_ema.update_(normal, params, 0.5)
    assert torch.equal(normal[0], torch.full((4,), 0.5))


def test_negated_views_take_their_values_not_their_memory(backend):
    param = torch._neg_view(f32(5))
    assert param.is_neg()
    ema = [torch.zeros(5)]
    fused_ema.update_(ema, [param], 0.5)
    assert torch.equal(ema[0], -f32(5) / 2)
    with pytest.raises(ValueError, match=r"ema\[0\] and ema\[1\] share memory"):
        fused_ema.update_([ema[0], ema[0]], [param, f32(5)], 0.5)


class Wrapper(torch.Tensor):
    """Asks Python for its sizes and strides, as wrappers of several tensors do."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, dispatch_sizes_strides_policy="sizes"
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        inside = torch.utils._pytree.tree_map_only(Wrapper, lambda t: t.inner, (args, kwargs or {}))
        return func(*inside[0], **inside[1])


def test_long_lists_with_wrappers(backend):
    # Long enough for several threads, none of which may call Python.
    ema = [torch.zeros(3) for _ in range(2000)]
    params = [f32(3) for _ in range(2000)]
    inside = torch.zeros(4)
    ema[1500], params[1500] = Wrapper(inside), Wrapper(f32(4))
    fused_ema.update_(ema, params, 0.5)
    fused_ema.Plan(ema, params).update(0.5)
    assert torch.equal(inside, f32(4) * 0.75)
    assert torch.equal(ema[1999], f32(3) * 0.75)


def test_long_lists_name_the_first_bad_pair(backend):
    ema = [torch.zeros(3) for _ in range(3000)]
    params = [f32(3) for _ in range(3000)]
    params[700] = params[2900] = f32(4)
    with pytest.raises(ValueError, match=r"ema\[700\] has shape \[3\] but params\[700\]"):
        fused_ema.update_(ema, params, 0.5)
    params[700] = params[2900] = f32(3)
    ema[2999] = params[1300]
    with pytest.raises(ValueError, match=r"ema\[2999\] and params\[1300\] share memory"):
        fused_ema.update_(ema, params, 0.5)
    ema[2999] = ema[5][:2]
    params[2999] = f32(2)
    with pytest.raises(ValueError, match=r"ema\[5\] and ema\[2999\] share memory"):
        fused_ema.update_(ema, params, 0.5)
    assert not any(e.any() for e in ema if e is not params[1300])


@pytest.mark.cuda
def test_devices_that_differ():
    device = "cuda"
    with pytest.raises(ValueError, match=r"ema\[0\] is on cpu but params\[0\] is on cuda:0"):
        fused_ema.update_([f32(2)], [f32(2).to(device)], 0.5)
    momentum = torch.tensor(0.5, dtype=torch.float64, device=device)
    with pytest.raises(ValueError, match="momentum is a tensor on cuda:0 but the lists hold"):
        fused_ema.update_([f32(2)], [f32(2)], momentum)
