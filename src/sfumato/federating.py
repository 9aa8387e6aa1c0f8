"""A federated run from recipe to report; by default all sites in one process. [shell: reads the clock, writes the run's folder]"""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato import (
    building,
    federated_reports,
    measuring,
    pretraining,
    prompt_quality,
    prompting,
    stages,
    warm_parts,
    warming,
)
from sfumato import recipe as recipes_file
from sfumato.errors import UsageError
from sfumato.federated_reports import SERVER, Federated
from sfumato.federation.opening import PREFIX, Released
from sfumato.federation.policy import WITHOUT_TRUST, SitePolicy
from sfumato.privacy.plan import MeanEmbedding, PrivacyPlan, TrainingPlan
from sfumato.privacy.warm_planning import in_steps, warmed
from sfumato.randomness import Random
from sfumato.recipe import Recipe
from sfumato.stages import Progress
from sfumato.training.folder import RunFolder

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.federation.messages import Part as MessagePart
    from sfumato.federation.messages import State
    from sfumato.federation.public import Public
    from sfumato.federation.secure.keys import Identity
    from sfumato.federation.serving import Exchange
    from sfumato.federation.sites import Site, Work
    from sfumato.records import Record, UnitTable
    from sfumato.warm_parts import Part

    Engine = Callable[[Sequence[Site], Work, RunFolder], AbstractContextManager[Exchange]]

_NOTHING_YET: dict[str, Any] = {"rounds": [], "sites": [], "epsilon": None, "bytes_up": 0, "bytes_down": 0}


def here(members: "Sequence[Site]", work: "Work", folder: RunFolder) -> "AbstractContextManager[Exchange]":
    """The engine of one process."""
    from sfumato.federation.simulate import exchange_here

    return nullcontext(exchange_here(members, work))


def run(
    recipe: Recipe,
    *,
    out: Path,
    progress: Progress,
    resume: RunFolder | None = None,
    policy: SitePolicy | None = None,
    engine: "Engine" = here,
    members: "Sequence[Site] | None" = None,
    prepared: Any = None,
) -> dict[str, Any]:
    """Rounds of what each site learnt under its own plan, made private by ``federation.mechanism``, charged to the ledger of
    who adds the noise. With ``public_start`` the server trains on public records before the first round, and sends what it
    learnt from them as the weights that every site begins at: no site reads those records.

    Args:
      resume: the folder of a run that was begun; what is done in it is not done again.
      policy: of every site; by default what a site allows by itself, and the recipe's own mechanism: here are no strangers.
      engine: how asks reach the sites and replies come back; entered when the folder is there, left after the last round.
      members: the sites; by default the records of this machine are split into them.
      prepared: records of this machine, of which the public ones show and measure; by default the recipe's.
    Raises: UsageError for what sites cannot do; PrivacyRefused if a site has no plan that can work, or if no site took part in any round.
    """
    from sfumato.federation import mechanisms
    from sfumato.federation.local_training import load_trained, trained_state
    from sfumato.federation.simulate import simulate
    from sfumato.training.interrupt import interruptible

    prompting.planned(recipe)  # refuses what prompts have not
    federation = recipe.federation
    _check_public_start(recipe)
    if prepared is None:
        progress(f"{recipe.name}: reading the data")
        prepared = stages.load(recipe)
    prompting.ready(recipe, prepared)
    model = building.build(recipe)
    if getattr(model, "needs_public", False):
        raise UsageError(
            f"model.objective.kind = {model.family} · needs more than the tensors that sites exchange",
            next="Use `sfumato train`, or another family.",
        )
    members = list(members_here(recipe, prepared, model, policy) if members is None else members)
    work = work_for(recipe, members)
    promise = mechanisms.build(federation).promise(work.public)
    stated = promise.at_site or promise.at_server or members[0].whole
    if resume is None:
        folder = stages.begin(out, recipe, stated, prepared, model)
    else:
        folder = resume
        stages.require_same_data(folder, prepared)
    members = [replace(site, ledger=folder.path / site.ledger) for site in members]
    stages.mark_begun(folder, recipe)
    progress(f"{recipe.name}: writing to {folder.path}")
    result, seconds, processor, start = None, 0.0, 0.0, None
    if not folder.finished or federated_reports.lacks_ledgers(folder):
        if recipe.public_start is not None:
            if pretraining.begin(folder, recipe, prepared, model, progress) == "interrupted":
                return {**_answer(folder, _NOTHING_YET), "quality": {}, "stopped": "interrupted"}
            start = trained_state(model)
        shown = _Shown(recipe, folder, prepared, model, members, stated, progress)
        began, processor = time.monotonic(), time.process_time()
        with engine(members, work, folder) as exchange, interruptible() as stop:
            result = simulate(
                members,
                work,
                run=folder.name,
                folder=folder.path / SERVER,
                resume=resume is not None,
                start=start,
                on_round=shown,
                pause=stop.is_set,
                exchange=exchange,
                opened=_Opened(recipe, folder, model, prepared, work.public, progress, shown.look),
            )
            run = Federated(
                recipe=recipe, folder=folder, members=members, work=work, promise=promise, stated=stated, result=result
            )
            if result.finished:
                federated_reports.gather(run, exchange, progress)
        seconds, processor = time.monotonic() - began, time.process_time() - processor
        report = federated_reports.rounds_of(run)
        folder.write_json("reports/federation.json", report)
        if not result.finished:
            return {**_answer(folder, report), "quality": {}, "stopped": "interrupted"}
        federated_reports.require_any(result)
        load_trained(model, result.state, home={})
        model.eval()
        stages.write_model(folder, model, recipe, prepared)
        if prompting.is_prompts(recipe):
            prompt_quality.write_sites(folder, recipe, result.state, _homes([s for s in members if not s.elsewhere]))
        federated_reports.write(run, model, seconds=seconds, processor_seconds=processor, one_process=engine is here)
    else:
        progress(f"{recipe.name}: the training is finished already")
    if not folder.report("quality").is_file():
        measuring.evaluate(folder, recipe, stated, prepared, progress)
    return {
        **_answer(folder, folder.read_json("reports/federation.json")),
        "quality": stages.quality_values(folder),
        **stages.render(folder, public=False),
    }


class _Opened:
    """Of what the sites released before the first round, the weights that it begins at: post-processing, at the server."""

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        model: Any,
        prepared: Any,
        public: "Public",
        progress: Progress,
        look: "Callable[[int], object]",
    ) -> None:
        self._recipe, self._folder, self._model, self._public, self._progress = recipe, folder, model, public, progress
        self._look = look
        self._prompts = stages.prompts(prepared)
        if public.released:
            warming.usable(warming.parts(recipe), self._prompts)  # or it refuses, before anything is charged

    def __call__(self, released: "MessagePart") -> "State | None":
        from sfumato.federation import opening
        from sfumato.federation.local_training import trained_state

        own = [part for part in warming.parts(self._recipe) if part.name in released.tensors]
        stds = opening.noise_std(self._public, released)
        stopped = warming.learn(
            self._folder, self._recipe, self._model, own, dict(released.tensors), stds, self._prompts, self._progress
        )
        if stopped != "steps":
            return None
        self._look(0)
        return trained_state(self._model)


def _check_public_start(recipe: Recipe) -> None:
    """Raises UsageError where a site would not begin at what public records made: it is sent the exchanged parameters, no others."""
    if recipe.public_start is None:
        return
    pretraining.refuse(recipe)
    federation = recipe.federation
    for name, given in (
        ("public_start.trained", recipe.public_start.trained),
        ("federation.home", federation.home),
        ("federation.holds", federation.holds),
    ):
        if given:
            raise UsageError(
                f"{name} = {', '.join(given)} · with public_start, all parameters are trained by every site: what is not sent to it would "
                "begin as it was built, not at the public weights",
                next=f"Leave {name} out, or public_start.",
            )


class _Shown:
    """After every round: a line, a picture, the loss on public records, and why no further round is wanted."""

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        prepared: Any,
        model: Any,
        members: "Sequence[Site]",
        stated: PrivacyPlan,
        progress: Progress,
    ) -> None:
        self._recipe, self._model, self._members, self._progress = recipe, model, members, progress
        self._samples = stages.samples(folder, recipe, model, prepared)
        if prompting.is_prompts(recipe):
            homes = partial(_homes, members)
            self._quality = (
                prompt_quality.Watch(folder.path, recipe, prepared, homes) if recipe.evaluation.watch else None
            )
        else:
            self._quality = measuring.quality_watch(folder, recipe, stated, model, prepared, progress)
        if recipe.federation.patience is not None and self._quality is None:
            raise UsageError(
                f"patience = {recipe.federation.patience} · counts rounds without a lower public loss, and none is watched",
                next="Set evaluation.watch: true, or leave federation.patience out.",
            )
        self._best_round = 0

    def look(self, number: int) -> bool:
        """A picture, and the loss on public records, of the model as it is. Returns: whether it is the best so far."""
        self._samples.picture(number, self._model)
        return self._quality is not None and self._quality.picture(number, self._model)

    def __call__(self, result: Any, state: Any) -> str | None:
        from sfumato.federation.local_training import load_trained

        load_trained(self._model, state, home={})
        federation = self._recipe.federation
        sites = f"{len(result.sites)} of {len(self._members)} sites"
        discarded = f" · discarded: {result.discarded}" if result.discarded else ""
        if result.round == 0:
            self._progress(f"before the first round: {sites} released what the plan says, once{discarded}")
            return None
        few = f" · {result.unchanged} parameters unchanged, too few sites sent them" if result.unchanged else ""
        self._progress(f"round {result.round}/{federation.rounds}: {sites}, {result.steps} steps{few}{discarded}")
        if self.look(result.round):
            self._best_round = result.round
        if self._quality is None:
            return None
        if federation.patience is None or result.round - self._best_round < federation.patience:
            return None
        return f"the loss on public records was lowest in round {self._best_round}"


def _homes(members: "Sequence[Site]") -> "dict[str, dict[str, Any]]":
    """By site, the parameters that stay at it, for its own use and for what is measured here; of one elsewhere nothing is known."""
    from sfumato.federation.site_memory import kept_at_home

    return {site.name: {} if site.elsewhere else kept_at_home(site) for site in members}


def work_for(recipe: Recipe, members: "Sequence[Site]") -> "Work":
    """What runs at every site. Raises UsageError for what a site cannot do."""
    from sfumato.federation.simulate import work_of
    from sfumato.training.rounds import LocalTraining

    local = LocalTraining(recipe.training, recipe.performance, proximal=recipe.federation.proximal)
    return work_of(
        members,
        build=partial(building.build, recipe),
        train_steps=prompting.train_steps() if prompting.is_prompts(recipe) else local,
        settings=prompting.planned(recipe).federation,
        recipe=hashlib.sha256(recipes_file.to_yaml(recipe).encode()).hexdigest(),
        releases={
            site.name: {
                part.name: Released(shape=part.maker.shape, noise_std=part.std(site.opening))
                for part in parts_of(recipe, site.name)
            }
            for site in members
            if site.opening is not None
        },
    )


def members_here(recipe: Recipe, prepared: Any, model: Any, policy: SitePolicy | None) -> "list[Site]":
    """The sites whose records all lie on this machine, the place of each ledger within the run's folder. They have one key,
    this user's, as a run has. Records are encoded when a site first trains."""
    from sfumato.federation.simulate import split_by_site
    from sfumato.release import keys

    federation = recipe.federation
    if policy is None:
        policy = SitePolicy(allowed_mechanisms=tuple({*WITHOUT_TRUST, federation.mechanism.kind}))
    split = split_by_site(prepared.private, federation.sites, recipe.data.site_column)
    counted = tuple(len({record.unit for record in records}) for records in split.values())
    plans = plans_for(recipe, dict(zip(split, federation.populations or counted, strict=True)))
    accounts = prepared.account_home / ".sfumato"
    private = is_charged_at_site(recipe)
    key = keys.existing()  # a key is made at the first release, not here
    return [
        member(
            recipe,
            name,
            plans[name],
            table=cache(partial(encoded, recipe, name, records, model)),
            records=lambda records=records: records,
            ledger=Path("sites") / f"site-{number}" / "ledger.db",
            account=accounts / f"account-site-{number}-of-{federation.sites}.db" if private else None,
            sign=keys.signer(key) if key is not None else None,
            policy=policy,
            identity=identity(accounts / f"identity-site-{number}-of-{federation.sites}")
            if federation.mechanism.kind == "distributed"
            else None,
        )
        for number, (name, records) in enumerate(split.items(), start=1)
    ]


def encoded(recipe: Recipe, site: str, records: Sequence[Any], model: Any = None) -> "UnitTable":
    """Records as this site's model wants them. Args: model: one that is there already, where sites encode alike."""
    if prompting.is_prompts(recipe):
        return prompting.build(recipe, site).encode(records)
    return (building.build(recipe) if model is None else model).encode(records)


def is_charged_at_site(recipe: Recipe) -> bool:
    """Whether a site has an account: not where nothing is private."""
    return recipe.federation.mechanism.kind != "record_level" or recipe.privacy.mechanism != "none"


def plans_for(recipe: Recipe, populations: Mapping[str, int]) -> dict[str, PrivacyPlan]:
    """By site, its plan. Raises UsageError for ``federation.holds`` of no site, and as ``site_plans.site_plan``."""
    from sfumato.federation.site_plans import site_plans

    unknown = sorted(set(recipe.federation.holds) - set(populations))
    if unknown:
        raise UsageError(
            f"federation.holds.{unknown[0]} · is no site; there are {', '.join(populations)}",
            next="Name the site as the data do.",
        )
    opens = recipe.privacy.warm_start is not None
    return site_plans(
        prompting.planned(recipe).privacy,
        recipe.federation,
        populations,
        expected_batch_size=recipe.training.expected_batch_size,
        released={name: warm_parts.dimension(parts_of(recipe, name)) for name in populations} if opens else None,
    )


def parts_of(recipe: Recipe, site: str) -> "tuple[Part, ...]":
    """What a site releases before the first round: what it holds of it. Raises UsageError where that is nothing."""
    every = warming.parts(recipe)
    holds = recipe.federation.holds.get(site)
    if holds is None:
        return every
    named = [name.removeprefix(PREFIX) for name in holds if name.startswith(PREFIX)]
    own = warm_parts.some_of(every, named)
    if not own or len(own) < len(named):
        raise UsageError(
            f"federation.holds.{site} = {', '.join(holds)} · says what a site releases before the first round, too: of "
            f"{', '.join(PREFIX + part.name for part in every)} at least one, and no other",
            next="Add what the site has records of.",
        )
    return own


def member(
    recipe: Recipe,
    name: str,
    plan: PrivacyPlan,
    *,
    records: "Callable[[], Sequence[Record]] | None" = None,
    **own: Any,
) -> "Site":
    """A site with this plan. Args: records: its own, read when it releases of them. own: table, ledger, account, sign, policy,
    as `Site` has them."""
    from sfumato.federation.sites import Site

    limit = stages.account_limit(recipe, plan)
    opening = warmed(plan)

    def release(of: MeanEmbedding, random: Random) -> "dict[str, Tensor]":
        assert records is not None  # a site elsewhere has its own
        return warm_parts.release(parts_of(recipe, name), records(), of, random)

    steps = in_steps(plan)
    assert isinstance(steps, TrainingPlan)
    return Site(
        name=name,
        plan=steps,
        account_limit=limit,
        build=_build_of(recipe, name),
        opening=opening,
        release=None if opening is None or records is None else release,
        **own,
    )


def identity(folder: Path) -> "Identity":
    """The key that the other sites know a site by, in its folder; made once, so that a resumed run has the same sites."""
    from sfumato.federation.secure.keys import Identity
    from sfumato.release import keys

    key = keys.own(folder)
    return Identity(public=key.public.raw, sign=key.sign)


def _build_of(recipe: Recipe, site: str) -> "Callable[[], Any] | None":
    """This site's model, where it holds only some of the parameters; the others are frozen, and neither sent nor received."""
    if prompting.is_prompts(recipe):
        return partial(prompting.build, recipe, site)
    names = recipe.federation.holds.get(site)
    if names is None:
        return None
    trained = [name for name in names if not name.startswith(PREFIX)]

    def build() -> Any:
        model = building.build(recipe)
        model.train_only(trained)
        return model

    return build


def _answer(folder: RunFolder, report: dict[str, Any]) -> dict[str, Any]:
    return {
        "run": str(folder.path),
        "rounds": sum(1 for one in report["rounds"] if one["round"]),
        "discarded": [one["round"] for one in report["rounds"] if one.get("discarded")],
        "sites": [
            {**site, "refused": None if site["refused"] is None else len(site["refused"])} for site in report["sites"]
        ],
        "epsilon": report["epsilon"],
        "bytes_up": report["bytes_up"],
        "bytes_down": report["bytes_down"],
    }
