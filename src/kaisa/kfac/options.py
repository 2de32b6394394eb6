"""What a user may ask for, one option at a time; a bad one is a ``ConfigurationError`` that says what to give."""

import re
from collections.abc import Sequence

import torch

from kaisa.errors import ConfigurationError
from kaisa.kfac.arrangement import AUTO


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuses a name that is none of the allowed."""
    if value not in allowed:
        raise ConfigurationError(f"{name} is {value!r}; give {' or '.join(map(repr, allowed))}")


def at_least_one(name: str, value: int) -> None:
    """Refuses what is no whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"{name} is {value!r}; give a whole number of at least 1")


def floating(name: str, dtype: torch.dtype) -> None:
    """Refuses a type of whole numbers."""
    if not dtype.is_floating_point:
        raise ConfigurationError(f"{name} is {dtype}; give a floating-point type")


def unit_fraction(name: str, value: float) -> None:
    """Refuses what is not one part of some."""
    if not 0 < value <= 1 or abs(1 / value - round(1 / value)) > 1e-6:
        raise ConfigurationError(f"{name} is {value}; give 1, 1/2, 1/3, 1/4, …")


def patterns(name: str, value: str | Sequence[str] | None) -> list[re.Pattern[str]]:
    """Returns the regular expressions of one text or several."""
    try:
        return [re.compile(pattern) for pattern in ([value] if isinstance(value, str) else value or ())]
    except re.error as error:
        raise ConfigurationError(f"{name} holds no regular expression: {error}") from error


def size_or_auto(name: str, value: int | str) -> int | str:
    """Returns a whole number of at least 0, or "auto"."""
    if value != AUTO and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise ConfigurationError(f"{name} is {value!r}; give a whole number of at least 0, or 'auto'")
    return value


def factor_above_one(name: str, value: float | None) -> float | None:
    """Returns a number above 1, or None."""
    if value is not None and not value > 1:
        raise ConfigurationError(f"{name} is {value}; give a factor above 1")
    return None if value is None else float(value)


def for_the_planner(fraction: str | float, **options: object) -> None:
    """Refuses options of the planner where it has nothing to choose."""
    given = [name for name, value in options.items() if value is not None]
    if given and fraction != AUTO:
        raise ConfigurationError(f"{given[0]} is for the planner; set grad_worker_fraction='auto'")
