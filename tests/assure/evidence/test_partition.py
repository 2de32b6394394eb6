"""Reliability from cells against golden moments, long simulations and counting by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kaisa.assure.evidence.partition import (
    Cell,
    Clusters,
    Grid,
    PartitionReliability,
    combine,
    count_cells,
)
from kaisa.errors import ConfigurationError, DataError

CELLS = (Cell(500, 200, 1), Cell(300, 50, 0), Cell(150, 20, 3), Cell(50, 0, 0))


def draws(cells: tuple[Cell, ...], count: int = 400_000) -> np.ndarray:
    generator = np.random.default_rng(7)
    profile = generator.dirichlet([cell.seen + 1 for cell in cells], count)
    rates = np.stack(
        [
            generator.beta(cell.failures + 1, cell.tests - cell.failures + 1, count) if cell.tests else np.ones(count)
            for cell in cells
        ],
        1,
    )
    return (profile * rates).sum(1)


def test_golden_moments_of_independent_cells() -> None:
    o, vo = [0.5, 0.3, 0.15, 0.05], np.array([0.0001, 0.0001, 5e-05, 1e-05])
    e, ve = [0.001, 0.01, 0.05, 1.0], [1e-06, 1e-05, 0.0001, 0.0]
    mean, variance = combine(o, vo, e, ve)
    assert mean == pytest.approx(0.061, rel=1e-12)
    by_hand = sum(b * c**2 + d**2 * f + b * f for b, c, d, f in zip(ve, o, e, vo, strict=True))
    assert variance == pytest.approx(by_hand, rel=1e-12)


def test_moments_and_bound_are_those_of_the_posterior() -> None:
    found = PartitionReliability(CELLS, belief=0.95)
    drawn = draws(CELLS)
    mean, variance = found.moments
    assert mean == pytest.approx(drawn.mean(), rel=2e-3)
    assert variance == pytest.approx(drawn.var(), rel=2e-2)
    assert found.value == pytest.approx(np.quantile(drawn, 0.95), rel=1e-2)


def test_no_cell_without_failures_counts_as_perfect_and_none_without_tests_as_tested() -> None:
    found = PartitionReliability((Cell(100, 10, 0), Cell(1, 0, 0)))
    assert Cell(100, 10, 0).moments[0] == pytest.approx(1 / 12)
    assert Cell(1, 0, 0).moments == (1.0, 0.0)
    assert found.mean == pytest.approx(101 / 103 / 12 + 2 / 103)
    assert "1 of them without tests and counted as failing" in found.statement
    assert found.unweighted == pytest.approx((1 / 12 + 1) / 2)


def test_more_failures_in_a_common_cell_raise_the_bound_more_than_in_a_rare_one() -> None:
    base = PartitionReliability((Cell(900, 100, 0), Cell(100, 100, 0))).value
    common = PartitionReliability((Cell(900, 100, 5), Cell(100, 100, 0))).value
    rare = PartitionReliability((Cell(900, 100, 0), Cell(100, 100, 5))).value
    assert base < rare < common


def test_stratified_tests_are_weighed_by_the_profile_and_not_by_their_number() -> None:
    # 1 % of operation fails always; half of the tests are from there.
    cells = (Cell(99_000, 5000, 0), Cell(1000, 5000, 5000))
    assert PartitionReliability(cells).mean == pytest.approx(0.01, rel=0.05)


def test_cells_are_counted() -> None:
    seen, tested = torch.tensor([0, 0, 2, 1]), torch.tensor([2, 2, 0])
    failed = torch.tensor([True, False, False])
    assert count_cells(seen, tested, failed, 4) == (Cell(2, 1, 0), Cell(1, 0, 0), Cell(1, 2, 1), Cell(0, 0, 0))


def test_clusters_are_found_where_they_are() -> None:
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    true = torch.arange(300) % 3
    features = centres[true] + 0.5 * torch.randn(300, 2)
    clusters = Clusters.of(features, 3, seed=1)
    found = clusters(features)
    assert {len(set(found[true == index].tolist())) for index in range(3)} == {1}
    assert len(set(found.tolist())) == 3
    assert torch.equal(found, Clusters.of(features, 3, seed=1)(features))


def test_a_grid_deals_a_box_out_and_keeps_what_lies_outside() -> None:
    grid = Grid((0.0, 0.0), (1.0, 2.0), 2)
    assert grid.cells == 4
    points = torch.tensor([[0.1, 0.1], [0.9, 0.1], [0.1, 1.9], [0.9, 1.9], [-5.0, 9.0]])
    assert grid(points).tolist() == [0, 1, 2, 3, 2]


def test_bad_input_is_refused() -> None:
    with pytest.raises(DataError, match="3 failures in 2 tests"):
        Cell(1, 2, 3)
    with pytest.raises(DataError, match="no cell has seen an input"):
        PartitionReliability((Cell(0, 5, 0),))
    with pytest.raises(DataError, match="cells from 0 to 4; there are those from 0 to 3"):
        count_cells(torch.tensor([0, 4]), torch.tensor([0]), torch.tensor([True]), 4)
    with pytest.raises(DataError, match="1 tests with 2 results"):
        count_cells(torch.tensor([0]), torch.tensor([0]), torch.tensor([True, False]), 4)
    with pytest.raises(DataError, match="2 inputs make no 3 cells"):
        Clusters.of(torch.zeros(2, 2), 3)
    with pytest.raises(DataError, match="not finite"):
        Clusters.of(torch.full((5, 2), float("nan")), 3)
    with pytest.raises(ConfigurationError, match="cells is 1"):
        Clusters.of(torch.zeros(5, 2), 1)
    with pytest.raises(ConfigurationError, match="give low below high"):
        Grid((0.0,), (0.0,), 2)
