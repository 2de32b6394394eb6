"""Mean average precision as COCO defines it (Lin et al. 2014, arXiv 1405.0312; the rules of pycocotools' COCOeval).

    overlaps, scores ─► match          each image and class: which detections are right, at ten thresholds of overlap
    all matches      ─► mean_average_precision     the mean over classes and thresholds of the area under precision

A detection is right if it overlaps an object that no better-scored one has taken. Crowds are not to be found: what lies
in one counts neither as right nor as wrong. Of each image and class the best `MOST` detections count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
MOST = 100
ALMOST = 1 - 1e-10  # an overlap of 1 may come out a little short

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Matches:
    """What was found in one image of one class.

    Attributes:
        scores: of the detections, the highest first.
        right: of shape (thresholds, detections), whether each overlaps an object of its own.
        ignored: likewise, whether it counts for nothing.
        expected: how many objects there are, without crowds.
    """

    scores: Floats
    right: Bools
    ignored: Bools
    expected: int


def match(overlaps: Floats, scores: Floats, crowd: Bools) -> Matches:
    """Match detections with objects, the highest score first.

    Args:
        overlaps: of shape (detections, objects): intersection over union; with a crowd over the detection.
        scores: of shape (detections,).
        crowd: of shape (objects,), whether each is a crowd.
    """
    best = np.argsort(-scores, kind="stable")[:MOST]
    objects = np.argsort(crowd, kind="stable")  # crowds last
    overlaps, crowd = overlaps[np.ix_(best, objects)], crowd[objects]
    taken = np.stack([_take(overlaps, crowd, min(threshold, ALMOST)) for threshold in THRESHOLDS])
    ignored = (taken >= 0) & np.append(crowd, False)[taken]
    return Matches(scores[best], (taken >= 0) & ~ignored, ignored, int((~crowd).sum()))


def _take(overlaps: Floats, crowd: Bools, threshold: float) -> NDArray[np.int64]:
    """Return for each detection the object that it takes, or -1."""
    free = np.ones(len(crowd), dtype=bool)
    taken = np.full(len(overlaps), -1)
    for detection, row in enumerate(overlaps):
        for kind in (~crowd, crowd):
            near = np.flatnonzero(kind & (free | crowd) & (row >= threshold))
            if len(near):
                taken[detection] = near[::-1][row[near][::-1].argmax()]  # of equally near ones the last
                free[taken[detection]] = False
                break
    return taken


def mean_average_precision(images: Sequence[Mapping[int, Matches]]) -> float:
    """Return the mean over classes and thresholds; not a number where nothing was to be found.

    Args:
        images: of each image the matches of each class, which has objects or detections there.
    """
    classes = sorted(set(chain.from_iterable(images)))
    precisions = [average_precision([image[label] for image in images if label in image]) for label in classes]
    known = [precision for precision in precisions if not math.isnan(precision)]
    return float(np.mean(known)) if known else math.nan


def average_precision(images: Sequence[Matches]) -> float:
    """Return the mean over thresholds of one class; not a number where there are no objects."""
    expected = sum(image.expected for image in images)
    if not expected:
        return math.nan
    order = np.argsort(-np.concatenate([image.scores for image in images]), kind="stable")
    right = np.concatenate([image.right for image in images], axis=1)[:, order]
    ignored = np.concatenate([image.ignored for image in images], axis=1)[:, order]
    return float(np.mean([_area(row[~rest], expected) for row, rest in zip(right, ignored, strict=True)]))


def _area(right: Bools, expected: int) -> float:
    """Return the mean of the precision at evenly spaced recalls, none of them below that of a higher recall."""
    found = np.cumsum(right)
    precision = found / np.arange(1, len(right) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    places = np.searchsorted(found / expected, RECALLS, side="left")
    return float(np.append(envelope, 0.0)[np.minimum(places, len(envelope))].mean())


def box_overlaps(found: Floats, objects: Floats, crowd: Bools) -> Floats:
    """Return the overlaps of boxes (left, top, right, bottom), of shape (detections, objects)."""
    low = np.maximum(found[:, None, :2], objects[None, :, :2])
    high = np.minimum(found[:, None, 2:], objects[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(-1)
    return _over(shared, (found[:, 2:] - found[:, :2]).prod(-1), (objects[:, 2:] - objects[:, :2]).prod(-1), crowd)


def mask_overlaps(found: Bools, objects: Bools, crowd: Bools) -> Floats:
    """Return the overlaps of masks, each a row of pixels, of shape (detections, objects)."""
    rows = [masks.astype(np.float32) for masks in (found, objects)]
    shared = (rows[0] @ rows[1].T).astype(np.float64)
    return _over(shared, rows[0].sum(1, dtype=np.float64), rows[1].sum(1, dtype=np.float64), crowd)


def _over(shared: Floats, found: Floats, objects: Floats, crowd: Bools) -> Floats:
    union = np.where(crowd[None], found[:, None], found[:, None] + objects[None] - shared)
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
