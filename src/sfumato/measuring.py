"""What is measured of a trained model, and what it is measured beside: figures, attacks, a twin and a control without privacy.

[shell: writes into the run's folder]
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from sfumato import building, pretraining, prompt_quality, prompting, releasing, warming
from sfumato.privacy import planning
from sfumato.privacy.plan import DpSgd, NotPrivate, PrivacyPlan, TrainingPlan
from sfumato.privacy.private_plan import PrivatePlan
from sfumato.privacy.site_updates import SiteUpdates
from sfumato.privacy.warm_planning import in_steps
from sfumato.recipe import Recipe
from sfumato.reports import Guarantee, QualityReport, to_dict
from sfumato.training.folder import RunFolder

Progress = Callable[[str], None]


def quality_watch(
    run: RunFolder, recipe: Recipe, plan: PrivacyPlan, model: Any, prepared: Any, progress: Progress
) -> Any:
    """What watches the public loss while records are trained on; None where nothing is trained on records, or nobody asked."""
    from sfumato.evaluation.watching import QualityWatch
    from sfumato.models.generative import Generative

    if not recipe.evaluation.watch or not isinstance(model, Generative):
        return None
    return QualityWatch(
        run.path,
        model,
        prepared.public,
        tuple(prepared.facts),
        recipe.evaluation,
        progress,
        private=isinstance(plan, PrivatePlan),
        of_sites=isinstance(plan, SiteUpdates),
    )


def evaluate(
    run: RunFolder, recipe: Recipe, plan: PrivacyPlan, prepared: Any, progress: Progress, *, table: Any = None
) -> QualityReport:
    from sfumato.evaluation import report, watching
    from sfumato.models import model as models

    if prompting.is_prompts(recipe):
        return prompt_quality.evaluate(run, recipe, plan, prepared, progress)
    twin = None
    steps = in_steps(plan)
    if recipe.evaluation.twin and isinstance(steps, DpSgd):
        twin = _twin(run, recipe, steps, table, prepared, progress)
    progress("evaluation: generating, and reading what was made")
    trained = models.load(run.model)
    quality = report.evaluate(
        trained,
        prepared.public,
        prepared.facts,
        recipe.evaluation,
        covered_by="post-processing" if isinstance(plan, PrivatePlan) else "internal",
        twin=twin,
        start=pretraining.alone(run, recipe) if recipe.public_start is not None else None,
    )
    worth = " ".join(filter(None, (_worth(quality), _beyond_the_start(quality))))
    fell = watching.note(watching.history(run.path))
    notes = [*([worth] if worth else []), *([fell] if fell else []), *quality.notes]
    for warning in planning.warnings_of(plan, parameters=_trained_numbers(recipe), sites=_units_of_sites(run)):
        if warning["code"] in ("few_units", "epsilon_small"):
            notes.insert(1 if worth else 0, f"{warning['message']}. {warning['next']}")
    for note in notes[: len(notes) - len(quality.notes)]:
        progress(f"quality: {note}")
    quality = replace(quality, notes=notes)
    run.write_json("reports/quality.json", to_dict(quality))
    return quality


def _units_of_sites(run: RunFolder) -> list[int]:
    """Of a federation, the units of every site that took part; of one training nothing."""
    claim = run.read_json("reports/privacy.json") if run.report("privacy").is_file() else {}
    return [site["population"] for site in claim.get("sites") or [] if site["epsilon"] is not None]


def _trained_numbers(recipe: Recipe) -> int:
    return sum(p.numel() for p in building.build(recipe).parameters() if p.requires_grad)


def _worth(quality: QualityReport) -> str:
    """How much of what real records say of their conditions the generated ones say; guessing says nothing."""
    shares: dict[str, list[tuple[str, float]]] = {}
    for figure in quality.figures:
        real = figure.baseline.get("real held-out")
        guess = figure.baseline.get("shuffled captions", figure.baseline.get("shuffled conditions"))
        if real is not None and guess is not None and real > guess and not figure.name.endswith("kappa: mean"):
            name = figure.name.removeprefix(f"{figure.direction}: ")
            shares.setdefault(figure.direction, []).append((name, (figure.value - guess) / (real - guess)))
    said = []
    for direction, found in shares.items():
        best, worst = max(found, key=lambda s: s[1]), min(found, key=lambda s: s[1])
        mean = sum(share for _, share in found) / len(found)
        first = "Where real held-out records stand for 100 % and shuffled conditions for 0 %, the generated ones reach "
        begin = first if not said else ""
        at = f"{direction}: " if len(shares) > 1 else ""
        said.append(
            f"{begin}{at}{mean:.0%} on average: best {best[0]}, {best[1]:.0%}; worst {worst[0]}, {worst[1]:.0%}."
        )
    return " ".join(said)


def _beyond_the_start(quality: QualityReport) -> str:
    """Which figures the private steps made better, and which not, of those that the public start has too."""
    found: dict[bool, list[str]] = {True: [], False: []}
    for figure in quality.figures:
        start = figure.baseline.get("public start alone")
        if start is not None:
            better = figure.value > start if figure.better == "higher" else figure.value < start
            found[better].append(figure.name.removeprefix(f"{figure.direction}: "))
    if not (found[True] or found[False]):
        return ""
    rest = f"; not better: {', '.join(found[False])}" if found[False] else ""
    return f"Better than the public start alone: {', '.join(found[True]) or 'nothing'}{rest}."


def _twin(run: RunFolder, recipe: Recipe, plan: DpSgd, table: Any, prepared: Any, progress: Progress) -> Any:
    """The same model, data, steps and batches without clipping and noise. Internal: it protects nobody."""
    from sfumato.training.samples import Samples

    progress("twin: the same training without privacy, to say what privacy costs (never released)")
    model = building.build(recipe)
    model.tell_public(building.told_public(prepared))
    table = building.encode(model, recipe, prepared.private) if table is None else table
    if recipe.privacy.warm_start is not None:
        warming.load(run, model)  # what it costs to train privately from there on
    if recipe.public_start is not None:
        pretraining.load(run, model)
    settings = replace(recipe.training, checkpoint_every_seconds=60.0)
    internal = run.path / "internal" / "twin"
    _train_openly(model, table, plan, settings, recipe, internal / "checkpoints", progress)
    Samples(internal, model.directions, prepared.public, seed=recipe.training.seed).write("final", model)
    return model


def _train_openly(
    model: Any, table: Any, plan: TrainingPlan, settings: Any, recipe: Recipe, checkpoints: Path, progress: Progress
) -> None:
    """Trains as ``plan`` says, without its privacy. Raises KeyboardInterrupt where Ctrl-C ended it: half of it is no answer."""
    from sfumato.training import loop, watch

    trained = loop.train(
        model,
        table,
        NotPrivate(
            population=plan.population,
            expected_batch_size=plan.expected_batch_size,
            steps=plan.steps,
            unit=plan.unit,
            records_per_unit=plan.records_per_unit,
        ),
        settings,
        recipe.performance,
        checkpoints=checkpoints,
        watchers=[watch.Line(progress)],
    )
    if trained.stopped == "interrupted":
        raise KeyboardInterrupt


def audit(run: RunFolder, recipe: Recipe, plan: PrivacyPlan, prepared: Any, progress: Progress) -> Any:
    import torch

    from sfumato.auditing import membership, report
    from sfumato.models import model as models

    progress("audit: attacking the model, and a model trained without noise")
    trained = models.load(run.model)
    members, outsiders = building.encode(trained, recipe, prepared.private), trained.encode(prepared.public)

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
        delta=plan.delta if isinstance(plan, PrivatePlan) else None,
        claimed_epsilon=Guarantee(**run.read_json("reports/privacy.json")).epsilon,
        control=control,
        records_per_unit=plan.records_per_unit,
    )
    run.write_json("reports/audit.json", to_dict(audit))
    return audit


CONTROL_UNITS = 300  # few, so that a model without noise learns them by heart; all of them where there are fewer


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

    names = sorted({record.unit for record in prepared.private})[:CONTROL_UNITS]
    kept = set(names)
    model = building.build(recipe)
    if recipe.public_start is not None:
        pretraining.load(run, model)
    inside = model.encode([record for record in prepared.private if record.unit in kept])
    outside = model.encode(prepared.public)
    if releasing.is_release(plan):
        inside = model.control_table(inside)
    else:
        model.tell_public(building.told_public(prepared))
    few = NotPrivate(
        population=inside.num_units,
        expected_batch_size=inside.num_units / 2,
        steps=recipe.audit.control_steps,
        unit=plan.unit,
        records_per_unit=plan.records_per_unit,
    )
    settings = replace(recipe.training, schedule="constant", checkpoint_every_seconds=1e9, learning_rate=1e-3)
    if model.learns_from_rows:  # of the others what was released is attacked itself
        _train_openly(model, inside, few, settings, recipe, run.path / "internal" / "control", progress)
    units = np.arange(inside.num_units)
    others = np.arange(min(outside.num_units, 2 * inside.num_units))
    return (
        membership.scores(losses_of(model), inside, units=units, records_per_unit=plan.records_per_unit),
        membership.scores(losses_of(model), outside, units=others, records_per_unit=plan.records_per_unit),
    )
