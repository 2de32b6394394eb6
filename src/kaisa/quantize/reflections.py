"""Block Householder reflections: what spreads an outlier among samples evenly over a group of them.

Rows are sorted by their range M₁ ≥ … ≥ M_N. The first G are large, and each gets small rows in proportion to its range.
In a group of n rows, one of range λ₁ and the others of at most λ₂,

    T = Q · diag(s₁, s₂, …, s₂)        Q = I − 2 v vᵀ / vᵀv,  v = 1/√n − e₁

Q is its own inverse and takes e₁, the large row, to 1/√n. With z = diag(s) x and w = vᵀz = Σ z / √n − z₁ it is

    (Q z)₁ = z₁ + w        (Q z)ᵢ = zᵢ − w / (√n − 1)

so that a group costs a sum and a broadcast: O(N · D) for all. What numbers of a row have in common, such as the least
of them, may be taken from it before and added after: the ranges of T X are the same without, and a row of large numbers
that hardly differ does not leave its rounding errors in the others of its group. The group of a row, and how many there
are, are tensors: nothing here waits for the device. Source: arXiv 2010.14298; the rules for groups and scales are those
of its code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# What the smallest range is raised to, of the largest: a row of equal numbers has no range, and any scale does for it.
_SMALLEST = 1e-8
_CACHED = 2**18  # numbers


@dataclass(frozen=True)
class Reflections:
    """The transform T of rows, and its inverse.

    Attributes:
        group: of each row (N).
        scales: the diagonal of s (N × 1).
        shares: how much of its group's w is added to each row (N × 1).
        weights: the squared norms of T⁻¹'s columns (N × 1): what an error of a row of T X becomes in all of X.
        members: the rows, group by group, the large one of each first (N).
        starts: of each group, where its rows begin among the members; N for places without a group, which there are
            because the number of groups is not known to the host.
        parts: of each member, how much of it is in its group's w (N).
        least: what is taken from each row (N × 1); None for nothing. T is then X ↦ T (X − least).
    """

    group: Tensor
    scales: Tensor
    shares: Tensor
    weights: Tensor
    members: Tensor
    starts: Tensor
    parts: Tensor
    least: Tensor | None = None

    def apply(self, x: Tensor) -> Tensor:
        """Return T X of a matrix with a row a sample."""
        result = torch.empty_like(x)
        for target, part in _by_columns(result, x):
            z = part * self.scales if self.least is None else (part - self.least).mul_(self.scales)
            self._reflect(z, target)
        return result

    def inverse(self, y: Tensor) -> Tensor:
        """Return T⁻¹ Y."""
        return self._inverse_into(torch.empty_like(y), y)

    def inverse_(self, y: Tensor) -> Tensor:
        """Make T⁻¹ Y of a matrix in its place."""
        return self._inverse_into(y, y)

    def inverse_transposed(self, x: Tensor) -> Tensor:
        """Return T⁻ᵀ X, of the matrix T alone."""
        result = torch.empty_like(x)
        for target, part in _by_columns(result, x):
            self._reflect(part / self.scales, target)
        return result

    def _inverse_into(self, result: Tensor, y: Tensor) -> Tensor:
        back = self.scales.reciprocal()
        for target, part in _by_columns(result, y):
            z = part.clone(memory_format=torch.contiguous_format)
            x = torch.mul(self._reflect(z, z), back, out=target)
            if self.least is not None:
                x.add_(self.least)
        return result

    def _reflect(self, z: Tensor, result: Tensor) -> Tensor:
        """Make Q Z, of a contiguous matrix, in another or in its place.

        The sum over a group is what an embedding's bag is, which takes all threads; adding at indices takes one.
        """
        w = F.embedding_bag(self.members, z, self.starts, mode="sum", per_sample_weights=self.parts)
        return torch.addcmul(z, self.shares, w.index_select(0, self.group), out=result)


def _by_columns(result: Tensor, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield views of both."""
    width = _width(x)
    yield from zip(result.split(width, 1), x.split(width, 1), strict=True)


def _width(x: Tensor) -> int:
    """Return how many columns to reflect at once: on a processor those whose temporaries stay in its cache."""
    count, columns = x.shape
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return max(1, columns)
    return max(64, _CACHED // max(1, count))


def reflections_of(x: Tensor) -> Reflections:
    """Return the reflections of a matrix with a row a sample, by the ranges of its rows."""
    return reflections_for(x.amax(1) - x.amin(1))


def reflections_for(ranges: Tensor) -> Reflections:
    """Return the reflections for rows of these ranges."""
    count, device = len(ranges), ranges.device
    largest = ranges.amax()
    relative = torch.where(largest > 0, ranges / largest, torch.ones_like(ranges)).clamp_min(_SMALLEST)
    sorted_ranges, order = relative.sort(descending=True, stable=True)
    positions = torch.arange(count, device=device)
    large_count, ends = _share_out(sorted_ranges, positions)
    is_large = positions < large_count
    small = (positions - large_count).clamp_min(0)
    group = torch.where(is_large, positions, torch.searchsorted(ends, small, right=True))

    places = max(1, (count - 1) // 2)  # more groups than that leave the smallest large row without a partner
    starts = torch.cat((ends.new_zeros(1), ends[: places - 1]))
    sizes = (1 + ends[:places] - starts).clamp(1, count)
    first_small = sorted_ranges[(large_count + starts).clamp_max(count - 1)]
    scales = _scales(sorted_ranges[:places], first_small, sizes.to(ranges.dtype))
    # sorted by group a large row comes after those of the groups before it, a small one after its group's large one too
    places_by_group = torch.where(is_large, positions + starts[group], group + 1 + small)
    by_group = torch.empty_like(order).scatter_(0, places_by_group, positions)
    firsts = (positions[:places] + starts).clamp_max(count)
    return _in_rows(order, by_group, firsts, group, is_large, sizes.to(ranges.dtype), scales)


def _in_rows(
    order: Tensor,
    by_group: Tensor,
    firsts: Tensor,
    group: Tensor,
    is_large: Tensor,
    sizes: Tensor,
    scales: tuple[Tensor, Tensor],
) -> Reflections:
    """Return what is known of rows sorted by range, and of groups, as what each row needs."""
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    parts = sizes.rsqrt()[group] - is_large.to(sizes.dtype)
    members, parts = order[by_group], parts[by_group]
    group, is_large = group[back], is_large[back]
    n, s1, s2 = (values[group] for values in (sizes, *scales))
    errors1, errors2 = s1.square().reciprocal(), s2.square().reciprocal()
    small_share = -1 / torch.where(n > 1, n.sqrt() - 1, 1)
    in_large = (errors1 + (n - 1) * errors2) / n
    in_small = errors1 / n + (1 - 1 / n) * errors2
    return Reflections(
        group=group,
        scales=torch.where(is_large, s1, s2).unsqueeze(1),
        shares=torch.where(is_large, 1, small_share).unsqueeze(1),
        weights=torch.where(is_large, in_large, in_small).unsqueeze(1),
        members=members,
        starts=firsts,
        parts=parts,
    )


def _share_out(sorted_ranges: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many rows are large, and after how many small ones each large one has all that it deserves.

    As few rows are small as leave the smallest large one more than one partner: k M_{N−k} > S_k = M₁ + … + M_{N−k}.
    """
    count = len(sorted_ranges)
    sums = sorted_ranges.cumsum(0)
    small_counts = count - 1 - positions
    deserves = (small_counts * sorted_ranges > sums) & (small_counts > 0)
    last = torch.where(deserves, positions, 0).amax(0, keepdim=True)  # an index of one element, which no host reads
    small_count = count - 1 - last
    ends = (small_count * sums / sums.gather(0, last) + 0.5).floor().long()
    return last + 1, torch.where(positions < last, ends, small_count)


def _scales(large: Tensor, small: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Return s₁ and s₂ of groups with rows of range λ₁ and λ₂, scaled so that 1/s₁² + 1/s₂² = 1."""
    between_small = 1 / torch.where(sizes > 1, sizes - sizes.sqrt(), torch.ones_like(sizes))
    on_diagonal = (1 - between_small).abs()
    largest_entry = torch.maximum(sizes.rsqrt(), on_diagonal)
    largest_entry = torch.where(sizes > 2, torch.maximum(largest_entry, between_small), largest_entry)
    of_large = (large * sizes.rsqrt()).pow(-1 / 3)
    of_small = (small * largest_entry / (sizes - 1).clamp_min(1)).pow(-1 / 3)
    norm = (of_large.square().reciprocal() + of_small.square().reciprocal()).sqrt()
    return torch.where(sizes > 1, of_large * norm, 1), of_small * norm
