"""The file that says what is claimed, of which system, on what prior knowledge and evidence: TOML.

`TEMPLATE` is a whole one with comments. Everything in it is checked before anything is computed: a key that nobody
knows is refused, since a misspelt assumption is none.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from kaisa.assure.claims import KINDS, Kind, Question
from kaisa.assure.exhibits import SIDES, Sides
from kaisa.assure.network import Criterion
from kaisa.assure.prior import Prior
from kaisa.assure.records import read_time
from kaisa.errors import ConfigurationError, DataError

FILE_NAME = re.compile(r"[\w-]+")
STAGES = {
    "data": "The data represent the operation, and their labels are right",
    "model": "The architecture can express what the task needs",
    "training": "Training and testing keep the estimation error within its bound",
    "verification": "The tools of verification do what is relied upon",
    "explanation": "The network errs for understandable reasons",
}
"""The stages of the life cycle that evidence may support, and the goal that each stands for."""

TEMPLATE = """# A safety case for `kaisa assure run` and `kaisa assure report`. Paths are relative to this file.
title = "The digit reader is reliable enough for sorting letters"

[system]
name = "digit reader"
# model = "model.safetensors"       # the frozen network; if the file changes, the journal no longer counts
# run = "runs/digits"               # or the run of `kaisa train` that made it: then it can be tried out and asked
# sure = 0.9                        # its classifier declines, which is no failure, where it is less sure
# dice = 0.8                        # unet: an image fails whose Dice is below
# loss = 2.0                        # gpt, bert: a sequence fails whose mean loss (nats a token) is above
# frozen = 2026-01-01T00:00:00Z     # demands from before do not count

[operation]
records = "operation.csv"           # or .jsonl: prediction, truth, time (or failure, time); optional id and input
                                    # of a run also: input (a file of an image), truth, time; the network predicts
journal = "operation.journal"       # grows with every run; keep it
context = "Digits of postal codes, cut out by the sorter, one a letter"

[prior]                             # what is believed of the probability of failure per demand (pfd) beforehand
floor = 1e-5                        # no such system is better: above 0 wherever a failure may be seen
floor_because = "One label in 100,000 is wrong"
at_least = true                     # the beliefs are lower bounds; false: exact
# mean = 0.01                       # an upper bound on the expected pfd, if one is known

[[prior.quantile]]                  # Pr(pfd <= bound) = belief; may be repeated
bound = 0.005
belief = 0.9
because = "Engineering judgement: four earlier versions all stayed below"

# [[prior.quantile]]                # Pr(pfd <= bound) <= belief: it is hardly better. Matters once failures are seen
# bound = 0.0005
# belief = 0.05
# at_most = true
# because = "No earlier version came near"

# [[prior.quantile]]                # or from a piece of evidence that justifies one, or one on either side
# from = "held-out"

# [[evidence]]                      # records that had no part in making the network: a bound by Clopper and Pearson
# name = "held-out"
# records = "held-out.csv"          # or data = "held-out.zip" (a folder, zip file or .txt that the run's network is
#                                   # tried out on), or tests = true (what the run was tested on)
# belief = 0.95
# sides = "both"                    # a lower bound too, each side with half of the rest; "upper": no lower one
# supports = "training"             # data, model, training, verification or explanation

# [[evidence]]                      # or a file that another tool has written
# file = "pac-bayes.json"
# supports = "training"

[[claim]]
kind = "confidence"                 # that the pfd is at most `bound`
bound = 0.02
target = 0.95

[[claim]]
kind = "reliability"                # that the next `demands` all succeed
demands = 10
target = 0.9

# [[claim]]
# kind = "expected_pfd"             # at most the target
# target = 0.02

# [[assumption]]
# text = "The camera is cleaned every day"

# [[defeater]]                      # a reason to doubt; it defeats the case until it is answered
# challenges = "operation"          # or prior, claims, or a stage of the life cycle
# text = "Letters from abroad were left out"
# answer = "They go to another sorter"
"""


@dataclass(frozen=True)
class Belief:
    """One quantile of the prior: given, or taken from a piece of evidence."""

    bound: float | None = None
    belief: float | None = None
    because: str = ""
    source: str = ""
    at_most: bool = False


@dataclass(frozen=True)
class Evidence:
    """A piece of evidence: a file of an exhibit, or records or data of the system's run that make one."""

    name: str = ""
    file: str = ""
    records: str = ""
    data: str = ""
    tests: bool = False
    belief: float = 0.95
    sides: Sides = "upper"
    supports: str = "training"

    @property
    def is_tried_out(self) -> bool:
        """Whether the network of a run makes it."""
        return bool(self.data) or self.tests

    @property
    def cited(self) -> str:
        """The file that a case cites, relative to the case file."""
        return f"{self.name}.evidence.json" if self.is_tried_out else self.file or self.records


@dataclass(frozen=True)
class Target:
    """A claim and what it has to reach."""

    kind: Kind
    at: float | None
    target: float

    def ask(self, prior: Prior, demands: int, failures: int) -> Question:
        """Return the question that the claim puts to a prior and the demands so far."""
        return Question(self.kind, prior, self.at, demands, failures)


@dataclass(frozen=True)
class Doubt:
    """A defeater."""

    challenges: str
    text: str
    answer: str = ""


@dataclass(frozen=True)
class CaseFile:
    """All that the file says; see the template."""

    path: Path
    title: str
    system: str
    records: str
    journal: str
    beliefs: tuple[Belief, ...]
    targets: tuple[Target, ...]
    model: str = ""
    run: str = ""
    criterion: Criterion = field(default=Criterion())
    frozen: datetime | None = None
    context: str = ""
    floor: float = 0.0
    floor_because: str = ""
    at_least: bool = False
    mean: float | None = None
    evidence: tuple[Evidence, ...] = ()
    assumptions: tuple[str, ...] = ()
    doubts: tuple[Doubt, ...] = field(default=())

    @property
    def folder(self) -> Path:
        """What paths are relative to."""
        return self.path.parent


def read_case_file(path: Path) -> CaseFile:
    """Read and check a case file.

    Raises:
        DataError: it cannot be read or is no TOML.
        ConfigurationError: something in it is missing, unknown, or of the wrong kind.
    """
    try:
        with path.open("rb") as stream:
            value = tomllib.load(stream)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; `kaisa assure init` writes one") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no TOML: {error}") from error
    return _build(path, _Table(value, str(path)))


class _Table:
    """A table of the file that notices what nobody has asked it for."""

    def __init__(self, value: Mapping[str, Any], where: str) -> None:
        self.value, self.where, self.asked = value, where, set[str]()

    def text(self, key: str, default: str | None = None) -> str:
        found = self._get(key, default)
        if not isinstance(found, str) or (default is None and not found.strip()):
            raise ConfigurationError(f"{self.where}: {key} is {found!r}; give text")
        return found

    def number(self, key: str, default: float | None = None) -> float:
        found = self._get(key, default)
        if isinstance(found, bool) or not isinstance(found, int | float):
            raise ConfigurationError(f"{self.where}: {key} is {found!r}; give a number")
        return float(found)

    def flag(self, key: str, default: bool) -> bool:
        found = self._get(key, default)
        if not isinstance(found, bool):
            raise ConfigurationError(f"{self.where}: {key} is {found!r}; give true or false")
        return found

    def has(self, key: str) -> bool:
        return key in self.value

    def time(self, key: str) -> datetime | None:
        if key not in self.value:
            return None
        try:
            return read_time(self._get(key, None))
        except ValueError:
            raise ConfigurationError(f"{self.where}: {key} is {self.value[key]!r}; give 2026-01-01T00:00:00Z") from None

    def table(self, key: str) -> _Table:
        found = self._get(key, None)
        if not isinstance(found, dict):
            raise ConfigurationError(f"{self.where}: {key} is no table; write [{key}]")
        return _Table(found, f"{self.where} [{key}]")

    def tables(self, key: str) -> Sequence[_Table]:
        found = self._get(key, [])
        if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
            raise ConfigurationError(f"{self.where}: {key} is no list of tables; write [[{key}]]")
        return [_Table(entry, f"{self.where} [[{key}]] {number}") for number, entry in enumerate(found, 1)]

    def done(self) -> None:
        unknown = [key for key in self.value if key not in self.asked]
        if unknown:
            raise ConfigurationError(
                f"{self.where}: unknown {', '.join(unknown)}; known here: {', '.join(sorted(self.asked))}"
            )

    def _get(self, key: str, default: object) -> object:
        self.asked.add(key)
        if default is None and key not in self.value:
            raise ConfigurationError(f"{self.where}: {key} is missing")
        return self.value.get(key, default)


def _build(path: Path, whole: _Table) -> CaseFile:
    system, operation, prior = whole.table("system"), whole.table("operation"), whole.table("prior")
    made = CaseFile(
        path=path,
        title=whole.text("title"),
        system=system.text("name"),
        model=system.text("model", ""),
        run=system.text("run", ""),
        criterion=_criterion(system),
        frozen=system.time("frozen"),
        records=operation.text("records"),
        journal=operation.text("journal"),
        context=operation.text("context", ""),
        floor=prior.number("floor", 0.0),
        floor_because=prior.text("floor_because", ""),
        at_least=prior.flag("at_least", False),
        mean=prior.number("mean") if prior.has("mean") else None,
        beliefs=tuple(_belief(table) for table in prior.tables("quantile")),
        evidence=tuple(_evidence(table) for table in whole.tables("evidence")),
        targets=tuple(_target(table) for table in whole.tables("claim")),
        assumptions=tuple(_only_text(table) for table in whole.tables("assumption")),
        doubts=tuple(_doubt(table) for table in whole.tables("defeater")),
    )
    for table in (system, operation, _with(prior, "mean"), whole):
        _with(table, "frozen" if table is system else "title").done()
    if made.model and made.run:
        raise ConfigurationError(f"{path}: give either model or run, not both")
    if not made.run and (made.criterion.given or any(evidence.is_tried_out for evidence in made.evidence)):
        raise ConfigurationError(
            f"{path}: [system] names no run, so that there is no network to be tried out or judged"
        )
    if not made.beliefs:
        raise ConfigurationError(f"{path}: there is no [[prior.quantile]]; without any belief nothing can be claimed")
    if not made.targets:
        raise ConfigurationError(f"{path}: there is no [[claim]]; say what is to be claimed")
    return made


def _with(table: _Table, key: str) -> _Table:
    table.asked.add(key)
    return table


def _belief(table: _Table) -> Belief:
    if table.has("from"):
        made = Belief(source=table.text("from"))
    else:
        at_most = table.flag("at_most", False)
        made = Belief(table.number("bound"), table.number("belief"), table.text("because"), at_most=at_most)
    table.done()
    return made


def _evidence(table: _Table) -> Evidence:
    made = Evidence(
        name=table.text("name", ""),
        file=table.text("file", ""),
        records=table.text("records", ""),
        data=table.text("data", ""),
        tests=table.flag("tests", False),
        belief=table.number("belief", 0.95),
        sides=_sides(table),
        supports=table.text("supports", "training"),
    )
    table.done()
    if [bool(made.file), bool(made.records), bool(made.data), made.tests].count(True) != 1:
        raise ConfigurationError(f"{table.where}: give one of file, records, data and tests")
    if made.records and not made.name:
        raise ConfigurationError(f"{table.where}: name is missing")
    if made.is_tried_out and not FILE_NAME.fullmatch(made.name):
        raise ConfigurationError(f"{table.where}: name is {made.name!r}; give letters, digits, - and _ for a file name")
    if made.supports not in STAGES:
        raise ConfigurationError(f"{table.where}: supports is {made.supports!r}; choose from {', '.join(STAGES)}")
    return made


def _sides(table: _Table) -> Sides:
    found = table.text("sides", "upper")
    for known in SIDES:
        if found == known:
            return known
    raise ConfigurationError(f"{table.where}: sides is {found!r}; choose from {', '.join(SIDES)}")


def _criterion(system: _Table) -> Criterion:
    given = {name: system.number(name) for name in ("sure", "dice", "loss") if system.has(name)}
    system.asked |= {"sure", "dice", "loss"}
    return Criterion(**given)


def _target(table: _Table) -> Target:
    kind = table.text("kind")
    if kind not in KINDS:
        raise ConfigurationError(f"{table.where}: kind is {kind!r}; choose from {', '.join(KINDS)}")
    at = {"confidence": "bound", "reliability": "demands"}.get(kind)
    made = Target(kind, None if at is None else table.number(at), table.number("target"))
    table.done()
    if not 0 < made.target < 1:
        raise ConfigurationError(f"{table.where}: target is {made.target:g}; give a number above 0 and below 1")
    return made


def _only_text(table: _Table) -> str:
    text = table.text("text")
    table.done()
    return text


def _doubt(table: _Table) -> Doubt:
    made = Doubt(table.text("challenges"), table.text("text"), table.text("answer", ""))
    table.done()
    return made
