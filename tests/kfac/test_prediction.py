"""What a placement will cost: memory against a recount of tensors, traffic against the account, time by hand."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kaisa
from kaisa.kfac.hardware import Hardware, Link
from kaisa.kfac.payload import Payload
from kaisa.kfac.placement import FactorShape, LayerShape, Placement, place
from kaisa.kfac.prediction import Prediction, placed, predict
from kaisa.kfac.survey import survey
from kaisa.kfac.workload import LayerWork, Settings, Workload, statistics_operations
from tests.support.training import batch, network
from tests.support.world import Simulated, run

FREE = Link(latency=0.0, per_peer=0.0, bandwidth=1e30)
UNIT = Hardware(
    name="unit",
    ranks_per_node=2,
    products={"float32": ((1.0, 1.0),)},
    batched_products={},
    decompositions={"eigen": ((1.0, 1.0), (10.0, 1000.0))},
    memory_bandwidth=1e30,
    exchange_inside=FREE,
    exchange_between=FREE,
    total_inside=FREE,
    total_between=FREE,
)
"""A machine on which an operation takes a second, n³ seconds are a decomposition, and all else is free."""

SHAPES = [
    LayerShape(name, FactorShape(size), FactorShape(2), (1, 2, size))
    for name, size in zip("abcd", (4, 3, 3, 3), strict=True)
]
WORKLOAD = Workload("four", tuple(LayerWork(shape, 5) for shape in SHAPES), forward_flops=100.0, parameters=50)


def prediction(workers: int = 1, world_size: int = 4, hardware: Hardware = UNIT, **settings: Any) -> Prediction:
    return predict(WORKLOAD, place(SHAPES, world_size, workers), hardware, Settings(**settings))


# ------------------------------------------------------------------------------------------------------------- memory


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 3))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, stride=2, groups=4),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(72, 5),
    )


def images(shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    return (torch.randn(4, *shape, generator=torch.Generator().manual_seed(0)),)


def tied_arguments() -> tuple[Tensor, ...]:
    examples = batch(0)[:4]
    return examples.images, examples.tokens


def untied() -> nn.Module:
    return network(is_tied=False)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]], int]] = {
    "perceptron": (perceptron, lambda: images((6,)), 4),
    "convolutional": (convolutional, lambda: images((3, 8, 8)), 4),
    "tied network of float64": (network, tied_arguments, 8),
    "network with an embedding of float64": (untied, tied_arguments, 8),
}
FRACTIONS = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]


def recount(
    model_of: Callable[[], nn.Module], arguments: tuple[Tensor, ...], world_size: int, **options: Any
) -> list[dict[str, int]]:
    """Returns what every rank of a run holds after a step that updates factors and decomposes nothing."""
    built = model_of()

    def main(collectives: Simulated) -> dict[str, int]:
        model = copy.deepcopy(built)
        kfac = kaisa.KFACPreconditioner(
            model, collectives=collectives, kl_clip=None, factor_update_steps=1, inv_update_steps=10, **options
        )
        for _ in range(2):
            outputs = model(*arguments)
            F.cross_entropy(outputs, torch.arange(len(outputs)) % outputs.shape[1]).backward()
            kfac.step()
        return kfac.memory_usage()

    return run(world_size, main)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("world_size", "workers"), FRACTIONS)
def test_memory_between_steps_is_what_a_recount_of_tensors_finds(model: str, world_size: int, workers: int) -> None:
    build, arguments, size = MODELS[model]
    options = {"grad_worker_fraction": workers / world_size}
    found = recount(build, arguments(), world_size, **options)
    _compare(found, build, arguments(), workers, Settings(factor_bytes=size, decomposition_bytes=size))


@pytest.mark.parametrize("solver", ["cholesky", "ekfac"])
def test_memory_of_other_solvers_is_what_a_recount_finds(solver: str) -> None:
    found = recount(convolutional, images((3, 8, 8)), 2, grad_worker_fraction="mem", solver=solver)
    _compare(found, convolutional, images((3, 8, 8)), 1, Settings(solver=solver))


@pytest.mark.parametrize("deferred", [False, True])
def test_memory_with_and_without_deferred_statistics_is_what_a_recount_finds(deferred: bool) -> None:
    for workers in (1, 2):
        payload = Payload(deferred=deferred)
        found = recount(perceptron, images((6,)), 2, grad_worker_fraction=workers / 2, payload=payload)
        _compare(found, perceptron, images((6,)), workers, Settings(deferred=deferred))
        assert all((usage["statistics"] > 0) == deferred for usage in found)


def test_memory_of_smaller_types_is_what_a_recount_finds() -> None:
    found = recount(perceptron, images((6,)), 1, factor_dtype=torch.float32, inv_dtype=torch.bfloat16)
    _compare(found, perceptron, images((6,)), 1, Settings(decomposition_bytes=2))


def _compare(
    found: list[dict[str, int]],
    build: Callable[[], nn.Module],
    arguments: tuple[Tensor, ...],
    workers: int,
    settings: Settings,
) -> None:
    workload = survey(build(), arguments)
    hardware, settings = Hardware.load("v100-edr"), replace(settings, factor_update_steps=1, inv_update_steps=10)
    placement = placed(workload, len(found), workers, hardware, settings)
    predicted = predict(workload, placement, hardware, settings)
    for own, memory in zip(found, predicted.memory, strict=True):
        assert own["total"] > 0
        for kind, size in own.items():
            assert memory[kind] == pytest.approx(size, rel=0.01), kind
        assert memory["peak"] > memory["total"]


@pytest.mark.parametrize("deferred", [None, False, True])
@pytest.mark.parametrize("local_below", ["auto", 0, 5])
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_a_placement_is_the_one_that_the_preconditioner_makes(
    workers: int, local_below: int | str, deferred: bool | None
) -> None:
    def main(collectives: Simulated) -> Placement:
        return kaisa.KFACPreconditioner(
            network(is_tied=False),
            collectives=collectives,
            kl_clip=None,
            grad_worker_fraction=workers / 4,
            local_below=local_below,
            ranks_per_node=2,
            factor_dtype=torch.float64,
            factor_update_steps=2,
            inv_update_steps=4,
            payload=Payload(deferred=deferred),
        ).placement

    settings = Settings(
        factor_update_steps=2, inv_update_steps=4, local_below=local_below, deferred=deferred, factor_bytes=8
    )
    expected = placed(survey(untied(), tied_arguments()), 4, workers, UNIT, settings)
    assert run(4, main) == [expected] * 4


def test_the_peak_is_that_of_an_owner_to_whom_all_others_send() -> None:
    found = prediction(workers=1, world_size=64)
    (owner,) = found.placement["a"].a_owners
    memory = found.memory[owner]
    # A header of three numbers a layer and one, 104 bytes; the owner's 10 + 3 numbers of 40 that travel.
    # The message is there three times while it is made: as triangles, as messages to each rank, and in one piece.
    sent, received = 64 * 104 + 4 * 40, 64 * (104 + 4 * 13)
    added_up, new = 4 * 13, 4 * (16 + 4)
    assert memory["batch statistics"] == 4 * (16 + 3 * 9 + 4 * 4)
    fullest = memory["batch statistics"] + added_up + max(3 * sent + received, new)
    assert memory["peak"] == memory["total"] + fullest
    assert found.peak == memory["peak"]


# --------------------------------------------------------------------------------------------------------- operations


def test_operations_are_counted_as_products_of_matrices() -> None:
    one = prediction(world_size=1)
    layers = [(shape.a.size, shape.g.size) for shape in SHAPES]
    assert one.operations["statistics"] == sum(2 * 5 * (a * a + g * g) for a, g in layers)
    assert one.operations["solve"] == sum(4 * (g * g * a + g * a * a) for a, g in layers)
    assert one.operations["decompose"] == sum(9 * (a**3 + g**3) for a, g in layers)
    assert prediction(world_size=1, accumulation_steps=3).operations["statistics"] == 3 * one.operations["statistics"]


def test_a_convolution_of_stride_one_is_not_unfolded() -> None:
    shape = LayerShape("c", FactorShape(16 * 9), FactorShape(8), (1, 8, 16 * 9))
    unfolded, shifted = LayerWork(shape, 100, "convolution"), LayerWork(shape, 100, "convolution", (3, 3))
    assert statistics_operations(unfolded) == 2 * 100 * (144**2 + 8**2)
    assert statistics_operations(shifted) == 2 * 100 * (16**2 * 3 * 5 + 8**2)
    assert statistics_operations(replace(shifted, operations=7.0)) == 7.0


# --------------------------------------------------------------------------------------------------------------- time


def test_steps_are_made_of_their_phases() -> None:
    one = prediction(world_size=1, factor_update_steps=2, inv_update_steps=8)
    statistics, solve = one.operations["statistics"], one.operations["solve"]
    decompose = 4**3 + 3 * 3**3 + 4 * 2**3
    assert one.seconds["model"] == pytest.approx(3 * 100 / 0.5)
    assert one.seconds["statistics"] == pytest.approx(statistics)
    assert one.seconds["inverses"] == pytest.approx(decompose)
    assert one.seconds["precondition"] == pytest.approx(solve)
    assert one.plain_step == pytest.approx(600 + solve)
    assert one.factor_step == pytest.approx(600 + solve + statistics)
    assert one.inverse_step == pytest.approx(600 + solve + statistics + decompose)
    assert one.average_step == pytest.approx(600 + solve + statistics / 2 + decompose / 8)


def test_all_wait_for_the_rank_that_decomposes_longest_and_for_the_column_that_solves_longest() -> None:
    mem, comm = prediction(workers=1), prediction(workers=4)
    assert mem.seconds["inverses"] == pytest.approx(4**3 + 2**3)  # four layers, four ranks
    assert comm.seconds["inverses"] == pytest.approx(4**3)
    assert mem.parts["solve"] == pytest.approx(4 * (2 * 2 * 4 + 2 * 4 * 4))
    assert comm.parts["solve"] == pytest.approx(comm.operations["solve"])


def test_small_factors_are_decomposed_by_all_gradient_workers() -> None:
    placement = place(SHAPES, 4, 2, local_below=10)
    found = predict(WORKLOAD, placement, UNIT, Settings(local_below=10))
    columns = [4**3 + 2**3, 3 * (3**3 + 2**3)]
    assert found.parts["decompose"] == pytest.approx(max(columns))
    assert found.parts["share"] == 0


def test_decompositions_of_crowded_ranks_take_longer_only_as_far_as_they_run_at_once() -> None:
    crowded = replace(UNIT, ranks_per_node=4, contention=((1.0, 1.0), (4.0, 4.0)))
    loads = [4**3 + 2**3] + [3**3 + 2**3] * 3
    found = prediction(workers=1, hardware=crowded).seconds["inverses"]
    assert found == pytest.approx(sum(loads))  # one core for all of them


def test_spread_decompositions_make_no_step_long_and_the_average_no_shorter() -> None:
    at_once, spread = (prediction(deferred=False, spread=spread, inv_update_steps=10) for spread in (False, True))
    assert spread.average_step == at_once.average_step
    assert spread.inverse_step - spread.factor_step == pytest.approx(at_once.seconds["inverses"] / 10)


@pytest.mark.parametrize(("ranks_per_node", "is_inside"), [(1, False), (2, True), (4, True)])
def test_rows_use_the_link_inside_a_node_where_they_lie_in_one(ranks_per_node: int, is_inside: bool) -> None:
    hardware = replace(
        UNIT,
        ranks_per_node=ranks_per_node,
        exchange_inside=replace(FREE, latency=1.0),
        exchange_between=replace(FREE, latency=100.0),
    )
    found = prediction(workers=2, hardware=hardware)  # rows of two contiguous ranks
    assert found.parts["spread"] == (1.0 if is_inside else 100.0)
    assert found.parts["share"] == (1.0 if ranks_per_node == 4 else 100.0)  # columns of ranks two apart


def test_an_exchange_takes_as_long_as_its_busiest_sender_or_receiver() -> None:
    hardware = replace(UNIT, ranks_per_node=4, exchange_inside=replace(FREE, bandwidth=1.0))
    found = prediction(workers=1, hardware=hardware, deferred=False)
    sent = [4 * 2 * 4 * 3] + [4 * 2 * 3 * 3] * 3  # of preconditioned gradients, to three others
    received = [sum(sent) / 3 - own / 3 for own in sent]
    assert found.parts["spread"] == pytest.approx(max(sent + received))
    # A header of three numbers a layer and one, 104 bytes, and the owner's 10 + 3 numbers from three others.
    triangles = [10 + 3] + [6 + 3] * 3
    received = [3 * (104 + 4 * own) for own in triangles]
    sent = [3 * 104 + 4 * (sum(triangles) - own) for own in triangles]
    assert found.parts["reduce"] == pytest.approx(max(sent + received))


def test_messages_hide_behind_work_only_where_the_machine_can_do_both() -> None:
    slow = replace(UNIT, ranks_per_node=4, exchange_inside=replace(FREE, bandwidth=0.5))
    hiding, working = (prediction(hardware=replace(slow, overlap=share), deferred=False) for share in (1.0, 0.0))
    parts = working.parts
    assert working.seconds["factors"] == pytest.approx(parts["reduce"])
    assert working.seconds["precondition"] == pytest.approx(parts["solve"] + parts["spread"])
    assert 0 <= hiding.seconds["factors"] < working.seconds["factors"]
    assert max(parts["solve"], parts["spread"]) <= hiding.seconds["precondition"]


def test_deferred_statistics_are_paid_once_for_each_decomposition() -> None:
    slow = replace(UNIT, ranks_per_node=4, exchange_inside=replace(FREE, bandwidth=0.5), overlap=0.0)
    at_once, late = (prediction(hardware=slow, deferred=deferred, inv_update_steps=50) for deferred in (False, True))
    reduce = at_once.parts["reduce"]
    assert late.seconds["factors"] == pytest.approx(at_once.seconds["factors"] / 5)
    assert at_once.average_step - late.average_step == pytest.approx(reduce / 10 - reduce / 50)
    assert late.inverse_step == pytest.approx(at_once.inverse_step)
    assert prediction(workers=4).is_deferred
    assert not prediction(workers=2).is_deferred
    assert not prediction(world_size=1).is_deferred


def test_ranks_that_have_nothing_to_do_crowd_nobody() -> None:
    """Of four layers of different sizes on four ranks one has most; all others together have as much again, or more."""
    crowded = replace(UNIT, ranks_per_node=4, contention=((1.0, 1.0), (2.0, 1.0), (4.0, 2.0)))
    for workers in (1, 4):
        free, busy = (prediction(workers=workers, hardware=machine, local_below=0) for machine in (UNIT, crowded))
        columns = [4 * (4 * a + a * a * 2) for a in (4, 3, 3, 3)]  # of G of side 2 and A of side a, two products each
        together = sum(columns) / max(columns) if workers == 1 else 4
        expected = max(columns) if workers == 1 else sum(columns)
        assert free.parts["solve"] == pytest.approx(expected)
        assert busy.parts["solve"] == pytest.approx(expected * crowded.crowding(together))


@pytest.mark.parametrize(("world_size", "turns"), [(2, 1), (4, 3), (8, 6), (4096, 24)])
def test_a_sum_over_many_ranks_goes_up_a_tree_and_down_again(world_size: int, turns: int) -> None:
    patient = replace(UNIT, ranks_per_node=1, total_between=Link(latency=5.0, per_peer=1.0, bandwidth=1e30))
    assert prediction(world_size=world_size, hardware=patient).parts["mean"] == pytest.approx(5 + turns)


def test_a_measured_step_takes_the_place_of_a_predicted_one() -> None:
    workload = replace(WORKLOAD, plain_seconds=7.0)
    found = predict(workload, place(SHAPES, 1, 1), UNIT, Settings())
    assert found.seconds["model"] == 7.0


@pytest.mark.parametrize("workers", [1, 64, 4096])
def test_a_thousand_layers_on_four_thousand_ranks_are_predicted_in_a_moment(workers: int) -> None:
    shapes = [LayerShape(f"{i}", FactorShape(1000 + i), FactorShape(999), (1, 999, 1000 + i)) for i in range(1000)]
    workload = Workload("large", tuple(LayerWork(shape, 1000) for shape in shapes))
    hardware = Hardware.load("h100")

    def seconds(some: Workload, world_size: int, workers: int) -> float:
        begin = time.process_time()
        predict(some, place(some.shapes, world_size, workers), hardware, Settings())
        return time.process_time() - begin

    small = replace(workload, layers=workload.layers[:500])
    # Not layers times ranks: eight times the ranks and twice the layers take far less than sixteen times as long.
    base = min(seconds(small, 512, min(workers, 512)) for _ in range(3))
    assert min(seconds(workload, 4096, workers) for _ in range(3)) < 10 * base
