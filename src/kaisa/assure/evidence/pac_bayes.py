"""A bound from the training data alone: PAC-Bayes around the initial weights.

With probability 1 − δ over n independent examples, for every distribution Q of weights at once, where P = N(W₀, σ²)
was fixed before any example was seen (Maurer 2004, arXiv cs/0411099):

    kl(error of Q on the examples ‖ error of Q) ≤ (KL(Q ‖ P) + ln(2√n / δ)) / n

Q is the posterior in the eigenbasis of the curvature, N(W, Pq⁻¹) with Pq = N Λ / T + 1/σ², so that with d weights

    KL = ½ [Σ_ij 1 / (σ² Pq_ij) + ‖W − W₀‖² / σ² − d + d ln σ² + Σ_ij ln Pq_ij]

and flat directions, in which Q is as wide as P, cost nothing. σ comes from a grid of K that is paid for by ln K; T is
free, for the bound holds for every Q. The error of Q on the examples is itself estimated by drawing networks, whose
own bound (Langford and Caruana 2001) takes a share of δ. It bounds the *drawn* network, not its mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from kaisa.assure.evidence.held_out import check_belief
from kaisa.assure.evidence.posterior import Posterior
from kaisa.curvature import Curvature, KroneckerPair, as_matrices, matrix_of, outputs_of
from kaisa.errors import ConfigurationError, DataError
from kaisa.modes import evaluating

PRIOR_VARIANCES = tuple(10.0 ** (-k / 2) for k in range(9))  # σ² from 1 to 1e-4
TEMPERATURES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
SAMPLING_SHARE = 0.2  # of δ, for the estimate of the error of Q


@dataclass(frozen=True)
class GeneralisationBound:
    """A bound on how often the randomised network errs on new inputs.

    Attributes:
        value: the bound ε.
        error: the mean error on the training examples of the networks that were drawn.
        complexity: KL(Q ‖ P).
        examples: n.
        drawn: how many networks.
        belief: θ = 1 − δ.
        prior_variance: σ².
        temperature: T.
    """

    value: float
    error: float
    complexity: float
    examples: int
    drawn: int
    belief: float
    prior_variance: float
    temperature: float

    @property
    def quantile(self) -> tuple[float, float] | None:
        """(ε, θ), or None where the bound says nothing."""
        return (self.value, self.belief) if self.value < 1 else None

    @property
    def statement(self) -> str:
        """What it shows."""
        return (
            f"networks drawn from the posterior err on at most {self.value:.3g} of new inputs, with confidence "
            f"{self.belief:g} (PAC-Bayes: {self.error:.3g} on {self.examples} training inputs, "
            f"KL {self.complexity:.4g})"
        )

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What must hold."""
        return (
            "The training examples are independent draws of the operational profile.",
            "The initial weights and the grid of prior variances were fixed before the examples were seen.",
            "The bound is of a network drawn from the posterior; the network in operation is taken to be no worse.",
            f"A confidence of {self.belief:g} over training sets is taken over as a belief about this network.",
        )


def kl_inverse(error: float, excess: float) -> float:
    """Return the largest q with kl(error ‖ q) ≤ excess, kl the divergence of two coins.

    Raises:
        ConfigurationError: the error is no probability, or the excess is negative.
    """
    if not 0 <= error <= 1 or not excess >= 0:
        raise ConfigurationError(f"error {error:g} and excess {excess:g}; give a probability and a number from 0 on")
    low, high = error, 1.0
    for _ in range(200):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (middle, high) if _coin_divergence(error, middle) <= excess else (low, middle)
    return high


def pac_bayes_bound(error: float, examples: int, complexity: float, delta: float) -> float:
    """Return the bound on the error of Q from its error on n examples and KL(Q ‖ P) (Maurer 2004, theorem 5).

    Raises:
        DataError: there are no examples.
        ConfigurationError: a number is out of its range.
    """
    if examples < 1:
        raise DataError("a bound needs examples; there are none")
    if not complexity >= 0 or not 0 < delta < 1:
        raise ConfigurationError(f"complexity {complexity:g} and delta {delta:g}; give at least 0, and above 0 below 1")
    return kl_inverse(error, (complexity + math.log(2 * math.sqrt(examples) / delta)) / examples)


def complexity_of(posterior: Posterior, initial: Mapping[str, Tensor], prior_variance: float) -> float:
    """Return KL(Q ‖ P) of a posterior and the prior N(W₀, σ²) of the same weights.

    Args:
        posterior: Q.
        initial: W₀ (out, in) by layer.
        prior_variance: σ².
    """
    precisions = {name: values.double() for name, values in posterior.precisions().items()}
    count = sum(values.numel() for values in precisions.values())
    trace = sum(float(values.reciprocal().sum()) for values in precisions.values()) / prior_variance
    log_determinant = sum(float(values.log().sum()) for values in precisions.values())
    distance = sum(
        float((posterior.means[name].double() - initial[name].double()).square().sum()) for name in precisions
    )
    return 0.5 * (trace + distance / prior_variance - count + count * math.log(prior_variance) + log_determinant)


def bound_generalisation(
    model: nn.Module,
    initial: Mapping[str, Tensor],
    factors: Mapping[str, KroneckerPair],
    inputs: Tensor,
    targets: Tensor,
    *,
    belief: float = 0.95,
    drawn: int = 500,
    prior_variances: Sequence[float] = PRIOR_VARIANCES,
    temperatures: Sequence[float] = TEMPERATURES,
    seed: int = 0,
) -> GeneralisationBound:
    """Bound how often a trained classifier errs on new inputs, from its training data.

    Among the given variances and temperatures the one with the least bound is taken, each tried with few networks; the
    bound itself is then made with new ones.

    Args:
        model: trained; every parameter that is not in a layer with factors must be as it was initially.
        initial: the model's ``state_dict()`` before the first step.
        factors: of the trained model on the training examples, by `kaisa.kfac.mean_factors`.
        inputs: all training inputs.
        targets: their classes.
        belief: θ.
        drawn: networks whose error is measured.
        prior_variances: σ², fixed before the data were seen.
        temperatures: T.
        seed: of the networks that are drawn.

    Raises:
        DataError: no examples, or other numbers of inputs and targets.
        ConfigurationError: a number out of range, or learned weights that the posterior does not cover.
    """
    check_belief(belief)
    if len(inputs) != len(targets) or not len(inputs):
        raise DataError(f"{len(inputs)} inputs with {len(targets)} targets; give as many of both, at least one")
    if drawn < 1 or not prior_variances or not temperatures:
        raise ConfigurationError("give at least one network to draw, one prior variance and one temperature")
    examples, delta = len(inputs), 1 - belief
    curvature = Curvature.of(model, factors)
    start = _initial_matrices(model, initial, curvature)
    generator = torch.Generator(inputs.device).manual_seed(seed)
    share = (1 - SAMPLING_SHARE) * delta / len(prior_variances)

    def candidate(variance: float, temperature: float) -> Posterior:
        means = {name: matrix_of(model, name) for name in curvature.bases}
        return Posterior(curvature, means, examples, 1 / variance, temperature)

    def bound(posterior: Posterior, networks: int) -> tuple[float, float, float]:
        variance = 1 / posterior.precision
        complexity = complexity_of(posterior, start, variance)
        if complexity > 10 * examples:  # no error could save it
            return 1.0, 1.0, complexity
        error = _mean_error(model, posterior, inputs, targets, networks, generator)
        surely = kl_inverse(error, math.log(2 / (SAMPLING_SHARE * delta)) / networks)
        return pac_bayes_bound(surely, examples, complexity, share), error, complexity

    candidates = [candidate(variance, t) for variance in prior_variances for t in temperatures]
    best = min(candidates, key=lambda posterior: _prospect(bound(posterior, 4), examples, share))
    value, error, complexity = bound(best, drawn)
    return GeneralisationBound(value, error, complexity, examples, drawn, belief, 1 / best.precision, best.temperature)


def _prospect(found: tuple[float, float, float], examples: int, share: float) -> float:
    """Return the bound as if the error were known."""
    _, error, complexity = found
    return pac_bayes_bound(error, examples, complexity, share)


def _mean_error(
    model: nn.Module, posterior: Posterior, inputs: Tensor, targets: Tensor, drawn: int, generator: torch.Generator
) -> float:
    """Return the mean share of examples that networks drawn from the posterior get wrong."""
    wrong = torch.zeros((), dtype=torch.float64, device=inputs.device)
    with evaluating(model), torch.no_grad():
        for _ in range(drawn):
            outputs = outputs_of(functional_call(model, posterior.sample(model, generator), (inputs,)))
            wrong += (outputs.argmax(-1) != targets).double().mean()
    return float(wrong) / drawn


def _initial_matrices(model: nn.Module, initial: Mapping[str, Tensor], curvature: Curvature) -> dict[str, Tensor]:
    """Return W₀ by layer, when everything else is as it was at the start."""
    covered = {f"{layer}.{part}".lstrip(".") for layer in curvature.bases for part in ("weight", "bias")}
    own = dict(model.named_parameters())
    if missing := sorted(own.keys() - initial.keys()):
        raise ConfigurationError(
            f"the initial weights lack {', '.join(missing[:3])}; give the state_dict() of the start"
        )
    learned = [
        name
        for name, parameter in own.items()
        if name not in covered and not torch.equal(parameter.detach().cpu(), initial[name].detach().cpu())
    ]
    if learned:
        raise ConfigurationError(
            f"{', '.join(learned[:3])} were learned but have no factors, so that the bound would not hold; "
            "freeze them, or leave such layers out of the model"
        )
    device = next(iter(own.values())).device
    rows = {name: initial[name].detach().to(device)[None] for name in own}
    return {layer: as_matrices(rows, layer)[0] for layer in curvature.bases}


def _coin_divergence(p: float, q: float) -> float:
    if q >= 1:
        return 0.0 if p >= 1 else math.inf
    first = p * math.log(p / q) if p > 0 else 0.0
    second = (1 - p) * (math.log1p(-p) - math.log1p(-q)) if p < 1 else 0.0
    return first + second
