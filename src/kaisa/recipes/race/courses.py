"""Where is raced: for each recipe and size the model, the data and how long, frozen before anybody runs.

small     minutes on one core: short schedules, narrow models, small images
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
        control: the recipe's usual first-order optimizer, which sets the target.
        rates: the middle of the grid by optimizer or contestant, where it is not the usual one.
        kfac: options of our K-FAC by contestant, on top of `KFAC`; "" is for all.
        short: the share of the steps in K-FAC's schedule.
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
        usual = KFAC if entrant.kfac == "ours" else KFAC_PYTORCH
        return {**usual, **(self.kfac.get("", {}) if entrant.kfac == "ours" else {}), **self.kfac.get(entrant.name, {})}


KFAC: dict[str, Any] = {"factor_update_steps": 10, "inv_update_steps": 50, "damping": 0.003, "kl_clip": 0.001}
KFAC_PYTORCH: dict[str, Any] = {"factor_update_steps": 10, "inv_update_steps": 50, "damping": 0.003, "kl_clip": 0.001}
RATES: dict[str, float] = {
    "sgd": 0.1,
    "adamw": 0.003,
    "muon": 0.003,
    "soap": 0.003,
    "shampoo": 0.003,
    "adahessian": 0.15,
    "arsg": 0.01,
    **{f"{name} on sgd": 0.1 for name in ("kfac-pytorch", "eigen", "ekfac", "warm_eigen")},
    **{f"{name} on adamw": 0.003 for name in ("kfac-pytorch", "eigen", "ekfac", "sqrt_ekfac", "warm_eigen")},
    "sqrt_ekfac on sgd": 0.0005,
}

_SMALL = {
    "resnet": Course(
        "resnet",
        {"model": "resnet20", "image_size": 16, "batch_size": 64, "augment": True},
        steps=300,
        look_every=6,
        tests=2000,
        control="sgd",
    ),
    "unet": Course(
        "unet",
        {"model": "unet8", "crop": 64, "batch_size": 8, "augment": True},
        steps=300,
        look_every=6,
        tests=6,
        control="adamw",
    ),
    "gpt": Course(
        "gpt",
        {"model": "gpt-tiny", "positions": 64, "batch_size": 16},
        steps=300,
        look_every=6,
        tests=200,
        control="adamw",
    ),
    "bert": Course(
        "bert",
        {"model": "bert-tiny", "positions": 32, "batch_size": 32},
        steps=300,
        look_every=6,
        tests=400,
        control="adamw",
    ),
}
COURSES: dict[str, dict[str, Course]] = {"small": _SMALL, "full": {}}


def find_course(recipe: str, size: str) -> Course:
    """Return the course of a recipe.

    Raises:
        ConfigurationError: there is none.
    """
    courses = COURSES.get(size, {})
    if recipe not in courses:
        raise ConfigurationError(f"no course {size} {recipe!r}; choose from {', '.join(courses) or ', '.join(SIZES)}")
    return courses[recipe]
