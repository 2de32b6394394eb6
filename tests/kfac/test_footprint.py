"""What exchanges bring each rank and how much of it is there at one time, against what a run was sent, and by hand."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import kaisa
from kaisa.kfac import routes as routing
from kaisa.kfac.account import DECOMPOSITIONS, GRADIENTS, STATISTICS, Sizes, account
from kaisa.kfac.collectives import Wait
from kaisa.kfac.footprint import received_bytes
from kaisa.kfac.hardware import Hardware
from kaisa.kfac.payload import Payload
from kaisa.kfac.placement import FactorShape, LayerShape, place
from kaisa.kfac.prediction import predict
from kaisa.kfac.routes import Routes
from kaisa.kfac.workload import SOLVERS, LayerWork, Settings, Workload
from tests.support.world import Simulated, run

KINDS = (STATISTICS, DECOMPOSITIONS, GRADIENTS)


class Counting(Simulated):
    """A rank that counts the bytes that others send it."""

    def __init__(self, like: Simulated) -> None:
        super().__init__(like.world, like.rank)
        self.bytes_received: Counter[str] = Counter()

    def _exchange(self, kind: str, ranks: tuple[int, ...], chunks: Sequence[Tensor], sizes: Sequence[int]) -> Wait:
        others = sum(size for rank, size in zip(ranks, sizes, strict=True) if rank != self.rank)
        self.bytes_received[kind] += others * chunks[0].element_size()
        return super()._exchange(kind, ranks, chunks, sizes)


def lopsided() -> nn.Module:
    """One factor is far larger than all others together."""
    return nn.Sequential(nn.Linear(40, 4), nn.Tanh(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def received_in_a_run(world_size: int, workers: int, payload: Payload) -> tuple[Routes, list[Counter[str]]]:
    built, examples = lopsided(), torch.randn(3, 40)

    def main(collectives: Simulated) -> tuple[Routes, Counter[str]]:
        model, ranks = copy.deepcopy(built), Counting(collectives)
        kfac = kaisa.KFACPreconditioner(
            model, collectives=ranks, kl_clip=None, payload=payload, grad_worker_fraction=workers / world_size
        )
        model(examples).square().mean().backward()
        kfac.step()
        routes = Routes(kfac.placement, tuple(layer.layer_shape() for layer in kfac._layers.values()), 25 * 2**20)
        return routes, ranks.bytes_received

    found = run(world_size, main)
    return found[0][0], [received for _, received in found]


@pytest.mark.parametrize("form", [None, "int8"])
@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("is_sliced", [False, True])
def test_what_exchanges_bring_is_what_a_run_is_sent(
    is_sliced: bool, workers: int, form: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routing, "_WORTH_SLICING", 0 if is_sliced else 2**40)
    routes, found = received_in_a_run(4, workers, Payload(statistics=form, gradients=form))
    assert set(routes.sliced_buckets.values()) == {is_sliced}
    size = form or 4
    told = received_bytes(routes, Sizes(size, size), SOLVERS["eigen"].held)
    for rank, received in enumerate(found):
        for kind in KINDS:
            # Slices differ by a number, which the one for all ranks does not know; in 8 bits a scale more goes with it.
            off = 3 * 8 * len(routes.layers) * (is_sliced and kind == STATISTICS)
            assert told[kind][rank] == pytest.approx(received[kind], abs=off, rel=1e-12), (rank, kind)


@pytest.mark.parametrize("workers", [1, 4, 16])
def test_as_much_is_received_as_is_sent(workers: int) -> None:
    """One factor of side 2049 and many of 64: its messages go through slices."""
    shapes = [LayerShape("large", FactorShape(2047), FactorShape(63), (1, 63, 2047))]
    shapes += [LayerShape(f"small{index}", FactorShape(64), FactorShape(63), (1, 63, 64)) for index in range(40)]
    routes = Routes(place(shapes, 16, workers), tuple(shapes), 25 * 2**20)
    told = account(routes.placement, shapes, SOLVERS["eigen"].held)
    received = received_bytes(routes, Sizes(), SOLVERS["eigen"].held)
    assert any(routes.sliced_buckets.values())
    for kind in KINDS:
        steps = [*told.factor_step, *told.inverse_step, *told.every_step]
        sent = sum(step[kind].bytes for step in steps if kind in step)
        # The largest slice stands for all: of each of 16 ranks a number too much from each of 15 others.
        assert sum(received[kind]) == pytest.approx(sent, abs=4 * 16 * 15, rel=0)


def test_no_more_messages_than_may_be_on_their_way_are_counted() -> None:
    """Ten equal layers, a bucket each: the factors of side 10 of all of them are owned by two ranks in turn."""
    shapes = [LayerShape(f"{index}", FactorShape(10), FactorShape(10), (1, 10, 10)) for index in range(10)]
    workload = Workload("ten", tuple(LayerWork(shape, 5) for shape in shapes))
    placement = place(shapes, 2, 1, colocate=True)
    found = predict(workload, placement, Hardware.load("v100"), Settings(bucket_bytes=1))
    triangles, header = 2 * 4 * 55, 8 * 4
    whole = triangles + 2 * header  # to both ranks
    for rank in (0, 1):
        # Of four in a row two are owned by a rank, which gets a copy of both ranks.
        flight = 4 * (whole + 2 * header) + 2 * (2 * triangles) + 2 * whole
        assert found.memory[rank]["messages"] == flight
