"""A page that shows explanations: one HTML file that holds all it needs and asks the network for nothing.

Pictures are PNG in the page itself, styles are in its head, there are no scripts, and a content security policy forbids
the browser to load anything else.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from itertools import zip_longest
from typing import Any, Protocol

from kaisa.explain.texts import LINE_END

Figures = Mapping[str, tuple[float, ...]]


class Shown(Protocol):
    """What a page shows: an explanation."""

    @property
    def method(self) -> str:
        """The name of the method."""

    @property
    def target(self) -> tuple[int, ...] | None:
        """The explained outputs."""

    @property
    def kind(self) -> str:
        """How the values are meant; those of `tokens` are shown as a text."""

    @property
    def values(self) -> Any:
        """A tensor whose first dimension counts the inputs."""

    @property
    def names(self) -> tuple[Any, ...]:
        """The tokens, of all inputs alike or of each."""

    @property
    def options(self) -> Mapping[str, Any]:
        """All options of the method."""

    @property
    def seed(self) -> int:
        """Where everything random came from."""

    @property
    def digest(self) -> str:
        """The digest of the weights."""

    @property
    def quality(self) -> Figures:
        """Figures by name."""

    @property
    def details(self) -> Mapping[str, Any]:
        """What else the method tells.

        ``target_names`` are shown for the target, ``position`` says which token is explained, ``proponents_texts`` and
        ``opponents_texts`` are the training texts behind each input.
        """

    def plot(self) -> Any:
        """The drawing, a figure of matplotlib."""


MEANINGS: Mapping[str, tuple[str, str]] = {
    "completeness_gap": ("↓", "what the values leave unsaid of the score's difference to the baseline"),
    "local_r2": ("↑", "the share of the scores' variance that the surrogate explains nearby; 1 is all"),
    "precision": ("↑", "the share of changed inputs that obey the rule and keep the prediction"),
    "certified_precision": ("↑", "what that share is at least, with the confidence asked for"),
    "coverage": ("↑", "the share of inputs that the rule speaks of"),
    "infidelity": ("↓", "the share of what random changes do to the score that the values do not predict"),
    "max_sensitivity": ("↓", "how far the values move, relative to their size, when the input hardly moves"),
    "deletion": ("↓", "the mean probability while the most important places are taken away first"),
    "insertion": ("↑", "the mean probability while the most important places come first"),
    "randomisation": ("↓", "rank correlation with the same method on shuffled weights; near 1 it ignores the model"),
    "objective": ("↑", "what the picture reaches"),
    "relative_distance": ("↓", "of the picture's features to those wanted; 0 is the same"),
}
"""What a figure means, and whether a high or a low one is good."""

STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5b6675; --line: #dfe4ea; --ground: #f6f7f9; --card: #ffffff;
  --accent: #b3303f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8ebef; --soft: #9aa5b1; --line: #323a45; --ground: #14181d;
  --card: #1d232b; --accent: #ef8390; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 2rem 1.25rem 3rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 1rem; font-weight: 650; }
h2 { font-size: 1.05rem; margin: 0 0 .6rem; font-weight: 650; }
.lead { color: var(--soft); margin: -.75rem 0 1.25rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 1rem; }
.cards.alone { grid-template-columns: minmax(0, 48rem); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: 1rem; }
.card.wide { margin: 0 0 1.25rem; }
.card.wide img { max-width: 52rem; }
.card img { display: block; width: 100%; height: auto; background: #ffffff; border-radius: .35rem; }
.tokens { line-height: 2; margin: 0 0 .8rem; overflow-wrap: anywhere; }
.tokens span { padding: .2em 0; }
.tokens.apart span { padding: .2em .3em; margin-right: .3em; border-radius: .25em; }
.tokens span.asked { outline: 2px solid var(--ink); border-radius: .25em; padding: .2em .3em; margin: 0 .2em; }
.texts { margin: .4rem 0 .8rem; padding-left: 1.4rem; font-size: .93rem; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .1rem .9rem; margin: .8rem 0 0;
  font-size: .87rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.table { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  margin: 0 0 1.25rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .8rem; text-align: right; white-space: nowrap; border-top: 1px solid var(--line); }
thead th { border-top: 0; font-weight: 600; color: var(--soft); }
th:first-child, td:first-child { text-align: left; }
tbody th { font-weight: 600; }
td.best { color: var(--accent); font-weight: 650; }
td.none { color: var(--soft); }
details { margin-top: .8rem; font-size: .87rem; }
summary { cursor: pointer; color: var(--soft); }
footer, .legend { color: var(--soft); font-size: .85rem; margin-top: 1.5rem; }
.legend dl { margin: 0; }
"""

FOR, AGAINST = "rgb(196 48 63 / ", "rgb(47 111 176 / "
"""Colours of what speaks for and against the target, but for how opaque they are."""

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(explanations: Sequence[Shown], title: str, *, lead: str = "", curves: bytes | None = None) -> str:
    """Return the page, from its doctype to its end.

    Args:
        explanations: what is shown; beside one another, with a table of their figures, if there are several.
        title: of the page.
        lead: a sentence below it.
        curves: a further picture as PNG, of all of them together.
    """
    several = len(explanations) > 1
    parts = [f"<h1>{escape(title)}</h1>", f'<p class="lead">{escape(lead)}</p>' if lead else ""]
    if several:
        parts.append(_table(explanations))
    parts.append(_picture_card("Deletion and insertion", curves) if curves else "")
    parts.append(f'<div class="cards{"" if several else " alone"}">')
    parts += [_card(explanation, is_alone=not several) for explanation in explanations]
    parts += ["</div>", _legend(explanations), _footer(explanations)]
    return _document(title, "\n".join(part for part in parts if part))


def _document(title: str, body: str) -> str:
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _card(explanation: Shown, is_alone: bool) -> str:
    title = "" if is_alone else f"<h2>{escape(explanation.method)}</h2>"
    options = _pairs({name: _short(value) for name, value in explanation.options.items()})
    return (
        f'<section class="card">{title}{_content(explanation)}'
        f"{_pairs(_facts(explanation, with_figures=is_alone))}"
        + (f"<details><summary>options</summary>{options}</details>" if explanation.options else "")
        + "</section>"
    )


def _content(explanation: Shown) -> str:
    """Return the values: tokens as a text in colours, training texts as lists, all else as a picture."""
    if explanation.kind == "tokens" and explanation.names:
        return "".join(_tokens(explanation, row) for row in range(len(explanation.values)))
    if "proponents_texts" in explanation.details:
        return "".join(_asked(explanation, row) + _texts(explanation, row) for row in range(len(explanation.values)))
    return _image(_drawn(explanation), explanation.method)


def _tokens(explanation: Shown, row: int) -> str:
    """Return a text whose tokens are the redder the more they speak for the target, the bluer against it."""
    values = explanation.values[row].tolist()
    limit = max(map(abs, values), default=0.0) or 1.0
    styles = [f"background: {FOR if value > 0 else AGAINST}{0.7 * abs(value) / limit:.0%})" for value in values]
    return _text(explanation, row, styles, [f"{value:.3g}" for value in values])


def _asked(explanation: Shown, row: int) -> str:
    return _text(explanation, row, [], []) if explanation.names else ""


def _text(explanation: Shown, row: int, styles: Sequence[str], titles: Sequence[str]) -> str:
    """Return the tokens of an input, the explained one in a frame; it follows the others where it is the next one."""
    names = explanation.names if isinstance(explanation.names[0], str) else explanation.names[row]
    position = explanation.details.get("position")
    spans = []
    for place, (name, style, title) in enumerate(zip_longest(names, styles[: len(names)], titles[: len(names)])):
        asked = " class=asked" if place == position else ""
        told = f' style="{style}" title="{title}"' if style else ""
        spans.append(f"<span{asked}{told}>{escape(name)}</span>" + ("<br>" if name == LINE_END else ""))
    if position == len(names) and explanation.target is not None:
        target = str(explanation.details.get("target_names", explanation.target)[row])
        spans.append(f'<span class=asked title="explained">{escape(target)}</span>')
    is_apart = max(map(len, names)) > 1
    return f'<p class="tokens{" apart" if is_apart else ""}">{"".join(spans)}</p>'


def _texts(explanation: Shown, row: int) -> str:
    """Return the training texts that speak for and against what is said of an input."""
    parts = []
    for sign, title in (("proponents", "for"), ("opponents", "against")):
        texts = explanation.details.get(f"{sign}_texts", [])
        items = "".join(f"<li>{escape(text)}</li>" for text in texts[row])
        parts.append(f"<h2>{title}</h2><ol class=texts>{items}</ol>")
    return "".join(parts)


def _drawn(explanation: Shown) -> bytes:
    """Return the drawing as PNG without its title, which the page says in words."""
    figure, buffer = explanation.plot(), io.BytesIO()
    figure.suptitle("")
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight", metadata={"Software": ""})
    return buffer.getvalue()


def _picture_card(title: str, picture: bytes) -> str:
    return f'<section class="card wide"><h2>{escape(title)}</h2>{_image(picture, title)}</section>'


def _image(picture: bytes, name: str) -> str:
    return f'<img alt="{escape(name)}" src="data:image/png;base64,{base64.b64encode(picture).decode()}">'


def _facts(explanation: Shown, with_figures: bool) -> dict[str, str]:
    facts = {}
    if explanation.target is not None:
        names = explanation.details.get("target_names", explanation.target)
        facts["target"] = _listed([str(name) for name in names])
    if with_figures:
        facts |= {_words(name): _listed([f"{f:.3g}" for f in figures]) for name, figures in explanation.quality.items()}
    return facts


def _pairs(facts: Mapping[str, str]) -> str:
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    return f"<dl>{rows}</dl>" if rows else ""


def _table(explanations: Sequence[Shown]) -> str:
    names = list(dict.fromkeys(name for explanation in explanations for name in explanation.quality))
    if not names:
        return ""
    best = {name: _best(name, explanations) for name in names}
    head = "".join(f"<th>{escape(_words(name))} {MEANINGS.get(name, ('',))[0]}</th>" for name in names)
    rows = "".join(
        f"<tr><th>{escape(explanation.method)}</th>"
        + "".join(_cell(explanation.quality.get(name), best[name]) for name in names)
        + "</tr>"
        for explanation in explanations
    )
    return f'<div class="table"><table><thead><tr><th>method</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _cell(figures: tuple[float, ...] | None, best: float | None) -> str:
    if not figures:
        return '<td class="none">–</td>'
    mean = _mean(figures)
    each = _listed([f"{figure:.3g}" for figure in figures])
    return f'<td{" class=best" if mean == best else ""} title="{escape(each)}">{mean:.3g}</td>'


def _best(name: str, explanations: Sequence[Shown]) -> float | None:
    """Return the best mean of a figure, None where it takes no better and worse, or only one has it."""
    means = [_mean(e.quality[name]) for e in explanations if e.quality.get(name)]
    direction = MEANINGS.get(name, ("", ""))[0]
    if len(means) < 2 or not direction:
        return None
    return max(means) if direction == "↑" else min(means)


def _mean(figures: tuple[float, ...]) -> float:
    return sum(figures) / len(figures)


def _legend(explanations: Sequence[Shown]) -> str:
    names = dict.fromkeys(name for explanation in explanations for name in explanation.quality if name in MEANINGS)
    meanings = {f"{_words(name)} {MEANINGS[name][0]}": MEANINGS[name][1] for name in names}
    return f'<div class="legend">{_pairs(meanings)}</div>' if meanings else ""


def _footer(explanations: Sequence[Shown]) -> str:
    digests = dict.fromkeys(e.digest for e in explanations if e.digest)
    seeds = dict.fromkeys(str(e.seed) for e in explanations)
    words = [f"weights {digest[:12]}…" for digest in digests] + [f"seed {', '.join(seeds)}"]
    return f"<footer>{escape(' · '.join(words))}</footer>"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _listed(items: Sequence[str], most: int = 12) -> str:
    return ", ".join(items[:most]) + (", …" if len(items) > most else "")


def _short(value: Any, most: int = 160) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= most else f"{text[:most]}…"
