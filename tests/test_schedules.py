from __future__ import annotations

import math
import re

import pytest

from kaisa.errors import ConfigurationError
from kaisa.schedules import DECAY, FRACTION, NON_NEGATIVE, POSITIVE, STEPS, Range, Schedule

RANGES: dict[str, tuple[Range, list[float], list[float]]] = {
    "positive": (POSITIVE, [1e-12, 1, 1e9], [0, -1e-12, math.nan, math.inf]),
    "non-negative": (NON_NEGATIVE, [0, 0.5], [-1e-12, math.nan, math.inf]),
    "fraction": (FRACTION, [1e-3, 1], [0, 1.0001, -1]),
    "decay": (DECAY, [0, 0.999], [1, -0.1, math.nan]),
    "steps": (STEPS, [1, 10, 3.0], [0, 2.5, -1, math.inf]),
}


@pytest.mark.parametrize(("allowed", "good", "bad"), RANGES.values(), ids=RANGES)
def test_a_range_takes_what_it_says_and_nothing_else(allowed: Range, good: list[float], bad: list[float]) -> None:
    assert all(value in allowed for value in good)
    assert not any(value in allowed for value in bad)


@pytest.mark.parametrize("value", [True, "0.1", None, [0.1]])
def test_only_numbers_lie_in_a_range(value: object) -> None:
    assert value not in POSITIVE


def test_a_number_is_the_same_at_every_step() -> None:
    assert [Schedule("damping", 0.5, POSITIVE).resolve(step) for step in (0, 7)] == [0.5, 0.5]


def test_a_function_is_asked_at_every_step() -> None:
    halving = Schedule("damping", lambda step: 0.5**step, POSITIVE)
    assert [halving.resolve(step) for step in range(3)] == [1.0, 0.5, 0.25]


def test_an_interval_is_a_whole_number() -> None:
    interval = Schedule("factor_update_steps", 3.0, STEPS).resolve_steps(0)
    assert interval == 3
    assert isinstance(interval, int)


def test_a_bad_number_is_refused_at_once() -> None:
    expected = re.escape("damping is -1; give a positive number")
    with pytest.raises(ConfigurationError, match=expected):
        Schedule("damping", -1, POSITIVE)


def test_a_function_that_leaves_the_range_is_refused_with_its_step() -> None:
    falling = Schedule("damping", lambda step: 1.0 - step, POSITIVE)
    assert falling.resolve(0) == 1.0
    with pytest.raises(ConfigurationError, match=r"damping is -1.0 at step 2; give a positive"):
        falling.resolve(2)


def test_errors_are_caught_by_the_built_in_types_too() -> None:
    with pytest.raises(ValueError, match="damping"):
        Schedule("damping", "much", POSITIVE)  # type: ignore[arg-type]
