"""KernelSHAP's sets of features: which are taken in full, how the others are drawn, what they weigh."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kaisa.explain import explain, shapley


def masses(size: int) -> np.ndarray:
    """The weight of all sets of 1, 2, … features together: C(D, k) · (D − 1) / (C(D, k) k (D − k)), scaled to 1."""
    counts = np.arange(1, size)
    weight = 1 / (counts * (size - counts))
    return weight / weight.sum()


def by_size(sets: Tensor, weights: Tensor) -> np.ndarray:
    return np.array([float(weights[sets.sum(1) == count].sum()) for count in range(1, sets.shape[1])])


def test_sizes_are_taken_in_full_where_as_many_would_be_drawn(generator: torch.Generator) -> None:
    # Of 12 features, sizes 1 and 11 weigh 0.361, so that 108 of 300 samples would be drawn for their 24 sets; sizes 2
    # and 10 weigh 0.311 of the rest, so that 86 of 276 would be drawn for their 132.
    sets, weights = shapley.coalitions(12, 300, generator)
    counts = sets.sum(1).bincount(minlength=12)
    assert (counts[1], counts[11]) == (12, 12)
    assert 0 < counts[2] < 66
    assert 200 < len(sets.unique(dim=0)) == len(sets) <= 300
    mass = masses(12)
    np.testing.assert_allclose(by_size(sets, weights)[[0, 10]], mass[[0, 10]])
    np.testing.assert_allclose(weights[sets.sum(1) == 1], mass[0] / 12)


def test_drawn_sets_come_with_their_complements_and_weigh_what_their_sizes_should(generator: torch.Generator) -> None:
    sets, weights = shapley.coalitions(24, 6000, generator)
    drawn = {tuple(row): float(weight) for row, weight in zip(sets.tolist(), weights, strict=True)}
    for row, weight in drawn.items():
        assert drawn[tuple(not here for here in row)] == pytest.approx(weight)
    np.testing.assert_allclose(by_size(sets, weights), masses(24), atol=0.015)  # about 2700 pairs are drawn


def test_features_are_in_drawn_sets_alike(generator: torch.Generator) -> None:
    sets, weights = shapley.coalitions(24, 6000, generator)
    np.testing.assert_allclose(weights @ sets.double(), np.full(24, 0.5), atol=1e-9)  # a set and its complement
    pairs = (sets.double() * weights[:, None]).T @ sets.double()
    alike = pairs[~torch.eye(24).bool()]
    np.testing.assert_allclose(alike, np.full(24 * 23, float(alike.mean())), atol=0.05)


def test_the_share_explained_is_that_of_the_weighted_game(generator: torch.Generator) -> None:
    def ask(rows: Tensor) -> Tensor:
        z = (rows != 0).double()
        return (3.0 + z[:, 0] - 2 * z[:, 1] + 4 * z[:, 0] * z[:, 1] * z[:, 2])[:, None]

    said = explain(ask, torch.ones(1, 4), "kernelshap")
    sets = torch.tensor([row for row in itertools.product([0.0, 1.0], repeat=4) if 0 < sum(row) < 4]).double()
    counts = sets.sum(1).long()
    weights = torch.tensor([{1: 3 / 12, 2: 3 / 24, 3: 3 / 12}[int(count)] for count in counts]).double()
    scores, guessed = ask(sets)[:, 0], 3.0 + sets @ said.values[0]
    mean = (weights * scores).sum() / weights.sum()
    share = 1 - (weights * (scores - guessed) ** 2).sum() / (weights * (scores - mean) ** 2).sum()
    assert said.quality["local_r2"][0] == pytest.approx(float(share))
    assert said.quality["local_r2"][0] < 0.9
    additive = explain(lambda rows: ask(rows[:, [0, 1, 1]] * torch.tensor([1, 1, 0])), torch.ones(1, 2), "kernelshap")
    assert additive.quality["local_r2"][0] == pytest.approx(1)


@pytest.mark.parametrize(("options", "calls"), [({}, 2 * 20 + 2048), ({"samples": 100}, 100)])
def test_the_model_is_asked_about_as_many_sets_as_wanted(options: dict[str, Any], calls: int) -> None:
    seen = []

    def ask(rows: Tensor) -> Tensor:
        seen.append(len(rows))
        return rows.sum(1, keepdim=True)

    explain(ask, torch.ones(1, 20), "kernelshap", **options)
    assert 0.8 * calls < sum(seen) - 3 <= calls  # beside the input, for the target, the empty set and the full one


def test_each_input_has_its_own_values() -> None:
    rows, weight = torch.tensor([[1.0, 2.0], [3.0, -1.0]]), torch.tensor([1.0, 10.0])
    said = explain(lambda x: (x @ weight)[:, None], rows, "kernelshap")
    torch.testing.assert_close(said.values, (rows * weight).double())


def test_something_may_stand_for_absent_words() -> None:
    seen: set[str] = set()

    def ask(texts: list[str]) -> np.ndarray:
        seen.update(texts)
        return np.array([[float(len(text))] for text in texts])

    explain(ask, ["one two"], "kernelshap", hide="X")
    assert seen == {"one two", "one X", "X two", "X X"}
