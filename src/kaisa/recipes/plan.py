"""What a plan says: tables by fraction for the terminal, and a picture of what memory buys in time.

memory      of the rank that holds most, at rest by kind, and at its fullest
traffic     of the rank that sends most, when each kind of step comes
time        of each phase when it comes, and of the mean of all steps
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from inspect import signature
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kaisa.errors import ConfigurationError
from kaisa.kfac.account import Sent
from kaisa.kfac.explanation import in_bytes, in_seconds
from kaisa.kfac.payload import Payload
from kaisa.kfac.planner import Choices, Plan
from kaisa.kfac.planning import plan
from kaisa.kfac.preconditioner import KFACPreconditioner
from kaisa.kfac.prediction import Prediction
from kaisa.kfac.workload import FORMS, SOLVERS
from kaisa.recipes.extras import load_extra
from kaisa.recipes.files import written_whole
from kaisa.recipes.zoo import planned_model

MEMORY = ("factors", "decompositions", "moments", "statistics")
PHASES = ("model", "statistics", "factors", "inverses", "precondition")
EXACT_SOLVERS = ("eigen", "warm_eigen", "cholesky")
ALLOWED = ("solver", "precision", "intervals")
"""What the planner may choose beyond the placement, if it is allowed to."""


def build_plan(
    model: str,
    world_size: int,
    hardware: str,
    *,
    memory_budget: str | None = None,
    batch: int | None = None,
    allow: Sequence[str] = (),
    **settings: Any,
) -> Plan:
    """Return the plan of a model of the zoo.

    Raises:
        ConfigurationError: there is no such model, machine or setting, or nothing fits.
    """
    for number, what in ((world_size, "world-size"), (batch, "batch")):
        if number is not None and number < 1:
            raise ConfigurationError(f"{what} is {number}; give a whole number of at least 1")
    built, inputs = planned_model(model).on_meta(batch)
    return plan(
        built,
        inputs,
        world_size=world_size,
        hardware=hardware,
        memory_budget=memory_budget,
        choices=allowed_choices(allow, settings),
        name=model,
        **settings,
    )


def allowed_choices(allow: Sequence[str], settings: Mapping[str, Any]) -> Choices:
    """Return what the planner may choose from.

    Raises:
        ConfigurationError: something is allowed that is never chosen.
    """
    unknown = sorted(set(allow) - set(ALLOWED))
    if unknown:
        raise ConfigurationError(f"--allow takes {', '.join(ALLOWED)}; found {', '.join(unknown)}")
    factor, inverse = settings.get("factor_update_steps", 10), settings.get("inv_update_steps", 100)
    forms = tuple(form for form in FORMS if form != "float32")
    return Choices(
        solvers=tuple(name for name in SOLVERS if name in EXACT_SOLVERS) if "solver" in allow else None,
        statistics=forms if "precision" in allow else None,
        gradients=forms if "precision" in allow else None,
        intervals=tuple((factor * n, inverse * n) for n in (1, 2, 5)) if "intervals" in allow else None,
    )


# ---------------------------------------------------------------------------------------------------------- the tables


def describe_plan(made: Plan, console: Console) -> None:
    """Print what was chosen, from what, and why."""
    chosen, rows = made.chosen, made.by_fraction()
    console.print(_title(made), style="bold")
    for table in (_memory_table(made, rows), _traffic_table(chosen, rows), _time_table(chosen, rows)):
        console.print()
        console.print(table)
    console.print()
    for reason in made.reasons:
        console.print(f"- {reason}", highlight=False)
    console.print()
    console.print(call_of(made), highlight=False, markup=False, soft_wrap=True)


def call_of(made: Plan) -> str:
    """Return the Python call that does what was chosen; what is so anyway is left out."""
    options = {name: repr(value) for name, value in _unusual(KFACPreconditioner, made.options).items()}
    payload = _unusual(Payload, made.options.get("payload", {}))
    parts = [f"{name}=torch.{form}" if isinstance(form, str) else f"{name}={form!r}" for name, form in payload.items()]
    options["payload"] = f"Payload({', '.join(parts)})" if parts else ""
    return (
        f"KFACPreconditioner(model, optimizer{''.join(f', {name}={text}' for name, text in options.items() if text)})"
    )


def _unusual(called: Callable[..., object], arguments: Mapping[str, Any]) -> dict[str, Any]:
    usual = signature(called).parameters
    return {name: value for name, value in arguments.items() if name not in usual or value != usual[name].default}


def fraction_of(prediction: Prediction) -> str:
    """Return the share of ranks that work on a layer as people write it: 1/64, 1/2, 1."""
    placement = prediction.placement
    return str(Fraction(placement.workers, placement.world_size))


def _title(made: Plan) -> str:
    chosen = made.chosen
    ranks, workload = chosen.placement.world_size, chosen.workload
    budget = "no memory budget" if made.memory_budget is None else f"at most {in_bytes(made.memory_budget)} a rank"
    return (
        f"{workload.name}: {workload.parameters / 1e6:,.1f} million parameters, {len(workload.layers)} layers, "
        f"{workload.batch} examples a rank; {ranks} ranks of {chosen.hardware.name}, {budget}"
    )


def _table(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="italic", box=None, padding=(0, 2, 0, 0))
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _memory_table(made: Plan, rows: Sequence[Prediction]) -> Table:
    kinds = [kind for kind in MEMORY if any(row.fullest.get(kind) for row in rows)]
    table = _table("memory of the fullest rank", ["fraction", *kinds, "for a while", "peak", ""])
    for row in rows:
        held = row.fullest
        cells = [in_bytes(held.get(kind, 0)) for kind in kinds]
        while_busy = held["peak"] - sum(held.get(kind, 0) for kind in MEMORY)
        fits = made.memory_budget is None or row.peak <= made.memory_budget
        verdict = "chosen" if _is_choice(row, made.chosen) else "" if fits else "does not fit"
        _add(table, made.chosen, row, [*cells, in_bytes(while_busy), in_bytes(held["peak"]), verdict], fits=fits)
    return table


def _traffic_table(chosen: Prediction, rows: Sequence[Prediction]) -> Table:
    headings = ["fraction", "factor step", "inverse step", "every step", "messages every step"]
    table = _table("sent by the rank that sends most", headings)
    for row in rows:
        steps = (row.account.factor_step, row.account.inverse_step, row.account.every_step)
        sent = [in_bytes(_most(step, lambda part: part.bytes)) for step in steps]
        _add(table, chosen, row, [*sent, f"{_most(row.account.every_step, lambda part: part.calls):,}"])
    return table


def _time_table(chosen: Prediction, rows: Sequence[Prediction]) -> Table:
    table = _table("time of each phase when it comes", ["fraction", *PHASES, "mean step", "K-FAC adds"])
    for row in rows:
        phases = [in_seconds(row.seconds.get(phase, 0.0)) for phase in PHASES]
        model = row.seconds["model"]
        added = f"{100 * (row.average_step / model - 1):.0f} %" if model else ""
        _add(table, chosen, row, [*phases, in_seconds(row.average_step), added])
    return table


def _add(table: Table, chosen: Prediction, row: Prediction, cells: Sequence[str], *, fits: bool = True) -> None:
    style = "bold green" if _is_choice(row, chosen) else None if fits else "dim"
    table.add_row(fraction_of(row), *cells, style=style)


def _is_choice(row: Prediction, chosen: Prediction) -> bool:
    return row.placement.workers == chosen.placement.workers


def _most(step: Sequence[Mapping[str, Sent]], figure: Callable[[Sent], int]) -> int:
    return max(sum(figure(part) for part in kinds.values()) for kinds in step)


# ---------------------------------------------------------------------------------------------------------- the picture

MEMORY_COLOURS = {
    "factors": "#31506b",
    "decompositions": "#5f8fb4",
    "moments": "#7fa88b",
    "statistics": "#d9a441",
    "for a while": "#d9d9d9",
}
PHASE_COLOURS = {
    "statistics": "#d9a441",
    "factors": "#31506b",
    "inverses": "#5f8fb4",
    "precondition": "#a9cbe0",
}
CHOSEN, OTHER, LIMIT = "#d1495b", "#31506b", "#b03a48"
_WIDE = 5
"""How many times the smallest value the largest may be on a linear axis."""


def draw_trade_off(made: Plan, path: Path) -> Path:
    """Draw memory against time, and what both consist of by fraction, into a PNG file; return its path."""
    load_extra("matplotlib", "the plot").use("agg")
    figure = build_figure(made)
    with written_whole(path) as partial:
        figure.savefig(partial, format="png")
    return path


def build_figure(made: Plan) -> Any:
    """Return the picture as a figure of matplotlib."""
    figure = load_extra("matplotlib.figure", "the plot").Figure(figsize=(11, 5.6), dpi=130, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    areas = figure.subplot_mosaic([["trade", "memory"], ["trade", "time"]], width_ratios=[1.25, 1])
    rows = sorted(made.by_fraction(), key=lambda row: row.placement.workers)
    _draw_curve(areas["trade"], made, rows)
    _draw_memory(areas["memory"], made, rows)
    _draw_time(areas["time"], made, rows)
    for panel in areas.values():
        panel.spines[["top", "right"]].set_visible(False)
    chosen = made.chosen
    figure.suptitle(
        f"{chosen.workload.name} on {chosen.placement.world_size} ranks of {chosen.hardware.name}", fontsize=12
    )
    figure.draw_without_rendering()  # settles where everything is, and there it stays
    figure.set_layout_engine("none")
    _label_points(figure, areas["trade"], made, rows)
    return figure


def _label_points(figure: Any, panel: Any, made: Plan, rows: Sequence[Prediction]) -> None:
    """Write each fraction beside its point, where nothing else is written; points may be close to each other."""
    halo = load_extra("matplotlib.patheffects", "the plot")
    unit, second = _unit(max(row.peak for row in rows))[0], _time_unit(max(row.average_step for row in rows))[0]
    points = [panel.transData.transform((row.peak / unit, row.average_step / second)) for row in rows]
    pixels = figure.dpi / 72
    taken = [(x, y, 5 * pixels, 5 * pixels) for x, y in points]
    # The chosen one first: its place is never taken.
    order = sorted(range(len(rows)), key=lambda index: not _is_choice(rows[index], made.chosen))
    for index in order:
        is_choice = _is_choice(rows[index], made.chosen)
        text, gap = fraction_of(rows[index]), 13 if is_choice else 8
        half_width, half_height = 3.1 * len(text) * pixels, 5.5 * pixels
        places = [
            (
                points[index][0] + side * (away * gap * pixels + half_width),
                points[index][1] + shift * 1.15 * half_height,
            )
            for away in (1, 3, 6)
            for shift in sorted(range(-8, 9), key=abs)
            for side in (1, -1)
        ]
        free = [place for place in places if not any(_overlap((*place, half_width, half_height), box) for box in taken)]
        x, y = (free or places)[0]
        taken.append((x, y, half_width, half_height))
        panel.annotate(
            text,
            points[index],
            xytext=(x, y),
            xycoords="figure pixels",
            textcoords="figure pixels",
            ha="center",
            va="center",
            fontsize=9,
            color=CHOSEN if is_choice else OTHER,
            weight="bold" if is_choice else "normal",
            arrowprops={"arrowstyle": "-", "color": "#c4ccd4", "linewidth": 0.8, "shrinkA": 0, "shrinkB": 3},
            path_effects=[halo.withStroke(linewidth=2.5, foreground="white")],
            zorder=4,
        )


Box = tuple[float, float, float, float]
"""Centre, half width, half height, in pixels."""


def _overlap(one: Box, other: Box) -> bool:
    return abs(one[0] - other[0]) < one[2] + other[2] and abs(one[1] - other[1]) < one[3] + other[3]


def _unit(size: float) -> tuple[float, str]:
    return (2.0**30, "GiB") if size >= 2**30 else (2.0**20, "MiB")


def _time_unit(seconds: float) -> tuple[float, str]:
    return (1.0, "s") if seconds >= 1 else (1e-3, "ms")


def _draw_curve(panel: Any, made: Plan, rows: Sequence[Prediction]) -> None:
    unit, unit_name = _unit(max(row.peak for row in rows))
    second, second_name = _time_unit(max(row.average_step for row in rows))
    others = [row for row in made.candidates if row.peak / unit < 4 * rows[-1].peak / unit]
    panel.scatter(
        [row.peak / unit for row in others],
        [row.average_step / second for row in others],
        s=9,
        color="#c4ccd4",
        zorder=1,
        label="other options at some fraction",
    )
    xs, ys = [row.peak / unit for row in rows], [row.average_step / second for row in rows]
    panel.plot(xs, ys, color=OTHER, linewidth=1.6, marker="o", markersize=6, zorder=2, label="best of each fraction")
    best = made.chosen
    panel.scatter(
        [best.peak / unit],
        [best.average_step / second],
        s=190,
        facecolors="none",
        edgecolors=CHOSEN,
        linewidths=2.2,
        zorder=3,
        label="chosen",
    )
    model = best.seconds["model"] / second
    panel.axhline(model, color="#888888", linewidth=1, linestyle=(0, (4, 3)), zorder=0, label="without K-FAC")
    panel.set_xlabel(f"peak memory of K-FAC on the fullest rank ({unit_name})")
    panel.set_ylabel(f"mean step ({second_name})")
    panel.set_title("what memory buys", loc="left", fontsize=11)
    for values, scale, limits in (
        (xs, panel.set_xscale, panel.set_xlim),
        ([*ys, model], panel.set_yscale, panel.set_ylim),
    ):
        if max(values) > _WIDE * min(values):
            scale("log")
        else:
            limits(0, 1.15 * max(values))
    _draw_limit(panel, made.memory_budget, unit, max(xs))
    panel.grid(alpha=0.25, linewidth=0.6)
    panel.legend(frameon=False, fontsize=9, loc="best")


def _draw_limit(panel: Any, budget: int | None, unit: float, most: float) -> None:
    """Shade what does not fit, where a budget is near enough to be seen."""
    if budget is None or budget / unit > 1.5 * most:
        return
    limit = budget / unit
    right = max(most * 1.12, limit * 1.05)
    panel.axvline(limit, color=LIMIT, linewidth=1.2, zorder=0)
    panel.axvspan(limit, right, color=LIMIT, alpha=0.07, linewidth=0, zorder=0, label="does not fit")
    panel.set_xlim(right=right)


def _draw_memory(panel: Any, made: Plan, rows: Sequence[Prediction]) -> None:
    unit, unit_name = _unit(max(row.peak for row in rows))
    parts = {kind: [row.fullest.get(kind, 0) / unit for row in rows] for kind in MEMORY}
    held = [sum(values) for values in zip(*parts.values(), strict=True)]
    parts["for a while"] = [row.fullest["peak"] / unit - total for row, total in zip(rows, held, strict=True)]
    _draw_bars(panel, made, rows, parts, MEMORY_COLOURS)
    panel.set_ylabel(unit_name)
    panel.set_title("memory of the fullest rank", loc="left", fontsize=11)


def _draw_time(panel: Any, made: Plan, rows: Sequence[Prediction]) -> None:
    shares = [_mean_shares(row) for row in rows]
    second, second_name = _time_unit(max(sum(share.values()) for share in shares))
    parts = {phase: [share[phase] / second for share in shares] for phase in PHASE_COLOURS}
    _draw_bars(panel, made, rows, parts, PHASE_COLOURS)
    panel.set_ylabel(second_name)
    panel.set_xlabel("fraction of ranks that work on each layer")
    panel.set_title("what K-FAC adds to the mean step", loc="left", fontsize=11)


def _mean_shares(row: Prediction) -> dict[str, float]:
    """Return what each phase adds to the mean of all steps."""
    every = {
        "statistics": row.settings.factor_update_steps,
        "factors": row.settings.factor_update_steps,
        "inverses": row.settings.inv_update_steps,
        "precondition": 1.0,
    }
    return {phase: row.seconds.get(phase, 0.0) / steps for phase, steps in every.items()}


def _draw_bars(
    panel: Any,
    made: Plan,
    rows: Sequence[Prediction],
    parts: Mapping[str, Sequence[float]],
    colours: Mapping[str, str],
) -> None:
    places = list(range(len(rows)))
    totals = [sum(values) for values in zip(*parts.values(), strict=True)]
    chosen = next(total for total, row in zip(totals, rows, strict=True) if _is_choice(row, made.chosen))
    top = min(max(totals), _WIDE * chosen)
    bottom = [0.0] * len(rows)
    for part, values in parts.items():
        if any(values):
            heights = [min(value, top - below) for value, below in zip(values, bottom, strict=True)]
            panel.bar(places, heights, bottom=bottom, color=colours[part], width=0.72, label=part)
            bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
    for place, total in zip(places, totals, strict=True):
        if total > 1.001 * top:  # a bar that is cut says how long it is
            panel.text(place, 0.97 * top, f"{total:.3g} →", ha="center", va="top", rotation=90, fontsize=8)
    crowded = len(rows) > 8
    panel.set_xticks(places, [fraction_of(row) for row in rows], rotation=45 if crowded else 0, fontsize=9)
    for row, label in zip(rows, panel.get_xticklabels(), strict=True):
        if _is_choice(row, made.chosen):
            label.set(color=CHOSEN, weight="bold")
    panel.set_ylim(top=1.22 * top)
    panel.legend(
        frameon=False,
        fontsize=8,
        ncols=5,
        loc="upper left",
        columnspacing=0.9,
        handlelength=1,
        handletextpad=0.5,
        borderaxespad=0.1,
    )
