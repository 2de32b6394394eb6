"""The largest batch is the largest, tables say what was measured, and an interrupted study goes on."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

FILE = Path(__file__).parents[2] / "benchmarks" / "fixed_memory.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    specification = importlib.util.spec_from_file_location("fixed_memory", FILE)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["fixed_memory"] = module
    specification.loader.exec_module(module)
    return module


PEAKS: dict[str, Callable[[int], int]] = {
    "a line": lambda batch: 1000 + 10 * batch,
    "steeper at the end": lambda batch: 1000 + 10 * batch + (batch > 100) * 25 * (batch - 100),
    "flatter at the end": lambda batch: 1000 + 10 * batch - (batch > 100) * 6 * (batch - 100),
    "a step": lambda batch: 1000 + 400 * (batch // 40),
}


@pytest.mark.parametrize("peak_of", PEAKS.values(), ids=PEAKS)
@pytest.mark.parametrize("budget", [1300, 2222, 4000])
def test_the_largest_batch_fits_and_the_next_does_not(
    peak_of: Callable[[int], int], budget: int, benchmark: ModuleType
) -> None:
    found = benchmark.search(peak_of, budget)
    assert found % benchmark.STEP == 0
    assert peak_of(found) <= budget < peak_of(found + benchmark.STEP)


def test_nothing_fits_into_no_memory(benchmark: ModuleType) -> None:
    assert benchmark.search(PEAKS["a line"], 900) is None


def test_batches_go_through_all_examples_before_any_comes_again(benchmark: ModuleType) -> None:
    order = benchmark.endless(10, 4, seed=3)
    rows = torch.cat([next(order) for _ in range(5)])
    assert sorted(rows[:10].tolist()) == sorted(rows[10:].tolist()) == list(range(10))


def test_what_is_left_for_kfac_lies_on_the_line_between_tried_batches(benchmark: ModuleType) -> None:
    assert benchmark.on_line({16: 100, 64: 580}, 64) == 580
    assert benchmark.on_line({16: 100, 64: 580}, 40) == 340
    assert benchmark.on_line({16: 100, 64: 580}, 72) == 660


def measured(steps: int, reached: bool) -> dict[str, Any]:
    run = {
        "reached": reached,
        "steps": steps,
        "examples": 1000,
        "seconds": 9.0,
        "processor_seconds": 4.0,
        "others": 1.5,
    }
    return {
        "peaks": [{"batch": 8, "peak": 2**20, "held": 2**19}, {"batch": 16, "peak": 3 * 2**20, "held": 2**19}],
        "largest": 8,
        "runs": [{**run, "accuracies": [0.2, 0.96], "fraction": 0.25}],
    }


def test_the_table_has_what_was_measured_and_says_where_the_target_was_missed(
    benchmark: ModuleType, tmp_path: Path
) -> None:
    value = {"setting": {"budget": 24 * 2**20, "seeds": [0], "cores": 2}, "contestants": {}}
    file, page = tmp_path / "found.json", tmp_path / "page.md"
    benchmark.write(file, value)
    benchmark.put(file, "kaisa, auto", measured(30, True))
    benchmark.put(file, "SGD alone", measured(200, False))
    page.write_text(f"before\n{benchmark.MARKS[0]}\nformer\n{benchmark.MARKS[1]}\nafter\n")
    benchmark.write_page(page, benchmark.describe(json.loads(file.read_text())))
    text = page.read_text()
    assert "| kaisa, auto (chose 0.25) | 0.5 | 8 | 1.0 | 30 | 4.00 | 4.0 | 9.0 |" in text
    assert "| SGD alone | 0.5 | 8 | 1.0 | not in 200 (96.0 %) | 4.00 | – | – |" in text
    assert "Budget 24 MiB a rank, medians of 1 seeds. Meanwhile other work kept 1.5 to 1.5 of 2 cores busy" in text
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "former" not in text
