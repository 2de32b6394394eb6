"""How long each phase of a step takes on a machine. Pure Python: no torch.

    factor step     statistics in the backward pass ─► exchange, hidden behind what is left of it ─► average at owners
    inverse step    owners decompose, all wait for the slowest ─► exchange down the columns
    every step      solve ─► exchange along the rows, a bucket while the next is solved ─► scale, write

A phase in which ranks wait for each other takes as long as on its slowest rank. Work of t_w and messages of t_c in b
buckets take max(t_w + t_c / b, t_c + t_w / b) where the machine can hide one behind the other, else t_w + t_c.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from kaisa.kfac.account import DECOMPOSITIONS, GRADIENTS, STATISTICS, STATUS, Account
from kaisa.kfac.footprint import Received, bytes_sent, calls
from kaisa.kfac.hardware import Hardware
from kaisa.kfac.placement import FactorShape, LayerShape
from kaisa.kfac.shares import busiest_node, by_owner, fewest_companions, over_ranks, row_length
from kaisa.kfac.workload import SOLVERS, LayerWork, Settings, Workload, statistics_operations

_BACKWARD = 2 / 3  # of the work of a step without K-FAC
_BUCKET = 25 * 2**20  # bytes of a message of gradients that DistributedDataParallel sends
_AVERAGING, _WAITING, _PACKING, _SCALING, _ELEMENTWISE = 6, 5, 3, 12, 4  # how often each number is read or written


@dataclass(frozen=True)
class Phases:
    """The seconds of a step under a placement.

    Attributes:
        workload: the model.
        hardware: the machine.
        settings: how K-FAC was told to work.
        account: what the placement sends and holds.
        received: what the exchanges bring.
        is_deferred: whether statistics wait until decompositions are due.
    """

    workload: Workload
    hardware: Hardware
    settings: Settings
    account: Account
    received: Received
    is_deferred: bool

    @cached_property
    def parts(self) -> Mapping[str, float]:
        """Everything that is done, before anything is hidden behind something else."""
        return {
            "compute": self._compute(),
            "mean": self._total(self.settings.decomposition_bytes * self.workload.parameters, _BUCKET),
            "statistics": self._crowded(self._statistics()),
            "wait": self._crowded(self._moved(_WAITING * self._sums)) if self.is_deferred else 0.0,
            "reduce": self._exchange(STATISTICS, range(self._world)),
            "average": self._crowded(self._average()),
            "status": self._total(bytes_sent(self.account, STATUS, 0)) * bool(calls(self.account, STATUS)),
            "decompose": self._decompose(),
            "share": self._exchange(DECOMPOSITIONS, self.account.placement.columns[0]),
            "solve": self._solve(),
            "spread": self._exchange(GRADIENTS, self.account.placement.row(0)),
            "update": self._crowded(self._update()),
        }

    @cached_property
    def seconds(self) -> Mapping[str, float]:
        """Each phase when it runs; of factors that wait for the next decompositions, the mean."""
        parts = self.parts
        gathering = self._gathering()
        often = min(1.0, self.settings.factor_update_steps / self.settings.inv_update_steps)
        buckets = calls(self.account, GRADIENTS)
        return {
            "model": self._hidden_in_backward(parts["mean"]) if self._world > 1 else parts["compute"],
            "statistics": parts["statistics"],
            "factors": parts["wait"] + gathering * (often if self.is_deferred else 1.0),
            "inverses": parts["status"] + parts["decompose"] + parts["share"],
            "precondition": self._hidden(parts["solve"], parts["spread"], buckets) + parts["update"],
        }

    def steps(self) -> tuple[float, float, float, float]:
        """Returns the seconds of a plain, a factor, an inverse and the average step."""
        seconds, settings = self.seconds, self.settings
        plain = seconds["model"] + seconds["precondition"]
        gathering = self._gathering()
        factor = plain + seconds["statistics"] + (self.parts["wait"] if self.is_deferred else gathering)
        share = 1 / settings.inv_update_steps if settings.spread else 1.0
        inverse = factor + share * seconds["inverses"] + gathering * self.is_deferred
        updates = (seconds["statistics"] + seconds["factors"]) / settings.factor_update_steps
        return plain, factor, inverse, plain + updates + seconds["inverses"] / settings.inv_update_steps

    # ---------------------------------------------------------------------------------------------------- computing

    @property
    def _world(self) -> int:
        return self.account.placement.world_size

    @cached_property
    def _sums(self) -> float:
        """Bytes of one rank's sums of all layers."""
        shapes = self.workload.shapes
        return self.settings.factor_bytes * sum(s.uses * (s.a.elements + s.g.elements) for s in shapes)

    def _crowded(self, seconds: float) -> float:
        return seconds * self.hardware.crowding(min(self._world, self.hardware.ranks_per_node))

    def _moved(self, size: float) -> float:
        return size / self.hardware.memory_bandwidth

    def _overhead(self, phase: str, layers: float) -> float:
        return self.hardware.overheads.get(phase, 0.0) * layers

    def _compute(self) -> float:
        """Forward and backward passes of all micro-batches."""
        if self.workload.plain_seconds is not None:
            return self._crowded(self.workload.plain_seconds)
        operations = 3 * self.workload.forward_flops * self.settings.accumulation_steps
        return self._crowded(operations / (self.hardware.training * self.hardware.best_rate))

    def _statistics(self) -> float:
        each = Counter(replace(layer, shape=_nameless(layer.shape)) for layer in self.workload.layers)
        once = sum(count * self._statistics_of(layer) for layer, count in each.items())
        return once * self.settings.accumulation_steps * self.settings.factor_examples

    def _statistics_of(self, layer: LayerWork) -> float:
        shape, rows = layer.shape, max(1, layer.rows)
        width = shape.a.blocks * (shape.a.size + shape.g.size) if layer.kind != "norm" else 2 * shape.gradient[0]
        moving = self._moved(self.settings.factor_bytes * _ELEMENTWISE * rows * width)
        operations = statistics_operations(layer)
        side = (operations / 4) ** (1 / 3)
        computing = 0.0 if layer.kind == "norm" else operations / self.hardware.rate(side)
        return computing + moving + self._overhead("statistics", 1)

    def _average(self) -> float:
        """Packing what is sent, adding up what comes, and the running average of the owner, on the busiest rank."""
        placement, bytes_each = self.account.placement, self.settings.factor_bytes
        own = by_owner(placement, self.workload.shapes, lambda factor: bytes_each * factor.elements)
        came = self.received[STATISTICS]
        added = max(_AVERAGING * mine + received for mine, received in zip(own, came, strict=True))
        packed = _PACKING * self._sums if self._world > 1 else 0
        return self._moved(added + packed) + self._overhead("factors", len(self.workload.layers))

    def _decompose(self) -> float:
        """The makespan: until the last rank has decomposed what it owns."""
        table = SOLVERS[self.settings.solver].table

        def seconds(factor: FactorShape) -> float:
            if factor.is_diagonal:
                return 0.0
            return self.hardware.decomposition_seconds(table, factor.size, factor.blocks)

        loads = by_owner(self.account.placement, self.workload.shapes, seconds)
        return self._slowest(loads) + self._overhead("inverses", len(self.workload.layers))

    def _slowest(self, loads: Sequence[float]) -> float:
        """The rank with most to do, longer where others of its node compute at the same time."""
        slowest = max(loads)
        busy = busiest_node(loads, self.hardware.ranks_per_node) / slowest if slowest else 1.0
        return slowest * self.hardware.crowding(max(1.0, busy))

    def _solve(self) -> float:
        """The column with most to do, layers of equal shape at once."""
        placement = self.account.placement
        alike = Counter((placement[shape.name].gradient_workers[0], _nameless(shape)) for shape in self.workload.shapes)
        columns = [0.0] * row_length(placement)
        for (column, shape), count in alike.items():
            columns[column] += self._solve_of(shape, count)
        return self._slowest(over_ranks(placement, columns))

    def _solve_of(self, shape: LayerShape, layers: int) -> float:
        blocks, out, size = shape.gradient
        count = blocks * layers
        products = SOLVERS[self.settings.solver].products
        seconds = 0.0
        for factor, inner in ((shape.g, out), (shape.a, size)):
            if not factor.is_diagonal:
                side = (inner * out * size) ** (1 / 3)
                operations = 2.0 * products * count * inner * out * size
                seconds += operations / self.hardware.rate(side, batched=count > 1)
        moving = self.settings.decomposition_bytes * _ELEMENTWISE * layers * shape.gradient_elements
        return seconds + self._moved(moving)

    def _update(self) -> float:
        """Stacking, the trust region and writing of all layers, on every rank."""
        numbers = sum(shape.gradient_elements for shape in self.workload.shapes)
        moving = self._moved(_SCALING * self.settings.decomposition_bytes * numbers)
        return moving + self._overhead("precondition", len(self.workload.layers))

    # ------------------------------------------------------------------------------------------------ communicating

    def _exchange(self, kind: str, group: Sequence[int]) -> float:
        """An exchange of one group while all others have theirs; nodes take the share of a rank far from the others."""
        count = calls(self.account, kind)
        if len(group) == 1 or not count:
            return 0.0
        hardware = self.hardware
        sent = [bytes_sent(self.account, kind, rank) for rank in range(self._world)]
        moved = (sent, self.received[kind])
        most = max(max(loads) for loads in moved)
        together = max(busiest_node(loads, hardware.ranks_per_node) for loads in moved)
        near = fewest_companions(group, hardware.ranks_per_node)
        away = (len(group) - near) / (len(group) - 1)
        inside = hardware.exchange_inside.seconds(most * (1 - away), together * (1 - away), near - 1, count)
        between = hardware.exchange_between.seconds(most * away, together * away, len(group) - near, count)
        return max(inside, between) if away else inside

    def _total(self, size: float, bucket: float | None = None) -> float:
        """A sum over all ranks: as many bytes as a ring sends, in no more turns than a tree has."""
        if self._world == 1 or not size:
            return 0.0
        is_inside = self._world <= self.hardware.ranks_per_node
        link = self.hardware.total_inside if is_inside else self.hardware.total_between
        moved = 2 * (self._world - 1) / self._world * size
        together = moved * self._world if is_inside else moved  # a ring passes between two nodes once
        count = 1 if bucket is None else max(1, round(size / bucket))
        turns = min(self._world - 1, 2 * (self._world - 1).bit_length())
        return link.seconds(moved, together, turns, count)

    def _gathering(self) -> float:
        """Statistics on their way, as far as the backward pass does not hide them, and the owner's average."""
        parts = self.parts
        if self._world == 1:
            return parts["average"]
        messages = parts["mean"] + parts["reduce"]
        buckets = calls(self.account, STATISTICS)
        exposed = self._hidden_in_backward(messages, buckets) - self._hidden_in_backward(parts["mean"])
        return max(0.0, exposed) + parts["average"]

    def _hidden_in_backward(self, messages: float, buckets: int = 0) -> float:
        """The model's own work with messages that leave while the backward pass goes on."""
        work = self.parts["compute"]
        size = self.settings.decomposition_bytes * self.workload.parameters
        pieces = max(1, round(size / _BUCKET)) + buckets
        return (1 - _BACKWARD) * work + self._hidden(_BACKWARD * work, messages, pieces)

    def _hidden(self, work: float, messages: float, buckets: int) -> float:
        if not messages:
            return work
        at_best = max(work + messages / max(1, buckets), messages + work / max(1, buckets))
        return self.hardware.overlap * at_best + (1 - self.hardware.overlap) * (work + messages)


def _nameless(shape: LayerShape) -> LayerShape:
    return replace(shape, name="")
