"""A number, or a function of the step; resolved in one place.

    Schedule("damping", 0.003, POSITIVE).resolve(step)               # 0.003 at every step
    Schedule("damping", lambda step: 0.99**step, POSITIVE).resolve(step)

A number is checked when the schedule is made, a function each time it is asked: no value outside
its range is ever used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

from kaisa.errors import ConfigurationError

Scalar = float | Callable[[int], float]


@dataclass(frozen=True)
class Range:
    """The values that an option may take.

    Attributes:
        words: the range as an error message says it.
        lowest: the smallest value.
        highest: the largest value.
        excludes_lowest: whether `lowest` itself is refused.
        excludes_highest: whether `highest` itself is refused.
        whole: whether only whole numbers are taken.
    """

    words: str
    lowest: float = -math.inf
    highest: float = math.inf
    excludes_lowest: bool = False
    excludes_highest: bool = False
    whole: bool = False

    def __contains__(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, Real):
            return False
        number = float(value)
        if not math.isfinite(number) or (self.whole and not number.is_integer()):
            return False
        above = number > self.lowest if self.excludes_lowest else number >= self.lowest
        below = number < self.highest if self.excludes_highest else number <= self.highest
        return above and below


POSITIVE = Range("a positive number", lowest=0.0, excludes_lowest=True)
NON_NEGATIVE = Range("zero or a positive number", lowest=0.0)
FRACTION = Range("a number above 0 and at most 1", lowest=0.0, highest=1.0, excludes_lowest=True)
DECAY = Range("a number of at least 0 and below 1", lowest=0.0, highest=1.0, excludes_highest=True)
STEPS = Range("a whole number of at least 1", lowest=1, whole=True)


@dataclass(frozen=True)
class Schedule:
    """One option of the training step, constant or a function of the step.

    Attributes:
        name: the option as the user calls it; errors begin with it.
        value: a number, or a function from the step (0 at first) to a number.
        allowed: the range that every value must lie in.

    Raises:
        ConfigurationError: the number is out of range, or the value is neither number nor function.
    """

    name: str
    value: Scalar
    allowed: Range

    def __post_init__(self) -> None:
        if not callable(self.value):
            self._checked(self.value)

    def resolve(self, step: int) -> float:
        """Return the value at a step.

        Raises:
            ConfigurationError: the function returned a value out of range.
        """
        if callable(self.value):
            return self._checked(self.value(step), f" at step {step}")
        return self.value

    def resolve_steps(self, step: int) -> int:
        """Return the value at a step as the whole number that an interval is."""
        return int(self.resolve(step))

    def _checked(self, value: float, when: str = "") -> float:
        if value not in self.allowed:
            raise ConfigurationError(f"{self.name} is {value!r}{when}; give {self.allowed.words}")
        return value
