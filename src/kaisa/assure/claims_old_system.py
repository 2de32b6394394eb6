"""A new system B that is argued to be no worse than an old system A that has worked for long.

Believed, whatever the joint prior is otherwise: Pr(X_A ≤ ε) = θ, Pr(X_B ≤ X_A) = φ, and that neither is better than a
floor. The two beliefs cut the square of (X_A, X_B) into four regions. Their masses have one degree of freedom, s:

    s            X_B ≤ X_A ≤ ε           good, as p ≥ ε                    l = min L
    θ − s        X_A ≤ ε, X_B > X_A      bad where X_B > p                 u₂ = max L of what lies above p
    φ − s        X_A > ε, X_B ≤ X_A      likewise                          u₃
    1 − θ − φ + s   X_A > ε, X_B > X_A   likewise                          u₄

With L(x_A, x_B) = x_A^k_A (1 − x_A)^(n_A − k_A) · x_B^k_B (1 − x_B)^(n_B − k_B) the worst case has an atom a region,

    c(s) = s l / (s l + (θ − s) u₂ + (φ − s) u₃ + (1 − θ − φ + s) u₄),      θ + φ − 1 ≤ s ≤ min(θ, φ),

and is monotone in s: bad over good is B(0)/s + constant. So the worst s is one of the two ends, the lower one unless A
has failed. ln L is concave: its minimum over the triangle of the good is at a corner, and its maxima where the rates of
failure are, pushed into the region; where they contradict X_B ≤ X_A, at one rate of both. Without any failure and floor

    c = g / (g + u + w)     g = (θ + φ − 1)(1 − ε)^(n_A + n_B)    B good, and A good
                            u = (1 − φ)(1 − p)^n_B                A perfect, B just worse than p
                            w = (1 − θ)(1 − p)^(n_A + n_B)        both just worse than p

Success of A alone favours the world in which A is perfect and B is worse: c is not monotone in n_A. The whole curve
belongs in the report; leaving out evidence to reach its top is not sound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kaisa.assure.claims_closed import expit, whole
from kaisa.assure.claims_likelihood import log_likelihood, log_sum, most_likely
from kaisa.errors import ConfigurationError

Pair = tuple[float, float]
"""(x_A, x_B), the probabilities of failure per demand of the old and of the new system."""


@dataclass(frozen=True)
class OldSystem:
    """A system that has worked, and what is believed of it.

    Attributes:
        bound: ε, on its probability of failure per demand.
        belief: θ, that it is within the bound.
        no_worse: φ, the belief that the new system is no worse.
        demands: n_A that it has worked.
        failures: k_A of them.
        floor: neither system is better than this: label noise, hardware faults. Above 0 wherever failures may be
            observed, for otherwise the first failure refutes all.

    Raises:
        ConfigurationError: a number is out of its range.
    """

    bound: float
    belief: float
    no_worse: float
    demands: int
    failures: int = 0
    floor: float = 0.0

    def __post_init__(self) -> None:
        demands, failures = _check_counts("of the old system", self.demands, self.failures)
        object.__setattr__(self, "demands", demands)
        object.__setattr__(self, "failures", failures)
        for name, value in (("belief", self.belief), ("no_worse", self.no_worse)):
            if not 0 < value < 1:
                raise ConfigurationError(f"{name} is {value:g}; give a belief above 0 and below 1")
        if not 0 <= self.bound < 1:
            raise ConfigurationError(f"the bound of the old system is {self.bound:g}; it is at least 0 and below 1")
        if not 0 <= self.floor <= self.bound:
            raise ConfigurationError(f"floor is {self.floor:g}; give one from 0 to the bound, {self.bound:g}")


@dataclass(frozen=True)
class Succession:
    """The worst confidence that the new system is within a bound.

    Attributes:
        value: the confidence.
        worst_case: ((x_A, x_B), mass, posterior) of each atom; x_B at p lies just above it.
        void: why nothing can be claimed, or None.
    """

    value: float
    worst_case: tuple[tuple[Pair, float, float], ...]
    void: str | None = None


def confidence_as_successor(p: float, old: OldSystem, *, demands: int = 0, failures: int = 0) -> Succession:
    """Return the worst-case confidence that the new system fails with probability of at most p.

    Args:
        p: the bound that is claimed of the new system.
        old: the old system, and what is believed of both.
        demands: n_B that the new system has worked.
        failures: k_B of them.

    Raises:
        ConfigurationError: p is no probability, or the counts cannot be.
    """
    if not 0 < p < 1:
        raise ConfigurationError(f"the bound p is {p!r}; give a number above 0 and below 1")
    demands, failures = _check_counts("of the new system", demands, failures)
    void = _find_void(p, old, failures)
    if void is not None:
        return Succession(0.0, (), void)
    seen = _Seen(old.demands, old.failures, demands, failures)
    points = _worst_points(p, old, seen)
    return min((_weigh(points, masses, seen) for masses in _extremes(old)), key=lambda found: found.value)


@dataclass(frozen=True)
class _Seen:
    """The demands and failures of both systems."""

    of_old: int
    failures_of_old: int
    of_new: int
    failures_of_new: int

    def log_likelihood(self, at: Pair) -> float:
        of_old = log_likelihood(at[0], self.of_old, self.failures_of_old)
        return of_old + log_likelihood(at[1], self.of_new, self.failures_of_new)

    def rate_of_old(self, low: float, high: float) -> float:
        return most_likely(low, high, self.of_old, self.failures_of_old)

    def rate_of_new(self, low: float) -> float:
        return most_likely(low, 1.0, self.of_new, self.failures_of_new)

    def rate_of_both(self, low: float) -> float:
        return most_likely(low, 1.0, self.of_old + self.of_new, self.failures_of_old + self.failures_of_new)


def _worst_points(p: float, old: OldSystem, seen: _Seen) -> Sequence[Pair]:
    """Return where each of the four regions is worst; the first alone is good."""
    corners = ((old.floor, old.floor), (old.bound, old.floor), (old.bound, old.bound))
    good = min(corners, key=seen.log_likelihood)
    of_new, both = seen.rate_of_new(p), (seen.rate_of_both(p), seen.rate_of_both(p))
    below, above = seen.rate_of_old(old.floor, old.bound), seen.rate_of_old(old.bound, 1)
    beyond = seen.rate_of_old(p, 1)
    # The fourth is none where A's rate is beyond B's: the third is as likely then, and the least s leaves it empty.
    return good, (below, of_new), (beyond, of_new) if of_new <= beyond else both, (above, of_new)


def _extremes(old: OldSystem) -> Sequence[tuple[float, float, float, float]]:
    """Return the masses of the four regions at the least and at the greatest s."""
    theta, phi = old.belief, old.no_worse
    least, most = theta + phi - 1, min(theta, phi)
    return (least, 1 - phi, 1 - theta, 0.0), (most, theta - most, phi - most, 1 - max(theta, phi))


def _weigh(points: Sequence[Pair], masses: Sequence[float], seen: _Seen) -> Succession:
    parts = [(at, mass) for at, mass in zip(points, masses, strict=True) if mass > 0]
    logs = [math.log(mass) + seen.log_likelihood(at) for at, mass in parts]
    total = log_sum(logs)
    atoms = tuple((at, mass, math.exp(log - total)) for (at, mass), log in zip(parts, logs, strict=True))
    return Succession(expit(logs[0] - log_sum(logs[1:])), atoms)


def _check_counts(whose: str, demands: object, failures: object) -> tuple[int, int]:
    counted, failed = whole(f"demands {whose}", demands, 0), whole(f"failures {whose}", failures, 0)
    if failed > counted:
        raise ConfigurationError(f"there are {failed} failures in {counted} demands {whose}; count again")
    return counted, failed


def _find_void(p: float, old: OldSystem, failures: int) -> str | None:
    if p < old.bound:
        return (
            f"the bound {p:g} is below {old.bound:g}, the one that is believed of the old system; claim a larger one, "
            "or justify a smaller one of the old system"
        )
    if old.belief + old.no_worse <= 1:
        return (
            f"a belief of {old.belief:g} in the old system and of {old.no_worse:g} in the new one being no worse need "
            "never be true at once, for they add up to no more than 1; strengthen one of them"
        )
    if old.floor == 0 and failures + old.failures:
        return (
            f"with floor 0 all belief in two good systems may lie where {'the new' if failures else 'the old'} one "
            "cannot fail, which it did; nothing that was believed is left. Argue a floor above 0 (label noise, "
            "hardware faults), from evidence that does not come from these demands"
        )
    return None
