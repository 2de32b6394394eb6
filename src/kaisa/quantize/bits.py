"""Bits for each layer, so that the gradient has the least variance that an average of so many bits allows.

    minimise Σ_l cost_l(b_l)        subject to Σ_l weight_l b_l ≤ budget · Σ_l weight_l

solved exactly, for any costs: layer after layer, of all choices so far those are kept that no other beats in both bits
and cost. How many there are is at most the number of different sums of bits; where layers weigh the same, 8 a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kaisa.errors import ConfigurationError
from kaisa.quantize.config import is_number_of_bits
from kaisa.quantize.prepare import named_modules, quantizable
from kaisa.quantize.report import ALL_BITS, Loss, variance_report

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
"""Layers of K-FAC in MultiheadAttention."""

Costs = Mapping[str, Mapping[int, float]]
"""Of each layer, what each number of bits costs."""


class PairOfFactors(Protocol):
    """The Kronecker factors of a layer: second moments of its input, and of the gradient at its output.

    They are matrices, or vectors of what is on their diagonals.
    """

    a: Tensor
    g: Tensor


def allocate_bits(
    model: nn.Module,
    batch: Any,
    budget: float,
    loss: Loss | None = None,
    *,
    kind: str = "bhq",
    bits: Sequence[int] = ALL_BITS,
    probes: int = 8,
    factors: Mapping[str, PairOfFactors] | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, int]:
    """Return for each module how many bits its gradients should have, in the order of the model.

    They are what `QuantConfig(gradient_bits=…)` takes: a module that is called several times has the same bits every
    time, and MultiheadAttention for all that it projects.

    Args:
        model: see `variance_report`.
        batch: see `variance_report`; unused where factors are given.
        budget: bits that layers may have on average.
        loss: see `variance_report`.
        kind: of the quantiser.
        bits: to choose from.
        probes: see `variance_report`.
        factors: Kronecker factors by layer, as K-FAC keeps them; they then stand in for the measured variances. Those
            of the projections in MultiheadAttention are counted together.
        generator: see `variance_report`.

    Raises:
        ConfigurationError: the budget is below the fewest bits; there are none to choose from; the factors leave out a
            layer that can be quantised; or see `variance_report`.
    """
    if not bits or not all(is_number_of_bits(count) for count in bits):
        raise ConfigurationError(f"bits is {tuple(bits)}; give whole numbers from 2 to 8 to choose from")
    if factors is not None:
        return allocate(_by_module(model, costs_of_factors(factors, bits)), budget)
    report = variance_report(model, batch, loss, kinds=(kind,), bits=bits, probes=probes, generator=generator)
    costs: dict[str, dict[int, float]] = {}
    for layer in report.layers:
        _add(costs, layer.module, {count: layer.added(kind, count) for count in bits})
    return allocate(costs, budget)


def _by_module(model: nn.Module, costs: Costs) -> Costs:
    """Return the costs of layers that can be quantised: those of its name, or the sums over projections.

    A layer whose weight is that of an embedding, of both uses of which K-FAC keeps one pair, has the embedding's.
    """
    costs = {**_of_tied(model, costs), **costs}
    found: dict[str, dict[int, float]] = {}
    for name, _, kind in quantizable(model):
        parts = [name] if kind is not nn.MultiheadAttention else [f"{name}.{part}".strip(".") for part in PROJECTIONS]
        for part in parts:
            if part not in costs:
                raise ConfigurationError(
                    f"the factors have none of {part!r}; give those of this model, of each layer that is quantised; "
                    f"these are of {', '.join(costs)}"
                )
            _add(found, name, costs[part])
    if not found:
        raise ConfigurationError("the model has no layer that can be quantised")
    return found


def _of_tied(model: nn.Module, costs: Costs) -> Costs:
    """Return the costs of layers by those of embeddings with the same weight."""
    modules = list(named_modules(model))
    embeddings = {module.weight: name for name, module in modules if isinstance(module, nn.Embedding) and name in costs}
    linear = [(name, module) for name, module in modules if isinstance(module, nn.Linear)]
    return {name: costs[embeddings[module.weight]] for name, module in linear if module.weight in embeddings}


def _add(costs: dict[str, dict[int, float]], name: str, row: Mapping[int, float]) -> None:
    held = costs.setdefault(name, dict.fromkeys(row, 0.0))
    for bits, cost in row.items():
        held[bits] += cost


def costs_of_factors(factors: Mapping[str, PairOfFactors], bits: Sequence[int] = ALL_BITS) -> Costs:
    """Return tr(A) tr(G) / (2^bits − 1)² of each layer.

    The variance of a layer's own weight gradient is Σ Var[ε_ij] ‖x_i‖², Var[ε] goes with the squared range of the
    output gradient over (2^bits − 1)², and tr(G) and tr(A) are the mean squares of that gradient and of the input.
    """
    traces = {name: float(_trace(pair.a) * _trace(pair.g)) for name, pair in factors.items()}
    return {name: {count: trace / (2**count - 1) ** 2 for count in bits} for name, trace in traces.items()}


def _trace(factor: Tensor) -> Tensor:
    """Return the trace of a factor, of which an embedding has the diagonal alone."""
    return (factor if factor.ndim == 1 else factor.diagonal()).sum()


def allocate(costs: Costs, budget: float, weights: Mapping[str, int] | None = None) -> dict[str, int]:
    """Return the bits of least total cost whose weighted average is within a budget; of equals, the fewest bits.

    Args:
        costs: of each layer, what each number of bits costs.
        budget: the average.
        weights: of layers in the average, such as the sizes of their gradients; None for all alike.

    Raises:
        ConfigurationError: the budget is below the fewest bits.
    """
    weights = dict.fromkeys(costs, 1) if weights is None else weights
    total = budget * sum(weights[name] for name in costs)
    least = sum(weights[name] * min(row) for name, row in costs.items())
    if total < least:
        raise ConfigurationError(f"the budget is {budget} bits on average; give at least what the fewest bits need")
    choices: list[tuple[float, float, tuple[int, ...]]] = [(0, 0.0, ())]
    for name, row in costs.items():
        least -= weights[name] * min(row)
        longer = [
            (used + weights[name] * bits, cost + price, (*chosen, bits))
            for used, cost, chosen in choices
            for bits, price in row.items()
            if used + weights[name] * bits + least <= total
        ]
        choices = _undominated(longer)
    return dict(zip(costs, choices[-1][2], strict=True))


def _undominated(
    choices: list[tuple[float, float, tuple[int, ...]]],
) -> list[tuple[float, float, tuple[int, ...]]]:
    """Return choices by rising bits, each of lower cost than all with fewer."""
    kept: list[tuple[float, float, tuple[int, ...]]] = []
    for choice in sorted(choices):
        if not kept or choice[1] < kept[-1][1]:
            kept.append(choice)
    return kept
