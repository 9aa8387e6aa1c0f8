"""The plan of every site, from what a federation's recipe asks for and public numbers alone; no torch, so that a verifier makes them anew.

**One delta for all.** What a federation claims is said of every person of every site, so it needs one delta: of two sites of
plans (8, 1e-5) and (8, 2e-4) the claim "(8, 1e-5)" is wrong for the persons of the second. ``auto`` is 1/(N ln N) of the units
of all sites together, at most what each site alone would have; then the largest of the epsilons holds for everybody at it.
Were every site's delta its own, a thousand sites of 40 persons would together be allowed to give away 270 of them.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sfumato.errors import PrivacyRefused, UsageError
from sfumato.federation.settings import FederationSettings
from sfumato.privacy.plan import NotPrivate, PrivacyPlan
from sfumato.privacy.planning import automatic_delta, make_plan, training_plan
from sfumato.privacy.settings import PrivacySettings


def site_plans(
    privacy: PrivacySettings,
    federation: FederationSettings,
    populations: Mapping[str, int],
    *,
    expected_batch_size: float,
    released: Mapping[str, int] | None = None,
) -> dict[str, PrivacyPlan]:
    """By site, a plan over all rounds for its own units, with a share of the batch that is its share of the units.

    Args:
      populations: of every site, as `site_plan` has it.
      expected_batch_size: of all sites together.
      released: by site, how many numbers it releases before the first round.
    Raises: as `site_plan`; PrivacyRefused for a delta that would allow to give away one of all units.
    """
    total = sum(populations.values())
    if privacy.delta == "auto":
        privacy = replace(privacy, delta=automatic_delta(max(total, 3)))
    elif privacy.mechanism != "none" and privacy.delta >= 1 / total:
        raise PrivacyRefused(
            f"delta = {privacy.delta:g} · must be below 1/N = {1 / total:.3g}, of the {total} {privacy.unit}s of all sites",
            next=f"Set privacy.delta: auto, which is {automatic_delta(max(total, 3)):.2g}.",
            code="delta_too_large",
        )
    plans = {}
    for name, population in populations.items():
        try:
            plans[name] = site_plan(
                privacy,
                federation,
                expected_batch_size=max(1.0, expected_batch_size * population / total),
                population=population,
                released=None if released is None else released[name],
            )
        except PrivacyRefused as refused:
            raise _of_site(name, refused) from None
    return plans


def _of_site(name: str, refused: PrivacyRefused) -> PrivacyRefused:
    """The same refusal, saying whose plan it is: numbers of a site are not those of the recipe."""
    every = [{**one, "message": f"site {name}: {one['message']}"} for one in refused.refusals]
    return PrivacyRefused(f"site {name}: {refused.message}", next=refused.next, code=refused.code, refusals=every)


def site_plan(
    privacy: PrivacySettings,
    federation: FederationSettings,
    *,
    expected_batch_size: float,
    population: int,
    released: int | None = None,
) -> PrivacyPlan:
    """One site's plan, over all rounds. Its population is its own, never the federation's.

    Args:
      population: of the site: public where ``federation.populations`` gives it, else counted and hereby declared public.
      released: how many numbers the site releases before the first round, where ``privacy.warm_start`` says so.

    Raises: UsageError: a round would end within a cycle of correlated noise, which is charged whole; or one public number is
      given for all sites together. PrivacyRefused: no plan.
    """
    if privacy.population is not None:
        raise UsageError(
            f"population = {privacy.population} · is of one training on all units; a site samples its own, and its rate is that "
            "of its own number",
            next="Set privacy.population: null, and federation.populations to the public number of every site (left out, "
            "they are counted and declared public).",
        )
    if federation.mechanism.kind != "record_level":
        if privacy.mechanism != "none":
            raise UsageError(
                f"privacy.mechanism = {privacy.mechanism} · under {federation.mechanism.kind} the local steps are ordinary ones, and "
                "federation.mechanism says what protects",
                next="Set privacy.mechanism: none, or federation.mechanism: {kind: record_level}.",
            )
        return NotPrivate(
            population=population,
            expected_batch_size=expected_batch_size,
            steps=federation.rounds * federation.steps_per_round,
            unit=privacy.unit,
            records_per_unit=privacy.records_per_unit,
            population_from_data=not federation.populations,
        )
    if federation.selection.kind == "by_charged_loss" and (privacy.bands > 1 or privacy.largest_batch is not None):
        raise UsageError(
            f"selection = by_charged_loss, privacy.bands = {privacy.bands}, privacy.largest_batch = {privacy.largest_batch} · a loss "
            "is charged as one plain step more, of a Poisson sample",
            next="Set privacy.bands: 1 and privacy.largest_batch: null, or another selection.",
        )
    if federation.local_steps % privacy.bands:
        raise UsageError(
            f"local_steps = {federation.local_steps} · must be a multiple of privacy.bands = {privacy.bands}: every round begins "
            "its own cycles of so many steps, and a cycle is charged whole",
            next=f"Set federation.local_steps: {-(-federation.local_steps // privacy.bands) * privacy.bands}, or fewer bands.",
        )
    sizes: dict[str, Any] = {
        "steps": federation.rounds * federation.steps_per_round,
        "expected_batch_size": expected_batch_size,
        "population": population,
    }
    own = replace(privacy, population=population if federation.populations else None)
    if released is None:
        return training_plan(own, **sizes)
    if privacy.clip_estimate is not None:
        raise UsageError(
            "max_grad_norm = auto · is estimated for one training, not yet at every site of a federation",
            next="Give privacy.max_grad_norm a number.",
        )
    return make_plan(own, **sizes, dimensions={"warm_start": released})
