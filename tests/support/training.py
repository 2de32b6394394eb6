"""A short run that one process or many ranks can make, on a model with layers of every kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kaisa

STEPS = 5
EXAMPLES = 48  # of every batch: divisible by 1, 2, 4, 6 and 8 ranks, and their shares by 2 micro-batches
CLASSES = 7


class Network(nn.Module):
    """Convolutions, a tied embedding, a norm, and layers of equal shape, one of them used at will."""

    def __init__(self, *, is_tied: bool = True) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(2, 4, 2, padding=1)
        self.grouped = nn.Conv2d(4, 4, 2, padding=1, groups=2, bias=False)
        self.embedding = nn.Embedding(CLASSES, 4)
        self.first = nn.Linear(10, 6)
        self.norm = nn.LayerNorm(6)
        self.optional = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.third = nn.Linear(6, 6)
        self.last = nn.Linear(6, 4)
        self.head = nn.Linear(4, CLASSES, bias=False)
        if is_tied:
            self.head.weight = self.embedding.weight

    def forward(self, images: Tensor, tokens: Tensor, with_optional: bool = True) -> Tensor:
        x = torch.tanh(self.convolution(images))
        x = torch.tanh(self.grouped(x)).mean((2, 3))
        x = torch.tanh(self.first(torch.cat((x, self.embedding(tokens).mean(1), images.mean((2, 3))), 1)))
        x = self.norm(x)
        if with_optional:
            x = x + torch.tanh(self.optional(x))
        x = torch.tanh(self.second(x))
        x = torch.tanh(self.third(x))
        return self.head(self.last(x))


def network(*, is_tied: bool = True) -> Network:
    """Returns the same network to every rank, whatever its thread has drawn before."""
    model = Network(is_tied=is_tied).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


@dataclass(frozen=True)
class Batch:
    images: Tensor
    tokens: Tensor
    labels: Tensor

    def __getitem__(self, part: slice) -> Batch:
        return Batch(self.images[part], self.tokens[part], self.labels[part])

    def __len__(self) -> int:
        return len(self.labels)

    def split(self, sizes: Sequence[int]) -> list[Batch]:
        ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
        return [self[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def batch(step: int) -> Batch:
    generator = torch.Generator().manual_seed(100 + step)
    images = torch.randn(EXAMPLES, 2, 4, 4, generator=generator, dtype=torch.float64)
    tokens = torch.randint(CLASSES, (EXAMPLES, 3), generator=generator)
    return Batch(images, tokens, torch.randint(CLASSES, (EXAMPLES,), generator=generator))


OPTIONS: dict[str, Any] = {
    "factor_update_steps": 1,
    "inv_update_steps": 2,
    "damping": 0.03,
    "kl_clip": None,
    "inv_dtype": torch.float64,
}


@dataclass
class Run:
    """What a rank does in ``STEPS`` steps.

    Attributes:
        options: of the preconditioner, beyond ``OPTIONS``.
        parts: step → the micro-batches of this rank.
        with_optional: micro-batch → whether it uses the optional layer.
        spoilt: (step, micro-batch) pairs whose loss is not a number.
        model: makes the network.
        after_step: called with the preconditioner between two steps.
        average: gives every rank the mean of all ranks' gradients; None where DDP does, or one process needs none.
    """

    options: dict[str, Any]
    parts: Callable[[int], Sequence[Batch]]
    with_optional: Callable[[int], bool] = lambda part: True
    spoilt: frozenset[tuple[int, int]] = frozenset()
    average: Callable[[Tensor], Tensor] | None = None
    model: Callable[[], nn.Module] = network
    after_step: Callable[[kaisa.KFACPreconditioner], None] = lambda kfac: None
    kfac: kaisa.KFACPreconditioner | None = field(default=None, init=False)

    def __call__(
        self, model: nn.Module | None = None, context: Callable[[bool], Any] | None = None
    ) -> dict[str, Tensor]:
        """Returns the parameters after the last step.

        Args:
            model: the network, or a wrapper of it.
            context: given whether a micro-batch is the last of its step, what its passes run inside.
        """
        model = self.model() if model is None else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        self.kfac = kaisa.KFACPreconditioner(model, optimizer, **{**OPTIONS, **self.options})
        for step in range(STEPS):
            self._backward(model, step, context)
            self._average(model)
            for parameter in model.parameters():
                if self.spoilt and parameter.grad is not None:
                    parameter.grad.nan_to_num_(0.0)
            self.kfac.step()
            optimizer.step()
            optimizer.zero_grad()
            self.after_step(self.kfac)
        plain = model.module if hasattr(model, "module") else model
        return {name: parameter.detach().clone() for name, parameter in plain.named_parameters()}

    def _backward(self, model: nn.Module, step: int, context: Callable[[bool], Any] | None) -> None:
        parts = self.parts(step)
        for index, part in enumerate(parts):
            if context is None:
                self._loss(model, step, index, part, len(parts)).backward()
            else:
                with context(index == len(parts) - 1):
                    self._loss(model, step, index, part, len(parts)).backward()

    def _loss(self, model: nn.Module, step: int, index: int, part: Batch, parts: int) -> Tensor:
        outputs = model(part.images, part.tokens, self.with_optional(index))
        if "fisher" in self.options:
            assert self.kfac is not None
            self.kfac.sample_fisher(outputs)
        loss = F.cross_entropy(outputs, part.labels) / parts
        return loss * float("nan") if (step, index) in self.spoilt else loss

    def _average(self, model: nn.Module) -> None:
        if self.average is None:
            return
        parameters = list(model.parameters())
        flat = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        mean = self.average(torch.cat([gradient.flatten() for gradient in flat]))
        for parameter, part in zip(parameters, mean.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.reshape(parameter.shape).clone()


def share(step: int, rank: int, world_size: int, micro_batches: int = 1) -> list[Batch]:
    """Returns the micro-batches of one rank: its equal share of the batch in equal parts."""
    size = EXAMPLES // world_size
    return batch(step)[rank * size : (rank + 1) * size].split([size // micro_batches] * micro_batches)


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Returns the largest difference of any parameter, relative to the largest number in it."""
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).abs().max() / expected[name].abs().max()) for name in expected)
