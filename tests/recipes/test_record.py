from __future__ import annotations

import json
import math
import platform
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from torch import nn

from kaisa.errors import StateError
from kaisa.recipes.record import FILE, Record, describe_versions
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


def test_the_packages_that_models_are_made_of_are_among_the_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"transformers": "5.0", "torchvision": "0.28", "numpy": "2.0"}

    def version(package: str) -> str:
        if package not in installed:
            raise PackageNotFoundError
        return installed[package]

    monkeypatch.setattr("importlib.metadata.version", version)
    assert describe_versions() == {"python": platform.python_version(), **installed}


@pytest.mark.parametrize(
    ("began", "here", "advice"),
    [
        ({"transformers": "5.0"}, {}, "; it began with transformers 5.0, here is none; pip install transformers==5.0"),
        (
            {"transformers": "5.0"},
            {"transformers": "6.1"},
            "; it began with transformers 5.0, here is 6.1; pip install transformers==5.0",
        ),
        ({}, {"transformers": "6.1"}, "; it began without transformers; use an environment that has none"),
        ({"torchvision": "0.28"}, {"torchvision": "0.28"}, ""),
    ],
)
def test_another_type_of_model_than_was_trained_is_refused_with_the_package_that_makes_it(
    began: dict[str, str], here: dict[str, str], advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kaisa.recipes.record.describe_versions", lambda: here)
    record = make_record(replace(make_run("sgd", 0, [0.5]), model="Bilinear"))
    record.versions = began
    record.check_model(nn.Bilinear(1, 1, 1))
    with pytest.raises(StateError, match=f"the run trained a Bilinear, but what is made here is a Linear{advice}$"):
        record.check_model(nn.Linear(1, 1))


def test_an_older_record_does_not_say_what_was_trained(record: Record, tmp_path: Path) -> None:
    record.write(tmp_path)
    value = json.loads((tmp_path / FILE).read_text())
    for run in value["runs"]:
        del run["model"]
    (tmp_path / FILE).write_text(json.dumps(value))
    older = Record.read(tmp_path)
    older.versions = {"torch": "2.13"}
    older.check_model(nn.Linear(1, 1))
    assert older.advice() == ""


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
