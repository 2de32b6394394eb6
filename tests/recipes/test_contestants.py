from __future__ import annotations

import pytest
import torch
from torch import nn

from kaisa.errors import ConfigurationError
from kaisa.optim import ARSG, RSG, AdaHessian
from kaisa.recipes.contestants import Contestant, Preconditioning, learning_rate_share

STEPS = 400


def test_the_learning_rate_rises_to_its_highest_and_falls_to_almost_nothing() -> None:
    shares = [learning_rate_share(step, STEPS) for step in range(STEPS)]
    top = shares.index(max(shares))
    assert max(shares) == 1.0
    assert shares[: top + 1] == sorted(shares[: top + 1])
    assert shares[top:] == sorted(shares[top:], reverse=True)
    assert top <= STEPS * 0.05
    assert 0 < shares[-1] < 1e-4


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_every_step_of_a_short_run_learns(steps: int) -> None:
    shares = [learning_rate_share(step, steps) for step in range(steps)]
    assert all(0 < share <= 1 for share in shares)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sgd", torch.optim.SGD),
        ("adam", torch.optim.Adam),
        ("adamw", torch.optim.AdamW),
        ("rsg", RSG),
        ("arsg", ARSG),
        ("adahessian", AdaHessian),
    ],
)
def test_the_optimizer_is_the_one_that_is_named(name: str, kind: type) -> None:
    optimizer = Contestant(name, 0.25, weight_decay=0.125).build_optimizer(nn.Linear(2, 2))
    assert type(optimizer) is kind
    assert optimizer.defaults["lr"] == 0.25
    assert optimizer.defaults["weight_decay"] == 0.125


def test_a_first_order_contestant_has_no_preconditioner() -> None:
    model = nn.Linear(2, 2)
    contestant = Contestant("sgd", 0.1)
    optimizer = contestant.build_optimizer(model)
    assert contestant.build_preconditioner(model, optimizer, seed=0) is None


def test_names_tell_the_contestants_apart() -> None:
    alone, behind = (
        Contestant("sgd", 0.1),
        Contestant("sgd", 0.1, preconditioning=Preconditioning()),
    )
    assert (alone.name, alone.slug) == ("sgd", "sgd")
    assert (behind.name, behind.slug) == ("sgd + K-FAC", "sgd-kfac")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("damping", -0.1),
        ("damping", 0.0),
        ("factor_update_steps", 0),
        ("inv_update_steps", -1),
        ("factor_decay", 1.0),
        ("kl_clip", float("nan")),
        ("fisher_norm", 0.0),
    ],
)
def test_options_of_kfac_out_of_range_are_refused_by_name(option: str, value: float) -> None:
    with pytest.raises(ConfigurationError, match=f"{option.replace('_', '-')} is {value}; give"):
        Preconditioning(**{option: value})  # type: ignore[arg-type]


def test_the_sharing_asked_for_is_that_of_the_factors() -> None:
    model = nn.Linear(2, 2)
    for sharing in ("expand", "reduce"):
        contestant = Contestant("sgd", 0.1, preconditioning=Preconditioning(sharing=sharing))
        preconditioner = contestant.build_preconditioner(model, contestant.build_optimizer(model), seed=0)
        assert preconditioner is not None
        assert preconditioner.factors.label.sharing == sharing
        preconditioner.close()


def test_a_fisher_norm_is_the_length_of_the_natural_gradient_in_place_of_the_kl_clip() -> None:
    x = torch.linspace(-1, 1, 12).double().reshape(4, 3)

    def gradients(**trust: float) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Linear(3, 2, bias=False).double()
        contestant = Contestant("sgd", 0.1, preconditioning=Preconditioning(**trust))
        kfac = contestant.build_preconditioner(model, contestant.build_optimizer(model), seed=0)
        model(x).square().sum(1).mean().backward()
        raw = model.weight.grad.clone()
        kfac.step()
        return raw, model.weight.grad

    raw, natural = gradients(kl_clip=0.0)
    length = (raw * natural).sum().sqrt()
    assert length > 0.05
    torch.testing.assert_close(gradients(kl_clip=0.0, fisher_norm=0.05)[1], natural * 0.05 / length)
    torch.testing.assert_close(gradients(kl_clip=0.0, fisher_norm=1e3)[1], natural)


def test_a_fisher_norm_and_a_kl_clip_exclude_each_other() -> None:
    with pytest.raises(
        ConfigurationError, match=r"kl-clip is 0\.01 and fisher-norm 0\.2, of which one alone .*; leave"
    ):
        Preconditioning(kl_clip=0.01, fisher_norm=0.2)


def test_unknown_choices_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match="unknown solver 'qr'; choose from eigen, chol"):
        Preconditioning(solver="qr")
    with pytest.raises(ConfigurationError, match="sharing is 'sum'; give 'expand' or 'reduce'"):
        Preconditioning(sharing="sum")
    with pytest.raises(ConfigurationError, match="unknown optimizer 'lion'; choose from sgd, ada"):
        Contestant("lion", 0.1)


def test_adahessian_behind_kfac_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigurationError, match=r"adahessian behind K-FAC would divide by the curvature twice; give"):
        Contestant("adahessian", 0.1, preconditioning=Preconditioning())


def test_dividing_by_the_hessian_behind_kfac_would_take_long_steps_where_the_loss_is_flat() -> None:
    """The reason of the refusal, on two quadratics: F⁻¹ g is the step to the minimum, whatever the curvature."""
    curvatures, x = torch.tensor([100.0, 0.01]), torch.tensor([1.0, 1.0])
    preconditioned = curvatures * x / curvatures
    assert torch.equal(preconditioned, x)
    divided_again = preconditioned / curvatures
    assert divided_again.tolist() == pytest.approx([0.01, 100.0])
