"""Decompositions of symmetric matrices, and what happens when LAPACK refuses."""

import pytest
import torch

from kaisa.errors import DecompositionError
from kaisa.kfac import linalg


def positive_semidefinite(*shape: int, rank: int | None = None, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(*shape[:-2], rank or 2 * shape[-1], shape[-1], generator=generator, dtype=torch.float64)
    return rows.mT @ rows


def refuse(times: int, monkeypatch: pytest.MonkeyPatch, name: str = "eigh") -> list[torch.dtype]:
    """Makes a function of torch.linalg fail a number of times; returns the types that it was asked with."""
    original, asked = getattr(torch.linalg, name), []

    def failing(matrix: torch.Tensor) -> object:
        asked.append(matrix.dtype)
        if len(asked) <= times:
            raise torch.linalg.LinAlgError("did not converge")
        return original(matrix)

    monkeypatch.setattr(torch.linalg, name, failing)
    return asked


@pytest.mark.parametrize("shape", [(1, 1), (5, 5), (3, 4, 4), (2, 3, 2, 2), (4, 1, 1)])
def test_eigenpairs_make_the_matrix_again(shape: tuple[int, ...]) -> None:
    matrix = positive_semidefinite(*shape)
    values, vectors = linalg.eigh(matrix)
    torch.testing.assert_close(vectors @ torch.diag_embed(values) @ vectors.mT, matrix)
    assert values.shape == shape[:-1]


def test_eigenvalues_of_an_indefinite_matrix_are_never_negative() -> None:
    values, _ = linalg.eigh(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
    torch.testing.assert_close(values, torch.tensor([0.0, 3.0]))


def test_the_inverse_undoes_the_matrix() -> None:
    matrix = positive_semidefinite(3, 6, 6)
    identity = torch.eye(6, dtype=torch.float64).expand(3, 6, 6)
    torch.testing.assert_close(linalg.inverse(matrix) @ matrix, identity, atol=1e-8, rtol=0)


def test_a_refused_decomposition_is_tried_again_with_jitter_then_in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = refuse(4, monkeypatch)
    matrix = positive_semidefinite(4, 4).float()
    values, vectors = linalg.eigh(matrix)
    assert asked == [torch.float32] * 3 + [torch.float64] * 2
    assert values.dtype == vectors.dtype == torch.float32
    torch.testing.assert_close(vectors @ torch.diag(values) @ vectors.T, matrix, rtol=1e-4, atol=1e-4)


def test_a_singular_matrix_is_inverted_with_jitter_of_the_size_of_its_eigenvalues() -> None:
    singular = positive_semidefinite(8, 8, rank=3).float()
    inverse = linalg.inverse(singular)
    assert torch.isfinite(inverse).all()
    in_range = singular @ inverse @ singular
    torch.testing.assert_close(in_range, singular, rtol=1e-2, atol=1e-2 * float(singular.abs().max()))


def test_what_cannot_be_decomposed_is_an_error_that_counts_the_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(100, monkeypatch)
    with pytest.raises(DecompositionError, match=r"\(3, 3\) matrix after 6 attempts: did not converge"):
        linalg.eigh(torch.eye(3))


def test_the_basis_of_an_orthonormal_matrix_is_that_matrix() -> None:
    _, vectors = linalg.eigh(positive_semidefinite(7, 7))
    torch.testing.assert_close(linalg.orthonormalized(vectors * torch.arange(1, 8)), vectors)


def test_the_off_diagonal_ratio_is_zero_for_a_diagonal_and_one_without_a_diagonal() -> None:
    ratios = linalg.off_diagonal_ratio(torch.stack([torch.diag(torch.ones(3)), torch.ones(3, 3) - torch.eye(3)]))
    torch.testing.assert_close(ratios, torch.tensor([0.0, 1.0]))
