"""A site of the tests in a process of its own: what `sfumato federate site` is, with a tiny model.

python -m tests.federation.flower_site FOLDER SERVER AUTHORITY NUMBER SITES SECONDS_A_STEP
"""

import sys
import time
from pathlib import Path

import torch
from tests.federation.conftest import Tiny, charging, work_for

from sfumato.federation import local
from sfumato.federation.deployment import Node, remembering
from sfumato.federation.processes import ended
from sfumato.federation.sites import Site
from sfumato.privacy.plan import DpSgd
from sfumato.records import UnitTable

ROUNDS, STEPS = 3, 2


def members(folder: Path, sites: int) -> list[Site]:
    """The sites, each with a folder of its own: the same in every process."""
    made = []
    for number in range(sites):
        units = 100 * (number + 1)
        plan = DpSgd(
            population=units, expected_batch_size=units / 5, steps=ROUNDS * STEPS, noise_multiplier=3.0, delta=1e-4
        )
        data = torch.full((units, 2), 1.0 + 4 * number)
        table = UnitTable({"x": data}, [f"{number}-{unit}" for unit in range(units)])
        made.append(Site(name=f"site-{number}", table=table, plan=plan, ledger=folder / f"site-{number}" / "ledger.db"))
    return made


def main(folder: str, server: str, authority: str, number: str, sites: str, seconds: str) -> None:
    def slowly(model, table, plan, ledger, *, steps, first_step):
        for step in range(steps):
            charging(model, table, plan, ledger, steps=1, first_step=first_step + step)
            (site.folder / "step").write_text(str(first_step + step))  # so that a test knows that it is in the middle
            time.sleep(float(seconds))

    everybody = members(Path(folder), int(sites))
    site = everybody[int(number)]
    work = work_for(everybody, Tiny, slowly, rounds=ROUNDS, local_steps=STEPS)
    node = Node(site.folder, server=server, authority=Path(authority), key=site.folder / "site.key")
    answer = remembering(lambda ask: local.answer(site, work, ask), site.folder / "last-reply")
    with ended([node.child]):
        node.serve(answer, site=site.name, stopped=lambda: False)


if __name__ == "__main__":
    main(*sys.argv[1:])
