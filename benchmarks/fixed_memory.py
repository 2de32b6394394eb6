r"""What K-FAC may learn from at once inside a stated memory, and how soon it gets there, by where its factors live.

Four ranks over gloo, one thread each, share a budget per rank: what the process holds at its peak above what it held
with everything imported and the data read (VmHWM of Linux), for weights, gradients, activations, optimizer and K-FAC
together. For each contestant

    largest batch     in steps of ``STEP`` examples a rank, found by trying: each batch takes steps of every kind, all
                      of K-FAC's due and none due; the largest keeps all ranks inside the budget, one more does not
    time to target    with that batch a small convolutional network learns handwritten digits until it classifies 95 %
                      of the held-out ones right, looked at every ``LOOK`` steps: steps, seconds by the wall, and
                      seconds of processor (of all ranks, shared by two cores), which other work disturbs least

Contestants: SGD alone; kfac-pytorch, which replicates factors on every rank, at COMM-OPT and MEM-OPT; ours, whose
factors live with their owner, at COMM-OPT and MEM-OPT; ours with "auto", which is told for each batch what SGD alone
has left of the budget. Both libraries precondition convolutions and linear layers with eigendecompositions in float32.
The learning rate is 0.1 for 128 examples and grows with the square root of the batch, after a rise of ``RISE`` steps.

Every contestant is a launch of its own; a finished one is not repeated. How much other work kept the machine busy
is written beside what was measured.

    PYTHONPATH=… python benchmarks/fixed_memory.py --output benchmarks/results/fixed_memory.json --page docs/planning.md
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.util
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import kaisa
from kaisa.kfac.layers import LayerOptions
from kaisa.kfac.solvers import Eigen
from kaisa.recipes.memory import measure_peak_memory, reset_peak_memory

RANKS, CORES = 4, 2
STEP = 8  # examples a rank
TRIED_FIRST = 2 * STEP, 8 * STEP
TARGET, MOST_STEPS, LOOK, RISE = 0.95, 200, 5, 10
FACTOR_STEPS, INVERSE_STEPS = 5, 20
OPTIONS: dict[str, Any] = {"damping": 0.01, "factor_decay": 0.95, "kl_clip": 0.001}
CPU = torch.device("cpu")
MIB = 2**20
MARKS = "<!-- fixed memory -->", "<!-- end of fixed memory -->"
# Freed memory goes back to the system at once, so that a peak is of what is in use.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@dataclass(frozen=True)
class Contestant:
    """Who learns, and where factors live.

    Attributes:
        library: "sgd", "kfac-pytorch" or "kaisa".
        fraction: of the ranks that hold a layer's decompositions, or "auto".
    """

    library: str
    fraction: float | str = 1.0

    @property
    def name(self) -> str:
        if self.library == "sgd":
            return "SGD alone"
        known = {1.0: "COMM-OPT", 1 / RANKS: "MEM-OPT"}
        return f"{self.library}, {known.get(self.fraction, self.fraction)}"  # type: ignore[call-overload]


CONTESTANTS = {
    contestant.name: contestant
    for contestant in (
        Contestant("sgd"),
        Contestant("kfac-pytorch", 1.0),
        Contestant("kfac-pytorch", 1 / RANKS),
        Contestant("kaisa", 1.0),
        Contestant("kaisa", 1 / RANKS),
        Contestant("kaisa", "auto"),
    )
}


# ------------------------------------------------------------------------------------------------- model and data


def network(width: int) -> nn.Module:
    """Return a convolutional network on 8 × 8 images, without normalisation."""
    channels = [1, width, width, 2 * width, 2 * width]
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(channels):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8 * width, 10))


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return images and labels to learn from, and those that are held out."""
    data = importlib.import_module("sklearn.datasets").load_digits()
    images, labels = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return (images[order[360:]], labels[order[360:]]), (images[order[:360]], labels[order[:360]])


def rate_of(batch: int) -> float:
    """Return the learning rate of a batch of all ranks."""
    return 0.1 * (batch / 128) ** 0.5


@dataclass
class Learner:
    """A model with what changes it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    kfac: Any

    def step(self, images: Tensor, labels: Tensor) -> None:
        self.optimizer.zero_grad()
        functional.cross_entropy(self.model(images), labels).backward()
        if self.kfac is not None:
            self.kfac.step()
        self.optimizer.step()

    def held(self) -> dict[str, int]:
        """Return the bytes that K-FAC holds on this rank."""
        if self.kfac is None:
            return {"total": 0}
        found = {kind: int(size) for kind, size in self.kfac.memory_usage().items()}
        return {**found, "total": found.get("total", sum(found.values()))}


def build(contestant: Contestant, width: int, batch: int, seed: int, left: int | None) -> Learner:
    """Make a learner; ``left`` is what "auto" may take."""
    torch.manual_seed(seed)
    model = DistributedDataParallel(network(width))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate_of(batch * RANKS), momentum=0.9, weight_decay=5e-4)
    intervals = {"factor_update_steps": FACTOR_STEPS, "inv_update_steps": INVERSE_STEPS}
    if contestant.library == "sgd":
        return Learner(model, optimizer, None)
    if contestant.library == "kfac-pytorch":
        theirs = importlib.import_module("kfac.preconditioner").KFACPreconditioner
        rate = rate_of(batch * RANKS)
        options = {**OPTIONS, **intervals, "lr": rate, "grad_worker_fraction": contestant.fraction}
        return Learner(model, optimizer, theirs(model, loglevel=logging.NOTSET, **options))
    kfac = kaisa.KFACPreconditioner(
        model,
        optimizer,
        solver=Eigen(precision=torch.float32),
        layer_options=LayerOptions(norms=False),
        grad_worker_fraction=contestant.fraction,
        memory_budget=left if contestant.fraction == "auto" else None,
        **OPTIONS,
        **intervals,
    )
    return Learner(model, optimizer, kfac)


# ---------------------------------------------------------------------------------------------------- largest batch


def search(peak_of: Callable[[int], int], budget: int) -> int | None:
    """Return the largest batch, in whole steps, whose peak is inside the budget; None if not even the smallest is.

    The first guess is on the line through two batches.
    """
    low, high = TRIED_FIRST
    slope = max(1.0, (peak_of(high) - peak_of(low)) / (high - low))
    guess = max(STEP, STEP * int((low + (budget - peak_of(low)) / slope) // STEP))
    while guess > STEP and peak_of(guess) > budget:
        guess -= STEP
    while peak_of(guess + STEP) <= budget:
        guess += STEP
    return guess if peak_of(guess) <= budget else None


@dataclass
class Trial:
    """Tries batches, each once.

    Attributes:
        found: what the fullest rank held, by batch.
    """

    contestant: Contestant
    width: int
    budget: int
    left: Callable[[int], int | None]
    found: dict[int, dict[str, Any]]

    def peak(self, batch: int) -> int:
        """Return the bytes that the fullest rank held at its peak."""
        if batch not in self.found:
            self.found[batch] = self._try(batch)
        return int(self.found[batch]["peak"])

    def _try(self, batch: int) -> dict[str, Any]:
        base = resident()
        learner = planned(self.contestant, self.width, batch, self.left(batch))
        if learner is None:
            return {"batch": batch, "peak": self.budget + 1, "held": None, "refused": True}
        generator = torch.Generator().manual_seed(dist.get_rank())
        images, labels = torch.randn(batch, 1, 8, 8, generator=generator), torch.randint(10, (batch,))
        reset_peak_memory(CPU)
        for _ in range(FACTOR_STEPS + 1):  # all due, nothing due, factors due
            learner.step(images, labels)
        peak = most((measure_peak_memory(CPU) or 0) - base)
        held = most(learner.held()["total"])
        close(learner)
        return {"batch": batch, "peak": peak, "held": held}


def planned(contestant: Contestant, width: int, batch: int, left: int | None) -> Learner | None:
    """Return a learner, or None where the planner finds no placement that fits."""
    try:
        return build(contestant, width, batch, 0, left)
    except kaisa.ConfigurationError:
        return None


def close(learner: Learner) -> None:
    if isinstance(learner.kfac, kaisa.KFACPreconditioner):
        learner.kfac.close()


def on_line(known: dict[int, int], batch: int) -> int:
    """Return the peak of a batch between, or beyond, those that were tried."""
    if batch in known:
        return known[batch]
    (low, at_low), *_, (high, at_high) = sorted(known.items())
    return round(at_low + (at_high - at_low) * (batch - low) / (high - low))


def resident() -> int:
    """Return the bytes that this process holds now."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


def most(value: int) -> int:
    everybody: list[int] = [0] * RANKS
    dist.all_gather_object(everybody, value)
    return max(everybody)


def total(value: float) -> float:
    everybody: list[float] = [0.0] * RANKS
    dist.all_gather_object(everybody, value)
    return sum(everybody)


# --------------------------------------------------------------------------------------------------- time to target


def learn(contestant: Contestant, width: int, batch: int, seed: int, left: int | None) -> dict[str, Any]:
    """Train to the target with a batch; return what it took."""
    train, tests = digits()
    base = resident()
    learner = build(contestant, width, batch, seed, left)
    reset_peak_memory(CPU)
    order = endless(len(train[1]), batch * RANKS, seed)
    seconds, spent, busy, step = 0.0, 0.0, 0.0, 0
    accuracies: list[float] = []
    while step < MOST_STEPS and (accuracies or [0.0])[-1] < TARGET:
        dist.barrier()
        begin = time.perf_counter(), time.process_time(), machine_seconds()
        for _ in range(LOOK):
            for group in learner.optimizer.param_groups:
                group["lr"] = min(1.0, (step + 1) / RISE) * rate_of(batch * RANKS)
            rows = next(order)[dist.get_rank() * batch :][:batch]
            learner.step(train[0][rows], train[1][rows])
            step += 1
        dist.barrier()
        seconds += time.perf_counter() - begin[0]
        spent += total(time.process_time() - begin[1])
        busy += machine_seconds() - begin[2]
        accuracies.append(total(evaluate(learner.model, *tests) if dist.get_rank() == 0 else 0.0))
    result = {
        "seed": seed,
        "reached": accuracies[-1] >= TARGET,
        "steps": step,
        "examples": step * batch * RANKS,
        "seconds": seconds,
        "processor_seconds": spent / CORES,
        "others": max(0.0, busy - spent) / seconds,
        "accuracies": accuracies,
        "peak": most((measure_peak_memory(CPU) or 0) - base),
        "held": most(learner.held()["total"]),
    }
    if contestant.library == "kaisa":
        result["fraction"] = learner.kfac.placement.workers / RANKS
    close(learner)
    return result


def endless(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Yield the rows of batches, a new order whenever all were seen."""
    generator = torch.Generator().manual_seed(1000 + seed)
    rows = torch.empty(0, dtype=torch.int64)
    while True:
        while len(rows) < size:
            rows = torch.cat([rows, torch.randperm(count, generator=generator)])
        yield rows[:size]
        rows = rows[size:]


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()  # hooks of kfac-pytorch take what passes in training for a part of the step, and wait for all ranks
    parts = [model.module(part).argmax(1) for part in images.split(STEP)]  # type: ignore[operator,union-attr]
    model.train()
    return (torch.cat(parts) == labels).float().mean().item()


def machine_seconds() -> float:
    """Return for how long all cores together have been busy; 0 where the system does not tell."""
    try:
        fields = Path("/proc/stat").read_text(encoding="ascii").split("\n")[0].split()[1:]
    except OSError:
        return 0.0
    user, nice, system, _, _, *interrupts = map(int, fields[:8])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


# ---------------------------------------------------------------------------------------------------------- results


def measure(name: str, setting: dict[str, Any], output: Path) -> None:
    """Run as one of the ranks; the first puts the contestant into the file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=30))
    contestant, width, budget = CONTESTANTS[name], setting["width"], setting["budget"]
    value = json.loads(output.read_text(encoding="utf-8"))
    alone = {row["batch"]: row["peak"] for row in value["contestants"].get("SGD alone", {}).get("peaks", [])}

    def left(batch: int) -> int | None:
        return max(1, budget - on_line(alone, batch)) if contestant.fraction == "auto" else None

    digits()
    build(Contestant("sgd"), width, STEP, 0, None).step(torch.randn(STEP, 1, 8, 8), torch.randint(10, (STEP,)))
    trial = Trial(contestant, width, budget, left, {})
    largest = search(trial.peak, budget)
    result: dict[str, Any] = {"peaks": [row for _, row in sorted(trial.found.items())], "largest": largest, "runs": []}
    if largest is not None:
        result["runs"] = [learn(contestant, width, largest, seed, left(largest)) for seed in setting["seeds"]]
    if dist.get_rank() == 0:
        put(output, name, result)
    dist.barrier()
    os._exit(0)  # to take down the many groups of all contestants sometimes never comes to an end


def put(output: Path, name: str, result: dict[str, Any]) -> None:
    value = json.loads(output.read_text(encoding="utf-8"))
    value["contestants"][name] = result
    write(output, value)


def write(output: Path, value: dict[str, Any]) -> None:
    partial = output.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    partial.replace(output)


def launch(name: str, output: Path, before: Sequence[str]) -> None:
    command = [*before, sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(RANKS)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", __file__]
    command += ["--contestant", name, "--output", str(output)]
    subprocess.run(command, env={**os.environ, **ENVIRONMENT}, check=True)


def table(value: dict[str, Any]) -> str:
    """Return the results as a table of Markdown."""
    rows = [
        "| contestant | K-FAC holds, MiB | largest batch a rank | peak, MiB | steps | ms an example | s | s by wall |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name in CONTESTANTS:
        if name in value["contestants"]:
            rows.append(row_of(name, value["contestants"][name]))
    return "\n".join(rows)


def row_of(name: str, found: dict[str, Any]) -> str:
    if found["largest"] is None:
        return f"| {name} | – | does not fit | – | – | – | – | – |"
    fitting = next(row for row in found["peaks"] if row["batch"] == found["largest"])
    runs = found["runs"]
    reached = [run for run in runs if run["reached"]]
    cells = [f"{fitting['held'] / MIB:.1f}", str(found["largest"]), f"{fitting['peak'] / MIB:.1f}"]
    if 2 * len(reached) <= len(runs):
        best = max(max(run["accuracies"]) for run in runs)
        cells += [f"not in {MOST_STEPS} ({100 * best:.1f} %)", "–", "–"]
    else:
        forms = (("steps", ":g"), ("processor_seconds", ":.1f"), ("seconds", ":.1f"))
        cells += [median_of(runs, key, form) for key, form in forms]
    cells.insert(4, per_example(runs))
    if found["runs"] and name.endswith("auto"):
        name += f" (chose {runs[0]['fraction']:g})"
    return f"| {name} | {' | '.join(cells)} |"


def per_example(runs: Sequence[dict[str, Any]]) -> str:
    """Return the milliseconds of processor that an example took."""
    return f"{statistics.median(1e3 * run['processor_seconds'] / run['examples'] for run in runs):.2f}"


def median_of(runs: Sequence[dict[str, Any]], key: str, form: str) -> str:
    """Return the median, a run that does not reach the target counting as infinitely long."""
    middle = statistics.median(run[key] if run["reached"] else float("inf") for run in runs)
    return ("{" + form + "}").format(middle)


def describe(value: dict[str, Any]) -> str:
    setting = value["setting"]
    others = [run["others"] for found in value["contestants"].values() for run in found["runs"]]
    return "\n".join(
        [
            f"Budget {setting['budget'] / MIB:g} MiB a rank, medians of {len(setting['seeds'])} seeds. Meanwhile other "
            f"work kept {min(others):.1f} to {max(others):.1f} of {setting['cores']} cores busy, so that the wall says "
            "little; the other times are seconds of processor of all ranks, shared by two cores.",
            "",
            table(value),
        ]
    )


def write_page(page: Path, text: str) -> None:
    """Put the results between the marks of a page."""
    before, rest = page.read_text(encoding="utf-8").split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    page.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}", encoding="utf-8")


def setting_of(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "budget": arguments.budget * MIB,
        "width": arguments.width,
        "seeds": list(range(arguments.seeds)),
        "target": TARGET,
        "ranks": RANKS,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "options": {**OPTIONS, "factor_update_steps": FACTOR_STEPS, "inv_update_steps": INVERSE_STEPS},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=Path, required=True, help="file for the results as JSON; it goes on from there"
    )
    parser.add_argument("--page", type=Path, help="page with marks between which the table goes")
    parser.add_argument("--budget", type=int, default=12, help="MiB a rank")
    parser.add_argument("--width", type=int, default=32, help="channels of the first layers")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--contestant", choices=list(CONTESTANTS), help=argparse.SUPPRESS)
    parser.add_argument("--again", action="store_true", help="measure again what has been measured")
    parser.add_argument("--show", action="store_true", help="only show the results of the file")
    parser.add_argument("--through", nargs="+", default=[], help="command that starts each launch")
    arguments = parser.parse_args()
    output = arguments.output
    if arguments.contestant is not None:
        measure(arguments.contestant, json.loads(output.read_text(encoding="utf-8"))["setting"], output)
        return
    if not output.exists():
        write(output, {"setting": setting_of(arguments), "contestants": {}})
    for name, contestant in () if arguments.show else CONTESTANTS.items():
        if contestant.library == "kfac-pytorch" and importlib.util.find_spec("kfac") is None:
            print(f"{name} takes no part: kfac-pytorch is not installed")
        elif arguments.again or name not in json.loads(output.read_text(encoding="utf-8"))["contestants"]:
            launch(name, output, arguments.through)
    value = json.loads(output.read_text(encoding="utf-8"))
    print(describe(value))
    if arguments.page is not None:
        write_page(arguments.page, describe(value))


if __name__ == "__main__":
    main()
