"""Rows of tables in words: quartiles of numbers, values of categories, and rows that keep to them.

Every column is held sorted, with the explained row among its values, so that the values that keep to a predicate are
a range of places [start, stop), and drawing one is drawing a place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kaisa.errors import ConfigurationError


@dataclass(frozen=True)
class Predicate:
    """What can be said of one feature of a row: it is the `words`, and holds for places [start, stop) of its column."""

    feature: int
    words: str
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Table:
    """Training rows about one explained row.

    Attributes:
        row: the explained row, (features,).
        columns: each feature sorted, (rows + 1, features), with the explained row among them.
        training: the training rows.
        edges: quartiles of each feature; None where it is a category.
        names: names of the features.
    """

    row: Tensor
    columns: Tensor
    training: Tensor
    edges: tuple[Tensor | None, ...]
    names: tuple[str, ...]

    @classmethod
    def about(cls, row: Tensor, training: Any, categorical: Any, names: tuple[str, ...]) -> Table:
        """Make a table of training rows.

        Raises:
            ConfigurationError: the training rows or the categories do not fit the row.
        """
        rows = torch.as_tensor(training).detach().to(row.device, torch.float64)
        count = row.numel()
        if rows.dim() != 2 or rows.shape[1] != count or not len(rows):
            raise ConfigurationError(
                f"training has the shape {tuple(rows.shape)}; expected (rows, {count}), features as in the inputs"
            )
        categories = {int(index) for index in categorical}
        if not categories <= set(range(count)):
            raise ConfigurationError(f"categorical is {sorted(categories)}; expected places of the {count} features")
        by_feature = rows.T.cpu().contiguous().numpy()  # NumPy sorts ten times as fast as PyTorch
        quartiles = np.quantile(by_feature, [0.25, 0.5, 0.75], axis=1).T
        edges = tuple(
            None if feature in categories else torch.from_numpy(np.unique(quartiles[feature])).to(row.device)
            for feature in range(count)
        )
        with_row = np.sort(np.concatenate([by_feature, row.double().cpu().numpy()[:, None]], 1), axis=1)
        columns = torch.from_numpy(with_row.T.copy()).to(row.device)
        return cls(row.double(), columns, rows, edges, names or tuple(f"x{index}" for index in range(count)))

    def independent(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw rows whose features come from training rows independently."""
        places = torch.randint(len(self.training), (count, self.row.numel()), generator=generator)
        return self.training.gather(0, places.to(self.training.device))

    def same_bin(self, rows: Tensor) -> Tensor:
        """Tell which features of rows are in the quartile, or the category, of the explained row."""
        same = torch.empty(rows.shape, dtype=torch.bool, device=rows.device)
        for feature, edges in enumerate(self.edges):
            values, own = rows[:, feature].contiguous(), self.row[feature]
            if edges is None:
                same[:, feature] = values == own
            else:
                same[:, feature] = torch.searchsorted(edges, values) == torch.searchsorted(edges, own)
        return same

    def bins(self) -> tuple[str, ...]:
        """Return what is in words the quartile or category of each feature of the explained row."""
        return tuple(self._bin(feature) for feature in range(self.row.numel()))

    def predicates(self) -> tuple[Predicate, ...]:
        """Return everything that can be said of the explained row by quartiles and categories."""
        found = []
        for feature, edges in enumerate(self.edges):
            own, column, name = self.row[feature], self.columns[:, feature].contiguous(), self.names[feature]
            if edges is None:
                start, stop = (int(torch.searchsorted(column, own, right=right)) for right in (False, True))
                found.append(Predicate(feature, f"{name} = {float(own):.4g}", start, stop))
                continue
            for edge in edges:
                place = int(torch.searchsorted(column, edge, right=True))  # the first value above the edge
                if own <= edge:
                    found.append(Predicate(feature, f"{name} ≤ {float(edge):.4g}", 0, place))
                else:
                    found.append(Predicate(feature, f"{name} > {float(edge):.4g}", place, len(column)))
        return tuple(found)

    def _bin(self, feature: int) -> str:
        name, own, edges = self.names[feature], float(self.row[feature]), self.edges[feature]
        if edges is None:
            return f"{name} = {own:.4g}"
        below = [float(edge) for edge in edges if float(edge) < own]
        above = [float(edge) for edge in edges if float(edge) >= own]
        left = f"{below[-1]:.4g} < " if below else ""
        right = f" ≤ {above[0]:.4g}" if above else ""
        return f"{left}{name}{right}"
