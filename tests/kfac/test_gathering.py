"""The states of all ranks come together on the first, and each rank gets its own back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kaisa.errors import StateError
from kaisa.kfac.collectives import Alone
from kaisa.kfac.gathering import gathered, own_part
from tests.support.world import Simulated, run

CPU = torch.device("cpu")


def state_of(rank: int) -> dict[str, Any]:
    """Return a state whose length depends on the rank."""
    return {"rank": rank, "weights": torch.arange(10.0**rank), "kept": {"by": [None, "name"]}}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_first_rank_gets_all_states_in_order_and_the_others_nothing(world: int) -> None:
    first, *others = run(world, lambda ranks: gathered(state_of(ranks.rank), ranks, CPU))
    assert others == [[]] * (world - 1)
    assert [state["rank"] for state in first] == list(range(world))
    for rank, state in enumerate(first):
        assert torch.equal(state["weights"], state_of(rank)["weights"])
        assert state["kept"] == {"by": [None, "name"]}


def test_each_rank_gets_its_own_state_back() -> None:
    states = [state_of(rank) for rank in range(3)]
    assert run(3, lambda ranks: own_part(states, ranks)["rank"]) == [0, 1, 2]


def test_states_of_another_number_of_ranks_are_refused_on_every_rank() -> None:
    def outcome(ranks: Simulated | Alone) -> None:
        with pytest.raises(StateError, match=f"of 3 ranks, but there are {ranks.world_size}; start as many"):
            own_part([{}] * 3, ranks)

    outcome(Alone())
    run(2, outcome)
