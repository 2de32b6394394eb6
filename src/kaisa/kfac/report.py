"""What was predicted beside what the run has shown. Pure Python: no torch."""

from collections.abc import Mapping
from dataclasses import dataclass

PHASES = ("statistics", "factors", "inverses", "precondition")


@dataclass(frozen=True)
class PlanReport:
    """Prediction and measurement side by side. Printable.

    Attributes:
        fraction: the grad_worker_fraction of the placement that is in use.
        is_deferred: whether statistics wait for the next decompositions.
        predicted: seconds of each phase when it runs, and bytes held ("memory"); empty where nothing was predicted.
        measured: the same, of this rank.
        changes: what was chosen anew during the run, and why.
    """

    fraction: float
    is_deferred: bool
    predicted: Mapping[str, float]
    measured: Mapping[str, float]
    changes: tuple[str, ...] = ()

    @property
    def ratios(self) -> dict[str, float]:
        """Measured over predicted, of what has both."""
        return {
            name: self.measured[name] / self.predicted[name]
            for name in (*PHASES, "memory")
            if self.predicted.get(name) and name in self.measured
        }

    def __str__(self) -> str:
        lines = [
            f"grad_worker_fraction {self.fraction:g}, statistics "
            + ("wait for decompositions" if self.is_deferred else "travel on factor steps"),
            f"{'':14}{'predicted':>12}{'measured':>12}{'ratio':>8}",
        ]
        ratios = self.ratios
        for name in (*PHASES, "memory"):
            cells = [_cell(name, column.get(name)) for column in (self.predicted, self.measured)]
            ratio = f"{ratios[name]:.2f}" if name in ratios else "–"
            lines.append(f"{name:14}{cells[0]:>12}{cells[1]:>12}{ratio:>8}")
        return "\n".join([*lines, *self.changes])


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value / 1e6:,.2f} MB" if name == "memory" else f"{1e3 * value:,.2f} ms"
