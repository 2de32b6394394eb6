"""The handwritten digits that come with scikit-learn: 1,797 images of 8 by 8 pixels, no download.

Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository 1998
(the 1,797 images of its test set); each pixel counts, from 0 to 16, the set bits of a 4 by 4 block.
"""

from __future__ import annotations

import torch

from kaisa.recipes.extras import load_extra
from kaisa.recipes.images import Images


def read_digits() -> Images:
    """Return all digits, their 17 shades spread over a byte."""
    loaded = load_extra("sklearn.datasets", "the handwritten digits").load_digits()
    shades = torch.from_numpy(loaded.images)
    pixels = (shades * (255 / 16)).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(loaded.target).long()
    return Images(pixels, labels, tuple(str(digit) for digit in range(10)))
