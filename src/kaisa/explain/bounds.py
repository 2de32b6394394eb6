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
BISECTIONS = 44  # halvings, to 6e-14
TINY = 1e-16  # what a probability may be from 0 and 1 where its logarithm is taken


def divergence(p: Array, q: Array) -> Array:
    """Return kl(p ‖ q) of Bernoulli variables; infinite where q excludes what p allows."""
    with np.errstate(divide="ignore", invalid="ignore"):
        first = np.where(p > 0, p * (np.log(p) - np.log(q)), 0.0)
        second = np.where(p < 1, (1 - p) * (np.log1p(-p) - np.log1p(-q)), 0.0)
    return first + second


def upper(mean: Array | float, trials: Array | float, beta: Array | float) -> Array:
    """Return the largest probability that the trials leave possible; 1 without trials."""
    return _bound(mean, trials, beta, end=1.0)


def lower(mean: Array | float, trials: Array | float, beta: Array | float) -> Array:
    """Return the smallest probability that the trials leave possible; 0 without trials."""
    return _bound(mean, trials, beta, end=0.0)


def exploration(arms: int, round_: int, delta: float) -> float:
    """Return β(t) = L + ln L with L = ln(405.5 · K · t^1.1 / δ)."""
    level = math.log(405.5 * arms * round_**1.1 / delta)
    return level + math.log(level)


def _bound(mean: Array | float, trials: Array | float, beta: Array | float, end: float) -> Array:
    """Halve the range between the mean and the end, at which kl(p̂ ‖ q) is infinite unless p̂ is that end, too."""
    p, n, level = np.broadcast_arrays(*(np.asarray(value, dtype=np.float64) for value in (mean, trials, beta)))
    room = np.where(n > 0, level / np.maximum(n, 1), np.inf) - _plogp(p) - _plogp(1 - p)
    inside, outside = p.copy(), np.full_like(p, end)
    for _ in range(BISECTIONS):
        middle = (inside + outside) / 2
        q = np.clip(middle, TINY, 1 - TINY)
        is_inside = -p * np.log(q) - (1 - p) * np.log1p(-q) <= room
        inside, outside = np.where(is_inside, middle, inside), np.where(is_inside, outside, middle)
    return np.where((n <= 0) | (p == end), end, inside)


def _plogp(p: Array) -> Array:
    return np.asarray(p * np.log(np.clip(p, TINY, 1)))
