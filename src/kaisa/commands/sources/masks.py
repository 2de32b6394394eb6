"""Models of masks, posed with the object or the background over a region."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kaisa.commands.sources.posed import (
    Place,
    Posed,
    Source,
    one_or_all,
    options_of_pictures,
    refuse,
    stacked,
    tests_of,
)
from kaisa.errors import ConfigurationError
from kaisa.explain import Method
from kaisa.recipes.trained import Trained
from kaisa.recipes.unet import GRAIN, LEVELS

OBJECT, BACKGROUND = "object", "background"
SIDES = (BACKGROUND, OBJECT)
PIXELS_AT_ONCE = 2**20  # images are whole here, and what a U-Net keeps for gradients is many times as large


@dataclass(frozen=True)
class Masks(Source):
    """A model that says of every pixel whether it is of the object.

    The score of the object is the mean logit over a region, that of the background its negative. The region is the box
    that is given, otherwise what the model takes for the target.
    """

    run: Trained

    def pose(self, inputs: Sequence[str], targets: Sequence[str], place: Place) -> Posed:
        refuse(replace(place, box=None), "masks have no tokens")
        sides = [self._side(name) for name in targets]
        images = stacked(
            inputs, lambda numbers: tests_of(self.run, numbers, "image"), lambda n: self.run.image(Path(n))
        )
        region, words = self._region(images, sides, place)
        self.run.model.register_forward_hook(_OverRegion(region))
        target = one_or_all(sides) if sides or place.box else SIDES.index(OBJECT)
        labels = tuple(f"{side}{words}" for side in SIDES)
        pixels = 1 if images is None else images.shape[2:].numel()
        return Posed(
            self.run.model, images, target, labels, batch_size=max(1, min(Posed.batch_size, PIXELS_AT_ONCE // pixels))
        )

    def options(self, method: Method, posed: Posed, given: Mapping[str, Any]) -> dict[str, Any]:
        if method.scope == "examples":
            raise ConfigurationError(f"{method.name} is of classes and tokens; of masks it is asked from Python")
        if "octaves" in method.options and given.get("octaves", 1) != 1:
            raise ConfigurationError(f"octaves change the size of an image, which must stay a multiple of {GRAIN} here")
        channels, height, width = self.run.shape
        usual: dict[str, Any] = {"octaves": 1} if "octaves" in method.options else {}
        if method.needs == "layer" and method.scope == "local":
            usual = {"layer": f"down.{LEVELS - 1}"}  # the narrowest, as in Seg-Grad-CAM (arXiv 2002.11434)
        shape = (channels, height // GRAIN * GRAIN, width // GRAIN * GRAIN)
        return options_of_pictures(method, posed, {**usual, **given}, shape, is_bounded=True)

    def _side(self, name: str) -> int:
        if name not in SIDES:
            raise ConfigurationError(f"unknown target {name!r}; a mask has {OBJECT} and {BACKGROUND}")
        return SIDES.index(name)

    def _region(self, images: Tensor | None, sides: Sequence[int], place: Place) -> tuple[Tensor | None, str]:
        """Return the weight of each pixel, None for all alike, and words for it."""
        if images is None:
            if place.box is not None:
                raise ConfigurationError("--box is of an image, and there is none")
            return None, ""
        if place.box is not None:
            return _boxed(place.box, images.shape[2:]), f" in the box {','.join(map(str, place.box))}"
        if len(images) > 1 or len(sides) > 1:
            raise ConfigurationError(
                "each image has an object of its own; explain one image and one target at a time, or give --box"
            )
        with torch.no_grad():
            logits = self.run.model(images.to(self.run.options.device))[0].cpu()
        side = (sides or [SIDES.index(OBJECT)])[0]
        found = logits > 0 if SIDES[side] == OBJECT else logits <= 0
        if not found.any():
            raise ConfigurationError(
                f"the model takes no pixel of this image for the {SIDES[side]}; give --box, or another target"
            )
        return found / found.sum(), f" over its {int(found.sum())} pixels"


class _OverRegion:
    """A hook that makes of logits (inputs, height, width) the scores of background and object over a region."""

    def __init__(self, region: Tensor | None) -> None:
        self._region = region

    def __call__(self, module: nn.Module, inputs: Any, logits: Tensor) -> Tensor:
        region = self._region
        mean = logits.mean((1, 2)) if region is None else (logits * region.to(logits)).sum((1, 2))
        return torch.stack([-mean, mean], 1)


def _boxed(box: tuple[int, int, int, int], size: Sequence[int]) -> Tensor:
    left, top, right, bottom = box
    height, width = size
    if right > width or bottom > height:
        raise ConfigurationError(f"--box {','.join(map(str, box))} is not inside an image of {width}x{height} pixels")
    region = torch.zeros(height, width)
    region[top:bottom, left:right] = 1 / ((right - left) * (bottom - top))
    return region
