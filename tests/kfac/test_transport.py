"""What travels: statistics to their owners, decompositions down the column, gradients along the row."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kaisa.errors import ConfigurationError
from kaisa.kfac.factors import Statistics
from kaisa.kfac.payload import Payload
from kaisa.kfac.placement import FactorShape, LayerShape, Placement, place
from kaisa.kfac.solvers import Eigen, Solver
from kaisa.kfac.transport import Transport, groups_of
from tests.support.world import Simulated, run, run_all

SHAPES = [
    LayerShape("dense", FactorShape(3), FactorShape(2), (1, 2, 3)),
    LayerShape("blocks", FactorShape(2, blocks=2), FactorShape(3, blocks=2), (2, 3, 2), has_blocks=True),
    LayerShape("diagonal", FactorShape(5, is_diagonal=True), FactorShape(2), (1, 2, 5)),
    LayerShape("tied", FactorShape(4, is_diagonal=True), FactorShape(2), (1, 2, 4), uses=2),
]


def _sides(shape: LayerShape) -> list[tuple[int, ...]]:
    result = []
    for factor in (shape.a, shape.g):
        leading = ((shape.uses,) if shape.uses > 1 else ()) + ((factor.blocks,) if shape.has_blocks else ())
        result.append((*leading, factor.size) if factor.is_diagonal else (*leading, factor.size, factor.size))
    return result


def statistics(shape: LayerShape, rank: int) -> Statistics:
    """Returns sums that differ from rank to rank and layer to layer."""
    generator = torch.Generator().manual_seed(100 * rank + len(shape.name))
    parts = []
    for factor, size in zip((shape.a, shape.g), _sides(shape), strict=True):
        part = torch.randn(size, generator=generator, dtype=torch.float64)
        parts.append(part if factor.is_diagonal else part + part.mT)
    return Statistics(*parts, positions=3.0 + rank, examples=1.0 + rank)


def transport(collectives: Simulated, workers: int, payload: Payload | None = None, **placing: Any) -> Transport:
    placement = place(SHAPES, collectives.world_size, workers, **placing)
    collectives.prepare(groups_of(placement))
    types = {shape.name: torch.float64 for shape in SHAPES}
    solver: Solver = Eigen()
    device = torch.device("cpu")
    return Transport(collectives, placement, SHAPES, solver, payload or Payload(), types, types, device)


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("bucket_bytes", [1, 100, 10**6])
@pytest.mark.parametrize("placing", [{}, {"colocate": True}, {"local_below": 3}], ids=str)
def test_owners_get_the_sum_of_all_ranks_and_nobody_else_gets_anything(
    workers: int, bucket_bytes: int, placing: dict[str, Any]
) -> None:
    def main(collectives: Simulated) -> None:
        own = transport(collectives, workers, Payload(bucket_bytes=bucket_bytes), **placing)
        sums, counts = own.reduction({shape.name: statistics(shape, collectives.rank) for shape in SHAPES})
        for shape in SHAPES:
            everything = [statistics(shape, rank) for rank in range(4)]
            assert float(counts[shape.name].positions) == sum(part.positions for part in everything) == 18
            assert float(counts[shape.name].examples) == 10
            assert bool(counts[shape.name].is_finite)
            for side in (0, 1):
                expected = torch.stack([part.g if side else part.a for part in everything]).sum(0)
                if own.owns(shape.name, side):
                    found = sums[shape.name].g if side else sums[shape.name].a
                    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)
                elif shape.name in sums:
                    assert (sums[shape.name].g if side else sums[shape.name].a).numel() == 0

    run(4, main)


def test_a_layer_that_a_rank_has_not_used_counts_as_zeros() -> None:
    def main(collectives: Simulated) -> None:
        own = transport(collectives, 1)
        local = {"dense": statistics(SHAPES[0], 1)} if collectives.rank == 1 else {}
        sums, counts = own.reduction(local)
        if own.owns("dense", 0):
            torch.testing.assert_close(sums["dense"].a, statistics(SHAPES[0], 1).a)
        assert float(counts["dense"].examples) == 2
        assert bool(counts["dense"].is_finite)
        assert not bool(counts["blocks"].is_finite)  # nobody has any

    run(3, main)


@pytest.mark.parametrize("side", [0, 1])
def test_what_is_not_finite_on_one_rank_is_known_to_all(side: int) -> None:
    def main(collectives: Simulated) -> dict[str, bool]:
        local = {shape.name: statistics(shape, collectives.rank) for shape in SHAPES}
        if collectives.rank == 1:
            (local["blocks"].g if side else local["blocks"].a)[0, 0, 0] = float("inf")
        _, counts = transport(collectives, 1).reduction(local)
        return {name: bool(count.is_finite) for name, count in counts.items()}

    expected = {"dense": True, "blocks": False, "diagonal": True, "tied": True}
    assert run(2, main) == [expected] * 2


@pytest.mark.parametrize("bucket_bytes", [1, 100, 10**6])
def test_buckets_that_go_early_on_some_ranks_give_the_same_sums(bucket_bytes: int) -> None:
    def main(collectives: Simulated, is_early: bool) -> dict[str, Statistics]:
        own = transport(collectives, 1, Payload(bucket_bytes=bucket_bytes))
        local = {shape.name: statistics(shape, collectives.rank) for shape in SHAPES}
        if is_early and collectives.rank == 1:
            own.reduction.send_next(
                lambda name: name != "dense", lambda names: {name: local.pop(name) for name in names}
            )
            assert len(local) < len(SHAPES) or bucket_bytes > 100
        return own.reduction(local)[0]

    early, late = (run(2, lambda ranks, is_early=is_early: main(ranks, is_early)) for is_early in (True, False))
    for first, second in zip(early, late, strict=True):
        assert first.keys() == second.keys()
        for name, sums in first.items():
            assert torch.equal(sums.a, second[name].a)
            assert torch.equal(sums.g, second[name].g)


def test_what_comes_after_its_bucket_has_gone_is_added_to_the_next_sums() -> None:
    def main(collectives: Simulated) -> tuple[float, float]:
        own = transport(collectives, 1, Payload(bucket_bytes=1))
        totals = []
        for _ in range(2):
            sent = {shape.name: statistics(shape, 0) for shape in SHAPES}
            own.reduction.send_next(
                lambda name: True, lambda names, sent=sent: {name: sent.pop(name) for name in names}
            )
            _, counts = own.reduction({"tied": statistics(SHAPES[3], 0)})  # used once more than was expected
            totals.append(float(counts["tied"].examples))
        return totals[0], totals[1]

    assert run(2, main) == [(2.0, 4.0)] * 2


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("placing", [{}, {"colocate": True}, {"local_below": 3}], ids=str)
def test_gradient_workers_get_the_decompositions_of_their_column(workers: int, placing: dict[str, Any]) -> None:
    def main(collectives: Simulated) -> None:
        own = transport(collectives, workers, **placing)
        expected = {(shape.name, side): _decomposition(shape, side) for shape in SHAPES for side in (0, 1)}
        names = [shape.name for shape in SHAPES]
        shared = own.share(names, {key: value for key, value in expected.items() if own.owns(*key)})
        assert list(shared) == [name for name in names if own.is_gradient_worker(name)]
        for name, sides in shared.items():
            for side in (0, 1):
                for found, part in zip(sides[side], expected[name, side], strict=True):
                    assert torch.equal(found, part)

    run(4, main)


def _decomposition(shape: LayerShape, side: int) -> tuple[torch.Tensor, ...]:
    factor = (shape.a, shape.g)[side]
    leading = (factor.blocks,) if shape.has_blocks else ()
    generator = torch.Generator().manual_seed(len(shape.name) + 50 * side)
    values = torch.rand(*leading, factor.size, generator=generator, dtype=torch.float64)
    if factor.is_diagonal:
        return (values,)
    return values, torch.randn(*leading, factor.size, factor.size, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("names", [["dense", "blocks", "diagonal", "tied"], ["blocks", "tied"], []])
def test_every_rank_gets_all_preconditioned_gradients(workers: int, names: list[str]) -> None:
    shapes = {shape.name: shape for shape in SHAPES}

    def gradient(name: str) -> torch.Tensor:
        size = shapes[name].gradient if shapes[name].has_blocks else shapes[name].gradient[1:]
        return torch.randn(size, generator=torch.Generator().manual_seed(len(name)), dtype=torch.float64)

    def main(collectives: Simulated) -> None:
        own = transport(collectives, workers)
        found = own.spread(names, {name: gradient(name) for name in names if own.is_gradient_worker(name)})()
        assert sorted(found) == sorted(names)
        assert all(torch.equal(found[name], gradient(name)) for name in names)

    run(4, main)


def test_rounded_gradients_are_the_same_bits_on_all_ranks_also_on_the_sender() -> None:
    def main(collectives: Simulated) -> torch.Tensor:
        own = transport(collectives, 1, Payload(gradients=torch.bfloat16))
        exact = torch.full((2, 3), 1 / 3, dtype=torch.float64)
        return own.spread(["dense"], {"dense": exact} if own.is_gradient_worker("dense") else {})()["dense"]

    for found in run(2, main):
        assert torch.equal(found, torch.full((2, 3), 1 / 3).bfloat16().double())


def test_ranks_that_were_built_differently_are_told_apart_by_what_differs() -> None:
    def main(collectives: Simulated) -> None:
        facts = {"model": "the same", "seed": str(collectives.rank == 2), "solver": "eigen"}
        transport(collectives, 1).agree(facts)

    _, failures = run_all(3, main)
    assert sorted(failures) == [0, 1, 2]
    for failure in failures.values():
        with pytest.raises(ConfigurationError, match=r"differently: seed \(ranks \[2\] differ from rank 0\)$"):
            raise failure


@pytest.mark.parametrize("field", ["statistics", "gradients"])
def test_a_payload_of_whole_numbers_is_refused(field: str) -> None:
    with pytest.raises(ConfigurationError, match=f"Payload.{field} is torch.int8; give a floating-point type"):
        Payload(**{field: torch.int8})


def test_a_bucket_of_no_bytes_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="bucket_bytes is 0; give at least 1"):
        Payload(bucket_bytes=0)


@pytest.mark.parametrize(("world_size", "workers"), [(1, 1), (8, 1), (8, 2), (8, 8)])
def test_all_groups_of_a_placement_are_its_rows_and_columns_and_everybody(world_size: int, workers: int) -> None:
    placement = Placement(world_size, workers, ())
    assert groups_of(placement) == {*placement.rows, *placement.columns, tuple(range(world_size))}
