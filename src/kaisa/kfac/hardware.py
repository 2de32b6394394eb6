"""What a machine does in a second: a profile that is measured once, kept as JSON and asked by the planner.

    product of matrices     operations / rate(side), side³ = rows · inner · columns; small products are slow
    decomposition           seconds over n, log-log between the sizes measured, ~ n³ beyond the largest
    exchange, total         latency + latency a peer + bytes / bandwidth, inside a node or between nodes

A shipped profile says of each of its numbers where it comes from. Pure Python: no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

Table = tuple[tuple[float, float], ...]
"""(argument, value) in the order of the argument."""


@dataclass(frozen=True)
class Link:
    """How fast one rank sends while all ranks do.

    Attributes:
        latency: seconds until a collective has begun, however small it is.
        per_peer: seconds more for each other rank that takes part.
        bandwidth: bytes a second that leave a rank.
    """

    latency: float
    per_peer: float
    bandwidth: float


@dataclass(frozen=True)
class Hardware:
    """A machine, or many equal ones.

    Attributes:
        name: of the profile.
        ranks_per_node: how many ranks share a node, whose exchanges stay inside.
        products: operations a second of one product of matrices over its side, by type ("float32").
        batched_products: the same of products of many equal small matrices.
        decompositions: seconds of one decomposition over n, by solver ("eigen", "cholesky", "warm_eigen").
        memory_bandwidth: bytes a second read and written.
        exchange_inside, exchange_between: everyone sends to everyone, each its own part.
        total_inside, total_between: a sum that all get.
        overheads: seconds a layer that are spent however small it is, by phase.
        training: the share of the rate of large products that forward and backward passes reach.
        contention: by how much work takes longer when so many ranks of a node compute at once.
        memory: bytes of a rank, None if nobody knows.
        sources: where each field comes from.
    """

    name: str
    ranks_per_node: int
    products: Mapping[str, Table]
    batched_products: Mapping[str, Table]
    decompositions: Mapping[str, Table]
    memory_bandwidth: float
    exchange_inside: Link
    exchange_between: Link
    total_inside: Link
    total_between: Link
    overheads: Mapping[str, float] = field(default_factory=dict)
    training: float = 0.5
    contention: Table = ()
    memory: int | None = None
    sources: Mapping[str, str] = field(default_factory=dict)
