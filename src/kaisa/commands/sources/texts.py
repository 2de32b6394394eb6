"""Language models, posed with the next token or a hidden one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from kaisa.commands.sources.posed import (
    INFLUENCE,
    LINEAR,
    SIGNS,
    Asked,
    Place,
    Posed,
    Source,
    one_or_all,
    refuse,
    stacked,
    tests_of,
)
from kaisa.errors import ConfigurationError, DataError
from kaisa.explain import Curvature, Examples, Explanation, Method, explain, methods
from kaisa.explain.texts import shown
from kaisa.kfac import mean_factors
from kaisa.recipes.tasks import IGNORED, MASKED_TOKEN
from kaisa.recipes.text import HIDDEN, UNITS, Vocabulary, read_text_file
from kaisa.recipes.trained import Trained

MASKS = re.compile(r"\[MASK\]|<mask>")
SUFFIX = ".txt"
TEXTS_AT_ONCE = 16


@dataclass(frozen=True)
class Texts(Source):
    """A language model: of the next token (gpt), or of hidden ones (bert)."""

    run: Trained

    @property
    def hides(self) -> bool:
        """Whether the model finds hidden tokens, and not each next one."""
        return self.run.options.task is MASKED_TOKEN

    def pose(self, inputs: Sequence[str], targets: Sequence[str], place: Place) -> Posed:
        refuse(replace(place, position=None), "texts have no pixels")
        vocabulary = self.run.vocabulary()
        if not inputs:
            raise DataError("there is no text; give one, a .txt file, or the number of a test text")
        tokens = stacked(inputs, lambda n: tests_of(self.run, n, "text"), lambda name: self._read(name, vocabulary))
        assert tokens is not None
        if len(targets) not in (0, 1, len(inputs)):
            raise ConfigurationError(f"there are {len(targets)} targets for {len(inputs)} texts; give one for each")
        position = self._position(tokens, place.position)
        if self.hides:
            tokens[:, position] = vocabulary.hidden
        target = one_or_all([_token(name, vocabulary) for name in targets])
        hook = self.run.model.register_forward_hook(_AtPosition(self._output(position)))
        names = tuple(tuple(shown(vocabulary.tokens[token]) for token in row) for row in tokens.tolist())
        labels = tuple(shown(token) for token in vocabulary.tokens)
        blank = self._blank(vocabulary)
        return Posed(self.run.model, tokens, target, labels, names, {"position": position}, blank, hook=hook)

    def options(self, method: Method, posed: Posed, given: Mapping[str, Any]) -> dict[str, Any]:
        if method.scope == "global" or method.name == "scorecam":
            able = [name for name, other in methods().items() if other.scope == "local" and name != "scorecam"]
            raise ConfigurationError(
                f"{method.name} needs inputs that can change a little, and tokens cannot; for texts there are "
                f"{', '.join(able)} and influence"
            )
        vocabulary, usual = self.run.vocabulary(), {}
        if "hide" in method.options:
            usual["hide"] = self._blank(vocabulary)
        chosen = {**usual, **given}
        for name in ("hide", "baseline"):
            if isinstance(chosen.get(name), str):
                chosen[name] = _token(chosen[name], vocabulary)
        return chosen

    def influence(self, posed: Posed, asked: Asked) -> Explanation:
        """Explain by training texts; the curvature is that of the empirical Fisher, by what they themselves say."""
        assert posed.inputs is not None  # there is no text without
        wanted = self._wanted(posed, posed.inputs)
        targets = torch.full_like(posed.inputs, IGNORED)
        targets[:, self._output(posed.details["position"])] = wanted
        training = self._training(asked)
        assert posed.hook is not None  # `pose` has made it
        posed.hook.remove()  # the loss is of all positions
        model = posed.model
        with sdpa_kernel(SDPBackend.MATH):  # the other kernels have no gradients of each example
            explanation = explain(
                model,
                posed.inputs,
                INFLUENCE,
                seed=asked.seed,
                batch_size=TEXTS_AT_ONCE,
                training=training,
                curvature=_curvature(model, training, asked),
                loss=_summed_loss,
                targets=targets,
                **asked.options,
            )
        texts = {f"{sign}_texts": self._joined(explanation.details[f"{sign}_inputs"]) for sign in SIGNS}
        asked_for = {name: value for name, value in explanation.options.items() if name not in ("loss", "targets")}
        details = {**explanation.details, **texts}
        return replace(explanation, target=tuple(wanted.tolist()), options=asked_for, details=details)

    def _wanted(self, posed: Posed, tokens: Tensor) -> Tensor:
        """Return the explained token of each text."""
        if posed.target is not None:
            return torch.tensor(posed.target).expand(len(tokens))
        with torch.no_grad():
            scores: Tensor = posed.model(tokens.to(self.run.options.device))
        return scores.argmax(1).cpu()

    def _joined(self, sequences: Tensor) -> list[list[str]]:
        """Return sequences of tokens (texts, examples, positions) as texts of one line."""
        vocabulary = self.run.vocabulary()
        gap = " " if vocabulary.unit == "words" else ""
        line = str.maketrans({"\n": shown("\n")})
        return [
            [gap.join(vocabulary.tokens[token] for token in one).translate(line) for one in row]
            for row in sequences.tolist()
        ]

    def _training(self, asked: Asked) -> Examples:
        """Return sequences that the run has learned from, in the order of its first epoch."""
        inputs: list[Tensor] = []
        targets: list[Tensor] = []
        for x, y in self.run.read_data().lesson(self.run.options, asked.seed).batches.epoch(0):
            inputs.append(x)
            targets.append(y)
            if sum(map(len, inputs)) >= asked.examples:
                break
        return Examples(torch.cat(inputs)[: asked.examples], torch.cat(targets)[: asked.examples])

    def _blank(self, vocabulary: Vocabulary) -> int:
        """Return the token that stands for one that is taken away."""
        return vocabulary.hidden if self.hides else vocabulary.unknown

    def _output(self, position: int) -> int:
        """Return which output speaks of the token at a position."""
        return position if self.hides else position - 1

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


class _AtPosition:
    """A hook that keeps of the scores (inputs, positions, tokens) those at one position."""

    def __init__(self, position: int) -> None:
        self._position = position

    def __call__(self, module: nn.Module, inputs: Any, scores: Tensor) -> Tensor:
        return scores[:, self._position]


def _text(name: str) -> str:
    """Return the text of a file, without the end of its last line, or the words themselves."""
    if not name.endswith(SUFFIX):
        return name
    return read_text_file(Path(name)).removesuffix("\n").removesuffix("\r")


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


def _curvature(model: nn.Module, training: Examples, asked: Asked) -> Curvature:
    """Return the curvature of the loss over training texts, measured by their own tokens."""
    batches = zip(training.inputs.split(TEXTS_AT_ONCE), training.targets.split(TEXTS_AT_ONCE), strict=True)
    factors = mean_factors(model, batches, fisher="empirical", loss=_summed_loss, layer_options=LINEAR)
    return Curvature.of(model, factors).moments(
        model,
        _summed_loss,
        training,
        sample=None,
        generator=torch.Generator().manual_seed(asked.seed),
        batch_size=TEXTS_AT_ONCE,
        progress=asked.report,
    )


def _summed_loss(scores: Tensor, tokens: Tensor) -> Tensor:
    """Return the cross-entropy summed over all tokens that are to be predicted."""
    return functional.cross_entropy(scores.flatten(0, -2), tokens.flatten(), ignore_index=IGNORED, reduction="sum")
