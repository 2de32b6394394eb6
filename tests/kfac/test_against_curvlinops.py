"""Another library's K-FAC, written by other people, has the same factors and the same inverse.

Where the conventions differ, s is the number with curvlinops' G = s · ours. Both agree on A, and
both order a weight's columns channel-major with the bias last (`separate_weight_and_bias=False`).

- Sum losses: curvlinops approximates the Fisher of the sum over the data, ours that of one loss
  term, so s = M.
- MSE and binary cross-entropy, mean: torch averages over the C outputs as well. For gradients of
  the true target curvlinops undoes the root of that average, s = C; for type-2 it keeps it, where
  our "gaussian" is ½‖y − f‖² and our "bernoulli" the sum over the C outputs: s = 2/C and 1/C.
- The damping of s·F that gives the inverse of F + λI is sλ, and the inverse is s times as large.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import kaisa
from kaisa.kfac import EKFAC, Fisher
from tests.support.settings import DAMPING, EVERY_STEP

with warnings.catch_warnings():
    # One of its dependencies uses torch.jit.script at import.
    warnings.simplefilter("ignore", DeprecationWarning)
    curvlinops = pytest.importorskip("curvlinops", reason="needs curvlinops-for-pytorch (requirements-oracles.txt)")

BATCH, CLASSES = 6, 3
TOLERANCE = {"rtol": 1e-9, "atol": 1e-12}


class MeanPool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=1)


class ClassesSecond(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES, bias=False))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(3, 4, (3, 2), stride=2, dilation=(1, 2), bias=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16, CLASSES),
    )


def shared_linear() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), MeanPool(), nn.Linear(5, CLASSES))


INPUTS = {perceptron: (4,), convolutional: (2, 6, 6), shared_linear: (7, 4)}


@dataclass(frozen=True)
class Problem:
    """A loss, its predictive distribution, and s as the docstring of this module says."""

    loss: type[nn.Module]
    fisher: str
    scale_of_mean: dict[str, float]

    def targets(self) -> Tensor:
        if self.loss is nn.CrossEntropyLoss:
            return torch.randint(0, CLASSES, (BATCH,))
        targets = torch.randn(BATCH, CLASSES, dtype=torch.float64)
        return targets if self.loss is nn.MSELoss else (targets > 0).double()

    def scale(self, kind: str, reduction: str) -> float:
        if reduction == "mean":
            return self.scale_of_mean[kind]
        return BATCH * (2.0 if (self.loss, kind) == (nn.MSELoss, "type-2") else 1.0)


PROBLEMS = [
    Problem(nn.CrossEntropyLoss, "categorical", {"empirical": 1.0, "type-2": 1.0}),
    Problem(nn.MSELoss, "gaussian", {"empirical": CLASSES, "type-2": 2 / CLASSES}),
    Problem(nn.BCEWithLogitsLoss, "bernoulli", {"empirical": CLASSES, "type-2": 1 / CLASSES}),
]


def theirs(model, x, y, loss, kind: str, sharing: str):
    operator = curvlinops.KFACLinearOperator(
        model,
        loss,
        list(model.parameters()),
        [(x, y)],
        fisher_type=kind,
        kfac_approx=sharing,
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    operator.compute_kronecker_factors()
    return operator


def stepped(model, x, y, loss, *, exact: str | None = None, **options) -> kaisa.KFACPreconditioner:
    """Return the preconditioner after one step; the model's gradients are then preconditioned."""
    fisher = "empirical" if exact is None else Fisher(exact, exact=True)
    settings = {**EVERY_STEP, "fisher": fisher, "loss_reduction": loss.reduction, **options}
    kfac = kaisa.KFACPreconditioner(model, **settings)
    outputs = model(x)
    if exact is not None:
        kfac.sample_fisher(outputs)
    loss(outputs, y).backward()
    kfac.step()
    return kfac


def gradients_of(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters()]


def raw_gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return [gradient.clone() for gradient in torch.autograd.grad(loss, list(model.parameters()))]


def inverse_applied(operator, gradients: list[Tensor], scale: float, solver: str) -> list[Tensor]:
    exact = solver == "eigen"
    inverse = curvlinops.KFACInverseLinearOperator(
        operator,
        damping=scale * DAMPING,
        use_exact_damping=exact,
        use_heuristic_damping=not exact,
    )
    return [scale * solved for solved in inverse @ gradients]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", ["empirical", "type-2"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.fisher)
@pytest.mark.parametrize("build", list(INPUTS), ids=lambda build: build.__name__)
def test_factors_and_preconditioned_gradients_are_those_of_curvlinops(
    build, problem: Problem, sharing: str, kind: str, reduction: str
) -> None:
    model = build().double()
    x = torch.randn(BATCH, *INPUTS[build], dtype=torch.float64)
    y, loss = problem.targets(), problem.loss(reduction=reduction)
    scale = problem.scale(kind, reduction)
    operator = theirs(model, x, y, loss, kind, sharing)
    solved = inverse_applied(operator, raw_gradients(model, loss(model(x), y)), scale, "eigen")

    exact = problem.fisher if kind == "type-2" else None
    kfac = stepped(model, x, y, loss, exact=exact, sharing=sharing)

    for name, a in operator._input_covariances.items():
        torch.testing.assert_close(kfac.factors[name].a, a, **TOLERANCE)
        g = operator._gradient_covariances[name] / scale
        torch.testing.assert_close(kfac.factors[name].g, g, **TOLERANCE)
    for gradient, expected in zip(gradients_of(model), solved, strict=True):
        torch.testing.assert_close(gradient, expected, **TOLERANCE)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_cholesky_with_the_split_damping_is_the_heuristic_damping_of_curvlinops(sharing: str, reduction: str) -> None:
    model = convolutional().double()
    x = torch.randn(BATCH, 2, 6, 6, dtype=torch.float64)
    y, loss = PROBLEMS[0].targets(), nn.CrossEntropyLoss(reduction=reduction)
    scale = PROBLEMS[0].scale("empirical", reduction)
    operator = theirs(model, x, y, loss, "empirical", sharing)
    solved = inverse_applied(operator, raw_gradients(model, loss(model(x), y)), scale, "cholesky")

    stepped(model, x, y, loss, sharing=sharing, solver="cholesky")

    for gradient, expected in zip(gradients_of(model), solved, strict=True):
        torch.testing.assert_close(gradient, expected, **TOLERANCE)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", ["empirical", "type-2"])
def test_a_loss_for_each_token_counts_as_many_terms_as_there_are_tokens(kind: str, reduction: str) -> None:
    tokens = 5
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES), ClassesSecond())
    model = model.double()
    x = torch.randn(BATCH, tokens, 4, dtype=torch.float64)
    y = torch.randint(0, CLASSES, (BATCH, tokens))
    loss = nn.CrossEntropyLoss(reduction=reduction)
    scale = {"mean": 1.0, "sum": BATCH * tokens}[reduction]
    operator = theirs(model, x, y, loss, kind, "expand")
    solved = inverse_applied(operator, raw_gradients(model, loss(model(x), y)), scale, "eigen")

    options = {**EVERY_STEP, "loss_reduction": reduction, "loss_terms": BATCH * tokens}
    fisher = Fisher("categorical", exact=True) if kind == "type-2" else "empirical"
    kfac = kaisa.KFACPreconditioner(model, fisher=fisher, **options)
    outputs = model(x)
    if kind == "type-2":
        kfac.sample_fisher(outputs.transpose(1, 2))
    loss(outputs, y).backward()
    kfac.step()

    for name, a in operator._input_covariances.items():
        torch.testing.assert_close(kfac.factors[name].a, a, **TOLERANCE)
        g = operator._gradient_covariances[name] / scale
        torch.testing.assert_close(kfac.factors[name].g, g, **TOLERANCE)
    for gradient, expected in zip(gradients_of(model), solved, strict=True):
        torch.testing.assert_close(gradient, expected, **TOLERANCE)


@pytest.mark.parametrize("build", [perceptron, convolutional, shared_linear])
def test_per_example_ekfac_is_the_ekfac_of_curvlinops(build) -> None:
    model = build().double()
    x = torch.randn(BATCH, *INPUTS[build], dtype=torch.float64)
    y, loss = PROBLEMS[0].targets(), nn.CrossEntropyLoss()
    operator = curvlinops.EKFACLinearOperator(
        model,
        loss,
        list(model.parameters()),
        [(x, y)],
        fisher_type="empirical",
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    operator.compute_kronecker_factors()
    solved = inverse_applied(operator, raw_gradients(model, loss(model(x), y)), 1.0, "eigen")

    kfac = stepped(model, x, y, loss, solver=EKFAC(per_example=True, decay=0.0))
    # the first step finds the basis in which the second takes its moments
    model.zero_grad()
    loss(model(x), y).backward()
    kfac.step()

    for gradient, expected in zip(gradients_of(model), solved, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9)


def test_a_precision_of_two_over_the_outputs_makes_the_gaussian_that_of_torchs_mse_loss() -> None:
    model = perceptron().double()
    x = torch.randn(BATCH, 4, dtype=torch.float64)
    y, loss = PROBLEMS[1].targets(), nn.MSELoss()
    operator = theirs(model, x, y, loss, "type-2", "expand")
    fisher = Fisher("gaussian", exact=True, precision=2 / CLASSES)
    kfac = kaisa.KFACPreconditioner(model, **{**EVERY_STEP, "fisher": fisher})
    outputs = model(x)
    kfac.sample_fisher(outputs)
    loss(outputs, y).backward()
    kfac.step()
    for name, g in operator._gradient_covariances.items():
        torch.testing.assert_close(kfac.factors[name].g, g, **TOLERANCE)


def test_classes_may_lie_in_any_dimension_of_the_outputs() -> None:
    tokens = 5
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES), ClassesSecond()).double()
    x = torch.randn(BATCH, tokens, 4, dtype=torch.float64)
    y, loss = torch.randint(0, CLASSES, (BATCH, tokens)), nn.CrossEntropyLoss()
    operator = theirs(model, x, y, loss, "type-2", "expand")
    fisher = Fisher("categorical", exact=True, class_dim=1)
    kfac = kaisa.KFACPreconditioner(model, **{**EVERY_STEP, "fisher": fisher, "loss_terms": BATCH * tokens})
    outputs = model(x)
    kfac.sample_fisher(outputs)
    loss(outputs, y).backward()
    kfac.step()
    for name, g in operator._gradient_covariances.items():
        torch.testing.assert_close(kfac.factors[name].g, g, **TOLERANCE)
