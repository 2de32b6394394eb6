"""Deferral: statistics that wait on their rank until decompositions are due, and then travel once for all steps.

The running average is linear in what it averages: with decay β

    F_t = β F_(t-1) + (1 - β) S_t / N    gives    F_t = (1 - share) F_(t-m) + share · Σ_j β^j S_(t-j) / Σ_j β^j N

with share = (1 - β) Σ_j β^j over the m steps since the last exchange. So a rank may keep its own decayed sums, and the
owners get the same average from one exchange as from m of them. The price is memory: a rank holds sums of all layers.

Exact where every step has as many examples and ranks use the same layers; otherwise every example counts by its age
alone, and sums of one rank that are not finite are left out, as if that step had not been, while those of the others
count.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from kaisa.kfac.factors import Statistics


class Deferral:
    """The decayed sums of one rank, by layer."""

    def __init__(self) -> None:
        self._sums: dict[str, Statistics] = {}
        self._decays: dict[str, float] = {}

    def add(self, new: Mapping[str, Statistics], decay: float) -> None:
        """Takes one step's sums in.

        Args:
            new: the sums of this step, which are kept and changed.
            decay: β of the running average at this step.
        """
        for name, sums in new.items():
            weight = _left_out_unless_finite_(sums)
            if name in self._sums:
                # The weight of a step is (1 - β) of that step; sums are kept in units of the newest one's.
                unit = (1 - self._decays[name]) / (1 - decay)
                self._sums[name].fade_(unit * (1 - weight * (1 - decay)))
                self._sums[name].add_(sums)
                self._sums[name].steps += sums.steps
            else:
                self._sums[name] = sums
            self._decays[name] = decay

    def take(self, new: Mapping[str, Statistics], decay: float, names: Iterable[str]) -> dict[str, Statistics]:
        """Takes one step's sums in and hands over those of some layers."""
        self.add(new, decay)
        return {name: self._sums.pop(name) for name in names if name in self._sums}

    def nbytes(self) -> int:
        """Returns the bytes held."""
        return sum(sums.a.nbytes + sums.g.nbytes for sums in self._sums.values())

    def state(self) -> dict[str, dict[str, Any]]:
        """Returns copies of everything."""
        return {
            name: {
                "a": sums.a.clone(),
                "g": sums.g.clone(),
                "counts": torch.stack([torch.as_tensor(n) for n in (sums.positions, sums.examples, sums.steps)]),
                "area": sums.area,
                "scale": sums.scale,
                "decay": self._decays[name],
            }
            for name, sums in self._sums.items()
        }

    def restore(self, state: Mapping[str, Mapping[str, Any]], devices: Mapping[str, torch.device]) -> None:
        """Replaces everything with copies of a ``state()``, moved to the device of their layer."""
        self._sums, self._decays = {}, {}
        for name, entry in state.items():
            a, g, counts = (entry[key].detach().clone().to(devices[name]) for key in ("a", "g", "counts"))
            self._sums[name] = Statistics(a, g, counts[0], counts[1], entry["area"], entry["scale"], counts[2])
            self._decays[name] = entry["decay"]


def _left_out_unless_finite_(sums: Statistics) -> Tensor:
    """Makes sums that are not finite zeros that stand for no step, and returns 1 or 0; the host does not look."""
    finite = torch.isfinite(sums.a.sum() + sums.g.sum())
    sums.a, sums.g = (torch.where(finite, side, torch.zeros_like(side)) for side in (sums.a, sums.g))
    weight = finite.double()
    sums.positions, sums.examples, sums.steps = (weight * n for n in (sums.positions, sums.examples, sums.steps))
    return weight
