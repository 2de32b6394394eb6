"""Grids of evenly spaced numbers, and rounding to them that is right on average.

    value = zero + step · code        code an integer from low to low + bins

A number x lies at y = (x − zero) / step between two codes, and is rounded up with the probability frac(y), so that
E[value] = x and Var[value] = step² · f (1 − f) ≤ step² / 4, f = frac(y). What quantises gradients and what compresses
messages both stand on this file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Noise is of odd multiples of 2⁻¹⁶ between −½ and ½: symmetric, exact beside any code of 8 bits, and never so large
# that it moves an integer. Words are drawn at random and hold four of them.
_ODD = 0x0001_0001_0001_0001
_SHARE = 4
_UNIT = 2.0**-16
_EXPONENT = 0x7F80_0000  # bits of a 32-bit number
_SUMS = 16  # made of each first number
_CACHED = 2**18  # numbers, with which two threads are busy


def noise_like(y: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return odd 16-bit integers in the shape of a tensor; times 2⁻¹⁶ they are spread evenly between −½ and ½.

    To draw them is what rounding costs most, so that each is a sum modulo 2¹⁶ of two that are drawn, number i of row k
    being aᵢ + bᵢ₊₄ₖ. Any two of the sums share at most one of their terms and are independent: whatever is linear in
    the errors of rounding has the variance that it has with a draw for each.
    """
    count = -(-y.numel() // (_SHARE * _SUMS))
    size = (2 * count + _SUMS - 1,)
    words = torch.randint(-(2**63), 2**63 - 1, size, generator=generator, dtype=torch.int64, device=y.device)
    a = words[:count].bitwise_or_(_ODD).view(torch.int16)
    b = words[count:].bitwise_and_(~_ODD).view(torch.int16)
    return (a + b.unfold(0, len(a), _SHARE)).view(-1)[: y.numel()].view(y.shape)


def round_at_random_(y: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Round numbers up or down so that they stay what they are on average, to within 2⁻¹⁶; integers stay.

    Args:
        y: numbers of at most 2⁸ in 32 bits or more; otherwise the resolution of their type is what noise loses.
        generator: on their device; None for that of torch.
    """
    return y.add_(noise_like(y, generator), alpha=_UNIT).round_()


def in_type_at_random_(x: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> Tensor:
    """Return 32-bit numbers, which are used up, in a shorter type, each rounded up or down so that it stays on average.

    The step of a type at x is eps · 2^⌊log₂|x|⌋, or that of its smallest normal numbers; here it is at least 2⁻¹²⁶,
    because processors are slow with less. In steps x has as many places behind the point as the type lacks: noise of so
    many is exact beside it, and leaves alone what the type has.
    """
    info, own, result = torch.finfo(dtype), torch.finfo(x.dtype), torch.empty_like(x, dtype=dtype)
    unit, least = max(own.eps / info.eps, _UNIT), max(info.tiny * info.eps, own.tiny)
    coarser = round(math.log2(unit / _UNIT))
    for rows in parts_of(x):
        y = x[rows]
        powers = y.view(torch.int32).bitwise_and(_EXPONENT).view(x.dtype)  # what is not finite becomes not a number
        steps = powers.mul_(info.eps).clamp_min_(least)
        noise = noise_like(y, generator)
        if coarser:
            noise.bitwise_right_shift_(coarser).bitwise_or_(1)
        result[rows] = y.div_(steps).add_(noise, alpha=unit).round_().mul_(steps)
    return result


def parts_of(x: Tensor) -> list[slice]:
    """Return slices of rows that stay in a processor's cache while several operations pass over them.

    Elsewhere, and for the compiler, it is one slice of all. A part has itself for its parts, so that whoever goes
    through those of a tensor draws the same noise for it.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling() or x.numel() <= _CACHED:
        return [slice(None)]
    height = max(1, _CACHED // (x.numel() // len(x)))
    return [slice(first, first + height) for first in range(0, len(x), height)]


@dataclass(frozen=True)
class Grid:
    """Evenly spaced numbers.

    Attributes:
        step: between neighbours, above 0: one for all numbers, or shaped to broadcast over rows or columns.
        zero: the number of code 0, shaped like the step; None for exactly 0.
        low: the lowest code: one for all numbers, or shaped like the step.
        bins: spaces between codes, one less than there are codes.
    """

    step: Tensor
    zero: Tensor | None
    low: Tensor | int
    bins: int

    def coordinates(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Return where numbers lie between the codes, as a new tensor or in one that is given, which may be x."""
        rate = self.step.reciprocal()  # a product takes half the time of a quotient
        return torch.mul(x, rate, out=out) if self.zero is None else torch.sub(x, self.zero, out=out).mul_(rate)

    def encode(self, x: Tensor, *, stochastic: bool = True, generator: torch.Generator | None = None) -> Tensor:
        """Return the codes of numbers, integers in their floating-point type; those beyond the grid get its ends."""
        result = torch.empty_like(x)
        for rows in parts_of(x):
            self.of(rows)._encode_into(result[rows], x[rows], stochastic, generator)
        return result

    def decode(self, codes: Tensor) -> Tensor:
        """Return the numbers of codes."""
        x = codes * self.step
        return x if self.zero is None else x.add_(self.zero)

    def rounded(self, x: Tensor, *, stochastic: bool = True, generator: torch.Generator | None = None) -> Tensor:
        """Return ``decode(encode(x))``, in one pass through memory."""
        return self._round_into(torch.empty_like(x), x, stochastic, generator)

    def round_(self, x: Tensor, *, stochastic: bool = True, generator: torch.Generator | None = None) -> Tensor:
        """Make ``decode(encode(x))`` in the place of x."""
        return self._round_into(x, x, stochastic, generator)

    def of(self, rows: slice) -> Grid:
        """Return the grid of some rows."""
        if self.step.ndim < 2 or len(self.step) == 1:
            return self
        low = self.low if isinstance(self.low, int) else self.low[rows]
        return replace(self, step=self.step[rows], zero=None if self.zero is None else self.zero[rows], low=low)

    def _round_into(self, result: Tensor, x: Tensor, stochastic: bool, generator: torch.Generator | None) -> Tensor:
        for rows in parts_of(x):
            own = self.of(rows)
            y = own._encode_into(result[rows], x[rows], stochastic, generator).mul_(own.step)
            if own.zero is not None:
                y.add_(own.zero)
        return result

    def _encode_into(self, y: Tensor, x: Tensor, stochastic: bool, generator: torch.Generator | None) -> Tensor:
        self.coordinates(x, out=y)
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
