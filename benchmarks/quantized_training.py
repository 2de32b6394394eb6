"""Trains in few bits: quantised training (QAT) against fully quantised training with each quantiser at each bit width.

Of ResNet-20 on small images and of BERT on text; the schedule is short. All runs of a seed start from the same weights
and see the same batches. Seeds are the outer loop, and the file is written after every run: an interrupted study goes
on where it was, and holds comparable figures at any time.

    python benchmarks/quantized_training.py resnet --data CIFAR10-train.zip --output benchmarks/results/quantized_resnet20.json
    python benchmarks/quantized_training.py bert --data TEXT.zip --output benchmarks/results/quantized_bert.json
    python benchmarks/quantized_training.py --draw docs/images/quantized-training.png benchmarks/results/quantized_*.json
"""  # noqa: E501 - commands that can be copied

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kaisa.quantize import QuantConfig, prepare
from kaisa.recipes.contestants import learning_rate_share
from kaisa.recipes.data import ImageData, read_data
from kaisa.recipes.images import Images
from kaisa.recipes.loop import evaluate
from kaisa.recipes.options import Options
from kaisa.recipes.record import describe_machine, describe_versions, find_commit
from kaisa.recipes.tasks import Lesson

FLOAT, QAT = "float", "qat:8"
QUANTIZERS, BITS = ("ptq", "psq", "bhq"), (8, 6, 5, 4)
WAYS = (FLOAT, QAT, *(f"{kind}:{bits}" for bits in reversed(BITS) for kind in QUANTIZERS))
SEEDS = (0, 1, 2)
SETTINGS: dict[str, dict[str, Any]] = {
    "resnet": {"recipe": "resnet", "model": "resnet20", "image_size": 16, "batch_size": 128, "lr": 0.1, "epochs": 5},
    "bert": {"recipe": "bert", "model": "bert-nano", "batch_size": 32, "positions": 32, "lr": 0.003, "epochs": 1},
}
TRAIN_IMAGES = 6400
MOST_STEPS = {"resnet": 250, "bert": 400}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=tuple(SETTINGS), nargs="?")
    parser.add_argument("--data")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ways", nargs="*", default=list(WAYS), help="such as qat:8 bhq:5 ptq:3")
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--draw", nargs="+", type=Path, metavar="FILE", help="the picture, then the results")
    given = parser.parse_args()
    if given.draw:
        draw(given.draw[0], [json.loads(path.read_text("utf-8")) for path in given.draw[1:]])
        return
    if given.recipe is None or given.data is None or given.output is None:
        parser.error("give a recipe, --data and --output, or --draw")
    torch.set_num_threads(given.threads)
    study(given.recipe, given.data, given.output, given.ways, given.seeds)


def study(recipe: str, data: str, output: Path, ways: Sequence[str], seeds: Sequence[int]) -> None:
    """Do the runs that the file does not have yet."""
    options = Options.complete({**SETTINGS[recipe], "data": data, "contestants": "first-order"})
    results = _begun(output) or {
        "settings": {**SETTINGS[recipe], "steps": MOST_STEPS[recipe]},
        "score": options.score.name,
        "machine": describe_machine(),
        "versions": describe_versions(),
        "commit": find_commit(),
        "runs": [],
    }
    known = {(run["way"], run["seed"]) for run in results["runs"]}
    source = _smaller(read_data(options))
    for seed in seeds:
        for way in ways:
            if (way, seed) not in known:
                results["runs"].append(train(source.lesson(options, seed), options, way, seed, MOST_STEPS[recipe]))
                output.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
                print(json.dumps(results["runs"][-1]), flush=True)


def _begun(output: Path) -> dict[str, Any] | None:
    found: dict[str, Any] | None = json.loads(output.read_text("utf-8")) if output.exists() else None
    return found


def _smaller(data: Any) -> Any:
    if not isinstance(data, ImageData):
        return data
    chosen = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))[:TRAIN_IMAGES]
    some = Images(data.train.pixels[chosen], data.train.labels[chosen], data.train.classes)
    return ImageData(some, data.test, data.source)


def train(lesson: Lesson, options: Options, way: str, seed: int, most_steps: int) -> dict[str, Any]:
    """Train once; return the figures."""
    torch.manual_seed(seed)
    model = lesson.build()
    if way != FLOAT:
        prepare(model, QuantConfig.read(way))
    (contestant,) = options.build_contestants()
    optimizer = contestant.build_optimizer(model)
    start, steps, epoch, loss = time.process_time(), 0, 0, torch.tensor(math.nan)
    model.train()
    while steps < most_steps:
        for inputs, targets in lesson.batches.epoch(epoch):
            for group in optimizer.param_groups:
                group["lr"] = contestant.learning_rate * learning_rate_share(steps, most_steps)
            optimizer.zero_grad()
            loss = lesson.task.loss(model(inputs), targets)
            loss.backward()
            optimizer.step()
            steps += 1
            if steps == most_steps:
                break
        epoch += 1
    seconds = time.process_time() - start
    test_loss, (score, *_) = evaluate(model, lesson).means()
    is_finite = math.isfinite(test_loss)
    return {
        "way": way,
        "seed": seed,
        "score": score if is_finite else None,
        "test_loss": test_loss if is_finite else None,
        "train_loss": loss.item() if math.isfinite(loss.item()) else None,
        "cpu_seconds": round(seconds, 1),
    }


def means(results: dict[str, Any]) -> dict[str, tuple[float, float, int]]:
    """Return mean, standard error and number of the scores of each way; a run that diverged is not a number."""
    found = {}
    for way in dict.fromkeys(run["way"] for run in results["runs"]):
        scores = [math.nan if run["score"] is None else run["score"] for run in results["runs"] if run["way"] == way]
        is_known = len(scores) > 1 and all(map(math.isfinite, scores))
        error = statistics.stdev(scores) / math.sqrt(len(scores)) if is_known else math.nan
        found[way] = (statistics.fmean(scores), error, len(scores))
    return found


def draw(picture: Path, studies: Sequence[dict[str, Any]]) -> None:
    """Draw the score over bits, a panel for each study."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(studies), figsize=(5 * len(studies), 3.6), squeeze=False)
    for panel, results in zip(panels[0], studies, strict=True):
        _draw(panel, results)
    figure.tight_layout()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)


def _draw(panel: Any, results: dict[str, Any]) -> None:
    scores = means(results)
    for color, kind in zip(("tab:red", "tab:orange", "tab:blue"), QUANTIZERS, strict=True):
        bits = sorted(int(way.split(":")[1]) for way in scores if way.startswith(kind))
        if not bits:
            continue
        mean, error, _ = zip(*(scores[f"{kind}:{count}"] for count in bits), strict=True)
        panel.errorbar(bits, mean, yerr=error, marker="o", capsize=3, color=color, label=kind.upper())
    for way, style in ((FLOAT, ":"), (QAT, "--")):
        if way in scores:
            panel.axhline(scores[way][0], color="black", linestyle=style, linewidth=1, label=way)
    panel.set_xlabel("bits of the gradients")
    panel.set_ylabel(f"test {results['score']}")
    panel.set_title(f"{results['settings']['model']}, {results['settings']['steps']} steps")
    panel.invert_xaxis()
    panel.legend(fontsize=8)


if __name__ == "__main__":
    main()
