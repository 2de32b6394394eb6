"""Random crops of images and masks, turned and mirrored in all eight ways of a square.

An epoch shows each image as many times as crops cover it, so that it sees about as many pixels as there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kaisa.recipes.batches import Normalizer
from kaisa.recipes.masks import MaskedImages
from kaisa.recipes.order import epoch_generator, part_of, whole_batches
from kaisa.recipes.tasks import Example

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Crops:
    """The crops of every epoch.

    Attributes:
        images: what is learned from.
        normalize: from bytes to the model's input.
        side: of a crop, in pixels.
        size: crops in a batch, of all ranks together.
        augment: whether crops are turned and mirrored.
        seed: of order, places and augmentation.
        device: where the batches are used.
        rank, ranks: which of how many equal parts of each batch is yielded; ``ranks`` divides the size.
    """

    images: MaskedImages
    normalize: Normalizer
    side: int
    size: int
    augment: bool
    seed: int
    device: torch.device = CPU
    rank: int = 0
    ranks: int = 1

    @property
    def count(self) -> int:
        """How many crops an epoch has, before what fills no batch is left out."""
        return self.count_of(self.images, self.side)

    @staticmethod
    def count_of(images: MaskedImages, side: int) -> int:
        """Return how many crops cover all images."""
        _, height, width = images.shape
        return len(images) * -(-height // side) * -(-width // side)

    def __len__(self) -> int:
        return self.count // self.size

    @property
    def terms(self) -> int:
        """Pixels in one batch of this rank."""
        return self.size // self.ranks * self.side * self.side

    def epoch(self, number: int) -> Iterator[Example]:
        """Yield crops (batch, channels, side, side) and masks (batch, side, side) of an epoch, counted from 0."""
        generator = epoch_generator(self.seed, number)
        for rows in whole_batches(self.count, self.size, generator):
            pixels, masks = crop(self.images, rows % len(self.images), self.side, generator)
            if self.augment:
                pixels, masks = turn(pixels, masks, generator)
            inputs = self.normalize(part_of(pixels, self.rank, self.ranks)).to(self.device)
            yield inputs, part_of(masks, self.rank, self.ranks).float().to(self.device)


@dataclass(frozen=True)
class WholeImages:
    """Images as they are, one at a time: what is tested on.

    Attributes:
        images: all of them.
        normalize: from bytes to the model's input.
        grain: what height and width are cut down to a multiple of.
        device: where they are used.
    """

    images: MaskedImages
    normalize: Normalizer
    grain: int
    device: torch.device = CPU

    def __iter__(self) -> Iterator[Example]:
        _, height, width = self.images.shape
        rows, columns = slice(height // self.grain * self.grain), slice(width // self.grain * self.grain)
        for pixels, mask in zip(self.images.pixels.split(1), self.images.masks.split(1), strict=True):
            inputs = self.normalize(pixels[..., rows, columns]).to(self.device)
            yield inputs, mask[..., rows, columns].float().to(self.device)


def crop(images: MaskedImages, rows: Tensor, side: int, generator: torch.Generator) -> Example:
    """Return a square of each image and of its mask, at a random place."""
    _, height, width = images.shape
    tops = torch.randint(height - side + 1, (len(rows),), generator=generator)
    lefts = torch.randint(width - side + 1, (len(rows),), generator=generator)
    within = torch.arange(side)
    down, right = (tops[:, None] + within)[:, :, None], (lefts[:, None] + within)[:, None, :]
    masks = images.masks[rows[:, None, None], down, right]
    return images.pixels.permute(0, 2, 3, 1)[rows[:, None, None], down, right].permute(0, 3, 1, 2), masks


def turn(pixels: Tensor, masks: Tensor, generator: torch.Generator) -> Example:
    """Turn and mirror each crop with its mask in one of the eight ways of a square."""
    ways = torch.randint(8, (len(masks),), generator=generator).tolist()
    return tuple(torch.stack([_turned(x, way) for x, way in zip(part, ways, strict=True)]) for part in (pixels, masks))  # type: ignore[return-value]


def _turned(x: Tensor, way: int) -> Tensor:
    turned = x.rot90(way % 4, (-2, -1))
    return turned.flip(-1) if way >= 4 else turned
