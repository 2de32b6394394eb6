"""U-Net (Ronneberger et al. 2015, arXiv 1505.04597), with normalisation, and upwards by transposed convolutions.

    w ──────────────────────────────► w      each level two 3×3 convolutions;
      2w ────────────────────────► 2w        downwards a maximum over 2×2,
         4w ──────────────────► 4w           upwards a transposed convolution of 2×2;
            8w ────────────► 8w              what goes across is concatenated
               16w ────────►

The width w of the KAISA paper is 32 (7.76 million parameters), that of the original 64.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from kaisa.recipes.models import Shape, initialize_

LEVELS = 5
GRAIN = 2 ** (LEVELS - 1)
"""What height and width of an image must be multiples of."""


def _double_convolution(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Says of every pixel whether it is of the object."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(LEVELS)]
        self.shrink = nn.MaxPool2d(2)
        self.down = nn.ModuleList(_double_convolution(i, o) for i, o in pairwise([channels, *widths]))
        upwards = list(pairwise(reversed(widths)))
        self.widen = nn.ModuleList(nn.ConvTranspose2d(i, o, 2, stride=2) for i, o in upwards)
        self.up = nn.ModuleList(_double_convolution(2 * o, o) for _, o in upwards)
        self.head = nn.Conv2d(width, 1, 1)
        initialize_(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (batch, height, width) of images (batch, channels, height, width)."""
        across = []
        for level, convolve in enumerate(self.down):
            x = convolve(x if level == 0 else self.shrink(x))
            across.append(x)
        for widen, convolve, skipped in zip(self.widen, self.up, reversed(across[:-1]), strict=True):
            x = convolve(torch.cat([skipped, widen(x)], dim=1))
        logits: Tensor = self.head(x)
        return logits.squeeze(1)


def unet(shape: Shape, width: int) -> nn.Module:
    """Build a U-Net for images of a shape."""
    return UNet(shape[0], width)
