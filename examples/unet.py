"""K-FAC for a U-Net that finds an object in images: folders image/ and label/ with files of the same names.

python examples/unet.py ISBI2012 --epochs 8
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import kaisa


def read_pairs(folder: Path) -> tuple[Tensor, Tensor]:
    """Returns grey images (count, 1, height, width) and masks (count, height, width) of 0 and 1."""
    names = sorted(path.name for path in (folder / "image").iterdir())
    images, masks = (
        torch.tensor(np.stack([np.array(Image.open(folder / kind / name).convert("L")) for name in names]))
        for kind in ("image", "label")
    )
    return images[:, None].float() / 128 - 1, (masks >= 128).float()


def convolutions(inputs: int, outputs: int) -> nn.Module:
    """Returns two convolutions with normalisation."""
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Three levels down by a maximum, and up by transposed convolutions; what goes across is concatenated."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(map(convolutions, (1, width, 2 * width), (width, 2 * width, 4 * width)))
        self.widen = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, stride=2) for w in (2 * width, width))
        self.up = nn.ModuleList(convolutions(2 * w, w) for w in (2 * width, width))
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits (batch, height, width)."""
        first = self.down[0](x)
        second = self.down[1](nn.functional.max_pool2d(first, 2))
        x = self.down[2](nn.functional.max_pool2d(second, 2))
        for widen, convolve, across in zip(self.widen, self.up, (second, first), strict=True):
            x = convolve(torch.cat([across, widen(x)], 1))
        return self.head(x)[:, 0]


def crops(images: Tensor, masks: Tensor, count: int, side: int) -> tuple[Tensor, Tensor]:
    """Returns squares at random places of random images, and of their masks."""
    rows = torch.randint(len(images), (count,)).tolist()
    corners = torch.stack([torch.randint(size - side + 1, (count,)) for size in masks.shape[1:]], 1).tolist()
    each = zip(rows, corners, strict=True)
    parts = [(row, slice(top, top + side), slice(left, left + side)) for row, (top, left) in each]
    return torch.stack([images[r, :, y, x] for r, y, x in parts]), torch.stack([masks[part] for part in parts])


def train(folder: Path, epochs: int, width: int = 8, side: int = 128, steps: int = 24) -> float:
    """Trains on crops of four fifths of the images; returns the Dice coefficient on the others."""
    torch.manual_seed(0)
    images, masks = read_pairs(folder)
    held = max(1, len(images) // 5)
    model = UNet(width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    pixels = 16 * side * side  # the terms of the loss, a mean over pixels
    kfac = kaisa.KFACPreconditioner(model, optimizer, factor_update_steps=5, inv_update_steps=20, loss_terms=pixels)
    for epoch in range(epochs):
        model.train()
        for _ in range(steps):
            inputs, targets = crops(images[held:], masks[held:], 16, side)
            optimizer.zero_grad()
            loss = nn.functional.binary_cross_entropy_with_logits(model(inputs), targets)
            loss.backward()
            kfac.step()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            found, expected = torch.cat([model(image[None]) for image in images[:held]]) > 0, masks[:held] > 0
        dice = (2 * (found & expected).sum() / (found.sum() + expected.sum())).item()
        print(f"epoch {epoch + 1}: loss {loss.item():.4f}, test Dice {dice:.3f}")
    return dice


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="image/NAME and label/NAME; sides are multiples of 4")
    parser.add_argument("--epochs", type=int, default=8)
    arguments = parser.parse_args()
    train(arguments.folder, arguments.epochs)
