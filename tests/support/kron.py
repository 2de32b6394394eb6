"""K-FAC by its definition: factors from rows, dense Kronecker products, dense damped solves.

A matrix (out, in) is flattened row by row, so that the block of the Fisher that the pair (A, G)
stands for is `kron(G, A)`, the same operator that papers with column-stacked vectors write A ⊗ G.
"""

from __future__ import annotations

import torch
from torch import Tensor


def input_factor(rows: Tensor, sharing: str = "expand") -> Tensor:
    """Return A of rows (batch, positions, columns).

    expand: the mean of a aᵀ; reduce: that of ā āᵀ, with ā the mean over positions.
    """
    if sharing == "reduce":
        rows = rows.mean(dim=1, keepdim=True)
    return _sum_of_squares(rows) / (rows.shape[0] * rows.shape[1])


def gradient_factor(rows: Tensor, loss_terms: int, sharing: str = "expand") -> Tensor:
    """Return G of gradients (batch, positions, out) of a loss that is the mean over its terms.

    expand: the sum over positions of δ δᵀ; reduce: δ̄ δ̄ᵀ, with δ̄ the sum over positions.
    """
    if sharing == "reduce":
        rows = rows.sum(dim=1, keepdim=True)
    return _sum_of_squares(loss_terms * rows) / loss_terms


def _sum_of_squares(rows: Tensor) -> Tensor:
    total = rows.new_zeros(rows.shape[-1], rows.shape[-1])
    for row in rows.reshape(-1, rows.shape[-1]):
        total += torch.outer(row, row)
    return total


def dense_block(a: Tensor, g: Tensor) -> Tensor:
    """Return the block of the Fisher that a pair stands for; a vector stands for a diagonal."""
    return torch.kron(_as_matrix(g), _as_matrix(a))


def _as_matrix(factor: Tensor) -> Tensor:
    return torch.diag(factor) if factor.ndim == 1 else factor


def tikhonov_solve(a: Tensor, g: Tensor, gradient: Tensor, damping: float) -> Tensor:
    """Return (A ⊗ G + λI)⁻¹ applied to a gradient (out, in), by one dense solve."""
    block = dense_block(a, g)
    damped = block + damping * torch.eye(len(block), dtype=block.dtype)
    return torch.linalg.solve(damped, gradient.reshape(-1)).reshape(gradient.shape)


def split_solve(a: Tensor, g: Tensor, gradient: Tensor, damping: float) -> Tensor:
    """Return (A + π√λ I)⁻¹ ⊗ (G + √λ/π I)⁻¹ applied to a gradient.

    π² is the mean eigenvalue of A over that of G: Martens and Grosse 2015 (arXiv 1503.05671),
    section 6.3.
    """
    mean_a, mean_g = a.trace() / len(a), g.trace() / len(g)
    pi, root = (mean_a / mean_g).sqrt(), damping**0.5
    damped_a = a + root * pi * torch.eye(len(a), dtype=a.dtype)
    damped_g = g + root / pi * torch.eye(len(g), dtype=g.dtype)
    block = torch.kron(damped_g, damped_a)
    return torch.linalg.solve(block, gradient.reshape(-1)).reshape(gradient.shape)
