"""All contestants with all seeds, one after another, on one machine.

    for each seed, for each contestant: warm up ─► epoch ─► checkpoint ─► record ─► epoch ─► …

Of several ranks all train and the first writes. After an interruption at any point the folder holds a record of what
was done and the checkpoint of the last whole epoch; `compare` goes on from there.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from safetensors.torch import save_model

from kaisa.errors import ConfigurationError, StateError
from kaisa.kfac.collectives import Alone, Collectives
from kaisa.quantize import QuantConfig, prepare
from kaisa.recipes.batches import ImageTests
from kaisa.recipes.contestants import Contestant
from kaisa.recipes.data import Data, outline
from kaisa.recipes.files import written_whole
from kaisa.recipes.loop import Training, load, save, warm_up
from kaisa.recipes.options import Options
from kaisa.recipes.record import Record, Run
from kaisa.recipes.tasks import Lesson

CHECKPOINT = "checkpoint.pt"
EVALUATED_PER_TRAINED = 8  # images at once, where none of a layer's inputs is kept for gradients


class Watcher(Protocol):
    """Is told how a comparison goes on."""

    def begin(self, training: Training) -> None:
        """Hear that a run begins or goes on."""

    def step(self, loss: float, score: float) -> None:
        """Hear the means over the epoch so far."""

    def epoch(self, training: Training) -> None:
        """Hear that an epoch is done, evaluated and kept."""


def start_comparison(options: Options, data: Data, folder: Path) -> Record:
    """Make the folder and its record.

    Raises:
        ConfigurationError: the folder is in use or cannot be made.
    """
    check_folder(folder)
    record = Record(options, data.describe())
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"output {folder} cannot be made: {error.strerror}") from error
    record.write(folder)
    return record


def check_folder(folder: Path) -> None:
    """Raise ConfigurationError unless a new run may be written into the folder."""
    if folder.exists() and not folder.is_dir():
        raise ConfigurationError(f"output {folder} is a file; give a folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigurationError(f"output {folder} is not empty; give another, or --resume {folder} to go on")


def check_same_data(record: Record, data: Data) -> None:
    """Raise StateError unless the data, and the model that is made for them, are those that the record began with."""
    if record.data["digest"] != data.describe()["digest"]:
        raise StateError("the data are not those that the run began with; start a new run")
    record.check_model(outline(data, record.options))


def compare(record: Record, data: Data, folder: Path, watcher: Watcher, ranks: Collectives | None = None) -> None:
    """Run what the record does not have yet; ``ranks`` reaches the other processes that do the same."""
    ranks = ranks or Alone()
    for seed in record.options.seeds:
        lesson = data.lesson(record.options, seed, ranks.rank, ranks.world_size)
        lesson = in_few_bits(in_small_batches(lesson, record.options), record.options)
        for contestant in record.options.build_contestants():
            if not record.is_finished(contestant.name, seed):
                _run(contestant, lesson, record, folder, watcher, ranks)
    if ranks.rank == 0:
        (folder / CHECKPOINT).unlink(missing_ok=True)


def in_small_batches(lesson: Lesson, options: Options) -> Lesson:
    """Return a lesson that tests on few images at once where few are learned from, so that no more memory is needed."""
    if not isinstance(lesson.tests, ImageTests):
        return lesson  # other tests come in small batches as they are
    size = EVALUATED_PER_TRAINED * (options.batch_size // options.nproc)
    return replace(lesson, tests=replace(lesson.tests, size=min(size, lesson.tests.size)))


def in_few_bits(lesson: Lesson, options: Options) -> Lesson:
    """Return a lesson whose model computes in few bits, where that is asked for."""
    if options.quantize is None:
        return lesson
    config = QuantConfig.read(options.quantize)
    return replace(lesson, build=lambda: prepare(lesson.build(), config))


def _run(
    contestant: Contestant,
    lesson: Lesson,
    record: Record,
    folder: Path,
    watcher: Watcher,
    ranks: Collectives,
) -> None:
    epochs, batches = record.options.epochs, lesson.batches
    warm_up(Training.start(contestant, lesson, epochs, ranks))
    with closing(Training.start(contestant, lesson, epochs, ranks)) as training:
        if _is_under_way(record, contestant, batches.seed):
            load(training, folder / CHECKPOINT)
            _keep(training, record, folder)
        watcher.begin(training)
        while not training.is_finished:
            training.epoch(watcher.step)
            _keep(training, record, folder)
            watcher.epoch(training)


def _is_under_way(record: Record, contestant: Contestant, seed: int) -> bool:
    """Whether the checkpoint is of this contestant and seed: the record follows it closely."""
    return any((run.contestant, run.seed) == (contestant.name, seed) for run in record.runs)


def _keep(training: Training, record: Record, folder: Path) -> None:
    """Write the checkpoint first, so that the record never claims more than can be resumed."""
    save(training, folder / CHECKPOINT)
    record.put(_describe(training))
    if training.ranks.rank != 0:
        return
    if training.is_finished:
        name = f"{training.contestant.slug}-seed{training.batches.seed}.safetensors"
        with written_whole(folder / name) as path:
            save_model(training.model, str(path))  # unlike save_file it writes a tied weight once
    record.write(folder)


def _describe(training: Training) -> Run:
    kfac = training.kfac
    return Run(
        contestant=training.contestant.name,
        seed=training.batches.seed,
        learning_rate=training.contestant.learning_rate,
        finished=training.is_finished,
        steps=len(training.history) * len(training.batches),
        peak_memory=training.peak_memory,
        kfac_memory=None if kfac is None else dict(kfac.memory_usage()),
        epochs=list(training.history),
        model=type(training.model).__name__,
    )
