"""What travels, and where to: three exchanges, each one message a pair of ranks however many layers there are.

    statistics        every rank ─► the owner of each factor, who adds them up        (factor steps, packed triangles)
    decompositions    owner ─► the gradient workers of the layer's column             (inverse steps)
    gradients         gradient worker ─► the receivers along its row                  (every step)

Sizes follow from the placement alone, so that no rank has to ask another what comes. In a world of one nothing moves.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import reduce
from hashlib import sha256

import torch
from torch import Tensor

from kaisa.errors import ConfigurationError, DecompositionError
from kaisa.kfac import linalg, solvers
from kaisa.kfac.collectives import Collectives, Wait
from kaisa.kfac.decompositions import Key
from kaisa.kfac.factors import Factors, Pair, Statistics
from kaisa.kfac.payload import Payload, decode, encode, encoded_length
from kaisa.kfac.placement import FactorShape, LayerShape, Placement
from kaisa.kfac.solvers import Decomposition, Solver

A, G = 0, 1


@dataclass(frozen=True)
class Counts:
    """How much all ranks have summed of a layer.

    Attributes:
        positions, examples: as in ``Statistics``.
        is_finite: whether every rank's sums are, and any rank has some; None where nobody has looked.
    """

    positions: float | Tensor
    examples: float | Tensor
    is_finite: Tensor | None


class Transport:
    """Moves statistics, decompositions and gradients between the ranks of a placement.

    Args:
        collectives: how to reach the others.
        placement: who does what.
        shapes: of all layers, in an order that all ranks share.
        solver: knows the shapes of decompositions.
        payload: in which types numbers travel.
        summed_in: the type of each layer's statistics, in which they are added up.
        held_in: the type of each layer's decompositions.
        device: where messages are made.
    """

    def __init__(
        self,
        collectives: Collectives,
        placement: Placement,
        shapes: Sequence[LayerShape],
        solver: Solver,
        payload: Payload,
        summed_in: Mapping[str, torch.dtype],
        held_in: Mapping[str, torch.dtype],
        device: torch.device,
    ) -> None:
        self.collectives = collectives
        self.placement = placement
        self.shapes = {shape.name: shape for shape in shapes}
        self.solver = solver
        self.payload = payload
        self.summed_in = summed_in
        self.held_in = held_in
        # One message holds all layers: its type holds those of all of them.
        self.sums_like = torch.empty(0, dtype=_widest(summed_in.values()), device=device)
        self.like = torch.empty(0, dtype=_widest(held_in.values()), device=device)
        self.is_alone = collectives.world_size == 1
        self.rank = collectives.rank
        self.world = tuple(range(collectives.world_size))
        self._messages = 0
        self._sent: list[tuple[dict[str, Statistics], Wait]] = []
        self._late: dict[str, Statistics] = {}
        self.buckets = list(_buckets(shapes, payload.bucket_bytes))

    def agree(self, facts: Mapping[str, str]) -> None:
        """Makes sure that all ranks were built alike.

        Args:
            facts: what must be equal everywhere, by name.

        Raises:
            ConfigurationError: on every rank, with the facts that differ and where.
        """
        if self.is_alone:
            return
        digests = [int.from_bytes(sha256(text.encode()).digest()[:7], "big") for text in facts.values()]
        own = torch.tensor(digests, dtype=torch.int64, device=self.like.device)
        everybody = torch.stack(
            self.collectives.exchange("digest", self.world, [own] * len(self.world), [len(facts)] * len(self.world))()
        )
        table = everybody.cpu().numpy()
        differing = {
            fact: [rank for rank in self.world if table[rank, index] != table[0, index]]
            for index, fact in enumerate(facts)
        }
        found = [f"{fact} (ranks {ranks} differ from rank 0)" for fact, ranks in differing.items() if ranks]
        if found:
            raise ConfigurationError(f"the ranks were built differently: {', '.join(found)}")

    def owns(self, name: str, side: int) -> bool:
        """Says whether this rank averages and decomposes a factor."""
        return self.rank in self._owners(name, side)

    def is_gradient_worker(self, name: str) -> bool:
        """Says whether this rank holds a layer's decompositions and preconditions it."""
        return self.rank in self.placement[name].gradient_workers

    def _owners(self, name: str, side: int) -> tuple[int, ...]:
        assignment = self.placement[name]
        return assignment.g_owners if side else assignment.a_owners

    def _factor(self, name: str, side: int) -> FactorShape:
        return self.shapes[name].g if side else self.shapes[name].a

    # -------------------------------------------------------------------------------------------------- statistics

    def reduce(self, local: Mapping[str, Statistics]) -> tuple[dict[str, Statistics], dict[str, "Counts"]]:
        """Adds up statistics over ranks, each factor's at its owners.

        Args:
            local: this rank's sums; a layer that it has not used counts as zeros.

        Returns:
            The sums of the layers of which this rank owns a side, an empty tensor for a side that it does not own; and
            of all layers how much was summed.
        """
        if self.is_alone:
            return dict(local), {name: Counts(sums.positions, sums.examples, None) for name, sums in local.items()}
        gone = {name for bucket in self.buckets[: len(self._sent)] for name in bucket}
        for bucket in self.buckets[len(self._sent) :]:
            self._send(bucket, local)
        self._late = {name: sums for name, sums in local.items() if name in gone}
        sent, self._sent = self._sent, []
        local = {name: sums for part, _ in sent for name, sums in part.items()}
        counts = self._count(local)
        sides: dict[Key, Tensor] = {}
        for bucket, (_, wait) in zip(self.buckets, sent, strict=True):
            sides.update(self._added(bucket, wait()))
        nowhere = self.like.new_empty(0)
        return {
            name: Statistics(
                sides.get((name, A), nowhere),
                sides.get((name, G), nowhere),
                counts[name].positions,
                counts[name].examples,
                local[name].area if name in local else 1,
                local[name].scale if name in local else 1.0,
            )
            for name in self.shapes
            if (name, A) in sides or (name, G) in sides
        }, counts

    def is_nobody_heard(self, counts: Mapping[str, Counts]) -> bool:
        """Says whether no rank has summed anything; makes the host wait, for a rank that has nothing else to do."""
        total = torch.stack([torch.as_tensor(count.examples) for count in counts.values()]).sum()
        return not total.cpu().numpy()

    def send_next(
        self, is_complete: Callable[[str], bool], take: Callable[[Sequence[str]], dict[str, Statistics]]
    ) -> None:
        """Sends the buckets that are complete, in their order and while the backward pass goes on.

        When is each rank's own affair: all ranks send all buckets in one order, the last of them in ``reduce``. What
        a layer sums after its bucket has gone, because it is used more often than before, goes with the next.

        Args:
            is_complete: says whether the sums of a layer will not grow any more in this step.
            take: hands over the sums of some layers.
        """
        while len(self._sent) < len(self.buckets) and all(map(is_complete, self.buckets[len(self._sent)])):
            bucket = self.buckets[len(self._sent)]
            self._send(bucket, take(bucket))

    def _count(self, local: Mapping[str, Statistics]) -> dict[str, "Counts"]:
        host = torch.zeros(3, len(self.shapes), dtype=torch.float64)
        for index, name in enumerate(self.shapes):
            if name in local:
                host[0, index], host[1, index] = float(local[name].positions), float(local[name].examples)
        table = host.to(self.like.device)
        for index, name in enumerate(self.shapes):
            if name in local:
                table[2, index] = ~torch.isfinite(self._sum_sent(local[name].a) + self._sum_sent(local[name].g))
        total = self.collectives.total("counts", self.world, table)
        return {
            name: Counts(total[0, index], total[1, index], (total[2, index] == 0) & (total[1, index] > 0))
            for index, name in enumerate(self.shapes)
        }

    def _sum_sent(self, sums: Tensor) -> Tensor:
        """Returns the sum of what the others will see, which a payload of a short range may make infinite."""
        form = self.payload.statistics
        return sums.to(form).sum(dtype=sums.dtype) if isinstance(form, torch.dtype) else sums.sum()

    def _send(self, bucket: Sequence[str], local: Mapping[str, Statistics]) -> None:
        local = self._with_late(bucket, local)
        form, self._messages = self.payload.statistics, self._messages + 1
        chunks = [
            encode(
                [self._packed(local, key) for key in self._owned_by(rank, bucket)],
                form,
                self.sums_like,
                seed=self._seed(self.rank, rank),
            )
            for rank in self.world
        ]
        size = encoded_length(self._sizes(bucket), form)
        wait = self.collectives.exchange("statistics", self.world, chunks, [size] * len(self.world))
        self._sent.append(({name: local[name] for name in bucket if name in local}, wait))

    def _with_late(self, bucket: Sequence[str], local: Mapping[str, Statistics]) -> dict[str, Statistics]:
        """Returns the sums of a bucket's layers and what came too late for the last factor step."""
        result = {name: local[name] for name in bucket if name in local}
        for name in bucket:
            late = self._late.pop(name, None)
            if late is not None:
                if name in result:
                    late.add_(result[name])
                result[name] = late
        return result

    def _added(self, bucket: Sequence[str], received: Sequence[Tensor]) -> dict[Key, Tensor]:
        """Returns the sums over ranks of the factors that this rank owns, as full matrices."""
        sizes, form = self._sizes(bucket), self.payload.statistics
        total = torch.stack([decode(chunk, sizes, form, self.sums_like.dtype) for chunk in received]).sum(0)
        keys = self._owned_by(self.rank, bucket)
        parts = total.split([self._packed_size(key) for key in keys])
        return {
            key: self._unpacked(part.to(self.summed_in[key[0]]), key) for key, part in zip(keys, parts, strict=True)
        }

    def _owned_by(self, rank: int, bucket: Sequence[str]) -> list[Key]:
        return [(name, side) for name in bucket for side in (A, G) if rank in self._owners(name, side)]

    def _sizes(self, bucket: Sequence[str]) -> list[int]:
        return [self._packed_size(key) for key in self._owned_by(self.rank, bucket)]

    def _seed(self, sender: int, receiver: int) -> int:
        """Returns what rounding at random starts from: another for every message."""
        return (self._messages * len(self.world) + sender) * len(self.world) + receiver

    def _packed_size(self, key: Key) -> int:
        return self.shapes[key[0]].uses * self._factor(*key).packed_elements

    def _packed(self, local: Mapping[str, Statistics], key: Key) -> Tensor:
        if key[0] not in local:
            return self.sums_like.new_zeros(self._packed_size(key))
        sums = local[key[0]].g if key[1] else local[key[0]].a
        return (sums if self._factor(*key).is_diagonal else linalg.pack(sums)).flatten()

    def _unpacked(self, part: Tensor, key: Key) -> Tensor:
        shape, factor = self.shapes[key[0]], self._factor(*key)
        leading = ((shape.uses,) if shape.uses > 1 else ()) + ((factor.blocks,) if shape.has_blocks else ())
        if factor.is_diagonal:
            return part.reshape(*leading, factor.size)
        return linalg.unpack(part.reshape(*leading, -1), factor.size)

    def total_moments(self, local: Mapping[str, Tensor], ready: AbstractSet[str]) -> dict[str, Tensor]:
        """Adds up squares in the eigenbasis of single examples' gradients over ranks, which all hold the same bases.

        Args:
            local: this rank's sums; a layer that it has not used counts as zeros, one that no rank has as not a number.
            ready: the layers that have a basis, on all ranks the same.
        """
        if self.is_alone or not isinstance(self.solver, solvers.EKFAC) or not self.solver.per_example:
            return dict(local)
        names = [name for name in self.shapes if name in ready]
        if not names:
            return {}
        zeros = {name: self.like.new_zeros(self._matrix_shape(name)) for name in names if name not in local}
        seen = self.like.new_tensor([float(name in local) for name in names])
        row = [local[name] if name in local else zeros[name] for name in names]
        message = _joined([part.flatten() for part in (*row, seen)], self.like)
        total = self.collectives.total("moments", self.world, message)
        *sums, seen = total.split([*(part.numel() for part in row), len(names)])
        return {
            name: torch.where(count > 0, part, torch.nan).reshape(self._matrix_shape(name)).to(self.held_in[name])
            for name, part, count in zip(names, sums, seen, strict=True)
        }

    def _matrix_shape(self, name: str) -> tuple[int, ...]:
        shape = self.shapes[name]
        return shape.gradient if shape.has_blocks else shape.gradient[1:]

    # ---------------------------------------------------------------------------------------------- decompositions

    def known(
        self, names: Sequence[str], factors: Factors, ready: AbstractSet[str]
    ) -> tuple[dict[str, tuple[Tensor, Tensor]], list[str]]:
        """Tells every rank the mean eigenvalues of all factors, and of which layers there is a factor to decompose."""
        if self.is_alone:
            begun = [name for name in names if name in ready or factors.has_begun(name)]
            return {name: self._means(name, factors[name]) for name in begun}, begun
        blocks = {name: self.shapes[name].gradient[0] for name in names}
        row = [part for name in names for part in self._row(name, blocks[name], factors)]
        total = self.collectives.total("status", self.world, _joined(row, self.like.double()))
        parts = iter(total.split([size for name in names for size in (blocks[name], blocks[name], 1)]))
        means, weights = {}, []
        for name in names:
            pair = (next(parts).to(self.summed_in[name]), next(parts).to(self.summed_in[name]))
            means[name] = pair if self.shapes[name].has_blocks else (pair[0][0], pair[1][0])
            weights.append(next(parts))
        # Decompositions make the host wait in any case; here it learns once for all layers.
        seen = (torch.cat(weights) > 0).cpu().numpy()
        return means, [name for name, is_seen in zip(names, seen, strict=True) if is_seen]

    def _row(self, name: str, blocks: int, factors: Factors) -> list[Tensor]:
        zeros = self.like.new_zeros(blocks, dtype=torch.float64)
        if name not in factors:
            return [zeros, zeros, zeros[:1]]
        is_first = [self._owners(name, side)[0] == self.rank for side in (A, G)]
        means = [
            solvers.mean_eigenvalue(factors[name].side(side), self._factor(name, side).is_diagonal).reshape(-1)
            if is_first[side]
            else zeros
            for side in (A, G)
        ]
        return [*means, factors.weight(name).reshape(1) if is_first[A] else zeros[:1]]

    def _means(self, name: str, pair: Pair) -> tuple[Tensor, Tensor]:
        return (
            solvers.mean_eigenvalue(pair.a, self.shapes[name].a.is_diagonal),
            solvers.mean_eigenvalue(pair.g, self.shapes[name].g.is_diagonal),
        )

    def agree_on_failures(
        self,
        names: Sequence[str],
        errors: Mapping[str, DecompositionError],
        exhausted: Sequence[str],
        ready: AbstractSet[str],
    ) -> set[str]:
        """Tells every rank which layers could not be decomposed and have no earlier decomposition either.

        Raises:
            DecompositionError: on every rank, when the patience with a layer is at its end on one.
        """
        if self.is_alone:
            failed, ended = set(errors), list(exhausted)
        else:
            flags = [[float(name in errors), float(name in exhausted)] for name in names]
            host = torch.tensor(flags, dtype=torch.float64).reshape(-1, 2)
            table = self.collectives.total("status", self.world, host.to(self.like.device)).cpu().numpy()
            failed = {name for name, row in zip(names, table, strict=True) if row[0]}
            ended = [name for name, row in zip(names, table, strict=True) if row[1]]
        if ended:
            name = ended[0]
            reason = errors.get(name) or "on another rank"
            raise DecompositionError(
                f"layer {name!r}: too many decompositions in a row failed ({reason}); "
                "raise the damping, or look at its factors in kfac.factors"
            ) from errors.get(name)
        return {name for name in failed if name not in ready}

    def share(
        self, names: Sequence[str], computed: Mapping[Key, Decomposition]
    ) -> dict[str, tuple[Decomposition, Decomposition]]:
        """Gives the decompositions of this rank's column to all its gradient workers.

        Args:
            names: the layers that are refreshed; all ranks name the same.
            computed: those that this rank has made.
        """
        own = [name for name in names if self.is_gradient_worker(name)]
        if not own:
            return {}
        column = self.placement[own[0]].gradient_workers
        sent_by = {rank: self._sent_by(rank, own) for rank in column}
        everything = dict(computed)
        if len(column) > 1 and any(sent_by.values()):
            message = _joined([part.flatten() for key in sent_by[self.rank] for part in computed[key]], self.like)
            nothing = self.like.new_empty(0)
            sizes = [sum(map(self._decomposition_size, sent_by[rank])) * (rank != self.rank) for rank in column]
            chunks = [nothing if rank == self.rank else message for rank in column]
            received = self.collectives.exchange("decompositions", column, chunks, sizes)()
            for rank, chunk in zip(column, received, strict=True):
                if rank != self.rank:
                    everything.update(self._decompositions(sent_by[rank], chunk))
        return {name: (everything[name, A], everything[name, G]) for name in own}

    def _sent_by(self, rank: int, names: Sequence[str]) -> list[Key]:
        """What one owner has and the others of the column lack; a factor that all own is sent by nobody."""
        return [(name, side) for name in names for side in (A, G) if self._owners(name, side) == (rank,)]

    def _decomposition_shapes(self, key: Key) -> tuple[torch.Size, ...]:
        shape, factor = self.shapes[key[0]], self._factor(*key)
        leading = (factor.blocks,) if shape.has_blocks else ()
        sides = (factor.size,) if factor.is_diagonal else (factor.size, factor.size)
        return self.solver.layout(torch.Size((*leading, *sides)), factor.is_diagonal)

    def _decomposition_size(self, key: Key) -> int:
        return sum(shape.numel() for shape in self._decomposition_shapes(key))

    def _decompositions(self, keys: Sequence[Key], chunk: Tensor) -> Iterator[tuple[Key, Decomposition]]:
        shapes = [(key, shape) for key in keys for shape in self._decomposition_shapes(key)]
        parts = iter(chunk.split([shape.numel() for _, shape in shapes]))
        for key in keys:
            held = self.held_in[key[0]]
            yield key, tuple(next(parts).to(held).reshape(shape) for shape in self._decomposition_shapes(key))

    # --------------------------------------------------------------------------------------------------- gradients

    def spread(self, names: Sequence[str], solved: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gives every rank the preconditioned gradients of all layers, along its row.

        Args:
            names: the layers that are preconditioned in this step; all ranks name the same.
            solved: those that this rank has preconditioned.
        """
        row = self.placement.row(self.rank)
        if len(row) == 1:
            return dict(solved)
        by_sender: dict[int, list[str]] = {rank: [] for rank in row}
        for name in names:
            by_sender[self.placement.sender(name, self.rank)].append(name)
        form, self._messages = self.payload.gradients, self._messages + 1
        # The gradient workers of a layer stand in the same place of their rows and must round alike.
        seed = self._seed(row.index(self.rank), 0)
        message = encode([solved[name].flatten() for name in by_sender[self.rank]], form, self.like, seed)
        numbers = {rank: [self.shapes[name].gradient_elements for name in by_sender[rank]] for rank in row}
        sizes = [encoded_length(numbers[rank], form) for rank in row]
        received = self.collectives.exchange("gradients", row, [message] * len(row), sizes)()
        result: dict[str, Tensor] = {}
        for rank, chunk in zip(row, received, strict=True):
            everything = decode(chunk, numbers[rank], form, self.like.dtype)
            parts = everything.split(numbers[rank])
            for name, part in zip(by_sender[rank], parts, strict=True):
                result[name] = part.reshape(self._matrix_shape(name)).to(self.held_in[name])
        return result


def groups_of(placement: Placement) -> set[tuple[int, ...]]:
    """Returns all sets of ranks that communicate under a placement."""
    return {tuple(range(placement.world_size)), *placement.rows, *placement.columns}


def _widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    return reduce(torch.promote_types, dtypes)


def _joined(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.cat([part.to(like.dtype) for part in parts]) if parts else like.new_empty(0)


def _buckets(shapes: Sequence[LayerShape], most: int) -> Iterator[tuple[str, ...]]:
    """Groups layers, the last first as the backward pass reaches them, into messages of about ``most`` bytes."""
    bucket: list[str] = []
    size = 0
    for shape in reversed(shapes):
        bucket.append(shape.name)
        size += 4 * shape.uses * (shape.a.packed_elements + shape.g.packed_elements)
        if size >= most:
            yield tuple(bucket)
            bucket, size = [], 0
    if bucket:
        yield tuple(bucket)
