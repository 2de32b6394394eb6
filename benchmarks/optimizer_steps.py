"""What the step of an optimizer costs, without the passes through the model: RSG and ARSG beside torch's.

    python benchmarks/optimizer_steps.py

Each contestant has a copy of one model with gradients of the same random numbers. Rounds take them in turn, so that a
slow minute of the machine slows all; a ratio is the median over rounds of a contestant's processor time over that of
`torch.optim.AdamW(foreach=True)` in the same round. Memory is the state that lies there after a step.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from kaisa.optim import ARSG, RSG
from kaisa.recipes.models import build_model
from kaisa.recipes.record import describe_machine, describe_versions, find_commit

RESULTS = Path(__file__).with_name("results") / "optimizer_steps.json"
BESIDE = "AdamW, foreach"
CONTESTANTS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    BESIDE: partial(torch.optim.AdamW, lr=1e-3, foreach=True),
    "AdamW, as torch chooses": partial(torch.optim.AdamW, lr=1e-3),
    "AdamW, fused": partial(torch.optim.AdamW, lr=1e-3, fused=True),
    "SGD with momentum, foreach": partial(torch.optim.SGD, lr=1e-3, momentum=0.9, foreach=True),
    "RSG": partial(RSG, lr=1e-3),
    "ARSG": partial(ARSG, lr=1e-3),
    "ARSG, Adam-type": partial(ARSG, lr=1e-3, preconditioner="adam"),
    "ARSG, loop": partial(ARSG, lr=1e-3, foreach=False),
}


def transformer() -> nn.Module:
    """Build four encoder layers of width 256."""
    return nn.Sequential(*(nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True) for _ in range(4)))


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet20": (partial(build_model, "resnet20", (3, 32, 32), 10), 20),
    "transformer": (transformer, 3),
}


def prepare(build: Callable[[], nn.Module], make: Callable[..., torch.optim.Optimizer]) -> torch.optim.Optimizer:
    """Return an optimizer whose parameters have gradients."""
    torch.manual_seed(0)
    parameters = list(build().parameters())
    for parameter in parameters:
        parameter.grad = 0.01 * torch.randn_like(parameter)
    return make(parameters)


def count_state(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of what an optimizer remembers."""
    values = [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


def measure(name: str, rounds: int) -> list[dict[str, Any]]:
    """Return a row for each contestant on a model."""
    build, repeats = MODELS[name]
    optimizers = {key: prepare(build, make) for key, make in CONTESTANTS.items()}
    seconds: dict[str, list[float]] = {key: [] for key in optimizers}
    for _ in range(rounds + 1):
        for key, optimizer in optimizers.items():
            start = time.process_time()
            for _ in range(repeats):
                optimizer.step()
            seconds[key].append((time.process_time() - start) / repeats)
    beside = seconds[BESIDE][1:]
    return [
        {
            "model": name,
            "optimizer": key,
            "milliseconds": 1e3 * median(own[1:]),
            "ratio": median(mine / theirs for mine, theirs in zip(own[1:], beside, strict=True)),
            "state_bytes": count_state(optimizers[key]),
        }
        for key, own in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for name in MODELS for row in measure(name, given.rounds)]
    table = Table("model", "optimizer", "ms a step", "over AdamW, foreach", "state, MB")
    for row in rows:
        figures = f"{row['milliseconds']:.2f}", f"{row['ratio']:.2f}", f"{row['state_bytes'] / 1e6:.1f}"
        table.add_row(row["model"], row["optimizer"], *figures)
    Console().print(table)
    about = {"machine": describe_machine(), "versions": describe_versions(), "commit": find_commit()}
    given.output.write_text(json.dumps({**about, "rounds": given.rounds, "rows": rows}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
