"""K-FAC for logistic regression and for a perceptron: handwritten digits in a plain loop.

python examples/logistic.py
python examples/logistic.py --hidden 64 64
"""

import argparse
from itertools import pairwise

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import kaisa

TRAINED = 1437  # of 1797 images; the others are for the test


def digits() -> tuple[Tensor, Tensor]:
    """Returns images (1797, 64) and labels (1797,), in an order of their own."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(data.data, dtype=torch.float32)[order] / 16, torch.tensor(data.target)[order]


def perceptron(hidden: list[int]) -> nn.Module:
    """Returns a perceptron; without hidden layers it is logistic regression."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise([64, *hidden, 10]):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def train(epochs: int, hidden: list[int], with_kfac: bool = True) -> float:
    """Trains; returns the loss on the test images."""
    torch.manual_seed(0)
    images, labels = digits()
    model = perceptron(hidden)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    kfac = None
    if with_kfac:
        kfac = kaisa.KFACPreconditioner(model, optimizer, damping=0.01, factor_update_steps=5, inv_update_steps=10)
    for epoch in range(epochs):
        for batch in torch.randperm(TRAINED).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            if kfac is not None:
                kfac.step()
            optimizer.step()
        schedule.step()
        with torch.no_grad():
            loss = nn.functional.cross_entropy(model(images[TRAINED:]), labels[TRAINED:]).item()
        print(f"epoch {epoch + 1}: test loss {loss:.4f}")
    return loss


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--hidden", type=int, nargs="*", default=[], help="widths of the hidden layers")
    parser.add_argument("--no-kfac", action="store_true", help="SGD alone")
    arguments = parser.parse_args()
    train(arguments.epochs, arguments.hidden, not arguments.no_kfac)
