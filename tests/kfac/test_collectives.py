"""The seam to other ranks: its account, and a simulated world that turns every mistake into an assertion."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kaisa.kfac.collectives import Alone, world
from tests.support.world import Simulated, run, run_all


def _exchange(collectives: Simulated, lengths: list[list[int]], kind: str = "things") -> list[Tensor]:
    """Sends ``lengths[i][j]`` numbers from i to j, each 10 i + j."""
    rank, ranks = collectives.rank, tuple(range(collectives.world_size))
    chunks = [torch.full((lengths[rank][other],), 10.0 * rank + other) for other in ranks]
    return collectives.exchange(kind, ranks, chunks, [lengths[other][rank] for other in ranks])()


def test_an_exchange_brings_every_rank_its_chunk_of_every_other() -> None:
    lengths = [[1, 2, 0], [3, 1, 4], [0, 0, 2]]
    for rank, received in enumerate(run(3, lambda collectives: _exchange(collectives, lengths))):
        for other, chunk in enumerate(received):
            assert torch.equal(chunk, torch.full((lengths[other][rank],), 10.0 * other + rank))


def test_a_total_is_the_sum_on_every_rank() -> None:
    totals = run(3, lambda ranks: ranks.total("sum", (0, 1, 2), torch.tensor([1.0, ranks.rank])))
    assert all(torch.equal(total, torch.tensor([3.0, 3.0])) for total in totals)


def test_bytes_and_calls_are_counted_by_kind_and_never_what_a_rank_keeps() -> None:
    def main(collectives: Simulated) -> Simulated:
        _exchange(collectives, [[5, 2], [3, 7]], "first")
        _exchange(collectives, [[5, 2], [3, 7]], "first")
        collectives.total("second", (0, 1), torch.zeros(3, dtype=torch.float64))
        return collectives

    zero, one = run(2, main)
    assert zero.bytes_sent == {"first": 2 * 2 * 4, "second": 24}
    assert one.bytes_sent == {"first": 2 * 3 * 4, "second": 24}
    assert zero.calls == one.calls == {"first": 2, "second": 1}


def test_alone_a_rank_gets_back_what_it_gives_and_nothing_is_counted() -> None:
    alone = Alone()
    tensor = torch.arange(3.0)
    assert alone.exchange("things", (0,), [tensor], [3])() == [tensor]
    assert alone.total("things", (0,), tensor) is tensor
    assert not alone.bytes_sent
    assert not alone.calls
    assert world() == (0, 1)


def test_groups_of_some_ranks_meet_independently() -> None:
    def main(collectives: Simulated) -> Tensor:
        collectives.prepare({(0, 1), (2, 3)})
        pair = (0, 1) if collectives.rank < 2 else (2, 3)
        if collectives.rank >= 2:
            collectives.total("more", pair, torch.zeros(1))
        return collectives.total("sum", pair, torch.tensor([float(collectives.rank)]))

    assert [float(total) for total in run(4, main)] == [1.0, 1.0, 5.0, 5.0]


def _kinds(collectives: Simulated) -> None:
    collectives.total("apples" if collectives.rank else "pears", (0, 1), torch.zeros(1))


def _shapes(collectives: Simulated) -> None:
    collectives.total("fruit", (0, 1), torch.zeros(1 + collectives.rank))


def _types(collectives: Simulated) -> None:
    collectives.total("fruit", (0, 1), torch.zeros(1, dtype=torch.float64 if collectives.rank else torch.float32))


def _order(collectives: Simulated) -> None:
    for kind in ("apples", "pears") if collectives.rank else ("pears", "apples"):
        collectives.total(kind, (0, 1), torch.zeros(1))


def _lengths(collectives: Simulated) -> None:
    ranks = (0, 1)
    collectives.exchange("fruit", ranks, [torch.zeros(2), torch.zeros(2)], [2, 2 + collectives.rank])()


def _groups(collectives: Simulated) -> None:
    collectives.prepare({(0, 1)} if collectives.rank else {(0,)})


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (_kinds, r"(pears.*apples|apples.*pears)"),
        (_shapes, r"\(1,\).*\(2,\)|\(2,\).*\(1,\)"),
        (_types, r"float32.*float64|float64.*float32"),
        (_order, r"(pears.*apples|apples.*pears)"),
        (_lengths, "rank 1 sends 2 numbers to rank 1, which expects 3"),
        (_groups, "prepare"),
    ],
)
def test_ranks_that_disagree_all_fail_with_both_headers(mistake: Callable[[Simulated], None], message: str) -> None:
    _, failures = run_all(2, mistake)
    assert sorted(failures) == [0, 1]
    for failure in failures.values():
        with pytest.raises(AssertionError, match=message):
            raise failure


def test_a_rank_that_never_comes_is_named_at_once() -> None:
    def main(collectives: Simulated) -> None:
        if collectives.rank != 1:
            collectives.total("sum", (0, 1, 2), torch.zeros(1))

    _, failures = run_all(3, main)
    assert sorted(failures) == [0, 2]
    for failure in failures.values():
        with pytest.raises(
            AssertionError, match=r"^nobody can go on: .*waits for ranks \[1\] in total sum .*rank 1 has"
        ):
            raise failure


def test_ranks_that_wait_for_one_another_are_found_at_once() -> None:
    def main(collectives: Simulated) -> None:
        collectives.prepare({(0, 1), (1, 2), (0, 2)})
        order = {0: ((0, 1), (0, 2)), 1: ((1, 2), (0, 1)), 2: ((0, 2), (1, 2))}[collectives.rank]
        for ranks in order:
            collectives.total("sum", ranks, torch.zeros(1))

    with pytest.raises(AssertionError, match="nobody can go on: rank 0 waits for"):
        run(3, main)


def test_a_rank_that_is_busy_for_too_long_is_an_error_and_not_a_hang() -> None:
    def main(collectives: Simulated) -> None:
        if collectives.rank:
            time.sleep(0.5)
        collectives.total("sum", (0, 1), torch.zeros(1))

    with pytest.raises(AssertionError, match=r"rank 0 waited 0.1 s: rank 0 waits for ranks \[1\] in total sum"):
        run(2, main, timeout=0.1)


def test_an_operation_that_nobody_waits_for_must_still_be_joined_by_all() -> None:
    def main(collectives: Simulated) -> None:
        if collectives.rank == 0:
            collectives.exchange("lonely", (0, 1), [torch.zeros(1)] * 2, [1, 1])

    with pytest.raises(AssertionError, match=r"ranks \[1\] never came to exchange lonely"):
        run(2, main)


def test_the_first_failure_of_a_rank_is_raised_and_ends_the_others() -> None:
    def main(collectives: Simulated) -> None:
        if collectives.rank == 1:
            raise ValueError("my own mistake")
        collectives.total("sum", (0, 1), torch.zeros(1))

    with pytest.raises(ValueError, match="my own mistake"):
        run(2, main)


@pytest.mark.parametrize("ranks", [(1, 0), (0, 0, 1), (1,)])
def test_groups_are_sorted_and_hold_the_rank_that_asks(ranks: tuple[int, ...]) -> None:
    def main(collectives: Simulated) -> None:
        if collectives.rank == 0:
            collectives._total("sum", ranks, torch.zeros(1))

    with pytest.raises(AssertionError, match=r"not sorted|is not one of"):
        run(2, main)


def test_a_group_that_nobody_prepared_cannot_meet() -> None:
    with pytest.raises(AssertionError, match=r"nobody prepared \(0, 1\)"):
        run(3, lambda collectives: collectives.rank < 2 and collectives.total("sum", (0, 1), torch.zeros(1)))
