"""The report: one HTML page without network, scripts or fonts of its own, and the same values as JSON.

Both are views of a run's reports. The internal version shows everything; the public one what ``boundary`` lets through.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sfumato.errors import PrivacyRefused, UsageError
from sfumato.release import boundary, charts, exhibits, provenance, templates, wording
from sfumato.release.earlier import earlier_runs
from sfumato.release.settings import ReleaseSettings

POINTS = 10  # of the trajectory when it is computed from the plan

MISSING = {
    "privacy": "What this run guarantees was not written yet: finish the training with `sfumato train --resume`.",
    "quality": "Quality was not measured: run `sfumato evaluate` on this run.",
    "audit": "No attack was run: run `sfumato audit` on this run.",
    "cost": "Cost was not written yet: finish the training with `sfumato train --resume`.",
}


def as_json(run_dir: Path | str, *, public: bool = False) -> dict[str, Any]:
    """Every value of the page.

    Raises: UsageError where ``run_dir`` is not a run; PrivacyRefused for the public version of a run without guarantee,
      whose samples and figures nothing covers.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UsageError(f"run = {run_dir} · must be the folder of a run", next="See `sfumato runs`.")
    everything = provenance.collect(run_dir)
    reports = {name: provenance.read_json(run_dir / "reports" / f"{name}.json") for name in MISSING}
    recipe, guarantee = everything["recipe"], reports["privacy"]
    private = _is_private(guarantee, recipe)
    marker = str((guarantee or {}).get("not_for_release") or "")
    if public and (not private or guarantee is None or marker):
        raise PrivacyRefused(
            f"public report of {run_dir.name} · {marker or 'nothing covers what a run without guarantee shows'}",
            next="Read the internal report (without --public), or train with privacy.mechanism: dp_sgd.",
            code="not_private" if not marker else "not_for_release",
        )
    if public and (reports["audit"] or {}).get("verdict") == "VIOLATION":
        raise PrivacyRefused(
            f"public report of {run_dir.name} · the audit found more leakage than the claim allows",
            next="Publish nothing of this run: either the claim or the code is wrong. See reports/audit.json.",
            code="audit_violation",
        )
    federation = provenance.read_json(run_dir / "reports" / "federation.json")
    if public:
        recipe = boundary.recipe(recipe)
        everything = {**everything, "recipe": recipe, "data_card": boundary.data_card(everything["data_card"])}
        reports["quality"] = None if reports["quality"] is None else boundary.quality(reports["quality"])
        reports["audit"] = (
            None if reports["audit"] is None else boundary.audit(reports["audit"], recipe, guarantee or {})
        )
        reports["cost"] = (
            None
            if reports["cost"] is None
            else boundary.cost(reports["cost"], recipe, federated=federation is not None)
        )
        federation = None if federation is None else _public_federation(federation)
    return {
        "run": f"{run_dir.resolve().parent.name}/{run_dir.resolve().name}",
        "name": str(recipe.get("name") or run_dir.name),
        "public": public,
        "private": private,
        "not_for_release": marker,
        "guarantee": guarantee,
        "trajectory": _trajectory(run_dir, guarantee, public=public) if private else [],
        "quality": reports["quality"],
        "audit": reports["audit"],
        "cost": reports["cost"],
        "federation": federation,
        "pictures": _pictures(run_dir),
        "samples": exhibits.directions(run_dir),
        "looks": _looks(run_dir, public=public),
        "provenance": everything,
        "missing": {name: text for name, text in MISSING.items() if reports[name] is None},
    }


def render(run_dir: Path | str, *, public: bool = False) -> str:
    """The page as HTML."""
    run_dir = Path(run_dir)
    values = as_json(run_dir, public=public)
    return templates.fill(
        "report.html",
        **values,
        words=wording,
        bar=charts.bar,
        growth=None if values["guarantee"] is None else _growth(values["guarantee"].get("epsilon")),
        charts=_charts(values),
        quality_groups=_quality_groups(values["quality"]),
        images=exhibits.embedded(run_dir, values["samples"]),
        titles=exhibits.TITLES,
        settings=_flat(values["provenance"]["recipe"]),
        posterior=_posterior(values["guarantee"]),
        detection=_detection(values["guarantee"]),
        earlier=earlier_runs(run_dir, values["guarantee"]) if values["private"] else None,
        max_epsilon=_policy(values["provenance"]["recipe"]),
    )


def _is_private(guarantee: Mapping[str, Any] | None, recipe: Mapping[str, Any]) -> bool:
    if guarantee is not None:
        return guarantee.get("definition") == "(epsilon, delta)-DP" and isinstance(
            guarantee.get("epsilon"), (int, float)
        )
    return (recipe.get("privacy") or {}).get("mechanism", "dp_sgd") != "none"


def _policy(recipe: Mapping[str, Any]) -> float:
    return float((recipe.get("release") or {}).get("max_epsilon") or ReleaseSettings().max_epsilon)


def _trajectory(run_dir: Path, guarantee: Mapping[str, Any] | None, *, public: bool) -> list[list[float]]:
    """[[step, epsilon], ...]: as logged; in the public version, and without a log, computed from the plan alone."""
    logged = [] if public else _logged(run_dir / "metrics.jsonl")
    if logged or guarantee is None:
        return logged
    *earlier, mechanism = _stages(guarantee)
    delta = guarantee.get("delta")
    steps, bands = mechanism.get("steps_spent"), mechanism.get("bands", 1)
    rate, noise = mechanism.get("sampling_rate"), mechanism.get("noise_multiplier")
    units = _units(guarantee)
    if rate is None and mechanism.get("expected_batch_size") and units:
        rate = mechanism["expected_batch_size"] / units
    if not (isinstance(steps, int) and steps > 0 and delta and rate and noise):
        return []  # released at once, not step by step
    from sfumato.privacy import accounting

    largest = mechanism.get("largest_batch")
    one = accounting.Event(
        mechanism="poisson_gaussian" if largest is None else "truncated_poisson_gaussian",
        sampling_rate=float(bands * rate),
        noise_multiplier=float(noise),
        population=None if largest is None else units,
        largest_batch=largest,
    )
    if any(stage.get("name") not in ("estimate", "mean_embedding") for stage in earlier):
        return []
    before = [
        accounting.Event(
            mechanism="gaussian" if stage.get("sampling_rate", 1) == 1 else "poisson_gaussian",
            sampling_rate=float(stage.get("sampling_rate", 1)),
            noise_multiplier=float(stage["noise_multiplier"]),
        )
        for stage in earlier
    ]
    points = accounting.trajectory(
        lambda step: [*before, replace(one, count=-(-step // bands))],
        steps,
        delta,
        guarantee["adjacency"],
        points=POINTS,
    )
    return [[step, epsilon] for step, epsilon in points if math.isfinite(epsilon)]


def _units(guarantee: Mapping[str, Any]) -> int | None:
    """Of how many units the claim's mechanism drew: of a federation those of the site that has spent most."""
    sites = [site for site in guarantee.get("sites") or [] if site.get("epsilon") == guarantee.get("epsilon")]
    return sites[0]["population"] if sites else guarantee.get("population")


def _stages(guarantee: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The mechanisms of a claim, in their order; the last is what trains, where anything trains in steps."""
    mechanism = guarantee.get("mechanism") or {}
    return list(mechanism.get("stages") or [mechanism])


def _logged(path: Path) -> list[list[float]]:
    """Step and epsilon of a log; a torn last line (a killed run) is left out, as it is when a run resumes."""
    points: dict[int, float] = {}
    if not path.is_file():
        return []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        step, epsilon = (entry.get("step"), entry.get("epsilon")) if isinstance(entry, dict) else (None, None)
        if isinstance(step, int) and isinstance(epsilon, (int, float)) and math.isfinite(epsilon):
            points[step] = max(float(epsilon), points.get(step, 0.0))  # after a resume a step may be logged twice
    return [[step, points[step]] for step in sorted(points)]


def _public_federation(report: Mapping[str, Any]) -> dict[str, Any]:
    """Sites' claims and sizes are public at every site; what the rounds measured, and words of a refusal, are not."""
    keys = ("name", "epsilon", "delta", "rounds", "units", "population")
    sites = [{key: site[key] for key in keys if key in site} for site in report.get("sites") or []]
    for site, full in zip(sites, report.get("sites") or [], strict=True):
        site["refused"] = _length(full.get("refused"))
    said = {key: report[key] for key in ("unit", "trust") if key in report}
    rounds = report.get("rounds")
    trained = [one for one in rounds if one.get("round") != 0] if isinstance(rounds, list) else rounds
    return {**said, "sites": sites, "rounds": _length(trained)}


def _length(value: Any) -> int:
    """How many: of a list its length, of a number itself."""
    return len(value) if isinstance(value, (list, tuple)) else int(value or 0)


def _pictures(run_dir: Path) -> dict[str, Any]:
    """Names of the grids of text→image, and their captions (``samples`` has every direction)."""
    first = next((entry for entry in exhibits.directions(run_dir) if not entry["slug"]), None)
    if first is None:
        return {"final": None, "real": None, "steps": [], "captions": []}
    part = first["parts"][0]
    return {"final": part["final"], "real": part["real"], "steps": part["steps"], "captions": first["texts"]}


def _looks(run_dir: Path, *, public: bool) -> list[list[float]]:
    """[[step, loss on public records], ...] while it trained; the public page has them where the guarantee covers them."""
    points: dict[int, float] = {}
    path = run_dir / "quality.jsonl"
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            look = json.loads(line)
        except ValueError:
            continue  # torn by a kill
        if not isinstance(look, dict) or (public and look.get("covered_by") not in boundary.LEAVES):
            continue
        step, loss = look.get("step"), look.get("public_loss")
        if isinstance(step, int) and isinstance(loss, (int, float)) and math.isfinite(loss):
            points[step] = float(loss)
    return [[step, points[step]] for step in sorted(points)]


def _charts(values: Mapping[str, Any]) -> dict[str, str]:
    """The SVG charts that the run has values for, by name."""
    drawn: dict[str, str] = {}
    guarantee, audit = values["guarantee"] or {}, values["audit"] or {}
    mechanism = guarantee.get("mechanism") or {}
    target = mechanism.get("target_epsilon")
    if values["trajectory"]:
        drawn["trajectory"] = charts.trajectory(
            values["trajectory"],
            budget=target if isinstance(target, (int, float)) else None,
            planned_steps=_stages(guarantee)[-1].get("steps_planned"),
        )
    curve = [point for point in guarantee.get("curve") or [] if point[1] is not None and math.isfinite(point[1])]
    if len(curve) > 1 and values["private"]:
        drawn["curve"] = charts.curve(
            curve, at=(guarantee["delta"], guarantee["epsilon"]) if guarantee.get("delta") else None
        )
    if len(values["looks"]) > 2:
        drawn["looks"] = charts.looks(values["looks"], unit="round" if values["federation"] else "step")
    balance = _balance(values["federation"])
    if balance is not None:
        drawn["balance"] = balance
    if not values["public"]:
        control = audit.get("positive_control")
        attacks = [*audit.get("attacks", []), *([control] if control else [])]
        series = {
            f"{index} {attack['name']}": attack["roc"] for index, attack in enumerate(attacks) if attack.get("roc")
        }
        if series:
            drawn["roc"] = charts.roc(
                series, floor=1 / max(2, max(attack.get("nonmembers") or 2 for attack in attacks))
            )
    return drawn


BALANCED = {
    "kappa_mean": "κ, as asked against read",
    "accuracy_local": "accuracy on the sites' own classes",
    "public_loss": "loss on public records",
}


def _balance(report: Mapping[str, Any] | None) -> str | None:
    """Quality over epsilon (over rounds where there is none), with bytes above (rounds where those are not told)."""
    rounds = (report or {}).get("rounds")
    if not isinstance(rounds, list):
        return None
    known = {name for r in rounds for name, value in (r.get("quality") or {}).items() if value is not None}
    name = next((name for name in BALANCED if name in known), "public_loss")
    agreement = name == "kappa_mean"
    private = all(isinstance(r.get("epsilon"), (int, float)) and math.isfinite(r["epsilon"]) for r in rounds)
    weighed = all(isinstance(r.get("bytes_up"), int) and isinstance(r.get("bytes_down"), int) for r in rounds)
    sent, points = 0, []
    for r in rounds:
        sent += r["bytes_up"] + r["bytes_down"] if weighed else 0
        look = r.get("quality") or {}
        if look.get(name) is None:
            continue
        ends = (look.get("kappa_low"), look.get("kappa_high")) if agreement else (None, None)
        points.append(
            (r["epsilon"] if private else r["round"], look[name], *ends, sent / 1e6 if weighed else r["round"])
        )
    if len(points) < 2:
        return None
    return charts.balance(
        points,
        quality=BALANCED[name],
        privacy="privacy: ε spent so far" if private else "round",
        cost="cost: MB sent so far, both ways" if weighed else "round",
    )


AGREES = re.compile(r"agree|kappa|retriev|recall|R@|^accuracy|heart rate|ROUGE", re.IGNORECASE)
COLUMNS = ("real held-out", "shuffled captions", "shuffled conditions", "public start alone", "non-private twin")
SAYS = {  # what an agreement is about, by direction
    "text→image": "Does the picture say what its text says?",
    "image→text": "Does the text say what its picture shows?",
    "text→audio": "Does the sound say what its text says?",
    "audio→text": "Does the text say what its sound tells?",
    "local classes": "Are pictures told apart by what their own site asks?",
    "neighbour classes": "And by what the other sites ask?",
}


def _quality_groups(report: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Figures with their drawn rows, by direction; of each those first that agree with what was told."""
    figures = (report or {}).get("figures", [])
    several = len({figure.get("direction") for figure in figures}) > 1
    groups: dict[tuple[str, int], dict[str, Any]] = {}
    for figure in figures:
        direction = str(figure.get("direction") or "text→image")
        name = str(figure.get("name", "")).removeprefix(f"{direction}: ")
        wanted = direction.rpartition("→")[2]
        what = {"image": "pictures", "text": "texts", "audio": "sounds"}.get(wanted, "records")
        kind, title = (
            1,
            f"Do the {what} look like real ones?" if wanted == "image" else f"Are the {what} like real ones?",
        )
        if name.startswith("train on synthetic"):
            kind, title = 2, f"Can one learn from the {what}?"
        elif AGREES.search(name):
            kind, title = 0, SAYS.get(direction, "Does it say what it was told?")
        baseline = figure.get("baseline") or {}
        ends = (v for v in (figure.get("low"), figure.get("high")) if v is not None)
        scale = _scale([figure["value"], *baseline.values(), *ends])
        drawn = charts.row(figure["value"], figure.get("low"), figure.get("high"), baseline, scale)
        group = groups.setdefault(
            (direction, kind), {"title": f"{direction}: {title}" if several else title, "figures": []}
        )
        shuffled = baseline.get("shuffled captions", baseline.get("shuffled conditions"))
        entry = {"name": name, "baseline": baseline, "shuffled": shuffled, "drawn": drawn, "scale": scale}
        group["figures"].append({**figure, **entry})
        group["real"] = group.get("real", False) or "real held-out" in baseline
        group["guessed"] = group.get("guessed", False) or shuffled is not None
        group["more"] = list(dict.fromkeys([*group.get("more", []), *(b for b in baseline if b not in COLUMNS)]))
    order = list(dict.fromkeys(direction for direction, _ in groups))
    return [group for _, group in sorted(groups.items(), key=lambda item: (order.index(item[0][0]), item[0][1]))]


def _scale(numbers: Sequence[float]) -> tuple[float, float]:
    """0 to 1 where that fits (a little below 0 for kappa), else 0 to a bit more than the largest."""
    low, high = min(numbers), max(numbers)
    if high <= 1:
        return (0.0, 1.0) if low >= 0 else (max(-1.0, low * 1.1), 1.0)
    return (min(0.0, low * 1.1), high * 1.08)


def _flat(recipe: Mapping[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """The recipe as rows by section, nested keys joined by dots."""

    def rows(value: Any, path: str) -> list[tuple[str, str]]:
        if isinstance(value, Mapping):
            return [row for key, inner in value.items() for row in rows(inner, f"{path}.{key}" if path else str(key))]
        return [(path, ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else wording.number(value))]

    return {section: rows(value, "") for section, value in recipe.items() if isinstance(value, Mapping)}


def _growth(epsilon: Any) -> str | None:
    """e^epsilon in digits, while it can be read; rounded up."""
    return wording.bound(math.exp(epsilon)) if isinstance(epsilon, (int, float)) and epsilon < 9.2 else None


def _posterior(guarantee: Mapping[str, Any] | None) -> float | None:
    """The largest belief in membership that can grow from one half under pure epsilon; delta is said beside it."""
    epsilon = (guarantee or {}).get("epsilon")
    return None if not isinstance(epsilon, (int, float)) else 1 / (1 + math.exp(-epsilon))


def _detection(guarantee: Mapping[str, Any] | None) -> list[tuple[float, float]]:
    """[(false positive rate, largest true positive rate of any attack)], over all (delta, epsilon) that are claimed.

    TPR <= min(e^epsilon FPR + delta, 1 - e^-epsilon (1 - delta - FPR)). Source: Kairouz et al. 2015, Theorem 2.1.
    """
    points = [*((guarantee or {}).get("curve") or [])]
    if guarantee and isinstance(guarantee.get("epsilon"), (int, float)) and guarantee.get("delta"):
        points.append([guarantee["delta"], guarantee["epsilon"]])
    points = [point for point in points if point[1] is not None and math.isfinite(point[1])]
    if not points:
        return []

    def largest(rate: float) -> float:
        return min(min(math.exp(min(50.0, e)) * rate + d, 1 - math.exp(-e) * (1 - d - rate)) for d, e in points)

    return [(rate, min(1.0, largest(rate))) for rate in (0.01, 0.001)]
