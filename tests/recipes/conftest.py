"""A small folder of images, and the same as a zip file."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kaisa.recipes.batches import Batches, Normalizer
from kaisa.recipes.images import Images, read_images

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
def batches(images: Images) -> Batches:
    return Batches(images, Normalizer.fit(images), size=4, augment=True, seed=3)
