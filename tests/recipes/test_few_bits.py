"""`--quantize`: what is trained in few bits, recorded and resumed."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kaisa.errors import ConfigurationError
from kaisa.quantize import quantized_layers
from kaisa.recipes.comparison import in_few_bits
from kaisa.recipes.contestants import Contestant, Preconditioning
from kaisa.recipes.loop import Training, load, save
from kaisa.recipes.options import Options
from kaisa.recipes.tasks import Lesson

KFAC = Contestant("sgd", 0.05, preconditioning=Preconditioning(0.03, 2, 4))


def few_bits(lesson: Lesson, quantize: str | None) -> Lesson:
    return in_few_bits(lesson, Options.complete({"quantize": quantize}))


def weights(model: nn.Module) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in model.state_dict().values()])


def test_a_lesson_builds_a_model_in_few_bits_where_that_is_asked_for(lesson: Lesson) -> None:
    assert few_bits(lesson, None) is lesson
    model = few_bits(lesson, "psq:5").build()
    layers = quantized_layers(model)
    assert {layer.quantization.branches.inputs for layer in layers.values()}.pop().bits == 5
    assert list(model.state_dict()) == list(lesson.build().state_dict())


def test_options_keep_what_is_quantised_through_json() -> None:
    options = Options.complete({"quantize": "bhq:5"})
    assert Options.from_json(options.to_json()) == options
    assert Options.complete({}).quantize is None


def test_a_word_for_nothing_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="quantize is 'int8'; give qat:BITS"):
        Options.complete({"quantize": "int8"})


def test_a_training_in_few_bits_is_the_same_when_it_is_stopped_and_resumed(lesson: Lesson, tmp_path: Path) -> None:
    lesson = few_bits(lesson, "bhq:4")
    whole, stopped, resumed = (Training.start(KFAC, lesson, 3) for _ in range(3))
    with closing(whole), closing(stopped), closing(resumed):
        torch.manual_seed(5)
        while not whole.is_finished:
            whole.epoch()
        torch.manual_seed(5)
        stopped.epoch()
        save(stopped, tmp_path / "checkpoint.pt")
        load(resumed, tmp_path / "checkpoint.pt")
        while not resumed.is_finished:
            resumed.epoch()
        assert torch.equal(weights(whole.model), weights(resumed.model))
        scores = [[(e.test_loss, e.test_score) for e in training.history] for training in (whole, resumed)]
        assert scores[0] == scores[1]  # with running ranges, which the checkpoint keeps too


def test_a_checkpoint_without_ranges_is_that_of_a_float_model(lesson: Lesson, tmp_path: Path) -> None:
    with closing(Training.start(KFAC, lesson, 3)) as training:
        training.epoch()
        state = training.state_dict()
        assert state.pop("ranges") == {}
        training.load_state_dict(state)


def test_fewer_bits_give_other_weights(lesson: Lesson) -> None:
    found = []
    for quantize in (None, "qat:8", "bhq:4"):
        with closing(Training.start(Contestant("sgd", 0.05), few_bits(lesson, quantize), 1)) as training:
            training.epoch()
            found.append(weights(training.model))
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0.1)
