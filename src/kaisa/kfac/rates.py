"""The learning rates that layers will be stepped with, for the trust region."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kaisa.schedules import Schedule


class Rates:
    """Reads learning rates where they are: in a schedule of their own, or in the groups of the optimizer.

    Args:
        schedule: the rate of all layers; None to ask the optimizer.
        optimizer: None counts every rate as 1.
    """

    def __init__(self, schedule: Schedule | None, optimizer: torch.optim.Optimizer | None) -> None:
        self._schedule = schedule
        self._optimizer = optimizer
        self._places: dict[nn.Parameter, int] = {}

    def of(self, weights: Sequence[nn.Parameter], step: int, like: Tensor) -> Tensor:
        """Returns the rate (weights,) of each; one that is a tensor is not read by the host."""
        rates = [self._rate(weight, step) for weight in weights]
        numbers = [rate for rate in rates if not isinstance(rate, Tensor)]
        if len(numbers) < len(rates):
            return torch.stack([torch.as_tensor(rate, device=like.device) for rate in rates])
        if len(set(numbers)) == 1:
            return torch.full((len(numbers),), numbers[0], device=like.device)
        return torch.tensor(numbers, device=like.device)

    def _rate(self, weight: nn.Parameter, step: int) -> float | Tensor:
        if self._schedule is not None:
            return self._schedule.resolve(step)
        if self._optimizer is None:
            return 1.0
        # Places and not groups, which load_state_dict replaces.
        if weight not in self._places:
            groups = enumerate(self._optimizer.param_groups)
            self._places = {parameter: place for place, group in groups for parameter in group["params"]}
        place = self._places.get(weight)
        rate: float | Tensor = 0.0 if place is None else self._optimizer.param_groups[place]["lr"]
        return rate
