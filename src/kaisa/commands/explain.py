"""`kaisa explain`: what a trained model looks at, as one page, a picture or JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

from kaisa.commands.arguments import check_writable, option
from kaisa.errors import ConfigurationError, DataError
from kaisa.explain import Comparison, Curvature, Examples, Explanation, compare, methods
from kaisa.explain import explain as explained
from kaisa.explain.influence import cross_entropy, sample_labels
from kaisa.kfac import LayerOptions, mean_factors
from kaisa.recipes.catalogue import IMAGES
from kaisa.recipes.data import ImageData
from kaisa.recipes.programs import SUFFIX, Program, read_program
from kaisa.recipes.trained import Trained, as_inputs, read_image, read_trained

WHAT = "What is explained"
HOW = "How"
EXAMPLES = 1000
EXAMPLES_AT_ONCE = 100


def explain(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="Folder of a run, a weight file in it, or a program that torch.export saved (.pt2)", show_default=False
        ),
    ],
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[INPUT]...",
            help="Image files, or numbers of images that the run was tested on",
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        str, option(f"One of {', '.join(methods())}; several with commas between, side by side", panel=HOW)
    ] = "integrated_gradients",
    target: Annotated[
        list[str] | None, option("Class, by name or number; the predicted one unless given", panel=WHAT)
    ] = None,
    set_: Annotated[
        list[str] | None, option("An option of the method, as NAME=VALUE; may be repeated", "--set", panel=HOW)
    ] = None,
    out: Annotated[Path, option("File that is written: .html, .png or .json [explanation.html]", panel=HOW)] = Path(
        "explanation.html"
    ),
    seed: Annotated[int, option("Of everything random [0]", panel=HOW)] = 0,
    examples: Annotated[
        int, option(f"influence: training images that are looked at [{EXAMPLES}]", panel=HOW)
    ] = EXAMPLES,
    trust: Annotated[
        bool,
        typer.Option("--trust", help="Read a .pt2 file although that can run code in it", rich_help_panel=WHAT),
    ] = False,
) -> int:
    """Show what a trained model looks at: one file that opens in any browser, without a network."""
    names = [name.strip() for name in method.split(",")]
    check_writable(out)
    known = methods()
    for name in names:
        if name not in known:
            raise ConfigurationError(f"unknown method {name!r}; choose from {', '.join(known)}")
    asked = Question(tuple(names), _options(set_ or []), seed, examples)
    source = _read_program(checkpoint, trust) if checkpoint.suffix == SUFFIX else _read_run(checkpoint)
    answer = asked.answer(source, tuple(inputs or ()), tuple(target or ()))
    answer.save(out)
    console = Console(highlight=False)
    console.print(str(answer) if isinstance(answer, Comparison) else _told(answer, source.classes), markup=False)
    console.print(f"written to {out}", markup=False, soft_wrap=True)
    return 0


@dataclass(frozen=True)
class Source:
    """A model that was read from a file.

    Attributes:
        model: of images from 0 to 1, or of whatever an exported program takes.
        shape: of one input.
        classes: names of the outputs; none where they are not known.
        run: the run that it comes from; None for a program.
    """

    model: nn.Module
    shape: tuple[int, ...]
    classes: tuple[str, ...]
    run: Trained | None

    def read(self, inputs: Sequence[str]) -> Tensor | None:
        """Read the inputs, image files and numbers of test images."""
        numbers = [name for name in inputs if name.isdigit() and not Path(name).exists()]
        tests = None
        if numbers:
            if self.run is None:
                raise DataError(f"input {numbers[0]} is a number, which only a run has images for; give an image file")
            tests = as_inputs(_images(self.run).test)
            _check_numbers(numbers, len(tests))
        found = [
            tests[int(name)][None] if tests is not None and name in numbers else self._image(name) for name in inputs
        ]
        return torch.cat(found) if found else None

    def _image(self, name: str) -> Tensor:
        if len(self.shape) != 3:
            raise DataError(f"the program takes {self.shape}, which is no image; explain it from Python")
        return read_image(Path(name), (self.shape[0], self.shape[1], self.shape[2]))

    def target(self, wanted: Sequence[str]) -> int | list[int] | None:
        """Return the numbers of classes, one or several."""
        found = [self._class(name) for name in wanted]
        return (found[0] if len(found) == 1 else found) if found else None

    def named(self, explanation: Explanation) -> Explanation:
        """Return the explanation with names of classes in the place of numbers, for those who look at it."""
        if explanation.target is None or not self.classes:
            return explanation
        names: dict[str, Any] = {"target_names": [self.classes[index] for index in explanation.target]}
        for sign in ("proponents", "opponents"):
            if f"{sign}_targets" in explanation.details:
                labels = explanation.details[f"{sign}_targets"]
                names[f"{sign}_names"] = [[self.classes[label] for label in row] for row in labels]
        return replace(explanation, details={**explanation.details, **names})

    def _class(self, name: str) -> int:
        if name in self.classes:
            return self.classes.index(name)
        if name.isdigit():
            return int(name)
        raise ConfigurationError(
            f"unknown target {name!r}; give a number, or one of {', '.join(self.classes) or 'none'}"
        )


@dataclass(frozen=True)
class Question:
    """What is asked of a model.

    Attributes:
        methods: names.
        options: of all these methods.
        seed: of everything random.
        examples: training images that influence looks at.
    """

    methods: tuple[str, ...]
    options: dict[str, Any]
    seed: int
    examples: int

    def answer(self, source: Source, inputs: Sequence[str], targets: Sequence[str]) -> Explanation | Comparison:
        """Explain by one method, or compare several."""
        known, target, read = methods(), source.target(targets), source.read(inputs)
        if len(self.methods) > 1:
            given = {
                name: {key: value for key, value in self.options.items() if key in known[name].options}
                for name in self.methods
            }
            strangers = [key for key in self.options if not any(key in chosen for chosen in given.values())]
            if strangers:
                raise ConfigurationError(f"none of the methods has an option {strangers[0]!r}")
            compared = compare(source.model, read, self.methods, target, options=given, seed=self.seed)
            return Comparison(tuple(source.named(explanation) for explanation in compared))
        name = self.methods[0]
        options = dict(self.options)
        if read is None and "input_shape" in known[name].options:
            options.setdefault("input_shape", source.shape)
        if source.run is not None and "low" in known[name].options:
            options = {"low": 0.0, "high": 1.0, **options}
        if name == "influence":
            options |= self._curvature(source)
        return source.named(explained(source.model, read, name, target, seed=self.seed, **options))

    def _curvature(self, source: Source) -> dict[str, Any]:
        """Make the factors and their correction over some of the images that the run has learned from."""
        if source.run is None:
            raise ConfigurationError("influence needs the training images; give the folder of a run")
        images = _images(source.run).train
        generator = torch.Generator().manual_seed(self.seed)
        rows = torch.randperm(len(images), generator=generator)[: self.examples]
        training = Examples(as_inputs(images)[rows], images.labels[rows])
        batches = training.inputs.split(EXAMPLES_AT_ONCE)
        factors = mean_factors(
            source.model, batches, fisher="categorical", layer_options=LayerOptions(norms=False), seed=self.seed
        )
        curvature = Curvature.of(source.model, factors).moments(
            source.model, cross_entropy, training, sample=sample_labels, generator=generator
        )
        return {"training": training, "curvature": curvature}


def _images(run: Trained) -> ImageData:
    data = run.read_data()
    assert isinstance(data, ImageData)  # the run's kind has seen to it
    return data


def _read_run(path: Path) -> Source:
    trained = read_trained(path)
    if trained.kind != IMAGES:
        raise ConfigurationError(f"the run is of {trained.kind}; classifiers of images can be explained so far")
    return Source(trained.model, trained.shape, trained.classes, trained)


def _read_program(path: Path, is_trusted: bool) -> Source:
    program: Program = read_program(path, is_trusted)
    return Source(program, program.shape, (), None)


def _options(given: Sequence[str]) -> dict[str, Any]:
    """Return NAME=VALUE as a mapping; values are JSON, and what is no JSON is a word."""
    result: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ConfigurationError(f"--set {text!r} is not NAME=VALUE")
        try:
            result[name] = json.loads(value)
        except ValueError:
            result[name] = value
    return result


def _check_numbers(numbers: Sequence[str], count: int) -> None:
    beyond = [name for name in numbers if int(name) >= count]
    if beyond:
        raise DataError(f"there is no test image {beyond[0]}; the run was tested on {count}, from 0 on")


def _told(explanation: Explanation, classes: Sequence[str]) -> str:
    """Return the explained classes and the figures, as a few lines."""
    lines = []
    if explanation.target is not None:
        names = [classes[index] if index < len(classes) else str(index) for index in explanation.target]
        lines.append(f"{explanation.method} of {', '.join(names)}")
    lines += [
        f"{name.replace('_', ' ')} {', '.join(f'{f:.3g}' for f in each)}" for name, each in explanation.quality.items()
    ]
    return "\n".join(lines or [explanation.method])
