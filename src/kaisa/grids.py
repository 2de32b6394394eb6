"""Grids of evenly spaced numbers, and rounding to them that is right on average.

    value = zero + step · code        code an integer from low to low + bins

A number x lies at y = (x − zero) / step between two codes, and is rounded up with the probability frac(y), so that
E[value] = x and Var[value] = step² · f (1 − f) ≤ step² / 4, f = frac(y). What quantises gradients and what compresses
messages both stand on this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Noise is drawn four numbers to a word: odd multiples of 2⁻¹⁶ between −½ and ½, symmetric, exact beside any code of 8
# bits, and never so large that it moves an integer.
_SHARE = 4
_ODD = 0x0001_0001_0001_0001
_UNIT = 2.0**-16
_CACHED = 2**17  # numbers


def noise_like(y: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return odd 16-bit integers in the shape of a tensor; times 2⁻¹⁶ they are spread evenly between −½ and ½."""
    count = -(-y.numel() // _SHARE)
    words = torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator, dtype=torch.int64, device=y.device)
    return words.bitwise_or_(_ODD).view(torch.int16)[: y.numel()].view(y.shape)


def round_at_random_(y: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Round numbers up or down so that they stay what they are on average, to within 2⁻¹⁶; integers stay.

    Args:
        y: numbers of at most 2⁸; of larger ones the resolution of their type is what noise loses.
        generator: on their device; None for that of torch.
    """
    for part in _parts(y):
        part.add_(noise_like(part, generator), alpha=_UNIT).round_()
    return y


def _parts(y: Tensor) -> Sequence[Tensor]:
    """Return views of a tensor whose noise fits into the cache of a processor; the whole elsewhere."""
    if y.device.type != "cpu" or torch.compiler.is_compiling() or not y.is_contiguous():
        return (y,)
    parts: Sequence[Tensor] = y.view(-1).split(_CACHED)
    return parts


@dataclass(frozen=True)
class Grid:
    """Evenly spaced numbers.

    Attributes:
        step: between neighbours, above 0: one for all numbers, or shaped to broadcast over rows or columns.
        zero: the number of code 0, shaped like the step; None for exactly 0.
        low: the lowest code.
        bins: spaces between codes, one less than there are codes.
    """

    step: Tensor
    zero: Tensor | None
    low: Tensor | int
    bins: int

    def coordinates(self, x: Tensor) -> Tensor:
        """Return where numbers lie between the codes, as a new tensor."""
        return x / self.step if self.zero is None else (x - self.zero).div_(self.step)

    def encode(self, x: Tensor, *, stochastic: bool = True, generator: torch.Generator | None = None) -> Tensor:
        """Return the codes of numbers, integers in their floating-point type; those beyond the grid get its ends."""
        return self._round_(self.coordinates(x), stochastic, generator)

    def encode_(self, x: Tensor, *, stochastic: bool = True, generator: torch.Generator | None = None) -> Tensor:
        """Make codes of numbers in their place; see `encode`."""
        y = x if self.zero is None else x.sub_(self.zero)
        return self._round_(y.div_(self.step), stochastic, generator)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the numbers of codes."""
        x = codes * self.step
        return x if self.zero is None else x.add_(self.zero)

    def decode_(self, codes: Tensor) -> Tensor:
        """Make numbers of codes in their place."""
        x = codes.mul_(self.step)
        return x if self.zero is None else x.add_(self.zero)

    def _round_(self, y: Tensor, stochastic: bool, generator: torch.Generator | None) -> Tensor:
        codes = round_at_random_(y, generator) if stochastic else y.round_()
        if isinstance(self.low, int):
            return codes.clamp_(self.low, self.low + self.bins)
        return codes.clamp_min_(self.low).clamp_max_(self.low + self.bins)


def spanning(low: Tensor, high: Tensor, bins: int) -> Grid:
    """Return the grid from the lowest to the highest number; of equal ones it holds exactly that one."""
    step = (high / bins - low / bins).clamp_min(torch.finfo(low.dtype).tiny)
    return Grid(step, low, 0, bins)


def aligned(low: Tensor, high: Tensor, bins: int) -> Grid:
    """Return the finest grid over a range, stretched to 0, on which 0 lies exactly.

    Of two codes for 0 beside its place in the range the one is taken that stretches the range less. Numbers of both
    signs have at least one code each, so that no sign is lost and nothing is divided by 0.
    """
    below, above = -low.clamp_max(0), high.clamp_min(0)
    has_below, has_above = (below > 0).to(low.dtype), (above > 0).to(low.dtype)
    tiny = torch.finfo(low.dtype).tiny
    place = below / (below / bins + above / bins).clamp_min(tiny)

    def step_of(codes_below: Tensor) -> Tensor:
        codes_above = bins - codes_below
        return torch.maximum(below / codes_below.clamp_min(1), above / codes_above.clamp_min(1))

    fewer = torch.minimum(torch.maximum(place.floor(), has_below), bins - has_above)
    more = torch.minimum(torch.maximum(place.ceil(), has_below), bins - has_above)
    is_finer = step_of(more) < step_of(fewer)
    codes_below = torch.where(is_finer, more, fewer)
    return Grid(step_of(codes_below).clamp_min(tiny), None, -codes_below, bins)


def symmetric(largest: Tensor, bins: int) -> Grid:
    """Return the grid with as many codes on either side of 0 that reaches the largest absolute value."""
    levels = bins // 2
    return Grid((largest / levels).clamp_min(torch.finfo(largest.dtype).tiny), None, -levels, 2 * levels)
