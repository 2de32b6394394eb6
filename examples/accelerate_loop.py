"""K-FAC in a loop under Accelerate: handwritten digits, accumulation, clipping, mixed precision, resuming.

Run it in one process or in several:

    python examples/accelerate_loop.py --epochs 5 --output runs/accelerate
    accelerate launch --cpu --num-processes 2 examples/accelerate_loop.py
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from kaisa.integrations import accelerate as kaisa_accelerate


def loaders(batch_size: int) -> tuple[DataLoader, DataLoader]:
    """Returns the training and the test images, 1437 and 360 of 8×8, in batches."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).flatten(1) / 16
    trained, tested = random_split(
        TensorDataset(images, torch.tensor(data.target)), [1437, 360], torch.Generator().manual_seed(0)
    )
    return DataLoader(trained, batch_size, shuffle=True), DataLoader(tested, 360)


def train(epochs: int, output: Path | None = None, mixed_precision: str = "no") -> float:
    """Trains, from ``output`` if there is a state; returns the accuracy on the test images."""
    accelerator = Accelerator(gradient_accumulation_steps=2, mixed_precision=mixed_precision)
    set_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model, optimizer, trained, tested = accelerator.prepare(model, optimizer, *loaders(32))
    kfac = kaisa_accelerate.preconditioner(
        accelerator, model, optimizer, damping=0.01, factor_update_steps=5, inv_update_steps=20
    )
    first = 0
    if output is not None and output.is_dir():
        accelerator.load_state(str(output))
        first = kfac.steps // -(-len(trained) // 2)
    for epoch in range(first, epochs):
        model.train()
        trained.set_epoch(epoch)
        for images, labels in trained:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(images), labels)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.unscale_gradients(optimizer)
                    kfac.step()
                    nn.utils.clip_grad_norm_(model.parameters(), 5.0)
                optimizer.step()
                optimizer.zero_grad()
        accuracy = evaluate(accelerator, model, tested)
        accelerator.print(f"epoch {epoch + 1}: loss {loss.item():.4f}, test accuracy {accuracy:.3f}")
        if output is not None:
            accelerator.save_state(str(output))
    return evaluate(accelerator, model, tested)


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: nn.Module, tested: DataLoader) -> float:
    """Returns the share of images that are classified right."""
    model.eval()
    right = [
        accelerator.gather_for_metrics(model(images).argmax(1) == labels).float().cpu() for images, labels in tested
    ]
    return torch.cat(right).mean().item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--output", type=Path, help="where the state is written, and found again")
    parser.add_argument("--mixed-precision", choices=["no", "bf16", "fp16"], default="no")
    arguments = parser.parse_args()
    print(f"test accuracy {train(arguments.epochs, arguments.output, arguments.mixed_precision):.3f}")
