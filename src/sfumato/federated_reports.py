"""What a federated run says of itself: its rounds and sites, what it cost, and the claim of all sites. [shell: reads the ledgers]"""

import os
import platform
import resource
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato import pretraining, site_ledgers, stages, warming
from sfumato.errors import LedgerError, PrivacyRefused
from sfumato.privacy import accounting, ledger
from sfumato.privacy.events import Event
from sfumato.privacy.guarantee import guarantee
from sfumato.privacy.joint import MOST_CURVES, Spent, of_sites
from sfumato.privacy.plan import Composition, DpSgd, NotPrivate, PrivacyPlan, SiteUpdates
from sfumato.recipe import Recipe
from sfumato.reports import CostReport, Guarantee, to_dict
from sfumato.stages import Progress
from sfumato.training.folder import RunFolder

if TYPE_CHECKING:
    from sfumato.federation.mechanisms import Promise
    from sfumato.federation.serving import Exchange
    from sfumato.federation.simulate import FederationResult
    from sfumato.federation.sites import Site, Work

SERVER = "server"  # in the run's folder: the server's checkpoint and ledger


@dataclass(frozen=True, kw_only=True)
class Federated:
    """A federation that has ended, or was interrupted.

    Attributes: members: with the paths of their ledgers; stated: the plan that the run's folder has.
    """

    recipe: Recipe
    folder: RunFolder
    members: "Sequence[Site]"
    work: "Work"
    promise: "Promise"
    stated: PrivacyPlan
    result: "FederationResult"


def rounds_of(run: Federated) -> dict[str, Any]:
    """``reports/federation.json``: every round with its sites, and every site with its units."""
    from sfumato.evaluation import watching
    from sfumato.federation import history
    from sfumato.federation.rounds import is_secret

    result = run.result
    described = result.to_dict()
    del described["rounds_detail"]
    sites = [{**site, "units": site["population"], **_of_its_ledger(site["name"], run)} for site in described["sites"]]
    epsilons = {site["name"]: site["epsilon"] for site in sites}
    known = [value for value in epsilons.values() if value is not None]
    described["epsilon"] = max(known) if len(known) == len(sites) else None
    rounds = history.told(
        result.rounds,
        run.members,
        run.promise,
        run.work.public,
        local_steps=run.recipe.federation.steps_per_round,
        epsilons=epsilons,
        looks=watching.history(run.folder.path),
    )
    report = {**described, "sites": sites, "rounds": rounds, "left_out": history.left_out(rounds)}
    if not is_secret(run.promise, run.work.public):
        return report
    hidden = dict.fromkeys(("rounds", "steps", "refused"))
    return {
        **report,
        "sites": [{**site, **hidden} for site in sites],
        "bytes_up": None,
        "bytes_down": None,
        "not_told": "The guarantee counts on nobody's knowing which sites were asked: who was, and what would tell it, is left out.",
    }


def _of_its_ledger(name: str, run: Federated) -> dict[str, float | None]:
    """Epsilon and charged steps of a site elsewhere by the ledger that it gave; the rounds that it was asked for say it till then."""
    from sfumato.federation.local_training import steps_of

    site = next(site for site in run.members if site.name == name)
    if not (site.elsewhere and kept_of(site).is_file()):
        return {}
    plan = _plan_of(site, run)
    events = site_ledgers.load(kept_of(site), plan, run=run.folder.name).events
    epsilon = accounting.epsilon(events, plan.delta, adjacency=plan.adjacency)
    if not isinstance(site.plan, DpSgd):
        return {"epsilon": epsilon}
    one = site.plan.event(1)
    return {
        "epsilon": epsilon,
        "steps": steps_of(site.plan, sum(event.count for event in events if replace(event, count=1) == one)),
    }


def require_any(result: "FederationResult") -> None:
    """Raises PrivacyRefused, with every site's reason, if nobody trained: there is no model then."""
    refusals = [
        {"code": no.code, "message": f"site {site.name}, round {no.round}: {no.message}", "next": ""}
        for site in result.sites
        for no in site.refused
    ]
    if any(round.sites for round in result.rounds) or not refusals:  # of a draw by coins perhaps nobody was asked
        return
    raise PrivacyRefused(
        f"sites = {len(result.sites)} · none of them took part in any round; the first reason: {refusals[0]['message']}",
        next="Change what the sites refuse; nothing was trained.",
        code="no_site",
        refusals=refusals,
    )


def write(run: Federated, model: Any, *, seconds: float, processor_seconds: float, one_process: bool) -> None:
    """Cost and claim of a finished federation. The claim comes last: with it the training counts as finished."""
    from sfumato.federation import rounds

    where = ", all sites in one process" if one_process else "; sites in other processes are not in it"
    cost = _cost(run, model, seconds, processor_seconds, where)
    if rounds.is_secret(run.promise, run.work.public):  # all of these grow with how many sites were drawn
        told = dict.fromkeys(("steps", "bytes_sent", "seconds", "processor_seconds", "units_per_second", "peak_bytes"))
        cost = replace(cost, **told)
    # of the call that ended the training, not of one that asked for a ledger again
    if not run.folder.report("cost").is_file():
        run.folder.write_json("reports/cost.json", to_dict(cost))
    run.folder.write_json("reports/privacy.json", to_dict(claim_of(run, model)))


def _cost(run: Federated, model: Any, seconds: float, processor_seconds: float, where: str) -> CostReport:
    """Of this process; ``where``: what is to be said of the others."""
    result = run.result
    steps = {site.name: site.steps for site in result.sites}
    expected_units = sum(steps[site.name] * site.plan.expected_batch_size for site in run.members)
    return CostReport(
        seconds=seconds,
        processor_seconds=processor_seconds,
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        steps=sum(round.steps for round in result.rounds),
        units_per_second=expected_units / max(seconds, 1e-9),
        parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        bytes_sent=result.bytes_up + result.bytes_down,
        machine=f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores{where}",
    )


def claim_of(run: Federated, model: Any) -> Guarantee:
    """Of the server's ledger, where the server adds the noise and is trusted; else of the ledgers of all sites."""
    recipe, promise = run.recipe, run.promise
    inside = stages.boundary(
        recipe,
        family=model.boundary(),
        start=() if recipe.public_start is None else pretraining.boundary(run.folder, recipe, model),
    )
    if isinstance(run.stated, NotPrivate):
        return guarantee(run.stated, [], boundary=inside)
    over_rounds = f"Over the rounds: {promise.composition}."
    if promise.at_site is None and promise.at_server is not None:
        spent = _events_in(run.folder.path / SERVER / "ledger.db")
        return guarantee(
            run.stated,
            spent,
            boundary=[
                *inside,
                "Declared public: the number of units of every site.",
                over_rounds,
                f"Silent sites: {promise.dropouts}",
            ],
            trust_model=promise.trust,
            trusted="the machines of the server and the sites while they train",
        )

    opened = any(site.opening is not None for site in run.members)
    spent = {site.name: _spent_by(site, run) for site in run.members}
    return of_sites(
        spent,
        boundary=[
            *inside,
            *(warming.boundary(recipe, by="each site, of its own records") if opened else ()),
            "Public at every site: its number of units, its sampling rate, its local steps.",
            over_rounds,
            *_without_ledger([site.name for site in run.members if site.elsewhere and spent[site.name].ledger is None]),
            *_of_readers(run),
            *_not_known_of_other_runs(run.members),
        ],
        trust_model=promise.trust,
        composed_with=_other_runs(run.members),
    )


def _without_ledger(names: Sequence[str]) -> list[str]:
    if not names:
        return []
    return [f"Without a ledger from {', '.join(names)}: every round that it was asked for is counted as charged."]


def _of_readers(run: Federated) -> list[str]:
    """Where the server adds noise to what is private already: what readers of the model alone are promised besides."""
    plan = run.promise.at_server
    path = run.folder.path / SERVER / "ledger.db"
    if plan is None or not path.is_file():
        return []
    epsilon = accounting.epsilon(_events_in(path), plan.delta, adjacency=plan.adjacency)
    return [
        f"The claim is against everybody, the server too. Readers of the model who see nothing else are promised more, if the server is "
        f"trusted: ({epsilon:.4g}, {plan.delta:.3g}), by both noises and the server's ledger, which is not in a bundle."
    ]


def gather(run: Federated, exchange: "Exchange", progress: Progress) -> None:
    """Asks every site elsewhere for its ledger, and keeps what it gives in the run's folder; what it did not give is said."""
    from sfumato.federation.simulate import events_asked

    away = {site.name: site for site in run.members if site.elsewhere and not kept_of(site).is_file()}
    charged_here = run.promise.at_site is None and run.promise.at_server is not None  # the server's ledger is the one
    if not away or charged_here or isinstance(run.stated, NotPrivate):
        return
    steps = run.recipe.federation.steps_per_round
    last = max((result.round for result in run.result.rounds), default=0)
    replies = exchange(site_ledgers.asks(list(away), run=run.folder.name, round=last + 1))
    taken = {
        site_ledgers.load(kept_of(site), _plan_of(site, run), run=run.folder.name).ledger: site.name
        for site in run.members
        if site.elsewhere and kept_of(site).is_file()
    }
    for name, site in away.items():
        found = site_ledgers.read(replies.get(name), _plan_of(site, run), run=run.folder.name, least=_used(site, run))
        if not isinstance(found, str) and found.ledger and taken.setdefault(found.ledger, name) != name:
            found = f"it sent that of site {taken[found.ledger]}"
        if isinstance(found, str):
            if events_asked(site, run.promise, run.result.rounds, steps):
                progress(
                    f"site {name} gave no ledger: {found}; every round that it was asked for is counted as charged"
                )
            continue
        run.folder.write_json(str(kept_of(site).relative_to(run.folder.path)), {"key": found.key, "ledger": found.text})


def lacks_ledgers(folder: RunFolder) -> bool:
    """Whether the training is finished, and a site elsewhere has not given its ledger: it is asked again on ``resume``."""
    sites = folder.read_json("reports/privacy.json").get("sites", []) if folder.finished else []
    return any(site["epsilon"] is not None and site["ledger"] is None for site in sites)


def kept_of(site: "Site") -> Path:
    """Where the ledger lies that a site elsewhere gave."""
    return site.ledger.with_name(site_ledgers.FILE)


def _plan_of(site: "Site", run: Federated) -> DpSgd | Composition | SiteUpdates:
    plan = site.whole if run.promise.at_site is None else run.promise.at_site
    assert isinstance(plan, DpSgd | Composition | SiteUpdates)  # or nothing is private
    return plan


def _used(site: "Site", run: Federated) -> tuple[Event, ...]:
    """What a site has charged at least: the rounds whose update of it is in the model. One that says no loss (``may_say``) is charged
    the local steps of a round alone."""
    from sfumato.federation.simulate import events_asked

    return events_asked(site, run.promise, run.result.rounds, run.recipe.federation.local_steps, used=True)


def _spent_by(site: "Site", run: Federated) -> Spent:
    from sfumato.federation.simulate import events_asked

    plan, name = _plan_of(site, run), f"ledgers/{site.ledger.parent.name}.jsonl"
    if not site.elsewhere:  # where no ledger could be opened, nothing was charged and no data touched
        events = _events_in(site.ledger) if site.ledger.is_file() else []
        if lacks := site_ledgers.lacking(events, _used(site, run)):
            raise LedgerError(
                f"{site.ledger} of site {site.name} · {lacks}",
                next="Restore the ledger that was kept while it trained, and run again with --resume.",
                code="ledger_lost",
            )
        return Spent(plan=plan, events=events, ledger=name)
    if kept_of(site).is_file():
        found = site_ledgers.load(kept_of(site), plan, run=run.folder.name)
        return Spent(plan=plan, events=found.events, ledger=name, key=found.key or None)
    return Spent(
        plan=plan, events=events_asked(site, run.promise, run.result.rounds, run.recipe.federation.steps_per_round)
    )


def _events_in(path: Path) -> list[Event]:
    return ledger.events_of_jsonl(ledger.export_jsonl(path))


def _not_known_of_other_runs(members: "Sequence[Site]") -> list[str]:
    """Whose other runs ``composed_with`` does not have."""
    here = [site for site in members if not site.elsewhere and site.account is not None and site.ledger.is_file()]
    away = [site.name for site in members if site.elsewhere] + [site.name for site in here[MOST_CURVES:]]
    if not away:
        return []
    names = ", ".join(away[:MOST_CURVES]) + (f" and {len(away) - MOST_CURVES} more" if len(away) > MOST_CURVES else "")
    return [
        f"Outside: other runs on the same people at {names}; these sites' own accounts hold them, and they are not listed here."
    ]


def _other_runs(members: "Sequence[Site]") -> list[dict[str, Any]]:
    """Earlier runs on the same people, of every site whose account is here."""
    here = [site for site in members if not site.elsewhere and site.account is not None and site.ledger.is_file()]
    return [
        {**other, "site": site.name}
        for site in here[:MOST_CURVES]
        if site.account is not None
        for other in ledger.other_runs(site.ledger, site.account)
    ]
