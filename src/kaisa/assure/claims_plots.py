"""Claims as pictures: how they grew with the demands, and what they depend on. SVG or PNG, by matplotlib."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from kaisa.assure.claims import Question
from kaisa.assure.claims_sensitivity import Curve
from kaisa.errors import ConfigurationError

INK, QUIET, GRID = "#1c2733", "#66758a", "#e4e8ee"
GOOD, BAD, LINE = "#12805c", "#b42318", "#2f5d9b"
AXES = {
    "confidence": "worst-case confidence",
    "reliability": "worst-case reliability",
    "expected_pfd": "greatest expected pfd",
}
STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "lines.linewidth": 1.8,
    "svg.hashsalt": "kaisa",
    "svg.fonttype": "path",
    "figure.dpi": 110,
}


def draw_growth(question: Question, steps: Sequence[tuple[int, int, float]], target: float, file: Path | None) -> str:
    """Draw a claim over the demands as they came in, failures marked; as SVG, or as PNG into a file.

    Args:
        question: what the claim is about.
        steps: (demands, failures, value), as `growth` gives them.
        target: what it has to reach.
        file: a PNG file; None returns SVG.
    """
    with _figure((9.6, 3.0)) as (figure, axes):
        demands, values = [step[0] for step in steps], [step[2] for step in steps]
        axes.plot(demands, values, color=LINE, zorder=3)
        fallen = [(after[0], after[2]) for before, after in pairwise(steps) if after[1] > before[1]]
        if fallen:
            axes.scatter(*zip(*fallen, strict=True), s=16, color=BAD, zorder=4, label="a failure")
        _target_line(axes, target)
        axes.set_xlim(0, max(1, demands[-1]))
        _limits(axes, question, [*values, target])
        axes.set_xlabel("demands since the system was frozen")
        axes.set_ylabel(AXES[question.kind])
        axes.legend(loc="best", frameon=False, fontsize=8)
        return _finish(figure, file)


def draw_curves(question: Question, curves: Sequence[Curve], target: float, file: Path | None) -> str:
    """Draw a claim over each quantity that it depends on; as SVG, or as PNG into a file."""
    rows = (len(curves) + 2) // 3
    with _figure((9.6, 2.45 * rows), rows, min(3, len(curves))) as (figure, grid):
        flat = list(grid.flat) if hasattr(grid, "flat") else [grid]
        for axes, curve in zip(flat, curves, strict=False):
            _draw_curve(axes, curve)
            _target_line(axes, target)
            _limits(axes, question, [*curve.y, target])
        for axes in flat[len(curves) :]:
            axes.set_visible(False)
        flat[0].set_ylabel(AXES[question.kind])
        return _finish(figure, file)


def _draw_curve(axes: Any, curve: Curve) -> None:
    if curve.is_steps:
        axes.plot(curve.x, curve.y, color=LINE, marker="o", markersize=3.5)
        axes.xaxis.get_major_locator().set_params(integer=True)
    else:
        axes.plot(curve.x, curve.y, color=LINE)
    if curve.is_logarithmic:
        axes.set_xscale("log")
    axes.axvline(curve.now, color=QUIET, linewidth=1, linestyle=":")
    nearest = min(range(len(curve.x)), key=lambda index: abs(curve.x[index] - curve.now))
    axes.scatter([curve.now], [curve.y[nearest]], s=22, color=INK, zorder=4)
    axes.set_xlabel(curve.quantity, fontsize=8)


def _target_line(axes: Any, target: float) -> None:
    axes.axhline(target, color=GOOD, linewidth=1.2, linestyle="--", label=f"target {target:g}")


def _limits(axes: Any, question: Question, values: Sequence[float]) -> None:
    if question.kind == "expected_pfd":
        axes.set_ylim(0, 1.1 * max(values))
    else:
        axes.set_ylim(-0.02, 1.03)


@contextmanager
def _figure(size: tuple[float, float], rows: int = 1, columns: int = 1) -> Iterator[tuple[Any, Any]]:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            "plots need matplotlib, which is not installed; pip install 'kaisa[assure]'"
        ) from error
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        yield figure, figure.subplots(rows, columns)


def _finish(figure: Any, file: Path | None) -> str:
    if file is not None:
        figure.savefig(file, format="png")
        return ""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def separate_names(svg: str, prefix: str) -> str:
    """Return an SVG whose ids have a prefix, so that several can stand on one page."""
    named = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', svg)
    return re.sub(r'(xlink:href="#|href="#|url\(#)', rf"\1{prefix}-", named)
