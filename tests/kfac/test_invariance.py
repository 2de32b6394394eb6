"""The K-FAC step does not depend on the coordinates that a layer's input and output are written in.

A network whose layer reads x' = C x + c and writes y' with y = B y' + b is the same function when
its weight matrix W̄ (bias last) is replaced by B⁻¹ (W̄ − b) C̄⁻¹, C̄ the homogeneous matrix of C and
c. A step taken in either network must lead to the same function (Martens and Grosse 2015, theorem
1). A damping above zero breaks this in proportion to its size.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kaisa
from tests.support.settings import EVERY_STEP

SETTINGS = {**EVERY_STEP, "damping": 1e-13}
WIDTHS = (3, 4, 2)


class Affine(nn.Module):
    """A fixed invertible change of coordinates, with no parameters of its own."""

    def __init__(self, matrix: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.matrix, self.shift = matrix, shift

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix.T + self.shift

    def homogeneous(self) -> Tensor:
        top = torch.cat([self.matrix, self.shift[:, None]], dim=1)
        last = torch.zeros_like(top[:1])
        last[0, -1] = 1.0
        return torch.cat([top, last])


def random_affine(size: int) -> Affine:
    matrix = torch.eye(size) + 0.3 * torch.randn(size, size)
    return Affine(matrix.double(), torch.randn(size).double())


def plain_network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTHS[0], WIDTHS[1]), nn.Tanh(), nn.Linear(WIDTHS[1], WIDTHS[2])).double()


def in_other_coordinates(plain: nn.Sequential) -> nn.Sequential:
    """Return the same function, every Linear between two random affine changes."""
    modules: list[nn.Module] = []
    for module in plain:
        if not isinstance(module, nn.Linear):
            modules.append(module)
            continue
        before, after = random_affine(module.in_features), random_affine(module.out_features)
        modules += [before, moved(module, before, after), after]
    return nn.Sequential(*modules)


def moved(module: nn.Linear, before: Affine, after: Affine) -> nn.Linear:
    joined = torch.cat([module.weight, module.bias[:, None]], dim=1).detach()
    joined[:, -1] -= after.shift
    joined = torch.linalg.inv(after.matrix) @ joined @ torch.linalg.inv(before.homogeneous())
    copy = nn.Linear(module.in_features, module.out_features).double()
    with torch.no_grad():
        copy.weight.copy_(joined[:, :-1])
        copy.bias.copy_(joined[:, -1])
    return copy


def outputs_after_a_step(model: nn.Module, x: Tensor, y: Tensor, solver: str, steps: int = 1) -> Tensor:
    with kaisa.KFACPreconditioner(model, solver=solver, **SETTINGS) as kfac:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(steps):
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            kfac.step()
            optimizer.step()
    return model(x).detach()


@pytest.mark.parametrize("solver", ["eigen", "cholesky"])
def test_the_step_leads_to_the_same_function_in_any_coordinates(solver: str) -> None:
    plain = plain_network()
    other = in_other_coordinates(plain)
    x, y = torch.randn(30, WIDTHS[0]).double(), torch.randn(30, WIDTHS[2]).double()
    before = plain(x).detach()
    torch.testing.assert_close(other(x).detach(), before)
    expected = outputs_after_a_step(plain, x, y, solver)
    assert (expected - before).abs().max() > 0.01
    tolerance = {"eigen": 1e-6, "cholesky": 1e-4}[solver]  # the split damps by √λ
    torch.testing.assert_close(outputs_after_a_step(other, x, y, solver), expected, rtol=tolerance, atol=tolerance)


def test_three_steps_stay_in_agreement() -> None:
    plain = plain_network()
    other = in_other_coordinates(plain)
    x, y = torch.randn(30, WIDTHS[0]).double(), torch.randn(30, WIDTHS[2]).double()
    expected = outputs_after_a_step(plain, x, y, "eigen", steps=3)
    torch.testing.assert_close(outputs_after_a_step(other, x, y, "eigen", steps=3), expected, rtol=1e-5, atol=1e-6)


def test_gradient_descent_itself_does_depend_on_the_coordinates() -> None:
    plain = plain_network()
    other = in_other_coordinates(plain)
    x, y = torch.randn(30, WIDTHS[0]).double(), torch.randn(30, WIDTHS[2]).double()
    outputs = []
    for model in (plain, other):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        F.mse_loss(model(x), y).backward()
        optimizer.step()
        outputs.append(model(x).detach())
    assert (outputs[0] - outputs[1]).abs().max() > 0.01


def test_the_step_does_not_depend_on_the_basis_of_a_convolutions_channels() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    plain = plain.double()
    change = torch.linalg.qr(torch.randn(3, 3))[0].double() @ torch.diag(torch.tensor([1.0, 2, 0.5])).double()
    other = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    other = other.double()
    with torch.no_grad():
        inverse = torch.linalg.inv(change)
        other[0].weight.copy_(torch.einsum("ocij,cd->odij", plain[0].weight, inverse))
    x, y = torch.randn(40, 3, 5, 5).double(), torch.randn(40, 4).double()
    changed = torch.einsum("dc,bcij->bdij", change, x)
    torch.testing.assert_close(other(changed), plain(x))
    expected = outputs_after_a_step(plain, x, y, "eigen")
    torch.testing.assert_close(outputs_after_a_step(other, changed, y, "eigen"), expected, rtol=1e-6, atol=1e-6)
