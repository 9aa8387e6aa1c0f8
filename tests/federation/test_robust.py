"""Means that a few hostile sites cannot drag away: against slow loops, attacks, and where they are refused."""

import itertools
import math

import pytest
import torch
from tests.federation.making import SHAPES, filled, update, vector

from sfumato.errors import UsageError
from sfumato.federation import mechanism_settings as of
from sfumato.federation import robust
from sfumato.federation.settings import FederationSettings


def crowd(n: int, hostile: dict | None = None, length: float = 1.0) -> dict:
    """n - (hostile) sites near one another, and the hostile ones."""
    common = update(100, 5.0)
    honest = {
        f"site-{i}": {k: common[k] + t for k, t in update(i, length).items()} for i in range(n - len(hostile or {}))
    }
    return honest | (hostile or {})


def columns(updates: dict) -> list[list[float]]:
    rows = [vector(updates[site]).tolist() for site in sorted(updates)]
    return [list(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("n", [3, 4, 7])
def test_trimmed_mean_and_median_are_those_of_the_slow_loop(n):
    updates = {f"site-{i}": update(i) for i in range(n)}
    trimmed = [math.fsum(sorted(c)[1:-1]) / (n - 2) for c in columns(updates)]
    middle = [(sorted(c)[(n - 1) // 2] + sorted(c)[n // 2]) / 2 for c in columns(updates)]
    torch.testing.assert_close(
        vector(robust.trimmed_mean(updates, 1)), torch.tensor(trimmed).double(), rtol=1e-6, atol=1e-7
    )
    torch.testing.assert_close(vector(robust.median(updates)), torch.tensor(middle).double(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("n", "hostile", "selected"), [(5, 1, 1), (7, 2, 1), (7, 2, 4), (9, 1, 8)])
def test_krum_is_that_of_the_slow_loop(n, hostile, selected):
    updates = {f"site-{i}": update(i) for i in range(n)}
    rows = {site: vector(u) for site, u in updates.items()}
    score = {
        site: math.fsum(
            sorted(float((rows[site] - rows[o]).square().sum()) for o in rows if o != site)[: n - hostile - 2]
        )
        for site in rows
    }
    chosen = sorted(rows, key=lambda site: (score[site], site))[:selected]
    expected = sum(rows[site] for site in chosen) / selected
    torch.testing.assert_close(vector(robust.krum(updates, hostile, selected)), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("attack", ["huge", "opposite", "scaled", "zero", "alike"])
@pytest.mark.parametrize(
    "kind", [of.TrimmedMean(trimmed=2), of.Median(), of.Krum(hostile=2), of.Krum(hostile=2, selected=3)]
)
def test_two_hostile_sites_of_seven_cannot_drag_it_away(attack, kind):
    """By coordinate nothing leaves the range of the honest ones; Krum takes none of the two where they are far away. The mean "
    "goes with them."""
    common = update(100, 5.0)
    bad = {
        "huge": filled(1e30),
        "opposite": {k: -t for k, t in common.items()},
        "scaled": {k: 1e6 * t for k, t in common.items()},
        "zero": filled(0.0),
        "alike": {k: t + 3.0 for k, t in common.items()},
    }[attack]
    updates = crowd(7, {"bad-0": bad, "bad-1": bad}, 0.5)
    honest = torch.stack([vector(u) for site, u in updates.items() if site.startswith("site")])
    result = vector(robust.combined(kind, updates))
    assert bool((result >= honest.min(0).values - 1e-5).all())
    assert bool((result <= honest.max(0).values + 1e-5).all())
    mean = sum(vector(u) for u in updates.values()) / 7
    assert not bool(((mean >= honest.min(0).values) & (mean <= honest.max(0).values)).all())


def test_the_order_of_arrival_changes_nothing():
    updates = {f"site-{i}": update(i) for i in range(5)}
    for kind in (of.TrimmedMean(trimmed=1), of.Median(), of.Krum(hostile=1, selected=2)):
        results = [
            vector(robust.combined(kind, dict(order)))
            for order in itertools.islice(itertools.permutations(updates.items()), 0, 120, 17)
        ]
        assert all(torch.equal(results[0], other) for other in results)


def test_a_part_is_combined_over_its_holders_and_krum_needs_all():
    updates = {f"site-{i}": update(i) for i in range(5)}
    for site in ("site-0", "site-1"):
        del updates[site]["b"]
    middle = robust.median(updates)
    assert set(middle) == set(SHAPES)
    expected = torch.stack([updates[f"site-{i}"]["b"] for i in (2, 3, 4)]).median(0).values
    torch.testing.assert_close(middle["b"], expected)
    with pytest.raises(UsageError, match="whole updates"):
        robust.krum(updates, 1)


def test_a_part_that_too_few_sent_is_left_out_of_a_trimmed_mean_and_the_others_are_combined():
    updates = {f"site-{i}": update(i) for i in range(4)}
    for site in ("site-0", "site-1"):
        del updates[site]["b"]
    found = robust.trimmed_mean(updates, 1)
    assert set(found) == set(SHAPES) - {"b"}
    whole = robust.trimmed_mean({site: {k: u[k] for k in found} for site, u in updates.items()}, 1)
    assert all(torch.equal(found[name], whole[name]) for name in found)


@pytest.mark.parametrize("kind", [of.TrimmedMean(trimmed=2), of.Krum(hostile=1), of.Krum(hostile=0 + 1, selected=4)])
def test_too_few_replies_are_refused(kind):
    with pytest.raises(UsageError) as refused:
        robust.combined(kind, {f"site-{i}": update(i) for i in range(4)})
    assert refused.value.code == "too_few_sites"


def test_they_are_refused_where_noise_goes_on_the_sum():
    on_the_sum = [
        of.Central(epsilon=8.0),
        of.Distributed(epsilon=8.0),
        of.LocalAndGlobal(noise_multiplier=1.0, server_noise_multiplier=1.0),
    ]
    for mechanism in on_the_sum:
        for kind in (of.Median(), of.TrimmedMean(trimmed=1), of.Krum(hostile=1)):
            with pytest.raises(UsageError, match=r"aggregation = "):
                FederationSettings(mechanism=mechanism, aggregation=kind)
    for mechanism in (of.RecordLevel(), of.UpdateLevel(epsilon=8.0), of.LdpFl(epsilon_per_weight=1.0)):
        assert FederationSettings(mechanism=mechanism, aggregation=of.Median()).aggregation == of.Median()
