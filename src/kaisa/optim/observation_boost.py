"""Observation boost (OBSB): once in a training a larger observation factor, with the step size that belongs to it.

    small μ, large α: fast at first ─► trigger ─► 2 μ, about α / 4: less noise, so a lower loss      (once)

The ratio of the step sizes is that of the best steps on a quadratic, `kaisa.optim.gain.step_ratio`: 0.2483 from
μ = 0.05 to 0.1 at β = 0.999. It is near ¼ only where μ is much larger than 1 − β (0.57 at β = 0.9), so it is computed.

A trigger is a function of what was measured so far, one number an epoch.

Source: arXiv 1905.01422 and its code (ARSGB).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol, cast, final

import torch
from torch.optim.lr_scheduler import LRScheduler

from kaisa.errors import ConfigurationError, StateError
from kaisa.optim.elementwise import Group, check_flag, check_number
from kaisa.optim.gain import step_ratio
from kaisa.schedules import DECAY, FRACTION, NON_NEGATIVE, STEPS, Range

HIGHEST_RATES = ("initial_lr", "max_lr", "min_lr")  # what other schedulers keep in a group
MULTIPLE = Range("a number above 1", 1.0, math.inf, excludes_lowest=True)


class Trigger(Protocol):
    """Says when to boost."""

    @property
    def needs_measure(self) -> bool:
        """Whether `ObservationBoost.step` must be told a number each epoch."""

    def is_due(self, measures: Sequence[float]) -> bool:
        """Whether to boost now, after as many epochs as there are measures."""


@final
@dataclass(frozen=True)
class AtRate:
    """Boost when convergence has slowed: the authors' way to speed.

    The rate of an epoch is the mean fall of the logarithm of the training loss over the last `window` epochs, looked at
    every `window` epochs.

    Attributes:
        window: epochs over which the rate is averaged; the authors take 2 on MNIST, 10 on CIFAR-10.
        share: of the highest rate so far, at or below which it counts as slow.
    """

    window: int = 2
    share: float = 0.5
    needs_measure: bool = field(default=True, init=False, repr=False)

    def __post_init__(self) -> None:
        check_number("window", self.window, STEPS)
        check_number("share", self.share, FRACTION)

    def is_due(self, measures: Sequence[float]) -> bool:
        """Whether a window is full whose rate is at most the share of the highest before it.

        Raises:
            ConfigurationError: a loss is not positive, so that it has no logarithm.
        """
        if (len(measures) - 1) % self.window:
            return False
        if measures[-1] <= 0:
            raise ConfigurationError(
                f"the loss is {measures[-1]!r}; AtRate compares logarithms, so add a constant that keeps the loss "
                "positive, or give AtPlateau or AtEpoch"
            )
        ends = [math.log(measure) for measure in measures[:: self.window]]
        rates = [(before - after) / self.window for before, after in pairwise(ends)]
        return len(rates) > 1 and rates[-1] <= self.share * max(rates[:-1])


@final
@dataclass(frozen=True)
class AtPlateau:
    """Boost when the training loss, or the validation accuracy, has gone flat: the authors' way to generalise.

    Attributes:
        patience: epochs without a better number after which it counts as flat.
        threshold: the least difference that counts as better.
        better: "lower" for a loss, "higher" for an accuracy.
    """

    patience: int = 3
    threshold: float = 1e-4
    better: str = "lower"
    needs_measure: bool = field(default=True, init=False, repr=False)

    def __post_init__(self) -> None:
        check_number("patience", self.patience, STEPS)
        check_number("threshold", self.threshold, NON_NEGATIVE)
        check_flag("better", self.better, "lower", "higher")

    def is_due(self, measures: Sequence[float]) -> bool:
        """Whether none of the last `patience` measures is better than the best before them."""
        sign = 1 if self.better == "lower" else -1
        signed = [sign * measure for measure in measures]
        before, last = signed[: -self.patience], signed[-self.patience :]
        return bool(before) and not any(measure < min(before) - self.threshold for measure in last)


@final
@dataclass(frozen=True)
class AtEpoch:
    """Boost after a given number of epochs.

    Attributes:
        epoch: how many lie behind then; the authors take 6 on MNIST, 11 on WikiText-2, 21 or 51 on CIFAR-10.
    """

    epoch: int
    needs_measure: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        check_number("epoch", self.epoch, STEPS)

    def is_due(self, measures: Sequence[float]) -> bool:
        """Whether that many epochs lie behind."""
        return len(measures) >= self.epoch


@final
class ObservationBoost(LRScheduler):
    """A scheduler that raises the observation factor of RSG or ARSG once, and lowers the step size to match.

    Start with a small observation factor, 0.05, and the largest step size that trains. Other schedulers may run beside
    it: those that go on from a group's present learning rate need nothing, those that compute it from one that they
    keep, such as `LambdaLR`, must be named in ``schedulers``.

    Example:
        >>> optimizer = kaisa.optim.ARSG(model.parameters(), lr=0.02, mu=0.05)
        >>> boost = kaisa.optim.ObservationBoost(optimizer, kaisa.optim.AtRate(window=2))
        >>> boost.step(training_loss)  # after each epoch

    Args:
        optimizer: an RSG or ARSG; every group has an observation factor above 0.
        trigger: when to boost.
        multiple: of every observation factor; 2 in the paper.
        factor: what to multiply every step size by; None for the ratio of the best steps, for each group's own β.
        schedulers: others whose base learning rates are multiplied too.

    Attributes:
        measures: what was measured, one number an epoch; NaN where none was needed.
        boosted_at: how many epochs lay behind at the boost; None before it.

    Raises:
        ConfigurationError: an option is out of its range, or the optimizer has no observation factor to raise.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        trigger: Trigger | None = None,
        *,
        multiple: float = 2.0,
        factor: float | None = None,
        schedulers: Sequence[LRScheduler] = (),
    ) -> None:
        check_number("multiple", multiple, MULTIPLE)
        if factor is not None:
            check_number("factor", factor, FRACTION)
        self.trigger = trigger if trigger is not None else AtRate()
        if not callable(getattr(self.trigger, "is_due", None)):
            raise ConfigurationError(f"trigger is {trigger!r}; give AtRate(), AtPlateau() or AtEpoch(6)")
        self.optimizer = optimizer
        self.multiple = multiple
        self.factor = factor
        self.schedulers = tuple(schedulers)
        self.measures: list[float] = []
        self.boosted_at: int | None = None
        for group in optimizer.param_groups:
            self._check(group)
        self.last_epoch = 0
        self._last_lr = [group["lr"] for group in optimizer.param_groups]

    def _check(self, group: Group) -> None:
        mu = group.get("mu")
        if mu is None or not ("beta" in group or "betas" in group):
            raise ConfigurationError(
                f"{type(self.optimizer).__name__} has no observation factor mu to raise; give kaisa.optim.RSG or ARSG"
            )
        check_number("mu", mu, Range("an observation factor above 0, such as 0.05", 0.0, math.inf, True))
        check_number(f"mu = {mu!r} times multiple", mu * self.multiple, DECAY)

    def step(self, measure: Any = None) -> None:
        """Hear that an epoch is over, and boost if it is time.

        Args:
            measure: training loss or validation accuracy of the epoch, a number or a tensor of one; not needed by
                `AtEpoch`.

        Raises:
            ConfigurationError: the trigger needs a number.
        """
        if measure is None and self.trigger.needs_measure:
            raise ConfigurationError(f"{self.trigger!r} needs a number each epoch; call step(loss)")
        measures = [*self.measures, math.nan if measure is None else float(measure)]
        if self.boosted_at is None and self.trigger.is_due(measures):
            self._boost()
            self.boosted_at = len(measures)
        self.measures = measures
        self.last_epoch = len(measures)
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def _boost(self) -> None:
        for group in self.optimizer.param_groups:
            self._check(group)
        ratios = [self._ratio(group) for group in self.optimizer.param_groups]
        for group, ratio in zip(self.optimizer.param_groups, ratios, strict=True):
            group["mu"] *= self.multiple
            for name in ("lr", *(name for name in HIGHEST_RATES if name in group)):
                group[name] *= ratio
        for scheduler in self.schedulers:
            _scale_bases(scheduler, ratios)

    def _ratio(self, group: Group) -> float:
        if self.factor is not None:
            return self.factor
        beta = group["beta"] if "beta" in group else group["betas"][0]
        return step_ratio(beta, group["mu"], group["mu"] * self.multiple)

    def get_lr(self) -> list[float]:  # type: ignore[override]  # torch's may be tensors too
        """Return the learning rate of every group."""
        return cast("list[float]", [group["lr"] for group in self.optimizer.param_groups])

    def state_dict(self) -> dict[str, Any]:
        """Return what was measured and when the boost came; learning rates and μ are in the optimizer's state."""
        return {"measures": list(self.measures), "boosted_at": self.boosted_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state; load the optimizer's own and those of other schedulers as well.

        Raises:
            StateError: it is not the state of an observation boost.
        """
        if set(state_dict) != {"measures", "boosted_at"}:
            raise StateError(f"this is no state of ObservationBoost: it holds {', '.join(map(str, state_dict))}")
        self.measures = list(state_dict["measures"])
        self.boosted_at = state_dict["boosted_at"]
        self.last_epoch = len(self.measures)
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]


def _scale_bases(scheduler: LRScheduler, ratios: Sequence[float]) -> None:
    """Multiply the learning rates that a scheduler, or those that it is made of, computes others from."""
    if hasattr(scheduler, "base_lrs"):
        scheduler.base_lrs = [base * ratio for base, ratio in zip(scheduler.base_lrs, ratios, strict=True)]
    for part in getattr(scheduler, "_schedulers", ()):
        _scale_bases(part, ratios)
