"""Statistics, Pair and Factors: what the backward passes of one step add, and what their running average is.

Laws:
    Statistics are sums over examples, so that micro-batches and ranks add up: ``of(x) + of(y) == of(x and y)``.
    Averages are bias-corrected from the first update on: with decay β, after k updates the weight of update i is
    (1 − β) β^(k−i) / (1 − β^k). The average therefore starts as the first batch, not as the identity.
    A non-finite update leaves the average as it was, without the host having looked.

A factor is a tensor and its number of dimensions says what it is: 1, a diagonal; 2, a dense symmetric matrix; 3, one
dense matrix a group of channels.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from kaisa.errors import StateError


@dataclass
class Statistics:
    """Sums over the examples of one step: a aᵀ over positions, δ δᵀ over positions, and what they were summed over.

    Attributes:
        a: sums that become the factor A after division by ``positions``.
        g: sums that become the factor G after division by ``examples``.
        positions: how many inputs were summed, over examples and positions.
        examples: how many terms of the loss were summed.
        area: positions of one example in a convolution, 1 elsewhere; for the scale of the reference implementation.
        scale: what gradients at the hook were multiplied by, beyond the loss scale; likewise.
        steps: how many steps were summed, each as often as its sums count: 1, or Σ β^j of decayed ones.
    """

    a: Tensor
    g: Tensor
    positions: float | Tensor = 0.0
    examples: float | Tensor = 0.0
    area: int = 1
    scale: float = 1.0
    steps: float | Tensor = 1.0

    def fade_(self, factor: float | Tensor) -> None:
        """Makes everything count less, in place."""
        self.a *= factor
        self.g *= factor
        self.positions *= factor
        self.examples *= factor
        self.steps *= factor

    def add_(self, other: "Statistics") -> None:
        """Adds the sums and counts of another micro-batch of the same step in place."""
        self.a += other.a
        self.g += other.g
        self.positions += other.positions
        self.examples += other.examples


@dataclass(frozen=True)
class Pair:
    """The two factors (A, G) of one layer; a diagonal has 1 dimension, a matrix 2, one matrix a group 3.

    A factor lives with its owner alone: on the other ranks an empty tensor stands in its place.
    """

    a: Tensor
    g: Tensor

    def __iter__(self) -> Iterator[Tensor]:
        yield self.a
        yield self.g

    def side(self, index: int) -> Tensor:
        """Returns A for 0, G for 1."""
        return self.g if index else self.a

    def map(self, function: Any) -> "Pair":
        """Returns the pair of ``function(a)`` and ``function(g)``."""
        return Pair(function(self.a), function(self.g))


@dataclass(frozen=True)
class Label:
    """What the factors are: how they were averaged, which Fisher they estimate, how many examples they have seen."""

    average: str = "running"
    fisher: str = "empirical"
    sharing: str = "expand"
    examples: int = 0


@dataclass
class Factors(Mapping[str, Pair]):
    """The averaged pairs of all layers by module name: a value that can be printed, saved and compared.

    Example:
        >>> kfac.factors["conv1"].a.shape
        torch.Size([28, 28])
    """

    label: Label = field(default_factory=Label)
    from_identity: bool = False
    _pairs: dict[str, Pair] = field(default_factory=dict, repr=False)
    _weights: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def __getitem__(self, name: str) -> Pair:
        return self._pairs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._pairs)

    def __len__(self) -> int:
        return len(self._pairs)

    def update(self, name: str, batch: Pair, decay: float | Tensor, is_finite: Tensor | None = None) -> None:
        """Takes the pair of one batch into the running average of a layer; a non-finite one changes nothing.

        Args:
            name: the layer.
            batch: its pair; a side that another rank owns is an empty tensor.
            decay: β; what is left of the average, for a pair that stands for several steps.
            is_finite: what all ranks have found together, as a tensor; None to look at this pair.
        """
        if name not in self._pairs:
            self._start(name, batch)
        average, weight = self._pairs[name], self._weights[name]
        finite = torch.isfinite(batch.a.sum() + batch.g.sum()) if is_finite is None else is_finite
        weight.copy_(torch.where(finite, decay * weight + (1 - decay), weight))
        step = (1 - decay) / weight.clamp(min=1 - decay)
        for running, new in zip(average, batch, strict=True):
            running.lerp_(torch.where(finite, new, running), step.to(running.dtype))

    def has_begun(self, name: str) -> bool:
        """Says whether an update has reached the average of a layer; the host waits for the device to know."""
        return name in self._weights and bool(self._weights[name] > 0)

    def weight(self, name: str) -> Tensor:
        """Returns the weight of all updates that an average has seen, 0 before the first."""
        return self._weights[name]

    def _start(self, name: str, batch: Pair) -> None:
        # From the identity is how the reference starts, whose weight never needs correction.
        self._pairs[name] = batch.map(_identity_like if self.from_identity else torch.zeros_like)
        weight = 1.0 if self.from_identity else 0.0
        self._weights[name] = torch.full((), weight, dtype=torch.float64, device=batch.a.device)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Returns copies of averages and weights by layer name."""
        return {
            name: {"a": pair.a.clone(), "g": pair.g.clone(), "weight": self._weights[name].clone()}
            for name, pair in self._pairs.items()
        }

    def restore(self, state: Mapping[str, Mapping[str, Tensor]], devices: Mapping[str, torch.device]) -> None:
        """Replaces all averages with copies of a ``state()``, moved to the device of their layer."""
        self._pairs = {
            name: Pair(*(entry[side].detach().clone().to(devices[name]) for side in ("a", "g")))
            for name, entry in state.items()
        }
        self._weights = {
            name: entry["weight"].detach().clone().to(devices[name], torch.float64) for name, entry in state.items()
        }

    def save(self, path: str | Path) -> None:
        """Writes the pairs as safetensors, the label as its JSON metadata."""
        tensors = {
            f"{name}/{side}": t.contiguous() for name, entry in self.state().items() for side, t in entry.items()
        }
        save_file(tensors, str(path), metadata={"kaisa.factors": json.dumps(asdict(self.label))})

    @classmethod
    def load(cls, path: str | Path) -> "Factors":
        """Reads what ``save`` wrote; nothing is unpickled.

        Raises:
            StateError: the file does not hold factors.
        """
        with safe_open(str(path), framework="pt") as file:
            label = (file.metadata() or {}).get("kaisa.factors")
            if label is None:
                raise StateError(f"{path} is a safetensors file but holds no Kronecker factors")
            state: dict[str, dict[str, Tensor]] = {}
            for key in file.keys():  # noqa: SIM118 - a safetensors handle is not iterable
                name, side = key.rsplit("/", 1)
                state.setdefault(name, {})[side] = file.get_tensor(key)
        factors = cls(label=Label(**json.loads(label)))
        factors.restore(state, {name: torch.device("cpu") for name in state})
        return factors


def _identity_like(factor: Tensor) -> Tensor:
    if factor.ndim == 1:  # a diagonal, or the empty stand-in for a factor that lives elsewhere
        return torch.ones_like(factor)
    return torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device).expand_as(factor).clone()
