"""What a placement will hold, send, compute and take on a machine, before anything runs. Pure Python: no torch."""

from collections.abc import Mapping
from dataclasses import dataclass

from kaisa.kfac.account import Account, Sent, account
from kaisa.kfac.footprint import footprint, received_bytes
from kaisa.kfac.hardware import Hardware
from kaisa.kfac.phases import Phases
from kaisa.kfac.placement import LayerShape, LocalRule, Placement, place
from kaisa.kfac.routes import Routes, is_worth_deferring
from kaisa.kfac.shares import by_column, by_owner
from kaisa.kfac.workload import SOLVERS, Settings, Workload, statistics_operations


@dataclass(frozen=True)
class Prediction:
    """What one placement costs.

    Attributes:
        workload, placement, hardware, settings: what it was predicted from.
        is_deferred: whether statistics wait on their rank until decompositions are due.
        account: bytes and calls sent, by rank and kind, and bytes held.
        memory: bytes by rank and kind. Held between steps: "factors", "decompositions", "moments", "statistics" and
            their "total". For a while: "batch statistics", "messages", "new decompositions", "preconditioned". The
            "peak" is the total and the most of what is there at one time.
        operations: by kind ("statistics", "decompose", "solve"), of the busiest rank, when the phase runs.
        seconds: of each phase when it runs: "model" (a step without K-FAC) and the phases that ``timings()`` tells:
            "statistics", "factors", "inverses", "precondition".
        parts: of what the phases are made, before anything is hidden behind something else.
        plain_step, factor_step, inverse_step, average_step: seconds.
    """

    workload: Workload
    placement: Placement
    hardware: Hardware
    settings: Settings
    is_deferred: bool
    account: Account
    memory: tuple[Mapping[str, int], ...]
    operations: Mapping[str, float]
    seconds: Mapping[str, float]
    parts: Mapping[str, float]
    plain_step: float
    factor_step: float
    inverse_step: float
    average_step: float

    @property
    def peak(self) -> int:
        """Bytes that the fullest rank holds at the fullest time."""
        return self.fullest["peak"]

    @property
    def fullest(self) -> Mapping[str, int]:
        """The memory of the rank with the highest peak."""
        return max(self.memory, key=lambda memory: memory["peak"])

    @property
    def bytes_a_step(self) -> float:
        """Bytes that the busiest rank sends in a step, on average over many."""
        settings, sent = self.settings, self.account
        rows = zip(sent.every_step, sent.factor_step, sent.inverse_step, strict=True)
        return max(
            _bytes(every) + _bytes(factor) / settings.factor_update_steps + _bytes(inverse) / settings.inv_update_steps
            for every, factor, inverse in rows
        )


def predict(workload: Workload, placement: Placement, hardware: Hardware, settings: Settings) -> Prediction:
    """Returns what a placement costs.

    Args:
        workload: the model.
        placement: who does what.
        hardware: the machine.
        settings: how K-FAC was told to work.

    Raises:
        ConfigurationError: the profile has no times for the solver.
    """
    solver, waits = SOLVERS[settings.solver], _is_deferred(settings, placement.world_size, placement.workers, workload)
    sent = account(
        placement,
        workload.shapes,
        solver.held,
        sizes=settings.sizes,
        has_moments=solver.has_moments,
        damps_factors=solver.damps_factors,
        deferred=waits,
    )
    shapes = workload.shapes
    routes = Routes(placement, shapes, settings.bucket_bytes)
    received = received_bytes(routes, settings.sizes, solver.held)
    phases = Phases(workload, hardware, settings, sent, received, waits)
    plain, factor, inverse, average = phases.steps()
    operations = {
        "statistics": settings.accumulation_steps * sum(map(statistics_operations, workload.layers)),
        "decompose": max(by_owner(placement, shapes, lambda factor: solver.operations * factor.work)),
        "solve": max(by_column(placement, shapes, lambda shape: _solve_operations(shape, solver.products))),
    }
    return Prediction(
        workload=workload,
        placement=placement,
        hardware=hardware,
        settings=settings,
        is_deferred=waits,
        account=sent,
        memory=footprint(sent, routes, received, settings, solver),
        operations=operations,
        seconds=phases.seconds,
        parts=phases.parts,
        plain_step=plain,
        factor_step=factor,
        inverse_step=inverse,
        average_step=average,
    )


def placed(workload: Workload, world_size: int, workers: int, hardware: Hardware, settings: Settings) -> Placement:
    """Returns the placement that ``KFACPreconditioner`` makes of these settings on this machine."""
    is_auto = settings.local_below == "auto"
    exchanges = max(1.0, settings.inv_update_steps / settings.factor_update_steps)
    if _is_deferred(settings, world_size, workers, workload):
        exchanges = 1.0
    return place(
        workload.shapes,
        world_size,
        workers,
        colocate=settings.colocate,
        local_below=0 if isinstance(settings.local_below, str) else settings.local_below,
        local_rule=LocalRule(exchanges, bytes_per_number=settings.factor_bytes) if is_auto else None,
        ranks_per_node=None if world_size % hardware.ranks_per_node else hardware.ranks_per_node,
    )


def _is_deferred(settings: Settings, world_size: int, workers: int, workload: Workload) -> bool:
    """Says whether statistics wait on their rank until decompositions are due."""
    if world_size == 1 or settings.spread:
        return False
    is_worth_it = is_worth_deferring(world_size, workers, workload.shapes)
    return is_worth_it if settings.deferred is None else settings.deferred


def _solve_operations(shape: LayerShape, products: int) -> float:
    _, out, size = shape.gradient
    inner = (not shape.g.is_diagonal) * out + (not shape.a.is_diagonal) * size
    return 2.0 * products * inner * shape.gradient_elements


def _bytes(sent: Mapping[str, Sent]) -> int:
    return sum(part.bytes for part in sent.values())
