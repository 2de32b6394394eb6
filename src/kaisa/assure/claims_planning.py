"""What a claim still needs: demands without further failures, failures that it can bear, the bound it reaches.

Under every prior a success makes X likely smaller and a failure larger. Worst cases therefore grow with the demands
and fall with the failures, and a bisection over whole numbers finds where they cross a target.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from kaisa.assure.claims import Question, ask, confidence
from kaisa.assure.prior import Prior
from kaisa.errors import ConfigurationError

MOST_DEMANDS = 10**15


def demands_needed(question: Question, target: float) -> int | None:
    """Return the least number of demands in all, with the failures so far and no more, that meets a target.

    Returns:
        The number, at least that of the question, or None where none up to 1e15 does.
    """
    _check_target(target)
    start = question.demands

    def is_met(demands: int) -> bool:
        return ask(replace(question, demands=demands)).meets(target)

    if is_met(start):
        return start
    step = 1
    while not is_met(start + step):
        step *= 2
        if start + step > MOST_DEMANDS:
            return None
    return _first(is_met, start + step // 2, start + step)


def failures_borne(question: Question, target: float) -> int | None:
    """Return the greatest number of failures in the demands of the question at which a target is still met.

    Returns:
        The number, or None where not even none is few enough.
    """
    _check_target(target)

    def is_missed(failures: int) -> bool:
        return not ask(replace(question, failures=failures)).meets(target)

    if is_missed(0):
        return None
    step = 1
    while step < question.demands and not is_missed(step):
        step *= 2
    last = min(step, question.demands)
    return last if not is_missed(last) else _first(is_missed, 0, last) - 1


def smallest_bound(target: float, prior: Prior, *, demands: int = 0, failures: int = 0) -> float | None:
    """Return the smallest bound on the probability of failure that is claimed with a confidence.

    Returns:
        The bound, never below the smallest that anything is believed of; None where the claim is void.
    """
    _check_target(target)
    lowest = prior.bounds[0]

    def is_met(p: float) -> bool:
        return confidence(p, prior, demands=demands, failures=failures).meets(target)

    if lowest > 0 and is_met(lowest):
        return lowest
    low, high = max(lowest, 5e-324), math.nextafter(1, 0)
    if not is_met(high):
        return None
    while (middle := math.sqrt(low) * math.sqrt(high)) not in (low, high) and low < middle < high:
        low, high = (low, middle) if is_met(middle) else (middle, high)
    return high


def failure_free_demands(target: float, p: float, epsilon: float, theta: float) -> float:
    """Return n = ln(θ(1 − c) / ((1 − θ)c)) / ln((1 − p)/(1 − ε)): the demands without failure, before rounding up.

    Raises:
        ConfigurationError: p is not above ε, or a belief is not between 0 and 1.
    """
    _check_target(target)
    if not 0 <= epsilon < p < 1 or not 0 < theta < 1:
        raise ConfigurationError(f"give 0 ≤ ε < p < 1 and 0 < θ < 1; found ε {epsilon:g}, p {p:g}, θ {theta:g}")
    odds = math.log(theta) + math.log1p(-target) - math.log1p(-theta) - math.log(target)
    return max(0.0, odds / (math.log1p(-p) - math.log1p(-epsilon)))


def _first(is_true: Callable[[int], bool], no: int, yes: int) -> int:
    while yes - no > 1:
        middle = (no + yes) // 2
        no, yes = (no, middle) if is_true(middle) else (middle, yes)
    return yes


def _check_target(target: float) -> None:
    if isinstance(target, bool) or not isinstance(target, int | float) or not 0 < target < 1:
        raise ConfigurationError(f"the target is {target!r}; give a number above 0 and below 1")
