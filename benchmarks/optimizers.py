"""Times training steps of first-order optimizers and of AdaHessian side by side, in one interleaved run.

Every contestant trains its own copy of one model on the same batch. A round runs, in turning order, a step of each
kind with each contestant:

    plain      a gradient and an update
    hessian    and a product of the Hessian with a probe, where the contestant computes one

A ratio is the median over rounds of (step / SGD's step of that round), so that a slow minute slows both; `update` is
the part of the optimizer alone, over AdamW's. The average at update period p is composed: one hessian step and p - 1
plain ones. The clock is the processor time of one thread, which other programs hardly disturb, or real time on a GPU.
Peak memory is that of a process of its own, less that of the same with SGD.

    python benchmarks/optimizers.py --output benchmarks/results/optimizers.json

A new contestant is one entry of CONTESTANTS. Others' optimizers take part when they can be imported.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import step_time
import torch
from rich.console import Console
from rich.table import Table
from step_time import Settings, Workload
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from kaisa.optim import ARSG, RSG, AdaHessian

PLAIN, HESSIAN = "plain", "hessian"
PERIODS = (1, 2, 5, 10)
RATE = 1e-4  # small: the batch never changes and must not be learnt by heart
Optimizer = torch.optim.Optimizer

WORKLOADS: dict[str, Callable[[], Workload]] = {
    "resnet20": partial(step_time.resnet20, 32),
    "transformer": partial(step_time.transformer, 8, 64, 128, 2, 500),
    "tiny": step_time.tiny,
}


# ---------------------------------------------------------------------------------------------------- contestants


Closure = Callable[..., Tensor]  # from where a part of the batch begins and ends, 0 to 1, to its mean loss


def plain_backward(optimizer: Any, closure: Closure, is_due: bool) -> None:
    closure().backward()


def graph_backward(optimizer: Any, closure: Closure, is_due: bool) -> None:
    closure().backward(create_graph=is_due)


def own_backward(optimizer: Any, closure: Closure, is_due: bool) -> None:
    optimizer.backward(closure())


def quarter_backward(optimizer: Any, closure: Closure, is_due: bool) -> None:
    """The Hessian of a quarter of the examples, which is exact for these."""
    if not is_due:
        closure().backward()
        return
    optimizer.backward(closure(0, 0.25) / 4, share=0.25)
    (0.75 * closure(0.25, 1)).backward()


def quarter_difference_backward(optimizer: Any, closure: Closure, is_due: bool) -> None:
    """The same by differences, so that three quarters of the examples are seen once and one twice."""
    if not is_due:
        closure().backward()
        return
    optimizer.backward_by_difference(lambda: closure(0, 0.25) / 4, share=0.25)
    (0.75 * closure(0.25, 1)).backward()


def difference_backward(optimizer: Any, closure: Closure, is_due: bool) -> None:
    optimizer.backward_by_difference(closure)


def peers_adahessian(parameters: Any) -> Optimizer:
    from pytorch_optimizer import AdaHessian as Peer

    return Peer(parameters, lr=RATE, eps=1e-4, update_period=2)


@dataclass(frozen=True)
class Contestant:
    """How an optimizer is made, how gradients are computed for it, and which module it needs.

    One with kinds alternates between them: its optimizer has an update period of 2.
    """

    make: Callable[[Any], Optimizer]
    backward: Callable[[Any, Closure, bool], None] = plain_backward
    kinds: tuple[str, ...] = (PLAIN,)
    needs: str | None = None


BOTH = (HESSIAN, PLAIN)
CONTESTANTS = {
    "sgd": Contestant(partial(torch.optim.SGD, lr=RATE, momentum=0.9)),
    "adamw": Contestant(partial(torch.optim.AdamW, lr=RATE)),
    "adamw, foreach": Contestant(partial(torch.optim.AdamW, lr=RATE, foreach=True)),
    "kaisa rsg": Contestant(partial(RSG, lr=RATE)),
    "kaisa arsg": Contestant(partial(ARSG, lr=RATE)),
    "kaisa adahessian": Contestant(partial(AdaHessian, lr=RATE, update_period=2), own_backward, BOTH),
    "kaisa adahessian, one by one": Contestant(
        partial(AdaHessian, lr=RATE, update_period=2, foreach=False), own_backward, BOTH
    ),
    "kaisa adahessian, differences": Contestant(
        partial(AdaHessian, lr=RATE, update_period=2), difference_backward, BOTH
    ),
    "kaisa adahessian, a quarter": Contestant(partial(AdaHessian, lr=RATE, update_period=2), quarter_backward, BOTH),
    "kaisa adahessian, differences of a quarter": Contestant(
        partial(AdaHessian, lr=RATE, update_period=2), quarter_difference_backward, BOTH
    ),
    "pytorch-optimizer adahessian": Contestant(peers_adahessian, graph_backward, BOTH, "pytorch_optimizer"),
}


# ------------------------------------------------------------------------------------------------------ measurement


class Trainer:
    """A model and its optimizer; remembers how long steps took, and the optimizer's part of them."""

    def __init__(self, contestant: Contestant, workload: Workload, settings: Settings) -> None:
        self.contestant, self.workload, self.settings = contestant, workload, settings
        self.model: nn.Module = settings.model(workload)
        self.optimizer = contestant.make(self.model.parameters())
        self.seconds: dict[str, list[float]] = {kind: [] for kind in contestant.kinds}
        self.updates: dict[str, list[float]] = {kind: [] for kind in contestant.kinds}

    def step(self, kind: str, inputs: Tensor, targets: Tensor) -> None:
        start = self.now()
        self.contestant.backward(self.optimizer, partial(self.loss, inputs, targets), kind == HESSIAN)
        middle = self.now()
        self.optimizer.step()
        end = self.now()
        self.optimizer.zero_grad()
        self.seconds[kind].append(self.now() - start)
        self.updates[kind].append(end - middle)

    def loss(self, inputs: Tensor, targets: Tensor, begin: float = 0.0, end: float = 1.0) -> Tensor:
        rows = slice(int(begin * len(inputs)), int(end * len(inputs)))
        return self.workload.loss(self.model(inputs[rows]), targets[rows])

    def round(self, inputs: Tensor, targets: Tensor) -> None:
        for kind in self.contestant.kinds:
            self.step(kind, inputs, targets)

    def now(self) -> float:
        if self.settings.device == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()


def measure(workload: Workload, settings: Settings, names: Sequence[str], rounds: int) -> dict[str, Any]:
    batch = settings.batch(workload)
    trainers = {name: Trainer(CONTESTANTS[name], workload, settings) for name in names}
    for trainer in trainers.values():
        trainer.round(*batch)
        trainer.round(*batch)
    for trainer in trainers.values():
        trainer.seconds = {kind: [] for kind in trainer.seconds}
        trainer.updates = {kind: [] for kind in trainer.updates}
    order = list(trainers)
    for number in range(rounds):
        shift = number % len(order)
        for name in order[shift:] + order[:shift]:
            trainers[name].round(*batch)
    result = {name: _summary(trainer, trainers) for name, trainer in trainers.items()}
    for row in result.values():
        row["average"] = {str(period): average(row["steps"], period) for period in PERIODS}
    return result


def _summary(trainer: Trainer, trainers: dict[str, Trainer]) -> dict[str, Any]:
    sgd, adamw = trainers["sgd"].seconds[PLAIN], trainers["adamw"].updates[PLAIN]
    return {
        "steps": {
            kind: {
                "milliseconds": _quartiles([1000 * value for value in seconds]),
                "ratio": _quartiles([a / b for a, b in zip(seconds, sgd, strict=True)]),
                "update": _quartiles([a / b for a, b in zip(trainer.updates[kind], adamw, strict=True)]),
            }
            for kind, seconds in trainer.seconds.items()
        }
    }


def _quartiles(values: Sequence[float]) -> list[float]:
    return [round(value, 4) for value in statistics.quantiles(values, n=4, method="inclusive")]


def average(steps: dict[str, Any], period: int) -> float:
    """Returns the mean ratio over one hessian step and the plain ones that follow it."""
    plain = steps[PLAIN]["ratio"][1]
    due = steps.get(HESSIAN, steps[PLAIN])["ratio"][1]
    return round((due + (period - 1) * plain) / period, 4)


def peak_bytes(name: str, workload: Workload, settings: Settings) -> int:
    """Runs both kinds of step in this process and returns its peak memory."""
    batch = settings.batch(workload)
    trainer = Trainer(CONTESTANTS[name], workload, settings)
    for _ in range(3):
        trainer.round(*batch)
    if settings.device == "cuda":
        return torch.cuda.max_memory_allocated()
    return step_time.peak_of_process()


def extra_peaks(names: Sequence[str], workload: str, options: argparse.Namespace) -> dict[str, int]:
    """Returns the median peak of processes of their own, less SGD's."""
    peaks: dict[str, list[int]] = {name: [] for name in names}
    for _ in range(options.processes):
        for name in names:
            command = [sys.executable, __file__, "--memory-of", name, "--workloads", workload]
            done = subprocess.run([*command, "--device", options.device], capture_output=True, text=True, check=True)
            peaks[name].append(int(done.stdout))
    medians = {name: statistics.median(values) for name, values in peaks.items()}
    return {name: int(median - medians["sgd"]) for name, median in medians.items()}


def targets(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns each goal of the project with what was measured."""
    rows: list[tuple[str, float, float]] = []
    rows_of, memory = result["contestants"], result.get("extra_peak_bytes", {})
    peer = "pytorch-optimizer adahessian"
    if {"kaisa arsg", "adamw, foreach"} <= rows_of.keys():
        updates = [rows_of[name]["steps"][PLAIN]["update"][1] for name in ("kaisa arsg", "adamw, foreach")]
        rows.append(("kaisa arsg: update / AdamW's, both foreach", round(updates[0] / updates[1], 4), 1.1))
    for name in (name for name in rows_of if name.startswith("kaisa adahessian")):
        for period, bound in ((1, 2.2), (5, 1.3)):
            rows.append((f"{name}: period {period} / SGD", rows_of[name]["average"][str(period)], bound))
        if peer in rows_of:
            for kind in BOTH:
                ratio = rows_of[name]["steps"][kind]["ratio"][1] / rows_of[peer]["steps"][kind]["ratio"][1]
                rows.append((f"{name}: {kind} step / pytorch-optimizer's", round(ratio, 4), 1.0))
        if peer in memory:
            difference = (memory[name] - memory[peer]) / 2**20
            rows.append((f"{name}: peak less pytorch-optimizer's, MiB", round(difference, 2), 0.0))
    return [{"goal": goal, "measured": found, "bound": bound, "met": found <= bound} for goal, found, bound in rows]


# ------------------------------------------------------------------------------------------------------------ report


def tables(name: str, result: dict[str, Any]) -> list[Table]:
    sgd = result["contestants"]["sgd"]["steps"][PLAIN]["milliseconds"][1]
    table = Table(title=f"{name}: median step over SGD's ({sgd:.1f} ms)")
    columns = ("", PLAIN, HESSIAN, *(f"period {period}" for period in PERIODS), "update / AdamW's", "peak MiB")
    for column in columns:
        table.add_column(column, justify="left" if not column else "right")
    for contestant, row in result["contestants"].items():
        steps, memory = row["steps"], result.get("extra_peak_bytes", {}).get(contestant)
        table.add_row(
            contestant,
            *(f"{steps[kind]['ratio'][1]:.2f}" if kind in steps else "" for kind in (PLAIN, HESSIAN)),
            *(f"{row['average'][str(period)]:.2f}" for period in PERIODS),
            f"{steps[PLAIN]['update'][1]:.2f}",
            "" if memory is None else f"{memory / 2**20:.1f}",
        )
    goals = Table(title=f"{name}: goals")
    for column in ("goal", "at most", "measured", "met"):
        goals.add_column(column)
    for goal in result["targets"]:
        met = "[green]yes[/green]" if goal["met"] else "[red]no[/red]"
        goals.add_row(goal["goal"], f"{goal['bound']:g}", f"{goal['measured']:.3g}", met)
    return [table, goals]


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=["resnet20", "transformer"])
    parser.add_argument("--contestants", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--processes", type=int, default=2, help="for peak memory, of each contestant; 0 for none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON")
    parser.add_argument("--memory-of", choices=list(CONTESTANTS), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    present = [
        name
        for name in options.contestants
        if CONTESTANTS[name].needs is None or importlib.util.find_spec(CONTESTANTS[name].needs) is not None
    ]
    options.contestants = [*(name for name in ("sgd", "adamw") if name not in present), *present]
    return options


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments(argv)
    warnings.filterwarnings("ignore", message="Using backward\\(\\) with create_graph=True")
    if options.device == "cpu":
        torch.set_num_threads(1)
    settings = Settings(options.device, seed=options.seed)
    for contestant in CONTESTANTS.values():  # in every process, so that peaks of memory hold the same modules
        if contestant.needs is not None and importlib.util.find_spec(contestant.needs) is not None:
            importlib.import_module(contestant.needs)
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        if options.memory_of:
            print(peak_bytes(options.memory_of, WORKLOADS[options.workloads[0]](), settings))
            return
        _report(options, settings)


def _report(options: argparse.Namespace, settings: Settings) -> None:
    console = Console()
    report: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": step_time.commit(),
        "machine": step_time.machine(options.device),
        "settings": {key: value for key, value in vars(options).items() if key not in ("output", "memory_of")},
        "workloads": {},
    }
    for name in options.workloads:
        result: dict[str, Any] = {
            "contestants": measure(WORKLOADS[name](), settings, options.contestants, options.rounds)
        }
        if options.processes:
            result["extra_peak_bytes"] = extra_peaks(options.contestants, name, options)
        result["targets"] = targets(result)
        report["workloads"][name] = result
        if options.output:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(report, indent=1) + "\n")
        for table in tables(name, result):
            console.print(table)


if __name__ == "__main__":
    main()
