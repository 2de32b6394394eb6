"""A new system B that is argued to be no worse than an old system A that has worked for long.

Believed, whatever the joint prior is otherwise: Pr(X_A ≤ ε) = θ and Pr(X_B ≤ X_A) = φ. After n_A and n_B demands,
none of which failed, and for p ≥ ε:

    c = g / (g + u + w)     g = (θ + φ − 1)(1 − ε)^(n_A + n_B)    B good, and A good
                            u = (1 − φ)(1 − p)^n_B                A perfect, B just worse than p
                            w = (1 − θ)(1 − p)^(n_A + n_B)        both just worse than p

Success of A alone favours the world in which A is perfect and B is worse: c is not monotone in n_A. The whole curve
belongs in the report; leaving out evidence to reach its top is not sound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from kaisa.assure.claims_closed import expit, whole
from kaisa.assure.claims_likelihood import log_sum
from kaisa.errors import ConfigurationError


@dataclass(frozen=True)
class OldSystem:
    """A system that has worked, and what is believed of it.

    Attributes:
        bound: ε, on its probability of failure per demand.
        belief: θ, that it is within the bound.
        no_worse: φ, the belief that the new system is no worse.
        demands: n_A that it has worked without failure.

    Raises:
        ConfigurationError: a number is out of its range.
    """

    bound: float
    belief: float
    no_worse: float
    demands: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "demands", whole("demands of the old system", self.demands, 0))
        for name, value in (("belief", self.belief), ("no_worse", self.no_worse)):
            if not 0 < value < 1:
                raise ConfigurationError(f"{name} is {value:g}; give a belief above 0 and below 1")
        if not 0 <= self.bound < 1:
            raise ConfigurationError(f"the bound of the old system is {self.bound:g}; it is at least 0 and below 1")


@dataclass(frozen=True)
class Succession:
    """The worst confidence that the new system is within a bound.

    Attributes:
        value: the confidence.
        worst_case: ((x_A, x_B), mass, posterior) of each atom; x_B at p lies just above it.
        void: why nothing can be claimed, or None.
    """

    value: float
    worst_case: tuple[tuple[tuple[float, float], float, float], ...]
    void: str | None = None


def confidence_as_successor(p: float, old: OldSystem, *, demands: int = 0, failures: int = 0) -> Succession:
    """Return the worst-case confidence that the new system fails with probability of at most p.

    Raises:
        ConfigurationError: p is no probability, or the new system has failed, for which no worst case is known here.
    """
    if not 0 < p < 1:
        raise ConfigurationError(f"the bound p is {p!r}; give a number above 0 and below 1")
    demands = whole("demands", demands, 0)
    if failures:
        raise ConfigurationError(
            f"the new system has failed {failures} times; the worst case beside an old system is known "
            "without failures only. Claim by confidence() with a prior of the new system alone"
        )
    void = _find_void(p, old)
    if void is not None:
        return Succession(0.0, (), void)
    both = old.belief + old.no_worse - 1
    good, bad = math.log1p(-old.bound), math.log1p(-p)
    parts = [
        ((old.bound, old.bound), both, (old.demands + demands) * good),
        ((0.0, p), 1 - old.no_worse, demands * bad),
        ((p, p), 1 - old.belief, (old.demands + demands) * bad),
    ]
    logs = [math.log(mass) + log for _, mass, log in parts]
    total = log_sum(logs)
    atoms = tuple((at, mass, math.exp(log - total)) for (at, mass, _), log in zip(parts, logs, strict=True))
    return Succession(expit(logs[0] - log_sum(logs[1:])), atoms)


def _find_void(p: float, old: OldSystem) -> str | None:
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
    return None
