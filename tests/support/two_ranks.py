"""Run by torchrun: what only real processes can show of a training on several ranks. The first rank writes JSON."""

from __future__ import annotations

import json
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import torch

from kaisa.kfac import solvers
from kaisa.kfac.collectives import Collectives, join_world, leave_world
from kaisa.kfac.gathering import gathered
from kaisa.recipes.batches import ImageBatches, ImageTests, Normalizer
from kaisa.recipes.comparison import in_few_bits
from kaisa.recipes.contestants import Contestant, Preconditioning
from kaisa.recipes.distributed import account_of
from kaisa.recipes.images import Images
from kaisa.recipes.loop import Training, load, save
from kaisa.recipes.models import build_model
from kaisa.recipes.options import Options
from kaisa.recipes.tasks import CLASSIFICATION, Lesson

EPOCHS = 3
CPU = torch.device("cpu")


def start(ranks: Collectives, fraction: float, quantize: str | None = None) -> Training:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (24, 3, 8, 8), generator=generator, dtype=torch.uint8)
    images = Images(pixels, torch.arange(24) % 3, ("cat", "dog", "eel"))
    batches = ImageBatches(images, Normalizer.fit(images), 8, True, 3, rank=ranks.rank, ranks=ranks.world_size)
    options = Preconditioning(0.03, 2, 4, grad_worker_fraction=fraction)
    contestant = Contestant("sgd", 0.05, preconditioning=options)
    build = partial(build_model, "cnn", (3, 8, 8), 3)
    lesson = Lesson(CLASSIFICATION, batches, ImageTests(images, batches.normalize), build)
    few_bits = in_few_bits(lesson, Options.complete({"quantize": quantize}))
    return Training.start(contestant, few_bits, EPOCHS, ranks)


def resumes_to_the_bit(ranks: Collectives, fraction: float, folder: Path, quantize: str | None = None) -> bool:
    """Whether a run of three epochs is the same when it is stopped after one."""
    whole = start(ranks, fraction, quantize)
    while not whole.is_finished:
        whole.epoch()
    stopped = start(ranks, fraction, quantize)
    stopped.epoch()
    save(stopped, folder / "checkpoint.pt")
    ranks.total("written", (0, 1), torch.zeros(1))
    resumed = start(ranks, fraction, quantize)
    load(resumed, folder / "checkpoint.pt")
    while not resumed.is_finished:
        resumed.epoch()
    pairs = zip(whole.model.state_dict().values(), resumed.model.state_dict().values(), strict=True)
    return all(torch.equal(*pair) for pair in pairs)


def noise_of_ranks(ranks: Collectives) -> list[list[float]]:
    """What each rank draws first when its training has begun; complete on the first."""
    start(ranks, 1.0).close()
    return [state["noise"] for state in gathered({"noise": torch.rand(3).tolist()}, ranks, CPU)]


def measured_and_told(ranks: Collectives, fraction: float) -> list[object]:
    """What the first rank sends and holds in the second step in which everything is due, and what is told of it."""
    training = start(ranks, fraction)
    assert training.kfac is not None
    batch = next(training.batches.epoch(0))
    for _ in range(5):
        sent, calls = Counter(ranks.bytes_sent), Counter(ranks.calls)
        training.step(*batch)
    measured = {k: [ranks.bytes_sent[k] - sent[k], ranks.calls[k] - calls[k]] for k in sorted(ranks.calls - calls)}
    held = training.kfac.memory_usage()
    shapes = list(training.kfac._transport.shapes.values())
    account = account_of(shapes, ranks.world_size, round(fraction * ranks.world_size), solvers.named("eigen"))
    parts = {**account.factor_step[0], **account.inverse_step[0], **account.every_step[0]}
    told = {kind: [sent.bytes, sent.calls] for kind, sent in sorted(parts.items())}
    at_rest = {kind: size for kind, size in account.memory[0].items() if kind not in ("statistics", "total")}
    return [[measured, {kind: held[kind] for kind in at_rest}], [told, at_rest]]


def main() -> None:
    ranks, folder = join_world(CPU), Path(sys.argv[1])
    results: dict[str, object] = {
        str(fraction): [resumes_to_the_bit(ranks, fraction, folder), *measured_and_told(ranks, fraction)]
        for fraction in (1.0, 0.5)
    }
    noisy = resumes_to_the_bit(ranks, 1.0, folder, "bhq:4")
    results["few bits"] = [noisy, noise_of_ranks(ranks)]
    if ranks.rank == 0:
        (folder / "results.json").write_text(json.dumps(results))
    leave_world()


if __name__ == "__main__":
    main()
