"""How many model calls a second Anchors and CLE make, beside the originals, on the same instances.

    python benchmarks/explanations.py

The model is a function that costs next to nothing, so that what is measured is what the method does between calls. A
call is one input that the model is asked about; time is processor time of one thread. Originals (anchor-exp for
Anchors, x-deep for CLE) take part when they can be imported: `pip install --no-deps -r requirements-peers.txt`.
Rounds take library and original in turn; a figure is the median over rounds.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from kaisa.explain import explain
from kaisa.recipes.record import describe_machine, describe_versions, find_commit

RESULTS = Path(__file__).with_name("results") / "explanations.json"
FEATURES, ROWS, SAMPLES = 12, 2000, 5000
Array = np.ndarray[Any, Any]


class Model:
    """Says of rows whether three features together are large; counts what it is asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, rows: Array) -> Array:
        rows = np.asarray(rows, dtype=float)
        self.calls += len(rows)
        score = 1 / (1 + np.exp(-(4 * (rows[:, 0] > 0) + 3 * (rows[:, 1] > 0) + 2 * (rows[:, 2] > 0.5) - 6)))
        return np.stack([1 - score, score], 1)


def table() -> tuple[Array, Array]:
    """Return training rows, and the instance: the first row of class 1 far from every threshold."""
    rows = np.random.default_rng(0).normal(size=(ROWS, FEATURES))
    row = rows[0].copy()
    row[:3] = 1.5
    return rows, row


def our_anchors(model: Model, rows: Array, row: Array, seed: int) -> None:
    explain(model, row[None], "anchors", training=rows, seed=seed, batch_size=4096, certificate_samples=100, beam=1)


def our_cle(model: Model, rows: Array, row: Array, seed: int) -> None:
    explain(model, row[None], "cle", target=1, training=rows, samples=SAMPLES, seed=seed, batch_size=SAMPLES)


def original_anchors() -> Callable[..., None]:
    from anchor.anchor_tabular import AnchorTabularExplainer

    made: list[Any] = []

    def run(model: Model, rows: Array, row: Array, seed: int) -> None:
        if not made:
            names = [f"x{index}" for index in range(FEATURES)]
            made.append(AnchorTabularExplainer(["0", "1"], names, rows))
        np.random.seed(seed)  # noqa: NPY002  it draws from there
        made[0].explain_instance(row, lambda batch: model(batch).argmax(1), batch_size=100)

    return run


def original_cle() -> Callable[..., None]:
    from xdeep.xlocal.perturbation.cle.cle_tabular import CLETabularExplainer

    made: list[Any] = []

    def run(model: Model, rows: Array, row: Array, seed: int) -> None:
        if not made:
            made.append(CLETabularExplainer(rows, random_state=0))
        made[0].explain_instance(row, model, num_samples=SAMPLES)

    return run


def rate(run: Callable[..., None], seed: int) -> dict[str, float]:
    """Return calls, processor time and calls a second of one explanation."""
    rows, row = table()
    model = Model()
    begun = time.process_time()
    run(model, rows, row, seed)
    seconds = time.process_time() - begun
    return {"calls": model.calls, "seconds": seconds, "calls_per_second": model.calls / seconds}


def measure(rounds: int) -> dict[str, Any]:
    """Return the rates of each method, ours and the original's, or why there is no original."""
    found: dict[str, Any] = {}
    for name, ours, load in (("anchors", our_anchors, original_anchors), ("cle", our_cle, original_cle)):
        contestants: dict[str, Callable[..., None]] = {"kaisa": ours}
        missing = ""
        try:
            contestants["original"] = load()
        except ImportError as error:
            missing = f"the original cannot be imported: {error}"
        runs: dict[str, list[dict[str, float]]] = {key: [] for key in contestants}
        for seed in range(rounds + 1):
            for key, run in contestants.items():
                timed = rate(run, seed)
                if seed:  # the first is to warm up
                    runs[key].append(timed)
        found[name] = {
            key: {figure: median(run[figure] for run in timed) for figure in timed[0]} for key, timed in runs.items()
        }
        if missing:
            found[name]["missing"] = missing
        else:
            ratio = found[name]["kaisa"]["calls_per_second"] / found[name]["original"]["calls_per_second"]
            found[name]["ratio"] = ratio
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the originals use is deprecated
        found = measure(options.rounds)
    shown = Table("method", "who", "calls", "calls/s", "ratio")
    for name, figures in found.items():
        for who in ("kaisa", "original"):
            if who in figures:
                run = figures[who]
                ratio = f"{figures['ratio']:.1f}" if who == "kaisa" and "ratio" in figures else ""
                shown.add_row(name, who, f"{run['calls']:.0f}", f"{run['calls_per_second']:.0f}", ratio)
        if "missing" in figures:
            shown.add_row(name, figures["missing"], "", "", "")
    Console().print(shown)
    record = {
        "machine": describe_machine(),
        "versions": describe_versions(),
        "commit": find_commit(),
        "rounds": options.rounds,
        "figures": found,
    }
    options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
