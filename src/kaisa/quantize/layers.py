"""Linear layers and convolutions in few bits: subclasses that a module becomes and ceases to be, with all it holds.

`prepare` sets the class of a module and gives it one attribute more, `quantization`. Parameters, hooks, names and keys
of the state are those of the float module before, during and after.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kaisa.quantize import execution
from kaisa.quantize.config import EXACT, FQT, QuantConfig
from kaisa.quantize.products import Window, convolution, linear
from kaisa.quantize.quantizers import range_of
from kaisa.quantize.rounding import NOT_QUANTIZED, Branches, rounded

RANGE = "activation_range"
"""The buffer of the running range: least and greatest, not a number before the first batch. No part of the state."""


@dataclass
class Quantization:
    """What a layer in few bits is told.

    Attributes:
        config: of the model.
        when_fqt: how the output gradient is quantised in "fqt".
        mode: "exact", "qat" or "fqt".
    """

    config: QuantConfig
    when_fqt: Branches
    mode: str

    @property
    def branches(self) -> Branches:
        """How the output gradient is quantised now."""
        return self.when_fqt if self.mode == FQT else NOT_QUANTIZED

    @property
    def is_exact(self) -> bool:
        """Whether the layer computes as the float layer does."""
        return self.mode == EXACT


class QuantizedLayer(nn.Module):
    """What the layers in few bits share."""

    quantization: Quantization

    def extra_repr(self) -> str:
        """Return what the float module says of itself, and the mode."""
        return f"{super().extra_repr()}, mode={self.quantization.mode}"

    def range_for(self, x: Tensor, use: int) -> tuple[Tensor, Tensor] | None:
        """Return between what an input is rounded, None for its own range; a training pass updates the running one.

        Evaluation before any training or `load_ranges` has no running range and takes the batch's own.
        """
        ranges = self._buffers.get(RANGE)
        if ranges is None or self.quantization.config.activation_bits is None or x.numel() == 0:
            return None
        running = ranges[use]
        own = torch.stack(range_of(x.detach())).to(running.dtype)
        known = torch.where(running.isnan(), own, running)
        if self.training:
            running.copy_(torch.lerp(known, own, self.quantization.config.momentum))
            return own[0], own[1]
        return known[0], known[1]

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, use: int = 0) -> Tensor:
        """Return x @ weight.T + bias in few bits; ``use`` says which of the layer's inputs x is."""
        config, branches = self.quantization.config, self.quantization.branches
        ranges = self.range_for(x, use)
        if execution.is_in_integers(config, x, weight):
            bias = None if bias is None else rounded(bias, config.bias_bits, aligned=True)
            return execution.linear(x, weight, bias, config, branches, ranges)
        x = self._input(x, ranges)
        weight = _computed_in(rounded(weight, config.weight_bits, aligned=True))
        if bias is not None:
            bias = _computed_in(rounded(bias, config.bias_bits, aligned=True))
        with torch.autocast(x.device.type, enabled=False):
            return linear(x, weight, bias, branches)

    def _input(self, x: Tensor, ranges: tuple[Tensor, Tensor] | None) -> Tensor:
        return _computed_in(rounded(x, self.quantization.config.activation_bits, aligned=False, ranges=ranges))


class QuantizedLinear(QuantizedLayer, nn.Linear):
    """``nn.Linear`` in few bits."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the output for (batch, ..., in), or for one example without its batch."""
        if self.quantization.is_exact:
            return super().forward(input)
        if input.ndim == 1:
            return self.linear(input[None], self.weight, self.bias)[0]
        return self.linear(input, self.weight, self.bias)


class QuantizedConvolution(QuantizedLayer, nn.modules.conv._ConvNd):
    """What convolutions of one, two and three dimensions share; their biases are not quantised."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the output for (batch, in, *positions), or for one example without its batch."""
        if self.quantization.is_exact:
            exact: Tensor = super().forward(input)
            return exact
        if input.ndim == len(self.kernel_size) + 1:
            return self._convolved(input[None])[0]
        return self._convolved(input)

    def _convolved(self, x: Tensor) -> Tensor:
        config, branches = self.quantization.config, self.quantization.branches
        ranges = self.range_for(x, 0)
        if self._is_pointwise and execution.is_in_integers(config, x.movedim(1, -1), self.weight):
            return execution.pointwise(x, self.weight, self.bias, config, branches, ranges)
        x = self._input(x, ranges)
        weight = _computed_in(rounded(self.weight, config.weight_bits, aligned=True))
        bias = None if self.bias is None else _computed_in(self.bias)
        with torch.autocast(x.device.type, enabled=False):
            x, padding = self._padded(x)
            return convolution(x, weight, bias, Window(self.stride, padding, self.dilation, self.groups), branches)

    @property
    def _is_pointwise(self) -> bool:
        """Whether the convolution is a linear layer at each position."""
        ones, zeros = (*self.kernel_size, *self.stride, self.groups), self._reversed_padding_repeated_twice
        return all(size == 1 for size in ones) and not any(zeros)

    def _padded(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Return the input and how much the convolution itself has still to pad it with zeros."""
        if self.padding_mode == "zeros" and not isinstance(self.padding, str):
            return x, tuple(self.padding)
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        around: list[int] = self._reversed_padding_repeated_twice
        return (F.pad(x, around, mode) if any(around) else x), (0,) * len(self.kernel_size)


class QuantizedConv1d(QuantizedConvolution, nn.Conv1d):
    """``nn.Conv1d`` in few bits."""


class QuantizedConv2d(QuantizedConvolution, nn.Conv2d):
    """``nn.Conv2d`` in few bits."""


class QuantizedConv3d(QuantizedConvolution, nn.Conv3d):
    """``nn.Conv3d`` in few bits."""


def _computed_in(x: Tensor) -> Tensor:
    """Return a tensor in the type of mixed precision, where that is on; rounding comes before it."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
