"""The worst case as a linear-fractional programme, with the dual that proves it.

    minimise  ∫ v L dF / ∫ L dF   over distributions F that meet the prior        v(x) = [x ≤ p]  or  (1 − x)ᵗ

By Charnes and Cooper (y = F / ∫ L dF, s = 1 / ∫ L dF) it is a linear programme in y and s. It is solved on some points
and again with those added at which its dual is violated most, until there are none. The dual is a proof that
anyone can check by looking at one function of x: with multipliers μ of the cells and ν ≥ 0 of the mean,

    (v(x) − R) L(x) + ν x ≥ μ(cell of x)  for all x,     Σ m_j μ_j − ν · mean ≥ 0     ⇒     no prior gives less than R

Closed forms have such multipliers too: μ_j is the value of the left side at the atom of cell j.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kaisa.assure.claims_closed import Atom, Claim, Question, solve_closed, with_posterior
from kaisa.assure.claims_likelihood import log_likelihood
from kaisa.assure.prior import Prior
from kaisa.errors import ConfigurationError

POINTS = 40  # of each spacing in each piece at the start
CHECKED = 1000  # of each spacing in each piece where the dual is looked at
ROUNDS = 60
VALLEYS = 4  # of a piece, the lowest first
TOLERANCE = 1e-13
SHARPER = 1e5  # of the objective, because the solver's tolerances are absolute
MOST = 1e6  # points more likely than the worst case by this enter only if the dual asks for them

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Certificate:
    """What proves that no prior gives a smaller value.

    Attributes:
        value: R, the confidence or reliability that is proved; of an expected pfd 1 − R.
        multipliers: μ of each cell, ascending; likelihoods are relative to the greatest at an atom.
        of_mean: ν, 0 without a bound on the mean.
        slack: the least of (v − R) L + ν x − μ over the points that were looked at; negative by rounding alone.
        gap: Σ m μ − ν · mean; negative by rounding alone.
        points: how many were looked at.
    """

    value: float
    multipliers: tuple[float, ...]
    of_mean: float
    slack: float
    gap: float
    points: int

    def holds(self, tolerance: float = 1e-9) -> bool:
        """Whether slack and gap are no more negative than rounding explains."""
        return self.slack >= -tolerance and self.gap >= -tolerance


def certify(claim: Claim, points: int = CHECKED) -> Certificate:
    """Return the dual of a claim, looked at on a grid of its own.

    Raises:
        ConfigurationError: the claim is void, so that there is nothing to prove.
    """
    if claim.void is not None:
        raise ConfigurationError(f"a void claim has nothing to prove: {claim.void}")
    if claim.question.prior.mean is not None:
        return solve_with_dual(claim.question, points)[1]
    problem, p = _Problem(claim.question, _scale(claim.worst_case, claim.question)), _p(claim.question)
    value = claim.complement if claim.question.kind == "expected_pfd" else claim.value
    gains = [
        float(problem.gain(np.array([atom.at]), atom.just_above or atom.at > p, value)[0]) for atom in claim.worst_case
    ]
    return _look(problem, value, gains, 0.0, points)


def solve_programme(question: Question) -> Claim:
    """Return the worst case by the linear programme alone, whatever closed forms there may be.

    Raises:
        ConfigurationError: scipy is not installed, or the programme has no solution.
    """
    return solve_with_dual(question, CHECKED)[0]


def solve_with_dual(question: Question, points: int) -> tuple[Claim, Certificate]:
    """Return the worst case and its proof."""
    problem = _Problem(
        question, _scale(solve_closed(replace(question, prior=_without_mean(question))).worst_case, question)
    )
    columns = problem.start()
    for _ in range(ROUNDS):
        solution = _solve(problem, columns)
        new = problem.violated(solution, points)
        if not new:
            break
        columns += new
    found = _look(problem, solution.value, solution.multipliers, solution.of_mean, points)
    return _claim(question, solution, columns[: len(solution.masses)]), found


def _without_mean(question: Question) -> Prior:
    return replace(question.prior, mean=None)


def _p(question: Question) -> float:
    return float(question.at or 1) if question.kind == "confidence" else 1.0


def _scale(atoms: Sequence[Atom], question: Question) -> float:
    return max(log_likelihood(atom.at, question.demands, question.failures) for atom in atoms)


@dataclass(frozen=True)
class _Column:
    """A point of a cell, and whether it counts as above p."""

    x: float
    above: bool
    row: int


@dataclass(frozen=True)
class _Piece:
    """A part of a cell on which v is smooth."""

    low: float
    high: float
    row: int
    above: bool


@dataclass(frozen=True)
class _Solution:
    """What the programme on some points gives."""

    value: float
    masses: Array
    multipliers: Sequence[float]
    of_mean: float


class _Problem:
    """The question as arrays, with likelihoods relative to a scale."""

    def __init__(self, question: Question, scale: float) -> None:
        self.question, self.scale, self.p = question, scale, _p(question)
        prior = question.prior
        self.edges = (prior.floor, *prior.cuts, 1.0)
        self.masses = [cell.mass for cell in prior.cells]

    @property
    def pieces(self) -> list[_Piece]:
        made = []
        for row, (low, high) in enumerate(pairwise(self.edges)):
            if self.question.kind == "confidence" and low < self.p < high:
                made += [_Piece(low, self.p, row, above=False), _Piece(self.p, high, row, above=True)]
            else:
                made.append(_Piece(low, high, row, above=low >= self.p))
        return made

    def likelihood(self, x: Array) -> Array:
        k, successes = self.question.failures, self.question.demands - self.question.failures
        with np.errstate(divide="ignore"):
            logs = (k * np.log(x) if k else 0.0) + (successes * np.log1p(-x) if successes else np.zeros_like(x))
        return np.asarray(np.exp(np.minimum(logs - self.scale, 690.0)), dtype=np.float64)

    def worth(self, x: Array, above: bool) -> Array:
        if self.question.kind == "confidence":
            return np.full_like(x, 0.0 if above else 1.0)
        with np.errstate(divide="ignore"):
            return np.asarray(np.exp(float(self.question.at or 1) * np.log1p(-x)), dtype=np.float64)

    def gain(self, x: Array, above: bool, value: float) -> Array:
        return (self.worth(x, above) - value) * self.likelihood(x)

    def excess(self, piece: _Piece, x: Array, dual: _Solution | Certificate) -> Array:
        """Return by how much the dual's inequality holds."""
        return self.gain(x, piece.above, dual.value) + dual.of_mean * x - dual.multipliers[piece.row]

    def start(self) -> list[_Column]:
        made = []
        for piece in self.pieces:
            x = _grid(piece.low, piece.high, POINTS)
            likelihood = self.likelihood(x)
            kept = {*x[likelihood < MOST], x[np.argmin(likelihood)]}
            made += [_Column(float(at), piece.above, piece.row) for at in sorted(kept)]
        return made

    def violated(self, solution: _Solution, points: int) -> list[_Column]:
        """Return the points at which the dual is violated, the lowest of each valley."""
        return [
            _Column(x, piece.above, piece.row)
            for piece in self.pieces
            for x, excess in _valleys(partial(self.excess, piece, dual=solution), piece, points)
            if excess < -TOLERANCE
        ]


def _grid(low: float, high: float, points: int) -> Array:
    """Return points of a range: evenly, and ever closer to its lower end and to 0 and 1."""
    if low == high:
        return np.array([low])
    near_zero = np.geomspace(max(low, high * 1e-12), high, points)
    near_low = low + (high - low) * np.geomspace(1e-9, 1, points)
    near_one = 1 - np.geomspace(max(1 - high, 1e-9 * (1 - low)), 1 - low, points)
    parts = [np.linspace(low, high, points), near_zero, near_low, near_one, np.array([low, high])]
    return np.asarray(np.unique(np.clip(np.concatenate(parts), low, high)), dtype=np.float64)


def _valleys(function: Callable[[Array], Array], piece: _Piece, points: int) -> Iterator[tuple[float, float]]:
    """Yield where a function is lowest around each low point of a grid, and how low."""
    x = _grid(piece.low, piece.high, points)
    values = function(x)
    around = np.concatenate([[math.inf], values, [math.inf]])
    lowest_of = np.flatnonzero((values < around[:-2]) & (values <= around[2:]))
    for index in lowest_of[np.argsort(values[lowest_of])][:VALLEYS]:
        ends = float(x[max(index - 1, 0)]), float(x[min(index + 1, len(x) - 1)])
        finer = np.linspace(*ends, 65)
        for _ in range(6):
            best = int(np.argmin(function(finer)))
            finer = np.linspace(float(finer[max(best - 1, 0)]), float(finer[min(best + 1, 64)]), 65)
        found = np.array([*finer, x[index]])
        lowest = int(np.argmin(function(found)))
        yield float(found[lowest]), float(function(found)[lowest])


def _solve(problem: _Problem, columns: Sequence[_Column]) -> _Solution:
    """Solve the programme in y and s over some points."""
    prior, rows = problem.question.prior, len(problem.masses)
    x = np.array([column.x for column in columns])
    worth = np.concatenate([problem.worth(np.array([c.x]), c.above) for c in columns])
    likelihood = problem.likelihood(x)
    unit = np.minimum(1.0, 1 / np.maximum(likelihood, 1.0))  # of y: no coefficient is above 1
    member = np.array([[float(c.row == row) for c in columns] for row in range(rows)]) * unit
    normal = np.append(likelihood * unit, 0.0)
    # F(cut) − its belief, of each cut and of 1: what is believed is that it is 0, or not above or below that.
    up_to = np.column_stack([np.cumsum(member, axis=0), -np.cumsum(problem.masses)])
    signs = np.array([1.0] * len(prior.at_most) + [-1.0 if prior.at_least else 0.0] * len(prior.bounds) + [0.0])
    mean = [np.append(x * unit, -prior.mean)] if prior.mean is not None else []
    equal = np.vstack([normal, up_to[signs == 0]])
    below = np.vstack([*(signs[signs != 0, None] * up_to[signs != 0]), *mean, np.zeros(len(x) + 1)])
    done = _optimize().linprog(
        SHARPER * np.append(worth * likelihood * unit, 0.0),
        A_eq=equal,
        b_eq=np.eye(len(equal))[0],
        A_ub=below,
        b_ub=np.zeros(len(below)),
        method="highs-ds",
        options={"dual_feasibility_tolerance": 1e-10, "primal_feasibility_tolerance": 1e-10},
    )
    if done.status != 0:
        raise ConfigurationError(f"the programme has no solution ({done.message}); the prior may contradict itself")
    of_cuts, of_bounds = np.empty(rows), done.ineqlin.marginals / SHARPER
    of_cuts[signs == 0] = done.eqlin.marginals[1:] / SHARPER
    of_cuts[signs != 0] = signs[signs != 0] * of_bounds[: np.count_nonzero(signs)]
    of_rows = np.cumsum(of_cuts[::-1])[::-1]  # a point of a cell counts for its own cut and for all above
    of_mean = -float(of_bounds[-2]) if prior.mean is not None else 0.0
    return _Solution(float(done.fun) / SHARPER, done.x[:-1] * unit / done.x[-1], tuple(map(float, of_rows)), of_mean)


def _look(problem: _Problem, value: float, multipliers: Sequence[float], of_mean: float, points: int) -> Certificate:
    """Return the dual with what is found by looking at it on a grid."""
    found = Certificate(value, tuple(multipliers), of_mean, 0.0, 0.0, 0)
    least, count = math.inf, 0
    for piece in problem.pieces:
        x = _grid(piece.low, piece.high, points)
        least, count = min(least, float(problem.excess(piece, x, found).min())), count + len(x)
    gap = math.fsum(m * mu for m, mu in zip(problem.masses, multipliers, strict=True))
    gap -= of_mean * (problem.question.prior.mean or 0.0)
    return replace(found, slack=least, gap=gap, points=count)


def _claim(question: Question, solution: _Solution, columns: Sequence[_Column]) -> Claim:
    p = _p(question)
    kept = [(c, float(mass)) for c, mass in zip(columns, solution.masses, strict=True) if mass > 1e-12]
    atoms = [Atom(c.x, mass, just_above=c.above and c.x == p) for c, mass in sorted(kept, key=lambda one: one[0].x)]
    atoms = list(with_posterior(atoms, question.demands, question.failures))
    value = solution.value if question.kind != "expected_pfd" else 1 - solution.value
    return Claim(question, value, 1 - value, tuple(atoms), "linear programme")


def _optimize() -> Any:
    try:
        from scipy import optimize
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            "a bound on the mean needs scipy, which is not installed; pip install 'kaisa[assure]'"
        ) from error
    return optimize
