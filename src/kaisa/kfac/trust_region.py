"""Trust regions: how far one step may go, decided on the device.

Each takes the raw and the preconditioned gradients of all layers, with the learning rate of each, and returns one
factor (or one a layer) to multiply the preconditioned gradients by. Nothing is read by the host.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kaisa.schedules import POSITIVE, Scalar, Schedule


class TrustRegion(ABC):
    """A bound on the step as a function of raw gradients, preconditioned gradients and learning rates."""

    @abstractmethod
    def scales(
        self, raw: Sequence[Tensor], preconditioned: Sequence[Tensor], rates: Sequence[Tensor], step: int
    ) -> list[Tensor]:
        """Returns what to multiply each preconditioned gradient by.

        Args:
            raw, preconditioned: stacks (layers, ..., out, in) of layers of equal shape.
            rates: the learning rates (layers,) of each stack.
            step: the step, for schedules.

        Returns:
            For each stack a tensor that broadcasts over it.
        """


@dataclass(frozen=True)
class KLClip(TrustRegion):
    """Keeps the change of the predictive distribution below ``limit``: ν = min(1, √(κ / Σ lr² |⟨p, g⟩|)).

    KAISA (arXiv 2107.01739) takes this rule from Ba et al. 2017; with p = F⁻¹g the sum is the KL divergence of the
    step to second order, doubled.
    """

    limit: Scalar

    def scales(
        self, raw: Sequence[Tensor], preconditioned: Sequence[Tensor], rates: Sequence[Tensor], step: int
    ) -> list[Tensor]:
        divergence = _total(
            [
                (rate.double().square() * _inner(p, g)).sum()
                for p, g, rate in zip(preconditioned, raw, rates, strict=True)
            ]
        )
        return _bounded(Schedule("kl_clip", self.limit, POSITIVE).resolve(step), divergence.abs(), preconditioned)


@dataclass(frozen=True)
class FisherNorm(TrustRegion):
    """Keeps the natural gradient's length in the norm of the Fisher, √|⟨p, g⟩|, below ``limit``.

    The learning rate takes no part: a bounded step has the length lr · limit, and the schedule of the rate sets it. The
    KL clip bounds the step itself, so that wherever it binds neither the rate nor its decay changes anything.
    """

    limit: Scalar

    def scales(
        self, raw: Sequence[Tensor], preconditioned: Sequence[Tensor], rates: Sequence[Tensor], step: int
    ) -> list[Tensor]:
        length = _total([_inner(p, g).sum() for p, g in zip(preconditioned, raw, strict=True)])
        limit = Schedule("FisherNorm.limit", self.limit, POSITIVE).resolve(step)
        return _bounded(limit**2, length.abs(), preconditioned)


@dataclass(frozen=True)
class NormConstraint(TrustRegion):
    """Keeps the length of the step, lr ‖p‖ over all layers, below ``limit``."""

    limit: Scalar

    def scales(
        self, raw: Sequence[Tensor], preconditioned: Sequence[Tensor], rates: Sequence[Tensor], step: int
    ) -> list[Tensor]:
        length = _total(
            [(rate.double().square() * _inner(p, p)).sum() for p, rate in zip(preconditioned, rates, strict=True)]
        )
        limit = Schedule("NormConstraint.limit", self.limit, POSITIVE).resolve(step)
        return _bounded(limit**2, length, preconditioned)


@dataclass(frozen=True)
class Graft(TrustRegion):
    """Gives every layer's step the length of its raw gradient: the direction is K-FAC's, the length the optimizer's."""

    def scales(
        self, raw: Sequence[Tensor], preconditioned: Sequence[Tensor], rates: Sequence[Tensor], step: int
    ) -> list[Tensor]:
        return [
            _over_layers((_inner(g, g) / _inner(p, p).clamp(min=1e-30)).sqrt(), p)
            for g, p in zip(raw, preconditioned, strict=True)
        ]


def _inner(first: Tensor, second: Tensor) -> Tensor:
    return (first * second).flatten(1).sum(1).double()


def _total(parts: list[Tensor]) -> Tensor:
    device = parts[0].device
    return torch.stack([part.to(device) for part in parts]).sum()


def _bounded(limit: float, size: Tensor, stacks: Sequence[Tensor]) -> list[Tensor]:
    scale = (limit / size.clamp(min=1e-30)).sqrt().clamp(max=1.0)
    return [scale.to(stack.device, stack.dtype) for stack in stacks]


def _over_layers(scale: Tensor, stack: Tensor) -> Tensor:
    return scale.to(stack.dtype).reshape(-1, *[1] * (stack.ndim - 1))
