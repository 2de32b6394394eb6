"""Which learning rate suits which contestant of `make train`: the same grid for both.

    python benchmarks/digits_learning_rates.py

The seeds, hence weights, batches and held-out digits, are not those of `make train`. The rate taken
is the one with the fewest epochs to the target in the median, and among equals with the highest
accuracy at the end. A run that misses the target counts as infinitely long.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kaisa.recipes.comparison import compare, start_comparison
from kaisa.recipes.data import read_data
from kaisa.recipes.options import Options
from kaisa.recipes.progress import TerminalProgress
from kaisa.recipes.record import describe_machine, describe_versions, find_commit
from kaisa.recipes.target import Result, summarize

RATES = (0.03, 0.05, 0.1, 0.14, 0.2, 0.3)
SEED, REPEATS = 100, 3
RESULTS = Path(__file__).with_name("results") / "digits_learning_rates.json"


def try_rate(rate: float, console: Console) -> list[Result]:
    """Run both contestants with a learning rate."""
    given = {"lr": rate, "kfac_lr": rate, "seed": SEED, "repeats": REPEATS}
    options = Options.complete(given)
    data = read_data(options)
    with tempfile.TemporaryDirectory() as folder, TerminalProgress(console) as progress:
        record = start_comparison(options, data, Path(folder))
        compare(record, data, Path(folder), progress)
    return summarize(record)


def build_table(results: list[Result]) -> Table:
    """Return a row for each contestant and rate."""
    table = Table("contestant", "learning rate", "runs at 97 %", "epochs to it", "final accuracy")
    for result in sorted(results, key=lambda result: (result.contestant, result.learning_rate)):
        table.add_row(
            result.contestant,
            f"{result.learning_rate:g}",
            f"{result.reached} of {result.runs}",
            f"{result.epochs:g}",
            f"{result.score:.1%}",
        )
    return table


def describe(results: list[Result]) -> dict[str, Any]:
    """Return what the file of results holds; an infinite number of epochs is null there."""
    rows = [{k: None if v == float("inf") else v for k, v in asdict(r).items()} for r in results]
    about = {"machine": describe_machine(), "versions": describe_versions(), "commit": find_commit()}
    return {**about, "seed": SEED, "results": rows}


def main() -> None:
    console = Console()
    results = [result for rate in RATES for result in try_rate(rate, console)]
    console.print(build_table(results))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(describe(results), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
