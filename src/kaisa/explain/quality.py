"""How good an explanation is, in figures that need no opinion.

For values φ (one for each entry of an input x), the explained score f and a baseline x′:

    completeness gap   |Σ φ − (f(x) − f(x′))|: what the values leave unsaid
    infidelity         min over β of E[(β Iᵀφ − (f(x) − f(x − I)))²], I random: how badly φ predicts what a change does
                       (Yeh et al. 2019, arXiv 1901.09392)
    max-sensitivity    max over ‖δ‖∞ ≤ r of ‖φ(x + δ) − φ(x)‖ / ‖φ(x)‖: how far φ jumps where x hardly moves (likewise)
    deletion           the mean score while entries go, the most important first; low is good (Petsiuk et al. 2018)
    insertion          the mean score while they come, the most important first; high is good (arXiv 1806.07421)
    randomisation      the rank correlation of φ with φ of a model whose weights are shuffled: near 1 tells that the
                       explanation does not look at the model (Adebayo et al. 2018, arXiv 1810.03292)

Everything here is a function of tensors: scores are functions, randomness comes from generators on the CPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kaisa.errors import ConfigurationError

Score = Callable[[Tensor, Tensor], Tensor]
"""The explained score of changed inputs: (n, …) and which input each was made of (n,) to (n,)."""

Explain = Callable[[Tensor], Tensor]
"""The values of other inputs, as many and of the same shape."""


@dataclass(frozen=True)
class Curve:
    """Scores while entries go or come.

    Attributes:
        shares: (points,) of the entries that are gone or there, 0 to 1.
        scores: (inputs, points).
    """

    shares: Tensor
    scores: Tensor

    @property
    def area(self) -> Tensor:
        """The mean score (inputs,) over all shares."""
        return torch.trapezoid(self.scores, self.shares)


def completeness_gap(score: Score, inputs: Tensor, values: Tensor, baseline: Tensor) -> Tensor:
    """Returns |Σ φ − (f(x) − f(x′))| of each input (inputs,)."""
    rows = torch.arange(len(inputs))
    difference = score(inputs, rows) - score(baseline.expand_as(inputs), rows)
    return (values.flatten(1).sum(1).to(difference) - difference).abs()


def infidelity(
    score: Score,
    inputs: Tensor,
    values: Tensor,
    generator: torch.Generator,
    *,
    samples: int = 64,
    noise: float = 0.2,
    is_scaled: bool = True,
) -> Tensor:
    """Returns the infidelity of each input (inputs,).

    Args:
        score: the explained score.
        inputs: (inputs, …).
        values: of the same shape.
        generator: of the changes I, normally distributed.
        samples: how many changes.
        noise: their standard deviation, in parts of the standard deviation of each input.
        is_scaled: lets β be the best factor for each input, so that units do not matter; otherwise 1.
    """
    predicted, changed = _predictions(score, inputs, values, generator, samples, noise)
    predicted = _scaled(predicted, changed) if is_scaled else predicted
    return (predicted - changed).square().mean(0)


def relative_infidelity(
    score: Score, inputs: Tensor, values: Tensor, generator: torch.Generator, *, samples: int = 64, noise: float = 0.2
) -> Tensor:
    """Returns the scaled infidelity over E[(f(x) − f(x − I))²] (inputs,): 0 where φ predicts all, 1 where nothing."""
    predicted, changed = _predictions(score, inputs, values, generator, samples, noise)
    size = changed.square().mean(0).clamp(min=torch.finfo(changed.dtype).tiny)
    return (_scaled(predicted, changed) - changed).square().mean(0) / size


def _scaled(predicted: Tensor, changed: Tensor) -> Tensor:
    """Returns the predictions times the factor, one an input, that makes them best."""
    size = predicted.square().sum(0)
    return (predicted * changed).sum(0) / size.clamp(min=torch.finfo(size.dtype).tiny) * predicted


def _predictions(
    score: Score, inputs: Tensor, values: Tensor, generator: torch.Generator, samples: int, noise: float
) -> tuple[Tensor, Tensor]:
    """Returns Iᵀφ and f(x) − f(x − I), (samples, inputs) each."""
    _check_shapes(inputs, values)
    rows = torch.arange(len(inputs))
    scale = noise * per_input(inputs.flatten(1).std(1), inputs)
    here = score(inputs, rows)
    predicted, changed = [], []
    for _ in range(samples):
        change = scale * torch.randn(inputs.shape, generator=generator).to(inputs)
        predicted.append((change * values.to(inputs)).flatten(1).sum(1))
        changed.append(here - score(inputs - change, rows))
    return torch.stack(predicted).to(here), torch.stack(changed)


def max_sensitivity(
    explain: Explain,
    inputs: Tensor,
    values: Tensor,
    generator: torch.Generator,
    *,
    radius: float = 0.02,
    samples: int = 5,
) -> Tensor:
    """Returns the largest relative change (inputs,) of the values over inputs that differ by up to ``radius``.

    Args:
        explain: gives the values of other inputs.
        inputs: (inputs, …).
        values: what it gives for these.
        generator: of the changes, uniform in the cube.
        radius: half the side of the cube, in units of the inputs.
        samples: how many changes.
    """
    size = values.flatten(1).norm(dim=1).clamp(min=torch.finfo(values.dtype).tiny)
    worst = torch.zeros_like(size)
    for _ in range(samples):
        change = radius * (2 * torch.rand(inputs.shape, generator=generator) - 1)
        moved = explain(inputs + change.to(inputs)).to(values)
        worst = torch.maximum(worst, (moved - values).flatten(1).norm(dim=1) / size)
    return worst


def deletion(score: Score, inputs: Tensor, values: Tensor, baseline: Tensor | float = 0.0, points: int = 21) -> Curve:
    """Returns the scores while entries are replaced by the baseline, the most important first.

    Args:
        score: best a probability.
        inputs: (inputs, …).
        values: of a shape that can be expanded to that of the inputs after a channel dimension is added.
        baseline: what takes the place of an entry.
        points: of the curve.
    """
    return _curve(score, inputs, values, baseline, points, is_kept=lambda rank, share: rank >= share)


def insertion(score: Score, inputs: Tensor, values: Tensor, baseline: Tensor | float = 0.0, points: int = 21) -> Curve:
    """Returns the scores while entries take the place of the baseline, the most important first; see ``deletion``."""
    return _curve(score, inputs, values, baseline, points, is_kept=lambda rank, share: rank < share)


def _curve(
    score: Score,
    inputs: Tensor,
    values: Tensor,
    baseline: Tensor | float,
    points: int,
    is_kept: Callable[[Tensor, Tensor], Tensor],
) -> Curve:
    ranks = _places(inputs, importance(inputs, values))
    rest = torch.as_tensor(baseline).to(inputs).expand_as(inputs)
    shares = torch.linspace(0, 1, points)
    rows = torch.arange(len(inputs))
    scores = [score(torch.where(is_kept(ranks, share), inputs, rest), rows) for share in shares.to(ranks)]
    return Curve(shares, torch.stack(scores, 1).cpu().float())


def importance(inputs: Tensor, values: Tensor) -> Tensor:
    """Returns one number for each place of the inputs: values summed over the channels, where there are any."""
    if values.shape == inputs.shape and inputs.ndim > 2:
        return values.sum(1, keepdim=True)
    if values.ndim == inputs.ndim - 1:
        values = values.unsqueeze(1)
    _check_places(inputs, values)
    return values


def _places(inputs: Tensor, numbers: Tensor) -> Tensor:
    """Returns the rank of each place over the number of places, 0 for the most important, expanded to the inputs."""
    flat = numbers.flatten(1)
    ranks = flat.argsort(dim=1, descending=True, stable=True).argsort(dim=1).double() / flat.shape[1]
    expanded: Tensor = ranks.reshape(numbers.shape).to(inputs.device).expand_as(inputs)
    return expanded


def spread(inputs: Tensor, values: Tensor) -> Tensor:
    """Returns values in the shape of the inputs: those of a place are divided among its channels.

    Raises:
        ConfigurationError: the shapes do not belong together.
    """
    if values.shape == inputs.shape:
        return values
    places = importance(inputs, values)
    return (places / (inputs.shape[1] if inputs.ndim > 2 else 1)).expand_as(inputs)


def shuffled(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """Returns a copy of a model whose weights are shuffled, each parameter in itself; buffers stay."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
            parameter.copy_(parameter.flatten()[order].reshape(parameter.shape))
    return other


def rank_correlation(x: Tensor, y: Tensor) -> Tensor:
    """Returns Spearman's rank correlation (inputs,) of |x| and |y|; 0 where one is constant."""
    ranks = [_average_ranks(numbers.flatten(1).abs().double()) for numbers in (x, y)]
    first, second = (rank - rank.mean(1, keepdim=True) for rank in ranks)
    size = (first.square().sum(1) * second.square().sum(1)).sqrt()
    return torch.where(size > 0, (first * second).sum(1) / size.clamp(min=1e-300), torch.zeros_like(size))


def _average_ranks(numbers: Tensor) -> Tensor:
    """Returns ranks in each row; equal numbers share the mean of theirs."""
    ordered = numbers.sort(1).values.contiguous()
    below = torch.searchsorted(ordered, numbers.contiguous())
    up_to = torch.searchsorted(ordered, numbers.contiguous(), right=True)
    return (below + up_to - 1).double() / 2


def probabilities(outputs: Tensor) -> Tensor:
    """Returns outputs as probabilities over dimension 1: as they are, if they are, and by softmax otherwise."""
    if outputs.ndim < 2 or outputs.shape[1] < 2:
        return outputs
    are_probabilities = bool((outputs >= 0).all()) and torch.allclose(
        outputs.sum(1), torch.ones_like(outputs.sum(1)), atol=1e-4
    )
    return outputs if are_probabilities else outputs.softmax(1)


def per_input(numbers: Tensor, like: Tensor) -> Tensor:
    """Returns one number for each input in the shape of inputs."""
    return numbers.reshape(-1, *[1] * (like.ndim - 1))


def _check_shapes(inputs: Tensor, values: Tensor) -> None:
    if inputs.shape != values.shape:
        raise ConfigurationError(
            f"values of shape {tuple(values.shape)} for inputs of {tuple(inputs.shape)}; see spread"
        )


def _check_places(inputs: Tensor, values: Tensor) -> None:
    fits = values.ndim == inputs.ndim and all(
        v in (1, size) for v, size in zip(values.shape, inputs.shape, strict=True)
    )
    if not fits:
        raise ConfigurationError(f"values of shape {tuple(values.shape)} are not of inputs of {tuple(inputs.shape)}")
