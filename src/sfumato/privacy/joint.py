"""What a federation may claim: one sentence that is true of every person of every site, from what each site has spent.

The sites hold different units, so for a unit of site k the run is (epsilon_k, delta_k)-private, by the events of its own ledger. All
plans have one delta (``federation.site_plans``), and at that delta the largest epsilon_k holds for everybody; so does, at every other
delta, the largest there. A unit that is at several sites pays their composition, which the claim says.

Without one delta there is no such sentence but (max epsilon_k, max delta_k); the largest epsilon with *its* delta would be wrong of
every site whose delta is larger. So sites of different deltas, units or adjacencies are refused here.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sfumato.errors import UsageError
from sfumato.privacy import accounting
from sfumato.privacy.events import Event
from sfumato.privacy.guarantee import guarantee
from sfumato.privacy.plan import Composition, DpSgd, SiteUpdates
from sfumato.reports import Guarantee

MOST_CURVES = 20  # sites that have spent differently, of which other accountants and other deltas are computed too


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What one site has spent.

    Attributes: plan: that its ledger was kept under; ledger: its file in a bundle, None without one; key: the public key (64 hexadecimal
      digits) that signed it at the site, None where the signer of the bundle signs it.
    """

    plan: DpSgd | Composition | SiteUpdates
    events: Sequence[Event]
    ledger: str | None = None
    key: str | None = None


def of_sites(
    spent: Mapping[str, Spent],
    *,
    boundary: Sequence[str],
    trust_model: str,
    not_for_release: str = "",
    composed_with: Sequence[dict[str, Any]] = (),
) -> Guarantee:
    """The claim of all sites: ``mechanism`` is that of the site which has spent most, ``sites`` has everybody's.

    Args: as of ``guarantee``. A site that spent nothing gave nothing, and claims nothing.
    Raises: UsageError for sites that have no claim together; for events that are none of a site's plan.
    """
    of_one_kind(list(spent.values()))
    rows, worst = _rows(spent)
    plan = spent[worst].plan
    claim = guarantee(
        plan,
        spent[worst].events,
        boundary=[*boundary, _sentence(worst, plan.unit)],
        not_for_release=not_for_release,
        composed_with=composed_with,
        complete=False,
        trust_model=trust_model,
        trusted="the machine of a site while it trains",
    )
    claim = replace(
        claim,
        boundary=[*claim.boundary[:-1], _population_sentence(spent)],  # in place of that of one site
        population=population(spent.values()),
        sites=rows,
    )
    if claim.epsilon is None:
        return claim
    others = _distinct(spent)
    if len(others) > MOST_CURVES:
        return replace(claim, accountants={"pld": claim.epsilon}, curve=[])
    return replace(
        claim,
        accountants=_largest(accounting.accountants(events, plan.delta, plan.adjacency) for events in others),
        curve=[
            [delta, max(epsilon for _, epsilon in points)]
            for delta, points in _by_delta(accounting.curve(events, adjacency=plan.adjacency) for events in others)
        ],
    )


def population(spent: Any) -> int:
    """The number of units at all sites together; of sites as the unit, the number of sites, which every plan says."""
    plans = [one.plan for one in spent]
    return plans[0].population if plans[0].unit == "site" else sum(plan.population for plan in plans)


def of_one_kind(spent: Sequence[Spent]) -> None:
    """Raises UsageError unless one claim can be made of all: the same delta, unit, records of a unit and adjacency."""
    if not spent:
        raise UsageError("sites = none · have no claim", next="Give what each of them has spent.")
    for name in ("delta", "unit", "records_per_unit", "adjacency"):
        found = sorted({str(getattr(one.plan, name)) for one in spent})
        if len(found) > 1:
            raise UsageError(
                f"{name} = {', '.join(found[:3])} · must be the same at every site, or no one claim is true of everybody",
                next="Plan all sites from one recipe.",
            )
    if spent[0].plan.unit == "site" and len({one.plan.population for one in spent}) > 1:
        raise UsageError("population · must be the number of sites, at every site", next="Plan all from one recipe.")


def _rows(spent: Mapping[str, Spent]) -> tuple[list[dict[str, Any]], str]:
    """Of every site its name, units, epsilon (None where nothing was spent, or there is none), mechanism, ledger and key; the
    site with the largest."""
    rows, largest = [], {}
    for name, one in spent.items():
        value = accounting.epsilon(one.events, one.plan.delta, adjacency=one.plan.adjacency) if one.events else 0.0
        assert value is not None  # PLD always applies
        largest[name] = value
        rows.append(
            {
                "name": name,
                "population": one.plan.population,
                "epsilon": value if one.events and math.isfinite(value) else None,
                "mechanism": one.plan.mechanism(one.events),
                "ledger": one.ledger if one.events else None,
                "key": one.key if one.events and one.ledger is not None else None,
            }
        )
    return rows, max(largest, key=lambda name: largest[name])


def _distinct(spent: Mapping[str, Spent]) -> list[list[Event]]:
    return [list(events) for events in dict.fromkeys(tuple(one.events) for one in spent.values() if one.events)]


def _largest(figures: Any) -> dict[str, float | None]:
    """By accountant; None where one of the sites has none by it."""
    every = list(figures)
    found: dict[str, float | None] = {}
    for name in every[0]:
        values = [one[name] for one in every]
        finite = [value for value in values if value is not None and math.isfinite(value)]
        found[name] = max(finite) if len(finite) == len(values) else None
    return found


def _by_delta(curves: Any) -> list[tuple[float, list[list[float]]]]:
    return [(points[0][0], list(points)) for points in zip(*curves, strict=True)]


def _sentence(worst: str, unit: str) -> str:
    if unit == "site":
        return f"What is stated is the largest of the sites' epsilons ({worst})."
    return (
        f"Sites hold different {unit}s: everybody's epsilon is that of their own site, at one delta for all; stated is the largest "
        f"({worst}). A {unit} at several sites pays their composition."
    )


def _population_sentence(spent: Mapping[str, Spent]) -> str:
    plans = {name: one.plan for name, one in spent.items()}
    first = next(iter(plans.values()))
    if first.unit == "site":
        return f"The number of sites, N = {first.population}, is a public constant."
    counted = any(plan.population_from_data for plan in plans.values())
    each = "; ".join(f"{name} {plan.population}" for name, plan in list(plans.items())[:MOST_CURVES])
    more = f"; and {len(plans) - MOST_CURVES} sites more" if len(plans) > MOST_CURVES else ""
    total = sum(plan.population for plan in plans.values())
    how = (
        "was counted in the data and is declared public: the guarantee does not hide it, and does not hold for somebody to whom N itself "
        "would be a secret"
        if counted
        else "was given as a public constant"
    )
    return f"The number of {first.unit}s at every site ({each}{more}; N = {total} in all) {how}."
