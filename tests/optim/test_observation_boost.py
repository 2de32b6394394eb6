"""The observation boost: when it comes, what it changes, and what it refuses."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from kaisa.errors import ConfigurationError, StateError
from kaisa.optim import ARSG, RSG, AtEpoch, AtPlateau, AtRate, ObservationBoost
from kaisa.optim.gain import step_ratio
from tests.support.arsg_problems import farthest, mlp, perceptron, same, train

Trigger = AtRate | AtPlateau | AtEpoch


def small() -> ARSG:
    return ARSG([torch.ones(2, requires_grad=True)], lr=0.1, mu=0.05)


def epoch_of_boost(trigger: Trigger, measures: Sequence[float]) -> int | None:
    boost = ObservationBoost(small(), trigger)
    for measure in measures:
        boost.step(measure)
    return boost.boosted_at


def test_a_boost_doubles_the_observation_and_takes_the_step_size_that_belongs_to_it() -> None:
    optimizer = small()
    boost = ObservationBoost(optimizer, AtEpoch(2))
    rates, observations = [], []
    for _ in range(4):
        boost.step()
        rates.append(optimizer.param_groups[0]["lr"])
        observations.append(optimizer.param_groups[0]["mu"])
    assert rates == pytest.approx([0.1, 0.02483, 0.02483, 0.02483], rel=1e-3)
    assert observations == pytest.approx([0.05, 0.1, 0.1, 0.1])
    assert boost.boosted_at == 2
    assert boost.get_last_lr() == [rates[-1]]


def test_each_group_gets_the_ratio_of_its_own_decay() -> None:
    groups: list[dict[str, Any]] = [
        {"params": [torch.ones(1, requires_grad=True)], "beta": beta, "mu": mu}
        for beta, mu in ((0.999, 0.1), (0.9, 0.05))
    ]
    optimizer = RSG(groups, lr=1.0)
    ObservationBoost(optimizer, AtEpoch(1), multiple=3.0).step()
    expected = [step_ratio(0.999, 0.1, 0.3), step_ratio(0.9, 0.05, 0.15)]
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(expected)
    assert [group["mu"] for group in optimizer.param_groups] == pytest.approx([0.3, 0.15])


def test_a_given_factor_is_taken() -> None:
    optimizer = small()
    ObservationBoost(optimizer, AtEpoch(1), factor=0.25).step()
    assert optimizer.param_groups[0]["lr"] == 0.025


@pytest.mark.parametrize(
    ("measures", "expected"),
    [
        ([4.0, 2.0, 1.0, 0.5, 0.25, 0.125, 0.0625], None),  # a straight line of logarithms
        ([4.0, 2.0, 1.0, 0.8, 0.6], 5),  # the second window falls by 0.6 where the first fell by 0.25
        ([4.0, 3.9, 3.8, 2.0, 1.0, 0.9, 0.8], 7),  # a slow first window is not the measure
        ([4.0, 2.0, 1.0, 5.0, 7.0], 5),  # rising is slow
        ([4.0, 3.0], None),
        ([math.nan] * 7, None),
    ],
)
def test_the_rate_that_has_halved_boosts_at_the_end_of_a_window(measures: list[float], expected: int | None) -> None:
    assert epoch_of_boost(AtRate(window=2), measures) == expected


def test_the_rate_of_a_loss_does_not_depend_on_its_unit() -> None:
    measures = [4.0, 2.0, 1.0, 0.8, 0.6]
    assert epoch_of_boost(AtRate(2), measures) == epoch_of_boost(AtRate(2), [1000 * m for m in measures])


@pytest.mark.parametrize(
    ("trigger", "measures", "expected"),
    [
        (AtPlateau(patience=2), [1.0, 0.9, 0.9, 0.9, 0.9], 4),
        (AtPlateau(patience=2), [1.0, 0.9, 0.95, 0.8, 0.85, 0.9], 6),
        (AtPlateau(patience=2, threshold=0.01), [1.0, 0.995, 0.993], 3),
        (AtPlateau(patience=2, threshold=0.001), [1.0, 0.995, 0.993], None),
        (AtPlateau(patience=1, better="higher"), [0.5, 0.6, 0.6], 3),
        (AtPlateau(patience=1, better="higher"), [0.5, 0.6, 0.7], None),
        (AtPlateau(patience=3), [1.0, 1.0, 1.0], None),
        (AtPlateau(patience=2), [1.0, math.nan, math.nan], 3),
        (AtPlateau(patience=2), [-1.0, -1.1, -1.1, -1.1], 4),
    ],
)
def test_a_plateau_boosts(trigger: AtPlateau, measures: list[float], expected: int | None) -> None:
    assert epoch_of_boost(trigger, measures) == expected


def test_there_is_one_boost_even_if_the_plateau_lasts() -> None:
    optimizer = small()
    boost = ObservationBoost(optimizer, AtPlateau(patience=1))
    for _ in range(10):
        boost.step(1.0)
    assert boost.boosted_at == 2
    assert optimizer.param_groups[0]["mu"] == 0.1


def test_a_measure_may_be_a_tensor() -> None:
    boost = ObservationBoost(small(), AtPlateau(patience=1))
    boost.step(torch.tensor(0.25))
    assert boost.measures == [0.25]


def test_the_decay_of_another_scheduler_goes_on_from_the_boosted_rate() -> None:
    optimizer = small()
    decay = lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.1)
    boost = ObservationBoost(optimizer, AtEpoch(1))
    optimizer.step()
    for _ in range(2):
        decay.step()
        boost.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.2483 * 0.1, rel=1e-3)


def make_lambda(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    return lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.9**epoch)


def make_sequence(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    return lr_scheduler.SequentialLR(optimizer, [make_lambda(optimizer), make_lambda(optimizer)], milestones=[3])


def make_one_cycle(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    return lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10, cycle_momentum=False)


@pytest.mark.parametrize("make", [make_lambda, make_sequence, make_one_cycle])
def test_schedulers_that_keep_a_base_rate_follow_when_they_are_named(make: Any) -> None:
    plain, boosted = small(), small()
    schedule, other = make(plain), make(boosted)
    boost = ObservationBoost(boosted, AtEpoch(2), schedulers=[other])
    for optimizer in (plain, boosted):
        optimizer.step()
    for epoch in range(8):
        schedule.step()
        boost.step()
        other.step()
        ratio = step_ratio(0.999, 0.05, 0.1) if epoch >= 1 else 1.0
        assert boosted.param_groups[0]["lr"] == pytest.approx(ratio * plain.param_groups[0]["lr"])


@pytest.mark.parametrize("stop", [0, 2, 3, 6])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(stop: int) -> None:
    def epochs(parameters: list[torch.Tensor], boost: ObservationBoost, chosen: range) -> None:
        for epoch in chosen:
            losses = train(parameters, boost.optimizer, range(3 * epoch, 3 * epoch + 3))
            boost.step(sum(losses) / 3)

    whole, stopped = perceptron(), perceptron()
    uninterrupted = ObservationBoost(ARSG(whole, 0.05, mu=0.05), AtPlateau(patience=1, threshold=0.02))
    epochs(whole, uninterrupted, range(8))
    assert uninterrupted.boosted_at in range(2, 7)
    first = ObservationBoost(ARSG(stopped, 0.05, mu=0.05), uninterrupted.trigger)
    epochs(stopped, first, range(stop))
    file = io.BytesIO()
    torch.save([first.optimizer.state_dict(), first.state_dict()], file)
    file.seek(0)
    resumed = ObservationBoost(ARSG(stopped, 0.05, mu=0.05), uninterrupted.trigger)
    for part, state in zip((resumed.optimizer, resumed), torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    epochs(stopped, resumed, range(stop, 8))
    assert same(whole, stopped)
    assert resumed.state_dict() == uninterrupted.state_dict()


def test_a_boosted_run_ends_elsewhere() -> None:
    plain, boosted = perceptron(), perceptron()
    train(plain, ARSG(plain, 0.05, mu=0.05), range(6))
    optimizer = ARSG(boosted, 0.05, mu=0.05)
    ObservationBoost(optimizer, AtEpoch(1)).step()
    train(boosted, optimizer, range(6))
    assert farthest(plain, boosted) > 1e-3
    assert math.isfinite(float(mlp(boosted, 0).detach()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"multiple": 1.0}, r"multiple is 1\.0; give a number above 1"),
        ({"factor": 0.0}, r"factor is 0\.0; give a number above 0 and at most 1"),
        ({"trigger": "rate"}, r"trigger is 'rate'; give AtRate\(\), AtPlateau\(\) or AtEpoch\(6\)"),
        ({"multiple": 20.0}, r"mu = 0\.05 times multiple is 1\.0; give a number of at least 0 and below 1"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ObservationBoost(small(), **options)


def test_triggers_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="window is 0; give a whole number"):
        AtRate(window=0)
    with pytest.raises(ConfigurationError, match=r"share is 1\.5; give"):
        AtRate(share=1.5)
    with pytest.raises(ConfigurationError, match="better is 'more'; give 'lower' or 'higher'"):
        AtPlateau(better="more")
    with pytest.raises(ConfigurationError, match="patience is 0; give"):
        AtPlateau(patience=0)
    with pytest.raises(ConfigurationError, match="epoch is -1; give"):
        AtEpoch(-1)


def test_an_optimizer_without_observation_is_refused() -> None:
    w = torch.ones(1, requires_grad=True)
    with pytest.raises(
        ConfigurationError, match=r"AdamW has no observation factor mu to raise; give kaisa\.optim\.RSG"
    ):
        ObservationBoost(torch.optim.AdamW([w]))
    with pytest.raises(ConfigurationError, match=r"mu is 0\.0; give an observation factor above 0, such as 0\.05"):
        ObservationBoost(RSG([w], 0.1, mu=0.0))


def test_a_missing_or_impossible_measure_is_refused_and_forgotten() -> None:
    boost = ObservationBoost(small(), AtRate(window=1))
    with pytest.raises(
        ConfigurationError, match=r"AtRate\(window=1, share=0\.5\) needs a number each epoch; call step"
    ):
        boost.step()
    with pytest.raises(ConfigurationError, match=r"the loss is -1\.0; AtRate compares logarithms"):
        boost.step(-1.0)
    assert boost.measures == []


def test_a_foreign_state_is_refused() -> None:
    with pytest.raises(StateError, match="no state of ObservationBoost: it holds last_epoch"):
        ObservationBoost(small()).load_state_dict({"last_epoch": 3})
