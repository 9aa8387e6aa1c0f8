"""Whether a run may be released, and every reason why not."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sfumato.errors import SfumatoError, UsageError
from sfumato.release import ledgers, provenance
from sfumato.release.settings import ReleaseSettings

SLACK = 1e-6  # of epsilon, as in verify


def check(run_dir: Path, settings: ReleaseSettings) -> tuple[bool, list[dict[str, str]]]:
    """Approves a run, or refuses it with all reasons: dicts with code, message, next. Approved means no reason.

    An audit that is INCONCLUSIVE does not refuse: it proves neither side. One that found a VIOLATION does.
    """
    run_dir = Path(run_dir)
    reasons: list[dict[str, str]] = []
    try:
        _check_run(run_dir, settings, reasons)
    except SfumatoError as error:  # an unreadable file of the run is a reason too
        reasons.append(error.as_dict())
    return not reasons, reasons


def _check_run(run_dir: Path, settings: ReleaseSettings, reasons: list[dict[str, str]]) -> None:
    def refuse(code: str, message: str, next: str) -> None:
        reasons.append({"code": code, "message": message, "next": next})

    claimed = provenance.read_json(run_dir / "reports" / "privacy.json") or {}
    if (run_dir / "reports" / "federation.json").is_file() and claimed.get("definition") != "none":
        _check_federated(claimed, provenance.read_recipe(run_dir), refuse)
    if not (run_dir / "resolved.yaml").is_file():
        refuse("no_recipe", "resolved.yaml · is not there", "Release from the folder that `sfumato train` wrote.")
    for report, needed, how in (
        ("privacy", True, "Finish the training of this run."),
        ("cost", True, "Finish the training of this run."),
        (
            "quality",
            settings.require_quality,
            "Run `sfumato evaluate` on this run, or set release.require_quality: false.",
        ),
        ("audit", settings.require_audit, "Run `sfumato audit` on this run, or set release.require_audit: false."),
    ):
        if needed and not (run_dir / "reports" / f"{report}.json").is_file():
            refuse(f"no_{report}_report", f"reports/{report}.json · is not there", how)
    audit = provenance.read_json(run_dir / "reports" / "audit.json")
    if audit is not None and audit.get("verdict") not in ("CONSISTENT", "INCONCLUSIVE"):
        refuse(
            "audit_violation",
            f"audit = {audit.get('verdict')} · the measured leakage is above the claim",
            "Do not release this model: either the claim or the code is wrong. See reports/audit.json.",
        )
    _check_model(run_dir, refuse)
    privacy = provenance.read_json(run_dir / "reports" / "privacy.json")
    if privacy is not None:
        _check_claim(run_dir, privacy, settings, refuse)


def _check_model(run_dir: Path, refuse: Any) -> None:
    found, unsafe = provenance.model_files(run_dir / "model")
    if not any(shapes is not None for shapes in found.values()):
        refuse("no_model", "model/ · has no safetensors file", "Finish the training of this run.")
        return
    if unsafe:
        refuse(
            "unsafe_file",
            f"model/ · may not hold {', '.join(unsafe[:5])}",
            "Save weights as safetensors and settings as JSON; no links.",
        )
    wrong = provenance.taint_problems(provenance.read_json(run_dir / "taint.json"), found)
    if wrong:
        more = f" (and {len(wrong) - 5} more)" if len(wrong) > 5 else ""
        refuse(
            "taint_incomplete",
            f"taint.json · {'; '.join(wrong[:5])}{more}",
            "Say of each tensor whether it is dp-sgd, released, public or constant; what is none of these may not leave.",
        )


def _check_claim(run_dir: Path, privacy: dict[str, Any], settings: ReleaseSettings, refuse: Any) -> None:
    if privacy.get("not_for_release"):
        refuse("not_for_release", f"NOT FOR RELEASE · {privacy['not_for_release']}", "Train again without it.")
    epsilon, delta = privacy.get("epsilon"), privacy.get("delta")
    if (
        privacy.get("definition") != "(epsilon, delta)-DP"
        or not isinstance(epsilon, (int, float))
        or not math.isfinite(epsilon)
    ):
        refuse("not_private", "privacy = none · this run has no guarantee", "Train with privacy.mechanism: dp_sgd.")
        return
    if epsilon > settings.max_epsilon + SLACK:
        refuse(
            "epsilon_above_policy",
            f"epsilon = {epsilon:.4g} · the policy allows {settings.max_epsilon:g}",
            "Train with a smaller privacy.epsilon, or let whoever owns the policy raise release.max_epsilon.",
        )
    for claim, path in _claims(run_dir, privacy):
        _check_ledger(path, claim, delta, refuse)


def _check_federated(privacy: dict[str, Any], recipe: dict[str, Any], refuse: Any) -> None:
    sites = privacy.get("sites") or []
    if ((recipe.get("model") or {}).get("objective") or {}).get("kind") == "prompts":
        refuse(
            "prompts",
            "model.objective.kind = prompts · a prompt is of no use without its encoders, and no attack on it is known here",
            "Keep the ledgers with the run.",
        )
    elif lacking := [site["name"] for site in sites if site["epsilon"] is not None and site["ledger"] is None]:
        refuse(
            "no_ledger",
            f"sites = {', '.join(lacking[:5])} · gave no ledger: what they charged is known to them only",
            "Ask their administrators (may_say in the policy must have ledger), and federate again with --resume.",
        )
    elif (
        not sites and (privacy.get("mechanism") or {}).get("name") != "site_updates"
    ):  # of which the server has the one ledger
        refuse(
            "no_sites",
            "reports/privacy.json · says of no site what it has spent: it was written by an older version",
            "Train it again, or keep the sites' ledgers with the run.",
        )


def ledgers_of(run_dir: Path, privacy: dict[str, Any]) -> dict[str, Path]:
    """Where a run has the ledgers that its bundle is to hold, by their names there: one, or that of every site."""
    sites = [site["ledger"] for site in privacy.get("sites") or [] if site["ledger"] is not None]
    if not sites:
        own = run_dir / "ledger.db"
        return {
            ledgers.ONE: own if own.is_file() else run_dir / "server" / "ledger.db"
        }  # of a server that adds the noise
    own = {site["ledger"] for site in privacy["sites"] if site.get("key") is not None}
    return {
        name: run_dir / "sites" / Path(name).stem / ("ledger.json" if name in own else "ledger.db") for name in sites
    }


def ledger_text(path: Path, sign: Callable[[bytes], dict[str, str]] | None = None) -> str:
    """A ledger as a bundle has it: of this machine exported, and signed now; of a site elsewhere as it came."""
    from sfumato.privacy import ledger

    if path.suffix == ".db":
        return ledger.export_jsonl(path, sign=sign)
    value = (provenance.read_json(path) or {}).get("ledger")
    if not isinstance(value, str):
        raise UsageError(f"{path} · holds no ledger", next="Federate again with --resume.")
    return value


def _claims(run_dir: Path, privacy: dict[str, Any]) -> list[tuple[dict[str, Any], Path]]:
    """What is claimed of each ledger: epsilon and mechanism."""
    places = ledgers_of(run_dir, privacy)
    sites = [site for site in privacy.get("sites") or [] if site["ledger"] is not None]
    return [(site, places[site["ledger"]]) for site in sites] or [(privacy, places[ledgers.ONE])]


def _shown(path: Path) -> dict[str, Any]:
    """Of a ledger whether its chain is whole, delta and epsilon."""
    from sfumato.privacy import accounting, ledger
    from sfumato.privacy.private_plan import PrivatePlan

    if path.suffix == ".db":
        return ledger.show(path)
    try:
        exported = ledger.read_jsonl(ledger_text(path))
    except SfumatoError:
        return {"valid": False}
    if not isinstance(exported.plan, PrivatePlan) or not exported.events:
        return {"valid": True}
    value = accounting.epsilon(exported.events, exported.plan.delta, adjacency=exported.plan.adjacency)
    return {"valid": True, "delta": exported.plan.delta, "epsilon": value}


def _check_ledger(path: Path, claim: dict[str, Any], delta: float | None, refuse: Any) -> None:
    of = f" of site {claim['name']}" if "name" in claim else ""
    epsilon = claim["epsilon"]
    if not path.is_file():
        refuse("no_ledger", f"ledger.db{of} · is not there", "A run without its ledger cannot show what it spent.")
        return
    spent = _shown(path)
    if not spent.get("valid"):
        refuse(
            "ledger_invalid",
            f"ledger.db{of} · its chain of entries is broken",
            "Do not release: find out who changed the ledger.",
        )
        return
    if spent.get("delta") is not None and spent["delta"] != delta:
        refuse(
            "ledger_delta",
            f"delta = {delta} · the ledger{of} was planned for {spent['delta']}",
            "Write the privacy report again.",
        )
    recomputed = spent.get("epsilon")
    planned = (claim.get("mechanism") or {}).get("target_epsilon")
    if recomputed is None or not math.isfinite(recomputed):
        refuse("ledger_empty", f"ledger.db{of} · gives no finite epsilon", "Finish the training of this run.")
        return
    if recomputed > epsilon + SLACK:
        refuse(
            "ledger_above_claim",
            f"epsilon = {epsilon:.6g} · the events of the ledger{of} give {recomputed:.6g}",
            "Write the privacy report again from the ledger.",
        )
    if isinstance(planned, (int, float)) and recomputed > planned + SLACK:
        refuse(
            "ledger_above_plan",
            f"epsilon = {recomputed:.6g} · the plan{of} allowed {planned:.6g}",
            "Do not release: the run passed its budget.",
        )
