"""A site's own limits. The site has the last word: whatever the server asks, a round that would pass a limit is refused.

A policy is a YAML file at the site (``load``), read by nobody else:

    max_epsilon: 8               # of one person, over all rounds of a run
    account_epsilon: 10          # of one person, over all runs on this site's account
    max_rounds: 20
    min_units: 100               # fewer people than that take no part
    allowed_recipes: [9f2c...]   # sha256 of resolved.yaml; left out, any
    allowed_mechanisms: [record_level]
    allow_not_private: false
    may_say: [steps, charged, ledger]    # beside the update itself
    identities: {north: 3b6a...} # public keys of all sites, for secure aggregation: from these sites, not from the server
    colluders: 1                 # so many other sites might work with a hostile server
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from sfumato import checks
from sfumato.errors import PrivacyRefused, SfumatoError, UsageError
from sfumato.federation.public import check_identities
from sfumato.privacy import accounting
from sfumato.privacy.events import Event
from sfumato.privacy.ledger import Ledger
from sfumato.privacy.plan import DpSgd, SiteUpdates, TrainingPlan

# Those that need no trust in the server; central does, and has to be named.
WITHOUT_TRUST = ("record_level", "update_level", "fed_lora", "local_and_global", "ldp_fl", "distributed")
Sayable = Literal["steps", "charged", "ledger", "loss"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SitePolicy:
    """Attributes:
    max_epsilon: over all rounds together; None leaves the plan's own limit, which the ledger enforces in any case.
    account_epsilon: over all runs on the site's account together, at the plan's delta; once declared it binds every later run.
    max_rounds: of one run, in which this site answers with an update.
    min_units: a site of fewer (by its public population) takes no part.
    allowed_recipes: sha256 of the resolved recipes that may be trained here; None: any.
    allowed_mechanisms: by name; None: any.
    allow_not_private: whether a round without any guarantee may be trained here at all.
    may_say: what a reply may hold beside the update: local steps and charged events (functions of the plan), after the last round the
      site's signed ledger (the plan, its events, when it was open), without which no bundle can be made, and a loss, which is
      noised and charged. Nothing else leaves, whatever is asked; what went wrong stays in the site's own log.
    identities: by site, Ed25519 public keys in 64 hexadecimal digits, under secure aggregation the ones that are believed; None:
      those of the federation's public constants, so that whoever wrote them first is trusted with not being all other sites (over
      several machines `machines.Member` remembers them).
    colluders: of the other sites so many might work with a hostile server; a threshold that does not stand up to it is refused.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    max_epsilon: float | None = None
    account_epsilon: float | None = None
    max_rounds: int | None = None
    min_units: int = 1
    allowed_recipes: tuple[str, ...] | None = None
    allowed_mechanisms: tuple[str, ...] | None = WITHOUT_TRUST
    allow_not_private: bool = False
    may_say: tuple[Sayable, ...] = ("steps", "charged", "ledger")
    identities: Mapping[str, str] | None = None
    colluders: int = 0

    def __post_init__(self) -> None:
        checks.positive(min_units=self.min_units)
        for name in ("max_epsilon", "account_epsilon", "max_rounds"):
            if getattr(self, name) is not None:
                checks.positive(**{name: getattr(self, name)})
        checks.non_negative(colluders=self.colluders)
        check_identities(self.identities or {})
        for digest in self.allowed_recipes or ():
            if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
                raise UsageError(
                    f"allowed_recipes = {digest[:80]!r} · must be sha256 sums, 64 hexadecimal digits",
                    next="Take it from `sha256sum resolved.yaml`.",
                )


def load(path: Path | str) -> SitePolicy:
    """Reads a policy file. Raises UsageError for a missing file, bad YAML, an unknown key or a bad value, by its path."""
    import yaml

    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UsageError(f"policy = {path} · must be a readable YAML file ({error})", next="Check the path.") from None
    return from_mapping({} if values is None else values)


def from_mapping(values: Any) -> SitePolicy:
    """From plain values, as YAML gives them."""
    from pydantic import TypeAdapter, ValidationError

    if not isinstance(values, Mapping):
        raise UsageError(f"policy = {type(values).__name__} · must be a mapping", next="See docs/federation.md.")
    known = [field.name for field in fields(SitePolicy)]
    unknown = [key for key in values if key not in known]
    if unknown:
        raise UsageError(
            f"policy.{unknown[0]} · is not a key of a policy",
            next=f"Known: {', '.join(known)}.",
            code="unknown_key",
        )
    try:
        return TypeAdapter(SitePolicy).validate_python(dict(values))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        cause = (first.get("ctx") or {}).get("error")
        if isinstance(cause, SfumatoError):
            raise UsageError(f"policy: {cause.message}", next=cause.next) from None
        path = ".".join(str(part) for part in first["loc"])
        raise UsageError(
            f"policy.{path} = {str(first.get('input'))[:80]} · {first['msg']}", next="Correct the policy."
        ) from None


class PolicyRefused(PrivacyRefused):
    """The site's own limits say no. Its message is made of public numbers only, so that the server may read it."""


def check_asked(policy: SitePolicy, *, recipe: str, mechanism: str, population: int, rounds: int) -> None:
    """Raises PolicyRefused, with every reason, before the ledger is opened.

    Args: recipe: sha256 of the recipe that would be trained. rounds: answered in this run already.
    """
    reasons: list[dict[str, str]] = []
    if policy.allowed_recipes is not None and recipe not in policy.allowed_recipes:
        reasons.append(
            _reason(
                "recipe_not_allowed",
                f"recipe = {recipe[:12] or 'unnamed'} · is not one of the {len(policy.allowed_recipes)} that this site allows",
                "Show the resolved recipe to the site, and let it add the sum to allowed_recipes.",
            )
        )
    if policy.allowed_mechanisms is not None and mechanism not in policy.allowed_mechanisms:
        reasons.append(
            _reason(
                "mechanism_not_allowed",
                f"mechanism = {mechanism} · this site allows {', '.join(policy.allowed_mechanisms) or 'none'}",
                "Use one of these, or let the site name it in allowed_mechanisms.",
            )
        )
    if policy.max_rounds is not None and rounds >= policy.max_rounds:
        reasons.append(
            _reason(
                "rounds_limit",
                f"rounds = {rounds + 1} with this one · the site allows {policy.max_rounds}",
                "Ask for fewer.",
            )
        )
    if population < policy.min_units:
        reasons.append(
            _reason(
                "too_few_units",
                f"population = {population} · this site asks for at least {policy.min_units} units",
                "Leave this site out, or lower min_units in its policy.",
            )
        )
    _refuse(reasons)


def check_limits(
    policy: SitePolicy,
    *,
    plan: TrainingPlan | SiteUpdates,
    left: int | None,
    steps: int,
    before: Sequence[Event] = (),
) -> None:
    """Raises PolicyRefused, with every reason, unless ``steps`` more steps stay within the plan and the policy.

    Args: plan: what is charged; of updates, a step is a round. left: events that its account has left; None for a plan without a
      guarantee. before: what was charged before the first step, or is.
    Reads numbers of the plan only, so that a refusal tells nothing about the site's data. With bands an event is a cycle of
    steps, and a round begins its own.
    """
    reasons: list[dict[str, str]] = []
    private = isinstance(plan, DpSgd | SiteUpdates) and plan.noise_multiplier > 0
    if not private and not policy.allow_not_private:
        reasons.append(
            _reason(
                "not_private",
                "mechanism = none · this site does not train without a guarantee",
                "Use dp_sgd, or set allow_not_private in the site's policy.",
            )
        )
    elif isinstance(plan, DpSgd | SiteUpdates) and left is not None:
        events, planned = plan.events_of(steps), plan.event().count
        if left < events:
            reasons.append(
                _reason(
                    "budget_exhausted",
                    f"steps = {steps} · are {events} events, and the ledger has {left} of {planned} left",
                    "Plan for all rounds from the start: steps = rounds x local_steps.",
                )
            )
        elif policy.max_epsilon is not None:
            spent = replace(plan.event(1), count=planned - left + events)
            after = accounting.epsilon(
                [*before, spent] if spent.count else before, plan.delta, adjacency=plan.adjacency
            )
            assert after is not None  # PLD always applies
            if after > policy.max_epsilon:
                reasons.append(
                    _reason(
                        "site_limit",
                        f"epsilon = {after:.4g} after this round · the site allows {policy.max_epsilon:g}",
                        "Ask for fewer rounds or a smaller epsilon.",
                    )
                )
    _refuse(reasons)


def require_permission(policy: SitePolicy, *, plan: TrainingPlan, ledger: Ledger, steps: int) -> None:
    """``check_limits`` with what the site's ledger has left."""
    left = ledger.remaining(plan.event(1)) if isinstance(plan, DpSgd) else None
    check_limits(policy, plan=plan, left=left, steps=steps)


def _reason(code: str, message: str, next: str) -> dict[str, str]:
    return {"code": code, "message": message, "next": next}


def _refuse(reasons: list[dict[str, str]]) -> None:
    if reasons:
        raise PolicyRefused(
            "; ".join(reason["message"] for reason in reasons),
            next=reasons[0]["next"],
            code=reasons[0]["code"],
            refusals=reasons,
        )
