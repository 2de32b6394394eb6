"""`kaisa explain`: what a trained model looks at, as one page, a picture or JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from kaisa.commands.arguments import check_writable, option
from kaisa.commands.sources import INFLUENCE, Asked, Place, Posed, Source, source_of, source_of_program
from kaisa.errors import ConfigurationError
from kaisa.explain import Comparison, Effort, Explanation, Method, compare, methods
from kaisa.explain import explain as explained
from kaisa.recipes.programs import SUFFIX, read_program
from kaisa.recipes.trained import read_trained

WHAT = "What is explained"
HOW = "How"
EXAMPLES = 1000


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
            help="Image files, texts or .txt files, or numbers of images or texts that the run was tested on",
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        str, option(f"One of {', '.join(methods())}; several with commas between, side by side", panel=HOW)
    ] = "integrated_gradients",
    target: Annotated[
        list[str] | None,
        option("Class by name or number, token, object or background; the predicted one unless given", panel=WHAT),
    ] = None,
    position: Annotated[
        int | None,
        option("Texts: which token is explained, from 0 [the next one, or the first that is hidden]", panel=WHAT),
    ] = None,
    box: Annotated[
        str | None,
        option(
            "Masks: LEFT,TOP,RIGHT,BOTTOM of the explained pixels [all that the model takes for the target]", panel=WHAT
        ),
    ] = None,
    set_: Annotated[
        list[str] | None, option("An option of the method, as NAME=VALUE; may be repeated", "--set", panel=HOW)
    ] = None,
    out: Annotated[Path, option("File that is written: .html, .png or .json [explanation.html]", panel=HOW)] = Path(
        "explanation.html"
    ),
    seed: Annotated[int, option("Of everything random [0]", panel=HOW)] = 0,
    examples: Annotated[
        int, option(f"influence: training examples that are looked at [{EXAMPLES}]", panel=HOW)
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
    if examples < 1:
        raise ConfigurationError(f"--examples is {examples}; give 1 or more")
    asked = Question(tuple(names), _read_options(set_ or []), seed, examples)
    place = Place.read(position, box)
    answer = asked.answer(_read(checkpoint, trust), tuple(inputs or ()), tuple(target or ()), place)
    answer.save(out)
    console = Console(highlight=False)
    console.print(str(answer) if isinstance(answer, Comparison) else _told(answer), markup=False, soft_wrap=True)
    console.print(f"written to {out}", markup=False, soft_wrap=True)
    return 0


@dataclass(frozen=True)
class Question:
    """What is asked of a model.

    Attributes:
        methods: names.
        options: of all these methods.
        seed: of everything random.
        examples: training examples that influence looks at.
    """

    methods: tuple[str, ...]
    options: dict[str, Any]
    seed: int
    examples: int

    def answer(
        self, source: Source, inputs: Sequence[str], targets: Sequence[str], place: Place
    ) -> Explanation | Comparison:
        """Explain by one method, or compare several."""
        known = [methods()[name] for name in self.methods]
        options = {method.name: self._options(method) for method in known}
        posed = source.pose(inputs, targets, place)
        options = {method.name: source.options(method, posed, options[method.name]) for method in known}
        if len(known) > 1:
            return self._compared(posed, options)
        (method,) = known
        if method.name == INFLUENCE:
            with _reporting("moments of the training examples") as report:
                return posed.named(
                    source.influence(posed, Asked(self.examples, self.seed, report, options[method.name]))
                )
        # Names of the tokens of a single text are names of features, too.
        names = posed.names[0] if len(posed.names) == 1 else posed.names
        explanation = explained(
            posed.model,
            posed.inputs,
            method.name,
            posed.target,
            names=names,
            seed=self.seed,
            batch_size=posed.batch_size,
            **options[method.name],
        )
        return posed.named(explanation)

    def _compared(self, posed: Posed, options: dict[str, dict[str, Any]]) -> Comparison:
        with _reporting("methods") as report:
            compared = compare(
                posed.model,
                posed.inputs,
                self.methods,
                posed.target,
                options=options,
                effort=Effort(baseline=posed.blank),
                seed=self.seed,
                batch_size=posed.batch_size,
                progress=report,
            )
        return Comparison(tuple(posed.named(explanation) for explanation in compared))

    def _options(self, method: Method) -> dict[str, Any]:
        """Return the options of one method: of several each takes those that it has."""
        if len(self.methods) == 1:
            return dict(self.options)
        known = [methods()[name].options for name in self.methods]
        strangers = [name for name in self.options if not any(name in options for options in known)]
        if strangers:
            raise ConfigurationError(f"none of the methods has an option {strangers[0]!r}")
        return {name: value for name, value in self.options.items() if name in method.options}


@contextmanager
def _reporting(noun: str) -> Iterator[Callable[[int, int], None]]:
    """Yield what is told how much of how much is done; it is shown where there is a terminal."""
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bars:
        bar = bars.add_task(noun, total=None)
        yield lambda done, total: bars.update(bar, completed=done, total=total)


def _read(path: Path, is_trusted: bool) -> Source:
    if path.suffix == SUFFIX:
        return source_of_program(read_program(path, is_trusted))
    return source_of(read_trained(path))


def _read_options(given: Sequence[str]) -> dict[str, Any]:
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


def _told(explanation: Explanation) -> str:
    """Return the explained outputs and the figures, as a few lines."""
    lines = []
    if explanation.target is not None:
        names = explanation.details.get("target_names", explanation.target)
        lines.append(f"{explanation.method} of {', '.join(map(str, names))}")
    lines += [
        f"{name.replace('_', ' ')} {', '.join(f'{f:.3g}' for f in each)}" for name, each in explanation.quality.items()
    ]
    return "\n".join(lines or [explanation.method])
