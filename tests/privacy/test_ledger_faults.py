"""kill -9 at every boundary, files torn at any place, clocks set back: no event lost, none uncharged, the plan is kept.

The deaths are real: a forked child runs a training that is nothing but its ledger, its account, its checkpoints and a
count of the steps that touched data, and kills itself at a chosen boundary. What it needs for that is patched in the
child alone; the package has no hook for it.
"""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sfumato.errors import LedgerError, OutsideError, SfumatoError
from sfumato.privacy.ledger import Ledger, account, events_of_jsonl, export_jsonl, run, show, storage, verify_chain
from sfumato.privacy.ledger.blocks import MOST
from sfumato.privacy.ledger.chain import beginning
from sfumato.privacy.plan import DpSgd

PLAN = DpSgd(population=1000, expected_batch_size=10.0, steps=30_000, noise_multiplier=10.0, delta=1e-4)
EVENT = PLAN.event(1)


def spent(path: Path) -> int:
    """By replaying the chain of a ledger, or adding up an account; ``show`` would compute epsilon each time."""
    with contextlib.closing(storage.connect_to_read(path)) as connection:
        if path.name == "account.db":
            return connection.execute("SELECT coalesce(sum(count), 0) FROM spent").fetchone()[0]
        return storage.replay(connection, path).total


class Place:
    """One run: its ledger, its account, its last checkpoint, and one byte for every step that touched data."""

    def __init__(self, folder: Path, plan: DpSgd = PLAN) -> None:
        self.ledger, self.account = folder / "run" / "ledger.db", folder / "account.db"
        self.checkpoint, self.touched = folder / "checkpoint.json", folder / "touched"
        self.plan = plan

    def computed(self) -> int:
        return self.touched.stat().st_size if self.touched.exists() else 0

    def restored(self) -> dict[str, Any]:
        return json.loads(self.checkpoint.read_text()) if self.checkpoint.exists() else {"step": 0}

    def train(self, most: int, reach: Callable[[str], None]) -> int:
        """Resumes, trains at most so many steps, closes. ``reach`` is told of each boundary. Returns the steps left."""
        reach("before open")
        with Ledger.open(self.ledger, run="r", plan=self.plan, account=self.account) as ledger:
            reach("opened")
            state = self.restored()
            if "position" in state:
                ledger.require_at_least(**state["position"])
            step = state["step"]
            touched = os.open(self.touched, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            left = ledger.remaining_steps
            for number in range(min(most, left)):
                reach("before reserve")
                sequence = ledger.reserve(EVENT, step, left - number)
                reach("reserved")
                os.write(touched, b"x")  # here a unit's data is touched
                step += 1
                reach("stepped")
                if number % 7 == 0:
                    fresh = self.checkpoint.with_suffix(".new")
                    fresh.write_text(json.dumps({"step": step, "position": ledger.position}))
                    os.replace(fresh, self.checkpoint)
                    reach("checkpointed")
                ledger.commit(sequence)
                reach("committed")
            os.close(touched)
            left = ledger.remaining_steps
            reach("before close")
        reach("closed")
        return left


WITHIN = {  # boundaries that lie inside the ledger: in which module, around what
    "creating the ledger": (run, "create"),
    "creating the account": (account, "create"),
    "taking the lock": (run, "Lock"),
    "writing entries": (Ledger, "_append"),
    "transaction": (run, "transaction"),
    "account transaction": (account, "transaction"),
    "covering": (account.Account, "cover"),
    "admitting": (account.Account, "admit"),
    "settling": (account.Account, "settle"),
    "releasing": (Ledger, "_release"),
}
OUTSIDE = [
    "before open", "opened", "before reserve", "reserved", "stepped", "checkpointed", "committed", "before close", "closed",
]  # fmt: skip
BOUNDARIES = [*OUTSIDE, *(f"{when} {name}" for name in WITHIN for when in ("before", "inside", "after"))]


def dying(boundary: str, after: int) -> Callable[[str], None]:
    """Arms this process to die at the boundary, when it is reached for the ``after``-th time."""
    left = after

    def reach(here: str) -> None:
        nonlocal left
        if here == boundary:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    for name, (owner, attribute) in WITHIN.items():
        setattr(owner, attribute, _surrounded(getattr(owner, attribute), name, reach))
    return reach


def _surrounded(original: Any, name: str, reach: Callable[[str], None]) -> Any:
    if name.endswith("transaction"):

        @contextlib.contextmanager
        def transaction(connection: Any) -> Iterator[None]:
            reach(f"before {name}")
            with original(connection):
                yield
                reach(f"inside {name}")  # all is said, COMMIT is not
            reach(f"after {name}")

        return transaction

    def around(*args: Any, **kwargs: Any) -> Any:
        reach(f"before {name}")
        result = original(*args, **kwargs)
        reach(f"after {name}")
        return result

    return around


def killed_at(place: Place, boundary: str, after: int, steps: int) -> bool:
    """Runs a training in a child that dies there. Returns whether it did; else it ended."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            place.train(steps, dying(boundary, after))
            code = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), f"the child that should have died at {boundary!r} failed"
    return code != 0


def check(place: Place) -> None:
    """What must hold after every death."""
    if not place.ledger.exists():
        assert place.computed() == 0
        return
    charged, in_account = spent(place.ledger), spent(place.account)
    assert place.computed() <= charged <= in_account <= PLAN.steps
    position = place.restored().get("position")
    if position is not None:
        assert position["sequence"] <= verify_chain(place.ledger)["entries"]


def deaths(folder: Path, kills: int, chance: random.Random) -> None:
    place = Place(folder)
    died: dict[str, int] = {}
    wasted = 0
    for number in range(kills):
        boundary = BOUNDARIES[number % len(BOUNDARIES)]
        before = spent(place.ledger) - place.computed() if place.ledger.exists() else 0
        if killed_at(place, boundary, chance.randint(1, OFTEN.get(boundary.split(" ", 1)[-1], 1)), steps=60):
            died[boundary] = died.get(boundary, 0) + 1
        check(place)
        lost = spent(place.ledger) - place.computed() - before if place.ledger.exists() else 0
        # the block in hand, and one that an earlier death left between account and ledger
        assert 0 <= lost <= 2 * max(1, min(MOST, PLAN.steps // 100)), boundary
        wasted += lost
    missed = {boundary for boundary in BOUNDARIES if boundary not in died}
    assert missed <= NEVER, f"nobody died at {missed}"
    # The rest of the plan, undisturbed: it ends at the plan's steps, and what was wasted came off them.
    assert place.train(10**9, lambda _: None) == 0
    check(place)
    assert spent(place.ledger) == spent(place.account) == PLAN.steps
    assert place.computed() == PLAN.steps - wasted
    assert show(place.ledger)["epsilon"] == PLAN.epsilon()


# How often a boundary is certainly reached in 60 steps, if more than once.
OFTEN = {
    "reserve": 60,
    "reserved": 60,
    "stepped": 60,
    "checkpointed": 8,
    "committed": 60,
    "writing entries": 4,
    "transaction": 4,
}
# Functions have no inside; files are made once, so that after the first of these deaths they are there.
NEVER = {f"inside {name}" for name in WITHIN if not name.endswith("transaction")} | {
    "before creating the ledger", "after creating the ledger", "before creating the account", "after creating the account",
}  # fmt: skip


def test_forty_deaths_one_at_every_boundary(tmp_path):
    deaths(tmp_path, 40, random.Random(1))


@pytest.mark.slow
def test_two_hundred_deaths(tmp_path):
    deaths(tmp_path, 200, random.Random(2))


@pytest.mark.parametrize(
    "boundary", ["before creating the ledger", "after creating the ledger", "after creating the account"]
)
def test_a_death_while_the_files_are_made_leaves_whole_ones_or_none(tmp_path, boundary):
    place = Place(tmp_path)
    assert killed_at(place, boundary, 1, steps=5)
    check(place)
    assert place.train(5, lambda _: None) == PLAN.steps - 5
    assert spent(place.ledger) == spent(place.account) == 5


# ---- a full disk, several threads ----


@pytest.mark.parametrize("limit", [40_000, 120_000])
def test_when_no_file_may_grow_nothing_is_computed_that_is_not_charged(tmp_path, limit):
    """The operating system refuses the write itself, as on a full disk, in the middle of a run of blocks."""
    place = Place(tmp_path)
    place.train(5, lambda _: None)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            monkey = pytest.MonkeyPatch()
            monkey.setattr(run.Pace, "at_once", lambda self, left, ahead: min(4, left, ahead))
            place.train(10_000, lambda _: None)
        except OutsideError as error:
            code = 5 if error.code == "disk_full" or "disk I/O" in str(error) else 7
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5
    check(place)
    assert 5 < place.computed() < 10_005
    wasted = spent(place.ledger) - place.computed()
    assert wasted <= 4
    left = place.train(10, lambda _: None)
    assert left == PLAN.steps - place.computed() - wasted


def test_threads_that_share_a_ledger_are_charged_for_what_they_got(tmp_path):
    path, numbers, guard = tmp_path / "ledger.db", iter(range(10**6)), threading.Lock()
    with Ledger.open(path, run="r", plan=PLAN) as ledger:

        def work() -> None:
            for _ in range(100):
                with guard:
                    step = next(numbers)
                ledger.commit(ledger.reserve(EVENT, step, 1000))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert ledger.spent_steps >= 400
    assert spent(path) == 400


# ---- torn files ----


def test_torn_files_are_an_error_or_an_exact_prefix_that_a_checkpoint_refuses(tmp_path):
    """150 seeded damages of database and write-ahead log, as a death leaves them."""
    place = Place(tmp_path)
    assert killed_at(place, "before close", 1, steps=100)
    files = {file.name: file.read_bytes() for file in place.ledger.parent.iterdir() if not file.name.endswith(".lock")}
    assert set(files) >= {"ledger.db", "ledger.db-wal"}
    whole = tmp_path / "whole"
    shutil.copytree(place.ledger.parent, whole)
    prefixes = totals(whole / "ledger.db")
    position = place.restored()["position"]
    chance, seen = random.Random(5), {"error": 0, "shorter": 0, "whole": 0}
    for trial in range(150):
        damaged = tmp_path / "damaged"
        shutil.rmtree(damaged, ignore_errors=True)
        damaged.mkdir()
        name = chance.choice(["ledger.db", "ledger.db-wal", "ledger.db-wal"])
        for other, content in files.items():
            if not other.endswith("-shm"):
                (damaged / other).write_bytes(torn(content, trial, chance) if other == name else content)
        path = damaged / "ledger.db"
        try:
            shown = show(path)
        except SfumatoError as error:
            assert error.next
            seen["error"] += 1
            continue
        if not shown["valid"]:
            seen["error"] += 1
            continue
        assert prefixes[shown["entries"]] == (shown["head"], sum(event["count"] for event in shown["events"]))
        seen["shorter" if shown["entries"] < max(prefixes) else "whole"] += 1
        if shown["entries"] < position["sequence"]:
            with pytest.raises(LedgerError), Ledger.open(path, run="r", plan=PLAN, account=place.account) as ledger:
                ledger.require_at_least(**position)
    assert min(seen.values()) > 0, seen


def totals(path: Path) -> dict[int, tuple[str, int]]:
    """Head and charge after each number of entries."""
    with contextlib.closing(storage.connect_to_read(path)) as connection:
        found = {0: (beginning(storage.header_text(connection, path)).head, 0)}
        storage.replay(connection, path, lambda state: found.__setitem__(state.sequence, (state.head, state.total)))
    return found


def torn(content: bytes, trial: int, chance: random.Random) -> bytes:
    if trial % 3 == 0:
        return content[: chance.randrange(len(content))]
    at = chance.randrange(len(content))
    if trial % 3 == 1:
        return content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1 :]
    return content[:at] + bytes(min(4096, len(content) - at)) + content[at + 4096 :]  # a page that never came


@pytest.mark.parametrize("steps", [3, 200])  # within the account's block, and beyond
def test_an_older_ledger_beside_a_newer_account_is_noticed_even_after_a_death(tmp_path, steps):
    place = Place(tmp_path)
    place.train(3, lambda _: None)
    old = tmp_path / "old.db"
    shutil.copy(place.ledger, old)
    assert killed_at(place, "before close", 1, steps=steps)
    for file in place.ledger.parent.glob("ledger.db-*"):
        file.unlink()
    os.replace(old, place.ledger)
    with pytest.raises(LedgerError, match="older copy") as error:
        Ledger.open(place.ledger, run="r", plan=PLAN, account=place.account)
    assert error.value.code == "ledger_set_back"


# ---- the clock ----


class Wall:
    def __init__(self, utc: float) -> None:
        self.utc = utc

    def time(self) -> float:
        return self.utc

    def monotonic(self) -> float:
        return 0.0


def test_a_clock_that_goes_back_is_said_and_refuses_nothing(tmp_path, monkeypatch):
    path, wall = tmp_path / "ledger.db", Wall(1_800_000_000)
    monkeypatch.setattr(run, "time", wall)
    with Ledger.open(path, run="r", plan=PLAN) as ledger:
        for step in range(3):
            ledger.reserve(EVENT, step)
            wall.utc += 100
        assert ledger.notes == []
        wall.utc -= 10_000
        ledger.reserve(EVENT, 3)
        assert ["clock = 9900 s back" in note for note in ledger.notes] == [True]
    wall.utc -= 5000
    with Ledger.open(path, run="r", plan=PLAN) as ledger:
        assert len(ledger.notes) == 2
    shown = show(path)
    assert shown["valid"] and len(shown["notes"]) == 2 and "5000 s back" in shown["notes"][1]
    assert events_of_jsonl(export_jsonl(path)) == [PLAN.event(4)]


def test_the_clock_is_written_down_once_a_minute_and_small_corrections_are_not_said(tmp_path, monkeypatch):
    path, wall = tmp_path / "ledger.db", Wall(1_800_000_000)
    monkeypatch.setattr(run, "time", wall)
    with Ledger.open(path, run="r", plan=PLAN) as ledger:
        for step in range(200):
            ledger.commit(ledger.reserve(EVENT, step))
            wall.utc += 1 if step != 100 else -30
        assert ledger.notes == []
    lines = [json.loads(line)["kind"] for line in export_jsonl(path).splitlines()]
    assert lines.count("time") == 2
