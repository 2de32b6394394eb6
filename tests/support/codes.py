"""A tensor as the integer codes that its quantiser rounds it to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kaisa.grids import Grid
from kaisa.quantize.quantizers import on_grid


@dataclass(frozen=True)
class Codes:
    """Integers, the grid that they count on, and the numbers (N × D) that they stand for."""

    codes: Tensor
    grid: Grid
    values: Tensor


def codes_of(
    x: Tensor,
    kind: str,
    bits: int,
    *,
    stochastic: bool = True,
    aligned: bool = True,
    generator: torch.Generator | None = None,
) -> Codes:
    """Take the steps of a quantiser one after another, where the library takes them in one pass."""
    rows, grid, reflections = on_grid(x, kind, bits, aligned=aligned)
    codes = grid.encode(rows, stochastic=stochastic, generator=generator)
    values = grid.decode(codes)
    return Codes(codes, grid, values if reflections is None else reflections.inverse(values))
