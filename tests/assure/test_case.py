"""The safety case: what is accepted, what a check finds, and that every notation says the same."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from kaisa.assure.case import Case, Edge, Figure, Node, read_case, say_number
from kaisa.assure.case_drawing import draw_case
from kaisa.assure.case_notations import to_gsn2x, to_mermaid
from kaisa.assure.exhibits import Exhibit, digest_bytes, digest_file, find_double_use, read_exhibit, write_exhibit
from kaisa.errors import ConfigurationError, DataError, StateError

COMMAND, DATE = "kaisa test", "2026-11-20"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "e.json").write_text("evidence")
    return tmp_path


@pytest.fixture
def case(folder: Path) -> Case:
    """A case in which everything is as it should be."""
    exhibit = Exhibit(
        *("e", "It holds", 0.97, COMMAND, DATE, digest_file(folder / "e.json"), "e.json", (0.1, 0.9)),
        at_most=(0.01, 0.1),
    )
    made = Case("A <small> & sound case")
    made.add(Node("G1", "goal", 'The "system" is safe: 1 < 2'))
    made.add(Node("C1", "context", "Indoors"), under="G1")
    made.add(Node("S1", "strategy", "Over claims"), under="G1")
    made.add(Node("J1", "justification", "They cover all"), under="S1")
    made.add(Node("G2", "goal", "Confidence", Figure(0.97, 0.95)), under="S1")
    made.add(Node("A1", "assumption", "Independent demands"), under="G2")
    made.add(Node("Sn1", "solution", "The figures", exhibit=exhibit), under="G2")
    made.add(Node("CG1", "defeater", "Rain", answer="It is indoors"), under="G2")
    return made


def texts(case: Case, folder: Path | None = None) -> list[str]:
    return [problem.text for problem in case.problems(folder)]


def change(case: Case, name: str, **values: object) -> None:
    case.nodes[name] = replace(case.nodes[name], **values)  # type: ignore[arg-type]


def test_a_sound_case_has_no_problem(case: Case, folder: Path) -> None:
    assert texts(case, folder) == []


def lose_support(case: Case, folder: Path) -> None:
    case.edges = [edge for edge in case.edges if edge.end != "Sn1"]


def give_up(case: Case, folder: Path) -> None:
    lose_support(case, folder)
    change(case, "G2", is_undeveloped=True)


def fall_short(case: Case, folder: Path) -> None:
    change(case, "G2", figure=Figure(0.94, 0.95))


def exceed(case: Case, folder: Path) -> None:
    change(case, "G2", figure=Figure(0.2, 0.1, at_most=True))


def be_void(case: Case, folder: Path) -> None:
    change(case, "G2", figure=Figure(None, 0.95, note="no floor"))


def go_in_a_circle(case: Case, folder: Path) -> None:
    case.edges.append(Edge("G2", "supported_by", "S1"))


def stand_apart(case: Case, folder: Path) -> None:
    case.add(Node("G9", "goal", "Another"))
    case.link("G9", "Sn1")


def doubt(case: Case, folder: Path) -> None:
    change(case, "CG1", answer="")


def cite_nothing(case: Case, folder: Path) -> None:
    change(case, "Sn1", exhibit=None)


def forge(case: Case, folder: Path) -> None:
    (folder / "e.json").write_text("better evidence")


def lose_the_file(case: Case, folder: Path) -> None:
    (folder / "e.json").unlink()


def use_twice(case: Case, folder: Path) -> None:
    digest = digest_bytes(b"images")
    exhibit = case.nodes["Sn1"].exhibit
    assert exhibit is not None
    for name in ("one", "other"):
        again = replace(exhibit, name=name, data={f"{name}.zip": digest})
        case.add(Node(f"Sn-{name}", "solution", name, exhibit=again), under="G2")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lose_support, "G2 has no support"),
        (give_up, "G2 is marked as undeveloped"),
        (fall_short, "G2 is 0.94; it has to be at least 0.95"),
        (exceed, "G2 is 0.2; it has to be at most 0.1"),
        (be_void, "G2 claims nothing: no floor"),
        (go_in_a_circle, "in a circle: S1 → G2 → S1"),
        (stand_apart, "one top goal; there is G1, G9"),
        (doubt, "CG1 defeats G2: Rain"),
        (cite_nothing, "Sn1 cites no evidence"),
        (forge, "e.json, has changed since it was cited"),
        (lose_the_file, "evidence of Sn1 is gone"),
        (use_twice, "'other' and 'one' both use one.zip"),
    ],
)
def test_a_check_finds_what_is_wrong(
    spoil: Callable[[Case, Path], None], message: str, case: Case, folder: Path
) -> None:
    spoil(case, folder)
    assert any(message in text for text in texts(case, folder)), texts(case, folder)


@pytest.mark.parametrize(
    ("node", "under", "message"),
    [
        (Node("G1", "goal", "Again"), "S1", "two nodes 'G1'"),
        (Node("G3", "goal", " "), "S1", "says nothing"),
        (Node("G3", "goal", "Lost"), "S7", "not there"),
        (Node("G3", "goal", "Upside down"), "Sn1", "a goal .* cannot stand under a solution"),
        (Node("C3", "context", "Beside evidence"), "Sn1", "a context .* cannot stand under a solution"),
        (Node("Sn3", "solution", "For a strategy"), "S1", "a solution .* cannot stand under a strategy"),
    ],
)
def test_what_does_not_belong_together_is_refused(node: Node, under: str, message: str, case: Case) -> None:
    before = dict(case.nodes), list(case.edges)
    with pytest.raises(ConfigurationError, match=message):
        case.add(node, under=under)
    assert (case.nodes, case.edges) == before


def test_a_case_is_read_as_it_was_written(case: Case, tmp_path: Path) -> None:
    case.write(tmp_path / "case.json")
    assert read_case(tmp_path / "case.json") == case


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2, "kind": "kaisa safety case"}', "\x00"])
def test_what_is_no_case_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "case.json").write_text(text)
    with pytest.raises(StateError, match="is not a safety case"):
        read_case(tmp_path / "case.json")


def test_edges_to_nowhere_are_refused(case: Case, tmp_path: Path) -> None:
    (tmp_path / "case.json").write_text(case.to_json().replace('"end": "Sn1"', '"end": "Sn7"'))
    with pytest.raises(StateError, match="Sn7, which are no nodes"):
        read_case(tmp_path / "case.json")


def test_yaml_for_gsn2x_says_what_the_case_says(case: Case) -> None:
    case.add(Node("Doubt", "defeater", "Fog"), under="S1")
    value = yaml.safe_load(to_gsn2x(case))
    assert value["module"]["name"] == case.title
    assert value["G1"] == {"text": 'The "system" is safe: 1 < 2', "supportedBy": ["S1"], "inContextOf": ["C1"]}
    assert value["G2"]["text"] == "Confidence (found: 0.97, needed: ≥ 0.95)"
    assert value["Sn1"]["url"] == "e.json"
    assert value["CG1"]["challenges"] == "G2"  # as in the documents of gsn2x, one element and no list
    assert "defeated" not in value["G2"]
    assert value["S1"]["defeated"]
    assert value["CG-Doubt"]["challenges"] == "S1"
    assert set(value) == {"module", "CG-Doubt", *case.nodes} - {"Doubt"}


def test_a_figure_just_below_1_is_not_shown_as_1(case: Case) -> None:
    assert [say_number(value) for value in (1.0, 1 - 1e-9, 0.97, 1e-140)] == ["1", "1 − 1.0e-09", "0.97", "1e-140"]
    change(case, "G2", figure=Figure(1 - 1e-9, 0.95))
    assert yaml.safe_load(to_gsn2x(case))["G2"]["text"] == "Confidence (found: 1 − 1.0e-09, needed: ≥ 0.95)"
    assert "✓ 1 − 1.0e-09, needed" in draw_case(case)


def test_mermaid_has_every_node_and_edge_once(case: Case) -> None:
    chart = to_mermaid(case)
    for name in case.nodes:
        assert len(re.findall(rf"^  {name}[^ \w]", chart, re.MULTILINE)) == 1
    assert sum(chart.count(arrow) for arrow in ("-->", "-.->", "==>")) == len(case.edges)
    assert "Goal G1" in chart
    assert "Claim G1" in to_mermaid(case, "cae")
    assert "Evidence Sn1" in to_mermaid(case, "cae")


def test_the_drawing_is_xml_in_which_no_two_boxes_overlap(case: Case) -> None:
    for index in range(3):
        case.add(Node(f"G3.{index}", "goal", "A long goal that takes several lines of text " * 2), under="S1")
        for number in range(index + 1):
            exhibit = case.nodes["Sn1"].exhibit
            name = f"Sn3.{index}.{number}"
            case.add(Node(name, "solution", "Figures", exhibit=exhibit), under=f"G3.{index}")
            case.add(Node(f"A{name}", "assumption", "Dry"), under=f"G3.{index}")
    drawing = draw_case(case)
    root = ElementTree.fromstring(drawing)
    boxes = [extent(shape) for shape in root.iter() if "shape" in shape.get("class", "").split()]
    assert len(boxes) == len(case.nodes)
    width, height = (float(number) for number in root.attrib["viewBox"].split()[2:])
    for index, (left, top, right, bottom) in enumerate(boxes):
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        for other in boxes[:index]:
            assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top
    assert "http://" not in drawing.replace("http://www.w3.org/2000/svg", "")


def extent(shape: ElementTree.Element) -> tuple[float, float, float, float]:
    """Return left, top, right and bottom of a shape."""
    value = shape.attrib
    if "r" in value:
        x, y, r = (float(value[name]) for name in ("cx", "cy", "r"))
        return x - r, y - r, x + r, y + r
    if "points" in value:
        points = [tuple(map(float, pair.split(","))) for pair in value["points"].split()]
        return (*map(min, zip(*points, strict=True)), *map(max, zip(*points, strict=True)))  # type: ignore[return-value]
    x, y, w, h = (float(value[name]) for name in ("x", "y", "width", "height"))
    return x, y, x + w, y + h


# Evidence


def test_evidence_is_read_as_it_was_written(tmp_path: Path) -> None:
    digest = digest_bytes(b"x")
    made = Exhibit("e", "It holds", 0.1, COMMAND, DATE, quantile=(0.1, 0.95), data={"a": digest}, assumptions=("Dry",))
    for at_most in (None, (0.01, 0.025)):
        written = write_exhibit(tmp_path / "e.json", replace(made, inputs=frozenset([digest]), at_most=at_most))
        assert read_exhibit(tmp_path / "e.json") == written
        assert written.at_most == at_most
    assert written.digest == digest_file(tmp_path / "e.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": " "}, "the name"),
        ({"date": "yesterday"}, "the date"),
        ({"value": float("nan")}, "finite number"),
        ({"quantile": (0.1, float("inf"))}, "finite number"),
        ({"at_most": (float("nan"), 0.1)}, "the at_most"),
        ({"digest": "abc"}, "SHA-256"),
        ({"data": {"a": "b"}}, "SHA-256"),
    ],
)
def test_evidence_that_is_none_is_refused(change: dict[str, object], message: str) -> None:
    given = {"name": "e", "statement": "It holds", "value": 0.1, "command": COMMAND, "date": DATE, **change}
    with pytest.raises(ConfigurationError, match=message):
        Exhibit(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "{}", '{"format": 1, "kind": "kaisa exhibit"}', '{"value": NaN}', "[1]"])
def test_files_that_are_no_evidence_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "e.json").write_text(text)
    with pytest.raises(StateError, match=r"e\.json"):
        read_exhibit(tmp_path / "e.json")
    with pytest.raises(DataError, match="No such file"):
        read_exhibit(tmp_path / "none.json")


def test_an_input_that_two_pieces_of_evidence_saw_is_found() -> None:
    shared, own = digest_bytes(b"1"), digest_bytes(b"2")
    one = Exhibit("one", "x", None, COMMAND, DATE, inputs=frozenset([shared]))
    assert find_double_use([one, replace(one, name="other", inputs=frozenset([own]))]) == []
    assert len(find_double_use([one, replace(one, name="other", inputs=frozenset([own, shared]))])) == 1


@pytest.mark.skipif(shutil.which("gsn2x") is None, reason="gsn2x is not installed")
def test_gsn2x_accepts_the_case(case: Case, tmp_path: Path) -> None:
    (tmp_path / "case.gsn.yaml").write_text(to_gsn2x(case))
    done = subprocess.run(["gsn2x", "-c", "case.gsn.yaml"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, "Error" in done.stderr) == (0, False), done.stderr
