"""The book of all heats: one JSON file each, enough to draw table and plots again.

    FOLDER/SIZE/RECIPE/STAGE/CONTESTANT-rRATE-sSTEPS-SEED.json

A file is there whole or counts as not there: a heat whose file is torn is run again. A heat of other conditions than
those of the course is no heat of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from kaisa.recipes.files import written_whole
from kaisa.recipes.race.courses import Course
from kaisa.recipes.race.heat import Heat, Look, Plan
from kaisa.recipes.record import describe_machine, describe_versions, find_commit

FORMAT = 1
KIND = "kaisa bench race"
TUNE, FINAL = "tune", "final"
STAGES = (TUNE, FINAL)
PEERS = ("pytorch-optimizer", "kfac-pytorch", "transformers")


@dataclass(frozen=True)
class Result:
    """What became of a plan.

    Attributes:
        contestant: its name.
        rate: the highest learning rate of the schedule.
        steps: of the schedule.
        seed: of weights and batches.
        stage: "tune" or "final".
        end: "finished", or why it ended before.
        looks: the curve.
        conditions: what else the heat depended on; equal for all heats of one course.
        about: machine, versions, commit, time, options of K-FAC, seconds of its phases.
    """

    contestant: str
    rate: float
    steps: int
    seed: int
    stage: str
    end: str
    looks: list[Look]
    conditions: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def value(self) -> float:
        """The score at the end; not a number unless all steps are done."""
        return self.looks[-1].value if self.is_whole else math.nan

    @property
    def is_whole(self) -> bool:
        """Whether all steps were taken."""
        return bool(self.looks) and self.looks[-1].step == self.steps


@dataclass(frozen=True)
class Ledger:
    """The heats of one course.

    Attributes:
        folder: of all races.
        size: "small" or "full".
        course: whose heats these are.
    """

    folder: Path
    size: str
    course: Course

    def path(self, plan: Plan, stage: str) -> Path:
        """Return where a heat is kept."""
        who = plan.entrant.name.replace(" ", "-")
        return self._folder(stage) / f"{who}-r{plan.rate:.3g}-s{plan.steps}-{plan.seed}.json"

    def _folder(self, stage: str) -> Path:
        return self.folder / self.size / self.course.recipe / stage

    def read(self, plan: Plan, stage: str) -> Result | None:
        """Return a heat that has been run; None if there is none, or its file is torn or of other conditions."""
        heat = _read(self.path(plan, stage))
        return heat if heat is not None and heat.conditions == self.conditions() else None

    def heats(self, stage: str) -> Iterator[Result]:
        """Yield all heats of a stage, in the order of their files."""
        for path in sorted(self._folder(stage).glob("*.json")):
            heat = _read(path)
            if heat is not None and heat.conditions == self.conditions():
                yield heat

    def write(self, heat: Heat, stage: str) -> Result:
        """Keep a heat that has ended; return what will be read."""
        return self.put(heat.plan, stage, heat.end or "", heat.looks, heat.phases)

    def put(self, plan: Plan, stage: str, end: str, looks: Sequence[Look], phases: Mapping[str, float]) -> Result:
        """Keep what became of a plan."""
        about = {
            "preconditioning": self.course.preconditioning(plan.entrant),
            "phases": dict(phases),
            "ended": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": describe_machine(),
            "versions": {**describe_versions(), **dict(_peers())},
            "commit": find_commit(),
        }
        name = plan.entrant.name
        heat = Result(name, plan.rate, plan.steps, plan.seed, stage, end, list(looks), self.conditions(), about)
        path = self.path(plan, stage)
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as partial:
            partial.write_text(_to_json(heat), encoding="utf-8")
        return heat

    def conditions(self) -> dict[str, Any]:
        """Return what all heats of the course share."""
        course = self.course
        return {
            "recipe": course.recipe,
            "size": self.size,
            "options": dict(course.options),
            "look_every": course.look_every,
            "tests": [course.tests, course.test_side],
        }


def _peers() -> Iterator[tuple[str, str]]:
    for package in PEERS:
        try:
            yield package, metadata.version(package)
        except metadata.PackageNotFoundError:
            continue


def _to_json(heat: Result) -> str:
    """Return a heat with a line for each look; a value that is no number is null."""
    value = {"format": FORMAT, "kind": KIND, **asdict(heat)}
    value["looks"] = []
    looks = [
        [
            look.step,
            round(look.seconds, 4),
            round(look.cpu_seconds, 4),
            look.value if math.isfinite(look.value) else None,
        ]
        for look in heat.looks
    ]
    lines = ",\n  ".join(json.dumps(look) for look in looks)
    text = json.dumps(value, indent=1, allow_nan=False)
    return text.replace('"looks": []', f'"looks": [\n  {lines}\n ]') + "\n"


def _read(path: Path) -> Result | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(value, dict) or (value.pop("format", None), value.pop("kind", None)) != (FORMAT, KIND):
        return None
    looks = [Look(step, real, cpu, math.nan if score is None else score) for step, real, cpu, score in value["looks"]]
    return Result(**{**value, "looks": looks})
