"""What may leave a run: each report reduced to what is public, charged, or post-processing of such.

A run's own reports say everything. A bundle and a public report are made from the values of this page, and ``verify``
refuses a bundle that says more. Known things pass; what is not known here stays in the run, and is named as staying.

Held back, and why:

- figures marked internal: they were measured on private records outside the guarantee;
- baselines but those of public records and of the released model: a twin without privacy is made of private records;
- free remarks of whole reports: nobody states what covers them;
- outcomes of attacks and the audit's verdict: they are computed from who was a member;
- speed in units a second: with the seconds it is the number of units that were really drawn;
- entries of the data card that count or describe private records, and paths of this machine.
"""

import math
from collections.abc import Mapping
from typing import Any

PUBLIC_BASELINES = (
    "real held-out", "shuffled captions", "shuffled conditions", "chance", "public letter model", "public start alone",
)  # fmt: skip
LEAVES = ("public", "charged", "post-processing")
FIGURE_KEYS = (
    "name", "value", "low", "high", "better", "baseline", "extractor", "samples", "covered_by", "note", "direction",
)  # fmt: skip

# Entries of a data card that state how data was declared or made, never what private records turned out to hold.
CARD_KEYS = (
    "name",
    "what",
    "phantom",
    "origin",
    "licence",
    "unit",
    "unit_column",
    "languages",
    "image",
    "facts",
    "public_part",
    "note",
    "pixels_are_the_published_ones",
)
CARD_TABLES = ("image", "facts", "public_part")  # of sizes, of labels, and of what is public

EXISTENCE = (
    "The outcomes of these attacks, and the verdict, are computed from who was in the training data and are not paid "
    "for by epsilon; they stay in the run. One bit does leave: a bundle exists only if the gate found no VIOLATION. "
    "That bit is not covered by the guarantee."
)


def quality(report: Mapping[str, Any]) -> dict[str, Any]:
    """A quality report (``reports.to_dict`` form) without what must stay. ``held_back`` names it."""
    kept: list[dict[str, Any]] = []
    held: list[str] = []
    for figure in report.get("figures", []):
        name = str(figure.get("name", ""))
        if figure.get("covered_by") not in LEAVES:
            held.append(name)
            continue
        clean = {key: figure[key] for key in FIGURE_KEYS if key in figure}
        baseline = clean.get("baseline") or {}
        clean["baseline"] = {key: baseline[key] for key in PUBLIC_BASELINES if key in baseline}
        for key in sorted(set(baseline) - set(PUBLIC_BASELINES)):
            held.append(f"{name}: {key}")
            clean["note"] = ""  # a remark beside an internal baseline may speak of it
        kept.append(clean)
    return {"figures": kept, "held_back": held}


def audit(report: Mapping[str, Any] | None, recipe: Mapping[str, Any], guarantee: Mapping[str, Any]) -> dict[str, Any]:
    """What was tested and how, and the formal claim that it was held against; no outcome."""
    settings = recipe.get("audit") or {}
    attacks = [] if report is None else report.get("attacks", [])
    return {
        "tested": [
            {
                "attack": str(attack.get("name", "")),
                "confidence": attack.get("confidence"),
                "members_asked": settings.get("members"),
                "blind_baseline": attack.get("blind_baseline") is not None,
            }
            for attack in attacks
        ],
        "positive_control": report is not None and report.get("positive_control") is not None,
        "claim": {key: guarantee.get(key) for key in ("definition", "epsilon", "delta", "unit", "adjacency")},
        "outcomes": "stay in the run",
        "why": EXISTENCE,
        "covered_by": "public",
    }


def cost(report: Mapping[str, Any], recipe: Mapping[str, Any], *, federated: bool = False) -> dict[str, Any]:
    """What the run cost: from the plan where the plan says it, else rounded to two digits.

    Args: federated: steps are of all sites together, each of a batch of its own, so how many units that were is not said.
    """
    training = recipe.get("training") or {}
    steps, batch = report.get("steps"), training.get("expected_batch_size")
    return {
        "steps": steps,
        "expected_units_processed": steps * batch
        if isinstance(steps, int) and isinstance(batch, int) and not federated
        else None,
        "parameters": report.get("parameters"),
        "bytes_sent": report.get("bytes_sent"),
        "machine": report.get("machine"),
        "seconds": coarse(report.get("seconds")),
        "processor_seconds": coarse(report.get("processor_seconds")),
        "peak_bytes": coarse(report.get("peak_bytes")),
        "covered_by": "public",
        "note": "Time and memory are properties of the plan and the machine, rounded to two significant digits so that "
        "nothing finer leaves. A guarantee of differential privacy does not speak of timing.",
    }


def data_card(card: Mapping[str, Any]) -> dict[str, Any]:
    """The declared part of a data card; the names of the other entries."""
    internal = card.get("internal_fields") or ()
    kept = {key: card[key] for key in CARD_KEYS if key in card and key not in internal and _declared(key, card[key])}
    return {**kept, "held_back": sorted(str(key) for key in card if key not in kept and key != "internal_fields")}


def recipe(values: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe without paths of this machine: ``null`` where none was set, ``"(local)"`` where one was."""
    clean = {section: dict(entries) if isinstance(entries, Mapping) else entries for section, entries in values.items()}
    for section, key in (("data", "path"), ("privacy", "account")):
        entries = clean.get(section)
        if isinstance(entries, dict) and entries.get(key) is not None:
            entries[key] = "(local)"
    start = clean.get("public_start")
    if isinstance(start, dict) and isinstance(start.get("data"), Mapping):
        clean["public_start"] = {**start, "data": _without_paths(start["data"])}
    if isinstance(clean.get("model"), dict):
        clean["model"] = _without_paths(clean["model"])
    return clean


PUBLIC_START = "Declared public: the weights that the private steps began at were trained on "


def says_public_start(sentence: str) -> bool:
    """Whether a claim's sentence names the public records that the weights began with."""
    return sentence.startswith(PUBLIC_START)


def _without_paths(values: Any) -> Any:
    """Folders and files of public encoders, wherever in a model they are named."""
    if not isinstance(values, Mapping):
        return values
    local = {key for key in ("folder", "path") if isinstance(values.get(key), str)}
    local |= {"name"} if "/" in str(values.get("name", "")) else set()
    return {key: "(local)" if key in local else _without_paths(value) for key, value in values.items()}


def problems(bundle: Mapping[str, Any]) -> list[str]:
    """Why the JSON reports of a bundle (by file name) say more than may leave; empty if they do not."""
    found: list[str] = []
    report = bundle["quality.json"]
    figures = report.get("figures")
    if not isinstance(figures, list) or not all(isinstance(figure, dict) for figure in figures):
        return ["quality.json: figures must be a list of objects"]
    for figure in figures:
        name = str(figure.get("name"))[:80]
        if figure.get("covered_by") not in LEAVES:
            found.append(f"quality.json: {name} is covered by {str(figure.get('covered_by'))[:40]!r}")
        if set(figure) - set(FIGURE_KEYS):
            found.append(f"quality.json: {name} has unknown entries")
        baseline = figure.get("baseline", {})
        if not isinstance(baseline, dict) or set(baseline) - set(PUBLIC_BASELINES):
            found.append(f"quality.json: {name} has a baseline that may not leave")
        elif not all(_number(value) for value in (figure.get("value"), *baseline.values())):
            found.append(f"quality.json: {name} must be a number, and so must its baselines")
    found += _unknown("quality.json", report, ("figures", "held_back"))
    found += _unknown("audit.json", bundle["audit.json"], tuple(audit(None, {}, {})))
    tested = bundle["audit.json"].get("tested")
    known = {"attack", "confidence", "members_asked", "blind_baseline"}
    if not isinstance(tested, list) or not all(isinstance(entry, dict) and set(entry) <= known for entry in tested):
        found.append("audit.json: tested must name attacks, and no outcomes")
    elif not all(isinstance(entry.get("blind_baseline"), bool) for entry in tested):
        found.append("audit.json: blind_baseline must say whether there was one, not its value")
    found += _unknown("cost.json", bundle["cost.json"], tuple(cost({}, {})))
    card = bundle["provenance.json"].get("data_card")
    if not isinstance(card, dict):
        found.append("provenance.json: data_card must be an object")
    else:
        found += _unknown("provenance.json: data_card", card, (*CARD_KEYS, "held_back"))
        found += [
            f"provenance.json: data_card.{key} is not a declared value"
            for key in CARD_KEYS
            if not _declared(key, card.get(key))
        ]
    for name in ("quality.json", "audit.json", "cost.json", "provenance.json", "privacy.json"):
        found += [f"{name}: {where} is internal" for where in _internal(bundle[name], "")]
    return found


def coarse(value: Any) -> float | None:
    """Two significant digits."""
    if not _number(value):
        return None
    return float(f"{value:.2g}")


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _declared(key: str, value: Any) -> bool:
    """A word, a number, a list of words; tables only where they cannot have been counted from private records."""
    if isinstance(value, Mapping):
        return key in CARD_TABLES and all(_declared("", inner) for inner in value.values())
    if isinstance(value, (list, tuple)):
        return all(isinstance(item, str) for item in value)
    return value is None or isinstance(value, (str, bool, int, float))


def _unknown(name: str, value: Mapping[str, Any], known: tuple[str, ...]) -> list[str]:
    return [f"{name}: {key[:80]!r} is not known to be public" for key in value if key not in known]


def _internal(value: Any, where: str) -> list[str]:
    """Paths of objects that say covered_by: internal, at any depth."""
    if isinstance(value, dict):
        here = [where or "it"] if value.get("covered_by") == "internal" else []
        return here + [path for key, inner in value.items() for path in _internal(inner, f"{where}.{key[:40]}")]
    if isinstance(value, list):
        return [path for index, inner in enumerate(value) for path in _internal(inner, f"{where}[{index}]")]
    return []
