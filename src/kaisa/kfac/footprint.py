"""What each rank holds under a placement: between steps, and at the fullest time of a step. Pure Python: no torch.

    held         factors of the owner, decompositions (and moments) of the column, sums where statistics are deferred
    factor step  this step's sums of all layers, the messages on their way, the triangles that were added up, the
                 owner's new sums
    inverse step what was decomposed, before it is in its place, and its messages
    every step   raw and preconditioned gradients, stacked and as messages

A factor step is counted as if nothing were sent before the backward pass ends, as it is in the first one. What comes
in is what others send, all but what a rank has itself: of an exchange through even slices, the part of its own message
that lies in its own slice (``routes``).
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from kaisa.kfac.account import DECOMPOSITIONS, GRADIENTS, STATISTICS, Account, Held, Sizes
from kaisa.kfac.routes import (
    IN_FLIGHT,
    INT8,
    Routes,
    header_bytes,
    int8_length,
    is_worth_slicing,
    keys_of,
    slice_of,
)
from kaisa.kfac.shares import by_column, by_owner, over_ranks, row_length
from kaisa.kfac.workload import Settings, SolverWork

Received = Mapping[str, Sequence[float]]
"""Bytes that the exchanges bring, by kind and rank."""


def footprint(
    account: Account, routes: Routes, received: Received, settings: Settings, solver: SolverWork
) -> tuple[Mapping[str, int], ...]:
    """Returns bytes by rank and kind; see ``Prediction.memory``."""
    placement, shapes = routes.placement, routes.layers
    is_alone = placement.world_size == 1
    sums = settings.factor_bytes * sum(shape.uses * (shape.a.elements + shape.g.elements) for shape in shapes)
    new_sums = by_owner(placement, shapes, lambda factor: (not is_alone) * settings.factor_bytes * factor.elements)
    computed = by_owner(placement, shapes, lambda factor: settings.decomposition_bytes * solver.held(factor))
    columns = by_column(placement, shapes, lambda shape: settings.decomposition_bytes * shape.gradient_elements)
    solved, gradients = over_ranks(placement, columns), sum(columns)
    in_flight, added_up = _statistics_in_flight(routes, settings.sizes), _added_up(routes, settings.factor_bytes)
    result = []
    for rank, held in enumerate(account.memory):
        messages = {
            kind: bytes_sent(account, kind, rank) + received[kind][rank] for kind in (DECOMPOSITIONS, GRADIENTS)
        }
        occasions = (
            sums + added_up[rank] + max(in_flight[rank], new_sums[rank]),
            messages[DECOMPOSITIONS] + computed[rank],
            messages[GRADIENTS] + 2 * solved[rank] * (not is_alone) + 3 * gradients,
        )
        result.append(
            {
                **held,
                "batch statistics": sums,
                "messages": int(max(in_flight[rank], *messages.values())),
                "new decompositions": int(computed[rank]),
                "preconditioned": int(gradients),
                "peak": held["total"] + int(max(occasions)),
            }
        )
    return tuple(result)


def bytes_sent(account: Account, kind: str, rank: int) -> int:
    """Returns the bytes of a kind that a rank sends when it is due."""
    steps = (account.factor_step[rank], account.inverse_step[rank], account.every_step[rank])
    return sum(step[kind].bytes for step in steps if kind in step)


def calls(account: Account, kind: str) -> int:
    """Returns how many collectives of a kind the busiest rank takes part in when it is due."""
    steps = (*account.factor_step, *account.inverse_step, *account.every_step)
    return max(step[kind].calls if kind in step else 0 for step in steps)


def received_bytes(routes: Routes, sizes: Sizes, held: Held) -> Received:
    """Returns by kind and rank what the exchanges bring.

    Args:
        routes: what goes where.
        sizes: bytes of a number.
        held: how many numbers the decomposition of a factor has.
    """
    return {
        STATISTICS: _statistics_received(routes, sizes),
        DECOMPOSITIONS: _decompositions_received(routes, sizes, held),
        GRADIENTS: _gradients_received(routes, sizes),
    }


# --------------------------------------------------------------------------------------------------------- statistics


def _statistics_received(routes: Routes, sizes: Sizes) -> list[float]:
    """Returns by rank what all others send it, for the sums of a slice too what comes for the factors it owns."""
    world_size = routes.placement.world_size
    everybody, owners = 0, Counter[int]()
    for bucket in routes.statistics_buckets if world_size > 1 else ():
        common, own = _message(routes, bucket, sizes)
        everybody += (world_size - 1) * common
        for rank, size in own.items():
            owners[rank] += (world_size - 1) * size
        if routes.sliced_buckets[bucket]:
            owners.update(_passed_on(routes, bucket, sizes.factors))
    return [float(everybody + owners[rank]) for rank in range(world_size)]


def _message(routes: Routes, bucket: tuple[str, ...], sizes: Sizes) -> tuple[int, Counter[int]]:
    """Returns the bytes of a message of statistics that every rank gets, and those that its owners get beside."""
    if routes.sliced_buckets[bucket]:
        largest = -(-routes.starts(bucket)[-1] // routes.placement.world_size)
        return header_bytes(bucket) + _encoded(largest, sizes.statistics), Counter()
    return header_bytes(bucket), _owned(routes, bucket, lambda numbers: _encoded(numbers, sizes.statistics))


def _owned(routes: Routes, bucket: tuple[str, ...], size_of: Callable[[int], int]) -> Counter[int]:
    result = Counter[int]()
    for key in keys_of(bucket):
        size = size_of(routes.packed_size(key))
        for owner in routes.owners(key):
            result[owner] += size
    return result


def _passed_on(routes: Routes, bucket: tuple[str, ...], each: int) -> Counter[int]:
    """Returns by owner the bytes that the ranks of the slices pass on to it: all but what lies in its own slice."""
    starts = routes.starts(bucket)
    total, count = starts[-1], routes.placement.world_size
    result = Counter[int]()
    for key, (start, end) in zip(keys_of(bucket), pairwise(starts), strict=True):
        for owner in routes.owners(key):
            result[owner] += each * (end - start - _common(start, end, *slice_of(owner, total, count)))
    return result


def _statistics_in_flight(routes: Routes, sizes: Sizes) -> list[int]:
    """Returns by rank the bytes of the messages of statistics that are there at one time, with its own part of each.

    The last of them is being made: its numbers are there as triangles, as messages to each rank, and in one piece.
    """
    world_size = routes.placement.world_size
    if world_size == 1:
        return [0]
    buckets = [
        (_sent_whole(routes, bucket, sizes), *_message(routes, bucket, sizes)) for bucket in routes.statistics_buckets
    ]
    most, owners = 0, dict[int, int]()
    for last in range(len(buckets)):
        window = buckets[max(0, last + 1 - IN_FLIGHT) : last + 1]
        everybody = 2 * buckets[last][0] + sum(sent + world_size * common for sent, common, _ in window)
        most = max(most, everybody)
        for rank, size in sum((own for _, _, own in window), Counter[int]()).items():
            owners[rank] = max(owners.get(rank, 0), everybody + world_size * size)
    return [max(most, owners.get(rank, 0)) for rank in range(world_size)]


def _sent_whole(routes: Routes, bucket: tuple[str, ...], sizes: Sizes) -> int:
    """Returns the bytes of all messages that a rank makes of a bucket, the one to itself too."""
    numbers = [routes.packed_size(key) * len(routes.owners(key)) for key in keys_of(bucket)]
    if routes.sliced_buckets[bucket]:
        numbers = [routes.starts(bucket)[-1]]
    return routes.placement.world_size * header_bytes(bucket) + sum(
        _encoded(count, sizes.statistics) for count in numbers
    )


def _added_up(routes: Routes, each: int) -> list[int]:
    """Returns by rank the bytes of the triangles that were added up and wait for the others: its own, and slices."""
    world_size = routes.placement.world_size
    if world_size == 1:
        return [0]
    owners, slices = Counter[int](), 0
    for bucket in routes.statistics_buckets:
        owners.update(_owned(routes, bucket, lambda numbers: each * numbers))
        if routes.sliced_buckets[bucket]:
            slices += each * -(-routes.starts(bucket)[-1] // world_size)
    return [slices + owners[rank] for rank in range(world_size)]


# -------------------------------------------------------------------------------------- decompositions and gradients


def _decompositions_received(routes: Routes, sizes: Sizes, held: Held) -> list[float]:
    """Returns by rank what the owners of its column send."""
    placement = routes.placement
    own = Counter[int]()
    for shape in routes.layers if placement.workers > 1 else ():
        for key in keys_of([shape.name]):
            if len(owners := routes.owners(key)) == 1:
                own[owners[0]] += held(routes.factor(key))
    result = [0.0] * placement.world_size
    for column in placement.columns if own else ():
        numbers = Counter({place: own[rank] for place, rank in enumerate(column) if rank in own})
        kept = _kept(numbers, numbers, len(column))
        for place, rank in enumerate(column):
            result[rank] = sizes.decompositions * (numbers.total() - kept[place])
    return result


def _gradients_received(routes: Routes, sizes: Sizes) -> list[float]:
    """Returns by rank what the senders of its row send; all rows send alike."""
    placement = routes.placement
    length = row_length(placement)
    each = 1 if sizes.gradients == INT8 else int(sizes.gradients)
    everything, own = 0, Counter[int]()
    for bucket in routes.gradient_buckets if length > 1 else ():
        numbers, lengths = Counter[int](), Counter[int]()
        for name in bucket:
            place, count = placement[name].gradient_workers[0], routes.shapes[name].gradient_elements
            numbers[place] += count
            lengths[place] += _encoded(count, INT8 if sizes.gradients == INT8 else 1)
        everything += lengths.total()
        own.update(_kept(numbers, lengths, length))
    return over_ranks(placement, [float(each * (everything - own[place])) for place in range(length)])


def _kept(numbers: Counter[int], lengths: Counter[int], count: int) -> Counter[int]:
    """Returns what of a gather nobody need bring a rank, by its place: what it has itself.

    Args:
        numbers: of each rank that sends, by which it is decided whether to go in slices.
        lengths: of its message.
        count: how many ranks there are.
    """
    shares = [0] * count
    for place, size in numbers.items():
        shares[place] = size
    if not is_worth_slicing(shares):
        return lengths
    result, start = Counter[int](), 0
    for place in sorted(lengths):
        end = start + lengths[place]
        result[place] = _common(start, end, *slice_of(place, lengths.total(), count))
        start = end
    return result


def _common(start: int, end: int, low: int, high: int) -> int:
    return max(0, min(end, high) - max(start, low))


def _encoded(numbers: int, form: int | str) -> int:
    return int8_length([numbers]) if form == INT8 else int(form) * numbers
