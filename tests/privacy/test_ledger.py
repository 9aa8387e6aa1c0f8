"""The ledger: what was computed is always written down, whatever dies, fills up or is copied in between."""

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.errors import BudgetExhausted, LedgerError, OutsideError, UsageError, VerificationFailed
from sfumato.privacy.accounting import Event
from sfumato.privacy.ledger import (
    Ledger,
    events_of_jsonl,
    export_jsonl,
    plan_of_jsonl,
    show,
    verify_chain,
)
from sfumato.privacy.ledger.chain import canonical, link, reserve_body
from sfumato.privacy.plan import Composition, DpSgd, MeanEmbedding, NotPrivate

PLAN = DpSgd(population=1000, expected_batch_size=100.0, steps=200, noise_multiplier=2.0, delta=1e-4)
EVENT = PLAN.event(1)


def take(path: Path, steps: int, *, first: int = 0, committed: bool = True, **how) -> int:
    """Opens, takes steps, closes. Returns the last reservation's sequence."""
    sequence = 0
    with Ledger.open(path, run="r", **{"plan": PLAN, **how}) as ledger:
        for step in range(first, first + steps):
            sequence = ledger.reserve(EVENT, step)
            if committed:
                ledger.commit(sequence)
    return sequence


def spent(path: Path) -> int:
    return sum(event["count"] for event in show(path)["events"])


def write(path: Path, statement: str, *values) -> None:
    """Changes the database behind the ledger's back."""
    connection = sqlite3.connect(path)
    connection.execute(statement, values)
    connection.commit()
    connection.close()


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "run" / "ledger.db"


# ---- reserve, commit, budget ----


def test_a_reservation_is_on_disk_when_reserve_returns(path):
    with Ledger.open(path, run="r", plan=PLAN) as ledger:
        for step in range(3):
            ledger.reserve(EVENT, step)
            assert spent(path) == step + 1  # another connection sees it
        assert ledger.spent_steps == 3 and ledger.remaining_steps == 197
        assert ledger.spent() == [PLAN.event(3)]


def test_writes_are_synchronous(path):
    with Ledger.open(path, run="r", plan=PLAN) as ledger:
        (mode,) = ledger._connection.execute("PRAGMA journal_mode").fetchone()
        (level,) = ledger._connection.execute("PRAGMA synchronous").fetchone()
    assert (mode, level) in [
        ("wal", 2),
        ("delete", 3),
    ]  # FULL syncs the log at every commit; EXTRA the journal's folder


def test_what_was_reserved_and_never_committed_stays_spent(path):
    take(path, 5, committed=False)
    take(path, 2, first=5)
    assert spent(path) == 7
    assert show(path)["uncommitted"] == 5


def test_the_budget_ends_at_the_plans_steps_whatever_was_wasted(path):
    take(path, 150, committed=False)
    with Ledger.open(path, run="r", plan=PLAN) as ledger:
        for step in range(50):
            ledger.commit(ledger.reserve(EVENT, step))
        before = ledger.head
        with pytest.raises(BudgetExhausted, match="200 spent"):
            ledger.reserve(EVENT, 50)
        assert ledger.head == before and ledger.spent_steps == 200 and ledger.remaining_steps == 0
    shown = show(path)
    assert shown["epsilon"] == PLAN.epsilon()
    assert BudgetExhausted.exit_code == 3


def test_a_block_that_would_pass_the_end_is_refused_whole(path):
    with Ledger.open(path, run="r", plan=PLAN) as ledger:
        ledger.reserve(PLAN.event(150), 0)
        with pytest.raises(BudgetExhausted):
            ledger.reserve(PLAN.event(51), 150)
        ledger.reserve(PLAN.event(50), 150)
        assert ledger.spent() == [PLAN.event(200)]


def test_an_event_that_is_not_the_plans_is_refused(path):
    with Ledger.open(path, run="r", plan=PLAN) as ledger:
        for event in (
            Event(sampling_rate=0.1, noise_multiplier=3.0),
            Event(sampling_rate=0.05, noise_multiplier=2.0),
            Event(mechanism="gaussian", sampling_rate=1.0, noise_multiplier=2.0),
        ):
            with pytest.raises(LedgerError, match="must be the plan's"):
                ledger.reserve(event, 0)
        with pytest.raises(UsageError, match="at least one event"):
            ledger.reserve(PLAN.event(0), 0)
        with pytest.raises(UsageError, match="step = -1"):
            ledger.reserve(EVENT, -1)
        assert ledger.spent() == []


def test_a_ledger_without_a_plan_counts_without_a_limit(path):
    other = Event(sampling_rate=0.5, noise_multiplier=1.0)
    with Ledger.open(path, run="r") as ledger:
        for event in (EVENT, other, EVENT):
            ledger.reserve(event, 0)
        assert ledger.spent() == [PLAN.event(2), other]
        with pytest.raises(UsageError, match="no limit"):
            _ = ledger.remaining_steps


def test_a_run_without_privacy_has_nothing_to_reserve(path):
    plan = NotPrivate(population=10, expected_batch_size=2, steps=3)
    with Ledger.open(path, run="r", plan=plan) as ledger, pytest.raises(LedgerError, match="nothing to reserve"):
        ledger.reserve(EVENT, 0)
    assert show(path)["epsilon"] is None


def test_only_an_open_reservation_can_be_committed_and_only_once(path):
    with Ledger.open(path, run="r", plan=PLAN) as ledger:
        sequence = ledger.reserve(EVENT, 0)
        ledger.commit(sequence)
        for wrong in (sequence, sequence + 1, 0, 1):
            with pytest.raises(LedgerError, match="not an open reservation"):
                ledger.commit(wrong)


def test_every_opening_is_an_attempt(path):
    for attempt in (1, 2, 3):
        with Ledger.open(path, run="r", plan=PLAN) as ledger:
            assert ledger.attempt == attempt
            ledger.reserve(EVENT, 0)


def test_a_closed_ledger_takes_nothing(path):
    ledger = Ledger.open(path, run="r", plan=PLAN)
    ledger.close()
    ledger.close()
    with pytest.raises(LedgerError, match="is closed"):
        ledger.reserve(EVENT, 0)


def test_a_plan_of_several_kinds_has_room_for_each_of_them(path, tmp_path):
    whom = {"population": 1000, "delta": 1e-4}
    mean = MeanEmbedding(dimension=10, noise_multiplier=20.0, **whom)
    steps = DpSgd(expected_batch_size=100.0, steps=5, noise_multiplier=2.0, **whom)
    plan, account = Composition.of(mean, steps), tmp_path / "account.db"
    (release,), step = mean.events(), steps.event(1)
    with Ledger.open(path, run="r", plan=plan, account=account) as ledger:
        assert (ledger.remaining(release), ledger.remaining(step)) == (1, 5)
        assert ledger.remaining(Event(sampling_rate=0.5, noise_multiplier=1.0)) == 0
        with pytest.raises(UsageError, match="2 kinds of events"):
            _ = ledger.remaining_steps
        ledger.commit(ledger.reserve(release, 0))
        for number in range(4):
            ledger.commit(ledger.reserve(step, number, 5 - number))
        with pytest.raises(BudgetExhausted, match="1 spent"):
            ledger.reserve(release, 1)
        with pytest.raises(LedgerError, match="must be the plan's"):
            ledger.reserve(Event(sampling_rate=0.5, noise_multiplier=1.0), 0)
        assert sum(in_account(account).values()) >= 5
    with Ledger.open(path, run="r", plan=plan, account=account) as ledger:
        ledger.reserve(step, 4)
        with pytest.raises(BudgetExhausted, match="5 spent"):
            ledger.reserve(step, 5)
    shown = show(path)
    assert shown["epsilon"] == pytest.approx(plan.epsilon()) and shown["steps"] == 6
    assert events_of_jsonl(export_jsonl(path)) == list(plan.events())
    assert in_account(account) == {"r": 6}


# ---- identity ----


def test_another_run_another_plan_or_a_missing_ledger_is_refused(path):
    take(path, 1)
    longer = DpSgd(population=1000, expected_batch_size=100.0, steps=201, noise_multiplier=2.0, delta=1e-4)
    with pytest.raises(LedgerError, match="belongs to 'r'"):
        Ledger.open(path, run="another", plan=PLAN)
    with pytest.raises(LedgerError, match="different: steps"):
        Ledger.open(path, run="r", plan=longer)
    with pytest.raises(LedgerError, match="does not exist"):
        Ledger.open(path.with_name("gone.db"), run="r", create=False)
    with Ledger.open(path, run="r") as ledger:  # no plan given: the one it holds
        assert ledger.plan == PLAN


# ---- one writer ----


def holder(path: Path) -> subprocess.Popen:
    """Another process that opens the ledger, says so, and waits."""
    code = (
        "import sys, time; from sfumato.privacy.ledger import Ledger\n"
        "ledger = Ledger.open(sys.argv[1], run='r'); print('open', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "open\n"
    return process


def test_a_second_writer_is_told_who_holds_the_ledger_and_death_frees_it(path):
    take(path, 1)
    process = holder(path)
    try:
        with pytest.raises(LedgerError, match=f"run 'r', process {process.pid}") as busy:
            Ledger.open(path, run="r", plan=PLAN)
        assert busy.value.exit_code == 3 and busy.value.code == "ledger_busy"
        assert show(path)["valid"]  # reading is free
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    take(path, 1, first=1)
    assert spent(path) == 2


def test_a_second_writer_in_the_same_process_is_refused_too_and_does_not_free_the_lock(path):
    with Ledger.open(path, run="r", plan=PLAN) as ledger:
        for _ in range(2):
            with pytest.raises(LedgerError, match="is being written by"):
                Ledger.open(path, run="r", plan=PLAN)
        code = "import sys; from sfumato.privacy.ledger import Ledger; Ledger.open(sys.argv[1], run='r')"
        other = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
        assert "is being written by" in other.stderr
        ledger.reserve(EVENT, 0)


def test_a_writer_that_came_in_past_the_lock_is_noticed(path):
    noticed = pytest.raises(LedgerError, match="somebody else has written")  # at the end once more
    with noticed, Ledger.open(path, run="r", plan=PLAN) as first:
        first.reserve(EVENT, 0)
        path.with_name(path.name + ".lock").unlink()
        with Ledger.open(path, run="r", plan=PLAN) as second:
            second.reserve(EVENT, 0)
            with pytest.raises(LedgerError, match="somebody else has written"):
                first.reserve(EVENT, 1)


def test_a_forked_child_cannot_spend(path):
    with Ledger.open(path, run="r", plan=PLAN) as ledger:
        child = os.fork()
        if child == 0:
            try:
                ledger.reserve(EVENT, 0)
            except LedgerError as error:
                os._exit(7 if error.code == "ledger_forked" else 8)
            os._exit(9)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        ledger.reserve(EVENT, 0)


# ---- kill -9 ----

TRAINER = """
import os, sys
from pathlib import Path
from sfumato.privacy.ledger import Ledger
path, account, computed = map(Path, sys.argv[1:])
with Ledger.open(path, run="r", account=account) as ledger:
    print("open", flush=True)
    log = os.open(computed, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    event = ledger.plan.event(1)
    for step in range(ledger.remaining_steps):
        sequence = ledger.reserve(event, step)
        os.write(log, b"x")  # here the data is touched
        ledger.commit(sequence)
    print("done", flush=True)
"""


def test_after_kills_at_random_moments_no_computed_step_is_missing_and_the_budget_holds(path, tmp_path):
    """Ten kills; each resume continues, and what the kills wasted comes off the rest."""
    account, computed = tmp_path / "account.db", tmp_path / "computed"
    plan = DpSgd(population=1000, expected_batch_size=100.0, steps=1000, noise_multiplier=3.0, delta=1e-4)
    Ledger.open(path, run="r", plan=plan, account=account).close()
    chance = random.Random(1)
    kills = 0

    def size(path: Path) -> int:
        return path.stat().st_size if path.exists() else 0

    for _ in range(30):
        process = subprocess.Popen(
            [sys.executable, "-c", TRAINER, str(path), str(account), str(computed)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None and process.stdout.readline() == "open\n"
        if kills < 10:
            target = size(computed) + chance.randrange(40)
            while size(computed) < target:
                time.sleep(0.001)
            time.sleep(chance.random() * 0.003)  # anywhere between two instructions
            process.send_signal(signal.SIGKILL)
            kills += 1
        done = process.stdout.read() == "done\n"
        process.stdout.close()
        process.wait()
        assert spent(path) >= size(computed)
        assert show(account)["events"] == [] or sum(e["count"] for e in show(account)["events"]) >= spent(path)
        if done:
            break
    assert kills == 10
    assert 1000 - kills <= computed.stat().st_size <= spent(path) == 1000
    assert show(path)["epsilon"] == plan.epsilon()
    assert sum(event["count"] for event in show(account)["events"]) == 1000


def test_a_kill_between_reserve_and_commit_leaves_the_event_spent(path):
    take(path, 1)
    code = (
        "import os, signal, sys; from sfumato.privacy.ledger import Ledger\n"
        "ledger = Ledger.open(sys.argv[1], run='r'); ledger.reserve(ledger.plan.event(1), 1)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == -signal.SIGKILL
    assert spent(path) == 2 and show(path)["uncommitted"] == 1
    with Ledger.open(path, run="r", plan=PLAN) as ledger:
        assert ledger.remaining_steps == 198 and ledger.attempt == 3


# ---- checkpoints newer than the ledger ----


def test_a_checkpoint_newer_than_the_ledger_is_refused(path):
    take(path, 3)
    shutil.copy(path, path.with_name("old.db"))
    sequence = take(path, 4, first=3)
    with Ledger.open(path, run="r", plan=PLAN) as ledger:
        ledger.require_at_least(sequence)
        ledger.require_at_least(ledger.reserve(EVENT, 7))
        with pytest.raises(LedgerError, match="hides spending"):
            ledger.require_at_least(ledger.sequence + 1)
    os.replace(path.with_name("old.db"), path)
    refusal = pytest.raises(LedgerError, match="older than the checkpoint")
    with Ledger.open(path, run="r", plan=PLAN) as ledger, refusal:
        ledger.require_at_least(sequence)


def test_the_entry_of_the_new_attempt_does_not_make_an_old_ledger_look_new(path):
    sequence = take(path, 1)
    shutil.copy(path, path.with_name("old.db"))
    with Ledger.open(path, run="r", plan=PLAN) as ledger:
        newer = ledger.reserve(EVENT, 1)
    assert newer == sequence + 4  # commit, close, open, reserve
    os.replace(path.with_name("old.db"), path)
    with Ledger.open(path, run="r", plan=PLAN) as ledger:
        for step in range(5):
            with pytest.raises(LedgerError):
                ledger.require_at_least(ledger.sequence + (step > 0))
            ledger.reserve(EVENT, step)
        ledger.require_at_least(sequence)


# ---- tampering and corruption ----


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM entries WHERE sequence = 4",
        "UPDATE entries SET body = replace(body, '\"step\":1', '\"step\":9') WHERE sequence = 4",
        "UPDATE entries SET body = replace(body, '\"noise_multiplier\":2.0', '\"noise_multiplier\":4.0')",
        "UPDATE entries SET hash = upper(hash) WHERE sequence = 2",
        "UPDATE entries SET sequence = 99 WHERE sequence = (SELECT max(sequence) FROM entries)",
        "UPDATE entries SET body = 'nonsense' WHERE sequence = 3",
        "UPDATE entries SET body = x'ff00' WHERE sequence = 3",
        "UPDATE header SET body = replace(body, '\"steps\":200', '\"steps\":300')",
        "UPDATE header SET body = '{}'",
        "UPDATE header SET body = '[]'",
        "DELETE FROM header",
        "DROP TABLE entries",
    ],
)
def test_a_changed_ledger_is_refused_by_every_reader(path, statement):
    take(path, 4)
    write(path, statement)
    for reader in (verify_chain, export_jsonl, lambda path: Ledger.open(path, run="r", plan=PLAN)):
        with pytest.raises(LedgerError):
            reader(path)
    try:
        assert show(path)["valid"] is False
    except LedgerError as error:
        assert error.code == "ledger_torn"


def test_a_recomputed_chain_still_cannot_pass_the_plan(path):
    """Whoever rewrites all hashes needs another plan in the header, and the run knows its own."""
    with pytest.raises(LedgerError, match="somebody else"), Ledger.open(path, run="r", plan=PLAN) as ledger:
        ledger.reserve(PLAN.event(200), 0)
        history = ledger._history
        body = reserve_body(EVENT, 1, 200)
        ledger._connection.execute(
            "INSERT INTO entries VALUES (?, ?, ?)", (history.sequence + 1, body, link(history.head, body))
        )
    with pytest.raises(LedgerError, match="the plan ends at 200"):
        verify_chain(path)


@pytest.mark.parametrize(
    "content", [b"", b"SQLite format 3\0", b"not a database, but long enough to be read as one" * 50]
)
def test_a_file_that_is_no_ledger_is_refused(path, content):
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(LedgerError) as error:
        Ledger.open(path, run="r", plan=PLAN)
    assert error.value.code == "ledger_torn"
    assert path.read_bytes() == content
    with pytest.raises(LedgerError):
        show(path)


def test_a_ledger_torn_at_any_length_or_overwritten_anywhere_is_refused_or_whole(path):
    """120 seeded changes: never another figure, never another exception."""
    take(path, 40)
    good, before = path.read_bytes(), show(path)
    chance = random.Random(3)
    for trial in range(120):
        if trial % 3 == 0:
            bad = good[: chance.randrange(len(good))]
        else:
            at = chance.randrange(len(good))
            bad = good[:at] + chance.randbytes(chance.choice([1, 8, 300])) + good[at:]
            bad = bad[: len(good)]
        path.write_bytes(bad)
        try:
            shown = show(path)
            if shown["valid"]:
                assert {**shown, "path": ""} == {**before, "path": ""}
        except LedgerError as error:
            assert error.next
        for leftover in path.parent.glob("ledger.db-*"):
            leftover.unlink()


def test_a_missing_file_is_wrong_use(path):
    with pytest.raises(UsageError, match="must be a file"):
        show(path)


# ---- a full disk ----


def test_a_full_disk_charges_nothing_hides_nothing_and_can_be_resumed_in_place(path):
    with Ledger.open(path, run="r", plan=PLAN) as ledger:
        ledger.reserve(EVENT, 0)
        (pages,) = ledger._connection.execute("PRAGMA page_count").fetchone()
        ledger._connection.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(OutsideError) as full:
            for step in range(1, 200):
                ledger.reserve(EVENT, step)
        assert full.value.exit_code == 5 and full.value.code == "disk_full"
        written = spent(path)
        assert written == ledger.spent_steps
        with pytest.raises(OutsideError):
            ledger.reserve(EVENT, written)
        ledger._connection.execute("PRAGMA max_page_count = 100000")
        ledger.reserve(EVENT, written)
        assert spent(path) == written + 1


LIMITED = """
import resource, signal, sys
from sfumato.errors import OutsideError
from sfumato.privacy.ledger import Ledger
from sfumato.privacy.plan import DpSgd
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
plan = DpSgd(population=1000, expected_batch_size=100.0, steps=5000, noise_multiplier=2.0, delta=1e-4)
ledger = Ledger.open(sys.argv[1], run="r", plan=plan, account=sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
step = 0
try:
    for step in range(5000):
        ledger.reserve(plan.event(1), step)
except OutsideError as error:
    print(error.exit_code, step, flush=True)
import os; os._exit(0)
"""


@pytest.mark.parametrize("limit", [30_000, 150_000])
def test_when_no_file_may_grow_the_last_step_is_refused_before_it_happens(path, tmp_path, limit):
    """The operating system refuses the write itself, as it does on a full disk."""
    account = tmp_path / "account.db"
    out = subprocess.run(
        [sys.executable, "-c", LIMITED, str(path), str(account), str(limit)], capture_output=True, text=True
    )
    code, taken = map(int, out.stdout.split())
    assert code == 5
    assert spent(path) == taken
    with Ledger.open(path, run="r", account=account) as ledger:
        ledger.reserve(EVENT, taken)
    assert spent(path) == taken + 1


def test_a_disk_that_is_full_from_the_start_leaves_no_ledger(path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    with pytest.raises(OutsideError, match="No space left") as error:
        Ledger.open(path, run="r", plan=PLAN)
    assert error.value.code == "disk_full"
    monkeypatch.undo()
    assert [name for name in os.listdir(path.parent) if not name.endswith(".lock")] == []
    assert take(path, 1) == 2


def test_a_failing_close_does_not_hide_the_error_that_came_before(path):
    with pytest.raises(ZeroDivisionError) as error, Ledger.open(path, run="r", plan=PLAN) as ledger:
        ledger.commit(ledger.reserve(EVENT, 0))
        ledger._connection.execute("PRAGMA query_only = ON")
        _ = 1 / 0
    assert "Closing the ledger failed too" in error.value.__notes__[0]
    assert show(path)["uncommitted"] == 1  # a lost mark: pessimistic
    take(path, 1, first=1)


# ---- the account ----


def in_account(account: Path) -> dict[str, int]:
    return {run["run"]: sum(event["count"] for event in run["events"]) for run in show(account)["runs"]}


def test_an_account_knows_what_all_runs_have_spent(tmp_path):
    account = tmp_path / "home" / "account.db"
    take(tmp_path / "a.db", 3, account=account)
    with Ledger.open(tmp_path / "b.db", run="b", plan=PLAN, account=account) as ledger:
        ledger.reserve(EVENT, 0)
        assert in_account(account) == {"r": 3, "b": 1}
        (other,) = ledger.other_runs()
        assert (other["run"], other["events"], other["delta"]) == ("r", [PLAN.event(3).to_dict()], 1e-4)
        assert other["epsilon"] == PLAN.epsilon(3)
    assert in_account(account) == {"r": 3, "b": 1}
    shown = show(account)
    assert shown["events"] == [PLAN.event(4).to_dict()]
    assert shown["epsilon"] >= PLAN.epsilon(4)  # RDP


def test_a_run_without_privacy_is_known_to_the_account(tmp_path):
    account = tmp_path / "account.db"
    plan = NotPrivate(population=10, expected_batch_size=2, steps=3)
    Ledger.open(tmp_path / "open.db", run="open", plan=plan, account=account).close()
    with Ledger.open(tmp_path / "b.db", run="b", plan=PLAN, account=account) as ledger:
        assert [run["private"] for run in ledger.other_runs()] == [False]
    assert show(account)["epsilon"] is None


def test_the_account_holds_what_the_ledger_holds_block_by_block(tmp_path, monkeypatch):
    account, path = tmp_path / "account.db", tmp_path / "a.db"
    monkeypatch.setattr("sfumato.privacy.ledger.run.Pace.at_once", lambda self, left, ahead: min(16, left, ahead))
    with Ledger.open(path, run="a", plan=PLAN, account=account) as ledger:
        for step in range(200):
            ledger.reserve(EVENT, step, 50 if step < 190 else 1)
            assert in_account(account)["a"] == ledger.spent_steps <= 200


def test_two_accounts_are_never_the_same_and_a_run_keeps_to_its_own(tmp_path):
    for name in ("a", "b"):
        take(tmp_path / f"{name}.db", 1, account=tmp_path / f"account-{name}.db")
    assert show(tmp_path / "account-a.db")["account"] != show(tmp_path / "account-b.db")["account"]
    wrong = {
        tmp_path / "account-b.db": "ledger_account",
        None: "ledger_account",
        tmp_path / "new.db": "account_missing",
    }
    for account, code in wrong.items():
        with pytest.raises(LedgerError) as error:
            Ledger.open(tmp_path / "a.db", run="r", plan=PLAN, account=account)
        assert error.value.code == code
    assert not (tmp_path / "new.db").exists()  # a new account would hide what was spent


def test_a_ledger_set_back_to_an_older_copy_is_noticed_by_the_account(tmp_path):
    account, path = tmp_path / "account.db", tmp_path / "a.db"
    take(path, 2, account=account)
    shutil.copy(path, tmp_path / "old.db")
    take(path, 3, account=account)
    os.replace(tmp_path / "old.db", path)
    with pytest.raises(LedgerError, match="older copy") as error:
        Ledger.open(path, run="r", plan=PLAN, account=account)
    assert error.value.code == "ledger_set_back"


def test_an_account_set_back_to_an_older_copy_is_noticed_by_the_ledger(tmp_path):
    account, path = tmp_path / "account.db", tmp_path / "a.db"
    take(tmp_path / "first.db", 1, account=account)
    shutil.copy(account, tmp_path / "old.db")
    take(path, 2, account=account)
    for name in ("account.db-wal", "account.db-shm"):
        (tmp_path / name).unlink(missing_ok=True)
    os.replace(tmp_path / "old.db", account)
    with pytest.raises(LedgerError, match="older copy") as error:
        Ledger.open(path, run="r", plan=PLAN, account=account)
    assert error.value.code == "account_set_back"


def test_two_living_copies_of_one_ledger_cannot_both_go_on(tmp_path):
    account, path = tmp_path / "account.db", tmp_path / "a.db"
    take(path, 1, account=account)
    shutil.copy(path, tmp_path / "copy.db")
    first = Ledger.open(path, run="r", plan=PLAN, account=account)
    with Ledger.open(tmp_path / "copy.db", run="r", plan=PLAN, account=account) as second:
        second.reserve(EVENT, 1)
        with pytest.raises(LedgerError, match="another copy"):
            first.reserve(EVENT, 1)  # its next entry, not some entry later
        with pytest.raises(LedgerError, match="another copy"):
            first.close()


DIES = """
import os, shutil, signal, sys
from pathlib import Path
from sfumato.privacy.ledger import Ledger
path, account, steps, backup_at = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
ledger = Ledger.open(path, run="r", account=account)
for step in range(steps):
    if step == backup_at:
        for file in path.parent.glob(path.name + "*"):
            shutil.copy(file, path.parent / "backup" / file.name)
    ledger.commit(ledger.reserve(ledger.plan.event(1), step))
os.kill(os.getpid(), signal.SIGKILL)
"""


def dies(path: Path, account: Path, steps: int, backup_at: int = -1) -> None:
    """Takes steps in another process, which is killed then; before one of them it copies the ledger."""
    (path.parent / "backup").mkdir(exist_ok=True)
    process = subprocess.run([sys.executable, "-c", DIES, *map(str, (path, account, steps, backup_at))])
    assert process.returncode == -signal.SIGKILL


def put_back(path: Path) -> None:
    """The copy of the ledger that was made on the way takes its place."""
    for file in path.parent.glob(path.name + "*"):
        file.unlink()
    for file in (path.parent / "backup").iterdir():
        shutil.copy(file, path.parent / file.name)


def test_after_a_crash_the_account_holds_what_the_ledger_holds(tmp_path):
    account, path = tmp_path / "account.db", tmp_path / "a.db"
    Ledger.open(path, run="r", plan=PLAN, account=account).close()
    dies(path, account, 60)
    assert in_account(account) == {"r": 60} and spent(path) == 60
    with Ledger.open(path, run="r", plan=PLAN, account=account) as ledger:
        assert ledger.notes == [] and ledger.remaining_steps == 140
    assert in_account(account) == {"r": 60} and spent(path) == 60


@pytest.mark.parametrize("backup_at", [0, 5, 58])
def test_a_crashed_run_is_not_continued_from_an_older_copy_of_its_ledger(tmp_path, backup_at):
    """Sixty events were used; a copy that knows of 58 at most is refused, however near."""
    account, path = tmp_path / "account.db", tmp_path / "run" / "a.db"
    Ledger.open(path, run="r", plan=PLAN, account=account).close()
    dies(path, account, 60, backup_at=backup_at)
    put_back(path)
    with pytest.raises(LedgerError, match="older copy") as error:
        Ledger.open(path, run="r", plan=PLAN, account=account)
    assert error.value.code == "ledger_set_back" and error.value.exit_code == 3
    assert in_account(account) == {"r": 60}


def test_a_copy_that_lacks_the_last_entry_alone_is_charged_for_it(tmp_path):
    """It looks like a death between the two files. Sixty were used, the copy knows 59: it goes on from 60, and says so."""
    account, path = tmp_path / "account.db", tmp_path / "run" / "a.db"
    Ledger.open(path, run="r", plan=PLAN, account=account).close()
    dies(path, account, 60, backup_at=59)
    put_back(path)
    assert spent(path) == 59
    with Ledger.open(path, run="r", plan=PLAN, account=account) as ledger:
        assert ledger.remaining_steps == 140
        assert ["events = 1 charged in the account" in note for note in ledger.notes] == [True]
        for step in range(140):
            ledger.reserve(EVENT, step)
        with pytest.raises(BudgetExhausted):
            ledger.reserve(EVENT, 140)
    assert spent(path) == 200 and in_account(account) == {"r": 200}  # 59 + 1 used before, 140 now: none hidden
    assert events_of_jsonl(export_jsonl(path)) == [PLAN.event(200)]
    verify_chain(path)


def test_a_copy_that_lacks_a_last_block_is_charged_for_all_of_it(tmp_path):
    account, path = tmp_path / "account.db", tmp_path / "run" / "a.db"
    (path.parent / "backup").mkdir(parents=True)
    patched = DIES.replace(
        "ledger = Ledger.open",
        "import sfumato.privacy.ledger.run as run\n"
        "run.Pace.at_once = lambda self, left, ahead: min(16, left, ahead)\nledger = Ledger.open",
    )
    patched = patched.replace("step))\nos.kill", "step, 160 - step))\nos.kill")
    Ledger.open(path, run="r", plan=PLAN, account=account).close()
    process = subprocess.run([sys.executable, "-c", patched, str(path), str(account), "40", "32"])
    assert process.returncode == -signal.SIGKILL
    assert spent(path) == in_account(account)["r"] == 48  # three blocks of 16; 40 were used
    put_back(path)
    assert spent(path) == 32
    with Ledger.open(path, run="r", plan=PLAN, account=account) as ledger:
        assert ledger.spent_steps == 48 and ledger.remaining_steps == 152
    assert in_account(account) == {"r": 48}


def test_a_copied_folder_is_continued_by_one_of_the_two_and_counts_what_the_other_did(tmp_path):
    """The copy is made while a block is in hand; the original used it up. Whoever opens last goes on, from all of it."""
    account, path = tmp_path / "account.db", tmp_path / "run" / "a.db"
    (path.parent / "backup").mkdir(parents=True)
    first = Ledger.open(path, run="r", plan=PLAN, account=account)
    for step in range(3):
        first.commit(first.reserve(EVENT, step))
    for file in path.parent.glob("a.db*"):
        shutil.copy(file, path.parent / "backup" / file.name)
    first.commit(first.reserve(EVENT, 3))
    copy = path.parent / "backup" / "a.db"
    with Ledger.open(copy, run="r", plan=PLAN, account=account) as second:
        assert second.spent_steps == 4  # three, and one that is lost to it
        second.reserve(EVENT, 4)
        with pytest.raises(LedgerError, match="another copy"):
            first.reserve(EVENT, 4)
        with pytest.raises(LedgerError, match="another copy"):
            first.close()
    with pytest.raises(LedgerError, match="older copy"):  # the branch that was left
        Ledger.open(path, run="r", plan=PLAN, account=account)
    assert in_account(account) == {"r": 5}


def test_an_account_of_an_earlier_version_that_is_a_block_ahead_costs_the_run_that_block(tmp_path):
    """It charged 64 at once, and a crash left them; nothing tells which of them an older ledger used."""
    account, path = tmp_path / "account.db", tmp_path / "run" / "a.db"
    Ledger.open(path, run="r", plan=PLAN, account=account).close()
    dies(path, account, 10)
    write(account, "UPDATE spent SET count = 64")
    write(account, "UPDATE runs SET block = 64")
    with Ledger.open(path, run="r", plan=PLAN, account=account) as ledger:
        assert ledger.spent_steps == 64 and ledger.remaining_steps == 136
    assert in_account(account) == {"r": 64} and spent(path) == 64


def test_a_checkpoint_newer_than_the_copy_is_refused_though_the_loss_was_charged(tmp_path):
    """Also one of an older version, which says its entry's number alone: the entry with that number is another now."""
    account, path = tmp_path / "account.db", tmp_path / "run" / "a.db"
    with Ledger.open(path, run="r", plan=PLAN, account=account) as ledger:
        before = ledger.sequence
    dies(path, account, 3, backup_at=2)
    with sqlite3.connect(path) as connection:
        newest, head = connection.execute("SELECT sequence, hash FROM entries ORDER BY sequence DESC").fetchone()
    connection.close()
    put_back(path)
    with Ledger.open(path, run="r", plan=PLAN, account=account) as ledger:
        for position in ({"sequence": newest, "head": head}, {"sequence": newest}):
            with pytest.raises(LedgerError, match="older than the checkpoint"):
                ledger.require_at_least(**position)
        ledger.require_at_least(before)


def test_a_ledger_set_back_is_noticed_though_a_crash_left_the_account_ahead(tmp_path):
    account, path = tmp_path / "account.db", tmp_path / "a.db"
    Ledger.open(path, run="r", plan=PLAN, account=account).close()
    dies(path, account, 1)
    take(path, 1, account=account)
    shutil.copy(path, tmp_path / "old.db")
    take(path, 1, account=account)
    os.replace(tmp_path / "old.db", path)
    with pytest.raises(LedgerError, match="older copy") as error:
        Ledger.open(path, run="r", plan=PLAN, account=account)
    assert error.value.code == "ledger_set_back"


def test_many_runs_share_one_account_at_the_same_time(tmp_path):
    account, failures = tmp_path / "account.db", []

    def run(number: int) -> None:
        try:
            with Ledger.open(tmp_path / f"{number}.db", run=str(number), plan=PLAN, account=account) as ledger:
                for step in range(70 + number):
                    ledger.commit(ledger.reserve(EVENT, step))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert in_account(account) == {str(number): 70 + number for number in range(4)}


def test_a_torn_account_is_refused(tmp_path):
    account = tmp_path / "account.db"
    account.write_bytes(b"nothing of ours" * 100)
    with pytest.raises(LedgerError):
        take(tmp_path / "a.db", 1, account=account)
    take(tmp_path / "b.db", 1)
    with pytest.raises(LedgerError, match="not an account"):
        take(tmp_path / "a.db", 1, account=tmp_path / "b.db")
    assert not (tmp_path / "a.db").exists()


# ---- export ----


def test_an_export_is_short_and_reads_back_to_the_same_events(path):
    take(path, 150)
    take(path, 3, first=150, committed=False)
    take(path, 40, first=150)
    text = export_jsonl(path)
    assert (
        len(text.splitlines()) == 12
    )  # header; open, 150 steps, close; open, 3 reservations, close; open, 40 steps, close
    assert events_of_jsonl(text) == [PLAN.event(193)]
    assert plan_of_jsonl(text) == PLAN
    assert verify_chain(path)["head"] == json.loads(text.splitlines()[0])["head"]


@settings(deadline=None, max_examples=10)
@given(moves=st.lists(st.sampled_from(["reserve", "block", "commit", "again"]), max_size=15))
def test_any_history_survives_its_export(tmp_path_factory, moves):
    path = tmp_path_factory.mktemp("history") / "ledger.db"
    ledger, waiting, step = Ledger.open(path, run="r", plan=PLAN), [], 0
    for move in moves:
        if move in ("reserve", "block"):
            waiting.append(ledger.reserve(PLAN.event(1 if move == "reserve" else 3), step))
            step += 1
        elif move == "commit" and waiting:
            ledger.commit(waiting.pop())
        elif move == "again":
            ledger.close()
            ledger, waiting = Ledger.open(path, run="r", plan=PLAN), []
    ledger.close()
    assert events_of_jsonl(export_jsonl(path)) == ledger.spent()
    assert sum(event.count for event in ledger.spent()) == show(path)["steps"]


def test_any_changed_byte_of_an_export_is_noticed(path):
    take(path, 20)
    take(path, 2, first=20, committed=False)
    good = export_jsonl(path)
    chance = random.Random(0)
    for at in range(len(good)):
        other = chr(chance.choice([byte for byte in range(9, 127) if chr(byte) != good[at]]))
        with pytest.raises(VerificationFailed):
            events_of_jsonl(good[:at] + other + good[at + 1 :])
        with pytest.raises(VerificationFailed):
            events_of_jsonl(good[:at])
        with pytest.raises(VerificationFailed):
            events_of_jsonl(good[:at] + " " + good[at:])


def test_another_encoding_of_the_same_entries_is_refused(path):
    take(path, 4)
    good = export_jsonl(path)
    lines = [json.loads(line) for line in good.splitlines()]
    ending = lines.pop()
    steps = lines.pop()
    split = [{**steps, "repeat": 1}, {**steps, "step": 1, "repeat": 3}]
    with pytest.raises(VerificationFailed, match="not in the one form"):
        events_of_jsonl("".join(canonical(line) + "\n" for line in [*lines, *split, ending]))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        "{}\n",
        "null\n",
        "[]\n",
        '{"kind":"ledger"}\n',
        "[" * 100_000 + "\n",
        "9" * 10_000 + "\n",
        "\x00\n",
        "\ud800\n",
    ],
)
def test_text_that_is_no_export_is_refused(text):
    with pytest.raises(VerificationFailed):
        events_of_jsonl(text)


def test_a_huge_repetition_is_refused_before_it_is_expanded(path):
    take(path, 4)
    text = export_jsonl(path).replace('"repeat":4', '"repeat":999999999999')
    with pytest.raises(VerificationFailed, match="repeat"):
        events_of_jsonl(text)
    with pytest.raises(VerificationFailed, match="entries"):
        events_of_jsonl(text.replace('"entries":10', '"entries":9999999999999'))


def test_reading_a_ledger_needs_no_torch_and_importing_it_no_accounting():
    code = (
        "import sys; import sfumato.privacy.ledger, sfumato.privacy.plan, sfumato.privacy.guarantee\n"
        "heavy = {'torch', 'scipy', 'dp_accounting', 'numpy', 'cryptography'} & set(sys.modules)\n"
        "from sfumato.privacy.plan import DpSgd\n"
        "DpSgd(population=100, expected_batch_size=5, steps=2, noise_multiplier=1.0, delta=1e-3).epsilon()\n"
        "print(sorted(heavy), 'torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[] False"
