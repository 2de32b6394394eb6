"""The likelihood of k failures in n demands, in logarithms, and where in a range it is least and most.

    L(x) = xᵏ (1 − x)ⁿ⁻ᵏ,    unimodal with its mode at k / n

On a range the least is at an end, the most at the mode or at the end next to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable


def log_likelihood(x: float, demands: int, failures: int) -> float:
    """Return ln L(x), −∞ where the observations are impossible."""
    successes = demands - failures
    if (x == 0 and failures) or (x == 1 and successes):
        return -math.inf
    of_failures = failures * math.log(x) if failures else 0.0
    return of_failures + (successes * math.log1p(-x) if successes else 0.0)


def least_likely(low: float, high: float, demands: int, failures: int) -> float:
    """Return the end of a range at which the likelihood is least; the lower one where both are the same."""
    at_low, at_high = (log_likelihood(x, demands, failures) for x in (low, high))
    return low if at_low <= at_high else high


def most_likely(low: float, high: float, demands: int, failures: int) -> float:
    """Return where in a range the likelihood is most."""
    mode = failures / demands if demands else low
    return min(max(mode, low), high)


def log_sum(terms: Iterable[float]) -> float:
    """Return ln Σ exp(term)."""
    known = list(terms)
    most = max(known, default=-math.inf)
    if most == -math.inf:
        return -math.inf
    return most + math.log(math.fsum(math.exp(term - most) for term in known))
