"""What is explained: a model or a function, inputs, a target; and what a method makes of it.

A *subject* gives every method the same view: scores in batches for any number of perturbed inputs, the differentiable
score of the target, one source of chance, one way to say how far it has come.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kaisa.curvature import outputs_of
from kaisa.errors import ConfigurationError, DataError
from kaisa.explain.modules import device_of
from kaisa.explain.targets import Target, TargetLike

KINDS = ("images", "rows", "texts", "tokens", "tensor", "none")
Batch = Tensor | Sequence[str]
Report = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Inputs:
    """What is explained, batch first.

    Attributes:
        kind: `images` (inputs, channels, height, width), `rows` (inputs, features), `texts` (strings), `tokens`
            (inputs, positions) of integers, `tensor` (any other), `none` (nothing).
        data: a tensor, or the texts.
        is_numpy: a function is to be called with numpy arrays, as the inputs came.
    """

    kind: str
    data: Tensor | tuple[str, ...] | None
    is_numpy: bool = False

    def __len__(self) -> int:
        return 0 if self.data is None else len(self.data)

    @property
    def tensor(self) -> Tensor:
        """The inputs as a tensor.

        Raises:
            DataError: they are texts, or there are none.
        """
        if not isinstance(self.data, Tensor):
            raise DataError(f"inputs are {self.kind}; this method explains tensors")
        return self.data

    def one(self, row: int) -> Inputs:
        """Return one input alone."""
        assert self.data is not None
        return replace(self, data=self.data[row : row + 1])


def read_inputs(inputs: Any, kind: str | None = None, device: torch.device | None = None) -> Inputs:
    """Return inputs as a value, told apart by their type and shape where `kind` does not say what they are.

    Raises:
        DataError: they are empty, not finite, or of no kind that can be explained.
        ConfigurationError: the kind is unknown, or does not fit.
    """
    if kind is not None and kind not in KINDS:
        raise ConfigurationError(f"kind is {kind!r}; expected one of {', '.join(KINDS)}")
    if inputs is None:
        return Inputs("none", None)
    texts = (inputs,) if isinstance(inputs, str) else inputs
    if isinstance(texts, list | tuple) and texts and all(isinstance(text, str) for text in texts):
        return Inputs("texts", tuple(texts))
    if kind == "texts":
        raise DataError(f"kind is 'texts', and inputs are {type(inputs).__name__}; expected strings")
    is_numpy = not isinstance(inputs, Tensor)
    try:
        data = torch.as_tensor(np.asarray(inputs)) if is_numpy else inputs
    except (TypeError, ValueError) as error:
        raise DataError(
            f"inputs are {type(inputs).__name__}; expected a tensor, an array, or strings ({error})"
        ) from error
    _check_tensor(data)
    kind = kind or _kind(data)
    expected = {"images": 4, "rows": 2, "tokens": 2}
    if kind in expected and data.dim() != expected[kind]:
        raise DataError(
            f"{kind} have {expected[kind]} dimensions, batch first, and inputs have the shape {tuple(data.shape)}; "
            "a single input is given as inputs[None]"
        )
    return Inputs(kind, data.detach().to(device or data.device), is_numpy)


@dataclass(frozen=True, eq=False)
class Subject:
    """A model or a function, inputs and a target, as methods see them.

    Attributes:
        model: the module, or None for a function.
        function: what gives scores: the module or the function.
        inputs: what is explained.
        wanted: the target as the user said it; global methods read it as they need.
        target: the target, resolved for the inputs; None without inputs.
        seed, generator: the seed, and a generator on the CPU made from it: the same numbers on any device.
        batch_size: how many inputs the model sees at once.
        report: called with how much of how much is done.
        arguments: further keyword arguments of the model; tensors with one row for each input go with them.
        names: names of the features, or the tokens of each input.
    """

    model: nn.Module | None
    function: Callable[..., Any]
    inputs: Inputs
    wanted: TargetLike = None
    target: Target | None = None
    seed: int = 0
    batch_size: int = 64
    report: Report = lambda done, total: None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    names: tuple[Any, ...] = ()
    generator: torch.Generator = field(default_factory=torch.Generator)

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return device_of(self.model)

    def one(self, row: int) -> Subject:
        """Return the subject with one of its inputs, and what goes with it."""
        return replace(
            self,
            inputs=self.inputs.one(row),
            target=None if self.target is None else self.target.of(row),
            arguments=self._arguments(len(self.inputs), slice(row, row + 1)),
        )

    def outputs(self, batch: Batch) -> Tensor:
        """Return what the model gives for one batch; differentiable where it is a module."""
        if self.model is None:
            return self._call_function(batch)
        assert isinstance(batch, Tensor)
        arguments = dict(self.arguments)
        if len(self.inputs) == 1 != len(batch):
            arguments = self._expanded(len(batch))
        return outputs_of(self.model(batch.to(self.device), **arguments))

    @torch.no_grad()
    def scores(self, batch: Batch) -> Tensor:
        """Return what the model gives for any number of inputs (of copies of a single one, where there are arguments).

        Raises:
            ConfigurationError: it does not give one output for each input, or outputs that are not finite.
        """
        size = len(batch) if self.arguments and len(self.inputs) != 1 else self.batch_size
        parts = [self.outputs(batch[start : start + size]).detach() for start in range(0, len(batch), max(1, size))]
        if any(part.dim() == 0 for part in parts) or sum(len(part) for part in parts) != len(batch):
            shapes = ", ".join(str(tuple(part.shape)) for part in parts[:2])
            raise ConfigurationError(f"the model gives {shapes} for {len(batch)} inputs; expected one output for each")
        return torch.cat(parts)

    def chosen(self, outputs: Tensor, rows: Sequence[int] | Tensor | None = None) -> Tensor:
        """Return the explained score of each output; differentiable. See `Target.chosen`."""
        assert self.target is not None
        return self.target.chosen(outputs, rows)

    def chosen_scores(self, batch: Batch) -> Tensor:
        """Return the explained score of copies of a single input, as float64 on the CPU."""
        return self.chosen(self.scores(batch)).double().cpu()

    def _call_function(self, batch: Batch) -> Tensor:
        given: Any = list(batch) if not isinstance(batch, Tensor) else batch
        if self.inputs.is_numpy and isinstance(batch, Tensor):
            given = batch.cpu().numpy()
        outputs = self.function(given, **self.arguments)
        if isinstance(outputs, list | tuple | np.ndarray):
            outputs = torch.as_tensor(np.asarray(outputs))
        outputs = outputs_of(outputs)
        return outputs if outputs.is_floating_point() else outputs.double()

    def _arguments(self, count: int, rows: slice) -> dict[str, Any]:
        return {
            name: value[rows] if isinstance(value, Tensor) and value.dim() and len(value) == count else value
            for name, value in self.arguments.items()
        }

    def _expanded(self, count: int) -> dict[str, Any]:
        return {
            name: value.expand(count, *value.shape[1:])
            if isinstance(value, Tensor) and value.shape[:1] == (1,)
            else value
            for name, value in self.arguments.items()
        }


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a method returns: its values, how they are meant, and what else it found. See `Explanation`."""

    values: Tensor
    kind: str
    quality: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    names: tuple[Any, ...] = ()
    target: tuple[int, ...] | None = None


def _kind(data: Tensor) -> str:
    if data.dim() == 4:
        return "images"
    if data.dim() == 2:
        return "rows" if data.is_floating_point() else "tokens"
    return "tensor"


def _check_tensor(data: Tensor) -> None:
    if data.dim() < 2 or not data.numel():
        raise DataError(
            f"inputs have the shape {tuple(data.shape)}; expected at least one input, batch first: "
            "a single input is given as inputs[None]"
        )
    if data.is_complex() or (data.is_floating_point() and not bool(torch.isfinite(data).all())):
        raise DataError("inputs have entries that are not finite numbers; explain what the model can take")
