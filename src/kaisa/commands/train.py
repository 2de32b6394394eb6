"""`kaisa train`: trains one of the recipes, with an optimizer and with the same behind K-FAC."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from kaisa.commands.arguments import MACHINE, option
from kaisa.commands.processes import agreed, count_ranks, interruptible, together
from kaisa.commands.status import INTERRUPTED
from kaisa.errors import ConfigurationError
from kaisa.kfac.arrangement import AUTO
from kaisa.kfac.collectives import launched_world, start_processes
from kaisa.kfac.placement import COMM_OPT, HYBRID_OPT, MEM_OPT
from kaisa.recipes.catalogue import RECIPES
from kaisa.recipes.comparison import (
    Watcher,
    check_folder,
    check_same_data,
    compare,
    start_comparison,
)
from kaisa.recipes.contestants import OPTIMIZERS
from kaisa.recipes.data import Data, read_data
from kaisa.recipes.extras import load_extra
from kaisa.recipes.options import LEARNING_RATES, Options
from kaisa.recipes.progress import TerminalProgress
from kaisa.recipes.record import FILE, Record
from kaisa.recipes.report import build_table, conclude, draw_plot
from kaisa.recipes.tensorboard import TensorBoard, Watchers, check_tensorboard

RUNS = Path("runs")
DATA = "Data and where the run goes"
MODEL = "Model and schedule"
KFAC = "K-FAC"


def _rates() -> str:
    return ", ".join(f"{name} {rate:g}" for name, rate in LEARNING_RATES.items())


def _usual(option: str) -> str:
    """Return the presets of an option, one for all recipes that share it."""
    recipes: dict[Any, list[str]] = {}
    for name, recipe in RECIPES.items():
        if option in recipe.preset:
            recipes.setdefault(recipe.preset[option], []).append(name)
    parts = [f"{', '.join(names)}: {value}" for value, names in recipes.items()]
    return f"[{'; '.join(parts)}]"


def _models() -> str:
    kinds = dict.fromkeys(", ".join(recipe.models) for recipe in RECIPES.values())
    return f"{'; '.join(kinds)} {_usual('model')}"


def train(
    context: typer.Context,
    recipe: Annotated[
        str | None, option(f"One of {', '.join(RECIPES)} [digits; with --data: resnet]", panel=DATA)
    ] = None,
    data: Annotated[
        str | None,
        option(
            "Folder or zip file: of images, a subfolder a class; unet: image/NAME, label/NAME; gpt, bert: .txt; "
            "maskrcnn: COCO's annotations.json and images [handwritten digits]",
            panel=DATA,
        ),
    ] = None,
    test_data: Annotated[
        str | None,
        option("What to test on, of the same kind [NAME-test beside NAME-train, or a part]", panel=DATA),
    ] = None,
    image_size: Annotated[
        int | None,
        option(
            "Resize images of classes to this width and height; maskrcnn: the shorter side to this [maskrcnn: 800]",
            panel=DATA,
        ),
    ] = None,
    crop: Annotated[int | None, option("unet: width and height of what is learned from [128]", panel=DATA)] = None,
    positions: Annotated[
        int | None, option(f"gpt, bert: tokens of a sequence {_usual('positions')}", panel=DATA)
    ] = None,
    unit: Annotated[
        str | None, option(f"gpt, bert: tokens are characters or words {_usual('unit')}", panel=DATA)
    ] = None,
    vocabulary: Annotated[
        int | None, option(f"gpt, bert: most tokens that are told apart {_usual('vocabulary')}", panel=DATA)
    ] = None,
    workers: Annotated[int | None, option("Threads that decode images [4]", panel=DATA)] = None,
    output: Annotated[Path | None, option("Folder of the run [runs/TIME-DATA-MODEL]", panel=DATA)] = None,
    tensorboard: Annotated[
        bool | None,
        typer.Option(
            "--tensorboard",
            help="Write losses and scores for TensorBoard",
            rich_help_panel=DATA,
            show_default=False,
        ),
    ] = None,
    resume: Annotated[Path | None, option("Go on with an interrupted run, with its own options", panel=DATA)] = None,
    model: Annotated[str | None, option(_models(), panel=MODEL)] = None,
    contestants: Annotated[
        str | None, option("both, first-order or kfac [both; adahessian: first-order]", panel=MODEL)
    ] = None,
    optimizer: Annotated[
        str | None,
        option(
            f"{', '.join(OPTIMIZERS)}; NAME+kfac for the one behind K-FAC alone [sgd; unet, gpt, bert: adamw]",
            panel=MODEL,
        ),
    ] = None,
    kfac: Annotated[
        bool | None,
        typer.Option(
            "--kfac/--no-kfac",
            help="The one contestant behind K-FAC, or the one without, alone [both]",
            rich_help_panel=MODEL,
            show_default=False,
        ),
    ] = None,
    lr: Annotated[
        float | None, option(f"Highest learning rate, of both unless --kfac-lr [{_rates()}]", panel=MODEL)
    ] = None,
    kfac_lr: Annotated[float | None, option("Highest learning rate behind K-FAC [as --lr]", panel=MODEL)] = None,
    weight_decay: Annotated[float | None, option("Of both [maskrcnn: 1e-4; 5e-4]", panel=MODEL)] = None,
    epochs: Annotated[int | None, option(f"Of each run {_usual('epochs')}", panel=MODEL)] = None,
    batch_size: Annotated[int | None, option(f"Examples in a batch {_usual('batch_size')}", panel=MODEL)] = None,
    augment: Annotated[
        bool | None,
        typer.Option(
            "--augment/--no-augment",
            help="Shift, turn and mirror images at random [resnet, unet and maskrcnn only]",
            rich_help_panel=MODEL,
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        float | None,
        option("Test score to race for [digits: 0.97; the best that all reach]", panel=MODEL),
    ] = None,
    seed: Annotated[int | None, option("Of weights, batches and split [0]", panel=MODEL)] = None,
    repeats: Annotated[int | None, option("Seeds to run each contestant with [digits: 5; 1]", panel=MODEL)] = None,
    damping: Annotated[float | None, option("Added to the curvature [digits: 0.01; 0.003]", panel=KFAC)] = None,
    factor_update_steps: Annotated[
        int | None, option("Steps between two updates of the factors [unet: 5; 10]", panel=KFAC)
    ] = None,
    inv_update_steps: Annotated[
        int | None, option("Steps between two decompositions [resnet, maskrcnn: 100; gpt, bert: 50; 20]", panel=KFAC)
    ] = None,
    factor_decay: Annotated[float | None, option("Weight of the past in the factors [0.95]", panel=KFAC)] = None,
    kl_clip: Annotated[float | None, option("Size of the trust region; 0 for none [0.001]", panel=KFAC)] = None,
    fisher_norm: Annotated[
        float | None,
        option("Longest natural gradient in the Fisher's norm, such as 0.2, instead of --kl-clip [none]", panel=KFAC),
    ] = None,
    solver: Annotated[
        str | None, option("eigen, cholesky, ekfac or sqrt_ekfac [digits: cholesky; eigen]", panel=KFAC)
    ] = None,
    sharing: Annotated[
        str | None, option("Positions that share weights: expand, or reduce for sums over them [expand]", panel=KFAC)
    ] = None,
    threads: Annotated[int | None, option("Processor threads [digits: 1; PyTorch's choice]", panel=MACHINE)] = None,
    device: Annotated[str | None, option("cpu or cuda [cpu]", panel=MACHINE)] = None,
    precision: Annotated[str | None, option("float32, or bfloat16 for autocast [float32]", panel=MACHINE)] = None,
    quantize: Annotated[
        str | None,
        option(
            "Train in few bits: bhq:5 (or ptq, psq) for gradients of 5 bits and all else of 8; qat:8 for none of the "
            "gradients [no]",
            panel=MACHINE,
        ),
    ] = None,
    nproc: Annotated[int | None, option("Processes that share each batch [1, or torchrun's]", panel=MACHINE)] = None,
    grad_worker_fraction: Annotated[
        str | None,
        option(
            "Share of processes that hold a layer's decompositions: comm, hybrid, mem, a number or auto (comm)",
            panel=KFAC,
        ),
    ] = None,
    memory_budget: Annotated[
        str | None, option("Memory of a process that K-FAC may take with auto, such as 2GiB", panel=KFAC)
    ] = None,
    parts: Annotated[
        str | None,
        option("Modules that K-FAC preconditions, divided by commas [maskrcnn: roi_heads; all]", panel=KFAC),
    ] = None,
) -> int:
    """Train with an optimizer and with the same optimizer behind K-FAC.

    Both start from the same weights and see the same batches under the same schedule. At the end
    there is a table, and in the folder of the run a plot and a record.
    """
    given = {name: value for name, value in context.params.items() if value is not None}
    if resume is not None:
        return _resume(resume, [name for name in given if name != "resume"])
    given.pop("output", None)
    if (behind := given.pop("kfac", None)) is not None:
        given["contestants"] = _contestants(behind, contestants)
    if grad_worker_fraction is not None:
        given["grad_worker_fraction"] = _fraction(grad_worker_fraction)
    given["nproc"] = count_ranks(nproc)
    return _start(Options.complete(given), output, context.obj)


def _contestants(behind: bool, given: str | None) -> str:
    chosen = "kfac" if behind else "first-order"
    if given not in (None, chosen):
        raise ConfigurationError(f"--contestants {given} and --{'' if behind else 'no-'}kfac exclude each other")
    return chosen


def _fraction(text: str) -> str | float:
    if text in (COMM_OPT, HYBRID_OPT, MEM_OPT, AUTO):
        return text
    try:
        return float(text)
    except ValueError:
        raise ConfigurationError(
            f"grad-worker-fraction is {text!r}; give comm, hybrid, mem, auto or a number from 0 to 1"
        ) from None


def _start(options: Options, output: Path | None, arguments: Sequence[str]) -> int:
    folder = output or RUNS / f"{datetime.now():%Y%m%d-%H%M%S}-{options.title}"
    if launched_world() is None:
        check_folder(folder)
        if options.nproc > 1:
            return start_processes(options.nproc, arguments)
    return _train(options, folder, resumed=_is_restart() and (folder / FILE).exists())


def _is_restart() -> bool:
    """Whether torchrun starts the ranks again after a failure: the same command then goes on with its own folder."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def _resume(folder: Path, given: Sequence[str]) -> int:
    if given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigurationError(f"--resume takes the options of the run; leave out {names}")
    options = Record.read(folder).options
    launched = launched_world()
    if launched is None and options.nproc > 1:
        return start_processes(options.nproc, ["train", "--resume", str(folder)])
    if launched is not None and launched[1] != options.nproc:
        raise ConfigurationError(
            f"the run in {folder} has {options.nproc} processes, but torchrun has started {launched[1]}"
        )
    return _train(options, folder, resumed=True)


def _train(options: Options, folder: Path, *, resumed: bool) -> int:
    """Train as one of the ranks; only the first is heard."""
    load_extra("matplotlib", "the plot")
    if options.tensorboard:
        check_tensorboard()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    record: Record | None = None
    is_first = (launched_world() or (0, 1))[0] == 0
    console = Console(quiet=not is_first)
    try:
        with interruptible(), together(options.nproc, options.device) as ranks, TerminalProgress(console) as progress:
            data, record = agreed(ranks, lambda: _prepare(options, folder, progress, resumed, is_first))
            progress.announce(data.source, folder)
            compare(record, data, folder, _watchers(options, folder, progress, is_first), ranks)
    except KeyboardInterrupt:
        return _keep(folder, is_first and (folder / FILE).exists(), is_first)
    if is_first:
        _report(record, folder, console)
    return 0


def _watchers(options: Options, folder: Path, progress: TerminalProgress, is_first: bool) -> Watcher:
    return Watchers([progress, TensorBoard(folder)]) if options.tensorboard and is_first else progress


def _prepare(
    options: Options, folder: Path, progress: TerminalProgress, resumed: bool, is_first: bool
) -> tuple[Data, Record]:
    """Read the data and begin a comparison, or go on with the one of a folder."""
    data = read_data(options, progress.read)
    if resumed:
        record = Record.read(folder)
        check_same_data(record, data)
        return data, record
    return data, start_comparison(options, data, folder) if is_first else Record(options, data.describe())


def _keep(folder: Path, is_begun: bool, is_first: bool) -> int:
    """Say what an interruption left."""
    how = f"go on with: kaisa train --resume {folder}" if is_begun else "nothing was written"
    if is_first:
        print(f"kaisa: interrupted; {how}", file=sys.stderr)
    return INTERRUPTED


def _report(record: Record, folder: Path, console: Console) -> None:
    plot = draw_plot(record, folder)
    console.print(build_table(record))
    console.print(conclude(record), highlight=False, soft_wrap=True)
    console.print(f"plot and record: {plot}, {folder / FILE}", highlight=False, soft_wrap=True)
