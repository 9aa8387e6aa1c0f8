"""The other runs on the same account, as the report page shows them: each alone, and all together. [shell: reads the run's ledger]"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sfumato.errors import SfumatoError
from sfumato.privacy.events import Event

_WORDS = {
    "poisson_gaussian": "sampled Gaussian",
    "truncated_poisson_gaussian": "sampled Gaussian, truncated batches",
    "gaussian": "Gaussian on all units",
    "randomized_response": "randomised response",
}


def earlier_runs(run_dir: Path, guarantee: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """runs: name, mechanism, events, epsilon and delta of each; own: this run's mechanism; together: epsilon of all at
    ``delta`` by RDP, None where they have none; how: what that figure is, or why there is none. None without other runs."""
    from sfumato.privacy import accounting
    from sfumato.privacy.ledger.account import adjacency_of, mixture

    others = [run for run in (guarantee or {}).get("composed_with") or [] if isinstance(run, dict)]
    if guarantee is None or not others:
        return None
    own = _own_events(run_dir)
    shared = {name: guarantee.get(name) for name in ("unit", "adjacency", "delta")}
    runs = [*others, {"private": True, **shared, "events": [event.to_dict() for event in own]}]
    reason = mixture(runs) or ("" if own else "this run's ledger cannot be read")
    delta = max((run["delta"] for run in runs if run.get("delta")), default=None)
    together = None
    if not reason and delta is not None:
        events = accounting.merged([Event.from_dict(event) for run in runs for event in run["events"]])
        together = accounting.epsilon(events, delta, "rdp", adjacency_of(runs))
        reason = "" if together is not None else f"RDP has no bound for their events under {shared['adjacency']}"
    return {
        "runs": [
            {
                "name": str(run.get("run")),
                "mechanism": _mechanism([Event.from_dict(event) for event in run["events"]], bool(run.get("private"))),
                "events": sum(event["count"] for event in run["events"]),
                "epsilon": run.get("epsilon"),
                "delta": run.get("delta"),
            }
            for run in others
        ],
        "own": _mechanism(own, True),
        "together": together,
        "delta": delta,
        "how": reason or "by RDP, as if all plans had been fixed beforehand",
    }


def _mechanism(events: Sequence[Event], private: bool) -> str:
    if not private:
        return "none: not private"
    return "; ".join(_one(event) for event in events) or "nothing yet"


def _one(event: Event) -> str:
    if event.mechanism == "randomized_response":
        return f"{_WORDS[event.mechanism]}, {event.categories} categories"
    rate = f"q = {event.sampling_rate:.3g}, " if event.sampling_rate < 1 else ""
    return f"{_WORDS.get(event.mechanism, event.mechanism)}, {rate}σ = {event.noise_multiplier:.3g}"


def _own_events(run_dir: Path) -> list[Event]:
    from sfumato.privacy import ledger

    path = run_dir / "ledger.db"
    if not path.is_file():
        return []
    try:
        return list(ledger.events_of_jsonl(ledger.export_jsonl(path)))
    except SfumatoError:
        return []  # said on the page: there is no figure then
