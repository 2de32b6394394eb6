"""Symmetric matrices: decompositions that do not give up at the first failure.

Every function works on the last two dimensions, so that equal shapes are decomposed as one batch. The law: a returned
decomposition is finite and ordered by ascending eigenvalue, and ``vectors @ diag(values) @ vectors.T`` is the input
within its precision. What LAPACK or cuSOLVER refuses is tried again with jitter on the diagonal, then in float64.
"""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kaisa.errors import DecompositionError

_JITTERS = (0.0, 1e-7, 1e-5)


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Returns eigenvalues (..., n) clamped at zero and eigenvectors (..., n, n) of a positive semi-definite matrix.

    Raises:
        DecompositionError: every attempt failed.
    """
    if matrix.shape[-1] == 1:
        return matrix[..., 0].clamp(min=0), torch.ones_like(matrix)
    values, vectors = _retry(matrix, lambda m: tuple(torch.linalg.eigh(m)))
    return values.clamp(min=0), vectors


def inverse(matrix: Tensor) -> Tensor:
    """Returns the inverse of a positive definite matrix (..., n, n) through its Cholesky factor.

    Raises:
        DecompositionError: the matrix is not positive definite even with jitter in float64.
    """
    return _retry(matrix, lambda m: (torch.cholesky_inverse(torch.linalg.cholesky(m)),))[0]


def orthonormalized(matrix: Tensor) -> Tensor:
    """Returns an orthonormal basis (..., n, n) of the columns, signs fixed so that a basis maps to itself."""
    basis, triangle = torch.linalg.qr(matrix)
    signs = torch.diagonal(triangle, dim1=-2, dim2=-1).sign()
    fixed: Tensor = basis * torch.where(signs == 0, torch.ones_like(signs), signs).unsqueeze(-2)
    return fixed


def off_diagonal_ratio(matrix: Tensor) -> Tensor:
    """Returns the share (...) of the Frobenius norm that lies off the diagonal: 0 for a diagonal matrix."""
    total = matrix.square().sum((-2, -1))
    diagonal = torch.diagonal(matrix, dim1=-2, dim2=-1).square().sum(-1)
    return ((total - diagonal).clamp(min=0) / total.clamp(min=torch.finfo(matrix.dtype).tiny)).sqrt()


def pack(matrix: Tensor) -> Tensor:
    """Returns the upper triangles of symmetric matrices (..., n, n) as (..., n (n + 1) / 2)."""
    rows, columns = _triangle(matrix.shape[-1], matrix.device)
    return matrix[..., rows, columns]


def unpack(packed: Tensor, size: int) -> Tensor:
    """Returns the symmetric matrices (..., n, n) whose upper triangles are given."""
    rows, columns = _triangle(size, packed.device)
    matrix = packed.new_empty(*packed.shape[:-1], size, size)
    matrix[..., rows, columns] = packed
    matrix[..., columns, rows] = packed
    return matrix


@functools.lru_cache(maxsize=256)
def _triangle(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    rows, columns = torch.triu_indices(size, size, device=device)
    return rows, columns


def _retry(matrix: Tensor, decompose: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    reasons = []
    for candidate in _candidates(matrix):
        try:
            result = decompose(candidate)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            reasons.append(str(error).split("\n")[0])
            continue
        # LAPACK and cuSOLVER report to the host already, so that looking at the result costs no further wait.
        if all(torch.isfinite(part).all() for part in result):
            return tuple(part.to(matrix.dtype) for part in result)
        reasons.append("the result is not finite")
    raise DecompositionError(
        f"no decomposition of a {tuple(matrix.shape)} matrix after {len(reasons)} attempts: {reasons[-1]}"
    )


def _candidates(matrix: Tensor) -> Iterator[Tensor]:
    for dtype in dict.fromkeys((torch.promote_types(matrix.dtype, torch.float32), torch.float64)):
        exact = matrix.to(dtype)
        mean_eigenvalue = torch.diagonal(exact, dim1=-2, dim2=-1).abs().mean(-1)
        for jitter in _JITTERS:
            if jitter == 0.0:
                yield exact
            else:
                shift = jitter * mean_eigenvalue + torch.finfo(dtype).tiny
                identity = torch.eye(exact.shape[-1], dtype=dtype, device=exact.device)
                yield exact + shift[..., None, None] * identity
