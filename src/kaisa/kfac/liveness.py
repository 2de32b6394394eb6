"""Which ranks live: a communication library says that a connection broke, and seldom whose.

Every rank writes a growing number and where it is to the store that the ranks met at, twice a second. Whoever meets an
error looks which numbers stand still.
"""

import atexit
import json
import threading
import time
from collections.abc import Mapping
from typing import Any, Protocol

_INTERVAL = 0.5
_GRACE = 2.5  # seconds without a beat after which a rank counts as absent


class Store(Protocol):
    """What is asked of a ``torch.distributed.Store``."""

    def set(self, key: str, value: str) -> None:
        """Writes a value."""

    def get(self, key: str) -> bytes:
        """Reads a value that is there."""

    def check(self, keys: list[str]) -> bool:
        """Says whether all keys are there."""


class Heartbeat:
    """Tells the other ranks that this one lives, from a thread, until the process ends.

    Args:
        store: seen by all ranks.
        prefix: of the keys.
        rank, world_size: which of how many.

    Attributes:
        place: what this rank does, for the errors of the others.
    """

    def __init__(self, store: Store, prefix: str, rank: int, world_size: int) -> None:
        self.place = "start"
        self._store, self._prefix = store, prefix
        self._rank, self._world_size = rank, world_size
        self._count = 0
        self._stopped = threading.Event()
        self._beat()
        self._thread = threading.Thread(target=self._run, name="kaisa-heartbeat", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def close(self) -> None:
        """Tells the others that this rank has ended; the thread is gone on return."""
        if not self._stopped.is_set():
            self._stopped.set()
            self._thread.join(timeout=_GRACE)
            atexit.unregister(self.close)

    def roll_call(self) -> str:
        """Returns in words which ranks are absent and where the others are; takes as long as a beat may be late."""
        before = self._answer()
        end = time.monotonic() + _GRACE
        while time.monotonic() < end and not self._stopped.is_set():
            time.sleep(_INTERVAL / 2)
        after = self._answer() if before else before
        if not after:
            return "the store that the ranks met at does not answer: the process or the host that keeps it is gone"
        others = [rank for rank in range(self._world_size) if rank != self._rank]
        ended = [rank for rank in others if rank in after and after[rank]["ended"]]
        silent = [rank for rank in others if rank not in after or after[rank] == before.get(rank)]
        dead = [rank for rank in silent if rank not in ended]
        alive = [rank for rank in others if rank not in silent and rank not in ended]
        parts = [f"rank {rank} is dead or unreachable, last seen at {_place(after, rank)}" for rank in dead]
        parts += [f"rank {rank} has ended, last seen at {_place(after, rank)}" for rank in ended]
        parts += [f"rank {rank} lives and is at {_place(after, rank)}" for rank in alive]
        return f"{'; '.join(parts)}; rank {self._rank} is at {self.place}"

    def _run(self) -> None:
        while not self._stopped.wait(_INTERVAL):
            if not self._beat():
                return
        self._beat(has_ended=True)

    def _beat(self, has_ended: bool = False) -> bool:
        self._count += 1
        row = {"count": self._count, "place": self.place, "ended": has_ended}
        try:
            self._store.set(self._key(self._rank), json.dumps(row))
        except RuntimeError:  # whoever kept the store has ended; there is nobody left to tell
            return False
        return True

    def _answer(self) -> Mapping[int, dict[str, Any]]:
        """Reads in a thread, because a store on a host that is cut off would be waited for without end."""
        rows: dict[int, dict[str, Any]] = {}
        reader = threading.Thread(target=lambda: rows.update(self._read()), daemon=True)
        reader.start()
        reader.join(_GRACE)
        return {} if reader.is_alive() else rows

    def _read(self) -> Mapping[int, dict[str, Any]]:
        try:
            keys = {rank: self._key(rank) for rank in range(self._world_size)}
            return {rank: json.loads(self._store.get(key)) for rank, key in keys.items() if self._store.check([key])}
        except RuntimeError:
            return {}

    def _key(self, rank: int) -> str:
        return f"{self._prefix}/beat/{rank}"


def _place(rows: Mapping[int, dict[str, Any]], rank: int) -> str:
    return str(rows[rank]["place"]) if rank in rows else "no step yet"
