"""The scale of the loss where a framework divides it, by a number that may change from step to step.

    δ = terms · gradient · k / s      k: by how much the framework divided the loss, s: the scale of its GradScaler

``KFACPreconditioner`` multiplies by ``accumulation_steps``, which is fixed; what is asked here is s times the ratio of
the two.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from kaisa.kfac.loss_scale import LossScaler


class MicroBatches:
    """A ``GradScaler``, or none, seen through an accumulation that changes.

    Args:
        scaler: the framework's ``GradScaler``, None where the loss is not scaled.
        planned: ``accumulation_steps`` of the preconditioner.
        actual: returns by what the loss of this step is divided.
    """

    def __init__(self, scaler: LossScaler | None, planned: int, actual: Callable[[], int]) -> None:
        self._scaler = scaler
        self._planned = planned
        self._actual = actual

    def scale(self, outputs: Tensor) -> Tensor:
        """Returns what the tensor would be in the loss, in units of a loss divided as planned."""
        scaled = outputs if self._scaler is None else self._scaler.scale(outputs)
        return scaled * (self._planned / self._actual())

    def __getattr__(self, name: str) -> Any:
        # Whether gradients are unscaled is asked of the scaler itself.
        return getattr(self._scaler, name)
