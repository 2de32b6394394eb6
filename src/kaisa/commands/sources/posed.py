"""What a command poses to a model: inputs and targets as users name them, read before anything is computed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kaisa.errors import ConfigurationError, DataError
from kaisa.explain import Explanation, Method
from kaisa.kfac import LayerOptions
from kaisa.recipes.trained import Trained

INFLUENCE, SIGNS = "influence", ("proponents", "opponents")
LINEAR = LayerOptions(norms=False)


@dataclass(frozen=True)
class Place:
    """Where in an input the explained output is, as a user says it; each is for one kind of source.

    Attributes:
        position: of the explained token, counted from 0.
        box: left, top, right and bottom of the explained pixels, in pixels; right and bottom are outside.
    """

    position: int | None = None
    box: tuple[int, int, int, int] | None = None

    @classmethod
    def read(cls, position: int | None, box: str | None) -> Place:
        """Read a box as four numbers with commas between.

        Raises:
            ConfigurationError: it is something else.
        """
        if box is None:
            return cls(position)
        sides = box.split(",")
        if len(sides) != 4 or not all(side.strip().isdecimal() for side in sides):
            raise ConfigurationError(f"--box {box!r} is not LEFT,TOP,RIGHT,BOTTOM in pixels")
        left, top, right, bottom = (int(side) for side in sides)
        if left >= right or top >= bottom:
            raise ConfigurationError(f"--box {box} has no pixels; RIGHT and BOTTOM are beyond the last ones")
        return cls(position, (left, top, right, bottom))


@dataclass(frozen=True)
class Asked:
    """How influence is asked for.

    Attributes:
        examples: training examples that are looked at.
        seed: of everything random.
        report: told how many of them are measured.
        options: of the method.
    """

    examples: int
    seed: int
    report: Callable[[int, int], None]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Posed:
    """What `kaisa.explain.explain` is called with, and words for what comes out.

    Attributes:
        model: of which the explained score is one output.
        inputs: None for what is made without any.
        target: numbers of outputs; None for the largest.
        labels: names of the outputs, in order; none where they are not known.
        names: tokens of each input, as they are shown.
        details: what an explanation should tell besides.
        blank: what stands for a place of an input that is taken away.
        batch_size: how many inputs the model sees at once.
        hook: what makes one score for each target of the model's own outputs.
    """

    model: nn.Module
    inputs: Tensor | None
    target: int | list[int] | None
    labels: tuple[str, ...] = ()
    names: tuple[tuple[str, ...], ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    blank: float = 0.0
    batch_size: int = 64
    hook: RemovableHandle | None = None

    def named(self, explanation: Explanation) -> Explanation:
        """Return the explanation with names in the place of numbers, for those who look at it."""
        details = {**explanation.details, **self.details}
        if explanation.target is not None and self.labels:
            details["target_names"] = [self.labels[index] for index in explanation.target]
            for sign in SIGNS:
                if f"{sign}_targets" in details and not self.names:
                    details[f"{sign}_names"] = [[self.labels[n] for n in row] for row in details[f"{sign}_targets"]]
        return replace(explanation, details=details, names=self.names or explanation.names)


class Source(ABC):
    """A model that was read from a file."""

    @abstractmethod
    def pose(self, inputs: Sequence[str], targets: Sequence[str], place: Place) -> Posed:
        """Read inputs and targets.

        Raises:
            ConfigurationError: a target or a place is not of the model.
            DataError: an input is missing, or the model cannot take it.
        """

    def options(self, method: Method, posed: Posed, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options of a method, with those that suit the source where none are given.

        Raises:
            ConfigurationError: the method is none for the source.
        """
        return dict(given)

    def influence(self, posed: Posed, asked: Asked) -> Explanation:
        """Explain by training examples.

        Raises:
            ConfigurationError: there are none.
        """
        raise ConfigurationError("influence needs the training images; give the folder of a run")


def refuse(place: Place, reason: str) -> None:
    """Refuse what a source has no use for.

    Raises:
        ConfigurationError: a position or a box is given.
    """
    for name in ("position", "box"):
        if getattr(place, name) is not None:
            raise ConfigurationError(f"--{name} has no use here: {reason}; leave it out")


def one_or_all(targets: Sequence[int]) -> int | list[int] | None:
    """Return targets as `kaisa.explain.explain` takes them; None for none."""
    return (targets[0] if len(targets) == 1 else list(targets)) if targets else None


def stacked(
    inputs: Sequence[str], test: Callable[[Sequence[str]], Tensor], read: Callable[[str], Tensor]
) -> Tensor | None:
    """Return inputs, those that are numbers from what the run was tested on, the others from files or words.

    Raises:
        DataError: they are not of one size.
    """
    numbers = [name for name in inputs if name.isdecimal() and not Path(name).exists()]
    tests = iter(test(numbers).split(1) if numbers else ())
    found = [next(tests) if name in numbers else read(name) for name in inputs]
    sizes = list(dict.fromkeys("x".join(map(str, one.shape[1:])) for one in found))
    if len(sizes) > 1:
        raise DataError(f"the inputs have different sizes, {sizes[0]} and {sizes[1]}; explain them one at a time")
    return torch.cat(found) if found else None


def tests_of(run: Trained, numbers: Sequence[str], noun: str) -> Tensor:
    """Return some of the inputs that a run was tested on.

    Raises:
        DataError: there are not so many.
    """
    tests = torch.cat([inputs for inputs, _ in run.tests()]).cpu()
    beyond = [name for name in numbers if int(name) >= len(tests)]
    if beyond:
        raise DataError(f"there is no test {noun} {beyond[0]}; the run was tested on {len(tests)}, from 0 on")
    return tests[[int(name) for name in numbers]]


def options_of_pictures(
    method: Method, posed: Posed, given: Mapping[str, Any], shape: tuple[int, ...], *, is_bounded: bool
) -> dict[str, Any]:
    """Return options by which pictures have the model's shape, and, where that is known, pixels from 0 to 1."""
    options = dict(given)
    if posed.inputs is None and "input_shape" in method.options:
        options.setdefault("input_shape", shape)
    if is_bounded and "low" in method.options:
        options = {"low": 0.0, "high": 1.0, **options}
    return options
