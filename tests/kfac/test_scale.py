"""A ⊗ G is the Fisher of the loss per example, however the batch was cut or scaled (law 1)."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kaisa
from kaisa.kfac import Fisher
from tests.support.recording import recording
from tests.support.settings import EVERY_STEP

BATCH = 8
LAYERS = ["0", "2", "5"]


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(3, 4, 3, stride=2, bias=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16, 3),
    ).double()


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(BATCH, 2, 5, 5, dtype=torch.float64), torch.randint(0, 3, (BATCH,))


Factors = dict[str, tuple[Tensor, Tensor]]


def factors_after(kfac: kaisa.KFACPreconditioner) -> Factors:
    kfac.step()
    factors = {name: (pair.a.clone(), pair.g.clone()) for name, pair in kfac.factors.items()}
    kfac.close()
    return factors


def plain_factors(model: nn.Module, x: Tensor, y: Tensor, **options) -> Factors:
    model.zero_grad()
    kfac = kaisa.KFACPreconditioner(model, **{**EVERY_STEP, **options})
    F.cross_entropy(model(x), y).backward()
    return factors_after(kfac)


def assert_same(found: Factors, expected: Factors) -> None:
    assert sorted(found) == sorted(expected)
    for name, pair in expected.items():
        for side, ours, theirs in zip("ag", found[name], pair, strict=True):
            where = f"{name}.{side}"
            torch.testing.assert_close(ours, theirs, msg=lambda m, w=where: f"{w}: {m}")


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_factors_are_those_of_the_definition(model, batch, sharing: str) -> None:
    with recording(model, LAYERS) as records:
        found = plain_factors(model, *batch, sharing=sharing)
    expected = {name: records[name].pairs(sharing=sharing)[0] for name in LAYERS}
    assert_same(found, expected)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_with_accumulation_make_the_factors_of_the_whole(model, batch, parts: int, sharing: str) -> None:
    expected = plain_factors(model, *batch, sharing=sharing)
    whole = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    options = {**EVERY_STEP, "accumulation_steps": parts, "sharing": sharing}
    kfac = kaisa.KFACPreconditioner(model, **options)
    for x, y in zip(batch[0].chunk(parts), batch[1].chunk(parts), strict=True):
        (F.cross_entropy(model(x), y) / parts).backward()
    assert_same(factors_after(kfac), expected)
    for parameter, gradient in zip(model.parameters(), whole, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_accumulation_of_a_sum_loss_makes_the_factors_of_the_whole(model, batch) -> None:
    expected = plain_factors(model, *batch)
    model.zero_grad()
    options = {**EVERY_STEP, "accumulation_steps": 2, "loss_reduction": "sum"}
    kfac = kaisa.KFACPreconditioner(model, **options)
    for x, y in zip(batch[0].chunk(2), batch[1].chunk(2), strict=True):
        F.cross_entropy(model(x), y, reduction="sum").backward()
    assert_same(factors_after(kfac), expected)


def test_accumulation_holds_over_several_steps(model, batch) -> None:
    kfac = kaisa.KFACPreconditioner(model, **{**EVERY_STEP, "factor_decay": 0.5})
    halves = kaisa.KFACPreconditioner(
        twin := copy.deepcopy(model), **{**EVERY_STEP, "factor_decay": 0.5, "accumulation_steps": 2}
    )
    for _ in range(3):
        x, y = torch.randn_like(batch[0]), batch[1]
        F.cross_entropy(model(x), y).backward()
        kfac.step()
        for part_x, part_y in zip(x.chunk(2), y.chunk(2), strict=True):
            (F.cross_entropy(twin(part_x), part_y) / 2).backward()
        halves.step()
        model.zero_grad()
        twin.zero_grad()
    assert_same(factors_after(halves), {n: (p.a, p.g) for n, p in kfac.factors.items()})


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_a_sum_loss_makes_the_factors_of_the_mean_loss(model, batch, sharing: str) -> None:
    expected = plain_factors(model, *batch, sharing=sharing)
    model.zero_grad()
    options = {**EVERY_STEP, "loss_reduction": "sum", "sharing": sharing}
    kfac = kaisa.KFACPreconditioner(model, **options)
    F.cross_entropy(model(batch[0]), batch[1], reduction="sum").backward()
    assert_same(factors_after(kfac), expected)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_doubling_the_batch_by_duplication_changes_nothing(model, batch, sharing: str) -> None:
    expected = plain_factors(model, *batch, sharing=sharing)
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    x, y = torch.cat([batch[0]] * 2), torch.cat([batch[1]] * 2)
    assert_same(plain_factors(model, x, y, sharing=sharing), expected)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_a_grad_scaler_does_not_scale_the_factors(model, batch) -> None:
    expected = plain_factors(model, *batch)
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    kfac = kaisa.KFACPreconditioner(model, optimizer, grad_scaler=scaler, **EVERY_STEP)
    scaler.scale(F.cross_entropy(model(batch[0]), batch[1])).backward()
    scaler.unscale_(optimizer)
    assert_same(factors_after(kfac), expected)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_a_scale_that_changes_between_steps_does_not_reach_the_average(model, batch) -> None:
    plain = copy.deepcopy(model)
    expected = kaisa.KFACPreconditioner(plain, **EVERY_STEP)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1, growth_factor=16.0)
    kfac = kaisa.KFACPreconditioner(model, optimizer, grad_scaler=scaler, **EVERY_STEP)
    for _ in range(3):
        x = torch.randn_like(batch[0])
        plain.zero_grad()
        F.cross_entropy(plain(x), batch[1]).backward()
        expected.step()
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(x), batch[1])).backward()
        scaler.unscale_(optimizer)
        kfac.step()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 8.0 * 16**3
    found = {name: (pair.a, pair.g) for name, pair in kfac.factors.items()}
    assert_same(found, {name: (pair.a, pair.g) for name, pair in expected.factors.items()})


def test_bfloat16_autocast_makes_the_factors_within_its_precision(batch) -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 4, 3, stride=2, bias=False),
        nn.Tanh(), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip
    options = {"factor_dtype": torch.float32, "inv_dtype": torch.float32}
    x, y = batch[0].float(), batch[1]
    expected = plain_factors(model, x, y, **options)
    model.zero_grad()
    kfac = kaisa.KFACPreconditioner(model, **{**EVERY_STEP, **options})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = F.cross_entropy(model(x), y)
    loss.backward()
    found = factors_after(kfac)
    for name, pair in expected.items():
        for ours, theirs in zip(found[name], pair, strict=True):
            assert ours.dtype == torch.float32
            # eight bits of mantissa, and every gradient has passed a few roundings
            assert torch.linalg.norm(ours - theirs) < 0.03 * torch.linalg.norm(theirs)


def test_a_language_models_factors_count_its_tokens_as_loss_terms() -> None:
    batch, tokens, vocabulary = 3, 5, 7
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, vocabulary)).double()
    x = torch.randn(batch, tokens, 4, dtype=torch.float64)
    y = torch.randint(0, vocabulary, (batch, tokens))

    def factors(inputs: Tensor, **options) -> Factors:
        model.zero_grad()
        kfac = kaisa.KFACPreconditioner(model, **{**EVERY_STEP, **options})
        F.cross_entropy(model(inputs).flatten(0, -2), y.flatten()).backward()
        return factors_after(kfac)

    as_sequences = factors(x, loss_terms=batch * tokens)
    as_rows = factors(x.flatten(0, 1))
    assert_same(as_sequences, as_rows)


def test_loss_terms_may_be_a_function_of_the_step() -> None:
    model = nn.Sequential(nn.Linear(4, 3)).double()
    kfac = kaisa.KFACPreconditioner(model, **{**EVERY_STEP, "factor_decay": 0.0, "loss_terms": lambda step: 10 + step})
    x = torch.randn(4, 5, 4, dtype=torch.float64)
    for step in range(2):
        model.zero_grad()
        with recording(model, ["0"]) as records:
            output = model(x).flatten(0, 1)
            output.square().sum(-1).mul(torch.arange(20) < 10 + step).sum().div(10 + step).backward()
        kfac.step()
        [(a, g)] = records["0"].pairs(loss_terms=10 + step)
        torch.testing.assert_close(kfac.factors["0"].a, a)
        torch.testing.assert_close(kfac.factors["0"].g, g)


def test_a_quarter_of_the_examples_is_an_unbiased_sample(model, batch) -> None:
    """Averaged over many steps of one batch the sampled factors approach those of all examples."""
    expected = plain_factors(model, *batch)
    draws = 200
    options = {**EVERY_STEP, "factor_decay": 0.0, "inv_update_steps": 10**9}
    kfac = kaisa.KFACPreconditioner(model, factor_examples=0.25, **options)
    drawn: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in expected}
    for _ in range(draws):
        model.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        kfac.step()
        for name, pair in kfac.factors.items():
            drawn[name].append((pair.a.clone(), pair.g.clone()))
    for name, pair in expected.items():
        for side, full in zip(zip(*drawn[name], strict=True), pair, strict=True):
            values = torch.stack(side)
            spread, error = values.std(dim=0), (values.mean(dim=0) - full).abs()
            assert (error <= 5 * spread / draws**0.5 + 1e-9 * full.abs().max()).all(), name
            assert spread.max() > 0, name


SPLITS: list[Callable[[Tensor], list[Tensor]]] = [
    lambda t: [t[:3], t[3:]],
    lambda t: [t[:1], t[1:2], t[2:]],
]


@pytest.mark.parametrize("split", SPLITS)
def test_micro_batches_of_unequal_size_make_the_factors_of_the_whole_sum_loss(model, batch, split) -> None:
    expected = plain_factors(model, *batch)
    model.zero_grad()
    parts = list(zip(split(batch[0]), split(batch[1]), strict=True))
    options = {**EVERY_STEP, "accumulation_steps": len(parts), "loss_reduction": "sum"}
    kfac = kaisa.KFACPreconditioner(model, **options)
    for x, y in parts:
        F.cross_entropy(model(x), y, reduction="sum").backward()
    assert_same(factors_after(kfac), expected)


@pytest.mark.parametrize("parts", [2])
@pytest.mark.parametrize("kind", ["categorical"])
def test_the_exact_fisher_does_not_depend_on_accumulation_or_scale(model, batch, parts: int, kind: str) -> None:
    def factors(pieces: int, scale: float) -> Factors:
        model.zero_grad()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        kfac = kaisa.KFACPreconditioner(
            model, optimizer, grad_scaler=scaler, accumulation_steps=pieces,
            fisher=Fisher(kind, exact=True), **EVERY_STEP,
        )  # fmt: skip
        for x, y in zip(batch[0].chunk(pieces), batch[1].chunk(pieces), strict=True):
            outputs = model(x)
            kfac.sample_fisher(outputs)
            scaler.scale(F.cross_entropy(outputs, y) / pieces).backward()
        scaler.unscale_(optimizer)
        return factors_after(kfac)

    assert_same(factors(parts, 64.0), factors(1, 1.0))


@pytest.mark.parametrize("solver", ["eigen", "cholesky"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_kept_in_half_precision_are_right_within_it(batch, dtype: torch.dtype, solver: str) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(75, 3))
    x, y = batch[0].float(), batch[1]
    options = {"inv_dtype": torch.float32, "solver": solver}
    expected = plain_factors(model, x, y, factor_dtype=torch.float32, **options)
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    found = plain_factors(model, x, y, factor_dtype=dtype, **options)
    for name, pair in expected.items():
        for ours, theirs in zip(found[name], pair, strict=True):
            assert ours.dtype == dtype
            assert torch.linalg.norm(ours.float() - theirs) < 0.01 * torch.linalg.norm(theirs)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.linalg.norm(parameter.grad - gradient) < 0.1 * torch.linalg.norm(gradient)


def test_parts_called_one_by_one_do_not_take_an_earlier_forwards_batch_for_theirs(model, batch) -> None:
    expected = plain_factors(model, *batch)
    model.zero_grad()
    kfac = kaisa.KFACPreconditioner(model, **{**EVERY_STEP, "factor_decay": 0.0})
    F.cross_entropy(model(batch[0][:3]), batch[1][:3]).backward()
    kfac.step()
    model.zero_grad()
    outputs = batch[0]
    for module in model:
        outputs = module(outputs)
    F.cross_entropy(outputs, batch[1]).backward()
    assert_same(factors_after(kfac), expected)


def test_an_evaluation_between_two_steps_does_not_change_the_scale() -> None:
    """Training passes through a part of the model alone, so that nobody says how large its batch is but the layer."""

    def factor(evaluates: bool) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 2)).double()
        kfac = kaisa.KFACPreconditioner(model, lr=0.1)
        x = torch.linspace(-1, 1, 24).double().reshape(8, 3)
        if evaluates:
            with torch.no_grad():
                model(x.repeat(4, 1))
        model[0](x).square().sum(1).mean().backward()
        kfac.step()
        return kfac.factors["0"].g

    torch.testing.assert_close(factor(evaluates=True), factor(evaluates=False))
