"""How uncertain the weights are: Laplace's approximation with Kronecker factors.

With the factors at the trained weights W*, N examples and a Gaussian prior of precision τ, layer by layer:

    p(W | data) ≈ N(W*, P⁻¹),  P = N Λ / T + τ in the eigenbasis of `kaisa.curvature`          (Ritter et al. 2018)
    sample      W* + Q_G (E ∘ P^−½) Q_Aᵀ,  E standard normal
    evidence    ln p(data | W*) − ½ (τ ‖W*‖² + Σ ln P − d ln τ)                                 (MacKay 1992)
    logits      of variance V_c = Σ_ij M̃_ij² / P_ij, M the gradient of logit c; of a linear last layer with the
                features φ̄ = [φ, 1] simply Σ_ij (Q_G)_ci² (Q_Aᵀ φ̄)_j² / P_ij: no Jacobian, any number of classes
    predictive  softmax(f / √(1 + π V / 8))                                                     (probit)

Weight and bias are one block, so that nothing between them is lost. Layers without factors keep their weights: the
posterior says how large a share of the parameters it covers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from kaisa.assure.claims_roots import find_root
from kaisa.curvature import (
    Curvature,
    KroneckerPair,
    Matrices,
    as_parameters,
    example_gradients,
    matrix_of,
    outputs_of,
)
from kaisa.errors import ConfigurationError
from kaisa.modes import evaluating


@dataclass(frozen=True)
class Prediction:
    """What a network says when its weights are uncertain.

    Attributes:
        probabilities: (inputs, classes), of the uncertain network.
        logits: (inputs, classes), at the mean of the weights.
        variances: (inputs, classes), of the logits.
    """

    probabilities: Tensor
    logits: Tensor
    variances: Tensor

    @property
    def novelty(self) -> Tensor:
        """How foreign each input is to what was learned (inputs,): the mean variance of its logits."""
        return self.variances.mean(-1)


@dataclass(frozen=True)
class Posterior:
    """A Gaussian of the weights around those of training.

    Attributes:
        curvature: of the loss of one example, in its eigenbasis.
        means: W* (out, in) by layer.
        examples: N.
        precision: τ of the prior around 0.
        temperature: T; below 1 the posterior is narrower than Bayes would have it.
    """

    curvature: Curvature
    means: Mapping[str, Tensor]
    examples: int
    precision: float = 1.0
    temperature: float = 1.0

    def __repr__(self) -> str:
        return (
            f"posterior of N = {self.examples}, τ = {self.precision:.3g}, T = {self.temperature:g} by {self.curvature}"
        )

    @classmethod
    def of(
        cls,
        model: nn.Module,
        factors: Mapping[str, KroneckerPair] | Curvature,
        *,
        examples: int | None = None,
        precision: float = 1.0,
        temperature: float = 1.0,
        layers: Sequence[str] | None = None,
    ) -> Posterior:
        """Make the posterior of a trained model from its factors.

        Args:
            model: with the trained weights.
            factors: of a sampled or exact Fisher, best those of `kaisa.kfac.mean_factors`; or the curvature made of
                them, perhaps corrected (EKFAC).
            examples: N, how many the model was trained on; as the factors say if they are a mean over them.
            precision: τ; `with_best_precision` finds it.
            temperature: T.
            layers: which are uncertain; all that have factors unless given.

        Raises:
            ConfigurationError: factors of the empirical Fisher, which is no curvature; a number out of range; an
                unknown N.
        """
        label = getattr(factors, "label", None)
        _check_label(label)
        if examples is None:
            if getattr(label, "average", None) != "mean":
                raise ConfigurationError(
                    "these factors are no mean over the training data; give examples=, their number"
                )
            examples = label.examples  # type: ignore[union-attr]
        for name, value in (("examples", examples), ("precision", precision), ("temperature", temperature)):
            if not (value > 0 and math.isfinite(value)):
                raise ConfigurationError(f"{name} is {value:g}; give a number above 0")
        known = factors.bases if isinstance(factors, Curvature) else factors
        missing = [name for name in layers or () if name not in known]
        if missing:
            raise ConfigurationError(f"there are no factors of {', '.join(missing)}; there are: {', '.join(known)}")
        if isinstance(factors, Curvature):
            bases = {name: factors.bases[name] for name in layers or factors.bases}
            curvature = replace(factors, bases=bases)
        else:
            curvature = Curvature.of(model, {name: factors[name] for name in layers or factors})
        means = {name: matrix_of(model, name) for name in curvature.bases}
        return cls(curvature, means, examples, precision, temperature)

    def precisions(self) -> Matrices:
        """Return P (out, in) of every layer, in its eigenbasis."""
        scale = self.examples / self.temperature
        return {name: scale * basis.values + self.precision for name, basis in self.curvature.bases.items()}

    def sample(self, model: nn.Module, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Draw weights; return them by parameter name, for `torch.func.functional_call`.

        Args:
            model: whose layers they are; it is not changed.
            generator: on the device of the weights; PyTorch's own unless given.
        """
        drawn: dict[str, Tensor] = {}
        for name, precision in self.precisions().items():
            noise = torch.empty_like(precision).normal_(generator=generator)
            matrix = self.means[name] + self.curvature.bases[name].rotate_back(noise * precision.rsqrt())
            drawn.update(as_parameters(model, name, matrix))
        return drawn

    def log_evidence(self, log_likelihood: float) -> float:
        """Return the logarithm of the marginal likelihood of the training data.

        Args:
            log_likelihood: ln p(data | W*), the negative loss summed over the examples.
        """
        precisions = self.precisions().values()
        count = sum(precision.numel() for precision in precisions)
        log_determinant = sum(float(precision.double().log().sum()) for precision in precisions)
        quadratic = self.precision * self._squared_means()
        return log_likelihood - 0.5 * (quadratic + log_determinant - count * math.log(self.precision))

    def with_best_precision(self) -> Posterior:
        """Return the posterior whose τ maximises the evidence.

        At its maximum τ ‖W*‖² = Σ NΛ/T / (NΛ/T + τ), the number of well-determined weights (MacKay 1992): the
        difference falls in τ, so that there is one.
        """
        scale = self.examples / self.temperature
        eigenvalues = torch.cat([scale * basis.values.double().flatten() for basis in self.curvature.bases.values()])
        squared = self._squared_means()
        if not squared > 0:
            raise ConfigurationError("all weights are 0, which asks for a prior of infinite precision")

        def excess(precision: float) -> float:
            return precision * squared - float((eigenvalues / (eigenvalues + precision)).sum())

        return replace(self, precision=find_root(excess, eigenvalues.numel() / squared))

    def predict(
        self, model: nn.Module, inputs: Tensor, *, samples: int = 0, generator: torch.Generator | None = None
    ) -> Prediction:
        """Say what the uncertain network says.

        Args:
            model: with the weights W*.
            inputs: a batch.
            samples: 0 for the linearised network with the probit approximation; else the number of networks that are
                drawn and run, whose probabilities are averaged.
            generator: of the samples.
        """
        with evaluating(model), torch.no_grad():
            logits = outputs_of(model(inputs))
        if samples:
            drawn = self._drawn_logits(model, inputs, samples, generator)
            return Prediction(drawn.softmax(-1).mean(0), logits, drawn.var(0, correction=0))
        variances = self.logit_variances(model, inputs)
        return Prediction((logits / (1 + math.pi / 8 * variances).sqrt()).softmax(-1), logits, variances)

    def logit_variances(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """Return V (inputs, classes) of the network linearised at W*.

        One linear layer of whom the outputs are the logits needs one forward pass; otherwise a backward pass a class.
        """
        with evaluating(model):
            features = self._last_features(model, inputs)
            if features is not None:
                return features
            precisions = self.precisions()
            with torch.no_grad():
                classes = outputs_of(model(inputs)).shape[-1]
            none = torch.zeros(len(inputs), device=inputs.device)
            columns = []
            for index in range(classes):
                gradients = example_gradients(model, partial(_logit, index), inputs, none, tuple(precisions))
                columns.append(self._variance(gradients, precisions))
        return torch.stack(columns, -1)

    def _variance(self, gradients: Matrices, precisions: Matrices) -> Tensor:
        parts = [
            (self.curvature.bases[name].rotate(gradient).square() / precisions[name]).flatten(1).sum(1)
            for name, gradient in gradients.items()
        ]
        return torch.stack(parts).sum(0)

    def _last_features(self, model: nn.Module, inputs: Tensor) -> Tensor | None:
        """Return the variances from the features of a last linear layer, or None if the posterior is of more."""
        if len(self.means) != 1:
            return None
        (name,) = self.means
        layer = model.get_submodule(name)
        seen: list[tuple[Tensor, Tensor]] = []
        hook = layer.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
        try:
            with torch.no_grad():
                logits = outputs_of(model(inputs))
        finally:
            hook.remove()
        if not isinstance(layer, nn.Linear) or len(seen) != 1 or seen[0][1] is not logits or seen[0][0].ndim != 2:
            return None
        features = seen[0][0] if layer.bias is None else nn.functional.pad(seen[0][0], (0, 1), value=1.0)
        basis = self.curvature.bases[name]
        return (features @ basis.a).square() @ (basis.g.square() @ self.precisions()[name].reciprocal()).mT

    def _drawn_logits(
        self, model: nn.Module, inputs: Tensor, samples: int, generator: torch.Generator | None
    ) -> Tensor:
        with evaluating(model), torch.no_grad():
            return torch.stack(
                [outputs_of(functional_call(model, self.sample(model, generator), (inputs,))) for _ in range(samples)]
            )

    def _squared_means(self) -> float:
        return sum(float(mean.double().square().sum()) for mean in self.means.values())


def _logit(index: int, outputs: Tensor, _: Tensor) -> Tensor:
    return outputs[..., index]


def _check_label(label: Any) -> None:
    if label is not None and label.fisher == "empirical":
        raise ConfigurationError(
            "these factors are of the empirical Fisher, whose gradients vanish where training has succeeded; "
            'make them by mean_factors(..., fisher="categorical")'
        )
