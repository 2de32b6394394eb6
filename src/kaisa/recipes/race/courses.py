"""Where is raced: for each recipe and size the model, the data and how long, frozen before anybody runs.

small     a quarter of a minute of one core: short schedules, narrow models, small images
full      the published shapes, for a GPU
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kaisa.errors import ConfigurationError
from kaisa.recipes.race.entrants import Entrant

FACTOR = 3.0  # between learning rates of a grid
SIZES = ("small", "full")


@dataclass(frozen=True)
class Course:
    """The conditions that all contestants share on one recipe.

    Attributes:
        recipe: its name.
        options: of the recipe, as `kaisa train` takes them.
        steps: of the whole schedule.
        look_every: steps between two looks at what is tested on.
        tests: the most examples (images, sequences) that are tested on, spread evenly over all.
        test_side: height and width of what is tested on of each image with a mask; None for the whole.
        control: the recipe's usual first-order optimizer, which sets the target.
        rates: the middle of the grid by optimizer or contestant, where it is not the usual one.
        kfac: options of K-FAC by contestant, on top of `KFAC`; "" is for all, kfac-pytorch included as far as it
            knows them.
        short: the share of the steps in K-FAC's schedule.
        target_seeds: how many heats of the control set the target.
    """

    recipe: str
    options: Mapping[str, Any]
    steps: int
    look_every: int
    tests: int
    control: str
    rates: Mapping[str, float] = field(default_factory=dict)
    kfac: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    short: float = 0.5
    target_seeds: int = 3
    test_side: int | None = None

    def grid(self, entrant: Entrant) -> tuple[float, ...]:
        """Return the learning rates that a contestant is tried with, the middle one first."""
        middle = {**RATES, **self.rates}.get(entrant.name)
        if middle is None:
            raise ConfigurationError(f"the course {self.recipe} has no learning rate for {entrant.name}")
        return middle, middle / FACTOR, middle * FACTOR

    def preconditioning(self, entrant: Entrant) -> dict[str, Any]:
        """Return the options of K-FAC that a contestant has here."""
        if entrant.kfac is None:
            return {}
        shared = {**KFAC, **self.kfac.get("", {})}
        if entrant.kfac != "ours":
            shared = {name: value for name, value in shared.items() if name in KFAC}  # what kfac-pytorch knows too
        return {**shared, **self.kfac.get(entrant.name, {})}


KFAC: dict[str, Any] = {"factor_update_steps": 10, "inv_update_steps": 50, "damping": 0.003, "fisher_norm": 0.2}
"""What kfac-pytorch knows too; ``fisher_norm`` is the limit of `kaisa.kfac.FisherNorm`, on SGD."""

EARLY: dict[str, Any] = {"factor_update_steps": (1, 10), "inv_update_steps": (2, 50)}
"""Growing intervals, from the first of the two to the last: see `kaisa.recipes.race.entrants.growing`.

A damping of three numbers falls: see `kaisa.recipes.race.entrants.falling`.
"""

RATES: dict[str, float] = {
    "sgd": 0.1,
    "adamw": 0.003,
    "muon": 0.01,
    "soap": 0.01,
    "shampoo": 0.003,
    "adahessian": 0.15,
    "arsg": 0.01,
    "kfac-pytorch on sgd": 0.3,
    "kfac-pytorch on adamw": 0.003,
    **{f"{solver} on sgd": 0.3 for solver in ("eigen", "ekfac", "warm_eigen", "cholesky")},
    **{f"{solver} on adamw": 0.01 for solver in ("eigen", "ekfac", "sqrt_ekfac", "warm_eigen")},
    "sqrt_ekfac on sgd": 0.001,
}

_SMALL = {
    "resnet": Course(
        "resnet",
        {"model": "resnet8", "image_size": 16, "batch_size": 256, "augment": True},
        steps=200,
        look_every=8,
        tests=2000,
        control="sgd",
        kfac={
            "": {
                "factor_update_steps": (2, 10),
                "inv_update_steps": (5, 50),
                "sharing": "reduce",
                "factor_examples": 0.5,
            }
        },
    ),
    "unet": Course(
        "unet",
        {"model": "unet4", "crop": 96, "batch_size": 8, "augment": True},
        steps=200,
        look_every=8,
        tests=6,
        test_side=256,
        target_seeds=9,
        control="adamw",
        rates={"adamw": 0.01},
        kfac={"": {"factor_update_steps": (5, 10), "inv_update_steps": (10, 50), "factor_examples": 0.5}},
    ),
    "gpt": Course(
        "gpt",
        {"model": "gpt-nano", "positions": 64, "batch_size": 64},
        steps=240,
        look_every=8,
        tests=192,
        control="adamw",
        kfac={
            "": {
                "factor_update_steps": (2, 10),
                "inv_update_steps": (4, 50),
                "damping": 0.03,
                "sharing": "reduce",
                "factor_examples": 0.5,
            }
        },
    ),
    "bert": Course(
        "bert",
        {"model": "bert-nano", "positions": 32, "batch_size": 256},
        steps=200,
        look_every=8,
        tests=512,
        control="adamw",
        kfac={"": {**EARLY, "damping": (0.05, 0.003, 50), "factor_examples": 0.25}},
    ),
}
_FULL = {
    "resnet": Course(
        "resnet",
        {"model": "resnet20", "batch_size": 512, "augment": True},
        steps=2000,
        look_every=50,
        tests=10_000,
        control="sgd",
        kfac={"": {"sharing": "reduce"}},
    ),
    "unet": Course(
        "unet",
        {"model": "unet32", "crop": 128, "batch_size": 16, "augment": True},
        steps=1000,
        look_every=25,
        tests=6,
        control="adamw",
    ),
    "gpt": Course(
        "gpt",
        {"model": "gpt-small", "positions": 256, "batch_size": 64},
        steps=1500,
        look_every=25,
        tests=1000,
        control="adamw",
        kfac={"": {**EARLY, "damping": 0.03}},
    ),
    "bert": Course(
        "bert",
        {"model": "bert-base", "positions": 128, "batch_size": 64, "unit": "words", "vocabulary": 8192},
        steps=1500,
        look_every=25,
        tests=1000,
        control="adamw",
        rates={"adamw": 0.0003},
        kfac={"": {**EARLY, "damping": 0.03}},
    ),
}
COURSES: dict[str, dict[str, Course]] = {"small": _SMALL, "full": _FULL}


def find_course(recipe: str, size: str) -> Course:
    """Return the course of a recipe.

    Raises:
        ConfigurationError: there is none.
    """
    courses = COURSES.get(size, {})
    if recipe not in courses:
        raise ConfigurationError(f"no course {size} {recipe!r}; choose from {', '.join(courses) or ', '.join(SIZES)}")
    return courses[recipe]
