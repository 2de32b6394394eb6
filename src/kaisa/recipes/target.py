"""The race: how many epochs and seconds each contestant needs to reach a score.

Over several seeds the median counts, and a run that does not reach the target counts as infinitely
long, so that a figure never hides a failure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from kaisa.recipes.loop import Epoch
from kaisa.recipes.record import Record, Run
from kaisa.recipes.tasks import ACCURACY, Score


@dataclass(frozen=True)
class Result:
    """What one contestant achieved, medians over its runs.

    Attributes:
        contestant: its name.
        runs: how many there are.
        reached: how many of them reached the target.
        epochs: to the target; infinite if more than half of the runs did not reach it.
        seconds: likewise.
        score: on what is tested on, at the end.
        loss: likewise.
        step_seconds: mean time of a step.
        peak_memory: bytes; None if unknown.
        learning_rate: the highest of the schedule.
    """

    contestant: str
    runs: int
    reached: int
    epochs: float
    seconds: float
    score: float
    loss: float
    step_seconds: float
    peak_memory: float | None
    learning_rate: float


def choose_target(record: Record) -> float:
    """Return the target of the options, or the best score that every run so far has reached.

    Scores that are not finite are none: a run that has no other does not take part, and if none has, the target is NaN.
    """
    if record.options.target is not None:
        return record.options.target
    runs = [run for name in record.contestants for run in record.runs_of(name)]
    known = [[epoch.test_score for epoch in run.epochs if math.isfinite(epoch.test_score)] for run in runs]
    score = record.options.score
    return score.worst(*(score.best(*scores) for scores in known if scores)) if any(known) else math.nan


def first_at(target: float, epochs: Sequence[Epoch], score: Score = ACCURACY) -> tuple[float, float]:
    """Return number and seconds of the first epoch that reaches a target."""
    for epoch in epochs:
        if score.reaches(epoch.test_score, target):
            return epoch.number, epoch.seconds
    return math.inf, math.inf


def summarize(record: Record) -> list[Result]:
    """Return the result of each contestant."""
    target = choose_target(record) if record.contestants else 0.0
    return [_result(name, record.runs_of(name), target, record.options.score) for name in record.contestants]


def _result(name: str, runs: Sequence[Run], target: float, score: Score) -> Result:
    firsts = [first_at(target, run.epochs, score) for run in runs]
    memory = [run.peak_memory for run in runs if run.peak_memory is not None]
    return Result(
        contestant=name,
        runs=len(runs),
        reached=sum(math.isfinite(epochs) for epochs, _ in firsts),
        epochs=_median(epochs for epochs, _ in firsts),
        seconds=_median(seconds for _, seconds in firsts),
        score=_median(run.epochs[-1].test_score for run in runs),
        loss=_median(run.epochs[-1].test_loss for run in runs),
        step_seconds=_median(run.seconds_per_step for run in runs),
        peak_memory=_median(memory) if memory else None,
        learning_rate=runs[0].learning_rate,
    )


def _median(values: Iterable[float]) -> float:
    return median(list(values))
