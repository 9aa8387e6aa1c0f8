"""A release before the first step: a share of the guarantee buys one noisy sum, and DP-SGD has the rest.

One plan, ``Composition(MeanEmbedding, [Estimate,] DpSgd)``, fixed before anything is looked at. The release is one Gaussian over
all units. Records are drawn from what it told, and the model is trained on those: post-processing, whatever it does. DP-SGD then
begins at these weights instead of random ones. Its noise was found with the release's event before it, so that all together
spend at most epsilon: a step's guarantee holds for any weights that it starts from, also such as depend on earlier releases.

``share`` is of 1/sigma^2: a Gaussian that spent all of epsilon by itself would have noise sigma, the release has
sigma / sqrt(share). Gaussians compose by 1/sigma^2, sampled ones nearly do.

Source: warm-up on noisy means: Gong et al. 2025 (DP-FETA), arXiv:2504.01395; with a mean-embedding generator between: FETA-Pro,
arXiv:2601.06368. Differs: noisy sums over public constants; they divide by the private number of a class's records.
"""

import math
from typing import Any

from sfumato.errors import UsageError
from sfumato.privacy import accounting
from sfumato.privacy.clip_estimate import with_estimated_bound
from sfumato.privacy.events import Event
from sfumato.privacy.plan import Composition, DpSgd, Estimate, MeanEmbedding, PrivacyPlan

_WHOM = ("population", "delta", "unit", "records_per_unit", "adjacency", "population_from_data")


def with_warm_start(
    *, epsilon: float, share: float, dimension: int, clip_estimate: tuple[float, float] | None = None, **values: Any
) -> Composition:
    """The plan that spends ``share`` of the guarantee on a release of so many numbers, and in all at most ``epsilon``.

    Args:
      clip_estimate: (share of epsilon, quantile) where max_grad_norm is estimated too: at the weights that DP-SGD begins at.
      values: every other field of ``DpSgd``, but for noise_multiplier and target_epsilon.

    Raises: PrivacyRefused where no noise answers.
    """
    if not 0 < share < 1:
        raise UsageError(f"share = {share} · must be between 0 and 1, both excluded", next="Take 0.03.")
    whom = {name: values[name] for name in _WHOM if name in values}
    alone = accounting.calibrate_event(
        Event(mechanism="gaussian", sampling_rate=1.0, noise_multiplier=1.0),
        epsilon=epsilon, delta=whom["delta"], adjacency=whom.get("adjacency", "add_or_remove"),
    )  # fmt: skip
    release = MeanEmbedding(**whom, dimension=dimension, noise_multiplier=alone / math.sqrt(share))
    if clip_estimate is not None:
        of, quantile = clip_estimate
        rest = with_estimated_bound(epsilon=epsilon, share=of, quantile=quantile, before=release.events(), **values)
        return Composition.of(release, *rest.stages, target_epsilon=epsilon)
    steps = DpSgd.calibrated(epsilon=epsilon, before=release.events(), **values)
    return Composition.of(release, steps, target_epsilon=epsilon)


def warmed(plan: PrivacyPlan) -> MeanEmbedding | None:
    """What is released before the first step, where anything is."""
    if isinstance(plan, Composition) and isinstance(plan.stages[-1], DpSgd):
        first = plan.stages[0]
        return first if isinstance(first, MeanEmbedding) else None
    return None


def in_steps(plan: PrivacyPlan) -> PrivacyPlan:
    """What of a plan is followed step by step on the records; any other plan as it is."""
    if isinstance(plan, Composition) and isinstance(plan.stages[-1], DpSgd):
        return plan.stages[-1]
    return plan


def before_steps(plan: PrivacyPlan) -> list[MeanEmbedding | Estimate]:
    """The stages that are charged before the first step, in their order."""
    if not isinstance(plan, Composition) or not isinstance(plan.stages[-1], DpSgd):
        return []
    return [stage for stage in plan.stages[:-1] if isinstance(stage, MeanEmbedding | Estimate)]
