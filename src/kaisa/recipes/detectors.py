"""Detectors with the interface of torchvision's, and torchvision's Mask R-CNN (He et al. 2017, arXiv 1703.06870).

    training      detector(images, objects) ─► the losses by name
    evaluation    detector(images) ─► of each image boxes, labels, scores and masks

`Detector` makes of both what a lesson needs: the losses, and in evaluation what was found right.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kaisa.recipes.average_precision import Matches, box_overlaps, mask_overlaps, match
from kaisa.recipes.extras import load_extra
from kaisa.recipes.scenes import BOXES, CROWD, LABELS, MASKS, Objects

EXTRA = "detection"
REGIONS = 512
"""Regions of each image whose loss is the mean that trains the heads: torchvision's ``box_batch_size_per_image``."""
BACKBONE_LEVELS = 5
LONGEST = 1333 / 800  # of the longer side to the shorter, as published
PRESENT = 0.5  # from this probability on a pixel is of the object

Judged = dict[int, Matches]
"""By label what was found in an image."""


@dataclass(frozen=True)
class Detections:
    """What a detector makes of some images.

    Attributes:
        losses: by name, each a mean over images.
        boxes: of each image what was found by its box; nothing in training.
        masks: likewise by its mask.
    """

    losses: dict[str, Tensor]
    boxes: Sequence[Judged] = ()
    masks: Sequence[Judged] = ()

    @property
    def loss(self) -> Tensor:
        """The sum of the losses."""
        return torch.stack(list(self.losses.values())).sum()

    def detach(self) -> Detections:
        """Return the same without what made it."""
        return Detections({name: loss.detach() for name, loss in self.losses.items()}, self.boxes, self.masks)


class Detector(nn.Module):
    """Around a detector: takes images and what is in them, and returns `Detections`.

    Args:
        detector: has the interface of torchvision's.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, scenes: tuple[Sequence[Tensor], Sequence[Objects]]) -> Detections:
        """Return the losses, and in evaluation what was found, one image at a time."""
        images, objects = scenes
        if self.training:
            return Detections(self.detector(list(images), [_without_crowds(some) for some in objects]))
        boxes, masks, losses = [], [], []
        for image, some in zip(images, objects, strict=True):
            (found,) = self.detector([image])
            losses.append(self._losses(image, some))
            boxes.append(judge(found, some, BOXES))
            masks.append(judge(found, some, MASKS))
        means = {name: torch.stack([one[name] for one in losses]).mean() for name in losses[0]}
        return Detections(means, boxes, masks)

    def _losses(self, image: Tensor, objects: Objects) -> dict[str, Tensor]:
        with _as_in_training(self.detector):
            losses: dict[str, Tensor] = self.detector([image], [_without_crowds(objects)])
        return losses


@contextmanager
def _as_in_training(detector: nn.Module) -> Iterator[None]:
    """Let a detector tell its losses; the regions that it draws are the same each time, and statistics stay."""
    detector.train()
    for module in detector.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    used = {parameter.device for parameter in detector.parameters() if parameter.device.type == "cuda"}
    try:
        with torch.random.fork_rng(sorted(used, key=str)):
            torch.manual_seed(0)
            yield
    finally:
        detector.eval()


def _without_crowds(objects: Objects) -> Objects:
    kept = ~objects[CROWD]
    return {name: values[kept] for name, values in objects.items() if name != CROWD}


def judge(found: dict[str, Tensor], objects: Objects, kind: str) -> Judged:
    """Return by label which detections of an image are right, by their boxes or by their masks."""
    labels, known = found[LABELS].cpu().numpy(), objects[LABELS].cpu().numpy()
    shapes, shapes_known = _shapes(found, kind), _shapes(objects, kind)
    scores, crowd = found["scores"].double().cpu().numpy(), objects[CROWD].cpu().numpy()
    overlaps_of: Any = box_overlaps if kind == BOXES else mask_overlaps
    judged = {}
    for label in sorted({*labels.tolist(), *known.tolist()}):
        some, those = labels == label, known == label
        overlaps = overlaps_of(shapes[some], shapes_known[those], crowd[those])
        judged[label] = match(overlaps, scores[some], crowd[those])
    return judged


def _shapes(objects: dict[str, Tensor], kind: str) -> np.ndarray[Any, Any]:
    shapes = objects[kind].cpu()
    if kind == BOXES:
        return shapes.double().numpy()
    masks = shapes >= PRESENT if shapes.is_floating_point() else shapes > 0
    return masks.flatten(1).numpy()


@dataclass(frozen=True)
class MaskRCNN:
    """Makes torchvision's Mask R-CNN on a residual network with a feature pyramid, all of it with random weights.

    The backbone has batch normalisation that learns: a frozen one is for published weights.

    Attributes:
        backbone: torchvision's name of it.
    """

    backbone: str

    def check(self) -> None:
        """Raise ConfigurationError unless torchvision is installed."""
        load_extra("torchvision", "the recipe maskrcnn", EXTRA)

    def __call__(self, classes: int, side: int) -> nn.Module:
        """Build the model for a number of classes, with images whose shorter side is resized."""
        detection: Any = load_extra("torchvision.models.detection", "the recipe maskrcnn", EXTRA)
        backbones: Any = load_extra("torchvision.models.detection.backbone_utils", "the recipe maskrcnn", EXTRA)
        body = backbones.resnet_fpn_backbone(
            backbone_name=self.backbone, weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=BACKBONE_LEVELS
        )
        return Detector(
            detection.MaskRCNN(
                body,
                classes + 1,  # 0 is the background
                min_size=side,
                max_size=round(side * LONGEST),
                box_batch_size_per_image=REGIONS,
            )
        )
