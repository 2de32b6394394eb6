"""What each placement of a known model sends and holds: `kaisa bench distributed`.

The model is built without storage and nothing runs; the figures are those of `kaisa.kfac.account`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from statistics import fmean

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from kaisa.errors import ConfigurationError
from kaisa.kfac import solvers
from kaisa.kfac.account import Account, Sent, account
from kaisa.kfac.coverage import discover
from kaisa.kfac.layers import EXPAND, REDUCE, LayerOptions
from kaisa.kfac.placement import FactorShape, LayerShape, place
from kaisa.kfac.routes import is_worth_deferring
from kaisa.kfac.solvers import EKFAC, Solver
from kaisa.recipes.zoo import planned_model


def build_accounts(model: str, world_size: int, solver: str = "eigen") -> list[Account]:
    """Return the account of every placement, COMM-OPT first.

    Raises:
        ConfigurationError: there is no such model or solver, or no such world.
    """
    planned = planned_model(model)
    if world_size < 1:
        raise ConfigurationError(f"world-size is {world_size}; give a whole number of at least 1")
    chosen = solvers.named(solver)
    shapes = layer_shapes(planned.build)
    counts = [count for count in range(world_size, 0, -1) if world_size % count == 0]
    return [account_of(shapes, world_size, workers, chosen) for workers in counts]


def account_of(shapes: Sequence[LayerShape], world_size: int, workers: int, solver: Solver) -> Account:
    """Return the account of one placement in float32, with what is the default there."""
    placement = place(shapes, world_size, workers)
    return account(
        placement,
        shapes,
        numbers_held_by(solver),
        has_moments=isinstance(solver, EKFAC),
        damps_factors=solver.damps_factors,
        deferred=is_worth_deferring(world_size, workers, shapes),
    )


def layer_shapes(build: Callable[[], nn.Module]) -> list[LayerShape]:
    """Return the shapes of the layers that K-FAC covers of a model, which is built without storage."""
    with torch.device("meta"):
        layers, _ = discover(build(), LayerOptions(), [], EXPAND, REDUCE)
    return [layer.layer_shape() for layer in layers]


def numbers_held_by(solver: Solver) -> Callable[[FactorShape], int]:
    """Return a function that counts the numbers in the decomposition of a factor."""

    def count(shape: FactorShape) -> int:
        sides = (shape.blocks, shape.size) if shape.is_diagonal else (shape.blocks, shape.size, shape.size)
        return sum(map(prod, solver.layout(torch.Size(sides), shape.is_diagonal)))

    return count


def describe_account(figures: Account, console: Console) -> None:
    """Print the grid and the table of one placement."""
    placement = figures.placement
    console.print(f"{_name(figures)}: {placement.workers} of {placement.world_size} ranks work on each layer")
    console.print(str(placement), markup=False)
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    for heading in ("bytes, most", "bytes, mean", "collectives"):
        table.add_column(heading, justify="right")
    for when, ranks in (
        ("factor step", figures.factor_step),
        ("inverse step", figures.inverse_step),
        ("every step", figures.every_step),
    ):
        for kind in sorted({kind for sent in ranks for kind in sent}):
            sent = [rank.get(kind, Sent(0, 0)) for rank in ranks]
            calls = max(part.calls for part in sent)
            table.add_row(f"{when}: {kind}", *_most_and_mean([part.bytes for part in sent]), str(calls))
    for kind in figures.memory[0]:
        table.add_row(f"held: {kind}", *_most_and_mean([rank[kind] for rank in figures.memory]), "")
    console.print(table)
    console.print()


def summarize_account(figures: Account) -> dict[str, object]:
    """Return the most and the mean over ranks of everything, as JSON takes it."""

    def over_ranks(ranks: Sequence[Mapping[str, Sent]]) -> dict[str, dict[str, float]]:
        kinds = sorted({kind for sent in ranks for kind in sent})
        parts = {kind: [rank.get(kind, Sent(0, 0)) for rank in ranks] for kind in kinds}
        return {
            kind: {
                "most": max(part.bytes for part in sent),
                "mean": fmean(part.bytes for part in sent),
                "collectives": max(part.calls for part in sent),
            }
            for kind, sent in parts.items()
        }

    return {
        "fraction": figures.placement.fraction,
        "factor_step": over_ranks(figures.factor_step),
        "inverse_step": over_ranks(figures.inverse_step),
        "every_step": over_ranks(figures.every_step),
        "memory": {
            kind: {
                "most": max(rank[kind] for rank in figures.memory),
                "mean": fmean(rank[kind] for rank in figures.memory),
            }
            for kind in figures.memory[0]
        },
    }


def _name(figures: Account) -> str:
    workers, world_size = figures.placement.workers, figures.placement.world_size
    kind = {world_size: "COMM-OPT", 1: "MEM-OPT"}.get(workers, "HYBRID-OPT")
    return f"{kind}, fraction {figures.placement.fraction:g}"


def _most_and_mean(values: Sequence[int]) -> tuple[str, str]:
    return f"{max(values):,}", f"{fmean(values):,.0f}"
