"""Who does what, as properties of any list of shapes on any grid."""

from __future__ import annotations

import itertools
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kaisa.errors import ConfigurationError
from kaisa.kfac import LayerOptions
from kaisa.kfac.coverage import discover
from kaisa.kfac.placement import FactorShape, LayerShape, LocalRule, Placement, gradient_workers, place

SETTINGS = settings(max_examples=50, deadline=None)

factors = st.builds(
    FactorShape, size=st.integers(1, 40), blocks=st.sampled_from([1, 1, 1, 3]), is_diagonal=st.booleans()
)


@st.composite
def layers(draw: st.DrawFn) -> list[LayerShape]:
    names = draw(st.lists(st.text("abc.0", min_size=1, max_size=6), min_size=1, max_size=20, unique=True))
    shapes = []
    for name in names:
        a, g = draw(factors), draw(factors)
        shapes.append(LayerShape(name, a, g, (1, g.size, a.size), uses=draw(st.sampled_from([1, 1, 2]))))
    return shapes


def square(name: str, size: int) -> LayerShape:
    return LayerShape(name, FactorShape(size), FactorShape(size), (1, size, size))


@st.composite
def grids(draw: st.DrawFn) -> tuple[int, int]:
    world_size = draw(st.integers(1, 24))
    return world_size, draw(st.sampled_from([count for count in range(1, world_size + 1) if world_size % count == 0]))


@SETTINGS
@given(layers(), grids(), st.booleans(), st.sampled_from([0, 8, 100]), st.randoms(use_true_random=False))
def test_the_order_of_the_layers_changes_nothing(
    shapes: list[LayerShape], grid: tuple[int, int], colocate: bool, local_below: int, random: object
) -> None:
    shuffled = list(shapes)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    first = place(shapes, *grid, colocate=colocate, local_below=local_below)
    second = place(shuffled, *grid, colocate=colocate, local_below=local_below)
    assert dict(first.assignments) == dict(second.assignments)
    assert [name for name, _ in second.assignments] == [shape.name for shape in shuffled]


@SETTINGS
@given(layers(), grids(), st.booleans(), st.sampled_from([0, 8, 100]))
def test_every_factor_is_owned_inside_its_column(
    shapes: list[LayerShape], grid: tuple[int, int], colocate: bool, local_below: int
) -> None:
    placement = place(shapes, *grid, colocate=colocate, local_below=local_below)
    for shape in shapes:
        work = placement[shape.name]
        assert work.gradient_workers in placement.columns
        for factor, owners in ((shape.a, work.a_owners), (shape.g, work.g_owners)):
            is_local = factor.size < local_below and shape.uses == 1
            assert owners == work.gradient_workers if is_local else len(owners) == 1
            assert set(owners) <= set(work.gradient_workers)


@SETTINGS
@given(layers(), grids(), st.booleans())
def test_both_factors_of_a_tied_or_colocated_layer_have_one_owner(
    shapes: list[LayerShape], grid: tuple[int, int], colocate: bool
) -> None:
    placement = place(shapes, *grid, colocate=colocate)
    for shape in shapes:
        if colocate or shape.uses > 1:
            assert placement[shape.name].a_owners == placement[shape.name].g_owners


@SETTINGS
@given(layers(), grids())
def test_no_column_and_no_rank_has_more_than_graham_allows(shapes: list[LayerShape], grid: tuple[int, int]) -> None:
    placement = place(shapes, *grid, colocate=True)
    costs = {shape.name: shape.a.work + shape.g.work for shape in shapes}
    columns = dict.fromkeys(placement.columns, 0.0)
    for name, cost in costs.items():
        columns[placement[name].gradient_workers] += cost
    _assert_balanced(list(columns.values()), list(costs.values()))
    for column in placement.columns:
        ranks = dict.fromkeys(column, 0.0)
        own = [name for name in costs if placement[name].gradient_workers == column]
        for name in own:
            ranks[placement[name].a_owners[0]] += costs[name]
        _assert_balanced(list(ranks.values()), [costs[name] for name in own])


def _assert_balanced(loads: list[float], costs: list[float]) -> None:
    """List scheduling: the longest bin is at most the mean of all plus (1 − 1/m) of one task, whatever the order."""
    most = max(costs, default=0.0)
    assert max(loads) <= sum(costs) / len(loads) + (1 - 1 / len(loads)) * most + 1e-6
    assert sum(loads) == pytest.approx(sum(costs))


@SETTINGS
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 3))
def test_the_longest_first_is_within_four_thirds_of_the_best(sizes: list[int], ranks: int) -> None:
    none = FactorShape(1, is_diagonal=True)
    shapes = [LayerShape(str(index), FactorShape(size), none, (1, 1, size)) for index, size in enumerate(sizes)]
    placement = place(shapes, ranks, ranks, colocate=True)

    def longest(owners: tuple[int, ...]) -> float:
        loads = [sum(s.a.work for s, owner in zip(shapes, owners, strict=True) if owner == r) for r in range(ranks)]
        return max(loads)

    best = min(longest(owners) for owners in itertools.product(range(ranks), repeat=len(shapes)))
    found = longest(tuple(placement[shape.name].a_owners[0] for shape in shapes))
    assert found <= (4 / 3 - 1 / (3 * ranks)) * best * (1 + 1e-12)


@SETTINGS
@given(grids())
def test_rows_are_contiguous_and_columns_strided(grid: tuple[int, int]) -> None:
    world_size, workers = grid
    placement = Placement(world_size, workers, ())
    length = world_size // workers
    assert placement.rows == tuple(tuple(range(i * length, (i + 1) * length)) for i in range(workers))
    assert placement.columns == tuple(tuple(range(i, world_size, length)) for i in range(length))
    assert placement.fraction == workers / world_size
    assert all(rank in placement.row(rank) for rank in range(world_size))


@SETTINGS
@given(layers(), grids())
def test_every_rank_receives_from_the_gradient_worker_in_its_row(
    shapes: list[LayerShape], grid: tuple[int, int]
) -> None:
    placement = place(shapes, *grid)
    for shape in shapes:
        for rank in range(grid[0]):
            sender = placement.sender(shape.name, rank)
            assert {sender} == set(placement.row(rank)) & set(placement[shape.name].gradient_workers)


@pytest.mark.parametrize("grid", [(4, 1), (4, 2), (4, 4)])
def test_ties_are_broken_by_name(grid: tuple[int, int]) -> None:
    shapes = [LayerShape(name, FactorShape(3), FactorShape(3), (1, 3, 3)) for name in "abcde"]
    answers = {frozenset(place(order, *grid).assignments) for order in itertools.permutations(shapes)}
    assert len(answers) == 1


def test_a_measured_cost_replaces_the_modelled_one() -> None:
    shapes = [LayerShape(name, FactorShape(2), FactorShape(2), (1, 2, 2)) for name in ("a", "b", "c")]
    sizes = {"a": 5.0, "b": 1.0, "c": 1.0}
    by_identity = {id(factor): sizes[shape.name] for shape in shapes for factor in (shape.a, shape.g)}
    placement = place(shapes, 2, 1, cost=lambda factor: by_identity[id(factor)])
    assert placement["b"].gradient_workers == placement["c"].gradient_workers != placement["a"].gradient_workers


def test_the_answer_does_not_depend_on_the_hash_seed() -> None:
    program = (
        "import sys, types\n"
        "for name in ('kaisa', 'kaisa.kfac'):\n"  # the packages without what they import: no torch
        "    sys.modules[name] = types.ModuleType(name)\n"
        "    sys.modules[name].__path__ = [path + '/' + name.replace('.', '/') for path in sys.path]\n"
        "from kaisa.kfac.placement import *\n"
        "shapes = [LayerShape(n, FactorShape(3), FactorShape(3), (1, 3, 3)) for n in 'hgfedcba']\n"
        "print(place(shapes, 8, 2).assignments)"
    )
    answers = {
        subprocess.run(
            [sys.executable, "-c", program], env={**_environment(), "PYTHONHASHSEED": seed}, capture_output=True,
            text=True, check=True,
        ).stdout
        for seed in ("0", "1")
    }  # fmt: skip
    assert len(answers) == 1


def _environment() -> dict[str, str]:
    return {"PYTHONPATH": ":".join(sys.path)}


def test_the_grid_of_the_design_is_drawn() -> None:
    assert str(Placement(8, 2, ())) == "| 0 1 2 3 |\n| 4 5 6 7 |"


# -------------------------------------------------------------------------------------------------------- fractions


@pytest.mark.parametrize("world_size", range(1, 25))
def test_every_divisor_is_a_fraction_and_the_names_are_fractions(world_size: int) -> None:
    divisors = [count for count in range(1, world_size + 1) if world_size % count == 0]
    assert [gradient_workers(count / world_size, world_size) for count in divisors] == divisors
    assert gradient_workers("comm", world_size) == gradient_workers(1, world_size) == world_size
    assert gradient_workers("mem", world_size) == gradient_workers(0, world_size) == 1
    half = gradient_workers("hybrid", world_size)
    assert abs(half - world_size / 2) == min(abs(count - world_size / 2) for count in divisors)


@pytest.mark.parametrize(
    ("fraction", "world_size", "message"),
    [
        (0.3, 4, "1.2 gradient workers, which do not divide them; the nearest that do are 1/4 or 2/4"),
        (0.9, 8, "7.2 gradient workers, which do not divide them; the nearest that do are 4/8 or 8/8"),
        (0.5, 7, "3.5 gradient workers, which do not divide them; the nearest that do are 1/7 or 7/7"),
        (0.4, 12, "4.8 gradient workers, which do not divide them; the nearest that do are 4/12 or 6/12"),
        ("auto-ish", 4, "'auto-ish'; give 'comm', 'hybrid', 'mem' or a number"),
        (-0.1, 4, "-0.1; give a number from 0 to 1"),
        (1.5, 4, "1.5; give a number from 0 to 1"),
        (2, 4, "2; give a number from 0 to 1"),
        (True, 4, "True; give a number from 0 to 1"),
        (float("nan"), 4, "nan; give a number from 0 to 1"),
        (None, 4, "None; give"),
        ([0.5], 4, "give"),
    ],
)
def test_a_fraction_that_makes_no_grid_is_refused_with_those_that_do(
    fraction: object, world_size: int, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        gradient_workers(fraction, world_size)  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [3, 5])
def test_workers_that_do_not_divide_the_world_are_refused(workers: int) -> None:
    with pytest.raises(ConfigurationError, match=f"{workers} gradient workers do not divide 8 ranks"):
        place([], 8, workers)


@pytest.mark.parametrize("workers", [0, -2, 16])
def test_fewer_workers_than_one_or_more_than_ranks_are_refused(workers: int) -> None:
    with pytest.raises(ConfigurationError, match="gradient workers"):
        place([], 8, workers)


# ---------------------------------------------------------------------------------------------------- shapes of layers


def test_shapes_known_beforehand_are_those_of_the_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(6 * 4, 5))
    layers, _ = discover(model, LayerOptions(largest_dense=10), [], "expand", "expand")
    x = torch.randn(8, 4, 4, 4)
    inputs: dict[nn.Module, torch.Tensor] = {}
    for module in model:
        inputs[module] = x
        x = module(x)
    outputs = {module: module(inputs[module]) for module in model}
    for layer in layers:
        module = layer.modules[0]
        sums = layer.statistics(module, inputs[module].detach(), torch.randn_like(outputs[module]))
        shape = layer.layer_shape()
        assert (sums.a.numel(), sums.g.numel()) == (shape.a.elements, shape.g.elements)
        assert layer.values().numel() == shape.gradient_elements
        assert shape.has_blocks == (layer.values().ndim == 3)


# ----------------------------------------------------------------------------------------------- machines of the ranks


@pytest.mark.parametrize(
    ("world_size", "ranks_per_node", "workers", "fits"),
    [(8, 4, 4, True), (8, 4, 2, True), (8, 4, 1, False), (12, 4, 4, False), (12, 4, 6, True), (6, 1, 6, True)],
)
def test_rows_stay_in_nodes_where_no_row_has_ranks_of_two(
    world_size: int, ranks_per_node: int, workers: int, fits: bool
) -> None:
    placement = place([square("layer", 4)], world_size, workers, ranks_per_node=ranks_per_node)
    crossing = [row for row in placement.rows if len({rank // ranks_per_node for rank in row}) > 1]
    assert placement.rows_stay_in_nodes == (not crossing) == fits


def test_hybrid_takes_rows_that_stay_in_a_node() -> None:
    assert gradient_workers("hybrid", 12) == 6
    assert gradient_workers("hybrid", 12, ranks_per_node=3) == 4  # rows of 3, because rows of 2 would cross
    assert gradient_workers("hybrid", 12, ranks_per_node=4) == 6
    assert gradient_workers("hybrid", 4, ranks_per_node=1) == 2  # no row fits


def test_the_drawing_shows_where_another_machine_begins() -> None:
    placement = place([square("layer", 4)], 8, 2, ranks_per_node=2)
    assert str(placement) == "| 0 1 : 2 3 |\n| 4 5 : 6 7 |"


@pytest.mark.parametrize("ranks_per_node", [0, -1, 3, 2.0, True])
def test_machines_that_the_ranks_do_not_fill_are_refused(ranks_per_node: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"ranks_per_node is .*, which 8 ranks do not fill; give "):
        place([square("layer", 4)], 8, 2, ranks_per_node=ranks_per_node)


# --------------------------------------------------------------------------------------------------- the local rule


@pytest.mark.parametrize("workers", [1, 2, 8, 64])
@pytest.mark.parametrize("exchanges", [1.0, 2.0, 10.0])
@pytest.mark.parametrize("size", [1, 2, 5, 20, 100, 1000])
def test_a_factor_is_decomposed_locally_where_the_whole_world_loses_less_time(
    size: int, exchanges: float, workers: int
) -> None:
    rule = LocalRule(exchanges, per_byte=2e-9, per_operation=1e-10, overhead=1e-6)
    decomposing = 1e-6 + 1e-10 * size**3
    triangle, decomposition = 4 * size * (size + 1) / 2, 4 * (size**2 + size)
    # Seconds of one rank: its share of the decompositions, and of what it sends, in an interval of decompositions.
    sent = decomposing / workers + 2e-9 * ((workers - 1) * decomposition + exchanges * triangle)
    local = decomposing + 2e-9 * exchanges * workers * triangle
    assert rule.is_cheaper_locally(FactorShape(size), workers) == (workers > 1 and local < sent)


def test_the_rule_gives_small_factors_to_all_gradient_workers() -> None:
    rule = LocalRule(1.0, per_byte=1e-8, overhead=1e-6)
    placement = place([square("layer", 4), square("wide", 3000)], 8, 4, local_rule=rule)
    assert placement["layer"].a_owners == placement["layer"].gradient_workers
    assert len(placement["wide"].a_owners) == 1


def test_statistics_that_travel_often_leave_nothing_to_gain_locally() -> None:
    assert not any(LocalRule(2.0).is_cheaper_locally(FactorShape(size), 512) for size in range(1, 3000, 7))
