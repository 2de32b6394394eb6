"""A case as a picture: SVG in the shapes of GSN, laid out as a tree with what explains a node beside it.

    goal: rectangle   strategy: parallelogram   solution: circle   context: rounded   assumption, justification: with a
    letter   defeater: dashed, on the left of what it challenges

A block is a node with its contexts on the right, its defeaters on the left and its children below: side by side, or one
below the other where all are solutions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape
from textwrap import wrap

from kaisa.assure.case import Case, Node, say_number
from kaisa.assure.case_notations import WORDS, Notation

WIDTH, LINE, PADDING = 214.0, 16.0, 12.0
BESIDE, BELOW, ABOVE = 26.0, 18.0, 46.0  # gaps: between neighbours, in a column, between levels
LETTERS = 29  # of a line of text
MARGIN = 16.0

STYLE = """
.case text{font:12px/16px system-ui,-apple-system,'Segoe UI',Roboto,sans-serif;fill:#1c2733}
.case .name{font-weight:650;font-size:11px;letter-spacing:.02em}
.case .kind{fill:#66758a;font-size:10.5px}
.case .figure{font-weight:650}
.case .shape{stroke:#5b6b80;stroke-width:1.3;fill:#fff}
.case .goal .shape{stroke:#27374a}
.case .strategy .shape{fill:#eef3fb;stroke:#5077b3}
.case .solution .shape{fill:#eff8f4;stroke:#3f8f74}
.case .context .shape,.case .assumption .shape,.case .justification .shape{fill:#f7f7f4;stroke:#a9a69a}
.case .defeater .shape{fill:#fff8ec;stroke:#b7791f;stroke-dasharray:5 3}
.case .open .shape{fill:#fdf0ee;stroke:#b42318}
.case .met .shape{fill:#f1faf6;stroke:#12805c;stroke-width:2}
.case .met .figure{fill:#0c6b4c}
.case .missed .shape{fill:#fdf0ee;stroke:#b42318;stroke-width:2}
.case .missed .figure{fill:#b42318}
.case .edge{fill:none;stroke:#77869a;stroke-width:1.2}
.case .challenge{stroke:#b7791f;stroke-dasharray:5 3}
.case .letter{font-weight:700;fill:#8a8778}
""".strip()


@dataclass
class _Box:
    """A node with its lines of text and its place."""

    node: Node
    lines: list[tuple[str, str]]
    width: float
    height: float
    x: float = 0.0
    y: float = 0.0

    @property
    def middle(self) -> float:
        return self.x + self.width / 2


@dataclass
class _Block:
    """A box, what stands beside and below it, and how much room all of it takes."""

    box: _Box
    right: list[_Box] = field(default_factory=list)
    left: list[_Box] = field(default_factory=list)
    below: list[_Block] = field(default_factory=list)
    to_left: float = 0.0
    to_right: float = 0.0
    height: float = 0.0

    @property
    def width(self) -> float:
        return self.to_left + self.to_right

    @property
    def is_stack(self) -> bool:
        return len(self.below) > 1 and all(
            not (child.below or child.right or child.left) and child.box.node.kind == "solution" for child in self.below
        )


def draw_case(case: Case, notation: Notation = "gsn") -> str:
    """Return the argument as SVG, complete in itself."""
    seen: set[str] = set()
    blocks = [_gather(case, node, seen, notation) for node in (case.roots or list(case.nodes.values())[:1])]
    x = MARGIN
    for block in blocks:
        _measure(block)
        _place(block, x, MARGIN)
        x += block.width + 2 * BESIDE
    boxes = {box.node.name: box for block in blocks for box in _boxes(block)}
    width = max((box.x + box.width for box in boxes.values()), default=0) + MARGIN
    height = max((box.y + box.height for box in boxes.values()), default=0) + MARGIN
    stacked = {
        child.box.node.name for block in blocks for parent in _all(block) if parent.is_stack for child in parent.below
    }
    parts = [_draw_edges(case, boxes, stacked), *(_draw_box(case, box) for box in boxes.values())]
    return (
        f'<svg class="case" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}" role="img" aria-label="{escape(case.title)}">'
        f"<style>{STYLE}</style>{_ARROWS}{''.join(parts)}</svg>\n"
    )


_ARROWS = (
    '<defs><marker id="full" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
    '<path d="M0 0L8 4L0 8Z" fill="#77869a"/></marker>'
    '<marker id="hollow" viewBox="0 0 9 9" refX="8" refY="4.5" markerWidth="9" markerHeight="9" orient="auto">'
    '<path d="M.6 .6L8 4.5L.6 8.4Z" fill="#fff" stroke="#77869a"/></marker>'
    '<marker id="challenge" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
    '<path d="M0 0L8 4L0 8" fill="none" stroke="#b7791f" stroke-width="1.4"/></marker></defs>'
)


def _gather(case: Case, node: Node, seen: set[str], notation: Notation) -> _Block:
    """Return the block of a node; what is there already is drawn where it was met first."""
    seen.add(node.name)

    def new(nodes: list[Node]) -> list[Node]:
        fresh = [other for other in nodes if other.name not in seen]
        seen.update(other.name for other in fresh)
        return fresh

    return _Block(
        _make_box(node, notation),
        [_make_box(other, notation) for other in new(case.children(node.name, "in_context_of"))],
        [_make_box(other, notation) for other in new(case.challengers(node.name))],
        [_gather(case, child, seen, notation) for child in new(case.children(node.name))],
    )


def _make_box(node: Node, notation: Notation) -> _Box:
    letters = 23 if node.kind == "solution" else LETTERS - 2 if node.kind == "strategy" else LETTERS
    lines = [("name", f"{node.name}\t{WORDS[notation][node.kind]}")]
    lines += [("text", line) for line in wrap(node.text, letters, max_lines=9, placeholder=" …")]
    if node.figure is not None:
        lines.append(("figure", _figure_words(node)))
    if node.answer:
        lines += [("kind", line) for line in wrap(f"Answered: {node.answer}", letters, max_lines=6, placeholder=" …")]
    if node.exhibit is not None and node.exhibit.digest:
        lines.append(("kind", f"{node.exhibit.digest[:10]}… {node.exhibit.date[:10]}"))
    height = LINE * len(lines) + 2 * PADDING
    if node.kind == "solution":
        side = max(WIDTH - 18, (height**2 + 150**2) ** 0.5)
        return _Box(node, lines, side, side)
    return _Box(node, lines, WIDTH + (14 if node.kind == "strategy" else 0), height)


def _figure_words(node: Node) -> str:
    figure = node.figure
    if figure is None or figure.value is None:
        return "void"
    if figure.target is None:
        return f"{figure.value:.5g}"
    sign = "≤" if figure.at_most else "≥"
    return f"{'✓' if figure.is_met else '✗'} {say_number(figure.value, 4)}, needed {sign} {figure.target:g}"


def _column(boxes: list[_Box]) -> tuple[float, float]:
    """Return the width and height of boxes one below the other."""
    if not boxes:
        return 0.0, 0.0
    return max(box.width for box in boxes), sum(box.height for box in boxes) + BELOW * (len(boxes) - 1) * 0.5


def _measure(block: _Block) -> None:
    for child in block.below:
        _measure(child)
    (right, of_right), (left, of_left) = _column(block.right), _column(block.left)
    half = block.box.width / 2
    block.to_left = half + (left + BESIDE if left else 0)
    block.to_right = half + (right + BESIDE if right else 0)
    if block.is_stack:
        deep = sum(child.height + BELOW for child in block.below)
        block.to_right = max(block.to_right, BESIDE + max(child.width for child in block.below) - half)
    else:
        deep = max((child.height for child in block.below), default=0.0)
        to_left, to_right = _row_sides(block.below)
        block.to_left, block.to_right = max(block.to_left, to_left), max(block.to_right, to_right)
    block.height = max(block.box.height, of_right, of_left) + (ABOVE + deep if block.below else 0)


def _row_width(blocks: list[_Block]) -> float:
    return sum(block.width for block in blocks) + BESIDE * max(0, len(blocks) - 1)


def _row_sides(blocks: list[_Block]) -> tuple[float, float]:
    """Return how far a row reaches to the left and right of the middle between its first and last box."""
    if not blocks:
        return 0.0, 0.0
    first, last = blocks[0].to_left, blocks[-1].to_right
    between = _row_width(blocks) - first - last
    return first + between / 2, last + between / 2


def _place(block: _Block, x: float, y: float) -> None:
    box = block.box
    box.x, box.y = x + block.to_left - box.width / 2, y
    for boxes, at in ((block.right, box.x + box.width + BESIDE), (block.left, box.x - BESIDE)):
        top = y
        for other in boxes:
            other.x, other.y = (at if boxes is block.right else at - other.width), top
            top += other.height + BELOW * 0.5
    bottom = y + max(box.height, _column(block.right)[1], _column(block.left)[1]) + ABOVE
    if block.is_stack:
        for child in block.below:
            _place(child, box.x + BESIDE, bottom)
            bottom += child.height + BELOW
        return
    at = box.middle - _row_sides(block.below)[0]
    for child in block.below:
        _place(child, at, bottom)
        at += child.width + BESIDE


def _all(block: _Block) -> list[_Block]:
    return [block, *(inner for child in block.below for inner in _all(child))]


def _boxes(block: _Block) -> list[_Box]:
    return [box for inner in _all(block) for box in (inner.box, *inner.right, *inner.left)]


def _draw_edges(case: Case, boxes: dict[str, _Box], stacked: set[str]) -> str:
    drawn = []
    for edge in case.edges:
        start, end = boxes.get(edge.start), boxes.get(edge.end)
        if start is None or end is None:
            continue
        if edge.kind == "supported_by":
            drawn.append(_support(start, end, edge.end in stacked))
        elif edge.kind == "in_context_of":
            drawn.append(_beside(start, end))
        else:
            drawn.append(_challenge(start, end))
    return "".join(drawn)


def _support(start: _Box, end: _Box, is_stacked: bool) -> str:
    top = start.y + start.height
    if is_stacked:
        x, y = start.x + 10, end.y + end.height / 2
        path = f"M{x:.1f} {top:.1f}V{y:.1f}H{end.x:.1f}"
    elif abs(start.middle - end.middle) < 1:
        path = f"M{start.middle:.1f} {top:.1f}V{end.y:.1f}"
    else:
        bend = end.y - ABOVE / 2
        path = f"M{start.middle:.1f} {top:.1f}V{bend:.1f}H{end.middle:.1f}V{end.y:.1f}"
    return f'<path class="edge" d="{path}" marker-end="url(#full)"/>'


def _beside(start: _Box, end: _Box) -> str:
    x, y = start.x + start.width, start.y + min(start.height / 2, 40)
    bend, at = x + BESIDE / 2, end.y + end.height / 2
    return f'<path class="edge" d="M{x:.1f} {y:.1f}H{bend:.1f}V{at:.1f}H{end.x:.1f}" marker-end="url(#hollow)"/>'


def _challenge(start: _Box, end: _Box) -> str:
    x, y = start.x + start.width, start.y + start.height / 2
    bend, at = end.x - BESIDE / 2, end.y + min(end.height / 2, 40)
    path = f"M{x:.1f} {y:.1f}H{bend:.1f}V{at:.1f}H{end.x:.1f}"
    return f'<path class="edge challenge" d="{path}" marker-end="url(#challenge)"/>'


def _draw_box(case: Case, box: _Box) -> str:
    node = box.node
    state = "" if node.figure is None else " met" if node.figure.is_met else " missed"
    state += " open" if node.kind == "defeater" and not node.answer else ""
    whole = f"{node.name}: {node.text}" + (f" [{node.exhibit.file}]" if node.exhibit is not None else "")
    undeveloped = node.kind in ("goal", "strategy") and not case.children(node.name)
    extra = _diamond(box) if undeveloped else ""
    return (
        f'<g class="{node.kind}{state}"><title>{escape(whole)}</title>{_shape(box)}{_text(box)}{extra}'
        f"{_letter(box) if node.kind in ('assumption', 'justification') else ''}</g>"
    )


def _shape(box: _Box) -> str:
    x, y, w, h = box.x, box.y, box.width, box.height
    if box.node.kind == "solution":
        return f'<circle class="shape" cx="{box.middle:.1f}" cy="{y + h / 2:.1f}" r="{w / 2:.1f}"/>'
    if box.node.kind == "strategy":
        points = f"{x + 14:.1f},{y:.1f} {x + w:.1f},{y:.1f} {x + w - 14:.1f},{y + h:.1f} {x:.1f},{y + h:.1f}"
        return f'<polygon class="shape" points="{points}"/>'
    round_by = {"goal": 2, "defeater": 2}.get(box.node.kind, 20)
    return f'<rect class="shape" x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" rx="{round_by}"/>'


def _text(box: _Box) -> str:
    is_centred = box.node.kind == "solution"
    x = box.middle if is_centred else box.x + (24 if box.node.kind == "strategy" else PADDING + 2)
    y = box.y + (box.height - LINE * len(box.lines)) / 2 + 12
    drawn = []
    for number, (kind, line) in enumerate(box.lines):
        name, tab, rest = line.partition("\t")
        content = escape(name) + (f' <tspan class="kind" dx="4">{escape(rest)}</tspan>' if tab else "")
        anchor = ' text-anchor="middle"' if is_centred else ""
        drawn.append(f'<text class="{kind}" x="{x:.1f}" y="{y + number * LINE:.1f}"{anchor}>{content}</text>')
    return "".join(drawn)


def _diamond(box: _Box) -> str:
    x, y = box.middle, box.y + box.height
    return f'<path class="shape" d="M{x:.1f} {y:.1f}l7 7l-7 7l-7 -7Z"/>'


def _letter(box: _Box) -> str:
    letter = "A" if box.node.kind == "assumption" else "J"
    return f'<text class="letter" x="{box.x + box.width - 16:.1f}" y="{box.y + box.height - 6:.1f}">{letter}</text>'
