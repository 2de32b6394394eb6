"""Grids: rounding that is right on average, and what lies on them exactly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kaisa.grids import Grid, aligned, noise_like, round_at_random_, spanning, symmetric

NUMBERS = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_noise_is_spread_evenly_and_symmetric() -> None:
    noise = noise_like(torch.empty(400_003), generator()).double() * 2**-16
    assert noise.shape == (400_003,)
    assert float(noise.abs().max()) <= 0.5 - 2**-16
    assert abs(float(noise.mean())) < 5 * (1 / 12 / 400_003) ** 0.5
    counts = torch.histc(noise, 16, -0.5, 0.5)
    assert float(((counts - 400_003 / 16).square() / (400_003 / 16)).sum()) < 45  # χ² of 15 degrees: 1 in 10,000


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_at_random_is_right_on_average(dtype: torch.dtype) -> None:
    y = torch.linspace(-255, 255, 1021, dtype=dtype)
    draws, own = 4000, generator()
    mean = sum(round_at_random_(y.clone(), own).double() for _ in range(draws)) / draws
    fraction = (y - y.floor()).double()
    deviation = (fraction * (1 - fraction) / draws).sqrt()
    assert bool(((mean - y.double()).abs() <= 5 * deviation + 2**-16).all())


def test_rounding_at_random_never_moves_an_integer() -> None:
    y = torch.arange(-255.0, 256.0).repeat(2000)
    assert torch.equal(round_at_random_(y.clone(), generator()), y)


@pytest.mark.parametrize("shape", [(300_000,), (7, 50_000), (50_000, 7)])
def test_rounding_at_random_goes_up_or_down_and_no_further(shape: tuple[int, ...]) -> None:
    y = torch.rand(shape, generator=generator()) * 255
    for whole in (y, y.t() if y.dim() == 2 else y):
        found = round_at_random_(whole.clone(memory_format=torch.preserve_format), generator())
        assert bool(((found == whole.floor()) | (found == whole.ceil())).all())
        assert 0.49 < float((found > whole).double().mean()) < 0.51


@settings(deadline=None, max_examples=100)
@given(st.lists(NUMBERS, min_size=1, max_size=12), st.sampled_from([3, 7, 15, 31, 255]), st.booleans(), st.booleans())
def test_numbers_come_back_within_a_step(values: list[float], bins: int, stochastic: bool, with_zero: bool) -> None:
    x = torch.tensor(values)
    grid = (aligned if with_zero else spanning)(x.min(), x.max(), bins)
    codes = grid.encode(x, stochastic=stochastic, generator=generator())
    assert torch.equal(codes, codes.round())
    assert bool(((codes >= grid.low) & (codes <= grid.low + bins)).all())
    error = (grid.decode(codes).double() - x.double()).abs()
    allowed = grid.step.double() * (1 if stochastic else 0.5)
    assert bool((error <= allowed + 1e-6 * x.double().abs().max()).all())


@settings(deadline=None, max_examples=100)
@given(NUMBERS, NUMBERS, st.integers(2, 16))
def test_an_aligned_grid_holds_zero_and_reaches_both_ends(one: float, other: float, bits: int) -> None:
    low, high = torch.tensor(min(one, other)), torch.tensor(max(one, other))
    bins = 2**bits - 1
    grid = aligned(low, high, bins)
    assert float(grid.decode(grid.encode(torch.zeros(64), generator=generator())).abs().max()) == 0
    ends = torch.stack([torch.as_tensor(grid.low), torch.as_tensor(grid.low) + bins]).double() * grid.step.double()
    span = float(max(high, torch.zeros(())).double() - min(low, torch.zeros(())).double())
    assert float(ends[0]) <= min(0.0, float(low)) + 1e-6 * span
    assert float(ends[1]) >= max(0.0, float(high)) - 1e-6 * span
    # the finest of all: no place for 0 makes a smaller step
    below, above = -min(0.0, float(low)), max(0.0, float(high))
    places = range(int(below > 0), bins + 1 - int(above > 0))
    finest = min(max(below / q if q else 0.0, above / (bins - q) if q < bins else 0.0) for q in places)
    assert float(grid.step) == pytest.approx(max(finest, torch.finfo(torch.float32).tiny), rel=1e-5)


def test_a_symmetric_grid_has_as_many_codes_on_either_side() -> None:
    grid = symmetric(torch.tensor(2.0), 254)
    assert (grid.low, grid.bins) == (-127, 254)
    assert grid.decode(grid.encode(torch.tensor([-2.0, 0.0, 2.0]))).tolist() == [-2.0, 0.0, 2.0]


def test_numbers_beyond_a_grid_get_its_ends() -> None:
    grid = spanning(torch.tensor(-1.0), torch.tensor(1.0), 15)
    assert grid.decode(grid.encode(torch.tensor([-5.0, 5.0]))).tolist() == pytest.approx([-1.0, 1.0], abs=1e-6)


@pytest.mark.parametrize("shape", [(20, 30), (7, 50_000), (200, 3000), (1, 300_000)])
@pytest.mark.parametrize("make", ["rows", "columns", "one", "aligned rows", "symmetric rows"])
def test_one_pass_and_in_place_are_codes_and_back(shape: tuple[int, int], make: str) -> None:
    x = torch.randn(shape, generator=generator())
    if make == "one":
        grid: Grid = aligned(x.amin(), x.amax(), 15)
    elif make == "aligned rows":
        x += torch.linspace(-3, 3, len(x)).unsqueeze(1)  # so that their lowest codes differ
        grid = aligned(x.amin(1, keepdim=True), x.amax(1, keepdim=True), 15)
    elif make == "symmetric rows":
        grid = symmetric(x.abs().amax(1, keepdim=True), 14)
    else:
        dimension = 1 if make == "rows" else 0
        grid = spanning(x.amin(dimension, keepdim=True), x.amax(dimension, keepdim=True), 15)
    expected = grid.decode(grid.encode(x, generator=generator(1)))
    assert bool(((expected - x).abs() <= grid.step * 1.0001).all())
    assert torch.equal(grid.rounded(x, generator=generator(1)), expected)
    assert torch.equal(grid.round_(x.clone(), generator=generator(1)), expected)


def test_any_two_numbers_of_noise_are_independent() -> None:
    """χ² of the joint counts of 8 × 8 cells, for pairs that share a drawn number and pairs that do not."""
    draws, own = 6400, generator()
    noise = torch.stack([noise_like(torch.empty(64 * 16), own) for _ in range(draws)])
    bins = (noise.long() + 2**15) // 2**13
    pairs = [(0, 64), (0, 68), (64, 4), (960, 60), (0, 1), (0, 1023), (5, 69), (130, 70)]
    for i, j in pairs:
        counts = torch.bincount(bins[:, i] * 8 + bins[:, j], minlength=64).double()
        chi = float(((counts - draws / 64).square() / (draws / 64)).sum())
        assert 25 < chi < 120, (i, j)  # of 63 degrees; either is 1 in 10,000 or less


def test_errors_of_noise_add_up_as_if_each_was_drawn() -> None:
    y = torch.rand(16 * 256, generator=generator()) * 15
    weights = torch.linspace(-1, 2, len(y)).double()
    draws, own = 3000, generator(1)
    sums = torch.stack([(round_at_random_(y.clone(), own).double() - y) @ weights for _ in range(draws)])
    fraction = (y - y.floor()).double()
    expected = float((fraction * (1 - fraction) * weights.square()).sum())
    assert float(sums.var()) == pytest.approx(expected, rel=5 * (2 / draws) ** 0.5)
