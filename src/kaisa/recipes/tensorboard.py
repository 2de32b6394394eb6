"""Losses and scores of every epoch as TensorBoard shows them: a folder of events for each contestant and seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kaisa.recipes.comparison import Watcher
from kaisa.recipes.extras import load_extra
from kaisa.recipes.loop import Epoch, Training

FOLDER = "tensorboard"
EXTRA = "tensorboard"


def check_tensorboard() -> None:
    """Raise ConfigurationError unless tensorboard is installed."""
    load_extra("tensorboard", "--tensorboard", EXTRA)


class Watchers:
    """Tells several watchers what one would be told."""

    def __init__(self, watchers: Sequence[Watcher]) -> None:
        self._watchers = watchers

    def begin(self, training: Training) -> None:
        """Tell that a run begins or goes on."""
        for watcher in self._watchers:
            watcher.begin(training)

    def step(self, loss: float, score: float) -> None:
        """Tell the means over the epoch so far."""
        for watcher in self._watchers:
            watcher.step(loss, score)

    def epoch(self, training: Training) -> None:
        """Tell that an epoch is done."""
        for watcher in self._watchers:
            watcher.epoch(training)


class TensorBoard:
    """Writes events into the folder of a comparison.

    Args:
        folder: of the comparison.

    Raises:
        ConfigurationError: tensorboard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        check_tensorboard()
        self._summary = load_extra("torch.utils.tensorboard", "--tensorboard", EXTRA).SummaryWriter
        self._folder = folder / FOLDER
        self._writer: Any = None

    def begin(self, training: Training) -> None:
        """Open the events of a run; what was written of it after its last whole epoch does not count."""
        name = f"{training.contestant.slug}-seed{training.batches.seed}"
        self._writer = self._summary(self._folder / name, purge_step=len(training.history) + 1)

    def step(self, loss: float, score: float) -> None:
        """Write nothing: an epoch is the unit."""

    def epoch(self, training: Training) -> None:
        """Write the figures of an epoch."""
        last = training.history[-1]
        for name, value in _figures(last, training.score.name).items():
            if not math.isnan(value):
                self._writer.add_scalar(name, value, last.number)
        self._writer.flush()
        if training.is_finished:
            self._writer.close()


def _figures(epoch: Epoch, score: str) -> dict[str, float]:
    return {
        "loss/train": epoch.train_loss,
        "loss/test": epoch.test_loss,
        f"{score}/train": epoch.train_score,
        f"{score}/test": epoch.test_score,
        **{f"{name}/test": value for name, value in epoch.further.items()},
        "seconds": epoch.seconds,
    }
