"""The only file that imports torch.distributed.

K-FAC communicates in two ways, both among a tuple of ranks:

    exchange   every rank sends every other its own chunk; a reduce-scatter is an exchange followed by a local sum, in
               full precision and in the order of ranks, so that all worlds add in the same order
    total      a small tensor is summed; every rank gets the sum

Both return a function that waits for the result, so that work can go on meanwhile. A communicator takes ranks, never a
group handle, and counts what it sends by kind.
"""

from __future__ import annotations

import datetime
import logging
import os
import re
import signal
import sys
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from kaisa.errors import CollectiveError, ConfigurationError
from kaisa.kfac.liveness import Heartbeat
from kaisa.kfac.routes import even_slices, overlaps

Wait = Callable[[], list[Tensor]]


class Collectives(ABC):
    """What a rank can ask of the others.

    Attributes:
        rank, world_size: which of how many.
        ranks_per_node: how many consecutive ranks share a machine; None where nobody says.
        bytes_sent: bytes that left this rank, by kind.
        calls: collectives that this rank took part in, by kind.
    """

    rank: int = 0
    world_size: int = 1
    ranks_per_node: int | None = None

    def __init__(self) -> None:
        self.bytes_sent: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def prepare(self, groups: Iterable[tuple[int, ...]]) -> None:  # noqa: B027 - most need no preparation
        """Makes ready for sets of ranks that will communicate; all ranks call it with the same."""

    def exchange(self, kind: str, ranks: tuple[int, ...], chunks: Sequence[Tensor], sizes: Sequence[int]) -> Wait:
        """Sends ``chunks[i]`` to ``ranks[i]``; the wait returns what came from each of them, its own chunk included.

        Args:
            kind: what is sent, for the account and for error messages.
            ranks: who takes part, sorted; every one of them calls with the same.
            chunks: flat tensors of one type.
            sizes: how many numbers come from each rank, known to all beforehand.
        """
        own = ranks.index(self.rank)
        if len(ranks) == 1:
            return lambda: [chunks[0]]
        self.bytes_sent[kind] += sum(chunk.nbytes for index, chunk in enumerate(chunks) if index != own)
        self.calls[kind] += 1
        return self._exchange(kind, ranks, chunks, sizes)

    def gather(self, kind: str, ranks: tuple[int, ...], message: Tensor, sizes: Sequence[int], *, sliced: bool) -> Wait:
        """Gives the message of every rank to all of them; the wait returns them in the order of ranks.

        Args:
            kind, ranks: as for ``exchange``.
            message: this rank's, flat.
            sizes: how many numbers each rank has.
            sliced: goes in two steps, through even slices, where one rank has far more than the others.
        """
        own = ranks.index(self.rank)
        if not sliced or len(ranks) == 1:
            return self.exchange(kind, ranks, [message] * len(ranks), sizes)
        bounds = even_slices(sum(sizes), len(ranks))
        starts = [sum(sizes[:index]) for index in range(len(ranks))]
        ranges = [overlaps(start, start + size, bounds) for start, size in zip(starts, sizes, strict=True)]
        chunks = [message[low:high] for low, high in ranges[own]]
        first = self.exchange(kind, ranks, chunks, [parts[own][1] - parts[own][0] for parts in ranges])

        def wait() -> list[Tensor]:
            part = torch.cat(first())
            second = self.exchange(kind, ranks, [part] * len(ranks), [high - low for low, high in bounds])
            return list(torch.cat(second()).split(list(sizes)))

        return wait

    def total(self, kind: str, ranks: tuple[int, ...], tensor: Tensor) -> Tensor:
        """Returns the sum of a tensor over ranks."""
        if len(ranks) == 1:
            return tensor
        self.bytes_sent[kind] += tensor.nbytes
        self.calls[kind] += 1
        return self._total(kind, ranks, tensor)

    def write_shards(self, directory: Path, tensors: Mapping[str, Tensor]) -> None:
        """Writes tensors by name to a directory; what several ranks name is written by one of them.

        Raises:
            OSError: on every rank, with the reasons of those that could not write.
        """
        _write_shards(directory, tensors, no_dist=True)

    def read_shards(self, directory: Path, is_wanted: Callable[[str], bool]) -> dict[str, Tensor]:
        """Reads tensors that ranks of any world wrote, to the CPU; nothing is unpickled.

        Args:
            directory: what ``write_shards`` filled.
            is_wanted: says by name which this rank needs; each rank reads for itself.
        """
        return _read_shards(directory, is_wanted)

    @abstractmethod
    def _exchange(self, kind: str, ranks: tuple[int, ...], chunks: Sequence[Tensor], sizes: Sequence[int]) -> Wait: ...

    @abstractmethod
    def _total(self, kind: str, ranks: tuple[int, ...], tensor: Tensor) -> Tensor: ...


class Alone(Collectives):
    """One process: there is nobody to send to."""

    def _exchange(self, kind: str, ranks: tuple[int, ...], chunks: Sequence[Tensor], sizes: Sequence[int]) -> Wait:
        raise AssertionError("one rank has nobody to exchange with")

    def _total(self, kind: str, ranks: tuple[int, ...], tensor: Tensor) -> Tensor:
        raise AssertionError("one rank has nobody to add to")


class Processes(Collectives):
    """``torch.distributed``: one group for each set of ranks, made once, by all ranks, in sorted order.

    Args:
        groups: all sets of ranks that will ever communicate.
        timeout: how long to wait for another rank; None for torch's own.
    """

    def __init__(self, groups: Iterable[tuple[int, ...]], timeout: datetime.timedelta | None = None) -> None:
        super().__init__()
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.ranks_per_node = _ranks_per_node(self.world_size)
        self._timeout = timeout
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
        self._heartbeat = _heartbeat()
        self.prepare(groups)

    @classmethod
    def of_world(cls) -> Processes:
        """Returns a communicator of all ranks with the timeout that the process group was made with."""
        return cls([tuple(range(dist.get_world_size()))], _timeout_of_world())

    def prepare(self, groups: Iterable[tuple[int, ...]]) -> None:
        for ranks in sorted(set(groups) - set(self._groups)):
            if len(ranks) > 1:
                self._groups[ranks] = dist.new_group(list(ranks), timeout=self._timeout)

    def _exchange(self, kind: str, ranks: tuple[int, ...], chunks: Sequence[Tensor], sizes: Sequence[int]) -> Wait:
        sent = torch.cat(list(chunks))
        received = sent.new_empty(sum(sizes))
        work = self._run(
            kind,
            ranks,
            lambda group: dist.all_to_all_single(
                received, sent, list(sizes), [chunk.numel() for chunk in chunks], group=group, async_op=True
            ),
        )

        def wait() -> list[Tensor]:
            self._run(kind, ranks, lambda group: work.wait())
            return list(received.split(list(sizes)))

        return wait

    def _total(self, kind: str, ranks: tuple[int, ...], tensor: Tensor) -> Tensor:
        result = tensor.clone()
        self._run(kind, ranks, lambda group: dist.all_reduce(result, group=group))
        return result

    def write_shards(self, directory: Path, tensors: Mapping[str, Tensor]) -> None:
        everybody = tuple(range(self.world_size))
        self._run("checkpoint", everybody, lambda group: _write_shards(directory, tensors, process_group=group))

    def _run(self, kind: str, ranks: tuple[int, ...], operation: Callable[[dist.ProcessGroup], Any]) -> Any:
        self._heartbeat.place = f"exchange {sum(self.calls.values())} ({kind})"
        try:
            return operation(self._groups[ranks])
        except RuntimeError as error:
            raise _named(error, f"rank {self.rank} could not exchange {kind} with ranks {ranks}") from error


@contextmanager
def absent_ranks_named() -> Iterator[None]:
    """Turns an error of ``torch.distributed`` inside the block, of a wrapper too, into one that names who is absent.

    Raises:
        CollectiveError: in its place.
    """
    if world()[1] > 1:
        _heartbeat()
    try:
        yield
    except CollectiveError:
        raise
    except RuntimeError as error:
        if world()[1] == 1 or not (isinstance(error, dist.DistError) or _OF_A_BACKEND.search(str(error))):
            raise
        raise _named(error, f"rank {dist.get_rank()} lost another rank") from error


_OF_A_BACKEND = re.compile("gloo|nccl|connection|timed out|peer", re.IGNORECASE)


def _named(error: BaseException, what: str) -> CollectiveError:
    reason = str(error).split("\n", 1)[0]
    heartbeat = _heartbeat()
    found = heartbeat.roll_call()
    heartbeat.place += ", where it lost another rank"
    return CollectiveError(f"{what}: {reason}; {found}")


def _heartbeat() -> Heartbeat:
    """Returns what tells the others that this process lives, one for each process group of the world."""
    group = dist.group.WORLD
    assert group is not None
    if group not in _heartbeats:
        store = dist.distributed_c10d._get_default_store()
        # A connection of its own: the process group's may wait for a key, and a beat must not wait behind it.
        store = store.clone() if hasattr(store, "clone") else store
        prefix = f"kaisa/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"  # a store may outlive a restart
        _heartbeats[group] = Heartbeat(store, prefix, dist.get_rank(), dist.get_world_size())
    return _heartbeats[group]


_heartbeats: WeakKeyDictionary[dist.ProcessGroup, Heartbeat] = WeakKeyDictionary()


def _timeout_of_world() -> datetime.timedelta | None:
    """Returns the timeout that ``init_process_group`` was given, which ``new_group`` would forget."""
    group = dist.group.WORLD
    devices = [] if group is None else group._device_types
    options = getattr(group._get_backend(devices[0]), "options", None) if group is not None and devices else None
    timeout: datetime.timedelta | None = getattr(options, "_timeout", None)
    return timeout


def _write_shards(directory: Path, tensors: Mapping[str, Tensor], **where: Any) -> None:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_saver import save

    try:
        with _for_one_process_too():
            save(dict(tensors), storage_writer=_storage("Writer", directory, save_distributed=True), **where)
    except CheckpointException as error:
        reasons = [f"rank {rank}: {failure[0]!r}" for rank, failure in sorted(error.failures.items())]
        raise OSError("; ".join(reasons)) from error


def _read_shards(directory: Path, is_wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = _storage("Reader", directory)
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and is_wanted(name)
    }
    if tensors:
        try:
            with _for_one_process_too():
                load(tensors, storage_reader=reader, no_dist=True)
        except CheckpointException as error:
            raise OSError(str(error)) from error
    return tensors


@contextmanager
def _for_one_process_too() -> Iterator[None]:
    """Silences the remark that torch.distributed is not running, which is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def _storage(kind: str, directory: Path, **options: Any) -> Any:
    """Returns the storage that keeps tensors as safetensors; torch's other one reads and writes pickles."""
    from torch.distributed import checkpoint as dcp

    storage = getattr(dcp, f"HuggingFaceStorage{kind}", None)
    if storage is None:
        raise ConfigurationError(
            f"torch {torch.__version__} writes no checkpoints as safetensors; install 2.9 or later"
        )
    return storage(path=str(directory), **options)


def world() -> tuple[int, int]:
    """Returns (rank, world size) of the running process group, (0, 1) without one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def launched_world() -> tuple[int, int] | None:
    """Returns the (rank, world size) that ``torchrun`` gave this process; None for a process of its own."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def _ranks_per_node(world_size: int) -> int | None:
    """Returns how many ranks ``torchrun`` started on each machine; None without it, or where machines differ."""
    count = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(count) if count.isdigit() and int(count) and world_size % int(count) == 0 else None


def join_world(device: torch.device, timeout: datetime.timedelta | None = None) -> Collectives:
    """Meets the other processes that ``torchrun`` started, over NCCL on GPUs and gloo otherwise.

    Args:
        device: what the ranks compute on; of several GPUs each local rank takes its own.
        timeout: how long a rank waits for another; None for torch's own.

    Returns:
        How to reach the others; ``Alone`` for a process that nobody launched, or a world of one.
    """
    launched = launched_world()
    if launched is None or launched[1] == 1:
        return Alone()
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    rank, world_size = launched
    store = _store_of_this_attempt()
    among = {} if store is None else {"store": store, "rank": rank, "world_size": world_size}
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout, **among)
    return Processes.of_world()


def _store_of_this_attempt() -> Any:
    """Returns the store of torchrun's agent under a prefix of its own for each restart; None for torch's choice.

    The agent of one node keeps its store over restarts, and torch 2.13 reads there the addresses of dead processes.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    stores: Any = dist  # which mypy does not find there
    return stores.PrefixStore(f"kaisa/attempt_{attempt}", stores.TCPStore(address, port, is_master=False))


def leave_world() -> None:
    """Takes leave of the other processes; does nothing in a process that has not joined any."""
    if world()[1] > 1:
        dist.destroy_process_group()


def start_processes(count: int, arguments: Sequence[str]) -> int:
    """Runs ``python -m kaisa`` with some arguments as ranks on this machine, as ``torchrun`` would.

    Args:
        count: how many processes.
        arguments: of the command, the same for all.

    Returns:
        The exit status of the first that failed, 0 if none did, 128 + the number of a signal to this process.

    Raises:
        CollectiveError: a process was ended by a signal.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # a rank says itself why it failed
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=str(os.getpid()),
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "kaisa", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            raise CollectiveError(f"rank {rank} was ended by {name}, and the others with it") from error
        return failure.exitcode
    except SignalException as error:
        return 128 + signal.Signals(error.sigval).value
    return 0
