"""Factors of convolutions without unfolding the input.

At output position q a convolution multiplies its weight with a[c, t] = x[c, q + t], over channels c
and kernel taps t. Its input factor is the sum over examples and positions of a aᵀ, in the order of
``weight.reshape(out, -1)``: channels, then taps, then the constant 1 of the bias. For stride 1

    A[c, t; c', t'] = sum over output positions q of  x[c, q + t] x[c', q + t'].

If q ran over all integers (x is zero outside the image), A would depend on t' - t alone:

    S[c, c', d] = sum over p of  x[c, p] x[c', p + d],        S[c, c', d] = S[c', c, -d].

This autocorrelation is what a weight-gradient kernel computes when the image is both its input and
its output gradient, and half of the shifts d suffice. What the positions outside of the output
window add is subtracted exactly. With F for "all q" and E for "q outside", the window of one
dimension is W = F - E, and the product over dimensions telescopes into thin strips:

    W W = F F - F E - E W                    e w w w w e
                                             e . . . . e    e: border columns, all rows      (F E)
    each strip is a convolution factor       e . . . . e    w: border rows, window's columns (E W)
    of the few rows or columns of the        e . . . . e
    image that q in it can read, with        e w w w w e    3x3 taps, padding 1: a position in the
    the taps that can read them: found                      top row reads the image only with its
    by the same functions                                   last row of taps

Everything else becomes this case. Padding other than by zeros is written out. A stride s moves the
s phases of the image into channels, and the kernel shrinks to match. A transposed convolution of
stride s has s sets of taps that never meet at an output position: s ordinary factors over the input
itself. Where an estimate of the work says that it is cheaper, patches are unfolded, in chunks of
``CHUNK_BYTES``.

No route needs memory for more than a few copies of the input and of the factor, and one chunk.
Products are as precise as the user lets them be on the device (TF32 on CUDA).

Within this file an image is (batch, *spatial, channels) and contiguous, which suits the kernels of
a CPU best; blocks are factors seen as (groups, *taps, channels, *taps, channels).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

CHUNK_BYTES = 2**24
"""The most memory that unfolded patches take at a time; more is slower, as it is not reused."""

COPY_WORK = 40
"""How many multiplications take as long as to copy one number, on a CPU."""

CALL_WORK = 4e6
"""How many multiplications take as long as to call one kernel, on a CPU."""


@dataclass(frozen=True)
class Geometry:
    """Which input elements each output position of a convolution reads.

    ``padding`` is (low, high) for each spatial dimension; all other tuples hold a number for each.
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
    """A spatial dimension: output q reads, with tap t, element stride * q + dilation * t - low."""

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

    Temporary memory is a small multiple of the input and of the factor, plus ``CHUNK_BYTES``.

    Args:
        x: Input (batch, channels, *spatial), float32 or float64, in any memory layout.
        geometry: The convolution.
        bias: Whether a ends with the constant 1.

    Returns:
        The factor (n, n), or (groups, n, n) if there are several groups, with
        n = channels / groups * taps, plus 1 with a bias.
    """
    dims, groups = geometry.dimensions, geometry.groups
    blocks = _transposed(x, geometry) if geometry.transposed else _ordinary(x, geometry)
    side = (1 + dims, *range(1, 1 + dims))
    order = (0, *side, *(1 + dims + dim for dim in side))
    n = math.prod(blocks.shape[1 : 2 + dims])
    factor = blocks.permute(order).reshape(groups, n, n)
    if bias:
        factor = _bordered(factor, x, geometry)
    return factor if groups > 1 else factor[0]


@torch.no_grad()
def mean_patch(x: Tensor, geometry: Geometry) -> Tensor:
    """Return the mean over output positions of a, for each example and without unfolding.

    Args:
        x: Input (batch, channels, *spatial).
        geometry: The convolution.

    Returns:
        The means (batch, n), or (groups, batch, n) if there are several groups; no column for the
        bias.
    """
    means = _patch_sums(x, geometry) / output_positions(x.shape, geometry)
    means = means.reshape(x.shape[0], geometry.groups, -1).transpose(0, 1)
    return means if geometry.groups > 1 else means[0]


@torch.no_grad()
def patches(x: Tensor, geometry: Geometry) -> Tensor:
    """Return what every output position reads, unfolded: as large as taps times the input.

    Args:
        x: Input (batch, channels, *spatial).
        geometry: The convolution.

    Returns:
        The patches (batch, groups, positions, n), without a column for the bias.
    """
    batch, dims, positions = x.shape[0], geometry.dimensions, output_positions(x.shape, geometry)
    taps = tuple(range(2 + dims, 2 + 2 * dims))
    if geometry.transposed:
        windows = _windows(_channels_last(_stuffed(x, geometry)), _axes(geometry), geometry.groups)
        windows = windows.flip(taps)
    else:
        x, axes = _explicitly_padded(x, geometry)
        windows = _windows(_channels_last(x), axes, geometry.groups)
    windows = windows.permute(1, 0, *range(2, 2 + dims), 2 + 2 * dims, *taps)
    return windows.reshape(batch, geometry.groups, positions, -1)


@torch.no_grad()
def output_factor(grad: Tensor, groups: int = 1) -> Tensor:
    """Return the sum over examples and positions of d dᵀ, d the gradient at a convolution's output.

    Args:
        grad: Gradient (batch, channels, *spatial), in any memory layout.
        groups: Groups of the convolution; only channels of one group meet.

    Returns:
        The factor (channels, channels), or (groups, channels / groups, channels / groups).
    """
    factor = _channel_gram(grad, groups)
    return factor if groups > 1 else factor[0]


def _padding(module: _ConvNd) -> tuple[tuple[int, int], ...]:
    if module.padding == "valid":
        return ((0, 0),) * len(module.kernel_size)
    if module.padding == "same":
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    assert not isinstance(module.padding, str)
    return tuple((pad, pad) for pad in module.padding)


def _axes(geometry: Geometry) -> tuple[Axis, ...]:
    """Return the axes of a convolution, or of the stride-1 convolution that a transposed one is.

    A transposed convolution reads, with its taps reversed, the input with zeros between elements.
    """
    columns = (geometry.kernel, geometry.stride, geometry.dilation, geometry.padding)
    axes = [Axis(k, s, d, *pads) for k, s, d, pads in zip(*columns, strict=True)]
    if not geometry.transposed:
        return tuple(axes)
    return tuple(
        Axis(a.kernel, 1, a.dilation, a.span - 1 - a.low, a.span - 1 - a.high + extra)
        for a, extra in zip(axes, geometry.output_padding, strict=True)
    )


def _output_sizes(sizes: Sequence[int], geometry: Geometry) -> tuple[int, ...]:
    if geometry.transposed:
        sizes = [(size - 1) * s + 1 for size, s in zip(sizes, geometry.stride, strict=True)]
    return tuple(a.positions(size) for a, size in zip(_axes(geometry), sizes, strict=True))


def _explicitly_padded(x: Tensor, geometry: Geometry) -> tuple[Tensor, tuple[Axis, ...]]:
    """Return an input and axes that pad it with zeros only: any other padding is written out."""
    axes = _axes(geometry)
    if geometry.padding_mode == "zeros":
        return x, axes
    amounts = [amount for axis in reversed(axes) for amount in (axis.low, axis.high)]
    x = F.pad(x, amounts, mode=geometry.padding_mode)
    return x, tuple(axis._replace(low=0, high=0) for axis in axes)


def _stuffed(x: Tensor, geometry: Geometry) -> Tensor:
    """Return the input with stride - 1 zeros between its elements."""
    sizes = [(size - 1) * s + 1 for size, s in zip(x.shape[2:], geometry.stride, strict=True)]
    stuffed = x.new_zeros((*x.shape[:2], *sizes))
    steps = tuple(slice(None, None, s) for s in geometry.stride)
    stuffed[(slice(None), slice(None), *steps)] = x
    return stuffed


def _channels_last(x: Tensor) -> Tensor:
    """Return the input (batch, channels, *spatial) as an image; no copy if it already lies so."""
    return x.movedim(1, -1).contiguous()


def _zero_padded(image: Tensor, axes: Sequence[Axis]) -> Tensor:
    """Return the image with the padding of its axes written out; negative padding crops."""
    if not any(axis.low or axis.high for axis in axes):
        return image
    sizes = [size + a.low + a.high for a, size in zip(axes, image.shape[1:-1], strict=True)]
    padded = inside = image.new_empty((image.shape[0], *sizes, image.shape[-1]))
    for dim, axis in enumerate(axes, start=1):
        first = min(max(0, -axis.low), image.shape[dim])
        length = max(0, min(image.shape[dim], image.shape[dim] + axis.high) - first)
        low = min(max(0, axis.low), inside.shape[dim] - length)
        image = image.narrow(dim, first, length)
        inside.narrow(dim, 0, low).zero_()
        inside.narrow(dim, low + length, inside.shape[dim] - low - length).zero_()
        inside = inside.narrow(dim, low, length)
    inside.copy_(image)
    return padded


def _windows(image: Tensor, axes: Sequence[Axis], groups: int) -> Tensor:
    """Return an overlapping view (groups, batch, *positions, *taps, channels), padded."""
    sizes = [axis.positions(size) for axis, size in zip(axes, image.shape[1:-1], strict=True)]
    image = _zero_padded(image, axes).contiguous()
    channels = image.shape[-1] // groups
    steps = list(zip(axes, image.stride()[1:-1], strict=True))
    return image.as_strided(
        (groups, image.shape[0], *sizes, *(axis.kernel for axis in axes), channels),
        (
            channels,
            image.stride(0),
            *(axis.stride * step for axis, step in steps),
            *(axis.dilation * step for axis, step in steps),
            1,
        ),
    )


def _chunks(image: Tensor, elements: int) -> Iterator[Tensor]:
    """Yield runs of examples, of ``CHUNK_BYTES`` if every channel takes so many elements."""
    size = image.shape[-1] * elements * image.element_size()
    return iter(torch.split(image, max(1, CHUNK_BYTES // size)))


def _channel_gram(x: Tensor, groups: int) -> Tensor:
    """Return the blocks (groups, channels, channels) of a convolution with a single tap."""
    channels = x.shape[1] // groups
    if x.stride(1) != 1 and channels <= math.prod(x.shape[2:]):
        columns = x.reshape(x.shape[0] * groups, channels, -1)
        return (columns @ columns.mT).view(-1, groups, channels, channels).sum(0)
    image = _channels_last(x)
    # A product of small matrices over many rows is fast as a batch of several.
    parts = math.gcd(x.shape[0], 8) if groups == 1 else 1
    rows = image.view(parts, -1, groups, channels).transpose(1, 2).flatten(0, 1)
    return torch.bmm(rows.mT, rows).view(parts, groups, channels, channels).sum(0)


def _ordinary(x: Tensor, geometry: Geometry) -> Tensor:
    if all(k == s == 1 for k, s in zip(geometry.kernel, geometry.stride, strict=True)):
        ones = (1,) * geometry.dimensions
        x = x if geometry.padding_mode == "zeros" else _explicitly_padded(x, geometry)[0]
        factor = _channel_gram(x, geometry.groups)
        channels = factor.shape[-1]
        return factor.view(geometry.groups, *ones, channels, *ones, channels)
    x, axes = _explicitly_padded(x, geometry)
    return _blocks(_channels_last(x), axes, geometry.groups)


def _transposed(x: Tensor, geometry: Geometry) -> Tensor:
    """Return the blocks of a transposed convolution: a factor for each set of taps that meet."""
    dims, groups = geometry.dimensions, geometry.groups
    image = _channels_last(x)
    one_side = (*geometry.kernel, x.shape[1] // groups)
    blocks = x.new_zeros((groups, *one_side, *one_side))
    taps = (*range(1, 1 + dims), *range(2 + dims, 2 + 2 * dims))
    for sets in itertools.product(*_meeting_taps(tuple(x.shape[2:]), geometry)):
        meet = [taps for taps, _ in sets]
        axes = [axis for _, axis in sets]
        crops = tuple(a._replace(low=min(0, a.low), high=min(0, a.high)) for a in axes)
        pads = tuple(a._replace(low=max(0, a.low), high=max(0, a.high)) for a in axes)
        every = slice(None)
        part = _blocks(_zero_padded(image, crops), pads, groups)
        blocks[(every, *meet, every, *meet, every)] = part.flip(taps)
    return blocks


def _meeting_taps(sizes: tuple[int, ...], geometry: Geometry) -> list[list[tuple[slice, Axis]]]:
    """Return, per dimension, the sets of taps that meet at an output position, each as an axis.

    Output q reads x[(q + low - dilation * t) / stride] with tap t, where that is an integer: taps
    meet whose distance is a multiple of stride / gcd(stride, dilation). An axis has them in reverse.
    """
    outputs = _output_sizes(sizes, geometry)
    columns = (geometry.kernel, geometry.stride, geometry.dilation, geometry.padding)
    return [
        list(_meeting_taps_along(Axis(k, s, d, *pads), size, positions))
        for k, s, d, pads, size, positions in zip(*columns, sizes, outputs, strict=True)
    ]


def _meeting_taps_along(axis: Axis, size: int, positions: int) -> Iterator[tuple[slice, Axis]]:
    common = math.gcd(axis.stride, axis.dilation)
    step, apart = axis.stride // common, axis.dilation // common
    for tap in range(min(step, axis.kernel)):
        taps = slice(tap, None, step)
        count = len(range(axis.kernel)[taps])
        # The tap reads x[first], ..., x[last] as q goes over the outputs.
        offset = axis.low - axis.dilation * tap
        first = -(-offset // axis.stride)
        last = (positions - 1 + offset) // axis.stride
        far = apart * (count - 1)
        if max(0, first) <= last and first < size + far:
            yield taps, Axis(count, 1, apart, far - first, last + 1 - size)


Route = Callable[[Tensor, tuple[Axis, ...], int], Tensor]
"""Image, axes and groups to blocks."""


def _blocks(image: Tensor, axes: tuple[Axis, ...], groups: int) -> Tensor:
    """Return the blocks of an image by the route with the least work."""
    _, route = _plan(axes, tuple(image.shape), groups)
    return route(image, axes, groups)


@functools.lru_cache(maxsize=4096)
def _plan(axes: tuple[Axis, ...], shape: tuple[int, ...], groups: int) -> tuple[float, Route]:
    """Return the work of the cheapest route, in multiplications, and the route."""
    batch, *sizes, channels = shape
    routes = [(_unfolding_work(axes, shape, groups), _unfolded)]
    if all(axis.stride == 1 for axis in axes):
        routes.append((_autocorrelation_work(axes, shape, groups), _autocorrelated))
    elif all(axis.stride == 1 or axis.dilation == 1 for axis in axes):
        coarse, cells = _coarse_axes(axes, sizes)
        phases = math.prod(axis.stride for axis in axes)
        shape = (batch, *cells, channels * phases)
        copying = math.prod(shape) * _patch_copy_work(channels // groups)
        routes.append((copying + _plan(coarse, shape, groups)[0], _phases_as_channels))
    return min(routes, key=lambda route: route[0])


def _unfolding_work(axes: tuple[Axis, ...], shape: tuple[int, ...], groups: int) -> float:
    batch, *sizes, channels = shape
    n = channels // groups * math.prod(axis.kernel for axis in axes)
    positions = math.prod(a.positions(size) for a, size in zip(axes, sizes, strict=True))
    rows = batch * groups * positions * n * (n + _patch_copy_work(channels // groups))
    return CALL_WORK + rows + groups * n**2 * 4 * COPY_WORK


def _patch_copy_work(run: int) -> float:
    """Return the work to copy a number in runs of so many neighbours: short runs are slow."""
    return COPY_WORK * (1 + 5 / run)


def _autocorrelation_work(axes: tuple[Axis, ...], shape: tuple[int, ...], groups: int) -> float:
    batch, *sizes, channels = shape
    width = channels // groups
    products = math.prod(_shifts(axes)) * max(width, 16)  # the kernel works on 16 channels at a time
    n = width * math.prod(axis.kernel for axis in axes)
    factor = groups * n**2 * 8 * COPY_WORK
    work = 3 * CALL_WORK + batch * channels * math.prod(sizes) * (products + COPY_WORK) + factor
    for strips in _strips(axes, tuple(sizes)):
        count = len(strips.starts)
        thin = (*sizes[: strips.dim], strips.length, *sizes[strips.dim + 1 :])
        work += _plan(strips.axes, (batch, *thin, channels * count), groups * count)[0]
    return work


def _unfolded(image: Tensor, axes: tuple[Axis, ...], groups: int) -> Tensor:
    """Return the blocks from patches, a chunk of examples at a time."""
    one_side = (*(axis.kernel for axis in axes), image.shape[-1] // groups)
    n = math.prod(one_side)
    blocks = image.new_zeros((groups, n, n))
    reads = [a.kernel * a.positions(size) for a, size in zip(axes, image.shape[1:-1], strict=True)]
    for chunk in _chunks(image, math.prod(reads)):
        rows = _windows(chunk, axes, groups).reshape(groups, -1, n)
        blocks.baddbmm_(rows.mT, rows)
    return blocks.view(groups, *one_side, *one_side)


def _autocorrelated(image: Tensor, axes: tuple[Axis, ...], groups: int) -> Tensor:
    """Return the blocks of stride-1 axes: the autocorrelation less the strips."""
    blocks = _spread(_autocorrelation(image, axes, groups), axes)
    for strips in _strips(axes, tuple(image.shape[1:-1])):
        dim, count = 1 + strips.dim, len(strips.starts)
        # Strips of one form are one image, in which each is a group.
        thin = [image.narrow(dim, start, strips.length) for start in strips.starts]
        parts = _blocks(torch.cat(thin, -1), strips.axes, groups * count).chunk(count)
        for taps, part in zip(strips.taps, parts, strict=True):
            region = [slice(None)] * blocks.dim()
            region[dim] = region[dim + 1 + len(axes)] = taps
            blocks[tuple(region)] -= part
    return blocks


class Strips(NamedTuple):
    """Thin slices of the image, of one form, that positions outside of the window read.

    They are ``length`` elements along spatial dimension ``dim``, from each of ``starts``; each is
    read with the taps of the same place in ``taps``, as a convolution with ``axes``.
    """

    dim: int
    length: int
    axes: tuple[Axis, ...]
    starts: tuple[int, ...]
    taps: tuple[slice, ...]


@functools.lru_cache(maxsize=4096)
def _strips(axes: tuple[Axis, ...], sizes: tuple[int, ...]) -> tuple[Strips, ...]:
    """Return the strips of stride-1 axes: everywhere before their dimension, windowed after it."""
    strips = []
    for dim, (axis, size) in enumerate(zip(axes, sizes, strict=True)):
        before = tuple(earlier.everywhere() for earlier in axes[:dim])
        forms: dict[tuple[int, int], list[tuple[int, slice]]] = {}
        for first, last, run in _border_runs(axis, size):
            start = run[0] + axis.dilation * first - axis.low
            length = len(run) + axis.dilation * (last - 1 - first)
            forms.setdefault((length, last - first), []).append((start, slice(first, last)))
        for (length, kernel), places in forms.items():
            thin = Axis(kernel, 1, axis.dilation, 0, 0)
            starts, taps = zip(*places, strict=True)
            strips.append(Strips(dim, length, (*before, thin, *axes[dim + 1 :]), starts, taps))
    return tuple(strips)


def _border_runs(axis: Axis, size: int) -> Iterator[tuple[int, int, list[int]]]:
    """Yield runs of positions outside of the window with the taps [first, last) that read alike."""

    def reads(position: int) -> tuple[bool, int, int]:
        first = max(0, -((position - axis.low) // axis.dilation))
        last = min(axis.kernel, (axis.low + size - 1 - position) // axis.dilation + 1)
        return position < 0, first, last

    window = range(axis.positions(size))
    touching = range(axis.low - axis.span + 1, axis.low + size)
    outside = [position for position in touching if position not in window]
    for (_, first, last), run in itertools.groupby(outside, key=reads):
        if first < last:
            yield first, last, list(run)


def _lead(axes: Sequence[Axis]) -> int:
    """Return the dimension of the largest kernel, whose negative shifts are left to symmetry."""
    kernels = [axis.kernel for axis in axes]
    return kernels.index(max(kernels))


def _shifts(axes: Sequence[Axis]) -> list[int]:
    """Return how many shifts are computed per dimension."""
    shifts = [2 * axis.kernel - 1 for axis in axes]
    shifts[_lead(axes)] = axes[_lead(axes)].kernel
    return shifts


def _autocorrelation(image: Tensor, axes: tuple[Axis, ...], groups: int) -> Tensor:
    """Return S[c, c', d] as (groups, *shifts, channels, channels), d in units of the dilation.

    Shifts go from -(kernel - 1) to kernel - 1, in the leading dimension from 0.
    """
    lead = _lead(axes)
    others = [axis.kernel for axis in axes[:lead] + axes[lead + 1 :]]
    is_line = math.prod(others) == 1 == math.prod(image.shape[2 + lead : -1])
    if is_line and axes[lead].dilation == 1:
        shifts = _line_autocorrelation(image.flatten(1 + lead, -2).flatten(0, lead), axes[lead], groups)
        return shifts.view(groups, *_shifts(axes), *shifts.shape[-2:])
    return _image_autocorrelation(image, axes, groups)


def _line_autocorrelation(lines: Tensor, axis: Axis, groups: int) -> Tensor:
    """Return (groups, shifts, channels, channels) of lines (batch, size, channels): one product.

    With a gap of zeros between lines, the elements ahead of each element are an overlapping view.
    """
    batch, size, channels = lines.shape[0], lines.shape[1] + axis.span - 1, lines.shape[2] // groups
    gapped = lines.new_zeros((groups, batch, size, channels))
    gapped[:, :, : lines.shape[1]] = lines.view(*lines.shape[:2], groups, channels).movedim(2, 0)
    # A product of small matrices over many rows is fast as a batch of several.
    parts = math.gcd(batch, 8) if groups == 1 else 1
    rows = batch // parts * size - axis.span + 1
    strides = (batch // parts * size * channels, channels, 1)
    here = gapped.as_strided((groups * parts, rows, channels), strides)
    ahead = gapped.as_strided((groups * parts, rows, axis.kernel * channels), strides)
    products = torch.bmm(here.mT, ahead).view(groups, parts, channels, axis.kernel, channels)
    return products.sum(1).transpose(1, 2)


def _image_autocorrelation(image: Tensor, axes: tuple[Axis, ...], groups: int) -> Tensor:
    """Return (groups, *shifts, channels, channels) from the kernel for gradients of weights."""
    dims, lead, shifts = len(axes), _lead(axes), _shifts(axes)
    channels = image.shape[-1] // groups
    weight = image.new_empty((image.shape[-1], channels, *shifts))
    ahead = [Axis(1, 1, 1, 0, axis.span - 1 if dim == lead else 0) for dim, axis in enumerate(axes)]
    padding = [0 if dim == lead else axis.span - 1 for dim, axis in enumerate(axes)]
    dilation = [axis.dilation for axis in axes]
    total = torch.zeros_like(weight)
    for chunk in _chunks(image, _hidden_patches(image, shifts)):
        total += torch.ops.aten.convolution_backward(
            chunk.movedim(-1, 1),
            _zero_padded(chunk, ahead).movedim(-1, 1),
            weight,
            None,
            [1] * dims,
            padding,
            dilation,
            False,
            [0] * dims,
            groups,
            [False, True, False],
        )[1]
    return total.view(groups, channels, channels, *shifts).movedim((1, 2), (-2, -1))


def _hidden_patches(image: Tensor, shifts: Sequence[int]) -> int:
    """Return the elements per channel of one example that a weight-gradient kernel takes.

    The kernels of oneDNN and cuDNN take little. Without them, as for float64 on a CPU, it unfolds.
    """
    onednn = image.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    return 1 if image.is_cuda or onednn else math.prod(shifts) * math.prod(image.shape[1:-1])


def _spread(shifts: Tensor, axes: Sequence[Axis]) -> Tensor:
    """Return the blocks A[t, c; t', c'] = S[c, c', t' - t]."""
    groups, channels, dims = shifts.shape[0], shifts.shape[-1], len(axes)
    kernel = tuple(axis.kernel for axis in axes)
    shifts = shifts.reshape(groups, -1, channels, channels)
    table = torch.cat((shifts, shifts.mT), 1)
    places = _shift_places(kernel, _lead(axes), shifts.device)
    blocks = table.index_select(1, places).view(groups, *kernel, *kernel, channels, channels)
    return blocks.movedim(-2, 1 + dims)


@functools.lru_cache(maxsize=256)
def _shift_places(kernel: tuple[int, ...], lead: int, device: torch.device) -> Tensor:
    """Return the places of S[t' - t] of all pairs of taps in the shifts and then their transposes."""
    lowest = [0 if dim == lead else 1 - k for dim, k in enumerate(kernel)]
    computed = list(itertools.product(*map(range, lowest, kernel)))
    place = {tuple(-d for d in shift): len(computed) + i for i, shift in enumerate(computed)}
    place |= {shift: i for i, shift in enumerate(computed)}
    taps = list(itertools.product(*map(range, kernel)))
    pairs = itertools.product(taps, taps)
    places = [place[tuple(b - a for a, b in zip(*pair, strict=True))] for pair in pairs]
    return torch.tensor(places, device=device)


def _coarse_axes(axes: Sequence[Axis], sizes: Sequence[int]) -> tuple[tuple[Axis, ...], tuple[int, ...]]:
    """Return axes and sizes of the image whose cells of stride elements are one element each."""
    coarse, cells = [], []
    for axis, size in zip(axes, sizes, strict=True):
        kernel = -(-axis.kernel // axis.stride)
        strided = axis.stride > 1
        coarse.append(Axis(kernel, 1, 1, 0, 0) if strided else axis)
        cells.append(axis.positions(size) + kernel - 1 if strided else size)
    return tuple(coarse), tuple(cells)


def _phases_as_channels(image: Tensor, axes: tuple[Axis, ...], groups: int) -> Tensor:
    """Return the blocks of strided axes: phases become channels, and cells of taps become taps."""
    dims, strides = len(axes), [axis.stride for axis in axes]
    coarse, cells = _coarse_axes(axes, image.shape[1:-1])
    fit = [
        axis._replace(high=axis.stride * count - size - axis.low) if axis.stride > 1 else axis._replace(low=0, high=0)
        for axis, size, count in zip(axes, image.shape[1:-1], cells, strict=True)
    ]
    split = [length for pair in zip(cells, strides, strict=True) for length in pair]
    image = _zero_padded(image, fit).reshape(image.shape[0], *split, groups, -1)
    order = (0, *range(1, 2 * dims, 2), 1 + 2 * dims, *range(2, 2 * dims + 1, 2), 2 + 2 * dims)
    image = image.permute(order).reshape(image.shape[0], *cells, -1)
    return _fine_taps(_blocks(image, coarse, groups), axes)


def _fine_taps(blocks: Tensor, axes: Sequence[Axis]) -> Tensor:
    """Return blocks over (*cells, phases and channels) as blocks over (*taps, channels)."""
    dims, groups = len(axes), blocks.shape[0]
    strides = [axis.stride for axis in axes]
    cells = blocks.shape[1 : 1 + dims]
    channels = blocks.shape[-1] // math.prod(strides)
    order = [0]
    for start in (1, 2 + 2 * dims):
        order += [start + dim + part for dim in range(dims) for part in (0, dims)]
        order.append(start + 2 * dims)
    one_side = (*cells, *strides, channels)
    blocks = blocks.reshape(groups, *one_side, *one_side).permute(order)
    taps = [count * stride for count, stride in zip(cells, strides, strict=True)]
    blocks = blocks.reshape(groups, *taps, channels, *taps, channels)
    for dim, axis in enumerate(axes, start=1):
        blocks = blocks.narrow(dim, 0, axis.kernel).narrow(1 + dims + dim, 0, axis.kernel)
    return blocks


def _bordered(factor: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
    """Return the factor with the row and the column of the bias."""
    positions = x.shape[0] * output_positions(x.shape, geometry)
    # A sum in the order of memory is several times as fast.
    total = x.movedim(1, -1).sum(0).movedim(-1, 0) if x.stride(1) == 1 else x.sum(0)
    sums = _patch_sums(total.unsqueeze(0), geometry)
    column = sums.reshape(*factor.shape[:2], 1)
    bordered = F.pad(factor, (0, 1, 0, 1), value=positions)
    bordered[:, :-1, -1:] = column
    bordered[:, -1:, :-1] = column.mT
    return bordered


def _patch_sums(x: Tensor, geometry: Geometry) -> Tensor:
    """Return the sum over output positions of a, as (batch, channels, taps).

    It is x times how often each tap reads each element, a product over dimensions.
    """
    reads = [_reads(x, geometry, dim) for dim in range(geometry.dimensions)]
    return x.flatten(2) @ functools.reduce(torch.kron, reads)


def _reads(x: Tensor, geometry: Geometry, dim: int) -> Tensor:
    """Return how often, over all output positions, an element (row) is read by a tap (column)."""
    here = slice(dim, dim + 1)
    along = dataclasses.replace(
        geometry,
        kernel=geometry.kernel[here],
        stride=geometry.stride[here],
        padding=geometry.padding[here],
        dilation=geometry.dilation[here],
        groups=1,
        output_padding=geometry.output_padding[here],
    )
    lines = torch.eye(x.shape[2 + dim], dtype=x.dtype, device=x.device).unsqueeze(1)
    return patches(lines, along)[:, 0].sum(1)
