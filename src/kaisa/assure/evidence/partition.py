"""Reliability from cells: how often inputs of a kind come, times how often such inputs fail.

    probability of failure    λ = Σ_j o_j λ_j,   o the operational profile, λ_j the probability of failure in cell j

    o    Dirichlet(counts + 1)              from unlabelled inputs of operation (or a known profile)
    λ_j  Beta(failures + 1, successes + 1)  from labelled tests in the cell; no cell without failures counts as 0,
                                            and one without tests as 1: nobody has looked

Tests may be dealt to the cells as one likes, which is the point: rare cells are tested as well as common ones, and the
profile weighs them afterwards. Moments are closed forms, the upper bound is a quantile of draws from the posterior.

    E λ = Σ E o_j E λ_j
    V λ = Σ V λ_j (E o_j)² + (E λ_j)² V o_j + V λ_j V o_j  +  Σ_{i≠j} E λ_i E λ_j Cov(o_i, o_j)

The last sum is the Dirichlet's; Zhao et al. (ReAsDL) leave it out by taking the o_j for independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.cluster.vq import kmeans2, vq
from torch import Tensor

from kaisa.assure.evidence.held_out import check_belief
from kaisa.errors import ConfigurationError, DataError

DRAWS = 20_000


@dataclass(frozen=True)
class Cell:
    """Inputs of one kind.

    Attributes:
        seen: how many of the unlabelled inputs of operation fell into it.
        tests: how many labelled tests it got.
        failures: how many of them failed.
    """

    seen: int
    tests: int
    failures: int

    def __post_init__(self) -> None:
        if self.seen < 0 or not 0 <= self.failures <= self.tests:
            raise DataError(
                f"a cell has {self.seen} inputs and {self.failures} failures in {self.tests} tests; count again"
            )

    @property
    def moments(self) -> tuple[float, float]:
        """Mean and variance of its probability of failure."""
        if self.tests == 0:
            return 1.0, 0.0
        a, b = self.failures + 1, self.tests - self.failures + 1
        return a / (a + b), a * b / ((a + b) ** 2 * (a + b + 1))


@dataclass(frozen=True)
class PartitionReliability:
    """The posterior of the probability of failure, from cells.

    Attributes:
        cells: of the partition.
        belief: θ of the upper bound.
        seed: of the draws.
    """

    cells: tuple[Cell, ...]
    belief: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        check_belief(self.belief)
        if not self.cells or sum(cell.seen for cell in self.cells) == 0:
            raise DataError("the profile is unknown: no cell has seen an input of operation")

    @property
    def mean(self) -> float:
        """The expected probability of failure."""
        return self.moments[0]

    @property
    def moments(self) -> tuple[float, float]:
        """Mean and variance of the probability of failure, in closed form."""
        means, covariance = _dirichlet([cell.seen for cell in self.cells])
        rates = np.array([cell.moments for cell in self.cells])
        return combine(means, covariance, rates[:, 0], rates[:, 1])

    @cached_property
    def value(self) -> float:
        """The probability of failure that is exceeded with belief 1 − θ, from draws of the posterior."""
        generator = np.random.default_rng(self.seed)
        profile = generator.dirichlet([cell.seen + 1 for cell in self.cells], DRAWS)
        rates = np.ones_like(profile)
        for index, cell in enumerate(self.cells):
            if cell.tests:
                rates[:, index] = generator.beta(cell.failures + 1, cell.tests - cell.failures + 1, DRAWS)
        return float(np.quantile((profile * rates).sum(1), self.belief))

    @property
    def quantile(self) -> tuple[float, float] | None:
        """(ε, θ), or None where the bound says nothing."""
        return (self.value, self.belief) if self.value < 1 else None

    @property
    def unweighted(self) -> float:
        """The mean over cells of their probability of failure, whatever the profile is."""
        return float(np.mean([cell.moments[0] for cell in self.cells]))

    @property
    def statement(self) -> str:
        """What it shows."""
        tests, failures = sum(cell.tests for cell in self.cells), sum(cell.failures for cell in self.cells)
        blind = sum(cell.tests == 0 for cell in self.cells)
        rest = f", {blind} of them without tests and counted as failing" if blind else ""
        return (
            f"{failures} of {tests} tests in {len(self.cells)} cells{rest}, weighted by the profile: at most "
            f"{self.value:.3g} a demand with belief {self.belief:g}, {self.mean:.3g} expected"
        )

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What must hold."""
        return (
            "The unlabelled inputs are independent draws of the operational profile.",
            "Within a cell the tests are drawn as operation draws from it.",
            "Before the tests every probability of failure in a cell, and every profile, was equally likely.",
        )


def combine(profile: ArrayLike, covariance: ArrayLike, rates: ArrayLike, variances: ArrayLike) -> tuple[float, float]:
    """Return mean and variance of Σ o_j λ_j, the o_j correlated among themselves, the λ_j not.

    Args:
        profile: E o_j.
        covariance: Cov(o_i, o_j), or V o_j as a vector for o_j taken as independent.
        rates: E λ_j.
        variances: V λ_j.
    """
    o, e, v = (np.asarray(values, dtype=float) for values in (profile, rates, variances))
    spread = np.diag(covariance) if np.ndim(covariance) == 1 else np.asarray(covariance)
    return float(o @ e), float(v @ o**2 + e @ spread @ e + v @ np.diag(spread))


def count_cells(seen: Tensor, tested: Tensor, failed: Tensor, cells: int) -> tuple[Cell, ...]:
    """Count the cells of a partition.

    Args:
        seen: (inputs,) the cell of each unlabelled input of operation.
        tested: (tests,) the cell of each test.
        failed: (tests,) whether it failed.
        cells: how many cells there are.

    Raises:
        DataError: a cell that there is not, or not as many results as tests.
    """
    if tested.shape != failed.shape:
        raise DataError(f"{len(tested)} tests with {len(failed)} results; give as many of both")
    for places in (seen, tested):
        if places.numel() and not 0 <= int(places.min()) <= int(places.max()) < cells:
            raise DataError(
                f"cells from {int(places.min())} to {int(places.max())}; there are those from 0 to {cells - 1}"
            )
    totals = [
        torch.bincount(places.long(), minlength=cells).tolist() for places in (seen, tested, tested[failed.bool()])
    ]
    return tuple(Cell(*counts) for counts in zip(*totals, strict=True))


@dataclass(frozen=True)
class Clusters:
    """A partition by the nearest of several centres in the space of some features.

    Attributes:
        centres: (cells, features).
    """

    centres: Tensor

    @classmethod
    def of(cls, features: Tensor, cells: int, *, seed: int = 0) -> Clusters:
        """Find centres by k-means.

        Args:
            features: (inputs, …), say of the layer before the last, of inputs that are neither tested nor operated on.
            cells: how many.
            seed: of the first centres.

        Raises:
            DataError: fewer inputs than cells, or features that are not finite.
            ConfigurationError: fewer than two cells.
        """
        if cells < 2:
            raise ConfigurationError(f"cells is {cells}; give at least 2")
        rows = _rows(features)
        if len(rows) < cells:
            raise DataError(f"{len(rows)} inputs make no {cells} cells; give more inputs or fewer cells")
        centres, _ = kmeans2(rows, cells, minit="++", rng=np.random.default_rng(seed), missing="warn")
        return cls(torch.from_numpy(centres))

    def __call__(self, features: Tensor) -> Tensor:
        """Return the cell (inputs,) of each input."""
        return torch.from_numpy(vq(_rows(features), self.centres.numpy())[0]).long()


@dataclass(frozen=True)
class Grid:
    """A partition of a box of few dimensions into equal cells; what lies outside belongs to the nearest.

    Attributes:
        low: where the box begins, a number a dimension.
        high: where it ends.
        parts: into how many parts each dimension is cut.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    parts: int

    def __post_init__(self) -> None:
        if (
            self.parts < 1
            or len(self.low) != len(self.high)
            or not all(map(float.__lt__, map(float, self.low), map(float, self.high)))
        ):
            raise ConfigurationError(
                f"a box from {self.low} to {self.high} in {self.parts} parts; give low below high, at least 1"
            )

    @property
    def cells(self) -> int:
        """How many cells there are."""
        return int(self.parts ** len(self.low))

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return the cell (inputs,) of each input (inputs, dimensions)."""
        low, high = (torch.tensor(edge, dtype=torch.float64) for edge in (self.low, self.high))
        place = (
            ((inputs.detach().cpu().double() - low) / (high - low) * self.parts).floor().clamp(0, self.parts - 1).long()
        )
        weights = self.parts ** torch.arange(len(self.low))
        return (place * weights).sum(-1)


def _dirichlet(counts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    alpha = np.asarray(counts, dtype=float) + 1
    means = alpha / alpha.sum()
    return means, (np.diag(means) - np.outer(means, means)) / (alpha.sum() + 1)


def _rows(features: Tensor) -> np.ndarray:
    rows = features.detach().cpu().flatten(1).double()
    if not bool(torch.isfinite(rows).all()):
        raise DataError("the features are not finite; look at the model and its inputs")
    return rows.numpy()
