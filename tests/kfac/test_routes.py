"""Even slices of what ranks send: they are a partition, and go together again as what they were cut from."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kaisa.kfac.account import account
from kaisa.kfac.placement import FactorShape, LayerShape, place
from kaisa.kfac.routes import Routes, even_slices, is_worth_slicing, overlaps


@given(st.lists(st.integers(0, 50), min_size=1, max_size=9))
def test_the_overlaps_of_all_ranges_with_the_slices_are_a_partition(sizes: list[int]) -> None:
    bounds = even_slices(sum(sizes), len(sizes))
    assert max(high - low for low, high in bounds) - min(high - low for low, high in bounds) <= 1
    received = [0] * len(sizes)
    start = 0
    for size in sizes:
        parts = overlaps(start, start + size, bounds)
        assert sum(high - low for low, high in parts) == size
        for rank, (low, high) in enumerate(parts):
            received[rank] += high - low
        start += size
    assert received == [high - low for low, high in bounds]


def layer(name: str, a: int, g: int) -> LayerShape:
    return LayerShape(name, FactorShape(a), FactorShape(g), (1, g, a))


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=6), st.sampled_from([2, 4, 6]))
def test_the_pieces_of_all_slices_are_every_factor_once(sides: list[tuple[int, int]], world: int) -> None:
    layers = tuple(layer(str(index), a, g) for index, (a, g) in enumerate(sides))
    routes = Routes(place(layers, world, 1), layers, 5000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kaisa.kfac.routes.is_worth_slicing", lambda shares: True)
        for bucket in routes.statistics_buckets:
            slices = [routes.pieces(bucket, rank) for rank in range(world)]
            seen: dict[tuple[str, int], list[tuple[int, int]]] = {}
            for pieces in slices:
                for key, low, high in pieces:
                    seen.setdefault(key, []).append((low, high))
            assert set(seen) == {(name, side) for name in bucket for side in (0, 1)}
            for key, parts in seen.items():
                assert parts[0][0] == 0
                assert parts[-1][1] == routes.packed_size(key)
                assert all(first[1] == second[0] for first, second in pairwise(parts))
            sizes = [sum(high - low for _, low, high in pieces) for pieces in slices]
            assert max(sizes) - min(sizes) <= 1


def test_two_steps_are_for_one_share_far_above_the_even_one() -> None:
    million = 10**6
    assert not is_worth_slicing([million] * 64)
    assert not is_worth_slicing([million, 0])  # two ranks: it would be sent twice
    assert is_worth_slicing([million] + [0] * 63)
    assert not is_worth_slicing([100] + [0] * 63)  # a message of latency alone


def test_the_owner_of_the_largest_factor_of_resnet50_does_not_get_a_copy_from_every_rank() -> None:
    """Of 64 ranks one owns the factor of side 4608, whose triangle is 42.5 MB."""
    layers = [layer("conv", 4608, 512), *(layer(f"small{index}", 577, 64) for index in range(60))]
    placement = place(layers, 64, 64)
    routes = Routes(placement, tuple(layers), 25 * 2**20)
    owner = placement["conv"].a_owners[0]
    most = 0
    for bucket, is_sliced in routes.sliced_buckets.items():
        most += 63 * 4 * sum(high - low for _, low, high in routes.pieces(bucket, owner))
        most += 4 * sum(routes.packed_size(key) for key in routes.owned_by(owner, bucket)) * is_sliced
    direct = 63 * 4 * 4608 * 4609 // 2
    assert most < direct / 20
    told = account(placement, layers, lambda factor: factor.size**2 + factor.size)
    sent = [rank["decompositions"].bytes for rank in told.inverse_step]
    assert max(sent) < 4 * (4608**2 + 4608) * 3  # and not 63 times
