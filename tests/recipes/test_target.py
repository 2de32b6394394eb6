from __future__ import annotations

import math

import pytest

from kaisa.recipes.loop import Epoch
from kaisa.recipes.options import Options
from kaisa.recipes.record import Record, Run
from kaisa.recipes.target import choose_target, first_at, summarize


def make_run(contestant: str, seed: int, accuracies: list[float], seconds: float = 2.0) -> Run:
    epochs = [
        Epoch(number, 1 / number, accuracy, 2 / number, accuracy, seconds * number)
        for number, accuracy in enumerate(accuracies, start=1)
    ]
    steps = 10 * len(epochs)
    return Run(contestant, seed, 0.1, True, steps, 1 << 20, None, epochs)


def make_record(*runs: Run, target: float | None = 0.9, repeats: int = 1) -> Record:
    return Record(Options("mlp", 3, 8, 0.1, target=target, repeats=repeats), {}, runs=list(runs))


def test_the_first_epoch_at_the_target_counts() -> None:
    run = make_run("sgd", 0, [0.5, 0.9, 0.7, 0.95])
    assert first_at(0.9, run.epochs) == (2, 4.0)
    assert first_at(0.91, run.epochs) == (4, 8.0)
    assert first_at(0.96, run.epochs) == (math.inf, math.inf)


def test_without_a_target_the_race_is_to_what_every_run_reaches() -> None:
    runs = make_run("sgd", 0, [0.5, 0.8, 0.7]), make_run("sgd + K-FAC", 0, [0.6, 0.85, 0.9])
    assert choose_target(make_record(*runs, target=None)) == 0.8
    assert choose_target(make_record(*runs, target=0.3)) == 0.3


def test_a_run_that_diverges_does_not_spoil_the_target() -> None:
    nan, run = math.nan, make_run("sgd", 0, [0.5, 0.8, 0.7])
    for scores, target in (([nan, 0.6, nan], 0.6), ([0.6, nan, nan], 0.6), ([nan, nan, nan], 0.8), ([math.inf], 0.8)):
        for diverged in (make_run("sgd + K-FAC", 0, scores), make_run("sgd", 1, scores)):
            assert choose_target(make_record(run, diverged, target=None)) == target
            assert choose_target(make_record(diverged, run, target=None)) == target
    (result,) = summarize(make_record(make_run("sgd", 0, [nan, nan]), target=None))
    assert (result.reached, result.epochs) == (0, math.inf)


def test_the_median_over_seeds_counts_and_a_failed_run_as_infinite() -> None:
    runs = [
        make_run("sgd", 0, [0.95, 0.95, 0.95]),
        make_run("sgd", 1, [0.5, 0.92, 0.92], seconds=3),
        make_run("sgd", 2, [0.1, 0.2, 0.3]),
    ]
    (result,) = summarize(make_record(*runs, repeats=3))
    assert (result.runs, result.reached) == (3, 2)
    assert (result.epochs, result.seconds) == (2, 6.0)
    assert result.score == 0.92
    assert result.step_seconds == pytest.approx(0.2)
    (result,) = summarize(make_record(runs[0], runs[2], repeats=2))
    assert (result.epochs, result.seconds) == (math.inf, math.inf)


def test_a_record_without_an_epoch_has_no_results() -> None:
    assert summarize(make_record(make_run("sgd", 0, []))) == []
