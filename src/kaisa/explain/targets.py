"""Targets: which output of the model is explained, for each input.

None            the largest output of each input
3               output 3 of every input
[3, 1, 0]       one output for each input
(3, 10, 12)     an index into the output beyond the batch, where it is not (batch, outputs)
callable        a function of the model's output that gives one score for each input
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kaisa.errors import ConfigurationError

FORMS = "None, an int, a sequence of one int for each input, a tuple (an index into one output), or a function"
TargetLike = int | Sequence[int] | tuple[int, ...] | Tensor | Callable[[Tensor], Tensor] | None


class Target:
    """What is explained: made from the user's word and one look at the outputs of all inputs.

    Raises:
        ConfigurationError: the target does not fit the outputs.
    """

    def __init__(self, wanted: TargetLike, outputs: Tensor) -> None:
        self._function: Callable[[Tensor], Tensor] | None = None
        self._index: Tensor | None = None  # (inputs, dimensions of one output)
        if callable(wanted):
            self._function = wanted
            _check_scores(wanted(outputs), len(outputs))
        elif outputs.dim() > 1:
            self._index = _index(wanted, outputs)
        elif wanted not in (None, 0):
            raise ConfigurationError(f"target is {wanted!r}, and the model gives one output; leave target out")

    @property
    def classes(self) -> tuple[int, ...] | None:
        """The explained class of each input, where classes are what is explained."""
        return None if self._index is None else tuple(self._index[:, 0].tolist())

    def chosen(self, outputs: Tensor, rows: Sequence[int] | Tensor | None = None) -> Tensor:
        """Return the score of each input that is explained; differentiable.

        Args:
            outputs: what the model gives: for all inputs in order, for any number of copies of a single input, or for
                those that `rows` says.
            rows: which input each output belongs to.
        """
        if self._function is not None:
            return self._function(outputs)
        if self._index is None:
            return outputs
        index = self._index.to(outputs.device)
        if rows is not None:
            index = index[torch.as_tensor(rows, device=outputs.device)]
        elif len(index) == 1:
            index = index.expand(len(outputs), -1)
        return outputs[(torch.arange(len(outputs), device=outputs.device), *index.unbind(1))]

    @property
    def indices(self) -> list[int] | list[tuple[int, ...]] | None:
        """The target as Captum takes it; nothing where a function, or a model of one output, gives the score."""
        if self._index is None:
            return None
        entries = self._index.tolist()
        return [entry[0] for entry in entries] if self._index.shape[1] == 1 else [tuple(entry) for entry in entries]

    def scored(self, outputs: Tensor) -> Tensor:
        """Return the outputs as `indices` refers to them: scores where a function makes them."""
        return outputs if self._function is None else self._function(outputs)

    def of(self, row: int) -> Target:
        """Return the target of one input alone."""
        alone = object.__new__(Target)
        alone._function = self._function
        alone._index = None if self._index is None else self._index[row : row + 1]
        return alone


def _index(wanted: TargetLike, outputs: Tensor) -> Tensor:
    count, shape = len(outputs), outputs.shape[1:]
    if wanted is None:
        flat = outputs.detach().flatten(1).argmax(1).cpu()
        return torch.stack(torch.unravel_index(flat, shape), 1)
    if isinstance(wanted, tuple) and len(shape) > 1:
        index = torch.tensor(wanted).expand(count, -1)
    else:
        index = torch.as_tensor(wanted).cpu()
        index = index.reshape(-1, 1) if index.dim() < 2 else index
        index = index.expand(count, -1) if len(index) == 1 else index
    if index.is_floating_point() or index.dtype == torch.bool or index.dim() != 2:
        raise ConfigurationError(f"target is {wanted!r}; expected {FORMS}")
    if len(index) != count:
        raise ConfigurationError(f"target has {len(index)} entries for {count} inputs; expected one for each")
    if index.shape[1] != len(shape):
        raise ConfigurationError(
            f"one output has the shape {tuple(shape)}, and the target an index of {index.shape[1]}; "
            f"give a tuple of {len(shape)} numbers, or a function of the output"
        )
    sizes = torch.tensor(shape)
    if bool(((index < 0) | (index >= sizes)).any()):
        raise ConfigurationError(f"target {wanted!r} is outside the model's {'×'.join(map(str, shape))} outputs")
    return index.long()


def _check_scores(scores: object, count: int) -> None:
    if not isinstance(scores, Tensor) or scores.shape != (count,):
        found = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ConfigurationError(f"the target function gives {found}; expected one score for each of {count} inputs")
