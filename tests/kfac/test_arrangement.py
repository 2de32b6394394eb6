"""The planner inside a run: what it chooses, what it tells, and a placement that is replaced while the run goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import kaisa
from kaisa.errors import ConfigurationError
from kaisa.kfac import arrangement
from kaisa.kfac.arrangement import Measured, corrected, is_off, ratios
from kaisa.kfac.hardware import Hardware
from kaisa.kfac.solvers import Cholesky, Eigen
from tests.kfac.test_many_ranks import SOLVERS, TOLERANCE, deferring, of_ranks, untied
from tests.support.training import distance
from tests.support.world import Simulated, run, run_all


def of_rank(collectives: Simulated, **options: Any) -> kaisa.KFACPreconditioner:
    rank_run = deferring(collectives.world_size, **options)(collectives)
    rank_run()
    assert rank_run.kfac is not None
    return rank_run.kfac


# ---------------------------------------------------------------------------------------------------------- choosing


def test_every_rank_chooses_the_same_and_the_run_is_what_one_process_makes() -> None:
    found, _ = of_ranks(4, deferring(4, grad_worker_fraction="auto"))
    assert distance(found[0], untied()) < 1e-11


def test_less_memory_means_fewer_gradient_workers() -> None:
    def workers(budget: int | None) -> tuple[int, int]:
        kfac = run(4, lambda ranks: of_rank(ranks, grad_worker_fraction="auto", memory_budget=budget))[0]
        prediction = kfac._arrangement.prediction
        assert prediction is not None
        return kfac.placement.workers, prediction.peak

    _, peak = workers(None)
    every = run(4, lambda ranks: of_rank(ranks, grad_worker_fraction="mem"))[0]
    assert every._arrangement.prediction is not None
    least = every._arrangement.prediction.peak
    assert least < peak or workers(None)[0] == 1
    count, held = workers(max(least, 1))
    assert held <= least
    assert count == 1


def test_memory_that_nothing_fits_is_refused_on_every_rank_with_what_is_missing() -> None:
    _, failures = run_all(2, lambda ranks: of_rank(ranks, grad_worker_fraction="auto", memory_budget="1kB"))
    assert sorted(failures) == [0, 1]
    for failure in failures.values():
        with pytest.raises(ConfigurationError, match=r"fits into .* too much; this would fit"):
            raise failure


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"memory_budget": "1GiB"}, "memory_budget is for the planner"),
        ({"replan_beyond": 2.0}, "replan_beyond is for the planner"),
        ({"grad_worker_fraction": "auto", "replan_beyond": 1.0}, "give a factor above 1"),
        ({"grad_worker_fraction": "auto", "memory_budget": "much"}, "no amount of memory"),
        ({"grad_worker_fraction": "auto", "hardware": "abacus"}, "no hardware profile 'abacus'"),
    ],
    ids=str,
)
def test_what_the_planner_cannot_use_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        kaisa.KFACPreconditioner(torch.nn.Linear(3, 2), lr=0.1, **options)


def test_a_solver_of_the_users_own_leaves_the_fraction_to_the_user() -> None:
    class Own(Cholesky):
        pass

    with pytest.raises(ConfigurationError, match="give grad_worker_fraction as a number"):
        kaisa.KFACPreconditioner(torch.nn.Linear(3, 2), lr=0.1, solver=Own(), grad_worker_fraction="auto")
    kfac = kaisa.KFACPreconditioner(torch.nn.Linear(3, 2), lr=0.1, solver=Own())
    assert kfac.plan_report().predicted == {}


# ----------------------------------------------------------------------------------------------------------- telling


def test_the_report_has_prediction_and_measurement_side_by_side() -> None:
    for kfac in run(2, lambda ranks: of_rank(ranks, grad_worker_fraction="mem", inv_dtype=torch.float64)):
        report = kfac.plan_report()
        assert set(report.ratios) == {"factors", "inverses", "precondition", "memory"}
        assert report.ratios["memory"] == pytest.approx(1.0, abs=0.01)
        text = str(report)
        assert "predicted" in text
        assert f"{1e3 * kfac.timings()['precondition']:,.2f} ms" in text


# ------------------------------------------------------------------------------------------------------ looking back


def test_ratios_take_the_slowest_to_compute_and_the_last_to_come() -> None:
    kfac = run(2, lambda ranks: of_rank(ranks, grad_worker_fraction="mem"))[0]
    prediction = kfac._arrangement.prediction
    assert prediction is not None
    told = prediction.parts
    work = told["solve"] + told["update"]
    exchanged = told["reduce"] + told["share"] + told["spread"]
    rows = [
        [2 * told["decompose"], 3 * work, told["reduce"], told["share"], told["spread"]],
        [1 * told["decompose"], 1 * work, 9.0, 9.0, 9.0],
    ]
    found = ratios(prediction, Measured.of_ranks(rows))
    assert found == pytest.approx({"decompose": 2.0, "compute": 3.0, "exchange": 1.0})
    assert exchanged > 0
    assert is_off(found, 2.5)
    assert not is_off(found, 3.5)
    assert is_off({"compute": 0.2}, 4.0)


def test_a_corrected_profile_takes_so_many_times_as_long() -> None:
    hardware = Hardware.load("v100")
    slower = corrected(hardware, decompose=2.0, compute=4.0, exchange=8.0)
    assert slower.decomposition_seconds("eigen", 500) == pytest.approx(2 * hardware.decomposition_seconds("eigen", 500))
    assert slower.rate(512) == pytest.approx(hardware.rate(512) / 4)
    before, after = (machine.exchange_between.seconds(1e6, 4e6, 7) for machine in (hardware, slower))
    assert after == pytest.approx(8 * before)


# ------------------------------------------------------------------------------------------------------------- moving


def moving(to_workers: list[int], is_deferred: bool, **options: Any) -> Callable[[Simulated], Any]:
    """Ranks that change the number of gradient workers after each step."""

    def of(collectives: Simulated) -> Any:
        def move(kfac: kaisa.KFACPreconditioner) -> None:
            workers = to_workers[(kfac.steps - 1) % len(to_workers)]
            arranger = replace(kfac._arranger, fraction=workers / collectives.world_size, deferred=is_deferred)
            kfac._move_to(arranger.first())
            assert kfac.placement.workers == workers

        return replace(deferring(collectives.world_size, **options)(collectives), after_step=move)

    return of


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("is_deferred", [False, True])
@pytest.mark.parametrize("to_workers", [[1, 4, 2], [4, 1]], ids=str)
def test_a_run_whose_placement_changes_after_every_step_makes_the_same_numbers(
    solver: str, is_deferred: bool, to_workers: list[int]
) -> None:
    options = {"solver": solver, "inv_update_steps": 3}
    found, _ = of_ranks(4, moving(to_workers, is_deferred, **options, grad_worker_fraction=0.5))
    assert distance(found[0], untied(**options)) < TOLERANCE.get(solver, 1e-11)


def test_after_a_move_each_factor_is_held_by_its_new_owners_alone() -> None:
    def main(collectives: Simulated) -> None:
        kfac = of_rank(collectives, grad_worker_fraction="comm", inv_update_steps=1)
        before = {name: kfac.factors[name] for name in kfac.factors}
        kfac._move_to(replace(kfac._arranger, fraction="mem").first())
        for name, owners in kfac.placement.assignments:
            for side, ranks in ((0, owners.a_owners), (1, owners.g_owners)):
                is_held = name in kfac.factors and kfac.factors[name].side(side).numel() > 0
                assert is_held == (collectives.rank in ranks)
                if is_held and name in before and before[name].side(side).numel():
                    assert torch.equal(kfac.factors[name].side(side), before[name].side(side))

    run(4, main)


@pytest.mark.parametrize("is_slow", [False, True])
def test_a_machine_that_is_not_what_it_was_taken_for_gets_another_placement(
    monkeypatch: pytest.MonkeyPatch, is_slow: bool
) -> None:
    # Exchanges that take a thousand times as long as predicted make COMM-OPT, which has none in most steps, the best.
    seen = {"decompose": 1.0, "compute": 1.0, "exchange": 1000.0 if is_slow else 1.0}
    monkeypatch.setattr("kaisa.kfac.preconditioner.ratios", lambda prediction, measured: seen)
    first = arrangement.Arranger.first
    monkeypatch.setattr(arrangement.Arranger, "first", lambda arranger: first(replace(arranger, fraction="mem")))

    def main(collectives: Simulated) -> tuple[dict[str, Tensor], kaisa.KFACPreconditioner]:
        options = {"grad_worker_fraction": "auto", "replan_beyond": 2.0, "inv_update_steps": 2}
        rank_run = deferring(4, **options)(collectives)
        parameters = rank_run()
        assert rank_run.kfac is not None
        return parameters, rank_run.kfac

    results = run(4, main)
    for parameters, kfac in results:
        assert distance(parameters, untied(inv_update_steps=2)) < 1e-11
        assert kfac.placement.workers == (4 if is_slow else 1)
        assert kfac.placement == results[0][1].placement
        changes = kfac.plan_report().changes
        assert len(changes) == (2 if is_slow else 0)
        if is_slow:
            assert "exchange 1000.00 times the prediction; fraction 0.25 ─► 1" in changes[0]


def test_names_of_solvers_are_those_of_the_planner() -> None:
    assert arrangement.name_of(Eigen()) == "eigen"
    assert arrangement.name_of(Cholesky()) == "cholesky"
