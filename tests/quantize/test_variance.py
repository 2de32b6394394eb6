"""Exact variances and their bounds: against golden values, draws, and the laws that they obey."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kaisa.quantize import exact_variance, quantize, variance_bound
from kaisa.quantize.quantizers import KINDS, on_grid

GOLDEN = json.loads((Path(__file__).parent / "golden" / "statquant_quantizers.json").read_text())
CASES: dict[str, dict[str, Any]] = GOLDEN["cases"]


def read(name: str) -> tuple[Tensor, str, int]:
    matrix, kind, bits = name.split("|")
    return torch.tensor(GOLDEN["matrices"][matrix]), kind.lower(), int(bits)


def outlier(seed: int, small: float, count: int = 32, size: int = 64) -> Tensor:
    x = torch.randn(count, size, generator=torch.Generator().manual_seed(seed)) * small
    x[count // 3] /= small
    return x


@pytest.mark.parametrize("name", sorted(CASES))
def test_scales_are_the_golden_ones_or_finer(name: str) -> None:
    x, kind, bits = read(name)
    step = on_grid(x, kind, bits)[1].step.flatten().double()
    if CASES[name]["scale"] is None:
        assert bool(step.isfinite().all())
        return
    golden = torch.tensor(CASES[name]["scale"], dtype=torch.float64).flatten().reciprocal()
    if kind == "psq":
        golden -= 2e-8 / (2**bits - 1)  # what the original pads ranges with, whatever their size
    if kind == "ptq":  # the original always takes the lower code for 0
        assert float(step) <= float(golden) * (1 + 1e-5)
        assert float(step) >= float(golden) * 0.98
    else:
        torch.testing.assert_close(step, golden[: len(step)].expand_as(step[: len(golden)]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", sorted(name for name in CASES if CASES[name]["exact_total_variance"] is not None))
def test_exact_variances_are_the_golden_ones(name: str) -> None:
    x, kind, bits = read(name)
    golden = CASES[name]["exact_total_variance"]
    found = float(exact_variance(x, kind, bits))
    is_finer = kind == "ptq" and float(on_grid(x, kind, bits)[1].step) * CASES[name]["scale"] < 1 - 1e-5
    if is_finer:
        assert 0.9 * golden < found < golden
    else:
        assert found == pytest.approx(golden, rel=1e-3)


@pytest.mark.parametrize("bits", [2, 5, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_draws_are_right_on_average_and_vary_as_was_said(kind: str, bits: int) -> None:
    x = torch.randn(24, 20) * torch.logspace(0, -2, 24).unsqueeze(1)
    draws, own = 400, torch.Generator().manual_seed(0)
    samples = torch.stack([quantize(x, kind, bits, generator=own) for _ in range(draws)]).double()
    variance = float(exact_variance(x, kind, bits))
    assert float(samples.var(0).sum()) == pytest.approx(variance, rel=0.05)
    # χ²: the squared error of the mean, over what it should be
    assert 0.6 < float((samples.mean(0) - x.double()).square().sum()) * draws / variance < 1.5


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 10**6),
    st.integers(1, 20),
    st.integers(1, 12),
    st.sampled_from(KINDS),
    st.integers(2, 8),
    st.sampled_from(["normal", "outlier", "positive", "constant", "zeros", "sparse"]),
    st.sampled_from([1.0, 1e-30, 1e30, 1e-3]),
)
def test_bounds_are_never_violated(
    seed: int, count: int, size: int, kind: str, bits: int, make: str, scale: float
) -> None:
    x = torch.randn(count, size, generator=torch.Generator().manual_seed(seed))
    rows = torch.arange(count).unsqueeze(1)
    x = {
        "normal": x,
        "outlier": torch.where(rows == 0, x * 1000, x),
        "positive": x.abs() + 1,
        "constant": torch.where(rows % 2 == 0, 0.7, x),
        "zeros": torch.zeros_like(x),
        "sparse": torch.where(x > 1, x, 0.0),
    }[make] * scale
    exact, bound = exact_variance(x, kind, bits), variance_bound(x, kind, bits)
    assert bool(exact.isfinite())
    assert 0 <= float(exact) <= float(bound) * (1 + 1e-12)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(2, 20), st.integers(1, 12), st.integers(2, 8))
def test_the_bounds_are_those_of_the_paper(seed: int, count: int, size: int, bits: int) -> None:
    x = torch.randn(count, size, generator=torch.Generator().manual_seed(seed)).double()
    bins = 2**bits - 1
    of_rows = (x.amax(1) - x.amin(1)).square().sum() * size / (4 * bins**2)
    assert float(variance_bound(x, "psq", bits)) == pytest.approx(float(of_rows), rel=1e-9)
    step = float(on_grid(x, "ptq", bits)[1].step)
    assert float(variance_bound(x, "ptq", bits)) == pytest.approx(x.numel() * step**2 / 4, rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bit_less_costs_four_times_the_variance(kind: str) -> None:
    matrices = [torch.randn(32, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(5)]
    variances = [sum(float(exact_variance(x, kind, bits)) for x in matrices) for bits in range(8, 3, -1)]
    ratios = [after / before for before, after in pairwise(variances)]
    assert all(3.6 < ratio < 4.9 for ratio in ratios), ratios  # ((2^b − 1) / (2^(b−1) − 1))² is 4.03 to 4.59
    assert (variances[-1] / variances[0]) ** 0.25 == pytest.approx(4.12, rel=0.05)


@pytest.mark.parametrize("small", [0.1, 1e-2, 1e-3])
@pytest.mark.parametrize("bits", range(2, 9))
def test_reflections_beat_samples_and_samples_the_tensor_where_one_stands_out(bits: int, small: float) -> None:
    bhq, psq, ptq = (
        sum(float(exact_variance(outlier(seed, small), kind, bits)) for seed in range(10))
        for kind in ("bhq", "psq", "ptq")
    )
    assert bhq < psq < ptq
    if small < 0.1:
        assert bhq < psq / 8


@pytest.mark.parametrize("small", [1e-1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("count", [4, 32, 128])
def test_an_outlier_costs_no_more_than_by_lagrange_multipliers(count: int, small: float) -> None:
    x = outlier(0, small, count).double()
    ranges = (x.amax(1) - x.amin(1)).sort(descending=True).values
    one, others = float(ranges[0]), float(ranges[1])
    bound = 64 / (4 * 15**2) * (one ** (2 / 3) * count ** (-1 / 3) + others ** (2 / 3) * count ** (2 / 3)) ** 3
    assert float(exact_variance(x, "bhq", 4)) <= bound


def test_variances_are_summed_in_float64_where_squares_would_vanish() -> None:
    x = torch.randn(6, 5)
    for kind in KINDS:
        expected = float(exact_variance(x, kind, 4))
        for scale in (2.0**-100, 2.0**100):
            assert float(exact_variance(x * scale, kind, 4)) == pytest.approx(expected * scale**2, rel=1e-9)
