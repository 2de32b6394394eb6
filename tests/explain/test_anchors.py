"""Anchors: known rules are found in tables, texts and images, and what is certified holds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kaisa.errors import DataError
from kaisa.explain import explain
from kaisa.explain.anchors import Hunt, Search
from kaisa.explain.domains import Domain, Predicates
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


def test_a_model_of_one_output_is_explained_on_the_lower_side_of_one_half_too() -> None:
    said = explain(lambda rows: (rows[:, 0] == 0).double(), torch.ones(1, 3), "anchors")
    assert said.details["inputs"][0]["features"] == [0]


def test_every_input_has_the_rule_of_its_own_class() -> None:
    def ask(rows: Tensor) -> Tensor:
        is_zero, is_two = rows[:, 0] == 1, rows[:, 1] == 2
        return torch.stack([is_zero & ~is_two, ~is_zero & ~is_two, is_two], 1).double()

    said = explain(ask, torch.tensor([[1.0, 0.5, 1.0], [0.5, 2.0, 1.0]]), "anchors")
    assert said.target == (0, 2)
    assert [told["features"] for told in said.details["inputs"]] == [[0], [1]]


def rare_or_common(rows: np.ndarray) -> np.ndarray:
    """Class 1 where the category is the rare 1, or where both numbers are above their medians (about)."""
    is_one = (rows[:, 2] == 1) | ((rows[:, 0] > 0) & (rows[:, 1] > 0))
    return np.stack([~is_one, is_one], 1).astype(float)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"x0 > 0", "x1 > 0"}),  # covers a quarter
        ({"first": True}, {"x2 = 1"}),  # covers a tenth
        ({"beam": 1}, {"x2 = 1"}),  # nothing else is grown
        ({"longest": 1}, {"x2 = 1"}),
    ],
)
def test_the_most_general_rule_is_taken_unless_the_first_or_narrowest_is_wanted(
    options: dict[str, Any], expected: set[str]
) -> None:
    values = np.linspace(-1, 1, 401)  # their median is 0, their quartiles ±0.5
    random = np.random.default_rng(0)
    table = np.stack([random.permutation(values), random.permutation(values), np.arange(401) % 10], 1)
    row = np.array([[0.3, 0.3, 1.0]])
    said = explain(rare_or_common, row, "anchors", training=table, categorical=[2], **options)
    assert set(said.details["inputs"][0]["rule"]) == expected


@pytest.mark.parametrize(("options", "stand_in"), [({}, "UNK"), ({"hide": "something"}, "something")])
def test_something_stands_for_words_that_are_absent(options: dict[str, str], stand_in: str) -> None:
    seen = set()

    def ask(texts: list[str]) -> np.ndarray:
        seen.update(texts)
        is_one = np.array(["good" in text for text in texts])
        return np.stack([~is_one, is_one], 1).astype(float)

    explain(ask, ["good film"], "anchors", **options)
    assert seen == {"good film", f"good {stand_in}", f"{stand_in} film", f"{stand_in} {stand_in}"}


class Coins(Domain):
    """Features of which only a rule's chance to agree is known: what is asked about is which of them are fixed."""

    def __init__(self, holds: Tensor) -> None:
        self.names = tuple(str(number) for number in range(holds.shape[1]))
        self.holds = holds

    def sample(self, fixed: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return self.holds, self.holds

    def recipes(self, fixed: Tensor, count: int, generator: torch.Generator) -> Tensor:
        return fixed.repeat_interleave(count, 0)

    def build(self, recipe: Tensor) -> Tensor:
        return recipe

    def spread(self, values: Tensor) -> Tensor:
        return values


def hunt(agrees: Any, holds: Tensor, **options: Any) -> Hunt:
    return Hunt(Coins(holds), agrees, Search(**options), 10_000, torch.Generator())


def test_the_most_precise_rules_are_found_as_often_as_they_should_be() -> None:
    chances = torch.tensor([0.5, 0.9, 0.5, 0.5, 0.9, 0.5])
    found = []
    for seed in range(30):
        chance = torch.Generator().manual_seed(seed)
        flip = lambda rows, chance=chance: torch.rand(len(rows), generator=chance) < rows.float() @ chances  # noqa: E731
        searching = hunt(flip, torch.ones(1, 6).bool(), batch=4, tolerance=0.2, delta=0.1)
        found.append(set(searching._most_precise([(feature,) for feature in range(6)], 2)))
    assert found.count({(1,), (4,)}) >= 27  # 1 - delta of them


@pytest.mark.parametrize(("beam", "candidates"), [(1, 1), (4, 30)])
def test_rules_are_tried_until_the_bounds_say_which_side_of_the_threshold_they_are_on(
    beam: int, candidates: int
) -> None:
    beta = np.log((1 + (beam - 1) * candidates) / 0.1)
    always = hunt(lambda rows: torch.ones(len(rows)).bool(), torch.ones(1, 2).bool(), batch=1, threshold=0.9, stop=0.1)
    assert always._is_precise((0,), beam, candidates)
    assert always.calls == np.ceil(beta / -np.log(0.8))  # of a mean of 1 the lower bound is exp(-beta / n)
    never = hunt(lambda rows: torch.zeros(len(rows)).bool(), torch.ones(1, 2).bool(), batch=1, threshold=0.5, stop=0.2)
    assert not never._is_precise((0,), beam, candidates)
    assert never.calls == np.ceil(beta / -np.log(1 - 0.7))  # of a mean of 0 the upper bound is 1 - exp(-beta / n)


def test_a_rule_below_the_threshold_is_not_precise_however_well_it_is_known() -> None:
    mostly = hunt(lambda rows: torch.arange(len(rows)) % 100 >= 7, torch.ones(1, 2).bool(), batch=1000, threshold=0.95)
    assert not mostly._is_precise((0,), 1, 1)  # 0.93, of which more than 0.9 is certain


def test_all_trials_of_a_rule_count() -> None:
    answers = iter([True, False, True])
    asking = hunt(lambda rows: torch.full((len(rows),), next(answers)), torch.ones(1, 2).bool())
    for _ in range(3):
        asking._ask([(0,)], 10)
    mean, trials = asking._statistics([(0,)])
    assert (mean.tolist(), trials.tolist()) == ([2 / 3], [30])


def test_rules_grow_where_they_say_more_and_cover_more_than_what_is_found() -> None:
    places = torch.arange(8)
    holds = torch.stack([places < 4, places < 6, places % 2 == 0], 1)  # the first implies the second
    growing = hunt(lambda rows: torch.ones(len(rows)).bool(), holds)
    assert growing._grown([()], 0.0) == [(0,), (1,), (2,)]
    assert growing._grown([()], 0.5) == [(1,)]  # of 1/2, 3/4 and 1/2
    assert growing._grown([(0,), (1,)], 0.0) == [(0, 2), (1, 2)]  # the second says nothing beside the first
    assert growing._grown([(1,), (2,)], 0.0) == [(1, 0), (1, 2), (2, 0)]  # and each set of features once


def test_what_a_rule_leaves_is_drawn_from_training_rows_and_what_breaks_it_from_its_range() -> None:
    training = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0], [4.0, 40.0]])
    table = Table.about(torch.tensor([4.0, 10.0]), training, [], ())
    domain = Predicates(table, torch.zeros(1, 2))
    above = torch.tensor([[words == "x0 > 2.5" for words in domain.names]])
    rows = domain.recipes(above, 40_000, torch.Generator().manual_seed(0))
    # Half of the rows have x0 > 2.5 already; for the others it comes from the column's 3, 4 and, of the row itself, 4.
    expected = {(3.0, 30.0): 1 / 4, (4.0, 40.0): 1 / 4}
    expected |= {(low, rest): share / 2 / 2 for low, share in ((3.0, 1 / 3), (4.0, 2 / 3)) for rest in (10.0, 20.0)}
    found, counts = rows.unique(dim=0, return_counts=True)
    shares = {tuple(pair): count / 40_000 for pair, count in zip(found.tolist(), counts.tolist(), strict=True)}
    assert shares == pytest.approx(expected, abs=0.012)  # five deviations of 40 000 draws
    free = domain.recipes(torch.zeros(1, domain.size).bool(), 4000, torch.Generator().manual_seed(0))
    assert {tuple(row) for row in free.tolist()} == {tuple(row) for row in training.tolist()}


def test_rules_of_one_batch_keep_each_its_own(training: np.ndarray) -> None:
    table = Table.about(torch.tensor([1.5, 0.3, -0.2, 2.0]), training, [3], ())
    domain = Predicates(table, torch.zeros(1, 4))
    fixed = torch.eye(domain.size).bool()
    rows = domain.recipes(fixed, 50, torch.Generator().manual_seed(0))
    for words, part in zip(domain.names, rows.split(50), strict=True):
        assert all(holds(words, row) for row in part)
    assert not domain._present(rows).view(domain.size, 50, -1)[0].all()


def test_rows_that_keep_to_predicates_are_training_values(training: np.ndarray) -> None:
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
