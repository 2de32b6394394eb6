"""Decompositions: what is held of every layer between two inverse steps.

Layers of equal shape are one ``Stack``, so that a step rotates and scales them in one batched product. A refreshed
decomposition is written into its place. A failed one leaves the last good one there and is counted.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kaisa.errors import DecompositionError
from kaisa.kfac import solvers
from kaisa.kfac.factors import Pair
from kaisa.kfac.solvers import Decomposition, Moments, Solver

_LARGEST_BATCH = 256 * 2**20  # bytes of factors that are decomposed at once

Sides = tuple[Decomposition, Decomposition]


@dataclass
class Stack:
    """Layers of equal shape and their decompositions, stacked along the first dimension.

    Attributes:
        names: the layers, in the order of the first dimension.
        a, g: decompositions, each tensor (layers, ...).
        moments: corrected eigenvalues, for solvers that keep them.
    """

    names: list[str]
    a: Decomposition
    g: Decomposition
    moments: Moments | None = None

    def sides(self, indices: list[int] | int) -> Sides:
        """Returns the decompositions of one layer (views) or of several (copies)."""
        return tuple(part[indices] for part in self.a), tuple(part[indices] for part in self.g)

    def select(self, indices: list[int]) -> "Stack":
        """Returns the stack itself when all layers are asked for, otherwise a copy of some."""
        if len(indices) == len(self.names):
            return self
        moments = None if self.moments is None else replace(self.moments, values=self.moments.values[indices])
        return Stack([self.names[index] for index in indices], *self.sides(indices), moments)

    def store_moments(self, indices: list[int], part: "Stack") -> None:
        """Takes back the moments of a selection that a solver has renewed."""
        if part is not self and self.moments is not None and part.moments is not None:
            self.moments.values[indices] = part.moments.values
            self.moments.weight = part.moments.weight


class Decompositions:
    """The decompositions of all layers.

    Args:
        solver: makes them.
        order: all layer names; stacks keep this order.
        dtypes: the type in which each layer's are held.
        patience: failures of a layer in a row that are borne.
    """

    def __init__(self, solver: Solver, order: Sequence[str], dtypes: Mapping[str, torch.dtype], patience: int) -> None:
        self.solver = solver
        self.stacks: list[Stack] = []
        self.failures: dict[str, int] = {}
        self._order = tuple(order)
        self._dtypes = dtypes
        self._patience = patience
        self._slots: dict[str, tuple[Stack, int]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._slots

    def slot(self, name: str) -> tuple[Stack, int]:
        """Returns the stack of a layer and its place there."""
        return self._slots[name]

    def refresh(self, pairs: Mapping[str, Pair], damping: float) -> None:
        """Decomposes the factors of some layers.

        Raises:
            DecompositionError: a layer has failed as often in a row as patience allows.
        """
        fresh: dict[str, Sides] = {}
        for names in self._batches(pairs):
            for name, sides in self._decompose_or_keep({name: pairs[name] for name in names}, damping).items():
                if name in self._slots:
                    self._replace(name, sides)
                else:
                    fresh[name] = sides
        self._stack_up(fresh)

    def _batches(self, pairs: Mapping[str, Pair]) -> Iterator[list[str]]:
        """Groups equal shapes: together on accelerators, one by one where LAPACK would loop over a batch anyway."""
        groups: dict[object, list[str]] = defaultdict(list)
        for name, pair in pairs.items():
            alone = name if pair.a.device.type == "cpu" else None
            stack = id(self._slots[name][0]) if name in self._slots else None
            groups[(alone, pair.a.shape, pair.g.shape, pair.a.device, stack)].append(name)
        for group in groups.values():
            size = pairs[group[0]].a.nbytes + pairs[group[0]].g.nbytes
            most = max(1, _LARGEST_BATCH // size)
            for first in range(0, len(group), most):
                yield group[first : first + most]

    def _decompose_or_keep(self, pairs: Mapping[str, Pair], damping: float) -> dict[str, Sides]:
        try:
            result = self._decompose(pairs, damping)
        except DecompositionError as error:
            if len(pairs) > 1:
                single = [self._decompose_or_keep({name: pair}, damping) for name, pair in pairs.items()]
                return {name: sides for part in single for name, sides in part.items()}
            self._count_failure(next(iter(pairs)), error)
            return {}
        for name in pairs:
            self.failures.pop(name, None)
        return result

    def _decompose(self, pairs: Mapping[str, Pair], damping: float) -> dict[str, Sides]:
        names = list(pairs)
        factors = [torch.stack([pair.a for pair in pairs.values()]), torch.stack([pair.g for pair in pairs.values()])]
        diagonal = (factors[0].ndim == 2, factors[1].ndim == 2)
        shifts = solvers.shifts(factors[0], factors[1], diagonal, damping)
        decomposed = [
            tuple(part.to(self._dtypes[names[0]]) for part in self.solver.decompose(factor, is_diagonal, shift, old))
            for factor, is_diagonal, shift, old in zip(factors, diagonal, shifts, self._previous(names), strict=True)
        ]
        return {name: _at(decomposed[0], decomposed[1], index) for index, name in enumerate(names)}

    def _previous(self, names: list[str]) -> tuple[Decomposition | None, Decomposition | None]:
        if names[0] not in self._slots:
            return None, None
        stack = self._slots[names[0]][0]
        return stack.sides([self._slots[name][1] for name in names])

    def _count_failure(self, name: str, error: DecompositionError) -> None:
        self.failures[name] = self.failures.get(name, 0) + 1
        if self.failures[name] >= self._patience:
            raise DecompositionError(
                f"layer {name!r}: {self.failures[name]} decompositions in a row failed ({error}); "
                "raise the damping, or look at its factors in kfac.factors"
            ) from error

    def _replace(self, name: str, new: Sides) -> None:
        stack, index = self._slots[name]
        old = stack.sides(index)
        if stack.moments is not None:
            stack.moments.values[index].copy_(solvers.transported(stack.moments.values[index], old, new))
        for old_side, new_side in zip(old, new, strict=True):
            for old_part, new_part in zip(old_side, new_side, strict=True):
                old_part.copy_(new_part)

    def _stack_up(self, fresh: Mapping[str, Sides]) -> None:
        groups: dict[object, list[str]] = defaultdict(list)
        for name in self._order:
            if name in fresh:
                parts = [part for side in fresh[name] for part in side]
                groups[tuple((part.shape, part.dtype, part.device) for part in parts)].append(name)
        for names in groups.values():
            a = tuple(torch.stack(parts) for parts in zip(*(fresh[name][0] for name in names), strict=True))
            g = tuple(torch.stack(parts) for parts in zip(*(fresh[name][1] for name in names), strict=True))
            self._add(Stack(names, a, g, self.solver.initial_moments(a, g)))

    def _add(self, stack: Stack) -> None:
        self.stacks.append(stack)
        self._slots.update({name: (stack, index) for index, name in enumerate(stack.names)})

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yields every tensor that is held and its kind, for accounts of memory."""
        for stack in self.stacks:
            for part in (*stack.a, *stack.g):
                yield "decompositions", part
            if stack.moments is not None:
                yield "moments", stack.moments.values

    def state(self) -> list[dict[str, Any]]:
        """Returns copies of all stacks as plain lists, dicts and tensors."""
        return [
            {
                "names": list(stack.names),
                "a": [part.clone() for part in stack.a],
                "g": [part.clone() for part in stack.g],
                "moments": None
                if stack.moments is None
                else {
                    "values": stack.moments.values.clone(),
                    "weight": stack.moments.weight.clone(),
                    "terms": stack.moments.terms,
                },
            }
            for stack in self.stacks
        ]

    def restore(self, state: Sequence[Mapping[str, Any]], devices: Mapping[str, torch.device]) -> None:
        """Replaces everything with copies of a ``state()``, moved to the device of their layers."""
        self.stacks.clear()
        self._slots.clear()
        for entry in state:
            device = devices[entry["names"][0]]
            a, g = (tuple(part.detach().clone().to(device) for part in entry[side]) for side in ("a", "g"))
            moments = entry["moments"]
            if moments is not None:
                values = moments["values"].detach().clone().to(device)
                moments = Moments(values, moments["weight"].detach().clone().to(device), moments["terms"])
            self._add(Stack(list(entry["names"]), a, g, moments))


def _at(a: Decomposition, g: Decomposition, index: int) -> Sides:
    return tuple(part[index] for part in a), tuple(part[index] for part in g)
