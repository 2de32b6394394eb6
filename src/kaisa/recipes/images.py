"""Labelled images from a folder or a zip file with one subfolder a class.

    CLASS/NAME.jpg      folders of the archive that hold all classes, as in DATASET/CLASS/NAME.jpg,
                        are skipped; files that are no images and hidden files are left out

A zip file is read in place. The images are decoded once, several at a time, and stay in memory as bytes, which is a
quarter of what their floats would take; nothing is held twice.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kaisa.errors import DataError
from kaisa.recipes.extras import load_extra

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})

WORKERS = 4  # threads that decode images, where no other number is given
AHEAD = 2  # images a thread that may wait to be used

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Images:
    """Images and what they show.

    Attributes:
        pixels: bytes of shape (images, channels, height, width).
        labels: for each image the index of its class.
        classes: the names of the classes.
    """

    pixels: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one image."""
        channels, height, width = self.pixels.shape[1:]
        return channels, height, width


class Tree:
    """Files by name, in a folder or in a zip file: the one difference between the two."""

    def __init__(self, names: Sequence[str], read: Callable[[str], bytes]) -> None:
        self.names = names
        self.read = read


@contextmanager
def open_tree(path: Path) -> Iterator[Tree]:
    """Open a folder or a zip file; names of folders end in a slash.

    Raises:
        DataError: there is nothing at the path, or it is neither of the two.
    """
    if path.is_dir():
        yield Tree(_names_in_folder(path), lambda name: (path / name).read_bytes())
    elif not path.exists():
        raise DataError(f"no such folder or zip file: {path}")
    elif not zipfile.is_zipfile(path):
        raise DataError(f"{path} is neither a folder nor a zip file; give images as CLASS/NAME.jpg")
    else:
        with zipfile.ZipFile(path) as archive:
            yield Tree(archive.namelist(), archive.read)


def _names_in_folder(path: Path) -> list[str]:
    names = []
    for folder, subfolders, files in os.walk(path, followlinks=True):
        inside = Path(folder).relative_to(path)
        names += [f"{(inside / subfolder).as_posix()}/" for subfolder in subfolders]
        names += [(inside / file).as_posix() for file in files]
    return names


def list_classes(names: Sequence[str], path: Path) -> dict[str, list[str]]:
    """Return the images of each class; classes and images in the order of their names.

    Raises:
        DataError: there are fewer than two classes, or one without images.
    """
    visible = [name for name in names if not is_hidden(name)]
    depth = _depth_of_classes(visible)
    classes: dict[str, list[str]] = {}
    for name in sorted(visible):
        parts = PurePosixPath(name).parts
        if len(parts) <= depth + (not name.endswith("/")):
            continue
        members = classes.setdefault(parts[depth], [])
        if is_image(name):
            members.append(name)
    _check_classes(classes, path)
    return classes


def is_hidden(name: str) -> bool:
    """Whether a file is one that systems leave behind."""
    return any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(name).parts)


def is_image(name: str) -> bool:
    """Whether a name in an archive or a folder is that of an image."""
    return not name.endswith("/") and PurePosixPath(name).suffix.lower() in SUFFIXES


def _depth_of_classes(names: Sequence[str]) -> int:
    """Return how many folders lie around all classes."""
    folders = [PurePosixPath(name).parent.parts for name in names if is_image(name)]
    if not folders:
        return 0
    shared = takewhile(lambda level: len(set(level)) == 1, zip(*folders, strict=False))
    return max(0, min(sum(1 for _ in shared), min(map(len, folders)) - 1))


def _check_classes(classes: dict[str, list[str]], path: Path) -> None:
    empty = [name for name, members in classes.items() if not members]
    if empty:
        raise DataError(f"class folder without images: {empty[0]} in {path}")
    if len(classes) < 2:
        raise DataError(
            f"found {len(classes)} class folders with images in {path}; give two or more, as CLASS/NAME.jpg"
        )


def read_images(
    path: Path, side: int | None = None, progress: Progress | None = None, workers: int = WORKERS
) -> Images:
    """Read and decode all images.

    They become grey if all of them are, and red, green, blue otherwise.

    Args:
        path: a folder or a zip file with one subfolder a class.
        side: resize every image to this many pixels in width and height.
        progress: told how many images of how many are decoded.
        workers: threads that decode.

    Raises:
        DataError: the path, a class or an image is not as it should be.
    """
    with open_tree(path) as tree:
        classes = list_classes(tree.names, path)
        members = [(name, label) for label, names in enumerate(classes.values()) for name in names]
        decoded = decode_ahead(tree, path, [name for name, _ in members], workers, side)
        pixels = stack_images(decoded, len(members), progress, advice="give --image-size to resize")
    labels = torch.tensor([label for _, label in members])
    return Images(pixels, labels, tuple(classes))


def decode_ahead(
    tree: Tree, path: Path, names: Sequence[str], workers: int, side: int | None = None
) -> Generator[tuple[str, NDArray[np.uint8]]]:
    """Yield path and pixels of images in their order, while threads decode the next ones.

    Raises:
        DataError: one is no image, or a damaged one.
    """

    def decode(name: str) -> tuple[str, NDArray[np.uint8]]:
        return f"{path}/{name}", decode_image(tree.read(name), f"{path}/{name}", side)

    ahead: deque[Future[tuple[str, NDArray[np.uint8]]]] = deque()
    with ThreadPoolExecutor(workers) as readers:
        for name in names:
            ahead.append(readers.submit(decode, name))
            if len(ahead) > AHEAD * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def stack_images(
    decoded: Iterable[tuple[str, NDArray[np.uint8]]],
    count: int,
    progress: Progress | None = None,
    size: Sequence[int] | None = None,
    advice: str = "make them equal",
) -> Tensor:
    """Return equally large images as one tensor (images, channels, height, width), in colour if any of them is.

    Args:
        decoded: name and pixels (height, width, channels) of each.
        count: how many there are.
        progress: told how many images of how many are decoded.
        size: the height and width that they must have; None for those of the first.
        advice: what to do about an image of another size.

    Raises:
        DataError: one has another size.
    """
    whole: NDArray[np.uint8] = np.empty(0, np.uint8)
    for row, (name, pixels) in enumerate(decoded):
        height, width, channels = pixels.shape
        expected = (height, width) if size is None else tuple(size)
        if (height, width) != expected:
            raise DataError(f"{name} is {width}x{height} pixels, the first image {expected[1]}x{expected[0]}; {advice}")
        size = expected
        if row == 0:
            whole = np.empty((count, channels, height, width), np.uint8)
        elif channels > whole.shape[1]:
            whole = whole.repeat(channels, 1)  # those so far are grey
        whole[row] = pixels.transpose(2, 0, 1)
        if progress is not None:
            progress(row + 1, count)
    return torch.from_numpy(whole)


def decode_image(data: bytes, name: str, side: int | None = None) -> NDArray[np.uint8]:
    """Return the pixels of a file, of shape (height, width, 1 or 3).

    Raises:
        DataError: it is no image, a damaged one, or one of more shades than a byte has.
    """
    pillow = load_extra("PIL.Image", "reading images")
    try:
        with pillow.open(io.BytesIO(data)) as image:
            mode = image.mode
            decoded = image.convert("L" if mode in ("1", "L") else "RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"unreadable image: {name}") from error
    if mode.startswith(("I", "F")):  # Pillow would cut at white what it should scale
        raise DataError(f"{name} has more than 8 bits a pixel (Pillow's mode {mode}); convert it to 8 bits")
    if side is not None and decoded.size != (side, side):
        decoded = decoded.resize((side, side), pillow.Resampling.BILINEAR)
    pixels = np.asarray(decoded, dtype=np.uint8)
    return pixels.reshape(*pixels.shape[:2], -1)


def match_images(test: Images, train: Images) -> Images:
    """Return the test images with the labels of the training images.

    Raises:
        DataError: they show classes, or have a size, that the training images do not have.
    """
    unknown = sorted(set(test.classes) - set(train.classes))
    if unknown:
        raise DataError(f"the test images have a class that the training images lack: {unknown[0]}")
    pixels = test.pixels
    if len(pixels[0]) == 1:
        pixels = pixels.expand(-1, train.shape[0], -1, -1)
    if pixels.shape[1:] != train.pixels.shape[1:]:
        raise DataError(f"test images are {test.shape}, training images {train.shape}; make equal")
    positions = torch.tensor([train.classes.index(name) for name in test.classes])
    return Images(pixels, positions[test.labels], train.classes)


def hold_out(images: Images, share: float, seed: int) -> tuple[Images, Images]:
    """Split off a share of each class, at random: what is left, and what is held out.

    Raises:
        DataError: a class has fewer than two images.
    """
    generator = torch.Generator().manual_seed(seed)
    kept, held = [], []
    for label, name in enumerate(images.classes):
        members = (images.labels == label).nonzero().flatten()
        if len(members) < 2:
            raise DataError(f"class {name} has one image; give two or more, or --test-data")
        members = members[torch.randperm(len(members), generator=generator)]
        count = min(max(1, round(share * len(members))), len(members) - 1)
        held.append(members[:count])
        kept.append(members[count:])
    return _select(images, torch.cat(kept)), _select(images, torch.cat(held))


def _select(images: Images, rows: Tensor) -> Images:
    return replace(images, pixels=images.pixels[rows], labels=images.labels[rows])


def find_test_data(path: Path) -> Path | None:
    """Return NAME-test.zip (or folder NAME-test) beside NAME-train.zip, if it is there."""
    if not path.stem.endswith("-train"):
        return None
    sibling = path.with_name(path.name.removesuffix(path.suffix)[: -len("train")] + "test")
    sibling = sibling.with_name(sibling.name + path.suffix)
    return sibling if sibling.exists() else None
