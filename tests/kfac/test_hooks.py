"""Hooks see every kind of forward and backward pass, change none and leave nothing behind."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import kaisa
from tests.support.settings import EVERY_STEP

BATCH = 4
HOOK_TABLES = [
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
]


def convolutional(activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), activation(),
        nn.Conv2d(3, 4, 3, stride=2, bias=False), activation(),
        nn.Flatten(), nn.Linear(16, 5), activation(), nn.Linear(5, 3),
    ).double()  # fmt: skip


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(BATCH, 2, 5, 5, dtype=torch.float64), torch.randint(0, 3, (BATCH,))


Result = tuple[dict[str, tuple[Tensor, Tensor]], list[Tensor]]


def result_of(model: nn.Module, x: Tensor, y: Tensor, forward: Callable[[Tensor], Tensor] | None = None) -> Result:
    """Return factors and preconditioned gradients of one step, and leave the model as it was."""
    model.zero_grad()
    with kaisa.KFACPreconditioner(model, **EVERY_STEP) as kfac:
        F.cross_entropy((forward or model)(x), y).backward()
        kfac.step()
        factors = {name: (pair.a.clone(), pair.g.clone()) for name, pair in kfac.factors.items()}
    return factors, [parameter.grad.clone() for parameter in model.parameters()]


def assert_same(found: Result, expected: Result) -> None:
    assert list(found[0]) == list(expected[0])
    for name, pair in expected[0].items():
        torch.testing.assert_close(found[0][name], pair)
    torch.testing.assert_close(found[1], expected[1])


def test_in_place_activations_give_the_factors_of_the_others(batch) -> None:
    model = convolutional()
    in_place = copy.deepcopy(model)
    for module in in_place.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = True
    assert_same(result_of(in_place, *batch), result_of(model, *batch))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_gives_the_factors_of_none(batch, use_reentrant: bool) -> None:
    model = convolutional(nn.Tanh)
    model[1] = nn.Identity()  # batch norm's running statistics would move twice
    x = batch[0].requires_grad_()  # the reentrant form asks for an input with a gradient

    def checkpointed(x: Tensor) -> Tensor:
        first = checkpoint(model[:5], x, use_reentrant=use_reentrant)
        return checkpoint(model[5:], first, use_reentrant=use_reentrant)

    expected = result_of(model, x, batch[1])

    # the hook on the root module does not run where parts are called by hand
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return checkpointed(x)

    wrapped = result_of(Checkpointed(), x, batch[1])
    renamed = {name.removeprefix("inner."): pair for name, pair in wrapped[0].items()}
    assert_same((renamed, wrapped[1]), expected)


def test_channels_last_gives_the_factors_of_contiguous(batch) -> None:
    model = convolutional(nn.Tanh)
    expected = result_of(model, *batch)
    model = model.to(memory_format=torch.channels_last)
    x = batch[0].to(memory_format=torch.channels_last)
    found = result_of(model, x, batch[1])
    assert_same(found, expected)


# What the compiler itself does with the tensors at a graph break.
compiling = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


@compiling
@pytest.mark.parametrize("kfac_first", [True, False])
def test_a_compiled_model_gives_the_factors_of_the_eager_one(batch, kfac_first: bool) -> None:
    model = convolutional(nn.Tanh)
    model[1] = nn.Identity()
    expected = result_of(model, *batch)
    model.zero_grad()
    torch.compiler.reset()
    compiled = None if kfac_first else torch.compile(model, backend="aot_eager")
    with kaisa.KFACPreconditioner(model, **EVERY_STEP) as kfac:
        compiled = compiled or torch.compile(model, backend="aot_eager")
        F.cross_entropy(compiled(batch[0]), batch[1]).backward()
        kfac.step()
        factors = {name: (pair.a, pair.g) for name, pair in kfac.factors.items()}
    assert_same((factors, [p.grad for p in model.parameters()]), expected)


@compiling
def test_a_compiled_model_takes_factor_steps_and_plain_steps_as_the_eager_one_does(batch) -> None:
    model = convolutional(nn.Tanh)
    model[1] = nn.Identity()
    twin = copy.deepcopy(model)
    torch.compiler.reset()
    options = {**EVERY_STEP, "factor_update_steps": 2, "inv_update_steps": 2}
    kfac = kaisa.KFACPreconditioner(model, **options)
    eager = kaisa.KFACPreconditioner(twin, **options)
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(4):
        x = torch.randn_like(batch[0])
        for forward, network, preconditioner in ((compiled, model, kfac), (twin, twin, eager)):
            network.zero_grad()
            F.cross_entropy(forward(x), batch[1]).backward()
            preconditioner.step()
        for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, other.grad)


@compiling
def test_a_compiled_wrapper_may_be_given_in_place_of_the_model(batch) -> None:
    model = convolutional(nn.Tanh)
    model[1] = nn.Identity()
    expected = result_of(model, *batch)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    factors, gradients = result_of(compiled, *batch)
    renamed = {name.removeprefix("_orig_mod."): pair for name, pair in factors.items()}
    assert_same((renamed, gradients), expected)


def test_forwards_without_gradient_do_not_count(batch) -> None:
    model = convolutional(nn.Tanh)
    model[1] = nn.Identity()
    expected = result_of(model, *batch)
    model.zero_grad()
    with kaisa.KFACPreconditioner(model, **EVERY_STEP) as kfac:
        with torch.no_grad():
            model(torch.randn_like(batch[0]))
        loss = F.cross_entropy(model(batch[0]), batch[1])
        with torch.inference_mode():
            model(torch.randn_like(batch[0]))
        loss.backward()
        kfac.step()
        found = {name: (pair.a, pair.g) for name, pair in kfac.factors.items()}
    assert_same((found, [parameter.grad for parameter in model.parameters()]), expected)


def test_forwards_in_evaluation_do_not_count(batch) -> None:
    model = convolutional(nn.Tanh)
    model[1] = nn.Identity()
    expected = result_of(model, *batch)
    model.zero_grad()
    with kaisa.KFACPreconditioner(model, **EVERY_STEP) as kfac:
        model.eval()
        model(torch.randn_like(batch[0]))
        with torch.no_grad():
            model(torch.randn(2, 2, 5, 5, dtype=torch.float64))
        model.train()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        model.eval()
        model(torch.randn_like(batch[0]))
        kfac.step()
        found = {name: (pair.a, pair.g) for name, pair in kfac.factors.items()}
    assert_same((found, [parameter.grad for parameter in model.parameters()]), expected)


def test_a_forward_that_is_never_differentiated_does_not_count(batch) -> None:
    model = convolutional(nn.Tanh)
    model[1] = nn.Identity()
    expected = result_of(model, *batch)
    model.zero_grad()
    with kaisa.KFACPreconditioner(model, **EVERY_STEP) as kfac:
        model(torch.randn_like(batch[0]))
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        kfac.step()
        found = {name: (pair.a, pair.g) for name, pair in kfac.factors.items()}
    assert_same((found, [parameter.grad for parameter in model.parameters()]), expected)


def hooks_of(model: nn.Module) -> dict[str, dict[str, int]]:
    return {
        name: {table: len(getattr(module, table)) for table in HOOK_TABLES} for name, module in model.named_modules()
    }


def attributes_of(model: nn.Module) -> dict[str, list[str]]:
    return {name: sorted(vars(module)) for name, module in model.named_modules()}


class Mixed(nn.Module):
    """One of every kind of module that is watched in a way of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.convolution = nn.Conv1d(4, 4, 3, padding=1)
        self.decoder = nn.Linear(4, 6, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = self.norm(x + self.attention(x, x, x)[0])
        return self.decoder(self.convolution(x.transpose(1, 2)).transpose(1, 2))


@pytest.fixture
def mixed() -> tuple[nn.Module, Tensor]:
    return Mixed().double(), torch.randint(0, 6, (BATCH, 5))


@pytest.mark.parametrize("by_context", [True, False])
def test_nothing_is_left_on_the_model(mixed, by_context: bool) -> None:
    model, tokens = mixed
    hooks, attributes = hooks_of(model), attributes_of(model)
    kfac = kaisa.KFACPreconditioner(model, **EVERY_STEP)
    assert hooks_of(model) != hooks
    model(tokens).square().mean().backward()
    kfac.step()
    if by_context:
        with kfac:
            pass
    else:
        kfac.close()
    assert hooks_of(model) == hooks
    assert attributes_of(model) == attributes
    assert model.attention.forward.__func__ is nn.MultiheadAttention.forward


def test_hooks_are_gone_after_an_error_inside_the_context(mixed) -> None:
    model, _ = mixed
    hooks, attributes = hooks_of(model), attributes_of(model)

    def fail() -> None:
        with kaisa.KFACPreconditioner(model, **EVERY_STEP):
            raise KeyError("the user's own")

    with pytest.raises(KeyError, match="the user's own"):
        fail()
    assert hooks_of(model) == hooks
    assert attributes_of(model) == attributes


def test_closing_twice_is_closing_once(mixed) -> None:
    model, _ = mixed
    hooks = hooks_of(model)
    kfac = kaisa.KFACPreconditioner(model, **EVERY_STEP)
    kfac.close()
    kfac.close()
    assert hooks_of(model) == hooks


def test_the_users_own_hooks_stay(batch) -> None:
    model = convolutional()
    seen: list[str] = []
    model[0].register_forward_hook(lambda *_: seen.append("forward"))
    result_of(model, *batch)
    seen.clear()
    model(batch[0])
    assert seen == ["forward"]


def test_a_step_that_updates_no_factors_records_nothing(batch) -> None:
    model = convolutional()
    options = {**EVERY_STEP, "factor_update_steps": 2, "inv_update_steps": 2}
    plain = operations_of(model, *batch)
    with kaisa.KFACPreconditioner(model, **options) as kfac:
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        kfac.step()
        before = {name: (pair.a.clone(), pair.g.clone()) for name, pair in kfac.factors.items()}
        assert operations_of(model, *batch) == plain
        kfac.step()
        for name, pair in kfac.factors.items():
            assert torch.equal(pair.a, before[name][0])
            assert torch.equal(pair.g, before[name][1])
        assert operations_of(model, *batch) != plain


class Operations(TorchDispatchMode):
    """Notes which operations reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def operations_of(model: nn.Module, x: Tensor, y: Tensor) -> list[str]:
    model.zero_grad()
    with Operations() as operations:
        F.cross_entropy(model(x), y).backward()
    return operations.seen


class NoHostSynchronisation(TorchDispatchMode):
    """Fails where a tensor's value would travel to the host: `.item()`, `bool(t)`, `nonzero()`."""

    FORBIDDEN = ("aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten.equal")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not str(function).startswith(self.FORBIDDEN), f"{function} asks for a tensor's value"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kl_clip", [None, 0.001])
@pytest.mark.parametrize("solver", ["eigen", "cholesky", "ekfac", "sqrt_ekfac"])
def test_plain_and_factor_steps_never_ask_for_a_tensors_value(mixed, solver: str, kl_clip: float | None) -> None:
    model, tokens = mixed
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    options = {**EVERY_STEP, "factor_update_steps": 2, "inv_update_steps": 1000}
    options |= {"kl_clip": kl_clip, "solver": solver, "lr": None}
    kfac = kaisa.KFACPreconditioner(model, optimizer, **options)
    for step in range(5):
        optimizer.zero_grad()
        if step == 0:  # the first decomposition may look at its result
            model(tokens).square().mean().backward()
            kfac.step()
            continue
        with NoHostSynchronisation():
            model(tokens).square().mean().backward()
            kfac.step()


def test_the_detector_of_host_synchronisation_detects_it() -> None:
    with NoHostSynchronisation(), pytest.raises(AssertionError, match="asks for a tensor's value"):
        torch.ones(()).item()


def test_a_copy_of_a_watched_model_works_and_is_not_watched(mixed) -> None:
    model, tokens = mixed
    with kaisa.KFACPreconditioner(model, **EVERY_STEP) as kfac:
        twin = copy.deepcopy(model)
        torch.testing.assert_close(twin(tokens), model(tokens))
        twin(tokens).square().mean().backward()
        kfac.step()
        assert len(kfac.factors) == 0
    torch.testing.assert_close(twin(tokens), model(tokens))


def test_a_watched_model_and_its_state_can_be_saved(mixed) -> None:
    model, _ = mixed
    keys = list(model.state_dict())
    with kaisa.KFACPreconditioner(model, **EVERY_STEP):
        assert list(model.state_dict()) == keys
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        buffer.seek(0)
        assert list(torch.load(buffer, weights_only=True)) == keys


def test_training_goes_on_after_closing(batch) -> None:
    model = convolutional()
    kfac = kaisa.KFACPreconditioner(model, **EVERY_STEP)
    loss = F.cross_entropy(model(batch[0]), batch[1])
    kfac.close()
    loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_keyword_inputs_are_seen_like_positional_ones() -> None:
    class ByKeyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, *, x: Tensor) -> Tensor:
            return self.layer(input=x)

    model = ByKeyword().double()
    x = torch.randn(BATCH, 3, dtype=torch.float64)
    with kaisa.KFACPreconditioner(model, **EVERY_STEP) as kfac:
        model(x=x).square().sum(-1).mean().backward()
        kfac.step()
        rows = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        torch.testing.assert_close(kfac.factors["layer"].a, rows.T @ rows / BATCH)


def test_a_backward_pass_that_no_hook_saw_is_said_and_not_passed_over() -> None:
    model = nn.Sequential(nn.Linear(3, 2)).double()
    model(torch.randn(4, 3).double()).sum().backward()
    with (
        kaisa.KFACPreconditioner(model, kl_clip=None) as kfac,
        pytest.raises(kaisa.ConfigurationError, match="1 layers have gradients, but their hooks saw no backward pass"),
    ):
        kfac.step()
