"""How findings become pieces of evidence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kaisa.assure.evidence import Cell, HeldOut, PartitionReliability, compare_counts, digest_inputs, present
from kaisa.assure.exhibits import find_double_use, read_exhibit, write_exhibit


@pytest.mark.parametrize(
    "finding",
    [HeldOut(1, 100), PartitionReliability((Cell(100, 20, 0), Cell(20, 20, 1))), compare_counts([50, 50], [60, 40])],
)
def test_a_finding_is_written_and_read_as_an_exhibit(finding: object, tmp_path: Path) -> None:
    made = present(finding, name="one", command="kaisa …", on="2026-11-20", inputs=digest_inputs(torch.randn(3, 2)))
    read = read_exhibit(tmp_path / "one.json") if write_exhibit(tmp_path / "one.json", made) else None
    assert read is not None
    assert (read.statement, read.value, read.quantile) == (finding.statement, finding.value, finding.quantile)
    assert read.inputs == made.inputs
    assert read.assumptions == finding.assumptions


def test_inputs_are_told_apart_by_what_they_are() -> None:
    x = torch.randn(5, 3)
    assert len(digest_inputs(x)) == 5
    assert digest_inputs(x) == digest_inputs(x.flip(0))
    assert digest_inputs(x).isdisjoint(digest_inputs(x.double()))
    assert digest_inputs(x).isdisjoint(digest_inputs(x[:, :, None]))


def test_an_input_that_two_findings_used_is_found() -> None:
    x = torch.randn(10, 4)
    first = present(HeldOut(0, 6), name="first", command="c", inputs=digest_inputs(x[:6]))
    second = present(HeldOut(0, 5), name="second", command="c", inputs=digest_inputs(x[5:]))
    apart = present(HeldOut(0, 4), name="apart", command="c", inputs=digest_inputs(x[6:]))
    assert find_double_use([first, apart]) == []
    assert len(find_double_use([first, second])) == 1
