import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def optimizers(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("optimizers", FOLDER / "optimizers.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "optimizers", module)
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)
    del sys.modules["step_time"]


def test_every_contestant_is_timed_beside_sgd_and_held_against_the_goals(optimizers, tmp_path):
    output = tmp_path / "results" / "optimizers.json"
    optimizers.main(["--workloads", "tiny", "--rounds", "2", "--processes", "0", "--output", str(output)])
    report = json.loads(output.read_text())
    tiny = report["workloads"]["tiny"]
    assert set(tiny["contestants"]) == set(optimizers.CONTESTANTS)
    assert tiny["contestants"]["sgd"]["steps"]["plain"]["ratio"] == [1, 1, 1]
    assert set(tiny["contestants"]["kaisa adahessian"]["steps"]) == {"hessian", "plain"}
    ways = sum(name.startswith("kaisa adahessian") for name in optimizers.CONTESTANTS)
    assert sum(row["goal"].startswith("kaisa adahessian") for row in tiny["targets"]) == 4 * ways
    assert {"commit", "date", "machine", "settings"} <= set(report)


def test_hessian_steps_are_those_in_which_it_is_due(optimizers):
    workload, settings = optimizers.WORKLOADS["tiny"](), optimizers.Settings()
    trainer = optimizers.Trainer(optimizers.CONTESTANTS["kaisa adahessian"], workload, settings)
    batch = settings.batch(workload)
    for _ in range(2):
        for kind in trainer.contestant.kinds:
            assert trainer.optimizer.hessian_due == (kind == "hessian")
            trainer.step(kind, *batch)


def test_an_average_weighs_one_hessian_step_and_the_plain_ones_after_it(optimizers):
    steps = {"plain": {"ratio": [0, 1.0, 0]}, "hessian": {"ratio": [0, 4.0, 0]}}
    assert [optimizers.average(steps, period) for period in (1, 2, 5)] == [4.0, 2.5, 1.6]
