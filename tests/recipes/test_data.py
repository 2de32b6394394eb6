"""What a recipe learns from and is tested on, as its options say."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from kaisa.errors import DataError
from kaisa.recipes import detection, images
from kaisa.recipes.data import Data, TextData, read_data
from kaisa.recipes.images import WORKERS
from kaisa.recipes.options import Options
from tests.recipes.conftest import write_discs, write_images, write_shapes


def write_letters(folder: Path, count: int) -> Path:
    folder.mkdir()
    (folder / "novel.txt").write_text("abcd" * count)
    return folder


WRITE: dict[str, Callable[[Path, int], Path]] = {
    "resnet": lambda folder, count: write_images(folder, {"cat": count, "dog": count}),
    "unet": write_discs,
    "gpt": write_letters,
    "bert": write_letters,
    "maskrcnn": write_shapes,
}
SMALL: dict[str, dict[str, Any]] = {
    "unet": {"crop": 16},
    "gpt": {"positions": 2},
    "bert": {"positions": 2},
    "maskrcnn": {"model": "smallest"},
}


@pytest.fixture(params=WRITE)
def recipe(request: pytest.FixtureRequest, smallest_detector: None) -> str:
    return str(request.param)


def complete(recipe: str, path: Path, **given: Any) -> Options:
    return Options.complete({"recipe": recipe, "data": str(path), "batch_size": 2, **SMALL.get(recipe, {}), **given})


def read(recipe: str, path: Path, **given: Any) -> Data:
    return read_data(complete(recipe, path, **given))


def sizes(data: Data) -> tuple[int, int]:
    """Return how much is learned from and tested on: images, or tokens."""
    parts = data.text if isinstance(data, TextData) else data
    return len(parts.train), len(parts.test)  # type: ignore[attr-defined]


def per_count(recipe: str) -> int:
    return {"resnet": 2, "gpt": 4, "bert": 4}.get(recipe, 1)


def test_test_data_are_those_that_are_named(recipe: str, tmp_path: Path) -> None:
    path, other = WRITE[recipe](tmp_path / "data", 10), WRITE[recipe](tmp_path / "other", 7)
    data = read(recipe, path, test_data=str(other))
    assert sizes(data) == (10 * per_count(recipe), 7 * per_count(recipe))
    assert data.source == "data, tested on other"


def test_test_data_beside_training_data_are_tested_on(recipe: str, tmp_path: Path) -> None:
    path = WRITE[recipe](tmp_path / "data-train", 10)
    held = sizes(read(recipe, path))
    assert sum(held) == 10 * per_count(recipe)
    assert held[1] > 0
    WRITE[recipe](tmp_path / "data-test", 7)
    data = read(recipe, path)
    assert sizes(data) == (10 * per_count(recipe), 7 * per_count(recipe))
    assert data.source == "data-train, tested on data-test"


@pytest.mark.parametrize(("name", "module"), [("resnet", images), ("unet", images), ("maskrcnn", detection)])
def test_as_many_threads_decode_as_are_asked_for(
    name: str, module: ModuleType, tmp_path: Path, smallest_detector: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pools: list[int] = []

    def pool(workers: int) -> ThreadPoolExecutor:
        pools.append(workers)
        return ThreadPoolExecutor(workers)

    monkeypatch.setattr(module, "ThreadPoolExecutor", pool)
    path = WRITE[name](tmp_path / "data", 6)
    for given, expected in (({"workers": 3}, 3), ({}, WORKERS)):
        options = complete(name, path, test_data=str(path), **given)
        next(iter(read_data(options).lesson(options, 0).batches.epoch(0)))
        assert set(pools) == {expected}
        pools.clear()


def test_black_masks_are_nothing_to_learn_from(tmp_path: Path) -> None:
    path = write_discs(tmp_path / "discs")
    for file in (path / "label").glob("*.png"):
        Image.new("L", (48, 32)).save(file)
    with pytest.raises(DataError, match=r"the masks in .*discs are black everywhere; draw the object white"):
        read("unet", path)


@pytest.mark.parametrize("name", ["gpt", "bert"])
def test_a_text_to_test_on_that_makes_no_sequence_is_refused(name: str, tmp_path: Path) -> None:
    path = write_letters(tmp_path / "data", 100)
    (tmp_path / "short.txt").write_text("abcdabcd")
    with pytest.raises(DataError, match=r"positions is 8, but there are 8 tokens to test on, .*; give fewer, or"):
        read(name, path, positions=8, test_data=str(tmp_path / "short.txt"))
    data = read(name, path, positions=7, test_data=str(tmp_path / "short.txt"))
    assert [inputs.shape for inputs, _ in data.lesson(complete(name, path, positions=7), 0).tests] == [(1, 7)]
