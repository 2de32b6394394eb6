"""Every supported module as ``output = input @ weight.T + bias``, in one canonical layout.

Canonical layout: inputs are (batch, positions, in), output gradients (batch, positions, out), and the gradient of the
parameters is one matrix (out, in), with the bias as its last column, because a bias is a weight whose input is 1.
Grouped convolutions put the groups in front: gradient (groups, out/groups, in/groups), one factor a group.

    expand   A = mean over examples and positions of a aᵀ     G = mean over examples of the sum over positions of δ δᵀ
    reduce   ā = mean over positions of a, δ̄ = sum over positions of δ; then the means over examples of ā āᵀ and δ̄ δ̄ᵀ

(Martens & Grosse 2015; Eschenhagen et al. 2023, arXiv 2311.00636.) Normalisation layers are in `norms`, the projections
inside attention in `attention`.

A new module type is one small class, registered by exact type with ``register``, and one contract test.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kaisa.kfac import convolution
from kaisa.kfac.factors import Pair, Statistics
from kaisa.kfac.placement import FactorShape, LayerShape

EXPAND, REDUCE = "expand", "reduce"


@dataclass(frozen=True)
class LayerOptions:
    """Which layers are preconditioned, and how large a dense factor may be.

    Attributes:
        largest_dense: a side longer than this (a vocabulary) gets a diagonal factor instead of an n × n one.
        norms: precondition scale and shift of normalisation layers.
        embeddings: precondition embeddings.
        batch_dim: the dimension of a Linear layer's input that counts the examples.
    """

    largest_dense: int = 8192
    norms: bool = True
    embeddings: bool = True
    batch_dim: int = 0


def moment(rows: Tensor, *, ones: bool = False, diagonal: bool = False) -> Tensor:
    """Returns the sum over rows of r rᵀ, of r² when ``diagonal``; ``ones`` appends the constant 1 to every row.

    Args:
        rows: (..., rows, n).

    Returns:
        (..., n, n), or (..., n) when diagonal; n grows by one with ``ones``.
    """
    count = rows.shape[-2]
    if diagonal:
        squares = rows.square().sum(-2)
        return F.pad(squares, (0, 1), value=count) if ones else squares
    products = _gram(rows)
    if not ones:
        return products
    sums = rows.sum(-2)
    bordered = F.pad(products, (0, 1, 0, 1), value=count)
    bordered[..., -1, :-1] = sums
    bordered[..., :-1, -1] = sums
    return bordered


_BLOCK = 128


def _gram(rows: Tensor) -> Tensor:
    """Returns rowsᵀ rows; wide ones on a CPU by blocks of the upper triangle, which is nearly half of the work."""
    size = rows.shape[-1]
    if rows.device.type != "cpu" or rows.ndim != 2 or size < 2 * _BLOCK:
        return rows.mT @ rows
    products = rows.new_empty(size, size)
    for first in range(0, size, _BLOCK):
        block = slice(first, first + _BLOCK)
        torch.mm(rows[:, block].T, rows[:, first:], out=products[block, first:])
        products[first + _BLOCK :, block] = products[block, first + _BLOCK :].T
    return products


class Layer(ABC):
    """One (out, in) matrix of parameters and the rules that turn a backward pass into its statistics.

    Attributes:
        name: the module's name; the key of its factors.
        modules: the modules whose calls contribute, more than one when they share the parameter.
        weight, bias: the parameters; a bias that is None or frozen takes no part.
        treatment: how the layer is preconditioned, for the report.
        sharing: how positions that share the weights are treated, "expand" or "reduce".
    """

    def __init__(self, name: str, module: nn.Module, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        self.name = name
        self.modules: tuple[nn.Module, ...] = (module,)
        self.weight = weight
        self.bias = bias if bias is not None and bias.requires_grad else None
        self.treatment = "dense A and G"
        self.sharing = EXPAND

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The parameters whose gradients are preconditioned."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    uses = 1
    """How many stacked sums the statistics of a side hold: one for each kind of use of a tied weight."""

    is_diagonal = (False, False)
    """Whether A and G are diagonals."""

    def layer_shape(self) -> LayerShape:
        """Returns the shapes of the factors, known before any statistics are: what is placed and planned."""
        blocks, out, size = self.shape if len(self.shape) == 3 else (1, *self.shape)
        sides = (FactorShape(size, blocks, self.is_diagonal[0]), FactorShape(out, blocks, self.is_diagonal[1]))
        return LayerShape(self.name, *sides, (blocks, out, size), has_blocks=len(self.shape) == 3, uses=self.uses)

    def summed_in(self, dtype: torch.dtype | None) -> torch.dtype:
        """Returns the type of the statistics: at least float32; for None float64 where the layer is."""
        if dtype is not None:
            return torch.promote_types(dtype, torch.float32)
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32

    @abstractmethod
    def statistics(self, module: nn.Module, x: Tensor, delta: Tensor) -> Statistics:
        """Returns the sums of one call, batch first; ``positions`` is set here, ``examples`` by the caller.

        Args:
            module: which of ``modules`` was called.
            x: the input of the call, batch first.
            delta: the gradient at its output, batch first, up to a scale that the caller puts into the sums.
        """

    def statistics_of_some(self, module: nn.Module, x: Tensor, delta: Tensor, examples: slice) -> Statistics:
        """Returns the sums over some of the examples of a call."""
        return self.statistics(module, x[examples], delta[examples])

    def quadratic_in_delta(self, module: nn.Module) -> tuple[str, ...]:
        """Names the sums that grow with the square of ``delta``: "a", "g" or both."""
        return ("g",)

    def pair(self, statistics: Statistics) -> Pair:
        """Returns the factors of one batch."""
        return Pair(statistics.a / statistics.positions, statistics.g / statistics.examples)

    def example_gradients(self, x: Tensor, delta: Tensor) -> Tensor | None:
        """Returns (batch, *gradient shape), the gradient of every example; None where a layer has no rule for it."""
        return None

    def has_gradient(self) -> bool:
        """Says whether the last backward pass reached all parameters of this layer."""
        return all(parameter.grad is not None for parameter in self.parameters)

    @property
    def shape(self) -> torch.Size:
        """The shape of ``gradient()``: (out, in), or (groups, out, in)."""
        return self.values().shape

    def gradient(self) -> Tensor:
        """Returns the raw gradient as one matrix (out, in), or (groups, out, in)."""
        return self._joined(gradient_of(self.weight), None if self.bias is None else gradient_of(self.bias))

    def values(self) -> Tensor:
        """Returns the parameters in the layout of ``gradient()``."""
        return self._joined(self.weight.detach(), None if self.bias is None else self.bias.detach())

    def _joined(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        matrix = self._matrix(weight)
        return matrix if bias is None else torch.cat((matrix, bias.reshape(*matrix.shape[:-1], 1)), -1)

    def write_(self, matrix: Tensor) -> None:
        """Overwrites the gradients with a matrix of the layout of ``gradient()``."""
        if self.bias is not None:
            bias = gradient_of(self.bias)
            bias.copy_(matrix[..., -1].reshape(bias.shape))
            matrix = matrix[..., :-1]
        gradient_of(self.weight).copy_(self._unmatrix(matrix))

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.reshape(weight.shape[0], -1)

    def _unmatrix(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(self.weight.shape)


def gradient_of(parameter: nn.Parameter) -> Tensor:
    """Returns the gradient of a parameter that the last backward pass reached."""
    if parameter.grad is None:
        raise AssertionError("the layer took no part in this step")
    return parameter.grad


class MatrixLayer(Layer):
    """A layer with dense inputs and outputs, one row a position; sides longer than the limit become diagonal."""

    def __init__(
        self, name: str, module: nn.Module, weight: nn.Parameter, bias: nn.Parameter | None, options: LayerOptions
    ) -> None:
        super().__init__(name, module, weight, bias)
        out, size = self._matrix(weight).shape[-2:]
        self.diagonal_a = size > options.largest_dense
        self.diagonal_g = out > options.largest_dense
        self.is_diagonal = (self.diagonal_a, self.diagonal_g)
        sides = [side for side, is_diagonal in (("A", self.diagonal_a), ("G", self.diagonal_g)) if is_diagonal]
        if sides:
            self.treatment = f"diagonal {' and '.join(sides)} (more than {options.largest_dense} wide)"

    @abstractmethod
    def rows(self, x: Tensor) -> Tensor:
        """Returns the input as (batch, positions, in)."""

    @abstractmethod
    def output_rows(self, delta: Tensor) -> Tensor:
        """Returns the output gradient as (batch, positions, out)."""

    def statistics(self, module: nn.Module, x: Tensor, delta: Tensor) -> Statistics:
        rows, deltas = self.rows(x), self.output_rows(delta)
        if self.sharing == REDUCE:
            rows, deltas = rows.mean(1), deltas.sum(1)
        rows, deltas = rows.flatten(0, -2), deltas.flatten(0, -2)
        return Statistics(
            moment(rows, ones=self.bias is not None, diagonal=self.diagonal_a),
            moment(deltas, diagonal=self.diagonal_g),
            positions=rows.shape[0],
        )

    def example_gradients(self, x: Tensor, delta: Tensor) -> Tensor | None:
        rows = self.rows(x)
        return self.output_rows(delta).mT @ (F.pad(rows, (0, 1), value=1.0) if self.bias is not None else rows)


class Linear(MatrixLayer):
    """``nn.Linear`` on any leading dimensions."""

    def __init__(self, name: str, module: nn.Module, options: LayerOptions) -> None:
        super().__init__(name, module, module.weight, module.bias, options)  # type: ignore[arg-type]
        self.batch_dim = options.batch_dim

    def rows(self, x: Tensor) -> Tensor:
        return _positions(x, self.batch_dim)

    def output_rows(self, delta: Tensor) -> Tensor:
        return _positions(delta, self.batch_dim)


class TransposedLinear(Linear):
    """Transformers' ``Conv1D``: a Linear layer that stores its weight as (in, out)."""

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.mT

    def _unmatrix(self, matrix: Tensor) -> Tensor:
        return matrix.mT


def _positions(x: Tensor, batch_dim: int) -> Tensor:
    if x.ndim == 1:
        return x[None, None]
    if x.ndim > 2 and batch_dim != 0:
        x = x.movedim(batch_dim, 0)
    return x.reshape(x.shape[0], -1, x.shape[-1])


class Projection(MatrixLayer):
    """Some rows of a projection of ``nn.MultiheadAttention``; inputs arrive as (batch, positions, in)."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        options: LayerOptions,
        rows: slice,
        bias_rows: slice,
    ) -> None:
        self.range = rows
        self.bias_range = bias_rows
        super().__init__(name, module, weight, bias, options)

    def rows(self, x: Tensor) -> Tensor:
        return x

    def output_rows(self, delta: Tensor) -> Tensor:
        return delta

    def _joined(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._joined(weight, None if bias is None else bias[self.bias_range])

    def write_(self, matrix: Tensor) -> None:
        if self.bias is not None:
            gradient_of(self.bias)[self.bias_range].copy_(matrix[:, -1])
            matrix = matrix[:, :-1]
        self._matrix(gradient_of(self.weight)).copy_(matrix)

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight[self.range]


class Convolution(Layer):
    """``nn.Conv1d`` to ``nn.Conv3d`` and their transposed forms, any stride, padding, dilation and groups."""

    def __init__(self, name: str, module: nn.Module, options: LayerOptions) -> None:
        super().__init__(name, module, module.weight, module.bias)  # type: ignore[arg-type]
        self.geometry = convolution.Geometry.of(module)
        groups = self.geometry.groups
        if groups > 1:
            self.treatment = f"dense A and G for each of {groups} groups"
        out, size = self._matrix(self.weight).shape[-2:]
        if max(out, size) > options.largest_dense:
            raise NotCovered(f"a convolution with a side of {max(out, size)} > {options.largest_dense}")

    def statistics(self, module: nn.Module, x: Tensor, delta: Tensor) -> Statistics:
        x, delta = self._batched(x), self._batched(delta)
        with_bias = self.bias is not None
        if self.sharing == REDUCE:
            a = moment(convolution.mean_patch(x, self.geometry), ones=with_bias)
            return Statistics(a, self._output_moment(delta.flatten(2).sum(2, keepdim=True)), positions=x.shape[0])
        a = convolution.input_factor(x, self.geometry, bias=with_bias)
        positions = x.shape[0] * convolution.output_positions(x.shape, self.geometry)
        return Statistics(a, self._output_moment(delta), positions=positions, area=positions // x.shape[0])

    def _output_moment(self, delta: Tensor) -> Tensor:
        return convolution.output_factor(delta, self.geometry.groups)

    def example_gradients(self, x: Tensor, delta: Tensor) -> Tensor | None:
        x, delta, groups = self._batched(x), self._batched(delta), self.geometry.groups
        inputs = convolution.patches(x, self.geometry)
        if self.bias is not None:
            inputs = F.pad(inputs, (0, 1), value=1.0)
        deltas = delta.flatten(2).unflatten(1, (groups, -1))
        gradients: Tensor = deltas @ inputs
        return gradients.squeeze(1) if groups == 1 else gradients

    def _batched(self, x: Tensor) -> Tensor:
        return x if x.ndim == len(self.geometry.kernel) + 2 else x[None]

    def _matrix(self, weight: Tensor) -> Tensor:
        groups, taps = self.geometry.groups, self.geometry.kernel
        if self.geometry.transposed:
            size, out = weight.shape[0] // groups, weight.shape[1]
            matrix = weight.reshape(groups, size, out, -1).permute(0, 2, 1, 3).flatten(2)
        else:
            matrix = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1] * _product(taps))
        return matrix.squeeze(0) if groups == 1 else matrix

    def _unmatrix(self, matrix: Tensor) -> Tensor:
        if not self.geometry.transposed:
            return matrix.reshape(self.weight.shape)
        groups, out = self.geometry.groups, self.weight.shape[1]
        size = self.weight.shape[0] // groups
        return matrix.reshape(groups, out, size, -1).permute(0, 2, 1, 3).reshape(self.weight.shape)


def _product(values: Sequence[int]) -> int:
    result = 1
    for value in values:
        result *= value
    return result


class Embedding(Layer):
    """``nn.Embedding``: the input is one-hot, so that A is the diagonal of token frequencies; always ``expand``."""

    def __init__(self, name: str, module: nn.Embedding, options: LayerOptions) -> None:
        super().__init__(name, module, cast(nn.Parameter, module.weight), None)
        if module.sparse:
            raise NotCovered("sparse gradients")
        if module.max_norm is not None or module.scale_grad_by_freq:
            raise NotCovered("max_norm or scale_grad_by_freq, which change weight or gradient beyond the chain rule")
        if not options.embeddings:
            raise NotCovered("embeddings are switched off by LayerOptions")
        self.padding_idx = module.padding_idx
        self.diagonal_g = module.embedding_dim > options.largest_dense
        self.is_diagonal = (True, self.diagonal_g)
        self.treatment = "diagonal A of token frequencies, dense G"

    def statistics(self, module: nn.Module, x: Tensor, delta: Tensor) -> Statistics:
        tokens = x.flatten()
        deltas, counted = self._counted(tokens, delta.reshape(tokens.numel(), -1))
        frequencies = deltas.new_zeros(self.weight.shape[0]).index_add_(0, tokens, counted)
        return Statistics(frequencies, moment(deltas, diagonal=self.diagonal_g), positions=tokens.numel())

    def _counted(self, tokens: Tensor, deltas: Tensor) -> tuple[Tensor, Tensor]:
        if self.padding_idx is None:
            return deltas, deltas.new_ones(tokens.shape)
        counted = (tokens != self.padding_idx).to(deltas.dtype)
        return deltas * counted[:, None], counted

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.mT

    def _unmatrix(self, matrix: Tensor) -> Tensor:
        return matrix.mT


class TiedEmbedding(Layer):
    """An embedding whose weight is also that of the Linear layer that predicts tokens.

    With D over tokens and K over features, the Fisher is D₁⊗K₁ from the embedding plus D₂⊗K₂ from the prediction. The
    pair keeps the trace of this sum and weighs the two uses by what they contribute to it:
    D = D₁ tr K₁ + D₂ tr K₂ and K = (K₁ tr D₁ + K₂ tr D₂) / tr D. Statistics hold both uses, stacked.
    """

    def __init__(self, embedding: Embedding, prediction: nn.Linear) -> None:
        super().__init__(embedding.name, embedding.modules[0], embedding.weight, None)
        self.modules = (*embedding.modules, prediction)
        self.treatment = "diagonal A of tokens, dense G, from both uses"
        self.is_diagonal = (True, False)
        self.uses = 2
        self._embedding = embedding

    def statistics(self, module: nn.Module, x: Tensor, delta: Tensor) -> Statistics:
        if isinstance(module, nn.Embedding):
            first = self._embedding.statistics(module, x, delta)
            return Statistics(_stacked(first.a, 0), _stacked(first.g, 0))
        rows, deltas = x.reshape(-1, x.shape[-1]), delta.reshape(-1, delta.shape[-1])
        tokens = _stacked(moment(deltas, diagonal=True), 1)
        return Statistics(tokens, _stacked(moment(rows), 1), positions=rows.shape[0])

    def quadratic_in_delta(self, module: nn.Module) -> tuple[str, ...]:
        return ("g",) if isinstance(module, nn.Embedding) else ("a",)

    def pair(self, statistics: Statistics) -> Pair:
        frequencies = statistics.a[0] / statistics.a[0].sum().clamp(min=1)
        tokens = torch.stack((frequencies, statistics.a[1] / statistics.examples))
        features = (
            statistics.g / statistics.g.new_tensor([statistics.examples, max(statistics.positions, 1)])[:, None, None]
        )
        token_traces = tokens.sum(1)
        feature_traces = torch.diagonal(features, dim1=1, dim2=2).sum(1)
        trace = (token_traces @ feature_traces).clamp(min=torch.finfo(tokens.dtype).tiny)
        return Pair(feature_traces @ tokens, torch.einsum("u,uij->ij", token_traces, features) / trace)

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.mT

    def _unmatrix(self, matrix: Tensor) -> Tensor:
        return matrix.mT


def _stacked(use: Tensor, index: int) -> Tensor:
    return torch.stack((use, torch.zeros_like(use)) if index == 0 else (torch.zeros_like(use), use))


class NotCovered(Exception):
    """Why a module of a known type is left to the base optimizer."""


LayerFactory = Callable[[str, Any, LayerOptions], Layer | Sequence[Layer]]

_FACTORIES: dict[type[nn.Module] | str, LayerFactory] = {
    nn.Linear: Linear,
    nn.Conv1d: Convolution,
    nn.Conv2d: Convolution,
    nn.Conv3d: Convolution,
    nn.ConvTranspose1d: Convolution,
    nn.ConvTranspose2d: Convolution,
    nn.ConvTranspose3d: Convolution,
    nn.Embedding: Embedding,
    # By name, because Transformers need not be installed, and systems do not import one another.
    "transformers.pytorch_utils.Conv1D": TransposedLinear,
    "kaisa.quantize.layers.QuantizedLinear": Linear,
    "kaisa.quantize.layers.QuantizedConv1d": Convolution,
    "kaisa.quantize.layers.QuantizedConv2d": Convolution,
    "kaisa.quantize.layers.QuantizedConv3d": Convolution,
}


def register(module_type: type[nn.Module], factory: LayerFactory) -> None:
    """Makes K-FAC precondition modules of exactly this type.

    Args:
        module_type: the type; subclasses are not matched, because they may compute something else.
        factory: ``factory(name, module, options)`` returns a ``Layer``, several, or raises ``NotCovered(reason)``.
    """
    _FACTORIES[module_type] = factory


def register_name(name: str, factory: LayerFactory) -> None:
    """Does as ``register`` for the type that is called ``module.qualname``, without importing it."""
    _FACTORIES[name] = factory


def factory_of(module: nn.Module) -> LayerFactory | None:
    """Returns the factory registered for the exact type of a module, None for unknown types."""
    kind = type(module)
    return _FACTORIES.get(kind) or _FACTORIES.get(f"{kind.__module__}.{kind.__qualname__}")
