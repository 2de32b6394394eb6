"""What the gradients at hand must be multiplied by to be those of the loss of one micro-batch."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from kaisa.errors import ConfigurationError


class LossScaler(Protocol):
    """What K-FAC asks of a ``torch.amp.GradScaler``."""

    def scale(self, outputs: Tensor) -> Tensor:
        """Returns the tensor times the loss scale."""


class LossScale:
    """The scale of mixed precision and of accumulation, asked once a step and device.

    Args:
        scaler: the ``GradScaler``, a function that returns the scale, or None.
        micro_batches: by how many a mean loss is divided, so that they make one mean; 1 for a sum, which adds up.
        optimizer: whose gradients must be unscaled before they are preconditioned.
    """

    def __init__(
        self,
        scaler: LossScaler | Callable[[], float] | None,
        micro_batches: int,
        optimizer: torch.optim.Optimizer | None,
    ) -> None:
        self._scaler = scaler
        self._micro_batches = float(micro_batches)
        self._optimizer = optimizer
        self._undoing: dict[torch.device, Tensor] = {}

    def undo(self, device: torch.device) -> float | Tensor:
        """Returns what a gradient must be multiplied by."""
        if self._scaler is None:
            return self._micro_batches
        if device not in self._undoing:
            one = torch.ones((), device=device)
            scale = one * self._scaler() if callable(self._scaler) else self._scaler.scale(one)
            self._undoing[device] = self._micro_batches / scale
        return self._undoing[device]

    def forget(self) -> None:
        """Asks again in the next step."""
        self._undoing.clear()

    def check_unscaled(self) -> None:
        """Refuses gradients that the scaler has not unscaled.

        Raises:
            ConfigurationError: ``unscale_`` was not called.
        """
        states = getattr(self._scaler, "_per_optimizer_states", None)
        if states is None or self._optimizer is None or not getattr(self._scaler, "is_enabled", bool)():
            return
        stage = states[id(self._optimizer)]["stage"] if id(self._optimizer) in states else None
        if stage is None or stage.name == "READY":
            raise ConfigurationError(
                "the gradients are still scaled; call scaler.unscale_(optimizer) before kfac.step()"
            )
