"""The model card: README.md of a bundle. Its figures are printed from the reports, and ``verify`` compares them again.

The parts that are exact, so that they can be compared byte by byte, are the YAML block at the top and the tables: of figures, and
of the sites where there are any. The prose between them repeats epsilon and delta, and nothing else that was measured.
"""

import re
from collections.abc import Mapping
from typing import Any

from sfumato.errors import VerificationFailed
from sfumato.release import templates
from sfumato.release.wording import bound, neighbours, number

TABLE_START, TABLE_END = "<!-- figures -->", "<!-- /figures -->"
SITES_START, SITES_END = "<!-- sites -->", "<!-- /sites -->"
_CLAIM = re.compile(r"(?:ε|epsilon|δ|delta)\s*(?:=|≤|:)\s*`?([0-9][0-9.eE+-]*[0-9]|[0-9])")


def render(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """The card of a bundle, from its JSON files by name."""
    privacy = reports["privacy.json"]
    return front_matter(privacy) + templates.fill(
        "card.md",
        privacy=privacy,
        mechanism=privacy.get("mechanism") or {},
        figures=figures_table(reports["quality.json"]),
        sites=sites_table(privacy),
        audit=reports["audit.json"],
        cost=reports["cost.json"],
        recipe=reports["provenance.json"].get("recipe") or {},
        card=reports["provenance.json"].get("data_card") or {},
        code=reports["provenance.json"].get("code") or {},
        claim=claim(privacy),
        neighbours=neighbours(one_line(privacy.get("adjacency")), one_line(privacy.get("unit"))),
        one_line=one_line,
    )


def claim(privacy: Mapping[str, Any]) -> str:
    """The one sentence that must be right."""
    return (
        f"ε = {bound(privacy.get('epsilon'))} at δ = {bound(privacy.get('delta'))}, per {one_line(privacy.get('unit'))}"
    )


def front_matter(privacy: Mapping[str, Any]) -> str:
    """The YAML block that catalogues read. Its form is fixed by the bundle's format version."""
    mechanism = privacy.get("mechanism") or {}
    last = (mechanism.get("stages") or [mechanism])[-1]
    entries = {
        "definition": privacy.get("definition"),
        "epsilon": privacy.get("epsilon"),
        "delta": privacy.get("delta"),
        "unit": privacy.get("unit"),
        "records_per_unit": privacy.get("records_per_unit"),
        "adjacency": privacy.get("adjacency"),
        "population": privacy.get("population"),
        "trust_model": privacy.get("trust_model"),
        "mechanism": mechanism.get("name"),
        "noise_multiplier": last.get("noise_multiplier"),
        "max_grad_norm": last.get("max_grad_norm"),
        "accountant": "pld",
    }
    lines = ["---", "library_name: sfumato", "tags: [differential-privacy, synthetic-data]", "privacy:"]
    lines += [f"  {key}: {_yaml(value)}" for key, value in entries.items()]
    return "\n".join([*lines, "---", ""])


def figures_table(quality: Mapping[str, Any]) -> str:
    """The measured figures, as a Markdown table between two marks."""
    lines = [
        TABLE_START,
        "| figure | value | 95 % interval | baselines | measured by | covered by |",
        "|---|---|---|---|---|---|",
    ]
    for figure in quality.get("figures") or []:
        low, high = figure.get("low"), figure.get("high")
        interval = f"{number(low)} to {number(high)}" if low is not None and high is not None else ""
        baselines = "; ".join(
            f"{key}: {number(value)}" for key, value in sorted((figure.get("baseline") or {}).items())
        )
        arrow = "higher is better" if figure.get("better", "higher") == "higher" else "lower is better"
        cells = (
            f"{figure.get('name', '')} ({arrow})",
            number(figure.get("value")),
            interval,
            baselines,
            figure.get("extractor", ""),
            figure.get("covered_by", ""),
        )
        lines.append("| " + " | ".join(one_line(number(cell)) for cell in cells) + " |")
    return "\n".join([*lines, TABLE_END])


def sites_table(privacy: Mapping[str, Any]) -> str:
    """What every site of a federation has spent, as a Markdown table between two marks."""
    unit = one_line(privacy.get("unit"))
    counted = unit != "site"  # where a whole site is the unit, the number of them stands in every row alike
    lines = [
        SITES_START,
        f"| site |{f' {unit}s |' if counted else ''} ε spent | its ledger |",
        "|---" * (3 + counted) + "|",
    ]
    for site in privacy.get("sites") or []:
        spent = bound(site["epsilon"]) if site["epsilon"] is not None else "nothing"
        size = f" {site['population']:,} |" if counted else ""
        lines.append(f"| {one_line(site['name'])} |{size} {spent} | {one_line(site['ledger'] or 'none')} |")
    return "\n".join([*lines, SITES_END])


def problems(data: bytes, reports: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Where the card says something else than the reports; empty if nowhere."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise VerificationFailed("README.md · must be UTF-8 text", next="Ask for the bundle again.") from None
    privacy = reports["privacy.json"]
    wrong: list[str] = []
    if not text.startswith(front_matter(privacy)):
        wrong.append("its privacy block is not that of privacy.json")
    if text.count(TABLE_START) != 1 or text.count(TABLE_END) != 1 or figures_table(reports["quality.json"]) not in text:
        wrong.append("its table of figures is not that of quality.json")
    marks = 1 if privacy.get("sites") else 0
    if (
        text.count(SITES_START) != marks
        or text.count(SITES_END) != marks
        or (marks and sites_table(privacy) not in text)
    ):
        wrong.append("its table of sites is not that of privacy.json")
    if "NOT FOR RELEASE" in text:
        wrong.append("it is marked NOT FOR RELEASE")
    if claim(privacy) not in text:
        wrong.append("it does not state the claim of privacy.json")
    quoted = [sentence for key in ("boundary", "not_promised") for sentence in privacy.get(key) or []]
    for sentence in sorted(map(one_line, quoted), key=len, reverse=True):
        text = text.replace(sentence, "")  # quoted from privacy.json, and compared by being found there
    allowed = {form(privacy.get(key)) for key in ("epsilon", "delta") for form in (bound, _yaml)}
    wrong += [f"it says {match.group(0)!r}" for match in _CLAIM.finditer(text) if match.group(1) not in allowed]
    return wrong


def one_line(value: Any) -> str:
    """Text that can break neither a table nor the page: no line feeds, bars, tags or comment marks."""
    text = " ".join(str(value).split())
    for character, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "&#124;"), ("`", "&#96;")):
        text = text.replace(character, entity)
    return text


def _yaml(value: Any) -> str:
    """A scalar that YAML 1.1 and 1.2 read as the same value."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        text = repr(value)
        mantissa, mark, exponent = text.partition("e")
        return text if not mark else f"{mantissa if '.' in mantissa else mantissa + '.0'}e{exponent}"
    text = "".join(character if character.isprintable() else " " for character in str(value))
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
