from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from kaisa.cli import BAD_INPUT, run

SMALL = ["train", "--recipe", "logistic", "--epochs", "3", "--batch-size", "256", "--no-kfac", "--tensorboard"]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.filterwarnings("default")  # those of tensorboard's own imports
def test_the_events_are_the_figures_of_the_record() -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run([*SMALL, "--output", "out"]) == 0
    (found,) = json.loads(Path("out/record.json").read_text())["runs"]
    events = EventAccumulator("out/tensorboard/sgd-seed0").Reload()
    for tag, value in {
        "loss/train": lambda epoch: epoch["train_loss"],
        "loss/test": lambda epoch: epoch["test_score"],
        "accuracy/test": lambda epoch: epoch["further"]["accuracy"],
    }.items():
        told = [(event.step, event.value) for event in events.Scalars(tag)]
        assert told == [(epoch["number"], pytest.approx(value(epoch), rel=1e-6)) for epoch in found["epochs"]]


def test_without_tensorboard_nothing_starts(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert run([*SMALL, "--output", "out"]) == BAD_INPUT
    assert (
        "--tensorboard needs tensorboard, which is not installed; pip install 'kaisa[tensorboard]'"
        in capfd.readouterr().err
    )
    assert not list(tmp_path.iterdir())
