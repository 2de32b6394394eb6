"""What a comparison makes of a lesson before it runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kaisa.recipes import comparison
from kaisa.recipes.batches import EVALUATED_AT_ONCE, ImageTests
from kaisa.recipes.comparison import compare, in_small_batches
from kaisa.recipes.data import read_data
from kaisa.recipes.options import Options
from kaisa.recipes.record import Record
from kaisa.recipes.tasks import Lesson


@pytest.mark.parametrize(
    ("batch_size", "nproc", "expected"),
    [(4, 1, 32), (4, 2, 16), (125, 1, EVALUATED_AT_ONCE), (128, 1, EVALUATED_AT_ONCE)],
)
def test_images_are_tested_on_in_batches_of_eight_times_those_of_training_at_most(
    batch_size: int, nproc: int, expected: int, lesson: Lesson
) -> None:
    small = in_small_batches(lesson, Options.complete({"batch_size": batch_size, "nproc": nproc}))
    assert isinstance(small.tests, ImageTests)
    assert small.tests.size == expected
    assert replace(small, tests=lesson.tests) == lesson


def test_a_comparison_evaluates_in_small_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = Options.complete({"batch_size": 16, "repeats": 1, "contestants": "first-order"})
    data, sizes = read_data(options), []

    def run(contestant: Any, lesson: Lesson, *rest: Any) -> None:
        sizes.extend(len(labels) for _, labels in lesson.tests)

    monkeypatch.setattr(comparison, "_run", run)
    compare(Record(options, data.describe()), data, tmp_path, watcher=None)
    assert sizes == [128, 128, 103]
