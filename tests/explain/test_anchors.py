"""Anchors: known rules are found in tables, texts and images, and what is certified holds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kaisa.errors import DataError
from kaisa.explain import explain
from kaisa.explain.rows import Table


@pytest.fixture(scope="module")
def training() -> np.ndarray:
    random = np.random.default_rng(0)
    return np.column_stack([random.normal(size=(1500, 3)), random.integers(0, 3, 1500)])


def rule(rows: np.ndarray) -> np.ndarray:
    """Class 1 where the first feature is above its median (about) and the category is 2."""
    is_one = (rows[:, 0] > 0.0) & (rows[:, 3] == 2)
    return np.stack([~is_one, is_one], 1).astype(float)


def test_the_rule_of_a_table_is_found(training: np.ndarray) -> None:
    median = np.median(training[:, 0])
    row = np.array([[1.5, 0.3, -0.2, 2.0]])
    known = lambda rows: rule(rows - [median, 0, 0, 0])  # noqa: E731
    said = explain(known, row, "anchors", training=training, categorical=[3], names=["a", "b", "c", "kind"])
    told = said.details["inputs"][0]
    assert set(told["rule"]) == {f"a > {median:.4g}", "kind = 2"}
    assert told["is_anchor"]
    assert said.values.tolist() == [[1, 0, 0, 1]]
    assert said.quality["certified_precision"][0] > 0.95
    assert said.quality["coverage"][0] == pytest.approx(1 / 6, abs=0.04)


def test_counterexamples_keep_the_rule_and_break_the_prediction(training: np.ndarray) -> None:
    median = np.median(training[:, 0])

    def noisy(rows: np.ndarray) -> np.ndarray:
        is_one = (rows[:, 0] > median) & (np.modf(np.abs(rows[:, 1]) * 1000)[0] > 0.1)
        return np.stack([~is_one, is_one], 1).astype(float)

    row = np.array([[1.5, 0.3005, 0.1, 1.0]])
    said = explain(noisy, row, "anchors", training=training, categorical=[3], threshold=0.8)
    told, against = said.details["inputs"][0], said.details["inputs"][0]["counterexamples"]
    assert said.quality["certified_precision"][0] < said.quality["precision"][0]
    assert said.quality["precision"][0] == pytest.approx(0.9, abs=0.04)
    assert len(against) > 0
    assert (noisy(against.numpy()).argmax(1) == 0).all()
    assert "x0 >" in " ".join(told["rule"])


def test_what_is_certified_holds_as_often_as_it_says() -> None:
    true_precision = 0.75

    def ask(rows: Tensor) -> Tensor:
        is_one = (rows[:, 0] != 0) & ((rows[:, 1] != 0) | (rows[:, 2] != 0))
        return torch.stack([~is_one, is_one], 1).double()

    options = {"longest": 1, "certificate_samples": 60, "delta": 0.2, "batch": 20, "tolerance": 0.4}
    certified = [
        explain(ask, torch.ones(1, 3), "anchors", seed=seed, **options).quality["certified_precision"][0]
        for seed in range(40)
    ]
    assert sum(bound > true_precision for bound in certified) <= 0.2 * 40
    assert sum(certified) / 40 > 0.55


def test_the_word_that_decides_is_found() -> None:
    def ask(texts: list[str]) -> np.ndarray:
        is_bad = np.array(["not" in text and "good" in text for text in texts])
        return np.stack([~is_bad, is_bad], 1).astype(float)

    said = explain(ask, ["this is not a good film"], "anchors")
    assert set(said.details["inputs"][0]["rule"]) == {"not", "good"}
    assert said.values.tolist() == [[0, 0, 1, 0, 1, 0]]
    assert said.quality["coverage"][0] == pytest.approx(0.25, abs=0.02)
    prefixes = said.details["inputs"][0]["prefixes"]
    assert prefixes[0]["precision"] == pytest.approx(0.5, abs=0.2)
    assert prefixes[1]["precision"] == 1.0


def test_the_square_that_decides_is_found() -> None:
    image = torch.rand(1, 3, 8, 8)
    image[:, :, :4, 4:] = 5.0
    quarters = torch.arange(8)[:, None] // 4 * 2 + torch.arange(8) // 4

    def ask(pictures: Tensor) -> Tensor:
        is_bright = pictures[:, :, :4, 4:].mean((1, 2, 3)) > 3
        return torch.stack([~is_bright, is_bright], 1).float()

    said = explain(ask, image, "anchors", segments=quarters)
    assert said.details["inputs"][0]["features"] == [1]
    assert (said.values[0, :, :4, 4:] == 1).all()
    assert said.values.sum() == 3 * 16


def test_a_model_that_always_says_the_same_needs_no_rule() -> None:
    said = explain(lambda rows: torch.tensor([[0.2, 0.8]]).expand(len(rows), 2), torch.ones(1, 4), "anchors")
    assert said.details["inputs"][0]["rule"] == []
    assert said.quality["coverage"] == (1.0,)


def test_the_most_precise_rule_is_told_where_none_is_good_enough() -> None:
    chance = torch.Generator().manual_seed(0)

    def ask(rows: Tensor) -> Tensor:
        is_one = torch.rand(len(rows), generator=chance) < 0.6
        return torch.stack([~is_one, is_one], 1).float() if len(rows) > 1 else torch.tensor([[0.0, 1.0]])

    said = explain(ask, torch.ones(1, 2), "anchors", tolerance=0.5)
    assert not said.details["inputs"][0]["is_anchor"]
    assert said.quality["precision"][0] == pytest.approx(0.6, abs=0.06)


def test_a_model_of_one_output_is_explained_by_its_side_of_one_half() -> None:
    said = explain(lambda rows: (rows[:, 0] != 0).double(), torch.ones(1, 3), "anchors")
    assert said.details["inputs"][0]["features"] == [0]


def test_rows_that_keep_to_predicates_are_training_values(training: np.ndarray) -> None:
    from kaisa.explain.domains import Predicates

    row = torch.tensor([1.5, 0.3, -0.2, 2.0])
    table = Table.about(row, training, [3], ())
    domain = Predicates(table, row[None])
    fixed = torch.rand(400, domain.size) < 0.3
    present, rows = domain.sample(fixed, torch.Generator().manual_seed(0))
    assert (present | ~fixed).all()
    for feature in range(4):
        known = {*training[:, feature].tolist(), float(row[feature])}
        assert set(rows[:, feature].tolist()) <= known
    assert present[0].tolist() == [holds(name, rows[0]) for name in domain.names]


def holds(words: str, row: Tensor) -> bool:
    name, relation, edge = words.split()
    found, bound = float(row[int(name[1:])]), float(edge)
    return {"≤": found <= bound, ">": found > bound, "=": found == bound}[relation]


def test_a_text_without_words_is_refused() -> None:
    with pytest.raises(DataError, match="has no words"):
        explain(lambda texts: np.ones((len(texts), 2)), ["..."], "anchors")


def test_calls_are_counted_as_the_model_sees_them() -> None:
    seen = []

    def ask(rows: Any) -> Any:
        seen.append(len(rows))
        return torch.stack([(rows[:, 0] == 0), (rows[:, 0] != 0)], 1).float()

    said = explain(ask, torch.ones(1, 4), "anchors", batch_size=50)
    assert said.details["inputs"][0]["model_calls"] == sum(seen) - 2  # the input itself, for the target and the rule
    assert max(seen) <= 50
