"""LIME and CLE: a weighted linear model of the score, near one input.

Samples z ∈ {0, 1}^D say which features are present, row 0 is the input itself. With a design u(z), scores y and
distances d,

    (b, β) = argmin Σ π (y − b − βᵀ u(z))² + α ‖β‖²,     π = √exp(−d² / width²).

LIME (Ribeiro and others 2016) has u = z. CLE (combinations, of XDeep 2019) has u = [z, φ] where φ_C = Π_{j ∈ C} z_j for
every combination C of so many features as `spans` says.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kaisa.errors import ConfigurationError
from kaisa.explain.domains import Bins, Domain, ThinnedTexts, groups_of, kind_of, stacked
from kaisa.explain.registry import method
from kaisa.explain.rows import Table
from kaisa.explain.subject import Outcome, Subject

Combinations = tuple[tuple[int, ...], ...]
Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Fit:
    """A linear model of samples: see `fit`."""

    intercept: float
    coefficients: Array
    r2: float
    prediction: float  # for row 0, the input itself


@method("lime", scope="local", needs="function", summary="a linear model of the score near the input")
def lime(
    subject: Subject,
    *,
    samples: int = 1000,
    segments: Any = "slic",
    hide: Any = None,
    training: Any = None,
    categorical: Sequence[int] = (),
    width: float | None = None,
    alpha: float | None = 1.0,
    features: int | None = None,
) -> Outcome:
    """Explain by LIME.

    The figure `local_r2` is the share of the samples' weighted variance that the linear model explains.

    Args:
        subject: what is explained.
        samples: inputs that the model is asked about, for each explained one.
        segments: superpixels of images (`slic`, `quickshift`, `grid` or numbers); numbers of groups for other tensors.
        hide: what absent entries become: the input's `mean`, their group's `own mean` (as in `lime`, which
            hides nothing where a group has one colour), a number, a tensor; in texts what stands for a word.
        training: training rows, for tables: features are then quartiles.
        categorical: which features of a table are categories.
        width: of the kernel; by default 0.25 for cosine distances, 25 for texts (distances are 100 times as large),
            0.75 √D for tables: as in the package `lime`.
        alpha: of the ridge; None for 0.001 Σπ.
        features: keep so many, chosen forward up to 6, by weight beyond; by default all.
    """
    return _surrogates(subject, samples, segments, hide, training, categorical, width, alpha, features, None)


@dataclass(frozen=True)
class _Combined:
    spans: tuple[int, ...]
    cared: tuple[int, ...] | None
    include_features: bool
    extended_distance: bool
    limit: int


@method("cle", scope="local", needs="function", summary="a linear model with combinations of features")
def cle(
    subject: Subject,
    *,
    spans: Sequence[int] = (2,),
    cared: Sequence[int] | None = None,
    include_features: bool = True,
    extended_distance: bool = False,
    limit: int = 200,
    samples: int = 1000,
    segments: Any = "slic",
    hide: Any = None,
    training: Any = None,
    categorical: Sequence[int] = (),
    width: float | None = None,
    alpha: float | None = None,
    features: int | None = None,
) -> Outcome:
    """Explain by a linear model with combinations of features (CLE); options not named here as `lime`.

    `values` give each feature its own coefficient and an even share of its combinations'; `details` have all.

    Args:
        subject: what is explained.
        spans: how many features a combination has: 2 for pairs.
        cared: the features of which combinations are made; by default all.
        include_features: single features belong to the design.
        extended_distance: measure distances on features and combinations, as XDeep did.
        limit: at most so many combinations, of those features that a linear model without them finds largest.
        samples: as `lime`.
        segments: as `lime`.
        hide: as `lime`.
        training: as `lime`.
        categorical: as `lime`.
        width: as `lime`.
        alpha: as `lime`.
        features: as `lime`, of features and combinations together.
    """
    spans = tuple(spans)
    if not spans or not all(isinstance(span, int) and span > 1 for span in spans):
        raise ConfigurationError(f"spans is {spans}; expected sizes of combinations, from 2 on")
    if not isinstance(limit, int) or limit < 1:
        raise ConfigurationError(f"limit is {limit!r}; expected an int of at least 1")
    chosen = None if cared is None else tuple(int(feature) for feature in cared)
    combined = _Combined(spans, chosen, include_features, extended_distance, limit)
    return _surrogates(subject, samples, segments, hide, training, categorical, width, alpha, features, combined)


def kernel(distances: Tensor, width: float) -> Tensor:
    """Return the weight of samples at distances: √exp(−d²/width²)."""
    return (-(distances.double() ** 2) / width**2).exp().sqrt()


def combinations(features: Sequence[int], spans: Sequence[int]) -> Combinations:
    """Return all combinations of so many features, in order."""
    return tuple(itertools.chain.from_iterable(itertools.combinations(features, span) for span in spans))


def design(present: Tensor, combined: Combinations, include_features: bool = True) -> Tensor:
    """Return a row u(z) for each sample: its features, then its combinations, present where all their features are."""
    columns = [present] if include_features or not combined else []
    for span in sorted({len(combination) for combination in combined}):
        index = torch.tensor([combination for combination in combined if len(combination) == span])
        together = present[:, index[:, 0]]
        for place in range(1, span):
            together &= present[:, index[:, place]]
        columns.append(together)
    return torch.cat(columns, 1).double()


def fit(rows: Tensor, scores: Tensor, weights: Tensor, alpha: float) -> Fit:
    """Fit scores by rows in weighted ridge regression; the intercept costs nothing.

    What scikit-learn's Ridge finds, by one product of the rows with themselves: the rows are many and narrow.
    """
    u, y, w = rows.numpy(), scores.numpy(), weights.numpy()
    total = w.sum()
    weighted = u * w[:, None]
    mean_u, mean = weighted.sum(0) / total, float(w @ y) / total
    gram = weighted.T @ u - total * np.outer(mean_u, mean_u)
    pull = weighted.T @ y - total * mean * mean_u
    coefficients = (
        np.linalg.solve(gram + alpha * np.eye(len(gram)), pull) if alpha > 0 else _least(u, y, w, mean_u, mean)
    )
    intercept = mean - float(mean_u @ coefficients)
    guessed = u @ coefficients + intercept
    spread = float(w @ (y - mean) ** 2)
    r2 = 1 - float(w @ (y - guessed) ** 2) / spread if spread > 0 else 1.0
    return Fit(intercept, coefficients, r2, float(guessed[0]))


def _least(u: Array, y: Array, w: Array, mean_u: Array, mean: float) -> Array:
    """Return the shortest of the best coefficients, where nothing tells them apart."""
    root = np.sqrt(w)
    return np.asarray(np.linalg.lstsq((u - mean_u) * root[:, None], (y - mean) * root, rcond=None)[0])


def select(rows: Tensor, scores: Tensor, weights: Tensor, count: int | None) -> list[int]:
    """Return the columns to keep: forward selection up to 6, else those of the largest weight in a first fit."""
    columns = rows.shape[1]
    if count is None or count >= columns:
        return list(range(columns))
    if count > 6:
        first = np.abs(fit(rows, scores, weights, 0.01).coefficients * rows[0].numpy())
        return sorted(np.argsort(-first, kind="stable")[:count].tolist())
    chosen: list[int] = []
    for _ in range(count):
        left = [column for column in range(columns) if column not in chosen]
        chosen.append(max(left, key=lambda column: fit(rows[:, [*chosen, column]], scores, weights, 0.0).r2))
    return chosen


def _surrogates(
    subject: Subject,
    samples: int,
    segments: Any,
    hide: Any,
    training: Any,
    categorical: Sequence[int],
    width: float | None,
    alpha: float | None,
    features: int | None,
    combined: _Combined | None,
) -> Outcome:
    _check_numbers(samples, width, alpha, features)
    values, details, quality, names = [], [], [], []
    count = len(subject.inputs)
    for row in range(count):
        one = subject.one(row)
        domain = _domain(one, segments, hide, training, categorical)
        present, scores = _samples(one, domain, samples, row, count)
        found, told, r2 = _explained(domain, present, scores, width, alpha, features, combined)
        values.append(domain.spread(found))
        names.append(domain.names)
        details.append({**domain.details, **told})
        quality.append(r2)
    kind = kind_of(subject)
    return Outcome(
        stacked(values),
        kind,
        {"local_r2": tuple(quality)},
        {"inputs": details},
        names=tuple(names) if kind == "tokens" and subject.inputs.kind == "texts" else (),
    )


def _domain(one: Subject, segments: Any, hide: Any, training: Any, categorical: Sequence[int]) -> Domain:
    data = one.inputs.data
    if isinstance(data, tuple):
        return ThinnedTexts(data[0], str(hide or ""))
    if training is None:
        return groups_of(one, segments, hide)
    tensor = one.inputs.tensor
    if tensor.dim() != 2:
        raise ConfigurationError(f"training goes with rows, and inputs are {one.inputs.kind}")
    return Bins(Table.about(tensor[0], training, categorical, tuple(one.names)), tensor)


def _samples(one: Subject, domain: Domain, samples: int, row: int, count: int) -> tuple[Tensor, Tensor]:
    """Draw samples and ask the model about them; the first is the input itself."""
    fixed = torch.zeros(samples, domain.size, dtype=torch.bool)
    fixed[0] = True
    present, recipe = domain.sample(fixed, one.generator)
    scores = []
    for part in recipe.split(one.batch_size):
        scores.append(one.chosen_scores(domain.build(part)))
        one.report(row * samples + sum(map(len, scores)), count * samples)
    return present, torch.cat(scores)


def _explained(
    domain: Domain,
    present: Tensor,
    scores: Tensor,
    width: float | None,
    alpha: float | None,
    features: int | None,
    combined: _Combined | None,
) -> tuple[Tensor, dict[str, Any], float]:
    """Return each feature's value, what else there is to tell, and the share of variance explained."""
    width = width or domain.width
    weights = kernel(domain.distances(present), width)
    extra = _combinations(present, scores, weights, combined)
    include = combined is None or combined.include_features
    rows = design(present, extra, include)
    if combined is not None and combined.extended_distance:
        weights = kernel(domain.distances(rows.bool()), width)
    columns = select(rows, scores, weights, features)
    kept = rows if len(columns) == rows.shape[1] else rows[:, columns]
    result = fit(kept, scores, weights, 1e-3 * float(weights.sum()) if alpha is None else alpha)
    terms = [*((feature,) for feature in range(domain.size)), *extra] if include or not extra else list(extra)
    values = [0.0] * domain.size
    told = []
    for column, coefficient in zip(columns, result.coefficients.tolist(), strict=True):
        for feature in terms[column]:
            values[feature] += coefficient / len(terms[column])
        told.append([list(terms[column]), coefficient])
    told.sort(key=lambda term: -abs(term[1]))
    return (
        torch.tensor(values, dtype=torch.float64),
        {"intercept": result.intercept, "prediction": result.prediction, "terms": told, "names": list(domain.names)},
        result.r2,
    )


def _combinations(present: Tensor, scores: Tensor, weights: Tensor, combined: _Combined | None) -> Combinations:
    """Return the combinations of the design: of the features that matter most, where all would be too many."""
    if combined is None:
        return ()
    size = present.shape[1]
    cared = list(range(size)) if combined.cared is None else sorted(set(combined.cared))
    if not set(cared) <= set(range(size)):
        raise ConfigurationError(f"cared names features {cared}, and there are {size}")
    if sum(math.comb(len(cared), span) for span in combined.spans) > combined.limit:
        single = np.abs(fit(present.double(), scores, weights, 1e-3 * float(weights.sum())).coefficients)
        cared.sort(key=lambda feature: -single[feature])
        while sum(math.comb(len(cared), span) for span in combined.spans) > combined.limit:
            cared.pop()
    return combinations(sorted(cared), combined.spans)


def _check_numbers(samples: int, width: float | None, alpha: float | None, features: int | None) -> None:
    if not isinstance(samples, int) or samples < 2:
        raise ConfigurationError(f"samples is {samples!r}; expected an int of at least 2")
    if width is not None and not width > 0:
        raise ConfigurationError(f"width is {width!r}; expected a number above 0")
    if alpha is not None and not alpha >= 0:
        raise ConfigurationError(f"alpha is {alpha!r}; expected a number of at least 0")
    if features is not None and (not isinstance(features, int) or features < 1):
        raise ConfigurationError(f"features is {features!r}; expected an int of at least 1")
