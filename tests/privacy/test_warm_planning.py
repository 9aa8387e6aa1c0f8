"""A release before the first step: one plan whose noise is found for both, and that forgets neither."""

import math

import pytest
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant

from sfumato import recipe as recipes
from sfumato.errors import UsageError
from sfumato.privacy import planning
from sfumato.privacy.accounting import Event, calibrate_event
from sfumato.privacy.guarantee import guarantee
from sfumato.privacy.plan import Composition, DpSgd, MeanEmbedding
from sfumato.privacy.plan_json import plan_from_dict, plan_to_dict
from sfumato.privacy.settings import PrivacySettings, WarmStartSettings
from sfumato.privacy.warm_planning import before_steps, in_steps, warmed, with_warm_start

SIZES = {"population": 10_000, "delta": 1e-5, "expected_batch_size": 500.0, "steps": 50}


def small(share: float = 0.2, **more) -> Composition:
    return with_warm_start(epsilon=2.0, share=share, dimension=7, **SIZES, **more)


def test_both_together_spend_the_epsilon_by_an_accountant_of_their_own():
    plan = small()
    release, steps = plan.stages
    assert isinstance(release, MeanEmbedding) and isinstance(steps, DpSgd)
    oracle = PLDAccountant(value_discretization_interval=1e-4)
    oracle.compose(dp_event.GaussianDpEvent(release.noise_multiplier))
    one = dp_event.PoissonSampledDpEvent(0.05, dp_event.GaussianDpEvent(steps.noise_multiplier))
    oracle.compose(one, 50)
    assert oracle.get_epsilon(1e-5) == pytest.approx(2.0, abs=2e-3)
    assert 1.99 < plan.epsilon() <= 2.0
    assert steps.epsilon() < 2.0 and release.epsilon() < 2.0


def test_the_share_is_of_one_over_sigma_squared():
    alone = calibrate_event(
        Event(mechanism="gaussian", sampling_rate=1.0, noise_multiplier=1.0), epsilon=2.0, delta=1e-5
    )
    for share in (0.03, 0.5):
        release = warmed(small(share))
        assert release is not None
        assert release.noise_multiplier == pytest.approx(alone / math.sqrt(share))


def test_the_larger_the_share_the_more_noise_is_left_to_the_steps():
    noise = [in_steps(small(share)).noise_multiplier for share in (0.01, 0.2, 0.6)]  # pyright: ignore
    without = DpSgd.calibrated(epsilon=2.0, **SIZES).noise_multiplier
    assert without < noise[0] < noise[1] < noise[2]
    assert noise[0] < 1.02 * without


def test_a_bound_can_be_estimated_between_the_two():
    plan = small(clip_estimate=(0.05, 0.5))
    assert [stage.mechanism(())["name"] for stage in plan.stages] == ["mean_embedding", "estimate", "dp_sgd"]
    assert 1.99 < plan.epsilon() <= 2.0
    assert len(before_steps(plan)) == 2 and warmed(plan) is plan.stages[0] and in_steps(plan) is plan.stages[2]


def test_it_is_read_back_as_it_was_written():
    assert plan_from_dict(plan_to_dict(small())) == small()


def test_a_claim_without_the_release_is_refused():
    """Forgetting to charge it: whatever was spent on steps, the claim is not written."""
    plan = small()
    release, steps = plan.stages
    assert isinstance(steps, DpSgd)
    claim = guarantee(plan, [*release.events(), steps.event(3)], boundary=[])
    assert claim.epsilon is not None and claim.epsilon > release.epsilon()
    with pytest.raises(UsageError, match="lacks what this plan releases in every run: gaussian 1 times"):
        guarantee(plan, [steps.event(3)], boundary=[])


def test_settings_that_cannot_be_are_refused():
    warm = WarmStartSettings()
    for wrong in ({"mechanism": "none"}, {"epsilon": None, "noise_multiplier": 1.0}, {"mechanism": "latents"}):
        with pytest.raises(UsageError, match="warm_start · takes a share of epsilon"):
            PrivacySettings(warm_start=warm, **wrong)  # pyright: ignore[reportArgumentType]
    for share in (0.0, 1.0):
        with pytest.raises(UsageError, match="share"):
            WarmStartSettings(share=share)
    with pytest.raises(UsageError, match="here there are steps alone"):
        planning.training_plan(PrivacySettings(warm_start=warm), **{**SIZES, "delta": None})
    with pytest.raises(UsageError, match=r"privacy.warm_start · says half of it: model.warm_start is missing"):
        recipes.from_mapping({"name": "x", "privacy": {"warm_start": {"share": 0.1}}})
    release = {"kind": "class_moments", "classes": [{"name": "left", "more": ["left"]}]}
    with pytest.raises(UsageError, match=r"model.warm_start · says half of it: privacy.warm_start is missing"):
        recipes.from_mapping({"name": "x", "model": {"warm_start": {"release": release}}})
