"""EMAManager(sources=): averages of what stands for the model's parameters."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from masters import InList, InState, Kahan, backward, net
from nets import assert_same, values_of
from torch import nn

import fused_ema
from fused_ema import EMAManager, Plan, _slots, sources
from fused_ema.testing import assert_bits_equal

M = 0.25
KEY = "master_param"


def named(model, tensors):
    return {name: t for (name, _), t in zip(model.named_parameters(), tensors, strict=True)}


def in_state(optimizer):
    return [optimizer.state[p][KEY] for g in optimizer.param_groups for p in g["params"]]


def step(model, optimizer, seed):
    backward(model, seed)
    optimizer.step()
    optimizer.zero_grad()


# Each: an optimizer for a model, its sources, and the masters that it has at the moment.
KINDS = {
    "dictionary": lambda m, o: named(m, o.masters),
    "function": lambda m, o: lambda: named(m, o.masters),
    "list": lambda m, o: sources.param_list(m.parameters(), o.masters),
    "lists": lambda m, o: sources.param_list(
        [[*m[0].parameters()], [*m[1].parameters(), *m[2].parameters()]],
        lambda: [o.masters[:2], o.masters[2:]],
    ),
    "state": lambda m, o: sources.optimizer_state(o, KEY),
}


@pytest.fixture(params=list(KINDS))
def trained(request):
    """A model, its optimizer, sources for it, and a function that tells its masters."""
    model = net()
    if request.param == "state":
        optimizer = InState(model.parameters())
        step(model, optimizer, 99)
        return model, optimizer, KINDS["state"](model, optimizer), lambda: in_state(optimizer)
    optimizer = InList(model.parameters())
    return model, optimizer, KINDS[request.param](model, optimizer), lambda: optimizer.masters


@pytest.mark.parametrize("form", ["lerp", "mul_add"])
def test_the_bits_are_those_of_a_plan_over_the_masters(backend, trained, form):
    model, optimizer, given, masters = trained
    ema = EMAManager(model, M, form=form, sources=given)
    expected = [master.detach().clone() for master in masters()]
    plan = Plan(expected, [master.detach() for master in masters()])
    statistic = model[1].running_mean.float()
    for seed in range(4):
        step(model, optimizer, seed)
        ema.update()
        plan.update(M, form)
        if form == "lerp":
            statistic.lerp_(model[1].running_mean.float(), M)
    averages = dict(ema.named_emas())
    for name, average in named(model, expected).items():
        assert_bits_equal(averages[name], average, name)
        assert averages[name].dtype == torch.float32
        # It isn't the average of the weights.
        assert not torch.equal(average, average.bfloat16().float())
    assert averages["1.num_batches_tracked"] == model[1].num_batches_tracked
    if form == "lerp":
        assert_bits_equal(averages["1.running_mean"], statistic)


def test_a_swap_rounds_the_average_and_leaves_the_masters(backend, trained):
    model, optimizer, given, masters = trained
    ema = EMAManager(model, M, sources=given)
    for seed in range(3):
        step(model, optimizer, seed)
        ema.update()
    raw, kept = values_of(model), [master.detach().clone() for master in masters()]
    averages = {name: tensor.clone() for name, tensor in ema.named_emas()}
    with ema.swapped():
        assert_same(ema.named_emas(), averages)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, averages[name].to(tensor.dtype)), name
        assert not torch.equal(model[0].weight, raw["0.weight"])
    assert_same(model.state_dict(), raw)
    for master, was in zip(masters(), kept, strict=True):
        assert_bits_equal(master.detach(), was)
    other = net(torch.float32)
    ema.copy_to(other)
    for name, tensor in other.named_parameters():
        assert_bits_equal(tensor, averages[name], name)


def test_an_fp32_model_with_masters_comes_back_too():
    # Here a swap could exchange ema and param; the plan, which could do it, has the masters.
    model = net(torch.float32)
    masters = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    ema = EMAManager(model, M, sources=masters)
    raw = values_of(model)
    with ema.swapped():
        for name, tensor in model.named_parameters():
            assert torch.equal(tensor, masters[name])
        state = ema.state_dict()
    assert_same(model.state_dict(), raw)
    assert_same(state["raw"], raw)


# ---- sources that are replaced


def follows(model, optimizer, ema, masters):
    for seed in range(3):
        expected = {name: tensor.clone() for name, tensor in ema.named_emas()}
        step(model, optimizer, seed)
        ema.update()
        for (name, _), master in zip(model.named_parameters(), masters(), strict=True):
            expected[name].lerp_(master.detach().float(), M)
            assert_bits_equal(dict(ema.named_emas())[name], expected[name], name)


@pytest.mark.parametrize("kind", ["state", "function"])
def test_a_state_that_is_loaded_is_followed(backend, kind):
    model = net()
    optimizer = InState(model.parameters())
    step(model, optimizer, 99)
    given = sources.optimizer_state(optimizer, KEY)
    if kind == "function":
        given = lambda: named(model, in_state(optimizer))  # noqa: E731
    ema = EMAManager(model, M, sources=given)
    follows(model, optimizer, ema, lambda: in_state(optimizer))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert in_state(optimizer)[0].dtype == torch.bfloat16  # torch's cast to the param's dtype.
    follows(model, optimizer, ema, lambda: in_state(optimizer))


@pytest.mark.parametrize("what", ["one master", "one state", "a group added", "its memory"])
def test_what_is_replaced_in_an_optimizers_state_is_followed(what):
    model = net()
    params = list(model.parameters())
    optimizer = InState(params[:-1] if what == "a group added" else params)
    step(model, optimizer, 99)
    given = sources.optimizer_state(optimizer, KEY)
    ema = EMAManager(model, M, sources=given)
    follows(model, optimizer, ema, lambda: [optimizer.state[p].get(KEY, p) for p in params])
    state = optimizer.state[params[1]]
    if what == "one master":
        state[KEY] = state[KEY] + 1
    elif what == "one state":
        optimizer.state[params[1]] = {KEY: state[KEY] + 1}
    elif what == "a group added":
        optimizer.add_param_group({"params": params[-1:]})
    else:
        state[KEY].data = state[KEY] + 1
    follows(model, optimizer, ema, lambda: in_state(optimizer))


@pytest.mark.parametrize("kind", ["dictionary", "function", "list", "lists"])
def test_masters_that_a_wrapper_replaces_are_followed(kind):
    model = net()
    optimizer = InList(model.parameters())
    given = KINDS[kind](model, optimizer)
    ema = EMAManager(model, M, sources=given)
    follows(model, optimizer, ema, lambda: optimizer.masters)
    new = nn.Parameter(optimizer.masters[0].detach() + 1)
    if kind == "dictionary":
        given["0.weight"] = new
    optimizer.masters[0] = new
    optimizer.optimizer = torch.optim.AdamW(optimizer.masters, lr=0.01)
    follows(model, optimizer, ema, lambda: optimizer.masters)


def test_masters_that_the_first_step_makes():
    model = net()
    optimizer = InState(model.parameters())
    ema = EMAManager(model, M, sources=sources.optimizer_state(optimizer, KEY))
    assert ema.describe()["0.weight"] == "averaged: a parameter"
    assert "from sources" not in repr(ema)
    start = [param.detach().float() for param in model.parameters()]
    ema.update()  # Of the weights: they are what the masters will be.
    for average, value in zip(dict(ema.named_emas()).values(), start[:2], strict=False):
        assert_bits_equal(average, value)
    follows(model, optimizer, ema, lambda: in_state(optimizer))
    assert ema.describe()["0.weight"] == "averaged: from its source"
    assert ema.describe()["1.running_mean"] == "averaged: a norm layer's running statistic"
    assert "6 from sources" in repr(ema)


def test_a_key_that_nothing_has():
    model = net()
    optimizer = InState(model.parameters(), key="master")
    given = sources.optimizer_state(optimizer, KEY)
    ema = EMAManager(model, M, sources=given)
    step(model, optimizer, 0)
    before = {name: tensor.clone() for name, tensor in ema.named_emas()}
    says = "state has no 'master_param' for any of the model's parameters, but 'step', 'master'"
    for _ in range(2):  # It isn't forgotten.
        with pytest.raises(ValueError, match=says):
            ema.update()
    assert_same(ema.named_emas(), before)
    assert ema.iteration == 0
    with pytest.raises(ValueError, match=says):
        EMAManager(model, M, sources=given)


# ---- with everything else


def test_some_parameters_have_sources_and_others_are_their_own():
    model = net()
    master = torch.randn(7, 5)
    given = {"0.weight": master, "2.bias": model[2].bias}
    ema = EMAManager(model, M, sources=given, exclude="2.weight")
    assert ema.describe()["2.bias"] == "averaged: a parameter"
    raw = values_of(model)
    expected = {name: tensor.float() for name, tensor in raw.items()}
    expected["0.weight"] = master.clone()
    with torch.no_grad():
        master.add_(1)
        for param in model.parameters():
            param.add_(1)
    ema.update()
    for name, value in {**dict(model.named_parameters()), **given}.items():
        expected[name].lerp_(value.detach().float(), M)
    for name, average in ema.named_emas():
        if name != "1.num_batches_tracked":
            assert_bits_equal(average, expected[name], name)
    with ema.swapped():
        assert torch.equal(model[0].weight, expected["0.weight"].bfloat16())
    assert torch.equal(model[2].weight, raw["2.weight"] + 1)


def test_tied_parameters_have_one_source():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)}).bfloat16()
    model["b"].weight = model["a"].weight
    master = torch.randn(3, 3)
    for given in ({"b.weight": master}, {"a.weight": master, "b.weight": master}):
        ema = EMAManager(model, M, sources=given)
        assert torch.equal(dict(ema.named_emas())["a.weight"], master)
        with ema.swapped():
            assert torch.equal(model["a"].weight, master.bfloat16())
    both = {"a.weight": master, "b.weight": master.clone()}
    with pytest.raises(ValueError, match=r"'a.weight', 'b.weight' are one tensor .* several"):
        EMAManager(model, M, sources=both)
    model["b"].weight = nn.Parameter(model["a"].weight.data.t())
    with pytest.raises(ValueError, match="different views of one tensor"):
        EMAManager(model, M, sources=given)


@pytest.mark.parametrize(
    ("ema_dtype", "source", "dtype"),
    [
        (None, torch.float32, torch.float32),
        (None, torch.float64, torch.float64),
        (None, torch.float16, torch.float32),
        ("param", torch.float32, torch.float32),
        ("param", torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.float32),
    ],
)
def test_the_dtype_goes_by_the_source(ema_dtype, source, dtype):
    model = nn.Linear(3, 3, bias=False).bfloat16()
    master = torch.randn(3, 3).to(source)
    ema = EMAManager(model, M, sources={"weight": master}, ema_dtype=ema_dtype)
    average = dict(ema.named_emas())["weight"]
    assert average.dtype == dtype
    assert torch.equal(average, master.to(dtype))
    raw = model.weight.detach().clone()
    with ema.swapped():
        assert torch.equal(model.weight, master.to(dtype).bfloat16())
    assert torch.equal(model.weight, raw)


def test_an_ema_on_another_device(monkeypatch):
    monkeypatch.setattr(_slots, "needs_stage", lambda ema_device, param_device: True)
    model = net()
    optimizer = InState(model.parameters())
    given = sources.optimizer_state(optimizer, KEY)
    ema = EMAManager(model, M, sources=given, device="cpu")
    follows(model, optimizer, ema, lambda: in_state(optimizer))
    raw, kept = values_of(model), copy.deepcopy(in_state(optimizer))
    with ema.swapped():
        average = dict(ema.named_emas())["0.weight"]
        assert torch.equal(model[0].weight, average.bfloat16())
    assert_same(model.state_dict(), raw)
    for master, was in zip(in_state(optimizer), kept, strict=True):
        assert_bits_equal(master, was)


def test_begin_and_interval():
    model = net()
    optimizer = InList(model.parameters())
    given = KINDS["list"](model, optimizer)
    ema = EMAManager(model, M, interval=2, begin=3, sources=given)
    expected = None
    for i in range(8):
        step(model, optimizer, i)
        ema.update()
        if i < 3:
            expected = [master.detach().clone() for master in optimizer.masters]
        elif i % 2:
            torch._foreach_lerp_(expected, [m.detach() for m in optimizer.masters], M)
        for name, value in named(model, expected).items():
            assert_bits_equal(dict(ema.named_emas())[name], value, name)


def test_reset_and_refresh_take_the_sources_of_now():
    model = net()
    optimizer = InList(model.parameters())
    ema = EMAManager(model, M, sources=KINDS["function"](model, optimizer))
    step(model, optimizer, 0)
    ema.update()
    optimizer.masters[2] = nn.Parameter(torch.randn(7))
    ema.reset()
    for name, master in named(model, optimizer.masters).items():
        assert_bits_equal(dict(ema.named_emas())[name], master.detach(), name)
    step(model, optimizer, 1)
    ema.update()
    was = {name: tensor.clone() for name, tensor in ema.named_emas()}
    model[2] = nn.Linear(7, 4).bfloat16()
    optimizer = InList(model.parameters())
    with pytest.raises(RuntimeError, match=r"'2\.weight' was replaced"):
        ema.update()
    ema._sources = KINDS["function"](model, optimizer)
    assert ema.refresh() == ["2.weight", "2.bias"]
    averages = dict(ema.named_emas())
    assert_bits_equal(averages["0.weight"], was["0.weight"])
    assert_bits_equal(averages["2.weight"], optimizer.masters[4].detach())


def test_a_run_that_is_resumed_is_the_same(trained):
    model, optimizer, given, masters = trained
    ema = EMAManager(model, M, sources=given)
    step(model, optimizer, 0)
    ema.update()
    saved = copy.deepcopy(ema.state_dict())
    averages = {name: tensor.clone() for name, tensor in ema.named_emas()}
    again = EMAManager(model, M, sources=given)
    again.load_state_dict(saved)
    assert_same(again.named_emas(), averages)
    for manager in (ema, again):
        manager.update()
    assert_same(again.named_emas(), dict(ema.named_emas()))
    assert again.num_updates == 2
    del saved["ema"]["0.bias"], saved["ema_dtypes"]["0.bias"]
    missing, unexpected = again.load_state_dict(saved, strict=False)
    assert (missing, unexpected) == (["0.bias"], [])
    assert_bits_equal(dict(again.named_emas())["0.bias"], masters()[1].detach())


def test_a_state_saved_while_swapped():
    model = net()
    optimizer = InList(model.parameters())
    ema = EMAManager(model, M, sources=KINDS["list"](model, optimizer))
    step(model, optimizer, 0)
    ema.update()
    raw = values_of(model)
    with ema.swapped():
        saved = copy.deepcopy(ema.state_dict())
        weights = copy.deepcopy(model.state_dict())
    other = net(seed=3)
    again = EMAManager(other, M, sources=KINDS["list"](other, InList(other.parameters())))
    other.load_state_dict(weights)
    again.load_state_dict(saved)
    assert_same(again.named_emas(), dict(ema.named_emas()))
    again.swap()
    assert_same(other.state_dict(), raw)


# ---- Kahan sums


@pytest.mark.parametrize("sign", [1, -1])
def test_kahan_sums(backend, monkeypatch, sign):
    monkeypatch.setattr(sources, "_ROOM", 40)  # In several parts.
    model = net()
    optimizer = Kahan(model.parameters(), sign=sign)
    given = sources.kahan_sums(optimizer, subtracts=sign < 0)
    ema = EMAManager(model, M, sources=given)
    exact = [param.detach().float() for param in model.parameters()]
    expected = {name: param.detach().float() for name, param in model.named_parameters()}

    def train(seeds):
        for seed in seeds:
            backward(model, seed)
            grads = [0.05 * param.grad for param in model.parameters()]
            torch._foreach_sub_(exact, [grad.float() for grad in grads])
            optimizer.step()
            optimizer.zero_grad()
            ema.update()
            for name, param in model.named_parameters():
                lost = optimizer.state[param]["kahan_comp"].float()
                expected[name].lerp_(param.detach().float() + sign * lost, M)

    train(range(6))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(range(6, 12))
    for name, average in expected.items():
        assert_bits_equal(dict(ema.named_emas())[name], average, name)
    # The sums are nearer to what was trained than the weights: the compensations count.
    params = [param.detach() for param in model.parameters()]
    lost = [optimizer.state[param]["kahan_comp"] for param in model.parameters()]
    for param, compensation, value in zip(params, lost, exact, strict=True):
        off = (param.float() + sign * compensation.float() - value).abs().sum()
        assert off <= (param.float() - value).abs().sum() / 4


def test_without_a_compensation_it_is_the_parameter():
    model = net()
    optimizer = Kahan(model.parameters())
    optimizer.state[model[0].bias]["kahan_comp"] = torch.zeros(1, dtype=torch.uint8)
    optimizer.state[model[0].weight]["kahan_comp"] = torch.full_like(model[0].weight, 2**-12)
    optimizer.state[model[2].bias]["kahan_comp"] = None
    ema = EMAManager(model, M, sources=sources.kahan_sums(optimizer))
    averages = dict(ema.named_emas())
    assert_bits_equal(averages["0.bias"], model[0].bias.detach().float())
    assert_bits_equal(averages["2.bias"], model[2].bias.detach().float())
    assert_bits_equal(averages["0.weight"], model[0].weight.detach().float() + 2**-12)


# ---- what doesn't fit


def bad(**changes):
    model = net()
    given = {name: param.detach().float() for name, param in model.named_parameters()}
    return model, given | changes


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"0.wieght": torch.ones(7, 5)}, "'0.wieght' is none of the model's parameters"),
        (
            {"module.0.weight": torch.ones(7, 5)},
            "'module.0.weight' is none of the model's parameters; without what wraps the model it "
            "is '0.weight'",
        ),
        ({"1.running_mean": torch.ones(7)}, "'1.running_mean' is a buffer; only parameters have"),
        ({"0.weight": torch.ones(5, 7)}, "'0.weight' has shape [7, 5] but its source has [5, 7]"),
        ({"0.bias": [1.0] * 7}, "'0.bias' has a list, not a tensor"),
        ({"0.bias": torch.ones(7, device="meta")}, "'0.bias' has a source without values"),
        ({"0.bias": torch.ones(1).expand(7)}, "'0.bias' has an expanded source"),
        ({"0.bias": torch.ones(7).to_sparse()}, "'0.bias' has a source of layout torch.sparse_coo"),
    ],
)
def test_sources_that_do_not_fit(changes, says):
    model, given = bad(**changes)
    with pytest.raises(ValueError, match=re.escape(f"sources don't fit the model:\n  {says}")):
        EMAManager(model, M, sources=given)
    # The same where they come to be so later, as often as they are asked for.
    model, fine = bad()
    ema = EMAManager(model, M, sources=fine)
    before = {name: tensor.clone() for name, tensor in ema.named_emas()}
    fine["0.bias"] = fine["0.bias"] + 1
    fine |= changes
    for _ in range(2):
        with pytest.raises(ValueError, match=re.escape(says)):
            ema.update()
    assert_same(ema.named_emas(), before)


def test_sources_that_share_memory():
    model, given = bad()
    given["1.bias"] = given["1.weight"]
    says = "the source of '1.bias' and the source of '1.weight' share memory; each needs its own"
    with pytest.raises(ValueError, match=says):
        EMAManager(model, M, sources=given)
    flat = torch.zeros(10)
    given |= {"1.weight": flat[:7], "1.bias": flat[3:]}
    with pytest.raises(ValueError, match=r"source of '1\.\w+' and the source of '1\.\w+' share"):
        EMAManager(model, M, sources=given)
    given |= {"1.weight": torch.zeros(7), "1.bias": model[1].weight.detach()}
    with pytest.raises(ValueError, match=r"'1\.weight' and the source of '1\.bias' share memory"):
        EMAManager(model, M, sources=given)
    # Its own parameter is what is averaged in any case.
    given["1.bias"] = model[1].bias.detach()
    ema = EMAManager(model, M, sources=given)
    assert ema.describe()["1.bias"] == "averaged: a parameter"


def test_dtypes_that_can_not_be_averaged():
    model, given = bad(**{"0.bias": torch.ones(7, dtype=torch.int16)})
    with pytest.raises(TypeError, match=r"the source of '0\.bias' is torch\.int16"):
        EMAManager(model, M, sources=given)
    model, given = bad()
    ema = EMAManager(model, M, sources=given)
    given["0.bias"] = given["0.bias"].double()
    with pytest.raises(ValueError, match=r"'0\.bias' has a float64 source and its average is"):
        ema.update()
    model.register_parameter("count", nn.Parameter(torch.ones(2, dtype=torch.int32), False))
    given = {"count": torch.ones(2)}
    with pytest.raises(ValueError, match="'count' is int32; only floating-point parameters have"):
        EMAManager(model, M, sources=given)


def test_sources_that_are_none():
    model = net()
    for given, says in (
        ([1.0], "sources is a list; pass a dictionary"),
        (model, "sources is a Sequential; pass a dictionary"),
        (lambda: [1.0], "sources returned a list; it must return a dictionary"),
    ):
        with pytest.raises(TypeError, match=says):
            EMAManager(model, M, sources=given)


def test_a_source_that_is_resized():
    model, given = bad()
    ema = EMAManager(model, M, sources=given)
    given["0.bias"].resize_(3)
    with pytest.raises(ValueError, match=r"update: the source of '0\.bias' has shape \[3\] now"):
        ema.update()


def test_ready_made_ones_say_what_is_wrong():
    model = net()
    params = list(model.parameters())
    with pytest.raises(TypeError, match=r"optimizer_state: optimizer is a Sequential"):
        sources.optimizer_state(model, KEY)
    with pytest.raises(TypeError, match=r"kahan_sums: optimizer is a list|is a int"):
        sources.kahan_sums([3])
    with pytest.raises(ValueError, match="5 masters for 6 params; pass one for each, or None"):
        sources.param_list(params, params[:5])
    with pytest.raises(TypeError, match=r"params\[0\] is a str"):
        sources.param_list(["0.weight"], [torch.ones(1)])
    with pytest.raises(TypeError, match="masters is a Tensor; pass a list"):
        sources.param_list(params, torch.ones(6))
    other = sources.param_list([torch.ones(3)], [torch.ones(3)])
    with pytest.raises(ValueError, match=r"params\[0\], of shape \[3\], is none of the model's"):
        EMAManager(model, M, sources=other)
    twice = sources.param_list([params[0], params[0]], [None, None])
    with pytest.raises(ValueError, match=r"params\[1\], of shape \[7, 5\], is given before"):
        EMAManager(model, M, sources=twice)
    masters = [param.detach().float() for param in params]
    ema = EMAManager(model, M, sources=sources.param_list(params, masters))
    del masters[0]
    with pytest.raises(ValueError, match="5 masters for 6 params"):
        ema.update()


def test_they_say_what_they_are():
    model = net()
    optimizer = Kahan(model.parameters())
    says = [repr(sources.kahan_sums(optimizer)), repr(sources.optimizer_state([optimizer], "key"))]
    assert says == [
        "fused_ema.sources.kahan_sums(Kahan, 'kahan_comp')",
        "fused_ema.sources.optimizer_state(Kahan, 'key')",
    ]
    assert fused_ema.sources is sources


class Elsewhere(torch.Tensor):
    """Says that it is on another device, of which there is none here."""

    device = torch.device("cuda", 0)


def test_a_source_on_another_device_is_refused():
    model = net()
    source = torch.Tensor._make_subclass(Elsewhere, torch.ones(7))
    message = re.escape("'0.bias' is on cpu but its source is on cuda:0; they must be on one")
    with pytest.raises(ValueError, match=message):
        EMAManager(model, momentum=M, sources={"0.bias": source})
    given = {"0.bias": torch.ones(7)}
    ema = EMAManager(model, momentum=M, sources=lambda: given)
    before = {name: values.clone() for name, values in ema.named_emas()}
    given = {"0.bias": source}
    with pytest.raises(ValueError, match=f"update.*(?s:.)*{message}"):
        ema.update()
    assert_same(dict(ema.named_emas()), before)
