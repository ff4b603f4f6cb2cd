"""The averages that a manager keeps of one model: what they are called, how fast each moves."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from fused_ema import _checks, _tracking
from fused_ema.schedules import Schedule

TITLE = "fused_ema.EMAManager"

Momenta = float | Mapping[str, "float | Schedule"] | Sequence[tuple[str, "float | Schedule"]]
"""A constant; or names to constants and schedules, as a dictionary or as pairs."""

# They are keys beside the model's names in a state, where a dot parts one key from the next.
_NAME = re.compile(r"[\w-]+")


@dataclass(frozen=True)
class Averages:
    """Names and momenta, in the order in which they were given.

    Attributes:
        names: Of one that has none: an empty string.
        momenta: Constants, or functions of the iteration.
    """

    names: tuple[str, ...]
    momenta: tuple[float | Schedule, ...]
    _constants: tuple[float, ...] | None = field(init=False)

    def __post_init__(self) -> None:
        constants = tuple(m for m in self.momenta if isinstance(m, float))
        is_all = len(constants) == len(self.momenta)
        object.__setattr__(self, "_constants", constants if is_all else None)

    @classmethod
    def parse(
        cls, momentum: Momenta, momentum_fun: Schedule | None, is_teacher: bool = False
    ) -> Averages:
        """Of what EMAManager is given.

        Args:
            momentum: Its own.
            momentum_fun: Likewise.
            is_teacher: Whether the average is that of a teacher: one, whose momentum may be 1.

        Raises:
            TypeError: A momentum that is neither a number nor a function, a name that is no string.
            ValueError: A constant outside of its range; no average, an odd name or one given twice;
                names beside ``momentum_fun``.

        Warns:
            UserWarning: A constant above 0.5.
        """
        if momentum_fun is not None and not callable(momentum_fun):
            raise TypeError(
                f"{TITLE}: momentum_fun is a {type(momentum_fun).__name__}; pass a function of "
                "the iteration, such as fused_ema.schedules.exponential()"
            )
        given: Any = momentum
        if not isinstance(given, (Mapping, list, tuple)):
            if callable(given):
                raise TypeError(
                    f"{TITLE}: momentum is a function; pass it as momentum_fun=, or with a name: "
                    'momentum={"name": function}'
                )
            is_copy = is_teacher and type(given) in (int, float) and given == 1
            constant = 1.0 if is_copy else _checks.momentum("EMAManager", given)
            if momentum_fun is None:
                _checks.warn_of_decay("EMAManager", constant, stacklevel=3)
            return cls(("",), (constant if momentum_fun is None else momentum_fun,))
        if momentum_fun is not None:
            raise ValueError(
                f"{TITLE}: momentum names averages and momentum_fun is set, too; give each average "
                'its own schedule: momentum={"name": function}'
            )
        if is_teacher:
            raise ValueError(
                f"{TITLE}: momentum names averages, and into= is set; a teacher is one, without "
                "a name: make a manager for it and another for the others"
            )
        pairs = list(given.items() if isinstance(given, Mapping) else given)
        if not pairs:
            raise ValueError(f"{TITLE}: momentum is empty; name at least one average")
        names: list[str] = []
        momenta: list[float | Schedule] = []
        for pair in pairs:
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise TypeError(
                    f"{TITLE}: momentum holds a {type(pair).__name__}; pass a dictionary of names "
                    "to momenta, or pairs of both"
                )
            name, one = pair
            _check_name(name)
            if name in names:
                raise ValueError(
                    f"{TITLE}: momentum has two averages named '{name}', with "
                    f"{momenta[names.index(name)]} and {one}; give each a name of its own"
                )
            names.append(name)
            momenta.append(_momentum_of(name, one))
        return cls(tuple(names), tuple(momenta))

    @property
    def is_named(self) -> bool:
        """Whether they have names: one without is the manager's alone."""
        return self.names != ("",)

    def index(self, op: str, name: str | None) -> int:
        """Where an average stands.

        Args:
            op: For errors.
            name: None for the only one.

        Raises:
            TypeError: The name is no string.
            ValueError: There is none of that name, or there are several and no name was given.
        """
        if name is None:
            if len(self.names) > 1:
                raise ValueError(
                    f"{TITLE}.{op}: the manager keeps {len(self.names)} averages, "
                    f"{_tracking.shown(self.names)}; pass the name of one"
                )
            return 0
        if not isinstance(name, str):
            raise TypeError(f"{TITLE}.{op}: the name is a {type(name).__name__}; pass a string")
        if not self.is_named:
            raise ValueError(
                f"{TITLE}.{op}: there is no average '{name}': the manager keeps one, which has no "
                'name; leave it out, or make the manager with momentum={"name": momentum}'
            )
        if name not in self.names:
            raise ValueError(
                f"{TITLE}.{op}: there is no average '{name}'; there are "
                f"{_tracking.shown(self.names)}"
            )
        return self.names.index(name)

    def momenta_at(self, iteration: int) -> Sequence[float]:
        """One for each, at a 0-based iteration. Raises what momentum_at() raises."""
        if self._constants is not None:
            return self._constants
        if len(self.momenta) == 1:
            return (self.momentum_at(0, iteration),)
        return [self.momentum_at(i, iteration) for i in range(len(self.momenta))]

    def momentum_at(self, index: int, iteration: int) -> float:
        """That of one of them.

        Raises:
            TypeError: Its function returned no number.
            ValueError: Its function returned a number outside of [0, 1].
        """
        given = self.momenta[index]
        if isinstance(given, float):
            return given
        momentum: Any = given(iteration)
        if type(momentum) is float and 0.0 <= momentum <= 1.0:
            return momentum  # Nearly always; what follows takes a fifth of an update's time.
        if isinstance(momentum, bool) or not isinstance(momentum, (float, Real)):
            raise TypeError(
                f"{TITLE}: {self._function(index)}({iteration}) returned a "
                f"{type(momentum).__name__}; it must return a number"
            )
        if not 0.0 <= float(momentum) <= 1.0:  # false for NaN too
            raise ValueError(
                f"{TITLE}: {self._function(index)}({iteration}) returned {momentum}; it is the "
                "weight of the new value and must be in [0, 1]"
            )
        return float(momentum)

    def _function(self, index: int) -> str:
        return f"momentum['{self.names[index]}']" if self.is_named else "momentum_fun"

    def is_constant(self, index: int) -> bool:
        """Whether its momentum is the same at every iteration."""
        return isinstance(self.momenta[index], float)

    def shown(self) -> object:
        """For a ``repr``: the momentum, or the dictionary of them."""
        if not self.is_named:
            return self.momenta[0]
        return dict(zip(self.names, self.momenta, strict=True))

    def settings(self) -> str:
        """For what ranks must have in common: functions can't be compared."""
        texts = [str(m) if isinstance(m, float) else "a function" for m in self.momenta]
        if not self.is_named:
            return texts[0]
        return ", ".join(f"{n}: {text}" for n, text in zip(self.names, texts, strict=True))


def refuse_several(title: str, momentum: object) -> None:
    """Raises ValueError where somebody names averages who is to keep one."""
    if isinstance(momentum, (Mapping, list, tuple)):
        raise ValueError(
            f"{title}: momentum names averages, and this keeps one, without a name; pass a number, "
            "or momentum_fun=, and keep others in an EMAManager of your own"
        )


def _check_name(name: object) -> None:
    if not isinstance(name, str):
        raise TypeError(
            f"{TITLE}: momentum has an average whose name is a {type(name).__name__}; pass strings"
        )
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{TITLE}: momentum has an average named {name!r}; a name has letters, digits, '_' and "
            "'-', and at least one of them"
        )


def _momentum_of(name: str, given: object) -> float | Schedule:
    what = f"momentum['{name}']"
    if callable(given):
        schedule: Schedule = given
        return schedule
    constant = _checks.momentum("EMAManager", given, what)  # type: ignore[arg-type]
    _checks.warn_of_decay("EMAManager", constant, stacklevel=4, name=what)
    return constant
