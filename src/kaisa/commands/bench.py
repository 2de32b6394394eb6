"""`kaisa bench`: figures of the library."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from kaisa.commands.race import race
from kaisa.recipes.distributed import build_accounts, describe_account
from kaisa.recipes.zoo import MODELS as PLANNED_MODELS

bench = typer.Typer(help="Figures of the library.", no_args_is_help=False)
bench.command()(race)


@bench.callback()
def _bench() -> None:
    """Figures of the library."""


@bench.command()
def distributed(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(PLANNED_MODELS)}.")] = "resnet20",
    world_size: Annotated[int, typer.Option(help="How many ranks.")] = 8,
    solver: Annotated[str, typer.Option(help="Eigen, cholesky, ekfac or sqrt_ekfac.")] = "eigen",
) -> int:
    """Show what every placement of a model sends, and holds, by formula: no process is started."""
    console = Console(highlight=False)
    for account in build_accounts(model, world_size, solver):
        describe_account(account, console)
    return 0
