"""Anchors: a rule that holds for an input, and under which the model almost always says the same (Ribeiro 2018).

A rule is a set A of features (superpixels, words, predicates of a table). With D(· | A) the perturbations that keep A,

    precision  prec(A) = P(f(z) = f(x)), z ~ D(· | A)        coverage  cov(A) = P(A holds for z), z ~ D

and the rule of the largest coverage is wanted of which P(prec(A) ≥ threshold) ≥ 1 − δ. Rules grow by one feature at a
time from a beam; which are best is found by KL-LUCB, which asks the model where doubt is. All candidates of a
round are asked about in one batch. In the end the rule is tried on fresh samples, which no choice has seen: the lower
bound of `bounds` is a certificate at confidence 1 − δ, whatever the search did.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kaisa.errors import ConfigurationError
from kaisa.explain import bounds
from kaisa.explain.domains import Domain, Predicates, Texts, groups_of, kind_of, stacked
from kaisa.explain.registry import method
from kaisa.explain.rows import Table
from kaisa.explain.subject import Batch, Outcome, Subject

Rule = tuple[int, ...]
SHOWN = 5  # counterexamples that are kept


@dataclass(frozen=True)
class Search:
    """How rules are searched: see `anchors`."""

    threshold: float = 0.95
    delta: float = 0.1
    tolerance: float = 0.15
    stop: float = 0.05
    batch: int = 100
    beam: int = 4
    coverage_samples: int = 10000
    certificate_samples: int = 1000
    longest: int | None = None
    first: bool = False


@method("anchors", scope="local", needs="function", summary="a rule under which the model says the same")
def anchors(
    subject: Subject,
    *,
    threshold: float = 0.95,
    delta: float = 0.1,
    tolerance: float = 0.15,
    stop: float = 0.05,
    batch: int = 100,
    beam: int = 4,
    coverage_samples: int = 10000,
    certificate_samples: int = 1000,
    longest: int | None = None,
    first: bool | None = None,
    segments: Any = "slic",
    hide: Any = None,
    training: Any = None,
    categorical: Sequence[int] = (),
) -> Outcome:
    """Explain by an anchor: `values` are 1 where the rule holds on to the input.

    The figures are `certified_precision`, which the rule's precision reaches at confidence 1 − δ, `precision` as seen,
    and `coverage`. `details` tell the rule, its prefixes with their precisions, and counterexamples.

    Args:
        subject: what is explained; the model must give the target for it, or rules are sought that bring it about.
        threshold: the precision that a rule shall have.
        delta: the chance of being wrong.
        tolerance: how exactly the best of the candidates are found (ε of KL-LUCB).
        stop: how far below the threshold a lower bound may stay when a rule is accepted in the search.
        batch: samples of a candidate at a time.
        beam: how many rules of each length are grown.
        coverage_samples: samples that coverage is measured on.
        certificate_samples: fresh samples that the certificate rests on.
        longest: the largest number of features in a rule; by default all.
        first: take the first rule that is good enough, instead of the most general one; by default so for images and
            texts, as published.
        segments: superpixels of images (`slic`, `quickshift`, `grid` or numbers); numbers of groups for other tensors.
        hide: what absent entries become: the input's `mean`, their group's `own mean` (as in `lime`, which
            hides nothing where a group has one colour), a number, a tensor; in texts what stands for a word,
            by default UNK.
        training: for tables, training rows: rules are then of quartiles and categories.
        categorical: which features of a table are categories.
    """
    search = Search(
        threshold, delta, tolerance, stop, batch, beam, coverage_samples, certificate_samples, longest, bool(first)
    )
    _check(search)
    values, details, certified, precision, coverage = [], [], [], [], []
    for row in range(len(subject.inputs)):
        one = subject.one(row)
        domain = _domain(one, segments, hide, training, categorical)
        is_first = not isinstance(domain, Predicates) if first is None else first
        settled = Search(**{**search.__dict__, "first": is_first})
        found = Hunt(domain, _agreement(one), settled, one.batch_size, one.generator).run()
        indicator = torch.zeros(domain.size, dtype=torch.float64)
        indicator[list(found.rule)] = 1.0
        values.append(domain.spread(indicator))
        details.append({**domain.details, **found.told(domain)})
        certified.append(found.certified)
        precision.append(found.precision)
        coverage.append(found.coverage)
        subject.report(row + 1, len(subject.inputs))
    names = tuple(tuple(detail["names"]) for detail in details) if subject.inputs.kind == "texts" else ()
    return Outcome(
        stacked(values),
        kind_of(subject),
        {"certified_precision": tuple(certified), "precision": tuple(precision), "coverage": tuple(coverage)},
        {"inputs": details},
        names=names,
    )


@dataclass
class Found:
    """A rule and what is known of it."""

    rule: Rule
    certified: float
    precision: float
    coverage: float
    prefixes: list[tuple[float, float]]  # precision and coverage of the rule's first features
    calls: int
    is_anchor: bool
    counterexamples: Any = field(default_factory=list)

    def told(self, domain: Domain) -> dict[str, Any]:
        """Return what an explanation should tell."""
        return {
            "rule": [domain.names[feature] for feature in self.rule],
            "features": list(self.rule),
            "is_anchor": self.is_anchor,
            "prefixes": [{"precision": precision, "coverage": coverage} for precision, coverage in self.prefixes],
            "model_calls": self.calls,
            "counterexamples": self.counterexamples,
            "names": list(domain.names),
        }


class Hunt:
    """The search for one input's rule: candidates, their trials and hits, and who is best."""

    def __init__(
        self,
        domain: Domain,
        agrees: Callable[[Batch], Tensor],
        search: Search,
        batch_size: int,
        generator: torch.Generator,
    ) -> None:
        self._domain, self._agrees, self._search = domain, agrees, search
        self._batch_size, self._generator = batch_size, generator
        self._trials: dict[Rule, int] = {}
        self._hits: dict[Rule, int] = {}
        free = torch.zeros(search.coverage_samples, domain.size, dtype=torch.bool)
        self._holds = domain.sample(free, generator)[0].T.contiguous().numpy()  # a row for each feature
        self._covered: dict[Rule, float] = {}
        self.calls = 0

    def run(self) -> Found:
        """Return the most general rule that is good enough, or the most precise one where none is."""
        search, longest = self._search, self._search.longest or self._domain.size
        best: Rule | None = () if self._is_precise((), 1, 1) else None
        beam: list[Rule] = [()]
        tried: list[Rule] = [()]
        for _ in range(longest if best is None else 0):
            candidates = self._grown(beam, 0.0 if best is None else self.coverage(best))
            if not candidates:
                break
            beam = self._most_precise(candidates, min(search.beam, len(candidates)))
            tried += beam
            accepted = [rule for rule in beam if self._is_precise(rule, len(beam), len(candidates))]
            best = max([*accepted, *(() if best is None else (best,))], key=self.coverage, default=None)
            if best is not None and search.first:
                break
        is_anchor = best is not None
        if best is None:
            best = self._most_precise(tried, 1)[0]
        return self._certified(best, is_anchor)

    def coverage(self, rule: Rule) -> float:
        """Return the share of perturbations that the rule holds for."""
        if rule not in self._covered:
            self._covered[rule] = float(np.logical_and.reduce(self._holds[list(rule)]).mean()) if rule else 1.0
        return self._covered[rule]

    def _grown(self, beam: Sequence[Rule], covered: float) -> list[Rule]:
        """Return the beam's rules with one feature more, of those that say more and cover more than what is found."""
        grown: dict[frozenset[int], Rule] = {}
        for rule in beam:
            for feature in range(self._domain.size):
                if feature not in rule:
                    grown.setdefault(frozenset((*rule, feature)), (*rule, feature))
        return [rule for rule in grown.values() if covered < self.coverage(rule) < self.coverage(rule[:-1])]

    def _most_precise(self, rules: Sequence[Rule], count: int) -> list[Rule]:
        """Return the most precise rules, found by KL-LUCB: doubt between best and rest is where the model is asked."""
        search = self._search
        fresh = [rule for rule in rules if not self._trials.get(rule)]
        if fresh:
            self._ask(fresh, search.batch)
        if count == len(rules):
            return list(rules)
        is_rest = (np.arange(len(rules)) >= count).astype(np.float64)
        for round_ in range(1, 100_000):
            mean, trials = self._statistics(rules)
            beta = bounds.exploration(len(rules), round_, search.delta)
            order = np.argsort(-mean, kind="stable")
            found = bounds.bound(mean[order], trials[order], beta, end=is_rest)  # lower of the best, upper of the rest
            weakest, strongest = int(found[:count].argmin()), count + int(found[count:].argmax())
            if found[strongest] - found[weakest] <= search.tolerance:
                break
            self._ask([rules[order[weakest]], rules[order[strongest]]], search.batch)
        return [rules[index] for index in order[:count]]

    def _is_precise(self, rule: Rule, beam: int, candidates: int) -> bool:
        """Tell whether a rule's precision reaches the threshold, asking until that is clear."""
        search = self._search
        beta = math.log((1 + (beam - 1) * candidates) / search.delta)
        while True:
            if self._trials.get(rule):
                mean, trials = self._statistics([rule])
                low = float(bounds.lower(mean, trials, beta)[0])
                high = float(bounds.upper(mean, trials, beta)[0])
                if mean[0] >= search.threshold and low >= search.threshold - search.stop:
                    return True
                if mean[0] < search.threshold and high < search.threshold + search.stop:
                    return False
            self._ask([rule], search.batch)

    def _certified(self, rule: Rule, is_anchor: bool) -> Found:
        """Try a rule on fresh samples."""
        search = self._search
        agreed, recipe = self._drawn([rule], search.certificate_samples)
        hits = agreed.double().mean().item()
        low = float(bounds.lower(hits, search.certificate_samples, math.log(1 / search.delta)))
        prefixes = [rule[:length] for length in range(1, len(rule) + 1)]
        unknown = [prefix for prefix in prefixes if not self._trials.get(prefix)]
        if unknown:
            self._ask(unknown, search.batch)
        known = [(self._hits[prefix] / self._trials[prefix], self.coverage(prefix)) for prefix in prefixes]
        against = recipe[~agreed][:SHOWN]
        shown = self._domain.build(against) if len(against) else []
        counterexamples = shown.cpu() if isinstance(shown, Tensor) else list(shown)
        return Found(rule, low, hits, self.coverage(rule), known, self.calls, is_anchor, counterexamples)

    def _ask(self, rules: Sequence[Rule], count: int) -> None:
        agreed, _ = self._drawn(rules, count)
        for rule, hits in zip(rules, agreed.view(len(rules), count).sum(1).tolist(), strict=True):
            self._trials[rule] = self._trials.get(rule, 0) + count
            self._hits[rule] = self._hits.get(rule, 0) + hits

    def _drawn(self, rules: Sequence[Rule], count: int) -> tuple[Tensor, Tensor]:
        """Ask the model about so many perturbations that keep each rule; return where it agrees, and the recipe."""
        fixed = torch.zeros(len(rules), self._domain.size, dtype=torch.bool)
        for number, rule in enumerate(rules):
            fixed[number, list(rule)] = True
        recipe = self._domain.recipes(fixed, count, self._generator)
        self.calls += len(recipe)
        return self._domain.ask(self._agrees, recipe, self._batch_size).cpu(), recipe

    def _statistics(self, rules: Sequence[Rule]) -> tuple[Any, Any]:
        trials = np.array([self._trials[rule] for rule in rules], dtype=np.float64)
        return np.array([self._hits[rule] for rule in rules]) / trials, trials


def _agreement(one: Subject) -> Callable[[Batch], Tensor]:
    """Return what tells whether the model gives the target: its largest output, or the side of ½ of its only one."""
    assert one.target is not None
    classes = one.target.classes
    assert one.inputs.data is not None
    own = one.scores(one.inputs.data)
    if classes is not None and own.dim() == 2:
        return lambda batch: one.scores(batch).argmax(1) == classes[0]
    if classes is None:
        above = bool(one.chosen(own)[0] > 0.5)
        return lambda batch: (one.chosen(one.scores(batch)) > 0.5) == above
    raise ConfigurationError("anchors explain classes: give a target function that is above ½ where the model agrees")


def _domain(one: Subject, segments: Any, hide: Any, training: Any, categorical: Sequence[int]) -> Domain:
    data = one.inputs.data
    if isinstance(data, tuple):
        return Texts(data[0], "UNK" if hide is None else str(hide))
    if training is None:
        return groups_of(one, segments, hide)
    tensor = one.inputs.tensor
    if tensor.dim() != 2:
        raise ConfigurationError(f"training goes with rows, and inputs are {one.inputs.kind}")
    return Predicates(Table.about(tensor[0], training, categorical, tuple(one.names)), tensor)


def _check(search: Search) -> None:
    for name in ("threshold", "delta", "tolerance", "stop"):
        value = getattr(search, name)
        if not isinstance(value, int | float) or not 0 < value < 1:
            raise ConfigurationError(f"{name} is {value!r}; expected a number between 0 and 1")
    for name in ("batch", "beam", "coverage_samples", "certificate_samples"):
        value = getattr(search, name)
        if not isinstance(value, int) or value < 1:
            raise ConfigurationError(f"{name} is {value!r}; expected an int of at least 1")
    if search.longest is not None and (not isinstance(search.longest, int) or search.longest < 1):
        raise ConfigurationError(f"longest is {search.longest!r}; expected an int of at least 1")
