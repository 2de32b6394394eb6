"""Trains in few bits: quantised training (QAT) against fully quantised training with each quantiser at each bit width.

Of ResNet-20 on small images and of BERT on text; the schedule is short. All runs of a seed start from the same weights
and see the same batches. Seeds are the outer loop, and the file is written after every run: an interrupted study goes
on where it was, and holds comparable figures at any time.

    python benchmarks/quantized_training.py resnet --data CIFAR10-train.zip --output benchmarks/results/quantized_resnet20.json
    python benchmarks/quantized_training.py bert --data TEXT.zip --output benchmarks/results/quantized_bert.json
    python benchmarks/quantized_training.py bert --data TEXT.zip --variance benchmarks/results/quantized_bert_variance.json
    python benchmarks/quantized_training.py --draw docs/images/quantized-training.png benchmarks/results/quantized_*.json
"""  # noqa: E501 - commands that can be copied

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kaisa.quantize import QuantConfig, prepare, variance_report
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
    "resnet": {
        "recipe": "resnet",
        "model": "resnet20",
        "image_size": 16,
        "batch_size": 128,
        "lr": 0.1,
        "epochs": 5,
        "contestants": "first-order",
    },
    "bert": {  # behind K-FAC, without which so few steps learn no more than how frequent letters are
        "recipe": "bert",
        "model": "bert-nano",
        "batch_size": 64,
        "positions": 32,
        "optimizer": "sgd",
        "lr": 0.3,
        "damping": 0.03,
        "factor_update_steps": 5,
        "inv_update_steps": 20,
        "epochs": 1,
        "contestants": "kfac",
    },
}
TRAIN_IMAGES = 6400
REPORTED_AFTER = 60
MOST_STEPS = {"resnet": 250, "bert": 500}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=tuple(SETTINGS), nargs="?")
    parser.add_argument("--data")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--ways", nargs="*", default=list(WAYS), help="such as qat:8 bhq:5, or bhq:4,8 with 8 at the last layer"
    )
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--variance", type=Path, metavar="FILE", help="report variance after some steps, and no study")
    parser.add_argument("--draw", nargs="+", type=Path, metavar="FILE", help="the picture, then the results")
    given = parser.parse_args()
    if given.draw:
        draw(given.draw[0], [json.loads(path.read_text("utf-8")) for path in given.draw[1:]])
        return
    if given.recipe is not None and given.data is not None and given.variance is not None:
        torch.set_num_threads(given.threads)
        report_variance(given.recipe, given.data, given.variance)
        return
    if given.recipe is None or given.data is None or given.output is None:
        parser.error("give a recipe, --data and --output, or --draw")
    torch.set_num_threads(given.threads)
    study(given.recipe, given.data, given.output, given.ways, given.seeds)


def study(recipe: str, data: str, output: Path, ways: Sequence[str], seeds: Sequence[int]) -> None:
    """Do the runs that the file does not have yet."""
    options = Options.complete({**SETTINGS[recipe], "data": data})
    results = _begun(output) or {
        "settings": {**SETTINGS[recipe], "steps": MOST_STEPS[recipe]},
        "score": options.score.name,
        **_about(),
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


def report_variance(recipe: str, data: str, output: Path) -> None:
    """Train in float for some steps, with seed 0, and say what each quantiser would add on the next batch."""
    options = Options.complete({**SETTINGS[recipe], "data": data})
    lesson = _smaller(read_data(options)).lesson(options, 0)
    model, _ = fit(lesson, options, FLOAT, 0, REPORTED_AFTER)
    batch = next(iter(lesson.batches.epoch(1)))

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        value: torch.Tensor = lesson.task.loss(model(batch[0]), batch[1])
        return value

    report = variance_report(model, batch, loss, kinds=QUANTIZERS, bits=BITS)
    report.save(output)
    settings = {"settings": {**SETTINGS[recipe], "steps": REPORTED_AFTER, "seed": 0}}
    saved = {**_about(), **settings, **json.loads(output.read_text("utf-8"))}
    output.write_text(json.dumps(saved, indent=1) + "\n", "utf-8")
    print(report)


def _about() -> dict[str, Any]:
    return {"machine": describe_machine(), "versions": describe_versions(), "commit": find_commit()}


def _begun(output: Path) -> dict[str, Any] | None:
    found: dict[str, Any] | None = json.loads(output.read_text("utf-8")) if output.exists() else None
    return found


def _smaller(data: Any) -> Any:
    if not isinstance(data, ImageData):
        return data
    chosen = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))[:TRAIN_IMAGES]
    some = Images(data.train.pixels[chosen], data.train.labels[chosen], data.train.classes)
    return ImageData(some, data.test, data.source)


def read_way(way: str, model: nn.Module) -> QuantConfig:
    """Return the options of a way: "bhq:4,8" is "bhq:4" with 8 bits for the gradient at the last layer."""
    usual, comma, last = way.partition(",")
    config = QuantConfig.read(usual)
    if not comma:
        return config
    assert isinstance(config.gradient_bits, int)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    bits = dict.fromkeys(names, config.gradient_bits) | {names[-1]: int(last)}
    return replace(config, gradient_bits=bits)


def fit(lesson: Lesson, options: Options, way: str, seed: int, most_steps: int) -> tuple[nn.Module, float]:
    """Train once; return the model and the last loss."""
    torch.manual_seed(seed)
    model = lesson.build()
    if way != FLOAT:
        prepare(model, read_way(way, model))
    (contestant,) = options.build_contestants()
    optimizer = contestant.build_optimizer(model)
    kfac = contestant.build_preconditioner(model, optimizer, seed, loss_terms=lesson.batches.terms)
    steps, epoch, loss = 0, 0, torch.tensor(math.nan)
    model.train()
    while steps < most_steps:
        for inputs, targets in lesson.batches.epoch(epoch):
            for group in optimizer.param_groups:
                group["lr"] = contestant.learning_rate * learning_rate_share(steps, most_steps)
            optimizer.zero_grad()
            loss = lesson.task.loss(model(inputs), targets)
            loss.backward()
            if kfac is not None:
                kfac.step()
            optimizer.step()
            steps += 1
            if steps == most_steps:
                break
        epoch += 1
    if kfac is not None:
        kfac.close()
    return model, loss.item()


def train(lesson: Lesson, options: Options, way: str, seed: int, most_steps: int) -> dict[str, Any]:
    """Train once; return the figures."""
    start = time.process_time()
    model, loss = fit(lesson, options, way, seed, most_steps)
    seconds = time.process_time() - start
    test_loss, (score, *_) = evaluate(model, lesson).means()
    is_finite = math.isfinite(test_loss)
    return {
        "way": way,
        "seed": seed,
        "score": score if is_finite else None,
        "test_loss": test_loss if is_finite else None,
        "train_loss": loss if math.isfinite(loss) else None,
        "cpu_seconds": round(seconds, 1),
    }


def means(results: dict[str, Any]) -> dict[str, tuple[float, float, int]]:
    """Return mean, standard error and number of the scores of each way; a run that diverged is not a number."""
    scores = _scores(results)
    return {way: _mean(list(own.values())) for way, own in scores.items()}


def differences(results: dict[str, Any]) -> dict[str, tuple[float, float, int]]:
    """Return the same of the differences to QAT's score of the same seed, which seeds themselves do not disturb."""
    scores = _scores(results)
    known = scores.get(QAT, {})
    paired = {way: [own[seed] - known[seed] for seed in own if seed in known] for way, own in scores.items()}
    return {way: _mean(values) for way, values in paired.items() if values}


def _scores(results: dict[str, Any]) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for run in results["runs"]:
        found.setdefault(run["way"], {})[run["seed"]] = math.nan if run["score"] is None else run["score"]
    return found


def _mean(values: Sequence[float]) -> tuple[float, float, int]:
    is_known = len(values) > 1 and all(map(math.isfinite, values))
    error = statistics.stdev(values) / math.sqrt(len(values)) if is_known else math.nan
    return statistics.fmean(values), error, len(values)


def draw(picture: Path, studies: Sequence[dict[str, Any]]) -> None:
    """Draw what the score loses against QAT over bits, with standard errors, a panel for each study."""
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
    found = differences(results)
    for index, (color, kind) in enumerate(zip(("tab:red", "tab:orange", "tab:blue"), QUANTIZERS, strict=True)):
        bits = sorted(int(way.split(":")[1]) for way in found if way.startswith(kind) and "," not in way)
        if not bits:
            continue
        mean, error, _ = zip(*(found[f"{kind}:{count}"] for count in bits), strict=True)
        places = [count + 0.06 * (index - 1) for count in bits]  # beside one another
        panel.errorbar(places, mean, yerr=error, marker="o", capsize=3, color=color, label=kind.upper())
    for way in (way for way in found if "," in way):
        usual, last = way.split(",")
        mean, error, _ = found[way]
        place, label = int(usual.split(":")[1]) + 0.15, f"{usual}, last layer {last}"
        panel.errorbar(place, mean, yerr=error, marker="*", capsize=3, color="black", label=label)
    panel.axhline(0, color="black", linestyle="--", linewidth=1, label=QAT)
    if FLOAT in found:
        panel.axhline(found[FLOAT][0], color="black", linestyle=":", linewidth=1, label=FLOAT)
    panel.set_xlabel("bits of the gradients")
    panel.set_ylabel(f"test {results['score']}, less QAT's of the same seed")
    panel.set_title(f"{results['settings']['model']}, {results['settings']['steps']} steps")
    panel.set_xticks(sorted({int(way.split(":")[1]) for way in found if way != FLOAT and "," not in way}))
    panel.invert_xaxis()
    panel.legend(fontsize=8)


if __name__ == "__main__":
    main()
