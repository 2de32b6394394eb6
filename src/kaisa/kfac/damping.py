"""Adaptive damping: how far the quadratic model can be trusted, measured (Levenberg–Marquardt).

The model of the loss around θ says that a step Δ changes it by

    M(Δ) = ⟨g, Δ⟩ + ½ Σ_layers ⟨Δ, GΔA + λΔ⟩

(Martens & Grosse 2015, §6.5). Every ``interval`` steps the actual change h(θ+Δ) − h(θ) on the same batch is divided by
M(Δ): a ratio above ¾ says that the model may be trusted further, λ ← ωλ; below ¼ that it was trusted too far, λ ← λ/ω.
"""

import math
from dataclasses import dataclass, field

from kaisa.errors import ConfigurationError


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
