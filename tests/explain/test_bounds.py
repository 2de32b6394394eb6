"""Bounds of a probability: published values, ends, and that they hold as often as they say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kaisa.explain import bounds


def test_bounds_are_the_published_ones(golden: dict[str, Any]) -> None:
    for case in golden["anchors"]["kl_bounds"]:
        arguments = (case["mean"], case["n"], case["beta"])
        assert float(bounds.upper(*arguments)) == pytest.approx(case["ub"], rel=1e-9)
        assert float(bounds.lower(*arguments)) == pytest.approx(case["lb"], rel=1e-9)


def test_the_level_of_exploration_is_the_published_one(golden: dict[str, Any]) -> None:
    for case in golden["anchors"]["lucb_beta"]:
        assert bounds.exploration(case["n_features"], case["t"], case["delta"]) == pytest.approx(case["beta"], rel=1e-9)


@settings(deadline=None, max_examples=60)
@given(hits=st.integers(0, 300), misses=st.integers(0, 100_000), beta=st.floats(0.05, 20))
def test_bounds_lie_where_the_divergence_is_what_is_allowed(hits: int, misses: int, beta: float) -> None:
    trials = hits + misses
    mean = hits / trials if trials else 0.5
    low, high = float(bounds.lower(mean, trials, beta)), float(bounds.upper(mean, trials, beta))
    assert 0 <= low <= mean <= high <= 1
    for bound in (low, high):
        if trials and 0 < bound < 1:
            found = trials * float(bounds.divergence(np.float64(mean), np.float64(bound)))
            assert found == pytest.approx(beta, rel=1e-6, abs=1e-8)


def test_nothing_but_the_whole_range_is_known_without_trials() -> None:
    assert (float(bounds.lower(0.5, 0, 1.0)), float(bounds.upper(0.5, 0, 1.0))) == (0.0, 1.0)


def test_certainty_at_an_end_stays_at_that_end() -> None:
    assert float(bounds.upper(1.0, 10, 1.0)) == 1.0
    assert float(bounds.lower(0.0, 10, 1.0)) == 0.0
    assert float(bounds.lower(1.0, 10, 1.0)) == pytest.approx(np.exp(-0.1), rel=1e-9)


def test_a_bound_is_missed_no_more_often_than_it_says() -> None:
    random = np.random.default_rng(0)
    probability, trials, beta = 0.9, 80, np.log(1 / 0.1)
    means = random.binomial(trials, probability, 4000) / trials
    missed = (bounds.lower(means, trials, beta) > probability).mean()
    assert 0.005 < missed <= 0.1
