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
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from kaisa.errors import ConfigurationError
from kaisa.quantize.attention import (
    Product,
    Watch,
    WatchedMultiheadAttention,
    close_bypasses,
    open_bypasses,
    projection_name,
)
from kaisa.quantize.config import EXACT
from kaisa.quantize.prepare import named_modules, quantized_layers
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
        name: of the module, and of the projection in MultiheadAttention; of its later calls with their number.
        module: the name of the module whose bits it has.
        shape: of the gradient at its output.
        squared_gradient: ‖∇θ‖² of its parameters, by this call alone.
        sampling: the variance of ∇θ over batches of this size, by this call alone: what a module's calls have in common
            for an example, the covariance between them, is left out.
        quantization: of each quantiser and number of bits, what it adds to the gradient at the output: Σ Var[ε_ij].
        own: what that becomes in ∇θ of the layer's own parameters.
        below: what it becomes in the parameters before it.
    """

    name: str
    module: str
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
        """The variance of the gradient over batches, of all layers; without covariances between calls of one module."""
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
            layer.setdefault("module", layer["name"])  # which older reports, of modules alone, do not say
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


class _Lesson(nn.Module):
    """Model and loss as one module, whose parameters can be exchanged for a call."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Any) -> Tensor:
        return self.loss(self.model, batch)


@dataclass
class _Call:
    """One product of a layer: what came in, and the gradient of what went out.

    Attributes:
        name: of the layer.
        module: of its module.
        forward: the output of an input, a weight and a bias.
        x: the input, a row an example.
        weight: as it is in this pass.
        bias: likewise.
        gradient: of the output.
    """

    name: str
    module: str
    forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    gradient: Tensor | None = None


See = Callable[[_Call, Tensor], None]
"""Is shown every call of a layer and its output."""


@contextmanager
def _watched(model: nn.Module, see: See) -> Iterator[None]:
    """Show what the layers of a model compute, while it is used."""
    modules = dict(named_modules(model))
    attentions = {name: module for name, module in modules.items() if isinstance(module, nn.MultiheadAttention)}
    handles = [
        module.register_forward_hook(_hook(name, see)) for name, module in modules.items() if isinstance(module, LAYERS)
    ]
    types = {module: type(module) for module in attentions.values()}
    closed = close_bypasses(modules.values())
    try:
        for module, kind in types.items():
            module.__class__ = WatchedMultiheadAttention if kind is nn.MultiheadAttention else kind
        for name, attention in attentions.items():
            if isinstance(attention, WatchedMultiheadAttention):
                vars(attention)["forward"] = partial(attention.forward_with, _watch(name, see))
        yield
    finally:
        for handle in handles:
            handle.remove()
        open_bypasses(closed)
        for module, kind in types.items():
            module.__class__ = kind
        for attention in attentions.values():
            vars(attention).pop("forward", None)


def _hook(name: str, see: See) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        forward: Any = F.linear if isinstance(module, nn.Linear) else module._conv_forward
        see(_Call(name, name, forward, inputs[0], module.weight, module.bias), output)  # type: ignore[arg-type]

    return hook


def _watch(name: str, see: See) -> Watch:
    def watch(product: Product, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        examples_first = x.transpose(0, 1)
        output = F.linear(examples_first, weight, bias)
        part = f"{name}.{projection_name(product, weight)}".removeprefix(".")
        see(_Call(part, name, F.linear, examples_first, weight, bias), output)
        return output.transpose(0, 1)

    return watch


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
        model: in float, or prepared and in the mode "exact". Layers are its Linear and Conv1d to Conv3d modules and the
            projections in MultiheadAttention: those that are one product of training are one layer.
        batch: what the loss takes; at least two examples.
        loss: of model and batch, a mean over examples; None for the cross-entropy of ``batch = (inputs, classes)``.
        kinds: quantisers to look at.
        bits: numbers of bits to look at.
        probes: random directions; the error of a term falls with their root.
        generator: of the probes, on the processor; None for one of seed 0.

    Raises:
        ConfigurationError: no layer has a gradient, the batch holds one example, or the model computes in few bits.
    """
    _check_mode(model)
    lesson = _Lesson(model, loss or _cross_entropy)
    with _same_noise(lesson):
        calls = _observe(lesson, batch)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    gains = _gains(lesson, batch, calls, probes, generator, "bhq" in kinds)
    measured = tuple(
        _layer(call, call.gradient, gain, kinds, bits)
        for call, gain in zip(calls, gains, strict=True)
        if call.gradient is not None
    )
    return VarianceReport(measured, measured[0].shape[0])


def _check_mode(model: nn.Module) -> None:
    modes = {layer.quantization.mode for layer in quantized_layers(model).values()} - {EXACT}
    if modes:
        raise ConfigurationError(
            f"the model computes in few bits, in mode {min(modes)!r}, so that its own quantisers would be in what is "
            "measured; call set_mode(model, 'exact') before, and set its mode again after"
        )


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


def _observe(lesson: _Lesson, batch: Any) -> list[_Call]:
    calls: list[_Call] = []

    def see(call: _Call, output: Tensor) -> None:
        number = sum(other.name.split("#")[0] == call.name for other in calls)
        name = f"{call.name}#{number + 1}" if number else call.name
        held = replace(call, name=name, x=call.x.detach().clone())
        calls.append(held)
        if output.requires_grad:
            output.register_hook(lambda gradient: setattr(held, "gradient", gradient))

    parameters = {name: p.detach().requires_grad_(p.requires_grad) for name, p in lesson.named_parameters()}
    with torch.enable_grad(), _watched(lesson.model, see):
        loss = _call(lesson, parameters, batch)
        torch.autograd.grad(loss, [p for p in parameters.values() if p.requires_grad], allow_unused=True)
    reached = [call for call in calls if call.gradient is not None]
    if not reached:
        raise ConfigurationError(
            "no layer of the model got a gradient; give a model with Linear, Conv or MultiheadAttention modules, and a "
            "loss that uses them"
        )
    if any(len(call.x) < 2 for call in reached):
        raise ConfigurationError(
            "the batch holds a single example, which has no variance of sampling; give two or more"
        )
    return calls


def _gains(
    lesson: _Lesson,
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
            tangents = _tangents(lesson, batch, generator)
        for gain, transform, pair in zip(gains, reflections, tangents, strict=True):
            rows = [matrix_of(tangent) for tangent in pair]
            _add_squares(gain.plain, rows, probes)
            if transform is not None:
                _add_squares(gain.reflected, [transform.inverse_transposed(matrix) for matrix in rows], probes)
    return gains


def _add_squares(held: list[Tensor], rows: Sequence[Tensor], probes: int) -> None:
    squares = [matrix.double().square() / probes for matrix in rows]
    held[:] = [before + square for before, square in zip(held, squares, strict=True)] if held else squares


def _tangents(lesson: _Lesson, batch: Any, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """Return γ z at the output of each call, of the layer's own parameters and of those below, for a random z."""
    found: list[tuple[Tensor, Tensor]] = []

    def see(call: _Call, output: Tensor) -> None:
        primal, tangent = forward_ad.unpack_dual(output)
        tangent = torch.zeros_like(primal) if tangent is None else tangent.clone()
        own = _own_tangent(call)
        found.append((own, tangent - own))

    with torch.no_grad(), forward_ad.dual_level(), _watched(lesson.model, see):
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


def _own_tangent(call: _Call) -> Tensor:
    """Return how a layer's output changes with its own parameters: it is linear in them."""
    x = forward_ad.unpack_dual(call.x).primal
    return call.forward(x, _tangent(call.weight), None if call.bias is None else _tangent(call.bias))


def _tangent(parameter: Tensor) -> Tensor:
    primal, tangent = forward_ad.unpack_dual(parameter)
    return torch.zeros_like(primal) if tangent is None else tangent.clone()


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
    return LayerVariance(call.name, call.module, tuple(gradient.shape), squared, sampling, *parts)


def _sampling(call: _Call, gradient: Tensor) -> tuple[float, float]:
    """Return ‖∇θ‖² and its variance over batches: N / (N − 1) · (Σ ‖g_i‖² − ‖Σ g_i‖² / N), g_i what example i adds."""
    parameters = {"weight": call.weight.detach()}
    if call.bias is not None:
        parameters["bias"] = call.bias.detach()
    trained = {name: value for name, value in parameters.items() if getattr(call, name).requires_grad}

    def forward(own: Mapping[str, Tensor], x: Tensor) -> Tensor:
        known = {**parameters, **own}
        return call.forward(x, known["weight"], known.get("bias"))

    def squared_norm(x: Tensor, gradient: Tensor) -> Tensor:
        pull: Any = vjp(lambda own: forward(own, x), trained)[1]
        return torch.stack([value.double().square().sum() for value in pull(gradient)[0].values()]).sum()

    def squared_norm_of_one(x: Tensor, gradient: Tensor) -> Tensor:
        return squared_norm(x.unsqueeze(0), gradient.unsqueeze(0))

    count = len(call.x)
    if not trained:
        return 0.0, 0.0
    each = vmap(squared_norm_of_one, chunk_size=_EXAMPLES)(call.x, gradient).sum()
    total = squared_norm(call.x, gradient)
    return float(total), float(count / (count - 1) * (each - total / count).clamp_min(0))
