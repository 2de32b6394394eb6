"""Block Householder reflections against golden values, a plain implementation of the rules, and dense matrices."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kaisa.quantize.reflections import Reflections, reflections_for, reflections_of

CASES = json.loads((Path(__file__).parent / "golden" / "bhq_grouping.json").read_text())["cases"]
RANGES = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=40, unique=True)


def dense(transform: Reflections) -> Tensor:
    return transform.apply(torch.eye(len(transform.group), dtype=transform.scales.dtype))


def groups_by_the_rules(ranges: list[float]) -> list[list[int]]:
    """Return the rows of each group, the large one first."""
    order = sorted(range(len(ranges)), key=lambda i: -ranges[i])
    m, count = [ranges[i] for i in order], len(ranges)
    if count < 3:
        return [order]
    k = next(k for k in range(1, count) if k * m[count - k - 1] / sum(m[: count - k]) > 1)
    large = m[: count - k]
    ends = [0] + [math.floor(k * sum(large[: i + 1]) / sum(large) + 0.5) for i in range(count - k)]
    return [[order[i]] + [order[count - k + j] for j in range(ends[i], ends[i + 1])] for i in range(count - k)]


def matrix_by_the_rules(ranges: list[float]) -> Tensor:
    result = torch.zeros(len(ranges), len(ranges), dtype=torch.float64)
    for group in groups_by_the_rules(ranges):
        n = len(group)
        if n == 1:
            result[group[0], group[0]] = 1
            continue
        v = torch.full((n,), n**-0.5, dtype=torch.float64)
        v[0] -= 1
        q = torch.eye(n, dtype=torch.float64) - 2 * torch.outer(v, v) / v.dot(v)
        w1 = ranges[group[0]] * n**-0.5
        w2 = ranges[group[1]] * float(q.abs().max())
        s1, s2 = w1 ** (-1 / 3), (w2 / (n - 1)) ** (-1 / 3)
        norm = (s1**-2 + s2**-2) ** 0.5
        scales = torch.tensor([s1] + [s2] * (n - 1), dtype=torch.float64) * norm
        result[torch.tensor(group).unsqueeze(1), torch.tensor(group)] = q * scales
    return result


@pytest.mark.parametrize("name", sorted(CASES))
def test_golden_groups_and_matrices_come_out(name: str) -> None:
    case = CASES[name]
    transform = reflections_for(torch.tensor(case["ranges"]))
    for group in case["groups"]:
        assert {int(transform.group[row]) for row in group} == {int(transform.group[group[0]])}
        assert int(transform.members[transform.starts[transform.group[group[0]]]]) == group[0]
    assert len(set(transform.group.tolist())) == case["num_groups"]
    expected = torch.tensor(case["T"])
    torch.testing.assert_close(dense(transform), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    inverse = transform.inverse(torch.eye(len(expected)))
    expected = torch.tensor(case["T_inv"])
    torch.testing.assert_close(inverse, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@settings(deadline=None, max_examples=60)
@given(RANGES)
def test_the_transform_is_that_of_the_rules(values: list[float]) -> None:
    ranges = [max(value, 1e-8 * max(values)) for value in values]
    found = dense(reflections_for(torch.tensor(values, dtype=torch.float64)))
    torch.testing.assert_close(found, matrix_by_the_rules(ranges), rtol=1e-9, atol=1e-9 * float(found.abs().max()))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.sampled_from([0.0, 1e-3, 0.5, 1.0, 30.0, 1e30]), min_size=1, max_size=40))
def test_inverse_transposed_and_weights_belong_to_the_transform(values: list[float]) -> None:
    transform = reflections_for(torch.tensor(values, dtype=torch.float64))
    identity = torch.eye(len(values), dtype=torch.float64)
    inverse = transform.inverse(identity)
    torch.testing.assert_close(dense(transform) @ inverse, identity, rtol=0, atol=1e-10)
    torch.testing.assert_close(transform.inverse_(identity.clone()), inverse)
    torch.testing.assert_close(transform.inverse_transposed(identity), inverse.T)
    torch.testing.assert_close(transform.weights.squeeze(1), inverse.square().sum(0))


def test_groups_follow_the_rows() -> None:
    ranges = torch.rand(25, dtype=torch.float64)
    order = torch.randperm(25)
    torch.testing.assert_close(dense(reflections_for(ranges[order])), dense(reflections_for(ranges))[order][:, order])


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 64])
def test_a_wide_matrix_is_transformed_as_by_the_dense_product(count: int) -> None:
    x = torch.randn(count, 2**19 // count + 3) * torch.logspace(0, -3, count).unsqueeze(1)
    transform = reflections_of(x)
    expected = dense(transform).double() @ x.double()
    torch.testing.assert_close(
        transform.apply(x).double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())
    )


def test_an_outlier_is_spread_evenly_over_its_group() -> None:
    x = torch.full((16, 1), 1e-9, dtype=torch.float64)
    x[3] = 1.0
    spread = reflections_for(torch.tensor([1e-3] * 3 + [1.0] + [1e-3] * 12, dtype=torch.float64)).apply(x)
    torch.testing.assert_close(spread, spread[3].expand(16, 1), rtol=1e-6, atol=0)
