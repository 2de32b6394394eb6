"""PAC-Bayes against golden values, dense Gaussians, and networks whose error on new data is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kaisa.assure.evidence.pac_bayes import (
    bound_generalisation,
    complexity_of,
    kl_inverse,
    pac_bayes_bound,
)
from kaisa.assure.evidence.posterior import Posterior
from kaisa.curvature import Basis, Curvature
from kaisa.errors import ConfigurationError, DataError
from kaisa.kfac import Fisher, mean_factors


@pytest.mark.parametrize(
    ("error", "examples", "complexity", "delta", "bound"),
    [(0.02, 50_000, 500.0, 0.05, 0.04681951195116365), (0.0, 10_000, 100.0, 0.01, 0.010930175515747998)],
)
def test_golden_bounds(error: float, examples: int, complexity: float, delta: float, bound: float) -> None:
    assert pac_bayes_bound(error, examples, complexity, delta) == pytest.approx(bound, rel=1e-9)


def test_the_inverse_of_the_divergence_inverts_it() -> None:
    for error in (0.0, 0.01, 0.3, 0.9):
        for excess in (1e-6, 0.01, 0.2):
            q = kl_inverse(error, excess)
            first = error * math.log(error / q) if error else 0.0
            assert first + (1 - error) * math.log((1 - error) / (1 - q)) == pytest.approx(excess, rel=1e-6)
    assert kl_inverse(1.0, 0.1) == 1.0
    assert 0.2 <= kl_inverse(0.2, 0.0) < 0.2 + 1e-8


def test_golden_complexity_of_a_kronecker_posterior() -> None:
    a, g = torch.tensor([2.0, 0.5]).double(), torch.tensor([1.0, 0.1, 0.01]).double()
    basis = Basis(torch.eye(2).double(), torch.eye(3).double(), g[:, None] * a)
    means = torch.zeros(3, 2).double()
    means[0, 0] = math.sqrt(6.609712106378377)
    posterior = Posterior(Curvature({"x": basis}, 1.0, {}), {"x": means}, examples=100, precision=1.0)
    found = complexity_of(posterior, {"x": torch.zeros(3, 2).double()}, prior_variance=0.5)
    assert found == pytest.approx(10.556884168755197, rel=1e-9)


def test_the_complexity_is_the_divergence_of_the_dense_gaussians() -> None:
    model = nn.Linear(3, 2).double()
    factors = mean_factors(model, [torch.randn(30, 3, dtype=torch.float64)], fisher=Fisher("categorical", exact=True))
    posterior = Posterior.of(model, factors, precision=4.0, temperature=3.0)
    start = {"": torch.randn(2, 4, dtype=torch.float64)}
    precision = 30 / 3 * torch.kron(factors[""].g, factors[""].a) + 4 * torch.eye(8, dtype=torch.float64)
    normal = torch.distributions.MultivariateNormal
    expected = torch.distributions.kl_divergence(
        normal(posterior.means[""].flatten(), precision_matrix=precision),
        normal(start[""].flatten(), 0.25 * torch.eye(8, dtype=torch.float64)),
    )
    assert complexity_of(posterior, start, 0.25) == pytest.approx(expected.item(), rel=1e-9)


def trained(inputs: Tensor, targets: Tensor, seed: int) -> tuple[nn.Sequential, dict[str, Tensor]]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    return model, initial


def test_on_digits_the_bound_says_something_and_holds_for_twenty_seeds() -> None:
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    images, classes = datasets.load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(classes)
    for seed in range(20):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        learned, tested = order[:1200], order[1200:]
        model, initial = trained(x[learned], y[learned], seed)
        factors = mean_factors(model, [x[learned]], fisher=Fisher("categorical", exact=True))
        found = bound_generalisation(
            model, initial, factors, x[learned], y[learned], drawn=150, temperatures=(3.0, 30.0), seed=seed
        )
        error = float((model(x[tested]).argmax(-1) != y[tested]).double().mean())
        assert error < found.value < 1


def test_the_bound_is_the_same_again_with_the_same_seed_and_says_what_it_assumes() -> None:
    x, y = torch.randn(50, 64), torch.randint(10, (50,))
    model, initial = trained(x, y, 0)
    factors = mean_factors(model, [x])
    first, second = (bound_generalisation(model, initial, factors, x, y, drawn=20, seed=3) for _ in range(2))
    assert first == second
    assert "PAC-Bayes" in first.statement
    assert any("before the examples were seen" in text for text in first.assumptions)
    assert first.value >= first.error


def test_doubt_is_shared_out_among_what_was_chosen_from_and_what_was_drawn() -> None:
    """Of δ = 0.1 a fifth is for the error of 20 networks that were drawn, the rest for three prior variances."""
    optimize = pytest.importorskip("scipy.optimize", reason="scipy is not installed")

    def inverse(error: float, excess: float) -> float:
        def beyond(q: float) -> float:
            own = error * math.log(error / q) if error else 0.0
            return own + (1 - error) * math.log((1 - error) / (1 - q)) - excess

        return float(optimize.brentq(beyond, max(error, 1e-12), 1 - 1e-12, xtol=1e-14))

    x = torch.randn(400, 64)
    y = x[:, :10].argmax(1)
    model, initial = trained(x, y, 0)
    found = bound_generalisation(
        model, initial, mean_factors(model, [x]), x, y, belief=0.9, drawn=20, prior_variances=(1.0, 0.1, 0.01)
    )
    surely = inverse(found.error, math.log(2 / (0.2 * 0.1)) / 20)
    doubt = 0.8 * 0.1 / 3
    expected = inverse(surely, (found.complexity + math.log(2 * math.sqrt(400) / doubt)) / 400)
    assert found.error < surely < expected < 1
    assert found.value == pytest.approx(expected, rel=1e-9)


def test_what_cannot_be_bounded_is_refused() -> None:
    x, y = torch.randn(30, 64), torch.randint(10, (30,))
    model, initial = trained(x, y, 0)
    factors = mean_factors(model, [x])
    some = {"2": factors["2"]}
    with pytest.raises(ConfigurationError, match=r"0\.weight, 0\.bias were learned but have no factors"):
        bound_generalisation(model, initial, some, x, y)
    with pytest.raises(ConfigurationError, match="the initial weights lack"):
        bound_generalisation(model, {}, factors, x, y)
    with pytest.raises(DataError, match="30 inputs with 29 targets"):
        bound_generalisation(model, initial, factors, x, y[:-1])
    with pytest.raises(ConfigurationError, match=r"belief is 1\.5"):
        bound_generalisation(model, initial, factors, x, y, belief=1.5)
    with pytest.raises(ConfigurationError, match="complexity -1"):
        pac_bayes_bound(0.1, 10, -1.0, 0.05)
    with pytest.raises(DataError, match="there are none"):
        pac_bayes_bound(0.1, 0, 1.0, 0.05)
