"""What the benchmarks of training in few bits make of their measurements."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from kaisa.quantize import QuantConfig, quantized_layers
from kaisa.recipes.options import Options
from kaisa.recipes.tasks import Lesson

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def step() -> Iterator[ModuleType]:
    yield load("quantized_step")
    del sys.modules["quantized_step"]


@pytest.fixture(scope="module")
def training() -> Iterator[ModuleType]:
    yield load("quantized_training")
    del sys.modules["quantized_training"]


def results(scores: dict[str, list[float | None]]) -> dict[str, Any]:
    runs = [{"way": way, "seed": seed, "score": s} for way, found in scores.items() for seed, s in enumerate(found)]
    return {"settings": {"model": "resnet20", "steps": 3}, "score": "accuracy", "runs": runs}


def test_every_way_takes_its_steps_in_its_own_mode(step: ModuleType) -> None:
    model, seen = nn.Linear(2, 2), []

    def loss(own: nn.Module) -> torch.Tensor:
        layers = list(quantized_layers(own).values())
        seen.append(layers[0].quantization.mode if layers else "float")
        return own(torch.ones(1, 2)).sum()

    ways = {"float32": None, "a": QuantConfig(mode="qat"), "b": QuantConfig()}
    seconds = step.measure(step.Workload(model, loss, ways), ways, 2, iter(range(100)).__next__)
    assert seconds == {"float32": [1, 1], "a": [1, 1], "b": [1, 1]}
    assert seen == ["float", "qat", "fqt", "qat", "fqt", "float", "fqt", "float", "qat"]


def test_a_ratio_is_the_median_over_rounds(step: ModuleType) -> None:
    row = step._summary([1.0, 4.0, 3.0], [2.0, 4.0, 1.0])
    assert (row["ratio"], row["speed"], row["lowest_ratio"], row["highest_ratio"]) == (1.0, 1.0, 0.5, 3.0)


def test_a_run_that_diverged_is_not_a_number_among_the_means(training: ModuleType) -> None:
    means = training.means(results({"qat:8": [0.5, 0.7], "ptq:4": [0.1, None]}))
    assert means["qat:8"] == (pytest.approx(0.6), pytest.approx(0.1), 2)
    assert math.isnan(means["ptq:4"][0])


def test_ways_are_compared_with_qat_seed_by_seed(training: ModuleType) -> None:
    study = results({"bhq:4": [0.4, 0.5, 0.9], "qat:8": [0.5, 0.7], "ptq:4": [None, 0.1]})
    found = training.differences(study)
    assert found["bhq:4"] == (pytest.approx(-0.15), pytest.approx(0.05), 2)  # of the third seed there is no QAT
    assert found["qat:8"] == (0, 0, 2)
    assert math.isnan(found["ptq:4"][0])
    assert training.differences(results({"bhq:4": [0.4]})) == {}


def test_what_there_is_so_far_can_be_drawn(training: ModuleType, tmp_path: Path) -> None:
    study = results(
        {"float": [0.8], "qat:8": [0.7, 0.71], "bhq:5": [0.7, 0.72], "bhq:4": [0.6], "bhq:4,8": [0.7], "ptq:4": [None]}
    )
    training.draw(tmp_path / "images" / "out.png", [study, study])
    assert (tmp_path / "images" / "out.png").stat().st_size > 1000


def test_a_study_goes_on_where_it_was(training: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = []

    def train(lesson: Lesson, options: Options, way: str, seed: int, steps: int) -> dict[str, Any]:
        done.append((way, seed))
        return {"way": way, "seed": seed, "score": 0.5}

    class Data:
        def lesson(self, options: Options, seed: int) -> None:
            return None

    monkeypatch.setattr(training, "train", train)
    monkeypatch.setattr(training, "read_data", lambda options: Data())
    output = tmp_path / "study.json"
    training.study("resnet", "images.zip", output, ["qat:8"], [0])
    training.study("resnet", "images.zip", output, ["qat:8", "bhq:5"], [0, 1])
    assert done == [("qat:8", 0), ("bhq:5", 0), ("qat:8", 1), ("bhq:5", 1)]
    assert len(json.loads(output.read_text())["runs"]) == 4


def test_a_way_may_have_other_bits_at_the_last_layer(training: ModuleType) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.LazyLinear(3), nn.ReLU(), nn.Linear(3, 2))
    assert training.read_way("bhq:4,8", model).gradient_bits == {"0": 4, "2": 4, "4": 8}
    assert training.read_way("bhq:4", model).gradient_bits == 4


@pytest.mark.parametrize("way", ["float", "qat:8", "bhq:4"])
def test_a_run_has_the_score_of_all_that_is_tested_on(training: ModuleType, way: str) -> None:
    from kaisa.recipes.data import read_data

    options = Options.complete({"model": "cnn", "epochs": 1, "batch_size": 64, "contestants": "first-order"})
    lesson = read_data(options).lesson(options, 0)
    run = training.train(lesson, options, way, 0, 3)
    assert 0 <= run["score"] <= 1
    assert math.isfinite(run["test_loss"])
