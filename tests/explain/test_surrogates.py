"""LIME, CLE and KernelSHAP: golden values, the values of the packages `lime` and `shap`, games, the axioms."""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kaisa.explain import explain, shapley, surrogates

SIZE = 5


def game(seed: int) -> Tensor:
    """A value for each set of five players."""
    return torch.randn(2**SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def all_sets(size: int) -> Tensor:
    return torch.tensor(list(itertools.product([False, True], repeat=size)))


def value(table: Tensor, sets: Tensor) -> Tensor:
    return table[(sets.long() * 2 ** torch.arange(SIZE)).sum(1)]


def exact_shapley_values(table: Tensor) -> Tensor:
    """Average what each player adds over all orders, by the definition."""
    found = torch.zeros(SIZE, dtype=torch.float64)
    for order in itertools.permutations(range(SIZE)):
        joined = torch.zeros(1, SIZE, dtype=torch.bool)
        for player in order:
            before = value(table, joined)
            joined[0, player] = True
            found[player] += (value(table, joined) - before)[0]
    return found / math.factorial(SIZE)


def playing(table: Tensor) -> Any:
    """A function of rows: a player takes part where the entry is not zero."""
    return lambda rows: value(table, torch.as_tensor(rows) != 0)[:, None]


def test_cle_is_the_golden_one(golden: dict[str, Any]) -> None:
    block, expected = golden["cle"], golden["cle"]["results"]["distance_on_original_features"]
    present = torch.tensor(block["masks"]).bool()
    distances = 1 - present.double().mean(1).sqrt()
    weights = surrogates.kernel(distances, block["kernel_width"])
    np.testing.assert_allclose(weights, expected["weights"], rtol=1e-9)
    rows = surrogates.design(present, surrogates.combinations(range(3), block["spans"]))
    fit = surrogates.fit(rows, torch.tensor(block["y"], dtype=torch.float64), weights, block["ridge_alpha"])
    np.testing.assert_allclose(fit.coefficients, expected["coef"], rtol=1e-9)
    assert fit.intercept == pytest.approx(expected["intercept"], rel=1e-9)
    assert fit.prediction == pytest.approx(expected["local_pred"], rel=1e-9)
    assert fit.r2 == pytest.approx(expected["r2"], rel=1e-9)


@pytest.mark.parametrize("count", [3, 8, None])
def test_the_linear_model_is_that_of_the_package_lime(count: int | None) -> None:
    base = pytest.importorskip("lime.lime_base", reason="needs lime (requirements-oracles.txt)")
    present = torch.rand(200, 10) < 0.5
    present[0] = True
    scores = (present.double() @ torch.randn(10, dtype=torch.float64)) ** 2
    distances = 1 - present.double().mean(1).sqrt()
    theirs = base.LimeBase(lambda d: np.sqrt(np.exp(-(d**2) / 0.25**2)), random_state=0)
    intercept, found, r2, prediction = theirs.explain_instance_with_data(
        present.double().numpy(), scores[:, None].numpy(), distances.numpy(), 0, count or 10
    )
    rows, weights = surrogates.design(present, ()), surrogates.kernel(distances, 0.25)
    columns = surrogates.select(rows, scores, weights, count)
    fit = surrogates.fit(rows[:, columns], scores, weights, 1.0)
    assert dict(zip(columns, fit.coefficients, strict=True)) == pytest.approx(dict(found), rel=1e-9)
    assert (fit.intercept, fit.r2, fit.prediction) == pytest.approx((intercept, r2, prediction[0]), rel=1e-9)


def test_texts_are_explained_as_by_the_package_lime() -> None:
    text = pytest.importorskip("lime.lime_text", reason="needs lime (requirements-oracles.txt)")
    words = "a good film but a slow and long one"

    def ask(texts: list[str]) -> np.ndarray:
        score = np.array([0.5 + 0.3 * ("good" in t) - 0.2 * ("slow" in t) for t in texts])
        return np.stack([1 - score, score], 1)

    theirs = text.LimeTextExplainer(bow=False, random_state=0)
    expected = dict(theirs.explain_instance(words, ask, num_features=9, num_samples=3000).as_map()[1])
    said = explain(ask, [words], "lime", 1, samples=3000)
    assert said.names == (tuple(words.split()),)
    # Both draw their own samples: what is equal is what they estimate.
    np.testing.assert_allclose(said.values[0], [expected[place] for place in range(9)], atol=0.01)


def test_tables_are_explained_as_by_the_package_lime() -> None:
    tabular = pytest.importorskip("lime.lime_tabular", reason="needs lime (requirements-oracles.txt)")
    random = np.random.default_rng(0)
    training = random.integers(0, 8, (800, 3)).astype(float)

    def ask(rows: np.ndarray) -> np.ndarray:
        score = 0.4 + 0.5 * (rows[:, 0] == 5) - 0.3 * (rows[:, 1] == 2)
        return np.stack([1 - score, score], 1)

    theirs = tabular.LimeTabularExplainer(training, random_state=0, categorical_features=[0, 1, 2])
    row = np.array([5.0, 2.0, 1.0])
    expected = dict(theirs.explain_instance(row, ask, num_features=3, num_samples=5000).as_map()[1])
    said = explain(ask, row[None], "lime", 1, samples=5000, training=training, categorical=(0, 1, 2))
    # Each draws its own samples, but the score is a sum, so that samples hardly matter.
    np.testing.assert_allclose(said.values[0], [expected[place] for place in range(3)], atol=2e-3)


def test_pairs_recover_a_game_of_pairs_as_the_penalty_goes(golden: dict[str, Any]) -> None:
    def ask(rows: Tensor) -> Tensor:
        z = (rows != 0).double()
        return (0.2 + 0.5 * z[:, 0] + 0.1 * z[:, 1] - 0.3 * z[:, 2] + 0.4 * z[:, 0] * z[:, 1])[:, None]

    said = explain(ask, torch.ones(1, 3), "cle", samples=200, alpha=1e-10)
    terms = {tuple(features): weight for features, weight in said.details["inputs"][0]["terms"]}
    expected = {(0,): 0.5, (1,): 0.1, (2,): -0.3, (0, 1): 0.4, (0, 2): 0.0, (1, 2): 0.0}
    assert terms == pytest.approx(expected, abs=1e-6)
    np.testing.assert_allclose(said.values[0], [0.7, 0.3, -0.3], atol=1e-6)
    assert said.quality["local_r2"][0] == pytest.approx(1.0, abs=1e-9)


def test_combinations_are_limited_to_the_features_that_matter() -> None:
    said = explain(lambda rows: (rows @ torch.arange(30.0))[:, None], torch.ones(1, 30), "cle", limit=45, samples=300)
    pairs = [features for features, _ in said.details["inputs"][0]["terms"] if len(features) == 2]
    assert len(pairs) == 45
    assert {feature for pair in pairs for feature in pair} == set(range(20, 30))


@settings(deadline=None, max_examples=6)
@given(seed=st.integers(0, 1000))
def test_kernelshap_gives_shapley_values_of_small_games(seed: int) -> None:
    table = game(seed)
    said = explain(playing(table), torch.ones(1, SIZE), "kernelshap")
    torch.testing.assert_close(said.values[0], exact_shapley_values(table), rtol=1e-9, atol=1e-10)
    assert said.quality["completeness_gap"][0] < 1e-12


def test_kernelshap_agrees_with_captum_and_shap() -> None:
    attr = pytest.importorskip("captum.attr", reason="needs captum (pip install 'kaisa[explain]')")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its import is told of changes in matplotlib
        shap = pytest.importorskip("shap", reason="needs shap (requirements-oracles.txt)")
    table, random = game(3), np.random.default_rng(0)
    said = explain(playing(table), torch.ones(1, SIZE), "kernelshap").values
    exact = attr.ShapleyValues(lambda rows: playing(table)(rows)[:, 0]).attribute(
        torch.ones(1, SIZE, dtype=torch.float64)
    )
    torch.testing.assert_close(said, exact.double(), rtol=1e-5, atol=1e-6)  # Captum's are float32
    background, rows = random.normal(size=(7, 4)), random.normal(size=(2, 4))

    def ask(batch: np.ndarray) -> np.ndarray:
        return np.tanh(batch[:, 0] * batch[:, 1]) + batch[:, 2] ** 2

    expected = shap.KernelExplainer(ask, background).shap_values(rows, silent=True, l1_reg=0)
    said = explain(ask, rows, "kernelshap", background=background).values
    np.testing.assert_allclose(said, expected, rtol=1e-6, atol=1e-9)


def test_kernelshap_is_close_where_sets_must_be_drawn() -> None:
    weights = torch.randn(16, dtype=torch.float64)

    def ask(rows: Tensor) -> Tensor:
        return (rows.double() @ weights + 0.3 * rows[:, 0] * rows[:, 1])[:, None]

    said = explain(ask, torch.ones(1, 16), "kernelshap", samples=600)
    expected = weights.clone()
    expected[:2] += 0.15
    torch.testing.assert_close(said.values[0], expected, atol=0.03, rtol=0)
    assert said.quality["completeness_gap"][0] < 1e-12


def test_drawn_sets_are_neither_empty_nor_full_and_weigh_one() -> None:
    for size, samples in ((4, 100), (12, 300), (40, 500), (40, 2), (1, 10), (2, 10)):
        sets, weights = shapley.coalitions(size, samples, torch.Generator().manual_seed(0))
        assert len(sets) <= max(samples, 2)
        assert not sets.all(1).any()
        assert sets.any(1).all()
        assert len(weights) == 0 or float(weights.sum()) == pytest.approx(1)


def test_players_that_are_alike_share_and_idle_ones_get_nothing() -> None:
    def ask(rows: Tensor) -> Tensor:
        return ((rows[:, 0] != 0) & (rows[:, 1] != 0)).double()[:, None]

    values = explain(ask, torch.ones(1, 4), "kernelshap").values[0]
    np.testing.assert_allclose(values, [0.5, 0.5, 0, 0], atol=1e-12)


def test_a_uniform_patch_is_hidden_by_the_mean_of_the_image_and_not_by_its_own() -> None:
    image = torch.zeros(1, 1, 8, 8)
    image[..., 4:, 4:] = 1.0
    quarters = torch.arange(8)[:, None] // 4 * 2 + torch.arange(8) // 4
    ask = lambda x: x[:, :, 4:, 4:].mean((1, 2, 3))[:, None]  # noqa: E731
    shown = explain(ask, image, "kernelshap", segments=quarters).details["inputs"][0]["shapley_values"]
    blind = explain(ask, image, "kernelshap", segments=quarters, hide="own mean").details["inputs"][0]["shapley_values"]
    assert shown == pytest.approx([0, 0, 0, 0.75], abs=1e-6)
    assert blind == pytest.approx([0, 0, 0, 0], abs=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 1e-3, 5.0])
def test_the_weighted_fit_is_that_of_scikit_learn(alpha: float) -> None:
    linear = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    rows = torch.randint(2, (200, 6)).double()
    scores = rows @ torch.randn(6, dtype=torch.float64) + 0.3 * torch.randn(200, dtype=torch.float64)
    weights = torch.rand(200, dtype=torch.float64)
    theirs = linear.Ridge(alpha=alpha).fit(rows.numpy(), scores.numpy(), sample_weight=weights.numpy())
    found = surrogates.fit(rows, scores, weights, alpha)
    assert np.allclose(found.coefficients, theirs.coef_, rtol=1e-8)
    assert found.intercept == pytest.approx(theirs.intercept_, rel=1e-8)
    assert found.r2 == pytest.approx(theirs.score(rows.numpy(), scores.numpy(), weights.numpy()), rel=1e-8)
    assert found.prediction == pytest.approx(theirs.predict(rows[:1].numpy())[0], rel=1e-8)


def test_without_a_penalty_columns_that_say_the_same_share_what_they_say() -> None:
    column = torch.randint(2, (50, 1)).double()
    found = surrogates.fit(torch.cat((column, column), 1), 4 * column[:, 0], torch.ones(50, dtype=torch.float64), 0.0)
    assert np.allclose(found.coefficients, [2.0, 2.0])


WEIGHTS = torch.tensor([0.9, -2.0, 0.3, 0.0, 1.1, -0.4], dtype=torch.float64)


def crooked(rows: Tensor) -> Tensor:
    """A score that no linear model explains, so that it matters how samples weigh."""
    z = (rows != 0).double()
    return 2.0 + z @ WEIGHTS + 3 * z[:, 0] * z[:, 1] * z[:, 4] - (z[:, 2] - z[:, 5]).abs()


TERMS = {
    "lime": [(feature,) for feature in range(6)],
    "cle": [*((feature,) for feature in range(6)), *itertools.combinations(range(6), 2)],
    "triples": [*((feature,) for feature in range(6)), *itertools.combinations(range(6), 3)],
    "cared": [*((feature,) for feature in range(6)), (0, 1), (0, 4), (1, 4)],
    "pairs alone": list(itertools.combinations(range(6), 2)),
    "extended": [*((feature,) for feature in range(6)), *itertools.combinations(range(6), 2)],
}


@pytest.mark.parametrize(
    ("terms", "method", "options", "width", "alpha"),
    [
        ("lime", "lime", {}, 0.25, 1.0),
        ("lime", "lime", {"width": 0.7, "alpha": 4.0}, 0.7, 4.0),
        ("lime", "lime", {"alpha": None}, 0.25, None),
        ("cle", "cle", {}, 0.25, None),
        ("triples", "cle", {"spans": [3]}, 0.25, None),
        ("cared", "cle", {"cared": [4, 0, 1]}, 0.25, None),
        ("pairs alone", "cle", {"include_features": False, "alpha": 0.5}, 0.25, 0.5),
        ("extended", "cle", {"extended_distance": True}, 0.25, None),
    ],
)
def test_values_are_those_of_a_weighted_ridge_on_what_the_model_was_asked(
    terms: str, method: str, options: dict[str, Any], width: float, alpha: float | None
) -> None:
    linear = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    asked: list[Tensor] = []

    def ask(rows: Tensor) -> Tensor:
        asked.append(rows)
        return crooked(rows)[:, None]

    said = explain(ask, torch.ones(1, 6), method, samples=90, batch_size=40, **options)
    present = (torch.cat(asked[1:]) != 0).double()  # after one look at the input, for the target
    assert present[0].all()
    rows = torch.stack([present[:, list(features)].prod(1) for features in TERMS[terms]], 1)
    counted = rows if terms == "extended" else present
    cosine = counted.sum(1) / (counted.sum(1) * counted.shape[1]).sqrt().clamp(min=1e-12)
    weights = ((-((1 - cosine) ** 2) / width**2).exp() ** 0.5).numpy()
    scores = crooked(present).numpy()
    ridge = linear.Ridge(alpha=1e-3 * weights.sum() if alpha is None else alpha)
    ridge.fit(rows.numpy(), scores, sample_weight=weights)
    told = said.details["inputs"][0]
    found = {tuple(features): weight for features, weight in told["terms"]}
    assert found == pytest.approx(dict(zip(TERMS[terms], ridge.coef_.tolist(), strict=True)), rel=1e-7, abs=1e-10)
    assert told["intercept"] == pytest.approx(ridge.intercept_, rel=1e-7)
    assert told["prediction"] == pytest.approx(ridge.predict(np.ones((1, rows.shape[1])))[0], rel=1e-7)
    assert said.quality["local_r2"][0] == pytest.approx(ridge.score(rows.numpy(), scores, weights), rel=1e-7)
    assert [abs(weight) for _, weight in told["terms"]] == sorted(map(abs, found.values()), reverse=True)
    shares = [
        sum(weight / len(features) for features, weight in found.items() if each in features) for each in range(6)
    ]
    np.testing.assert_allclose(said.values[0], shares, rtol=1e-9)


def test_each_row_has_a_linear_model_of_its_own() -> None:
    rows, weight = torch.tensor([[1.0, 2.0], [3.0, -1.0]]), torch.tensor([1.0, 10.0])
    said = explain(lambda x: (x @ weight)[:, None], rows, "lime", alpha=1e-9)
    torch.testing.assert_close(said.values, (rows * weight).double(), rtol=1e-6, atol=1e-6)


def test_something_may_stand_for_words_that_are_left_out() -> None:
    seen: set[str] = set()

    def ask(texts: list[str]) -> np.ndarray:
        seen.update(texts)
        return np.array([[float(len(text))] for text in texts])

    explain(ask, ["one two"], "lime", hide="X", samples=60)
    assert seen == {"one two", "one X", "X two"}  # one of the two words is left out


def test_the_largest_coefficients_are_kept_whatever_their_sign() -> None:
    weight = torch.tensor([5.0, -6.0, 0.1, 7.0, -8.0, 9.0, -10.0, 11.0, 0.2, -12.0])
    said = explain(lambda rows: (rows @ weight)[:, None], torch.ones(1, 10), "lime", features=8)
    assert {feature for (feature,), _ in said.details["inputs"][0]["terms"]} == {0, 1, 3, 4, 5, 6, 7, 9}


def test_up_to_six_columns_are_chosen_one_after_the_other() -> None:
    linear = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    rows = torch.randint(2, (60, 8)).double()
    rows[:, 7] = torch.where(torch.rand(60) < 0.1, 1 - rows[:, 0], rows[:, 0])  # nearly a copy
    scores = rows @ torch.tensor([3.0, -2.0, 0.2, 1.0, 0.1, -0.3, 0.05, 2.5], dtype=torch.float64)
    weights = torch.rand(60, dtype=torch.float64)
    expected: list[int] = []
    for _ in range(2):
        gains = {}
        for column in set(range(8)) - set(expected):
            columns = rows[:, [*expected, column]].numpy()
            found = linear.LinearRegression().fit(columns, scores.numpy(), sample_weight=weights.numpy())
            gains[column] = found.score(columns, scores.numpy(), weights.numpy())
        expected.append(max(gains, key=lambda column: gains[column]))
    assert surrogates.select(rows, scores, weights, 2) == expected
    assert set(expected) != {0, 7}  # which are first and second by their coefficients


def test_no_column_is_chosen_twice_where_nothing_is_left_to_explain() -> None:
    rows = torch.randint(2, (40, 5)).double()
    assert len(set(surrogates.select(rows, 5 * rows[:, 0], torch.ones(40, dtype=torch.float64), 3))) == 3


def test_columns_are_kept_by_what_they_weigh_before_much_of_a_penalty() -> None:
    rows = torch.randint(2, (200, 9)).double()
    rows[0] = 1.0
    rows[1:, 8] = 0.0  # once alone, so that a penalty of 1 would halve its 3
    scores = rows @ torch.tensor([2.0, 2.1, 2.2, 2.3, 2.4, 2.5, 2.6, 1.9, 3.0], dtype=torch.float64)
    assert surrogates.select(rows, scores, torch.ones(200, dtype=torch.float64), 8) == [0, 1, 2, 3, 4, 5, 6, 8]
