"""How images with objects come in batches: read ahead, mirrored at random, in the order of `kaisa.recipes.order`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from kaisa.recipes.detectors import REGIONS
from kaisa.recipes.images import WORKERS
from kaisa.recipes.order import epoch_generator, part_of, whole_batches
from kaisa.recipes.scenes import BOXES, CROWD, LABELS, MASKS, Objects, Scenes

CPU = torch.device("cpu")

Shown = tuple[Sequence[Tensor], Sequence[Objects]]
"""Images as floats from 0 to 1, and what is in them."""


@dataclass(frozen=True)
class SceneBatches:
    """The batches of every epoch; the images that fill no whole batch wait for another epoch.

    Attributes:
        scenes: what is learned from.
        size: images in a batch, of all ranks together.
        augment: whether images are mirrored at random.
        seed: of order and augmentation.
        device: where the batches are used.
        rank, ranks: which of how many equal parts of each batch is yielded; ``ranks`` divides the size.
        workers: threads that decode the next batch while this one is learned from.
    """

    scenes: Scenes
    size: int
    augment: bool
    seed: int
    device: torch.device = CPU
    rank: int = 0
    ranks: int = 1
    workers: int = WORKERS

    @property
    def terms(self) -> int:
        """Regions whose losses are averaged in one batch of this rank."""
        return self.size // self.ranks * REGIONS

    def __len__(self) -> int:
        return len(self.scenes) // self.size

    def epoch(self, number: int) -> Iterator[tuple[Shown, Tensor]]:
        """Yield images with what is in them, and their numbers, of one epoch, counted from 0."""
        generator = epoch_generator(self.seed, number)
        with ThreadPoolExecutor(self.workers) as readers:
            ahead = None
            for rows in whole_batches(len(self.scenes), self.size, generator):
                mirrored = torch.rand(self.size, generator=generator) < 0.5
                own, ways = (part_of(part, self.rank, self.ranks) for part in (rows, mirrored & self.augment))
                each = zip(own.tolist(), ways.tolist(), strict=True)
                reading = own, [readers.submit(self._read, *one) for one in each]
                if ahead is not None:
                    yield self._given(*ahead)
                ahead = reading
            if ahead is not None:
                yield self._given(*ahead)

    def _read(self, row: int, is_mirrored: bool) -> tuple[Tensor, Objects]:
        image, objects = read(self.scenes, row)
        return mirror(image, objects) if is_mirrored else (image, objects)

    def _given(self, rows: Tensor, reading: Sequence[Any]) -> tuple[Shown, Tensor]:
        images, objects = zip(*(future.result() for future in reading), strict=True)
        return (
            [image.to(self.device) for image in images],
            [{name: values.to(self.device) for name, values in one.items()} for one in objects],
        ), rows.to(self.device)


@dataclass(frozen=True)
class SceneTests:
    """All that is tested on as one batch, for average precision is of all at once; images are read one at a time.

    Attributes:
        scenes: all of them.
        device: where they are used.
    """

    scenes: Scenes
    device: torch.device = CPU

    def __iter__(self) -> Iterator[tuple[Shown, Tensor]]:
        yield (_Part(self, 0), _Part(self, 1)), torch.arange(len(self.scenes), device=self.device)


class _Part(Sequence[Any]):
    """Images, or what is in them, read when asked for."""

    def __init__(self, tests: SceneTests, part: int) -> None:
        self._tests, self._part = tests, part

    def __len__(self) -> int:
        return len(self._tests.scenes)

    @overload
    def __getitem__(self, row: int) -> Any: ...

    @overload
    def __getitem__(self, row: slice) -> Sequence[Any]: ...

    def __getitem__(self, row: int | slice) -> Any:
        if isinstance(row, slice):
            return [self[one] for one in range(*row.indices(len(self)))]
        if not 0 <= row < len(self):
            raise IndexError(row)
        scenes, device = self._tests.scenes, self._tests.device
        if self._part:
            return {name: values.to(device) for name, values in scenes.objects(row).items()}
        return _floats(scenes.image(row)).to(device)


def read(scenes: Scenes, row: int) -> tuple[Tensor, Objects]:
    """Return an image as floats from 0 to 1, and what is in it."""
    return _floats(scenes.image(row)), scenes.objects(row)


def _floats(image: Tensor) -> Tensor:
    return image.float() / 255


def mirror(image: Tensor, objects: Objects) -> tuple[Tensor, Objects]:
    """Swap left and right."""
    left, top, right, bottom = objects[BOXES].unbind(1)
    width = image.shape[-1]
    return image.flip(-1), {
        BOXES: torch.stack([width - right, top, width - left, bottom], 1),
        LABELS: objects[LABELS],
        MASKS: objects[MASKS].flip(-1),
        CROWD: objects[CROWD],
    }
