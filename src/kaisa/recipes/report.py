"""What a comparison means: a table for the terminal and a plot.

The plot shows the test score and training loss over epochs and over seconds; thin lines are single
seeds, bold lines the medians of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from kaisa.recipes.extras import load_extra
from kaisa.recipes.files import written_whole
from kaisa.recipes.loop import Epoch
from kaisa.recipes.record import Record, Run
from kaisa.recipes.target import Result, choose_target, summarize
from kaisa.recipes.tasks import Score

PLOT = "plot.png"
COLOURS = ("#5b7083", "#d1495b")  # slate for the control, red for K-FAC: told apart in grey too


def build_table(record: Record) -> Table:
    """Return a table with a column for each contestant and a row for each figure."""
    results = summarize(record)
    table = Table(title=_title(record), title_justify="left")
    table.add_column("")
    for result in results:
        table.add_column(result.contestant, justify="right")
    for label, cell in _rows(choose_target(record), results, record.options.score):
        table.add_row(label, *(cell(result) for result in results))
    return table


def _title(record: Record) -> str:
    seeds = len(record.options.seeds)
    return f"{record.options.title}" + (f", medians of {seeds} seeds" if seeds > 1 else "")


def _rows(target: float, results: Sequence[Result], score: Score) -> list[tuple[str, Callable[[Result], str]]]:
    aim, control = score.write(target), results[0].step_seconds
    rows: list[tuple[str, Callable[[Result], str]]] = [
        (f"epochs to {aim}", lambda result: _or_never(result.epochs, "{:g}")),
        (f"seconds to {aim}", lambda result: _or_never(result.seconds, "{:.2f}")),
        (f"final test {score.name}", lambda result: score.write(result.score)),
        ("final test loss", lambda result: f"{result.loss:.4f}"),
        ("milliseconds per step", lambda result: f"{1e3 * result.step_seconds:.2f}"),
        ("step time, relative", lambda result: f"{result.step_seconds / control:.2f}x"),
        ("peak memory", lambda result: _mebibytes(result.peak_memory)),
        ("learning rate", lambda result: f"{result.learning_rate:g}"),
    ]
    if score.is_loss:
        del rows[3]  # it would say the same again
    if results[0].runs > 1:
        rows.insert(2, (f"runs that reach {aim}", lambda r: f"{r.reached} of {r.runs}"))
    return rows


def _or_never(value: float, form: str) -> str:
    return form.format(value) if math.isfinite(value) else "not reached"


def _mebibytes(size: float | None) -> str:
    return "unknown" if size is None else f"{size / 2**20:.0f} MiB"


def conclude(record: Record) -> str:
    """Return the outcome of the race in a sentence."""
    results = summarize(record)
    if not results:
        return "no epoch is done yet"
    aim = record.options.score.write(choose_target(record))
    if len(results) < 2:
        return f"{results[0].contestant} ran alone; there is nothing to compare with"
    control, other = results
    if not math.isfinite(other.seconds):
        return f"{other.contestant} does not reach {aim} in {record.options.epochs} epochs"
    if not math.isfinite(control.seconds):
        return f"{other.contestant} reaches {aim}, {control.contestant} does not"
    return (
        f"{other.contestant} reaches {aim} in {other.epochs / control.epochs:.2f} times the epochs "
        f"and {other.seconds / control.seconds:.2f} times the seconds of {control.contestant}"
    )


def draw_plot(record: Record, folder: Path) -> Path:
    """Draw all runs into a PNG file in the folder; return its path."""
    load_extra("matplotlib", "the plot").use("agg")
    figure = load_extra("matplotlib.figure", "the plot").Figure(figsize=(9, 6.2), dpi=110, layout="constrained")
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    target = choose_target(record)
    for colour, name in zip(COLOURS, record.contestants, strict=False):
        _draw_contestant(axes, record.runs_of(name), colour, name)
    for panel in axes[0]:
        panel.axhline(target, color="#999999", linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    _decorate(axes, target, record.options.score)
    figure.suptitle(_title(record), fontsize=11)
    with written_whole(folder / PLOT) as partial:
        figure.savefig(partial, format="png")
    return folder / PLOT


def _draw_contestant(axes: Any, runs: Sequence[Run], colour: str, name: str) -> None:
    for column, x in enumerate((lambda epoch: epoch.number, lambda epoch: epoch.seconds)):
        for row, y in enumerate((lambda epoch: epoch.test_score, lambda epoch: epoch.train_loss)):
            panel = axes[row][column]
            if len(runs) > 1:
                for run in runs:
                    xs, ys = _curve([run.epochs], x, y)
                    panel.plot(xs, ys, color=colour, linewidth=0.8, alpha=0.35)
            xs, ys = _curve([run.epochs for run in runs], x, y)
            panel.plot(xs, ys, color=colour, linewidth=2, marker="o", markersize=3, label=name)


def _curve(
    histories: Sequence[Sequence[Epoch]],
    x: Callable[[Epoch], float],
    y: Callable[[Epoch], float],
) -> tuple[list[float], list[float]]:
    """Return the medians at each epoch that all histories have."""
    rows = list(zip(*histories, strict=False))
    return [median(map(x, row)) for row in rows], [median(map(y, row)) for row in rows]


def _decorate(axes: Any, target: float, score: Score) -> None:
    axes[0][0].set_ylabel(f"test {score.name}")
    axes[1][0].set_ylabel("training loss")
    axes[1][0].set_xlabel("epochs")
    axes[1][1].set_xlabel("seconds of training")
    if not score.is_cost:
        rest = max(1 - target, 0.01)  # of a target of 1 something is seen too
        axes[0][0].set_ylim(bottom=max(0.0, 1 - 5 * rest), top=1.0 if target > 0.9 else None)
    axes[1][0].set_yscale("log")
    corner = "upper right" if score.is_cost else "lower right"
    axes[0][0].legend(frameon=False, loc=corner, title=f"target {score.write(target)}")
    for panel in axes.flat:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25, linewidth=0.6)
