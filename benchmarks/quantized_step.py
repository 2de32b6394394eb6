"""Times training steps in few bits beside those of the float model, in one interleaved run.

    transformer    12 blocks, 768 features, sequences of 128 tokens: products in integers, and simulated
    resnet20       128 images of 32 × 32: simulated

One model takes all of the steps: between them its layers change their class. A round runs a step of every way in
turning order; a figure is the median over rounds of (step / float32's step of that round).

    python benchmarks/quantized_step.py --output benchmarks/results/quantized_step.json

With one thread the clock is the time of the processor, which other programs hardly disturb; with more it is real time,
and the machine should be quiet.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kaisa.quantize import QuantConfig, convert, prepare
from kaisa.recipes.language_models import Gpt2, Width
from kaisa.recipes.models import build_model
from kaisa.recipes.record import describe_machine, describe_versions, find_commit

TOKENS, POSITIONS = 1000, 128

FLOAT, BFLOAT16 = "float32", "bfloat16 autocast"
SIMULATED: dict[str, QuantConfig | None] = {
    FLOAT: None,
    "simulated qat": QuantConfig(mode="qat"),
    **{f"simulated {kind}": QuantConfig(quantizer=kind) for kind in ("ptq", "psq", "bhq")},
}
IN_INTEGERS: dict[str, QuantConfig | None] = {
    "int8 ptq": QuantConfig(quantizer="ptq", execution="int8"),
    "int8 bhq, ptq weights": QuantConfig(quantizer="bhq", weight_gradient_quantizer="ptq", execution="int8"),
    "int8 bhq": QuantConfig(quantizer="bhq", execution="int8"),
}


@dataclass(frozen=True)
class Workload:
    """A model, its loss on one batch, and the ways in which it is trained."""

    model: nn.Module
    loss: Callable[[nn.Module], Tensor]
    ways: dict[str, QuantConfig | None]


def transformer(blocks: int, batch: int) -> Workload:
    tokens = torch.randint(TOKENS, (batch, POSITIONS))

    def loss(model: nn.Module) -> Tensor:
        return F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    ways = {FLOAT: None, BFLOAT16: None, **IN_INTEGERS, "simulated ptq": SIMULATED["simulated ptq"]}
    ways["simulated bhq"] = SIMULATED["simulated bhq"]
    return Workload(Gpt2(Width(blocks, 768, 12, 3072, TOKENS, POSITIONS)), loss, ways)


def resnet20() -> Workload:
    images, labels = torch.randn(128, 3, 32, 32), torch.randint(10, (128,))
    model = build_model("resnet20", (3, 32, 32), 10)
    return Workload(model, lambda model: F.cross_entropy(model(images), labels), SIMULATED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="*", default=["transformer", "resnet20"])
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--batch", type=int, default=16, help="sequences")
    parser.add_argument("--ways", nargs="*", help="those to time beside float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="is added to, if there")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    clock = time.process_time if given.threads == 1 else time.perf_counter
    results = _begun(given.output)
    for name in given.workloads:
        workload = transformer(given.blocks, given.batch) if name == "transformer" else resnet20()
        ways = {FLOAT: None, **{way: workload.ways[way] for way in given.ways or workload.ways}}
        seconds = measure(workload, ways, given.rounds, clock)
        title = f"{name}, {given.blocks} × {given.batch * POSITIONS}" if name == "transformer" else name
        rows = [row for row in results["rows"] if (row["workload"], row["threads"]) != (title, given.threads)]
        origin = {"date": datetime.now(UTC).date().isoformat(), "commit": find_commit()}
        results["rows"] = rows + [
            {"workload": title, "threads": given.threads, "way": way, **_summary(times, seconds[FLOAT]), **origin}
            for way, times in seconds.items()
        ]
        for row in results["rows"]:
            print(
                f"{row['workload']:24} {row['threads']} threads  {row['way']:24} {row['ratio']:.2f} of float32's step"
            )
    if given.output is not None:
        given.output.write_text(json.dumps(results, indent=1) + "\n", "utf-8")


def _begun(output: Path | None) -> dict[str, Any]:
    """Return machine and versions, and the rows that are there, each with the commit that it was measured at."""
    about = {"machine": describe_machine(), "versions": describe_versions()}
    about["clock"] = "processor time with one thread, real time with more"
    known = json.loads(output.read_text("utf-8")) if output is not None and output.exists() else {"rows": []}
    shared = {"commit": known["commit"]} if "commit" in known else {}  # of older files, one for all rows
    return {**about, "rows": [{**shared, **row} for row in known["rows"]]}


def measure(
    workload: Workload, ways: dict[str, QuantConfig | None], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Return the seconds of every step by way; a first round warms up."""
    optimizer = torch.optim.SGD(workload.model.parameters(), 1e-4, momentum=0.9)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    names = list(ways)
    for index in range(rounds + 1):
        turn = index % len(names)
        for way in names[turn:] + names[:turn]:
            config = ways[way]
            model = convert(workload.model) if config is None else prepare(workload.model, config)
            start = clock()
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=way == BFLOAT16):
                loss = workload.loss(model)
            loss.backward()
            optimizer.step()
            if index:
                seconds[way].append(clock() - start)
    return seconds


def _summary(times: list[float], reference: list[float]) -> dict[str, float]:
    ratios = [own / other for own, other in zip(times, reference, strict=True)]
    middle = statistics.median(ratios)
    return {
        "milliseconds": round(1e3 * statistics.median(times), 1),
        "ratio": round(middle, 3),
        "speed": round(1 / middle, 3),
        "lowest_ratio": round(min(ratios), 3),
        "highest_ratio": round(max(ratios), 3),
        "rounds": len(times),
    }


if __name__ == "__main__":
    main()
