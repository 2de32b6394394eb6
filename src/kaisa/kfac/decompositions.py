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
from kaisa.kfac.routes import Key
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

    def compute(
        self, factors: Mapping[Key, Tensor], shifts: Mapping[Key, Tensor]
    ) -> tuple[dict[Key, Decomposition], dict[str, DecompositionError]]:
        """Decomposes some factors, equal shapes as one batch where that is faster.

        Args:
            factors: by layer and side.
            shifts: the damping of each factor alone, for solvers that damp the factors one by one.

        Returns:
            What succeeded, and the errors by layer. A factor that failed keeps its last good decomposition, if it has
            one, and its partner, which another rank may own, gets the new one; the failures of a layer in a row are
            counted.
        """
        computed: dict[Key, Decomposition] = {}
        errors: dict[str, DecompositionError] = {}
        for keys in self._batches(factors):
            computed.update(self._attempt(keys, factors, shifts, errors))
        for name in dict.fromkeys(name for name, _ in factors):
            if name in errors:
                self.failures[name] = self.failures.get(name, 0) + 1
            else:
                self.failures.pop(name, None)
        for name, side in factors:
            if name in errors and name in self._slots and (name, side) not in computed:
                stack, index = self._slots[name]
                computed[name, side] = tuple(part.clone() for part in stack.sides(index)[side])
        return computed, errors

    def exhausted(self, errors: Mapping[str, DecompositionError]) -> list[str]:
        """Returns the layers whose failures in a row are more than patience bears."""
        return [name for name in errors if self.failures[name] >= self._patience]

    def _batches(self, factors: Mapping[Key, Tensor]) -> Iterator[list[Key]]:
        """Groups equal shapes: together on accelerators, one by one where LAPACK would loop over a batch anyway."""
        groups: dict[object, list[Key]] = defaultdict(list)
        for key, factor in factors.items():
            alone = key if factor.device.type == "cpu" else None
            known = key[0] in self._slots
            groups[(alone, factor.shape, factor.device, known)].append(key)
        for group in groups.values():
            most = max(1, _LARGEST_BATCH // max(1, factors[group[0]].nbytes))
            for first in range(0, len(group), most):
                yield group[first : first + most]

    def _attempt(
        self,
        keys: list[Key],
        factors: Mapping[Key, Tensor],
        shifts: Mapping[Key, Tensor],
        errors: dict[str, DecompositionError],
    ) -> dict[Key, Decomposition]:
        try:
            return self._decompose(keys, factors, shifts)
        except DecompositionError as error:
            if len(keys) == 1:
                errors[keys[0][0]] = error
                return {}
            parts = [self._attempt([key], factors, shifts, errors) for key in keys]
            return {key: value for part in parts for key, value in part.items()}

    def _decompose(
        self, keys: list[Key], factors: Mapping[Key, Tensor], shifts: Mapping[Key, Tensor]
    ) -> dict[Key, Decomposition]:
        stack = torch.stack([factors[key] for key in keys])
        shift = torch.stack([shifts[key] for key in keys])
        decomposed = self.solver.decompose(stack, stack.ndim == 2, shift, self._previous(keys))
        held = [part.to(self._dtypes[keys[0][0]]) for part in decomposed]
        return {key: tuple(part[index] for part in held) for index, key in enumerate(keys)}

    def _previous(self, keys: list[Key]) -> Decomposition | None:
        if keys[0][0] not in self._slots:
            return None
        old = [self._slots[name][0].sides(self._slots[name][1])[side] for name, side in keys]
        return tuple(torch.stack(parts) for parts in zip(*old, strict=True))

    def install(self, decompositions: Mapping[str, Sides]) -> None:
        """Takes the decompositions of some layers into their places, or makes places for them."""
        for name, sides in decompositions.items():
            if name in self._slots:
                self._replace(name, sides)
        self._stack_up({name: sides for name, sides in decompositions.items() if name not in self._slots})

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
