"""The verbs: each function does one and returns what it prints.

The way of a run: recipe -> data -> plan -> ledger -> training -> model -> quality -> audit -> report -> bundle. What is
done already is not done again on ``resume``. The stages themselves are in ``stages``, a federation in ``federating``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sfumato import building, deploying, federating, machines, measuring, pretraining, prompting, stages
from sfumato import recipe as recipes_file
from sfumato.errors import PrivacyRefused, UsageError
from sfumato.federation import policy as policies
from sfumato.generating import generate as generate  # the verb
from sfumato.privacy import accounting, planning
from sfumato.privacy.plan import DpSgd, NotPrivate, PrivacyPlan, PrivatePlan
from sfumato.privacy.plan_json import plan_to_dict
from sfumato.privacy.settings import PrivacySettings
from sfumato.privacy.warm_planning import before_steps, in_steps
from sfumato.recipe import Recipe
from sfumato.recipes import NAMED, named
from sfumato.reports import to_dict
from sfumato.stages import Progress, quiet
from sfumato.training import folder as folders
from sfumato.training.folder import RunFolder

PUBLIC_POPULATION = {"mnist": 60_000, "fashion-mnist": 60_000}  # published sizes of data that everybody has


# -- recipes and plans --


def resolve(recipe: str, assignments: Sequence[str] = ()) -> Recipe:
    """A named recipe or a file, with ``path=value`` changes."""
    if recipe in NAMED and not Path(recipe).is_file():
        values = recipes_file.to_mapping(named(recipe))
    elif Path(recipe).exists() or recipe.endswith((".yaml", ".yml")):
        values = recipes_file.read_mapping(recipe)
    else:
        named(recipe)  # raises, with the names that are known
        raise AssertionError
    return recipes_file.from_mapping(recipes_file.override(values, list(assignments)))


def plan(
    recipe: str | None = None,
    *,
    assignments: Sequence[str] = (),
    population: int | None = None,
    expected_batch_size: float | None = None,
    steps: int | None = None,
    epsilon: float | None = None,
    delta: float | None = None,
    accountant: str = "pld",
) -> dict[str, Any]:
    """What a guarantee costs, or why it cannot be had. Spends nothing.

    Without a recipe ``population``, ``expected_batch_size``, ``steps`` and ``epsilon`` say everything; with one they
    replace its values.
    """
    if accountant not in ("pld", "rdp", "zcdp"):
        raise UsageError(f"accountant = {accountant} · must be pld, rdp or zcdp", next="Choose one of these.")
    sizes = {"population": population, "expected_batch_size": expected_batch_size, "steps": steps}
    if recipe is None:
        missing = [
            f"--{name.replace('_', '-')}" for name, value in {**sizes, "epsilon": epsilon}.items() if value is None
        ]
        if missing:
            raise UsageError(
                f"{', '.join(missing)} · must be given when there is no recipe",
                next="Or name a recipe: sfumato plan clinic.",
            )
        settings = PrivacySettings(epsilon=epsilon, delta="auto" if delta is None else delta)
        memory, parameters, dimensions = None, None, None
    else:
        resolved = prompting.planned(resolve(recipe, assignments))
        settings = resolved.privacy
        if epsilon is not None:
            settings = replace(settings, epsilon=epsilon, noise_multiplier=None)
        if delta is not None:
            settings = replace(settings, delta=delta)
        sizes["population"] = population if population is not None else _public_population(resolved)
        training = resolved.training
        sizes["expected_batch_size"] = (
            training.expected_batch_size if expected_batch_size is None else expected_batch_size
        )
        sizes["steps"] = training.steps if steps is None else steps
        pretraining.refuse(resolved)
        stages.check_preparation(resolved)
        stages.check_parts(resolved)
        memory, parameters = stages.memory_left(resolved)
        dimensions = stages.dimensions(resolved)
    if population is not None:
        settings = replace(settings, population=population)
    try:
        found = planning.make_plan(settings, **sizes, parameters=parameters, memory_bytes=memory, dimensions=dimensions)  # pyright: ignore[reportArgumentType]
    except PrivacyRefused as refused:
        return {
            **sizes,
            "noise_multiplier": None,
            "epsilon": None,
            "delta": delta,
            "sampling_rate": None,
            "unit": settings.unit,
            "adjacency": settings.adjacency,
            "accountants": {},
            "refusals": refused.refusals,
            "warnings": [],
        }
    return {
        **_plan_values(found, accountant, sizes),
        "parameters": parameters,
        "refusals": [],
        "warnings": planning.warnings_of(found, parameters=parameters),
    }


def _plan_values(found: PrivacyPlan, accountant: str, sizes: dict[str, Any]) -> dict[str, Any]:
    trains = in_steps(found)
    steps = isinstance(trains, DpSgd | NotPrivate)
    common = {
        "mechanism": "none" if isinstance(found, NotPrivate) else found.mechanism(())["name"],
        "population": found.population,
        "expected_batch_size": trains.expected_batch_size if steps else sizes["expected_batch_size"],
        "steps": trains.steps if steps else sizes["steps"],
        "sampling_rate": trains.sampling_rate if steps else 1.0,
        "unit": found.unit,
        "records_per_unit": found.records_per_unit,
    }
    if isinstance(found, NotPrivate):
        return {
            **common,
            "noise_multiplier": None,
            "epsilon": None,
            "delta": None,
            "adjacency": None,
            "accountants": {},
        }
    accountants = accounting.accountants(found.events(), found.delta, found.adjacency)
    spent = {
        **common,
        "noise_multiplier": getattr(trains, "noise_multiplier", None),
        "epsilon": accountants[accountant],
        "delta": found.delta,
        "adjacency": found.adjacency,
        "accountants": accountants,
        "accountant": accountant,
        "gdp": accounting.gdp(found.events(), found.delta, found.adjacency),
    }
    if not isinstance(trains, DpSgd):
        mechanism = found.mechanism(())
        return {**spent, "releases": mechanism.get("stages", [mechanism])}
    return {
        **spent,
        **{_FIRST[stage.mechanism(())["name"]]: stage.mechanism(()) for stage in before_steps(found)},
        "max_grad_norm": trains.max_grad_norm,
        "clipping": trains.clipping,
        "bands": trains.bands,
        "largest_batch": trains.largest_batch,
        "noise": trains.noise,
        "parts": [
            {**part, "noise_multiplier": trains.part_noise_multipliers()[part["name"]]}
            for part in plan_to_dict(trains).get("parts", [])
        ],
    }


_FIRST = {"estimate": "clip_estimate", "mean_embedding": "warm_start"}  # what a plan's answer calls it


def _public_population(recipe: Recipe) -> int:
    """N without reading the data where it is known, else by reading them."""
    data, privacy = recipe.data, recipe.privacy
    if privacy.population is not None:
        return privacy.population
    whole = data.deduplicate is None and data.balance is None
    if whole and data.source == "clinic" and privacy.unit == "person":
        return min(data.units, data.limit_units or data.units)
    if whole and data.source in PUBLIC_POPULATION:
        return min(PUBLIC_POPULATION[data.source], data.limit_units or PUBLIC_POPULATION[data.source])
    return len({record.unit for record in stages.load(recipe).private})


# -- train --


def train(
    recipe: str,
    *,
    assignments: Sequence[str] = (),
    out: Path | str = "runs",
    resume: bool = False,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """One recipe, one run: trains, measures, attacks, reports, and releases if the gate approves."""
    wanted = resolve(recipe, assignments)
    prompting.only_federated(wanted, "train")
    pretraining.refuse(wanted)
    run = _resumed(Path(out), wanted) if resume else None
    if resume and run is None:
        progress(f"{wanted.name}: there is no run to resume in {out}; a new one begins")
    progress(f"{wanted.name}: reading the data")
    prepared = stages.load(wanted)
    model = building.build(wanted)
    table = building.encode(model, wanted, prepared.private)
    if run is None:
        plan = stages.make_plan(wanted, table)
        run = stages.begin(Path(out), wanted, plan, prepared, model)
    else:
        plan = stages.plan_of(run)
        stages.require_same_data(run, prepared)
    stages.say_plan(plan, progress, parameters=sum(p.numel() for p in model.parameters() if p.requires_grad))
    progress(f"{wanted.name}: writing to {run.path}")
    stopped = "steps"
    if run.finished:
        progress(f"{wanted.name}: the training is finished already")
    else:
        stopped = stages.train(run, wanted, plan, model, table, prepared, progress)
        if stopped == "interrupted":
            return {**stages.result(run), "stopped": stopped}
    if not run.report("quality").is_file():
        measuring.evaluate(run, wanted, plan, prepared, progress, table=table)
    if not run.report("audit").is_file():
        measuring.audit(run, wanted, plan, prepared, progress)
    reasons = stages.release(run, wanted, progress) if isinstance(plan, PrivatePlan) else []
    stages.render(run, public=False)
    return {**stages.result(run), "stopped": stopped, "reasons": reasons}


def _resumed(out: Path, wanted: Recipe) -> RunFolder | None:
    """The last run of this recipe, if there is one. Raises UsageError if it was another recipe."""
    last = out / wanted.name / "last"
    if not (last / "resolved.yaml").is_file():
        return None
    run = folders.existing(last)
    before = recipes_file.load(run.path / "resolved.yaml")
    if replace(before, performance=wanted.performance) != wanted:
        a, b = recipes_file.to_mapping(before), recipes_file.to_mapping(wanted)
        changed = ", ".join(key for key in a if key != "performance" and a[key] != b[key])
        raise UsageError(
            f"recipe = another than that of {run.path} (different: {changed}) · a run keeps its recipe",
            next="Resume with the same recipe and --set values, or start a new run without --resume.",
        )
    return run


def _opened(run: Path | str) -> tuple[RunFolder, Recipe, PrivacyPlan]:
    """A finished run with its recipe and plan."""
    found = folders.existing(run)
    if not found.finished:
        verb = "federate" if (found.path / federating.SERVER).is_dir() else "train"
        raise UsageError(
            f"run = {found.path} · its training is not finished", next=f"Run `sfumato {verb} ... --resume` first."
        )
    return found, recipes_file.load(found.path / "resolved.yaml"), stages.plan_of(found)


def evaluate(run: Path | str, *, progress: Progress = quiet) -> dict[str, Any]:
    """Measures a finished run anew, and writes its report again."""
    found, recipe, plan = _opened(run)
    measuring.evaluate(found, recipe, plan, stages.load(recipe), progress)
    return {"run": str(found.path), "quality": stages.quality_values(found), **stages.render(found, public=False)}


def audit(run: Path | str, *, progress: Progress = quiet) -> dict[str, Any]:
    """Attacks a finished run anew, and writes its report again."""
    found, recipe, plan = _opened(run)
    prompting.only_federated(recipe, "audit")
    result = measuring.audit(found, recipe, plan, stages.load(recipe), progress)
    stages.render(found, public=False)
    return {"run": str(found.path), **to_dict(result), "conformance": []}


def report(run: Path | str, *, public: bool = False) -> dict[str, Any]:
    """Writes the page and the JSON of a run, finished or not."""
    return stages.render(folders.existing(run), public=public)


def release(run: Path | str, *, policy: Path | str | None = None) -> dict[str, Any]:
    """Asks the gate, and writes a signed bundle if it approves."""
    found, recipe, _ = _opened(run)
    if policy is not None:
        values = recipes_file.read_mapping(policy)
        recipe = recipes_file.from_mapping({**recipes_file.to_mapping(recipe), "release": values})
    reasons = stages.release(found, recipe, quiet)
    return {
        "run": str(found.path),
        "bundle": None if reasons else str(found.path / "bundle"),
        "approved": not reasons,
        "reasons": reasons,
    }


def runs(folder: Path | str = "runs") -> dict[str, Any]:
    """Every run in a folder, oldest first."""
    found = []
    for run in folders.listed(Path(folder)):
        claim = stages.claim_of(run) if run.finished else None
        bundled = (run.path / "bundle" / "manifest.json").is_file()
        found.append(
            {
                "run": str(run.path),
                "epsilon": claim.epsilon if claim else None,
                "delta": claim.delta if claim else None,
                "steps": claim.mechanism.get("steps_spent") if claim else None,
                "state": "released" if bundled else "finished" if claim else "unfinished",
            }
        )
    return {"runs": found}


def federate(
    recipe: str,
    *,
    assignments: Sequence[str] = (),
    out: Path | str = "runs",
    sites: int | None = None,
    rounds: int | None = None,
    engine: str = "simulation",
    policy: Path | str | None = None,
    resume: bool = False,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """A federation on this machine: what each site learns under its own plan and ledger, made one model round by round.

    Args:
      engine: simulation (one process), flower (Flower's simulation, Ray), deployment (SuperLink, SuperNodes, TLS).
      policy: a file; of every site.
    """
    match engine:
        case "simulation":
            over = federating.here
        case "flower":
            over = deploying.simulated()
        case "deployment":
            over = deploying.deployed(progress)
        case _:
            raise UsageError(
                f"engine = {engine} · must be simulation, flower or deployment", next="Use --engine simulation."
            )
    wanted = federated(recipe, assignments, sites=sites, rounds=rounds)
    run = _resumed(Path(out), wanted) if resume else None
    if resume and run is None:
        progress(f"{wanted.name}: there is no run to resume in {out}; a new one begins")
    return federating.run(
        wanted,
        out=Path(out),
        progress=progress,
        resume=run,
        policy=policies.load(policy) if policy is not None else None,
        engine=over,
    )


def federate_server(
    recipe: str,
    *,
    sites: Mapping[str, Path],
    folder: Path,
    hosts: Sequence[str],
    bind: str,
    port: int,
    rounds: int | None = None,
    data: Path | None = None,
    wait: float,
    absence: float,
    patience: float,
    resume: bool = False,
    assignments: Sequence[str] = (),
    out: Path | str = "runs",
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Leads a federation over several machines (`machines.serve`)."""
    wanted = federated(recipe, assignments, sites=len(sites), rounds=rounds)
    return machines.serve(
        wanted,
        sites=sites,
        folder=folder,
        hosts=hosts,
        bind=bind,
        port=port,
        out=Path(out),
        data=data,
        wait=wait,
        absence=absence,
        patience=patience,
        resume=_resumed(Path(out), wanted) if resume else None,
        progress=progress,
    )


def federate_site(
    *,
    policy: Path | None,
    data: Path | None,
    server: str | None,
    authority: Path,
    folder: Path,
    population: int | None = None,
    share: str | None = None,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Takes part in one, until interrupted (`machines.take_part`); without a server, makes the key only."""
    if server is None:
        return machines.make_key(folder)
    if policy is None:
        raise UsageError(
            "policy = none · a site says first what it allows", next="Give --policy FILE; see docs/federation.md."
        )
    part = None
    if share is not None:
        k, _, n = share.partition("/")
        if not (k.isdigit() and n.isdigit() and 1 <= int(k) <= int(n)):
            raise UsageError(f"share = {share!r} · must be K/N with 1 <= K <= N", next="Such as 1/4.")
        part = (int(k), int(n))
    machines.take_part(
        policy=policy,
        data=data,
        server=server,
        authority=authority,
        folder=folder,
        progress=progress,
        population=population,
        share=part,
    )
    return {"folder": str(folder), **machines.shown(folder)}


def federate_status(folder: Path) -> dict[str, Any]:
    """What a server or a site on this machine said last."""
    return machines.shown(folder)


def federated(
    recipe: str, assignments: Sequence[str] = (), *, sites: int | None = None, rounds: int | None = None
) -> Recipe:
    """The recipe as a federation runs it: what every site resolves for itself, and compares by its sha256."""
    wanted = resolve(recipe, assignments)
    asked = {name: value for name, value in (("sites", sites), ("rounds", rounds)) if value is not None}
    return replace(
        wanted,
        name=f"{wanted.name}-federated",
        federation=replace(wanted.federation, **asked),
        evaluation=replace(wanted.evaluation, twin=False),  # a twin would have to be federated too
    )
