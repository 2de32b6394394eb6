"""The command `kaisa`.

    kaisa train                trains one of the recipes, with an optimizer and with the same behind K-FAC
    kaisa plan                 the fastest placement that fits on other hardware, or measures this machine
    kaisa bench distributed    what each placement sends and holds, by formula

Exit status: 0 done; 1 a rank was lost; 2 bad input, said in one line on standard error, with nothing
written; 130 interrupted, with what was done kept.

Of several ranks the first prints and writes. A refusal is said by one rank, and all leave.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape

from kaisa.errors import CollectiveError, ConfigurationError, KaisaError
from kaisa.kfac.arrangement import AUTO
from kaisa.kfac.collectives import (
    Alone,
    Collectives,
    absent_ranks_named,
    join_world,
    launched_world,
    leave_world,
    start_processes,
)
from kaisa.kfac.hardware import Hardware, shipped_profiles
from kaisa.kfac.placement import COMM_OPT, HYBRID_OPT, MEM_OPT
from kaisa.recipes.calibration import calibrate
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
from kaisa.recipes.distributed import build_accounts, describe_account
from kaisa.recipes.extras import load_extra
from kaisa.recipes.files import written_whole
from kaisa.recipes.options import LEARNING_RATES, Options
from kaisa.recipes.plan import ALLOWED, build_plan, describe_plan, draw_trade_off
from kaisa.recipes.progress import TerminalProgress
from kaisa.recipes.record import FILE, Record
from kaisa.recipes.report import build_table, conclude, draw_plot
from kaisa.recipes.tensorboard import TensorBoard, Watchers, check_tensorboard
from kaisa.recipes.zoo import MODELS as PLANNED_MODELS

FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130
RUNS = Path("runs")
UsageError: type[Exception] = typer.BadParameter.__bases__[0]  # Typer exports it by no name

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="K-FAC for PyTorch: trains deep networks in less time with second-order information.",
)
bench = typer.Typer(help="Figures of the library.", no_args_is_help=False)
app.add_typer(bench, name="bench")


class RefusedElsewhere(KaisaError):
    """Another rank has said why nothing starts."""


def main() -> None:
    """Run the command with the arguments of the process, and leave with its exit status."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    try:
        return app(args=list(arguments), prog_name="kaisa", standalone_mode=False, obj=list(arguments)) or 0
    except UsageError as error:
        return _refuse(getattr(error, "format_message", error.__str__)())
    except RefusedElsewhere:
        return BAD_INPUT
    except CollectiveError as error:
        _refuse(str(error))
        return FAILED
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


DATA = "Data and where the run goes"
MODEL = "Model and schedule"
KFAC = "K-FAC"
MACHINE = "Machine"


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


def _option(text: str, *names: str, panel: str) -> Any:
    return typer.Option(*names, help=escape(text), rich_help_panel=panel, show_default=False)  # brackets are no markup


@app.command()
def train(
    context: typer.Context,
    recipe: Annotated[
        str | None, _option(f"One of {', '.join(RECIPES)} [digits; with --data: resnet]", panel=DATA)
    ] = None,
    data: Annotated[
        str | None,
        _option(
            "Folder or zip file: of images, a subfolder a class; unet: image/NAME, label/NAME; gpt, bert: .txt "
            "[handwritten digits]",
            panel=DATA,
        ),
    ] = None,
    test_data: Annotated[
        str | None,
        _option("Images to test on [NAME-test beside NAME-train, or a fifth]", panel=DATA),
    ] = None,
    image_size: Annotated[int | None, _option("Resize images to this width and height", panel=DATA)] = None,
    crop: Annotated[int | None, _option("unet: width and height of what is learned from [128]", panel=DATA)] = None,
    positions: Annotated[
        int | None, _option(f"gpt, bert: tokens of a sequence {_usual('positions')}", panel=DATA)
    ] = None,
    unit: Annotated[
        str | None, _option(f"gpt, bert: tokens are characters or words {_usual('unit')}", panel=DATA)
    ] = None,
    vocabulary: Annotated[
        int | None, _option(f"gpt, bert: most tokens that are told apart {_usual('vocabulary')}", panel=DATA)
    ] = None,
    output: Annotated[Path | None, _option("Folder of the run [runs/TIME-DATA-MODEL]", panel=DATA)] = None,
    tensorboard: Annotated[
        bool | None,
        typer.Option(
            "--tensorboard",
            help="Write losses and scores for TensorBoard",
            rich_help_panel=DATA,
            show_default=False,
        ),
    ] = None,
    resume: Annotated[Path | None, _option("Go on with an interrupted run, with its own options", panel=DATA)] = None,
    model: Annotated[str | None, _option(_models(), panel=MODEL)] = None,
    contestants: Annotated[
        str | None, _option("both, first-order or kfac [both; adahessian: first-order]", panel=MODEL)
    ] = None,
    optimizer: Annotated[
        str | None,
        _option(
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
        float | None, _option(f"Highest learning rate, of both unless --kfac-lr [{_rates()}]", panel=MODEL)
    ] = None,
    kfac_lr: Annotated[float | None, _option("Highest learning rate behind K-FAC [as --lr]", panel=MODEL)] = None,
    weight_decay: Annotated[float | None, _option("Of both [5e-4]", panel=MODEL)] = None,
    epochs: Annotated[int | None, _option(f"Of each run {_usual('epochs')}", panel=MODEL)] = None,
    batch_size: Annotated[int | None, _option(f"Examples in a batch {_usual('batch_size')}", panel=MODEL)] = None,
    augment: Annotated[
        bool | None,
        typer.Option(
            "--augment/--no-augment",
            help="Shift, turn and mirror images at random [resnet and unet only]",
            rich_help_panel=MODEL,
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        float | None,
        _option("Test score to race for [digits: 0.97; the best that all reach]", panel=MODEL),
    ] = None,
    seed: Annotated[int | None, _option("Of weights, batches and split [0]", panel=MODEL)] = None,
    repeats: Annotated[int | None, _option("Seeds to run each contestant with [digits: 5; 1]", panel=MODEL)] = None,
    damping: Annotated[float | None, _option("Added to the curvature [digits: 0.01; 0.003]", panel=KFAC)] = None,
    factor_update_steps: Annotated[
        int | None, _option("Steps between two updates of the factors [unet: 5; 10]", panel=KFAC)
    ] = None,
    inv_update_steps: Annotated[
        int | None, _option("Steps between two decompositions [resnet: 100; gpt, bert: 50; 20]", panel=KFAC)
    ] = None,
    factor_decay: Annotated[float | None, _option("Weight of the past in the factors [0.95]", panel=KFAC)] = None,
    kl_clip: Annotated[float | None, _option("Size of the trust region; 0 for none [0.001]", panel=KFAC)] = None,
    solver: Annotated[
        str | None, _option("eigen, cholesky, ekfac or sqrt_ekfac [digits: cholesky; eigen]", panel=KFAC)
    ] = None,
    threads: Annotated[int | None, _option("Processor threads [digits: 1; PyTorch's choice]", panel=MACHINE)] = None,
    device: Annotated[str | None, _option("cpu or cuda [cpu]", panel=MACHINE)] = None,
    precision: Annotated[str | None, _option("float32, or bfloat16 for autocast [float32]", panel=MACHINE)] = None,
    nproc: Annotated[int | None, _option("Processes that share each batch [1, or torchrun's]", panel=MACHINE)] = None,
    grad_worker_fraction: Annotated[
        str | None,
        _option(
            "Share of processes that hold a layer's decompositions: comm, hybrid, mem, a number or auto (comm)",
            panel=KFAC,
        ),
    ] = None,
    memory_budget: Annotated[
        str | None, _option("Memory of a process that K-FAC may take with auto, such as 2GiB", panel=KFAC)
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
    given["nproc"] = _count_ranks(nproc)
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


def _count_ranks(nproc: int | None) -> int:
    """Return how many processes take part: those that torchrun has started, or those that are asked for."""
    launched = launched_world()
    if launched is None:
        return 1 if nproc is None else nproc
    if nproc not in (None, launched[1]):
        raise ConfigurationError(
            f"nproc is {nproc}, but torchrun has started {launched[1]} processes; leave out --nproc"
        )
    return launched[1]


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
        with _interruptible(), _together(options) as ranks, TerminalProgress(console) as progress:
            data, record = _agreed(ranks, lambda: _prepare(options, folder, progress, resumed, is_first))
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


@contextmanager
def _together(options: Options) -> Iterator[Collectives]:
    """Join the other ranks for a while; alone where there are none."""
    try:
        ranks = join_world(torch.device(options.device)) if options.nproc > 1 else Alone()
        with absent_ranks_named():
            yield ranks
    finally:
        leave_world()


def _agreed(ranks: Collectives, prepare: Callable[[], tuple[Data, Record]]) -> tuple[Data, Record]:
    """Prepare on every rank; if one refuses all do, and the first of those that do says why."""
    refusal: KaisaError | None = None
    prepared = None
    try:
        prepared = prepare()
    except KaisaError as error:
        refusal = error
    own = torch.zeros(ranks.world_size)
    own[ranks.rank] = refusal is not None
    device = torch.device("cuda" if torch.cuda.is_available() and ranks.world_size > 1 else "cpu")
    refusing = ranks.total("refusals", tuple(range(ranks.world_size)), own.to(device)).nonzero().flatten().tolist()
    if refusal is not None and ranks.rank == refusing[0]:
        raise refusal
    if refusing or prepared is None:
        raise RefusedElsewhere
    return prepared


@contextmanager
def _interruptible() -> Iterator[None]:
    """Make one interruption of however many signals: torchrun repeats to its ranks what the terminal told them too.

    What fails afterwards, because another rank has left, is part of the interruption.
    """
    interrupted = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        if not interrupted:
            interrupted = True
            raise KeyboardInterrupt

    previous = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except (KaisaError, RuntimeError) as error:
        if interrupted:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, previous)


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


PLANNED = "What is planned"
CHOICE = "What may be chosen"
FILES = "Files"


@app.command()
def plan(
    context: typer.Context,
    model: Annotated[
        str, _option(f"One of {', '.join(PLANNED_MODELS)}; resnet50 unless given", panel=PLANNED)
    ] = "resnet50",
    world_size: Annotated[int, _option("How many ranks [64]", panel=PLANNED)] = 64,
    hardware: Annotated[
        str | None,
        _option(f"{', '.join(shipped_profiles())}, or a file that --calibrate has made", panel=PLANNED),
    ] = None,
    batch: Annotated[
        int | None, _option("Examples a rank; unless given, as the model is usually trained", panel=PLANNED)
    ] = None,
    factor_update_steps: Annotated[int, _option("Steps between two updates of the factors [10]", panel=PLANNED)] = 10,
    inv_update_steps: Annotated[int, _option("Steps between two decompositions [100]", panel=PLANNED)] = 100,
    solver: Annotated[
        str, _option("eigen unless given; warm_eigen, cholesky, ekfac or sqrt_ekfac", panel=PLANNED)
    ] = "eigen",
    memory_budget: Annotated[
        str | None, _option("Memory of a rank that K-FAC may take, such as 2GiB; any unless given", panel=CHOICE)
    ] = None,
    allow: Annotated[
        list[str] | None, _option(f"Let it choose this too: {', '.join(ALLOWED)}; may be repeated", panel=CHOICE)
    ] = None,
    output: Annotated[Path | None, _option("Write the plan, or the profile, as JSON", panel=FILES)] = None,
    plot: Annotated[Path | None, _option("Draw memory against time as PNG", panel=FILES)] = None,
    calibrate_machine: Annotated[
        bool, typer.Option("--calibrate", help="Measure this machine instead", rich_help_panel=MACHINE)
    ] = False,
    nproc: Annotated[
        int | None, _option("Processes to measure with [2; on GPUs one each; or torchrun's]", panel=MACHINE)
    ] = None,
    device: Annotated[str, _option("What to measure: cpu, unless cuda is given", panel=MACHINE)] = "cpu",
) -> int:
    """Predict memory, traffic and time of every placement of a model, and choose the fastest that fits.

    None of the ranks is needed: models have no storage here, and the hardware is a profile.
    """
    for path in (output, plot):
        _check_writable(path)
    if calibrate_machine:
        return _calibrate(device, nproc, output, context.obj)
    if hardware is None:
        known = ", ".join(shipped_profiles())
        raise ConfigurationError(f"give --hardware: {known}, or a file that `kaisa plan --calibrate` has made")
    made = build_plan(
        model,
        world_size,
        hardware,
        memory_budget=memory_budget,
        batch=batch,
        allow=allow or [],
        solver=solver,
        factor_update_steps=factor_update_steps,
        inv_update_steps=inv_update_steps,
    )
    describe_plan(made, Console(highlight=False))
    if plot is not None:
        draw_trade_off(made, plot)
    if output is not None:
        _write(output, made.to_json())
    return 0


def _check_writable(path: Path | None) -> None:
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise ConfigurationError(f"{path} is a folder" if path.is_dir() else f"there is no folder {path.parent}")


def _write(path: Path, text: str) -> None:
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _calibrate(name: str, nproc: int | None, output: Path | None, arguments: Sequence[str]) -> int:
    """Measure this machine as one of its ranks; the first speaks and writes."""
    if output is None:
        raise ConfigurationError("--calibrate needs --output, the file of the profile")
    if name != "cpu" and not (name == "cuda" and torch.cuda.is_available()):
        raise ConfigurationError(f"there is no device {name!r} to measure; give cpu, or cuda where there is one")
    device = torch.device(name)
    usual = torch.cuda.device_count() if device.type == "cuda" else 2
    count = _count_ranks(nproc) if nproc is not None or launched_world() is not None else usual
    if count < 1:
        raise ConfigurationError(f"nproc is {count}; give a whole number of at least 1")
    if launched_world() is None and count > 1:
        return start_processes(count, arguments)
    console = Console(highlight=False, quiet=(launched_world() or (0, 1))[0] != 0)
    try:
        ranks = join_world(device)
        with absent_ranks_named(), console.status("") as status:
            per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            found = calibrate(ranks, device, ranks_per_node=per_node, report=lambda text: status.update(text))
    finally:
        leave_world()
    if not console.quiet:
        _write(output, found.to_json())
        _describe_profile(found, output, console)
    return 0


def _describe_profile(found: Hardware, output: Path, console: Console) -> None:
    console.print(f"{found.name}: {found.ranks_per_node} ranks a node", markup=False)
    products = max(rate for _, rate in found.products["float32"])
    order, seconds = found.decompositions["eigen"][-1]
    exchange = found.exchange_inside
    console.print(f"products of matrices in float32: {products / 1e9:,.0f} GFLOP/s; forward and backward passes reach")
    console.print(f"{100 * found.training:.0f} % of it; copies {found.memory_bandwidth / 1e9:.1f} GB/s")
    console.print(f"eigendecomposition of order {order:.0f}: {seconds:.2f} s")
    if found.ranks_per_node > 1:
        console.print(f"exchange: {1e6 * exchange.latency:.0f} µs and {exchange.bandwidth / 1e9:.2f} GB/s a rank")
    console.print(f"profile: {output}", soft_wrap=True, markup=False)


@bench.callback()
def _bench() -> None:
    """Figures of the library."""


@bench.command()
def distributed(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(PLANNED_MODELS)}.")] = "resnet20",
    world_size: Annotated[int, typer.Option(help="How many ranks.")] = 8,
    solver: Annotated[str, typer.Option(help="Eigen, cholesky, ekfac or sqrt_ekfac.")] = "eigen",
) -> int:
    """Show what every placement of a model sends, and holds, by formula: no process is started."""
    console = Console(highlight=False)
    for account in build_accounts(model, world_size, solver):
        describe_account(account, console)
    return 0
