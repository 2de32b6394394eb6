"""The models that the recipes train: small enough to read, and real enough to be worth training."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from kaisa.errors import ConfigurationError

Shape = tuple[int, int, int]


def mlp(shape: Shape, classes: int) -> nn.Module:
    """Build a perceptron with six hidden layers, without normalisation."""
    channels, height, width = shape
    sizes = [channels * height * width, *[128] * 6]
    hidden = [layer for inputs, outputs in pairwise(sizes) for layer in (nn.Linear(inputs, outputs), nn.Tanh())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(sizes[-1], classes))


def logistic(shape: Shape, classes: int) -> nn.Module:
    """Build multinomial logistic regression, whose loss is convex."""
    channels, height, width = shape
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, classes))


def cnn(shape: Shape, classes: int) -> nn.Module:
    """Build four convolutions, one of stride 2, and a linear layer on the mean over positions."""
    widths = [shape[0], 32, 32, 64, 64]
    layers: list[nn.Module] = []
    for (inputs, outputs), stride in zip(pairwise(widths), (1, 2, 1, 1), strict=True):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes)]
    return initialize_(nn.Sequential(*layers, *head))


class ResidualBlock(nn.Module):
    """Two 3 by 3 convolutions around which the input is added: He et al. 2016, option A."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.missing = outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output; channels that the input lacks are zero in the shortcut."""
        y = functional.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return functional.relu(y + functional.pad(shortcut, (0, 0, 0, 0, 0, self.missing)))


def resnet(shape: Shape, classes: int, blocks: int) -> nn.Module:
    """Build a residual network for 32 by 32 images with 6 * blocks + 2 layers (He et al. 2016)."""
    stages = [(16, 16, 1), (16, 32, 2), (32, 64, 2)]
    body = [
        ResidualBlock(inputs if first else outputs, outputs, stride if first else 1)
        for inputs, outputs, stride in stages
        for first in [True] + [False] * (blocks - 1)
    ]
    stem = [nn.Conv2d(shape[0], 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes)]
    return initialize_(nn.Sequential(*stem, *body, *head))


def initialize_(model: nn.Module) -> nn.Module:
    """Set the weights of convolutions that rectifiers follow (He et al. 2015), and no bias."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


class EncoderBlock(nn.Module):
    """The linear layers of a block of BERT (Devlin et al. 2019), without heads and normalisation.

    The four projections of attention follow one another; what matters here is how large they are.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        self.widen = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output; the input is added to both halves."""
        y = x
        for projection in self.attention:
            y = torch.tanh(projection(y))
        x = x + y
        wide: Tensor = functional.gelu(self.widen(x))
        narrowed: Tensor = self.narrow(wide)
        return x + narrowed


def encoder(blocks: int, width: int) -> nn.Module:
    """Build a stack of linear layers of the shapes of BERT: 12 blocks of 768 for base, 24 of 1024 for large."""
    return nn.Sequential(*(EncoderBlock(width) for _ in range(blocks)))


MODELS: dict[str, Callable[[Shape, int], nn.Module]] = {
    "mlp": mlp,
    "cnn": cnn,
    "resnet8": lambda shape, classes: resnet(shape, classes, 1),
    "resnet20": lambda shape, classes: resnet(shape, classes, 3),
    "resnet32": lambda shape, classes: resnet(shape, classes, 5),
    "logistic": logistic,
}


def build_model(name: str, shape: Shape, classes: int) -> nn.Module:
    """Build a model with random weights for images of a shape.

    Raises:
        ConfigurationError: there is no model of that name.
    """
    if name not in MODELS:
        raise ConfigurationError(f"unknown model {name!r}; choose from {', '.join(MODELS)}")
    return MODELS[name](shape, classes)
