"""K-FAC in a plain loop of your own: handwritten digits, with checkpoints that a stopped run goes on from.

Run it twice, with more epochs the second time:

    python examples/own_loop.py --epochs 5 --output runs/digits
"""

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import kaisa
from kaisa.kfac import checkpoint

TRAINED = 1437  # of 1797 images; the others are for the test


def digits() -> tuple[Tensor, Tensor]:
    """Returns images (1797, 1, 8, 8) and labels (1797,), in an order of their own."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(data.images, dtype=torch.float32)[order, None] / 16, torch.tensor(data.target)[order]


def network() -> nn.Module:
    """Returns a small convolutional network."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 16, 10),
    )


def train(epochs: int, output: Path | None) -> float:
    """Trains, from the last checkpoint in ``output`` if there is one; returns the accuracy on the test images."""
    images, labels = digits()
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    kfac = kaisa.KFACPreconditioner(model, optimizer, damping=0.01, factor_update_steps=5, inv_update_steps=20)
    first = 0
    if output is not None and checkpoint.latest(output) is not None:
        extra = checkpoint.load(output, kfac, model, optimizer)
        first = extra["epoch"]
        schedule.load_state_dict(extra["schedule"])
    for epoch in range(first, epochs):
        model.train()
        order = torch.randperm(TRAINED, generator=torch.Generator().manual_seed(epoch))
        for batch in order.split(64):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            loss.backward()
            kfac.step()  # after the backward pass, before clipping and the optimizer
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
        schedule.step()
        accuracy = evaluate(model, images[TRAINED:], labels[TRAINED:])
        print(f"epoch {epoch + 1}: loss {loss.item():.4f}, test accuracy {accuracy:.3f}")
        if output is not None:
            extra = {"epoch": epoch + 1, "schedule": schedule.state_dict()}
            checkpoint.save(output, kfac, model, optimizer, extra)
    return evaluate(model, images[TRAINED:], labels[TRAINED:])


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Returns the share of images that are classified right."""
    model.eval()
    return (model(images).argmax(1) == labels).float().mean().item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--output", type=Path, help="where checkpoints are written, and found again")
    arguments = parser.parse_args()
    print(f"test accuracy {train(arguments.epochs, arguments.output):.3f}")
