"""The signature of the head, and ledgers and exports that the first version has written."""

import json
import shutil
import sqlite3
from pathlib import Path

import pytest

from sfumato.errors import LedgerError, VerificationFailed
from sfumato.privacy.ledger import (
    Ledger,
    events_of_jsonl,
    export_jsonl,
    plan_of_jsonl,
    read_jsonl,
    show,
    trajectory,
    verify,
    verify_chain,
)
from sfumato.privacy.ledger.chain import canonical
from sfumato.privacy.plan import DpSgd
from sfumato.release import keys

PLAN = DpSgd(population=1000, expected_batch_size=100.0, steps=200, noise_multiplier=2.0, delta=1e-4)
EVENT = PLAN.event(1)
OLD = Path(__file__).parent / "format_1"
KEY, OTHER = keys.SigningKey.generate(), keys.SigningKey.generate()
TRUSTED = {KEY.public.id: KEY.public}


def take(path: Path, steps: int, *, first: int = 0, key: keys.SigningKey | None = KEY, **how) -> None:
    sign = keys.signer(key) if key is not None else None
    with Ledger.open(path, run="r", plan=PLAN, sign=sign, **how) as ledger:
        for step in range(first, first + steps):
            ledger.commit(ledger.reserve(EVENT, step))


def change(path: Path, *statements: str) -> None:
    connection = sqlite3.connect(path)
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "ledger.db"


def test_a_clean_end_is_signed_and_anybody_with_the_public_key_can_check_it(path):
    take(path, 3)
    take(path, 2, first=3)
    checked = verify(path, TRUSTED)
    assert checked["valid"] and checked["signer"] == KEY.public.id
    assert checked["signed_entries"] == checked["entries"] and "signed whole" in checked["detail"]


def test_without_a_key_nothing_is_signed_and_that_is_said(path):
    take(path, 3, key=None)
    checked = verify(path, TRUSTED)
    assert checked["valid"] and checked["signer"] is None and "not signed" in checked["detail"]


def test_what_came_after_the_signature_is_told_apart(path):
    take(path, 3)
    take(path, 2, first=3, key=None)
    checked = verify(path, TRUSTED)
    assert checked["valid"] and checked["signed_entries"] < checked["entries"]
    assert f"signed up to entry {checked['signed_entries']}" in checked["detail"]


def test_entries_cut_off_the_end_of_a_signed_ledger_are_missed_by_every_reader(path):
    take(path, 5)
    last = show(path)["entries"]
    for cut in (1, 2, 5):
        copy = path.with_name(f"cut-{cut}.db")
        shutil.copy(path, copy)
        change(copy, f"DELETE FROM entries WHERE sequence > {last - cut}")
        assert verify(copy, TRUSTED)["valid"] is False
        assert "its end was cut off" in show(copy)["detail"]
        for reader in (verify_chain, export_jsonl, lambda path: Ledger.open(path, run="r", plan=PLAN)):
            with pytest.raises(LedgerError, match="cut off"):
                reader(copy)


def test_an_end_that_was_written_anew_is_not_the_one_that_was_signed(path):
    """Who has no key can recompute the hashes, not the signature."""
    take(path, 5)
    last = show(path)["entries"]
    unsigned = path.with_name("unsigned.db")
    shutil.copy(path, unsigned)
    change(unsigned, "DELETE FROM signatures", f"DELETE FROM entries WHERE sequence > {last - 3}")
    take(unsigned, 1, first=4, key=None)  # opens, takes a step, closes: as many entries and more
    rows = sqlite3.connect(path).execute("SELECT sequence, body FROM signatures").fetchall()
    connection = sqlite3.connect(unsigned)
    connection.executemany("INSERT INTO signatures VALUES (?, ?)", rows)
    connection.commit()
    assert "not the one that was signed" in verify(unsigned, TRUSTED)["detail"]
    (head,) = connection.execute(f"SELECT hash FROM entries WHERE sequence = {rows[0][0]}").fetchone()
    forged = canonical({**json.loads(rows[0][1]), "head": head})  # the signature copied to the new head
    connection.execute("UPDATE signatures SET body = ?", (forged,))
    connection.commit()
    connection.close()
    checked = verify(unsigned, TRUSTED)
    assert checked["valid"] is False and "is not one of this ledger by this key" in checked["detail"]


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("UPDATE signatures SET body = '{}'", "is none"),
        ("UPDATE signatures SET body = 'x'", "not in the form"),
        ("UPDATE signatures SET body = replace(body, 'ed25519', 'hmac')", "must be ed25519"),
        ("UPDATE signatures SET sequence = sequence - 1", "not the one that was signed"),
        ("UPDATE signatures SET sequence = sequence + 1", "cut off"),
    ],
)
def test_a_changed_signature_is_refused(path, statement, said):
    take(path, 3)
    change(path, statement)
    checked = verify(path, TRUSTED)
    assert checked["valid"] is False and said in checked["detail"]


def test_a_key_that_nobody_trusts_and_one_of_another_ledger_are_refused(path):
    take(path, 3, key=OTHER)
    assert "is not a key that you trust" in verify(path, TRUSTED)["detail"]
    other = path.with_name("other.db")
    take(other, 3, key=KEY)
    rows = sqlite3.connect(other).execute("SELECT body FROM signatures").fetchall()
    (head,) = sqlite3.connect(path).execute("SELECT hash FROM entries ORDER BY sequence DESC LIMIT 1").fetchone()
    moved = canonical({**json.loads(rows[0][0]), "head": head})
    change(path, f"UPDATE signatures SET body = '{moved}'")
    assert "is not one of this ledger" in verify(path, TRUSTED)["detail"]


def test_an_export_is_signed_when_it_is_made(path):
    take(path, 4, key=None)
    text = export_jsonl(path, keys.signer(KEY))
    assert read_jsonl(text).signer(TRUSTED) == KEY.public.id
    assert events_of_jsonl(text) == [PLAN.event(4)]
    assert read_jsonl(export_jsonl(path)).signer(TRUSTED) is None
    with pytest.raises(VerificationFailed, match="not a key that you trust"):
        read_jsonl(export_jsonl(path, keys.signer(OTHER))).signer(TRUSTED)
    first, rest = text.split("\n", 1)
    wrong = json.loads(first)
    wrong["signature"]["signature"] = "00" * 64
    with pytest.raises(VerificationFailed, match="not one of this ledger"):
        read_jsonl(canonical(wrong) + "\n" + rest).signer(TRUSTED)
    for signature in ({}, "x", {**wrong["signature"], "more": "x"}):
        with pytest.raises(VerificationFailed, match="must be the header"):
            read_jsonl(canonical({**wrong, "signature": signature}) + "\n" + rest)


def test_the_users_own_key_is_used_where_there_is_one_and_none_is_made(tmp_path):
    assert keys.existing(tmp_path / "config") is None and not (tmp_path / "config").exists()
    made = keys.own(tmp_path / "config")
    found = keys.existing(tmp_path / "config")
    assert found is not None and found.public == made.public


def test_a_trajectory_is_cheap_and_never_below_what_was_spent(path):
    take(path, 40)
    points = trajectory(path)
    assert points[-1][0] == 40 and [steps for steps, _ in points] == sorted({steps for steps, _ in points})
    assert points[-1][1] >= PLAN.epsilon(40)
    change(path, "DELETE FROM entries WHERE sequence = 3")
    assert trajectory(path) == []


# ---- the first format ----


@pytest.fixture
def old(tmp_path) -> Path:
    for name in ("ledger", "account"):
        connection = sqlite3.connect(tmp_path / f"{name}.db")
        connection.executescript((OLD / f"{name}.sql").read_text())
        connection.close()
    return tmp_path / "ledger.db"


def test_a_ledger_of_the_first_format_is_read_as_it_was(old):
    shown = show(old)
    assert (shown["valid"], shown["steps"], shown["uncommitted"], shown["attempts"]) == (True, 7, 1, 2)
    assert shown["epsilon"] == PLAN.epsilon(7) and shown["notes"] == []
    assert export_jsonl(old) == (OLD / "ledger.jsonl").read_text()
    assert show(old.with_name("account.db"))["runs"][0]["events"] == [PLAN.event(7).to_dict()]


def test_an_export_of_the_first_format_still_verifies():
    text = (OLD / "ledger.jsonl").read_text()
    assert events_of_jsonl(text) == [PLAN.event(7)] and plan_of_jsonl(text) == PLAN
    assert read_jsonl(text).signer({}) is None
    with pytest.raises(VerificationFailed):
        events_of_jsonl(text.replace('"repeat":5', '"repeat":4'))


def test_a_ledger_of_the_first_format_is_continued_in_it_and_signed(old):
    """Older readers of a bundle must understand all of its entries: no blocks, no times, no end."""
    account = old.with_name("account.db")
    with Ledger.open(old, run="old", plan=PLAN, account=account, sign=keys.signer(KEY)) as ledger:
        ledger.require_at_least(15)
        for step in range(7, 30):
            ledger.commit(ledger.reserve(EVENT, step, 100))
    lines = [json.loads(line)["kind"] for line in export_jsonl(old).splitlines()]
    assert set(lines) == {"ledger", "open", "steps", "reserve"}
    assert show(old)["steps"] == 30 and verify(old, TRUSTED)["signer"] == KEY.public.id
    assert sum(event["count"] for event in show(account)["events"]) == 30


def test_entries_of_the_second_format_are_none_in_a_ledger_of_the_first(old):
    text = (OLD / "ledger.jsonl").read_text()
    for line in ('{"kind":"close","time":1}', '{"kind":"time","time":1}', '{"attempt":3,"kind":"open","time":1}'):
        changed = text.replace('"entries":15', '"entries":16') + line + "\n"
        with pytest.raises(VerificationFailed, match="cannot follow"):
            events_of_jsonl(changed)
