"""A safety case from training to a failure burst: CIFAR-10 images, a frozen network that may decline to answer.

A demand is an image; the system answers where the network is sure and passes the image to a person where it is not. It
fails where it is sure and wrong. Parts of the data have one use each:

    fit        the network learns from them
    tuning     how sure is sure enough: so that about 1 % of the demands fail
    held-out   the prior knowledge: Clopper and Pearson's bounds, both sides
    operation  the test set, one demand a minute; the last fifth comes from a noisy sensor

    python benchmarks/assurance.py split --data cifar10-train.zip --output parts
    kaisa train --data parts/fit.zip --test-data parts/tuning.zip --kfac --epochs 4 --output parts/run
    python benchmarks/assurance.py operate --run parts/run --parts parts --operation cifar10-test.zip --output case
"""

from __future__ import annotations

import argparse
import hashlib
import json
import zipfile
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import torch
from safetensors.torch import load_model
from scipy.stats import beta
from torch import Tensor, nn

from kaisa.cli import run
from kaisa.recipes.batches import Normalizer
from kaisa.recipes.catalogue import find_model
from kaisa.recipes.images import Images, read_images
from kaisa.recipes.record import Record

PARTS = {"fit": (0, 2000), "tuning": (4000, 4200), "held-out": (4500, 4800)}  # of the 5000 images of a class
FAILING = 0.01  # the share of failures that the threshold is chosen for
NOISE = 40.0  # standard deviation, of 255
SIDE = 0.025  # belief that the pfd is beyond each of the bounds
HELD_OUT, START = datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 2, 1, tzinfo=UTC)
CASE = """title = "The image sorter seldom errs unnoticed"
[system]
name = "image sorter"
model = "{model}"
frozen = 2026-02-01T00:00:00Z
[operation]
records = "operation.jsonl"
journal = "operation.journal"
context = "Photographs of ten kinds of things, 32 × 32 pixels, of a working sensor; unsure ones go to a person"
[prior]
floor = 1e-4
floor_because = "At least one label in 10,000 is wrong"
[[prior.quantile]]
bound = {low}
belief = {side}
because = "Lower bound of the held-out test, by Clopper and Pearson: the network is not better than it showed"
[[prior.quantile]]
from = "held-out"
[[evidence]]
name = "held-out"
records = "held-out.jsonl"
belief = {upper_belief}
supports = "training"
[[claim]]
kind = "confidence"
bound = {bound}
target = 0.99
[[claim]]
kind = "reliability"
demands = 10
target = 0.8
[[defeater]]
challenges = "operation"
text = "The test set was drawn together with the training set; another camera may do worse"
answer = "The claim is for this camera; the burst below shows what another one does"
"""


def split(data: Path, output: Path) -> None:
    """Write the parts of a zip file of images, the same number of each class in each."""
    output.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(data) as archive:
        classes: dict[str, list[str]] = {}
        for name in sorted(archive.namelist()):
            if not name.endswith("/"):
                classes.setdefault(name.split("/")[-2], []).append(name)
        for part, (first, last) in PARTS.items():
            with zipfile.ZipFile(output / f"{part}.zip", "w") as made:
                for names in classes.values():
                    for name in names[first:last]:
                        made.writestr(zipfile.ZipInfo(name), archive.read(name))


@torch.no_grad()
def answer(model: nn.Module, normalize: Normalizer, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the answer to each image, and how sure the network is of it."""
    logits = torch.cat([model(normalize(batch)) for batch in pixels.split(500)])
    sure, said = logits.softmax(1).max(1)
    return said, sure


def find_threshold(wrong: Tensor, sure: Tensor) -> float:
    """Return the least threshold above which answers are wrong on no more than the wanted share of all demands."""
    order = sure.argsort(descending=True)
    failures = wrong[order].cumsum(0)
    kept = int((failures <= FAILING * len(wrong)).sum())
    return float(sure[order[kept - 1]])


def write_records(path: Path, images: Images, said: Tensor, answered: Tensor, start: datetime) -> None:
    """Write one record a demand: a failure is an answer that is given and wrong."""
    with path.open("a", encoding="utf-8") as stream:
        for index, (failed, pixels) in enumerate(zip(answered & (said != images.labels), images.pixels, strict=True)):
            record = {
                "time": (start + timedelta(minutes=index)).isoformat(),
                "failure": bool(failed),
                "input": hashlib.sha256(pixels.numpy().tobytes()).hexdigest(),
            }
            stream.write(json.dumps(record) + "\n")


def operate(folder: Path, parts: Path, operation: Path, output: Path, limit: int) -> list[dict[str, float]]:
    """Choose the threshold, write the case, and run it on a growing stream of demands; return what was claimed."""
    output.mkdir(parents=True, exist_ok=True)
    options = Record.read(folder).options
    fit = read_images(parts / "fit.zip")
    normalize = Normalizer.fit(fit)
    model = find_model(options.recipe, options.model)(fit.shape, len(fit.classes))
    weights = next(folder.glob("*.safetensors"))
    load_model(model, weights)
    model.eval()

    tuning = read_images(parts / "tuning.zip")
    said, sure = answer(model, normalize, tuning.pixels)
    threshold = find_threshold(said != tuning.labels, sure)
    print(f"tuning: accuracy {(said == tuning.labels).float().mean():.3f}; answers where surer than {threshold:.3f}")
    print(f"answered: {(sure >= threshold).float().mean():.3f} of the demands")

    held_out = read_images(parts / "held-out.zip")
    said, sure = answer(model, normalize, held_out.pixels)
    failures = int(((said != held_out.labels) & (sure >= threshold)).sum())
    write_records(output / "held-out.jsonl", held_out, said, sure >= threshold, HELD_OUT)
    low, high = (
        float(beta.ppf(SIDE, failures, len(held_out) - failures + 1)),
        float(beta.ppf(1 - SIDE, failures + 1, len(held_out) - failures)),
    )
    print(f"held-out: {failures} of {len(held_out)} fail; pfd from {low:.4f} to {high:.4f}")
    copied = output / "model.safetensors"
    copied.write_bytes(weights.read_bytes())
    bound = round(1.2 * high, 3)  # chosen before any operation is seen
    case = CASE.format(model=copied.name, low=round(low, 6), side=SIDE, upper_belief=1 - SIDE, bound=bound)
    (output / "case.toml").write_text(case, encoding="utf-8")

    tests = shuffled(read_images(operation), limit)
    noisy = len(tests) // 5
    seen = Images(tests.pixels.clone(), tests.labels, tests.classes)
    seen.pixels[-noisy:] = add_noise(seen.pixels[-noisy:])
    said, sure = answer(model, normalize, seen.pixels)
    return [
        stream(output, seen, said, sure >= threshold, count)
        for count in [
            *range(0, len(tests) - noisy, len(tests) // 10),
            *range(len(tests) - noisy, len(tests) + 1, noisy // 4),
        ]
    ]


def shuffled(images: Images, limit: int) -> Images:
    """Return some of the images in an order of their own."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:limit]
    return Images(images.pixels[order], images.labels[order], images.classes)


def add_noise(pixels: Tensor) -> Tensor:
    """Return images as a failing sensor gives them."""
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    return (pixels.float() + NOISE * noise).clamp(0, 255).byte()


def stream(output: Path, images: Images, said: Tensor, answered: Tensor, count: int) -> dict[str, float]:
    """Let the first demands have come in, run the case, and return what it claims."""
    (output / "operation.jsonl").unlink(missing_ok=True)
    first = Images(images.pixels[:count], images.labels[:count], images.classes)
    write_records(output / "operation.jsonl", first, said[:count], answered[:count], START)
    status = run(["assure", "run", str(output / "case.toml")])
    report = output / f"report-{count}"
    run(["assure", "report", str(output / "case.toml"), "--output", str(report)])
    found = json.loads((output / "case-case" / "claims.json").read_text())
    values = {f"{claim['type']} {claim['at']:g}": claim["value"] for claim in found["claims"]}
    print(f"{count} demands, {found['failures']} failures, exit status {status}: {values}")
    return {"demands": count, "failures": found["failures"], "status": status, **values}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one of the two halves."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    halves = parser.add_subparsers(dest="half", required=True)
    first = halves.add_parser("split")
    first.add_argument("--data", type=Path, required=True)
    second = halves.add_parser("operate")
    for name in ("--run", "--parts", "--operation"):
        second.add_argument(name, type=Path, required=True)
    second.add_argument("--limit", type=int, default=5000)
    for half in (first, second):
        half.add_argument("--output", type=Path, required=True)
    given = parser.parse_args(arguments)
    if given.half == "split":
        split(given.data, given.output)
        return
    steps = operate(given.run, given.parts, given.operation, given.output, given.limit)
    (given.output / "steps.json").write_text(json.dumps(steps, indent=1) + "\n")


if __name__ == "__main__":
    main()
