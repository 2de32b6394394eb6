r"""How distributed K-FAC would scale from 8 to 4,096 ranks, by the planner's model: arithmetic, nothing is trained.

Each point is the fastest predicted placement among all fractions, with statistics sent at once or late, whose peak
leaves half of a rank's memory to the model; where none does, the smallest. Factors are updated every 10 steps and
decomposed every 100, from the batches that the models are usually trained on. The machines are shipped profiles, which
consist of published rates and estimates (their ``sources`` say which is which): orders of magnitude, not forecasts.

    wall          how many ranks the decompositions can be divided among: the sum of their times over the longest one
    traffic       seconds of exchanges in an average step, all of K-FAC's, before any is hidden behind computing
    computing     the same of statistics, averages, decompositions, solving and scaling

The reference is the scheme of arXiv 2107.01739 with all factors on all ranks (``kaisa.kfac.reference``), at its own
fastest fraction. "Without packing" sends squares instead of triangles, modelled as links of half the bandwidth.

    python benchmarks/scaling.py --output benchmarks/results/scaling.json --page docs/scaling-study.md \
        --images docs/images
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kaisa.kfac.explanation import in_bytes, in_seconds
from kaisa.kfac.hardware import Hardware, Link
from kaisa.kfac.placement import FactorShape, Placement, place
from kaisa.kfac.planner import Choices, choose
from kaisa.kfac.prediction import Prediction, placed, predict
from kaisa.kfac.reference import replicated_memory, replicated_seconds
from kaisa.kfac.survey import survey
from kaisa.kfac.workload import SOLVERS, Settings, Workload
from kaisa.recipes.files import written_whole
from kaisa.recipes.zoo import planned_model

MODELS = {"resnet50": "ResNet-50", "bert-large": "BERT-Large", "gpt2-xl": "GPT-2-XL", "llama-8b": "Llama 8B"}
MACHINES = ("a100", "h100")
WORLDS = tuple(2**power for power in range(3, 13))
SETTINGS = Settings(factor_update_steps=10, inv_update_steps=100)
SHARE = 0.5  # of a rank's memory that K-FAC may take
EXCHANGES = {"reduce": 10.0, "share": 100.0, "spread": 1.0}
COMPUTING = {"statistics": 10.0, "average": 10.0, "wait": 10.0, "decompose": 100.0, "solve": 1.0, "update": 1.0}
CHANGES = {
    "reference": "factors on all ranks",
    "unpacked": "without packing",
    "cholesky": "Cholesky",
    "warm": "warm starts",
    "bfloat16": "bfloat16 messages",
    "buckets": "messages of 400 MiB",
}
MARKS = "<!-- computed: {} -->", "<!-- end of computed -->"


# -------------------------------------------------------------------------------------------------------- the figures


def study(model: str, machine: str, worlds: Sequence[int]) -> dict[str, Any]:
    """Return all figures of a model on a machine."""
    built, inputs = planned_model(model).on_meta()
    workload, hardware = survey(built, inputs, name=model), Hardware.load(machine)
    return {
        "model": model,
        "machine": machine,
        "parameters": workload.parameters,
        "layers": len(workload.layers),
        "walls": {solver: wall(workload, hardware, solver) for solver in ("eigen", "warm_eigen", "cholesky")},
        "points": [point(workload, hardware, world) for world in worlds],
    }


def wall(workload: Workload, hardware: Hardware, solver: str) -> dict[str, float]:
    """Return the largest factor, and how many ranks all decompositions can keep busy while one has it."""
    factors = [factor for shape in workload.shapes for factor in (shape.a, shape.g) if not factor.is_diagonal]
    table = SOLVERS[solver].table
    seconds = [hardware.decomposition_seconds(table, factor.size, factor.blocks) for factor in factors]
    work = [factor.work for factor in factors]
    return {
        "side": max(factor.size for factor in factors),
        "longest": max(seconds),
        "together": sum(seconds),
        "ranks": sum(seconds) / max(seconds),
        "ranks_by_operations": sum(work) / max(work),
    }


def point(workload: Workload, hardware: Hardware, world: int) -> dict[str, Any]:
    """Return what the planner would do on so many ranks, and what it would cost to do otherwise."""
    candidates = choose(workload, world, hardware, SETTINGS, choices=Choices(colocate=(False,))).candidates
    best = next(filter(fits, candidates), min(candidates, key=lambda each: each.peak))
    cholesky, warm = again(best, solver="cholesky"), again(best, solver="warm_eigen")
    bfloat16 = again(best, statistics="bfloat16", gradients="bfloat16")
    spread = again(best, spread=True, deferred=False)
    buckets = again(best, bucket_bytes=16 * SETTINGS.bucket_bytes)
    model = best.seconds["model"]
    reference = replicated(workload, hardware, world)
    return {
        "ranks": world,
        "workers": best.placement.workers,
        "deferred": best.is_deferred,
        "fits": fits(best),
        "model": model,
        "added": best.average_step - model,
        "parts": {part: best.parts[part] / often(best, part) for part in (*COMPUTING, *EXCHANGES)},
        "decompose": {
            "eigen": best.parts["decompose"],
            "warm_eigen": warm.parts["decompose"],
            "cholesky": cholesky.parts["decompose"],
            "by_time": by_time(best),
        },
        "longest_step": {"at once": best.inverse_step, "spread": spread.inverse_step},
        "spread_average": spread.average_step - model,
        "otherwise": {
            "reference": reference["seconds"] - best.parts["compute"],  # it says nothing of gradients' means
            "unpacked": unpacked(best) - model,
            "cholesky": cholesky.average_step - model,
            "warm": warm.average_step - model,
            "bfloat16": bfloat16.average_step - model,
            "buckets": buckets.average_step - model,
        },
        "memory": {
            "held": held(best),
            "peak": best.peak,
            "smallest_held": min(map(held, candidates)),
            "reference_least": reference["least"],
            "reference_most": reference["most"],
        },
        "sent": {
            "factor_update": max((step["statistics"].bytes for step in statistics_of(best)), default=0),
            "ring_of_squares": ring(workload, world),
        },
    }


def fits(prediction: Prediction) -> bool:
    memory = prediction.hardware.memory
    return memory is None or prediction.peak <= SHARE * memory


def again(prediction: Prediction, **changes: Any) -> Prediction:
    """Return the prediction of the same fraction with other settings."""
    settings = replace(prediction.settings, **changes)
    workload, hardware, old = prediction.workload, prediction.hardware, prediction.placement
    return predict(workload, placed(workload, old.world_size, old.workers, hardware, settings), hardware, settings)


def held(prediction: Prediction) -> int:
    return max(row["total"] for row in prediction.memory)


def by_time(prediction: Prediction) -> float:
    """Return the time of all decompositions if factors went to ranks by the profile's seconds instead of by n³."""
    workload, old, hardware = prediction.workload, prediction.placement, prediction.hardware

    def seconds(factor: FactorShape) -> float:
        return 0.0 if factor.is_diagonal else hardware.decomposition_seconds("eigen", factor.size, factor.blocks)

    placement = place(workload.shapes, old.world_size, old.workers, ranks_per_node=old.ranks_per_node, cost=seconds)
    return predict(workload, placement, hardware, prediction.settings).parts["decompose"]


def often(prediction: Prediction, part: str) -> float:
    """Return in every how many steps a part is done."""
    is_late = prediction.is_deferred and part in ("reduce", "average")
    return 100.0 if is_late else {**COMPUTING, **EXCHANGES}[part]


def unpacked(prediction: Prediction) -> float:
    """Return the average step if statistics travelled as squares."""
    hardware = prediction.hardware
    slower = replace(
        hardware, exchange_inside=halved(hardware.exchange_inside), exchange_between=halved(hardware.exchange_between)
    )
    other = predict(prediction.workload, prediction.placement, slower, prediction.settings)
    return prediction.average_step + (other.seconds["factors"] - prediction.seconds["factors"]) / 10


def halved(link: Link) -> Link:
    return replace(link, bandwidth=link.bandwidth / 2, shared=link.shared / 2 if link.shared else None)


def divisors(world: int) -> list[int]:
    return [count for count in range(1, world + 1) if world % count == 0]


def replicated(workload: Workload, hardware: Hardware, world: int) -> dict[str, float]:
    """Return the reference's average step at its fastest fraction, and what a rank holds at the two ends."""
    found = {workers: placed_alike(workload, hardware, world, workers) for workers in divisors(world)}
    return {
        "seconds": min(replicated_seconds(workload, each, hardware, SETTINGS) for each in found.values()),
        "least": max(replicated_memory(workload.shapes, found[1])),
        "most": max(replicated_memory(workload.shapes, found[world])),
    }


def placed_alike(workload: Workload, hardware: Hardware, world: int, workers: int) -> Placement:
    return placed(workload, world, workers, hardware, replace(SETTINGS, colocate=True, local_below=0, deferred=False))


def statistics_of(prediction: Prediction) -> list[Mapping[str, Any]]:
    rows = (*prediction.account.factor_step, *prediction.account.inverse_step)
    return [row for row in rows if "statistics" in row]


def ring(workload: Workload, world: int) -> float:
    """Return the bytes that a rank sends where a ring adds up all factors, as squares, on all ranks."""
    numbers = sum(shape.a.elements + shape.g.elements for shape in workload.shapes)
    return 2 * (world - 1) / world * SETTINGS.factor_bytes * numbers


def exchanging(entry: Mapping[str, Any]) -> float:
    return float(sum(entry["parts"][part] for part in EXCHANGES))


def computing(entry: Mapping[str, Any]) -> float:
    return float(sum(entry["parts"][part] for part in COMPUTING))


def takeover(points: Sequence[Mapping[str, Any]]) -> int | None:
    """Return from how many ranks on exchanges take longer than computing, on all larger worlds too."""
    result = None
    for entry in reversed(points):
        if exchanging(entry) <= computing(entry):
            break
        result = int(entry["ranks"])
    return result


def reached_wall(points: Sequence[Mapping[str, Any]]) -> int | None:
    """Return from how many ranks on decompositions take no less than a twentieth above the longest one's time."""
    least = min(entry["decompose"]["eigen"] for entry in points)
    return next((int(entry["ranks"]) for entry in points if entry["decompose"]["eigen"] <= 1.05 * least), None)


# ---------------------------------------------------------------------------------------------------------- the pages


def write_page(value: Mapping[str, Any], page: Path) -> None:
    """Put the figures into a page, each part between its two marks."""
    text = page.read_text(encoding="utf-8")
    for name, lines in PARTS.items():
        mark = MARKS[0].format(name)
        before, rest = text.split(mark)
        after = rest.split(MARKS[1], 1)[1]
        text = before + mark + "\n\n" + "\n".join(lines(value)) + "\n\n" + MARKS[1] + after
    page.write_text(text, encoding="utf-8")


def of(value: Mapping[str, Any], machine: str) -> list[dict[str, Any]]:
    return [entry for entry in value["studies"] if entry["machine"] == machine]


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(heads) + " |"
    yield "|---" + "|---:" * (len(heads) - 1) + "|"
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def wall_lines(value: Mapping[str, Any]) -> Iterator[str]:
    machine = value["setting"]["drawn"]
    heads = [
        "model",
        "largest n",
        "Σn³ / n³",
        "of it alone",
        "all on one rank",
        "wall in time",
        "reached from",
        "64 ranks",
        "64, by time",
    ]
    rows = []
    for entry in of(value, machine):
        found, reached = entry["walls"]["eigen"], reached_wall(entry["points"])
        at_64 = next(each for each in entry["points"] if each["ranks"] == 64)
        rows.append(
            [
                MODELS[entry["model"]],
                f"{found['side']:,}",
                f"{found['ranks_by_operations']:.1f}",
                in_seconds(found["longest"]),
                in_seconds(found["together"]),
                f"{found['ranks']:.0f} ranks",
                "never" if reached is None else f"{reached:,} ranks",
                *(in_seconds(at_64["decompose"][name]) for name in ("eigen", "by_time")),
            ]
        )
    yield from table(heads, rows)


def scaling_lines(value: Mapping[str, Any]) -> Iterator[str]:
    heads = [
        "model",
        "machine",
        "ranks",
        "fraction",
        "model's step",
        "K-FAC adds",
        "of it exchanging",
        "peak",
        "longest step",
    ]
    rows = []
    for entry in value["studies"]:
        for each in entry["points"]:
            if each["ranks"] in (8, 64, 512, 4096):
                total = exchanging(each) + computing(each)
                rows.append(
                    [
                        MODELS[entry["model"]],
                        entry["machine"],
                        f"{each['ranks']:,}",
                        f"{each['workers']}/{each['ranks']}" + (", late" if each["deferred"] else ""),
                        in_seconds(each["model"]),
                        f"{in_seconds(each['added'])} ({100 * each['added'] / each['model']:.0f} %)",
                        f"{100 * exchanging(each) / total:.0f} %",
                        in_bytes(each["memory"]["peak"]) + ("" if each["fits"] else ", does not fit"),
                        in_seconds(each["longest_step"]["at once"]),
                    ]
                )
    yield from table(heads, rows)


def traffic_lines(value: Mapping[str, Any]) -> Iterator[str]:
    heads = ["model", *(f"{machine}: from" for machine in value["setting"]["machines"])]
    rows = []
    for model in value["setting"]["models"]:
        found = [takeover(entry["points"]) for entry in value["studies"] if entry["model"] == model]
        rows.append([MODELS[model], *("nowhere" if ranks is None else f"{ranks:,} ranks" for ranks in found)])
    yield from table(heads, rows)


def memory_lines(value: Mapping[str, Any]) -> Iterator[str]:
    heads = [
        "model",
        "ranks",
        "reference, 1/N",
        "reference, 1",
        "here, smallest",
        "ring of squares",
        "here, factor update",
    ]
    rows = []
    for entry in of(value, value["setting"]["drawn"]):
        for each in entry["points"]:
            if each["ranks"] in (8, 64, 4096):
                memory, sent = each["memory"], each["sent"]
                figures = [memory["reference_least"], memory["reference_most"], memory["smallest_held"]]
                figures += [sent["ring_of_squares"], sent["factor_update"]]
                rows.append([MODELS[entry["model"]], f"{each['ranks']:,}", *map(in_bytes, figures)])
    yield from table(heads, rows)


def change_lines(value: Mapping[str, Any]) -> Iterator[str]:
    heads = ["model", "ranks", "K-FAC adds", *CHANGES.values(), "spread", "longest step, spread"]
    rows = []
    for entry in of(value, value["setting"]["drawn"]):
        for each in entry["points"]:
            if each["ranks"] in (8, 64, 512, 4096):
                others = [each["otherwise"][name] / each["added"] for name in CHANGES]
                longest = each["longest_step"]
                rows.append(
                    [
                        MODELS[entry["model"]],
                        f"{each['ranks']:,}",
                        in_seconds(each["added"]),
                        *(f"× {ratio:.2f}" for ratio in (*others, each["spread_average"] / each["added"])),
                        f"{in_seconds(longest['at once'])} to {in_seconds(longest['spread'])}",
                    ]
                )
    yield from table(heads, rows)


PARTS: dict[str, Callable[[Mapping[str, Any]], Iterator[str]]] = {
    "wall": wall_lines,
    "scaling": scaling_lines,
    "traffic": traffic_lines,
    "memory": memory_lines,
    "changes": change_lines,
}


# -------------------------------------------------------------------------------------------------------- the pictures

COLOURS = {
    "statistics": ("#d9a441", "statistics"),
    "average": ("#8d6a2f", "averages"),
    "decompose": ("#31506b", "decompositions"),
    "solve": ("#5f8fb4", "solving, scaling"),
    "reduce": ("#7a2e3a", "sending statistics"),
    "share": ("#b34a54", "sending decompositions"),
    "spread": ("#e08a82", "sending gradients"),
}
TOGETHER = {"wait": "average", "update": "solve"}


def draw(value: Mapping[str, Any], folder: Path) -> None:
    """Draw the three pictures of one machine."""
    import matplotlib

    matplotlib.use("agg")
    studies = of(value, value["setting"]["drawn"])
    for name, picture in (
        ("steps", draw_steps),
        ("wall", draw_wall),
        ("memory", draw_memory),
        ("changes", draw_changes),
    ):
        figure = picture(studies, value["setting"]["drawn"])
        folder.mkdir(parents=True, exist_ok=True)
        with written_whole(folder / f"scaling-{name}.png") as partial:
            figure.savefig(partial, format="png")


def panels(title: str) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.2), dpi=130, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    figure.suptitle(title, fontsize=12.5, x=0.01, ha="left")
    areas = list(figure.subplots(2, 2).flat)
    for area in areas:
        area.spines[["top", "right"]].set_visible(False)
        area.grid(axis="y", alpha=0.25, linewidth=0.6)
        area.set_axisbelow(True)
    return figure, areas


def over_ranks(area: Any, entry: Mapping[str, Any], *, is_last_row: bool) -> list[int]:
    ranks = [each["ranks"] for each in entry["points"]]
    area.set_xscale("log", base=2)
    area.set_xticks(ranks, [f"{count:,}" for count in ranks], fontsize=8.5)
    area.minorticks_off()
    area.set_title(MODELS[entry["model"]], loc="left", fontsize=11, weight="bold")
    if is_last_row:
        area.set_xlabel("ranks")
    return ranks


def draw_steps(studies: Sequence[Mapping[str, Any]], machine: str) -> Any:
    figure, areas = panels(f"What K-FAC adds to the average step, before anything is hidden ({machine}, predicted)")
    for index, (area, entry) in enumerate(zip(areas, studies, strict=True)):
        ranks = over_ranks(area, entry, is_last_row=index > 1)
        shares = {part: [0.0] * len(ranks) for part in COLOURS}
        for index_of_world, each in enumerate(entry["points"]):
            for part, seconds in each["parts"].items():
                shares[TOGETHER.get(part, part)][index_of_world] += 1e3 * seconds
        bottom = [0.0] * len(ranks)
        for part, (colour, name) in COLOURS.items():
            widths = [0.55 * count for count in ranks]
            area.bar(ranks, shares[part], widths, bottom, color=colour, label=name, linewidth=0)
            bottom = [low + high for low, high in zip(bottom, shares[part], strict=True)]
        model = [1e3 * each["model"] for each in entry["points"]]
        area.plot(ranks, model, color="#444444", linewidth=1.3, linestyle=(0, (4, 3)), label="the step without K-FAC")
        area.set_ylim(0, 1.12 * max(*bottom, *model))
        area.set_ylabel("ms")
    handles, names = areas[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


SOLVER_LINES = {
    "eigen": ("#31506b", "eigen", "o"),
    "warm_eigen": ("#d9a441", "warm start", "s"),
    "cholesky": ("#b34a54", "Cholesky", "^"),
}


def draw_wall(studies: Sequence[Mapping[str, Any]], machine: str) -> Any:
    figure, areas = panels(f"The wall: how long all decompositions take when they are due ({machine}, predicted)")
    for index, (area, entry) in enumerate(zip(areas, studies, strict=True)):
        ranks = over_ranks(area, entry, is_last_row=index > 1)
        for solver, (colour, name, marker) in SOLVER_LINES.items():
            found = entry["walls"][solver]
            area.plot(
                ranks,
                [each["decompose"][solver] for each in entry["points"]],
                color=colour,
                marker=marker,
                markersize=5,
                linewidth=1.7,
                label=name,
            )
            area.plot(
                ranks,
                [found["together"] / count for count in ranks],
                color=colour,
                linewidth=1,
                linestyle=":",
                label="all of them, divided evenly" if solver == "eigen" else None,
            )
        found = entry["walls"]["eigen"]
        area.axvline(found["ranks"], color="#888888", linewidth=1, zorder=0)
        area.set_yscale("log")
        area.set_ylabel("seconds")
        area.yaxis.set_major_formatter("{x:g}")
        low, high = area.get_ylim()
        is_left = found["ranks"] < 64
        area.text(
            found["ranks"] * (1.08 if is_left else 0.93),
            1.4 * low,
            f"wall at {found['ranks']:.0f} ranks\nn = {found['side']:,}",
            fontsize=8.5,
            color="#555555",
            ha="left" if is_left else "right",
            va="bottom",
        )
        area.set_xlim(min(6.5, 0.8 * found["ranks"]), 5000)
        area.set_ylim(low, high)
    handles, names = areas[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


MEMORY_LINES = {
    "reference_most": ("#b34a54", "all factors on all ranks, fraction 1", "o"),
    "reference_least": ("#e08a82", "all factors on all ranks, fraction 1/N", "s"),
    "held": ("#5f8fb4", "here, the fraction that was chosen", "D"),
    "smallest_held": ("#31506b", "here, the smallest fraction's", "^"),
}


def draw_memory(studies: Sequence[Mapping[str, Any]], machine: str) -> Any:
    figure, areas = panels(f"What the fullest rank holds between two steps ({machine}, predicted)")
    memory = Hardware.load(machine).memory
    for index, (area, entry) in enumerate(zip(areas, studies, strict=True)):
        ranks = over_ranks(area, entry, is_last_row=index > 1)
        for key, (colour, name, marker) in MEMORY_LINES.items():
            values = [each["memory"][key] / 2**30 for each in entry["points"]]
            area.plot(ranks, values, color=colour, marker=marker, markersize=5, linewidth=1.7, label=name)
        area.set_yscale("log")
        area.set_ylabel("GiB")
        area.yaxis.set_major_formatter("{x:g}")
        if memory is not None:
            area.axhline(
                SHARE * memory / 2**30,
                color="#444444",
                linewidth=1.1,
                linestyle=(0, (4, 3)),
                label="half of a rank's memory",
            )
    handles, names = areas[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


CHANGE_LINES = {
    "reference": ("#7a2e3a", "o"),
    "unpacked": ("#d9a441", "s"),
    "bfloat16": ("#7fa88b", "D"),
    "buckets": ("#9a7fb0", "P"),
    "warm": ("#5f8fb4", "v"),
    "cholesky": ("#31506b", "^"),
}


def draw_changes(studies: Sequence[Mapping[str, Any]], machine: str) -> Any:
    figure, areas = panels(
        f"What K-FAC would add to the average step otherwise, relative to the plan ({machine}, predicted)"
    )
    for index, (area, entry) in enumerate(zip(areas, studies, strict=True)):
        ranks = over_ranks(area, entry, is_last_row=index > 1)
        area.axhline(1, color="#444444", linewidth=1.1, linestyle=(0, (4, 3)), label="as planned")
        for change, (colour, marker) in CHANGE_LINES.items():
            values = [each["otherwise"][change] / each["added"] for each in entry["points"]]
            area.plot(ranks, values, color=colour, marker=marker, markersize=5, linewidth=1.7, label=CHANGES[change])
        area.set_yscale("log")
        ticks = [0.3, 0.4, 0.5, 0.7, 1, 1.5, 2, 3]
        area.set_yticks(ticks, [f"× {tick:g}" for tick in ticks])
        area.set_ylim(0.28, 3.6)
        area.minorticks_off()
    handles, names = areas[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="file for the figures as JSON")
    parser.add_argument("--page", type=Path, help="page to put them into")
    parser.add_argument("--images", type=Path, help="folder for the pictures")
    parser.add_argument("--show", action="store_true", help="only put the figures of the file into page and pictures")
    arguments = parser.parse_args()
    if not arguments.show:
        setting = {
            "models": list(MODELS),
            "machines": MACHINES,
            "drawn": MACHINES[-1],
            "factor_update_steps": SETTINGS.factor_update_steps,
            "inv_update_steps": SETTINGS.inv_update_steps,
            "share_of_memory": SHARE,
        }
        studies = [study(model, machine, WORLDS) for machine in MACHINES for model in MODELS]
        with written_whole(arguments.output) as partial:
            partial.write_text(json.dumps({"setting": setting, "studies": studies}, indent=1) + "\n", encoding="utf-8")
    value = json.loads(arguments.output.read_text(encoding="utf-8"))
    if arguments.page:
        write_page(value, arguments.page)
    if arguments.images:
        draw(value, arguments.images)


if __name__ == "__main__":
    main()
