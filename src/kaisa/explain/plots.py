"""Pictures of several explanations together."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from kaisa.explain.needs import load

COLOURS = (
    "#b3303f", "#2f6f9f", "#3c8d5a", "#c07f1e", "#7a4f9a", "#4b5563", "#c2578c", "#1f8a8a", "#8a6d3b", "#98a2ae",
)  # fmt: skip


def draw_curves(curves: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]]) -> bytes:
    """Return a PNG file with a panel for each kind of curve and a line for each method, the means over inputs.

    Args:
        curves: by kind, then by method: shares (points,) and scores (inputs, points).
    """
    figure = load("matplotlib.figure", "a drawing").Figure(figsize=(4.2 * len(curves), 3.1), layout="constrained")
    methods = list(dict.fromkeys(method for lines in curves.values() for method in lines))
    colours = {method: COLOURS[index % len(COLOURS)] for index, method in enumerate(methods)}
    for axis, (kind, lines) in zip(_axes(figure, len(curves)), curves.items(), strict=True):
        for method, (shares, scores) in lines.items():
            axis.plot(shares.numpy(), scores.mean(0).numpy(), color=colours[method], linewidth=1.5, label=method)
        axis.set(title=kind, xlabel="share of places", ylabel="probability", xlim=(0, 1), ylim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": ""})
    return buffer.getvalue()


def _axes(figure: Any, columns: int) -> Sequence[Any]:
    axes: Sequence[Any] = figure.subplots(1, columns, squeeze=False)[0]
    return axes
