"""Operational records: what the system said, what was true, and when; one a demand.

    CSV      prediction,truth,time          a header, then a line a demand
    JSONL    {"prediction": "cat", "truth": "dog", "time": "2026-11-20T08:00:00Z"}

A demand has failed where prediction and truth differ. Tasks that are judged otherwise give ``failure`` (true or false)
instead of the two. ``id`` tells demands apart that look the same; ``input`` is the SHA-256 of what the system saw, by
which double use is found. Where the frozen network is at hand, ``input`` may be the path of a file instead, relative to
the records, and the prediction is left out: the network makes it. Other fields are left alone. Times are ISO 8601 (UTC
unless they say otherwise).

A record that cannot be read is an error that names its line: a stream is taken whole or not at all.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from typing import Any

from kaisa.assure.exhibits import DIGEST, digest_bytes
from kaisa.assure.network import DECLINED
from kaisa.errors import DataError

FLAGS = {"true": True, "false": False, "1": True, "0": False}
WHOLE = re.compile(r"([+-]?\d+)\.0+")


@dataclass(frozen=True)
class Record:
    """One demand.

    Attributes:
        time: when, in UTC.
        failed: whether the answer was wrong.
        prediction: what was said; empty of a record that gives ``failure``.
        truth: what was right; likewise.
        identity: what tells it from others, or empty.
        input: SHA-256 of what the system saw, or empty.
    """

    time: datetime
    failed: bool
    prediction: str = ""
    truth: str = ""
    identity: str = ""
    input: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the record as a journal keeps it."""
        value: dict[str, Any] = {"time": self.time.isoformat(), "failed": self.failed}
        for name in ("prediction", "truth", "identity", "input"):
            if getattr(self, name):
                value[name] = getattr(self, name)
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Record:
        """Make the record that a journal has kept."""
        return cls(**{**value, "time": datetime.fromisoformat(value["time"])})

    @property
    def key(self) -> str:
        """What no other demand of the same system has: its identity, or all of it."""
        known = f"id {self.identity}" if self.identity else json.dumps(self.to_json(), sort_keys=True)
        return digest_bytes(known.encode())


@dataclass(frozen=True)
class Unanswered:
    """A demand that the network has yet to answer.

    Attributes:
        time, truth, identity: as of a record.
        path: of what it is to see.
    """

    time: datetime
    truth: str
    identity: str
    path: Path

    def answered(self, digest: str, prediction: str) -> Record:
        """Return the record of what the network has said."""
        failed = prediction not in (self.truth, DECLINED)
        return Record(self.time, failed, prediction, self.truth, self.identity, digest)


Answer = Callable[[Sequence[Path]], Sequence[tuple[str, str]]]
"""Returns for each file the SHA-256 of what a network sees of it, and what it says."""


def read_records(path: Path, answer: Answer | None = None) -> list[Record]:
    """Read the records of a CSV or JSONL file.

    Args:
        path: of the file.
        answer: what makes predictions where records have none; without it that is an error.

    Raises:
        DataError: the file cannot be read, has another form, or a record in it is malformed; the error names the line.
    """
    readers: dict[str, Callable[[str], Iterator[tuple[int, Mapping[str, Any]]]]] = {
        ".csv": _read_csv,
        ".jsonl": _read_jsonl,
        ".ndjson": _read_jsonl,
    }
    if path.suffix.lower() not in readers:
        raise DataError(f"{path} has the ending {path.suffix!r}; give records as .csv or .jsonl")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not in UTF-8 (byte {error.start}); write it so") from error
    if text and not text.endswith("\n"):
        raise DataError(
            f"the last line of {path} does not end; if it is being written, run again, otherwise end it with a newline"
        )
    try:
        found = [_with_line(line, value, path.parent) for line, value in readers[path.suffix.lower()](text)]
    except _LineError as error:
        raise DataError(f"{path}, line {error.line}: {error}") from error.__cause__
    return _answered(path, found, answer)


def _answered(path: Path, found: Sequence[Record | Unanswered], answer: Answer | None) -> list[Record]:
    open_ones = [record for record in found if isinstance(record, Unanswered)]
    if open_ones and answer is None:
        raise DataError(
            f"{path} has {len(open_ones)} records with an input and no prediction; give predictions, or, of "
            "operation, name in [system] the run whose network makes them"
        )
    said = iter(answer([record.path for record in open_ones]) if answer is not None and open_ones else ())
    return [record.answered(*next(said)) if isinstance(record, Unanswered) else record for record in found]


def check_order(records: Iterable[Record], now: datetime, since: datetime | None = None) -> None:
    """Refuse records that are out of order, in the future, before the system was frozen, or there twice.

    Raises:
        DataError: the first that is wrong, by its number.
    """
    seen: dict[str, int] = {}
    before: Record | None = None
    for number, record in enumerate(records, 1):
        if before is not None and record.time < before.time:
            raise DataError(
                f"record {number} is of {record.time.isoformat()}, before the one that precedes it; records come in "
                "the order of their times: find out why they do not"
            )
        if record.time > now:
            raise DataError(f"record {number} is of {record.time.isoformat()}, in the future; set the clocks right")
        if since is not None and record.time < since:
            raise DataError(
                f"record {number} is of {record.time.isoformat()}, before the system was frozen at "
                f"{since.isoformat()}; demands count from then on"
            )
        if record.key in seen:
            raise DataError(
                f"record {number} is the same as record {seen[record.key]}; a demand counts once: leave one out, or "
                "tell them apart by an id or finer times"
            )
        seen[record.key], before = number, record


def read_time(value: object) -> datetime:
    """Return a time in UTC, from ISO 8601.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, datetime):
        known = value
    elif isinstance(value, str):
        known = datetime.fromisoformat(value.strip())
    else:
        raise ValueError(f"{value!r} is no time")
    return known.replace(tzinfo=UTC) if known.tzinfo is None else known.astimezone(UTC)


class _LineError(ValueError):
    """What is wrong with a line."""

    def __init__(self, line: int, text: str) -> None:
        super().__init__(text)
        self.line = line


def _read_csv(text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    rows = csv.reader(StringIO(text, newline=""), strict=True)
    try:
        header = [name.strip() for name in next(rows, [])]
        if len(set(header)) < len(header):
            raise _LineError(1, f"a column is there twice: {', '.join(header)}")
        for row in rows:
            if len(row) != len(header):
                raise _LineError(rows.line_num, f"there are {len(row)} cells under {len(header)} columns")
            yield rows.line_num, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise _LineError(rows.line_num, f"it is no CSV ({error})") from error


def _read_jsonl(text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for line, content in enumerate(text.split("\n")[:-1], 1):
        try:
            value = json.loads(content, object_pairs_hook=_without_repeats)
        except (ValueError, RecursionError) as error:
            raise _LineError(line, f"it is no JSON ({error})") from error
        if not isinstance(value, dict):
            raise _LineError(line, "it is no JSON object; give {...} with prediction, truth and time")
        yield line, value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError("a field is there twice")
    return dict(pairs)


def _with_line(line: int, value: Mapping[str, Any], folder: Path) -> Record | Unanswered:
    try:
        return _make(value, folder)
    except (ValueError, OverflowError) as error:
        raise _LineError(line, str(error)) from error


def _make(value: Mapping[str, Any], folder: Path) -> Record | Unanswered:
    try:
        time = read_time(value["time"])
    except KeyError:
        raise ValueError(f"the time is missing; there is {', '.join(value) or 'nothing'}") from None
    except ValueError:
        raise ValueError(f"the time is {value['time']!r}; give ISO 8601, 2026-11-20T08:00:00Z") from None
    identity = _text("id", value["id"]) if value.get("id") not in (None, "") else ""
    seen = str(value.get("input") or "")
    if seen and "failure" not in value and value.get("prediction") in (None, "") and not DIGEST.fullmatch(seen):
        return Unanswered(time, _text("truth", value.get("truth")), identity, folder / seen)
    if seen and not DIGEST.fullmatch(seen):
        raise ValueError(f"the input is {seen!r}; give its SHA-256 in hexadecimal")
    if "failure" in value:
        return Record(time, _flag(value["failure"]), identity=identity, input=seen)
    prediction, truth = (_text(name, value.get(name)) for name in ("prediction", "truth"))
    return Record(time, prediction != truth, prediction, truth, identity, seen)


def _flag(value: object) -> bool:
    known = FLAGS.get(str(value).strip().lower())
    if known is None:
        raise ValueError(f"failure is {value!r}; give true or false")
    return known


def _text(name: str, value: object) -> str:
    """Return what is compared: 3, 3.0 and "3" are the same, and what is no value is refused."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"the {name} is {value}; a demand without an answer is a failure: say so by failure = true")
    if value is None or not isinstance(value, str | int | float):
        raise ValueError(f"the {name} is {'missing' if value is None else repr(value)}; give text or a number")
    text = str(value).strip()
    if text.lower() in ("", "nan", "inf", "-inf", "null", "none"):
        raise ValueError(f"the {name} is {text!r}; a demand without an answer is a failure: say so by failure = true")
    whole = WHOLE.fullmatch(text)
    return whole.group(1) if whole else text
