"""What a run may claim, as a value and in words. Everything is computed from the events that the ledger holds."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sfumato.errors import UsageError
from sfumato.privacy import accounting
from sfumato.privacy.accounting import Event
from sfumato.privacy.plan import Composition, DpSgd, Estimate, NotPrivate, PrivacyPlan
from sfumato.privacy.private_plan import PrivatePlan
from sfumato.reports import Guarantee

NOTHING_SPENT = "nothing was spent: nothing was trained"
NOT_PROMISED = (
    "That nothing about a group can be learnt: facts true of the population are what a generator is for.",
    "That what one unit tells about another is hidden, such as the records of relatives, unless they are one unit.",
    "That the output is true, fair, or fit for any decision about a person.",
    "Anything about data outside the boundary, such as public pretraining, choices made by people who saw the data, "
    "or settings tuned on it without a charge.",
    "A chance of failure below delta.",
)


def guarantee(
    plan: PrivacyPlan,
    events_spent: Sequence[Event],
    *,
    boundary: list[str],
    not_for_release: str = "",
    composed_with: Sequence[dict[str, Any]] = (),
    estimates: Sequence[dict[str, Any]] = (),
    complete: bool = True,
    trust_model: str = "central",
    trusted: str = "the machine while it trains",
) -> Guarantee:
    """The claim after ``events_spent``: the plan says of what kind it is, the events alone say how large.

    Before anything was spent there is none: definition "none", and marked not for release, as no model can have it.

    Args:
      boundary: sentences on which data and steps are inside, and what is declared public.
      estimates: what the plan's estimates have answered (``estimate.figures``); they are released with the claim.
      composed_with: earlier releases on the same account, each with its own figures (they are not added up here).
      complete: what the plan releases once must be among the events. Not at a site of a federation: it may have been silent then.
      trust_model: who adds the noise, and is trusted; trusted: what nobody may read from whom the guarantee is to protect.
    """
    inside = [*boundary, *_parts_sentences(plan), *_estimate_sentences(plan), _population_sentence(plan)]
    if isinstance(plan, NotPrivate):
        if events_spent:
            raise UsageError(
                f"events_spent = {len(events_spent)} · a plan without privacy has none",
                next="Give the plan of the ledger.",
            )
        return Guarantee(
            definition="none",
            epsilon=None,
            delta=None,
            unit=plan.unit,
            records_per_unit=plan.records_per_unit,
            adjacency="add_or_remove",
            population=plan.population,
            boundary=inside,
            mechanism={"name": "none"},
            composed_with=list(composed_with),
            not_promised=["Anything: this run was trained without privacy.", *NOT_PROMISED],
            not_for_release=not_for_release or "trained without privacy",
        )
    _check_events(plan, events_spent)
    missing = plan.not_charged(events_spent)
    if missing and complete:
        raise UsageError(
            f"events_spent · lacks what this plan releases in every run: {', '.join(missing)}",
            next="Give the events of the ledger that was kept while it ran; an older copy hides spending.",
        )
    figures = accounting.accountants(events_spent, plan.delta, plan.adjacency) if events_spent else {}
    epsilon = figures["pld"] if events_spent else None
    assert epsilon is not None or not events_spent  # PLD always applies
    finite = epsilon is not None and math.isfinite(epsilon)
    why = ("" if finite else "trained without noise") if events_spent else NOTHING_SPENT
    return Guarantee(
        definition="(epsilon, delta)-DP" if finite else "none",
        epsilon=epsilon if finite else None,
        delta=plan.delta,
        unit=plan.unit,
        records_per_unit=plan.records_per_unit,
        adjacency=plan.adjacency,
        population=plan.population,
        accountants={name: value if value is None or math.isfinite(value) else None for name, value in figures.items()},
        curve=accounting.curve(events_spent, adjacency=plan.adjacency) if finite else [],
        boundary=inside,
        trust_model=trust_model,
        mechanism=plan.mechanism(events_spent),
        estimates=list(estimates),
        composed_with=list(composed_with),
        not_promised=[*NOT_PROMISED, f"Protection from whoever can read {trusted}: the trust model is {trust_model}."],
        not_for_release=not_for_release or why,
    )


def in_words(claim: Guarantee) -> str:
    """One paragraph for a reader who wants to know what is protected."""
    if claim.epsilon is None and claim.delta is not None and not claim.accountants:
        return f"There is nothing to claim yet: {NOTHING_SPENT}."
    if claim.epsilon is None or claim.delta is None:
        return (
            "This model was trained without differential privacy. It may repeat what it was trained on, and must "
            "not be released."
        )
    whose = {
        "record": "one record",
        "person": f"all records of one person (at most {claim.records_per_unit} {_used(claim)})",
        "site": "all records of one site",
    }[claim.unit]
    words = (
        f"Whoever sees everything that this run releases can hardly tell whether {whose} took part: the run is "
        f"({claim.epsilon:.4g}, {claim.delta:.2g})-differentially private for {_NEIGHBOURS[claim.adjacency]} {whose}. "
        f"Any guess about it that was right with odds of 1 to 1 before is right with odds of at most "
        f"{_odds(claim.epsilon)} to 1 after, but for a chance of about {claim.delta:.2g}."
    )
    words += _MECHANISMS.get(claim.mechanism.get("name", ""), "").format(unit=claim.unit)
    if claim.composed_with:
        words += (
            f" {len(claim.composed_with)} other run(s) used the same data; the protection of all together is weaker."
        )
    if claim.not_for_release:
        words += f" NOT FOR RELEASE: {claim.not_for_release}."
    return words


def _used(claim: Guarantee) -> str:
    return "in a step" if claim.mechanism.get("name") == "dp_sgd" else "are used"


_MECHANISMS = {  # what there is to see, beside the weights; "" for training in steps, which shows nothing else
    "latent_release": " What was taken from the data is every {unit}'s own noisy latents, once; the model was made from those.",
    "mean_embedding": " What was taken from the data is one noisy mean over all {unit}s; the model was made from that.",
    "codebook": " What was taken from the data is every {unit}'s own codes, some of them replaced by chance.",
    "site_updates": " What was taken from the {unit}s is their clipped and noised updates, round by round.",
    "composition": " Several mechanisms used the data, one after another; this is the figure of all of them together.",
}

_NEIGHBOURS = {
    "add_or_remove": "adding or removing",
    "zero_out": "blanking",
    "replace_one": "exchanging for any other",
}


def _odds(epsilon: float) -> str:
    odds = math.exp(min(epsilon, 700.0))
    return f"{odds:,.2f}" if odds < 10 else f"{odds:,.0f}" if odds < 1e6 else f"{odds:.1e}"


def _parts_sentences(plan: PrivacyPlan) -> list[str]:
    stages = plan.stages if isinstance(plan, Composition) else (plan,)
    return [sentence for stage in stages if isinstance(stage, DpSgd) for sentence in _parts_of(stage)]


def _estimate_sentences(plan: PrivacyPlan) -> list[str]:
    stages = plan.stages if isinstance(plan, Composition) else (plan,)
    return [
        f"Inside, and charged: a private estimate ({stage.question.kind}) of {stage.name}; its answer may be seen."
        for stage in stages
        if isinstance(stage, Estimate)
    ]


def _parts_of(plan: DpSgd) -> list[str]:
    if not plan.parts:
        return []
    noise = plan.part_noise_multipliers()
    parts = "; ".join(
        f"{part.name} ({', '.join(module or 'all else that is trained' for module in part.modules)}): gradients of at "
        f"most {part.max_grad_norm:g}, noise multiplier {noise[part.name]:.4g}"
        for part in plan.parts
    )
    return [
        f"Parts of the model are noised differently, and charged as one mechanism of noise multiplier "
        f"{plan.noise_multiplier:.4g}: {parts}. Every other weight was frozen."
    ]


def _population_sentence(plan: PrivacyPlan) -> str:
    if plan.population_from_data:
        return (
            f"The number of {plan.unit}s, N = {plan.population}, was counted in the data and is declared public: the "
            "guarantee does not hide it, and does not hold for somebody to whom N itself would be a secret."
        )
    return f"The number of {plan.unit}s, N = {plan.population}, was given as a public constant."


def _check_events(plan: PrivatePlan, events: Sequence[Event]) -> None:
    """Every event must be one of the plan: a claim cannot name one mechanism and have spent on another."""
    allowed = plan.allowance()
    for event in events:
        if replace(event, count=1) not in allowed:
            raise UsageError(
                f"event = {event.to_dict()} · is not an event of the plan {[one.to_dict() for one in allowed]}",
                next="Give the plan that the ledger was opened with.",
            )
