"""The cases of test_same_round for sites in other processes: each process makes the same sites, work and keys by itself.

    python -m tests.federation.flower_cases FOLDER SERVER AUTHORITY SITE

The run's name is the number of the case.
"""

import hashlib
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tests.federation.test_same_round import MECHANISMS, VALUES, sites_in

from sfumato.federation import local
from sfumato.federation.deployment import Node
from sfumato.federation.messages import Ask, Reply
from sfumato.federation.processes import ended
from sfumato.federation.secure.keys import Identity
from sfumato.federation.sites import Site, Work
from sfumato.privacy.plan import DpSgd, NotPrivate
from sfumato.records import UnitTable

CASES = list(MECHANISMS)


def _make(name, value, *, units, private, policy):
    kind = {"population": units, "expected_batch_size": units / 5, "steps": 6}
    plan = DpSgd(**kind, noise_multiplier=3.0, delta=1e-4) if private else NotPrivate(**kind)
    table = UnitTable({"x": torch.full((units, 2), value)}, [f"{name}-{i}" for i in range(units)])
    return Site(name=name, table=table, plan=plan, ledger=Path("replaced"), policy=policy)


def _identity(name: str) -> Identity:
    key = Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest())
    return Identity(public=key.public_key().public_bytes_raw(), sign=key.sign)


@cache
def case(folder: Path, number: int) -> tuple[list[Site], Work]:
    wanted = MECHANISMS[CASES[number]]
    sites = [replace(site, identity=_identity(site.name)) for site in sites_in(_make, folder / str(number), wanted)]
    return sites, wanted.work(sites)


def answering(folder: Path, name: str) -> Callable[[Ask], Reply]:
    def answer(ask: Ask) -> Reply:
        sites, work = case(folder, int(ask.run))
        return local.answer(next(site for site in sites if site.name == name), work, ask)

    return answer


def answering_number(folder: Path, number: int) -> Callable[[Ask], Reply]:
    return answering(folder, sorted(VALUES)[number])


if __name__ == "__main__":
    _folder, _server, _authority, _name = sys.argv[1:]
    _node = Node(
        Path(_folder) / _name, server=_server, authority=Path(_authority), key=Path(_folder) / _name / "site.key"
    )
    with ended([_node.child]):
        _node.serve(answering(Path(_folder), _name), site=_name, stopped=lambda: False)
