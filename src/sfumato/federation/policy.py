"""A site's own limits. The site has the last word: whatever the server asks, a round that would pass a limit is refused."""

from dataclasses import dataclass

from sfumato import checks
from sfumato.errors import PrivacyRefused
from sfumato.privacy import accounting
from sfumato.privacy.ledger import Ledger
from sfumato.privacy.plan import DpSgd, TrainingPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class SitePolicy:
    """Attributes:
    max_epsilon: over all rounds together; None leaves the plan's own limit, which the ledger enforces in any case.
    min_units: a site of fewer (by its public population) takes no part.
    allow_not_private: whether a round without any guarantee may be trained here at all.
    """

    max_epsilon: float | None = None
    min_units: int = 1
    allow_not_private: bool = False

    def __post_init__(self) -> None:
        checks.positive(min_units=self.min_units)
        if self.max_epsilon is not None:
            checks.positive(max_epsilon=self.max_epsilon)


def require_permission(policy: SitePolicy, *, plan: TrainingPlan, ledger: Ledger, steps: int) -> None:
    """Raises PrivacyRefused, with every reason, unless ``steps`` more steps stay within the plan and the policy.

    The ledger counts events; with bands an event is a cycle of steps, and a round begins its own.
    Reads the plan and the ledger only, so that a refusal tells nothing about the site's data.
    """
    reasons: list[dict[str, str]] = []
    if plan.population < policy.min_units:
        reasons.append(
            {
                "code": "too_few_units",
                "message": f"population = {plan.population} · this site asks for at least {policy.min_units} units",
                "next": "Leave this site out, or lower min_units in its policy.",
            }
        )
    if isinstance(plan, DpSgd):
        events, planned, left = plan.events_of(steps), plan.event().count, ledger.remaining(plan.event(1))
        if left < events:
            reasons.append(
                {
                    "code": "budget_exhausted",
                    "message": f"steps = {steps} · are {events} events, and the ledger has {left} of {planned} left",
                    "next": "Plan for all rounds from the start: steps = rounds x local_steps.",
                }
            )
        elif policy.max_epsilon is not None:
            after = accounting.epsilon([plan.event(planned - left + events)], plan.delta, adjacency=plan.adjacency)
            assert after is not None  # PLD always applies
            if after > policy.max_epsilon:
                reasons.append(
                    {
                        "code": "site_limit",
                        "message": f"epsilon = {after:.4g} after this round · the site allows {policy.max_epsilon:g}",
                        "next": "Ask for fewer rounds or a smaller epsilon.",
                    }
                )
    elif not policy.allow_not_private:
        reasons.append(
            {
                "code": "not_private",
                "message": "mechanism = none · this site does not train without a guarantee",
                "next": "Use dp_sgd, or set allow_not_private in the site's policy.",
            }
        )
    if reasons:
        raise PrivacyRefused(
            "; ".join(reason["message"] for reason in reasons),
            next=reasons[0]["next"],
            code=reasons[0]["code"],
            refusals=reasons,
        )
