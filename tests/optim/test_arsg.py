"""ARSG against golden values, against published identities, and as an optimizer of torch's."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import pytorch_optimizer
import torch
from torch import Tensor, nn

from kaisa.errors import ConfigurationError
from kaisa.optim import ARSG, FINE, RSG
from tests.support.arsg_problems import CASES, LOSSES, farthest, initial, mlp, perceptron, quad4, same, train

Make = Callable[..., torch.optim.Optimizer]
KINDS: dict[str, Make] = {
    "rsg": lambda parameters, **given: RSG(parameters, **{"lr": 0.3, **given}),
    "arsg": lambda parameters, **given: ARSG(parameters, **{"lr": 0.05, **given}),
    "arsg, adam": lambda parameters, **given: ARSG(parameters, preconditioner="adam", **{"lr": 0.05, **given}),
}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def make(request: pytest.FixtureRequest) -> Make:
    kind: Make = request.param
    return kind


def of_hyper(parameters: list[Tensor], hyper: dict[str, Any], **given: Any) -> torch.optim.Optimizer:
    """Make the optimizer that the options of the original stand for."""
    given = {"lr": hyper["lr"], "mu": hyper["mu"], "weight_decay": hyper["weight_decay"], **given}
    if "nLA" in hyper:
        given |= {"lookahead_steps": hyper["nLA"], "lookahead_share": hyper["alphaLA"]}
    if not hyper["adaptive"]:
        return RSG(parameters, beta=hyper["betas"][0], **given)
    kind = "amsgrad" if hyper["amsgrad"] else "adam"
    return ARSG(parameters, betas=tuple(hyper["betas"]), eps=hyper["eps"], preconditioner=kind, **given)


def close(actual: list[Tensor], expected: list[float]) -> None:
    torch.testing.assert_close(
        torch.cat([tensor.detach().flatten() for tensor in actual]),
        torch.tensor(expected, dtype=torch.float64),
        rtol=1e-12,
        atol=1e-12,
    )


def flat(value: Any) -> list[float]:
    return [number for part in value for number in flat(part)] if isinstance(value, list) else [value]


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_every_step_is_that_of_the_original(name: str, foreach: bool) -> None:
    case, hyper = CASES[name], CASES[name]["hyper"]
    parts = 2 if name == "arsg_accumulate2" else 1
    parameters = initial(case)
    optimizer = of_hyper(parameters, hyper, foreach=foreach)
    beta, beta2 = hyper["betas"]
    scales = {"exp_avg": 1 - beta, "exp_avg_sq": 1 - beta2, "max_exp_avg_sq": 1 - beta2}  # the original keeps sums
    for index, expected in enumerate(case["steps"]):
        if name == "arsg_restart_at_6th_step" and index == 5:
            assert isinstance(optimizer, ARSG)
            optimizer.restart()
        losses = train(parameters, optimizer, range(index, index + 1), LOSSES[case["problem"]], parts)
        assert losses == pytest.approx(flat(expected["loss"]) if parts > 1 else [expected["loss"]], rel=1e-12)
        close(parameters, flat(expected["param"]))
        for key in scales.keys() & expected.keys():
            close([optimizer.state[p][key] / scales[key] for p in parameters], expected[key])
        if "data_slow" in expected and "slow" in optimizer.state[parameters[0]]:
            close([optimizer.state[p]["slow"] for p in parameters], expected["data_slow"])


def test_the_losses_and_sums_quoted_with_the_golden_values_come_out() -> None:
    w = initial(CASES["arsg_quad_default"])
    losses = train(w, ARSG(w, lr=0.05), range(10), quad4)
    quoted = [-1.6437500000, -2.0295722978, -2.2715285809, -2.6032850497, -3.1083583090]
    assert [losses[step - 1] for step in (1, 2, 3, 5, 10)] == pytest.approx(quoted, abs=1e-10)
    parameters = perceptron()
    train(parameters, ARSG(parameters, lr=0.05), range(12))
    assert sum(float(p.detach().sum()) for p in parameters) == pytest.approx(0.4033969836, abs=1e-10)


def test_the_adam_type_without_observation_is_adam() -> None:
    ours, theirs = perceptron(), perceptron()
    train(ours, ARSG(ours, 0.01, (0.9, 0.999), mu=0.0, preconditioner="adam"), range(20))
    train(theirs, torch.optim.Adam(theirs, 0.01, (0.9, 0.999)), range(20))
    assert farthest(ours, theirs) < 1e-14


def test_decoupled_decay_of_the_adam_type_is_that_of_adamw() -> None:
    ours, theirs = perceptron(), perceptron()
    options = {"weight_decay": 0.1, "decoupled_weight_decay": True}
    train(ours, ARSG(ours, 0.01, (0.9, 0.999), mu=0.0, preconditioner="adam", **options), range(20))  # type: ignore[arg-type]
    train(theirs, torch.optim.AdamW(theirs, 0.01, (0.9, 0.999), weight_decay=0.1), range(20))
    assert farthest(ours, theirs) < 1e-14


@pytest.mark.parametrize("mu", [0.05, 0.1, 0.7])
def test_the_adam_type_is_qhadam(mu: float) -> None:
    ours, theirs = perceptron(), perceptron()
    train(ours, ARSG(ours, 0.01, (0.995, 0.999), mu=mu, preconditioner="adam"), range(20))
    qhadam = pytorch_optimizer.QHAdam(theirs, 0.01, betas=(0.995, 0.999), nus=(1 - mu, 1.0))
    train(theirs, qhadam, range(20))
    # QHAdam's weights of the averages are float32
    assert farthest(ours, theirs) < 2e-8


def test_without_observation_arsg_is_amsgrad_without_bias_corrections() -> None:
    """AMSGrad from its definition (Reddi et al. 2018, algorithm 2), with v̂ from ε."""
    ours, w = initial(CASES["arsg_quad_default"]), initial(CASES["arsg_quad_default"])[0]
    train(ours, ARSG(ours, 0.05, (0.9, 0.99), mu=0.0, eps=1e-6), range(15), quad4)
    m, v, peak = torch.zeros(4), torch.zeros(4), torch.full((4,), 1e-6, dtype=torch.float64)
    for step in range(15):
        (g,) = torch.autograd.grad(quad4([w], step), w)
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
        peak = torch.maximum(peak, v)
        w = (w.detach() - 0.05 * m / peak.sqrt()).requires_grad_()
    assert farthest(ours, [w]) < 1e-14


def test_the_first_step_has_the_size_that_the_page_says() -> None:
    w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    w.grad = torch.tensor([5.0, -0.01, 300.0], dtype=torch.float64)
    ARSG([w], lr=0.1).step()
    size = 0.1 * (0.9 * 0.001 + 0.1) / math.sqrt(0.01)
    assert size == pytest.approx(0.1009)
    torch.testing.assert_close(w.detach(), -size * w.grad.sign())


@pytest.mark.parametrize("kind", ["amsgrad", "adam"])
def test_the_size_of_the_loss_does_not_matter_where_the_floor_does_not_reach(kind: str) -> None:
    ours, scaled = perceptron(), perceptron()
    train(ours, ARSG(ours, 0.05, eps=1e-30, preconditioner=kind), range(10))
    optimizer = ARSG(scaled, 0.05, eps=1e-30, preconditioner=kind)
    train(scaled, optimizer, range(10), lambda parameters, step: 64 * mlp(parameters, step))
    assert farthest(ours, scaled) < 1e-14


def test_the_fine_mode_is_the_usual_one_where_gradients_are_large_and_slower_where_they_are_small() -> None:
    large, fine = initial(CASES["arsg_quad_default"]), initial(CASES["arsg_quad_fine"])
    train(large, ARSG(large, 0.05), range(10), quad4)
    train(fine, ARSG(fine, 0.05, eps=FINE), range(10), quad4)
    assert farthest(large, fine) == pytest.approx(0, abs=1e-3)
    w = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    w.grad = torch.tensor([1e-6], dtype=torch.float64)
    ARSG([w], lr=1.0, eps=FINE).step()
    assert float(w.detach().abs()) == pytest.approx(1e-6 * 0.1009 / math.sqrt(FINE))


def test_a_restart_forgets_the_peak_and_keeps_the_floor() -> None:
    w = torch.ones(2, requires_grad=True)
    optimizer = ARSG([w], lr=0.0, eps=1e-4)
    optimizer.restart()  # before the first step there is nothing to forget
    for gradient in [torch.tensor([10.0, 0.0])] + [torch.zeros(2)] * 300:
        w.grad = gradient
        optimizer.step()
    assert optimizer.state[w]["max_exp_avg_sq"][0] == pytest.approx(1.0)
    optimizer.restart()
    peak, v = optimizer.state[w]["max_exp_avg_sq"], optimizer.state[w]["exp_avg_sq"]
    assert float(peak[0]) == float(v[0]) == pytest.approx(0.99**300, rel=1e-3)
    assert float(peak[1]) == pytest.approx(1e-4)


def test_a_restart_is_refused_where_nothing_would_be_forgotten() -> None:
    with pytest.raises(ConfigurationError, match=r"restart\(\) forgets the highest .* preconditioner='adam' does not"):
        ARSG(perceptron(), preconditioner="adam").restart()


def test_no_floor_and_no_gradient_are_no_step(make: Make) -> None:
    w = torch.ones(3, requires_grad=True)
    optimizer = make([w]) if isinstance(make([w]), RSG) else make([w], eps=0.0)
    w.grad = torch.zeros(3)
    optimizer.step()
    assert torch.equal(w, torch.ones(3))


# What every optimizer of torch's can do; for RSG and both types of ARSG.


def convolutional() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))


def train_model(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(6, 3, 8, 8, generator=generator).to(next(model.parameters()).dtype)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x).float(), torch.arange(6) % 4).backward()
        optimizer.step()


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "decoupled decay": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "maximize": {"maximize": True, "weight_decay": 0.1},
    "lookahead": {"lookahead_steps": 3, "lookahead_share": 0.8},
    "no observation": {"mu": 0.0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_lists_and_loop_take_bitwise_the_same_steps(make: Make, options: dict[str, Any], dtype: torch.dtype) -> None:
    models = [convolutional().to(dtype) for _ in range(2)]
    for model, foreach in zip(models, (True, False), strict=True):
        train_model(model, make(model.parameters(), foreach=foreach, **options), range(7))
    one, other = (list(model.parameters()) for model in models)
    assert same(one, other)
    assert not same(one, list(convolutional().to(dtype).parameters()))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stop", [0, 1, 4])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(
    make: Make, options: dict[str, Any], dtype: torch.dtype, stop: int
) -> None:
    whole, stopped = convolutional().to(dtype), convolutional().to(dtype)
    train_model(whole, make(whole.parameters(), **options), range(7))
    optimizer = make(stopped.parameters(), **options)
    train_model(stopped, optimizer, range(stop))
    file = io.BytesIO()
    torch.save([stopped.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    resumed = convolutional().to(dtype)
    resumed.load_state_dict(weights)
    optimizer = make(resumed.parameters())
    optimizer.load_state_dict(state)
    train_model(resumed, optimizer, range(stop, 7))
    assert same(list(resumed.parameters()), list(whole.parameters()))


def test_a_loaded_state_is_a_copy(make: Make) -> None:
    w = torch.ones(3, requires_grad=True)
    first, second = make([w]), make([w])
    w.grad = torch.ones(3)
    first.step()
    state = first.state_dict()
    before = copy.deepcopy(state)
    second.load_state_dict(state)
    second.step()
    assert torch.equal(state["state"][0]["exp_avg"], before["state"][0]["exp_avg"])


def test_what_is_remembered_is_kept_in_at_least_32_bits(make: Make) -> None:
    for dtype, kept in ((torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64,) * 2):
        w = torch.ones(3, dtype=dtype, requires_grad=True)
        optimizer = make([w])
        w.grad = torch.ones_like(w)
        optimizer.step()
        assert w.dtype is dtype
        assert {value.dtype for value in optimizer.state[w].values() if isinstance(value, Tensor)} == {kept}


def test_a_slow_average_of_16_bits_moves(make: Make) -> None:
    """A thousandth of the way is less than bfloat16 can tell: kept in it, the average would stand still."""
    w = torch.zeros(1, dtype=torch.bfloat16, requires_grad=True)
    optimizer = make([w], lr=0.0)
    for gradient in [1.0] * 1000 + [1.1] * 1000:
        w.grad = torch.full_like(w, gradient)
        optimizer.step()
    gradient = float(torch.tensor(1.1, dtype=torch.bfloat16))
    expected = gradient * (1 - 0.999**1000) + 0.999**1000 * (1 - 0.999**1000)
    assert float(optimizer.state[w]["exp_avg"]) == pytest.approx(expected, rel=1e-4)


def test_parameters_without_a_gradient_stay_and_the_others_do_not_notice(make: Make) -> None:
    """The original moved all that followed: see §6 of the notes on its defects."""
    a, b, c = (torch.full((2,), value, requires_grad=True) for value in (1.0, 2.0, 3.0))
    alone = torch.full((2,), 3.0, requires_grad=True)
    optimizer, other = make([a, b, c]), make([alone])
    for step in range(4):
        a.grad, b.grad, c.grad = torch.ones(2), None if step else torch.ones(2), torch.full((2,), 0.5)
        alone.grad = torch.full((2,), 0.5)
        before = b.detach().clone()
        optimizer.step()
        other.step()
        assert torch.equal(b, before) is (step > 0)
    assert torch.equal(c, alone)
    assert make([torch.ones(1, requires_grad=True)]).step() is None


def test_groups_have_options_of_their_own(make: Make) -> None:
    together = [torch.full((2,), 1.0, requires_grad=True) for _ in range(2)]
    apart = [torch.full((2,), 1.0, requires_grad=True) for _ in range(2)]
    own = {"lr": 0.01, "mu": 0.3, "weight_decay": 0.5, "maximize": True, "lookahead_steps": 2}
    grouped = make([{"params": [together[0]]}, {"params": [together[1]], **own}])
    separate = [make([apart[0]]), make([apart[1]], **own)]
    for _ in range(5):
        for w in (*together, *apart):
            w.grad = 0.7 * w.detach()
        grouped.step()
        for optimizer in separate:
            optimizer.step()
    assert same(together, apart)
    assert not torch.equal(together[0], together[1])


def test_maximizing_climbs_as_minimizing_the_negative_descends(make: Make) -> None:
    up, down = perceptron(), perceptron()
    train(up, make(up, maximize=True, weight_decay=0.1), range(8))
    train(down, make(down, weight_decay=0.1), range(8), lambda parameters, step: -mlp(parameters, step))
    assert farthest(up, down) == 0


def test_the_gradients_are_left_as_they_were(make: Make) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        w = torch.ones(3, dtype=dtype, requires_grad=True)
        w.grad = torch.full_like(w, 0.5)
        make([w], maximize=True, weight_decay=0.1).step()
        assert torch.equal(w.grad, torch.full_like(w, 0.5))


def test_weights_that_are_set_from_outside_are_kept(make: Make) -> None:
    w = torch.zeros(2, requires_grad=True)
    optimizer = make([w], lr=0.01)
    for _ in range(2):
        w.grad = torch.ones(2)
        optimizer.step()
        w.data = torch.full((2,), 100.0)
    optimizer.step()
    assert float(w.detach().min()) > 99


def test_the_layout_of_weights_is_kept(make: Make) -> None:
    ours = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last).requires_grad_()
    other = ours.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    gradient = torch.randn(4, 3, 2, 2)
    for w in (ours, other):
        optimizer = make([w])
        w.grad = gradient.clone()
        optimizer.step()
        assert optimizer.state[w]["exp_avg"].stride() == w.stride()
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(ours, other)


def test_a_complex_parameter_is_a_pair_of_real_ones(make: Make) -> None:
    z = torch.randn(3, dtype=torch.complex128, requires_grad=True)
    pair = torch.view_as_real(z.detach()).clone().requires_grad_()
    complex_optimizer, real_optimizer = make([z], lookahead_steps=2), make([pair], lookahead_steps=2)
    for _ in range(4):
        z.grad = z.detach() * (0.3 + 0.1j)
        pair.grad = torch.view_as_real(z.grad).clone()
        complex_optimizer.step()
        real_optimizer.step()
    assert torch.equal(torch.view_as_real(z.detach()), pair)


def test_a_closure_is_called_with_gradients_and_its_loss_returned(make: Make) -> None:
    w = torch.ones(2, requires_grad=True)
    optimizer = make([w])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (w**2).sum()
        loss.backward()
        return loss.detach()

    assert float(optimizer.step(closure)) == 2.0  # type: ignore[arg-type]
    assert float(w.detach().max()) < 1


def test_many_parameters_are_updated_in_runs_without_a_trace_of_them(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, split = perceptron(), perceptron()
    train(whole, make(whole), range(5))
    monkeypatch.setattr("kaisa.optim.elementwise.CACHED", 5)
    train(split, make(split), range(5))
    assert same(whole, split)


def test_a_scheduler_of_torch_drives_it(make: Make) -> None:
    w = torch.ones(1, requires_grad=True)
    optimizer = make([w], lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


def test_a_grad_scaler_leaves_no_trace(make: Make) -> None:
    plain, scaled = perceptron(torch.float32), perceptron(torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    ours, theirs = make(plain), make(scaled)
    train(plain, ours, range(3))
    for step in range(3):
        theirs.zero_grad()
        scaler.scale(mlp(scaled, step)).backward()
        scaler.step(theirs)
        scaler.update()
    assert farthest(plain, scaled) < 1e-6


def test_a_sparse_gradient_is_refused_before_anything_changes(make: Make) -> None:
    embedding = nn.Embedding(5, 2, sparse=True)
    w = torch.ones(2, requires_grad=True)
    optimizer = make([w, *embedding.parameters()])
    (embedding(torch.tensor([1])).sum() + w.sum()).backward()
    with pytest.raises(ConfigurationError, match=r"RSG needs dense gradients, .* shape \(5, 2\) is sparse; give"):
        optimizer.step()
    assert torch.equal(w, torch.ones(2))
    assert not optimizer.state


SHARED_BAD = [
    ({"lr": -1.0}, r"lr is -1\.0; give zero or a positive number"),
    ({"lr": math.nan}, "lr is nan; give zero"),
    ({"mu": 1.0}, r"mu is 1\.0; give a number of at least 0 and below 1"),
    ({"mu": -0.1}, r"mu is -0\.1; give"),
    ({"weight_decay": -1e-4}, r"weight_decay is -0\.0001; give zero"),
    ({"lookahead_steps": 0}, "lookahead_steps is 0; give a whole number of at least 1"),
    ({"lookahead_share": 1.5}, r"lookahead_share is 1\.5; give a number from 0 to 1"),
    ({"foreach": "yes"}, "foreach is 'yes'; give True or False or None"),
    ({"maximize": None}, "maximize is None; give True or False"),
    ({"decoupled_weight_decay": 1}, "decoupled_weight_decay is 1; give True or False"),
]
ARSG_BAD = [
    ({"betas": 0.9}, r"betas is 0\.9; give two numbers"),
    ({"betas": (0.9, 0.99, 0.999)}, "betas is .*; give two numbers"),
    ({"betas": (1.0, 0.99)}, r"the first of betas is 1\.0; give"),
    ({"betas": (0.9, -0.1)}, r"the second of betas is -0\.1; give"),
    ({"eps": -1e-8}, "eps is -1e-08; give zero"),
    ({"preconditioner": "sgd"}, "preconditioner is 'sgd'; give 'amsgrad' or 'adam'"),
]


@pytest.mark.parametrize(("options", "message"), SHARED_BAD)
def test_options_out_of_range_are_refused(make: Make, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make(perceptron(), **options)


@pytest.mark.parametrize(("options", "message"), ARSG_BAD)
def test_options_of_arsg_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ARSG(perceptron(), **options)


def test_a_group_that_is_refused_is_not_added(make: Make) -> None:
    optimizer = make([torch.ones(1, requires_grad=True)])
    with pytest.raises(ConfigurationError, match="mu is 2; give"):
        optimizer.add_param_group({"params": [torch.ones(1, requires_grad=True)], "mu": 2})
    assert len(optimizer.param_groups) == 1
