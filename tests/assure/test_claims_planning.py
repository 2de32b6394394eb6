"""Planning: what a claim still needs, what it can bear, and systems that follow others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from kaisa.assure.claims import Question, ask, confidence
from kaisa.assure.claims_old_system import OldSystem, confidence_as_successor
from kaisa.assure.claims_planning import demands_needed, failure_free_demands, failures_borne, smallest_bound
from kaisa.assure.prior import Prior
from kaisa.errors import ConfigurationError
from tests.assure.published import cases


@pytest.mark.parametrize("case", cases("n_required"))
def test_demands_needed_are_the_published_ones(case: dict[str, Any]) -> None:
    given = case["inputs"]
    exact = failure_free_demands(given["confidence"], given["p"], given["eps"], given["theta"])
    assert exact == pytest.approx(case["value"], rel=1e-10)
    question = Question("confidence", Prior({given["eps"]: given["theta"]}), given["p"])
    assert demands_needed(question, given["confidence"]) == case["n_ceil"]


@pytest.mark.parametrize("case", cases("p_bound"))
def test_bounds_reached_are_the_published_ones(case: dict[str, Any]) -> None:
    given = case["inputs"]
    bound = smallest_bound(given["confidence"], Prior({given["eps"]: given["theta"]}), demands=given["n"])
    assert bound == pytest.approx(case["value"], rel=1e-10)


@settings(deadline=None, max_examples=25)
@given(st.floats(0.5, 0.999), st.integers(0, 3), st.floats(1.1, 50))
def test_one_demand_fewer_or_one_failure_more_misses_the_target(target: float, failures: int, factor: float) -> None:
    question = Question("confidence", Prior({1e-3: 0.7}, floor=1e-4), 1e-3 * factor, failures, failures)
    needed = demands_needed(question, target)
    assert needed is not None
    at = {"prior": question.prior, "kind": "confidence", "at": question.at}
    assert ask(Question(demands=needed, failures=failures, **at)).meets(target)
    if needed > failures:
        assert not ask(Question(demands=needed - 1, failures=failures, **at)).meets(target)
    borne = failures_borne(Question(demands=needed, **at), target)
    assert borne is not None
    assert borne >= failures
    assert ask(Question(demands=needed, failures=borne, **at)).meets(target)
    assert borne == needed or not ask(Question(demands=needed, failures=borne + 1, **at)).meets(target)


def test_what_no_number_of_demands_gives_is_none() -> None:
    assert demands_needed(Question("confidence", Prior({1e-3: 0.9}), 1e-3), 0.95) is None
    assert demands_needed(Question("reliability", Prior({1e-3: 0.9}), 1000), 0.9) is None
    assert failures_borne(Question("confidence", Prior({1e-3: 0.9}), 1e-2, 10), 0.99) is None
    assert smallest_bound(0.9, Prior({1e-3: 0.5}), demands=100, failures=1) is None


def test_targets_that_are_none_are_refused() -> None:
    for target in (0.0, 1.0, float("nan"), True):
        with pytest.raises(ConfigurationError, match="above 0 and below 1"):
            demands_needed(Question("expected_pfd", Prior({1e-3: 0.9})), target)


@pytest.mark.parametrize("case", cases("confidence_two"))
def test_the_confidence_in_a_successor_is_the_published_one(case: dict[str, Any]) -> None:
    given = case["inputs"]
    old = OldSystem(given["eps"], given["theta"], given["phi"], given["nA"])
    found = confidence_as_successor(given["p"], old, demands=given["nB"])
    assert found.value == pytest.approx(case["value"], rel=1e-10)
    assert (found.void is not None) == (case["value"] == 0)


def test_success_of_the_old_system_alone_first_helps_and_then_harms() -> None:
    values = [
        confidence_as_successor(1e-3, OldSystem(1e-4, 0.9, 0.9, n)).value for n in (0, 1000, 5000, 10_000, 100_000)
    ]
    assert values == pytest.approx([0.800, 0.841, 0.828, 0.746, 0.0004], abs=6e-4)


@pytest.mark.parametrize(("of_old", "of_new"), [(0, 0), (30, 0), (30, 20), (200, 10)])
def test_no_joint_prior_on_a_grid_gives_a_successor_less(of_old: int, of_new: int) -> None:
    """A linear-fractional programme over joint distributions, by bisection on its value."""
    old, p = OldSystem(0.02, 0.9, 0.8, of_old), 0.1
    value = confidence_as_successor(p, old, demands=of_new).value
    axis = np.unique(np.concatenate([np.linspace(0, 1, 21), [0.02, 0.02 + 1e-9, p, p + 1e-9]]))
    a, b = (part.ravel() for part in np.meshgrid(axis, axis))
    likelihood = (1 - a) ** of_old * (1 - b) ** of_new
    held = np.stack([np.ones_like(a), a <= 0.02, b <= a]).astype(float)
    done = linprog(
        np.append((b <= p) * likelihood, 0.0),
        A_eq=np.vstack([np.append(likelihood, 0.0), np.column_stack([held, [-1.0, -0.9, -0.8]])]),
        b_eq=[1.0, 0.0, 0.0, 0.0],
        method="highs",
    )
    assert done.fun == pytest.approx(value, abs=1e-6)
    assert done.fun >= value - 1e-9


@pytest.mark.parametrize(
    ("old", "options", "message"),
    [
        ({"bound": 1.0}, {}, "bound of the old system"),
        ({"belief": 1.0}, {}, "belief is 1"),
        ({"no_worse": 0.0}, {}, "no_worse is 0"),
        ({"demands": -1}, {}, "at least 0"),
        ({}, {"p": 0.0}, "bound p"),
        ({}, {"failures": 1}, "without failures"),
    ],
)
def test_two_systems_without_meaning_are_refused(old: Any, options: Any, message: str) -> None:
    given = {"bound": 1e-4, "belief": 0.9, "no_worse": 0.9, "demands": 100, **old}
    with pytest.raises(ConfigurationError, match=message):
        confidence_as_successor(**{"p": 1e-3, "old": OldSystem(**given), **options})


def test_a_bound_below_that_of_the_old_system_is_explained() -> None:
    found = confidence_as_successor(1e-5, OldSystem(1e-4, 0.9, 0.9, 1000))
    assert (found.value, "below 0.0001" in str(found.void)) == (0, True)
    assert confidence(1e-5, Prior({1e-4: 0.9})).value == 0
