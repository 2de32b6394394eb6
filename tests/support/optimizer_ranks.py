"""Optimizers on real processes that talk over gloo, wrapped in DistributedDataParallel, and alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kaisa.optim import ARSG, RSG, AdaHessian

WAYS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "second derivatives": lambda parameters: AdaHessian(parameters, update_period=2),
    "differences": lambda parameters: AdaHessian(parameters, update_period=2),
    "rsg": lambda parameters: RSG(parameters, lr=0.5),
    "arsg": lambda parameters: ARSG(parameters, lr=0.05, weight_decay=0.1),
    "arsg, Adam-type": lambda parameters: ARSG(parameters, lr=0.05, preconditioner="adam", lookahead_steps=2),
}
"""Optimizers, each with the way in which it is given gradients."""


class Branches(nn.Module):
    """A perceptron with a layer that only some batches use."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        self.optional = nn.Linear(5, 3).double()

    def forward(self, x: Tensor, with_optional: bool) -> Tensor:
        return self.body(x) + (torch.tanh(self.optional(x)) if with_optional else 0)


def train(rank: int, world_size: int, way: str) -> list[Tensor]:
    """Train on a share of every batch, in two micro-batches; the second share alone uses the optional layer."""
    bare = Branches()
    model = DistributedDataParallel(bare, find_unused_parameters=True) if world_size > 1 else bare
    optimizer = WAYS[way](model.parameters())
    generator = torch.Generator().manual_seed(4)
    for _ in range(5):
        inputs = torch.randn(8, 5, generator=generator, dtype=torch.float64)
        targets = torch.randint(3, (8,), generator=generator)
        optimizer.zero_grad()
        own = range(4) if world_size == 1 else range(2 * rank, 2 * rank + 2)
        for part in own:
            closure = partial(_loss, model, inputs, targets, part, len(own))
            with model.no_sync() if world_size > 1 and part % 2 == 0 else nullcontext():
                _backward(optimizer, way, closure, model.no_sync if world_size > 1 else nullcontext)
        optimizer.step()
    return [parameter.detach() for parameter in bare.parameters()]


def _loss(model: nn.Module, inputs: Tensor, targets: Tensor, part: int, parts: int) -> Tensor:
    rows = slice(2 * part, 2 * part + 2)
    return F.cross_entropy(model(inputs[rows], part >= 2), targets[rows]) / parts


def _backward(optimizer: torch.optim.Optimizer, way: str, closure: Callable[[], Tensor], unsynchronized: Any) -> None:
    if way == "differences":
        optimizer.backward_by_difference(closure, unsynchronized=unsynchronized)
    elif way == "second derivatives":
        optimizer.backward(closure())
    else:
        closure().backward()


def _main(rank: int, world_size: int, folder: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world_size)
    torch.save({way: train(rank, world_size, way) for way in WAYS}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def run(world_size: int, folder: Path) -> list[dict[str, list[Tensor]]]:
    """Return the parameters of every rank after training, by way."""
    multiprocessing.start_processes(_main, (world_size, str(folder)), nprocs=world_size, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt") for rank in range(world_size)]
