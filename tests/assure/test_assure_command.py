"""`kaisa assure` as a user meets it: from an empty folder to a case, and everything that is refused on the way."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import nn

import kaisa
from kaisa.assure.case_file import TEMPLATE, read_case_file
from kaisa.assure.claims import confidence
from kaisa.assure.exhibits import Exhibit, write_exhibit
from kaisa.assure.prior import Prior
from kaisa.cli import run
from kaisa.errors import KaisaError

START = datetime(2026, 1, 1, tzinfo=UTC)
BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
CASE = """
title = "The digit reader is reliable"
[system]
name = "digit reader"
model = "model.bin"
frozen = 2026-01-01T00:00:00Z
[operation]
records = "operation.csv"
journal = "operation.journal"
[prior]
floor = 1e-4
floor_because = "labels"
[[prior.quantile]]
bound = 0.005
belief = 0.9
because = "earlier versions"
[[claim]]
kind = "confidence"
bound = 0.05
target = 0.95
[[claim]]
kind = "reliability"
demands = 5
target = 0.9
[[claim]]
kind = "expected_pfd"
target = 0.05
"""


def write_records(path: Path, failed: list[bool], start: datetime = START) -> None:
    lines = [f"{int(flag)},0,{(start + timedelta(minutes=i)).isoformat()}" for i, flag in enumerate(failed)]
    path.write_text("\n".join(["prediction,truth,time", *lines]) + "\n")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "case.toml").write_text(CASE)
    (tmp_path / "model.bin").write_bytes(b"weights")
    write_records(tmp_path / "operation.csv", [False] * 400)
    return tmp_path


def claims(folder: Path) -> dict[str, Any]:
    value = json.loads((folder / "case-case" / "claims.json").read_text())
    assert isinstance(value, dict)
    return value


def test_init_writes_a_case_file_that_is_whole_and_overwrites_none(folder: Path) -> None:
    assert run(["assure", "init", "new.toml"]) == 0
    assert read_case_file(folder / "new.toml").system == "digit reader"
    (folder / "new.toml").write_text("mine")
    assert run(["assure", "init", "new.toml"]) == 2
    assert (folder / "new.toml").read_text() == "mine"


def test_a_run_counts_demands_and_makes_the_claims(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["assure", "run", "case.toml"]) == 0
    assert "0 failures in 400 demands" in capsys.readouterr().out
    found = claims(folder)
    assert (found["demands"], found["failures"]) == (400, 0)
    assert found["claims"][0]["value"] == confidence(0.05, Prior({0.005: 0.9}, floor=1e-4), demands=400).value
    assert all(claim["met"] and claim["proof"]["slack"] > -1e-9 for claim in found["claims"])


def test_a_burst_of_failures_lets_the_claim_fall_and_the_command_fail(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["assure", "run", "case.toml"]) == 0
    write_records(folder / "operation.csv", [False] * 400 + [True] * 30)
    assert run(["assure", "run", "case.toml"]) == 1
    assert "it has to be at least 0.95" in capsys.readouterr().out.replace("\n", " ")
    assert claims(folder)["failures"] == 30
    assert run(["assure", "report", "case.toml"]) == 1


def test_two_runs_over_the_same_stream_are_as_one(folder: Path) -> None:
    for _ in range(2):
        assert run(["assure", "run", "case.toml"]) == 0
    assert claims(folder)["demands"] == 400


def refuse(
    folder: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], None], arguments: str = "run"
) -> str:
    """Run once soundly and once spoilt; return what the second says, which changes neither journal nor case."""
    assert run(["assure", "run", "case.toml"]) == 0
    capsys.readouterr()
    spoil(folder)
    before = {path: path.read_bytes() for path in [folder / "operation.journal", *folder.glob("case-case/*")]}
    assert run(["assure", arguments, "case.toml"]) == 2
    assert {path: path.read_bytes() for path in before} == before
    return capsys.readouterr().err


def replaced(old: str, new: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        assert old in CASE
        (folder / "case.toml").write_text(CASE.replace(old, new, 1))

    return spoil


def written(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


HEAD = "prediction,truth,time\n"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (written("case.toml", "title = "), "is no TOML"),
        (replaced("target = 0.95", "target = 95"), "target is 95"),
        (replaced("target = 0.95", "target = nan"), "target is nan"),
        (replaced("bound = 0.05", "bound = 5"), "bound p is 5.0"),
        (replaced("bound = 0.05", ""), "bound is missing"),
        (replaced("demands = 5", "demands = 1.5"), "whole number"),
        (replaced("floor = 1e-4", "flor = 1e-4"), "unknown flor"),
        (replaced("floor = 1e-4", "floor = 0.1"), "floor is 0.1"),
        (replaced("belief = 0.9", "belief = 0.99"), "fixed before the first demand"),
        (replaced('because = "earlier versions"', ""), "because is missing"),
        (replaced('kind = "reliability"', 'kind = "luck"'), "kind is 'luck'"),
        (replaced('name = "digit reader"', 'name = "letter reader"'), "is the journal of 'digit reader'"),
        (replaced("frozen = 2026-01-01T00:00:00Z", 'frozen = "soon"'), "frozen is 'soon'"),
        (written("model.bin", "other weights"), "model file has changed"),
        (lambda folder: (folder / "model.bin").unlink(), "model.bin cannot be read"),
        (lambda folder: (folder / "operation.csv").unlink(), "operation.csv cannot be read"),
        (written("operation.csv", f"{HEAD}1,nan,2026-01-01T00:00:00\n"), "the truth is 'nan'"),
        (written("operation.csv", f"{HEAD}1,1,2126-01-01\n"), "in the future"),
        (written("operation.csv", f"{HEAD}1,1,2025-01-01\n"), "before the one that precedes it"),
        (written("operation.csv", f"{HEAD}0,0,2026-02-02\n0,0,2026-02-02\n"), "is the same as record"),
        (written("operation.csv", f"{HEAD}0,0,2026-01-01T00:00:00+00:00\n0,0,2026-02-02\n"), "not demand 2"),
        (written("operation.journal", "{}\n"), "is no kaisa assure journal"),
    ],
)
def test_bad_input_is_refused_in_one_line_and_changes_nothing(
    spoil: Callable[[Path], None], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refuse(folder, capsys, spoil)
    assert message in said
    assert said.count("\n") == 1


def with_held_out(folder: Path) -> None:
    write_records(folder / "held-out.csv", [False] * 999 + [True], START - timedelta(days=30))
    text = CASE.replace('bound = 0.005\nbelief = 0.9\nbecause = "earlier versions"', 'from = "held-out"')
    text += '[[evidence]]\nname = "held-out"\nrecords = "held-out.csv"\nsupports = "training"\n'
    (folder / "case.toml").write_text(text)


def test_a_quantile_may_come_from_held_out_records(folder: Path) -> None:
    with_held_out(folder)
    assert run(["assure", "run", "case.toml"]) == 0
    assert claims(folder)["prior"]["quantiles"] == [[pytest.approx(0.00473497, rel=1e-3), 0.95]]


def use_the_file_twice(folder: Path) -> None:
    shutil.copy(folder / "held-out.csv", folder / "operation.csv")


def use_records_twice(folder: Path) -> None:
    (folder / "operation.csv").write_text("\n".join((folder / "held-out.csv").read_text().split("\n")[:3]) + "\n")


def use_inputs_twice(folder: Path) -> None:
    digest = "a" * 64
    write = "failure,time,id,input\n0,{},{},{}\n".format
    (folder / "held-out.csv").write_text(write("2025-12-01", "old", digest))
    (folder / "operation.csv").write_text(write("2026-02-01", "new", digest))


@pytest.mark.parametrize("spoil", [use_the_file_twice, use_records_twice, use_inputs_twice])
def test_data_that_the_prior_was_drawn_from_do_not_count_again(
    spoil: Callable[[Path], None], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_held_out(folder)
    spoil(folder)
    assert run(["assure", "run", "case.toml"]) == 2
    assert "cannot count again as operation" in capsys.readouterr().err
    assert not (folder / "operation.journal").exists()


def test_changed_evidence_for_the_prior_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_held_out(folder)
    assert run(["assure", "run", "case.toml"]) == 0
    write_records(folder / "held-out.csv", [False] * 1000, START - timedelta(days=30))
    shutil.rmtree(folder / "case-case")
    assert run(["assure", "run", "case.toml"]) == 2
    assert "fixed before the first demand" in capsys.readouterr().err


def test_evidence_that_changed_after_it_was_cited_is_refused_before_anything_is_counted(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = Exhibit("audit", "Labels were looked at", None, "by hand", "2026-01-01")
    write_exhibit(folder / "audit.json", made)
    (folder / "case.toml").write_text(CASE + '[[evidence]]\nfile = "audit.json"\nsupports = "data"\n')
    assert run(["assure", "run", "case.toml"]) == 0
    journal = (folder / "operation.journal").read_bytes()
    write_records(folder / "operation.csv", [False] * 401)
    write_exhibit(folder / "audit.json", replace(made, statement="Labels were looked at twice"))
    for command in ("run", "report"):
        assert run(["assure", command, "case.toml"]) == 2
        assert "audit.json has changed since the case" in capsys.readouterr().err
    assert (folder / "operation.journal").read_bytes() == journal


def test_a_failure_without_a_floor_voids_the_claims_and_says_so(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replaced("floor = 1e-4\n", "")(folder)
    (folder / "case.toml").write_text((folder / "case.toml").read_text().replace('floor_because = "labels"\n', ""))
    write_records(folder / "operation.csv", [False] * 400 + [True])
    assert run(["assure", "run", "case.toml"]) == 1
    assert "Argue a floor above 0" in capsys.readouterr().out.replace("\n", " ")
    assert run(["assure", "report", "case.toml"]) == 1


class Page(HTMLParser):
    """Collects the tags of a page, and what it would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: dict[str, int] = {}
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.fetched += [str(v) for k, v in attrs if k in ("src", "href", "xlink:href") and not str(v).startswith("#")]


def test_the_report_stands_alone_and_has_the_argument_and_the_plots(folder: Path) -> None:
    text = CASE + '[[defeater]]\nchallenges = "operation"\ntext = "<b>Fog</b>"\nanswer = "None indoors"\n'
    (folder / "case.toml").write_text(text)
    assert run(["assure", "run", "case.toml"]) == 0
    assert run(["assure", "report", "case.toml", "--output", "out"]) == 0
    content = (folder / "out" / "case.html").read_text()
    page = Page()
    page.feed(content)
    assert page.fetched == []
    assert "script" not in page.tags
    assert "&lt;b&gt;Fog" in content
    assert "url(http" not in content.replace("'", "").replace('"', "")
    assert page.tags["svg"] == 1 + 2 * 3
    ids = re.findall(r'\bid="([^"]+)"', content)
    assert len(ids) == len(set(ids))
    assert {path.name for path in (folder / "out").iterdir()} == {
        *("case.html", "case.svg", "case.json", "claims.json", "case.gsn.yaml", "case.mmd")
    }


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_a_browser_shows_the_report(folder: Path) -> None:
    assert run(["assure", "run", "case.toml"]) == 0
    assert run(["assure", "report", "case.toml"]) == 0
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    page = (folder / "case-case" / "case.html").as_uri()
    done = subprocess.run(
        [str(BROWSER), *options, "--dump-dom", page], capture_output=True, text=True, timeout=300, check=True
    )
    assert "The case holds" in done.stdout
    assert done.stdout.rstrip().endswith("</html>")


def test_an_unknown_notation_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["assure", "report", "case.toml", "--notation", "uml"]) == 2
    assert "unknown notation 'uml'" in capsys.readouterr().err


LINES = TEMPLATE.split("\n")


@settings(deadline=None, max_examples=150)
@given(
    line=st.integers(0, len(LINES) - 1),
    new=st.one_of(
        st.text(max_size=30), st.sampled_from(["[prior]", "[[claim]]", "floor = nan", "title = 3", "x.y = 1"])
    ),
)
def test_whatever_a_case_file_holds_is_read_or_refused_in_words(
    line: int, new: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.toml"
    changed = [*LINES[:line], new, *LINES[line + 1 :]]
    path.write_text("\n".join(changed), encoding="utf-8", errors="ignore")
    with suppress(KaisaError):
        assert read_case_file(path).targets


def test_digits_are_learned_frozen_and_watched_in_operation(folder: Path) -> None:
    """The whole way in small: train behind K-FAC, freeze, hold out, operate, fail, fall."""
    digits = load_digits()
    images, labels = in_random_order(digits)
    model = train(images[:900], labels[:900])
    save_file(model.state_dict(), folder / "model.bin")
    said = model(images).argmax(1)
    write_predictions(folder / "held-out.csv", said[900:1300], labels[900:1300], START - timedelta(days=9))
    write_predictions(folder / "operation.csv", said[1300:], labels[1300:], START)
    text = CASE.replace('bound = 0.005\nbelief = 0.9\nbecause = "earlier versions"', 'from = "held-out"')
    text = text.replace(
        "[[claim]]", '[[prior.quantile]]\nbound = 0.01\nbelief = 0.025\nbecause = "its lower bound"\n[[claim]]', 1
    )
    text = text.replace("bound = 0.05", "bound = 0.15").replace("demands = 5", "demands = 1").replace("0.05", "0.2")
    (folder / "case.toml").write_text(
        text + '[[evidence]]\nname = "held-out"\nrecords = "held-out.csv"\nsupports = "training"\n'
    )
    assert run(["assure", "run", "case.toml"]) == 0
    sure = claims(folder)["claims"][0]["value"]
    with (folder / "operation.csv").open("a") as stream:
        stream.writelines(f"0,1,{(START + timedelta(days=1, minutes=i)).isoformat()}\n" for i in range(120))
    assert run(["assure", "run", "case.toml"]) == 1
    assert claims(folder)["claims"][0]["value"] < sure


def in_random_order(digits: Any) -> tuple[Any, Any]:
    shuffled = torch.randperm(len(digits.target))
    return torch.tensor(digits.data, dtype=torch.float32)[shuffled] / 16, torch.tensor(digits.target)[shuffled]


def train(images: Any, labels: Any) -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    kfac = kaisa.KFACPreconditioner(model, optimizer, damping=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        kfac.step()
        optimizer.step()
    return model.eval()


def write_predictions(path: Path, said: Any, labels: Any, start: datetime) -> None:
    pairs = zip(said.tolist(), labels.tolist(), strict=True)
    lines = [f"{a},{b},{(start + timedelta(minutes=i)).isoformat()}" for i, (a, b) in enumerate(pairs)]
    path.write_text("\n".join(["prediction,truth,time", *lines]) + "\n")
