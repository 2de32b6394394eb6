"""The code on the pages of the documentation runs, from top to bottom of each page."""

import re
from pathlib import Path

import pytest

PAGES = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.filterwarnings(  # Lightning's, of its own code and of a small example
    "ignore:`isinstance.treespec, LeafSpec.` is deprecated", "ignore:The 'train_dataloader' does not have many workers"
)
@pytest.mark.parametrize("page", [page for page in PAGES if BLOCK.search(page.read_text())], ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = BLOCK.findall(page.read_text())
    exec(compile("\n".join(blocks), str(page), "exec"), {"__name__": page.stem})
    assert blocks


def test_every_page_that_another_points_to_exists() -> None:
    root = Path(__file__).parents[1]
    for page in [*PAGES, root / "README.md"]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", BLOCK.sub("", page.read_text())):
            assert (page.parent / target).exists(), f"{page.name} points to {target}"


def test_the_first_page_points_to_every_other() -> None:
    first = PAGES[0].parent / "README.md"
    targets = {(first.parent / target).resolve() for target in re.findall(r"\]\(([^)#]+)\)", first.read_text())}
    pages = {page.resolve() for page in first.parent.rglob("*.md")} - {first.resolve()}
    assert pages <= targets, sorted(page.name for page in pages - targets)
