"""The command `kaisa`.

    kaisa train                trains one of the recipes, with an optimizer and with the same behind K-FAC
    kaisa plan                 the fastest placement that fits on other hardware, or measures this machine
    kaisa explain              what a trained model looks at, as a page
    kaisa bench distributed    what each placement sends and holds, by formula
    kaisa assure               how reliable a frozen network may be claimed to be; 1 when a claim fails its target

Exit status: 0 done; 1 a rank was lost; 2 bad input, said in one line on standard error, with nothing
written; 130 interrupted, with what was done kept.

Of several ranks the first prints and writes. A refusal is said by one rank, and all leave.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Annotated

import typer

from kaisa.commands.assure import assure
from kaisa.commands.bench import bench
from kaisa.commands.explain import explain
from kaisa.commands.plan import plan
from kaisa.commands.processes import RefusedElsewhere
from kaisa.commands.status import BAD_INPUT, FAILED, INTERRUPTED
from kaisa.commands.train import train
from kaisa.errors import CollectiveError, KaisaError

UsageError: type[Exception] = typer.BadParameter.__bases__[0]  # Typer exports it by no name

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="K-FAC for PyTorch: trains deep networks in less time with second-order information.",
)
app.command()(train)
app.command()(plan)
app.command()(explain)
app.add_typer(bench, name="bench")
app.add_typer(assure, name="assure")


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
