"""Where theory says that K-FAC's block is the Fisher itself, it equals the dense Fisher.

Martens and Grosse 2015 (one example, linear models); Eschenhagen et al. 2023, arXiv 2311.00636
(expand where each position has its own loss, reduce where deep linear networks end in a mean over
positions).
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kaisa
from kaisa.kfac import EKFAC, Fisher
from tests.support.fisher import empirical_fisher, exact_fisher, per_example_gradients
from tests.support.kron import dense_block, split_solve, tikhonov_solve
from tests.support.settings import DAMPING, EVERY_STEP


def block_of(kfac: kaisa.KFACPreconditioner, name: str) -> Tensor:
    return dense_block(kfac.factors[name].a, kfac.factors[name].g)


def weights_of(model: nn.Module) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.ndim > 1]


def block_range(parameters: list[Tensor], index: int) -> slice:
    start = sum(parameter.numel() for parameter in parameters[:index])
    return slice(start, start + parameters[index].numel())


def exact_factors(model: nn.Module, x: Tensor, kind: str, **options) -> kaisa.KFACPreconditioner:
    """Return the preconditioner after a step under the exact Fisher; the loss is immaterial."""
    fisher = Fisher(kind, exact=True)
    kfac = kaisa.KFACPreconditioner(model, fisher=fisher, **{**EVERY_STEP, **options})
    outputs = model(x)
    kfac.sample_fisher(outputs)
    outputs.square().mean().backward()
    kfac.step()
    return kfac


def half_squared_error(output: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (output - target).square().sum() / len(output)


def test_linear_model_with_squared_error_has_the_gauss_newton_matrix_as_its_block() -> None:
    model = nn.Sequential(nn.Linear(4, 3, bias=False)).double()
    x = torch.randn(7, 4, dtype=torch.float64)
    kfac = exact_factors(model, x, "gaussian")
    dense = exact_fisher(model, x, weights_of(model), "gaussian")
    torch.testing.assert_close(block_of(kfac, "0"), dense)


def test_linear_model_with_a_bias_has_the_gauss_newton_matrix_as_its_block() -> None:
    model = nn.Sequential(nn.Linear(4, 3)).double()
    x = torch.randn(7, 4, dtype=torch.float64)
    kfac = exact_factors(model, x, "gaussian")
    ones = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
    joined = nn.Linear(5, 3, bias=False).double()
    dense = exact_fisher(joined, ones, [joined.weight], "gaussian")
    torch.testing.assert_close(block_of(kfac, "0"), dense)


def test_each_layer_of_a_deep_linear_model_has_its_own_gauss_newton_block() -> None:
    model = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(3))).double()
    x = torch.randn(6, 3, dtype=torch.float64)
    kfac = exact_factors(model, x, "gaussian")
    weights = weights_of(model)
    dense = exact_fisher(model, x, weights, "gaussian")
    for index in range(3):
        rows = block_range(weights, index)
        torch.testing.assert_close(block_of(kfac, str(index)), dense[rows, rows])


def test_one_example_has_its_own_dense_fisher() -> None:
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2, bias=False)).double()
    x, y = torch.randn(1, 3, dtype=torch.float64), torch.tensor([1])
    weights = weights_of(model)
    dense = empirical_fisher(per_example_gradients(model, x, y, F.cross_entropy, weights))
    kfac = kaisa.KFACPreconditioner(model, **EVERY_STEP)
    F.cross_entropy(model(x), y).backward()
    kfac.step()
    for index, name in enumerate(["0", "2"]):
        rows = block_range(weights, index)
        torch.testing.assert_close(block_of(kfac, name), dense[rows, rows])


@pytest.mark.parametrize("kind", ["categorical", "bernoulli"])
def test_one_example_has_its_own_exact_fisher_at_the_last_layer(kind: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3, bias=False)).double()
    x = torch.randn(1, 3, dtype=torch.float64)
    dense = exact_fisher(model, x, [model[2].weight], kind)
    kfac = exact_factors(model, x, kind)
    torch.testing.assert_close(block_of(kfac, "2"), dense)


class MeanPool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=1)


def test_reduce_is_exact_on_deep_linear_networks_with_a_mean_over_positions() -> None:
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 3, bias=False), MeanPool()).double()
    x = torch.randn(6, 5, 3, dtype=torch.float64)
    weights = weights_of(model)
    dense = exact_fisher(model, x, weights, "gaussian")
    kfac = exact_factors(model, x, "gaussian", sharing="reduce")
    for index in range(2):
        rows = block_range(weights, index)
        torch.testing.assert_close(block_of(kfac, str(index)), dense[rows, rows])


def test_reduce_is_exact_on_a_linear_convolution_with_mean_pooling() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    x = torch.randn(4, 2, 5, 5, dtype=torch.float64)
    dense = exact_fisher(model, x, weights_of(model), "gaussian")
    kfac = exact_factors(model, x, "gaussian", sharing="reduce")
    torch.testing.assert_close(block_of(kfac, "0"), dense)


def test_expand_is_exact_on_deep_linear_networks_with_a_loss_for_each_token() -> None:
    batch, tokens = 4, 5
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)).double()
    x = torch.randn(batch, tokens, 3, dtype=torch.float64)
    weights = weights_of(model)
    dense = exact_fisher(model, x, weights, "gaussian") / tokens  # of one term, not of one sequence
    kfac = exact_factors(model, x, "gaussian", loss_terms=batch * tokens)
    for index in range(2):
        rows = block_range(weights, index)
        torch.testing.assert_close(block_of(kfac, str(index)), dense[rows, rows])


def preconditioned(solver: str, model: nn.Module, x: Tensor, y: Tensor) -> kaisa.KFACPreconditioner:
    kfac = kaisa.KFACPreconditioner(model, solver=solver, **EVERY_STEP)
    F.cross_entropy(model(x), y).backward()
    kfac.step()
    return kfac


@pytest.mark.parametrize(("solver", "dense"), [("eigen", tikhonov_solve), ("cholesky", split_solve)])
def test_the_solver_is_the_dense_solve_that_its_damping_rule_says(solver: str, dense) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3, bias=False)).double()
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.randint(0, 3, (8,))
    raw = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    kfac = preconditioned(solver, model, x, y)
    joined = torch.cat([raw[0], raw[1][:, None]], dim=1)
    first, second = kfac.factors["0"], kfac.factors["2"]
    expected = dense(first.a, first.g, joined, DAMPING)
    torch.testing.assert_close(model[0].weight.grad, expected[:, :-1])
    torch.testing.assert_close(model[0].bias.grad, expected[:, -1])
    torch.testing.assert_close(model[2].weight.grad, dense(second.a, second.g, raw[2], DAMPING))


def test_damping_may_be_a_function_of_the_step() -> None:
    model = nn.Sequential(nn.Linear(3, 2, bias=False)).double()
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.randint(0, 2, (8,))
    options = {**EVERY_STEP, "damping": lambda step: 0.5 / (1 + step), "factor_decay": 0.0}
    kfac = kaisa.KFACPreconditioner(model, **options)
    for step in range(3):
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        raw = model[0].weight.grad.clone()
        kfac.step()
        pair = kfac.factors["0"]
        expected = tikhonov_solve(pair.a, pair.g, raw, 0.5 / (1 + step))
        torch.testing.assert_close(model[0].weight.grad, expected)


def test_the_first_average_is_the_factor_of_the_first_batch_and_the_second_a_weighted_mean() -> None:
    model = nn.Sequential(nn.Linear(3, 2, bias=False)).double()
    decay = 0.9
    kfac = kaisa.KFACPreconditioner(model, **{**EVERY_STEP, "factor_decay": decay})
    batches = [torch.randn(8, 3, dtype=torch.float64) for _ in range(3)]
    moments: list[Tensor] = []
    for count, x in enumerate(batches, start=1):
        model.zero_grad()
        F.cross_entropy(model(x), torch.zeros(8, dtype=torch.long)).backward()
        kfac.step()
        moments.append(x.T @ x / 8)
        weights = torch.tensor([decay ** (count - 1 - i) for i in range(count)]).double()
        expected = sum(w * m for w, m in zip(weights / weights.sum(), moments, strict=True))
        torch.testing.assert_close(kfac.factors["0"].a, expected)


def distances_from_fisher(model: nn.Module, x: Tensor, y: Tensor) -> list[tuple[float, float]]:
    """Return, layer by layer, how far EKFAC and K-FAC are from the empirical Fisher (Frobenius)."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    weights = [model.get_submodule(name).weight for name in names]
    dense = empirical_fisher(per_example_gradients(model, x, y, F.cross_entropy, weights))
    solver = EKFAC(per_example=True, decay=0.0)
    kfac = kaisa.KFACPreconditioner(model, solver=solver, **EVERY_STEP)
    for _ in range(2):  # the first step finds the basis in which the second takes its moments
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        raw = [weight.grad.clone() for weight in weights]
        kfac.step()
    distances = []
    for index, name in enumerate(names):
        block = dense[block_range(weights, index), block_range(weights, index)]
        pair = kfac.factors[name]
        basis_a, basis_g = torch.linalg.eigh(pair.a)[1], torch.linalg.eigh(pair.g)[1]
        basis = torch.kron(basis_g, basis_a)
        corrected = basis @ torch.diag(torch.diag(basis.T @ block @ basis)) @ basis.T
        identity = torch.eye(len(block), dtype=torch.float64)
        solved = torch.linalg.solve(corrected + DAMPING * identity, raw[index].reshape(-1))
        torch.testing.assert_close(weights[index].grad.reshape(-1), solved)
        distances.append(
            (
                torch.linalg.norm(block - corrected).item(),
                torch.linalg.norm(block - dense_block(pair.a, pair.g)).item(),
            )
        )
    return distances


@pytest.mark.parametrize("seed", range(5))
def test_per_example_ekfac_is_never_farther_from_the_fisher_than_kfac(seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 3, bias=False)).double()
    x, y = torch.randn(40, 3, dtype=torch.float64), torch.randint(0, 3, (40,))
    for ekfac, kfac in distances_from_fisher(model, x, y):
        assert ekfac < kfac


@pytest.mark.parametrize("kind", ["categorical", "gaussian", "bernoulli"])
def test_labels_drawn_from_the_prediction_have_the_exact_fisher_as_their_mean(kind: str) -> None:
    """The average over many draws is within five standard errors, element by element."""
    draws = 400
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3, bias=False)).double()
    x = torch.randn(20, 3, dtype=torch.float64)
    with exact_factors(model, x, kind) as exact:
        expected = {name: pair.g.clone() for name, pair in exact.factors.items()}
    options = {**EVERY_STEP, "factor_decay": 0.0, "inv_update_steps": 10**9, "fisher": kind}
    kfac = kaisa.KFACPreconditioner(model, **options)
    drawn: dict[str, list[Tensor]] = {name: [] for name in expected}
    for _ in range(draws):
        outputs = model(x)
        kfac.sample_fisher(outputs)
        outputs.square().mean().backward()
        kfac.step()
        for name, pair in kfac.factors.items():
            drawn[name].append(pair.g.clone())
    for name, g in expected.items():
        values = torch.stack(drawn[name])
        error = (values.mean(dim=0) - g).abs()
        assert (error <= 5 * values.std(dim=0) / draws**0.5).all(), name


def test_sampling_leaves_the_gradients_of_the_loss_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3, bias=False)).double()
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.randint(0, 3, (8,))
    raw = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    kfac = kaisa.KFACPreconditioner(model, fisher="categorical", **EVERY_STEP)
    outputs = model(x)
    kfac.sample_fisher(outputs)
    F.cross_entropy(outputs, y).backward()
    for parameter, gradient in zip(model.parameters(), raw, strict=True):
        assert torch.equal(parameter.grad, gradient)


@pytest.mark.parametrize("exact", [True, False])
def test_the_blocks_of_a_normalisation_layer_are_the_dense_fisher_of_all_labels(exact: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3)).double()
    x = torch.randn(6, 4).double()
    fisher = kaisa.kfac.Fisher("categorical", exact=exact)
    with kaisa.KFACPreconditioner(net, kl_clip=None, fisher=fisher, factor_decay=0.0, factor_update_steps=1) as kfac:
        found = torch.zeros(4, 2, 2, dtype=torch.float64)
        draws = 1 if exact else 400
        for _ in range(draws):
            net.zero_grad()
            outputs = net(x)
            kfac.sample_fisher(outputs)
            outputs.sum().backward()
            kfac.step()
            found += kfac.factors["0"].a / draws
    expected = torch.zeros(4, 2, 2, dtype=torch.float64)
    for example in x:
        z = net(example)
        p = z.softmax(0).detach()
        for label in range(3):
            gradients = torch.autograd.grad(-z.log_softmax(0)[label], list(net[0].parameters()), retain_graph=True)
            pairs = torch.stack(gradients, 1)
            expected += p[label] * pairs[:, :, None] * pairs[:, None, :] / len(x)
    torch.testing.assert_close(found, expected, rtol=1e-9 if exact else 0.15, atol=1e-12 if exact else 0.01)
