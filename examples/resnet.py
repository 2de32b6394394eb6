"""K-FAC for a residual network: images from a folder with one subfolder a class, in a plain loop.

python examples/resnet.py IMAGES --epochs 10 --blocks 3
"""

import argparse
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import kaisa


def read_images(folder: Path, side: int) -> tuple[Tensor, Tensor, int]:
    """Returns images (count, 3, side, side), labels (count,) and how many classes there are."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    files = [(file, label) for label, path in enumerate(classes) for file in sorted(path.iterdir())]
    pixels = [np.array(Image.open(file).convert("RGB").resize((side, side))) for file, _ in files]
    images = torch.tensor(np.stack(pixels)).permute(0, 3, 1, 2).float() / 128 - 1
    return images, torch.tensor([label for _, label in files]), len(classes)


class Block(nn.Module):
    """Two convolutions and what goes past them."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.branch = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.past = nn.Identity() if stride == 1 else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Returns what the block makes of its input."""
        return nn.functional.relu(self.branch(x) + self.past(x))


def resnet(classes: int, blocks: int) -> nn.Module:
    """Returns a residual network of 6 · blocks + 2 layers; three blocks a width make ResNet-20."""
    widths = [16] * (blocks + 1) + [32] * blocks + [64] * blocks
    body = [Block(*pair) for pair in pairwise(widths)]
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), *body),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes)),
    )


def train(folder: Path, epochs: int, blocks: int = 3, side: int = 32, batch_size: int = 128) -> float:
    """Trains on four fifths of the images; returns the accuracy on the others."""
    torch.manual_seed(0)
    images, labels, classes = read_images(folder, side)
    tested, trained = torch.randperm(len(labels)).tensor_split([len(labels) // 5])
    model = resnet(classes, blocks)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    kfac = kaisa.KFACPreconditioner(model, optimizer, damping=0.003, factor_update_steps=10, inv_update_steps=100)
    for epoch in range(epochs):
        model.train()
        for batch in trained[torch.randperm(len(trained))].split(batch_size):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            loss.backward()
            kfac.step()
            optimizer.step()
        schedule.step()
        model.eval()
        with torch.no_grad():
            right = [model(images[part]).argmax(1) == labels[part] for part in tested.split(batch_size)]
        accuracy = torch.cat(right).float().mean().item()
        print(f"epoch {epoch + 1}: loss {loss.item():.4f}, test accuracy {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="images, a subfolder a class")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--blocks", type=int, default=3, help="of each width")
    arguments = parser.parse_args()
    train(arguments.folder, arguments.epochs, arguments.blocks)
