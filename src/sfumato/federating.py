"""A federated run from recipe to report, all sites in one process. [shell: reads the clock, writes the run's folder]"""

import os
import platform
import resource
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato import building, measuring, stages
from sfumato.errors import PrivacyRefused, UsageError
from sfumato.privacy import ledger
from sfumato.privacy.guarantee import guarantee
from sfumato.privacy.plan import NotPrivate
from sfumato.recipe import Recipe
from sfumato.reports import CostReport, Guarantee, to_dict
from sfumato.stages import Progress
from sfumato.training.folder import RunFolder

if TYPE_CHECKING:
    from sfumato.federation.local import Site
    from sfumato.federation.simulate import FederationResult


def run(recipe: Recipe, *, out: Path, progress: Progress) -> dict[str, Any]:
    """Federated averaging of what each site learnt under its own plan, charged to its own ledger and account.

    Raises: UsageError for what sites cannot do; PrivacyRefused if a site has no plan that can work, or if no site took part in any round.
    """
    from sfumato.federation.local import load_trained
    from sfumato.federation.simulate import simulate
    from sfumato.training.rounds import LocalTraining

    if recipe.public_start is not None:
        raise UsageError(
            "public_start · is of `sfumato train`: sites begin at the recipe's fresh weights",
            next="Leave public_start out, or train at one place.",
        )
    federation = recipe.federation
    train_steps = LocalTraining(recipe.training, recipe.performance)  # refuses what a site cannot do, before any folder
    progress(f"{recipe.name}: reading the data")
    prepared = stages.load(recipe)
    model = building.build(recipe)
    if getattr(model, "needs_public", False):
        raise UsageError(
            f"model.objective.kind = {model.family} · needs more than the tensors that sites exchange",
            next="Use `sfumato train`, or another family.",
        )
    members = _members(recipe, prepared, model)
    folder = stages.begin(out, recipe, members[0].plan, prepared, model)
    members = [replace(site, ledger=folder.path / site.ledger) for site in members]
    stages.mark_begun(folder, recipe)
    progress(f"{recipe.name}: writing to {folder.path}")
    samples = stages.samples(folder, recipe, model, prepared)

    def on_round(result: Any, state: Any) -> None:
        load_trained(model, state)
        sites = f"{len(result.sites)} of {len(members)} sites"
        progress(f"round {result.round}/{federation.rounds}: {sites}, {result.steps} steps")
        samples.picture(result.round, model)

    began, processor = time.monotonic(), time.process_time()
    result = simulate(
        members,
        build=lambda: building.build(recipe),
        train_steps=train_steps,
        rounds=federation.rounds,
        local_steps=federation.local_steps,
        run=folder.name,
        on_round=on_round,
    )
    seconds, processor = time.monotonic() - began, time.process_time() - processor
    _require_any(result)
    load_trained(model, result.state)
    model.eval()
    stages.write_model(folder, model, recipe, prepared)
    described = result.to_dict()
    folder.write_json("reports/federation.json", _report(described))
    folder.write_json("reports/cost.json", to_dict(_cost(members, result, model, seconds, processor)))
    folder.write_json("reports/privacy.json", to_dict(_claim(recipe, members)))
    measuring.evaluate(folder, recipe, members[0].plan, prepared, progress)
    return {
        **_answer(folder, described),
        "quality": stages.quality_values(folder),
        **stages.render(folder, public=False),
    }


def _members(recipe: Recipe, prepared: Any, model: Any) -> "list[Site]":
    """The sites, each with a plan over all rounds for its own units, a share of the batch that is its share of the units,
    and the place of its ledger within the run's folder. In one process they have one key, this user's, as a run has."""
    from sfumato.federation.local import Site
    from sfumato.federation.simulate import site_plan, split_by_site
    from sfumato.release import keys

    federation = recipe.federation
    split = split_by_site(prepared.private, federation.sites)
    tables = {name: model.encode(records) for name, records in split.items()}
    populations = federation.populations or tuple(table.num_units for table in tables.values())
    total = sum(populations)
    key = keys.existing()  # a key is made at the first release, not here
    accounts = prepared.account_home / ".sfumato"
    sites = [
        Site(
            name=name,
            table=table,
            plan=site_plan(
                recipe.privacy,
                federation,
                expected_batch_size=max(1.0, recipe.training.expected_batch_size * population / total),
                population=population,
            ),
            ledger=Path("sites") / f"site-{number}" / "ledger.db",
            account=accounts / f"account-site-{number}-of-{federation.sites}.db",
            sign=keys.signer(key) if key is not None else None,
        )
        for number, ((name, table), population) in enumerate(zip(tables.items(), populations, strict=True), start=1)
    ]
    return [replace(site, account_limit=stages.account_limit(recipe, site.plan)) for site in sites]


def _require_any(result: "FederationResult") -> None:
    """Raises PrivacyRefused, with every site's reason, if nobody trained: there is no model then."""
    if any(round.sites for round in result.rounds):
        return
    refusals = [
        {"code": no.code, "message": f"site {site.name}, round {no.round}: {no.message}", "next": ""}
        for site in result.sites
        for no in site.refused
    ]
    raise PrivacyRefused(
        f"sites = {len(result.sites)} · none of them took part in any round; the first reason: {refusals[0]['message']}",
        next="Change what the sites refuse; nothing was trained.",
        code="no_site",
        refusals=refusals,
    )


def _report(described: dict[str, Any]) -> dict[str, Any]:
    """``reports/federation.json``: every round with its sites, and every site with its units."""
    sites = [{**site, "units": site["population"]} for site in described["sites"]]
    return {**described, "sites": sites, "rounds": described["rounds_detail"]}


def _answer(folder: RunFolder, described: dict[str, Any]) -> dict[str, Any]:
    return {
        "run": str(folder.path),
        "rounds": described["rounds"],
        "sites": [
            {**site, "units": site["population"], "refused": len(site["refused"])} for site in described["sites"]
        ],
        "epsilon": described["epsilon"],
        "bytes_up": described["bytes_up"],
        "bytes_down": described["bytes_down"],
    }


def _cost(
    members: "Sequence[Site]", result: "FederationResult", model: Any, seconds: float, processor_seconds: float
) -> CostReport:
    steps = {site.name: site.steps for site in result.sites}
    expected_units = sum(steps[site.name] * site.plan.expected_batch_size for site in members)
    return CostReport(
        seconds=seconds,
        processor_seconds=processor_seconds,
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        steps=sum(round.steps for round in result.rounds),
        units_per_second=expected_units / max(seconds, 1e-9),
        parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        bytes_sent=result.bytes_up + result.bytes_down,
        machine=f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, all sites in one process",
    )


def _claim(recipe: Recipe, members: "Sequence[Site]") -> Guarantee:
    """Every person's epsilon is that of their own site; what is said of all is the largest."""
    if isinstance(members[0].plan, NotPrivate):
        return guarantee(members[0].plan, [], boundary=stages.boundary(recipe))

    def spent(site: "Site") -> float:
        return ledger.show(site.ledger)["epsilon"] if site.ledger.is_file() else 0.0

    worst = max(members, key=spent)
    claim = guarantee(
        worst.plan,
        ledger.events_of_jsonl(ledger.export_jsonl(worst.ledger)),
        boundary=[
            *stages.boundary(recipe),
            f"Sites hold different {recipe.privacy.unit}s: what is stated is the largest of the sites' epsilons "
            f"({worst.name}); a {recipe.privacy.unit} at several sites pays their composition.",
            "Public at every site: its number of units, its sampling rate, its local steps.",
        ],
        not_for_release="a federated run has a ledger for each site; a bundle states one",
    )
    return replace(claim, trust_model="local: each site adds its noise before anything is sent")
