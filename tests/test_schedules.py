"""Schedules: their values, what these lead to, and bad settings."""

from __future__ import annotations

import math
import pickle

import pytest

from fused_ema import schedules

# Formulas evaluated by hand, to six digits; the sources are in the docstrings.
VALUES = [
    (schedules.constant(0.25), {0: 0.25, 10**9: 0.25}),
    # 0.9998 e^-0.0005 + 0.0002, then e^-0.5005, e^-2.5005, e^-10.0005
    (schedules.exponential(), {0: 0.9995, 1000: 0.606309, 5000: 0.0822277, 20000: 0.000245368}),
    (schedules.exponential(0.5, 1), {0: 0.683940, 1: 0.567668}),
    (schedules.linear(), {0: 0.0002, 10**6: 0.0002}),  # 1/100 is above it from the start
    (schedules.linear(0.04, warm_up=100), {0: 0.01, 1: 2 / 101, 3: 4 / 103, 4: 0.04}),
    (
        schedules.linear(0.1, warm_up=1000, interval=2),
        {0: 0.001, 8: 9 / 1008, 9: 10 / 1009, 10: 0.01},
    ),
    (schedules.inverse_gamma(), {0: 1.0, 7: 0.25, 26: 1 / 9, 999_999: 1e-4, 10**7: 1e-4}),
    (schedules.inverse_gamma(0.0, exponent=0.75), {15: 0.125, 9999: 1e-3}),
    (schedules.inverse_gamma(0.1, gamma=10, exponent=1, max_momentum=0.5), {0: 0.5, 30: 0.25}),
    (schedules.inverse_gamma(0.0, after=0), {0: 1.0, 7: 0.25, 26: 1 / 9}),
    (schedules.inverse_gamma(after=100), {0: 1.0, 100: 1.0, 107: 0.25, 126: 1 / 9, 10**8: 1e-4}),
    (
        schedules.inverse_gamma(0.1, gamma=10, exponent=1, max_momentum=0.5, after=3),
        {0: 1.0, 3: 1.0, 4: 0.5, 33: 0.25, 10**6: 0.1},
    ),
    (schedules.ramp(), {0: 0.9, 1: 9 / 11, 90: 0.09, 10**6: 1e-4}),
    (schedules.ramp(0.0, warm_up=2), {0: 0.5, 2: 0.25}),
    (schedules.ramp(0.01, first=1), {0: 9 / 11, 89: 0.09, 10**6: 0.01}),
    (schedules.annealing(), {0: 1.0, 25: 0.8, 100: 0.5, 10**6: 0.0002}),
    (schedules.saturating(), {0: 1.0, 2000: 0.367943, 10**6: 1e-4}),
    (schedules.cosine(0.008, 0.0, 100), {0: 0.008, 25: 0.00682843, 50: 0.004, 100: 0.0, 999: 0.0}),
    (schedules.swa(), {0: 1.0, 1: 0.5, 9: 0.1}),
    (schedules.half_life(1), {0: 0.5}),
    (schedules.half_life(1000), {0: 0.000692907, 10**6: 0.000692907}),
    (schedules.half_life(1000, interval=2000), {0: 0.75}),
    (schedules.half_life(1000, ramp_up=0.1), {9: 0.5, 19: 1 - 0.5**0.5, 10**6: 0.000692907}),
    (
        schedules.half_life(1000, ramp_up=0.1, counts_itself=False),
        {0: 1.0, 10: 0.5, 20: 1 - 0.5**0.5, 10**6: 0.000692907},
    ),
    # 8 iterations an update: 0, then 8 and 16 before it
    (
        schedules.half_life(1000, interval=8, ramp_up=0.5, counts_itself=False),
        {7: 1.0, 15: 0.75, 23: 0.5},
    ),
    (schedules.power(0.10), {0: 1.0, 1: 0.995920, 99: 0.0766730}),
    (schedules.power(0.10, interval=4), {3: 1.0, 7: 0.995920}),
    (schedules.composed(0.5, 3), {0: 0.875, 7: 0.875}),
    (schedules.composed(schedules.swa(), 2), {0: 1.0, 1: 0.75, 3: 0.4375}),
    (schedules.composed(1e-12, 1000), {0: 1e-9}),
    (schedules.per_update(schedules.swa(), 5), {4: 1.0, 9: 0.5, 14: 1 / 3}),
    # begin 7, interval 5: the first update that averages is at iteration 9
    (schedules.per_update(schedules.swa(), 5, begin=7), {9: 1.0, 14: 0.5}),
    (schedules.per_update(schedules.swa(), 5, begin=9), {9: 1.0, 14: 0.5}),
    (schedules.per_update(schedules.swa(), 1, begin=3), {3: 1.0, 4: 0.5}),
]


@pytest.mark.parametrize(("schedule", "values"), VALUES)
def test_values(schedule, values):
    got = [schedule(i) for i in values]
    assert got == pytest.approx(list(values.values()), rel=1e-5, abs=1e-12)
    assert got == [pickle.loads(pickle.dumps(schedule))(i) for i in values]


@pytest.mark.parametrize("schedule", [schedule for schedule, _ in VALUES])
def test_every_value_is_a_momentum(schedule):
    for i in (*range(7, 1000), 10**5, 10**9, 10**15):
        assert 0 <= schedule(i) <= 1


def averaged(schedule, values):
    ema = 0.0
    for i, value in enumerate(values):
        ema += schedule(i) * (value - ema)
    return ema


def test_swa_is_the_plain_mean():
    assert averaged(schedules.swa(), range(1, 101)) == pytest.approx(50.5)


def test_half_life_halves():
    # One old value, then zeros: after so many iterations half of it is left.
    schedule = schedules.half_life(250)
    assert averaged(lambda i: 1.0 if i == 0 else schedule(i), [1.0] + [0.0] * 250) == pytest.approx(
        0.5
    )


def test_composed_is_as_many_updates_in_one():
    each, at_once = schedules.constant(0.003), schedules.composed(0.003, 50)
    assert 1 - averaged(each, [1.0] * 50) == pytest.approx(1 - at_once(49))
    assert schedules.linear(0.003, interval=50)(10**9) < 1e-100  # the reference's way


@pytest.mark.parametrize(("std", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_power_has_the_gamma_and_the_width_of_the_paper(std, gamma):
    assert schedules._gamma_of_std(std) == pytest.approx(gamma, abs=0.005)
    # The weights that the updates leave on each of 20,000 iterations.
    schedule, n = schedules.power(std), 20_000
    left, weights = 1.0, []
    for i in reversed(range(n)):
        weights.append(left * schedule(i))
        left *= 1 - schedule(i)
    times = [(n - i - 0.5) / n for i in range(n)]
    mean = sum(w * t for w, t in zip(weights, times, strict=True))
    variance = sum(w * (t - mean) ** 2 for w, t in zip(weights, times, strict=True))
    assert sum(weights) == pytest.approx(1)
    assert math.sqrt(variance) == pytest.approx(std, rel=1e-3)


def test_the_widest_power_is_the_plain_mean():
    schedule = schedules.power(12**-0.5)
    assert [schedule(i) for i in range(5)] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4, 1 / 5])


BAD = [
    (lambda: schedules.constant(1.5), "schedules.constant: momentum is 1.5"),
    (lambda: schedules.constant(math.nan), "momentum is nan"),
    (lambda: schedules.exponential(-0.1), "schedules.exponential: momentum is -0.1"),
    (lambda: schedules.exponential(total_iter=0), "total_iter is 0; it must be a finite number"),
    (lambda: schedules.exponential(total_iter=math.inf), "total_iter is inf"),
    (lambda: schedules.linear(warm_up=-1), "schedules.linear: warm_up is -1"),
    (lambda: schedules.linear(interval=1.5), "interval is 1.5; it must be a whole number from 1"),
    (lambda: schedules.linear(interval=0), "interval is 0"),
    (lambda: schedules.inverse_gamma(0.5, max_momentum=0.1), "momentum is 0.5 but max_momentum is"),
    (lambda: schedules.inverse_gamma(gamma=0), "schedules.inverse_gamma: gamma is 0"),
    (lambda: schedules.inverse_gamma(exponent=-1), "exponent is -1"),
    (lambda: schedules.ramp(warm_up=0.5), "schedules.ramp: warm_up is 0.5; it must be at least 1"),
    (lambda: schedules.inverse_gamma(after=-1), "after is -1; it must be a whole number from 0"),
    (lambda: schedules.inverse_gamma(after=1.5), "schedules.inverse_gamma: after is 1.5"),
    (lambda: schedules.ramp(first=-1), "schedules.ramp: first is -1; it must be a whole number"),
    (lambda: schedules.annealing(gamma=0), "schedules.annealing: gamma is 0"),
    (lambda: schedules.saturating(tau=-5), "schedules.saturating: tau is -5"),
    (lambda: schedules.cosine(0.1, 2.0, 10), "schedules.cosine: end is 2.0"),
    (lambda: schedules.cosine(0.1, 0.0, 0), "total_iter is 0"),
    (lambda: schedules.half_life(0), "schedules.half_life: iterations is 0"),
    (lambda: schedules.half_life(10, interval=True), "interval is True"),
    (lambda: schedules.half_life(10, ramp_up=0), "ramp_up is 0"),
    (lambda: schedules.power(0.3), "schedules.power: std is 0.3; it must be at most 0.2887"),
    (lambda: schedules.power(0), "std is 0"),
    (lambda: schedules.composed(0.5, 0), "schedules.composed: interval is 0"),
    (lambda: schedules.composed(2.0, 1), "schedules.composed: momentum is 2.0"),
    (lambda: schedules.composed(math.nan, 1), "schedules.composed: momentum is nan"),
    (lambda: schedules.per_update(schedules.swa(), 0), "schedules.per_update: interval is 0"),
    (lambda: schedules.per_update(schedules.swa(), 1, -1), "begin is -1"),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


NO_SCHEDULES = [
    (lambda: schedules.constant("0.1"), "schedules.constant: momentum is a str; pass a number"),
    (lambda: schedules.half_life(9, counts_itself=1), "counts_itself is a int; pass True or False"),
    (lambda: schedules.composed(None, 2), "schedules.composed: momentum is a NoneType; pass a num"),
    (lambda: schedules.composed(True, 2), "schedules.composed: momentum is a bool; pass a number"),
    (lambda: schedules.composed("x", 2), "schedules.composed: momentum is a str; pass a number"),
    (
        lambda: schedules.composed(schedules.swa, 2),
        "the function schedules.swa itself, which makes",
    ),
    (lambda: schedules.composed(lambda: 0.1, 2), "momentum can't be called with one number"),
    (lambda: schedules.per_update(0.1, 2), "schedules.per_update: schedule is a float; pass a sch"),
    (lambda: schedules.per_update(None), "schedules.per_update: schedule is a NoneType"),
    (lambda: schedules.per_update([schedules.swa()]), "schedules.per_update: schedule is a list"),
    (lambda: schedules.per_update(schedules.constant), "schedule is the function schedules.const"),
    (lambda: schedules.per_update(lambda i, total: i / total), "missing a required argument: 'tot"),
]


@pytest.mark.parametrize(("make", "message"), NO_SCHEDULES, ids=[m for _, m in NO_SCHEDULES])
def test_settings_of_another_type(make, message):
    with pytest.raises(TypeError, match=message):
        make()


@pytest.mark.parametrize("value", [1.5, -0.1, math.nan])
def test_composed_of_a_schedule_outside_of_its_range(value):
    schedule = schedules.composed(lambda i: value, 2)
    with pytest.raises(ValueError, match=f"the momentum of iteration 3 is {value}; it is the wei"):
        schedule(3)


@pytest.mark.parametrize("value", [None, True, "0.1", schedules.swa()])
def test_composed_of_a_schedule_that_returns_no_number(value):
    schedule = schedules.composed(lambda i: value, 2)
    with pytest.raises(TypeError, match=r"composed: the momentum of iteration 1 is a \w+; pass a"):
        schedule(1)


def test_schedules_are_taken_without_being_called():
    class Counting:
        calls = 0

        def __call__(self, iteration, scale=1.0):
            self.calls += 1
            return scale / iteration  # Has no value at 0.

    for schedule in (Counting(), Counting().__call__, math.erf):
        assert 0 <= schedules.per_update(schedule, 2)(7) <= 1
        assert 0 <= schedules.composed(schedule, 2)(1) <= 1
    for silent in (max, type("Silent", (Counting,), {"__signature__": 0})()):
        schedules.per_update(silent)  # They don't tell what they take.
        schedules.composed(silent, 2)
    counting = Counting()
    schedules.per_update(counting)
    schedules.composed(counting, 3)
    assert counting.calls == 0


@pytest.mark.parametrize("is_counted", [True, False])
def test_half_lives_that_ramp_up_are_those_of_the_training_loops(is_counted):
    # EDM2 counts a batch before the update; StyleGAN3 and EDM after it.
    batch, half_life_images, ratio = 32, 500_000, 0.05
    schedule = schedules.half_life(half_life_images / batch, 1, ratio, is_counted)
    images = 0
    for i in range(20_000):
        before, images = images, images + batch
        images_seen = images if is_counted else before
        beta = 0.5 ** (batch / max(min(half_life_images, images_seen * ratio), 1e-8))
        assert schedule(i) == pytest.approx(1 - beta, rel=1e-9, abs=1e-15)
    apart = [abs(schedule(i) - schedules.half_life(1e9, 1, ratio)(i)) for i in range(10, 60)]
    assert (max(apart) > 0.03) is not is_counted


def test_repr_says_what_it_is():
    assert "momentum=0.001" in repr(schedules.constant(0.001))
