import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "step_time.py"


@pytest.fixture
def step_time():
    spec = importlib.util.spec_from_file_location("step_time", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["step_time"] = module
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)
    del sys.modules["step_time"]


@pytest.fixture
def report(step_time, tmp_path):
    output = tmp_path / "results" / "step_time.json"
    contestants = ["sgd", "kaisa eigen", "kaisa cholesky"]
    options = ["--rounds", "2", "--inverse-every", "2", "--no-memory", "--threads", "1", "--output", str(output)]
    step_time.main(["--workloads", "tiny", "--contestants", *contestants, *options])
    return json.loads(output.read_text())


def test_every_kind_of_step_is_timed_beside_sgd_and_held_against_float64(report):
    tiny = report["workloads"]["tiny"]
    assert tiny["steps"]["sgd"]["plain"]["ratio"] == [1, 1, 1]
    assert set(tiny["steps"]["kaisa eigen"]) == {"plain", "factor", "inverse", "factor+inverse"}
    assert tiny["steps"]["kaisa eigen"]["factor+inverse"]["steps"] == 1
    assert all(0 < error < 1e-4 for kinds in tiny["relative_error"].values() for error in kinds.values())
    assert {"commit", "date", "machine", "settings"} <= set(report)


def test_steps_are_of_the_kind_that_was_planned(step_time):
    settings = step_time.Settings()
    workload = step_time.tiny()
    trainer = step_time.KAISA(workload, settings, [step_time.PLAIN, step_time.FACTOR, step_time.INVERSE])
    batch = settings.batch(workload)
    trainer.warm_up(*batch)
    seen = []
    for _ in range(3):
        before = trainer.kfac.state_dict()
        trainer.step(*batch)
        after = trainer.kfac.state_dict()
        seen.append(
            (before["last_factors"] != after["last_factors"], before["last_inverses"] != after["last_inverses"])
        )
    assert seen == [(False, False), (True, False), (False, True)]


def test_pairs_of_taps_are_counted_once_by_phase_and_offset(step_time):
    assert step_time._distinct_pairs(3, 1) == 5
    assert step_time._distinct_pairs(3, 2) == 8
    assert step_time._distinct_pairs(1, 1) == 1


def test_an_average_weighs_ninety_plain_nine_factor_and_one_full_step(step_time):
    ratios = {"plain": 1.0, "factor": 2.0, "inverse": 5.0, "factor+inverse": 11.0}
    kinds = {kind: {"ratio": [0, ratio, 0]} for kind, ratio in ratios.items()}
    assert step_time.average_at(kinds) == pytest.approx(0.9 + 0.18 + 0.11)
