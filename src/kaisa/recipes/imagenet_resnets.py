"""Residual networks for ImageNet, as published: ResNet-18, -50, -101 and -152.

    stem    7×7 convolution of stride 2, normalisation, maximum over 3×3 of stride 2
    stages  of 64, 128, 256, 512 channels; all but the first begin with stride 2
    head    mean over positions, Linear

(He et al. 2016, arXiv 1512.03385, table 1; the stride of a bottleneck is in its 3×3 convolution, as in Goyal et al.
2017 and torchvision.) Modules have torchvision's names, so that its weights fit.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from kaisa.recipes.models import initialize_

WIDTHS = (64, 128, 256, 512)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with a shortcut."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class Bottleneck(nn.Module):
    """A 3×3 convolution between two of 1×1, four times as wide outside, with a shortcut."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = self.expansion * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        y = functional.relu(self.bn1(self.conv1(x)))
        y = functional.relu(self.bn2(self.conv2(y)))
        return functional.relu(self.bn3(self.conv3(y)) + self.downsample(x))


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    if inputs == outputs and stride == 1:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class ImageNetResNet(nn.Module):
    """A stem, four stages of blocks and a linear head."""

    def __init__(
        self, block: type[BasicBlock | Bottleneck], depths: Sequence[int], classes: int = 1000, channels: int = 3
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, WIDTHS[0], 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        inputs = WIDTHS[0]
        for index, (width, depth) in enumerate(zip(WIDTHS, depths, strict=True)):
            blocks = []
            for first in [True] + [False] * (depth - 1):
                blocks.append(block(inputs, width, 2 if first and index > 0 else 1))
                inputs = block.expansion * width
            self.add_module(f"layer{index + 1}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, classes)
        initialize_(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores (batch, classes) of images (batch, channels, height, width)."""
        x = self.maxpool(functional.relu(self.bn1(self.conv1(x))))
        for index in range(len(WIDTHS)):
            x = self.get_submodule(f"layer{index + 1}")(x)
        scores: Tensor = self.fc(self.avgpool(x).flatten(1))
        return scores


def resnet18(classes: int = 1000, channels: int = 3) -> nn.Module:
    """Build ResNet-18: 11.69 million parameters with 1000 classes."""
    return ImageNetResNet(BasicBlock, (2, 2, 2, 2), classes, channels)


def resnet50(classes: int = 1000, channels: int = 3) -> nn.Module:
    """Build ResNet-50: 25.56 million parameters with 1000 classes."""
    return ImageNetResNet(Bottleneck, (3, 4, 6, 3), classes, channels)


def resnet101(classes: int = 1000, channels: int = 3) -> nn.Module:
    """Build ResNet-101: 44.55 million parameters with 1000 classes."""
    return ImageNetResNet(Bottleneck, (3, 4, 23, 3), classes, channels)


def resnet152(classes: int = 1000, channels: int = 3) -> nn.Module:
    """Build ResNet-152: 60.19 million parameters with 1000 classes."""
    return ImageNetResNet(Bottleneck, (3, 8, 36, 3), classes, channels)
