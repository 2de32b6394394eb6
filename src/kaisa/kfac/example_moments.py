"""Squares of single examples' gradients in the eigenbasis, which correct eigenvalues (per-example EKFAC)."""

from collections.abc import Mapping

from torch import Tensor

from kaisa.kfac import solvers
from kaisa.kfac.decompositions import Decompositions
from kaisa.kfac.layers import Layer

_LARGEST_CHUNK = 64 * 2**20  # bytes of single examples' gradients that are formed at once


class ExampleMoments:
    """Adds up squares while the backward pass runs.

    Args:
        decompositions: whose bases gradients are rotated into; a layer without one is left out.
    """

    def __init__(self, decompositions: Decompositions) -> None:
        self._decompositions = decompositions
        self._sums: dict[str, Tensor] = {}

    def observe(self, layer: Layer, x: Tensor, delta: Tensor) -> None:
        """Takes in one call of a layer: its input, and δ at its output, batch first."""
        if layer.name not in self._decompositions:
            return
        stack, index = self._decompositions.slot(layer.name)
        a, g = stack.sides(index)
        size = max(1, _LARGEST_CHUNK // (8 * layer.weight.numel()))
        for first in range(0, x.shape[0], size):
            gradients = layer.example_gradients(x[first : first + size], delta[first : first + size])
            if gradients is None:
                return
            squares = solvers.rotate(gradients.to(a[0].dtype), a, g).square().sum(0)
            total = self._sums.get(layer.name)
            self._sums[layer.name] = squares if total is None else total + squares

    def take(self) -> Mapping[str, Tensor]:
        """Hands over the sums by layer, and begins anew."""
        sums, self._sums = self._sums, {}
        return sums
