r"""Holds the planner against what it plans: memory, time of a step and choice, predicted and then measured.

Ranks are processes over gloo, one thread each, on one machine. Before anything is trained ``kaisa plan --calibrate``
measures it among as many ranks; its profile is kept in the result. A case is a model on some ranks; its contestants are
all fractions, each with statistics that travel on factor steps and with statistics that wait for the decompositions.

In every round each contestant takes eight steps in turn: all due, plain, factors due, plain, factors due, plain,
factors due, plain (factors every 2 steps, decompositions every 8; placements are those of 10 and 100). The medians
over rounds of each kind of step make that of a step in which factors are due every 10 and decompositions every 100:

    plain + (factor - plain) / 10 + (all - factor) / 100

A prediction knows of the run only its shapes, the profile, and how long a few steps of the model without K-FAC take on
one rank while the others wait (``Workload.plain_seconds``); how much longer they take on several is predicted. Memory
is what ``memory_usage()`` says on every rank after a step in which factors were due.

Rounds and calibrations during which other work kept more than ``CALM`` of a core busy count for nothing and are
repeated; how much others took is kept. Measurements are kept after every round and whole cases are not repeated;
predictions are made anew from them whenever the file is shown, with the profiles in it, so that they say what the
planner of today would have said.

    python benchmarks/planner.py --output benchmarks/results/planner.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import kaisa
from kaisa.kfac.hardware import Hardware
from kaisa.kfac.payload import Payload
from kaisa.kfac.planner import Choices, choose
from kaisa.kfac.prediction import Prediction, placed, predict
from kaisa.kfac.survey import survey
from kaisa.kfac.workload import Settings, Workload
from kaisa.recipes.models import build_model, encoder

WORLDS = (1, 2, 4)
CYCLE = ("all", *("plain", "factor") * 3, "plain")
KINDS = ("plain", "factor", "all")
FACTOR_STEPS, INVERSE_STEPS = 10, 100
SETTINGS = Settings(factor_update_steps=FACTOR_STEPS, inv_update_steps=INVERSE_STEPS)
OPTIONS: dict[str, Any] = {"damping": 0.003, "factor_update_steps": 2, "inv_update_steps": 8}
PHASES = ("statistics", "factors", "inverses", "precondition")
ALONE_STEPS = 8
CALM = 0.15  # cores that others may keep busy
TRIES = 4  # times as many rounds or calibrations, where they are disturbed
GOALS = {"memory": 0.01, "time": 0.20, "choice": 1.05}

Batch = tuple[Tensor, Tensor]


def resnet_batch() -> Batch:
    return torch.randn(32, 3, 32, 32), torch.randint(10, (32,))


def stack_batch() -> Batch:
    return torch.randn(8, 32, 192), torch.randn(8, 32, 192)


def wide_batch() -> Batch:
    return torch.randn(64, 256), torch.randint(10, (64,))


def wide() -> nn.Module:
    layers = [nn.Linear(256, 768), nn.ReLU(), nn.Linear(768, 768), nn.ReLU(), nn.Linear(768, 10)]
    return nn.Sequential(*layers)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Batch], Callable[..., Tensor]]] = {
    "resnet20": (lambda: build_model("resnet20", (3, 32, 32), 10), resnet_batch, functional.cross_entropy),
    "bert-shaped": (lambda: encoder(2, 192), stack_batch, functional.mse_loss),
    "wide-mlp": (wide, wide_batch, functional.cross_entropy),
}


# --------------------------------------------------------------------------------------------------------- prediction


def workload_of(model: str, plain_seconds: float | None = None) -> Workload:
    return replace(surveyed(model), plain_seconds=plain_seconds)


@cache
def surveyed(model: str) -> Workload:
    build, batch, _ = MODELS[model]
    return survey(build(), batch()[0], name=model)


def settings_of(row: dict[str, Any]) -> Settings:
    return replace(SETTINGS, deferred=row["deferred"])


def predicted(case: dict[str, Any], row: dict[str, Any], hardware: Hardware) -> Prediction:
    """Return the prediction of what a contestant did."""
    workload, settings = workload_of(case["model"], case["plain_seconds"]), settings_of(row)
    placement = placed(workload, case["ranks"], row["workers"], hardware, settings)
    return predict(workload, placement, hardware, settings)


def compare(case: dict[str, Any], profile: dict[str, Any]) -> dict[str, Any]:
    """Return a case with what was predicted of each contestant, and what the planner would have chosen."""
    hardware = Hardware.from_json(json.dumps(profile))
    rows = [compare_row(row, predicted(case, row, hardware)) for row in case["contestants"]]
    plan = choose(
        workload_of(case["model"], case["plain_seconds"]),
        case["ranks"],
        hardware,
        SETTINGS,
        choices=Choices(colocate=(False,)),
    )
    chosen = plan.chosen.placement.workers, plan.chosen.is_deferred
    own = next(row for row in rows if (row["workers"], row["deferred"]) == chosen)
    best = min(rows, key=lambda row: row["measured"]["step"])
    return {
        "model": case["model"],
        "ranks": case["ranks"],
        "rows": rows,
        "chosen": {"workers": chosen[0], "deferred": chosen[1], "seconds": own["measured"]["step"]},
        "best": {"workers": best["workers"], "deferred": best["deferred"], "seconds": best["measured"]["step"]},
        "chosen_to_best": own["measured"]["step"] / best["measured"]["step"],
    }


def compare_row(row: dict[str, Any], prediction: Prediction) -> dict[str, Any]:
    measured = {**row["seconds"], "step": spread(**row["seconds"])}
    told = {
        "plain": prediction.plain_step,
        "factor": prediction.factor_step,
        "all": prediction.inverse_step,
        "step": prediction.average_step,
    }
    return {
        "workers": row["workers"],
        "deferred": row["deferred"],
        "measured": measured,
        "predicted": told,
        "error": told["step"] / measured["step"] - 1,
        "phases": {phase: [prediction.seconds[phase], row["phases"].get(phase)] for phase in PHASES},
        "parts": dict(prediction.parts),
        "memory_error": memory_error(row["memory"], prediction),
    }


def memory_error(found: Sequence[dict[str, int]], prediction: Prediction) -> float:
    """Return by how much the prediction is off, of the total and of each kind, on the rank where it is worst."""
    return max(
        abs(told[kind] - held[kind]) / max(1, held[kind])
        for held, told in zip(found, prediction.memory, strict=True)
        for kind in held
    )


def spread(plain: float, factor: float, **rest: float) -> float:
    """Return the time of a step on average, from those of each kind."""
    return plain + (factor - plain) / FACTOR_STEPS + (rest["all"] - factor) / INVERSE_STEPS


def judge(cases: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of all cases together, and whether they are what they should be."""
    rows = [row for case in cases for row in case["rows"]]
    error = statistics.median(abs(row["error"]) for row in rows)
    memory = max(row["memory_error"] for row in rows)
    worst = max(case["chosen_to_best"] for case in cases)
    return {
        "contestants": len(rows),
        "median_error_of_step": error,
        "largest_error_of_step": max(abs(row["error"]) for row in rows),
        "error_of_memory": memory,
        "chosen_to_best": worst,
        "cases_within": sum(case["chosen_to_best"] <= GOALS["choice"] for case in cases),
        "cases": len(cases),
        "reached": {
            "memory": memory <= GOALS["memory"],
            "time": error < GOALS["time"],
            "choice": worst <= GOALS["choice"],
        },
    }


# -------------------------------------------------------------------------------------------------------- measurement


@dataclass
class Contestant:
    """A model that is trained in one way; without K-FAC to see what the model takes by itself."""

    workers: int
    deferred: bool
    model: nn.Module
    optimizer: torch.optim.Optimizer
    kfac: kaisa.KFACPreconditioner | None
    seconds: dict[str, list[float]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    round: list[tuple[str, float]] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)

    def end_round(self, counts: bool) -> None:
        """Keep the steps of a round, or forget them."""
        for kind, seconds in self.round if counts else ():
            self.seconds[kind].append(seconds)
        self.round = []


def build(model: str, workers: int, deferred: bool) -> Contestant:
    torch.manual_seed(0)
    world = dist.get_world_size()
    plain = MODELS[model][0]()
    module = DistributedDataParallel(plain) if world > 1 else plain
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    kfac = None
    if workers:
        payload = Payload(deferred=deferred if world > 1 else None)
        kfac = kaisa.KFACPreconditioner(
            module, optimizer, grad_worker_fraction=workers / world, payload=payload, **OPTIONS
        )
    return Contestant(workers, deferred, module, optimizer, kfac)


def take_step(contestant: Contestant, batch: Batch, loss: Callable[..., Tensor]) -> None:
    contestant.optimizer.zero_grad()
    loss(contestant.model(batch[0]), batch[1]).backward()
    if contestant.kfac is not None:
        contestant.kfac.step()
    contestant.optimizer.step()


def take_cycle(contestant: Contestant, batch: Batch, loss: Callable[..., Tensor]) -> None:
    """Take a step of each kind, measured between barriers."""
    for kind in CYCLE if contestant.kfac is not None else ("plain", "plain"):
        dist.barrier()
        start = time.perf_counter()
        take_step(contestant, batch, loss)
        dist.barrier()
        contestant.round.append((kind, time.perf_counter() - start))
        if kind == "factor" and contestant.kfac is not None:
            contestant.memory = contestant.kfac.memory_usage()


def seconds_alone(model: str, batch: Batch) -> float:
    """Return how long a step of the model without K-FAC takes on the first rank while the others wait."""
    build_one, _, loss = MODELS[model]
    module = build_one()
    contestant = Contestant(0, False, module, torch.optim.SGD(module.parameters(), lr=0.01), None)
    seconds = []
    for _ in range(ALONE_STEPS + 1):
        start = time.perf_counter()
        take_step(contestant, batch, loss)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def of_everybody(value: Any) -> list[Any]:
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, value)
    return everybody


def describe(contestant: Contestant) -> dict[str, Any]:
    assert contestant.kfac is not None
    timings = of_everybody(contestant.kfac.timings())
    return {
        "workers": contestant.workers,
        "deferred": contestant.deferred,
        "seconds": {kind: statistics.median(contestant.seconds[kind]) for kind in KINDS},
        "phases": {phase: statistics.fmean(own.get(phase, 0.0) for own in timings) for phase in timings[0]},
        "memory": of_everybody(contestant.memory),
    }


def measure(model: str, rounds: int, output: Path) -> None:
    """Run as one of the ranks; the first puts its results into the file after every round."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    world, rank = dist.get_world_size(), dist.get_rank()
    torch.manual_seed(rank)
    batch, loss = MODELS[model][1](), MODELS[model][2]
    alone = of_everybody(seconds_alone(model, batch) if rank == 0 else None)[0]
    ways = [(workers, late) for workers in (4, 2, 1) if workers <= world for late in (False, True)[: min(2, world)]]
    contestants = [build(model, *way) for way in [(0, False), *ways]]
    disturbance: list[float] = []
    for contestant in contestants:  # to warm up
        take_cycle(contestant, batch, loss)
        contestant.end_round(False)
    calm, tries = 0, 0
    while calm < rounds and tries < TRIES * rounds:
        first = tries % len(contestants)
        before = time.perf_counter(), machine_seconds(), time.process_time()
        for contestant in contestants[first:] + contestants[:first]:
            take_cycle(contestant, batch, loss)
        spent = of_everybody((time.perf_counter(), machine_seconds(), time.process_time()))
        own = sum(of_everybody(time.process_time() - before[2]))
        others = of_everybody((spent[rank][1] - before[1] - own) / (spent[rank][0] - before[0]))[0]
        tries += 1
        for contestant in contestants:
            contestant.end_round(others <= CALM)
        if others > CALM:
            continue
        calm += 1
        disturbance.append(others)
        without, *preconditioned = contestants
        case = {
            "model": model,
            "ranks": world,
            "rounds": calm,
            "disturbed_rounds": tries - calm,
            "others": max(disturbance),
            "is_whole": calm == rounds,
            "plain_seconds": alone,
            "without_kfac": statistics.median(without.seconds["plain"]),
            "contestants": [describe(contestant) for contestant in preconditioned],
        }
        if rank == 0:
            put(output, case)
    dist.barrier()
    os._exit(0)  # to take down the many groups of all contestants sometimes never comes to an end


def machine_seconds() -> float:
    """Return for how long all cores together have been busy; 0 where the system does not tell."""
    try:
        fields = Path("/proc/stat").read_text().split("\n")[0].split()[1:]
    except OSError:
        return 0.0
    user, nice, system, _, _, *interrupts = map(int, fields[:8])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


def children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def calibrated(ranks: int, before: Sequence[str]) -> dict[str, Any]:
    """Return the profile that the library's own command makes of this machine."""
    found: list[tuple[float, dict[str, Any]]] = []
    while len(found) < TRIES and not (found and found[-1][0] <= CALM):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "profile.json"
            command = [*before, sys.executable, "-m", "kaisa", "plan", "--calibrate"]
            command += ["--nproc", str(ranks), "--output", str(path)]
            begin = time.perf_counter(), machine_seconds() - children_seconds()
            subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
            elapsed, others = time.perf_counter() - begin[0], machine_seconds() - children_seconds() - begin[1]
            found.append((others / elapsed, json.loads(path.read_text())))
    others, profile = min(found, key=lambda pair: pair[0])
    return {"others": others, "profile": profile}


# ------------------------------------------------------------------------------------------------------------ results


def put(output: Path, case: dict[str, Any]) -> None:
    """Put a case into the file, in place of an earlier one of the same model and ranks."""
    value = json.loads(output.read_text())
    key = case["model"], case["ranks"]
    value["cases"] = [old for old in value["cases"] if (old["model"], old["ranks"]) != key] + [case]
    write(output, value)


def write(output: Path, value: dict[str, Any]) -> None:
    partial = output.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    partial.replace(output)


def is_measured(value: dict[str, Any], model: str, ranks: int) -> bool:
    return any((case["model"], case["ranks"]) == (model, ranks) and case["is_whole"] for case in value["cases"])


def judged(value: dict[str, Any]) -> dict[str, Any]:
    """Return measurements with predictions and verdicts."""
    compared = [compare(case, value["profiles"][str(case["ranks"])]["profile"]) for case in value["cases"]]
    return {**value, "compared": compared, "verdict": judge(compared)} if compared else value


def show(value: dict[str, Any]) -> None:
    measured = {(case["model"], case["ranks"]): case for case in value["cases"]}
    for case in value["compared"]:
        own = measured[case["model"], case["ranks"]]
        print(f"\n{case['model']}, {case['ranks']} ranks, medians of {own['rounds']} rounds; without K-FAC", end=" ")
        print(f"{1e3 * own['plain_seconds']:.1f} ms alone, {1e3 * own['without_kfac']:.1f} ms together")
        print(f"{'workers':10}{'measured | predicted, ms: step':>32}{'plain':>18}{'factor':>18}{'all':>20}", end="")
        print("".join(f"{phase:>18}" for phase in PHASES))
        for row in case["rows"]:
            cells = [f"{row['workers']}{' late' if row['deferred'] else '':9}"]
            cells.append(f"{100 * row['error']:+13.0f} %")
            for kind, width in (("step", 16), ("plain", 18), ("factor", 18), ("all", 20)):
                both = f"{1e3 * row['measured'][kind]:.1f} | {1e3 * row['predicted'][kind]:.1f}"
                cells.append(f"{both:>{width}}")
            for told, seen in row["phases"].values():
                both = f"{1e3 * (seen or 0):.1f} | {1e3 * told:.1f}"
                cells.append(f"{both:>18}")
            print("".join(cells))
        chosen, best = case["chosen"], case["best"]
        print(f"chosen {chosen['workers']}{' late' * chosen['deferred']}, best {best['workers']}", end="")
        print(f"{' late' * best['deferred']}: {case['chosen_to_best']:.3f}")
    print()
    for name, figure in value["verdict"].items():
        print(f"{name:24}{figure if isinstance(figure, dict) else format(figure, '.4g')}")


def setting() -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "threads": 1,
        "backend": "gloo",
        "seed": 0,
        "schedule": {"factor_update_steps": FACTOR_STEPS, "inv_update_steps": INVERSE_STEPS},
        "options": OPTIONS,
        "goals": GOALS,
    }


def launch(ranks: int, model: str, rounds: int, output: Path, before: Sequence[str]) -> None:
    command = [*before, sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", __file__]
    command += ["--models", model, "--rounds", str(rounds), "--output", str(output)]
    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=Path, required=True, help="file for the results as JSON; it goes on from there"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--ranks", type=int, nargs="+", choices=WORLDS, default=WORLDS)
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=sorted(MODELS))
    parser.add_argument("--again", action="store_true", help="measure again what has been measured")
    parser.add_argument("--calibrate-again", action="store_true", help="make new profiles")
    parser.add_argument("--show", action="store_true", help="only predict anew and show the results of the file")
    parser.add_argument("--through", nargs="+", default=[], help="command that starts each measurement")
    arguments = parser.parse_args()
    output = arguments.output
    if "RANK" in os.environ:
        measure(arguments.models[0], arguments.rounds, output)
        return
    if not output.exists():
        output.parent.mkdir(parents=True, exist_ok=True)
        write(output, {"setting": setting(), "profiles": {}, "cases": []})
    for ranks in () if arguments.show else arguments.ranks:
        value = json.loads(output.read_text())
        if arguments.calibrate_again or str(ranks) not in value["profiles"]:
            value["profiles"][str(ranks)] = calibrated(ranks, arguments.through)
            write(output, value)
        for model in arguments.models:
            if arguments.again or not is_measured(json.loads(output.read_text()), model, ranks):
                launch(ranks, model, arguments.rounds, output, arguments.through)
    value = judged(json.loads(output.read_text()))
    write(output, value)
    show(value)


if __name__ == "__main__":
    main()
