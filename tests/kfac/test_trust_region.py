"""Trust regions: the formula by hand, and that a small step passes untouched."""

import pytest
import torch

import kaisa
from kaisa.errors import ConfigurationError
from kaisa.kfac.trust_region import FisherNorm, Graft, KLClip, NormConstraint

RAW = [torch.tensor([[[1.0, 2.0]], [[0.0, -1.0]]]), torch.tensor([[[3.0]]])]
SOLVED = [torch.tensor([[[2.0, 2.0]], [[1.0, -3.0]]]), torch.tensor([[[-1.0]]])]
RATES = [torch.tensor([0.1, 0.2]), torch.tensor([0.5])]


def test_the_kl_clip_scales_by_the_root_of_limit_over_divergence() -> None:
    # Σ lr² ⟨p, g⟩ = 0.01 · 6 + 0.04 · 3 + 0.25 · (−3) = −0.57; its size counts
    scales = KLClip(0.01).scales(RAW, SOLVED, RATES, 0)
    for scale in scales:
        torch.testing.assert_close(scale, torch.tensor((0.01 / 0.57) ** 0.5))


@pytest.mark.parametrize("region", [KLClip(10.0), FisherNorm(10.0), NormConstraint(10.0)])
def test_a_step_inside_the_region_is_left_as_it_is(region: KLClip | FisherNorm | NormConstraint) -> None:
    assert all(float(scale) == 1.0 for scale in region.scales(RAW, SOLVED, RATES, 0))


def test_the_norm_constraint_makes_the_step_as_long_as_its_limit() -> None:
    scales = NormConstraint(0.3).scales(RAW, SOLVED, RATES, 0)
    parts = [
        (solved * scale * rate[:, None, None]).flatten()
        for solved, scale, rate in zip(SOLVED, scales, RATES, strict=True)
    ]
    torch.testing.assert_close(torch.cat(parts).norm(), torch.tensor(0.3))


def test_the_natural_gradient_is_made_as_long_as_its_limit_in_the_norm_of_the_fisher() -> None:
    # √|⟨p, g⟩| = √|6 + 3 − 3|, whatever the rates
    for rates in (RATES, [10 * rate for rate in RATES]):
        for scale in FisherNorm(0.5).scales(RAW, SOLVED, rates, 0):
            torch.testing.assert_close(scale, torch.tensor(0.5 / 6**0.5))


@pytest.mark.parametrize(("region", "ratio"), [(KLClip(1e-4), 1.0), (FisherNorm(1e-2), 4.0)])
def test_a_larger_rate_makes_a_longer_step_but_behind_the_kl_clip(region: KLClip | FisherNorm, ratio: float) -> None:
    x = torch.linspace(-1, 1, 12).double().reshape(4, 3)

    def step(rate: float) -> torch.Tensor:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2).double()
        before = model.weight.detach().clone()
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        kfac = kaisa.KFACPreconditioner(model, optimizer, trust_region=region)
        model(x).square().sum(1).mean().backward()
        kfac.step()
        optimizer.step()
        return model.weight.detach() - before

    torch.testing.assert_close(step(0.4), ratio * step(0.1))


def test_a_kl_clip_that_goes_with_the_square_of_the_rate_is_a_norm_of_the_fisher() -> None:
    rates = [torch.full((2,), 0.3), torch.full((1,), 0.3)]
    clip, norm = (region.scales(RAW, SOLVED, rates, 0) for region in (KLClip((0.5 * 0.3) ** 2), FisherNorm(0.5)))
    torch.testing.assert_close(clip, norm)


def test_a_grafted_layer_has_the_length_of_its_raw_gradient() -> None:
    for raw, solved, scale in zip(RAW, SOLVED, Graft().scales(RAW, SOLVED, RATES, 0), strict=True):
        torch.testing.assert_close((solved * scale).flatten(1).norm(dim=1), raw.flatten(1).norm(dim=1))


def test_a_limit_that_is_a_function_is_asked_at_the_step_and_refused_when_it_is_not_positive() -> None:
    region = KLClip(lambda step: 1.0 - step)
    assert float(region.scales(RAW, SOLVED, RATES, 0)[0]) == 1.0
    with pytest.raises(ConfigurationError, match=r"kl_clip is 0\.0 at step 1"):
        region.scales(RAW, SOLVED, RATES, 1)


def test_gradients_of_zero_stay_zero() -> None:
    zeros = [torch.zeros(2, 1, 2)]
    for region in (KLClip(0.001), FisherNorm(0.1), NormConstraint(0.1), Graft()):
        scaled = zeros[0] * region.scales(zeros, zeros, [torch.ones(2)], 0)[0]
        assert torch.equal(scaled, zeros[0])


def test_a_rate_that_a_loaded_state_brings_counts_from_the_next_step_on() -> None:
    model = torch.nn.Linear(3, 2).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kfac = kaisa.KFACPreconditioner(model, optimizer, kl_clip=1e-4, inv_update_steps=1000, factor_update_steps=1000)
    x = torch.linspace(-1, 1, 12).double().reshape(4, 3)

    def scaled() -> torch.Tensor:
        optimizer.zero_grad()
        model(x).square().sum(1).mean().backward()
        kfac.step()
        assert model.weight.grad is not None
        return model.weight.grad.clone()

    first = scaled()
    state = optimizer.state_dict()
    state["param_groups"][0]["lr"] = 0.4
    optimizer.load_state_dict(state)
    # The same gradients, and the clip is inversely proportional to the rate.
    torch.testing.assert_close(scaled(), first / 4)
