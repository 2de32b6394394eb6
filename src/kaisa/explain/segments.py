"""Superpixels: an image as a few patches of like colour, through scikit-image."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from kaisa.errors import ConfigurationError
from kaisa.explain.needs import load

COUNT = 64  # superpixels, about
WAYS = ("slic", "quickshift", "grid")


def superpixels(image: Tensor, way: str | Tensor | Any = "slic", count: int = COUNT) -> Tensor:
    """Return the number of the superpixel that each pixel is in, from 0 on without gaps.

    Args:
        image: (channels, height, width), of any number of channels and any range.
        way: `slic` for compact patches, `quickshift` with the constants of `lime` (kernel 4, distance 200, ratio 0.2),
            `grid` for squares, or the numbers themselves, (height, width).
        count: about how many, for `slic` and `grid`.

    Raises:
        ConfigurationError: the way is unknown, or the numbers do not fit.
    """
    height, width = image.shape[1:]
    if not isinstance(way, str):
        return _given(way, height, width)
    if way not in WAYS:
        raise ConfigurationError(f"segments is {way!r}; expected {', '.join(WAYS)} or a number for each pixel")
    if not isinstance(count, int) or count < 2:
        raise ConfigurationError(f"count is {count!r}; expected at least 2 superpixels")
    numbers = _grid(height, width, count) if way == "grid" else _by_colour(image, way, count)
    return _without_gaps(numbers)


def _by_colour(image: Tensor, way: str, count: int) -> np.ndarray[Any, Any]:
    segmentation = load("skimage.segmentation", "an explanation of images by perturbation")
    pixels = image.detach().cpu().double().numpy().transpose(1, 2, 0)
    low, high = pixels.min(), pixels.max()
    pixels = (pixels - low) / (high - low) if high > low else np.zeros_like(pixels)
    if way == "slic":
        return np.asarray(segmentation.slic(pixels, n_segments=count, compactness=0.1, start_label=0, channel_axis=2))
    colour = pixels if pixels.shape[2] == 3 else np.repeat(pixels.mean(2, keepdims=True), 3, axis=2)
    return np.asarray(segmentation.quickshift(colour, kernel_size=4, max_dist=200, ratio=0.2, rng=0))


def _grid(height: int, width: int, count: int) -> np.ndarray[Any, Any]:
    rows = max(1, round((count * height / width) ** 0.5))
    columns = max(1, round(count / rows))
    down = np.arange(height) * min(rows, height) // height
    along = np.arange(width) * min(columns, width) // width
    return np.asarray(down[:, None] * columns + along[None, :])


def _given(numbers: Any, height: int, width: int) -> Tensor:
    found = torch.as_tensor(np.asarray(numbers.cpu() if isinstance(numbers, Tensor) else numbers))
    if found.shape != (height, width) or found.is_floating_point():
        raise ConfigurationError(
            f"segments have the shape {tuple(found.shape)} and type {found.dtype}; expected one int for each of "
            f"{height}×{width} pixels"
        )
    return _without_gaps(found.numpy())


def _without_gaps(numbers: np.ndarray[Any, Any]) -> Tensor:
    return torch.as_tensor(np.unique(numbers, return_inverse=True)[1].reshape(numbers.shape))
