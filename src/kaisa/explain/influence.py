"""Influence functions: which training examples made a prediction, from the Kronecker factors of the curvature.

For layers with factors A (in × in, the bias last) and G (out × out), A = Q_A diag(a) Q_Aᵀ, G = Q_G diag(g) Q_Gᵀ, and
the gradient M (out × in) of the loss of one example, M̃ = Q_Gᵀ M Q_A:

    influence(q, t) = Σ over layers Σ_ij  M̃^q_ij M̃^t_ij / (Λ_ij + λ)
    Λ = g aᵀ                                                            K-FAC
    Λ_ij = mean over examples of M̃_ij²                                  EKFAC (George et al. 2018, arXiv 1806.03884)
    λ = damping × mean of Λ, layer by layer, with damping 0.1           (Grosse et al. 2023, arXiv 2308.03296)

It estimates how the loss of a query q would rise if the training example t were left out, times the number N of
training examples: positive for proponents of the prediction. ``influence(t, t)`` is how much an example explains
itself, large for examples that nothing else explains: the mislabelled ones.

The factors are values that somebody has made (`kaisa.kfac`, or any other library): pairs with ``a`` and ``g``, by the
names of the layers. They must be those of the loss of one example, as of `kaisa.kfac`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from kaisa.errors import ConfigurationError, DataError
from kaisa.explain.modules import as_tensor, undisturbed
from kaisa.explain.registry import method
from kaisa.explain.subject import Outcome, Subject

DAMPING = 0.1
STRONGEST = 5  # training examples that are shown

Loss = Callable[[Tensor, Tensor], Tensor]
"""The loss of a batch of one example: outputs (1, …) and targets (1, …) to a number."""

Sampler = Callable[[Tensor, torch.Generator], Tensor]
"""Draws targets from what a model predicts."""

Progress = Callable[[int, int], None]
Gradients = dict[str, Tensor]
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@method("influence", scope="examples", needs="module", summary="the training examples that made the prediction")
def influence(
    subject: Subject,
    *,
    training: Examples,
    curvature: Curvature,
    damping: float = DAMPING,
    loss: Loss | None = None,
    targets: Tensor | None = None,
) -> Outcome:
    """Explain by influence functions: what leaving out a training example would do to the loss of the target.

    Positive values are proponents: without them the loss would be higher.

    Args:
        subject: what is explained.
        training: the training examples.
        curvature: of the loss, as ``Curvature.of(model, factors)`` makes it, best followed by ``moments``.
        damping: λ over the mean of Λ, layer by layer.
        loss: of one example; cross-entropy unless given.
        targets: of the inputs, for the loss; the explained classes unless given.
    """
    _check(training, curvature)
    model = subject.model
    assert model is not None
    wanted = targets
    if wanted is None:
        classes = None if subject.target is None else subject.target.classes
        if classes is None:
            raise ConfigurationError("the target is no class, so that there is no loss of it; give targets=")
        wanted = torch.tensor(classes)
    values = curvature.influence(
        model,
        loss or cross_entropy,
        Examples(subject.inputs.tensor, wanted),
        training,
        damping=damping,
        batch_size=subject.batch_size,
        progress=subject.report,
    ).cpu()
    return Outcome(values, "examples", details=_strongest(values, training))


def _check(training: object, curvature: object) -> None:
    if not isinstance(training, Examples):
        raise ConfigurationError(f"training is {type(training).__name__}; give Examples(inputs, targets)")
    if not isinstance(curvature, Curvature):
        raise ConfigurationError(f"curvature is {type(curvature).__name__}; give Curvature.of(model, factors)")


def _strongest(values: Tensor, training: Examples) -> dict[str, Any]:
    """Returns the strongest proponents and opponents of each input, strongest first, to be told and shown."""
    count = min(STRONGEST, values.shape[1])
    found: dict[str, Any] = {}
    for name, signed in (("proponents", values), ("opponents", -values)):
        order = signed.topk(count, dim=1).indices
        found[name] = order.tolist()
        found[f"{name}_targets"] = training.targets.cpu()[order].tolist()
        found[f"{name}_inputs"] = training.inputs.cpu()[order]
    return found


class KroneckerPair(Protocol):
    """The factors of one layer."""

    @property
    def a(self) -> Tensor:
        """The second moment of the input (in, in), with the constant 1 of a bias last."""

    @property
    def g(self) -> Tensor:
        """The second moment of the gradient at the output (out, out)."""


@dataclass(frozen=True)
class Examples:
    """Inputs and what a model should say of them.

    Attributes:
        inputs: (examples, …).
        targets: (examples, …).

    Raises:
        DataError: there are not as many of both.
    """

    inputs: Tensor
    targets: Tensor

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.targets) or not len(self.inputs):
            raise DataError(
                f"{len(self.inputs)} inputs with {len(self.targets)} targets; give as many of both, at least one"
            )

    def __len__(self) -> int:
        return len(self.inputs)

    def __repr__(self) -> str:
        return f"{len(self)} examples of {'×'.join(map(str, self.inputs.shape[1:]))}"

    def batches(self, size: int, device: torch.device) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yields which examples, their inputs and their targets."""
        for first in range(0, len(self), size):
            rows = slice(first, min(first + size, len(self)))
            yield rows, self.inputs[rows].to(device), self.targets[rows].to(device)


@dataclass(frozen=True)
class Basis:
    """The eigenbasis of one layer.

    Attributes:
        a: eigenvectors Q_A (in, in).
        g: eigenvectors Q_G (out, out).
        values: Λ (out, in).
    """

    a: Tensor
    g: Tensor
    values: Tensor

    def rotate(self, gradients: Tensor) -> Tensor:
        """Returns M̃ (examples, out, in)."""
        return self.g.mT @ gradients @ self.a


@dataclass(frozen=True)
class Curvature:
    """The curvature of a model's loss in its eigenbasis, layer by layer.

    Attributes:
        bases: by the name of the layer.
        share: the share of the model's parameters that it speaks of, 0 to 1.
        left_out: layers with factors that it does not speak of, and why.
        corrected: whether Λ are moments of gradients (EKFAC).
    """

    bases: Mapping[str, Basis]
    share: float
    left_out: Mapping[str, str]
    corrected: bool = False

    def __repr__(self) -> str:
        kind = "EKFAC" if self.corrected else "K-FAC"
        return f"{kind} curvature of {len(self.bases)} layers, {self.share:.1%} of the parameters"

    @classmethod
    def of(cls, model: nn.Module, factors: Mapping[str, KroneckerPair]) -> Curvature:
        """Decomposes the factors of a model.

        Layers that are not linear or convolutions of one group, and factors that are not dense, are left out.

        Raises:
            ConfigurationError: no layer is left.
        """
        modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
        bases: dict[str, Basis] = {}
        left_out: dict[str, str] = {}
        for name, pair in factors.items():
            reason = _misfit(modules.get(name), pair)
            if reason is None and f"{name}.weight" not in parameters:
                reason = "its weight belongs to another layer too, or is computed"
            if reason:
                left_out[name] = reason
            else:
                bases[name] = _decompose(pair)
        if not bases:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in list(left_out.items())[:3]) or "there are none"
            raise ConfigurationError(f"no layer of the model has factors that can be used ({reasons})")
        counted = sum(_matrix_size(modules[name]) for name in bases)
        return cls(bases, counted / sum(p.numel() for p in model.parameters()), left_out)

    def moments(
        self,
        model: nn.Module,
        loss: Loss,
        examples: Examples,
        *,
        sample: Sampler | None,
        generator: torch.Generator,
        batch_size: int = 64,
        progress: Progress | None = None,
    ) -> Curvature:
        """Returns the curvature with Λ measured on examples: EKFAC.

        Args:
            model: the model.
            loss: of one example.
            examples: over which the mean is taken.
            sample: draws targets from the predictions, for the Fisher matrix; None takes the examples' own, for the
                empirical one.
            generator: of the targets that are drawn.
            batch_size: how many gradients are held at once.
            progress: told how many examples of how many are done.
        """
        sums = {name: torch.zeros_like(basis.values) for name, basis in self.bases.items()}
        with undisturbed(model):
            for rows, inputs, given in examples.batches(batch_size, _device(model)):
                targets = given if sample is None else sample(_outputs(model, inputs), generator)
                for name, rotated in self._rotated(model, loss, inputs, targets).items():
                    sums[name] += rotated.square().sum(0)
                _tell(progress, rows.stop, len(examples))
        bases = {name: replace(basis, values=sums[name] / len(examples)) for name, basis in self.bases.items()}
        return replace(self, bases=bases, corrected=True)

    def _rotated(self, model: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor) -> Gradients:
        gradients = example_gradients(model, loss, inputs, targets, tuple(self.bases))
        return {name: self.bases[name].rotate(gradient) for name, gradient in gradients.items()}

    def _inverses(self, damping: float) -> Gradients:
        return {name: 1 / (basis.values + damping * basis.values.mean()) for name, basis in self.bases.items()}

    def influence(
        self,
        model: nn.Module,
        loss: Loss,
        queries: Examples,
        training: Examples,
        *,
        damping: float = DAMPING,
        batch_size: int = 64,
        progress: Progress | None = None,
    ) -> Tensor:
        """Returns the influence (queries, training examples) of every training example on every query.

        All gradients of the queries are held at once: queries × parameters numbers.

        Args:
            model: the model.
            loss: of one example.
            queries: whose loss is explained.
            training: by which it is explained.
            damping: λ over the mean of Λ, of each layer; above 0.
            batch_size: how many gradients of training examples are held at once.
            progress: told how many training examples of how many are done.

        Raises:
            ConfigurationError: damping is not above 0.
        """
        inverses = self._inverses(_checked(damping))
        result = torch.empty(len(queries), len(training), device=_device(model), dtype=_dtype(model))
        with undisturbed(model):
            parts = [
                self._rotated(model, loss, inputs, targets)
                for _, inputs, targets in queries.batches(batch_size, _device(model))
            ]
            solved = {
                name: (torch.cat([part[name] for part in parts]) * inverse).flatten(1)
                for name, inverse in inverses.items()
            }
            for rows, inputs, targets in training.batches(batch_size, _device(model)):
                rotated = self._rotated(model, loss, inputs, targets)
                scores = [solved[name] @ gradient.flatten(1).mT for name, gradient in rotated.items()]
                result[:, rows] = torch.stack(scores).sum(0)
                _tell(progress, rows.stop, len(training))
        return result

    def self_influence(
        self,
        model: nn.Module,
        loss: Loss,
        examples: Examples,
        *,
        damping: float = DAMPING,
        batch_size: int = 64,
        progress: Progress | None = None,
    ) -> Tensor:
        """Returns the influence (examples,) of every example on itself: the largest are likely mislabelled."""
        inverses = self._inverses(_checked(damping))
        result = torch.empty(len(examples), device=_device(model), dtype=_dtype(model))
        with undisturbed(model):
            for rows, inputs, targets in examples.batches(batch_size, _device(model)):
                rotated = self._rotated(model, loss, inputs, targets)
                scores = [(gradient.square() * inverses[name]).flatten(1).sum(1) for name, gradient in rotated.items()]
                result[rows] = torch.stack(scores).sum(0)
                _tell(progress, rows.stop, len(examples))
        return result


def example_gradients(
    model: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor, layers: tuple[str, ...]
) -> Gradients:
    """Returns the gradient (examples, out, in) of every example's loss for each layer, the bias as the last column."""
    wanted, fixed = _split(model, layers)

    def of_one(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        output = as_tensor(functional_call(model, (parameters, fixed), (x[None],)))
        return loss(output, y[None]).sum()

    gradients = vmap(grad(of_one), in_dims=(None, 0, 0), randomness="different")(wanted, inputs, targets)
    result = {}
    for layer in layers:
        matrix = gradients[f"{layer}.weight"].flatten(2)
        bias = gradients.get(f"{layer}.bias")
        result[layer] = matrix if bias is None else torch.cat((matrix, bias[..., None]), -1)
    return result


def sample_labels(outputs: Tensor, generator: torch.Generator) -> Tensor:
    """Draws a class (examples,) from the softmax of each output; on the CPU, so that seeds mean the same everywhere."""
    labels = torch.multinomial(outputs.detach().double().cpu().softmax(-1), 1, generator=generator).squeeze(-1)
    return labels.to(outputs.device)


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Returns the cross-entropy summed over the examples."""
    return functional.cross_entropy(outputs, targets, reduction="sum")


def _split(model: nn.Module, layers: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns the parameters of the layers, and everything else that the model holds."""
    names = {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    own = {name: parameter.detach() for name, parameter in model.named_parameters()}
    wanted = {name: parameter for name, parameter in own.items() if name in names}
    others = {name: parameter for name, parameter in own.items() if name not in names}
    return wanted, {**others, **dict(model.named_buffers())}


def _misfit(module: nn.Module | None, pair: KroneckerPair) -> str | None:
    """Says why the factors of a layer cannot be used, None if they can."""
    if module is None:
        return "the model has no module of this name"
    if not isinstance(module, _LAYERS) or getattr(module, "groups", 1) != 1:
        return f"{type(module).__name__} is not linear or a convolution of one group"
    weight, bias = module.weight, module.bias
    size = weight[0].numel() + (bias is not None)
    expected = (weight.shape[0],) * 2, (size,) * 2
    if (tuple(pair.g.shape), tuple(pair.a.shape)) != expected:
        return f"G {tuple(pair.g.shape)} and A {tuple(pair.a.shape)} are not {expected[0]} and {expected[1]}"
    return None


def _decompose(pair: KroneckerPair) -> Basis:
    # In float64, where it costs little beside what follows: small eigenvalues are divided by.
    (values_a, basis_a), (values_g, basis_g) = (torch.linalg.eigh(factor.double()) for factor in (pair.a, pair.g))
    values = values_g.clamp(min=0)[:, None] * values_a.clamp(min=0)
    return Basis(basis_a.to(pair.a), basis_g.to(pair.g), values.to(pair.a))


def _matrix_size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters(recurse=False))


@torch.no_grad()
def _outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    return as_tensor(model(inputs))


def _checked(damping: float) -> float:
    if not damping > 0:
        raise ConfigurationError(f"damping is {damping:g}; give a number above 0, 0.1 is usual")
    return damping


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def _tell(progress: Progress | None, done: int, total: int) -> None:
    if progress is not None:
        progress(done, total)
