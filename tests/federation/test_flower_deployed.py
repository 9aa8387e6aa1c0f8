"""Real processes on this machine: SuperLink, SuperNodes, and our ends of them. Each test takes as long as they need to start."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch

pytest.importorskip("flwr", reason="flwr is not installed: pip install 'sfumato[federation]'")

from tests.federation.conftest import Tiny, charging, work_for
from tests.federation.flower_site import ROUNDS, STEPS, members

from sfumato.errors import OutsideError, UsageError
from sfumato.federation import credentials, rounds, server_state, simulate
from sfumato.federation.deployment import Node, Server
from sfumato.federation.flower_link import Link
from sfumato.federation.keeping import Keeper
from sfumato.federation.processes import LOOPBACK, Child, ended
from sfumato.federation.serving import serve
from sfumato.privacy.ledger import show

ROOT = Path(__file__).parents[2]


@dataclass
class Deployed:
    folder: Path
    server: Server
    sites: list[Child]

    def rounds(
        self, number: int | None = None, *, wait: float = 120.0, keeper: Keeper | None = None
    ) -> server_state.ServerState:
        """The first ``number`` of them."""
        everybody = members(self.folder, len(self.sites))
        work = work_for(everybody, Tiny, charging, rounds=ROUNDS, local_steps=STEPS)
        begun = rounds.begin(work.settings, work.public, simulate.start_of(everybody, work), run="r")

        def stop(server: server_state.ServerState) -> server_state.ServerState | None:
            return rounds.stop(server, "enough") if server.round > number else None

        return serve(
            begun, lambda asked: self.server.exchange(asked, wait=150.0), keeper=keeper, on_round=stop
        )  # fmt: skip

    def site(self, number: int) -> Path:
        return self.folder / f"site-{number}"


@contextmanager
def deployed(folder: Path, sites: int, *, seconds: float = 0.0) -> Iterator[Deployed]:
    server = Server(folder / "server", folder / "keys", hosts=[LOOPBACK])
    keys = {f"site-{n}": credentials.for_site(folder / f"site-{n}" / "site.key") for n in range(sites)}
    children = [
        Child(
            name,
            [
                sys.executable, "-m", "tests.federation.flower_site", str(folder), f"{LOOPBACK}:{server.port}",
                str(server.authority), str(number), str(sites), str(seconds),
            ],
            folder / f"{name}.log",
            {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")]), "OMP_NUM_THREADS": "1"},
        )
        for number, name in enumerate(keys)
    ]  # fmt: skip
    with ended([*children, server.child]):
        for child in children:
            child.start()
        server.start(keys)
        yield Deployed(folder, server, children)
        server.link.close()


def in_one_process(folder: Path, sites: int) -> simulate.FederationResult:
    everybody = members(folder, sites)
    return simulate.simulate(everybody, work_for(everybody, Tiny, charging, rounds=ROUNDS, local_steps=STEPS), run="r")


def wait_until(what: Callable[[], object], seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.1)


def test_two_rounds_over_processes_are_those_of_one_process_and_nothing_is_left_behind(tmp_path):
    import psutil

    with deployed(tmp_path, 2) as federation:
        after = federation.rounds(2)
        listening = {
            (psutil.Process(pid).name(), connection.laddr.ip)
            for child in [federation.server.child, *federation.sites]
            for pid in [child.pid, *(p.pid for p in psutil.Process(child.pid).children(recursive=True))]
            for connection in psutil.Process(pid).net_connections()
            if connection.status == psutil.CONN_LISTEN
        }
        family = [
            pid
            for child in [federation.server.child, *federation.sites]
            for pid in [child.pid, *(p.pid for p in psutil.Process(child.pid).children(recursive=True))]
        ]
    assert {ip for _, ip in listening} == {LOOPBACK}
    assert len(family) == 5 and not any(psutil.pid_exists(pid) for pid in family)

    alone = in_one_process(tmp_path / "alone", 2)
    there, here = after.results, alone.rounds[:2]
    assert [r.sites for r in there] == [r.sites for r in here] == [("site-0", "site-1")] * 2
    # (1 * 2 + 2 * 10) / 3 a round
    expected = torch.tensor([[0.5, -0.5]]) + 2 * 22 / 3
    torch.testing.assert_close(after.state["line.weight"], expected, atol=1e-6, rtol=0)
    for number in range(2):
        assert show(federation.site(number) / "ledger.db")["steps"] == 2 * STEPS
    secrets = [*(tmp_path / "keys").glob("*.key"), *tmp_path.glob("*/*.secret"), *tmp_path.glob("*/site.key")]
    assert len(secrets) == 2 + 4 + 2
    assert {path.stat().st_mode & 0o777 for path in [*secrets, tmp_path / "server" / "superlink.db"]} == {0o600}


@pytest.mark.slow
def test_a_supernode_killed_in_the_middle_of_a_round_comes_back_and_the_round_ends_with_it(tmp_path):
    """The site itself goes on; what it has ready when it is asked again is sent, and nothing is charged twice."""
    import psutil

    with (
        deployed(tmp_path, 2, seconds=4.0) as federation,
        _meanwhile(
            lambda: (
                (federation.site(0) / "step").exists()
                and _kill(psutil.Process(federation.sites[0].pid).children()[0].pid)
            )
        ) as killed,
    ):
        after = federation.rounds(2)
    assert killed and [result.sites for result in after.results] == [("site-0", "site-1")] * 2
    _is_as_in_one_process(federation, after, tmp_path)


@pytest.mark.slow
def test_a_site_killed_in_the_middle_of_a_round_is_left_out_of_it_and_is_there_in_the_next(tmp_path):
    """What it had begun stays charged, and it refuses to answer the same ask a second time."""
    with deployed(tmp_path, 2, seconds=4.0) as federation:

        def kill_and_start_again() -> bool:
            if not (federation.site(0) / "step").exists():
                return False
            _kill(federation.sites[0].pid)
            wait_until(lambda: not federation.sites[0].alive)
            federation.sites[0].start()
            return True

        with _meanwhile(kill_and_start_again) as killed:
            after = federation.rounds(2)
    assert killed
    first, second = after.results
    assert first.sites == ("site-1",) and [out.code for out in first.left_out] == ["replayed"]
    assert second.sites == ("site-0", "site-1")
    torch.testing.assert_close(after.state["line.weight"], torch.tensor([[0.5, -0.5]]) + 10 + 22 / 3, atol=1e-6, rtol=0)
    # one step of the first round, charged before it was killed, and both of the second
    assert show(federation.site(0) / "ledger.db")["steps"] == 1 + STEPS


@pytest.mark.slow
def test_a_superlink_killed_in_the_middle_of_a_round_is_started_again_and_the_round_ends_with_all(tmp_path):
    with deployed(tmp_path, 2, seconds=4.0) as federation:
        with _meanwhile(
            lambda: (federation.site(0) / "step").exists() and _kill(federation.server.child.pid)
        ) as killed:
            after = federation.rounds(2)
        assert killed and federation.server.link.runs == 2 and federation.server.child.starts == 2
    assert [result.sites for result in after.results] == [("site-0", "site-1")] * 2
    _is_as_in_one_process(federation, after, tmp_path)


@pytest.mark.slow
def test_a_server_of_another_authority_gets_nothing_and_a_stranger_registers_nothing(tmp_path):
    federation = Server(tmp_path / "server", tmp_path / "keys", hosts=[LOOPBACK])
    credentials.for_server(tmp_path / "others", [LOOPBACK])
    node = Node(
        tmp_path / "site",
        server=f"{LOOPBACK}:{federation.port}",
        authority=tmp_path / "others" / credentials.CA,
        key=tmp_path / "site" / "site.key",
    )
    keys = {"site": credentials.for_site(tmp_path / "site" / "site.key")}
    asked = []
    with ended([node.child, federation.child]):
        federation.start(keys)
        federation.link.submit()
        until = time.monotonic() + 120
        with pytest.raises(OutsideError) as error:
            node.serve(asked.append, site="site", stopped=lambda: time.monotonic() > until)
        assert error.value.code == "certificate" and not asked
        assert federation.link.online() == {}
        federation.link.close()

        # who is left out loses its key for good
        federation.link.register({})
        with pytest.raises(UsageError, match="its key was unregistered"):
            federation.link.register(keys)
        # and who has not the word of the administrator cannot register one
        stranger = Link(
            federation.link._address, authority=federation.authority.read_bytes(), secret=b"x", administrator="guess"
        )
        assert not stranger.answers()
        with pytest.raises(httpx.HTTPStatusError, match="404"):
            stranger.register(keys)


def _kill(pid: int) -> bool:
    os.kill(pid, signal.SIGKILL)
    return True


@contextmanager
def _meanwhile(what: Callable[[], bool]) -> Iterator[list[bool]]:
    """``what`` is tried until it is true, beside the body. Gives a list with one entry once it was."""
    import threading

    done: list[bool] = []
    over = threading.Event()

    def run() -> None:
        wait_until(what)
        done.append(True)
        over.wait()  # what it started ends with this thread

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield done
    finally:
        over.set()
        thread.join()


def _is_as_in_one_process(federation: Deployed, after: server_state.ServerState, folder: Path) -> None:
    torch.testing.assert_close(after.state["line.weight"], torch.tensor([[0.5, -0.5]]) + 2 * 22 / 3, atol=1e-6, rtol=0)
    for number in range(len(federation.sites)):
        assert show(federation.site(number) / "ledger.db")["steps"] == 2 * STEPS
