"""Show 1 over Flower: with noise off, every mechanism gives the same rounds in its simulation and over real processes."""

import os
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("flwr", reason="flwr is not installed: pip install 'sfumato[federation]'")
pytest.importorskip("ray", reason="ray is not installed: pip install 'sfumato[federation]'")

from tests.federation.engines import in_process
from tests.federation.flower_cases import CASES, answering_number, case
from tests.federation.test_same_round import MECHANISMS, VALUES, three_rounds_by_hand

from sfumato.federation import credentials, rounds, server_state, simulate, site_memory
from sfumato.federation.deployment import Server
from sfumato.federation.processes import LOOPBACK, Child, ended, python
from sfumato.federation.serving import serve
from sfumato.privacy.ledger import show
from sfumato.randomness import TestRandom

ROOT = Path(__file__).parents[2]
NAMES = sorted(VALUES)


def all_cases(exchange, folder: Path) -> list[server_state.ServerState]:
    after = []
    for number in range(len(CASES)):
        sites, work = case(folder, number)
        state = {name: t for name, t in simulate.start_of(sites, work).items() if name in work.public.holders}
        begun = rounds.begin(work.settings, work.public, state, run=str(number))
        with simulate.server_ledger(work, str(number), folder / str(number) / "server") as ledger:
            after.append(serve(begun, exchange, chance=TestRandom(0), ledger=ledger))
    return after


def check(after: list[server_state.ServerState], folder: Path, tmp_path: Path) -> None:
    for number, name in enumerate(CASES):
        server, wanted = after[number], MECHANISMS[name]
        assert [result.sites for result in server.results] == [tuple(NAMES)] * 3, (name, server.results)
        sites, work = case(tmp_path / "alone", number)
        alone = in_process(sites, work, tmp_path / "alone" / str(number) / "server")
        by_hand = three_rounds_by_hand(sites, wanted)
        assert set(server.state) == set(alone)
        for parameter, tensor in server.state.items():
            torch.testing.assert_close(tensor, alone[parameter], rtol=0, atol=1e-6)
            torch.testing.assert_close(tensor, by_hand[parameter], rtol=0, atol=wanted.tolerance)
        for site, here in zip(case(folder, number)[0], sites, strict=True):
            assert site.ledger.exists() == here.ledger.exists()
            home, alone_home = site_memory.kept_at_home(site), site_memory.kept_at_home(here)
            assert set(home) == set(alone_home) == set((wanted.settings or {}).get("home", ()))
            for parameter, tensor in home.items():
                torch.testing.assert_close(tensor, alone_home[parameter], rtol=0, atol=1e-6)
            if here.ledger.exists():
                assert show(site.ledger)["steps"] == show(here.ledger)["steps"]


@pytest.mark.slow
def test_every_mechanism_over_superlink_and_supernodes(tmp_path):
    folder = tmp_path / "deployed"
    server = Server(folder / "server", folder / "keys", hosts=[LOOPBACK])
    keys = {name: credentials.for_site(folder / name / "site.key") for name in NAMES}
    children = [
        Child(
            name,
            python("tests.federation.flower_cases", folder, f"{LOOPBACK}:{server.port}", server.authority, name),
            folder / f"{name}.log",
            {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")]), "OMP_NUM_THREADS": "1"},
        )
        for name in NAMES
    ]
    with ended([*children, server.child]):
        for child in children:
            child.start()
        server.start(keys)
        after = all_cases(lambda asked: server.exchange(asked, wait=300), folder)
        server.link.close()
    check(after, folder, tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # Ray's own
def test_every_mechanism_in_flowers_simulation(tmp_path, monkeypatch):
    from sfumato.federation import flower_app

    folder = tmp_path / "simulated"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "src"), *sys.path]))
    after: list[server_state.ServerState] = []
    try:
        flower_app.simulate(
            lambda exchange: after.extend(all_cases(exchange, folder)),
            partial(answering_number, folder),
            sites=NAMES,
            processors=2,
        )
    finally:
        flower_app.end_simulation()
    check(after, folder, tmp_path)
