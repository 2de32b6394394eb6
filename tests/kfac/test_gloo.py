"""Many ranks equal one, with real processes over gloo: gradients averaged by hand and by DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kaisa.kfac.payload import Payload
from tests.support import gloo, world
from tests.support.gloo import Case
from tests.support.training import Run, batch, distance, network, share

CLIP = 1e-3
SOLVERS = ("eigen", "cholesky", "ekfac", "sqrt_ekfac", "warm_eigen")
TOLERANCE = {"sqrt_ekfac": 1e-7}  # for its epsilon of 1e-8 magnifies rounding
WORLDS = (2, 4)
WRAPPERS: dict[str, dict[str, Any]] = {
    "wrapped": {},
    "buckets_as_gradients": {"gradient_as_bucket_view": True},
    "looking_for_unused": {"find_unused_parameters": True},
}


def _cases(size: int) -> dict[str, Case]:
    cases = {}
    for workers in (workers for workers in (1, 2, 4) if workers <= size):
        fraction = workers / size
        for index, solver in enumerate(SOLVERS):
            options = {"solver": solver, "grad_worker_fraction": fraction, "kl_clip": (None, CLIP)[index % 2]}
            cases[f"{solver} {workers}"] = Case(options, micro_batches=1 + index % 2)
        options = {"grad_worker_fraction": fraction, "kl_clip": CLIP}
        for name, wrapper in WRAPPERS.items():
            cases[f"{name} {workers}"] = Case(options, wrapper=wrapper)
            cases[f"{name} accumulating {workers}"] = Case(options, micro_batches=2, wrapper=wrapper)
        overlapping = {**options, "payload": Payload(bucket_bytes=1)}
        cases[f"overlapping {workers}"] = Case(overlapping, micro_batches=2, wrapper={})
        cases[f"unused {workers}"] = Case(options, wrapper={"find_unused_parameters": True}, users=(1,))
        rounded = {**options, "payload": Payload(statistics=torch.bfloat16, gradients=torch.bfloat16)}
        cases[f"rounded {workers}"] = Case(rounded)
        waiting = {**options, "payload": Payload(deferred=True, bucket_bytes=1), "inv_update_steps": 3}
        cases[f"waiting {workers}"] = Case(waiting, micro_batches=2, wrapper={}, is_tied=False)
        cases[f"placed {workers}"] = Case({**options, "colocate_factors": True, "local_below": 7})
        cases[f"unequal {workers}"] = Case(options, sizes=(31, 17) if size == 2 else (9, 20, 3, 16), wrapper={})
    return cases


def _of_one_process(size: int, name: str) -> dict[str, Tensor]:
    case = _cases(size)[name]
    placing = ("grad_worker_fraction", "payload", "colocate_factors", "local_below")
    options = {option: value for option, value in case.options.items() if option not in placing}
    if case.sizes is not None:
        sizes = case.sizes
        return Run({**options, "accumulation_steps": size}, lambda step: batch(step).split(sizes))()
    if case.users is not None:
        users = case.users
        return Run(
            {**options, "accumulation_steps": size}, lambda step: share(step, 0, 1, size), lambda part: part in users
        )()
    return Run(options, lambda step: [batch(step)], model=lambda: network(is_tied=case.is_tied))()


@pytest.mark.parametrize("size", WORLDS)
def test_processes_end_where_one_process_does_and_send_what_the_simulated_world_does(size: int, tmp_path: Path) -> None:
    cases = _cases(size)
    ends = dict(zip(cases, gloo.run(size, list(cases.values()), tmp_path), strict=True))
    different = [name for name, ranks in ends.items() if not _are_equal([rank["parameters"] for rank in ranks])]
    distances = {name: distance(ends[name][0]["parameters"], _of_one_process(size, name)) for name in cases}
    far = {name: found for name, found in distances.items() if found > _tolerance(name)}
    simulated = {f"{solver} {size}": _simulated(size, cases[f"{solver} {size}"]) for solver in SOLVERS}
    accounts = {name: [{kind: rank[kind] for kind in simulated[name][0]} for rank in ends[name]] for name in simulated}
    assert not different, "parameters differ between ranks"
    assert not far, "parameters differ from those of one process"
    assert accounts == simulated


def _are_equal(parameters: Sequence[dict[str, Tensor]]) -> bool:
    first = parameters[0]
    return all(torch.equal(other[name], first[name]) for other in parameters for name in first)


def _tolerance(name: str) -> float:
    return 0.1 if name.startswith("rounded") else TOLERANCE.get(name.split()[0], 1e-11)


def _simulated(size: int, case: Case) -> list[dict[str, Any]]:
    def main(collectives: world.Simulated) -> dict[str, Any]:
        options = {**case.options, "accumulation_steps": case.micro_batches, "collectives": collectives}
        run = Run(options, lambda step: case.parts(step, collectives.rank, size), average=collectives.mean)
        run()
        assert run.kfac is not None
        return {
            "bytes": dict(collectives.bytes_sent),
            "calls": dict(collectives.calls),
            "memory": run.kfac.memory_usage(),
        }

    return world.run(size, main)
