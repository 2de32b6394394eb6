"""Each recipe as a user starts it, on data that are made here."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from kaisa.cli import BAD_INPUT, INTERRUPTED, run
from kaisa.errors import ConfigurationError
from kaisa.recipes.catalogue import BERTS, DETECTORS, GPTS, IMAGE_MODELS, RECIPES, UNETS, find_model
from kaisa.recipes.detectors import Detector
from kaisa.recipes.language_models import Gpt2, Width
from kaisa.recipes.loop import Training
from kaisa.recipes.masked_language import MaskedBert
from kaisa.recipes.options import Options
from kaisa.recipes.unet import UNet
from tests.recipes.conftest import write_discs, write_images, write_shapes
from tests.support.detector import TinyDetector


def write_text(folder: Path) -> Path:
    """Write sentences of few words, so that there is something to learn."""
    words = random.Random(0)
    folder.mkdir()
    for name, count in {"train.txt": 300, "valid.txt": 60}.items():
        lines = [f"{words.choice('abc')} cat saw {words.choice(['the', 'a'])} eel\n" for _ in range(count)]
        (folder / name).write_text("".join(lines))
    return folder


def write_colours(folder: Path) -> Path:
    """Write noisy images, red, green or blue by class, so that a few steps tell them apart."""
    generator = np.random.default_rng(0)
    for channel, name in enumerate(("red", "green", "blue")):
        (folder / name).mkdir(parents=True)
        for index in range(12):
            pixels = generator.integers(0, 150, (8, 8, 3), dtype=np.uint8)
            pixels[..., channel] += 100
            Image.fromarray(pixels).save(folder / name / f"{index:02}.png")
    return folder


DATA: dict[str, Callable[[Path], Path]] = {
    "unet": write_discs,
    "gpt": write_text,
    "bert": write_text,
    "resnet": write_images,
    "maskrcnn": write_shapes,
}
OPTIONS = {
    "unet": ["--model", "smallest", "--crop", "16", "--batch-size", "8", "--epochs", "3"],
    "gpt": ["--model", "smallest", "--positions", "16", "--batch-size", "16", "--epochs", "3"],
    "bert": ["--model", "smallest", "--positions", "16", "--batch-size", "16", "--epochs", "3", "--unit", "words"],
    "resnet": ["--no-augment", "--batch-size", "8", "--epochs", "4", "--lr", "0.02"],
    "maskrcnn": ["--model", "smallest", "--epochs", "4", "--lr", "0.1", "--factor-update-steps", "1"],
    "logistic": ["--epochs", "3", "--batch-size", "256"],
    "mlp": ["--epochs", "3", "--batch-size", "256"],
}
SCORES = {
    "unet": ("Dice", {"Dice of the background", "pixel error"}),
    "gpt": ("bits per token", set()),
    "bert": ("MLM loss", {"accuracy of hidden tokens"}),
    "resnet": ("accuracy", set()),
    "maskrcnn": ("box mAP", {"mask mAP"}),
    "logistic": ("loss", {"accuracy"}),
    "mlp": ("loss", {"accuracy"}),
}

LEARNING = {
    "unet": (["--epochs", "6", "--lr", "0.02", "--damping", "0.03"], 0.5),
    "gpt": (["--epochs", "5", "--lr", "0.02"], 1.0),
    "bert": (["--epochs", "8", "--lr", "0.01", "--positions", "13"], 0.1),  # no multiple of the six words of a line
    "resnet": (["--epochs", "6"], 0.3),
    "maskrcnn": (["--epochs", "12", "--damping", "0.1"], 0.1),
    "logistic": ([], 0.4),
    "mlp": (["--lr", "0.3"], 0.3),
}
"""What makes the tiny models learn the tiny data, and by how much the test score is then better than after an epoch."""


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """Return the command of a recipe, whose models are here narrower than any that is worth training."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(UNETS, "smallest", lambda shape: UNet(shape[0], 2))
    monkeypatch.setitem(GPTS, "smallest", lambda tokens, positions: Gpt2(Width(1, 16, 2, 32, tokens, positions)))
    monkeypatch.setitem(BERTS, "smallest", lambda tokens, positions: MaskedBert(Width(1, 16, 2, 32, tokens, positions)))

    monkeypatch.setitem(DETECTORS, "smallest", lambda classes, side: Detector(TinyDetector(classes)))

    def make(recipe: str) -> list[str]:
        data = ["--data", str(DATA[recipe](tmp_path / "data"))] if recipe in DATA else []
        return ["train", "--recipe", recipe, *data, *OPTIONS[recipe], "--threads", "1"]

    return make


def runs_of(folder: str) -> list[dict[str, Any]]:
    found = json.loads((Path(folder) / "record.json").read_text())["runs"]
    return [{**run, "epochs": [{**epoch, "seconds": 0} for epoch in run["epochs"]]} for run in found]


@pytest.mark.parametrize("recipe", OPTIONS)
def test_a_recipe_learns_and_says_what_it_is_judged_by(
    recipe: str,
    command: Callable[[str], list[str]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(DATA, "resnet", write_colours)
    options, margin = LEARNING[recipe]
    assert run([*command(recipe), *options, "--output", "out"]) == 0
    name, further = SCORES[recipe]
    said = capsys.readouterr().out
    assert f"final test {name}" in said
    plain, behind = runs_of("out")
    assert behind["contestant"].endswith("+ K-FAC")
    for found in (plain, behind):
        first, last = found["epochs"][0], found["epochs"][-1]
        assert set(last["further"]) == further
        assert last["train_loss"] < first["train_loss"]
        gain = last["test_score"] - first["test_score"]
        assert (-gain if RECIPES[recipe].task.score.is_cost else gain) > margin


@pytest.mark.parametrize("recipe", ["unet", "gpt", "bert", "maskrcnn"])
def test_a_resumed_recipe_is_the_one_that_was_never_stopped(
    recipe: str, command: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = [*command(recipe), "--kfac"]
    assert run([*start, "--output", "whole"]) == 0
    whole_epoch, done = Training.epoch, []

    def interrupted(training: Training, watch: Any = None) -> Any:
        if done:
            raise KeyboardInterrupt
        done.append(whole_epoch(training, watch))
        return done[-1]

    monkeypatch.setattr(Training, "epoch", interrupted)
    assert run([*start, "--output", "stopped"]) == INTERRUPTED
    monkeypatch.setattr(Training, "epoch", whole_epoch)
    torch.manual_seed(99)
    assert run(["train", "--resume", "stopped"]) == 0
    (whole,), (stopped,) = runs_of("whole"), runs_of("stopped")
    assert stopped["epochs"] == whole["epochs"]
    expected, found = (load_file(next(Path(name).glob("*.safetensors"))) for name in ("whole", "stopped"))
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("recipe", ["unet", "gpt", "bert", "maskrcnn"])
def test_a_recipe_trains_in_mixed_precision(recipe: str, command: Callable[[str], list[str]]) -> None:
    assert run([*command(recipe), "--kfac", "--precision", "bfloat16", "--output", "out"]) == 0
    (found,) = runs_of("out")
    losses = [epoch["train_loss"] for epoch in found["epochs"]]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("recipe", "part"), [("unet", "head"), ("gpt", "blocks"), ("resnet", "14"), ("mlp", "3")])
def test_k_fac_takes_the_parts_of_a_recipe_that_are_named(
    recipe: str, part: str, command: Callable[[str], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    start = [*command(recipe), "--kfac", "--epochs", "1", "--output", "out"]
    assert run([*start, "--parts", "nowhere"]) == 2
    assert "the model has no part 'nowhere'; choose from" in capsys.readouterr().err
    assert not Path("out").exists()
    assert run([*start, "--parts", part]) == 0


@pytest.mark.parametrize(("option", "contestant"), [("--kfac", "sgd + K-FAC"), ("--no-kfac", "sgd")])
def test_one_contestant_runs_alone(option: str, contestant: str, command: Callable[[str], list[str]]) -> None:
    assert run([*command("logistic"), option, "--output", "out"]) == 0
    assert [found["contestant"] for found in runs_of("out")] == [contestant]


BAD = {
    "an unknown recipe": (["--recipe", "yolo"], "unknown recipe 'yolo'; choose from digits, logistic"),
    "no data": (["--recipe", "gpt"], "the recipe gpt needs --data"),
    "a model of another recipe": (
        ["--recipe", "unet", "--data", "discs", "--model", "cnn"],
        "unknown model 'cnn'; choose",
    ),
    "an option of another recipe": (["--recipe", "mlp", "--crop", "16"], "recipe mlp has no use for --crop"),
    "a unit of no text": (["--recipe", "gpt", "--data", "text", "--unit", "runes"], "unknown unit 'runes'"),
    "a crop that cannot be halved": (["--recipe", "unet", "--data", "discs", "--crop", "20"], "give a multiple of 16"),
    "a crop larger than the images": (
        ["--recipe", "unet", "--data", "discs"],
        "crop is 128, but the images have 48x32",
    ),
    "too short a text": (
        ["--recipe", "gpt", "--data", "text", "--positions", "400"],
        "there are 11 sequences to learn",
    ),
    "no text": (["--recipe", "bert", "--data", "discs"], "no text in discs"),
    "an unknown precision": (["--precision", "float8"], "unknown precision 'float8'"),
    "both and one": (["--kfac", "--contestants", "both"], "--contestants both and --kfac exclude each other"),
    "a share that is none": (["--recipe", "mlp", "--target", "-1"], "target is -1.0; give a positive number"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_what_a_recipe_cannot_do_is_refused_in_one_line(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_discs(tmp_path / "discs")
    write_text(tmp_path / "text")
    assert run(["train", *options]) == BAD_INPUT
    said = capfd.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_presets_of_a_recipe_make_options(recipe: str) -> None:
    options = Options.complete({"recipe": recipe, "data": "somewhere"})
    assert options.optimizer == RECIPES[recipe].preset.get("optimizer", "sgd")
    assert Options.from_json(json.loads(json.dumps(options.to_json()))) == options


def test_the_preset_learning_rate_is_for_the_usual_optimizer() -> None:
    assert Options.complete({"recipe": "bert", "data": "x"}).lr == RECIPES["bert"].preset["lr"]
    assert Options.complete({"recipe": "bert", "data": "x", "optimizer": "sgd"}).lr == 0.1


MILLIONS = {"resnet18": 11.18, "resnet50": 23.53, "resnet101": 42.52, "resnet152": 58.16}


@pytest.mark.parametrize("name", MILLIONS)
def test_large_residual_networks_take_any_number_of_classes_and_channels(name: str) -> None:
    """The published sizes without their 1000 classes (fc of 512 or 2048 features), and with 10."""
    with torch.device("meta"):
        model = IMAGE_MODELS[name]((3, 64, 64), 10)
        assert IMAGE_MODELS[name]((1, 64, 64), 7)(torch.zeros(2, 1, 64, 64)).shape == (2, 7)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 2) == MILLIONS[name]


@pytest.mark.parametrize("name", [*GPTS, *BERTS])
def test_every_text_model_scores_every_token(name: str) -> None:
    models = GPTS if name in GPTS else BERTS
    with torch.device("meta"):
        scores = models[name](50, 16)(torch.zeros(2, 16, dtype=torch.long))
    assert scores.shape == (2, 16, 50)


def test_an_unknown_model_is_refused_with_those_of_the_recipe() -> None:
    with pytest.raises(ConfigurationError, match=f"unknown model 'resnet20'; choose from {', '.join(UNETS)}"):
        find_model("unet", "resnet20")
