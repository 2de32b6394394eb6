"""Images with masks, from a folder or a zip file with a subfolder of each.

image/NAME.png   what is seen        (or images)
label/NAME.png   the mask of the same name: bright where the object is   (or labels, mask, masks)

The order of the names is that of the images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from kaisa.errors import DataError
from kaisa.recipes.images import WORKERS, Progress, decode_ahead, is_hidden, is_image, open_tree, stack_images

IMAGE_FOLDERS = ("image", "images")
MASK_FOLDERS = ("label", "labels", "mask", "masks")
BRIGHT = 128  # from here on a pixel of a mask is of the object


@dataclass(frozen=True)
class MaskedImages:
    """Images and where in them the object is.

    Attributes:
        pixels: bytes of shape (images, channels, height, width).
        masks: bytes of shape (images, height, width), 1 where the object is and 0 elsewhere.
    """

    pixels: Tensor
    masks: Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one image."""
        channels, height, width = self.pixels.shape[1:]
        return channels, height, width

    def select(self, rows: Tensor) -> MaskedImages:
        """Return some of the images."""
        return MaskedImages(self.pixels[rows], self.masks[rows])


def read_masked_images(path: Path, progress: Progress | None = None, workers: int = WORKERS) -> MaskedImages:
    """Read and decode all images and their masks, in the order of their names.

    Args:
        path: a folder or a zip file.
        progress: told how many images of how many are decoded, and then of masks.
        workers: threads that decode.

    Raises:
        DataError: the path, an image or a mask is not as it should be.
    """
    with open_tree(path) as tree:
        images, masks = zip(*list_pairs(tree.names, path), strict=True)
        pixels = stack_images(decode_ahead(tree, path, images, workers), len(images), progress)
        shades = stack_images(decode_ahead(tree, path, masks, workers), len(masks), progress, pixels.shape[2:])
    return MaskedImages(pixels, _objects(shades[:, 0], path))


def _objects(masks: Tensor, path: Path) -> Tensor:
    """Return 1 where masks are bright and 0 elsewhere; dim ones are of another kind, such as numbers of classes."""
    brightest = int(masks.max())
    if 0 < brightest < BRIGHT:
        raise DataError(
            f"no mask in {path} is bright anywhere: their pixels go up to {brightest}, those of the object are "
            f"{BRIGHT} or more; draw it white, as 255"
        )
    return (masks >= BRIGHT).to(torch.uint8)


def list_pairs(names: Sequence[str], path: Path) -> list[tuple[str, str]]:
    """Return image and mask of each name.

    Raises:
        DataError: there are none, or an image lacks its mask, or a mask its image.
    """
    files = [name for name in names if is_image(name) and not is_hidden(name)]
    images, masks = (_in_folders(files, folders) for folders in (IMAGE_FOLDERS, MASK_FOLDERS))
    if not images:
        raise DataError(f"no images with masks in {path}; give them as image/NAME.png and label/NAME.png")
    for some, others, kind in ((images, masks, "mask"), (masks, images, "image")):
        lonely = sorted(set(some) - set(others))
        if lonely:
            raise DataError(f"{some[lonely[0]]} in {path} has no {kind} of the same name")
    return [(images[stem], masks[stem]) for stem in sorted(images)]


def _in_folders(files: Sequence[str], folders: Sequence[str]) -> dict[str, str]:
    return {PurePosixPath(name).stem: name for name in files if PurePosixPath(name).parent.name.lower() in folders}


def split_masked_images(images: MaskedImages, share: float, seed: int) -> tuple[MaskedImages, MaskedImages]:
    """Split off a share at random: what is left, and what is held out.

    Raises:
        DataError: there is only one image.
    """
    if len(images) < 2:
        raise DataError("there is one image; give two or more")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    count = min(max(1, round(share * len(images))), len(images) - 1)
    return images.select(order[count:].sort().values), images.select(order[:count].sort().values)
