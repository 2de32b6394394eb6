"""Training with K-FAC spelled out: what the callbacks of frameworks must do, without any framework."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import kaisa

Batch = tuple[Tensor, Tensor]
OPTIONS = {"factor_update_steps": 1, "inv_update_steps": 2, "damping": 0.01}


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def examples(count: int, dtype: torch.dtype = torch.float64) -> Batch:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 5, generator=generator, dtype=dtype), torch.arange(count) % 3


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)


def parameters(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


@dataclass
class PlainLoop:
    """Two epochs over batches of four in order, two of which make a step; the last step of an epoch may have one.

    Attributes:
        loss: of one micro-batch, undivided.
        divides_by_actual: whether the loss of a short last step is divided by its own number of micro-batches, or, as
            that of the others, by two.
        clip: of the norm of the preconditioned gradients.
        autocast: around the forward pass.
        scaler: of the loss.
    """

    loss: Callable[[nn.Module, Batch], Tensor]
    divides_by_actual: bool
    clip: float | None = None
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    scaler: torch.amp.GradScaler | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def train(self, model: nn.Module, data: Batch) -> kaisa.KFACPreconditioner:
        optimizer = sgd(model)
        scaler = self.scaler or torch.amp.GradScaler("cpu", enabled=False)
        divisor = [2]
        kfac = kaisa.KFACPreconditioner(
            model, optimizer, grad_scaler=lambda: scaler.get_scale() / divisor[0], **{**OPTIONS, **self.options}
        )
        for step in [*steps(data), *steps(data)]:
            divisor[0] = len(step) if self.divides_by_actual else 2
            optimizer.zero_grad()
            for batch in step:
                with self.autocast():
                    loss = self.loss(model, batch) / divisor[0]
                scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            kfac.step()
            if self.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), self.clip)
            scaler.step(optimizer)
            scaler.update()
        return kfac


def steps(data: Batch) -> Iterator[Sequence[Batch]]:
    batches = list(zip(data[0].split(4), data[1].split(4), strict=True))
    for start in range(0, len(batches), 2):
        yield batches[start : start + 2]


def classified(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def assert_same(ours: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    torch.testing.assert_close(list(ours), list(expected))


def assert_same_factors(ours: kaisa.KFACPreconditioner | None, expected: kaisa.KFACPreconditioner) -> None:
    assert ours is not None
    assert ours.steps == expected.steps
    for (_, own), (_, other) in zip(sorted(ours.factors.items()), sorted(expected.factors.items()), strict=True):
        torch.testing.assert_close(own.a, other.a)
        torch.testing.assert_close(own.g, other.g)
