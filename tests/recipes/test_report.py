from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from kaisa.recipes.record import Run
from kaisa.recipes.report import build_table, conclude, draw_plot
from tests.recipes.test_target import make_record, make_run

SLOW = make_run("sgd", 0, [0.5, 0.8, 0.85, 0.91])
FAST = make_run("sgd + K-FAC", 0, [0.8, 0.92, 0.94, 0.95], seconds=3)


def render(*runs: Run) -> list[list[str]]:
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(build_table(make_record(*runs)))
    lines = console.export_text().splitlines()
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]


def test_the_table_tells_the_race_and_its_price() -> None:
    rows = {label: cells for label, *cells in render(SLOW, FAST)}
    assert rows["epochs to 90.0 %"] == ["4", "2"]
    assert rows["seconds to 90.0 %"] == ["8.00", "6.00"]
    assert rows["final test accuracy"] == ["91.0 %", "95.0 %"]
    assert rows["milliseconds per step"] == ["200.00", "300.00"]
    assert rows["step time, relative"] == ["1.00x", "1.50x"]
    assert rows["peak memory"] == ["1 MiB", "1 MiB"]
    assert rows["learning rate"] == ["0.1", "0.1"]


@pytest.mark.parametrize(
    ("runs", "sentence"),
    [
        ((SLOW, FAST), "reaches 90.0 % in 0.50 times the epochs and 0.75 times the seconds of sgd"),
        ((make_run("sgd", 0, [0.5]), FAST), "sgd + K-FAC reaches 90.0 %, sgd does not"),
        ((SLOW, make_run("sgd + K-FAC", 0, [0.5])), "sgd + K-FAC does not reach 90.0 %"),
        ((SLOW,), "sgd ran alone"),
        ((make_run("sgd", 0, []),), "no epoch is done yet"),
    ],
)
def test_the_conclusion_says_who_is_ahead_and_hides_no_failure(runs: tuple[Run, ...], sentence: str) -> None:
    assert sentence in conclude(make_record(*runs))


@pytest.mark.parametrize(
    "runs",
    [(SLOW, FAST), (FAST,), (make_run("sgd", 0, [0.1]),), (SLOW, make_run("sgd", 1, [0.3, 0.4]))],
)
def test_the_plot_is_a_picture(runs: tuple[Run, ...], tmp_path: Path) -> None:
    path = draw_plot(make_record(*runs), tmp_path)
    with Image.open(path) as picture:
        picture.load()
        assert picture.format == "PNG"
        assert min(picture.size) > 500
        assert len(np.unique(np.asarray(picture.convert("L")))) > 20


def test_a_target_that_nothing_can_exceed_is_drawn_without_a_warning(tmp_path: Path) -> None:
    assert draw_plot(make_record(SLOW, make_run("sgd + K-FAC", 0, [0.5, 1.0]), target=1.0), tmp_path).exists()


def test_where_the_loss_is_raced_for_it_is_told_once() -> None:
    record = make_record(make_run("sgd", 0, [0.5, 0.3]), target=0.4)
    record.options = replace(record.options, recipe="logistic", model="logistic")
    labels = [str(cell) for cell in build_table(record).columns[0].cells]
    assert labels[:4] == ["epochs to 0.4000", "seconds to 0.4000", "final test loss", "milliseconds per step"]
