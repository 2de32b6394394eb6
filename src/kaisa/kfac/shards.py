"""A rank's share of the state as named tensors: what it offers under one placement, what it needs under another.

    factors/LAYER/{a,g}, factors/LAYER/weight           offered by the first owner, wanted by all owners
    decompositions/LAYER/{a,g}/i, …/{stack,values,…}    offered by the first gradient worker, wanted by all of them
    ranks/RANK/{label,example}_generator                a rank's own
    ranks/RANK/failures                                 everybody's, of whom each layer counts the worst

Checkpoints write and read them; a new placement in the middle of a run sends them (``moved``).
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from kaisa.errors import StateError
from kaisa.kfac.collectives import Collectives
from kaisa.kfac.placement import Placement


def offered(state: Mapping[str, Any], placement: Placement, rank: int) -> dict[str, Tensor]:
    """Returns what a rank brings of the state of K-FAC, so that nothing is brought twice."""
    tensors = {
        f"ranks/{rank}/label_generator": state["label_generator"],
        f"ranks/{rank}/example_generator": state["example_generator"],
        f"ranks/{rank}/failures": torch.tensor([state["failures"].get(name, 0) for name in state["shapes"]]),
    }
    for name, entry in state["factors"].items():
        assignment = placement[name]
        if assignment.a_owners[0] == rank:
            tensors[f"factors/{name}/a"] = entry["a"]
            tensors[f"factors/{name}/weight"] = entry["weight"].reshape(1)
        if assignment.g_owners[0] == rank:
            tensors[f"factors/{name}/g"] = entry["g"]
    for ordinal, stack in enumerate(state["decompositions"]):
        for index, name in enumerate(stack["names"]):
            if placement[name].gradient_workers[0] == rank:
                tensors.update(_layer_of_stack(name, index, ordinal, stack))
    return tensors


def _layer_of_stack(name: str, index: int, ordinal: int, stack: Mapping[str, Any]) -> dict[str, Tensor]:
    tensors = {f"decompositions/{name}/stack": torch.tensor([ordinal])}
    for side in ("a", "g"):
        tensors.update({f"decompositions/{name}/{side}/{i}": part[index] for i, part in enumerate(stack[side])})
    moments = stack["moments"]
    if moments is not None:
        terms = torch.as_tensor(moments["terms"], dtype=torch.float64)
        tensors[f"decompositions/{name}/values"] = moments["values"][index]
        tensors[f"decompositions/{name}/weight"] = moments["weight"].reshape(1)
        tensors[f"decompositions/{name}/terms"] = terms.reshape(1)
    return tensors


def wanted(placement: Placement, rank: int) -> Callable[[str], bool]:
    """Says which tensors a rank needs."""
    names: set[str] = set()
    prefixes: list[str] = []
    for name, assignment in placement.assignments:
        owned = [side for side, owners in (("a", assignment.a_owners), ("g", assignment.g_owners)) if rank in owners]
        names.update(f"factors/{name}/{part}" for part in (*owned, "weight") if owned)
        if rank in assignment.gradient_workers:
            prefixes.append(f"decompositions/{name}/")
    generators = {f"ranks/{rank}/label_generator", f"ranks/{rank}/example_generator"}
    starts = tuple(prefixes)
    return lambda key: key in names or key in generators or key.startswith(starts) or key.endswith("/failures")


def assembled(
    common: Mapping[str, Any], tensors: Mapping[str, Tensor], placement: Placement, rank: int
) -> dict[str, Any]:
    """Returns the state of K-FAC as ``load_state_dict`` takes it on a rank.

    Args:
        common: a state with the numbers that all ranks share; its generators stay where no tensor replaces them.
        tensors: at least those that are ``wanted``.
        placement: who works on what now.
        rank: this one.

    Raises:
        StateError: a tensor is missing.
    """
    state = dict(common)
    for generator in ("label_generator", "example_generator"):
        state[generator] = tensors.get(f"ranks/{rank}/{generator}", state[generator])
    state["deferred"] = {"is_waiting": False, "sums": {}}
    state["factors"] = _factors(placement, rank, tensors)
    state["decompositions"] = _stacks(placement, tensors)
    rows = [tensor for key, tensor in tensors.items() if key.startswith("ranks/") and key.endswith("/failures")]
    counts = [max(int(count) for count in column) for column in zip(*(row.cpu().numpy() for row in rows), strict=True)]
    mine = {name for name, a in placement.assignments if rank in (*a.a_owners, *a.g_owners)}
    failed = zip(state["shapes"], counts, strict=True)
    state["failures"] = {name: count for name, count in failed if count and name in mine}
    return state


def _factors(placement: Placement, rank: int, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Returns the averages of which this rank owns a side, an empty tensor for a side that it does not own."""
    result: dict[str, dict[str, Tensor]] = {}
    for name, assignment in placement.assignments:
        owners = {"a": assignment.a_owners, "g": assignment.g_owners}
        if f"factors/{name}/weight" not in tensors:
            continue
        owned = {side: _found(tensors, f"factors/{name}/{side}") for side in owners if rank in owners[side]}
        nowhere = next(iter(owned.values())).new_empty(0)
        weight = _found(tensors, f"factors/{name}/weight").reshape(())
        result[name] = {**{side: owned.get(side, nowhere) for side in owners}, "weight": weight}
    return result


def _stacks(placement: Placement, tensors: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Returns the decompositions of this rank's layers, stacked as they were where the placement is the same."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, _ in placement.assignments:
        if f"decompositions/{name}/stack" in tensors:
            groups.setdefault(_stack_key(name, tensors), []).append(name)
    ordered = sorted(groups.items(), key=lambda item: item[0][0])
    return [_stack(names, tensors) for _, names in ordered]


def _stack_key(name: str, tensors: Mapping[str, Tensor]) -> tuple[Any, ...]:
    """Returns what layers of one stack share: its place, the shapes and types, the weight and terms of the moments."""
    parts = [(part.shape, part.dtype) for side in ("a", "g") for part in _parts(name, side, tensors)]
    numbers = [tensors.get(f"decompositions/{name}/{key}") for key in ("weight", "terms")]
    values = tuple(None if number is None else float(number) for number in numbers)
    return int(_found(tensors, f"decompositions/{name}/stack")), tuple(parts), values


def _parts(name: str, side: str, tensors: Mapping[str, Tensor]) -> list[Tensor]:
    parts: list[Tensor] = []
    while (key := f"decompositions/{name}/{side}/{len(parts)}") in tensors:
        parts.append(tensors[key])
    return parts


def _stack(names: list[str], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    sides = {
        side: [torch.stack(parts) for parts in zip(*(_parts(name, side, tensors) for name in names), strict=True)]
        for side in ("a", "g")
    }
    moments = None
    if f"decompositions/{names[0]}/values" in tensors:
        moments = {
            "values": torch.stack([_found(tensors, f"decompositions/{name}/values") for name in names]),
            "weight": _found(tensors, f"decompositions/{names[0]}/weight").reshape(()),
            "terms": float(_found(tensors, f"decompositions/{names[0]}/terms")),
        }
    return {"names": names, **sides, "moments": moments}


def _found(tensors: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in tensors:
        raise StateError(f"the tensor {key!r} is missing")
    return tensors[key]


def moved(
    tensors: Mapping[str, Tensor], new: Placement, collectives: Collectives, device: torch.device
) -> dict[str, Tensor]:
    """Sends named tensors from the ranks that offer them to those that want them under a new placement.

    Args:
        tensors: what this rank offers; no two ranks offer the same.
        new: the placement.
        collectives: how to reach the others; all ranks call.
        device: where messages are made.

    Returns:
        What this rank wants.
    """
    world = tuple(range(collectives.world_size))
    ordered = {name: tensor.to(device) for name, tensor in sorted(tensors.items())}
    catalogues = _catalogues(ordered, collectives, device)
    wishes = {rank: wanted(new, rank) for rank in world}
    nothing = torch.empty(0, dtype=torch.uint8, device=device)
    chunks = [
        torch.cat([nothing, *(_as_bytes(tensor) for name, tensor in ordered.items() if wishes[rank](name))])
        for rank in world
    ]
    mine = [[entry for entry in catalogue if wishes[collectives.rank](entry[0])] for catalogue in catalogues]
    sizes = [sum(_nbytes(shape, dtype) for _, shape, dtype in entries) for entries in mine]
    received = collectives.exchange("state", world, chunks, sizes)()
    return {
        name: part.clone().view(getattr(torch, dtype)).reshape(shape)
        for entries, chunk in zip(mine, received, strict=True)
        for (name, shape, dtype), part in zip(
            entries, chunk.split([_nbytes(shape, dtype) for _, shape, dtype in entries]), strict=True
        )
    }


Entry = tuple[str, list[int], str]


def _catalogues(tensors: Mapping[str, Tensor], collectives: Collectives, device: torch.device) -> list[list[Entry]]:
    """Returns the name, shape and type of every tensor that each rank offers."""
    world = tuple(range(collectives.world_size))
    rows = [(name, list(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors.items()]
    text = torch.frombuffer(bytearray(json.dumps(rows).encode()), dtype=torch.uint8).to(device)
    length = torch.tensor([text.numel()], device=device)
    lengths = collectives.exchange("state", world, [length] * len(world), [1] * len(world))()
    sizes = [int(each.cpu().numpy()[0]) for each in lengths]
    texts = collectives.exchange("state", world, [text] * len(world), sizes)()
    return [json.loads(each.cpu().numpy().tobytes()) for each in texts]


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def _nbytes(shape: list[int], dtype: str) -> int:
    kind: torch.dtype = getattr(torch, dtype)
    return torch.Size(shape).numel() * kind.itemsize
