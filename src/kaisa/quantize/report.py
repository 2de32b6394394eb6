"""Where the variance of a gradient comes from: layer by layer, from sampling and from each quantiser at each bit width.

With Θ all parameters, H(l) the output of layer l, ε(l) what its quantiser adds to the gradient there, γ(l) = ∂H(l)/∂Θ:

    ∇̂Θ − ∇Θ = Σ_l ε(l) γ(l)        Var[∇̂Θ | batch] = Σ_l E ‖ε(l) γ(l)‖²        Var[∇̂Θ] = Var[∇Θ] + E Var[∇̂Θ | batch]

because an ε has the mean 0 whatever came before it (theorem 2 of arXiv 2010.14298). The entries of ε, for "bhq" those
of T ε, are independent and of known variance, so that a layer's term is Σ_ij Var[ε_ij] ‖γ_ij‖². For a random direction
z of the parameters E (γ z)²_ij = ‖γ_ij‖², and γ z of all layers is one forward pass with forward-mode derivatives. What
a term owes to the layer's own parameters, (∂H/∂θ) z at a fixed input, and what to those below, is told apart.

Variances are given the exact gradient at each layer: that it is itself quantised is an effect of second order.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from kaisa.errors import ConfigurationError
from kaisa.quantize.quantizers import KINDS, matrix_of
from kaisa.quantize.reflections import reflections_of
from kaisa.quantize.variance import code_variances

Loss = Callable[[nn.Module, Any], Tensor]
Terms = Mapping[str, Mapping[int, float]]
"""A number for each kind of quantiser and number of bits."""

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
ALL_BITS = tuple(range(8, 1, -1))
_EXAMPLES = 16  # whose gradients are held at once


@dataclass(frozen=True)
class LayerVariance:
    """What is known of one layer.

    Attributes:
        name: of the module; of its later calls with their number.
        shape: of the gradient at its output.
        squared_gradient: ‖∇θ‖² of its parameters.
        sampling: the variance of ∇θ over batches of this size.
        quantization: of each quantiser and number of bits, what it adds to the gradient at the output: Σ Var[ε_ij].
        own: what that becomes in ∇θ of the layer's own parameters.
        below: what it becomes in the parameters before it.
    """

    name: str
    shape: tuple[int, ...]
    squared_gradient: float
    sampling: float
    quantization: Terms
    own: Terms
    below: Terms

    def added(self, kind: str, bits: int) -> float:
        """Return the layer's term of the theorem's sum."""
        return self.own[kind][bits] + self.below[kind][bits]


@dataclass(frozen=True)
class VarianceReport:
    """The variance of the gradient of a model on a batch; printed as a table.

    Attributes:
        layers: in the order of the forward pass.
        examples: in the batch.
    """

    layers: tuple[LayerVariance, ...]
    examples: int

    @property
    def kinds(self) -> tuple[str, ...]:
        """The quantisers that were looked at."""
        return tuple(self.layers[0].quantization)

    @property
    def bits(self) -> tuple[int, ...]:
        """The numbers of bits that were looked at."""
        return tuple(next(iter(self.layers[0].quantization.values())))

    @property
    def sampling(self) -> float:
        """The variance of the gradient over batches, of all layers."""
        return sum(layer.sampling for layer in self.layers)

    def added(self, kind: str, bits: int) -> float:
        """Return the theorem's sum: what one quantiser in all layers adds to the variance of the gradient."""
        return sum(layer.added(kind, bits) for layer in self.layers)

    def added_by_branches(self, inputs: tuple[str, int], weights: tuple[str, int]) -> float:
        """Return the same where gradients of inputs and of weights are quantised apart, each by (kind, bits)."""
        return sum(
            layer.below[inputs[0]][inputs[1]] + layer.own[weights[0]][weights[1]] for layer in self.layers
        )  # fmt: skip

    def __str__(self) -> str:
        return "\n\n".join(self._table(kind) for kind in self.kinds)

    def _table(self, kind: str) -> str:
        width = max(len("all layers"), *(len(layer.name) for layer in self.layers))
        heads = ["|gradient|²", "sampling", *(f"{bits} bits" for bits in self.bits)]
        rows = [
            (layer.name, [layer.squared_gradient, layer.sampling, *(layer.added(kind, bits) for bits in self.bits)])
            for layer in self.layers
        ]
        total = ("all layers", [sum(column) for column in zip(*(values for _, values in rows), strict=True)])
        lines = [f"{kind:<{width}}" + "".join(f"{head:>12}" for head in heads)]
        lines += [
            f"{name:<{width}}" + "".join(f"{value:>12.3g}" for value in values) for name, values in (*rows, total)
        ]
        return "\n".join(lines)

    def save(self, path: str | Path) -> None:
        """Write the report as JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> VarianceReport:
        """Read a report that `save` wrote."""
        saved = json.loads(Path(path).read_text(encoding="utf-8"))
        layers = []
        for layer in saved["layers"]:
            for name in ("quantization", "own", "below"):
                terms = layer[name].items()
                layer[name] = {kind: {int(bits): value for bits, value in row.items()} for kind, row in terms}
            layers.append(LayerVariance(**{**layer, "shape": tuple(layer["shape"])}))
        return cls(tuple(layers), saved["examples"])

    def plot(self, path: str | Path) -> None:
        """Draw variance over bits, of all layers beside that of sampling, and of each layer at 4 bits or the fewest.

        Raises:
            ConfigurationError: matplotlib is not installed.
        """
        from kaisa.quantize.drawing import draw

        draw(self, path)


@contextmanager
def _hooked(modules: Mapping[str, nn.Module], hook: Callable[[str, nn.Module, Any, Any], None]) -> Iterator[None]:
    handles = [
        module.register_forward_hook(lambda module, inputs, output, name=name: hook(name, module, inputs, output))
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Lesson(nn.Module):
    """Model and loss as one module, whose parameters can be exchanged for a call."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Any) -> Tensor:
        return self.loss(self.model, batch)


@dataclass
class _Call:
    """One call of a layer: what came in, and the gradient of what went out."""

    name: str
    layer: nn.Module
    x: Tensor
    gradient: Tensor | None = None


@dataclass
class _Gains:
    """Estimates of ‖γ_ij‖², for independent entries and for those of T ε, by own parameters and by those below."""

    plain: list[Tensor]
    reflected: list[Tensor]


def variance_report(
    model: nn.Module,
    batch: Any,
    loss: Loss | None = None,
    *,
    kinds: Sequence[str] = KINDS,
    bits: Sequence[int] = ALL_BITS,
    probes: int = 8,
    generator: torch.Generator | None = None,
) -> VarianceReport:
    """Return where the variance of the gradient on a batch comes from.

    Costs a backward pass, and a forward pass with derivatives for each probe. The model is as it was afterwards,
    gradients and running statistics included.

    Args:
        model: in float, or prepared and in the mode "exact". Layers are its Linear and Conv1d to Conv3d modules; what
            MultiheadAttention projects within is none of them.
        batch: what the loss takes; at least two examples.
        loss: of model and batch, a mean over examples; None for the cross-entropy of ``batch = (inputs, classes)``.
        kinds: quantisers to look at.
        bits: numbers of bits to look at.
        probes: random directions; the error of a term falls with their root.
        generator: of the probes, on the processor; None for one of seed 0.

    Raises:
        ConfigurationError: no layer has a gradient, or the batch holds a single example.
    """
    lesson = _Lesson(model, loss or _cross_entropy)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LAYERS)}
    with _same_noise(lesson):
        calls = _observe(lesson, layers, batch)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    gains = _gains(lesson, layers, batch, calls, probes, generator, "bhq" in kinds)
    measured = tuple(
        _layer(call, call.gradient, gain, kinds, bits)
        for call, gain in zip(calls, gains, strict=True)
        if call.gradient is not None
    )
    return VarianceReport(measured, measured[0].shape[0])


def _cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    inputs, classes = batch
    return F.cross_entropy(model(inputs), classes)


@contextmanager
def _same_noise(lesson: nn.Module) -> Iterator[None]:
    """Let dropout draw the same in every pass, and leave torch's generators as they were."""
    devices = sorted({p.device.index or 0 for p in lesson.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        yield


def _call(lesson: nn.Module, parameters: Mapping[str, Tensor], batch: Any) -> Tensor:
    """Return the loss; running statistics are those of a copy."""
    buffers = {name: buffer.clone() for name, buffer in lesson.named_buffers()}
    with sdpa_kernel(SDPBackend.MATH):  # the only attention with forward-mode derivatives
        loss: Tensor = functional_call(lesson, {**parameters, **buffers}, (batch,))
    return loss


def _observe(lesson: nn.Module, layers: Mapping[str, nn.Module], batch: Any) -> list[_Call]:
    calls: list[_Call] = []

    def watch(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        number = sum(call.layer is module for call in calls)
        call = _Call(f"{name}#{number + 1}" if number else name, module, inputs[0].detach().clone())
        calls.append(call)
        if output.requires_grad:
            output.register_hook(lambda gradient: setattr(call, "gradient", gradient))

    parameters = {name: p.detach().requires_grad_(p.requires_grad) for name, p in lesson.named_parameters()}
    with torch.enable_grad(), _hooked(layers, watch):
        loss = _call(lesson, parameters, batch)
        torch.autograd.grad(loss, [p for p in parameters.values() if p.requires_grad], allow_unused=True)
    reached = [call for call in calls if call.gradient is not None]
    if not reached:
        raise ConfigurationError(
            "no layer of the model got a gradient; give a model with Linear or Conv modules, and a loss that uses them"
        )
    if any(len(call.x) < 2 for call in reached):
        raise ConfigurationError(
            "the batch holds a single example, which has no variance of sampling; give two or more"
        )
    return calls


def _gains(
    lesson: nn.Module,
    layers: Mapping[str, nn.Module],
    batch: Any,
    calls: Sequence[_Call],
    probes: int,
    generator: torch.Generator,
    with_reflections: bool,
) -> list[_Gains]:
    gains = [_Gains([], []) for _ in calls]
    gradients = [call.gradient if with_reflections else None for call in calls]
    reflections = [None if gradient is None else reflections_of(matrix_of(gradient)) for gradient in gradients]
    for _ in range(probes):
        with _same_noise(lesson):
            tangents = _tangents(lesson, layers, batch, generator)
        for gain, transform, pair in zip(gains, reflections, tangents, strict=True):
            rows = [matrix_of(tangent) for tangent in pair]
            _add_squares(gain.plain, rows, probes)
            if transform is not None:
                _add_squares(gain.reflected, [transform.inverse_transposed(matrix) for matrix in rows], probes)
    return gains


def _add_squares(held: list[Tensor], rows: Sequence[Tensor], probes: int) -> None:
    squares = [matrix.double().square() / probes for matrix in rows]
    held[:] = [before + square for before, square in zip(held, squares, strict=True)] if held else squares


def _tangents(
    lesson: nn.Module, layers: Mapping[str, nn.Module], batch: Any, generator: torch.Generator
) -> list[tuple[Tensor, Tensor]]:
    """Return γ z at the output of each call, of the layer's own parameters and of those below, for a random z."""
    found: list[tuple[Tensor, Tensor]] = []

    def watch(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        x = forward_ad.unpack_dual(inputs[0]).primal
        primal, tangent = forward_ad.unpack_dual(output)
        tangent = torch.zeros_like(primal) if tangent is None else tangent.clone()
        own = _own_tangent(module, x)
        found.append((own, tangent - own))

    with torch.no_grad(), forward_ad.dual_level(), _hooked(layers, watch):
        _load_derivatives()
        duals = {
            name: forward_ad.make_dual(p.detach(), _probe(p, generator)) for name, p in lesson.named_parameters()
        }  # fmt: skip
        _call(lesson, duals, batch)
    return found


def _load_derivatives() -> None:
    """Let torch load what it compiles at the first use of a dual number, with a warning that no user can act on."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.script.*", category=DeprecationWarning)
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))


def _probe(parameter: Tensor, generator: torch.Generator) -> Tensor:
    """Return random signs, where they are trained."""
    signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
    return signs.to(parameter) * parameter.requires_grad


def _own_tangent(module: nn.Module, x: Tensor) -> Tensor:
    """Return how a layer's output changes with its own parameters: it is linear in them."""
    tangents = {}
    for name, parameter in module.named_parameters(recurse=False):
        tangent = forward_ad.unpack_dual(parameter).tangent
        tangents[name] = torch.zeros_like(parameter) if tangent is None else tangent.clone()
    return _forward(module, tangents, x)


def _forward(module: nn.Module, parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Return a layer's output for other parameters, without its hooks."""
    weight, bias = parameters["weight"], parameters.get("bias")
    if isinstance(module, nn.Linear):
        return F.linear(x, weight, bias)
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    output: Tensor = module._conv_forward(x, weight, bias)
    return output


def _layer(call: _Call, gradient: Tensor, gains: _Gains, kinds: Sequence[str], bits: Sequence[int]) -> LayerVariance:
    parts: tuple[dict[str, dict[int, float]], ...] = tuple({kind: {} for kind in kinds} for _ in range(3))
    for kind in kinds:
        own, below = gains.reflected if kind == "bhq" else gains.plain
        for count in bits:
            variances, reflections = code_variances(gradient, kind, count)
            everywhere = 1.0 if reflections is None else reflections.weights
            for part, gain in zip(parts, (everywhere, own, below), strict=True):
                part[kind][count] = float((variances * gain).sum())
    squared, sampling = _sampling(call, gradient)
    return LayerVariance(call.name, tuple(gradient.shape), squared, sampling, *parts)


def _sampling(call: _Call, gradient: Tensor) -> tuple[float, float]:
    """Return ‖∇θ‖² and its variance over batches: N / (N − 1) · (Σ ‖g_i‖² − ‖Σ g_i‖² / N), g_i what example i adds."""
    parameters = {name: p.detach() for name, p in call.layer.named_parameters(recurse=False) if p.requires_grad}
    fixed = {name: p.detach() for name, p in call.layer.named_parameters(recurse=False) if not p.requires_grad}

    def squared_norm(x: Tensor, gradient: Tensor) -> Tensor:
        pull: Any = vjp(lambda own: _forward(call.layer, {**fixed, **own}, x), parameters)[1]
        return torch.stack([value.double().square().sum() for value in pull(gradient)[0].values()]).sum()

    def squared_norm_of_one(x: Tensor, gradient: Tensor) -> Tensor:
        return squared_norm(x.unsqueeze(0), gradient.unsqueeze(0))

    count = len(call.x)
    if not parameters:
        return 0.0, 0.0
    each = vmap(squared_norm_of_one, chunk_size=_EXAMPLES)(call.x, gradient).sum()
    total = squared_norm(call.x, gradient)
    return float(total), float(count / (count - 1) * (each - total / count).clamp_min(0))
