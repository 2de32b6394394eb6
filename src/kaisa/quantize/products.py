"""Linear layers and convolutions of quantised tensors whose output gradient is quantised apart for its two uses.

    y = x̃ w̃ᵀ + b̃        dx = Q_a(G) w̃        dw = Q_w(G)ᵀ x̃        db = the sum of Q_w(G)

One forward product, and in the backward pass as many as without quantisation. The originals compute the forward twice,
once for each use. Both are differentiable again, with a quantiser's derivative taken as 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kaisa.quantize.rounding import Branches


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, branches: Branches) -> Tensor:
    """Return x @ weight.T + bias.

    Args:
        x: (batch, ..., in).
        weight: (out, in).
        bias: (out,), or None.
        branches: how the gradient of the result is quantised.
    """
    result: Tensor = _Linear.apply(x, weight, bias, branches)  # type: ignore[no-untyped-call]
    return result


@dataclass(frozen=True)
class Window:
    """What a convolution is told beside its tensors; a number for each dimension."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, window: Window, branches: Branches) -> Tensor:
    """Return a convolution.

    Args:
        x: (batch, in, *positions).
        weight: (out, in / groups, *taps).
        bias: (out,), or None.
        window: how the taps move.
        branches: how the gradient of the result is quantised.
    """
    result: Tensor = _Convolution.apply(x, weight, bias, window, branches)  # type: ignore[no-untyped-call]
    return result


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, branches: Branches) -> Tensor:
        return F.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, ctx.branches = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias, _ = ctx.needs_input_grad
        branches: Branches = ctx.branches
        for_input = dx = dw = db = None
        if of_x:
            for_input = branches.for_input(gradient)
            dx = for_input @ weight
        if of_weight or of_bias:
            rows = branches.for_weight(gradient, for_input).reshape(-1, weight.shape[0])
            dw = rows.mT @ x.reshape(-1, weight.shape[1]) if of_weight else None
            db = rows.sum(0) if of_bias else None
        return dx, dw, db, None


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, window: Window, branches: Branches) -> Tensor:
        none = [0] * len(window.stride)
        return torch.convolution(
            x, weight, bias, window.stride, window.padding, window.dilation, False, none, window.groups
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, ctx.window, ctx.branches = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias, _, _ = ctx.needs_input_grad
        branches: Branches = ctx.branches
        for_input = dx = dw = db = None
        if of_x:
            for_input = branches.for_input(gradient)
            if branches.are_one:
                return *_gradients(for_input, x, weight, ctx.window, [of_x, of_weight, of_bias]), None, None
            dx, _, _ = _gradients(for_input, x, weight, ctx.window, [True, False, False])
            for_input = None  # its memory serves the other
        if of_weight or of_bias:
            for_weight = branches.for_weight(gradient, for_input)
            _, dw, db = _gradients(for_weight, x, weight, ctx.window, [False, of_weight, of_bias])
        return dx, dw, db, None, None


def _gradients(
    gradient: Tensor, x: Tensor, weight: Tensor, window: Window, wanted: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of input, weight and bias, or None for those that are not wanted."""
    if not any(wanted):
        return None, None, None
    none = [0] * len(window.stride)
    shared = (window.stride, window.padding, window.dilation, False, none, window.groups, wanted)
    result: tuple[Tensor | None, Tensor | None, Tensor | None] = torch.ops.aten.convolution_backward(
        gradient, x, weight, [weight.shape[0]], *shared
    )
    return result
