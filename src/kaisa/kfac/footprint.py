"""What each rank holds under a placement: between steps, and at the fullest time of a step. Pure Python: no torch.

    held         factors of the owner, decompositions (and moments) of the column, sums where statistics are deferred
    factor step  this step's sums of all layers, the messages of their triangles, those of a bucket stacked to be added,
                 the owner's new sums
    inverse step what was decomposed, before it is in its place, and its messages
    every step   raw and preconditioned gradients, stacked and as messages

A factor step is counted as if nothing were sent before the backward pass ends, as it is in the first one.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence

from kaisa.kfac.account import DECOMPOSITIONS, GRADIENTS, STATISTICS, Account
from kaisa.kfac.placement import LayerShape
from kaisa.kfac.routes import A, G, Routes
from kaisa.kfac.shares import by_column, by_owner, over_ranks, row_length
from kaisa.kfac.workload import Settings, SolverWork


def footprint(
    account: Account, shapes: Sequence[LayerShape], settings: Settings, solver: SolverWork
) -> tuple[Mapping[str, int], ...]:
    """Returns bytes by rank and kind; see ``Prediction.memory``."""
    placement = account.placement
    is_alone = placement.world_size == 1
    sums = settings.factor_bytes * sum(shape.uses * (shape.a.elements + shape.g.elements) for shape in shapes)
    new_sums = by_owner(placement, shapes, lambda factor: (not is_alone) * settings.factor_bytes * factor.elements)
    computed = by_owner(placement, shapes, lambda factor: settings.decomposition_bytes * solver.held(factor))
    columns = by_column(placement, shapes, lambda shape: settings.decomposition_bytes * shape.gradient_elements)
    solved, gradients = over_ranks(placement, columns), sum(columns)
    received = received_bytes(account)
    stacked = _stacked_bytes(Routes(placement, tuple(shapes), settings.bucket_bytes), settings.factor_bytes)
    result = []
    for rank, held in enumerate(account.memory):
        messages = {kind: bytes_sent(account, kind, rank) + received[kind][rank] for kind in received}
        occasions = (
            sums + messages[STATISTICS] + stacked.get(rank, 0) + new_sums[rank],
            messages[DECOMPOSITIONS] + computed[rank],
            messages[GRADIENTS] + 2 * solved[rank] * (not is_alone) + 3 * gradients,
        )
        result.append(
            {
                **held,
                "batch statistics": sums,
                "messages": int(max(messages.values())),
                "new decompositions": int(computed[rank]),
                "preconditioned": int(gradients),
                "peak": held["total"] + int(max(occasions)),
            }
        )
    return tuple(result)


def _stacked_bytes(routes: Routes, bytes_each: int) -> Mapping[int, int]:
    """Returns by rank the bytes of its part of the largest bucket of statistics, once from each rank."""
    world_size = routes.placement.world_size
    result: dict[int, int] = {}
    for bucket in routes.statistics_buckets if world_size > 1 else ():
        own = Counter[int]()
        for key in ((name, side) for name in bucket for side in (A, G)):
            for owner in routes.owners(key):
                own[owner] += bytes_each * world_size * routes.packed_size(key)
        for owner, size in own.items():
            result[owner] = max(size, result.get(owner, 0))
    return result


def bytes_sent(account: Account, kind: str, rank: int) -> int:
    """Returns the bytes of a kind that a rank sends when it is due."""
    steps = (account.factor_step[rank], account.inverse_step[rank], account.every_step[rank])
    return sum(step[kind].bytes for step in steps if kind in step)


def calls(account: Account, kind: str) -> int:
    """Returns how many collectives of a kind the busiest rank takes part in when it is due."""
    steps = (*account.factor_step, *account.inverse_step, *account.every_step)
    return max(step[kind].calls if kind in step else 0 for step in steps)


def received_bytes(account: Account) -> Mapping[str, Sequence[float]]:
    """Returns by kind and rank what the exchanges bring; what one rank sends the others of its group receive."""
    placement = account.placement
    length, others = row_length(placement), max(1, placement.world_size - 1)
    # Everybody sends all statistics but those that it owns itself, which all others send to it.
    statistics = [bytes_sent(account, STATISTICS, rank) for rank in range(placement.world_size)]
    everything = sum(statistics) / others
    return {
        STATISTICS: [others * max(0.0, everything - part) for part in statistics],
        DECOMPOSITIONS: _from_others(account, DECOMPOSITIONS, placement.workers, lambda rank: rank % length),
        GRADIENTS: _from_others(account, GRADIENTS, length, lambda rank: rank // length),
    }


def _from_others(account: Account, kind: str, size: int, group_of: Callable[[int], int]) -> list[float]:
    """Returns by rank what the others of its group send, each the same to all."""
    ranks = range(account.placement.world_size)
    own = [bytes_sent(account, kind, rank) / max(1, size - 1) for rank in ranks]
    totals: dict[int, float] = defaultdict(float)
    for rank in ranks:
        totals[group_of(rank)] += own[rank]
    return [totals[group_of(rank)] - own[rank] for rank in ranks]
