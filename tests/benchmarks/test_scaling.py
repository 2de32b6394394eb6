"""The study's figures follow from the model by simple rules, and its page and pictures from its figures."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kaisa.kfac.hardware import Hardware
from kaisa.kfac.placement import FactorShape, LayerShape
from kaisa.kfac.workload import LayerWork, Workload

ROOT = Path(__file__).parents[2]
FILE = ROOT / "benchmarks" / "scaling.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    specification = importlib.util.spec_from_file_location("scaling_benchmark", FILE)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    value: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / "scaling.json").read_text())
    return value


def layer(name: str, a: int, g: int) -> LayerWork:
    return LayerWork(LayerShape(name, FactorShape(a), FactorShape(g), (1, g, a)), 100)


WORKLOAD = Workload("some", (layer("large", 2048, 512), *(layer(f"small{i}", 512, 512) for i in range(20))), 1e9, 10**7)


def test_the_wall_is_all_decompositions_over_the_longest(benchmark: ModuleType) -> None:
    found = benchmark.wall(WORKLOAD, Hardware.load("h100"), "eigen")
    small, large = (Hardware.load("h100").decomposition_seconds("eigen", n) for n in (512, 2048))
    assert found["ranks"] == pytest.approx(1 + 41 * small / large)
    assert found["ranks_by_operations"] == pytest.approx(1 + 41 / 64)
    assert (found["side"], found["longest"]) == (2048, large)


def test_a_point_is_made_of_its_parts(benchmark: ModuleType) -> None:
    """Where nothing is hidden, parts add up to what K-FAC adds."""
    found = benchmark.point(WORKLOAD, Hardware.load("h100"), 1)
    assert found["workers"] == 1
    assert benchmark.exchanging(found) == 0
    assert benchmark.computing(found) == pytest.approx(found["added"])


def test_more_ranks_hold_less_and_do_not_beat_the_wall(benchmark: ModuleType) -> None:
    points = [benchmark.point(WORKLOAD, Hardware.load("h100"), ranks) for ranks in (4, 64)]
    few, many = points
    assert many["memory"]["smallest_held"] < few["memory"]["smallest_held"]
    assert many["memory"]["reference_least"] > many["memory"]["smallest_held"]
    assert many["decompose"]["eigen"] >= benchmark.wall(WORKLOAD, Hardware.load("h100"), "eigen")["longest"]
    assert few["decompose"]["eigen"] > 1.05 * many["decompose"]["eigen"]
    assert benchmark.reached_wall(points) == 64


def test_traffic_takes_over_where_it_stays_above(benchmark: ModuleType) -> None:
    def entry(ranks: int, exchanging: float) -> dict[str, Any]:
        parts = dict.fromkeys((*benchmark.COMPUTING, *benchmark.EXCHANGES), 0.0)
        return {"ranks": ranks, "parts": {**parts, "solve": 1.0, "spread": exchanging}}

    assert benchmark.takeover([entry(8, 2.0), entry(16, 0.5), entry(32, 1.5), entry(64, 1.1)]) == 32
    assert benchmark.takeover([entry(8, 2.0), entry(16, 0.5)]) is None


@pytest.mark.parametrize("page", ["docs/scaling-study.md"])
def test_every_figure_of_the_page_is_that_of_the_file(
    benchmark: ModuleType, figures: dict[str, Any], page: str, tmp_path: Path
) -> None:
    copied = tmp_path / "page.md"
    copied.write_text((ROOT / page).read_text(encoding="utf-8"), encoding="utf-8")
    benchmark.write_page(figures, copied)
    assert copied.read_text(encoding="utf-8") == (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_file_is_what_the_model_says_today(benchmark: ModuleType, figures: dict[str, Any]) -> None:
    found = benchmark.study("resnet50", "h100", (8, 64))
    kept = next(each for each in figures["studies"] if (each["model"], each["machine"]) == ("resnet50", "h100"))
    assert found["walls"] == kept["walls"]
    for each in found["points"]:
        (other,) = (old for old in kept["points"] if old["ranks"] == each["ranks"])
        assert each["workers"] == other["workers"]
        assert each["added"] == pytest.approx(other["added"])


def test_pictures_have_a_panel_for_each_model(benchmark: ModuleType, figures: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    benchmark.draw(figures, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        f"scaling-{name}.png" for name in ("steps", "wall", "memory", "changes")
    }
