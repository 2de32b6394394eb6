"""A rank of a small run under torchrun that meets with a fault: python -m torch.distributed.run … fault_worker.py JSON.

The plan is a JSON object: what happens, to which rank, at which step. Results are files in its folder.
"""

from __future__ import annotations

import datetime
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import kaisa
from kaisa.errors import ConfigurationError, KaisaError
from kaisa.kfac import checkpoint, collectives

PLAN: dict[str, Any] = json.loads(sys.argv[1])
FOLDER = Path(PLAN["folder"])
STEPS, INTERVAL = 6, 2
IN, OUT, EXAMPLES = 3, 2, 12


def is_hit(fault: str, step: int | None = None) -> bool:
    """Whether a fault falls on this rank at this step; in the first life of the run alone."""
    return (
        PLAN.get("fault") == fault
        and dist.get_rank() == PLAN.get("rank", 1)
        and (step is None or step == PLAN["step"])
        and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    )


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def network() -> nn.Module:
    torch.manual_seed(1 if is_hit("other_parameters") else 0)
    wide = 5 if is_hit("other_width") else 4
    layers = [nn.Linear(IN, wide), nn.Tanh(), nn.Linear(wide, wide), nn.Tanh(), nn.Linear(wide, OUT)]
    if is_hit("other_depth"):
        layers += [nn.Tanh(), nn.Linear(OUT, OUT)]
    return nn.Sequential(*layers).double()


def options() -> dict[str, Any]:
    chosen = {"factor_update_steps": 1, "inv_update_steps": 2, "damping": 0.03, "inv_dtype": torch.float64}
    chosen.update(PLAN.get("options", {}))
    if is_hit("other_options"):
        chosen["factor_update_steps"] = 7
    if is_hit("other_fraction"):
        chosen["grad_worker_fraction"] = "comm"
    if is_hit("other_seed"):
        chosen["seed"] = 7
    if is_hit("bad_options"):
        chosen["damping"] = -1.0
    return chosen


class Killed(nn.Module):
    """Dies in the forward pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.step = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.model[0](x)
        if is_hit("kill_in_forward", self.step):
            die()
        return self.model[1:](x)


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's equal share of the batch of a step."""
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(EXAMPLES, IN, generator=generator, dtype=torch.float64)
    y = torch.randint(OUT, (EXAMPLES,), generator=generator)
    size = EXAMPLES // dist.get_world_size()
    part = slice(dist.get_rank() * size, (dist.get_rank() + 1) * size)
    return x[part], y[part]


def arm(kfac: kaisa.KFACPreconditioner, step: int) -> None:
    """Makes this rank die in the middle of a collective or of a checkpoint."""
    if is_hit("kill_in_reduction", step):
        kfac.collectives.exchange = lambda *arguments: die()
    if is_hit("kill_before_shard", step):
        kfac.collectives.write_shards = lambda *arguments: die()
    if is_hit("kill_after_shard", step):
        write = kfac.collectives.write_shards
        kfac.collectives.write_shards = lambda *arguments: (write(*arguments), die())
    if is_hit("kill_before_rename", step):
        checkpoint._publish = lambda *arguments: die()


def one_step(
    model: nn.Module, wrapped: nn.Module, optimizer: torch.optim.Optimizer, kfac: kaisa.KFACPreconditioner, step: int
) -> None:
    model.step = step
    x, y = batch(step)
    if dist.get_rank() == 1:
        time.sleep(PLAN.get("slow", 0.0))
    loss = F.cross_entropy(wrapped(x), y)
    if is_hit("nan", step):
        loss = loss * float("nan")
    loss.backward()
    for parameter in model.parameters():
        parameter.grad.nan_to_num_(0.0)
    if not is_hit("skips_step", step):
        kfac.step()
    optimizer.step()
    optimizer.zero_grad()


def train() -> None:
    model = Killed(network())
    wrapped = DistributedDataParallel(model) if PLAN.get("ddp", True) else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    kfac = kaisa.KFACPreconditioner(wrapped, optimizer, **options())
    if checkpoint.latest(FOLDER / "checkpoints") is not None:
        extra = checkpoint.load(FOLDER / "checkpoints", kfac, wrapped, optimizer)
        assert extra == {"seen": kfac.steps * EXAMPLES}
        (FOLDER / f"resumed_at_{kfac.steps}").touch()
    for step in range(kfac.steps, PLAN.get("until", STEPS)):
        (FOLDER / f"started_{dist.get_rank()}").touch()
        if is_hit("exhausted", step):
            return
        if PLAN.get("fault") == "interrupted":
            time.sleep(0.2)
        arm(kfac, step)
        one_step(model, wrapped, optimizer, kfac, step)
        if (step + 1) % INTERVAL == 0 and PLAN.get("saves", True):
            checkpoint.save(FOLDER / "checkpoints", kfac, wrapped, optimizer, {"seen": kfac.steps * EXAMPLES})
    factors = {f"{name}/{side}": getattr(pair, side) for name, pair in kfac.factors.items() for side in ("a", "g")}
    result = {"parameters": dict(model.named_parameters()), "factors": factors}
    torch.save(result, FOLDER / f"result_{dist.get_rank()}.pt")


def build(fault: str) -> None:
    """Notes what a rank is told when it is built differently from the others, or they from it."""
    PLAN["fault"] = fault
    model = network()
    try:
        kaisa.KFACPreconditioner(model, torch.optim.SGD(model.parameters(), lr=0.05), **options())
    except ConfigurationError as error:
        (FOLDER / f"{fault}_{dist.get_rank()}").write_text(f"{type(error).__name__}: {error}")


def main() -> None:
    collectives.join_world(torch.device("cpu"), datetime.timedelta(seconds=PLAN.get("timeout", 6)))
    (FOLDER / f"process_{os.getpid()}").touch()
    if PLAN.get("fault") not in (None, "interrupted") and PLAN.get("bears_the_agent", True):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # with which the agent ends the others before they can tell
    begin = time.monotonic()
    try:
        with collectives.absent_ranks_named():
            for fault in PLAN.get("constructions", ()):
                build(fault)
            if "constructions" not in PLAN:
                train()
    except (KaisaError, RuntimeError) as error:
        line = f"{time.monotonic() - begin:.1f} {type(error).__name__}: {error}"
        (FOLDER / f"error_{dist.get_rank()}").write_text(line)
        raise
    collectives.leave_world()


if __name__ == "__main__":
    main()
