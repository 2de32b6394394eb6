"""A safety case from training to a failure burst: CIFAR-10 images, a frozen network that may decline to answer.

A demand is an image; the system answers where the network is sure and passes the image to a person where it is not. It
fails where it is sure and wrong. Parts of the data have one use each:

    fit        the network learns from them: ResNet-20 behind K-FAC, 4 epochs
    tuning     how sure is sure enough: so that about 1 % of the demands fail
    held-out   the prior knowledge: Clopper and Pearson's bounds on both sides, made by `kaisa assure run` itself
    operation  the test set, one image a minute, of which only file, truth and time are recorded: the network predicts;
               the last fifth comes from a noisy sensor

    python benchmarks/assurance.py --train cifar10-train.zip --test cifar10-test.zip --output case

One command for all of it. It goes on where it was stopped: what a step has finished is not done again.
"""

from __future__ import annotations

import argparse
import io
import json
import zipfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kaisa.cli import run
from kaisa.recipes.images import list_classes
from kaisa.recipes.record import FILE, Record, describe_machine, describe_versions, find_commit
from kaisa.recipes.trained import read_trained

PARTS = {"fit": (0, 2000), "tuning": (4000, 4200), "held-out": (4500, 4800)}  # of the 5000 images of a class
SEED = 0
EPOCHS = 4
FAILING = 0.01  # the share of failures that the threshold is chosen for
DEMANDS, NOISY = 5000, 1000  # of operation, and of them with noise, the last ones
NOISE = 40.0  # standard deviation, of 255
COUNTS = (*range(0, 4001, 500), *range(4250, 5001, 250))
START = datetime(2026, 2, 1, tzinfo=UTC)
CASE = """title = "The image sorter seldom errs unnoticed"
[system]
name = "image sorter"
run = "run"
sure = {sure}
frozen = 2026-02-01T00:00:00Z
[operation]
records = "operation.csv"
journal = "operation.journal"
context = "Photographs of ten kinds of things, 32 × 32 pixels, of a working sensor; unsure ones go to a person"
[prior]
floor = 1e-4
floor_because = "At least one label in 10,000 is wrong"
[[prior.quantile]]
from = "held-out"
[[evidence]]
name = "held-out"
data = "parts/held-out.zip"
belief = 0.95
sides = "both"
supports = "training"
[[claim]]
kind = "confidence"
bound = 0.02
target = 0.99
[[claim]]
kind = "reliability"
demands = 10
target = 0.8
[[defeater]]
challenges = "operation"
text = "The test set was drawn together with the training set; another camera may do worse"
answer = "The claim is for this camera; the burst shows what another one does"
"""


def split(data: Path, output: Path) -> None:
    """Write the parts of a zip file of images, the same number of each class in each."""
    output.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(data) as archive:
        classes = list_classes(archive.namelist(), data)
        for part, (first, last) in PARTS.items():
            partial = output / f".{part}.partial"
            with zipfile.ZipFile(partial, "w") as made:
                for names in classes.values():
                    for name in names[first:last]:
                        made.writestr(zipfile.ZipInfo(name), archive.read(name))
            partial.replace(output / f"{part}.zip")


def train(folder: Path) -> Path:
    """Train, or go on with it, by the command line; return the folder of the run."""
    made = folder / "run"
    if (made / FILE).exists() and Record.read(made).is_finished("sgd + K-FAC", SEED):
        return made
    data = ["--data", str(folder / "parts" / "fit.zip"), "--test-data", str(folder / "parts" / "tuning.zip")]
    how = ["--model", "resnet20", "--kfac", "--epochs", str(EPOCHS), "--seed", str(SEED), "--threads", "1"]
    begun = (made / FILE).exists()
    status = run(["train", "--resume", str(made)] if begun else ["train", *data, *how, "--output", str(made)])
    if status:
        raise SystemExit(status)
    return made


@torch.no_grad()
def find_threshold(folder: Path) -> tuple[float, dict[str, float]]:
    """Return how sure is sure enough by the images that the run was tested on, and what that makes of them."""
    trained = read_trained(folder)
    wrong, sure = [], []
    for inputs, labels in trained.tests():
        probability, said = trained.model(inputs).softmax(1).max(1)
        wrong.append(said != labels)
        sure.append(probability)
    threshold = least_sure(torch.cat(wrong), torch.cat(sure))
    kept = torch.cat(sure) >= threshold
    shares = {"accuracy": ~torch.cat(wrong), "answered": kept, "failed": kept & torch.cat(wrong)}
    return threshold, {name: share.float().mean().item() for name, share in shares.items()}


def least_sure(wrong: Tensor, sure: Tensor) -> float:
    """Return the least threshold above which answers are wrong on no more than the wanted share, to four digits."""
    order = sure.argsort(descending=True)
    kept = int((wrong[order].cumsum(0) <= FAILING * len(wrong)).sum())
    return float(np.ceil(float(sure[order[kept - 1]]) * 1e4) / 1e4)


def take_photographs(data: Path, folder: Path) -> list[str]:
    """Write the images of operation as files, the last of them with noise; return the records, a line each."""
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(data) as archive:
        pairs = [(name, of) for of, names in list_classes(archive.namelist(), data).items() for name in names]
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(SEED))[:DEMANDS].tolist()
        noise = np.random.default_rng(SEED)
        lines = []
        for index, (name, truth) in enumerate(pairs[place] for place in order):
            content, ending = archive.read(name), Path(name).suffix
            if index >= DEMANDS - NOISY:
                content, ending = add_noise(content, noise), ".png"
            file = folder / f"{index:05}{ending}"
            file.write_bytes(content)
            lines.append(f"{folder.name}/{file.name},{truth},{(START + timedelta(minutes=index)).isoformat()}\n")
    return lines


def add_noise(content: bytes, noise: np.random.Generator) -> bytes:
    """Return an image as a failing sensor gives it."""
    with Image.open(io.BytesIO(content)) as image:
        pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
    made = io.BytesIO()
    Image.fromarray((pixels + NOISE * noise.standard_normal(pixels.shape)).clip(0, 255).astype(np.uint8)).save(
        made, "PNG"
    )
    return made.getvalue()


def operate(folder: Path, lines: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Let demands come in, run the case after each further lot, and yield what it claims."""
    case = str(folder / "case.toml")
    for count in COUNTS:
        (folder / "operation.csv").write_text("input,truth,time\n" + "".join(lines[:count]), encoding="utf-8")
        status = run(["assure", "run", case])
        if status not in (0, 1):
            raise SystemExit(status)
        if count in (DEMANDS - NOISY, DEMANDS - NOISY + 250):
            run(["assure", "report", case, "--output", str(folder / f"report-{count}")])
        found = json.loads((folder / "case-case" / "claims.json").read_text())
        values = {f"{claim['type']} {claim['at']:g}": claim["value"] for claim in found["claims"]}
        yield {"demands": count, "failures": found["failures"], "status": status, **values}


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the whole case, and a JSON file of what was found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("--train", "--test", "--output"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--json", type=Path, help="where the figures go [OUTPUT/assurance.json]")
    given = parser.parse_args(arguments)
    folder: Path = given.output
    if not all((folder / "parts" / f"{part}.zip").exists() for part in PARTS):
        split(given.train, folder / "parts")
    made = train(folder)
    sure, tuning = find_threshold(made)
    (folder / "case.toml").write_text(CASE.format(sure=sure), encoding="utf-8")
    (folder / "operation.journal").unlink(missing_ok=True)  # the operation is played from its beginning
    steps = list(operate(folder, take_photographs(given.test, folder / "operation")))
    record, evidence = Record.read(made), json.loads((folder / "held-out.evidence.json").read_text())
    found = {
        "kind": "kaisa assurance example",
        **{"machine": describe_machine(), "versions": describe_versions(), "commit": find_commit(), "seed": SEED},
        "training": {
            **{"commit": record.commit, "started": record.started, "images": record.data["train_images"]},
            **{"epochs": EPOCHS, "seconds": record.runs[0].epochs[-1].seconds},
        },
        "tuning": {"sure": sure, **tuning},
        "held_out": {name: evidence[name] for name in ("statement", "quantile", "at_most")},
        "steps": steps,
    }
    (given.json or folder / "assurance.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
