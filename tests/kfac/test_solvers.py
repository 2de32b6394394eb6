"""Solvers against dense inverses in float64, and what happens to corrected eigenvalues when the basis moves."""

import pytest
import torch
from torch import Tensor

from kaisa.errors import ConfigurationError
from kaisa.kfac import solvers
from kaisa.kfac.solvers import EKFAC, Cholesky, Eigen, Solver, WarmStart

OUT, IN, DAMPING = 3, 4, 0.1


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def factor(n: int, generator: torch.Generator, leading: tuple[int, ...] = ()) -> Tensor:
    rows = torch.randn(*leading, 2 * n, n, generator=generator, dtype=torch.float64)
    return rows.mT @ rows / (2 * n)


def decomposed(solver: Solver, a: Tensor, g: Tensor, diagonal: tuple[bool, bool] = (False, False)) -> tuple:
    means = [solvers.mean_eigenvalue(*side) for side in zip((a, g), diagonal, strict=True)]
    shifts = solvers.shifts(*means, DAMPING)
    return tuple(
        solver.decompose(side, is_diagonal, shift, None)
        for side, is_diagonal, shift in zip((a, g), diagonal, shifts, strict=True)
    )


def dense_solve(a: Tensor, g: Tensor, gradient: Tensor, damping: float) -> Tensor:
    """(A⊗G + λI)⁻¹ vec V by brute force; vec stacks columns, so that vec(G V A) = (A⊗G) vec V."""
    matrix = torch.kron(a, g) + damping * torch.eye(a.shape[0] * g.shape[0], dtype=a.dtype)
    return torch.linalg.solve(matrix, gradient.T.flatten()).reshape(gradient.T.shape).T


def test_eigen_is_exact_tikhonov_damping(generator: torch.Generator) -> None:
    a, g = factor(IN, generator), factor(OUT, generator)
    gradient = torch.randn(OUT, IN, generator=generator, dtype=torch.float64)
    found = Eigen().solve(*decomposed(Eigen(), a, g), gradient, DAMPING, None)
    torch.testing.assert_close(found, dense_solve(a, g, gradient, DAMPING), rtol=1e-10, atol=1e-12)


def test_cholesky_damps_both_factors_in_proportion_to_their_traces(generator: torch.Generator) -> None:
    a, g = 50 * factor(IN, generator), factor(OUT, generator)
    gradient = torch.randn(OUT, IN, generator=generator, dtype=torch.float64)
    pi = ((a.trace() / IN) / (g.trace() / OUT)).sqrt()
    damped_a = a + pi * DAMPING**0.5 * torch.eye(IN, dtype=torch.float64)
    damped_g = g + DAMPING**0.5 / pi * torch.eye(OUT, dtype=torch.float64)
    found = Cholesky().solve(*decomposed(Cholesky(), a, g), gradient, DAMPING, None)
    torch.testing.assert_close(found, dense_solve(damped_a, damped_g, gradient, 0.0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("solver", [Eigen(), Cholesky()])
@pytest.mark.parametrize("diagonal", [(True, False), (False, True), (True, True)])
def test_a_diagonal_factor_solves_as_its_dense_matrix_does(
    solver: Solver, diagonal: tuple[bool, bool], generator: torch.Generator
) -> None:
    dense = [
        torch.diag(side.diagonal()) if is_diagonal else side
        for side, is_diagonal in zip((factor(IN, generator), factor(OUT, generator)), diagonal, strict=True)
    ]
    gradient = torch.randn(OUT, IN, generator=generator, dtype=torch.float64)
    expected = solver.solve(*decomposed(solver, *dense), gradient, DAMPING, None)
    thin = [side.diagonal() if is_diagonal else side for side, is_diagonal in zip(dense, diagonal, strict=True)]
    found = solver.solve(*decomposed(solver, *thin, diagonal), gradient, DAMPING, None)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("solver", [Eigen(), Cholesky()])
def test_a_stack_of_layers_is_solved_as_its_layers_are(solver: Solver, generator: torch.Generator) -> None:
    a, g = factor(IN, generator, (5, 2)), factor(OUT, generator, (5, 2))
    gradient = torch.randn(5, 2, OUT, IN, generator=generator, dtype=torch.float64)
    found = solver.solve(*decomposed(solver, a, g), gradient, DAMPING, None)
    for layer in range(5):
        for group in range(2):
            one = decomposed(solver, a[layer, group], g[layer, group])
            alone = solver.solve(*one, gradient[layer, group], DAMPING, None)
            torch.testing.assert_close(found[layer, group], alone)


def test_ekfac_divides_by_the_average_of_squares_in_the_eigenbasis(generator: torch.Generator) -> None:
    a, g = factor(IN, generator, (1,)), factor(OUT, generator, (1,))
    solver = EKFAC(decay=0.75)
    sides = decomposed(solver, a, g)
    moments = solver.initial_moments(*sides)
    assert moments is not None
    moments.terms = 8.0
    gradient = torch.randn(1, OUT, IN, generator=generator, dtype=torch.float64)
    q_a, q_g = sides[0][1][0], sides[1][1][0]
    rotated = q_g.T @ gradient[0] @ q_a
    prior = torch.outer(sides[1][0][0], sides[0][0][0])
    expected = q_g @ (rotated / (0.75 * prior + 0.25 * 8 * rotated**2 + DAMPING)) @ q_a.T
    torch.testing.assert_close(solver.solve(*sides, gradient, DAMPING, moments)[0], expected)


def test_the_square_root_form_is_adam_without_momentum_when_the_basis_is_the_identity(
    generator: torch.Generator,
) -> None:
    a, g = torch.diag(torch.arange(1.0, 5.0))[None].double(), torch.diag(torch.arange(1.0, 4.0))[None].double()
    solver = EKFAC(root=True, decay=0.99, epsilon=1e-8)
    sides = decomposed(solver, a, g)
    moments = solver.initial_moments(*sides)
    parameter = torch.nn.Parameter(torch.zeros(OUT, IN, dtype=torch.float64))
    adam = torch.optim.Adam([parameter], lr=1.0, betas=(0.0, 0.99), eps=1e-8)
    for _ in range(5):
        gradient = torch.randn(1, OUT, IN, generator=generator, dtype=torch.float64)
        before = parameter.detach().clone()
        parameter.grad = gradient[0].clone()
        adam.step()
        found = solver.solve(*sides, gradient, DAMPING, moments)[0]
        torch.testing.assert_close(found, before - parameter.detach(), rtol=1e-6, atol=1e-8)


def test_corrected_eigenvalues_are_carried_to_the_diagonal_in_the_new_basis(generator: torch.Generator) -> None:
    old = decomposed(Eigen(), factor(IN, generator), factor(OUT, generator))
    new = decomposed(Eigen(), factor(IN, generator), factor(OUT, generator))
    values = torch.rand(OUT, IN, generator=generator, dtype=torch.float64)
    old_basis, new_basis = (torch.kron(sides[1][1], sides[0][1]) for sides in (old, new))
    matrix = old_basis @ torch.diag(values.flatten()) @ old_basis.T
    expected = (new_basis.T @ matrix @ new_basis).diagonal().reshape(OUT, IN)
    torch.testing.assert_close(solvers.transported(values, old, new), expected)


def test_a_warm_start_keeps_a_basis_that_is_still_good_and_renews_its_eigenvalues(generator: torch.Generator) -> None:
    solver = Eigen(warm_start=WarmStart(keep_below=0.05))
    first = solver.decompose(factor(6, generator), False, torch.tensor(0.0), None)
    moved = first[1] @ torch.diag(torch.arange(1.0, 7.0).double()) @ first[1].T
    values, basis = solver.decompose(moved, False, torch.tensor(0.0), first)
    torch.testing.assert_close(basis, first[1], rtol=0, atol=0)
    torch.testing.assert_close(values, torch.arange(1.0, 7.0).double())


def test_a_warm_start_turns_a_basis_towards_the_eigenvectors_without_decomposing(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    solver = Eigen(warm_start=WarmStart(keep_below=0.0, decompose_above=1.0, iterations=200))
    matrix = torch.diag(torch.tensor([1.0, 2.0, 4.0, 8.0]).double())
    turn, _ = torch.linalg.qr(torch.eye(4).double() + 0.2 * torch.randn(4, 4, generator=generator).double())
    monkeypatch.setattr(torch.linalg, "eigh", None)
    rotated = turn @ matrix @ turn.T
    values, basis = solver.decompose(rotated, False, torch.tensor(0.0), (torch.ones(4).double(), torch.eye(4).double()))
    torch.testing.assert_close(basis @ torch.diag(values) @ basis.T, rotated, rtol=1e-6, atol=1e-6)


def test_a_warm_start_decomposes_in_full_when_the_old_basis_says_nothing(generator: torch.Generator) -> None:
    solver = Eigen(warm_start=WarmStart(keep_below=0.0, decompose_above=0.1))
    matrix = factor(6, generator)
    random, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))
    values, basis = solver.decompose(matrix, False, torch.tensor(0.0), (torch.ones(6).double(), random))
    torch.testing.assert_close(basis @ torch.diag(values) @ basis.T, matrix)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: solvers.named("newton"), "solver is 'newton'; give one of eigen, cholesky"),
        (lambda: EKFAC(decay=1.0), "EKFAC decay is 1.0"),
        (lambda: EKFAC(root=True, per_example=True), "leave out per_example"),
    ],
)
def test_a_solver_that_cannot_work_is_refused(make: object, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        make()  # type: ignore[operator]
