"""Who does what and when statistics travel: as the user says, or as the planner chooses, and chooses again.

grad_worker_fraction     a number or a name ─► one placement;  "auto" ─► the fastest predicted one that fits
timings of the run       ─► a corrected profile of the machine ─► another choice, at a step that decomposes
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kaisa.errors import ConfigurationError
from kaisa.kfac.hardware import Hardware, Link, Table
from kaisa.kfac.payload import Payload
from kaisa.kfac.placement import LayerShape, LocalRule, Placement, gradient_workers, place
from kaisa.kfac.planner import Choices, choose
from kaisa.kfac.prediction import Prediction, predict
from kaisa.kfac.routes import is_worth_deferring
from kaisa.kfac.solvers import EKFAC, Cholesky, Eigen, Solver
from kaisa.kfac.workload import LayerWork, Settings, Workload

AUTO = "auto"
PARTS = ("decompose", "solve", "reduce", "share", "spread")
_WORTH_MOVING = 0.95  # of the predicted time of a step: below this another placement is worth the move


@dataclass(frozen=True)
class Arrangement:
    """A placement, whether statistics wait for decompositions, and what was predicted of it.

    Attributes:
        placement: who does what.
        is_deferred: whether statistics wait on their rank until decompositions are due.
        prediction: None where no profile of the machine is known, or the solver is none that the planner knows.
    """

    placement: Placement
    is_deferred: bool
    prediction: Prediction | None


@dataclass(frozen=True)
class Arranger:
    """Makes arrangements of the same layers on the same ranks.

    Attributes:
        shapes: of all layers.
        world_size: the number of ranks.
        fraction: the grad_worker_fraction, or "auto".
        colocate, local_below, ranks_per_node, deferred: as the user says; None and "auto" for the default.
        settings: how K-FAC works, for the planner; None where it knows no such solver.
        exchanges: how often statistics travel for each decomposition if they do not wait; infinite if unknown.
        may_wait: whether something needs statistics on every factor step.
        holds_all: whether every rank must hold every decomposition.
        parameters: numbers of the whole model.
        memory_budget: bytes a rank that K-FAC may take at its peak; None for no limit.
        hardware: a profile of the machine; None if nobody knows.
    """

    shapes: tuple[LayerShape, ...]
    world_size: int
    fraction: str | float
    colocate: bool
    local_below: int | str
    ranks_per_node: int
    deferred: bool | None
    settings: Settings | None
    exchanges: float
    may_wait: bool
    holds_all: bool
    parameters: int
    memory_budget: int | None
    hardware: Hardware | None

    def first(self) -> Arrangement:
        """Returns the arrangement to begin with.

        Raises:
            ConfigurationError: the fraction fits no number of workers; nothing fits the memory; nothing is known of
                the machine for "auto".
        """
        if self.fraction == AUTO:
            return self.planned(self._known_hardware())
        workers = gradient_workers(self.fraction, self.world_size, self.ranks_per_node)
        is_deferred = self.is_deferred(workers)
        rule = LocalRule(1.0 if is_deferred else self.exchanges, bytes_per_number=self._bytes)
        placement = place(
            self.shapes,
            self.world_size,
            workers,
            colocate=self.colocate,
            local_below=0 if isinstance(self.local_below, str) else self.local_below,
            local_rule=rule if self.local_below == AUTO else None,
            ranks_per_node=self.ranks_per_node,
        )
        return Arrangement(placement, is_deferred, self._predicted(placement, is_deferred))

    def is_deferred(self, workers: int) -> bool:
        """Says whether statistics wait under a placement with so many gradient workers."""
        is_worth_it = self.may_wait and is_worth_deferring(self.world_size, workers, self.shapes)
        return self.world_size > 1 and (is_worth_it if self.deferred is None else self.deferred)

    def planned(self, hardware: Hardware) -> Arrangement:
        """Returns the fastest predicted arrangement that fits.

        Raises:
            ConfigurationError: none does, or the planner does not know the solver.
        """
        if self.settings is None:
            raise ConfigurationError("the planner knows no times of this solver; give grad_worker_fraction as a number")
        may_wait = self.may_wait and all(shape.uses == 1 for shape in self.shapes)
        plan = choose(
            self._workload,
            self.world_size,
            self._here(hardware),
            self.settings,
            memory_budget=self.memory_budget,
            choices=Choices(
                workers=(self.world_size,) if self.holds_all else None,
                colocate=(True,) if self.colocate else (False, True),
                deferred=((False, True) if may_wait else (False,)) if self.deferred is None else (self.deferred,),
            ),
        )
        return Arrangement(plan.chosen.placement, plan.chosen.is_deferred, plan.chosen)

    @property
    def _workload(self) -> Workload:
        """The layers, without the positions of an example, which no placement changes."""
        return Workload("the model", tuple(LayerWork(shape, 1) for shape in self.shapes), parameters=self.parameters)

    @property
    def _bytes(self) -> int:
        return 4 if self.settings is None else self.settings.factor_bytes

    def _here(self, hardware: Hardware) -> Hardware:
        return replace(hardware, ranks_per_node=self.ranks_per_node)

    def _known_hardware(self) -> Hardware:
        if self.hardware is None:
            raise ConfigurationError(
                "grad_worker_fraction='auto' needs a profile of this machine: measure one with "
                "`kaisa plan --calibrate --output machine.json` and give hardware='machine.json'"
            )
        return self.hardware

    def _predicted(self, placement: Placement, is_deferred: bool) -> Prediction | None:
        if self.settings is None or self.hardware is None:
            return None
        settings = replace(self.settings, deferred=is_deferred)
        return predict(self._workload, placement, self._here(self.hardware), settings)


def profile_of(hardware: str | Path | Hardware | None, device: torch.device) -> Hardware | None:
    """Returns the profile that was asked for, or that of a known device; None for an unknown one."""
    if hardware is not None:
        return Hardware.load(hardware)
    if device.type != "cuda":
        return Hardware.load("cpu")
    name = torch.cuda.get_device_name(device).lower()
    known = (short for short in ("v100", "a100", "h100", "h200") if short in name)
    return next((Hardware.load(short) for short in known), None)


def name_of(solver: Solver) -> str | None:
    """Returns by which name the planner knows a solver; None for one of the user's own."""
    if type(solver) is EKFAC:
        return "sqrt_ekfac" if solver.root else "ekfac"
    if type(solver) is Eigen:
        return "eigen" if solver.warm_start is None else "warm_eigen"
    return "cholesky" if type(solver) is Cholesky else None


def settings_of(solver: Solver, payload: Payload, **others: Any) -> Settings | None:
    """Returns what the planner must know of how K-FAC works; None for a solver that it does not know.

    Args:
        solver: its own name for the planner.
        payload: the forms in which numbers travel.
        others: fields of ``Settings`` that are as they are called there.
    """
    name = name_of(solver)
    if name is None:
        return None
    return Settings(
        solver=name,
        statistics=payload.name_of("statistics"),
        gradients=payload.name_of("gradients"),
        bucket_bytes=payload.bucket_bytes,
        **others,
    )


# --------------------------------------------------------------------------------------------------- looking back


@dataclass(frozen=True)
class Measured:
    """Seconds of the parts of a step on all ranks: computing as on the slowest, waiting as where it was shortest."""

    seconds: Mapping[str, float]

    @classmethod
    def of_ranks(cls, rows: Sequence[Sequence[float]]) -> "Measured":
        """Returns what the rows of all ranks, each in the order of ``PARTS``, say together."""
        columns = dict(zip(PARTS, zip(*rows, strict=True), strict=True))
        return cls({part: max(seen) if part in PARTS[:2] else min(seen) for part, seen in columns.items()})


def ratios(prediction: Prediction, measured: Measured) -> dict[str, float]:
    """Returns how much longer than predicted decomposing, computing and exchanging took; 1 where nothing was seen."""
    told, seen = prediction.parts, measured.seconds
    exchanged = [part for part in ("reduce", "share", "spread") if told[part] > 0]
    pairs = {
        "decompose": (told["decompose"], seen["decompose"]),
        "compute": (told["solve"] + told["update"], seen["solve"]),
        "exchange": (sum(told[part] for part in exchanged), sum(seen[part] for part in exchanged)),
    }
    return {part: found / wanted if wanted > 0 and found > 0 else 1.0 for part, (wanted, found) in pairs.items()}


def is_off(found: Mapping[str, float], factor: float) -> bool:
    """Says whether anything took longer or shorter than predicted by more than a factor."""
    return any(max(ratio, 1 / ratio) > factor for ratio in found.values())


def corrected(hardware: Hardware, *, decompose: float, compute: float, exchange: float) -> Hardware:
    """Returns the profile of a machine that takes so many times as long."""

    def slower(link: Link) -> Link:
        shared = None if link.shared is None else link.shared / exchange
        return Link(link.latency * exchange, link.per_peer * exchange, link.bandwidth / exchange, shared)

    def scaled(tables: Mapping[str, Table], factor: float) -> dict[str, Table]:
        return {name: tuple((at, value * factor) for at, value in table) for name, table in tables.items()}

    return replace(
        hardware,
        products=scaled(hardware.products, 1 / compute),
        batched_products=scaled(hardware.batched_products, 1 / compute),
        memory_bandwidth=hardware.memory_bandwidth / compute,
        overheads={phase: compute * seconds for phase, seconds in hardware.overheads.items()},
        decompositions=scaled(hardware.decompositions, decompose),
        batched_decompositions=scaled(hardware.batched_decompositions, decompose),
        exchange_inside=slower(hardware.exchange_inside),
        exchange_between=slower(hardware.exchange_between),
        total_inside=slower(hardware.total_inside),
        total_between=slower(hardware.total_between),
    )


def choose_again(arranger: Arranger, current: Arrangement, found: Mapping[str, float]) -> Arrangement:
    """Returns the arrangement that is the fastest on the machine as it has shown itself, or the current one.

    Args:
        arranger: makes them.
        current: what the run works with.
        found: ``ratios`` of the current one.
    """
    assert current.prediction is not None
    hardware = corrected(current.prediction.hardware, **found)
    here = predict(
        current.prediction.workload,
        current.placement,
        hardware,
        replace(current.prediction.settings, deferred=current.is_deferred),
    )
    best = arranger.planned(hardware)
    assert best.prediction is not None
    if best.prediction.average_step < _WORTH_MOVING * here.average_step:
        return best
    return replace(current, prediction=here)
