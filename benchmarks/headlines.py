"""Whether the headlines of AdaHessian and ARSG reproduce at the size of a small machine.

    python benchmarks/headlines.py logistic                        # the handwritten digits, constant learning rate
    python benchmarks/headlines.py logistic_regularized            # with a penalty, so that there is an optimum
    python benchmarks/headlines.py resnet20 --data PATH-TO-ZIPS    # a part of CIFAR-10, short schedule

Every optimizer has the same grid of learning rates and the same seeds, weights and batches. Its rate is the one with
the lowest mean of the final training loss: on the logistic regression over the seeds themselves, on ResNet-20 over
another seed and half the epochs, so that the grid costs less. Weight decay is none. A run goes into the JSON when it is
over, and is not made again: an interrupted command goes on where it was.

The question to ARSG: after which share of the epochs is its training loss at or below the final one of Adam? To
AdaHessian: is it better than Adam on images that neither has seen?
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional

from kaisa.errors import DataError
from kaisa.optim import ARSG, RSG, AdaHessian, AtEpoch, ObservationBoost
from kaisa.recipes.batches import ImageBatches, ImageTests, Normalizer
from kaisa.recipes.contestants import learning_rate_share
from kaisa.recipes.digits import read_digits
from kaisa.recipes.files import written_whole
from kaisa.recipes.images import Images, hold_out, match_images, read_images
from kaisa.recipes.models import build_model
from kaisa.recipes.record import describe_machine, describe_versions, find_commit

RESULTS = Path(__file__).with_name("results")
SEEDS = (0, 1, 2)
OTHER_SEED = 100
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, momentum=0.9),
    "adam": torch.optim.Adam,
    "adam 0.999": partial(torch.optim.Adam, betas=(0.999, 0.999)),
    "adahessian": AdaHessian,
    "rsg": RSG,
    "arsg": ARSG,
    "arsg boosted": partial(ARSG, mu=0.05),
}
"""Adam with the decays of the paper's logistic regression too; boosted is the observation boost at 0.55 of the epochs,
as the paper's logistic regression has it."""
BOOST = 0.55
PENALTY = 1e-3


@dataclass(frozen=True)
class Task:
    """What is trained, and how long.

    Attributes:
        is_scheduled: whether the learning rate falls as in `kaisa train`; else it is constant.
        rates: the grid.
        hessian: where AdaHessian has Hz from: "second derivatives" or "differences" of gradients, which cost half.
        penalty: λ of the λ/2 · Σ w² that belongs to the loss.
        test: images for which accuracy and loss are told at the end; None where only the training loss is asked for.
    """

    name: str
    train: Images
    test: Images | None
    build: Callable[[], nn.Module]
    optimizers: tuple[str, ...]
    rates: tuple[float, ...]
    epochs: int
    batch_size: int = 128
    augment: bool = False
    is_scheduled: bool = False
    hessian: str = "second derivatives"
    grid_seeds: tuple[int, ...] = SEEDS
    grid_epochs: int | None = None
    penalty: float = 0.0

    def penalize(self, model: nn.Module) -> torch.Tensor:
        """Return what the penalty adds to the loss."""
        return self.penalty / 2 * sum((p**2).sum() for p in model.parameters()) if self.penalty else torch.zeros(())

    def describe(self) -> dict[str, Any]:
        return {
            "task": self.name,
            "train_images": len(self.train),
            "test_images": len(self.test) if self.test is not None else 0,
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "augment": self.augment,
            "is_scheduled": self.is_scheduled,
            "penalty": self.penalty,
            "rates": list(self.rates),
            "seeds": list(SEEDS),
            "grid_seeds": list(self.grid_seeds),
            "grid_epochs": self.grid_epochs,
        }


@dataclass(frozen=True)
class Run:
    """One optimizer with one rate and seed.

    Attributes:
        losses: over all training images after each epoch; on ResNet-20 the mean of its batches, before each step.
        seconds: of the processor, in training.
    """

    optimizer: str
    rate: float
    seed: int
    losses: list[float]
    test_accuracy: float
    test_loss: float
    seconds: float

    @property
    def final(self) -> float:
        return self.losses[-1] if math.isfinite(self.losses[-1]) else math.inf


def logistic(penalty: float = 0.0) -> Task:
    """Make the logistic regression on the handwritten digits."""
    train, test = hold_out(read_digits(), 0.2, 0)
    build = partial(_linear, math.prod(train.shape), len(train.classes))
    rates = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
    names = ("sgd", "adam", "adam 0.999", "adahessian", "rsg", "arsg", "arsg boosted")
    name = "logistic_regularized" if penalty else "logistic"
    return Task(name, train, test, build, names, rates, epochs=60, penalty=penalty)


def _linear(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, outputs))


def resnet20(data: Path, images: int, epochs: int, batch_size: int) -> Task:
    """Make ResNet-20 on as many CIFAR-10 images, equally many of each class."""
    every = read_images(data / "cifar10-train.zip")
    train = every if images >= len(every) else hold_out(every, images / len(every), 0)[1]
    test = match_images(read_images(data / "cifar10-test.zip"), train)
    build = partial(_resnet20, train.shape, len(train.classes))
    return Task(
        "resnet20",
        train,
        test,
        build,
        optimizers=("adam", "arsg", "adahessian"),
        rates=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
        epochs=epochs,
        batch_size=batch_size,
        augment=True,
        is_scheduled=True,
        hessian="differences",
        grid_seeds=(OTHER_SEED,),
        grid_epochs=max(1, epochs // 2),
    )


def _resnet20(shape: torch.Size, classes: int) -> nn.Module:
    return build_model("resnet20", shape, classes).to(memory_format=torch.channels_last)  # a fifth faster here


def make_run(task: Task, name: str, rate: float, seed: int) -> Run:
    """Train once."""
    torch.manual_seed(seed)
    model = task.build()
    optimizer = OPTIMIZERS[name](model.parameters(), lr=rate)
    boost = ObservationBoost(optimizer, AtEpoch(round(BOOST * task.epochs))) if name == "arsg boosted" else None
    normalize = Normalizer.fit(task.train)
    batches = ImageBatches(task.train, normalize, task.batch_size, task.augment, seed)
    losses: list[float] = []
    seconds = 0.0
    for epoch in range(task.epochs):
        start = time.process_time()
        losses.append(_train(model, optimizer, batches, task, epoch, rate))
        seconds += time.process_time() - start
        if boost is not None:
            boost.step()
        if not task.is_scheduled:
            loss, _ = evaluate(model, ImageTests(task.train, normalize))
            losses[-1] = loss + float(task.penalize(model).detach())
        if not math.isfinite(losses[-1]):
            return Run(name, rate, seed, losses, 0.0, math.inf, seconds)
    if task.test is None:
        return Run(name, rate, seed, losses, 0.0, math.inf, seconds)
    test_loss, accuracy = evaluate(model, ImageTests(task.test, normalize))
    return Run(name, rate, seed, losses, accuracy, test_loss, seconds)


@torch.no_grad()
def evaluate(model: nn.Module, tests: ImageTests) -> tuple[float, float]:
    """Return mean loss and accuracy."""
    model.eval()
    loss = correct = 0.0
    for inputs, labels in tests:
        outputs = model(inputs)
        loss += float(functional.cross_entropy(outputs, labels, reduction="sum"))
        correct += float((outputs.argmax(1) == labels).sum())
    return loss / len(tests.images), correct / len(tests.images)


def _train(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: ImageBatches, task: Task, epoch: int, rate: float
) -> float:
    """Train for an epoch; return the mean loss before each step."""
    model.train()
    total = torch.zeros(())
    for index, (inputs, labels) in enumerate(batches.epoch(epoch)):
        if task.is_scheduled:
            share = learning_rate_share(epoch * len(batches) + index, task.epochs * len(batches))
            for group in optimizer.param_groups:
                group["lr"] = share * rate
        optimizer.zero_grad()
        loss = _backward(optimizer, task, partial(_loss, model, task, inputs, labels))
        optimizer.step()
        total += loss.detach()
    return float(total) / len(batches)


def _loss(model: nn.Module, task: Task, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(model(inputs), labels) + task.penalize(model)


def _backward(optimizer: torch.optim.Optimizer, task: Task, closure: Callable[[], torch.Tensor]) -> torch.Tensor:
    if isinstance(optimizer, AdaHessian) and task.hessian == "differences":
        return optimizer.backward_by_difference(closure)
    loss = closure()
    if isinstance(optimizer, AdaHessian):
        optimizer.backward(loss)
    else:
        loss.backward()
    return loss


class Book:
    """The runs that are there, in a file."""

    def __init__(self, path: Path, task: Task) -> None:
        self.path, self.task = path, task
        self.runs: list[Run] = []
        if path.exists():
            value = json.loads(path.read_text(encoding="utf-8"))
            about = {key: value[key] for key in task.describe()}
            if about != task.describe():
                raise SystemExit(f"{path} holds runs of another task: {about}; give another --output")
            self.runs = [Run(**_with_infinities(run)) for run in value["runs"]]

    def run(self, name: str, rate: float, seed: int) -> Run:
        """Return a run, made now if it is not there."""
        for known in self.runs:
            if (known.optimizer, known.rate, known.seed) == (name, rate, seed):
                return known
        task = self.task
        if seed == OTHER_SEED:
            task = replace(task, epochs=task.grid_epochs or task.epochs, test=None)
        self.runs.append(make_run(task, name, rate, seed))
        print(f"{name} {rate:g} seed {seed}: {self.runs[-1].final:.4g}", file=sys.stderr, flush=True)
        self.write()
        return self.runs[-1]

    def write(self) -> None:
        about = {"machine": describe_machine(), "versions": describe_versions(), "commit": find_commit()}
        about["hessian"] = self.task.hessian
        runs = [_without_infinities(vars(run)) for run in self.runs]
        with written_whole(self.path) as partial_path:
            partial_path.write_text(json.dumps({**about, **self.task.describe(), "runs": runs}) + "\n", "utf-8")


def _without_infinities(values: dict[str, Any]) -> dict[str, Any]:
    losses = [loss if math.isfinite(loss) else None for loss in values["losses"]]
    return {**values, "losses": losses, "test_loss": values["test_loss"] if values["test_loss"] < math.inf else None}


def _with_infinities(values: dict[str, Any]) -> dict[str, Any]:
    losses = [math.inf if loss is None else loss for loss in values["losses"]]
    return {**values, "losses": losses, "test_loss": math.inf if values["test_loss"] is None else values["test_loss"]}


def choose(book: Book, name: str) -> float:
    """Return the rate of the grid with the lowest mean final training loss."""
    task = book.task
    return min(task.rates, key=lambda rate: mean(book.run(name, rate, seed).final for seed in task.grid_seeds))


def first_at(losses: Sequence[float], target: float) -> float:
    """Return the first epoch whose loss is at or below a target; infinite if there is none."""
    return next((number for number, loss in enumerate(losses, 1) if loss <= target), math.inf)


def build_table(book: Book) -> Table:
    """Return a row for each optimizer at its best rate; make the runs that it needs."""
    table = Table("optimizer", "rate", "training loss", "epochs to Adam's", "test accuracy", "± over seeds", "seconds")
    finals: dict[int, float] = {}
    ordered = sorted(book.task.optimizers, key=lambda name: name != "adam")
    for name in ordered:
        rate = choose(book, name)
        runs = [book.run(name, rate, seed) for seed in SEEDS]
        if name == "adam":
            finals = {run.seed: run.final for run in runs}
        epochs = [first_at(run.losses, finals[run.seed]) for run in runs]
        accuracies = [run.test_accuracy for run in runs]
        edge = " (edge)" if rate in (book.task.rates[0], book.task.rates[-1]) else ""
        table.add_row(
            name,
            f"{rate:g}{edge}",
            f"{mean(run.final for run in runs):.4g}",
            " ".join(f"{epoch:g}" for epoch in epochs) + f" of {book.task.epochs}",
            f"{mean(accuracies):.2%}",
            f"{stdev(accuracies):.2%}",
            f"{mean(run.seconds for run in runs):.1f}",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=["logistic", "logistic_regularized", "resnet20"])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the CIFAR-10 zip files")
    parser.add_argument("--images", type=int, default=1280, help="of CIFAR-10")
    parser.add_argument("--epochs", type=int, default=8, help="on CIFAR-10")
    parser.add_argument("--batch-size", type=int, default=64, help="on CIFAR-10")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    try:
        task = {
            "logistic": logistic,
            "logistic_regularized": partial(logistic, PENALTY),
            "resnet20": partial(resnet20, given.data, given.images, given.epochs, given.batch_size),
        }[given.task]()
    except DataError as error:
        raise SystemExit(f"skipped: {error}") from error
    book = Book(given.output or RESULTS / f"headlines_{task.name}.json", task)
    Console().print(build_table(book))


if __name__ == "__main__":
    main()
