"""How a claim depends on what it assumes and on what may still be seen: curves, each with all else as it is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from kaisa.assure.claims import Question, ask
from kaisa.assure.prior import Prior
from kaisa.errors import ConfigurationError

POINTS = 60


@dataclass(frozen=True)
class Curve:
    """The value of a claim over one quantity.

    Attributes:
        quantity: which, in words.
        x: its values, ascending.
        y: the claim at each.
        now: where the quantity is.
        is_logarithmic: whether x is best drawn so.
        is_steps: whether x are whole numbers.
    """

    quantity: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    now: float
    is_logarithmic: bool = False
    is_steps: bool = False


def sensitivity(question: Question, points: int = POINTS) -> list[Curve]:
    """Return the claim over belief, bound, floor, further demands and further failures."""
    curves = [_over_belief(question, points), _over_bound(question, points), _over_floor(question, points)]
    return [curve for curve in (*curves, over_demands(question, points), over_failures(question)) if curve is not None]


def over_demands(question: Question, points: int = POINTS) -> Curve:
    """Return the claim over demands yet to come, none of which fails."""
    now = question.demands
    last = max(10 * now, 100)
    further = sorted({round(now + (last - now) * (index / (points - 1)) ** 2) for index in range(points)})
    y = tuple(ask(replace(question, demands=n)).value for n in further)
    return Curve("demands without further failures", tuple(map(float, further)), y, now, is_steps=False)


def over_failures(question: Question, most: int = 6) -> Curve | None:
    """Return the claim over failures, in as many demands as now."""
    counts = [k for k in range(question.failures + most + 1) if k <= question.demands]
    counts = counts[max(0, question.failures - most) :]
    if len(counts) < 2:
        return None
    y = tuple(ask(replace(question, failures=k)).value for k in counts)
    name = "failures in as many demands"
    return Curve(name, tuple(map(float, counts)), y, question.failures, is_steps=True)


def growth(question: Question, failed: Sequence[bool], points: int = 160) -> list[tuple[int, int, float]]:
    """Return (n, k, value) as the demands came in: at even steps, and before and after each of the first failures."""
    count = len(failed)
    marks = {round(count * index / points) for index in range(points + 1)}
    at_failures = [index + 1 for index, flag in enumerate(failed) if flag]
    for n in at_failures[:: max(1, len(at_failures) // points)]:
        marks |= {n - 1, n}
    seen, found = 0, []
    totals = [0]
    for flag in failed:
        seen += flag
        totals.append(seen)
    for n in sorted(marks):
        found.append((n, totals[n], ask(replace(question, demands=n, failures=totals[n])).value))
    return found


def _over_belief(question: Question, points: int) -> Curve | None:
    """Return the claim over the strongest belief, from the one before it on."""
    *before, (bound, now) = question.prior.quantiles.items()
    weaker = max([belief for _, belief in before] + [*question.prior.at_most.values()], default=0.0)
    lowest = weaker + (now - weaker) / 100
    x = [lowest + (0.9995 - lowest) * index / (points - 1) for index in range(points)]
    priors = (_with_quantile(question.prior, bound, bound, belief) for belief in x)
    return _curve(f"belief θ in pfd ≤ {bound:.4g}", question, x, now, priors)


def _over_bound(question: Question, points: int) -> Curve | None:
    """Return the claim over the bound of the strongest belief."""
    prior = question.prior
    *before, (bound, theta) = prior.quantiles.items()
    if bound == 0:
        return None
    low = max([prior.floor, bound / 30, *(1.001 * below for below in (*prior.at_most, *dict(before)))])
    limit = question.at if question.kind == "confidence" and question.at else 0.5
    high = min(max(limit, 1.05 * bound), 30 * bound, 0.99)
    x = _logarithmic(low, high, points)
    priors = (_with_quantile(prior, bound, epsilon, theta) for epsilon in x)
    return _curve(f"bound ε believed with θ = {theta:g}", question, x, bound, priors, is_logarithmic=True)


def _over_floor(question: Question, points: int) -> Curve | None:
    prior = question.prior
    if question.failures == 0 or prior.floor == 0 or prior.mean is not None:
        return None
    x = _logarithmic(max(prior.floor / 100, 1e-12), prior.cuts[0], points)
    priors = (replace(prior, quantiles=dict(prior.quantiles), floor=v) for v in x)
    return _curve("floor p_l", question, x, prior.floor, priors, is_logarithmic=True)


def _with_quantile(prior: Prior, old: float, bound: float, theta: float) -> Prior:
    rest = {epsilon: belief for epsilon, belief in prior.quantiles.items() if epsilon != old}
    return replace(prior, quantiles={bound: theta, **rest})


def _curve(
    quantity: str,
    question: Question,
    x: Sequence[float],
    now: float,
    priors: Iterable[Prior],
    *,
    is_logarithmic: bool = False,
) -> Curve | None:
    try:
        y = tuple(ask(replace(question, prior=prior)).value for prior in priors)
    except ConfigurationError:  # the mean that is known allows no such prior
        return None
    return Curve(quantity, tuple(x), y, now, is_logarithmic)


def _logarithmic(low: float, high: float, points: int) -> list[float]:
    if low >= high:
        return [low, high] if low > high else [low]
    steps = (math.log(high) - math.log(low)) / (points - 1)
    return [min(high, math.exp(math.log(low) + steps * index)) for index in range(points)]
