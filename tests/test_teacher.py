"""EMAManager(into=module): the averages are the module's own tensors, bit for bit a plan's."""

from __future__ import annotations

import copy
import re
import warnings

import pytest
import torch
from nets import Net, assert_same, move, values_of
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from fused_ema import EMAManager, _slots, schedules, state
from fused_ema.testing import assert_bits_equal


def net(seed=0, dtype=torch.float32):
    """A model, without what only the manager's own tests need."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).to(dtype)
    model.register_buffer("mask", torch.tensor([1.0, float("-inf")]))
    return model


def teacher_of(model):
    return copy.deepcopy(model).requires_grad_(False)


def pair(seed=0, **settings):
    student, teacher = net(seed), net(seed + 1).requires_grad_(False)
    settings.setdefault("momentum", 0.25)
    return student, teacher, EMAManager(student, into=teacher, **settings)


def places(model):
    return {name: (t.data_ptr(), id(t)) for name, t in model.state_dict(keep_vars=True).items()}


# ---- what it computes


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"form": "mul_add", "interval": 2},
        {"begin": 2, "momentum_fun": schedules.linear(0.5), "buffers": "average"},
        {"skip_buffers": True, "exclude": ["scale", "body.0.*"]},
        {"include": ["embedding.*", "head.*", "body.1.*"], "skip_frozen": True},
    ],
)
def test_it_is_the_manager_without_a_copy(backend, settings):
    student = Net()
    teacher = teacher_of(Net(seed=1))
    kept = values_of(teacher)
    before = places(teacher)
    settings = {"momentum": 0.25, **settings}
    want = EMAManager(student, **settings)
    ema = EMAManager(student, into=teacher, **settings)
    assert ema.describe() == want.describe()
    for seed in range(5):
        move(student, seed)
        ema.update()
        want.update()
        assert_same(ema.named_emas(), dict(want.named_emas()))
    assert (ema.iteration, ema.num_updates) == (want.iteration, want.num_updates)
    assert places(teacher) == before
    for name, tensor in teacher.state_dict(keep_vars=True).items():
        averages = dict(ema.named_emas())
        if name in averages:
            assert averages[name] is tensor or torch.equal(averages[name], tensor)
        else:
            assert torch.equal(tensor, kept[name]), name


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "bfloat16")])
def test_dtypes_are_the_teacher_s(dtypes):
    own, other = (getattr(torch, name) for name in dtypes)
    student, teacher = net(dtype=other), net(1, own).requires_grad_(False)
    ema = EMAManager(student, 0.25, into=teacher)
    assert torch.equal(teacher[0].weight, student[0].weight.to(own))
    assert teacher[0].weight.dtype == own
    with torch.no_grad():
        student[0].weight.add_(1)
    want = teacher[0].weight.clone()
    ema.update()
    want = want.lerp(student[0].weight.detach().to(own), 0.25)
    assert_bits_equal(teacher[0].weight.detach(), want, "weight")


def test_start_keep_leaves_the_teacher_as_it_is():
    student, teacher = net(), net(1).requires_grad_(False)
    before = values_of(teacher)
    ema = EMAManager(student, 0.25, into=teacher, start="keep")
    assert_same(teacher.state_dict(), before)
    ema.update()
    want = before["0.weight"].lerp(student[0].weight.detach(), 0.25)
    assert_bits_equal(teacher[0].weight.detach(), want, "0.weight")
    ema.reset()
    assert_same(teacher.state_dict(), values_of(student))


@pytest.mark.parametrize(
    ("mode", "treated"),
    [
        ("auto", {"running_mean": "average", "num_batches_tracked": "copy", "mask": "copy"}),
        ("average", {"running_mean": "average", "num_batches_tracked": "keep", "mask": "copy"}),
        ("copy", {"running_mean": "copy", "num_batches_tracked": "copy", "mask": "copy"}),
        ("skip", {"running_mean": "none", "num_batches_tracked": "none", "mask": "none"}),
        (
            {"*running*": "skip", "mask": "copy"},
            {"running_mean": "none", "num_batches_tracked": "copy", "mask": "copy"},
        ),
    ],
    ids=str,
)
def test_buffers(mode, treated):
    student, teacher = net(), net(1).requires_grad_(False)
    teacher(torch.ones(2, 3))  # Statistics of its own.
    ema = EMAManager(student, 0.25, into=teacher, start="keep", buffers=mode)
    before = values_of(teacher)
    student(torch.randn(4, 3))
    student(torch.randn(4, 3))
    student.mask.add_(1)
    ema.update()
    own, now = student.state_dict(), teacher.state_dict()
    names = {"running_mean": "1.running_mean", "num_batches_tracked": "1.num_batches_tracked"}
    for short, how in treated.items():
        name = names.get(short, short)
        want = {"copy": own[name], "keep": before[name], "none": before[name]}.get(how)
        if want is None:
            want = before[name].lerp(own[name], 0.25)
        assert torch.equal(now[name], want), (name, how)


@pytest.mark.filterwarnings("ignore:.*was written since the last update:UserWarning")
def test_at_the_end_of_a_cosine_nothing_moves():
    student, teacher, ema = pair(momentum_fun=schedules.cosine(0.5, 0.0, 3))
    for seed in range(3):
        move(student, seed)
        ema.update()
    with torch.no_grad():
        teacher[0].weight[0, 0] = -0.0
    before = values_of(teacher)
    with torch.no_grad():
        student[0].weight.fill_(float("inf"))
        student[0].bias.fill_(float("nan"))
    student(torch.randn(4, 3))
    ema.update()
    assert ema.num_updates == 4
    assert_same(teacher.state_dict(), before)


def test_hard_updates(backend):
    student, teacher, ema = pair(momentum=1, interval=3)
    with torch.no_grad():
        teacher[2].weight[0] = float("inf")  # Once, as of a run that broke: an average stays so.
    before = values_of(teacher)
    for i in range(6):
        move(student, i)
        ema.update()
        if (i + 1) % 3 == 0:
            before = values_of(student)
        assert_same(teacher.state_dict(), before)
    assert ema.num_updates == 2


def test_a_step_hook_moves_the_teacher():
    student, teacher, ema = pair()
    optimizer = torch.optim.SGD([*student.parameters(), *teacher.parameters()], lr=0.5)
    ema.register_step_post_hook(optimizer)
    want = teacher[0].weight.clone()
    for _ in range(2):
        student(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        want.lerp_(student[0].weight.detach(), 0.25)
    assert_bits_equal(teacher[0].weight.detach(), want.detach(), "0.weight")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_swapped_shows_the_teacher_s_weights_in_the_student(dtype):
    student, teacher = net(dtype=dtype), net(1).requires_grad_(False)
    ema = EMAManager(student, 0.25, into=teacher)
    move(student, 1)
    ema.update()
    own, averages = values_of(student), values_of(teacher)
    before = places(teacher)
    with ema.swapped():
        for name, tensor in student.state_dict().items():
            assert torch.equal(tensor, averages[name].to(tensor.dtype)), name
        with pytest.raises(RuntimeError, match=r"state_dict: student and teacher hold each other"):
            ema.state_dict()
    assert_same(student.state_dict(), own)
    assert_same(teacher.state_dict(), averages)
    assert places(teacher) == before


def test_sources_go_into_the_teacher():
    student = nn.Linear(3, 2).to(torch.bfloat16)
    teacher = nn.Linear(3, 2).requires_grad_(False)
    masters = {name: torch.randn(p.shape) for name, p in student.named_parameters()}
    ema = EMAManager(student, 0.25, into=teacher, sources=masters)
    want = masters["weight"].clone()
    masters["weight"].add_(1)
    ema.update()
    assert_bits_equal(teacher.weight.detach(), want.lerp(masters["weight"], 0.25), "weight")


def test_a_teacher_on_another_device(monkeypatch):
    # There is no other here: the copy that it takes is made all the same.
    monkeypatch.setattr(_slots, "needs_stage", lambda ema_device, param_device: True)
    student, teacher = net(), net(1).requires_grad_(False)
    num_bytes = 4 * (12 + 4 + 4 + 4 + 4 + 4 + 8 + 2)
    message = rf"the teacher's on cpu: each update first copies {num_bytes} bytes there, and waits"
    with pytest.warns(UserWarning, match=message):
        ema = EMAManager(student, 0.25, into=teacher)
    want = values_of(teacher)["0.weight"]
    move(student, 1)
    ema.update()
    assert_bits_equal(teacher[0].weight.detach(), want.lerp(student[0].weight, 0.25).detach(), "w")


# ---- names


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")
def test_wrappers_are_left_out_on_both_sides():
    student, teacher = net(), teacher_of(net(1))
    wrapped, compiled = nn.DataParallel(student), torch.compile(teacher)
    ema = EMAManager(wrapped, 0.25, into=compiled)
    assert_same(teacher.state_dict(), values_of(student))
    assert next(iter(ema.describe())) == "mask"


class Both(nn.Module):
    """Student and teacher in one module, with a head that only the student has."""

    def __init__(self):
        super().__init__()
        self.student = net()
        self.head = nn.Linear(2, 2)
        self.teacher = net(1).requires_grad_(False)


@pytest.mark.parametrize("by", ["patterns", "function"])
def test_a_teacher_inside_of_the_student_s_module(by):
    model = Both()
    rename = {"student.*": "*"}
    if by == "function":
        rename = lambda name: name.removeprefix("student.")  # noqa: E731
    ema = EMAManager(model, 0.25, into=model.teacher, rename=rename, exclude="head.*")
    assert set(ema.describe()) == {f"student.{name}" for name in model.teacher.state_dict()}
    assert ema.describe()["student.0.weight"] == "averaged into '0.weight': a parameter"
    move(model.student, 1)
    want = model.teacher[0].weight.clone()
    ema.update()
    want = want.lerp(model.student[0].weight, 0.25).detach()
    assert_bits_equal(model.teacher[0].weight.detach(), want, "0.weight")


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_adapters_of_one_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    for adapter in ("default", "teacher"):
        config = LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
        inject_adapter_in_model(config, model, adapter)
    for name, param in model.named_parameters():
        param.requires_grad_(".default." in name)
    rename = {"*.default.*": "*.teacher.*"}
    before = values_of(model)
    ema = EMAManager(model, 0.25, into=model, rename=rename, start="keep")
    assert list(ema.describe()) == [name for name in before if ".default." in name]
    ema.update()
    for name, tensor in model.state_dict().items():
        want = before[name]
        if ".teacher." in name:
            want = want.lerp(before[name.replace(".teacher.", ".default.")], 0.25)
        assert_bits_equal(tensor, want, name)
    with pytest.raises(ValueError, match=r"the teacher has no '0\.lora_A\.techer\.weight'"):
        EMAManager(model, into=model, rename={"*.default.*": "*.techer.*"})
    with pytest.raises(
        ValueError, match=r"'\*\.defult\.\*' matches none of the student's 12 names"
    ):
        EMAManager(model, into=model, rename={"*.defult.*": "*.teacher.*"})
    with pytest.raises(ValueError, match=r"changes none of its 12 names"):
        EMAManager(model, into=model, rename=lambda name: name)


def test_parts_that_are_shared_on_purpose():
    student, teacher = net(), teacher_of(net(1))
    teacher[2] = student[2]
    with pytest.raises(ValueError, match=r"'2\.weight': the teacher's '2\.weight' is the student'"):
        EMAManager(student, into=teacher)
    shared = student[2].weight.clone()
    ema = EMAManager(student, 0.25, into=teacher, exclude="2.*")
    move(student[0], 1)
    ema.update()
    assert torch.equal(student[2].weight, shared)


def test_tied_weights():
    class Tied(nn.Module):
        def __init__(self, is_tied):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            if is_tied:
                self.b.weight = self.a.weight

    student, teacher = Tied(True), teacher_of(Tied(True))
    ema = EMAManager(student, 0.25, into=teacher)
    assert teacher.b.weight is teacher.a.weight
    want = teacher.a.weight.clone()
    with torch.no_grad():
        student.a.weight.add_(1)
    ema.update()
    assert_bits_equal(teacher.b.weight.detach(), want.lerp(student.a.weight, 0.25).detach(), "once")
    with pytest.raises(
        ValueError, match=r"'a\.weight', 'b\.weight' are one tensor in the student "
    ):
        EMAManager(student, into=teacher_of(Tied(False)))
    with pytest.raises(ValueError, match=r"are two tensors in the student and one in the teacher"):
        EMAManager(Tied(False), into=teacher)
    one = nn.Module()
    one.a = teacher_of(Tied(False)).a
    EMAManager(student, into=one, rename={"b.*": "a.*"})
    assert torch.equal(one.a.weight, student.a.weight)


# ---- what is refused


def wider():
    model = net()
    model[2], model.proto = nn.Linear(4, 5), nn.Linear(1, 1)
    return model


def other_dtype():
    model = net()
    model[1].num_batches_tracked = model[1].num_batches_tracked.to(torch.int32)
    return model


@pytest.mark.parametrize(
    ("make", "settings", "error", "messages"),
    [
        (
            wider,
            {"exclude": "0.bias"},
            ValueError,
            [
                r"'proto\.weight' is the teacher's alone\n",
                r"'2\.weight' has shape \[2, 4\] but the teacher's '2\.weight' has \[5, 4\]\n",
            ],
        ),
        (lambda: net()[:2], {}, ValueError, [r"'2\.weight' is the student's alone: the teacher h"]),
        (other_dtype, {}, ValueError, [r"'1\.num_batches_tracked' is int64 but the .* is int32"]),
        (lambda: net().to("meta"), {}, ValueError, [r"the teacher's '0\.weight' is on the meta"]),
        (lambda: net().double(), {}, TypeError, [r"would be torch\.float64; .*Convert the teach"]),
        (net, {"ema_dtype": torch.float32}, ValueError, [r"ema_dtype is torch\.float32, but with"]),
        (net, {"device": "cpu"}, ValueError, [r"device is 'cpu', but with into="]),
        (net, {"start": "zero"}, ValueError, [r"start is 'zero'; choose 'copy' or 'keep'"]),
        (net, {"rename": ["a"]}, TypeError, [r"rename is a list"]),
        (net, {"rename": {"*.a.*": "*.b"}}, ValueError, [r"so there must be as many"]),
        (net, {"rename": lambda name: None}, TypeError, [r"rename returned a NoneType for 'mask'"]),
        (
            net,
            {"rename": {"0.*": "2.*"}},
            ValueError,
            [r"rename sends '0\.weight' and '2\.weight' both to '2\.weight'"],
        ),
        (net, {"exclude": "9.*"}, ValueError, [r"exclude pattern '9\.\*' matches none of the"]),
    ],
)
def test_what_does_not_fit_is_one_error_and_nothing_is_written(make, settings, error, messages):
    teacher = make().requires_grad_(False)
    before = {} if teacher[0].weight.is_meta else values_of(teacher)
    with pytest.raises(error) as raised:
        EMAManager(net(), into=teacher, **settings)
    for message in messages:
        assert re.search(message, str(raised.value)), str(raised.value)
    if before:
        assert_same(teacher.state_dict(), before)


def test_what_only_one_side_has_is_left_out():
    student, teacher = net(), wider().requires_grad_(False)
    student.predictor = nn.Linear(2, 2)
    ema = EMAManager(student, into=teacher, exclude=["2.*", "proto.*", "predictor.*"])
    assert "predictor.weight" not in ema.describe()
    ema = EMAManager(student, into=teacher, include=["0.*", "1.*"])
    assert {name[0] for name in ema.describe()} == {"0", "1"}


def test_one_module_twice():
    model = net()
    for into in (model, nn.DataParallel(model)):
        with pytest.raises(ValueError, match=r"into is the model itself; pass a copy"):
            EMAManager(model, into=into)
    with pytest.raises(TypeError, match=r"into is a OrderedDict; pass a torch\.nn\.Module"):
        EMAManager(model, into=model.state_dict())
    with pytest.raises(ValueError, match=r"rename is .*, but there is no teacher"):
        EMAManager(model, rename={"a": "b"})
    with pytest.raises(ValueError, match=r"start is 'keep', but there is no teacher"):
        EMAManager(model, start="keep")
    with pytest.raises(ValueError, match=r"momentum is 1; .*to copy"):
        EMAManager(model, momentum=1)


def test_a_teacher_that_is_trained_is_refused():
    teacher = net(1)
    teacher[2].requires_grad_(False)
    before = values_of(teacher)
    message = r"the teacher's '0\.weight', .*teacher\.requires_grad_\(False\)"
    with pytest.raises(ValueError, match=message):
        EMAManager(net(), into=teacher)
    assert_same(teacher.state_dict(), before)
    EMAManager(net(), into=teacher, exclude=["0.*", "1.*"], skip_buffers=True)


def test_a_teacher_that_an_optimizer_has_moved_warns_once():
    student, teacher, ema = pair()
    teacher[2].bias.requires_grad_(True)
    optimizer = torch.optim.SGD(teacher.parameters(), lr=0.5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(6):
            student(torch.ones(2, 3)).mean()
            ema.update()
            teacher(torch.randn(4, 3)).square().mean().backward()
            optimizer.step()
    texts = [str(one.message) for one in caught]
    assert len(texts) == 1
    assert "the teacher's '2.bias' was written since the last update" in texts[0]
    assert caught[0].filename == __file__


def test_what_the_manager_and_the_user_write_is_no_such_case():
    _, teacher, ema = pair()
    teacher.train()
    for _ in range(4):
        ema.update()
        teacher(torch.randn(4, 3))
        with ema.swapped():
            pass
        ema.update()
        ema.reset()
        ema.update()
        ema.load_state_dict(ema.state_dict())
    assert ema.num_updates == 1  # Of those since the last reset().


@pytest.mark.parametrize(
    ("dtype", "momentum", "warns"),
    [
        (torch.bfloat16, 0.003, True),
        (torch.bfloat16, 0.004, False),
        (torch.float16, 0.0004, True),
        (torch.float16, 0.0005, False),
        (torch.float32, 0.0001, False),
    ],
)
def test_a_narrow_teacher_that_would_stall(dtype, momentum, warns):
    def said(**settings):
        student = nn.Linear(3, 2).to(dtype)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ema = EMAManager(student, into=teacher_of(student), **settings)
            at_first = len(caught)
            ema.update()
            ema.update()
        assert all(one.filename == __file__ for one in caught)
        return at_first, [str(one.message) for one in caught]

    at_first, texts = said(momentum=momentum)
    assert (at_first, len(texts)) == (warns, warns)
    assert not warns or ("stands still" in texts[0] and "teacher.float()" in texts[0])
    at_first, texts = said(momentum_fun=schedules.constant(momentum))
    assert (at_first, len(texts)) == (0, warns)


# ---- when something has changed


def test_what_is_replaced_in_the_teacher_is_an_error():
    student, teacher, ema = pair()
    teacher[2] = nn.Linear(4, 2)
    before = values_of(teacher)
    with pytest.raises(ValueError, match=r"'2\.weight', '2\.bias' require a gradient"):
        ema.update()
    teacher.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"the teacher's '2\.weight' was replaced"):
        ema.update()
    assert_same(teacher.state_dict(), before)
    assert ema.refresh() == []
    assert_same(teacher.state_dict(), before)
    ema.update()
    want = before["2.weight"].lerp(student[2].weight, 0.25).detach()
    assert_bits_equal(teacher[2].weight.detach(), want, "2.weight")


def test_a_layer_that_both_get_starts_by_copy():
    student, teacher, ema = pair()
    move(student, 1)
    before = values_of(teacher)
    student.append(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"'3\.weight' is the student's alone"):
        ema.update()
    teacher.append(nn.Linear(2, 2).requires_grad_(False))
    assert ema.refresh() == ["3.weight", "3.bias"]
    now = teacher.state_dict()
    assert torch.equal(now.pop("3.weight"), student[3].weight)
    assert torch.equal(now.pop("3.bias"), student[3].bias)
    assert_same(now, before)


def test_memory_that_moves_under_the_teacher():
    student, teacher, ema = pair()
    ema.update()
    for tensor in (*teacher.parameters(), *student.parameters()):
        tensor.data = tensor.data.clone()
    move(student, 2)
    want = teacher[0].weight.lerp(student[0].weight, 0.25).detach()
    ema.update()
    assert_bits_equal(teacher[0].weight.detach(), want, "0.weight")
    teacher[0].weight.data = teacher[0].weight.data.t().contiguous().t()  # Not made anew.
    place = teacher[0].weight.data_ptr()
    want = teacher[0].weight.lerp(student[0].weight, 0.25).detach()
    ema.update()
    assert_bits_equal(teacher[0].weight.detach(), want, "0.weight")
    assert teacher[0].weight.data_ptr() == place


def test_buffers_that_the_teacher_assigns_anew_are_followed():
    student, teacher, ema = pair(buffers="average")
    for _ in range(2):
        teacher[1].running_mean = torch.full((4,), 3.0)
        want = teacher[1].running_mean.lerp(student[1].running_mean, 0.25)
        ema.update()
        assert_bits_equal(teacher[1].running_mean, want, "running_mean")


# ---- the state


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    def run(steps, saved=None):
        student, teacher = net(), net(1).requires_grad_(False)
        if saved is not None:
            student.load_state_dict(saved["student"])
            teacher.load_state_dict(saved["teacher"])
        start = "copy" if saved is None else "keep"
        fun = schedules.cosine(0.5, 0.0, 6)
        ema = EMAManager(student, into=teacher, momentum_fun=fun, interval=2, start=start)
        if saved is not None:
            ema.load_state_dict(saved["ema"])
        for i in range(ema.iteration, steps):
            move(student, i)
            ema.update()
        return {
            "student": values_of(student),
            "teacher": values_of(teacher),
            "ema": ema.state_dict(),
        }

    torch.save(run(3), tmp_path / "3.pt")
    resumed = run(5, torch.load(tmp_path / "3.pt", weights_only=True))
    whole = run(5)
    assert_same(resumed["teacher"], whole["teacher"])
    assert resumed["ema"] == whole["ema"]
    assert resumed["ema"]["iteration"] == 5


def test_a_copy_of_a_model_that_has_both_goes_on():
    model = Both()
    settings = {"rename": {"student.*": "*"}, "exclude": "head.*", "momentum": 0.25}
    ema = EMAManager(model, into=model.teacher, **settings)
    move(model.student, 1)
    ema.update()
    other = copy.deepcopy(model)
    goes_on = EMAManager(other, into=other.teacher, start="keep", **settings)
    goes_on.load_state_dict(ema.state_dict())
    for one in (model, other):
        move(one.student, 2)
    ema.update()
    goes_on.update()
    assert_same(other.state_dict(), values_of(model))
    assert goes_on.state_dict() == ema.state_dict()


def test_a_state_beside_another_teacher_is_refused():
    student, teacher, ema = pair()
    move(student, 1)
    ema.update()
    saved = ema.state_dict()
    assert not any(isinstance(value, torch.Tensor) for value in saved["checksums"].values())
    with torch.no_grad():
        teacher[2].bias[1] = torch.nextafter(teacher[2].bias[1], torch.tensor(9.0))
    before = values_of(teacher)
    with pytest.raises(ValueError, match=r"saved beside; load its own .*\n  '2\.bias' has other v"):
        ema.load_state_dict(saved)
    ema.reset()
    assert (ema.iteration, ema.num_updates) == (0, 0)
    assert ema.load_state_dict(saved, strict=False) == ([], [])
    assert (ema.iteration, ema.num_updates) == (1, 1)
    assert not torch.equal(teacher[2].bias, before["2.bias"])  # By reset() alone.
    fewer = {**saved, "checksums": {"0.weight": 1, "gone": 2}}
    with pytest.raises(ValueError, match=r"'mask' isn't in the state\n(.*\n)*.*'gone' is in the"):
        ema.load_state_dict(fewer)
    assert "gone" in ema.load_state_dict(fewer, strict=False).unexpected_keys
    for key, value in (("iteration", -1), ("version", 99), ("checksums", [])):
        with pytest.raises(ValueError, match=key):
            ema.load_state_dict({**saved, key: value})


def test_states_of_managers_with_and_without_a_teacher():
    student, teacher, ema = pair()
    plain = EMAManager(student, 0.25)
    move(student, 1)
    plain.update()
    with pytest.raises(ValueError, match=r"state of a manager with into=, without averages"):
        plain.load_state_dict(ema.state_dict())
    before = places(teacher)
    ema.load_state_dict(plain.state_dict())
    assert_same(teacher.state_dict(), dict(plain.named_emas()))
    assert places(teacher) == before
    assert ema.num_updates == 1


def test_reading_such_a_state_says_where_the_averages_are(tmp_path):
    student, _, ema = pair()
    torch.save({"model": student.state_dict(), "ema": ema.state_dict()}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"the averages are the teacher's own tensors"):
        state.read(tmp_path / "x.pt")
