"""Times three ways to the input factors of the convolutions of a ResNet-20, and their errors.

``unfold`` multiplies what ``torch.nn.functional.unfold`` returns. ``autocorrelation`` finds shifts of
both signs and leaves the border wrong; it is the part of the work that cannot be avoided, not a
factor. ``factor`` is ``kaisa.kfac.convolution.input_factor``, and ``output`` its ``output_factor``.
Errors are against unfolding in float64, relative to the largest entry.

    python benchmarks/convolution_factors.py --output benchmarks/results/convolution_factors.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kaisa.kfac.convolution import Geometry, input_factor, output_factor


class Layer(NamedTuple):
    inputs: int
    outputs: int
    size: int
    stride: int
    count: int


RESNET20 = [
    Layer(3, 16, 32, 1, 1),
    Layer(16, 16, 32, 1, 6),
    Layer(16, 32, 32, 2, 1),
    Layer(32, 32, 16, 1, 5),
    Layer(32, 64, 16, 2, 1),
    Layer(64, 64, 8, 1, 5),
]
MEMORY = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}


def unfolded(x: Tensor, stride: int) -> Tensor:
    columns = F.unfold(x, 3, padding=1, stride=stride)
    return torch.bmm(columns, columns.mT).sum(0)


def autocorrelation(x: Tensor) -> Tensor:
    weight = x.new_empty(x.shape[1], x.shape[1], 5, 5)
    return torch.ops.aten.convolution_backward(
        x, x, weight, None, [1, 1], [2, 2], [1, 1], False, [0, 0], 1, [False, True, False]
    )[1]


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    """Return the median time of a call, after two to warm up."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[2:])


def measure(layer: Layer, memory: str, batch: int, repeats: int) -> dict[str, object]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, layer.inputs, layer.size, layer.size, generator=generator)
    side = layer.size // layer.stride
    grad = torch.randn(batch, layer.outputs, side, side, generator=generator)
    x, grad = (value.contiguous(memory_format=MEMORY[memory]) for value in (x, grad))
    geometry = Geometry.of(nn.Conv2d(layer.inputs, layer.outputs, 3, layer.stride, padding=1))
    exact = unfolded(x.double(), layer.stride)

    def error(factor: Tensor) -> float:
        return ((factor - exact).abs().max() / exact.abs().max()).item()

    return {
        **layer._asdict(),
        "memory": memory,
        "unfold_ms": milliseconds(lambda: unfolded(x, layer.stride), min(repeats, 3)),
        "autocorrelation_ms": (milliseconds(lambda: autocorrelation(x), repeats) if layer.stride == 1 else None),
        "factor_ms": milliseconds(lambda: input_factor(x, geometry, bias=False), repeats),
        "output_ms": milliseconds(lambda: output_factor(grad), repeats),
        "unfold_error": error(unfolded(x, layer.stride)),
        "factor_error": error(input_factor(x, geometry, bias=False)),
        "factor_error_float64": error(input_factor(x.double(), geometry, bias=False)),
    }


def totals(rows: list[dict[str, object]]) -> dict[str, dict[str, float]]:
    """Return the milliseconds of all layers of the network, by memory format and way."""
    ways = ("unfold_ms", "factor_ms", "output_ms")
    return {
        memory: {way: sum(row["count"] * row[way] for row in rows if row["memory"] == memory) for way in ways}
        for memory in MEMORY
    }


def show(rows: list[dict[str, object]]) -> None:
    print("  layer                     count  unfold  autocorr.  factor  output    error  (ms)")
    for row in rows:
        name = f"{row['inputs']:2} x {row['size']}² / {row['stride']}, {row['memory']}"
        shifts = row["autocorrelation_ms"]
        print(
            f"  {name:26}{row['count']:4}{row['unfold_ms']:8.1f}"
            f"{'-' if shifts is None else f'{shifts:.1f}':>11}"
            f"{row['factor_ms']:8.1f}{row['output_ms']:8.2f}{row['factor_error']:9.0e}"
        )
    for memory, total in totals(rows).items():
        print(f"  all layers, {memory}: " + ", ".join(f"{k} {v:.0f}" for k, v in total.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="file for the results as JSON")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with torch.no_grad():
        rows = [measure(layer, memory, arguments.batch, arguments.repeats) for layer in RESNET20 for memory in MEMORY]
    show(rows)
    if arguments.output:
        setting = {
            "batch": arguments.batch,
            "threads": arguments.threads,
            "seed": 0,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        }
        results = {"setting": setting, "layers": rows, "totals": totals(rows)}
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
