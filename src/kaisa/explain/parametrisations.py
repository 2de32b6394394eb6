"""What is optimised in the place of an image: its pixels, or its spectrum.

Both are pairs of functions with ``decode(encode(x)) == x`` for every x inside the bounds:

    Pixels    x = θ, put back inside the bounds after every step
    Fourier   x = low + (high − low) σ(C irfft(s F) / 4),  s = 1 / max(f, 1 / longest side)

The spectrum weighs low frequencies as natural images have them, so that a step changes whole areas and not single
pixels (Olah, Mordvintsev & Schubert 2017, "Feature Visualization"). C mixes the channels as the images of a data set
do; without it channels are independent, however many there are.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from kaisa.errors import ConfigurationError

Bounds = tuple[Tensor, Tensor]
"""The lowest and the highest value of a pixel: of shapes that broadcast over (images, channels, *positions)."""

_MARGIN = 1e-4  # of the range: what lies on a bound is at infinity for a sigmoid


class Parametrisation(ABC):
    """How an image is made of what is optimised."""

    @abstractmethod
    def encode(self, image: Tensor, bounds: Bounds | None) -> Tensor:
        """Returns the parameters of images (images, channels, *positions)."""

    @abstractmethod
    def decode(self, parameters: Tensor, positions: torch.Size, bounds: Bounds | None) -> Tensor:
        """Returns the images of parameters; ``positions`` are their sizes."""

    @abstractmethod
    def confine_(self, parameters: Tensor, bounds: Bounds | None) -> None:
        """Puts parameters back in place after a step so that the images keep inside the bounds."""


@dataclass(frozen=True)
class Pixels(Parametrisation):
    """The image itself."""

    def encode(self, image: Tensor, bounds: Bounds | None) -> Tensor:
        return image.clone()

    def decode(self, parameters: Tensor, positions: torch.Size, bounds: Bounds | None) -> Tensor:
        return parameters

    def confine_(self, parameters: Tensor, bounds: Bounds | None) -> None:
        if bounds is not None:
            parameters.clamp_(*bounds)


@dataclass(frozen=True)
class Fourier(Parametrisation):
    """The spectrum of the image, low frequencies first.

    Attributes:
        colours: C, (channels, channels), as ``colour_correlation`` returns it; None for independent channels.
        decay: the power with which amplitudes fall with the frequency.
    """

    colours: Tensor | None = None
    decay: float = 1.0

    def encode(self, image: Tensor, bounds: Bounds | None) -> Tensor:
        if image.ndim < 3:
            raise ConfigurationError(
                f"inputs of shape {tuple(image.shape)} have no positions, and so no spectrum; give fourier=False"
            )
        if bounds is not None:
            low, high = bounds
            share = ((image - low) / (high - low)).clamp(_MARGIN, 1 - _MARGIN)
            image = torch.logit(share)
        image = 4 * image
        if self.colours is not None:
            image = torch.einsum("dc,nc...->nd...", torch.linalg.inv(self.colours.to(image)), image)
        spectrum = torch.fft.rfftn(image, dim=_positions_of(image), norm="ortho")
        return torch.view_as_real(spectrum / self._scale(image.shape[2:], image)).contiguous()

    def decode(self, parameters: Tensor, positions: torch.Size, bounds: Bounds | None) -> Tensor:
        spectrum = torch.view_as_complex(parameters) * self._scale(positions, parameters)
        image = torch.fft.irfftn(spectrum, s=tuple(positions), dim=_positions_of(spectrum), norm="ortho")
        if self.colours is not None:
            image = torch.einsum("dc,nc...->nd...", self.colours.to(image), image)
        image = image / 4
        if bounds is None:
            return torch.as_tensor(image)
        low, high = bounds
        bounded: Tensor = low + (high - low) * torch.sigmoid(image)
        return bounded

    def confine_(self, parameters: Tensor, bounds: Bounds | None) -> None:
        pass  # a sigmoid keeps to them

    def _scale(self, positions: torch.Size, like: Tensor) -> Tensor:
        sizes = tuple(positions)
        axes = [torch.fft.fftfreq(size, dtype=like.dtype, device=like.device) for size in sizes[:-1]]
        axes.append(torch.fft.rfftfreq(sizes[-1], dtype=like.dtype, device=like.device))
        grid = torch.meshgrid(*axes, indexing="ij")
        frequency = torch.stack(grid).square().sum(0).sqrt()
        return frequency.clamp(min=1 / max(sizes)).pow(-self.decay)


def _positions_of(image: Tensor) -> tuple[int, ...]:
    return tuple(range(2, image.ndim))


def colour_correlation(images: Tensor) -> Tensor:
    """Returns the matrix (channels, channels) that gives independent channels the correlations that images have.

    It is the symmetric root of the covariance over all pixels, scaled so that its longest column has length 1.

    Args:
        images: (images, channels, *positions) of the data.
    """
    pixels = images.movedim(1, -1).flatten(0, -2).double()
    centred = pixels - pixels.mean(0)
    values, vectors = torch.linalg.eigh(centred.mT @ centred / len(pixels))
    root = vectors @ torch.diag(values.clamp(min=0).sqrt() + 1e-4 * values.amax().sqrt()) @ vectors.mT
    scaled: Tensor = root / root.norm(dim=0).amax()
    return scaled.to(images.dtype)
