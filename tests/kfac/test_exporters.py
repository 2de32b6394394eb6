"""Factors in the hands of other libraries: they compute with them what they should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from kaisa.errors import ConfigurationError
from kaisa.kfac import Factors, Fisher, mean_factors
from kaisa.kfac.exporters import to_curvlinops, to_kronfluence, to_laplace

EXAMPLES = 24


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(EXAMPLES, 4, dtype=torch.float64)


@pytest.fixture
def model() -> nn.Sequential:
    return network()


@pytest.fixture
def factors(model: nn.Sequential, inputs: Tensor) -> Factors:
    return mean_factors(model, [inputs], fisher=Fisher("categorical", exact=True))


@pytest.fixture
def targets() -> Tensor:
    return torch.randint(3, (EXAMPLES,))


def test_laplace_torch_reaches_the_same_posterior_as_by_its_own_pass_over_the_data(
    model: nn.Sequential, inputs: Tensor, targets: Tensor, factors: Factors
) -> None:
    laplace = pytest.importorskip("laplace", reason="laplace-torch is not installed")
    loss = F.cross_entropy(model(inputs), targets, reduction="sum").item()
    given = laplace.KronLaplace(model, "classification")
    given.load_state_dict(to_laplace(factors, model, loss=loss, outputs=3, precision=0.7))
    # The dense posterior of each block, weight and bias apart, by hand.
    variances = torch.zeros(3, dtype=torch.float64)
    for name in ("0", "2"):
        layer, pair = model.get_submodule(name), factors[name]
        blocks = {"weight": torch.kron(pair.g, pair.a[:-1, :-1]), "bias": pair.g}
        for part, block in blocks.items():
            covariance = (EXAMPLES * block + 0.7 * torch.eye(len(block), dtype=torch.float64)).inverse()
            for index in range(3):
                (jacobian,) = torch.autograd.grad(model(inputs[:1])[0, index], [getattr(layer, part)])
                variances[index] += jacobian.flatten() @ covariance @ jacobian.flatten()
    expected = (model(inputs[:1]) / (1 + torch.pi / 8 * variances).sqrt()).softmax(-1)
    assert torch.allclose(given(inputs[:1], pred_type="glm", link_approx="probit").double(), expected, atol=1e-6)


def test_kronfluence_reads_the_files_and_decomposes_what_was_written(
    model: nn.Sequential, factors: Factors, tmp_path: Path
) -> None:
    to_kronfluence(factors, model, tmp_path / "made")
    read = load_file(tmp_path / "made" / "activation_covariance.safetensors")
    assert torch.equal(read["2"], EXAMPLES * factors["2"].a)
    analyzers = pytest.importorskip("kronfluence.analyzer", reason="kronfluence is not installed")
    tasks = pytest.importorskip("kronfluence.task", reason="kronfluence is not installed")
    arguments = pytest.importorskip("kronfluence.arguments", reason="kronfluence is not installed")

    class Task(tasks.Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    wrapped = analyzers.prepare_model(network(), Task())
    analyzer = analyzers.Analyzer("test", wrapped, Task(), cpu=True, output_dir=str(tmp_path), disable_tqdm=True)
    to_kronfluence(factors, model, analyzer.factors_output_dir("ours"))
    analyzer.perform_eigendecomposition("ours", factor_args=arguments.FactorArguments("kfac"))
    decomposed = analyzer.load_eigendecomposition("ours")
    for name in ("0", "2"):
        values, vectors = (decomposed[f"activation_eigen{part}"][name].double() for part in ("values", "vectors"))
        rebuilt = vectors @ values.diag() @ vectors.mT
        assert torch.allclose(rebuilt, factors[name].a, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Loading a state dict will overwrite")  # with these very weights
@pytest.mark.parametrize(("reduction", "terms"), [("mean", 1), ("sum", EXAMPLES)])
def test_a_curvlinops_operator_multiplies_by_these_factors(
    reduction: str, terms: int, model: nn.Sequential, inputs: Tensor, targets: Tensor, factors: Factors
) -> None:
    curvlinops = pytest.importorskip("curvlinops", reason="curvlinops-for-pytorch is not installed")
    parameters = list(model.parameters())
    options = {"separate_weight_and_bias": False, "check_deterministic": False, "fisher_type": "mc", "seed": 1}
    data = [(inputs, targets)]
    operator = curvlinops.KFACLinearOperator(
        model, nn.CrossEntropyLoss(reduction=reduction), parameters, data, **options
    )
    state = to_curvlinops(factors, model, operator.state_dict())
    ours = curvlinops.KFACLinearOperator.from_state_dict(state, model, parameters, data, check_deterministic=False)
    vector = [torch.randn_like(parameter) for parameter in parameters]
    product = ours @ vector
    for index, name in ((0, "0"), (2, "2")):
        matrix = torch.cat((vector[index], vector[index + 1][:, None]), 1)
        expected = terms * factors[name].g @ matrix @ factors[name].a
        found = torch.cat((product[index], product[index + 1][:, None]), 1)
        assert torch.allclose(found, expected, rtol=1e-9)


def test_what_another_library_would_misread_is_refused(
    model: nn.Sequential, inputs: Tensor, targets: Tensor, factors: Factors, tmp_path: Path
) -> None:
    def loss(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y, reduction="sum")

    empirical = mean_factors(model, [(inputs, targets)], fisher="empirical", loss=loss)
    with pytest.raises(ConfigurationError, match="Laplace needs the Fisher of the model"):
        to_laplace(empirical, model, loss=1.0, outputs=3)
    with pytest.raises(ConfigurationError, match="running averages are of no one set of weights"):
        to_kronfluence(Factors(), model, tmp_path)
    normed = nn.Sequential(*model, nn.LayerNorm(3).double())
    partly = mean_factors(normed, [inputs])
    with pytest.raises(ConfigurationError, match=r"3\.weight, 3\.bias have no factors"):
        to_laplace(partly, normed, loss=1.0, outputs=3)
    with pytest.raises(ConfigurationError, match="none of the factors is of a linear layer"):
        to_kronfluence(factors, nn.Sequential(nn.Tanh()), tmp_path)
    known = {"input_covariances": {"9": None}, "gradient_covariances": {}, "loss_reduction": "mean"}
    apart = {"separate_weight_and_bias": True, "input_covariances": {}, "gradient_covariances": {}}
    with pytest.raises(ConfigurationError, match="join weight and bias"):
        to_curvlinops(factors, model, apart)
    with pytest.raises(ConfigurationError, match="no factors of 9"):
        to_curvlinops(factors, model, known)
