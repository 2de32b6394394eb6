"""Conservative Bayesian inference: what may be claimed whatever the rest of the prior is.

    claim = confidence(1e-3, Prior({1e-4: 0.9}), demands=1000, failures=0)
    claim.value         0.9568, the least posterior Pr(X ≤ 1e-3) over all priors with Pr(X ≤ 1e-4) = 0.9
    claim.worst_case    the prior that gives it, an atom a cell, with its masses before and after

X is the probability of failure per demand. Closed forms or one root where there are such, otherwise a
linear-fractional programme.
"""

from __future__ import annotations

from kaisa.assure.claims_closed import KINDS, Atom, Claim, Kind, Question, find_void, solve_closed
from kaisa.assure.claims_programme import solve_programme
from kaisa.assure.prior import Prior

__all__ = ["KINDS", "Atom", "Claim", "Kind", "Question", "ask", "confidence", "expected_pfd", "reliability"]


def confidence(p: float, prior: Prior, *, demands: int = 0, failures: int = 0) -> Claim:
    """Return the worst-case Pr(X ≤ p | failures in demands).

    Raises:
        ConfigurationError: a number is out of its range.
    """
    return ask(Question("confidence", prior, p, demands, failures))


def reliability(t: int, prior: Prior, *, demands: int = 0, failures: int = 0) -> Claim:
    """Return the worst-case probability that the next ``t`` demands all succeed.

    Raises:
        ConfigurationError: a number is out of its range.
    """
    return ask(Question("reliability", prior, t, demands, failures))


def expected_pfd(prior: Prior, *, demands: int = 0, failures: int = 0) -> Claim:
    """Return the greatest posterior expectation of the probability of failure per demand.

    Raises:
        ConfigurationError: a number is out of its range.
    """
    return ask(Question("expected_pfd", prior, None, demands, failures))


def ask(question: Question) -> Claim:
    """Return the worst-case answer; with a bound on the mean from a programme, which needs scipy."""
    if question.prior.mean is None or find_void(question) is not None:
        return solve_closed(question)
    return solve_programme(question)
