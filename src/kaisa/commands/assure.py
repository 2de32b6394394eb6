"""`kaisa assure`: how reliable a frozen network may be claimed to be, from its operational records.

kaisa assure init       writes a case file with comments
kaisa assure run        counts new demands and makes the claims; exit status 1 when one fails its target
kaisa assure report     draws the safety case: a page, and files for other tools
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from kaisa.commands.arguments import option
from kaisa.commands.status import FAILED
from kaisa.errors import ConfigurationError

if TYPE_CHECKING:
    from kaisa.assure.case_file import CaseFile
    from kaisa.assure.evaluation import Evaluation
    from kaisa.assure.network import Network

FILES = "Files"

assure = typer.Typer(help="How reliable a frozen network may be claimed to be.", no_args_is_help=False)


@assure.callback()
def _assure() -> None:
    """How reliable a frozen network may be claimed to be, by conservative Bayesian inference."""


@assure.command()
def init(
    file: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("case.toml"),
) -> int:
    """Write a case file with comments, to be filled in."""
    from kaisa.assure.case_file import TEMPLATE

    try:
        with file.open("x", encoding="utf-8") as stream:
            stream.write(TEMPLATE)
    except FileExistsError:
        raise ConfigurationError(f"{file} is there already; give another name") from None
    except OSError as error:
        raise ConfigurationError(f"{file} cannot be written: {error.strerror}") from error
    print(f"{file}: fill it in, then `kaisa assure run {file}`")
    return 0


@assure.command()
def run(
    file: Annotated[Path, typer.Argument(help="The case file, TOML.")],
    output: Annotated[Path | None, option("Folder of claims and case [NAME-case beside the file]", panel=FILES)] = None,
) -> int:
    """Count the demands that are new, make the claims, and check the case.

    Exit status 1 when a claim fails its target or the case has another problem.
    """
    from kaisa.assure.case_file import read_case_file
    from kaisa.assure.evaluation import evaluate, refuse_changed_evidence, write_results

    known, folder = read_case_file(file), output or _folder(file)
    refuse_changed_evidence(known, folder)
    evaluation = evaluate(known, _network(known))
    case = write_results(evaluation, folder)
    problems = case.problems(known.folder)
    console = Console(highlight=False)
    console.print(_table(evaluation))
    journal = evaluation.journal
    console.print(f"{journal.failures:,} failures in {journal.demands:,} demands; prior: {evaluation.prior.describe()}")
    for problem in problems:
        console.print(f"problem: {problem.text}", style="red", markup=False, soft_wrap=True)
    console.print(f"case: {folder}", markup=False, soft_wrap=True)
    return FAILED if problems else 0


@assure.command()
def report(
    file: Annotated[Path, typer.Argument(help="The case file, TOML.")],
    output: Annotated[Path | None, option("Folder of the report [NAME-case beside the file]", panel=FILES)] = None,
    notation: Annotated[str, option("gsn or cae [gsn]", panel=FILES)] = "gsn",
) -> int:
    """Draw the safety case from the demands that are counted: HTML, SVG, gsn2x YAML, Mermaid and JSON."""
    from kaisa.assure.case_drawing import draw_case
    from kaisa.assure.case_file import read_case_file
    from kaisa.assure.case_notations import WORDS, to_gsn2x, to_mermaid
    from kaisa.assure.evaluation import evaluate, refuse_changed_evidence, write_results
    from kaisa.assure.exhibits import replace_file
    from kaisa.assure.report_page import draw_page

    chosen = next((known for known in WORDS if known == notation), None)
    if chosen is None:
        raise ConfigurationError(f"unknown notation {notation!r}; choose from {', '.join(WORDS)}")
    known, folder = read_case_file(file), output or _folder(file)
    refuse_changed_evidence(known, folder)
    evaluation = evaluate(known, _network(known), count=False)
    case = write_results(evaluation, folder)
    problems = case.problems(known.folder)
    for name, text in (
        ("case.html", draw_page(evaluation, case, problems, chosen)),
        ("case.svg", draw_case(case, chosen)),
        ("case.gsn.yaml", to_gsn2x(case)),
        ("case.mmd", to_mermaid(case, chosen)),
    ):
        replace_file(folder / name, text)
    print(f"{folder / 'case.html'}: {'the case holds' if not problems else f'{len(problems)} problems'}")
    return FAILED if problems else 0


def _network(known: CaseFile) -> Network | None:
    """Return the network of the run that a case names."""
    if not known.run:
        return None
    from kaisa.recipes.demands import read_network

    return read_network(known.folder / known.run, known.criterion)


def _folder(file: Path) -> Path:
    return file.parent / f"{file.stem}-case"


def _table(evaluation: Evaluation) -> Table:
    """Return the claims as a table."""
    from kaisa.assure.case import say_number

    table = Table(box=None, pad_edge=False)
    for name in ("claim", "worst case", "target", ""):
        table.add_column(name, justify="left" if name in ("claim", "") else "right", overflow="fold")
    for result in evaluation.results:
        sign = "≤" if result.target.kind == "expected_pfd" else "≥"
        value = "void" if result.claim.void else say_number(result.claim.value)
        state = "[green]reached[/]" if result.is_met else "[red]missed[/]"
        table.add_row(result.claim.question.describe(), value, f"{sign} {result.target.target:g}", state)
    return table
