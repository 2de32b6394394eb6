"""How the race stands: medians over the finals of each contestant, as table and plots.

A final that misses the target takes infinitely long; one of the control, which has set it, as long as it ran. Times are
of training alone: processor seconds of the process, and seconds of the clock on the wall.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from kaisa.recipes.extras import load_extra
from kaisa.recipes.files import written_whole
from kaisa.recipes.race.entrants import ENTRANTS, Entrant
from kaisa.recipes.race.heat import Look
from kaisa.recipes.race.ledger import Result
from kaisa.recipes.race.stages import Race

TO_REACH = -0.363
"""The paper's best figure, time of K-FAC over time of the first-order optimizer less one, and here the floor."""
COLUMNS = (
    *("contestant", "rate", "steps of schedule", "steps to target", "CPU s", "wall s", "CPU, to control"),
    *("wall, to control", "CPU, twice in a row", "reached", "at the end", "CPU ms a step"),
)
TABLE, CURVES, TIMES = "table.md", "curves.png", "times.png"


@dataclass(frozen=True)
class Standing:
    """What a contestant achieved, medians over its finals.

    Attributes:
        name: of the contestant.
        is_control: whether it is the control with its whole schedule.
        rate: the highest learning rate.
        steps: of its schedule.
        heats: its finals.
        reached: how many of them reached the target.
        first: median steps, seconds and processor seconds to the target; its value is that at the end.
        step_seconds: processor seconds of a step.
    """

    name: str
    is_control: bool
    rate: float
    steps: int
    heats: tuple[Result, ...]
    reached: int
    first: Look
    step_seconds: float


def stand(race: Race, in_a_row: int = 1) -> list[Standing]:
    """Return the standings of all whose finals have been run, the control first and the others by time.

    Args:
        race: what was raced.
        in_a_row: how many looks must show the target; the first of them counts.
    """
    target = race.target()
    if target is None:
        return []
    found = [
        _standing(race, target, entrant, rate, steps, in_a_row, is_control=turn == 0)
        for turn, (entrant, rate, steps) in enumerate(race.tuned())
        if race.final(entrant, rate, steps)
    ]
    return found[:1] + sorted(found[1:], key=lambda one: (one.first.cpu_seconds, -one.reached))


def _standing(
    race: Race, target: float, entrant: Entrant, rate: float, steps: int, in_a_row: int, *, is_control: bool
) -> Standing:
    heats = race.final(entrant, rate, steps)
    firsts = [race.first(heat, target, in_a_row) for heat in heats]
    reached = sum(math.isfinite(look.seconds) for look in firsts)
    if is_control:
        firsts = [
            first if math.isfinite(first.seconds) else heat.looks[-1] for first, heat in zip(firsts, heats, strict=True)
        ]
    name = f"{entrant.name}, K-FAC's schedule" if entrant == race.control and not is_control else entrant.name
    ends = [heat.value for heat in heats]
    return Standing(
        name=name,
        is_control=is_control,
        rate=rate,
        steps=steps,
        heats=tuple(heats),
        reached=reached,
        first=Look(
            int(_median(look.step for look in firsts)),
            _median(look.seconds for look in firsts),
            _median(look.cpu_seconds for look in firsts),
            math.nan if any(map(math.isnan, ends)) else _median(ends),
        ),
        step_seconds=_median(heat.looks[-1].cpu_seconds / heat.looks[-1].step for heat in heats if heat.looks),
    )


def _median(values: Iterable[float]) -> float:
    return median(list(values))


def saved(standing: Standing, control: Standing, clock: Callable[[Look], float]) -> float:
    """Return the time to the target over the control's, less one; infinite where the target is missed."""
    return clock(standing.first) / clock(control.first) - 1


def by_cpu(look: Look) -> float:
    """Return processor seconds."""
    return look.cpu_seconds


def by_wall(look: Look) -> float:
    """Return seconds on the wall."""
    return look.seconds


# ---------------------------------------------------------------------------------------------------------- the table


def write_table(races: Sequence[Race]) -> str:
    """Return the standings of some races as Markdown."""
    return "\n".join(part for race in races for part in _table(race))


def _table(race: Race) -> Iterable[str]:
    standings, target = stand(race), race.target()
    if not standings or target is None:
        return
    course = race.course
    aim = f"{race.score.name} {race.score.write(target)}, set by {course.control} in {course.steps} steps"
    yield f"### {course.recipe}: {aim}\n"
    yield f"| {' | '.join(COLUMNS)} |"
    yield "|---|" + "---:|" * (len(COLUMNS) - 1)
    twice = {one.name: one for one in stand(race, in_a_row=2)}
    for one in standings:
        steady = _percent(saved(twice[one.name], twice[standings[0].name], by_cpu))
        yield _row(race, one, standings[0], steady)
    yield ""


def _row(race: Race, one: Standing, control: Standing, steady: str) -> str:
    first = one.first
    is_there = math.isfinite(first.seconds)
    cells = [
        f"**{one.name}** (control)" if one.is_control else one.name,
        f"{one.rate:.2g}",
        str(one.steps),
        str(first.step) if is_there else "–",
        f"{first.cpu_seconds:.2f}" if is_there else "–",
        f"{first.seconds:.2f}" if is_there else "–",
        *(_percent(saved(one, control, clock)) for clock in (by_cpu, by_wall)),
        steady,
        f"{one.reached} of {len(one.heats)}",
        "diverged" if math.isnan(first.value) else race.score.write(first.value),
        f"{1000 * one.step_seconds:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def _percent(share: float) -> str:
    return f"{100 * share:+.1f} %".replace("-", "−") if math.isfinite(share) else "missed"


# ----------------------------------------------------------------------------------------------------------- the plots


def draw(races: Sequence[Race], folder: Path) -> list[Path]:
    """Write table and plots; return their files."""
    folder.mkdir(parents=True, exist_ok=True)
    with written_whole(folder / TABLE) as partial:
        partial.write_text(write_table(races), encoding="utf-8")
    raced = [race for race in races if stand(race)]
    if not raced:
        return [folder / TABLE]
    return [folder / TABLE, _draw(raced, folder / CURVES, _draw_curves), _draw(raced, folder / TIMES, _draw_times)]


def _draw(races: Sequence[Race], path: Path, panel: Callable[[Any, Race], None]) -> Path:
    pyplot: Any = load_extra("matplotlib.figure", "the plot")
    figure = pyplot.Figure(figsize=(12, 4.6 * -(-len(races) // 2)), layout="constrained")
    grid = figure.subplots(-(-len(races) // 2), 2, squeeze=False).flatten()
    for axes, race in zip(grid, races, strict=False):
        panel(axes, race)
    for axes in grid[len(races) :]:
        axes.set_axis_off()
    with written_whole(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
    return path


def _draw_curves(axes: Any, race: Race) -> None:
    """Draw the median value of the control, of the best of ours, and of the best others, over processor seconds."""
    standings = stand(race)
    for turn, one in enumerate(_shown(standings)):
        whole = [heat for heat in one.heats if heat.is_whole]
        if whole:
            seconds = [_median(look.cpu_seconds for look in looks) for looks in _together(whole)]
            values = [_median(look.value for look in looks) for looks in _together(whole)]
            label = f"{one.name} (control)" if one.is_control else one.name
            axes.plot(seconds, values, label=label, color="black" if one.is_control else f"C{turn}", linewidth=1.4)
    target = race.target()
    axes.axhline(target, color="grey", linestyle=":", linewidth=1)
    ends = [look.value for one in standings for heat in one.heats for look in heat.looks[len(heat.looks) // 3 :]]
    finite = sorted(value for value in ends if math.isfinite(value))
    axes.set_ylim(finite[len(finite) // 50], finite[-1 - len(finite) // 50])
    axes.set_title(race.course.recipe)
    axes.set_xlabel("processor seconds of training")
    axes.set_ylabel(race.score.name)
    axes.legend(fontsize=7)


def _together(heats: Sequence[Result]) -> list[tuple[Look, ...]]:
    return list(zip(*(heat.looks for heat in heats), strict=True))


def _shown(standings: Sequence[Standing]) -> list[Standing]:
    """Return the control, its other schedule, and of the others the first eight."""
    control, *others = standings
    twin = [one for one in others if one.name.startswith(f"{control.name},")]
    return [control, *twin, *[one for one in others if one not in twin][:7]]


def _is_ours(name: str) -> bool:
    entrant = ENTRANTS.get(name)
    return entrant is not None and (entrant.kfac == "ours" or entrant.optimizer in ("adahessian", "arsg"))


def _draw_times(axes: Any, race: Race) -> None:
    """Draw the processor time to the target over the control's, of everybody; who misses it has a cross."""
    control, *_ = standings = stand(race)
    ordered = [*standings[1:], control][::-1]
    shares = [saved(one, control, by_cpu) + 1 for one in ordered]
    colours = ["black" if one.is_control else "C0" if _is_ours(one.name) else "C7" for one in ordered]
    axes.barh(range(len(ordered)), [share if math.isfinite(share) else 0 for share in shares], color=colours)
    for place, share in enumerate(shares):
        if not math.isfinite(share):
            axes.text(0.02, place, "missed", va="center", fontsize=7)
    axes.set_yticks(range(len(ordered)), [one.name for one in ordered], fontsize=7)
    axes.axvline(1 + TO_REACH, color="grey", linestyle=":", linewidth=1)
    axes.set_title(race.course.recipe)
    axes.set_xlabel("processor time to target, control = 1 (dotted: 36.3 % less)")
