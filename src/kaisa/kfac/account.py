"""What a placement sends and holds, in bytes, before anything runs. Pure Python: no torch, no communication.

With n(n + 1)/2 numbers in the triangle of a factor of side n, W ranks, w gradient workers of a layer, and numbers of b
bytes, a rank sends

    factor step     b · Σ triangles of the factors that others own, once to each owner; to count, 24 bytes a layer
    inverse step    b · (w - 1) · Σ decompositions that it owns; for status, 8 · (2 · blocks + 3) bytes a layer
    every step      b · (W/w - 1) · Σ gradients of the layers that it is the sender of

and holds the factors that it owns and the decompositions of the layers of its column. A sum over all ranks (counts,
status) is counted once, as large as it is.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kaisa.kfac.placement import Assignment, FactorShape, LayerShape, Placement

STATISTICS, COUNTS, DECOMPOSITIONS, STATUS, GRADIENTS = "statistics", "counts", "decompositions", "status", "gradients"

Held = Callable[[FactorShape], int]
"""How many numbers the decomposition of a factor has."""


@dataclass(frozen=True)
class Sent:
    """What one rank sends of one kind.

    Attributes:
        bytes: that leave the rank.
        calls: collectives that it takes part in.
    """

    bytes: int
    calls: int


@dataclass(frozen=True)
class Sizes:
    """Bytes of a number.

    Attributes:
        statistics, gradients: on the wire.
        factors, decompositions: in memory; decompositions travel as they are held.
        bucket: bytes of a message of statistics.
    """

    statistics: int = 4
    gradients: int = 4
    factors: int = 4
    decompositions: int = 4
    bucket: int = 25 * 2**20


@dataclass(frozen=True)
class Account:
    """What every rank sends and holds under a placement.

    Attributes:
        placement: who does what.
        factor_step, inverse_step, every_step: by rank and kind.
        memory: bytes by rank and kind.
    """

    placement: Placement
    factor_step: tuple[Mapping[str, Sent], ...]
    inverse_step: tuple[Mapping[str, Sent], ...]
    every_step: tuple[Mapping[str, Sent], ...]
    memory: tuple[Mapping[str, int], ...]


def account(
    placement: Placement,
    shapes: Sequence[LayerShape],
    held: Held,
    *,
    sizes: Sizes | None = None,
    has_moments: bool = False,
) -> Account:
    """Returns what a placement costs on every rank.

    Args:
        placement: who does what.
        shapes: of all layers.
        held: how many numbers the decomposition of a factor has.
        sizes: bytes of a number.
        has_moments: whether the solver holds corrected eigenvalues, one for each number of a gradient.
    """
    sizes = sizes or Sizes()
    ranks = range(placement.world_size)
    return Account(
        placement,
        tuple(_factor_step(placement, shapes, rank, sizes) for rank in ranks),
        tuple(_inverse_step(placement, shapes, rank, held, sizes) for rank in ranks),
        tuple(_every_step(placement, shapes, rank, sizes) for rank in ranks),
        tuple(_memory(placement, shapes, rank, held, sizes, has_moments) for rank in ranks),
    )


def count_messages(shapes: Sequence[LayerShape], bucket: int) -> int:
    """Returns into how many messages of about ``bucket`` bytes statistics go, filled from the last layer on."""
    count, size = 0, 0
    for shape in reversed(shapes):
        if size == 0:
            count += 1
        size += 4 * shape.uses * (shape.a.packed_elements + shape.g.packed_elements)
        if size >= bucket:
            size = 0
    return count


def _sides(shape: LayerShape, assignment: Assignment) -> tuple[tuple[FactorShape, tuple[int, ...]], ...]:
    return (shape.a, assignment.a_owners), (shape.g, assignment.g_owners)


def _factor_step(placement: Placement, shapes: Sequence[LayerShape], rank: int, sizes: Sizes) -> dict[str, Sent]:
    if placement.world_size == 1:
        return {}
    numbers = sum(
        shape.uses * factor.packed_elements * sum(owner != rank for owner in owners)
        for shape in shapes
        for factor, owners in _sides(shape, placement[shape.name])
    )
    return {
        STATISTICS: Sent(sizes.statistics * numbers, count_messages(shapes, sizes.bucket)),
        COUNTS: Sent(3 * 8 * len(shapes), 1),
    }


def _inverse_step(
    placement: Placement, shapes: Sequence[LayerShape], rank: int, held: Held, sizes: Sizes
) -> dict[str, Sent]:
    if placement.world_size == 1:
        return {}
    column = next(column for column in placement.columns if rank in column)
    travelling = [
        (owners[0], held(factor))
        for shape in shapes
        for factor, owners in _sides(shape, placement[shape.name])
        if placement[shape.name].gradient_workers == column and len(owners) == 1
    ]
    own = sum(numbers for owner, numbers in travelling if owner == rank)
    status = sum(2 * shape.gradient[0] + 3 for shape in shapes)
    result = {STATUS: Sent(8 * status, 2)}
    if len(column) > 1 and travelling:
        result[DECOMPOSITIONS] = Sent(sizes.decompositions * own * (len(column) - 1), 1)
    return result


def _every_step(placement: Placement, shapes: Sequence[LayerShape], rank: int, sizes: Sizes) -> dict[str, Sent]:
    row = placement.row(rank)
    if len(row) == 1:
        return {}
    own = sum(shape.gradient_elements for shape in shapes if placement.sender(shape.name, rank) == rank)
    return {GRADIENTS: Sent(sizes.gradients * own * (len(row) - 1), 1)}


def _memory(
    placement: Placement, shapes: Sequence[LayerShape], rank: int, held: Held, sizes: Sizes, has_moments: bool
) -> dict[str, int]:
    worked = [shape for shape in shapes if rank in placement[shape.name].gradient_workers]
    factors = sum(
        factor.elements for shape in shapes for factor, owners in _sides(shape, placement[shape.name]) if rank in owners
    )
    result = {
        "factors": sizes.factors * factors,
        "decompositions": sizes.decompositions * sum(held(shape.a) + held(shape.g) for shape in worked),
        "moments": sizes.decompositions * sum(shape.gradient_elements for shape in worked) * has_moments,
    }
    return {**result, "total": sum(result.values())}
