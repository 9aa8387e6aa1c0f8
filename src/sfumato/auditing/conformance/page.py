"""The result as a Markdown page. Pure."""

from sfumato.auditing.conformance.outcome import FAILURES, Conformance, Row


def markdown(result: Conformance) -> str:
    """Verdict, claim, one line for each row, then the evidence of every check."""
    claim = ", ".join(f"{name} {_number(value)}" for name, value in result.claim.items() if value is not None)
    lines = [
        f"# Conformance of {result.trainer or 'a trainer'}: {result.verdict}",
        "",
        f"{result.because[:1].upper()}{result.because[1:]}",
        "",
        f"Claim: {claim}.",
        f"A trainer that keeps its claim is convicted in such a pass with probability {result.false_alarm:g} at most "
        f"(seed {result.seed}).",
        "",
        "| row | failure | verdict | because |",
        "|---|---|---|---|",
        *(_line(row) for row in result.rows),
        "",
        "CONSISTENT: nothing was found, and the same check found a bug that was put into the same trainer. INCONCLUSIVE: "
        "it could not be tested; that says nothing for the trainer.",
        "",
        "## Evidence",
    ]
    for row in result.rows:
        for item in row.evidence:
            chance = f"false alarm {item.false_alarm:.1e}" if item.false_alarm else "exact"
            lines += [
                "",
                f"**{row.number} · {item.name}** ({item.test}, {chance}): {item.verdict}. {_cell(item.because)}.",
            ]
            if item.control:
                lines.append(f"With a bug put in: {_cell(item.control)}.")
    if result.hints:
        lines += ["", "## Where to look", "", *(f"- {hint}" for hint in result.hints)]
    return "\n".join(lines) + "\n"


def _line(row: Row) -> str:
    return f"| {row.number} | {FAILURES[row.number]} | {row.verdict} | {_cell(row.because)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").rstrip(".")


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
