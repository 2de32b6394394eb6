"""What a placement will hold, send, compute and take on a machine, before anything runs. Pure Python: no torch."""

from collections.abc import Mapping
from dataclasses import dataclass

from kaisa.kfac.account import Account
from kaisa.kfac.hardware import Hardware
from kaisa.kfac.placement import Placement
from kaisa.kfac.workload import Settings, Workload


@dataclass(frozen=True)
class Prediction:
    """What one placement costs.

    Attributes:
        workload, placement, hardware, settings: what it was predicted from.
        account: bytes and calls sent, by rank and kind, and bytes held.
        memory: bytes by rank and kind. Held between steps: "factors", "decompositions", "moments", "statistics" and
            their "total". For a while: "batch statistics", "buffers" (messages), "preconditioned", "workspace". The
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
        return max(memory["peak"] for memory in self.memory)


def predict(workload: Workload, placement: Placement, hardware: Hardware, settings: Settings) -> Prediction:
    """Returns what a placement costs.

    Args:
        workload: the model.
        placement: who does what.
        hardware: the machine.
        settings: how K-FAC was told to work.
    """
    raise NotImplementedError
