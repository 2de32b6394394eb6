from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from kaisa.errors import ConfigurationError, StateError
from kaisa.recipes.race.courses import FACTOR, Course, find_course
from kaisa.recipes.race.entrants import ENTRANTS, Driver, Entrant, Muon, falling, find_entrant, growing
from kaisa.recipes.race.heat import Heat, Look, Plan, run_interleaved, thin_tests
from kaisa.recipes.race.ledger import FINAL, STAGES, TUNE, Ledger
from kaisa.recipes.race.runner import Grounds, run
from kaisa.recipes.race.stages import FINAL_SEEDS, TUNING_SEED, Race
from kaisa.recipes.race.standings import by_cpu as cpu
from kaisa.recipes.race.standings import draw, saved, stand, write_table
from kaisa.recipes.tasks import REGRESSION, Lesson
from tests.recipes.conftest import write_images

COURSE = Course(
    "resnet", {"model": "cnn", "batch_size": 4}, steps=8, look_every=3, tests=10, control="sgd", rates={"sgd": 0.01}
)
ENTRANTS_HERE = [find_entrant(name) for name in ("sgd", "adamw", "eigen on sgd")]


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "race", "small", COURSE)


@pytest.fixture
def race(ledger: Ledger) -> Race:
    return Race.of(ledger, ENTRANTS_HERE)


@pytest.fixture
def grounds(tmp_path: Path) -> Grounds:
    return Grounds({"images": str(write_images(tmp_path / "images"))}, cache=tmp_path / "cache")


def curve(steps: int, values: dict[int, float], pace: float = 1.0) -> list[Look]:
    """Return looks at some steps, the last of them at the end."""
    assert max(values) == steps
    return [Look(step, 2 * pace * step, pace * step, value) for step, value in sorted(values.items())]


def keep(race: Race, stage: str, plan: Plan, values: dict[int, float], pace: float = 1.0) -> None:
    race.ledger.put(plan, stage, "finished", curve(plan.steps, values, pace), {})


def tune(race: Race, made_of: dict[str, float]) -> list[tuple[str, float, int, int]]:
    """Tune with runs whose value at the end is the less the farther a rate is from the best one."""
    order = []
    while (plan := next(race.due(TUNE), None)) is not None:
        off = abs(math.log(plan.rate / made_of[plan.entrant.name]))
        end = max(0.05, 0.8 - 0.1 * off) - (0.05 if plan.steps < COURSE.steps else 0) + 0.001 * (plan.seed - 1000)
        end += 0.2 if plan.entrant.kfac else 0
        keep(race, TUNE, plan, {1: 0.0, plan.steps: end})
        order.append((plan.entrant.name, plan.rate, plan.steps, plan.seed))
    return order


# --------------------------------------------------------------------------------------------------------- the rules


def test_everybody_is_tried_with_as_many_rates(race: Race) -> None:
    middles = {entrant.name: COURSE.grid(entrant)[0] for entrant in ENTRANTS_HERE}
    order = tune(race, middles)
    for entrant in ENTRANTS_HERE:
        rates = [rate for name, rate, steps, _ in order if name == entrant.name and steps == race.short]
        assert rates == pytest.approx([middles[entrant.name] * factor for factor in (1, 1 / FACTOR, FACTOR)])


@pytest.mark.parametrize("side", [FACTOR, 1 / FACTOR])
def test_a_best_rate_at_the_end_of_the_grid_has_one_more_tried_beyond_it(race: Race, side: float) -> None:
    middles = {entrant.name: COURSE.grid(entrant)[0] for entrant in ENTRANTS_HERE}
    order = tune(race, {**middles, "adamw": middles["adamw"] * side**2})
    rates = [rate for name, rate, steps, _ in order if name == "adamw" and steps == race.short]
    assert len(rates) == 4
    assert rates[-1] == pytest.approx(middles["adamw"] * side**2)
    assert race.chosen(find_entrant("adamw")) == pytest.approx((rates[-1], COURSE.steps))


def test_the_target_is_the_median_final_value_of_the_tuned_control(race: Race) -> None:
    assert race.target() is None
    tune(race, {entrant.name: COURSE.grid(entrant)[0] for entrant in ENTRANTS_HERE})
    values = {heat.seed: heat.value for heat in race.ledger.heats(TUNE) if heat.steps == 8 and heat.rate == 0.01}
    assert set(values) == {1000, 1001, 1002}
    assert race.target() == sorted(values.values())[1]


def test_the_seeds_of_the_finals_are_others_than_those_of_tuning(race: Race) -> None:
    assert TUNING_SEED in race.target_seeds
    assert not {*FINAL_SEEDS} & {*race.target_seeds}


def test_a_course_may_have_its_target_set_by_more_heats(ledger: Ledger) -> None:
    noisy = Race.of(replace(ledger, course=replace(COURSE, target_seeds=5)), ENTRANTS_HERE)
    tune(noisy, {entrant.name: COURSE.grid(entrant)[0] for entrant in ENTRANTS_HERE})
    values = [heat.value for heat in noisy.ledger.heats(TUNE) if heat.steps == 8 and heat.rate == 0.01]
    assert len(values) == 5
    assert noisy.target() == sorted(values)[2]


def test_who_misses_the_target_on_the_short_schedule_gets_the_whole_one_but_for_the_control(race: Race) -> None:
    tune(race, {entrant.name: COURSE.grid(entrant)[0] for entrant in ENTRANTS_HERE})
    steps = {entrant.name: race.chosen(entrant)[1] for entrant in ENTRANTS_HERE}  # type: ignore[index]
    assert steps == {"sgd": race.short, "adamw": COURSE.steps, "eigen on sgd": race.short}


def test_a_rate_that_reaches_the_target_sooner_is_chosen_before_one_that_ends_better(race: Race) -> None:
    control = race.control
    for rate in COURSE.grid(control):
        keep(race, TUNE, Plan(control, rate, 8, TUNING_SEED), {8: 0.5 if rate == 0.01 else 0.4})
    for seed in race.target_seeds[1:]:
        keep(race, TUNE, Plan(control, 0.01, 8, seed), {8: 0.5})
    ours = find_entrant("eigen on sgd")
    middle, low, high = COURSE.grid(ours)
    keep(race, TUNE, Plan(ours, low, 4, TUNING_SEED), {2: 0.1, 4: 0.9})
    keep(race, TUNE, Plan(ours, middle, 4, TUNING_SEED), {2: 0.5, 4: 0.6})
    keep(race, TUNE, Plan(ours, high, 4, TUNING_SEED), {2: 0.1, 4: math.nan})
    assert race.chosen(ours) == (middle, 4)


def test_a_heat_of_tuning_ends_where_it_shows_the_target_but_not_those_that_set_it(race: Race) -> None:
    ours, control = find_entrant("eigen on sgd"), race.control
    assert race.enough(Plan(ours, 0.1, 4, TUNING_SEED), TUNE) is None  # nothing to reach yet
    tune(race, {entrant.name: COURSE.grid(entrant)[0] for entrant in ENTRANTS_HERE})
    target = race.target()
    decided = race.enough(Plan(ours, 0.1, 4, TUNING_SEED), TUNE)
    assert target is not None
    assert decided is not None
    assert [decided(target - 1e-6), decided(target)] == [False, True]
    assert race.enough(Plan(control, 0.1, 4, TUNING_SEED), TUNE) is not None
    assert race.enough(Plan(control, 0.1, 8, TUNING_SEED), TUNE) is None
    assert race.enough(Plan(ours, 0.1, 4, 0), FINAL) is None


def test_a_heat_that_may_end_ends_at_the_first_look_that_is_enough(lesson: Lesson) -> None:
    plan = Plan(find_entrant("sgd"), 0.01, 8, 0)
    (whole,) = run_interleaved([Heat.start(plan, COURSE, lesson)])
    values = [look.value for look in whole.looks]
    (heat,) = run_interleaved([Heat.start(plan, COURSE, lesson, lambda value: value == values[1])])
    assert (heat.end, [look.step for look in heat.looks]) == ("reached", [3, 6] if values[0] != values[1] else [3])


def test_kfac_pytorch_has_the_options_of_ours_that_it_knows() -> None:
    course = find_course("resnet", "small")
    ours, theirs = (course.preconditioning(find_entrant(f"{name} on sgd")) for name in ("eigen", "kfac-pytorch"))
    assert ours == {**theirs, "sharing": "reduce", "factor_examples": 0.5}
    assert set(theirs) == {"factor_update_steps", "inv_update_steps", "damping", "fisher_norm"}


def test_finals_before_tuning_are_refused(race: Race) -> None:
    with pytest.raises(StateError, match="resnet: not tuned yet: sgd, adamw, eigen on sgd; run --stage tune first"):
        next(race.due(FINAL))


def test_contestants_take_turns_and_seeds_begin_with_others_spread_evenly(race: Race) -> None:
    tune(race, {entrant.name: COURSE.grid(entrant)[0] for entrant in ENTRANTS_HERE})
    order = [(plan.seed, plan.entrant.name, plan.steps) for plan in race.due(FINAL)]
    field = [("sgd", 8), ("sgd", 4), ("adamw", 8), ("eigen on sgd", 4)]
    turns = [[(name, steps) for seed, name, steps in order if seed == one] for one in FINAL_SEEDS]
    assert [seed for seed, *_ in order] == sorted([*FINAL_SEEDS] * 4)
    assert turns == [field[first:] + field[:first] for first in (0, 0, 1, 2, 3)]


def test_unknown_names_are_refused_with_those_that_are_known() -> None:
    with pytest.raises(ConfigurationError, match="unknown contestant 'lion'; choose from sgd, adamw, muon"):
        find_entrant("lion")
    with pytest.raises(ConfigurationError, match="no course small 'digits'; choose from resnet, unet, gpt, bert"):
        find_course("digits", "small")


# -------------------------------------------------------------------------------------------------------- the ledger


def test_a_heat_read_is_the_heat_written(race: Race) -> None:
    plan = Plan(race.control, 0.01, 8, 0)
    written = race.ledger.put(plan, FINAL, "diverged", curve(8, {2: 0.25, 8: math.nan}), {})
    read = race.ledger.read(plan, FINAL)
    assert read is not None
    assert read.looks[0] == written.looks[0]
    assert math.isnan(read.value)
    assert (read.end, read.conditions, read.about) == ("diverged", written.conditions, written.about)
    assert {"machine", "versions", "commit", "ended", "preconditioning"} <= set(read.about)


@pytest.mark.parametrize("text", ["", "{", '{"format": 1}', '{"format": 0, "kind": "kaisa bench race"}', "[]"])
def test_a_torn_file_is_a_heat_to_run_again(race: Race, text: str) -> None:
    plan = next(race.due(TUNE))
    keep(race, TUNE, plan, {8: 0.5})
    assert next(race.due(TUNE)) != plan
    race.ledger.path(plan, TUNE).write_text(text)
    assert next(race.due(TUNE)) == plan


def test_a_heat_of_other_conditions_is_a_heat_to_run_again(race: Race) -> None:
    plan = next(race.due(TUNE))
    keep(race, TUNE, plan, {8: 0.5})
    other = Race.of(replace(race.ledger, course=replace(COURSE, tests=5)), ENTRANTS_HERE)
    assert next(other.due(TUNE)) == plan


# --------------------------------------------------------------------------------------------------------- the heats


def values(heat: Heat) -> list[tuple[int, float]]:
    return [(look.step, look.value) for look in heat.looks]


@pytest.mark.parametrize("name", ["eigen on sgd", "adahessian"])
def test_a_heat_that_is_interleaved_with_others_is_the_heat_alone(name: str, lesson: Lesson) -> None:
    plans = [Plan(find_entrant(who), 0.01, 7, 0) for who in (name, "adamw", name)]
    alone, *together = [Heat.start(plan, COURSE, thin_tests(lesson, 10)) for plan in [plans[0], *plans]]
    assert [*run_interleaved([alone])] == [alone]
    assert len([*run_interleaved(together)]) == 3
    assert values(together[0]) == values(alone) == values(together[2])
    assert [look.step for look in alone.looks] == [3, 6, 7]
    assert {heat.end for heat in together} == {"finished"}
    assert 0 < alone.looks[0].seconds < alone.looks[1].seconds


def test_each_round_of_interleaved_heats_begins_with_another_one(lesson: Lesson, monkeypatch: Any) -> None:
    heats = [Heat.start(Plan(find_entrant("sgd"), 0.01, steps, 0), COURSE, lesson) for steps in (3, 6, 6)]
    order = []
    advance = Heat.advance
    monkeypatch.setattr(Heat, "advance", lambda self: (order.append(heats.index(self)), advance(self)))
    ended = [heats.index(heat) for heat in run_interleaved(heats)]
    assert ended == [0, 2, 1]
    assert order == [0, 1, 2, 2, 1]


def test_a_value_that_is_no_number_ends_a_heat(lesson: Lesson) -> None:
    heat = Heat.start(Plan(find_entrant("sgd"), 1e30, 8, 0), COURSE, replace(lesson, task=REGRESSION))
    (heat,) = run_interleaved([heat])
    assert heat.end == "diverged"
    assert heat.looks[-1].step < 8


def test_a_contestant_that_gives_up_ends_its_heat_and_not_the_race(lesson: Lesson) -> None:
    heat = Heat.start(Plan(find_entrant("sgd"), 0.1, 8, 0), COURSE, replace(lesson, build=_Broken))
    (heat,) = run_interleaved([heat])
    assert heat.end == "failed: the matrix is singular"
    assert not heat.looks


class _Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(192, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("the matrix is singular")


def test_thinned_tests_are_spread_evenly_over_all_of_them(lesson: Lesson) -> None:
    whole = torch.cat([targets for _, targets in lesson.tests])
    thin = torch.cat([targets for _, targets in thin_tests(lesson, 8).tests])
    assert torch.equal(thin, whole[::3])


def test_tests_of_images_with_masks_may_be_cut_to_a_corner(lesson: Lesson) -> None:
    inputs, masks = torch.arange(48.0).reshape(1, 1, 6, 8), torch.ones(1, 6, 8)
    ((cut, cut_masks),) = thin_tests(replace(lesson, tests=[(inputs, masks)]), 1, side=4).tests
    assert torch.equal(cut, inputs[:, :, :4, :4])
    assert cut_masks.shape == (1, 4, 4)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")  # kfac-pytorch's
@pytest.mark.parametrize("entrant", [one for one in ENTRANTS.values() if one.is_present], ids=lambda one: one.name)
def test_every_contestant_that_is_there_learns(entrant: Entrant, lesson: Lesson) -> None:
    course = find_course("resnet", "small")
    torch.manual_seed(0)
    model = lesson.build()
    driver = Driver.start(entrant, model, course.preconditioning(entrant), lesson.batches.terms, 0)
    driver.set_rate(course.grid(entrant)[0] / 30)
    inputs, targets = next(lesson.batches.epoch(0))
    losses = []
    for _ in range(6):
        with driver.forward():
            loss = lesson.task.loss(model(inputs), targets)
        driver.step(loss)
        losses.append(loss.item())
    driver.close()
    assert min(losses[1:]) < losses[0]


PRECONDITIONED = [one for one in ENTRANTS.values() if one.kfac and one.is_present]


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")  # kfac-pytorch's
@pytest.mark.parametrize("rate", [0.1, 0.9])
@pytest.mark.parametrize("entrant", PRECONDITIONED, ids=lambda one: one.name)
def test_the_norm_of_the_fisher_bounds_steps_of_sgd_alike_at_every_rate(entrant: Entrant, rate: float) -> None:
    x, labels = torch.linspace(-1, 1, 96).sin().reshape(16, 6), torch.arange(16) % 3

    def gradients(limit: float | None) -> torch.Tensor:
        """Return the preconditioned gradient, the raw one for no limit."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 3))
        options = {"factor_update_steps": 1, "inv_update_steps": 1, "damping": 0.01, "fisher_norm": limit}
        driver = Driver.start(find_entrant("sgd") if limit is None else entrant, model, options, None, 0)
        driver.set_rate(rate)
        driver.step(cross_entropy(model(x), labels))
        driver.close()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    raw, free, bounded = (gradients(limit) for limit in (None, 1e6, 1e-3))
    is_of_adam = entrant.kfac == "ours" and (entrant.optimizer == "adamw" or entrant.solver == "sqrt_ekfac")
    expected = free if is_of_adam else free * 1e-3 / (raw @ free).sqrt()
    torch.testing.assert_close(bounded, expected)


def test_muon_turns_hidden_matrices_and_leaves_the_last_layer_to_adamw() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = Muon(model)
    muon, adamw = optimizer.parts
    assert [tuple(p.shape) for p in muon.param_groups[0]["params"]] == [(3, 18), (4, 3)]
    assert len(adamw.param_groups[0]["params"]) == 4
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.randn(5, 2, 3, 3)).square().sum().backward()
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    optimizer.step()
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_a_growing_interval_is_a_tenth_of_the_steps_behind() -> None:
    interval = growing(2, 20)
    assert [interval(step) for step in (0, 19, 30, 100, 500)] == [2, 2, 3, 10, 20]


def test_a_falling_damping_loses_the_same_share_in_each_step_and_then_stays() -> None:
    damping = falling(0.08, 0.005, 40)
    assert [damping(step) for step in (0, 10, 20, 40, 400)] == pytest.approx([0.08, 0.04, 0.02, 0.005, 0.005])


# ----------------------------------------------------------------------------------------------------------- the end


def test_a_tiny_race_runs_in_parts_from_the_first_rate_to_the_table(
    race: Race, grounds: Grounds, tmp_path: Path
) -> None:
    heard: list[str] = []
    for stage in STAGES:
        while run([race], stage, grounds, 4, lambda _, heat: heard.append(f"{heat.stage} {heat.contestant}")):
            grounds = Grounds(grounds.paths, cache=grounds.cache)  # as in a new process
    files = [*race.ledger.folder.rglob("*.json")]
    assert len(files) == len(heard)
    assert heard.count("final eigen on sgd") == len(FINAL_SEEDS)
    assert heard.count("final sgd") == 2 * len(FINAL_SEEDS)
    paths = draw([race], tmp_path / "drawn")
    assert [path.name for path in paths] == ["table.md", "curves.png", "times.png"]
    assert "### resnet: accuracy" in paths[0].read_text()
    assert all(path.stat().st_size for path in paths)


def test_the_standings_are_medians_and_a_miss_is_infinitely_long(race: Race) -> None:
    tune(race, {entrant.name: COURSE.grid(entrant)[0] for entrant in ENTRANTS_HERE})
    target = race.target()
    assert target is not None
    for plan in list(race.due(FINAL)):
        turn = FINAL_SEEDS.index(plan.seed)
        if plan.entrant.kfac:
            reaches = [{1}, {1, 3}, {2}, {3}, set()][turn]  # and at the end; for two looks in a row at 1, 3, 2, 3, 4
            values = {step: target if step in reaches else 0.0 for step in ({1, 2, 3} if turn == 1 else reaches)}
            keep(race, FINAL, plan, values | {4: target}, pace=2.0)
        elif plan.entrant.name == "adamw":
            keep(race, FINAL, plan, {4: target if turn else 0.0, 8: target if turn == 1 else 0.0})
        else:
            keep(race, FINAL, plan, {plan.steps: target - 0.1 if plan.steps == 4 else target})
    control, *others = stand(race)
    assert control.is_control
    assert control.first.cpu_seconds == 8
    assert [one.name for one in others] == ["eigen on sgd", "adamw", "sgd, K-FAC's schedule"]
    ours, adamw, twin = others
    assert (ours.first.step, ours.first.cpu_seconds, ours.first.seconds) == (2, 4, 8)
    assert saved(ours, control, cpu) == -0.5
    assert (adamw.reached, adamw.first.step) == (4, 4)
    assert twin.reached == 0
    assert math.isinf(saved(twin, control, cpu))
    table = write_table([race])
    assert "| eigen on sgd | 0.3 | 4 | 2 | 4.00 | 8.00 | −50.0 % | −50.0 % | −25.0 % | 5 of 5 |" in table
    assert "| sgd, K-FAC's schedule | 0.01 | 4 | – | – | – | missed | missed | missed | 0 of 5 |" in table
    assert [one.first.step for one in stand(race, in_a_row=2)][:2] == [8, 3]


def test_a_control_that_misses_its_own_target_counts_as_long_as_it_ran(race: Race) -> None:
    tune(race, {entrant.name: COURSE.grid(entrant)[0] for entrant in ENTRANTS_HERE})
    for plan in list(race.due(FINAL)):
        keep(race, FINAL, plan, {plan.steps: 0.0})
    assert stand(race)[0].first.cpu_seconds == 8
    assert stand(race)[0].reached == 0


def test_the_file_of_a_heat_has_a_line_for_each_look(race: Race) -> None:
    plan = next(race.due(TUNE))
    keep(race, TUNE, plan, {1: 0.5, 8: 0.5})
    text = race.ledger.path(plan, TUNE).read_text()
    assert "  [1, 2.0, 1.0, 0.5],\n  [8, 16.0, 8.0, 0.5]\n" in text
    assert json.loads(text)["kind"] == "kaisa bench race"
