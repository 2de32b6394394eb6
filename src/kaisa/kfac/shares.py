"""What falls to each rank of a placement. Pure Python: no torch, and no more work than layers and ranks together.

A column is named by its rank in the first row, a node by the ranks that lie side by side in it.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from kaisa.kfac.placement import FactorShape, LayerShape, Placement


def by_owner(placement: Placement, shapes: Iterable[LayerShape], value: Callable[[FactorShape], float]) -> list[float]:
    """Returns by rank the sum of a value over the factors that it owns."""
    own = [0.0] * placement.world_size
    common = [0.0] * row_length(placement)  # of factors that all gradient workers own
    for shape in shapes:
        assignment = placement[shape.name]
        for factor, owners in ((shape.a, assignment.a_owners), (shape.g, assignment.g_owners)):
            if len(owners) == 1:
                own[owners[0]] += value(factor)
            else:
                common[owners[0]] += value(factor)
    return [part + common[rank % len(common)] for rank, part in enumerate(own)]


def by_column(placement: Placement, shapes: Iterable[LayerShape], value: Callable[[LayerShape], float]) -> list[float]:
    """Returns by column the sum of a value over its layers."""
    columns = [0.0] * row_length(placement)
    for shape in shapes:
        columns[placement[shape.name].gradient_workers[0]] += value(shape)
    return columns


def row_length(placement: Placement) -> int:
    """Returns how many ranks exchange preconditioned gradients, which is the number of columns."""
    return placement.world_size // placement.workers


def over_ranks(placement: Placement, columns: Sequence[float]) -> list[float]:
    """Returns by rank what was said by column."""
    return list(columns) * placement.workers


def busiest_node(loads: Sequence[float], ranks_per_node: int) -> float:
    """Returns the largest sum over the ranks of a node."""
    return max(sum(loads[first : first + ranks_per_node]) for first in range(0, len(loads), ranks_per_node))


def fewest_companions(group: Iterable[int], ranks_per_node: int) -> int:
    """Returns how many of a group are in one node with the loneliest of them, which counts itself."""
    return min(Counter(rank // ranks_per_node for rank in group).values())
