"""Images with the objects in them, from a folder or a zip file in the format of COCO (Lin et al. 2014).

    annotations.json    images: id, file_name, height, width; categories: id, name; annotations: image_id, category_id,
                        bbox (left, top, width, height), segmentation (polygons or runs), iscrowd
    images/NAME         wherever file_name says, seen from the top or from any folder

Images stay encoded until they are wanted: COCO's would fill 100 GB of memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kaisa.errors import DataError
from kaisa.recipes.extras import load_extra
from kaisa.recipes.images import Tree, decode_image, is_hidden, is_image, open_tree

ANNOTATIONS = "annotations.json"
LABELS, BOXES, MASKS, CROWD = "labels", "boxes", "masks", "iscrowd"

Objects = dict[str, Tensor]
"""What is in an image: boxes (n, 4) as left, top, right, bottom; labels (n,) from 1; masks (n, height, width) of 0 and
1; iscrowd (n,), whether each is many at once."""


@dataclass(frozen=True)
class Scenes:
    """Images and what is in them, read when asked for.

    Attributes:
        tree: the files.
        entries: of each image its file, size and annotations.
        classes: the names of what is there to be found; label 1 is the first.
        source: the path, for messages.
        labels: of each category id.
    """

    tree: Tree
    entries: Sequence[Mapping[str, Any]]
    classes: tuple[str, ...]
    source: Path
    labels: Mapping[int, int]
    opened: ExitStack = field(default_factory=ExitStack, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.entries)

    def image(self, row: int) -> Tensor:
        """Return the bytes of an image, of shape (3, height, width)."""
        entry = self.entries[row]
        pixels = decode_image(self.tree.read(entry["name"]), f"{self.source}/{entry['name']}")
        if pixels.shape[:2] != (entry["height"], entry["width"]):
            found, expected = f"{pixels.shape[1]}x{pixels.shape[0]}", f"{entry['width']}x{entry['height']}"
            raise DataError(f"{self.source}/{entry['name']} is {found} pixels, its annotation says {expected}")
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1).expand(3, -1, -1)

    def objects(self, row: int) -> Objects:
        """Return what is in an image."""
        entry = self.entries[row]
        known: Sequence[Mapping[str, Any]] = entry["annotations"]
        height, width = entry["height"], entry["width"]
        boxes = torch.tensor([one["bbox"] for one in known], dtype=torch.float32).reshape(-1, 4)
        masks = [mask_of(one["segmentation"], height, width) for one in known]
        return {
            BOXES: torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1),
            LABELS: torch.tensor([self.labels[one["category_id"]] for one in known], dtype=torch.int64),
            MASKS: torch.from_numpy(np.stack(masks) if masks else np.zeros((0, height, width), np.uint8)),
            CROWD: torch.tensor([bool(one.get("iscrowd", 0)) for one in known], dtype=torch.bool),
        }

    def select(self, rows: Sequence[int]) -> Scenes:
        """Return some of the images."""
        entries = [self.entries[row] for row in rows]
        return Scenes(self.tree, entries, self.classes, self.source, self.labels, self.opened)

    def with_objects(self) -> Scenes:
        """Return the images in which there is something to be found that is no crowd."""
        found = [
            row
            for row, entry in enumerate(self.entries)
            if any(not one.get("iscrowd", 0) for one in entry["annotations"])
        ]
        return self.select(found)


def read_scenes(path: Path) -> Scenes:
    """Read the annotations of a folder or a zip file, and see that the images are there.

    Raises:
        DataError: the path, an annotation or an image is not as it should be.
    """
    opened = ExitStack()  # a zip file is closed when the last scenes of it are forgotten
    tree = opened.enter_context(open_tree(path))
    name = _annotations_of(tree, path)
    try:
        known = json.loads(tree.read(name))
        labels = {one["id"]: label for label, one in enumerate(_by_id(known["categories"]), start=1)}
        classes = tuple(one["name"] for one in _by_id(known["categories"]))
        entries = _entries(known, _files(tree), labels, path)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{name} in {path} is not in the format of COCO: {type(error).__name__} {error}") from error
    if not classes or not entries:
        raise DataError(f"{name} in {path} has no {'images' if classes else 'categories'}")
    return Scenes(tree, entries, classes, path, labels, opened)


def _annotations_of(tree: Tree, path: Path) -> str:
    """Return the one file of annotations."""
    found = [name for name in tree.names if name.endswith(".json") and not is_hidden(name)]
    named = [name for name in found if PurePosixPath(name).name == ANNOTATIONS]
    if len(named or found) != 1:
        raise DataError(f"found {len(named or found)} files of annotations in {path}; give one {ANNOTATIONS}")
    return (named or found)[0]


def _files(tree: Tree) -> dict[str, str]:
    """Return where each image is, by its path seen from every folder around it."""
    files: dict[str, str] = {}
    for name in sorted(tree.names, reverse=True):
        if is_image(name) and not is_hidden(name):
            parts = PurePosixPath(name).parts
            files.update({"/".join(parts[start:]): name for start in range(len(parts))})
    return files


def _by_id(values: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return sorted(values, key=lambda value: value["id"])


def _entries(
    known: Mapping[str, Any], files: Mapping[str, str], labels: Mapping[int, int], path: Path
) -> list[Mapping[str, Any]]:
    """Return file, size and annotations of each image, in the order of their ids."""
    inside: dict[int, list[Mapping[str, Any]]] = {one["id"]: [] for one in known["images"]}
    for one in _by_id(known["annotations"]):
        if one["image_id"] not in inside or one["category_id"] not in labels:
            raise DataError(f"annotation {one['id']} in {path} is of an image or a category that is not listed")
        if min(one["bbox"][2:]) > 0:  # some of COCO's have no width
            inside[one["image_id"]].append(one)
    entries: list[Mapping[str, Any]] = []
    for image in _by_id(known["images"]):
        name = files.get(image["file_name"])
        if name is None:
            raise DataError(f"{image['file_name']}, of which there are annotations, is not in {path}")
        size = {side: int(image[side]) for side in ("height", "width")}
        entries.append({"name": name, **size, "annotations": inside[image["id"]]})
    return entries


def mask_of(segmentation: Any, height: int, width: int) -> NDArray[np.uint8]:
    """Return the mask of polygons [[x, y, x, y, …], …] or of runs {"size": …, "counts": …}.

    Raises:
        DataError: it is neither, or of another size.
    """
    if isinstance(segmentation, Mapping):
        return _mask_of_runs(segmentation, height, width)
    if not isinstance(segmentation, Sequence) or any(len(polygon) < 6 for polygon in segmentation):
        raise DataError(f"a segmentation is neither polygons nor runs: {str(segmentation)[:60]}")
    pillow = load_extra("PIL.Image", "reading masks")
    image = pillow.new("1", (width, height))
    draw = load_extra("PIL.ImageDraw", "reading masks").Draw(image)
    for polygon in segmentation:
        draw.polygon([float(number) for number in polygon], fill=1)
    return np.asarray(image, dtype=np.uint8)


def _mask_of_runs(runs: Mapping[str, Any], height: int, width: int) -> NDArray[np.uint8]:
    counts = runs["counts"]
    lengths = _lengths(counts) if isinstance(counts, str) else list(counts)
    if sum(lengths) != height * width:
        raise DataError(f"a mask has {sum(lengths)} pixels, its image {height * width}")
    values = np.arange(len(lengths), dtype=np.uint8) % 2
    return np.repeat(values, lengths).reshape(width, height).T.copy()  # runs go down the columns


def _lengths(text: str) -> list[int]:
    """Return the lengths of runs that COCO writes as text: 5 bits a letter, from the third on as differences."""
    lengths: list[int] = []
    value = shift = 0
    for letter in text.encode("ascii"):
        bits = letter - 48
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        value -= (1 << shift) if bits & 16 else 0
        lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
        value = shift = 0
    return lengths
