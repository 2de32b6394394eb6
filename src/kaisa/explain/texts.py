"""Texts as words, and texts again from some of them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor

WORD = re.compile(r"\w+")
LINE_END = "↵"
SEEN = str.maketrans({" ": "␣", "\n": LINE_END, "\t": "⇥"})


@dataclass(frozen=True)
class Words:
    """A text as its words and what stands between them.

    `parts` alternate: what is before the first word, the first word, what is between it and the second, and so on.
    """

    parts: tuple[str, ...]

    @classmethod
    def of(cls, text: str) -> Words:
        """Take a text apart."""
        parts: list[str] = []
        end = 0
        for match in WORD.finditer(text):
            parts += [text[end : match.start()], match.group()]
            end = match.end()
        return cls((*parts, text[end:]))

    @property
    def words(self) -> tuple[str, ...]:
        """The words in order."""
        return self.parts[1::2]

    def text(self, present: Tensor, absent: str = "") -> str:
        """Return the text in which only some words are present; `absent` stands for each of the others."""
        parts = list(self.parts)
        for position, is_present in enumerate(present.tolist()):
            if not is_present:
                parts[2 * position + 1] = absent
        return "".join(parts)


def shown(token: str) -> str:
    """Return a token as it can be seen: signs stand for blanks and ends of lines."""
    return token.translate(SEEN)
