"""One heat: a contestant from the first step to the last, with looks at what is tested on in between.

    start ─► steps ─► look ─► steps ─► look ─► …      seconds are those of the steps alone

The clock counts batches, forward and backward passes, preconditioning and updates; it stands while is looked.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from kaisa.errors import KaisaError
from kaisa.recipes.contestants import learning_rate_share
from kaisa.recipes.loop import evaluate, mixed_precision
from kaisa.recipes.race.courses import Course
from kaisa.recipes.race.entrants import Driver, Entrant
from kaisa.recipes.tasks import Example, Lesson

WARM_UP_STEPS = 2


@dataclass(frozen=True)
class Look:
    """What a look showed.

    Attributes:
        step: how many steps lie behind.
        seconds: of real time in training.
        cpu_seconds: of the process in training, on all its threads.
        value: the score on what is tested on.
    """

    step: int
    seconds: float
    cpu_seconds: float
    value: float


@dataclass(frozen=True)
class Plan:
    """A heat to run: who, how fast, how long, with which seed."""

    entrant: Entrant
    rate: float
    steps: int
    seed: int


@dataclass
class Stopwatch:
    """Real and processor time in training so far."""

    device: torch.device
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def __enter__(self) -> None:
        self._begin = self._now()

    def __exit__(self, *error: object) -> None:
        real, processor = self._now()
        self.seconds += real - self._begin[0]
        self.cpu_seconds += processor - self._begin[1]

    def _now(self) -> tuple[float, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter(), time.process_time()


def thin_tests(lesson: Lesson, most: int) -> Lesson:
    """Return a lesson that is tested on at most so many examples, spread evenly over all, and kept at hand."""
    batches = list(lesson.tests)
    step = max(1, -(-sum(len(targets) for _, targets in batches) // most))
    kept, offset = [], 0
    for inputs, targets in batches:
        rows = torch.arange(len(targets), device=targets.device)
        rows = rows[(rows + offset) % step == 0]
        offset += len(targets)
        if len(rows):
            kept.append((inputs[rows], targets[rows]))
    return replace(lesson, tests=kept)


def run_heat(plan: Plan, course: Course, lesson: Lesson) -> tuple[list[Look], dict[str, Any]]:
    """Run a heat; return its looks, and what else is known of it.

    A heat ends early when the loss is no number, or K-FAC gives up.
    """
    driver = _start(plan, course, lesson)
    watch = Stopwatch(lesson.batches.device)
    batches = _endless(lesson)
    looks: list[Look] = []
    end = "finished"
    try:
        while not looks or looks[-1].step < plan.steps:
            done = looks[-1].step if looks else 0
            count = min(course.look_every, plan.steps - done)
            with watch:
                for step in range(done, done + count):
                    driver.set_rate(plan.rate * learning_rate_share(step, plan.steps))
                    _step(driver, lesson, *next(batches))
            value = _look(driver.model, lesson)
            looks.append(Look(done + count, watch.seconds, watch.cpu_seconds, value))
            if not math.isfinite(value):
                end = "diverged"
                break
    except (KaisaError, RuntimeError) as error:  # such as a decomposition of what is not finite
        end = f"failed: {error}"
    driver.close()
    return looks, {"end": end, "phases": driver.phases()}


def warm_up(plan: Plan, course: Course, lesson: Lesson) -> None:
    """Take a few steps that are thrown away: what the first steps of a process cost is no contestant's."""
    driver = _start(plan, course, lesson)
    batches = _endless(lesson)
    for _ in range(WARM_UP_STEPS):
        _step(driver, lesson, *next(batches))
    _look(driver.model, lesson)
    driver.close()


def _start(plan: Plan, course: Course, lesson: Lesson) -> Driver:
    torch.manual_seed(plan.seed)
    model = lesson.build().to(lesson.batches.device)
    options = course.preconditioning(plan.entrant)
    return Driver.start(plan.entrant, model, options, lesson.batches.terms, plan.seed)


def _endless(lesson: Lesson) -> Iterator[Example]:
    epoch = 0
    while True:
        yield from lesson.batches.epoch(epoch)
        epoch += 1


def _step(driver: Driver, lesson: Lesson, inputs: torch.Tensor, targets: torch.Tensor) -> None:
    driver.model.train()
    with mixed_precision(lesson), driver.forward():
        loss = lesson.task.loss(driver.model(inputs), targets)
    driver.step(loss)


def _look(model: nn.Module, lesson: Lesson) -> float:
    score = evaluate(model, replace(lesson, task=lesson.task.raced)).means()
    return score[1][0]
