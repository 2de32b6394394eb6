"""What a placement sends and holds, in bytes, before anything runs. Pure Python: no torch, no communication.

With n(n + 1)/2 numbers in the triangle of a factor of side n, W ranks, w gradient workers of a layer, and numbers of b
bytes, a rank sends

    factor step     b · Σ triangles of the factors that others own, once to each owner, and (W - 1) headers of
                    24 bytes a layer and 8 a bucket; nothing where statistics are deferred, all of it then with the next
    inverse step    b · (w - 1) · Σ decompositions that it owns; 16 · blocks bytes a layer for status, if factors are
                    damped one by one
    every step      b · (W/w - 1) · Σ gradients of the layers that it is the sender of

(where one share is far above the even one, exchanges go in two steps and send a little more: ``routes``)

and holds the factors that it owns, the decompositions of the layers of its column, and where statistics are deferred
its own sums of all layers. A sum over all ranks (status) is counted once, as large as it is. This is the steady state:
until every layer has its first decomposition, another 16 bytes a layer and inverse step say which have failed.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import add, sub

from kaisa.kfac.placement import FactorShape, LayerShape, Placement
from kaisa.kfac.routes import (
    INT8,
    A,
    G,
    Routes,
    header_bytes,
    int8_length,
    is_worth_slicing,
    keys_of,
    slice_of,
)

STATISTICS, DECOMPOSITIONS, STATUS, GRADIENTS = "statistics", "decompositions", "status", "gradients"

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
        statistics, gradients: on the wire; "int8" for one byte a number and a scale for 128.
        factors, decompositions: in memory; decompositions travel as they are held.
        bucket: bytes of a message.
    """

    statistics: int | str = 4
    gradients: int | str = 4
    factors: int = 4
    decompositions: int = 4
    bucket: int = 25 * 2**20


@dataclass(frozen=True)
class Account:
    """What every rank sends and holds under a placement.

    Attributes:
        placement: who does what.
        factor_step, inverse_step, every_step: by rank and kind.
        memory: bytes by rank and kind, between steps.
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
    damps_factors: bool = False,
    deferred: bool = False,
) -> Account:
    """Returns what a placement costs on every rank.

    Args:
        placement: who does what.
        shapes: of all layers.
        held: how many numbers the decomposition of a factor has.
        sizes: bytes of a number.
        has_moments: whether the solver holds corrected eigenvalues, one for each number of a gradient.
        damps_factors: whether the solver damps the factors one by one.
        deferred: whether statistics travel on inverse steps alone.
    """
    sizes = sizes or Sizes()
    routes = Routes(placement, tuple(shapes), sizes.bucket)
    statistics = _statistics(routes, sizes)
    decompositions = _decompositions(routes, held, sizes, damps_factors)
    none: tuple[dict[str, Sent], ...] = ({},) * placement.world_size
    deferred_too = statistics if deferred else none
    return Account(
        placement,
        none if deferred else statistics,
        tuple({**first, **second} for first, second in zip(deferred_too, decompositions, strict=True)),
        _gradients(routes, sizes),
        _memory(routes, held, sizes, has_moments, deferred),
    )


def _statistics(routes: Routes, sizes: Sizes) -> tuple[dict[str, Sent], ...]:
    world_size = routes.placement.world_size
    if world_size == 1:
        return ({},)
    everything, calls, kept = 0, 0, Counter[int]()
    for bucket in routes.statistics_buckets:
        everything += (world_size - 1) * header_bytes(bucket)
        calls += 1 + routes.sliced_buckets[bucket]
        if routes.sliced_buckets[bucket]:
            first, own = _in_slices(routes, bucket, sizes)
            everything += first
            kept.update(own)
            continue
        for key in keys_of(bucket):
            size = _encoded([routes.packed_size(key)], sizes.statistics)
            everything += size * len(routes.owners(key))
            kept.update(dict.fromkeys(routes.owners(key), size))
    return tuple({STATISTICS: Sent(everything - kept[rank], calls)} for rank in range(world_size))


def _in_slices(routes: Routes, bucket: tuple[str, ...], sizes: Sizes) -> tuple[int, Counter[int]]:
    """Returns what a rank would send of a bucket that goes in two steps, and what each sends less than that.

    A rank sends every slice but its own, and passes the sums of its own on to the owners, unless that is itself.
    """
    starts, keys, count = routes.starts(bucket), keys_of(bucket), routes.placement.world_size
    is_plain = sizes.statistics == sizes.factors
    kept: Counter[int] = Counter()
    everything = sizes.factors * starts[-1] if is_plain else 0
    for rank in range(0 if is_plain else count):
        parts = [high - low for _, low, high in routes.pieces(bucket, rank)]
        wire = _encoded(parts, sizes.statistics)
        everything += wire
        kept[rank] += wire - sizes.factors * sum(parts)
    for key, start, end in zip(keys, starts, starts[1:], strict=False):
        owners = routes.owners(key)
        if len(owners) > 1:
            for rank in range(start * count // starts[-1], min(count, end * count // starts[-1] + 1)):
                kept[rank] -= sizes.factors * (len(owners) - 1) * _overlap(start, end, rank, starts[-1], count)
        for rank in owners:
            kept[rank] += sizes.factors * _overlap(start, end, rank, starts[-1], count)
    return everything, kept


def _overlap(start: int, end: int, rank: int, total: int, count: int) -> int:
    low, high = slice_of(rank, total, count)
    return max(0, min(end, high) - max(start, low))


def _decompositions(routes: Routes, held: Held, sizes: Sizes, damps_factors: bool) -> tuple[dict[str, Sent], ...]:
    placement = routes.placement
    if placement.world_size == 1:
        return ({},)
    status = 8 * sum(2 * shape.gradient[0] for shape in routes.layers)
    common = {STATUS: Sent(status, 1)} if damps_factors else {}
    own, columns = Counter[int](), set[int]()
    for name, assignment in placement.assignments if placement.workers > 1 else ():
        for key in ((name, A), (name, G)):
            owners = routes.owners(key)
            if len(owners) == 1:
                own[owners[0]] += held(routes.factor(key))
                columns.add(assignment.gradient_workers[0])
    result = [dict(common) for _ in range(placement.world_size)]
    for first in columns:
        column = placement.columns[first]
        numbers = [own[rank] for rank in column]
        sent, calls = _gathered(numbers, numbers, sizes.decompositions)
        for rank, size in zip(column, sent, strict=True):
            result[rank][DECOMPOSITIONS] = Sent(size, calls)
    return tuple(result)


def _gathered(numbers: Sequence[int], elements: Sequence[int], each: int) -> tuple[list[int], int]:
    """Returns the bytes that each rank sends in a gather, and in how many calls.

    Args:
        numbers: of each rank, by which it is decided whether to go in slices.
        elements: of each rank's message.
        each: bytes of an element.
    """
    count, total = len(numbers), sum(elements)
    if not is_worth_slicing(numbers):
        return [(count - 1) * each * mine for mine in elements], 1
    bounds = [total * index // count for index in range(count + 1)]
    result = [(count - 1) * each * size for size in map(sub, bounds[1:], bounds)]
    for rank, (start, mine) in enumerate(zip(accumulate(elements, initial=0), elements, strict=False)):
        if mine:
            result[rank] += each * (mine - _overlap(start, start + mine, rank, total, count))
    return result, 2


def _gradients(routes: Routes, sizes: Sizes) -> tuple[dict[str, Sent], ...]:
    placement = routes.placement
    length = placement.world_size // placement.workers
    if length == 1:
        return ({},) * placement.world_size
    # All rows send alike: the gradient workers of a layer stand in the same place of theirs.
    total, calls = [0] * length, 0
    each = 1 if isinstance(sizes.gradients, str) else sizes.gradients
    for bucket in routes.gradient_buckets:
        numbers, elements = [0] * length, [0] * length
        for name in bucket:
            place, count = placement[name].gradient_workers[0], routes.shapes[name].gradient_elements
            numbers[place] += count
            elements[place] += int8_length([count]) if sizes.gradients == INT8 else count
        sent, needed = _gathered(numbers, elements, each)
        total = list(map(add, total, sent))
        calls += needed
    return tuple({GRADIENTS: Sent(total[rank % length], calls)} for rank in range(placement.world_size))


def _memory(routes: Routes, held: Held, sizes: Sizes, has_moments: bool, deferred: bool) -> tuple[dict[str, int], ...]:
    placement = routes.placement
    length = placement.world_size // placement.workers
    factors, decompositions, moments = Counter[int](), Counter[int](), Counter[int]()
    sums = 0
    for name, assignment in placement.assignments:
        shape, column = routes.shapes[name], assignment.gradient_workers[0]
        for key in ((name, A), (name, G)):
            for owner in routes.owners(key):
                factors[owner] += routes.factor(key).elements
            decompositions[column] += held(routes.factor(key))
            sums += shape.uses * routes.factor(key).elements
        moments[column] += shape.gradient_elements * has_moments
    result = []
    for rank in range(placement.world_size):
        row = {
            "factors": sizes.factors * factors[rank],
            "decompositions": sizes.decompositions * decompositions[rank % length],
            "moments": sizes.decompositions * moments[rank % length],
            "statistics": sizes.factors * sums * deferred,
        }
        result.append({**row, "total": sum(row.values())})
    return tuple(result)


def _encoded(parts: Iterable[int], form: int | str) -> int:
    return int8_length(parts) if form == INT8 else int(form) * sum(parts)
