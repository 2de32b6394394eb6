"""Tests of shift: rare alarms where there is none, sure ones where there is."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import chisquare

from kaisa.assure.evidence.shift import _discrepancies, compare_counts, compare_features
from kaisa.errors import ConfigurationError, DataError


def test_counts_of_one_profile_seldom_differ_and_of_two_surely() -> None:
    generator = torch.Generator().manual_seed(0)
    profile = torch.tensor([0.5, 0.3, 0.15, 0.05])

    def sample(weights: torch.Tensor) -> list[int]:
        return torch.multinomial(weights, 400, True, generator=generator).bincount(minlength=4).tolist()

    values = [compare_counts(sample(profile), sample(profile)).p_value for _ in range(300)]
    uniform = chisquare(torch.tensor(values).histc(5, 0, 1).tolist()).pvalue
    assert uniform > 0.001
    assert compare_counts(sample(profile), sample(profile.flip(0))).has_shifted


def test_cells_that_nothing_fell_into_change_nothing() -> None:
    assert compare_counts([50, 0, 50], [40, 0, 60]).p_value == compare_counts([50, 50], [40, 60]).p_value
    assert compare_counts([50, 0], [60, 0]).p_value == 1.0


def test_the_discrepancy_is_that_of_its_definition() -> None:
    x = torch.randn(9, 2, dtype=torch.float64)
    kernel = (-torch.cdist(x, x).square()).exp().fill_diagonal_(0)
    first = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0, 1], dtype=torch.float64)
    a, b = first.nonzero().flatten().tolist(), (1 - first).nonzero().flatten().tolist()
    expected = sum(kernel[i, j] for i in a for j in a if i != j) / 20
    expected += sum(kernel[i, j] for i in b for j in b if i != j) / 12
    expected -= 2 * sum(kernel[i, j] for i in a for j in b) / 20
    assert _discrepancies(kernel, first[None], 5, 4)[0] == pytest.approx(expected.item(), rel=1e-12)


def test_features_of_one_profile_seldom_differ_and_of_two_surely() -> None:
    alarms = sum(
        compare_features(torch.randn(40, 3), torch.randn(40, 3), permutations=99, level=0.05, seed=seed).has_shifted
        for seed in range(60)
    )
    assert alarms <= 9  # 3 are expected; 10 or more have a chance below 1e-3
    apart = compare_features(torch.randn(60, 3), torch.randn(60, 3) + 1)
    assert apart.has_shifted
    assert apart.p_value == 1 / 501  # none of 500 permutations is as far apart, and the sample itself is
    assert compare_features(torch.randn(80, 3), 2.5 * torch.randn(80, 3)).has_shifted


def test_a_result_says_what_it_means() -> None:
    found = compare_counts([100, 100], [100, 101])
    assert found.statement.startswith("201 new inputs show no difference from 200 of the profile by counts (p = 0.9")
    assert "weaker than that there is none" in found.assumptions[1]


def test_bad_input_is_refused() -> None:
    with pytest.raises(DataError, match="3 and 2 cells"):
        compare_counts([20, 20, 20], [30, 30])
    with pytest.raises(DataError, match="give counts from 0 on"):
        compare_counts([40, -1], [30, 30])
    with pytest.raises(DataError, match="at least 20 of each"):
        compare_counts([5, 5], [30, 30])
    with pytest.raises(DataError, match="2 features of the profile and 3"):
        compare_features(torch.randn(30, 2), torch.randn(30, 3))
    with pytest.raises(DataError, match="not finite"):
        compare_features(torch.randn(30, 2), torch.full((30, 2), float("inf")))
    with pytest.raises(ConfigurationError, match=r"99 permutations reach no level of 0\.001"):
        compare_features(torch.randn(30, 2), torch.randn(30, 2), permutations=99, level=0.001)
    with pytest.raises(ConfigurationError, match="level is 0"):
        compare_counts([30, 30], [30, 30], level=0.0)
