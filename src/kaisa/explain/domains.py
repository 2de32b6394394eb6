"""Domains: one input as features that can be present or absent, and inputs again from those that are.

    present (samples, features) ──► recipe ──► batches of inputs ──► scores

A recipe is small (which superpixels are there); inputs are made of it only as the model sees them, batch by batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kaisa.errors import ConfigurationError, DataError
from kaisa.explain.rows import Predicate, Table
from kaisa.explain.segments import superpixels
from kaisa.explain.subject import Batch, Subject
from kaisa.explain.texts import Words

CHUNKS = 32  # features of an input that has neither segments nor columns


class Domain(ABC):
    """One input in features.

    Attributes:
        names: what each feature is called.
        width: the width of the kernel that says how near a sample is, in units of `distances`.
        details: what an explanation should tell of the features.
    """

    names: tuple[str, ...]
    width: float
    details: dict[str, Any]

    @property
    def size(self) -> int:
        """How many features there are."""
        return len(self.names)

    @abstractmethod
    def sample(self, fixed: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw samples in which the fixed features, (samples, features), are present and the others by chance.

        Returns which features are present, and the recipe of the inputs.
        """

    @abstractmethod
    def build(self, recipe: Tensor) -> Batch:
        """Return the inputs of a recipe."""

    @abstractmethod
    def spread(self, values: Tensor) -> Tensor:
        """Return values of features in the shape of the input."""

    def distances(self, present: Tensor) -> Tensor:
        """Return how far samples are from the input: the cosine distance of what is present to everything."""
        return 1 - (present.double().mean(1)).sqrt()

    def recipe(self, present: Tensor) -> Tensor:
        """Return the recipe of inputs in which just these features are present."""
        return present

    def recipes(self, fixed: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Draw so many recipes for each row of ``fixed``, one row's after the other's."""
        return self.sample(fixed.repeat_interleave(count, 0), generator)[1]

    def ask(self, score: Callable[[Batch], Tensor], recipe: Tensor, size: int) -> Tensor:
        """Return the scores of a recipe's inputs, made and scored batch by batch."""
        return torch.cat([score(self.build(part)) for part in recipe.split(size)])


class Groups(Domain):
    """A tensor as groups of its entries: superpixels, stretches, columns or tokens; absent ones are hidden."""

    width = 0.25

    def __init__(self, data: Tensor, groups: Tensor, hidden: Tensor, names: tuple[str, ...] = ()) -> None:
        self._data, self._hidden = data, hidden  # (1, …)
        self.groups = groups.to(data.device).expand(data.shape[1:])
        self.names = names or tuple(str(number) for number in range(int(groups.max()) + 1))
        self.details = {"groups": groups.cpu()}

    def sample(self, fixed: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        present = (torch.rand(fixed.shape, generator=generator) < 0.5) | fixed
        return present, present

    def build(self, recipe: Tensor) -> Batch:
        shown = recipe.to(self._data.device)[:, self.groups]
        return torch.where(shown, self._data, self._hidden)

    def spread(self, values: Tensor) -> Tensor:
        return values.to(self.groups.device)[self.groups]


class Texts(Domain):
    """A text as its words; absent ones are left out, or something stands for them."""

    width = 25.0

    def __init__(self, text: str, absent: str = "") -> None:
        self._words, self._absent = Words.of(text), absent
        self.names = self._words.words
        self.details = {}
        if not self.names:
            raise DataError(f"the text {text!r} has no words")

    def sample(self, fixed: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        present = (torch.rand(fixed.shape, generator=generator) < 0.5) | fixed
        return present, present

    def build(self, recipe: Tensor) -> Batch:
        return [self._words.text(present, self._absent) for present in recipe]

    def spread(self, values: Tensor) -> Tensor:
        return values

    def distances(self, present: Tensor) -> Tensor:
        return 100 * super().distances(present)


class ThinnedTexts(Texts):
    """A text of which a number of words, drawn evenly from 1 to all but one, is left out: the samples of LIME.

    The only word of a text is left out half of the time.
    """

    def sample(self, fixed: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        count = fixed.shape[1]
        removed = torch.randint(min(1, count - 1), max(2, count), (len(fixed), 1), generator=generator)
        order = torch.rand(fixed.shape, generator=generator).argsort(1).argsort(1)
        present = (order >= removed) | fixed
        return present, present


class Bins(Domain):
    """A row of a table: a feature is present in rows that have it in the same quartile or category."""

    def __init__(self, table: Table, like: Tensor) -> None:
        self._table, self._like = table, like
        self.names = table.names
        self.width = 0.75 * len(self.names) ** 0.5
        self.details = {"bins": list(table.bins())}

    def sample(self, fixed: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = self._table.independent(len(fixed), generator)
        rows = torch.where(fixed.to(rows.device), self._table.row, rows)
        return self._table.same_bin(rows).cpu(), rows

    def build(self, recipe: Tensor) -> Batch:
        return recipe.to(self._like)

    def spread(self, values: Tensor) -> Tensor:
        return values

    def distances(self, present: Tensor) -> Tensor:
        return (~present).double().sum(1).sqrt()


class Predicates(Domain):
    """A row of a table: a feature is a predicate, and present in rows that keep to it."""

    width = 1.0

    def __init__(self, table: Table, like: Tensor) -> None:
        self._table, self._like = table, like
        self._predicates: tuple[Predicate, ...] = table.predicates()
        self.names = tuple(predicate.words for predicate in self._predicates)
        self.details = {}
        device = table.row.device
        self._feature = torch.tensor([predicate.feature for predicate in self._predicates], device=device)
        self._start = torch.tensor([predicate.start for predicate in self._predicates], device=device)
        self._stop = torch.tensor([predicate.stop for predicate in self._predicates], device=device)
        self._low = table.columns[self._start, self._feature]
        self._high = table.columns[self._stop - 1, self._feature]

    def sample(self, fixed: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = self.recipes(fixed, 1, generator)
        return self._present(rows).cpu(), rows

    def recipes(self, fixed: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Draw training rows, and anew those features of theirs that break what is fixed."""
        table, fixed = self._table, fixed.to(self._table.row.device)
        rows = table.training[
            torch.randint(len(table.training), (len(fixed) * count,), generator=generator).to(fixed.device)
        ]
        held = self._feature[fixed.any(0)].unique()  # the features that something is said of: few
        if not len(held):
            return rows
        start, stop = (edge[:, None, held] for edge in self._ranges(fixed))  # places of each column that are left
        own = rows[:, held].view(len(fixed), count, -1)
        keeps = (own >= table.columns[start, held]) & (own <= table.columns[stop - 1, held])
        chance = torch.rand(own.shape, generator=generator, dtype=torch.float64).to(own.device)
        drawn = table.columns[start + (chance * (stop - start)).long(), held]
        rows[:, held] = torch.where(keeps, own, drawn).flatten(0, 1)
        return rows

    def build(self, recipe: Tensor) -> Batch:
        return recipe.to(self._like)

    def spread(self, values: Tensor) -> Tensor:
        """Return the largest value of each feature's predicates."""
        table = torch.zeros(self._table.row.numel(), dtype=values.dtype)
        return table.scatter_reduce_(0, self._feature.cpu(), values, "amax")

    def _ranges(self, fixed: Tensor) -> tuple[Tensor, Tensor]:
        """Return the places [start, stop) of each column that the fixed predicates leave."""
        fixed = fixed.to(self._table.row.device)
        shape = (len(fixed), self._table.row.numel())
        feature = self._feature.expand(len(fixed), -1)
        start = torch.zeros(shape, dtype=torch.long, device=fixed.device)
        stop = torch.full(shape, len(self._table.columns), dtype=torch.long, device=fixed.device)
        start.scatter_reduce_(1, feature, torch.where(fixed, self._start, 0), "amax")
        stop.scatter_reduce_(1, feature, torch.where(fixed, self._stop, len(self._table.columns)), "amin")
        return start, stop

    def _present(self, rows: Tensor) -> Tensor:
        values = rows.T.contiguous()[self._feature]
        return ((values >= self._low[:, None]) & (values <= self._high[:, None])).T


def groups_of(subject: Subject, segments: Any = "slic", hide: Any = None) -> Groups:
    """Return the one input of a subject in groups of its entries.

    Args:
        subject: with one input.
        segments: for images as `superpixels`; for other tensors a number for each entry (or what expands to them).
        hide: what absent entries become: the `mean` of the input (the default), their group's `own mean` (which
            hides nothing where a group has one colour), a number, or a tensor like the input; for tokens an id, by
            default 0.

    Raises:
        ConfigurationError: one of them does not fit.
    """
    data = subject.inputs.tensor
    if subject.inputs.kind == "images":
        groups = superpixels(data[0], segments)
    elif isinstance(segments, str):
        groups = _default_groups(subject)
    else:
        groups = _given_groups(torch.as_tensor(segments), data)
    hidden = _hidden(data, groups.to(data.device), hide)
    names = tuple(subject.names) if len(subject.names) == int(groups.max()) + 1 and _are_strings(subject.names) else ()
    return Groups(data, groups, hidden, names)


def _default_groups(subject: Subject) -> Tensor:
    shape = subject.inputs.tensor.shape[1:]
    length = shape[-1]
    return torch.arange(length) * min(length, length if len(shape) == 1 else CHUNKS) // length


def _given_groups(groups: Tensor, data: Tensor) -> Tensor:
    try:
        groups.expand(data.shape[1:])
    except RuntimeError as error:
        raise ConfigurationError(
            f"segments have the shape {tuple(groups.shape)}, which does not expand to one input {tuple(data.shape[1:])}"
        ) from error
    if groups.is_floating_point():
        raise ConfigurationError("segments are no integers; expected the number of a group for each entry")
    numbers: Tensor = groups.unique(return_inverse=True)[1]
    return numbers


def _hidden(data: Tensor, groups: Tensor, hide: Any) -> Tensor:
    is_floating = data.is_floating_point()
    if hide is None:
        hide = "mean" if is_floating and data.dim() > 2 else 0
    if isinstance(hide, str):
        if hide not in ("mean", "own mean") or not is_floating:
            raise ConfigurationError(
                f"hide is {hide!r}; expected mean or own mean (of numbers), a number, or a tensor like the input"
            )
        return _group_means(data, groups if hide == "own mean" else torch.zeros_like(groups))
    try:
        return torch.as_tensor(hide, dtype=data.dtype, device=data.device).expand_as(data)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConfigurationError(f"hide does not expand to one input {tuple(data.shape[1:])}: {error}") from error


def _group_means(data: Tensor, groups: Tensor) -> Tensor:
    """Return each entry's mean over its group; channels (dimensions that groups do not tell apart) keep their own."""
    places = groups.dim()
    flat = data.reshape(-1, groups.numel()) if data.shape[-places:] == groups.shape else data.reshape(1, -1)
    index = groups.flatten() if flat.shape[1] == groups.numel() else groups.expand(data.shape[1:]).flatten()
    count = torch.bincount(index).to(flat.dtype).clamp(min=1)
    sums = torch.zeros(len(flat), len(count), dtype=flat.dtype, device=flat.device).index_add_(1, index, flat)
    return (sums / count)[:, index].reshape(data.shape)


def stacked(values: Sequence[Tensor]) -> Tensor:
    """Return values of inputs one below the other; shorter texts are filled up with zeros."""
    cpu = [value.cpu() for value in values]
    is_even = len({value.shape for value in cpu}) == 1
    return torch.stack(cpu) if is_even else torch.nn.utils.rnn.pad_sequence(cpu, batch_first=True)


def kind_of(subject: Subject) -> str:
    """Return how values of features are meant: `map`, `features` or `tokens`."""
    return {"texts": "tokens", "tokens": "tokens", "rows": "features"}.get(subject.inputs.kind, "map")


def _are_strings(names: tuple[Any, ...]) -> bool:
    return all(isinstance(name, str) for name in names)
