"""Predictions in plain words: sizes, times, a table by fraction, and why one was chosen. Pure Python: no torch."""

from collections.abc import Sequence

from kaisa.kfac.prediction import Prediction

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def in_bytes(size: float) -> str:
    """Returns a size as it is said: 1536 as "1.5 KiB"."""
    unit = 0
    while abs(size) >= 1024 and unit < len(_UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return (
        f"{size:.0f} B" if unit == 0 else f"{size:.3g} {_UNITS[unit]}" if size < 1000 else f"{size:.0f} {_UNITS[unit]}"
    )


def in_seconds(seconds: float) -> str:
    """Returns a time as it is said: 0.0123 as "12.3 ms"."""
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def fraction(prediction: Prediction) -> str:
    """Returns the fraction and its name: "1/4, HYBRID-OPT"."""
    placement = prediction.placement
    workers, world = placement.workers, placement.world_size
    name = "COMM-OPT" if workers == world else "MEM-OPT" if workers == 1 else "HYBRID-OPT"
    return f"{workers}/{world}, {name}"


def description(prediction: Prediction) -> str:
    """Returns what was chosen beside the fraction, where it is not what is usual."""
    settings = prediction.settings
    said = [fraction(prediction)]
    if settings.colocate:
        said.append("A and G of a layer on one rank")
    if prediction.is_deferred:
        said.append("statistics sent only when decompositions are due")
    if settings.statistics or settings.gradients:
        forms = (("statistics", settings.statistics), ("gradients", settings.gradients))
        said += [f"{kind} sent as {form}" for kind, form in forms if form]
    return "; ".join(said)


def table(predictions: Sequence[Prediction], chosen: Prediction, memory_budget: int | None) -> str:
    """Returns a line for each prediction: memory of the fullest rank, traffic of the busiest, times of each phase."""
    head = ("fraction", "factors", "decomp.", "other", "peak", "sent/step", *_PHASES, "step", "")
    lines = [head, *(_row(prediction, prediction is chosen, memory_budget) for prediction in predictions)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            f"{cell:>{width}}" if place else f"{cell:<{width}}" for place, (cell, width) in enumerate(cells)
        ).rstrip()
        for cells in (list(zip(line, widths, strict=True)) for line in lines)
    )


_PHASES = ("statistics", "factors", "inverses", "precondition")


def _row(prediction: Prediction, is_chosen: bool, memory_budget: int | None) -> tuple[str, ...]:
    memory, placement = prediction.fullest, prediction.placement
    fits = memory_budget is None or prediction.peak <= memory_budget
    return (
        f"{placement.workers}/{placement.world_size}",
        in_bytes(memory["factors"]),
        in_bytes(memory["decompositions"]),
        in_bytes(memory["moments"] + memory["statistics"]),
        in_bytes(memory["peak"]),
        in_bytes(prediction.bytes_a_step),
        *(in_seconds(prediction.seconds[phase]) for phase in _PHASES),
        in_seconds(prediction.average_step),
        "chosen" if is_chosen else "" if fits else "does not fit",
    )


def reasons(chosen: Prediction, by_fraction: Sequence[Prediction], memory_budget: int | None) -> tuple[str, ...]:
    """Returns why a prediction was chosen among the best of each fraction, a sentence each."""
    limit = "" if memory_budget is None else f" that fits into {in_bytes(memory_budget)} a rank"
    own = chosen.average_step - chosen.seconds["model"]
    said = [
        f"{description(chosen)}: the fastest{limit}, with {in_seconds(chosen.average_step)} a step, "
        f"{in_seconds(own)} of it for K-FAC, and {in_bytes(chosen.peak)} at the peak of the fullest rank.",
        _wall(chosen),
    ]
    others = [prediction for prediction in by_fraction if prediction.placement.workers != chosen.placement.workers]
    return (*said, *(_against(other, chosen, memory_budget) for other in others))


def _wall(prediction: Prediction) -> str:
    """Says what takes most of K-FAC's time in the average step."""
    settings, seconds = prediction.settings, prediction.seconds
    steps = {
        "statistics": settings.factor_update_steps,
        "factors": settings.factor_update_steps,
        "inverses": settings.inv_update_steps,
        "precondition": 1.0,
    }
    shares = {phase: seconds[phase] / steps[phase] for phase in _PHASES}
    phase = max(_PHASES, key=shares.__getitem__)
    often = "in every step" if steps[phase] == 1 else f"every {steps[phase]:g} steps"
    sides = [s.size for shape in prediction.workload.shapes for s in (shape.a, shape.g) if not s.is_diagonal]
    largest = f"; the largest factor has side {max(sides)}" if phase == "inverses" and sides else ""
    return f"Most of K-FAC's time goes into {_SAID[phase]}: {in_seconds(seconds[phase])} {often}{largest}."


_SAID = {
    "statistics": "making statistics",
    "factors": "bringing statistics to the owners of factors",
    "inverses": "decompositions",
    "precondition": "preconditioning",
}


def _against(other: Prediction, chosen: Prediction, memory_budget: int | None) -> str:
    longer = other.average_step / chosen.average_step - 1
    time = f"{abs(longer):.1%} {'more' if longer >= 0 else 'less'} time"
    more = other.peak - chosen.peak
    space = f"{in_bytes(abs(more))} {'more' if more >= 0 else 'less'} memory"
    if memory_budget is not None and other.peak > memory_budget:
        missing = in_bytes(other.peak - memory_budget)
        return f"{fraction(other)} does not fit: it needs {in_bytes(other.peak)}, {missing} too much, for {time}."
    return f"{fraction(other)} would take {time} and {space}; {_difference(other, chosen)}."


def _difference(other: Prediction, chosen: Prediction) -> str:
    """Says in which part of a step two predictions differ most."""
    steps = {
        "decompose": chosen.settings.inv_update_steps,
        "share": chosen.settings.inv_update_steps,
        "solve": 1.0,
        "spread": 1.0,
    }
    changes = {part: (other.parts[part] - chosen.parts[part]) / often for part, often in steps.items()}
    part = max(changes, key=lambda name: abs(changes[name]))
    said = {
        "decompose": "decompositions",
        "share": "sending decompositions",
        "solve": "preconditioning",
        "spread": "sending preconditioned gradients",
    }[part]
    return f"{said} would cost {in_seconds(abs(changes[part]))} {'more' if changes[part] >= 0 else 'less'} a step"
