"""A case in the notations of others: gsn2x YAML, Mermaid, and the words of GSN or CAE."""

from __future__ import annotations

import json
import re
from typing import Literal

from kaisa.assure.case import Case, Node, say_number

Notation = Literal["gsn", "cae"]

WORDS: dict[Notation, dict[str, str]] = {
    "gsn": {
        "goal": "Goal",
        "strategy": "Strategy",
        "solution": "Solution",
        "context": "Context",
        "assumption": "Assumption",
        "justification": "Justification",
        "defeater": "Counter-goal",
    },
    "cae": {
        "goal": "Claim",
        "strategy": "Argument",
        "solution": "Evidence",
        "context": "Side-warrant (context)",
        "assumption": "Side-warrant (assumption)",
        "justification": "Side-warrant (justification)",
        "defeater": "Rebuttal",
    },
}
BRIEF = "A safety case by conservative Bayesian inference"
GSN2X_PREFIXES = {  # gsn2x tells the kind of an element by how its name begins
    "goal": r"G",
    "strategy": r"S(?!n)",
    "solution": r"Sn",
    "context": r"C(?!G|Sn)",
    "assumption": r"A",
    "justification": r"J",
    "defeater": r"CG",
}
SHAPES = {
    "goal": ("[", "]"),
    "strategy": ("[/", "/]"),
    "solution": ("((", "))"),
    "context": ("(", ")"),
    "assumption": ("([", "])"),
    "justification": ("([", "])"),
    "defeater": ("{{", "}}"),
}


def say(node: Node) -> str:
    """Return the text of a node with its figure."""
    if node.figure is None:
        return node.text
    found = "void" if node.figure.value is None else say_number(node.figure.value)
    if node.figure.target is None:
        return f"{node.text} (found: {found})"
    sign = "≤" if node.figure.at_most else "≥"
    return f"{node.text} (found: {found}, needed: {sign} {node.figure.target:g})"


def to_gsn2x(case: Case) -> str:
    """Return the case as YAML for gsn2x."""
    names = {node.name: _gsn2x_name(node) for node in case.nodes.values()}
    lines = ["module:", f"  name: {_quoted(case.title)}", f"  brief: {_quoted(BRIEF)}", ""]
    for node in case.nodes.values():
        lines += [f"{names[node.name]}:", f"  text: {_quoted(say(node))}"]
        for key, others in (
            ("supportedBy", [child.name for child in case.children(node.name)]),
            ("inContextOf", [child.name for child in case.children(node.name, "in_context_of")]),
            ("challenges", [edge.end for edge in case.edges if (edge.start, edge.kind) == (node.name, "challenges")]),
        ):
            listed = ", ".join(names[other] for other in others)
            is_list = key != "challenges" or len(others) > 1  # what is challenged is written without brackets
            lines += [f"  {key}: [{listed}]" if is_list else f"  {key}: {listed}"] if others else []
        if node.kind in ("goal", "strategy") and not case.children(node.name):
            lines.append("  undeveloped: true")
        if any(not defeater.answer for defeater in case.challengers(node.name)):
            lines.append("  defeated: true")
        if node.exhibit is not None and node.exhibit.file:
            lines.append(f"  url: {_quoted(node.exhibit.file)}")
        lines.append("")
    return "\n".join(lines)


def _gsn2x_name(node: Node) -> str:
    prefix = GSN2X_PREFIXES[node.kind]
    return node.name if re.match(prefix, node.name) else f"{prefix.split('(')[0]}-{node.name}"


def to_mermaid(case: Case, notation: Notation = "gsn") -> str:
    """Return the case as a Mermaid flow chart, in the words of GSN or CAE."""
    words = WORDS[notation]
    lines = ["flowchart TB"]
    for node in case.nodes.values():
        before, after = SHAPES[node.kind]
        text = _escaped(f"{words[node.kind]} {node.name}: {say(node)}")
        lines.append(f'  {node.name}{before}"{text}"{after}')
    arrows = {"supported_by": "-->", "in_context_of": "-.->", "challenges": "==>|challenges|"}
    lines += [f"  {edge.start} {arrows[edge.kind]} {edge.end}" for edge in case.edges]
    failing = [node.name for node in case.nodes.values() if node.figure is not None and not node.figure.is_met]
    if failing:
        lines += ["  classDef failing stroke:#b42318,stroke-width:3px", f"  class {','.join(failing)} failing"]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """Return a text as a YAML scalar: a JSON string is one."""
    return json.dumps(text, ensure_ascii=False)


def _escaped(text: str) -> str:
    pairs = (("&", "&amp;"), ("#", "&num;"), ('"', "&quot;"), ("<", "&lt;"), (">", "&gt;"), ("\n", " "))
    for before, after in pairs:
        text = text.replace(before, after)
    return text
