"""Chooses the fastest predicted placement that fits, and says why. Pure Python: no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kaisa.kfac.hardware import Hardware
from kaisa.kfac.prediction import Prediction
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
        reasons: why, in plain words.
    """

    candidates: tuple[Prediction, ...]
    chosen: Prediction
    memory_budget: int | None
    reasons: tuple[str, ...]

    @property
    def options(self) -> Mapping[str, Any]:
        """The arguments of ``KFACPreconditioner`` that were chosen, by name, ``payload`` as those of ``Payload``."""
        raise NotImplementedError

    def by_fraction(self) -> tuple[Prediction, ...]:
        """Returns the fastest prediction that fits of each number of gradient workers, or the smallest."""
        raise NotImplementedError

    def to_json(self) -> str:
        """Returns the plan as JSON: the choice, the reasons, and every fraction's memory, traffic and time."""
        raise NotImplementedError


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
    raise NotImplementedError


def parse_bytes(text: str | int) -> int:
    """Returns the number of bytes that "2GiB", "500 MB" or 1024 says.

    Raises:
        ConfigurationError: it says none.
    """
    raise NotImplementedError
