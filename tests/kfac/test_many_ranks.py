"""Law 5, many ranks equal one: any world and any fraction give what one process gives on the whole batch.

Ranks are threads of a simulated world, in which every collective that is missing, reordered or of a wrong size is an
assertion. Everything is float64; the reference is the same run of one process.
"""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kaisa
from kaisa.errors import ConfigurationError, DecompositionError
from kaisa.kfac import Fisher, Graft, LayerOptions, linalg
from kaisa.kfac.payload import Payload
from kaisa.kfac.placement import Placement
from kaisa.kfac.solvers import EKFAC
from tests.support.training import CLASSES, EXAMPLES, STEPS, Run, batch, distance, network, share
from tests.support.world import Simulated, run, run_all

CLIP = 1e-3
SOLVERS = ("eigen", "cholesky", "ekfac", "sqrt_ekfac", "warm_eigen")
# The square-root form divides directions without any gradient by epsilon = 1e-8, which magnifies rounding.
TOLERANCE = {"sqrt_ekfac": 1e-7}
GRIDS = [(size, workers) for size in (2, 4, 6, 8) for workers in range(1, size + 1) if size % workers == 0]


def of_ranks(world_size: int, rank_run: Callable[[Simulated], Run]) -> tuple[list[dict[str, Tensor]], list[Simulated]]:
    """Returns the parameters and the communicators of all ranks, after seeing that the parameters are the same bits."""

    def main(collectives: Simulated) -> tuple[dict[str, Tensor], Simulated]:
        return rank_run(collectives)(), collectives

    results = run(world_size, main)
    for parameters, _ in results:
        assert all(torch.equal(parameters[name], results[0][0][name]) for name in parameters)
    return [parameters for parameters, _ in results], [collectives for _, collectives in results]


def equal_shares(world_size: int, micro_batches: int = 1, **options: Any) -> Callable[[Simulated], Run]:
    def make(collectives: Simulated) -> Run:
        return Run(
            {**options, "accumulation_steps": micro_batches, "collectives": collectives},
            lambda step: share(step, collectives.rank, world_size, micro_batches),
            average=collectives.mean,
        )

    return make


@cache
def _one_process(options: tuple[tuple[str, Any], ...]) -> dict[str, Tensor]:
    return Run(dict(options), lambda step: [batch(step)])()


def one_process(**options: Any) -> dict[str, Tensor]:
    return _one_process(tuple(sorted(options.items())))


# ------------------------------------------------------------------------------------------------- the law on a grid


def _cells() -> list[Any]:
    """Every solver on every grid, with every combination of accumulation and clip for each solver and each world."""
    combinations = list(itertools.product((1, 2), (None, CLIP)))
    cells = []
    for solver_index, solver in enumerate(SOLVERS):
        for grid_index, (size, workers) in enumerate(GRIDS):
            accumulation, clip = combinations[(solver_index + grid_index) % 4]
            cells.append(pytest.param(solver, size, workers, accumulation, clip))
    cells += [pytest.param(solver, 2, 1, *combination) for solver in SOLVERS for combination in combinations]
    return cells


@pytest.mark.parametrize(("solver", "world_size", "workers", "micro_batches", "clip"), _cells())
def test_parameters_after_five_steps_equal_those_of_one_process(
    solver: str, world_size: int, workers: int, micro_batches: int, clip: float | None
) -> None:
    found, _ = of_ranks(
        world_size,
        equal_shares(world_size, micro_batches, solver=solver, kl_clip=clip, grad_worker_fraction=workers / world_size),
    )
    assert distance(found[0], one_process(solver=solver, kl_clip=clip)) < TOLERANCE.get(solver, 1e-11)


def test_the_comparison_would_notice_an_option_that_has_no_effect() -> None:
    runs = [one_process(solver=solver, kl_clip=clip) for solver in SOLVERS for clip in (None, CLIP)]
    unmoved = {name: parameter.detach() for name, parameter in network().named_parameters()}
    pairs = [*itertools.combinations(runs, 2), *((unmoved, parameters) for parameters in runs)]
    # A warm start is meant to be nearly a full decomposition, and the square root makes any clip look alike.
    assert min(distance(first, second) for first, second in pairs) > 1e-5


def test_a_world_of_one_sends_nothing() -> None:
    (parameters,), (collectives,) = of_ranks(1, equal_shares(1))
    assert all(torch.equal(parameters[name], tensor) for name, tensor in one_process().items())
    assert not collectives.bytes_sent
    assert not collectives.calls


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {"colocate_factors": True},
        {"local_below": 6},
        {"local_below": 100},
        {"local_below": 6, "colocate_factors": True},
        {"spread_inverses": True, "inv_update_steps": 3},
        {"factor_update_steps": 2, "inv_update_steps": 1},
        {"sharing": "reduce"},
        {"fisher": Fisher("categorical", exact=True)},
        {"loss_terms": EXAMPLES},
        {"trust_region": Graft()},
        {"payload": Payload(bucket_bytes=1)},
        {"payload": Payload(bucket_bytes=1500)},
        {"layer_options": LayerOptions(largest_dense=5)},
    ],
    ids=str,
)
def test_every_option_of_the_step_holds_the_law(options: dict[str, Any], workers: int) -> None:
    found, _ = of_ranks(4, equal_shares(4, **options | _of_a_rank(options), grad_worker_fraction=workers / 4))
    assert distance(found[0], one_process(**_of_the_whole(options))) < 1e-11


def _of_a_rank(options: dict[str, Any]) -> dict[str, Any]:
    return {"loss_terms": EXAMPLES // 4} if "loss_terms" in options else {}


def _of_the_whole(options: dict[str, Any]) -> dict[str, Any]:
    placing = ("colocate_factors", "local_below", "payload")
    return {name: value for name, value in options.items() if name not in placing}


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_moments_of_single_examples_are_those_of_all_ranks(micro_batches: int) -> None:
    solver = EKFAC(per_example=True)
    found, _ = of_ranks(4, equal_shares(4, micro_batches, solver=solver))
    assert distance(found[0], one_process(solver=solver)) < 1e-11


def test_moments_of_single_examples_are_refused_where_a_rank_lacks_the_bases() -> None:
    make = equal_shares(2, solver=EKFAC(per_example=True), grad_worker_fraction="mem")
    _, failures = run_all(2, lambda collectives: make(collectives)())
    assert sorted(failures) == [0, 1]
    with pytest.raises(ConfigurationError, match="grad_worker_fraction='comm'"):
        raise failures[0]


# --------------------------------------------------------------------------------------------- ranks that differ


def unequal_shares(sizes: list[int], **options: Any) -> Callable[[Simulated], Run]:
    def make(collectives: Simulated) -> Run:
        return Run(
            {**options, "collectives": collectives},
            lambda step: [batch(step).split(sizes)[collectives.rank]],
            average=collectives.mean,
        )

    return make


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_unequal_batches_equal_micro_batches_of_one_process(solver: str, workers: int) -> None:
    sizes = [20, 5, 16, 7]
    options = {"solver": solver, "kl_clip": CLIP}
    found, _ = of_ranks(4, unequal_shares(sizes, **options, grad_worker_fraction=workers / 4))
    # The mean of the ranks' means, not the mean of all examples: what DistributedDataParallel computes as well.
    expected = Run({**options, "accumulation_steps": 4}, lambda step: batch(step).split(sizes))()
    assert distance(found[0], expected) < TOLERANCE.get(solver, 1e-11)
    assert distance(found[0], one_process(**options)) > 1e-4


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("workers", "users"), [(1, {2}), (2, {0, 3}), (4, {2})])
def test_a_layer_that_some_ranks_do_not_use_equals_micro_batches_that_do_not(
    solver: str, workers: int, users: set[int]
) -> None:
    def make(collectives: Simulated) -> Run:
        options = {"solver": solver, "collectives": collectives, "grad_worker_fraction": workers / 4}
        return Run(
            options,
            lambda step: share(step, collectives.rank, 4),
            with_optional=lambda part: collectives.rank in users,
            average=collectives.mean,
        )

    found, _ = of_ranks(4, make)
    one = Run(
        {"solver": solver, "accumulation_steps": 4},
        lambda step: share(step, 0, 1, micro_batches=4),
        with_optional=lambda part: part in users,
    )
    assert distance(found[0], one()) < TOLERANCE.get(solver, 1e-11)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("workers", "step"), [(1, 0), (2, 2)])
def test_a_loss_that_is_not_a_number_on_one_rank_makes_all_skip_the_update(
    solver: str, workers: int, step: int
) -> None:
    def make(collectives: Simulated) -> Run:
        options = {"solver": solver, "collectives": collectives, "grad_worker_fraction": workers / 4}
        spoilt = {(step, 0)} if collectives.rank == 1 else {(-1, 0)}
        return Run(
            options, lambda step: share(step, collectives.rank, 4), spoilt=frozenset(spoilt), average=collectives.mean
        )

    found, _ = of_ranks(4, make)
    one = Run({"solver": solver}, lambda step: [batch(step)], spoilt=frozenset({(step, 0)}))
    assert distance(found[0], one()) < TOLERANCE.get(solver, 1e-11)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_rank_without_any_examples_takes_part(workers: int) -> None:
    options = {"kl_clip": CLIP, "grad_worker_fraction": workers / 3}
    sizes = [30, 0, 18]

    def make(collectives: Simulated) -> Run:
        def parts(step: int) -> list[Any]:
            return [batch(step).split(sizes)[collectives.rank]] if sizes[collectives.rank] else []

        return Run({**options, "collectives": collectives}, parts, average=collectives.mean)

    found, _ = of_ranks(3, make)
    assert all(torch.isfinite(parameter).all() for parameter in found[0].values())


def test_ranks_that_all_saw_no_backward_pass_all_say_so() -> None:
    def main(collectives: Simulated) -> None:
        model = network().first
        loss = model(torch.ones(4, 10).double()).sum()
        kfac = kaisa.KFACPreconditioner(model, lr=0.1, collectives=collectives)
        loss.backward()
        kfac.step()

    _, failures = run_all(2, main)
    assert sorted(failures) == [0, 1]
    for failure in failures.values():
        with pytest.raises(ConfigurationError, match="hooks saw no backward pass"):
            raise failure


# ------------------------------------------------------------------------------------------------- types of numbers


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("inv_dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_factors_keep_the_type_that_one_process_gives_them(workers: int, inv_dtype: torch.dtype) -> None:
    def factors(collectives: Any, world_size: int) -> dict[tuple[str, int], Tensor]:
        torch.set_grad_enabled(True)
        model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
        with torch.no_grad():
            for index, parameter in enumerate(model.parameters()):
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).reshape(parameter.shape) + index)
        x = torch.linspace(-1, 1, 40).reshape(8, 5)
        size = 8 // world_size
        rank = collectives.rank if collectives else 0
        kfac = kaisa.KFACPreconditioner(
            model,
            lr=0.1,
            inv_update_steps=1000,
            factor_update_steps=1,
            inv_dtype=inv_dtype,
            collectives=collectives,
            grad_worker_fraction=workers / 4 if collectives else 1.0,
        )
        model(x[rank * size : (rank + 1) * size]).square().mean(1).mean().backward()
        kfac.step()
        return {
            (name, side): kfac.factors[name].side(side)
            for name in kfac.factors
            for side in (0, 1)
            if kfac.factors[name].side(side).numel()
        }

    expected = factors(None, 1)
    found: dict[tuple[str, int], Tensor] = {}
    for part in run(4, lambda collectives: factors(collectives, 4)):
        assert not found.keys() & part.keys()
        found.update(part)
    assert found.keys() == expected.keys()
    for key, factor in expected.items():
        assert found[key].dtype == factor.dtype
        torch.testing.assert_close(found[key], factor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_layers_of_different_types_travel_without_loss(workers: int) -> None:
    def final(collectives: Simulated | None) -> dict[str, Tensor]:
        torch.set_grad_enabled(True)
        generator = torch.Generator().manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 4).double(), nn.Linear(4, 3).double())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        kfac = kaisa.KFACPreconditioner(
            model,
            kl_clip=None,
            factor_update_steps=1,
            inv_update_steps=1,
            collectives=collectives,
            grad_worker_fraction=workers / 4 if collectives else 1.0,
        )
        x = torch.randn(8, 5, generator=generator)
        part = x if collectives is None else x[2 * collectives.rank : 2 * collectives.rank + 2]
        outputs = model[2](model[1](torch.tanh(model[0](part)).double()))
        outputs.square().sum(1).mean().backward()
        for parameter in model.parameters() if collectives else ():
            parameter.grad = collectives.mean(parameter.grad.flatten()).reshape(parameter.shape)
        kfac.step()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    expected = final(None)
    for found in run(4, final):
        for name, gradient in expected.items():
            tolerance = 1e-4 if gradient.dtype == torch.float32 else 1e-5
            torch.testing.assert_close(found[name], gradient, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("form", [torch.bfloat16, "int8"])
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_rounded_payloads_stay_near_and_leave_all_ranks_equal(workers: int, form: torch.dtype | str) -> None:
    payload = Payload(statistics=form, gradients=form)
    exact, _ = of_ranks(4, equal_shares(4, grad_worker_fraction=workers / 4))
    rounded, _ = of_ranks(4, equal_shares(4, grad_worker_fraction=workers / 4, payload=payload))
    # of all numbers together: the largest error of a single one depends on the draw
    found, expected = (torch.cat([value.flatten() for value in values[0].values()]) for values in (rounded, exact))
    assert 1e-6 < float((found - expected).norm() / expected.norm()) < 0.03


def test_sums_too_large_for_their_payload_never_reach_a_factor() -> None:
    def main(collectives: Simulated) -> bool:
        model = network().first
        kfac = kaisa.KFACPreconditioner(
            model,
            lr=0.1,
            factor_update_steps=1,
            collectives=collectives,
            payload=Payload(statistics=torch.float16),
            grad_worker_fraction="mem",
        )
        for scale in (1.0, 1e4):  # squares of the second are beyond 65504
            model(scale * torch.ones(4, 10).double()).sum(1).mean().backward()
            kfac.step()
        assert len(kfac.factors) == (collectives.rank == kfac.placement.assignments[0][1].a_owners[0])
        return all(torch.isfinite(factor).all() for pair in kfac.factors.values() for factor in pair)

    assert all(run(2, main))


# --------------------------------------------------------------------------------------------------------- failures


def _failing_on(monkeypatch: pytest.MonkeyPatch, should_fail: Callable[[Tensor], bool]) -> None:
    eigh = linalg.eigh

    def sometimes(matrix: Tensor) -> tuple[Tensor, Tensor]:
        if should_fail(matrix):
            raise DecompositionError("made to fail")
        return eigh(matrix)

    monkeypatch.setattr(linalg, "eigh", sometimes)


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("colocate", [False, True])
def test_a_decomposition_that_fails_keeps_the_last_good_one_as_in_one_process(
    monkeypatch: pytest.MonkeyPatch, workers: int, colocate: bool
) -> None:
    # Fails for the 11 × 11 factor of ``first`` in the decomposition of the third step, wherever that takes place.
    seen: Counter[str] = Counter()

    def third(matrix: Tensor) -> bool:
        if matrix.shape[-1] != 11:
            return False
        seen["first"] += 1
        return seen["first"] == 3

    _failing_on(monkeypatch, third)
    expected = Run({"inv_update_steps": 1}, lambda step: [batch(step)])()
    seen.clear()
    found, _ = of_ranks(
        4, equal_shares(4, inv_update_steps=1, grad_worker_fraction=workers / 4, colocate_factors=colocate)
    )
    assert seen["first"] == STEPS
    assert distance(found[0], expected) < 1e-11


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_patience_at_its_end_on_one_rank_is_an_error_on_all(monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    _failing_on(monkeypatch, lambda matrix: matrix.shape[-1] == 11)
    make = equal_shares(4, grad_worker_fraction=workers / 4, patience=2, inv_update_steps=1)
    _, failures = run_all(4, lambda collectives: make(collectives)())
    assert sorted(failures) == [0, 1, 2, 3]
    for failure in failures.values():
        with pytest.raises(DecompositionError, match="'first'"):
            raise failure


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_patience_at_its_end_later_on_is_an_error_on_all_at_the_next_decomposition(
    monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    seen: Counter[str] = Counter()

    def all_but_the_first(matrix: Tensor) -> bool:
        if matrix.shape[-1] != 11:
            return False
        seen["first"] += 1
        return seen["first"] > 1

    _failing_on(monkeypatch, all_but_the_first)
    make = equal_shares(4, grad_worker_fraction=workers / 4, patience=2, inv_update_steps=1)

    def main(collectives: Simulated) -> None:
        rank_run = make(collectives)
        runs.append(rank_run)
        rank_run()

    runs: list[Run] = []
    _, failures = run_all(4, main)
    assert sorted(failures) == [0, 1, 2, 3]
    # Decomposed in step 0, failed in 1 and 2, told with the statistics of 3.
    assert [rank_run.kfac.steps for rank_run in runs if rank_run.kfac] == [3] * 4
    for failure in failures.values():
        with pytest.raises(DecompositionError, match="'first'"):
            raise failure


# ------------------------------------------------------------------------------------------------------- in two steps


def _slice_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("routes", "transport", "account"):
        monkeypatch.setattr(f"kaisa.kfac.{module}.is_worth_slicing", lambda shares: True)


@pytest.mark.parametrize(("world_size", "workers"), [grid for grid in GRIDS if grid[0] < 8])
@pytest.mark.parametrize("options", [{}, {"local_below": 7}, {"payload": Payload(bucket_bytes=1500)}], ids=str)
def test_exchanges_in_two_steps_make_the_same_numbers(
    monkeypatch: pytest.MonkeyPatch, world_size: int, workers: int, options: dict[str, Any]
) -> None:
    _slice_everything(monkeypatch)
    found, _ = of_ranks(world_size, equal_shares(world_size, **options, grad_worker_fraction=workers / world_size))
    assert distance(found[0], one_process()) < 1e-11


@pytest.mark.parametrize("form", [torch.bfloat16, "int8"])
def test_rounded_payloads_in_two_steps_stay_near_and_leave_all_ranks_equal(
    monkeypatch: pytest.MonkeyPatch, form: torch.dtype | str
) -> None:
    _slice_everything(monkeypatch)
    payload = Payload(statistics=form, gradients=form)
    rounded, _ = of_ranks(4, equal_shares(4, grad_worker_fraction=0.5, payload=payload))
    assert 1e-6 < distance(rounded[0], one_process()) < 0.1


# ------------------------------------------------------------------------------------------------ deferred statistics


def deferring(world_size: int, **options: Any) -> Callable[[Simulated], Run]:
    """Ranks whose statistics wait for the next decomposition, on a network without tied weights."""
    make = equal_shares(world_size, **options)

    def of_rank(collectives: Simulated) -> Run:
        rank_run = make(collectives)
        return replace(rank_run, model=lambda: network(is_tied=False))

    return of_rank


def untied(**options: Any) -> dict[str, Tensor]:
    return Run(options, lambda step: [batch(step)], model=lambda: network(is_tied=False))()


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("intervals", [(1, 3), (1, 4), (2, 3), (2, 1)], ids=str)
def test_statistics_that_wait_make_the_same_factors(solver: str, workers: int, intervals: tuple[int, int]) -> None:
    options = {"solver": solver, "factor_update_steps": intervals[0], "inv_update_steps": intervals[1]}
    found, ranks = of_ranks(
        4, deferring(4, **options, grad_worker_fraction=workers / 4, payload=Payload(deferred=True))
    )
    assert distance(found[0], untied(**options)) < TOLERANCE.get(solver, 1e-11)
    assert [collectives.calls["statistics"] for collectives in ranks] == [2 if intervals[1] > 1 else 3] * 4


def test_a_decay_that_changes_from_step_to_step_is_followed_while_statistics_wait() -> None:
    options = {"inv_update_steps": 3, "factor_decay": lambda step: 0.5 + 0.1 * step}
    found, _ = of_ranks(4, deferring(4, **options))
    assert distance(found[0], untied(**options)) < 1e-11


def test_statistics_wait_at_comm_opt_alone_unless_a_weight_is_tied_or_inverses_are_spread() -> None:
    def exchanges(make: Callable[..., Any], **options: Any) -> int:
        _, ranks = of_ranks(2, make(2, inv_update_steps=5, **options))
        return ranks[0].calls["statistics"]

    assert exchanges(deferring) == 1
    assert exchanges(deferring, grad_worker_fraction="mem") == STEPS
    assert exchanges(deferring, spread_inverses=True) == STEPS
    assert exchanges(deferring, payload=Payload(deferred=False)) == STEPS
    assert exchanges(equal_shares) == STEPS  # whose network has a tied weight
    assert exchanges(equal_shares, payload=Payload(deferred=True)) == 1


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"spread_inverses": True}, "spread_inverses"), ({"solver": EKFAC(per_example=True)}, "per-example EKFAC")],
)
def test_deferral_is_refused_where_statistics_are_needed_on_every_factor_step(
    options: dict[str, Any], reason: str
) -> None:
    make = deferring(2, payload=Payload(deferred=True), **options)
    _, failures = run_all(2, lambda collectives: make(collectives)())
    assert sorted(failures) == [0, 1]
    with pytest.raises(ConfigurationError, match=reason):
        raise failures[0]


def test_unequal_batches_wait_as_well() -> None:
    sizes = [20, 5, 16, 7]
    make = unequal_shares(sizes, inv_update_steps=3)
    found, _ = of_ranks(4, lambda ranks: replace(make(ranks), model=lambda: network(is_tied=False)))
    one = Run(
        {"accumulation_steps": 4, "inv_update_steps": 3},
        lambda step: batch(step).split(sizes),
        model=lambda: network(is_tied=False),
    )
    assert distance(found[0], one()) < 1e-11


def test_what_is_not_finite_on_one_rank_is_left_out_and_the_others_count() -> None:
    def main(collectives: Simulated) -> kaisa.KFACPreconditioner:
        rank_run = replace(
            deferring(2, inv_update_steps=4)(collectives),
            spoilt=frozenset({(2, 0)} if collectives.rank else {(-1, 0)}),
        )
        rank_run()
        assert rank_run.kfac is not None
        return rank_run.kfac

    for kfac in run(2, main):
        assert kfac.factors
        assert all(torch.isfinite(factor).all() for pair in kfac.factors.values() for factor in pair)
        assert all(torch.isfinite(parameter).all() for parameter in kfac._model.parameters())


def test_factors_brought_up_to_date_between_steps_change_nothing() -> None:
    def main(collectives: Simulated, is_reducing: bool) -> dict[str, Tensor]:
        rank_run = deferring(2, inv_update_steps=4)(collectives)
        if is_reducing:
            rank_run = replace(rank_run, after_step=lambda kfac: kfac.reduce_statistics())
        return rank_run()

    plain, reduced = (run(2, lambda ranks, flag=flag: main(ranks, flag)) for flag in (False, True))
    assert 0 < distance(plain[0], reduced[0]) < 1e-11
    assert distance(reduced[0], untied(inv_update_steps=4)) < 1e-11


def test_a_rank_goes_on_from_its_state_while_statistics_wait() -> None:
    def main(collectives: Simulated) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        def reload(kfac: kaisa.KFACPreconditioner) -> None:
            assert kfac.memory_usage()["statistics"] > 0 or kfac.steps in (1, 5)
            kfac.load_state_dict(copy.deepcopy(kfac.state_dict()))

        rank_run = deferring(2, inv_update_steps=4)(collectives)
        return rank_run(), replace(rank_run, after_step=reload)()

    for first, second in run(2, main):
        assert all(torch.equal(first[name], second[name]) for name in first)


# ---------------------------------------------------------------------------------------------------- exact accounts

NUMBER = 8  # bytes in float64
# name: (uses, sizes of the blocks of A, of G, numbers in the gradient); a size is (how many, side, is diagonal)
SHAPES = {
    "convolution": (1, (1, 9, False), (1, 4, False), 4 * 9),
    "grouped": (1, (2, 8, False), (2, 2, False), 4 * 8),
    "embedding": (2, (1, CLASSES, True), (1, 4, False), 4 * CLASSES),
    "first": (1, (1, 11, False), (1, 6, False), 6 * 11),
    "norm": (1, (6, 2, False), (6, 1, False), 6 * 2),
    "optional": (1, (1, 7, False), (1, 6, False), 6 * 7),
    "second": (1, (1, 7, False), (1, 6, False), 6 * 7),
    "third": (1, (1, 7, False), (1, 6, False), 6 * 7),
    "last": (1, (1, 7, False), (1, 4, False), 4 * 7),
}
Side = tuple[int, int, bool]


def _triangle(side: Side) -> int:
    count, size, is_diagonal = side
    return count * (size if is_diagonal else size * (size + 1) // 2)


def _square(side: Side) -> int:
    count, size, is_diagonal = side
    return count * (size if is_diagonal else size * size)


def _decomposed(side: Side, solver: str) -> int:
    count, size, is_diagonal = side
    return count * (size if is_diagonal else size * size + (0 if solver == "cholesky" else size))


def _sides(name: str) -> tuple[Side, Side]:
    return SHAPES[name][1], SHAPES[name][2]


def _owners(placement: Placement, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return placement[name].a_owners, placement[name].g_owners


def _bytes_sent(placement: Placement, rank: int, solver: str, exchanges: int, inverse_steps: int) -> Counter[str]:
    """What a rank sends in ``STEPS`` steps, written down once more from the shapes alone."""
    size, length = placement.world_size, placement.world_size // placement.workers
    sent: Counter[str] = Counter()
    for name, (uses, _, _, gradient) in SHAPES.items():
        for side, owners in zip(_sides(name), _owners(placement, name), strict=True):
            others = sum(owner != rank for owner in owners)
            sent["statistics"] += exchanges * NUMBER * uses * _triangle(side) * others
            if owners == (rank,):
                copies = placement.workers - 1
                sent["decompositions"] += inverse_steps * NUMBER * _decomposed(side, solver) * copies
        if rank in placement[name].gradient_workers:
            sent["gradients"] += STEPS * NUMBER * gradient * (length - 1)
    sent["statistics"] += exchanges * (size - 1) * NUMBER * (3 * len(SHAPES) + 1)  # the headers
    sent["status"] = NUMBER * 2 * len(SHAPES)  # once: which layers could not be decomposed
    if solver == "cholesky":
        blocks = {"grouped": 2, "norm": 6}
        sent["status"] += inverse_steps * NUMBER * sum(2 * blocks.get(name, 1) for name in SHAPES)
    assert size > 1
    return +sent


@pytest.mark.parametrize(("world_size", "workers"), [grid for grid in GRIDS if grid[0] < 8])
@pytest.mark.parametrize(
    ("solver", "placing"),
    [
        ("eigen", {}),
        ("cholesky", {"colocate_factors": True}),
        ("eigen", {"local_below": 7}),
        ("eigen", {"payload": Payload(deferred=True)}),
    ],
    ids=str,
)
def test_bytes_calls_and_memory_follow_the_placement_exactly(
    world_size: int, workers: int, solver: str, placing: dict[str, Any]
) -> None:
    make = equal_shares(world_size, solver=solver, grad_worker_fraction=workers / world_size, **placing)

    def main(collectives: Simulated) -> tuple[Simulated, kaisa.KFACPreconditioner]:
        rank_run = make(collectives)
        rank_run()
        assert rank_run.kfac is not None
        return collectives, rank_run.kfac

    results = run(world_size, main)
    placements = [kfac.placement for _, kfac in results]
    assert all(placement == placements[0] for placement in placements)
    assert placements[0].workers == workers
    inverse_steps = 3
    exchanges = inverse_steps if "payload" in placing else STEPS
    for rank, (collectives, kfac) in enumerate(results):
        placement = kfac.placement
        # Once, at the start: a number for each fact in which the ranks must agree.
        assert collectives.calls.pop("digest") == 1
        assert collectives.bytes_sent.pop("digest") % (NUMBER * (world_size - 1)) == 0
        assert collectives.bytes_sent == _bytes_sent(placement, rank, solver, exchanges, inverse_steps)
        worked = [name for name in SHAPES if rank in placement[name].gradient_workers]
        sends = any(len(owners) == 1 for name in worked for owners in _owners(placement, name))
        calls = {
            "statistics": exchanges,
            "status": 1 + inverse_steps * (solver == "cholesky"),
            "decompositions": inverse_steps * (workers > 1 and sends),
            "gradients": STEPS * (workers < world_size),
        }
        assert collectives.calls == +Counter(calls)
        owned = [
            side
            for name in SHAPES
            for side, owners in zip(_sides(name), _owners(placement, name), strict=True)
            if rank in owners
        ]
        usage = kfac.memory_usage()
        assert usage["factors"] == NUMBER * sum(map(_square, owned))
        assert usage["decompositions"] == NUMBER * sum(_decomposed(side, solver) for n in worked for side in _sides(n))
        assert usage["moments"] == usage["statistics"] == 0


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_corrected_eigenvalues_are_held_by_gradient_workers_alone(workers: int) -> None:
    make = equal_shares(4, solver="ekfac", grad_worker_fraction=workers / 4)

    def main(collectives: Simulated) -> tuple[int, int]:
        rank_run = make(collectives)
        rank_run()
        assert rank_run.kfac is not None
        placement = rank_run.kfac.placement
        own = sum(SHAPES[name][3] for name in SHAPES if collectives.rank in placement[name].gradient_workers)
        return rank_run.kfac.memory_usage()["moments"], NUMBER * own

    for found, expected in run(4, main):
        assert found == expected


@pytest.mark.parametrize(("bucket_bytes", "messages"), [(25 * 2**20, 1), (1, 9)])
def test_statistics_travel_in_as_many_messages_as_buckets(bucket_bytes: int, messages: int) -> None:
    _, ranks = of_ranks(2, equal_shares(2, payload=Payload(bucket_bytes=bucket_bytes)))
    assert [collectives.calls["statistics"] for collectives in ranks] == [5 * messages] * 2


def test_a_half_payload_halves_the_bytes() -> None:
    payload = Payload(statistics=torch.float32, gradients=torch.float32)
    headers = {"statistics": STEPS * 3 * NUMBER * (3 * len(SHAPES) + 1), "gradients": 0}
    _, whole = of_ranks(4, equal_shares(4, grad_worker_fraction=0.5))
    _, half = of_ranks(4, equal_shares(4, grad_worker_fraction=0.5, payload=payload))
    for first, second in zip(whole, half, strict=True):
        for kind in ("statistics", "gradients"):
            assert 2 * (second.bytes_sent[kind] - headers[kind]) == first.bytes_sent[kind] - headers[kind]


@pytest.mark.parametrize(("bucket_bytes", "messages"), [(25 * 2**20, 1), (1, 6)])  # embedding and last are alike
def test_gradients_travel_in_messages_of_whole_groups_of_equal_shape(bucket_bytes: int, messages: int) -> None:
    payload = Payload(bucket_bytes=bucket_bytes)
    _, ranks = of_ranks(2, equal_shares(2, payload=payload, grad_worker_fraction="mem"))
    assert [collectives.calls["gradients"] for collectives in ranks] == [STEPS * messages] * 2
