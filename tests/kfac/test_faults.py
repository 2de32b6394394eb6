"""A fault is contained (law 8): it reaches no factor, and a bad option is refused at once."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kaisa
from kaisa.errors import ConfigurationError, DecompositionError
from kaisa.kfac import Eigen
from tests.support.kron import tikhonov_solve
from tests.support.settings import DAMPING, EVERY_STEP

SOLVERS = ["eigen", "cholesky", "ekfac", "sqrt_ekfac"]
BAD = [math.nan, math.inf, -math.inf]


@pytest.fixture
def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def one_step(model: nn.Module, kfac: kaisa.KFACPreconditioner, *, batch: int = 6, factor: float = 1.0) -> Tensor:
    """Take one step on fresh data, the loss multiplied by `factor`."""
    model.zero_grad()
    dtype = next(model.parameters()).dtype
    x, y = torch.randn(batch, 3, dtype=dtype), torch.randint(0, 2, (batch,))
    loss = factor * F.cross_entropy(model(x), y)
    loss.backward()
    kfac.step()
    return loss.detach()


def all_factors(kfac: kaisa.KFACPreconditioner) -> list[Tensor]:
    return [factor.clone() for pair in kfac.factors.values() for factor in pair]


def all_finite(tensors: list[Tensor]) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def gradients_of(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_loss_that_is_not_finite_leaves_the_factors_as_they_were(
    model: nn.Sequential, solver: str, bad: float
) -> None:
    kfac = kaisa.KFACPreconditioner(model, solver=solver, **EVERY_STEP)
    one_step(model, kfac)
    before = all_factors(kfac)
    one_step(model, kfac, factor=bad)
    for found, expected in zip(all_factors(kfac), before, strict=True):
        assert torch.equal(found, expected)
    one_step(model, kfac)
    assert all_finite(all_factors(kfac))
    assert all_finite(gradients_of(model))
    assert not torch.equal(all_factors(kfac)[0], before[0])


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("bad", BAD)
def test_a_first_loss_that_is_not_finite_is_as_if_it_had_never_been(
    model: nn.Sequential, solver: str, bad: float
) -> None:
    kfac = kaisa.KFACPreconditioner(model, solver=solver, **EVERY_STEP)
    one_step(model, kfac, factor=bad)
    torch.manual_seed(5)
    one_step(model, kfac)
    found = all_factors(kfac) + gradients_of(model)
    kfac.close()
    with kaisa.KFACPreconditioner(model, solver=solver, **EVERY_STEP) as fresh:
        torch.manual_seed(5)
        one_step(model, fresh)
        expected = all_factors(fresh) + gradients_of(model)
    torch.testing.assert_close(found, expected)


def test_after_a_first_loss_that_is_not_finite_no_step_is_as_long_as_the_damping_allows(
    model: nn.Sequential,
) -> None:
    """Factors that nothing has reached yet must not be inverted for a hundred steps."""
    kfac = kaisa.KFACPreconditioner(model, **{**EVERY_STEP, "inv_update_steps": 100})
    one_step(model, kfac, factor=math.nan)
    torch.manual_seed(5)
    one_step(model, kfac)
    found = gradients_of(model)
    kfac.close()
    with kaisa.KFACPreconditioner(model, **{**EVERY_STEP, "inv_update_steps": 100}) as fresh:
        torch.manual_seed(5)
        one_step(model, fresh)
    torch.testing.assert_close(found, gradients_of(model))


def test_an_input_that_is_not_finite_leaves_the_factors_as_they_were(model: nn.Sequential) -> None:
    kfac = kaisa.KFACPreconditioner(model, **EVERY_STEP)
    one_step(model, kfac)
    before = all_factors(kfac)
    model.zero_grad()
    x = torch.randn(6, 3)
    x[0, 0] = math.nan
    F.cross_entropy(model(x), torch.zeros(6, dtype=torch.long)).backward()
    kfac.step()
    for found, expected in zip(all_factors(kfac), before, strict=True):
        assert torch.equal(found, expected)


def test_one_bad_micro_batch_keeps_its_step_out_of_the_factors(model: nn.Sequential) -> None:
    kfac = kaisa.KFACPreconditioner(model, **{**EVERY_STEP, "accumulation_steps": 2})
    x, y = torch.randn(6, 3), torch.randint(0, 2, (6,))
    for factor in (1.0, math.nan):
        (factor * F.cross_entropy(model(x), y) / 2).backward()
    kfac.step()
    model.zero_grad()
    for _ in range(2):
        (F.cross_entropy(model(x), y) / 2).backward()
    kfac.step()
    assert all_finite(all_factors(kfac))
    assert all_finite(gradients_of(model))


def test_an_overflow_under_a_grad_scaler_skips_the_step_and_keeps_the_factors(
    model: nn.Sequential,
) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    options = {**EVERY_STEP, "lr": None, "kl_clip": 0.001}
    kfac = kaisa.KFACPreconditioner(model, optimizer, grad_scaler=scaler, **options)
    x, y = torch.randn(6, 3), torch.randint(0, 2, (6,))

    def training_step(factor: float) -> None:
        optimizer.zero_grad()
        scaler.scale(factor * F.cross_entropy(model(x), y)).backward()
        scaler.unscale_(optimizer)
        kfac.step()
        scaler.step(optimizer)
        scaler.update()

    training_step(1.0)
    factors, weights = all_factors(kfac), [p.detach().clone() for p in model.parameters()]
    training_step(1e38)  # overflows as fp16 gradients do
    for found, expected in zip(all_factors(kfac), factors, strict=True):
        assert torch.equal(found, expected)
    for parameter, expected in zip(model.parameters(), weights, strict=True):
        assert torch.equal(parameter, expected)
    assert scaler.get_scale() == 2.0**9
    training_step(1.0)
    assert all_finite(all_factors(kfac))
    assert all(not torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    assert all_finite(list(model.parameters()))


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_batch_of_one_has_singular_factors_and_a_finite_step(model: nn.Sequential, solver: str) -> None:
    kfac = kaisa.KFACPreconditioner(model, solver=solver, **EVERY_STEP)
    for _ in range(3):
        one_step(model, kfac, batch=1)
    assert all_finite(gradients_of(model))


@pytest.mark.parametrize("solver", SOLVERS)
def test_factors_that_are_zero_are_no_fault(model: nn.Sequential, solver: str) -> None:
    kfac = kaisa.KFACPreconditioner(model, solver=solver, **EVERY_STEP)
    (model(torch.zeros(4, 3)) * 0.0).sum().backward()
    kfac.step()
    for gradient in gradients_of(model):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_dead_input_gives_a_finite_step(solver: str) -> None:
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    kfac = kaisa.KFACPreconditioner(model, solver=solver, **EVERY_STEP)
    x = torch.randn(5, 3)
    x[:, 1] = 0.0
    F.cross_entropy(model(x), torch.zeros(5, dtype=torch.long)).backward()
    kfac.step()
    assert all_finite(gradients_of(model))
    assert torch.equal(model[0].weight.grad[:, 1], torch.zeros(2))


@pytest.mark.parametrize("solver", ["eigen", "cholesky"])
def test_a_factor_made_indefinite_by_hand_gives_a_descent_direction(solver: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4, bias=False)).double()
    kfac = kaisa.KFACPreconditioner(
        model, solver=solver, **{**EVERY_STEP, "factor_update_steps": 10**6, "patience": 100}
    )
    one_step(model, kfac)
    kfac.factors["0"].a.sub_(0.05 * torch.eye(3).double() + kfac.factors["0"].a.diag().diag() * 0.9)
    assert torch.linalg.eigvalsh(kfac.factors["0"].a).min() < 0
    model.zero_grad()
    x, y = torch.randn(6, 3).double(), torch.randint(0, 2, (6,))
    F.cross_entropy(model(x), y).backward()
    raw = model[0].weight.grad.clone()
    kfac.step()
    found = model[0].weight.grad
    assert torch.isfinite(found).all()
    assert (found * raw).sum() > 0


def test_negative_eigenvalues_count_as_zero() -> None:
    model = nn.Sequential(nn.Linear(3, 4, bias=False)).double()
    kfac = kaisa.KFACPreconditioner(model, **{**EVERY_STEP, "factor_update_steps": 10**6})
    one_step(model, kfac)
    a, g = kfac.factors["0"]
    values, vectors = torch.linalg.eigh(a)
    values[0] = -0.5
    a.copy_(vectors @ values.diag() @ vectors.T)
    clamped = vectors @ values.clamp(min=0).diag() @ vectors.T
    model.zero_grad()
    F.cross_entropy(model(torch.randn(6, 3).double()), torch.randint(0, 2, (6,))).backward()
    raw = model[0].weight.grad.clone()
    kfac.step()
    torch.testing.assert_close(model[0].weight.grad, tikhonov_solve(clamped, g, raw, DAMPING))


class Failing:
    """Stands in for a decomposition and fails while told to."""

    def __init__(self, real: Callable[..., object]) -> None:
        self.real, self.fails, self.calls = real, False, 0

    def __call__(self, *args: object, **kwargs: object) -> object:
        self.calls += 1
        if self.fails:
            raise torch.linalg.LinAlgError("linalg.eigh: the algorithm failed to converge")
        return self.real(*args, **kwargs)


@pytest.fixture
def eigh(monkeypatch: pytest.MonkeyPatch) -> Failing:
    failing = Failing(torch.linalg.eigh)
    monkeypatch.setattr(torch.linalg, "eigh", failing)
    return failing


def test_a_failed_decomposition_is_tried_again_with_jitter_and_in_double(
    model: nn.Sequential, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, dtypes = torch.linalg.eigh, []

    def only_double(matrix: Tensor) -> object:
        dtypes.append(matrix.dtype)
        if matrix.dtype != torch.float64:
            raise torch.linalg.LinAlgError("linalg.eigh: the algorithm failed to converge")
        return real(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", only_double)
    solver = Eigen(precision=torch.float32)
    options = {**EVERY_STEP, "factor_dtype": torch.float32, "inv_dtype": torch.float32, "solver": solver}
    kfac = kaisa.KFACPreconditioner(model, **options)
    one_step(model, kfac)
    assert all_finite(gradients_of(model))
    assert dtypes.count(torch.float32) > dtypes.count(torch.float64) > 0


def test_while_decompositions_fail_the_last_good_one_stays(model: nn.Sequential, eigh: Failing) -> None:
    model = model.double()
    kfac = kaisa.KFACPreconditioner(model, **{**EVERY_STEP, "patience": 3})
    one_step(model, kfac)
    pairs = {name: [factor.clone() for factor in pair] for name, pair in kfac.factors.items()}
    eigh.fails = True
    for _ in range(2):
        model.zero_grad()
        x, y = torch.randn(6, 3).double(), torch.randint(0, 2, (6,))
        F.cross_entropy(model(x), y).backward()
        raw = torch.cat([model[0].weight.grad, model[0].bias.grad[:, None]], dim=1)
        kfac.step()
        solved = tikhonov_solve(*pairs["0"], raw, DAMPING)
        torch.testing.assert_close(model[0].weight.grad, solved[:, :-1])
    eigh.fails = False
    one_step(model, kfac)
    eigh.fails = True
    for _ in range(2):  # a success in between resets the count
        one_step(model, kfac)


def test_after_too_many_failures_in_a_row_an_error_names_the_layer(model: nn.Sequential, eigh: Failing) -> None:
    kfac = kaisa.KFACPreconditioner(model, **{**EVERY_STEP, "patience": 2})
    one_step(model, kfac)
    eigh.fails = True
    one_step(model, kfac)
    with pytest.raises(DecompositionError, match=r"'?(0|2)'?\b"):
        one_step(model, kfac)


def test_where_no_decomposition_ever_succeeded_the_gradient_stays_raw(model: nn.Sequential, eigh: Failing) -> None:
    kfac = kaisa.KFACPreconditioner(model, **{**EVERY_STEP, "patience": 2})
    eigh.fails = True
    model.zero_grad()
    F.cross_entropy(model(torch.randn(6, 3)), torch.randint(0, 2, (6,))).backward()
    raw = gradients_of(model)
    kfac.step()
    for found, expected in zip(gradients_of(model), raw, strict=True):
        assert torch.equal(found, expected)


def test_an_interrupt_during_a_decomposition_is_not_swallowed(
    model: nn.Sequential, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.linalg, "eigh", interrupted)
    kfac = kaisa.KFACPreconditioner(model, **EVERY_STEP)
    with pytest.raises(KeyboardInterrupt):
        one_step(model, kfac)


REFUSED = [
    ({"damping": -1.0}, "damping"),
    ({"damping": 0.0}, "damping"),
    ({"damping": math.nan}, "damping"),
    ({"factor_decay": 1.0}, "factor_decay"),
    ({"factor_decay": -0.1}, "factor_decay"),
    ({"kl_clip": -0.1}, "kl_clip"),
    ({"kl_clip": 0.0}, "kl_clip"),
    ({"lr": -0.1}, "lr"),
    ({"factor_update_steps": 0}, "factor_update_steps"),
    ({"inv_update_steps": 0}, "inv_update_steps"),
    ({"factor_update_steps": 1.5}, "factor_update_steps"),
    ({"accumulation_steps": 0}, "accumulation_steps"),
    ({"factor_examples": 0.0}, "factor_examples"),
    ({"factor_examples": 1.5}, "factor_examples"),
    ({"solver": "newton"}, "solver"),
    ({"sharing": "both"}, "sharing"),
    ({"fisher": "true"}, "fisher"),
    ({"factor_scaling": "paper"}, "factor_scaling"),
    ({"loss_reduction": "none"}, "loss_reduction"),
    ({"loss_terms": 0}, "loss_terms"),
    ({"patience": 0}, "patience"),
    ({"skip_layers": ("(",)}, "skip_layers"),
    ({"inv_dtype": torch.int64}, "inv_dtype"),
    ({"factor_dtype": torch.int32}, "factor_dtype"),
]


@pytest.mark.parametrize(("options", "name"), REFUSED, ids=lambda value: str(value))
def test_a_value_that_cannot_work_is_refused_before_a_hook_is_attached(
    model: nn.Sequential, options: dict, name: str
) -> None:
    with pytest.raises(ConfigurationError, match=name):
        kaisa.KFACPreconditioner(model, **{**EVERY_STEP, **options})
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in vars(module)


def test_a_model_without_a_supported_layer_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"no layer"):
        kaisa.KFACPreconditioner(nn.Sequential(nn.ReLU(), nn.PReLU()), **EVERY_STEP)


def test_the_trust_region_without_a_learning_rate_is_refused(model: nn.Sequential) -> None:
    with pytest.raises(ConfigurationError, match=r"lr"):
        kaisa.KFACPreconditioner(model, kl_clip=0.001)


def test_a_warm_up_may_begin_with_a_learning_rate_of_zero(model: nn.Sequential) -> None:
    options = {**EVERY_STEP, "kl_clip": 0.001, "lr": lambda step: 0.1 * step}
    kfac = kaisa.KFACPreconditioner(model, **options)
    for _ in range(2):
        one_step(model, kfac)
        assert all_finite(gradients_of(model))


def test_a_schedule_that_leaves_its_range_is_refused_when_it_does(model: nn.Sequential) -> None:
    options = {**EVERY_STEP, "damping": lambda step: 0.1 - 0.1 * step}
    kfac = kaisa.KFACPreconditioner(model, **options)
    one_step(model, kfac)
    with pytest.raises(ConfigurationError, match=r"damping .* at step 1"):
        one_step(model, kfac)


def test_a_step_without_a_backward_pass_changes_nothing(model: nn.Sequential) -> None:
    kfac = kaisa.KFACPreconditioner(model, **EVERY_STEP)
    kfac.step()
    assert all(parameter.grad is None for parameter in model.parameters())
    one_step(model, kfac)
    before = all_factors(kfac)
    model.zero_grad()
    kfac.step()
    for found, expected in zip(all_factors(kfac), before, strict=True):
        assert torch.equal(found, expected)


def test_a_sampled_fisher_that_was_never_sampled_is_said_so(model: nn.Sequential) -> None:
    kfac = kaisa.KFACPreconditioner(model, fisher="categorical", **EVERY_STEP)
    with pytest.raises(ConfigurationError, match=r"sample_fisher"):
        one_step(model, kfac)


def test_an_empty_batch_changes_no_factor(model: nn.Sequential) -> None:
    kfac = kaisa.KFACPreconditioner(model, **EVERY_STEP)
    one_step(model, kfac)
    before = all_factors(kfac)
    model.zero_grad()
    model(torch.zeros(0, 3)).sum().backward()
    kfac.step()
    for found, expected in zip(all_factors(kfac), before, strict=True):
        assert torch.equal(found, expected)
    assert all_finite(gradients_of(model))
