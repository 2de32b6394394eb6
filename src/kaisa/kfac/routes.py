"""Which numbers go where, and in how many messages: what transport sends and account counts. Pure Python, no torch.

    statistics        in buckets of whole layers, the last layer first, as the backward pass reaches them
    decompositions    one message a column
    gradients         in buckets of whole groups of equal shape, each sent while the next is being preconditioned

A bucket is closed when it holds ``bucket_bytes`` or more, counted at four bytes a number.

A direct exchange among L ranks takes as long as the rank with most: (L - 1) · largest share. Where one share is far
above the even one, messages go in two steps through even slices of the whole, of which every rank takes one:

    statistics    every rank ─► the rank of each slice, who adds up ─► the owners       largest + (L - 1) · even
    the others    the rank that has it ─► the rank of each slice ─► everybody            the same
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

from kaisa.kfac.placement import FactorShape, LayerShape, Placement

A, G = 0, 1
HEADER = 3  # numbers of 8 bytes that go with the statistics of each layer: positions, examples, share
IN_FLIGHT = 4  # buckets of statistics on their way at one time, so that messages do not fill the memory
_WORTH_SLICING = 2**20  # bytes that the busiest rank must be spared
NOTE = 1  # and one with each bucket: a layer that could not be decomposed
INT8 = "int8"
BLOCK, SCALE_BYTES = 128, 4  # of the 8-bit form: how many numbers share a scale

Key = tuple[str, int]
"""A layer and a side: 0 for A, 1 for G."""


Piece = tuple[Key, int, int]
"""A part of a factor's packed sums: from where to where."""


@dataclass(frozen=True)
class Routes:
    """Who owns, sends and receives what under a placement.

    Attributes:
        placement: who does what.
        layers: the shapes of all layers, in an order that all ranks share.
        bucket_bytes: the size of a message.
    """

    placement: Placement
    layers: tuple[LayerShape, ...]
    bucket_bytes: int

    @cached_property
    def shapes(self) -> dict[str, LayerShape]:
        """The shapes by name."""
        return {shape.name: shape for shape in self.layers}

    def factor(self, key: Key) -> FactorShape:
        """Returns the shape of a factor."""
        shape = self.shapes[key[0]]
        return shape.g if key[1] else shape.a

    def owners(self, key: Key) -> tuple[int, ...]:
        """Returns the ranks that average and decompose a factor."""
        assignment = self.placement[key[0]]
        return assignment.g_owners if key[1] else assignment.a_owners

    def owned_by(self, rank: int, names: Iterable[str]) -> list[Key]:
        """Returns the factors of some layers that a rank averages and decomposes."""
        return [(name, side) for name in names for side in (A, G) if rank in self.owners((name, side))]

    def sent_by(self, rank: int, names: Iterable[str]) -> list[Key]:
        """Returns what one owner has and the others of the column lack; a factor that all own is sent by nobody."""
        return [(name, side) for name in names for side in (A, G) if self.owners((name, side)) == (rank,)]

    def packed_size(self, key: Key) -> int:
        """Returns how many numbers the sums of a factor are on the way."""
        return self.shapes[key[0]].uses * self.factor(key).packed_elements

    @cached_property
    def statistics_buckets(self) -> tuple[tuple[str, ...], ...]:
        """The layers of each message of statistics."""
        sizes = [([shape.name], sum(self.packed_size((shape.name, side)) for side in (A, G))) for shape in self.layers]
        return tuple(_filled(reversed(sizes), self.bucket_bytes))

    @cached_property
    def sliced_buckets(self) -> dict[tuple[str, ...], bool]:
        """Which messages of statistics go in two steps, through even slices."""
        result = {}
        for bucket in self.statistics_buckets:
            shares = [0] * self.placement.world_size
            for key in keys_of(bucket):
                for owner in self.owners(key):
                    shares[owner] += self.packed_size(key)
            result[bucket] = is_worth_slicing(shares)
        return result

    def pieces(self, bucket: tuple[str, ...], rank: int) -> list[Piece]:
        """Returns what a rank adds up of a message of statistics: a slice, or everything that it owns."""
        if not self.sliced_buckets[bucket]:
            return [(key, 0, self.packed_size(key)) for key in self.owned_by(rank, bucket)]
        keys, starts = keys_of(bucket), self.starts(bucket)
        low, high = slice_of(rank, starts[-1], self.placement.world_size)
        result = []
        for index in range(max(0, bisect_right(starts, low) - 1), len(keys)):
            first, last = max(low, starts[index]), min(high, starts[index + 1])
            if starts[index] >= high:
                break
            if first < last:
                result.append((keys[index], first - starts[index], last - starts[index]))
        return result

    def starts(self, bucket: tuple[str, ...]) -> list[int]:
        """Returns where each factor of a bucket begins when all are one after another, and where the last one ends."""
        return list(accumulate((self.packed_size(key) for key in keys_of(bucket)), initial=0))

    @cached_property
    def gradient_buckets(self) -> tuple[tuple[str, ...], ...]:
        """The layers of each message of preconditioned gradients; layers of one shape are in one."""
        groups: dict[object, list[str]] = {}
        for shape in self.layers:
            groups.setdefault((shape.gradient, shape.has_blocks), []).append(shape.name)
        sizes = [(names, sum(self.shapes[name].gradient_elements for name in names)) for names in groups.values()]
        return tuple(_filled(sizes, self.bucket_bytes))


def is_worth_slicing(shares: Sequence[int]) -> bool:
    """Says whether an exchange in which ranks have such shares, in numbers, had better go in two steps."""
    direct = (len(shares) - 1) * max(shares)
    sliced = max(shares) + (len(shares) - 1) * -(-sum(shares) // len(shares))
    return 4 * (direct - sliced) > _WORTH_SLICING and direct > 1.5 * sliced


def keys_of(names: Iterable[str]) -> list[Key]:
    """Returns both factors of some layers."""
    return [(name, side) for name in names for side in (A, G)]


def slice_of(rank: int, total: int, count: int) -> tuple[int, int]:
    """Returns from where to where one of some equal parts of a message goes."""
    return total * rank // count, total * (rank + 1) // count


def even_slices(total: int, count: int) -> list[tuple[int, int]]:
    """Returns from where to where each of some equal parts of a message goes."""
    return list(pairwise([total * index // count for index in range(count + 1)]))


def overlaps(start: int, end: int, bounds: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Returns what of a range lies in each of some others, relative to its start."""
    return [(max(start, low) - start, max(start, low, min(end, high)) - start) for low, high in bounds]


def is_worth_deferring(world_size: int, workers: int, layers: Iterable[LayerShape]) -> bool:
    """Says whether statistics had better wait for the next decompositions (``kaisa.kfac.deferral``).

    At COMM-OPT, which buys less traffic with memory; not where a layer is tied, whose pair is not linear in its sums.
    """
    return 1 < world_size == workers and all(shape.uses == 1 for shape in layers)


def header_bytes(bucket: Sequence[str]) -> int:
    """Returns how many bytes go ahead of the sums of a bucket."""
    return 8 * (HEADER * len(bucket) + NOTE)


def int8_length(sizes: Iterable[int]) -> int:
    """Returns how many bytes parts of these sizes have in the 8-bit form."""
    return sum(size + SCALE_BYTES * blocks_of(size) for size in sizes)


def blocks_of(size: int) -> int:
    """Returns into how many blocks with a scale each a part goes."""
    return -(-size // BLOCK)


def _filled(groups: Iterable[tuple[Sequence[str], int]], most: int) -> Iterator[tuple[str, ...]]:
    """Yields buckets of whole groups, each closed as soon as its numbers reach ``most`` bytes."""
    bucket: list[str] = []
    size = 0
    for names, numbers in groups:
        bucket += names
        size += 4 * numbers
        if size >= most:
            yield tuple(bucket)
            bucket, size = [], 0
    if bucket:
        yield tuple(bucket)
