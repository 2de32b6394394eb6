"""Whether a classifier's confidence is what it is worth: calibration, and the temperature that mends it.

expected calibration error    Σ over bins of (share of inputs) · |accuracy − mean confidence|   (Naeini et al. 2015)
Brier score                   mean of Σ_c (p_c − 1{y = c})²
temperature                   softmax(logits / T), T with the least negative log-likelihood        (Guo et al. 2017)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from kaisa.assure.claims_roots import find_root
from kaisa.errors import ConfigurationError, DataError


@dataclass(frozen=True)
class Bin:
    """Inputs of similar confidence.

    Attributes:
        low: confidence from which on, not included but in the first.
        high: confidence up to which.
        inputs: how many.
        confidence: their mean.
        accuracy: the share that is right.
    """

    low: float
    high: float
    inputs: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    """How far confidence and accuracy agree.

    Attributes:
        bins: those that hold inputs, from low to high confidence.
        expected_error: ECE, from 0 to 1.
        brier: from 0 to 2.
        log_loss: the mean negative log-likelihood, in nats.
        accuracy: the share of inputs that is right.
    """

    bins: tuple[Bin, ...]
    expected_error: float
    brier: float
    log_loss: float
    accuracy: float

    @property
    def value(self) -> float:
        """The expected calibration error."""
        return self.expected_error

    @property
    def quantile(self) -> tuple[float, float] | None:
        """None: calibration is no bound on failures."""
        return None

    @property
    def statement(self) -> str:
        """What it shows."""
        inputs = sum(one.inputs for one in self.bins)
        return (
            f"on {inputs} inputs confidence and accuracy differ by {self.expected_error:.3g} on average "
            f"(Brier score {self.brier:.3g}, accuracy {self.accuracy:.3g})"
        )

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What must hold."""
        return (
            "The inputs are independent draws of the operational profile, none of them used to fit the temperature.",
        )


def measure_calibration(probabilities: Tensor, targets: Tensor, *, bins: int = 15) -> Calibration:
    """Compare confidence with accuracy.

    Args:
        probabilities: (inputs, classes); each row sums to 1.
        targets: (inputs,) classes.
        bins: how many of equal width.

    Raises:
        DataError: no inputs, no probabilities, or targets that are no classes.
        ConfigurationError: fewer than one bin.
    """
    _check(probabilities, targets)
    if bins < 1:
        raise ConfigurationError(f"bins is {bins}; give at least 1, 15 are usual")
    p = probabilities.detach().double()
    if not bool(((p >= 0) & (p.sum(-1, keepdim=True) - 1).abs().lt(1e-4)).all()):
        raise DataError("the probabilities are negative or do not sum to 1; give softmax(logits)")
    confidence, predicted = p.max(-1)
    right = (predicted == targets).double()
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    found = []
    for index in range(bins):
        inside = place == index
        if bool(inside.any()):
            count, mean, share = int(inside.sum()), float(confidence[inside].mean()), float(right[inside].mean())
            found.append(Bin(index / bins, (index + 1) / bins, count, mean, share))
    error = sum(one.inputs * abs(one.accuracy - one.confidence) for one in found) / len(p)
    wanted = functional.one_hot(targets, p.shape[-1]).double()
    return Calibration(
        tuple(found),
        error,
        float((p - wanted).square().sum(-1).mean()),
        float(-p.gather(1, targets[:, None]).clamp(min=torch.finfo(torch.float64).tiny).log().mean()),
        float(right.mean()),
    )


def fit_temperature(logits: Tensor, targets: Tensor) -> float:
    """Return the T by which logits are to be divided: the one with the least negative log-likelihood.

    The likelihood is concave in 1/T, so that there is one T. Fit it on inputs that are not tested on later.

    Raises:
        DataError: no inputs, targets that are no classes, logits that are not finite, or such that no T is best: every
            target has the highest logit, or targets have no higher logits than others.
    """
    _check(logits, targets)
    z = logits.detach().double()
    if not bool(torch.isfinite(z).all()):
        raise DataError("the logits are not finite; look at the model and its inputs")
    z = z - z.amax(-1, keepdim=True)
    wanted = z.gather(1, targets[:, None]).squeeze(1)

    def slope(inverse: float) -> float:
        return float(((z * inverse).softmax(-1) * z).sum(-1).sub(wanted).mean())

    if slope(1e-6) >= 0:
        raise DataError("the logits of the targets are no higher than others on average; no temperature mends that")
    if slope(1e6) <= 0:
        raise DataError("every target has the highest logit, so that the likelihood rises without end as T falls")
    return 1 / find_root(slope, 1.0)


def _check(scores: Tensor, targets: Tensor) -> None:
    if scores.ndim != 2 or not len(scores) or targets.shape != scores.shape[:1]:
        raise DataError(
            f"scores {tuple(scores.shape)} and targets {tuple(targets.shape)}; give (inputs, classes) and (inputs,)"
        )
    if targets.is_floating_point() or not bool(((targets >= 0) & (targets < scores.shape[1])).all()):
        raise DataError(f"the targets are no classes from 0 to {scores.shape[1] - 1}")
