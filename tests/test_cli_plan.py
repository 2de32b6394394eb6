"""`kaisa plan`: told, drawn and written without any of the ranks; and a machine measured by its own ranks."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from kaisa.cli import BAD_INPUT, run
from kaisa.kfac.hardware import Hardware
from kaisa.recipes import calibration
from kaisa.recipes.calibration import Effort

PLAN = ["plan", "--model", "cnn", "--world-size", "4", "--hardware", "h100"]
SMALL = Effort(
    sides=(8,), orders=(8,), batched_orders=(8,), seconds=0.002, numbers=100, copied=100, images=2, pixels=32, layers=2
)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_plan_is_told_written_and_drawn(capfd: pytest.CaptureFixture[str]) -> None:
    assert run([*PLAN, "--memory-budget", "1GiB", "--output", "plan.json", "--plot", "plan.png"]) == 0
    said = capfd.readouterr().out
    assert "4 ranks of" in said
    assert "KFACPreconditioner(model, optimizer" in said
    written = json.loads(Path("plan.json").read_text())
    assert (written["workload"], written["world_size"], written["memory_budget"]) == ("cnn", 4, 2**30)
    assert Path("plan.png").read_bytes().startswith(b"\x89PNG")


def test_a_shipped_machine_goes_by_its_short_name_too() -> None:
    assert Hardware.load("v100") == Hardware.load("V100-EDR")


def test_intervals_batch_and_solver_reach_the_plan(capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--solver", "cholesky", "--factor-update-steps", "2", "--inv-update-steps", "20", "--batch", "7"]
    assert run([*PLAN, *options, "--output", "plan.json"]) == 0
    chosen = json.loads(Path("plan.json").read_text())["options"]
    assert (chosen["solver"], chosen["factor_update_steps"], chosen["inv_update_steps"]) == ("cholesky", 2, 20)
    assert "7 examples a rank" in capfd.readouterr().out


def test_what_is_allowed_is_chosen_too() -> None:
    assert run([*PLAN, "--allow", "intervals", "--allow", "precision", "--output", "plan.json"]) == 0
    assert json.loads(Path("plan.json").read_text())["options"]["inv_update_steps"] == 500


def test_a_machine_that_was_measured_can_be_planned_for(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calibration, "Effort", partial(lambda effort: effort, SMALL))
    assert run(["plan", "--calibrate", "--nproc", "1", "--output", "mine.json"]) == 0
    said = capfd.readouterr().out
    assert "profile: mine.json" in said
    assert Hardware.load("mine.json").ranks_per_node == 1
    assert run(["plan", "--model", "mlp", "--world-size", "2", "--hardware", "mine.json"]) == 0


@pytest.mark.slow
def test_two_processes_measure_the_machine(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "--calibrate", "--nproc", "2", "--output", "mine.json"]) == 0
    assert capfd.readouterr().out.count("profile: mine.json") == 1
    found = Hardware.load("mine.json")
    assert found.ranks_per_node == 2
    assert "among 2 ranks" in found.sources["exchange_inside"]
    assert 0 < found.exchange_inside.bandwidth < 10 * found.memory_bandwidth
    assert found.decompositions["eigen"][-1][0] >= 256


BAD = {
    "no machine": (["plan", "--model", "cnn"], "give --hardware: a100, "),
    "an unknown machine": (["plan", "--hardware", "abacus"], "no hardware profile 'abacus'"),
    "an unknown model": ([*PLAN, "--model", "vgg"], "unknown model 'vgg'"),
    "a budget that nothing fits": ([*PLAN, "--memory-budget", "1KiB"], "fits into 1 KiB a rank"),
    "no place for the plan": ([*PLAN, "--output", "no/plan.json"], "there is no folder no"),
    "a folder for a plot": ([*PLAN, "--plot", "."], ". is a folder"),
    "no place for the profile": (["plan", "--calibrate"], "--calibrate needs --output, the file of the profile"),
    "an unknown device": (["plan", "--calibrate", "--output", "x", "--device", "xpu"], "no device 'xpu' to measure"),
    "no device": (["plan", "--calibrate", "--output", "x", "--device", "abacus"], "no device 'abacus' to measure"),
    "no process": (["plan", "--calibrate", "--output", "x", "--nproc", "0"], "nproc is 0; give a whole number"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_input_gets_one_line_and_status_two_and_nothing_is_written(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(arguments) == BAD_INPUT
    said = capfd.readouterr()
    assert message in said.err
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert not list(tmp_path.iterdir())
