"""Small folders of images, and the same as zip files."""

from __future__ import annotations

import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kaisa.recipes.batches import ImageBatches, ImageTests, Normalizer
from kaisa.recipes.images import Images, read_images
from kaisa.recipes.models import build_model
from kaisa.recipes.tasks import CLASSIFICATION, Lesson

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


def zip_folder(folder: Path, path: Path, inside: str = "") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, inside + file.relative_to(folder).as_posix())
    return path


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
