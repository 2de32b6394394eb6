"""Explanations side by side, each with the same figures of quality.

    compared = compare(model, inputs, ["gradcam", "lime"])
    compared.save("page.html")                          one page; .json for the figures
    measured = measure(model, explanation)              the same figures for one

A row "random" has values drawn at random: what a figure is worth is how far it lies from that one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kaisa.errors import ConfigurationError
from kaisa.explain import quality
from kaisa.explain.explanation import Explanation
from kaisa.explain.front import explain
from kaisa.explain.modules import device_of, undisturbed
from kaisa.explain.page import page
from kaisa.explain.plots import draw_curves
from kaisa.explain.registry import find
from kaisa.explain.subject import Inputs, Subject, read_inputs
from kaisa.explain.targets import Target, TargetLike

Model = nn.Module | Callable[..., Any]
Report = Callable[[int, int], None]
Figures = dict[str, tuple[float, ...]]

CURVES = ("deletion", "insertion")
OF_NUMBERS = ("infidelity", "max_sensitivity")
MEASURES = (*OF_NUMBERS, *CURVES, "randomisation")
MEASURED = ("map", "features", "tokens")  # kinds of explanations with one value for each place of an input
RANDOM = "random"
FORMAT = "kaisa comparison 1"


@dataclass(frozen=True)
class Effort:
    """How much is spent on the figures.

    Attributes:
        changes: random changes of each input, for the infidelity.
        noise: their size, in parts of the standard deviation of each input.
        neighbours: explanations of inputs nearby, for the sensitivity.
        radius: how near.
        points: of the curves.
        baseline: what takes the place of what is deleted; of tokens a number.
    """

    changes: int = 64
    noise: float = 0.2
    neighbours: int = 5
    radius: float = 0.02
    points: int = 21
    baseline: float = 0.0


@dataclass(frozen=True, eq=False)
class Comparison:
    """Explanations of the same inputs by several methods.

    Attributes:
        explanations: in the order of the methods; the last is random.
    """

    explanations: tuple[Explanation, ...]

    def __iter__(self) -> Iterator[Explanation]:
        return iter(self.explanations)

    def __getitem__(self, method: str) -> Explanation:
        return {explanation.method: explanation for explanation in self.explanations}[method]

    def figures(self) -> dict[str, dict[str, float]]:
        """Return the mean of every figure over the inputs, by method."""
        return {
            explanation.method: {name: sum(each) / len(each) for name, each in explanation.quality.items() if each}
            for explanation in self.explanations
        }

    def __str__(self) -> str:
        table = self.figures()
        names = list(dict.fromkeys(name for figures in table.values() for name in figures))
        width = max(map(len, table), default=0)
        lines = [" " * width + "".join(f"  {name:>{max(8, len(name))}}" for name in names)]
        for method, figures in table.items():
            cells = (f"{figures[name]:.3g}" if name in figures else "–" for name in names)
            row = "".join(f"  {cell:>{max(8, len(name))}}" for cell, name in zip(cells, names, strict=True))
            lines.append(f"{method:<{width}}{row}")
        return "\n".join(lines)

    def html(self, title: str = "Explanations side by side") -> str:
        """Return one page with all explanations, their figures and their curves."""
        shown = sum(explanation.method != RANDOM for explanation in self.explanations)
        return page(self.explanations, title, lead=_lead(self.explanations, shown), curves=self._curves())

    def save(self, path: str | Path) -> Path:
        """Write a page (`.html`) or the figures alone (`.json`).

        Raises:
            ConfigurationError: the suffix is none of these.
        """
        path = Path(path)
        if path.suffix not in (".html", ".json"):
            raise ConfigurationError(f"{path.name} ends in {path.suffix!r}; give .html or .json")
        path.write_text(self.html() if path.suffix == ".html" else self._json(), encoding="utf-8")
        return path

    def _json(self) -> str:
        return json.dumps({"format": FORMAT, "figures": self.figures()}, indent=1) + "\n"

    def _curves(self) -> bytes | None:
        curves = {
            kind: {
                explanation.method: (explanation.details["shares"], explanation.details[f"{kind}_curve"])
                for explanation in self.explanations
                if f"{kind}_curve" in explanation.details
            }
            for kind in CURVES
        }
        drawn = {kind: lines for kind, lines in curves.items() if lines}
        return draw_curves(drawn) if drawn else None


def compare(
    model: Model,
    inputs: Any,
    methods: Sequence[str],
    target: TargetLike = None,
    *,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    measures: Sequence[str] = MEASURES,
    effort: Effort | None = None,
    kind: str | None = None,
    seed: int = 0,
    batch_size: int = 64,
    progress: Report | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> Comparison:
    """Explains the same inputs by several methods and measures each explanation.

    Args:
        model: a module, or a function for methods that need no more.
        inputs: as for ``explain``.
        methods: names of local methods.
        target: as for ``explain``.
        options: options of methods, by the method's name.
        measures: names out of ``MEASURES``.
        effort: how much is spent on them.
        kind: as for ``explain``.
        seed: of everything random.
        batch_size: how many inputs the model sees at once.
        progress: told how many methods of how many are done.
        arguments: further arguments of the model.

    Raises:
        ConfigurationError: a name is unknown, or a method is not local.
        DataError: the inputs cannot be explained.
    """
    _check_names(methods, measures, options or {})
    shared: dict[str, Any] = {"kind": kind, "batch_size": batch_size, "arguments": arguments}
    effort = effort or Effort()
    found = []
    for done, name in enumerate(methods, 1):
        explanation = explain(
            model, inputs, name, target, seed=seed, progress=False, **shared, **dict((options or {}).get(name, {}))
        )
        found.append(measure(model, explanation, measures, target=target, effort=effort, **shared))
        if progress is not None:
            progress(done, len(methods))
    reference = _random(found, seed)
    if reference is not None:
        possible = [name for name in measures if name in ("infidelity", *CURVES)]
        found.append(measure(model, reference, possible, target=target, effort=effort, **shared))
    return Comparison(tuple(found))


def measure(
    model: Model,
    explanation: Explanation,
    measures: Sequence[str] = MEASURES,
    *,
    target: TargetLike = None,
    effort: Effort | None = None,
    kind: str | None = None,
    batch_size: int = 64,
    arguments: Mapping[str, Any] | None = None,
) -> Explanation:
    """Returns a local explanation with more figures of quality, those out of ``measures`` that apply to it.

    Infidelity and sensitivity need inputs of real numbers, the others are of tokens, too; sensitivity and randomisation
    explain again; randomisation needs a module.

    Args:
        model: what was explained.
        explanation: of it.
        measures: names out of ``MEASURES``.
        target: what was given to ``explain``, where that was a function.
        effort: how much is spent.
        kind: as for ``explain``.
        batch_size: how many inputs the model sees at once.
        arguments: further arguments of the model.

    Raises:
        ConfigurationError: a measure is unknown.
    """
    _check_measures(measures)
    inputs = explanation.inputs
    if not isinstance(inputs, Tensor) or explanation.kind not in MEASURED:
        return explanation
    if not inputs.is_floating_point():
        measures = [name for name in measures if name not in OF_NUMBERS]
    module = model if isinstance(model, nn.Module) else None
    read = read_inputs(inputs, kind, device_of(module))
    with undisturbed(module):
        subject = _subject(model, read, explanation, target, batch_size, arguments)
        examiner = Examiner(model, subject, explanation, target, effort or Effort(), kind, arguments)
        figures: Figures = {}
        details: dict[str, Any] = {}
        for name in measures:
            examiner.examine(name, figures, details)
    measured = explanation.with_quality(figures)
    return replace(measured, details={**measured.details, **details})


@dataclass(frozen=True)
class Examiner:
    """What measures one explanation."""

    model: Model
    subject: Subject
    explanation: Explanation
    target: TargetLike
    effort: Effort
    kind: str | None
    arguments: Mapping[str, Any] | None

    def examine(self, name: str, figures: Figures, details: dict[str, Any]) -> None:
        """Add a figure, and the curve that it comes from, unless it does not apply."""
        if name in CURVES:
            draw = quality.deletion if name == "deletion" else quality.insertion
            curve = draw(self._probability, self._inputs, self._values, self.effort.baseline, self.effort.points)
            figures[name] = _numbers(curve.area)
            details["shares"], details[f"{name}_curve"] = curve.shares, curve.scores
        elif name == "infidelity":
            effort, spread = self.effort, quality.spread(self._inputs, self._values)
            found = quality.relative_infidelity(
                self._score, self._inputs, spread, self._generator(), samples=effort.changes, noise=effort.noise
            )
            figures[name] = _numbers(found)
        elif name == "max_sensitivity":
            found = quality.max_sensitivity(
                lambda x: self._again(self.model, x),
                self._inputs,
                self._values,
                self._generator(),
                radius=self.effort.radius,
                samples=self.effort.neighbours,
            )
            figures[name] = _numbers(found)
        elif isinstance(self.model, nn.Module):
            other = self._again(quality.shuffled(self.model, self._generator()), self._inputs)
            figures[name] = _numbers(quality.rank_correlation(self._values, other))

    @property
    def _inputs(self) -> Tensor:
        return self.subject.inputs.tensor

    @property
    def _values(self) -> Tensor:
        return self.explanation.values.to(self._inputs.device)

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.explanation.seed)

    def _score(self, x: Tensor, rows: Tensor) -> Tensor:
        return self.subject.chosen(self.subject.scores(x), rows)

    def _probability(self, x: Tensor, rows: Tensor) -> Tensor:
        outputs = self.subject.scores(x)
        return self.subject.chosen(outputs if callable(self.target) else quality.probabilities(outputs), rows)

    def _again(self, model: Model, inputs: Tensor) -> Tensor:
        """Return what the method says of other inputs, or of another model, about the same target."""
        explanation = self.explanation
        given = inputs.cpu().numpy() if self.subject.inputs.is_numpy else inputs
        return explain(
            model,
            given,
            explanation.method,
            self.target if explanation.target is None else list(explanation.target),
            kind=self.kind,
            seed=explanation.seed,
            batch_size=self.subject.batch_size,
            progress=False,
            arguments=self.arguments,
            **explanation.options,
        ).values.to(inputs.device)


def _subject(
    model: Model,
    inputs: Inputs,
    explanation: Explanation,
    target: TargetLike,
    batch_size: int,
    arguments: Mapping[str, Any] | None,
) -> Subject:
    module = model if isinstance(model, nn.Module) else None
    subject = Subject(module, model, inputs, batch_size=batch_size, arguments=dict(arguments or {}))
    wanted = target if explanation.target is None else list(explanation.target)
    return replace(subject, target=Target(wanted, subject.scores(inputs.tensor)))


def _random(explanations: Sequence[Explanation], seed: int) -> Explanation | None:
    """Return an explanation with random values, of the kind of the first that can be measured."""
    for explanation in explanations:
        if isinstance(explanation.inputs, Tensor) and explanation.kind in MEASURED:
            generator = torch.Generator().manual_seed(seed)
            values = torch.randn(explanation.values.shape, generator=generator)
            return replace(explanation, method=RANDOM, values=values, options={}, quality={}, details={})
    return None


def _numbers(figures: Tensor) -> tuple[float, ...]:
    return tuple(figures.detach().cpu().double().tolist())


def _lead(explanations: Sequence[Explanation], methods: int) -> str:
    inputs = explanations[0].inputs
    count = len(inputs) if inputs is not None else 0
    return f"{methods} methods, {count} input{'s' if count != 1 else ''}; figures are means over the inputs."


def _check_names(methods: Sequence[str], measures: Sequence[str], options: Mapping[str, object]) -> None:
    if isinstance(methods, str) or not methods:
        raise ConfigurationError(f"methods is {methods!r}; give a list of names")
    for name in methods:
        if find(name).scope != "local":
            raise ConfigurationError(f"{name} is not local; inputs are compared by local methods")
    strangers = [name for name in options if name not in methods]
    if strangers:
        raise ConfigurationError(f"there are options of {', '.join(strangers)}, which is not among the methods")
    _check_measures(measures)


def _check_measures(measures: Sequence[str]) -> None:
    unknown = [name for name in measures if name not in MEASURES]
    if unknown:
        raise ConfigurationError(f"unknown measure {unknown[0]!r}; choose from {', '.join(MEASURES)}")
