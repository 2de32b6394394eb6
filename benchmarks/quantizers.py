"""What each quantiser costs, beside a copy and beside reflections by N × N products, as in the original.

    python benchmarks/quantizers.py

Each works on a million numbers of N samples, one of which stands out, at 4 bits. Rounds take the contestants in turn on
one thread; a ratio is the median over rounds of processor time over that of a copy into a tensor that is there, in the
same round. The products are given their matrices: what the original spends on making them, on the host, is not counted.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from kaisa.grids import noise_like, spanning
from kaisa.quantize import quantize
from kaisa.quantize.quantizers import KINDS
from kaisa.quantize.reflections import reflections_of
from kaisa.recipes.record import describe_machine, describe_versions, find_commit

RESULTS = Path(__file__).with_name("results") / "quantizers.json"
NUMBERS, BITS = 2**20, 4
SAMPLES = (32, 128, 512, 2048)
COPY = "copy"


def by_products(x: Tensor) -> Callable[[], Tensor]:
    """Return block Householder by two products with N × N matrices, rounded by ``torch.rand``."""
    transform = reflections_of(x)
    forward = transform.apply(torch.eye(len(x)))
    back = transform.inverse(torch.eye(len(x)))

    def quantized() -> Tensor:
        y = forward @ x
        grid = spanning(y.amin(1, keepdim=True), y.amax(1, keepdim=True), 2**BITS - 1)
        codes = grid.coordinates(y).add_(torch.rand_like(y)).floor_().clamp_(0, grid.bins)
        return back @ grid.decode(codes)

    return quantized


def contestants(x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Return what takes part."""
    there = torch.empty_like(x)
    own = {kind: lambda kind=kind: quantize(x, kind, BITS) for kind in KINDS}
    others = {
        COPY: lambda: there.copy_(x),
        "noise alone": lambda: noise_like(x),
        "torch.rand alone": lambda: torch.rand_like(x),
        "ptq, to the nearest": lambda: quantize(x, "ptq", BITS, stochastic=False),
    }
    return {**others, **own, "bhq by N × N products": by_products(x)}


def measure(samples: int, rounds: int) -> list[dict[str, Any]]:
    """Return a row for each contestant."""
    torch.manual_seed(0)
    x = torch.randn(samples, NUMBERS // samples) * 1e-3
    x[samples // 3] *= 1000
    runs = contestants(x)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    beside = seconds[COPY][1:]
    return [
        {
            "samples": samples,
            "quantizer": name,
            "milliseconds": 1e3 * median(own[1:]),
            "ratio": median(mine / theirs for mine, theirs in zip(own[1:], beside, strict=True)),
        }
        for name, own in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for samples in SAMPLES for row in measure(samples, given.rounds)]
    table = Table("samples", "quantizer", "ms a million numbers", "over a copy")
    for row in rows:
        table.add_row(
            str(row["samples"]), row["quantizer"], f"{row['milliseconds']:.2f}", f"{row['ratio']:.1f}"
        )  # fmt: skip
    Console().print(table)
    about = {"machine": describe_machine(), "versions": describe_versions(), "commit": find_commit()}
    settings = {"numbers": NUMBERS, "bits": BITS, "rounds": given.rounds, "seed": 0}
    given.output.write_text(json.dumps({**about, **settings, "rows": rows}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
