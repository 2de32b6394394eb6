"""What travels, and where to: three exchanges, few messages a pair of ranks however many layers there are.

    statistics        every rank ─► the owner of each factor, who adds them up        (factor steps; ``reduction``)
    decompositions    owner ─► the gradient workers of the layer's column             (inverse steps)
    gradients         gradient worker ─► the receivers along its row                  (every step)

Sizes follow from the placement alone, so that no rank has to ask another what comes. In a world of one nothing moves.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from functools import reduce
from hashlib import sha256

import torch
from torch import Tensor

from kaisa.errors import ConfigurationError, DecompositionError
from kaisa.kfac import solvers
from kaisa.kfac.collectives import Collectives
from kaisa.kfac.factors import Factors, Pair
from kaisa.kfac.payload import Payload, decode, encode, encoded_length
from kaisa.kfac.placement import LayerShape, Placement
from kaisa.kfac.reduction import Reduction
from kaisa.kfac.routes import A, G, Key, Routes, is_worth_slicing
from kaisa.kfac.solvers import Decomposition, Solver


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
        self.routes = Routes(placement, tuple(shapes), payload.bucket_bytes)
        self.shapes = self.routes.shapes
        self.solver = solver
        self.payload = payload
        self.summed_in = summed_in
        self.held_in = held_in
        # One message holds all layers: its type holds those of all of them.
        sums_like = torch.empty(0, dtype=_widest(summed_in.values()), device=device)
        self.reduction = Reduction(collectives, self.routes, payload, summed_in, sums_like)
        self.like = torch.empty(0, dtype=_widest(held_in.values()), device=device)
        self.is_alone = collectives.world_size == 1
        self.rank = collectives.rank
        self.world = tuple(range(collectives.world_size))
        self._messages = 0
        self._own_error: DecompositionError | None = None

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

    def everybody(self, numbers: Sequence[float]) -> list[list[float]]:
        """Returns the numbers of all ranks, each of whom gives equally many; makes the host wait."""
        own = torch.tensor(numbers, dtype=torch.float64, device=self.like.device)
        if self.is_alone:
            return [list(numbers)]
        rows = self.collectives.exchange(
            "plan", self.world, [own] * len(self.world), [len(numbers)] * len(self.world)
        )()
        return [[float(number) for number in row.cpu().numpy()] for row in rows]

    def go_on_from(self, old: "Transport") -> None:
        """Takes over what must not begin anew when the placement changes."""
        self._messages, self._own_error = old._messages, old._own_error
        self.reduction.note, self.reduction.noted = old.reduction.note, old.reduction.noted

    def owns(self, name: str, side: int) -> bool:
        """Says whether this rank averages and decomposes a factor."""
        return self.rank in self.routes.owners((name, side))

    def is_gradient_worker(self, name: str) -> bool:
        """Says whether this rank holds a layer's decompositions and preconditions it."""
        return self.rank in self.placement[name].gradient_workers

    # -------------------------------------------------------------------------------------------- corrected moments

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
        """Returns the mean eigenvalues of factors, and of which layers there is a factor to decompose.

        Only solvers that damp the factors one by one need mean eigenvalues, which then are told to every rank.
        """
        begun = [name for name in names if name in ready]
        if len(begun) < len(names):
            # Decompositions make the host wait in any case; here it learns once for all layers.
            begun = [name for name, is_seen in zip(names, self._seen(names, factors), strict=True) if is_seen]
        if not self.solver.damps_factors:
            none = self.like.new_zeros(())
            return dict.fromkeys(begun, (none, none)), begun
        if self.is_alone:
            return {name: self._means(name, factors[name]) for name in begun}, begun
        return self._means_of_all(begun, factors), begun

    def begun(self, names: Iterable[str], factors: Factors) -> list[str]:
        """Returns the layers that have a factor on the ranks that own it; makes the host wait."""
        names = list(names)
        return [name for name, is_seen in zip(names, self._seen(names, factors), strict=True) if is_seen]

    def restore_begun(self, names: Iterable[str]) -> None:
        """Goes on from what ``begun`` returned."""
        begun = set(names)
        for name, heard in self.reduction.heard.items():
            heard.fill_(name in begun)

    def _seen(self, names: Sequence[str], factors: Factors) -> Sequence[bool]:
        if self.is_alone:
            return [factors.has_begun(name) for name in names]
        return list(torch.stack([self.reduction.heard[name] for name in names]).cpu().numpy())

    def _means_of_all(self, names: Sequence[str], factors: Factors) -> dict[str, tuple[Tensor, Tensor]]:
        blocks = {name: self.shapes[name].gradient[0] for name in names}
        row = [part for name in names for part in self._row(name, blocks[name], factors)]
        total = self.collectives.total("status", self.world, _joined(row, self.like.double()))
        parts = iter(total.split([size for name in names for size in (blocks[name], blocks[name])]))
        means = {}
        for name in names:
            pair = tuple(next(parts).to(self.reduction.summed_in[name]) for _ in (A, G))
            means[name] = (pair[0], pair[1]) if self.shapes[name].has_blocks else (pair[0][0], pair[1][0])
        return means

    def _row(self, name: str, blocks: int, factors: Factors) -> list[Tensor]:
        zeros = self.like.new_zeros(blocks, dtype=torch.float64)
        return [
            solvers.mean_eigenvalue(factors[name].side(side), self.routes.factor((name, side)).is_diagonal).reshape(-1)
            if self.routes.owners((name, side))[0] == self.rank
            else zeros
            for side in (A, G)
        ]

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
        """Returns the layers that could not be decomposed and have no earlier decomposition either, on all ranks alike.

        When all layers have one nobody has to wait for the others: that patience is at its end goes as a note with the
        next statistics, and ``raise_noted`` makes it an error on every rank.

        Raises:
            DecompositionError: on every rank, when the patience with a layer is at its end on one.
        """
        if self.is_alone:
            failed, ended = set(errors), list(exhausted)
        elif all(name in ready for name in names):
            if exhausted:
                self.reduction.note = 1 + list(self.shapes).index(exhausted[0])
                self._own_error = errors[exhausted[0]]
            return set()
        else:
            flags = [[float(name in errors), float(name in exhausted)] for name in names]
            host = torch.tensor(flags, dtype=torch.float64).reshape(-1, 2)
            table = self.collectives.total("status", self.world, host.to(self.like.device)).cpu().numpy()
            failed = {name for name, row in zip(names, table, strict=True) if row[0]}
            ended = [name for name, row in zip(names, table, strict=True) if row[1]]
        if ended:
            raise _exhausted(ended[0], errors.get(ended[0]))
        return {name for name in failed if name not in ready}

    def raise_noted(self) -> None:
        """Raises what a rank has noted with its statistics; all ranks call it before they decompose.

        Raises:
            DecompositionError: the patience with a layer came to its end on one of the ranks.
        """
        noted = 0 if self.is_alone else int(self.reduction.noted.cpu().numpy())
        if noted:
            raise _exhausted(list(self.shapes)[noted - 1], self._own_error)

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
        sent_by = {rank: self.routes.sent_by(rank, own) for rank in column}
        everything = dict(computed)
        if len(column) > 1 and any(sent_by.values()):
            message = _joined([part.flatten() for key in sent_by[self.rank] for part in computed[key]], self.like)
            sizes = [sum(map(self._decomposition_size, sent_by[rank])) for rank in column]
            gather = self.collectives.gather
            received = gather("decompositions", column, message, sizes, sliced=is_worth_slicing(sizes))()
            for rank, chunk in zip(column, received, strict=True):
                if rank != self.rank:
                    everything.update(self._decompositions(sent_by[rank], chunk))
        return {name: (everything[name, A], everything[name, G]) for name in own}

    def _decomposition_shapes(self, key: Key) -> tuple[torch.Size, ...]:
        shape, factor = self.shapes[key[0]], self.routes.factor(key)
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

    def spread(self, names: Sequence[str], solved: Mapping[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
        """Gives every rank the preconditioned gradients of some layers, along its row.

        Args:
            names: the layers; all ranks name the same.
            solved: those that this rank has preconditioned.

        Returns:
            What waits for them all; other work can go on meanwhile.
        """
        row = self.placement.row(self.rank)
        if len(row) == 1 or not names:
            return lambda: dict(solved)
        by_sender: dict[int, list[str]] = {rank: [] for rank in row}
        for name in names:
            by_sender[self.placement.sender(name, self.rank)].append(name)
        form = self.payload.gradients
        # The gradient workers of a layer stand in the same place of their rows and must round alike.
        seed = self._messages * len(self.world) + row.index(self.rank)
        self._messages += 1
        message = encode([solved[name].flatten() for name in by_sender[self.rank]], form, self.like, seed)
        numbers = {rank: [self.shapes[name].gradient_elements for name in by_sender[rank]] for rank in row}
        sizes = [encoded_length(numbers[rank], form) for rank in row]
        sliced = is_worth_slicing([sum(numbers[rank]) for rank in row])
        wait = self.collectives.gather("gradients", row, message, sizes, sliced=sliced)

        def received() -> dict[str, Tensor]:
            result: dict[str, Tensor] = {}
            for rank, chunk in zip(row, wait(), strict=True):
                parts = decode(chunk, numbers[rank], form, self.like.dtype).split(numbers[rank])
                for name, part in zip(by_sender[rank], parts, strict=True):
                    result[name] = part.reshape(self._matrix_shape(name)).to(self.held_in[name])
            return result

        return received


def groups_of(placement: Placement) -> set[tuple[int, ...]]:
    """Returns all sets of ranks that communicate under a placement."""
    return {tuple(range(placement.world_size)), *placement.rows, *placement.columns}


def _widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    return reduce(torch.promote_types, dtypes)


def _joined(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.cat([part.to(like.dtype) for part in parts]) if parts else like.new_empty(0)


def _exhausted(name: str, error: DecompositionError | None) -> DecompositionError:
    failure = DecompositionError(
        f"layer {name!r}: too many decompositions in a row failed ({error or 'on another rank'}); "
        "raise the damping, or look at its factors in kfac.factors"
    )
    failure.__cause__ = error
    return failure
