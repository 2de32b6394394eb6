"""What is believed of a probability of failure per demand X before it has worked a single demand.

    0 ≤ floor ≤ ε₁ < ε₂ < … < 1          Pr(X ≤ ε_j) = θ_j (or ≥),  Pr(X < floor) = 0

The beliefs cut [floor, 1] into cells, each with a mass; how the mass lies in its cell nobody knows.

    cell      [floor, ε₁]    (ε₁, ε₂]    …    (ε_m, 1]
    mass          θ₁          θ₂ − θ₁    …     1 − θ_m

Of *at least* θ_j, mass may also lie in any lower cell: then every cell begins at the floor. Of *at most* η below some
α < ε₁ (a system is hardly better than that), the mass η of the first cell may also lie above α, but no more than that
below it: the cells are [floor, ε₁] with η and (α, ε₁] with θ₁ − η, and no other one begins below α.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from kaisa.errors import ConfigurationError


@dataclass(frozen=True)
class Cell:
    """A range of probabilities of failure and the belief that X is there.

    Attributes:
        low: where it begins; open, unless it is the first or ``Prior.at_least``.
        high: where it ends, included.
        mass: the belief.
    """

    low: float
    high: float
    mass: float


@dataclass(frozen=True)
class Prior:
    """Partial knowledge of the probability of failure per demand.

    Attributes:
        quantiles: {ε: θ}: Pr(X ≤ ε) = θ. With ε = 0 it is the belief that the system has no fault.
        floor: no system of this kind is better than this: label noise, hardware faults. Above 0
            wherever failures may be observed, for otherwise the first failure refutes all.
        at_least: the θ are lower bounds: Pr(X ≤ ε) ≥ θ.
        mean: an upper bound on E[X], or None. Claims then come from a linear programme.
        at_most: {α: η}: Pr(X ≤ α) ≤ η, for α below all ε: how hardly the system is better than that, as a lower
            confidence bound has it. It does not say that the system is ever as good.

    Raises:
        ConfigurationError: the numbers are no probabilities or contradict one another.
    """

    quantiles: Mapping[float, float]
    floor: float = 0.0
    at_least: bool = False
    mean: float | None = None
    at_most: Mapping[float, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("quantiles", "at_most"):
            pairs = ((_number("bound", e), _number("belief", t)) for e, t in getattr(self, name).items())
            object.__setattr__(self, name, MappingProxyType(dict(sorted(pairs))))
        object.__setattr__(self, "floor", _number("floor", self.floor))
        if not self.quantiles:
            raise ConfigurationError("a prior without any belief claims nothing; give quantiles={bound: belief}")
        _check_beliefs([*self.at_most.items(), *self.quantiles.items()])
        _check_floor(self.floor, self.cuts[0])
        if self.mean is not None:
            self._check_mean(_number("mean", self.mean))

    @property
    def bounds(self) -> tuple[float, ...]:
        """The ε, ascending."""
        return tuple(self.quantiles)

    @property
    def cuts(self) -> tuple[float, ...]:
        """All bounds of which anything is believed, ascending."""
        return (*self.at_most, *self.bounds)

    @property
    def cells(self) -> tuple[Cell, ...]:
        """What the worst case may move mass within, in order; see the head of the module."""
        lows = (self.floor, *self.cuts)
        highs = (*[self.bounds[0]] * len(self.at_most), *self.bounds, 1.0)
        beliefs = (0.0, *self.at_most.values(), *self.quantiles.values(), 1.0)
        lowest = lows[len(self.at_most)]
        return tuple(
            Cell(min(low, lowest) if self.at_least else low, high, after - before)
            for low, high, before, after in zip(lows, highs, beliefs[:-1], beliefs[1:], strict=True)
        )

    def describe(self) -> str:
        """Return the beliefs in words."""
        sign = "≥" if self.at_least else "="
        parts = [
            f"Pr(no fault) {sign} {theta:g}" if epsilon == 0 else f"Pr(pfd ≤ {epsilon:g}) {sign} {theta:g}"
            for epsilon, theta in self.quantiles.items()
        ]
        parts += [f"Pr(pfd ≤ {alpha:g}) ≤ {eta:g}" for alpha, eta in self.at_most.items()]
        parts += [f"pfd ≥ {self.floor:g}"] if self.floor > 0 else []
        parts += [f"E[pfd] ≤ {self.mean:g}"] if self.mean is not None else []
        return ", ".join(parts)

    def _check_mean(self, mean: float) -> None:
        least = math.fsum(cell.mass * cell.low for cell in self.cells)
        if not least < mean <= 1:
            raise ConfigurationError(
                f"mean is {mean:g}, but the quantiles and the floor allow no E[X] of {least:g} or less; "
                "give a larger mean or lower bounds"
            )


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigurationError(f"{name} is {value!r}; give a finite number")
    return float(value)


def _check_beliefs(beliefs: Sequence[tuple[float, float]]) -> None:
    """Refuse bounds and beliefs that are none or do not ascend together."""
    last, before = -1.0, 0.0
    for bound, belief in beliefs:
        if not 0 <= bound < 1:
            raise ConfigurationError(f"the prior has the bound {bound:g}; a bound is at least 0 and below 1")
        if bound <= last:
            raise ConfigurationError(
                f"Pr(X ≤ {last:g}) is at most {before:g}, a bound not below {bound:g}; give a lower one"
            )
        if not 0 < belief < 1:
            raise ConfigurationError(
                f"Pr(X ≤ {bound:g}) is {belief:g}; give a belief above 0 and below 1, which data can still change"
            )
        if belief <= before:
            raise ConfigurationError(
                f"Pr(X ≤ {bound:g}) is {belief:g}, but of a smaller bound it is {before:g}; of two bounds with "
                "the same belief leave one out"
            )
        last, before = bound, belief


def _check_floor(floor: float, lowest: float) -> None:
    if not 0 <= floor <= lowest:
        raise ConfigurationError(
            f"floor is {floor:g}; give one from 0 to the smallest bound, {lowest:g}: below its floor X cannot be"
        )
