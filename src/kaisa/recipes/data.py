"""What a comparison learns from and is tested on, as its options say."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kaisa.errors import DataError
from kaisa.recipes.digits import read_digits
from kaisa.recipes.images import (
    Images,
    Progress,
    find_test_data,
    hold_out,
    match_images,
    read_images,
)
from kaisa.recipes.options import Options

HELD_OUT = 0.2  # the share of the images that are tested on, where there are no others


@dataclass(frozen=True)
class Data:
    """Images to learn from and images to test on.

    Attributes:
        train: for learning.
        test: for testing, with the same classes and size.
        source: where they come from, in words.
    """

    train: Images
    test: Images
    source: str

    def describe(self) -> dict[str, Any]:
        """Return what a record says of the data; the digest tells whether they are the same."""
        return {
            "source": self.source,
            "classes": list(self.train.classes),
            "shape": list(self.train.shape),
            "train_images": len(self.train),
            "test_images": len(self.test),
            "digest": _digest(self.train, self.test),
        }


def read_data(options: Options, progress: Progress | None = None) -> Data:
    """Read the images that the options name.

    Raises:
        DataError: they are missing or unreadable, or too few to fill a batch.
    """
    data = _read_images(options, progress) if options.data is not None else _read_digits(options)
    if len(data.train) < options.batch_size:
        raise DataError(
            f"batch-size is {options.batch_size}, but there are {len(data.train)} images to learn "
            "from; give a smaller one"
        )
    return data


def _read_digits(options: Options) -> Data:
    train, test = hold_out(read_digits(), HELD_OUT, options.seed)
    return Data(train, test, "the handwritten digits of scikit-learn, a fifth held out for testing")


def _read_images(options: Options, progress: Progress | None) -> Data:
    path = Path(str(options.data))
    beside = find_test_data(path)
    test_path = Path(options.test_data) if options.test_data is not None else beside
    images = read_images(path, options.image_size, progress)
    if test_path is None:
        train, test = hold_out(images, HELD_OUT, options.seed)
        return Data(train, test, f"{path.name}, a fifth held out for testing")
    test = match_images(read_images(test_path, options.image_size, progress), images)
    return Data(images, test, f"{path.name}, tested on {test_path.name}")


def _digest(*parts: Images) -> str:
    digest = hashlib.sha256()
    for images in parts:
        digest.update(images.pixels.contiguous().numpy().data)
        digest.update(images.labels.numpy().data)
    return digest.hexdigest()
