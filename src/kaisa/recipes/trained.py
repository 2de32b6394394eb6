"""Image classifiers that a recipe has trained, made again from the folder of the run: record and weights.

    RUN/record.json                     recipe, model, classes, shape, and what images were normalised by
    RUN/sgd+kfac-seed0.safetensors      weights

Nothing is unpickled: the record is JSON, the weights are safetensors. The model is given a hook that normalises, so
that its inputs are images from 0 to 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model
from torch import Tensor, nn

from kaisa.errors import ConfigurationError, DataError, StateError
from kaisa.recipes.batches import Normalizer
from kaisa.recipes.catalogue import IMAGES, find_model
from kaisa.recipes.data import ImageData, read_data
from kaisa.recipes.images import Images, Progress, decode_image
from kaisa.recipes.record import FILE, Record

WHITE = 255


@dataclass(frozen=True)
class Trained:
    """A classifier as a run has left it.

    Attributes:
        model: in evaluation mode, of images from 0 to 1.
        classes: their names, in the order of the outputs.
        shape: channels, height and width of an image.
        weights: the file that they were read from.
        read_data: reads what the run learned from and was tested on.
    """

    model: nn.Module
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    weights: Path
    read_data: Callable[[], ImageData]

    def image(self, path: Path) -> Tensor:
        """Read an image file as an input (1, channels, height, width) from 0 to 1, resized to what the model takes.

        Raises:
            DataError: there is no such file, or it is no image.
        """
        return read_image(path, self.shape)


def read_trained(path: Path, progress: Progress | None = None) -> Trained:
    """Read a classifier from the folder of a run, or from one of the weight files in it.

    Raises:
        StateError: there is no finished run, or its files do not belong together.
        ConfigurationError: the run is of another kind, or has several weight files and none is named.
    """
    folder = path if path.is_dir() else path.parent
    if not (folder / FILE).is_file():
        raise StateError(f"{path} is of no run: {folder} has no {FILE}; give the folder that kaisa train made")
    record = Record.read(folder)
    options = record.options
    if options.known_recipe.kind != IMAGES:
        raise ConfigurationError(
            f"the run in {folder} is of the recipe {options.recipe}; classifiers of images can be explained so far"
        )
    weights = path if path.is_file() else _find_weights(folder)
    shape, classes = record.data["shape"], tuple(record.data["classes"])
    model = find_model(options.recipe, options.model)(tuple(shape), len(classes))
    _load(model, weights)

    def read() -> ImageData:
        data = read_data(options, progress)
        if not isinstance(data, ImageData) or data.describe()["digest"] != record.data["digest"]:
            raise StateError("the data are not those that the run began with")
        return data

    normalize = _known_normalizer(record.data) or Normalizer.fit(read().train)
    model.register_forward_pre_hook(_Normalize(normalize))
    return Trained(model.eval(), classes, (shape[0], shape[1], shape[2]), weights, read)


def as_inputs(images: Images) -> Tensor:
    """Return images as inputs from 0 to 1."""
    return images.pixels.float() / WHITE


def read_image(path: Path, shape: tuple[int, int, int]) -> Tensor:
    """Read an image file as (1, channels, height, width) from 0 to 1; grey and colour as the shape has it.

    Raises:
        DataError: there is no such file, it is no image, or one that would have to be distorted.
    """
    channels, height, width = shape
    if height != width or channels not in (1, 3):
        raise DataError(f"the model takes {shape}; image files are read for square images of 1 or 3 channels alone")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"no such image file: {path}") from error
    pixels = torch.from_numpy(decode_image(content, str(path), height).copy()).permute(2, 0, 1).float() / WHITE
    if channels == 1:
        pixels = pixels.mean(0, keepdim=True)
    return pixels.expand(channels, -1, -1)[None].clone()


def _find_weights(folder: Path) -> Path:
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise StateError(f"there are no weights in {folder}: the run is not finished; kaisa train --resume {folder}")
    if len(found) > 1:
        raise ConfigurationError(
            f"there are {len(found)} models in {folder}; give one of {', '.join(str(path) for path in found[:4])}"
        )
    return found[0]


def _load(model: nn.Module, weights: Path) -> None:
    try:
        load_model(model, str(weights))
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise StateError(f"{weights} does not hold the weights of the run's model: {reason}") from error


def _known_normalizer(data: dict[str, Any]) -> Normalizer | None:
    """Return what the record says that images were normalised by; older records say nothing."""
    if "mean" not in data:
        return None
    mean, deviation = (torch.tensor(data[name]).view(-1, 1, 1) for name in ("mean", "deviation"))
    return Normalizer(mean, deviation)


class _Normalize:
    """A hook that makes of images from 0 to 1 what the model has learned from."""

    def __init__(self, normalize: Normalizer) -> None:
        self.mean, self.deviation = normalize.mean / WHITE, normalize.deviation / WHITE

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0]
        return ((x - self.mean.to(x)) / self.deviation.to(x), *inputs[1:])
