"""The root of an increasing function of one variable, to the last digits."""

from __future__ import annotations

import math
from collections.abc import Callable

STEPS = 200


def find_root(function: Callable[[float], float], guess: float) -> float:
    """Return where an increasing function changes sign, by bracketing from a positive guess.

    Works on the logarithm of the argument, so that 1e-300 is found as well as 1e300. Regula falsi
    by Anderson and Björck, with a bisection wherever the bracket shrinks too slowly.

    Raises:
        ArithmeticError: there is no sign change between the smallest and the largest number.
    """
    low, high = _bracket(lambda z: function(math.exp(z)), math.log(guess))
    return math.exp(_close_in(lambda z: function(math.exp(z)), low, high))


def _bracket(function: Callable[[float], float], start: float) -> tuple[float, float]:
    step, at = 1.0, start
    upwards = function(at) < 0
    while -700 < at < 700:
        following = at + step if upwards else at - step
        following = max(-700.0, min(700.0, following))
        if (function(following) < 0) != upwards:
            return (at, following) if upwards else (following, at)
        at, step = following, 2 * step
    raise ArithmeticError("the function has no root")


def _close_in(function: Callable[[float], float], low: float, high: float) -> float:
    below, above, last = function(low), function(high), 0
    for _ in range(STEPS):
        width = high - low
        middle = (low + high) / 2
        if not low < middle < high:
            break
        if math.isfinite(below) and math.isfinite(above) and below < 0 < above:
            secant = low - below * width / (above - below)
            middle = min(max(secant, low + 1e-3 * width), high - 1e-3 * width)
        found = function(middle)
        if found == 0:
            return middle
        if found < 0:
            above *= _weight(found, below) if last < 0 else 1.0
            low, below, last = middle, found, -1
        else:
            below *= _weight(found, above) if last > 0 else 1.0
            high, above, last = middle, found, 1
    return (low + high) / 2


def _weight(found: float, replaced: float) -> float:
    """Return how much less the end that has stayed twice now counts."""
    weight = 1 - found / replaced if math.isfinite(replaced) else 0.5
    return weight if weight > 0 else 0.5
