"""Blocks: several short steps in one durable entry. What was handed out is always charged, whatever happens in between."""

import contextlib
import json
import os
import shutil
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sfumato.errors import BudgetExhausted, LedgerError, OutsideError, UsageError
from sfumato.privacy.accounting import Event
from sfumato.privacy.ledger import Ledger, events_of_jsonl, export_jsonl, run, show, storage, verify_chain
from sfumato.privacy.ledger.blocks import MOST, Pace
from sfumato.privacy.ledger.chain import History, beginning, canonical, reserve_body, used_body
from sfumato.privacy.ledger.storage import new_header
from sfumato.privacy.plan import DpSgd

PLAN = DpSgd(population=1000, expected_batch_size=10.0, steps=10_000, noise_multiplier=5.0, delta=1e-4)
EVENT = PLAN.event(1)


class Clock:
    """Stands for the module ``time``: a step and a write take as long as a test says."""

    def __init__(self) -> None:
        self.now, self.utc, self.write = 0.0, 1_800_000_000.0, 0.002

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.utc + self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(run, "time", clock)
    append = Ledger._append

    def slow(self, bodies, **how):
        clock.now += clock.write
        append(self, bodies, **how)

    monkeypatch.setattr(Ledger, "_append", slow)
    return clock


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "ledger.db"


def take(
    ledger: Ledger, clock: Clock, steps: int, *, seconds: float = 0.001, first: int = 0, commit: bool = True
) -> None:
    for step in range(first, first + steps):
        sequence = ledger.reserve(EVENT, step, first + steps - step)
        clock.now += seconds
        if commit:
            ledger.commit(sequence)


def dies(ledger: Ledger) -> None:
    """What the end of a process leaves of it: an open file and a lock are gone, nothing was said."""
    ledger._connection.close()
    if ledger._account is not None:
        ledger._account.close()
    ledger._lock.release()


def spent(path: Path) -> int:
    """By replaying the chain; ``show`` would compute epsilon each time."""
    with contextlib.closing(storage.connect_to_read(path)) as connection:
        return storage.replay(connection, path).total


def entries(path: Path) -> list[dict]:
    with sqlite3.connect(path) as connection:
        found = [json.loads(body) for (body,) in connection.execute("SELECT body FROM entries ORDER BY sequence")]
    connection.close()
    return found


# ---- how many at once ----


def test_short_steps_share_an_entry_and_a_clean_end_charges_exactly_what_was_handed_out(path, clock):
    with Ledger.open(path, run="r", plan=PLAN) as ledger:
        take(ledger, clock, 3000, seconds=0.02)
    kinds = [entry["kind"] for entry in entries(path)]
    assert kinds.count("reserve") <= 4 and kinds.count("block") == kinds.count("used") <= 3000 / 8
    assert {entry["count"] for entry in entries(path) if entry["kind"] == "block"} <= {2, 4, 8, 16, 32}
    assert spent(path) == 3000 and show(path)["uncommitted"] == 0
    assert clock.now == pytest.approx(3000 * 0.02, rel=0.02)  # the writes are the rest


def test_long_steps_have_an_entry_each(path, clock):
    with Ledger.open(path, run="r", plan=PLAN) as ledger:
        take(ledger, clock, 20, seconds=1.0)
    assert [entry["kind"] for entry in entries(path)].count("reserve") == 20


def test_who_does_not_say_that_more_will_come_gets_an_entry_for_each_step(path, clock):
    with Ledger.open(path, run="r", plan=PLAN) as ledger:
        for step in range(20):
            ledger.commit(ledger.reserve(EVENT, step))
            assert ledger.spent_steps == step + 1
    assert [entry["kind"] for entry in entries(path)].count("reserve") == 20


def test_a_block_is_never_more_than_a_hundredth_of_what_is_left_nor_than_was_asked_for():
    pace = Pace()
    for now in range(5):
        pace.asked(float(now))
        pace.wrote(10.0)
        pace.gave(float(now))
    assert [pace.at_once(left, left) for left in (1, 100, 250, 10_000, 10**9)] == [1, 1, 2, 64, MOST]
    assert [pace.at_once(10**9, ahead) for ahead in (1, 2, 3, 100)] == [1, 2, 2, 64]


def test_one_picture_in_between_is_no_step():
    pace, now = Pace(), 0.0
    for _ in range(20):
        pace.asked(now)
        pace.wrote(0.002)
        pace.gave(now)
        now += 0.01
    before = pace.at_once(10**6, 10**6)
    pace.asked(now + 30)
    pace.gave(now + 30)
    assert pace.at_once(10**6, 10**6) == before == 64


def test_a_block_ends_where_the_caller_said_that_the_steps_end(path, clock):
    with Ledger.open(path, run="r", plan=PLAN) as ledger:
        for first in range(0, 100, 10):
            take(ledger, clock, 10, first=first)
            assert ledger.spent_steps == first + 10


# ---- what a block costs before, during and after ----


def test_all_of_a_block_is_charged_and_on_disk_before_its_first_step(path, clock):
    with Ledger.open(path, run="r", plan=PLAN) as ledger:
        for step in range(100):
            ledger.reserve(EVENT, step, 1000)
            clock.now += 0.001
            assert spent(path) == ledger.spent_steps >= step + 1
            assert ledger.remaining_steps == ledger.remaining(EVENT) == PLAN.steps - step - 1
        assert ledger.spent_steps > 100
    assert spent(path) == 100 and show(path)["uncommitted"] == 100


def test_what_a_crash_leaves_of_a_block_stays_spent(path, clock):
    ledger = Ledger.open(path, run="r", plan=PLAN)
    for step in range(50):
        ledger.reserve(EVENT, step, 1000)
        clock.now += 0.001
    charged = ledger.spent_steps
    dies(ledger)
    assert charged > 50 and spent(path) == charged
    with Ledger.open(path, run="r", plan=PLAN) as ledger:
        assert ledger.spent_steps == charged
        ledger.reserve(EVENT, 50)
    assert spent(path) == charged + 1


def test_a_copy_that_is_continued_gives_nothing_of_a_block_back(path, tmp_path, clock):
    ledger = Ledger.open(path, run="r", plan=PLAN)
    for step in range(50):
        ledger.reserve(EVENT, step, 1000)
        clock.now += 0.001
    copy = tmp_path / "copy" / "ledger.db"
    copy.parent.mkdir()
    for file in path.parent.glob("ledger.db*"):
        if file.is_file() and not file.name.endswith((".lock", "-shm")):
            shutil.copy(file, copy.parent / file.name)
    charged = ledger.spent_steps
    ledger.close()
    Ledger.open(copy, run="r", plan=PLAN).close()
    assert (spent(path), spent(copy)) == (50, charged)


def test_steps_are_handed_out_in_their_order_and_other_steps_end_the_block(path, clock):
    with Ledger.open(path, run="r", plan=PLAN) as ledger:
        take(ledger, clock, 40)
        for step in range(40, 60):
            ledger.reserve(EVENT, step, 1000)
            clock.now += 0.001
        assert ledger.spent_steps > 60
        ledger.reserve(EVENT, 99)
        assert ledger.spent_steps == 61  # the rest came back, and one more was taken


def test_a_rest_makes_room_at_the_end_of_the_plan(path, clock):
    with Ledger.open(path, run="r", plan=PLAN) as ledger:
        ledger.reserve(PLAN.event(9000), 0)
        for step in range(9000, 9010):
            ledger.reserve(EVENT, step, 1000)
            clock.now += 0.001
        ledger.reserve(PLAN.event(990), 0)  # fits once the rest of the block is given back
        assert ledger.spent_steps == 10_000 and ledger.remaining_steps == 0
        with pytest.raises(BudgetExhausted):
            ledger.reserve(EVENT, 9010, 5)


def test_commits_of_a_block_are_counted_and_none_twice(path, clock):
    with Ledger.open(path, run="r", plan=PLAN) as ledger:
        take(ledger, clock, 20)
        sequences = []
        for step in range(20, 30):
            sequences.append(ledger.reserve(EVENT, step, 100))
            clock.now += 0.001
        for sequence in sequences[:7]:
            ledger.commit(sequence)
        with pytest.raises(LedgerError, match="not an open reservation"):
            ledger.commit(10**6)
        ledger.reserve(EVENT, 999)  # ends the block, of which three are not committed yet
        for sequence in sequences[7:9]:
            ledger.commit(sequence)  # late: too late to be written, and no error
    assert show(path)["uncommitted"] == 4
    with Ledger.open(path, run="r", plan=PLAN) as ledger:
        sequence = ledger.reserve(EVENT, 1000)
        ledger.commit(sequence)
        with pytest.raises(LedgerError, match="not an open reservation"):
            ledger.commit(sequence)


def test_a_forked_child_gets_no_step_of_the_block_in_hand(path, clock):
    with Ledger.open(path, run="r", plan=PLAN) as ledger:
        take(ledger, clock, 20)
        ledger.reserve(EVENT, 20, 1000)
        assert ledger.remaining_steps > PLAN.steps - ledger.spent_steps
        child = os.fork()
        if child == 0:
            try:
                ledger.reserve(EVENT, 21, 999)
            except LedgerError as error:
                os._exit(7 if error.code == "ledger_forked" else 8)
            os._exit(9)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_a_writer_past_the_lock_cannot_make_the_first_ones_steps_free(path, clock):
    first = Ledger.open(path, run="r", plan=PLAN)
    take(first, clock, 20)
    first.reserve(EVENT, 20, 1000)
    path.with_name(path.name + ".lock").unlink()
    with Ledger.open(path, run="r", plan=PLAN) as second:
        for step in range(21, 25):
            first.reserve(EVENT, step, 1000)  # from memory: all of it is charged
        second.reserve(EVENT, 0)
        with pytest.raises(LedgerError, match="somebody else has written"):
            first.close()
        assert second.spent_steps >= 26
    assert spent(path) >= 26


# ---- writes that fail ----


def test_after_a_write_that_failed_nobody_gets_the_rest_of_the_block(path, clock):
    with Ledger.open(path, run="r", plan=PLAN) as ledger:
        take(ledger, clock, 20)
        ledger.reserve(EVENT, 20, 1000)
        ledger._connection.execute("PRAGMA query_only = ON")
        with pytest.raises(OutsideError):
            ledger.reserve(EVENT, 500)
        ledger._connection.execute("PRAGMA query_only = OFF")
        ledger.reserve(EVENT, 21, 1)  # the block would have held it: it has an entry of its own
        assert entries(path)[-1]["kind"] == "reserve"
    assert spent(path) == 22  # the rest was given back in the end, by the process that had reserved it


def test_a_close_that_fails_gives_nothing_back(path, clock):
    ledger = Ledger.open(path, run="r", plan=PLAN)
    take(ledger, clock, 20)
    ledger.reserve(EVENT, 20, 1000)
    charged = ledger.spent_steps
    ledger._connection.execute("PRAGMA query_only = ON")
    with pytest.raises(OutsideError):
        ledger.close()
    assert spent(path) == charged > 21
    with Ledger.open(path, run="r", plan=PLAN) as ledger:
        assert ledger.spent_steps == charged


# ---- the chain: who may give back what ----


def history(*bodies: str) -> History:
    state = beginning(new_header("r", PLAN, None))
    for body in bodies:
        state.apply(body)
    return state


def opened(attempt: int = 1) -> str:
    return canonical({"kind": "open", "attempt": attempt, "time": 1_800_000_000})


def block(size: int, *, attempt: int = 1, step: int = 0) -> str:
    return reserve_body(replace(EVENT, count=size), attempt, step, "block")


def test_a_block_gives_back_what_its_own_process_says_that_it_did_not_use():
    state = history(opened(), block(8), used_body(2, 5, 4))
    assert (state.total, state.uncommitted_steps, state.given_back) == (5, 1, {2: 5})


@pytest.mark.parametrize(
    "bodies",
    [
        (opened(), block(8), opened(2), used_body(2, 5, 5)),  # another process says so
        (opened(), block(8), opened(2), used_body(2, 8, 8)),
        (opened(), block(8), reserve_body(EVENT, 1, 8), used_body(2, 5, 5)),  # something came after it
        (opened(), block(8), block(4, step=8), used_body(2, 5, 5)),
        (opened(), block(8), used_body(2, 5, 5), used_body(2, 3, 3)),  # twice
        (opened(), block(8), used_body(2, 9, 9)),  # more than it had
        (opened(), block(8), used_body(2, 5, 6)),  # more committed than handed out
        (opened(), block(8), used_body(2, -1, -1)),
        (opened(), block(8), used_body(1, 0, 0)),  # not a block
        (opened(), reserve_body(replace(EVENT, count=8), 1, 0), used_body(2, 5, 5)),
        (opened(), block(8), canonical({"kind": "close", "time": 1_800_000_000}), used_body(2, 5, 5)),
        (opened(), canonical({"kind": "close", "time": 1_800_000_000}), block(8)),  # after a clean end
        (opened(), block(1)),
        (opened(), block(8, attempt=2)),
        (block(8),),
        (opened(), canonical({"kind": "used", "block": 2, "steps": True, "committed": True})),
    ],
)
def test_nobody_else_gives_anything_back(bodies):
    with pytest.raises(LedgerError, match="cannot follow"):
        history(*bodies)


def test_a_block_must_fit_the_plan():
    with pytest.raises(BudgetExhausted):
        history(opened(), block(10_001))
    with pytest.raises(LedgerError, match="must be the plan's"):
        history(opened(), reserve_body(Event(sampling_rate=0.5, noise_multiplier=1.0, count=2), 1, 0, "block"))


# ---- checkpoints ----


def test_a_checkpoint_within_a_block_needs_just_this_ledger(path, clock):
    with Ledger.open(path, run="r", plan=PLAN) as ledger:
        take(ledger, clock, 20)
        before = ledger.position
        for step in range(20, 26):
            ledger.reserve(EVENT, step, 1000)
            clock.now += 0.001
        position = ledger.position
        assert position["taken"] >= 1
        ledger.require_at_least(**position)
    with Ledger.open(path, run="r", plan=PLAN) as ledger:
        ledger.require_at_least(**before)
        ledger.require_at_least(**position)
        ledger.require_at_least(position["sequence"])  # as checkpoints of older versions say it


def test_a_ledger_that_gave_back_what_a_checkpoint_has_taken_is_refused(path, clock):
    """A machine that was continued twice from one image: here two steps were handed out, there six."""
    ledger = Ledger.open(path, run="r", plan=PLAN)
    take(ledger, clock, 20)
    while "taken" not in ledger.position or ledger.position["taken"] > 1:
        ledger.reserve(EVENT, 20, 1000)
        clock.now += 0.001
    here = ledger.position
    dies(ledger)
    state = ledger._history.copy()
    with sqlite3.connect(path) as connection:
        for body in (used_body(here["block"], 2, 2), canonical({"kind": "close", "time": int(clock.time())})):
            state.apply(body)
            connection.execute("INSERT INTO entries VALUES (?, ?, ?)", (state.sequence, body, state.head))
    connection.close()
    assert verify_chain(path)["valid"]
    with Ledger.open(path, run="r", plan=PLAN) as ledger:
        ledger.require_at_least(**here | {"taken": 2})
        with pytest.raises(LedgerError, match="has given back") as error:
            ledger.require_at_least(**here | {"taken": 6})
        assert error.value.code == "ledger_older_than_checkpoint"


def test_a_ledger_of_another_history_is_refused_though_its_numbers_are_larger(path, clock):
    """Set back to a copy and continued: entry 9 is there, but it is another one."""
    with Ledger.open(path, run="r", plan=PLAN) as ledger:
        take(ledger, clock, 2, seconds=1.0)
    shutil.copy(path, path.with_name("old.db"))
    with Ledger.open(path, run="r", plan=PLAN) as ledger:
        take(ledger, clock, 2, first=2, seconds=1.0)
        position = ledger.position
    os.replace(path.with_name("old.db"), path)
    with Ledger.open(path, run="r", plan=PLAN) as ledger:
        take(ledger, clock, 5, first=7, seconds=1.0)
    with Ledger.open(path, run="r", plan=PLAN) as ledger:
        ledger.require_at_least(position["sequence"])  # the number alone does not tell
        with pytest.raises(LedgerError, match="hides spending"):
            ledger.require_at_least(**position)


# ---- export ----


def test_a_long_run_of_blocks_is_a_few_lines_and_reads_back(path, clock):
    with Ledger.open(path, run="r", plan=PLAN) as ledger:
        take(ledger, clock, 5000, seconds=0.005)
    text = export_jsonl(path)
    assert len(text.splitlines()) < 40 < len(entries(path)) / 4
    assert events_of_jsonl(text) == [PLAN.event(5000)]


MOVES = st.lists(
    st.one_of(
        st.tuples(st.just("take"), st.integers(1, 40)),
        st.tuples(st.just("commit"), st.integers(1, 10)),
        st.tuples(st.sampled_from(["big", "other", "again", "die", "fail", "early"]), st.just(0)),
    ),
    max_size=14,
)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(moves=MOVES)
def test_whatever_happens_every_step_that_was_handed_out_is_charged_and_the_plan_is_kept(
    tmp_path_factory, clock, moves
):
    """After a clean history the charge is exact; every death costs at most the block in hand."""
    path = tmp_path_factory.mktemp("history") / "ledger.db"
    plan = replace(PLAN, steps=2000)
    ledger, step, handed, wasted, waiting = Ledger.open(path, run="r", plan=plan), 0, 0, 0, []
    for move, number in moves:
        try:
            if move == "take":
                for left in range(number, 0, -1):
                    waiting.append(ledger.reserve(EVENT, step, left + 5))
                    step, handed, clock.now = step + 1, handed + 1, clock.now + 1e-3
            elif move == "commit":
                for _ in range(min(number, len(waiting))):
                    ledger.commit(waiting.pop(0))
            elif move == "big":
                ledger.reserve(plan.event(30), step)
                step, handed, waiting = step + 1, handed + 30, []
            elif move == "other":
                step += 7  # as after a resume from an older checkpoint
            elif move == "early":
                with pytest.raises(UsageError):
                    ledger.reserve(EVENT, -1)
            elif move == "fail":
                ledger._connection.execute("PRAGMA query_only = ON")
                with pytest.raises(OutsideError):
                    ledger.reserve(plan.event(2), step)
                ledger._connection.execute("PRAGMA query_only = OFF")
            else:
                if move == "die":
                    wasted += ledger.spent_steps - handed - wasted
                    dies(ledger)
                else:
                    ledger.close()
                ledger, waiting = Ledger.open(path, run="r", plan=plan), []
        except BudgetExhausted:
            pass
        assert handed <= ledger.spent_steps <= plan.steps
        assert spent(path) >= handed
    ledger.close()
    assert spent(path) == handed + wasted <= plan.steps
    assert sum(event.count for event in events_of_jsonl(export_jsonl(path))) == handed + wasted
