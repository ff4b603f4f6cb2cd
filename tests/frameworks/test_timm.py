"""hooks.timm beside timm's ModelEmaV3: the same bits, the same states, in real models."""

from __future__ import annotations

import copy
import pickle

import pytest
import stubs
import torch
from nets import Net, assert_same, move
from torch import nn

from fused_ema.hooks.timm import ModelEmaV3
from fused_ema.testing import ROUNDINGS

stubs.install()

timm = pytest.importorskip("timm")
from timm.utils import ModelEmaV3 as Theirs  # noqa: E402

OPTIONS = {
    "plain": {"decay": 0.9},
    "one by one": {"decay": 0.9, "foreach": False},
    "warm-up": {"decay": 0.8, "use_warmup": True, "min_decay": 0.2},
    "crossed": {"decay": 0.3, "use_warmup": True, "min_decay": 0.7},
    "delayed": {"decay": 0.9, "update_after_step": 2, "use_warmup": True, "warmup_gamma": 3.0},
    "power": {"decay": 0.9, "use_warmup": True, "warmup_power": 0.75},
    "copied buffers": {"decay": 0.9, "exclude_buffers": True},
    "copied buffers, one by one": {"decay": 0.9, "exclude_buffers": True, "foreach": False},
    "on a device": {"decay": 0.9, "device": "cpu"},
}


def theirs_of(model, **options):
    return Theirs(model, stochastic_rounding=False, **options)


def all_of(module):
    return {**module.state_dict(), **dict(module.named_buffers())}


def untied(dtype=torch.float32):
    """timm averages tied weights once for each name."""
    model = Net(dtype)
    model.head = nn.Linear(5, 7, bias=False).to(dtype)
    return model


@pytest.mark.parametrize("dtype", ROUNDINGS)
@pytest.mark.parametrize("options", OPTIONS)
def test_the_bits_of_timm_s(backend, dtype, options):
    model = untied(dtype)
    settings = OPTIONS[options]
    ours, theirs = ModelEmaV3(model, **settings), theirs_of(model, **settings)
    for step in range(6):
        move(model, step)
        model.scratch = torch.full((2,), float(step)).to(dtype)  # Not persistent, assigned anew.
        number = step if len(settings) > 1 else None
        ours.update(model, number)
        theirs.update(model, number)
        assert_same(all_of(ours), all_of(theirs))
    assert ours.module.body[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not ours.module.training
    move(model, 9)
    ours.set(model)
    theirs.set(model)
    assert_same(all_of(ours), all_of(theirs))


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("exclude_buffers", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_float32_average_of_a_narrow_model(backend, dtype, foreach, exclude_buffers):
    model = untied(dtype)
    del model.table  # A complex buffer becomes real.
    settings = {"decay": 0.9, "foreach": foreach, "exclude_buffers": exclude_buffers}
    ours = ModelEmaV3(model, dtype=torch.float32, **settings)
    theirs = theirs_of(model, dtype=torch.float32, **settings)
    for step in range(4):
        move(model, step)
        ours.update(model)
        theirs.update(model)
        assert_same(all_of(ours), all_of(theirs))
    assert ours.module.scale.dtype == torch.float32


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("options", [{}, {"exclude_buffers": True}, {"foreach": False}])
@pytest.mark.parametrize("place", [None, "cpu", torch.device("cpu")], ids=str)
@pytest.mark.parametrize("average", DTYPES)
@pytest.mark.parametrize("dtype", [*DTYPES, "mixed", "other buffers"], ids=str)
def test_an_average_of_any_dtype_of_any_model(backend, dtype, average, place, options):
    model = untied(dtype if isinstance(dtype, torch.dtype) else torch.float32)
    del model.table  # A complex buffer becomes real.
    if dtype == "mixed":
        model.body.to(torch.bfloat16)
        model.embedding.to(torch.float16)
        model.scale.data = model.scale.data.double()
    if dtype == "other buffers":
        model.body[1].running_var = model.body[1].running_var.to(torch.bfloat16)
    settings = {"decay": 0.9, "dtype": average, "device": place, **options}
    ours, theirs = ModelEmaV3(model, **settings), theirs_of(model, **settings)
    assert ours.foreach is theirs.foreach
    for step in range(4):
        move(model, step)
        model.body[1].running_mean = model.body[1].running_mean.clone()
        model.bytes = model.bytes.clone()
        ours.update(model)
        theirs.update(model)
        assert_same(all_of(ours), all_of(theirs))
    move(model, 9)
    ours.set(model)
    theirs.set(model)
    assert_same(all_of(ours), all_of(theirs))


@pytest.mark.parametrize("foreach", [False, True])
def test_a_param_resized_under_an_average_of_another_dtype_changes_nothing(backend, foreach):
    model = untied()
    del model.table
    ours = ModelEmaV3(model, 0.5, dtype=torch.bfloat16, foreach=foreach)
    move(model, 1)
    ours.update(model)
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    move(model, 2)
    weight = model.head.weight
    weight.data = torch.ones(1)  # Would be broadcast.
    with pytest.raises(
        ValueError, match=r"'head.weight' has shape \[1\] in the model but \[7, 5\]"
    ):
        ours.update(model)
    assert_same(ours.state_dict(), before)


def test_arguments_by_position_and_those_that_make_no_difference(backend):
    model = untied(torch.bfloat16)
    del model.table
    given = (model, 0.8, 0.1, 1, True, 2.0, 0.7, None, torch.float32, True, 3, False, True)
    ours, theirs = ModelEmaV3(*given), Theirs(*given)
    for name in ("decay", "min_decay", "update_after_step", "use_warmup", "warmup_gamma"):
        assert getattr(ours, name) == getattr(theirs, name)
    for name in ("dtype", "stochastic_rounding", "stochastic_rounding_seed", "foreach"):
        assert getattr(ours, name) == getattr(theirs, name)
    for step in range(5):
        move(model, step)
        ours.update(model, step)
        theirs.update(model, step)
        assert_same(all_of(ours), all_of(theirs))


def test_stochastic_rounding_is_refused_where_it_would_act():
    narrow, wide = untied(torch.bfloat16), untied()
    del narrow.table, wide.table
    ModelEmaV3(wide, stochastic_rounding=True, dtype=torch.float16)
    for options in ({"model": narrow}, {"model": wide, "dtype": torch.bfloat16}):
        with pytest.raises(ValueError, match=r"pass dtype=torch\.float32, which keeps"):
            ModelEmaV3(stochastic_rounding=True, **options)
    ours = ModelEmaV3(wide, stochastic_rounding=True)
    ours.to(torch.bfloat16)
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    move(wide, 1)
    with pytest.raises(ValueError, match="stochastic_rounding is True"):
        ours.update(wide)
    assert_same(ours.state_dict(), before)
    # In buffers that are copied nothing is rounded.
    wide.body[1].running_mean = wide.body[1].running_mean.bfloat16()
    ModelEmaV3(wide, stochastic_rounding=True, exclude_buffers=True).update(wide)


@pytest.mark.filterwarnings("ignore:Casting complex", "ignore:Complex modules")  # Once a process.
@pytest.mark.parametrize("foreach", [False, True])
def test_a_complex_buffer_whose_average_was_made_real_is_an_error(foreach):
    model = untied()
    ours = ModelEmaV3(model, dtype=torch.float32, foreach=foreach)
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    move(model, 1)
    with pytest.raises(TypeError, match=r"'table'\) is torch\.complex64"):
        ours.update(model)
    assert_same(ours.state_dict(), before)


@pytest.mark.parametrize("options", OPTIONS)
def test_the_decay_at_a_step(options):
    settings = OPTIONS[options]
    ours, theirs = ModelEmaV3(Net(), **settings), theirs_of(Net(), **settings)
    for step in (None, *range(30), 1000, 10**7):
        assert ours.get_decay(step) == theirs.get_decay(step)


@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit"])
def test_in_a_training_run_of_a_timm_model(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3)
    settings = {"decay": 0.95, "use_warmup": True}
    ours, theirs = ModelEmaV3(model, **settings), theirs_of(model, **settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    size = model.default_cfg["input_size"][-1]
    images, labels = torch.randn(2, 3, size, size), torch.tensor([0, 2])
    for step in range(1, 5):
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        ours.update(model, step=step)
        theirs.update(model, step=step)
        assert_same(all_of(ours), all_of(theirs))
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))
    (first, averaged), *_ = ours.module.named_parameters()
    assert not torch.equal(averaged, model.get_parameter(first))


def test_tied_weights_are_averaged_once():
    model = Net()
    ours = ModelEmaV3(model, decay=0.5)
    expected = model.embedding.weight.detach().clone()
    move(model, 0)
    ours.update(model)
    expected.lerp_(model.embedding.weight.detach(), 0.5)
    assert torch.equal(ours.module.embedding.weight, expected)
    assert ours.module.head.weight is ours.module.embedding.weight


def trained(steps, make=ModelEmaV3, **settings):
    model = untied()
    ema = make(model, decay=0.9, use_warmup=True, **settings)
    for step in range(steps):
        move(model, step)
        ema.update(model, step)
    return model, ema


@pytest.mark.parametrize("source", [ModelEmaV3, theirs_of], ids=["ours", "theirs"])
@pytest.mark.parametrize("target", [ModelEmaV3, theirs_of], ids=["ours", "theirs"])
def test_a_run_goes_on_from_a_state_bit_for_bit(source, target, tmp_path):
    model, ema = trained(4, source)
    torch.save(ema.state_dict(), tmp_path / "ema.pt")
    _, going_on = trained(1, target)
    going_on.load_state_dict(torch.load(tmp_path / "ema.pt", weights_only=True))
    for step in range(4, 8):
        move(model, step)
        ema.update(model, step)
        going_on.update(model, step)
        assert_same(going_on.state_dict(), ema.state_dict())


@pytest.mark.parametrize("way", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))])
def test_copies_and_pickles_go_on(way):
    model, ema = trained(3)
    copied = way(ema)
    kept = {k: v.clone() for k, v in ema.state_dict().items()}
    move(model, 9)
    copied.update(model, 9)
    assert_same(ema.state_dict(), kept)
    ema.update(model, 9)
    assert_same(copied.state_dict(), ema.state_dict())


@pytest.mark.parametrize("exclude_buffers", [False, True])
def test_another_averaged_module_is_followed(exclude_buffers):
    model, ema = trained(2, exclude_buffers=exclude_buffers)
    first = ema.module
    kept = {k: v.clone() for k, v in first.state_dict().items()}
    ema.module = copy.deepcopy(first)
    expected = copy.deepcopy(ema)
    move(model, 5)
    ema.update(model)
    expected.update(model)
    assert_same(all_of(ema), all_of(expected))
    assert_same(first.state_dict(), kept)


# ---- bad input


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"decay": 1.5}, ValueError, r"decay is 1\.5; it is the weight of the old value"),
        ({"decay": "a"}, TypeError, "decay is a str; pass a number"),
        ({"min_decay": -1}, ValueError, "min_decay is -1"),
        ({"update_after_step": -1}, ValueError, "update_after_step is -1"),
        ({"warmup_gamma": 0}, ValueError, "warmup_gamma is 0"),
        ({"warmup_power": float("inf")}, ValueError, "warmup_power is inf"),
        ({"momentum": 0.1}, TypeError, "unexpected keyword"),
    ],
)
def test_settings_out_of_range(settings, error, message):
    with pytest.raises(error, match=message):
        ModelEmaV3(Net(), **settings)


def test_another_model_is_an_error_and_changes_nothing():
    _, ema = trained(2)
    before = {k: v.clone() for k, v in ema.state_dict().items()}
    with pytest.raises(TypeError, match="model is a list"):
        ModelEmaV3([])
    with pytest.raises(ValueError, match="step is -1"):
        ema.update(untied(), step=-1)
    for call in (ema.update, ema.set):
        with pytest.raises(ValueError, match="tensors but the model has"):
            call(nn.Linear(2, 2))
        other = untied()
        other.bytes = torch.arange(1, dtype=torch.uint8)  # Would be broadcast.
        with pytest.raises(ValueError, match=r"'bytes' has shape \[1\] in the model but \[5\]"):
            call(other)
    assert_same(ema.state_dict(), before)
