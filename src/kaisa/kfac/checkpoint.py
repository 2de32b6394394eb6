"""Checkpoints: every rank writes its own shard, and any number of ranks goes on from them.

    directory/
      step_00000200/        complete; the last two stay
        shard-00001-model-00001-of-00001.safetensors    what rank 0 wrote
        shard-00002-model-00001-of-00001.safetensors    what rank 1 wrote, and so on
        index.json          numbers and names; size and SHA-256 of every shard; written last
      step_00000300.tmp/    was never finished

Who writes what: a factor its first owner, a decomposition its first gradient worker; parameters and the optimizer's
state, equal on all ranks, are divided among them by ``torch.distributed.checkpoint``; buffers (the statistics of a
batch norm), which differ from rank to rank, and ``extra`` are rank 0's. No rank gathers a tensor of another.

A checkpoint appears under its name at once, by one rename after every file is on the disk, so that a process may be
killed at any moment. The ``.metadata`` file of ``torch.distributed.checkpoint`` is a pickle, which would run a
stranger's code; its safetensors writer and reader, used here, make none and read none. All ranks must see the same
directory.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kaisa.errors import CheckpointError, CollectiveError, StateError
from kaisa.kfac import shards
from kaisa.kfac.coverage import unwrapped
from kaisa.kfac.preconditioner import KFACPreconditioner

_FORMAT = "kaisa.checkpoint/1"
_INDEX = "index.json"
_SHARD = re.compile(r"[\w-]+\.safetensors")
_STEP = re.compile(r"step_(\d{8,})(\.old)?")
_NUMBERS = (
    "format", "steps", "last_factors", "last_inverses", "queue", "ready", "begun", "solver", "scaling", "shapes",
    "damping",
)  # fmt: skip
_FAULTS = {1: "is missing", 2: "has the wrong length", 3: "was altered: its digest is another"}


def save(
    directory: str | Path,
    kfac: KFACPreconditioner,
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    extra: Mapping[str, Any] | None = None,
    *,
    keep: int = 2,
) -> Path:
    """Writes a checkpoint of the step that K-FAC is at; all ranks call it, between two steps.

    Args:
        directory: where checkpoints lie; made if it is not there.
        kfac: its state.
        model: its parameters and buffers, with or without the wrapper of DistributedDataParallel.
        optimizer: its state.
        extra: whatever else a run needs: numbers, strings, tensors, in lists and dicts; rank 0's is written.
        keep: how many complete checkpoints stay, this one included.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: on every rank, when one could not write; earlier checkpoints are as they were.
    """
    root = Path(directory)
    final = root / f"step_{kfac.steps:08d}"
    unfinished = root / f"{final.name}.tmp"
    team = _Team(kfac, f"writing {final}")
    is_first = team.rank == 0
    kfac.reduce_statistics()  # what waits on single ranks would be lost to a world of another size
    with team:
        if is_first:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
    with team:
        trees, tensors = _contents(kfac, model, optimizer, extra, is_first)
    with team:
        team.collectives.write_shards(unfinished, tensors)
    with team:
        own = _described(unfinished, team.rank)
    shards = team.everybody(own)
    with team:
        if is_first:
            files = {_shard_name(rank): [row[0], _hex(row[1:])] for rank, row in enumerate(shards) if row[0]}
            _publish(unfinished, final, {"format": _FORMAT, "world_size": team.world_size, "files": files, **trees})
            _prune(root, kfac.steps, keep)
    return final


def load(
    path: str | Path,
    kfac: KFACPreconditioner,
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> Any:
    """Goes on from a checkpoint, on as many ranks and with any placement; all ranks call it.

    Every factor and decomposition is what it was, to the bit. A rank that the writing world did not have begins its
    random numbers anew.

    Args:
        path: a checkpoint, or a directory of them, of which the newest complete one is taken.
        kfac: of the same layers and solver.
        model: takes the parameters and buffers.
        optimizer: takes its state.

    Returns:
        ``extra``, as it was given to ``save``.

    Raises:
        CheckpointError: on every rank, when a shard is missing, short or altered, or when the checkpoint is of another
            model, optimizer or solver; it names what, and nothing has changed.
    """
    team = _Team(kfac, f"reading {path}")
    chosen = _chosen(Path(path), team)
    team.task = f"reading {chosen}"
    with team:
        index = _read_index(chosen)
    _verify(chosen, index["files"], team)
    with team:
        tensors = team.collectives.read_shards(chosen, _wanted(kfac))
        state = shards.assembled({**kfac.state_dict(), **index["kfac"]}, tensors, kfac.placement, kfac.collectives.rank)
        model_state = _matching(chosen, "model", index, tensors) if model is not None else None
        optimizer_state = _matching(chosen, "optimizer", index, tensors) if optimizer is not None else None
        lines = _differences(model, model_state, optimizer, optimizer_state)
        if lines:
            raise CheckpointError(f"{chosen} does not belong to this run:\n  " + "\n  ".join(lines))
        kfac.check_state_dict(state)
    kfac.load_state_dict(state)
    if model is not None and model_state is not None:
        unwrapped(model).load_state_dict(model_state)
    if optimizer is not None and optimizer_state is not None:
        optimizer.load_state_dict(optimizer_state)
    return _unpacked(index["extra"], tensors)


def latest(directory: str | Path) -> Path | None:
    """Returns the newest complete checkpoint of a directory, None without one; digests are checked on loading."""
    found = _complete(Path(directory))
    return found[-1] if found else None


class _Team:
    """All ranks at one task: a block of it that fails on one rank fails on all of them."""

    def __init__(self, kfac: KFACPreconditioner, task: str) -> None:
        self.collectives = kfac.collectives
        self.rank, self.world_size = self.collectives.rank, self.collectives.world_size
        self.task = task
        self._device = kfac.device

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, CollectiveError) or (error is not None and not isinstance(error, Exception)):
            return  # nobody is there to be told
        failed = [rank for rank, row in enumerate(self.everybody([int(error is not None)])) if row[0]]
        if isinstance(error, CheckpointError):
            return
        if isinstance(error, StateError):
            raise CheckpointError(f"{self.task}: {error}") from error
        if error is not None:
            raise CheckpointError(f"{self.task}: rank {self.rank}: {type(error).__name__}: {error}") from error
        if failed:
            raise CheckpointError(f"{self.task}: ranks {failed} failed, look at their own errors")

    def everybody(self, numbers: Sequence[int]) -> list[list[int]]:
        """Returns the numbers of all ranks, each of whom gives equally many."""
        table = torch.zeros(self.world_size, len(numbers), dtype=torch.int64)
        table[self.rank] = torch.tensor(numbers, dtype=torch.int64)
        total = self.collectives.total("checkpoint", tuple(range(self.world_size)), table.to(self._device))
        return [[int(number) for number in row] for row in total.cpu().numpy()]


# ------------------------------------------------------------------------------------------------------------- writing


def _contents(
    kfac: KFACPreconditioner,
    model: nn.Module | None,
    optimizer: torch.optim.Optimizer | None,
    extra: Mapping[str, Any] | None,
    is_first: bool,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns what the index says and the tensors that this rank offers to write."""
    state = kfac.state_dict()
    tensors = shards.offered(state, kfac.placement, kfac.collectives.rank)
    model_state = None if model is None else unwrapped(model).state_dict()
    buffers: dict[str, Tensor] = {}
    trees = {
        "kfac": {name: state[name] for name in _NUMBERS},
        "model": _packed(model_state, "model", buffers),
        "optimizer": _packed(None if optimizer is None else optimizer.state_dict(), "optimizer", tensors),
        "extra": _packed(None if extra is None else dict(extra), "extra", buffers),
    }
    named = [] if model is None else unwrapped(model).named_parameters(remove_duplicate=False)
    parameters = {f"model/{name}" for name, _ in named}
    tensors.update({key: tensor for key, tensor in buffers.items() if is_first or key in parameters})
    return trees, _apart(tensors)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns tensors of which none is another's memory, as tied weights are: safetensors refuses those."""
    seen: set[int] = set()
    result: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        result[key] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return result


def _packed(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Returns a value as JSON and moves its tensors out.

    Raises:
        StateError: it holds something else than numbers, strings, tensors, lists, tuples and dicts of them.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        if value.numel():
            tensors[path] = value.detach().reshape(-1) if value.ndim == 0 else value.detach()
        return {"tensor": path, "shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_packed(part, f"{path}/{index}", tensors) for index, part in enumerate(value)]}
    if isinstance(value, Mapping) and all(isinstance(key, str | int) for key in value):
        return {"dict": [[key, _packed(part, f"{path}/{key}", tensors)] for key, part in value.items()]}
    raise StateError(
        f"{path} is a {type(value).__name__}; a checkpoint holds numbers, strings, tensors, lists, tuples and dicts"
    )


def _unpacked(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Returns what ``_packed`` was given."""
    if not isinstance(tree, dict):
        return tree
    if "tensor" in tree:
        dtype = getattr(torch, tree["dtype"])
        if 0 in tree["shape"]:
            return torch.empty(tree["shape"], dtype=dtype)
        return _found(tensors, tree["tensor"]).reshape(tree["shape"])
    if "dict" in tree:
        return {key: _unpacked(part, tensors) for key, part in tree["dict"]}
    if "list" in tree:
        return [_unpacked(part, tensors) for part in tree["list"]]
    return tuple(_unpacked(part, tensors) for part in tree["tuple"])


def _shard_name(rank: int) -> str:
    return f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"


def _described(directory: Path, rank: int) -> list[int]:
    """Returns the size of this rank's shard and its digest as eight numbers; zeros when it had nothing to write."""
    path = directory / _shard_name(rank)
    if not path.exists():
        return [0] * 9
    digest = _digest(path)
    return [path.stat().st_size, *(int(digest[first : first + 8], 16) for first in range(0, 64, 8))]


def _hex(words: Sequence[int]) -> str:
    return "".join(f"{word:08x}" for word in words)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _publish(unfinished: Path, final: Path, index: Mapping[str, Any]) -> None:
    """Writes the index and gives the directory its name; one of the same step is replaced."""
    with (unfinished / _INDEX).open("w") as file:
        json.dump(index, file)
        file.flush()
        os.fsync(file.fileno())
    _flush(unfinished)
    old = final.with_name(f"{final.name}.old")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    unfinished.rename(final)
    _flush(final.parent)


def _flush(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _prune(root: Path, step: int, keep: int) -> None:
    """Removes what was never finished, what was replaced, and all complete checkpoints up to a step but the last."""
    for path in (*root.glob("step_*.tmp"), *root.glob("step_*.old")):
        shutil.rmtree(path)
    for path in [path for path in _complete(root) if _step(path) <= step][:-keep]:
        shutil.rmtree(path.rename(path.with_name(f"{path.name}.tmp")))


# ------------------------------------------------------------------------------------------------------------- reading


def _complete(root: Path) -> list[Path]:
    """Returns all checkpoints whose index and shards are there in full length, the oldest first."""
    paths = [path for path in root.glob("step_*") if _STEP.fullmatch(path.name) and _is_complete(path)]
    newest = {_step(path): path for path in sorted(paths, key=lambda path: path.suffix, reverse=True)}
    return [newest[step] for step in sorted(newest)]


def _step(path: Path) -> int:
    match = _STEP.fullmatch(path.name)
    assert match is not None
    return int(match.group(1))


def _is_complete(path: Path) -> bool:
    try:
        files = _read_index(path)["files"]
    except CheckpointError:
        return False
    return all(_fault(path / name, size, None) == 0 for name, (size, _) in files.items())


def _read_index(path: Path) -> dict[str, Any]:
    """Reads what a checkpoint says of itself.

    Raises:
        CheckpointError: it was never finished, or is none of ours.
    """
    try:
        index = json.loads((path / _INDEX).read_text())
    except OSError as error:
        raise CheckpointError(f"{path} has no {_INDEX}: it was never finished, or is no checkpoint") from error
    except ValueError as error:
        raise CheckpointError(f"{path / _INDEX} is no JSON: the checkpoint is torn or foreign") from error
    if not isinstance(index, dict) or index.get("format") != _FORMAT:
        raise CheckpointError(f"{path / _INDEX} is not of the format {_FORMAT!r}: the checkpoint is foreign")
    strange = {file.name for file in path.glob("*.safetensors")} - set(index["files"])
    strange |= {name for name in index["files"] if not _SHARD.fullmatch(name)}
    if strange:
        raise CheckpointError(f"{path} holds files that are not its own: {', '.join(sorted(strange))}")
    return index


def _fault(path: Path, size: int, digest: str | None) -> int:
    if not path.is_file():
        return 1
    if path.stat().st_size != size:
        return 2
    return 0 if digest is None or _digest(path) == digest else 3


def _verify(path: Path, files: Mapping[str, Sequence[Any]], team: _Team) -> None:
    """Checks every shard, each on one rank.

    Raises:
        CheckpointError: on every rank, with what is wrong and where.
    """
    own = [
        _fault(path / name, *files[name]) if index % team.world_size == team.rank else 0
        for index, name in enumerate(sorted(files))
    ]
    worst = [max(column) for column in zip(*team.everybody(own), strict=True)]
    faults = [f"{name} {_FAULTS[fault]}" for name, fault in zip(sorted(files), worst, strict=True) if fault]
    if faults:
        others = [str(other) for other in _complete(path.parent) if other != path]
        advice = f"; complete are {', '.join(others)}" if others else ""
        raise CheckpointError(f"{path} is torn: {'; '.join(faults)}{advice}")


def _chosen(path: Path, team: _Team) -> Path:
    """Returns the checkpoint itself, or the newest complete one of a directory, as rank 0 finds it."""
    if _STEP.fullmatch(path.name):
        return path
    complete = _complete(path) if team.rank == 0 else []
    step, is_old = team.everybody([_step(complete[-1]), bool(complete[-1].suffix)] if complete else [-1, 0])[0]
    if step < 0:
        raise CheckpointError(f"{path} holds no complete checkpoint")
    return path / f"step_{step:08d}{'.old' if is_old else ''}"


def _wanted(kfac: KFACPreconditioner) -> Callable[[str], bool]:
    """Says which tensors this rank needs."""
    of_kfac = shards.wanted(kfac.placement, kfac.collectives.rank)
    return lambda key: of_kfac(key) or key.startswith(("model/", "optimizer/", "extra/"))


def _found(tensors: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in tensors:
        raise CheckpointError(f"the checkpoint lacks the tensor {key!r}")
    return tensors[key]


def _matching(path: Path, kind: str, index: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    if index.get(kind) is None:
        raise CheckpointError(f"{path} was written without the {kind}; load it without, or save it with")
    return _unpacked(index[kind], tensors)


def _differences(
    model: nn.Module | None,
    model_state: Mapping[str, Any] | None,
    optimizer: torch.optim.Optimizer | None,
    optimizer_state: Mapping[str, Any] | None,
) -> list[str]:
    """Says how saved states differ from what should take them."""
    lines: list[str] = []
    if model is not None and model_state is not None:
        expected = unwrapped(model).state_dict()
        lines += [f"model: {name} is missing from the checkpoint" for name in expected if name not in model_state]
        lines += [f"model: {name} is in the checkpoint alone" for name in model_state if name not in expected]
        lines += [
            f"model: {name} is {tuple(model_state[name].shape)} in the checkpoint, {tuple(tensor.shape)} here"
            for name, tensor in expected.items()
            if isinstance(tensor, Tensor) and name in model_state and model_state[name].shape != tensor.shape
        ]
    if optimizer is not None and optimizer_state is not None:
        found = [len(group["params"]) for group in optimizer_state["param_groups"]]
        here = [len(group["params"]) for group in optimizer.param_groups]
        if found != here:
            lines.append(f"optimizer: groups of {found} parameters in the checkpoint, of {here} here")
    return lines
