"""The phases of a step: what runs when, how decompositions are spread, and what is said about memory and time."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import kaisa
from kaisa.kfac import EKFAC, Eigen, WarmStart, linalg
from kaisa.kfac.capture import Capture


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    sizes = (5, 7, 6, 4, 3)
    layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh()))).double()


def backward(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    model.zero_grad()
    x = torch.randn(16, 5, generator=generator, dtype=torch.float64)
    model(x).square().sum(1).mean().backward()


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.fixture
def decomposed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all matrices decomposed, in their order."""
    sizes: list[int] = []
    original = linalg.eigh

    def counting(matrix: Tensor) -> tuple[Tensor, Tensor]:
        sizes.append(matrix.shape[-1])
        return original(matrix)

    monkeypatch.setattr(linalg, "eigh", counting)
    return sizes


def test_decompositions_run_on_inverse_steps_alone(model: nn.Sequential, decomposed: list[int]) -> None:
    with kaisa.KFACPreconditioner(model, kl_clip=None, factor_update_steps=1, inv_update_steps=4) as kfac:
        counts = []
        for step in range(9):
            before = len(decomposed)
            backward(model, step)
            kfac.step()
            counts.append(len(decomposed) - before)
    assert counts == [8, 0, 0, 0, 8, 0, 0, 0, 8]


def test_spread_decompositions_leave_no_step_long_and_none_out(model: nn.Sequential, decomposed: list[int]) -> None:
    with kaisa.KFACPreconditioner(
        model, kl_clip=None, factor_update_steps=1, inv_update_steps=4, spread_inverses=True
    ) as kfac:
        counts = []
        for step in range(9):
            before = len(decomposed)
            backward(model, step)
            kfac.step()
            counts.append(len(decomposed) - before)
    assert counts == [8, 0, 0, 0] + [2] * 5


def test_an_interval_may_be_a_function_of_the_step(model: nn.Sequential, decomposed: list[int]) -> None:
    with kaisa.KFACPreconditioner(
        model, kl_clip=None, factor_update_steps=1, inv_update_steps=lambda step: 1 if step < 3 else 5
    ) as kfac:
        steps = []
        for step in range(9):
            before = len(decomposed)
            backward(model, step)
            kfac.step()
            steps += [step] if len(decomposed) > before else []
    assert steps == [0, 1, 2, 7]


@pytest.mark.parametrize("solver", ["eigen", "cholesky", "ekfac", "sqrt_ekfac"])
def test_layers_of_equal_shape_are_solved_as_one_by_one(solver: str) -> None:
    torch.manual_seed(0)
    twins = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)).double()
    options = {"kl_clip": None, "factor_update_steps": 1, "inv_update_steps": 1, "solver": solver}
    found = []
    for skip in ((), ("^0$", "^2$"), ("^2$", "^4$"), ("^0$", "^4$")):
        with kaisa.KFACPreconditioner(twins, skip_layers=skip, **options) as kfac:
            for seed in range(3):
                backward(twins, seed)
                kfac.step()
            found.append(gradients(twins))
    together, last, first, middle = found
    torch.testing.assert_close(together, first[:2] + middle[2:4] + last[4:])


def test_a_warm_started_run_stays_close_to_full_decompositions(model: nn.Sequential) -> None:
    found = []
    for solver in (Eigen(), Eigen(warm_start=WarmStart(keep_below=1e-6, iterations=3))):
        with kaisa.KFACPreconditioner(
            model, kl_clip=None, damping=0.1, factor_update_steps=1, inv_update_steps=1, solver=solver
        ) as kfac:
            for seed in range(8):
                backward(model, seed)
                kfac.step()
            found.append(torch.cat([part.flatten() for part in gradients(model)]))
    full, warm = found
    assert float((full - warm).norm() / full.norm()) < 0.01


def test_per_example_ekfac_keeps_the_mean_square_of_examples_in_the_eigenbasis(model: nn.Sequential) -> None:
    solver = EKFAC(per_example=True, decay=0.0)
    with kaisa.KFACPreconditioner(
        model, kl_clip=None, factor_update_steps=1, inv_update_steps=100, solver=solver
    ) as kfac:
        backward(model, 0)
        kfac.step()
        recorded: list[tuple[Tensor, Tensor]] = []
        handle = model[2].register_forward_hook(
            lambda module, args, output: (
                output.register_hook(lambda g: recorded.append((args[0].detach(), 16 * g))) and None
            )
        )
        backward(model, 1)
        handle.remove()
        kfac.step()
        stack = next(entry for entry in kfac.state_dict()["decompositions"] if entry["names"] == ["2"])
    (x, delta), basis_a, basis_g = recorded[0], stack["a"][1][0], stack["g"][1][0]
    expected = torch.zeros(6, 8, dtype=torch.float64)
    for example in range(16):
        gradient = torch.outer(delta[example], torch.cat((x[example], torch.ones(1).double())))
        expected += (basis_g.T @ gradient @ basis_a).square() / 16
    torch.testing.assert_close(stack["moments"]["values"][0], expected)


def test_memory_is_what_the_tensors_hold(model: nn.Sequential) -> None:
    with kaisa.KFACPreconditioner(model, kl_clip=None, solver="ekfac") as kfac:
        assert kfac.memory_usage()["total"] == 0
        backward(model)
        sides = [(6, 7), (8, 6), (7, 4), (5, 3)]
        factors = 8 * sum(a * a + g * g for a, g in sides)
        assert kfac.memory_usage()["statistics"] == factors
        kfac.step()
        usage = kfac.memory_usage()
    assert usage["factors"] == factors
    assert usage["decompositions"] == factors + 8 * sum(a + g for a, g in sides)
    assert usage["moments"] == 8 * sum(a * g for a, g in sides)
    assert usage["statistics"] == 0
    assert usage["total"] == sum(value for kind, value in usage.items() if kind != "total")


def test_timings_name_the_phases_that_ran(model: nn.Sequential) -> None:
    with kaisa.KFACPreconditioner(model, kl_clip=None) as kfac:
        assert kfac.timings() == {}
        backward(model)
        kfac.step()
        timings = kfac.timings()
    assert set(timings) == {"statistics", "factors", "inverses", "precondition", "reduce", "decompose", "share"}
    assert all(seconds > 0 for seconds in timings.values())


def test_the_clip_reads_the_learning_rate_of_each_parameter_group(model: nn.Sequential) -> None:
    def clipped(rates: tuple[float, float]) -> float:
        groups = [{"params": model[0].parameters(), "lr": rates[0]}, {"params": model[2:].parameters(), "lr": rates[1]}]
        optimizer = torch.optim.SGD(groups, lr=1.0)
        with kaisa.KFACPreconditioner(model, optimizer, kl_clip=1e-6) as kfac:
            backward(model)
            kfac.step()
        return float(torch.cat([part.flatten() for part in gradients(model)]).norm())

    # the clip scales with 1/lr when one rate holds for all; a rate of zero takes a group out of the bound
    assert clipped((0.2, 0.2)) == pytest.approx(clipped((0.1, 0.1)) / 2)
    assert clipped((0.1, 0.0)) > clipped((0.1, 0.1))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_the_mean_over_all_draws_of_examples_is_the_factor_of_the_whole_batch(
    sharing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 2, groups=2), nn.GroupNorm(2, 4),
        nn.Flatten(), nn.Linear(16, 3),
    ).double()  # fmt: skip
    x, y = 3 + torch.randn(10, 2, 5, 5).double(), torch.randint(0, 3, (10,))

    def factors(fraction: float) -> list[Tensor]:
        with kaisa.KFACPreconditioner(net, kl_clip=None, sharing=sharing, factor_examples=fraction) as kfac:
            nn.functional.cross_entropy(net(x), y).backward()
            kfac.step()
            return [factor for pair in kfac.factors.values() for factor in pair]

    whole, draws = factors(1.0), []
    for block in range(4):
        monkeypatch.setattr(Capture, "_block", lambda self, blocks, block=block: block)
        draws.append(factors(0.25))
    for expected, *parts in zip(whole, *draws, strict=True):
        torch.testing.assert_close(sum(parts) / 4, expected)


def test_corrected_eigenvalues_know_the_size_of_the_batch_from_the_first_step_on(model: nn.Sequential) -> None:
    with kaisa.KFACPreconditioner(model, kl_clip=None, solver=EKFAC(decay=0.5)) as kfac:
        backward(model)
        kfac.step()
        assert {float(entry["moments"]["terms"]) for entry in kfac.state_dict()["decompositions"]} == {16.0}
