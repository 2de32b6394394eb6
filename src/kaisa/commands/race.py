"""`kaisa bench race`: optimizers of many kinds on one course each recipe, by rules that are written down before."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kaisa.commands.arguments import MACHINE, option
from kaisa.errors import ConfigurationError
from kaisa.recipes.catalogue import IMAGES, MASKED_IMAGES, TEXT
from kaisa.recipes.race.courses import COURSES, SIZES, find_course
from kaisa.recipes.race.entrants import ENTRANTS, Entrant, find_entrant
from kaisa.recipes.race.ledger import STAGES, Ledger, Result
from kaisa.recipes.race.runner import Grounds, run, use_threads
from kaisa.recipes.race.stages import Race
from kaisa.recipes.race.standings import draw as draw_standings
from kaisa.recipes.race.standings import write_table

DATA, WHAT = "Data", "What is raced"
FOLDER = Path("benchmarks/results/race")


def race(
    recipes: Annotated[list[str] | None, option("A recipe; may be repeated [all]", panel=WHAT)] = None,
    contestants: Annotated[
        list[str] | None, option("A contestant, such as 'eigen on sgd'; may be repeated [all]", panel=WHAT)
    ] = None,
    stage: Annotated[str | None, option("tune or final; neither shows how the race stands", panel=WHAT)] = None,
    limit: Annotated[int | None, option("Run at most so many heats, and go on another time [all]", panel=WHAT)] = None,
    size: Annotated[str, option("small, or full for a GPU [small]", panel=WHAT)] = "small",
    draw: Annotated[bool, typer.Option("--draw", help="Draw table and plots again.", rich_help_panel=WHAT)] = False,
    images: Annotated[str | None, option("Folder or zip file with a subfolder a class, for resnet", panel=DATA)] = None,
    masks: Annotated[str | None, option("Folder or zip file of images with masks, for unet", panel=DATA)] = None,
    text: Annotated[str | None, option("Folder or zip file of text, for gpt and bert", panel=DATA)] = None,
    output: Annotated[Path, option("Where heats are kept [benchmarks/results/race]", panel=DATA)] = FOLDER,
    cache: Annotated[Path | None, option("Keeps decoded images from one start to the next [none]", panel=DATA)] = None,
    device: Annotated[str, option("cpu or cuda [cpu]", panel=MACHINE)] = "cpu",
    threads: Annotated[int, option("Processor threads [1]", panel=MACHINE)] = 1,
) -> int:
    """Race optimizers to the value that a tuned first-order control ends with.

    The rules are in docs/race.md. Every heat is kept; an interrupted race goes on where it stopped.
    """
    if size not in SIZES:
        raise ConfigurationError(f"unknown size {size!r}; choose from {', '.join(SIZES)}")
    if stage not in (None, *STAGES):
        raise ConfigurationError(f"unknown stage {stage!r}; choose from {', '.join(STAGES)}")
    console = Console(highlight=False)
    names = recipes or list(COURSES[size])
    entrants = _entrants(contestants, console, must_run=stage is not None)
    races = [Race.of(Ledger(output, size, find_course(name, size)), entrants) for name in names]
    if stage is not None:
        use_threads(threads)
        grounds = Grounds({IMAGES: images, MASKED_IMAGES: masks, TEXT: text}, device, cache)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"kfac\b|pytorch_optimizer|torch\.optim")  # others' own affairs
            warnings.filterwarnings("ignore", "Full backward hook is firing")  # kfac-pytorch's, in the backward pass
            count = run(races, stage, grounds, limit, lambda one, heat: _tell(one, heat, console))
        console.print(f"{count} heats")
    if draw:
        for path in draw_standings(races, output / size):
            console.print(str(path), markup=False, soft_wrap=True)
    elif stage is None:
        console.print(write_table(races), markup=False, soft_wrap=True)
    return 0


def _entrants(names: list[str] | None, console: Console, *, must_run: bool) -> list[Entrant]:
    """Return those named, or all; of those who must run all that are installed, and say who is not."""
    entrants = [find_entrant(name) for name in names or ENTRANTS]
    absent = [entrant for entrant in entrants if not entrant.is_present] if must_run else []
    if absent and names:
        raise ConfigurationError(f"{absent[0].name} needs {absent[0].needs}, which is not installed")
    for entrant in absent:
        console.print(f"without {entrant.name}: {entrant.needs} is not installed", style="dim")
    return [entrant for entrant in entrants if entrant not in absent]


def _tell(one: Race, heat: Result, console: Console) -> None:
    last = heat.looks[-1] if heat.looks else None
    end = one.score.write(last.value) if last is not None else "–"
    took = "" if last is None else f"{last.cpu_seconds:.2f} s of processor, {last.seconds:.2f} s"
    console.print(
        f"{one.course.recipe:8}{heat.contestant:22}rate {heat.rate:<9.3g}seed {heat.seed:<5}"
        f"steps {heat.steps:<5}{end:10}{took}  {'' if heat.end == 'finished' else heat.end}",
        markup=False,
        soft_wrap=True,
    )
