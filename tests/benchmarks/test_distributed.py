"""The meter counts by hand-made rules, and the verdicts follow from the figures."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist

FILE = Path(__file__).parents[2] / "benchmarks" / "distributed.py"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for name in ("all_reduce", "broadcast", "all_to_all_single"):
        monkeypatch.setattr(dist, name, lambda *arguments, **options: None)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 4)
    monkeypatch.setattr(dist, "get_rank", lambda group=None: 1)
    specification = importlib.util.spec_from_file_location("distributed_benchmark", FILE)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(__import__("sys").modules, "distributed_benchmark", module)
    specification.loader.exec_module(module)
    return module


def test_the_meter_counts_what_leaves_a_rank(benchmark: ModuleType) -> None:
    meter = benchmark.Meter()
    meter.install()
    dist.all_reduce(torch.zeros(10))
    assert (meter.bytes, meter.calls) == (2 * 3 / 4 * 40, 1)
    dist.broadcast(torch.zeros(10), src=2)
    assert (meter.bytes, meter.calls) == (60 + 30, 2)
    dist.broadcast(tensor=torch.zeros(10), src=2)
    assert (meter.bytes, meter.calls) == (90 + 30, 3)
    dist.all_to_all_single(torch.zeros(8), torch.zeros(10), [2, 2, 2, 2], [1, 4, 3, 2])
    assert (meter.bytes, meter.calls) == (120 + 4 * (10 - 4), 4)


def test_the_time_of_a_step_spreads_what_is_due_now_and_then(benchmark: ModuleType) -> None:
    assert benchmark.spread(10.0, 20.0, 120.0) == pytest.approx(10 + 1 + 1)


def row(library: str, fraction: float, scale: float) -> dict[str, Any]:
    return {
        "library": library,
        "fraction": fraction,
        "milliseconds": {"step": 10 * scale},
        "bytes": {"factor_update": 100 * scale, "inverse_update": 0, "plain_step": 0, "step": 10 * scale},
        "collectives": {"step": scale, "all_due": scale},
        "memory": {"most": 50 * scale},
    }


def test_the_verdicts_compare_with_the_fastest_fraction_of_the_other(benchmark: ModuleType) -> None:
    results = [
        *(row("kaisa", fraction, 1.0) for fraction in (1.0, 0.5)),
        row("kaisa, bfloat16", 0.5, 0.45),
        row("kfac-pytorch", 1.0, 4.0),
        row("kfac-pytorch", 0.5, 0.9),
    ]
    verdicts = benchmark.judge([{"model": "stack", "ranks": 2, "results": results}])
    found = {verdict["figure"]: (round(verdict["ratio"], 4), verdict["reached"]) for verdict in verdicts}
    assert found["step time, COMM-OPT to their fastest"] == (1.1111, False)
    assert found["step time, both at fraction 1"] == (0.25, True)
    assert found["bytes of a factor update"] == (1.1111, False)
    assert found["bytes of a factor update, bfloat16"] == (0.5, False)
    assert found["bytes of a factor update, COMM-OPT, on average"] == (0.1111, True)
    assert found["bytes of a step, fraction 1"] == (0.25, True)
    assert found["collectives of a step, all due, fraction 0.5"] == (1.1111, False)
    assert found["memory at fraction 0.5"] == (1.1111, False)


def test_without_the_other_library_there_is_no_verdict(benchmark: ModuleType) -> None:
    entry = {"model": "stack", "ranks": 2, "results": [row("kaisa", 1.0, 1.0), row("kaisa, bfloat16", 1.0, 1.0)]}
    assert benchmark.judge([entry]) == []


def test_the_figures_take_the_place_between_the_marks_of_a_page(benchmark: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- measured -->\nold\n<!-- end of measured -->\nafter\n")
    entry = {"model": "stack", "ranks": 2, "rounds": 3, "results": [row("kaisa", 1.0, 1.0)]}
    benchmark.write_page({"measurements": [entry], "targets": []}, page)
    text = page.read_text()
    assert text.startswith("before\n<!-- measured -->\n")
    assert text.endswith("<!-- end of measured -->\nafter\n")
    assert "old" not in text
    assert "| kaisa, 1 | 10.0 | 0 | 0 | 0 | 1 | 0 |" in text
