"""A plan is told in tables and drawn so that it can be read; its call is the one that does what was chosen."""

from __future__ import annotations

import io
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kaisa.errors import ConfigurationError
from kaisa.kfac.payload import Payload
from kaisa.kfac.planner import Plan
from kaisa.kfac.preconditioner import KFACPreconditioner
from kaisa.recipes.plan import (
    allowed_choices,
    build_figure,
    build_plan,
    call_of,
    describe_plan,
    draw_trade_off,
    fraction_of,
)

WORLDS = {"one rank": 1, "eight ranks": 8, "twelve fractions": 60}


@pytest.fixture(scope="module")
def plans() -> dict[str, Plan]:
    return {name: build_plan("resnet20", world, "h100") for name, world in WORLDS.items()}


def told(made: Plan, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    describe_plan(made, console)
    output = console.file
    assert isinstance(output, io.StringIO)
    return output.getvalue()


@pytest.mark.parametrize("name", WORLDS)
def test_every_fraction_is_a_row_of_every_table(plans: dict[str, Plan], name: str) -> None:
    made = plans[name]
    first_words = [line.split()[0] for line in told(made).splitlines() if line.split()]
    for row in made.by_fraction():
        assert first_words.count(fraction_of(row)) == 3


def test_the_choice_its_reasons_and_its_call_are_told(plans: dict[str, Plan]) -> None:
    text = told(plans["eight ranks"])
    (line,) = [line for line in text.splitlines() if line.rstrip().endswith("chosen")]
    assert line.split()[0] == fraction_of(plans["eight ranks"].chosen)
    unwrapped = " ".join(text.split())
    assert all(" ".join(reason.split()) in unwrapped for reason in plans["eight ranks"].reasons)
    assert text.rstrip().endswith(call_of(plans["eight ranks"]))


def test_what_does_not_fit_is_marked() -> None:
    free = build_plan("resnet20", 8, "h100")
    smallest = {
        workers: min(row.peak for row in free.candidates if row.placement.workers == workers)
        for workers in (1, 2, 4, 8)
    }
    limit = (min(smallest.values()) + max(smallest.values())) // 2
    made = build_plan("resnet20", 8, "h100", memory_budget=str(limit))
    marked = {line.split()[0] for line in told(made).splitlines() if line.rstrip().endswith("does not fit")}
    assert marked == {fraction_of(row) for row in made.by_fraction() if row.peak > limit}
    assert marked
    assert made.chosen.peak <= limit


def test_the_call_gives_the_options_that_were_chosen(plans: dict[str, Plan]) -> None:
    made = plans["eight ranks"]
    given: dict[str, Any] = {}
    call = call_of(made)
    eval(
        call,
        {
            "KFACPreconditioner": lambda model, optimizer, **options: given.update(options),
            "Payload": Payload,
            "model": None,
            "optimizer": None,
        },
    )
    wanted = dict(made.options)
    assert given.pop("payload", Payload()) == Payload(**wanted.pop("payload", {}))
    usual = KFACPreconditioner.__init__.__kwdefaults__
    assert {**usual, **given} == {**usual, **wanted}


@pytest.mark.parametrize("name", WORLDS)
def test_labels_of_the_picture_do_not_cover_each_other(plans: dict[str, Plan], name: str) -> None:
    made = plans[name]
    figure = build_figure(made)
    figure.draw_without_rendering()
    renderer = figure._get_renderer()
    trade = figure.axes[0]
    labels = [text for text in trade.texts if text.get_text()]
    assert sorted(text.get_text() for text in labels) == sorted(fraction_of(row) for row in made.by_fraction())
    boxes = [super(type(text), text).get_window_extent(renderer) for text in labels]
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))


def test_the_picture_says_what_its_axes_are(plans: dict[str, Plan], tmp_path: Path) -> None:
    figure = build_figure(plans["eight ranks"])
    trade, memory, time = figure.axes
    assert trade.get_xlabel().startswith("peak memory of K-FAC on the fullest rank (")
    assert trade.get_ylabel().startswith("mean step (")
    assert memory.get_ylabel() in ("MiB", "GiB")
    assert time.get_ylabel() in ("ms", "s")
    assert [label.get_text() for label in time.get_xticklabels()] == ["1/8", "1/4", "1/2", "1"]
    path = draw_trade_off(plans["eight ranks"], tmp_path / "plan.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in tmp_path.iterdir()] == ["plan.png"]


def test_bars_stand_for_the_parts_of_a_step(plans: dict[str, Plan]) -> None:
    made = plans["eight ranks"]
    time = build_figure(made).axes[2]
    scale = {"ms": 1e3, "s": 1.0}[time.get_ylabel()]
    rows = sorted(made.by_fraction(), key=lambda row: row.placement.workers)
    for index, row in enumerate(rows):
        height = sum(bars[index].get_height() for bars in time.containers)
        limit = time.get_ylim()[1] / 1.22
        expected = (row.average_step - row.seconds["model"]) * scale
        assert height == pytest.approx(min(expected, limit), rel=1e-6)


def test_only_what_is_allowed_is_chosen() -> None:
    nothing = allowed_choices([], {})
    assert (nothing.solvers, nothing.statistics, nothing.gradients, nothing.intervals) == (None, None, None, None)
    everything = allowed_choices(["solver", "precision", "intervals"], {"inv_update_steps": 50})
    assert everything.solvers == ("eigen", "warm_eigen", "cholesky")
    assert everything.statistics == (None, "bfloat16", "float16", "int8")
    assert everything.intervals == ((10, 50), (20, 100), (50, 250))


BAD = {
    "an unknown model": ({"model": "vgg"}, "unknown model 'vgg'; choose from"),
    "no rank": ({"world_size": 0}, "world-size is 0; give a whole number of at least 1"),
    "no example": ({"batch": 0}, "batch is 0; give a whole number of at least 1"),
    "an unknown machine": ({"hardware": "abacus"}, "no hardware profile 'abacus'; give one of a100, "),
    "a budget that is none": ({"memory_budget": "much"}, "much"),
    "an unknown permission": ({"allow": ["all"]}, "--allow takes solver, precision, intervals; found all"),
    "an unknown solver": ({"solver": "guess"}, "the planner knows no solver 'guess'"),
    "a budget that nothing fits": ({"memory_budget": "1KiB"}, "no placement of cnn fits into 1 KiB a rank"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        build_plan(**{"model": "cnn", "world_size": 4, "hardware": "h100", **options})
