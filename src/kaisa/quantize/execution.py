"""Linear layers in integers: the same codes as in the simulation, multiplied as 8-bit integers and summed in 32 bits.

A code q is moved by a whole number so that it fits into int8; a number is then offset + step q. With bars for sums,

    Σ_k (o + s p_mk)(o' + s' q_nk) = s s' Σ_k p_mk q_nk  +  s o' p̄_m  +  o s' q̄_n  +  o o' K

so that one integer product and two vectors of sums are all that is needed. Steps and offsets may differ between the
rows of what is multiplied from the left, but not along what is summed over: a gradient quantised by rows can make dx in
integers, T⁻¹ of Householder reflections being taken of the product (what they take from a row comes back times the sums
of w's columns), one quantised by columns dw if it is a matrix. Where that cannot be, or sums may leave 32 bits, the
product is one of floats, with the same quantised numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kaisa.grids import Grid, parts_of
from kaisa.quantize.config import INT8, SIMULATE, QuantConfig
from kaisa.quantize.quantizers import grid_of, matrix_of, transformed
from kaisa.quantize.reflections import Reflections
from kaisa.quantize.rounding import Branches, Rounding

Ranges = tuple[Tensor, Tensor]

WORTHWHILE = 2**22
"""Multiplications in a product from which on "auto" has it in integers."""

LEAST_SIDE = 64
"""The least length of a side of a product for "auto"."""

LONGEST = 2**17 - 1
"""The most products of two codes, of up to (−128)² = 2¹⁴ each, that are summed: 32 bits hold no more for certain."""


def is_in_integers(config: QuantConfig, x: Tensor, weight: Tensor) -> bool:
    """Say whether x @ weight.T is to be computed in integers."""
    if config.execution == SIMULATE or config.activation_bits is None or config.weight_bits is None:
        return False
    if x.dtype == torch.float64 or x.numel() == 0:
        return False
    rows, out, size = x.numel() // x.shape[-1], weight.shape[0], weight[0].numel()
    if max(out, size) > LONGEST or not is_taken(x.device, rows, size, out):
        return False
    if config.execution == INT8:
        return True
    return is_fast(x.device) and min(rows, out, size) >= LEAST_SIDE and rows * out * size >= WORTHWHILE


def is_taken(device: torch.device, rows: int, size: int, columns: int) -> bool:
    """Say whether the device's integer kernel takes (rows, size) @ (size, columns) and the products of its gradients.

    Those are (rows, columns) @ (columns, size) and (columns, rows) @ (rows, size). cuBLAS wants more than 16 rows on
    the left, and multiples of 8 for what is summed over and for columns on the right.
    """
    if device.type == "cuda":
        return min(rows, columns) > 16 and all(side % 8 == 0 for side in (rows, size, columns))
    return device.type == "cpu"


def is_fast(device: torch.device) -> bool:
    """Say whether integer products were found to be faster than those of floats: on processors that have VNNI."""
    return device.type == "cpu" and bool(torch.cpu._is_vnni_supported())


@dataclass(frozen=True)
class Codes:
    """A matrix in 8-bit integers.

    Attributes:
        values: (rows, columns), int8.
        step: between neighbours: one number, or (rows, 1), or (1, columns).
        offset: the number of code 0, shaped likewise.
    """

    values: Tensor
    step: Tensor
    offset: Tensor

    def decode(self) -> Tensor:
        """Return the numbers."""
        return self.values.to(self.step.dtype).mul_(self.step).add_(self.offset)

    def row_sums(self) -> Tensor:
        """Return (rows, 1) sums of codes, by a product with ones, which is faster than a sum."""
        ones = self.values.new_ones(self.values.shape[1], 8)
        return torch._int_mm(self.values, ones)[:, :1].to(self.step.dtype)

    def column_sums(self) -> Tensor:
        """Return (1, columns) sums of codes."""
        ones = self.values.new_ones(32 if self.values.is_cuda else 8, self.values.shape[0])
        return torch._int_mm(ones, self.values)[:1].to(self.step.dtype)


def codes_of(rows: Tensor, grid: Grid, bits: int, columns: int, *, stochastic: bool) -> Codes:
    """Return the codes of a matrix on a grid, as 8-bit integers with a number of columns."""
    moved = grid.low + 2 ** (bits - 1)
    values = torch.empty(rows.shape, dtype=torch.int8, device=rows.device)
    for part in parts_of(rows):
        values[part] = grid.of(part).encode(rows[part], stochastic=stochastic).sub_(moved)
    values = values.view(-1, columns)
    offset = grid.step * moved if grid.zero is None else grid.zero + grid.step * moved
    repeats = len(values) // max(1, len(rows))
    if grid.step.ndim == 2 and len(grid.step) > 1 and repeats > 1:
        return Codes(values, grid.step.repeat_interleave(repeats, 0), offset.repeat_interleave(repeats, 0))
    return Codes(values, grid.step, offset)


def _finished(sums: Tensor, step: Tensor, rows: Tensor, columns: Tensor, outer: Tensor | None = None) -> Tensor:
    """Return step · sums + rows + columns, where that is possible in the memory of the sums, which are used up.

    Args:
        sums: (rows, columns), int32.
        step: one number, or (rows, 1).
        rows: (rows, 1).
        columns: (1, columns).
        outer: (rows, 1), by which the columns are multiplied; None for 1.
    """
    if step.dtype != torch.float32 or torch.compiler.is_compiling():
        result = sums.to(step.dtype).mul_(step).add_(rows)
        return result.add_(columns if outer is None else outer * columns)
    result = sums.view(torch.float32)
    for part in parts_of(sums):
        own = result[part].copy_(sums[part]).mul_(step[part] if step.ndim else step).add_(rows[part])
        if outer is None:
            own.add_(columns)
        else:
            own.addcmul_(outer[part], columns)
    return result


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, config: QuantConfig, branches: Branches, ranges: Ranges | None
) -> Tensor:
    """Return x @ weight.T + bias, with the three products of training in integers where they can be.

    Args:
        x: (batch, ..., in).
        weight: (out, in).
        bias: (out,), or None; added as it is.
        config: bits of input and weight.
        branches: how the gradient of the result is quantised.
        ranges: between what the input is rounded; None for its own.
    """
    result: Tensor = _IntegerLinear.apply(x, weight, bias, config, branches, ranges)  # type: ignore[no-untyped-call]
    return result


def pointwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, config: QuantConfig, branches: Branches, ranges: Ranges | None
) -> Tensor:
    """Return the convolution of (batch, in, *positions) with kernels of 1."""
    rows = x.movedim(1, -1).contiguous()
    return linear(rows, weight.flatten(1), bias, config, branches, ranges).movedim(-1, 1)


class _IntegerLinear(torch.autograd.Function):
    """Differentiable once: only codes are kept of the input, a quarter of its memory."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        config: QuantConfig,
        branches: Branches,
        ranges: Ranges | None,
    ) -> Tensor:
        inputs = _nearest(x, config.activation_bits, weight.shape[1], aligned=False, ranges=ranges)
        blank = None if ranges is None else _not_numbers(x.detach().reshape(-1, weight.shape[1]))
        weights = _nearest(weight, config.weight_bits, weight.shape[1], aligned=True, ranges=None)
        ctx.branches, ctx.shape, ctx.dtypes = branches, x.shape, (x.dtype, weight.dtype)
        ctx.save_for_backward(*_parts(inputs), *_parts(weights))
        output = _times_transposed(inputs, weights, None if bias is None else bias.to(inputs.step.dtype), blank)
        return output.to(_output_type(x)).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        inputs, weights = Codes(*saved[:3]), Codes(*saved[3:])
        of_x, of_weight, of_bias = ctx.needs_input_grad[:3]
        branches: Branches = ctx.branches
        gradient = gradient.contiguous().to(inputs.step.dtype)
        dx = dw = db = shared = None
        if of_x:
            dx, shared = _input_gradient(gradient, weights, branches.inputs)
            dx = dx.view(ctx.shape).to(ctx.dtypes[0])
        if of_weight or of_bias:
            known = shared if branches.are_one else None
            dw, db = _weight_gradients(gradient, inputs, branches.weights, known)
            dw = dw.to(ctx.dtypes[1])
        return dx, dw if of_weight else None, db if of_bias else None, None, None, None


def _nearest(x: Tensor, bits: int | None, columns: int, *, aligned: bool, ranges: Ranges | None) -> Codes:
    assert bits is not None
    rows = matrix_of(x.detach().reshape(-1, columns))
    return codes_of(rows, grid_of(rows, "ptq", bits, ranges, aligned), bits, columns, stochastic=False)


def _parts(codes: Codes) -> tuple[Tensor, Tensor, Tensor]:
    return codes.values, codes.step, codes.offset


def _output_type(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _not_numbers(x: Tensor) -> Tensor:
    """Return (rows, 1) of "not a number" where a row holds one, else 0: on a known grid the codes do not say so."""
    return torch.where(x.amax(1, keepdim=True).isnan(), torch.nan, 0.0)


def _times_transposed(left: Codes, right: Codes, added: Tensor | None, blank: Tensor | None) -> Tensor:
    """Return left @ right.T + added, both of one step and offset, and + blank, by rows."""
    sums = torch._int_mm(left.values, right.values.t())
    columns = left.offset * (right.step * right.row_sums().t() + right.offset * left.values.shape[1])
    rows = left.row_sums().mul_(left.step * right.offset)
    if blank is not None:
        rows.add_(blank)
    return _finished(sums, left.step * right.step, rows, columns if added is None else columns + added)


def _times(left: Codes, right: Codes) -> Tensor:
    """Return left @ right, the former's steps and offsets by rows, the latter's one for all."""
    sums = torch._int_mm(left.values, right.values)
    columns = _column_totals(right)
    rows = left.row_sums().mul_(left.step * right.offset)
    return _with_columns(sums, left.step * right.step, rows, left.offset, columns)


def _transposed_times(left: Codes, right: Codes, left_sums: Tensor) -> Tensor:
    """Return left.T @ right, the former's steps and offsets by columns, the latter's one for all."""
    sums = torch._int_mm(left.values.t(), right.values)
    columns = _column_totals(right)
    rows = left_sums.t() * (left.step.t() * right.offset)
    return _with_columns(sums, left.step.t() * right.step, rows, left.offset.t(), columns)


def _column_totals(right: Codes) -> Tensor:
    """Return (1, columns) sums of the numbers of a matrix of one step and offset."""
    return right.step * right.column_sums() + right.offset * len(right.values)


def _with_columns(sums: Tensor, step: Tensor, rows: Tensor, offset: Tensor, columns: Tensor) -> Tensor:
    if offset.ndim:
        return _finished(sums, step, rows, columns, offset)
    return _finished(sums, step, rows, offset * columns)


def _encoded(gradient: Tensor, rounding: Rounding) -> tuple[Codes, Reflections | None]:
    """Return the codes of a gradient (batch, ..., out) with a row for each of the output's."""
    rows, reflections = transformed(matrix_of(gradient), rounding.kind)
    grid = grid_of(rows, rounding.kind, rounding.bits)
    return codes_of(rows, grid, rounding.bits, gradient.shape[-1], stochastic=True), reflections


def _input_gradient(gradient: Tensor, weights: Codes, rounding: Rounding | None) -> tuple[Tensor, Codes | None]:
    """Return dx with a row for each of the output's, and the codes of the gradient where those are of the whole."""
    if rounding is None:
        return gradient.reshape(-1, gradient.shape[-1]) @ weights.decode(), None
    codes, reflections = _encoded(gradient, rounding)
    dx = _times(codes, weights)
    if reflections is None:
        return dx, codes
    assert reflections.least is not None
    linear_part = replace(reflections, least=None)
    by_example = linear_part.inverse(dx.view(gradient.shape[0], -1)).view(gradient.shape[0], -1, dx.shape[1])
    return by_example.addcmul_(reflections.least.unsqueeze(2), _column_totals(weights)).view(dx.shape), None


def _weight_gradients(
    gradient: Tensor, inputs: Codes, rounding: Rounding | None, known: Codes | None
) -> tuple[Tensor, Tensor]:
    """Return dw and db; ``known`` are codes of the gradient that there are already."""
    if known is None and rounding is not None and not (rounding.kind == "column" and gradient.ndim > 2):
        known, _ = _encoded(gradient, rounding)
    if known is None:
        rows = (gradient if rounding is None else rounding(gradient)).reshape(-1, gradient.shape[-1])
        return rows.t() @ inputs.decode(), rows.sum(0)
    if len(known.values) > LONGEST:
        rows = known.decode()
        return rows.t() @ inputs.decode(), rows.sum(0)
    sums = known.column_sums()
    db = (sums * known.step).add_(known.offset * known.values.shape[0])
    return _transposed_times(known, inputs, sums), db[0]
