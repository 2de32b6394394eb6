"""Models made again from the folder of a run, of every recipe."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kaisa.cli import BAD_INPUT, run
from kaisa.errors import ConfigurationError, DataError, StateError
from kaisa.recipes.catalogue import DETECTORS
from kaisa.recipes.detectors import MaskRCNN
from kaisa.recipes.loop import evaluate
from kaisa.recipes.record import Record
from kaisa.recipes.trained import read_trained
from tests.support.runs import Runs, narrow_runs, train

RECIPES = ("unet", "gpt", "bert", "resnet", "maskrcnn", "mlp")


@pytest.fixture(scope="module", autouse=True)
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    with narrow_runs(tmp_path_factory.mktemp("runs"), "--epochs", "1", "--repeats", "1") as runs:
        yield runs


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_model_that_is_read_again_says_of_what_it_was_tested_on_what_the_record_says(recipe: str, runs: Runs) -> None:
    trained = read_trained(runs[recipe])
    assert not trained.model.training
    lesson = trained.read_data().lesson(trained.options, 0)
    (recorded,) = Record.read(runs[recipe]).runs
    sums = evaluate(trained.model, replace(lesson, tests=trained.tests()))
    # The loss is a float32 mean; images come from bytes by another order of the same operations.
    assert float(sums.loss / sums.terms) == pytest.approx(recorded.epochs[-1].test_loss, rel=1e-5)
    score = trained.options.score
    if score.count is not None:
        found, expected = (float(part) for part in sums.scores[0])
        assert found / expected == pytest.approx(recorded.epochs[-1].test_score, abs=1e-4)


def test_what_a_model_takes_is_told(runs: Runs) -> None:
    told = {recipe: read_trained(runs[recipe]) for recipe in RECIPES}
    assert {recipe: trained.kind for recipe, trained in told.items()} == {
        "unet": "masked images",
        "gpt": "text",
        "bert": "text",
        "resnet": "images",
        "maskrcnn": "scenes",
        "mlp": "images",
    }
    assert told["unet"].shape == (1, 32, 48)
    assert told["gpt"].shape == (16,)
    assert told["mlp"].shape == (1, 8, 8)
    assert told["resnet"].classes == ("cat", "dog", "eel")
    assert told["unet"].classes == told["gpt"].classes == ()


def test_tests_of_images_are_from_0_to_1(runs: Runs) -> None:
    for recipe in ("resnet", "unet", "mlp"):
        inputs, _ = next(iter(read_trained(runs[recipe]).tests()))
        assert inputs.min() >= 0
        assert 0.9 < inputs.max() <= 1


def test_the_vocabulary_is_that_of_the_text(runs: Runs) -> None:
    words = read_trained(runs["bert"]).vocabulary()
    assert set(words.tokens[2:]) == {"a", "b", "c", "cat", "saw", "the", "eel", "\n"}
    characters = read_trained(runs["gpt"]).vocabulary()
    assert set(characters.tokens[2:]) == set("abc cat saw the eel\n")
    with pytest.raises(ConfigurationError, match="a run of mlp learns from images, which has no vocabulary"):
        read_trained(runs["mlp"]).vocabulary()


def test_an_image_for_masks_keeps_its_size_but_for_a_border(runs: Runs, tmp_path: Path) -> None:
    trained, path = read_trained(runs["unet"]), tmp_path / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 255, (53, 35, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    image = trained.image(path)
    assert image.shape == (1, 1, 48, 32)
    assert torch.allclose(image[0, 0], torch.from_numpy(pixels[:48, :32] / 255).float().mean(2), atol=1e-6)
    with torch.no_grad():
        assert trained.model(image).shape == (1, 48, 32)
    Image.fromarray(pixels[:15]).save(path)
    with pytest.raises(DataError, match=r"has 35x15 pixels; the model takes images of at least 16x16"):
        trained.image(path)
    with pytest.raises(ConfigurationError, match="a run of gpt learns from text, not from single images"):
        read_trained(runs["gpt"]).image(path)


def test_a_model_of_masks_says_the_same_without_what_it_learned_from(tmp_path: Path) -> None:
    folder = train("unet", tmp_path, "--epochs", "1")
    trained = read_trained(folder)
    inputs, _ = next(iter(trained.tests()))
    shutil.rmtree(tmp_path / "data")
    with torch.no_grad():
        assert torch.equal(read_trained(folder).model(inputs), trained.model(inputs))


def test_other_data_than_those_of_the_run_are_refused_and_so_are_missing_ones(tmp_path: Path) -> None:
    trained = read_trained(train("gpt", tmp_path, "--epochs", "1"))
    (tmp_path / "data" / "train.txt").write_text("another text\n" * 100)
    with pytest.raises(StateError, match="the data are not those that the run began with"):
        trained.tests()
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(DataError, match="no such folder or zip file"):
        trained.vocabulary()
    assert trained.model(torch.zeros(1, 16, dtype=torch.long)).shape[:2] == (1, 16)


def test_weights_of_another_recipe_are_refused(runs: Runs, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    shutil.copytree(runs["gpt"], folder)
    (weights,) = folder.glob("*.safetensors")
    shutil.copy(next(runs["bert"].glob("*.safetensors")), weights)
    with pytest.raises(StateError, match="does not hold the weights of the run's model"):
        read_trained(folder)


def test_a_model_that_is_made_otherwise_here_is_refused_on_reading_and_on_resuming(
    runs: Runs, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "elsewhere"
    shutil.copytree(runs["bert"], folder)
    record = Record.read(folder)
    assert {each.model for each in record.runs} == {"MaskedBert"}
    record.versions["transformers"] = "5.0"
    record.runs = [replace(each, model="TransformersBert") for each in record.runs]
    record.write(folder)
    monkeypatch.setattr("kaisa.recipes.record.describe_versions", dict)
    said = "the run trained a TransformersBert, but what is made here is a MaskedBert; it began with transformers 5.0"
    with pytest.raises(StateError, match=said):
        read_trained(folder)
    assert run(["train", "--resume", str(folder)]) == BAD_INPUT
    assert said in capfd.readouterr().err


def test_a_detector_of_torchvision_is_refused_without_it(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.models.detection", None)
    monkeypatch.setitem(DETECTORS, "smallest", MaskRCNN("any"))
    with pytest.raises(ConfigurationError, match=r"the recipe maskrcnn needs torchvision"):
        read_trained(runs["maskrcnn"])
