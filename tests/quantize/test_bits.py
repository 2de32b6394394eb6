"""Bits for layers: against all choices there are."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import kaisa
from kaisa.errors import ConfigurationError
from kaisa.quantize import QuantConfig, allocate_bits, prepare, quantized_layers, variance_report
from kaisa.quantize.bits import allocate, costs_of_factors
from kaisa.recipes.language_models import Gpt2, Width


@dataclass
class Pair:
    a: Tensor
    g: Tensor


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_no_choice_within_the_budget_costs_less(data: st.DataObject) -> None:
    names = [f"layer{i}" for i in range(data.draw(st.integers(1, 5)))]
    choices = sorted(data.draw(st.sets(st.integers(2, 8), min_size=1, max_size=4)))
    prices = st.floats(0, 100, allow_nan=False)
    costs = {
        name: {bits: data.draw(prices) for bits in choices} for name in names
    }  # not even falling, let alone convex
    weights = {name: data.draw(st.integers(1, 9)) for name in names}
    budget = data.draw(st.floats(choices[0], 8.0))
    found = allocate(costs, budget, weights)

    def used(chosen: tuple[int, ...]) -> float:
        return sum(weights[name] * bits for name, bits in zip(names, chosen, strict=True))

    def cost(chosen: tuple[int, ...]) -> float:
        return sum(costs[name][bits] for name, bits in zip(names, chosen, strict=True))

    allowed = [c for c in itertools.product(choices, repeat=len(names)) if used(c) <= budget * sum(weights.values())]
    assert list(found) == names
    assert tuple(found.values()) in allowed
    assert cost(tuple(found.values())) == pytest.approx(min(map(cost, allowed)))


def test_of_equal_costs_the_fewest_bits_are_taken() -> None:
    assert allocate({"a": {2: 1.0, 4: 1.0}, "b": {2: 5.0, 4: 3.0, 6: 3.0}}, 8) == {"a": 2, "b": 4}


def test_a_budget_that_no_choice_meets_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"the budget is 1\.5 bits on average"):
        allocate({"a": {2: 1.0, 3: 0.5}}, 1.5)


def test_bits_of_a_model_have_less_variance_than_as_many_everywhere() -> None:
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 3))
    batch = (torch.randn(16, 6) * torch.logspace(0, 1, 16).unsqueeze(1), torch.arange(16) % 3)
    found = allocate_bits(model, batch, 4.0, kind="psq")
    report = variance_report(model, batch, kinds=("psq",))
    assert list(found) == ["0", "2", "4"]
    assert sum(found.values()) <= 12
    assert sum(layer.added("psq", found[layer.name]) for layer in report.layers) <= report.added("psq", 4)


def test_factors_may_stand_in_for_variances() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    factors = {"1": Pair(torch.eye(4) * 100, torch.eye(4)), "0": Pair(torch.eye(4), torch.eye(4) * 0.01)}
    found = allocate_bits(model, None, 5.0, factors=factors)
    assert list(found) == ["0", "1"]
    assert found["1"] > found["0"]
    assert sum(found.values()) == 10
    costs = costs_of_factors(factors, (2, 4))
    assert costs["1"][2] == pytest.approx(4 * 400 / 9)
    assert costs["0"][4] == pytest.approx(4 * 0.04 / 225)


def test_factors_of_another_model_are_refused() -> None:
    pair = Pair(torch.eye(4), torch.eye(4))
    model = nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2), nn.Linear(4, 4))
    names = ["0", "1.q_proj", "1.k_proj", "1.v_proj", "1.out_proj", "2"]
    assert list(allocate_bits(model, None, 5, factors=dict.fromkeys(names, pair))) == ["0", "1", "2"]
    for missing in ("0", "1.v_proj", "2"):
        factors = dict.fromkeys((name for name in names if name != missing), pair)
        with pytest.raises(ConfigurationError, match=f"the factors have none of '{missing}'"):
            allocate_bits(model, None, 5, factors=factors)


def test_factors_of_a_tied_embedding_count_for_the_prediction() -> None:
    model = Gpt2(Width(1, 8, 2, 16, 11, 5))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    kfac = kaisa.KFACPreconditioner(model, optimizer, factor_update_steps=1, inv_update_steps=1)
    model(torch.arange(10).view(2, 5)).square().mean().backward()
    kfac.step()
    found = allocate_bits(model, None, 5, factors=kfac.factors)
    assert list(found) == list(quantized_layers(prepare(model, QuantConfig(gradient_bits=found))))
    assert costs_of_factors({"x": Pair(torch.arange(4.0), torch.eye(2))}, (2,)) == {"x": {2: pytest.approx(12 / 9)}}


@pytest.mark.parametrize("bits", [(), (1, 4), (4, 9), (4.0,)])
def test_what_is_no_number_of_bits_is_no_choice(bits: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    factors = {"0": Pair(torch.eye(4), torch.eye(4))}
    for given_factors in (factors, None):
        with pytest.raises(ConfigurationError, match=r"bits is .*; give whole numbers from 2 to 8"):
            allocate_bits(model, (torch.randn(3, 4), torch.arange(3)), 5, bits=bits, factors=given_factors)
    with pytest.raises(ConfigurationError, match="the model has no layer that can be quantised"):
        allocate_bits(nn.LayerNorm(4), None, 5, factors=factors)


def test_bits_of_attention_are_those_of_all_that_it_projects() -> None:
    model = nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True)
    x, y = torch.randn(6, 3, 4), torch.arange(6) % 3

    def loss(own: nn.Module, batch: object) -> Tensor:
        return nn.functional.cross_entropy(own(x).mean(1)[:, :3], y)

    found = allocate_bits(model, None, 5, loss, kind="psq", bits=(4, 6))
    assert list(found) == ["self_attn", "linear1", "linear2"]
    report = variance_report(model, None, loss, kinds=("psq",))
    costs = {
        name: {
            bits: sum(layer.added("psq", bits) for layer in report.layers if layer.module == name) for bits in (4, 6)
        }
        for name in found
    }
    assert found == allocate(costs, 5)
    assert len([layer for layer in report.layers if layer.module == "self_attn"]) == 2
    prepare(model, QuantConfig(gradient_bits=found))  # which takes the names as they are


def test_factors_of_projections_count_for_their_attention() -> None:
    model = nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    kfac = kaisa.KFACPreconditioner(model, optimizer, factor_update_steps=1, inv_update_steps=1)
    model(torch.randn(6, 3, 4)).square().mean().backward()
    kfac.step()
    found = allocate_bits(model, None, 5, factors=kfac.factors, bits=(4, 5, 6))
    assert list(found) == ["self_attn", "linear1", "linear2"]
    rows = costs_of_factors(kfac.factors, (4, 5, 6))
    inside = [rows[f"self_attn.{part}"] for part in ("q_proj", "k_proj", "v_proj", "out_proj")]
    costs = {"self_attn": {bits: sum(row[bits] for row in inside) for bits in (4, 5, 6)}}
    assert found == allocate({**costs, "linear1": rows["linear1"], "linear2": rows["linear2"]}, 5)
    prepare(model, QuantConfig(gradient_bits=found))
