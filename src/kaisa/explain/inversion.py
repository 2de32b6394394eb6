"""Feature inversion: an input that a layer cannot tell from the one given (Mahendran & Vedaldi 2015, arXiv 1412.0035).

    min over x   ‖Φ(x) − Φ₀‖² / ‖Φ₀‖²  +  λ_α ‖x‖_α^α  +  λ_V TV_β(x)

Φ is the output of a layer and Φ₀ that for the input. What comes back shows what the layer keeps, and what is missing,
what it has thrown away.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kaisa.errors import ConfigurationError
from kaisa.explain.image_priors import alpha_norm, total_variation

Progress = Callable[[int, int], None]

OPTIMISERS = ("adam", "lbfgs")
_LBFGS_ITERATIONS = 5  # inside one step


@dataclass(frozen=True)
class Descent:
    """How the input is found.

    Attributes:
        steps: how many.
        rate: the learning rate.
        optimiser: "adam" or "lbfgs".
        alpha: the power α of the norm.
        alpha_weight: λ_α.
        beta: the power β of the total variation.
        variation_weight: λ_V.

    Raises:
        ConfigurationError: a value cannot work.
    """

    steps: int = 200
    rate: float = 0.05
    optimiser: str = "adam"
    alpha: float = 6.0
    alpha_weight: float = 1e-7
    beta: float = 2.0
    variation_weight: float = 1e-5

    def __post_init__(self) -> None:
        if self.optimiser not in OPTIMISERS:
            raise ConfigurationError(f"optimiser is {self.optimiser!r}; give one of {', '.join(OPTIMISERS)}")
        if self.steps < 1 or self.rate <= 0 or self.alpha < 1 or self.beta <= 0:
            raise ConfigurationError(
                f"steps {self.steps}, rate {self.rate:g}, alpha {self.alpha:g}, beta {self.beta:g}; give positive "
                "numbers, alpha of at least 1"
            )
        if self.alpha_weight < 0 or self.variation_weight < 0:
            raise ConfigurationError("a weight is negative; give alpha_weight and variation_weight of at least 0")


@dataclass(frozen=True)
class Inverted:
    """Inputs that a layer cannot tell from others.

    Attributes:
        images: (images, channels, *positions).
        loss: (steps + 1, images), all terms, before each step and after the last.
        distance: (steps + 1, images), ‖Φ(x) − Φ₀‖² / ‖Φ₀‖² alone.
    """

    images: Tensor
    loss: Tensor
    distance: Tensor


def relative_distance(features: Tensor, wanted: Tensor) -> Tensor:
    """Returns ‖Φ − Φ₀‖² / ‖Φ₀‖² of each image (images,)."""
    size = wanted.flatten(1).square().sum(1)
    return (features - wanted).flatten(1).square().sum(1) / size.clamp(min=torch.finfo(size.dtype).tiny)


def invert(
    activation: Callable[[Tensor], Tensor],
    wanted: Tensor,
    start: Tensor,
    descent: Descent,
    *,
    progress: Progress | None = None,
) -> Inverted:
    """Finds inputs with given features.

    Args:
        activation: from images to features, Φ.
        wanted: Φ₀, of each image.
        start: images to start from.
        descent: how.
        progress: told how many steps of how many are done.
    """
    x = start.detach().clone().requires_grad_()
    losses, distances = [], []
    if descent.optimiser == "adam":
        optimiser: torch.optim.Optimizer = torch.optim.Adam([x], lr=descent.rate)
    else:
        optimiser = torch.optim.LBFGS([x], lr=descent.rate, max_iter=_LBFGS_ITERATIONS, line_search_fn="strong_wolfe")

    def evaluate() -> tuple[Tensor, Tensor]:
        distance = relative_distance(activation(x), wanted)
        norm = descent.alpha_weight * alpha_norm(x, descent.alpha)
        return distance + norm + descent.variation_weight * total_variation(x, descent.beta), distance

    def closure() -> Tensor:
        total = evaluate()[0].sum()
        (x.grad,) = torch.autograd.grad(total, x)
        return total.detach()

    def note() -> None:
        with torch.no_grad():
            loss, distance = evaluate()
        losses.append(loss)
        distances.append(distance)

    for step in range(descent.steps):
        note()
        optimiser.step(closure)  # type: ignore[arg-type]
        if progress is not None:
            progress(step + 1, descent.steps)
    note()
    return Inverted(x.detach(), torch.stack(losses), torch.stack(distances))
