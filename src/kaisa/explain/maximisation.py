"""Global explanations: the input that a filter, a layer or a logit answers to most, and DeepDream.

    normalised   θ ← θ + η g / (√mean(g²) + 1e-5)       one step of plain ascent, image by image (XDeep's, with η = 1)
    adam         Adam on −objective
    dream        θ ← θ + η g / mean|g|,  on images that grow by octaves; what shrinking had lost is added back

θ are the pixels or the spectrum (`parametrisations`). Before each evaluation the image is shifted round by up to
``jitter`` pixels, so that no pattern can hold on to the grid of the strides. No constant of any data set is in here:
the bounds of the pixels are an option, and any number of channels and positions will do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from kaisa.errors import ConfigurationError
from kaisa.explain.image_priors import alpha_norm, blur, total_variation
from kaisa.explain.parametrisations import Bounds, Parametrisation, Pixels

Objective = Callable[[Tensor], Tensor]
"""One number to raise for each image: (images, channels, *positions) to (images,)."""

Progress = Callable[[int, int], None]

OPTIMISERS = ("adam", "normalised")


@dataclass(frozen=True)
class Made:
    """Images that were made by optimisation.

    Attributes:
        images: (images, channels, *positions).
        trace: (steps + 1, images), the objective before each step and after the last.
    """

    images: Tensor
    trace: Tensor


@dataclass(frozen=True)
class Priors:
    """What keeps images from being noise.

    Attributes:
        total_variation: the weight of the total variation that is taken off the objective.
        alpha_norm: the weight of ‖x‖_6^6, likewise.
        blur_every: steps between two blurs; 0 for none. Of pixels only.
        blur: the width of a blur in pixels.

    Raises:
        ConfigurationError: a value is negative.
    """

    total_variation: float = 0.0
    alpha_norm: float = 0.0
    blur_every: int = 0
    blur: float = 0.5

    def __post_init__(self) -> None:
        for name in ("total_variation", "alpha_norm", "blur_every", "blur"):
            if getattr(self, name) < 0:
                raise ConfigurationError(f"{name} is {getattr(self, name):g}; give a number of at least 0")

    def penalty(self, image: Tensor) -> Tensor:
        """Returns what is taken off the objective of each image (images,)."""
        penalty = image.new_zeros(image.shape[0])
        if self.total_variation:
            penalty = penalty + self.total_variation * total_variation(image)
        if self.alpha_norm:
            penalty = penalty + self.alpha_norm * alpha_norm(image)
        return penalty


@dataclass(frozen=True)
class Ascent:
    """How an objective is raised.

    Attributes:
        steps: how many, for each octave.
        rate: the learning rate η.
        optimiser: "adam" or "normalised".
        jitter: the most pixels that an image is shifted by, in every dimension.
        octaves: how many sizes the image goes through.
        scale: between one size and the next.
        priors: what keeps the image from being noise.

    Raises:
        ConfigurationError: a value cannot work.
    """

    steps: int = 256
    rate: float = 0.05
    optimiser: str = "adam"
    jitter: int = 4
    octaves: int = 1
    scale: float = 1.4
    priors: Priors = Priors()

    def __post_init__(self) -> None:
        _check(self.steps, self.rate, self.jitter, self.octaves, self.scale)
        if self.optimiser not in OPTIMISERS:
            raise ConfigurationError(f"optimiser is {self.optimiser!r}; give one of {', '.join(OPTIMISERS)}")


def maximise(
    objective: Objective,
    start: Tensor,
    ascent: Ascent,
    generator: torch.Generator,
    *,
    parametrisation: Parametrisation | None = None,
    bounds: Bounds | None = None,
    progress: Progress | None = None,
) -> Made:
    """Raises an objective over images, each for itself.

    Args:
        objective: what is raised.
        start: images to start from, (images, channels, *positions).
        ascent: how.
        generator: of the shifts, on the CPU.
        parametrisation: what is optimised; pixels unless given.
        bounds: the lowest and highest value of a pixel; None for any.
        progress: told how many steps of how many are done.

    Raises:
        ConfigurationError: what is optimised cannot be blurred.
    """
    form = parametrisation or Pixels()
    if ascent.priors.blur_every and not isinstance(form, Pixels):
        raise ConfigurationError("a blur is of pixels; leave out blur_every, or give fourier=False")
    image, traces = start.detach(), []
    for octave, size in enumerate(_octave_sizes(start.shape[2:], ascent.octaves, ascent.scale)):
        tell = _after(progress, octave * ascent.steps, ascent.octaves * ascent.steps)
        made = _maximise_one_size(objective, resized(image, size), ascent, generator, form, bounds, tell)
        image = made.images
        traces.append(made.trace[:-1])
    return Made(image, torch.cat([*traces, made.trace[-1:]]))


def _maximise_one_size(
    objective: Objective,
    start: Tensor,
    ascent: Ascent,
    generator: torch.Generator,
    form: Parametrisation,
    bounds: Bounds | None,
    tell: Callable[[int], None],
) -> Made:
    positions = start.shape[2:]
    parameters = form.encode(start.detach(), bounds).requires_grad_()
    adam = torch.optim.Adam([parameters], lr=ascent.rate) if ascent.optimiser == "adam" else None
    trace = []
    for step in range(ascent.steps):
        image = form.decode(parameters, positions, bounds)
        values = objective(jittered(image, ascent.jitter, generator))
        trace.append(values.detach())
        (gradient,) = torch.autograd.grad((values - ascent.priors.penalty(image)).sum(), parameters)
        with torch.no_grad():
            if adam is None:
                parameters += ascent.rate * gradient / (_rms(gradient) + 1e-5)
            else:
                parameters.grad = -gradient
                adam.step()
            if ascent.priors.blur_every and (step + 1) % ascent.priors.blur_every == 0:
                parameters.copy_(blur(parameters, ascent.priors.blur))
            form.confine_(parameters, bounds)
        tell(step + 1)
    with torch.no_grad():
        image = form.decode(parameters, positions, bounds).detach()
        trace.append(objective(image))
    return Made(image, torch.stack(trace))


def dream(
    objective: Objective,
    image: Tensor,
    generator: torch.Generator,
    *,
    octaves: int = 4,
    scale: float = 1.4,
    steps: int = 10,
    rate: float = 0.05,
    jitter: int = 4,
    bounds: Bounds | None = None,
    progress: Progress | None = None,
) -> Made:
    """Exaggerates what an objective finds in images, from the smallest octave to the full size.

    Args:
        objective: what is raised.
        image: (images, channels, *positions).
        generator: of the shifts, on the CPU.
        octaves: how many sizes.
        scale: between one size and the next.
        steps: of each size.
        rate: η, in units of the image; the step is divided by the mean size of the gradient.
        jitter: the most pixels that an image is shifted by.
        bounds: the lowest and highest value of a pixel; None for any.
        progress: told how many steps of how many are done.

    Raises:
        ConfigurationError: a number cannot work.
    """
    _check(steps, rate, jitter, octaves, scale)
    original, trace, dreamt = image.detach(), [], image.detach()
    for octave, size in enumerate(_octave_sizes(original.shape[2:], octaves, scale)):
        tell = _after(progress, octave * steps, octaves * steps)
        # All that was dreamt so far, and what the image of this size has and the last, smaller one had not.
        smaller, current = resized(original, dreamt.shape[2:]), resized(original, size)
        dreamt = current if octave == 0 else resized(dreamt, size) + current - resized(smaller, size)
        for step in range(steps):
            dreamt = dreamt.detach().requires_grad_()
            values = objective(jittered(dreamt, jitter, generator))
            trace.append(values.detach())
            (gradient,) = torch.autograd.grad(values.sum(), dreamt)
            with torch.no_grad():
                mean = _for_each(gradient.abs().flatten(1).mean(1), gradient)
                dreamt = dreamt + rate * gradient / mean.clamp(min=torch.finfo(gradient.dtype).tiny)
                dreamt = dreamt if bounds is None else dreamt.clamp(*bounds)
            tell(step + 1)
    with torch.no_grad():
        trace.append(objective(dreamt))
    return Made(dreamt.detach(), torch.stack(trace))


def _check(steps: int, rate: float, jitter: int, octaves: int, scale: float) -> None:
    if steps < 1 or rate <= 0:
        raise ConfigurationError(f"steps is {steps} and rate {rate:g}; give positive numbers")
    if octaves < 1 or scale <= 1:
        raise ConfigurationError(f"octaves is {octaves} and scale {scale:g}; give 1 or more, and a scale above 1")
    if jitter < 0:
        raise ConfigurationError(f"jitter is {jitter}; give a number of pixels, 0 for none")


def _after(progress: Progress | None, before: int, total: int) -> Callable[[int], None]:
    def tell(done: int) -> None:
        if progress is not None:
            progress(before + done, total)

    return tell


def _octave_sizes(positions: Sequence[int], octaves: int, scale: float) -> Iterator[tuple[int, ...]]:
    for octave in reversed(range(octaves)):
        yield tuple(max(1, round(size / scale**octave)) for size in positions)


def resized(image: Tensor, positions: Sequence[int]) -> Tensor:
    """Returns images of other sizes, interpolated linearly, and averaged where they shrink."""
    if tuple(image.shape[2:]) == tuple(positions):
        return image
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(positions)]
    smooth = len(positions) == 2
    return functional.interpolate(image, tuple(positions), mode=mode, align_corners=False, antialias=smooth)


def jittered(image: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Returns the images shifted round in every dimension by up to so many pixels, all alike."""
    dimensions = tuple(range(2, image.ndim))
    if most == 0 or not dimensions:
        return image
    shifts = torch.randint(-most, most + 1, (len(dimensions),), generator=generator).tolist()
    return torch.roll(image, shifts, dimensions)


def _rms(gradient: Tensor) -> Tensor:
    return _for_each(gradient.square().flatten(1).mean(1).sqrt(), gradient)


def _for_each(numbers: Tensor, like: Tensor) -> Tensor:
    """Returns one number an image in the shape of images."""
    return numbers.reshape(-1, *[1] * (like.ndim - 1))
