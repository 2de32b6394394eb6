"""`kaisa explain` on runs of texts and of masks, held to what the models themselves say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kaisa.cli import run
from kaisa.recipes.trained import read_trained
from tests.support.browser import BROWSER, photograph
from tests.support.runs import Runs, narrow_runs

TEXT = "a cat saw the"


@pytest.fixture(scope="module", autouse=True)
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    with narrow_runs(tmp_path_factory.mktemp("runs")) as runs:
        yield runs


@pytest.fixture
def told(runs: Runs, tmp_path: Path) -> Any:
    """Return what asks the command about a run, and gives the JSON that it wrote."""

    def ask(recipe: str, *arguments: str) -> dict[str, Any]:
        out = tmp_path / "told.json"
        assert run(["explain", str(runs[recipe]), *arguments, "--out", str(out)]) == 0
        return json.loads(out.read_text())

    return ask


def numbers(values: dict[str, Any]) -> Tensor:
    return torch.tensor(values["numbers"], dtype=torch.float64).reshape(values["shape"])


def of_text(run: Path, text: str) -> tuple[nn.Module, Tensor, tuple[str, ...]]:
    """Return the model of a run, a text of characters as its tokens, and the vocabulary."""
    trained = read_trained(run)
    tokens = trained.vocabulary().tokens
    return trained.model, torch.tensor([[tokens.index(character) for character in text]]), tokens


def test_integrated_gradients_of_a_text_add_up_to_what_its_embeddings_add_to_the_logit(told: Any, runs: Runs) -> None:
    record = told("gpt", TEXT, "--method", "integrated_gradients", "--target", "h", "--set", "steps=100")
    model, tokens, vocabulary = of_text(runs["gpt"], TEXT)
    with torch.no_grad():
        here = model(tokens)[0, -1, vocabulary.index("h")]
        model.get_submodule("wte").register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
        there = model(tokens)[0, -1, vocabulary.index("h")]
    assert record["target"] == [vocabulary.index("h")]
    assert record["details"]["target_names"] == ["h"]
    assert record["names"] == [list("a␣cat␣saw␣the")]
    assert abs(float(here - there)) > 0.01
    # The error of the rule of 100 points on float32 logits.
    assert float(numbers(record["values"]).sum()) == pytest.approx(float(here - there), abs=1e-4)


def test_the_most_likely_next_token_is_explained_unless_another_is_named(told: Any, runs: Runs) -> None:
    model, tokens, vocabulary = of_text(runs["gpt"], TEXT)
    record = told("gpt", TEXT, "--method", "saliency")
    with torch.no_grad():
        assert record["target"] == [int(model(tokens)[0, -1].argmax())]
    others = [told("gpt", TEXT, "--method", "saliency", "--target", token) for token in "ct"]
    assert [other["target"] for other in others] == [[vocabulary.index("c")], [vocabulary.index("t")]]
    assert not torch.allclose(*(numbers(other["values"]) for other in others), rtol=1e-3)


@pytest.mark.parametrize("method", ["saliency", "integrated_gradients", "smoothgrad"])
def test_tokens_that_the_model_cannot_see_have_no_part_in_what_it_foretells(method: str, told: Any) -> None:
    record = told("gpt", TEXT, "--method", method, "--position", "5", "--target", "t")
    (values,) = numbers(record["values"])
    assert len(values) == len(TEXT)
    assert (values[5:] == 0).all()
    assert (values[:5] != 0).all()
    assert record["details"]["position"] == 5


def test_what_perturbs_sees_what_changes_the_logit(told: Any, runs: Runs) -> None:
    record = told("gpt", "cat", "--method", "kernelshap", "--target", "s")
    model, tokens, vocabulary = of_text(runs["gpt"], "cat")

    def score(present: list[bool]) -> float:
        shown = torch.where(torch.tensor([present]), tokens, 0)  # the number of what is unknown
        with torch.no_grad():
            return float(model(shown)[0, -1, vocabulary.index("s")])

    # Shapley values of three tokens, by hand: over all six orders in which they may come.
    expected = np.zeros(3)
    for order in ([0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]):
        present = [False] * 3
        for token in order:
            before = score(present)
            present[token] = True
            expected[token] += (score(present) - before) / 6
    assert numbers(record["values"])[0].numpy() == pytest.approx(expected, abs=1e-5)  # of float32 logits
    assert abs(expected).max() > 1e-3


def test_a_mask_in_a_text_is_the_token_that_is_looked_for(told: Any, runs: Runs) -> None:
    trained = read_trained(runs["bert"])
    tokens = trained.vocabulary().tokens
    text = torch.tensor([[tokens.index(word) for word in ("a", "<mask>", "saw", "the", "eel")]])
    embedded: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[0]

    trained.model.get_submodule("tokens").register_forward_hook(keep)
    best = trained.model(text)[0, 1].max(0)
    best.values.backward()
    masked = told("bert", "a [MASK] saw the eel", "--method", "saliency")
    assert masked["target"] == [int(best.indices)]
    assert embedded[0].grad is not None
    assert torch.allclose(numbers(masked["values"]).float(), embedded[0].grad.norm(dim=-1), rtol=1e-4)
    assert masked["details"]["position"] == 1
    assert masked["names"] == [["a", "<mask>", "saw", "the", "eel"]]
    placed = told("bert", "a cat saw the eel", "--method", "saliency", "--position", "1")
    assert masked["values"] == placed["values"]
    last = told("bert", "a cat saw the eel", "--method", "saliency")
    assert last["names"] == [["a", "cat", "saw", "the", "<mask>"]]


@pytest.mark.parametrize("method", ["lime", "anchors", "cle"])
def test_words_are_hidden_by_what_hides_words_in_training(method: str, told: Any) -> None:
    record = told("bert", "a [MASK] saw the eel", "--method", method)
    assert record["options"]["hide"] == 1
    assert record["values"]["shape"] == [1, 5]
    word = told("bert", "a [MASK] saw the eel", "--method", method, "--set", "hide=cat")
    assert word["options"]["hide"] > 1
    if method == "anchors":
        (detail,) = record["details"]["inputs"]
        assert set(detail["rule"]) <= {"a", "saw", "the", "eel", "<mask>"}


def test_texts_come_from_files_and_from_what_was_tested_on(told: Any, runs: Runs, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT + "\n")
    literal, from_file = (told("gpt", text, "--method", "saliency") for text in (TEXT, str(path)))
    assert literal["values"] == from_file["values"]
    trained = read_trained(runs["gpt"])
    inputs, _ = next(iter(trained.tests()))
    record = told("gpt", "2", "0", "--method", "saliency")
    assert numbers(record["inputs"]).tolist() == inputs[[2, 0]].tolist()
    assert record["values"]["shape"] == [2, 16]
    hidden = told("bert", "0", "--method", "saliency")
    assert hidden["names"][0][hidden["details"]["position"]] == "<mask>"


def test_tokens_are_deleted_and_inserted_in_the_order_of_their_values(told: Any, runs: Runs) -> None:
    figures = told("gpt", TEXT, "--method", "saliency,smoothgrad", "--target", "e")["figures"]
    (values,) = numbers(told("gpt", TEXT, "--method", "saliency", "--target", "e")["values"])
    model, tokens, vocabulary = of_text(runs["gpt"], TEXT)
    order = values.argsort(descending=True).tolist()
    shares = np.linspace(0, 1, 21)
    curves = {"deletion": [], "insertion": []}
    for share in shares:
        count = sum(place / len(order) < share for place in range(len(order)))
        first = torch.zeros_like(tokens, dtype=torch.bool)
        first[0, order[:count]] = True
        for name, changed in (("deletion", tokens.where(~first, 0)), ("insertion", tokens.where(first, 0))):
            with torch.no_grad():
                curves[name].append(float(model(changed)[0, -1].softmax(0)[vocabulary.index("e")]))
    for name, curve in curves.items():
        assert figures["saliency"][name] == pytest.approx(np.trapezoid(curve, shares), abs=1e-5)  # of float32 logits
    assert set(figures["random"]) == {"deletion", "insertion"}
    assert abs(figures["saliency"]["randomisation"]) <= 1


def test_what_training_texts_do_to_the_probabilities_of_all_next_tokens_cancels(told: Any, runs: Runs) -> None:
    # Σ p(y) ∇ log p(y) = 0: influence is linear in the gradient of the loss of the explained token, − log p(y).
    model, tokens, vocabulary = of_text(runs["gpt"], "a cat")
    targets = [part for token in vocabulary for part in ("--target", token)]
    texts = ["a cat"] * len(vocabulary)
    record = told("gpt", *texts, "--method", "influence", "--examples", "20", "--position", "3", *targets)
    values = numbers(record["values"])
    with torch.no_grad():
        probabilities = model(tokens)[0, 2].double().softmax(0)
    assert values.shape == (len(vocabulary), 20)
    rest = (probabilities[:, None] * values).sum(0).abs()
    assert (rest < 1e-4 * (probabilities[:, None] * values).abs().sum(0)).all()  # of float32 gradients
    assert record["target"] == list(range(len(vocabulary)))


@pytest.mark.parametrize(("recipe", "text"), [("gpt", "a cat saw"), ("bert", "a [MASK] saw the")])
def test_the_training_texts_behind_a_token_are_told(recipe: str, text: str, told: Any, runs: Runs) -> None:
    saliency = told(recipe, text, "--method", "saliency")
    record = told(recipe, text, "--method", "influence", "--examples", "40")
    assert record["target"] == saliency["target"]
    assert record["details"]["target_names"] == saliency["details"]["target_names"]
    assert set(record["options"]) == {"training", "curvature", "damping"}
    values, (proponents,) = numbers(record["values"]), record["details"]["proponents"]
    assert values[0].argsort(descending=True)[0] == proponents[0]
    (texts,) = record["details"]["proponents_texts"]
    learned = (runs[recipe].parent / "data" / "train.txt").read_text().replace("\n", "↵")
    if recipe == "gpt":  # what bert learns from is hidden here and there
        assert all(one in learned for one in texts)
    assert len(texts) == 5


def predicted(run: Path, number: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    """Return the model of a run of masks, a test image, and what it takes for the object."""
    trained = read_trained(run)
    image = list(trained.tests())[number][0]
    with torch.no_grad():
        return trained.model, image, trained.model(image)[0] > 0


def test_integrated_gradients_of_a_mask_add_up_to_the_mean_logit_over_the_object(told: Any, runs: Runs) -> None:
    record = told("unet", "0", "--method", "integrated_gradients", "--set", "steps=400")
    model, image, found = predicted(runs["unet"])
    with torch.no_grad():
        here, there = (float(model(x)[0][found].mean()) for x in (image, torch.zeros_like(image)))
    assert record["details"]["target_names"] == [f"object over its {int(found.sum())} pixels"]
    assert abs(here - there) > 0.05
    # ReLUs and maxima bend the path, so that the rule converges slowly.
    assert float(numbers(record["values"]).sum()) == pytest.approx(here - there, abs=0.01)


def test_the_background_is_explained_where_the_background_is(told: Any, runs: Runs) -> None:
    model, image, found = predicted(runs["unet"])
    record = told("unet", "0", "--method", "saliency", "--target", "background")
    x = image.clone().requires_grad_()
    (-model(x)[0][~found].mean()).backward()
    assert x.grad is not None
    assert torch.allclose(numbers(record["values"]).float(), x.grad, atol=1e-7)
    assert record["target"] == [0]


def test_object_and_background_of_a_box_are_opposites(told: Any) -> None:
    box = ["--method", "saliency", "--box", "4,2,9,9", "--target"]
    both = [told("unet", "0", *box, side) for side in ("object", "background")]
    values = [numbers(record["values"]) for record in both]
    assert values[0].abs().max() > 0
    assert torch.equal(values[0], -values[1])
    assert both[0]["details"]["target_names"] == ["object in the box 4,2,9,9"]


def test_pixels_beyond_what_a_box_can_see_have_no_part_in_it(told: Any, tmp_path: Path) -> None:
    # Two 3×3 convolutions a level reach 2·(1+2+4+8+16) pixels down and 2·(1+2+4+8) up, pooling 15 further,
    # and as many again because the grid of the coarsest level need not begin at the box.
    reach, width = 62 + 30 + 15 + 15, 320
    path = tmp_path / "wide.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, width), dtype=np.uint8)).save(path)
    record = told("unet", str(path), "--method", "saliency", "--box", "0,0,8,32")
    assert record["values"]["shape"] == [1, 1, 32, width]
    columns = numbers(record["values"])[0, 0].abs().amax(0)
    assert (columns[8 + reach :] == 0).all()
    assert columns[8:].max() > 0


@pytest.mark.parametrize("method", ["gradcam", "gradcam++", "scorecam", "lime", "kernelshap", "anchors"])
def test_masks_are_explained_by_methods_of_images(method: str, told: Any) -> None:
    options = {"lime": ["--set", "samples=30"], "kernelshap": ["--set", "samples=30"]}.get(method, [])
    record = told("unet", "0", "--method", method, *options)
    assert record["values"]["shape"][-2:] == [32, 48]
    if "cam" in method:
        assert record["details"]["layer"] == "down.4"


def test_pictures_are_made_for_masks(told: Any) -> None:
    record = told("unet", "--method", "logit", "--target", "object", "--set", "steps=2")
    assert record["values"]["shape"] == [1, 1, 32, 48]
    assert record["details"]["target_names"] == ["object"]
    dream = told("unet", "0", "--method", "deepdream", "--set", "steps=2")
    assert dream["options"]["octaves"] == 1


def test_digits_that_a_perceptron_reads_are_images(told: Any) -> None:
    record = told("mlp", "0", "--method", "integrated_gradients")
    assert record["values"]["shape"] == [1, 1, 8, 8]


@pytest.mark.parametrize(("recipe", "inputs"), [("gpt", [TEXT]), ("bert", ["0"]), ("unet", ["0"])])
def test_several_methods_are_compared_on_texts_and_masks(
    recipe: str, inputs: list[str], runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    arguments = ["explain", str(runs[recipe]), *inputs, "--method", "saliency,lime", "--set", "samples=20"]
    assert run([*arguments, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "local_r2" in said
    assert "randomisation" in said
    assert "random " in said
    page = out.read_text(encoding="utf-8")
    assert "<h2>lime</h2>" in page
    assert page.count('class="tokens') == (0 if recipe == "unet" else 3)


def test_a_page_shows_tokens_in_colours_the_explained_one_in_a_frame(runs: Runs, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    arguments = ["--method", "integrated_gradients", "--target", "h", "--out", str(out)]
    assert run(["explain", str(runs["gpt"]), "a cat saw", *arguments]) == 0
    page = out.read_text(encoding="utf-8")
    assert page.count("background: rgb(") == len("a cat saw")
    assert page.count("/ 70%)") == 1  # the strongest token alone is this opaque
    assert '<span class=asked title="explained">h</span>' in page
    assert run(["explain", str(runs["bert"]), "a [MASK] saw", *arguments[:2], "--out", str(out)]) == 0
    assert "<span class=asked style=" in out.read_text(encoding="utf-8")
    assert "&lt;mask&gt;</span>" in out.read_text(encoding="utf-8")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_a_page_of_a_text_is_drawn_by_a_browser(runs: Runs, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    assert run(["explain", str(runs["gpt"]), "0", "--method", "lime,saliency", "--out", str(out)]) == 0
    pixels = photograph(out, tmp_path)
    spread = pixels.max(2) - pixels.min(2)
    assert (spread > 60).mean() > 1e-4  # the coloured tokens are there
    content = (np.abs(pixels - pixels[5, 5]).sum(2) > 30).any(0).nonzero()[0]
    assert content.min() > 5
    assert content.max() < 1195  # nothing runs over the edges


REFUSED = [
    ("gpt", ["a dog saw", "--method", "lime"], "the model does not know 'd'; it has learned 13 characters"),
    ("gpt", ["a cat saw the eel"], "the text has 17 characters, and the model takes 16 at most"),
    ("gpt", ["a [MASK] saw"], "the text hides a token, and the model foretells the next one"),
    ("gpt", [TEXT, "--target", "the"], "unknown target 'the'; a token of this model is one of 13 characters"),
    ("gpt", [TEXT, "--set", "baseline=the"], "unknown target 'the'"),
    ("gpt", [TEXT, "--position", "14"], "--position is 14; the explained token is at one of 1 to 13"),
    ("gpt", [TEXT, "--position", "0"], "--position is 0; the explained token is at one of 1 to 13"),
    ("gpt", [TEXT, "--box", "0,0,1,1"], "--box has no use here: texts have no pixels"),
    ("gpt", [TEXT, "--target", "c", "--target", "a"], "there are 2 targets for 1 texts; give one for each"),
    ("gpt", [TEXT, "a cat"], "the inputs have different sizes, 13 and 5; explain them one at a time"),
    ("gpt", [], "there is no text; give one, a .txt file, or the number of a test text"),
    ("gpt", [""], "the text '' has no characters"),
    ("gpt", ["nowhere.txt"], "no such text file: nowhere.txt"),
    ("gpt", ["5000"], "there is no test text 5000; the run was tested on"),
    ("gpt", [TEXT, "--method", "logit"], "logit needs inputs that can change a little, and tokens cannot"),
    ("gpt", [TEXT, "--method", "saliency,scorecam"], "scorecam needs inputs that can change a little"),
    ("gpt", [TEXT, "--method", "guided_backprop"], "guided methods guide ReLUs, and the model calls none"),
    ("bert", ["a dog saw"], "the model does not know 'dog'; it has learned 10 words"),
    ("bert", ["a cat [MASK]", "a [MASK] saw"], "the first hidden tokens are at different positions (1, 2)"),
    ("unet", ["0", "--target", "disc"], "unknown target 'disc'; a mask has object and background"),
    ("unet", ["0", "--box", "0,0,49,10"], "--box 0,0,49,10 is not inside an image of 48x32 pixels"),
    ("unet", ["0", "--box", "5,0,5,10"], "--box 5,0,5,10 has no pixels"),
    ("unet", ["0", "--box", "left"], "--box 'left' is not LEFT,TOP,RIGHT,BOTTOM in pixels"),
    ("unet", ["0", "--position", "3"], "--position has no use here: masks have no tokens"),
    ("unet", ["0", "0"], "each image has an object of its own"),
    ("unet", ["0", "--method", "influence"], "influence is of classes and tokens"),
    ("unet", ["0", "--method", "deepdream", "--set", "octaves=2"], "octaves change the size of an image"),
    ("unet", ["--method", "logit", "--box", "0,0,4,4"], "--box is of an image, and there is none"),
    ("mlp", ["0", "--method", "gradcam"], "no layer of the model has a feature map"),
    ("mlp", ["0", "--position", "3"], "--position has no use here: a classifier says one thing of a whole image"),
]


@pytest.mark.parametrize(("recipe", "arguments", "message"), REFUSED)
def test_bad_input_is_refused_in_one_line_and_nothing_is_written(
    recipe: str,
    arguments: list[str],
    message: str,
    runs: Runs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["explain", str(runs[recipe]), *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("kaisa: ")
    assert message in said
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_image_without_an_object_is_refused(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "blind"
    shutil.copytree(runs["unet"], folder)
    (weights,) = folder.glob("*.safetensors")
    state = load_file(weights)
    state["head.bias"] -= 1000
    save_file(state, weights)
    assert run(["explain", str(folder), "0", "--out", str(tmp_path / "page.html")]) == 2
    assert "the model takes no pixel of this image for the object; give --box" in capsys.readouterr().err
    assert run(["explain", str(folder), "0", "--target", "background", "--out", str(tmp_path / "page.html")]) == 0
