"""From a case file and its records to claims and a safety case.

read      case file, evidence, records        refuse what is malformed, changed, or used twice
count     new demands into the journal        only once everything else is known to be sound
claim     the worst case of each claim        with its dual looked at, and what it still needs
argue     goals, strategies, solutions        every number cites the file that it came from
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from kaisa.assure.case import Case, Figure, Node, read_case
from kaisa.assure.case_file import STAGES, CaseFile, Target
from kaisa.assure.claims import Claim, ask
from kaisa.assure.claims_planning import demands_needed, failures_borne
from kaisa.assure.claims_programme import Certificate, certify
from kaisa.assure.exhibits import COMMAND, Exhibit, digest_bytes, digest_file, replace_file
from kaisa.assure.gathering import gather
from kaisa.assure.journal import Journal, append, open_journal
from kaisa.assure.network import Network
from kaisa.assure.prior import Prior
from kaisa.assure.records import Record, read_records
from kaisa.errors import ConfigurationError, DataError, StateError

CLAIMS, CASE = "claims.json", "case.json"


@dataclass(frozen=True)
class Result:
    """One claim with all that is known of it.

    Attributes:
        target: what was asked for.
        claim: the worst case.
        proof: its dual; None of a void claim.
        needed: demands in all that would meet the target without further failures; None if none do.
        borne: failures in as many demands that the target bears; None if not even none.
    """

    target: Target
    claim: Claim
    proof: Certificate | None
    needed: int | None
    borne: int | None

    @property
    def is_met(self) -> bool:
        """Whether the claim reaches its target, and its proof holds."""
        return self.claim.meets(self.target.target) and self.proof is not None and self.proof.holds()


@dataclass(frozen=True)
class Evaluation:
    """What a case file comes to, with the demands of its journal.

    Attributes:
        file: what was asked.
        prior: what was believed beforehand.
        journal: the demands.
        exhibits: the evidence by name, with the stage of the life cycle that each supports.
        results: one a claim.
    """

    file: CaseFile
    prior: Prior
    journal: Journal
    exhibits: tuple[tuple[Exhibit, str], ...]
    results: tuple[Result, ...]

    @property
    def is_met(self) -> bool:
        """Whether every claim reaches its target."""
        return all(result.is_met for result in self.results)


def evaluate(
    file: CaseFile, network: Network | None = None, *, now: datetime | None = None, count: bool = True
) -> Evaluation:
    """Count the new demands, and make the claims.

    Args:
        file: what is claimed.
        network: that of the run that the file names.
        now: the time; later records are refused.
        count: whether to look for new demands; otherwise those of the journal are taken.

    Raises:
        ConfigurationError: the case file contradicts itself.
        DataError: records are malformed, out of order or used twice; the journal is as it was.
        StateError: the journal is damaged, or model, prior or evidence are not those that it was begun with.
    """
    if file.run and network is None:
        raise ConfigurationError(f"{file.path} names a run; give the network that it made")
    exhibits = gather(file, network)
    prior = build_prior(file, [exhibit for exhibit, _ in exhibits])
    for target in file.targets:
        target.ask(prior, 0, 0)  # refuses what no claim can be made of, before any demand is counted
    journal = open_journal(
        file.folder / file.journal, file.system, _digest_model(file, network), _basis(file, prior, exhibits)
    )
    if count:
        path = file.folder / file.records
        stream = read_records(path, None if network is None else partial(_answer, network, journal))
        _refuse_reuse(path, stream, file, [exhibit for exhibit, _ in exhibits])
        journal = append(journal, stream, now or datetime.now(UTC), file.frozen)
    results = tuple(_result(target, prior, journal) for target in file.targets)
    return Evaluation(file, prior, journal, tuple(exhibits), results)


def refuse_changed_evidence(file: CaseFile, folder: Path) -> None:
    """Refuse if evidence is not what the last case in a folder cited.

    Raises:
        StateError: a file has changed, or that case is damaged.
    """
    if not (folder / CASE).exists():
        return
    cited = {node.exhibit.file: node.exhibit.digest for node in read_case(folder / CASE).nodes.values() if node.exhibit}
    for evidence in file.evidence:
        if evidence.cited in cited and cited[evidence.cited] != digest_file(file.folder / evidence.cited):
            raise StateError(
                f"the evidence {evidence.cited} has changed since the case in {folder} cited it; restore it, or "
                "move that folder away to argue anew"
            )


def build_prior(file: CaseFile, exhibits: Sequence[Exhibit]) -> Prior:
    """Return the prior knowledge of a case file, quantiles of its evidence among it.

    Raises:
        ConfigurationError: a source is no piece of evidence, justifies no quantile, or the numbers contradict.
    """
    known = {exhibit.name: exhibit for exhibit in exhibits}
    quantiles: dict[float, float] = {}
    at_most: dict[float, float] = {}
    for belief in file.beliefs:
        if belief.source and belief.source not in known:
            raise ConfigurationError(
                f"the prior takes a quantile from {belief.source!r}, which is no evidence here; there is "
                f"{', '.join(known) or 'none'}"
            )
        if not belief.source:
            _put(at_most if belief.at_most else quantiles, (belief.bound or 0.0, belief.belief or 0.0))
            continue
        exhibit = known[belief.source]
        if exhibit.quantile is None:
            raise ConfigurationError(f"the evidence {belief.source!r} justifies no quantile; take another one")
        _put(quantiles, exhibit.quantile)
        # Below the floor nothing is believed anyway.
        if exhibit.at_most is not None and exhibit.at_most[0] >= file.floor:
            _put(at_most, exhibit.at_most)
    return Prior(quantiles, file.floor, file.at_least, file.mean, at_most)


def _put(beliefs: dict[float, float], pair: tuple[float, float]) -> None:
    if pair[0] in beliefs:
        raise ConfigurationError(f"there are two beliefs in the bound {pair[0]:g}; keep the one that is justified")
    beliefs[pair[0]] = pair[1]


def write_results(evaluation: Evaluation, folder: Path) -> Case:
    """Write claims and case as JSON into a folder; return the case."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(describe(evaluation), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    replace_file(folder / CLAIMS, text)
    case = build_case(evaluation, folder / CLAIMS)
    case.write(folder / CASE)
    return case


def describe(evaluation: Evaluation) -> dict[str, Any]:
    """Return all claims and what they rest on, for JSON."""
    file, prior, journal = evaluation.file, evaluation.prior, evaluation.journal
    return {
        "format": 1,
        "kind": "kaisa assure claims",
        "title": file.title,
        "system": file.system,
        "model": journal.model or None,
        "prior": {
            "quantiles": [list(pair) for pair in prior.quantiles.items()],
            "floor": prior.floor,
            "at_least": prior.at_least,
            "at_most": [list(pair) for pair in prior.at_most.items()],
            "mean": prior.mean,
        },
        "demands": journal.demands,
        "failures": journal.failures,
        "last": journal.records[-1].time.isoformat() if journal.records else None,
        "claims": [_describe_result(result) for result in evaluation.results],
    }


def build_case(evaluation: Evaluation, claims: Path) -> Case:
    """Return the argument for an evaluation whose claims are written in a file."""
    file = evaluation.file
    case = Case(file.title)
    case.add(Node("G1", "goal", f"{file.title}: every claim reaches its target"))
    case.add(Node("C1", "context", _system_words(evaluation)), under="G1")
    if file.context:
        case.add(Node("C2", "context", f"Operation: {file.context}"), under="G1")
    method = "Conservative Bayesian inference: the worst case over every prior that agrees with what is believed"
    case.add(Node("S1", "strategy", method), under="G1")
    proof = "Each worst case is proved by a linear programme's dual, looked at again on a grid of its own"
    case.add(Node("J1", "justification", proof), under="S1")
    _add_claims(case, evaluation, claims)
    _add_prior(case, evaluation)
    _add_operation(case, evaluation)
    _add_doubts(case, evaluation)
    return case


def _answer(network: Network, journal: Journal, paths: Sequence[Path]) -> list[tuple[str, str]]:
    """Return what the network says to files; to those that are counted, what it has said."""
    said = {record.input: record.prediction for record in journal.records if record.input and record.prediction}
    digests = network.digests(paths)
    new = {digest: path for digest, path in zip(digests, paths, strict=True) if digest not in said}
    said |= zip(new, network.answer(list(new.values())), strict=True)
    return [(digest, said[digest]) for digest in digests]


def _digest_model(file: CaseFile, network: Network | None) -> str:
    """Return what tells one frozen system from another: its weights, and when it declines."""
    if network is None:
        return digest_file(file.folder / file.model) if file.model else ""
    weights, criterion = digest_file(network.weights), network.criterion.describe()
    return digest_bytes(weights.encode(), criterion.encode()) if criterion else weights


def _refuse_reuse(path: Path, stream: Sequence[Record], file: CaseFile, exhibits: Sequence[Exhibit]) -> None:
    """Refuse operation that the prior knowledge has already been drawn from."""
    digest = digest_file(path)
    for exhibit in exhibits:
        used = {*exhibit.data.values(), exhibit.digest, *exhibit.inputs}
        twice = [number for number, record in enumerate(stream, 1) if record.key in used or record.input in used]
        if digest in used or twice:
            where = "the whole file" if digest in used else f"{len(twice)} of its records, the first is {twice[0]}"
            raise DataError(
                f"the evidence {exhibit.name!r} has used {file.records} already ({where}); what the prior was drawn "
                "from cannot count again as operation: leave it out of one of them"
            )


def _basis(file: CaseFile, prior: Prior, exhibits: Sequence[tuple[Exhibit, str]]) -> str:
    """Return a digest of what is believed beforehand, and of the evidence for it."""
    sources = {belief.source for belief in file.beliefs}
    cited = sorted(f"{exhibit.name} {exhibit.digest}" for exhibit, _ in exhibits if exhibit.name in sources)
    numbers = [list(map(list, prior.quantiles.items())), prior.floor, prior.at_least, prior.mean]
    numbers += [list(map(list, prior.at_most.items()))] if prior.at_most else []
    return digest_bytes(json.dumps(numbers).encode(), *(text.encode() for text in cited))


def _result(target: Target, prior: Prior, journal: Journal) -> Result:
    question = target.ask(prior, journal.demands, journal.failures)
    claim = ask(question)
    proof = None if claim.void is not None else certify(claim)
    return Result(
        target, claim, proof, demands_needed(question, target.target), failures_borne(question, target.target)
    )


def _describe_result(result: Result) -> dict[str, Any]:
    claim, question = result.claim, result.claim.question
    return {
        "statement": question.describe(),
        "type": question.kind,
        "at": question.at,
        "value": claim.value,
        "complement": claim.complement,
        "target": result.target.target,
        "met": result.is_met,
        "void": claim.void,
        "method": claim.method,
        "worst_case": [
            {"pfd": atom.at, "just_above": atom.just_above, "prior": atom.mass, "posterior": atom.posterior}
            for atom in claim.worst_case
        ],
        "proof": None
        if result.proof is None
        else {"slack": result.proof.slack, "gap": result.proof.gap, "points": result.proof.points},
        "demands_needed": result.needed,
        "failures_borne": result.borne,
    }


def _system_words(evaluation: Evaluation) -> str:
    model = evaluation.journal.model
    frozen = evaluation.file.frozen
    parts = [f"System: {evaluation.file.system}"]
    parts += [f"frozen network {model[:12]}… ({evaluation.file.model or evaluation.file.run})"] if model else []
    parts += [f"judged by {evaluation.file.criterion.describe()}"] if evaluation.file.criterion.given else []
    parts += [f"in operation since {frozen:%Y-%m-%d %H:%M} UTC"] if frozen else []
    return ", ".join(parts)


def _add_claims(case: Case, evaluation: Evaluation, claims: Path) -> None:
    file, digest = evaluation.file, digest_file(claims)
    for number, result in enumerate(evaluation.results, 1):
        claim, at_most = result.claim, result.target.kind == "expected_pfd"
        figure = Figure(None if claim.void else claim.value, result.target.target, at_most, claim.void or "")
        words = claim.question.describe()
        case.add(Node(f"G2.{number}", "goal", words[0].upper() + words[1:], figure), under="S1")
        slack = "void" if result.proof is None else f"slack {result.proof.slack:.1e}, gap {result.proof.gap:.1e}"
        exhibit = Exhibit(
            name=f"claim {number}",
            statement=f"Worst case by {claim.method}, proved by its dual ({slack})",
            value=claim.value,
            command=COMMAND,
            date=datetime.now(UTC).date().isoformat(),
            digest=digest,
            file=os.path.relpath(claims, file.folder),
        )
        case.add(Node(f"Sn2.{number}", "solution", exhibit.statement, exhibit=exhibit), under=f"G2.{number}")


def _add_prior(case: Case, evaluation: Evaluation) -> None:
    file, prior = evaluation.file, evaluation.prior
    case.add(Node("G3", "goal", f"Beforehand it was justified to believe that {prior.describe()}"), under="S1")
    case.add(Node("S3", "strategy", "Over the life cycle of the network, and each belief by itself"), under="G3")
    if file.floor > 0:
        why = file.floor_because or "no reason is given"
        case.add(Node("A3", "assumption", f"No such system is better than pfd {file.floor:g}: {why}"), under="G3")
    for stage, goal in STAGES.items():
        cited = [exhibit for exhibit, supports in evaluation.exhibits if supports == stage]
        if not cited:
            continue
        case.add(Node(f"G4.{stage}", "goal", goal), under="S3")
        for number, exhibit in enumerate(cited, 1):
            name = f"Sn4.{stage}.{number}"
            case.add(Node(name, "solution", exhibit.statement, exhibit=exhibit), under=f"G4.{stage}")
            for index, text in enumerate(exhibit.assumptions, 1):
                case.add(Node(f"A4.{stage}.{number}.{index}", "assumption", text), under=f"G4.{stage}")
    judged = [belief for belief in file.beliefs if not belief.source]
    if judged:
        case.add(Node("G5", "goal", "What rests on judgement is stated, with its reason"), under="S3")
    for number, belief in enumerate(judged, 1):
        sign = "at most " if belief.at_most else ""
        exhibit = Exhibit(
            name=f"judgement {number}",
            statement=f"Pr(pfd ≤ {belief.bound:g}) is {sign}{belief.belief:g}. {belief.because}",
            value=belief.belief,
            command="written by hand",
            date=_date_of(file.path),
            digest=digest_file(file.path),
            file=file.path.name,
        )
        case.add(Node(f"Sn5.{number}", "solution", exhibit.statement, exhibit=exhibit), under="G5")


def _add_operation(case: Case, evaluation: Evaluation) -> None:
    journal, file = evaluation.journal, evaluation.file
    words = f"Since then {journal.demands:,} demands were worked, of which {journal.failures:,} failed"
    case.add(Node("G6", "goal", words), under="S1")
    usual = (
        "Demands are independent of one another; of frames of a video count a block as one",
        "They come from the operation that the claims are about, and it stays as it is",
        "What is taken for true is true: the oracle is right",
        "The network was frozen all the time; after every training counting begins anew",
    )
    for number, text in enumerate((*usual, *file.assumptions), 1):
        case.add(Node(f"A6.{number}", "assumption", text), under="G6")
    if journal.records:
        exhibit = Exhibit(
            name="journal",
            statement=f"The journal of all demands until {journal.records[-1].time:%Y-%m-%d %H:%M} UTC",
            value=journal.failures / journal.demands,
            command=COMMAND,
            date=journal.records[-1].time.date().isoformat(),
            digest=digest_file(journal.path),
            file=file.journal,
        )
        case.add(Node("Sn6", "solution", exhibit.statement, exhibit=exhibit), under="G6")
    else:
        case.add(Node("Sn6", "solution", "No demand was seen yet", exhibit=_no_demands(file)), under="G6")


def _no_demands(file: CaseFile) -> Exhibit:
    return Exhibit(
        name="no demands",
        statement="No demand was seen yet",
        value=None,
        command=COMMAND,
        date=_date_of(file.path),
        digest=digest_file(file.path),
        file=file.path.name,
    )


def _add_doubts(case: Case, evaluation: Evaluation) -> None:
    places = {"claims": "S1", "prior": "G3", "operation": "G6", **{stage: f"G4.{stage}" for stage in STAGES}}
    for number, doubt in enumerate(evaluation.file.doubts, 1):
        place = places.get(doubt.challenges)
        if place is None or place not in case.nodes:
            known = ", ".join(name for name, node in places.items() if node in case.nodes)
            raise ConfigurationError(f"a defeater challenges {doubt.challenges!r}; choose from {known}")
        case.add(Node(f"CG{number}", "defeater", doubt.text, answer=doubt.answer), under=place)


def _date_of(path: Path) -> str:
    return datetime.fromtimestamp(path.stat().st_mtime, UTC).date().isoformat()
