"""Factors of convolutions without unfolding the input.

A convolution multiplies, at every output position q, its weight with the vector a[c, t] = x[c, q + t] of
what the taps t read. Its input factor is the sum over examples and positions of a aᵀ, in the order of
``weight.reshape(out, -1)``: channels first, then taps, then the constant 1 of the bias. For stride 1

    A[c, t; c', t'] = sum over output positions q of  x[c, q + t] x[c', q + t'].

If q ran over all integers (x is zero outside the image), this would depend on t' - t alone: the autocorrelation

    S[c, c', d] = sum over p of  x[c, p] x[c', p + d],        S[c, c', d] = S[c', c, -d],

which a weight-gradient kernel computes when the image is both its input and its output gradient. Half of the
shifts d suffice. What q beyond the output window W adds is taken back exactly. Per dimension, with F for "all q"
and E for "q outside of the window", W = F - E, and the product telescopes into one thin strip per border:

    W W = F F  -  F E  -  E W            F E: all rows, border columns;  E W: border rows, window columns

        all q: F F          . . . . . .         each border position reads only few taps, those that still touch the
                            . o o o o .         image. With 3x3 taps and padding 1 the row above the window reads the
        window W W: o       . o o o o .         image with the last tap row alone: the strip is a convolution factor
                            . . . . . .         of one image row, and so is found by the same function.

Everything else becomes that case. Padding other than zeros is written out, then nothing is padded. A stride s
moves the s phases of the image into channels (space to depth), and the taps with them. A transposed convolution
of stride s is s sets of taps that never meet at one output position: s ordinary factors over the input itself.
Where taps do not overlap, or arithmetic says that it is cheaper, patches are unfolded in chunks of bounded size.
No route makes a temporary much larger than the input: a padded copy and at most ``CHUNK_BYTES`` of patches,
besides the factor itself. Multiplications follow the precision that the user allows (TF32 on CUDA).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

CHUNK_BYTES = 2**26
"""The most memory that unfolded patches take at a time."""


@dataclass(frozen=True)
class Geometry:
    """Which input elements each output position of a convolution reads.

    ``padding`` is (low, high) for each spatial dimension; all other tuples hold a number per spatial dimension.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int = 1
    padding_mode: str = "zeros"
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    @classmethod
    def of(cls, module: nn.Module) -> Geometry:
        """Return the geometry of a (transposed) convolution of one, two or three dimensions.

        Raises:
            TypeError: The module is not a convolution.
        """
        if not isinstance(module, _ConvNd):
            raise TypeError(
                f"expected a convolution of torch.nn, found {type(module).__name__}; "
                "a geometry exists for Conv1d to Conv3d and ConvTranspose1d to ConvTranspose3d"
            )
        return cls(
            kernel=tuple(module.kernel_size),
            stride=tuple(module.stride),
            padding=_padding(module),
            dilation=tuple(module.dilation),
            groups=module.groups,
            padding_mode=module.padding_mode,
            transposed=isinstance(module, _ConvTransposeNd),
            output_padding=tuple(module.output_padding),
        )

    @property
    def dimensions(self) -> int:
        """The number of spatial dimensions."""
        return len(self.kernel)


class Axis(NamedTuple):
    """One spatial dimension of a convolution: output q reads, with tap t, stride * q + dilation * t - low."""

    kernel: int
    stride: int
    dilation: int
    low: int
    high: int

    @property
    def span(self) -> int:
        """The number of elements from the first to the last tap."""
        return self.dilation * (self.kernel - 1) + 1

    def positions(self, size: int) -> int:
        """Return how many output positions an input of this size has."""
        return (size + self.low + self.high - self.span) // self.stride + 1

    def everywhere(self) -> Axis:
        """Return the axis whose window holds every position that touches the image."""
        return self._replace(low=self.span - 1, high=self.span - 1)


def output_positions(x_shape: Sequence[int], geometry: Geometry) -> int:
    """Return the number of output positions of one example.

    Args:
        x_shape: Shape (batch, channels, *spatial) of the input.
        geometry: The convolution.
    """
    return math.prod(_output_sizes(x_shape[2:], geometry))


@torch.no_grad()
def input_factor(x: Tensor, geometry: Geometry, *, bias: bool) -> Tensor:
    """Return the sum over examples and output positions of a aᵀ.

    Temporary memory is a small multiple of the input plus ``CHUNK_BYTES`` (see the head of the module).

    Args:
        x: Input (batch, channels, *spatial), float32 or float64, in any memory layout.
        geometry: The convolution.
        bias: Whether a ends with the constant 1.

    Returns:
        The factor (n, n), or (groups, n, n) if there are several groups, with
        n = channels / groups * taps, plus 1 with a bias.
    """
    positions = output_positions(x.shape, geometry)
    blocks = _transposed(x, geometry) if geometry.transposed else _ordinary(x, geometry)
    n = math.prod(blocks.shape[1 : 2 + geometry.dimensions])
    factor = blocks.reshape(geometry.groups, n, n)
    if bias:
        column = _patch_sums(x.sum(0, keepdim=True), geometry).reshape(geometry.groups, n, 1)
        corner = factor.new_full((geometry.groups, 1, 1), x.shape[0] * positions)
        lower = torch.cat((column.mT, corner), 2)
        factor = torch.cat((torch.cat((factor, column), 2), lower), 1)
    return factor if geometry.groups > 1 else factor[0]


@torch.no_grad()
def mean_patch(x: Tensor, geometry: Geometry) -> Tensor:
    """Return the mean over output positions of a, for each example and without unfolding.

    The mean is x contracted, dimension by dimension, with the number of times that each tap reads each element.

    Args:
        x: Input (batch, channels, *spatial).
        geometry: The convolution.

    Returns:
        The means (batch, n), or (groups, batch, n) if there are several groups; no column for the bias.
    """
    sums = _patch_sums(x, geometry).unflatten(1, (geometry.groups, -1))
    means = sums.flatten(2).transpose(0, 1) / output_positions(x.shape, geometry)
    return means if geometry.groups > 1 else means[0]


@torch.no_grad()
def patches(x: Tensor, geometry: Geometry) -> Tensor:
    """Return what every output position reads, unfolded: the slow way, as large as taps times the input.

    Args:
        x: Input (batch, channels, *spatial).
        geometry: The convolution.

    Returns:
        The patches (batch, groups, positions, n), without a column for the bias.
    """
    if geometry.transposed:
        x, axes = _stuffed(x, geometry)
    else:
        x, axes = _axes_of(x, geometry)
    windows = _windows(x, axes)
    dims = geometry.dimensions
    if geometry.transposed:
        windows = windows.flip(tuple(range(2, 2 + dims)))
    windows = windows.flatten(2 + dims).unflatten(1, (geometry.groups, -1))
    return windows.flatten(2, -2).mT


@torch.no_grad()
def output_factor(grad: Tensor, groups: int = 1) -> Tensor:
    """Return the sum over examples and positions of d dᵀ, for the gradient d at the output of a convolution.

    Args:
        grad: Gradient (batch, channels, *spatial), in any memory layout.
        groups: Groups of the convolution; only channels of one group are multiplied with each other.

    Returns:
        The factor (channels, channels), or (groups, channels / groups, channels / groups).
    """
    axes = (Axis(1, 1, 1, 0, 0),) * (grad.dim() - 2)
    channels = grad.shape[1] // groups
    factor = _unfolded(grad, axes, groups).reshape(groups, channels, channels)
    return factor if groups > 1 else factor[0]


def _padding(module: _ConvNd) -> tuple[tuple[int, int], ...]:
    if module.padding == "valid":
        return ((0, 0),) * len(module.kernel_size)
    if module.padding == "same":
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    assert not isinstance(module.padding, str)
    return tuple((p, p) for p in module.padding)


def _output_sizes(sizes: Sequence[int], geometry: Geometry) -> tuple[int, ...]:
    axes = _axes(geometry)
    if geometry.transposed:
        stuffed = [(size - 1) * s + 1 for size, s in zip(sizes, geometry.stride, strict=True)]
        return tuple(axis.positions(size) for axis, size in zip(axes, stuffed, strict=True))
    return tuple(axis.positions(size) for axis, size in zip(axes, sizes, strict=True))


def _axes(geometry: Geometry) -> tuple[Axis, ...]:
    """Return the axes of a convolution, or of the stride-1 convolution that a transposed one is."""
    pads = geometry.padding
    if not geometry.transposed:
        rows = zip(geometry.kernel, geometry.stride, geometry.dilation, pads, strict=True)
        return tuple(Axis(k, s, d, low, high) for k, s, d, (low, high) in rows)
    rows = zip(geometry.kernel, geometry.output_padding, geometry.dilation, pads, strict=True)
    reach = [(k, d, d * (k - 1), extra, pad) for k, extra, d, pad in rows]
    return tuple(
        Axis(k, 1, d, far - low, far - high + extra) for k, d, far, extra, (low, high) in reach
    )


def _axes_of(x: Tensor, geometry: Geometry) -> tuple[Tensor, tuple[Axis, ...]]:
    """Return an input and axes that pad it with zeros only: any other padding is written out."""
    axes = _axes(geometry)
    if geometry.padding_mode == "zeros" or not any(axis.low or axis.high for axis in axes):
        return x, axes
    x = F.pad(x, _flat_padding(axes), mode=geometry.padding_mode)
    return x, tuple(axis._replace(low=0, high=0) for axis in axes)


def _stuffed(x: Tensor, geometry: Geometry) -> tuple[Tensor, tuple[Axis, ...]]:
    """Return the input with stride - 1 zeros between its elements, and stride-1 axes that read it."""
    sizes = [(size - 1) * s + 1 for size, s in zip(x.shape[2:], geometry.stride, strict=True)]
    stuffed = x.new_zeros((*x.shape[:2], *sizes))
    stuffed[(..., *(slice(None, None, s) for s in geometry.stride))] = x
    return stuffed, _axes(geometry)


def _flat_padding(axes: Sequence[Axis]) -> list[int]:
    """Return the padding as ``torch.nn.functional.pad`` wants it: last dimension first."""
    return [amount for axis in reversed(axes) for amount in (axis.low, axis.high)]


def _windows(image: Tensor, axes: Sequence[Axis]) -> Tensor:
    """Return an overlapping view (batch, channels, *taps, *positions) of the padded image."""
    sizes = [axis.positions(size) for axis, size in zip(axes, image.shape[2:], strict=True)]
    if any(axis.low or axis.high for axis in axes):
        image = F.pad(image, _flat_padding(axes))
    strides = image.stride()[2:]
    return image.as_strided(
        (*image.shape[:2], *(axis.kernel for axis in axes), *sizes),
        (
            *image.stride()[:2],
            *(axis.dilation * s for axis, s in zip(axes, strides, strict=True)),
            *(axis.stride * s for axis, s in zip(axes, strides, strict=True)),
        ),
    )


def _ordinary(x: Tensor, geometry: Geometry) -> Tensor:
    image, axes = _axes_of(x, geometry)
    return _unfolded(image, axes, geometry.groups)


def _transposed(x: Tensor, geometry: Geometry) -> Tensor:
    image, axes = _stuffed(x, geometry)
    dims = geometry.dimensions
    taps = [*range(2, 2 + dims), *range(3 + dims, 3 + 2 * dims)]
    return _unfolded(image, axes, geometry.groups).flip(taps)


def _unfolded(image: Tensor, axes: Sequence[Axis], groups: int) -> Tensor:
    """Return the factor blocks (groups, channels, *taps, channels, *taps) from patches, a chunk at a time."""
    channels = image.shape[1] // groups
    kernel = tuple(axis.kernel for axis in axes)
    n = channels * math.prod(kernel)
    factor = image.new_zeros((groups, n, n))
    for chunk in _chunks(image, axes):
        columns = _windows(chunk, axes).flatten(2 + len(axes)).unflatten(1, (groups, channels))
        columns = columns.movedim(0, -2).reshape(groups, n, -1)
        factor.baddbmm_(columns, columns.mT)
    return factor.view(groups, channels, *kernel, channels, *kernel)


def _chunks(image: Tensor, axes: Sequence[Axis]) -> Iterator[Tensor]:
    """Yield groups of examples whose patches fit into ``CHUNK_BYTES`` (at least one example)."""
    sizes = zip(axes, image.shape[2:], strict=True)
    elements = image.shape[1] * math.prod(
        axis.kernel * axis.positions(size) for axis, size in sizes
    )
    yield from image.split(max(1, CHUNK_BYTES // max(1, elements * image.element_size())))


def _patch_sums(x: Tensor, geometry: Geometry) -> Tensor:
    """Return the sum over output positions of a, as (batch, channels, *taps)."""
    for dim in range(geometry.dimensions):
        reads = _reads(x, geometry, dim)
        x = torch.tensordot(x, reads, dims=([2], [0]))
    return x


def _reads(x: Tensor, geometry: Geometry, dim: int) -> Tensor:
    """Return how often, over all output positions, each element (rows) is read by each tap (columns)."""
    line = torch.eye(x.shape[2], dtype=x.dtype, device=x.device).unsqueeze(1)
    pick = Geometry(
        kernel=geometry.kernel[dim : dim + 1],
        stride=geometry.stride[dim : dim + 1],
        padding=geometry.padding[dim : dim + 1],
        dilation=geometry.dilation[dim : dim + 1],
        padding_mode=geometry.padding_mode,
        transposed=geometry.transposed,
        output_padding=geometry.output_padding[dim : dim + 1],
    )
    return patches(line, pick)[:, 0].sum(1)
