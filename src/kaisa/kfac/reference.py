"""The reference implementation as a cost model, to hold ours against what was published of it (arXiv 2107.01739).

    memory     every rank holds all factors; gradient workers eigenvectors and all 1 / (v_G v_Aᵀ + λ)
    factors    a ring sums all of them over all ranks
    inverses   each layer is decomposed by one rank and sent to its gradient workers by a broadcast of its own
    gradients  each layer is preconditioned by its column and sent along the rows by a broadcast of its own, every step

Its broadcasts wait for each other, layer by layer. One among 2 V100 took 0.67 ms and one among 64 took 1.28 ms (Figure
7: 36 and 69 ms for the 54 layers of ResNet-50), which ``BROADCAST`` repeats. Pure Python: no torch.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from kaisa.kfac.hardware import Hardware
from kaisa.kfac.placement import LayerShape, Placement
from kaisa.kfac.prediction import predict
from kaisa.kfac.shares import by_column, over_ranks, row_length
from kaisa.kfac.workload import Settings, Workload

BROADCAST = (0.55e-3, 0.12e-3)
"""Seconds of a small broadcast, and more for each doubling of its ranks."""


def replicated_memory(
    shapes: Sequence[LayerShape], placement: Placement, factor_bytes: int = 4, decomposition_bytes: int = 4
) -> list[int]:
    """Returns by rank the bytes that the reference implementation holds."""
    factors = sum(shape.a.elements + shape.g.elements for shape in shapes)
    columns = by_column(placement, shapes, lambda s: s.a.elements + s.g.elements + s.gradient_elements)
    return [int(factor_bytes * factors + decomposition_bytes * column) for column in over_ranks(placement, columns)]


def replicated_seconds(workload: Workload, placement: Placement, hardware: Hardware, settings: Settings) -> float:
    """Returns the seconds of the reference implementation's average step.

    Args:
        workload: the model.
        placement: who does what.
        hardware: the machine.
        settings: how K-FAC was told to work.
    """
    parts = predict(workload, placement, hardware, replace(settings, deferred=False)).parts
    shapes = workload.shapes
    numbers = sum(shape.a.elements + shape.g.elements for shape in shapes)
    ring = 2 * (placement.world_size - 1) / placement.world_size * settings.factor_bytes * numbers
    is_inside = placement.world_size <= hardware.ranks_per_node
    link = hardware.total_inside if is_inside else hardware.total_between
    held = max(by_column(placement, shapes, lambda s: s.a.elements + s.g.elements + s.gradient_elements))
    gradients = sum(shape.gradient_elements for shape in shapes)
    size = settings.decomposition_bytes
    every = parts["compute"] + parts["solve"] + parts["update"]
    every += _broadcasts(len(shapes), size * gradients, row_length(placement), hardware)
    factors = parts["statistics"] + link.seconds(ring, ring, placement.world_size - 1)
    inverses = parts["decompose"] + _broadcasts(len(shapes), size * held, placement.workers, hardware)
    return every + factors / settings.factor_update_steps + inverses / settings.inv_update_steps


def _broadcasts(count: int, size: float, ranks: int, hardware: Hardware) -> float:
    if ranks == 1:
        return 0.0
    link = hardware.exchange_inside if ranks <= hardware.ranks_per_node else hardware.exchange_between
    return count * (BROADCAST[0] + BROADCAST[1] * math.log2(ranks)) + size / link.bandwidth
