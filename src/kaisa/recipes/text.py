"""Text from a file, a folder or a zip file, as numbers of tokens.

    train*.txt, and valid*.txt or test*.txt     to learn from, and to test on
    any other .txt                              the last tenth of all of them is tested on

Where there is other text to test on, those of its files count whose names say so, or all of them if none does; the same
holds of what is learned from.

Tokens are characters, or words between blanks and ends of lines. The vocabulary has the most frequent ones of the text
that is learned from; all others are one token, and so is what hides a token from a masked language model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from kaisa.errors import DataError
from kaisa.recipes.images import is_hidden, open_tree

UNKNOWN, HIDDEN = "<unk>", "<mask>"
SPECIAL = 2  # the first tokens of a vocabulary, which stand for no word
HELD_OUT = 0.1  # the share of the text that is tested on, where there is no other
SUFFIX = ".txt"
TRAIN, TEST = ("train",), ("valid", "test")  # how names of files begin


def _words(text: str) -> list[str]:
    return re.findall(r"\n|[^\s]+", text)


UNITS: dict[str, Callable[[str], Iterable[str]]] = {"characters": iter, "words": _words}


@dataclass(frozen=True)
class Vocabulary:
    """The tokens that are known, each at its number; the first two are UNKNOWN and HIDDEN.

    Attributes:
        unit: "characters" or "words".
        tokens: by number.
    """

    unit: str
    tokens: tuple[str, ...]

    @classmethod
    def fit(cls, text: str, unit: str, size: int) -> Vocabulary:
        """Take the most frequent tokens of a text, of equally frequent ones the first in the alphabet."""
        counts = Counter(UNITS[unit](text))
        for special in (UNKNOWN, HIDDEN):
            counts.pop(special, None)
        known = sorted(counts, key=lambda token: (-counts[token], token))
        return cls(unit, (UNKNOWN, HIDDEN, *known[: size - SPECIAL]))

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def unknown(self) -> int:
        """The number of all tokens that are not known."""
        return 0

    @property
    def hidden(self) -> int:
        """The number of the token that hides another."""
        return 1

    def encode(self, text: str) -> Tensor:
        """Return the number of each token of a text."""
        numbers = {token: number for number, token in enumerate(self.tokens)}
        return torch.tensor([numbers.get(token, self.unknown) for token in UNITS[self.unit](text)], dtype=torch.int32)


@dataclass(frozen=True)
class Text:
    """Text to learn from and text to test on.

    Attributes:
        train: numbers of tokens, of shape (tokens,).
        test: likewise.
        vocabulary: what the numbers mean.
        source: where the text comes from, in words.
    """

    train: Tensor
    test: Tensor
    vocabulary: Vocabulary
    source: str


def read_text(path: Path, unit: str, size: int, test_path: Path | None = None) -> Text:
    """Read a text and number its tokens.

    Args:
        path: a file, or a folder or zip file of such.
        unit: "characters" or "words".
        size: the most tokens that the vocabulary has.
        test_path: what is tested on, likewise; None for a part of the other.

    Raises:
        DataError: a path is missing, holds no text, or what is no text.
    """
    train, test, source = _split(path) if test_path is None else _pair(path, test_path)
    vocabulary = Vocabulary.fit(train, unit, size)
    return Text(vocabulary.encode(train), vocabulary.encode(test), vocabulary, source)


def _split(path: Path) -> tuple[str, str, str]:
    files = _read_files(path)
    train, test = _part(files, TRAIN), _part(files, TEST)
    if train and test:
        return train, test, f"{path.name}, its training part tested on the other"
    whole = "".join(files.values())
    cut = round((1 - HELD_OUT) * len(whole))
    return whole[:cut], whole[cut:], f"{path.name}, the last tenth held out for testing"


def _pair(path: Path, test_path: Path) -> tuple[str, str, str]:
    train, test = (
        _part(files, names) or "".join(files.values())
        for files, names in ((_read_files(path), TRAIN), (_read_files(test_path), TEST))
    )
    return train, test, f"{path.name}, tested on {test_path.name}"


def _part(files: Mapping[str, str], names: tuple[str, ...]) -> str:
    return "".join(text for name, text in files.items() if PurePosixPath(name).name.startswith(names))


def read_text_file(path: Path) -> str:
    """Return a file's text, the ends of its lines as they are.

    Raises:
        DataError: there is no such file, or it is no text.
    """
    try:
        return _decode(path.read_bytes(), str(path))
    except OSError as error:
        raise DataError(f"no such text file: {path}") from error


def _read_files(path: Path) -> dict[str, str]:
    if path.is_file() and path.suffix == SUFFIX:
        return {path.name: read_text_file(path)}
    with open_tree(path) as tree:
        names = sorted(name for name in tree.names if name.endswith(SUFFIX) and not is_hidden(name))
        files = {name: _decode(tree.read(name), f"{path}/{name}") for name in names}
    if not any(files.values()):
        raise DataError(f"no text in {path}; give .txt files, such as train.txt and valid.txt")
    return files


def _decode(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not text in UTF-8") from error
