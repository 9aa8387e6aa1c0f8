"""Choosing C: a small share of epsilon finds a quantile of the norms of the units' gradients, the rest trains with it.

One plan, ``Composition(Estimate, DpSgd)``, fixed before anything is looked at. The estimate takes every unit with rate
min(1, SAMPLE / N), once, and asks that one sample for a quantile of its norms at the first weights: one Poisson-sampled
Gaussian event (``releases.Estimate``). DP-SGD then clips to the answer. Its event says sigma, noise over C, and not C: so C
is post-processing of the estimate, the plan says "estimated" in its place, and both are composed as if neither knew of the
other. C is written down with its interval among what was released, and paid for.

A quantile at the first weights is a guess for later ones, whose norms usually fall; ``clipping: adaptive`` follows them, at
the price of a count in every step.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sfumato.errors import UsageError
from sfumato.privacy.events import Event
from sfumato.privacy.plan import Composition, DpSgd, Estimate, PrivacyPlan
from sfumato.privacy.questions import Quantile

NAME = "norms of the gradients of units, at the first weights"
SAMPLE = 1_000  # units, expected: the sample's own error of rank is then 1.6 %
LOW, HIGH, HALVINGS = 1e-4, 1e4, 8  # 256 cells, each 7.5 % wide


def with_estimated_bound(
    *, epsilon: float, share: float, quantile: float, before: Sequence[Event] = (), **values: Any
) -> Composition:
    """The plan that spends ``share`` of epsilon (alone, at the same delta) on C, and in all, with what was ``before``, at most
    ``epsilon``.

    Args: values: every other field of ``DpSgd``, but for noise_multiplier, target_epsilon and max_grad_norm.
    """
    if not 0 < share < 1:
        raise UsageError(f"share = {share} · must be between 0 and 1, both excluded", next="Take 0.02.")
    of_all = ("population", "delta", "unit", "records_per_unit", "adjacency", "population_from_data")
    estimate = Estimate.calibrated(
        epsilon=share * epsilon,
        name=NAME,
        question=Quantile(quantile=quantile, low=LOW, high=HIGH, halvings=HALVINGS),
        sampling_rate=min(1.0, SAMPLE / values["population"]),
        **{name: values[name] for name in of_all if name in values},
    )
    steps = DpSgd.calibrated(epsilon=epsilon, before=(*before, *estimate.events()), max_grad_norm="estimated", **values)
    return Composition.of(estimate, steps, target_epsilon=epsilon)


def estimated(plan: PrivacyPlan) -> tuple[Estimate, DpSgd] | None:
    """What finds C and what then trains with it; None for every other plan."""
    if isinstance(plan, Composition):
        first, last = plan.stages[-2:]
        if isinstance(first, Estimate) and isinstance(last, DpSgd) and last.max_grad_norm == "estimated":
            return first, last
    return None


def with_bound(steps: DpSgd, bound: float) -> DpSgd:
    """What an engine can follow: the same plan with the C that was found. Its events are the same."""
    return replace(steps, max_grad_norm=bound)


def spent_before(plan: PrivacyPlan) -> tuple[Event, ...]:
    """What is charged before the first step."""
    if not isinstance(plan, Composition) or not isinstance(plan.stages[-1], DpSgd):
        return ()
    return tuple(event for stage in plan.stages[:-1] for event in stage.events())
