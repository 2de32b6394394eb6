"""A piece of evidence as a value: what it says, the file, command and date it came from, and the data it used up.

Whatever produces evidence writes a JSON file of this form; the safety case cites it by digest, and the prior may
take its quantile. ``data`` and ``inputs`` are what double use is found by: the digests of whole data files and of
single inputs, neither of which may be seen again as operation or under another piece of evidence.

    {"format": 1, "kind": "kaisa exhibit", "name": "held-out", "statement": "at most 0.8 % wrong, at 95 %",
     "value": 0.008, "quantile": {"bound": 0.008, "belief": 0.95}, "command": "…", "date": "2026-11-20",
     "data": {"held-out.zip": "sha256…"}, "inputs": ["sha256…", …], "assumptions": ["…"]}
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from kaisa.errors import ConfigurationError, DataError, StateError

FORMAT = 1
KIND = "kaisa exhibit"
COMMAND = "kaisa assure run"
PAIRS = ("quantile", "at_most")
Sides = Literal["upper", "both"]
SIDES: tuple[Sides, ...] = ("upper", "both")
"""Which bounds a piece of evidence may give: one on the probability of failure from above, or from both sides."""
DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Exhibit:
    """A piece of evidence.

    Attributes:
        name: unique in a case.
        statement: what it shows, a sentence.
        value: the figure, or None of evidence without one.
        command: what made it.
        date: when, in ISO form.
        digest: SHA-256 of the file; empty while there is none.
        file: where it is.
        quantile: (ε, θ) that it justifies as prior knowledge, or None.
        data: digests of the data that it used up, by name.
        inputs: digests of the single inputs among them, where known.
        assumptions: what must hold for it to mean what it says, a sentence each.
        at_most: (α, η) that it justifies too: the probability of failure is at most α with belief η at most; or None.

    Raises:
        ConfigurationError: a field is missing, no finite number or no digest.
    """

    name: str
    statement: str
    value: float | None
    command: str
    date: str
    digest: str = ""
    file: str = ""
    quantile: tuple[float, float] | None = None
    data: Mapping[str, str] = field(default_factory=dict)
    inputs: frozenset[str] = frozenset()
    assumptions: tuple[str, ...] = ()
    at_most: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for name in ("name", "statement", "command"):
            _check_text(name, getattr(self, name))
        _check_date(self.date)
        numbers = [("value", self.value)] if self.value is not None else []
        numbers += [(key, number) for key in PAIRS for number in getattr(self, key) or ()]
        for name, number in numbers:
            if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
                raise ConfigurationError(f"the {name} of {self.name!r} is {number!r}; give a finite number")
        for digest in [*self.data.values(), *self.inputs, *([self.digest] if self.digest else [])]:
            if not isinstance(digest, str) or not DIGEST.fullmatch(digest):
                raise ConfigurationError(f"{self.name!r} has the digest {digest!r}; give SHA-256 in hexadecimal")


def write_exhibit(path: Path, exhibit: Exhibit) -> Exhibit:
    """Write an exhibit whole or not at all; return it with its file and digest."""
    value = {**asdict(replace(exhibit, data={})), "data": dict(exhibit.data)}
    value["inputs"] = sorted(exhibit.inputs)
    for key in PAIRS:
        pair = value.pop(key)
        if pair is not None:
            value[key] = {"bound": pair[0], "belief": pair[1]}
    for name in ("digest", "file"):
        del value[name]
    text = json.dumps({"format": FORMAT, "kind": KIND, **value}, indent=1, allow_nan=False, ensure_ascii=False)
    replace_file(path, text + "\n")
    return replace(exhibit, file=str(path), digest=digest_file(path))


def read_exhibit(path: Path) -> Exhibit:
    """Read an exhibit, with the digest of its file.

    Raises:
        DataError: there is no such file.
        StateError: it is damaged or no exhibit.
    """
    digest = digest_file(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except ValueError as error:
        raise StateError(f"{path} is no JSON that can be read ({error}); make the evidence anew") from error
    if not isinstance(value, dict) or (value.get("format"), value.get("kind")) != (FORMAT, KIND):
        raise StateError(f"{path} is not a {KIND} in format {FORMAT}; write it by write_exhibit")
    try:
        return _from_json(value, str(path), digest)
    except (KeyError, TypeError, AttributeError, ConfigurationError) as error:
        raise StateError(f"{path} is not a whole exhibit: {error}") from error


def digest_file(path: Path) -> str:
    """Return the SHA-256 of a file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; check the path") from error


def digest_path(path: Path) -> str:
    """Return the SHA-256 of a file, or of all files of a folder with their names.

    Raises:
        DataError: it cannot be read.
    """
    if not path.is_dir():
        return digest_file(path)
    walked = os.walk(path, followlinks=True)  # as what reads the data does
    files = sorted(file for folder, _, names in walked for name in names if (file := Path(folder) / name).is_file())
    return digest_bytes(*(os.fsencode(f"{file.relative_to(path)} {digest_file(file)}") for file in files))


def digest_bytes(*parts: bytes) -> str:
    """Return the SHA-256 of bytes, each part behind its length."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def replace_file(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def find_double_use(exhibits: Iterable[Exhibit]) -> list[str]:
    """Return a sentence for each datum that two pieces of evidence have both used."""
    owners: dict[str, tuple[str, str]] = {}
    found = []
    for exhibit in exhibits:
        for label, digest in [*exhibit.data.items(), *(("an input", digest) for digest in sorted(exhibit.inputs))]:
            owner, known = owners.setdefault(digest, (exhibit.name, label))
            if owner != exhibit.name:
                found.append(f"{exhibit.name!r} and {owner!r} both use {known} ({digest[:12]}…)")
                break
    return found


def _from_json(value: dict[str, Any], file: str, digest: str) -> Exhibit:
    pairs = {key: (value[key]["bound"], value[key]["belief"]) for key in PAIRS if value.get(key) is not None}
    return Exhibit(
        name=value["name"],
        statement=value["statement"],
        value=value["value"],
        command=value["command"],
        date=value["date"],
        digest=digest,
        file=file,
        **pairs,
        data=dict(value.get("data", {})),
        inputs=frozenset(value.get("inputs", ())),
        assumptions=tuple(value.get("assumptions", ())),
    )


def _check_text(name: str, text: object) -> None:
    if not isinstance(text, str) or not text.strip():
        raise ConfigurationError(f"the {name} of a piece of evidence is {text!r}; say it in words")


def _check_date(date: object) -> None:
    try:
        datetime.fromisoformat(date)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ConfigurationError(f"the date of a piece of evidence is {date!r}; give ISO form, 2026-11-20") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")
