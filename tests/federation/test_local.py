import pytest
import torch
from torch import nn

from sfumato.errors import LedgerError, PrivacyRefused, UsageError
from sfumato.federation import local_training
from sfumato.federation.policy import SitePolicy, require_permission
from sfumato.privacy.ledger import Ledger
from sfumato.privacy.plan import DpSgd


def one_round(site, build, train_steps, steps=2, state=None):
    state = local_training.trained_state(build()) if state is None else state
    return local_training.train_round(site, state, build=build, train_steps=train_steps, steps=steps, run="r")


def test_only_the_difference_of_trained_parameters_leaves_the_site(make_site, build, train_steps):
    update = one_round(make_site("a", 2.0), build, train_steps)
    assert set(update.delta) == {"line.weight", "line.bias"}
    torch.testing.assert_close(update.delta["line.weight"], torch.full((1, 2), 4.0))
    assert update.delta["line.bias"].item() == 0
    assert (update.steps, update.charged, update.home) == (2, 2, {})


def test_a_round_charges_its_steps_and_the_next_one_goes_on_from_there(make_site, build, train_steps):
    site, first_steps = make_site("a", 1.0), []

    def noting(*arguments, first_step, **rest):
        first_steps.append(first_step)
        train_steps(*arguments, first_step=first_step, **rest)

    for _ in range(3):
        one_round(site, build, noting)
    assert first_steps == [0, 2, 4]
    with Ledger.open(site.ledger, run="r") as ledger:
        assert (ledger.spent_steps, ledger.remaining_steps, ledger.attempt) == (6, 0, 4)


def test_the_global_state_is_not_changed(make_site, build, train_steps):
    state = local_training.trained_state(build())
    before = {name: tensor.clone() for name, tensor in state.items()}
    one_round(make_site("a", 2.0), build, train_steps, state=state)
    assert all(state[name].equal(before[name]) for name in state)


def test_a_round_that_does_not_fit_the_plan_is_refused_before_the_data_is_touched(make_site, build):
    def never(*arguments, **rest):
        raise AssertionError("the data was touched")

    site = make_site("a", 1.0, steps=3)
    with pytest.raises(PrivacyRefused, match="3 of 3 left") as refused:
        one_round(site, build, never, steps=4)
    assert refused.value.code == "budget_exhausted"
    with Ledger.open(site.ledger, run="r") as ledger:
        assert ledger.spent_steps == 0


@pytest.mark.parametrize(
    ("policy", "private", "code"),
    [
        (SitePolicy(max_epsilon=0.01), True, "site_limit"),
        (SitePolicy(), False, "not_private"),
    ],
)
def test_the_sites_own_limits_are_kept(make_site, build, train_steps, policy, private, code):
    with pytest.raises(PrivacyRefused) as refused:
        one_round(make_site("a", 1.0, policy=policy, private=private), build, train_steps)
    assert [reason["code"] for reason in refused.value.refusals] == [code]


def test_a_site_limit_stops_exactly_where_the_next_round_would_pass_it(make_site, build, train_steps):
    plan = make_site("a", 1.0).plan
    site = make_site("a", 1.0, policy=SitePolicy(max_epsilon=plan.epsilon(4)))
    one_round(site, build, train_steps)
    one_round(site, build, train_steps)
    with pytest.raises(PrivacyRefused, match="the site allows"):
        one_round(site, build, train_steps)


def test_a_site_limit_with_bands_counts_the_events_that_are_charged(tmp_path):
    """20 cycles of 4 steps are spent; one step more is a 21st, and its epsilon is that of 84 steps, not of 24."""
    plan = DpSgd(population=1000, expected_batch_size=10.0, steps=100, noise_multiplier=1.0, delta=1e-4, bands=4)
    with Ledger.open(tmp_path / "ledger.db", run="r", plan=plan) as ledger:
        for cycle in range(20):
            ledger.commit(ledger.reserve(plan.event(1), cycle))
        for limit in (plan.epsilon(24), plan.epsilon(80)):
            with pytest.raises(PrivacyRefused, match=f"epsilon = {plan.epsilon(84):.4g} after this round"):
                require_permission(SitePolicy(max_epsilon=limit), plan=plan, ledger=ledger, steps=1)
        require_permission(SitePolicy(max_epsilon=plan.epsilon(84)), plan=plan, ledger=ledger, steps=4)
        require_permission(SitePolicy(), plan=plan, ledger=ledger, steps=20)
        with pytest.raises(PrivacyRefused, match="steps = 21 · are 6 events, and the ledger has 5 of 25 left"):
            require_permission(SitePolicy(), plan=plan, ledger=ledger, steps=21)


def test_a_site_may_allow_a_round_without_a_guarantee(make_site, build, train_steps):
    site = make_site("a", 1.0, private=False, policy=SitePolicy(allow_not_private=True))
    torch.testing.assert_close(one_round(site, build, train_steps).delta["line.weight"], torch.full((1, 2), 2.0))


def test_training_that_does_not_charge_every_step_sends_nothing(make_site, build, train_steps):
    def forgetful(model, table, plan, ledger, *, steps, first_step):
        train_steps(model, table, plan, ledger, steps=steps - 1, first_step=first_step)

    with pytest.raises(LedgerError, match="1 events charged"):
        one_round(make_site("a", 1.0), build, forgetful)


@pytest.mark.parametrize("name", ["seen", "frozen"])
def test_what_is_not_protected_must_not_change(make_site, build, train_steps, name):
    def leaking(model, table, *rest, **named):
        train_steps(model, table, *rest, **named)
        with torch.no_grad():
            getattr(model, name).add_(table.tensors["x"].mean())

    with pytest.raises(UsageError, match=f"{name} changed"):
        one_round(make_site("a", 1.0), build, leaking)


def test_another_model_than_the_global_one_is_refused(make_site, build, train_steps):
    state = local_training.trained_state(nn.Linear(2, 1))
    with pytest.raises(UsageError, match="trained parameters"):
        one_round(make_site("a", 1.0), build, train_steps, state=state)
    assert local_training.trained_state(build())["line.weight"].shape == (1, 2)
