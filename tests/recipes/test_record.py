from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from kaisa.errors import StateError
from kaisa.recipes.record import FILE, Record
from tests.recipes.test_target import make_record, make_run


@pytest.fixture
def record() -> Record:
    return make_record(make_run("sgd", 0, [0.5, 0.9]), make_run("sgd + K-FAC", 0, [0.7, 0.95]))


def test_a_record_read_is_the_record_written(record: Record, tmp_path: Path) -> None:
    record.write(tmp_path)
    assert Record.read(tmp_path) == record
    assert [file.name for file in tmp_path.iterdir()] == [FILE]


def test_a_record_says_all_that_its_figures_depend_on(record: Record, tmp_path: Path) -> None:
    record.write(tmp_path)
    value = json.loads((tmp_path / FILE).read_text())
    assert set(value) == {*("format", "kind", "started", "machine", "versions", "commit", "options", "data", "runs")}
    assert set(value["machine"]) == {"system", "processor", "cores", "threads", "accelerators"}
    assert {"python", "torch", "kaisa", "numpy"} <= set(value["versions"])
    assert value["options"]["seed"] == 0
    assert value["options"]["preconditioning"]["damping"] > 0
    assert [run["contestant"] for run in value["runs"]] == ["sgd", "sgd + K-FAC"]
    assert [epoch["test_score"] for epoch in value["runs"][1]["epochs"]] == [0.7, 0.95]


def test_a_diverged_loss_is_null_in_the_file_and_not_a_number_again(tmp_path: Path) -> None:
    run = make_run("sgd", 0, [0.5])
    epochs = [replace(run.epochs[0], train_loss=math.inf, test_loss=math.nan)]
    make_record(replace(run, epochs=epochs)).write(tmp_path)
    text = (tmp_path / FILE).read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    (read,) = Record.read(tmp_path).runs
    assert math.isnan(read.epochs[0].train_loss)
    assert math.isnan(read.epochs[0].test_loss)


def test_a_run_takes_the_place_of_its_earlier_self(record: Record) -> None:
    longer = make_run("sgd", 0, [0.5, 0.9, 0.91])
    record.put(longer)
    assert record.runs_of("sgd") == [longer]
    assert len(record.runs) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no run to resume in .*: record.json is missing"),
        ("{", "damaged; start the run anew"),
        ("[]", "is not a record of kaisa train"),
        ('{"format": 99, "kind": "kaisa train"}', "is not a record of kaisa train in format 2"),
    ],
)
def test_what_is_no_record_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / FILE).write_text(content)
    with pytest.raises(StateError, match=message):
        Record.read(tmp_path)
