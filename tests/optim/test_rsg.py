"""RSG against its own derivation, the optimizers that it contains, and the theory of its speed.

What it shares with ARSG as an optimizer of torch's is tested in `test_arsg`.
"""

from __future__ import annotations

import numpy as np
import pytest
import pytorch_optimizer
import torch
from torch import Tensor

from kaisa.errors import ConfigurationError
from kaisa.optim import RSG
from kaisa.optim.gain import best_step, gain_factor, stability_bound, step_ratio
from tests.support.arsg_problems import CASES, farthest, initial, perceptron, quad4, train

SETTINGS = [(0.9, 0.1), (0.999, 0.1), (0.999, 0.05), (0.99, 0.3), (0.5, 0.6), (0.9, 0.9)]


def test_without_observation_it_is_momentum_sgd() -> None:
    ours, theirs = perceptron(), perceptron()
    train(ours, RSG(ours, 0.5, beta=0.9, mu=0.0, weight_decay=0.01), range(20))
    train(theirs, torch.optim.SGD(theirs, 0.5 * (1 - 0.9), momentum=0.9, weight_decay=0.01), range(20))
    assert farthest(ours, theirs) < 1e-14


def test_with_observation_of_one_less_beta_it_is_nesterov() -> None:
    ours, theirs = perceptron(), perceptron()
    train(ours, RSG(ours, 0.5, beta=0.9, mu=1 - 0.9), range(20))
    train(theirs, torch.optim.SGD(theirs, 0.5 * (1 - 0.9), momentum=0.9, nesterov=True), range(20))
    assert farthest(ours, theirs) < 1e-14


@pytest.mark.parametrize("mu", [0.05, 0.1, 0.7])
def test_it_is_qhm(mu: float) -> None:
    ours, theirs = perceptron(), perceptron()
    train(ours, RSG(ours, 0.5, beta=0.99, mu=mu), range(20))
    train(theirs, pytorch_optimizer.QHM(theirs, 0.5, momentum=0.99, nu=1 - mu), range(20))
    assert farthest(ours, theirs) < 1e-14


def test_it_is_heavy_ball_with_the_gradient_at_a_remote_point() -> None:
    """Heavy ball: m ← β m + (1 − β) ∇f(x), y ← y − α m; x = y − η α m of the step before and η = μ β / (1 − β)."""
    alpha, beta, mu = 0.2, 0.9, 0.15
    ours = initial(CASES["arsg_quad_default"])
    optimizer = RSG(ours, alpha, beta, mu)
    y, m = ours[0].detach().clone(), torch.zeros(4, dtype=torch.float64)
    for step in range(20):
        observed = (y - mu * beta / (1 - beta) * alpha * m).requires_grad_()
        assert farthest(ours, [observed]) < 1e-14
        train(ours, optimizer, range(step, step + 1), quad4)
        (g,) = torch.autograd.grad(quad4([observed], step), observed)
        m = beta * m + (1 - beta) * g
        y = y - alpha * m


def spectral_radius(tau: float, beta: float, mu: float) -> float:
    """Of the matrix that takes (x, m) to the next pair on f = λ x² / 2, with α m in units of 1 / λ."""
    momentum = [tau * (1 - beta), beta]
    position = [1 - (1 - mu) * momentum[0] - mu * tau, -(1 - mu) * momentum[1]]
    return float(np.abs(np.linalg.eigvals(np.array([position, momentum]))).max())


@pytest.mark.parametrize(("beta", "mu"), SETTINGS)
def test_the_gain_factor_is_the_spectral_radius_of_a_step(beta: float, mu: float) -> None:
    for share in (0.01, 0.1, 0.3, 0.8, 0.999, 1.0, 1.001, 1.5):
        tau = share * stability_bound(beta, mu)
        assert gain_factor(tau, beta, mu) == pytest.approx(spectral_radius(tau, beta, mu), rel=1e-6)


@pytest.mark.parametrize(("beta", "mu"), SETTINGS)
def test_the_gain_factor_crosses_one_at_the_bound(beta: float, mu: float) -> None:
    bound = stability_bound(beta, mu)
    assert spectral_radius(0.9999 * bound, beta, mu) < 1 < spectral_radius(1.0001 * bound, beta, mu)


@pytest.mark.parametrize(("beta", "mu", "bound"), [(0.9, 0.1, 13.571), (0.999, 0.1, 19.910)])
def test_the_bounds_are_those_that_were_published(beta: float, mu: float, bound: float) -> None:
    assert stability_bound(beta, mu) == pytest.approx(bound, abs=1e-3)


@pytest.mark.parametrize(("beta", "mu"), SETTINGS)
@pytest.mark.parametrize(("share", "converges"), [(0.99, True), (1.01, False)])
def test_steps_on_a_quadratic_converge_just_below_the_bound_and_not_above(
    beta: float, mu: float, share: float, converges: bool
) -> None:
    eigenvalue = 3.0
    x = torch.ones(1, dtype=torch.float64, requires_grad=True)
    optimizer = RSG([x], share * stability_bound(beta, mu) / eigenvalue, beta, mu)
    for _ in range(10_000):
        x.grad = eigenvalue * x.detach()
        optimizer.step()
        if not 1e-3 < float(x.detach().abs()) < 1e3:
            break
    assert (float(x.detach().abs()) < 1e-3) is converges


@pytest.mark.parametrize(("beta", "mu"), SETTINGS)
def test_no_step_on_a_grid_has_a_smaller_gain_factor_than_the_best(beta: float, mu: float) -> None:
    best = best_step(beta, mu)
    grid = np.linspace(0, stability_bound(beta, mu), 4001)[1:-1]
    assert spectral_radius(best, beta, mu) < min(spectral_radius(float(tau), beta, mu) for tau in grid) + 1e-6
    assert abs(grid[np.argmin([spectral_radius(float(tau), beta, mu) for tau in grid])] - best) <= grid[0]


@pytest.mark.parametrize(
    ("beta", "mu", "ratio"),
    [(0.999, 0.05, 0.2483), (0.999, 0.1, 0.2386), (0.99, 0.05, 0.29), (0.9, 0.05, 0.57)],
)
def test_the_ratio_of_best_steps_is_the_published_one(beta: float, mu: float, ratio: float) -> None:
    assert step_ratio(beta, mu, 2 * mu) == pytest.approx(ratio, abs=0.0051 if ratio > 0.25 else 5e-5)


def test_the_best_steps_are_the_published_ones() -> None:
    assert best_step(0.999, 0.05) == pytest.approx(1.5014, abs=5e-5)
    assert best_step(0.999, 0.1) == pytest.approx(0.3728, abs=5e-5)


@pytest.mark.parametrize("beta", [1.0, -0.1, "0.9", None])
def test_a_momentum_out_of_range_is_refused(beta: float) -> None:
    with pytest.raises(ConfigurationError, match=r"beta is .*; give a number of at least 0 and below 1"):
        RSG([torch.ones(1, requires_grad=True)], 0.1, beta=beta)


def test_it_remembers_one_tensor_a_parameter() -> None:
    w: Tensor = torch.ones(3, requires_grad=True)
    w.grad = torch.ones(3)
    optimizer = RSG([w], 0.1)
    optimizer.step()
    assert set(optimizer.state[w]) == {"step", "exp_avg"}
