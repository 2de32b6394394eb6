"""The worst case over all priors that agree with what is believed, cell by cell.

Of the probability of failure per demand X only a few things are believed (:class:`Prior`). After n demands with
k failures a claim is the *worst* posterior value over all priors in which they hold. The worst case has one atom a
cell, so it is found cell by cell, with L(x) = xᵏ(1 − x)ⁿ⁻ᵏ:

    confidence    Pr(X ≤ p | k, n) = N / (N + B),   N = Σ m_j min L over the cells up to p,
                                                    B = Σ m_j max L over what the others have above p
    reliability   E[(1 − X)ᵗ | k, n] = R, where     Σ m_j min over cell j of L(x)((1 − x)ᵗ − R) = 0
    expected pfd  1 − R of t = 1

One quantile and no failure: logit c = logit θ + n ln((1 − ε)/(1 − p)). Everything is computed in logarithms, so that
n = 1e9 is as good as n = 10, and with the complement beside the value, so that 1 − 1e-20 is not 1.

A claim that the data or the prior leave without any support has the value 0 and says why (``void``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from kaisa.assure.claims_likelihood import least_likely, log_likelihood, log_sum, most_likely
from kaisa.assure.claims_roots import find_root
from kaisa.assure.prior import Cell, Prior
from kaisa.errors import ConfigurationError

Kind = Literal["confidence", "reliability", "expected_pfd"]
KINDS: tuple[Kind, ...] = ("confidence", "reliability", "expected_pfd")


@dataclass(frozen=True)
class Question:
    """What is asked of a prior and of the demands so far.

    Attributes:
        kind: confidence in a bound, reliability over the next demands, or the expected pfd.
        prior: what was believed before.
        at: the bound p of a confidence, the number t of demands of a reliability; else None.
        demands: n, since the system was frozen.
        failures: k of them.

    Raises:
        ConfigurationError: a number is out of its range.
    """

    kind: Kind
    prior: Prior
    at: float | None = None
    demands: int = 0
    failures: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigurationError(f"unknown claim {self.kind!r}; choose from {', '.join(KINDS)}")
        object.__setattr__(self, "demands", whole("demands", self.demands, 0))
        object.__setattr__(self, "failures", whole("failures", self.failures, 0))
        if self.failures > self.demands:
            raise ConfigurationError(f"there are {self.failures} failures in {self.demands} demands; count again")
        object.__setattr__(self, "at", _check_at(self.kind, self.at))

    def describe(self) -> str:
        """Return what is asked, in words."""
        if self.kind == "confidence":
            return f"confidence that the probability of failure per demand is at most {self.at:g}"
        if self.kind == "reliability":
            return f"probability that the next {self.at:,.0f} demands all succeed"
        return "expected probability of failure per demand"


@dataclass(frozen=True)
class Atom:
    """A point at which the worst case holds mass.

    Attributes:
        at: the probability of failure per demand.
        mass: before the demands.
        posterior: after them.
        just_above: whether the worst case is approached from above ``at`` and not attained there.
    """

    at: float
    mass: float
    posterior: float = math.nan
    just_above: bool = False


@dataclass(frozen=True)
class Claim:
    """The worst answer over all priors that agree with what is believed.

    Attributes:
        question: what was asked.
        value: the least confidence or reliability, or the greatest expected pfd.
        complement: 1 − value, to full precision where value is almost 1.
        worst_case: the prior and posterior that give it; empty where none is singled out.
        method: how it was found.
        void: why nothing can be claimed; None where something can.
    """

    question: Question
    value: float
    complement: float
    worst_case: tuple[Atom, ...]
    method: str
    void: str | None = None

    def meets(self, target: float) -> bool:
        """Whether the claim is at least its target; an expected pfd, at most."""
        if self.void is not None:
            return False
        return self.value <= target if self.question.kind == "expected_pfd" else self.value >= target


def solve_closed(question: Question) -> Claim:
    """Return the worst-case answer in closed form or from one root; a bound on the mean is not looked at."""
    reason = find_void(question)
    if reason is not None:
        least = 1.0 if question.kind == "expected_pfd" else 0.0
        return Claim(question, least, 1.0 - least, (), "void", reason)
    return _confidence(question) if question.kind == "confidence" else _reliability(question)


def find_void(question: Question) -> str | None:
    """Return why the claim has no support at all, or None."""
    prior = question.prior
    if question.kind == "confidence" and question.at is not None and question.at < prior.bounds[0]:
        return (
            f"the bound {question.at:g} is below {prior.bounds[0]:g}, the smallest of which anything is believed: all "
            "belief may lie in between, so no number of demands gives confidence. Claim a larger bound, or justify "
            "a prior for a smaller one"
        )
    if any(_is_support(cell, question) for cell in prior.cells):
        return None
    return (
        f"with floor 0 all belief in a good system may lie at pfd 0, which {_failures(question.failures)} refuted; "
        "nothing that was believed is left. Argue a floor above 0 (label noise, hardware faults), from evidence "
        "that does not come from these demands"
    )


def whole(name: str, value: object, least: int) -> int:
    """Return a whole number of at least ``least``.

    Raises:
        ConfigurationError: it is not one.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or value != int(value) or value < least:  # type: ignore[operator, call-overload]
        raise ConfigurationError(f"{name} is {value!r}; give a whole number of at least {least}")
    return int(value)  # type: ignore[call-overload, no-any-return]


def _check_at(kind: Kind, at: float | None) -> float | None:
    if kind == "expected_pfd":
        return None
    if kind == "reliability":
        return whole("t", at, 1)
    if isinstance(at, bool) or not isinstance(at, int | float) or not 0 < at < 1:
        raise ConfigurationError(f"the bound p is {at!r}; give a number above 0 and below 1")
    return float(at)


def _failures(count: int) -> str:
    return "one failure has" if count == 1 else f"{count} failures have"


def _is_support(cell: Cell, question: Question) -> bool:
    """Whether a cell holds belief in a good system that the failures cannot refute."""
    is_good = cell.high < 1 and (question.kind != "confidence" or cell.high <= (question.at or 0.0))
    return is_good and (cell.low > 0 or question.failures == 0)


def _confidence(question: Question) -> Claim:
    n, k, p = question.demands, question.failures, question.at or 0.0
    cells = question.prior.cells
    good = [Atom(least_likely(cell.low, cell.high, n, k), cell.mass) for cell in cells if cell.high <= p]
    bad = [_worst_above(p, cell, n, k) for cell in cells if cell.high > p]
    for_it, against = (
        log_sum(math.log(atom.mass) + log_likelihood(atom.at, n, k) for atom in atoms) for atoms in (good, bad)
    )
    atoms = with_posterior([*good, *bad], n, k)
    return Claim(question, expit(for_it - against), expit(against - for_it), atoms, "closed form")


def _worst_above(p: float, cell: Cell, demands: int, failures: int) -> Atom:
    low = max(cell.low, p)
    x = most_likely(low, cell.high, demands, failures)
    return Atom(x, cell.mass, just_above=x == p)


def expit(x: float) -> float:
    """Return 1 / (1 + e⁻ˣ)."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def with_posterior(atoms: Sequence[Atom], demands: int, failures: int) -> tuple[Atom, ...]:
    """Return atoms with their mass after the demands."""
    logs = [math.log(atom.mass) + log_likelihood(atom.at, demands, failures) for atom in atoms]
    total = log_sum(logs)
    return tuple(replace(atom, posterior=math.exp(log - total)) for atom, log in zip(atoms, logs, strict=True))


def _reliability(question: Question) -> Claim:
    """Solve Σ m_j min over cell j of L(x)((1 − x)ᵗ − R) = 0 for ρ = −ln R, in y = −ln(1 − x)."""
    t = int(question.at or 1)
    game = _Game(t, question.demands, question.failures)
    cells = question.prior.cells
    rho = find_root(lambda rho: _balance(game, cells, rho), guess=t / (question.demands + t))
    chosen = [Atom(-math.expm1(-game.worst(cell, rho)), cell.mass) for cell in cells]
    atoms = with_posterior(chosen, question.demands, question.failures)
    value, complement = math.exp(-rho), -math.expm1(-rho)
    if question.kind == "expected_pfd":
        value, complement = complement, value
    return Claim(question, value, complement, atoms, "one root")


def _balance(game: _Game, cells: Sequence[Cell], rho: float) -> float:
    """Return ln(gains / losses) of the worst prior against R = e⁻ᵖ: negative while R is too high."""
    gains: list[float] = []
    losses: list[float] = []
    for cell in cells:
        sign, size = game.value(game.worst(cell, rho), rho)
        (gains if sign > 0 else losses).append(math.log(cell.mass) + size)
    for_it, against = log_sum(gains), log_sum(losses)
    if for_it == -math.inf:
        return -math.inf
    return math.inf if against == -math.inf else for_it - against


@dataclass(frozen=True)
class _Game:
    """h(y) = L · (e^(ρ − ty) − 1), which is L(x)((1 − x)ᵗ − R) / R with x = 1 − e⁻ʸ.

    Left of y = ρ/t it is positive and log-concave, so least at an end; right of it −h is log-concave, so that there
    is one valley: k/(eʸ − 1) − (n − k) + t/(e^(ty − ρ) − 1) = 0.
    """

    t: int
    demands: int
    failures: int

    def worst(self, cell: Cell, rho: float) -> float:
        """Return the y of a cell at which h is least."""
        low, high = -math.log1p(-cell.low), math.inf if cell.high == 1 else -math.log1p(-cell.high)
        valley = min(max(self.valley(rho), low), high)
        return min((low, high, valley), key=lambda y: _order(*self.value(y, rho)))

    def value(self, y: float, rho: float) -> tuple[int, float]:
        """Return the sign of h and ln|h|."""
        gain = rho - self.t * y
        successes = self.demands - self.failures
        log = self.failures * (math.log(-math.expm1(-y)) if y > 0 else -math.inf) if self.failures else 0.0
        log -= successes * y if successes else 0.0
        if gain == 0:
            return 0, -math.inf
        log += (max(gain, 0.0)) + math.log(-math.expm1(-abs(gain)))
        return (1 if gain > 0 else -1), log

    def valley(self, rho: float) -> float:
        """Return the y > ρ/t of the one valley."""
        successes = self.demands - self.failures
        if successes == 0:
            return math.inf
        nearest = math.log1p(self.t / successes)  # where it is without failures
        if not self.failures or self._slope(nearest * (1 + 1e-14), rho) <= 0:
            return (rho + nearest) / self.t
        further = find_root(lambda w: -self._slope(nearest + w, rho), guess=nearest)
        return (rho + nearest + further) / self.t

    def _slope(self, w: float, rho: float) -> float:
        """Return the derivative of ln(−h) at y = (ρ + w)/t."""
        of_failures = self.failures * _inverse_expm1((rho + w) / self.t)
        return of_failures - (self.demands - self.failures) + self.t * _inverse_expm1(w)


def _inverse_expm1(x: float) -> float:
    return math.exp(-x) / -math.expm1(-x)


def _order(sign: int, size: float) -> tuple[int, float]:
    """Return what signed numbers compare by, given as sign and logarithm."""
    return (0, 0.0) if sign == 0 or size == -math.inf else (sign, sign * size)
