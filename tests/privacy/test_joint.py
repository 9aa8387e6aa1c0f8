"""The claim of several sites: true of everybody at all of them, and no larger than it must be."""

from dataclasses import replace

import pytest

from sfumato.errors import UsageError
from sfumato.privacy import accounting, joint
from sfumato.privacy.guarantee import NOTHING_SPENT
from sfumato.privacy.joint import Spent, of_sites
from sfumato.privacy.plan import Composition, DpSgd, MeanEmbedding
from sfumato.privacy.site_updates import SiteUpdates

LARGE = DpSgd(population=8_000, expected_batch_size=200.0, steps=60, noise_multiplier=1.0, delta=1e-5, unit="person")
SMALL = replace(LARGE, population=1_000, expected_batch_size=25.0, noise_multiplier=1.2)
TRUST = "local: each site adds its noise"


def claim_of(spent, **more):
    return of_sites(spent, boundary=["Inside."], trust_model=TRUST, **more)


def test_the_claim_is_the_largest_epsilon_at_the_one_delta_and_every_site_stands_beside_it():
    spent = {
        "large": Spent(plan=LARGE, events=[LARGE.event(60)], ledger="ledgers/site-1.jsonl"),
        "small": Spent(plan=SMALL, events=[SMALL.event(20)], ledger="ledgers/site-2.jsonl"),
    }
    claim = claim_of(spent)
    alone = {name: accounting.epsilon(one.events, 1e-5) for name, one in spent.items()}
    assert claim.epsilon == max(alone.values()) == alone["large"] and claim.delta == 1e-5
    assert [(row["name"], row["population"], row["epsilon"], row["ledger"]) for row in claim.sites] == [
        ("large", 8_000, alone["large"], "ledgers/site-1.jsonl"),
        ("small", 1_000, alone["small"], "ledgers/site-2.jsonl"),
    ]
    assert claim.population == 9_000 and claim.trust_model == TRUST
    assert claim.mechanism == claim.sites[0]["mechanism"] == LARGE.mechanism([LARGE.event(60)])
    assert claim.accountants["pld"] == claim.epsilon
    said = " ".join(claim.boundary)
    assert "the largest (large)" in said and "N = 9000 in all" in said and "N = 8000," not in said
    assert any(f"the trust model is {TRUST}" in sentence for sentence in claim.not_promised)
    assert not claim.not_for_release


def test_at_every_other_delta_too_it_is_the_largest_though_that_may_be_another_site():
    few = replace(LARGE, population=400, expected_batch_size=200.0, steps=2, noise_multiplier=2.0)
    spent = {"steps": Spent(plan=LARGE, events=[LARGE.event(60)]), "few": Spent(plan=few, events=[few.event(2)])}
    curves = {name: dict(accounting.curve(one.events)) for name, one in spent.items()}
    ahead = {max(curves, key=lambda name: curves[name][delta]) for delta in curves["steps"]}
    assert ahead == {"steps", "few"}  # or this test shows nothing
    for delta, epsilon in claim_of(spent).curve:
        assert epsilon == max(curve[delta] for curve in curves.values())


@pytest.mark.parametrize(
    "other", [{"delta": 2e-5}, {"unit": "record"}, {"records_per_unit": 3}, {"adjacency": "replace_one"}]
)
def test_sites_that_no_one_sentence_is_true_of_are_refused(other):
    """With (8, 1e-5) at one and (8, 2e-5) at another, "(8, 1e-5)" is wrong of the second."""
    if "adjacency" in other:
        other |= {"population": 8_000}
    plan = replace(LARGE, **other)
    name = next(iter(other))
    with pytest.raises(UsageError, match=f"{name} = .* must be the same at every site"):
        claim_of({"a": Spent(plan=LARGE, events=[LARGE.event(1)]), "b": Spent(plan=plan, events=[plan.event(1)])})


def test_a_site_that_gave_nothing_claims_nothing_and_raises_no_bound():
    spent = {
        "a": Spent(plan=SMALL, events=[SMALL.event(20)], ledger="x"),
        "idle": Spent(plan=LARGE, events=[], ledger="y"),
    }
    claim = claim_of(spent)
    assert claim.epsilon == accounting.epsilon([SMALL.event(20)], 1e-5)
    assert (claim.sites[1]["epsilon"], claim.sites[1]["ledger"]) == (None, None)
    assert claim.population == 9_000
    nobody = claim_of({"idle": spent["idle"]})
    assert nobody.epsilon is None and nobody.not_for_release == NOTHING_SPENT


def test_a_site_without_noise_leaves_no_claim_at_all():
    open_plan = replace(SMALL, noise_multiplier=0.0)
    claim = claim_of(
        {"a": Spent(plan=LARGE, events=[LARGE.event(60)]), "b": Spent(plan=open_plan, events=[open_plan.event(1)])}
    )
    assert (claim.definition, claim.epsilon) == ("none", None)
    assert "without noise" in claim.not_for_release


def test_a_site_that_was_silent_when_the_others_released_has_a_claim_of_what_it_spent():
    shared = {"population": 8_000, "delta": 1e-5, "unit": "person"}
    release = MeanEmbedding(**shared, dimension=9, max_norm=1.0, noise_multiplier=1.0)
    plan = Composition(**shared, stages=(release, LARGE))
    both = [*release.events(), LARGE.event(60)]
    claim = claim_of({"a": Spent(plan=plan, events=both), "late": Spent(plan=plan, events=[LARGE.event(60)])})
    assert claim.epsilon == accounting.epsilon(both, 1e-5)
    assert claim.sites[1]["epsilon"] == accounting.epsilon([LARGE.event(60)], 1e-5)
    assert claim_of({"late": Spent(plan=plan, events=[LARGE.event(60)])}).epsilon == claim.sites[1]["epsilon"]


def test_of_whole_sites_the_population_is_their_number():
    plan = SiteUpdates(
        population=3,
        delta=1e-5,
        form="update_level",
        rounds=4,
        noise_multiplier=9.0,
        max_update_norm=1.0,
        adjacency="replace_one",
    )
    claim = claim_of({name: Spent(plan=plan, events=[plan.event(4)]) for name in "abc"})
    assert (claim.population, claim.unit) == (3, "site")
    assert claim.epsilon == plan.epsilon()
    assert claim.boundary[-1] == "The number of sites, N = 3, is a public constant."


def test_of_more_sites_than_are_computed_no_curve_is_claimed(monkeypatch):
    monkeypatch.setattr(joint, "MOST_CURVES", 1)
    spent = {"a": Spent(plan=LARGE, events=[LARGE.event(60)]), "b": Spent(plan=SMALL, events=[SMALL.event(20)])}
    claim = claim_of(spent)
    assert claim.curve == [] and claim.accountants == {"pld": claim.epsilon}
    assert "and 1 sites more; N = 9000 in all" in claim.boundary[-1]
