"""Momentum schedules: pure functions from a 0-based iteration to the weight of the new value.

Each function here checks its settings and returns the schedule, which keeps no state: a resumed run
has the momentum of the uninterrupted one. Pass it to
:class:`fused_ema.EMAManager` as ``momentum_fun``.

A decay ``d`` of another library is ``1 - m`` here. ``M`` is the momentum that a schedule comes to
rest at, ``i`` the iteration. Libraries that count updates instead of iterations agree with these
functions at an interval of 1; at others, wrap them in :func:`per_update`. Schedules print what they
are, and pickle.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial

from fused_ema._checks import count, fraction, positive

Schedule = Callable[[int], float]
"""Iteration, from 0, to the momentum of an update there, in [0, 1]."""

__all__ = [
    "Schedule",
    "annealing",
    "composed",
    "constant",
    "cosine",
    "debiased",
    "exponential",
    "half_life",
    "inverse_gamma",
    "linear",
    "per_update",
    "power",
    "ramp",
    "saturating",
    "swa",
]


class _Schedule(partial[float]):
    """A function of this module and its settings."""

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self.keywords.items())
        return f"<schedules.{self.func.__name__[1:]}{': ' if settings else ''}{settings}>"


def constant(momentum: float = 0.0002) -> Schedule:
    """``m(i) = M``.

    Args:
        momentum: M, in [0, 1].

    Raises:
        ValueError: A setting outside of its range.

    Example:
        >>> constant(0.001)(7)
        0.001
    """
    return _Schedule(_constant, momentum=fraction("schedules.constant", "momentum", momentum))


def debiased(momentum: float = 0.0002) -> Schedule:
    """``m(i) = M / (1 - (1 - M) ** (i + 1))``: from 1 to M, as if the average had begun at zero.

    The average that starts from zeros and is divided by ``1 - (1 - M) ** t`` after t updates, as
    Adam corrects its moments, for runs that start from noise: what the model started with has no
    weight in it. Here the first update copies, and each later one is the same weighted mean, up to
    rounding. For an interval or a begin, :func:`per_update`.

    Source: D. Kingma and J. Ba, Adam: A Method for Stochastic Optimization, 2015, section 3.

    Args:
        momentum: M, in (0, 1].

    Raises:
        ValueError: A setting outside of its range.

    Example:
        >>> debiased(0.5)(0), debiased(0.5)(1)
        (1.0, 0.6666666666666666)
    """
    checked = fraction("schedules.debiased", "momentum", momentum)
    return _Schedule(_debiased, momentum=positive("schedules.debiased", "momentum", checked))


def _debiased(iteration: int, momentum: float) -> float:
    if momentum == 1:
        return 1.0
    # expm1 and log1p: 1 - (1 - M) ** t would lose all digits of a small M.
    return min(1.0, momentum / -math.expm1((iteration + 1) * math.log1p(-momentum)))


def exponential(momentum: float = 0.0002, total_iter: float = 2000) -> Schedule:
    """``m(i) = (1 - M) * exp(-(1 + i) / total_iter) + M``: falls from near 1 to M.

    Source: the ExpMomentumEMAHook of OpenMMLab's MMDetection 2.x, whose defaults these are. Also
    the decay ``D * (1 - exp(-n / tau))`` of YOLOv5, YOLOX and Ultralytics, which count n from 1;
    :func:`saturating` counts it from 0.

    Args:
        momentum: M, in [0, 1].
        total_iter: Iterations until the distance to M has shrunk by e. More than 0.

    Raises:
        ValueError: A setting outside of its range.

    Example:
        >>> [round(exponential()(i), 5) for i in (0, 1000, 20000)]
        [0.9995, 0.60631, 0.00025]
    """
    return _Schedule(
        _exponential,
        momentum=fraction("schedules.exponential", "momentum", momentum),
        total_iter=positive("schedules.exponential", "total_iter", total_iter),
    )


def linear(momentum: float = 0.0002, warm_up: float = 100, interval: int = 1) -> Schedule:
    """``m(i) = min(M ** interval, (1 + i) / (warm_up + i))``.

    Source: the LinearMomentumEMAHook of OpenMMLab's MMDetection 2.x, whose defaults these are. Two
    traps are kept with it. The ramp starts at ``1 / warm_up``, far above the usual M, so it binds
    only for a ``warm_up`` above ``1 / M``. And ``M ** interval`` goes the wrong way: an update
    every k iterations needs a larger momentum, ``1 - (1 - M) ** k``, which is what :func:`composed`
    gives.

    Args:
        momentum: M, in [0, 1].
        warm_up: More than 0.
        interval: The interval of the updates, a whole number from 1.

    Raises:
        ValueError: A setting outside of its range.

    Example:
        >>> [linear(0.5, warm_up=4)(i) for i in range(4)]
        [0.25, 0.4, 0.5, 0.5]
    """
    return _Schedule(
        _linear,
        limit=fraction("schedules.linear", "momentum", momentum)
        ** count("schedules.linear", "interval", interval, 1),
        warm_up=positive("schedules.linear", "warm_up", warm_up),
    )


def inverse_gamma(
    momentum: float = 1e-4,
    gamma: float = 1.0,
    exponent: float = 2 / 3,
    max_momentum: float = 1.0,
    after: int | None = None,
) -> Schedule:
    """``m(i) = (1 + i / gamma) ** -exponent``, within ``[M, max_momentum]``.

    With ``after=k`` 1 up to iteration k, a copy, and then ``(1 + (i - k) / gamma) ** -exponent``
    within the same bounds.

    Source: the warm-up of timm's ModelEmaV3, diffusers' EMAModel and ema-pytorch (decay ``1 - (1 +
    t / inv_gamma) ** -power``), whose defaults these are; their ``update_after_step`` is ``after``,
    by default 0 with the first two and 100 with ema-pytorch. ema-pytorch updates at iterations 0,
    k, 2 k for its ``update_every=k``: offer it ``update(iteration=i + k - 1)``, and add ``k - 1``
    to ``after``. With gamma 1, an exponent of 2/3 suits runs of a million iterations and 3/4
    shorter ones: momentum 1e-4 is reached at 1,000,000 and at 215,443.

    Args:
        momentum: M, the least momentum, in [0, max_momentum].
        gamma: Iterations. More than 0.
        exponent: More than 0.
        max_momentum: In [0, 1].
        after: The last iteration that copies, a whole number from 0; None for none.

    Raises:
        ValueError: A setting outside of its range.

    Example:
        >>> [round(inverse_gamma()(i), 4) for i in (0, 1, 7, 999, 10**7)]
        [1.0, 0.63, 0.25, 0.01, 0.0001]
    """
    low = fraction("schedules.inverse_gamma", "momentum", momentum)
    high = fraction("schedules.inverse_gamma", "max_momentum", max_momentum)
    if low > high:
        raise ValueError(
            f"fused_ema.schedules.inverse_gamma: momentum is {momentum} but max_momentum is "
            f"{max_momentum}; the momentum falls from the second to the first"
        )
    return _Schedule(
        _inverse_gamma,
        low=low,
        high=high,
        gamma=positive("schedules.inverse_gamma", "gamma", gamma),
        exponent=positive("schedules.inverse_gamma", "exponent", exponent),
        after=None if after is None else count("schedules.inverse_gamma", "after", after, 0),
    )


def ramp(momentum: float = 1e-4, warm_up: float = 10, first: int = 0) -> Schedule:
    """``m(i) = max(M, (warm_up - 1) / (warm_up + n))`` with ``n = i + first``.

    Source: the decay ``min(D, (1 + n) / (10 + n))`` of TensorFlow's ExponentialMovingAverage,
    which torch_ema, diffusers and the LitEma of latent diffusion models took over. torch_ema and
    LitEma count n from 1; diffusers counts it from 0, and copies there.

    Args:
        momentum: M, the least momentum, in [0, 1].
        warm_up: The 10 of the formula, at least 1.
        first: The n of iteration 0, a whole number from 0.

    Raises:
        ValueError: A setting outside of its range.

    Example:
        >>> [round(ramp()(i), 5) for i in (0, 8, 990, 10**6)]
        [0.9, 0.5, 0.009, 0.0001]
    """
    if positive("schedules.ramp", "warm_up", warm_up) < 1:
        raise ValueError(f"fused_ema.schedules.ramp: warm_up is {warm_up}; it must be at least 1")
    return _Schedule(
        _ramp,
        momentum=fraction("schedules.ramp", "momentum", momentum),
        warm_up=float(warm_up),
        first=count("schedules.ramp", "first", first, 0),
    )


def annealing(momentum: float = 0.0002, gamma: float = 100) -> Schedule:
    """``m(i) = max(M, gamma / (gamma + i))``.

    Source: the MomentumAnnealingEMA of OpenMMLab's MMEngine, whose defaults these are.

    Args:
        momentum: M, the least momentum, in [0, 1].
        gamma: Iterations until the momentum is a half. More than 0.

    Raises:
        ValueError: A setting outside of its range.

    Example:
        >>> [annealing()(i) for i in (0, 100, 300, 10**6)]
        [1.0, 0.5, 0.25, 0.0002]
    """
    return _Schedule(
        _annealing,
        momentum=fraction("schedules.annealing", "momentum", momentum),
        gamma=positive("schedules.annealing", "gamma", gamma),
    )


def saturating(momentum: float = 1e-4, tau: float = 2000) -> Schedule:
    """``m(i) = 1 - (1 - M) * (1 - exp(-i / tau))``: from 1, a copy, down to M.

    Source: the decay ``D * (1 - exp(-n / tau))`` of YOLOv5, YOLOX and Ultralytics, with their
    defaults, from n = 0. They count n from 1, which is :func:`exponential`.

    Args:
        momentum: M, in [0, 1].
        tau: Iterations until the distance to M has shrunk by e. More than 0.

    Raises:
        ValueError: A setting outside of its range.

    Example:
        >>> [round(saturating()(i), 5) for i in (0, 2000, 50000)]
        [1.0, 0.36794, 0.0001]
    """
    return _Schedule(
        _saturating,
        momentum=fraction("schedules.saturating", "momentum", momentum),
        tau=positive("schedules.saturating", "tau", tau),
    )


def cosine(start: float, end: float, total_iter: float) -> Schedule:
    """``m(i) = end + (start - end) * (1 + cos(pi * i / total_iter)) / 2``, then ``end``.

    Source: the teacher momentum of BYOL and DINO. DINOv2's decay from 0.992 to 1 is
    ``cosine(0.008, 0.0, total_iter)``.

    Args:
        start: The momentum at iteration 0, in [0, 1].
        end: The momentum from ``total_iter`` on, in [0, 1].
        total_iter: Iterations. More than 0.

    Raises:
        ValueError: A setting outside of its range.

    Example:
        >>> [round(cosine(0.008, 0.0, 100)(i), 6) for i in (0, 50, 100, 200)]
        [0.008, 0.004, 0.0, 0.0]
    """
    return _Schedule(
        _cosine,
        start=fraction("schedules.cosine", "start", start),
        end=fraction("schedules.cosine", "end", end),
        total_iter=positive("schedules.cosine", "total_iter", total_iter),
    )


def swa() -> Schedule:
    """``m(i) = 1 / (i + 1)``: the ema is the plain mean of all params so far.

    Source: stochastic weight averaging (Izmailov et al. 2018), as torch.optim.swa_utils and
    MMEngine's StochasticWeightAverage compute it. The first update replaces the start value. With
    an interval or a later begin: ``per_update(swa(), interval, begin)``.

    Example:
        >>> [swa()(i) for i in range(4)]
        [1.0, 0.5, 0.3333333333333333, 0.25]
    """
    return _Schedule(_swa)


def half_life(
    iterations: float,
    interval: int = 1,
    ramp_up: float | None = None,
    counts_itself: bool = True,
) -> Schedule:
    """``m(i) = 1 - 2 ** (-interval / H)``: after H iterations an old value weighs half.

    With ``ramp_up`` the half-life is ``H = min(iterations, ramp_up * n)``, where n is ``i + 1``, or
    without ``counts_itself`` ``i + 1 - interval``; where H is 0, m is 1, a copy.

    Source: Composer's EMA (constant H); with ``ramp_up`` EDM2's TraditionalEMA, which counts the
    update's own images (ramp_up 0.09); without ``counts_itself`` the training loops of StyleGAN3
    and EDM, which count them after the update (0.05). To count images or tokens, divide by how many
    of them an iteration has.

    Args:
        iterations: The half-life, in iterations. More than 0.
        interval: Iterations from update to update, a whole number from 1.
        ramp_up: The half-life is at most this fraction of the iterations so far. More than 0, or
            None for none.
        counts_itself: Whether the iterations so far include those of the update itself. The momenta
            of the first dozens of iterations differ by up to 0.04.

    Raises:
        TypeError: ``counts_itself`` is neither True nor False.
        ValueError: A setting outside of its range.

    Example:
        >>> round(half_life(1000)(0), 6), round(half_life(1000, interval=1000)(0), 6)
        (0.000693, 0.5)
    """
    if not isinstance(counts_itself, bool):
        raise TypeError(
            "fused_ema.schedules.half_life: counts_itself is a "
            f"{type(counts_itself).__name__}; pass True or False"
        )
    return _Schedule(
        _half_life,
        iterations=positive("schedules.half_life", "iterations", iterations),
        interval=count("schedules.half_life", "interval", interval, 1),
        ramp_up=None if ramp_up is None else positive("schedules.half_life", "ramp_up", ramp_up),
        counts_itself=counts_itself,
    )


def power(std: float = 0.10, interval: int = 1) -> Schedule:
    """``m(i) = 1 - (1 - interval / t) ** (gamma + 1)``, ``t = max(i + 1, interval)``.

    Averages with weights that grow as ``t ** gamma``, so that the width of what is averaged stays
    the same fraction of the run, however long that gets.

    Source: the power function EMA of Karras et al. 2024, "Analyzing and Improving the Training
    Dynamics of Diffusion Models" (EDM2), where 0.05 and 0.10 are the values; std and gamma are tied
    by ``std ** 2 = (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))``.

    Args:
        std: The standard deviation of the averaged times, as a fraction of the run: above 0, and
            at most ``12 ** -0.5``, where gamma is 0 and all iterations weigh the same.
        interval: Iterations from update to update, a whole number from 1.

    Raises:
        ValueError: A setting outside of its range.

    Example:
        >>> [round(power(0.10)(i), 5) for i in (0, 1, 99, 9999)]
        [1.0, 0.99592, 0.07667, 0.00079]
    """
    return _Schedule(
        _power,
        exponent=_gamma_of_std(positive("schedules.power", "std", std)) + 1,
        interval=count("schedules.power", "interval", interval, 1),
    )


def composed(momentum: float | Schedule, interval: int) -> Schedule:
    """``m(i) = 1 - (1 - M) ** interval``: one update that weighs like one at every iteration.

    What an interval above 1 needs to keep the time constant: so many updates with M leave ``(1 - M)
    ** interval`` of the old value. M may be a schedule, which is then asked at the iteration of the
    update.

    Args:
        momentum: M, in [0, 1], or a schedule.
        interval: Iterations from update to update, a whole number from 1.

    Raises:
        TypeError: M is neither a number nor a schedule. From the schedule made here: M returned no
            number.
        ValueError: A setting outside of its range. From the schedule made here: M returned a number
            outside of [0, 1].

    Example:
        >>> round(composed(0.0002, interval=10)(9), 8)
        0.0019982
    """
    where = "schedules.composed"
    if callable(momentum):
        schedule = _schedule(where, "momentum", momentum)
    else:
        schedule = _Schedule(_constant, momentum=fraction(where, "momentum", momentum))
    return _Schedule(_composed, schedule=schedule, interval=count(where, "interval", interval, 1))


def per_update(schedule: Schedule, interval: int = 1, begin: int = 0) -> Schedule:
    """A schedule asked with the number of updates so far instead of the iteration.

    For an EMAManager with that interval and begin; its first update has number 0.

    Args:
        schedule: A function of the number of updates, from 0.
        interval: Iterations from update to update, a whole number from 1.
        begin: The iteration from which on updates run, a whole number from 0.

    Raises:
        TypeError: No function of one number.
        ValueError: A setting outside of its range.

    Example:
        >>> [per_update(swa(), interval=5)(i) for i in (4, 9, 14, 19)]
        [1.0, 0.5, 0.3333333333333333, 0.25]
    """
    interval = count("schedules.per_update", "interval", interval, 1)
    begin = count("schedules.per_update", "begin", begin, 0)
    return _Schedule(
        _per_update,
        schedule=_schedule("schedules.per_update", "schedule", schedule),
        interval=interval,
        first=(begin + interval) // interval,
    )


def _schedule(where: str, name: str, given: Schedule) -> Schedule:
    """A function of one number. It isn't called: it may have no value but where it is needed."""
    if not callable(given):
        raise TypeError(
            f"fused_ema.{where}: {name} is a {type(given).__name__}; pass a schedule, such as "
            "fused_ema.schedules.swa()"
        )
    made_here = [maker for maker in __all__ if globals()[maker] is given]
    if made_here:
        raise TypeError(
            f"fused_ema.{where}: {name} is the function schedules.{made_here[0]} itself, which "
            "makes schedules; call it, and pass what it returns"
        )
    try:
        signature = inspect.signature(given)
    except (TypeError, ValueError):  # It is written in C, say, and doesn't tell.
        return given
    try:
        signature.bind(0)
    except TypeError as error:
        raise TypeError(
            f"fused_ema.{where}: {name} can't be called with one number, the iteration ({error}); "
            "pass a function of it"
        ) from error
    return given


# ---- what the schedules compute


def _constant(iteration: int, *, momentum: float) -> float:
    return momentum


def _exponential(iteration: int, *, momentum: float, total_iter: float) -> float:
    return (1 - momentum) * math.exp(-(1 + iteration) / total_iter) + momentum


def _linear(iteration: int, *, limit: float, warm_up: float) -> float:
    return min(limit, (1 + iteration) / (warm_up + iteration))


def _inverse_gamma(
    iteration: int,
    *,
    low: float,
    high: float,
    gamma: float,
    exponent: float,
    after: int | None = None,
) -> float:
    if after is not None:
        if iteration <= after:
            return 1.0
        iteration -= after
    return min(high, max(low, math.pow(1 + iteration / gamma, -exponent)))


def _ramp(iteration: int, *, momentum: float, warm_up: float, first: int = 0) -> float:
    return max(momentum, (warm_up - 1) / (warm_up + iteration + first))


def _annealing(iteration: int, *, momentum: float, gamma: float) -> float:
    return max(momentum, gamma / (gamma + iteration))


def _saturating(iteration: int, *, momentum: float, tau: float) -> float:
    return (1 - momentum) * math.exp(-iteration / tau) + momentum


def _cosine(iteration: int, *, start: float, end: float, total_iter: float) -> float:
    part = min(1.0, iteration / total_iter)
    return end + (start - end) * (1 + math.cos(math.pi * part)) / 2


def _swa(iteration: int) -> float:
    return 1 / (iteration + 1)


def _half_life(
    iteration: int,
    *,
    iterations: float,
    interval: int,
    ramp_up: float | None,
    counts_itself: bool = True,
) -> float:
    if ramp_up is not None:
        so_far = iteration + 1 if counts_itself else iteration + 1 - interval
        iterations = min(iterations, ramp_up * so_far)
        if iterations <= 0:
            return 1.0
    return -math.expm1(-interval / iterations * math.log(2))


def _power(iteration: int, *, exponent: float, interval: int) -> float:
    # log1p and expm1: near the end of a long run 1 - x**y would keep few digits.
    part = interval / max(iteration + 1, interval)
    return 1.0 if part == 1 else -math.expm1(exponent * math.log1p(-part))


def _composed(iteration: int, *, schedule: Schedule, interval: int) -> float:
    where = "schedules.composed"
    momentum = fraction(where, f"the momentum of iteration {iteration}", schedule(iteration))
    return 1.0 if momentum == 1 else -math.expm1(interval * math.log1p(-momentum))


def _per_update(iteration: int, *, schedule: Schedule, interval: int, first: int) -> float:
    return schedule(max(0, (iteration + 1) // interval - first))


def _gamma_of_std(std: float) -> float:
    """The gamma >= 0 whose power function has that standard deviation, relative to its length."""

    def std_of(gamma: float) -> float:
        return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)

    if std > std_of(0.0):
        raise ValueError(
            f"fused_ema.schedules.power: std is {std}; it must be at most {std_of(0.0):.4f}, that "
            "of a plain mean's weights"
        )
    low, high = 0.0, 1 / std  # std_of falls with gamma and is below 1 / (gamma + 2).
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if std_of(middle) > std else (low, middle)
    return low
