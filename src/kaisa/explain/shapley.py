"""KernelSHAP: Shapley values of features by one weighted regression (Lundberg and Lee 2017).

With v(z) the score where the features z are present and the others come from a background, Shapley values φ minimise

    Σ_z π(z) (v(z) − v(0) − φᵀ z)²   under   Σ φ = v(1) − v(0),    π(z) = (D − 1) / (C(D, |z|) |z| (D − |z|)).

Sizes |z| are taken from both ends, where the weight is, and in full as long as the samples suffice; what is left is
drawn, each with its complement. With 2^D − 2 samples nothing is left, and the values are exact. (Captum's KernelShap
draws every sample, so that games of a few features are not exact; it has no background of several rows.)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kaisa.errors import ConfigurationError
from kaisa.explain.domains import Domain, Groups, Texts, groups_of, kind_of, stacked
from kaisa.explain.registry import method
from kaisa.explain.subject import Outcome, Subject


@method("kernelshap", scope="local", needs="function", summary="Shapley values of features, by regression")
def kernelshap(
    subject: Subject,
    *,
    samples: int | None = None,
    segments: Any = "slic",
    hide: Any = None,
    background: Any = None,
) -> Outcome:
    """Explain by KernelSHAP.

    The figures are `completeness_gap`, |Σ φ − (v(1) − v(0))|, and `local_r2`, how far the score is a sum.

    Args:
        subject: what is explained.
        samples: sets of features that the model is asked about; by default 2 D + 2048, as in the package `shap`.
        segments: superpixels of images (`slic`, `quickshift`, `grid` or numbers); numbers of groups for other tensors.
        hide: what absent entries become: the input's `mean`, their group's `own mean` (as in `lime`, which
            hides nothing where a group has one colour), a number, a tensor; in texts what stands for a word.
        background: for tables, rows that absent features come from; the score is the mean over them.
    """
    if samples is not None and (not isinstance(samples, int) or samples < 2):
        raise ConfigurationError(f"samples is {samples!r}; expected an int of at least 2")
    if background is not None and hide is not None:
        raise ConfigurationError("background and hide both say what absent features become; give one of them")
    values, details, gaps, shares = [], [], [], []
    count = len(subject.inputs)
    for row in range(count):
        one = subject.one(row)
        domains = _domains(one, segments, hide, background)
        size = domains[0].size
        wanted = 2 * size + 2048 if samples is None else samples
        sets, weights = coalitions(size, wanted, one.generator)
        asked = torch.cat([torch.zeros(1, size, dtype=torch.bool), torch.ones(1, size, dtype=torch.bool), sets])
        scores = _mean_scores(one, domains, asked, row, count)
        found = shapley_values(sets, weights, scores[2:], float(scores[0]), float(scores[1]))
        guessed = scores[0] + sets.double() @ found
        values.append(domains[0].spread(found))
        gaps.append(abs(float(found.sum() - (scores[1] - scores[0]))))
        shares.append(_share(scores[2:], guessed, weights))
        names = list(domains[0].names)
        details.append(
            {**domains[0].details, "names": names, "shapley_values": found.tolist(), "base": float(scores[0])}
        )
    kind = kind_of(subject)
    tokens = tuple(tuple(detail["names"]) for detail in details) if subject.inputs.kind == "texts" else ()
    quality = {"completeness_gap": tuple(gaps), "local_r2": tuple(shares)}
    return Outcome(stacked(values), kind, quality, {"inputs": details}, names=tokens)


def coalitions(size: int, samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return sets of features, neither empty nor full, and their weights; the weights sum to 1.

    Args:
        size: how many features there are, D.
        samples: at most so many sets.
        generator: where sets come from that are drawn.
    """
    if size == 1:
        return torch.zeros(0, 1, dtype=torch.bool), torch.zeros(0, dtype=torch.float64)
    mass = np.array([1 / (count * (size - count)) for count in range(1, size)])
    mass /= mass.sum()  # the weight of all sets of each size together, up to what is the same for all sizes
    sets: list[Tensor] = []
    weights: list[Tensor] = []
    left, open_sizes = samples, list(range(1, size))
    for count in range(1, size // 2 + 1):
        pair = sorted({count, size - count})
        needed = sum(math.comb(size, each) for each in pair)
        share = mass[[each - 1 for each in pair]].sum() / mass[[each - 1 for each in open_sizes]].sum()
        if left * share / needed < 1 - 1e-8:  # fewer would be drawn than there are
            break
        for each in pair:
            sets.append(_all_sets(size, each))
            weights.append(torch.full((len(sets[-1]),), mass[each - 1] / len(sets[-1]), dtype=torch.float64))
            open_sizes.remove(each)
        left -= needed
    if open_sizes and left > 1:
        drawn = _drawn_sets(size, left // 2, mass, open_sizes, generator)
        found, times = drawn.unique(dim=0, return_counts=True)
        sets.append(found)
        weights.append(times.double() / times.sum() * mass[[each - 1 for each in open_sizes]].sum())
    total = torch.cat(weights)
    return torch.cat(sets), total / total.sum()


def shapley_values(sets: Tensor, weights: Tensor, scores: Tensor, base: float, full: float) -> Tensor:
    """Return φ, the last of which is what the others leave of v(1) − v(0)."""
    size = sets.shape[1]
    if size == 1:
        return torch.tensor([full - base], dtype=torch.float64)
    z = sets.double()
    root = weights.sqrt()[:, None]
    rows = (z[:, :-1] - z[:, -1:]) * root
    rest = (scores - base - z[:, -1] * (full - base))[:, None] * root
    found = torch.linalg.lstsq(rows, rest, driver="gelsd").solution[:, 0]
    return torch.cat([found, (full - base - found.sum())[None]])


def _all_sets(size: int, count: int) -> Tensor:
    index = torch.tensor(list(itertools.combinations(range(size), count)))
    return torch.zeros(len(index), size, dtype=torch.bool).scatter_(1, index, True)


def _drawn_sets(
    size: int, pairs: int, mass: np.ndarray[Any, Any], open_sizes: Sequence[int], generator: torch.Generator
) -> Tensor:
    """Draw sets of the open sizes by their weight, each with its complement, whose size is open too."""
    chances = torch.tensor([mass[count - 1] for count in open_sizes])
    counts = torch.tensor(open_sizes)[torch.multinomial(chances, pairs, replacement=True, generator=generator)]
    order = torch.rand(pairs, size, generator=generator).argsort(1).argsort(1)
    drawn = order < counts[:, None]
    return torch.cat([drawn, ~drawn])


def _domains(one: Subject, segments: Any, hide: Any, background: Any) -> list[Domain]:
    """Return the input against each row of the background; against what hides features where there is none."""
    data = one.inputs.data
    if isinstance(data, tuple):
        return [Texts(data[0], str(hide or ""))]
    if background is None:
        return [groups_of(one, segments, hide)]
    tensor = one.inputs.tensor
    rows = torch.as_tensor(np.asarray(background) if not isinstance(background, Tensor) else background)
    if rows.dim() != tensor.dim() or rows.shape[1:] != tensor.shape[1:] or not len(rows):
        raise ConfigurationError(
            f"background has the shape {tuple(rows.shape)}; expected (rows, {', '.join(map(str, tensor.shape[1:]))})"
        )
    against = groups_of(one, segments)
    return [Groups(tensor, against.groups, part[None].to(tensor), against.names) for part in rows]


def _mean_scores(one: Subject, domains: Sequence[Domain], asked: Tensor, row: int, count: int) -> Tensor:
    """Return the score of each set of features, the mean over the background."""
    total = torch.zeros(len(asked), dtype=torch.float64)
    for number, domain in enumerate(domains):
        parts = [one.chosen_scores(domain.build(part)) for part in asked.split(one.batch_size)]
        total += torch.cat(parts)
        one.report(row * len(domains) + number + 1, count * len(domains))
    return total / len(domains)


def _share(scores: Tensor, guessed: Tensor, weights: Tensor) -> float:
    if not len(scores):
        return 1.0
    mean = (weights * scores).sum()
    spread = float((weights * (scores - mean) ** 2).sum())
    return 1 - float((weights * (scores - guessed) ** 2).sum()) / spread if spread > 0 else 1.0
