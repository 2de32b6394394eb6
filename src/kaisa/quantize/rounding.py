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

from kaisa.quantize.quantizers import encode, quantize


@dataclass(frozen=True)
class Rounding:
    """A quantiser of gradients: its kind and bits."""

    kind: str
    bits: int

    def __call__(self, gradient: Tensor) -> Tensor:
        """Return a random gradient whose mean is the one given, through which derivatives pass straight."""
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

    def split(self, gradient: Tensor, *, input_wanted: bool, weight_wanted: bool) -> tuple[Tensor, Tensor]:
        """Return the gradient for the input and that for the weight; of one that is not wanted, as it came."""
        for_input = for_weight = gradient
        if input_wanted and self.inputs is not None:
            for_input = self.inputs(gradient)
        if weight_wanted and self.weights is not None:
            for_weight = for_input if self.are_one and input_wanted else self.weights(gradient)
        return for_input, for_weight


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
    encoded = encode(x.detach(), "ptq", bits, stochastic=False, aligned=aligned, ranges=ranges)
    result: Tensor = _Straight.apply(x, encoded.restored_())  # type: ignore[no-untyped-call]
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
