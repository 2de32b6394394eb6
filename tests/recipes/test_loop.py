from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from kaisa.errors import StateError
from kaisa.recipes.batches import ImageBatches, ImageTests
from kaisa.recipes.contestants import Contestant, Preconditioning
from kaisa.recipes.loop import Training, evaluate, load, random_state, save, set_random_state, warm_up
from kaisa.recipes.tasks import Lesson

EPOCHS = 4
PRECONDITIONINGS = {
    "sgd": Contestant("sgd", 0.05),
    "adamw": Contestant("adamw", 0.005),
    "sgd + K-FAC": Contestant("sgd", 0.05, preconditioning=Preconditioning(0.03, 2, 4)),
    "adahessian": Contestant("adahessian", 0.05),
    "rsg": Contestant("rsg", 0.5),
    "arsg + K-FAC": Contestant("arsg", 0.002, preconditioning=Preconditioning(0.03, 2, 4)),
    "adamw + K-FAC": Contestant("adamw", 0.005, preconditioning=Preconditioning(0.03, 2, 4)),
}

Start = Callable[[], Training]


@pytest.fixture(params=PRECONDITIONINGS.values(), ids=PRECONDITIONINGS)
def contestant(request: pytest.FixtureRequest) -> Contestant:
    found = request.param
    assert isinstance(found, Contestant)
    return found


@pytest.fixture
def start(contestant: Contestant, lesson: Lesson) -> Iterator[Start]:
    """Start trainings that are closed at the end of the test."""
    started: list[Training] = []

    def begin() -> Training:
        started.append(Training.start(contestant, lesson, EPOCHS))
        return started[-1]

    yield begin
    for training in started:
        training.close()


def figures(training: Training) -> list[tuple[float, ...]]:
    """Return all of the history but its seconds."""
    return [(e.number, e.train_loss, e.train_score, e.test_loss, e.test_score) for e in training.history]


def weights(training: Training) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in training.model.state_dict().values()])


def test_the_same_seed_gives_the_same_training_bit_for_bit(start: Start) -> None:
    first, second = start(), start()
    for training in (first, second):
        while not training.is_finished:
            training.epoch()
    assert figures(first) == figures(second)
    assert torch.equal(weights(first), weights(second))


@pytest.mark.parametrize("stop", [0, 1, 3, 4])
def test_a_resumed_training_is_the_one_that_was_never_stopped(start: Start, tmp_path: Path, stop: int) -> None:
    whole, stopped = start(), start()
    for _ in range(EPOCHS):
        whole.epoch()
    for _ in range(stop):
        stopped.epoch()
    save(stopped, tmp_path / "checkpoint.pt")
    stopped.close()
    torch.manual_seed(99)
    resumed = start()
    load(resumed, tmp_path / "checkpoint.pt")
    while not resumed.is_finished:
        resumed.epoch()
    assert figures(resumed) == figures(whole)
    assert torch.equal(weights(resumed), weights(whole))


def test_training_lowers_the_loss(start: Start) -> None:
    training = start()
    before, _ = evaluate(training.model, training.lesson).means()
    for _ in range(EPOCHS):
        training.epoch()
    assert training.history[-1].test_loss < before


def test_warming_up_leaves_no_trace_on_a_training(start: Start) -> None:
    plain, warmed = start(), start()
    expected = plain.epoch()
    warm_up(start())
    assert replace(warmed.epoch(), seconds=0) == replace(expected, seconds=0)


def test_contestants_start_from_the_same_weights(lesson: Lesson) -> None:
    started = [Training.start(contestant, lesson, EPOCHS) for contestant in PRECONDITIONINGS.values()]
    for training in started:
        training.close()
    assert all(torch.equal(weights(training), weights(started[0])) for training in started)


def test_evaluation_counts_every_image_once(batches: ImageBatches, lesson: Lesson) -> None:
    model, lesson = lesson.build(), replace(lesson, tests=ImageTests(batches.images, batches.normalize, size=7))
    outputs = model(batches.normalize(batches.images.pixels)).detach()
    labels = batches.images.labels
    loss, (accuracy,) = evaluate(model, lesson).means()
    assert loss == pytest.approx(float(functional.cross_entropy(outputs, labels)), rel=1e-5)
    assert accuracy == pytest.approx(float((outputs.argmax(1) == labels).float().mean()))


def test_the_watcher_hears_the_running_means(start: Start) -> None:
    told: list[tuple[float, float]] = []
    training = start()
    epoch = training.epoch(lambda loss, accuracy: told.append((loss, accuracy)))
    assert len(told) == len(training.batches)
    assert told[-1] == (epoch.train_loss, epoch.train_score)


def test_seconds_add_up_over_epochs(start: Start) -> None:
    training = start()
    seconds = [training.epoch().seconds for _ in range(3)]
    assert 0 < seconds[0] < seconds[1] < seconds[2]


def test_the_peak_of_memory_is_that_of_training_over_all_epochs_and_no_evaluation(
    lesson: Lesson, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    of_training, of_evaluation = iter([20, 50, 30, 10]), iter([900] * 4)

    def filling(function: Callable[..., Any], sizes: Iterator[int]) -> Callable[..., Any]:
        return lambda *arguments: (held.append(next(sizes)), function(*arguments))[1]

    monkeypatch.setattr("kaisa.recipes.loop.reset_peak_memory", lambda device: held.clear())
    monkeypatch.setattr("kaisa.recipes.loop.measure_peak_memory", lambda device: max(held))
    monkeypatch.setattr("kaisa.recipes.loop.evaluate", filling(evaluate, of_evaluation))
    monkeypatch.setattr(Training, "_train", filling(Training._train, of_training))
    first, second = (Training.start(PRECONDITIONINGS["sgd"], lesson, EPOCHS) for _ in range(2))
    for expected in (20, 50):
        first.epoch()
        assert first.peak_memory == expected
    save(first, tmp_path / "checkpoint.pt")
    load(second, tmp_path / "checkpoint.pt")
    for _ in range(2):
        second.epoch()
        assert second.peak_memory == 50


def test_the_checkpoint_of_another_contestant_is_refused(start: Start, tmp_path: Path) -> None:
    save(start(), tmp_path / "checkpoint.pt")
    other = start()
    other.lesson = replace(other.lesson, batches=replace(other.batches, seed=other.batches.seed + 1))
    with pytest.raises(StateError, match=r"the checkpoint is of .* 3.*, expected .* 4"):
        load(other, tmp_path / "checkpoint.pt")


def test_the_checkpoint_of_an_earlier_version_is_refused(start: Start) -> None:
    training = start()
    state = training.state_dict()
    state["random"] = state.pop("ranks")[0]["random"]["cpu"]
    with pytest.raises(StateError, match=r"the checkpoint is of an earlier version, .*; start the run anew"):
        training.load_state_dict(state)


def test_the_checkpoint_of_another_model_is_refused(start: Start) -> None:
    training = start()
    state = training.state_dict()
    state["model"]["other.weight"] = torch.zeros(3)
    with pytest.raises(StateError, match=r'of another model than .*: .*Unexpected key.* "other\.weight"'):
        training.load_state_dict(state)


def test_the_checkpoint_of_two_ranks_is_refused_by_one(start: Start) -> None:
    training = start()
    state = training.state_dict()
    state["ranks"] *= 2
    before = weights(training).clone()
    state["model"] = {name: tensor + 1 for name, tensor in state["model"].items()}
    with pytest.raises(StateError, match="of 2 ranks, but there are 1"):
        training.load_state_dict(state)
    assert torch.equal(weights(training), before)


def test_the_random_numbers_of_a_graphics_processor_go_on_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a second generator in the place of the device's, so that no device is needed."""
    device, drawn = torch.device("cuda", 1), torch.Generator().manual_seed(7)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda asked: drawn.get_state() if asked == device else None)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, asked: asked == device and drawn.set_state(state))
    state = random_state(device)
    expected = torch.rand(3), torch.rand(3, generator=drawn)
    set_random_state(state, device)
    assert torch.equal(torch.rand(3), expected[0])
    assert torch.equal(torch.rand(3, generator=drawn), expected[1])


def test_an_interrupted_save_keeps_the_last_checkpoint(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = start()
    save(training, tmp_path / "checkpoint.pt")
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def write_half(state: object, path: Path) -> None:
        path.write_bytes(before[: len(before) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", write_half)
    with pytest.raises(KeyboardInterrupt):
        save(training, tmp_path / "checkpoint.pt")
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2  # the checkpoint and the folder of images


@pytest.mark.parametrize("name", ["sgd", "sgd + K-FAC"])
def test_mixed_precision_computes_in_bfloat16_and_keeps_weights_in_float32(name: str, lesson: Lesson) -> None:
    mixed = replace(lesson, dtype=torch.bfloat16)
    trainings = [Training.start(PRECONDITIONINGS[name], each, EPOCHS) for each in (lesson, mixed)]
    inputs, targets = next(lesson.batches.epoch(0))
    plain, rough = (training.step(inputs, targets) for training in trainings)
    for training in trainings:
        training.close()
    assert (plain[1].dtype, rough[1].dtype) == (torch.float32, torch.bfloat16)
    assert rough[0].dtype == torch.float32
    assert all(weight.dtype == torch.float32 for weight in trainings[1].model.parameters())
    torch.testing.assert_close(rough[0], plain[0], rtol=2e-2, atol=0)
