"""A machine is measured as its profile says: fits recover known links, tables end in time, all ranks take part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial

import pytest
import torch
from torch import Tensor

from kaisa.kfac import linalg
from kaisa.kfac.collectives import Alone, Collectives, Wait
from kaisa.kfac.hardware import Hardware, Link
from kaisa.kfac.solvers import WarmStart
from kaisa.recipes import calibration
from kaisa.recipes.calibration import Effort, _Bench, _factors, _measure_links, _table, calibrate, fastest
from tests.support.world import run

CPU = torch.device("cpu")
TINY = Effort(
    sides=(8, 16),
    orders=(8, 16),
    batched_orders=(8,),
    seconds=0.002,
    numbers=600,
    copied=1000,
    images=2,
    pixels=32,
    layers=3,
)


@pytest.mark.parametrize(("world", "per_node"), [(1, 1), (2, 2), (4, 2), (2, 1)])
def test_every_world_yields_a_whole_profile_that_is_read_again(world: int, per_node: int) -> None:
    found = run(world, lambda ranks: calibrate(ranks, CPU, ranks_per_node=per_node, effort=TINY))[0]
    assert Hardware.from_json(found.to_json()) == found
    assert found.ranks_per_node == per_node
    assert set(found.products) == set(found.batched_products) == {"float32", "float64", "bfloat16"}
    assert set(found.decompositions) == set(found.batched_decompositions) == {"eigen", "cholesky", "warm_eigen"}
    tables = [*found.products.values(), *found.batched_products.values(), *found.decompositions.values()]
    assert {table[0][0] for table in tables} == {8.0}  # a busy machine may find the second size too long
    assert all(value > 0 for table in tables for _, value in table)
    assert set(found.overheads) == {"statistics", "factors", "inverses", "precondition"}
    assert 0 < found.training <= 1
    assert found.memory is not None
    assert found.memory_bandwidth > 0
    assert [count for count, _ in found.contention] == [count for count in (1, 2, 4) if count <= world]
    assert found.contention[0][1] == 1.0


def test_every_measured_field_says_where_it_comes_from() -> None:
    found = calibrate(Alone(), CPU, effort=TINY)
    assert set(found.sources) == {entry.name for entry in fields(Hardware)} - {"name", "ranks_per_node", "sources"}
    assert "one rank has nobody to send to" in found.sources["exchange_inside"]
    assert "torch" in found.sources["products"]


def test_what_is_measured_is_told() -> None:
    told: list[str] = []
    calibrate(Alone(), CPU, effort=TINY, report=told.append)
    assert told == [
        "products of matrices",
        "decompositions",
        "memory and training",
        "all ranks at once",
        "exchanges and sums",
    ]


class Modelled(Collectives):
    """The first of some ranks, whose collectives take a known time, told instead of spent."""

    def __init__(self, world_size: int, per_node: int, inside: Link, between: Link) -> None:
        super().__init__()
        self.world_size, self.per_node = world_size, per_node
        self.links = {True: inside, False: between}
        self.seconds = 0.0

    def _exchange(self, kind: str, ranks: tuple[int, ...], chunks: Sequence[Tensor], sizes: Sequence[int]) -> Wait:
        sent = sum(chunk.nbytes for chunk in chunks)
        everybody_sends = sum(sizes) > 0
        self.seconds = self._link(ranks).seconds(sent, self.per_node * sent * everybody_sends, len(ranks) - 1)
        return lambda: [torch.zeros(size) for size in sizes]

    def _total(self, kind: str, ranks: tuple[int, ...], tensor: Tensor) -> Tensor:
        self.seconds = self._link(ranks).seconds(tensor.nbytes, 0, len(ranks) - 1)
        return tensor

    def _link(self, ranks: tuple[int, ...]) -> Link:
        return self.links[ranks[-1] < self.per_node]

    def timed(self, operation: Callable[[], object], device: torch.device) -> float:
        operation()
        return self.seconds


INSIDE = Link(20e-6, 5e-6, 4e9, 6e9)
BETWEEN = Link(90e-6, 2e-6, 1e9, 1.5e9)


@pytest.mark.parametrize(("world", "per_node"), [(12, 4), (8, 4), (4, 4), (6, 3)])
def test_known_links_are_recovered(world: int, per_node: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Modelled(world, per_node, INSIDE, BETWEEN)
    monkeypatch.setattr(calibration, "_timed", ranks.timed)
    (exchange, total), (far_exchange, far_total) = _measure_links(ranks, CPU, Effort(numbers=12 * 2**16), per_node)
    nodes = world // per_node
    expected = [(exchange, INSIDE), (far_exchange, BETWEEN if nodes > 1 else INSIDE)]
    for found, link in expected:
        # Of two peers' messages alone nobody can tell what one costs and what each costs.
        peers = (nodes if link is BETWEEN else per_node) - 1
        assert found.latency + peers * found.per_peer == pytest.approx(link.latency + peers * link.per_peer, rel=0.01)
        if peers > 1:
            assert found.per_peer == pytest.approx(link.per_peer, rel=0.01)
        assert found.bandwidth == pytest.approx(link.bandwidth, rel=0.01)
        assert found.shared == pytest.approx(link.shared, rel=0.01)
    assert total.bandwidth == pytest.approx(INSIDE.bandwidth, rel=0.01)
    assert far_total.bandwidth == pytest.approx((BETWEEN if nodes > 1 else INSIDE).bandwidth, rel=0.01)


def test_ranks_that_do_not_disturb_each_other_share_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Modelled(4, 4, Link(1e-5, 1e-6, 1e9), BETWEEN)
    monkeypatch.setattr(calibration, "_timed", ranks.timed)
    assert _Bench(ranks, [(0, 1, 2, 3)], CPU).exchange_link(3 * 2**16, 4).shared is None


def test_one_sender_among_many_sends_to_all_others_in_equal_parts() -> None:
    def measure(ranks: Collectives) -> int:
        _Bench(ranks, [(0, 1, 2)], CPU)._exchange((0, 1, 2), 600, senders=(0,))
        return ranks.bytes_sent["calibration"]

    assert run(3, measure) == [4 * 600, 0, 0]


def test_a_table_ends_before_a_size_that_would_take_too_long() -> None:
    measured: list[int] = []

    def measure(size: int) -> float:
        measured.append(size)
        return size**3 * 1e-9

    rows = _table((128, 256, 512, 1024, 2048), measure, lambda _, taken: taken, seconds=0.1)
    assert measured == [128, 256, 512]  # 1024³ nanoseconds are more than a second
    assert rows[-1] == (512.0, 512**3 * 1e-9)


def test_the_fastest_run_counts_and_the_first_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.001, 0.3, 0.2, 0.4, 0.2])
    monkeypatch.setattr(calibration, "_timed", lambda operation, device: next(times))
    assert fastest(lambda: None, CPU, 1.0) == 0.2


@pytest.mark.parametrize("order", [16, 64, 256])
def test_a_warm_start_is_timed_where_it_turns_the_basis(order: int) -> None:
    first, later = (factor.double() for factor in _factors(2, order, CPU))
    basis = linalg.eigh(first)[1]
    ratios = linalg.off_diagonal_ratio(basis.mT @ later @ basis)
    rule = WarmStart()
    assert ((rule.keep_below < ratios) & (ratios < rule.decompose_above)).all()


def test_ranks_that_wait_do_not_count_among_those_that_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four ranks that time-share two cores two take no longer than one, and all of them twice as long."""
    computing = {1: 1.0, 2: 1.0, 4: 2.0}
    for count, seconds in computing.items():
        monkeypatch.setattr(calibration, "_mean_seconds", lambda run, device, spent, seconds=seconds: seconds)
        assert run(4, partial(together, count)) == [seconds] * 4


def together(count: int, ranks: Collectives) -> float:
    return calibration._together(ranks, count, lambda: None, CPU, 0.0)


def test_a_collective_costs_what_it_usually_does(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([9.0, 1.0, 5.0])
    monkeypatch.setattr(calibration, "_timed", lambda operation, device: next(seconds))
    bench = _Bench(Alone(), [(0,)], CPU)
    assert bench._seconds([(0,)], lambda group: None, 3) == 5.0
