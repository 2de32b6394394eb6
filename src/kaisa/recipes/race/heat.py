"""One heat: a contestant from the first step to the last, with looks at what is tested on in between.

    start ─► advance (steps, look) ─► advance ─► …      seconds are those of the steps alone

The clock counts batches, forward and backward passes, preconditioning and updates; it stands while is looked.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

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


def thin_tests(lesson: Lesson, most: int, side: int | None = None) -> Lesson:
    """Return a lesson that is tested on at most so many examples, spread evenly over all, and kept at hand.

    Args:
        lesson: whose tests are thinned.
        most: how many examples may be left.
        side: height and width of what is left of images and masks; None for the whole.
    """
    batches = list(lesson.tests)
    step = max(1, -(-sum(len(targets) for _, targets in batches) // most))
    kept, offset = [], 0
    for inputs, targets in batches:
        rows = torch.arange(len(targets), device=targets.device)
        rows = rows[(rows + offset) % step == 0]
        offset += len(targets)
        if len(rows):
            kept.append((inputs[rows], targets[rows]))
    if side is not None:
        kept = [(inputs[..., :side, :side], targets[..., :side, :side]) for inputs, targets in kept]
    return replace(lesson, tests=kept)


@dataclass
class Heat:
    """A heat under way.

    Attributes:
        plan: who runs how.
        ends_at: tells of a value whether the heat may end there; None to go on to the last step.
        end: "finished", or why it ended before; None before that.
        looks: so far.
    """

    plan: Plan
    course: Course
    lesson: Lesson
    driver: Driver
    watch: Stopwatch
    batches: Iterator[Example]
    ends_at: Callable[[float], bool] | None = None
    end: str | None = None
    looks: list[Look] = field(default_factory=list)

    @classmethod
    def start(cls, plan: Plan, course: Course, lesson: Lesson, ends_at: Callable[[float], bool] | None = None) -> Heat:
        """Build the model, with the weights of the plan's seed, and what trains it."""
        torch.manual_seed(plan.seed)
        model = lesson.build().to(lesson.batches.device)
        driver = Driver.start(
            plan.entrant, model, course.preconditioning(plan.entrant), lesson.batches.terms, plan.seed
        )
        return cls(plan, course, lesson, driver, Stopwatch(lesson.batches.device), _endless(lesson), ends_at)

    @property
    def phases(self) -> dict[str, float]:
        """Mean seconds on the wall of each phase of our K-FAC when it ran."""
        return self.driver.phases()

    def advance(self) -> None:
        """Run to the next look; a loss that is no number, and a contestant that gives up, end the heat."""
        done = self.looks[-1].step if self.looks else 0
        count = min(self.course.look_every, self.plan.steps - done)
        try:
            with self.watch:
                for step in range(done, done + count):
                    self.driver.set_rate(self.plan.rate * learning_rate_share(step, self.plan.steps))
                    self.step()
            value = self.look()
        except (KaisaError, RuntimeError) as error:  # such as a decomposition of what is not finite
            self._close(f"failed: {error}")
            return
        self.looks.append(Look(done + count, self.watch.seconds, self.watch.cpu_seconds, value))
        if not math.isfinite(value):
            self._close("diverged")
        elif done + count == self.plan.steps:
            self._close("finished")
        elif self.ends_at is not None and self.ends_at(value):
            self._close("reached")

    def step(self) -> None:
        """Take one step."""
        inputs, targets = next(self.batches)
        self.driver.model.train()
        with mixed_precision(self.lesson), self.driver.forward():
            loss = self.lesson.task.loss(self.driver.model(inputs), targets)
        self.driver.step(loss)

    def look(self) -> float:
        """Return the score on what is tested on."""
        lesson = replace(self.lesson, task=self.lesson.task.raced)
        return evaluate(self.driver.model, lesson).means()[1][0]

    def _close(self, end: str) -> None:
        self.end = end
        self.driver.close()


def run_interleaved(heats: Sequence[Heat]) -> Iterator[Heat]:
    """Run heats in turns, a look at a time, and yield each when it has ended; each round begins with another one.

    What slows the machine for a while slows all of them.
    """
    turn = 0
    while under_way := [heat for heat in heats if heat.end is None]:
        first = turn % len(under_way)
        for heat in under_way[first:] + under_way[:first]:
            heat.advance()
            if heat.end is not None:
                yield heat
        turn += 1


def warm_up(plan: Plan, course: Course, lesson: Lesson) -> None:
    """Take a few steps that are thrown away: what the first steps of a process cost is no contestant's."""
    heat = Heat.start(plan, course, lesson)
    for _ in range(WARM_UP_STEPS):
        heat.step()
    heat.look()
    heat.driver.close()


def _endless(lesson: Lesson) -> Iterator[Example]:
    epoch = 0
    while True:
        yield from lesson.batches.epoch(epoch)
        epoch += 1
