"""The global methods: inputs that are made to show what a model has learned.

    filter       the input that one channel of a layer answers to most, one picture a channel
    layer        likewise for the mean of everything that a layer gives
    logit        likewise for an output of the model, one picture a target
    deepdream    an input in which what a layer finds is exaggerated
    inversion    an input that a layer cannot tell from the one given

The pictures of the first three start from noise, those of deepdream from the input. Without an input they need
``input_shape``, that of one input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kaisa.errors import ConfigurationError, DataError
from kaisa.explain.activations import mean_activation, reaching
from kaisa.explain.inversion import Descent, invert
from kaisa.explain.maximisation import Ascent, Made, Objective, Priors, dream, maximise
from kaisa.explain.modules import sensible_layer
from kaisa.explain.parametrisations import Bounds, Fourier, Parametrisation, Pixels
from kaisa.explain.registry import method
from kaisa.explain.subject import Outcome, Subject

CHANNELS_SHOWN = 4
NOISE = 0.01  # of a spectrum; ten times as much of pixels

Limit = float | Sequence[float] | None
"""A bound of the pixels: one number, or one for each channel; None for no bound."""


@method("filter", scope="global", needs="layer", summary="the input that a channel of a layer answers to most")
def filter_(
    subject: Subject,
    *,
    layer: str | None = None,
    channels: int | Sequence[int] | None = None,
    input_shape: Sequence[int] | None = None,
    steps: int = 256,
    rate: float = 0.05,
    optimiser: str = "adam",
    fourier: bool = True,
    low: Limit = None,
    high: Limit = None,
    jitter: int = 4,
    octaves: int = 1,
    scale: float = 1.4,
    priors: Priors = Priors(),  # noqa: B008 - a frozen value
) -> Outcome:
    """Makes one picture for each channel of a layer; of the first few unless ``channels`` names them."""
    ascent = Ascent(steps, rate, optimiser, jitter, octaves, scale, priors)
    studio = Studio.of(subject, ascent, input_shape, fourier, low, high)
    name = layer or _sensible_layer(subject, studio.example)
    with reaching(studio.model, name, subject.arguments) as activation:
        with torch.no_grad():
            wanted = _channels(channels, activation(studio.example))
        made = studio.make(lambda x: mean_activation(activation(x), wanted), len(wanted))
    return _outcome(made, {"layer": name, "channels": wanted.tolist()})


@method("layer", scope="global", needs="layer", summary="the input that a whole layer answers to most")
def layer_(
    subject: Subject,
    *,
    layer: str | None = None,
    input_shape: Sequence[int] | None = None,
    steps: int = 256,
    rate: float = 0.05,
    optimiser: str = "adam",
    fourier: bool = True,
    low: Limit = None,
    high: Limit = None,
    jitter: int = 4,
    octaves: int = 1,
    scale: float = 1.4,
    priors: Priors = Priors(),  # noqa: B008
) -> Outcome:
    """Makes a picture for the mean of everything that a layer gives."""
    ascent = Ascent(steps, rate, optimiser, jitter, octaves, scale, priors)
    studio = Studio.of(subject, ascent, input_shape, fourier, low, high)
    name = layer or _sensible_layer(subject, studio.example)
    with reaching(studio.model, name, subject.arguments) as activation:
        made = studio.make(lambda x: mean_activation(activation(x), None), 1)
    return _outcome(made, {"layer": name})


@method("logit", scope="global", needs="gradients", summary="the input that an output of the model answers to most")
def logit(
    subject: Subject,
    *,
    input_shape: Sequence[int] | None = None,
    steps: int = 256,
    rate: float = 0.05,
    optimiser: str = "adam",
    fourier: bool = True,
    low: Limit = None,
    high: Limit = None,
    jitter: int = 4,
    octaves: int = 1,
    scale: float = 1.4,
    priors: Priors = Priors(),  # noqa: B008
) -> Outcome:
    """Makes one picture for each output that is a target."""
    ascent = Ascent(steps, rate, optimiser, jitter, octaves, scale, priors)
    studio = Studio.of(subject, ascent, input_shape, fourier, low, high)
    wanted = _targets(subject)
    made = studio.make(lambda x: mean_activation(subject.outputs(x), wanted), len(wanted))
    return _outcome(made, {}, tuple(wanted.tolist()))


@method("deepdream", scope="global", needs="layer", summary="an input in which what a layer finds is exaggerated")
def deepdream(
    subject: Subject,
    *,
    layer: str | None = None,
    channel: int | None = None,
    octaves: int = 4,
    scale: float = 1.4,
    steps: int = 10,
    rate: float = 0.05,
    jitter: int = 4,
    low: Limit = None,
    high: Limit = None,
) -> Outcome:
    """Makes a picture of each input, for one channel of a layer or for all together."""
    image = _given(subject)
    name = layer or _sensible_layer(subject, image[:1])
    wanted = None if channel is None else torch.full((len(image),), channel)
    with reaching(_model(subject), name, subject.arguments) as activation:
        made = dream(
            lambda x: mean_activation(activation(x), wanted),
            image,
            subject.generator,
            octaves=octaves,
            scale=scale,
            steps=steps,
            rate=rate,
            jitter=jitter,
            bounds=_bounds(low, high, image),
            progress=subject.report,
        )
    return _outcome(made, {"layer": name, "channel": channel})


@method("inversion", scope="global", needs="layer", summary="an input that a layer cannot tell from the one given")
def inversion(
    subject: Subject,
    *,
    layer: str | None = None,
    steps: int = 200,
    rate: float = 0.05,
    optimiser: str = "adam",
    alpha: float = 6.0,
    alpha_weight: float = 1e-7,
    beta: float = 2.0,
    variation_weight: float = 1e-5,
) -> Outcome:
    """Makes a picture of each input from noise, knowing the features of the input alone."""
    descent = Descent(steps, rate, optimiser, alpha, alpha_weight, beta, variation_weight)
    image = _given(subject)
    name = layer or _sensible_layer(subject, image[:1])
    first = (10 * NOISE * torch.randn(image.shape, generator=subject.generator)).to(image)
    with reaching(_model(subject), name, subject.arguments) as activation:
        with torch.no_grad():
            wanted = activation(image)
        found = invert(activation, wanted, first, descent, progress=subject.report)
    quality = {"relative_distance": tuple(found.distance[-1].tolist())}
    return Outcome(found.images, "picture", quality, {"layer": name, "trace": found.loss.T.cpu()})


@dataclass(frozen=True)
class Studio:
    """Where pictures are made from noise.

    Attributes:
        subject: of whom.
        model: its module.
        example: an input of the right shape, (1, channels, *positions).
        ascent: how the objective is raised.
        form: what is optimised.
        bounds: of the pixels.
    """

    subject: Subject
    model: nn.Module
    example: Tensor
    ascent: Ascent
    form: Parametrisation
    bounds: Bounds | None

    @classmethod
    def of(
        cls,
        subject: Subject,
        ascent: Ascent,
        input_shape: Sequence[int] | None,
        fourier: bool,
        low: Limit,
        high: Limit,
    ) -> Studio:
        """Make ready; the shape is that of the inputs, if there are any."""
        model, example = _model(subject), _example(subject, input_shape)
        form: Parametrisation = Fourier() if fourier and example.ndim > 2 else Pixels()
        return cls(subject, model, example, ascent, form, _bounds(low, high, example))

    def make(self, objective: Objective, count: int) -> Made:
        """Raise an objective over so many pictures."""
        return maximise(
            objective,
            self._noise(count),
            self.ascent,
            self.subject.generator,
            parametrisation=self.form,
            bounds=self.bounds,
            progress=self.subject.report,
        )

    def _noise(self, count: int) -> Tensor:
        """Return the same noise for every picture, so that they differ by what is looked for alone."""
        if isinstance(self.form, Fourier):
            like = self.form.encode(torch.zeros_like(self.example), None)
            noise = torch.randn(like.shape, generator=self.subject.generator).to(like)
            image = self.form.decode(NOISE * noise, self.example.shape[2:], self.bounds)
        else:
            noise = torch.randn(self.example.shape, generator=self.subject.generator).to(self.example)
            image = self._centre() + 10 * NOISE * noise
            self.form.confine_(image, self.bounds)
        return image.expand(count, *image.shape[1:])

    def _centre(self) -> Tensor:
        low, high = self.bounds or (torch.zeros_like(self.example),) * 2
        return (low + high) / 2


def _outcome(made: Made, details: dict[str, Any], target: tuple[int, ...] | None = None) -> Outcome:
    quality = {"objective": tuple(made.trace[-1].tolist()), "objective_at_start": tuple(made.trace[0].tolist())}
    return Outcome(made.images, "picture", quality, {**details, "trace": made.trace.T.cpu()}, target=target)


def _model(subject: Subject) -> nn.Module:
    assert subject.model is not None  # the registry has seen to it
    return subject.model


def _sensible_layer(subject: Subject, example: Tensor) -> str:
    return sensible_layer(_model(subject), lambda: subject.outputs(example).flatten(1).amax(1).sum())


def _given(subject: Subject) -> Tensor:
    if subject.inputs.data is None:
        raise DataError("this method starts from an input, and there is none; give one, or use filter, layer or logit")
    return _floating(subject.inputs.tensor.to(subject.device))


def _floating(inputs: Tensor) -> Tensor:
    if not inputs.is_floating_point():
        raise DataError(
            f"inputs are {inputs.dtype}, which nothing can be optimised in; these methods make real numbers"
        )
    return inputs


def _example(subject: Subject, input_shape: Sequence[int] | None) -> Tensor:
    """Return an input of the shape that pictures shall have, all zeros unless there are inputs."""
    if subject.inputs.data is not None:
        given = _given(subject)[:1]
        if input_shape is not None and tuple(input_shape) != tuple(given.shape[1:]):
            raise ConfigurationError(
                f"input_shape is {tuple(input_shape)}, and inputs have {tuple(given.shape[1:])}; leave out one of them"
            )
        return given
    if input_shape is None:
        raise ConfigurationError("input_shape is missing; give that of one input, such as (3, 32, 32), or inputs")
    floating = [p.dtype for p in _model(subject).parameters() if p.is_floating_point()]
    return torch.zeros(1, *input_shape, device=subject.device, dtype=floating[0] if floating else None)


def _bounds(low: Limit, high: Limit, image: Tensor) -> Bounds | None:
    if low is None and high is None:
        return None
    if low is None or high is None:
        raise ConfigurationError(f"low is {low} and high {high}; give both, or neither")
    lowest, highest = (torch.as_tensor(limit).to(image).reshape(-1, *[1] * (image.ndim - 2)) for limit in (low, high))
    if not bool((lowest < highest).all()):
        raise ConfigurationError(f"low is {low} and high {high}; give a low below the high")
    return lowest, highest


def _channels(channels: int | Sequence[int] | None, output: Tensor) -> Tensor:
    if output.ndim < 2:
        raise ConfigurationError(f"the layer gives {tuple(output.shape)}, which has no channels; name another")
    if channels is None:
        return torch.arange(min(CHANNELS_SHOWN, output.shape[1]))
    return torch.as_tensor(channels).reshape(-1)


def _targets(subject: Subject) -> Tensor:
    wanted = subject.wanted
    if isinstance(wanted, int) or (isinstance(wanted, Sequence) and wanted and all(isinstance(w, int) for w in wanted)):
        return torch.as_tensor(wanted).reshape(-1)
    raise ConfigurationError(f"target is {wanted!r}; give the number of an output, or several for several pictures")
