"""Scale and shift of normalisation layers: no approximation by a Kronecker product is needed.

The gradient of one example with respect to a channel's (scale, shift) is a vector of two, and its second moment, one
2 × 2 block a channel, is stored as A; G is 1. With x̂ the normalised input and δ the gradient at the output:

    reduce   one vector an example       (Σ x̂ δ, Σ δ) over positions, then its products over examples
    expand   one vector a position       Σ δ², Σ x̂ δ², Σ x̂² δ² over examples and positions
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kaisa.kfac.factors import Pair, Statistics
from kaisa.kfac.layers import REDUCE, Layer, LayerOptions, NotCovered, gradient_of, register

BatchNorm = nn.modules.batchnorm._BatchNorm

_CHUNK = 2**16
"""Elements that are normalised and multiplied at a time on a CPU, so that they stay in a core's own cache."""


class Norm(Layer):
    """Scale and shift of a normalisation layer: one 2 × 2 block a channel, exact for one loss term an example."""

    def __init__(self, name: str, module: nn.Module, options: LayerOptions) -> None:
        if not options.norms:
            raise NotCovered("norms are switched off by LayerOptions")
        super().__init__(name, module, module.weight, getattr(module, "bias", None))  # type: ignore[arg-type]
        self.treatment = "2 × 2 block a channel" if self.bias is not None else "diagonal"
        self._normalized = _NORMS[type(module)]
        self._channels_last = isinstance(module, nn.LayerNorm | nn.RMSNorm)

    def statistics(self, module: nn.Module, x: Tensor, delta: Tensor) -> Statistics:
        return self.statistics_of_some(module, x, delta, slice(None))

    def statistics_of_some(self, module: nn.Module, x: Tensor, delta: Tensor, examples: slice) -> Statistics:
        moments = self._of_examples if self.sharing == REDUCE else self._of_positions
        shifts, mixed, scales = moments(module, x, delta, examples)
        if self.bias is None:
            blocks = scales[:, None, None]
        else:
            blocks = torch.stack((scales, mixed, mixed, shifts), -1).unflatten(-1, (2, 2))
        return Statistics(blocks, blocks.new_ones(blocks.shape[0], 1, 1))

    def quadratic_in_delta(self, module: nn.Module) -> tuple[str, ...]:
        return ("a",)

    def _of_examples(
        self, module: nn.Module, x: Tensor, delta: Tensor, examples: slice
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the sums over examples of shift², scale·shift and scale² of their gradients, by channel."""
        if isinstance(module, BatchNorm):
            scale, shift = _batch_norm_gradients(module, x, delta[examples], examples)
        else:
            delta = delta[examples]
            product = self._normalized(module, x[examples]) * delta
            if self._channels_last:
                scale, shift = (p.reshape(p.shape[0], -1, self.weight.numel()).sum(1) for p in (product, delta))
            else:
                scale, shift = _over_positions(product), _over_positions(delta)
        # Sums of products by element: a batched product would first have to bring the channels to the front.
        return (shift * shift).sum(0), (scale * shift).sum(0), (scale * scale).sum(0)

    def _of_positions(
        self, module: nn.Module, x: Tensor, delta: Tensor, examples: slice
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns Σ δ², Σ x̂ δ² and Σ x̂² δ² over examples and positions, by channel."""
        sums = delta.new_zeros(3, self.weight.numel())
        for normalized, part in self._chunks(module, x, delta, examples):
            squares = part * part
            mixed = normalized * squares
            for row, product in zip(sums, (squares, mixed, normalized * mixed), strict=True):
                row += product.flatten(1).sum(0) if self._channels_last else product.flatten(2).sum((0, 2))
        return sums[0], sums[1], sums[2]

    def _chunks(self, module: nn.Module, x: Tensor, delta: Tensor, examples: slice) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields normalised input and gradient, (rows, *normalised shape) or (examples, channels, *positions)."""
        delta = delta[examples]
        of_whole_batch = isinstance(module, BatchNorm)
        x = self._normalized(module, x)[examples] if of_whole_batch else x[examples]
        if self._channels_last:
            x, delta = (part.reshape(-1, *self.weight.shape) for part in (x, delta))
        elif x.ndim == 2:
            x, delta = x[..., None], delta[..., None]
        size = max(1, _CHUNK * len(x) // x.numel()) if x.device.type == "cpu" else len(x)
        for part, gradient in zip(x.split(size), delta.split(size), strict=True):
            yield part if of_whole_batch else self._normalized(module, part), gradient

    def pair(self, statistics: Statistics) -> Pair:
        return Pair(statistics.a / statistics.examples, torch.ones_like(statistics.g))

    def _joined(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        columns = [part.reshape(-1, 1, 1) for part in (weight, bias) if part is not None]
        return torch.cat(columns, -1)

    def write_(self, matrix: Tensor) -> None:
        for column, parameter in enumerate(self.parameters):
            gradient_of(parameter).copy_(matrix[..., column].reshape(parameter.shape))


def _batch_norm_gradients(module: BatchNorm, x: Tensor, delta: Tensor, examples: slice) -> tuple[Tensor, Tensor]:
    """Returns the gradients (examples, channels) of scale and shift without the normalised copy of x.

    With mean and deviation of the whole batch, Σ x̂ δ = (Σ x δ − mean Σ δ) / deviation.
    """
    if module.training or module.running_mean is None or module.running_var is None:
        count = x.numel() / x.shape[1]
        mean = _over_positions(x).sum(0) / count
        variance = (_squares_over_positions(x).sum(0) / count - mean.square()).clamp(min=0)
    else:
        mean, variance = module.running_mean.to(x.dtype), module.running_var.to(x.dtype)
    shift, products = _over_positions(delta), _over_positions(x[examples] * delta)
    return (products - mean * shift) / (variance + module.eps).sqrt(), shift


def _over_positions(x: Tensor) -> Tensor:
    return x.sum(list(range(2, x.ndim))) if x.ndim > 2 else x


def _squares_over_positions(x: Tensor) -> Tensor:
    if x.ndim > 2 and x.is_contiguous():  # one pass without a copy, which other layouts do not have
        norms: Tensor = torch.linalg.vector_norm(x, dim=list(range(2, x.ndim)))
        return norms.square()
    return _over_positions(x.square())


def _batch_norm(module: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(module, BatchNorm)
    if module.training or module.running_mean is None:
        return F.batch_norm(x, None, None, training=True, eps=module.eps)
    return F.batch_norm(x, module.running_mean.to(x.dtype), module.running_var.to(x.dtype), eps=module.eps)  # type: ignore[union-attr]


def _layer_norm(module: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(module, nn.LayerNorm)
    return F.layer_norm(x, module.normalized_shape, eps=module.eps)


def _rms_norm(module: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(module, nn.RMSNorm)
    return F.rms_norm(x, module.normalized_shape, eps=module.eps)


def _group_norm(module: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(module, nn.GroupNorm)
    return F.group_norm(x, module.num_groups, eps=module.eps)


_NORMS: dict[type[nn.Module], Callable[[nn.Module, Tensor], Tensor]] = {
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _rms_norm,
    nn.GroupNorm: _group_norm,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.BatchNorm3d: _batch_norm,
}
for _kind in _NORMS:
    register(_kind, Norm)
