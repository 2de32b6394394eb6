"""`kaisa explain` on runs and on exported programs, as a user starts it, and its pages in a real browser."""

import io
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_model
from torch import Tensor, nn

from kaisa.cli import run
from kaisa.errors import ConfigurationError, StateError
from kaisa.recipes.data import read_data
from kaisa.recipes.models import build_model
from kaisa.recipes.options import Options
from kaisa.recipes.programs import Program, read_program
from kaisa.recipes.record import Record
from kaisa.recipes.trained import as_inputs, read_trained
from tests.support.browser import BROWSER, photograph


def make_run(folder: Path, names: tuple[str, ...] = ("sgd-seed0",), model: str = "cnn") -> Path:
    """A run of the digits with weights that nobody trained."""
    options = Options.complete({"recipe": "digits", "model": model, "epochs": 1, "repeats": 1})
    folder.mkdir()
    Record(options, read_data(options).describe()).write(folder)
    for name in names:
        torch.manual_seed(0)
        save_model(build_model(model, (1, 8, 8), 10), str(folder / f"{name}.safetensors"))
    return folder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    path = tmp_path / "picture.png"
    image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(path)
    return path


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("programs") / "small.pt2"
    torch.export.save(torch.export.export(Small().eval(), (torch.randn(2, 3, 8, 8),)), path)
    return path


def test_a_trained_model_says_of_images_what_the_recipe_s_model_says_of_normalised_ones(run_folder: Path) -> None:
    trained = read_trained(run_folder)
    data = trained.read_data()
    plain = build_model("cnn", (1, 8, 8), 10)
    plain.load_state_dict(trained.model.state_dict())
    lesson = data.lesson(Record.read(run_folder).options, 0)
    inputs, _ = next(iter(lesson.tests))
    with torch.no_grad():
        assert torch.allclose(trained.model(as_inputs(data.test.pixels[: len(inputs)])), plain(inputs), atol=1e-5)
    assert trained.classes == tuple("0123456789")


def test_a_page_a_picture_and_json_are_written(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for suffix in ("html", "png", "json"):
        out = tmp_path / f"page.{suffix}"
        assert run(["explain", str(run_folder), "0", "3", "--method", "saliency", "--out", str(out)]) == 0
        assert out.stat().st_size > 1000
    told = capsys.readouterr().out
    assert "saliency of" in told
    assert "page.html" in told
    record = json.loads((tmp_path / "page.json").read_text())
    assert record["method"] == "saliency"
    assert record["values"]["shape"] == [2, 1, 8, 8]
    assert len(record["details"]["target_names"]) == 2


def test_an_image_file_is_resized_to_what_the_model_takes(run_folder: Path, picture: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.json"
    assert (
        run(["explain", str(run_folder), str(picture), "--method", "saliency", "--target", "7", "--out", str(out)]) == 0
    )
    record = json.loads(out.read_text())
    assert record["target"] == [7]
    assert record["inputs"]["shape"] == [1, 1, 8, 8]
    assert 0 <= min(record["inputs"]["numbers"]) <= max(record["inputs"]["numbers"]) <= 1


def test_several_methods_are_compared(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "page.html"
    arguments = ["explain", str(run_folder), "1", "--method", "saliency,smoothgrad", "--set", "samples=3"]
    assert run([*arguments, "--out", str(out)]) == 0
    assert "infidelity" in capsys.readouterr().out
    assert out.read_text(encoding="utf-8").count("data:image/png") == 4


def test_pictures_are_made_without_an_input(run_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.json"
    arguments = ["explain", str(run_folder), "--method", "logit", "--target", "3", "--target", "8", "--set", "steps=2"]
    assert run([*arguments, "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["values"]["shape"] == [2, 1, 8, 8]
    assert record["details"]["target_names"] == ["3", "8"]


def test_the_training_images_behind_a_prediction_are_told(run_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.json"
    arguments = ["explain", str(run_folder), "2", "--method", "influence", "--examples", "30", "--out", str(out)]
    assert run(arguments) == 0
    record = json.loads(out.read_text())
    assert record["values"]["shape"] == [1, 30]
    assert len(record["details"]["proponents_names"][0]) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "magic"], "unknown method 'magic'"),
        (["0", "--target", "ten"], "unknown target 'ten'"),
        (["5000"], "there is no test image 5000"),
        (["nowhere.png"], "no such image file: nowhere.png"),
        (["0", "--set", "steps"], "is not NAME=VALUE"),
        (["0", "--method", "saliency", "--set", "steps=3"], "saliency has no option 'steps'"),
        (["0", "--method", "saliency,gradcam", "--set", "stepz=3"], "none of the methods has an option 'stepz'"),
        (["0", "--method", "saliency", "--out", "page.pdf"], "page.pdf"),
        (["0", "--out", "no/such/page.html"], "there is no folder no/such"),
        (["0", "--method", "influence", "--examples", "0"], "--examples is 0; give 1 or more"),
        (["--method", "influence"], "influence explains inputs, and there are none"),
        (["²"], "no such image file: ²"),
    ],
)
def test_bad_input_is_refused_in_one_line_and_nothing_is_written(
    arguments: list[str],
    message: str,
    run_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["explain", str(run_folder), *arguments]) == 2
    told = capsys.readouterr().err
    assert told.startswith("kaisa: ")
    assert message in told
    assert told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_run_or_with_several_models_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"has no record\.json"):
        read_trained(tmp_path)
    with pytest.raises(ConfigurationError, match="there are 2 models"):
        read_trained(make_run(tmp_path / "two", ("sgd-seed0", "sgd-kfac-seed0")))
    assert read_trained(tmp_path / "two" / "sgd-seed0.safetensors").shape == (1, 8, 8)
    with pytest.raises(StateError, match="there are no weights"):
        read_trained(make_run(tmp_path / "none", ()))
    other = make_run(tmp_path / "other", model="mlp")
    shutil.copy(other / "sgd-seed0.safetensors", tmp_path / "two" / "sgd-seed0.safetensors")
    with pytest.raises(StateError, match="does not hold the weights of the run's model"):
        read_trained(tmp_path / "two" / "sgd-seed0.safetensors")


def test_a_program_gives_what_the_model_gave_for_any_number_of_inputs(program: Path) -> None:
    torch.manual_seed(0)
    model, loaded = Small().eval(), read_program(program, is_trusted=True)
    x = torch.randn(5, 3, 8, 8)
    assert loaded.batch == 2
    assert loaded.shape == (3, 8, 8)
    assert torch.allclose(loaded(x), model(x), atol=1e-6)
    assert torch.allclose(loaded(x[:1]), model(x[:1]), atol=1e-6)


def test_a_program_of_any_batch_size_is_called_at_once() -> None:
    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(Small().eval(), (torch.randn(3, 3, 8, 8),), dynamic_shapes=({0: batch},))
    assert Program(exported).batch is None
    assert Program(exported)(torch.randn(7, 3, 8, 8)).shape == (7, 5)


def test_a_program_is_explained_once_it_is_trusted(program: Path, picture: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.json"
    arguments = ["explain", str(program), str(picture), "--method", "saliency", "--out", str(out)]
    assert run([*arguments, "--trust"]) == 0
    assert json.loads(out.read_text())["values"]["shape"] == [1, 3, 8, 8]


class Evil:
    """What a stranger may have put into a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (Path.touch, (self.trace,))


def test_a_program_of_a_stranger_is_not_read(
    program: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace, evil = tmp_path / "trace", tmp_path / "evil.pt2"
    with zipfile.ZipFile(program) as good, zipfile.ZipFile(evil, "w") as bad:
        for name in good.namelist():
            content = good.read(name)
            if "sample_inputs" in name:
                buffer = io.BytesIO()
                torch.save(((Evil(trace),), {}), buffer)
                content = buffer.getvalue()
            bad.writestr(name, content)
    assert run(["explain", str(evil), str(picture), "--out", str(tmp_path / "page.html")]) == 2
    assert "can run code that is hidden in it" in capsys.readouterr().err
    assert not trace.exists()


def test_what_is_no_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt2"
    path.write_bytes(b"nothing")
    with pytest.raises(StateError, match="is not an exported program"):
        read_program(path, is_trusted=True)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_a_page_is_drawn_whole_by_a_browser(run_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    assert run(["explain", str(run_folder), "0", "--method", "saliency,gradcam", "--out", str(out)]) == 0
    pixels = photograph(out, tmp_path)
    assert pixels.shape == (1400, 1200, 3)
    spread = pixels.max(2) - pixels.min(2)
    assert (spread > 60).mean() > 0.01  # the coloured maps are there
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 200
    ground = pixels[5, 5]
    content = (np.abs(pixels - ground).sum(2) > 30).any(0).nonzero()[0]
    assert content.min() > 5  # nothing runs over the edges
    assert content.max() < 1195
