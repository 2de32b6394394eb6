"""The picture of a variance report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kaisa.errors import ConfigurationError

if TYPE_CHECKING:
    from kaisa.quantize.report import VarianceReport

SHOWN_BITS = 4


def draw(report: VarianceReport, path: str | Path) -> None:
    """Draw variance over bits, and over layers at 4 bits, or the nearest number that was looked at.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigurationError("a plot needs matplotlib; pip install 'kaisa[train]'") from error
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    over_bits, over_layers = figure.subplots(1, 2)
    shown = min(report.bits, key=lambda bits: abs(bits - SHOWN_BITS))
    for kind in report.kinds:
        over_bits.plot(report.bits, [report.added(kind, bits) for bits in report.bits], marker="o", label=kind)
        over_layers.plot([layer.added(kind, shown) for layer in report.layers], marker=".", label=kind)
    over_bits.axhline(report.sampling, color="black", linestyle="--", label="sampling")
    over_layers.plot([layer.sampling for layer in report.layers], color="black", linestyle="--", label="sampling")
    over_bits.set(xlabel="bits of the gradients", ylabel="variance of the gradient", yscale="log", title="all layers")
    over_layers.set(xlabel="layer", yscale="log", title=f"what each layer adds at {shown} bits")
    over_layers.set_xticks(range(len(report.layers)), [layer.name for layer in report.layers], rotation=90, fontsize=7)
    over_bits.legend()
    for axes in (over_bits, over_layers):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
