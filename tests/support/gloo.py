"""Short runs on real processes that talk over gloo: one start of the processes for many runs."""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from tests.support.training import Batch, Run, batch, network, share


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        options: of the preconditioner.
        sizes: examples of each rank, None for equal shares.
        micro_batches: passes of a step.
        wrapper: options of ``DistributedDataParallel``; None for gradients averaged by hand.
        users: the ranks that use the optional layer; None for all.
        is_tied: whether the network has a tied weight, with which statistics do not wait by default.
    """

    options: dict[str, Any] = field(default_factory=dict)
    sizes: tuple[int, ...] | None = None
    micro_batches: int = 1
    wrapper: dict[str, Any] | None = None
    users: tuple[int, ...] | None = None
    is_tied: bool = True

    def parts(self, step: int, rank: int, world_size: int) -> Sequence[Batch]:
        if self.sizes is None:
            return share(step, rank, world_size, self.micro_batches)
        return [batch(step).split(self.sizes)[rank]]

    def run(self, rank: int, world_size: int) -> dict[str, Any]:
        run = Run(
            {**self.options, "accumulation_steps": self.micro_batches},
            lambda step: self.parts(step, rank, world_size),
            with_optional=lambda part: self.users is None or rank in self.users,
            model=lambda: network(is_tied=self.is_tied),
        )
        if self.wrapper is None:
            run.average = _mean
            parameters = run()
        else:
            model = DistributedDataParallel(network(is_tied=self.is_tied), **self.wrapper)

            def context(is_last: bool) -> AbstractContextManager[Any]:
                return nullcontext() if is_last else model.no_sync()

            parameters = run(model, context)
        assert run.kfac is not None
        collectives = run.kfac._transport.collectives
        return {
            "parameters": parameters,
            "bytes": dict(collectives.bytes_sent),
            "calls": dict(collectives.calls),
            "memory": run.kfac.memory_usage(),
        }


def _mean(tensor: Tensor) -> Tensor:
    dist.all_reduce(tensor)
    return tensor / dist.get_world_size()


def _main(rank: int, world_size: int, cases: Sequence[Case], folder: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=60),
    )
    results = [case.run(rank, world_size) for case in cases]
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def run(world_size: int, cases: Sequence[Case], folder: Path) -> list[list[dict[str, Any]]]:
    """Returns what every case ends with, a list over ranks each."""
    multiprocessing.start_processes(
        _main, (world_size, cases, str(folder)), nprocs=world_size, join=True, start_method="spawn"
    )
    by_rank = [torch.load(folder / f"{rank}.pt") for rank in range(world_size)]
    return [list(ranks) for ranks in zip(*by_rank, strict=True)]
