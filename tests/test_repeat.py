"""Updates that are made again with one call: what ends that, and that nothing else does."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from fused_ema import EMAManager, _native, _repeat
from fused_ema.testing import assert_bits_equal

pytestmark = pytest.mark.skipif(_native.C is None, reason="one call of the compiled module")

M = 0.25


@pytest.fixture
def answers(monkeypatch):
    """What each call has answered: whether it has made the update."""
    found = []

    def make_again(*args):
        found.append(real(*args))
        return found[-1]

    real = _repeat.make_again
    monkeypatch.setattr(_repeat, "make_again", make_again)
    return found


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU())
        self.head = nn.Linear(5, 2)
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)


def write(model):
    """What a step does: in place, and the count of batches too."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(1)


def averaged(before, model):
    """What an update makes of the averages: float tensors by lerp, others by copy."""
    return {
        name: torch.lerp(before[name], values, M) if values.is_floating_point() else values.clone()
        for name, values in model.state_dict().items()
        if name in before
    }


def step(ema, model):
    """A step and its update, with the bits of torch."""
    before = {name: values.clone() for name, values in ema.named_emas()}
    write(model)
    ema.update()
    wanted = averaged(before, model)
    for name, values in ema.named_emas():
        assert_bits_equal(values, wanted[name])


def made(into):
    model = Net()
    teacher = copy.deepcopy(model).requires_grad_(False) if into else None
    more = {"into": teacher, "exclude": ["frozen"]} if into else {"skip_frozen": True}
    ema = EMAManager(model, momentum=M, **more)
    for _ in range(2):
        step(ema, model)
    return ema, model, teacher


def moves(model):
    model.head.weight.data = model.head.weight.data.clone()


def assigns_a_buffer(model):
    model.body[1].running_mean = model.body[1].running_mean.clone()


def counts_anew(model):
    model.body[1].num_batches_tracked = model.body[1].num_batches_tracked.clone()


def lays_anew(model):
    model.head.weight.data = model.head.weight.data.t().contiguous().t()


@pytest.mark.parametrize("into", [False, True], ids=["manager", "teacher"])
@pytest.mark.parametrize("change", [moves, assigns_a_buffer, counts_anew, lays_anew])
def test_what_changes_is_followed_and_then_repeated_again(answers, change, into):
    ema, model, _ = made(into)
    assert answers == [True]
    change(model)
    step(ema, model)
    assert answers == [True, False]
    for _ in range(2):
        step(ema, model)
    # A buffer that was assigned anew may be in each step: it is asked one by one from then on.
    is_asked = change in (assigns_a_buffer, counts_anew)
    assert answers[2:] == ([] if is_asked else [True, True])


def unfreezes(model):
    model.frozen.requires_grad_(True)


def replaces(model):
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())


def adds_beside(model):
    model.head.extra = nn.Parameter(torch.zeros(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [(unfreezes, "are trainable now"), (replaces, "was replaced"), (adds_beside, "is new")],
)
def test_what_is_an_error_stays_one(answers, change, message):
    ema, model, _ = made(into=False)
    before = {name: values.clone() for name, values in ema.named_emas()}
    change(model)
    write(model)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            ema.update()
    assert (ema.num_updates, ema.iteration) == (2, 2)
    for name, values in ema.named_emas():
        assert_bits_equal(values, before[name])
    assert True not in answers[1:]


def test_one_added_to_an_empty_module_is_noticed_in_its_turn(answers):
    ema, model, _ = made(into=False)
    model.body[2].extra = nn.Parameter(torch.zeros(1))

    def eight_updates():
        for _ in range(8):
            ema.update()

    with pytest.raises(RuntimeError, match=r"'body\.2\.extra' is new"):
        eight_updates()


def test_while_another_manager_is_swapped_nothing_is_repeated(answers):
    ema, model, _ = made(into=False)
    other = EMAManager(model, momentum=M)
    with other.swapped(), pytest.raises(RuntimeError, match="the ema of another manager"):
        ema.update()
    assert answers == [True]
    step(ema, model)
    with ema.swapped(), pytest.raises(RuntimeError, match="the model holds the ema"):
        ema.update()
    step(ema, model)
    assert answers == [True] * 3


def test_a_teacher_s_other_writer_is_noticed(answers):
    ema, model, teacher = made(into=True)
    optimizer_s = [param for name, param in teacher.named_parameters() if name != "frozen"]
    with torch.no_grad():
        for param in optimizer_s:
            param.add_(1)
    with pytest.warns(UserWarning, match="was written since the last update"):
        step(ema, model)
    step(ema, model)
    assert answers == [True, False, True]
    # What was loaded is the user's affair.
    ema.load_state_dict(ema.state_dict())
    with torch.no_grad():
        teacher.head.weight.add_(1)
    step(ema, model)
    assert answers == [True, False, True, True]


def test_a_momentum_with_a_meaning_of_its_own_is_not_repeated(answers):
    model = Net()
    teacher = copy.deepcopy(model).requires_grad_(False)
    momenta = [M, 0.0, 1.0, M]
    ema = EMAManager(model, momentum_fun=momenta.__getitem__, into=teacher)
    ema.update()
    teacher.head.bias.data.fill_(-0.0)
    model.head.bias.data.fill_(0.0)
    ema.update()  # A lerp would make 0.0 of it.
    assert_bits_equal(teacher.head.bias, torch.full((2,), -0.0))
    write(model)
    teacher.head.bias.data.fill_(torch.inf)
    ema.update()
    for name, values in teacher.state_dict().items():
        assert_bits_equal(values, model.state_dict()[name])
    ema.update()
    assert answers == [False, False, True]


def test_a_narrow_teacher_warns_of_a_small_momentum_once_and_goes_on(answers):
    model = nn.Linear(3, 2, dtype=torch.bfloat16)
    teacher = copy.deepcopy(model).requires_grad_(False)
    momenta = [M, M, 0.001, 0.001, 0.001]
    ema = EMAManager(model, momentum_fun=momenta.__getitem__, into=teacher)
    ema.update()
    ema.update()
    with pytest.warns(UserWarning, match="stands still"):
        ema.update()
    ema.update()
    ema.update()
    assert answers == [True, False, True, True]


def test_a_manager_that_its_model_holds_goes_with_it(answers):
    ema, model, _ = made(into=False)
    model.ema = ema
    gone = weakref.ref(model)
    del ema, model
    gc.collect()
    assert gone() is None


def test_anything_else_is_refused():
    ema, model, _ = made(into=False)
    repeated = ema._tracked.repeated
    before = model.head.weight.clone()
    for wrong in (
        (),
        repeated._replace(trees=((),)),
        repeated._replace(trees=(((), (), bytearray()),)),
        repeated._replace(noted=((), bytearray(1))),
        repeated._replace(plan=None),
        repeated._replace(frozen=(1,)),
    ):
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            _repeat.make_again(wrong, M)
    assert_bits_equal(model.head.weight, before)
