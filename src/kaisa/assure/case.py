"""A safety case: the argument as a graph that a machine can check and a person can read.

    kind              GSN                CAE                      may support or be read in the context of
    goal              goal               claim                    supported by goals, strategies, solutions
    strategy          strategy           argument                 supported by goals
    solution          solution           evidence                 cites an exhibit, or a figure with its target
    context           context            side-warrant             in context of goals and strategies
    assumption        assumption         side-warrant             likewise
    justification     justification      side-warrant             likewise
    defeater          counter-goal       rebuttal                 challenges any of them; answered, or it defeats

Edges go from the supported to what supports it. A case is *valid* if it has no problem: see :meth:`Case.problems`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from kaisa.assure.exhibits import PAIRS, Exhibit, digest_file, find_double_use, replace_file
from kaisa.errors import ConfigurationError, DataError, StateError

FORMAT = 1
KIND = "kaisa safety case"

NodeKind = Literal["goal", "strategy", "solution", "context", "assumption", "justification", "defeater"]
EdgeKind = Literal["supported_by", "in_context_of", "challenges"]

SUPPORTS: Mapping[str, tuple[str, ...]] = {
    "goal": ("goal", "strategy", "solution"),
    "strategy": ("goal",),
    "defeater": ("solution", "defeater"),
}
CONTEXTS = ("context", "assumption", "justification")


@dataclass(frozen=True)
class Figure:
    """A number that a node stands for.

    Attributes:
        value: what was found; None where the claim is void.
        target: what is needed, or None of a figure that only informs.
        at_most: the target is the most, not the least.
        note: why it is void, or empty.
    """

    value: float | None
    target: float | None = None
    at_most: bool = False
    note: str = ""

    @property
    def is_met(self) -> bool:
        """Whether the target is reached, or there is none."""
        if self.target is None:
            return True
        if self.value is None:
            return False
        return self.value <= self.target if self.at_most else self.value >= self.target


def say_number(value: float, digits: int = 6) -> str:
    """Return a number in few digits, but none below 1 as 1."""
    text = f"{value:.{digits}g}"
    return f"1 − {1 - value:.1e}" if text == "1" and value < 1 else text


@dataclass(frozen=True)
class Node:
    """An element of the argument.

    Attributes:
        name: unique, such as G1 or Sn2.
        kind: see the head of the module.
        text: what it says, a sentence.
        figure: the number it stands for, or None.
        exhibit: the evidence that a solution cites, or None.
        is_undeveloped: a goal or strategy that is known to lack support, and says so.
        answer: of a defeater: why it does not defeat; empty while it does.
    """

    name: str
    kind: NodeKind
    text: str
    figure: Figure | None = None
    exhibit: Exhibit | None = None
    is_undeveloped: bool = False
    answer: str = ""


@dataclass(frozen=True)
class Edge:
    """From a node to what supports it, what it is to be read in the context of, or what it challenges."""

    start: str
    kind: EdgeKind
    end: str


@dataclass(frozen=True)
class Problem:
    """What keeps a case from being valid.

    Attributes:
        node: where.
        text: what, and what to do.
    """

    node: str
    text: str


@dataclass
class Case:
    """A safety case, built node by node.

    Attributes:
        title: of the case.
        nodes: by name, in the order of building.
        edges: between them.
    """

    title: str
    nodes: dict[str, Node] = field(default_factory=dict)
    edges: list[Edge] = field(default_factory=list)

    def add(self, node: Node, *, under: str | None = None) -> Node:
        """Add a node: as support of another, as context of it, or, a defeater, as a challenge to it.

        Raises:
            ConfigurationError: the name is taken, there is no such other node, or the kinds do not go together.
        """
        if node.name in self.nodes:
            raise ConfigurationError(f"there are two nodes {node.name!r}; give each its own name")
        if not node.text.strip():
            raise ConfigurationError(f"{node.name!r} says nothing; give it a text")
        if under is not None:
            edge = self._edge(node, under)
            self.edges.append(edge)
        self.nodes[node.name] = node
        return node

    def link(self, start: str, end: str) -> None:
        """Let a node that is there support or explain another one too.

        Raises:
            ConfigurationError: there is no such node, or the kinds do not go together.
        """
        if end not in self.nodes:
            raise ConfigurationError(f"there is no node {end!r}")
        self.edges.append(self._edge(self.nodes[end], start))

    def children(self, name: str, kind: EdgeKind = "supported_by") -> list[Node]:
        """Return what supports a node, or its contexts."""
        return [self.nodes[edge.end] for edge in self.edges if edge.start == name and edge.kind == kind]

    def challengers(self, name: str) -> list[Node]:
        """Return the defeaters of a node."""
        return [self.nodes[edge.start] for edge in self.edges if edge.end == name and edge.kind == "challenges"]

    @property
    def roots(self) -> list[Node]:
        """The goals that support no other."""
        supported = {edge.end for edge in self.edges if edge.kind == "supported_by"}
        return [node for node in self.nodes.values() if node.kind == "goal" and node.name not in supported]

    def problems(self, folder: Path | None = None) -> list[Problem]:
        """Return everything that keeps the case from being valid; an empty list is a valid case.

        Args:
            folder: what the files of exhibits are relative to; without it their digests are not compared.
        """
        found = [*self._cycles(), *self._lone_goals(), *self._missed_targets(), *self._open_defeaters()]
        found += [*self._bad_solutions(), *self._double_use()]
        return found + (list(self._changed_files(folder)) if folder is not None else [])

    def _edge(self, node: Node, under: str) -> Edge:
        if under not in self.nodes:
            raise ConfigurationError(f"{node.name!r} is to be put under {under!r}, which is not there")
        parent = self.nodes[under]
        if node.kind == "defeater" and parent.kind != "defeater":
            return Edge(node.name, "challenges", under)
        if node.kind in CONTEXTS and parent.kind in ("goal", "strategy"):
            return Edge(under, "in_context_of", node.name)
        if node.kind in SUPPORTS.get(parent.kind, ()):
            return Edge(under, "supported_by", node.name)
        raise ConfigurationError(f"a {node.kind} ({node.name}) cannot stand under a {parent.kind} ({under})")

    def _cycles(self) -> Iterator[Problem]:
        done: set[str] = set()
        for name in self.nodes:
            cycle = _find_cycle(self, name, [], done)
            if cycle:
                path = " → ".join(cycle)
                yield Problem(cycle[0], f"the argument goes in a circle: {path}; a goal cannot support itself")

    def _lone_goals(self) -> Iterator[Problem]:
        if len(self.roots) != 1:
            names = ", ".join(node.name for node in self.roots) or "none"
            yield Problem("", f"a case argues for one top goal; there is {names}")
        for node in self.nodes.values():
            if node.kind in ("goal", "strategy") and not self.children(node.name):
                how = "is marked as undeveloped" if node.is_undeveloped else "has no support"
                yield Problem(node.name, f"{node.name} {how}: give it a strategy, a goal or a solution")

    def _missed_targets(self) -> Iterator[Problem]:
        for node in self.nodes.values():
            figure = node.figure
            if figure is not None and not figure.is_met:
                if figure.value is None:
                    yield Problem(node.name, f"{node.name} claims nothing: {figure.note}")
                else:
                    sign = "at most" if figure.at_most else "at least"
                    found = f"{node.name} is {say_number(figure.value)}; it has to be {sign} {figure.target:g}"
                    yield Problem(node.name, f"{found} ({node.text})")

    def _open_defeaters(self) -> Iterator[Problem]:
        for node in self.nodes.values():
            if node.kind == "defeater" and not node.answer:
                challenged = ", ".join(e.end for e in self.edges if e.start == node.name and e.kind == "challenges")
                yield Problem(node.name, f"{node.name} defeats {challenged or 'the case'}: {node.text}; answer it")

    def _bad_solutions(self) -> Iterator[Problem]:
        for node in self.nodes.values():
            if node.kind == "solution" and node.exhibit is None:
                yield Problem(node.name, f"{node.name} cites no evidence; give it an exhibit")
            elif node.exhibit is not None and not node.exhibit.digest:
                yield Problem(node.name, f"{node.name} cites evidence without a digest; write it to a file first")

    def _double_use(self) -> Iterator[Problem]:
        cited = {node.exhibit.name: node.exhibit for node in self.nodes.values() if node.exhibit is not None}
        for text in find_double_use(cited.values()):
            yield Problem("", f"data are used twice: {text}; the same data cannot speak twice")

    def _changed_files(self, folder: Path) -> Iterator[Problem]:
        for node in self.nodes.values():
            if node.exhibit is None or not node.exhibit.file or not node.exhibit.digest:
                continue
            path = folder / node.exhibit.file
            try:
                current = digest_file(path)
            except DataError as error:
                yield Problem(node.name, f"the evidence of {node.name} is gone: {error}")
            else:
                if current != node.exhibit.digest:
                    yield Problem(
                        node.name,
                        f"the evidence of {node.name}, {node.exhibit.file}, has changed since it was cited; "
                        "restore it, or make the case anew",
                    )

    def to_json(self) -> str:
        """Return the case as JSON, from which :func:`read_case` makes it again."""
        value = {
            "format": FORMAT,
            "kind": KIND,
            "title": self.title,
            "nodes": [_node_json(node) for node in self.nodes.values()],
            "edges": [asdict(edge) for edge in self.edges],
        }
        return json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n"

    def write(self, path: Path) -> None:
        """Write the case as JSON, whole or not at all."""
        replace_file(path, self.to_json())


def read_case(path: Path) -> Case:
    """Read a case from JSON.

    Raises:
        StateError: the file is missing, damaged or no case.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if (value["format"], value["kind"]) != (FORMAT, KIND):
            raise ValueError(f"it is no {KIND} in format {FORMAT}")
        case = Case(value["title"])
        for node in value["nodes"]:
            case.add(_read_node(node))
        case.edges = [Edge(**edge) for edge in value["edges"]]
        unknown = {name for edge in case.edges for name in (edge.start, edge.end)} - set(case.nodes)
        if unknown:
            raise ValueError(f"its edges name {', '.join(sorted(unknown))}, which are no nodes")
    except OSError as error:
        raise StateError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StateError(f"{path} is not a safety case that can be read: {error}") from error
    return case


def _find_cycle(case: Case, name: str, path: list[str], done: set[str]) -> list[str]:
    if name in path:
        return [*path[path.index(name) :], name]
    if name in done:
        return []
    for child in case.children(name):
        cycle = _find_cycle(case, child.name, [*path, name], done)
        if cycle:
            return cycle
    done.add(name)
    return []


def _node_json(node: Node) -> dict[str, Any]:
    value: dict[str, Any] = {"name": node.name, "kind": node.kind, "text": node.text}
    if node.figure is not None:
        value["figure"] = asdict(node.figure)
    if node.exhibit is not None:
        exhibit = node.exhibit
        value["exhibit"] = {
            **{name: getattr(exhibit, name) for name in ("name", "statement", "value", "command", "date")},
            **{name: getattr(exhibit, name) for name in ("digest", "file", "quantile", "at_most")},
            "data": dict(exhibit.data),
            "assumptions": list(exhibit.assumptions),
        }
    if node.is_undeveloped:
        value["is_undeveloped"] = True
    if node.answer:
        value["answer"] = node.answer
    return value


def _read_node(value: dict[str, Any]) -> Node:
    known = dict(value)
    if "figure" in known:
        known["figure"] = Figure(**known["figure"])
    if "exhibit" in known:
        exhibit = dict(known["exhibit"])
        exhibit["assumptions"] = tuple(exhibit["assumptions"])
        for name in PAIRS:
            exhibit[name] = tuple(exhibit[name]) if exhibit.get(name) is not None else None
        known["exhibit"] = Exhibit(**exhibit)
    return Node(**known)


def count_kinds(nodes: Iterable[Node]) -> dict[str, int]:
    """Return how many nodes there are of each kind."""
    counts: dict[str, int] = {}
    for node in nodes:
        counts[node.kind] = counts.get(node.kind, 0) + 1
    return counts
