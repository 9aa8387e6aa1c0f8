"""One stage of a run each: its folder, its training, what is measured, what is written. ``workflow`` puts them in order.

[shell: reads the clock, and files through the packages below]
"""

import os
import platform
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sfumato import measuring, pretraining, prompting, releasing, starting, warm_parts, warming
from sfumato import recipe as recipes_file
from sfumato.building import build, told_public
from sfumato.data.settings import OWN
from sfumato.errors import DataError, PrivacyRefused
from sfumato.models.settings import Adapter, Bytes, FrozenSentence, HashedWords, Prompts, Terms, Tokenizer, Words
from sfumato.privacy import ledger, planning
from sfumato.privacy.clip_estimate import estimated, spent_before, with_bound
from sfumato.privacy.guarantee import guarantee
from sfumato.privacy.ledger import Ledger
from sfumato.privacy.plan import DpSgd, NotPrivate, PrivacyPlan
from sfumato.privacy.plan_json import plan_from_dict, plan_to_dict
from sfumato.privacy.private_plan import PrivatePlan
from sfumato.privacy.warm_planning import before_steps, in_steps, warmed
from sfumato.recipe import Recipe
from sfumato.reports import CostReport, Guarantee, to_dict
from sfumato.training import folder as folders
from sfumato.training.folder import RunFolder

Progress = Callable[[str], None]
ESTIMATES = "estimates.json"  # in a run's folder: what was estimated and paid for


def quiet(line: str) -> None:
    """Progress for callers who do not want any."""


# -- before training --


def load(recipe: Recipe) -> Any:
    from sfumato.data import prepare

    return prepare.load(recipe.data, unit=recipe.privacy.unit, private=recipe.privacy.mechanism != "none")


def memory_left(recipe: Recipe) -> tuple[int, int]:
    """Bytes left for weights and optimizer, in each process, when physical batches are on their way; number of parameters."""
    if prompting.is_prompts(recipe):
        parameters, row = prompting.sizes(recipe)
    else:
        model = build(recipe)
        parameters, row = sum(p.numel() for p in model.parameters() if p.requires_grad), model.bytes_per_row()
    units = recipe.training.expected_batch_size * 1.2 + 20  # a sampled batch is seldom larger
    units = min(units, recipe.performance.max_physical_batch_size or units)
    batch = int(units * recipe.privacy.records_per_unit) * row
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return (there - batch) // recipe.performance.processes, parameters


def check_preparation(recipe: Recipe) -> None:
    """Raises PrivacyRefused if the data would be prepared in a way that no guarantee for one unit covers."""
    if recipe.privacy.mechanism != "none":
        from sfumato.data import prepare

        prepare.refuse_coupled(recipe.data)


def check_parts(recipe: Recipe) -> None:
    """Raises UsageError if the recipe's parts are not those of its model: before a plan is made, not at the first step."""
    if recipe.privacy.parts and not prompting.is_prompts(recipe):  # those of prompts are `prompting.planned`'s
        from sfumato.privacy.gradients import groups

        groups.check_parts(build(recipe), {part.name: part.modules for part in recipe.privacy.parts})


def dimensions(recipe: Recipe) -> dict[str, int] | None:
    """Of what is released, where the mechanism is a release, or begins with one."""
    if recipe.privacy.warm_start is not None:
        return {"warm_start": warm_parts.dimension(warming.parts(recipe))}
    return build(recipe).dimensions if recipe.privacy.mechanism in releasing.KIND else None


def make_plan(recipe: Recipe, table: Any) -> PrivacyPlan:
    check_parts(recipe)
    memory, parameters = memory_left(recipe)
    return planning.make_plan(
        recipe.privacy,
        steps=recipe.training.steps,
        expected_batch_size=recipe.training.expected_batch_size,
        population=table.num_units,
        records=table.num_records,
        parameters=parameters,
        memory_bytes=memory,
        dimensions=dimensions(recipe),
    )


def say_plan(plan: PrivacyPlan, progress: Progress, *, parameters: int | None = None) -> None:
    named = {"mean_embedding": "a release to start from", "estimate": "an estimate of C"}
    first = "".join(
        f"{named[stage.mechanism(())['name']]} for epsilon {stage.epsilon():.3g}, then " for stage in before_steps(plan)
    )
    steps = in_steps(plan)
    if isinstance(steps, DpSgd) and isinstance(plan, PrivatePlan):
        progress(
            f"plan: {first}{steps.steps} steps over {plan.population} {plan.unit}s, sampling rate {steps.sampling_rate:.4g}, "
            f"noise multiplier {steps.noise_multiplier:.4g}{_parts_in_words(steps)}, epsilon {plan.epsilon():.3f} at delta {plan.delta:.2g}"
        )
    elif isinstance(plan, PrivatePlan):
        progress(
            f"plan: {_release_in_words(plan)} of {plan.population} {plan.unit}s, once, epsilon {plan.epsilon():.3f} at delta "
            f"{plan.delta:.2g}; then training on it, which spends nothing"
        )
    for warning in planning.warnings_of(plan, parameters=parameters):
        progress(f"note: {warning['message']} · {warning['next']}")


def _release_in_words(plan: PrivatePlan) -> str:
    """What is released, and with how much noise."""

    def one(values: dict[str, Any]) -> str:
        noise = values.get("modalities", [])
        detail = ", ".join(f"{m['name']} {m['dimension']} numbers, noise {m['noise_std']:.3g}" for m in noise)
        if values["name"] == "codebook":
            return (
                f"codes (of {values['categories']}, told as they are with probability {values['keep_probability']:.3f})"
            )
        return f"{values['name'].replace('_', ' ')} (noise multiplier {values['noise_multiplier']:.4g}{'; ' if detail else ''}{detail})"

    mechanism = plan.mechanism(())
    return " and ".join(one(stage) for stage in mechanism.get("stages", [mechanism]))


def _parts_in_words(plan: DpSgd) -> str:
    noise = plan.part_noise_multipliers()
    return f" ({', '.join(f'{name} {value:.4g}' for name, value in noise.items())})" if noise else ""


def begin(out: Path, recipe: Recipe, plan: PrivacyPlan, prepared: Any, model: Any) -> RunFolder:
    """A new run's folder. It counts as a run, and can be resumed, once ``mark_begun`` was called: when its ledger exists."""
    run = folders.fresh(out, recipe.name)
    run.write_text("recipe.yaml", recipes_file.to_yaml(recipe))
    run.write_json("plan.json", plan_to_dict(plan))
    run.write_json("data_card.json", prepared.card)
    samples(run, recipe, model, prepared).begin()
    return run


def plan_of(run: RunFolder) -> PrivacyPlan:
    """The plan that a run began with."""
    return plan_from_dict(run.read_json("plan.json"))


def mark_begun(run: RunFolder, recipe: Recipe) -> None:
    if not run.begun:
        run.write_text("resolved.yaml", recipes_file.to_yaml(recipe))


def require_same_data(run: RunFolder, prepared: Any) -> None:
    """Raises DataError if the private records are no longer as many as when the run began: its plan would be of others."""
    before = run.read_json("data_card.json")
    changed = [
        f"{name} {before[name]}, now {prepared.card[name]}"
        for name in ("units", "records")
        if before.get(name) != prepared.card.get(name)
    ]
    if changed:
        raise DataError(
            f"data = others than {run.path} began with ({'; '.join(changed)}) · a run keeps its data",
            next="Restore the data, or start a new run without --resume.",
        )


def samples(run: RunFolder, recipe: Recipe, model: Any, prepared: Any) -> Any:
    """What shows the model's directions on public examples, the same at every call."""
    from sfumato.training.samples import Samples

    return Samples(run.samples, model.directions, prepared.public, seed=recipe.training.seed)


# -- training --


def train(
    run: RunFolder, recipe: Recipe, plan: PrivacyPlan, model: Any, table: Any, prepared: Any, progress: Progress
) -> str:
    """Releases first where the plan is one, trains to the end, and writes the model and its claim. Returns how it stopped."""
    from sfumato.training import loop, watch

    processor = time.process_time()
    with _ledger(run, recipe, plan, prepared) as book:  # held to the end: nobody else writes to this run
        mark_begun(run, recipe)
        for note in book.notes:
            progress(f"note: {note}")
        released = releasing.is_release(plan)
        for_release = True
        if released:
            table, for_release = releasing.receive(run, book, recipe, plan, model, table, prompts(prepared))
            progress("released: what the plan says is charged, and lies in released/; from here on nothing is spent")
        else:
            model.tell_public(told_public(prepared))
        steps, estimates = releasing.loop_plan(recipe, table) if released else in_steps(plan), []
        if recipe.public_start is not None:
            if pretraining.begin(run, recipe, prepared, model, progress) == "interrupted":
                return "interrupted"
            if not starting.steps_have_begun(run):
                samples(run, recipe, model, prepared).write("step-000000", model)
        start = warmed(plan)
        if start is not None:
            stopped, for_release = warming.begin(
                run, book, recipe, start, model, prepared.private, prompts(prepared), progress
            )
            if stopped == "interrupted":
                return stopped
        if estimated(plan) is not None:
            steps, estimates = _with_its_bound(run, recipe, plan, model, table, book, progress)
        assert isinstance(steps, DpSgd | NotPrivate)
        watchers: list[watch.Watcher] = [
            watch.Line(progress, unspent="post-processing" if released else "not private"),
            watch.MetricsFile(run.path / "metrics.jsonl"),
            samples(run, recipe, model, prepared),
        ]
        quality = measuring.quality_watch(run, recipe, plan, model, prepared, progress)
        if quality is not None:
            watchers.append(quality)
        if recipe.training.tensorboard:
            watchers.append(watch.Board(run.path / "tensorboard"))
        if released and getattr(model, "fits_at_once", False):
            trained = _fitted(model, recipe, progress)
        else:
            trained = loop.train(
                model,
                table,
                steps,
                recipe.training,
                recipe.performance,
                checkpoints=run.checkpoints,
                ledger=book if isinstance(steps, DpSgd) else None,
                watchers=watchers,
                before=spent_before(plan),
            )
        if trained.stopped == "interrupted":
            return trained.stopped
        if quality is not None:
            quality.picture(trained.charged, model)  # the last weights, too
        write_model(run, model, recipe, prepared)
        run.write_json("reports/cost.json", to_dict(cost_of(trained, model, processor)))
        claim = guarantee(
            plan,
            book.spent() if isinstance(plan, PrivatePlan) else [],
            boundary=[
                *boundary(
                    recipe,
                    released=releasing.boundary(recipe, model, plan) if released else (),
                    family=() if released else model.boundary(),
                    start=() if recipe.public_start is None else pretraining.boundary(run, recipe, model),
                ),
                *(warming.boundary(recipe) if start is not None else ()),
            ],
            not_for_release="" if trained.for_release and for_release else "chance came from a test source",
            composed_with=book.other_runs(),
            estimates=estimates,
        )
        run.write_json("reports/privacy.json", to_dict(claim))  # last: with it the training counts as finished
    return trained.stopped


def _fitted(model: Any, recipe: Recipe, progress: Progress) -> Any:
    """What was released, made into what is drawn from, without steps. It is post-processing: if it is cut, it begins anew."""
    from sfumato.training.loop import Trained

    began = time.monotonic()
    stopped = "steps"
    try:
        model.fit(recipe.training.seed, progress)
    except KeyboardInterrupt:
        stopped = "interrupted"
    return Trained(stopped=stopped, step=0, charged=0, seconds=time.monotonic() - began, units_seen=0, for_release=True)


def _with_its_bound(
    run: RunFolder, recipe: Recipe, plan: PrivacyPlan, model: Any, table: Any, book: Ledger, progress: Progress
) -> tuple[DpSgd, list[dict[str, Any]]]:
    """The steps with the C that the plan leaves to an estimate, and what was estimated."""
    from sfumato.training.bound import found_bound

    both = estimated(plan)
    assert both is not None  # or it is not asked
    found = found_bound(
        model,
        table,
        both[0],
        book,
        kept=lambda: run.read_json(ESTIMATES) if (run.path / ESTIMATES).is_file() else None,
        keep=lambda value: run.write_json(ESTIMATES, value),
        max_physical_batch_size=recipe.performance.max_physical_batch_size,
    )
    progress(f"max_grad_norm: {found['value']:.4g}, estimated ({found['low']:.4g} to {found['high']:.4g})")
    return with_bound(both[1], found["value"]), [found]


def cost_of(trained: Any, model: Any, processor_before: float) -> CostReport:
    return CostReport(
        seconds=trained.seconds,
        processor_seconds=time.process_time() - processor_before + trained.others_processor_seconds,
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + trained.others_peak_bytes,
        steps=trained.step,
        units_per_second=trained.units_seen / max(trained.seconds, 1e-9),
        parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        machine=f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, no accelerator used"
        + (f", {trained.processes} processes" if trained.processes > 1 else ""),
        processes=trained.processes,
    )


def prompts(prepared: Any) -> list[str]:
    """Their texts."""
    return [str(record.text) for record in told_public(prepared) if record.text]


def _ledger(run: RunFolder, recipe: Recipe, plan: PrivacyPlan, prepared: Any) -> Ledger:
    from sfumato.release import keys

    account = None
    if isinstance(plan, PrivatePlan):
        account = recipe.privacy.account or prepared.account_home / ".sfumato" / "account.db"
    key = keys.existing()  # a key is made at the first release, not here
    return Ledger.open(
        run.ledger,
        run=run.name,
        plan=plan,
        account=account,
        account_limit=account_limit(recipe, plan),
        create=not run.begun,
        sign=keys.signer(key) if key is not None else None,
    )


def account_limit(recipe: Recipe, plan: PrivacyPlan) -> tuple[float, float] | None:
    """(epsilon, delta) of all runs on the account together, if the recipe declares it."""
    epsilon = recipe.privacy.account_epsilon
    return (epsilon, plan.delta) if epsilon is not None and isinstance(plan, PrivatePlan) else None


def boundary(
    recipe: Recipe, *, released: Sequence[str] = (), family: Sequence[str] = (), start: Sequence[str] = ()
) -> list[str]:
    """Args:
    released: sentences on what was released, where the training saw nothing else.
    family: what the model's family says itself of its networks.
    start: what a training on public records says of itself.
    """
    data, text = recipe.data, recipe.model.text
    some = bool(recipe.public_start is not None and recipe.public_start.trained) or isinstance(
        recipe.model.objective, Adapter | Prompts
    )
    trained = (
        f"Inside: the training of {'the weights named below' if some else 'every weight of the model'}, over all steps and attempts "
        "that the ledger holds; the weights, their moving average and everything computed from them."
    )
    sentences = [
        *(released or [trained]),
        *start,
        *family,
        f"Declared public: {data.public_units} units set aside before training and never trained on; they measure the "
        "quality and are shown in the report.",
        "Declared public: the recipe, its settings, and the choice of them.",
        "No vocabulary, normaliser or checkpoint was chosen by looking at private records.",
    ]
    if data.limit_units is not None:
        sentences.append(
            f"Of all units in the data, the {data.limit_units} with the smallest hash of their names were taken, and the claim is with "
            "regard to these. With regard to the whole set, one unit added or removed exchanges another: twice the "
            "epsilon, and 1 + e^epsilon times the delta."
        )
    if data.source in OWN and data.unit_column is None:
        sentences.append(
            "Records have no names of their own: the claim is for a record that is emptied, not for one that is taken away and "
            "renumbers those after it."
        )
    match text:
        case _ if released:
            pass  # nothing of it is trained, and the sentences above name it
        case Terms():
            after = "" if some else "; the layers after it are trained inside the guarantee"
            sentences.append(f"Texts are read by a public list of terms, which is in the recipe{after}.")
        case HashedWords():
            sentences.append(
                "Texts are read by a fixed public hash of words."
                if some
                else "The text encoder is trained inside the guarantee; its features are a fixed public hash of words."
            )
        case FrozenSentence(name=name):
            after = "" if some else "; only the layers after it are trained"
            sentences.append(f"The sentence encoder {name} is public and frozen{after}.")
        case Bytes():
            sentences.append("Texts are read and said byte by byte: no vocabulary was fitted to anything.")
        case Words():
            sentences.append("Texts are read and said by a public list of words, which is in the recipe.")
        case Tokenizer(path=path):
            sentences.append(
                f"Declared public: the vocabulary of the tokenizer {Path(path).name}; whoever wrote the recipe says that it was fitted to "
                "public texts alone."
            )
    if recipe.model.image is not None and recipe.model.image.kind == "vae":
        from sfumato.models.codecs import vae

        sentences.append(
            "Declared public: the autoencoder of pictures, frozen, fitted to none of the private records; its sha256 is "
            f"{vae.fingerprint(recipe.model.image.folder)}."
        )
    if data.source == "clinic":
        sentences.append(
            "The records are generated: a phantom, nobody's data. The guarantee is exercised, nobody needs it."
        )
    return sentences


def write_model(run: RunFolder, model: Any, recipe: Recipe, prepared: Any) -> None:
    """The weights, the last samples, and by what each tensor is covered."""
    from sfumato.release import provenance

    model.save(run.model)
    samples(run, recipe, model, prepared).write("final", model)
    if not hasattr(model, "origins"):  # made from what was released, every tensor of it
        provenance.write_taint(run.path, lambda file, name: "released")
        return
    origins = model.origins()  # what the model cannot name is covered by nothing, and no bundle takes it
    provenance.write_taint(run.path, lambda file, name: origins.get((file, name), "unnamed"))


# -- after training --


def release(run: RunFolder, recipe: Recipe, progress: Progress) -> list[dict[str, str]]:
    """Writes the bundle if the gate approves. Returns the reasons if not."""
    from sfumato.release import bundle, keys

    progress("release: asking the gate")
    try:
        bundle.write(run.path, run.path / "bundle", keys.own(), settings=recipe.release)
    except PrivacyRefused as refused:
        return refused.refusals
    return []


def render(run: RunFolder, *, public: bool) -> dict[str, str]:
    from sfumato.release import page

    name = "public-report" if public else "report"
    run.write_text(f"reports/{name}.html", page.render(run.path, public=public))
    run.write_json(f"reports/{name}.json", page.as_json(run.path, public=public))
    return {"html": str(run.path / "reports" / f"{name}.html"), "json": str(run.path / "reports" / f"{name}.json")}


def claim_of(run: RunFolder) -> Guarantee:
    return Guarantee(**run.read_json("reports/privacy.json"))


def result(run: RunFolder) -> dict[str, Any]:
    """What ``train`` answers, from what lies in the run's folder; of an unfinished run, what was spent so far."""
    bundle, html = run.path / "bundle", run.path / "reports" / "report.html"
    cost = run.read_json("reports/cost.json") if run.report("cost").is_file() else {}
    answer = {
        "run": str(run.path),
        "epsilon": None,
        "delta": None,
        "steps": cost.get("steps"),
        "seconds": cost.get("seconds"),
        "quality": quality_values(run),
        "bundle": str(bundle) if (bundle / "manifest.json").is_file() else None,
        "html": str(html) if html.is_file() else None,
    }
    if run.finished:
        claim = claim_of(run)
        return {**answer, "epsilon": claim.epsilon, "delta": claim.delta}
    spent = ledger.show(run.ledger)
    return {**answer, "epsilon": spent["epsilon"], "delta": spent["delta"], "steps": spent["steps"]}


def quality_values(run: RunFolder) -> dict[str, Any]:
    if not run.report("quality").is_file():
        return {}
    return {figure["name"]: figure for figure in run.read_json("reports/quality.json")["figures"]}
