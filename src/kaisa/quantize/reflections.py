"""Block Householder reflections: what spreads an outlier among samples evenly over a group of them.

Rows are sorted by their range M₁ ≥ … ≥ M_N. The first G are large, and each gets small rows in proportion to its range.
In a group of n rows, one of range λ₁ and the others of at most λ₂,

    T = Q · diag(s₁, s₂, …, s₂)        Q = I − 2 v vᵀ / vᵀv,  v = 1/√n − e₁

Q is its own inverse and takes e₁, the large row, to 1/√n. With z = diag(s) x and w = vᵀz = Σ z / √n − z₁ it is

    (Q z)₁ = z₁ + w        (Q z)ᵢ = zᵢ − w / (√n − 1)

so that a group costs a sum and a broadcast: O(N · D) for all. The group of a row, and how many there are, are tensors:
nothing here waits for the device. Source: arXiv 2010.14298; the rules for groups and scales are those of its code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# What the smallest range is raised to, of the largest: a row of equal numbers has no range, and any scale does for it.
_SMALLEST = 1e-8


@dataclass(frozen=True)
class Reflections:
    """The transform T of rows, and its inverse.

    Attributes:
        group: of each row (N).
        is_large: whether a row is the large one of its group (N).
        large: the large row of each group; more places than groups, because their number is not known to the host.
        sizes: rows of each group.
        large_scales: s₁ of each group.
        small_scales: s₂ of each group.
    """

    group: Tensor
    is_large: Tensor
    large: Tensor
    sizes: Tensor
    large_scales: Tensor
    small_scales: Tensor

    @property
    def scales(self) -> Tensor:
        """The diagonal of s as a column, N × 1."""
        scales = torch.where(self.is_large, self.large_scales[self.group], self.small_scales[self.group])
        return scales.unsqueeze(1)

    @property
    def weights(self) -> Tensor:
        """The squared norms of T⁻¹'s columns, N × 1: what an error of a row of T X becomes in all of X."""
        n = self.sizes[self.group]
        of_large, of_small = (scales[self.group].square().reciprocal() for scales in self._both_scales())
        in_large = (of_large + (n - 1) * of_small) / n
        in_small = of_large / n + (1 - 1 / n) * of_small
        return torch.where(self.is_large, in_large, in_small).unsqueeze(1)

    def apply(self, x: Tensor) -> Tensor:
        """Return T X of a matrix with a row a sample."""
        return self._reflect(x * self.scales)

    def inverse(self, y: Tensor) -> Tensor:
        """Return T⁻¹ Y."""
        return self._reflect(y).div_(self.scales)

    def inverse_transposed(self, x: Tensor) -> Tensor:
        """Return T⁻ᵀ X."""
        return self._reflect(x / self.scales)

    def _both_scales(self) -> tuple[Tensor, Tensor]:
        return self.large_scales, self.small_scales

    def _reflect(self, z: Tensor) -> Tensor:
        roots = self.sizes.sqrt()
        w = z.new_zeros(len(self.large), z.shape[1]).index_add_(0, self.group, z)
        w.div_(roots.unsqueeze(1)).sub_(z.index_select(0, self.large))
        ones = torch.ones_like(roots)
        of_small = -1 / torch.where(self.sizes > 1, roots - 1, ones)
        shares = torch.where(self.is_large, ones[self.group], of_small[self.group])
        return torch.addcmul(z, shares.unsqueeze(1), w.index_select(0, self.group))


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
    large_scales, small_scales = _scales(sorted_ranges[:places], first_small, sizes.to(ranges.dtype))
    back = torch.empty_like(order).scatter_(0, order, positions)
    return Reflections(
        group=group[back],
        is_large=is_large[back],
        large=order[:places],
        sizes=sizes.to(ranges.dtype),
        large_scales=large_scales,
        small_scales=small_scales,
    )


def _share_out(sorted_ranges: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many rows are large, and after how many small ones each large one has all that it deserves.

    As few rows are small as leave the smallest large one more than one partner: k M_{N−k} > S_k = M₁ + … + M_{N−k}.
    """
    count = len(sorted_ranges)
    sums = sorted_ranges.cumsum(0)
    small_counts = count - 1 - positions
    deserves = (small_counts * sorted_ranges > sums) & (small_counts > 0)
    last = torch.where(deserves, positions, 0).amax()
    small_count = count - 1 - last
    ends = (small_count * sums / sums[last] + 0.5).floor().long()
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
    return of_large * norm, of_small * norm
