"""What a model asks of K-FAC in one step, and how K-FAC was told to do it. Pure Python: no torch.

Operations of a layer with an A of side a, a G of side g and r rows (examples times positions), an addition and a
multiplication each counted:

    statistics      2 r a² + 2 r g²         a diagonal factor 2 r a; a convolution of stride 1 fewer, see below
    solve           4 (g² a + g a²)         two rotations there and two back; Cholesky half of it
    decompose       9 n³ a factor           Householder tridiagonalisation, QR and back-transformation; Cholesky n³

A convolution of stride 1 with k × k taps needs c² products at k (2k - 1) shifts instead of those of (c k²)² pairs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from kaisa.errors import ConfigurationError
from kaisa.kfac.account import Sizes
from kaisa.kfac.placement import FactorShape, LayerShape

FORMS: dict[str | None, int | str | None] = {None: None, "float32": 4, "bfloat16": 2, "float16": 2, "int8": "int8"}
"""Bytes of a number in a form of payload; None for the type that it is held in."""


@dataclass(frozen=True)
class LayerWork:
    """What one layer brings: its shapes, and how many rows its statistics are made of.

    Attributes:
        shape: of its factors and its gradient.
        rows: rows of a and of delta that enter the statistics of one micro-batch on one rank; of a normalisation, all
            positions of all examples.
        kind: "linear", "convolution", "embedding", "norm" or what else it is called in a report.
        kernel: taps along each dimension of a convolution of stride 1; empty for all else.
        operations: of the statistics of one micro-batch, where they are known better than by the formulas above.
    """

    shape: LayerShape
    rows: int
    kind: str = "linear"
    kernel: tuple[int, ...] = ()
    operations: float | None = None


@dataclass(frozen=True)
class Workload:
    """A model on one rank, as far as a plan needs to know it.

    Attributes:
        name: for reports.
        layers: those that K-FAC covers, in the order of the model.
        forward_flops: additions and multiplications of the forward pass of one micro-batch.
        parameters: numbers of the whole model, which the ranks average in every step.
        batch: examples of one micro-batch on one rank.
        plain_seconds: of a step without K-FAC on one rank, where it was measured; None lets it be predicted.
    """

    name: str
    layers: tuple[LayerWork, ...]
    forward_flops: float = 0.0
    parameters: int = 0
    batch: int = 1
    plain_seconds: float | None = None

    @property
    def shapes(self) -> tuple[LayerShape, ...]:
        """The shapes of all layers."""
        return tuple(layer.shape for layer in self.layers)


@dataclass(frozen=True)
class SolverWork:
    """What a solver holds and does.

    Attributes:
        held: numbers in the decomposition of a factor.
        has_moments: whether it holds one more number for each of a gradient.
        products: matrix products with a factor-sized matrix a side in one solve.
        table: the name of its decomposition times in a hardware profile.
        operations: of a decomposition, times n³.
        damps_factors: whether it damps the factors one by one.
    """

    held: Callable[[FactorShape], int]
    has_moments: bool = False
    products: int = 2
    table: str = "eigen"
    operations: float = 9.0
    damps_factors: bool = False


def _eigenpairs(factor: FactorShape) -> int:
    return factor.elements if factor.is_diagonal else factor.elements + factor.blocks * factor.size


def _inverse(factor: FactorShape) -> int:
    return factor.elements


SOLVERS = {
    "eigen": SolverWork(_eigenpairs),
    "warm_eigen": SolverWork(_eigenpairs, table="warm_eigen", operations=6.0),
    "ekfac": SolverWork(_eigenpairs, has_moments=True),
    "sqrt_ekfac": SolverWork(_eigenpairs, has_moments=True),
    "cholesky": SolverWork(_inverse, products=1, table="cholesky", operations=1.0, damps_factors=True),
}


@dataclass(frozen=True)
class Settings:
    """How K-FAC was told to work; the names are those of ``KFACPreconditioner``.

    Attributes:
        factor_update_steps, inv_update_steps: the two intervals.
        solver: by name, one of ``SOLVERS``.
        statistics, gradients: forms in which they travel, as in ``Payload``: None, "float16", "bfloat16" or "int8".
        factor_bytes: of a number of a factor and of statistics.
        decomposition_bytes: of a number of a decomposition, and of a preconditioned gradient.
        bucket_bytes: of a message.
        deferred: whether statistics travel only when decompositions are due; None for the default, with COMM-OPT alone.
        colocate: whether A and G of a layer stay on one rank.
        local_below: factors with a side below this are decomposed by every gradient worker; "auto" for those for which
            ``LocalRule`` says so.
        spread: whether decompositions are spread over the steps until the next.
        accumulation_steps: micro-batches of a step.
        factor_examples: the share of examples that enter the statistics.
    """

    factor_update_steps: float = 10
    inv_update_steps: float = 100
    solver: str = "eigen"
    statistics: str | None = None
    gradients: str | None = None
    factor_bytes: int = 4
    decomposition_bytes: int = 4
    bucket_bytes: int = 25 * 2**20
    deferred: bool | None = None
    colocate: bool = False
    local_below: int | str = "auto"
    spread: bool = False
    accumulation_steps: int = 1
    factor_examples: float = 1.0

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise ConfigurationError(f"the planner knows no solver {self.solver!r}; give one of {', '.join(SOLVERS)}")
        if self.local_below != "auto" and not isinstance(self.local_below, int):
            raise ConfigurationError(f"Settings.local_below is {self.local_below!r}; give a whole number, or 'auto'")
        for name in ("statistics", "gradients"):
            form = getattr(self, name)
            if form not in FORMS:
                raise ConfigurationError(f"Settings.{name} is {form!r}; give one of {', '.join(map(repr, FORMS))}")

    @property
    def sizes(self) -> Sizes:
        """Bytes of the numbers of each kind."""
        return Sizes(
            FORMS[self.statistics] or self.factor_bytes,
            FORMS[self.gradients] or self.decomposition_bytes,
            self.factor_bytes,
            self.decomposition_bytes,
            self.bucket_bytes,
        )


def statistics_operations(layer: LayerWork) -> float:
    """Returns the additions and multiplications of one micro-batch's statistics."""
    if layer.operations is not None:
        return layer.operations
    shape, rows = layer.shape, layer.rows
    if layer.kind == "norm":
        return 10.0 * rows * shape.gradient[0]
    a = _moment_operations(shape.a, rows)
    if layer.kernel and not shape.a.is_diagonal:
        taps = math.prod(layer.kernel)
        shifts = math.prod(layer.kernel[:1]) * math.prod(2 * k - 1 for k in layer.kernel[1:])
        a = min(a, 2.0 * rows * shape.a.blocks * (shape.a.size / taps) ** 2 * shifts)
    return a + _moment_operations(shape.g, rows)


def _moment_operations(factor: FactorShape, rows: int) -> float:
    return 2.0 * rows * factor.blocks * factor.size * (1 if factor.is_diagonal else factor.size)
