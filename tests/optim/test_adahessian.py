"""AdaHessian against golden values, dense Hessians and published identities."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product as combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kaisa.errors import ConfigurationError
from kaisa.optim import AdaHessian

CASES = json.loads((Path(__file__).parent / "golden" / "adahessian.json").read_text())["cases"]
A = torch.tensor([[4, 1, 0.5, 0], [1, 3, 0, 0.25], [0.5, 0, 2, -0.5], [0, 0.25, -0.5, 1]], dtype=torch.float64)
B = torch.tensor([1, -2, 0.5, 3], dtype=torch.float64)

Parameters = list[Tensor]


def waves(*shape: int) -> Tensor:
    return torch.sin(0.37 * torch.arange(torch.Size(shape).numel(), dtype=torch.float64)).view(shape)


def quad4(parameters: Parameters) -> Tensor:
    (w,) = parameters
    return 0.5 * w @ A @ w - B @ w + 0.05 * (w**4).sum()


def convnet(parameters: Parameters) -> Tensor:
    weight, bias, weight2, bias2 = parameters
    hidden = torch.tanh(F.conv2d(waves(4, 1, 4, 4), weight, bias)).flatten(1)
    return F.cross_entropy(F.linear(hidden, weight2, bias2), torch.tensor([0, 1, 2, 1]))


def mlp(parameters: Parameters) -> Tensor:
    weight, bias, weight2, bias2 = parameters
    hidden = torch.tanh(F.linear(waves(5, 4), weight, bias))
    return F.cross_entropy(F.linear(hidden, weight2, bias2), torch.tensor([0, 1, 2, 1, 0]))


def conv1d(parameters: Parameters) -> Tensor:
    weight, bias, weight2 = parameters
    hidden = torch.tanh(F.conv1d(waves(4, 1, 6), weight, bias)).flatten(1)
    return F.cross_entropy(F.linear(hidden, weight2), torch.tensor([0, 1, 2, 1]))


LOSSES: dict[str, Callable[[Parameters], Tensor]] = {
    "quad4": quad4,
    "convnet": convnet,
    "mlp": mlp,
    "conv1d": conv1d,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "ic_quad_default": {"averaging": {2: None}},
    "ic_quad_hp05_wd": {"averaging": {2: None}},
    "ic_conv_default": {"averaging": {2: None}},
    "ins_conv_blocks_default": {},
    "ins_conv1d_default": {},
    "fairseq_mlp_block4": {"averaging": 4},
    "davda54_conv_update_each2": {"averaging": {2: None}, "update_period": 2, "between": "repeat"},
}


def tensors(values: list[Any]) -> list[Tensor]:
    return [torch.tensor(value, dtype=torch.float64) for value in values]


def trained(values: list[Any]) -> Parameters:
    return [tensor.requires_grad_() for tensor in tensors(values)]


def quadratic(w: Tensor) -> Tensor:
    return 0.5 * w @ A @ w


def curvature_after(loss: Tensor, w: Tensor, z: Tensor | None = None, **options: Any) -> Tensor:
    """Return the D that one step took in."""
    optimizer = AdaHessian([w], lr=0.0, betas=(0.0, 0.0), **options)
    optimizer.backward(loss)
    optimizer.step(probes=None if z is None else [z])
    return optimizer.state[w]["exp_hessian_diag_sq"].sqrt()


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("way", ["backward", "create_graph"])
@pytest.mark.parametrize("name", CASES)
def test_every_step_is_that_of_the_original(name: str, way: str, foreach: bool) -> None:
    case = CASES[name]
    tolerance = 1e-6 if name.startswith("fairseq") else 1e-12
    hyper = case["hyper"]
    parameters, loss = trained(case["init"]), LOSSES[case["problem"]]
    shared = {key: hyper[key] for key in ("lr", "eps", "weight_decay", "hessian_power")}
    optimizer = AdaHessian(parameters, betas=tuple(hyper["betas"]), foreach=foreach, **shared, **OPTIONS[name])
    for number, expected in enumerate(case["steps"]):
        value = loss(parameters)
        torch.testing.assert_close(value.item(), expected["loss"], rtol=tolerance, atol=tolerance)
        if way == "backward":
            optimizer.backward(value)
        else:
            grads = torch.autograd.grad(value, parameters, create_graph=True)
            for parameter, gradient in zip(parameters, grads, strict=True):
                parameter.grad = gradient
        due = expected["z"] is not None and optimizer.hessian_due
        assert due == (number % optimizer.update_period == 0)
        optimizer.step(probes=tensors(expected["z"]) if due else None)
        optimizer.zero_grad()
        for key, state in (("exp_avg", "exp_avg"), ("exp_hessian_diag_sq", "exp_hessian_diag_sq"), ("param", None)):
            for parameter, wanted in zip(parameters, tensors(expected[key]), strict=True):
                actual = parameter.detach() if state is None else optimizer.state[parameter][state]
                torch.testing.assert_close(actual.expand_as(wanted), wanted, rtol=tolerance, atol=tolerance)
    final = loss(parameters).item()
    torch.testing.assert_close(final, case["final_loss"], rtol=tolerance, atol=tolerance)


def test_the_second_moment_is_that_of_rows_not_of_the_diagonal() -> None:
    w = torch.ones(4, dtype=torch.float64, requires_grad=True)
    signs = [torch.tensor(z, dtype=torch.float64) for z in combinations((-1.0, 1.0), repeat=4)]
    absolute = torch.stack([curvature_after(quadratic(w), w, z) for z in signs])
    torch.testing.assert_close((absolute**2).mean(0), (A**2).sum(1))
    torch.testing.assert_close(absolute.mean(0), torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_the_mean_square_over_drawn_probes_is_the_norm_of_rows(distribution: str) -> None:
    w = torch.ones(4, dtype=torch.float64, requires_grad=True)
    optimizer = AdaHessian([w], lr=0.0, distribution=distribution, betas=(0.0, 0.0))
    total = torch.zeros(4, dtype=torch.float64)
    for _ in range(1000):
        optimizer.backward(quadratic(w))
        optimizer.step()
        total += optimizer.state[w]["exp_hessian_diag_sq"] / 1000
        optimizer.zero_grad()
    torch.testing.assert_close(total, (A**2).sum(1), rtol=0.1, atol=0)


def test_signed_samples_cancel_what_is_beside_the_diagonal() -> None:
    w = torch.ones(4, dtype=torch.float64, requires_grad=True)
    found = curvature_after(quadratic(w), w, surrogate="signed", num_samples=2000)
    torch.testing.assert_close(found, A.diag(), rtol=0.05, atol=0.02)


def test_all_sixteen_signed_samples_give_the_diagonal_exactly() -> None:
    w = torch.ones(4, dtype=torch.float64, requires_grad=True)
    optimizer = AdaHessian([w], lr=0.0, betas=(0.0, 0.0), surrogate="signed", num_samples=16)
    optimizer.backward(quadratic(w))
    optimizer.step(probes=[torch.tensor(z, dtype=torch.float64) for z in combinations((-1.0, 1.0), repeat=4)])
    torch.testing.assert_close(optimizer.state[w]["exp_hessian_diag_sq"].sqrt(), A.diag())


def test_absolute_samples_are_averaged_after_the_absolute_value() -> None:
    w = torch.ones(4, dtype=torch.float64, requires_grad=True)
    zs = torch.tensor([[1, 1, 1, -1], [1, -1, -1, 1]], dtype=torch.float64)
    optimizer = AdaHessian([w], lr=0.0, betas=(0.0, 0.0), num_samples=2)
    optimizer.backward(quadratic(w))
    optimizer.step(probes=list(zs))
    expected = (zs @ A).abs().mean(0)
    torch.testing.assert_close(optimizer.state[w]["exp_hessian_diag_sq"].sqrt(), expected)


def test_blocks_between_parameters_are_in_the_product() -> None:
    x, y = (torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in (1.0, 2.0))
    optimizer = AdaHessian([x, y], lr=0.0, betas=(0.0, 0.0))
    optimizer.backward((x * y * 3 + x**2).sum())
    optimizer.step(probes=[torch.ones(1, dtype=torch.float64)] * 2)
    assert [optimizer.state[p]["exp_hessian_diag_sq"].sqrt().item() for p in (x, y)] == pytest.approx([5.0, 3.0])


def test_the_mean_over_a_kernel_is_that_of_its_diagonal() -> None:
    base = torch.cos(0.5 * torch.arange(81, dtype=torch.float64)).view(9, 9)
    b = (base + base.T) / 2 + 3 * torch.eye(9, dtype=torch.float64)
    w = torch.ones(1, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    found = curvature_after(0.5 * w.flatten() @ b @ w.flatten(), w, surrogate="signed", num_samples=4000)
    torch.testing.assert_close(
        found, torch.full((1, 1, 1, 1), 2.963089866705404, dtype=torch.float64), rtol=0.03, atol=0
    )


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_newton_like_steps_do_not_depend_on_the_scale_of_the_loss(scale: float) -> None:
    def end(factor: float) -> Tensor:
        w = torch.tensor([0.5, -1.0, 2.0, 1.5], dtype=torch.float64, requires_grad=True)
        optimizer = AdaHessian([w], eps=0.0)
        for _ in range(5):
            optimizer.backward(factor * quad4([w]))
            optimizer.step()
            optimizer.zero_grad()
        return w.detach()

    torch.testing.assert_close(end(scale), end(1.0), rtol=1e-10, atol=0)


def test_half_the_power_scales_the_step_with_the_root_of_the_loss() -> None:
    def move(factor: float) -> Tensor:
        w = torch.ones(4, dtype=torch.float64, requires_grad=True)
        optimizer = AdaHessian([w], eps=0.0, hessian_power=0.5)
        optimizer.backward(factor * quad4([w]))
        optimizer.step()
        return 1 - w.detach()

    torch.testing.assert_close(move(9.0), 3 * move(1.0))


def test_power_zero_is_momentum_sgd() -> None:
    ours, theirs = (torch.tensor([0.5, -1.0, 2.0, 1.5], dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimizer = AdaHessian([ours], lr=0.02, betas=(0.9, 0.999), eps=1e-4, hessian_power=0.0)
    momentum = torch.zeros(4, dtype=torch.float64)
    for step in range(1, 8):
        optimizer.backward(quad4([ours]))
        optimizer.step()
        optimizer.zero_grad()
        (gradient,) = torch.autograd.grad(quad4([theirs]), [theirs])
        momentum = 0.9 * momentum + 0.1 * gradient
        with torch.no_grad():
            theirs -= 0.02 / (1 + 1e-4) * momentum / (1 - 0.9**step)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("shape", "window"),
    [((), ()), ((6,), ()), ((4, 6), (1,)), ((4, 2, 6), (2,)), ((2, 2, 3, 2), (2, 3)), ((2, 1, 3, 2, 2), (2, 3, 4))],
)
def test_every_kind_of_tensor_is_averaged_over_what_plays_the_same_part(
    shape: tuple[int, ...], window: tuple[int, ...]
) -> None:
    w = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    found = curvature_after((w**4).sum(), w, torch.ones(shape, dtype=torch.float64))
    exact = 12 * w.detach() ** 2
    torch.testing.assert_close(found, exact.mean(window, keepdim=True) if window else exact)


def test_runs_are_averaged_in_row_major_order_whatever_the_layout_in_memory() -> None:
    w = torch.randn(2, 6, 2, 3, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()
    found = curvature_after((w**4).sum(), w, torch.ones_like(w), averaging=4)
    expected = (12 * w.detach() ** 2).reshape(-1, 4).mean(1).repeat_interleave(4).view(w.shape)
    torch.testing.assert_close(found, expected)


def test_a_function_may_average_and_mappings_choose_by_dimensions() -> None:
    w = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    exact = 12 * w.detach() ** 2
    probes = torch.ones_like(w)
    columns = curvature_after((w**4).sum(), w, probes, averaging={2: lambda d: d.mean(0, keepdim=True)})
    torch.testing.assert_close(columns, exact.mean(0, keepdim=True))
    torch.testing.assert_close(curvature_after((w**4).sum(), w, probes, averaging=None), exact)


def test_averages_that_cannot_be_are_refused_before_anything_changes() -> None:
    model = nn.Linear(5, 3)
    with pytest.raises(ConfigurationError, match="runs of 4 does not divide the 15 elements"):
        AdaHessian(model.parameters(), averaging=4)
    with pytest.raises(ConfigurationError, match="up to 5 dimensions"):
        AdaHessian([torch.zeros(1, 1, 1, 1, 1, 1, requires_grad=True)])
    optimizer = AdaHessian([model.weight], averaging=lambda d: d.new_zeros(7))
    optimizer.backward(model(torch.ones(1, 5)).square().sum())
    with pytest.raises(ConfigurationError, match=r"returned the shape \(7,\)"):
        optimizer.step()
    optimizer = AdaHessian([model.weight])
    with pytest.raises(ConfigurationError, match="'rows' for parameters of 1 dimensions"):
        optimizer.add_param_group({"params": [model.bias], "averaging": "rows"})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0"),
        ({"eps": -1e-4}, "eps is"),
        ({"betas": (1.0, 0.9)}, "first of betas is 1.0"),
        ({"betas": (0.9,)}, "give two numbers"),
        ({"hessian_power": 1.5}, "hessian_power is 1.5"),
        ({"update_period": 0}, "update_period is 0"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"distribution": "uniform"}, "give 'rademacher' or 'gaussian'"),
        ({"surrogate": "square"}, "give 'abs' or 'signed'"),
        ({"between": "forget"}, "give 'hold' or 'repeat'"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        AdaHessian([torch.zeros(1, requires_grad=True)], **options)


def test_a_late_hessian_has_a_bias_correction_of_its_own() -> None:
    """V holds between updates, so √v̂ is the mean square of those D that were seen, from the first on."""
    w = torch.ones(4, dtype=torch.float64, requires_grad=True)
    optimizer = AdaHessian([w], lr=0.1, betas=(0.0, 0.999), eps=0.0, update_period=3)
    seen = []
    for step in range(7):
        assert optimizer.hessian_due == (step % 3 == 0)
        before = w.detach().clone()
        (gradient,) = torch.autograd.grad(loss := quadratic(w), [w], retain_graph=True)
        optimizer.backward(loss)
        if optimizer.hessian_due:
            z = torch.tensor([1, 1, 1, -1 if step else 1], dtype=torch.float64)
            seen.append((A @ z).abs())
            optimizer.step(probes=[z])
        else:
            optimizer.step()
        optimizer.zero_grad()
        weights = torch.tensor([0.999 ** (len(seen) - 1 - i) for i in range(len(seen))], dtype=torch.float64)
        mean = (weights[:, None] * torch.stack(seen) ** 2).sum(0) / weights.sum()
        torch.testing.assert_close(before - w.detach(), 0.1 * gradient / mean.sqrt(), rtol=1e-9, atol=0)
    assert optimizer.state[w]["hessian_updates"] == 3
