"""One run from recipe to bundle: hands watchers to training, reports to release, and returns what each verb prints.

The way of a run: recipe -> data -> plan -> ledger -> training -> model -> quality -> audit -> report -> bundle. What is
done already is not done again on ``resume``. [shell: reads the clock, and files through the packages below]
"""

import math
import os
import platform
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sfumato import recipe as recipes_file
from sfumato.errors import PrivacyRefused, UsageError
from sfumato.privacy import accounting
from sfumato.privacy import plan as plans
from sfumato.privacy.guarantee import guarantee
from sfumato.privacy.ledger import Ledger
from sfumato.privacy.plan import DpSgd, NotPrivate, PrivacyPlan
from sfumato.recipe import Recipe
from sfumato.recipes import NAMED, named
from sfumato.reports import CostReport, Guarantee, QualityReport, to_dict
from sfumato.training import folder as folders
from sfumato.training.folder import RunFolder

Progress = Callable[[str], None]
GRID = 18  # pictures in a sample grid
PUBLIC_POPULATION = {"mnist": 60_000, "fashion-mnist": 60_000}  # published sizes of data that everybody has


def _quiet(line: str) -> None:
    """Progress for callers who do not want any."""


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
        settings = plans.PrivacySettings(epsilon=epsilon, delta="auto" if delta is None else delta)
        memory, parameters = None, None
    else:
        resolved = resolve(recipe, assignments)
        settings = resolved.privacy
        if epsilon is not None:
            settings = replace(settings, epsilon=epsilon, noise_multiplier=None)
        if delta is not None:
            settings = replace(settings, delta=delta)
        sizes["population"] = population if population is not None else _public_population(resolved)
        sizes["expected_batch_size"] = expected_batch_size or resolved.training.expected_batch_size
        sizes["steps"] = steps or resolved.training.steps
        memory, parameters = _memory(resolved)
    if population is not None:
        settings = replace(settings, population=population)
    try:
        found = plans.make_plan(settings, **sizes, parameters=parameters, memory_bytes=memory)  # pyright: ignore[reportArgumentType]
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
        **_plan_values(found, accountant),
        "parameters": parameters,
        "refusals": [],
        "warnings": plans.warnings_of(found),
    }


def _plan_values(found: PrivacyPlan, accountant: str) -> dict[str, Any]:
    common = {
        "population": found.population,
        "expected_batch_size": found.expected_batch_size,
        "steps": found.steps,
        "sampling_rate": found.sampling_rate,
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
    accountants = accounting.accountants([found.event()], found.delta)
    return {
        **common,
        "noise_multiplier": found.noise_multiplier,
        "epsilon": accountants[accountant],
        "delta": found.delta,
        "adjacency": found.adjacency,
        "max_grad_norm": found.max_grad_norm,
        "accountants": accountants,
        "accountant": accountant,
    }


def _public_population(recipe: Recipe) -> int:
    """N without reading the data where it is known, else by reading them."""
    data, privacy = recipe.data, recipe.privacy
    if privacy.population is not None:
        return privacy.population
    if data.source == "clinic" and privacy.unit == "person":
        return min(data.units, data.limit_units or data.units)
    if data.source in PUBLIC_POPULATION:
        return min(PUBLIC_POPULATION[data.source], data.limit_units or PUBLIC_POPULATION[data.source])
    return len({record.unit for record in _load(recipe).private})


def _load(recipe: Recipe) -> Any:
    from sfumato.data import prepare

    return prepare.load(recipe.data, unit=recipe.privacy.unit)


def _build(recipe: Recipe) -> Any:
    from sfumato.models import model

    side = recipe.data.image_size
    return model.build(recipe.model, picture_shape=(side, side, recipe.data.channels), seed=recipe.training.seed)


def _memory(recipe: Recipe) -> tuple[int, int]:
    """Bytes left for weights and optimizer when a physical batch is on its way; and the number of parameters."""
    model = _build(recipe)
    units = recipe.training.expected_batch_size * 1.2 + 20  # a sampled batch is seldom larger
    units = min(units, recipe.performance.max_physical_batch_size or units)
    batch = int(units * recipe.privacy.records_per_unit) * model.bytes_per_row()
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return there - batch, sum(p.numel() for p in model.parameters() if p.requires_grad)


# -- train --


def train(
    recipe: str,
    *,
    assignments: Sequence[str] = (),
    out: Path | str = "runs",
    resume: bool = False,
    progress: Progress = _quiet,
) -> dict[str, Any]:
    """One recipe, one run: trains, measures, attacks, reports, and releases if the gate approves."""
    wanted = resolve(recipe, assignments)
    run = _resumed(Path(out), wanted) if resume else None
    progress(f"{wanted.name}: reading the data")
    prepared = _load(wanted)
    model = _build(wanted)
    table = model.encode(prepared.private)
    if run is None:
        plan = _make_plan(wanted, table)
        run = _begin(Path(out), wanted, plan, prepared)
    else:
        plan = plans.plan_from_dict(run.read_json("plan.json"))
    _say_plan(plan, progress)
    progress(f"{wanted.name}: writing to {run.path}")
    if run.finished:
        stopped = "steps"
    else:
        stopped = _train(run, wanted, plan, model, table, prepared, progress)
        if stopped == "interrupted":
            return {**_result(run), "stopped": stopped}
    if not run.report("quality").is_file():
        _evaluate(run, wanted, plan, prepared, progress, table=table)
    if not run.report("audit").is_file():
        _audit(run, wanted, plan, prepared, progress)
    reasons = _release(run, wanted, progress) if isinstance(plan, DpSgd) else []
    _render(run, public=False)
    return {**_result(run), "stopped": stopped, "reasons": reasons}


def _make_plan(recipe: Recipe, table: Any) -> PrivacyPlan:
    memory, parameters = _memory(recipe)
    return plans.make_plan(
        recipe.privacy,
        steps=recipe.training.steps,
        expected_batch_size=recipe.training.expected_batch_size,
        population=table.num_units,
        records=table.num_records,
        parameters=parameters,
        memory_bytes=memory,
    )


def _say_plan(plan: PrivacyPlan, progress: Progress) -> None:
    if isinstance(plan, DpSgd):
        progress(
            f"plan: {plan.steps} steps over {plan.population} {plan.unit}s, sampling rate {plan.sampling_rate:.4g}, "
            f"noise multiplier {plan.noise_multiplier:.4g}, epsilon {plan.epsilon():.3f} at delta {plan.delta:.2g}"
        )
    for warning in plans.warnings_of(plan):
        progress(f"note: {warning['message']} · {warning['next']}")


def _begin(out: Path, recipe: Recipe, plan: PrivacyPlan, prepared: Any) -> RunFolder:
    run = folders.fresh(out, recipe.name)
    run.write_text("recipe.yaml", recipes_file.to_yaml(recipe))
    run.write_json("plan.json", plans.plan_to_dict(plan))
    run.write_json("data_card.json", prepared.card)
    _examples(run, prepared)
    run.write_text("resolved.yaml", recipes_file.to_yaml(recipe))  # last: a folder with it is a run that can be resumed
    return run


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


def _examples(run: RunFolder, prepared: Any) -> list[str]:
    """Captions for the sample grids, of public records, beside the pictures that they really belong to."""
    from sfumato.training.watch import write_grid

    chosen, units = [], set()
    for record in prepared.public:
        if record.unit not in units and record.text and record.image is not None:
            chosen.append(record)
            units.add(record.unit)
    chosen = chosen[:: max(1, len(chosen) // GRID)][:GRID]
    if chosen:
        import numpy as np

        write_grid(run.samples / "real.png", np.stack([record.image for record in chosen]), columns=6)
    captions = [record.text for record in chosen]
    run.write_json("samples/captions.json", captions)
    return captions


def _train(
    run: RunFolder, recipe: Recipe, plan: PrivacyPlan, model: Any, table: Any, prepared: Any, progress: Progress
) -> str:
    """Trains to the end of the plan and writes the model and its claim. Returns how it stopped."""
    from sfumato.training import loop, watch

    watchers: list[watch.Watcher] = [
        watch.Line(progress),
        watch.MetricsFile(run.path / "metrics.jsonl"),
        watch.Pictures(run.samples, run.read_json("samples/captions.json"), seed=recipe.training.seed),
    ]
    if recipe.training.tensorboard:
        watchers.append(watch.Board(run.path / "tensorboard"))
    processor = time.process_time()
    with _ledger(run, recipe, plan, prepared) as ledger:
        trained = loop.train(
            model,
            table,
            plan,
            recipe.training,
            recipe.performance,
            checkpoints=run.checkpoints,
            ledger=ledger if isinstance(plan, DpSgd) else None,
            watchers=watchers,
        )
        spent = ledger.spent() if isinstance(plan, DpSgd) else []
        others = ledger.other_runs()
    if trained.stopped == "interrupted":
        return trained.stopped
    model.save(run.model)
    _write_final(run, model, recipe)
    _write_taint(run, model)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    cost = CostReport(
        seconds=trained.seconds,
        processor_seconds=time.process_time() - processor,
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        steps=trained.step,
        units_per_second=trained.units_seen / max(trained.seconds, 1e-9),
        parameters=parameters,
        machine=f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, no accelerator used",
    )
    run.write_json("reports/cost.json", to_dict(cost))
    claim = guarantee(
        plan,
        spent,
        boundary=_boundary(recipe),
        not_for_release="" if trained.for_release else "chance came from a test source",
        composed_with=others,
    )
    run.write_json("reports/privacy.json", to_dict(claim))  # last: with it the training counts as finished
    return trained.stopped


def _ledger(run: RunFolder, recipe: Recipe, plan: PrivacyPlan, prepared: Any) -> Ledger:
    account = None
    if isinstance(plan, DpSgd):
        account = recipe.privacy.account or prepared.account_home / ".sfumato" / "account.db"
    has_state = (run.checkpoints / "last").exists()
    return Ledger.open(run.ledger, run=run.name, plan=plan, account=account, create=not has_state)


def _boundary(recipe: Recipe) -> list[str]:
    data, text = recipe.data, recipe.model.text
    sentences = [
        "Inside: the training of every weight of the model, over all steps and attempts that the ledger holds; "
        "the weights, their moving average and everything computed from them.",
        f"Declared public: {data.public_units} units set aside before training and never trained on; they measure the "
        "quality and are shown in the report.",
        "Declared public: the recipe, its settings, and the choice of them.",
        "No vocabulary, normaliser or checkpoint was chosen by looking at private records.",
    ]
    match text.kind:
        case "hashed_words":
            sentences.append(
                "The text encoder is trained inside the guarantee; its features are a fixed public hash of words."
            )
        case "frozen_sentence":
            sentences.append(
                f"The sentence encoder {text.name} is public and frozen; only the layers after it are trained."
            )
    if data.source == "clinic":
        sentences.append(
            "The records are generated: a phantom, nobody's data. The guarantee is exercised, nobody needs it."
        )
    return sentences


def _write_final(run: RunFolder, model: Any, recipe: Recipe) -> None:
    from sfumato.training.watch import write_grid

    captions = run.read_json("samples/captions.json")
    if captions:
        write_grid(run.samples / "final.png", model.generate(captions, seed=recipe.training.seed), columns=6)


def _write_taint(run: RunFolder, model: Any) -> None:
    """Every tensor of the saved model was trained by the mechanism; what the model cannot name stays uncovered."""
    from sfumato.models.model import named_tensors
    from sfumato.release import provenance

    trained = set(named_tensors(model))
    provenance.write_taint(run.path, lambda file, name: "dp-sgd" if (file, name) in trained else "constant")


# -- after training --


def _evaluate(
    run: RunFolder, recipe: Recipe, plan: PrivacyPlan, prepared: Any, progress: Progress, *, table: Any = None
) -> QualityReport:
    from sfumato.evaluation import report
    from sfumato.models import model as models

    twin = None
    if recipe.evaluation.twin and isinstance(plan, DpSgd):
        twin = _twin(run, recipe, plan, table if table is not None else None, prepared, progress)
    progress("evaluation: generating and reading pictures")
    trained = models.load(run.model)
    quality = report.evaluate(
        lambda captions: trained.generate(captions, seed=1),
        prepared.public,
        prepared.facts,
        recipe.evaluation,
        covered_by="post-processing" if isinstance(plan, DpSgd) else "internal",
        twin=None if twin is None else lambda captions: twin.generate(captions, seed=1),
    )
    run.write_json("reports/quality.json", to_dict(quality))
    return quality


def _twin(run: RunFolder, recipe: Recipe, plan: DpSgd, table: Any, prepared: Any, progress: Progress) -> Any:
    """The same model, data, steps and batches without clipping and noise. Internal: it protects nobody."""
    from sfumato.training import loop, watch
    from sfumato.training.settings import TrainingSettings

    progress("twin: the same training without privacy, to say what privacy costs (never released)")
    model = _build(recipe)
    table = model.encode(prepared.private) if table is None else table
    open_plan = NotPrivate(
        population=plan.population,
        expected_batch_size=plan.expected_batch_size,
        steps=plan.steps,
        unit=plan.unit,
        records_per_unit=plan.records_per_unit,
    )
    settings: TrainingSettings = replace(recipe.training, checkpoint_every_seconds=60.0)
    internal = run.path / "internal" / "twin"
    loop.train(
        model, table, open_plan, settings, recipe.performance,
        checkpoints=internal / "checkpoints", watchers=[watch.Line(progress)],
    )  # fmt: skip
    captions = run.read_json("samples/captions.json")
    if captions:
        watch.write_grid(internal / "final.png", model.generate(captions, seed=recipe.training.seed), columns=6)
    return model


def _audit(run: RunFolder, recipe: Recipe, plan: PrivacyPlan, prepared: Any, progress: Progress) -> Any:
    import torch

    from sfumato.auditing import membership, report
    from sfumato.models import model as models

    progress("audit: attacking the model, and a model trained without noise")
    trained = models.load(run.model)
    members, outsiders = trained.encode(prepared.private), trained.encode(prepared.public)

    def losses_of(model: Any) -> membership.RowLosses:
        def row_losses(batch: Any) -> Any:
            with torch.no_grad():
                return model.row_losses(batch, recipe.audit.draws, torch.Generator().manual_seed(0))

        return row_losses

    def control() -> tuple[Any, Any]:
        return _control_scores(run, recipe, plan, prepared, losses_of, progress)

    audit = report.audit(
        losses_of(trained),
        members,
        outsiders,
        recipe.audit,
        delta=plan.delta if isinstance(plan, DpSgd) else None,
        claimed_epsilon=_claim(run).epsilon,
        control=control,
        records_per_unit=plan.records_per_unit,
    )
    run.write_json("reports/audit.json", to_dict(audit))
    return audit


CONTROL_UNITS = 300  # few, so that a model without noise learns them by heart
CONTROL_STEPS = 400


def _control_scores(
    run: RunFolder,
    recipe: Recipe,
    plan: PrivacyPlan,
    prepared: Any,
    losses_of: Callable[[Any], Any],
    progress: Progress,
) -> tuple[Any, Any]:
    """Scores of members and non-members of a model that was trained without noise on few units: it must be caught."""
    import numpy as np

    from sfumato.auditing import membership
    from sfumato.training import loop, watch

    names = sorted({record.unit for record in prepared.private})[:CONTROL_UNITS]
    kept = set(names)
    model = _build(recipe)
    inside = model.encode([record for record in prepared.private if record.unit in kept])
    outside = model.encode(prepared.public)
    few = NotPrivate(
        population=inside.num_units,
        expected_batch_size=max(1.0, inside.num_units / 2),
        steps=CONTROL_STEPS,
        unit=plan.unit,
        records_per_unit=plan.records_per_unit,
    )
    settings = replace(recipe.training, schedule="constant", checkpoint_every_seconds=1e9, learning_rate=1e-3)
    loop.train(
        model, inside, few, settings, recipe.performance,
        checkpoints=run.path / "internal" / "control", watchers=[watch.Line(progress)],
    )  # fmt: skip
    units = np.arange(inside.num_units)
    others = np.arange(min(outside.num_units, 2 * inside.num_units))
    return (
        membership.scores(losses_of(model), inside, units=units, records_per_unit=plan.records_per_unit),
        membership.scores(losses_of(model), outside, units=others, records_per_unit=plan.records_per_unit),
    )


def _release(run: RunFolder, recipe: Recipe, progress: Progress) -> list[dict[str, str]]:
    """Writes the bundle if the gate approves. Returns the reasons if not."""
    from sfumato.release import bundle, keys

    progress("release: asking the gate")
    try:
        bundle.write(run.path, run.path / "bundle", keys.own(), settings=recipe.release)
    except PrivacyRefused as refused:
        return refused.refusals
    return []


def _render(run: RunFolder, *, public: bool) -> dict[str, str]:
    from sfumato.release import page

    name = "public-report" if public else "report"
    run.write_text(f"reports/{name}.html", page.render(run.path, public=public))
    run.write_json(f"reports/{name}.json", page.as_json(run.path, public=public))
    return {"html": str(run.path / "reports" / f"{name}.html"), "json": str(run.path / "reports" / f"{name}.json")}


def _claim(run: RunFolder) -> Guarantee:
    return Guarantee(**run.read_json("reports/privacy.json"))


def _result(run: RunFolder) -> dict[str, Any]:
    """What ``train`` answers, from what lies in the run's folder."""
    claim = _claim(run) if run.finished else None
    cost = run.read_json("reports/cost.json") if run.report("cost").is_file() else {}
    bundle, html = run.path / "bundle", run.path / "reports" / "report.html"
    return {
        "run": str(run.path),
        "epsilon": claim.epsilon if claim else None,
        "delta": claim.delta if claim else None,
        "steps": cost.get("steps"),
        "seconds": cost.get("seconds"),
        "quality": _quality_values(run),
        "bundle": str(bundle) if (bundle / "manifest.json").is_file() else None,
        "html": str(html) if html.is_file() else None,
    }


def _quality_values(run: RunFolder) -> dict[str, Any]:
    if not run.report("quality").is_file():
        return {}
    return {figure["name"]: figure for figure in run.read_json("reports/quality.json")["figures"]}


def _opened(run: Path | str) -> tuple[RunFolder, Recipe, PrivacyPlan]:
    """A finished run with its recipe and plan."""
    found = folders.existing(run)
    if not found.finished:
        raise UsageError(
            f"run = {found.path} · its training is not finished", next="Run `sfumato train ... --resume` first."
        )
    return found, recipes_file.load(found.path / "resolved.yaml"), plans.plan_from_dict(found.read_json("plan.json"))


def evaluate(run: Path | str, *, progress: Progress = _quiet) -> dict[str, Any]:
    """Measures a finished run anew, and writes its report again."""
    found, recipe, plan = _opened(run)
    _evaluate(found, recipe, plan, _load(recipe), progress)
    return {"run": str(found.path), "quality": _quality_values(found), **_render(found, public=False)}


def audit(run: Path | str, *, progress: Progress = _quiet) -> dict[str, Any]:
    """Attacks a finished run anew, and writes its report again."""
    found, recipe, plan = _opened(run)
    result = _audit(found, recipe, plan, _load(recipe), progress)
    _render(found, public=False)
    return {"run": str(found.path), **to_dict(result), "conformance": []}


def report(run: Path | str, *, public: bool = False) -> dict[str, Any]:
    """Writes the page and the JSON of a run, finished or not."""
    return _render(folders.existing(run), public=public)


def release(run: Path | str, *, policy: Path | str | None = None) -> dict[str, Any]:
    """Asks the gate, and writes a signed bundle if it approves."""
    found, recipe, _ = _opened(run)
    if policy is not None:
        values = recipes_file.read_mapping(policy)
        recipe = recipes_file.from_mapping({**recipes_file.to_mapping(recipe), "release": values})
    reasons = _release(found, recipe, _quiet)
    return {
        "run": str(found.path),
        "bundle": None if reasons else str(found.path / "bundle"),
        "approved": not reasons,
        "reasons": reasons,
    }


def generate(
    run_or_bundle: Path | str, *, texts: Sequence[str], count: int = 1, out: Path | str = "generated", seed: int = 0
) -> dict[str, Any]:
    """Draws ``count`` pictures for each text. Spends nothing: it is post-processing."""
    import numpy as np

    from sfumato.models import model as models
    from sfumato.training.watch import write_grid

    if not texts or count < 1:
        raise UsageError(f"texts = {list(texts)}, count = {count} · at least one of each", next='Give --text "…".')
    folder = Path(run_or_bundle).resolve()
    if not (folder / "model").is_dir():
        raise UsageError(f"model = {folder} · has no folder model/", next="Give a finished run's folder, or a bundle.")
    model = models.load(folder / "model")
    wanted = [text for text in texts for _ in range(count)]
    pictures = model.generate(wanted, seed=seed)
    files = []
    for i, picture in enumerate(pictures):
        path = Path(out) / f"{i // count:03d}-{i % count:03d}.png"
        write_grid(path, np.asarray(picture)[None], columns=1)
        files.append(str(path))
    return {"files": files, "model": str(folder / "model"), "texts": wanted, "watermarked": False}


def runs(folder: Path | str = "runs") -> dict[str, Any]:
    """Every run in a folder, oldest first."""
    found = []
    for run in folders.listed(Path(folder)):
        claim = _claim(run) if run.finished else None
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


# -- federate --


def federate(
    recipe: str,
    *,
    assignments: Sequence[str] = (),
    out: Path | str = "runs",
    sites: int | None = None,
    rounds: int | None = None,
    engine: str = "simulation",
    progress: Progress = _quiet,
) -> dict[str, Any]:
    """A federation in one process: DP-SGD at each site on its own plan and ledger, federated averaging of differences."""
    from sfumato.federation import simulate
    from sfumato.federation.local import Site, load_trained
    from sfumato.training.rounds import LocalTraining
    from sfumato.training.watch import write_grid

    if engine != "simulation":
        raise UsageError(f"engine = {engine} · only simulation is there", next="Use --engine simulation.")
    wanted = resolve(recipe, assignments)
    federation = replace(
        wanted.federation, sites=sites or wanted.federation.sites, rounds=rounds or wanted.federation.rounds
    )
    wanted = replace(wanted, name=f"{wanted.name}-federated", federation=federation)
    progress(f"{wanted.name}: reading the data")
    prepared = _load(wanted)
    model = _build(wanted)
    members = []
    run_placeholder: dict[str, PrivacyPlan] = {}
    split = simulate.split_by_site(prepared.private, federation.sites)
    tables = {name: model.encode(records) for name, records in split.items()}
    total = sum(table.num_units for table in tables.values())
    for name, table in tables.items():
        share = max(1.0, wanted.training.expected_batch_size * table.num_units / total)
        run_placeholder[name] = simulate.site_plan(
            wanted.privacy, federation, expected_batch_size=share, population=table.num_units
        )
    run = _begin(Path(out), wanted, next(iter(run_placeholder.values())), prepared)
    for number, (name, table) in enumerate(tables.items(), start=1):
        folder = run.path / "sites" / f"site-{number}"
        members.append(
            Site(
                name=name,
                table=table,
                plan=run_placeholder[name],
                ledger=folder / "ledger.db",
                account=prepared.account_home / ".sfumato" / f"account-site-{number}-of-{federation.sites}.db",
            )
        )
    captions = run.read_json("samples/captions.json")

    def on_round(result: Any, state: Any) -> None:
        load_trained(model, state)
        progress(
            f"round {result.round}/{federation.rounds}: {len(result.sites)} of {len(members)} sites, {result.steps} steps"
        )
        if captions:
            pictures = model.generate(captions, seed=wanted.training.seed)
            write_grid(run.samples / f"step-{result.round:06d}.png", pictures, columns=6)

    began, processor = time.monotonic(), time.process_time()
    result = simulate.simulate(
        members,
        build=lambda: _build(wanted),
        train_steps=LocalTraining(wanted.training, wanted.performance),
        rounds=federation.rounds,
        local_steps=federation.local_steps,
        run=run.name,
        on_round=on_round,
    )
    load_trained(model, result.state)
    model.eval()
    model.save(run.model)
    _write_final(run, model, wanted)
    _write_taint(run, model)
    described = result.to_dict()
    for site in described["sites"]:
        site["units"] = site["population"]
    run.write_json("reports/federation.json", {**described, "rounds": described["rounds_detail"]})
    seconds = time.monotonic() - began
    run.write_json(
        "reports/cost.json",
        to_dict(
            CostReport(
                seconds=seconds,
                processor_seconds=time.process_time() - processor,
                peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                steps=sum(r.steps for r in result.rounds),
                units_per_second=math.nan
                if seconds <= 0
                else sum(r.steps for r in result.rounds)
                * wanted.training.expected_batch_size
                / federation.sites
                / seconds,
                parameters=sum(p.numel() for p in model.parameters()),
                bytes_sent=result.bytes_up + result.bytes_down,
                machine=f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, all sites in one process",
            )
        ),
    )
    run.write_json("reports/privacy.json", to_dict(_federated_claim(wanted, members, result)))
    _evaluate(
        run, replace(wanted, evaluation=replace(wanted.evaluation, twin=False)), members[0].plan, prepared, progress
    )
    pages = _render(run, public=False)
    return {
        "run": str(run.path),
        "rounds": len(result.rounds),
        "sites": [{**site, "refused": len(site["refused"])} for site in described["sites"]],
        "epsilon": result.epsilon,
        "bytes_up": result.bytes_up,
        "bytes_down": result.bytes_down,
        "quality": _quality_values(run),
        **pages,
    }


def _federated_claim(recipe: Recipe, members: Sequence[Any], result: Any) -> Guarantee:
    """Every person's epsilon is that of their own site; what is said of all is the largest."""
    from sfumato.privacy import ledger

    def spent(site: Any) -> float:
        return ledger.show(site.ledger)["epsilon"] if site.ledger.is_file() else 0.0

    if isinstance(members[0].plan, NotPrivate):
        return guarantee(members[0].plan, [], boundary=_boundary(recipe))
    worst = max(members, key=spent)
    claim = guarantee(
        worst.plan,
        ledger.events_of_jsonl(ledger.export_jsonl(worst.ledger)),
        boundary=[
            *_boundary(recipe),
            f"Sites hold different {recipe.privacy.unit}s: what is stated is the largest of the sites' epsilons "
            f"({worst.name}); a {recipe.privacy.unit} at several sites pays their composition.",
            "Public at every site: its number of units, its sampling rate, its local steps.",
        ],
        not_for_release="a federated run has a ledger for each site; a bundle states one",
    )
    return replace(claim, trust_model="local: each site adds its noise before anything is sent")
