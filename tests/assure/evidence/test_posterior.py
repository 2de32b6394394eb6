"""The Kronecker posterior against dense matrices in float64, and against laplace-torch given the same factors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from kaisa.assure.evidence.posterior import Posterior
from kaisa.curvature import Curvature, example_gradients
from kaisa.errors import ConfigurationError
from kaisa.kfac import Factors, Fisher, mean_factors

EXAMPLES = 40


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(EXAMPLES, 4, dtype=torch.float64)


def network(bias: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5, bias=bias), nn.Tanh(), nn.Linear(5, 3, bias=bias)).double()


def factors_of(model: nn.Module, inputs: Tensor) -> Factors:
    return mean_factors(model, [inputs], fisher=Fisher("categorical", exact=True))


def dense_precision(factors: Factors, name: str, precision: float, temperature: float = 1.0) -> Tensor:
    """Of a matrix (out, in) flattened row by row."""
    block = torch.kron(factors[name].g, factors[name].a) * factors.label.examples / temperature
    return block + precision * torch.eye(len(block), dtype=block.dtype)


def logit_jacobian(model: nn.Sequential, x: Tensor, name: str) -> Tensor:
    """(classes, out · in), the bias as the last column of the matrix."""
    layer = model.get_submodule(name)
    rows = []
    for index in range(3):
        weight, bias = torch.autograd.grad(model(x[None])[0, index], [layer.weight, layer.bias], retain_graph=True)
        rows.append(torch.cat((weight, bias[:, None]), 1).flatten())
    return torch.stack(rows)


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_variances_of_logits_are_those_of_the_dense_posterior(inputs: Tensor, temperature: float) -> None:
    model = network()
    factors = factors_of(model, inputs)
    posterior = Posterior.of(model, factors, precision=0.7, temperature=temperature)
    covariances = {name: dense_precision(factors, name, 0.7, temperature).inverse() for name in factors}
    found = posterior.predict(model, inputs[:6])
    for x, variances in zip(inputs[:6], found.variances, strict=True):
        jacobians = {name: logit_jacobian(model, x, name) for name in factors}
        dense = sum((jacobians[name] @ covariances[name] @ jacobians[name].mT).diag() for name in factors)
        assert torch.allclose(variances, dense, rtol=1e-9)
    expected = (model(inputs[:6]) / (1 + math.pi / 8 * found.variances).sqrt()).softmax(-1)
    assert torch.allclose(found.probabilities, expected, rtol=1e-12)


def test_of_the_last_layer_features_are_enough(inputs: Tensor) -> None:
    model = network()
    posterior = Posterior.of(model, factors_of(model, inputs), precision=0.5, layers=["2"])
    by_features = posterior.logit_variances(model, inputs)
    wrapped = nn.ModuleDict({"inner": model})
    wrapped.forward = lambda x: model(x).clone()  # the layer's output is no longer the logits: gradients are asked
    renamed = Posterior.of(wrapped, {"inner.2": factors_of(model, inputs)["2"]}, examples=EXAMPLES, precision=0.5)
    assert torch.allclose(by_features, renamed.logit_variances(wrapped, inputs), rtol=1e-10)


def test_drawn_weights_have_the_dense_covariance(inputs: Tensor) -> None:
    model = network()
    factors = factors_of(model, inputs)
    posterior = Posterior.of(model, factors, precision=2.0, layers=["2"])
    generator = torch.Generator().manual_seed(1)
    draws = []
    for _ in range(20000):
        drawn = posterior.sample(model, generator)
        draws.append(torch.cat((drawn["2.weight"], drawn["2.bias"][:, None]), 1).flatten())
    covariance = torch.stack(draws).T.cov()
    dense = dense_precision(factors, "2", 2.0).inverse()
    assert (covariance - dense).norm() < 0.04 * dense.norm()


def test_the_evidence_is_that_of_the_dense_gaussian(inputs: Tensor) -> None:
    model = network()
    factors = factors_of(model, inputs)
    posterior = Posterior.of(model, factors, precision=0.3)
    determinants = sum(dense_precision(factors, name, 0.3).logdet() for name in factors)
    weights = parameters_to_vector(model.parameters())
    expected = -12.5 - 0.5 * (0.3 * weights.square().sum() + determinants - len(weights) * math.log(0.3))
    assert posterior.log_evidence(-12.5) == pytest.approx(expected.item(), rel=1e-10)


def test_the_best_precision_is_where_the_evidence_is_highest(inputs: Tensor) -> None:
    model = network()
    factors = factors_of(model, inputs)
    best = Posterior.of(model, factors).with_best_precision()
    highest = best.log_evidence(0.0)
    for share in (0.5, 0.9, 0.99, 1.01, 1.1, 2.0):
        other = Posterior.of(model, factors, precision=share * best.precision)
        assert other.log_evidence(0.0) < highest


def test_many_drawn_networks_come_near_the_linearised_one_where_the_posterior_is_narrow(inputs: Tensor) -> None:
    model = network()
    posterior = Posterior.of(model, factors_of(model, inputs), precision=2000.0)
    linear = posterior.predict(model, inputs[:5])
    drawn = posterior.predict(model, inputs[:5], samples=4000, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(linear.variances, drawn.variances, rtol=0.1)
    assert torch.allclose(linear.probabilities, drawn.probabilities, atol=2e-3)


def test_foreign_inputs_are_more_novel_than_familiar_ones(inputs: Tensor) -> None:
    model = network()
    posterior = Posterior.of(model, factors_of(model, inputs), precision=0.1)
    familiar = posterior.predict(model, inputs).novelty
    foreign = posterior.predict(model, 6 * torch.randn(EXAMPLES, 4, dtype=torch.float64)).novelty
    better = (foreign[:, None] > familiar).double().mean()
    assert better > 0.85


def test_corrected_eigenvalues_enter_as_they_are(inputs: Tensor) -> None:
    model = network()
    curvature = Curvature.of(model, factors_of(model, inputs))
    targets = torch.randint(3, (EXAMPLES,))

    def loss(outputs: Tensor, wanted: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, wanted, reduction="sum")

    corrected = curvature.corrected_by(model, loss, [(inputs[:9], targets[:9]), (inputs[9:], targets[9:])])
    posterior = Posterior.of(model, corrected, examples=EXAMPLES, precision=0.7, layers=["2"])
    basis = curvature.bases["2"]
    vectors = torch.kron(basis.g, basis.a)
    gradients = example_gradients(model, loss, inputs, targets, ("2",))["2"].flatten(1)
    moments = (gradients @ vectors).square().mean(0)
    covariance = vectors @ (1 / (EXAMPLES * moments + 0.7)).diag() @ vectors.mT
    jacobian = logit_jacobian(model, inputs[0], "2")
    expected = (jacobian @ covariance @ jacobian.mT).diag()
    assert torch.allclose(posterior.logit_variances(model, inputs[:1])[0], expected, rtol=1e-9)
    with pytest.raises(ConfigurationError, match="give examples="):
        Posterior.of(model, corrected)


def test_modes_weights_and_hooks_stay(inputs: Tensor) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)).double()
    before = model[0].weight.clone()
    posterior = Posterior.of(model, factors_of(model, inputs))
    first, second = (posterior.predict(model, inputs).probabilities for _ in range(2))
    assert torch.equal(first, second)
    assert model.training
    assert torch.equal(model[0].weight, before)
    assert not model[0]._forward_hooks


def test_convolutions_are_covered_too(inputs: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(8, 3)).double()
    images = torch.randn(10, 1, 3, 3, dtype=torch.float64)
    posterior = Posterior.of(model, mean_factors(model, [images]), precision=5000.0)
    linear = posterior.predict(model, images)
    drawn = posterior.predict(model, images, samples=4000, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(linear.variances, drawn.variances, rtol=0.12)
    assert posterior.curvature.share == 1.0


def test_predictions_and_evidence_are_those_of_laplace_torch_given_the_same_factors(inputs: Tensor) -> None:
    laplace = pytest.importorskip("laplace", reason="laplace-torch is not installed")
    model = network(bias=False)  # with biases laplace-torch drops what is between them and the weights
    factors = factors_of(model, inputs)
    targets = torch.randint(3, (EXAMPLES,))
    loss = nn.functional.cross_entropy(model(inputs), targets, reduction="sum").item()
    other = laplace.KronLaplace(model, "classification", prior_precision=0.4)
    other.load_state_dict(
        {
            "mean": parameters_to_vector(model.parameters()).detach(),
            "H": [[EXAMPLES * factors[name].g, factors[name].a] for name in factors],
            "loss": loss,
            "prior_mean": other.prior_mean,
            "prior_precision": other.prior_precision,
            "sigma_noise": other.sigma_noise,
            "n_data": EXAMPLES,
            "n_outputs": 3,
            "likelihood": "classification",
            "temperature": 1.0,
            "enable_backprop": False,
            "cls_name": "KronLaplace",
        }
    )
    posterior = Posterior.of(model, factors, precision=0.4)
    theirs = other(inputs[:8], pred_type="glm", link_approx="probit")
    assert torch.allclose(posterior.predict(model, inputs[:8]).probabilities, theirs.double(), atol=1e-6)
    assert posterior.log_evidence(-loss) == pytest.approx(other.log_marginal_likelihood().item(), rel=1e-6)


def test_what_makes_no_posterior_is_refused(inputs: Tensor) -> None:
    model = network()
    factors = factors_of(model, inputs)
    empirical = mean_factors(
        model,
        [(inputs, torch.zeros(EXAMPLES, dtype=torch.long))],
        fisher="empirical",
        loss=lambda z, y: nn.functional.cross_entropy(z, y, reduction="sum"),
    )
    with pytest.raises(ConfigurationError, match="empirical Fisher, whose gradients vanish"):
        Posterior.of(model, empirical)
    with pytest.raises(ConfigurationError, match="no mean over the training data; give examples="):
        Posterior.of(model, dict(factors))
    with pytest.raises(ConfigurationError, match="precision is 0"):
        Posterior.of(model, factors, precision=0.0)
    with pytest.raises(ConfigurationError, match="no factors of 7; there are: 0, 2"):
        Posterior.of(model, factors, layers=["7"])
    with pytest.raises(ConfigurationError, match="no layer of the model has factors"):
        Posterior.of(nn.Sequential(nn.Linear(9, 9)), factors)
