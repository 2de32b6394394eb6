"""The choice: the fastest that fits, what is said about it, and what is said when nothing fits."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from kaisa.errors import ConfigurationError
from kaisa.kfac.explanation import in_bytes, in_seconds
from kaisa.kfac.hardware import Hardware
from kaisa.kfac.placement import FactorShape, LayerShape
from kaisa.kfac.planner import Choices, Plan, choose, parse_bytes
from kaisa.kfac.prediction import placed, predict
from kaisa.kfac.workload import LayerWork, Settings, Workload
from tests.support.published import FACTOR_STEPS, INVERSE_STEPS, WORKERS, WORLD_SIZE, resnet

V100 = Hardware.load("v100-edr")
SETTINGS = Settings(factor_update_steps=FACTOR_STEPS, inv_update_steps=INVERSE_STEPS)
RESNET = resnet("resnet50")


@pytest.fixture(scope="module")
def free() -> Plan:
    return choose(RESNET, WORLD_SIZE, V100, SETTINGS)


def test_the_choice_is_the_fastest_of_all_combinations(free: Plan) -> None:
    assert len(free.candidates) == len(WORKERS) * 2 * 2
    assert free.chosen is free.candidates[0]
    assert all(first.average_step <= second.average_step for first, second in pairwise(free.candidates))
    every = [
        predict(RESNET, placed(RESNET, WORLD_SIZE, workers, V100, settings), V100, settings).average_step
        for workers in WORKERS
        for colocate in (False, True)
        for settings in (replace(SETTINGS, colocate=colocate, deferred=deferred) for deferred in (False, True))
    ]
    assert free.chosen.average_step == pytest.approx(min(every), rel=1e-12)


def test_within_a_budget_the_choice_is_the_fastest_that_fits(free: Plan) -> None:
    peaks = sorted(prediction.peak for prediction in free.candidates)
    for budget in (peaks[0], peaks[len(peaks) // 2], peaks[-1]):
        plan = choose(RESNET, WORLD_SIZE, V100, SETTINGS, memory_budget=budget)
        assert plan.chosen.peak <= budget
        fitting = [prediction for prediction in free.candidates if prediction.peak <= budget]
        assert plan.chosen.average_step == min(prediction.average_step for prediction in fitting)
        for best in plan.by_fraction():
            assert best.peak <= budget or best.peak == min(
                each.peak for each in free.candidates if each.placement.workers == best.placement.workers
            )


def test_less_memory_never_makes_a_step_faster(free: Plan) -> None:
    budgets = sorted({prediction.peak for prediction in free.candidates})[::6]
    times = [choose(RESNET, WORLD_SIZE, V100, SETTINGS, memory_budget=b).chosen.average_step for b in budgets]
    assert times == sorted(times, reverse=True)


def test_where_nothing_fits_the_error_says_how_much_is_missing_and_what_would_help(free: Plan) -> None:
    smallest = min(prediction.peak for prediction in free.candidates)
    with pytest.raises(ConfigurationError, match=r"no placement of resnet50 fits into 1 MiB a rank") as failure:
        choose(RESNET, WORLD_SIZE, V100, SETTINGS, memory_budget=2**20)
    assert in_bytes(smallest - 2**20) + " too much" in str(failure.value)
    (said,) = str(failure.value).split("memory_budget=")[1:]
    assert (
        choose(RESNET, WORLD_SIZE, V100, SETTINGS, memory_budget=parse_bytes(said.strip("'"))).chosen.peak >= smallest
    )


def test_what_the_error_says_would_fit_does_fit() -> None:
    shapes = [LayerShape(name, FactorShape(64), FactorShape(64), (1, 64, 64)) for name in "abcdefgh"]
    workload = Workload("stack", tuple(LayerWork(shape, 1) for shape in shapes))
    smallest = min(choose(workload, 1, V100).candidates, key=lambda prediction: prediction.peak).peak
    with pytest.raises(ConfigurationError, match=r"this would fit: .*solver='cholesky'"):
        choose(workload, 1, V100, memory_budget=smallest - 1)
    assert choose(workload, 1, V100, Settings(solver="cholesky"), memory_budget=smallest - 1)


def test_solvers_intervals_and_shorter_payloads_are_chosen_only_where_allowed() -> None:
    plain = choose(RESNET, WORLD_SIZE, V100, SETTINGS)
    assert {p.settings.solver for p in plain.candidates} == {"eigen"}
    assert {(p.settings.statistics, p.settings.gradients) for p in plain.candidates} == {(None, None)}
    allowed = Choices(
        solvers=("eigen", "cholesky"), gradients=(None, "bfloat16"), intervals=((50, 500), (100, 1000)), workers=(8,)
    )
    free = choose(RESNET, WORLD_SIZE, V100, SETTINGS, choices=allowed)
    assert len(free.candidates) == 2**5
    assert free.chosen.settings.solver == "cholesky"
    assert free.chosen.settings.gradients == "bfloat16"
    assert free.chosen.settings.inv_update_steps == 1000
    assert free.chosen.average_step < min(p.average_step for p in plain.candidates if p.placement.workers == 8)


def test_options_are_arguments_of_the_preconditioner(free: Plan) -> None:
    options = free.options
    assert options["grad_worker_fraction"] == free.chosen.placement.workers / WORLD_SIZE
    assert options["solver"] == "eigen"
    assert options["payload"]["deferred"] == free.chosen.is_deferred
    assert options["colocate_factors"] == free.chosen.settings.colocate
    assert options["local_below"] == "auto"
    assert options["ranks_per_node"] == V100.ranks_per_node


def test_one_process_has_one_placement_and_nothing_to_defer() -> None:
    plan = choose(RESNET, 1, V100)
    assert len(plan.candidates) == 1
    assert plan.options["grad_worker_fraction"] == 1.0
    assert not plan.chosen.is_deferred
    assert plan.chosen.bytes_a_step == 0


def test_statistics_of_tied_layers_and_of_spread_decompositions_never_wait() -> None:
    tied = LayerShape("tied", FactorShape(9, is_diagonal=True), FactorShape(4), (1, 4, 9), uses=2)
    workload = Workload("tied", (LayerWork(tied, 5),))
    assert not any(prediction.is_deferred for prediction in choose(workload, 4, V100).candidates)
    assert not any(prediction.is_deferred for prediction in choose(RESNET, 4, V100, Settings(spread=True)).candidates)


def test_a_plan_says_in_plain_words_what_was_chosen_and_why_not_another(free: Plan) -> None:
    budget = sorted(prediction.peak for prediction in free.candidates)[3]
    plan = choose(RESNET, WORLD_SIZE, V100, SETTINGS, memory_budget=budget)
    first, wall, *others = plan.reasons
    assert f"the fastest that fits into {in_bytes(budget)} a rank" in first
    assert "Most of K-FAC's time goes into" in wall
    assert len(others) == len(WORKERS) - 1
    assert any("COMM-OPT does not fit: it needs" in reason for reason in others)
    text = str(plan)
    assert all(f"{workers}/{WORLD_SIZE}" in text for workers in WORKERS)
    assert text.count("chosen") == 1
    assert "does not fit" in text


def test_json_holds_the_choice_and_every_fraction(free: Plan) -> None:
    read = json.loads(free.to_json())
    assert read["options"] == dict(free.options)
    assert [entry["workers"] for entry in read["by_fraction"]] == list(WORKERS)
    chosen = next(entry for entry in read["by_fraction"] if entry["workers"] == free.chosen.placement.workers)
    assert chosen["steps"]["average"] == free.chosen.average_step
    assert chosen["memory"]["peak"] == free.chosen.peak


def test_every_process_makes_the_same_plan(free: Plan) -> None:
    program = (
        "from tests.support.published import *\n"
        "from tests.kfac.test_planner import RESNET, SETTINGS, V100\n"
        "from kaisa.kfac.planner import choose\n"
        "print(choose(RESNET, WORLD_SIZE, V100, SETTINGS).to_json(), end='')\n"
    )
    root = Path(__file__).parents[2]
    environment = {"PYTHONHASHSEED": "1", "PYTHONPATH": f"{root}:{root / 'src'}"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root, env=environment
    )
    assert done.stdout == free.to_json()


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("2GiB", 2**31),
        ("500 MB", 500_000_000),
        ("1.5kib", 1536),
        (" 7 b", 7),
        ("64", 64),
        (1024, 1024),
        ("3G", 3 * 10**9),
    ],
)
def test_amounts_of_memory_are_read(text: str | int, number: int) -> None:
    assert parse_bytes(text) == number


@pytest.mark.parametrize("text", ["", "much", "-1GiB", "2 ib", "0", 0, -5, True])
def test_what_is_no_amount_of_memory_is_refused(text: str | int) -> None:
    with pytest.raises(ConfigurationError, match="is no amount of memory"):
        parse_bytes(text)


def test_sizes_and_times_are_said_in_three_digits() -> None:
    assert [in_bytes(size) for size in (12, 1536, 1000 * 2**20, 5 * 2**30)] == ["12 B", "1.5 KiB", "1000 MiB", "5 GiB"]
    assert [in_seconds(time) for time in (2.5, 0.0123, 4.56e-6)] == ["2.5 s", "12.3 ms", "4.56 µs"]


def test_unknown_solvers_and_payloads_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="knows no solver 'magic'"):
        Settings(solver="magic")
    with pytest.raises(ConfigurationError, match=r"Settings.local_below is 'never'; give a whole number, or 'auto'"):
        Settings(local_below="never")
    with pytest.raises(ConfigurationError, match=r"Settings.gradients is 'float8'; give one of None, 'float32'"):
        Settings(gradients="float8")


@pytest.mark.parametrize("file", ["planner", "explanation", "reference", "prediction", "phases", "footprint", "shares",
                                  "workload", "hardware", "account", "routes", "placement"])  # fmt: skip
def test_the_arithmetic_imports_no_torch(file: str) -> None:
    source = (Path(__file__).parents[2] / "src" / "kaisa" / "kfac" / f"{file}.py").read_text(encoding="utf-8")
    assert "import torch" not in source
    assert "from torch" not in source
