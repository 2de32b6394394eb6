"""The linear-fractional programme: it finds the closed forms without knowing them, and its dual proves them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from kaisa.assure.claims import Question, ask, confidence
from kaisa.assure.claims_programme import certify, solve_programme, solve_with_dual
from kaisa.assure.prior import Prior
from kaisa.errors import ConfigurationError

PRIORS = [
    Prior({1e-4: 0.9}),
    Prior({1e-3: 0.9}, floor=1e-4),
    Prior({0: 0.3, 1e-3: 0.9}),
    Prior({1e-4: 0.5, 1e-3: 0.9, 1e-2: 0.99}, floor=1e-5),
    Prior({1e-4: 0.5, 1e-3: 0.9}, floor=1e-5, at_least=True),
    Prior({1e-3: 0.9}, at_most={1e-4: 0.1}),
    Prior({1e-3: 0.7, 5e-3: 0.9}, floor=1e-5, at_most={1e-4: 0.1, 3e-4: 0.2}),
    Prior({1e-3: 0.7, 5e-3: 0.9}, floor=1e-5, at_most={1e-4: 0.1, 3e-4: 0.2}, at_least=True),
]
ASKED = [("confidence", 1e-2), ("confidence", 1e-3), ("reliability", 100), ("expected_pfd", None)]
SEEN = [(0, 0), (1000, 0), (1000, 3), (100, 30)]
QUESTIONS = [Question(kind, prior, at, n, k) for prior in PRIORS for kind, at in ASKED for n, k in SEEN]
QUESTIONS = [question for question in QUESTIONS if ask(question).void is None]


@pytest.mark.parametrize("question", QUESTIONS[::3], ids=lambda q: f"{q.kind}-{q.at}-{q.prior.describe()}-{q.failures}")
def test_programme_and_closed_form_agree(question: Question) -> None:
    assert solve_programme(question).value == pytest.approx(ask(question).value, abs=1e-9)


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda q: f"{q.kind}-{q.at}-{q.prior.describe()}-{q.failures}")
def test_closed_forms_are_proved_by_their_dual(question: Question) -> None:
    assert certify(ask(question)).holds(1e-11)


def test_the_dual_of_a_value_that_is_too_high_does_not_hold() -> None:
    claim = ask(QUESTIONS[1])
    assert not certify(replace(claim, value=claim.value + 1e-6)).holds()


def test_a_void_claim_has_nothing_to_prove() -> None:
    with pytest.raises(ConfigurationError, match="nothing to prove"):
        certify(confidence(1e-5, Prior({1e-4: 0.9})))


@pytest.mark.parametrize("failures", [0, 2])
def test_knowledge_of_the_mean_strengthens_a_claim_and_is_proved(failures: int) -> None:
    without = Question("confidence", Prior({1e-3: 0.8}, floor=1e-4), 1e-2, 500, failures)
    known = replace(without, prior=replace(without.prior, mean=2e-3))
    claim, proof = solve_with_dual(known, 1000)
    assert claim.value > ask(without).value + 1e-3
    assert ask(known).value == claim.value
    assert proof.holds()
    assert proof.of_mean > 0
    assert abs(proof.gap) < 1e-9  # the duals of masses and mean balance where both are the best
    assert math.fsum(atom.at * atom.mass for atom in claim.worst_case) == pytest.approx(2e-3, rel=1e-6)


def test_a_mean_that_is_known_goes_with_what_is_hardly_so_good() -> None:
    known = Question("confidence", Prior({1e-3: 0.8}, mean=2e-3, at_most={5e-4: 0.1}), 1e-2, 500, 2)
    claim, proof = solve_with_dual(known, 1000)
    assert proof.holds()
    assert claim.value > ask(replace(known, prior=replace(known.prior, mean=None))).value + 1e-3
    assert claim.value > ask(replace(known, prior=replace(known.prior, at_most={5e-4: 0.5}))).value + 1e-3
    assert math.fsum(atom.mass for atom in claim.worst_case if atom.at < 5e-4) <= 0.1 + 1e-9


def test_no_random_prior_with_that_mean_gives_less() -> None:
    prior = Prior({1e-3: 0.8}, mean=2e-3)
    claim, generator = ask(Question("reliability", prior, 50, 300)), np.random.default_rng(0)
    for _ in range(3000):
        good, bad = 1e-3 * generator.uniform(0, 1, 2), 1e-3 + generator.uniform(0, 1, 2) ** generator.uniform(1, 9)
        x = np.minimum(np.concatenate([good, bad]), 1.0)
        mass = np.concatenate([0.8 * generator.dirichlet([1, 1]), 0.2 * generator.dirichlet([0.3, 0.3])])
        if x @ mass <= 2e-3:
            weight = mass * (1 - x) ** 300
            assert (weight * (1 - x) ** 50).sum() / weight.sum() >= claim.value - 1e-12


def test_a_mean_that_says_nothing_changes_nothing() -> None:
    question = Question("reliability", Prior({1e-3: 0.8}), 50, 300)
    loose = replace(question, prior=replace(question.prior, mean=0.9))
    assert ask(loose).value == pytest.approx(ask(question).value, abs=1e-9)
