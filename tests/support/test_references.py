"""The brute-force references agree with one another before anything else is held against them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.support.canonical import (
    canonical_gradient,
    canonical_input,
    gradient_matrix,
    weight_from_matrix,
    weight_matrix,
)
from tests.support.fisher import (
    empirical_fisher,
    exact_fisher,
    per_example_gradients,
    predicted_scores,
)
from tests.support.kron import dense_block, tikhonov_solve
from tests.support.recording import recording

MODULES = [
    nn.Linear(3, 4),
    nn.Linear(3, 4, bias=False),
    nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2),
    nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=1, dilation=(2, 1), padding_mode="reflect"),
    nn.Conv2d(4, 4, 3, padding="same", groups=4),
    nn.Conv3d(2, 3, 2),
    nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2),
    nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1),
]


def example_input(module: nn.Module, batch: int = 2) -> torch.Tensor:
    if isinstance(module, nn.Linear):
        return torch.randn(batch, 5, module.in_features, dtype=torch.float64)
    dimensions = len(module.kernel_size)
    return torch.randn(batch, module.in_channels, *([6, 5, 4][:dimensions]), dtype=torch.float64)


@pytest.mark.parametrize("module", MODULES, ids=repr)
def test_canonical_rows_times_the_weight_are_the_output(module: nn.Module) -> None:
    module = module.double()
    x = example_input(module)
    rows = canonical_input(module, x)
    matrix = weight_matrix(module, module.weight.detach())
    if module.bias is not None:
        matrix = torch.cat([matrix, module.bias.detach().reshape(*matrix.shape[:2], 1)], dim=-1)
    expected = canonical_gradient(module, module(x).detach())
    torch.testing.assert_close(torch.einsum("bsgk,gok->bsgo", rows, matrix), expected)


@pytest.mark.parametrize("module", MODULES, ids=repr)
def test_canonical_rows_and_gradients_make_the_weight_gradient(module: nn.Module) -> None:
    module = module.double()
    model = nn.Sequential(module)
    with recording(model, ["0"]) as records:
        model.zero_grad()
        model(example_input(module)).square().sum().backward()
    record = records["0"]
    rows = canonical_input(module, record.inputs[0])
    gradients = canonical_gradient(module, record.gradients[0])
    torch.testing.assert_close(torch.einsum("bsgk,bsgo->gok", rows, gradients), gradient_matrix(module))


@pytest.mark.parametrize("module", MODULES, ids=repr)
def test_weight_and_matrix_are_one_to_one(module: nn.Module) -> None:
    matrix = weight_matrix(module, module.weight.detach())
    torch.testing.assert_close(weight_from_matrix(module, matrix), module.weight.detach())


def test_canonical_rows_of_a_convolution_are_its_unfolded_patches() -> None:
    module = nn.Conv2d(3, 2, 3, stride=2, padding=1, dilation=2, bias=False).double()
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    patches = F.unfold(x, 3, dilation=2, padding=1, stride=2).transpose(1, 2)
    torch.testing.assert_close(canonical_input(module, x)[:, :, 0], patches)


def test_the_block_of_one_example_is_its_dense_empirical_fisher() -> None:
    module = nn.Linear(3, 4).double()
    model = nn.Sequential(module, nn.Tanh())
    x = torch.randn(1, 3, dtype=torch.float64)
    y = torch.randn(1, 4, dtype=torch.float64)

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (output - target).square().sum() / len(output)

    with recording(model, ["0"]) as records:
        loss(model(x), y).backward()
    [(a, g)] = records["0"].pairs()
    gradients = per_example_gradients(model, x, y, loss, [module.weight, module.bias])
    weights = torch.arange(12).reshape(4, 3)
    order = torch.cat([weights, 12 + torch.arange(4).reshape(4, 1)], dim=1).reshape(-1)
    torch.testing.assert_close(dense_block(a, g), empirical_fisher(gradients)[order][:, order])


@pytest.mark.parametrize("kind", ["categorical", "gaussian", "bernoulli"])
def test_scores_square_to_the_hessian_of_the_loss_at_the_output(kind: str) -> None:
    output = torch.randn(4, dtype=torch.float64, requires_grad=True)
    losses = {
        "categorical": lambda f: F.cross_entropy(f[None], torch.tensor([1])),
        "gaussian": lambda f: 0.5 * (f - 1.0).square().sum(),
        "bernoulli": lambda f: F.binary_cross_entropy_with_logits(f, torch.ones_like(f), reduction="sum"),
    }
    hessian = torch.autograd.functional.hessian(losses[kind], output)
    rows = [torch.autograd.grad(score, output)[0] for score in predicted_scores(output[None], kind)]
    torch.testing.assert_close(sum(torch.outer(row, row) for row in rows), hessian)


def test_exact_fisher_of_a_linear_model_is_its_gauss_newton_matrix() -> None:
    module = nn.Linear(3, 2, bias=False).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    dense = exact_fisher(module, x, [module.weight], "gaussian")
    expected = dense_block(x.T @ x / 5, torch.eye(2, dtype=torch.float64))
    torch.testing.assert_close(dense, expected)


def test_tikhonov_solve_inverts_the_damped_kronecker_product() -> None:
    a, g = (torch.cov(torch.randn(n, 9, dtype=torch.float64)) for n in (3, 4))
    gradient = torch.randn(4, 3, dtype=torch.float64)
    solved = tikhonov_solve(a, g, gradient, 0.1)
    torch.testing.assert_close(g @ solved @ a + 0.1 * solved, gradient)
