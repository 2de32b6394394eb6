"""Worst-case claims against golden numbers, closed forms in 40 digits, random priors and the laws they obey."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kaisa.assure.claims import Claim, Question, ask, confidence, expected_pfd, reliability
from kaisa.assure.prior import Prior
from kaisa.errors import ConfigurationError
from tests.assure.published import ask_case, cases

BAYESIAN = ("confidence_k", "confidence_p", "confidence_m", "reliability", "inequality", "identity")


@pytest.mark.parametrize("case", cases(*BAYESIAN))
def test_golden_values_are_met(case: dict[str, Any]) -> None:
    assert ask_case(case).value == pytest.approx(case["value"], rel=1e-10, abs=1e-300)


@pytest.mark.parametrize("case", cases(*BAYESIAN))
def test_the_worst_prior_is_the_published_one(case: dict[str, Any]) -> None:
    claim = ask_case(case)
    if claim.void is None and case.get("worst_case_prior"):
        found = [number for atom in claim.worst_case for number in (atom.at, atom.mass)]
        published = [number for atom in case["worst_case_prior"] for number in atom]
        assert found == pytest.approx(published, rel=1e-7, abs=1e-12)


@pytest.mark.parametrize("case", cases("limit"))
def test_the_expected_pfd_shrinks_to_the_published_limit_over_the_demands(case: dict[str, Any]) -> None:
    n = 10**7
    claim = expected_pfd(Prior({0: case["inputs"]["theta0"]}), demands=n)
    assert n * claim.value == pytest.approx(case["value"], rel=1e-6)


def exact_reliability(epsilon: float, theta: float, n: int, t: int) -> Any:
    """Return R = (1 − ε)ᵗ (n + t)/n vᵗ with (1 − θ)t vⁿ⁺ᵗ + θ(n + t)vᵗ = θn, in 60 digits."""
    with mpmath.workdps(60):
        e, h = mpmath.mpf(epsilon), mpmath.mpf(theta)

        def excess(s: Any) -> Any:
            return (1 - h) * t * mpmath.exp((n + t) * s) + h * (n + t) * mpmath.exp(t * s) - h * n

        low, high = mpmath.log(h * n / ((1 - h) * t + h * (n + t))) / t, mpmath.log(mpmath.mpf(n) / (n + t)) / t
        s = mpmath.findroot(excess, (low, high), solver="anderson", tol=1e-90, verify=False)
        return (1 - e) ** t * (mpmath.mpf(n + t) / n) * mpmath.exp(t * s)


@pytest.mark.parametrize("epsilon", [0.0, 1e-9, 1e-4, 0.2])
@pytest.mark.parametrize("theta", [0.01, 0.5, 0.999])
@pytest.mark.parametrize(("n", "t"), [(1, 1), (1000, 1), (1000, 100), (10**6, 10**6), (10**9, 1000)])
def test_reliability_without_failures_is_its_closed_form(epsilon: float, theta: float, n: int, t: int) -> None:
    claim, exact = reliability(t, Prior({epsilon: theta}), demands=n), exact_reliability(epsilon, theta, n, t)
    assert claim.value == pytest.approx(float(exact), rel=1e-10, abs=1e-300)
    assert claim.complement == pytest.approx(float(1 - exact), rel=1e-10)


@pytest.mark.parametrize("n", [0, 10, 10**6, 10**9])
def test_confidence_without_failures_is_its_closed_form(n: int) -> None:
    epsilon, theta, p = 1e-9, 0.9, 2e-9
    with mpmath.workdps(60):
        odds = mpmath.mpf(theta) / (1 - mpmath.mpf(theta)) * ((1 - mpmath.mpf(epsilon)) / (1 - mpmath.mpf(p))) ** n
        exact = odds / (1 + odds)
    claim = confidence(p, Prior({epsilon: theta}), demands=n)
    assert claim.value == pytest.approx(float(exact), rel=1e-10)
    assert claim.complement == pytest.approx(float(1 - exact), rel=1e-10)


def test_of_as_many_demands_as_were_seen_the_reliability_is_known_in_closed_form() -> None:
    for theta in (0.1, 0.5, 0.9):
        claim = reliability(700, Prior({0: theta}), demands=700)
        assert claim.value == pytest.approx(2 * math.sqrt(theta) / (1 + math.sqrt(theta)), rel=1e-12)


def test_success_does_not_strengthen_the_belief_in_the_bound_of_the_prior_itself() -> None:
    for n in (0, 10, 10**9):
        assert confidence(1e-4, Prior({1e-4: 0.9}), demands=n).value == pytest.approx(0.9, rel=1e-12)


@pytest.mark.parametrize("kind", ["confidence", "reliability", "expected_pfd"])
@pytest.mark.parametrize("failures", [0, 1, 10**5, 10**9])
def test_a_billion_demands_give_finite_claims_and_posteriors(kind: Any, failures: int) -> None:
    at = {"confidence": 1e-3, "reliability": 10**6, "expected_pfd": None}[kind]
    claim = ask(Question(kind, Prior({1e-4: 0.9}, floor=1e-6), at, 10**9, failures))
    assert 0 <= claim.value <= 1
    assert claim.value + claim.complement == pytest.approx(1)
    assert math.fsum(atom.posterior for atom in claim.worst_case) == pytest.approx(1)


# Random priors


def random_priors(prior: Prior, generator: np.random.Generator) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return points and masses of a discrete distribution that has the quantiles of a prior."""
    points, masses = [], []
    for cell in prior.cells:
        count = int(generator.integers(1, 6))
        exponents = generator.uniform(0, 12)
        low = np.nextafter(cell.low, 1) if cell.low != prior.floor else cell.low
        x = low + (cell.high - low) * generator.uniform(0, 1, count) ** exponents
        points.append(np.clip(np.where(generator.uniform(size=count) < 0.3, low, x), low, cell.high))
        masses.append(cell.mass * generator.dirichlet(np.full(count, generator.choice([0.1, 1.0]))))
    return np.concatenate(points), np.concatenate(masses)


def posterior_value(claim: Claim, points: NDArray[Any], masses: NDArray[Any]) -> float:
    """Return by Bayes' rule what a claim is about, under one known prior; NaN if it excludes the data."""
    question = claim.question
    n, k = question.demands, question.failures
    likelihood = points**k * (1 - points) ** (n - k) * masses
    if not likelihood.sum() > 0:
        return math.nan
    worth = {
        "confidence": points <= (question.at or 0),
        "reliability": (1 - points) ** (question.at or 0),
        "expected_pfd": points,
    }[question.kind]
    return float((worth * likelihood).sum() / likelihood.sum())


QUESTIONS = [
    Question(kind, Prior(quantiles, floor=floor, at_least=at_least), at, n, k)
    for kind, at in (("confidence", 0.02), ("reliability", 30), ("expected_pfd", None))
    for quantiles in ({0.01: 0.8}, {0.002: 0.4, 0.01: 0.8, 0.05: 0.95})
    for floor in (0.0, 5e-4)
    for at_least in (False, True)
    for n, k in ((0, 0), (200, 0), (200, 2), (60, 20))
]
QUESTIONS += [
    Question(kind, Prior(quantiles, floor, at_least, at_most=at_most), at, n, k)
    for kind, at in (("confidence", 0.02), ("reliability", 30), ("expected_pfd", None))
    for quantiles, at_least in (({0.01: 0.8}, False), ({0.01: 0.8, 0.05: 0.95}, True), ({0.01: 0.8, 0.05: 0.95}, False))
    for floor, at_most in ((0.0, {0.002: 0.1}), (5e-4, {0.001: 0.05, 0.004: 0.4}))
    for n, k in ((200, 0), (200, 2), (60, 20))
]


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda q: f"{q.kind}-{q.prior.describe()}-{q.failures}/{q.demands}")
def test_no_random_prior_gives_less_than_the_claim(question: Question) -> None:
    claim, generator = ask(question), np.random.default_rng(0)
    found = [posterior_value(claim, *random_priors(question.prior, generator)) for _ in range(150)]
    known = np.array([value for value in found if not math.isnan(value)])
    if question.kind == "expected_pfd":
        assert (known <= claim.value + 1e-12).all()
    else:
        assert (known >= claim.value - 1e-12).all()


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda q: f"{q.kind}-{q.prior.describe()}-{q.failures}/{q.demands}")
def test_the_worst_prior_itself_gives_the_claim(question: Question) -> None:
    claim = ask(question)
    if claim.void is None:
        points = np.array([np.nextafter(atom.at, 1) if atom.just_above else atom.at for atom in claim.worst_case])
        value = posterior_value(claim, points, np.array([atom.mass for atom in claim.worst_case]))
        assert value == pytest.approx(claim.value, rel=1e-9)


# Laws

probabilities = st.floats(1e-6, 0.3)
beliefs = st.floats(0.01, 0.99)


@settings(deadline=None, max_examples=60)
@given(
    probabilities, beliefs, beliefs, st.floats(0.01, 1), st.integers(0, 5000), st.integers(0, 4), st.integers(1, 500)
)
def test_claims_grow_with_belief_and_demands_and_fall_with_failures(
    epsilon: float, one: float, other: float, share: float, n: int, k: int, t: int
) -> None:
    k = min(k, n)
    weak, strong = (Prior({epsilon: theta}, floor=share * epsilon) for theta in sorted((one, other)))
    for question in (Question("reliability", weak, t, n, k), Question("confidence", weak, min(0.9, 3 * epsilon), n, k)):
        value = ask(question).value
        assert ask(replace(question, prior=strong)).value >= value - 1e-12
        assert ask(replace(question, demands=n + 100)).value >= value - 1e-12
        assert ask(replace(question, demands=n + 1, failures=k + 1)).value <= value + 1e-12


@settings(deadline=None, max_examples=40)
@given(probabilities, beliefs, st.floats(0.01, 1), st.integers(0, 5000), st.integers(0, 4), st.integers(1, 500))
def test_at_least_as_much_belief_is_no_worse_than_exactly_as_much_for_one_bound(
    epsilon: float, theta: float, share: float, n: int, k: int, t: int
) -> None:
    exact = Prior({epsilon: theta}, floor=share * epsilon)
    question = Question("reliability", exact, t, n, min(k, n))
    assert ask(replace(question, prior=replace(exact, at_least=True))).value == pytest.approx(ask(question).value)


def test_of_several_bounds_at_least_can_be_worse_than_exactly() -> None:
    exact = Prior({1e-3: 0.5, 1e-2: 0.9}, floor=1e-6)
    seen = {"demands": 1000, "failures": 2}
    claims = [confidence(0.02, prior, **seen).value for prior in (exact, replace(exact, at_least=True))]
    assert claims[1] < claims[0]


@settings(deadline=None, max_examples=60)
@given(
    beliefs, st.floats(0.001, 0.5), st.floats(0.05, 0.95), st.integers(0, 3000), st.integers(0, 30), st.integers(1, 500)
)
def test_hardly_better_than_a_bound_is_the_worse_of_exactly_so_hardly_and_never(
    theta: float, share: float, part: float, n: int, k: int, t: int
) -> None:
    """The posterior is a ratio of linear functions of the mass below α, so one of its ends is the worst."""
    epsilon, alpha, eta, floor = 0.01, 0.01 * part, theta * share, 0.001 * part
    hardly = Prior({epsilon: theta}, floor, at_most={alpha: eta})
    for kind, at in (("confidence", 0.02), ("reliability", t), ("expected_pfd", None)):
        question = Question(kind, hardly, at, n, min(k, n))
        ends = [
            ask(replace(question, prior=p)).value
            for p in (Prior({alpha: eta, epsilon: theta}, floor), Prior({epsilon: theta}, alpha))
        ]
        worst = max(ends) if kind == "expected_pfd" else min(ends)
        assert ask(question).value == pytest.approx(worst, rel=1e-9, abs=1e-300)


def test_hardly_better_than_a_bound_supports_a_claim_after_failures_without_a_floor() -> None:
    """What lies above α cannot be refuted, whatever lies at 0."""
    claim = confidence(0.03, Prior({0.02: 0.975}, at_most={0.008: 0.025}), demands=1000, failures=15)
    assert claim.void is None
    assert claim.value > 0.9
    assert claim.worst_case[0].at == 0


# What voids a claim


def test_a_bound_below_all_belief_is_explained() -> None:
    claim = confidence(1e-5, Prior({1e-4: 0.9}), demands=10**9)
    assert claim.value == 0
    assert "1e-05 is below 0.0001" in str(claim.void)
    assert not claim.meets(1e-9)


@pytest.mark.parametrize("failures", [1, 3])
def test_a_failure_without_a_floor_is_explained(failures: int) -> None:
    for claim in (
        confidence(1e-2, Prior({1e-3: 0.9}), demands=1000, failures=failures),
        reliability(10, Prior({1e-3: 0.9}), demands=1000, failures=failures),
    ):
        assert claim.value == 0
        assert "Argue a floor above 0" in str(claim.void)
    assert expected_pfd(Prior({0: 0.9}), demands=1000, failures=failures).value == 1


def test_exact_beliefs_in_several_bounds_support_a_claim_without_a_floor() -> None:
    exact = Prior({1e-3: 0.5, 1e-2: 0.9})
    assert confidence(0.02, exact, demands=1000, failures=2).void is None
    assert confidence(0.02, replace(exact, at_least=True), demands=1000, failures=2).void is not None


@pytest.mark.parametrize(
    ("quantiles", "options", "message"),
    [
        ({}, {}, "without any belief"),
        ({1.0: 0.5}, {}, "bound 1"),
        ({-0.1: 0.5}, {}, "bound -0.1"),
        ({math.nan: 0.5}, {}, "bound is nan"),
        ({0.1: 0.0}, {}, "above 0 and below 1"),
        ({0.1: 1.0}, {}, "above 0 and below 1"),
        ({0.1: math.nan}, {}, "belief is nan"),
        ({0.1: 0.9, 0.2: 0.8}, {}, "of a smaller bound it is 0.9"),
        ({0.1: 0.9, 0.2: 0.9}, {}, "with the same belief leave one out"),
        ({0.1: 0.9}, {"at_most": {0.1: 0.05}}, "a bound not below 0.1"),
        ({0.1: 0.9}, {"at_most": {0.2: 0.05}}, "a bound not below 0.1"),
        ({0.1: 0.9}, {"at_most": {0.01: 0.95}}, "of a smaller bound it is 0.95"),
        ({0.1: 0.9}, {"at_most": {0.01: 0.0}}, "above 0 and below 1"),
        ({0.1: 0.9}, {"at_most": {0.01: 0.05}, "floor": 0.02}, "floor is 0.02"),
        ({0.1: 0.9}, {"at_most": {0.01: 0.05}, "mean": 0.018}, "no E"),
        ({0.1: 0.9}, {"floor": 0.2}, "floor is 0.2"),
        ({0.1: 0.9}, {"floor": -1}, "floor is -1"),
        ({0.1: 0.9}, {"floor": math.inf}, "floor is inf"),
        ({0.1: 0.9}, {"mean": 0.001}, "no E"),
    ],
)
def test_a_prior_that_is_none_is_refused(quantiles: Mapping[float, float], options: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Prior(quantiles, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "hope", "at": 1}, "unknown claim 'hope'"),
        ({"kind": "confidence", "at": None}, "bound p is None"),
        ({"kind": "confidence", "at": 0.0}, "above 0 and below 1"),
        ({"kind": "confidence", "at": math.nan}, "bound p is nan"),
        ({"kind": "reliability", "at": 0}, "at least 1"),
        ({"kind": "reliability", "at": 1.5}, "whole number"),
        ({"kind": "expected_pfd", "demands": -1}, "at least 0"),
        ({"kind": "expected_pfd", "demands": math.inf}, "whole number"),
        ({"kind": "expected_pfd", "demands": 3, "failures": 4}, "4 failures in 3 demands"),
    ],
)
def test_a_question_without_meaning_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Question(prior=Prior({0.1: 0.9}), **arguments)
