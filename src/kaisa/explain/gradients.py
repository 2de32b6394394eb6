"""Local explanations by gradients of the score at the input, through Captum.

    saliency               ∂S/∂x
    guided_backprop        the same, where every ReLU passes back only what is positive
    integrated_gradients   (x − x′) · mean of ∂S/∂x along the line from the baseline x′ to x
    smoothgrad             mean of ∂S/∂x over noisy copies of x
    guided_…               integrated_gradients and smoothgrad of guided gradients

Tokens are explained at the embeddings that the model looks up for them: one number for each token, the sum over the
embedding of what completes to the score (integrated gradients), the norm of what does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kaisa.curvature import outputs_of
from kaisa.errors import ConfigurationError
from kaisa.explain.needs import load
from kaisa.explain.registry import method
from kaisa.explain.subject import Outcome, Subject

Attribute = Callable[["Differentiable", Tensor], Tensor]


@method("saliency", scope="local", needs="gradients", summary="the gradient of the score at the input")
def saliency(subject: Subject, *, absolute: bool = False) -> Outcome:
    """Explain by the gradient of the score; `absolute` drops its sign (Simonyan and others 2014)."""
    return _gradient(subject, absolute, guided=False)


@method(
    "guided_backprop", scope="local", needs="gradients", summary="the gradient, with ReLUs passing what is positive"
)
def guided_backprop(subject: Subject, *, absolute: bool = False) -> Outcome:
    """Explain by guided backpropagation (Springenberg and others 2015).

    Every ReLU is guided, `nn.ReLU` and `torch.relu` and `F.relu` alike.

    Raises:
        ConfigurationError: the model calls no ReLU.
    """
    return _gradient(subject, absolute, guided=True)


@method("smoothgrad", scope="local", needs="gradients", summary="the mean gradient over noisy copies of the input")
def smoothgrad(subject: Subject, *, samples: int = 50, noise: float = 0.15, absolute: bool = False) -> Outcome:
    """Explain by SmoothGrad (Smilkov and others 2017).

    Args:
        subject: what is explained.
        samples: noisy copies of each input.
        noise: standard deviation of the noise, in parts of the range of the input's values.
        absolute: average absolute gradients.
    """
    return _smooth(subject, samples, noise, absolute, guided=False)


@method("guided_smoothgrad", scope="local", needs="gradients", summary="the mean guided gradient over noisy copies")
def guided_smoothgrad(subject: Subject, *, samples: int = 50, noise: float = 0.15, absolute: bool = False) -> Outcome:
    """Explain by SmoothGrad of guided gradients; options as `smoothgrad`."""
    return _smooth(subject, samples, noise, absolute, guided=True)


@method(
    "integrated_gradients", scope="local", needs="gradients", summary="what each input adds on the way from a baseline"
)
def integrated_gradients(
    subject: Subject, *, baseline: float | Tensor | None = None, steps: int = 50, multiply_by_inputs: bool = True
) -> Outcome:
    """Explain by integrated gradients (Sundararajan and others 2017).

    The figure `completeness_gap` is |Σ values − (S(x) − S(x′))|, which is zero for an exact integral.

    Args:
        subject: what is explained.
        baseline: x′: a number, or a tensor that can be expanded to the inputs; zeros by default. For tokens the id of
            the token that says nothing; by default embeddings of zeros.
        steps: points of the Gauss–Legendre rule.
        multiply_by_inputs: give contributions; otherwise the mean gradient.
    """
    return _integrated(subject, baseline, steps, multiply_by_inputs, guided=False)


@method(
    "guided_integrated_gradients", scope="local", needs="gradients", summary="integrated gradients of guided gradients"
)
def guided_integrated_gradients(
    subject: Subject, *, baseline: float | Tensor | None = None, steps: int = 50, multiply_by_inputs: bool = True
) -> Outcome:
    """Explain by guided gradients along the path; they do not complete, as `completeness_gap` says."""
    return _integrated(subject, baseline, steps, multiply_by_inputs, guided=True)


class Differentiable(nn.Module):
    """The model as a function of floating-point inputs; of embeddings, where its one input is tokens."""

    def __init__(self, subject: Subject, guided: bool = False) -> None:
        super().__init__()
        self._subject = subject
        self._guided = guided
        self._embedding = embedding_of(subject) if not subject.inputs.tensor.is_floating_point() else None

    @property
    def inputs(self) -> Tensor:
        """What gradients are taken by."""
        data = self._subject.inputs.tensor
        return data if self._embedding is None else self.embedded(data)

    @property
    def target(self) -> Any:
        """The target as Captum takes it."""
        assert self._subject.target is not None
        return self._subject.target.indices

    def embedded(self, tokens: Tensor) -> Tensor:
        """Return the embeddings of tokens."""
        assert self._embedding is not None
        with torch.no_grad():
            return outputs_of(self._embedding(tokens.to(self._subject.device))).detach()

    def forward(self, inputs: Tensor) -> Tensor:
        assert self._subject.target is not None
        guide = _GuideReLUs()
        with _substituted(self._embedding, inputs):
            tokens = self._subject.inputs.tensor
            given = inputs if self._embedding is None else tokens.expand(len(inputs), -1)
            if self._guided:
                with guide:
                    outputs = self._subject.outputs(given)
            else:
                outputs = self._subject.outputs(given)
        if self._guided and not guide.met:
            raise ConfigurationError(
                "guided methods guide ReLUs, and the model calls none; use the method without guided_"
            )
        return self._subject.target.scored(outputs)


def embedding_of(subject: Subject) -> nn.Module:
    """Return the module that looks up the embeddings of the subject's tokens.

    Raises:
        ConfigurationError: the model has none, so that there is nothing to differentiate by.
    """
    assert subject.model is not None
    tokens = subject.inputs.tensor
    found: list[nn.Module] = []

    def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if inputs and isinstance(inputs[0], Tensor) and torch.equal(inputs[0].cpu(), tokens.cpu()):
            found.append(module)

    handles = [
        module.register_forward_hook(note) for module in subject.model.modules() if isinstance(module, nn.Embedding)
    ]
    try:
        with torch.no_grad():
            subject.outputs(tokens)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise ConfigurationError(
            "inputs are integers, and the model looks up no nn.Embedding for them: nothing to differentiate by; "
            "use a method that perturbs (lime, kernelshap, anchors, cle)"
        )
    return found[0]


class _substituted:
    """Makes an embedding give these vectors, as long as it is open."""

    def __init__(self, embedding: nn.Module | None, vectors: Tensor) -> None:
        self._embedding, self._vectors = embedding, vectors

    def __enter__(self) -> None:
        if self._embedding is not None:
            self._handle = self._embedding.register_forward_hook(lambda module, inputs, output: self._vectors)

    def __exit__(self, *error: object) -> None:
        if self._embedding is not None:
            self._handle.remove()


class _GuidedReLU(torch.autograd.Function):
    """ReLU that passes back only what is positive: δ · [output > 0] · [δ > 0]."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        output = inputs.clamp(min=0)
        ctx.save_for_backward(output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (output,) = ctx.saved_tensors
        passed: Tensor = gradients[0].clamp(min=0) * (output > 0)
        return passed


class _GuideReLUs(TorchFunctionMode):
    """Guides every ReLU that is called, however it is written: a hook on modules would miss `F.relu`."""

    PLAIN = (F.relu, torch.relu, Tensor.relu)
    IN_PLACE = (F.relu_, torch.relu_, Tensor.relu_)

    def __init__(self) -> None:
        super().__init__()
        self.met = False

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(options or {})
        if function not in self.PLAIN and function not in self.IN_PLACE:
            return function(*arguments, **named)
        self.met = True
        inputs = arguments[0] if arguments else named["input"]
        output: Tensor = _GuidedReLU.apply(inputs)  # type: ignore[no-untyped-call]
        is_in_place = function in self.IN_PLACE or named.get("inplace", False)  # so F.relu hands its argument on
        return inputs.copy_(output) if is_in_place else output


def _gradient(subject: Subject, absolute: bool, guided: bool) -> Outcome:
    _check_bool("absolute", absolute)
    attr = load("captum.attr", "an explanation by gradients")

    def attribute(model: Differentiable, inputs: Tensor) -> Tensor:
        return attr.Saliency(model).attribute(inputs, target=model.target, abs=absolute)  # type: ignore[no-any-return]

    values = [norm(subject, found) for found in _each(subject, attribute, guided)]
    return Outcome(torch.cat(values), _kind(subject))


def _smooth(subject: Subject, samples: int, noise: float, absolute: bool, guided: bool) -> Outcome:
    _check_count("samples", samples)
    _check_bool("absolute", absolute)
    if not isinstance(noise, int | float) or not 0 <= noise < float("inf"):
        raise ConfigurationError(f"noise is {noise!r}; expected a number of at least 0, in parts of the input's range")
    attr = load("captum.attr", "an explanation by gradients")

    def attribute(model: Differentiable, inputs: Tensor) -> Tensor:
        spread = noise * float(inputs.detach().max() - inputs.detach().min())
        tunnel = attr.NoiseTunnel(attr.Saliency(model))
        return tunnel.attribute(  # type: ignore[no-any-return]
            inputs,
            nt_type="smoothgrad",
            nt_samples=samples,
            nt_samples_batch_size=min(samples, subject.batch_size),
            stdevs=spread,
            target=model.target,
            abs=absolute,
        )

    values = [norm(subject, found) for found in _each(subject, attribute, guided)]
    return Outcome(torch.cat(values), _kind(subject))


def _integrated(subject: Subject, baseline: Any, steps: int, multiply: bool, guided: bool) -> Outcome:
    _check_count("steps", steps)
    _check_bool("multiply_by_inputs", multiply)
    attr = load("captum.attr", "an explanation by gradients")
    baselines = _baselines(subject, baseline)
    gaps = []
    rows = iter(range(len(subject.inputs)))

    def attribute(model: Differentiable, inputs: Tensor) -> Tensor:
        start = baselines[next(rows)]
        start = torch.zeros_like(inputs) if start is None else start
        start = start if start.is_floating_point() else model.embedded(start)
        values, gap = attr.IntegratedGradients(model, multiply_by_inputs=multiply).attribute(
            inputs,
            baselines=start.to(inputs),
            target=model.target,
            n_steps=steps,
            internal_batch_size=subject.batch_size,
            return_convergence_delta=True,
        )
        gaps.append(abs(float(gap)))
        return values  # type: ignore[no-any-return]

    values = [
        _total(subject, found) if multiply else norm(subject, found) for found in _each(subject, attribute, guided)
    ]
    quality = {"completeness_gap": tuple(gaps)} if multiply else {}
    return Outcome(torch.cat(values), _kind(subject), quality)


def _each(subject: Subject, attribute: Attribute, guided: bool) -> list[Tensor]:
    """Attribute to one input after the other: each has its own range, baseline and progress."""
    count = len(subject.inputs)
    values = []
    for row in range(count):
        model = Differentiable(subject.one(row), guided)
        inputs = model.inputs.detach().clone().requires_grad_()
        with torch.enable_grad():
            values.append(attribute(model, inputs).detach())
        subject.report(row + 1, count)
    return values


def _baselines(subject: Subject, baseline: Any) -> list[Tensor | None]:
    """Return the baseline of each input: as shaped as the inputs, token ids for tokens, or None for zeros."""
    data = subject.inputs.tensor
    if baseline is None:
        return [None] * len(data)
    try:
        start = torch.as_tensor(baseline, dtype=data.dtype, device=data.device).expand_as(data)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConfigurationError(
            f"baseline cannot be expanded to inputs of shape {tuple(data.shape)}: {error}"
        ) from error
    return [start[row : row + 1] for row in range(len(data))]


def norm(subject: Subject, values: Tensor) -> Tensor:
    """Return one number for each token, the norm over its embedding; other values as they are."""
    return values.norm(dim=-1) if not subject.inputs.tensor.is_floating_point() else values


def _total(subject: Subject, values: Tensor) -> Tensor:
    return values.sum(-1) if not subject.inputs.tensor.is_floating_point() else values


def _kind(subject: Subject) -> str:
    return {"tokens": "tokens", "rows": "features"}.get(subject.inputs.kind, "map")


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigurationError(f"{name} is {value!r}; expected an int of at least 1")


def _check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ConfigurationError(f"{name} is {value!r}; expected True or False")
