"""AdaHessian on real processes that talk over gloo, wrapped in DistributedDataParallel, and alone."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kaisa.optim import AdaHessian


class Branches(nn.Module):
    """A perceptron with a layer that only some batches use."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        self.optional = nn.Linear(5, 3).double()

    def forward(self, x: Tensor, with_optional: bool) -> Tensor:
        return self.body(x) + (torch.tanh(self.optional(x)) if with_optional else 0)


def train(rank: int, world_size: int) -> list[Tensor]:
    """Train on a share of every batch, in two micro-batches; the second share alone uses the optional layer."""
    bare = Branches()
    model = DistributedDataParallel(bare, find_unused_parameters=True) if world_size > 1 else bare
    optimizer = AdaHessian(model.parameters(), update_period=2)
    generator = torch.Generator().manual_seed(4)
    for _ in range(5):
        inputs = torch.randn(8, 5, generator=generator, dtype=torch.float64)
        targets = torch.randint(3, (8,), generator=generator)
        optimizer.zero_grad()
        parts = [(part, part >= 2) for part in range(4)]
        own = parts if world_size == 1 else parts[2 * rank : 2 * rank + 2]
        for part, with_optional in own:
            rows = slice(2 * part, 2 * part + 2)
            waits = world_size > 1 and part % 2 == 0
            with model.no_sync() if waits else nullcontext():
                loss = F.cross_entropy(model(inputs[rows], with_optional), targets[rows]) / len(own)
                optimizer.backward(loss)
        optimizer.step()
    return [parameter.detach() for parameter in bare.parameters()]


def _main(rank: int, world_size: int, folder: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world_size)
    torch.save(train(rank, world_size), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def run(world_size: int, folder: Path) -> list[list[Tensor]]:
    """Returns the parameters of every rank after training."""
    multiprocessing.start_processes(_main, (world_size, str(folder)), nprocs=world_size, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt") for rank in range(world_size)]
