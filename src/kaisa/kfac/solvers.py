"""Solvers: decompose a factor (costly, one rank, plain tensors that travel), then solve with it (cheap, every step).

With V the gradient (out, in) of a layer, A = Q_A diag(a) Q_Aᵀ and G = Q_G diag(g) Q_Gᵀ:

    Eigen       (A⊗G + λI)⁻¹, exactly:          Q_G [ Q_Gᵀ V Q_A / (g aᵀ + λ) ] Q_Aᵀ
    Cholesky    (A + π√λ I)⁻¹ ⊗ (G + √λ/π I)⁻¹, π² = (tr A / dim A) / (tr G / dim G)   (Martens & Grosse 2015, §6.3)
    EKFAC       as Eigen with g aᵀ replaced by s, the second moments of the gradient in the eigenbasis: the diagonal
                that is nearest to the Fisher in Frobenius norm (George et al. 2018, arXiv 1806.03884)
    root=True   as EKFAC with √s + ε for s + λ: Adam in the K-FAC eigenbasis (compare SOAP, arXiv 2409.11321)

All tensors may carry leading dimensions: layers of equal shape are decomposed and solved as one batch. A factor with
one dimension less than the gradient is a diagonal; its decomposition is its values alone.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kaisa.errors import ConfigurationError
from kaisa.kfac import linalg

Decomposition = tuple[Tensor, ...]


@dataclass
class Moments:
    """Running second moments of the gradient in the eigenbasis: eigenvalues corrected by what is seen there.

    Attributes:
        values: (layers, ..., out, in), in units of the Fisher, of the squared gradient in the square-root form.
        terms: how many terms of the loss the gradient is the mean of; times its square estimates the Fisher.
        weight: the weight of all that the average has seen, for the correction of its bias; 1 when it has a prior.
    """

    values: Tensor
    weight: Tensor
    terms: float | Tensor = 1.0

    def take(self, squares: Tensor, decay: float) -> None:
        """Takes new squares into the average, unless they are not finite; the host does not look."""
        finite = torch.isfinite(squares.sum())
        self.weight = torch.where(finite, decay * self.weight + (1 - decay), self.weight)
        share = (1 - decay) / self.weight.clamp(min=1 - decay)
        self.values.lerp_(torch.where(finite, squares, self.values), share.to(self.values.dtype))


class Solver(ABC):
    """How the damped pair of a layer is inverted. Implementations are frozen values without state."""

    damps_factors: ClassVar[bool] = False
    """Whether ``decompose`` damps each factor for itself, for which it must know the mean eigenvalues of both."""

    def initial_moments(self, a: Decomposition, g: Decomposition) -> Moments | None:
        """Returns the state of a solver that corrects eigenvalues, for a new stack of layers."""
        return None

    @abstractmethod
    def layout(self, factor: torch.Size, is_diagonal: bool) -> tuple[torch.Size, ...]:
        """Returns the shapes of the tensors of a decomposition, so that it can be received."""

    @abstractmethod
    def decompose(
        self, factor: Tensor, is_diagonal: bool, shift: Tensor, previous: Decomposition | None
    ) -> Decomposition:
        """Returns what ``solve`` needs of one factor.

        Args:
            factor: (..., n, n), or (..., n) when diagonal.
            is_diagonal: whether the factor is a diagonal.
            shift: (...), the damping of this factor alone, for solvers that damp the factors one by one.
            previous: the decomposition that this one replaces, for solvers that start from it.

        Raises:
            DecompositionError: no attempt succeeded.
        """

    @abstractmethod
    def solve(
        self, a: Decomposition, g: Decomposition, gradient: Tensor, damping: float, moments: Moments | None
    ) -> Tensor:
        """Returns the preconditioned gradient.

        Args:
            a, g: decompositions of the factors.
            gradient: the raw gradient (..., out, in).
            damping: λ.
            moments: corrected eigenvalues of solvers that keep them; they see this gradient first.
        """


@dataclass(frozen=True)
class WarmStart:
    """When an old eigenbasis is good enough to start from.

    The off-diagonal share r of Qᵀ F Q says how well the old basis Q still diagonalises the factor F.

    Attributes:
        keep_below: r at most this keeps the basis and renews the eigenvalues alone.
        decompose_above: r beyond this asks for a full decomposition; between the two, ``iterations`` steps of
            orthogonal iteration (a product and a QR decomposition each) turn the basis.
        iterations: how many such steps.
    """

    keep_below: float = 0.01
    decompose_above: float = 0.5
    iterations: int = 1


@dataclass(frozen=True)
class Eigen(Solver):
    """Exact Tikhonov damping through eigendecompositions.

    Attributes:
        warm_start: starts from the last basis instead of from nothing; None decomposes in full each time.
        precision: the type in which factors are decomposed; None for float64 on a CPU, where it costs little and makes
            the result exact to the precision of the factor, and for the factor's own type elsewhere.
    """

    warm_start: WarmStart | None = None
    precision: torch.dtype | None = None

    def layout(self, factor: torch.Size, is_diagonal: bool) -> tuple[torch.Size, ...]:
        return (factor,) if is_diagonal else (factor[:-1], factor)

    def decompose(
        self, factor: Tensor, is_diagonal: bool, shift: Tensor, previous: Decomposition | None
    ) -> Decomposition:
        if is_diagonal:
            return (factor.clamp(min=0),)
        on_cpu = torch.float64 if factor.device.type == "cpu" else factor.dtype
        exact = factor.to(self.precision or on_cpu)
        if self.warm_start is None or previous is None or factor.shape[-1] <= 2:
            decomposition = linalg.eigh(exact)
        else:
            decomposition = _refresh(exact, previous[1].to(exact.dtype), self.warm_start)
        return tuple(part.to(factor.dtype) for part in decomposition)

    def solve(
        self, a: Decomposition, g: Decomposition, gradient: Tensor, damping: float, moments: Moments | None
    ) -> Tensor:
        return unrotate(rotate(gradient, a, g) / (outer_eigenvalues(a, g) + damping), a, g)


@dataclass(frozen=True)
class EKFAC(Eigen):
    """Eigenvalues corrected by the second moments of the gradient in the eigenbasis.

    Attributes:
        per_example: takes the moments of single examples' gradients on factor steps, at the cost of forming them; by
            default those of the batch gradient, which every step rotates anyway, times the number of examples.
        root: divides by the square root of the moments, as Adam does; then a step length of Adam's fits.
        decay: the decay of their running average, 0 to below 1.
        epsilon: what is added to the root, which damping plays no part in.
    """

    per_example: bool = False
    root: bool = False
    decay: float = 0.95
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ConfigurationError(f"EKFAC decay is {self.decay}; give a number from 0 to below 1")
        if self.root and self.per_example:
            raise ConfigurationError("the square-root form needs moments of the batch gradient; leave out per_example")

    def initial_moments(self, a: Decomposition, g: Decomposition) -> Moments | None:
        prior = outer_eigenvalues(a, g)
        weight = prior.new_ones((), dtype=torch.float64)
        return Moments(torch.zeros_like(prior), 0 * weight) if self.root else Moments(prior, weight)

    def solve(
        self, a: Decomposition, g: Decomposition, gradient: Tensor, damping: float, moments: Moments | None
    ) -> Tensor:
        assert moments is not None
        rotated = rotate(gradient, a, g)
        if not self.per_example:
            moments.take(rotated.square() * (1.0 if self.root else moments.terms), self.decay)
        if self.root:
            return unrotate(rotated / (moments.values.sqrt() + self.epsilon), a, g)
        return unrotate(rotated / (moments.values + damping), a, g)


@dataclass(frozen=True)
class Cholesky(Solver):
    """Explicit inverses of the two damped factors; the damping is fixed until the next decomposition."""

    damps_factors = True

    def layout(self, factor: torch.Size, is_diagonal: bool) -> tuple[torch.Size, ...]:
        return (factor,)

    def decompose(
        self, factor: Tensor, is_diagonal: bool, shift: Tensor, previous: Decomposition | None
    ) -> Decomposition:
        if is_diagonal:
            return (1 / (factor.clamp(min=0) + shift[..., None]),)
        identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
        return (linalg.inverse(factor + shift[..., None, None] * identity),)

    def solve(
        self, a: Decomposition, g: Decomposition, gradient: Tensor, damping: float, moments: Moments | None
    ) -> Tensor:
        left = g[0] @ gradient if g[0].ndim == gradient.ndim else g[0].unsqueeze(-1) * gradient
        return left @ a[0] if a[0].ndim == gradient.ndim else left * a[0].unsqueeze(-2)


def named(solver: str | Solver) -> Solver:
    """Returns the solver of a name, or the solver itself.

    Raises:
        ConfigurationError: there is no solver of this name.
    """
    if isinstance(solver, Solver):
        return solver
    solvers: dict[str, Solver] = {
        "eigen": Eigen(),
        "cholesky": Cholesky(),
        "ekfac": EKFAC(),
        "sqrt_ekfac": EKFAC(root=True),
        "warm_eigen": Eigen(warm_start=WarmStart()),
    }
    if solver not in solvers:
        raise ConfigurationError(f"solver is {solver!r}; give one of {', '.join(solvers)}, or a Solver")
    return solvers[solver]


def mean_eigenvalue(factor: Tensor, is_diagonal: bool) -> Tensor:
    """Returns the mean of the diagonal (...) of a factor."""
    return (factor if is_diagonal else torch.diagonal(factor, dim1=-2, dim2=-1)).mean(-1)


def shifts(mean_a: Tensor, mean_g: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Returns the damping (...) of each factor, split in proportion to the mean eigenvalues: (π √λ, √λ / π)."""
    tiny = torch.finfo(mean_a.dtype).tiny
    pi = (mean_a.clamp(min=tiny) / mean_g.clamp(min=tiny)).sqrt()
    pi = torch.where((mean_a > 0) & (mean_g > 0), pi, torch.ones_like(pi))
    return pi * damping**0.5, damping**0.5 / pi


def outer_eigenvalues(a: Decomposition, g: Decomposition) -> Tensor:
    """Returns the eigenvalues g aᵀ (..., out, in) of A⊗G."""
    return g[0].unsqueeze(-1) * a[0].unsqueeze(-2)


def rotate(gradient: Tensor, a: Decomposition, g: Decomposition) -> Tensor:
    """Returns the gradient in the eigenbasis, Q_Gᵀ V Q_A; diagonal factors have the identity for a basis."""
    left = g[1].mT @ gradient if len(g) > 1 else gradient
    return left @ a[1] if len(a) > 1 else left


def unrotate(rotated: Tensor, a: Decomposition, g: Decomposition) -> Tensor:
    """Returns a gradient in the eigenbasis to the parameters' own, Q_G V Q_Aᵀ."""
    left = g[1] @ rotated if len(g) > 1 else rotated
    return left @ a[1].mT if len(a) > 1 else left


def transported(
    eigenvalues: Tensor, old: tuple[Decomposition, Decomposition], new: tuple[Decomposition, Decomposition]
) -> Tensor:
    """Returns corrected eigenvalues carried to a new basis: the diagonal there of the matrix diag(s) here.

    With R = Q_newᵀ Q_old on each side this is (R_G∘R_G) s (R_A∘R_A)ᵀ, whose rows and columns sum to one, so that the
    trace stays and a permuted basis gets permuted moments.
    """
    (old_a, old_g), (new_a, new_g) = old, new
    result = eigenvalues
    if len(new_g) > 1:
        result = (new_g[1].mT @ old_g[1]).square() @ result
    if len(new_a) > 1:
        result = result @ (old_a[1].mT @ new_a[1]).square()
    return result


def _refresh(factor: Tensor, basis: Tensor, warm_start: WarmStart) -> tuple[Tensor, Tensor]:
    rotated = basis.mT @ factor @ basis
    ratio = linalg.off_diagonal_ratio(rotated).max()
    # One look by the host where a full decomposition would look several times.
    if ratio > warm_start.decompose_above:
        return linalg.eigh(factor)
    if ratio > warm_start.keep_below:
        # The QR decomposition keeps the first columns best: the dominant ones, and not the rounding of null vectors.
        order = torch.diagonal(rotated, dim1=-2, dim2=-1).argsort(-1, descending=True)
        basis = basis.gather(-1, order.unsqueeze(-2).expand_as(basis))
        for _ in range(warm_start.iterations):
            basis = linalg.orthonormalized(factor @ basis)
    values = torch.einsum("...ji,...jk,...ki->...i", basis, factor, basis)
    return values.clamp(min=0), basis
