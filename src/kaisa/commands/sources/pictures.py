"""Models of images, of runs and of exported programs, posed with a class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kaisa.commands.sources.posed import (
    INFLUENCE,
    LINEAR,
    Asked,
    Place,
    Posed,
    Source,
    one_or_all,
    options_of_pictures,
    refuse,
    stacked,
    tests_of,
)
from kaisa.errors import ConfigurationError, DataError
from kaisa.explain import Curvature, Examples, Explanation, Method, explain
from kaisa.explain.influence import cross_entropy, sample_labels
from kaisa.kfac import mean_factors
from kaisa.recipes.data import ImageData
from kaisa.recipes.trained import Trained, as_inputs, read_image

EXAMPLES_AT_ONCE = 100


@dataclass(frozen=True)
class Pictures(Source):
    """A model of images.

    Attributes:
        model: of images from 0 to 1, or of whatever an exported program takes.
        shape: of one input.
        classes: names of the outputs; none where they are not known.
        run: the run that it comes from; None for a program.
    """

    model: nn.Module
    shape: tuple[int, ...]
    classes: tuple[str, ...] = ()
    run: Trained | None = None

    def pose(self, inputs: Sequence[str], targets: Sequence[str], place: Place) -> Posed:
        refuse(place, "a classifier says one thing of a whole image")
        target = one_or_all([self._class(name) for name in targets])
        return Posed(self.model, stacked(inputs, self._test, self._image), target, self.classes)

    def options(self, method: Method, posed: Posed, given: Mapping[str, Any]) -> dict[str, Any]:
        return options_of_pictures(method, posed, given, self.shape, is_bounded=self.run is not None)

    def influence(self, posed: Posed, asked: Asked) -> Explanation:
        if self.run is None:
            return super().influence(posed, asked)
        if posed.inputs is None:
            raise DataError("influence explains inputs, and there are none")
        data = self.run.read_data()
        assert isinstance(data, ImageData)  # the run's kind has seen to it
        generator = torch.Generator().manual_seed(asked.seed)
        rows = torch.randperm(len(data.train), generator=generator)[: asked.examples]
        training = Examples(as_inputs(data.train.pixels[rows]), data.train.labels[rows])
        batches = training.inputs.split(EXAMPLES_AT_ONCE)
        factors = mean_factors(self.model, batches, fisher="categorical", layer_options=LINEAR, seed=asked.seed)
        curvature = Curvature.of(self.model, factors).moments(
            self.model, cross_entropy, training, sample=sample_labels, generator=generator, progress=asked.report
        )
        return explain(
            self.model,
            posed.inputs,
            INFLUENCE,
            posed.target,
            seed=asked.seed,
            training=training,
            curvature=curvature,
            **asked.options,
        )

    def _test(self, numbers: Sequence[str]) -> Tensor:
        if self.run is None:
            raise DataError(f"input {numbers[0]} is a number, which only a run has images for; give an image file")
        return tests_of(self.run, numbers, "image")

    def _image(self, name: str) -> Tensor:
        if len(self.shape) != 3:
            raise DataError(f"the program takes {self.shape}, which is no image; explain it from Python")
        return read_image(Path(name), (self.shape[0], self.shape[1], self.shape[2]))

    def _class(self, name: str) -> int:
        if name in self.classes:
            return self.classes.index(name)
        if name.isdecimal():
            return int(name)
        raise ConfigurationError(
            f"unknown target {name!r}; give a number, or one of {', '.join(self.classes) or 'none'}"
        )
