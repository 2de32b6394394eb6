"""One page that stands alone: verdict, claims, the argument drawn, growth, sensitivity, assumptions, evidence.

Nothing is fetched: styles and pictures are in the file, and there is no script.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from kaisa.assure.case import Case, Node, Problem, say_number
from kaisa.assure.case_drawing import draw_case
from kaisa.assure.case_file import STAGES
from kaisa.assure.case_notations import Notation
from kaisa.assure.claims_plots import draw_curves, draw_growth, separate_names
from kaisa.assure.claims_sensitivity import growth, sensitivity
from kaisa.assure.evaluation import Evaluation, Result

STYLE = """
:root{--ink:#1c2733;--quiet:#5d6b7e;--line:#dfe4eb;--paper:#fff;--wash:#f6f7f9;--good:#0c6b4c;--bad:#b42318}
*{box-sizing:border-box}
body{margin:0;background:var(--wash);color:var(--ink)}
body{font:15px/1.55 system-ui,-apple-system,'Segoe UI',Roboto,sans-serif}
main{max-width:1120px;margin:0 auto;padding:40px 28px 72px}
h1{font-size:27px;line-height:1.25;margin:0 0 6px;letter-spacing:-.01em}
h2{font-size:18px;margin:44px 0 12px}
h3{font-size:15px;margin:26px 0 6px}
p{margin:0 0 10px;max-width:46em}
.lead{color:var(--quiet);margin-bottom:22px}
.card{background:var(--paper);border:1px solid var(--line);border-radius:10px;padding:18px 20px;margin:0 0 14px}
.verdict{border-left:6px solid var(--good);font-size:16.5px}
.verdict.bad{border-left-color:var(--bad)}
.verdict b{color:var(--good)}.verdict.bad b{color:var(--bad)}
.verdict ul{margin:8px 0 0;padding-left:20px;font-size:14.5px}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(170px,1fr));gap:14px;margin:0 0 14px}
.fact{background:var(--paper);border:1px solid var(--line);border-radius:10px;padding:12px 16px}
.fact b{display:block;font-size:23px;font-weight:620;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.fact span{color:var(--quiet);font-size:13px}
table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}
th{text-align:left;font-weight:600;color:var(--quiet);font-size:12.5px}
th{padding:6px 12px 6px 0;border-bottom:1px solid var(--line)}
td{padding:9px 12px 9px 0;border-bottom:1px solid var(--line);vertical-align:top}
tr:last-child td{border-bottom:0}
.bar{position:relative;display:block;height:8px;min-width:120px;background:#eaedf2;border-radius:4px;margin-top:7px}
.bar i{position:absolute;inset:0 auto 0 0;border-radius:4px;background:var(--good)}
.missed .bar i{background:var(--bad)}
.bar em{position:absolute;top:-4px;width:2px;height:16px;background:var(--ink)}
.ok{color:var(--good);font-weight:600}.no{color:var(--bad);font-weight:600}
.picture{overflow-x:auto;background:var(--paper);border:1px solid var(--line);border-radius:10px;padding:10px}
.picture svg{display:block;margin:0 auto}
.picture.wide{width:min(96vw,1900px);margin-left:calc(50% - min(48vw,950px))}
.picture svg.case{width:100%;min-width:1000px;height:auto}
.short{white-space:nowrap}
.plot svg{width:100%;height:auto}
code{font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,monospace;overflow-wrap:anywhere}
ol,ul{padding-left:22px;margin:0}li{margin:0 0 7px;max-width:48em}
.tag{color:var(--quiet);font-size:12.5px}
footer{margin-top:48px;color:var(--quiet);font-size:13px}
@media print{body{background:#fff}main{padding:0}.card,.picture,.fact{break-inside:avoid}h2{break-after:avoid}}
""".strip()

LIMITS = (
    "Each number is the worst case over the priors that agree with what is believed. If that belief is too confident, "
    "the number is too good: the belief is the weakest link, not the arithmetic.",
    "Claims are about single demands. What a failure does, how failures cluster, and the risk of the whole system are "
    "not in them.",
    "They hold for this network, frozen. After any training, the demands count from zero.",
    "They hold for the operation that the demands came from. If it changes, what was seen before may say little.",
)


def draw_page(evaluation: Evaluation, case: Case, problems: Sequence[Problem], notation: Notation = "gsn") -> str:
    """Return the report as one HTML page."""
    parts = [
        _head(evaluation),
        _verdict(evaluation, problems),
        _facts(evaluation),
        _claims(evaluation),
        f'<h2>The argument</h2><div class="picture wide">{draw_case(case, notation)}</div>',
        "<h2>How the claims came about</h2>",
        *(_pictures(evaluation, number, result) for number, result in enumerate(evaluation.results, 1)),
        _assumptions(case),
        _worst_cases(evaluation),
        _evidence(case),
        f"<h2>Limits</h2><div class='card'><ul>{''.join(f'<li>{escape(text)}</li>' for text in LIMITS)}</ul></div>",
        f"<footer>Made by <code>kaisa assure report {escape(evaluation.file.path.name)}</code> from the journal "
        f"<code>{escape(evaluation.file.journal)}</code>. The numbers are in <code>claims.json</code>, the argument in "
        "<code>case.json</code>.</footer>",
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(evaluation.file.title)}</title><style>{STYLE}</style></head><body><main>{''.join(parts)}"
        "</main></body></html>\n"
    )


def _head(evaluation: Evaluation) -> str:
    return (
        f"<h1>{escape(evaluation.file.title)}</h1><p class='lead'>Safety case of {escape(evaluation.file.system)}: "
        "what may be claimed of its probability of failure per demand (pfd), whatever the rest of the prior is.</p>"
    )


def _verdict(evaluation: Evaluation, problems: Sequence[Problem]) -> str:
    count = len(evaluation.results)
    many = "both claims" if count == 2 else f"all {count} claims"
    claims = "the claim reaches its target" if count == 1 else f"{many} reach their targets"
    if not problems:
        return f"<div class='card verdict'><b>The case holds:</b> {claims}, and the argument has no gap.</div>"
    items = "".join(f"<li>{escape(problem.text)}</li>" for problem in problems)
    how_many = "one problem" if len(problems) == 1 else f"{len(problems)} problems"
    return f"<div class='card verdict bad'><b>The case does not hold:</b> {how_many}.<ul>{items}</ul></div>"


def _facts(evaluation: Evaluation) -> str:
    journal, prior = evaluation.journal, evaluation.prior
    bound, theta = list(prior.quantiles.items())[-1]
    sign = "≥ " if prior.at_least else ""
    facts = [
        (f"{journal.demands:,}", "demands since the network was frozen"),
        (f"{journal.failures:,}", "of them failed"),
        (
            f"{sign}{theta:g}",
            "belief beforehand in no fault" if bound == 0 else f"belief beforehand in pfd ≤ {bound:.4g}",
        ),
        (f"{prior.floor:g}", "floor: the least pfd thought possible"),
    ]
    return (
        "<div class='facts'>"
        + "".join(f"<div class='fact'><b>{a}</b><span>{b}</span></div>" for a, b in facts)
        + "</div>"
    )


def _claims(evaluation: Evaluation) -> str:
    rows = "".join(_claim_row(result) for result in evaluation.results)
    return (
        "<h2>The claims</h2><div class='card'><table><thead><tr><th>Claim</th><th>Worst case</th><th>Target</th>"
        f"<th></th><th>What it needs, what it bears</th></tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _claim_row(result: Result) -> str:
    claim, target = result.claim, result.target
    words = _sentence(claim.question.describe())
    at_most = target.kind == "expected_pfd"
    scale = max(1e-300, 1.25 * max(claim.value, target.target)) if at_most else 1.0
    bar = f"<span class='bar'><i style='width:{_percent(claim.value / scale)}'></i>"
    bar += f"<em style='left:{_percent(target.target / scale)}'></em></span>"
    row = "met" if result.is_met else "missed"
    state = "<span class='ok'>reached</span>" if result.is_met else "<span class='no'>missed</span>"
    value = "void" if claim.void else say_number(claim.value)
    return (
        f"<tr class='{row}'><td>{escape(words)}</td>"
        f"<td><b>{value}</b>{bar}</td><td class='short'>{'≤' if at_most else '≥'} {target.target:g}</td>"
        f"<td>{state}</td><td>{escape(_plan(result))}</td></tr>"
    )


def _sentence(words: str) -> str:
    return words[0].upper() + words[1:]


def _plan(result: Result) -> str:
    question = result.claim.question
    if result.claim.void:
        return f"Void: {result.claim.void}."
    if result.is_met and result.borne is not None:
        spare = result.borne - question.failures
        return f"Would bear {spare:,} more failure{'' if spare == 1 else 's'} in as many demands."
    if result.needed is None:
        return "No number of further demands reaches the target: the prior has to be stronger."
    return f"{result.needed - question.demands:,} more demands without a failure would reach it."


def _percent(share: float) -> str:
    return f"{100 * min(1.0, max(0.0, share)):.1f}%"


def _pictures(evaluation: Evaluation, number: int, result: Result) -> str:
    question, target = result.claim.question, result.target.target
    words = _sentence(question.describe())
    failed = [record.failed for record in evaluation.journal.records]
    parts = [f"<h3>{escape(words)}</h3><div class='card plot'>"]
    if failed:
        parts.append(separate_names(draw_growth(question, growth(question, failed), target, None), f"g{number}"))
    if result.claim.void is None:
        parts.append("<p class='tag'>What the worst case depends on, each with all else as it is; the dot is now.</p>")
        parts.append(separate_names(draw_curves(question, sensitivity(question), target, None), f"s{number}"))
    else:
        parts.append(f"<p class='no'>{escape(result.claim.void)}.</p>")
    return "".join([*parts, "</div>"])


def _assumptions(case: Case) -> str:
    nodes = [node for node in case.nodes.values() if node.kind == "assumption"]
    items = "".join(f"<li>{escape(node.text)} <span class='tag'>{node.name}</span></li>" for node in nodes)
    open_stages = [stage for stage in STAGES if f"G4.{stage}" not in case.nodes]
    doubts = [node for node in case.nodes.values() if node.kind == "defeater"]
    text = f"<h2>What has to be true</h2><div class='card'><ol>{items}</ol></div>"
    if doubts:
        text += f"<h2>Doubts that were raised</h2><div class='card'><ul>{''.join(map(_doubt, doubts))}</ul></div>"
    if open_stages:
        text += (
            "<p class='tag'>Not argued here, since no evidence is cited for it: "
            f"{escape(', '.join(open_stages))}. An assessor may ask.</p>"
        )
    return text


def _doubt(node: Node) -> str:
    answer = (
        f"Answered: {escape(node.answer)}"
        if node.answer
        else "<span class='no'>Not answered: it defeats the case.</span>"
    )
    return f"<li>{escape(node.text)}. {answer}</li>"


def _worst_cases(evaluation: Evaluation) -> str:
    rows = []
    for result in evaluation.results:
        words = result.claim.question.describe()
        for index, atom in enumerate(result.claim.worst_case):
            first = f"{escape(words)}<br><span class='tag'>{_proof_words(result)}</span>" if index == 0 else ""
            above = "just above " if atom.just_above else ""
            rows.append(
                f"<tr><td>{first}</td><td>{above}{atom.at:.6g}</td><td>{atom.mass:.6g}</td><td>{atom.posterior:.6g}</td></tr>"
            )
    return (
        "<h2>The worst priors</h2><p>A prior that agrees with every belief and gives the value above. An assessor who "
        "finds it absurd knows which further belief would help.</p><div class='card'><table><thead><tr><th>Claim</th>"
        f"<th>pfd</th><th>mass before</th><th>mass after</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _proof_words(result: Result) -> str:
    proof = result.proof
    if proof is None:
        return "void"
    return f"{result.claim.method}; dual: slack {proof.slack:.1e}, gap {proof.gap:.1e} on {proof.points:,} points"


def _evidence(case: Case) -> str:
    rows = "".join(
        f"<tr><td>{node.name}</td><td>{escape(node.text)}</td><td><code>{escape(node.exhibit.file)}</code><br>"
        f"<code>{node.exhibit.digest}</code></td><td><code>{escape(node.exhibit.command)}</code><br>"
        f"<span class='tag'>{escape(node.exhibit.date)}</span></td></tr>"
        for node in case.nodes.values()
        if node.exhibit is not None
    )
    return (
        "<h2>The evidence</h2><p>Every solution cites a file by its SHA-256. "
        "<code>kaisa assure report</code> refuses to go on if one has changed.</p><div class='card'><table><thead>"
        "<tr><th></th><th>What it shows</th><th>File and digest</th><th>Made by</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )
