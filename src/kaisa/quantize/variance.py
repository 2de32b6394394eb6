"""How much a stochastic quantiser adds to a tensor: exactly, and at most.

A number at y on its grid, with f = frac(y), has the variance step² f (1 − f), at most step² / 4. Numbers are rounded
independently, so that the variance of the whole, the sum over its entries, is

    Var = Σ_r c_r Σ_j step_rj² f_rj (1 − f_rj)        Var ≤ Σ_r c_r Σ_j step_rj² / 4

with c_r = 1, and for "bhq" the squared norm of column r of T⁻¹. All is computed in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kaisa.quantize.quantizers import check, grid_of, matrix_of, transformed
from kaisa.quantize.reflections import Reflections


@torch.no_grad()
def exact_variance(x: Tensor, kind: str, bits: int) -> Tensor:
    """Return the variance of ``quantize(x, kind, bits)`` given x, summed over its entries, in float64."""
    variances, reflections = code_variances(x, kind, bits)
    return (variances if reflections is None else variances * reflections.weights).sum()


@torch.no_grad()
def variance_bound(x: Tensor, kind: str, bits: int) -> Tensor:
    """Return what `exact_variance` is at most, for all tensors with the same grids."""
    check(x, kind, bits)
    rows, reflections = transformed(matrix_of(x).double(), kind)
    squares = grid_of(rows, kind, bits).step.square().expand(rows.shape) / 4
    return (squares if reflections is None else squares * reflections.weights).sum()


@torch.no_grad()
def code_variances(x: Tensor, kind: str, bits: int) -> tuple[Tensor, Reflections | None]:
    """Return the variance of every entry of X, or for "bhq" of T X, as a matrix; and T."""
    check(x, kind, bits)
    rows, reflections = transformed(matrix_of(x).double(), kind)
    grid = grid_of(rows, kind, bits)
    y = grid.coordinates(rows)
    fraction = y - y.floor()
    return grid.step.square() * fraction * (1 - fraction), reflections
