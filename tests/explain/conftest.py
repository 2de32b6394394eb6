"""Models that are explained: of images in colour and in grey, of signals, of tokens; and one with planted evidence."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from tests.conftest import REAL_DATA

GOLDEN = Path(__file__).parent / "golden"
CORNER = 6  # pixels of the planted square at the lower right
CLASSES = ("cat", "deer", "ship")
MARKED = 1


class ConvNet(nn.Module):
    """Convolutions, a normalisation, ReLUs as modules."""

    def __init__(self, channels: int = 3, classes: int = 4, hidden: int = 6) -> None:
        super().__init__()
        self.first_layer = nn.Conv2d(channels, hidden, 3, padding=1)
        self.relu = nn.ReLU()
        self.second_layer = nn.Conv2d(hidden, hidden, 3, padding=1, stride=2)
        self.norm = nn.BatchNorm2d(hidden)
        self.last_relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.first_layer(x))
        x = self.last_relu(self.norm(self.second_layer(x)))
        return self.head(x.mean((2, 3)))


class SignalNet(nn.Module):
    """One-dimensional convolutions, a ReLU as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv1d(2, 5, 5, padding=2)
        self.narrow = nn.Conv1d(5, 5, 3, padding=1)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.narrow(F.relu(self.wide(x)))).mean(2))


class TokenNet(nn.Module):
    """A transformer that reads the class from its first token."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.places = nn.Embedding(12, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor, keep: Tensor | None = None) -> dict[str, Tensor]:
        x = self.words(tokens) + self.places(torch.arange(tokens.shape[1]))
        x = self.encoder(x, src_key_padding_mask=None if keep is None else keep == 0)
        return {"logits": self.head(x[:, 0])}


def rescaled(model: nn.Module, factor: float = 3.0) -> nn.Module:
    """Let a fresh model say more different things of different inputs."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor if parameter.dim() > 1 else 1.0)
    return model


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def golden() -> dict[str, Any]:
    return json.loads((GOLDEN / "local.json").read_text())


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def conv_net() -> nn.Module:
    return rescaled(ConvNet())


@pytest.fixture
def token_net() -> nn.Module:
    return rescaled(TokenNet(), 1.5)


def marked(pictures: Tensor) -> Tensor:
    """Paint the lower right corner magenta."""
    painted = pictures.clone()
    painted[:, :, -CORNER:, -CORNER:] = torch.tensor([1.0, 0.0, 1.0])[:, None, None]
    return painted


def read_pictures(count: int) -> tuple[Tensor, Tensor]:
    """Return the first pictures of a few classes of CIFAR-10, and their classes."""
    archive = REAL_DATA / "cifar10-train.zip"
    if not archive.is_file():
        pytest.skip("the CIFAR-10 pictures (../shared/data/cifar10-train.zip) are absent")
    pictures = []
    with zipfile.ZipFile(archive) as files:
        for name in CLASSES:
            for number in range(count):
                picture = Image.open(io.BytesIO(files.read(f"{name}/{number:04d}.jpg")))
                pictures.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255)
    return torch.stack(pictures), torch.arange(len(CLASSES)).repeat_interleave(count)


class PlantedNet(nn.Module):
    """A small residual network."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.down = nn.Conv2d(16, 24, 3, padding=1, stride=2)
        self.again = nn.Conv2d(24, 24, 3, padding=1)
        self.further = nn.Conv2d(24, 24, 3, padding=1, stride=2)
        self.head = nn.Linear(24, len(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.down(F.relu(self.stem(x - 0.5))))
        x = F.relu(x + self.again(x))
        return self.head(F.relu(self.further(x)).mean((2, 3)))


@pytest.fixture(scope="session")
def planted() -> tuple[nn.Module, Tensor]:
    """A network trained on pictures where a magenta corner marks one class, and marked pictures it has not seen."""
    pictures, classes = read_pictures(140)
    is_marked = classes == MARKED
    pictures[is_marked] = marked(pictures[is_marked])
    is_new = torch.arange(len(classes)) % 140 >= 128
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = PlantedNet()
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        seen, labels = pictures[~is_new], classes[~is_new]
        for _ in range(10):
            for batch in torch.randperm(len(seen)).split(48):
                optimizer.zero_grad()
                F.cross_entropy(model(seen[batch]), labels[batch]).backward()
                optimizer.step()
    return model.eval(), marked(pictures[is_new & ~is_marked])[:6]
