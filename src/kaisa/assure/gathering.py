"""The evidence of a case: read from files, counted from records, or made by trying out the network.

    file = "audit.json"            an exhibit, as another tool has written it
    records = "held-out.csv"       records of demands that had no part in making the network
    data = "held-out.zip"          inputs of the network's own kind, which is run on them
    tests = true                   those that its run was tested on

What is tried out is tried out once: the exhibit is written beside the case file as NAME.evidence.json, names the
digests of the network and of the data, and is refused if they are others later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from kaisa.assure.case_file import CaseFile, Evidence
from kaisa.assure.exhibits import (
    COMMAND,
    Exhibit,
    digest_file,
    digest_path,
    find_double_use,
    read_exhibit,
    write_exhibit,
)
from kaisa.assure.network import Network
from kaisa.assure.records import check_order, read_records
from kaisa.errors import ConfigurationError, DataError, StateError


def gather(file: CaseFile, network: Network | None) -> list[tuple[Exhibit, str]]:
    """Return the evidence of a case, with the stage of the life cycle that each supports.

    Raises:
        ConfigurationError: two pieces have the same name.
        DataError: one cannot be read, or data are used twice.
        StateError: one is damaged, or was made by another network.
    """
    gathered = [(_read_evidence(file, evidence, network), evidence.supports) for evidence in file.evidence]
    _refuse_double_use([exhibit for exhibit, _ in gathered])
    return gathered


def _refuse_double_use(exhibits: Sequence[Exhibit]) -> None:
    names = [exhibit.name for exhibit in exhibits]
    if len(set(names)) < len(names):
        raise ConfigurationError(f"two pieces of evidence have the same name: {', '.join(sorted(names))}")
    found = find_double_use(exhibits)
    if found:
        raise DataError(f"{'; '.join(found)}; the same data cannot speak twice: leave one of them out")


def _read_evidence(file: CaseFile, evidence: Evidence, network: Network | None) -> Exhibit:
    if evidence.file:
        return replace(read_exhibit(file.folder / evidence.file), file=evidence.file)
    if network is not None and evidence.is_tried_out:
        return _try_out_once(file, evidence, network)
    path = file.folder / evidence.records
    records = read_records(path)
    check_order(records, datetime.now(UTC))
    digest = digest_file(path)
    made = _count(path, [record.failed for record in records], evidence)
    return replace(
        made,
        date=records[-1].time.date().isoformat(),
        digest=digest,
        file=evidence.records,
        data={evidence.records: digest},
        inputs=frozenset({record.key for record in records} | {record.input for record in records if record.input}),
    )


def _count(source: object, failed: Sequence[bool], evidence: Evidence) -> Exhibit:
    """Return what demands show that had no part in making the network."""
    from kaisa.assure.evidence.held_out import HeldOut  # it needs scipy

    if not failed:
        raise DataError(f"{source} holds no records; evidence without a single demand is none")
    found = HeldOut(sum(failed), len(failed), evidence.belief, evidence.sides)
    return Exhibit(
        name=evidence.name,
        statement=found.statement,
        value=found.value,
        command=COMMAND,
        date=datetime.now(UTC).date().isoformat(),
        quantile=found.quantile,
        assumptions=found.assumptions,
        at_most=found.at_most,
    )


def _try_out_once(file: CaseFile, evidence: Evidence, network: Network) -> Exhibit:
    """Return what the network does on data, from the file of the first time if there is one."""
    path, data = file.folder / evidence.cited, file.folder / evidence.data if evidence.data else None
    used = {} if data is None else {evidence.data: digest_path(data)}
    made_by = f"{COMMAND}: {_describe_trial(evidence, network, used)}"
    if not path.exists():
        write_exhibit(path, _try_out(evidence, network, data, used, made_by))
    known = read_exhibit(path)
    if known.command != made_by:
        raise StateError(
            f"{path} was made by another network, other data or another measure ({known.command}; now {made_by}); "
            "restore them, or move it away to make it anew, with a new journal"
        )
    return replace(known, file=evidence.cited)


def _describe_trial(evidence: Evidence, network: Network, used: Mapping[str, str]) -> str:
    """Return what the evidence depends on."""
    parts = [f"network {digest_file(network.weights)}", network.criterion.describe()]
    parts += [f"{name} {digest}" for name, digest in used.items()] or ["what its run was tested on"]
    parts += [f"belief {evidence.belief:.15g}", "both sides" if evidence.sides == "both" else ""]
    return ", ".join(part for part in parts if part)


def _try_out(evidence: Evidence, network: Network, data: Path | None, used: Mapping[str, str], made_by: str) -> Exhibit:
    demands, learned = network.try_out(data), network.learned()
    inputs = frozenset(demand.input for demand in demands)
    both = len(inputs & (learned or frozenset()))
    if both:
        raise DataError(
            f"the network has learned from {both} of the {len(inputs)} inputs of the evidence {evidence.name!r}; leave "
            "them out, since they say nothing of what it has not seen"
        )
    made = _count(evidence.data or "what the run was tested on", [demand.failed for demand in demands], evidence)
    judged = f", judged by {network.criterion.describe()}" if network.criterion.given else ""
    further = ["That none of them was learned from is taken on trust: they could not be compared."] * (learned is None)
    further += ["The run was tested on them as it went on; nothing was chosen by that."] * evidence.tests
    return replace(
        made,
        statement=made.statement + judged,
        command=made_by,
        data=used,
        inputs=inputs,
        assumptions=(*made.assumptions, *further),
    )
