"""Clopper and Pearson's bounds against the sum that defines them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kaisa.assure.evidence.held_out import HeldOut, lower_bound, upper_bound
from kaisa.errors import ConfigurationError, DataError


def chance_of_at_most(errors: int, tests: int, p: float) -> float:
    return math.fsum(math.comb(tests, k) * p**k * (1 - p) ** (tests - k) for k in range(errors + 1))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 60), st.floats(0.5, 0.999), st.data())
def test_at_the_bound_so_few_errors_have_the_chance_that_is_left(
    tests: int, belief: float, data: st.DataObject
) -> None:
    errors = data.draw(st.integers(0, tests - 1))
    assert chance_of_at_most(errors, tests, upper_bound(errors, tests, belief)) == pytest.approx(1 - belief, rel=1e-8)
    lowest = lower_bound(tests - errors, tests, belief)
    assert lowest == pytest.approx(1 - upper_bound(errors, tests, belief), rel=1e-9)


def test_without_errors_it_is_the_rule_of_three() -> None:
    assert upper_bound(0, 1000, 0.95) == pytest.approx(1 - 0.05**0.001, rel=1e-12)


def test_large_numbers_stay_finite() -> None:
    assert upper_bound(0, 10**9, 0.95) == pytest.approx(-math.log(0.05) / 1e9, rel=1e-6)


def test_a_finding_says_what_it_means_for_the_prior() -> None:
    found = HeldOut(errors=3, tests=1000, belief=0.9)
    assert found.quantile == (upper_bound(3, 1000, 0.9), 0.9)
    assert found.statement == "3 of 1000 held-out demands failed: at most 0.00667 a demand, with confidence 0.9"
    assert HeldOut(errors=5, tests=5).quantile is None


@pytest.mark.parametrize(("errors", "tests"), [(2, 1), (-1, 3)])
def test_counts_that_cannot_be_are_refused(errors: int, tests: int) -> None:
    with pytest.raises(DataError, match="count again"):
        HeldOut(errors, tests)


def test_a_confidence_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="belief is 1"):
        HeldOut(0, 10, 1.0)
