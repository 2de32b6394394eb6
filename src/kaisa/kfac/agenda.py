"""What is due at which step, and which layers wait to be decomposed.

    factors     every ``factor_update_steps`` after the last time
    inverses    every ``inv_update_steps`` after the last time: then all layers wait, the costliest first

Spread over the steps until the next time, an equal part of those that wait is decomposed in each; a layer that has no
decomposition yet never waits.
"""

from collections.abc import Callable, Collection, Sequence

from kaisa.schedules import Schedule


class Agenda:
    """Steps and intervals of one run; all ranks keep the same.

    Args:
        factor_interval, inverse_interval: in steps.
        order: the layers, the costliest first.
        spread: whether decompositions are spread over steps.
    """

    def __init__(
        self, factor_interval: Schedule, inverse_interval: Schedule, order: Sequence[str], *, spread: bool
    ) -> None:
        self.step = 0
        self.last_factors: int | None = None
        self.last_inverses: int | None = None
        self.queue: list[str] = []
        self._factor_interval = factor_interval
        self._inverse_interval = inverse_interval
        self._order = tuple(order)
        self._spread = spread

    @property
    def factors_are_due(self) -> bool:
        """Whether this step updates the factors."""
        return self._is_due(self.last_factors, self._factor_interval)

    @property
    def inverses_are_due(self) -> bool:
        """Whether this step begins to refresh the decompositions."""
        return self._is_due(self.last_inverses, self._inverse_interval)

    def _is_due(self, last: int | None, interval: Schedule) -> bool:
        return last is None or self.step - last >= interval.resolve_steps(self.step)

    def line_up(self) -> None:
        """Lets all layers wait, if a refresh begins at this step."""
        if self.last_factors is not None and self.inverses_are_due:
            self.queue = list(self._order)
            self.last_inverses = self.step

    def work_off(self, ready: Collection[str], refresh: Callable[[list[str]], Collection[str]]) -> None:
        """Refreshes the layers whose turn it is.

        Args:
            ready: the layers that have a decomposition.
            refresh: decomposes some layers and returns those that have one now; a layer without a finite gradient so
                far has no factor to decompose, and is asked again next time.
        """
        waiting = [name for name in self.queue if name in ready]
        count = self._share_of(waiting) if self._spread else len(waiting)
        unseen = [name for name in self.queue if name not in ready]
        made = refresh([*unseen, *waiting[:count]])
        self.queue = [name for name in unseen if name not in made] + waiting[count:]

    def _share_of(self, waiting: Sequence[str]) -> int:
        """Spreads what waits evenly over the steps that are left until the next refresh."""
        assert self.last_inverses is not None
        left = self._inverse_interval.resolve_steps(self.step) - (self.step - self.last_inverses)
        return -(-len(waiting) // max(1, left))
