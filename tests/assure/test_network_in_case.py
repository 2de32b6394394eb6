"""A case that runs the frozen network itself: on held-out data, and on what operation brings."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kaisa.assure.evidence.held_out import lower_bound, upper_bound
from kaisa.assure.network import DECLINED, Criterion
from kaisa.cli import run
from kaisa.errors import ConfigurationError, DataError
from kaisa.recipes.demands import TrainedNetwork, read_network
from kaisa.recipes.masks import read_masked_images
from kaisa.recipes.record import Record
from kaisa.recipes.trained import read_trained
from tests.support.runs import Runs, narrow_runs

START = datetime(2026, 1, 1, tzinfo=UTC)
CLASSES = ("bright", "dark")
CASE = """
title = "The light meter is reliable"
[system]
name = "light meter"
run = "run"
sure = 0.6
[operation]
records = "operation.csv"
journal = "operation.journal"
[prior]
[[prior.quantile]]
from = "held-out"
[[evidence]]
name = "held-out"
data = "held-out"
belief = 0.9
sides = "both"
[[claim]]
kind = "confidence"
bound = 0.5
target = 0.5
"""


def write_pictures(folder: Path, count: int, seed: int, spread: float = 60) -> Path:
    """Write squares that are rather bright or rather dark, a folder a class."""
    numbers = np.random.default_rng(seed)
    for middle, name in zip((140, 116), CLASSES, strict=True):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = (middle + spread * numbers.standard_normal((6, 6))).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


@pytest.fixture(scope="module", autouse=True)
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    root = tmp_path_factory.mktemp("runs")
    learned, tests = (write_pictures(root / "logistic" / part, 40, seed) for seed, part in enumerate(("data", "tests")))
    with narrow_runs(root, "--epochs", "1", "--repeats", "1") as runs:
        data = ("--data", str(learned), "--test-data", str(tests))
        runs.own["logistic"] = (*data, "--batch-size", "40", "--epochs", "2")
        yield runs


def read(runs: Runs, name: str, **criterion: float) -> TrainedNetwork:
    return read_network(runs[name], Criterion(**criterion))


# Each kind of network, judged


def test_a_classifier_fails_where_the_record_says_that_it_was_wrong(runs: Runs) -> None:
    demands = read(runs, "logistic").try_out(None)
    (recorded,) = Record.read(runs["logistic"]).runs
    assert len(demands) == len({demand.input for demand in demands}) == 80
    accuracy = recorded.epochs[-1].further["accuracy"]
    assert 1 - sum(demand.failed for demand in demands) / 80 == pytest.approx(accuracy, abs=1e-6)
    assert 0 < sum(demand.failed for demand in demands) < 40
    assert [demand.truth for demand in demands] == ["bright"] * 40 + ["dark"] * 40
    assert all(demand.failed == (demand.prediction != demand.truth) for demand in demands)


def test_a_classifier_that_is_not_sure_declines_and_does_not_fail(runs: Runs) -> None:
    trained = read_trained(runs["logistic"])
    with torch.no_grad():
        logits = torch.cat([trained.model(inputs) for inputs, _ in trained.tests()]).double()
    sure = torch.sigmoid((logits[:, 0] - logits[:, 1]).abs()).tolist()
    demands = read(runs, "logistic", sure=0.6).try_out(None)
    assert 0 < sum(s < 0.6 for s in sure) < 80
    assert [demand.prediction == DECLINED for demand in demands] == [s < 0.6 for s in sure]
    always = read(runs, "logistic").try_out(None)
    expected = [a.failed and s >= 0.6 for a, s in zip(always, sure, strict=True)]
    assert [demand.failed for demand in demands] == expected
    assert sum(expected) > 0


def test_an_image_fails_whose_dice_is_below_the_bound(runs: Runs) -> None:
    model, images = read_trained(runs["unet"]).model, read_masked_images(runs["unet"].parent / "data")
    with torch.no_grad():
        found = (model(images.pixels.float() / 255) > 0).numpy()
    both = np.array([(a & (b > 0)).sum() for a, b in zip(found, images.masks.numpy(), strict=True)])
    dice = 2 * both / (found.sum((1, 2)) + images.masks.numpy().sum((1, 2)))
    bound = float(np.median(dice)) + 1e-9
    demands = read(runs, "unet", dice=bound).try_out(runs["unet"].parent / "data")
    assert [demand.failed for demand in demands] == (dice < bound).tolist()
    assert 0 < sum(demand.failed for demand in demands) < len(demands)


@pytest.mark.parametrize("recipe", ["gpt", "bert"])
def test_a_sequence_fails_whose_mean_loss_is_above_the_bound(recipe: str, runs: Runs) -> None:
    trained, losses = read_trained(runs[recipe]), []
    with torch.no_grad():
        for inputs, targets in trained.tests():
            logs = trained.model(inputs).double().log_softmax(-1)
            for row, wanted in zip(logs, targets, strict=True):
                kept = wanted != -100
                losses.append(-float(row[kept].gather(1, wanted[kept][:, None]).mean()))
    bound = float(np.median(losses)) + 1e-4
    demands = read(runs, recipe, loss=bound).try_out(None)
    assert [demand.failed for demand in demands] == [loss > bound for loss in losses]
    assert 0 < sum(demand.failed for demand in demands) < len(demands)


@pytest.mark.parametrize(
    ("name", "criterion"),
    [("logistic", {}), ("logistic", {"sure": 0.6}), ("unet", {"dice": 0.0}), ("gpt", {"loss": 1e9})],
)
def test_an_output_that_is_not_a_number_is_a_failure(name: str, criterion: dict[str, float], runs: Runs) -> None:
    network = read(runs, name, **criterion)
    assert not all(demand.failed for demand in network.try_out(None))
    with torch.no_grad():
        for parameter in network.trained.model.parameters():
            parameter.fill_(torch.nan)
    assert all(demand.failed for demand in network.try_out(None))


def test_other_data_than_those_of_the_run_may_be_tried_out(runs: Runs, tmp_path: Path) -> None:
    pictures = read(runs, "logistic").try_out(write_pictures(tmp_path / "more", 5, 7))
    assert [demand.truth for demand in pictures] == ["bright"] * 5 + ["dark"] * 5
    masks = read(runs, "unet", dice=0.5)
    assert len(masks.try_out(runs["unet"].parent / "data")) > len(masks.try_out(None))
    (tmp_path / "more.txt").write_text("a cat saw the eel\n" * 9)  # 162 characters are ten sequences of 16
    assert len(read(runs, "gpt", loss=1.0).try_out(tmp_path / "more.txt")) == 10
    (tmp_path / "none.txt").write_bytes(b"\xff")
    for name, message in (("none.txt", "not text in UTF-8"), ("absent.txt", "no such text file")):
        with pytest.raises(DataError, match=message):
            read(runs, "gpt", loss=1.0).try_out(tmp_path / name)


def test_what_was_learned_from_is_known_of_images(runs: Runs) -> None:
    for name, criterion in (("logistic", {}), ("unet", {"dice": 0.5})):
        network = read(runs, name, **criterion)
        again = {demand.input for demand in network.try_out(runs[name].parent / "data")}
        learned = network.learned()
        assert learned is not None
        assert learned <= again
        assert not learned & {demand.input for demand in network.try_out(None)}
    assert read(runs, "gpt", loss=1.0).learned() is None


@pytest.mark.parametrize(
    ("name", "criterion", "message"),
    [
        ("unet", {}, "is open; give dice"),
        ("gpt", {}, "is open; give loss"),
        ("bert", {"sure": 0.5}, "sure does not judge a run of bert; give loss"),
        ("logistic", {"dice": 0.5}, "dice does not judge a run of logistic; give sure"),
        ("maskrcnn", {}, "demands of a run of maskrcnn are not judged here"),
    ],
)
def test_a_measure_that_is_missing_or_foreign_is_refused(name: str, criterion: Any, message: str, runs: Runs) -> None:
    with pytest.raises(ConfigurationError, match=message):
        read(runs, name, **criterion)


@pytest.mark.parametrize(
    ("criterion", "message"), [({"sure": 2}, "sure is 2"), ({"dice": -1}, "dice"), ({"loss": 0}, "loss is 0")]
)
def test_a_measure_out_of_its_range_is_refused(criterion: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Criterion(**criterion)


def test_measures_that_differ_in_a_late_digit_are_told_apart() -> None:
    told = [Criterion(sure=sure).describe() for sure in (0.9, 0.9999999, 0.99999995)]
    assert told == ["sure 0.9", "sure 0.9999999", "sure 0.99999995"]


def test_networks_that_do_not_answer_by_a_class_say_so(runs: Runs, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="a run of unet does not answer an image by a class"):
        read(runs, "unet", dice=0.5).answer([tmp_path / "x.png"])


# The case


@pytest.fixture
def folder(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").symlink_to(runs["logistic"])
    (tmp_path / "case.toml").write_text(CASE)
    write_pictures(tmp_path / "held-out", 30, 3)
    (tmp_path / "held-out" / "dark").rename(tmp_path / "linked")
    (tmp_path / "held-out" / "dark").symlink_to(tmp_path / "linked")
    write_pictures(tmp_path / "seen", 12, 4)
    write_operation(tmp_path, [(f"seen/{name}/{index}.png", name) for index in range(12) for name in CLASSES])
    return tmp_path


def write_operation(folder: Path, pairs: Sequence[tuple[str, str]]) -> None:
    lines = [f"{path},{truth},{(START + timedelta(minutes=i)).isoformat()}" for i, (path, truth) in enumerate(pairs)]
    (folder / "operation.csv").write_text("\n".join(["input,truth,time", *lines]) + "\n")


def claims(folder: Path) -> Any:
    return json.loads((folder / "case-case" / "claims.json").read_text())


def test_held_out_data_and_operation_are_put_to_the_network(
    folder: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kaisa.recipes.demands.AT_ONCE", 10)  # the 24 images are answered in three lots
    assert run(["assure", "run", "case.toml"]) == 0
    network = read(runs, "logistic", sure=0.6)
    failures = sum(demand.failed for demand in network.try_out(folder / "held-out"))
    low, high = lower_bound(failures, 60, 0.95), upper_bound(failures, 60, 0.95)
    found = claims(folder)
    assert found["prior"]["quantiles"] == [[pytest.approx(high), pytest.approx(0.95)]]
    assert found["prior"]["at_most"] == [[pytest.approx(low), pytest.approx(0.05)]]
    exhibit = json.loads((folder / "held-out.evidence.json").read_text())
    assert f"{failures} of 60 held-out demands failed: from {low:.3g} to {high:.3g}" in exhibit["statement"]
    assert "sure 0.6" in exhibit["statement"]
    assert len(exhibit["inputs"]) == 60
    in_operation = {d.input: d.failed for d in network.try_out(folder / "seen")}
    journal = [json.loads(line)["record"] for line in (folder / "operation.journal").read_text().splitlines()[1:]]
    assert {record["input"]: record["failed"] for record in journal} == in_operation
    assert found["demands"] == 24
    assert 0 < found["failures"] == sum(in_operation.values())
    assert run(["assure", "report", "case.toml"]) == 0


def test_what_is_counted_is_not_asked_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(["assure", "run", "case.toml"]) == 0
    before = (folder / "operation.journal").read_bytes()
    asked: list[Path] = []
    answer = TrainedNetwork.answer
    monkeypatch.setattr(TrainedNetwork, "answer", lambda self, paths: asked.extend(paths) or answer(self, paths))
    monkeypatch.setattr(TrainedNetwork, "try_out", None)
    write_pictures(folder / "later", 1, 9)
    with (folder / "operation.csv").open("a") as stream:
        stream.write(f"later/dark/0.png,dark,{(START + timedelta(days=1)).isoformat()}\n")
    assert run(["assure", "run", "case.toml"]) == 0
    assert [path.parts[-3:] for path in asked] == [("later", "dark", "0.png")]
    assert (folder / "operation.journal").read_bytes().startswith(before)
    assert claims(folder)["demands"] == 25


def test_the_part_that_the_run_was_tested_on_may_be_the_evidence(folder: Path) -> None:
    (folder / "case.toml").write_text(CASE.replace('data = "held-out"', "tests = true"))
    assert run(["assure", "run", "case.toml"]) == 0
    exhibit = json.loads((folder / "held-out.evidence.json").read_text())
    assert " of 80 held-out demands" in exhibit["statement"]
    assert any("tested on them as it went on" in text for text in exhibit["assumptions"])


def learn_again(folder: Path) -> None:
    weights = next((folder / "run").resolve().glob("*.safetensors"))
    (folder / "run").unlink()
    (folder / "run").mkdir()
    (folder / "run" / "record.json").write_bytes(weights.with_name("record.json").read_bytes())
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    (folder / "run" / weights.name).write_bytes(content)


def answer_more(folder: Path) -> None:
    (folder / "case.toml").write_text(CASE.replace("sure = 0.6", "sure = 0.55"))


def answer_more_and_forget_the_evidence(folder: Path) -> None:
    answer_more(folder)
    (folder / "held-out.evidence.json").unlink()
    (folder / "case-case" / "case.json").unlink()


def change_the_data_behind_a_link(folder: Path) -> None:
    (folder / "linked" / "0.png").write_bytes((folder / "linked" / "1.png").read_bytes())


def change_the_data(folder: Path) -> None:
    (folder / "held-out" / "bright" / "0.png").unlink()


def lose_an_image(folder: Path) -> None:
    (folder / "seen" / "dark" / "3.png").unlink()


def operate_on_the_evidence(folder: Path) -> None:
    with (folder / "operation.csv").open("a") as stream:
        stream.write(f"held-out/dark/0.png,dark,{(START + timedelta(days=1)).isoformat()}\n")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (learn_again, "was made by another network"),
        (answer_more, "was made by another network, other data or another measure"),
        (answer_more_and_forget_the_evidence, "or when it declines"),
        (change_the_data, "was made by another network, other data"),
        (change_the_data_behind_a_link, "was made by another network, other data"),
        (lose_an_image, "no such image file"),
        (operate_on_the_evidence, "cannot count again as operation"),
    ],
)
def test_a_changed_network_measure_or_input_is_refused_and_the_journal_left(
    spoil: Any, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["assure", "run", "case.toml"]) == 0
    before = (folder / "operation.journal").read_bytes()
    spoil(folder)
    assert run(["assure", "run", "case.toml"]) == 2
    assert message in capsys.readouterr().err
    assert (folder / "operation.journal").read_bytes() == before


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('run = "run"', 'run = "run"\nmodel = "m"', "either model or run"),
        ('run = "run"\nsure = 0.6', "", "names no run"),
        ('data = "held-out"', 'data = "held-out"\ntests = true', "one of file, records, data and tests"),
        ('sides = "both"', 'sides = "left"', "sides is 'left'"),
        ('name = "held-out"', 'name = "held out"', "name is 'held out'"),
        ("sure = 0.6", "sure = 6", "sure is 6"),
        ("sure = 0.6", "dice = 0.6", "dice does not judge"),
        ('run = "run"', 'run = "walk"', "no record.json"),
        ('data = "held-out"', 'data = "run/../data"', "has learned from 80 of the 80 inputs"),
    ],
)
def test_a_case_that_asks_of_a_network_what_it_cannot_is_refused(
    old: str, new: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "data" in new and ".." in new:
        new = f'data = "{(folder / "run").resolve().parent / "data"}"'
    (folder / "case.toml").write_text(CASE.replace(old, new, 1))
    assert run(["assure", "run", "case.toml"]) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "operation.journal").exists()
    assert not (folder / "held-out.evidence.json").exists()


def test_an_input_without_a_prediction_needs_a_network(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = CASE.replace('run = "run"\nsure = 0.6', "").replace('data = "held-out"', 'records = "operation.csv"')
    (folder / "case.toml").write_text(text)
    assert run(["assure", "run", "case.toml"]) == 2
    assert "24 records with an input and no prediction" in capsys.readouterr().err
