"""A resumed run is bitwise the run that was never stopped; a state that does not fit is refused."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kaisa
from kaisa.errors import StateError

OPTIONS = {"factor_update_steps": 2, "inv_update_steps": 5, "damping": 0.01, "kl_clip": 0.001}
STEPS, STOP = 13, 8  # stopped between two decompositions, at 5 and 10

VARIANTS = [
    pytest.param({}, id="eigen"),
    pytest.param({"solver": "cholesky"}, id="cholesky"),
    pytest.param({"solver": "ekfac"}, id="ekfac"),
    pytest.param({"solver": "sqrt_ekfac"}, id="sqrt_ekfac"),
    pytest.param({"solver": "warm_eigen"}, id="warm_eigen"),
    pytest.param({"spread_inverses": True}, id="spread"),
    pytest.param({"factor_examples": 0.5}, id="half_of_the_examples"),
    pytest.param({"fisher": "categorical"}, id="sampled_fisher"),
    pytest.param({"factor_scaling": "kaisa"}, id="kaisa_scaling"),
]


class Network(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(2, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.hidden = nn.Linear(4 * width, 5)
        self.twin = nn.Linear(5, 5)
        self.output = nn.Linear(5, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.convolution(x))).flatten(1)
        return self.output(torch.tanh(self.twin(torch.tanh(self.hidden(x)))))


class Training:
    """A model, an optimizer with momentum and K-FAC, that can be stopped and written to bytes."""

    def __init__(self, **options: object) -> None:
        torch.manual_seed(0)
        self.samples = "fisher" in options
        self.model = Network()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.kfac = kaisa.KFACPreconditioner(self.model, self.optimizer, **{**OPTIONS, **options})

    def run(self, steps: range) -> list[Tensor]:
        losses = []
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(6, 2, 4, 4, generator=generator)
            y = torch.randint(0, 3, (6,), generator=generator)
            self.optimizer.zero_grad()
            outputs = self.model(x)
            if self.samples:
                self.kfac.sample_fisher(outputs)
            loss = F.cross_entropy(outputs, y)
            loss.backward()
            self.kfac.step()
            self.optimizer.step()
            losses.append(loss.detach())
        return losses

    def saved(self) -> io.BytesIO:
        file = io.BytesIO()
        parts = (self.model, self.optimizer, self.kfac)
        torch.save([part.state_dict() for part in parts], file)
        file.seek(0)
        return file

    def load(self, file: io.BytesIO) -> None:
        states = torch.load(file, weights_only=True)
        for part, state in zip((self.model, self.optimizer, self.kfac), states, strict=True):
            part.load_state_dict(state)


@pytest.mark.parametrize("options", VARIANTS)
def test_a_resumed_run_is_bitwise_the_run_that_was_never_stopped(options: dict) -> None:
    whole = Training(**options)
    expected = whole.run(range(STEPS))
    first = Training(**options)
    first.run(range(STOP))
    file = first.saved()
    torch.manual_seed(99)
    second = Training(**options)
    second.load(file)
    assert second.run(range(STOP, STEPS)) == expected[STOP:]
    for found, parameter in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(found, parameter)
    for name, pair in whole.kfac.factors.items():
        for found, factor in zip(second.kfac.factors[name], pair, strict=True):
            assert torch.equal(found, factor)


@pytest.mark.parametrize("stop", range(1, STEPS))
def test_a_run_may_be_stopped_after_any_step(stop: int) -> None:
    expected = Training().run(range(STEPS))
    first = Training()
    first.run(range(stop))
    second = Training()
    second.load(first.saved())
    assert second.run(range(stop, STEPS)) == expected[stop:]


def test_a_state_of_no_steps_is_a_fresh_start() -> None:
    second = Training()
    second.load(Training().saved())
    assert second.run(range(STEPS)) == Training().run(range(STEPS))


def test_a_state_loaded_over_a_run_in_progress_forgets_that_run() -> None:
    first = Training()
    first.run(range(STOP))
    expected = Training().run(range(STEPS))
    second = Training()
    second.run(range(3))
    second.load(first.saved())
    assert second.run(range(STOP, STEPS)) == expected[STOP:]


def tensors_of(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_of(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_of(part)


def assert_identical(found: object, expected: object) -> None:
    if isinstance(expected, Tensor):
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, part in expected.items():
            assert_identical(found[key], part)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_identical(one, other)
    else:
        assert found == expected


def test_loading_does_not_change_its_argument_and_shares_no_memory_with_it() -> None:
    first = Training()
    first.run(range(STOP))
    state = first.kfac.state_dict()
    kept = copy.deepcopy(state)
    second = Training()
    second.kfac.load_state_dict(state)
    assert_identical(state, kept)
    second.run(range(STOP, STEPS))
    first.run(range(STOP, STEPS))
    assert_identical(state, kept)


def test_a_state_is_a_snapshot_that_later_steps_do_not_change() -> None:
    training = Training()
    training.run(range(STOP))
    state = training.kfac.state_dict()
    kept = copy.deepcopy(state)
    training.run(range(STOP, STEPS))
    assert_identical(state, kept)
    assert len(list(tensors_of(state))) > 10


def test_saving_and_loading_change_nothing_in_the_run_that_is_saved() -> None:
    expected = Training().run(range(STEPS))
    training = Training()
    losses = []
    for step in range(STEPS):
        losses += training.run(range(step, step + 1))
        training.kfac.load_state_dict(training.kfac.state_dict())
    assert losses == expected


def loaded_into(model: nn.Module, state: dict) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with kaisa.KFACPreconditioner(model, optimizer, **OPTIONS) as kfac:
        kfac.load_state_dict(state)


@pytest.fixture
def state() -> dict:
    training = Training()
    training.run(range(STOP))
    return training.kfac.state_dict()


class Other(nn.Module):
    """Differs from `Network` by a missing layer, a further layer and the shape of a third."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.hidden = nn.Linear(16, 7)
        self.further = nn.Linear(7, 5)
        self.output = nn.Linear(5, 3, bias=False)


def test_a_state_of_another_model_is_refused_with_every_difference(state: dict) -> None:
    with pytest.raises(StateError) as error:
        loaded_into(Other(), state)
    message = str(error.value)
    assert "twin" in message
    assert "further" in message
    assert "hidden" in message
    assert "convolution" not in message
    assert re.search(r"hidden.*\b5\b.*\b7\b", message)


def test_a_refused_state_leaves_the_run_as_it_was(state: dict) -> None:
    expected = Training().run(range(STEPS))
    training = Training()
    training.run(range(STOP))
    broken = copy.deepcopy(state)

    def drop_first_layer(value: object) -> bool:
        if isinstance(value, dict):
            if "convolution" in value:
                del value["convolution"]
                return True
            found = [drop_first_layer(part) for part in value.values()]
            return any(found)
        return False

    assert drop_first_layer(broken)
    with pytest.raises(StateError, match=r"convolution"):
        training.kfac.load_state_dict(broken)
    assert training.run(range(STOP, STEPS)) == expected[STOP:]


@pytest.mark.parametrize("bad", [{}, {"steps": 3}, {"something": 1}])
def test_a_dictionary_that_is_no_state_is_refused(bad: dict) -> None:
    with pytest.raises(StateError):
        Training().kfac.load_state_dict(bad)
