"""What `kaisa explain` explains: a model that was read from a file, posed with inputs and targets as users name them.

    source    an input is                               a target is                     the explained score
    images    a file, or the number of a test image     a class                         its output
    masks     the same                                  the object or the background    its mean logit over a region
    texts     a text, its file, or the number of one    a token                         its logit at one position
    program   a file                                    the number of an output         that output

A model of masks or of texts is given a hook that makes of its outputs one score for each target, so that every method
sees a classifier, and layers keep their names.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kaisa.errors import ConfigurationError, DataError
from kaisa.explain import Curvature, Examples, Explanation, Method, methods
from kaisa.explain.influence import cross_entropy, sample_labels
from kaisa.explain.texts import shown
from kaisa.kfac import LayerOptions, mean_factors
from kaisa.recipes.catalogue import IMAGES, MASKED_IMAGES, TEXT
from kaisa.recipes.data import ImageData
from kaisa.recipes.programs import Program
from kaisa.recipes.tasks import MASKED_TOKEN
from kaisa.recipes.text import HIDDEN, UNITS, Vocabulary
from kaisa.recipes.trained import Trained, as_inputs, read_image
from kaisa.recipes.unet import GRAIN, LEVELS

EXAMPLES_AT_ONCE = 100
OBJECT, BACKGROUND = "object", "background"
SIDES = (BACKGROUND, OBJECT)
MASKS = re.compile(r"\[MASK\]|<mask>")
TEXT_SUFFIX = ".txt"


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
        if len(sides) != 4 or not all(side.strip().isdigit() for side in sides):
            raise ConfigurationError(f"--box {box!r} is not LEFT,TOP,RIGHT,BOTTOM in pixels")
        left, top, right, bottom = (int(side) for side in sides)
        if left >= right or top >= bottom:
            raise ConfigurationError(f"--box {box} has no pixels; RIGHT and BOTTOM are beyond the last ones")
        return cls(position, (left, top, right, bottom))


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
    """

    model: nn.Module
    inputs: Tensor | None
    target: int | list[int] | None
    labels: tuple[str, ...] = ()
    names: tuple[tuple[str, ...], ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)

    def named(self, explanation: Explanation) -> Explanation:
        """Return the explanation with names in the place of numbers, for those who look at it."""
        details = {**explanation.details, **self.details}
        if explanation.target is not None and self.labels:
            details["target_names"] = [self.labels[index] for index in explanation.target]
            for sign in ("proponents", "opponents"):
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

    def influence(self, posed: Posed, count: int, seed: int) -> dict[str, Any]:
        """Return what influence needs: training examples and the curvature over them.

        Raises:
            ConfigurationError: there are none.
        """
        raise ConfigurationError("influence needs the training images; give the folder of a run")


@dataclass(frozen=True)
class Pictures(Source):
    """A model of images.

    Attributes:
        model: of images from 0 to 1, or of whatever an exported program takes.
        shape: of one input.
        classes: names of the outputs; none where they are not known.
        run: the run that it comes from; None for a program.
    """

    model: nn.Module
    shape: tuple[int, ...]
    classes: tuple[str, ...] = ()
    run: Trained | None = None

    def pose(self, inputs: Sequence[str], targets: Sequence[str], place: Place) -> Posed:
        _refuse(place, "a classifier says one thing of a whole image")
        target = _one_or_all([self._class(name) for name in targets])
        return Posed(self.model, _stacked(inputs, self._test, self._image), target, self.classes)

    def options(self, method: Method, posed: Posed, given: Mapping[str, Any]) -> dict[str, Any]:
        return _of_pictures(method, posed, given, self.shape, is_bounded=self.run is not None)

    def influence(self, posed: Posed, count: int, seed: int) -> dict[str, Any]:
        """Make the factors and their correction over some of the images that the run has learned from."""
        if self.run is None:
            return super().influence(posed, count, seed)
        data = self.run.read_data()
        assert isinstance(data, ImageData)  # the run's kind has seen to it
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(len(data.train), generator=generator)[:count]
        training = Examples(as_inputs(data.train)[rows], data.train.labels[rows])
        batches = training.inputs.split(EXAMPLES_AT_ONCE)
        factors = mean_factors(
            self.model, batches, fisher="categorical", layer_options=LayerOptions(norms=False), seed=seed
        )
        curvature = Curvature.of(self.model, factors).moments(
            self.model, cross_entropy, training, sample=sample_labels, generator=generator
        )
        return {"training": training, "curvature": curvature}

    def _test(self, numbers: Sequence[str]) -> Tensor:
        if self.run is None:
            raise DataError(f"input {numbers[0]} is a number, which only a run has images for; give an image file")
        return _tests(self.run, numbers, "image")

    def _image(self, name: str) -> Tensor:
        if len(self.shape) != 3:
            raise DataError(f"the program takes {self.shape}, which is no image; explain it from Python")
        return read_image(Path(name), (self.shape[0], self.shape[1], self.shape[2]))

    def _class(self, name: str) -> int:
        if name in self.classes:
            return self.classes.index(name)
        if name.isdigit():
            return int(name)
        raise ConfigurationError(
            f"unknown target {name!r}; give a number, or one of {', '.join(self.classes) or 'none'}"
        )


@dataclass(frozen=True)
class Masks(Source):
    """A model that says of every pixel whether it is of the object.

    The score of the object is the mean logit over a region, that of the background its negative. The region is the box
    that is given, otherwise what the model takes for the target.
    """

    run: Trained

    def pose(self, inputs: Sequence[str], targets: Sequence[str], place: Place) -> Posed:
        _refuse(replace(place, box=None), "masks have no tokens")
        sides = [self._side(name) for name in targets]
        images = _stacked(inputs, lambda numbers: _tests(self.run, numbers, "image"), lambda n: self.run.image(Path(n)))
        region, words = self._region(images, sides, place)
        self.run.model.register_forward_hook(_OverRegion(region))
        target = _one_or_all(sides) if sides or place.box else SIDES.index(OBJECT)
        labels = tuple(f"{side}{words}" for side in SIDES)
        return Posed(self.run.model, images, target, labels)

    def options(self, method: Method, posed: Posed, given: Mapping[str, Any]) -> dict[str, Any]:
        if method.scope == "examples":
            raise ConfigurationError(f"{method.name} is of classes and tokens; of masks it is asked from Python")
        if "octaves" in method.options and given.get("octaves", 1) != 1:
            raise ConfigurationError(f"octaves change the size of an image, which must stay a multiple of {GRAIN} here")
        channels, height, width = self.run.shape
        usual: dict[str, Any] = {"octaves": 1} if "octaves" in method.options else {}
        if method.needs == "layer" and method.scope == "local":
            usual = {"layer": f"down.{LEVELS - 1}"}  # the narrowest, as in Seg-Grad-CAM (arXiv 2002.11434)
        shape = (channels, height // GRAIN * GRAIN, width // GRAIN * GRAIN)
        return _of_pictures(method, posed, {**usual, **given}, shape, is_bounded=True)

    def _side(self, name: str) -> int:
        if name not in SIDES:
            raise ConfigurationError(f"unknown target {name!r}; a mask has {OBJECT} and {BACKGROUND}")
        return SIDES.index(name)

    def _region(self, images: Tensor | None, sides: Sequence[int], place: Place) -> tuple[Tensor | None, str]:
        """Return the weight of each pixel, None for all alike, and words for it."""
        if images is None:
            if place.box is not None:
                raise ConfigurationError("--box is of an image, and there is none")
            return None, ""
        if place.box is not None:
            return _boxed(place.box, images.shape[2:]), f" in the box {','.join(map(str, place.box))}"
        if len(images) > 1 or len(sides) > 1:
            raise ConfigurationError(
                "each image has an object of its own; explain one image and one target at a time, or give --box"
            )
        with torch.no_grad():
            logits = self.run.model(images.to(self.run.options.device))[0].cpu()
        side = (sides or [SIDES.index(OBJECT)])[0]
        found = logits > 0 if SIDES[side] == OBJECT else logits <= 0
        if not found.any():
            raise ConfigurationError(
                f"the model takes no pixel of this image for the {SIDES[side]}; give --box, or another target"
            )
        return found / found.sum(), f" over its {int(found.sum())} pixels"


@dataclass(frozen=True)
class Texts(Source):
    """A language model: of the next token (gpt), or of hidden ones (bert)."""

    run: Trained

    @property
    def hides(self) -> bool:
        """Whether the model finds hidden tokens, and not each next one."""
        return self.run.options.task is MASKED_TOKEN

    def pose(self, inputs: Sequence[str], targets: Sequence[str], place: Place) -> Posed:
        _refuse(replace(place, position=None), "texts have no pixels")
        vocabulary = self.run.vocabulary()
        if not inputs:
            raise DataError("there is no text; give one, a .txt file, or the number of a test text")
        tokens = _stacked(inputs, lambda n: _tests(self.run, n, "text"), lambda name: self._read(name, vocabulary))
        assert tokens is not None
        position = self._position(tokens, place.position)
        if self.hides:
            tokens[:, position] = vocabulary.hidden
        target = _one_or_all([_token(name, vocabulary) for name in targets])
        self.run.model.register_forward_hook(_AtPosition(position if self.hides else position - 1))
        names = tuple(tuple(shown(vocabulary.tokens[token]) for token in row) for row in tokens.tolist())
        labels = tuple(shown(token) for token in vocabulary.tokens)
        return Posed(self.run.model, tokens, target, labels, names, {"position": position})

    def options(self, method: Method, posed: Posed, given: Mapping[str, Any]) -> dict[str, Any]:
        if method.scope == "global" or method.name == "scorecam":
            able = [name for name, other in methods().items() if other.scope == "local" and name != "scorecam"]
            raise ConfigurationError(
                f"{method.name} needs inputs that can change a little, and tokens cannot; for texts there are "
                f"{', '.join(able)} and influence"
            )
        vocabulary, usual = self.run.vocabulary(), {}
        if "hide" in method.options:
            usual["hide"] = vocabulary.hidden if self.hides else vocabulary.unknown
        chosen = {**usual, **given}
        for name in ("hide", "baseline"):
            if isinstance(chosen.get(name), str):
                chosen[name] = _token(chosen[name], vocabulary)
        return chosen

    def _read(self, name: str, vocabulary: Vocabulary) -> Tensor:
        text, (longest,) = _text(name), self.run.shape
        found = _tokens(text, vocabulary.unit)
        unknown = [token for token in found if token not in vocabulary.tokens]
        if unknown:
            raise DataError(
                f"the model does not know {unknown[0]!r}; it has learned {len(vocabulary)} {vocabulary.unit}"
            )
        if not found:
            raise DataError(f"the text {text!r} has no {vocabulary.unit}")
        if len(found) > longest:
            raise DataError(f"the text has {len(found)} {vocabulary.unit}, and the model takes {longest} at most")
        numbers = torch.tensor([[vocabulary.tokens.index(token) for token in found]])
        if not self.hides and bool((numbers == vocabulary.hidden).any()):
            raise DataError("the text hides a token, and the model foretells the next one; leave the mask out")
        return numbers

    def _position(self, tokens: Tensor, wanted: int | None) -> int:
        """Return where the explained token is, for all inputs alike."""
        length = tokens.shape[1]
        first, last = (0, length - 1) if self.hides else (1, length)
        if wanted is not None:
            if not first <= wanted <= last:
                raise ConfigurationError(f"--position is {wanted}; the explained token is at one of {first} to {last}")
            return wanted
        if not self.hides:
            return length
        is_hidden = tokens == self.run.vocabulary().hidden
        firsts = {int(row.nonzero()[0]) if row.any() else last for row in is_hidden}
        if len(firsts) > 1:
            raise ConfigurationError(
                f"the first hidden tokens are at different positions ({', '.join(map(str, sorted(firsts)))}); "
                "explain one text at a time, or give --position"
            )
        return firsts.pop()


def source_of(run: Trained) -> Source:
    """Return the source that a run is.

    Raises:
        ConfigurationError: its kind cannot be explained.
    """
    if run.kind == IMAGES:
        return Pictures(run.model, run.shape, run.classes, run)
    if run.kind in (MASKED_IMAGES, TEXT):
        return Masks(run) if run.kind == MASKED_IMAGES else Texts(run)
    raise ConfigurationError(
        f"the run is of the recipe {run.options.recipe}, whose detections cannot be explained so far"
    )


def source_of_program(program: Program) -> Source:
    """Return the source that an exported program is."""
    return Pictures(program, program.shape)


class _OverRegion:
    """A hook that makes of logits (inputs, height, width) the scores of background and object over a region."""

    def __init__(self, region: Tensor | None) -> None:
        self._region = region

    def __call__(self, module: nn.Module, inputs: Any, logits: Tensor) -> Tensor:
        region = self._region
        mean = logits.mean((1, 2)) if region is None else (logits * region.to(logits)).sum((1, 2))
        return torch.stack([-mean, mean], 1)


class _AtPosition:
    """A hook that keeps of the scores (inputs, positions, tokens) those at one position."""

    def __init__(self, position: int) -> None:
        self._position = position

    def __call__(self, module: nn.Module, inputs: Any, scores: Tensor) -> Tensor:
        return scores[:, self._position]


def _refuse(place: Place, reason: str) -> None:
    for name in ("position", "box"):
        if getattr(place, name) is not None:
            raise ConfigurationError(f"--{name} has no use here: {reason}; leave it out")


def _one_or_all(targets: Sequence[int]) -> int | list[int] | None:
    return (targets[0] if len(targets) == 1 else list(targets)) if targets else None


def _stacked(
    inputs: Sequence[str], test: Callable[[Sequence[str]], Tensor], read: Callable[[str], Tensor]
) -> Tensor | None:
    """Return inputs, those that are numbers from what the run was tested on, the others from files or words.

    Raises:
        DataError: they are not of one size.
    """
    numbers = [name for name in inputs if name.isdigit() and not Path(name).exists()]
    tests = iter(test(numbers).split(1) if numbers else ())
    found = [next(tests) if name in numbers else read(name) for name in inputs]
    sizes = list(dict.fromkeys("x".join(map(str, one.shape[1:])) for one in found))
    if len(sizes) > 1:
        raise DataError(f"the inputs have different sizes, {sizes[0]} and {sizes[1]}; explain them one at a time")
    return torch.cat(found) if found else None


def _tests(run: Trained, numbers: Sequence[str], noun: str) -> Tensor:
    """Return some of the inputs that a run was tested on."""
    tests = torch.cat([inputs for inputs, _ in run.tests()]).cpu()
    beyond = [name for name in numbers if int(name) >= len(tests)]
    if beyond:
        raise DataError(f"there is no test {noun} {beyond[0]}; the run was tested on {len(tests)}, from 0 on")
    return tests[[int(name) for name in numbers]]


def _of_pictures(
    method: Method, posed: Posed, given: Mapping[str, Any], shape: tuple[int, ...], *, is_bounded: bool
) -> dict[str, Any]:
    """Return options by which pictures have the model's shape, and, where that is known, pixels from 0 to 1."""
    options = dict(given)
    if posed.inputs is None and "input_shape" in method.options:
        options.setdefault("input_shape", shape)
    if is_bounded and "low" in method.options:
        options = {"low": 0.0, "high": 1.0, **options}
    return options


def _boxed(box: tuple[int, int, int, int], size: Sequence[int]) -> Tensor:
    left, top, right, bottom = box
    height, width = size
    if right > width or bottom > height:
        raise ConfigurationError(f"--box {','.join(map(str, box))} is not inside an image of {width}x{height} pixels")
    region = torch.zeros(height, width)
    region[top:bottom, left:right] = 1 / ((right - left) * (bottom - top))
    return region


def _text(name: str) -> str:
    """Return the text of a file, without the end of its last line, or the words themselves."""
    if not name.endswith(TEXT_SUFFIX):
        return name
    try:
        return Path(name).read_text(encoding="utf-8").removesuffix("\n")
    except OSError as error:
        raise DataError(f"no such text file: {name}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not text in UTF-8") from error


def _tokens(text: str, unit: str) -> list[str]:
    """Return the tokens of a text in which a mask hides some."""
    first, *others = (list(UNITS[unit](part)) for part in MASKS.split(text))
    return first + [token for part in others for token in (HIDDEN, *part)]


def _token(name: str, vocabulary: Vocabulary) -> int:
    if name not in vocabulary.tokens:
        raise ConfigurationError(
            f"unknown target {name!r}; a token of this model is one of {len(vocabulary)} {vocabulary.unit}"
        )
    return vocabulary.tokens.index(name)
