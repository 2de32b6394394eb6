"""What the import contract cannot say: parts of external packages, and what an import may do."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "kaisa"
FILES = sorted(SOURCE.rglob("*.py"))
SPEAKERS = {Path("kfac/collectives.py"), Path("optim/ranks.py")}


def imported_names(source: str) -> set[str]:
    """Return every module and member that the source imports, and every dotted name it uses."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=aliases):
                names |= {alias.name for alias in aliases}
            case ast.ImportFrom(module=str(module), names=aliases):
                names |= {module} | {f"{module}.{alias.name}" for alias in aliases}
            case ast.Attribute():
                names.add(ast.unparse(node))
            case _:
                pass
    return names


def speaks_to_distributed(source: str) -> bool:
    return any(name.startswith("torch.distributed") for name in imported_names(source))


@pytest.mark.parametrize(
    "source",
    [
        "import torch.distributed as dist",
        "from torch import distributed",
        "from torch.distributed import all_reduce",
        "import torch\n\ndef f():\n    torch.distributed.barrier()",
    ],
)
def test_every_way_to_reach_torch_distributed_is_seen(source: str) -> None:
    assert speaks_to_distributed(source)


def test_other_parts_of_torch_are_not_mistaken_for_it() -> None:
    assert not speaks_to_distributed("import torch\nfrom torch import distributions, nn\n")


@pytest.mark.parametrize("file", FILES, ids=[str(file.relative_to(SOURCE)) for file in FILES])
def test_only_one_file_of_a_system_speaks_to_torch_distributed(file: Path) -> None:
    if file.relative_to(SOURCE) not in SPEAKERS:
        assert not speaks_to_distributed(file.read_text(encoding="utf-8"))


def test_no_file_is_called_after_nothing() -> None:
    assert not {file.stem for file in FILES} & {"utils", "common", "helpers", "base"}


def test_importing_the_library_prints_nothing_and_needs_no_extra() -> None:
    program = (
        "import sys\n"
        "for name in ('sklearn', 'matplotlib', 'PIL', 'lightning', 'transformers', 'accelerate'):\n"
        "    sys.modules[name] = None\n"
        "import kaisa, kaisa.cli\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
