"""Who does what: a pure function from layer shapes and a world to a frozen placement.

World of 8, fraction 1/4: the grid has 2 rows (receivers) and 4 columns (gradient workers of a layer):

    | 0 1 2 3 |   a layer placed on column (1, 5): 1 or 5 decomposes and gives the other a copy;
    | 4 5 6 7 |   both precondition; 1 sends along row (0, 1, 2, 3), 5 along row (4, 5, 6, 7).

Rows are contiguous, so that the exchange of every step stays inside a node; columns are strided. Layers go to columns,
then the factors of a column to its ranks, the costliest first and each to the least loaded (Graham 1969: at most 4/3
of the best makespan for equal columns). Ties are broken by name and by rank, so that every rank computes the same
placement. No torch, no communication, no dependence on the order of a dict or set.
"""

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from kaisa.errors import ConfigurationError

COMM_OPT, HYBRID_OPT, MEM_OPT = "comm", "hybrid", "mem"


@dataclass(frozen=True)
class FactorShape:
    """The shape of one factor.

    Attributes:
        size: n, the side of a matrix or the length of a diagonal.
        blocks: how many matrices, one a group.
        is_diagonal: whether only the diagonal is kept.
    """

    size: int
    blocks: int = 1
    is_diagonal: bool = False

    @property
    def elements(self) -> int:
        """Numbers in the factor."""
        return self.blocks * (self.size if self.is_diagonal else self.size**2)

    @property
    def packed_elements(self) -> int:
        """Numbers in its triangles: what travels."""
        return self.blocks * (self.size if self.is_diagonal else self.size * (self.size + 1) // 2)

    @property
    def work(self) -> float:
        """Operations of a decomposition up to a constant: n³ a block, nothing for a diagonal."""
        return 0.0 if self.is_diagonal else float(self.blocks * self.size**3)


@dataclass(frozen=True)
class LayerShape:
    """The shapes of a layer's factors and of its gradient, (blocks, out, in) with ``blocks`` 1 for a plain matrix.

    Attributes:
        name: of the layer.
        a, g: the factors.
        gradient: (blocks, out, in).
        has_blocks: whether tensors carry the dimension of the blocks.
        uses: how many sums the statistics of a side hold; more than one keeps A and G together.
    """

    name: str
    a: FactorShape
    g: FactorShape
    gradient: tuple[int, int, int]
    has_blocks: bool = False
    uses: int = 1

    @property
    def gradient_elements(self) -> int:
        """Numbers in the gradient."""
        return math.prod(self.gradient)


@dataclass(frozen=True)
class Assignment:
    """Where one layer's work is done.

    Attributes:
        a_owners, g_owners: the ranks that average and decompose a factor: one inverse worker, or, where that is cheaper
            than to send the result, all gradient workers.
        gradient_workers: the column that holds the decompositions and preconditions.
    """

    a_owners: tuple[int, ...]
    g_owners: tuple[int, ...]
    gradient_workers: tuple[int, ...]


@dataclass(frozen=True)
class Placement:
    """The grid and the assignment of every layer.

    Attributes:
        world_size: the number of ranks.
        workers: the number of gradient workers of a layer: the number of rows.
        assignments: (name, assignment) in the order of the names given.
        ranks_per_node: how many consecutive ranks share a machine; 0 for all of them.
    """

    world_size: int
    workers: int
    assignments: tuple[tuple[str, Assignment], ...]
    ranks_per_node: int = 0

    @property
    def fraction(self) -> float:
        """The grad_worker_fraction."""
        return self.workers / self.world_size

    @property
    def rows(self) -> tuple[tuple[int, ...], ...]:
        """The receivers, one tuple of contiguous ranks a row."""
        return grid_rows(self.world_size, self.workers)

    @property
    def columns(self) -> tuple[tuple[int, ...], ...]:
        """The gradient workers, one tuple of strided ranks a column."""
        return tuple(zip(*self.rows, strict=True))

    @property
    def rows_stay_in_nodes(self) -> bool:
        """Whether the exchange of every step stays inside machines."""
        return _rows_fit(self.world_size // self.workers, self.ranks_per_node or self.world_size)

    @cached_property
    def _by_name(self) -> dict[str, Assignment]:
        return dict(self.assignments)

    def __getitem__(self, name: str) -> Assignment:
        return self._by_name[name]

    def row(self, rank: int) -> tuple[int, ...]:
        """The ranks that exchange preconditioned gradients with a rank."""
        return self.rows[rank // (self.world_size // self.workers)]

    def sender(self, name: str, rank: int) -> int:
        """The gradient worker from which a rank receives a layer's preconditioned gradient; itself if it is one."""
        length = self.world_size // self.workers
        return self[name].gradient_workers[rank // length]

    def __str__(self) -> str:
        return "\n".join("| " + "".join(map(self._cell, row)).strip(" :") + " |" for row in self.rows)

    def _cell(self, rank: int) -> str:
        """Returns a rank for the drawing, after a colon where another machine begins."""
        gap = " : " if self.ranks_per_node and rank % self.ranks_per_node == 0 else " "
        return f"{gap}{rank:>{len(str(self.world_size - 1))}}"


def grid_rows(world_size: int, workers: int) -> tuple[tuple[int, ...], ...]:
    """Returns ``workers`` rows of contiguous ranks."""
    length = world_size // workers
    return tuple(tuple(range(first, first + length)) for first in range(0, world_size, length))


def nodes_of(ranks_per_node: int | None, world_size: int) -> int:
    """Returns how many consecutive ranks share a machine.

    Args:
        ranks_per_node: what was asked for; None for all ranks.
        world_size: the number of ranks.

    Raises:
        ConfigurationError: that does not divide the world; names the nearest that do.
    """
    if ranks_per_node is None:
        return world_size
    is_count = isinstance(ranks_per_node, int) and not isinstance(ranks_per_node, bool) and ranks_per_node >= 1
    if not is_count or world_size % ranks_per_node:
        divisors = [count for count in range(1, world_size + 1) if world_size % count == 0]
        nearest = sorted(divisors, key=lambda count: abs(count - ranks_per_node))[:2] if is_count else divisors
        valid = " or ".join(map(str, sorted(nearest)))
        raise ConfigurationError(
            f"ranks_per_node is {ranks_per_node!r}, which {world_size} ranks do not fill; give {valid}"
        )
    return ranks_per_node


def _rows_fit(length: int, ranks_per_node: int) -> bool:
    return ranks_per_node % length == 0


def gradient_workers(fraction: str | float, world_size: int, ranks_per_node: int | None = None) -> int:
    """Returns how many gradient workers a layer has.

    Args:
        fraction: "comm", "hybrid", "mem", or a number of 0 to 1; what is below 1/world counts as one worker.
        world_size: the number of ranks.
        ranks_per_node: how many ranks share a machine; "hybrid" takes rows that stay inside one.

    Raises:
        ConfigurationError: the fraction makes no whole number of workers that divides the world; names the nearest.
    """
    divisors = [count for count in range(1, world_size + 1) if world_size % count == 0]
    if isinstance(fraction, str):
        if fraction not in (COMM_OPT, HYBRID_OPT, MEM_OPT):
            raise ConfigurationError(
                f"grad_worker_fraction is {fraction!r}; give 'comm', 'hybrid', 'mem' or a number from 0 to 1"
            )
        wished = {COMM_OPT: world_size, HYBRID_OPT: world_size / 2, MEM_OPT: 1}[fraction]
        if fraction == HYBRID_OPT:
            node = ranks_per_node or world_size
            fitting = [count for count in divisors if world_size // count > 1 and _rows_fit(world_size // count, node)]
            divisors = fitting or divisors
        return min(divisors, key=lambda count: (abs(count - wished), -count))
    if not isinstance(fraction, int | float) or isinstance(fraction, bool) or not 0 <= fraction <= 1:
        raise ConfigurationError(f"grad_worker_fraction is {fraction!r}; give a number from 0 to 1")
    wished = max(1.0, fraction * world_size)
    nearest = sorted(divisors, key=lambda count: abs(count - wished))[:2]
    if abs(nearest[0] - wished) > 1e-6 * world_size:
        valid = " or ".join(f"{count}/{world_size}" for count in sorted(nearest))
        raise ConfigurationError(
            f"grad_worker_fraction {fraction:g} of {world_size} ranks is {wished:g} gradient workers, "
            f"which do not divide them; the nearest that do are {valid}"
        )
    return nearest[0]


Cost = Callable[[FactorShape], float]
K = TypeVar("K", str, tuple[str, str])


@dataclass(frozen=True)
class LocalRule:
    """The rule of SPD-KFAC (arXiv 2107.06533): a factor is decomposed on every rank that needs it if that is faster.

    With w gradient workers and t for one decomposition, sending it takes (w - 1) · bytes of the decomposition and
    spares the others (1 - 1/w) · t each; but w owners must be sent statistics, (w - 1) more triangles each time.

    Attributes:
        exchanges: how often statistics are sent for each decomposition.
        per_byte: seconds to send a byte.
        per_operation, overhead: seconds of a decomposition, for each of n³ operations and to begin with.
        bytes_per_number: of statistics and decompositions.

    The defaults are orders of magnitude: a network of 1 GB/s, one core. A calibrated profile knows better.
    """

    exchanges: float
    per_byte: float = 1e-9
    per_operation: float = 4e-10
    overhead: float = 2e-5
    bytes_per_number: int = 4

    def is_cheaper_locally(self, factor: FactorShape, workers: int) -> bool:
        """Says whether every gradient worker should decompose a factor."""
        decomposition = factor.elements if factor.is_diagonal else factor.elements + factor.blocks * factor.size
        spared = decomposition - self.exchanges * factor.packed_elements
        sending = (workers - 1) * self.bytes_per_number * spared * self.per_byte
        computing = 0.0 if factor.is_diagonal else self.overhead * factor.blocks + self.per_operation * factor.work
        return workers > 1 and computing * (1 - 1 / workers) < sending


def place(
    shapes: Sequence[LayerShape],
    world_size: int,
    workers: int,
    *,
    colocate: bool = False,
    local_below: int = 0,
    local_rule: LocalRule | None = None,
    ranks_per_node: int | None = None,
    cost: Cost = lambda shape: shape.work,
) -> Placement:
    """Places every layer on a column and each of its factors on a rank of the column.

    Args:
        shapes: the layers.
        world_size: the number of ranks.
        workers: gradient workers of a layer, a divisor of the world.
        colocate: keeps A and G of a layer on one rank.
        local_below: factors with a side below this are decomposed by every gradient worker.
        local_rule: and those for which this says so.
        ranks_per_node: how many consecutive ranks share a machine; None for all.
        cost: what decomposing a factor costs, in any unit.

    Raises:
        ConfigurationError: ``workers`` or ``ranks_per_node`` does not divide the world.
    """
    if workers < 1 or world_size % workers:
        raise ConfigurationError(f"{workers} gradient workers do not divide {world_size} ranks")
    columns = tuple(zip(*grid_rows(world_size, workers), strict=True))

    def is_local(factor: FactorShape) -> bool:
        return factor.size < local_below or (local_rule is not None and local_rule.is_cheaper_locally(factor, workers))

    costs = {shape.name: (cost(shape.a), cost(shape.g)) for shape in shapes}
    chosen = _longest_first({name: sum(pair) for name, pair in costs.items()}, range(len(columns)))
    by_column: dict[int, list[LayerShape]] = {index: [] for index in range(len(columns))}
    for shape in shapes:
        by_column[chosen[shape.name]].append(shape)
    assignments: dict[str, Assignment] = {}
    for index, column in enumerate(columns):
        assignments.update(_within(column, by_column[index], costs, colocate, is_local))
    ordered = tuple((shape.name, assignments[shape.name]) for shape in shapes)
    return Placement(world_size, workers, ordered, nodes_of(ranks_per_node, world_size))


def _within(
    column: tuple[int, ...],
    shapes: Sequence[LayerShape],
    costs: Mapping[str, tuple[float, float]],
    colocate: bool,
    is_local: Callable[[FactorShape], bool],
) -> dict[str, Assignment]:
    """Gives the factors of one column's layers to its ranks."""
    tasks: dict[tuple[str, str], float] = {}
    together = {shape.name for shape in shapes if colocate or shape.uses > 1}
    for shape in shapes:
        a_cost, g_cost = costs[shape.name]
        tasks[(shape.name, "a")] = a_cost + g_cost if shape.name in together else a_cost
        if shape.name not in together:
            tasks[(shape.name, "g")] = g_cost
    chosen = _longest_first(tasks, column)

    def owners(shape: LayerShape, side: str, factor: FactorShape) -> tuple[int, ...]:
        if shape.uses == 1 and is_local(factor):
            return column
        return (chosen[(shape.name, "a" if shape.name in together else side)],)

    return {
        shape.name: Assignment(owners(shape, "a", shape.a), owners(shape, "g", shape.g), column) for shape in shapes
    }


def _longest_first(costs: Mapping[K, float], bins: Sequence[int]) -> dict[K, int]:
    """Gives every task to the least loaded bin, the costliest first; ties go by the task's name and the bin's order."""
    heap = [(0.0, position) for position in range(len(bins))]
    result: dict[K, int] = {}
    for task in sorted(costs, key=lambda task: (-costs[task], task)):
        load, position = heapq.heappop(heap)
        result[task] = bins[position]
        heapq.heappush(heap, (load + costs[task], position))
    return result
