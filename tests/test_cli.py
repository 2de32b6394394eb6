"""The command as a user meets it; what is refused, interrupted and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kaisa.cli import BAD_INPUT, INTERRUPTED, run
from kaisa.recipes.loop import Training
from tests.recipes.conftest import write_images

SMALL = ["train", "--model", "cnn", "--epochs", "3", "--repeats", "1", "--batch-size", "256"]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read_record(folder: Path) -> dict[str, Any]:
    value = json.loads((folder / "record.json").read_text())
    assert isinstance(value, dict)
    return value


def figures(folder: Path) -> list[Any]:
    """Return what the runs of a record found, without what was measured of time and memory."""
    measured = {"seconds"}
    return [
        (
            run["contestant"],
            run["seed"],
            run["finished"],
            [{k: v for k, v in epoch.items() if k not in measured} for epoch in run["epochs"]],
        )
        for run in read_record(folder)["runs"]
    ]


def damage(archive: Path, name: str) -> Path:
    """Return a copy of a zip file in which one image is text."""
    copy = archive.with_name("damaged.zip")
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(copy, "w") as new:
        for member in old.namelist():
            new.writestr(member, b"text" if member == name else old.read(member))
    return copy


def test_a_run_ends_with_a_table_a_plot_a_record_and_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*SMALL, "--output", "out", "--target", "0.1"]) == 0
    said = capsys.readouterr().out
    assert "epochs to 10.0 %" in said
    assert "sgd + K-FAC" in said
    assert (tmp_path / "out" / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "plot.png",
        "record.json",
        "sgd-kfac-seed0.safetensors",
        "sgd-seed0.safetensors",
    ]
    record = read_record(tmp_path / "out")
    assert record["options"]["epochs"] == 3
    assert record["data"]["train_images"] + record["data"]["test_images"] == 1797
    assert [len(run["epochs"]) for run in record["runs"]] == [3, 3]


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [("arsg", ["arsg", "arsg + K-FAC"]), ("rsg+kfac", ["rsg + K-FAC"]), ("adahessian", ["adahessian"])],
)
def test_the_optimizers_of_the_library_take_part(tmp_path: Path, optimizer: str, expected: list[str]) -> None:
    assert run([*SMALL, "--optimizer", optimizer, "--output", "out"]) == 0
    runs = read_record(tmp_path / "out")["runs"]
    assert [one["contestant"] for one in runs] == expected
    assert all(one["epochs"][-1]["test_loss"] < 2.35 for one in runs)


def test_without_an_output_the_run_goes_under_runs(tmp_path: Path) -> None:
    assert run([*SMALL, "--contestants", "first-order"]) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.endswith("-digits-cnn")
    assert read_record(folder)["runs"][0]["finished"] is True


def test_a_run_is_determined_by_its_options(tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert run([*SMALL, "--output", name]) == 0
    assert figures(tmp_path / "one") == figures(tmp_path / "two")


def test_images_of_ones_own_are_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path / "animals-train")
    write_images(tmp_path / "animals-test")
    options = ["--data", "animals-train", "--model", "cnn", "--epochs", "1", "--batch-size", "8"]
    assert run(["train", *options, "--output", "out"]) == 0
    assert "animals-train, tested on animals-test" in capsys.readouterr().out
    data = read_record(tmp_path / "out")["data"]
    assert (data["train_images"], data["test_images"], data["shape"]) == (24, 24, [3, 8, 8])


BAD = {
    "a missing path": (["--data", "nowhere"], "no such folder or zip file: nowhere"),
    "missing test data": (["--data", "animals", "--test-data", "no"], "no such folder or zip file"),
    "a path that holds no images": (["--data", "text"], "text is neither a folder nor a zip file"),
    "a class folder without images": (["--data", "hollow"], "class folder without images: fox"),
    "an unreadable image": (["--data", "broken"], "unreadable image: broken/dog/0001.png"),
    "images of two sizes": (["--data", "mixed"], "give --image-size to resize"),
    "an unknown model": (["--model", "vgg"], "unknown model 'vgg'; choose from mlp, cnn, resnet8, resnet20"),
    "an unknown optimizer": (["--optimizer", "lion"], "unknown optimizer 'lion'"),
    "an optimizer behind something else": (["--optimizer", "arsg+adam"], "only +kfac may follow"),
    "AdaHessian behind K-FAC": (["--optimizer", "adahessian+kfac"], "would divide by the curvature twice; give"),
    "an unknown solver": (["--solver", "qr"], "unknown solver 'qr'"),
    "an unknown sharing": (["--sharing", "sum"], "sharing is 'sum'; give 'expand' or 'reduce'"),
    "an unknown contestant": (["--contestants", "all"], "unknown contestants 'all'"),
    "an unknown device": (["--device", "abacus"], "unknown device 'abacus'"),
    "negative damping": (["--damping", "-0.1"], "damping is -0.1; give a positive number"),
    "no epochs": (["--epochs", "0"], "epochs is 0; give a whole number of at least 1"),
    "a negative batch size": (["--batch-size", "-8"], "batch-size is -8; give a whole number"),
    "a batch larger than the data": (["--batch-size", "2000"], "there are 1438 images to learn fr"),
    "a negative seed": (["--seed", "-1"], "seed is -1; give a whole number"),
    "a learning rate of zero": (["--lr", "0"], "lr is 0.0; give a positive number"),
    "a target above one": (["--target", "97"], "target is 97.0; give a number above 0 and at mo"),
    "no threads": (["--threads", "0"], "threads is 0; give a whole number of at least 1"),
    "text for a number": (["--epochs", "many"], "Invalid value for '--epochs'"),
    "an unknown option": (["--speed", "9"], "No such option: --speed"),
    "a stray argument": (["digits"], "unexpected extra argument"),
    "an output in use": (["--output", "animals"], "output animals is not empty"),
    "an output that is a file": (["--output", "text"], "output text is a file; give a folder"),
    "an output under a file": (["--output", "text/out"], "output text/out cannot be made"),
    "nothing to resume": (["--resume", "animals"], "no run to resume in animals"),
    "options with resume": (["--resume", "animals", "--kl-clip", "1"], "leave out --kl-clip"),
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_images(tmp_path / "animals")
    (write_images(tmp_path / "hollow") / "fox").mkdir()
    (write_images(tmp_path / "broken") / "dog" / "0001.png").write_bytes(b"no image")
    write_images(write_images(tmp_path / "mixed") / "..", {"mixed/fox": 2}, side=9)
    (tmp_path / "text").write_text("no images")
    return tmp_path


@pytest.mark.usefixtures("data")
@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_input_gets_one_line_and_status_two_and_nothing_is_written(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert run(["train", *options]) == BAD_INPUT
    said = capfd.readouterr()
    assert message in said.err
    assert said.err.startswith("kaisa: ")
    assert said.err.count("\n") == 1
    assert said.out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_an_unreadable_photograph_in_a_zip_file_is_refused(
    tmp_path: Path, real_data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    small = tmp_path / "small.zip"
    with zipfile.ZipFile(real_data / "cifar10-test.zip") as all_of_them:
        members = [n for n in all_of_them.namelist() if n.endswith(("0.jpg", "5.jpg"))][::20]
        with zipfile.ZipFile(small, "w") as some:
            for member in members:
                some.writestr(member, all_of_them.read(member))
    options = ["--epochs", "1", "--batch-size", "32", "--model", "cnn", "--output", "out"]
    assert run(["train", "--data", str(damage(small, members[9])), *options]) == BAD_INPUT
    assert f"unreadable image: {tmp_path}/damaged.zip/{members[9]}" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run(["train", "--data", str(small), *options]) == 0
    assert read_record(tmp_path / "out")["data"]["shape"] == [3, 32, 32]


@pytest.mark.parametrize("stop", [1, 2, 4])
def test_a_resumed_run_is_the_one_that_was_never_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], stop: int
) -> None:
    """Stopped within the epoch after `stop` whole ones, of three for each contestant."""
    assert run([*SMALL, "--output", "whole"]) == 0
    whole_epoch, done = Training.epoch, []

    def interrupted(training: Training, watch: Any = None) -> Any:
        if len(done) == stop:
            training.step(*next(training.batches.epoch(0)))
            raise KeyboardInterrupt
        done.append(whole_epoch(training, watch))
        return done[-1]

    monkeypatch.setattr(Training, "epoch", interrupted)
    assert run([*SMALL, "--output", "stopped"]) == INTERRUPTED
    assert capfd.readouterr().err == ("kaisa: interrupted; go on with: kaisa train --resume stopped\n")
    assert sum(len(run["epochs"]) for run in read_record(tmp_path / "stopped")["runs"]) == stop
    monkeypatch.setattr(Training, "epoch", whole_epoch)
    torch.manual_seed(99)
    assert run(["train", "--resume", "stopped"]) == 0
    assert figures(tmp_path / "stopped") == figures(tmp_path / "whole")
    for name in ("sgd-seed0.safetensors", "sgd-kfac-seed0.safetensors"):
        expected = load_file(tmp_path / "whole" / name)
        found = load_file(tmp_path / "stopped" / name)
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_finished_run_is_reported_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run([*SMALL, "--output", "out"]) == 0
    before = (tmp_path / "out" / "record.json").read_bytes()
    assert run(["train", "--resume", "out"]) == 0
    assert (tmp_path / "out" / "record.json").read_bytes() == before
    assert capfd.readouterr().out.count("final test accuracy") == 2


def test_a_run_is_not_resumed_on_other_images(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = write_images(tmp_path / "animals")
    options = ["--data", "animals", "--model", "mlp", "--epochs", "1", "--batch-size", "8"]
    assert run(["train", *options, "--output", "out"]) == 0
    (folder / "cat" / "0000.png").unlink()
    assert run(["train", "--resume", "out"]) == BAD_INPUT
    assert "the data are not those that the run began with" in capfd.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGINT to send")
def test_control_c_keeps_what_is_done(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-m", "kaisa", *SMALL]
    command[command.index("--epochs") + 1] = "100000"
    process = subprocess.Popen(
        [*command, "--output", "out"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 200
    record = tmp_path / "out" / "record.json"
    while not (record.exists() and '"number": 1' in record.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=300)
    assert said == "kaisa: interrupted; go on with: kaisa train --resume out\n"
    assert process.returncode == INTERRUPTED
    (stopped,) = read_record(tmp_path / "out")["runs"]
    checkpoint = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)
    assert stopped["finished"] is False
    assert 0 <= len(checkpoint["history"]) - len(stopped["epochs"]) <= 1
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "checkpoint.pt",
        "record.json",
    ]


def test_the_version_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capfd.readouterr().out.startswith("kaisa 0.")


def test_every_option_of_the_command_is_explained(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "--help"]) == 0
    said = " ".join(capfd.readouterr().out.replace("│", " ").split())
    assert "--factor-update-steps" in said
    assert "unet, gpt, bert, maskrcnn [digits; with --data: resnet]" in said
