"""How images come in batches and how they are varied, in the order that `kaisa.recipes.order` draws."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from kaisa.recipes.images import Images
from kaisa.recipes.masks import MaskedImages
from kaisa.recipes.order import epoch_generator, part_of, whole_batches
from kaisa.recipes.tasks import Example

CPU = torch.device("cpu")
BORDER = 4  # pixels that a crop may be shifted by, as He et al. 2016 do on CIFAR-10


@dataclass(frozen=True)
class Normalizer:
    """Makes floats of bytes, each channel with mean 0 and standard deviation 1.

    Attributes:
        mean: of each channel over the training images, of shape (channels, 1, 1).
        deviation: the standard deviation, likewise; 1 for a channel without variation.
    """

    mean: Tensor
    deviation: Tensor

    @classmethod
    def fit(cls, images: Images | MaskedImages) -> Normalizer:
        """Measure the training images."""
        channels = images.pixels.unbind(1)
        counts = torch.stack([c.flatten().bincount(minlength=256) for c in channels]).double()
        shares = counts / counts.sum(1, keepdim=True)
        shades = torch.arange(256, dtype=torch.float64)
        mean = shares @ shades
        variance = (shares * (shades - mean[:, None]) ** 2).sum(1)
        deviation = torch.where(variance > 0, variance.sqrt(), torch.ones_like(variance))
        return cls(mean.float().view(-1, 1, 1), deviation.float().view(-1, 1, 1))

    def describe(self) -> dict[str, list[float]]:
        """Return what a record says of it."""
        return {"mean": self.mean.flatten().tolist(), "deviation": self.deviation.flatten().tolist()}

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return the pixels as the model sees them."""
        return (pixels.float() - self.mean) / self.deviation


EVALUATED_AT_ONCE = 1000  # at most


@dataclass(frozen=True)
class ImageBatches:
    """The batches of every epoch; the images that fill no whole batch wait for another epoch.

    Attributes:
        images: what is learned from.
        normalize: from bytes to the model's input.
        size: images in a batch, of all ranks together.
        augment: whether images are shifted and mirrored at random.
        seed: of order and augmentation.
        device: where the batches are used.
        rank, ranks: which of how many equal parts of each batch is yielded; ``ranks`` divides the size.
    """

    images: Images
    normalize: Normalizer
    size: int
    augment: bool
    seed: int
    device: torch.device = CPU
    rank: int = 0
    ranks: int = 1

    @property
    def terms(self) -> None:
        """The loss has one term for each image."""

    def __len__(self) -> int:
        return len(self.images) // self.size

    def epoch(self, number: int) -> Iterator[Example]:
        """Yield inputs and labels of one epoch, counted from 0."""
        generator = epoch_generator(self.seed, number)
        for rows in whole_batches(len(self.images), self.size, generator):
            pixels = self.images.pixels[rows]
            if self.augment:
                pixels = mirror(shift(pixels, generator), generator)
            inputs = self.normalize(self._part(pixels)).to(self.device)
            yield inputs, self.images.labels[self._part(rows)].to(self.device)

    def _part(self, batch: Tensor) -> Tensor:
        return part_of(batch, self.rank, self.ranks)


@dataclass(frozen=True)
class ImageTests:
    """Images as they are, in order.

    Attributes:
        images: what is tested on.
        normalize: from bytes to the model's input.
        device: where they are used.
        size: images at once.
    """

    images: Images
    normalize: Normalizer
    device: torch.device = CPU
    size: int = EVALUATED_AT_ONCE

    def __iter__(self) -> Iterator[Example]:
        for rows in torch.arange(len(self.images)).split(self.size):
            inputs = self.normalize(self.images.pixels[rows]).to(self.device)
            yield inputs, self.images.labels[rows].to(self.device)


def shift(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Move each image by up to `BORDER` pixels in both directions; what comes in is black."""
    count, _, height, width = pixels.shape
    padded = functional.pad(pixels, (BORDER, BORDER, BORDER, BORDER))
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    down, right = torch.randint(2 * BORDER + 1, (2, count), generator=generator)
    return windows[torch.arange(count), :, down, right]


def mirror(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Swap left and right in about half of the images."""
    chosen = torch.rand(len(pixels), generator=generator) < 0.5
    return torch.where(chosen.view(-1, 1, 1, 1), pixels.flip(-1), pixels)
