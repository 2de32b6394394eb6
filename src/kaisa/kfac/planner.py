"""Chooses the fastest predicted placement that fits, and says why. Pure Python: no torch.

Every combination of what may be chosen is predicted; a prediction costs milliseconds, so that nothing is searched.
Equally fast placements are ordered by memory, then by what is usual, so that every rank chooses the same.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from kaisa.errors import ConfigurationError
from kaisa.kfac.explanation import description, in_bytes, reasons, table
from kaisa.kfac.hardware import Hardware
from kaisa.kfac.placement import Placement
from kaisa.kfac.prediction import Prediction, placed, predict
from kaisa.kfac.workload import Settings, Workload


@dataclass(frozen=True)
class Choices:
    """What the planner may choose from; what is None stays as the settings say.

    Attributes:
        workers: numbers of gradient workers of a layer; None for all divisors of the world.
        colocate, deferred: whether A and G stay on one rank, whether statistics travel late.
        solvers: by name.
        statistics, gradients: forms in which they travel; what is shorter than the settings' form loses digits.
        intervals: pairs (factor_update_steps, inv_update_steps).
    """

    workers: tuple[int, ...] | None = None
    colocate: tuple[bool, ...] | None = (False, True)
    deferred: tuple[bool, ...] | None = (False, True)
    solvers: tuple[str, ...] | None = None
    statistics: tuple[str | None, ...] | None = None
    gradients: tuple[str | None, ...] | None = None
    intervals: tuple[tuple[float, float], ...] | None = None


@dataclass(frozen=True)
class Plan:
    """A choice and what it was chosen from. Printable.

    Attributes:
        candidates: every prediction, the fastest first.
        chosen: the fastest that fits.
        memory_budget: bytes a rank, None for no limit.
    """

    candidates: tuple[Prediction, ...]
    chosen: Prediction
    memory_budget: int | None = None

    @property
    def options(self) -> Mapping[str, Any]:
        """The arguments of ``KFACPreconditioner`` that were chosen, by name, ``payload`` as those of ``Payload``."""
        settings, placement = self.chosen.settings, self.chosen.placement
        return {
            "grad_worker_fraction": placement.fraction,
            "colocate_factors": settings.colocate,
            "local_below": settings.local_below,
            "ranks_per_node": placement.ranks_per_node,
            "payload": {
                "statistics": settings.statistics,
                "gradients": settings.gradients,
                "bucket_bytes": settings.bucket_bytes,
                "deferred": self.chosen.is_deferred,
            },
            "solver": settings.solver,
            "factor_update_steps": settings.factor_update_steps,
            "inv_update_steps": settings.inv_update_steps,
        }

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why, in plain words."""
        return reasons(self.chosen, self.by_fraction(), self.memory_budget)

    def by_fraction(self) -> tuple[Prediction, ...]:
        """Returns the fastest prediction that fits of each number of gradient workers, or else the smallest."""
        every = sorted({prediction.placement.workers for prediction in self.candidates})
        return tuple(self._best(workers) for workers in every)

    def _best(self, workers: int) -> Prediction:
        own = [prediction for prediction in self.candidates if prediction.placement.workers == workers]
        return next((prediction for prediction in own if _fits(prediction, self.memory_budget)), min(own, key=_peak))

    def __str__(self) -> str:
        chosen = self.chosen
        title = f"{chosen.workload.name} on {chosen.placement.world_size} ranks of {chosen.hardware.name}"
        lines = table(self.by_fraction(), chosen, self.memory_budget)
        return "\n".join((title, "", lines, "", *self.reasons))

    def to_json(self) -> str:
        """Returns the plan as JSON: the choice, the reasons, and memory, traffic and time of every fraction."""
        chosen = self.chosen
        return json.dumps(
            {
                "workload": chosen.workload.name,
                "hardware": chosen.hardware.name,
                "world_size": chosen.placement.world_size,
                "memory_budget": self.memory_budget,
                "options": self.options,
                "reasons": self.reasons,
                "by_fraction": [_entry(prediction, self.memory_budget) for prediction in self.by_fraction()],
            },
            indent=2,
        )


def choose(
    workload: Workload,
    world_size: int,
    hardware: Hardware,
    settings: Settings | None = None,
    *,
    memory_budget: int | None = None,
    choices: Choices | None = None,
) -> Plan:
    """Returns the fastest predicted placement whose peak fits every rank.

    Args:
        workload: the model.
        world_size: the number of ranks.
        hardware: the machine.
        settings: what is not for the planner to choose.
        memory_budget: bytes a rank that K-FAC may take at its peak; None for no limit.
        choices: what it may choose from.

    Raises:
        ConfigurationError: nothing fits; says how much is missing and what would make it fit.
    """
    settings, choices = settings or Settings(), choices or Choices()
    found = [
        predict(workload, placement, hardware, each)
        for placement, each in _combinations(workload, world_size, hardware, settings, choices)
    ]
    candidates = tuple(sorted(found, key=lambda prediction: (prediction.average_step, prediction.peak)))
    fitting = [prediction for prediction in candidates if _fits(prediction, memory_budget)]
    if not fitting:
        assert memory_budget is not None
        raise ConfigurationError(_nothing_fits(min(candidates, key=_peak), memory_budget))
    return Plan(candidates, fitting[0], memory_budget)


def parse_bytes(text: str | int) -> int:
    """Returns the number of bytes that "2GiB", "500 MB" or 1024 says.

    Raises:
        ConfigurationError: it says none.
    """
    if isinstance(text, int) and not isinstance(text, bool) and text > 0:
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", str(text).lower())
    if match is None or float(match[1]) <= 0 or (match[3] and not match[2]):
        raise ConfigurationError(f"{text!r} is no amount of memory; give bytes, or a text such as '2GiB' or '500MB'")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** " kmgt".index(match[2] or " "))


def _combinations(
    workload: Workload, world_size: int, hardware: Hardware, settings: Settings, choices: Choices
) -> Iterator[tuple[Placement, Settings]]:
    """Yields every placement with every way of working, each once and the usual first."""
    divisors = tuple(count for count in range(1, world_size + 1) if world_size % count == 0)
    is_alone = world_size == 1
    is_tied = any(shape.uses > 1 for shape in workload.shapes)  # its pair is not linear in its sums: they cannot wait
    may_defer = not (is_alone or is_tied or settings.spread)
    for workers, colocate, deferred, solver, statistics, gradients, (factor_steps, inverse_steps) in product(
        _of(choices.workers, *divisors),
        _of(() if is_alone else choices.colocate, settings.colocate),
        _of(choices.deferred if may_defer else (), settings.deferred),
        _of(choices.solvers, settings.solver),
        _of(choices.statistics, settings.statistics),
        _of(choices.gradients, settings.gradients),
        _of(choices.intervals, (settings.factor_update_steps, settings.inv_update_steps)),
    ):
        each = replace(
            settings,
            colocate=colocate,
            deferred=deferred,
            solver=solver,
            statistics=statistics,
            gradients=gradients,
            factor_update_steps=factor_steps,
            inv_update_steps=inverse_steps,
        )
        yield placed(workload, world_size, workers, hardware, each), each


def _of(allowed: Iterable[Any] | None, *otherwise: Any) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(allowed or ())) or otherwise


def _fits(prediction: Prediction, memory_budget: int | None) -> bool:
    return memory_budget is None or prediction.peak <= memory_budget


def _peak(prediction: Prediction) -> int:
    return prediction.peak


def _nothing_fits(smallest: Prediction, memory_budget: int) -> str:
    missing = in_bytes(smallest.peak - memory_budget)
    helps = [text for text, other in _smaller(smallest) if other.peak <= memory_budget]
    helps.append(f"memory_budget='{-(-smallest.peak // 2**20)}MiB'")
    return (
        f"no placement of {smallest.workload.name} fits into {in_bytes(memory_budget)} a rank: the smallest "
        f"({description(smallest)}) needs {in_bytes(smallest.peak)} at its peak, {missing} too much; "
        f"this would fit: {', or '.join(helps)}"
    )


def _smaller(prediction: Prediction) -> Iterator[tuple[str, Prediction]]:
    """Yields what takes less memory, and what it would need."""
    workload, settings, hardware = prediction.workload, prediction.settings, prediction.hardware
    ways: Sequence[tuple[str, Mapping[str, Any]]] = (
        ("solver='cholesky'", {"solver": "cholesky"}),
        ("inv_dtype=torch.bfloat16", {"decomposition_bytes": 2}),
        ("factor_dtype and inv_dtype of 2 bytes", {"factor_bytes": 2, "decomposition_bytes": 2}),
    )
    for text, changes in ways:
        yield text, predict(workload, prediction.placement, hardware, replace(settings, **changes))
    for factor in (2, 4, 8, 16):
        world_size = factor * prediction.placement.world_size
        placement = placed(workload, world_size, 1, hardware, settings)
        other = predict(workload, placement, hardware, settings)
        yield f"{world_size} ranks (MEM-OPT, {in_bytes(other.peak)} each)", other


def _entry(prediction: Prediction, memory_budget: int | None) -> dict[str, Any]:
    steps = {
        "plain": prediction.plain_step,
        "factor": prediction.factor_step,
        "inverse": prediction.inverse_step,
        "average": prediction.average_step,
    }
    return {
        "grad_worker_fraction": prediction.placement.fraction,
        "workers": prediction.placement.workers,
        "colocate_factors": prediction.settings.colocate,
        "deferred": prediction.is_deferred,
        "fits": _fits(prediction, memory_budget),
        "memory": dict(prediction.fullest),
        "bytes_a_step": prediction.bytes_a_step,
        "operations": dict(prediction.operations),
        "seconds": dict(prediction.seconds),
        "parts": dict(prediction.parts),
        "steps": steps,
    }
