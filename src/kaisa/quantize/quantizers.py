"""Quantisers of gradients, weights and activations: unbiased where they round at random.

A tensor is read as a matrix X of N samples (its first dimension) by D numbers, B = 2^bits − 1:

    ptq      one grid for all, on which 0 lies exactly           Var ≤ N D step² / 4
    psq      a grid for each sample, from its lowest to its highest number    D / 4 · Σ step_i²
    column   a grid for each of the D places                     N / 4 · Σ step_j²
    bhq      psq of T (X − the least of each row), T⁻¹ of what comes out, plus these (see `kaisa.quantize.reflections`)

Ranges are of the tensor at hand. No host ever waits for the device. Source: arXiv 2010.14298.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kaisa import grids
from kaisa.errors import ConfigurationError
from kaisa.grids import Grid
from kaisa.quantize.reflections import Reflections, reflections_for

KINDS = ("ptq", "psq", "column", "bhq")
LEAST_BITS, MOST_BITS = 2, 16

Ranges = tuple[Tensor, Tensor]


def quantize(
    x: Tensor, kind: str, bits: int, *, stochastic: bool = True, generator: torch.Generator | None = None
) -> Tensor:
    """Return a tensor rounded to the numbers of a low-bit grid, in its own shape, type and strides.

    Gradients pass straight through.

    Example:
        >>> kaisa.quantize.quantize(torch.randn(32, 64), "bhq", bits=4)

    Args:
        x: any shape, its first dimension samples; 16-bit types are computed with in 32, and their results
            are rounded to them likewise. What is not finite stays so.
        kind: "ptq" (a grid a tensor), "psq" (a sample), "column" (a place in a sample) or "bhq" (block Householder).
        bits: 2 to 16; noise is made for up to 8, and biases are what more are for.
        stochastic: round at random, so that E[result] = x; otherwise to the nearest, ties to even.
        generator: of the noise, on the device of x; None for that of torch.

    Raises:
        ConfigurationError: there is no such kind or number of bits, or x does not hold floating-point numbers.
    """
    if x.requires_grad and torch.is_grad_enabled():
        check(x, kind, bits)
        result: Tensor = _StraightThrough.apply(x, kind, bits, stochastic, generator)  # type: ignore[no-untyped-call]
        return result
    return rounded(x, kind, bits, stochastic=stochastic, generator=generator)


@torch.no_grad()
def rounded(
    x: Tensor,
    kind: str,
    bits: int,
    *,
    stochastic: bool = True,
    generator: torch.Generator | None = None,
    ranges: Ranges | None = None,
    aligned: bool = True,
) -> Tensor:
    """Round a tensor, detached; see `quantize`.

    Args:
        x: what to round.
        kind: of the quantiser.
        bits: of a code.
        stochastic: round at random.
        generator: of the noise.
        ranges: lowest and highest number of a "ptq" grid, if not those of x; numbers beyond get its ends.
        aligned: whether 0 lies on a "ptq" grid exactly; otherwise it spans the range and nothing more.

    Raises:
        ConfigurationError: see `quantize`; or ranges are given for another kind.
    """
    rows, grid, reflections = on_grid(x, kind, bits, ranges, aligned)
    if reflections is None:
        values = grid.rounded(rows, stochastic=stochastic, generator=generator)
    else:
        values = reflections.inverse_(grid.round_(rows, stochastic=stochastic, generator=generator))
    if stochastic and x.element_size() < values.element_size():
        values = grids.in_type_at_random_(values, x.dtype, generator)
    return _shaped(values, x)


def on_grid(
    x: Tensor, kind: str, bits: int, ranges: Ranges | None = None, aligned: bool = True
) -> tuple[Tensor, Grid, Reflections | None]:
    """Return X, or for "bhq" T X, with its grid, and T; see `rounded`."""
    check(x, kind, bits)
    if ranges is not None and kind != "ptq":
        raise ConfigurationError(f"ranges are given for kind {kind!r}; leave them out, or choose kind 'ptq'")
    rows, reflections = transformed(matrix_of(x), kind)
    return rows, grid_of(rows, kind, bits, ranges, aligned), reflections


def transformed(matrix: Tensor, kind: str) -> tuple[Tensor, Reflections | None]:
    """Return the matrix, or for "bhq" T X, and T, which takes the least number of each row from it."""
    if kind != "bhq" or not matrix.numel():
        return matrix, None
    least = matrix.amin(1, keepdim=True)
    reflections = replace(reflections_for((matrix.amax(1, keepdim=True) - least).squeeze(1)), least=least)
    return reflections.apply(matrix), reflections


def _shaped(values: Tensor, source: Tensor) -> Tensor:
    """Return a matrix in the shape, type and strides of the tensor that it was made of."""
    order = memory_order(source)
    if not order:
        return values.to(source.dtype).reshape(())
    back = sorted(range(len(order)), key=order.__getitem__)
    return values.to(source.dtype).reshape([source.shape[place] for place in order]).permute(back)


def grid_of(rows: Tensor, kind: str, bits: int, ranges: Ranges | None = None, aligned: bool = True) -> Grid:
    """Return the grid of a matrix; of T X for kind "bhq"."""
    bins = 2**bits - 1
    if rows.numel() == 0:
        return Grid(rows.new_ones(()), None, 0, bins)
    if kind == "ptq":
        low, high = ranges or range_of(rows)
        make = grids.aligned if aligned else grids.spanning
        return make(low.to(rows.dtype), high.to(rows.dtype), bins)
    dimension = 0 if kind == "column" else 1
    return grids.spanning(rows.amin(dimension, keepdim=True), rows.amax(dimension, keepdim=True), bins)


def range_of(x: Tensor) -> Ranges:
    """Return the lowest and the highest number of a tensor, by two passes: one for both would be of one thread."""
    return x.detach().amin(), x.detach().amax()


def matrix_of(x: Tensor) -> Tensor:
    """Return a tensor as a matrix of samples by what they hold, in the order of memory, in 32 bits or more."""
    x = x.detach().reshape(1) if x.dim() == 0 else x.detach()
    rows = x.permute(memory_order(x)).reshape(len(x), x[:1].numel())
    return rows.float() if rows.element_size() < 4 else rows


def memory_order(x: Tensor) -> tuple[int, ...]:
    """Return the dimensions from the outermost in memory to the innermost, samples first."""
    strides = x.stride()
    inner = sorted(range(1, x.dim()), key=lambda dimension: -strides[dimension])
    return (0, *inner) if x.dim() else ()


def check(x: Tensor, kind: str, bits: int) -> None:
    """Refuse what no quantiser can do.

    Raises:
        ConfigurationError: see `quantize`.
    """
    if kind not in KINDS:
        raise ConfigurationError(f"kind is {kind!r}; give one of {', '.join(map(repr, KINDS))}")
    if not isinstance(bits, int) or not LEAST_BITS <= bits <= MOST_BITS:
        raise ConfigurationError(f"bits is {bits!r}; give an integer from {LEAST_BITS} to {MOST_BITS}")
    if not x.is_floating_point():
        raise ConfigurationError(f"x holds {x.dtype}; give floating-point numbers")


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, kind: str, bits: int, stochastic: bool, generator: torch.Generator | None
    ) -> Tensor:
        return rounded(x, kind, bits, stochastic=stochastic, generator=generator)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, None, None, None, None
