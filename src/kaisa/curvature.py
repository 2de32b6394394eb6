"""The curvature of a trained network in its eigenbasis: one decomposition for all who ask.

For a layer with factors A (in × in, the constant 1 of a bias last) and G (out × out), and a matrix M (out × in):

    A = Q_A diag(a) Q_Aᵀ,   G = Q_G diag(g) Q_Gᵀ,   M̃ = Q_Gᵀ M Q_A,   Λ = g aᵀ  (K-FAC)
                                                                      Λ_ij = E[M̃_ij²]  (EKFAC, arXiv 1806.03884)

In these coordinates the Fisher matrix of one example is diagonal, so that influence functions, posteriors and bounds
are sums over i and j. The factors are values that somebody has made, `kaisa.kfac.mean_factors` or another library:
pairs with ``a`` and ``g`` by the names of the layers, of the loss of *one* example.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from kaisa.errors import ConfigurationError, DataError

Score = Callable[[Tensor, Tensor], Tensor]
"""A number of the outputs (1, …) and targets (1, …) of one example: its loss, a logit."""

Matrices = dict[str, Tensor]
"""A tensor (…, out, in) for each layer by name, a bias as the last column."""

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class KroneckerPair(Protocol):
    """The factors of one layer."""

    @property
    def a(self) -> Tensor:
        """The second moment of the input (in, in), with the constant 1 of a bias last."""

    @property
    def g(self) -> Tensor:
        """The second moment of the gradient at the output (out, out)."""


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

    def rotate(self, matrices: Tensor) -> Tensor:
        """Returns M̃ = Q_Gᵀ M Q_A, shaped as M (…, out, in)."""
        return self.g.mT @ matrices @ self.a

    def rotate_back(self, matrices: Tensor) -> Tensor:
        """Returns Q_G M̃ Q_Aᵀ, the inverse of ``rotate``."""
        return self.g @ matrices @ self.a.mT


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
    def of(cls, model: nn.Module, factors: Mapping[str, KroneckerPair]) -> Self:
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
            if reason is None and _joined(name, "weight") not in parameters:
                reason = "its weight belongs to another layer too, or is computed"
            if reason:
                left_out[name] = reason
            else:
                bases[name] = decompose(pair)
        if not bases:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in list(left_out.items())[:3]) or "there are none"
            raise ConfigurationError(f"no layer of the model has factors that can be used ({reasons})")
        counted = sum(_own_size(modules[name]) for name in bases)
        return cls(bases, counted / sum(p.numel() for p in model.parameters()), left_out)

    def corrected_by(self, model: nn.Module, score: Score, batches: Iterable[tuple[Tensor, Tensor]]) -> Self:
        """Returns the curvature with Λ measured on examples: EKFAC.

        Args:
            model: the model, in the mode in which it is to be run.
            score: the loss of one example.
            batches: inputs and targets; targets drawn from the model's prediction give the Fisher matrix.

        Raises:
            DataError: there is no example.
        """
        sums = {name: torch.zeros_like(basis.values) for name, basis in self.bases.items()}
        count = 0
        for inputs, targets in batches:
            for name, gradient in example_gradients(model, score, inputs, targets, tuple(self.bases)).items():
                sums[name] += self.bases[name].rotate(gradient).square().sum(0)
            count += len(inputs)
        if not count:
            raise DataError("there are no examples to measure moments on; give at least one batch")
        bases = {name: replace(basis, values=sums[name] / count) for name, basis in self.bases.items()}
        return replace(self, bases=bases, corrected=True)


def decompose(pair: KroneckerPair) -> Basis:
    """Returns the eigenbasis of a pair, computed in float64: small eigenvalues are divided by."""
    (values_a, basis_a), (values_g, basis_g) = (torch.linalg.eigh(factor.double()) for factor in (pair.a, pair.g))
    values = values_g.clamp(min=0)[:, None] * values_a.clamp(min=0)
    return Basis(basis_a.to(pair.a), basis_g.to(pair.g), values.to(pair.a))


def example_gradients(
    model: nn.Module, score: Score, inputs: Tensor, targets: Tensor, layers: tuple[str, ...]
) -> Matrices:
    """Returns the gradient (examples, out, in) of every example's score for each layer.

    The model runs in the mode it is in; batch normalisation must be in evaluation mode.
    """
    names = {_joined(layer, part) for layer in layers for part in ("weight", "bias")}
    own = {name: parameter.detach() for name, parameter in model.named_parameters()}
    wanted = {name: parameter for name, parameter in own.items() if name in names}
    fixed = {**{name: value for name, value in own.items() if name not in names}, **dict(model.named_buffers())}

    def of_one(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return score(outputs_of(functional_call(model, (parameters, fixed), (x[None],))), y[None]).sum()

    gradients = vmap(grad(of_one), in_dims=(None, 0, 0), randomness="different")(wanted, inputs, targets)
    return {layer: as_matrices(gradients, layer) for layer in layers}


def as_matrices(tensors: Mapping[str, Tensor], layer: str) -> Tensor:
    """Returns the matrices (examples, out, in) of a layer from tensors (examples, *weight) by parameter name."""
    matrix = tensors[_joined(layer, "weight")].flatten(2)
    bias = tensors.get(_joined(layer, "bias"))
    return matrix if bias is None else torch.cat((matrix, bias[..., None]), -1)


def matrix_of(model: nn.Module, layer: str) -> Tensor:
    """Returns the weights of a layer as a matrix (out, in), detached."""
    own = {name: parameter.detach()[None] for name, parameter in model.named_parameters()}
    return as_matrices(own, layer)[0]


def as_parameters(model: nn.Module, layer: str, matrix: Tensor) -> dict[str, Tensor]:
    """Returns the tensors of a layer that a matrix (out, in) stands for, by parameter name."""
    module: Any = model.get_submodule(layer)
    weight = module.weight
    if module.bias is None:
        return {_joined(layer, "weight"): matrix.reshape(weight.shape)}
    return {
        _joined(layer, "weight"): matrix[:, :-1].reshape(weight.shape),
        _joined(layer, "bias"): matrix[:, -1],
    }


def outputs_of(output: Any) -> Tensor:
    """Returns the tensor in what a model gives: itself, the ``logits`` of a record, or the first of several.

    Raises:
        ConfigurationError: there is none.
    """
    for candidate in (output, getattr(output, "logits", None), getattr(output, "last_hidden_state", None)):
        if isinstance(candidate, Tensor):
            return candidate
    items = list(output.values()) if isinstance(output, dict) else output
    if isinstance(items, tuple | list) and items:
        return outputs_of(items[0])
    raise ConfigurationError(
        f"the model gives {type(output).__name__}; expected a tensor, a record with logits or a tuple"
    )


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


def _own_size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters(recurse=False))


def _joined(layer: str, part: str) -> str:
    return f"{layer}.{part}" if layer else part
