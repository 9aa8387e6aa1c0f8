"""The plan that a recipe makes, computed again, and held against the plan that a ledger was kept under: every stage, every field.

A bundle says three times what was done: in its recipe, in its ledger's plan, and in its claim. The claim is compared with
the plan (``verify``), and here the plan with the recipe, by making it anew. What a recipe does not say is taken from the plan:
the number of units, where it was counted in the data, and how wide the released latents are, which is the model's.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from sfumato.errors import SfumatoError, UsageError

if TYPE_CHECKING:
    from sfumato.privacy.plan import PrivatePlan

_Settings = TypeVar("_Settings")

CALIBRATION = (
    1e-3  # relative, of noise that was found for an epsilon: other versions of the accountant search it otherwise
)
_FOUND = ("noise_multiplier", "noise_std", "noise")  # by the search


def problems(recipe: Mapping[str, Any], plan: "PrivatePlan") -> list[str]:
    """Where the plan is another than the recipe's, in words; empty if it is that."""
    from sfumato.privacy.plan import SiteUpdates
    from sfumato.privacy.plan_json import plan_to_dict
    from sfumato.privacy.planning import make_plan
    from sfumato.privacy.settings import PrivacySettings

    if isinstance(plan, SiteUpdates):
        return _problems_of_updates(recipe, plan)
    try:
        asked, training = _section(recipe, "privacy", PrivacySettings), recipe.get("training")
        training = training if isinstance(training, dict) else {}
        steps, size = training.get("steps"), training.get("expected_batch_size")
        if type(steps) is not int or type(size) is not int:
            return ["training: the recipe has no steps and no expected_batch_size"]
        made = make_plan(
            asked, steps=steps, expected_batch_size=size, population=plan.population, dimensions=_dimensions(plan)
        )
    except KeyError as missing:  # of a latent that the plan does not have
        return [f"modalities: the recipe has {missing}, the ledger's plan has not"]
    except (SfumatoError, ValueError, TypeError, OverflowError, RecursionError) as error:
        return [f"the recipe makes no plan ({str(error)[:200]})"]
    kept = plan_to_dict(plan)  # pyright: ignore[reportArgumentType]  (one of the kinds of private plans)
    return _differences(plan_to_dict(made), kept, CALIBRATION if asked.epsilon is not None else 1e-9, "")


def problems_of_sites(
    recipe: Mapping[str, Any],
    plans: Mapping[str, "PrivatePlan"],
    populations: Mapping[str, int],
    idle: Mapping[str, Mapping[str, Any]],
) -> list[str]:
    """The same of the plan of every site. Args: populations: of all sites; idle: what is claimed of those that have no ledger, by
    site: the mechanism of a plan of which nothing was spent."""
    from sfumato.federation.settings import FederationSettings
    from sfumato.federation.site_plans import site_plans
    from sfumato.privacy.plan import SiteUpdates
    from sfumato.privacy.plan_json import plan_to_dict
    from sfumato.privacy.settings import PrivacySettings

    if all(isinstance(plan, SiteUpdates) for plan in plans.values()):
        first = next(iter(plans))
        other = [site for site, plan in plans.items() if plan != plans[first]]
        if other:  # what depends on the model, too
            return [f"site {other[0][:60]!a}: its plan is another than that of {first[:60]!a}, and all have one"]
        found = [
            f"site {site[:60]!a}: {problem}"
            for site, plan in plans.items()
            for problem in _problems_of_updates(recipe, plan)
        ]
        return found or _problems_of_idle(idle, dict.fromkeys(idle, plans[first]), 1e-9)
    try:
        privacy = _section(recipe, "privacy", PrivacySettings)
        federation = _section(recipe, "federation", FederationSettings)
        training = recipe.get("training")
        size = training.get("expected_batch_size") if isinstance(training, dict) else None
        if type(size) is not int:
            return ["training: the recipe has no expected_batch_size"]
        given = federation.populations
        if federation.sites != len(populations) or (given and tuple(populations.values()) != given):
            return ["federation: the recipe has other sites, or says other numbers of units"]
        widths = {site: _dimensions(plans[site]).get("warm_start", 0) if site in plans else 1 for site in populations}
        made = site_plans(
            privacy,
            federation,
            populations,
            expected_batch_size=size,
            released=widths if privacy.warm_start is not None else None,
        )
    except (SfumatoError, ValueError, TypeError, OverflowError, RecursionError) as error:
        return [f"the recipe makes no plans ({str(error)[:200]})"]
    tolerance = CALIBRATION if privacy.epsilon is not None else 1e-9
    return [
        f"site {site[:60]!a}: {problem}"
        for site, plan in plans.items()
        for problem in _differences(
            plan_to_dict(made[site]),
            plan_to_dict(plan),  # pyright: ignore[reportArgumentType]  (one of the kinds of private plans)
            tolerance,
            "",
        )
    ] or _problems_of_idle(idle, made, tolerance)


def problems_of_numbers(recipe: Mapping[str, Any], plan: "PrivatePlan", cost: Mapping[str, Any]) -> list[str]:
    """Where every number of an update is charged (ldp_fl): whether they are all that were trained. A recipe by which some stay at
    their sites does not say how many."""
    from sfumato.privacy.plan import SiteUpdates

    federation = recipe.get("federation")
    if not isinstance(plan, SiteUpdates) or plan.form != "ldp_fl" or not isinstance(federation, dict):
        return []
    if federation.get("holds") or federation.get("home") or cost.get("parameters") == plan.weights_per_round:
        return []
    return [
        f"weights_per_round: {str(cost.get('parameters'))[:40]} numbers were trained, the plan charges {plan.weights_per_round}"
    ]


def _problems_of_idle(idle: Mapping[str, Mapping[str, Any]], made: Mapping[str, Any], tolerance: float) -> list[str]:
    return [
        f"site {site[:60]!a}, which has spent nothing: {problem}"
        for site, claimed in idle.items()
        for problem in _differences(_told(made[site].mechanism(())), _told(claimed), tolerance, "")
    ]


def _told(mechanism: Any) -> Any:
    """A mechanism without how it was computed, and how wide a release is, which is the model's."""
    if not isinstance(mechanism, dict):
        return mechanism
    told = {key: value for key, value in mechanism.items() if key not in ("accountant", "grid", "dimension")}
    stages = told.get("stages")
    return {**told, "stages": [_told(stage) for stage in stages]} if isinstance(stages, list) else told


def _problems_of_updates(recipe: Mapping[str, Any], plan: Any) -> list[str]:
    """Of a plan whose unit is the site."""
    from sfumato.federation.settings import FederationSettings
    from sfumato.federation.update_plans import remade
    from sfumato.privacy.plan_json import plan_to_dict

    try:
        federation = _section(recipe, "federation", FederationSettings)
        given = federation.populations
        populations = {str(number): units for number, units in enumerate(given)} if given else None
        made = remade(federation, plan, populations)
    except (SfumatoError, ValueError, TypeError, OverflowError, RecursionError) as error:
        return [f"the recipe makes no plan ({str(error)[:200]})"]
    tolerance = 1e-9 if getattr(federation.mechanism, "epsilon", None) is None else CALIBRATION
    return _differences(plan_to_dict(made), plan_to_dict(plan), tolerance, "")


def _section(recipe: Mapping[str, Any], name: str, settings: type[_Settings]) -> _Settings:
    """Raises UsageError for a section that a recipe could not have; ValueError where one of its values is none."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    values = recipe.get(name)
    if not isinstance(values, dict):
        raise UsageError(f"{name} · is no section of a recipe", next="Ask for the bundle again.")
    kind = type("Strict", (settings,), {"__pydantic_config__": ConfigDict(extra="forbid")})
    try:
        return TypeAdapter(kind).validate_python(values)  # pyright: ignore[reportReturnType]  (a subclass, made at run time)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise ValueError(f"{name}.{'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None


def _dimensions(plan: "PrivatePlan") -> dict[str, int]:
    """How wide what was released is, by name (``release_planning.release_plan``)."""
    from sfumato.privacy.plan import Codebook, Composition, LatentRelease, MeanEmbedding

    stages = plan.stages if isinstance(plan, Composition) else (plan,)
    found: dict[str, int] = {}
    for stage in stages:
        match stage:
            case LatentRelease():
                found |= {m.name: m.dimension for m in stage.modalities}
            case Codebook():
                found["categories"] = stage.categories
            case MeanEmbedding():
                if "mean" in found:  # the second of two sums
                    found["first"] = found["mean"]
                found |= {"mean": stage.dimension, "image": found.get("image", stage.dimension)}
                found["warm_start"] = stage.dimension
            case _:
                pass
    if "shared" in found:  # the sum of both; how it is shared out changes nothing that the plan says
        found |= {"image": found["shared"] - 1, "text": 1}
    return found


def _differences(made: Any, kept: Any, tolerance: float, path: str) -> list[str]:
    """Args: tolerance: relative, of noise. All other numbers must agree to the last digits of a float, whole ones entirely."""
    if isinstance(made, dict) and isinstance(kept, dict):
        names = sorted({*made, *kept})
        inner = [(f"{path}.{name}" if path else name, made.get(name), kept.get(name)) for name in names]
    elif isinstance(made, list) and isinstance(kept, list) and len(made) == len(kept):
        inner = [(f"{path}[{i}]", a, b) for i, (a, b) in enumerate(zip(made, kept, strict=True))]
    else:
        close = tolerance if path.rpartition(".")[2] in _FOUND else 1e-9
        same = (
            math.isclose(made, kept, rel_tol=close)
            if isinstance(made, float) and isinstance(kept, float)
            else (made == kept and type(made) is type(kept))
        )
        return [] if same else [f"{path}: the recipe makes {str(made)[:60]}, the ledger's plan says {str(kept)[:60]}"]
    return [problem for name, a, b in inner for problem in _differences(a, b, tolerance, name)]
