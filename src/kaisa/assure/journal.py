"""The demands that have been counted: a file that only grows, and that a kill at any byte leaves usable.

    {"basis":"sha256…","format":1,"kind":"kaisa assure journal","model":"sha256…","system":"…"}    whose demands
    {"chain":"sha256…","n":1,"record":{"failed":false,"time":"…", …}}                             one line a demand

Each ``chain`` is the digest of the line before it and of its own content, so that nothing can be changed, left out or
put in between unseen. A line that lacks its end was being written when the process died: it is dropped, and its record
comes again with the stream, which leaves the same bytes as if nothing had happened. Anything else that is wrong is
damage, and refused.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from kaisa.assure.exhibits import digest_bytes
from kaisa.assure.records import Record, check_order
from kaisa.errors import DataError, StateError

FORMAT = 1
KIND = "kaisa assure journal"


@dataclass(frozen=True)
class Journal:
    """The demands of one frozen system.

    Attributes:
        path: of the file.
        system: its name.
        model: SHA-256 of the model file, or empty without one.
        basis: SHA-256 of the prior knowledge, which was fixed before the first demand.
        records: what has been counted, in order.
        size: how many bytes of the file are whole.
    """

    path: Path
    system: str
    model: str = ""
    basis: str = ""
    records: tuple[Record, ...] = ()
    size: int = 0
    chain: str = field(default="", repr=False)

    @property
    def demands(self) -> int:
        """How many have been counted."""
        return len(self.records)

    @property
    def failures(self) -> int:
        """How many of them failed."""
        return sum(record.failed for record in self.records)


def open_journal(path: Path, system: str, model: str = "", basis: str = "") -> Journal:
    """Read a journal, or begin one; nothing is written yet.

    Raises:
        StateError: the file is damaged, no journal, or one of another system, model or prior.
    """
    header = _header(system, model, basis)
    empty = Journal(path, system, model, basis, chain=digest_bytes(header))
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return empty
    except OSError as error:
        raise StateError(f"the journal {path} cannot be read: {error.strerror}") from error
    *lines, tail = content.split(b"\n")
    if not lines:
        if not header.startswith(tail):
            _check_header(path, tail, empty)
        return empty
    _check_header(path, lines[0], empty)
    if lines[1:] and tail and not tail.startswith((b'{"chain":"')[: len(tail)]):
        raise StateError(f"{path} ends in {tail[:20]!r}, which no journal does; restore it from a copy")
    records, chain = _read(path, lines[1:], empty.chain)
    return replace(empty, records=records, size=len(content) - len(tail), chain=chain)


def append(journal: Journal, stream: Sequence[Record], now: datetime, since: datetime | None = None) -> Journal:
    """Count the demands of a stream that are not yet there; return the journal with them.

    The stream may hold all demands since the beginning, or go on from any that has been counted, or begin behind the
    last.

    Raises:
        DataError: a record is out of order, in the future, twice, or not the one that was counted; nothing is written.
        StateError: another process has written meanwhile.
    """
    new = _unknown(journal, stream)
    check_order([*journal.records, *new], now, since)
    if not new and journal.size:
        return journal
    header = _header(journal.system, journal.model, journal.basis) + b"\n"
    lines, chain = [] if journal.size else [header], journal.chain
    for number, record in enumerate(new, journal.demands + 1):
        chain = _link(chain, number, record)
        lines.append(_line({"n": number, "record": record.to_json(), "chain": chain}) + b"\n")
    content = b"".join(lines)
    _write(journal, content)
    return replace(journal, records=(*journal.records, *new), size=journal.size + len(content), chain=chain)


def _unknown(journal: Journal, stream: Sequence[Record]) -> Sequence[Record]:
    """Return what of a stream comes after the journal, once what is in both is found to be the same."""
    if not stream or not journal.records:
        return stream
    keys = [record.key for record in journal.records]
    start = keys.index(stream[0].key) if stream[0].key in keys else len(keys)
    for number, (known, record) in enumerate(zip(journal.records[start:], stream, strict=False), start + 1):
        if known != record:
            raise DataError(
                f"record {number - start} of the stream is not demand {number} of the journal, which it should be; the "
                "stream was changed or reordered after it was counted: restore it"
            )
    return stream[len(keys) - start :]


def _read(path: Path, lines: Sequence[bytes], chain: str) -> tuple[tuple[Record, ...], str]:
    records = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
            record = Record.from_json(value["record"])
            chain = _link(chain, number, record)
            whole = line == _line({"n": number, "record": record.to_json(), "chain": chain})
        except (ValueError, KeyError, TypeError, RecursionError):
            whole = False
        if not whole:
            raise StateError(
                f"the journal {path} is damaged in line {number + 1}, which is not what was written; restore it"
            )
        records.append(record)
    return tuple(records), chain


def _check_header(path: Path, line: bytes, expected: Journal) -> None:
    try:
        value = json.loads(line)
        known = line == _header(value["system"], value["model"], value["basis"])
    except (ValueError, KeyError, TypeError, RecursionError):
        known = False
    if not known:
        raise StateError(f"{path} is no {KIND} in format {FORMAT}; give another path, or restore it from a copy")
    if value["system"] != expected.system:
        raise StateError(f"{path} is the journal of {value['system']!r}, not of {expected.system!r}; give each its own")
    if value["model"] != expected.model:
        raise StateError(
            f"the model file has changed since {path} was begun, or when it declines ({_short(value['model'])}, now "
            f"{_short(expected.model)}): its demands speak of another network. Restore the model, or begin a new "
            "journal, from no demands"
        )
    if value["basis"] != expected.basis:
        raise StateError(
            f"the prior or the evidence for it has changed since {path} was begun; what is believed beforehand is "
            "fixed before the first demand is seen. Restore it, or begin a new journal with unseen demands"
        )


def _header(system: str, model: str, basis: str) -> bytes:
    return _line({"basis": basis, "format": FORMAT, "kind": KIND, "model": model, "system": system})


def _short(digest: str) -> str:
    return f"{digest[:12]}…" if digest else "none"


def _link(chain: str, number: int, record: Record) -> str:
    return digest_bytes(chain.encode(), str(number).encode(), _line(record.to_json()))


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _write(journal: Journal, content: bytes) -> None:
    """Put content behind what is whole, and do not return before it is on the disk."""
    journal.path.parent.mkdir(parents=True, exist_ok=True)
    with journal.path.open("ab") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        _check_unchanged(journal, stream)
        stream.truncate(journal.size)
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _check_unchanged(journal: Journal, stream: IO[bytes]) -> None:
    """Refuse if another process has counted demands since the journal was read."""
    with journal.path.open("rb") as current:
        content = current.read()
    if b"\n" in content[journal.size :]:
        raise StateError(f"another process has written to {journal.path} meanwhile; run again")
    if len(content) < journal.size:
        raise StateError(f"{journal.path} has become shorter meanwhile; restore it from a copy")
