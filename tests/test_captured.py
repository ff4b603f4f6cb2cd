"""Updates by a table of momenta on the device: captured on a GPU, called again on a CPU."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from nets import Net, assert_same, move
from torch import nn

import fused_ema
from fused_ema import EMAManager, _native, schedules
from fused_ema.posthoc import Snapshots
from fused_ema.testing import assert_bits_equal

SCHEDULES = {
    "exponential": schedules.exponential(0.01, total_iter=5),
    "linear": schedules.linear(0.9, warm_up=3),
    "power": schedules.power(0.1),
    "half_life": schedules.half_life(4, ramp_up=0.5),
    "own": lambda iteration: (0.5, 0.0, 0.99, 1.0)[iteration % 4],
}


def replayed(call, device):
    """What runs a call again and again: a captured graph where there are graphs."""
    if device == "cpu":
        return call
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def both(model, **settings):
    """A manager, and one with the same settings that may be captured."""
    capturable = settings.pop("capturable", 20)
    return EMAManager(model, **settings), EMAManager(model, capturable=capturable, **settings)


def assert_alike(captured, plain):
    for name in plain.averages or (None,):
        assert_same(captured.named_emas(name), dict(plain.named_emas(name)))
    assert captured.iteration == plain.iteration
    assert captured.num_updates == plain.num_updates


def run(model, plain, captured, device, seeds):
    """Steps of the model, each an update of both, which must be alike after each."""
    step = replayed(captured.update, device)
    for seed in seeds:
        move(model, seed)
        plain.update()
        step()
        assert_alike(captured, plain)


@pytest.mark.parametrize("form", ["lerp", "mul_add", "two_products"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_bits_of_a_manager_that_is_not_captured(dtype, form, device):
    for name, schedule in SCHEDULES.items():
        for interval, begin in ((1, 0), (3, 2)):
            model = Net(dtype).to(device)
            plain, captured = both(
                model, momentum_fun=schedule, interval=interval, begin=begin, form=form
            )
            run(model, plain, captured, device, range(8))
            assert plain.num_updates > 1, name


def test_several_averages_and_kept_buffers(device):
    model = Net().to(device)
    momenta = {"fast": 0.25, "wide": schedules.power(0.2), "own": SCHEDULES["own"]}
    plain, captured = both(model, momentum=momenta, interval=2, begin=3, buffers="average")
    run(model, plain, captured, device, range(9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["lerp", "mul_add", "two_products"])
def test_a_momentum_of_0_writes_no_bit_and_one_of_1_copies_them(form, dtype, device):
    model = nn.Linear(8, 3, bias=False).to(device, dtype)
    odd = torch.tensor([math.inf, -math.inf, math.nan, -0.0, 0.0, 3e38, -3e38, 1]).to(dtype)
    model.weight.data.copy_(torch.stack([odd, odd.roll(3), odd.roll(5)]))
    ema = EMAManager(
        model, momentum_fun=lambda i: float(i), form=form, capturable=2, ema_dtype="param"
    )
    step = replayed(ema.update, device)
    start = model.weight.detach().clone()
    model.weight.data.copy_(start.roll(1, dims=1))
    step()
    assert_bits_equal(ema.state_dict()["ema"]["weight"], start)
    step()
    assert_bits_equal(ema.state_dict()["ema"]["weight"], model.weight.detach())
    assert ema.num_updates == 2


@pytest.mark.cuda
@pytest.mark.parametrize("form", ["lerp", "mul_add", "two_products"])
@pytest.mark.parametrize("is_native", [True, False])
def test_a_plan_by_a_momentum_of_0_or_1_on_the_device(form, is_native, monkeypatch):
    if not is_native:
        monkeypatch.setattr(_native, "C", None)
    for layout in (slice(None), slice(None, None, 2)):  # The second has gaps: torch serves it.
        odd = torch.tensor([math.inf, math.nan, -0.0, 1.0, 2.0, -0.0], device="cuda")
        ema, param = odd.clone()[layout], odd.roll(1).clone()[layout]
        plan = fused_ema.Plan([ema], [param])
        before = ema.clone()
        plan.update(torch.zeros((), dtype=torch.float64, device="cuda"), form)
        assert_bits_equal(ema, before)
        plan.update(torch.ones((), dtype=torch.float64, device="cuda"), form)
        assert_bits_equal(ema, param.clone())


def test_what_a_scaler_has_skipped_is_not_counted(device):
    model = Net().to(device)
    plain, captured = both(model, momentum_fun=SCHEDULES["half_life"], interval=2)
    found_inf = torch.zeros(1, device=device)
    step = replayed(lambda: captured.update(found_inf=found_inf), device)
    for seed, value in enumerate((0, 1, 0, math.inf, math.nan, 0, 0, 0)):
        move(model, seed)
        found_inf.fill_(value)
        plain.update(found_inf=found_inf)
        step()
        assert_alike(captured, plain)
    assert captured.iteration == 5
    assert captured.num_updates == 2


def test_a_resumed_run_goes_on_bit_for_bit(device):
    model = Net().to(device)
    plain, captured = both(model, momentum_fun=SCHEDULES["exponential"], interval=3, capturable=7)
    step = replayed(captured.update, device)
    for seed in range(5):
        move(model, seed)
        plain.update()
        step()
    state = copy.deepcopy(captured.state_dict())
    assert (state["iteration"], state["num_updates"]) == (5, 1)
    # As many iterations from there on, whatever came before.
    resumed = EMAManager(model, momentum_fun=SCHEDULES["exponential"], interval=3, capturable=7)
    resumed_step = replayed(resumed.update, device)
    resumed.load_state_dict(state)
    for seed in range(5, 12):
        move(model, seed)
        plain.update()
        resumed_step()
        assert_alike(resumed, plain)
    # What was captured goes back and on with what is loaded, too.
    captured.load_state_dict(plain.state_dict())
    for seed in range(12, 16):
        move(model, seed)
        plain.update()
        step()
    assert_alike(captured, plain)
    captured.reset()
    plain.reset()
    for seed in range(16, 19):
        move(model, seed)
        plain.update()
        step()
    assert_alike(captured, plain)


@pytest.mark.parametrize(("interval", "begin"), [(1, 0), (3, 0), (2, 99)])
def test_past_the_end_the_last_momentum_holds_and_is_said(interval, begin, device):
    model = Net().to(device)
    schedule = schedules.linear(0.5, warm_up=10)
    ema = EMAManager(model, momentum_fun=schedule, interval=interval, begin=begin, capturable=4)
    end = len(ema._captured._table) - interval
    assert end - 4 < 2 * interval
    plain = EMAManager(
        model,
        momentum_fun=lambda i: schedule(min(i, end - 1)),
        interval=interval,
        begin=begin,
    )
    step = replayed(ema.update, device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(end):
            move(model, seed)
            plain.update()
            step()
        assert_alike(ema, plain)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(end, end + 4):
            move(model, seed)
            plain.update()
            step()
        assert_alike(ema, plain)
    other = EMAManager(model, momentum_fun=schedule, interval=interval, capturable=1)
    step = replayed(other.update, device)
    if device == "cuda":
        _several(step, 3 * interval)
        other.update()  # Reads nothing, so it knows of what was before the call before.
    with pytest.warns(UserWarning, match=r"capturable=1: the last momentum holds from"):
        _several(other.update, 3 * interval)


def _several(call, times):
    for _ in range(times):
        call()


def test_swaps_refresh_and_what_is_shown(device):
    model = nn.Linear(3, 2).to(device)
    plain, captured = both(model, momentum=0.25)
    step = replayed(captured.update, device)
    for seed in range(3):
        move(model, seed)
        plain.update()
        step()
        with captured.swapped():
            assert_same(model.state_dict().items(), dict(plain.named_emas()))
    assert "iteration=3, num_updates=3" in repr(captured)
    model.add_module("more", nn.BatchNorm1d(2).to(device))
    for ema in (plain, captured):
        assert ema.refresh() != []
    step = replayed(captured.update, device)
    for seed in range(3, 6):
        move(model, seed)
        plain.update()
        step()
    assert_alike(captured, plain)
    captured.update(11)  # Where somebody else counts.
    plain.update(11)
    assert_alike(captured, plain)
    assert captured.iteration == 12


def test_a_teacher(device):
    model = Net().to(device)
    teachers = [copy.deepcopy(model).requires_grad_(False) for _ in range(2)]
    hard = {"momentum_fun": lambda i: float(i % 2), "interval": 1}
    plain = EMAManager(model, into=teachers[0], **hard)
    captured = EMAManager(model, into=teachers[1], capturable=10, **hard)
    step = replayed(captured.update, device)
    for seed in range(4):
        move(model, seed)
        plain.update()
        step()
        assert_same(teachers[1].state_dict().items(), teachers[0].state_dict())
    assert captured.state_dict()["num_updates"] == 4


def test_two_managers_hooked_to_one_optimizer():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    managers = [EMAManager(model, m, capturable=9) for m in (0.1, 0.2)]
    for ema in managers:
        ema.register_step_post_hook(optimizer)
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    optimizer.found_inf = torch.ones(1)  # As a scaler leaves it for a fused one.
    optimizer.step()
    assert [ema.iteration for ema in managers] == [1, 1]


@pytest.mark.parametrize("n", [0, -3, 2.5, True, "all"])
def test_a_number_of_iterations_is_a_number(n):
    with pytest.raises(ValueError, match=r"capturable is .*; it must be a whole number from 1"):
        EMAManager(nn.Linear(2, 2), capturable=n)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda i: 1 / (3 - i), "iteration 3 failed with ZeroDivisionError: division by zero"),
        (lambda i: 0.5 if i < 2 else 1.5, r"momentum_fun\(2\) returned 1.5"),
        (lambda i: 0.5 if i < 2 else None, r"momentum_fun\(2\) returned a NoneType"),
    ],
)
def test_a_schedule_that_fails_ahead_is_said_when_the_manager_is_made(function, said):
    with pytest.raises(RuntimeError, match=f"capturable=9 works the momenta out ahead.*{said}"):
        EMAManager(nn.Linear(2, 2), momentum_fun=function, capturable=9)
    # Nor does a state that leads there change anything.
    ema = EMAManager(nn.Linear(2, 2), momentum_fun=function, capturable=1)
    state = copy.deepcopy(ema.state_dict()) | {"iteration": 5, "num_updates": 5}
    state["ema"]["weight"].zero_()
    before = {name: values.clone() for name, values in ema.named_emas()}
    with pytest.raises(RuntimeError, match="works the momenta out ahead"):
        ema.load_state_dict(state)
    assert_same(ema.named_emas(), before)
    assert ema.iteration == 0


def test_what_a_captured_update_can_not_do_is_refused():
    model = nn.Linear(2, 2)
    for option in ({"nonfinite": "skip"}, {"telemetry": True}):
        with pytest.raises(ValueError, match="looks at values on the host"):
            EMAManager(model, capturable=5, **option)
    with pytest.raises(TypeError, match="found_inf is a float; pass a tensor of one element"):
        EMAManager(model, capturable=5).update(found_inf=1.0)


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_tensors_of_several_devices_are_refused(tmp_path):
    model = nn.Linear(2, 2).cuda()
    with pytest.raises(ValueError, match="'weight' is on cuda:0 and its average on cpu"):
        EMAManager(model, capturable=5, device="cpu")
    model.register_buffer("here", torch.zeros(2))
    with pytest.raises(ValueError, match=r"on one device, cuda:0 here.*\n  'here' is on cpu"):
        EMAManager(model, capturable=5)
    ema = EMAManager(model, capturable=5, exclude="here")
    with pytest.raises(RuntimeError, match="can't be read while a CUDA graph"):
        replayed(lambda: ema.iteration, "cuda")
    with pytest.raises(RuntimeError, match=r"can't be set while a CUDA graph|can't be read while"):
        replayed(lambda: ema.update(3), "cuda")
    with pytest.raises(ValueError, match="found_inf is on cpu but the averages are on cuda:0"):
        replayed(lambda: ema.update(found_inf=torch.zeros(1)), "cuda")
    assert "in a capture" in _shown_in_a_capture(ema)
    assert ema.iteration == 0
    Snapshots(ema, tmp_path, every=1)
    with pytest.raises(RuntimeError, match="snapshots are saved by Python"):
        replayed(ema.update, "cuda")


def _shown_in_a_capture(ema):
    shown = []

    def show():
        shown.append(repr(ema))
        ema.update()

    replayed(show, "cuda")
    return shown[0]


def training(device, scaler, is_captured):
    """A model, and its whole training step with a hooked manager inside."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 2))
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True, capturable=True)
    ema = EMAManager(
        model,
        momentum_fun=schedules.linear(0.5, warm_up=9),
        interval=2,
        capturable=20 if is_captured else None,
    )
    ema.register_step_post_hook(optimizer)
    inputs = torch.randn(16, 6, device=device)

    def step():
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(model(inputs).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()

    return model, ema, inputs, step


@pytest.mark.cuda
def test_a_whole_captured_training_step_with_a_scaler():
    runs = []
    for is_captured in (True, False):
        scaler = torch.amp.GradScaler("cuda", init_scale=8.0, growth_interval=100)
        model, ema, inputs, step = training("cuda", scaler, is_captured)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        run = replayed(step, "cuda") if is_captured else step
        kept = inputs.clone()
        for i in range(6):
            inputs.copy_(kept if i != 2 else kept * math.inf)  # A step that the scaler skips.
            run()
        runs.append((model.state_dict(), ema))
    (weights, captured), (expected, plain) = runs
    assert_same(weights.items(), expected)
    assert_alike(captured, plain)
    assert captured.iteration == 8


class Student(nn.Module):
    """Whose forward moves the average first."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.average = []

    def forward(self, x):
        for ema in self.average:
            ema.update()
        return self.body(x)


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node")
def test_in_a_graphed_callable():
    model = Student().cuda()
    captured = EMAManager(model, momentum_fun=SCHEDULES["linear"], capturable=20)
    model.average.append(captured)
    x = torch.randn(3, 4, device="cuda", requires_grad=True)
    step = torch.cuda.make_graphed_callables(model, (x,))
    plain = EMAManager(model, momentum_fun=SCHEDULES["linear"])
    plain.load_state_dict(captured.state_dict())
    assert plain.iteration == 3  # Warming up counts.
    for seed in range(4):
        move(model, seed)
        plain.update()
        step(x).sum().backward()
        assert_alike(captured, plain)


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
def test_between_the_parts_of_a_compiled_step():
    model = Student()
    plain, captured = both(model, momentum_fun=SCHEDULES["linear"])
    model.average.append(captured)
    step = torch.compile(model, backend="eager")
    for seed in range(4):
        move(model, seed)
        plain.update()
        step(torch.ones(2, 4)).sum().backward()
        assert_alike(captured, plain)


@pytest.mark.cuda
def test_an_update_outside_of_graphs_waits_for_nothing():
    from bench.gpu.launches import no_synchronisation

    model = Net().cuda()
    ema = EMAManager(model, momentum_fun=schedules.exponential(), begin=1, capturable=9)
    found_inf = torch.zeros((), device="cuda")
    with no_synchronisation():
        for _ in range(2):
            ema.update()
            ema.update(found_inf=found_inf)
            with ema.swapped():
                pass
    assert ema.iteration == 4
