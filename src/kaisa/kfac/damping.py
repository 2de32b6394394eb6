"""Adaptive damping: how far the quadratic model can be trusted, measured (Levenberg–Marquardt).

The model of the loss around θ says that a step Δ changes it by

    M(Δ) = ⟨g, Δ⟩ + ½ Σ_layers ⟨Δ, GΔA + λΔ⟩

(Martens & Grosse 2015, §6.5). Every ``interval`` steps the actual change h(θ+Δ) − h(θ) on the same batch is divided by
M(Δ): a ratio above ¾ says that the model may be trusted further, λ ← ωλ; below ¼ that it was trusted too far, λ ← λ/ω.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kaisa.errors import ConfigurationError
from kaisa.kfac.factors import Pair
from kaisa.kfac.layers import Layer


@dataclass
class LevenbergMarquardt:
    """Damping that follows the ratio of actual to predicted decrease; pass it as ``damping=``.

    Then call ``kfac.adapt_damping(loss, closure)`` after every ``optimizer.step()``.

    Attributes:
        initial: λ at the first step.
        interval: steps between two measurements.
        decay: ω for one step; a measurement multiplies or divides λ by decay ** interval.
        lowest, highest: bounds of λ.
    """

    initial: float = 0.03
    interval: int = 5
    decay: float = 0.95
    lowest: float = 1e-7
    highest: float = 1e3
    value: float = field(init=False)
    ratio: float = field(init=False, default=math.nan)

    def __post_init__(self) -> None:
        if not 0 < self.lowest <= self.initial <= self.highest:
            raise ConfigurationError(
                f"LevenbergMarquardt needs 0 < lowest <= initial <= highest; got "
                f"{self.lowest}, {self.initial}, {self.highest}"
            )
        if self.interval < 1 or not 0 < self.decay < 1:
            raise ConfigurationError(
                f"LevenbergMarquardt needs interval >= 1 and 0 < decay < 1; got {self.interval}, {self.decay}"
            )
        self.value = self.initial

    def __call__(self, step: int) -> float:
        """Returns λ; the step does not matter."""
        return self.value

    def observe(self, actual: float, predicted: float) -> None:
        """Takes one measurement: the actual change of the loss and the model's, both negative for a decrease."""
        factor = self.decay**self.interval
        self.ratio = actual / predicted if predicted < 0 and math.isfinite(actual) else -math.inf
        if self.ratio > 0.75:
            self.value = max(self.lowest, self.value * factor)
        elif self.ratio < 0.25:
            self.value = min(self.highest, self.value / factor)


class QuadraticModel:
    """The loss around the parameters that a step starts from; M(Δ) once the optimizer has made the step Δ.

    Args:
        layers: the covered layers that the step changes.
        gradients: their raw gradients, by name.
        parameters: all parameters of the model; those that are not covered enter with their slope alone.
        damping: λ of the step.
    """

    def __init__(
        self,
        layers: Iterable[Layer],
        gradients: Mapping[str, Tensor],
        parameters: Iterable[nn.Parameter],
        damping: float,
    ) -> None:
        self._layers = list(layers)
        self._gradients = gradients
        self._values = {layer.name: layer.values().clone() for layer in self._layers}
        covered = {parameter for layer in self._layers for parameter in layer.parameters}
        self._others = [
            (parameter, parameter.detach().clone(), parameter.grad.clone())
            for parameter in parameters
            if parameter.grad is not None and parameter not in covered
        ]
        self._damping = damping

    def change(self, factors: Mapping[str, Pair]) -> Tensor:
        """Returns M(Δ) for the parameters as they are now."""
        parts = [((now.detach() - old) * slope).sum().double() for now, old, slope in self._others]
        for layer in self._layers:
            delta = layer.values() - self._values[layer.name]
            curved = _applied(factors[layer.name], delta) + self._damping * delta
            parts.append((delta * (self._gradients[layer.name] + curved / 2)).sum().double())
        return torch.stack([part.to(parts[0].device) for part in parts]).sum()


def _applied(pair: Pair, matrix: Tensor) -> Tensor:
    """Returns G Δ A."""
    left = pair.g @ matrix if pair.g.ndim == matrix.ndim else pair.g.unsqueeze(-1) * matrix
    return left @ pair.a if pair.a.ndim == matrix.ndim else left * pair.a
