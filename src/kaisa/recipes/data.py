"""What a comparison learns from and is tested on, as its options say."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kaisa.errors import ConfigurationError, DataError
from kaisa.recipes.batches import ImageBatches, ImageTests, Normalizer
from kaisa.recipes.catalogue import IMAGES, MASKED_IMAGES, SCENES, find_model
from kaisa.recipes.contestants import outside
from kaisa.recipes.crops import Crops, WholeImages
from kaisa.recipes.detection import SceneBatches, SceneTests
from kaisa.recipes.detectors import MaskRCNN
from kaisa.recipes.digits import read_digits
from kaisa.recipes.images import (
    Images,
    Progress,
    find_test_data,
    hold_out,
    match_images,
    read_images,
)
from kaisa.recipes.masks import MaskedImages, read_masked_images, split_masked_images
from kaisa.recipes.options import Options
from kaisa.recipes.scenes import Scenes, read_scenes
from kaisa.recipes.sequences import Sequences, TestSequences
from kaisa.recipes.tasks import MASKED_TOKEN, Lesson
from kaisa.recipes.text import Text, read_text
from kaisa.recipes.unet import GRAIN

HELD_OUT = 0.2  # the share of the images that are tested on, where there are no others
SEQUENCES_AT_ONCE = 64


class Data(Protocol):
    """What is learned from and tested on."""

    @property
    def source(self) -> str:
        """Where the data come from, in words."""

    def __len__(self) -> int:
        """Return how many examples an epoch has to make batches of."""

    def describe(self) -> dict[str, Any]:
        """Return what a record says of the data; the digest tells whether they are the same."""

    def lesson(self, options: Options, seed: int, rank: int = 0, ranks: int = 1) -> Lesson:
        """Return what one of several ranks learns with a seed."""


@dataclass(frozen=True)
class ImageData:
    """Images to learn from and images to test on.

    Attributes:
        train: for learning.
        test: for testing, with the same classes and size.
        source: where they come from, in words.
    """

    train: Images
    test: Images
    source: str

    def __len__(self) -> int:
        return len(self.train)

    def describe(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "classes": list(self.train.classes),
            "shape": list(self.train.shape),
            "train_images": len(self.train),
            "test_images": len(self.test),
            **Normalizer.fit(self.train).describe(),
            "digest": _digest(self.train.pixels, self.train.labels, self.test.pixels, self.test.labels),
        }

    def lesson(self, options: Options, seed: int, rank: int = 0, ranks: int = 1) -> Lesson:
        device, normalize = torch.device(options.device), Normalizer.fit(self.train)
        batches = ImageBatches(self.train, normalize, options.batch_size, options.augment, seed, device, rank, ranks)
        return Lesson(
            options.task,
            batches,
            ImageTests(self.test, normalize, device),
            _builder(options, self.train.shape, len(self.train.classes)),
            options.dtype,
        )


@dataclass(frozen=True)
class MaskedImageData:
    """Images with masks to learn from and to test on.

    Attributes:
        train: for learning, in crops.
        test: for testing, whole.
        source: where they come from, in words.
        crops: how many crops an epoch has.
    """

    train: MaskedImages
    test: MaskedImages
    source: str
    crops: int

    def __len__(self) -> int:
        return self.crops

    def describe(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "shape": list(self.train.shape),
            "train_images": len(self.train),
            "test_images": len(self.test),
            "object": self.test.masks.float().mean().item(),
            **Normalizer.fit(self.train).describe(),
            "digest": _digest(self.train.pixels, self.train.masks, self.test.pixels, self.test.masks),
        }

    def lesson(self, options: Options, seed: int, rank: int = 0, ranks: int = 1) -> Lesson:
        device, normalize = torch.device(options.device), Normalizer.fit(self.train)
        crops = Crops(
            self.train, normalize, _given(options.crop), options.batch_size, options.augment, seed, device, rank, ranks
        )
        tests = WholeImages(self.test, normalize, GRAIN, device)
        return Lesson(options.task, crops, tests, _builder(options, self.train.shape), options.dtype)


@dataclass(frozen=True)
class TextData:
    """Text to learn from and to test on.

    Attributes:
        text: both, as tokens.
        positions: of a sequence.
    """

    text: Text
    positions: int

    @property
    def source(self) -> str:
        return self.text.source

    def __len__(self) -> int:
        return max(0, len(self.text.train) // self.positions - 1)

    def describe(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "unit": self.text.vocabulary.unit,
            "vocabulary": len(self.text.vocabulary),
            "train_tokens": len(self.text.train),
            "test_tokens": len(self.text.test),
            "unknown_in_test": (self.text.test == self.text.vocabulary.unknown).float().mean().item(),
            "digest": _digest(self.text.train, self.text.test),
        }

    def lesson(self, options: Options, seed: int, rank: int = 0, ranks: int = 1) -> Lesson:
        device, is_masked = torch.device(options.device), options.task is MASKED_TOKEN
        text, words, length = self.text, self.text.vocabulary, self.positions
        batches = Sequences(text.train, words, length, options.batch_size, is_masked, seed, device, rank, ranks)
        tests = TestSequences(text.test, words, length, SEQUENCES_AT_ONCE, is_masked, device)
        return Lesson(options.task, batches, tests, _builder(options, len(words), length), options.dtype)


@dataclass(frozen=True)
class SceneData:
    """Images with objects to learn from and to test on.

    Attributes:
        train: for learning; there is something to be found in each.
        test: for testing, with the same classes.
        source: where they come from, in words.
    """

    train: Scenes
    test: Scenes
    source: str

    def __len__(self) -> int:
        return len(self.train)

    def describe(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "classes": list(self.train.classes),
            "train_images": len(self.train),
            "test_images": len(self.test),
            "train_objects": sum(len(entry["annotations"]) for entry in self.train.entries),
            "test_objects": sum(len(entry["annotations"]) for entry in self.test.entries),
            "digest": hashlib.sha256(
                json.dumps([[*part.entries] for part in (self.train, self.test)], sort_keys=True).encode()
            ).hexdigest(),
        }

    def lesson(self, options: Options, seed: int, rank: int = 0, ranks: int = 1) -> Lesson:
        device = torch.device(options.device)
        batches = SceneBatches(
            self.train, options.batch_size, options.augment, seed, device, rank, ranks, options.readers
        )
        build = _builder(options, len(self.train.classes), _given(options.image_size))
        return Lesson(options.task, batches, SceneTests(self.test, device), build, options.dtype)


def read_data(options: Options, progress: Progress | None = None) -> Data:
    """Read the data that the options name.

    Raises:
        DataError: they are missing or unreadable, or too few to fill a batch.
    """
    data = _readers(options)(options, progress)
    if len(data) < options.batch_size:
        raise DataError(
            f"batch-size is {options.batch_size}, but there are {len(data)} {_examples(data)} to learn "
            "from; give a smaller one"
        )
    if options.preconditioning.parts is not None:
        outside(outline(data, options), options.preconditioning.parts)
    return data


def outline(data: Data, options: Options) -> nn.Module:
    """Return the model that is trained on the data, without storage for its weights."""
    lesson = data.lesson(options, options.seed)
    with torch.device("meta"):
        return lesson.build()


def _readers(options: Options) -> Callable[[Options, Progress | None], Data]:
    kind = options.known_recipe.kind
    if kind == IMAGES:
        return _read_digits if options.data is None else _read_images
    return {MASKED_IMAGES: _read_masked_images, SCENES: _read_scenes}.get(kind, _read_text)


def _examples(data: Data) -> str:
    return {ImageData: "images", MaskedImageData: "crops", SceneData: "images with objects"}.get(
        type(data), "sequences"
    )


def _read_digits(options: Options, progress: Progress | None) -> Data:
    train, test = hold_out(read_digits(), HELD_OUT, options.seed)
    return ImageData(train, test, "the handwritten digits of scikit-learn, a fifth held out for testing")


def _test_path(options: Options) -> Path | None:
    """Return where there is what is tested on: as given, or beside what is learned from; None for a share of that."""
    return find_test_data(Path(str(options.data))) if options.test_data is None else Path(options.test_data)


def _read_images(options: Options, progress: Progress | None) -> Data:
    path, test_path = Path(str(options.data)), _test_path(options)
    images = read_images(path, options.image_size, progress, options.readers)
    if test_path is None:
        train, test = hold_out(images, HELD_OUT, options.seed)
        return ImageData(train, test, f"{path.name}, a fifth held out for testing")
    test = match_images(read_images(test_path, options.image_size, progress, options.readers), images)
    return ImageData(images, test, f"{path.name}, tested on {test_path.name}")


def _read_masked_images(options: Options, progress: Progress | None) -> Data:
    path, test_path, side = Path(str(options.data)), _test_path(options), _given(options.crop)
    images = read_masked_images(path, progress, options.readers)
    _check_crop(side, images.shape)
    if not images.masks.any():
        raise DataError(f"the masks in {path} are black everywhere; draw the object white, as 255")
    if test_path is None:
        train, test = split_masked_images(images, HELD_OUT, options.seed)
        source = f"{path.name}, a fifth held out for testing"
    else:
        train, test = images, read_masked_images(test_path, progress, options.readers)
        source = f"{path.name}, tested on {test_path.name}"
        if test.shape[0] != train.shape[0]:
            raise DataError(f"test images have {test.shape[0]} channels, training images {train.shape[0]}; make equal")
    return MaskedImageData(train, test, source, Crops.count_of(train, side))


def _check_crop(side: int, shape: tuple[int, int, int]) -> None:
    if side % GRAIN:
        raise ConfigurationError(f"crop is {side}; give a multiple of {GRAIN}, which the network halves four times")
    if side > min(shape[1:]):
        raise DataError(f"crop is {side}, but the images have {shape[2]}x{shape[1]} pixels; give --crop")


def _read_scenes(options: Options, progress: Progress | None) -> Data:
    model = find_model(options.recipe, options.model)
    if isinstance(model, MaskRCNN):
        model.check()
    path, test_path = Path(str(options.data)), _test_path(options)
    scenes = read_scenes(path)
    if test_path is None:
        order = torch.randperm(len(scenes), generator=torch.Generator().manual_seed(options.seed)).tolist()
        held = max(1, round(HELD_OUT * len(scenes)))
        train, test = (scenes.select(sorted(part)) for part in (order[held:], order[:held]))
        return SceneData(train.with_objects(), test, f"{path.name}, a fifth held out for testing")
    test = read_scenes(test_path)
    if test.classes != scenes.classes:
        raise DataError(f"{test_path} has other categories than {path}; make them equal")
    return SceneData(scenes.with_objects(), test, f"{path.name}, tested on {test_path.name}")


def _read_text(options: Options, progress: Progress | None) -> Data:
    path, test_path = Path(str(options.data)), _test_path(options)
    text = read_text(path, str(options.unit), _given(options.vocabulary), test_path)
    _check_tests(text, _given(options.positions))
    return TextData(text, _given(options.positions))


def _check_tests(text: Text, positions: int) -> None:
    if len(text.test) <= positions:
        raise DataError(
            f"positions is {positions}, but there are {len(text.test)} tokens to test on, which make no sequence and "
            "the token after it; give fewer, or a longer text"
        )


def _given(value: int | None) -> int:
    """Return an option that the recipe has a preset for."""
    if value is None:
        raise ConfigurationError("an option of the recipe is missing; make options by Options.complete")
    return value


def _builder(options: Options, *sizes: object) -> Callable[[], nn.Module]:
    return partial(find_model(options.recipe, options.model), *sizes)


def _digest(*parts: Tensor) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.contiguous().numpy().data)
    return digest.hexdigest()
