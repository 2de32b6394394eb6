"""Statistics that wait: one exchange of decayed sums gives the running average that an exchange a step gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kaisa.kfac.deferral import Deferral
from kaisa.kfac.factors import Factors, Pair, Statistics


def sums(seed: int, examples: float = 4.0) -> Statistics:
    generator = torch.Generator().manual_seed(seed)
    a, g = (torch.randn(size, size, generator=generator, dtype=torch.float64) for size in (3, 2))
    return Statistics(a @ a.mT, g @ g.mT, positions=2 * examples, examples=examples)


def average(statistics: list[Statistics], decays: list[float]) -> tuple[Tensor, Tensor]:
    """Returns Σ w_i S_i / N_i with w_i = (1 − β_i) Π_{j>i} β_j over the sum of all w, written out."""
    weights = []
    for index, decay in enumerate(decays):
        weight = 1 - decay
        for later in decays[index + 1 :]:
            weight *= later
        weights.append(weight)
    a = sum(weight * part.a / part.positions for weight, part in zip(weights, statistics, strict=True))
    g = sum(weight * part.g / part.examples for weight, part in zip(weights, statistics, strict=True))
    assert isinstance(a, Tensor)
    assert isinstance(g, Tensor)
    return a / sum(weights), g / sum(weights)


def flushed(factors: Factors, deferral: Deferral, decay: float) -> None:
    (total,) = deferral.take({}, decay, ["layer"]).values()
    pair = Pair(total.a / total.positions, total.g / total.examples)
    factors.update("layer", pair, 1 - (1 - decay) * total.steps)


@pytest.mark.parametrize("decays", [[0.9] * 6, [0.0] * 6, [0.5, 0.6, 0.9, 0.1, 0.95, 0.7]], ids=str)
@pytest.mark.parametrize("exchanges", [{5}, {0, 5}, {1, 2, 5}], ids=str)
def test_few_exchanges_make_the_average_of_many(decays: list[float], exchanges: set[int]) -> None:
    factors, deferral = Factors(), Deferral()
    for step, decay in enumerate(decays):
        deferral.add({"layer": sums(step)}, decay)
        if step in exchanges:
            flushed(factors, deferral, decay)
            assert deferral.nbytes() == 0
    expected = average([sums(step) for step in range(6)], decays)
    for found, wanted in zip(factors["layer"], expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-13)


def test_sums_that_are_not_finite_stand_for_no_step() -> None:
    spoilt = sums(1)
    spoilt.g[0, 0] = torch.nan
    factors, deferral = Factors(), Deferral()
    for part in (sums(0), spoilt, sums(2)):
        deferral.add({"layer": part}, 0.9)
    flushed(factors, deferral, 0.9)
    for found, wanted in zip(factors["layer"], average([sums(0), sums(2)], [0.9, 0.9]), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-13)


def test_every_example_counts_by_its_age_where_steps_are_of_unequal_size() -> None:
    deferral = Deferral()
    for step, examples in enumerate((4.0, 12.0)):
        deferral.add({"layer": sums(step, examples)}, 0.5)
    (total,) = deferral.take({}, 0.5, ["layer"]).values()
    assert float(total.examples) == 0.5 * 4 + 12
    assert float(total.steps) == 1.5
    torch.testing.assert_close(total.a, 0.5 * sums(0, 4.0).a + sums(1, 12.0).a, rtol=1e-14, atol=0)


def test_a_state_is_a_copy_that_goes_on() -> None:
    deferral, other = Deferral(), Deferral()
    deferral.add({"layer": sums(0)}, 0.9)
    other.restore(deferral.state(), {"layer": torch.device("cpu")})
    for each in (deferral, other):
        each.add({"layer": sums(1)}, 0.8)
    first, second = (each.take({}, 0.8, ["layer"])["layer"] for each in (deferral, other))
    assert torch.equal(first.a, second.a)
    assert torch.equal(torch.as_tensor(first.steps), torch.as_tensor(second.steps))
