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

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kaisa import curvature
from kaisa.curvature import Matrices, Score, example_gradients, outputs_of
from kaisa.errors import ConfigurationError, DataError
from kaisa.explain.modules import undisturbed
from kaisa.explain.registry import method
from kaisa.explain.subject import Outcome, Subject

DAMPING = 0.1
STRONGEST = 5  # training examples that are shown

Sampler = Callable[[Tensor, torch.Generator], Tensor]
"""Draws targets from what a model predicts."""

Progress = Callable[[int, int], None]


@method("influence", scope="examples", needs="module", summary="the training examples that made the prediction")
def influence(
    subject: Subject,
    *,
    training: Examples,
    curvature: Curvature,
    damping: float = DAMPING,
    loss: Score | None = None,
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


@dataclass(frozen=True, repr=False)
class Curvature(curvature.Curvature):
    """The curvature of a model's loss, asked for influence; see `kaisa.curvature`."""

    def moments(
        self,
        model: nn.Module,
        loss: Score,
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
        with undisturbed(model):
            return self.corrected_by(model, loss, self._drawn(model, examples, sample, generator, batch_size, progress))

    def _drawn(
        self,
        model: nn.Module,
        examples: Examples,
        sample: Sampler | None,
        generator: torch.Generator,
        batch_size: int,
        progress: Progress | None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for rows, inputs, given in examples.batches(batch_size, _device(model)):
            yield inputs, given if sample is None else sample(_outputs(model, inputs), generator)
            _tell(progress, rows.stop, len(examples))

    def _rotated(self, model: nn.Module, loss: Score, inputs: Tensor, targets: Tensor) -> Matrices:
        gradients = example_gradients(model, loss, inputs, targets, tuple(self.bases))
        return {name: self.bases[name].rotate(gradient) for name, gradient in gradients.items()}

    def _inverses(self, damping: float) -> Matrices:
        return {name: 1 / (basis.values + damping * basis.values.mean()) for name, basis in self.bases.items()}

    def influence(
        self,
        model: nn.Module,
        loss: Score,
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
        loss: Score,
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


def sample_labels(outputs: Tensor, generator: torch.Generator) -> Tensor:
    """Draws a class (examples,) from the softmax of each output; on the CPU, so that seeds mean the same everywhere."""
    labels = torch.multinomial(outputs.detach().double().cpu().softmax(-1), 1, generator=generator).squeeze(-1)
    return labels.to(outputs.device)


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Returns the cross-entropy summed over the examples."""
    return functional.cross_entropy(outputs, targets, reduction="sum")


@torch.no_grad()
def _outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    return outputs_of(model(inputs))


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
