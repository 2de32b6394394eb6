"""Models that a recipe has trained, made again from the folder of the run: record and weights.

    RUN/record.json                     recipe, model, sizes, and what images were normalised by
    RUN/sgd+kfac-seed0.safetensors      weights

Nothing is unpickled: the record is JSON, the weights are safetensors. Models of images are given a hook that
normalises, so that their inputs are images from 0 to 1; those of text take numbers of tokens, those of scenes what they
learned from. A model that was trained in few bits is read in full precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model
from torch import Tensor, nn

from kaisa.errors import ConfigurationError, DataError, StateError
from kaisa.recipes.batches import ImageTests, Normalizer
from kaisa.recipes.catalogue import IMAGES, MASKED_IMAGES, SCENES, TEXT, find_model
from kaisa.recipes.crops import WholeImages
from kaisa.recipes.data import Data, ImageData, MaskedImageData, TextData, read_data
from kaisa.recipes.images import Progress, decode_image
from kaisa.recipes.options import Options
from kaisa.recipes.record import FILE, Record
from kaisa.recipes.tasks import Batch
from kaisa.recipes.text import Vocabulary
from kaisa.recipes.unet import GRAIN

WHITE = 255
_FROM_ZERO_TO_ONE = Normalizer(torch.tensor(0.0), torch.tensor(float(WHITE)))


@dataclass(frozen=True)
class Trained:
    """A model as a run has left it.

    Attributes:
        model: in evaluation mode, on the device that it was trained on; of images from 0 to 1, of tokens, or of scenes.
        options: of the run.
        classes: their names, in the order of the outputs; none where no classes are told apart.
        shape: of one input: channels, height and width of an image, positions of a text; none of scenes.
        weights: the file that they were read from.
        read_data: reads what the run learned from and was tested on, once.
    """

    model: nn.Module
    options: Options
    classes: tuple[str, ...]
    shape: tuple[int, ...]
    weights: Path
    read_data: Callable[[], Data]

    @property
    def kind(self) -> str:
        """What it takes, as `kaisa.recipes.catalogue` has it: images, masked images, text or scenes."""
        return self.options.known_recipe.kind

    def tests(self) -> Iterable[Batch]:
        """Return what the run was tested on, in batches of what the model takes and what it should say.

        Raises:
            DataError: the data are missing.
            StateError: they are not those that the run began with.
        """
        tests = self.read_data().lesson(self.options, self.options.seed).tests
        if isinstance(tests, ImageTests | WholeImages):
            return replace(tests, normalize=_FROM_ZERO_TO_ONE)
        return tests

    def vocabulary(self) -> Vocabulary:
        """Read what the numbers of tokens mean.

        Raises:
            ConfigurationError: the model is not of text.
            DataError: the data are missing.
            StateError: they are not those that the run began with.
        """
        data = self.read_data() if self.kind == TEXT else None
        if not isinstance(data, TextData):
            raise ConfigurationError(f"a run of {self.options.recipe} learns from {self.kind}, which has no vocabulary")
        return data.text.vocabulary

    def image(self, path: Path) -> Tensor:
        """Read an image file as an input (1, channels, height, width) from 0 to 1.

        It is resized to what a classifier takes; a model of masks takes it as it is, cut down to a multiple of `GRAIN`.

        Raises:
            ConfigurationError: the model is not of images.
            DataError: there is no such file, it is no image, or none of the kind that the model takes.
        """
        if self.kind == MASKED_IMAGES:
            return _whole_image(path, self.shape[0])
        if self.kind != IMAGES:
            raise ConfigurationError(f"a run of {self.options.recipe} learns from {self.kind}, not from single images")
        return read_image(path, (self.shape[0], self.shape[1], self.shape[2]))


def read_trained(path: Path, progress: Progress | None = None) -> Trained:
    """Read a model from the folder of a run, or from one of the weight files in it.

    Raises:
        StateError: there is no finished run, or its files do not belong together.
        ConfigurationError: the run has several weight files and none is named, or needs what is not installed.
    """
    folder = path if path.is_dir() else path.parent
    if not (folder / FILE).is_file():
        raise StateError(f"{path} is of no run: {folder} has no {FILE}; give the folder that kaisa train made")
    record = Record.read(folder)
    options, described = record.options, record.data
    weights = path if path.is_file() else _find_weights(folder)
    model = find_model(options.recipe, options.model)(*_sizes(options, described))
    _load(model, weights, record)

    @cache
    def read() -> Data:
        data = read_data(options, progress)
        if data.describe()["digest"] != described["digest"]:
            raise StateError("the data are not those that the run began with")
        return data

    if options.known_recipe.kind in (IMAGES, MASKED_IMAGES):
        normalize = _known_normalizer(described) or _fitted_normalizer(read())
        model.register_forward_pre_hook(_Normalize(normalize))
    shape = (options.positions,) if options.positions is not None else described.get("shape", ())
    classes = tuple(described.get("classes", ()))
    return Trained(model.to(options.device).eval(), options, classes, tuple(shape), weights, read)


def as_inputs(pixels: Tensor) -> Tensor:
    """Return bytes (images, channels, height, width) as inputs from 0 to 1."""
    return _FROM_ZERO_TO_ONE(pixels)


def read_image(path: Path, shape: tuple[int, int, int]) -> Tensor:
    """Read an image file as (1, channels, height, width) from 0 to 1; grey and colour as the shape has it.

    Raises:
        DataError: there is no such file, it is no image, or one that would have to be distorted.
    """
    channels, height, width = shape
    if height != width or channels not in (1, 3):
        raise DataError(f"the model takes {shape}; image files are read for square images of 1 or 3 channels alone")
    return _decoded(path, channels, height)


def _whole_image(path: Path, channels: int) -> Tensor:
    image = _decoded(path, channels)
    height, width = (side // GRAIN * GRAIN for side in image.shape[2:])
    if not (height and width):
        found = f"{image.shape[3]}x{image.shape[2]}"
        raise DataError(f"{path} has {found} pixels; the model takes images of at least {GRAIN}x{GRAIN}")
    return image[..., :height, :width].contiguous()


def _decoded(path: Path, channels: int, side: int | None = None) -> Tensor:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"no such image file: {path}") from error
    pixels = _FROM_ZERO_TO_ONE(torch.from_numpy(decode_image(content, str(path), side).copy()).permute(2, 0, 1))
    if channels == 1:
        pixels = pixels.mean(0, keepdim=True)
    return pixels.expand(channels, -1, -1)[None].clone()


def _sizes(options: Options, described: dict[str, Any]) -> tuple[object, ...]:
    """Return what `kaisa.recipes.catalogue.Builder` says that models of a kind of data are made by."""
    shape, classes = tuple(described.get("shape", ())), len(described.get("classes", ()))
    return {
        IMAGES: (shape, classes),
        MASKED_IMAGES: (shape,),
        TEXT: (described.get("vocabulary"), options.positions),
        SCENES: (classes, options.image_size),
    }[options.known_recipe.kind]


def _find_weights(folder: Path) -> Path:
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise StateError(f"there are no weights in {folder}: the run is not finished; kaisa train --resume {folder}")
    if len(found) > 1:
        raise ConfigurationError(
            f"there are {len(found)} models in {folder}; give one of {', '.join(str(path) for path in found[:4])}"
        )
    return found[0]


def _load(model: nn.Module, weights: Path, record: Record) -> None:
    record.check_model(model)
    try:
        load_model(model, str(weights))
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise StateError(
            f"{weights} does not hold the weights of the run's model: {reason}{record.advice()}"
        ) from error


def _known_normalizer(described: dict[str, Any]) -> Normalizer | None:
    """Return what the record says that images were normalised by; older ones say nothing."""
    if "mean" not in described:
        return None
    mean, deviation = (torch.tensor(described[name]).view(-1, 1, 1) for name in ("mean", "deviation"))
    return Normalizer(mean, deviation)


def _fitted_normalizer(data: Data) -> Normalizer:
    assert isinstance(data, ImageData | MaskedImageData)  # the recipe's kind has seen to it
    return Normalizer.fit(data.train)


class _Normalize:
    """A hook that makes of images from 0 to 1 what the model has learned from."""

    def __init__(self, normalize: Normalizer) -> None:
        self.mean, self.deviation = normalize.mean / WHITE, normalize.deviation / WHITE

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0]
        return ((x - self.mean.to(x)) / self.deviation.to(x), *inputs[1:])
