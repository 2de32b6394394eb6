"""States of all ranks in one file that the first writes, where a framework or a loop keeps a single file.

    every rank: state ─► bytes ─► the first: [state of rank 0, of rank 1, …] ─► the file ─► every rank: its own

Nothing is executed on reading. The first rank holds all states at once, and a file goes on with as many ranks as it was
written by; ``kaisa.kfac.checkpoint`` knows neither limit.
"""

import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kaisa.errors import StateError
from kaisa.kfac.collectives import Collectives

State = dict[str, Any]


def gathered(state: State, ranks: Collectives, device: torch.device) -> list[State]:
    """Returns the states of all ranks on the first, in their order, and nothing on the others; all ranks call it.

    Args:
        state: of this rank: tensors, numbers, text, lists and dicts of them.
        ranks: reaches the others.
        device: where messages are sent from.
    """
    if ranks.world_size == 1:
        return [state]
    everybody = tuple(range(ranks.world_size))
    own = _to_bytes(state).to(device)
    size = torch.zeros(ranks.world_size, dtype=torch.int64, device=device)
    size[ranks.rank] = own.numel()
    sizes = ranks.total("checkpoint", everybody, size).tolist()
    received = sizes if ranks.rank == 0 else [0] * len(sizes)
    parts = ranks.exchange("checkpoint", everybody, [own, *[own[:0]] * (ranks.world_size - 1)], received)()
    return [_from_bytes(part) for part in parts if part.numel()]


def own_part(states: Sequence[State], ranks: Collectives) -> State:
    """Returns what this rank goes on from.

    Raises:
        StateError: the states are those of another number of ranks.
    """
    if len(states) != ranks.world_size:
        raise StateError(
            f"the checkpoint is of {len(states)} ranks, but there are {ranks.world_size}; "
            "start as many as the run began with"
        )
    return states[ranks.rank]


def _to_bytes(state: State) -> Tensor:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def _from_bytes(value: Tensor) -> State:
    state: State = torch.load(io.BytesIO(value.cpu().numpy().tobytes()), weights_only=True, map_location="cpu")
    return state
