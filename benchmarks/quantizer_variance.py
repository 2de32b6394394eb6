"""Where the variance of a network's gradient comes from: sampling, and each quantiser at 2 to 8 bits.

    python benchmarks/quantizer_variance.py

Trains the convolutional network of the digits for some epochs, so that most examples are learnt and few still have
gradients of note, and reports on a batch of other digits. Writes the report and its picture.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kaisa.quantize import variance_report
from kaisa.recipes.digits import read_digits
from kaisa.recipes.models import build_model
from kaisa.recipes.record import describe_machine, describe_versions, find_commit

ROOT = Path(__file__).parents[1]
BATCH, HELD_OUT = 64, 128


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--probes", type=int, default=16)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "quantizer_variance.json")
    parser.add_argument("--image", type=Path, default=ROOT / "docs" / "images" / "quantized-variance.png")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    digits = read_digits()
    x, y = (digits.pixels.float() - 128) / 128, digits.labels
    order = torch.randperm(len(x))
    x, y = x[order], y[order]
    model = build_model("cnn", tuple(x.shape[1:]), 10)
    train(model, x[HELD_OUT:], y[HELD_OUT:], given.epochs)
    with torch.no_grad():
        accuracy = float((model(x[:HELD_OUT]).argmax(1) == y[:HELD_OUT]).float().mean())
    report = variance_report(model, (x[:HELD_OUT], y[:HELD_OUT]), probes=given.probes)
    print(f"accuracy on the digits of the report: {accuracy:.3f}\n\n{report}")
    report.save(given.output)
    saved = json.loads(given.output.read_text())
    about = {"machine": describe_machine(), "versions": describe_versions(), "commit": find_commit()}
    settings = {"epochs": given.epochs, "accuracy": accuracy, "probes": given.probes, "seed": 0}
    given.output.write_text(json.dumps({**about, **settings, **saved}, indent=1) + "\n", "utf-8")
    report.plot(given.image)


if __name__ == "__main__":
    main()
