import json
from dataclasses import replace

import pytest
import torch
from tests.federation.conftest import work_for

from sfumato.errors import UsageError
from sfumato.federation import simulate
from sfumato.federation.policy import SitePolicy
from sfumato.privacy.ledger import verify as ledger_verify
from sfumato.privacy.plan import DpSgd
from sfumato.records import Record
from sfumato.release import keys


def run(sites, build, train_steps, *, run="r", on_round=None, **settings):
    return simulate.simulate(sites, work_for(sites, build, train_steps, **settings), run=run, on_round=on_round)


def test_rounds_average_by_public_size_and_each_site_spends_its_own_epsilon(make_site, build, train_steps):
    sites = [make_site("a", 1.0, units=300), make_site("b", 5.0, units=100)]
    result = run(sites, build, train_steps)
    # Every round moves the weights by the weighted mean of 2 x 1 and 2 x 5: (3 * 2 + 10) / 4 = 4.
    torch.testing.assert_close(result.state["line.weight"], torch.tensor([[12.5, 11.5]]))
    assert [(site.rounds, site.steps, site.refused) for site in result.sites] == [(3, 6, ()), (3, 6, ())]
    for site, given in zip(result.sites, sites, strict=True):
        assert site.epsilon == pytest.approx(given.plan.epsilon(6), rel=1e-9)
    assert result.epsilon == max(site.epsilon for site in result.sites)


def test_bytes_are_counted_both_ways(make_site, build, train_steps):
    result = run([make_site("a", 1.0), make_site("b", 1.0)], build, train_steps)
    assert (result.bytes_up, result.bytes_down) == (3 * 2 * 12, 3 * 2 * 12)


def test_a_refusing_site_is_reported_and_the_others_go_on(make_site, build, train_steps):
    sites = [make_site("a", 1.0), make_site("b", 5.0, steps=4)]  # b planned two rounds, not three
    result = run(sites, build, train_steps)
    a, b = result.sites
    assert (a.rounds, b.rounds) == (3, 2)
    assert [(no.round, no.code) for no in b.refused] == [(3, "budget_exhausted")]
    assert [r.sites for r in result.rounds] == [("a", "b"), ("a", "b"), ("a",)]
    torch.testing.assert_close(result.state["line.weight"], torch.tensor([[0.5, -0.5]]) + 6 + 6 + 2)
    assert b.epsilon == pytest.approx(sites[1].plan.epsilon(4), rel=1e-9)
    assert result.bytes_up == 5 * 12 and result.bytes_down == 6 * 12


def test_when_all_refuse_the_model_stays_as_it_was_and_nothing_is_spent(make_site, build, train_steps):
    no = SitePolicy(min_units=10_000)
    result = run([make_site("a", 1.0, policy=no), make_site("b", 1.0, policy=no)], build, train_steps)
    torch.testing.assert_close(result.state["line.weight"], torch.tensor([[0.5, -0.5]]))
    assert result.epsilon == 0 and result.bytes_up == 0
    assert all(len(site.refused) == 3 for site in result.sites)


def test_a_federation_that_is_begun_again_in_the_same_place_gets_no_answer_twice(make_site, build, train_steps):
    sites = [make_site("a", 1.0), make_site("b", 1.0)]
    first = run(sites, build, train_steps, rounds=2)
    again = run(sites, build, train_steps, rounds=2)
    assert [[no.code for no in site.refused] for site in again.sites] == [["replayed"] * 2] * 2
    torch.testing.assert_close(again.state["line.weight"], torch.tensor([[0.5, -0.5]]))
    assert again.sites[0].epsilon == first.sites[0].epsilon == pytest.approx(sites[0].plan.epsilon(4), rel=1e-9)


def test_a_diverged_update_is_left_out_but_stays_charged(make_site, build, train_steps):
    def diverging(model, table, plan, ledger, *, steps, first_step):
        train_steps(model, table, plan, ledger, steps=steps, first_step=first_step)
        if table.unit_names[0].startswith("b"):
            with torch.no_grad():
                model.line.weight.fill_(float("nan"))

    result = run([make_site("a", 1.0), make_site("b", 1.0)], build, diverging)
    assert result.state["line.weight"].isfinite().all()
    assert [no.code for no in result.sites[1].refused] == ["update_not_finite"] * 3
    assert (result.sites[1].rounds, result.sites[1].steps) == (0, 6)
    assert result.sites[1].epsilon > 0


def test_a_site_without_a_guarantee_takes_it_from_the_whole(make_site, build, train_steps):
    free = make_site("b", 1.0, private=False, policy=SitePolicy(allow_not_private=True))
    result = run([make_site("a", 1.0), free], build, train_steps)
    assert result.epsilon is None
    assert result.sites[1].epsilon is None and result.sites[0].epsilon > 0


def test_one_person_at_two_sites_is_refused(make_site, build, train_steps):
    a, b = make_site("a", 1.0), make_site("b", 1.0)
    b.table.unit_names[0] = a.table.unit_names[7]
    with pytest.raises(UsageError, match="hold the same unit"):
        run([a, b], build, train_steps)


def test_sites_need_their_own_names_and_ledgers(make_site, build, train_steps):
    with pytest.raises(UsageError, match="own ledger"):
        run([make_site("a", 1.0), make_site("a", 2.0)], build, train_steps)


def test_every_round_is_shown_and_the_result_is_json(make_site, build, train_steps):
    seen = []

    def note(shown, state):
        seen.append((shown.round, float(state["line.weight"][0, 0])))

    result = run([make_site("a", 1.0)], build, train_steps, on_round=note)
    assert seen == [(1, 2.5), (2, 4.5), (3, 6.5)]
    shown = json.loads(json.dumps(result.to_dict()))
    assert shown["rounds"] == 3
    assert {"name", "epsilon", "rounds", "refused"} <= set(shown["sites"][0])


def test_a_public_number_is_the_plans_the_rates_and_the_weight_whatever_the_data_hold(make_site, build, train_steps):
    """Site b has 100 units and says 300 in public; a says 100."""
    a, b = make_site("a", 1.0), make_site("b", 5.0)
    kept = {"expected_batch_size": 20.0, "steps": 6, "noise_multiplier": 3.0, "delta": 1e-4}
    b = replace(b, plan=DpSgd(population=300, **kept))
    result = run([a, b], build, train_steps, rounds=1)
    assert [site.population for site in result.sites] == [100, 300]
    moved = float(result.state["line.weight"][0, 0]) - 0.5
    assert moved == pytest.approx((100 * 2 * 1.0 + 300 * 2 * 5.0) / 400)
    assert b.plan.sampling_rate == pytest.approx(20 / 300)


def test_a_sites_ledger_is_signed_at_the_end_of_every_round(make_site, build, train_steps, tmp_path):
    key = keys.own(tmp_path / "key")
    signed, unsigned = replace(make_site("a", 1.0), sign=keys.signer(key)), make_site("b", 1.0)
    run([signed, unsigned], build, train_steps)
    found = ledger_verify(signed.ledger, {key.public.id: key.public})
    assert found["valid"] and found["signer"] == key.public.id and found["signed_entries"] == found["entries"]
    assert ledger_verify(unsigned.ledger, {key.public.id: key.public})["signer"] is None


def make_records(sites, units=40):
    return [
        Record(id=f"{u}-{v}", unit=f"u{u}", metadata={"site": sites[u % len(sites)]} if sites else {})
        for u in range(units)
        for v in range(2)
    ]


def test_records_are_split_by_their_site_and_nobody_is_lost_or_torn_apart():
    for names, count, groups in (
        ("ABC", 3, {"A", "B", "C"}),
        ("ABCD", 2, {"A + C", "B + D"}),
        ("AB", 3, {"site-1", "site-2", "site-3"}),
    ):
        records = make_records(names)
        split = simulate.split_by_site(records, count)
        assert set(split) == groups
        assert sorted(r.id for part in split.values() for r in part) == sorted(r.id for r in records)
        units = [{r.unit for r in part} for part in split.values()]
        assert sum(map(len, units)) == len(set().union(*units)) == 40
    assert {r.metadata["site"] for r in simulate.split_by_site(make_records("ABC"), 3)["B"]} == {"B"}


def test_records_are_split_by_the_column_that_was_named_or_not_at_all():
    records = [replace(r, metadata={**r.metadata, "house": "xy"[int(r.unit[1:]) % 2]}) for r in make_records("ABC")]
    split = simulate.split_by_site(records, 2, "house")
    assert {name: {r.metadata["house"] for r in part} for name, part in split.items()} == {"x": {"x"}, "y": {"y"}}
    assert sum(map(len, split.values())) == len(records)
    with pytest.raises(
        UsageError, match="site_column = house, sites = 3 · 0 of 80 records lack it; there are 2 values"
    ):
        simulate.split_by_site(records, 3, "house")
    with pytest.raises(UsageError, match="site_column = floor, sites = 1 · 80 of 80 records lack it"):
        simulate.split_by_site(records, 1, "floor")
    records[7] = replace(records[7], metadata={"site": "A", "house": ""})
    with pytest.raises(UsageError, match="1 of 80 records lack it; there are 2 values"):
        simulate.split_by_site(records, 2, "house")


def test_one_unit_more_moves_no_other_unit_to_another_site():
    """What makes the sites' data disjoint for neighbouring data sets, whatever unit is left out."""
    records = [replace(r, metadata={}) for r in make_records("ABC")]
    whole = {r.unit: name for name, part in simulate.split_by_site(records, 3).items() for r in part}
    for left_out in sorted(whole):
        others = [r for r in records if r.unit != left_out]
        split = {r.unit: name for name, part in simulate.split_by_site(others, 3).items() for r in part}
        assert split == {unit: name for unit, name in whole.items() if unit != left_out}
