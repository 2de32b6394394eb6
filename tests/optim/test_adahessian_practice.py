"""What AdaHessian meets in use: mixed precision, micro-batches, many ranks, files, operations without derivatives."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from kaisa.errors import ConfigurationError, DifferentiationError, StateError
from kaisa.optim import AdaHessian

DOUBLE = torch.float64


def network(dtype: torch.dtype = DOUBLE) -> nn.Sequential:
    torch.manual_seed(1)
    layers = [nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, 3)]
    return nn.Sequential(*layers).to(dtype)


def data(step: int, dtype: torch.dtype = DOUBLE) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    inputs = torch.randn(8, 2, 4, 4, generator=generator, dtype=DOUBLE).to(dtype)
    return inputs, torch.randint(3, (8,), generator=generator)


def loss_of(model: nn.Module, step: int, dtype: torch.dtype = DOUBLE) -> Tensor:
    inputs, targets = data(step, dtype)
    return F.cross_entropy(model(inputs).to(torch.promote_types(dtype, torch.float32)), targets)


def train(model: nn.Module, optimizer: AdaHessian, steps: range = range(6)) -> None:
    for step in steps:
        optimizer.zero_grad()
        optimizer.backward(loss_of(model, step))
        optimizer.step()


def values(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def trained(steps: int = 6, **options: Any) -> list[Tensor]:
    model = network()
    train(model, AdaHessian(model.parameters(), **options), range(steps))
    return values(model)


def equal(ones: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


def close(ones: list[Tensor], others: list[Tensor], tolerance: float = 1e-12) -> None:
    for one, other in zip(ones, others, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------------------ equivalences


@pytest.mark.parametrize("options", [{}, {"hessian_power": 0.5, "weight_decay": 0.1, "maximize": True}])
def test_lists_and_loops_give_the_same(options: dict[str, Any]) -> None:
    assert equal(trained(foreach=True, **options), trained(foreach=False, **options))


@pytest.mark.parametrize("options", [{}, {"update_period": 3}, {"update_period": 3, "between": "repeat"}])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(options: dict[str, Any]) -> None:
    model = network()
    optimizer = AdaHessian(model.parameters(), averaging=lambda d: d, **options)
    train(model, optimizer, range(5))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, range(5, 9))
    file.seek(0)
    saved = torch.load(file)
    again = network()
    again.load_state_dict(saved["model"])
    resumed = AdaHessian(again.parameters(), averaging=lambda d: d, **options)
    resumed.load_state_dict(saved["optimizer"])
    train(again, resumed, range(5, 9))
    assert equal(values(model), values(again))


def test_the_state_of_another_optimizer_is_refused() -> None:
    model = network()
    with pytest.raises(StateError, match="no entry 'adahessian'"):
        AdaHessian(model.parameters()).load_state_dict(torch.optim.SGD(model.parameters(), lr=0.1).state_dict())


def test_micro_batches_are_the_whole_batch() -> None:
    model = network()
    optimizer = AdaHessian(model.parameters())
    for step in range(6):
        optimizer.zero_grad()
        inputs, targets = data(step)
        for x, y in zip(inputs.split(2), targets.split(2), strict=True):
            optimizer.backward(F.cross_entropy(model(x), y) / 4)
        optimizer.step()
    close(values(model), trained())


def test_micro_batches_keep_one_graph() -> None:
    model = network()
    optimizer = AdaHessian(model.parameters())
    outputs = []
    for step in range(3):
        loss = loss_of(model, step)
        outputs.append(weakref.ref(loss))
        optimizer.backward(loss)
        graph = optimizer._curvature.graph
        assert graph is not None
        outputs[-1] = weakref.ref(graph)
        del loss, graph
    assert [reference() is not None for reference in outputs] == [False, False, True]
    optimizer.step()
    assert outputs[-1]() is None


def test_some_examples_may_speak_for_all() -> None:
    """The share's own Hz, as of a mean loss over it, beside the gradient of all."""
    model, apart = network(), network()
    optimizer, reference = AdaHessian(model.parameters()), AdaHessian(apart.parameters())
    inputs, targets = data(0)
    F.cross_entropy(model(inputs[2:]), targets[2:]).mul(0.75).backward()
    optimizer.backward(F.cross_entropy(model(inputs[:2]), targets[:2]).mul(0.25), share=0.25)
    optimizer.step()
    reference.backward(F.cross_entropy(apart(inputs[:2]), targets[:2]))
    reference.step()
    whole = network()
    AdaHessian(whole.parameters()).backward(loss_of(whole, 0))
    for ours, theirs, parameter in zip(model.parameters(), apart.parameters(), whole.parameters(), strict=True):
        squares = (state[x]["exp_hessian_diag_sq"] for state, x in ((optimizer.state, ours), (reference.state, theirs)))
        torch.testing.assert_close(*squares)
        assert parameter.grad is not None
        torch.testing.assert_close(optimizer.state[ours]["exp_avg"], 0.1 * parameter.grad)


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_shares_out_of_range_are_refused(share: float) -> None:
    model = network()
    with pytest.raises(ConfigurationError, match="share is"):
        AdaHessian(model.parameters()).backward(loss_of(model, 0), share=share)


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
def test_both_ways_to_leave_a_graph_give_the_same() -> None:
    model = network()
    optimizer = AdaHessian(model.parameters(), update_period=2)
    for step in range(6):
        optimizer.zero_grad()
        loss_of(model, step).backward(create_graph=optimizer.hessian_due)
        optimizer.step()
    assert equal(values(model), trained(update_period=2))


def test_a_closure_is_evaluated() -> None:
    model = network()
    optimizer = AdaHessian(model.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        optimizer.backward(loss)
        return loss

    assert optimizer.step(closure).item() == pytest.approx(loss_of(network(), 0).item())
    assert equal(values(model), trained(1))


def test_given_means_over_ranks_are_used() -> None:
    model = network()
    seen: list[int] = []
    optimizer = AdaHessian(model.parameters(), update_period=2, reduce=lambda tensors: seen.append(len(tensors)))
    train(model, optimizer, range(3))
    assert seen == [6, 6]


# ------------------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("way", ["backward", "create_graph", "no step"])
@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
def test_a_model_dropped_after_training_is_freed(way: str) -> None:
    model = network()
    optimizer = AdaHessian(model.parameters())
    loss = loss_of(model, 0)
    if way == "create_graph":
        loss.backward(create_graph=True)
    else:
        optimizer.backward(loss)
    if way != "no step":
        optimizer.step()
    watched = [weakref.ref(parameter) for parameter in model.parameters()]
    del loss, model, optimizer
    gc.collect()
    assert [reference() for reference in watched] == [None] * 6


# --------------------------------------------------------------------------------------------- gradients and losses


def test_parameters_without_a_gradient_stay() -> None:
    model = network()
    spare = nn.Parameter(torch.ones(3, dtype=DOUBLE))
    frozen = nn.Parameter(torch.ones(3, dtype=DOUBLE), requires_grad=False)
    optimizer = AdaHessian([spare, *model.parameters(), frozen], weight_decay=0.1)
    train(model, optimizer)
    assert torch.equal(spare, torch.ones(3, dtype=DOUBLE))
    assert torch.equal(frozen, torch.ones(3, dtype=DOUBLE))
    assert spare not in optimizer.state


def test_a_parameter_that_comes_late_waits_for_a_hessian() -> None:
    early, late = (nn.Parameter(torch.ones(2, dtype=DOUBLE)) for _ in range(2))
    optimizer = AdaHessian([early, late], update_period=2, lr=0.1)
    moved = []
    for step in range(3):
        optimizer.zero_grad()
        optimizer.backward((early**2).sum() + ((late**2).sum() if step else 0))
        before = late.detach().clone()
        optimizer.step()
        moved.append(not torch.equal(before, late))
    assert moved == [False, False, True]


@pytest.mark.parametrize("way", ["backward", "create_graph"])
@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
def test_a_loss_linear_in_a_parameter_has_no_curvature_there(way: str) -> None:
    w, bias = (nn.Parameter(torch.ones(2, dtype=DOUBLE)) for _ in range(2))
    optimizer = AdaHessian([w, bias], lr=1e-3, eps=0.1)
    loss = (w**2).sum() + 3 * bias.sum()
    if way == "backward":
        optimizer.backward(loss)
    else:
        loss.backward(create_graph=True)
    optimizer.step()
    torch.testing.assert_close(w.detach(), torch.full((2,), 1 - 1e-3 * 2 / 2.1, dtype=DOUBLE))
    torch.testing.assert_close(bias.detach(), torch.full((2,), 1 - 1e-3 * 3 / 0.1, dtype=DOUBLE))


def test_a_loss_linear_in_all_parameters_is_taken_by_the_safe_way_in() -> None:
    bias = nn.Parameter(torch.ones(2, dtype=DOUBLE))
    optimizer = AdaHessian([bias], lr=1e-3, eps=0.1)
    optimizer.backward(3 * bias.sum())
    optimizer.step()
    torch.testing.assert_close(bias.detach(), torch.full((2,), 1 - 1e-3 * 3 / 0.1, dtype=DOUBLE))


def test_gradients_without_a_graph_are_refused_and_nothing_changes() -> None:
    model = network()
    optimizer = AdaHessian(model.parameters())
    before = values(model)
    loss_of(model, 0).backward()
    with pytest.raises(ConfigurationError, match=r"call optimizer\.backward\(loss\)"):
        optimizer.step()
    assert equal(before, values(model))
    assert not optimizer.state


def test_sparse_gradients_are_refused() -> None:
    embedding = nn.Embedding(4, 2, sparse=True)
    optimizer = AdaHessian(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ConfigurationError, match="sparse=False"):
        optimizer.step()


def test_probes_that_do_not_fit_are_refused() -> None:
    model = network()
    optimizer = AdaHessian(model.parameters())
    optimizer.backward(loss_of(model, 0))
    with pytest.raises(ConfigurationError, match=r"of the shapes \[\(4, 2, 3, 3\)"):
        optimizer.step(probes=[torch.ones(2)])


def test_probes_given_after_several_passes_are_refused() -> None:
    model = network()
    optimizer = AdaHessian(model.parameters())
    for step in range(2):
        optimizer.backward(loss_of(model, step))
    with pytest.raises(ConfigurationError, match="several backward passes"):
        optimizer.step(probes=[torch.ones_like(parameter) for parameter in model.parameters()])


def test_groups_have_options_of_their_own() -> None:
    model, alone = network(), network()
    first, *rest = model.parameters()
    optimizer = AdaHessian([{"params": [first], "lr": 0.0}, {"params": rest, "weight_decay": 0.5}], eps=0.01)
    train(model, optimizer, range(1))
    reference = AdaHessian(alone.parameters(), weight_decay=0.5, eps=0.01)
    train(alone, reference, range(1))
    assert torch.equal(values(model)[0], values(network())[0])
    assert equal(values(model)[1:], values(alone)[1:])


def test_decay_is_decoupled() -> None:
    w = nn.Parameter(torch.full((2,), 4.0, dtype=DOUBLE))
    optimizer = AdaHessian([w], lr=0.1, weight_decay=0.5, eps=0.0)
    optimizer.backward(((w - 4) ** 2).sum())
    optimizer.step()
    torch.testing.assert_close(w.detach(), torch.full((2,), 4 * (1 - 0.05), dtype=DOUBLE))


def test_clipping_changes_the_gradient_and_not_the_curvature() -> None:
    model = network()
    optimizer, whole = AdaHessian(model.parameters()), network()
    optimizer.backward(loss_of(model, 0))
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()
    reference = AdaHessian(whole.parameters())
    train(whole, reference, range(1))
    for parameter, other in zip(model.parameters(), whole.parameters(), strict=True):
        mine, theirs = optimizer.state[parameter], reference.state[other]
        assert torch.equal(mine["exp_hessian_diag_sq"], theirs["exp_hessian_diag_sq"])
        torch.testing.assert_close(mine["exp_avg"], theirs["exp_avg"] * 1e-3 / norm, rtol=1e-4, atol=0)


def test_what_is_not_finite_leaves_the_curvature_as_it_is() -> None:
    w = nn.Parameter(torch.tensor([1.0, 0.0], dtype=DOUBLE))
    optimizer = AdaHessian([w])
    optimizer.backward((w.abs() ** 1.5).sum())  # at 0 the gradient is 0 and its derivative infinite
    optimizer.step()
    assert optimizer.state[w]["exp_hessian_diag_sq"].isfinite().all()
    assert w.isfinite().all()


# ------------------------------------------------------------------------------------------------- types and layouts


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_coarse_types_follow_the_fine_one(dtype: torch.dtype) -> None:
    model = network(dtype)
    optimizer = AdaHessian(model.parameters(), lr=0.01, eps=0.1)
    for step in range(3):
        optimizer.zero_grad()
        optimizer.backward(loss_of(model, step, dtype))
        optimizer.step()
    assert all(state["exp_hessian_diag_sq"].dtype is torch.float32 for state in optimizer.state.values())
    reference = network()
    train(reference, AdaHessian(reference.parameters(), lr=0.01, eps=0.1), range(3))
    for one, other in zip(values(model), values(reference), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=2 * torch.finfo(dtype).eps + 1e-5)


def test_complex_parameters_are_pairs_of_real_ones() -> None:
    pair = nn.Parameter(torch.tensor([[0.5, -1.0], [2.0, 1.0]], dtype=DOUBLE))
    number = nn.Parameter(torch.view_as_complex(pair.detach().clone()))
    zs = torch.tensor([[1.0, -1.0], [1.0, 1.0]], dtype=DOUBLE)
    ours, theirs = AdaHessian([number]), AdaHessian([pair], averaging=None)
    for _ in range(3):
        ours.zero_grad()
        theirs.zero_grad()
        ours.backward((torch.view_as_real(number) ** 4).sum() + number.abs().prod())
        theirs.backward((pair**4).sum() + pair.norm(dim=1).prod())
        ours.step(probes=[torch.view_as_complex(zs)])
        theirs.step(probes=[zs])
    torch.testing.assert_close(torch.view_as_real(number.detach()), pair.detach())


def test_channels_last_is_only_a_layout() -> None:
    model, other = network(), network().to(memory_format=torch.channels_last)
    train(model, AdaHessian(model.parameters()))
    train(other, AdaHessian(other.parameters()))
    close(values(model), values(other), 1e-9)


# ----------------------------------------------------------------------------------------------------- mixed precision


def scaled_run(train_step: Callable[[AdaHessian, nn.Module, Any, int], None]) -> list[Tensor]:
    model = network()
    optimizer = AdaHessian(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        optimizer.zero_grad()
        train_step(optimizer, model, scaler, step)
        scaler.update()
    return values(model)


def with_scaler(optimizer: AdaHessian, model: nn.Module, scaler: Any, step: int) -> None:
    optimizer.backward(loss_of(model, step), scaler=scaler)
    scaler.step(optimizer)


def unscaled_first(optimizer: AdaHessian, model: nn.Module, scaler: Any, step: int) -> None:
    optimizer.backward(loss_of(model, step), scaler=scaler)
    scaler.unscale_(optimizer)
    scaler.step(optimizer)


def scaled_loss(optimizer: AdaHessian, model: nn.Module, scaler: Any, step: int) -> None:
    optimizer.backward(scaler.scale(loss_of(model, step)))
    scaler.step(optimizer)


def create_graph(optimizer: AdaHessian, model: nn.Module, scaler: Any, step: int) -> None:
    scaler.scale(loss_of(model, step)).backward(create_graph=True)
    scaler.step(optimizer)


@pytest.mark.parametrize("way", [with_scaler, unscaled_first, scaled_loss, create_graph])
@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
def test_the_loss_scale_leaves_the_curvature(way: Callable[..., None]) -> None:
    close(scaled_run(way), trained(4))


@pytest.mark.parametrize("is_unscaled", [False, True])
def test_an_overflow_skips_the_step(is_unscaled: bool) -> None:
    model = network()
    optimizer = AdaHessian(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = values(model)
    loss = loss_of(model, 0) * torch.tensor(float("inf"), dtype=DOUBLE)
    if is_unscaled:
        optimizer.backward(loss, scaler=scaler)
    else:
        optimizer.backward(scaler.scale(loss))
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512
    assert equal(before, values(model))
    optimizer.zero_grad()
    train(model, optimizer, range(1))
    assert not equal(before, values(model))
    assert all(value.isfinite().all() for value in values(model))


def test_a_scale_that_nobody_told_is_refused() -> None:
    model = network()
    optimizer = AdaHessian(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer.backward(scaler.scale(loss_of(model, 0)))
    scaler.unscale_(optimizer)
    with pytest.raises(ConfigurationError, match=r"optimizer\.backward\(loss, scaler=scaler\)"):
        scaler.step(optimizer)


# ------------------------------------------------------------------------------------------------- hooks and operators


def test_hooks_on_parameters_run_once_and_leaves_of_others_get_their_gradient() -> None:
    w, other = (nn.Parameter(torch.ones(2, dtype=DOUBLE)) for _ in range(2))
    calls: list[str] = []
    w.register_hook(lambda gradient: (calls.append("hook"), 2 * gradient)[1])
    w.register_post_accumulate_grad_hook(lambda _: calls.append("accumulated"))
    AdaHessian([w]).backward((w**2 * other**3).sum())
    assert calls == ["hook", "accumulated"]
    assert w.grad is not None
    assert w.grad.tolist() == [4.0, 4.0]
    assert other.grad is not None
    assert other.grad.tolist() == [3.0, 3.0]
    assert w._backward_hooks is not None
    assert len(w._backward_hooks) == 1


@pytest.fixture
def attention() -> tuple[AdaHessian, Callable[[], Tensor]]:
    w = nn.Parameter(torch.randn(1, 1, 4, 8))
    return AdaHessian([w]), lambda: F.scaled_dot_product_attention(w, 2 * w, w).square().sum()


def test_an_operation_without_second_derivative_is_named_with_the_remedy(attention: Any) -> None:
    optimizer, closure = attention
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        loss = closure()
    optimizer.backward(loss)
    with pytest.raises(DifferentiationError, match=r"scaled_dot_product_flash_attention.*sdpa_kernel\(SDPBackend.MATH"):
        optimizer.step()


@pytest.mark.parametrize("is_unscaled", [False, True])
def test_the_loss_scale_leaves_differences(is_unscaled: bool) -> None:
    model = network()
    optimizer = AdaHessian(model.parameters(), update_period=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        optimizer.zero_grad()
        loss = optimizer.backward_by_difference(lambda step=step: loss_of(model, step), scaler=scaler)
        assert loss == loss_of(model, step)
        if is_unscaled:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    close(values(model), trained(4, update_period=2), 1e-5)


def test_an_overflow_skips_the_step_of_differences() -> None:
    model = network()
    optimizer = AdaHessian(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before, overflow = values(model), torch.tensor(float("inf"), dtype=DOUBLE)
    optimizer.backward_by_difference(lambda: loss_of(model, 0) * overflow, scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512
    assert equal(before, values(model))
    optimizer.zero_grad()
    train(model, optimizer, range(1))
    assert equal(values(model), trained(1))


def test_some_examples_may_speak_for_all_by_differences() -> None:
    model, reference = network(), network()
    inputs, targets = data(0)
    for network_, differ in ((model, True), (reference, False)):
        optimizer = AdaHessian(network_.parameters())

        def part(network_: nn.Module = network_) -> Tensor:
            return F.cross_entropy(network_(inputs[:2]), targets[:2]).mul(0.25)

        if differ:
            optimizer.backward_by_difference(part, share=0.25)
        else:
            optimizer.backward(part(), share=0.25)
        F.cross_entropy(network_(inputs[2:]), targets[2:]).mul(0.75).backward()
        optimizer.step()
    close(values(model), values(reference), 1e-5)


def test_the_remedies_work(attention: Any) -> None:
    optimizer, closure = attention
    with sdpa_kernel(SDPBackend.MATH):
        optimizer.backward(closure())
        optimizer.step()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        optimizer.backward_by_difference(closure)
        optimizer.step()


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * gradient


@pytest.mark.parametrize("power", [1, 2])
def test_a_function_that_is_differentiable_once_is_named(power: int) -> None:
    """Autograd itself says nothing: it takes the gradient for constant."""
    w = nn.Parameter(torch.ones(2))
    with pytest.raises(DifferentiationError, match=r"Cube, marked @once_differentiable.*backward_by_difference"):
        AdaHessian([w]).backward((Cube.apply(w) ** power).sum())


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
def test_a_function_that_is_differentiable_once_is_seen_in_the_graph_of_gradients() -> None:
    w = nn.Parameter(torch.ones(2))
    (Cube.apply(w) ** 2).sum().backward(create_graph=True)
    with pytest.raises(DifferentiationError, match="@once_differentiable"):
        AdaHessian([w]).step()
    w.grad = None


def test_reentrant_checkpoints_are_named() -> None:
    w = nn.Parameter(torch.ones(2))
    loss = torch.utils.checkpoint.checkpoint(lambda x: (x**3).sum(), w, use_reentrant=True)
    with pytest.raises(DifferentiationError, match="use_reentrant=False"):
        AdaHessian([w]).backward(loss)


# --------------------------------------------------------------------------------------------------------- differences


def test_differences_of_gradients_are_second_derivatives() -> None:
    exact, near = network(), network()
    one, other = AdaHessian(exact.parameters(), update_period=2), AdaHessian(near.parameters(), update_period=2)
    train(exact, one)
    for step in range(6):
        other.zero_grad()
        loss = other.backward_by_difference(lambda step=step: loss_of(near, step))
        assert not loss.requires_grad
        other.step()
    close(values(exact), values(near), 1e-5)


def test_differences_leave_parameters_and_random_numbers_as_they_were() -> None:
    model = nn.Sequential(network(), nn.Dropout(0.5))
    before, seen = values(model), []

    def closure() -> Tensor:
        outputs = model(data(0)[0])
        seen.append(outputs == 0)
        return outputs.square().sum()

    torch.manual_seed(7)
    model(data(0)[0])
    expected = torch.rand(3)
    torch.manual_seed(7)
    AdaHessian(model.parameters(), num_samples=2).backward_by_difference(closure)
    assert torch.equal(torch.rand(3), expected)
    assert equal(before, values(model))
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


def test_differences_of_coarse_parameters_are_refused() -> None:
    model = network(torch.bfloat16)
    with pytest.raises(ConfigurationError, match="too coarse"):
        AdaHessian(model.parameters()).backward_by_difference(lambda: loss_of(model, 0, torch.bfloat16))


def test_distances_of_differences_are_checked_and_used() -> None:
    w = nn.Parameter(torch.ones(1, dtype=DOUBLE))
    optimizer = AdaHessian([w], betas=(0.0, 0.0))
    with pytest.raises(ConfigurationError, match="distance is 0"):
        optimizer.backward_by_difference(lambda: (w**3).sum(), distance=0)
    optimizer.backward_by_difference(lambda: (w**3).sum(), distance=0.5, probes=[torch.ones(1, dtype=DOUBLE)])
    optimizer.step()
    # h = 0.5 (1 + 1) / 1, so that D = 3 (2² - 1²)
    torch.testing.assert_close(optimizer.state[w]["exp_hessian_diag_sq"], torch.tensor([81.0], dtype=DOUBLE))


def test_a_copy_goes_on_by_itself() -> None:
    model = network()
    optimizer = AdaHessian(model.parameters())
    train(model, optimizer, range(2))
    twin, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, range(2, 4))
    again = AdaHessian(twin.parameters())
    again.load_state_dict(state)
    train(twin, again, range(2, 4))
    assert equal(values(model), values(twin))
