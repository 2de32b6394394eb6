"""Finished runs of every recipe, of models narrower than any that is worth training, on data that are made here."""

from __future__ import annotations

from collections.abc import Iterator
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


def train(recipe: str, folder: Path, *options: str) -> Path:
    """Train behind nothing but the first-order optimizer; later options outdo those of the recipe's tests."""
    data = ["--data", str(DATA[recipe](folder / "data"))] if recipe in DATA else []
    out = folder / "run"
    usual = ["train", "--recipe", recipe, *data, *OPTIONS[recipe], "--contestants", "first-order", "--threads", "1"]
    assert run([*usual, *options, "--output", str(out)]) == 0
    return out
