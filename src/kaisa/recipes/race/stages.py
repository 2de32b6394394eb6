"""What is run, in which order: a function of what has been run.

    tune     1  the control with its whole schedule: three learning rates, seed TUNING_SEED
             2  the same with the best rate and more seeds: the median at the end is the target, from here on fixed
             3  everybody, the control too, with K-FAC's shorter schedule: three learning rates
             4  who missed the target: once more with the best of these rates and the whole schedule
    final    everybody with the rate and the schedule that tuning chose, FINAL_SEEDS; each seed begins with another one

When the best of the three rates is the lowest or the highest, one more beyond it is tried, of everybody. The best rate
is the one that reaches the target in the fewest steps; where none does, or none is set yet, the one with the best
value at the end. A heat of tuning ends where it shows the target; finals run to the last step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

from kaisa.errors import StateError
from kaisa.recipes.catalogue import find_recipe
from kaisa.recipes.race.courses import FACTOR, Course
from kaisa.recipes.race.entrants import Entrant, find_entrant
from kaisa.recipes.race.heat import Look, Plan
from kaisa.recipes.race.ledger import FINAL, TUNE, Ledger, Result
from kaisa.recipes.tasks import Score

TUNING_SEED = 1000
FINAL_SEEDS = (3, 4, 5, 6, 7)
NEVER = Look(2**62, math.inf, math.inf, math.nan)


@dataclass(frozen=True)
class Race:
    """A course with those who run on it.

    Attributes:
        ledger: of the course.
        entrants: who takes part, the control among them.
    """

    ledger: Ledger
    entrants: tuple[Entrant, ...]

    @classmethod
    def of(cls, ledger: Ledger, entrants: Sequence[Entrant]) -> Race:
        """Return the race of some entrants; the control always takes part."""
        control = find_entrant(ledger.course.control)
        return cls(ledger, (control, *(entrant for entrant in entrants if entrant != control)))

    @property
    def course(self) -> Course:
        """Where is raced."""
        return self.ledger.course

    @property
    def control(self) -> Entrant:
        """The recipe's usual first-order optimizer."""
        return self.entrants[0]

    @property
    def score(self) -> Score:
        """What is raced for."""
        return find_recipe(self.course.recipe).task.score

    @property
    def short(self) -> int:
        """Steps of K-FAC's schedule."""
        return round(self.course.short * self.course.steps)

    @property
    def target_seeds(self) -> range:
        """The seeds of the control's heats that set the target, the first that of tuning."""
        return range(TUNING_SEED, TUNING_SEED + self.course.target_seeds)

    # ------------------------------------------------------------------------------------------------ what is known

    def target(self) -> float | None:
        """Return the value that all run for; None while the control is not through."""
        rate = self._best_rate(self.control, self.course.steps, target=None)
        plans = [Plan(self.control, rate, self.course.steps, seed) for seed in self.target_seeds] if rate else []
        heats = [self.ledger.read(plan, TUNE) for plan in plans]
        values = [heat.value for heat in heats if heat is not None]
        return median(values) if values and len(values) == len(plans) else None

    def first(self, heat: Result, target: float, in_a_row: int = 1) -> Look:
        """Return the first look that shows the target, as do those after it, so many in a row, or `NEVER`."""
        shown = [self.score.reaches(look.value, target) for look in heat.looks]
        return next((look for i, look in enumerate(heat.looks) if all(shown[i : i + in_a_row])), NEVER)

    def enough(self, plan: Plan, stage: str) -> Callable[[float], bool] | None:
        """Return what tells that a heat of tuning is decided: its value is the target's; None of all others."""
        target = self.target() if stage == TUNE else None
        if target is None or (plan.entrant == self.control and plan.steps == self.course.steps):
            return None
        return partial(self.score.reaches, target=target)

    def chosen(self, entrant: Entrant) -> tuple[float, int] | None:
        """Return the learning rate and the steps that a contestant goes into the finals with; None before that."""
        target = self.target()
        rate = None if target is None else self._best_rate(entrant, self.short, target)
        if target is None or rate is None:
            return None
        short = self.ledger.read(Plan(entrant, rate, self.short, TUNING_SEED), TUNE)
        if entrant == self.control or (short is not None and self.first(short, target) != NEVER):
            return rate, self.short
        whole = self.ledger.read(Plan(entrant, rate, self.course.steps, TUNING_SEED), TUNE)
        return None if whole is None else (rate, self.course.steps)

    def control_rate(self) -> float | None:
        """Return the learning rate of the control with its whole schedule."""
        return self._best_rate(self.control, self.course.steps, target=None)

    def _grid(self, entrant: Entrant, steps: int, target: float | None) -> list[Plan]:
        """Return what is tried: three learning rates, and one beyond where the best is at an end."""
        rates = list(self.course.grid(entrant))
        plans = [Plan(entrant, rate, steps, TUNING_SEED) for rate in rates]
        heats = [self.ledger.read(plan, TUNE) for plan in plans]
        if all(heat is not None for heat in heats):
            best = min(range(3), key=lambda i: self._rank(heats[i], target))
            if best:
                beyond = rates[best] / FACTOR if best == 1 else rates[best] * FACTOR
                plans.append(Plan(entrant, beyond, steps, TUNING_SEED))
        return plans

    def _best_rate(self, entrant: Entrant, steps: int, target: float | None) -> float | None:
        plans = self._grid(entrant, steps, target)
        heats = [self.ledger.read(plan, TUNE) for plan in plans]
        if any(heat is None for heat in heats):
            return None
        best = min(range(len(plans)), key=lambda i: self._rank(heats[i], target))
        return plans[best].rate

    def _rank(self, heat: Result | None, target: float | None) -> tuple[int, float]:
        """Return what is less for a better heat."""
        assert heat is not None
        reached = NEVER if target is None else self.first(heat, target)
        if math.isnan(heat.value):
            return reached.step, math.inf
        return reached.step, heat.value if self.score.is_cost else -heat.value

    # ------------------------------------------------------------------------------------------------ what is to do

    def due(self, stage: str) -> Iterator[Plan]:
        """Yield what can be run next; when all of it is done more may be due.

        Raises:
            StateError: the finals are asked for before tuning is through.
        """
        plans = self._tuning() if stage == TUNE else self._finals()
        return (plan for plan in plans if self.ledger.read(plan, stage) is None)

    def _tuning(self) -> Iterator[Plan]:
        yield from self._grid(self.control, self.course.steps, target=None)
        rate = self.control_rate()
        if rate is None:
            return
        yield from (Plan(self.control, rate, self.course.steps, seed) for seed in self.target_seeds)
        target = self.target()
        if target is None:
            return
        for entrant in self.entrants:
            yield from self._grid(entrant, self.short, target)
            best = self._best_rate(entrant, self.short, target)
            if best is not None and self.chosen(entrant) is None:
                yield Plan(entrant, best, self.course.steps, TUNING_SEED)

    def _finals(self) -> Iterator[Plan]:
        settings = self.settings()
        for turn, seed in enumerate(FINAL_SEEDS):
            first = turn * len(settings) // len(FINAL_SEEDS)
            for entrant, rate, steps in settings[first:] + settings[:first]:
                yield Plan(entrant, rate, steps, seed)

    def settings(self) -> list[tuple[Entrant, float, int]]:
        """Return who goes into the finals and how, the control with its whole schedule first.

        Raises:
            StateError: tuning is not through.
        """
        missing = [entrant.name for entrant in self.entrants if self.chosen(entrant) is None]
        if missing:
            raise StateError(f"{self.course.recipe}: not tuned yet: {', '.join(missing)}; run --stage {TUNE} first")
        return self.tuned()

    def tuned(self) -> list[tuple[Entrant, float, int]]:
        """Return those of the settings that are known by now."""
        rate = self.control_rate()
        if rate is None:
            return []
        chosen = [(entrant, self.chosen(entrant)) for entrant in self.entrants]
        others = [(entrant, *setting) for entrant, setting in chosen if setting is not None]
        return [(self.control, rate, self.course.steps), *others]

    def final(self, entrant: Entrant, rate: float, steps: int) -> list[Result]:
        """Return the finals of a setting that have been run."""
        heats = [self.ledger.read(Plan(entrant, rate, steps, seed), FINAL) for seed in FINAL_SEEDS]
        return [heat for heat in heats if heat is not None]
