"""What a layer does to the tensors that pass it: to its input, weight and bias, and to the gradient of its output.

forward    x̃ = Q(x), w̃ = Q(w), b̃ = Q(b)            to the nearest; the gradient passes straight through
backward   G ─► Q_a(G), of which dx is made           at random, so that the mean is G
           └──► Q_w(G), of which dw and db are made   independent of the former, or the same where both are alike
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kaisa.quantize import quantizers
from kaisa.quantize.quantizers import quantize


@dataclass(frozen=True)
class Rounding:
    """A quantiser of gradients: its kind and bits."""

    kind: str
    bits: int

    def __call__(self, gradient: Tensor) -> Tensor:
        """Return a random gradient whose mean is the one given, through which derivatives pass straight.

        Noise is of torch's own generator of the device: what ``torch.manual_seed`` sets.
        """
        return quantize(gradient, self.kind, self.bits, stochastic=True)


@dataclass(frozen=True)
class Branches:
    """How the gradient of an output is quantised for its two uses; None is not at all.

    Attributes:
        inputs: where it becomes the gradient of the input.
        weights: where it becomes those of weight and bias.
    """

    inputs: Rounding | None
    weights: Rounding | None

    @property
    def are_one(self) -> bool:
        """Whether one quantised gradient serves both."""
        if self.inputs is None or self.weights is None:
            return self.inputs is self.weights
        return self.inputs.kind == self.weights.kind and self.inputs.bits == self.weights.bits

    def for_input(self, gradient: Tensor) -> Tensor:
        """Return the gradient of which that of the input is made."""
        return gradient if self.inputs is None else self.inputs(gradient)

    def for_weight(self, gradient: Tensor, for_input: Tensor | None) -> Tensor:
        """Return the gradient of which those of weight and bias are made; ``for_input`` if it serves both."""
        if self.weights is None:
            return gradient
        return for_input if for_input is not None and self.are_one else self.weights(gradient)


NOT_QUANTIZED = Branches(None, None)


def rounded(x: Tensor, bits: int | None, *, aligned: bool, ranges: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Return a tensor rounded to the nearest of 2^bits numbers, with the derivative of the tensor itself.

    Args:
        x: the tensor.
        bits: None for as it is.
        aligned: whether 0 is one of the numbers.
        ranges: the least and the greatest of the numbers; None for those of the tensor.
    """
    if bits is None or x.numel() == 0:
        return x
    values = quantizers.rounded(x.detach(), "ptq", bits, stochastic=False, aligned=aligned, ranges=ranges)
    result: Tensor = _Straight.apply(x, values)  # type: ignore[no-untyped-call]
    return result


class _Straight(torch.autograd.Function):
    """The second argument, with the derivative of the first."""

    @staticmethod
    def forward(x: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        return None

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
