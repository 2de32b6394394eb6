"""Runs heats and keeps them: what is due, one after another, at most so many."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, takewhile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from kaisa.errors import ConfigurationError
from kaisa.recipes.catalogue import IMAGES, MASKED_IMAGES, find_recipe
from kaisa.recipes.data import Data, ImageData, read_data
from kaisa.recipes.files import written_whole
from kaisa.recipes.images import Images
from kaisa.recipes.options import Options
from kaisa.recipes.race.courses import Course
from kaisa.recipes.race.heat import Heat, Plan, run_interleaved, thin_tests, warm_up
from kaisa.recipes.race.ledger import FINAL, Result
from kaisa.recipes.race.stages import Race
from kaisa.recipes.tasks import Lesson

Hear = Callable[[Race, Result], None]
"""Told of each heat when it is kept."""


@dataclass
class Grounds:
    """The data of the courses, read once.

    Attributes:
        paths: folder or zip file by kind of data.
        device: "cpu" or "cuda".
        cache: a folder that keeps decoded images from one start to the next; None for none.
    """

    paths: Mapping[str, str | None]
    device: str = "cpu"
    cache: Path | None = None
    _data: dict[str, Data] = field(default_factory=dict)

    def lesson(self, course: Course, seed: int) -> Lesson:
        """Return what is learned on a course with a seed.

        Raises:
            ConfigurationError: the data of the recipe were not given.
        """
        options = self.options(course)
        if course.recipe not in self._data:
            self._data[course.recipe] = self._read(options)
        return thin_tests(self._data[course.recipe].lesson(options, seed), course.tests, course.test_side)

    def options(self, course: Course) -> Options:
        """Return the options of a course with its data."""
        kind = find_recipe(course.recipe).kind
        path = self.paths.get(kind)
        if path is None:
            name = {IMAGES: "images", MASKED_IMAGES: "masks"}.get(kind, "text")
            raise ConfigurationError(f"the race of {course.recipe} needs --{name}, a folder or zip file")
        given = {"recipe": course.recipe, "data": path, "device": self.device}
        return Options.complete({**given, **course.options})

    def _read(self, options: Options) -> Data:
        """Decode images once: of many thousands it takes longer than a heat."""
        if self.cache is None or options.known_recipe.kind != IMAGES:
            return read_data(options)
        stat = Path(str(options.data)).stat()
        key = hashlib.sha256(repr((options.data, options.image_size, stat.st_size, stat.st_mtime_ns)).encode())
        path = self.cache / f"images-{key.hexdigest()[:16]}.safetensors"
        if not path.exists():
            data = read_data(options)
            assert isinstance(data, ImageData)
            _keep_images(data, path)
        return _kept_images(path)


def _keep_images(data: ImageData, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{part}.{name}": tensor.contiguous()
        for part, images in (("train", data.train), ("test", data.test))
        for name, tensor in (("pixels", images.pixels), ("labels", images.labels))
    }
    with written_whole(path) as partial:
        save_file(tensors, partial, {"classes": "\n".join(data.train.classes), "source": data.source})


def _kept_images(path: Path) -> ImageData:
    with safe_open(path, "pt") as file:
        told = file.metadata()
        classes = tuple(told["classes"].split("\n"))
        train, test = (
            Images(file.get_tensor(f"{part}.pixels"), file.get_tensor(f"{part}.labels"), classes)
            for part in ("train", "test")
        )
    return ImageData(train, test, told["source"])


def run(races: Sequence[Race], stage: str, grounds: Grounds, limit: int | None, hear: Hear) -> int:
    """Run at most ``limit`` heats of a stage; return how many were run.

    Heats of tuning run one after another, for what is due depends on the last; finals of one seed run interleaved.
    """
    done = 0
    warm: set[tuple[str, str]] = set()
    for race in races:
        while limit is None or done < limit:
            plans = _together(race, stage, None if limit is None else limit - done)
            if not plans:
                break
            heats = [_start(race, plan, stage, grounds, warm) for plan in plans]
            for heat in run_interleaved(heats):
                hear(race, race.ledger.write(heat, stage))
                done += 1
    return done


def _together(race: Race, stage: str, most: int | None) -> list[Plan]:
    """Return the heats that run next, interleaved."""
    due = race.due(stage)
    first = next(due, None)
    if first is None:
        return []
    others = takewhile(lambda plan: plan.seed == first.seed, due) if stage == FINAL else ()
    return [first, *islice(others, None if most is None else most - 1)]


def _start(race: Race, plan: Plan, stage: str, grounds: Grounds, warm: set[tuple[str, str]]) -> Heat:
    lesson = grounds.lesson(race.course, plan.seed)
    if (race.course.recipe, plan.entrant.name) not in warm:
        warm_up(plan, race.course, lesson)
        warm.add((race.course.recipe, plan.entrant.name))
    return Heat.start(plan, race.course, lesson, race.enough(plan, stage))


def use_threads(count: int) -> None:
    """Set the processor threads of the heats."""
    torch.set_num_threads(count)
