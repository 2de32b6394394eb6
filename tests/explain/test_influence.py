"""Influence functions: against dense matrices, kronfluence, retraining, and labels that are known to be wrong."""

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from kaisa import kfac
from kaisa.curvature import example_gradients
from kaisa.errors import ConfigurationError, DataError
from kaisa.explain import Curvature, Examples, explain
from kaisa.explain.influence import cross_entropy, sample_labels
from kaisa.explain.quality import rank_correlation
from kaisa.recipes.images import decode_image, list_classes, open_tree

Model = nn.Sequential


def sum_of_squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * (outputs - targets).square().sum()


def network() -> Model:
    layers = [nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(27, 5, bias=False)]
    return Model(*layers, nn.Tanh(), nn.Linear(5, 4)).double()


@pytest.fixture
def model() -> Model:
    torch.manual_seed(1)
    return network()


@pytest.fixture
def examples() -> Examples:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(20, 2, 6, 6, dtype=torch.float64, generator=generator)
    return Examples(x, torch.randint(4, (20,), generator=generator))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def factors_of(model: nn.Module, examples: Examples, exact: bool = False) -> kfac.Factors:
    fisher = kfac.Fisher("categorical", exact=exact)
    return kfac.mean_factors(model, [(examples.inputs, examples.targets)], fisher=fisher)


def dense_gradients(model: nn.Module, examples: Examples, layer: str) -> Tensor:
    """The gradient of every example by plain autograd, one backward pass each, as rows of (out × in)."""
    module, rows = model.get_submodule(layer), []
    for x, y in zip(examples.inputs, examples.targets, strict=True):
        loss = functional.cross_entropy(model(x[None]), y[None])
        gradients = torch.autograd.grad(loss, list(module.parameters()))
        parts = [gradients[0].flatten(1), *(bias[:, None] for bias in gradients[1:])]
        rows.append(torch.cat(parts, 1).flatten())
    return torch.stack(rows)


def test_gradients_of_examples_are_those_of_one_backward_pass_each(model: Model, examples: Examples) -> None:
    found = example_gradients(model, cross_entropy, examples.inputs, examples.targets, ("0", "3", "5"))
    for layer, gradients in found.items():
        assert torch.allclose(gradients.flatten(1), dense_gradients(model, examples, layer), atol=1e-12)


def test_influence_is_the_product_with_the_inverse_of_the_dense_kronecker_product(
    model: Model, examples: Examples
) -> None:
    factors = factors_of(model, examples)
    curvature = Curvature.of(model, factors)
    queries = Examples(examples.inputs[:3], examples.targets[:3].flip(0))
    expected = torch.zeros(3, 20, dtype=torch.float64)
    for name, pair in factors.items():
        block = torch.kron(pair.g, pair.a)
        damped = block + 0.2 * block.diagonal().mean() * torch.eye(len(block), dtype=torch.float64)
        inverse = torch.linalg.inv(damped)
        expected += dense_gradients(model, queries, name) @ inverse @ dense_gradients(model, examples, name).mT
    found = curvature.influence(model, cross_entropy, queries, examples, damping=0.2, batch_size=7)
    assert torch.allclose(found, expected, rtol=1e-8, atol=1e-10)


def test_corrected_eigenvalues_make_the_nearest_diagonal_in_the_eigenbasis(
    model: Model, examples: Examples, generator: torch.Generator
) -> None:
    curvature = Curvature.of(model, factors_of(model, examples))
    corrected = curvature.moments(model, cross_entropy, examples, sample=None, generator=generator, batch_size=6)
    expected = torch.zeros(20, 20, dtype=torch.float64)
    for name, basis in curvature.bases.items():
        gradients = dense_gradients(model, examples, name)
        vectors = torch.kron(basis.g, basis.a)
        empirical = gradients.mT @ gradients / len(gradients)
        values = (vectors.mT @ empirical @ vectors).diagonal()
        inverse = vectors @ torch.diag(1 / (values + 0.1 * values.mean())) @ vectors.mT
        expected += gradients @ inverse @ gradients.mT
    found = corrected.influence(model, cross_entropy, examples, examples)
    assert torch.allclose(found, expected, rtol=1e-8, atol=1e-10)
    assert "EKFAC" in repr(corrected)


def test_an_example_s_influence_on_itself_is_on_the_diagonal(model: Model, examples: Examples) -> None:
    curvature = Curvature.of(model, factors_of(model, examples))
    everything = curvature.influence(model, cross_entropy, examples, examples)
    alone = curvature.self_influence(model, cross_entropy, examples, batch_size=3)
    assert torch.allclose(alone, everything.diagonal())
    assert (alone > 0).all()


def test_sampled_labels_follow_the_prediction(generator: torch.Generator) -> None:
    outputs = torch.tensor([0.1, 0.6, 0.3]).log().expand(20000, 3)
    shares = sample_labels(outputs, generator).bincount(minlength=3) / 20000
    assert torch.allclose(shares, torch.tensor([0.1, 0.6, 0.3]), atol=0.015)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("strategy", ["kfac", "ekfac"])
def test_influence_equals_that_of_kronfluence_on_the_same_factors(
    strategy: str, model: Model, examples: Examples, generator: torch.Generator, tmp_path: Path
) -> None:
    pytest.importorskip("kronfluence", reason="kronfluence is not installed: requirements-oracles.txt")
    factors = factors_of(model, examples)
    curvature = Curvature.of(model, factors)
    if strategy == "ekfac":
        curvature = curvature.moments(model, cross_entropy, examples, sample=None, generator=generator)
    queries = Examples(examples.inputs[:4], examples.targets[:4])
    expected = scores_of_kronfluence(model, queries, examples, factors, strategy, tmp_path)
    found = curvature.influence(model, cross_entropy, queries, examples)
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-8)


def scores_of_kronfluence(
    model: Model,
    queries: Examples,
    training: Examples,
    factors: kfac.Factors,
    strategy: str,
    folder: Path,
) -> Tensor:
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task
    from safetensors.torch import save_file

    class Classification(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            return functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    task = Classification()
    watched, quiet = prepare_model(copy.deepcopy(model), task), {"disable_tqdm": True, "disable_model_save": True}
    analyzer = Analyzer("a", watched, task, cpu=True, output_dir=str(folder), **quiet)
    output, count = analyzer.factors_output_dir("f"), len(training)
    output.mkdir(parents=True)

    def write(name: str, tensors: Mapping[str, Tensor]) -> None:
        save_file({key: value.contiguous() for key, value in tensors.items()}, str(output / f"{name}.safetensors"))

    write("activation_covariance", {name: count * pair.a for name, pair in factors.items()})
    write("gradient_covariance", {name: count * pair.g for name, pair in factors.items()})
    for kind in ("activation_covariance", "gradient_covariance"):
        write(f"num_{kind}_processed", {name: torch.tensor([count]) for name in factors})  # no tensor twice
    arguments = FactorArguments(strategy, use_empirical_fisher=True, eigendecomposition_dtype=torch.float64)
    arguments.lambda_dtype = arguments.per_sample_gradient_dtype = torch.float64
    analyzer.perform_eigendecomposition("f", factor_args=arguments)
    if strategy == "ekfac":
        dataset = TensorDataset(training.inputs, training.targets)
        analyzer.fit_lambda_matrices("f", dataset, per_device_batch_size=10, factor_args=arguments)
    precise = dict.fromkeys(("score_dtype", "per_sample_gradient_dtype", "precondition_dtype"), torch.float64)
    analyzer.compute_pairwise_scores(
        "s",
        "f",
        query_dataset=TensorDataset(queries.inputs, queries.targets),
        train_dataset=TensorDataset(training.inputs, training.targets),
        per_device_query_batch_size=4,
        per_device_train_batch_size=10,
        score_args=ScoreArguments(damping_factor=None, **precise),  # None: a tenth of the mean eigenvalue
    )
    return analyzer.load_pairwise_scores("s")["all_modules"]


class Ridge:
    """Linear regression with weight decay, whose Hessian is A⊗I + λI: what K-FAC says of it is exact."""

    def __init__(self, generator: torch.Generator) -> None:
        self.decay = 0.1
        self.x = torch.randn(40, 6, dtype=torch.float64, generator=generator)
        self.y = torch.randn(40, 2, dtype=torch.float64, generator=generator)
        self.rows = functional.pad(self.x, (0, 1), value=1.0)

    def solve(self, weights: Tensor) -> Tensor:
        """The minimum of Σ weight · ½‖error‖² / N + λ/2 ‖W‖²."""
        weighted = self.rows.mT * weights / len(self.x)
        return torch.linalg.solve(
            weighted @ self.rows + self.decay * torch.eye(7, dtype=torch.float64), weighted @ self.y
        ).mT

    def model(self) -> Model:
        solution, layer = self.solve(torch.ones(40, dtype=torch.float64)), nn.Linear(6, 2).double()
        with torch.no_grad():
            layer.weight.copy_(solution[:, :-1])
            layer.bias.copy_(solution[:, -1])
        return Model(layer)

    def losses(self, solution: Tensor) -> Tensor:
        return 0.5 * (self.rows @ solution.mT - self.y).square().sum(1)


def test_influence_is_how_the_loss_moves_when_an_example_counts_less(generator: torch.Generator) -> None:
    problem, step = Ridge(generator), 1e-5
    model, examples = problem.model(), Examples(problem.x, problem.y)
    factors = kfac.mean_factors(model, [problem.x], fisher=kfac.Fisher("gaussian", exact=True))
    curvature = Curvature.of(model, factors)
    damping = problem.decay / float(curvature.bases["0"].values.mean())
    found = curvature.influence(model, sum_of_squares, examples, examples, damping=damping) / 40
    ones = torch.ones(40, dtype=torch.float64)
    for row in range(0, 40, 7):
        weights = torch.eye(40, dtype=torch.float64)[row] * step
        moved = problem.losses(problem.solve(ones - weights)) - problem.losses(problem.solve(ones + weights))
        assert torch.allclose(found[:, row], moved / (2 * step), rtol=1e-6, atol=1e-9)


def test_influence_orders_the_examples_as_leaving_them_out_does_on_ridge_regression(generator: torch.Generator) -> None:
    problem = Ridge(generator)
    model, examples = problem.model(), Examples(problem.x, problem.y)
    factors = kfac.mean_factors(model, [problem.x], fisher=kfac.Fisher("gaussian", exact=True))
    curvature = Curvature.of(model, factors)
    damping = problem.decay / float(curvature.bases["0"].values.mean())
    found = curvature.influence(model, sum_of_squares, examples, examples, damping=damping) / 40
    base = problem.losses(problem.solve(torch.ones(40, dtype=torch.float64)))
    left_out = [problem.losses(problem.solve(1 - torch.eye(40, dtype=torch.float64)[row])) - base for row in range(40)]
    true = torch.stack(left_out, 1)
    assert correlation_of_ranks(found, true).mean() > 0.98
    assert float(torch.corrcoef(torch.stack([found.flatten(), true.flatten()]))[0, 1]) > 0.98


def correlation_of_ranks(x: Tensor, y: Tensor) -> Tensor:
    """Spearman's, with signs: ``rank_correlation`` looks at sizes, so the least of each row is moved to zero."""
    return rank_correlation(x - x.amin(1, keepdim=True), y - y.amin(1, keepdim=True))


class Logistic:
    """Multinomial logistic regression with weight decay on standardised iris data, solved by Newton's method."""

    decay = 0.05

    def __init__(self) -> None:
        data = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed").load_iris()
        x = torch.tensor(data.data)
        self.x, self.y = (x - x.mean(0)) / x.std(0), torch.tensor(data.target).long()
        self.rows = functional.pad(self.x, (0, 1), value=1.0)

    def solve(self, weights: Tensor, start: Tensor) -> Tensor:
        solution, hot = start, functional.one_hot(self.y, 3)
        for _ in range(20):
            p = (self.rows @ solution.mT).softmax(-1)
            gradient = ((p - hot) * weights[:, None]).mT @ self.rows / len(self.x) + self.decay * solution
            blocks = (torch.diag_embed(p) - p[:, :, None] * p[:, None]) * weights[:, None, None]
            squares = (self.rows[:, :, None] * self.rows[:, None]).flatten(1)
            hessian = (blocks.flatten(1).mT @ squares).reshape(3, 3, 5, 5).transpose(1, 2).reshape(15, 15) / len(self.x)
            step = torch.linalg.solve(hessian + self.decay * torch.eye(15, dtype=torch.float64), gradient.flatten())
            solution = solution - step.reshape(3, 5)
            if step.norm() < 1e-8:  # the next one would be of its square
                break
        return solution

    def losses(self, solution: Tensor) -> Tensor:
        return functional.cross_entropy(self.rows @ solution.mT, self.y, reduction="none")


def test_influence_agrees_with_leaving_examples_out_of_logistic_regression() -> None:
    problem, ones = Logistic(), torch.ones(150, dtype=torch.float64)
    solution = problem.solve(ones, torch.zeros(3, 5, dtype=torch.float64))
    model = Model(nn.Linear(4, 3).double())
    with torch.no_grad():
        model[0].weight.copy_(solution[:, :-1])
        model[0].bias.copy_(solution[:, -1])
    examples, queries = Examples(problem.x, problem.y), torch.arange(0, 150, 10)
    curvature = Curvature.of(model, factors_of(model, examples, exact=True))
    damping = problem.decay / float(curvature.bases["0"].values.mean())
    asked = Examples(problem.x[queries], problem.y[queries])
    found = curvature.influence(model, cross_entropy, asked, examples, damping=damping) / 150
    base = problem.losses(solution)[queries]
    left = 1 - torch.eye(150, dtype=torch.float64)
    true = torch.stack([problem.losses(problem.solve(left[row], solution))[queries] - base for row in range(150)], 1)
    # The Hessian is no Kronecker product: what is lost against the dense one is the price of the factors.
    assert correlation_of_ranks(found, true).mean() > 0.9
    assert float(torch.corrcoef(torch.stack([found.flatten(), true.flatten()]))[0, 1]) > 0.95
    assert float((found * true).sum() / true.square().sum()) == pytest.approx(1, abs=0.1)


def area_under_curve(scores: Tensor, is_bad: Tensor) -> float:
    """The probability that a bad example scores higher than a good one."""
    bad, good = scores[is_bad], scores[~is_bad]
    return float((bad[:, None] > good).double().mean() + 0.5 * (bad[:, None] == good).double().mean())


def mislabelled(labels: Tensor, classes: int, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Labels of which a share is wrong, and which those are."""
    count = round(share * len(labels))
    chosen = torch.randperm(len(labels), generator=generator)[:count]
    noisy, is_bad = labels.clone(), torch.zeros(len(labels), dtype=torch.bool)
    noisy[chosen] = (labels[chosen] + torch.randint(1, classes, (count,), generator=generator)) % classes
    is_bad[chosen] = True
    return noisy, is_bad


def trained(model: nn.Module, examples: Examples, epochs: int, generator: torch.Generator) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.01)
    for _ in range(epochs):
        for rows in torch.randperm(len(examples), generator=generator).split(50):
            optimizer.zero_grad()
            functional.cross_entropy(model(examples.inputs[rows]), examples.targets[rows]).backward()
            optimizer.step()


def test_self_influence_finds_digits_with_wrong_labels(generator: torch.Generator) -> None:
    digits = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed").load_digits()
    rows = torch.randperm(len(digits.target), generator=generator)[:1000]
    labels, is_bad = mislabelled(torch.tensor(digits.target).long()[rows], 10, 0.05, generator)
    examples = Examples(torch.tensor(digits.images).float()[rows] / 16, labels)
    model = Model(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    trained(model, examples, 10, generator)
    curvature = Curvature.of(model, factors_of(model, examples))
    corrected = curvature.moments(model, cross_entropy, examples, sample=sample_labels, generator=generator)
    for known in (curvature, corrected):
        assert area_under_curve(known.self_influence(model, cross_entropy, examples), is_bad) > 0.98


@pytest.mark.slow
def test_self_influence_finds_photographs_with_wrong_labels(real_data: Path, generator: torch.Generator) -> None:
    archive, pictures = real_data / "cifar10-train.zip", []
    with open_tree(archive) as tree:
        members = list_classes(tree.names, archive)
        for name in ("airplane", "frog"):
            pictures += [decode_image(tree.read(member), member) for member in members[name][:500]]
    x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255
    labels, is_bad = mislabelled(torch.arange(2).repeat_interleave(500), 2, 0.05, generator)
    examples = Examples((x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True), labels)
    first = [nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()]
    last = [nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 2)]
    model = Model(*first, *last)
    trained(model, examples, 12, generator)
    curvature = Curvature.of(model, kfac.mean_factors(model, examples.inputs.split(200)))
    corrected = curvature.moments(model, cross_entropy, examples, sample=sample_labels, generator=generator)
    for known in (curvature, corrected):
        assert area_under_curve(known.self_influence(model, cross_entropy, examples), is_bad) > 0.9


def test_the_front_door_tells_the_strongest_examples(model: Model, examples: Examples) -> None:
    curvature = Curvature.of(model, factors_of(model, examples))
    modes = [module.training for module in model.modules()]
    explanation = explain(model, examples.inputs[:2], "influence", 1, training=examples, curvature=curvature)
    asked = Examples(examples.inputs[:2], torch.tensor([1, 1]))
    assert torch.equal(explanation.values, curvature.influence(model, cross_entropy, asked, examples))
    assert explanation.details["proponents"][0][0] == int(explanation.values[0].argmax())
    assert explanation.details["opponents"][1][0] == int(explanation.values[1].argmin())
    strongest = explanation.details["proponents"][1][0]
    assert torch.equal(explanation.details["proponents_inputs"][1, 0], examples.inputs[strongest])
    assert explanation.options["training"] is examples
    assert [module.training for module in model.modules()] == modes
    other = explain(model, examples.inputs[:2], "influence", 2, training=examples, curvature=curvature)
    assert not torch.allclose(other.values, explanation.values)


def test_factors_of_other_layers_are_left_out_and_told(model: Model, examples: Examples) -> None:
    pair = SimpleNamespace(a=torch.eye(3), g=torch.eye(3))
    curvature = Curvature.of(model, {**factors_of(model, examples), "1": pair, "7": pair})
    assert curvature.left_out["1"].startswith("ReLU is not linear")
    assert curvature.left_out["7"] == "the model has no module of this name"
    assert math.isclose(curvature.share, 1.0)


def test_factors_of_another_shape_are_refused(model: Model) -> None:
    pair = SimpleNamespace(a=torch.eye(3), g=torch.eye(3))
    with pytest.raises(ConfigurationError, match=r"G \(3, 3\) and A \(3, 3\) are not \(4, 4\) and \(6, 6\)"):
        Curvature.of(model, {"5": pair})


def test_a_layer_whose_weight_another_owns_is_left_out() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    pair = SimpleNamespace(a=torch.eye(4), g=torch.eye(3))
    curvature = Curvature.of(Model(first, second), {"0": pair, "1": pair})
    assert list(curvature.bases) == ["0"]
    assert "belongs to another layer" in curvature.left_out["1"]


@pytest.mark.parametrize("damping", [0.0, -1.0, float("nan")])
def test_damping_must_be_above_zero(damping: float, model: Model, examples: Examples) -> None:
    curvature = Curvature.of(model, factors_of(model, examples))
    with pytest.raises(ConfigurationError, match="give a number above 0"):
        curvature.self_influence(model, cross_entropy, examples, damping=damping)


def test_as_many_targets_as_inputs_are_wanted() -> None:
    with pytest.raises(DataError, match="3 inputs with 2 targets"):
        Examples(torch.zeros(3, 1), torch.zeros(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"training": (1, 2), "curvature": None}, "training is tuple; give Examples"),
        (
            {"training": Examples(torch.zeros(1, 2), torch.zeros(1)), "curvature": {}},
            "curvature is dict; give Curvature.of",
        ),
    ],
)
def test_values_of_other_kinds_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        explain(nn.Linear(2, 2), torch.zeros(1, 2), "influence", **options)
