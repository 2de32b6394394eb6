"""A rank that trains from or to a checkpoint under torchrun: … checkpoint_worker.py JSON.

The plan is a JSON object: which checkpoints to read and write, up to which step, with which options.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import kaisa
from kaisa.kfac import checkpoint, collectives
from tests.support.training import EXAMPLES, OPTIONS, Batch, batch, network


class Training:
    """A model, an optimizer with momentum and K-FAC, on this rank's share of every batch."""

    def __init__(self, *, is_tied: bool = True, **options: Any) -> None:
        self.rank, self.world_size = collectives.world()
        self.model: nn.Module = network(is_tied=is_tied)
        if self.world_size > 1:
            self.model = DistributedDataParallel(self.model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.kfac = kaisa.KFACPreconditioner(self.model, self.optimizer, **{**OPTIONS, **options})

    def run(self, end: int) -> Training:
        for step in range(self.kfac.steps, end):
            part = self._share(step)
            F.cross_entropy(self.model(part.images, part.tokens), part.labels).backward()
            self.kfac.step()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self

    def _share(self, step: int) -> Batch:
        size = EXAMPLES // self.world_size
        return batch(step)[self.rank * size : (self.rank + 1) * size]

    def save(self, directory: Path, extra: dict[str, Any] | None = None) -> Path:
        return checkpoint.save(directory, self.kfac, self.model, self.optimizer, extra)

    def load(self, directory: Path) -> Any:
        return checkpoint.load(directory, self.kfac, self.model, self.optimizer)

    def parameters(self) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().clone() for name, tensor in network_of(self.model).named_parameters()}

    def factors(self) -> dict[str, torch.Tensor]:
        """Returns what this rank holds of the factors."""
        pairs = {f"{name}/{side}": getattr(pair, side) for name, pair in self.kfac.factors.items() for side in "ag"}
        return {key: factor.clone() for key, factor in pairs.items() if factor.numel()}


def network_of(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def carry_out(plan: dict[str, Any]) -> None:
    """Loads, keeps the factors, trains, saves, keeps the parameters: each if the plan says so."""
    folder = Path(plan["folder"])
    training = Training(**plan.get("options", {}))
    if "load" in plan:
        training.load(Path(plan["load"]))
    begun = training.factors()
    training.run(plan["until"])
    if "save" in plan:
        training.save(Path(plan["save"]))
    kept = {"begun": begun, "factors": training.factors(), "parameters": training.parameters()}
    torch.save(kept, folder / f"{plan['name']}_{training.rank}.pt")


def main(plans: Sequence[dict[str, Any]]) -> None:
    collectives.join_world(torch.device("cpu"), datetime.timedelta(seconds=20))
    (Path(plans[0]["folder"]) / f"process_{os.getpid()}").touch()
    for plan in plans:
        carry_out(plan)
        if dist.is_initialized():
            dist.barrier()
    collectives.leave_world()


if __name__ == "__main__":
    main([{**plan, "folder": json.loads(sys.argv[1])["folder"]} for plan in json.loads(sys.argv[1])["plans"]])
