"""What is learned, apart from how: a loss, and the scores by which it is judged.

    outputs, targets ─► loss     the mean over the terms of a batch: images, pixels or tokens
                     └► score    a ratio of two sums, so that parts of the data add up to the whole

                       loss                          terms      scores (the first is raced for)
    CLASSIFICATION     cross-entropy of classes      images     accuracy
    REGRESSION         the same                      images     loss, accuracy
    SEGMENTATION       cross-entropy of two classes  pixels     Dice, Dice of the background, pixel error
    NEXT_TOKEN         cross-entropy of tokens       tokens     bits per token
    MASKED_TOKEN       cross-entropy of tokens       hidden     loss in nats (MLM loss), accuracy
    DETECTION          the detector's own, summed    images     box mAP, mask mAP, after training steps only

Terms that are not to be predicted have the target `IGNORED`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from kaisa.recipes.average_precision import mean_average_precision

IGNORED = -100
"""The target of what is not to be predicted: the usual value of `torch.nn.functional.cross_entropy`."""

Example = tuple[Tensor, Tensor]
"""Inputs and targets of a batch."""

Batch = tuple[Any, Tensor]
"""The same, where inputs may be what a detector takes."""


class Batches(Protocol):
    """What is learned from, in batches; see `kaisa.recipes.order`."""

    @property
    def seed(self) -> int:
        """Decides order and augmentation."""

    @property
    def device(self) -> torch.device:
        """Where the batches are used."""

    @property
    def terms(self) -> int | None:
        """The terms of the loss in one batch of this rank; None for one for each example."""

    def __len__(self) -> int:
        """Return how many batches an epoch has."""

    def epoch(self, number: int) -> Iterator[Batch]:
        """Yield inputs and targets of one epoch, counted from 0."""


@dataclass(frozen=True)
class Score:
    """A figure of merit over any number of batches.

    Attributes:
        name: in words.
        count: returns two sums over a batch, whose ratio is the score; None for a multiple of the loss.
        form: how it is written, for `str.format`.
        is_cost: whether less is better.
        per_loss: the multiple.
    """

    name: str
    count: Callable[[Any, Tensor], tuple[Tensor, Tensor]] | None
    form: str = "{:.1%}"
    is_cost: bool = False
    per_loss: float = 1.0

    def sums(self, loss: Tensor, terms: Tensor, outputs: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the two sums over a batch whose mean loss over its terms is known."""
        return (self.per_loss * loss * terms, terms) if self.count is None else self.count(outputs, targets)

    @property
    def is_loss(self) -> bool:
        """Whether it is the loss itself."""
        return self.count is None and self.per_loss == 1

    def reaches(self, value: float, target: float) -> bool:
        """Whether a value is as good as a target."""
        return value <= target if self.is_cost else value >= target

    def best(self, *values: float) -> float:
        """Return the best of some values."""
        return min(values) if self.is_cost else max(values)

    def worst(self, *values: float) -> float:
        """Return the worst of some values."""
        return max(values) if self.is_cost else min(values)

    def write(self, value: float) -> str:
        """Return a value as it is read."""
        return self.form.format(value).replace("%", " %")


@dataclass(frozen=True)
class Task:
    """What a model is to learn.

    Attributes:
        loss: the mean over the terms of a batch.
        terms: counts the terms among targets.
        scores: what it is judged by; the first is raced for.
    """

    loss: Callable[[Any, Tensor], Tensor]
    terms: Callable[[Tensor], Tensor]
    scores: tuple[Score, ...]

    @property
    def score(self) -> Score:
        """The score that is raced for."""
        return self.scores[0]

    @property
    def raced(self) -> Task:
        """The task with the score that is raced for alone."""
        return replace(self, scores=self.scores[:1])


@dataclass(frozen=True)
class Lesson:
    """All of a training but the optimizer and how long it takes.

    Attributes:
        task: loss and scores.
        batches: what is learned from.
        tests: what is tested on, in batches on the same device; may be passed over many times.
        build: makes the model, with random weights.
        dtype: of mixed precision, where autocast has it; None for none.
    """

    task: Task
    batches: Batches
    tests: Iterable[Batch]
    build: Callable[[], nn.Module]
    dtype: torch.dtype | None = None


def _every(targets: Tensor) -> Tensor:
    return torch.tensor(targets.numel(), device=targets.device)


def _correct(outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return (outputs.argmax(1) == labels).sum(), _every(labels)


def _binary_loss(outputs: Tensor, masks: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(outputs, masks)


def _dice(outputs: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    found, expected = outputs > 0, masks > 0.5
    return 2 * (found & expected).sum(), found.sum() + expected.sum()


def _background_dice(outputs: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    return _dice(-outputs, 1 - masks)


def _wrong_pixels(outputs: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    return ((outputs > 0) != (masks > 0.5)).sum(), _every(masks)


def _token_loss(scores: Tensor, tokens: Tensor) -> Tensor:
    return functional.cross_entropy(scores.flatten(0, -2), tokens.flatten(), ignore_index=IGNORED)


def _predicted(tokens: Tensor) -> Tensor:
    return (tokens != IGNORED).sum()


def _correct_tokens(scores: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    return (scores.argmax(-1) == tokens).sum(), _predicted(tokens)


def _detection_loss(outputs: Any, _: Tensor) -> Tensor:
    loss: Tensor = outputs.loss
    return loss


def _box_precision(outputs: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    return _precision(outputs.boxes, images)


def _mask_precision(outputs: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    return _precision(outputs.masks, images)


def _precision(judged: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the average precision and 1; of a training step, in which nothing is looked for, nothing."""
    if not judged:
        return torch.zeros(2, device=images.device).unbind()  # type: ignore[return-value]
    mean = torch.tensor(mean_average_precision(judged), dtype=torch.float64, device=images.device)
    return mean, torch.ones_like(mean)


ACCURACY = Score("accuracy", _correct)
LOSS = Score("loss", None, "{:.4f}", is_cost=True)
DICE = Score("Dice", _dice)
BACKGROUND_DICE = Score("Dice of the background", _background_dice)
PIXEL_ERROR = Score("pixel error", _wrong_pixels, "{:.2%}", is_cost=True)
BITS = Score("bits per token", None, "{:.3f}", is_cost=True, per_loss=1 / math.log(2))
MASKED_LOSS = Score("MLM loss", None, "{:.3f}", is_cost=True)
MASKED_ACCURACY = Score("accuracy of hidden tokens", _correct_tokens)
BOX_PRECISION = Score("box mAP", _box_precision)
MASK_PRECISION = Score("mask mAP", _mask_precision)

CLASSIFICATION = Task(functional.cross_entropy, _every, (ACCURACY,))
REGRESSION = Task(functional.cross_entropy, _every, (LOSS, ACCURACY))
SEGMENTATION = Task(_binary_loss, _every, (DICE, BACKGROUND_DICE, PIXEL_ERROR))
NEXT_TOKEN = Task(_token_loss, _predicted, (BITS,))
MASKED_TOKEN = Task(_token_loss, _predicted, (MASKED_LOSS, MASKED_ACCURACY))
DETECTION = Task(_detection_loss, _every, (BOX_PRECISION, MASK_PRECISION))
