"""Averages chosen after the training: what comes out, how far off it says that it is, and errors.

The runs here have a model of unit vectors (units.py), so that how far off an average is can be read
from it.
"""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import nn
from units import NUM, Unit, manager, trained

from fused_ema import EMAManager, posthoc, schedules, state
from fused_ema.posthoc._profiles import (
    Halving,
    Kept,
    Momenta,
    Power,
    Window,
    inner,
    std_of_gamma,
)
from fused_ema.posthoc._solve import solve
from fused_ema.testing import assert_bits_equal

GAMMA = schedules._gamma_of_std


def weights_of(momentum, interval=1, begin=0, num=NUM):
    """What an average is made of, worked out update by update, in double."""
    found = torch.zeros(NUM + 1, dtype=torch.float64)
    found[0] = 1
    for i in range(num):
        if i < begin:
            m = 1.0
        elif (i + 1) % interval == 0:
            m = momentum(i) if callable(momentum) else momentum
        else:
            continue
        found *= 1 - m
        found[i + 1] += m
    return found


def over_cells(weights, interval):
    """As a density: an update at every k iterations stands for all of them."""
    spread = weights.clone()
    for end in range(interval, NUM + 1, interval):
        spread[end - interval + 1 : end + 1] = weights[end] / interval
    return spread


def distance(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm())


# ---- profiles


@pytest.mark.parametrize(
    ("momentum", "interval", "begin"),
    [
        (0.02, 1, 0),
        (0.05, 6, 0),
        (0.02, 1, 50),
        (schedules.power(0.1), 1, 0),
        (schedules.power(0.1), 1, 60),
        (schedules.power(0.1, 6), 6, 0),
        (schedules.power(0.1), 6, 0),  # Of another interval than the manager's.
        (schedules.inverse_gamma(0.01), 1, 0),
        (schedules.inverse_gamma(0.01, after=30), 1, 0),
        (schedules.swa(), 1, 0),
        (lambda i: 1.0 if i == 100 else 0.03, 1, 0),
        (lambda i: 0.2 / (1 + i % 7), 3, 0),
    ],
)
def test_a_profile_is_what_the_updates_do(momentum, interval, begin):
    profile = Momenta(momentum, interval, begin).at(NUM)
    times = torch.arange(NUM + 1, dtype=torch.float64)
    start = torch.tensor([profile.start], dtype=torch.float64)
    masses = torch.cat([start, profile.below(times).diff()])
    expected = weights_of(momentum, interval, begin)
    assert math.isclose(profile.start, float(expected[0]), abs_tol=1e-12)
    # Cell by cell: what lies within one isn't told apart.
    first = begin // interval * interval
    for end in range(interval, NUM + 1, interval):
        cell = slice(end - interval + 1, end + 1)
        if end > first + interval:
            assert math.isclose(masses[cell].sum(), expected[cell].sum(), abs_tol=1e-6), end
    assert math.isclose(masses.sum(), 1, abs_tol=1e-12)


def test_many_updates_are_thinned_out_without_harm():
    schedule = schedules.ramp(1e-4)
    profile = Momenta(schedule, 1, 0).at(50_000)
    assert isinstance(profile, Kept)
    assert len(profile.points) < 3000
    exact, log = [1.0], 0.0
    for i in reversed(range(50_000)):
        log += math.log1p(-schedule(i))
        exact.append(math.exp(log))
    times = torch.arange(50_001, dtype=torch.float64)
    expected = torch.tensor(exact, dtype=torch.float64).flip(0)
    assert (profile.below(times) - expected).abs().max() < 2e-4


@pytest.mark.parametrize(("interval", "expected"), [(1, 0.05), (10, 0.246), (100, 0.27)])
def test_momenta_of_one_iteration_at_other_intervals(interval, expected):
    """The width that a run gets that updates at every k iterations with the momentum of one."""
    num = 10_000
    profile = Momenta(schedules.power(0.05), interval, 0).at(num)
    times = torch.arange(num + 1, dtype=torch.float64)
    masses, middles = profile.below(times).diff(), times[1:] - 0.5
    masses /= masses.sum()  # 0.39 is the start value's with k = 100.
    mean = masses @ middles
    std = (masses @ (middles - mean) ** 2).sqrt() / num
    assert float(std) == pytest.approx(expected, abs=0.005)
    if interval == 100:  # The first five updates keep a third, so early are they large.
        assert float(masses[:500].sum()) == pytest.approx(0.33, abs=0.005)
    right = Momenta(schedules.power(0.05, interval), interval, 0).at(num)
    assert right == Power(GAMMA(0.05), num)


def test_widths_and_exponents():
    """Of EDM2's table, and where all iterations weigh the same."""
    assert [round(GAMMA(std), 2) for std in (0.05, 0.10)] == [16.97, 6.94]
    assert std_of_gamma(0.0) == pytest.approx(0.289, abs=5e-4)


def test_inner_products_of_powers_against_integrals():
    powers = [Power(GAMMA(std), time) for time in (250.0, 1000.0) for std in (0.05, 0.1, 0.25)]
    # The integral by the trapezoid rule, of the density itself.
    x = torch.linspace(0, 1000, 200_001, dtype=torch.float64)
    lines = torch.stack(
        [
            torch.where(x <= p.time, (p.gamma + 1) / p.time * (x / p.time) ** p.gamma, 0)
            for p in powers
        ]
    )
    expected = torch.trapezoid(lines[:, None] * lines, x)
    assert torch.allclose(inner(powers), expected, rtol=1e-3)
    # And cell by cell, as of any other profile.
    by_cells = inner([*powers, Window(0, 1000)])[:-1, :-1]
    assert torch.allclose(by_cells, expected, rtol=1e-3)


# ---- what can be had


def powers(stds, num, last=100_000):
    return [Power(GAMMA(std), last * (i + 1) / num) for i in range(num) for std in stds]


@pytest.mark.parametrize(
    ("stds", "num", "std", "error"),
    [
        ((0.05, 0.10), 16, 0.075, 3.5e-3),
        ((0.05, 0.10), 64, 0.075, 2.3e-4),
        ((0.05, 0.10), 16, 0.15, 9.0e-3),
        ((0.05, 0.10), 64, 0.15, 5.8e-4),
        ((0.05, 0.10), 16, 0.03, 3.9e-2),
        ((0.05, 0.10), 64, 0.03, 2.9e-3),
        ((0.04, 0.08, 0.16), 16, 0.075, 6.2e-5),
        ((0.04, 0.08, 0.16), 16, 0.2, 1.0e-3),
    ],
)
def test_errors_by_number_and_profile(stds, num, std, error):
    found = solve(powers(stds, num), Power(GAMMA(std), 100_000))
    assert found.error == pytest.approx(error, rel=0.03)
    assert math.isclose(sum(found.coefficients), 1, rel_tol=1e-9)


def test_three_averages_serve_a_range_of_widths():
    own = powers((0.04, 0.08, 0.16), 16)
    errors = [solve(own, Power(GAMMA(std), 100_000)).error for std in (0.05, 0.075, 0.1, 0.15, 0.2)]
    assert min(errors) > 2e-5
    assert max(errors) == pytest.approx(1e-3, rel=0.05)


@pytest.mark.parametrize(("num", "std"), [(32, 0.03), (64, 0.02)])
def test_narrow_targets_have_large_coefficients(num, std):
    """By which the files' rounding grows: fp16 would add a percent, fp32 nothing."""
    found = solve(powers((0.05, 0.10), num), Power(GAMMA(std), 100_000))
    assert 10 < found.norm < 40


@pytest.mark.parametrize(
    ("stds", "num"), [((0.05, 0.10), 16), ((0.05, 0.10), 64), ((0.04, 0.08, 0.16), 32)]
)
def test_a_double_is_enough_for_the_system(stds, num):
    products = inner(powers(stds, num))
    scale = products.diagonal().sqrt()
    assert 1e2 < float(torch.linalg.cond(products / scale / scale[:, None])) < 3e7


@pytest.mark.parametrize(
    ("target", "error"),
    [
        (Halving(5_000, 100_000), 4e-4),
        (Window(80_000, 100_000, 1), 7e-3),
        (Window(80_000, 100_000), 0.1),
    ],
)
def test_other_targets_from_powers(target, error):
    found = solve(powers((0.05, 0.10), 32), target)
    assert found.error == pytest.approx(error, rel=0.3)


def test_against_the_formulas_of_edm2():
    """Algorithm 3 of the paper, in its own words: a linear system, normalised afterwards."""
    last, stds, num = 100_000.0, (0.05, 0.10), 16
    times = [last * (i + 1) / num for i in range(num) for _ in stds]
    gammas = [max(_roots(std)) for _ in range(num) for std in stds]

    def dot(t_a, g_a, t_b, g_b):
        ratio = (t_a / t_b) ** (g_b if t_a < t_b else -g_a)
        return (g_a + 1) * (g_b + 1) * ratio / ((g_a + g_b + 1) * max(t_a, t_b))

    rows = list(zip(times, gammas, strict=True))
    a = torch.tensor([[dot(*i, *j) for j in rows] for i in rows], dtype=torch.float64)
    wanted = (last, max(_roots(0.075)))
    b = torch.tensor([dot(*i, *wanted) for i in rows], dtype=torch.float64)
    expected = torch.linalg.solve(a, b)
    expected /= expected.sum()
    found = solve(powers(stds, num, last), Power(GAMMA(0.075), last))
    assert torch.allclose(inner(powers(stds, num, last)), a, rtol=1e-9, atol=0)
    coefficients = torch.tensor(found.coefficients, dtype=torch.float64)
    assert torch.allclose(coefficients, expected, atol=1e-4)
    square = dot(*wanted, *wanted)
    theirs = math.sqrt(float(expected @ a @ expected - 2 * expected @ b) / square + 1)
    assert found.error <= theirs * (1 + 1e-9)
    assert found.error == pytest.approx(theirs, rel=1e-3)


def _roots(std):
    """The exponents of that width: of gamma^3 + 7 gamma^2 + (16 - t) gamma + 12 - t, t = std^-2."""
    t = std**-2
    companion = torch.tensor([[-7, t - 16, t - 12], [1, 0, 0], [0, 1, 0]], dtype=torch.float64)
    return torch.linalg.eigvals(companion).real.tolist()


def test_means_leave_no_noise_where_checkpoints_do(tmp_path):
    """Weights that jump about a line: ten means of a window against ten checkpoints of it."""
    num, elements = 1000, 4000
    draw = torch.Generator().manual_seed(0)
    line = nn.Linear(1, elements, bias=False)
    ema = EMAManager(line, 0.01)
    posthoc.Snapshots(ema, tmp_path, every=50, averages=False, means=True)
    total, checkpoints = torch.zeros(elements, dtype=torch.float64), []
    for i in range(num):
        with torch.no_grad():
            line.weight.copy_(torch.randn(elements, 1, generator=draw) + i / num)
        ema.update()
        if i >= 500:
            total += line.weight.detach()[:, 0]
        if i >= 500 and (i + 1) % 50 == 0:
            checkpoints.append(line.weight.detach()[:, 0].double())
    mean = total / 500
    of_checkpoints = torch.stack(checkpoints).mean(0)
    of_means = posthoc.reconstruct(tmp_path, uniform=(500, 1000)).ema["weight"][:, 0].double()
    # In units of the noise of one checkpoint.
    assert 0.25 < float((of_checkpoints - mean).square().mean().sqrt()) < 0.36
    assert float((of_means - mean).square().mean().sqrt()) < 0.0014


# ---- runs


@pytest.mark.parametrize("interval", [1, 4])
def test_an_average_comes_out_as_far_off_as_it_says(interval, tmp_path):
    model = Unit()
    short, long = (manager(model, schedules.power(s, interval), interval) for s in (0.05, 0.10))
    posthoc.Snapshots([short, long], tmp_path, every=20)
    trained(model, short, long)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2 * NUM // 20
    for std in (0.03, 0.075, 0.15):
        found = posthoc.reconstruct(tmp_path, std=std)
        expected = weights_of(schedules.power(std, interval), interval)
        spread = over_cells(found.ema["weight"].double(), interval)
        off = distance(spread, over_cells(expected, interval))
        # Means over cells come nearer to each other: only ever less than it says.
        assert 0.75 * found.error < off < 1.001 * found.error + 1e-6
        assert found.iteration == NUM
    # One of the two itself is its own file.
    found = posthoc.reconstruct(tmp_path, std=0.05)
    assert torch.allclose(found.ema["weight"], dict(short.named_emas())["weight"], atol=1e-7)


@pytest.mark.parametrize("at", [160, 170])
def test_at_an_iteration_before_the_last(at, tmp_path):
    model = Unit()
    pair = [manager(model, schedules.power(s)) for s in (0.05, 0.10)]
    posthoc.Snapshots(pair, tmp_path, every=20)
    trained(model, *pair)
    found = posthoc.reconstruct(tmp_path, std=0.09, at=at, max_error=1)
    assert found.iteration == at
    assert not found.ema["weight"][161:].any()  # Nothing of a later iteration.
    assert all(int(path.name[:9]) <= at for path, _ in found.used)
    off = distance(found.ema["weight"], weights_of(schedules.power(0.09), num=at))
    assert 0.75 * found.error < off < 1.001 * found.error + 1e-6
    assert (found.error > 0.1) == (at == 170)


@pytest.mark.parametrize(
    ("momenta", "interval", "begin"),
    [
        ((0.02, 0.05), 1, 0),
        ((0.05, 0.2), 4, 0),
        ((schedules.inverse_gamma(0.01), schedules.ramp(0.03)), 1, 0),
        ((schedules.power(0.05), schedules.power(0.1)), 1, 45),
        ((schedules.power(0.05), schedules.power(0.1)), 4, 0),  # Of another interval.
        ((0.05, schedules.power(0.1)), 1, 0),
    ],
)
def test_averages_of_any_momenta(momenta, interval, begin, tmp_path):
    model = Unit()
    pair = {f"n{i}": manager(model, m, interval, begin) for i, m in enumerate(momenta)}
    posthoc.Snapshots(pair, tmp_path, every=12)
    trained(model, *pair.values())
    found = posthoc.reconstruct(tmp_path, half_life=25, max_error=9)
    expected = torch.cat([torch.zeros(1), 0.5 ** ((NUM - torch.arange(1, NUM + 1)) / 25)]).double()
    expected /= expected.sum()
    # Within a cell of an interval nothing can be told apart.
    cells = torch.cat(
        [expected[:1], expected[1:].view(-1, interval).mean(1).repeat_interleave(interval)]
    )
    off = distance(over_cells(found.ema["weight"].double(), interval), cells)
    assert 0.3 * found.error < off < 1.01 * found.error + 1e-6


def test_means_give_any_window(tmp_path):
    model = Unit()
    one = manager(model, 0.01, interval=2)
    posthoc.Snapshots(one, tmp_path, every=20, averages=False, means=True)
    trained(model, one)

    def expected(weights):
        wanted = torch.tensor([0.0, *map(float, weights)]).double()
        return over_cells(wanted / wanted.sum(), 1)

    def found(**asked):
        result = posthoc.reconstruct(tmp_path, max_error=1, **asked)
        return result, over_cells(result.ema["weight"].double(), 2)

    result, weights = found(uniform=(120, 240))
    assert result.error < 1e-6
    assert distance(weights, expected([i >= 120 for i in range(NUM)])) < 1e-6
    result, weights = found(uniform=(120, 200))
    assert distance(weights, expected([120 <= i < 200 for i in range(NUM)])) < 1e-6
    result, weights = found(linear_decay=(40, 240))
    linear = expected([max(0, i + 0.5 - 40) for i in range(NUM)])
    assert result.error == pytest.approx(0.05, rel=0.01)  # 1/2 of 1/10, of steps for a line.
    assert distance(weights, linear) == pytest.approx(result.error, rel=0.01)
    result, weights = found(weights=lambda i: max(0.0, i + 0.5 - 40))
    assert distance(weights, linear) == pytest.approx(result.error, rel=0.01)
    assert result.norm == pytest.approx(1)


def test_several_emas_of_one_list_need_no_names_twice(tmp_path):
    model = Unit()
    same = [manager(model, schedules.power(0.05)) for _ in range(2)]
    with pytest.raises(ValueError, match=r"power-0.05 clash; name them"):
        posthoc.Snapshots(same, tmp_path, every=20)
    posthoc.Snapshots(dict(zip(("a", "b"), same, strict=True)), tmp_path, every=20)
    trained(model, *same, num=20)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "000000020-a.safetensors",
        "000000020-b.safetensors",
    ]


def test_several_averages_of_one_manager_are_those_of_several_managers(tmp_path):
    momenta = {"short": schedules.power(0.05), "long": schedules.power(0.1)}
    model = Unit()
    own = {name: manager(model, momentum) for name, momentum in momenta.items()}
    several = EMAManager(model, momenta)
    posthoc.Snapshots(own, tmp_path / "own", every=20, run="run")
    posthoc.Snapshots(several, tmp_path / "several", every=20, run="run")
    trained(model, several, *own.values(), num=20)
    files = sorted((tmp_path / "several").iterdir())
    assert [file.name for file in files] == [
        *("000000020-long.safetensors", "000000020-short.safetensors")
    ]
    for file in files:
        assert file.read_bytes() == (tmp_path / "own" / file.name).read_bytes()


# ---- warnings and errors


@pytest.fixture
def folder(tmp_path):
    model = Unit()
    pair = [manager(model, schedules.power(s)) for s in (0.05, 0.10)]
    posthoc.Snapshots(pair, tmp_path / "run", every=60)
    trained(model, *pair)
    return tmp_path / "run"


def test_a_bad_reconstruction_says_what_would_have_helped(folder):
    with pytest.warns(UserWarning, match="what would have helped") as caught:
        found = posthoc.reconstruct(folder, std=0.02)
    text = str(caught[0].message)
    assert f"relative error of {found.error:.2g} from these 8 snapshots" in text
    # As good as it says, with what it says.
    claim = re.search(r"snapshots twice as often \(([\d.e-]+)\)", text)
    own = [Power(GAMMA(s), t) for t in range(60, 241, 60) for s in (0.05, 0.10)]
    more = [Power(GAMMA(s), t) for t in range(30, 241, 60) for s in (0.05, 0.10)]
    better = solve([*own, *more], Power(GAMMA(0.02), NUM)).error
    assert claim is None or float(claim[1]) == pytest.approx(better, rel=0.05)
    assert "an average of std 0.02 among them (" in text


def test_one_snapshot(tmp_path):
    model = Unit()
    one = manager(model, schedules.power(0.05))
    posthoc.Snapshots(one, tmp_path, at=[NUM])
    trained(model, one)
    with pytest.warns(UserWarning, match=r"a second average of std 0.10"):
        found = posthoc.reconstruct(tmp_path, std=0.10)
    assert found.error > 0.4
    assert [coefficient for _, coefficient in found.used] == [pytest.approx(1)]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"std": 0.3}, r"std is 0.3; it must be at most 0.2887"),
        ({"std": 0.0}, r"std is 0.0; it must be a finite number above 0"),
        (
            {"std": 0.1, "at": 999},
            r"iteration 999 is asked for, but the last snapshot is of .* 240",
        ),
        ({"std": 0.1, "at": 30}, r"the first snapshot is of iteration 60, after 30"),
        ({"std": 0.1, "half_life": 3}, "std and half_life is asked for; pass one of"),
        ({}, "nothing is asked for"),
        ({"uniform": (100, 100)}, "of which the first is smaller"),
        ({"uniform": (100, 200), "at": 120}, "at, where it is given, is the second"),
        ({"weights": lambda i: 0.0}, "add up to 0.0; they must add up"),
        ({"std": 0.1, "run": "other"}, "has no run 'other'"),
    ],
)
def test_what_cant_be_had(folder, asked, message):
    with pytest.raises(ValueError, match=message):
        posthoc.reconstruct(folder, **asked)


def test_a_manager_of_several_averages(tmp_path):
    model = Unit()
    widths = {"short": schedules.power(0.05), "long": schedules.power(0.10)}
    several = EMAManager(model, widths)
    apart = [manager(model, schedule) for schedule in widths.values()]
    posthoc.Snapshots(several, tmp_path / "several", every=20, means=True)
    posthoc.Snapshots(dict(zip(widths, apart, strict=True)), tmp_path / "apart", every=20)
    trained(model, several, *apart)
    files = sorted(path.name for path in (tmp_path / "apart").iterdir())
    assert len(files) == 24
    for name in files:
        both = [state.read(tmp_path / folder / name).ema for folder in ("several", "apart")]
        assert_bits_equal(both[0]["weight"], both[1]["weight"], name)
    files = [tmp_path / "several" / name for name in files]
    one, other = (posthoc.reconstruct(f, std=0.07) for f in (files, tmp_path / "apart"))
    assert_bits_equal(one.ema["weight"], other.ema["weight"], "reconstructed")
    was = dict(several.named_emas("short"))["weight"].clone()
    posthoc.reconstruct(files, std=0.07, at=200, into=several, average="long")
    assert (several.iteration, several.num_updates) == (200, 200)
    expected = posthoc.reconstruct(files, std=0.07, at=200).ema["weight"]
    assert_bits_equal(dict(several.named_emas("long"))["weight"], expected, "long")
    assert_bits_equal(dict(several.named_emas("short"))["weight"], was, "short")
    with pytest.raises(ValueError, match=r"keeps 2 averages, .* pass the name of one"):
        posthoc.reconstruct(files, std=0.07, into=several)
