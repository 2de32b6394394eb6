"""Measures this machine for the planner, in under a minute: `kaisa plan --calibrate`.

    first rank alone    products of matrices, many small ones at once, decompositions, copies, a step of training
    all ranks at once   the same product and decomposition again: how much they are in each other's way
    all ranks together  exchanges and sums, small and large, among two and among all

Of what one rank does the fastest repetition counts, because other work on the machine can only add to it; of what ranks
do together the middle one, because they wait for each other in training too. The smallest
sizes tell what a call costs, the largest what the machine can do. A size that would take too long is left out; the
profile goes on from the largest there is.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import pairwise
from math import prod
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from kaisa.kfac import solvers
from kaisa.kfac.collectives import Alone, Collectives
from kaisa.kfac.hardware import Hardware, Link, Table
from kaisa.kfac.preconditioner import KFACPreconditioner
from kaisa.recipes.imagenet_resnets import resnet18, resnet50


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        sides: of products of matrices.
        orders: of decompositions.
        batched_orders: of decompositions of many at once.
        seconds: that one measurement may take, about; what would take twice as long is left out.
        numbers: in the largest message.
        copied: numbers in the copy that tells the bandwidth of the memory.
        images, pixels: of the step of training: how many, and their width and height.
        layers: of the model that tells what a layer costs however small it is.
    """

    sides: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
    orders: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
    batched_orders: tuple[int, ...] = (16, 32, 64, 128, 256)
    seconds: float = 0.5
    numbers: int = 2**22
    copied: int = 2**25
    images: int = 8
    pixels: int = 96
    layers: int = 24


BATCH = 16
"""How many equal matrices are "many at once"."""

DTYPES = {"cpu": (torch.float32, torch.float64, torch.bfloat16)}
CUDA_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SOLVERS = ("eigen", "cholesky", "warm_eigen")

_WHILES = 4  # in which all ranks compute, of which the least disturbed counts

Report = Callable[[str], None]


def calibrate(
    ranks: Collectives,
    device: torch.device,
    *,
    ranks_per_node: int | None = None,
    effort: Effort | None = None,
    report: Report = lambda text: None,
) -> Hardware:
    """Measure the machine that some ranks run on; every rank calls it, and the first has the figures of all.

    Args:
        ranks: how to reach the others.
        device: what each rank computes on.
        ranks_per_node: how many ranks share a node; all of them unless given.
        effort: how much is measured.
        report: is told what is being measured.

    Returns:
        The profile; figures of computation are the first rank's own.
    """
    effort = effort or Effort()
    per_node = ranks_per_node or ranks.world_size
    sheet = _measure_alone(device, effort, report) if ranks.rank == 0 else None
    _meet(ranks, device)
    report("all ranks at once")
    contention = _measure_contention(ranks, device, effort)
    report("exchanges and sums")
    inside, between = _measure_links(ranks, device, effort, per_node)
    sheet = sheet or _Sheet.empty()
    return Hardware(
        name=_describe(device),
        ranks_per_node=per_node,
        products=sheet.products,
        batched_products=sheet.batched_products,
        decompositions=sheet.decompositions,
        batched_decompositions=sheet.batched_decompositions,
        memory_bandwidth=sheet.memory_bandwidth,
        exchange_inside=inside[0],
        exchange_between=between[0],
        total_inside=inside[1],
        total_between=between[1],
        overheads=sheet.overheads,
        training=sheet.training,
        overlap=0.0 if device.type == "cpu" else 1.0,
        contention=contention,
        memory=_memory_of_rank(device, per_node),
        sources=_sources(device, ranks.world_size, per_node),
    )


@dataclass(frozen=True)
class _Sheet:
    """What one rank measures on its own."""

    products: dict[str, Table]
    batched_products: dict[str, Table]
    decompositions: dict[str, Table]
    batched_decompositions: dict[str, Table]
    memory_bandwidth: float
    overheads: dict[str, float]
    training: float

    @classmethod
    def empty(cls) -> _Sheet:
        """Return what the ranks have that do not measure."""
        return cls({}, {}, {}, {}, 0.0, {}, 0.0)


def _measure_alone(device: torch.device, effort: Effort, report: Report) -> _Sheet:
    report("products of matrices")
    dtypes = DTYPES.get(device.type, CUDA_DTYPES)
    products = {_name(dtype): _rates(1, dtype, device, effort) for dtype in dtypes}
    batched = {_name(dtype): _rates(BATCH, dtype, device, effort) for dtype in dtypes}
    report("decompositions")
    alone = {name: _decompositions(name, 1, effort.orders, device, effort) for name in SOLVERS}
    at_once = {name: _decompositions(name, BATCH, effort.batched_orders, device, effort) for name in SOLVERS}
    report("memory and training")
    peak = max(rate for _, rate in products["float32"])
    return _Sheet(
        products,
        batched,
        alone,
        at_once,
        _memory_bandwidth(device, effort),
        _overheads(device, effort, alone["eigen"][0][1]),
        min(1.0, _training_rate(device, effort) / peak),
    )


def fastest(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Return the seconds of the fastest of several runs, of which the first does not count."""
    _timed(run, device)
    best, spent = float("inf"), 0.0
    while spent < seconds / 2:
        last = _timed(run, device)
        best, spent = min(best, last), spent + last
    return best


def _timed(run: Callable[[], object], device: torch.device) -> float:
    _finish(device)
    begin = time.perf_counter()
    run()
    _finish(device)
    return max(time.perf_counter() - begin, 1e-9)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _table(
    sizes: Sequence[int], measure: Callable[[int], float], entry: Callable[[int, float], float], seconds: float
) -> Table:
    """Measure size after size until the next would take too long, if time grows with the third power."""
    rows: list[tuple[float, float]] = []
    for index, size in enumerate(sizes):
        taken = measure(size)
        rows.append((float(size), entry(size, taken)))
        if index + 1 < len(sizes) and taken * (sizes[index + 1] / size) ** 3 > 2 * seconds:
            break
    return tuple(rows)


def _rates(batch: int, dtype: torch.dtype, device: torch.device, effort: Effort) -> Table:
    """Return operations a second of products of square matrices, by their side."""

    def measure(side: int) -> float:
        left, right, out = torch.ones(3, batch, side, side, dtype=dtype, device=device)
        if batch == 1:
            return fastest(lambda: torch.mm(left[0], right[0], out=out[0]), device, effort.seconds / 10)
        return fastest(lambda: torch.bmm(left, right, out=out), device, effort.seconds / 10)

    return _table(effort.sides, measure, lambda side, taken: 2 * batch * side**3 / taken, effort.seconds)


def _decompositions(name: str, batch: int, orders: Sequence[int], device: torch.device, effort: Effort) -> Table:
    """Return seconds of a decomposition by its order, each of ``batch`` at once, as the solver makes them."""
    solver = solvers.named(name)

    def measure(order: int) -> float:
        factor, later = _factors(batch, order, device)
        shift = torch.full((batch,), 0.01, device=device)
        previous = solver.decompose(factor, False, shift, None)
        return fastest(lambda: solver.decompose(later, False, shift, previous), device, effort.seconds / 5)

    return _table(orders, measure, lambda _, taken: taken / batch, effort.seconds)


def _factors(batch: int, order: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return factors and what they are some steps later: turned enough that a warm start has something to do."""
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.logspace(0, -4, order)
    rows = torch.randn(batch, 2 * order, order, generator=generator) * spectrum.sqrt()
    more = torch.randn(batch, order, order, generator=generator) * spectrum.sqrt()
    first = rows.mT @ rows / (2 * order)
    return first.to(device), (0.9 * first + 0.1 * more.mT @ more / order).to(device)


def _memory_bandwidth(device: torch.device, effort: Effort) -> float:
    source = torch.ones(effort.copied, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / fastest(lambda: target.copy_(source), device, effort.seconds)


def _training_rate(device: torch.device, effort: Effort) -> float:
    """Return the operations a second of forward and backward passes of a residual network.

    Normalisation and shortcuts take time and count for no operations, as in the models that are planned.
    """
    is_large = device.type == "cuda"  # which a small model would leave waiting for the host
    images, pixels = (32, 224) if is_large else (effort.images, effort.pixels)
    model = (resnet50() if is_large else resnet18()).to(device)
    x, labels = torch.randn(images, 3, pixels, pixels, device=device), torch.arange(images, device=device)

    def step() -> None:
        model.zero_grad()
        functional.cross_entropy(model(x), labels).backward()

    with FlopCounterMode(display=False) as counter:
        step()
    return float(counter.get_total_flops() / fastest(step, device, effort.seconds))


def _overheads(device: torch.device, effort: Effort, decomposition: float) -> dict[str, float]:
    """Return seconds a layer and phase of layers so small that nothing else counts, all of different shapes."""
    widths = [2 + index for index in range(effort.layers + 1)]
    layers = [nn.Linear(inputs, outputs) for inputs, outputs in pairwise(widths)]
    model = nn.Sequential(*layers).to(device)
    x = torch.randn(2, widths[0], device=device)
    steps: list[dict[str, float]] = []
    for _ in range(5):
        kfac = KFACPreconditioner(model, lr=0.1, factor_update_steps=1, inv_update_steps=1, collectives=Alone())
        for _ in range(2):
            model.zero_grad()
            model(x).square().mean().backward()
            kfac.step()
        steps.append(kfac.timings())
        kfac.close()
    phases = ("statistics", "factors", "inverses", "precondition")
    spent = {phase: min(timings[phase] for timings in steps) / effort.layers for phase in phases}
    # The tables of decompositions have this part already.
    return {**spent, "inverses": max(0.0, spent["inverses"] - 2 * decomposition)}


def _meet(ranks: Collectives, device: torch.device) -> None:
    ranks.total("calibration", tuple(range(ranks.world_size)), torch.zeros(1, device=device))
    _finish(device)


def _measure_contention(ranks: Collectives, device: torch.device, effort: Effort) -> Table:
    """Return by how much work takes longer when so many ranks of a node compute, for one, two, four and so on.

    Of the kinds of work the middle: nobody's step is of one kind.
    """
    runs = _loads(device, effort)
    counts = [2**power for power in range((ranks.world_size - 1).bit_length())] + [ranks.world_size]
    spent = [[_together(ranks, count, run, device, effort.seconds / 4) for run in runs] for count in counts]
    slower = [prod(after / before for after, before in zip(row, spent[0], strict=True)) for row in spent]
    return tuple(
        (float(count), max(1.0, ratio ** (1 / len(runs)))) for count, ratio in zip(counts, slower, strict=True)
    )


def _loads(device: torch.device, effort: Effort) -> list[Callable[[], object]]:
    side = min(512, max(effort.sides))
    left, right = torch.ones(2, side, side, device=device)
    factor, _ = _factors(1, min(256, max(effort.orders)), device)
    solver, shift = solvers.named("eigen"), torch.zeros(1, device=device)
    return [lambda: left @ right, lambda: solver.decompose(factor, False, shift, None)]


def _together(ranks: Collectives, count: int, run: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Return the mean seconds of a run while the first so many ranks are at it: of several whiles, of the fastest.

    The fastest of each rank would be one at which the others were not.
    """
    means = []
    for _ in range(_WHILES):
        _meet(ranks, device)
        own = torch.tensor([_mean_seconds(run, device, seconds) if ranks.rank < count else 0.0], device=device)
        means.append(ranks.total("calibration", tuple(range(ranks.world_size)), own) / count)
    return float(torch.cat(means).min())


def _mean_seconds(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Return the mean of runs for a while."""
    count, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        run()
        _finish(device)
        count += 1
    return (time.perf_counter() - begin) / count


Links = tuple[Link, Link]
"""Of an exchange, and of a sum."""


def _measure_links(ranks: Collectives, device: torch.device, effort: Effort, per_node: int) -> tuple[Links, Links]:
    """Return the links inside a node and between nodes; where there is one node, or one rank a node, as the other."""
    world = ranks.world_size
    nodes = [tuple(range(first, first + per_node)) for first in range(0, world, per_node)]
    across = list(zip(*nodes, strict=True))
    ranks.prepare([*_pairs(nodes), *nodes, *_pairs(across), *across, tuple(range(world))])
    if world == 1:
        nobody = Link(0.0, 0.0, _memory_bandwidth(device, effort))
        return (nobody, nobody), (nobody, nobody)
    inside = _links_of(_Bench(ranks, nodes, device), effort, per_node) if per_node > 1 else None
    between = _links_of(_Bench(ranks, across, device), effort, per_node) if per_node < world else None
    found = inside or between
    assert found is not None
    return inside or found, between or found


def _pairs(groups: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    return [group[first : first + 2] for group in groups for first in range(0, len(group) - 1, 2)]


def _links_of(bench: _Bench, effort: Effort, per_node: int) -> Links:
    return bench.exchange_link(effort.numbers, per_node), bench.total_link(effort.numbers)


@dataclass(frozen=True)
class _Bench:
    """Times collectives of all groups at once.

    Attributes:
        ranks: how to reach the others.
        groups: equally many ranks each.
        device: where messages are.
    """

    ranks: Collectives
    groups: Sequence[tuple[int, ...]]
    device: torch.device

    def exchange_link(self, numbers: int, per_node: int) -> Link:
        """Small messages tell the latency, large ones of one rank its bandwidth, of all what they share in a node."""
        latency, per_peer = self._latencies(self._exchange)
        small = latency + per_peer * self._peers
        one = self._seconds(self.groups, lambda group: self._exchange(group, numbers, senders=self.groups[0][:1]), 9)
        all_at_once = self._seconds(self.groups, lambda group: self._exchange(group, numbers), 9)
        bandwidth = 4 * numbers / max(one - small, 1e-9)
        together = 4 * numbers * per_node / max(all_at_once - small, 1e-9)
        return Link(latency, per_peer, bandwidth, together if together < per_node * bandwidth else None)

    def total_link(self, numbers: int) -> Link:
        """Small messages tell the latency, large ones the bandwidth, in bytes of the tensor that is summed."""
        latency, per_peer = self._latencies(self._total)
        large = self._seconds(self.groups, lambda group: self._total(group, numbers), 9)
        return Link(latency, per_peer, 4 * numbers / max(large - latency - per_peer * self._peers, 1e-9))

    @property
    def _peers(self) -> int:
        return len(self.groups[0]) - 1

    def _latencies(self, collective: Callable[[tuple[int, ...], int], None]) -> tuple[float, float]:
        """Return (latency, latency a peer) of small messages in pairs and in groups."""
        pair = self._seconds(_pairs(self.groups), lambda group: collective(group, 1), 20)
        if self._peers == 1:
            return pair, 0.0
        group = self._seconds(self.groups, lambda group: collective(group, 1), 20)
        per_peer = max(0.0, (group - pair) / (self._peers - 1))
        return max(0.0, pair - per_peer), per_peer

    def _seconds(
        self, groups: Sequence[tuple[int, ...]], collective: Callable[[tuple[int, ...]], None], repeats: int
    ) -> float:
        """Return the middle of the seconds of collectives that begin at the same time on all ranks.

        Not the fastest: that ranks are not all ready at once is part of what a collective costs.
        """
        mine = [group for group in groups if self.ranks.rank in group]
        seconds = [float("inf")]
        for number in range(repeats):
            _meet(self.ranks, self.device)
            if mine:
                taken = _timed(lambda: collective(mine[0]), self.device)
                seconds = [*seconds, taken] if number else [taken]
        return median(seconds)

    def _exchange(self, group: tuple[int, ...], numbers: int, senders: Sequence[int] | None = None) -> None:
        """Send so many numbers, in equal parts to all others of the group; of all ranks or of some."""
        own, share = self.ranks.rank, max(1, numbers // (len(group) - 1))

        def part(sender: int, receiver: int) -> int:
            return share if sender != receiver and (senders is None or sender in senders) else 0

        sent = [torch.zeros(part(own, rank), device=self.device) for rank in group]
        self.ranks.exchange("calibration", group, sent, [part(rank, own) for rank in group])()

    def _total(self, group: tuple[int, ...], numbers: int) -> None:
        self.ranks.total("calibration", group, torch.zeros(numbers, device=self.device))


def _memory_of_rank(device: torch.device, per_node: int) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // per_node
    except (AttributeError, ValueError):  # where the system does not tell
        return None


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} threads a rank"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _sources(device: torch.device, world: int, per_node: int) -> dict[str, str]:
    measured = f"measured on {date.today()} with torch {torch.__version__}"
    alone = f"{measured} by one rank while the others waited"
    together = f"{measured} among {world} ranks"
    nowhere = "one rank has nobody to send to: the bandwidth of the memory stands in"
    inside = nowhere if world == 1 else together if per_node > 1 else "one rank a node: as between nodes"
    between = nowhere if world == 1 else together if per_node < world else "one node: as inside it"
    return {
        **dict.fromkeys(("products", "batched_products", "decompositions", "batched_decompositions"), alone),
        **dict.fromkeys(("memory_bandwidth", "overheads", "training"), alone),
        **dict.fromkeys(("exchange_inside", "total_inside"), inside),
        **dict.fromkeys(("exchange_between", "total_between"), between),
        "contention": together,
        "overlap": "not measured: 0 on a CPU, where the host both computes and sends, 1 elsewhere",
        "memory": "told by the system" + ("" if device.type == "cuda" else ", shared among the ranks of a node"),
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
