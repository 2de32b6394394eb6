"""The command on several ranks: as one process, refused in one line, interrupted and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from kaisa.cli import BAD_INPUT, FAILED, INTERRUPTED, run
from kaisa.kfac.collectives import join_world, launched_world, leave_world, world
from kaisa.recipes.record import Record

SMALL = ["train", "--model", "cnn", "--contestants", "kfac", "--repeats", "1", "--batch-size", "256"]
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
SLOW_PORTS = ["--rdzv-endpoint", "localhost:0"]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def read_run(folder: str) -> dict[str, Any]:
    (found,) = json.loads(Path(folder, "record.json").read_text())["runs"]
    assert isinstance(found, dict)
    return found


def test_two_ranks_of_torchrun_train_as_one_process_does(tmp_path: Path) -> None:
    options = [*SMALL, "--epochs", "1", "--inv-update-steps", "2", "--factor-update-steps", "2"]
    process = start(*TORCHRUN, *SLOW_PORTS, "-m", "kaisa", *options, "--grad-worker-fraction", "mem", "--output", "two")
    assert run([*options, "--output", "one"]) == 0
    said, complaints = process.communicate(timeout=300)
    assert process.returncode == 0, complaints
    assert said.count("the run goes to two") == 1
    (expected,), (found,) = read_run("one")["epochs"], read_run("two")["epochs"]
    for figure in ("train_loss", "train_score", "test_loss"):
        assert found[figure] == pytest.approx(expected[figure], rel=1e-3)
    ones, twos = (load_file(tmp_path / folder / "sgd-kfac-seed0.safetensors") for folder in ("one", "two"))
    assert all(torch.allclose(ones[name], twos[name], rtol=1e-2, atol=1e-4) for name in ones)
    options_of_two = Record.read(Path("two")).options
    assert (options_of_two.nproc, options_of_two.preconditioning.grad_worker_fraction) == (2, "mem")
    held = [read_run(folder)["kfac_memory"]["total"] for folder in ("one", "two")]
    assert held[1] < 0.75 * held[0]
    assert sorted(file.name for file in (tmp_path / "two").iterdir()) == [
        "plot.png",
        "record.json",
        "sgd-kfac-seed0.safetensors",
    ]


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGINT to send")
def test_control_c_stops_all_ranks_and_resume_starts_as_many(tmp_path: Path) -> None:
    process = start("-W", "error", "-m", "kaisa", *SMALL, "--epochs", "9999", "--nproc", "2", "--output", "out")
    deadline = time.monotonic() + 200
    while not (tmp_path / "out" / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, complaints = process.communicate(timeout=300)
    assert complaints == "kaisa: interrupted; go on with: kaisa train --resume out\n"
    assert process.returncode == INTERRUPTED
    record = tmp_path / "out" / "record.json"
    checkpoint = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)
    assert len(checkpoint["ranks"]) == 2
    done = len(checkpoint["history"])
    value = json.loads(record.read_text())
    value["options"]["epochs"] = done + 1
    record.write_text(json.dumps(value))
    resumed = start("-W", "error", "-m", "kaisa", "train", "--resume", "out")
    said, complaints = resumed.communicate(timeout=300)
    assert (resumed.returncode, complaints) == (0, "")
    assert f"epoch {done + 1} of {done + 1}" in said
    epochs = read_run("out")["epochs"]
    assert [epoch["number"] for epoch in epochs] == list(range(1, done + 2))
    assert epochs[:done] == checkpoint["history"]
    assert not (tmp_path / "out" / "checkpoint.pt").exists()


BAD = {
    "no process": (["--nproc", "0"], "nproc is 0; give a whole number of at least 1"),
    "fewer than no process": (["--nproc", "-2"], "nproc is -2; give a whole number of at least 1"),
    "text for a number": (["--nproc", "two"], "Invalid value for '--nproc'"),
    "unequal parts of a batch": (
        ["--nproc", "3"],
        "nproc is 3, which does not divide a batch of 128 examples; give --ba",
    ),
    "more processes than images": (
        ["--nproc", "129"],
        "which does not divide a batch of 128 examples; give --batch-size 129",
    ),
    "a fraction that makes no grid": (
        ["--nproc", "4", "--grad-worker-fraction", "0.3"],
        "grad_worker_fraction 0.3 of 4 ranks is 1.2 gradient workers, which do not divide them; the nearest that do "
        "are 1/4 or 2/4",
    ),
    "a fraction above one": (["--grad-worker-fraction", "2"], "grad_worker_fraction is 2.0; give a number from 0 to 1"),
    "a fraction that is nothing": (["--grad-worker-fraction", "nan"], "grad_worker_fraction is nan; give a number"),
    "an unknown fraction": (["--grad-worker-fraction", "most"], "grad-worker-fraction is 'most'; give comm, hybrid, m"),
    "memory that nobody plans": (["--memory-budget", "1GiB"], "memory_budget is for the planner"),
    "memory that is no amount": (
        ["--grad-worker-fraction", "auto", "--memory-budget", "some"],
        "'some' is no amount of memory",
    ),
    "an output in use": (["--nproc", "2", "--output", "full"], "output full is not empty"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_input_gets_one_line_and_status_two_before_any_process_starts(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    (tmp_path / "full" / "of").mkdir(parents=True)
    assert run(["train", *options]) == BAD_INPUT
    said = capfd.readouterr()
    assert message in said.err
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert not (tmp_path / "runs").exists()


def test_nproc_that_contradicts_torchrun_is_refused(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert launched_world() == (0, 4)
    assert run(["train", "--nproc", "2"]) == BAD_INPUT
    assert "nproc is 2, but torchrun has started 4 processes; leave out --nproc" in capfd.readouterr().err


def test_a_run_is_resumed_by_as_many_ranks_as_began_it(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run([*SMALL, "--epochs", "1", "--output", "out"]) == 0
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert run(["train", "--resume", "out"]) == BAD_INPUT
    assert "the run in out has 1 processes, but torchrun has started 4" in capfd.readouterr().err


def test_a_restart_by_torchrun_goes_on_with_the_folder(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run([*SMALL, "--epochs", "1", "--output", "out"]) == 0
    before = Path("out", "record.json").read_bytes()
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("TORCHELASTIC_RESTART_COUNT", "1")):
        monkeypatch.setenv(name, value)
    assert run([*SMALL, "--epochs", "1", "--output", "out"]) == 0
    assert Path("out", "record.json").read_bytes() == before
    assert capfd.readouterr().out.count("final test accuracy") == 2


def test_a_rank_that_is_killed_is_named_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def launch(*_: object) -> NoReturn:
        failure = ProcessFailure(local_rank=1, pid=1, exitcode=-9, error_file="none")
        raise ChildFailedError("kaisa", {1: failure})

    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", lambda *_: launch)
    assert run([*SMALL, "--nproc", "2", "--output", "out"]) == FAILED
    assert capfd.readouterr().err == "kaisa: rank 1 was ended by SIGKILL, and the others with it\n"


def test_a_process_of_its_own_is_alone() -> None:
    ranks = join_world(torch.device("cpu"))
    assert (ranks.rank, ranks.world_size, world()) == (0, 1, (0, 1))
    leave_world()


def test_the_account_of_placements_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "distributed", "--model", "bert-base", "--world-size", "8"]) == 0
    said = capfd.readouterr().out
    assert "| 0 1 2 3 |\n| 4 5 6 7 |" in said
    assert said.count("factor step: statistics") == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--model", "vgg"], "unknown model 'vgg'"), (["--world-size", "0"], "world-size is 0")],
)
def test_what_cannot_be_placed_gets_one_line(
    capfd: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert run(["bench", "distributed", *options]) == BAD_INPUT
    said = capfd.readouterr().err
    assert message in said
    assert said.count("\n") == 1
