from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from kaisa.cli import BAD_INPUT, INTERRUPTED, run
from kaisa.recipes.loop import Training

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


def test_a_resumed_run_takes_back_what_was_written_after_its_last_whole_epoch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a writer that notes what it is told, so that tensorboard need not be installed."""
    told: list[tuple[str, int]] = []

    class Writer:
        def __init__(self, folder: Path, purge_step: int) -> None:
            assert folder == Path("out") / "tensorboard" / "sgd-seed0"
            told.append(("purge from", purge_step))

        def add_scalar(self, name: str, value: float, number: int) -> None:
            told.extend([(name, number)] if name == "loss/train" else [])

        def flush(self) -> None: ...

        def close(self) -> None: ...

    def stopped(training: Training, *arguments: Any) -> Any:
        if len(training.history) == 2:
            raise KeyboardInterrupt
        return whole_epoch(training, *arguments)

    whole_epoch = Training.epoch
    monkeypatch.setitem(sys.modules, "tensorboard", ModuleType("tensorboard"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    monkeypatch.setattr(Training, "epoch", stopped)
    assert run([*SMALL, "--output", "out"]) == INTERRUPTED
    monkeypatch.setattr(Training, "epoch", whole_epoch)
    assert run(["train", "--resume", "out"]) == 0
    first, resumed = told[:3], told[3:]
    assert first == [("purge from", 1), ("loss/train", 1), ("loss/train", 2)]
    assert resumed == [("purge from", 3), ("loss/train", 3)]


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
