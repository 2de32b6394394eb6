r"""Measures what several ranks send, hold and wait for, side by side with kfac-pytorch where it can be imported.

Ranks are processes over gloo, one thread each, on one machine. In every round each contestant takes four steps in
turn: all due, nothing due, factors due, nothing due (factors every 2 steps, decompositions every 4). The median over
rounds of each kind of step makes the time of a step in which factors are due every 10 and decompositions every 100:

    plain + (factor - plain) / 10 + (all - factor) / 100

One meter counts what both libraries hand to ``torch.distributed``, as the mean over ranks of what leaves a rank: an
all-to-all all but its own part; an all-reduce 2 (g - 1) / g of the tensor, which a ring of g ranks needs; a broadcast
(g - 1) / g, for each of the others needs one copy. DistributedDataParallel's own averaging is not counted. Memory is
the most between two steps of factors, decompositions and statistics, which at COMM-OPT wait for the decompositions.
Both precondition the same layers, convolutions and linear layers but not normalisation, and both decompose in float32;
"kaisa, float64" is the library's own choice on a CPU, "kaisa, bfloat16" rounds what travels.

ResNet-20 has 32 images of 3 by 32 by 32 a rank. The BERT-shaped stack is small: 4 blocks of 6 linear layers of width
256 (base has 12 of 768), 8 sequences of 32 tokens a rank.

    python benchmarks/distributed.py --rounds 15 --output benchmarks/results/distributed.json \
        --page docs/how-work-is-placed.md
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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
from kaisa.kfac.transport import Payload
from kaisa.recipes.models import build_model, encoder

OURS, BFLOAT16, FLOAT64, THEIRS = "kaisa", "kaisa, bfloat16", "kaisa, float64", "kfac-pytorch"
CYCLE = ("all", "plain", "factor", "plain")
FACTOR_STEPS, INVERSE_STEPS = 10, 100
MARKS = "<!-- measured -->", "<!-- end of measured -->"
SETTINGS: dict[str, Any] = {"damping": 0.003, "factor_decay": 0.95, "kl_clip": 0.001, "lr": 0.01}


class Meter:
    """Counts the collectives that a rank asks of torch.distributed, and the bytes that leave it for them."""

    def __init__(self) -> None:
        self.bytes = 0.0
        self.calls = 0

    def install(self) -> None:
        """Put itself around the functions of torch.distributed."""
        for name, size in (
            ("all_reduce", lambda ranks, tensor, *_: 2 * (ranks - 1) / ranks * tensor.nbytes),
            ("broadcast", lambda ranks, tensor, *_: (ranks - 1) / ranks * tensor.nbytes),
            ("all_to_all_single", None),
        ):
            setattr(dist, name, self._around(getattr(dist, name), size or self._all_but_its_own))

    def _around(self, function: Callable[..., Any], size: Callable[..., float]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            group = options.get("group")
            tensors = [*arguments, *(value for value in options.values() if isinstance(value, Tensor))]
            if dist.get_world_size(group) > 1:
                self.calls += 1
                self.bytes += size(dist.get_world_size(group), *tensors, *[dist.get_rank(group)])
            return function(*arguments, **options)

        return counted

    @staticmethod
    def _all_but_its_own(_: int, output: Tensor, tensor: Tensor, __: list[int], sizes: list[int], rank: int) -> float:
        return (sum(sizes) - sizes[rank]) * tensor.element_size()


@dataclass
class Contestant:
    """A model that is trained with one library and fraction."""

    library: str
    fraction: float
    model: nn.Module
    optimizer: torch.optim.Optimizer
    kfac: Any
    seconds: dict[str, list[float]] = field(default_factory=lambda: {kind: [] for kind in CYCLE})
    sent: dict[str, tuple[float, int]] = field(default_factory=dict)
    held: list[int] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.library}, {self.fraction:g}"

    def memory(self) -> int:
        """Return the most bytes that were held between two steps."""
        return max(self.held)

    def note_memory(self) -> None:
        """Look what is held between two steps."""
        held = self.kfac.memory_usage()
        kinds = ("factors", "decompositions", "statistics", "a_factors", "g_factors", "a_inverses", "g_inverses")
        self.held.append(sum(held.get(kind, 0) for kind in kinds))


def build(library: str, fraction: float, make: Callable[[], nn.Module]) -> Contestant:
    torch.manual_seed(0)
    model: nn.Module = make()
    if dist.get_world_size() > 1:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=SETTINGS["lr"])
    common = {**SETTINGS, "factor_update_steps": 2, "inv_update_steps": 4, "grad_worker_fraction": fraction}
    if library == THEIRS:
        theirs = importlib.import_module("kfac.preconditioner").KFACPreconditioner
        kfac = theirs(model, loglevel=logging.NOTSET, **common)
    else:
        payload = Payload(statistics=torch.bfloat16, gradients=torch.bfloat16) if library == BFLOAT16 else None
        solver = Eigen(precision=torch.float64 if library == FLOAT64 else torch.float32)
        kfac = kaisa.KFACPreconditioner(
            model, optimizer, layer_options=LayerOptions(norms=False), solver=solver, payload=payload, **common
        )
    return Contestant(library, fraction, model, optimizer, kfac)


def resnet_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(dist.get_rank())
    return torch.randn(32, 3, 32, 32, generator=generator), torch.randint(10, (32,), generator=generator)


def stack_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(dist.get_rank())
    return torch.randn(8, 32, 256, generator=generator), torch.randn(8, 32, 256, generator=generator)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, Tensor]], Callable[..., Tensor]]] = {
    "resnet20": (lambda: build_model("resnet20", (3, 32, 32), 10), resnet_batch, functional.cross_entropy),
    "bert-shaped": (lambda: encoder(4, 256), stack_batch, functional.mse_loss),
}


def take_step(contestant: Contestant, batch: tuple[Tensor, Tensor], loss: Callable[..., Tensor]) -> None:
    contestant.optimizer.zero_grad()
    loss(contestant.model(batch[0]), batch[1]).backward()
    contestant.kfac.step()
    contestant.optimizer.step()


def take_cycle(contestant: Contestant, batch: tuple[Tensor, Tensor], loss: Callable[..., Tensor], meter: Meter) -> None:
    """Take a step of each kind, measured between barriers."""
    for kind in CYCLE:
        dist.barrier()
        sent, calls, start = meter.bytes, meter.calls, time.perf_counter()
        take_step(contestant, batch, loss)
        contestant.sent[kind] = meter.bytes - sent, meter.calls - calls
        dist.barrier()
        contestant.seconds[kind].append(time.perf_counter() - start)
        contestant.note_memory()


def over_ranks(value: float) -> tuple[float, float]:
    """Return the mean and the most over ranks."""
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, value)
    return statistics.fmean(everybody), max(everybody)


def spread(plain: float, factor: float, whole: float) -> float:
    return plain + (factor - plain) / FACTOR_STEPS + (whole - factor) / INVERSE_STEPS


def describe(contestant: Contestant) -> dict[str, Any]:
    kinds = ("plain", "factor", "all")
    milliseconds = [1e3 * statistics.median(contestant.seconds[kind]) for kind in kinds]
    sent = [over_ranks(contestant.sent[kind][0])[0] for kind in kinds]
    calls = [over_ranks(contestant.sent[kind][1])[1] for kind in kinds]
    mean, most = over_ranks(contestant.memory())
    return {
        "library": contestant.library,
        "fraction": contestant.fraction,
        "milliseconds": {**dict(zip(kinds, milliseconds, strict=True)), "step": spread(*milliseconds)},
        "bytes": {
            "factor_update": sent[1] - sent[0],
            "inverse_update": sent[2] - sent[1],
            "plain_step": sent[0],
            "step": spread(*sent),
        },
        "collectives": {
            "factor_update": calls[1] - calls[0],
            "inverse_update": calls[2] - calls[1],
            "plain_step": calls[0],
            "step": spread(*calls),
            "all_due": calls[2],
        },
        "memory": {"mean": mean, "most": most},
    }


@contextmanager
def joined() -> Iterator[None]:
    dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=5))
    try:
        yield
    finally:
        dist.destroy_process_group()


def has_peer() -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it speaks of Apex
        try:
            importlib.import_module("kfac.preconditioner")
        except ImportError:
            return False
    return True


def measure(model: str, rounds: int, output: Path) -> None:
    """Run as one of the ranks; the first adds its results to the file after every round."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Full backward hook is firing")  # kfac-pytorch's
    make, make_batch, loss = MODELS[model]
    meter = Meter()
    with joined():
        meter.install()
        world = dist.get_world_size()
        fractions = [workers / world for workers in (4, 2, 1) if workers <= world]
        entries = [(library, fraction) for fraction in fractions for library in (OURS, THEIRS)]
        entries += [(FLOAT64, 1.0), *([(BFLOAT16, min(fractions))] if world > 1 else [])]
        contestants = [build(*entry, make) for entry in entries if entry[0] != THEIRS or has_peer()]
        batch = make_batch()
        for contestant in contestants:  # to warm up
            take_cycle(contestant, batch, loss, meter)
            contestant.seconds = {kind: [] for kind in CYCLE}
        for number in range(rounds):
            for contestant in contestants[number % len(contestants) :] + contestants[: number % len(contestants)]:
                take_cycle(contestant, batch, loss, meter)
            results = [describe(contestant) for contestant in contestants]
            if dist.get_rank() == 0:
                put(output, {"model": model, "ranks": world, "rounds": number + 1, "results": results})


def put(output: Path, entry: dict[str, Any]) -> None:
    """Add measurements to the file, in place of earlier ones of the same model and ranks."""
    value = json.loads(output.read_text())
    key = entry["model"], entry["ranks"]
    value["measurements"] = [old for old in value["measurements"] if (old["model"], old["ranks"]) != key]
    value["measurements"].append(entry)
    value["targets"] = judge(value["measurements"])
    partial = output.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    partial.replace(output)


def judge(measurements: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return our figures relative to those of kfac-pytorch, and what they should be at most."""
    rows = []
    for entry in measurements:
        ours, bfloat16, theirs = (
            {row["fraction"]: row for row in entry["results"] if row["library"] == library}
            for library in (OURS, BFLOAT16, THEIRS)
        )
        if not theirs:
            continue
        fastest = min(row["milliseconds"]["step"] for row in theirs.values())
        where = {"model": entry["model"], "ranks": entry["ranks"]}
        rows.append(
            {**where, **ratio("step time, COMM-OPT to their fastest", ours[1.0]["milliseconds"]["step"], fastest, 1.0)}
        )
        if entry["ranks"] == 1:
            continue
        for fraction in ours:
            times = [rows_[fraction]["milliseconds"]["step"] for rows_ in (ours, theirs)]
            rows.append({**where, **ratio(f"step time, both at fraction {fraction:g}", *times, 1.0)})
        for fraction in ours:
            sent = [rows_[fraction]["bytes"]["step"] for rows_ in (ours, theirs)]
            rows.append({**where, **ratio(f"bytes of a step, fraction {fraction:g}", *sent, 1.0)})
        least = min(ours)
        sent = [rows_[least]["bytes"]["factor_update"] for rows_ in (ours, bfloat16, theirs)]
        rows.append({**where, **ratio("bytes of a factor update", sent[0], sent[2], 0.25)})
        rows.append({**where, **ratio("bytes of a factor update, bfloat16", sent[1], sent[2], 0.25)})
        # At COMM-OPT statistics wait for the decompositions, so that several updates are one exchange.
        average = ours[least]["bytes"]["factor_update"] * FACTOR_STEPS / INVERSE_STEPS
        rows.append({**where, **ratio("bytes of a factor update, COMM-OPT, on average", average, sent[2], 0.25)})
        for fraction, row in ours.items():
            for kind in ("step", "all_due"):
                name = f"collectives of a step, {kind.replace('_', ' ')}, fraction {fraction:g}"
                other = theirs[fraction]["collectives"][kind]
                rows.append({**where, **ratio(name, row["collectives"][kind], other, 0.1)})
        memory = [row[least]["memory"]["most"] for row in (ours, theirs)]
        rows.append({**where, **ratio(f"memory at fraction {least:g}", *memory, 0.5)})
    return rows


def ratio(name: str, ours: float, theirs: float, most: float) -> dict[str, Any]:
    value = ours / theirs
    return {"figure": name, "ours": ours, "theirs": theirs, "ratio": value, "at_most": most, "reached": value <= most}


def show(value: dict[str, Any]) -> None:
    for entry in value["measurements"]:
        print(f"\n{entry['model']}, {entry['ranks']} ranks, medians of {entry['rounds']} rounds")
        heads = (
            "ms a step",
            "plain",
            "factor",
            "all due",
            "B factor",
            "B inverse",
            "B plain",
            "calls all due",
            "bytes",
        )
        print(f"{'library, fraction':26}" + "".join(f"{head:>14}" for head in heads))
        for row in entry["results"]:
            times, sent = row["milliseconds"], row["bytes"]
            figures = [times["step"], times["plain"], times["factor"], times["all"]]
            figures += [sent["factor_update"], sent["inverse_update"], sent["plain_step"]]
            figures += [row["collectives"]["all_due"], row["memory"]["most"]]
            label = f"{row['library']}, {row['fraction']:g}"
            print(f"{label:26}" + "".join(f"{figure:14,.1f}" for figure in figures))
    for row in value["targets"]:
        verdict = "reached" if row["reached"] else "missed"
        outcome = f"{row['ratio']:8.4f} of {row['at_most']} {verdict}"
        print(f"{row['model']:12}{row['ranks']} ranks  {row['figure']:46}{outcome}")


def write_page(value: dict[str, Any], page: Path) -> None:
    """Put the measurements into a page, between its two marks."""
    before, rest = page.read_text().split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    page.write_text(before + MARKS[0] + "\n" + "\n".join(page_lines(value)) + "\n" + MARKS[1] + after)


def page_lines(value: dict[str, Any]) -> Iterator[str]:
    heads = (
        "ms a step",
        "kB a factor update",
        "kB an inverse update",
        "kB a plain step",
        "collectives, all due",
        "kB held",
    )
    for entry in value["measurements"]:
        yield f"\n{entry['model']}, {entry['ranks']} ranks, medians of {entry['rounds']} rounds:\n"
        yield "| library, fraction | " + " | ".join(heads) + " |"
        yield "|---|" + "---:|" * len(heads)
        for row in entry["results"]:
            sent = row["bytes"]
            sizes = (sent["factor_update"], sent["inverse_update"], sent["plain_step"])
            cells = [f"{row['milliseconds']['step']:.1f}", *(f"{size / 1e3:,.0f}" for size in sizes)]
            cells += [f"{row['collectives']['all_due']:g}", f"{row['memory']['most'] / 1e3:,.0f}"]
            yield f"| {row['library']}, {row['fraction']:g} | " + " | ".join(cells) + " |"
    yield "\n| model | ranks | relative to kfac-pytorch | ratio | at most | |"
    yield "|---|---:|---|---:|---:|---|"
    for row in value["targets"]:
        verdict = "reached" if row["reached"] else "missed"
        cells = [row["model"], str(row["ranks"]), row["figure"], f"{row['ratio']:.4f}", str(row["at_most"]), verdict]
        yield "| " + " | ".join(cells) + " |"


def setting() -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "threads": 1,
        "backend": "gloo",
        "seed": 0,
        "schedule": {"factor_update_steps": FACTOR_STEPS, "inv_update_steps": INVERSE_STEPS},
        "options": SETTINGS,
        "peer": has_peer(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="file for the results as JSON")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=sorted(MODELS))
    parser.add_argument("--page", type=Path, help="page to put the figures into")
    parser.add_argument("--show", action="store_true", help="only show the results of the file")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        measure(arguments.models[0], arguments.rounds, arguments.output)
        return
    if not arguments.show:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps({"setting": setting(), "measurements": [], "targets": []}) + "\n")
        for model in arguments.models:
            for ranks in arguments.ranks:
                launch(ranks, model, arguments.rounds, arguments.output)
    value = json.loads(arguments.output.read_text())
    value["targets"] = judge(value["measurements"])
    show(value)
    if arguments.page:
        write_page(value, arguments.page)


def launch(ranks: int, model: str, rounds: int, output: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", __file__]
    command += ["--models", model, "--rounds", str(rounds), "--output", str(output)]
    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)


if __name__ == "__main__":
    main()
