"""A plan for a model: what K-FAC covers of it, and the fastest placement that fits. Nothing is computed or sent."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kaisa.errors import ConfigurationError
from kaisa.kfac.hardware import Hardware
from kaisa.kfac.layers import EXPAND, LayerOptions
from kaisa.kfac.planner import Choices, Plan, choose, parse_bytes
from kaisa.kfac.survey import META, survey
from kaisa.kfac.workload import Settings


def plan(
    model: nn.Module,
    example_inputs: Any,
    *,
    world_size: int,
    hardware: str | Path | Hardware,
    memory_budget: str | int | None = None,
    choices: Choices | None = None,
    name: str | None = None,
    layer_options: LayerOptions | None = None,
    skip_layers: str | Sequence[str] = (),
    sharing: str = EXPAND,
    device: torch.device | str = META,
    **settings: Any,
) -> Plan:
    """Returns the fastest predicted placement of a model that fits, and what it was chosen from.

    Example:
        >>> with torch.device("meta"):
        ...     model, inputs = build(), torch.zeros(32, 3, 224, 224)
        >>> print(kaisa.plan(model, inputs, world_size=64, memory_budget="2GiB", hardware="a100"))

    Args:
        model: on any device; it is not touched, and one built under ``torch.device("meta")`` never takes any memory.
        example_inputs: of one micro-batch on one rank: a tensor, a tuple of arguments or a mapping of named ones.
        world_size: the number of ranks to plan for.
        hardware: a profile: the name of one that is shipped, a file that calibration has made, or the profile itself.
        memory_budget: bytes a rank that K-FAC may take at its peak, as a number or "2GiB"; None for no limit.
        choices: what the planner may choose from.
        name: of the model, for reports.
        layer_options, skip_layers, sharing: as for ``KFACPreconditioner``.
        device: where the forward pass of a copy runs; see ``survey``.
        settings: what is not for the planner to choose, by the names of ``Settings``: ``inv_update_steps``, ``solver``…

    Raises:
        ConfigurationError: nothing fits, and what would make it fit; or an argument is of no use.
    """
    known = [entry.name for entry in fields(Settings)]
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ConfigurationError(f"plan knows no setting {', '.join(unknown)}; it knows {', '.join(known)}")
    machine, how = Hardware.load(hardware), Settings(**settings)
    budget = None if memory_budget is None else parse_bytes(memory_budget)
    workload = survey(
        model,
        example_inputs,
        name=name,
        layer_options=layer_options,
        skip_layers=skip_layers,
        sharing=sharing,
        device=device,
    )
    return choose(workload, world_size, machine, how, memory_budget=budget, choices=choices)
