"""Levenberg–Marquardt: the predicted change against a dense model, and the direction in which λ moves."""

import math

import pytest
import torch
from torch import Tensor, nn

import kaisa
from kaisa.kfac import Eigen, Fisher, LevenbergMarquardt


def problem() -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.BatchNorm1d(3), nn.Linear(3, 2)).double()
    model[2].requires_grad_(False)
    return model.eval(), torch.randn(16, 4).double(), torch.randn(16, 2).double()


def dense_change(
    kfac: kaisa.KFACPreconditioner, before: dict[str, Tensor], model: nn.Sequential, damping: float
) -> float:
    """⟨g, Δ⟩ + ½ ⟨Δ, (A⊗G + λI) Δ⟩ with Kronecker products written out; row-major vec, hence G⊗A."""
    total = 0.0
    for name, pair in kfac.factors.items():
        module = model.get_submodule(name)
        delta = torch.cat((module.weight, module.bias[:, None]), 1) - before[name][0]
        delta = delta.detach()
        matrix = torch.kron(pair.g, pair.a) + damping * torch.eye(delta.numel(), dtype=delta.dtype)
        flat = delta.flatten()
        total += float(before[name][1].flatten() @ flat + 0.5 * flat @ matrix @ flat)
    return total


def matrices(model: nn.Sequential, of_gradients: bool) -> dict[str, Tensor]:
    return {
        name: torch.cat((m.weight.grad, m.bias.grad[:, None]) if of_gradients else (m.weight, m.bias[:, None]), 1)
        .detach()
        .clone()
        for name, m in model.named_children()
        if isinstance(m, nn.Linear)
    }


def test_the_ratio_is_the_actual_change_over_that_of_the_dense_quadratic_model() -> None:
    model, x, y = problem()
    rule = LevenbergMarquardt(initial=0.5, interval=1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    with kaisa.KFACPreconditioner(model, optimizer, damping=rule, factor_update_steps=1, inv_update_steps=1) as kfac:
        for _ in range(3):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            damping = rule.value
            values, gradients = matrices(model, False), matrices(model, True)
            kfac.step()
            optimizer.step()
            before = {name: (values[name], gradients[name]) for name in values}
            expected = dense_change(kfac, before, model, damping)
            actual = float((nn.functional.mse_loss(model(x), y) - loss).detach())
            kfac.adapt_damping(loss.detach(), lambda: nn.functional.mse_loss(model(x), y))
            assert rule.ratio == pytest.approx(actual / expected, rel=1e-9)


@pytest.mark.parametrize(
    ("actual", "predicted", "expected"),
    [(-1.0, -1.0, 0.9), (-0.5, -1.0, 1.0), (-0.1, -1.0, 1 / 0.9), (0.3, -1.0, 1 / 0.9), (math.nan, -1.0, 1 / 0.9)],
)
def test_damping_falls_when_the_model_is_right_and_rises_when_it_is_wrong(
    actual: float, predicted: float, expected: float
) -> None:
    rule = LevenbergMarquardt(initial=1.0, interval=1, decay=0.9)
    rule.observe(actual, predicted)
    assert rule.value == pytest.approx(expected)


def test_damping_stays_within_its_bounds() -> None:
    rule = LevenbergMarquardt(initial=1.0, interval=5, decay=0.5, lowest=0.3, highest=2.0)
    for _ in range(5):
        rule.observe(-1.0, -1.0)
    assert rule.value == 0.3
    for _ in range(5):
        rule.observe(1.0, -1.0)
    assert rule.value == 2.0


def test_the_loss_is_evaluated_on_every_interval_th_step_alone() -> None:
    model, x, y = problem()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    rule, evaluated = LevenbergMarquardt(interval=3), []
    with kaisa.KFACPreconditioner(model, optimizer, damping=rule) as kfac:
        for step in range(7):
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            kfac.step()
            optimizer.step()
            kfac.adapt_damping(loss.detach(), lambda step=step: evaluated.append(step) or 0.0)
    assert evaluated == [0, 3, 6]


def test_a_linear_model_with_its_exact_fisher_is_trusted_more_and_more() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 1)).double()
    x, y = torch.randn(64, 4).double(), torch.randn(64, 1).double()
    optimizer, rule = torch.optim.SGD(model.parameters(), 1.0), LevenbergMarquardt(initial=1.0, interval=1)
    fisher = Fisher("gaussian", exact=True)
    with kaisa.KFACPreconditioner(
        model,
        optimizer,
        damping=rule,
        kl_clip=None,
        fisher=fisher,
        solver=Eigen(),
        factor_update_steps=1,
        inv_update_steps=1,
    ) as kfac:
        for _ in range(20):
            optimizer.zero_grad()
            outputs = model(x)
            kfac.sample_fisher(outputs)
            loss = (outputs - y).square().sum(1).mean() / 2
            loss.backward()
            kfac.step()
            optimizer.step()
            kfac.adapt_damping(loss.detach(), lambda: (model(x) - y).square().sum(1).mean() / 2)
    assert rule.ratio > 0.99
    assert rule.value == pytest.approx(0.95**20)
    solution = torch.linalg.lstsq(torch.cat((x, torch.ones(64, 1).double()), 1), y).solution
    torch.testing.assert_close(model[0].weight.flatten(), solution[:4, 0], rtol=1e-3, atol=1e-3)


def test_other_damping_cannot_be_adapted() -> None:
    model, _, _ = problem()
    with (
        kaisa.KFACPreconditioner(model, kl_clip=None) as kfac,
        pytest.raises(kaisa.ConfigurationError, match="needs damping=LevenbergMarquardt"),
    ):
        kfac.adapt_damping(1.0, lambda: 1.0)


@pytest.mark.parametrize("options", [{"initial": 0.0}, {"initial": 1e4}, {"interval": 0}, {"decay": 1.0}])
def test_a_rule_that_cannot_work_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(kaisa.ConfigurationError, match="LevenbergMarquardt needs"):
        LevenbergMarquardt(**options)  # type: ignore[arg-type]
