"""The command `kaisa`.

    kaisa train     trains on images, with a first-order optimizer and with the same behind K-FAC

Exit status: 0 done; 2 bad input, said in one line on standard error, with nothing written; 130
interrupted, with what was done kept.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from kaisa.errors import ConfigurationError, KaisaError
from kaisa.recipes.comparison import (
    check_folder,
    check_same_data,
    compare,
    start_comparison,
)
from kaisa.recipes.data import read_data
from kaisa.recipes.extras import load_extra
from kaisa.recipes.options import Options
from kaisa.recipes.progress import TerminalProgress
from kaisa.recipes.record import FILE, Record
from kaisa.recipes.report import build_table, conclude, draw_plot

BAD_INPUT = 2
INTERRUPTED = 130
RUNS = Path("runs")
UsageError: type[Exception] = typer.BadParameter.__bases__[0]  # Typer exports it by no name

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="K-FAC for PyTorch: trains deep networks in less time with second-order information.",
)


def main() -> None:
    """Run the command with the arguments of the process, and leave with its exit status."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    try:
        return app(args=list(arguments), prog_name="kaisa", standalone_mode=False) or 0
    except UsageError as error:
        return _refuse(getattr(error, "format_message", error.__str__)())
    except KaisaError as error:
        return _refuse(str(error))
    except typer.Abort:
        return INTERRUPTED


def _refuse(message: str) -> int:
    print(f"kaisa: {' '.join(message.split())}", file=sys.stderr)
    return BAD_INPUT


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"kaisa {metadata.version('kaisa')}")
        raise typer.Exit


@app.callback()
def kaisa(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Train deep networks in less time with second-order information."""


DATA = "Images and where the run goes"
MODEL = "Model and schedule"
KFAC = "K-FAC"
MACHINE = "Machine"


def _option(text: str, *names: str, panel: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=False)


@app.command()
def train(
    context: typer.Context,
    data: Annotated[
        str | None,
        _option("Folder or zip file with one subfolder a class [handwritten digits]", panel=DATA),
    ] = None,
    test_data: Annotated[
        str | None,
        _option("Images to test on [NAME-test beside NAME-train, or a fifth]", panel=DATA),
    ] = None,
    image_size: Annotated[int | None, _option("Resize images to this width and height", panel=DATA)] = None,
    output: Annotated[Path | None, _option("Folder of the run [runs/TIME-DATA-MODEL]", panel=DATA)] = None,
    resume: Annotated[Path | None, _option("Go on with an interrupted run, with its own options", panel=DATA)] = None,
    model: Annotated[str | None, _option("mlp, cnn, resnet20 or resnet32 [cnn; images: resnet20]", panel=MODEL)] = None,
    contestants: Annotated[str | None, _option("both, first-order or kfac [both]", panel=MODEL)] = None,
    optimizer: Annotated[str | None, _option("sgd or adamw [sgd]", panel=MODEL)] = None,
    lr: Annotated[float | None, _option("Highest learning rate, of both unless --kfac-lr [0.1]", panel=MODEL)] = None,
    kfac_lr: Annotated[float | None, _option("Highest learning rate behind K-FAC [as --lr]", panel=MODEL)] = None,
    weight_decay: Annotated[float | None, _option("Of both [5e-4]", panel=MODEL)] = None,
    epochs: Annotated[int | None, _option("Of each run [30; images: 20]", panel=MODEL)] = None,
    batch_size: Annotated[int | None, _option("Images in a batch [128]", panel=MODEL)] = None,
    augment: Annotated[
        bool | None,
        typer.Option(
            "--augment/--no-augment",
            help="Shift and mirror images at random [images only]",
            rich_help_panel=MODEL,
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        float | None,
        _option("Test accuracy to race for [0.97; images: the best that all reach]", panel=MODEL),
    ] = None,
    seed: Annotated[int | None, _option("Of weights, batches and split [0]", panel=MODEL)] = None,
    repeats: Annotated[int | None, _option("Seeds to run each contestant with [5; images: 1]", panel=MODEL)] = None,
    damping: Annotated[float | None, _option("Added to the curvature [0.01; images: 0.003]", panel=KFAC)] = None,
    factor_update_steps: Annotated[
        int | None, _option("Steps between two updates of the factors [10]", panel=KFAC)
    ] = None,
    inv_update_steps: Annotated[
        int | None, _option("Steps between two decompositions [20; images: 100]", panel=KFAC)
    ] = None,
    factor_decay: Annotated[float | None, _option("Weight of the past in the factors [0.95]", panel=KFAC)] = None,
    kl_clip: Annotated[float | None, _option("Size of the trust region; 0 for none [0.001]", panel=KFAC)] = None,
    solver: Annotated[
        str | None, _option("eigen, cholesky, ekfac or sqrt_ekfac [cholesky; images: eigen]", panel=KFAC)
    ] = None,
    threads: Annotated[int | None, _option("Processor threads [1; images: PyTorch's choice]", panel=MACHINE)] = None,
    device: Annotated[str | None, _option("cpu or cuda [cpu]", panel=MACHINE)] = None,
) -> int:
    """Train with a first-order optimizer and with the same optimizer behind K-FAC.

    Both start from the same weights and see the same batches under the same schedule. At the end
    there is a table, and in the folder of the run a plot and a record.
    """
    given = {name: value for name, value in context.params.items() if value is not None}
    if resume is not None:
        return _resume(resume, [name for name in given if name != "resume"])
    given.pop("output", None)
    return _start(Options.complete(given), output)


def _start(options: Options, output: Path | None) -> int:
    folder = output or RUNS / f"{datetime.now():%Y%m%d-%H%M%S}-{options.title}"
    check_folder(folder)
    return _train(options, folder, None)


def _resume(folder: Path, given: Sequence[str]) -> int:
    if given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigurationError(f"--resume takes the options of the run; leave out {names}")
    record = Record.read(folder)
    return _train(record.options, folder, record)


def _train(options: Options, folder: Path, record: Record | None) -> int:
    """Begin a comparison, or go on with the one of a record, and report."""
    load_extra("matplotlib", "the plot")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    console = Console()
    try:
        with TerminalProgress(console) as progress:
            data = read_data(options, progress.read)
            if record is None:
                record = start_comparison(options, data, folder)
            check_same_data(record, data)
            progress.announce(data.source, folder)
            compare(record, data, folder, progress)
    except KeyboardInterrupt:
        return _keep(folder, record)
    _report(record, folder, console)
    return 0


def _keep(folder: Path, record: Record | None) -> int:
    """Say what an interruption left."""
    how = "nothing was written" if record is None else f"go on with: kaisa train --resume {folder}"
    print(f"kaisa: interrupted; {how}", file=sys.stderr)
    return INTERRUPTED


def _report(record: Record, folder: Path, console: Console) -> None:
    plot = draw_plot(record, folder)
    console.print(build_table(record))
    console.print(conclude(record), highlight=False, soft_wrap=True)
    console.print(f"plot and record: {plot}, {folder / FILE}", highlight=False, soft_wrap=True)
