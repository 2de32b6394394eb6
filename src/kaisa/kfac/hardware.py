"""What a machine does in a second: a profile that is measured once, kept as JSON and asked by the planner.

    product of matrices     operations / rate(side), side³ = rows · inner · columns; small products are slow
    decomposition           seconds over n, log-log between the sizes measured, ~ n³ beyond the largest, ~ n below
    exchange, total         latency + latency a peer + bytes / bandwidth, inside a node or between nodes

A shipped profile says of each of its fields where it comes from. Pure Python: no torch.
"""

import json
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any

from kaisa.errors import ConfigurationError

Table = tuple[tuple[float, float], ...]
"""(argument, value) in the order of the argument."""


@dataclass(frozen=True)
class Link:
    """How fast ranks send.

    Attributes:
        latency: seconds until a collective has begun, however small it is.
        per_peer: seconds more for each other rank that takes part.
        bandwidth: bytes a second that one rank can send or receive.
        shared: bytes a second that all ranks of a node can together; None if they do not disturb each other.
    """

    latency: float
    per_peer: float
    bandwidth: float
    shared: float | None = None

    def seconds(self, most: float, together: float, peers: int, calls: int = 1) -> float:
        """Returns how long collectives take.

        Args:
            most: bytes of the rank that sends or receives most.
            together: bytes of all ranks of the busiest node.
            peers: other ranks that take part.
            calls: how many collectives the bytes are divided into.
        """
        moving = max(most / self.bandwidth, together / self.shared if self.shared else 0.0)
        return calls * (self.latency + self.per_peer * peers) + moving


@dataclass(frozen=True)
class Hardware:
    """A machine, or many equal ones.

    Attributes:
        name: of the profile.
        ranks_per_node: how many ranks share a node, whose exchanges stay inside.
        products: operations a second of one product of matrices over its side, by type ("float32").
        batched_products: the same of products of many equal small matrices.
        decompositions: seconds of one decomposition over n, by solver ("eigen", "cholesky", "warm_eigen").
        batched_decompositions: seconds of each of many that are made at once; what is absent takes as long as alone.
        memory_bandwidth: bytes a second read and written.
        exchange_inside, exchange_between: everyone sends to everyone, each its own part.
        total_inside, total_between: a sum that all get.
        overheads: seconds a layer that are spent however small it is, by phase ("statistics", "factors", "inverses",
            "precondition").
        training: the share of the rate of the largest product that forward and backward passes reach.
        overlap: the share of communication that can be hidden behind computation; 0 where the host does both.
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
    batched_decompositions: Mapping[str, Table] = field(default_factory=dict)
    overheads: Mapping[str, float] = field(default_factory=dict)
    training: float = 0.5
    overlap: float = 1.0
    contention: Table = ()
    memory: int | None = None
    sources: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, profile: "str | Path | Hardware") -> "Hardware":
        """Returns a shipped profile by its name ("v100" for "v100-edr"), or one that was kept in a file.

        Raises:
            ConfigurationError: there is no such profile or file, or it is not a profile.
        """
        if isinstance(profile, Hardware):
            return profile
        wanted = str(profile).lower()
        named = [name for name in shipped_profiles() if wanted in (name, name.split("-")[0])]
        if named:
            shipped = resources.files("kaisa.kfac") / "profiles" / f"{named[0]}.json"
            return cls.from_json(shipped.read_text(encoding="utf-8"))
        if not Path(profile).is_file():
            known = ", ".join(shipped_profiles())
            raise ConfigurationError(
                f"there is no hardware profile {str(profile)!r}; give one of {known}, or a file made by calibration"
            )
        return cls.from_json(Path(profile).read_text(encoding="utf-8"))

    @classmethod
    def from_json(cls, text: str) -> "Hardware":
        """Returns the profile that JSON holds.

        Raises:
            ConfigurationError: the text is no profile; says what is missing or not known.
        """
        try:
            entries = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigurationError(f"a hardware profile is JSON; this is not: {error}") from error
        if not isinstance(entries, dict):
            raise ConfigurationError(f"a hardware profile is a JSON object; found {type(entries).__name__}")
        missing = [name for name in _REQUIRED if name not in entries]
        unknown = sorted(set(entries) - {entry.name for entry in fields(cls)})
        if missing or unknown:
            said = [f"missing: {', '.join(missing)}"] * bool(missing) + [f"not known: {', '.join(unknown)}"] * bool(
                unknown
            )
            raise ConfigurationError(f"this is not a hardware profile of this version; {'; '.join(said)}")
        for name in _TABLES:
            entries[name] = {key: _table(rows) for key, rows in entries.get(name, {}).items()}
        for name in _LINKS:
            entries[name] = Link(**entries[name])
        return cls(**{**entries, "contention": _table(entries.get("contention", ()))})

    def to_json(self) -> str:
        """Returns the profile as JSON, of which ``from_json`` makes it again."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def rate(self, side: float, dtype: str = "float32", *, batched: bool = False) -> float:
        """Returns the operations a second of a product of matrices of this side."""
        tables = self.batched_products if batched and dtype in self.batched_products else self.products
        return interpolated(tables[dtype], side, below=0.0, beyond=0.0)

    @property
    def best_rate(self) -> float:
        """Operations a second of the largest product of float32 matrices that was measured."""
        return self.products["float32"][-1][1]

    def decomposition_seconds(self, table: str, n: int, blocks: int = 1) -> float:
        """Returns how long some equal matrices of side n take."""
        if table not in self.decompositions:
            known = ", ".join(self.decompositions)
            raise ConfigurationError(f"the profile {self.name!r} knows no times of {table!r}; it knows {known}")
        alone = interpolated(self.decompositions[table], n, below=1.0, beyond=3.0)
        if blocks == 1:
            return alone
        if table not in self.batched_decompositions:
            return blocks * alone
        return max(alone, blocks * interpolated(self.batched_decompositions[table], n, below=1.0, beyond=3.0))

    def crowding(self, ranks: float) -> float:
        """Returns by how much work takes longer when so many ranks of a node compute at once."""
        return interpolated(self.contention, ranks, below=0.0, beyond=1.0) if self.contention else 1.0


def interpolated(table: Sequence[tuple[float, float]], at: float, *, below: float, beyond: float) -> float:
    """Returns the value of a table, log-log between its entries.

    Args:
        table: (argument, value) in the order of the argument, all positive.
        at: the argument.
        below, beyond: the powers of the argument with which values go on outside of the table.
    """
    index = bisect_left(table, at, key=lambda entry: entry[0])
    if index < len(table) and table[index][0] == at:
        return table[index][1]
    if index == 0:
        return table[0][1] * math.pow(at / table[0][0], below)
    if index == len(table):
        return table[-1][1] * math.pow(at / table[-1][0], beyond)
    (x0, y0), (x1, y1) = table[index - 1], table[index]
    return y0 * math.pow(y1 / y0, math.log(at / x0) / math.log(x1 / x0))


def shipped_profiles() -> tuple[str, ...]:
    """Returns the names of the profiles that come with the library."""
    folder = resources.files("kaisa.kfac") / "profiles"
    return tuple(sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json")))


_TABLES = ("products", "batched_products", "decompositions", "batched_decompositions")
_LINKS = ("exchange_inside", "exchange_between", "total_inside", "total_between")
_REQUIRED = ("name", "ranks_per_node", *_TABLES[:3], "memory_bandwidth", *_LINKS)


def _table(rows: Sequence[Sequence[Any]]) -> Table:
    return tuple(sorted((float(argument), float(value)) for argument, value in rows))
