"""`kaisa plan`: the fastest placement that fits on other hardware, or the profile of this machine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from kaisa.commands.arguments import MACHINE, check_writable, option
from kaisa.commands.processes import count_ranks
from kaisa.errors import ConfigurationError
from kaisa.kfac.collectives import absent_ranks_named, join_world, launched_world, leave_world, start_processes
from kaisa.kfac.hardware import Hardware, shipped_profiles
from kaisa.recipes.calibration import calibrate
from kaisa.recipes.files import written_whole
from kaisa.recipes.plan import ALLOWED, build_plan, describe_plan, draw_trade_off
from kaisa.recipes.zoo import MODELS as PLANNED_MODELS

PLANNED = "What is planned"
CHOICE = "What may be chosen"
FILES = "Files"


def plan(
    context: typer.Context,
    model: Annotated[
        str, option(f"One of {', '.join(PLANNED_MODELS)}; resnet50 unless given", panel=PLANNED)
    ] = "resnet50",
    world_size: Annotated[int, option("How many ranks [64]", panel=PLANNED)] = 64,
    hardware: Annotated[
        str | None,
        option(f"{', '.join(shipped_profiles())}, or a file that --calibrate has made", panel=PLANNED),
    ] = None,
    batch: Annotated[
        int | None, option("Examples a rank; unless given, as the model is usually trained", panel=PLANNED)
    ] = None,
    factor_update_steps: Annotated[int, option("Steps between two updates of the factors [10]", panel=PLANNED)] = 10,
    inv_update_steps: Annotated[int, option("Steps between two decompositions [100]", panel=PLANNED)] = 100,
    solver: Annotated[
        str, option("eigen unless given; warm_eigen, cholesky, ekfac or sqrt_ekfac", panel=PLANNED)
    ] = "eigen",
    memory_budget: Annotated[
        str | None, option("Memory of a rank that K-FAC may take, such as 2GiB; any unless given", panel=CHOICE)
    ] = None,
    allow: Annotated[
        list[str] | None, option(f"Let it choose this too: {', '.join(ALLOWED)}; may be repeated", panel=CHOICE)
    ] = None,
    output: Annotated[Path | None, option("Write the plan, or the profile, as JSON", panel=FILES)] = None,
    plot: Annotated[Path | None, option("Draw memory against time as PNG", panel=FILES)] = None,
    calibrate_machine: Annotated[
        bool, typer.Option("--calibrate", help="Measure this machine instead", rich_help_panel=MACHINE)
    ] = False,
    nproc: Annotated[
        int | None, option("Processes to measure with [2; on GPUs one each; or torchrun's]", panel=MACHINE)
    ] = None,
    device: Annotated[str, option("What to measure: cpu, unless cuda is given", panel=MACHINE)] = "cpu",
) -> int:
    """Predict memory, traffic and time of every placement of a model, and choose the fastest that fits.

    None of the ranks is needed: models have no storage here, and the hardware is a profile.
    """
    for path in (output, plot):
        check_writable(path)
    if calibrate_machine:
        return _calibrate(device, nproc, output, context.obj)
    if hardware is None:
        known = ", ".join(shipped_profiles())
        raise ConfigurationError(f"give --hardware: {known}, or a file that `kaisa plan --calibrate` has made")
    made = build_plan(
        model,
        world_size,
        hardware,
        memory_budget=memory_budget,
        batch=batch,
        allow=allow or [],
        solver=solver,
        factor_update_steps=factor_update_steps,
        inv_update_steps=inv_update_steps,
    )
    describe_plan(made, Console(highlight=False))
    if plot is not None:
        draw_trade_off(made, plot)
    if output is not None:
        _write(output, made.to_json())
    return 0


def _write(path: Path, text: str) -> None:
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _calibrate(name: str, nproc: int | None, output: Path | None, arguments: Sequence[str]) -> int:
    """Measure this machine as one of its ranks; the first speaks and writes."""
    if output is None:
        raise ConfigurationError("--calibrate needs --output, the file of the profile")
    if name != "cpu" and not (name == "cuda" and torch.cuda.is_available()):
        raise ConfigurationError(f"there is no device {name!r} to measure; give cpu, or cuda where there is one")
    device = torch.device(name)
    usual = torch.cuda.device_count() if device.type == "cuda" else 2
    count = count_ranks(nproc) if nproc is not None or launched_world() is not None else usual
    if count < 1:
        raise ConfigurationError(f"nproc is {count}; give a whole number of at least 1")
    if launched_world() is None and count > 1:
        return start_processes(count, arguments)
    console = Console(highlight=False, quiet=(launched_world() or (0, 1))[0] != 0)
    try:
        ranks = join_world(device)
        with absent_ranks_named(), console.status("") as status:
            per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            found = calibrate(ranks, device, ranks_per_node=per_node, report=lambda text: status.update(text))
    finally:
        leave_world()
    if not console.quiet:
        _write(output, found.to_json())
        _describe_profile(found, output, console)
    return 0


def _describe_profile(found: Hardware, output: Path, console: Console) -> None:
    console.print(f"{found.name}: {found.ranks_per_node} ranks a node", markup=False)
    products = max(rate for _, rate in found.products["float32"])
    order, seconds = found.decompositions["eigen"][-1]
    exchange = found.exchange_inside
    console.print(f"products of matrices in float32: {products / 1e9:,.0f} GFLOP/s; forward and backward passes reach")
    console.print(f"{100 * found.training:.0f} % of it; copies {found.memory_bandwidth / 1e9:.1f} GB/s")
    console.print(f"eigendecomposition of order {order:.0f}: {seconds:.2f} s")
    if found.ranks_per_node > 1:
        console.print(f"exchange: {1e6 * exchange.latency:.0f} µs and {exchange.bandwidth / 1e9:.2f} GB/s a rank")
    console.print(f"profile: {output}", soft_wrap=True, markup=False)
