from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kaisa.recipes.tasks import (
    ACCURACY,
    BITS,
    CLASSIFICATION,
    DICE,
    IGNORED,
    MASKED_TOKEN,
    NEXT_TOKEN,
    PIXEL_ERROR,
    SEGMENTATION,
    Score,
    Task,
)

CASES = {
    "classification": (CLASSIFICATION, torch.Size([6, 4]), torch.Size([6])),
    "segmentation": (SEGMENTATION, torch.Size([6, 5, 7]), torch.Size([6, 5, 7])),
    "next token": (NEXT_TOKEN, torch.Size([6, 8, 4]), torch.Size([6, 8])),
    "masked token": (MASKED_TOKEN, torch.Size([6, 8, 4]), torch.Size([6, 8])),
}


def draw(name: str) -> tuple[Task, Tensor, Tensor]:
    task, outputs, targets = CASES[name]
    drawn = torch.randn(outputs, dtype=torch.float64)
    if task is SEGMENTATION:
        return task, drawn, (torch.rand(targets) < 0.3).double()
    labels = torch.randint(0, 4, targets)
    return task, drawn, labels.index_fill(1, torch.tensor([0, 3]), IGNORED) if task is MASKED_TOKEN else labels


def sums(task: Task, score: Score, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return score.sums(task.loss(outputs, targets), task.terms(targets), outputs, targets)


def value(score: Score, outputs: Tensor, targets: Tensor, task: Task = SEGMENTATION) -> float:
    above, below = sums(task, score, outputs, targets)
    return above.item() / below.item()


@pytest.mark.parametrize("name", CASES)
def test_parts_of_the_data_add_up_to_the_whole(name: str) -> None:
    task, outputs, targets = draw(name)
    parts = list(zip(outputs.split([1, 2, 3]), targets.split([1, 2, 3]), strict=True))
    whole = task.loss(outputs, targets) * task.terms(targets)
    torch.testing.assert_close(sum(task.loss(*part) * task.terms(part[1]) for part in parts), whole)
    for score in task.scores:
        added = [sum(sides) for sides in zip(*(sums(task, score, *part) for part in parts), strict=True)]
        torch.testing.assert_close(added, list(sums(task, score, outputs, targets)))


def test_dice_and_pixel_error_are_those_of_the_sets_of_pixels() -> None:
    _, outputs, masks = draw("segmentation")
    found = {tuple(place) for place in (outputs.sigmoid() > 0.5).nonzero().tolist()}
    true = {tuple(place) for place in masks.nonzero().tolist()}
    every = {tuple(place) for place in torch.ones_like(masks).nonzero().tolist()}
    assert value(DICE, outputs, masks) == pytest.approx(2 * len(found & true) / (len(found) + len(true)))
    assert value(PIXEL_ERROR, outputs, masks) == pytest.approx(len(found ^ true) / len(every))
    (background,) = [score for score in SEGMENTATION.scores if score.name == "Dice of the background"]
    expected = 2 * len(every - found - true) / (len(every - found) + len(every - true))
    assert value(background, outputs, masks) == pytest.approx(expected)


def test_a_uniform_guess_takes_as_many_bits_as_the_tokens_need() -> None:
    tokens = torch.randint(0, 16, (3, 5))
    assert value(BITS, torch.zeros(3, 5, 16), tokens, NEXT_TOKEN) == pytest.approx(4)
    assert NEXT_TOKEN.loss(torch.zeros(3, 5, 16), tokens).item() == pytest.approx(4 * math.log(2))


def test_what_is_not_hidden_does_not_count() -> None:
    task, outputs, targets = draw("masked token")
    kept = targets != IGNORED
    nats = functional.cross_entropy(outputs[kept], targets[kept]).item()
    right = (outputs[kept].argmax(-1) == targets[kept]).double().mean().item()
    assert task.terms(targets).item() == 36
    assert task.loss(outputs, targets).item() == pytest.approx(nats)
    assert [value(score, outputs, targets, task) for score in task.scores] == pytest.approx([nats, right])


def test_less_is_better_of_costs_and_more_of_others() -> None:
    assert ACCURACY.reaches(0.9, 0.9)
    assert not ACCURACY.reaches(0.8, 0.9)
    assert (ACCURACY.best(0.2, 0.4), ACCURACY.worst(0.2, 0.4)) == (0.4, 0.2)
    assert BITS.reaches(2.9, 2.9)
    assert not BITS.reaches(3.0, 2.9)
    assert (BITS.best(2.0, 4.0), BITS.worst(2.0, 4.0)) == (2.0, 4.0)
    assert (ACCURACY.write(0.125), PIXEL_ERROR.write(0.125), BITS.write(2)) == ("12.5 %", "12.50 %", "2.000")
