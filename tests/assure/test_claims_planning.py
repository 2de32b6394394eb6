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
    assert smallest_bound(0.9, Prior({1e-3: 0.95})) == 1e-3  # what is believed already, to the last digit


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


SYSTEMS = [
    (OldSystem(0.02, theta, phi, n_a, k_a, floor), n_b, k_b)
    for theta, phi in ((0.9, 0.8), (0.6, 0.95))
    for floor in (0.0, 0.004)
    for n_a, k_a, n_b, k_b in (
        *((0, 0, 0, 0), (30, 0, 0, 0), (30, 0, 20, 0), (200, 0, 10, 0)),
        *(
            (0, 0, 40, 2),
            (60, 2, 0, 0),
            (60, 3, 40, 1),
            (200, 1, 60, 30),
            (60, 30, 40, 1),
            (50, 4, 50, 9),
            (9, 9, 9, 0),
        ),
    )
    if floor or not k_a + k_b
]
OFTEN_FAILED = OldSystem(0.02, 0.6, 0.95, 200, 12, 0.015)
SYSTEMS += [(OFTEN_FAILED, 150, 1), (OldSystem(0.02, 0.95, 0.6, 200, 12, 0.015), 150, 1)]
SYSTEMS += [
    (OldSystem(0.02, 0.9, 0.8, n_a, k_a, 0.015), n_b, k_b)
    for n_a, k_a, n_b, k_b in ((60, 0, 40, 2), (20, 0, 15, 2), (10, 2, 30, 0), (10, 2, 20, 3))
]


@pytest.mark.parametrize(("old", "demands", "failures"), SYSTEMS)
def test_a_programme_over_joint_priors_gives_a_successor_as_much_and_no_less(
    old: OldSystem, demands: int, failures: int
) -> None:
    """By Charnes and Cooper over all pairs of a grid; its own dual shows that it is solved."""
    p, found = 0.1, confidence_as_successor(0.1, old, demands=demands, failures=failures)
    # What counts as just above ε, p or X_A lies 1e-9 above: the likelihood there differs by 1e-7 at the most.
    ends = [old.floor, old.bound, old.bound + 1e-9, p, p + 1e-9, *(x for at, *_ in found.worst_case for x in at)]
    axis = np.unique(
        np.concatenate([old.floor + (1 - old.floor) * np.linspace(0, 1, 15) ** 2, ends, 1e-9 + np.array(ends)])
    )
    a, b = (part.ravel() for part in np.meshgrid(axis, axis))
    likelihood = (
        a**old.failures * (1 - a) ** (old.demands - old.failures) * b**failures * (1 - b) ** (demands - failures)
    )
    likelihood /= likelihood.max()
    held = np.stack([np.ones_like(a), a <= old.bound, b <= a]).astype(float)
    done = linprog(
        np.append((b <= p) * likelihood, 0.0),
        A_eq=np.vstack([np.append(likelihood, 0.0), np.column_stack([held, [-1.0, -old.belief, -old.no_worse]])]),
        b_eq=[1.0, 0.0, 0.0, 0.0],
        method="highs-ds",
        options={"dual_feasibility_tolerance": 1e-10, "primal_feasibility_tolerance": 1e-10},
    )
    assert done.fun == pytest.approx(found.value, rel=1e-6, abs=1e-9)
    assert done.eqlin.marginals[0] == pytest.approx(done.fun, abs=1e-9)


@pytest.mark.parametrize(("old", "demands", "failures"), SYSTEMS)
def test_the_worst_joint_prior_holds_what_is_believed_and_gives_the_claim(
    old: OldSystem, demands: int, failures: int
) -> None:
    found = confidence_as_successor(0.1, old, demands=demands, failures=failures)
    good, *bad = found.worst_case
    assert good[0][1] <= good[0][0] <= old.bound
    assert all(at[1] >= 0.1 for at, *_ in bad)
    assert sum(mass for _, mass, _ in found.worst_case) == pytest.approx(1)
    assert sum(mass for at, mass, _ in found.worst_case if at[0] <= old.bound) >= old.belief - 1e-12
    assert good[2] == pytest.approx(found.value)
    assert all(old.floor <= x <= 1 for at, *_ in found.worst_case for x in at)


def random_pairs(old: OldSystem, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return points and masses of a joint distribution in which both beliefs hold."""
    theta, phi = old.belief, old.no_worse
    s = generator.uniform(max(0, theta + phi - 1), min(theta, phi))
    a, b, mass = [], [], []
    for share, is_good, is_no_worse in (
        *((s, True, True), (theta - s, True, False), (phi - s, False, True), (1 - theta - phi + s, False, False)),
    ):
        count = int(generator.integers(1, 5))
        x = generator.uniform(0, 1, count) ** generator.uniform(1, 6)
        x = old.floor + (old.bound - old.floor) * x if is_good else old.bound + 1e-9 + (1 - old.bound - 2e-9) * x
        y = generator.uniform(0, 1, count) ** generator.uniform(1, 6)
        a.append(x)
        b.append(old.floor + (x - old.floor) * y if is_no_worse else x + (1 - x) * np.maximum(y, 1e-12))
        mass.append(share * generator.dirichlet(np.full(count, 0.5)))
    return np.concatenate(a), np.concatenate(b), np.concatenate(mass)


@pytest.mark.parametrize(("old", "demands", "failures"), SYSTEMS)
def test_no_random_joint_prior_gives_a_successor_less(old: OldSystem, demands: int, failures: int) -> None:
    found, generator = confidence_as_successor(0.1, old, demands=demands, failures=failures), np.random.default_rng(0)
    for _ in range(200):
        a, b, mass = random_pairs(old, generator)
        of_old = a**old.failures * (1 - a) ** (old.demands - old.failures)
        weight = mass * of_old * b**failures * (1 - b) ** (demands - failures)
        if weight.sum() > 0:
            assert weight[b <= 0.1].sum() / weight.sum() >= found.value - 1e-12


def test_failures_of_the_old_system_may_put_the_worst_case_at_the_other_end_of_the_beliefs() -> None:
    """Where A has shown to be between ε and p, the worst prior puts the doubt about B there and nowhere else."""
    found = confidence_as_successor(0.1, OFTEN_FAILED, demands=150, failures=1)
    assert [mass for _, mass, _ in found.worst_case] == pytest.approx([0.6, 0.35, 0.05])
    assert found.worst_case[2][0] == (0.06, 0.1)
    assert 0.99 < found.value < 0.997


def test_a_billion_demands_of_both_systems_stay_finite() -> None:
    old = OldSystem(1e-6, 0.9, 0.9, 10**9, 500, 1e-9)
    assert confidence_as_successor(1e-5, old, demands=10**9, failures=600).value == pytest.approx(1)
    assert confidence_as_successor(1e-5, old, demands=10**9, failures=20_000).value < 1e-100


@pytest.mark.parametrize(("of_old", "of_new", "words"), [(0, 1, "the new"), (2, 0, "the old")])
def test_a_failure_of_either_system_without_a_floor_is_explained(of_old: int, of_new: int, words: str) -> None:
    found = confidence_as_successor(1e-2, OldSystem(1e-3, 0.9, 0.9, 100, of_old), demands=100, failures=of_new)
    assert found.value == 0
    assert f"where {words} one cannot fail" in str(found.void)
    assert "Argue a floor above 0" in str(found.void)


@pytest.mark.parametrize(
    ("old", "options", "message"),
    [
        ({"bound": 1.0}, {}, "bound of the old system"),
        ({"belief": 1.0}, {}, "belief is 1"),
        ({"no_worse": 0.0}, {}, "no_worse is 0"),
        ({"demands": -1}, {}, "at least 0"),
        ({}, {"p": 0.0}, "bound p"),
        ({"failures": 101}, {}, "101 failures in 100 demands of the old system"),
        ({"floor": 1e-3}, {}, "floor is 0.001"),
        ({}, {"failures": 1}, "1 failures in 0 demands of the new system"),
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
