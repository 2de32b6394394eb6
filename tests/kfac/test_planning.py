"""A user's own model is planned from its shapes, wherever it is and however large."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kaisa
from kaisa.errors import ConfigurationError
from kaisa.kfac.hardware import Hardware
from kaisa.kfac.planner import Choices, choose
from kaisa.kfac.survey import survey
from kaisa.kfac.workload import Settings


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 10))


def test_a_plan_is_chosen_for_what_the_survey_finds() -> None:
    made = kaisa.plan(model(), torch.zeros(32, 64), world_size=8, hardware="a100", solver="cholesky", name="mine")
    expected = choose(
        survey(model(), torch.zeros(32, 64), name="mine"), 8, Hardware.load("a100"), Settings(solver="cholesky")
    )
    assert made.to_json() == expected.to_json()
    assert (made.chosen.workload.name, made.chosen.settings.solver) == ("mine", "cholesky")


def test_a_plan_keeps_to_the_budget_and_to_the_choices() -> None:
    free = kaisa.plan(model(), torch.zeros(32, 64), world_size=4, hardware="a100", choices=Choices(workers=(4,)))
    assert free.chosen.placement.workers == 4
    smallest = min(
        row.peak for row in kaisa.plan(model(), torch.zeros(32, 64), world_size=4, hardware="a100").candidates
    )
    tight = kaisa.plan(model(), torch.zeros(32, 64), world_size=4, hardware="a100", memory_budget=f"{smallest} B")
    assert tight.chosen.peak == smallest


def test_a_plan_names_options_that_the_preconditioner_takes() -> None:
    made = kaisa.plan(model(), torch.zeros(32, 64), world_size=1, hardware="a100")
    options = dict(made.options)
    if "payload" in options:
        options["payload"] = kaisa.kfac.Payload(**options["payload"])
    kfac = kaisa.KFACPreconditioner(model(), lr=0.1, **options)
    assert kfac.placement.workers == 1


def test_a_model_larger_than_any_machine_is_planned() -> None:
    with torch.device("meta"):
        huge = nn.Sequential(*(nn.Linear(2**13, 2**13, bias=False) for _ in range(300)))
        made = kaisa.plan(huge, torch.zeros(1, 2**13), world_size=64, hardware="h100")
    assert made.chosen.workload.parameters == 300 * 2**26


def test_settings_that_nobody_knows_are_refused_with_those_that_are_known() -> None:
    with pytest.raises(ConfigurationError, match=r"plan knows no setting inverse_steps; it knows .*inv_update_steps"):
        kaisa.plan(model(), torch.zeros(1, 64), world_size=2, hardware="a100", inverse_steps=3)
