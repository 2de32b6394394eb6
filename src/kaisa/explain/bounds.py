"""Bounds of a probability from trials, by the Kullback–Leibler divergence of Bernoulli variables.

    upper(p̂, n, β) = max {q : n · kl(p̂ ‖ q) ≤ β},   lower likewise;
    each misses the probability that n trials with mean p̂ were drawn from with a chance of at most e^−β (Chernoff).

`exploration` is the β of KL-LUCB (Kaufmann and Kalyanakrishnan 2013) for K arms in round t at confidence 1 − δ.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]
STEPS = 60  # of Newton's method at most; about six do
EXACT = 1e-13  # what kl may be above β/n
TINY = 1e-16  # what a probability may be from 0 and 1 where its logarithm is taken


def divergence(p: Array, q: Array) -> Array:
    """Return kl(p ‖ q) of Bernoulli variables; infinite where q excludes what p allows."""
    with np.errstate(divide="ignore", invalid="ignore"):
        first = np.where(p > 0, p * (np.log(p) - np.log(q)), 0.0)
        second = np.where(p < 1, (1 - p) * (np.log1p(-p) - np.log1p(-q)), 0.0)
    return first + second


def upper(mean: Array | float, trials: Array | float, beta: Array | float) -> Array:
    """Return the largest probability that the trials leave possible; 1 without trials."""
    return bound(mean, trials, beta, end=1.0)


def lower(mean: Array | float, trials: Array | float, beta: Array | float) -> Array:
    """Return the smallest probability that the trials leave possible; 0 without trials."""
    return bound(mean, trials, beta, end=0.0)


def exploration(arms: int, round_: int, delta: float) -> float:
    """Return β(t) = L + ln L with L = ln(405.5 · K · t^1.1 / δ)."""
    level = math.log(405.5 * arms * round_**1.1 / delta)
    return level + math.log(level)


def bound(mean: Array | float, trials: Array | float, beta: Array | float, end: Array | float) -> Array:
    """Return the bound on the side of an end: `upper` where it is 1, `lower` where it is 0.

    Newton's method solves kl(p̂ ‖ q) = β/n. The divergence is convex and, by Pinsker, at least 2 (q − p̂)²: from
    p̂ ± √(β/2n) the steps come nearer from outside alone, so that none ends within what the trials leave possible.
    """
    p, n, sides = (np.asarray(value, dtype=np.float64) for value in (mean, trials, end))
    room = np.where(n > 0, beta / np.maximum(n, 1), 1.0)
    rest = -_plogp(p) - _plogp(1 - p) + room
    q = _inside(p + (2 * sides - 1) * np.sqrt(room / 2))
    for _ in range(STEPS):
        slope = (q - p) / (q * (1 - q))
        excess = -p * np.log(q) - (1 - p) * np.log1p(-q) - rest
        q = _inside(q - excess / np.where(slope == 0, np.inf, slope))
        if excess.max() < EXACT:
            break
    return np.where((n <= 0) | (p == sides), sides, q)


def _plogp(p: Array) -> Array:
    return np.asarray(p * np.log(np.maximum(p, TINY)))


def _inside(q: Array) -> Array:
    """Return probabilities that have a logarithm."""
    return np.minimum(np.maximum(q, TINY), 1 - TINY)
