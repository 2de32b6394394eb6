"""Finished runs of every recipe, of models narrower than any that is worth training, on data that are made here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from kaisa.cli import run
from kaisa.recipes.catalogue import BERTS, DETECTORS, GPTS, UNETS
from kaisa.recipes.detectors import Detector
from kaisa.recipes.language_models import Gpt2, Width
from kaisa.recipes.masked_language import MaskedBert
from kaisa.recipes.unet import UNet
from tests.recipes.test_recipes import DATA, OPTIONS
from tests.support.detector import TinyDetector


@contextmanager
def narrow_models() -> Iterator[None]:
    """Let the recipes know the model "smallest" for a while."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(UNETS, "smallest", lambda shape: UNet(shape[0], 2))
        patch.setitem(GPTS, "smallest", lambda tokens, positions: Gpt2(Width(2, 16, 2, 32, tokens, positions)))
        patch.setitem(BERTS, "smallest", lambda tokens, positions: MaskedBert(Width(2, 16, 2, 32, tokens, positions)))
        patch.setitem(DETECTORS, "smallest", lambda classes, side: Detector(TinyDetector(classes)))
        yield


class Runs(dict[str, Path]):
    """Finished runs by recipe, each trained when it is first asked for."""

    def __init__(self, root: Path, options: Sequence[str] = ()) -> None:
        super().__init__()
        self._root = root
        self._options = options
        self.own: dict[str, Sequence[str]] = {}  # the options of recipes that do not go by the usual ones

    def __missing__(self, recipe: str) -> Path:
        folder = self._root / recipe
        folder.mkdir(exist_ok=True)
        self[recipe] = train(recipe, folder, *self.own.get(recipe, self._options))
        return self[recipe]


@contextmanager
def narrow_runs(root: Path, *options: str) -> Iterator[Runs]:
    """Let the recipes know the model "smallest" for a while, and give their runs."""
    with narrow_models():
        yield Runs(root, options)


def train(recipe: str, folder: Path, *options: str) -> Path:
    """Train behind nothing but the first-order optimizer; later options outdo those of the recipe's tests."""
    data = ["--data", str(DATA[recipe](folder / "data"))] if recipe in DATA else []
    out = folder / "run"
    usual = ["train", "--recipe", recipe, *data, *OPTIONS[recipe], "--contestants", "first-order", "--threads", "1"]
    assert run([*usual, *options, "--output", str(out)]) == 0
    return out
