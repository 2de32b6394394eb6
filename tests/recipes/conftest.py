"""Small folders of images, and the same as zip files."""

from __future__ import annotations

import json
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from kaisa.recipes.batches import ImageBatches, ImageTests, Normalizer
from kaisa.recipes.catalogue import DETECTORS
from kaisa.recipes.detectors import Detector
from kaisa.recipes.images import Images, read_images
from kaisa.recipes.models import build_model
from kaisa.recipes.tasks import CLASSIFICATION, Lesson
from tests.support.detector import TinyDetector

CLASSES = {"cat": 7, "dog": 9, "eel": 8}


def write_images(folder: Path, classes: dict[str, int] = CLASSES, side: int = 8) -> Path:
    """Write random colour images, a subfolder a class; PNG, so that nothing is lost."""
    generator = np.random.default_rng(0)
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index:04}.png")
    return folder


def write_discs(folder: Path, count: int = 5) -> Path:
    """Write grey images of noise with a bright disc, and masks of the discs."""
    generator = np.random.default_rng(0)
    rows, columns = np.mgrid[:32, :48]
    for name in ("image", "label"):
        (folder / name).mkdir(parents=True)
    for index in range(count):
        centre, radius = generator.uniform((8, 8), (24, 40)), generator.uniform(5, 9)
        disc = (rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 < radius**2
        noise = generator.integers(0, 120, (32, 48))
        Image.fromarray((noise + 130 * disc).astype(np.uint8)).save(folder / "image" / f"{index:02}.png")
        Image.fromarray((255 * disc).astype(np.uint8)).save(folder / "label" / f"{index:02}.png")
    return folder


CATEGORIES = [{"id": 7, "name": "disc"}, {"id": 3, "name": "square"}]  # ids as in COCO, with gaps and in no order


def write_shapes(folder: Path, count: int = 8) -> Path:
    """Write images of squares and discs in COCO's format, of two sizes; squares are polygons, discs are runs."""
    generator = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for index in range(count):
        height, width = (32, 40) if index % 2 else (40, 32)
        pixels = generator.integers(0, 60, (height, width, 3))
        for half in range(2):  # one object in the upper half and one in the lower, so that none hides another
            middle, centre, radius = height // 4 + half * height // 2, generator.integers(9, width - 9), 6
            box = [int(centre - radius), int(middle - radius), 2 * radius, 2 * radius]
            if is_disc := bool(generator.integers(2)):
                rows, columns = np.mgrid[:height, :width] + 0.5
                mask = (rows - middle) ** 2 + (columns - centre) ** 2 < radius**2
                segmentation: object = {"size": [height, width], "counts": runs_of(mask)}
            else:
                left, top, right, bottom = box[0], box[1], box[0] + 11, box[1] + 11
                mask = np.zeros((height, width), bool)
                mask[top : bottom + 1, left : right + 1] = True
                segmentation = [[left, top, right, top, right, bottom, left, bottom]]
            pixels[mask] += np.array([150, 20, 20] if is_disc else [20, 20, 150])
            one = {"id": len(annotations) + 1, "image_id": index + 1, "category_id": 7 if is_disc else 3}
            annotations.append({**one, "bbox": box, "segmentation": segmentation, "iscrowd": 0})
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / f"{index:02}.png")
        images.append({"id": index + 1, "file_name": f"{index:02}.png", "height": height, "width": width})
    written = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    (folder / "annotations.json").write_text(json.dumps(written))
    return folder


def runs_of(mask: NDArray[np.bool_]) -> list[int]:
    """Return the lengths of runs of 0 and 1 down the columns, the first of 0."""
    flat = np.concatenate([[False], mask.T.ravel(), [not mask.T.ravel()[-1]]])
    ends = np.flatnonzero(flat[1:] != flat[:-1])
    return np.diff(ends, prepend=0).tolist()


def zip_folder(folder: Path, path: Path, inside: str = "") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, inside + file.relative_to(folder).as_posix())
    return path


@pytest.fixture
def smallest_detector(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the recipe maskrcnn a model that needs no torchvision."""
    monkeypatch.setitem(DETECTORS, "smallest", lambda classes, side: Detector(TinyDetector(classes)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_images(tmp_path / "animals")


@pytest.fixture
def images(folder: Path) -> Images:
    return read_images(folder)


@pytest.fixture
def batches(images: Images) -> ImageBatches:
    return ImageBatches(images, Normalizer.fit(images), size=4, augment=True, seed=3)


@pytest.fixture
def lesson(batches: ImageBatches) -> Lesson:
    """Learn and test on the same images."""
    images = batches.images
    build = partial(build_model, "cnn", images.shape, len(images.classes))
    return Lesson(CLASSIFICATION, batches, ImageTests(images, batches.normalize), build)
