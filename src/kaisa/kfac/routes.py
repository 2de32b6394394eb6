"""Which numbers go where, and in how many messages: what transport sends and account counts. Pure Python, no torch.

    statistics        in buckets of whole layers, the last layer first, as the backward pass reaches them
    decompositions    one message a column
    gradients         in buckets of whole groups of equal shape, each sent while the next is being preconditioned

A bucket is closed when it holds ``bucket_bytes`` or more, counted at four bytes a number.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from kaisa.kfac.placement import FactorShape, LayerShape, Placement

A, G = 0, 1
HEADER = 3  # numbers of 8 bytes that go with the statistics of each layer: positions, examples, share
NOTE = 1  # and one with each bucket: a layer that could not be decomposed
INT8 = "int8"
BLOCK, SCALE_BYTES = 128, 4  # of the 8-bit form: how many numbers share a scale

Key = tuple[str, int]
"""A layer and a side: 0 for A, 1 for G."""


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
    def gradient_buckets(self) -> tuple[tuple[str, ...], ...]:
        """The layers of each message of preconditioned gradients; layers of one shape are in one."""
        groups: dict[object, list[str]] = {}
        for shape in self.layers:
            groups.setdefault((shape.gradient, shape.has_blocks), []).append(shape.name)
        sizes = [(names, sum(self.shapes[name].gradient_elements for name in names)) for names in groups.values()]
        return tuple(_filled(sizes, self.bucket_bytes))


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
