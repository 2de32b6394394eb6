"""Whether small changes of an input change the answer: certified by bounds, or searched for.

    certified    interval bounds (Gowal et al. 2018, arXiv 1810.12715): where the lowest logit of the class over the
                 whole box is above the highest of every other, no change of at most ``radius`` in each number changes
                 the answer. Sound for chains of linear and convolution layers, normalisation in evaluation mode,
                 pooling and monotone activations; what it cannot certify may still be robust.
    searched     projected gradient ascent from random starts (Madry et al. 2018) looks for a change that does. Finding
                 none proves nothing; it is a test that the network passed.

The share of inputs that pass, with its lower confidence bound, supports the claim that the network errs rarely near
the inputs it was tested on. It is no bound on failures in operation by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from kaisa.assure.evidence.held_out import check_belief, lower_bound
from kaisa.curvature import outputs_of
from kaisa.errors import ConfigurationError, DataError
from kaisa.modes import evaluating

Interval = tuple[Tensor, Tensor]  # centre and radius, elementwise

_MONOTONE = (nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.Sigmoid, nn.Hardtanh, nn.ReLU6, nn.Softplus, nn.ELU)
_AVERAGES = (nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)
_SHAPES = (nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout)
_MAXIMA = (nn.MaxPool1d, nn.MaxPool2d)


@dataclass(frozen=True)
class Robustness:
    """How many inputs keep their right answer within a radius.

    Attributes:
        robust: inputs that are answered rightly and keep the answer.
        right: inputs that are answered rightly.
        inputs: how many were tried.
        radius: the largest change of each number of an input.
        method: "certified" or "searched".
        belief: of the lower bound.
    """

    robust: int
    right: int
    inputs: int
    radius: float
    method: str
    belief: float = 0.95

    @property
    def value(self) -> float:
        """The lower bound on the share of inputs that are right and robust."""
        return lower_bound(self.robust, self.inputs, self.belief)

    @property
    def quantile(self) -> tuple[float, float] | None:
        """None: it is no bound on failures in operation."""
        return None

    @property
    def statement(self) -> str:
        """What it shows."""
        verb = "certainly keep" if self.method == "certified" else "kept, as far as a search could tell,"
        return (
            f"{self.robust} of {self.inputs} inputs {verb} their right answer under changes of up to {self.radius:g}: "
            f"at least {self.value:.3g} of all, with confidence {self.belief:g}"
        )

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What must hold."""
        found = ("The inputs are independent draws of the operational profile.",)
        if self.method == "certified":
            return (*found, "Bounds are computed in floating point, whose rounding they leave out.")
        return (*found, "A search that finds no change of answer does not prove that there is none.")


def certify_robustness(
    model: nn.Module, inputs: Tensor, targets: Tensor, radius: float, *, belief: float = 0.95, batch_size: int = 256
) -> Robustness:
    """Count the inputs whose right answer certainly stays, by interval bounds.

    Args:
        model: a chain (`nn.Sequential`, nested too) of supported layers; logits come out.
        inputs: a batch.
        targets: their classes.
        radius: the largest change of each number.
        belief: of the lower bound on the share.
        batch_size: how many are bounded at once.

    Raises:
        ConfigurationError: a layer has no bound, or a number is out of range.
        DataError: other numbers of inputs and targets.
    """
    _check(inputs, targets, radius, belief)
    chain = _chain(model)
    robust = right = 0
    with evaluating(model), torch.no_grad():
        for x, y in zip(inputs.split(batch_size), targets.split(batch_size), strict=True):
            right += int((outputs_of(model(x)).argmax(-1) == y).sum())
            robust += int((_margins(chain, x, y, radius) > 0).sum())
    return Robustness(robust, right, len(inputs), radius, "certified", belief)


def search_robustness(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    radius: float,
    *,
    steps: int = 20,
    starts: int = 4,
    belief: float = 0.95,
    seed: int = 0,
    batch_size: int = 256,
) -> Robustness:
    """Count the inputs whose right answer survives a search for changes that turn it.

    Any differentiable model. Each start moves by 2.5 radius / steps along the sign of the gradient of the cross-entropy
    and stays in the box.

    Args:
        model: logits come out.
        inputs: a batch.
        targets: their classes.
        radius: the largest change of each number.
        steps: of each ascent.
        starts: random ones, after one from the input itself.
        belief: of the lower bound on the share.
        seed: of the starts.
        batch_size: how many are searched at once.

    Raises:
        ConfigurationError: a number is out of range.
        DataError: other numbers of inputs and targets.
    """
    _check(inputs, targets, radius, belief)
    if steps < 1 or starts < 0:
        raise ConfigurationError(f"{steps} steps and {starts} starts; give at least 1 and 0")
    generator = torch.Generator().manual_seed(seed)
    robust = right = 0
    with evaluating(model):
        for x, y in zip(inputs.split(batch_size), targets.split(batch_size), strict=True):
            with torch.no_grad():
                stands = outputs_of(model(x)).argmax(-1) == y
            right += int(stands.sum())
            for start in range(starts + 1):
                noise = torch.empty(x.shape).uniform_(-radius, radius, generator=generator).to(x)
                stands &= _withstands(model, x, y, radius, steps, noise if start else torch.zeros_like(x))
            robust += int(stands.sum())
    return Robustness(robust, right, len(inputs), radius, "searched", belief)


def _withstands(model: nn.Module, x: Tensor, y: Tensor, radius: float, steps: int, change: Tensor) -> Tensor:
    stands = torch.ones(len(x), dtype=torch.bool, device=x.device)
    with torch.enable_grad():
        for _ in range(steps):
            moved = (x + change).requires_grad_()
            loss = functional.cross_entropy(outputs_of(model(moved)), y, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, moved)
            change = (change + 2.5 * radius / steps * gradient.sign()).clamp(-radius, radius)
            with torch.no_grad():
                stands &= outputs_of(model(x + change)).argmax(-1) == y
    return stands


def _margins(chain: list[nn.Module], x: Tensor, y: Tensor, radius: float) -> Tensor:
    """Return by how much the class at least leads, over the whole box."""
    interval = (x, torch.full_like(x, radius))
    for layer in chain[:-1]:
        interval = _through(layer, interval)
    last = chain[-1]
    if not isinstance(last, nn.Linear) or interval[0].ndim != 2:
        centre, spread = _through(last, interval)
        lowest = (centre - spread).gather(1, y[:, None])
        others = (centre + spread).scatter(1, y[:, None], -torch.inf)
        return (lowest - others.amax(-1, keepdim=True)).squeeze(-1)
    # The difference of two logits is bounded as one product, closer than two bounds apart.
    differences = last.weight[y][:, None] - last.weight
    centre, spread = interval
    lead = (differences @ centre[..., None]).squeeze(-1) - (differences.abs() @ spread[..., None]).squeeze(-1)
    if last.bias is not None:
        lead = lead + last.bias[y][:, None] - last.bias
    return lead.scatter(1, y[:, None], torch.inf).amin(-1)


def _through(layer: nn.Module, interval: Interval) -> Interval:
    centre, spread = interval
    if isinstance(layer, nn.Linear):
        return layer(centre), functional.linear(spread, layer.weight.abs())
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return layer(centre), _convolved(layer, spread)
    if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
        return layer(centre), _scaled(layer, spread)
    if isinstance(layer, _AVERAGES + _SHAPES):
        return layer(centre), layer(spread)
    if isinstance(layer, _MONOTONE + _MAXIMA):
        low, high = layer(centre - spread), layer(centre + spread)
        return (low + high) / 2, (high - low) / 2
    raise ConfigurationError(f"{type(layer).__name__} has no interval bound; use search_robustness")


def _convolved(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, spread: Tensor) -> Tensor:
    convolve: Callable[..., Tensor] = (functional.conv1d, functional.conv2d, functional.conv3d)[layer.weight.ndim - 3]
    if layer.padding_mode != "zeros":
        raise ConfigurationError(f"padding by {layer.padding_mode} has no interval bound; use search_robustness")
    return convolve(spread, layer.weight.abs(), None, layer.stride, layer.padding, layer.dilation, layer.groups)


def _scaled(layer: nn.BatchNorm1d | nn.BatchNorm2d, spread: Tensor) -> Tensor:
    if layer.running_var is None:
        raise ConfigurationError("batch normalisation without running statistics has no interval bound")
    scale = (layer.running_var + layer.eps).rsqrt()
    scale = scale if layer.weight is None else scale * layer.weight.abs()
    return spread * scale.view(1, -1, *[1] * (spread.ndim - 2))


def _chain(model: nn.Module) -> list[nn.Module]:
    if isinstance(model, nn.Sequential):
        return [layer for part in model for layer in _chain(part)]
    supported = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.BatchNorm1d, nn.BatchNorm2d)
    if not isinstance(model, supported + _AVERAGES + _SHAPES + _MONOTONE + _MAXIMA):
        raise ConfigurationError(
            f"{type(model).__name__} is no chain of layers with interval bounds; use search_robustness"
        )
    return [model]


def _check(inputs: Tensor, targets: Tensor, radius: float, belief: float) -> None:
    check_belief(belief)
    if not radius >= 0:
        raise ConfigurationError(f"radius is {radius:g}; give a number from 0 on")
    if len(inputs) != len(targets) or not len(inputs):
        raise DataError(f"{len(inputs)} inputs with {len(targets)} targets; give as many of both, at least one")
