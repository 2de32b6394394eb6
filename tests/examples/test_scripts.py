"""The examples train, go on where they were stopped, and stay short."""

from __future__ import annotations

import importlib.util
import random
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from PIL import Image

from tests.recipes.conftest import write_discs, write_images
from tests.support.detector import TinyDetector

EXAMPLES = Path(__file__).parents[2] / "examples"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Return a text in which every other word foretells the next."""
    words = random.Random(0)
    pairs = ["the cat", "a dog", "one eel", "two hens"]
    path = tmp_path / "text.txt"
    path.write_text(" ".join(words.choice(pairs) for _ in range(600)))
    return path


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_has_fewer_than_a_hundred_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 100


def test_the_own_loop_learns_and_a_stopped_run_of_it_goes_on_to_the_same_end(tmp_path: Path) -> None:
    loop = script("own_loop")
    whole = loop.train(2, tmp_path / "whole")
    assert whole > 0.9
    loop.train(2, tmp_path / "stopped")
    for path in (tmp_path / "stopped").glob("*46"):  # what was written after the second epoch of 23 steps
        path.rename(path.with_name("gone"))
    assert loop.train(2, tmp_path / "stopped") == whole


def test_the_loop_under_accelerate_learns_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    from accelerate.state import AcceleratorState, GradientState

    loop = script("accelerate_loop")
    torch.manual_seed(0)
    whole = loop.train(3)
    assert whole > 0.9
    loop.train(2, tmp_path / "state")
    capsys.readouterr()
    assert loop.train(3, tmp_path / "state") == whole
    assert capsys.readouterr().out.startswith("epoch 3")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_logistic_regression_and_a_perceptron_learn_faster_behind_kfac(capsys: pytest.CaptureFixture[str]) -> None:
    logistic = script("logistic")
    for hidden in ([], [16]):
        assert logistic.train(3, hidden) < logistic.train(3, hidden, with_kfac=False) < 2.3
    assert capsys.readouterr().out.count("test loss") == 12


def test_the_residual_network_learns_images_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_images(tmp_path / "images", {"bright": 40, "dark": 40})
    for file in (folder / "dark").iterdir():
        Image.open(file).point(lambda value: value // 4).save(file)
    assert script("resnet").train(folder, 4, blocks=1, side=8, batch_size=16) > 0.9
    assert "epoch 4: loss" in capsys.readouterr().out


def test_the_unet_finds_discs(tmp_path: Path) -> None:
    assert script("unet").train(write_discs(tmp_path / "discs"), 3, width=4, side=16, steps=10) > 0.8


def test_the_decoder_learns_what_follows(text: Path) -> None:
    bits = script("gpt").train(text, 60, features=32, blocks=1, positions=16, batch=16)
    assert bits < 2.5  # who knows how frequent each letter is, and no more, has 3.5


def test_bert_finds_hidden_words(text: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    loss = script("bert").train(text, 50, features=32, positions=16, batch=16)
    assert loss < 2.2  # it begins with the logarithm of ten words, 2.3


def test_a_short_last_chunk_of_a_text_weighs_by_its_tokens() -> None:
    gpt = script("gpt")
    model, tokens = gpt.Decoder(7, 4, 32, 1).double(), torch.randint(7, (27,))
    inputs, targets = (torch.stack([tokens[start + 5 * row :][:4] for row in range(5)]) for start in (0, 1))
    with torch.no_grad():
        chances = model(inputs).softmax(2).gather(2, targets[..., None])
    assert gpt.bits_per_token(model, tokens, 4, at_once=2) == pytest.approx(-chances.log2().mean().item(), rel=1e-12)


def test_a_short_last_chunk_of_hidden_words_weighs_by_its_sequences() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    losses = torch.tensor([1.0, 2.0, 3.0, 4.0, 10.0])

    def model(input_ids: torch.Tensor, labels: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=losses[input_ids[:, 0]].mean())

    rows = torch.arange(5)[:, None]
    assert script("bert").mean_loss(model, rows, rows, at_once=2) == 4.0


def test_the_heads_of_a_detector_learn_behind_kfac(capsys: pytest.CaptureFixture[str]) -> None:
    example = script("maskrcnn")
    torch.manual_seed(0)
    model = TinyDetector(2)
    losses = example.train(model, 40, side=40)
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert {"boxes", "labels", "scores", "masks"} == set(example.find(model, 40))
    said = capsys.readouterr().out
    assert len(re.findall("skipped by skip_layers", said)) == 4
    assert len(re.findall(r"roi_heads.*dense A and G", said)) == 4
