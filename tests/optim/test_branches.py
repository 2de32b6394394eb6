"""Differences of gradients through piecewise functions, held against second derivatives in closed form.

y = act(x w) held to its pieces is linear in w and ½ Σ c y² quadratic, so that differences are exact at any distance.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kaisa.errors import StateError
from kaisa.optim import AdaHessian

DOUBLE = torch.float64
Function = Callable[[Tensor], Tensor]


def images(y: Tensor) -> Tensor:
    return y.view(2, 1, 8, 6)


def volumes(y: Tensor) -> Tensor:
    return y.view(1, 2, 4, 4, 3)


# what is called, and the same as autograd differentiates it twice, where that is something else
ACTIVATIONS: dict[str, tuple[Function, Function | None]] = {
    "relu": (F.relu, None),
    "torch.relu": (torch.relu, None),
    "Tensor.relu": (lambda y: y.relu(), None),
    "ReLU": (nn.ReLU(), None),
    "ReLU in place": (lambda y: nn.ReLU(inplace=True)(y + 0), None),
    "relu_ alone": (lambda y: [y := y + 0, y.relu_()][0], None),
    "leaky_relu": (F.leaky_relu, None),
    "LeakyReLU in place": (lambda y: nn.LeakyReLU(0.3, inplace=True)(y + 0), None),
    "relu6": (lambda y: F.relu6(8 * y), None),
    "hardtanh": (nn.Hardtanh(-0.5, 0.7), None),
    "hardsigmoid": (lambda y: F.hardsigmoid(4 * y), lambda y: F.relu6(4 * y + 3) / 6),
    "threshold": (lambda y: F.threshold(y, 0.2, 0.1), None),
    "softshrink": (lambda y: F.softshrink(y, 0.2), None),
    "hardshrink": (lambda y: F.hardshrink(y, 0.2), None),
    "clamp": (lambda y: torch.clamp(y, -0.3, 0.4), None),
    "Tensor.clamp": (lambda y: y.clamp(min=-0.3), None),
    "clamp_": (lambda y: (y + 0).clamp_(-0.2, 0.5), None),
    "abs": (abs, None),
    "abs_": (lambda y: (y + 0).abs_(), None),
    "maximum": (lambda y: torch.maximum(y, 0.5 * y.flip(0)), None),
    "minimum with ties": (lambda y: F.relu(y).minimum(F.relu(2 * y)), None),
    "max_pool1d": (lambda y: F.max_pool1d(y.unsqueeze(1), 3, 2), None),
    "max_pool2d": (lambda y: F.max_pool2d(images(y), 2), None),
    "MaxPool2d with padding": (lambda y: nn.MaxPool2d(3, 2, 1)(images(y)), None),
    "MaxPool2d with indices": (lambda y: nn.MaxPool2d(2, return_indices=True)(images(y))[0], None),
    "max_pool3d": (lambda y: F.max_pool3d(volumes(y), 2), None),
    "adaptive_max_pool2d": (lambda y: F.adaptive_max_pool2d(images(y), 2), None),
}


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(16, 3, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)


@pytest.fixture
def weight() -> nn.Parameter:
    return nn.Parameter(torch.randn(3, 6, generator=torch.Generator().manual_seed(1), dtype=DOUBLE))


def energy(y: Tensor) -> Tensor:
    scales = torch.linspace(1, 2, y.numel(), dtype=y.dtype).view_as(y)
    return (scales * y * y).sum() / 2


def products(weight: nn.Parameter, probe: Tensor, loss: Callable[[], Tensor]) -> Tensor:
    """Return |Hz| by second derivatives."""
    (gradient,) = torch.autograd.grad(loss(), weight, create_graph=True)
    return torch.autograd.grad(gradient, weight, probe)[0].abs()


def differences(weight: nn.Parameter, probe: Tensor, loss: Callable[[], Tensor], distance: float) -> Tensor:
    """Return |Hz| by differences of gradients."""
    optimizer = AdaHessian([weight], betas=(0.0, 0.0), averaging=None, lr=0.0)
    optimizer.backward_by_difference(loss, probes=[probe], distance=distance)
    optimizer.step()
    squares: Tensor = optimizer.state[weight]["exp_hessian_diag_sq"]
    return squares.sqrt()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_functions_are_held_to_their_pieces(name: str, inputs: Tensor, weight: nn.Parameter) -> None:
    act, written_out = ACTIVATIONS[name]
    probe = torch.ones_like(weight).bernoulli_(generator=torch.Generator().manual_seed(2)) * 2 - 1
    expected = products(weight, probe, lambda: energy((written_out or act)(inputs @ weight)))
    found = differences(weight, probe, lambda: energy(act(inputs @ weight)), distance=0.3)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)  # torch rounds hardsigmoid's 1/6 to 32 bits


@pytest.mark.parametrize("is_in_place", [False, True])
def test_hard_swish_is_held_to_its_pieces(is_in_place: bool, inputs: Tensor, weight: nn.Parameter) -> None:
    probe = torch.ones_like(weight)
    act = nn.Hardswish(inplace=is_in_place)
    expected = products(weight, probe, lambda: energy(4 * (y := inputs @ weight) * F.relu6(4 * y + 3) / 6))
    found = differences(weight, probe, lambda: energy(act(4 * (inputs @ weight))), distance=1e-7)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_what_needs_no_gradient_is_left_alone(inputs: Tensor, weight: nn.Parameter) -> None:
    """Not even remembered, so that it may differ from call to call."""
    calls = itertools.count()

    def loss() -> Tensor:
        data = F.relu(inputs) if next(calls) else torch.relu(inputs + 0)
        with torch.no_grad():
            [F.relu(weight) for _ in range(next(calls))]
        return energy(data @ weight)

    expected = products(weight, torch.ones_like(weight), lambda: energy(F.relu(inputs) @ weight))
    torch.testing.assert_close(differences(weight, torch.ones_like(weight), loss, 0.3), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (lambda y: F.relu(y), lambda y: y),
        (lambda y: F.relu(y), lambda y: y.abs()),
        (lambda y: F.relu(y), lambda y: F.relu(y[:4])),
    ],
)
def test_other_operations_in_the_second_pass_are_refused(
    first: Function, second: Function, inputs: Tensor, weight: nn.Parameter
) -> None:
    acts = iter([first, second])
    before = weight.detach().clone()
    with pytest.raises(StateError, match="did not make the same operations again"):
        AdaHessian([weight]).backward_by_difference(lambda: energy(next(acts)(inputs @ weight)))
    assert torch.equal(weight.detach(), before)


def residual_network() -> nn.Module:
    torch.manual_seed(3)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    return nn.Sequential(
        *layers, nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-2), (DOUBLE, 1e-6)])
def test_networks_with_rectifiers_pools_and_normalisation_have_their_second_derivatives(
    dtype: torch.dtype, tolerance: float
) -> None:
    x = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(4), dtype=DOUBLE)
    labels = torch.arange(16) % 4
    found: list[Tensor] = []
    for kind in (DOUBLE, dtype):
        model = residual_network().to(kind)
        optimizer = AdaHessian(model.parameters(), betas=(0.0, 0.0))
        probes = [
            torch.ones_like(p).bernoulli_(generator=torch.Generator().manual_seed(5)) * 2 - 1
            for p in model.parameters()
        ]

        def loss(model: nn.Module = model, kind: torch.dtype = kind) -> Tensor:
            return F.cross_entropy(model(x.to(kind)), labels)

        if found:
            optimizer.backward_by_difference(loss, probes=probes)
            optimizer.step()
        else:
            optimizer.backward(loss())
            optimizer.step(probes=probes)
        roots = [optimizer.state[p]["exp_hessian_diag_sq"].sqrt().flatten().double() for p in model.parameters()]
        found.append(torch.cat(roots))
    assert (found[1] - found[0]).norm() < tolerance * found[0].norm()
