"""Filters: what they let pass is within the budget, whatever the order, and accounts keep to their limits."""

import contextlib
import math
import sqlite3
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.errors import BudgetExhausted, LedgerError, PrivacyRefused, UsageError
from sfumato.privacy import accounting, gaussian
from sfumato.privacy.accounting import Event
from sfumato.privacy.filters import ORDERS, GaussianFilter, RenyiFilter, converted
from sfumato.privacy.ledger import Ledger, show
from sfumato.privacy.plan import DpSgd, NotPrivate

DELTA = 1e-5


def gaussians(noise: float, count: int = 1) -> Event:
    return Event(mechanism="gaussian", sampling_rate=1.0, noise_multiplier=noise, count=count)


# ---- filters ----


def test_the_divergences_are_those_of_the_papers():
    """Gaussian: a / (2 sigma^2) (Mironov 2017). Sampled, whole order: Mironov, Talwar, Zhang 2019, arXiv:1908.10530, section 3.3."""
    for order in (2, 5, 32):
        assert accounting.renyi(gaussians(3.0), order) == pytest.approx(order / 18)
        assert accounting.renyi(gaussians(3.0), order, "replace_one") == pytest.approx(4 * order / 18)
    rate, noise, order = 0.05, 1.5, 7
    total = math.fsum(
        math.comb(order, k) * (1 - rate) ** (order - k) * rate**k * math.exp(k * (k - 1) / (2 * noise**2))
        for k in range(order + 1)
    )
    sampled = Event(sampling_rate=rate, noise_multiplier=noise)
    assert accounting.renyi(sampled, order) == pytest.approx(math.log(total) / (order - 1))
    assert accounting.renyi(sampled, order, "replace_one") is None
    assert accounting.renyi(replace(sampled, noise_multiplier=0.0), order) == math.inf


EVENTS = st.builds(
    Event, sampling_rate=st.sampled_from([0.01, 0.1]), noise_multiplier=st.floats(0.8, 20.0), count=st.integers(1, 500)
)


@settings(deadline=None, max_examples=30)
@given(epsilon=st.floats(0.3, 20.0), events=st.lists(EVENTS, max_size=6))
def test_whatever_the_renyi_filter_lets_pass_is_within_the_budget_by_every_accountant(epsilon, events):
    gate, passed = RenyiFilter.of(epsilon, DELTA), []
    for event in events:
        room = gate.room(passed, event)
        assert gate.admits([*passed, event]) == (room >= event.count)
        taken = replace(event, count=min(room, event.count))
        assert gate.admits([*passed, taken])
        passed.append(taken)
        if room < event.count:
            assert not gate.admits([*passed, replace(event, count=1)])
    spent = accounting.epsilon(passed, DELTA, "rdp")
    assert spent is not None and spent <= epsilon * (1 + 1e-9)


def test_the_order_is_fixed_by_the_budget_alone_and_wastes_little():
    """A fixed order costs: here of 8, 7.4 or more is reached; the rest is the price of planning afterwards."""
    gate = RenyiFilter.of(8.0, DELTA)
    assert gate.order in ORDERS and gate.bound == 8.0 - converted(gate.order, DELTA)
    for event in (
        gaussians(10.0),
        Event(sampling_rate=0.02, noise_multiplier=1.2),
        Event(sampling_rate=0.1, noise_multiplier=0.8),
    ):
        gate = RenyiFilter.of(8.0, DELTA, like=[replace(event, count=100)])
        filled = replace(event, count=gate.room([], event))
        reached = accounting.epsilon([filled], DELTA, "rdp")
        assert reached is not None and 7.7 < reached <= 8.0
        assert filled.count >= RenyiFilter.of(8.0, DELTA).room([], event)


def test_the_gaussian_filter_is_exact():
    gate = GaussianFilter.of(2.0, DELTA)
    filled = gaussians(40.0, gate.room([], gaussians(40.0)))
    mu = math.sqrt(filled.count) / 40.0
    assert gaussian.delta_of(mu, 2.0) <= DELTA < gaussian.delta_of(math.sqrt(filled.count + 1) / 40.0, 2.0)
    assert filled.count >= RenyiFilter.of(2.0, DELTA).room([], gaussians(40.0))
    assert GaussianFilter.of(2.0, DELTA, "replace_one").room([], gaussians(80.0)) == filled.count
    with pytest.raises(PrivacyRefused, match="not an unsampled Gaussian"):
        gate.admits([Event(sampling_rate=0.5, noise_multiplier=10.0)])


def test_an_event_without_noise_or_bound_never_passes():
    gate = RenyiFilter.of(8.0, DELTA)
    assert gate.room([], Event(sampling_rate=0.1, noise_multiplier=0.0)) == 0
    assert not gate.admits([Event(sampling_rate=0.1, noise_multiplier=0.0)])
    assert RenyiFilter.of(8.0, DELTA, "replace_one").room([], Event(sampling_rate=0.1, noise_multiplier=9.0)) == 0
    assert GaussianFilter.of(8.0, DELTA).room([], gaussians(0.0)) == 0


@pytest.mark.parametrize(("epsilon", "delta"), [(0.0, DELTA), (-1.0, DELTA), (1.0, 0.0), (1.0, 1.5), (math.nan, DELTA)])
def test_a_budget_that_is_none_is_refused(epsilon, delta):
    for kind in (RenyiFilter, GaussianFilter):
        with pytest.raises(UsageError):
            kind.of(epsilon, delta)
    with pytest.raises(PrivacyRefused, match="too little"):
        RenyiFilter.of(1e-4, 1e-9)


# ---- a limit on an account ----

PLAN = DpSgd(population=1000, expected_batch_size=50.0, steps=100, noise_multiplier=2.0, delta=DELTA)
EVENT = PLAN.event(1)
LIMIT = (1.5, DELTA)


def run(folder: Path, name: str, steps: int, *, plan: DpSgd = PLAN, limit: tuple[float, float] | None = None) -> int:
    """Takes steps until the ledger says no. Returns how many there were."""
    with Ledger.open(
        folder / f"{name}.db", run=name, plan=plan, account=folder / "account.db", account_limit=limit
    ) as ledger:
        for step in range(steps):
            try:
                ledger.commit(ledger.reserve(plan.event(1), step))
            except BudgetExhausted:
                return step
    return steps


def most() -> int:
    """How many such steps the limit has room for."""
    return RenyiFilter.of(*LIMIT, like=[PLAN.event()]).room([], EVENT)


def test_a_run_that_the_limit_has_no_room_for_is_not_begun_and_told_what_is_left(tmp_path):
    assert 100 < most() < 200
    run(tmp_path, "first", 100, limit=LIMIT)
    with pytest.raises(PrivacyRefused, match=f"room for {most() - 100} of 100 steps") as refused:
        run(tmp_path, "second", 1)  # it says nothing of a limit: the account knows
    assert (refused.value.code, refused.value.exit_code) == ("account_limit", 3)
    assert not (tmp_path / "second.db").exists()
    assert run(tmp_path, "third", 10**6, plan=replace(PLAN, steps=most() - 100)) == most() - 100
    shown = show(tmp_path / "account.db")
    assert shown["limits"][0]["epsilon"] == 1.5 and 0.99 < shown["limits"][0]["spent"] <= 1
    assert shown["epsilon"] <= 1.5
    assert "whatever is planned" in shown["detail"]


def test_a_limit_is_added_and_never_raised(tmp_path):
    run(tmp_path, "a", 10, limit=LIMIT)
    run(tmp_path, "b", 10, plan=replace(PLAN, steps=10), limit=(50.0, DELTA))  # more is no less
    with pytest.raises(PrivacyRefused, match=r"account_epsilon = 1\.5 "):
        run(tmp_path, "c", 1, plan=replace(PLAN, steps=most()), limit=(50.0, DELTA))
    with pytest.raises(PrivacyRefused, match=r"account_epsilon = 0\.5 "):
        run(tmp_path, "d", 1, limit=(0.5, DELTA))
    assert [(limit["epsilon"], limit["declared_after"]) for limit in show(tmp_path / "account.db")["limits"]] == [
        (1.5, 0),
        (50.0, 10),
    ]


def test_runs_side_by_side_cannot_pass_a_limit_together(tmp_path):
    """Both may begin, because neither has spent; together they get what the limit has room for."""
    plan, taken, begun = replace(PLAN, steps=most() - 10), {}, threading.Barrier(2)

    def go(name: str) -> None:
        account = tmp_path / "account.db"
        with Ledger.open(tmp_path / f"{name}.db", run=name, plan=plan, account=account, account_limit=LIMIT) as ledger:
            begun.wait()
            for step in range(plan.steps):
                try:
                    ledger.reserve(EVENT, step)
                except BudgetExhausted as stop:
                    assert stop.code == "account_limit"
                    break
                taken[name] = step + 1
            begun.wait()

    threads = [threading.Thread(target=go, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(taken.values()) == most()
    assert show(tmp_path / "account.db")["limits"][0]["spent"] <= 1


WHOLE = DpSgd(
    population=1000, expected_batch_size=1000.0, steps=200, noise_multiplier=12.0, delta=DELTA, adjacency="replace_one"
)


def test_a_limit_that_is_declared_while_a_run_goes_on_holds_it_under_its_adjacency(tmp_path):
    """Half the sensitivity would let all 200 steps pass."""
    account, epsilon = tmp_path / "account.db", 8.0
    halved = accounting.epsilon([WHOLE.event()], DELTA, "rdp")
    assert halved is not None and halved < epsilon < WHOLE.epsilon()
    with Ledger.open(tmp_path / "a.db", run="a", plan=WHOLE, account=account) as ledger:
        ledger.reserve(WHOLE.event(1), 0)
        run(tmp_path, "b", 1, plan=replace(WHOLE, steps=1, noise_multiplier=200.0), limit=(epsilon, DELTA))
        with pytest.raises(BudgetExhausted) as stop:
            for step in range(1, WHOLE.steps):
                ledger.reserve(WHOLE.event(1), step)
        assert stop.value.code == "account_limit"
        taken = ledger.spent()
    (limit,) = show(account)["limits"]
    assert 0.95 < limit["spent"] <= 1
    figure = accounting.epsilon(taken, DELTA, "rdp", "replace_one")
    assert figure is not None and figure <= epsilon


def test_a_limit_that_is_declared_while_a_run_goes_on_refuses_what_rdp_has_no_bound_for(tmp_path):
    account, sampled = tmp_path / "account.db", replace(WHOLE, expected_batch_size=50.0)
    with Ledger.open(tmp_path / "a.db", run="a", plan=sampled, account=account) as ledger:
        run(tmp_path, "b", 1, plan=replace(WHOLE, steps=1), limit=(8.0, DELTA))
        with pytest.raises(BudgetExhausted) as stop:
            ledger.reserve(sampled.event(1), 0)
        assert stop.value.code == "account_limit" and ledger.spent() == []
    assert show(account)["events"] == [WHOLE.event(1).to_dict()]


def test_a_resumed_run_declares_no_limit_where_nothing_bounds_the_runs_together(tmp_path):
    run(tmp_path, "a", 10)
    run(tmp_path, "b", 10, plan=replace(PLAN, unit="person", records_per_unit=3))
    with pytest.raises(PrivacyRefused, match="differ in unit") as refused:
        run(tmp_path, "a", 10, limit=LIMIT)
    assert refused.value.code == "account_mixed"
    assert show(tmp_path / "account.db")["limits"] == []
    assert run(tmp_path, "a", 10) == 10


def test_a_run_on_a_mixed_account_that_holds_a_limit_all_the_same_takes_nothing(tmp_path):
    """As an earlier version could leave one: there a resumed run declared its limit unseen."""
    run(tmp_path, "other", 10, limit=(50.0, DELTA))
    plan = replace(PLAN, unit="person", records_per_unit=3)
    with contextlib.closing(sqlite3.connect(tmp_path / "account.db")) as connection, connection:
        (limit,) = connection.execute("SELECT * FROM limits").fetchall()
        connection.execute("DELETE FROM limits")
        connection.commit()
        with Ledger.open(tmp_path / "a.db", run="a", plan=plan, account=tmp_path / "account.db") as ledger:
            connection.execute("INSERT INTO limits VALUES (?, ?, ?, ?)", limit)
            connection.commit()
            with pytest.raises(PrivacyRefused, match="differ in unit"):
                ledger.reserve(plan.event(1), 0)
            assert ledger.spent() == []


def test_a_run_that_was_begun_within_a_limit_can_be_resumed(tmp_path):
    run(tmp_path, "a", 40, limit=LIMIT)
    assert run(tmp_path, "a", 60, limit=LIMIT) == 60


def test_runs_of_different_units_have_no_figure_together_and_no_room_under_a_limit(tmp_path):
    run(tmp_path, "a", 10)
    run(tmp_path, "b", 10, plan=replace(PLAN, unit="person", records_per_unit=3))
    shown = show(tmp_path / "account.db")
    assert shown["epsilon"] is None and "differ in unit (person, record)" in shown["detail"]
    with pytest.raises(PrivacyRefused, match="differ in unit") as refused:
        run(tmp_path, "c", 1, limit=LIMIT)
    assert refused.value.code == "account_mixed"


def test_runs_of_different_adjacency_have_no_figure_together(tmp_path):
    run(tmp_path, "a", 10)
    run(tmp_path, "b", 10, plan=replace(PLAN, adjacency="replace_one"))
    shown = show(tmp_path / "account.db")
    assert shown["epsilon"] is None and "differ in adjacency (add_or_remove, replace_one)" in shown["detail"]


def test_a_run_without_privacy_takes_the_figure_and_the_limit_away(tmp_path):
    plan = NotPrivate(population=10, expected_batch_size=2, steps=3)
    Ledger.open(tmp_path / "open.db", run="open", plan=plan, account=tmp_path / "account.db").close()
    assert "without privacy" in show(tmp_path / "account.db")["detail"]
    with pytest.raises(PrivacyRefused, match="without privacy"):
        run(tmp_path, "a", 1, limit=LIMIT)


def test_what_rdp_has_no_bound_for_is_said(tmp_path):
    run(tmp_path, "a", 10, plan=replace(PLAN, adjacency="replace_one"))
    shown = show(tmp_path / "account.db")
    assert shown["epsilon"] is None and "RDP has no bound" in shown["detail"]
    assert shown["runs"][0]["epsilon"] > 0  # its own, by PLD
    with pytest.raises(PrivacyRefused):
        run(tmp_path, "b", 1, plan=replace(PLAN, adjacency="replace_one"), limit=(50.0, DELTA))


def test_an_account_without_a_limit_says_what_its_figure_is_worth(tmp_path):
    run(tmp_path, "a", 10)
    assert "had their plans been fixed beforehand" in show(tmp_path / "account.db")["detail"]
    with pytest.raises(UsageError, match="kept in an account"):
        Ledger.open(tmp_path / "x.db", run="x", plan=PLAN, account_limit=LIMIT)
    with pytest.raises(LedgerError):
        Ledger.open(tmp_path / "a.db", run="b", plan=PLAN, account=tmp_path / "account.db")
