"""What a module of one input saw: every input and every gradient at its output, kept as it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn

from tests.support.canonical import canonical_gradient, canonical_input
from tests.support.kron import gradient_factor, input_factor


@dataclass
class Recorded:
    """The inputs of each call and, in the same order, the gradients at each call's output."""

    module: nn.Module
    inputs: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor | None] = field(default_factory=list)

    def forward_hook(self, module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        call = len(self.inputs)
        self.inputs.append(arguments[0].detach().clone())
        self.gradients.append(None)
        if output.requires_grad:
            output.register_hook(lambda gradient: self._keep(call, gradient))

    def _keep(self, call: int, gradient: Tensor) -> None:
        self.gradients[call] = gradient.detach().clone()

    def pairs(self, loss_terms: int | None = None, sharing: str = "expand") -> list[tuple[Tensor, Tensor]]:
        """Return (A, G) of each group of channels, from the first call alone."""
        rows = canonical_input(self.module, self.inputs[0])
        gradients = canonical_gradient(self.module, self.gradients[0])
        terms = len(rows) if loss_terms is None else loss_terms
        return [
            (
                input_factor(rows[:, :, group], sharing),
                gradient_factor(gradients[:, :, group], terms, sharing),
            )
            for group in range(rows.shape[2])
        ]


@contextmanager
def recording(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Recorded]]:
    """Record the named modules of a model while the block runs."""
    records = {name: Recorded(model.get_submodule(name)) for name in names}
    handles = [record.module.register_forward_hook(record.forward_hook) for record in records.values()]
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()
