"""A federation round by round, for its report: what each round brought, what had been spent by then, who was left out and why.

Where the guarantee counts on drawing sites by secret coins, who was drawn stays out of it, and with it all that would tell:
bytes, steps, seconds, replies that were left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from typing import Any

from sfumato.federation.mechanisms import Promise
from sfumato.federation.public import Public
from sfumato.federation.rounds import is_secret
from sfumato.federation.server_state import RoundResult
from sfumato.federation.sites import Site
from sfumato.privacy import accounting
from sfumato.privacy.events import Event
from sfumato.privacy.plan import DpSgd, SiteUpdates

MOST_SITES = 20  # whose epsilon is computed for every round; of more, the one that has spent most at the end


def told(
    results: Sequence[RoundResult],
    members: Sequence[Site],
    promise: Promise,
    public: Public,
    *,
    local_steps: int,
    epsilons: Mapping[str, float | None],
    looks: Sequence[Mapping[str, Any]] = (),
) -> list[dict[str, Any]]:
    """The rounds as plain values. ``epsilon`` of a round is the largest that any site had spent after it.

    Args:
      local_steps: that a site is charged for in a round.
      epsilons: by site, at the end, as its ledger says.
      looks: lines of ``quality.jsonl``, whose steps are rounds.
    """
    spent = epsilon_after(results, members, promise, local_steps=local_steps, epsilons=epsilons)
    by_round = {look.get("step"): look for look in looks}
    hidden = is_secret(promise, public)
    found = []
    for result, of_sites in zip(results, spent, strict=True):
        look = by_round.get(result.round)
        known = {
            "round": result.round,
            "quality": None if look is None else {key: value for key, value in look.items() if key != "step"},
            "epsilon": max(of_sites.values(), default=None),
        }
        if hidden:
            found.append({**known, "discarded": "yes" if result.discarded else ""})
            continue
        values = asdict(result)
        for name in ("asked", "sites", "left_out"):
            values[name] = list(values[name])
        found.append({**values, **known, "epsilons": of_sites})
    return found


def epsilon_after(
    results: Sequence[RoundResult],
    members: Sequence[Site],
    promise: Promise,
    *,
    local_steps: int,
    epsilons: Mapping[str, float | None],
) -> list[dict[str, float]]:
    """By round, what each site's units (or the site) had spent after it, by PLD; {} without a guarantee.

    A site that says what is in its ledger is believed up to its plan; for a round that it was asked for and did not answer a
    whole round is counted, as it may have been charged. Never more than the ledger said at the end.
    """
    counted = [site for site in members if epsilons.get(site.name) is not None]
    if len(counted) > MOST_SITES:
        counted = [max(counted, key=lambda site: epsilons[site.name] or 0.0)]
    events = dict.fromkeys((site.name for site in counted), 0)
    opened: set[str] = set()  # sites that were asked for a release before the first round
    after: list[dict[str, float]] = []
    for number, result in enumerate(results, start=1):
        now: dict[str, float] = {}
        for site in counted:
            plan = promise.at_site or promise.at_server or site.plan
            if not isinstance(plan, DpSgd | SiteUpdates):
                continue
            if result.round == 0:
                opened |= {site.name} & set(result.asked)
            before = site.opening.events() if site.opening is not None and site.name in opened else ()
            most = plan.event().count
            if promise.at_site is None and promise.at_server is not None:
                count = plan.event(number).count  # the server charges every round that it opens
            elif result.round == 0:
                count = 0
            elif site.name in result.charged:
                count = result.charged[site.name]
            else:
                a_round = plan.event(1).count if isinstance(plan, SiteUpdates) else plan.events_of(local_steps)
                count = events[site.name] + a_round * (site.name in result.asked)
            events[site.name] = max(events[site.name], min(count, most))
            value = _epsilon(plan, events[site.name], before)
            now[site.name] = min(value, epsilons[site.name] or 0.0)
        after.append(now)
    return after


@cache
def _epsilon(plan: DpSgd | SiteUpdates, events: int, before: tuple[Event, ...] = ()) -> float:
    spent = [*before, *([replace(plan.event(1), count=events)] if events else [])]
    if not spent:
        return 0.0
    value = accounting.epsilon(spent, plan.delta, adjacency=plan.adjacency)
    assert value is not None  # PLD always applies
    return value


def left_out(rounds: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """[{site, code, message, rounds}]: who was not in a round, one entry for each reason, in the order in which they came up."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for result in rounds:
        for out in result.get("left_out") or []:
            entry = found.setdefault((str(out["site"]), str(out["code"])), {**out, "rounds": []})
            entry["rounds"].append(result["round"])
    return list(found.values())
