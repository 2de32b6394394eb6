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


def chance_of_at_least(errors: int, tests: int, p: float) -> float:
    return 1 - chance_of_at_most(errors - 1, tests, p)


@pytest.mark.parametrize(("errors", "tests", "belief"), [(3, 60, 0.95), (1, 9, 0.5), (20, 40, 0.99)])
def test_of_both_sides_each_has_half_of_the_chance_that_is_left(errors: int, tests: int, belief: float) -> None:
    found = HeldOut(errors, tests, belief, sides="both")
    half = (1 - belief) / 2
    assert chance_of_at_most(errors, tests, found.value) == pytest.approx(half, rel=1e-8)
    assert chance_of_at_least(errors, tests, found.least) == pytest.approx(half, rel=1e-8)
    assert found.quantile == (found.value, pytest.approx(1 - half))
    assert found.at_most == (found.least, pytest.approx(half))
    assert found.quantile[1] - found.at_most[1] == pytest.approx(belief)
    assert f"from {found.least:.3g} to {found.value:.3g} a demand" in found.statement
    assert f"at least {belief:g}" in found.assumptions[-1]


def test_both_sides_cover_the_truth_as_often_as_they_say() -> None:
    """Over all outcomes of a test, by the binomial sum: Clopper and Pearson's interval is never too short."""
    for p in (0.01, 0.1, 0.37):
        covered = 0.0
        for errors in range(41):
            found = HeldOut(errors, 40, 0.9, sides="both")
            covered += (found.least <= p <= found.value) * math.comb(40, errors) * p**errors * (1 - p) ** (40 - errors)
        assert 0.9 <= covered < 1


def test_a_side_that_says_nothing_is_left_out() -> None:
    assert HeldOut(0, 50, sides="both").at_most is None
    assert HeldOut(50, 50, sides="both").quantile is None
    assert HeldOut(5, 50).at_most is None
    assert len(HeldOut(5, 50).assumptions) == 3


def test_sides_that_are_none_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="sides is 'left'; choose from upper, both"):
        HeldOut(0, 10, sides="left")  # type: ignore[arg-type]


@pytest.mark.parametrize(("errors", "tests"), [(2, 1), (-1, 3)])
def test_counts_that_cannot_be_are_refused(errors: int, tests: int) -> None:
    with pytest.raises(DataError, match="count again"):
        HeldOut(errors, tests)


def test_a_confidence_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="belief is 1"):
        HeldOut(0, 10, 1.0)
